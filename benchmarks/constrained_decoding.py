"""Constrained decoding of LLM4IDRec against generation by transformers.

The plain way is ``generate`` with a logits processor that masks what the catalogue does not allow,
for 16 users at once with prompts of similar length, which was this project's own way up to commit
0923d00. Both ways bar the same items, and alternate. A round has users with prompts of similar
length, from the longest prompts in the first round to the shortest in the last.

In greedy mode both write the same texts up to rounding, for ``same_texts`` of the users. In
sampling mode their random numbers differ. ``read_s`` is the reading of the prompts alone, in the
plain way, and ``ended`` the share of texts that end before the limit. Seconds are per user. As more
users take the plain way proportionally longer, it is measured on ``--plain_users`` of a round.

Example:
    python -m benchmarks.constrained_decoding --adapter experiments/llm4idrec/ml-100k/adapter
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from augmentation.constraints import ItemText
from augmentation.generation import GeneratedText, build_catalogue, constrained_texts
from augmentation.prompts import GenerationPrompts, IdPrompts
from benchmarks.common import (
    DATASETS,
    Row,
    add_data_flags,
    add_device_flag,
    load_data,
    make_parser,
    report,
    run,
)
from benchmarks.language_models import add_model_flags, prepare
from config import AugmentationConfig
from dataloader.prompt_batches import pad_left
from model.language_model import add_lora, load_adapter, load_causal_lm

DEFAULTS = AugmentationConfig()
SAMPLING = {"temperature": DEFAULTS.temperature, "top_p": DEFAULTS.top_p}
TOP_K = {"greedy": 1, "sampling": 0}
PLAIN_BATCH = 16
Texts = dict[int, GeneratedText]


class CatalogueProcessor(LogitsProcessor):
    """Masks every token that the catalogue does not allow next. Use one for each batch.

    Args:
        texts: the texts of the rows, nothing written yet.
        prompt_length: tokens of the padded prompts.
    """

    def __init__(self, texts: Sequence[ItemText], prompt_length: int) -> None:
        self.texts, self.prompt_length = texts, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with minus infinity for tokens not allowed after ``input_ids`` (B, L)."""
        if input_ids.shape[1] > self.prompt_length:
            for text, token in zip(self.texts, input_ids[:, -1].tolist()):
                text.append(token)
        masked = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(self.texts):
            allowed = [text.catalogue.eos_id] if text.ended else text.allowed()
            masked[row, allowed] = scores[row, allowed]
        return masked


class Decoders:
    """The ways to write texts.

    Args:
        model: the language model.
        prompts: the prompt builder.
        batches: prompts of all users.
    """

    def __init__(self, model: Any, prompts: IdPrompts, batches: GenerationPrompts) -> None:
        self.model, self.prompts, self.batches = model, prompts, batches
        self.catalogue = build_catalogue(prompts)

    def _padded(self, users: np.ndarray) -> dict[str, Any]:
        batch = pad_left([self.batches.prompts[user] for user in users], self.prompts.eos_id)
        moved: dict[str, Any] = send_to_device(batch, self.model.device)
        return moved

    @torch.inference_mode()
    def read(self, users: np.ndarray) -> Texts:
        """Read the prompts alone, in the plain way."""
        self.model(**self._padded(users), use_cache=True, logits_to_keep=1)
        return {}

    @torch.inference_mode()
    def plain(self, users: np.ndarray, top_k: int) -> Texts:
        """Texts by ``generate``; greedy if ``top_k`` is 1."""
        batch = self._padded(users)
        texts = [ItemText(self.catalogue, self.batches.histories[user]) for user in users]
        is_greedy = top_k == 1
        output = self.model.generate(
            **batch,
            do_sample=not is_greedy,
            **({} if is_greedy else SAMPLING | {"top_k": top_k}),
            max_new_tokens=self.prompts.max_response_len,
            eos_token_id=self.prompts.eos_id,
            pad_token_id=self.prompts.eos_id,
            logits_processor=LogitsProcessorList(
                [CatalogueProcessor(texts, batch["input_ids"].shape[1])]
            ),
        )
        for text, token in zip(texts, output[:, -1].tolist()):  # which the processor has not seen
            text.append(token)
        return {
            user: GeneratedText(self.prompts.tokenizer.decode(text.tokens), text.ended)
            for user, text in zip(users.tolist(), texts)
        }

    @torch.inference_mode()
    def ours(self, users: np.ndarray, top_k: int) -> Texts:
        """Texts by this project's decoder."""
        return constrained_texts(
            self.model, self.prompts, self.batches, users, self.catalogue,
            seed=0, **SAMPLING, top_k=top_k,
        )  # fmt: skip


