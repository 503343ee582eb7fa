"""Recommend items to users, given their histories, with a finished run of either stage.

Example:
    python recommend.py --run experiments/lru/ml-100k --user 42
    python recommend.py --run experiments/smollm2-135m/games --history "Halo 3; Gears of War"
    python recommend.py --run experiments/lru/games --input users.csv --output recommendations
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cli import Parser, add_run_flags, run_main
from config import CommonConfig
from datasets import SequenceDataset
from errors import UserError, advice
from process import check_device, check_single_process
from recipes.bulk import MANIFEST, Engine, Job, in_this_process, recommend_to_all
from recipes.lookup import find_items, find_user
from recipes.people import People
from recipes.runs import (
    check_own_folder,
    data_config,
    finished_settings,
    load_data,
    locked,
    retriever_of,
)
from storage import check_regular, reading
from trainer.run_folder import CONFIG, RunFolder

if TYPE_CHECKING:  # it imports torch
    from recipes.recommend import Recommender

SHOWN_HISTORY = 10
SEPARATOR = ";"


class Query(NamedTuple):
    """A user to recommend items to, of the data set or not.

    Attributes:
        user: identifier of a user of the data set, or None.
        history: (n,) items, oldest first.
    """

    user: str | None
    history: np.ndarray


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", metavar="ID", help="a user of the data set")
    parser.add_argument(
        "--history",
        metavar="TITLES",
        help="titles, oldest first, separated by semicolons, or a file with one title a line",
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="CSV, TSV, Parquet or .inter file with users of the data set (column user), or with "
        "interactions of any users (user, item, timestamp; all rows of a user together)",
    )
    parser.add_argument("--output", metavar="DIR", help="folder of Parquet files for --input")
    parser.add_argument(
        "--part_users", type=int, default=4096, help="users per file (default: 4096)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted --output")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier --output")
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="write the files in this process, or on Ray (pip install -r requirements-ray.txt)",
    )
    parser.add_argument(
        "--num_workers", type=int, help="processes of --engine ray (default: all cores or GPUs)"
    )
    parser.add_argument(
        "--retrieval",
        choices=("exact", "approximate"),
        default="exact",
        help="score all items, or search a faiss index that misses some of the best, for "
        "catalogues of hundreds of thousands of items (pip install -r requirements-faiss.txt)",
    )
    parser.add_argument("--k", type=int, default=10, help="number of items (default: 10)")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="also show the language model's input, and all candidates with their ranks before and "
        "after reranking",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="CUDA if available")
    add_run_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Check the flags, load data and models, and answer the query."""
    flags = parse(argv)
    check_flags(flags)
    check_single_process()
    check_device(flags.device)
    settings = finished_settings(Path(flags.run))
    config = data_config(Path(flags.run), settings, flags.data_root, flags.cache_root)
    data = load_data(config)
    check_k(flags, settings, data)
    if flags.input:
        fill_table(flags, config, data)
        return
    query = first_query(flags, data)
    # torch takes seconds to import, so this comes after all checks.
    from recipes.recommend import Recommender

    with redirect_stdout(sys.stderr):
        recommender = Recommender(
            Path(flags.run),
            data,
            flags.device,
            flags.llm_base_model,
            approximate=flags.retrieval == "approximate",
        )
        if flags.explain and recommender.ranker is None:
            print("note: --explain has no effect, since the run has no language model")
    if query:
        answer(recommender, query, flags)
    else:
        converse(recommender, flags)


def check_flags(flags: argparse.Namespace) -> None:
    """Refuse flags that contradict each other.

    Raises:
        UserError: they do, or there is no query and no terminal to ask for one.
    """
    given = [
        f"--{name}" for name in ("user", "history", "input") if getattr(flags, name) is not None
    ]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
    if flags.k < 1 or flags.part_users < 1:
        raise UserError("--k and --part_users must be at least 1")
    if not given and (flags.json or not sys.stdin.isatty()):
        raise UserError("give a user with --user, titles with --history or a file with --input")
    if bool(flags.input) != bool(flags.output):
        raise UserError("--input and --output need each other")
    if flags.num_workers is not None and flags.engine == "local":
        raise UserError("--num_workers needs --engine ray")
    if flags.num_workers is not None and flags.num_workers < 1:
        raise UserError("--num_workers must be at least 1")
    if flags.retrieval == "approximate" and find_spec("faiss") is None:
        raise UserError(
            "--retrieval approximate needs faiss: pip install -r requirements-faiss.txt"
        )
    if flags.output:
        check_output(flags)
    elif flags.engine == "ray":
        raise UserError("--engine ray needs --input and --output")


def check_output(flags: argparse.Namespace) -> None:
    """Refuse to replace or mix earlier recommendations.

    Raises:
        UserError: there are some, and the flags do not say what to do with them.
    """
    output = Path(flags.output)
    if not Path(flags.input).exists():
        raise UserError(f"--input {flags.input}: no such file")
    check_regular(Path(flags.input))
    is_ours = (output / MANIFEST).exists()
    check_own_folder(output, is_ours=is_ours)
    if is_ours and not (flags.resume or flags.overwrite):
        raise UserError(
            f"--output {output} holds recommendations: continue with --resume or replace them "
            "with --overwrite"
        )


def check_k(flags: argparse.Namespace, settings: dict[str, Any], data: SequenceDataset) -> None:
    """Refuse to show more items than there are.

    Raises:
        UserError: there are fewer.
    """
    most, what = data.num_items, "items are in the catalogue"
    if "verbalizer" in settings:
        retriever = retriever_of(Path(flags.run), settings)[1]
        with reading(Path(flags.run, CONFIG)):
            most, what = int(retriever["num_candidates"]), "candidates are ranked"
    if flags.k > most:
        raise UserError(f"--k {flags.k}: {most} {what}")


