"""A finished run as files that other programs read without this project.

========================== =====================================================================
``README.md``              what each file is and how to load it
``items.parquet``          item number, name and title
``users.parquet``          user number and name
``candidates.parquet``     the retriever's candidates of every user, for validation and test
``retriever.pt2``          the retriever as a ``torch.export`` program
``rankings.parquet``       the ranker's order of the test candidates
``adapter/``               the ranker's adapter in PEFT's format
``prompt.json``            the prompt around titles, the letters and their token ids
``fusion.json``            the weights of both stages
========================== =====================================================================

The last four are written only for a ranker.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dataloader.candidates import CANDIDATES_FILE, SPLITS, Candidates, load_candidates
from dataloader.prompt import SEPARATOR, PromptBuilder
from dataloader.title_prompt import TitlePrompts
from datasets import SequenceDataset
from errors import advice
from model.export import export_retriever
from model.language_model import check_adapter
from model.registry import load_retriever
from recipes.export_readme import readme
from recipes.fit_ranker import ADAPTER, FUSION, RANKINGS
from recipes.runs import retriever_of
from recipes.second_stage import FinishedRanker, read_ranker
from storage import read_arrays, read_json, reading, write_json
from trainer.run_folder import CONFIG

RETRAIN, RERANK = "run train_retriever.py again", "run train_ranker.py again"


def export_run(
    run_dir: Path,
    settings: dict[str, Any],
    data: SequenceDataset,
    base_model: str | None,
    folder: Path,
) -> None:
    """Write all files of a run.

    Args:
        run_dir: a finished run.
        settings: its ``config.json``.
        data: its data set.
        base_model: overrides the language model that the settings name.
        folder: an empty folder.

    Raises:
        UserError: the run cannot be used.
    """
    ranker, described = None, {}
    retriever_dir, retriever = retriever_of(run_dir, settings)
    if "verbalizer" in settings:
        ranker = read_ranker(run_dir, settings, data, "cpu", base_model)
        export_ranker(run_dir, ranker, folder)
        export_rankings(run_dir, data, folder)
        config = ranker.config
        kind = f"titles, {config.title_prior}" if config.verbalizer == "titles" else "letters"
        described = {"base_model": ranker.language_model.base.name, "scores": kind}
    with reading(run_dir / CONFIG):
        mask_history = retriever["mask_history"] != "never"
    export_data(data, ranker.prompts if ranker else None, folder)
    export_candidates(retriever_dir, data, folder)
    max_len = export_model(retriever_dir, data.num_items, folder, mask_history=mask_history)
    text = readme(run_dir, data, max_len=max_len, mask_history=mask_history, **described)
    (folder / "README.md").write_text(text, encoding="utf-8")


def export_data(
    data: SequenceDataset, prompts: PromptBuilder | TitlePrompts | None, folder: Path
) -> None:
    """Write the names of users and items by their numbers, and the titles of items.

    Args:
        data: the data set.
        prompts: the ranker's prompts, to write titles also as they are in prompts; or None.
        folder: folder of the files.
    """
    columns = {
        "item": np.arange(1, data.num_items + 1, dtype=np.int32),
        "name": data.item_names[1:],
        "title": data.titles[1:],
    }
    if isinstance(prompts, TitlePrompts):
        columns["title_token_ids"] = [line.tolist() for line in prompts.lines[1:]]
    elif prompts:
        columns["prompt_title"] = prompts.titles[1:]
    _write(folder / "items.parquet", **columns)
    users = np.arange(data.num_users, dtype=np.int32)
    _write(folder / "users.parquet", user=users, name=data.user_names)


def export_candidates(run_dir: Path, data: SequenceDataset, folder: Path) -> None:
    """Write ``candidates.npz`` with names, one row per candidate."""
    with advice(RETRAIN):
        splits = load_candidates(run_dir / CANDIDATES_FILE, data)
    columns = [_candidate_columns(splits[split], split, data) for split in SPLITS]
    _write(
        folder / "candidates.parquet",
        **{name: np.concatenate([part[name] for part in columns]) for name in columns[0]},
    )


def _candidate_columns(
    candidates: Candidates, split: str, data: SequenceDataset
) -> dict[str, np.ndarray]:
    """Columns of one split; ``target`` marks the held-out item."""
    users, size = candidates.items.shape
    return {
        "split": np.repeat(split, users * size),
        **_item_columns(np.arange(users), candidates.items, data),
        "score": candidates.scores.ravel(),
        "target": (candidates.items == candidates.labels[:, None]).ravel(),
    }


def _item_columns(
    users: np.ndarray, items: np.ndarray, data: SequenceDataset
) -> dict[str, np.ndarray]:
    """Columns of the ranked items (n, C) of users (n,)."""
    size = items.shape[1]
    user_names, names = np.array(data.user_names, object), np.array(data.item_names, object)
    titles = np.array(data.titles, object)
    return {
        "user": np.repeat(user_names[users], size),
        "rank": np.tile(np.arange(1, size + 1, dtype=np.int32), len(users)),
        "item": names[items.ravel()],
        "title": titles[items.ravel()],
    }


def export_rankings(run_dir: Path, data: SequenceDataset, folder: Path) -> None:
    """Write ``rankings.npz`` with names, one row per candidate of the retrieved users."""
    path = run_dir / RANKINGS
    with advice(RERANK), reading(path):
        arrays = read_arrays(path)
        users, items = arrays["users"], arrays["items"]
        targets = arrays["labels"][users]
        _write(
            folder / "rankings.parquet",
            **_item_columns(users, items, data),
            score=arrays["scores"].ravel(),
            target=(items == targets[:, None]).ravel(),
        )


def export_model(run_dir: Path, num_items: int, folder: Path, *, mask_history: bool) -> int:
    """Write the retriever as a program, and return the length of the histories that it takes."""
    with advice(RETRAIN):
        retriever = load_retriever(run_dir, num_items)
    program = export_retriever(retriever, mask_history=mask_history)
    torch.export.save(program, folder / "retriever.pt2")
    return retriever.spec.max_len


def export_ranker(run_dir: Path, ranker: FinishedRanker, folder: Path) -> None:
    """Write the adapter, the fusion, and the prompt around titles."""
    with advice(RERANK), reading(run_dir / ADAPTER):
        check_adapter(run_dir / ADAPTER)
        shutil.copytree(run_dir / ADAPTER, folder / ADAPTER)
        write_json(folder / FUSION, read_json(run_dir / FUSION))
    config, language_model, prompts = ranker
    record = {
        "base_model": language_model.base.name,
        "base_model_revision": language_model.revision,
        "base_model_folder": str(language_model.base.folder.resolve()),
        "max_history": config.llm_max_history,
        **prompt_record(prompts),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / "prompt.json").write_text(text, encoding="utf-8")


def prompt_record(prompts: PromptBuilder | TitlePrompts) -> dict[str, Any]:
    """The prompt around titles, for ``prompt.json``."""
    if isinstance(prompts, TitlePrompts):
        return {"verbalizer": "titles", "heading_token_ids": prompts.heading.tolist()}
    return {
        "verbalizer": "letters",
        "before_history": prompts.head,
        "separator": SEPARATOR,
        "before_candidates": prompts.between,
        "after_candidates": prompts.end,
        "letters": prompts.letters,
        "letter_token_ids": prompts.letter_ids.tolist(),
    }


def _write(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path)
