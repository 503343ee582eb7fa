"""What ranker and augmentation share: the language model with adapters, its training loop."""

from __future__ import annotations

import warnings

from accelerate import Accelerator
from peft import PeftModel

from config import LanguageModelConfig
from errors import flag_names
from model.language_model import (
    add_lora,
    load_causal_lm,
    needs_checkpointing,
    recompute_activations,
)
from recipes.language_model import LanguageModel
from recipes.runs import FROM_SCRATCH
from trainer.loop import Advice


def load_with_adapters(
    language_model: LanguageModel, config: LanguageModelConfig, accelerator: Accelerator
) -> PeftModel:
    """Load the frozen model and add new adapters.

    Raises:
        UserError: the model cannot be loaded.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with flag_names(
        folder="llm_base_model",
        fused_kernels="use_liger_kernel",
        target_modules="lora_target_modules",
    ):
        causal_lm = load_causal_lm(
            language_model.base.folder,
            device=accelerator.device,
            in_4bit=language_model.in_4bit,
            fused_kernels=config.use_liger_kernel,
        )
        model = add_lora(
            causal_lm,
            rank=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
        )
    recompute = config.gradient_checkpointing == "true"
    if config.gradient_checkpointing == "auto":
        recompute = needs_checkpointing(model, language_model.max_tokens)
    if recompute:
        recompute_activations(model)
    return model


def tuning_advice(language_model: LanguageModel) -> Advice:
    """What the user can do about failures of the training loop."""
    return Advice(
        diverged=f"{FROM_SCRATCH} and a lower --lora_lr",
        out_of_memory="continue with --resume and a lower --tokens_per_batch than "
        f"{language_model.max_tokens:,}",
        out_of_memory_in_validation="continue with --resume and a lower --val_batch_size",
    )
