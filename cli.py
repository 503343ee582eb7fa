"""The command line of the entry scripts: parsing, the prompt for the data set, exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import Any, NoReturn, TypeVar

import process
from config import (
    ALL_CONFIGS,
    DATASET_CODES,
    DATASET_KEYS,
    IGNORED_FLAGS,
    UNUSED_FLAGS,
    CommonConfig,
)
from distributed import is_main, joined, leave, rank, size
from errors import ArgumentError, UserError
from flags import boolean, boolean_or_auto, flags_of

ConfigT = TypeVar("ConfigT", bound=CommonConfig)
Settings = dict[str, Any]
Main = Callable[[Sequence[str] | None], None]


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error as a ``UserError``."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UserError(message.removeprefix("argument "))


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that select a finished run and say where its data and model are now."""
    parser.add_argument("--run", required=True, metavar="DIR", help="a finished run")
    parser.add_argument("--data_root", help="folder of raw data (default: the run's)")
    parser.add_argument("--cache_root", help="folder of preprocessed data (default: the run's)")
    parser.add_argument("--llm_base_model", help="the language model (default: the run's)")


def parse(
    config: type[ConfigT],
    argv: Sequence[str] | None,
    description: str | None,
    *,
    preset: Callable[[Settings], Settings] = lambda given: {},
    inherit: Callable[[Settings], Settings] = lambda given: {},
) -> ConfigT:
    """Read the command line into a config.

    The flags of the other scripts are accepted and ignored with a note, so that one list of flags
    serves all scripts. If no data set is given, a user at a terminal is asked for it.

    Args:
        config: the dataclass to fill.
        argv: words of the command line, ``sys.argv`` if None.
        description: first lines of ``--help``.
        preset: maps the given flags, data set included, to values that replace the defaults.
        inherit: maps the given flags to values that replace the preset's.

    Raises:
        UserError: a flag is unknown, malformed or out of range, or there is no data set.
    """
    own = flags_of(config)
    foreign = {
        name: spec
        for other in ALL_CONFIGS
        for name, spec in flags_of(other).items()
        if name not in own
    }
    words = vars(_parser(own, foreign, description).parse_args(argv))
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in words.items()
        if name not in foreign and name not in IGNORED_FLAGS
    }
    given = inherit(given) | given
    if given.get("dataset_code") is None:
        given["dataset_code"] = _ask_for_dataset()
    settings = config(**{**preset(given), **given})
    _note_unused(words, {*foreign, *IGNORED_FLAGS, *_unused_flags(settings)})
    return settings


def _parser(own: dict[str, Field], foreign: dict[str, Field], description: str | None) -> Parser:
    """Build a parser of a script's own flags; foreign ones are hidden from ``--help``."""
    parser = Parser(
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    general = parser.add_argument_group("general")
    special = parser.add_argument_group("this stage")
    common = flags_of(CommonConfig)
    for name, spec in own.items():
        _add_flag(general if name in common else special, name, spec)
    for name, spec in foreign.items():
        _add_flag(parser, name, spec).help = argparse.SUPPRESS
    for name in IGNORED_FLAGS:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add_flag(parser: Any, name: str, spec: Field) -> argparse.Action:
    meta = spec.metadata
    names = [f"--{name}"] + ([f"--{meta['alias']}"] if "alias" in meta else [])
    options: Settings = {"nargs": "+"} if meta.get("many") else {}
    if "choices" in meta:
        options["choices"] = meta["choices"]
    elif meta["type"] in (boolean, boolean_or_auto):
        words = "true|false" if meta["type"] is boolean else "auto|true|false"
        options |= {"nargs": "?", "const": True, "metavar": words}
    else:
        options["metavar"] = name.rsplit("_", 1)[-1].upper()
    return parser.add_argument(
        *names,
        dest=name,
        type=meta["type"],
        default=argparse.SUPPRESS,
        help=_help(spec),
        **options,
    )


def _help(spec: Field) -> str:
    default = spec.default
    if default is None:
        text = spec.metadata["help"]
    else:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        if isinstance(default, bool):
            shown = str(default).lower()
        text = f"{spec.metadata['help']} (default: {shown!s})"
    return text.replace("%", "%%").replace("\n", "\\n")


def _ask_for_dataset() -> str:
    codes = ", ".join(DATASET_CODES)
    if not sys.stdin.isatty() or size() > 1:
        raise UserError(f"--dataset_code is missing: choose one of {codes}")
    try:
        choice = input("Data set: 1 for ml-100k, b for beauty, g for games: ").strip()
    except EOFError:
        raise UserError(f"no data set was chosen: pass --dataset_code, one of {codes}") from None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)  # nothing was started that could be resumed
    code = DATASET_KEYS.get(choice, choice)
    if code not in DATASET_CODES:
        raise UserError(f"'{choice}' is not a data set: type 1, b or g, or one of {codes}")
    return code


def _unused_flags(settings: CommonConfig) -> set[str]:
    """Flags that other settings leave without an effect."""
    return {
        name
        for (flag, value), names in UNUSED_FLAGS.items()
        if getattr(settings, flag, None) == value
        for name in names
    }


def _note_unused(words: Settings, unused: set[str]) -> None:
    names = [f"--{name}" for name in words if name in unused]
    if names:
        print(f"note: no effect on this run: {' '.join(names)}", file=sys.stderr)


def run_main(main: Main, *, can_resume: bool = True) -> None:
    """Run an entry script.

    A mistake of the user is printed as one line on stderr, with exit status 2. Ctrl-C exits with
    status 130, SIGTERM with 143.

    Args:
        main: the script; it receives None, for ``sys.argv``.
        can_resume: whether an interrupted run can be resumed.
    """
    process.set_up()
    try:
        with joined():
            main(None)
        process.check_output()
        leave()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = _user_message(error)
        if message is None:
            raise
        where = "" if is_main() else f" in process {rank()}"
        print(f"error{where}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        # Deleting a progress bar that the signal left half constructed would print an error.
        sys.unraisablehook = lambda _: None
        advised = "to continue, run the same command with --resume and without --overwrite"
        if is_main():
            print(f"interrupted: {advised}" if can_resume else "interrupted", file=sys.stderr)
        sys.exit(143 if isinstance(error, process.Terminated) else 130)


def _user_message(error: Exception) -> str | None:
    """Message for the user, or None if the error is a bug of the program."""
    if isinstance(error, ArgumentError):
        return f"--{error}"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    out_of_memory = ("allocate memory", "out of memory")  # torch on the CPU, on CUDA
    if isinstance(error, MemoryError) or any(words in str(error) for words in out_of_memory):
        return "out of memory: use a smaller model, smaller batches or fewer --num_workers"
    return None
