"""The ranker's scores, and the ranks of both stages."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dataloader.candidates import Candidates
from dataloader.prompt import PromptBuilder
from dataloader.prompt_batches import EvaluationPrompts
from dataloader.sampler import evaluation_loader
from datasets import SequenceDataset
from errors import InputError
from evaluation.reranking import (
    reranked,
    score_candidates,
    two_stage_ranks,
)
from tests.helpers import make_builder, make_data, read_tokenizer

# Scores of the ranker ---------------------------------------------------------------------------


@pytest.fixture()
def prompts(tiny_llama: Path) -> PromptBuilder:
    titles = ["", *(f"Part {i} of the Story" for i in range(30))]
    return make_builder(read_tokenizer(tiny_llama), titles)


@pytest.fixture()
def model(tiny_llama: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture()
def data() -> SequenceDataset:
    return make_data([6, 5, 9, 4])


@pytest.fixture()
def candidates(data: SequenceDataset) -> Candidates:
    """20 random candidates of each user, with the targets of users 0, 2 and 3."""
    rng = np.random.default_rng(0)
    labels = data.targets("test")
    items = np.stack([rng.permutation(30)[:20] + 1 for _ in labels])
    items[[0, 2, 3], [3, 0, 19]] = labels[[0, 2, 3]]
    scores = -np.cumsum(np.ones((4, 20)), axis=1)
    return Candidates(items, scores, labels, np.ones(4, dtype=np.int32))


def score(
    model: nn.Module,
    data: SequenceDataset,
    candidates: Candidates,
    prompts: PromptBuilder,
    permutations: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    examples = EvaluationPrompts(
        data, "test", candidates, prompts, max_history=5, pad_id=1, permutations=permutations
    )
    loader = evaluation_loader(examples, 4, 0)
    return score_candidates(model, loader, torch.from_numpy(prompts.letter_ids), "test")


@pytest.mark.parametrize("permutations", [1, 3])
def test_scores_are_averaged_over_orders(
    model: nn.Module,
    data: SequenceDataset,
    candidates: Candidates,
    prompts: PromptBuilder,
    permutations: int,
):
    users, scores = score(model, data, candidates, prompts, permutations)
    assert users.tolist() == candidates.retrieved.tolist()
    for user, averaged in zip(users, scores):
        history = data.item_ids[data.offsets[user] : data.offsets[user + 1] - 1][-5:]
        expected = np.zeros(20)
        for permutation in range(permutations):
            order = np.arange(20)
            if permutation:
                order = np.random.default_rng([0, user, permutation]).permutation(20)
            prompt = torch.from_numpy(prompts.encode(history, candidates.items[user][order]))
            with torch.no_grad():
                logits = model(prompt[None]).logits[0, -1, torch.from_numpy(prompts.letter_ids)]
            expected[order] += logits.numpy() / permutations
        np.testing.assert_allclose(averaged, expected, atol=1e-4)


def test_broken_scores_are_refused(
    model: nn.Module, data: SequenceDataset, candidates: Candidates, prompts: PromptBuilder
):
    num_users = len(candidates.retrieved)
    model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match=f"scores of {num_users} users are infinite or NaN"):
        score(model, data, candidates, prompts)


def test_nobody_to_score(
    model: nn.Module, data: SequenceDataset, candidates: Candidates, prompts: PromptBuilder
):
    absent = candidates._replace(labels=np.full(4, 31))
    users, scores = score(model, data, absent, prompts)
    assert users.shape == (0,) and scores.shape == (0, 20)
    assert reranked(absent, users, scores).label_ranks.shape == (0,)


# Ranks -------------------------------------------------------------------------------


@pytest.fixture()
def toy() -> Candidates:
    """Three users, of whom 0 and 2 have their target among the candidates."""
    return Candidates(
        items=np.array([[4, 5, 6], [7, 8, 9], [1, 2, 3]], dtype=np.int32),
        scores=np.array([[3, 2, 1]] * 3, dtype=np.float32),
        labels=np.array([6, 10, 1], dtype=np.int32),
        label_ranks=np.array([3, 25, 1], dtype=np.int32),
    )


def test_ranks_of_both_stages(toy: Candidates):
    users = toy.retrieved
    assert users.tolist() == [0, 2]
    scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.2, 0.3]], dtype=np.float32)
    ranking = reranked(toy, users, scores)
    assert ranking.items.tolist() == [[5, 6, 4], [3, 1, 2]]  # equal scores keep their order
    assert ranking.label_ranks.tolist() == [2, 2]
    assert two_stage_ranks(toy, users, ranking).tolist() == [2, 25, 2]
    assert toy.label_ranks.tolist() == [3, 25, 1]
