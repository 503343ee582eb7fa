"""Stages of the augmentation: what each depends on, what is reused, what is counted."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from augment_data import STAGES, stage_fingerprints
from augmentation.filters import REASONS
from augmentation.merge import Interactions
from augmentation.prompts import training_history
from config import AugmentationConfig
from datasets import SequenceDataset
from errors import UserError
from flags import flags_of
from recipes.augment import (
    Validation,
    build_prompts,
    check_later_stages,
    check_window,
    count,
    reuse_stages,
    tune,
)
from recipes.language_model import LanguageModel, find_language_model
from recipes.tuning import load_with_adapters
from tests.helpers import contents, make_data
from trainer.optimization import make_accelerator
from trainer.run_folder import RunFolder
from trainer.run_log import RunLog


def config(**flags: Any) -> AugmentationConfig:
    return AugmentationConfig(**({"dataset_code": "games", "device": "cpu"} | flags))


@pytest.fixture()
def data() -> SequenceDataset:
    return make_data([12, 7, 25, 4, 16])


@pytest.fixture()
def language_model(tiny_llama: Path) -> LanguageModel:
    return find_language_model(config(llm_base_model=str(tiny_llama)))


# Fingerprints -----------------------------------------------------------------------------------

OTHER_VALUES = {
    "tuning": {"lora_r": 3, "seed": 7, "max_steps": 9, "local_items": 4, "llm_max_text_len": 900,
               "max_new_tokens": 100, "lora_dropout": 0.5, "preset": "published",
               "id_prompt": "published", "item_order": "random", "global_examples": 2,
               "min_targets": 2, "llm_train_on_inputs": True, "kept_weights": "last"},
    "generation": {"constrained": True, "temperature": 0.5, "top_p": 0.5, "top_k": 3},
    "filter": {"plausible_rank": 5, "plausible_share": 0.9},
    "none": {"export_root": "x", "resume": True, "save_seconds": 1.0, "reuse": "x",
             "test_batch_size": 3, "tokens_per_batch": 77},
}  # fmt: skip


@pytest.mark.parametrize(
    ("first", "name", "value"),
    [(first, *pair) for first, values in OTHER_VALUES.items() for pair in values.items()],
)
def test_a_flag_affects_its_stage_and_the_later_ones(
    first: str, name: str, value: object, data: SequenceDataset, language_model: LanguageModel
):
    def fingerprints(**flags: Any) -> dict[str, str]:
        flags = {"retriever_path": "run"} | flags
        return stage_fingerprints(config(**flags), data, language_model, b"weights")

    before, after = fingerprints(), fingerprints(**{name: value})
    affected = [stage for stage in STAGES if before[stage] != after[stage]]
    assert affected == ([] if first == "none" else list(STAGES[STAGES.index(first) :]))


def test_stages_of_the_flags():
    stages = {
        name: spec.metadata["stage"]
        for name, spec in flags_of(AugmentationConfig).items()
        if "stage" in spec.metadata
    }
    assert stages == {name: x for x in ("generation", "filter") for name in OTHER_VALUES[x]}


def test_inputs_of_the_stages(data: SequenceDataset, language_model: LanguageModel):
    before = stage_fingerprints(config(), data, language_model, b"weights")
    assert list(before) == list(STAGES) and len(set(before.values())) == 3
    retriever = stage_fingerprints(config(), data, language_model, b"other")
    assert {x for x in STAGES if retriever[x] != before[x]} == {"filter"}
    other_data = stage_fingerprints(
        config(), replace(data, fingerprint="other"), language_model, b"weights"
    )
    assert not set(other_data.values()) & set(before.values())
    revision = language_model._replace(revision="other")
    other_model = stage_fingerprints(config(), data, revision, b"weights")
    assert not set(other_model.values()) & set(before.values())


# Reuse ------------------------------------------------------------------------------------------


@pytest.fixture()
def earlier(tmp_path: Path) -> Path:
    """Outputs of an earlier run."""
    folder = tmp_path / "earlier"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "generated.jsonl").write_text('{"user": 0, "text": "1", "ended": true}\n')
    return folder


@pytest.mark.parametrize(
    ("stages", "reused"),
    [
        ({"tuning": "t", "generation": "g"}, ["adapter/adapter_config.json", "generated.jsonl"]),
        ({"tuning": "t", "generation": "other"}, ["adapter/adapter_config.json"]),
        ({"tuning": "other", "generation": "other"}, []),
    ],
)
def test_reuse(
    stages: dict, reused: list, earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = tmp_path / "run"
    run.mkdir()
    reuse_stages(earlier, run, {"tuning": "t", "generation": "g", "filter": "f"}, stages)
    files = contents(run)
    assert sorted(files) == reused
    originals = contents(earlier)
    assert all(files[name] == originals[name] for name in files)
    shown = capsys.readouterr().out
    assert shown.count("reused from") == len(reused)
    assert shown.count("not reused") == 2 - len(reused)


def test_reuse_keeps_what_exists(earlier: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "generated.jsonl").write_text("own\n")
    stages = {"tuning": "t", "generation": "g"}
    reuse_stages(earlier, run, stages, stages)
    assert (run / "generated.jsonl").read_text() == "own\n"
    assert (run / "adapter" / "adapter_config.json").exists()


# Kept weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "num_saved"), [("best", 2), ("last", 3)])
def test_kept_weights(
    kept: str, num_saved: int, data: SequenceDataset, language_model: LanguageModel,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Of three validations the second is the best."""
    settings = config(
        max_steps=6, lora_val_iterations=2, train_batch_size=2, kept_weights=kept,
        llm_max_text_len=200, max_new_tokens=20,
    )  # fmt: skip
    scores, saved = iter([-3.0, -1.0, -2.0]), []
    monkeypatch.setattr(Validation, "__call__", lambda self: {"log_likelihood": next(scores)})
    monkeypatch.setattr("recipes.augment.save_adapter", lambda *saving: saved.append(saving))
    run, log = RunFolder(tmp_path, (), ""), RunLog(tmp_path / "log.jsonl")
    accelerator = make_accelerator("cpu", 0)
    model = load_with_adapters(language_model, settings, accelerator)
    prompts = build_prompts(settings, data, language_model)
    tune(settings, data, run, language_model, prompts, accelerator, log, model)
    assert len(saved) == num_saved


