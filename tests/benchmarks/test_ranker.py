"""The ranker's benchmarks with a tiny language model on toy data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from benchmarks import (
    language_models,
    ranker_exactness,
    ranker_inference,
    ranker_train,
    ranker_variants,
)
from errors import UserError
from model.language_model import add_lora, load_causal_lm
from model.packing import pack_prompts, packs
from tests.benchmarks.helpers import assert_rows, in_this_process, result

CPU = torch.device("cpu")


@pytest.mark.usefixtures("tiny_model")
def test_train(
    data_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(ranker_train, "in_own_process", in_this_process)
    # In one process the second recipe may not exceed the peak of the first.
    monkeypatch.setattr(ranker_train, "rss_mib", lambda: 0.0)
    flags = ["--datasets", "ml-100k", "--batch_size", "2", "--rounds", "1"]
    ranker_train.main([*data_flags, *flags, "--verbalizers", "letters", "titles"])
    printed = result(capsys.readouterr().out)
    assert [row["verbalizer"] for row in printed["rows"]] == ["letters", "titles"]
    assert_rows(
        printed,
        "ranker_train",
        "model verbalizer dataset in_4bit batch_size published_s ours_s examples_per_s "
        "tokens_per_s "
        "throughput_ratio published_mib ours_mib memory_ratio floor_share",
    )


@pytest.mark.usefixtures("tiny_model")
def test_variants(
    data_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(model: PeftModel) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(ranker_variants, "matmul_rate", lambda device: 1e12)
    monkeypatch.setattr(ranker_variants, "stock_adapters", broken)
    flags = ["--datasets", "ml-100k", "--batch_size", "2", "--steps", "1", "--profile"]
    ranker_variants.main([*data_flags, *flags, "--verbalizers", "letters", "titles"])
    output, errors = capsys.readouterr()
    assert "Self CPU" in output  # the profile
    first, *rows = result(output)["rows"]
    assert first == {"matmul_tflops": 1.0}
    assert [json.loads(line) for line in errors.splitlines() if line[:1] == "{"] == [first, *rows]
    names = ["default", "recomputed", "stock adapters"] * 2
    assert [row["variant"] for row in rows] == names
    for row in rows:
        if row["variant"] == "stock adapters":
            assert row["error"] == "RuntimeError: no memory"
        else:
            assert row["tokens_per_s"] > 0 and "error" not in row


def test_variants_leave_the_model_as_it_was(tiny_llama: Path):
    def results(model: PeftModel) -> torch.Tensor:
        return model(input_ids=torch.arange(3, 40)[None]).logits

    causal_lm = load_causal_lm(tiny_llama, device=CPU, in_4bit=False)
    causal_lm.set_attn_implementation("sdpa")
    pack_prompts(causal_lm)
    model = add_lora(causal_lm, rank=4, alpha=8, dropout=0.0, target_modules=("q_proj",))
    expected = results(model)
    chosen = ranker_variants.removable(model, "letters")
    assert list(chosen) == ["default", "padded", "recomputed", "stock adapters"]
    for name, apply in chosen.items():
        with apply(model):
            assert model.is_gradient_checkpointing == (name == "recomputed")
            assert packs(causal_lm) == (name != "padded")
        assert torch.equal(results(model), expected)


@pytest.mark.usefixtures("tiny_model")
def test_inference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    figure = tmp_path / "figure.png"
    flags = ["--users", "1", "--title_tokens", "2", "3", "--figure", str(figure)]
    flags += ["--batch_sizes", "2"]
    ranker_inference.main(["--cache_root", str(tmp_path), *flags])
    printed = result(capsys.readouterr().out)
    assert_rows(
        printed,
        "ranker_inference",
        "model in_4bit title_tokens written_tokens generation_s letters_s titles_s "
        "letters_speedup titles_speedup batched",
    )
    for row in printed["rows"]:
        assert [(batch["users"], batch["way"]) for batch in row["batched"]] == [
            (2, "letters"),
            (2, "titles"),
        ]
        assert all(batch["users_per_s"] > 0 and batch["floor_share"] for batch in row["batched"])
    assert [row["title_tokens"] for row in printed["rows"]] == [2, 3]
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny_model")
def test_exactness(data_flags: list[str], capsys: pytest.CaptureFixture[str]):
    ranker_exactness.main(
        [*data_flags, "--dataset_code", "ml-100k", "--prompts", "3", "--device", "cpu"]
    )
    printed = result(capsys.readouterr().out)
    keys = "precision batch_size padding ours against difference top1 rank_correlation"
    assert_rows(printed, "ranker_exactness", keys)
    float32 = [row for row in printed["rows"] if row["precision"] == "float32"]
    assert len(float32) == 8 and len(printed["rows"]) == 19
    assert all(row["difference"] < 1e-3 and row["top1"] == 1 for row in float32)


def test_large_model_gets_random_weights(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = transformers.LlamaConfig.from_pretrained(tiny_llama)
    monkeypatch.setattr(transformers, "LlamaConfig", lambda: config)
    setup = language_models.prepare("llama-2-7b", CPU, str(tmp_path), str(tiny_llama))
    assert setup.folder == tmp_path / "llama-2-7b-random"
    assert setup.tokenizer_folder == tiny_llama and setup.eos_id == 1 and not setup.in_4bit
    weights = transformers.AutoModelForCausalLM.from_pretrained(setup.folder)
    assert setup.num_parameters == sum(
        p.numel() for name, p in weights.named_parameters() if "layers" in name or "norm" in name
    )


def test_large_model_needs_its_tokenizer(tmp_path: Path):
    with pytest.raises(UserError, match="--tokenizer is missing"):
        language_models.prepare("llama-2-7b", CPU, str(tmp_path), None)
