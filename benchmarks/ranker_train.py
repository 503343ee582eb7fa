"""Training of the ranker: ours against the published recipe, on the same prompts.

The published recipe tokenizes every prompt as text, pads a batch to its longest prompt, computes
the logits of all positions and recomputes activations in the backward pass. Ours concatenates
cached title tokens, splits the batch where that saves padding, computes logits at the response only
and recomputes activations only if memory demands it. Both alternate with one optimizer step each;
times are medians. ``floor_share`` is the time of the arithmetic alone (4 x parameters x tokens of
the prompts, at the rate of a large bfloat16 matrix product measured here) over our time. Peak
memory is that of a process of its own for each recipe on the CPU, and the allocator's on CUDA.
``liger_s`` and ``liger_mib`` are ours with ``--use_liger_kernel``, on CUDA if that package is
installed.

``llama-2-7b`` has the true shape and random weights, because Llama 2 cannot be redistributed.

Example:
    python -m benchmarks.ranker_train --data_root data --datasets games ml-100k
    python -m benchmarks.ranker_train --device cuda --models smollm2-135m llama-2-7b \\
        --tokenizer path/to/llama-2
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel

from benchmarks.common import (
    DATASETS,
    Row,
    add_data_flags,
    add_device_flag,
    alternating_medians,
    load_data,
    make_parser,
    report,
    run,
    seconds,
    update,
    use_stock_dropout,
)
from benchmarks.language_models import (
    RANKER_DEFAULTS,
    Setup,
    add_model_flags,
    build_prompts,
    prepare,
)
from benchmarks.memory import in_own_process, peak_mib, rss_mib
from dataloader.prompt import RESPONSE_TOKENS
from dataloader.prompt_batches import IGNORE_INDEX, TrainingPrompts, pad_left
from datasets import SequenceDataset
from model.language_model import (
    add_lora,
    load_causal_lm,
    needs_checkpointing,
    recompute_activations,
)
from model.verbalizer import response_loss
from trainer.optimization import build_optimizer

PUBLISHED, OURS, LIGER = "published", "ours", "liger"
EXAMPLES = 10_000  # the steps draw from this many


class Work(NamedTuple):
    """What is trained and where; it can be sent to another process.

    Attributes:
        setup: the language model.
        data: the data set.
        batch_size: prompts per step.
        device: device of the training.
    """

    setup: Setup
    data: SequenceDataset
    batch_size: int
    device: torch.device


def training_prompts(work: Work) -> TrainingPrompts:
    """Return the training examples of ``train_ranker.py`` with its default flags."""
    return TrainingPrompts(
        work.data,
        build_prompts(work.setup, work.data.titles),
        num_negatives=RANKER_DEFAULTS.llm_negative_sample_size,
        max_history=RANKER_DEFAULTS.llm_max_history,
        max_rows=work.batch_size,
        max_tokens=work.setup.max_tokens,
        eos_id=work.setup.eos_id,
        on_inputs=False,
        seed=0,
    )


def build_model(work: Work, recipe: str) -> PeftModel:
    """Build the model with adapters as a recipe has it."""
    causal_lm = load_causal_lm(
        work.setup.folder,
        device=work.device,
        in_4bit=work.setup.in_4bit,
        fused_kernels=recipe == LIGER,
    )
    if recipe == PUBLISHED:
        causal_lm.set_attn_implementation("sdpa")
    model = add_lora(
        causal_lm,
        rank=RANKER_DEFAULTS.lora_r,
        alpha=RANKER_DEFAULTS.lora_alpha,
        dropout=RANKER_DEFAULTS.lora_dropout,
        target_modules=RANKER_DEFAULTS.lora_target_modules,
    )
    if recipe == PUBLISHED or needs_checkpointing(model, work.setup.max_tokens):
        recompute_activations(model)
    if recipe == PUBLISHED:
        use_stock_dropout(model)
    return model


class Training:
    """A model with adapters and its optimizer, trained as a recipe does.

    Args:
        work: what is trained and where.
        recipe: ``published``, ``ours`` or ``liger``.
    """

    def __init__(self, work: Work, recipe: str) -> None:
        self.recipe, self.device = recipe, work.device
        self.examples = training_prompts(work)
        torch.manual_seed(0)
        self.model = build_model(work, recipe)
        self.model.train()
        self.optimizer = build_optimizer(
            self.model,
            "AdamW",
            lr=RANKER_DEFAULTS.lora_lr,
            weight_decay=RANKER_DEFAULTS.weight_decay,
            epsilon=RANKER_DEFAULTS.adam_epsilon,
            paged=work.setup.in_4bit,
        )

    def step(self, numbers: list[int]) -> None:
        """Take one optimizer step on the examples with the given numbers."""
        if self.recipe == PUBLISHED:
            self._published_backward(numbers)
        else:
            self._backward(numbers)
        update(self.model, self.optimizer, RANKER_DEFAULTS.max_grad_norm)

    def _published_backward(self, numbers: list[int]) -> None:
        prompts, eos_id = self.examples.prompts, self.examples.eos_id
        sequences = []
        for number in numbers:
            history, candidates, index = self.examples.example(number)
            token_ids = prompts.tokenizer.encode(prompts.text(history, candidates)).ids
            sequences.append(np.array([*token_ids, prompts.letter_ids[index], eos_id]))
        batch: dict[str, Any] = send_to_device(pad_left(sequences, eos_id), self.device)
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        labels[:, -RESPONSE_TOKENS:] = batch["input_ids"][:, -RESPONSE_TOKENS:]
        self.model(**batch, labels=labels, use_cache=False).loss.backward()

    def _backward(self, numbers: list[int]) -> None:
        for micro_batch in self.examples.__getitems__(numbers):
            batch: dict[str, Any] = send_to_device(micro_batch, self.device)
            (response_loss(self.model, batch) * batch["weight"]).backward()


def peak_of_training(work: Work, recipe: str) -> float:
    """Measure the peak memory of two steps in MiB, without what was used before the model.

    It is to be called in a process of its own.
    """
    before = rss_mib()
    training = Training(work, recipe)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training.step(list(range(work.batch_size)))
    training.step(list(range(work.batch_size, 2 * work.batch_size)))
    if work.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_mib() - before


def time_steps(
    work: Work, batches: list[list[int]], recipes: tuple[str, ...]
) -> tuple[list[float], float]:
    """Time the recipes in turn on the same prompts.

    Args:
        work: what is trained and where.
        batches: numbers of the examples of each step; the first step is the warm-up.
        recipes: the recipes.

    Returns:
        Median seconds of a step by recipe, and the mean number of tokens of a step.
    """
    trainings = [Training(work, recipe) for recipe in recipes]

    def stepper(training: Training) -> Callable[[int], None]:
        return lambda index: training.step(batches[index])

    steps = [stepper(training) for training in trainings]
    medians = alternating_medians(steps, len(batches) - 1, work.device)
    tokens = [count_tokens(trainings[0].examples, numbers) for numbers in batches[1:]]
    return medians, statistics.mean(tokens)


def count_tokens(examples: TrainingPrompts, numbers: list[int]) -> int:
    """Count the tokens of a step, without padding."""
    micro_batches = examples.__getitems__(numbers)
    return sum(int(micro_batch["attention_mask"].sum()) for micro_batch in micro_batches)


def matmul_rate(device: torch.device) -> float:
    """Measure the FLOP/s of a large bfloat16 matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(12)]
    return 2 * size**3 / statistics.median(times[2:])


