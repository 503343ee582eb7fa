"""RMSNorm with frozen weights against transformers' own."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from model.cpu_norm import FrozenRMSNorm, speed_up_norms


def test_gradients_equal_the_definition():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(FrozenRMSNorm.apply, (x, weight, 1e-5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_close_to_stock(dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    stock = LlamaRMSNorm(64, eps=1e-5)
    stock.weight.data.normal_()
    x, g = torch.randn(2, 7, 64), torch.randn(2, 7, 64)
    expected = x.clone().requires_grad_()
    stock(expected).backward(g)
    found = x.to(dtype).requires_grad_()
    y = FrozenRMSNorm.apply(found, stock.weight.detach().to(dtype), 1e-5)
    y.backward(g.to(dtype))
    assert y.dtype == found.grad.dtype == dtype
    torch.testing.assert_close(y.float(), stock(x), rtol=2 * tolerance, atol=tolerance)
    torch.testing.assert_close(
        found.grad.float(), expected.grad, rtol=tolerance, atol=4 * tolerance
    )


def test_only_frozen_norms_are_replaced():
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    speed_up_norms(model)
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "norm" in name)
    model.requires_grad_(False)
    torch.testing.assert_close(model(ids).logits, expected)
