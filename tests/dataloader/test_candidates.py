"""Candidate files: every value survives, and every inconsistency is found."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from dataloader.candidates import (
    CANDIDATES_FILE,
    SPLITS,
    Candidates,
    load_candidates,
    save_candidates,
)
from errors import InputError, UserError
from tests.helpers import make_data

DATA = make_data([5, 8, 3])  # 30 items
NUM_USERS, NUM_CANDIDATES = 3, 5
Arrays = dict[str, np.ndarray]
any_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_valid(path: Path) -> Arrays:
    """Write candidates for ``DATA``, targets first, and return the file's arrays."""
    splits = {}
    for split in SPLITS:
        targets = DATA.targets(split).astype(np.int32)
        items = np.stack([(target - 1 + np.arange(NUM_CANDIDATES)) % 30 + 1 for target in targets])
        scores = np.tile(-np.arange(NUM_CANDIDATES, dtype=np.float32), (NUM_USERS, 1))
        splits[split] = Candidates(items.astype(np.int32), scores, targets, targets * 0 + 1)
    save_candidates(path, splits, DATA.fingerprint)
    with np.load(path) as file:
        return dict(file)


@any_folder
@given(st.lists(st.integers(3, 30), min_size=1, max_size=8), st.integers(0, 1000))
def test_round_trip(tmp_path: Path, lengths: list[int], seed: int):
    data = make_data(lengths, seed=seed)
    rng = np.random.default_rng(seed)
    splits = {}
    for split in SPLITS:
        targets = data.targets(split).astype(np.int32)
        items = np.stack([rng.permutation(30)[:5] + 1 for _ in lengths]).astype(np.int32)
        hits = items == targets[:, None]
        ranks = np.where(hits.any(1), hits.argmax(1) + 1, 6).astype(np.int32)
        scores = -np.sort(rng.random((len(lengths), 5)), axis=1).astype(np.float32)
        splits[split] = Candidates(items, scores, targets, ranks)
        assert splits[split].retrieved.tolist() == np.flatnonzero(hits.any(1)).tolist()
    save_candidates(tmp_path / CANDIDATES_FILE, splits, data.fingerprint)
    loaded = load_candidates(tmp_path / CANDIDATES_FILE, data)
    assert list(loaded) == list(SPLITS)
    for split, expected in splits.items():
        for ours, theirs in zip(loaded[split], expected):
            assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype


def test_file_is_the_documented_one(tmp_path: Path):
    arrays = write_valid(tmp_path / CANDIDATES_FILE)
    names = ("items", "scores", "labels", "label_ranks")
    expected = {f"{split}_{name}" for split in ("val", "test") for name in names}
    assert set(arrays) == {"fingerprint", *expected}
    assert arrays["val_items"].shape == arrays["val_scores"].shape == (3, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["candidates.npz"]


def test_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"candidates\.npz does not exist$"):
        load_candidates(tmp_path / CANDIDATES_FILE, DATA)


def test_other_data(tmp_path: Path):
    write_valid(tmp_path / CANDIDATES_FILE)
    with pytest.raises(InputError, match=r"candidates\.npz belongs to other data than test"):
        load_candidates(tmp_path / CANDIDATES_FILE, replace(DATA, fingerprint="other"))


