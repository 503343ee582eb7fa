"""RecBole on the exports of ``augment_data.py``: counts and leave-one-out splits.

RecBole's own leave-one-out split by timestamp must give our training part with the generated
interactions, our validation items and our test items. The exit status is 1 if it does not. For the
installation see ``recbole_parity.py``.

Example:
    .venv-recbole/bin/python -m benchmarks.recbole_exports experiments/llm4idrec/ml-100k
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.data import create_dataset

from benchmarks.common import make_parser, report

SETTINGS = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]},
    "eval_args": {
        "split": {"LS": "valid_and_test"},
        "order": "TO",
        "group_by": "user",
        "mode": "full",
    },
    "state": "ERROR",
    "device": "cpu",
}
HELD_OUT = ("valid", "test")  # the last two items of a user


def load(folder: Path) -> Any:
    """Load an export with RecBole."""
    settings = SETTINGS | {"data_path": str(folder.parent.resolve())}
    return create_dataset(Config(model="BPR", dataset=folder.name, config_dict=settings))


def read_rows(path: Path) -> list[list[str]]:
    """Read the rows of an exported file, without the header."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t") for line in lines]


def held_out_items(interactions: list[list[str]]) -> dict[str, dict[str, str]]:
    """Return the last two items of each user by split and user, in the order of the rows."""
    items: dict[str, list[str]] = defaultdict(list)
    for user, item, *_ in interactions:
        items[user].append(item)
    return {
        split: {user: own[index] for user, own in items.items()}
        for index, split in zip((-2, -1), HELD_OUT)
    }


def recbole_counts(data: Any, held_out: dict[str, dict[str, str]]) -> dict[str, int]:
    """Count what RecBole loaded and split; ``*_items`` are the held-out items equal to ours."""
    counts = {
        "users": data.user_num - 1,  # RecBole counts its padding
        "items": data.item_num - 1,
        "interactions": data.inter_num,
    }
    splits = dict(zip(("train", *HELD_OUT), data.build()))
    counts |= {f"{name}_interactions": split.inter_num for name, split in splits.items()}
    for name in HELD_OUT:
        rows = splits[name].inter_feat
        users, items = (
            data.id2token(field, rows[field].numpy()).tolist() for field in ("user_id", "item_id")
        )
        counts[f"{name}_items"] = sum(
            held_out[name][user] == item for user, item in zip(users, items)
        )
    return counts


def expected_counts(run: Path, folder: Path) -> dict[str, int]:
    """Return the counts that RecBole must find, from the run's own."""
    counts = json.loads((run / "augmentation.json").read_text(encoding="utf-8"))
    users, training = counts["num_users"], counts["training_interactions"] + counts["kept"]
    return {
        "users": users,
        "items": len(read_rows(folder / f"{folder.name}.item")),
        "interactions": training + 2 * users,
        "train_interactions": training,
        "valid_interactions": users,
        "test_interactions": users,
        "valid_items": users,
        "test_items": users,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Load the exports and compare; exit with status 1 if anything differs."""
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder of augment_data.py")
    run = parser.parse_args(argv).run
    (folder,) = (run / "exports" / "recbole").iterdir()
    held_out = held_out_items(read_rows(folder / f"{folder.name}.inter"))
    actual, expected = recbole_counts(load(folder), held_out), expected_counts(run, folder)
    rows = ({"what": x, "recbole": actual[x], "expected": expected[x]} for x in expected)
    report("recbole_exports", "cpu", rows)
    if actual != expected:
        sys.exit(1)


if __name__ == "__main__":
    main()
