"""Tune the language model to rank the retriever's candidates, and evaluate both stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from peft import PeftModel

from config import LOG_LIKELIHOOD, RankerConfig
from dataloader.candidates import SPLITS, Candidates
from dataloader.prompt import PromptBuilder
from dataloader.sampler import ShuffledBatches, training_loader
from dataloader.title_prompt import TitlePrompts
from datasets import SequenceDataset
from distributed import in_main_process, size
from errors import advice
from evaluation.fusion import RETRIEVER, Fusion, fit_fusion, log_losses
from evaluation.reranking import (
    reranked,
    retriever_log_probabilities,
    targets_among,
    two_stage_ranks,
)
from metrics import ranking_metrics
from model.guided_titles import add_prior_weights
from model.language_model import dequantize_for_inference, load_adapter, save_adapter
from recipes.language_model import LanguageModel
from recipes.runs import FROM_SCRATCH, is_finished
from recipes.training import (
    build_trainer,
    close_run,
    loop_settings,
    metrics_table,
    open_run,
    print_metrics,
)
from recipes.tuning import (
    batch_limits,
    check_memory,
    fit_memory,
    load_with_adapters,
    tuning_advice,
)
from recipes.verbalizers import Verbalizer, build_verbalizer
from storage import write_arrays, write_json
from trainer.loop import LoopSettings, Metrics, Trainer
from trainer.optimization import make_accelerator
from trainer.run_folder import RunFolder

ADAPTER = "adapter"
RANKINGS = "rankings.npz"
FUSION = "fusion.json"
METRICS = "{}_metrics.json"


def train(
    config: RankerConfig,
    data: SequenceDataset,
    run: RunFolder,
    candidates: dict[str, Candidates],
    language_model: LanguageModel,
    prompts: PromptBuilder | TitlePrompts,
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
        print_metrics(run.path / METRICS.format("overall"), "two stages")
        return
    trainer, evaluator = set_up(config, data, run, candidates, language_model, prompts, details)
    with advice(FROM_SCRATCH):
        progress = trainer.fit(config.resume)
        load_adapter(evaluator.model, run.path / ADAPTER)
    dequantize_for_inference(evaluator.model)
    results = evaluate(evaluator)
    write(results, run.path)
    overall = results.metrics["overall"]
    close_run(run, trainer.log, {f"test_{name}": x for name, x in overall.items()})
    losses = results.fusion["log_loss"]["test"]
    print(
        f"\n{data.code}, {language_model.base.name}, best at step {progress.best_step:,}: all "
        f"users, then (sub) those whose target is among the candidates.\n"
        "Log-loss on these (sub): "
        + ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        + "\n"
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
    prompts: PromptBuilder | TitlePrompts,
    details: Mapping[str, Any],
) -> tuple[Trainer, Evaluator]:
    """Build everything that training needs, and open the run's folder; arguments as in ``train``.

    Raises:
        UserError: the run does not fit in memory, or files that it needs cannot be used.
    """
    accelerator = make_accelerator(config.device, config.seed)
    check_memory(language_model, config)
    verbalizer = build_verbalizer(
        config, data, candidates, language_model, accelerator.device, prompts
    )
    sampler = ShuffledBatches(verbalizer.num_examples, config.train_batch_size, config.seed)
    total_steps = ranker_loop(config, language_model).total_steps(len(sampler))
    seen = sampler.first_examples(total_steps)
    examples = verbalizer.training_examples(seen)
    check_memory(language_model, config, next(iter(training_loader(examples, sampler, 0))))
    model = load_model(language_model, config, accelerator)
    language_model = fit_memory(model, language_model, config)
    examples.limits = batch_limits(config, language_model)
    settings = ranker_loop(config, language_model)
    evaluator = Evaluator(config, model, run.path / ADAPTER, candidates, verbalizer)
    resolved = {
        "tokens_per_batch": language_model.max_tokens,
        "gradient_checkpointing": model.is_gradient_checkpointing,
        "total_steps": total_steps,
        "num_processes": size(),
    }
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
        loss=verbalizer.loss,
        validate=evaluator.validate,
        save_best=evaluator.save_best,
        user_names=data.user_names,
    )
    return trainer, evaluator


def load_model(
    language_model: LanguageModel, config: RankerConfig, accelerator: Accelerator
) -> PeftModel:
    """Load the frozen model and add everything that is trained."""
    sharded = config.llm_shard_weights and size() > 1
    model = load_with_adapters(language_model, config, accelerator, sharded=sharded)
    if config.is_guided:
        add_prior_weights(model, config.title_prior)
    return model


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


# Fit and evaluate ---------------------------------------------------------------------------------


class Evaluator:
    """Scores the candidates of the users of a split, and keeps the best adapter.

    Args:
        config: all settings.
        model: the ranker.
        adapter: folder of the best adapter.
        candidates: the retriever's candidates by split.
        verbalizer: scores candidates.
    """

    def __init__(
        self,
        config: RankerConfig,
        model: PeftModel,
        adapter: Path,
        candidates: Mapping[str, Candidates],
        verbalizer: Verbalizer,
    ) -> None:
        self.config, self.model, self.adapter = config, model, adapter
        self.candidates, self.verbalizer = candidates, verbalizer
        self.val_users = candidates["val"].retrieved
        if config.val_users and config.val_users < len(self.val_users):
            rng = np.random.default_rng(config.seed)
            self.val_users = np.sort(rng.choice(self.val_users, config.val_users, replace=False))
        self._latest_scores: np.ndarray | None = None  # (n, C) of val_users
        self._best_scores: np.ndarray | None = None

    def score(self, split: str, users: np.ndarray, description: str) -> np.ndarray:
        """(n, C) scores of the candidates of ``users`` (n,)."""
        with advice(f"{FROM_SCRATCH} and a lower --lora_lr"):
            return self.verbalizer.score(self.model, split, users, description)

    def validate(self) -> Metrics:
        """Metrics on users of the validation split whose target was retrieved."""
        scores = self.score("val", self.val_users, "validate")
        self._latest_scores = scores
        candidates = self.candidates["val"]
        ranks = reranked(candidates, self.val_users, scores).label_ranks
        targets = targets_among(candidates.items[self.val_users], candidates.labels[self.val_users])
        metrics = ranking_metrics(ranks, self.config.rerank_metric_ks)
        metrics[LOG_LIKELIHOOD] = -float(log_losses(scores, targets).mean())
        return metrics | self.verbalizer.learned_weights(self.model)

    def save_best(self) -> None:
        """Save the adapter of the latest validation, and keep its scores."""
        self._best_scores = self._latest_scores
        in_main_process(save_adapter)(self.model, self.adapter)

    def ranking_task(self, split: str) -> RankingTask:
        """Features of the candidates of all users whose target was retrieved.

        The model must hold the best adapter.
        """
        candidates = self.candidates[split]
        users = candidates.retrieved
        scores = self._best_scores if split == "val" else None
        if scores is None or len(scores) < len(users):
            scores = self.score(split, users, f"score, {split}")
        features = {RETRIEVER: retriever_log_probabilities(candidates, users)}
        features |= self.verbalizer.features(self.model, split, users, scores)
        targets = targets_among(candidates.items[users], candidates.labels[users])
        return RankingTask(users, features, targets)


class RankingTask(NamedTuple):
    """Candidates to rank.

    Attributes:
        users: (n,) users whose target was retrieved.
        features: (n, C) features of their candidates by name.
        targets: (n,) index of the target among the candidates.
    """

    users: np.ndarray
    features: dict[str, np.ndarray]
    targets: np.ndarray


class Results(NamedTuple):
    """Results of a finished run.

    Attributes:
        rankings: arrays of ``rankings.npz`` by name.
        metrics: metrics by file: ``subset``, ``retrieval``, ``overall`` and ``fused``.
        retriever_subset: metrics of the retriever on the users whose target was retrieved.
        fusion: content of ``fusion.json``.
    """

    rankings: dict[str, np.ndarray]
    metrics: dict[str, Metrics]
    retriever_subset: Metrics
    fusion: dict[str, Any]


def evaluate(evaluator: Evaluator) -> Results:
    """Fit the fusion on the validation split, then rank the candidates of the test split."""
    ks = evaluator.config.rerank_metric_ks
    tasks = {split: evaluator.ranking_task(split) for split in SPLITS}
    fusions = fit_fusions(evaluator.verbalizer, tasks["val"])
    test, (users, features, _) = evaluator.candidates["test"], tasks["test"]
    ranked = reranked(test, users, fusions["ranker"].scores(features))
    fused = reranked(test, users, fusions["fused"].scores(features))
    ranks, fused_ranks = two_stage_ranks(test, users, ranked), two_stage_ranks(test, users, fused)
    metrics = {
        "subset": ranking_metrics(ranked.label_ranks, ks),
        "retrieval": ranking_metrics(test.label_ranks, ks),
        "overall": ranking_metrics(ranks, ks),
        "fused": ranking_metrics(fused_ranks, ks),
    }
    rankings = {
        "users": users.astype(np.int32),
        "items": ranked.items,
        "scores": ranked.scores.astype(np.float32),
        "labels": test.labels,
        "label_ranks": ranks,
        "fused_label_ranks": fused_ranks,
    }
    retriever_subset = ranking_metrics(test.label_ranks[users], ks)
    return Results(rankings, metrics, retriever_subset, fusion_record(fusions, tasks))


def fit_fusions(verbalizer: Verbalizer, task: RankingTask) -> dict[str, Fusion]:
    """Fit the retriever alone (a temperature), the ranker alone, and both on a split."""
    retriever = {RETRIEVER: task.features[RETRIEVER]}
    return {
        "retriever": fit_fusion(retriever, task.targets, base=RETRIEVER),
        "ranker": verbalizer.fuse_alone(task.features, task.targets),
        "fused": fit_fusion(task.features, task.targets, base=RETRIEVER),
    }


def fusion_record(
    fusions: Mapping[str, Fusion], tasks: Mapping[str, RankingTask]
) -> dict[str, Any]:
    """Weights and log-losses, for ``fusion.json``."""
    return {
        "fitted_on": {"split": "val", "users": len(tasks["val"].users), "loss": "log-loss"},
        "weights": {name: fusion.weights for name, fusion in fusions.items()},
        "penalty": {name: fusions[name].penalty_record() for name in ("ranker", "fused")},
        "log_loss": {
            split: {
                name: float(log_losses(fusion.scores(task.features), task.targets).mean())
                for name, fusion in fusions.items()
            }
            for split, task in tasks.items()
        },
    }


@in_main_process
def write(results: Results, run_dir: Path) -> None:
    """Write the rankings, the fusion and the metrics."""
    write_arrays(run_dir / RANKINGS, **results.rankings)
    write_json(run_dir / FUSION, results.fusion)
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
