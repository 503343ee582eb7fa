"""Merged data for other libraries: RecBole's atomic files and SELFRec's text files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from datasets import SequenceDataset
from storage import atomic_folder

# What pandas, with which RecBole reads, takes for a missing value.
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip


def _sequences(data: SequenceDataset) -> Iterator[tuple[int, np.ndarray]]:
    """Each user with all items in their order; the last two are held out."""
    for user in range(data.num_users):
        yield user, data.item_ids[data.offsets[user] : data.offsets[user + 1]]


def _write(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def _field(text: str) -> str:
    """A text as a field of a tab-separated file, without the marks that would quote it."""
    return " ".join(text.replace('"', "'").split())


def _identifiers(names: Sequence[str]) -> list[str]:
    """Names as fields, or numbers if a reader would take two of them for one or one for none."""
    fields = [_field(name) for name in names]
    if len(set(fields)) == len(fields) and MISSING.isdisjoint(fields):
        return fields
    return [str(number) for number in range(1, len(fields) + 1)]


def export(data: SequenceDataset, folder: Path, name: str) -> None:
    """Write a data set's files for other libraries, all or none.

    - ``recbole/<name>/<name>.inter`` and ``.item``: users and items by their own identifiers, or by
      their numbers from 1 where identifiers could be mistaken; the timestamp is the place in the
      user's sequence, so that RecBole's leave-one-out gives our split.
    - ``selfrec/train.txt`` and ``test.txt``, a line ``user item 1`` an interaction, and
      ``sequences_train.txt`` and ``sequences_test.txt``, a line ``user:item item ...`` a user: by
      their numbers. Training is the training part, the test the last item.

    Args:
        data: the data set, with written interactions merged in.
        folder: takes the place of what is there.
        name: the data set's name.
    """
    users = _identifiers(data.user_names)
    items = ["", *_identifiers(data.item_names[1:])]
    with atomic_folder(folder) as temporary:
        recbole, selfrec = temporary / "recbole" / name, temporary / "selfrec"
        recbole.mkdir(parents=True)
        selfrec.mkdir()
        rows = (
            f"{users[user]}\t{items[item]}\t{place}"
            for user, sequence in _sequences(data)
            for place, item in enumerate(sequence)
        )
        _write(recbole / f"{name}.inter", ["user_id:token\titem_id:token\ttimestamp:float", *rows])
        titles = (f"{item}\t{_field(title)}" for item, title in zip(items[1:], data.titles[1:]))
        _write(recbole / f"{name}.item", ["item_id:token\ttitle:token_seq", *titles])
        for split, part in (("train", slice(None, -2)), ("test", slice(-1, None))):
            pairs = [(user, sequence[part]) for user, sequence in _sequences(data)]
            _write(
                selfrec / f"{split}.txt",
                (f"{user} {item} 1" for user, chosen in pairs for item in chosen),
            )
            _write(
                selfrec / f"sequences_{split}.txt",
                (f"{user}:{' '.join(map(str, chosen))}" for user, chosen in pairs),
            )
