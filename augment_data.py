"""Let a language model write further interactions for every user, to train retrievers on.

Example:
    python augment_data.py --dataset_code ml-100k
    python train_retriever.py --dataset_code ml-100k --augmented experiments/llm4idrec/ml-100k
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import AugmentationConfig, UserError, check_device, parse, run_main
from datasets import SequenceDataset, load_dataset
from datasets.base import Filters
from storage import atomic_folder, atomic_path, read_json, write_json
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
    from accelerate import Accelerator
    from peft import PeftModel

    from augmentation.prompts import IdPrompts
    from trainer.loop import RunLog

GENERATED = "generated.jsonl"
COUNTS = "augmentation.json"
OUTPUTS = ("adapter", GENERATED, "augmented.npz", COUNTS, "exports")
# Flags that the tuned model, or the texts, do not depend on.
FILTERING = {"retriever_path", "plausible_rank", "plausible_share"}
SAMPLING = {"constrained", "temperature", "top_p"}
BEST_METRIC = "log_likelihood"
VAL_EXAMPLES = 128


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings and inputs, then run the stages."""
    config = parse(AugmentationConfig, argv, __doc__)
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
    retriever = check_retriever(config, data)
    earlier = earlier_stages(config)
    language_model = find_language_model(config)
    stages = stage_fingerprints(config, data, language_model, retriever)
    details = language_model.details() | {
        "data_fingerprint": data.fingerprint,
        "stages": stages,
        "fingerprint": stages["filter"],
    }
    run_dir = config.run_dir
    folder.check_replaceable(run_dir, OUTPUTS, config)
    with folder.locked(run_dir):
        augment(config, data, language_model, details, earlier)


def check_retriever(config: AugmentationConfig, data: SequenceDataset) -> bytes:
    """The weights of the retriever that is to judge, for the fingerprint.

    Raises:
        UserError: it is not there or belongs to other data.
    """
    if config.retriever_path is None:
        return b""
    run_dir = Path(config.retriever_path)
    weights = run_dir / "model.safetensors"
    if not weights.is_file() or not (run_dir / "config.json").is_file():
        raise UserError(
            f"--retriever_path {run_dir}: no finished run of train_retriever.py there, "
            "e.g. experiments/lru/ml-100k"
        )
    if read_json(run_dir / "config.json").get("data_fingerprint") != data.fingerprint:
        raise UserError(
            f"--retriever_path {run_dir} belongs to other data than {data.code}: name a retriever "
            "trained with the same --dataset_code, --data_root, --min_* flags"
        )
    return weights.read_bytes()


def earlier_stages(config: AugmentationConfig) -> dict[str, str]:
    """Fingerprints of the stages of the run named by ``--reuse``.

    Raises:
        UserError: it is not there, or not finished.
    """
    if config.reuse is None:
        return {}
    earlier = Path(config.reuse)
    if earlier.resolve() == config.run_dir.resolve():
        raise UserError(f"--reuse {earlier} is this run's own folder: name another --export_root")
    if not all((earlier / name).exists() for name in ("config.json", *OUTPUTS)):
        raise UserError(f"--reuse {earlier}: no finished run of augment_data.py there")
    if (earlier / folder.CHECKPOINT).exists():
        raise UserError(f"--reuse {earlier}: not finished, go on with it by --resume true first")
    return read_json(earlier / "config.json").get("stages", {})


def stage_fingerprints(
    config: AugmentationConfig, data: SequenceDataset, language_model: LanguageModel, weights: bytes
) -> dict[str, str]:
    """A hash of all that shapes each stage's results, those of the stages before included."""
    settings = config.as_dict() | language_model.details()

    def fingerprint(left_out: set[str], *inputs: bytes) -> str:
        shaping = {name: value for name, value in settings.items() if name not in left_out}
        return folder.fingerprint(shaping, data, *inputs)

    return {
        "tuning": fingerprint(FILTERING | SAMPLING),
        "generation": fingerprint(FILTERING),
        "filter": fingerprint(set(), hashlib.sha256(weights).digest()),
    }


def reuse(config: AugmentationConfig, name: str) -> None:
    """Copy a stage's output from the run named by ``--reuse``."""
    source, target = Path(config.reuse, name), config.run_dir / name
    if source.is_dir():
        with atomic_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
    else:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    print(f"{name}: taken from {config.reuse}")


