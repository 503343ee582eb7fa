"""Finding runs and grouping them into recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import DATASET_CODES
from errors import ArgumentError, InputError, UserError
from reporting.runs import (
    Recipe,
    Run,
    find_recipes,
    find_runs,
    fused_variants,
    on_lrurec_users,
    read_run,
    read_runs,
    single_recipe,
)


def recipes_of(runs: list[Run], root: Path) -> list[Recipe]:
    ((_, recipes),) = find_recipes(runs, root).items()
    return recipes


def test_reads_a_retriever(write_retriever: Callable[..., Path], tmp_path: Path):
    run = read_run(write_retriever(tmp_path / "run"))
    assert run is not None and run.fused() is None and run.search is None
    assert (run.dataset, run.model, run.name) == ("custom", "LRURec", "LRURec, paper")
    assert run.ranks.tolist() == list(range(1, 11))
    assert run.retrieved.tolist() == [True] * 5 + [False] * 5
    assert run.validation_curve("NDCG@10") == ([2, 4], [0.1, 0.2])
    assert run.validation_curve("MRR@7") == ([], [])


def test_reads_a_ranker(write_ranker: Callable[..., Path], tmp_path: Path):
    run = read_run(write_ranker(tmp_path / "run"))
    assert run is not None and (run.model, run.name) == ("LlamaRec", "LlamaRec, tiny")
    assert run.ranks.tolist() == list(range(1, 11)) and run.retrieved.sum() == 5
    fused = run.fused()
    assert fused is not None and fused.name == "LlamaRec, tiny, fused scores"
    assert (fused.ranks == run.ranks + 1).all() and fused.fused() is None


def test_names_tell_variants_apart(make_run: Callable[..., Run]):
    assert make_run(model_code="sas", preset="tuned").name == "SASRec, tuned"
    assert make_run(augmented="folder", search={"points": []}).name == (
        "LRURec, paper, searched, augmented"
    )


def test_unfinished_runs_and_points_of_a_search_are_skipped(
    write_retriever: Callable[..., Path], tmp_path: Path
):
    write_retriever(tmp_path / "lru" / "custom")
    write_retriever(tmp_path / "lru" / "custom" / "search" / "point")
    (write_retriever(tmp_path / "sas" / "custom") / "test_metrics.json").unlink()
    assert [run.folder for run in find_runs(tmp_path)] == [tmp_path / "lru" / "custom"]
    assert read_run(tmp_path / "sas" / "custom") is None
    assert find_runs(tmp_path / "absent") == []


def test_a_folder_is_a_run_or_contains_runs(write_retriever: Callable[..., Path], tmp_path: Path):
    one = write_retriever(tmp_path / "1")
    write_retriever(tmp_path / "2")
    assert [run.folder.name for run in read_runs(one)] == ["1"]
    assert [run.folder.name for run in read_runs(tmp_path)] == ["1", "2"]


def test_damaged_runs_are_refused(write_retriever: Callable[..., Path], tmp_path: Path):
    folder = write_retriever(tmp_path / "run")
    (folder / "log.jsonl").write_text("{")
    run = read_run(folder)
    assert run is not None
    with pytest.raises(InputError, match=r"log\.jsonl is damaged"):
        run.validation_curve("NDCG@10")
    (folder / "config.json").write_text(json.dumps({"dataset_code": "custom"}))
    with pytest.raises(UserError, match=r"config\.json .* no data_fingerprint"):
        read_run(folder)
    (folder / "candidates.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="run is damaged"):
        read_run(folder)


def test_baselines_of_table_3_use_the_users_of_the_most_similar_lrurec_run(
    make_run: Callable[..., Run],
):
    users = np.arange(10)
    lru = make_run()
    tuned = make_run(preset="tuned", retrieved=users == 1)
    other_seed = make_run(seed=2, retrieved=users == 2)
    searched = make_run(search={"points": []}, retrieved=users == 3)
    sas = make_run(model_code="sas", retrieved=users == 4, ranks=users + 3)
    every = [sas, tuned, other_seed, searched, lru]
    shared = on_lrurec_users(sas, every)
    assert (shared.retrieved == lru.retrieved).all() and (shared.ranks == sas.ranks).all()
    searched_sas = sas._replace(search=searched.search)
    assert (on_lrurec_users(searched_sas, every).retrieved == searched.retrieved).all()
    # The seed weighs less than the preset.
    assert (on_lrurec_users(sas, [tuned, other_seed]).retrieved == other_seed.retrieved).all()
    assert on_lrurec_users(sas, [sas, make_run(data_fingerprint="other")]) is sas
    assert on_lrurec_users(tuned, every) is tuned


def test_the_users_of_lrurec_reach_runs_on_disk(
    write_retriever: Callable[..., Path], write_ranker: Callable[..., Path], tmp_path: Path
):
    sas = write_retriever(tmp_path / "a", model_code="sas")
    write_retriever(tmp_path / "b")
    with np.load(sas / "candidates.npz") as file:
        arrays = dict(file)
    np.savez(sas / "candidates.npz", **arrays | {"test_items": np.zeros((10, 2), dtype=int)})
    write_ranker(tmp_path / "c", retriever={})
    assert [run.retrieved.sum() for run in find_runs(tmp_path)] == [5, 5, 5]


def test_runs_that_differ_only_in_seed_and_handling_share_a_recipe(make_run: Callable[..., Run]):
    first = make_run()
    handled = make_run(
        seed=2, export_root="elsewhere", num_workers=3, device="cuda", torch="2.0", versions={},
        commit="c", fingerprint="f", total_steps=9, num_processes=2,
    )  # fmt: skip
    (recipe,) = recipes_of([first, handled], first.folder.parent)
    assert (recipe.name, recipe.runs) == ("LRURec, paper", [first, handled])


def test_any_other_recorded_setting_makes_another_recipe(make_run: Callable[..., Run]):
    first = make_run()
    root = first.folder.parent
    varied = make_run(folder=root / "varied", dropout=0.125)
    recorded = make_run(folder=root / "more", unheard_of=None)
    recipes = recipes_of([first, varied, recorded], root)
    assert [recipe.name for recipe in recipes] == [
        "LRURec, paper (more)",
        "LRURec, paper (run)",
        "LRURec, paper (varied)",
    ]


def test_of_runs_with_the_same_seed_the_first_counts(make_run: Callable[..., Run]):
    first = make_run()
    (recipe,) = recipes_of([first, make_run(ranks=first.ranks + 1)], first.folder.parent)
    assert len(recipe.runs) == 1 and recipe.runs[0] is first


def test_the_choice_of_a_grid_search_does_not_make_a_recipe(make_run: Callable[..., Run]):
    search: dict[str, Any] = {"points": []}
    first = make_run(search=search)
    second = make_run(search=search, seed=2, dropout=0.1, attn_dropout=0.1, weight_decay=0.0)
    (recipe,) = recipes_of([first, second], first.folder.parent)
    assert recipe.name == "LRURec, paper, searched" and len(recipe.runs) == 2
    assert len(recipes_of([first, make_run()], first.folder.parent)) == 2


def test_fused_scores_are_a_recipe_of_their_own(write_ranker: Callable[..., Path], tmp_path: Path):
    write_ranker(tmp_path / "tiny" / "custom")
    runs = find_runs(tmp_path)
    alone, fused = recipes_of(runs + fused_variants(runs), tmp_path)
    assert (alone.name, fused.name) == ("LlamaRec, tiny", "LlamaRec, tiny, fused scores")


def test_rankers_on_other_retrievers_or_data_are_other_recipes(
    make_run: Callable[..., Run], ranker_settings: dict[str, Any]
):
    def ranker(retriever: dict[str, Any], **own: Any) -> Run:
        changed = {"retriever": ranker_settings["retriever"] | retriever}
        return make_run(settings=ranker_settings | changed | own)

    runs = [
        ranker({}),
        ranker({"seed": 2, "export_root": "elsewhere"}, seed=2),
        ranker({"preset": "tuned"}),
        ranker({}, seed=2, data_fingerprint="other"),
    ]
    recipes = recipes_of(runs, runs[0].folder.parent)
    assert sorted(len(recipe.runs) for recipe in recipes) == [1, 1, 2]


def test_recipes_are_in_the_order_of_the_paper(
    make_run: Callable[..., Run], ranker_settings: dict[str, Any]
):
    runs = [make_run(settings=ranker_settings)]
    runs += [make_run(model_code=code) for code in ("narm", "bert", "sas", "lru")]
    names = [recipe.model for recipe in recipes_of(runs, runs[0].folder.parent)]
    assert names == ["LRURec", "SASRec", "BERT4Rec", "NARM", "LlamaRec"]
    codes = ["new b", "custom", "new a", "ml-100k"]
    found = find_recipes([make_run(dataset_code=code) for code in codes], Path())
    known = sorted(["custom", "ml-100k"], key=DATASET_CODES.index)
    assert list(found) == [*known, "new b", "new a"]
    found = find_recipes([make_run(data_code=code) for code in ("log-1", "log-2")], Path())
    assert list(found) == ["log-1", "log-2"]


def test_a_single_recipe_is_named_like_its_folder(
    write_retriever: Callable[..., Path], tmp_path: Path
):
    for seed in (1, 2):
        write_retriever(tmp_path / str(seed), seed=seed)
    recipe = single_recipe(read_runs(tmp_path), tmp_path)
    assert recipe.name == str(tmp_path) and len(recipe.runs) == 2
    write_retriever(tmp_path / "3", dropout=0.125)
    with pytest.raises(ArgumentError, match="several recipes"):
        single_recipe(read_runs(tmp_path), tmp_path)
    with pytest.raises(ArgumentError, match="no finished run"):
        single_recipe([], tmp_path)


def test_a_single_recipe_has_fused_ranks_on_request(
    write_ranker: Callable[..., Path], write_retriever: Callable[..., Path], tmp_path: Path
):
    folder = write_ranker(tmp_path / "ranker")
    runs = read_runs(folder)
    for fused in (False, True):
        assert single_recipe(runs, folder, fused=fused).runs[0].ranks[0] == 1 + fused
    retriever = write_retriever(tmp_path / "retriever")
    assert single_recipe(read_runs(retriever), retriever, fused=True).runs[0].ranks[0] == 1
