"""The report as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reporting.runs import Recipe, Run
from reporting.second_stage import Effect
from reporting.statistics import compare
from reporting.tables import (
    METRICS,
    comparison_line,
    data_table,
    effect_table,
    language_models_table,
    report_text,
    results_table,
    search_table,
)
from tests.helpers import ROOT


@pytest.fixture()
def searched(make_run: Callable[..., Run]) -> Recipe:
    """Two seeds of a grid search of two points, which select different points."""

    def run(seed: int, dropout: float) -> Run:
        points = [
            {"weight_decay": 0, "dropout": x, "folder": f"d{x}", "val": {"NDCG@10": x + seed}}
            for x in (0.2, 0.4)
        ]
        search = {"best_metric": "NDCG@10", "selected": f"d{dropout}", "points": points}
        return make_run(seed=seed, search=search)

    return Recipe("LRURec, paper, searched", [run(1, 0.2), run(2, 0.4)])


def test_the_papers_tables_are_complete():
    paper = json.loads((ROOT / "experiments" / "paper.json").read_text())
    assert paper["all_users"]["beauty"]["LRURec"]["NDCG@10"] == 0.0533
    assert paper["retrieved_users"]["games"]["LlamaRec"]["Recall@5"] == 0.4995
    for table in ("all_users", "retrieved_users"):
        for models in paper[table].values():
            assert set(models) == {"NARM", "BERT4Rec", "SASRec", "LRURec", "LlamaRec"}
            assert all({*metrics} == {*METRICS[:-1]} for metrics in models.values())
    ours = paper["language_models"]["beauty"]["LlamaRec"]
    assert ours.items() <= paper["all_users"]["beauty"]["LlamaRec"].items()


def test_data_table(make_run: Callable[..., Run], ranker_settings: dict[str, Any]):
    ranker = Recipe("ranker", [make_run(settings=ranker_settings)])
    beauty = make_run(num_users=1000, num_interactions=12345)
    recipes = {"beauty": [ranker, Recipe("lru", [beauty])], "custom": [ranker]}
    statistics = {"users": 22332, "items": 12086, "mean_length": 8.87}
    assert data_table(recipes, {"beauty": statistics}) == [
        "| data set | users | items | interactions | mean length | paper |",
        "|---|---|---|---|---|---|",
        "| `beauty` | 1,000 | 40 | 12,345 | 12.35 | 22,332 / 12,086 / 8.87 |",
    ]
    assert data_table({"custom": recipes["beauty"]}, {})[-1].endswith("| 12.35 |  |")


def test_results_table_has_means_deviations_and_the_papers_numbers(make_run: Callable[..., Run]):
    runs = [make_run(), make_run(seed=2, ranks=np.arange(3, 13))]
    recipe = Recipe("LRURec, paper", runs)
    paper = {"LRURec": {"Recall@5": 0.25}, "SASRec": {"Recall@5": 0.5}}
    head, _, means, deviations, published, difference = results_table(
        "custom", [recipe], paper, retrieved_only=False
    )
    assert head == "| `custom` | " + " | ".join(METRICS) + " |"
    column = 2 + METRICS.index("Recall@5")
    cells = [line.split(" | ") for line in (means, deviations, published, difference)]
    assert cells[0][0] == "| **LRURec, paper**, 2 seeds"
    assert [cells[0][column - 1][:8], cells[1][column - 1]] == ["0.4000 (", "0.1414"]
    assert (published, difference) == (
        "| the paper's LRURec |  |  | 0.2500 |  |  |  |  |",
        "| difference |  |  | +60.0% |  |  |  |  |",
    )


def test_results_of_retrieved_users(make_run: Callable[..., Run]):
    recipe = Recipe("one", [make_run()])
    head, _, line = results_table("custom", [recipe], {}, retrieved_only=True)
    assert "Recall@20" not in head
    assert line.startswith("| **one**, 1 seed | ")
    assert line.endswith(" | 1.0000 (1.0000 to 1.0000) |")
    none = Recipe("none", [make_run(retrieved=np.zeros(10, dtype=bool))])
    line = results_table("custom", [none], {}, retrieved_only=True)[2]
    assert line == "| **none**, 1 seed |" + " no users |" * 6


def test_language_models_table(make_run: Callable[..., Run], ranker_settings: dict[str, Any]):
    ranker = Recipe("LlamaRec, tiny", [make_run(settings=ranker_settings)])
    paper = {"P5": {"Recall@5": 0.25, "NDCG@10": 0.125}}
    head, _, ours, published = language_models_table("beauty", [ranker], paper)
    assert head == "| `beauty` | NDCG@5 | Recall@5 | NDCG@10 | Recall@10 |"
    assert ours.startswith("| **LlamaRec, tiny**, 1 seed | ") and ours.count("(") == 4
    assert published == "| the paper's P5 |  | 0.2500 | 0.1250 |  |"
    assert language_models_table("beauty", [Recipe("lru", [make_run()])], paper) == []
    assert language_models_table("games", [ranker], {}) == []


def test_search_table(searched: Recipe, make_run: Callable[..., Run]):
    assert search_table("custom", [searched, Recipe("plain", [make_run()])]) == [
        "| `custom` | 0, 0.2 | 0, 0.4 |",
        "|---|---|---|",
        "| LRURec, paper, searched, NDCG@10, seed 1 | **1.2000** | 1.4000 |",
        "| LRURec, paper, searched, NDCG@10, seed 2 | 2.2000 | **2.4000** |",
    ]
    assert search_table("custom", [Recipe("plain", [make_run()])]) == []


def test_comparison_line(make_run: Callable[..., Run]):
    one = Recipe("one", [make_run()])
    worse = Recipe("worse", [make_run(ranks=np.full(10, 99)), make_run(seed=2)])
    assert comparison_line(compare(one, one, "NDCG@10")) == (
        "NDCG@10: one minus one = +0.0000, 95% interval +0.0000 to +0.0000, "
        "paired bootstrap p = 1.0000 (10 users)"
    )
    line = comparison_line(compare(one, worse, "MRR@10"))
    assert line.startswith("MRR@10: worse minus one = -0.1464, 95% interval -")
    assert line.endswith("paired bootstrap p < 0.0002 (10 users, 2 and 1 seeds)")


def test_effect_table(make_run: Callable[..., Run]):
    before = np.arange(1, 11)[None]
    ranks = {"retriever": before, "two stages": np.full((1, 10), 99), "fused": before}
    losses = {"retriever": 3.0, "two stages": 2.5, "fused": 2.0}
    effect = Effect([make_run()], ranks, before < 6, losses)
    lines = effect_table("games", "LlamaRec", effect)
    assert lines[0] == ("| `games`: LlamaRec, 1 seed, minus the retriever | two stages | fused |")
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| MRR@10", "| NDCG@10", "| Recall@10"]
    assert lines[4:] == [
        "| Recall@10 | -1.0000 (-1.0000 to -1.0000, p < 0.0002) "
        "| +0.0000 (+0.0000 to +0.0000, p = 1.0000) |",
        "| log-loss, users retrieved; the retriever's is 3.0000 "
        "| 2.5000 (-0.5000) | 2.0000 (-1.0000) |",
    ]


def test_report_has_a_section_for_each_table(searched: Recipe, make_run: Callable[..., Run]):
    tables = ("statistics", "all_users", "retrieved_users", "language_models")
    paper: dict[str, Any] = {table: {} for table in tables}
    plain = {"custom": [Recipe("LRURec, paper", [make_run()])]}
    text = report_text(plain, paper)
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == [
        "# Data (Table 2)",
        "# All users (Table 1), with 95% bootstrap intervals over users",
        "# Users whose target LRURec retrieved (Table 3)",
    ]
    assert text.endswith(" |\n")
    text = report_text(plain | {"games": [searched]}, paper)
    assert "# Grid searches, validation by weight decay and dropout\n\n| `games` |" in text
