"""What decides how a language model is trained on a device."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from config import RankerConfig
from errors import UserError
from model.language_model import add_lora, load_causal_lm, measure
from model.packing import pack_prompts
from recipes.language_model import find_language_model
from recipes.tuning import FIXED_TOKENS, batch_limits, check_memory, fit_memory

TARGETS = ("q_proj", "v_proj")


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_of_a_model_that_packs(tiny_llama: Path, packed: bool):
    config = RankerConfig(dataset_code="games", llm_base_model=str(tiny_llama), device="cpu")
    causal_lm = load_causal_lm(tiny_llama, device=torch.device("cpu"), in_4bit=False)
    if packed:  # as on CUDA
        causal_lm.set_attn_implementation("sdpa")
        pack_prompts(causal_lm)
    model = add_lora(causal_lm, rank=4, alpha=8, dropout=0.0, target_modules=("q_proj",))
    language_model = find_language_model(config)
    assert not batch_limits(config, language_model).packed  # not known before it is loaded
    fitted = fit_memory(model, language_model, config)
    assert batch_limits(config, fitted) == (16, 1024, FIXED_TOKENS["cpu"], packed)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, "--llm_base_model tiny-llama: its weights take at least"),
        ((0, 0), "--lora_r 8: training 3,584 weights takes at least"),
        ((3, 50), "--tokens_per_batch 1024: training on 150 tokens at once takes at least"),
        ((1, 99), "--llm_max_text_len 1536: training on 99 tokens at once takes at least"),
    ],
)
def test_what_cannot_fit_in_memory_is_refused(
    optimizer: str,
    shape: tuple[int, int] | None,
    message: str,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    config = RankerConfig(
        dataset_code="games", llm_base_model=str(tiny_llama), device="cpu", optimizer=optimizer
    )
    sizes = measure(tiny_llama, rank=8, target_modules=TARGETS)
    needed, step = 2 * sizes.weights, []
    if shape is not None:
        needed += {"AdamW": 16, "SGD": 8}[optimizer] * sizes.adapters
        needed += 2 * sizes.inputs * shape[0] * shape[1]
        step = [{"input_ids": torch.zeros(n, shape[1])} for n in range(1, shape[0] + 1)]
    language_model = find_language_model(config)
    monkeypatch.setattr("recipes.tuning.free_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=re.escape(message)):
        check_memory(language_model, config, step)
    check_memory(language_model._replace(device="cuda"), config, step)  # torch reports it
    if shape is not None:
        monkeypatch.setattr("recipes.tuning.free_memory", lambda: needed)
        check_memory(language_model, config, step)


@pytest.mark.parametrize(("in_4bit", "share"), [(False, 0.0), (True, 0.5)])
def test_weights_that_are_read_from_their_file_take_no_memory(
    in_4bit: bool, share: float, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load_causal_lm(tiny_llama, device=torch.device("cpu"), in_4bit=False).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    flags: dict[str, Any] = {"llm_base_model": str(tmp_path), "llm_load_in_4bit": in_4bit}
    config = RankerConfig(dataset_code="games", device="cpu", **flags)
    language_model = find_language_model(config)
    sizes = measure(tmp_path, rank=8, target_modules=TARGETS)
    needed = share * sizes.weights + 16 * sizes.adapters
    monkeypatch.setattr("recipes.tuning.free_memory", lambda: needed)
    check_memory(language_model, config)
    monkeypatch.setattr("recipes.tuning.free_memory", lambda: needed - 1)
    with pytest.raises(UserError, match="--lora_r 8: "):
        check_memory(language_model, config)
