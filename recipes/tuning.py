"""What ranker and augmentation share: the language model with adapters, its training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

from accelerate import Accelerator
from peft import PeftModel

from config import LanguageModelConfig
from dataloader.prompt_batches import Batch, BatchLimits
from distributed import largest, smallest
from errors import UserError, flag_names
from model.hub import stored_dtypes
from model.language_model import (
    add_lora,
    dequantize,
    load_causal_lm,
    measure,
    plan_activations,
    recompute_activations,
)
from model.packing import packs
from model.sharding import shard_weights
from process import free_memory
from recipes.language_model import LanguageModel
from recipes.runs import FROM_SCRATCH
from recipes.training import training_bytes
from trainer.loop import Advice

GIB = 2**30
LEAST_TOKENS = 2048  # below this, micro-batches on CUDA are too small to be efficient
# Fixed cost of a micro-batch in tokens. On CUDA, launching its kernels takes 0.2 s, in which
# Llama-2-7B processes 3,600 tokens on an H100, and smaller models more.
FIXED_TOKENS = {"cpu": 128, "cuda": 4096}


def check_memory(
    language_model: LanguageModel, config: LanguageModelConfig, step: Sequence[Batch] = ()
) -> None:
    """Refuse on the CPU what cannot fit in memory, before the system ends the run.

    On CUDA, torch reports it. The estimate is a lower bound: the weights, except those stored in
    bfloat16, which are mapped from their file and read as needed; the adapters with gradients and
    optimizer state; and the inputs of the adapted layers for the largest micro-batch.

    Args:
        language_model: the base model.
        config: all settings.
        step: micro-batches of an optimizer step, if they are known.

    Raises:
        UserError: the run takes more memory than is free.
    """
    if language_model.device != "cpu":
        return
    (name, folder, _), in_4bit = language_model.base, language_model.in_4bit
    with flag_names(folder="llm_base_model", target_modules="lora_target_modules"):
        sizes = measure(folder, rank=config.lora_r, target_modules=config.lora_target_modules)
    is_mapped = not in_4bit and "BF16" in stored_dtypes(folder)
    rows, length = max((x["input_ids"].shape for x in step), key=math.prod, default=(0, 0))
    widest = f"--tokens_per_batch {language_model.max_tokens}"
    if rows == 1:
        widest = f"--llm_max_text_len {config.llm_max_text_len}"
    free, needed = free_memory(), 0.0
    for flag, what, size in (
        (
            f"--llm_base_model {name}",
            "its weights take",
            0.0 if is_mapped else (0.5 if in_4bit else 2.0) * sizes.weights,
        ),
        (
            f"--lora_r {config.lora_r}",
            f"training {sizes.adapters:,} weights takes",
            training_bytes(sizes.adapters, config),
        ),
        (
            widest,
            f"training on {rows * length:,} tokens at once takes",
            2.0 * sizes.inputs * rows * length,
        ),
    ):
        needed += size
        if needed > free:
            beside = f", {needed / GIB:,.1f} GiB with everything else" if needed > size else ""
            raise UserError(
                f"{flag}: {what} at least {size / GIB:,.1f} GiB{beside}, and {free / GIB:,.1f} GiB "
                "are free: use a smaller one"
            )


def load_with_adapters(
    language_model: LanguageModel,
    config: LanguageModelConfig,
    accelerator: Accelerator,
    *,
    sharded: bool = False,
) -> PeftModel:
    """Load the frozen model and add new adapters.

    Args:
        language_model: the base model.
        config: all settings.
        accelerator: holds the device.
        sharded: whether to split the frozen weights among the processes.

    Raises:
        UserError: the model cannot be loaded.
    """
    with flag_names(
        folder="llm_base_model",
        fused_kernels="use_liger_kernel",
        target_modules="lora_target_modules",
        shard_weights="llm_shard_weights",
    ):
        causal_lm = load_causal_lm(
            language_model.base.folder,
            device=accelerator.device,
            in_4bit=language_model.in_4bit,
            fused_kernels=language_model.fused_kernels,
            on_host=sharded,
        )
        if language_model.in_4bit and config.llm_dequantize:
            dequantize(causal_lm)
        model = add_lora(
            causal_lm,
            rank=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
        )
        if sharded:
            shard_weights(model, accelerator.device)
    return model


def fit_memory(
    model: PeftModel, language_model: LanguageModel, config: LanguageModelConfig
) -> LanguageModel:
    """Decide how to make the activations of a micro-batch fit in memory.

    On CUDA, micro-batches become smaller unless the flags set their size. Activations are
    recomputed instead if micro-batches would become too small to be efficient, and on the CPU,
    where their size, and thus rounding, must not depend on what else the machine does.

    Args:
        model: the model, on its device.
        language_model: its description.
        config: all settings.

    Returns:
        The description with the tokens per micro-batch that fit, and whether prompts are packed.
    """
    max_tokens, recompute = language_model.max_tokens, config.gradient_checkpointing == "true"
    if config.gradient_checkpointing == "auto":
        may_shrink = language_model.device == "cuda" and config.tokens_per_batch is None
        least = max(LEAST_TOKENS, config.llm_max_text_len) if may_shrink else max_tokens
        max_tokens, recompute = plan_activations(model, max_tokens, least)
        # All processes must do the same, in particular where they share the weights.
        max_tokens, recompute = smallest(max_tokens), bool(largest(recompute))
    if recompute:
        recompute_activations(model)
    return language_model._replace(max_tokens=max_tokens, packs=packs(model.get_base_model()))


def batch_limits(config: LanguageModelConfig, language_model: LanguageModel) -> BatchLimits:
    """Limits on the size of micro-batches in training."""
    return BatchLimits(
        max_rows=config.lora_micro_batch_size or config.train_batch_size,
        max_tokens=language_model.max_tokens,
        fixed_tokens=FIXED_TOKENS[language_model.device],
        packed=language_model.packs,
    )


def tuning_advice(language_model: LanguageModel) -> Advice:
    """What the user can do about failures of the training loop."""
    return Advice(
        diverged=f"{FROM_SCRATCH} and a lower --lora_lr",
        out_of_memory="continue with --resume and a lower --tokens_per_batch than "
        f"{language_model.max_tokens:,}",
        out_of_memory_in_validation="continue with --resume and a lower --val_batch_size",
    )
