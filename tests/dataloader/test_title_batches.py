"""Documents to train on and branches to score."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataloader.candidates import Candidates
from dataloader.prompt_batches import BatchLimits
from dataloader.title_batches import CandidateTitles, CatalogueTitles, TitleDocuments, branch_batch
from dataloader.title_prompt import TitlePrompts
from datasets import SequenceDataset
from tests.helpers import make_data, read_tokenizer

NO_SCORES = np.empty(0)


@pytest.fixture()
def prompts(tiny_llama: Path, toy_data: SequenceDataset) -> TitlePrompts:
    return TitlePrompts(read_tokenizer(tiny_llama), toy_data.titles, max_history=6)


def documents_of(data: SequenceDataset, prompts: TitlePrompts, **limits: int) -> TitleDocuments:
    return TitleDocuments(data, prompts, limits=BatchLimits(8, 400)._replace(**limits), pad_id=1)


def test_every_training_item_is_a_target_once(prompts: TitlePrompts):
    data = make_data([3, 8, 9, 10, 11, 40, 5], num_items=30)
    documents = documents_of(data, prompts)
    targets = [np.arange(first, end) for first, end in zip(documents.first_targets, documents.ends)]
    expected = [
        np.arange(start, end) for start, end in zip(data.offsets[:-1], data.history_ends("train"))
    ]
    assert np.concatenate(targets).tolist() == np.concatenate(expected).tolist()
    sizes = documents.ends - documents.starts
    context = documents.first_targets - documents.starts
    assert sizes.max() == 7 and (context[sizes < 7] == 0).all()
    is_first = documents.starts == data.offsets[documents.users]
    assert (context[is_first] == 0).all() and (context[~is_first] >= 3).all()
    assert (documents.starts >= data.offsets[documents.users]).all()


def test_labels_follow_their_sources(toy_data: SequenceDataset, prompts: TitlePrompts):
    documents = documents_of(toy_data, prompts)
    numbers = [4, 0, 17, 60 + len(documents)]
    batches = documents.__getitems__(numbers)
    assert len(batches) > 1
    assert all(batch["num_targets"] == len(batch["labels"]) for batch in batches)
    labels = []
    for batch in batches:
        flat, length = batch["input_ids"].flatten(), batch["input_ids"].shape[1]
        assert torch.equal(flat[batch["sources"] + 1], batch["labels"])
        assert (batch["sources"] // length == (batch["sources"] + 1) // length).all()
        labels += batch["labels"].tolist()
    expected = []
    for number in numbers:
        ids, first = documents.document(number % len(documents))
        expected += ids[first:].tolist()
    assert sorted(labels) == sorted(expected)


def test_branches_of_a_history():
    lines = [np.array([5, 6, 9]), np.array([4, 9]), np.array([9])]
    batch = branch_batch([np.array([1, 2])], [lines], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 4, 5, 6]]  # sorted by tokens
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3]]
    assert batch["branches"].tolist() == [[0, 0, 1, 2, 2]]
    predicted = list(zip(*(batch[name].tolist() for name in ("owners", "sources", "labels"))))
    assert predicted == [(1, 1, 4), (1, 2, 9), (0, 1, 5), (0, 3, 6), (0, 4, 9), (2, 1, 9)]
    assert batch["num_candidates"] == 3


def test_candidates_of_users(toy_data: SequenceDataset, prompts: TitlePrompts):
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(40)[:4] + 1 for _ in range(toy_data.num_users)])
    candidates = Candidates(items, NO_SCORES, NO_SCORES, NO_SCORES)
    users = np.array([7, 3, 50])
    titles = CandidateTitles(toy_data, "test", candidates, prompts, users=users, pad_id=1)
    batch = titles.__getitems__([0, 1, 2])
    assert sorted(batch["users"].tolist()) == [3, 7, 50]
    for row, user in enumerate(batch["users"].tolist()):
        history = toy_data.item_ids[toy_data.offsets[user] : toy_data.offsets[user + 1] - 1]
        text = prompts.encode_history(history)
        is_history = batch["branches"][row] == 0
        assert batch["input_ids"][row][is_history].tolist() == text.tolist()
        for index, item in enumerate(items[user]):
            chosen = batch["owners"] == row * 4 + index
            assert batch["labels"][chosen].tolist() == prompts.lines[item].tolist()


def test_the_whole_catalogue(prompts: TitlePrompts):
    titles = CatalogueTitles(prompts, 16, pad_id=1)
    batch = titles.__getitems__(list(range(len(titles))))
    assert sorted(set(batch["items"].flatten().tolist())) == list(range(1, 41))
    assert batch["items"].shape == (3, 16)
