"""What benchmarks share: flags, data, timing, optimizer steps and the printed result."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from config import DATASET_CODES
from datasets import SequenceDataset, load_dataset
from datasets.base import Filters
from errors import UserError
from model.layers import Dropout

DATASETS = tuple(code for code in DATASET_CODES if code != "custom")
Row = dict[str, Any]


# Flags and data -----------------------------------------------------------------------------------


def make_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Make a parser described by the first paragraph of a module's docstring."""
    return argparse.ArgumentParser(description=str(docstring).split("\n\n")[0])


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the folders of the data sets."""
    parser.add_argument("--data_root", default="data", help="folder of raw data")
    parser.add_argument(
        "--cache_root", default="data/cache", help="folder of preprocessed data and models"
    )


def add_run_flags(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add a finished run, and the folders of its data as ``recommend.py`` takes them."""
    parser.add_argument("--run", required=True, help=help_text)
    parser.add_argument("--data_root", help="as of recommend.py")
    parser.add_argument("--cache_root", help="as of recommend.py")


def load_run_data(flags: argparse.Namespace) -> SequenceDataset:
    """Load the data set of a finished run; ``flags`` are those of ``add_run_flags``."""
    from recipes import runs

    run_dir = Path(flags.run)
    settings = runs.finished_settings(run_dir)
    return runs.load_data(runs.data_config(run_dir, settings, flags.data_root, flags.cache_root))


def add_device_flag(parser: argparse.ArgumentParser, default: str = "cpu") -> None:
    """Add the device."""
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))


def load_data(code: str, flags: argparse.Namespace) -> SequenceDataset:
    """Load a data set with the default filters; ``flags`` are those of ``add_data_flags``."""
    return load_dataset(
        code, data_root=flags.data_root, cache_root=flags.cache_root, filters=Filters()
    )


def synthetic_data(item_ids: np.ndarray, offsets: np.ndarray, num_items: int) -> SequenceDataset:
    """Make a data set without titles or names; arguments as in ``SequenceDataset``."""
    return SequenceDataset(
        code="synthetic",
        item_ids=item_ids.astype(np.int32, copy=False),
        offsets=offsets.astype(np.int64, copy=False),
        titles=[""] * (num_items + 1),
        user_names=[],
        item_names=[],
        fingerprint="",
    )


# Measurement --------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time one call, including the work that it leaves to a GPU."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternating_medians(
    calls: Sequence[Callable[[int], object]], rounds: int, device: torch.device
) -> list[float]:
    """Time functions in turn, so that a change of the machine's speed affects all of them.

    Args:
        calls: functions of the round's index, from 0 to ``rounds``.
        rounds: measured rounds; round 0 comes before them as a warm-up.
        device: device that the functions compute on.

    Returns:
        Median seconds of each function.
    """
    times: list[list[float]] = [[] for _ in calls]
    for index in range(rounds + 1):
        for call, own_times in zip(calls, times):
            own_times.append(seconds(partial(call, index), device))
    return [statistics.median(own_times[1:]) for own_times in times]


def matmul_rate(device: torch.device) -> float:
    """Measure the FLOP/s of a large bfloat16 matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(12)]
    return 2 * size**3 / statistics.median(times[2:])


def update(model: nn.Module, optimizer: Optimizer, max_grad_norm: float) -> None:
    """Clip the gradients, take an optimizer step and reset the gradients."""
    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def use_stock_modules(model: nn.Module) -> None:
    """Replace this project's dropout, attention, norms and adapters in a model by stock ones."""
    for module in model.modules():
        module.__dict__.pop("forward", None)  # see model.lora and model.cpu_norm
        if isinstance(module, Dropout):
            module.__class__ = nn.Dropout  # type: ignore[assignment]
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("sdpa")  # type: ignore[operator]


# Output -------------------------------------------------------------------------------------------


def report(benchmark: str, device: str, rows: Iterable[Row], **settings: object) -> list[Row]:
    """Print each row on stderr once it is measured, and finally all of them as JSON on stdout.

    Args:
        benchmark: name of the benchmark.
        device: ``cpu`` or ``cuda``.
        rows: the rows; a generator measures them one by one.
        settings: further keys of the JSON object.

    Returns:
        The rows.
    """
    measured = []
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
        measured.append(row)
    result = {"benchmark": benchmark, "device": device} | settings | {"rows": measured}
    print(json.dumps(result))
    return measured


def print_slopes(rows: Sequence[Row], size: str, values: Sequence[str], label: str = "") -> None:
    """Print how values grow with a size, on stderr.

    The slope is that of the line through log(value) over log(size) with the least squares, so that
    1 means proportional to the size. The slopes from each size to the next follow in brackets.

    Args:
        rows: rows by ascending size; nothing is printed for fewer than two.
        size: key of the size.
        values: keys of positive values.
        label: what the rows have in common.
    """
    sizes = np.log([row[size] for row in rows])
    for name in values:
        if len(rows) > 1:
            logs = np.log([row[name] for row in rows])
            steps = ", ".join(f"{step:.2f}" for step in np.diff(logs) / np.diff(sizes))
            fitted = np.polyfit(sizes, logs, 1)[0]
            print(f"{label}slope of {name}: {fitted:.2f} ({steps})", file=sys.stderr)


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; a mistake of the user is printed as one line, with exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
