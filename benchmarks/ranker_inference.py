"""Scoring a user's candidates in one forward pass against writing their ranking (Figure 3).

The generating ranker reads the same prompt and writes titles greedily, with a key-value cache,
until the response is as long as all candidates' titles together. Both rank 20 candidates after 10
history items for one user at a time, in turn in one process; medians over users. Titles are made
up, of the length asked for.

Example:
    python benchmarks/ranker_inference.py --figure experiments/ranker_inference.png
    python benchmarks/ranker_inference.py --device cuda --models smollm2-135m llama-2-7b \\
        --tokenizer path/to/llama-2
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from benchmarks.language_models import NAMES, Setup, prepare
from config import RankerConfig
from dataloader.prompt import PromptBuilder
from dataloader.ranker import pad_left
from model.ranker import load_causal_lm
from model.verbalizer import candidate_scores
from storage import atomic_path

NUM_CANDIDATES, NUM_HISTORY, NUM_TITLES = 20, 10, 200
WORDS = ("the", "story", "of", "a", "long", "night", "river", "city", "garden", "winter", "king")


def make_titles(tokenizer: Tokenizer, length: int) -> list[str]:
    """Titles of about ``length`` tokens each; titles[0] belongs to no item."""
    rng = np.random.default_rng(length)
    titles = [""]
    while len(titles) <= NUM_TITLES:
        words: list[str] = []
        while len(tokenizer.encode(" ".join(words), add_special_tokens=False).ids) < length:
            words.append(str(rng.choice(WORDS)))
        titles.append(" ".join(words))
    return titles


def rankers(
    setup: Setup, model: PreTrainedModel, length: int, device: torch.device
) -> tuple[Callable[[int], None], Callable[[int], None], float]:
    """Functions that rank one user's candidates by writing and by scoring, and tokens written."""
    config = RankerConfig(dataset_code="ml-100k")
    tokenizer, eos_id = setup.tokenizer, setup.eos_id
    prompts = PromptBuilder(
        tokenizer,
        make_titles(tokenizer, length),
        instruction=config.llm_system_template,
        input_template=config.llm_input_template,
        num_candidates=NUM_CANDIDATES,
        max_title_len=2 * length,
        max_text_len=4096,
    )
    label_ids = torch.from_numpy(prompts.label_ids).to(device)

    def user(number: int) -> tuple[dict, int]:
        items = 1 + np.random.default_rng(number).permutation(NUM_TITLES)
        history, candidates = items[:NUM_HISTORY], items[NUM_HISTORY:][:NUM_CANDIDATES]
        batch = pad_left([prompts.encode(history, candidates)], eos_id)
        response = "\n".join(prompts.titles[item] for item in candidates)
        tokens = len(tokenizer.encode(response, add_special_tokens=False).ids)
        return {name: x.to(device) for name, x in batch.items()}, tokens

    def write(number: int) -> None:
        batch, tokens = user(number)
        # Not yet tuned to rank, the model may end early or not at all: the length is fixed.
        model.generate(
            **batch,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=eos_id,
        )

    def score(number: int) -> None:
        candidate_scores(model, user(number)[0], label_ids)

    return write, score, statistics.mean(user(number)[1] for number in range(10))


@torch.inference_mode()
def measure(
    setup: Setup, model: PreTrainedModel, length: int, device: torch.device, users: int
) -> dict:
    """One row: seconds a user of both ways."""
    write, score, tokens = rankers(setup, model, length, device)
    seconds: dict[Callable, list[float]] = {write: [], score: []}
    score(0)
    for number in range(users):
        for way, times in seconds.items():
            for _ in range(1 if way is write else 3):  # the short one more often
                start = time.perf_counter()
                way(number)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
    writing_s, scoring_s = (statistics.median(seconds[way]) for way in (write, score))
    return {
        "model": setup.name,
        "in_4bit": setup.in_4bit,
        "title_tokens": length,
        "written_tokens": tokens,
        "generation_s": round(writing_s, 4),
        "scoring_s": round(scoring_s, 4),
        "speedup": round(writing_s / scoring_s, 1),
    }


def draw(rows: list[dict], device: str, path: Path) -> None:
    """Seconds a user against title length, a panel a model."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        own = [row for row in rows if row["model"] == name]
        lengths = [row["title_tokens"] for row in own]
        for key, label in (("generation_s", "generation"), ("scoring_s", "one forward pass")):
            axes.plot(lengths, [row[key] for row in own], "o-", label=label)
        axes.set(title=f"{name}, {device}", xlabel="title length (tokens)", ylabel="seconds a user")
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main() -> None:
    """Measure what the flags name, draw the figure, print a line a row and all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_root", help="of no use here: titles are made up")
    parser.add_argument("--cache_root", default="data/cache")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], choices=NAMES)
    parser.add_argument("--tokenizer", help="folder of Llama 2's tokenizer, for llama-2-7b")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--title_tokens", nargs="+", type=int, default=[5, 10, 20, 30])
    parser.add_argument("--users", type=int, default=3, help="users a row (default: 3)")
    parser.add_argument("--figure", default="experiments/ranker_inference.png")
    flags = parser.parse_args()
    device = torch.device(flags.device)
    rows = []
    for name in flags.models:
        setup = prepare(name, device, Path(flags.cache_root), flags.tokenizer)
        model = load_causal_lm(setup.folder, device=device, in_4bit=setup.in_4bit).eval()
        for length in flags.title_tokens:
            rows.append(measure(setup, model, length, device, flags.users))
            print(rows[-1], file=sys.stderr, flush=True)
        del model
    draw(rows, flags.device, Path(flags.figure))
    print(json.dumps({"benchmark": "ranker_inference", "device": flags.device, "rows": rows}))


if __name__ == "__main__":
    main()
