"""Declaration of command-line flags as fields of dataclasses.

Each flag states what it affects, by the function that declares it:

- ``result_flag``: the results of a run. A run can only be resumed with the same value.
- ``rounding_flag``: the order in which numbers are added up, hence the last digits.
- ``handling_flag``: where files are and how a run is started, logged and resumed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from typing import Any

MAX_INT = 2**31 - 1
Reader = Callable[[str], Any]


# Types: each reads one word of the command line ---------------------------------------------------


def boolean(text: str) -> bool:
    """Read ``true`` or ``false``; ``bool("false")`` would be True."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def boolean_or_auto(text: str) -> bool | None:
    """Read ``true``, ``false``, or ``auto`` as None."""
    return None if text.lower() == "auto" else boolean(text)


def number(kind: type, lowest: float, highest: float, *, below: bool = False) -> Reader:
    """Build a reader of numbers within bounds.

    Args:
        kind: ``int`` or ``float``.
        lowest: smallest value.
        highest: largest value.
        below: whether ``highest`` itself is excluded.
    """

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"'{text}' is not {noun}") from None
        if value != value:  # NaN; math.isnan does not take large integers
            raise argparse.ArgumentTypeError(f"'{text}' is not a number")
        if value < lowest:
            bound = f"at least {lowest}"
        elif value > highest or (below and value == highest):
            bound = f"{'below' if below else 'at most'} {highest}"
            bound = bound if math.isfinite(highest) else "finite"
        else:
            return value
        raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {bound}")

    return read


def path(text: str) -> str:
    """Read the name of a file or folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def up_to(highest: int, *, lowest: int = 1) -> Reader:
    """Build a reader of whole numbers up to ``highest``, a size that no machine could exceed."""
    return number(int, lowest, highest)


positive = number(int, 1, MAX_INT)
at_least_two = number(int, 2, MAX_INT)
count = number(int, 0, MAX_INT)
nonnegative = number(float, 0.0, math.inf, below=True)
any_number = number(float, -math.inf, math.inf)
probability = number(float, 0.0, 1.0, below=True)
fraction = number(float, 0.0, 1.0)


# Declaration --------------------------------------------------------------------------------------


def result_flag(default: Any, help: str, type: Reader = str, **options: Any) -> Any:
    """Declare a flag that changes the results of a run.

    Args:
        default: value without a preset and without the flag.
        help: one line for ``--help``.
        type: reads one word of the command line.
        options: ``alias`` (a second name), ``many`` (takes a list of words), ``choices``,
            ``stage`` (the first stage of the augmentation that depends on the flag).
    """
    return _flag("results", default, help, type, options)


def rounding_flag(default: Any, help: str, type: Reader = str, **options: Any) -> Any:
    """Declare a flag that changes results only by rounding errors; see ``result_flag``."""
    return _flag("rounding", default, help, type, options)


def handling_flag(default: Any, help: str, type: Reader = str, **options: Any) -> Any:
    """Declare a flag that does not change results; see ``result_flag``."""
    return _flag("handling", default, help, type, options)


def _flag(affects: str, default: Any, help: str, type: Reader, options: dict[str, Any]) -> Any:
    return field(
        default=default, metadata={"affects": affects, "help": help, "type": type, **options}
    )


def flags_of(config: type) -> dict[str, Field]:
    """Fields of a config class by name."""
    return {spec.name: spec for spec in fields(config)}


def immaterial_flags(*configs: type) -> frozenset[str]:
    """Names of the flags that do not change results in any of the config classes."""
    specs = [spec for config in configs for spec in fields(config)]
    material = {spec.name for spec in specs if spec.metadata["affects"] == "results"}
    return frozenset({spec.name for spec in specs} - material)


def reread(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check settings from a file as if they had been passed as flags.

    Raises:
        ValueError: a flag does not take that value.
    """
    checked: dict[str, Any] = {}
    for name, value in settings.items():
        spec = flags_of(config)[name]
        read = spec.metadata["type"]
        try:
            if isinstance(value, list) and spec.metadata.get("many"):
                checked[name] = tuple(read(str(word)) for word in value)
            else:
                checked[name] = None if value is None else read(str(value))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name}: {error}") from error
        choices = spec.metadata.get("choices", [checked[name]])
        if (value is None and spec.default is not None) or checked[name] not in choices:
            raise ValueError(f"{name}: {value!r} is not a valid value")
    return checked
