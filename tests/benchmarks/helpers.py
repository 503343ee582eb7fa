"""Helpers for the benchmarks' smoke tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def result(output: str) -> dict[str, Any]:
    """Parse the last line of a benchmark's output."""
    return json.loads(output.splitlines()[-1])


def assert_rows(printed: dict[str, Any], benchmark: str, keys: str, **settings: object) -> None:
    """Check the printed object and that every row has exactly the given keys, in their order."""
    assert list(printed) == ["benchmark", "device", *settings, "rows"]
    assert printed | settings == printed | {"benchmark": benchmark, "device": "cpu"}
    assert printed["rows"]
    for row in printed["rows"]:
        assert list(row) == keys.split()


def in_this_process(function: Callable[..., T], *arguments: object) -> T:
    """Stand in for ``benchmarks.memory.in_own_process``, without the seconds of new imports."""
    return function(*arguments)
