"""The HTML report: what it shows, and that it needs no network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import report
from datasets import SequenceDataset
from errors import InputError, UserError
from reporting.page import report_page
from reporting.runs import Recipe, Run, find_recipes, find_runs, fused_variants
from reporting.second_stage import (
    Effect,
    examples,
    find_effect,
    find_effects,
    groups,
    letters,
    user_properties,
)
from storage import read_json
from tests.helpers import make_data

VOID = {"meta", "input", "br", "link"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Checker(HTMLParser):
    """Checks that all elements are closed, and collects the addresses that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def root(ranker: Path) -> Path:
    """Folder of a finished retriever and ranker."""
    return ranker.parent


def page_of(root: Path, data: SequenceDataset | None) -> str:
    runs = find_runs(root)
    recipes = find_recipes(runs + fused_variants(runs), root)
    paper = report.read_json(report.PAPER)
    return report_page(recipes, paper, {data.code: data} if data else {}, "A <title>")


def test_a_page_of_both_stages(root: Path, toy_data: SequenceDataset):
    page = page_of(root, toy_data)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(address.startswith("#") for address in checker.addresses)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|"http://www.w3.org[^"]*"', "", page)
    has_letters = read_json(root / "run" / "config.json")["verbalizer"] == "letters"
    assert "<h1>A &lt;title&gt;</h1>" in page and page.count("<svg") == 4 + has_letters
    assert "python train_ranker.py --llm_retrieved_path" in page
    for text in ("What the second stage does", "20 users at random", "(the held-out item)"):
        assert text in page
    assert re.search(r"<td>NDCG@10</td>(<td>[+-]0\.\d{4} \([^<]*, p [^<]*</td>){2}</tr>", page)
    assert str(toy_data.summary().partition(": ")[2]) in page


def test_without_the_data_set_there_are_no_titles(root: Path):
    page = page_of(root, None)
    has_letters = "Letters that the ranker chooses" in page
    assert "users at random" not in page and page.count("<svg") == 2 + has_letters
    assert "What the second stage does" in page


def test_titles_cannot_break_the_page(root: Path, toy_data: SequenceDataset):
    titles = [f"</p><script>alert({i})</script>" for i in range(len(toy_data.titles))]
    page = page_of(root, replace(toy_data, titles=titles))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_examples_are_rankings_with_names(root: Path, toy_data: SequenceDataset):
    run = next(run for run in find_runs(root) if run.fused_ranks is not None)
    effect = find_effect(Recipe("ranker", [run]))
    assert effect is not None
    shown = examples(effect, toy_data)
    assert len(shown) == min(20, effect.retrieved.sum())
    for user in shown:
        index = toy_data.user_names.index(user.user)
        ((title, before, after, _),) = (row for row in user.candidates if row[3])
        assert title == toy_data.titles[toy_data.targets("test")[index]]
        assert before == effect.ranks["retriever"][0, index]
        assert after == effect.ranks["two stages"][0, index]
        assert sorted(row[1] for row in user.candidates) == list(range(1, 21))


def test_letters_chosen(tmp_path: Path, make_run: Callable[..., Run]):
    """Of five retrieved users with three candidates, A is chosen for three, rightly for one."""
    before = np.arange(30).reshape(10, 3)
    after = before[[0, 2, 4, 6, 8]].copy()
    after[3] = after[3][[1, 0, 2]]
    after[4] = after[4][[2, 1, 0]]
    (tmp_path / "retriever").mkdir()
    np.savez(tmp_path / "retriever" / "candidates.npz", test_items=before)
    np.savez(tmp_path / "rankings.npz", users=np.arange(0, 10, 2), items=after)
    retrieved = {"retrieved_from": str(tmp_path / "retriever")}
    run = make_run(folder=tmp_path, verbalizer="letters", permutations=1, **retrieved)
    ranks = np.array([[1, 9, 2, 9, 3, 9, 2, 9, 2, 9]])
    effect = Effect([run], {"retriever": ranks, "two stages": ranks}, ranks < 4, {})
    found = letters(effect)
    assert found is not None
    assert found.targets.tolist() == [0.2, 0.6, 0.2] and found.chosen.tolist() == [0.6, 0.2, 0.2]
    assert found.accuracy.tolist() == [1.0, pytest.approx(1 / 3), 0.0]
    run = make_run(folder=tmp_path, verbalizer="letters", permutations=2, **retrieved)
    assert letters(effect._replace(runs=[run])) is None
    assert letters(effect._replace(runs=[make_run(verbalizer="titles")])) is None
    np.savez(tmp_path / "rankings.npz", users=np.arange(0, 10, 2), items=after + 1)
    with pytest.raises(UserError, match="was made with other candidates than"):
        letters(effect)


