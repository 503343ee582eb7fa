"""Finished runs and the recipes they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import DATASET_CODES, IMMATERIAL_FLAGS
from errors import ArgumentError, UserError
from storage import read_arrays, read_json, reading
from trainer.run_folder import CONFIG, LOG, SEARCH, SEARCH_RUNS

LRUREC, RANKER = "LRURec", "LlamaRec"
# The paper's names of the models, by model code.
PAPER_MODELS = {"lru": LRUREC, "sas": "SASRec", "bert": "BERT4Rec", "narm": "NARM"}
MODEL_ORDER = (*PAPER_MODELS.values(), RANKER)
# Entries of config.json that may differ between runs of one recipe.
NOT_IN_RECIPE = IMMATERIAL_FLAGS | {
    "seed", "device", "num_processes", "torch", "versions", "commit", "command", "fingerprint",
    "total_steps", "retrieved_from", "data_code",
}  # fmt: skip
SEARCHED = {"weight_decay", "dropout", "attn_dropout"}  # the result of a grid search


class Run(NamedTuple):
    """A finished run.

    Attributes:
        folder: its run folder.
        settings: the content of its ``config.json``.
        ranks: (num_users,) 1-based rank of each user's test target.
        retrieved: (num_users,) whether a user belongs to Table 3: the target is among the
            candidates.
        fused_ranks: (num_users,) the ranks by the fused scores of both stages, for a ranker.
        search: the content of its ``search.json`` if a grid search selected this run.
        is_fused: whether ``ranks`` are by fused scores.
    """

    folder: Path
    settings: dict[str, Any]
    ranks: np.ndarray
    retrieved: np.ndarray
    fused_ranks: np.ndarray | None = None
    search: dict[str, Any] | None = None
    is_fused: bool = False

    @property
    def dataset(self) -> str:
        """Code of the data set."""
        return str(self.settings.get("data_code", self.settings["dataset_code"]))

    @property
    def model(self) -> str:
        """Name of the model in the paper's tables."""
        return PAPER_MODELS.get(self.settings.get("model_code", ""), RANKER)

    @property
    def name(self) -> str:
        """Model and variant: preset or language model, fused scores, grid search, augmentation."""
        if self.model == RANKER:
            extras = ["fused scores"] if self.is_fused else []
            return ", ".join([RANKER, self.settings["llm_base_model"], *extras])
        extras = ["searched"] if self.search else []
        extras += ["augmented"] if self.settings.get("augmented") else []
        return ", ".join([self.model, self.settings.get("preset", "paper"), *extras])

    @property
    def recipe(self) -> dict[str, Any]:
        """The recorded settings that shape the results, apart from the seed.

        For a ranker these include its retriever's. What a grid search chooses is left out, since
        the choice may differ between seeds.
        """
        ignored = NOT_IN_RECIPE | SEARCHED if self.search else NOT_IN_RECIPE
        recipe = _without(self.settings, ignored)
        if "retriever" in recipe:
            recipe["retriever"] = _without(recipe["retriever"], NOT_IN_RECIPE)
        return recipe

    def fused(self) -> Run | None:
        """The same run, ranked by its fused scores; None if it has none."""
        if self.fused_ranks is None:
            return None
        return self._replace(ranks=self.fused_ranks, fused_ranks=None, is_fused=True)

    def validation_curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Optimizer steps of the validations and the metric at each.

        Raises:
            InputError: the log cannot be read.
        """
        path, key = self.folder / LOG, f"val_{metric}"
        with reading(path):
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            points = [(row["step"], row[key]) for row in rows if key in row]
        return [step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True, eq=False)
class Recipe:
    """Runs that differ only in their seed.

    Attributes:
        name: unique among the recipes of its data set.
        runs: the runs, at least one.
    """

    name: str
    runs: list[Run]

    @property
    def model(self) -> str:
        """Name of the model in the paper's tables."""
        return self.runs[0].model


def _without(settings: Mapping[str, Any], ignored: Iterable[str]) -> dict[str, Any]:
    ignored = frozenset(ignored)
    return {name: value for name, value in settings.items() if name not in ignored}


