"""What a run would take, without a trace of it."""

import re
from pathlib import Path

import pytest

import augment_data
import train_ranker
import train_retriever
from errors import UserError
from recipes.dry_run import duration
from tests.conftest import RANKERS
from tests.helpers import INPUT_TEMPLATE, contents


def words(*flags: object) -> list[str]:
    return [*map(str, flags), "--device", "cpu", "--dry_run"]


def numbers(output: str, pattern: str) -> tuple[str, ...]:
    found = re.search(pattern, output)
    assert found, output
    return found.groups()


def test_retriever(
    toy_flags: list, retrieved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = contents(retrieved)
    flags = [*toy_flags, "--train_batch_size", 16, "--max_steps", 1200, "--val_iterations", 500]
    train_retriever.main(words(*flags, "--export_root", retrieved, "--use_wandb"))
    output = capsys.readouterr().out
    assert "60 users, 40 items" in output
    assert numbers(output, r"\n  max_steps +(\S+)\n") == ("1200",)
    assert numbers(output, r"\n  export_root +(\S+)\n") == (str(retrieved),)
    assert "fingerprint  " not in output.replace("data_fingerprint", "")
    assert "steps: 1,200 of 16 examples, 4 an epoch\n" in output
    assert numbers(output, r"time: about .* \(training .*, (\S+) validations") == ("3",)
    assert float(numbers(output, r"memory: (\S+) GiB")[0]) > 0.1
    assert output.endswith("Nothing was written but downloads and caches.\n")
    assert contents(retrieved) == before


@pytest.mark.parametrize("name", list(RANKERS))
def test_ranker(
    name: str,
    retrieved: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    before = sorted(retrieved.rglob("*"))
    train_ranker.main(
        words(
            "--llm_retrieved_path", retrieved, "--llm_base_model", tiny_llama, *RANKERS[name],
            "--experiment_root", tmp_path / "runs",
        )
    )  # fmt: skip
    output = capsys.readouterr().out
    median, longest = numbers(output, r"tokens a prompt: median (\S+), at most (\S+)\n")
    assert 20 < int(median) <= int(longest) < 1536
    assert numbers(output, r"\n  llm_base_model +(\S+)\n") == ("tiny-llama",)
    assert numbers(output, r"\n  llm_input_template +(.*)\n") == (
        INPUT_TEMPLATE.replace("\n", "\\n"),
    )
    assert ("before: 2 retrievers" in output) == (name == "guided")
    assert not (tmp_path / "runs").exists() and sorted(retrieved.rglob("*")) == before


def test_refused(toy_flags: list):
    with pytest.raises(UserError, match=r"--dry_run: augment_data\.py cannot estimate a run"):
        augment_data.main(words(*toy_flags))
    with pytest.raises(UserError, match="--dry_run shows a single run: leave out --search"):
        train_retriever.main(words(*toy_flags, "--search"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012 s"), (59, "59 s"), (100, "2 min"), (3599, "1 h 0 min"), (9000, "2 h 30 min")],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text
