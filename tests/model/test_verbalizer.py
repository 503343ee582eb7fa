"""The verbalizer against stock transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from model.language_model import add_lora
from model.verbalizer import candidate_scores, position_ids, response_loss

LETTER_IDS = torch.tensor([50, 7, 399, 120, 33])
IGNORE_INDEX = -100


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def random_texts(num_texts: int = 16, seed: int = 0) -> list[Tensor]:
    """Token ids of texts of 3 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 41, (num_texts,), generator=generator).tolist()
    return [torch.randint(2, 400, (length,), generator=generator) for length in lengths]


def padded(texts: list[Tensor], side: str) -> dict[str, Any]:
    width = max(map(len, texts))
    ids = torch.ones(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        start = width - len(text) if side == "left" else 0
        ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def full_logits(model: nn.Module, texts: list[Tensor]) -> list[Tensor]:
    """Logits of all positions of each text, computed one by one without padding."""
    with torch.no_grad():
        return [model(input_ids=text[None]).logits[0] for text in texts]


def test_position_ids():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_scores_equal_full_logits(model: nn.Module, batch_size: int, side: str):
    texts = random_texts()
    expected = torch.stack([logits[-1, LETTER_IDS] for logits in full_logits(model, texts)])
    groups = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    with torch.no_grad():
        scores = torch.cat([candidate_scores(model, padded(x, side), LETTER_IDS) for x in groups])
    assert scores.shape == (16, 5)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_scores_follow_the_order_of_the_letters(model: nn.Module):
    batch = padded(random_texts(4), "left")
    with torch.no_grad():
        scores = candidate_scores(model, batch, LETTER_IDS)
        reverse = candidate_scores(model, batch, LETTER_IDS.flip(0))
        one = candidate_scores(model, batch, LETTER_IDS[2:3])
    torch.testing.assert_close(reverse, scores.flip(1))
    torch.testing.assert_close(one, scores[:, 2:3])


def test_output_layer_with_bias(tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    head = nn.Linear(64, 400)
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)
    texts = random_texts(3)
    with torch.no_grad():
        scores = candidate_scores(model, padded(texts, "left"), LETTER_IDS)
    expected = torch.stack([logits[-1, LETTER_IDS] for logits in full_logits(model, texts)])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_scores_have_float32_precision(tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        scores = candidate_scores(model, padded(random_texts(), "left"), torch.arange(2, 62))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize("target_modules", [("q_proj",), ("q_proj", "lm_head")])
def test_scores_with_adapters(tiny_llama: Path, target_modules: tuple[str, ...]):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = add_lora(base, rank=8, alpha=32, dropout=0.1, target_modules=target_modules).eval()
    texts = random_texts(4)
    batch = padded(texts, "left")
    with torch.no_grad():
        before = candidate_scores(model, batch, LETTER_IDS)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        scores = candidate_scores(model, batch, LETTER_IDS)
    assert (scores - before).abs().max() > 0.1
    expected = torch.stack([logits[-1, LETTER_IDS] for logits in full_logits(model, texts)])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


def training_batch(texts: list[Tensor], num_targets: list[int]) -> dict[str, Any]:
    """Left-padded texts, the last tokens of which are trained on."""
    batch = padded(texts, "left")
    width = max(num_targets)
    targets = batch["input_ids"][:, -width:].clone()
    for row, count in enumerate(num_targets):
        targets[row, : width - count] = IGNORE_INDEX
    return batch | {"targets": targets}


def test_loss_equals_stock(model: nn.Module):
    texts = random_texts()
    for num_targets in ([2] * 16, [len(text) - 1 for text in texts]):
        total = 0.0
        for text, count in zip(texts, num_targets):  # each text alone
            labels = text.clone()
            labels[:-count] = IGNORE_INDEX
            mean = model(input_ids=text[None], labels=labels[None]).loss.item()
            total += mean * count
        loss = response_loss(model, training_batch(texts, num_targets))
        assert loss.item() == pytest.approx(total / sum(num_targets), rel=1e-5)


def test_loss_over_the_letters(model: nn.Module):
    texts = random_texts(5)
    for text, letter in zip(texts, LETTER_IDS.flip(0)):
        text[-2] = letter
    loss = response_loss(model, training_batch(texts, [2] * 5), LETTER_IDS)
    prompts = [text[:-2] for text in texts]
    scores = candidate_scores(model, padded(prompts, "left"), LETTER_IDS)
    expected = nn.functional.cross_entropy(scores, torch.arange(5).flip(0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
