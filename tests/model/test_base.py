"""What holds for every retriever: the jagged computation equals the padded one, nothing leaks."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import padded as benchmark
from config import MODEL_CODES, RetrieverConfig
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories, MaskedWindows, TrainingWindows
from evaluation.retrieval import retrieve
from jagged import JaggedBatch
from model import narm
from model.base import Retriever, RetrieverSpec
from model.losses import catalogue_loss
from tests.helpers import make_data, small_model
from tests.model.padded import PADDED, assert_same_loss_and_gradients, padded_batch

NEXT_ITEM = ("lru", "sas", "narm")


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequences of these tests would fit into one tile of NARM's attention."""
    monkeypatch.setitem(narm.TILE_POSITIONS, "cpu", 3)


def score(model: Retriever, item_ids: Tensor, positions: Tensor, max_length: int) -> Tensor:
    return model(JaggedBatch(item_ids, positions, max_length))


# Specification and interface --------------------------------------------------------------------


def test_specification_from_settings():
    settings = RetrieverConfig(dataset_code="games", model_code="sas", max_len=7).as_dict()
    spec = RetrieverSpec.from_settings(settings | {"num_items": 30})
    assert spec == RetrieverSpec("sas", 30, 7, 64, 2, 2, 0.5, 0.5)
    with pytest.raises(KeyError, match="num_items"):
        RetrieverSpec.from_settings(settings)


def test_only_bert4rec_has_a_mask_token():
    tokens = {code: small_model(code).spec.mask_token for code in MODEL_CODES}
    assert tokens == {"lru": None, "sas": None, "bert": 31, "narm": None}


@pytest.mark.parametrize("code", MODEL_CODES)
def test_scores_are_products_of_encodings_and_embeddings(code: str):
    model = small_model(code).eval()
    item_ids, positions = torch.randint(1, 31, (9,)), torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 3])
    sequences = JaggedBatch(item_ids, positions, 4, torch.tensor([1, 4, 8]))
    encodings = model.encode(sequences)
    assert encodings.shape == (3, 16) and model.item_embeddings.shape == (31, 16)
    bias = model.item_bias
    assert bias is None if code == "narm" else bias.shape == (31,)
    expected = encodings @ model.item_embeddings.T + (0 if bias is None else bias)
    torch.testing.assert_close(model(sequences), expected)


@pytest.mark.parametrize("code", MODEL_CODES)
def test_scored_positions_are_rows_of_all_positions(code: str):
    model = small_model(code).eval()
    item_ids, positions = torch.randint(1, 31, (9,)), torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 3])
    scored = torch.tensor([0, 3, 4, 7])
    every = score(model, item_ids, positions, 4)
    some = model(JaggedBatch(item_ids, positions, 4, scored))
    assert every.shape == (9, 31)
    torch.testing.assert_close(some, every[scored])


# The jagged computation equals the padded one ---------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("code", NEXT_ITEM)
def test_jagged_equals_padded_in_loss_and_gradients(code: str, seed: int):
    rng = np.random.default_rng(seed)
    max_len = int(rng.integers(4, 20))
    data = make_data(rng.integers(3, 50, size=12).tolist(), seed=seed)
    windows = TrainingWindows(data, max_len, 1.0)
    model = small_model(code, seed)
    jagged = catalogue_loss(model, windows.__getitems__(list(range(len(windows))))[0])
    inputs, labels = padded_batch(data, windows, max_len)
    scores = PADDED[code](model, inputs)
    padded = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=0)
    assert_same_loss_and_gradients(model, jagged, padded)


def padded_masked_loss(model: nn.Module, batch: dict[str, Any], max_len: int) -> Tensor:
    """Loss of a batch of ``MaskedWindows`` on left-padded sequences."""
    item_ids, positions, _, scored = batch["sequences"]
    starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
    rows, scored_cells = [], []
    for row, (start, end) in enumerate(pairwise(starts)):
        padding = max_len - (end - start)
        rows.append(nn.functional.pad(item_ids[start:end], (padding, 0)))
        scored_cells += [(row, padding + i - start) for i in scored.tolist() if start <= i < end]
    scores = PADDED["bert"](model, torch.stack(rows))
    rows_scored, columns_scored = zip(*scored_cells)
    return nn.functional.cross_entropy(
        scores[list(rows_scored), list(columns_scored)], batch["labels"]
    )


