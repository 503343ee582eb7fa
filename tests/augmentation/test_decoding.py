"""The decoder against transformers: the same greedy texts, the same distribution of tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from augmentation import decoding
from augmentation.decoding import fitting_tokens, read, sample
from augmentation.generation import GeneratedText, build_catalogue, constrained_texts
from augmentation.prompts import GenerationPrompts, IdPrompts
from benchmarks.constrained_decoding import Decoders
from datasets import SequenceDataset
from model.cpu_attention import speed_up_on_cpu
from tests.augmentation.helpers import make_prompts, make_published_prompts

GREEDY = {"temperature": 1.0, "top_p": 0.9, "top_k": 1}
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "top_k": 0}


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> PreTrainedModel:
    """The tiny Llama in float32, with the attention that the scripts use."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    speed_up_on_cpu(model)
    return model


@torch.inference_mode()
def texts_of(
    model: PreTrainedModel, builder: IdPrompts, data: SequenceDataset, size: int, options: dict
) -> dict[int, GeneratedText]:
    """Texts of all users, ``size`` at once."""
    catalogue, batches = build_catalogue(builder), GenerationPrompts(data, builder, size)
    texts: dict[int, GeneratedText] = {}
    for users in batches.batches:
        texts |= constrained_texts(model, builder, batches, users, catalogue, seed=3, **options)
    return texts


@pytest.mark.parametrize("make", [make_prompts, make_published_prompts])
def test_greedy_texts_equal_those_of_transformers(
    make: Callable[..., IdPrompts],
    model: PreTrainedModel,
    prompts: IdPrompts,
    data: SequenceDataset,
):
    builder = make(prompts.tokenizer, data, max_response_len=30)
    batches = GenerationPrompts(data, builder, 7)
    decoders = Decoders(model, builder, batches)
    expected: dict[int, GeneratedText] = {}
    for users in batches.batches:
        expected |= decoders.plain(users, top_k=1)
    assert texts_of(model, builder, data, 7, GREEDY) == expected
    assert len({text.text for text in expected.values()}) > 5


def test_texts_do_not_depend_on_their_batch(
    model: PreTrainedModel, prompts: IdPrompts, data: SequenceDataset
):
    builder = make_prompts(prompts.tokenizer, data, max_response_len=40)
    texts = texts_of(model, builder, data, 25, SAMPLING)
    assert texts_of(model, builder, data, 4, SAMPLING) == texts
    lengths = {len(text.text) for text in texts.values()}
    assert len(lengths) > 5  # so that texts were dropped while others went on


def test_prompts_of_equal_length_are_read_together(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    lengths, shapes, compute = [3, 5, 3, 5, 5, 4], [], decoding._hidden

    def record(causal_lm: PreTrainedModel, input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        shapes.append(input_ids.shape)
        return compute(causal_lm, input_ids, *rest)

    monkeypatch.setattr(decoding, "READ_TOKENS", 10)
    monkeypatch.setattr(decoding, "_hidden", record)
    torch.manual_seed(0)
    prompts = [torch.randint(model.config.vocab_size, (1, length)) for length in lengths]
    with torch.inference_mode():
        hidden, cache = read(model, prompts, room=2)
        assert sorted(shapes) == [(1, 4), (1, 5), (2, 3), (2, 5)]
        for row, prompt in enumerate(prompts):
            own_hidden, own_cache = read(model, [prompt], room=2)
            torch.testing.assert_close(hidden[row], own_hidden[0])
            for layer, own in zip(cache.layers, own_cache.layers):
                for name in ("keys", "values"):
                    states = getattr(layer, name)[row, :, 5 - lengths[row] : 5]
                    torch.testing.assert_close(states, getattr(own, name)[0, :, : lengths[row]])


@pytest.mark.parametrize("top_k", [0, 1, 4])
def test_samples_follow_the_distribution_of_transformers(top_k: int):
    torch.manual_seed(0)
    logits, allowed = torch.randn(1, 12) * 2, torch.rand(1, 12) > 0.3
    scores = logits.masked_fill(~allowed, -torch.inf)
    input_ids = torch.zeros(1, 1, dtype=torch.int64)
    warpers = [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)]
    if top_k:
        warpers.insert(1, TopKLogitsWarper(top_k))
    for warper in warpers:
        scores = warper(input_ids, scores)
    # Evenly spaced random numbers draw each token as often as its probability says.
    size = 10_000
    uniforms = torch.from_numpy((np.arange(size) + 0.5) / size)
    chosen = sample(
        logits.expand(size, -1), allowed.expand(size, -1), uniforms,
        temperature=0.8, top_p=0.9, top_k=top_k,
    )  # fmt: skip
    shares = torch.bincount(chosen, minlength=12) / size
    assert torch.allclose(shares, scores.softmax(-1)[0], atol=2 / size)


def test_fitting_tokens(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    # 2 layers, 2 key heads of width 16, keys and values in float32
    monkeypatch.setattr("augmentation.decoding.CPU_BYTES", 7 * 2 * 2 * 16 * (4 + 4))
    assert fitting_tokens(model) == 7
