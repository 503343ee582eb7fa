"""Random command lines: every flag of every script, with values of all kinds.

Most run in this process with the work behind the checks left out; some run as a user would start
them, with a limit on memory and on time.
"""

import argparse
import contextlib
import io
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from config import ALL_CONFIGS
from errors import UserError
from flags import flags_of
from tests.faults.conftest import (
    AUGMENTATION,
    MAINS,
    RANKER,
    RETRIEVER,
    TABLE,
    assert_all_complete,
    assert_answered,
    run_here,
    working_directory,
)
from tests.helpers import ROOT

MEMORY = 8 << 30  # of an address space
SECONDS = 60
NO_NETWORK = {
    "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
    "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
# Beginnings from which most commands get further than to their first mistake.
BEGINNINGS: dict[str, list[list[str]]] = {
    "train_retriever.py": [RETRIEVER],
    "train_ranker.py": [RANKER, [word if word != "titles" else "letters" for word in RANKER]],
    "augment_data.py": [AUGMENTATION, [*AUGMENTATION, "--reuse", "augmented"]],
    "recommend.py": [
        ["recommend.py", "--run", "retriever"],
        ["recommend.py", "--run", "ranker", "--user", "u3"],
        ["recommend.py", "--run", "retriever", "--history", "the i3 story"],
        [word if word != "table" else "new_table" for word in TABLE],
        [*TABLE, "--resume"],
    ],
    "export_run.py": [["export_run.py", "--run", "ranker", "--output", "exported"]],
    "report.py": [
        ["report.py", "--experiment_root", "."],
        ["report.py", "--compare", "ranker", "retriever"],
    ],
}
NAMES = [
    "log.csv", "titles.csv", "users.csv", "model", "retriever", "ranker", "augmented", "half",
    "half_ranker", "half_augmented", "half_table", "table", "cache", "absent", "log.csv/x", ".",
    "..", "new", "new/er", "/dev/null", "/dev/null/x", "~", "é/日本語", "\udcff", "a\nb", " ",
    "x" * 300, "retriever/model.safetensors", "model/config.json",
]  # fmt: skip
WORDS = [
    "", "0", "1", "2", "3", "20", "-1", "1.5", "0.5", "1e-300", "1e308", "-0", "+7", "1_0", "٣",
    "nan", "inf", "-inf", "2147483647", "2147483648", "9" * 400, "true", "FALSE", "None", "null",
    "--", "-", "--lr", "{}", "{} {}", "{0} {}", "%s", "%", "\x1b[2J", "x" * 5000, "NDCG@10",
    "Recall@5", "MRR@0", "NDCG@" + "9" * 30, "u1", "i1", "The i1 Story; the i2 story", ";",
    "cpu", "cuda", "letters", "mixed", "tuned", "always", "a/b", "a/b@c", "q_proj",
]  # fmt: skip
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
values = st.one_of(
    st.sampled_from(WORDS), st.sampled_from(NAMES), texts, st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip


def shown_flags(script: str) -> list[str]:
    """All flags that a script's ``--help`` shows."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        MAINS[script](["--help"])
    return sorted(set(re.findall(r"^  (--\w+)", shown.getvalue(), re.MULTILINE)) - {"--help"})


def accepted_words() -> dict[str, list[str]]:
    """The words that the type of each flag accepts, for those of the training scripts."""
    accepted = {}
    for name, spec in itertools.chain.from_iterable(flags_of(c).items() for c in ALL_CONFIGS):
        words = []
        for word in (*WORDS, *NAMES, *map(str, spec.metadata.get("choices", ()))):
            with contextlib.suppress(argparse.ArgumentTypeError):
                value = spec.metadata["type"](word)
                if value in spec.metadata.get("choices", [value]):
                    words.append(word)
        accepted[f"--{name}"] = words
    return accepted


ACCEPTED = accepted_words()
FLAGS = {script: shown_flags(script) for script in MAINS}
ALL_FLAGS = sorted(set(itertools.chain(*FLAGS.values())))


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A script and its words, most of a type that the flag accepts."""
    script = draw(st.sampled_from(list(MAINS)))
    command = draw(st.sampled_from([*BEGINNINGS[script] * 4, [script]]))
    flags = st.sampled_from([*FLAGS[script] * 8, *ALL_FLAGS, "--help", "--absent", "--"])
    for _ in range(draw(st.integers(1, 4))):
        flag = draw(flags)
        if draw(st.integers(0, 4)) and flag in ACCEPTED:
            words = [draw(st.sampled_from(ACCEPTED[flag]))]
        else:
            words = draw(st.lists(values, max_size=2))
        command = [*command, flag, *words]
    return command


def leave_out(*_: object, **__: object) -> None:
    """Stands for the work of a script."""


def download(*_: object, **__: object) -> None:
    raise UserError("cannot download anything in a test")


def empty_folders(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]


def check_command(command: list[str], run: Callable, place: Path, folder: Path) -> int:
    """Run a command line in a copy of the working directory; returns the exit status."""
    shutil.copytree(place, folder / "here")
    try:
        with working_directory(folder / "here"):
            status, errors = run(command)
        assert_answered(command, status, errors)
        assert_all_complete(folder)
        assert not empty_folders(folder), command
    finally:
        shutil.rmtree(folder)
    return status


def run_parts(command: list[str]) -> tuple[int, str]:
    """Run a command line without the work behind its checks."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "recipes.fit_retriever.train", "recipes.search.search", "recipes.fit_ranker.train",
            "recipes.augment.augment", "reporting.figures.draw",
        ):  # fmt: skip
            patch.setattr(name, leave_out)
        patch.setattr("recipes.export.export_retriever", leave_out)
        patch.setattr("torch.export.save", lambda _, path: path.write_bytes(b""))
        patch.setattr("downloads._fetch", download)
        patch.setattr("model.hub.fetch_wheel", download)
        patch.setattr("datasets.movielens.fetch_wheel", download)
        return run_here(command)


def run_process(command: list[str]) -> tuple[int, str]:
    """Run a command line in a process with limits, which Ctrl-C ends when its time is over."""

    def limit() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    script, *words = command
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | NO_NETWORK,
        preexec_fn=limit,
    )
    try:
        _, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    return 0 if process.returncode == 130 else process.returncode, errors


def sweep(count: int, first: int, run: Callable, place: Path, folder: Path) -> None:
    """Check ``count`` command lines, which a number decides."""
    cases = itertools.count()

    @seed(first)
    @settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(command_lines())
    def check(command: list[str]) -> None:
        check_command(command, run, place, folder / str(next(cases)))

    check()


def test_some_command_lines(place: Path, tmp_path: Path):
    sweep(100, 0, run_parts, place, tmp_path)


def test_some_processes(place: Path, tmp_path: Path):
    sweep(2, 1, run_process, place, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10))
def test_many_command_lines(first: int, place: Path, tmp_path: Path):
    sweep(200, 2 + first, run_parts, place, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(4))
def test_many_processes(first: int, place: Path, tmp_path: Path):
    sweep(25, 12 + first, run_process, place, tmp_path)
