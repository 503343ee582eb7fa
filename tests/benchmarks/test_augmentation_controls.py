"""Controls for generated interactions: as many per user, none that the user has."""

import json
from pathlib import Path

import numpy as np
import pytest

from augmentation.merge import load_augmented, save_augmented
from augmentation.prompts import training_history
from benchmarks import augmentation_controls
from benchmarks.augmentation_controls import draw
from datasets import SequenceDataset
from errors import UserError
from tests.augmentation.helpers import random_interactions
from tests.benchmarks.helpers import assert_rows, result


@pytest.fixture()
def generated(toy: dict[str, Path], toy_data: SequenceDataset, tmp_path: Path) -> Path:
    """A folder that holds what the controls read of a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    files = {name: str(path) for name, path in toy.items()}
    settings = {"dataset_code": "custom", "cache_root": str(tmp_path / "cache"), **files}
    (folder / "config.json").write_text(json.dumps(settings))
    interactions = random_interactions(toy_data, 200, seed=0)
    save_augmented(folder / "augmented.npz", interactions, toy_data.fingerprint)
    return folder


@pytest.mark.parametrize("kind", ["generated", "popularity", "retriever"])
def test_controls_have_as_many_items_per_user(
    kind: str, generated: Path, toy_data: SequenceDataset, retrieved: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    output = tmp_path / "control"
    flags = ["--run", str(generated), "--kind", kind, "--output", str(output)]
    flags += ["--per_user", "3", "--shortest", "0.5"]
    if kind == "retriever":
        flags += ["--retriever", str(retrieved)]
    augmentation_controls.main(flags)
    assert_rows(result(capsys.readouterr().out), "augmentation_controls", "kind items users")
    first = load_augmented(output, toy_data)
    counts = np.bincount(load_augmented(generated, toy_data).users, minlength=60)
    lengths = np.diff(toy_data.offsets)
    shortest = np.argsort(lengths, kind="stable")[:30]
    expected = np.zeros(60, dtype=int)
    expected[shortest] = np.minimum(counts[shortest], 3)
    assert np.bincount(first.users, minlength=60).tolist() == expected.tolist()
    if kind != "generated":
        for user in shortest:
            items = first.items[first.users == user].tolist()
            assert len(set(items)) == len(items)
            assert not set(items) & set(training_history(toy_data, int(user)).tolist())
    augmentation_controls.main(flags)  # replaces its own output, with the same items
    again = load_augmented(output, toy_data)
    assert np.array_equal(again.items, first.items)


@pytest.mark.parametrize("per_user", [0, 1])
def test_exports_hold_the_real_items_and_the_added_ones(
    per_user: int, generated: Path, toy_data: SequenceDataset, tmp_path: Path
):
    output = tmp_path / "control"
    flags = ["--run", str(generated), "--kind", "generated", "--output", str(output)]
    augmentation_controls.main([*flags, "--per_user", str(per_user)])
    (interactions,) = (output / "exports" / "recbole").glob("*/*.inter")
    num_added = len(load_augmented(output, toy_data).items)
    assert num_added == per_user * len(set(load_augmented(generated, toy_data).users.tolist()))
    num_rows = len(interactions.read_text().splitlines()) - 1  # the header
    assert num_rows == len(toy_data.item_ids) + num_added


def test_draws_follow_the_weights():
    with np.errstate(divide="ignore"):
        weights = np.log([0, 6, 3, 1])
    rng = np.random.default_rng(0)
    firsts = [draw(weights, 1, rng)[0] for _ in range(2000)]
    shares = np.bincount(firsts, minlength=4) / len(firsts)
    assert np.allclose(shares, [0, 0.6, 0.3, 0.1], atol=0.04)
    assert sorted(draw(weights, 9, rng)) == [1, 2, 3]


def test_mistakes(generated: Path, tmp_path: Path):
    flags = ["--run", str(generated), "--output", str(tmp_path / "control"), "--kind"]
    with pytest.raises(UserError, match="--retriever belongs to --kind retriever"):
        augmentation_controls.main([*flags, "retriever"])
    with pytest.raises(UserError, match="the folder holds something else"):
        augmentation_controls.main([*flags, "popularity", "--output", str(tmp_path)])