def test_examples_need_enough_items(data: SequenceDataset, language_model: LanguageModel):
    settings = config(min_targets=23)
    prompts = build_prompts(settings, data, language_model)
    with pytest.raises(UserError, match=r"--min_targets 23 leaves no examples: .* at most 23"):
        check_later_stages(settings, data, prompts)
    check_later_stages(config(min_targets=22), data, prompts)


def test_published_prompts_leave_room_for_the_answer(
    data: SequenceDataset, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
):
    def check(positions: int, **flags: Any) -> None:
        monkeypatch.setattr("recipes.augment.sizes", lambda folder: (400, positions))
        settings = config(max_new_tokens=20, llm_max_text_len=2048, **flags)
        prompts = build_prompts(settings, data, language_model)
        check_window(settings, data, prompts, language_model)

    prompts = build_prompts(config(id_prompt="published"), data, language_model)
    longest = max(len(prompts.encode(u, training_history(data, u))) for u in range(5))
    check(longest + 20, id_prompt="published")
    check(longest + 19)
    message = f"--max_new_tokens 20: tiny-llama reads .* and a prompt has {longest}: lower it, or "
    with pytest.raises(UserError, match=rf"{message}--llm_max_text_len to {longest - 1} "):
        check(longest + 19, id_prompt="published")


# Counts -----------------------------------------------------------------------------------------


def test_count(data: SequenceDataset):
    interactions = Interactions(np.array([0, 0, 3]), np.array([1, 2, 3]))
    dropped = Counter(cut=1, malformed=2, unknown=3, had=4, implausible=5)
    counts = count(data, interactions, dropped, num_generated=18, max_rank=7)
    assert counts == {
        "num_users": 5, "training_interactions": 54, "written": 18, "valid_share": 1 - 5 / 18,
        "dropped": {"cut": 1, "malformed": 2, "unknown": 3, "had": 4, "repeated": 0,
                    "implausible": 5},
        "plausible_rank": 7, "kept": 3, "users_with_items": 2,
    }  # fmt: skip
    assert list(counts["dropped"]) == list(REASONS)


def test_count_of_nothing(data: SequenceDataset):
    nothing = Interactions(np.zeros(0, np.int32), np.zeros(0, np.int32))
    counts = count(data, nothing, Counter(), num_generated=0, max_rank=None)
    assert (counts["valid_share"], counts["kept"], counts["users_with_items"]) == (1.0, 0, 0)
