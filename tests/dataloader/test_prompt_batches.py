"""Batches of prompts: their examples, negatives, orders and grouping into micro-batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataloader.candidates import Candidates
from dataloader.prompt import PromptBuilder
from dataloader.prompt_batches import (
    IGNORE_INDEX,
    BatchLimits,
    EvaluationPrompts,
    TrainingPrompts,
    micro_batches,
    pad_left,
    sample_negatives,
    training_batches,
)
from tests.helpers import make_builder, make_data, read_tokenizer

EOS = 1
LENGTHS = [6, 3, 9]  # training sequences of 4, 1 and 7 items


@pytest.fixture()
def prompts(tiny_llama: Path) -> PromptBuilder:
    titles = ["", *(f"Part {i} of the Story" for i in range(30))]
    return make_builder(read_tokenizer(tiny_llama), titles)


def training_prompts(prompts: PromptBuilder, **options: Any) -> TrainingPrompts:
    arguments = {
        "num_negatives": 4, "max_history": 5, "limits": BatchLimits(3), "eos_id": EOS,
        "on_inputs": False, "seed": 0,
    }  # fmt: skip
    return TrainingPrompts(make_data(LENGTHS), prompts, **(arguments | options))


# Padding and negatives --------------------------------------------------------------------------


def test_pad_left():
    batch = pad_left([np.array([5, 6, 7]), np.array([8]), np.array([9, 9])], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 1, 8], [1, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


def test_negatives_are_distinct_and_allowed():
    rng = np.random.default_rng(0)
    counts = np.zeros(11, dtype=int)
    for _ in range(1000):
        negatives = sample_negatives(rng, 10, np.array([2, 7]), 4)
        assert len(set(negatives.tolist())) == 4
        counts[negatives] += 1
    assert not counts[[0, 2, 7]].any()
    assert counts[[1, 3, 4, 5, 6, 8, 9, 10]].min() > 430  # 500 expected


def test_fewer_negatives_if_few_items_are_left():
    negatives = sample_negatives(np.random.default_rng(0), 6, np.array([1, 2, 3]), 5)
    assert sorted(negatives) == [4, 5, 6]


# Micro-batches ----------------------------------------------------------------------------------


FIXED = 20


def cost(groups: list[list[int]]) -> int:
    return sum(max(group) * len(group) + FIXED for group in groups)


def partitions(items: list[int]) -> list[list[list[int]]]:
    """All ways to divide a list into groups, contiguous or not."""
    if not items:
        return [[]]
    first, *others = items
    found = []
    for partition in partitions(others):
        found.append([[first], *partition])
        for i, group in enumerate(partition):
            found.append([*partition[:i], [first, *group], *partition[i + 1 :]])
    return found


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_have_the_lowest_cost(seed: int):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 100, size=int(rng.integers(1, 8)))
    max_rows, max_tokens = int(rng.integers(1, 6)), int(rng.integers(50, 400))
    groups = micro_batches(lengths, BatchLimits(max_rows, max_tokens, FIXED))
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    assert (np.diff(lengths[np.concatenate(groups)]) <= 0).all()

    def allowed(group: list[int]) -> bool:
        return len(group) <= max_rows and (len(group) == 1 or max(group) * len(group) <= max_tokens)

    ours = [lengths[group].tolist() for group in groups]
    assert all(map(allowed, ours))
    others = (p for p in partitions(lengths.tolist()) if all(map(allowed, p)))
    assert cost(ours) == min(map(cost, others))


def test_micro_batches_without_a_limit_of_tokens():
    lengths = np.array([10, 500, 499, 12])
    groups = micro_batches(lengths, BatchLimits(4))
    assert [group.tolist() for group in groups] == [[1, 2], [3, 0]]


def test_packed_sequences_share_the_fewest_micro_batches():
    lengths = np.array([10, 500, 499, 12, 30])
    assert len(micro_batches(lengths, BatchLimits(5, 1051))) == 2
    (group,) = micro_batches(lengths, BatchLimits(5, 1051), packed=True)
    assert group.tolist() == [1, 2, 4, 3, 0]
    groups = micro_batches(lengths, BatchLimits(5, 1050), packed=True)
    assert sorted(np.concatenate(groups)) == [0, 1, 2, 3, 4]
    assert all(lengths[group].sum() <= 1050 for group in groups) and len(groups) == 2
    sequences = [np.arange(length) for length in lengths]
    options = {"num_targets": np.ones(5, int), "users": np.arange(5), "pad_id": 1}
    for packed, count in ((False, 2), (True, 1)):
        limits = BatchLimits(5, 1051, packed=packed)
        assert len(training_batches(sequences, limits=limits, **options)) == count


def test_targets_of_micro_batches():
    sequences = [np.array(x) for x in ([5, 6, 7, 8], [9, 9], [3, 4, 5])]
    first, second = training_batches(
        sequences, np.array([3, 1, 2]), np.array([7, 8, 9]), pad_id=1, limits=BatchLimits(2)
    )
    assert first["input_ids"].tolist() == [[5, 6, 7, 8], [1, 3, 4, 5]]
    assert first["targets"].tolist() == [[6, 7, 8], [IGNORE_INDEX, 4, 5]]
    assert (first["users"], first["num_targets"]) == ([7, 9], 5)
    assert second["input_ids"].tolist() == [[9, 9]] and second["targets"].tolist() == [[9]]
    assert (second["users"], second["num_targets"]) == ([8], 1)


# Training prompts -------------------------------------------------------------------------------


def test_every_prefix_is_an_example(prompts: PromptBuilder):
    data = make_data(LENGTHS)
    examples = training_prompts(prompts)
    assert len(examples) == 3 + 0 + 6
    targets = []
    for number in range(len(examples)):
        history, candidates, index = examples.example(number)
        targets.append(candidates[index])
        assert len(candidates) == 5 == len(set(candidates.tolist()))
        negatives = np.delete(candidates, index)
        start = 0 if number < 3 else 9
        prefix = data.item_ids[start : start + (number if number < 3 else number - 3) + 1]
        assert history.tolist() == prefix[-5:].tolist()
        assert not set(negatives.tolist()) & set(prefix.tolist())
    assert targets == [*data.item_ids[1:4], *data.item_ids[10:16]]


def test_examples_depend_only_on_their_number(prompts: PromptBuilder):
    first, second = training_prompts(prompts), training_prompts(prompts)
    for number in (5, 0, 5):
        for ours, theirs in zip(first.example(number), second.example(number)):
            assert np.array_equal(ours, theirs)
    history, candidates, _ = first.example(5)
    next_epoch = first.example(5 + len(first))
    assert np.array_equal(next_epoch[0], history)
    assert not np.array_equal(next_epoch[1], candidates)
    assert not np.array_equal(training_prompts(prompts, seed=1).example(5)[1], candidates)


def test_index_of_the_target_is_uniform(prompts: PromptBuilder):
    examples = training_prompts(prompts)
    indices = [examples.example(number)[2] for number in range(2000)]
    assert np.bincount(indices, minlength=5).min() > 330  # 400 expected


def test_hard_negatives_are_always_included(prompts: PromptBuilder):
    data = make_data(LENGTHS)
    starts, ends = data.training_prefixes()
    hard = np.stack(
        [np.setdiff1d(np.arange(1, 31), data.item_ids[s : e + 1])[:3] for s, e in zip(starts, ends)]
    ).astype(np.int32)
    hard[4, 1:] = 0  # the retriever found only one
    examples = training_prompts(prompts, num_negatives=7, hard_negatives=hard)
    for number in range(2 * len(examples)):
        history, candidates, index = examples.example(number)
        negatives = set(np.delete(candidates, index).tolist())
        expected = hard[number % len(examples)]
        assert set(expected[expected > 0].tolist()) <= negatives
        assert len(set(candidates.tolist())) == 8
        assert not negatives & set(history.tolist())
    only = training_prompts(prompts, num_negatives=3, hard_negatives=hard)
    _, candidates, index = only.example(0)
    assert sorted(np.delete(candidates, index)) == hard[0].tolist()


@pytest.mark.parametrize("on_inputs", [False, True])
def test_training_batches_hold_prompts_and_responses(prompts: PromptBuilder, on_inputs: bool):
    few = BatchLimits(3, fixed_tokens=10**6)
    examples = training_prompts(prompts, on_inputs=on_inputs, limits=few)
    numbers = [0, 3, 4, 5, 6, 7, 8, 9]  # 9 is example 0 in the next epoch
    batches = examples.__getitems__(numbers)
    rows = [len(batch["input_ids"]) for batch in batches]
    assert sum(rows) == 8 and max(rows) <= 3
    for batch in batches:
        assert batch["num_targets"] == int((batch["targets"] != IGNORE_INDEX).sum())
    expected = []
    for number in numbers:
        history, candidates, index = examples.example(number)
        prompt = prompts.encode(history, candidates).tolist()
        response = [int(prompts.letter_ids[index]), EOS]
        scored = [*prompt[1:], *response] if on_inputs else response
        expected.append(([*prompt, *response], scored, 0 if number in (0, 9) else 2))
    found = []
    for batch in batches:
        columns = (batch[name] for name in ("input_ids", "attention_mask", "targets", "users"))
        for ids, mask, targets, user in zip(*columns):
            found.append((ids[mask.bool()].tolist(), targets[targets >= 0].tolist(), user))
    assert sorted(found) == sorted(expected)


# Evaluation prompts -----------------------------------------------------------------------------


@pytest.fixture()
def candidates() -> Candidates:
    """Candidates of three users; the second one's target is not among them."""
    data = make_data([6, 4, 9])
    items = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.int32)
    labels = data.targets("test")
    items[0, 1], items[2, 0] = labels[0], labels[2]
    items[1] = [item for item in range(1, 31) if item != labels[1]][:3]
    return Candidates(items, np.zeros((3, 3), np.float32), labels, np.ones(3, np.int32))


