"""The ranker's language model: stock Hugging Face causal LM, NF4 weights, LoRA adapters.

T. Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023
(https://arxiv.org/abs/2305.14314); E. Hu et al., LoRA: Low-Rank Adaptation of Large Language
Models, ICLR 2022 (https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from config import UserError


def load_causal_lm(folder: Path, *, device: torch.device, in_4bit: bool) -> PreTrainedModel:
    """Load a causal LM with bfloat16 weights, or NF4 with double quantisation (QLoRA).

    Args:
        folder: the model's files.
        device: where the weights go.
        in_4bit: quantise the linear layers to NF4, computing in bfloat16.

    Raises:
        UserError: the folder holds no causal LM that can be loaded.
    """
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map={"": device},
            quantization_config=quantisation if in_4bit else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--llm_base_model: cannot load {folder}: {reason}") from error
    # On CPUs with AVX512-BF16, bitsandbytes repacks NF4 weights at the first evaluation into a
    # layout that has no backward pass: training that goes on would silently lose gradients.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str],
    gradient_checkpointing: bool,
) -> PeftModel:
    """Freeze the model and put trainable low-rank adapters beside its projections.

    Args:
        model: causal LM.
        rank: rank of the adapters.
        alpha: their scale is alpha / rank.
        dropout: on the adapters' input.
        target_modules: names of the projections.
        gradient_checkpointing: recompute activations in the backward pass to save memory.

    Raises:
        UserError: the model has no such modules.
    """
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapters = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapters)
    except ValueError as error:
        names = {
            name.rsplit(".", 1)[-1] for name, m in model.named_modules() if not [*m.children()]
        }
        raise UserError(
            f"--lora_target_modules {' '.join(target_modules)}: not all in this model, which has "
            + ", ".join(sorted(names))
        ) from error