def timed(write: Callable[[np.ndarray], Texts], parts: Sequence[np.ndarray]) -> tuple[float, Texts]:
    """Seconds for all parts, and their texts. Reading these waits for a GPU."""
    texts: Texts = {}
    start = time.perf_counter()
    for users in parts:
        texts |= write(users)
    return time.perf_counter() - start, texts


def measure(
    decoders: Decoders, rounds: int, size: int, plain_size: int, modes: Sequence[str]
) -> Iterator[Row]:
    """Seconds per user in each round and mode, a single round in the middle of the lengths."""
    (ordered,) = decoders.batches.batches  # the longest prompts first
    size = min(size, len(ordered))
    plain_size = min(size, plain_size)
    starts = (np.arange(rounds) + 0.5) / rounds * (len(ordered) - size)
    for start in starts.astype(int):
        users = ordered[start : start + size]
        middle = users[(size - plain_size) // 2 :][:plain_size]
        parts = [middle[i : i + PLAIN_BATCH] for i in range(0, plain_size, PLAIN_BATCH)]
        read_s, _ = timed(decoders.read, parts)
        for mode in modes:
            top_k = TOP_K[mode]
            plain_s, plain = timed(partial(decoders.plain, top_k=top_k), parts)
            ours_s, ours = timed(partial(decoders.ours, top_k=top_k), [users])
            yield {
                "mode": mode,
                "users": size,
                "prompt_tokens": sum(len(decoders.batches.prompts[u]) for u in users) / size,
                "read_s": round(read_s / plain_size, 4),
                "plain_s": round(plain_s / plain_size, 4),
                "ours_s": round(ours_s / size, 4),
                "speedup": round(plain_s / plain_size / (ours_s / size), 2),
                "ended": sum(text.ended for text in ours.values()) / size,
                "same_texts": sum(ours[user] == plain[user] for user in plain) / plain_size,
            }


def measure_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure each model."""
    data, device = load_data(flags.dataset_code, flags), torch.device(flags.device)
    for name in flags.models:
        setup = prepare(name, device, flags.cache_root, flags.tokenizer)
        prompts = IdPrompts(
            setup.load_tokenizer(),
            num_users=data.num_users,
            num_items=data.num_items,
            eos_id=setup.eos_id,
            max_text_len=flags.llm_max_text_len,
            max_response_len=flags.max_new_tokens,
        )
        model = add_lora(
            load_causal_lm(setup.folder, device=device, in_4bit=setup.in_4bit),
            rank=DEFAULTS.lora_r,
            alpha=DEFAULTS.lora_alpha,
            dropout=DEFAULTS.lora_dropout,
            target_modules=DEFAULTS.lora_target_modules,
        ).eval()
        if flags.adapter:
            load_adapter(model, Path(flags.adapter))
        batches = GenerationPrompts(data, prompts, data.num_users)
        decoders = Decoders(model, prompts, batches)
        for row in measure(decoders, flags.rounds, flags.users, flags.plain_users, flags.modes):
            yield {"model": name} | row


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the flags select."""
    parser = make_parser(__doc__)
    add_data_flags(parser)
    add_model_flags(parser)
    add_device_flag(parser)
    parser.add_argument("--dataset_code", default="ml-100k", choices=DATASETS)
    parser.add_argument("--adapter", help="adapter of a run of augment_data.py; untuned if absent")
    parser.add_argument("--llm_max_text_len", type=int, default=DEFAULTS.llm_max_text_len)
    parser.add_argument("--max_new_tokens", type=int, default=DEFAULTS.max_new_tokens)
    parser.add_argument("--users", type=int, default=64, help="users per round (default: 64)")
    parser.add_argument("--plain_users", type=int, default=16, help="of these (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="lengths of prompts (default: 3)")
    parser.add_argument("--modes", nargs="+", default=list(TOP_K), choices=TOP_K)
    flags = parser.parse_args(argv)
    report("constrained_decoding", flags.device, measure_all(flags))


if __name__ == "__main__":
    run(main)
