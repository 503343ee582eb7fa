"""A retriever's parts from its settings: windows, model, loss, evaluation, weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import MODEL_CODES, RetrieverConfig
from dataloader.sequences import MaskedWindows, TrainingWindows
from datasets import SequenceDataset
from errors import InputError
from metrics import ranking_metrics
from model.losses import catalogue_loss, linear_cross_entropy
from recipes.fit_retriever import (
    Evaluator,
    build_model,
    load_weights,
    retriever_loop,
    save_weights,
    training_loss,
    training_windows,
)
from tests.helpers import make_data, small_model


def config(**flags: Any) -> RetrieverConfig:
    defaults = {"dataset_code": "games", "device": "cpu", "hidden_units": 16, "max_len": 20}
    return RetrieverConfig(**(defaults | flags))


@pytest.fixture()
def data() -> SequenceDataset:
    return make_data([12, 7, 25, 4, 16])


@pytest.mark.parametrize("code", MODEL_CODES)
def test_windows(code: str, data: SequenceDataset):
    windows = training_windows(
        config(model_code=code, max_len=6, sliding_window_size=0.5, mask_prob=0.4, seed=7), data
    )
    if code == "bert":
        expected = MaskedWindows(data, 6, 0.5, 0.4, 7)
    else:
        expected = TrainingWindows(data, 6, 0.5)
    assert type(windows) is type(expected) and len(windows) == len(expected)
    (ours,), (theirs,) = (x.__getitems__([0, 1, 2, 3]) for x in (windows, expected))
    assert torch.equal(ours["labels"], theirs["labels"])


@pytest.mark.parametrize("code", MODEL_CODES)
def test_model(code: str):
    flags = config(model_code=code, dropout=0.25, attn_dropout=0.125, num_blocks=1, num_heads=4)
    spec = build_model(flags, 30, None).spec
    assert (spec.model_code, spec.num_items, spec.max_len, spec.hidden_units) == (code, 30, 20, 16)
    assert (spec.num_blocks, spec.num_heads) == (1, 4)
    assert (spec.dropout, spec.attn_dropout) == (0.25, 0.125)


def test_model_with_title_encodings():
    encodings = np.random.default_rng(0).normal(size=(31, 8)).astype(np.float32)
    encodings[0] = 0
    encodings[5] = encodings[7]  # the same title
    model = build_model(config(), 30, encodings)
    plain = build_model(config(), 30, None)
    for embeddings, same in ((model.item_embeddings, True), (plain.item_embeddings, False)):
        assert torch.allclose(embeddings[5], embeddings[7]) == same
    assert model.item_embeddings.requires_grad


def test_loss(data: SequenceDataset):
    model = small_model("lru")
    (batch,) = TrainingWindows(data, 20, 1.0).__getitems__([0, 1, 2, 3, 4])

    def loss(**flags: Any) -> float:
        cross_entropy = training_loss(config(**flags), data, torch.device("cpu"))
        torch.manual_seed(0)
        return catalogue_loss(model, batch, cross_entropy).item()

    exact = catalogue_loss(model, batch, linear_cross_entropy).item()
    assert loss() == exact
    smoothed = loss(label_smoothing=0.5)
    assert smoothed != exact
    narrow = loss(loss_precision="bfloat16")
    assert narrow != exact and narrow == pytest.approx(exact, rel=1e-2)
    sampled = loss(negatives=4)
    assert sampled != exact and loss(negatives=4) == sampled
    assert loss(negatives=100_000) == pytest.approx(exact, rel=0.05)


def test_sampled_items_follow_the_training_counts(data: SequenceDataset):
    cross_entropy = training_loss(config(negatives=4), data, torch.device("cpu"))
    counts = data.training_counts()
    expected = 0.5 * counts / counts.sum() + 0.5 * np.r_[0, np.full(30, 1 / 30)]
    cumulative = cross_entropy.func.cumulative.numpy()
    np.testing.assert_allclose(np.diff(cumulative, prepend=0), expected, atol=1e-12)


def test_loop_settings():
    settings = retriever_loop(
        config(num_epochs=3, val_iterations=7, early_stopping_patience=2, best_metric="NDCG@5")
    )
    assert (settings.num_epochs, settings.val_steps, settings.patience) == (3, 7, 2)
    assert settings.best_metric == "NDCG@5" and "--lr" in settings.advice.diverged
    assert "--train_batch_size" in settings.advice.out_of_memory
    assert "--val_batch_size" in settings.advice.out_of_memory_in_validation


@pytest.mark.parametrize("code", ["lru", "bert"])
@pytest.mark.parametrize(
    ("mask_history", "in_validation", "in_candidates"),
    [("never", False, False), ("test", False, True), ("always", True, True)],
)
def test_where_the_history_is_excluded(
    code: str,
    mask_history: str,
    in_validation: bool,
    in_candidates: bool,
    data: SequenceDataset,
):
    model = small_model(code)
    flags = config(model_code=code, mask_history=mask_history, num_candidates=30)
    evaluator = Evaluator(flags, data, model)
    for split in ("val", "test"):
        candidates = evaluator.candidates(split)
        assert candidates.items.shape == (5, 30)
        assert candidates.labels.tolist() == data.targets(split).tolist()
        assert (~np.isfinite(candidates.scores)).any() == in_candidates
    # The validation metrics rank as the candidates of another setting do.
    same = config(
        model_code=code, num_candidates=30, mask_history="always" if in_validation else "never"
    )
    ranks = Evaluator(same, data, model).candidates("val").label_ranks
    assert evaluator.validate() == ranking_metrics(ranks, flags.metric_ks)


def test_batch_sizes_of_the_splits(data: SequenceDataset):
    flags = config(val_batch_size=2, test_batch_size=3)
    loaders = Evaluator(flags, data, small_model("lru")).loaders
    assert {split: len(loader) for split, loader in loaders.items()} == {"val": 3, "test": 2}


@pytest.mark.parametrize("code", MODEL_CODES)
def test_weights_round_trip(code: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    model, other = small_model(code, seed=0), small_model(code, seed=1)
    save_weights(model, path)
    assert list(tmp_path.iterdir()) == [path]
    load_weights(other, path)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def share_one_buffer(module: torch.nn.Module) -> None:
    """Lay the weights out as cuDNN does."""
    weights = list(module.parameters())
    buffer = torch.cat([weight.detach().flatten() for weight in weights])
    for weight, part in zip(weights, buffer.split([weight.numel() for weight in weights])):
        weight.data = part.view_as(weight)


def test_weights_in_one_buffer(tmp_path: Path):
    models = [small_model("narm", seed=seed) for seed in range(2)]
    for model in models:
        share_one_buffer(model.gru)
    save_weights(models[0], tmp_path / "model.safetensors")
    load_weights(models[1], tmp_path / "model.safetensors")
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models)))


@pytest.mark.parametrize("content", [None, b"", b"noise"])
def test_damaged_weights(content: bytes | None, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_weights(small_model("lru"), path)
    assert str(caught.value).startswith(f"{path} is damaged (")
