"""Memory of a process, and functions run in a process of their own to measure theirs."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def rss_mib() -> float:
    """Return the resident memory of this process in MiB."""
    return _status_mib("VmRSS:")


def peak_mib() -> float:
    """Return the highest resident memory of this process so far in MiB."""
    return _status_mib("VmHWM:")


def reset_peak() -> None:
    """Reset the peak that ``peak_mib`` returns, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status_mib(field: str) -> float:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: only the peak is available, in KiB or, on macOS, in bytes
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return int(status.split(field)[1].split()[0]) / 2**10


def in_own_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a new process, whose peak memory is then the function's own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
