"""Titles chosen by language model and prior: against one title at a time, from all logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dataloader.candidates import Candidates
from dataloader.guided_titles import GuidedCandidates, GuidedDocuments
from dataloader.item_prior import ItemPrior, ItemScores, PopularityPrior, RetrieverPrior
from dataloader.prompt_batches import BatchLimits
from dataloader.title_prompt import TitlePrompts
from dataloader.title_trie import TitleTrie
from datasets import SequenceDataset
from model.guided_titles import (
    add_prior_weights,
    guided_loss,
    guided_scores,
    log_softmax_by_group,
    prior_weights,
)
from tests.helpers import read_tokenizer, shares

WEIGHTS = (0.7, 0.9)
NO_SCORES = np.empty(0)


@pytest.fixture()
def model(tiny_llama: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    add_prior_weights(model)
    with torch.no_grad():
        model.log_prior_weights.copy_(torch.tensor(WEIGHTS).log())
    return model


@pytest.fixture()
def prompts(tiny_llama: Path, toy_data: SequenceDataset) -> TitlePrompts:
    return TitlePrompts(read_tokenizer(tiny_llama), toy_data.titles, max_history=6)


@pytest.fixture()
def trie(prompts: TitlePrompts) -> TitleTrie:
    return TitleTrie(prompts.lines)


def make_prior(keys: np.ndarray, num_items: int, mask_history: bool = True) -> RetrieverPrior:
    """Of two retrievers with random embeddings."""
    rng = np.random.default_rng(0)
    layers = [
        ItemScores(rng.normal(size=(num_items + 1, 4)), rng.normal(size=num_items + 1))
        for _ in range(2)
    ]
    encodings = rng.normal(size=(len(keys), 4))
    return RetrieverPrior(keys, encodings, layers, keys % 2, mask_history=mask_history)


def log_probability(
    model: nn.Module, text: np.ndarray, item: int, lines: list[np.ndarray], p: np.ndarray
) -> torch.Tensor:
    """log q of one title after a text, by the definition; p (V + 1,) is the retriever's."""
    a, b = prior_weights(model)
    line = lines[item]
    logits = model(torch.from_numpy(np.concatenate([text, line]))[None]).logits[0]
    total = torch.zeros(())
    for depth, token in enumerate(line):
        masses: dict[int, float] = {}
        for other in range(1, len(lines)):
            if lines[other][:depth].tolist() == line[:depth].tolist():
                key = int(lines[other][depth])
                masses[key] = masses.get(key, 0.0) + p[other]
        options = list(masses)
        z = logits[len(text) + depth - 1][options]
        log_p = torch.tensor([max(masses[x], 1e-15) for x in options]).log()
        total = total + (a * z + b * log_p).log_softmax(0)[options.index(int(token))]
    same = sum(p[i] for i in range(1, len(lines)) if lines[i].tolist() == line.tolist())
    return total + float(np.log(p[item] / same))


def score(
    model: nn.Module,
    data: SequenceDataset,
    prompts: TitlePrompts,
    trie: TitleTrie,
    items: np.ndarray,
    users: np.ndarray,
    prior: ItemPrior | None = None,
) -> torch.Tensor:
    """Scores of the candidates ``items`` (num_users, C) of ``users``, ascending."""
    candidates = Candidates(items, NO_SCORES, NO_SCORES, NO_SCORES)
    prior = prior or make_prior(np.arange(data.num_users), data.num_items)
    examples = GuidedCandidates(
        data, "test", candidates, prompts, users=users, pad_id=1, prior=prior
    )
    batch = examples.__getitems__(list(range(len(users))))
    scores = guided_scores(model, batch, torch.from_numpy(trie.tokens))
    return scores[batch["users"].argsort()]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["retriever", "popularity"])
def test_scores_equal_each_title_alone(
    model: nn.Module, toy_data: SequenceDataset, prompts: TitlePrompts, trie: TitleTrie, kind: str
):
    users = np.array([3, 7, 50])
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(40)[:6] + 1 for _ in range(toy_data.num_users)])
    prior: ItemPrior = make_prior(np.arange(toy_data.num_users), toy_data.num_items)
    if kind == "popularity":
        prior = PopularityPrior(toy_data.training_counts(), mask_history=True)
    scores = score(model, toy_data, prompts, trie, items, users, prior)
    for row, user in enumerate(users):
        history = toy_data.item_ids[toy_data.offsets[user] : toy_data.offsets[user + 1] - 1]
        (p,) = prior.probabilities(np.array([user]), [history])
        text = prompts.encode_history(history)
        for column, item in enumerate(items[user]):
            if p[item] > 0:
                expected = log_probability(model, text, item, prompts.lines, p).item()
                assert scores[row, column].item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_scores_are_a_distribution_over_the_catalogue(
    model: nn.Module, toy_data: SequenceDataset, prompts: TitlePrompts, trie: TitleTrie
):
    users = np.array([0, 9])
    items = np.tile(np.arange(1, 41), (toy_data.num_users, 1))
    scores = score(model, toy_data, prompts, trie, items, users)
    assert scores.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)


