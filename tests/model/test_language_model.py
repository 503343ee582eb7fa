"""Loading in bfloat16 and NF4, LoRA adapters and their files, measured activations."""

import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from errors import ArgumentError, InputError
from model import cpu_attention
from model.language_model import (
    MEMORY_SHARE,
    activation_bytes_per_token,
    add_lora,
    base_causal_lm,
    computing_dtype,
    dequantize,
    dequantize_for_inference,
    load_adapter,
    load_causal_lm,
    measure,
    plan_activations,
    recompute_activations,
    save_adapter,
)
from model.layers import Dropout
from model.verbalizer import candidate_scores, response_loss

CPU = torch.device("cpu")
LORA: dict[str, Any] = {
    "rank": 8, "alpha": 32, "dropout": 0.0, "target_modules": ("q_proj", "v_proj"),
}  # fmt: skip
LETTER_IDS = torch.arange(50, 70)


def load(folder: Path, in_4bit: bool = False) -> nn.Module:
    return load_causal_lm(folder, device=CPU, in_4bit=in_4bit)


def adapted(folder: Path, in_4bit: bool = False, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return add_lora(load(folder, in_4bit), **(LORA | options))


@pytest.fixture()
def batch() -> dict[str, Any]:
    """Left-padded texts that end with a letter and the end of the sequence."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 400, (8, 60), generator=generator)
    ids[:, -2], ids[:, -1] = LETTER_IDS[:8], 1
    mask = torch.ones_like(ids)
    mask[1, :30], mask[4, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "targets": ids[:, -2:]}


def scores_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return candidate_scores(model.eval(), batch, LETTER_IDS)


def randomize(model: PeftModel) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)


# Loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_4bit", [True, False])
def test_loaded_weights(tiny_llama: Path, in_4bit: bool):
    model = load(tiny_llama, in_4bit)
    projection = model.model.layers[0].self_attn.q_proj
    assert type(projection).__name__ == ("Linear4bit" if in_4bit else "Linear")
    if in_4bit:
        state = projection.weight.quant_state
        assert state.quant_type == "nf4" and state.nested
        assert projection.compute_dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.config._attn_implementation == cpu_attention.NAME


def test_output_layer_gets_contiguous_inputs(tiny_llama: Path):
    model = load(tiny_llama)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(input_ids=torch.ones(3, 9, dtype=torch.int64), logits_to_keep=2)
    assert seen[0].shape == (3, 2, 64) and seen[0].is_contiguous()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_unusable_folder(tiny_llama: Path, tmp_path: Path, name: str, content: bytes | None):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ArgumentError, match="llama: cannot be loaded") as raised:
        load(folder)
    assert raised.value.argument == "folder"


def test_model_without_fused_kernels(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    liger = MagicMock(MODEL_TYPE_TO_APPLY_LIGER_FN={"gpt": None})
    monkeypatch.setitem(sys.modules, "liger_kernel", MagicMock())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", MagicMock())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", liger)
    with pytest.raises(ArgumentError, match="fused_kernels true: liger-kernel does not support"):
        load_causal_lm(tiny_llama, device=CPU, in_4bit=False, fused_kernels=True)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_dequantized_values_are_identical(
    tiny_llama: Path, batch: dict[str, Any], with_adapters: bool
):
    model = adapted(tiny_llama, in_4bit=True) if with_adapters else load(tiny_llama, True)
    if with_adapters:
        randomize(model)
    layer = base_causal_lm(model).model.layers[0].mlp.down_proj
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    expected, scores = layer(x), scores_of(model, batch)
    dequantize(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert not any(type(m).__name__ == "Linear4bit" for m in layers)
    layer = base_causal_lm(model).model.layers[0].mlp.down_proj
    assert torch.equal(layer(x), expected) and not layer.weight.requires_grad
    # Next to plain layers, adapters add up in another order.
    difference = (scores_of(model, batch) - scores).norm()
    assert difference < 0.05 * scores.norm() if with_adapters else difference == 0
    if with_adapters:
        response_loss(model.train(), batch).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_dequantized_for_inference_if_memory_allows(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    done = []
    monkeypatch.setattr("model.language_model.dequantize", done.append)
    model, plain = adapted(tiny_llama, in_4bit=True), adapted(tiny_llama)
    dequantize_for_inference(model)  # on the CPU, where resumed runs end in the same bytes
    monkeypatch.setattr(PeftModel, "device", torch.device("cuda"), raising=False)
    needed = 2 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    for free, count in ((2 * needed, 0), (2 * needed + 1, 1)):
        monkeypatch.setattr("model.language_model.free_bytes", lambda _, free=free: free)
        dequantize_for_inference(model)
        dequantize_for_inference(plain)
        assert done == [model] * count


# Adapters ---------------------------------------------------------------------------------------


def test_only_adapters_are_trained(tiny_llama: Path):
    model = adapted(tiny_llama, dropout=0.3)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 2 and all("lora_" in name for name in trainable)
    dropouts = [m for name, m in model.named_modules() if name.endswith("lora_dropout.default")]
    assert len(dropouts) == 4
    assert all(type(m) is Dropout and m.p == 0.3 for m in dropouts)


@pytest.mark.parametrize("modules", [("none",), ("input_layernorm",)])
def test_modules_without_adapters(tiny_llama: Path, modules: tuple[str, ...]):
    with pytest.raises(ArgumentError, match=f"target_modules {modules[0]}: ") as raised:
        adapted(tiny_llama, target_modules=modules)
    assert raised.value.argument == "target_modules"


@pytest.mark.parametrize("in_4bit", [True, False])
def test_training_reduces_the_loss(tiny_llama: Path, batch: dict[str, Any], in_4bit: bool):
    model = adapted(tiny_llama, in_4bit).train()
    frozen = model.get_base_model().model.layers[0].self_attn.q_proj.weight
    before = frozen.clone()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = response_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("in_4bit", [True, False])
def test_saved_adapter(tiny_llama: Path, tmp_path: Path, batch: dict[str, Any], in_4bit: bool):
    model = adapted(tiny_llama, in_4bit)
    randomize(model)
    scores = scores_of(model, batch)
    save_adapter(model, tmp_path / "adapter")
    ours = adapted(tiny_llama, in_4bit)
    assert not torch.equal(scores_of(ours, batch), scores)
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(scores_of(ours, batch), scores)
    pefts = PeftModel.from_pretrained(load(tiny_llama, in_4bit), tmp_path / "adapter")
    torch.testing.assert_close(scores_of(pefts, batch), scores, rtol=0.05, atol=0.1)


def test_saving_is_atomic_and_deterministic(tiny_llama: Path, tmp_path: Path):
    modules = ("v_proj", "q_proj", "o_proj", "up_proj")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        save_adapter(adapted(tiny_llama, target_modules=modules), folder)
    names = sorted(path.name for path in first.iterdir())
    assert [(first / name).read_bytes() for name in names] == [
        (second / name).read_bytes() for name in names
    ]
    model = adapted(tiny_llama)
    save_adapter(model, first)  # replaces the other adapter
    load_adapter(model, first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


@pytest.mark.parametrize("content", [None, b"", b"x" * 99])
def test_damaged_adapter(tiny_llama: Path, tmp_path: Path, content: bytes | None):
    model = adapted(tiny_llama)
    save_adapter(model, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.unlink() if content is None else weights.write_bytes(content)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is damaged"):
        load_adapter(model, tmp_path / "adapter")


def test_weights_of_its_own(tiny_llama: Path, tmp_path: Path):
    model, other = adapted(tiny_llama), adapted(tiny_llama)
    for each, value in ((model, 1.0), (other, 2.0)):
        each.register_parameter("own", torch.nn.Parameter(torch.tensor(value)))
    save_adapter(model, tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter")
    assert other.own == 1
    other.register_parameter("later", torch.nn.Parameter(torch.tensor(3.0)))
    with pytest.raises(InputError, match="written by an earlier version"):
        load_adapter(other, tmp_path / "adapter")


# Gradients and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("in_4bit", [True, False])
def test_evaluation_does_not_change_gradients(
    tiny_llama: Path, batch: dict[str, Any], in_4bit: bool
):
    model = adapted(tiny_llama, in_4bit)

    def gradients() -> list[Tensor]:
        model.train().zero_grad()
        response_loss(model, batch).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    with torch.inference_mode():
        candidate_scores(model.eval(), batch, LETTER_IDS)
    assert any(gradient.abs().max() > 0 for gradient in before)
    for gradient, later in zip(before, gradients()):
        assert torch.equal(gradient, later)


def test_checkpointing_does_not_change_gradients(tiny_llama: Path, batch: dict[str, Any]):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(tiny_llama).train()
        if checkpointing:
            recompute_activations(model)
        assert model.is_gradient_checkpointing == checkpointing
        response_loss(model, batch).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


def test_sizes_are_measured_without_allocating(tiny_llama: Path):
    state = torch.get_rng_state()
    sizes = measure(tiny_llama, rank=8, target_modules=("q_proj", "v_proj"))
    assert torch.equal(torch.get_rng_state(), state)
    model = adapted(tiny_llama)
    assert sizes == (
        load(tiny_llama).num_parameters(),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        2 * 64,
    )
    assert measure(tiny_llama, rank=8, target_modules=("1.mlp.up_proj",)).inputs == 64


def test_activations_are_measured(tiny_llama: Path):
    model = adapted(tiny_llama)
    state = torch.get_rng_state()
    per_token = activation_bytes_per_token(model)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(p.grad is None for p in model.parameters())
    # At least the inputs of the seven projections in each of two layers, 64 wide except one of 128,
    # in bfloat16 and partly shared.
    assert 2 * 2 * (6 * 64 + 128) / 2 < per_token < 1e5
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # Adapters save their inputs, which q, k and v share, and gate and up.
    more = activation_bytes_per_token(adapted(tiny_llama, target_modules=every))
    assert more > per_token + 2 * 2 * (64 + 64 + 128)
    assert activation_bytes_per_token(adapted(tiny_llama, dropout=0.1)) > per_token


def test_memory_decides_what_is_trained_on_at_once(
    tiny_llama: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    model = adapted(tiny_llama)
    per_token = activation_bytes_per_token(model)
    monkeypatch.setattr(
        "model.language_model.free_bytes", lambda _: int(1000.5 * per_token / MEMORY_SHARE)
    )
    assert plan_activations(model, 900, 900) == (900, False)
    assert plan_activations(model, 1600, 400) == (1000, False)
    assert plan_activations(model, 1600, 1600) == (1600, True)
    assert plan_activations(model, 1600, 1200) == (1600, True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("at most 1,000 tokens at once, no gradient checkpointing")
    assert lines[2].endswith("at most 1,600 tokens at once, gradient checkpointing")


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_gpus_without_bfloat16(
    capability: tuple[int, int],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "T4")
    assert computing_dtype(torch.device("cuda")) == getattr(torch, dtype)
    printed = capsys.readouterr().out
    assert printed.startswith("note: T4 has no bfloat16") if dtype == "float32" else not printed
