"""Title encodings, their cache, and the item embeddings initialized from them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from errors import ArgumentError
from model import titles as titles_module
from model.hub import BaseModel
from model.titles import cached_title_encodings, encode_titles, init_item_embeddings_
from tests.helpers import run_script

TITLES = ["", "Toy Story (1995)", "Heat", "A much longer title, of several words: part 2", "Heat"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A tiny BERT with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder") / "tiny-bert"
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", *letters, *(f"##{x}" for x in letters)]
    tokenizer = Tokenizer(
        models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return BaseModel("tiny-bert", folder, None)


def test_encodings_do_not_depend_on_the_batch(encoder: BaseModel):
    together = encode_titles(encoder, TITLES, "cpu")
    assert together.shape == (5, 24) and not together[0].any()
    np.testing.assert_allclose(np.linalg.norm(together[1:], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(together[2], together[4])
    for item in range(1, 5):
        alone = encode_titles(encoder, ["", TITLES[item]], "cpu")
        np.testing.assert_allclose(alone[1], together[item], atol=1e-5)


def test_encodings_are_cached(encoder: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pinned = encoder._replace(revision="1")
    first = cached_title_encodings(pinned, TITLES, "cpu", tmp_path)
    (cached,) = tmp_path.iterdir()
    monkeypatch.setattr(titles_module, "encode_titles", lambda *args: np.ones((5, 2)))
    np.testing.assert_array_equal(cached_title_encodings(pinned, TITLES, "cpu", tmp_path), first)
    changed = [*TITLES[:4], "Casino"]
    assert cached_title_encodings(pinned, changed, "cpu", tmp_path).shape == (5, 2)
    # A folder's files can change, and a damaged cache is replaced.
    assert cached_title_encodings(encoder, TITLES, "cpu", tmp_path).shape == (5, 2)
    cached.write_bytes(cached.read_bytes()[:100])
    assert cached_title_encodings(pinned, TITLES, "cpu", tmp_path).shape == (5, 2)


@pytest.mark.parametrize("hidden_units", [4, 24, 40])
def test_item_embeddings_keep_inner_products(hidden_units: int):
    rng = np.random.default_rng(0)
    encodings = rng.normal(size=(31, 24)) @ rng.normal(size=(24, 24)) + 3
    weight = torch.full((33, hidden_units), 7.0)
    init_item_embeddings_(weight, encodings)
    assert (weight[0] == 7).all() and (weight[31:] == 7).all()
    items = weight[1:31].double()
    assert items.std().item() == pytest.approx(0.05, rel=1e-4)
    centered = torch.from_numpy(encodings[1:] - encodings[1:].mean(0))
    inner, expected = items @ items.T, centered @ centered.T
    if hidden_units < 24:  # the best approximation of this rank
        values, axes = torch.linalg.eigh(expected)
        values, axes = values[-hidden_units:], axes[:, -hidden_units:]
        expected = (axes * values) @ axes.T
    torch.testing.assert_close(inner / inner.norm(), expected / expected.norm(), atol=1e-5, rtol=0)


def test_item_embeddings_depend_on_the_seed_alone():
    encodings = np.random.default_rng(0).normal(size=(31, 24))
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(torch.zeros(31, 8))
        init_item_embeddings_(weights[-1], encodings, std=0.1)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0][1:].std().item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_unusable_encoder(encoder: BaseModel, tmp_path: Path, name: str):
    folder = Path(shutil.copytree(encoder.folder, tmp_path / "encoder"))
    (folder / name).write_bytes(b"x")
    with pytest.raises(ArgumentError, match=r"^encoder .*: cannot be loaded"):
        encode_titles(encoder._replace(folder=folder), TITLES, "cpu")


def test_retriever_with_titles(toy_flags: list, encoder: BaseModel, tmp_path: Path):
    flags = [*toy_flags, "--device", "cpu", "--max_steps", 2, "--export_root", tmp_path / "run"]
    done = run_script("train_retriever.py", *flags, "--title_encoder", encoder.folder)
    assert done.returncode == 0, done.stderr