def evaluation_prompts(
    prompts: PromptBuilder, candidates: Candidates, **options: Any
) -> EvaluationPrompts:
    data = make_data([6, 4, 9])
    arguments = {"max_history": 4, "pad_id": EOS}
    return EvaluationPrompts(data, "test", candidates, prompts, **(arguments | options))


def test_evaluation_covers_retrieved_users(prompts: PromptBuilder, candidates: Candidates):
    data = make_data([6, 4, 9])
    examples = evaluation_prompts(prompts, candidates)
    assert len(examples) == 2 and sorted(examples.users.tolist()) == [0, 2]
    batch = examples.__getitems__([0, 1])
    assert batch["orders"].tolist() == [[0, 1, 2]] * 2
    for user, ids, mask in zip(batch["users"], batch["input_ids"], batch["attention_mask"]):
        history = data.item_ids[data.offsets[user] : data.offsets[user + 1] - 1][-4:]
        expected = prompts.encode(history, candidates.items[user])
        assert ids[mask.bool()].tolist() == expected.tolist()
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == sorted(lengths)


def test_further_prompts_have_other_orders(prompts: PromptBuilder, candidates: Candidates):
    data = make_data([6, 4, 9])
    examples = evaluation_prompts(prompts, candidates, permutations=4, seed=3)
    assert len(examples) == 8
    batch = examples.__getitems__(list(range(8)))
    assert batch["users"].tolist() == np.repeat(examples.users, 4).tolist()
    for row, (user, order) in enumerate(zip(batch["users"].tolist(), batch["orders"].numpy())):
        expected = np.arange(3)
        if row % 4:
            expected = np.random.default_rng([3, user, row % 4]).permutation(3)
        assert order.tolist() == expected.tolist()
        history = data.item_ids[data.offsets[user] : data.offsets[user + 1] - 1][-4:]
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert ids.tolist() == prompts.encode(history, candidates.items[user][order]).tolist()
    assert len(set(map(tuple, batch["orders"].tolist()))) > 1


def test_nobody_to_evaluate(prompts: PromptBuilder, candidates: Candidates):
    absent = candidates._replace(labels=np.full(3, 30))
    assert len(evaluation_prompts(prompts, absent, permutations=2)) == 0
