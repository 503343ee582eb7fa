"""Adapters in the dtype of their input, against PEFT's."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from model.language_model import load_causal_lm
from model.lora import AdaptedLinear, compute_in_input_dtype

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(
    folder: Path, dtype: torch.dtype, dropout: float = 0.0, in_4bit: bool = False
) -> PeftModel:
    """The tiny Llama with adapters that are not 0."""
    torch.manual_seed(0)
    if in_4bit:
        model = load_causal_lm(folder, device=torch.device("cpu"), in_4bit=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=TARGETS)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def run(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients on some tokens."""
    torch.manual_seed(1)
    logits = model(torch.arange(3, 27).view(2, 12)).logits
    logits.float().square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return logits, gradients


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equal_to_peft_in_float32(tiny_llama: Path, dropout: float):
    stock, ours = (adapted(tiny_llama, torch.float32, dropout).train() for _ in range(2))
    compute_in_input_dtype(ours)
    (expected, gradients), (found, found_gradients) = run(stock), run(ours)
    torch.testing.assert_close(found, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("in_4bit", [False, True])
def test_bfloat16_from_float32_weights(tiny_llama: Path, in_4bit: bool):
    stock, ours = (adapted(tiny_llama, torch.bfloat16, in_4bit=in_4bit).train() for _ in range(2))
    compute_in_input_dtype(ours)
    inputs_of_stock = set()
    for model in (stock, ours):
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(
                    lambda _, inputs, output, model=model: inputs_of_stock.add(
                        (model is stock, inputs[0].dtype)
                    )
                )
    dtypes = set()
    for module in ours.modules():
        if type(module).__name__ == "LlamaMLP":
            module.register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))
    (expected, gradients), (found, found_gradients) = run(stock), run(ours)
    assert dtypes == {torch.bfloat16} == {found.dtype}
    assert inputs_of_stock == {(True, torch.float32)}
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()
    for name, gradient in gradients.items():
        assert found_gradients[name].dtype == torch.float32
        cosine = torch.cosine_similarity(found_gradients[name].ravel(), gradient.ravel(), dim=0)
        assert cosine > 0.99


def test_disabled_and_merged_adapters(tiny_llama: Path):
    model = adapted(tiny_llama, torch.float32).eval()
    compute_in_input_dtype(model)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        tuned = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
        stock = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
        torch.testing.assert_close(plain, stock(ids).logits)
        assert (tuned - plain).abs().max() > 0.01
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, tuned)


def test_gradients_with_a_bias():
    torch.manual_seed(0)
    sizes = [(5, 3), (5, 3), (4, 3), (4,), (2, 3), (4, 2)]
    x, d, w, c, a, b = (torch.randn(size, dtype=torch.float64) for size in sizes)
    for tensor in (x, d, a, b):
        tensor.requires_grad = True
    assert torch.autograd.gradcheck(AdaptedLinear.apply, (x, d, w, c, a, b))
    assert torch.autograd.gradcheck(
        lambda x, a, b: AdaptedLinear.apply(x, x, w, c, a, b), (x, a, b)
    )
