"""From generated texts to interactions, and their plausibility."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from augmentation.filters import REASONS, extract_interactions, judge, parse_items, plausible_rank
from augmentation.generation import GeneratedText
from augmentation.prompts import training_history
from datasets import SequenceDataset
from errors import UserError
from jagged import JaggedBatch
from model.registry import load_retriever
from tests.augmentation.helpers import random_interactions, shift_held_out

CPU = torch.device("cpu")


@given(st.text(), st.booleans())
def test_any_text_is_parsed_and_every_word_counted(text: str, ended: bool):
    items, dropped = parse_items(GeneratedText(text, ended), 30)
    assert all(1 <= item <= 30 for item in items)
    assert set(dropped) <= {"cut", "malformed", "unknown"}
    words = text.replace(",", " ").replace(";", " ").split()
    assert len(items) + dropped.total() == len(words)


@given(st.lists(st.integers(1, 60)), st.sampled_from([" ", ", ", ";\n"]))
def test_numbers_are_read_from_any_list(numbers: list[int], separator: str):
    items, dropped = parse_items(GeneratedText(separator.join(map(str, numbers)), True), 30)
    assert items == [n for n in numbers if n <= 30]
    assert dropped.total() == sum(n > 30 for n in numbers)


def test_interactions_are_new_to_the_training_history(data: SequenceDataset):
    user = 3
    history = training_history(data, user)
    val, test = data.targets("val")[user], data.targets("test")[user]
    new = next(i for i in range(1, 2501) if i not in data.item_ids)
    words = [history[0], new, "twelve", new, 2501, "007", val, test]
    held_out = [i for i in dict.fromkeys([int(val), int(test)]) if i not in history]
    text = " ".join(map(str, words)) + " 25"
    texts = {user: GeneratedText(text, False), 1: GeneratedText("", True)}
    interactions, dropped = extract_interactions(texts, data)
    assert interactions.users.tolist() == [user] * len(interactions.items)
    assert interactions.items.tolist() == [new, *held_out]
    assert interactions.users.dtype == interactions.items.dtype == np.int32
    assert dropped == {"cut": 1, "malformed": 2, "unknown": 1, "had": 1, "repeated": 1}
    assert set(dropped) <= set(REASONS)


def test_judge_ranks_given_the_training_history(retrieved: Path, toy_data: SequenceDataset):
    data = toy_data
    interactions = random_interactions(data, 150, seed=0)
    users, items = interactions
    ranks, target_ranks = judge(retrieved, data, interactions, CPU)
    retriever = load_retriever(retrieved, data.num_items)
    for user in range(data.num_users):
        ids = torch.from_numpy(training_history(data, user).astype(np.int64))
        last = torch.tensor([len(ids) - 1])
        with torch.no_grad():
            scores = retriever(JaggedBatch(ids, torch.arange(len(ids)), len(ids), last))[0]
        scores[0], scores[ids] = -torch.inf, -torch.inf
        ranked = [*items[users == user], data.targets("val")[user]]
        expected = [1 + int((scores > scores[item]).sum()) for item in ranked]
        assert [*ranks[users == user], target_ranks[user]] == expected


def test_judge_reads_no_test_item(retrieved: Path, toy_data: SequenceDataset):
    interactions = random_interactions(toy_data, 150, seed=0)
    ranks, target_ranks = judge(retrieved, toy_data, interactions, CPU)
    shifted = shift_held_out(toy_data, ("val", "test"))
    assert np.array_equal(judge(retrieved, shifted, interactions, CPU)[0], ranks)
    shifted = shift_held_out(toy_data, ("test",))
    assert np.array_equal(judge(retrieved, shifted, interactions, CPU)[1], target_ranks)


def test_judge_needs_a_retriever(toy_data: SequenceDataset, tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.json"):
        judge(tmp_path, toy_data, random_interactions(toy_data, 5, seed=0), CPU)


def test_plausible_rank_covers_the_share():
    ranks = np.array([7, 1, 30, 2, 5, 100, 8, 9, 3, 4])
    for share in (0.1, 0.5, 0.75, 0.99):
        highest = plausible_rank(ranks, share)
        assert (ranks <= highest).mean() >= share > (ranks < highest).mean()
