"""Constrained decoding: every item of the catalogue can be sampled, and nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from augmentation.constraints import Catalogue, CatalogueProcessor
from augmentation.filters import parse_items
from augmentation.generation import GeneratedText
from augmentation.prompts import IdPrompts
from datasets import SequenceDataset
from errors import InputError
from tests.augmentation.helpers import EOS


def test_random_walks_give_items_only(prompts: IdPrompts, data: SequenceDataset):
    catalogue = Catalogue(prompts.items, EOS)
    rng = np.random.default_rng(0)
    for _ in range(200):
        state, tokens = Catalogue.START, []
        while state != Catalogue.END and len(tokens) < 60:
            token = int(rng.choice(catalogue.allowed(state)))
            state = catalogue.step(state, token)
            tokens.append(token)
        assert state != Catalogue.START and EOS not in tokens[:-1]
        text = prompts.tokenizer.decode([t for t in tokens if t != EOS])
        items, dropped = parse_items(GeneratedText(text, state == Catalogue.END), data.num_items)
        assert items and set(dropped) <= {"cut"}


@pytest.mark.parametrize("item", [1, 9, 10, 999, 2500])
def test_every_item_can_be_sampled(item: int, prompts: IdPrompts):
    catalogue = Catalogue(prompts.items, EOS)
    state = Catalogue.START
    for _ in range(2):  # also after another item
        for token in prompts.items[item].tolist():
            assert token in catalogue.allowed(state)
            state = catalogue.step(state, token)
        assert EOS in catalogue.allowed(state)
    state = catalogue.step(state, EOS)
    assert state == Catalogue.END and catalogue.allowed(state).tolist() == [EOS]


def test_a_text_has_one_item_at_least(prompts: IdPrompts):
    catalogue = Catalogue(prompts.items, EOS)
    assert EOS not in catalogue.allowed(Catalogue.START)


def test_ambiguous_tokens_are_refused():
    items = [np.array([]), np.array([5]), np.array([5, 5])]  # 5 5 is two items or one
    with pytest.raises(InputError, match="do not show where an item's number ends"):
        Catalogue(items, EOS)


def test_processor_follows_each_row(prompts: IdPrompts, tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    catalogue = Catalogue(prompts.items, EOS)
    batch = torch.full((8, 3), 7)
    torch.manual_seed(0)
    output = model.generate(
        input_ids=batch, attention_mask=torch.ones_like(batch), do_sample=True, max_new_tokens=40,
        eos_token_id=EOS, pad_token_id=EOS, logits_processor=[CatalogueProcessor(catalogue, 3)],
    )  # fmt: skip
    rows = {tuple(row) for row in output[:, 3:].tolist()}
    assert len(rows) == 8
    for row in rows:
        state = Catalogue.START
        for token in row:
            assert token in catalogue.allowed(state)
            state = catalogue.step(state, token)
