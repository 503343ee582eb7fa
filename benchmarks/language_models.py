"""Language models that the ranker's benchmarks measure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from config import TOKENS_PER_BATCH, UserError
from model.hub import SMALL_MODEL, end_of_sequence, find_model, load_tokenizer
from storage import atomic_folder

LARGE_SHAPE = "llama-2-7b"  # LlamaConfig's defaults are its shape
NAMES = (SMALL_MODEL, LARGE_SHAPE)


class Setup(NamedTuple):
    """What a benchmark needs of a model; it can be sent to another process.

    Attributes:
        name: one of ``NAMES``.
        folder: the model's files.
        tokenizer_folder: the tokenizer's files.
        in_4bit: whether weights are quantised to NF4.
        max_tokens: most tokens in memory at once in training.
        num_parameters: weights that every token is multiplied with: all but the embeddings.
    """

    name: str
    folder: Path
    tokenizer_folder: Path
    in_4bit: bool
    max_tokens: int
    num_parameters: int

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read anew."""
        return load_tokenizer(self.tokenizer_folder)

    @property
    def eos_id(self) -> int:
        """Token that ends a sequence."""
        return end_of_sequence(self.tokenizer_folder, self.tokenizer)


def prepare(name: str, device: torch.device, cache_root: Path, tokenizer: str | None) -> Setup:
    """Bring a model to disk; the large shape gets random weights, made on the device.

    Raises:
        UserError: the large shape has no tokenizer.
    """
    on_cuda = device.type == "cuda"
    if name == SMALL_MODEL:
        folder = find_model(name, cache_root=str(cache_root), hub_cache=None).folder
        tokenizer_folder, in_4bit = folder, False
    else:
        if tokenizer is None:
            raise UserError(f"--tokenizer is missing: {name} needs the folder of its tokenizer")
        folder, tokenizer_folder, in_4bit = cache_root / f"{name}-random", Path(tokenizer), on_cuda
        if not (folder / "config.json").is_file():
            _save_random_llama(folder, device)
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    count = sum(
        p.numel() for n, p in shape.named_parameters() if "embed" not in n and "head" not in n
    )
    return Setup(name, folder, tokenizer_folder, in_4bit, TOKENS_PER_BATCH[device.type], count)


def _save_random_llama(folder: Path, device: torch.device) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    print(f"making random weights in {folder}", file=sys.stderr)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
