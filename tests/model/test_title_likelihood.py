"""Likelihood of titles: against stock transformers, one title at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dataloader.prompt_batches import BatchLimits
from dataloader.title_batches import TitleDocuments, branch_batch
from dataloader.title_prompt import TitlePrompts
from datasets import SequenceDataset
from model.title_likelihood import (
    CHUNK_ROWS,
    FrozenHeadLoss,
    title_loss,
    title_scores,
    token_log_likelihoods,
)
from tests.helpers import read_tokenizer, shares


@pytest.fixture(scope="module")
def stock(tiny_llama: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture()
def prompts(tiny_llama: Path, toy_data: SequenceDataset) -> TitlePrompts:
    return TitlePrompts(read_tokenizer(tiny_llama), toy_data.titles, max_history=6)


def log_likelihood(model: nn.Module, text: np.ndarray, line: np.ndarray) -> torch.Tensor:
    """Of one line after a text, from all logits."""
    ids = torch.from_numpy(np.concatenate([text, line]))[None]
    logits = model(ids).logits[0].log_softmax(-1)
    rows = torch.arange(len(text) - 1, ids.shape[1] - 1)
    return logits[rows, torch.from_numpy(line)].sum()


@torch.no_grad()
def test_scores_equal_each_title_alone(
    stock: nn.Module, toy_data: SequenceDataset, prompts: TitlePrompts
):
    histories = [prompts.encode(toy_data.item_ids[:n]) for n in (5, 1, 3)]
    items = np.random.default_rng(0).permutation(np.arange(1, 41))[:18].reshape(3, 6)
    lines = [[prompts.lines[i] for i in row] for row in items]
    scores = title_scores(stock, branch_batch(histories, lines, pad_id=1))
    for row, history in enumerate(histories):
        for column, line in enumerate(lines[row]):
            expected = log_likelihood(stock, history, line).item()
            assert scores[row, column].item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_order_of_the_candidates_changes_no_bit(
    stock: nn.Module, toy_data: SequenceDataset, prompts: TitlePrompts
):
    history = prompts.encode(toy_data.item_ids[:5])
    lines = [prompts.lines[i] for i in range(1, 21)]
    scores = title_scores(stock, branch_batch([history], [lines], pad_id=1))[0]
    order = np.random.default_rng(0).permutation(20)
    permuted = [lines[i] for i in order]
    assert torch.equal(
        title_scores(stock, branch_batch([history], [permuted], pad_id=1))[0], scores[order]
    )


def test_streamed_targets_equal_separate_texts(
    stock: nn.Module, toy_data: SequenceDataset, prompts: TitlePrompts
):
    documents = TitleDocuments(toy_data, prompts, limits=BatchLimits(4, 300), pad_id=1)
    numbers = [0, 9, 25]
    batches = documents.__getitems__(numbers)
    loss = sum(title_loss(stock, batch) * share for batch, share in zip(batches, shares(batches)))
    parameters = [p for name, p in stock.named_parameters() if "layers" in name]
    gradients = torch.autograd.grad(loss, parameters)
    total, count = torch.zeros(()), 0
    for number in numbers:
        items = toy_data.item_ids[documents.starts[number] : documents.ends[number]]
        first = documents.first_targets[number] - documents.starts[number]
        for index in range(first, len(items)):
            line = prompts.lines[items[index]]
            total = total - log_likelihood(stock, prompts.encode(items[:index]), line)
            count += len(line)
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)
    for found, expected in zip(gradients, torch.autograd.grad(total / count, parameters)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_loss_of_a_frozen_head_is_cross_entropy():
    torch.manual_seed(0)
    x = torch.randn(2 * CHUNK_ROWS + 5, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(11, 6, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    labels = torch.randint(11, (len(x),))
    for b in (None, bias):
        found = FrozenHeadLoss.apply(x, weight, b, labels)
        expected = nn.functional.cross_entropy(nn.functional.linear(x, weight, b), labels)
        torch.testing.assert_close(found, expected)
        (found_gradient,) = torch.autograd.grad(2 * found, x)
        (gradient,) = torch.autograd.grad(2 * expected, x)
        torch.testing.assert_close(found_gradient, gradient)


def test_token_log_likelihoods_with_a_bias():
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, 11), torch.randn(CHUNK_ROWS + 3, 6)
    labels = torch.randint(11, (len(hidden),))
    expected = head(hidden).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(token_log_likelihoods(head, hidden, labels), expected)
