"""Process-wide setup: signals, streams, the CUDA device, settings of libraries."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from distributed import size
from errors import ArgumentError, UserError

# Iterations for which an idle thread of torch's OpenMP library spins before it sleeps; 300,000 by
# default. The library lowers this if there are more threads than cores, but counts only its own.
GOMP_SPINCOUNT = "1000"
DEFERRED_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Environment variables that accelerate reads, with the values that change nothing. They are not
# part of a run's settings, so others are refused.
ACCELERATE_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_TORCH_DEVICE": "",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
    "ACCELERATE_USE_SAGEMAKER": "false",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "false",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM; it ends a run in the same way as Ctrl-C."""


def _terminate(*_: object) -> None:
    raise Terminated


def set_up() -> None:
    """Prepare the process of an entry script; call it before torch is imported."""
    # Jagged batches hardly ever repeat a shape. By default, oneDNN caches up to 1,024 kernels,
    # which takes gigabytes in a long run.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # For the same reason, blocks of GPU memory of fixed size could hardly ever be reused.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Spinning threads take CPU time from everything else that runs on their cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)
    silence_libraries()
    signal.signal(signal.SIGTERM, _terminate)
    prepare_streams()


def silence_libraries() -> None:
    """Hide progress bars and warnings of libraries, unless the user passes ``python -W``.

    What transformers logs, such as missing weights, still appears.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also hides those of transformers
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def prepare_streams() -> None:
    """Keep a run going whatever becomes of its terminal.

    A closed standard stream reads as empty and swallows what is written. If writing fails later,
    as in ``| head -1`` or on a full disk, the rest of the output is dropped. Characters that the
    terminal's encoding lacks are escaped.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115
            continue
        if isinstance(stream, io.TextIOWrapper):
            # By lines, so that a log keeps up with the run and with what goes to stderr.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
            setattr(sys, name, _Lasting(stream))


def check_output() -> None:
    """Report output that was lost, unless its reader has left.

    Raises:
        UserError: standard output could not be written.
    """
    sys.stdout.flush()
    problem = getattr(sys.stdout, "problem", None)
    if problem is not None and not isinstance(problem, BrokenPipeError):
        raise UserError(f"standard output cannot be written: {problem.strerror}")


class _Lasting:
    """A text stream that goes to ``os.devnull`` once it cannot be written.

    Attributes:
        problem: why it could not be written, or None.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream
        self.problem: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it if the stream cannot be written."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left if the stream cannot be written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, problem: OSError) -> None:
        self.problem = problem
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Defer Ctrl-C and SIGTERM, and yield a list that collects the numbers of those received."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread receives signals
        return

    def record(number: int, _: Any) -> None:
        received.append(number)

    handlers = {number: signal.signal(number, record) for number in DEFERRED_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def raise_interrupt(signal_number: int) -> None:
    """Raise the exception of a signal that was deferred."""
    raise Terminated if signal_number == signal.SIGTERM else KeyboardInterrupt


def free_memory() -> int:
    """Memory of this machine that is free or can be freed, swap included, in bytes."""
    return int(psutil.virtual_memory().available + psutil.swap_memory().free)


def has_cuda_driver() -> bool:
    """Look for a CUDA driver, without the seconds that importing torch takes."""
    if sys.platform != "linux":
        return True  # torch will tell
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def check_device(device: str | None) -> None:
    """Refuse, before torch is imported, a device or settings of a launcher that cannot work.

    Raises:
        ArgumentError: CUDA is requested, and there is no driver or the launcher forbids it.
        UserError: the environment has settings for accelerate, or its launcher started fewer
            processes than requested.
    """
    for name, unchanged in ACCELERATE_SETTINGS.items():
        value = os.environ.get(name, unchanged)
        if value.lower() != unchanged:
            instead = "or leave it out of accelerate's configuration"
            if name == "ACCELERATE_USE_FSDP":
                instead = "and use train_ranker.py --llm_shard_weights true"
            raise UserError(
                f"{name}={value} in the environment would change what the run computes: unset it, "
                f"{instead}"
            )
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ and size() == 1:
        raise UserError(
            "accelerate launch starts only one process on CPUs, whatever --num_processes says: use "
            "torchrun --nproc_per_node N, or --num_processes 1"
        )
    if device == "cuda" and _launched_on_cpu():
        raise ArgumentError("device", device, "accelerate was launched with --cpu")
    if device == "cuda" and not has_cuda_driver():
        raise ArgumentError("device", device, "this machine has no CUDA driver; use cpu")


def check_single_process() -> None:
    """Refuse several processes where they are of no use.

    Raises:
        UserError: a launcher started them.
    """
    if size() > 1:
        raise UserError(
            f"torchrun or accelerate launch started {size()} processes, and this needs one: start "
            "it with python"
        )


def _launched_on_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def use_cuda(device: str | None) -> bool:
    """Decide whether to compute on CUDA.

    Args:
        device: ``cpu``, ``cuda``, or None for CUDA if available and not forbidden by
            ``accelerate launch --cpu``.

    Raises:
        ArgumentError: CUDA is requested and torch finds no device.
    """
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ArgumentError("device", device, "torch finds no CUDA device; use cpu")
    return available and device != "cpu" and not _launched_on_cpu()
