"""The language model that the ranker and the augmentation tune: found, checked, with adapters.

Nothing here imports torch before it must, so that mistakes answer at once.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import Tokenizer

from config import TOKENS_PER_BATCH, LanguageModelConfig, UserError, cuda_driver
from datasets import SequenceDataset
from model.hub import (
    LARGE_MODEL,
    SMALL_MODEL,
    BaseModel,
    check_fits,
    content_hash,
    end_of_sequence,
    find_model,
    load_tokenizer,
)
from storage import atomic_folder, reading

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from peft import PeftModel


class LanguageModel(NamedTuple):
    """A base model on disk and how it is to be loaded.

    Attributes:
        base: its files.
        revision: the hub's commit, or a hash of a folder, whose content may change under its name.
        tokenizer: its tokenizer, or the one asked for.
        eos_id: token that ends a sequence.
        device: ``cpu`` or ``cuda``.
        in_4bit: whether the frozen weights are quantised to NF4.
        max_tokens: most tokens that pass through it at once in training.
    """

    base: BaseModel
    revision: str
    tokenizer: Tokenizer
    eos_id: int
    device: str
    in_4bit: bool
    max_tokens: int

    @property
    def paged(self) -> bool:
        """Whether its optimizer may be bitsandbytes' paged one."""
        return self.device == "cuda" and self.in_4bit

    def details(self) -> dict[str, object]:
        """What shapes a run's results, for its ``config.json``."""
        return {
            "device": self.device,
            "llm_base_model": self.base.name,
            "llm_revision": self.revision,
            "llm_load_in_4bit": self.in_4bit,
            "tokens_per_batch": self.max_tokens,
        }


def find_language_model(config: LanguageModelConfig) -> LanguageModel:
    """Bring the model that the flags name to disk, and read its tokenizer.

    Raises:
        UserError: there is none, it lacks what it needs, or does not suit the flags.
    """
    on_cuda = config.device != "cpu" and cuda_driver()
    if on_cuda:
        from trainer.run import use_cuda

        on_cuda = use_cuda(config.device)  # refuses before anything large is downloaded
    device = "cuda" if on_cuda else "cpu"
    if config.use_liger_kernel:
        check_liger(device)
    name = config.llm_base_model or (LARGE_MODEL if on_cuda else SMALL_MODEL)
    if config.llm_base_model is None:
        print(f"base model: {name}, the default {'on CUDA' if on_cuda else 'without CUDA'}")
    where = {"cache_root": config.cache_root, "hub_cache": config.llm_cache_dir}
    base = tokenizer_from = find_model(name, **where)
    if config.llm_base_tokenizer:
        flag = "--llm_base_tokenizer"
        tokenizer_from = find_model(config.llm_base_tokenizer, **where, flag=flag)
    tokenizer = load_tokenizer(tokenizer_from.folder)
    check_fits(base, tokenizer, config.llm_max_text_len, config.lora_target_modules)
    return LanguageModel(
        base=base,
        revision=base.revision or content_hash(base.folder),
        tokenizer=tokenizer,
        eos_id=end_of_sequence(tokenizer_from.folder, tokenizer),
        device=device,
        in_4bit=on_cuda if config.llm_load_in_4bit is None else config.llm_load_in_4bit,
        max_tokens=config.tokens_per_batch or TOKENS_PER_BATCH[device],
    )


def check_examples(data: SequenceDataset) -> None:
    """Refuse data of which no training prompt can be made.

    Raises:
        UserError: nobody has a training item that follows another.
    """
    if not len(data.training_prefixes()[0]):
        raise UserError(f"{data.code}: no user has two training items, so there is no prompt")


def check_liger(device: str) -> None:
    """Answer at once where there can be no fused kernels.

    Raises:
        UserError: the package is missing, or the device is none it is made for.
    """
    if device != "cuda":
        raise UserError("--use_liger_kernel true: its kernels need CUDA; leave the flag out")
    if find_spec("liger_kernel") is None:
        raise UserError("--use_liger_kernel true: pip install liger-kernel first")


def load_with_adapters(
    language_model: LanguageModel, config: LanguageModelConfig, accelerator: Accelerator
) -> PeftModel:
    """Load the model, frozen, with fresh adapters.

    Raises:
        UserError: it cannot be loaded.
    """
    from model.ranker import add_lora, load_causal_lm, needs_checkpointing, recompute_activations

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


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapters in PEFT's format, whole or not at all."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put the adapters that ``save_adapter`` wrote into the model.

    Raises:
        UserError: they are missing or damaged.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = folder / "adapter_model.safetensors"
    with reading(weights, "start anew with --overwrite true"):
        set_peft_model_state_dict(model, load_file(weights, device=str(model.device)))
