"""The language model of ranker and augmentation: found on disk or on the hub, and checked.

Nothing here imports torch unless there is a CUDA driver, so that mistakes are reported at once.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from config import TOKENS_PER_BATCH, LanguageModelConfig
from errors import UserError, advice, flag_names
from model.hub import (
    LARGE_MODEL,
    SMALL_MODEL,
    BaseModel,
    cached_content_hash,
    check_fits,
    end_of_sequence,
    find_model,
    load_tokenizer,
)
from process import has_cuda_driver, use_cuda
from storage import read_json


class LanguageModel(NamedTuple):
    """A base model on disk and how to load it.

    Attributes:
        base: its files.
        revision: the hub's commit, or a hash of the folder's content.
        tokenizer_revision: likewise for the tokenizer.
        tokenizer: its tokenizer, or the one that the flags name.
        eos_id: token that ends a sequence.
        device: ``cpu`` or ``cuda``.
        in_4bit: whether the frozen weights are quantized to NF4.
        fused_kernels: whether to use Liger's kernels.
        max_tokens: maximum number of tokens per micro-batch in training.
        packs: whether prompts reach the model without padding, once it is loaded.
    """

    base: BaseModel
    revision: str
    tokenizer_revision: str
    tokenizer: Tokenizer
    eos_id: int
    device: str
    in_4bit: bool
    fused_kernels: bool
    max_tokens: int
    packs: bool = False

    @property
    def paged(self) -> bool:
        """Whether to use the paged optimizer of QLoRA."""
        return self.device == "cuda" and self.in_4bit

    def details(self) -> dict[str, Any]:
        """Resolved settings, for ``config.json`` and the fingerprint."""
        return {
            "device": self.device,
            "llm_base_model": self.base.name,
            "llm_revision": self.revision,
            "llm_tokenizer_revision": self.tokenizer_revision,
            "llm_load_in_4bit": self.in_4bit,
            "use_liger_kernel": self.fused_kernels,
            "tokens_per_batch": self.max_tokens,
        }


def find_language_model(
    config: LanguageModelConfig, large_model: str = LARGE_MODEL
) -> LanguageModel:
    """Find the model that the flags name, download it if needed, and check that it fits them.

    Args:
        config: all settings.
        large_model: the default on CUDA.

    Raises:
        UserError: there is no such model, it is incomplete, or it does not fit the flags.
    """
    # If CUDA is requested and absent, refuse before downloading anything large.
    device = "cuda" if _cuda_is_available(config) else "cpu"
    if config.use_liger_kernel:
        check_liger(device)
    name = config.llm_base_model or (large_model if device == "cuda" else SMALL_MODEL)
    if config.llm_base_model is None:
        print(f"base model: {name}, the default on {device}")
    with flag_names(name="llm_base_model"):
        base = _find(name, config)
    with (
        advice("name another tokenizer with --llm_base_tokenizer"),
        flag_names(name="llm_base_tokenizer"),
    ):
        source = base
        if config.llm_base_tokenizer:
            source = _find(config.llm_base_tokenizer, config, needs_weights=False)
        tokenizer = load_tokenizer(source.folder)
        eos_id = end_of_sequence(source.folder, tokenizer)
    with (
        advice("use another --llm_base_model or --llm_base_tokenizer"),
        flag_names(max_text_len="llm_max_text_len", target_modules="lora_target_modules"),
    ):
        check_fits(base, tokenizer, config.llm_max_text_len, config.lora_target_modules)
    cache_root = Path(config.cache_root)
    in_4bit, revision = config.llm_load_in_4bit, _revision(base, cache_root)
    return LanguageModel(
        base=base,
        revision=revision,
        tokenizer_revision=revision if source is base else _revision(source, cache_root),
        tokenizer=tokenizer,
        eos_id=eos_id,
        device=device,
        in_4bit=device == "cuda" if in_4bit is None else in_4bit,
        fused_kernels=use_liger(config.use_liger_kernel, device, base.folder),
        max_tokens=config.tokens_per_batch or TOKENS_PER_BATCH[device],
    )


def _revision(model: BaseModel, cache_root: Path) -> str:
    return model.revision or cached_content_hash(model.folder, cache_root)


def _cuda_is_available(config: LanguageModelConfig) -> bool:
    return config.device != "cpu" and has_cuda_driver() and use_cuda(config.device)


def _find(name: str, config: LanguageModelConfig, *, needs_weights: bool = True) -> BaseModel:
    return find_model(
        name,
        cache_root=config.cache_root,
        hub_cache=config.llm_cache_dir,
        needs_weights=needs_weights,
    )


def use_liger(flag: bool | None, device: str, folder: Path) -> bool:
    """Decide whether to use Liger's kernels, and print a note if they are used by default.

    Args:
        flag: the flag's value, None for auto.
        device: ``cpu`` or ``cuda``.
        folder: folder of the model.
    """
    if flag is not None or device != "cuda" or find_spec("liger_kernel") is None:
        return bool(flag)
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if read_json(folder / "config.json").get("model_type") not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    print("kernels of liger-kernel are used: --use_liger_kernel false leaves them out")
    return True


def check_liger(device: str) -> None:
    """Refuse Liger's kernels where they cannot work.

    Raises:
        UserError: the device is not CUDA, or the package is missing.
    """
    if device != "cuda":
        raise UserError("--use_liger_kernel: Liger's kernels need CUDA; leave out the flag")
    if find_spec("liger_kernel") is None:
        raise UserError("--use_liger_kernel needs a package: pip install liger-kernel")