# Questions ----------------------------------------------------------------------------------------


def first_query(flags: argparse.Namespace, data: SequenceDataset) -> Query | None:
    """The query in the flags, or None if there is none."""
    if flags.user is not None:
        return user_query(data, flags.user)
    if flags.history is not None:
        return titles_query(data, read_titles(flags.history))
    return None


def user_query(data: SequenceDataset, name: str) -> Query:
    """A user of the data set, after all interactions."""
    user = find_user(data, name)
    return Query(name, data.item_ids[data.offsets[user] : data.offsets[user + 1]])


def read_titles(text: str) -> list[str]:
    """Titles from the value of a flag, or from the file that it names.

    Raises:
        UserError: there are none.
    """
    if Path(text).is_file():
        with reading(Path(text)):
            titles = Path(text).read_text(encoding="utf-8").splitlines()
    else:
        titles = text.split(SEPARATOR)
    titles = [title.strip() for title in titles if title.strip()]
    if not titles:
        raise UserError("--history: no titles")
    return titles


def titles_query(data: SequenceDataset, titles: Sequence[str]) -> Query:
    """A new user, given by titles; a note points out titles that do not match an item exactly."""
    with advice("give other titles with --history"):
        matches = find_items(data, titles)
    for match in matches:
        if not match.is_certain:
            print(f"note: {match.query!r} is taken for {match.title!r}", file=sys.stderr)
    return Query(None, np.array([match.item for match in matches]))


def fill_table(flags: argparse.Namespace, config: CommonConfig, data: SequenceDataset) -> None:
    """Write recommendations for all users in a file."""
    people, output = People(Path(flags.input), data), Path(flags.output)
    job = Job(
        run_dir=Path(flags.run),
        data_config=config,
        device=flags.device,
        base_model=flags.llm_base_model,
        source=people.path,
        output=output,
        k=flags.k,
        part_users=flags.part_users,
        approximate=flags.retrieval == "approximate",
    )
    start = time.monotonic()
    with locked(RunFolder(output, (), "")):
        resume = flags.resume and not flags.overwrite
        record = recommend_to_all(job, people, find_engine(flags), resume=resume)
    if record["skipped"]:
        what = "without a known item" if people.has_interactions else "not in the data set"
        print(
            f"note: users {what} are left out: {record['skipped']:,}, the first: "
            f"{people.first_skipped}",
            file=sys.stderr,
        )
    seconds = time.monotonic() - start
    print(
        f"written to {output} in {seconds:.0f} s: users {record['users']:,}, files "
        f"{record['parts']:,}"
    )


def find_engine(flags: argparse.Namespace) -> Engine:
    """Select what writes the files: this process, or Ray.

    Raises:
        UserError: Ray is not installed.
    """
    if flags.engine == "local":
        return in_this_process
    if find_spec("ray") is None:
        raise UserError("--engine ray needs Ray: pip install -r requirements-ray.txt")
    from recipes.ray_engine import RayEngine

    return RayEngine(flags.num_workers)


def converse(recommender: Recommender, flags: argparse.Namespace) -> None:
    """Ask for users or titles and answer, until an empty line."""
    data = recommender.data
    print(f"Enter a user, or titles separated by {SEPARATOR!r}. An empty line ends.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if not text:
            return
        try:
            is_user = text in data.user_names
            query = user_query(data, text) if is_user else titles_query(data, read_titles(text))
        except UserError as error:
            print(error)
            continue
        answer(recommender, query, flags)


# Answers ------------------------------------------------------------------------------------------


def answer(recommender: Recommender, query: Query, flags: argparse.Namespace) -> None:
    """Print recommendations, as a table or as JSON."""
    ranker = recommender.ranker
    explained = flags.explain and ranker is not None
    size = recommender.num_candidates if explained else flags.k
    found = recommender.recommend([query.history], size)
    data, rows = recommender.data, []
    for index, item in enumerate(found.items[0].tolist()):
        rows.append(
            {
                "rank": index + 1,
                "item": data.item_names[item],
                "title": data.titles[item],
                "retrieved": int(found.retrieved[0, index]),
                "scores": {name: float(values[0, index]) for name, values in found.scores.items()},
            }
        )
    history = [data.titles[item] for item in query.history.tolist()]
    record = {"user": query.user, "history": history, "recommendations": rows}
    if explained and ranker is not None:
        candidates = found.items[0][found.retrieved[0].argsort()]
        record["prompt"] = ranker.text(query.history, candidates)
    if flags.json:
        print(json.dumps(record))
        return
    if "prompt" in record:
        print("The language model reads:")
        print(textwrap.indent(str(record["prompt"]).rstrip(), "  | ", lambda line: True) + "\n")
    print(table(query.user, history, rows))


def table(user: str | None, history: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Format the end of the history and the recommendations as lines of text."""
    shown = history[-SHOWN_HISTORY:]
    who = "History" if user is None else f"History of user {user}"
    count = f"the last {len(shown)} of {len(history)} items" if len(shown) < len(history) else ""
    lines = [f"{who}{', ' + count if count else ''}:", *(f"  {title}" for title in shown), ""]
    width = max(len(row["title"]) for row in rows)
    names = list(rows[0]["scores"])
    lines.append(
        f"{'rank':>4}  {'title':<{width}}  {'retrieved':>9}  "
        + "  ".join(f"{name:>{max(len(name), 8)}}" for name in names)
    )
    for row in rows:
        scores = "  ".join(f"{row['scores'][name]:>{max(len(name), 8)}.3f}" for name in names)
        lines.append(f"{row['rank']:>4}  {row['title']:<{width}}  {row['retrieved']:>9}  {scores}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
