"""Tables 1 to 3 of the paper beside the runs under ``experiments/``, and learning curves.

Example:
    python report.py
    python report.py --compare experiments/lru/games experiments/smollm2-135m/games
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import DATASET_CODES, RankerConfig, RetrieverConfig, UserError, run_main, split_metric
from metrics import user_gains
from storage import atomic_path, read_arrays, read_json, reading
from trainer.folder import IMMATERIAL, LOG, SEARCH, SEARCH_RUNS

PAPER = Path(__file__).parent / "experiments" / "paper.json"
PAPER_MODELS = {"lru": "LRURec", "sas": "SASRec", "bert": "BERT4Rec", "narm": "NARM"}
RANKER = "LlamaRec"
METRICS = ("MRR@5", "NDCG@5", "Recall@5", "MRR@10", "NDCG@10", "Recall@10", "Recall@20")
BOOTSTRAP_SAMPLES = 10_000
# What may differ between runs of one recipe.
NOT_RECIPE = IMMATERIAL | {
    "seed", "commit", "torch", "device", "fingerprint", "total_steps", "retrieved_from",
}  # fmt: skip
SEARCHED = {"weight_decay", "dropout", "attn_dropout"}  # what a grid search chooses


class Run(NamedTuple):
    """One finished run.

    Attributes:
        folder: where it lies.
        settings: its ``config.json``.
        ranks: (num_users,) rank of every user's answer in the test split.
        retrieved: (num_users,) whose answers are among the candidates: the users of Table 3.
        fused: the same with both stages' scores fused, if this is a ranker's run.
        search: its ``search.json``, if a grid search selected it.
    """

    folder: Path
    settings: dict[str, Any]
    ranks: np.ndarray
    retrieved: np.ndarray
    fused: Run | None = None
    search: dict[str, Any] | None = None

    @property
    def dataset(self) -> str:
        """The data set's code."""
        return self.settings["dataset_code"]

    @property
    def column(self) -> str:
        """The paper's column it belongs to."""
        return PAPER_MODELS.get(self.settings.get("model_code"), RANKER)

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that shape its results, without the seed and what is the default.

        So a run from before a flag was there belongs to those that leave the flag alone.
        """
        left_out = NOT_RECIPE | (SEARCHED if self.search else set())
        config = RankerConfig if self.column == RANKER else RetrieverConfig
        defaults = json.loads(json.dumps({spec.name: spec.default for spec in fields(config)}))
        recipe = {
            name: value
            for name, value in self.settings.items()
            if name not in left_out and not (name in defaults and value == defaults[name])
        }
        retriever = recipe.get("retriever")
        if retriever:
            recipe["retriever"] = {k: v for k, v in retriever.items() if k not in NOT_RECIPE}
        return recipe

    def name(self) -> str:
        """Model, preset, whether by grid search, whether written interactions were trained on."""
        if self.column == RANKER:
            fused = ", fused scores" if self.settings.get("fused") else ""
            return f"{RANKER}, {self.settings['llm_base_model']}{fused}"
        extras = {"searched": self.search, "augmented": self.settings.get("augmented")}
        shown = [word for word, there in extras.items() if there]
        return ", ".join([self.column, self.settings.get("preset", "paper"), *shown])


class Recipe(NamedTuple):
    """Runs that differ in nothing but the seed.

    Attributes:
        name: what tells it from the others of its data set.
        runs: at least one.
    """

    name: str
    runs: list[Run]

    def gains(self, metric: str, subset: bool) -> tuple[np.ndarray, np.ndarray]:
        """(runs, users) every user's share in a metric, and whether it counts.

        In the subset a user counts in those runs that retrieved the answer.
        """
        shares = np.stack([gains(run.ranks, metric) for run in self.runs])
        if not subset:
            return shares, np.ones_like(shares, dtype=bool)
        return shares, np.stack([run.retrieved for run in self.runs])


def read_run(folder: Path) -> Run | None:
    """The run in a folder, or None if there is none that has finished.

    Raises:
        UserError: a file of it cannot be read.
    """
    with reading(folder, "run it again"):
        if (folder / "overall_metrics.json").exists():
            file = read_arrays(folder / "rankings.npz")
            ranks, fused_ranks = file["label_ranks"], file["fused_label_ranks"]
            retrieved = np.zeros(len(ranks), dtype=bool)
            retrieved[file["users"]] = True
        elif (folder / "test_metrics.json").exists():
            file = read_arrays(folder / "candidates.npz")
            ranks, fused_ranks = file["test_label_ranks"], None
            retrieved = (file["test_items"] == file["test_labels"][:, None]).any(axis=1)
        else:
            return None
    settings = read_json(folder / "config.json")
    missing = [name for name in ("dataset_code", "data_fingerprint") if name not in settings]
    if missing:
        raise UserError(f"{folder / 'config.json'} lacks {missing[0]}: it is no run's")
    search = read_json(folder / SEARCH) if (folder / SEARCH).exists() else None
    fused = None
    if fused_ranks is not None:
        fused = Run(folder, settings | {"fused": True}, fused_ranks, retrieved)
    return Run(folder, settings, ranks, retrieved, fused, search)


def find_runs(root: Path) -> list[Run]:
    """All finished runs below a folder, but for the single points of a grid search."""
    folders = sorted(path.parent for path in root.rglob("config.json"))
    folders = [folder for folder in folders if SEARCH_RUNS not in folder.relative_to(root).parts]
    runs = [run for run in map(read_run, folders) if run is not None]
    fused = [run.fused for run in runs if run.fused is not None]
    return [on_shared_users(run, runs) for run in runs] + fused


def on_shared_users(run: Run, runs: Sequence[Run]) -> Run:
    """A baseline's run with the users of Table 3 taken from LRURec's, if there is such a run.

    The paper's Table 3 is of the users whose answer LRURec retrieved, whatever the column: with
    users of its own every model would be judged on those it is best at. Runs of the same preset
    and seed are preferred, for a search's choice those that a search chose.
    """
    if run.column in ("LRURec", RANKER):
        return run
    alike = [
        other
        for other in runs
        if other.column == "LRURec"
        and other.settings["data_fingerprint"] == run.settings["data_fingerprint"]
    ]

    def recipe(one: Run) -> list[Any]:
        return [*map(one.settings.get, ("preset", "seed", "augmented")), bool(one.search)]

    alike.sort(key=lambda other: [x != y for x, y in zip(recipe(other), recipe(run))])
    return run._replace(retrieved=alike[0].retrieved) if alike else run


def find_recipes(runs: Sequence[Run], root: Path) -> dict[str, list[Recipe]]:
    """The runs by data set, those of one recipe together, one for each seed.

    Recipes of one model and preset are told apart by the folder of their first run below ``root``.
    """
    groups: dict = defaultdict(lambda: defaultdict(dict))  # [data set, name][recipe][seed]
    for run in runs:
        by_seed = groups[run.dataset, run.name()][json.dumps(run.recipe, sort_keys=True)]
        by_seed.setdefault(run.settings.get("seed"), run)
    recipes = defaultdict(list)
    for (dataset, name), by_settings in groups.items():
        for found in map(list, map(dict.values, by_settings.values())):
            folder = f" ({found[0].folder.relative_to(root)})" if len(by_settings) > 1 else ""
            recipes[dataset].append(Recipe(name + folder, found))
    order = [*PAPER_MODELS.values(), RANKER]
    for found in recipes.values():
        found.sort(key=lambda recipe: (order.index(recipe.runs[0].column), recipe.name))
    known = [code for code in DATASET_CODES if code in recipes]
    return {code: recipes[code] for code in [*known, *(recipes.keys() - known)]}


def gains(ranks: np.ndarray, metric: str) -> np.ndarray:
    """(num_users,) each user's share in a metric such as ``NDCG@10``."""
    return user_gains(ranks, *split_metric("metric", metric))


