"""What each part of the ranker's training brings, with one model loaded once.

For each verbalizer and data set: a step as ``train_ranker.py`` takes it (``default``), and with one
part taken away or added: activations recomputed, prompts padded instead of packed (CUDA alone),
adapters as PEFT computes them. Last, as they cannot be removed, come Liger's kernels and NF4 values
computed once, on top of each other. A row has the median time of a step, its tokens per second,
``floor_share`` as in ``benchmarks.ranker_train``, and the peak memory beside what was predicted
from a short prompt. A variant that fails leaves its error and does not stop the others. Each row is
printed on stderr once it is measured.

Example:
    python -m benchmarks.ranker_variants --device cuda --models llama-2-7b \\
        --tokenizer path/to/llama-2 --batch_size 16
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from benchmarks.common import (
    Row,
    load_data,
    make_parser,
    matmul_rate,
    report,
    run,
    seconds,
)
from benchmarks.language_models import prepare
from benchmarks.ranker_train import EXAMPLES, OURS, TRAININGS, Training, Work, add_work_flags
from model.language_model import (
    activation_bytes_per_token,
    add_lora,
    dequantize,
    load_causal_lm,
    recompute_activations,
    use_fused_kernels,
)
from model.lora import compute_in_input_dtype
from model.packing import NAME, packs

Variant = Callable[[PeftModel], AbstractContextManager[None]]
PROFILED_ROWS = 25


@contextmanager
def as_it_is(model: PeftModel) -> Iterator[None]:
    """Change nothing."""
    yield


@contextmanager
def recomputed(model: PeftModel) -> Iterator[None]:
    """Recompute activations in the backward pass."""
    causal_lm: Any = model.get_base_model()
    recompute_activations(model)
    try:
        yield
    finally:
        causal_lm.gradient_checkpointing_disable()


@contextmanager
def padded(model: PeftModel) -> Iterator[None]:
    """Pad prompts instead of packing them."""
    causal_lm: Any = model.get_base_model()
    causal_lm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(NAME)


@contextmanager
def stock_adapters(model: PeftModel) -> Iterator[None]:
    """Compute adapters in float32, as PEFT does."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.__dict__.pop("forward", None)
    try:
        yield
    finally:
        compute_in_input_dtype(model)


@contextmanager
def fused(model: PeftModel) -> Iterator[None]:
    """Use Liger's kernels from now on."""
    causal_lm: Any = model.get_base_model()
    use_fused_kernels(causal_lm)
    yield


@contextmanager
def dequantized(model: PeftModel) -> Iterator[None]:
    """Keep the values of NF4 weights from now on."""
    dequantize(model)
    yield


def removable(model: PeftModel, verbalizer: str) -> dict[str, Variant]:
    """The variants that leave the model as it was, by name."""
    packed = packs(model.get_base_model()) and verbalizer == "letters"
    return {
        "default": as_it_is,
        **({"padded": padded} if packed else {}),
        "recomputed": recomputed,
        "stock adapters": stock_adapters,
    }


class Steps:
    """Steps of a training on the same examples for each variant.

    Args:
        work: what is trained and where.
        model: the model with adapters.
        num_steps: measured steps, after one to warm up.
    """

    def __init__(self, work: Work, model: PeftModel, num_steps: int) -> None:
        self.work, self.model = work, model
        self.training: Training = TRAININGS[work.verbalizer](work, OURS, model)
        rng = np.random.default_rng(0)
        self.numbers = rng.integers(EXAMPLES, size=(num_steps + 1, work.batch_size)).tolist()
        texts = [self.training.texts(numbers) for numbers in self.numbers]
        self.tokens = statistics.mean(sum(map(len, step)) for step in texts[1:])

    def measure(self, floor_s: float) -> Row:
        """Time, memory and share of the floor; the arithmetic of a token takes ``floor_s``."""
        training, device = self.training, self.work.device
        training.examples.limits = training.limits(self.work)
        row: Row = {}
        if device.type == "cuda":
            per_token = activation_bytes_per_token(self.model)
            before = torch.cuda.memory_allocated()
            batches = [b for numbers in self.numbers for b in training.micro_batches(numbers)]
            largest = max(
                int(batch["attention_mask"].sum() if "attention_mask" in batch
                    else batch["input_ids"].numel())
                for batch in batches
            )  # fmt: skip
            torch.cuda.reset_peak_memory_stats()
            row["predicted_mib"] = round((before + per_token * largest) / 2**20)
            row["micro_batches"] = round(len(batches) / len(self.numbers), 2)
        training.model.train()
        training.step(self.numbers[0])
        times = [seconds(partial(training.step, numbers), device) for numbers in self.numbers[1:]]
        step_s = statistics.median(times)
        if device.type == "cuda":
            row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        return {
            "step_s": round(step_s, 3),
            "tokens_per_s": round(self.tokens / step_s, 1),
            "floor_share": round(floor_s * self.tokens / step_s, 3),
        } | row

    def profile(self) -> str:
        """A table of where the time of a step goes."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.work.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            self.training.step(self.numbers[-1])
        by = f"self_{self.work.device.type}_time_total"
        table: str = profiler.key_averages().table(
            sort_by=by, row_limit=PROFILED_ROWS, max_name_column_width=60
        )
        return table


def add_adapters(causal_lm: Any, work: Work) -> PeftModel:
    """Add the adapters of ``train_ranker.py``'s defaults."""
    config = work.config
    return add_lora(
        causal_lm,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
    )


def measure_variants(
    causal_lm: Any,
    work: Work,
    flags: argparse.Namespace,
    floor_s: float,
    lasting: dict[str, Variant],
) -> Iterator[Row]:
    """Measure the lasting variants, else all removable ones; then remove the adapters."""
    model = add_adapters(causal_lm, work)
    steps = Steps(work, model, flags.steps)
    for name, apply in (lasting or removable(model, work.verbalizer)).items():
        row = {
            "model": work.setup.name, "verbalizer": work.verbalizer, "dataset": work.data.code,
            "variant": name,
        }  # fmt: skip
        try:
            with apply(model):
                row |= steps.measure(floor_s)
                if flags.profile and name == "default":
                    print(steps.profile())
        except Exception as error:  # the next variant may work
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            model.zero_grad()
        yield row
    model.unload()


def measure_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure each model; what cannot be removed comes last."""
    device = torch.device(flags.device)
    rate = matmul_rate(device)
    yield {"matmul_tflops": round(rate / 1e12, 3)}
    for name in flags.models:
        setup = prepare(name, device, flags.cache_root, flags.tokenizer)
        causal_lm = load_causal_lm(setup.folder, device=device, in_4bit=setup.in_4bit)
        floor_s = 4 * setup.num_parameters / rate
        passes: list[dict[str, Variant]] = [{}]
        if device.type == "cuda" and find_spec("liger_kernel") is not None:
            passes.append({"liger": fused})
        if setup.in_4bit:
            passes.append({"dequantized": dequantized})
        for lasting, verbalizer, code in product(passes, flags.verbalizers, flags.datasets):
            work = Work(setup, verbalizer, load_data(code, flags), flags.batch_size, device)
            yield from measure_variants(causal_lm, work, flags, floor_s, lasting)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the flags select."""
    parser = make_parser(__doc__)
    add_work_flags(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="examples per step")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per variant")
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of a default step goes"
    )
    flags = parser.parse_args(argv)
    report("ranker_variants", flags.device, measure_all(flags))


if __name__ == "__main__":
    run(main)
