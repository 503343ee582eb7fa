"""A data set with more items than the toy data, and its prompt builder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from augmentation.prompts import IdPrompts
from datasets import SequenceDataset
from model.hub import load_tokenizer
from tests.augmentation.helpers import make_prompts
from tests.helpers import make_data


@pytest.fixture(scope="session")
def data() -> SequenceDataset:
    """25 random sequences over 2,500 items."""
    rng = np.random.default_rng(0)
    return make_data(rng.integers(4, 30, 25).tolist(), num_items=2500)


@pytest.fixture(scope="session")
def prompts(tiny_llama: Path, data: SequenceDataset) -> IdPrompts:
    """Prompt builder with the tiny Llama's tokenizer."""
    return make_prompts(load_tokenizer(tiny_llama), data)
