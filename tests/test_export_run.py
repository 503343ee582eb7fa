"""Exports: what programs that know nothing of this project compute from them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import export_run
from datasets import SequenceDataset
from errors import UserError
from recipes.recommend import Recommender
from storage import read_json
from tests.helpers import file_names, run_script
from tests.test_recommend import cut_histories

STAND_ALONE = """
import sys
assert not any(name in sys.modules for name in ("model", "dataloader", "recipes"))
json.dump(result, open("result.json", "w"))
"""


def run_readme(folder: Path, code: str) -> object:
    """Run the README's examples and further code in a process that cannot import the project."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    script = "import json\n" + "\n".join(blocks) + code + STAND_ALONE
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


def export(run: Path, folder: Path, *flags: object) -> None:
    export_run.main(["--run", str(run), "--output", str(folder), *map(str, flags)])


def test_the_retriever_with_torch_alone(retrieved: Path, toy_data: SequenceDataset, tmp_path: Path):
    folder = tmp_path / "exported"
    export(retrieved, folder)
    assert file_names(folder) == [
        "README.md", "candidates.parquet", "items.parquet", "retriever.pt2", "users.parquet",
    ]  # fmt: skip
    histories = [history.tolist() for history in cut_histories(toy_data)]
    code = f"result = [scores(history).topk(20).indices.tolist() for history in {histories}]"
    with np.load(retrieved / "candidates.npz") as file:
        candidates, labels = file["test_items"], file["test_labels"]
    assert run_readme(folder, code) == candidates.tolist()
    table = pd.read_parquet(folder / "candidates.parquet")
    table = table[table["split"] == "test"]
    assert table["item"].tolist() == [toy_data.item_names[item] for item in candidates.ravel()]
    assert table["title"].tolist() == [toy_data.titles[item] for item in candidates.ravel()]
    assert table["user"].unique().tolist() == toy_data.user_names
    assert table["target"].tolist() == (candidates == labels[:, None]).ravel().tolist()
    users = pd.read_parquet(folder / "users.parquet")
    assert users["name"].tolist() == toy_data.user_names


def test_the_ranker_with_transformers_and_peft_alone(
    ranker: Path, toy_data: SequenceDataset, tiny_llama: Path, tmp_path: Path
):
    folder = tmp_path / "exported"
    export(ranker, folder, "--llm_base_model", tiny_llama)
    with np.load(ranker / "rankings.npz") as file:
        items, labels, users = file["items"], file["labels"], file["users"]
    table = pd.read_parquet(folder / "rankings.parquet")
    assert table["item"].tolist() == [toy_data.item_names[item] for item in items.ravel()]
    assert table["target"].tolist() == (items == labels[users, None]).ravel().tolist()
    assert read_json(folder / "fusion.json") == read_json(ranker / "fusion.json")
    settings = read_json(ranker / "config.json")
    if settings["verbalizer"] == "titles" and settings["title_prior"] != "none":
        assert (folder / "adapter" / "prior_weights.safetensors").exists()
        return
    recommender = Recommender(ranker, toy_data, "cpu", str(tiny_llama))
    histories = cut_histories(toy_data)[:4]
    found = recommender.recommend(histories, 20)
    pairs = [(h.tolist(), c.tolist()) for h, c in zip(histories, found.items)]
    if settings["verbalizer"] == "letters":
        # The prompt lists the candidates in the retriever's order.
        by_rank = found.retrieved.argsort(1)
        pairs = [(h, np.take(c, order).tolist()) for (h, c), order in zip(pairs, by_rank)]
        code = f"result = [letter_logits(*pair).float().tolist() for pair in {pairs}]"
        expected = np.take_along_axis(found.scores["letter_logit"][:4], by_rank, 1)
    else:
        code = f"result = [[log_likelihood(h, c) for c in candidates] for h, candidates in {pairs}]"
        expected = found.scores["title_log_likelihood"]
    np.testing.assert_allclose(run_readme(folder, code), expected, rtol=0.03, atol=0.05)


def test_nothing_else_is_replaced(retrieved: Path, tmp_path: Path):
    folder = tmp_path / "exported"
    export(retrieved, folder)
    with pytest.raises(UserError, match="holds an export: replace it with --overwrite"):
        export(retrieved, folder)
    (folder / "notes.txt").write_text("")
    export(retrieved, folder, "--overwrite")
    assert not (folder / "notes.txt").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("")
    with pytest.raises(UserError, match="the folder holds something else"):
        export(retrieved, other, "--overwrite")
    with pytest.raises(UserError, match="is a file"):
        export(retrieved, other / "notes.txt")


def test_as_a_script(tmp_path: Path):
    done = run_script("export_run.py", "--run", tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 2 and "no config.json there" in done.stderr.splitlines()[-1]
    assert file_names(tmp_path) == []