def bootstrap_means(values: np.ndarray, counted: np.ndarray, seed: int = 0) -> np.ndarray:
    """(samples,) means of the values that count, over users drawn anew with replacement.

    Args:
        values: (runs, users).
        counted: (runs, users) which of them count. A user is drawn with all runs.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    users = np.stack([np.where(counted, values, 0).sum(axis=0), counted.sum(axis=0)])
    users = users[:, users[1] > 0]
    size = users.shape[1]
    # Few distinct users stand for many: drawing their counts costs the same and less memory.
    distinct, counts = np.unique(users, axis=1, return_counts=True)
    draws = [
        rng.multinomial(size, counts / size, BOOTSTRAP_SAMPLES // 20) @ distinct.T
        for _ in range(20)
    ]
    totals, numbers = np.concatenate(draws).T
    return totals / numbers


def interval(values: np.ndarray, counted: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of a mean, see ``bootstrap_means``."""
    low, high = np.quantile(bootstrap_means(values, counted), [0.025, 0.975])
    return float(low), float(high)


def statistics_table(recipes: dict[str, list[Recipe]], paper: dict) -> list[str]:
    """Table 2 as lines of Markdown: size of each data set, beside the paper's."""
    lines = ["| data set | users | items | interactions | mean length | paper |"]
    lines.append("|---|---|---|---|---|---|")
    for code, found in recipes.items():
        every = [run.settings for recipe in found for run in recipe.runs]
        noted = [x for x in every if "num_interactions" in x]  # a ranker's run does not say
        if not noted:
            continue
        users, items, total = (noted[0][f"num_{x}"] for x in ("users", "items", "interactions"))
        theirs = paper["statistics"].get(code)
        beside = "{users:,} / {items:,} / {mean_length:.2f}".format(**theirs) if theirs else ""
        lines.append(
            f"| `{code}` | {users:,} | {items:,} | {total:,} | {total / users:.2f} | {beside} |"
        )
    return lines


