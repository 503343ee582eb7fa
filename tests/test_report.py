"""The report: tables beside the paper, bootstrap intervals, comparisons."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import report
from config import UserError
from tests.conftest import ROOT, run_script


def test_paper_tables_hold_both_tables():
    paper = json.loads((ROOT / "experiments" / "paper.json").read_text())
    assert paper["all_users"]["beauty"]["LRURec"]["NDCG@10"] == 0.0533
    assert paper["retrieved_users"]["games"]["LlamaRec"]["Recall@5"] == 0.4995
    for table in ("all_users", "retrieved_users"):
        for models in paper[table].values():
            assert set(models) == {"NARM", "BERT4Rec", "SASRec", "LRURec", "LlamaRec"}
            assert all({*metrics} == {*report.METRICS[:-1]} for metrics in models.values())


def test_interval_is_that_of_the_mean():
    values = (np.random.default_rng(0).random(2000) < 0.3).astype(float)
    low, high = report.interval(values[None], np.ones((1, 2000), dtype=bool))
    error = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / len(values))
    assert low == pytest.approx(values.mean() - error, abs=error / 10)
    assert high == pytest.approx(values.mean() + error, abs=error / 10)


def test_interval_of_runs_that_retrieved_other_users_is_around_their_mean(retrieved: Path):
    first = report.read_run(retrieved)
    ranks = np.tile([1, 8], 500)
    easy, all_users = ranks == 1, np.ones(1000, dtype=bool)
    runs = [
        first._replace(ranks=ranks, retrieved=easy),
        first._replace(ranks=ranks, retrieved=all_users, settings=first.settings | {"seed": 7}),
    ]
    values, counted = report.Recipe("both", runs).gains("Recall@5", True)
    mean = values[counted].mean()  # 1,000 of the 1,500 counted; 3 of 4 averaged user by user
    low, high = report.interval(values, counted)
    assert mean == pytest.approx(2 / 3) and low < mean < high and high < 0.72


def test_baselines_of_table_3_are_on_the_users_lrurec_retrieved(retrieved: Path):
    lru = report.read_run(retrieved)
    tuned = lru._replace(
        settings=lru.settings | {"preset": "tuned"}, retrieved=np.roll(lru.retrieved, 1)
    )
    sas = lru._replace(settings=lru.settings | {"model_code": "sas"}, retrieved=~lru.retrieved)
    found = report.on_shared_users(sas, [sas, tuned, lru])
    assert (found.retrieved == lru.retrieved).all() and (found.ranks == sas.ranks).all()
    searched = lru._replace(search={"points": []}, retrieved=np.roll(lru.retrieved, 2))
    found = report.on_shared_users(sas, [searched, lru])
    assert (found.retrieved == lru.retrieved).all()
    found = report.on_shared_users(sas._replace(search=searched.search), [lru, searched])
    assert (found.retrieved == searched.retrieved).all()
    assert report.on_shared_users(sas, [sas]) is sas
    assert report.on_shared_users(tuned, [lru, tuned]) is tuned


def test_report_on_a_run(retrieved: Path, tmp_path: Path):
    target = tmp_path / "lru" / "custom"
    shutil.copytree(retrieved, target)
    done = run_script("report.py", "--experiment_root", tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((target / "test_metrics.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert "| **LRURec, paper**, 1 seed | " in text and f" {metrics['NDCG@10']:.4f} (" in text
    with open(tmp_path / "report.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    same = run_script("report.py", "--compare", target, retrieved)
    assert same.returncode == 0 and "+0.0000" in same.stdout and "p = 1.0000" in same.stdout


def test_runs_of_one_recipe_are_averaged_over_seeds(retrieved: Path):
    first = report.read_run(retrieved)
    again = first._replace(
        settings=first.settings | {"seed": 7, "export_root": "elsewhere"}, ranks=first.ranks + 1
    )
    root = retrieved.parent
    other = first._replace(folder=root / "varied", settings=first.settings | {"dropout": 0.125})
    older = {k: v for k, v in first.settings.items() if k != "augmented_place"} | {"seed": 8}
    older = first._replace(settings=older, ranks=first.ranks + 2)
    runs = [first, again, other, older, again._replace(folder=Path("the same once more"))]
    ((code, (base, changed)),) = report.find_recipes(runs, root).items()
    assert (code, len(base.runs), len(changed.runs)) == ("custom", 3, 1)
    assert base.name == f"LRURec, paper ({retrieved.name})"
    assert changed.name == "LRURec, paper (varied)"
    lines = report.table(code, [base], {"all_users": {}, "retrieved_users": {}}, subset=False)
    means = [np.mean(run.ranks <= 5) for run in base.runs]
    recall, spread = (line.split("|")[4].split()[0] for line in lines[2:4])
    assert recall == f"{np.mean(means):.4f}" and spread == f"{np.std(means, ddof=1):.4f}"


def test_what_a_search_chose_is_no_recipe_of_its_own(retrieved: Path, tmp_path: Path):
    for seed, dropout in ((1, 0.2), (2, 0.4)):
        folder = tmp_path / str(seed)
        shutil.copytree(retrieved, folder)
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"seed": seed, "dropout": dropout}
        (folder / "config.json").write_text(json.dumps(settings))
        points = [
            {"weight_decay": 0, "dropout": x, "folder": f"d{x}", "val": {"NDCG@10": x + seed}}
            for x in (0.2, 0.4)
        ]
        record = {"best_metric": "NDCG@10", "selected": f"d{dropout}", "points": points}
        (folder / "search.json").write_text(json.dumps(record))
    ((_, (recipe,)),) = report.find_recipes(report.find_runs(tmp_path), tmp_path).items()
    assert recipe.name == "LRURec, paper, searched" and len(recipe.runs) == 2
    head, _, first, second = report.search_table("custom", [recipe])
    assert head == "| `custom` | 0, 0.2 | 0, 0.4 |"
    assert first.endswith("NDCG@10, seed 1 | **1.2000** | 1.4000 |")
    assert second.endswith("NDCG@10, seed 2 | 2.2000 | **2.4000** |")


def test_rankers_and_their_fused_scores_are_two_recipes(retrieved: Path, tmp_path: Path):
    folder = tmp_path / "tiny" / "custom"
    folder.mkdir(parents=True)
    settings = {"dataset_code": "custom", "llm_base_model": "tiny", "data_fingerprint": "x"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "overall_metrics.json").write_text("{}")
    ranks = np.arange(1, 11)
    np.savez(
        folder / "rankings.npz", users=np.arange(5), label_ranks=ranks, fused_label_ranks=ranks + 1
    )
    ((_, (alone, fused)),) = report.find_recipes(report.find_runs(tmp_path), tmp_path).items()
    assert (alone.name, fused.name) == ("LlamaRec, tiny", "LlamaRec, tiny, fused scores")
    assert (fused.runs[0].ranks == ranks + 1).all() and fused.runs[0].retrieved.sum() == 5
    pair = ["--compare", folder, folder, "--metric", "MRR@10"]
    assert "+0.0000" in run_script("report.py", *pair).stdout


def test_rankers_on_other_retrievers_or_data_are_other_recipes(retrieved: Path):
    first = report.read_run(retrieved)
    lru = {"model_code": "lru", "preset": "paper", "seed": 1}
    settings = {"dataset_code": "custom", "llm_base_model": "tiny", "data_fingerprint": "x"}

    def ranker(retriever: dict, **own: object) -> report.Run:
        return first._replace(settings=settings | own | {"retriever": lru | retriever})

    runs = [
        ranker({}),
        ranker({"seed": 2}, seed=2),
        ranker({"preset": "tuned"}),
        ranker({}, seed=2, data_fingerprint="y"),
    ]
    ((_, found),) = report.find_recipes(runs, retrieved.parent).items()
    assert sorted(len(recipe.runs) for recipe in found) == [1, 1, 2]


def test_a_run_that_retrieved_no_answer(retrieved: Path):
    run = report.read_run(retrieved)
    recipe = report.Recipe("none", [run._replace(retrieved=np.zeros_like(run.retrieved))])
    paper = {"all_users": {}, "retrieved_users": {}}
    line = report.table("custom", [recipe], paper, subset=True)[2]
    assert line == "| **none**, 1 seed |" + " no users |" * 6


def test_comparison_finds_a_difference_and_no_difference(retrieved: Path):
    first = report.read_recipe(retrieved)
    (run,) = first.runs
    better = first._replace(runs=[run._replace(ranks=np.maximum(run.ranks // 2, 1))])
    assert "p < 0.0002" in report.compare(first, better, "NDCG@10")
    with pytest.raises(UserError, match="--metric"):
        report.compare(first, better, "NDCG@ten")
    elsewhere = run._replace(settings=run.settings | {"data_fingerprint": "other"})
    with pytest.raises(UserError, match="different data"):
        report.compare(first, first._replace(runs=[run, elsewhere]), "NDCG@10")


def test_comparison_takes_means_over_seeds(retrieved: Path, tmp_path: Path):
    settings = json.loads((retrieved / "config.json").read_text())
    for seed in (1, 2):
        shutil.copytree(retrieved, tmp_path / "seeds" / str(seed))
        changed = json.dumps(settings | {"seed": seed})
        (tmp_path / "seeds" / str(seed) / "config.json").write_text(changed)
    seeds, one = report.read_recipe(tmp_path / "seeds"), report.read_recipe(retrieved)
    worse = seeds._replace(
        runs=[seeds.runs[0], seeds.runs[1]._replace(ranks=one.runs[0].ranks + 1)]
    )
    hits, fewer = (np.mean(ranks <= 5) for ranks in (one.runs[0].ranks, worse.runs[1].ranks))
    assert f" = {(fewer - hits) / 2:+.4f}, " in report.compare(one, worse, "Recall@5")
    done = run_script("report.py", "--compare", retrieved, tmp_path / "seeds")
    assert "+0.0000" in done.stdout and "2 and 1 seeds" in done.stdout

    changed = json.dumps(settings | {"dropout": 0.125})
    (tmp_path / "seeds" / "1" / "config.json").write_text(changed)
    done = run_script("report.py", "--compare", retrieved, tmp_path / "seeds")
    assert done.returncode == 2 and "several recipes" in done.stderr


def test_report_without_runs(tmp_path: Path):
    for flags in (["--experiment_root", tmp_path], ["--compare", tmp_path, tmp_path]):
        done = run_script("report.py", *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
