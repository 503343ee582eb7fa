import argparse
import math
from dataclasses import dataclass

import pytest

from flags import (
    any_number,
    at_least_two,
    boolean,
    boolean_or_auto,
    count,
    flags_of,
    fraction,
    handling_flag,
    immaterial_flags,
    nonnegative,
    number,
    positive,
    probability,
    reread,
    result_flag,
    rounding_flag,
)


@dataclass
class Train:
    """One flag of each kind."""

    lr: float = result_flag(0.1, "learning rate", nonnegative)
    shape: str | None = result_flag(None, "shape", choices=("linear", "cosine"), alias="form")
    steps: int | None = result_flag(None, "steps", positive)
    batch_size: int = rounding_flag(8, "users per batch", positive)
    root: str | None = handling_flag(None, "folder")


@dataclass
class Generate:
    """Gives a flag of the same name another meaning."""

    batch_size: int = result_flag(8, "users per batch", positive)
    root: str | None = handling_flag(None, "folder")


# Types ------------------------------------------------------------------------------------------


def test_booleans():
    assert [boolean(text) for text in ("true", "TRUE", "yes", "1")] == [True] * 4
    assert [boolean(text) for text in ("false", "False", "no", "0")] == [False] * 4
    for text in ("", "perhaps", "10"):
        with pytest.raises(argparse.ArgumentTypeError, match="neither true nor false"):
            boolean(text)


def test_booleans_or_auto():
    assert [boolean_or_auto(text) for text in ("Auto", "true", "no")] == [None, True, False]
    with pytest.raises(argparse.ArgumentTypeError, match="neither true nor false"):
        boolean_or_auto("")


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (positive, "1", 1),
        (at_least_two, "2", 2),
        (count, "0", 0),
        (count, str(2**31 - 1), 2**31 - 1),
        (nonnegative, "0", 0.0),
        (nonnegative, "1e300", 1e300),
        (any_number, "-inf", -math.inf),
        (probability, "0.999", 0.999),
        (fraction, "1", 1.0),
    ],
)
def test_numbers_within_bounds(read, text: str, value: float):
    assert read(text) == value and type(read(text)) is type(value)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (positive, "0", "0 is out of range; it must be at least 1"),
        (positive, "2.5", "'2.5' is not a whole number"),
        (positive, "", "'' is not a whole number"),
        (positive, str(2**31), f"{2**31} is out of range; it must be at most {2**31 - 1}"),
        (positive, "9" * 400, f"{'9' * 400} is out of range; it must be at most {2**31 - 1}"),
        (at_least_two, "1", "1 is out of range; it must be at least 2"),
        (count, "-1", "-1 is out of range; it must be at least 0"),
        (nonnegative, "inf", "inf is out of range; it must be finite"),
        (nonnegative, "fast", "'fast' is not a number"),
        (any_number, "nan", "'nan' is not a number"),
        (probability, "1", "1 is out of range; it must be below 1.0"),
        (fraction, "1.1", "1.1 is out of range; it must be at most 1.0"),
        (number(int, 3, 5, below=True), "5", "5 is out of range; it must be below 5"),
    ],
)
def test_numbers_out_of_bounds(read, text: str, message: str):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        read(text)
    assert str(caught.value) == message


# Declaration ------------------------------------------------------------------------------------


def test_a_flag_is_a_field_with_metadata():
    specs = flags_of(Train)
    assert list(specs) == ["lr", "shape", "steps", "batch_size", "root"]
    kinds = [spec.metadata["affects"] for spec in specs.values()]
    assert kinds == ["results", "results", "results", "rounding", "handling"]
    assert specs["lr"].default == 0.1 and specs["lr"].metadata["help"] == "learning rate"
    assert specs["shape"].metadata["alias"] == "form" and specs["root"].metadata["type"] is str


def test_immaterial_flags_are_immaterial_in_every_config():
    assert immaterial_flags(Train) == {"batch_size", "root"}
    assert immaterial_flags(Generate) == {"root"}
    assert immaterial_flags(Train, Generate) == immaterial_flags(Generate, Train) == {"root"}


# Settings from a file ---------------------------------------------------------------------------


def test_reread_accepts_what_was_written():
    settings = {"lr": 0.5, "shape": "cosine", "steps": None, "root": None, "batch_size": 3}
    assert reread(Train, settings) == settings
    assert reread(Train, {}) == {}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", "few", "batch_size: 'few' is not a whole number"),
        ("batch_size", 0, "batch_size: 0 is out of range"),
        ("batch_size", [1], r"batch_size: '\[1\]' is not a whole number"),
        ("batch_size", None, "batch_size: None is not a valid value"),
        ("shape", "cubic", "shape: 'cubic' is not a valid value"),
    ],
)
def test_reread_refuses_what_a_flag_would(name: str, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        reread(Train, {name: value})
