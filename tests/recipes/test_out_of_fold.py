"""Retrievers that have not seen the users they are asked about."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from augmentation.merge import AUGMENTED_FILE, Interactions, save_augmented
from config import RankerConfig
from dataloader.item_prior import RetrieverPrior
from datasets import SequenceDataset
from errors import InputError, UserError
from jagged import JaggedBatch
from model.registry import load_retriever
from recipes import fit_retriever, out_of_fold
from recipes.out_of_fold import (
    best_step,
    evaluation_prior,
    training_prior,
    user_folds,
    users_of,
)
from storage import read_json, write_json
from tests.helpers import copy_run, make_data
from trainer.loop import Trainer

CPU = torch.device("cpu")


@pytest.fixture()
def run(retrieved: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, in which nobody has trained folds."""
    return copy_run(retrieved, tmp_path / "retriever")


def config(run: Path, **flags: Any) -> RankerConfig:
    return RankerConfig(
        dataset_code="games", device="cpu", llm_retrieved_path=str(run), folds=2, **flags
    )


def prior_of(run: Path, data: SequenceDataset, **flags: Any) -> RetrieverPrior:
    return training_prior(config(run, **flags), data, data.training_prefixes()[1][:50], CPU)


def test_folds_are_disjoint_and_of_equal_size():
    folds = user_folds(101, 4, seed=1)
    assert sorted(np.bincount(folds)) == [25, 25, 25, 26]
    assert not np.array_equal(folds, user_folds(101, 4, seed=2))


def test_users_of_a_data_set():
    data = make_data([3, 8, 5])
    some = users_of(data, np.array([True, False, True]))
    assert some.offsets.tolist() == [0, 3, 8] and some.user_names == ["0", "2"]
    assert some.item_ids.tolist() == [*data.item_ids[:3], *data.item_ids[11:]]
    assert some.num_items == data.num_items


def test_no_retriever_has_seen_the_users_it_encodes(
    run: Path, toy_data: SequenceDataset, monkeypatch: pytest.MonkeyPatch
):
    trained_on = []
    set_up = fit_retriever.set_up

    def recorded(settings: Any, data: SequenceDataset, *args: Any) -> Any:
        trained_on.append(set(data.user_names))
        return set_up(settings, data, *args)

    monkeypatch.setattr(out_of_fold, "set_up", recorded)
    prior = prior_of(run, toy_data)
    assert len(trained_on) == 2 and not trained_on[0] & trained_on[1]
    users = np.searchsorted(toy_data.offsets, prior.keys, side="right") - 1
    for user, layer in zip(users, prior.layer_of):
        assert toy_data.user_names[user] not in trained_on[layer]


