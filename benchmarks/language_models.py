"""Language models and prompts of the ranker's benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from config import TOKENS_PER_BATCH, RankerConfig
from dataloader.prompt import PromptBuilder
from errors import UserError
from model.hub import SMALL_MODEL, end_of_sequence, find_model, load_tokenizer
from storage import atomic_folder

LARGE_SHAPE = "llama-2-7b"  # the shape that LlamaConfig has by default
NAMES = (SMALL_MODEL, LARGE_SHAPE)
NUM_CANDIDATES = 20
RANKER_DEFAULTS = RankerConfig()


class Setup(NamedTuple):
    """A language model on disk and how to load it; it can be sent to another process.

    Attributes:
        name: one of ``NAMES``.
        folder: folder of the model.
        tokenizer_folder: folder of the tokenizer.
        in_4bit: whether the weights are quantized to NF4.
        max_tokens: most tokens per micro-batch in training.
        num_parameters: number of weights without embeddings and output layer, which are those that
            every token is multiplied with.
    """

    name: str
    folder: Path
    tokenizer_folder: Path
    in_4bit: bool
    max_tokens: int
    num_parameters: int

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer from disk."""
        return load_tokenizer(self.tokenizer_folder)

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a sequence."""
        return end_of_sequence(self.tokenizer_folder, self.load_tokenizer())


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that select language models."""
    parser.add_argument("--models", nargs="+", default=[SMALL_MODEL], choices=NAMES)
    parser.add_argument("--tokenizer", help=f"folder of Llama 2's tokenizer, for {LARGE_SHAPE}")


def prepare(name: str, device: torch.device, cache_root: str, tokenizer: str | None) -> Setup:
    """Download a model, or create it: the large one has random weights.

    Args:
        name: one of ``NAMES``.
        device: device of the benchmark.
        cache_root: folder of models.
        tokenizer: folder of the large model's tokenizer.

    Raises:
        UserError: the model cannot be downloaded, or ``tokenizer`` is missing.
    """
    if name == SMALL_MODEL:
        folder = find_model(name, cache_root=cache_root, hub_cache=None).folder
        tokenizer_folder, in_4bit = folder, False
    else:
        if tokenizer is None:
            raise UserError(f"--tokenizer is missing: {name} needs the folder of its tokenizer")
        folder = Path(cache_root, f"{name}-random")
        tokenizer_folder, in_4bit = Path(tokenizer), device.type == "cuda"
        if not (folder / "config.json").is_file():
            _save_random_llama(folder, device)
    return Setup(
        name,
        folder,
        tokenizer_folder,
        in_4bit,
        TOKENS_PER_BATCH[device.type],
        _count_parameters(folder),
    )


def _save_random_llama(folder: Path, device: torch.device) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    print(f"creating random weights in {folder}", file=sys.stderr)
    torch.manual_seed(0)
    with torch.device(device):  # where random numbers are fast
        model = AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _count_parameters(folder: Path) -> int:
    """Count the weights without embeddings and output layer; does not load them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "embed" not in name and "head" not in name
    )


def build_prompts(setup: Setup, titles: Sequence[str], **limits: Any) -> PromptBuilder:
    """Make the prompt builder of the ranker's default settings with 20 candidates.

    Args:
        setup: the model.
        titles: title of each item; item 0 is padding.
        limits: ``max_title_len`` and ``max_text_len`` of ``PromptBuilder``, unless its defaults.
    """
    return PromptBuilder(
        setup.load_tokenizer(),
        titles,
        instruction=RANKER_DEFAULTS.llm_system_template,
        input_template=RANKER_DEFAULTS.llm_input_template,
        num_candidates=NUM_CANDIDATES,
        **limits,
    )
