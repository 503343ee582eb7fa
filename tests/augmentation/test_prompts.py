"""Prompts of user and item numbers, and the training examples."""

from collections import Counter

import numpy as np
import pytest
import torch

from augmentation.generation import build_catalogue
from augmentation.prompts import GenerationPrompts, IdPrompts, TrainingExamples, training_history
from dataloader.prompt_batches import IGNORE_INDEX, BatchLimits
from datasets import SequenceDataset
from tests.augmentation.helpers import (
    EOS,
    make_prompts,
    make_published_prompts,
    shift_held_out,
)
from tests.helpers import make_data, read_tokenizer


@pytest.mark.parametrize("name", ["llama-2", "smollm2"])
def test_token_ids_equal_those_of_the_whole_text(name: str, request: pytest.FixtureRequest):
    if name == "smollm2":
        folder = request.getfixturevalue("smollm2")
    else:
        folder = request.getfixturevalue("shared") / "tokenizers" / name
    tokenizer = read_tokenizer(folder)
    data = make_data([5] * 1200, num_items=12_000)
    prompts = make_prompts(tokenizer, data)
    rng = np.random.default_rng(0)
    for _ in range(300):
        user = int(rng.integers(data.num_users))
        history, response = (rng.integers(1, 12_001, rng.integers(1, 15)) for _ in range(2))
        tokens = np.append(prompts.encode(user, history), prompts.encode_response(response))
        text = prompts.text(user, history) + "".join(f" {item}" for item in response)
        assert tokens.tolist() == [*tokenizer.encode(text).ids, EOS]


def test_text_of_a_prompt(prompts: IdPrompts):
    expected = "User 17 clicked: 12 55 98 ; recommend to user 17:"
    assert prompts.text(16, [12, 55, 98]) == expected


def test_long_histories_lose_their_oldest_items(prompts: IdPrompts, data: SequenceDataset):
    short = make_prompts(prompts.tokenizer, data, max_text_len=140, max_response_len=40)
    history = list(range(1000, 1030))
    kept = next(n for n in range(30, 0, -1) if len(prompts.encode(3, history[-n:])) <= 100)
    assert 1 < kept < 30
    assert short.encode(3, history).tolist() == prompts.encode(3, history[-kept:]).tolist()


def test_long_responses_lose_their_last_items(prompts: IdPrompts, data: SequenceDataset):
    short = make_prompts(prompts.tokenizer, data, max_response_len=40)
    items = list(range(1000, 1030))
    response = short.encode_response(items)
    assert len(response) <= 40 < len(response) + len(prompts.items[1000])
    assert response[-1] == EOS
    whole = prompts.encode_response(items)
    assert whole[: len(response) - 1].tolist() == response[:-1].tolist()


# Published prompts -----------------------------------------------------------------------------


def test_published_texts(prompts: IdPrompts, data: SequenceDataset):
    published = make_published_prompts(prompts.tokenizer, data)
    expected = (
        "Given the user(u17)'s clicked list items:i12,i55,i98, predict what is the list items to "
        "recommend to the user(u17). Please only answer the item IDs."
    )
    assert published.text(16, [12, 55, 98]) == expected
    tokens, num_targets = published.encode_example(16, [12, 55, 98], [77, 3])
    assert prompts.tokenizer.decode(tokens[:-num_targets].tolist()) == expected
    assert prompts.tokenizer.decode(tokens[-num_targets:-1].tolist()) == "i77,i3"
    assert tokens[-1] == EOS
    pieces = np.append(published.first_items[77], published.later_items[3])
    assert published.encode_response([77, 3]).tolist() == [*pieces, EOS]


@pytest.mark.parametrize("name", ["llama-2", "smollm2"])
def test_published_responses_consist_of_items(name: str, request: pytest.FixtureRequest):
    """So that constrained decoding writes what tuning has shown."""
    if name == "smollm2":
        folder = request.getfixturevalue("smollm2")
    else:
        folder = request.getfixturevalue("shared") / "tokenizers" / name
    data = make_data([5] * 3, num_items=12_000)
    published = make_published_prompts(read_tokenizer(folder), data)
    build_catalogue(published)  # is not ambiguous
    rng = np.random.default_rng(0)
    for _ in range(100):
        first, *others = rng.integers(1, 12_001, rng.integers(1, 15)).tolist()
        pieces = [published.first_items[first], *(published.later_items[item] for item in others)]
        expected = [*np.concatenate(pieces), EOS]
        assert published.encode_response([first, *others]).tolist() == expected


def test_published_texts_are_cut_on_the_right(prompts: IdPrompts, data: SequenceDataset):
    published = make_published_prompts(prompts.tokenizer, data)
    whole, num_targets = published.encode_example(16, [12, 55, 98], [77, 3])
    for room in (len(whole) - 2, len(whole) - num_targets - 2):
        short = make_published_prompts(prompts.tokenizer, data, max_text_len=room)
        tokens, left = short.encode_example(16, [12, 55, 98], [77, 3])
        assert tokens.tolist() == whole[:room].tolist()
        assert left == max(num_targets - len(whole) + room, 1)
    assert short.encode(16, [12, 55, 98]).tolist() == tokens.tolist()