@pytest.mark.parametrize("seed", range(5))
def test_masked_batches_equal_padded(seed: int):
    rng = np.random.default_rng(seed)
    data = make_data(rng.integers(3, 50, size=12).tolist(), seed=seed)
    windows = MaskedWindows(data, 9, 1.0, 0.3, seed)
    model = small_model("bert", seed)
    (batch,) = windows.__getitems__(list(range(len(windows))))
    padded = padded_masked_loss(model, batch, 9)
    assert_same_loss_and_gradients(model, catalogue_loss(model, batch), padded)


@pytest.mark.parametrize("code", MODEL_CODES)
def test_evaluation_equals_padded(code: str):
    data = make_data([5, 3, 40, 12])
    model = small_model(code, max_len=10).eval()
    mask = [31] if code == "bert" else []
    for split in ("val", "test"):
        histories = Histories(data, split, 10, mask_token=31 if mask else None)
        scores = model(histories.__getitems__([0, 1, 2, 3])["sequences"])
        for user in range(4):
            history = data.item_ids[data.offsets[user] : data.history_ends(split)[user]]
            padded = torch.tensor([0] * 10 + history.tolist() + mask)[-10:][None]
            torch.testing.assert_close(PADDED[code](model, padded)[0, -1], scores[user])


@pytest.mark.parametrize("code", NEXT_ITEM)
def test_the_benchmarks_padded_model_has_the_same_loss(code: str):
    data = make_data([9, 3, 20, 5])
    windows = TrainingWindows(data, 12, 1.0)
    model = small_model(code, max_len=12)
    lists = [data.item_ids[a:b].tolist() for a, b in zip(windows.starts, windows.ends)]
    plain = benchmark.next_item_loss(model, lists, 12)
    ours = catalogue_loss(model, windows.__getitems__(list(range(len(windows))))[0])
    # As in published code, the plain GRU reads the padding, and the start token has a position.
    assert plain.item() == pytest.approx(ours.item(), rel=1e-5 if code == "lru" else 0.01)


@pytest.mark.parametrize("code", MODEL_CODES)
def test_the_benchmarks_padded_model_gives_the_same_ranks(code: str):
    lengths = [5, 3, 9, 10]  # the benchmark excludes no more of a history than the model reads
    rng = np.random.default_rng(0)
    walks = np.concatenate([rng.permutation(30)[:length] + 1 for length in lengths])
    data = replace(make_data(lengths), item_ids=walks)
    model = small_model(code, max_len=10).eval()
    mask_token = 31 if code == "bert" else None
    loader = evaluation_loader(Histories(data, "test", 10, mask_token), 4, 0)
    ours = retrieve(model, loader, mask_history=True, num_candidates=20, description="")
    targets = data.targets("test").tolist()
    ranks, best = benchmark.evaluate(model, benchmark.histories(data, "test"), targets, 10)
    assert ranks.tolist() == ours.label_ranks.tolist()
    assert best.tolist() == ours.items.tolist()


# Nothing leaks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", NEXT_ITEM)
def test_future_items_change_no_past_score(code: str):
    model = small_model(code).eval()
    items, positions = torch.randint(1, 31, (20,)), torch.arange(20)
    before = score(model, items, positions, 20)
    items[12:] = items[12:] % 30 + 1
    after = score(model, items, positions, 20)
    torch.testing.assert_close(before[:12], after[:12])
    assert not torch.allclose(before[12:], after[12:])


@pytest.mark.parametrize("code", MODEL_CODES)
def test_sequences_of_a_batch_are_independent(code: str):
    model = small_model(code).eval()
    items, positions = torch.randint(1, 31, (9,)), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])
    together = score(model, items, positions, 5)
    torch.testing.assert_close(together[5:], score(model, items[5:], positions[5:], 4))
    items[:5] = items[:5] % 30 + 1
    torch.testing.assert_close(score(model, items, positions, 5)[5:], together[5:])
