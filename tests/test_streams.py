"""Scripts whose standard streams are closed, full, or of a narrow encoding."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, toy_interactions

FULL = Path("/dev/full")


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell command in a folder; ``python`` is this interpreter."""
    command = command.replace("python ", f"{sys.executable} {ROOT}/")
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with custom data, named with a letter that ASCII lacks."""
    folder = tmp_path_factory.mktemp("donnees") / "données"
    folder.mkdir()
    rows = toy_interactions()
    lines = "".join(f"{u},{i},{t}\n" for u, i, t in rows)
    (folder / "log.csv").write_text("user,item,timestamp\n" + lines)
    titles = "".join(f"{item},The {item} Story\n" for item in sorted({row[1] for row in rows}))
    (folder / "items.csv").write_text("item,title\n" + titles)
    return folder


TRAIN = (
    "python train_retriever.py --dataset_code custom --interactions log.csv --items items.csv "
    "--cache_root cache --device cpu --max_steps 3 --val_iterations 3 --overwrite --export_root "
)


@pytest.mark.parametrize(
    ("name", "streams"),
    [
        ("reader", "| head -1; exit ${PIPESTATUS[0]}"),
        ("closed", ">&- 2>&- <&-"),
        ("quiet", "2>&-"),
        ("terminal", "> out.txt"),
    ],
)
def test_training_goes_on(name: str, streams: str, folder: Path):
    done = shell(f"export PYTHONIOENCODING=ascii; {TRAIN} {folder}/{name} {streams}", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / name / "test_metrics.json").exists()
    if name == "terminal":
        assert f"written to {folder}".encode("ascii", "backslashreplace").decode() in (
            folder / "out.txt"
        ).read_text(encoding="ascii")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_lost_output_is_reported(folder: Path):
    done = shell(f"{TRAIN} {folder}/full > {FULL}", folder)
    assert done.returncode == 2
    expected = "error: standard output cannot be written: No space left on device"
    assert done.stderr.splitlines()[-1] == expected
    assert (folder / "full" / "test_metrics.json").exists()


def test_no_answer_at_the_prompt(folder: Path):
    done = shell("python train_retriever.py <&-", folder)
    assert done.returncode == 2 and "--dataset_code is missing" in done.stderr
