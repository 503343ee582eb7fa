"""Charts of the HTML report as SVG that follows the page's colors."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dataloader.prompt import LETTERS
from reporting.runs import Recipe
from reporting.second_stage import Group, Letters
from reporting.statistics import summarize

# Text and axes are drawn in a color that nothing else has; it is replaced by the page's text color.
INK = "#010203"
STYLE: Any = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.facecolor": "none", "figure.facecolor": "none",
    "savefig.facecolor": "none", "legend.frameon": False, "svg.fonttype": "none",
    "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "svg.hashsalt": "report",
}  # fmt: skip
# Okabe and Ito's palette for color-blind readers; readable on white and on black.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
SHORT_CURVE = 2  # a curve of this many validations or fewer is not drawn
LETTER_LABELS = {
    "targets": "is the target's",
    "chosen": "is chosen",
    "accuracy": "is chosen, of those whose target it is",
}
INFERENCE_WAYS = {
    "generation": "generation",
    "letters": "letters, one forward pass",
    "titles": "titles, one forward pass",
}
PAPER_TITLE_TOKENS = 20


def means_chart(recipes: Sequence[Recipe], metric: str, paper: Mapping[str, float]) -> str:
    """Each recipe's mean with its interval, and the paper's value for its model as a cross.

    Args:
        recipes: the recipes of a data set.
        metric: the metric.
        paper: the paper's value by model.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 0.9 + 0.34 * len(recipes)), layout="constrained")
        axis = figure.subplots()
        for row, recipe in enumerate(recipes):
            if summary := summarize(recipe, metric):
                axis.plot(summary[1:3], [row, row], color=COLORS[0], linewidth=2)
                axis.plot(summary.mean, row, "o", color=COLORS[0])
            if recipe.model in paper:
                axis.plot(paper[recipe.model], row, "x", color=COLORS[1], markersize=8)
        axis.set_yticks(range(len(recipes)), [recipe.name for recipe in recipes])
        axis.set_ylim(len(recipes) - 0.5, -0.5)
        crosses = "; crosses: the paper" if paper else ""
        axis.set_xlabel(f"test {metric}, all users, with 95% intervals{crosses}")
        return _svg(figure)


def curves_chart(recipes: Sequence[Recipe], metric: str) -> str | None:
    """Validation curves of all runs of some recipes; None if none is long enough."""
    curves = [
        (recipe.name, run.validation_curve(metric))
        for recipe in recipes
        for run in recipe.runs
        if not run.is_fused
    ]
    curves = [(name, curve) for name, curve in curves if len(curve[0]) > SHORT_CURVE]
    if not curves:
        return None
    names = list(dict.fromkeys(name for name, _ in curves))
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        axis = figure.subplots()
        for name, (steps, values) in curves:
            index = names.index(name)
            label = None if name in axis.get_legend_handles_labels()[1] else name
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            axis.plot(steps, values, color=color, marker=marker, markersize=4, label=label)
        axis.set(xlabel="optimizer step", ylabel=f"validation {metric}")
        axis.legend(fontsize=9)
        return _svg(figure)


def groups_chart(groups: Sequence[Group], what: str, metric: str) -> str:
    """Means of a metric for groups of users and kinds of scores, with their intervals.

    Args:
        groups: the groups.
        what: the property by which users are grouped.
        metric: the metric.
    """
    names = list(groups[0].means)
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 2.8), layout="constrained")
        axis = figure.subplots()
        for index, name in enumerate(names):
            positions = np.arange(len(groups)) + 0.16 * (index - (len(names) - 1) / 2)
            means, lows, highs = np.array([group.means[name] for group in groups]).T
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            axis.vlines(positions, lows, highs, color=color, linewidth=2)
            axis.plot(positions, means, marker, color=color, label=name)
        labels = [f"{group.label}\n{group.num_users:,} users" for group in groups]
        axis.set_xticks(range(len(groups)), labels)
        axis.set(xlabel=what, ylabel=f"test {metric}", ylim=(0, None))
        figure.legend(loc="outside upper center", ncols=len(names), fontsize=9)
        return _svg(figure)


def letters_chart(letters: Letters) -> str:
    """How often a letter is the target's, is chosen, and is chosen where it is the target's."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3), layout="constrained")
        axis = figure.subplots()
        positions = np.arange(len(letters.targets))
        for index, (name, shares) in enumerate(letters._asdict().items()):
            color, marker = COLORS[index], MARKERS[index]
            axis.plot(positions, shares, marker, color=color, label=LETTER_LABELS[name])
        axis.set_xticks(positions, LETTERS[: len(positions)])
        axis.set(xlabel="letter, in the retriever's order", ylabel="share of users", ylim=(0, None))
        figure.legend(loc="outside upper center", ncols=3, fontsize=9)
        return _svg(figure)


def inference_chart(rows: Sequence[Mapping[str, Any]], paper_s: float) -> str:
    """Seconds per user by length of the titles, for each way to rank; the paper as a cross.

    Args:
        rows: the rows of ``benchmarks.ranker_inference``.
        paper_s: the paper's seconds for generating titles of 20 tokens.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        axis = figure.subplots()
        models = list(dict.fromkeys(row["model"] for row in rows))
        for index, (model, way) in enumerate(product(models, INFERENCE_WAYS)):
            own = [row for row in rows if row["model"] == model]
            lengths = [row["title_tokens"] for row in own]
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            label = f"{model}, {INFERENCE_WAYS[way]}"
            axis.plot(
                lengths, [row[f"{way}_s"] for row in own], color=color, marker=marker, label=label
            )
        axis.plot(PAPER_TITLE_TOKENS, paper_s, "x", color=INK, label="the paper, generation")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="tokens of a title", ylabel="seconds a user")
        axis.legend(fontsize=9)
        return _svg(figure)


def matrix_chart(matrix: np.ndarray) -> str:
    """How many targets move from each rank (row) to each rank (column).

    Args:
        matrix: (C, C) numbers of users.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4, 4.6), layout="constrained")
        axis: Axes = figure.subplots()
        size = len(matrix)
        image = axis.imshow(
            np.ma.masked_equal(matrix, 0), cmap="viridis", extent=(0.5, size + 0.5, size + 0.5, 0.5)
        )
        axis.plot([0.5, size + 0.5], [0.5, size + 0.5], color=INK, linewidth=0.8, linestyle=":")
        ticks = sorted({1, *range(5, size + 1, 5)})
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
        axis.set(xlabel="rank of the target by both stages", ylabel="rank by the retriever")
        figure.colorbar(image, ax=axis, label="users", shrink=0.8)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an ``svg`` element without a fixed size or a date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)  # the page sets the size
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # names of artists, the same in every figure
    return f"{head}>{body}".replace(INK, "currentColor")