def with_value(row: int, column: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[row, column] = value
        return array

    return change


def repeated(items: np.ndarray) -> np.ndarray:
    items[1, 1] = items[1, 0]
    return items


def without_target(items: np.ndarray) -> np.ndarray:
    items[:, 0] = items[:, -1] % 30 + 1
    return items


@pytest.mark.parametrize(
    "problem, name, change",
    [
        (r"items have shape \(2, 5\), not \(3, candidates\)", "items", lambda x: x[:2]),
        (r"items have shape \(3, 1\), not", "items", lambda x: x[:, :1]),
        (r"items have shape \(\), not", "items", lambda x: np.int32(7)),
        (r"scores have shape \(3, 4\), not \(3, 5\)", "scores", lambda x: x[:, :4]),
        (r"labels and label ranks must have shape \(3,\)", "labels", lambda x: x[:2]),
        (r"labels and label ranks must have shape", "label_ranks", lambda x: x[:, None]),
        ("labels and label ranks must be integers", "items", lambda x: x + 0.5),
        ("labels and label ranks must be integers", "labels", lambda x: x.astype(float)),
        ("labels and label ranks must be integers", "label_ranks", lambda x: x.astype(str)),
        ("scores must be floating-point numbers", "scores", lambda x: x.astype(str)),
        ("scores must be floating-point numbers", "scores", lambda x: x.astype(int)),
        ("items must be from 1 to 30", "items", with_value(2, 3, 31)),
        ("items must be from 1 to 30", "items", with_value(2, 3, 0)),
        ("items contain the same item twice for a user", "items", repeated),
        ("scores do not descend", "scores", lambda x: x[:, ::-1]),
        ("scores do not descend", "scores", with_value(0, 4, np.nan)),
        ("labels are not the held-out items", "labels", lambda x: x % 30 + 1),
        ("label ranks must be from 1 to 30", "label_ranks", lambda x: x * 0),
        ("label ranks must be from 1 to 30", "label_ranks", lambda x: x * 31),
        ("label ranks disagree with the items", "label_ranks", lambda x: x * 6),
        (None, "items", without_target),
        (None, "scores", lambda x: np.where(x < -3, -np.inf, x)),
        (None, "label_ranks", lambda x: x.astype(np.int64)),
    ],
)
@pytest.mark.parametrize("split", SPLITS)
def test_values_are_checked(
    tmp_path: Path, split: str, problem: str | None, name: str, change: Callable
):
    path = tmp_path / CANDIDATES_FILE
    arrays = write_valid(path)
    key = f"{split}_{name}"
    np.savez(path, **(arrays | {key: change(arrays[key].copy())}))
    if problem is None:
        load_candidates(path, DATA)
    else:
        with pytest.raises(InputError, match=rf"candidates\.npz: {split} .*{problem}"):
            load_candidates(path, DATA)


@pytest.mark.parametrize("name", ["fingerprint", "val_items", "test_label_ranks"])
def test_missing_array(tmp_path: Path, name: str):
    path = tmp_path / CANDIDATES_FILE
    arrays = write_valid(path)
    arrays.pop(name)
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=rf"candidates\.npz is damaged .*{name}"):
        load_candidates(path, DATA)


def test_pickled_objects_are_refused(tmp_path: Path):
    path = tmp_path / CANDIDATES_FILE
    arrays = write_valid(path)
    np.savez(path, **(arrays | {"val_items": arrays["val_items"].astype(object)}))
    with pytest.raises(InputError, match="allow_pickle=False"):
        load_candidates(path, DATA)


# Any content ------------------------------------------------------------------------------------


def loads_or_refuses(path: Path) -> None:
    """A file loads with consistent values, or with a message of one line that names it."""
    try:
        loaded = load_candidates(path, DATA)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        for split, candidates in loaded.items():
            assert (candidates.labels == DATA.targets(split)).all()
            assert candidates.items.shape == candidates.scores.shape
            assert candidates.items.shape[0] == NUM_USERS


@any_folder
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes(tmp_path: Path, content: bytes, archive: bool):
    path = tmp_path / CANDIDATES_FILE
    if archive:
        with zipfile.ZipFile(path, "w") as zipped:
            for name in ("fingerprint", "val_items", "test_items", "val_scores"):
                zipped.writestr(f"{name}.npy", content)
    else:
        path.write_bytes(content)
    loads_or_refuses(path)


@any_folder
@given(st.data())
def test_any_changed_bytes(tmp_path: Path, data: st.DataObject):
    path = tmp_path / CANDIDATES_FILE
    write_valid(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    loads_or_refuses(path)


any_array = hypothesis_numpy.arrays(
    st.one_of(hypothesis_numpy.scalar_dtypes(), st.just(np.dtype([("a", "i4")]))),
    st.one_of(
        st.sampled_from([(3, 5), (3,), (3, 0)]),
        hypothesis_numpy.array_shapes(min_dims=0, max_side=4),
    ),
)


@any_folder
@given(st.data())
def test_any_arrays(tmp_path: Path, data: st.DataObject):
    path = tmp_path / CANDIDATES_FILE
    arrays = write_valid(path)
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=3)):
        arrays[name] = data.draw(any_array)
    np.savez(path, **arrays)
    loads_or_refuses(path)
