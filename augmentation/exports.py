"""Data sets in the formats of other libraries: RecBole, SELFRec and OpenP5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from augmentation.merge import Interactions, merge
from datasets import SequenceDataset
from storage import atomic_folder

EXPORTS = "exports"

# Fields that pandas, which RecBole uses, reads as missing values.
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip


def _sequences(data: SequenceDataset) -> Iterator[tuple[int, np.ndarray]]:
    """Each user with all items (l,) in chronological order, the two held-out ones last."""
    for user in range(data.num_users):
        yield user, data.item_ids[data.offsets[user] : data.offsets[user + 1]]


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def _field(text: str) -> str:
    """Text as a field of a tab-separated file, with single quotes in place of double ones."""
    return " ".join(text.replace('"', "'").split())


def _identifiers(names: Sequence[str]) -> list[str]:
    """Names as fields, or numbers from 1 if any coincide or would be read as missing."""
    fields = [_field(name) for name in names]
    if len(set(fields)) == len(fields) and MISSING.isdisjoint(fields):
        return fields
    return [str(number) for number in range(1, len(fields) + 1)]


def export(data: SequenceDataset, folder: Path, name: str) -> None:
    """Write the files of a data set for other libraries, replacing ``folder``.

    - ``recbole/<name>/<name>.inter`` and ``.item``, with the data set's own user and item names,
      or numbers from 1 where names are ambiguous. The timestamp is the position in the user's
      sequence, so that RecBole's leave-one-out reproduces our split.
    - ``selfrec/train.txt`` and ``test.txt``, one interaction ``user item 1`` per line, and
      ``sequences_train.txt`` and ``sequences_test.txt``, one user ``user:item item ...`` per line,
      with user indices from 0 and item ids from 1. The test part is the last item; the validation
      item is in neither. SELFRec's graph models read the first two files, its sequential models
      the other two.
    - ``openp5/<name>/user_sequence.txt``, one user ``user item item ...`` per line, with the same
      numbers. OpenP5 holds out the last two items itself.

    Args:
        data: the data set, with generated interactions merged in.
        folder: the folder to write.
        name: name of the data set.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_folder(folder) as temporary:
        _write_recbole(data, temporary / "recbole" / name, name)
        _write_selfrec(data, temporary / "selfrec")
        _write_openp5(data, temporary / "openp5" / name)


def export_merged(data: SequenceDataset, interactions: Interactions, run_dir: Path) -> None:
    """Write the exports of a run: the data set, generated interactions before the real ones."""
    # The suffix matters: RecBole downloads its own data when asked for ml-100k.
    export(merge(data, interactions, "before"), run_dir / EXPORTS, f"{data.code}-augmented")


def _write_recbole(data: SequenceDataset, folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    users = _identifiers(data.user_names)
    items = ["", *_identifiers(data.item_names[1:])]
    interactions = (
        f"{users[user]}\t{items[item]}\t{position}"
        for user, sequence in _sequences(data)
        for position, item in enumerate(sequence)
    )
    header = "user_id:token\titem_id:token\ttimestamp:float"
    _write_lines(folder / f"{name}.inter", [header, *interactions])
    titles = (f"{item}\t{_field(title)}" for item, title in zip(items[1:], data.titles[1:]))
    _write_lines(folder / f"{name}.item", ["item_id:token\ttitle:token_seq", *titles])


def _write_selfrec(data: SequenceDataset, folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, part in (("train", slice(None, -2)), ("test", slice(-1, None))):
        parts = [(user, sequence[part]) for user, sequence in _sequences(data)]
        pairs = (f"{user} {item} 1" for user, items in parts for item in items)
        _write_lines(folder / f"{split}.txt", pairs)
        sequences = (f"{user}:{' '.join(map(str, items))}" for user, items in parts)
        _write_lines(folder / f"sequences_{split}.txt", sequences)


def _write_openp5(data: SequenceDataset, folder: Path) -> None:
    folder.mkdir(parents=True)
    lines = (f"{user} {' '.join(map(str, sequence))}" for user, sequence in _sequences(data))
    _write_lines(folder / "user_sequence.txt", lines)