def _read_ranks(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Read ``ranks``, ``retrieved`` and ``fused_ranks`` of a ``Run``; None if it is unfinished."""
    if (folder / "overall_metrics.json").exists():
        arrays = read_arrays(folder / "rankings.npz")
        ranks = arrays["label_ranks"]
        retrieved = np.zeros(len(ranks), dtype=bool)
        retrieved[arrays["users"]] = True
        return ranks, retrieved, arrays["fused_label_ranks"]
    if (folder / "test_metrics.json").exists():
        arrays = read_arrays(folder / "candidates.npz")
        retrieved = (arrays["test_items"] == arrays["test_labels"][:, None]).any(axis=1)
        return arrays["test_label_ranks"], retrieved, None
    return None


def read_run(folder: Path) -> Run | None:
    """Read the run in a folder; None if there is no finished run.

    Raises:
        InputError: an output of the run is damaged.
        UserError: its settings cannot be used.
    """
    with reading(folder):
        outputs = _read_ranks(folder)
    if outputs is None:
        return None
    settings = read_json(folder / CONFIG)
    for name in ("dataset_code", "data_fingerprint"):
        if name not in settings:
            raise UserError(f"{folder / CONFIG} is not the record of a run: no {name}")
    search = read_json(folder / SEARCH) if (folder / SEARCH).exists() else None
    ranks, retrieved, fused_ranks = outputs
    return Run(folder, settings, ranks, retrieved, fused_ranks, search)


def find_runs(root: Path) -> list[Run]:
    """Read all finished runs below a folder, except the individual runs of grid searches.

    Raises:
        InputError: an output of a run is damaged.
        UserError: the settings of a run cannot be used.
    """
    folders = sorted(path.parent for path in root.rglob(CONFIG))
    folders = [folder for folder in folders if SEARCH_RUNS not in folder.relative_to(root).parts]
    runs = [run for run in map(read_run, folders) if run is not None]
    return [on_lrurec_users(run, runs) for run in runs]


def read_runs(folder: Path) -> list[Run]:
    """Read the run in a folder, or else all finished runs below it.

    Raises:
        InputError: an output of a run is damaged.
        UserError: the settings of a run cannot be used.
    """
    run = read_run(folder)
    return [run] if run else find_runs(folder)


def on_lrurec_users(run: Run, runs: Sequence[Run]) -> Run:
    """Take a baseline's Table 3 users from the run of LRURec that resembles it most.

    For every model, Table 3 of the paper covers the users whose target LRURec retrieved: on users
    of its own, each model would be evaluated where it does best. Of several LRURec runs, one with
    the same preset is preferred, then one with the same seed, then the same augmentation, then one
    that was selected by a grid search if and only if the baseline was.

    Args:
        run: any run; only baselines change.
        runs: where to look for a run of LRURec on the same data.
    """
    if run.model in (LRUREC, RANKER):
        return run
    references = [
        other
        for other in runs
        if other.model == LRUREC
        and other.settings["data_fingerprint"] == run.settings["data_fingerprint"]
    ]
    if not references:
        return run

    def differences(other: Run) -> list[bool]:
        differ = [
            run.settings.get(name) != other.settings.get(name)
            for name in ("preset", "seed", "augmented")
        ]
        return [*differ, bool(run.search) != bool(other.search)]

    return run._replace(retrieved=min(references, key=differences).retrieved)


def fused_variants(runs: Iterable[Run]) -> list[Run]:
    """The rankers among the runs, ranked by their fused scores."""
    variants = (run.fused() for run in runs)
    return [variant for variant in variants if variant is not None]


def find_recipes(runs: Iterable[Run], root: Path) -> dict[str, list[Recipe]]:
    """Group runs by data set and recipe.

    Args:
        runs: the runs; of several with the same recipe and seed, the first counts.
        root: folder of all runs. Recipes with the same name are distinguished by the folder of
            their first run relative to it.

    Returns:
        The recipes of each data set, both in the paper's order.
    """
    # groups[data set, name][settings][seed]
    groups: dict[tuple[str, str], dict[str, dict[Any, Run]]] = {}
    for run in runs:
        same_name = groups.setdefault((run.dataset, run.name), {})
        by_seed = same_name.setdefault(json.dumps(run.recipe, sort_keys=True), {})
        by_seed.setdefault(run.settings.get("seed"), run)
    recipes: dict[str, list[Recipe]] = {}
    for (dataset, name), same_name in groups.items():
        for by_seed in same_name.values():
            members = list(by_seed.values())
            folder = f" ({members[0].folder.relative_to(root)})" if len(same_name) > 1 else ""
            recipes.setdefault(dataset, []).append(Recipe(name + folder, members))
    for of_dataset in recipes.values():
        of_dataset.sort(key=lambda recipe: (MODEL_ORDER.index(recipe.model), recipe.name))
    known = [code for code in DATASET_CODES if code in recipes]
    return {code: recipes[code] for code in dict.fromkeys([*known, *recipes])}


def single_recipe(runs: Sequence[Run], folder: Path, *, fused: bool = False) -> Recipe:
    """The one recipe that all runs of a folder share, named like the folder.

    Args:
        runs: the runs read from ``folder``.
        folder: the folder.
        fused: rank by fused scores where a run has them.

    Raises:
        ArgumentError: ``folder`` holds no finished run or several recipes.
    """
    chosen = [run.fused() or run for run in runs] if fused else runs
    by_dataset = find_recipes(chosen, folder)
    recipes = [recipe for of_dataset in by_dataset.values() for recipe in of_dataset]
    if not recipes:
        raise ArgumentError("folder", folder, "no finished run there")
    if len(recipes) > 1:
        raise ArgumentError("folder", folder, "runs of several recipes there: name one of them")
    return replace(recipes[0], name=str(folder))
