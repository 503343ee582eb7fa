"""Tune the language model to rank the retriever's candidates, and evaluate both stages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Subset

from config import RankerConfig
from dataloader.candidates import Candidates
from dataloader.prompt import PromptBuilder
from dataloader.prompt_batches import EvaluationPrompts, TrainingPrompts
from dataloader.sampler import ShuffledBatches, evaluation_loader
from dataloader.sequences import Prefixes
from datasets import SequenceDataset
from errors import advice
from evaluation.reranking import (
    fused_scores,
    fusion_weight,
    reranked,
    score_candidates,
    two_stage_ranks,
)
from evaluation.retrieval import hard_negatives
from metrics import ranking_metrics
from model.language_model import load_adapter, save_adapter
from model.registry import load_retriever
from model.verbalizer import response_loss
from recipes.language_model import LanguageModel
from recipes.runs import FROM_SCRATCH, is_finished
from recipes.training import build_trainer, close_run, loop_settings, metrics_table, open_run
from recipes.tuning import load_with_adapters, tuning_advice
from storage import read_json, write_arrays, write_json
from trainer.loop import LoopSettings, Metrics, Trainer
from trainer.optimization import make_accelerator
from trainer.run_folder import RunFolder

ADAPTER = "adapter"
RANKINGS = "rankings.npz"
METRICS = "{}_metrics.json"
RETRIEVER_BATCH_SIZE = 256


def train(
    config: RankerConfig,
    data: SequenceDataset,
    run: RunFolder,
    candidates: dict[str, Candidates],
    language_model: LanguageModel,
    prompts: PromptBuilder,
    details: Mapping[str, Any],
) -> None:
    """Tune, select on validation, evaluate on the test split and write the run's files.

    Args:
        config: all settings.
        data: the data set.
        run: the run's folder, reserved for this process.
        candidates: the retriever's candidates by split.
        language_model: the base model.
        prompts: builds the prompts.
        details: further content of ``config.json``.
    """
    if is_finished(run, config):
        overall = read_json(run.path / METRICS.format("overall"))
        print(metrics_table({"two stages": overall}))
        return
    trainer, evaluator = set_up(config, data, run, candidates, language_model, prompts, details)
    with advice(FROM_SCRATCH):
        progress = trainer.fit(config.resume)
        load_adapter(evaluator.model, run.path / ADAPTER)
    results = evaluate(evaluator)
    write(results, run.path)
    overall = results.metrics["overall"]
    close_run(run, trainer.log, {f"test_{name}": x for name, x in overall.items()})
    print(
        f"\n{data.code}, {language_model.base.name}, best at step {progress.best_step:,}: all "
        f"users, then (sub) those whose target is among the candidates.\n"
        f"Fused scores give the ranker a weight of {results.metrics['fused']['weight']:.2f}, "
        "chosen on validation.\n"
    )
    print(metrics_table(shown_columns(results)))
    print(f"\nwritten to {run.path}")


# Set up -------------------------------------------------------------------------------------------


def set_up(
    config: RankerConfig,
    data: SequenceDataset,
    run: RunFolder,
    candidates: Mapping[str, Candidates],
    language_model: LanguageModel,
    prompts: PromptBuilder,
    details: Mapping[str, Any],
) -> tuple[Trainer, Evaluator]:
    """Build everything that training needs, and open the run's folder."""
    accelerator = make_accelerator(config.device, config.seed)
    settings = ranker_loop(config, language_model)
    num_examples = len(data.training_prefixes()[0])
    sampler = ShuffledBatches(num_examples, config.train_batch_size, config.seed)
    seen = sampler.first_examples(settings.total_steps(len(sampler)))
    negatives = retrieved_negatives(config, data, seen, accelerator.device)
    examples = training_prompts(config, data, prompts, language_model, negatives)
    loaders = evaluation_loaders(config, data, candidates, prompts, language_model.eos_id)
    model = load_with_adapters(language_model, config, accelerator)
    letter_ids = torch.from_numpy(prompts.letter_ids).to(accelerator.device)
    evaluator = Evaluator(config, model, run.path / ADAPTER, candidates, loaders, letter_ids)
    resolved = {"gradient_checkpointing": model.is_gradient_checkpointing}
    trainer = build_trainer(
        config,
        run,
        open_run(run, config, {**details, **resolved}),
        accelerator=accelerator,
        model=model,
        dataset=examples,
        sampler=sampler,
        settings=settings,
        lr=config.lora_lr,
        paged=language_model.paged,
        loss=partial(
            response_loss, letter_ids=letter_ids if config.response_loss == "letters" else None
        ),
        validate=evaluator.validate,
        save_best=evaluator.save_best,
        user_names=data.user_names,
    )
    return trainer, evaluator