def test_figure_3(write_retriever: Callable[..., Path], tmp_path: Path):
    write_retriever(tmp_path / "lru")
    row = {"model": "tiny", "generation_s": 9.0, "letters_s": 0.5, "titles_s": 0.4}
    lines = [{"not": "this"}, {"rows": [row | {"title_tokens": size} for size in (5, 10)]}]
    path = tmp_path / report.INFERENCE
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "(Figure 3)" in page and "tiny, letters, one forward pass" in page
    for damaged in ("no JSON", "", "{}", '{"rows": [{}]}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"ranker_inference\.json is damaged"):
            report.write_report(tmp_path)


def test_table_4_and_the_size_beside_the_papers(write_ranker: Callable[..., Path], tmp_path: Path):
    paper = json.loads(report.PAPER.read_text())
    write_ranker(tmp_path / "run", dataset_code="beauty")
    recipes = find_recipes(find_runs(tmp_path), tmp_path)
    data = replace(make_data([5] * 10), code="beauty")
    page = report_page(recipes, paper, {"beauty": data}, "title")
    assert "the paper (Table 2): 22,332 users, 12,086 items, mean length 8.87" in page
    table = page.split("(Table 4)")[1].split("</table>")[0]
    names = [html.unescape(x) for x in re.findall(r"<tr[^>]*><td>([^<]*)</td>", table)]
    models = [f"the paper's {x}" for x in ("P5", "PALR", "GPT4Rec", "RecMind", "POD", "LlamaRec")]
    assert names == ["LlamaRec, tiny, 1 seed", *models]
    assert "0.0653" in table and "0.0450" in table


@pytest.fixture()
def effect(make_run: Callable[..., Run]) -> Effect:
    """Ten users, of which five were retrieved, in one run."""
    ranks = {
        "retriever": np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]),
        "two stages": np.array([[2, 1, 3, 1, 1, 6, 7, 8, 9, 10]]),
    }
    return Effect([make_run()], ranks, np.arange(10)[None] < 5, {})


def test_shares_and_matrix(effect: Effect):
    assert effect.shares("two stages") == {"rises": 0.6, "stays": 0.2, "falls": 0.2}
    matrix = effect.matrix("two stages")
    assert matrix.shape == (5, 5) and matrix.sum() == 5
    assert matrix[0, 1] == matrix[1, 0] == matrix[2, 2] == matrix[3, 0] == matrix[4, 0] == 1


def test_differences_average_over_seeds(effect: Effect):
    (differences,) = effect.differences().values()
    assert list(differences) == ["MRR@10", "NDCG@10", "Recall@10"]
    assert differences["MRR@10"].mean == pytest.approx((-1 / 2 + 1 / 2 + 3 / 4 + 4 / 5) / 10)
    assert differences["Recall@10"][:3] == (0, 0, 0) and differences["Recall@10"].p == 1
    before, after = effect.ranks["retriever"], effect.ranks["two stages"]
    ranks = {"retriever": np.vstack([before, before]), "fused": np.vstack([after, before])}
    two = effect._replace(ranks=ranks).differences()
    assert list(two) == ["fused"]
    assert two["fused"]["NDCG@10"].mean == pytest.approx(differences["NDCG@10"].mean / 2)


def test_effects_need_their_retriever(
    write_ranker: Callable[..., Path], write_retriever: Callable[..., Path], tmp_path: Path
):
    retriever = write_retriever(tmp_path / "lru")
    gone = str(tmp_path / "gone")
    for seed, source in ((1, str(retriever)), (2, gone)):
        write_ranker(tmp_path / f"r{seed}", seed=seed, retrieved_from=source)
    recipes = find_recipes(find_runs(tmp_path), tmp_path)["custom"]
    ((name, effect),) = find_effects(recipes).items()
    assert name == "LlamaRec, tiny" and effect.log_losses == {}
    assert [run.settings["seed"] for run in effect.runs] == [1]
    losses = {"retriever": 3.0, "ranker": 2.5, "fused": 2.0}
    (tmp_path / "r1" / "fusion.json").write_text(json.dumps({"log_loss": {"test": losses}}))
    ((_, effect),) = find_effects(recipes).items()
    assert effect.log_losses == {"retriever": 3.0, "two stages": 2.5, "fused": 2.0}
    (tmp_path / "r1" / "fusion.json").write_text("{}")
    with pytest.raises(InputError, match=r"fusion\.json"):
        find_effects(recipes)


def test_groups_of_about_equal_size(effect: Effect):
    found = groups(effect, np.arange(1, 11), "Recall", 2)
    assert [group.num_users for group in found] == [4, 3, 3]
    assert [group.label for group in found] == ["1 to 4", "5 to 7", "8 to 10"]
    assert found[0].means["retriever"][0] == 0.5 and found[0].means["two stages"][0] == 0.75
    cold = groups(effect, np.array([0, 0, *range(1, 9)]), "Recall", 2)
    assert [group.label for group in cold] == ["0", "1 to 3", "4 to 5", "6 to 8"]
    assert [group.label for group in groups(effect, np.zeros(10, int), "Recall", 2)] == ["0"]
    (single,) = groups(effect, np.full(10, 7), "Recall", 2)
    assert single.label == "7" and single.num_users == 10


def test_user_properties(toy_data: SequenceDataset):
    lengths, popularity = user_properties(toy_data).values()
    assert lengths.sum() == len(toy_data.item_ids) - toy_data.num_users
    target = toy_data.targets("test")[5]
    ends = toy_data.history_ends("train")
    counts = [
        (toy_data.item_ids[start:end] == target).sum() for start, end in zip(toy_data.offsets, ends)
    ]
    assert popularity[5] == sum(counts)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser(root: Path, toy_data: SequenceDataset, tmp_path: Path):
    path = tmp_path / "report.html"
    search = '<script>const i = document.querySelector("input"); i.value = "no such title";'
    search += 'i.dispatchEvent(new Event("input"))</script></body>'
    path.write_text(page_of(root, toy_data).replace("</body>", search))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True
    )
    assert "CONSOLE" not in done.stderr
    articles = re.findall(r"<article[^>]*>", done.stdout)
    assert len(articles) == page_of(root, toy_data).count("<article>")
    assert all("hidden" in article for article in articles)
