"""The documents: links lead somewhere, commands are right, pictures are what scripts draw."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli
import export_run
import recommend
import report
from config import (
    AugmentationConfig,
    RankerConfig,
    RetrieverConfig,
    ranker_preset,
    retriever_preset,
)
from tests.helpers import ROOT, run_script

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PICTURES = sorted((ROOT / "docs" / "images").glob("*.svg"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_own_data_of_ten_lines(tmp_path: Path):
    text = (ROOT / "docs" / "own-data.md").read_text()
    log, titles = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "titles.csv").write_text(titles)
    flags = next(commands(ROOT / "docs" / "own-data.md"))[1:]
    done = run_script("train_retriever.py", *flags, "--cache_root", "cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "experiments" / "lru").iterdir()
    assert (
        len(log.splitlines()) == 1 + 10
        and f"recommend.py --run experiments/smollm2-135m/{run.name}" in text
    )


PLACEHOLDERS = {"X": "games", "$seed": "42"}


def commands(page: Path) -> Iterator[list[str]]:
    """Words of the commands that run a script in the shell blocks of a page."""
    for block in re.findall(
        r"^```(?:bash)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.strip().removeprefix("$ ")
            if command.startswith("python "):
                words = shlex.split(command, comments=True)[1:]
                yield [PLACEHOLDERS.get(word, word) for word in words]


# Commands at a given commit, in docs/results, may have flags of that commit.
COMMANDS = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}")
    for page in PAGES
    if page.parent.name != "results"
    for words in commands(page)
]


def parse_as_usual(script: str, flags: list[str]) -> object:
    """Parse flags as the script does, in a place where no run exists."""
    if script == "train_retriever.py":
        return cli.parse(RetrieverConfig, flags, "", preset=retriever_preset, inherit=any_data)
    if script == "train_ranker.py":
        return cli.parse(RankerConfig, flags, "", preset=ranker_preset, inherit=any_data)
    if script == "augment_data.py":
        return cli.parse(AugmentationConfig, flags, "", inherit=any_data)
    parsers = {"recommend": recommend.parse, "report": report.parse, "export_run": export_run.parse}
    return parsers[script.removesuffix(".py")](flags)


def any_data(given: dict[str, object]) -> dict[str, object]:
    """A data set where the script would ask for one or take a retriever's."""
    return {} if "dataset_code" in given else {"dataset_code": "games"}


def test_there_are_commands():
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("words", COMMANDS)
def test_commands(words: list[str], capsys: pytest.CaptureFixture[str]):
    if words[0] == "-m":
        assert (ROOT / words[1].replace(".", "/")).with_suffix(".py").exists()
        return
    parse_as_usual(words[0], words[1:])
    assert not capsys.readouterr().err, "a flag has no effect"


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.stem)
def test_pictures_are_those_of_their_scripts(picture: Path):
    script = picture.with_name(picture.stem.replace("-", "_") + ".py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == picture.read_text()


def test_the_website_has_every_page():
    index = (ROOT / "docs" / "index.rst").read_text()
    listed = {line.strip() for line in index.splitlines() if line.startswith("   ")}
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    pages = {page.removesuffix(".md") for page in pages if not page.startswith("_")}
    assert pages <= listed
