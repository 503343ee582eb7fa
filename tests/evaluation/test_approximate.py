"""Candidates from an index that searches all of its lists are those of the whole catalogue."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss")

from config import MODEL_CODES
from dataloader.candidates import Candidates
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories
from evaluation import approximate
from evaluation.approximate import ItemIndex, retrieve_approximately
from evaluation.retrieval import retrieve
from tests.helpers import make_data, small_model

LENGTHS = [12, 7, 25, 3, 16]


def both(code: str, **options: Any) -> tuple[Candidates, Candidates]:
    """Candidates of the whole catalogue, and of an index."""
    data, model = make_data(LENGTHS), small_model(code).eval()
    loader = evaluation_loader(Histories(data, "test", 20, model.spec.mask_token), 2, 0)
    index = ItemIndex(model)
    return (
        retrieve(model, loader, description="", **options),
        retrieve_approximately(model, index, loader, description="", **options),
    )


@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize("code", MODEL_CODES)
def test_all_lists(code: str, mask_history: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(approximate, "SEARCHED_SHARE", 1)
    exact, found = both(code, mask_history=mask_history, num_candidates=5)
    assert [x.dtype for x in found] == [x.dtype for x in exact]
    assert np.array_equal(found.items, exact.items) and np.array_equal(found.labels, exact.labels)
    np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-5, atol=1e-6)


def test_some_lists():
    exact, found = both("lru", mask_history=False, num_candidates=3)
    assert found.items.shape == (5, 3) and (found.scores <= exact.scores + 1e-6).all()


def test_too_few_items_in_the_lists():
    exact, found = both("lru", mask_history=True, num_candidates=30)
    assert np.array_equal(found.items, exact.items) and np.array_equal(found.scores, exact.scores)
