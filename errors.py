"""Exceptions for mistakes the user can fix.

Modules below the entry scripts know nothing of flags. They raise ``ArgumentError`` about one of
their own arguments, or ``InputError`` about a file or data. Their callers add the flag's name
(``flag_names``) or what to do (``advice``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake the user can fix. Entry scripts print it as one line and exit with status 2.

    The message may quote files and flags: line breaks and control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__("".join(shown))


class InputError(UserError):
    """A file or data that cannot be used; the message does not yet say what to do."""


class ArgumentError(InputError):
    """An argument with a value that cannot be used.

    Args:
        argument: the parameter's name.
        value: its value.
        problem: what is wrong with it.
    """

    def __init__(self, argument: str, value: object, problem: str) -> None:
        super().__init__(f"{argument} {value}: {problem}")
        self.argument, self.value, self.problem = argument, value, problem


@contextmanager
def flag_names(**flags: str) -> Iterator[None]:
    """Name the flag in place of the argument in any ``ArgumentError`` of the block.

    Args:
        flags: flag by argument, without dashes; arguments left out are named like their flag.

    Raises:
        UserError: the block raised an ``ArgumentError``.
    """
    try:
        yield
    except ArgumentError as error:
        flag = flags.get(error.argument, error.argument)
        raise UserError(f"--{flag} {error.value}: {error.problem}") from error


@contextmanager
def advice(text: str) -> Iterator[None]:
    """Append what to do to the message of any ``InputError`` of the block.

    Raises:
        UserError: the block raised an ``InputError``; an ``ArgumentError`` remains one.
    """
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(error.argument, error.value, f"{error.problem}; {text}") from error
    except InputError as error:
        raise UserError(f"{error}: {text}") from error
