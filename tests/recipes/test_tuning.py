"""What decides how a language model is trained on a device."""

from pathlib import Path

import pytest
import torch

from config import RankerConfig
from model.language_model import add_lora, load_causal_lm
from model.packing import pack_prompts
from recipes.language_model import find_language_model
from recipes.tuning import FIXED_TOKENS, batch_limits, fit_memory


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
