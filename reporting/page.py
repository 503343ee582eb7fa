"""The report as one HTML page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from datasets import SequenceDataset
from reporting.charts import (
    curves_chart,
    groups_chart,
    inference_chart,
    letters_chart,
    matrix_chart,
    means_chart,
)
from reporting.runs import RANKER, Recipe, Run
from reporting.second_stage import (
    Effect,
    examples,
    find_effects,
    groups,
    letters,
    user_properties,
)
from reporting.statistics import summarize
from reporting.tables import LANGUAGE_MODEL_METRICS, METRICS, count_seeds, effect_rows

TEMPLATE = "report.html.j2"
METRIC, METRIC_NAME, METRIC_K = "NDCG@10", "NDCG", 10


class Cell(NamedTuple):
    """A cell of a table: text, interval of the value, and whether it is the best of its column."""

    text: str
    interval: str = ""
    is_best: bool = False


class Row(NamedTuple):
    """A row of a table."""

    name: str
    cells: list[Cell]
    is_paper: bool = False


def report_page(
    recipes: Mapping[str, Sequence[Recipe]],
    paper: Mapping[str, Any],
    datasets: Mapping[str, SequenceDataset],
    title: str,
    inference: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole page.

    Args:
        recipes: the recipes of each data set.
        paper: the paper's numbers, the content of ``experiments/paper.json``.
        datasets: the data sets that could be loaded, by code. For the others, the page has no
            titles, and no metrics by length of the history or popularity.
        title: title of the page.
        inference: the rows of ``benchmarks.ranker_inference``, for Figure 3.
    """
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    parts = [
        _dataset_part(code, of_dataset, paper, datasets.get(code))
        for code, of_dataset in recipes.items()
    ]
    figure = inference_chart(inference, paper["generation_s"]) if inference else ""
    return environment.get_template(TEMPLATE).render(title=title, datasets=parts, inference=figure)


def _dataset_part(
    code: str, recipes: Sequence[Recipe], paper: Mapping[str, Any], data: SequenceDataset | None
) -> dict[str, Any]:
    """What the template shows of a data set."""
    published = paper["all_users"].get(code, {})
    retrievers = [recipe for recipe in recipes if recipe.model != RANKER]
    rankers = [recipe for recipe in recipes if recipe.model == RANKER]
    captions = (
        ("Validation of the retrievers, all users", retrievers),
        ("Validation of the rankers, users whose target was retrieved", rankers),
    )
    curves = ((caption, curves_chart(group, METRIC)) for caption, group in captions if group)
    return {
        "code": code,
        "size": _size(data, paper["statistics"].get(code)) if data else "",
        "tables": _tables(code, recipes, rankers, paper),
        "means": means_chart(
            recipes, METRIC, {model: values[METRIC] for model, values in published.items()}
        ),
        "curves": [(caption, chart) for caption, chart in curves if chart],
        "effects": [
            _effect_part(effect, name, data) for name, effect in find_effects(rankers).items()
        ],
        "runs": [_run_part(recipe, run) for recipe in recipes for run in recipe.runs],
    }


def _size(data: SequenceDataset, published: Mapping[str, float] | None) -> str:
    """The size of a data set, followed by the paper's (Table 2)."""
    size = data.summary().partition(": ")[2]
    if published is None:
        return size
    numbers = "{users:,} users, {items:,} items, mean length {mean_length:.2f}"
    return f"{size}; the paper (Table 2): {numbers.format(**published)}"


def _tables(
    code: str, recipes: Sequence[Recipe], rankers: Sequence[Recipe], paper: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Tables 1, 3 and, for rankers on data where the paper has it, 4."""
    models = {recipe.model for recipe in recipes}

    def published(table: str) -> dict[str, Mapping[str, float]]:
        numbers = paper[table].get(code, {})
        return {model: numbers[model] for model in numbers if model in models}

    tables = [
        _table(f"All users (Table 1): {code}", recipes, published("all_users"), METRICS),
        _table(
            f"Users whose target was retrieved (Table 3): {code}",
            recipes,
            published("retrieved_users"),
            METRICS[:-1],  # the last, Recall@20, is 1
            retrieved_only=True,
        ),
    ]
    others = paper["language_models"].get(code)
    if rankers and others:
        title = f"Rankers and other language models (Table 4): {code}"
        tables.append(_table(title, rankers, others, LANGUAGE_MODEL_METRICS))
    return tables


def _table(
    title: str,
    recipes: Sequence[Recipe],
    paper: Mapping[str, Mapping[str, float]],
    metrics: Sequence[str],
    *,
    retrieved_only: bool = False,
) -> dict[str, Any]:
    """A table with a row for each recipe and each of the paper's models."""
    rows, columns = [], []
    for recipe in recipes:
        found = (summarize(recipe, name, retrieved_only=retrieved_only) for name in metrics)
        summaries = [summary for summary in found if summary]
        if not summaries:
            continue
        cells = [Cell(f"{x.mean:.4f}", f"{x.low:.4f} to {x.high:.4f}") for x in summaries]
        rows.append(Row(f"{recipe.name}, {count_seeds(len(recipe.runs))}", cells))
        columns.append([summary.mean for summary in summaries])
    for row, means in zip(rows, columns):
        best = [mean == max(column) for mean, column in zip(means, zip(*columns))]
        row.cells[:] = [cell._replace(is_best=value) for cell, value in zip(row.cells, best)]
    for model, numbers in paper.items():
        cells = [Cell(f"{numbers[name]:.4f}" if name in numbers else "") for name in metrics]
        rows.append(Row(f"the paper's {model}", cells, is_paper=True))
    return {"title": title, "metrics": metrics, "rows": rows}


def _effect_part(effect: Effect, name: str, data: SequenceDataset | None) -> dict[str, Any]:
    """What the template shows of a ranker."""
    numbers = [
        (f"of the {effect.retrieved.sum():,} retrieved targets: {what}", f"{share:.0%}")
        for what, share in zip(("rise", "stay", "fall"), effect.shares("two stages").values())
    ]
    settings = effect.runs[0].settings
    known = data is not None and data.fingerprint == settings["data_fingerprint"]
    by_group, shown = [], []
    of_letters = letters(effect)
    if data is not None and known:
        for what, values in user_properties(data).items():
            found = groups(effect, values, METRIC_NAME, METRIC_K)
            chart = groups_chart(found, what, METRIC)
            by_group.append((f"{METRIC} of all users by number of {what}", chart))
        shown = examples(effect, data)
    return {
        "name": f"{name}, {count_seeds(len(effect.runs))}",
        "scores": effect.scores,
        "differences": effect_rows(effect),
        "numbers": numbers,
        "matrix": matrix_chart(effect.matrix("two stages")),
        "letters": letters_chart(of_letters) if of_letters else "",
        "groups": by_group,
        "examples": shown,
    }


def _run_part(recipe: Recipe, run: Run) -> dict[str, str]:
    seed = run.settings.get("seed")
    return {
        "name": f"{recipe.name}, seed {seed}",
        "folder": str(run.folder),
        "command": run.settings.get("command", ""),
        "settings": json.dumps(run.settings, indent=2, ensure_ascii=False),
    }