def tuned_model(
    config: AugmentationConfig,
    data: SequenceDataset,
    language_model: LanguageModel,
    prompts: IdPrompts,
    details: dict[str, Any],
    accelerator: Accelerator,
    log: RunLog,
) -> PeftModel:
    """The language model with the adapter of the run's folder, tuned first if it is not there."""
    import numpy as np
    import torch
    from accelerate.utils import send_to_device

    from augmentation.prompts import TrainingExamples
    from dataloader.sampler import ShuffledBatches, training_loader
    from model.verbalizer import response_loss
    from trainer import run
    from trainer.average import WeightAverage
    from trainer.loop import LoopSettings, Trainer, total_steps

    adapter = config.run_dir / "adapter"
    model = load_with_adapters(language_model, config, accelerator)
    if adapter.exists() and not (config.run_dir / folder.CHECKPOINT).exists():  # reused
        load_adapter(model, adapter)
        return model.eval()

    def examples(seed: int, max_rows: int) -> TrainingExamples:
        return TrainingExamples(
            data,
            prompts,
            local_examples=config.local_examples,
            local_items=config.local_items,
            max_rows=max_rows,
            max_tokens=language_model.max_tokens,
            seed=seed,
        )

    training = examples(config.seed, config.lora_micro_batch_size or config.train_batch_size)
    sampler = ShuffledBatches(len(training), config.train_batch_size, config.seed)
    settings = LoopSettings(
        num_epochs=-(-config.max_steps // len(sampler)),
        max_steps=config.max_steps,
        val_steps=config.lora_val_iterations if config.val_strategy == "iteration" else None,
        patience=config.lora_early_stopping_patience if config.early_stopping else None,
        best_metric=BEST_METRIC,
        max_grad_norm=config.max_grad_norm,
        save_seconds=config.save_seconds,
        if_nan="start anew with a lower --lora_lr",
        if_memory=f"lower --tokens_per_batch from {language_model.max_tokens:,} and go on with "
        "--resume true",
    )
    # Training items in other samples than those trained on: no held-out item is ever read.
    others = examples(config.seed + 1, config.val_batch_size)
    chosen = np.linspace(0, len(others), min(VAL_EXAMPLES, len(others)), endpoint=False)
    val_batches = others.__getitems__(chosen.astype(int).tolist())
    optimizer, scheduler = run.build_optimization(
        model,
        config,
        lr=config.lora_lr,
        total=total_steps(settings, len(sampler)),
        paged=language_model.paged,
    )
    loader = training_loader(training, sampler, config.num_workers)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    @torch.inference_mode()
    def validate() -> dict[str, float]:
        batches = send_to_device(val_batches, accelerator.device)
        losses = [response_loss(model, batch).item() * batch["weight"] for batch in batches]
        return {BEST_METRIC: -sum(losses)}

    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        sampler=sampler,
        loss=response_loss,
        validate=validate,
        save_best=lambda: save_adapter(model, adapter),
        settings=settings,
        run_dir=config.run_dir,
        fingerprint=details["fingerprint"],
        log=log,
        user_names=data.user_names,
        average=WeightAverage(model, config.ema_decay) if config.ema_decay else None,
    )
    trainer.fit(config.resume)
    load_adapter(model, adapter)
    return model.eval()


def augment(
    config: AugmentationConfig,
    data: SequenceDataset,
    language_model: LanguageModel,
    details: dict[str, Any],
    earlier: dict[str, str],
) -> None:
    """Tune, generate, filter, and write the run's files."""
    # Imported late, so that mistakes answer without waiting for torch.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from augmentation.exports import export
    from augmentation.filters import REASONS, first_filter, judge, plausible_rank
    from augmentation.generation import read_written, write_interactions
    from augmentation.merge import FILE_NAME, Interactions, merge, save_augmented
    from augmentation.prompts import GenerationPrompts, IdPrompts
    from trainer import run

    run_dir, stages = config.run_dir, details["stages"]
    if config.resume and folder.is_finished(run_dir, OUTPUTS, details["fingerprint"]):
        print(f"{run_dir} is finished, there is nothing to resume")
        return
    accelerator = run.make_accelerator(config.device, config.seed)
    prompts = IdPrompts(
        language_model.tokenizer,
        num_users=data.num_users,
        num_items=data.num_items,
        eos_id=language_model.eos_id,
        max_text_len=config.llm_max_text_len,
        max_answer_len=config.max_new_tokens,
    )
    resumed = config.resume and folder.is_started(run_dir, OUTPUTS, details["fingerprint"])
    log = run.open_run(run_dir, config, details, OUTPUTS, resumed)
    generated = run_dir / GENERATED
    for stage, name in (("tuning", "adapter"), ("generation", GENERATED)):
        if config.reuse is None or (run_dir / name).exists():
            continue
        if earlier.get(stage) == stages[stage]:
            reuse(config, name)
        else:
            print(
                f"note: {name} of {config.reuse} was made with other flags, data or code: made anew"
            )

    written = read_written(generated)
    if len(written) < data.num_users:
        model = tuned_model(config, data, language_model, prompts, details, accelerator, log)
        written = write_interactions(
            model,
            prompts,
            GenerationPrompts(data, prompts, config.test_batch_size),
            written,
            generated,
            constrained=config.constrained,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            save_seconds=config.save_seconds,
            if_memory=f"lower --test_batch_size from {config.test_batch_size} and go on with "
            "--resume true",
        )

    interactions, dropped = first_filter(written, data)
    total = len(interactions.items) + dropped.total()
    highest = None
    if config.retriever_path:
        ranks, val_ranks = judge(
            Path(config.retriever_path), data, interactions, accelerator.device
        )
        highest = config.plausible_rank or plausible_rank(val_ranks, config.plausible_share)
        dropped["implausible"] = int((ranks > highest).sum())
        interactions = Interactions(*(x[ranks <= highest] for x in interactions))
    counts = {
        "num_users": data.num_users,
        "training_interactions": int(data.training_counts().sum()),
        "written": total,
        "valid_share": 1 - (dropped["malformed"] + dropped["unknown"]) / max(1, total),
        "dropped": {reason: dropped[reason] for reason in REASONS},
        "plausible_rank": highest,
        "kept": len(interactions.items),
        "users_with_items": len(set(interactions.users.tolist())),
    }
    save_augmented(run_dir / FILE_NAME, interactions, data.fingerprint)
    write_json(run_dir / COUNTS, counts)
    # RecBole reads data of its own where it is asked for ml-100k.
    name = f"{data.code}-augmented"
    export(merge(data, interactions, "before"), run_dir / "exports", name)
    run.close_run(run_dir, log, {"written": total, "kept": counts["kept"]})
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped"].items())
    print(
        f"{total:,} numbers written for {data.num_users:,} users; dropped: {reasons}; "
        f"{counts['kept']:,} join {counts['training_interactions']:,} training interactions\n"
        f"written to {run_dir}"
    )


if __name__ == "__main__":
    run_main(main)
