"""The CUDA path: NF4, packed prompts, both stages, retrievers, Liger's kernels.

Skipped without a CUDA device; ``TEST_DEVICE=cpu`` tries on the CPU what can be tried there.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import train_ranker
import train_retriever
from config import MODEL_CODES
from dataloader.sequences import MaskedWindows, TrainingWindows
from errors import UserError
from model import packing
from model.language_model import add_lora, dequantize, load_causal_lm, recompute_activations
from model.losses import catalogue_loss
from model.packing import pack_prompts, packs
from model.verbalizer import candidate_scores, response_loss
from tests.helpers import interrupt, make_data, run_script, small_model
from tests.model.test_packing import LETTER_IDS, batch_of, make_texts
from trainer.optimization import build_optimizer

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
IS_CUDA = DEVICE.type == "cuda"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKER = [
    "--max_steps", 4, "--lora_val_iterations", 2, "--warmup_steps", 0, "--train_batch_size", 8,
    "--llm_max_history", 5, "--device", DEVICE.type, "--llm_load_in_4bit", "true",
]  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_CUDA and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
on_cuda = pytest.mark.skipif(not IS_CUDA, reason="needs CUDA")


def adapted(folder: Path, *, in_4bit: bool = False, fused_kernels: bool = False) -> PeftModel:
    """The tiny Llama with adapters that are not 0."""
    torch.manual_seed(0)
    model = load_causal_lm(folder, device=DEVICE, in_4bit=in_4bit, fused_kernels=fused_kernels)
    if not IS_CUDA:
        model.set_attn_implementation("sdpa")
        pack_prompts(model)
    adapted = add_lora(model, rank=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return adapted


def results(model: PeftModel, texts: list[Tensor], side: str = "left") -> list[Tensor]:
    """Scores, loss and gradients."""
    batch: dict[str, Any] = send_to_device(batch_of(texts, side), DEVICE)
    with torch.no_grad():
        scores = candidate_scores(model.eval(), batch, LETTER_IDS.to(DEVICE))
    model.train().zero_grad()
    loss = response_loss(model, batch)
    loss.backward()
    return [scores, loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compare by norm, since single elements near 0 are all rounding in bfloat16."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours.isfinite().all() and theirs.norm() > 0
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


# The language model -----------------------------------------------------------------------------


@on_cuda
def test_variable_length_attention_works():
    assert packing.varlen_works(DEVICE, torch.bfloat16, 128)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_packed_equals_padded_and_single(tiny_llama: Path, dtype: str, tolerance: float):
    model, texts = adapted(tiny_llama).to(getattr(torch, dtype)), make_texts()
    assert packs(model.get_base_model())
    packed = results(model, texts)
    singles = torch.cat([results(model, [text] * 2)[0][:1] for text in texts])
    model.get_base_model().set_attn_implementation("sdpa")
    for side in ("left", "right"):
        batch = send_to_device(batch_of(texts, side), DEVICE)
        with torch.no_grad():
            scores = candidate_scores(model.eval(), batch, LETTER_IDS.to(DEVICE))
        assert_close([packed[0], singles], [scores, scores], tolerance)
    assert_close(packed, results(model, texts), tolerance)


@pytest.mark.parametrize("in_4bit", [False, True])
def test_recomputation_changes_nothing(tiny_llama: Path, in_4bit: bool):
    model, texts = adapted(tiny_llama, in_4bit=in_4bit), make_texts()
    expected = results(model, texts)
    recompute_activations(model)
    assert_close(results(model, texts), expected, 0.1)


def test_nf4_equals_dequantized_bfloat16(tiny_llama: Path):
    quantized, dequantized = (adapted(tiny_llama, in_4bit=True) for _ in range(2))
    dequantize(dequantized)
    texts = make_texts()
    assert_close(results(dequantized, texts), results(quantized, texts), 0.1)


@on_cuda
def test_paged_adamw_equals_torchs():
    weights = []
    for paged in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(4096, 32, bias=False, device=DEVICE)  # the A of rank 32 in a 7B model
        optimizer = build_optimizer(
            layer, "AdamW", lr=1e-3, weight_decay=0.01, epsilon=1e-8, paged=paged
        )
        assert type(optimizer).__name__ == ("PagedAdamW32bit" if paged else "AdamW")
        for _ in range(5):
            layer(torch.randn(8, 4096, device=DEVICE)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@on_cuda
def test_liger_changes_neither_scores_nor_gradients(tiny_llama: Path):
    pytest.importorskip("liger_kernel")
    texts = make_texts()
    # Liger last, because it patches rotary embeddings for all models.
    stock, fused = (
        results(adapted(tiny_llama, fused_kernels=fused).float(), texts) for fused in (False, True)
    )
    assert_close(fused, stock, 1e-3)


# Both stages ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(toy_flags: list, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    """Flags of the ranker, after a retriever trained on the device."""
    run = tmp_path_factory.mktemp("gpu") / "retriever"
    done = run_script(
        "train_retriever.py", *toy_flags, "--export_root", run, "--max_steps", 60,
        "--val_iterations", 30, "--train_batch_size", 16, "--device", DEVICE.type,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return ["--llm_retrieved_path", run, "--llm_base_model", tiny_llama, *RANKER]


def test_an_interrupted_ranker_resumes(flags: list, tmp_path: Path):
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    done = run_script("train_ranker.py", *flags, "--export_root", whole)
    assert done.returncode == 0, done.stderr
    config = json.loads((whole / "config.json").read_text())
    assert config["llm_load_in_4bit"] and config["device"] == DEVICE.type
    status, last = interrupt(
        "train_ranker.py", *flags, "--export_root", halted, when=halted / "checkpoint.safetensors"
    )
    assert status != 0, last
    done = run_script("train_ranker.py", *flags, "--export_root", halted, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    ours, theirs = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (halted, whole)
    )
    for name, weight in theirs.items():  # kernels on CUDA may add up in another order
        torch.testing.assert_close(ours[name], weight, rtol=0.05, atol=1e-4)


def test_the_advice_when_out_of_memory(
    flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def limited(model: nn.Module, batch: dict[str, Any], *options: Any) -> Tensor:
        if len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return response_loss(model, batch, *options)

    monkeypatch.setattr("recipes.verbalizers.response_loss", limited)
    words = [*map(str, flags), "--export_root", str(tmp_path / "run")]
    advised = r"after step 0: continue with --resume and a lower --tokens_per_batch than"
    with pytest.raises(UserError, match=advised):
        train_ranker.main([*words, "--tokens_per_batch", "8192"])
    train_ranker.main([*words, "--resume", "--tokens_per_batch", "1"])
    assert (tmp_path / "run" / "overall_metrics.json").exists()


@pytest.mark.parametrize("code", MODEL_CODES)
def test_retrievers_agree_with_the_cpu(code: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch allows it in NARM's GRU
    model = small_model(code)
    data, numbers = make_data([9, 4, 30, 7]), list(range(4))
    if code == "bert":
        examples: Any = MaskedWindows(data, 20, 1.0, 0.3, 42)
    else:
        examples = TrainingWindows(data, 20, 1.0)
    (batch,) = examples.__getitems__(numbers)
    parts = []
    for device in (torch.device("cpu"), DEVICE):
        ours = copy.deepcopy(model).to(device)
        loss = catalogue_loss(ours, send_to_device(batch, device))
        gradients = torch.autograd.grad(loss, list(ours.parameters()))
        parts.append([loss.detach().cpu(), *(gradient.cpu() for gradient in gradients)])
    for found, expected in zip(*parts):
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-7


@pytest.mark.parametrize("code", MODEL_CODES)
def test_retrievers_train(code: str, toy_flags: list, tmp_path: Path):
    words = [
        *toy_flags, "--model_code", code, "--export_root", tmp_path / "run", "--max_steps", 20,
        "--val_iterations", 10, "--train_batch_size", 16, "--device", DEVICE.type,
    ]  # fmt: skip
    train_retriever.main(list(map(str, words)))
    with np.load(tmp_path / "run" / "candidates.npz", allow_pickle=False) as file:
        assert np.isfinite(file["test_scores"]).any()
