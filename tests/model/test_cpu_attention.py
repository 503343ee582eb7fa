"""The blockwise backward pass of attention against torch's own."""

from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from model import cpu_attention
from model.cpu_attention import block_backward_attention, speed_up_on_cpu

SCALING = 0.3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one smaller, in the short sequences of these tests."""
    monkeypatch.setattr(cpu_attention, "BLOCK", 16)


def module(num_heads: int, num_groups: int) -> torch.nn.Module:
    """An attention layer as transformers' functions see it."""
    layer = torch.nn.Module()
    layer.num_key_value_groups = num_heads // num_groups
    layer.is_causal = True
    return layer


def definition(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention as its definition has it, from (B, H, L, D) to (B, L, H, D)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * SCALING
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_the_definition(length: int, num_groups: int, masked: bool):
    generator = torch.Generator().manual_seed(length)
    inputs = [
        torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)
        for heads in (4, num_groups, num_groups)
    ]
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    if masked and length > 1:
        mask[0, :, :, 0] = False  # one padding token on the left
        mask[0, :, 0, 0] = True
    weights = torch.randn(2, length, 4, 8, generator=generator, dtype=torch.float64)
    layer = module(4, num_groups)
    gradients = []
    for compute in (
        lambda q, k, v: definition(q, k, v, mask),
        lambda q, k, v: block_backward_attention(
            layer, q, k, v, mask if masked else None, scaling=SCALING
        )[0],
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = compute(*leaves)
        (output * weights).sum().backward()
        gradients.append([output.detach(), *(x.grad for x in leaves)])
    for expected, ours in zip(*gradients):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_model_has_stock_gradients(tiny_llama: Path, padded: bool):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    embeddings = torch.randn(3, 50, 64, dtype=torch.float64)
    mask = torch.ones(3, 50, dtype=torch.int64)
    if padded:
        mask[0, :20] = 0
        mask[1, :1] = 0
    results = []
    for name in ("sdpa", cpu_attention.NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        inputs = embeddings.clone().requires_grad_()
        hidden = model.model(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        hidden = hidden * mask[:, :, None]
        hidden.sin().sum().backward()
        weights = [p.grad for p in model.model.parameters() if p.grad is not None]
        results.append([hidden.detach(), inputs.grad, *weights])
    assert len(results[0]) > 10
    for expected, ours in zip(*results):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "why, num_keys, options",
    [
        ("cached keys", 60, {"scaling": SCALING}),
        ("dropout", 50, {"scaling": SCALING, "dropout": 0.5}),
        ("position bias", 50, {"scaling": SCALING, "position_bias": torch.zeros(1, 4, 50, 50)}),
        ("no scale", 50, {}),
    ],
)
def test_other_cases_are_left_to_torch(
    why: str, num_keys: int, options: dict, monkeypatch: pytest.MonkeyPatch
):
    torchs = MagicMock(return_value=(torch.zeros(1), None))
    monkeypatch.setattr(cpu_attention, "sdpa_attention_forward", torchs)
    query = torch.randn(1, 4, 50, 8, requires_grad=True)
    key = torch.randn(1, 4, num_keys, 8)
    block_backward_attention(module(4, 4), query, key, key, None, **options)
    passed = torchs.call_args.kwargs
    assert {name: passed[name] for name in options} == options


def test_no_graph_without_gradients(monkeypatch: pytest.MonkeyPatch):
    applied = MagicMock()
    monkeypatch.setattr(cpu_attention.BlockBackward, "apply", applied)
    x = torch.randn(1, 4, 50, 8)
    with torch.no_grad():
        block_backward_attention(module(4, 4), x, x, x, None, scaling=SCALING)
    assert not applied.called


def test_only_torchs_attention_is_replaced(tiny_llama: Path):
    for name, expected in (("sdpa", cpu_attention.NAME), ("eager", "eager")):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation=name)
        speed_up_on_cpu(model)
        assert model.config._attn_implementation == expected


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_one_query_equals_the_definition(
    num_groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cpu_attention, "sdpa_attention_forward", None)  # not called
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 1, 8, generator=generator).to(dtype)
    key, value = (torch.randn(3, num_groups, 20, 8, generator=generator) for _ in range(2))
    value = value.to(dtype)
    mask = torch.rand(3, 1, 1, 20, generator=generator) > 0.3
    for chosen in (mask, None):
        output, _ = block_backward_attention(
            module(4, num_groups), query, key, value, chosen, scaling=SCALING
        )
        seen = torch.ones_like(mask) if chosen is None else chosen
        expected = definition(query.float(), key, value.float(), seen)
        assert output.dtype == dtype and output.shape == expected.shape
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert torch.allclose(output.float(), expected, atol=tolerance)
