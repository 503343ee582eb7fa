"""Memory of a process, and functions run in a process of their own to measure theirs."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def _status(field: str) -> float:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: the peak is all there is, in KiB or, on macOS, in bytes
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return int(status.split(field)[1].split()[0]) / 2**10


def rss_mib() -> float:
    """Memory that this process holds."""
    return _status("VmRSS:")


def peak_mib() -> float:
    """The most memory that this process has held."""
    return _status("VmHWM:")


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a fresh process, whose peak is the function's own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
