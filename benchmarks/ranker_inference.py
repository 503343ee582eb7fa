"""One forward pass per user against generating the ranking (LlamaRec, figure 3).

The generating ranker reads the prompt with letters and generates titles greedily with a key-value
cache, until the response is as long as the titles of all candidates. Against it, one forward pass
scores the letters (``letters_s``) or the titles as plain text (``titles_s``). All rank 20
candidates after 10 history items, one user at a time, and alternate in one process; times are
medians over users. Titles are random words, of the length that the flag gives.

``batched`` has the users per second of both ways of scoring with several users in a batch, and
``floor_share``: the time of the arithmetic alone (2 x parameters x tokens, at the rate of a large
bfloat16 matrix product measured here) over ours.

Example:
    python -m benchmarks.ranker_inference --figure experiments/ranker_inference.png
    python -m benchmarks.ranker_inference --device cuda --models smollm2-135m llama-2-7b \\
        --tokenizer path/to/llama-2
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from benchmarks.common import (
    Row,
    add_device_flag,
    make_parser,
    matmul_rate,
    report,
    run,
    seconds,
)
from benchmarks.language_models import (
    NUM_CANDIDATES,
    Setup,
    add_model_flags,
    build_prompts,
    prepare,
)
from dataloader.prompt_batches import pad_left
from dataloader.title_batches import PADDING_BRANCH, branch_batch
from dataloader.title_prompt import TitlePrompts
from model.language_model import dequantize, load_causal_lm
from model.title_likelihood import title_scores
from model.verbalizer import candidate_scores
from storage import atomic_path

NUM_HISTORY, NUM_TITLES = 10, 200
MAX_TEXT_LEN = 4096
SCORING_REPEATS = 3  # per user, as it is the shorter of the two
USERS_FOR_LENGTH = 10  # users over which the length of the response is averaged
WAYS = ("generation", "letters", "titles")
WORDS = ("the", "story", "of", "a", "long", "night", "river", "city", "garden", "winter", "king")


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Count the tokens of a text without special tokens."""
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def make_titles(tokenizer: Tokenizer, length: int) -> list[str]:
    """Make titles of about ``length`` tokens each; item 0 is padding."""
    rng = np.random.default_rng(length)
    titles = [""]
    while len(titles) <= NUM_TITLES:
        words: list[str] = []
        while count_tokens(tokenizer, " ".join(words)) < length:
            words.append(str(rng.choice(WORDS)))
        titles.append(" ".join(words))
    return titles