def ranker_loop(config: RankerConfig, language_model: LanguageModel) -> LoopSettings:
    """Settings of the training loop."""
    return loop_settings(
        config,
        num_epochs=config.lora_num_epochs,
        val_iterations=config.lora_val_iterations,
        patience=config.lora_early_stopping_patience,
        best_metric=config.rerank_best_metric,
        advice=tuning_advice(language_model),
    )


def retrieved_negatives(
    config: RankerConfig, data: SequenceDataset, seen: np.ndarray, device: torch.device
) -> np.ndarray | None:
    """Hard negatives from the retriever for the training examples of a run.

    Args:
        config: all settings.
        data: the data set.
        seen: (n,) indices of the examples.
        device: device of the retriever.

    Returns:
        (examples, k) int32 items, rows of zeros for examples that are not seen; None if all
        negatives are sampled at random.
    """
    if config.train_candidates == "random":
        return None
    with advice("run train_retriever.py again"):
        retriever = load_retriever(config.retrieved_dir, data.num_items)
    prefixes = Prefixes(data, retriever.spec.max_len, retriever.spec.mask_token)
    loader = evaluation_loader(
        Subset(prefixes, seen.tolist()), RETRIEVER_BATCH_SIZE, config.num_workers
    )
    size = config.llm_negative_sample_size // (1 if config.train_candidates == "retrieved" else 2)
    negatives = np.zeros((len(prefixes), size), np.int32)
    negatives[seen] = hard_negatives(retriever.to(device), loader, size)
    return negatives


def training_prompts(
    config: RankerConfig,
    data: SequenceDataset,
    prompts: PromptBuilder,
    language_model: LanguageModel,
    negatives: np.ndarray | None,
) -> TrainingPrompts:
    """Training examples."""
    return TrainingPrompts(
        data,
        prompts,
        num_negatives=config.llm_negative_sample_size,
        hard_negatives=negatives,
        max_history=config.llm_max_history,
        max_rows=config.lora_micro_batch_size or config.train_batch_size,
        max_tokens=language_model.max_tokens,
        eos_id=language_model.eos_id,
        on_inputs=config.llm_train_on_inputs,
        seed=config.seed,
    )


def evaluation_loaders(
    config: RankerConfig,
    data: SequenceDataset,
    candidates: Mapping[str, Candidates],
    prompts: PromptBuilder,
    pad_id: int,
) -> dict[str, DataLoader]:
    """Prompts with the retriever's candidates, by split."""
    batch_sizes = {"val": config.val_batch_size, "test": config.test_batch_size}
    return {
        split: evaluation_loader(
            EvaluationPrompts(
                data,
                split,
                candidates[split],
                prompts,
                max_history=config.llm_max_history,
                pad_id=pad_id,
                permutations=config.permutations,
                seed=config.seed,
            ),
            batch_size,
            config.num_workers,
        )
        for split, batch_size in batch_sizes.items()
    }


# Fit and evaluate ---------------------------------------------------------------------------------