def table(code: str, recipes: Sequence[Recipe], paper: dict, *, subset: bool) -> list[str]:
    """Lines of Markdown: a recipe's means, 95% intervals and spread over seeds, and the paper."""
    numbers = paper["retrieved_users" if subset else "all_users"].get(code, {})
    metrics = [metric for metric in METRICS if not (subset and metric == "Recall@20")]
    lines = [f"| `{code}` | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]

    def add(title: str, cells: Sequence[str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for recipe in recipes:
        seeds = len(recipe.runs)
        title = f"**{recipe.name}**, {seeds} seed{'s' * (seeds > 1)}"
        shares = [recipe.gains(metric, subset) for metric in metrics]
        if not shares[0][1].any():
            add(title, ["no users"] * len(metrics))
            continue
        means = [values[counted].mean() for values, counted in shares]
        intervals = [interval(values, counted) for values, counted in shares]
        cells = [f"{x:.4f} ({low:.4f} to {high:.4f})" for x, (low, high) in zip(means, intervals)]
        add(title, cells)
        if seeds > 1:
            spread = [
                np.std([value[count].mean() for value, count in zip(*share)], ddof=1)
                for share in shares
            ]
            add("standard deviation over seeds", [f"{x:.4f}" for x in spread])
        theirs = numbers.get(recipe.runs[0].column, {})
        if theirs:
            add(
                f"paper, {recipe.runs[0].column}",
                [f"{theirs[m]:.4f}" if m in theirs else "" for m in metrics],
            )
            add(
                "difference",
                [
                    f"{x / theirs[m] - 1:+.1%}" if m in theirs else ""
                    for m, x in zip(metrics, means)
                ],
            )
    return lines


def search_table(code: str, recipes: Sequence[Recipe]) -> list[str]:
    """Lines of Markdown: validation at every point of the grid searches, what they chose bold."""
    runs = [(recipe.name, run) for recipe in recipes for run in recipe.runs if run.search]
    point_of = operator.itemgetter("weight_decay", "dropout")
    every = sorted({point_of(row) for _, run in runs for row in run.search["points"]})
    if not every:
        return []
    heads = [f"`{code}`", *(f"{decay:g}, {dropout:g}" for decay, dropout in every)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, run in runs:
        metric, selected = run.search["best_metric"], run.search["selected"]
        cells = dict.fromkeys(every, "")
        for row in run.search["points"]:
            mark = "**" if row["folder"] == selected else ""
            cells[point_of(row)] = f"{mark}{row['val'][metric]:.4f}{mark}"
        title = f"{name}, {metric}, seed {run.settings['seed']}"
        lines.append("| " + " | ".join([title, *cells.values()]) + " |")
    return lines


def draw(recipes: dict[str, list[Recipe]], paper: dict, path: Path) -> None:
    """Draw NDCG@10 beside the paper's, and validation by training step: a row for each data set.

    Retrievers and rankers have curves of their own, in the colours of the first column.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colors = colormaps["tab20"].colors
    every = [recipe.runs[0] for found in recipes.values() for recipe in found]
    stages = [stage for stage in (False, True) if stage in {x.column == RANKER for x in every}]
    heights = [1.5 + 0.25 * max(8, len(found)) for found in recipes.values()]
    figure = Figure(figsize=(5 + 5 * len(stages), sum(heights)), layout="constrained")
    axes = figure.subplots(len(recipes), 1 + len(stages), squeeze=False, height_ratios=heights)
    for (code, found), (means, *curves) in zip(recipes.items(), axes):
        for place, recipe in enumerate(found):
            column, color = recipe.runs[0].column, colors[place % len(colors)]
            values, counted = recipe.gains("NDCG@10", False)
            means.plot(interval(values, counted), [place, place], color=color, linewidth=2)
            means.plot(values.mean(), place, "o", color=color)
            theirs = paper["all_users"].get(code, {}).get(column)
            if theirs:
                means.plot(theirs["NDCG@10"], place, "kx", markersize=7)
            for run in recipe.runs:
                if run.settings.get("fused"):
                    continue  # its ranker has the curve
                log = map(json.loads, (run.folder / LOG).read_text().splitlines())
                points = [(x["step"], x["val_NDCG@10"]) for x in log if "val_NDCG@10" in x]
                axis = curves[stages.index(column == RANKER)]
                axis.plot(*zip(*points), color=color, linewidth=1.5, marker=".")
        means.set_yticks(range(len(found)), [recipe.name for recipe in found])
        means.invert_yaxis()
        means.set(title=code, xlabel="NDCG@10, test, all users; x: paper")
        for axis, ranker in zip(curves, stages):
            title = "ranker, users retrieved" if ranker else "retriever"
            axis.set(title=title, xlabel="optimizer step", ylabel="validation NDCG@10")
            axis.locator_params(axis="x", nbins=5)  # more of them touch
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def read_recipe(folder: Path, *, fused: bool = False) -> Recipe:
    """The run in a folder, or the runs below it if they differ in nothing but the seed.

    Args:
        folder: where to look.
        fused: whether rankers are taken with their fused scores.

    Raises:
        UserError: there is no finished run, or there are several recipes.
    """
    run = read_run(folder)
    runs = [run] if run else [run for run in find_runs(folder) if not run.settings.get("fused")]
    if fused:
        runs = [run.fused or run for run in runs]
    found = [recipe for recipes in find_recipes(runs, folder).values() for recipe in recipes]
    if len(found) != 1:
        several = "runs of several recipes there: name one of them"
        raise UserError(f"--compare {folder}: {several if found else 'no finished run there'}")
    return found[0]._replace(name=str(folder))


def compare(first: Recipe, second: Recipe, metric: str) -> str:
    """A paired bootstrap of the difference between two recipes on the same users.

    A user's shares are means over seeds.

    Raises:
        UserError: the runs are of different data.
    """
    if len({run.settings["data_fingerprint"] for run in first.runs + second.runs}) > 1:
        raise UserError(f"{first.name} and {second.name} are runs on different data")
    shares, others = (x.gains(metric, subset=False)[0].mean(axis=0) for x in (second, first))
    differences = shares - others
    means = bootstrap_means(differences[None], np.ones((1, len(differences)), dtype=bool))
    low, high = np.quantile(means, [0.025, 0.975])
    p = min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))
    least = 2 / len(means)  # where no sample has the other sign
    shown = f"= {p:.4f}" if p else f"< {least:.4f}"
    seeds = " and ".join(str(len(recipe.runs)) for recipe in (second, first))
    over = f"{len(differences):,} users" + ("" if seeds == "1 and 1" else f", {seeds} seeds")
    return (
        f"{metric}: {second.name} minus {first.name} = {differences.mean():+.4f}, "
        f"95% interval {low:+.4f} to {high:+.4f}, paired bootstrap p {shown} ({over})"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables and write ``report.md`` and ``report.png``, or compare two recipes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--experiment_root", default="experiments")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar="RUN",
        help="two runs, or folders of one recipe's runs by seed",
    )
    parser.add_argument(
        "--fused", action="store_true", help="compare rankers by their fused scores"
    )
    parser.add_argument("--metric", default="NDCG@10", help="metric to compare (default: NDCG@10)")
    flags = parser.parse_args(argv)
    if flags.compare:
        pair = [read_recipe(Path(name), fused=flags.fused) for name in flags.compare]
        print(compare(*pair, flags.metric))
        return
    root = Path(flags.experiment_root)
    runs = find_runs(root)
    if not runs:
        raise UserError(f"--experiment_root {flags.experiment_root}: no finished run there")
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    recipes = find_recipes(runs, root)
    lines = ["# Data (Table 2)", "", *statistics_table(recipes, paper), ""]
    for title, subset in (
        ("All users (Table 1), with 95% bootstrap intervals over users", False),
        ("Users whose answer LRURec retrieved (Table 3)", True),
    ):
        lines += [f"# {title}", ""]
        for code, found in recipes.items():
            lines += [*table(code, found, paper, subset=subset), ""]
    searches = [search_table(code, found) for code, found in recipes.items()]
    if any(searches):
        lines += ["# Grid searches, validation by weight decay and dropout", ""]
        lines += [line for found in searches if found for line in [*found, ""]]
    text = "\n".join(lines)
    target = root / "report.md"
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw(recipes, paper, root / "report.png")
    print(text)
    print(f"written to {target} and {root / 'report.png'}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
