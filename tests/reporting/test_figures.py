"""The figure of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reporting.figures import draw
from reporting.runs import find_recipes, find_runs, fused_variants


def drawn(root: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """Draw the runs below a folder, with the paper's NDCG@10 of LRURec at 0.4."""
    figures = []

    def savefig(figure: Figure, path: Path, **options: object) -> None:
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    runs = find_runs(root)
    recipes = find_recipes(runs + fused_variants(runs), root)
    draw(recipes, {"custom": {"LRURec": {"NDCG@10": 0.4}}}, root / "report.png")
    return figures[0]


def points(line: Line2D) -> list[float]:
    return [float(x) for x in np.asarray(line.get_xdata())]


def test_writes_a_png(write_retriever: Callable[..., Path], tmp_path: Path):
    write_retriever(tmp_path / "run")
    path = tmp_path / "report.png"
    draw(find_recipes(find_runs(tmp_path), tmp_path), {}, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_one_row_per_data_set_and_one_column_of_curves_per_stage(
    write_retriever: Callable[..., Path],
    write_ranker: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    write_retriever(tmp_path / "lru")
    write_retriever(tmp_path / "games", dataset_code="games")
    titles = [axis.get_title() for axis in drawn(tmp_path, monkeypatch).axes]
    assert titles == ["games", "retriever", "custom", "retriever"]
    write_ranker(tmp_path / "tiny")
    means, retrievers, rankers = drawn(tmp_path, monkeypatch).axes[3:]
    assert rankers.get_title() == "ranker, users retrieved"
    labels = [label.get_text() for label in means.get_yticklabels()]
    assert labels == ["LRURec, paper", "LlamaRec, tiny", "LlamaRec, tiny, fused scores"]
    # An interval and a mean per recipe, and the paper's mean of LRURec.
    assert len(means.lines) == 7
    assert [points(line) for line in means.lines if line.get_marker() == "x"] == [[0.4]]
    # The fused scores have no curve.
    assert [len(axis.lines) for axis in (retrievers, rankers)] == [1, 1]
    assert points(rankers.lines[0]) == [2, 4]
    assert rankers.lines[0].get_color() == means.lines[3].get_color()