def test_generated_interactions_of_the_other_users(
    run: Path, toy_data: SequenceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    users = np.arange(toy_data.num_users, dtype=np.int32).repeat(2)
    generated = Interactions(users, np.arange(len(users), dtype=np.int32) % 40 + 1)
    save_augmented(tmp_path / AUGMENTED_FILE, generated, toy_data.fingerprint)
    settings = read_json(run / "config.json") | {"augmented": str(tmp_path)}
    settings["augmented_fingerprint"] = generated.fingerprint()
    write_json(run / "config.json", settings)
    trained_on: list[tuple[str, int]] = []
    set_up = fit_retriever.set_up

    def recorded(settings: Any, data: SequenceDataset, run: Any, augmented: Any, *args: Any) -> Any:
        names = [data.user_names[user] for user in augmented.users]
        trained_on.extend(zip(names, augmented.items.tolist()))
        assert set(names) == set(data.user_names)
        return set_up(settings, data, run, augmented, *args)

    monkeypatch.setattr(out_of_fold, "set_up", recorded)
    prior_of(run, toy_data)
    expected = [(toy_data.user_names[user], item) for user, item in zip(*generated)]
    assert sorted(trained_on) == sorted(expected)  # each user's in one of the two folds
    write_json(run / "config.json", settings | {"augmented_fingerprint": "other"})
    with pytest.raises(UserError, match=r"has changed since .*: run train_retriever\.py again"):
        prior_of(run, toy_data)
    (tmp_path / AUGMENTED_FILE).unlink()
    with pytest.raises(UserError, match=r"--augmented .*: no augmented\.npz there; run train_r"):
        prior_of(run, toy_data)


def test_probabilities_are_those_of_the_folds_retriever(run: Path, toy_data: SequenceDataset):
    prior = prior_of(run, toy_data)
    for key in prior.keys[[0, 20, 49]]:
        user = np.searchsorted(toy_data.offsets, key, side="right") - 1
        history = toy_data.item_ids[toy_data.offsets[user] : key]
        fold = prior.layer_of[prior.keys == key][0]
        retriever = load_retriever(run / "folds" / f"{fold + 1}_of_2", toy_data.num_items)
        length = min(len(history), retriever.spec.max_len)
        items = torch.from_numpy(history[-length:].astype(np.int64))
        sequences = JaggedBatch(items, torch.arange(length), length, torch.tensor([length - 1]))
        with torch.no_grad():
            scores = retriever(sequences)[0].double()
        scores[0] = -torch.inf
        if prior.mask_history:
            scores[history] = -torch.inf
        (found,) = prior.probabilities(np.array([key]), [history])
        np.testing.assert_allclose(found, scores.softmax(0).numpy(), rtol=1e-4, atol=1e-9)


def test_evaluation_uses_the_retriever_itself(run: Path, toy_data: SequenceDataset):
    prior = evaluation_prior(config(run), toy_data, "test", CPU)
    with np.load(run / "candidates.npz") as file:
        items, scores = file["test_items"], file["test_scores"]
    histories = [
        toy_data.item_ids[toy_data.offsets[user] : toy_data.offsets[user + 1] - 1]
        for user in range(toy_data.num_users)
    ]
    p = prior.probabilities(np.arange(toy_data.num_users), histories)
    ratios = np.log(np.take_along_axis(p, items.astype(np.int64), 1)) - scores
    possible = np.isfinite(ratios)
    assert possible.mean() > 0.5
    spread = np.where(possible, ratios, np.nan)
    assert np.nanmax(np.nanmax(spread, 1) - np.nanmin(spread, 1)) < 1e-4


def test_found_again_but_not_under_other_settings(
    run: Path, toy_data: SequenceDataset, monkeypatch: pytest.MonkeyPatch
):
    first = prior_of(run, toy_data)
    fits = []
    fit = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self, resume: fits.append(resume) or fit(self, resume)
    )
    again = prior_of(run, toy_data)
    assert not fits and np.array_equal(first.encodings, again.encodings)
    training_prior(replace(config(run), device=None), toy_data, first.keys, CPU)
    assert not fits  # the device does not matter
    settings = read_json(run / "config.json")
    write_json(run / "config.json", settings | {"weight_decay": 0.5})
    other = prior_of(run, toy_data)
    assert len(fits) == 2 and not np.array_equal(first.encodings, other.encodings)


def test_an_interrupted_fold_is_resumed(
    run: Path, toy_data: SequenceDataset, monkeypatch: pytest.MonkeyPatch
):
    steps = 0
    step = Trainer._step

    def interrupted(self: Trainer, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            self._save()
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prior_of(run, toy_data)
    assert (run / "folds" / "1_of_2" / "checkpoint.safetensors").exists()
    resumed = prior_of(run, toy_data)
    for path in (run / "folds").rglob("*.safetensors"):
        path.unlink()
    assert np.array_equal(prior_of(run, toy_data).encodings, resumed.encodings)


def test_the_callers_random_numbers_do_not_change(run: Path, toy_data: SequenceDataset):
    torch.manual_seed(5)
    prior_of(run, toy_data)
    after_training = torch.rand(3)
    torch.manual_seed(5)
    prior_of(run, toy_data)
    assert torch.equal(torch.rand(3), after_training)


def test_too_few_users(run: Path):
    data = replace(make_data([6]), fingerprint="")
    with pytest.raises(UserError, match="--folds 2: there are only 1 users"):
        training_prior(config(run), data, data.training_prefixes()[1], CPU)


def test_best_step(run: Path):
    (run / "log.jsonl").write_text(
        '{"step": 5, "val_NDCG@10": 0.1}\n{"step": 10, "val_NDCG@10": 0.3}\n'
        '{"step": 15, "val_NDCG@10": 0.2}\n'
    )
    assert best_step(run, "NDCG@10") == 10
    for text in ("", "{}\n", '{"step": 1}\n'):
        (run / "log.jsonl").write_text(text)
        with pytest.raises(InputError):
            best_step(run, "NDCG@10")


@pytest.mark.parametrize("name", ["model.safetensors", "log.jsonl"])
def test_damaged_files(run: Path, toy_data: SequenceDataset, name: str):
    (run / name).write_text("{")
    with pytest.raises(UserError, match=r"run train_retriever\.py again, or set --title_prior"):
        if name == "model.safetensors":
            evaluation_prior(config(run), toy_data, "val", CPU)
        else:
            prior_of(run, toy_data)
