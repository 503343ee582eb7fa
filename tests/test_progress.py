"""Bars on a terminal, plain lines elsewhere."""

import fcntl
import io
import os
import pty
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

import pytest

import progress
from progress import ProgressBar, can_draw


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Time of the lines in seconds; the last line was at 0."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ProgressBar, "last_line", 0.0)
    yield now


class Terminal:
    """A terminal of a given width; ``output`` is what was written to it."""

    def __init__(self, columns: int, encoding: str = "utf-8") -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.file: TextIO = os.fdopen(slave, "w", encoding=encoding)

    def output(self) -> str:
        self.file.close()
        text = b""
        with suppress(OSError):  # how Linux says that all has been read
            while part := os.read(self.master, 1 << 16):
                text += part
        os.close(self.master)
        return text.decode()


def train(file: TextIO, clock: list[float], *, seconds: float) -> None:
    """Five steps, and a validation of two batches after the third."""
    with ProgressBar(total=5, desc="train", unit="step", file=file) as bar:
        for step in range(1, 6):
            clock[0] += seconds
            bar.update()
            bar.set_postfix_str(f"loss {step}")
            if step == 3:
                for _ in ProgressBar(range(2), desc="validate", leave=False, file=file):
                    clock[0] += seconds
                bar.write("step 3: validated", file=file)


def test_lines_in_a_log(clock: list[float]):
    log = io.StringIO()
    train(log, clock, seconds=12)  # lines at 36, then 30 s after each line or message
    lines = log.getvalue().splitlines()
    assert [line.split(" [")[0] for line in lines] == [
        "train:  60% 3/5", "step 3: validated",
    ]  # fmt: skip
    assert "loss 3" in lines[0]
    assert not set("\r\x1b") & set(log.getvalue()) and log.getvalue().endswith("validated\n")


def test_a_line_at_most_every_30_seconds(clock: list[float]):
    log = io.StringIO()
    for _ in ProgressBar(range(100), desc="score", mininterval=0, miniters=1, file=log):
        clock[0] += 1
    lines = log.getvalue().splitlines()
    assert [line.split(" [")[0] for line in lines] == [
        "score:  30% 30/100", "score:  60% 60/100", "score:  90% 90/100",
    ]  # fmt: skip


def test_without_a_total(clock: list[float]):
    log = io.StringIO()
    with ProgressBar(desc="recommend", unit="user", unit_scale=True, file=log) as bar:
        clock[0] += 40
        bar.update(2000)
        bar.refresh()
    assert log.getvalue().startswith("recommend: 2.00kuser [")
    assert log.getvalue().count("\n") == 1


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, clock: list[float]):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(60)
    train(terminal.file, clock, seconds=1)
    text = terminal.output().replace("\x1b[A", "\r")
    assert "█" in text and "step 3: validated" in text
    assert all(len(part) <= 60 for part in text.replace("\n", "\r").split("\r"))


def test_a_terminal_without_unicode(monkeypatch: pytest.MonkeyPatch, clock: list[float]):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(60, "ascii")
    train(terminal.file, clock, seconds=1)
    text = terminal.output()
    assert text.isascii() and "#" in text


@pytest.mark.parametrize(("columns", "name"), [(0, "xterm"), (60, "dumb")])
def test_a_terminal_that_cannot_redraw(
    columns: int, name: str, monkeypatch: pytest.MonkeyPatch, clock: list[float]
):
    monkeypatch.setenv("TERM", name)
    terminal = Terminal(columns)
    train(terminal.file, clock, seconds=12)
    text = terminal.output().replace("\r\n", "\n")  # the terminal's own line ends
    assert "3/5" in text and not set("\r\x1b") & set(text)


def test_no_color(monkeypatch: pytest.MonkeyPatch, clock: list[float]):
    """Bars have no color at all; the only escape moves the cursor up."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal(60)
    train(terminal.file, clock, seconds=1)
    assert "\x1b" not in terminal.output().replace("\x1b[A", "")


def test_can_draw_on_no_stream():
    assert not can_draw(io.StringIO())
    with open(os.devnull) as file:
        assert not can_draw(file)
    assert not can_draw(file)  # closed


def test_the_hub_can_use_it(clock: list[float], monkeypatch: pytest.MonkeyPatch):
    """Before version 2.0, the hub's library passes names of its own bars."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    ProgressBar(desc="files", name="huggingface_hub.snapshot_download", disable=True).close()