def test_published_examples(data: SequenceDataset, prompts: IdPrompts):
    published = make_published_prompts(prompts.tokenizer, data)
    examples = TrainingExamples(
        data, published, global_examples=4, local_examples=0, local_items=6, min_targets=2,
        in_order=False, on_inputs=True, limits=BatchLimits(4), seed=0,
    )  # fmt: skip
    lengths = data.history_ends("train") - data.offsets[:-1]
    assert lengths.min() == 2  # a user with too few items, who has no examples
    assert len(examples) == 4 * (lengths > 2).sum()
    in_order = 0
    for number in range(2 * len(examples)):
        user, history, response = examples.example(number)
        items = training_history(data, user).tolist()
        assert len(history) >= 1 and len(response) >= 2
        assert sorted([*history, *response]) == sorted(items)
        in_order += [*history, *response] == items
    assert in_order < len(examples) / 4
    for batch in examples.__getitems__([0, 5, 9]):
        trained = (batch["targets"] != IGNORE_INDEX).sum(1)
        assert torch.equal(trained, batch["attention_mask"].sum(1) - 1)  # all but the first token


# Examples ---------------------------------------------------------------------------------------


def make_examples(data: SequenceDataset, prompts: IdPrompts) -> TrainingExamples:
    return TrainingExamples(
        data, prompts, local_examples=4, local_items=6, limits=BatchLimits(4), seed=0
    )


def test_examples_are_the_users_training_items(data: SequenceDataset, prompts: IdPrompts):
    examples = make_examples(data, prompts)
    assert len(examples) == 5 * data.num_users
    for number in range(2 * len(examples)):
        user, history, response = examples.example(number)
        training_items = training_history(data, user).tolist()
        items = [*history, *response]
        assert len(history) and len(response)
        if examples.is_global[number % len(examples)]:
            assert items == training_items
        else:
            assert len(items) == min(6, len(training_items))
            assert len(history) - len(response) in (0, 1)
            assert not Counter(items) - Counter(training_items)


def test_each_epoch_draws_new_examples(data: SequenceDataset, prompts: IdPrompts):
    examples = make_examples(data, prompts)
    first, second = (
        [examples.example(number + start)[1].tolist() for number in range(len(examples))]
        for start in (0, len(examples))
    )
    assert first != second


def test_held_out_items_change_no_prompt(data: SequenceDataset, prompts: IdPrompts):
    shifted = shift_held_out(data, ("val", "test"))
    assert (shifted.item_ids != data.item_ids).any()
    ours, theirs = make_examples(data, prompts), make_examples(shifted, prompts)
    for number in range(len(ours)):
        for part, shifted_part in zip(ours.example(number), theirs.example(number)):
            assert np.array_equal(part, shifted_part)
    pair = [GenerationPrompts(x, prompts, 4).prompts for x in (data, shifted)]
    assert all(np.array_equal(*x) for x in zip(*pair))


def test_training_targets_are_the_responses(data: SequenceDataset, prompts: IdPrompts):
    examples = make_examples(data, prompts)
    numbers = list(range(0, 40, 3))
    batches = examples.__getitems__(numbers)
    trained_tokens = Counter()
    for batch in batches:
        size = batch["targets"].shape[1]
        for row, targets in zip(batch["input_ids"], batch["targets"]):
            trained = targets != IGNORE_INDEX
            assert trained[trained.int().argmax() :].all()  # the last tokens of the row
            assert torch.equal(row[-size:][trained], targets[trained])
            trained_tokens[tuple(targets[trained].tolist())] += 1
    responses = (prompts.encode_response(examples.example(number)[2]) for number in numbers)
    assert trained_tokens == Counter(tuple(response.tolist()) for response in responses)


def test_generation_batches_respect_their_limit(data: SequenceDataset, prompts: IdPrompts):
    batches = GenerationPrompts(data, prompts, 20, max_tokens=600)
    sizes = []
    for index in range(len(batches)):
        users, batch = batches[index]
        sizes.append(len(users))
        tokens = len(users) * (batch["input_ids"].shape[1] + prompts.max_response_len)
        assert tokens <= 600 or len(users) == 1
    assert sum(sizes) == data.num_users and len(set(sizes)) > 1


def test_generation_batches_hold_every_user_once(data: SequenceDataset, prompts: IdPrompts):
    batches = GenerationPrompts(data, prompts, 4)
    assert len(batches) == 7
    lengths, users = [], []
    for index in range(len(batches)):
        batch_users, batch = batches[index]
        users += batch_users.tolist()
        lengths += batch["attention_mask"].sum(1).tolist()
        for user, row, mask in zip(batch_users, batch["input_ids"], batch["attention_mask"]):
            prompt = prompts.encode(user, training_history(data, user))
            assert row[mask.bool()].tolist() == prompt.tolist()
            assert mask.diff().min() >= 0  # padding is on the left
    assert sorted(users) == list(range(data.num_users))
    assert lengths == sorted(lengths, reverse=True)
