"""The prefix tree of titles and probabilities on it."""

import numpy as np
import pytest

from dataloader.title_trie import TitleTrie

END = 9
LINES = [
    np.empty(0, np.int64),
    *(
        np.array([*tokens, END])
        for tokens in ([5, 6, 7], [3], [5, 6, 8, 8], [5, 4], [5, 6, 7], [2, 2, 2])
    ),
]


@pytest.fixture()
def trie() -> TitleTrie:
    return TitleTrie(LINES)


def test_forks_and_branches(trie: TitleTrie):
    assert trie.items.tolist() == [6, 2, 4, 1, 5, 3]
    by_fork = {}
    for branch, fork in enumerate(trie.forks.tolist()):
        items = trie.items[trie.starts[branch] : trie.ends[branch]]
        token = int(trie.tokens[trie.branch_tokens[branch]])
        by_fork.setdefault(fork, {})[token] = sorted(items.tolist())
    assert sorted(by_fork.values(), key=lambda branches: -len(branches)) == [
        {2: [6], 3: [2], 5: [1, 3, 4, 5]},
        {4: [4], 6: [1, 3, 5]},
        {7: [1, 5], 8: [3]},
    ]
    assert trie.offsets.tolist() == [0, 3, 5, 7]


def test_paths_spell_the_titles(trie: TitleTrie):
    for item, line in enumerate(LINES[1:], start=1):
        branches, depths = trie.path(item)
        assert trie.tokens[trie.branch_tokens[branches]].tolist() == line[depths].tolist()
        assert (np.diff(depths) > 0).all()
        position = trie.items.tolist().index(item)
        assert (trie.starts[branches] <= position).all() and (position < trie.ends[branches]).all()
    assert [len(trie.path(item)[0]) for item in range(1, 7)] == [3, 1, 3, 2, 3, 1]


def test_probability_is_the_product_along_the_path(trie: TitleTrie):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(7), size=3)
    probabilities[:, 0] = 0
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    cumulative = trie.cumulative(probabilities)
    for row, p in enumerate(probabilities):
        for item in range(1, 7):
            log_probability = trie.log_share(cumulative[row], item)
            for branch in trie.path(item)[0]:
                fork = trie.forks[branch]
                options = np.arange(trie.offsets[fork], trie.offsets[fork + 1])
                rows = np.full(len(options), row)
                masses = trie.masses(cumulative, rows, options)
                log_probability += np.log(masses[options == branch][0] / masses.sum())
            assert log_probability == pytest.approx(np.log(p[item]))


def test_impossible_items_keep_a_finite_log(trie: TitleTrie):
    cumulative = trie.cumulative(np.array([[0.0, 0, 0, 0, 0, 0, 1.0]]))
    rows = np.zeros(len(trie.forks), np.int64)
    masses = trie.masses(cumulative, rows, np.arange(len(trie.forks)))
    assert masses.min() > 0 and masses.max() == 1
    assert np.isfinite(trie.log_share(cumulative[0], 1))


@pytest.mark.parametrize("lines", [LINES[:2], [LINES[0], LINES[1], LINES[1]]])
def test_titles_that_cannot_be_told_apart(lines: list[np.ndarray]):
    trie = TitleTrie(lines)
    assert len(trie.forks) == 0 and len(trie.path(1)[0]) == 0
    cumulative = trie.cumulative(np.array([[0, *[1 / (len(lines) - 1)] * (len(lines) - 1)]]))
    assert trie.log_share(cumulative[0], 1) == pytest.approx(-np.log(len(lines) - 1))
