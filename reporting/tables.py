"""The report as Markdown: Tables 1 to 4 of the paper, grid searches, comparisons."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from reporting.runs import RANKER, Recipe
from reporting.second_stage import METRICS as SECOND_STAGE_METRICS
from reporting.second_stage import SECOND_STAGE, Effect, find_effects
from reporting.statistics import BOOTSTRAP_SAMPLES, Comparison, Difference, Summary, summarize

METRICS = ("MRR@5", "NDCG@5", "Recall@5", "MRR@10", "NDCG@10", "Recall@10", "Recall@20")
LANGUAGE_MODEL_METRICS = ("NDCG@5", "Recall@5", "NDCG@10", "Recall@10")


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
    for code, of_dataset in recipes.items():
        if rows := language_models_table(code, of_dataset, paper["language_models"].get(code, {})):
            lines += ["# Rankers and other language models (Table 4)", "", *rows, ""]
    effects = {code: find_effects(of_dataset) for code, of_dataset in recipes.items()}
    if any(effects.values()):
        lines += [f"# {SECOND_STAGE}", ""]
        for code, by_name in effects.items():
            for name, effect in by_name.items():
                lines += [*effect_table(code, name, effect), ""]
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
    """Table 2 as lines of Markdown: the size of each data set next to the paper's.

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
    """Table 1 or 3 as lines of Markdown: means, intervals and deviations next to the paper's.

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
        summaries = {
            metric: summarize(recipe, metric, retrieved_only=retrieved_only) for metric in metrics
        }
        found = {metric: summary for metric, summary in summaries.items() if summary}
        if found:
            lines += _recipe_rows(recipe, found, paper.get(recipe.model, {}))
        else:
            lines.append(_row([recipe_title(recipe), *["no users"] * len(metrics)]))
    return lines


def recipe_title(recipe: Recipe) -> str:
    """A recipe's name and its number of seeds."""
    return f"**{recipe.name}**, {count_seeds(len(recipe.runs))}"


def count_seeds(number: int) -> str:
    """A number of seeds in words."""
    return f"{number} seed{'s' * (number > 1)}"


def _recipe_rows(
    recipe: Recipe, summaries: Mapping[str, Summary], paper: Mapping[str, float]
) -> list[str]:
    """One recipe's lines of a results table."""
    cells = [f"{x.mean:.4f} ({x.low:.4f} to {x.high:.4f})" for x in summaries.values()]
    lines = [_row([recipe_title(recipe), *cells])]
    if len(recipe.runs) > 1:
        deviations = [f"{summary.deviation:.4f}" for summary in summaries.values()]
        lines.append(_row(["standard deviation over seeds", *deviations]))
    if paper:
        published = [f"{paper[m]:.4f}" if m in paper else "" for m in summaries]
        relative = [
            f"{summary.mean / paper[m] - 1:+.1%}" if m in paper else ""
            for m, summary in summaries.items()
        ]
        lines.append(_row([f"the paper's {recipe.model}", *published]))
        lines.append(_row(["difference", *relative]))
    return lines


def language_models_table(
    code: str, recipes: Sequence[Recipe], paper: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Table 4 as lines of Markdown: rankers next to the paper's language models.

    Empty without a ranker, or if the paper has no such numbers for the data set.

    Args:
        code: code of the data set.
        recipes: its recipes.
        paper: the paper's metrics of each model.
    """
    rankers = [recipe for recipe in recipes if recipe.model == RANKER]
    if not rankers or not paper:
        return []
    lines = _header([f"`{code}`", *LANGUAGE_MODEL_METRICS])
    for recipe in rankers:
        summaries = (summarize(recipe, metric) for metric in LANGUAGE_MODEL_METRICS)
        cells = [f"{x.mean:.4f} ({x.low:.4f} to {x.high:.4f})" for x in summaries if x]
        lines.append(_row([recipe_title(recipe), *cells]))
    for model, numbers in paper.items():
        cells = [f"{numbers[m]:.4f}" if m in numbers else "" for m in LANGUAGE_MODEL_METRICS]
        lines.append(_row([f"the paper's {model}", *cells]))
    return lines


def effect_table(code: str, name: str, effect: Effect) -> list[str]:
    """Lines of Markdown: the second stage minus its retriever, and the log-loss.

    Args:
        code: code of the data set.
        name: name of the ranker's recipe.
        effect: its ranks and those of its retriever.
    """
    title = f"`{code}`: {name}, {count_seeds(len(effect.runs))}, minus the retriever"
    return [*_header([title, *effect.scores]), *map(_row, effect_rows(effect))]


def effect_rows(effect: Effect) -> list[list[str]]:
    """Cells of a table with a row for each metric and a column for each kind of scores."""
    differences = effect.differences()
    rows = [
        [metric, *(difference_text(differences[scores][metric]) for scores in effect.scores)]
        for metric in SECOND_STAGE_METRICS
    ]
    if losses := effect.log_losses:
        before = losses["retriever"]
        after = (losses[scores] for scores in effect.scores)
        cells = [f"{loss:.4f} ({loss - before:+.4f})" for loss in after]
        rows.append([f"log-loss, users retrieved; the retriever's is {before:.4f}", *cells])
    return rows


def difference_text(difference: Difference) -> str:
    """A difference with its interval and p-value."""
    mean, low, high, p = difference
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f}, {p_text(p)})"


def p_text(p: float) -> str:
    """A p-value in words."""
    # If all samples have the same sign, p is only known to be below its smallest nonzero value.
    return f"p = {p:.4f}" if p else f"p < {2 / BOOTSTRAP_SAMPLES:.4f}"


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
    metric, first, second, (mean, low, high, p), num_users = comparison
    seeds = f"{len(second.runs)} and {len(first.runs)}"
    size = f"{num_users:,} users" + ("" if seeds == "1 and 1" else f", {seeds} seeds")
    return (
        f"{metric}: {second.name} minus {first.name} = {mean:+.4f}, "
        f"95% interval {low:+.4f} to {high:+.4f}, paired bootstrap {p_text(p)} ({size})"
    )
