"""``recommend.py``: the scores of the evaluation, after any history."""

import json
from pathlib import Path

import numpy as np
import pytest

import recommend
from datasets import SequenceDataset
from errors import UserError
from recipes.recommend import Recommender
from recipes.second_stage import read_ranker
from storage import read_json
from tests.helpers import run_script


def cut_histories(data: SequenceDataset) -> list[np.ndarray]:
    """Each user's history before the test target."""
    ends = data.history_ends("test")
    return [data.item_ids[start:end] for start, end in zip(data.offsets, ends)]


def test_retriever_as_in_candidates(retrieved: Path, toy_data: SequenceDataset):
    recommender = Recommender(retrieved, toy_data, "cpu", None)
    found = recommender.recommend(cut_histories(toy_data), 20)
    with np.load(retrieved / "candidates.npz") as file:
        assert np.array_equal(found.items, file["test_items"])
        np.testing.assert_allclose(found.scores["retriever"], file["test_scores"], rtol=1e-6)
    assert (found.retrieved == np.arange(1, 21)).all()


def test_ranker_as_in_rankings(ranker: Path, toy_data: SequenceDataset, tiny_llama: Path):
    recommender = Recommender(ranker, toy_data, "cpu", str(tiny_llama))
    found = recommender.recommend(cut_histories(toy_data), 20)
    weights = read_json(ranker / "fusion.json")["weights"]
    alone = sum(weight * found.scores[name] for name, weight in weights["ranker"].items())
    with np.load(ranker / "rankings.npz") as file:
        users, items, scores = file["users"], file["items"], file["scores"]
        labels, fused_ranks = file["labels"], file["fused_label_ranks"]
    for row, user in enumerate(users):
        order = np.argsort(found.items[user])
        expected = np.argsort(items[row])
        assert np.array_equal(found.items[user][order], items[row][expected])
        np.testing.assert_allclose(alone[user][order], scores[row][expected], rtol=0.02, atol=0.02)
        assert found.items[user].tolist().index(labels[user]) + 1 == fused_ranks[user]


@pytest.mark.parametrize("ranker", ["titles", "guided"], indirect=True)
def test_runs_from_before_the_priors_had_names(
    ranker: Path, toy_data: SequenceDataset, tiny_llama: Path
):
    settings = read_json(ranker / "config.json")
    prior = settings.pop("title_prior")
    settings["retriever_prior"] = prior == "retriever"
    found = read_ranker(ranker, settings, toy_data, "cpu", str(tiny_llama))
    assert found.config.title_prior == prior


def test_the_full_history_is_read_and_left_out(
    retrieved: Path, toy_data: SequenceDataset, capsys: pytest.CaptureFixture[str]
):
    name = toy_data.user_names[3]
    recommend.main(["--run", str(retrieved), "--user", name, "--k", "7", "--json"])
    answer = json.loads(capsys.readouterr().out)
    items = toy_data.item_ids[toy_data.offsets[3] : toy_data.offsets[4]]
    assert answer["user"] == name
    assert answer["history"] == [toy_data.titles[item] for item in items]
    assert [row["rank"] for row in answer["recommendations"]] == list(range(1, 8))
    seen = {toy_data.item_names[item] for item in items}
    assert not seen & {row["item"] for row in answer["recommendations"]}
    for row in answer["recommendations"]:
        assert toy_data.titles[toy_data.item_names.index(row["item"])] == row["title"]


def test_an_explanation(
    ranker: Path, toy_data: SequenceDataset, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--run", str(ranker), "--llm_base_model", str(tiny_llama), "--user", "u1", "--explain"]
    recommend.main([*flags, "--json"])
    answer = json.loads(capsys.readouterr().out)
    rows = answer["recommendations"]
    assert sorted(row["retrieved"] for row in rows) == list(range(1, 21))
    last = answer["history"][-1]
    if read_json(ranker / "config.json")["verbalizer"] == "letters":
        first = next(row["title"] for row in rows if row["retrieved"] == 1)
        assert f"{last}; \n Candidate pool: (A) {first} \n (B) " in answer["prompt"]
    else:
        assert answer["prompt"].endswith(f"\n{last}\n")
    recommend.main(flags)
    printed = capsys.readouterr().out
    assert printed.startswith("The language model reads:\n  | ") and last in printed
    assert len(printed.split("rank  title")[1].splitlines()) == 21


def test_nothing_to_explain(retrieved: Path, capsys: pytest.CaptureFixture[str]):
    recommend.main(["--run", str(retrieved), "--user", "u1", "--explain"])
    assert "note: --explain has no effect" in capsys.readouterr().err


def test_titles_of_somebody_new(
    retrieved: Path, toy_data: SequenceDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    titles = [toy_data.titles[4], toy_data.titles[9]]
    recommend.main(["--run", str(retrieved), "--history", "; ".join(titles), "--k", "3"])
    printed = capsys.readouterr()
    assert printed.out.startswith(f"History:\n  {titles[0]}\n  {titles[1]}\n\nrank  title")
    assert len(printed.out.splitlines()) == 8 and "note" not in printed.err
    file = tmp_path / "titles.txt"
    file.write_text(f"{titles[0].upper()}!\n\n{titles[1]}\n")
    recommend.main(["--run", str(retrieved), "--history", str(file), "--k", "3"])
    assert capsys.readouterr().out == printed.out


def test_a_conversation(
    retrieved: Path,
    toy_data: SequenceDataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    lines = iter([toy_data.user_names[0], "qqqq", toy_data.titles[2], ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    recommend.main(["--run", str(retrieved), "--k", "2"])
    printed = capsys.readouterr().out
    assert f"History of user {toy_data.user_names[0]}, the last 10 of" in printed
    assert f"no title in {toy_data.code} resembles 'qqqq'" in printed
    assert printed.count("rank  title") == 2 and next(lines, None) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--user", "u1", "--history", "a"], "--user and --history: give one of them"),
        (["--user", "u1", "--k", "0"], "--k and --part_users must be at least 1"),
        (["--user", "u1", "--k", "41"], "--k 41: 40 items are in the catalogue"),
        (["--user", "nobody"], "--user nobody: no such user in interactions-.*; similar: "),
        (["--user", ""], "--user : no such user"),
        (["--history", " ; "], "--history: no titles"),
        (["--history", ""], "--history: no titles"),
        (["--input", "/dev/null", "--output", "x"], "/dev/null is not a regular file"),
        (["--history", "qqqq"], "give other titles with --history|no title in .* resembles"),
        ([], "give a user with --user, titles with --history or a file with --input"),
    ],
)
def test_mistakes(retrieved: Path, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(UserError, match=message):
        recommend.main(["--run", str(retrieved), *flags])


def test_runs_that_cannot_be_used(retrieved: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.json there"):
        recommend.main(["--run", str(tmp_path), "--user", "u1"])
    (tmp_path / "config.json").write_bytes((retrieved / "config.json").read_bytes())
    with pytest.raises(UserError, match="the run is not finished"):
        recommend.main(["--run", str(tmp_path), "--user", "u1"])
    (tmp_path / "config.json").write_text('{"temperature": 0.8}')  # of augment_data.py
    with pytest.raises(UserError, match="it is no run of train_retriever"):
        recommend.main(["--run", str(tmp_path), "--user", "u1"])


def test_as_a_script(retrieved: Path):
    done = run_script("recommend.py", "--run", retrieved, "--user", "nobody")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --user nobody")
