"""Constrained decoding: every new item of the catalogue can be sampled, and nothing else."""

from collections import Counter

import numpy as np
import pytest

from augmentation.constraints import Catalogue, ItemText
from augmentation.filters import parse_items
from augmentation.generation import GeneratedText, build_catalogue
from augmentation.prompts import IdPrompts
from datasets import SequenceDataset
from errors import InputError
from tests.augmentation.helpers import EOS, make_published_prompts


@pytest.fixture(scope="module", params=["short", "published"])
def builder(request: pytest.FixtureRequest, prompts: IdPrompts, data: SequenceDataset) -> IdPrompts:
    """Both kinds of prompts."""
    if request.param == "short":
        return prompts
    return make_published_prompts(prompts.tokenizer, data)


@pytest.fixture(scope="module")
def catalogue(builder: IdPrompts) -> Catalogue:
    return build_catalogue(builder)


def test_random_walks_give_new_items_only(
    builder: IdPrompts, catalogue: Catalogue, data: SequenceDataset
):
    rng = np.random.default_rng(0)
    barred = set(range(1, 2000))
    for _ in range(100):
        text = ItemText(catalogue, barred)
        while not text.ended and len(text.tokens) < 60:
            assert set(text.allowed()) <= set(catalogue.tokens.tolist())
            text.append(int(rng.choice(text.allowed())))
        written = GeneratedText(builder.tokenizer.decode(text.tokens), text.ended)
        items, dropped = parse_items(written, data.num_items, builder.prefix)
        assert set(dropped) <= {"cut"} and (items or dropped)
        assert not barred & set(items) and max(Counter(items).values(), default=1) == 1


@pytest.mark.parametrize("item", [1, 9, 10, 999, 2500])
def test_every_item_can_be_sampled(item: int, builder: IdPrompts, catalogue: Catalogue):
    text = ItemText(catalogue, [])
    assert EOS not in text.allowed()  # a text has one item at least
    for piece in (builder.first_items[7], builder.later_items[item]):
        for token in piece.tolist():
            assert token in text.allowed()
            text.append(token)
        assert EOS in text.allowed()
    text.append(EOS)
    assert text.ended and text.tokens == [*builder.first_items[7], *builder.later_items[item]]


@pytest.mark.parametrize("last", [1, 12])  # 1 is also the beginning of the number 12
def test_barred_items_close_their_edges(last: int, builder: IdPrompts, catalogue: Catalogue):
    left = [12] if last == 12 else [1, 12]
    text = ItemText(catalogue, [item for item in range(1, 2501) if item not in left])
    for token in builder.first_items[last].tolist():
        assert token in text.allowed()
        text.append(token)
    if last == 12:
        assert text.allowed() == [EOS]
    else:  # end, go on to 12, or begin 12
        following = {builder.first_items[12][len(text.tokens)], builder.later_items[12][0], EOS}
        assert set(text.allowed()) == following
        text.append(int(builder.first_items[12][len(text.tokens)]))
        text.append(int(builder.later_items[1][0]))  # 1 is free again
        for token in builder.later_items[1][1:].tolist():
            assert token in text.allowed()
            text.append(token)
        assert text.allowed() == [EOS]


def test_a_user_with_all_items_gets_none(catalogue: Catalogue):
    assert ItemText(catalogue, range(1, 2501)).allowed() == [EOS]


def test_ambiguous_tokens_are_refused():
    items = [np.array([]), np.array([5]), np.array([5, 5])]  # 5 5 is two items or one
    with pytest.raises(InputError, match="do not show where an item's number ends"):
        Catalogue(items, items, EOS)
