"""The language model that the flags name: found, checked and resolved."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from config import TOKENS_PER_BATCH, RankerConfig
from errors import UserError
from model.hub import content_hash
from recipes.language_model import check_liger, find_language_model, use_liger


@pytest.fixture()
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be changed."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def config(folder: Path | str | None, **flags: Any) -> RankerConfig:
    name = None if folder is None else str(folder)
    return RankerConfig(dataset_code="games", llm_base_model=name, device="cpu", **flags)


def test_a_model_on_the_cpu(folder: Path):
    model = find_language_model(config(folder))
    assert (model.base.name, model.base.folder) == ("model", folder)
    assert (model.device, model.in_4bit, model.paged) == ("cpu", False, False)
    assert model.max_tokens == TOKENS_PER_BATCH["cpu"] and model.eos_id == 1
    assert model.tokenizer.get_vocab_size() <= 400
    assert model.details() == {
        "device": "cpu", "llm_base_model": "model", "llm_revision": content_hash(folder),
        "llm_tokenizer_revision": content_hash(folder),
        "llm_load_in_4bit": False, "use_liger_kernel": False, "tokens_per_batch": 1024,
    }  # fmt: skip


def test_flags_win_over_the_devices_defaults(folder: Path):
    model = find_language_model(config(folder, llm_load_in_4bit=True, tokens_per_batch=77))
    assert (model.in_4bit, model.max_tokens, model.paged) == (True, 77, False)


def test_defaults_on_cuda(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("has_cuda_driver", "use_cuda"):
        monkeypatch.setattr(f"recipes.language_model.{name}", lambda *_: True)
    flags = RankerConfig(dataset_code="games", llm_base_model=str(folder))
    model = find_language_model(flags)
    assert (model.device, model.in_4bit, model.paged) == ("cuda", True, True)
    assert model.max_tokens == TOKENS_PER_BATCH["cuda"]
    assert find_language_model(config(folder)).device == "cpu"
    flags = RankerConfig(dataset_code="games", llm_base_model=str(folder), llm_load_in_4bit=False)
    assert not find_language_model(flags).paged


@pytest.mark.parametrize(("cuda", "default"), [(False, "smollm2"), (True, "Llama-2-7b")])
def test_default_model(
    cuda: bool,
    default: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    from model.hub import BaseModel

    requested = []

    def find(name: str, **options: Any) -> BaseModel:
        requested.append(name)
        return BaseModel(name, folder, "1")

    for name in ("has_cuda_driver", "use_cuda"):
        monkeypatch.setattr(f"recipes.language_model.{name}", lambda *_: cuda)
    monkeypatch.setattr("recipes.language_model.find_model", find)
    model = find_language_model(RankerConfig(dataset_code="games"))
    assert requested == [model.base.name] and default in model.base.name
    assert model.revision == "1"  # of the hub; nothing needs to be hashed
    assert f"base model: {model.base.name}, the default on" in capsys.readouterr().out


def test_another_tokenizer(folder: Path, tmp_path: Path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(folder / "tokenizer.json", tokenizer)
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    (tokenizer / "config.json").write_text("{}")
    (folder / "tokenizer.json").unlink()
    model = find_language_model(config(folder, llm_base_tokenizer=str(tokenizer)))
    assert model.tokenizer_revision == content_hash(tokenizer) != model.revision
    assert model.eos_id == 0 and model.base.folder == folder


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        ("no model", {}, "--llm_base_model {folder}/none: "),
        ("no tokenizer", {}, "name another tokenizer with --llm_base_tokenizer"),
        ("no end", {}, "has no end-of-sequence token: name another tokenizer with --llm_base_"),
        ("small vocabulary", {}, ": use another --llm_base_model or --llm_base_tokenizer"),
        ("", {"llm_max_text_len": 5000}, "--llm_max_text_len 5000: model reads at most 4096"),
        ("", {"lora_target_modules": ("wide",)}, "--lora_target_modules wide: not in model"),
        ("", {"llm_base_tokenizer": "./none"}, "--llm_base_tokenizer ./none: "),
        ("", {"use_liger_kernel": True}, "--use_liger_kernel: "),
    ],
)
def test_messages_name_flags(damage: str, flags: dict, message: str, folder: Path):
    name = folder
    if damage == "no model":
        name = folder / "none"
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif damage == "no end":
        change(folder, "tokenizer_config.json", eos_token=None)
        change(folder, "config.json", eos_token_id=None)
    elif damage == "small vocabulary":
        change(folder, "config.json", vocab_size=100)
    with pytest.raises(UserError) as caught:
        find_language_model(config(name, **flags))
    assert message.format(folder=folder) in str(caught.value)


def test_liger_is_used_where_it_can_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("recipes.language_model.find_spec", lambda name: None)
    assert not use_liger(None, "cuda", folder)
    monkeypatch.setattr("recipes.language_model.find_spec", lambda name: name)
    supported = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    for name in ("", ".transformers", ".transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", supported)
    assert not use_liger(None, "cpu", folder) and not use_liger(False, "cuda", folder)
    assert use_liger(True, "cuda", folder)
    assert not capsys.readouterr().out
    assert use_liger(None, "cuda", folder)
    assert capsys.readouterr().out.startswith("kernels of liger-kernel are used: ")
    change(folder, "config.json", model_type="bloom")
    assert not use_liger(None, "cuda", folder)


def test_check_liger(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="need CUDA"):
        check_liger("cpu")
    monkeypatch.setattr("recipes.language_model.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        check_liger("cuda")
    monkeypatch.setattr("recipes.language_model.find_spec", lambda name: name)
    check_liger("cuda")
