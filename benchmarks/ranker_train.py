"""Training of the ranker: ours against the published recipe, side by side on the same prompts.

The published recipe tokenises every prompt as text, pads a batch to its longest prompt, computes
the logits of all positions and recomputes activations in the backward pass. Ours takes cached title
tokens, cuts the batch where padding is least, computes logits at the response only and recomputes
nothing unless memory demands it. Both do one optimizer step on the same prompts in turn; ratios of
medians. ``floor_share`` is the time that the arithmetic alone would take (4 x parameters x tokens
of the prompts at the rate of a large bfloat16 matrix product, measured here) over our time. Peak
memory comes from a process of its own for each on the CPU, from the allocator on CUDA. On CUDA
``liger`` is ours with ``--use_liger_kernel true``, where that package is installed.

``llama-2-7b`` has the true shape and random weights: Llama 2 cannot be passed on.

Example:
    python benchmarks/ranker_train.py --data_root data --datasets games ml-100k
    python benchmarks/ranker_train.py --device cuda --models smollm2-135m llama-2-7b \\
        --tokenizer path/to/llama-2
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel

from benchmarks.language_models import NAMES, Setup, prepare
from benchmarks.memory import in_own_process, peak_mib, rss_mib
from config import RankerConfig
from dataloader.prompt import PromptBuilder
from dataloader.ranker import TrainingPrompts, pad_left
from datasets import SequenceDataset, load_dataset
from datasets.base import Filters
from model.layers import Dropout
from model.ranker import add_lora, load_causal_lm, needs_checkpointing, recompute_activations
from model.verbalizer import response_loss
from trainer.loop import build_optimizer


def prompt_builder(setup: Setup, data: SequenceDataset) -> PromptBuilder:
    """The prompts of train_ranker.py with its default flags."""
    config = RankerConfig(dataset_code=data.code)
    return PromptBuilder(
        setup.tokenizer,
        data.titles,
        instruction=config.llm_system_template,
        input_template=config.llm_input_template,
        num_candidates=config.llm_negative_sample_size + 1,
    )


def build(setup: Setup, device: torch.device, which: str) -> PeftModel:
    """The model with adapters, as the published recipe or as ours has it."""
    causal_lm = load_causal_lm(
        setup.folder, device=device, in_4bit=setup.in_4bit, fused_kernels=which == "liger"
    )
    if which == "published":
        causal_lm.set_attn_implementation("sdpa")
    model = add_lora(
        causal_lm,
        rank=8,
        alpha=32,
        dropout=0.05,
        target_modules=("q_proj", "v_proj"),
    )
    if which == "published" or needs_checkpointing(model, setup.max_tokens):
        recompute_activations(model)
    return model


def steps(
    setup: Setup, data: SequenceDataset, batch_size: int, device: torch.device, which: str
) -> Callable[[list[int]], int]:
    """A function that does one optimizer step on the examples given; returns their tokens."""
    prompts = prompt_builder(setup, data)
    tokenizer, eos_id = prompts.tokenizer, setup.eos_id
    examples = TrainingPrompts(
        data,
        prompts,
        num_negatives=19,
        max_history=20,
        max_rows=batch_size,
        max_tokens=setup.max_tokens,
        eos_id=eos_id,
        on_inputs=False,
        seed=0,
    )
    torch.manual_seed(0)
    model = build(setup, device, which)
    if which == "published":
        for module in model.modules():
            if isinstance(module, Dropout):
                module.__class__ = torch.nn.Dropout
    model.train()
    optimizer = build_optimizer(
        model, "AdamW", lr=1e-4, weight_decay=0.0, epsilon=1e-8, paged=setup.in_4bit
    )

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def published(numbers: list[int]) -> int:
        sequences = []
        for number in numbers:
            history, candidates, place = examples.example(number)
            text = prompts.text(history, candidates)
            response = [prompts.label_ids[place], eos_id]
            sequences.append(np.array([*tokenizer.encode(text).ids, *response]))
        batch = send_to_device(pad_left(sequences, eos_id), device)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -2:] = batch["input_ids"][:, -2:]
        model(**batch, labels=labels, use_cache=False).loss.backward()
        update()
        return sum(map(len, sequences))

    def ours(numbers: list[int]) -> int:
        tokens = 0
        for micro_batch in examples.__getitems__(numbers):
            tokens += int(micro_batch["attention_mask"].sum())
            micro_batch = send_to_device(micro_batch, device)
            (response_loss(model, micro_batch) * micro_batch["weight"]).backward()
        update()
        return tokens

    return published if which == "published" else ours


def memory_of_a_step(
    setup: Setup, data: SequenceDataset, batch_size: int, device: str, which: str
) -> float:
    """MiB that training held at most, beyond what it held before the model was loaded."""
    before = rss_mib()
    step = steps(setup, data, batch_size, torch.device(device), which)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step(list(range(batch_size)))
    step(list(range(batch_size, 2 * batch_size)))
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_mib() - before


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large bfloat16 matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def time_steps(
    setup: Setup,
    data: SequenceDataset,
    batch_size: int,
    device: str,
    rounds: int,
    recipes: tuple[str, ...],
) -> tuple[list[float], float]:
    """Median seconds of a step by recipe, in turn on the same prompts; mean tokens of a step."""
    runs = [steps(setup, data, batch_size, torch.device(device), which) for which in recipes]
    rng = np.random.default_rng(0)
    seconds: list[list[float]] = [[] for _ in recipes]
    tokens = []
    for turn in range(rounds + 1):
        numbers = rng.integers(10_000, size=batch_size).tolist()
        for step, durations in zip(runs, seconds):
            start = time.perf_counter()
            count = step(numbers)
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                durations.append(time.perf_counter() - start)
        if turn:
            tokens.append(count)
    return list(map(statistics.median, seconds)), statistics.mean(tokens)


def measure(
    setup: Setup, data: SequenceDataset, batch_size: int, device: torch.device, rounds: int
) -> dict:
    """One row."""
    what = (setup, data, batch_size, device.type)
    recipes = ("published", "ours")
    memory = {w: in_own_process(memory_of_a_step, *what, w) for w in recipes}
    liger = {}
    if device.type == "cuda" and find_spec("liger_kernel"):
        # It changes the rotary positions of all models, hence a process of its own.
        (liger_s,), _ = in_own_process(time_steps, *what, rounds, ("liger",))
        liger_mib = in_own_process(memory_of_a_step, *what, "liger")
        liger = {"liger_s": round(liger_s, 3), "liger_mib": round(liger_mib, 1)}
    (published_s, ours_s), tokens = in_own_process(time_steps, *what, rounds, recipes)
    floor_s = 4 * setup.num_parameters * tokens / matmul_rate(device)
    return {
        "model": setup.name,
        "dataset": data.code,
        "in_4bit": setup.in_4bit,
        "batch_size": batch_size,
        "published_s": round(published_s, 3),
        "ours_s": round(ours_s, 3),
        "prompts_per_s": round(batch_size / ours_s, 3),
        "tokens_per_s": round(tokens / ours_s, 1),
        "throughput_ratio": round(published_s / ours_s, 2),
        "published_mib": round(memory["published"], 1),
        "ours_mib": round(memory["ours"], 1),
        "memory_ratio": round(memory["published"] / memory["ours"], 2),
        "floor_share": round(floor_s / ours_s, 3),
        **liger,
    }


def main() -> None:
    """Measure what the flags name and print a line each, then all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--cache_root", default="data/cache")
    parser.add_argument("--datasets", nargs="+", default=["games", "ml-100k"])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], choices=NAMES)
    parser.add_argument("--tokenizer", help="folder of Llama 2's tokenizer, for llama-2-7b")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, default=4, help="prompts a step (default: 4)")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    device = torch.device(flags.device)
    rows = []
    for name in flags.models:
        setup = prepare(name, device, Path(flags.cache_root), flags.tokenizer)
        for code in flags.datasets:
            data = load_dataset(
                code, data_root=flags.data_root, cache_root=flags.cache_root, filters=Filters()
            )
            rows.append(measure(setup, data, flags.batch_size, device, flags.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "ranker_train", "device": flags.device, "rows": rows}))


if __name__ == "__main__":
    main()
