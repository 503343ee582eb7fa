"""A ranker's parts from its settings: negatives, prompts, evaluation of both stages."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from config import LOG_LIKELIHOOD, RankerConfig
from dataloader.candidates import Candidates
from dataloader.prompt import PromptBuilder
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Prefixes
from datasets import SequenceDataset
from errors import UserError
from evaluation.fusion import RETRIEVER, fit_fusion, log_losses, log_softmax
from evaluation.reranking import reranked, targets_among
from evaluation.retrieval import hard_negatives
from metrics import ranking_metrics
from model.base import Retriever
from recipes.fit_ranker import Evaluator, evaluate, ranker_loop, shown_columns, write
from recipes.language_model import LanguageModel, find_language_model
from recipes.verbalizers import Letters, build_verbalizer, retrieved_negatives
from tests.helpers import make_builder, make_data, read_tokenizer, small_model

CPU = torch.device("cpu")


def config(**flags: Any) -> RankerConfig:
    return RankerConfig(**({"dataset_code": "games", "device": "cpu"} | flags))


@pytest.fixture()
def data() -> SequenceDataset:
    return make_data([12, 7, 25, 4, 16])


@pytest.fixture()
def prompts(tiny_llama: Path) -> PromptBuilder:
    titles = ["", *(f"Part {i} of the Story" for i in range(30))]
    return make_builder(read_tokenizer(tiny_llama), titles)


@pytest.fixture()
def language_model(tiny_llama: Path) -> LanguageModel:
    return find_language_model(config(llm_base_model=str(tiny_llama)))


# Hard negatives ---------------------------------------------------------------------------------


def save_run(model: Retriever, folder: Path) -> str:
    save_model(model, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(asdict(model.spec)))
    return str(folder)


@pytest.mark.parametrize("code", ["lru", "bert"])
@pytest.mark.parametrize(("train_candidates", "size"), [("retrieved", 7), ("mixed", 3)])
def test_negatives_are_retrieved_for_the_examples_of_the_run(
    code: str, train_candidates: str, size: int, data: SequenceDataset, tmp_path: Path
):
    model = small_model(code)
    flags = config(
        llm_retrieved_path=save_run(model, tmp_path), train_candidates=train_candidates,
        llm_negative_sample_size=7,
    )  # fmt: skip
    prefixes = Prefixes(data, model.spec.max_len, model.spec.mask_token)
    every = np.arange(len(prefixes))
    expected = hard_negatives(model, evaluation_loader(prefixes, 16, 0), size)
    assert np.array_equal(retrieved_negatives(flags, data, every, CPU), expected)
    seen = every[1::3]
    negatives = retrieved_negatives(flags, data, seen, CPU)
    assert negatives.dtype == np.int32 and negatives.shape == (len(prefixes), size)
    assert np.array_equal(negatives[seen], expected[seen]) and (negatives[seen] > 0).all()
    assert not np.delete(negatives, seen, axis=0).any()


def test_random_negatives_need_no_retriever(data: SequenceDataset):
    assert retrieved_negatives(config(), data, np.arange(3), CPU) is None


def test_a_retriever_that_cannot_be_loaded(data: SequenceDataset, tmp_path: Path):
    folder = save_run(small_model("lru"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    flags = config(llm_retrieved_path=folder, train_candidates="mixed")
    with pytest.raises(UserError, match=r"cannot load the retriever .*run train_retriever\.py"):
        retrieved_negatives(flags, data, np.arange(3), CPU)


# Training prompts -------------------------------------------------------------------------------


def test_training_prompts(
    data: SequenceDataset,
    prompts: PromptBuilder,
    language_model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
):
    def examples(negatives: np.ndarray | None = None, **flags: Any) -> Any:
        monkeypatch.setattr("recipes.verbalizers.retrieved_negatives", lambda *_: negatives)
        options = {"llm_negative_sample_size": 4, "llm_max_history": 3, **flags}
        letters = build_verbalizer(config(**options), data, {}, language_model, CPU, prompts)
        assert isinstance(letters, Letters)
        return letters.training_examples(np.arange(3))

    history, candidates, _ = examples().example(8)
    assert len(history) == 3 and len(candidates) == 5
    assert not np.array_equal(examples(seed=1).example(8)[1], candidates)
    negatives = np.tile(np.array([[30, 29, 0]], dtype=np.int32), (len(examples()), 1))
    assert {29, 30} <= set(examples(negatives).example(0)[1].tolist())
    numbers = list(range(12))
    batches = examples(lora_micro_batch_size=5).__getitems__(numbers)
    assert max(len(batch["users"]) for batch in batches) <= 5
    batches = examples(train_batch_size=3).__getitems__(numbers)
    assert max(len(batch["users"]) for batch in batches) <= 3
    for on_inputs in (False, True):
        (batch, *_) = examples(llm_train_on_inputs=on_inputs).__getitems__(numbers)
        assert (batch["targets"].shape[1] > 2) == on_inputs


def test_loop_settings(language_model: LanguageModel):
    flags = config(
        lora_num_epochs=3, lora_val_iterations=7, lora_early_stopping_patience=2,
        rerank_best_metric="MRR@5",
    )  # fmt: skip
    settings = ranker_loop(flags, language_model)
    assert (settings.num_epochs, settings.val_steps, settings.patience) == (3, 7, 2)
    assert settings.best_metric == "MRR@5" and "--lora_lr" in settings.advice.diverged
    assert "--tokens_per_batch than 1,024" in settings.advice.out_of_memory


# Evaluation -------------------------------------------------------------------------------------


@pytest.fixture()
def candidates(data: SequenceDataset) -> dict[str, Candidates]:
    """20 random candidates of each user; those of users 0, 1 and 4 have the target."""
    splits = {}
    for split, seed in (("val", 0), ("test", 1)):
        rng = np.random.default_rng(seed)
        targets = data.targets(split)
        items = np.empty((5, 20), dtype=np.int32)
        ranks = np.full(5, 25, dtype=np.int32)
        for user, target in enumerate(targets):
            others = rng.permutation(np.setdiff1d(np.arange(1, 31), [target]))[:20]
            if user in (0, 1, 4):
                ranks[user] = 1 + rng.integers(20)
                others[ranks[user] - 1] = target
            items[user] = others
        scores = np.tile(-np.arange(20, dtype=np.float32), (5, 1))
        splits[split] = Candidates(items, scores, targets, ranks)
    return splits


@pytest.fixture()
def evaluator(
    data: SequenceDataset,
    candidates: dict[str, Candidates],
    prompts: PromptBuilder,
    language_model: LanguageModel,
    tiny_llama: Path,
    tmp_path: Path,
) -> Evaluator:
    from transformers import AutoModelForCausalLM

    from model.language_model import add_lora

    flags = config(rerank_metric_ks=(1, 10), val_batch_size=2, test_batch_size=3)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = add_lora(base, rank=2, alpha=4, dropout=0.5, target_modules=["q_proj"])
    verbalizer = build_verbalizer(flags, data, candidates, language_model, CPU, prompts)
    return Evaluator(flags, model, tmp_path / "adapter", candidates, verbalizer)


def perturb(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn_like(parameter)


USERS = np.array([0, 1, 4])


def test_validation(evaluator: Evaluator):
    assert evaluator.val_users.tolist() == USERS.tolist()
    scores = evaluator.score("val", USERS, "")
    assert scores.shape == (3, 20)
    ranks = reranked(evaluator.candidates["val"], USERS, scores).label_ranks
    targets = targets_among(
        evaluator.candidates["val"].items[USERS], evaluator.candidates["val"].labels[USERS]
    )
    log_likelihood = -log_losses(scores, targets).mean()
    expected = ranking_metrics(ranks, (1, 10)) | {LOG_LIKELIHOOD: pytest.approx(log_likelihood)}
    assert evaluator.validate() == expected


def test_validation_on_some_users(evaluator: Evaluator):
    flags = config(rerank_metric_ks=(1, 10), val_users=2)
    some = Evaluator(
        flags, evaluator.model, evaluator.adapter, evaluator.candidates, evaluator.verbalizer
    )
    assert len(some.val_users) == 2 and set(some.val_users) < set(USERS)
    scores = evaluator.score("val", USERS, "")[np.isin(USERS, some.val_users)]
    ranks = reranked(some.candidates["val"], some.val_users, scores).label_ranks
    metrics = some.validate()
    assert metrics == ranking_metrics(ranks, (1, 10)) | {LOG_LIKELIHOOD: metrics[LOG_LIKELIHOOD]}
    some.save_best()
    assert some.ranking_task("val").users.tolist() == USERS.tolist()


def test_validation_scores_of_the_best_adapter_are_kept(evaluator: Evaluator):
    evaluator.validate()
    evaluator.save_best()
    best = evaluator.score("val", USERS, "")
    assert (evaluator.adapter / "adapter_model.safetensors").exists()
    perturb(evaluator.model)
    evaluator.validate()  # not the best
    assert np.array_equal(evaluator.ranking_task("val").features["letter_logit"], best)
    assert not np.array_equal(evaluator.score("val", USERS, ""), best)


def test_features(evaluator: Evaluator):
    task = evaluator.ranking_task("test")  # not scored before, as after an interruption
    test = evaluator.candidates["test"]
    assert task.users.tolist() == USERS.tolist() and next(iter(task.features)) == RETRIEVER
    assert np.array_equal(task.features["letter_logit"], evaluator.score("test", USERS, ""))
    assert np.array_equal(task.features[RETRIEVER], log_softmax(test.scores[USERS]))
    chosen = test.items[USERS, task.targets]
    assert chosen.tolist() == test.labels[USERS].tolist()


def test_scores_that_are_not_numbers(evaluator: Evaluator):
    evaluator.model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match=r"infinite or NaN: start from scratch .*--lora_lr"):
        evaluator.validate()


def test_results(evaluator: Evaluator, candidates: dict[str, Candidates], tmp_path: Path):
    results = evaluate(evaluator)
    test = candidates["test"]
    tasks = {split: evaluator.ranking_task(split) for split in ("val", "test")}
    fusion = fit_fusion(tasks["val"].features, tasks["val"].targets, base=RETRIEVER)
    ranked = reranked(test, USERS, evaluator.score("test", USERS, ""))
    fused = reranked(test, USERS, fusion.scores(tasks["test"].features))
    ranks, fused_ranks = test.label_ranks.copy(), test.label_ranks.copy()
    ranks[USERS], fused_ranks[USERS] = ranked.label_ranks, fused.label_ranks
    assert results.metrics == {
        "subset": ranking_metrics(ranked.label_ranks, (1, 10)),
        "retrieval": ranking_metrics(test.label_ranks, (1, 10)),
        "overall": ranking_metrics(ranks, (1, 10)),
        "fused": ranking_metrics(fused_ranks, (1, 10)),
    }
    columns = shown_columns(results)
    assert list(columns) == ["retriever", "two stages", "fused", "retriever (sub)", "ranker (sub)"]
    assert columns["two stages"] == results.metrics["overall"]
    assert columns["retriever (sub)"] == ranking_metrics(test.label_ranks[USERS], (1, 10))
    write(results, tmp_path)
    with np.load(tmp_path / "rankings.npz") as file:
        arrays = dict(file)
    assert {name: x.dtype.name for name, x in arrays.items()} == {
        "users": "int32", "items": "int32", "scores": "float32", "labels": "int32",
        "label_ranks": "int32", "fused_label_ranks": "int32",
    }  # fmt: skip
    expected = [USERS, ranked.items, ranked.scores, test.labels, ranks, fused_ranks]
    for name, array in zip(arrays, expected):
        assert np.array_equal(arrays[name], array), name
    files = sorted(path.name for path in tmp_path.glob("*_metrics.json"))
    assert files == [f"{x}_metrics.json" for x in ("fused", "overall", "retrieval", "subset")]
    for name, values in results.metrics.items():
        assert json.loads((tmp_path / f"{name}_metrics.json").read_text()) == values
    record = json.loads((tmp_path / "fusion.json").read_text())
    assert record["fitted_on"] == {"split": "val", "users": 3, "loss": "log-loss"}
    assert record["weights"]["fused"] == fusion.weights
    assert record["weights"]["ranker"] == {"letter_logit": 1.0}
    loss = log_losses(fusion.scores(tasks["test"].features), tasks["test"].targets).mean()
    assert record["log_loss"]["test"]["fused"] == pytest.approx(loss)