class Rankers:
    """The ways to rank the candidates of a user.

    Args:
        setup: the language model.
        model: the language model, loaded.
        title_tokens: length of the titles.
    """

    def __init__(self, setup: Setup, model: PreTrainedModel, title_tokens: int) -> None:
        self.model, self.pad_id = model, setup.eos_id
        titles = make_titles(setup.load_tokenizer(), title_tokens)
        limits = {"max_title_len": 2 * title_tokens, "max_text_len": MAX_TEXT_LEN}
        self.prompts = build_prompts(setup, titles, **limits)
        self.lines = TitlePrompts(setup.load_tokenizer(), titles, max_history=NUM_HISTORY, **limits)
        self.letter_ids = torch.from_numpy(self.prompts.letter_ids).to(model.device)

    def items(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the history and the candidates of a user."""
        items = 1 + np.random.default_rng(user).permutation(NUM_TITLES)
        return items[:NUM_HISTORY], items[NUM_HISTORY:][:NUM_CANDIDATES]

    def prompts_of(self, users: Sequence[int]) -> dict[str, Any]:
        """Return the prompts of users as a batch."""
        texts = [self.prompts.encode(*self.items(user)) for user in users]
        batch: dict[str, Any] = send_to_device(pad_left(texts, self.pad_id), self.model.device)
        return batch

    def response_length(self, user: int) -> int:
        """Return the tokens of the titles of all candidates."""
        response = "\n".join(self.prompts.titles[item] for item in self.items(user)[1])
        return count_tokens(self.prompts.tokenizer, response)

    def generate(self, user: int) -> None:
        """Generate a response of the length of all candidates' titles."""
        batch, length = self.prompts_of([user]), self.response_length(user)
        # The model is not tuned to rank and may end early or not at all, so the length is fixed.
        self.model.generate(  # type: ignore[operator]
            **batch,
            do_sample=False,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=self.pad_id,
        )

    def score_letters(self, users: Sequence[int]) -> int:
        """Score the candidates' letters in one forward pass; returns its number of tokens."""
        batch = self.prompts_of(users)
        candidate_scores(self.model, batch, self.letter_ids)
        return int(batch["attention_mask"].sum())

    def score_titles(self, users: Sequence[int]) -> int:
        """Score the candidates' titles in one forward pass; returns its number of tokens."""
        items = [self.items(user) for user in users]
        histories = [self.lines.encode(history) for history, _ in items]
        lines = [[self.lines.lines[item] for item in candidates] for _, candidates in items]
        batch = branch_batch(histories, lines, self.pad_id)
        title_scores(self.model, send_to_device(batch, self.model.device))
        return int((batch["branches"] != PADDING_BRANCH).sum())


@torch.inference_mode()
def measure(setup: Setup, model: PreTrainedModel, title_tokens: int, flags: Namespace) -> Row:
    """Seconds per user of each way, and users per second in batches."""
    rankers, device, num_users = Rankers(setup, model, title_tokens), model.device, flags.users
    scoring = {"letters": rankers.score_letters, "titles": rankers.score_titles}
    for score in scoring.values():  # a warm-up
        score([0])
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for user in range(num_users):
        times["generation"].append(seconds(partial(rankers.generate, user), device))
        for _, (name, score) in product(range(SCORING_REPEATS), scoring.items()):
            times[name].append(seconds(partial(score, [user]), device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    floor_s = 2 * setup.num_parameters / matmul_rate(device)
    written = statistics.mean(map(rankers.response_length, range(USERS_FOR_LENGTH)))
    return {
        "model": setup.name,
        "in_4bit": setup.in_4bit,
        "title_tokens": title_tokens,
        "written_tokens": written,
        **{f"{name}_s": round(value, 4) for name, value in medians.items()},
        **{f"{name}_speedup": round(medians["generation"] / medians[name], 1) for name in scoring},
        "batched": [
            {"users": size, "way": name} | measure_batches(score, size, floor_s, device)
            for size, (name, score) in product(flags.batch_sizes, scoring.items())
        ],
    }


def measure_batches(
    score: Callable[[Sequence[int]], int], size: int, floor_s: float, device: torch.device
) -> Row:
    """Users per second in batches of ``size``; the arithmetic of a token takes ``floor_s``."""
    users = range(size)
    tokens = score(users)  # a warm-up
    elapsed = statistics.median(
        seconds(partial(score, users), device) for _ in range(SCORING_REPEATS)
    )
    return {
        "users_per_s": round(size / elapsed, 2),
        "tokens_per_s": round(tokens / elapsed, 1),
        "floor_share": round(floor_s * tokens / elapsed, 3),
    }


def measure_all(flags: Namespace) -> Iterator[Row]:
    """Measure each model with each length of titles."""
    device = torch.device(flags.device)
    for name in flags.models:
        setup = prepare(name, device, flags.cache_root, flags.tokenizer)
        model = load_causal_lm(setup.folder, device=device, in_4bit=setup.in_4bit).eval()
        if setup.in_4bit and flags.dequantize:
            dequantize(model)
        for title_tokens in flags.title_tokens:
            yield measure(setup, model, title_tokens, flags)
        del model  # before the next one is loaded


def draw(rows: list[Row], device: str, path: Path) -> None:
    """Plot the seconds per user against the length of titles, one panel per model."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        own = [row for row in rows if row["model"] == name]
        lengths = [row["title_tokens"] for row in own]
        for name in WAYS:
            axes.plot(lengths, [row[f"{name}_s"] for row in own], "o-", label=name)
        axes.set(
            title=f"{name}, {device}", xlabel="title length (tokens)", ylabel="seconds per user"
        )
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the flags select and draw the figure."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_root", help="ignored: the titles are random words")
    parser.add_argument("--cache_root", default="data/cache", help="folder of models")
    add_model_flags(parser)
    add_device_flag(parser)
    parser.add_argument(
        "--title_tokens", nargs="+", type=int, default=[5, 10, 20, 30], help="lengths of titles"
    )
    parser.add_argument("--users", type=int, default=3, help="users per row (default: 3)")
    parser.add_argument(
        "--batch_sizes", nargs="*", type=int, default=[16, 64], help="users per batch of scoring"
    )
    parser.add_argument(
        "--dequantize", action="store_true", help="compute the values of NF4 weights once"
    )
    parser.add_argument("--figure", default="experiments/ranker_inference.png", help="PNG to write")
    flags = parser.parse_args(argv)
    rows = report("ranker_inference", flags.device, measure_all(flags))
    draw(rows, flags.device, Path(flags.figure))


if __name__ == "__main__":
    run(main)
