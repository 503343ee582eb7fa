"""Tune a language model to rank the retriever's candidates, and evaluate both stages together.

Example:
    python train_ranker.py --llm_retrieved_path experiments/lru/ml-100k
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import RankerConfig, UserError, check_device, parse, reread, run_main
from dataloader.candidates import FILE_NAME, Candidates, load_candidates
from dataloader.prompt import PromptBuilder
from datasets import SequenceDataset, load_dataset
from datasets.base import Filters
from storage import read_json, reading
from trainer import folder
from trainer.language_model import (
    LanguageModel,
    check_examples,
    find_language_model,
    load_adapter,
    load_with_adapters,
    save_adapter,
)

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

OUTPUTS = (
    "adapter",
    "rankings.npz",
    "subset_metrics.json",
    "retrieval_metrics.json",
    "overall_metrics.json",
    "fused_metrics.json",
)
RETRIEVER_BATCH_SIZE = 256
INHERITED = (
    "dataset_code", "data_root", "cache_root", "interactions", "items",
    "min_rating", "min_uc", "min_sc",
)  # fmt: skip


def retriever_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The data settings of the retriever's run, so that they need not be given again."""
    if "llm_retrieved_path" not in given:
        return {}
    folder = Path(given["llm_retrieved_path"])
    if not (folder / FILE_NAME).exists():
        raise UserError(
            f"--llm_retrieved_path {folder}: no {FILE_NAME} there; name the folder of a finished "
            "run of train_retriever.py, e.g. experiments/lru/ml-100k"
        )
    if not (folder / "config.json").exists():
        return {}
    path = folder / "config.json"
    settings = read_json(path)
    with reading(path, "run train_retriever.py again"):
        settings = reread(RankerConfig, {k: settings[k] for k in INHERITED if k in settings})
    for name in ("dataset_code", *Filters._fields):
        if name in given and given[name] != settings.get(name, given[name]):
            raise UserError(
                f"--{name} {given[name]}: {folder} was made with {settings[name]}; leave the flag "
                "out or name another --llm_retrieved_path"
            )
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings and inputs, then train."""
    config = parse(RankerConfig, argv, __doc__, inherit=retriever_settings)
    check_device(config.device)
    data = load_dataset(
        config.dataset_code,
        data_root=config.data_root,
        cache_root=config.cache_root,
        filters=Filters(config.min_rating, config.min_uc, config.min_sc),
        interactions=config.interactions,
        items=config.items,
    )
    print(data.summary())
    check_examples(data)
    candidates = load_candidates(config.retrieved_dir / FILE_NAME, data)
    if not all(len(split.retrieved) for split in candidates.values()):
        raise UserError(
            f"{config.retrieved_dir}: no user's answer is among the candidates, there is nothing "
            "to rank; train the retriever longer"
        )

    language_model = find_language_model(config)
    prompts = PromptBuilder(
        language_model.tokenizer,
        data.titles,
        instruction=config.llm_system_template,
        input_template=config.llm_input_template,
        num_candidates=max(
            config.llm_negative_sample_size + 1, *(c.items.shape[1] for c in candidates.values())
        ),
        max_title_len=config.llm_max_title_len,
        max_text_len=config.llm_max_text_len,
    )
    details = language_model.details() | {"data_fingerprint": data.fingerprint}
    details["fingerprint"] = folder.fingerprint(
        config.as_dict() | details, data, *(c.items.tobytes() for c in candidates.values())
    )
    details["retrieved_from"] = str(config.retrieved_dir)
    settings = config.retrieved_dir / "config.json"
    if settings.exists():
        details["retriever"] = read_json(settings)
    run_dir = config.run_dir(language_model.base.name)
    folder.check_replaceable(run_dir, OUTPUTS, config)
    with folder.locked(run_dir):
        train(config, data, candidates, language_model, prompts, details)


def hard_negatives_of(
    config: RankerConfig, data: SequenceDataset, seen: np.ndarray, accelerator: Accelerator
) -> np.ndarray | None:
    """(examples, k) what the retriever would have put beside the answers of the examples seen."""
    if config.train_candidates == "random":
        return None
    import numpy as np
    from torch.utils.data import Subset

    from dataloader.retriever import Prefixes
    from dataloader.sampler import evaluation_loader
    from model.retriever import load_retriever
    from trainer.retriever import hard_negatives

    retriever = load_retriever(config.retrieved_dir, data.num_items)
    prefixes = Prefixes(data, retriever.max_len, retriever.mask_token)
    loader = evaluation_loader(Subset(prefixes, seen), RETRIEVER_BATCH_SIZE, config.num_workers)
    size = config.llm_negative_sample_size // (1 if config.train_candidates == "retrieved" else 2)
    negatives = np.zeros((len(prefixes), size), np.int32)
    negatives[seen] = hard_negatives(retriever.model.to(accelerator.device), loader, size)
    return negatives


def train(
    config: RankerConfig,
    data: SequenceDataset,
    candidates: dict[str, Candidates],
    language_model: LanguageModel,
    prompts: PromptBuilder,
    details: dict[str, Any],
) -> None:
    """Tune, select on validation, evaluate on the test split and write the run's files."""
    # Imported late, so that the mistakes above answer without waiting for torch.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import numpy as np
    import torch

    from dataloader.ranker import EvaluationPrompts, TrainingPrompts
    from dataloader.sampler import ShuffledBatches, evaluation_loader, training_loader
    from metrics import ranking_metrics
    from model.verbalizer import response_loss
    from storage import atomic_path, write_json
    from trainer import run
    from trainer.average import WeightAverage
    from trainer.loop import LoopSettings, Trainer, total_steps
    from trainer.ranker import (
        fused_scores,
        fusion_weight,
        reranked,
        score_users,
        two_stage_ranks,
    )

    ks = config.rerank_metric_ks
    base, eos_id, max_tokens = language_model.base, language_model.eos_id, language_model.max_tokens
    run_dir = config.run_dir(base.name)
    if config.resume and folder.is_finished(run_dir, OUTPUTS, details["fingerprint"]):
        print(f"{run_dir} is finished, there is nothing to resume")
        print(run.metrics_table({"two stages": read_json(run_dir / "overall_metrics.json")}))
        return
    accelerator = run.make_accelerator(config.device, config.seed)
    settings = LoopSettings(
        num_epochs=config.lora_num_epochs,
        max_steps=config.max_steps,
        val_steps=config.lora_val_iterations if config.val_strategy == "iteration" else None,
        patience=config.lora_early_stopping_patience if config.early_stopping else None,
        best_metric=config.rerank_best_metric,
        max_grad_norm=config.max_grad_norm,
        save_seconds=config.save_seconds,
        if_nan="start anew with a lower --lora_lr",
        if_memory=f"lower --tokens_per_batch from {max_tokens:,} and go on with --resume true",
    )
    num_examples = len(data.training_prefixes()[0])
    sampler = ShuffledBatches(num_examples, config.train_batch_size, config.seed)
    steps = total_steps(settings, len(sampler))
    examples = TrainingPrompts(
        data,
        prompts,
        num_negatives=config.llm_negative_sample_size,
        hard_negatives=hard_negatives_of(config, data, sampler.seen(steps), accelerator),
        max_history=config.llm_max_history,
        max_rows=config.lora_micro_batch_size or config.train_batch_size,
        max_tokens=max_tokens,
        eos_id=eos_id,
        on_inputs=config.llm_train_on_inputs,
        seed=config.seed,
    )
    loaders = {
        split: evaluation_loader(
            EvaluationPrompts(
                data,
                split,
                candidates[split],
                prompts,
                max_history=config.llm_max_history,
                pad_id=eos_id,
                permutations=config.permutations,
                seed=config.seed,
            ),
            batch_size,
            config.num_workers,
        )
        for split, batch_size in (("val", config.val_batch_size), ("test", config.test_batch_size))
    }
    model = load_with_adapters(language_model, config, accelerator)
    optimizer, scheduler = run.build_optimization(
        model,
        config,
        lr=config.lora_lr,
        total=steps,
        paged=language_model.paged,
    )
    train_loader = training_loader(examples, sampler, config.num_workers)
    model, optimizer, train_loader, loaders["val"], loaders["test"] = accelerator.prepare(
        model, optimizer, train_loader, loaders["val"], loaders["test"]
    )
    details["gradient_checkpointing"] = model.is_gradient_checkpointing
    log = run.open_run(run_dir, config, details, OUTPUTS)
    label_ids = torch.from_numpy(prompts.label_ids).to(accelerator.device)
    adapter = run_dir / "adapter"

    val_scores: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of the latest and best adapter

    def score(split: str, description: str) -> tuple[np.ndarray, np.ndarray]:
        width = candidates[split].items.shape[1]
        return score_users(model, loaders[split], label_ids[:width], description)

    def validate() -> dict[str, float]:
        val_scores["latest"] = score("val", "validate")
        return ranking_metrics(reranked(candidates["val"], *val_scores["latest"]).label_ranks, ks)

    def save_best() -> None:
        val_scores["best"] = val_scores["latest"]
        save_adapter(model, adapter)

    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=train_loader,
        sampler=sampler,
        loss=partial(
            response_loss, label_ids=label_ids if config.response_loss == "letters" else None
        ),
        validate=validate,
        save_best=save_best,
        settings=settings,
        run_dir=run_dir,
        fingerprint=details["fingerprint"],
        log=log,
        user_names=data.user_names,
        average=WeightAverage(model, config.ema_decay) if config.ema_decay else None,
    )
    progress = trainer.fit(config.resume)

    load_adapter(model, adapter)
    model.eval()
    if "best" not in val_scores:  # found before the run was interrupted
        val_scores["best"] = score("val", "validate")
    weight = fusion_weight(candidates["val"], *val_scores["best"], config.rerank_best_metric)
    users, scores = score("test", "test")
    ranked = reranked(candidates["test"], users, scores)
    fused = reranked(
        candidates["test"], users, fused_scores(candidates["test"], users, scores, weight)
    )
    ranks = two_stage_ranks(candidates["test"], users, ranked)
    fused_ranks = two_stage_ranks(candidates["test"], users, fused)
    retrieved = candidates["test"].label_ranks
    metrics = {
        "subset": ranking_metrics(ranked.label_ranks, ks),
        "retrieval": ranking_metrics(retrieved, ks),
        "overall": ranking_metrics(ranks, ks),
        "fused": ranking_metrics(fused_ranks, ks) | {"weight": weight},
    }
    with atomic_path(run_dir / "rankings.npz") as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            users=users.astype(np.int32),
            items=ranked.items,
            scores=ranked.scores,
            labels=candidates["test"].labels,
            label_ranks=ranks,
            fused_label_ranks=fused_ranks,
        )
    for name, values in metrics.items():
        write_json(run_dir / f"{name}_metrics.json", values)
    run.close_run(run_dir, log, {f"test_{k}": v for k, v in metrics["overall"].items()})
    columns = {
        "retriever": metrics["retrieval"],
        "two stages": metrics["overall"],
        "fused": metrics["fused"],
        "retriever (sub)": ranking_metrics(retrieved[users], ks),
        "ranker (sub)": metrics["subset"],
    }
    print(
        f"""
{data.code}, {base.name}, adapter of step {progress.best_step:,}. All users: the retriever, both
stages, and their scores fused with a weight of {weight:.2f} that validation chose; then (sub) the
users whose answer the retriever found.
"""
    )
    print(run.metrics_table(columns))
    print(f"\nwritten to {run_dir}")


if __name__ == "__main__":
    run_main(main)