@torch.no_grad()
def test_the_retriever_alone(
    model: nn.Module, toy_data: SequenceDataset, prompts: TitlePrompts, trie: TitleTrie
):
    model.log_prior_weights.copy_(torch.tensor([-torch.inf, 0.0]))
    items = np.tile(np.arange(1, 41), (toy_data.num_users, 1))
    scores = score(model, toy_data, prompts, trie, items, np.array([5]))
    history = toy_data.item_ids[toy_data.offsets[5] : toy_data.offsets[6] - 1]
    prior = make_prior(np.arange(toy_data.num_users), toy_data.num_items)
    (p,) = prior.probabilities(np.array([5]), [history])
    np.testing.assert_allclose(scores[0].exp().numpy(), p[1:], rtol=1e-4, atol=1e-9)


@torch.no_grad()
def test_order_of_the_candidates_changes_no_bit(
    model: nn.Module, toy_data: SequenceDataset, prompts: TitlePrompts, trie: TitleTrie
):
    items = np.tile(np.arange(1, 21), (toy_data.num_users, 1))
    order = np.random.default_rng(0).permutation(20)
    users = np.array([2, 8])
    scores = score(model, toy_data, prompts, trie, items, users)
    assert torch.equal(
        score(model, toy_data, prompts, trie, items[:, order], users), scores[:, order]
    )


def test_streamed_targets_equal_separate_texts(
    model: nn.Module, toy_data: SequenceDataset, prompts: TitlePrompts, trie: TitleTrie
):
    documents = GuidedDocuments(toy_data, prompts, limits=BatchLimits(4, 300), pad_id=1)
    prior = make_prior(documents.interactions(np.arange(len(documents))), toy_data.num_items)
    documents.prior = prior
    numbers = [0, 9, 25]
    tokens = torch.from_numpy(trie.tokens)
    batches = documents.__getitems__(numbers)
    loss = sum(
        guided_loss(model, batch, tokens) * share for batch, share in zip(batches, shares(batches))
    )
    parameters = [p for name, p in model.named_parameters() if "layers" in name or "prior" in name]
    gradients = torch.autograd.grad(loss, parameters)
    total, count = torch.zeros(()), 0
    for number in numbers:
        start, user = documents.starts[number], documents.users[number]
        for index in range(documents.first_targets[number], documents.ends[number]):
            item = toy_data.item_ids[index]
            history = toy_data.item_ids[toy_data.offsets[user] : index]
            (p,) = prior.probabilities(np.array([index]), [history], np.array([item]))
            text = prompts.encode(toy_data.item_ids[start:index])
            log_q = log_probability(model, text, item, prompts.lines, p)
            total = total + float(np.log(p[item])) - log_q
            count += 1
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)
    for found, expected in zip(gradients, torch.autograd.grad(total / count, parameters)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_every_training_item_but_the_first_is_a_target_once(
    toy_data: SequenceDataset, prompts: TitlePrompts, trie: TitleTrie
):
    documents = GuidedDocuments(toy_data, prompts, limits=BatchLimits(4, 300), pad_id=1)
    found = documents.interactions(np.arange(len(documents)))
    assert found.tolist() == toy_data.training_prefixes()[1].tolist()
    assert all(documents.num_targets(index) > 0 for index in range(len(documents)))


def test_items_of_the_history_are_impossible_unless_they_are_the_target():
    prior = make_prior(np.array([4, 6]), 10)
    (p,) = prior.probabilities(np.array([6]), [np.array([2, 3])], np.array([3]))
    assert p[0] == p[2] == 0 and p[3] > 0 and p.sum() == pytest.approx(1)
    free = make_prior(np.array([4, 6]), 10, mask_history=False)
    assert (free.probabilities(np.array([6]), [np.array([2, 3])])[0, 1:] > 0).all()
    layer = prior.layers[0]
    scores = prior.encodings[1] @ layer.embeddings.T + layer.bias
    kept = [1, 3, *range(4, 11)]
    np.testing.assert_allclose(p[kept], np.exp(scores[kept]) / np.exp(scores[kept]).sum())


def test_popularity_counts_all_interactions_but_the_target():
    prior = PopularityPrior(np.array([0, 3, 1, 5]), mask_history=True)
    histories = [np.array([1]), np.array([3, 2])]
    found = prior.probabilities(np.arange(2), histories)
    np.testing.assert_allclose(found, [[0, 0, 2 / 8, 6 / 8], [0, 1, 0, 0]])
    found = prior.probabilities(np.arange(2), histories, np.array([3, 3]))
    np.testing.assert_allclose(found, [[0, 0, 2 / 7, 5 / 7], [0, 4 / 9, 0, 5 / 9]])


def test_log_softmax_by_group():
    torch.manual_seed(0)
    scores = torch.randn(9, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 2, 2, 0, 1, 2, 0, 0, 2])
    found = log_softmax_by_group(scores, groups, 3)
    for group in range(3):
        expected = scores[groups == group].log_softmax(0)
        torch.testing.assert_close(found[groups == group], expected)
    assert torch.autograd.gradcheck(lambda x: log_softmax_by_group(x, groups, 3), (scores,))
