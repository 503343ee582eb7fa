"""Sampling what the tuned model would add to each user's list, in batches with a KV cache."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from augmentation.prompts import GenerationPrompts, IdPrompts
from config import UserError
from storage import atomic_path, reading


class Written(NamedTuple):
    """What the model wrote for a user.

    Attributes:
        text: without the end of the sequence.
        ended: whether the model ended it; what it did not may stop in the middle of a number.
    """

    text: str
    ended: bool


class Catalogue:
    """The texts of any number of items as a finite automaton over tokens.

    A prefix tree of the items' tokens; after a whole item the next one may begin, or the text end.

    Args:
        items: items[i] is item i's tokens; items[0] is no item.
        eos_id: token that ends the text.

    Raises:
        UserError: with this tokenizer the tokens do not tell where an item ends.
    """

    START = 0
    END = -1

    def __init__(self, items: Sequence[np.ndarray], eos_id: int) -> None:
        self.eos_id = eos_id
        children: list[dict[int, int]] = [{}]
        whole = set()
        for tokens in items[1:]:
            node = self.START
            for token in tokens.tolist():
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                node = children[node][token]
            whole.add(node)
        first = children[self.START]
        for node in whole:
            if first.keys() & children[node].keys():
                raise UserError(
                    "--constrained true: with this tokenizer a number's tokens do not show where "
                    "the number ends; leave it out or name another --llm_base_model"
                )
            children[node] = children[node] | first | {eos_id: self.END}
        self._next = children
        self._allowed = [np.fromiter(x, dtype=np.int64, count=len(x)) for x in children]

    def allowed(self, state: int) -> np.ndarray:
        """Tokens that may come next."""
        return self._allowed[state] if state != self.END else np.array([self.eos_id])

    def step(self, state: int, token: int) -> int:
        """The state after one of the allowed tokens."""
        return self._next[state][token] if state != self.END else self.END


class CatalogueProcessor(LogitsProcessor):
    """Lets nothing be sampled but items of the catalogue and the end after a whole one.

    Args:
        catalogue: the items.
        prompt_length: tokens of a row before what is written.
    """

    def __init__(self, catalogue: Catalogue, prompt_length: int) -> None:
        self.catalogue, self.prompt_length = catalogue, prompt_length
        self.states: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Minus infinity for every token (B, V) that is not allowed after ``input_ids`` (B, L)."""
        if input_ids.shape[1] == self.prompt_length:
            self.states = [Catalogue.START] * len(input_ids)
        else:
            last = input_ids[:, -1].tolist()
            self.states = [self.catalogue.step(*pair) for pair in zip(self.states, last)]
        allowed = [self.catalogue.allowed(state) for state in self.states]
        rows = np.repeat(np.arange(len(allowed)), [len(tokens) for tokens in allowed])
        places = (torch.from_numpy(rows), torch.from_numpy(np.concatenate(allowed)))
        places = tuple(place.to(scores.device) for place in places)
        masked = torch.full_like(scores, -torch.inf)
        masked[places] = scores[places]
        return masked


def read_written(path: Path) -> dict[int, Written]:
    """What has been written so far, by user; nothing if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return {}
    with reading(path, "delete it, and --resume true writes it anew"):
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return {int(r["user"]): Written(str(r["text"]), bool(r["ended"])) for r in records}


def save_written(path: Path, written: dict[int, Written]) -> None:
    """Write ``generated.jsonl``, a line a user in their order."""
    lines = (
        json.dumps({"user": user} | written[user]._asdict()) + "\n" for user in sorted(written)
    )
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


@torch.inference_mode()
def write_interactions(
    model: PreTrainedModel,
    prompts: IdPrompts,
    batches: GenerationPrompts,
    written: dict[int, Written],
    path: Path,
    *,
    constrained: bool,
    temperature: float,
    top_p: float,
    seed: int,
    save_seconds: float,
    if_memory: str,
) -> dict[int, Written]:
    """Sample a continuation for every user.

    What a user gets depends on the seed and the batch alone, so that an interrupted run goes on
    as if nothing had happened.

    Args:
        model: the tuned model, in eval mode.
        prompts: builds the prompts, and tells how long an answer may be.
        batches: prompts of all users.
        written: what there is already; these users are left alone.
        path: where all texts are kept.
        constrained: whether nothing but items of the catalogue may be written.
        temperature: of the sampling.
        top_p: probability of the likeliest tokens that are sampled among.
        seed: of the sampling.
        save_seconds: at most this long between two savings.
        if_memory: what the user can do when the GPU's memory is full.
    """
    catalogue = Catalogue(prompts.items, prompts.eos_id) if constrained else None
    written = dict(written)
    saved_at = time.monotonic()
    users = sum(map(len, batches.batches))
    model.generation_config.pad_token_id = prompts.eos_id
    try:
        with tqdm(total=users, initial=len(written), desc="write", unit="user") as bar:
            for number, batch_users in enumerate(batches.batches):
                if all(user in written for user in batch_users):
                    continue
                written |= _write_batch(
                    model, prompts, *batches[number], catalogue, temperature, top_p, [seed, number]
                )
                bar.update(len(batch_users))
                if time.monotonic() - saved_at > save_seconds:
                    save_written(path, written)
                    saved_at = time.monotonic()
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full: {if_memory}") from error
    finally:  # Ctrl-C included
        save_written(path, written)
    return written


def _write_batch(
    model: PreTrainedModel,
    prompts: IdPrompts,
    users: np.ndarray,
    batch: dict[str, Any],
    catalogue: Catalogue | None,
    temperature: float,
    top_p: float,
    seeds: list[int],
) -> dict[int, Written]:
    """Continuations of one batch."""
    length = batch["input_ids"].shape[1]
    constraints = [CatalogueProcessor(catalogue, length)] if catalogue else []
    torch.manual_seed(int(np.random.default_rng(seeds).integers(1 << 62)))
    output = model.generate(
        **send_to_device(batch, model.device),
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=prompts.max_answer_len,
        eos_token_id=prompts.eos_id,
        logits_processor=LogitsProcessorList(constraints),
    )
    found = {}
    for user, tokens in zip(users.tolist(), output[:, length:].tolist()):
        ended = prompts.eos_id in tokens
        kept = tokens[: tokens.index(prompts.eos_id)] if ended else tokens
        found[user] = Written(prompts.tokenizer.decode(kept, skip_special_tokens=False), ended)
    return found
