"""The report as Markdown: Tables 1 to 3 of the paper, grid searches, comparisons."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from reporting.runs import Recipe
from reporting.statistics import BOOTSTRAP_SAMPLES, Comparison, Gains, interval, recipe_gains

METRICS = ("MRR@5", "NDCG@5", "Recall@5", "MRR@10", "NDCG@10", "Recall@10", "Recall@20")


def report_text(recipes: Mapping[str, Sequence[Recipe]], paper: Mapping[str, Any]) -> str:
    """The whole report.

    Args:
        recipes: the recipes of each data set.
        paper: the paper's numbers, the content of ``experiments/paper.json``.
    """
    lines = ["# Data (Table 2)", "", *data_table(recipes, paper["statistics"]), ""]
    for title, table, retrieved_only in (
        ("All users (Table 1), with 95% bootstrap intervals over users", "all_users", False),
        ("Users whose target LRURec retrieved (Table 3)", "retrieved_users", True),
    ):
        lines += [f"# {title}", ""]
        for code, of_dataset in recipes.items():
            numbers = paper[table].get(code, {})
            rows = results_table(code, of_dataset, numbers, retrieved_only=retrieved_only)
            lines += [*rows, ""]
    searches = [search_table(code, of_dataset) for code, of_dataset in recipes.items()]
    if any(searches):
        lines += ["# Grid searches, validation by weight decay and dropout", ""]
        lines += [line for rows in searches if rows for line in [*rows, ""]]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def data_table(
    recipes: Mapping[str, Sequence[Recipe]], paper: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Table 2 as lines of Markdown: the size of each data set beside the paper's.

    Args:
        recipes: the recipes of each data set.
        paper: the paper's statistics of each data set.
    """
    lines = _header(["data set", "users", "items", "interactions", "mean length", "paper"])
    for code, of_dataset in recipes.items():
        settings = [run.settings for recipe in of_dataset for run in recipe.runs]
        # Only retrievers record the sizes.
        sizes = next((entries for entries in settings if "num_interactions" in entries), None)
        if sizes is None:
            continue
        users, items, total = (sizes[f"num_{name}"] for name in ("users", "items", "interactions"))
        cells = [f"`{code}`", f"{users:,}", f"{items:,}", f"{total:,}", f"{total / users:.2f}"]
        published = "{users:,} / {items:,} / {mean_length:.2f}"
        lines.append(_row([*cells, published.format(**paper[code]) if code in paper else ""]))
    return lines


def results_table(
    code: str,
    recipes: Sequence[Recipe],
    paper: Mapping[str, Mapping[str, float]],
    *,
    retrieved_only: bool,
) -> list[str]:
    """Table 1 or 3 as lines of Markdown: means, intervals and deviations beside the paper's.

    Args:
        code: code of the data set.
        recipes: its recipes.
        paper: the paper's metrics of each model.
        retrieved_only: Table 3, of the users whose target was retrieved, instead of Table 1.
    """
    # Recall@20 of users whose target is among the 20 candidates is 1.
    metrics = [metric for metric in METRICS if not (retrieved_only and metric == "Recall@20")]
    lines = _header([f"`{code}`", *metrics])
    for recipe in recipes:
        gains = {
            metric: recipe_gains(recipe, metric, retrieved_only=retrieved_only)
            for metric in metrics
        }
        lines += _recipe_rows(recipe, gains, paper.get(recipe.model, {}))
    return lines


def _recipe_rows(
    recipe: Recipe, gains: Mapping[str, Gains], paper: Mapping[str, float]
) -> list[str]:
    """One recipe's lines of a results table."""
    seeds = len(recipe.runs)
    title = f"**{recipe.name}**, {seeds} seed{'s' * (seeds > 1)}"
    if not any(gain.counted.any() for gain in gains.values()):
        return [_row([title, *["no users"] * len(gains)])]
    means = {metric: gain.mean() for metric, gain in gains.items()}
    intervals = {metric: interval(gain) for metric, gain in gains.items()}
    cells = [f"{means[m]:.4f} ({low:.4f} to {high:.4f})" for m, (low, high) in intervals.items()]
    lines = [_row([title, *cells])]
    if seeds > 1:
        deviations = [f"{gain.seed_deviation():.4f}" for gain in gains.values()]
        lines.append(_row(["standard deviation over seeds", *deviations]))
    if paper:
        published = [f"{paper[m]:.4f}" if m in paper else "" for m in gains]
        relative = [f"{means[m] / paper[m] - 1:+.1%}" if m in paper else "" for m in gains]
        lines.append(_row([f"paper, {recipe.model}", *published]))
        lines.append(_row(["difference", *relative]))
    return lines


def search_table(code: str, recipes: Sequence[Recipe]) -> list[str]:
    """Lines of Markdown: the validation metric at every point of the grid searches.

    The selected points are bold. Empty without a grid search.

    Args:
        code: code of the data set.
        recipes: its recipes.
    """
    searches = [
        (recipe.name, run.settings["seed"], run.search)
        for recipe in recipes
        for run in recipe.runs
        if run.search
    ]
    coordinates = operator.itemgetter("weight_decay", "dropout")
    grid = sorted({coordinates(point) for *_, search in searches for point in search["points"]})
    if not grid:
        return []
    lines = _header([f"`{code}`", *(f"{decay:g}, {dropout:g}" for decay, dropout in grid)])
    for name, seed, search in searches:
        metric = search["best_metric"]
        cells = dict.fromkeys(grid, "")
        for point in search["points"]:
            bold = "**" if point["folder"] == search["selected"] else ""
            cells[coordinates(point)] = f"{bold}{point['val'][metric]:.4f}{bold}"
        lines.append(_row([f"{name}, {metric}, seed {seed}", *cells.values()]))
    return lines


def comparison_line(comparison: Comparison) -> str:
    """A comparison in one line."""
    metric, first, second, difference, low, high, p, num_users = comparison
    # If all samples have the same sign, p is only known to be below its smallest nonzero value.
    p_value = f"= {p:.4f}" if p else f"< {2 / BOOTSTRAP_SAMPLES:.4f}"
    seeds = f"{len(second.runs)} and {len(first.runs)}"
    size = f"{num_users:,} users" + ("" if seeds == "1 and 1" else f", {seeds} seeds")
    return (
        f"{metric}: {second.name} minus {first.name} = {difference:+.4f}, "
        f"95% interval {low:+.4f} to {high:+.4f}, paired bootstrap p {p_value} ({size})"
    )
