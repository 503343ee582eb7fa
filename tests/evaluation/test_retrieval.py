"""Ranks, candidates and hard negatives against their definitions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from config import MODEL_CODES
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories, Prefixes
from datasets import SequenceDataset
from datasets.base import Filters, RawData, RawSource
from datasets.cache import build_cached
from evaluation.retrieval import (
    hard_negatives,
    rank_interactions,
    retrieve,
    score_catalogue,
    target_ranks,
)
from jagged import JaggedBatch
from metrics import ranking_metrics
from model.base import Retriever
from tests.helpers import make_data, small_model

LENGTHS = [12, 7, 25, 3, 16]


def loader_of(data: SequenceDataset, split: str, model: Retriever) -> DataLoader:
    return evaluation_loader(Histories(data, split, 20, model.spec.mask_token), 2, 0)


def history(data: SequenceDataset, user: int, split: str) -> list[int]:
    return data.item_ids[data.offsets[user] : data.history_ends(split)[user]].tolist()


def scores_after(model: Retriever, items: list[int]) -> torch.Tensor:
    """(V + 1,) scores of one history."""
    mask = [] if model.spec.mask_token is None else [model.spec.mask_token]
    ids = torch.tensor((items + mask)[-20:])
    last = torch.tensor([len(ids) - 1])
    with torch.no_grad():
        return model(JaggedBatch(ids, torch.arange(len(ids)), len(ids), last))[0]


# Ranks ------------------------------------------------------------------------------------------


def test_target_ranks():
    scores = torch.tensor([[0.0, 3, 1, 2], [5, 5, 5, 5], [0, 1, 2, 3]])
    assert target_ranks(scores, torch.tensor([2, 1, 3])).tolist() == [3, 1, 1]


def test_scores_that_are_not_numbers_never_look_good():
    nan = torch.nan
    scores = torch.tensor([[0, nan, 1, 2], [0, 3, nan, nan], [nan, nan, nan, nan]])
    assert target_ranks(scores, torch.tensor([1, 1, 2])).tolist() == [5, 3, 5]


def test_excluded_targets_rank_below_all_others():
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0]])
    assert target_ranks(scores, torch.tensor([2])).tolist() == [3]


@pytest.mark.parametrize("mask_history", [False, True])
def test_score_catalogue(mask_history: bool):
    data, model = make_data(LENGTHS), small_model("lru").eval()
    batch = Histories(data, "test", 20).__getitems__([0, 1, 2])
    with torch.no_grad():
        scores = score_catalogue(model, batch, mask_history)
    for user in range(3):
        items = history(data, user, "test")
        expected = scores_after(model, items)
        expected[[0, *(items if mask_history else [])]] = -torch.inf
        torch.testing.assert_close(scores[user], expected)


# Candidates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize("code", MODEL_CODES)
def test_retrieve(code: str, mask_history: bool):
    data, model = make_data(LENGTHS), small_model(code)
    for split in ("val", "test"):
        ours = retrieve(
            model, loader_of(data, split, model), mask_history=mask_history, num_candidates=5,
            description="",
        )  # fmt: skip
        assert [x.dtype for x in ours] == [np.int32, np.float32, np.int32, np.int32]
        assert ours.items.shape == ours.scores.shape == (5, 5)
        assert ours.labels.tolist() == data.targets(split).tolist()
        for user in range(5):
            items = history(data, user, split)
            scores = scores_after(model, items)
            scores[[0, *(items if mask_history else [])]] = -torch.inf
            best = scores.argsort(descending=True)[:5]
            assert ours.items[user].tolist() == best.tolist()
            torch.testing.assert_close(torch.from_numpy(ours.scores[user]), scores[best])
            target = data.targets(split)[user]
            assert ours.label_ranks[user] == 1 + int((scores > scores[target]).sum())


def test_more_candidates_than_items_are_left():
    data, model = make_data(LENGTHS), small_model("lru")

    def candidates(mask_history: bool) -> Any:
        loader = loader_of(data, "test", model)
        return retrieve(model, loader, mask_history=mask_history, num_candidates=30, description="")

    masked, free = candidates(True), candidates(False)
    for user, items in enumerate(masked.items):
        assert sorted(items.tolist()) == list(range(1, 31))
        seen = history(data, user, "test")
        left = [item for item in free.items[user] if item not in seen]
        assert items[: len(left)].tolist() == left
        assert (np.isfinite(masked.scores[user]) == (np.arange(30) < len(left))).all()


def test_dropout_is_off():
    data, model = make_data(LENGTHS), small_model("sas").train()
    model.dropout.p = 0.5
    loader = loader_of(data, "val", model)
    options = {"mask_history": True, "num_candidates": 5, "description": ""}
    first, second = (retrieve(model, loader, **options) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))


# Hard negatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["lru", "bert"])
def test_hard_negatives(code: str):
    data, model = make_data(LENGTHS), small_model(code)
    prefixes = Prefixes(data, 20, model.spec.mask_token)
    negatives = hard_negatives(model, evaluation_loader(prefixes, 4, 0), 6)
    assert negatives.shape == (len(prefixes), 6) and negatives.dtype == np.int32
    for row, start, end in zip(negatives, prefixes.starts, prefixes.ends):
        items = data.item_ids[start:end].tolist()
        scores = scores_after(model, items)
        scores[[0, *items, data.item_ids[end]]] = -torch.inf
        assert row.tolist() == scores.argsort(descending=True)[:6].tolist()


def test_hard_negatives_where_few_items_are_left():
    data, model = make_data([20, 5]), small_model("lru")
    prefixes = Prefixes(data, 20)
    negatives = hard_negatives(model, evaluation_loader(prefixes, 4, 0), 40)
    assert negatives.shape == (len(prefixes), 40)
    for row, start, end in zip(negatives, prefixes.starts, prefixes.ends):
        left = set(range(1, 31)) - set(data.item_ids[start : end + 1].tolist())
        assert set(row[: len(left)].tolist()) == left and not row[len(left) :].any()


# Ranks of given items ---------------------------------------------------------------------------


def test_rank_interactions():
    data, model = make_data(LENGTHS), small_model("lru").eval()
    users = np.array([0, 0, 0, 2, 2, 4], dtype=np.int32)  # users 1 and 3 have none
    items = np.array([3, 9, 30, 1, 1, 17], dtype=np.int32)
    ranks, ranks_of_targets = rank_interactions(
        model, loader_of(data, "val", model), users, items, "judge"
    )
    all_scores = []
    for user in range(5):
        seen = history(data, user, "val")
        scores = scores_after(model, seen)
        scores[[0, *seen]] = -torch.inf
        all_scores.append(scores)
    expected = [
        1 + int((all_scores[user] > all_scores[user][item]).sum())
        for user, item in zip(users, items)
    ]
    assert ranks.tolist() == expected
    targets = data.targets("val")
    expected = [1 + int((x > x[t]).sum()) for x, t in zip(all_scores, targets)]
    assert ranks_of_targets.tolist() == expected


def test_rank_no_interactions():
    data, model = make_data(LENGTHS), small_model("lru")
    nothing = np.zeros(0, dtype=np.int32)
    ranks, ranks_of_targets = rank_interactions(
        model, loader_of(data, "val", model), nothing, nothing, ""
    )
    assert ranks.shape == (0,) and ranks_of_targets.shape == (5,)


# From names to metrics --------------------------------------------------------------------------

any_name = st.text(min_size=1, max_size=6)  # anything that a UTF-8 file can hold


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(any_name, any_name, st.integers(0, 99)), min_size=3, max_size=40),
    st.randoms(use_true_random=False),
)
def test_metrics_do_not_depend_on_names(tmp_path: Path, rows: list, random: Any):
    """Ranks after numbering and caching equal those computed from the names themselves."""
    rows = [(user, item, 3 * moment + more) for user, item, moment in rows for more in range(3)]
    titles = {item: "t" for _, item, _ in rows}
    table = pd.DataFrame(rows, columns=["user", "item", "timestamp"]).assign(rating=1.0)
    file = tmp_path / "raw"
    file.write_bytes(json.dumps(rows).encode())
    source = RawSource("x", (file,), lambda: None, lambda: RawData(table, titles))
    filters = Filters(min_uc=3, min_sc=1)
    data = build_cached(source, filters, tmp_path)
    cached = build_cached(source, filters, tmp_path)
    assert (data.user_names, data.item_names) == (cached.user_names, cached.item_names)
    assert sorted(data.user_names) == sorted({user for user, _, _ in rows})
    scores = {item: random.random() for item in data.item_names[1:]}
    matrix = torch.tensor([[-np.inf, *scores.values()]], dtype=torch.float64)
    targets = torch.from_numpy(cached.targets("test").astype(np.int64))
    ranks = target_ranks(matrix.expand(cached.num_users, -1), targets).tolist()
    for user, rank, target in zip(cached.user_names, ranks, targets.tolist()):
        own = [(moment, item) for name, item, moment in rows if name == user]
        last = {item for moment, item in own if moment == max(own)[0]}
        name = cached.item_names[target]
        assert name in last
        assert rank == 1 + sum(x > scores[name] for x in scores.values())
    share = np.mean([rank <= 2 for rank in ranks])
    assert ranking_metrics(np.array(ranks), [2])["Recall@2"] == share
