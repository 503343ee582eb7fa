"""Report the runs under ``experiments/`` next to Tables 1 to 4 of the paper, with learning curves.

Example:
    python report.py
    python report.py --compare experiments/lru/games experiments/smollm2-135m/games
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from cli import Parser, run_main
from datasets import SequenceDataset
from errors import UserError, advice, flag_names
from process import check_single_process
from recipes.runs import data_config, load_data
from reporting.runs import (
    Recipe,
    Run,
    find_recipes,
    find_runs,
    fused_variants,
    read_runs,
    single_recipe,
)
from reporting.statistics import compare
from reporting.tables import comparison_line, report_text
from storage import atomic_path, read_json, reading

PAPER = Path(__file__).parent / "experiments" / "paper.json"
REPAIR = "run it again"
INFERENCE = "ranker_inference.json"
INFERENCE_COLUMNS = ("model", "title_tokens", "generation_s", "letters_s", "titles_s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--experiment_root", default="experiments", help="folder of all runs")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar="RUN",
        help="two runs, or two folders whose runs differ only in the seed",
    )
    parser.add_argument(
        "--fused", action="store_true", help="compare rankers by their fused scores"
    )
    parser.add_argument("--metric", default="NDCG@10", help="metric to compare (default: NDCG@10)")
    return parser.parse_args(argv)


def read_recipe(folder: Path, *, fused: bool) -> Recipe:
    """Read one side of a comparison, with fused scores or without.

    Raises:
        UserError: the folder does not hold runs of exactly one recipe.
    """
    with advice(REPAIR):
        runs = read_runs(folder)
    with flag_names(folder="compare"):
        return single_recipe(runs, folder, fused=fused)


def write_report(root: Path) -> str:
    """Write ``report.md``, ``report.png`` and ``report.html`` about all runs below a folder.

    Returns:
        The content of ``report.md``.

    Raises:
        UserError: there is no finished run, or a run cannot be read.
    """
    # These import matplotlib, which comparisons do not need.
    from reporting.figures import draw
    from reporting.page import report_page

    with advice(REPAIR):
        runs = find_runs(root)
        if not runs:
            raise UserError(f"--experiment_root {root}: no finished run there")
        recipes = find_recipes(runs + fused_variants(runs), root)
        paper = read_json(PAPER)
        text = report_text(recipes, paper)
        with atomic_path(root / "report.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        draw(recipes, paper["all_users"], root / "report.png")
        inference = read_inference(root / INFERENCE)
        page = report_page(recipes, paper, load_datasets(runs), f"Runs in {root}", inference)
        with atomic_path(root / "report.html") as temporary:
            temporary.write_text(page, encoding="utf-8")
    return text


def read_inference(path: Path) -> list[dict[str, Any]]:
    """The rows that ``benchmarks.ranker_inference`` printed, if they were kept.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return []
    with reading(path):
        result = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        return [{name: row[name] for name in INFERENCE_COLUMNS} for row in result["rows"]]


def load_datasets(runs: Sequence[Run]) -> dict[str, SequenceDataset]:
    """The data sets of the runs by code, except for those that cannot be loaded."""
    found: dict[str, SequenceDataset] = {}
    for run in runs:
        if run.dataset in found:
            continue
        try:
            config = data_config(run.folder, run.settings, None, None)
            with redirect_stderr(io.StringIO()):
                data = load_data(config)
        except UserError:
            continue
        if data.fingerprint == run.settings["data_fingerprint"]:
            found[run.dataset] = data
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report, or compare two recipes."""
    flags = parse(argv)
    check_single_process()
    if flags.compare:
        first, second = (read_recipe(Path(name), fused=flags.fused) for name in flags.compare)
        print(comparison_line(compare(first, second, flags.metric)))
        return
    root = Path(flags.experiment_root)
    print(write_report(root))
    files = ", ".join(str(root / f"report.{kind}") for kind in ("html", "md", "png"))
    print(f"written: {files}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main, can_resume=False)
