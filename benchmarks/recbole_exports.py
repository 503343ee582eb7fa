"""Whether RecBole reads what ``augment_data.py`` exports: counts, and leave-one-out's splits.

RecBole's own leave-one-out over the timestamps must give our training part with the written
interactions, our validation and our test items. Exits with status 1 where it does not. Install as
for ``recbole_parity.py``.

Example:
    .venv-recbole/bin/python benchmarks/recbole_exports.py experiments/llm4idrec/ml-100k
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from recbole.config import Config
from recbole.data import create_dataset

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


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Users and items of a ``.inter`` file in its order."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [tuple(line.split("\t")[:2]) for line in lines]


def main() -> None:
    """Load the exports and print what RecBole counts beside what is expected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of augment_data.py")
    run = parser.parse_args().run
    (folder,) = (run / "exports" / "recbole").iterdir()
    counts = json.loads((run / "augmentation.json").read_text())
    config = Config(
        model="BPR",
        dataset=folder.name,
        config_dict=SETTINGS | {"data_path": str(folder.parent.resolve())},
    )
    data = create_dataset(config)
    users, training = counts["num_users"], counts["training_interactions"] + counts["kept"]
    pairs = read_pairs(folder / f"{folder.name}.inter")
    last: dict[str, list[str]] = {}
    for user, item in pairs:
        last[user] = [*last.get(user, [])[-1:], item]
    found = {
        "users": data.user_num - 1,  # RecBole counts its padding
        "items": data.item_num - 1,
        "interactions": data.inter_num,
    }
    titles = len((folder / f"{folder.name}.item").read_text().splitlines()) - 1
    expected = {"users": users, "items": titles, "interactions": training + 2 * users}
    splits = dict(zip(("train", "valid", "test"), data.build()))
    found |= {f"{name}_interactions": split.inter_num for name, split in splits.items()}
    expected |= {
        "train_interactions": training,
        "valid_interactions": users,
        "test_interactions": users,
    }
    for place, name in enumerate(("valid", "test")):
        split = splits[name].inter_feat
        names = (
            data.id2token(field, split[field].numpy()).tolist() for field in ("user_id", "item_id")
        )
        found[f"{name}_items"] = sum(last[user][place] == item for user, item in zip(*names))
        expected[f"{name}_items"] = users
    rows = [{"what": what, "recbole": found[what], "expected": expected[what]} for what in expected]
    print(json.dumps({"benchmark": "recbole_exports", "device": "cpu", "rows": rows}))
    if found != expected:
        sys.exit(1)


if __name__ == "__main__":
    main()
