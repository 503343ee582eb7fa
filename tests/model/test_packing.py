"""Packed, padded and single prompts: the same scores and gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model import packing
from model.cpu_attention import speed_up_on_cpu
from model.language_model import add_lora, recompute_activations
from model.packing import pack, pack_prompts, packs
from model.verbalizer import candidate_scores, response_loss

LETTER_IDS = torch.tensor([50, 7, 399, 120, 33])
LENGTHS = (3, 40, 17, 1, 140)
IGNORE_INDEX = -100


def make_texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 400, (length,), generator=generator) for length in LENGTHS]


def batch_of(texts: list[Tensor], side: str = "left") -> dict[str, Any]:
    """Padded texts; the last two tokens are targets, or the last one of short texts."""
    width = max(map(len, texts))
    ids = torch.ones(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    targets = torch.full((len(texts), 2), IGNORE_INDEX)
    for row, text in enumerate(texts):
        start = width - len(text) if side == "left" else 0
        ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
        count = min(2, len(text) - 1)
        if count:
            targets[row, -count:] = text[-count:]
    return {"input_ids": ids, "attention_mask": mask, "targets": targets}


def make_model(folder: Path) -> PeftModel:
    """The tiny Llama in float32 with adapters that are not 0."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = add_lora(base, rank=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def results(model: PeftModel, batch: dict[str, Any]) -> list[Tensor]:
    """Scores, loss and gradients."""
    with torch.no_grad():
        scores = candidate_scores(model.eval(), batch, LETTER_IDS)
    model.train().zero_grad()
    loss = response_loss(model, batch)
    loss.backward()
    return [scores, loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 8
    for ours, theirs in zip(found, expected):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alone", ["stock", "ours"])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_equals_padded_and_single(
    tiny_llama: Path, alone: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
):
    if alone == "stock":
        monkeypatch.setattr(packing, "block_backward_attention", sdpa_attention_forward)
    texts = make_texts()
    stock, packed, padded = (make_model(tiny_llama) for _ in range(3))
    pack_prompts(packed.get_base_model())
    if alone == "ours":
        speed_up_on_cpu(padded.get_base_model())
    if recompute:
        recompute_activations(packed)
    assert packs(packed.get_base_model()) and not packs(padded.get_base_model())
    expected = results(padded, batch_of(texts))
    for side in ("left", "right"):
        assert_equal(results(packed, batch_of(texts, side)), expected)
    one_by_one = [batch_of([text]) for text in texts]
    with torch.no_grad():
        singles = [candidate_scores(stock.eval(), batch, LETTER_IDS) for batch in one_by_one]
    torch.testing.assert_close(torch.cat(singles), expected[0], rtol=1e-5, atol=1e-5)
    counts = [min(2, len(text) - 1) for text in texts]
    stock.train()
    for batch, count in zip(one_by_one, counts):
        if count:
            (response_loss(stock, batch) * count / sum(counts)).backward()
    gradients = [p.grad for p in stock.parameters() if p.requires_grad]
    assert_equal([expected[0], expected[1], *gradients], expected)


def test_loss_over_the_letters(tiny_llama: Path):
    texts = [text for text in make_texts() if len(text) > 2]
    for text, letter in zip(texts, LETTER_IDS):
        text[-2] = letter
    losses = []
    for prepare in (pack_prompts, speed_up_on_cpu):
        model = make_model(tiny_llama)
        prepare(model.get_base_model())
        losses.append(response_loss(model, batch_of(texts), LETTER_IDS))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_a_row_of_prompts():
    packed = pack(batch_of([torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 4])]))
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert packed["prompts"].lengths == [3, 1, 2]
    assert packed["prompts"].offsets.tolist() == [0, 3, 4, 6]


def test_no_mask_is_built(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_model(tiny_llama)
    pack_prompts(model.get_base_model())
    masks = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any):
        masks.append(mask)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setattr(packing, "block_backward_attention", record)
    results(model, batch_of(make_texts()))
    assert len(masks) == 2 * 2 * len(LENGTHS) and set(masks) == {None}


def stand_in(query: Tensor, key: Tensor, value: Tensor, first: Tensor, *rest: Any, **options: Any):
    """Torch's variable-length attention by its definition; options as torch has them."""
    assert rest[0] is first and rest[1:] == (max(first.diff()), max(first.diff()))
    assert options.pop("window_size") == (-1, 0) and list(options) == ["scale"]
    lengths = first.diff().tolist()
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)))
    attend: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
    outputs = [attend(*part, is_causal=True, **options) for part in parts]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def test_variable_length_attention(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    model, padded = make_model(tiny_llama), make_model(tiny_llama)
    pack_prompts(model.get_base_model())
    expected = results(padded, batch_of(make_texts()))
    monkeypatch.setattr(packing, "varlen_works", lambda *_: True)
    monkeypatch.setattr(packing, "varlen_attn", stand_in)
    assert_equal(results(model, batch_of(make_texts())), expected)


def test_variable_length_attention_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    difference = packing._difference
    cpu = torch.device("cpu")
    monkeypatch.setattr(packing, "varlen_attn", stand_in)
    assert difference(cpu, torch.float32, 16) < 1e-5
    monkeypatch.setattr(
        packing,
        "varlen_attn",
        lambda q, k, v, *rest, **options: stand_in(q, k, -v, *rest, **options),
    )
    assert difference(cpu, torch.float32, 16) > 0.5

    def absent(*_: Any) -> float:
        raise RuntimeError("not built with flash attention")

    monkeypatch.setattr(packing, "_difference", absent)
    cuda = torch.device("cuda")
    state = torch.get_rng_state()
    assert not packing.varlen_works(cuda, torch.bfloat16, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert "varlen_attn fails: not built with flash attention" in capsys.readouterr().out
    monkeypatch.setattr(packing, "_difference", lambda *_: 0.5)
    assert not packing.varlen_works(cuda, torch.bfloat16, 24)
    assert "differ by 50%" in capsys.readouterr().out
    monkeypatch.setattr(packing, "_difference", lambda *_: 0.01)
    assert packing.varlen_works(cuda, torch.bfloat16, 8)
    assert not packing.varlen_works(cuda, torch.float32, 8)
    assert not packing.varlen_works(cpu, torch.bfloat16, 8)
    packing.varlen_works.cache_clear()


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "bamba"}, {"sliding_window": 4096}, {"_attn_implementation": "eager"}],
)
def test_models_that_are_padded(tiny_llama: Path, changes: dict[str, Any]):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for name, value in changes.items():
        setattr(model.config, name, value)
    pack_prompts(model)
    assert not packs(model)
