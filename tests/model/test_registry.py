"""Retrievers built from a specification, and loaded from the folder of a run."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model

from config import MODEL_CODES
from errors import InputError, UserError
from jagged import JaggedBatch
from model.base import Retriever, RetrieverSpec
from model.registry import RETRIEVERS, build_retriever, load_retriever
from tests.helpers import small_model


def test_every_code_has_a_model():
    assert tuple(RETRIEVERS) == MODEL_CODES


@pytest.mark.parametrize("code", MODEL_CODES)
def test_initial_weights(code: str):
    """Small and random, and the same for the same state of the random number generator."""
    spec = RetrieverSpec(
        model_code=code, num_items=1000, max_len=20, hidden_units=64, num_blocks=2, num_heads=2,
        dropout=0.5, attn_dropout=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_retriever(spec)
    assert isinstance(model, RETRIEVERS[code]) and model.spec is spec and model.training
    weight = model.embedding.weight
    assert weight.abs().max() <= 0.04 and weight.std().item() == pytest.approx(0.0176, rel=0.05)
    torch.manual_seed(0)
    again = build_retriever(spec).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(build_retriever(spec).embedding.weight, weight)


# A run's folder ---------------------------------------------------------------------------------


def save_run(model: Retriever, folder: Path) -> Path:
    """Write what ``load_retriever`` reads of a run."""
    save_model(model, str(folder / "model.safetensors"))
    settings = asdict(model.spec) | {"dataset_code": "games", "lr": 0.1}
    del settings["num_items"]  # it is not a flag
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("code", MODEL_CODES)
def test_a_loaded_model_scores_the_same(code: str, tmp_path: Path):
    model = small_model(code).eval()
    loaded = load_retriever(save_run(model, tmp_path), num_items=30)
    assert loaded.spec == model.spec and not loaded.training
    assert all(parameter.device.type == "cpu" for parameter in loaded.parameters())
    sequences = JaggedBatch(torch.tensor([3, 4, 9]), torch.tensor([0, 1, 0]), 2)
    assert torch.equal(loaded(sequences), model(sequences))


@pytest.mark.parametrize("damage", ["catalogue", "weights", "no weights", "setting", "model"])
def test_files_that_do_not_belong_together(damage: str, tmp_path: Path):
    folder = save_run(small_model("sas"), tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "setting":
        del settings["max_len"]
    elif damage == "model":
        settings["model_code"] = "lru"
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError) as caught:
        load_retriever(folder, num_items=31 if damage == "catalogue" else 30)
    assert str(caught.value).startswith(f"{folder}: cannot load the retriever (")


def test_no_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_retriever(tmp_path, num_items=30)
