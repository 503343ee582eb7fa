"""The figure of the report: test metrics with the paper's, and learning curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reporting.runs import RANKER, Recipe
from reporting.statistics import summarize
from storage import atomic_path

METRIC = "NDCG@10"
STAGES = ("retriever", "ranker, users retrieved")


def draw(
    recipes: Mapping[str, Sequence[Recipe]],
    paper: Mapping[str, Mapping[str, Mapping[str, float]]],
    path: Path,
) -> None:
    """Draw NDCG@10 on the test split and its validation curves, one row for each data set.

    A recipe has the same color in all columns. Retrievers and rankers have separate columns of
    curves because rankers are validated only on users whose target was retrieved.

    Args:
        recipes: the recipes of each data set.
        paper: the paper's metrics for each data set and model, on all users.
        path: the PNG file to write.
    """
    present = {_stage(recipe) for of_dataset in recipes.values() for recipe in of_dataset}
    stages = [stage for stage in STAGES if stage in present]
    heights = [1.5 + 0.25 * max(8, len(of_dataset)) for of_dataset in recipes.values()]
    figure = Figure(figsize=(5 + 5 * len(stages), sum(heights)), layout="constrained")
    axes = figure.subplots(len(recipes), 1 + len(stages), squeeze=False, height_ratios=heights)
    for (code, of_dataset), (means, *curves) in zip(recipes.items(), axes):
        _draw_means(means, code, of_dataset, paper.get(code, {}))
        for axis, stage in zip(curves, stages):
            _draw_curves(axis, stage, of_dataset)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _stage(recipe: Recipe) -> str:
    return STAGES[recipe.model == RANKER]


def _colored(recipes: Sequence[Recipe]) -> Iterable[tuple[Recipe, Any]]:
    colormap = colormaps["tab20"]
    for index, recipe in enumerate(recipes):
        yield recipe, colormap(index % colormap.N)


def _draw_means(
    axis: Axes, code: str, recipes: Sequence[Recipe], paper: Mapping[str, Mapping[str, float]]
) -> None:
    """Draw each recipe's mean and interval, and a cross at the paper's mean."""
    for row, (recipe, color) in enumerate(_colored(recipes)):
        if summary := summarize(recipe, METRIC):
            axis.plot(summary[1:3], [row, row], color=color, linewidth=2)
            axis.plot(summary.mean, row, "o", color=color)
        if recipe.model in paper:
            axis.plot(paper[recipe.model][METRIC], row, "kx", markersize=7)
    axis.set_yticks(range(len(recipes)), [recipe.name for recipe in recipes])
    axis.invert_yaxis()
    axis.set(title=code, xlabel=f"{METRIC}, test, all users; x: paper")


def _draw_curves(axis: Axes, stage: str, recipes: Sequence[Recipe]) -> None:
    """Draw the validation curves of one stage's runs."""
    for recipe, color in _colored(recipes):
        if _stage(recipe) != stage:
            continue
        for run in recipe.runs:
            if not run.is_fused:  # fused scores are not validated in training
                axis.plot(*run.validation_curve(METRIC), color=color, linewidth=1.5, marker=".")
    axis.set(title=stage, xlabel="optimizer step", ylabel=f"validation {METRIC}")
    axis.locator_params(axis="x", nbins=5)  # avoids overlapping tick labels