class Evaluator:
    """Scores the candidates of the users of a split, and keeps the best adapter.

    Args:
        config: all settings.
        model: the ranker.
        adapter: folder of the best adapter.
        candidates: the retriever's candidates by split.
        loaders: prompts by split.
        letter_ids: token ids of the letters.
    """

    def __init__(
        self,
        config: RankerConfig,
        model: PeftModel,
        adapter: Path,
        candidates: Mapping[str, Candidates],
        loaders: Mapping[str, DataLoader],
        letter_ids: torch.Tensor,
    ) -> None:
        self.config, self.model, self.adapter = config, model, adapter
        self.candidates, self.loaders, self.letter_ids = candidates, loaders, letter_ids
        # Users and validation scores of the latest and of the best adapter.
        self._latest: tuple[np.ndarray, np.ndarray] | None = None
        self._best: tuple[np.ndarray, np.ndarray] | None = None

    def score(self, split: str, description: str) -> tuple[np.ndarray, np.ndarray]:
        """Users (n,) and their scores (n, C)."""
        num_candidates = self.candidates[split].items.shape[1]
        with advice(f"{FROM_SCRATCH} and a lower --lora_lr"):
            return score_candidates(
                self.model, self.loaders[split], self.letter_ids[:num_candidates], description
            )

    def validate(self) -> Metrics:
        """Metrics on the users of the validation split whose target was retrieved."""
        self._latest = self.score("val", "validate")
        ranks = reranked(self.candidates["val"], *self._latest).label_ranks
        return ranking_metrics(ranks, self.config.rerank_metric_ks)

    def save_best(self) -> None:
        """Keep the adapter of the latest validation."""
        self._best = self._latest
        save_adapter(self.model, self.adapter)

    def best_validation_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Users and validation scores of the best adapter, which the model must hold."""
        if self._best is None:  # validated before the run was interrupted
            self._best = self.score("val", "validate")
        return self._best


class Results(NamedTuple):
    """Results of a finished run.

    Attributes:
        users: (n,) users of the test split whose target was retrieved.
        ranked: their candidates in the ranker's order.
        labels: (num_users,) every user's target.
        ranks: (num_users,) its rank after both stages.
        fused_ranks: (num_users,) the same with fused scores.
        metrics: metrics by the name of their file.
        retriever_subset: metrics of the retriever on ``users``.
    """

    users: np.ndarray
    ranked: Candidates
    labels: np.ndarray
    ranks: np.ndarray
    fused_ranks: np.ndarray
    metrics: dict[str, Metrics]
    retriever_subset: Metrics


def evaluate(evaluator: Evaluator) -> Results:
    """Rank the candidates of the test split with the best adapter, alone and fused."""
    val, test = evaluator.candidates["val"], evaluator.candidates["test"]
    ks, metric = evaluator.config.rerank_metric_ks, evaluator.config.rerank_best_metric
    weight = fusion_weight(val, *evaluator.best_validation_scores(), metric)
    users, scores = evaluator.score("test", "test")
    ranked = reranked(test, users, scores)
    fused = reranked(test, users, fused_scores(test, users, scores, weight))
    ranks = two_stage_ranks(test, users, ranked)
    fused_ranks = two_stage_ranks(test, users, fused)
    metrics = {
        "subset": ranking_metrics(ranked.label_ranks, ks),
        "retrieval": ranking_metrics(test.label_ranks, ks),
        "overall": ranking_metrics(ranks, ks),
        "fused": ranking_metrics(fused_ranks, ks) | {"weight": weight},
    }
    retriever_subset = ranking_metrics(test.label_ranks[users], ks)
    return Results(users, ranked, test.labels, ranks, fused_ranks, metrics, retriever_subset)


def write(results: Results, run_dir: Path) -> None:
    """Write the rankings and metrics."""
    write_arrays(
        run_dir / RANKINGS,
        users=results.users.astype(np.int32),
        items=results.ranked.items,
        scores=results.ranked.scores,
        labels=results.labels,
        label_ranks=results.ranks,
        fused_label_ranks=results.fused_ranks,
    )
    for name, values in results.metrics.items():
        write_json(run_dir / METRICS.format(name), values)


def shown_columns(results: Results) -> dict[str, Metrics]:
    """The metrics of the printed table."""
    return {
        "retriever": results.metrics["retrieval"],
        "two stages": results.metrics["overall"],
        "fused": results.metrics["fused"],
        "retriever (sub)": results.retriever_subset,
        "ranker (sub)": results.metrics["subset"],
    }