def measure(work: Work, rounds: int) -> Row:
    """Times, memory and ratios of one model on one data set."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(EXAMPLES, size=work.batch_size).tolist() for _ in range(rounds + 1)]
    recipes = (PUBLISHED, OURS)
    memory = {name: in_own_process(peak_of_training, work, name) for name in recipes}
    liger: Row = {}
    if work.device.type == "cuda" and find_spec("liger_kernel"):
        # Liger patches the rotary embeddings of all models of a process.
        (liger_s,), _ = in_own_process(time_steps, work, batches, (LIGER,))
        liger_mib = in_own_process(peak_of_training, work, LIGER)
        liger = {"liger_s": round(liger_s, 3), "liger_mib": round(liger_mib, 1)}
    (published_s, ours_s), tokens = in_own_process(time_steps, work, batches, recipes)
    floor_s = 4 * work.setup.num_parameters * tokens / matmul_rate(work.device)
    return {
        "model": work.setup.name,
        "dataset": work.data.code,
        "in_4bit": work.setup.in_4bit,
        "batch_size": work.batch_size,
        "published_s": round(published_s, 3),
        "ours_s": round(ours_s, 3),
        "prompts_per_s": round(work.batch_size / ours_s, 3),
        "tokens_per_s": round(tokens / ours_s, 1),
        "throughput_ratio": round(published_s / ours_s, 2),
        "published_mib": round(memory[PUBLISHED], 1),
        "ours_mib": round(memory[OURS], 1),
        "memory_ratio": round(memory[PUBLISHED] / memory[OURS], 2),
        "floor_share": round(floor_s / ours_s, 3),
        **liger,
    }


def measure_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure each model on each data set."""
    device = torch.device(flags.device)
    for name in flags.models:
        setup = prepare(name, device, flags.cache_root, flags.tokenizer)
        for code in flags.datasets:
            work = Work(setup, load_data(code, flags), flags.batch_size, device)
            yield measure(work, flags.rounds)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the flags select."""
    parser = make_parser(__doc__)
    add_data_flags(parser)
    parser.add_argument("--datasets", nargs="+", default=["games", "ml-100k"], choices=DATASETS)
    add_model_flags(parser)
    add_device_flag(parser)
    parser.add_argument("--batch_size", type=int, default=4, help="prompts per step (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps (default: 5)")
    flags = parser.parse_args(argv)
    report("ranker_train", flags.device, measure_all(flags))


if __name__ == "__main__":
    run(main)
