"""Progress of long loops: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0  # shortest time between two lines in a log


def can_draw(stream: Any) -> bool:
    """Whether a stream is a terminal that can redraw a line and knows its size."""
    try:
        is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        return is_terminal and all(os.get_terminal_size(stream.fileno()))
    except (OSError, ValueError):  # closed, or not a file
        return False


class ProgressBar(tqdm):
    """A bar of tqdm on a terminal.

    Where it cannot be drawn, as in a log, a plain line is written instead, at most every
    ``LINE_SECONDS`` over all bars and messages (``write``).

    Args:
        iterable: what to loop over, or None to call ``update``.
        name: ignored; versions of the hub's library before 2.0 pass it.
        options: further arguments of ``tqdm``.
    """

    last_line = time.monotonic()

    def __init__(self, iterable: Any = None, *, name: str | None = None, **options: Any) -> None:
        self.drawn = can_draw(options.get("file") or sys.stderr)
        # tqdm omits the bar, and leaves the numbers, if the width is 0.
        options |= {"dynamic_ncols": True} if self.drawn else {"ncols": 0}
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar, or write a line if one is due."""
        if self.drawn:
            return super().display(msg, pos)
        started = self.n > self.initial and not self.disable
        if started and time.monotonic() - ProgressBar.last_line >= LINE_SECONDS:
            self.fp.write(f"{self}\n")
            self.fp.flush()
            ProgressBar.last_line = time.monotonic()
        return None

    def clear(self, nolock: bool = False) -> None:
        """Remove the bar from the terminal; a line stays."""
        if self.drawn:
            super().clear(nolock)

    def close(self) -> None:
        """End the bar."""
        if not self.drawn:
            self.last_print_t = 0.0  # as if nothing had been drawn, so that nothing is cleared
        super().close()

    @classmethod
    def write(cls, s: str, *args: Any, **options: Any) -> None:
        """Print a message, above the bars if there are any."""
        super().write(s, *args, **options)
        ProgressBar.last_line = time.monotonic()
