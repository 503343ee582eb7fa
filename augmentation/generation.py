"""Sampling of further interactions for each user, and the file of the generated texts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel

from augmentation.constraints import Catalogue, ItemText
from augmentation.decoding import decode
from augmentation.prompts import GenerationPrompts, IdPrompts
from distributed import gather, in_main_process, rank, size
from errors import ArgumentError, InputError, UserError
from progress import ProgressBar
from storage import atomic_path, reading


class GeneratedText(NamedTuple):
    """What the language model generated for a user.

    Attributes:
        text: the text without the end-of-sequence token.
        ended: whether the model ended the text. If not, it can stop in the middle of a number.
    """

    text: str
    ended: bool


def read_texts(path: Path) -> dict[int, GeneratedText]:
    """Read the texts generated so far, by user; none if the file does not exist.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return {}
    with reading(path):
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return {int(r["user"]): GeneratedText(str(r["text"]), bool(r["ended"])) for r in records}


@in_main_process
def save_texts(path: Path, texts: dict[int, GeneratedText]) -> None:
    """Write a JSON object with ``user``, ``text`` and ``ended`` per line, ordered by user.

    Raises:
        UserError: the file cannot be written.
    """
    lines = (json.dumps({"user": user} | texts[user]._asdict()) + "\n" for user in sorted(texts))
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


@torch.inference_mode()
def generate(
    model: PeftModel,
    prompts: IdPrompts,
    batches: GenerationPrompts,
    texts: dict[int, GeneratedText],
    path: Path,
    *,
    constrained: bool,
    temperature: float,
    top_p: float,
    top_k: int = 0,
    seed: int,
    save_seconds: float,
    if_out_of_memory: str,
) -> dict[int, GeneratedText]:
    """Sample a text for each user; several processes share the batches.

    Each batch, or with ``constrained`` each user, has its own random seed, so that an interrupted
    run resumes to the same texts. The file is also written on an exception.

    Args:
        model: the tuned model in eval mode.
        prompts: the prompt builder, which limits the length of a response.
        batches: prompts of all users.
        texts: texts generated so far; batches whose users all have one are skipped.
        path: file of the texts.
        constrained: whether to sample only items of the catalogue that are not in the user's
            training history, each at most once.
        temperature: softmax temperature.
        top_p: probability mass of nucleus sampling.
        top_k: number of tokens to sample from; 0 for no limit.
        seed: random seed.
        save_seconds: minimum time between two writes of the file.
        if_out_of_memory: advice in the error message when GPU memory is exhausted.

    Returns:
        Texts of all users.

    Raises:
        ArgumentError: ``constrained`` is set, and the tokenizer makes item numbers ambiguous.
        UserError: the GPU is out of memory, or the file cannot be written.
    """
    catalogue = build_catalogue(prompts) if constrained else None
    texts, saved_at = dict(texts), time.monotonic()
    num_users = sum(map(len, batches.batches))
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}

    def sample(index: int) -> dict[int, GeneratedText]:
        if catalogue:
            users = batches.batches[index]
            return constrained_texts(
                model, prompts, batches, users, catalogue, seed=seed, **options
            )
        batch_seed = int(np.random.default_rng([seed, index]).integers(1 << 62))
        return _sample_batch(model, prompts, *batches[index], batch_seed, **options)

    waiting = [
        index
        for index, users in enumerate(batches.batches)
        if not all(user in texts for user in users)
    ]
    try:
        with ProgressBar(total=num_users, initial=len(texts), desc="generate", unit="user") as bar:
            for start in range(0, len(waiting), size()):
                turn = waiting[start : start + size()]
                own = sample(turn[rank()]) if rank() < len(turn) else {}
                for new in gather(own):
                    texts |= new
                    bar.update(len(new))
                if time.monotonic() - saved_at > save_seconds:
                    save_texts(path, texts)
                    saved_at = time.monotonic()
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU is out of memory: {if_out_of_memory}") from error
    finally:  # also on Ctrl-C
        save_texts(path, texts)
    return texts


def build_catalogue(prompts: IdPrompts) -> Catalogue:
    """Build the prefix trees of the items' tokens.

    Raises:
        ArgumentError: the tokenizer makes item numbers ambiguous; names ``constrained``.
    """
    try:
        return Catalogue(prompts.first_items, prompts.later_items, prompts.eos_id)
    except InputError as error:
        raise ArgumentError("constrained", True, str(error)) from error


def constrained_texts(
    model: PeftModel,
    prompts: IdPrompts,
    batches: GenerationPrompts,
    users: np.ndarray,
    catalogue: Catalogue,
    *,
    seed: int,
    **options: Any,
) -> dict[int, GeneratedText]:
    """Sample texts of new items for some users; ``options`` are those of ``decode``."""
    texts = [ItemText(catalogue, batches.histories[user]) for user in users]
    size = prompts.max_response_len
    uniforms = np.stack([np.random.default_rng([seed, user]).random(size) for user in users])
    decode(model, [batches.prompts[user] for user in users], texts, uniforms, **options)
    return {
        user: GeneratedText(prompts.tokenizer.decode(text.tokens), text.ended)
        for user, text in zip(users.tolist(), texts)
    }


def _sample_batch(
    model: PeftModel,
    prompts: IdPrompts,
    users: np.ndarray,
    batch: dict[str, Any],
    seed: int,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> dict[int, GeneratedText]:
    """Sample texts of any tokens for the users of a batch."""
    prompt_length = batch["input_ids"].shape[1]
    torch.manual_seed(seed)
    output = model.generate(
        **send_to_device(batch, model.device),
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=prompts.max_response_len,
        eos_token_id=prompts.eos_id,
        pad_token_id=prompts.eos_id,
    )
    texts = {}
    for user, tokens in zip(users.tolist(), output[:, prompt_length:].tolist()):
        ended = prompts.eos_id in tokens
        if ended:
            tokens = tokens[: tokens.index(prompts.eos_id)]
        text = prompts.tokenizer.decode(tokens, skip_special_tokens=False)
        texts[user] = GeneratedText(text, ended)
    return texts
