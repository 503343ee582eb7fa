"""Generate interactions with a language model: tune it, sample texts, filter, export."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import nn

from augmentation.decoding import fitting_tokens
from augmentation.exports import export_merged
from augmentation.filters import REASONS, extract_interactions, judge, plausible_rank
from augmentation.generation import GeneratedText, build_catalogue, generate, read_texts
from augmentation.merge import AUGMENTED_FILE, Interactions, save_augmented
from augmentation.prompts import (
    GenerationPrompts,
    IdPrompts,
    PublishedPrompts,
    TrainingExamples,
    training_history,
)
from config import AugmentationConfig
from dataloader.prompt_batches import Batch, BatchLimits
from dataloader.sampler import ShuffledBatches, training_loader
from datasets import SequenceDataset
from distributed import in_main_process, largest, main_first
from errors import UserError, advice
from model.hub import sizes
from model.language_model import (
    check_adapter,
    dequantize_for_inference,
    load_adapter,
    save_adapter,
)
from model.registry import load_retriever
from model.verbalizer import response_loss
from recipes.language_model import LanguageModel
from recipes.runs import FROM_SCRATCH, is_finished, other_run_explained
from recipes.training import build_trainer, close_run, loop_settings, open_run
from recipes.tuning import (
    batch_limits,
    check_memory,
    fit_memory,
    load_with_adapters,
    tuning_advice,
)
from storage import atomic_folder, atomic_path, write_json
from trainer.loop import LoopSettings, Metrics
from trainer.optimization import make_accelerator
from trainer.run_folder import RunFolder
from trainer.run_log import RunLog

ADAPTER = "adapter"
GENERATED = "generated.jsonl"
COUNTS = "augmentation.json"
OUTPUT_BY_STAGE = {"tuning": ADAPTER, "generation": GENERATED}
FREE_BATCH = 16  # users; other sizes give other texts
CONSTRAINED_BATCH = 1024
BEST_METRIC = "log_likelihood"
MAX_VAL_EXAMPLES = 128
CONSTRAINED_ADVICE = "leave out the flag or use another --llm_base_model"
RETRAIN = "run train_retriever.py again"


def augment(
    config: AugmentationConfig,
    data: SequenceDataset,
    run: RunFolder,
    language_model: LanguageModel,
    details: Mapping[str, Any],
    earlier: Mapping[str, str],
) -> None:
    """Tune, generate, filter and write the run's files.

    Args:
        config: all settings.
        data: the data set.
        run: the run's folder, reserved for this process.
        language_model: the base model.
        details: further content of ``config.json``, with the fingerprints of the ``stages``.
        earlier: fingerprints of the stages of the run to reuse.
    """
    if is_finished(run, config):
        return
    prompts = build_prompts(config, data, language_model)
    check_later_stages(config, data, prompts)
    check_window(config, data, prompts, language_model)
    accelerator = make_accelerator(config.device, config.seed)
    with other_run_explained():
        resumed = config.resume and run.is_started()
    reused = config.reuse and earlier.get("tuning") == details["stages"]["tuning"]
    if not reused and not (resumed and is_tuned(run)):
        check_memory(language_model, config, first_step(config, data, prompts, language_model))
    with main_first():
        log = open_run(run, config, details, resumed=resumed)
        if config.reuse:
            reuse_stages(Path(config.reuse), run.path, earlier, details["stages"])
    texts_path = run.path / GENERATED
    with advice("delete it and run the same command again"):
        texts = read_texts(texts_path)
    if len(texts) < data.num_users:
        model = tuned_model(config, data, run, language_model, prompts, accelerator, log)
        texts = generate_texts(config, data, prompts, model, texts, texts_path)
    interactions, counts = filter_texts(config, data, texts, prompts.prefix, accelerator.device)
    write(data, interactions, counts, run.path)
    close_run(run, log, {"written": counts["written"], "kept": counts["kept"]})
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts["dropped"].items())
    print(
        f"{counts['written']:,} items generated for {data.num_users:,} users; dropped: {reasons}; "
        f"{counts['kept']:,} join {counts['training_interactions']:,} training interactions\n"
        f"written to {run.path}"
    )


# Set up -------------------------------------------------------------------------------------------


def build_prompts(
    config: AugmentationConfig, data: SequenceDataset, language_model: LanguageModel
) -> IdPrompts:
    """The builder of prompts and responses."""
    builder = PublishedPrompts if config.id_prompt == "published" else IdPrompts
    return builder(
        language_model.tokenizer,
        num_users=data.num_users,
        num_items=data.num_items,
        eos_id=language_model.eos_id,
        max_text_len=config.llm_max_text_len,
        max_response_len=config.max_new_tokens,
    )


def check_later_stages(
    config: AugmentationConfig, data: SequenceDataset, prompts: IdPrompts
) -> None:
    """Refuse at once, not after hours of tuning, what a later stage could not use.

    Raises:
        UserError: no user has enough items for an example, the tokenizer cannot be constrained, or
            the retriever cannot be loaded.
    """
    longest = int((data.history_ends("train") - data.offsets[:-1]).max())
    if longest <= config.min_targets:
        raise UserError(
            f"--min_targets {config.min_targets} leaves no examples: users have at most {longest} "
            "training items, and one of them is needed as history"
        )
    if config.constrained:
        with advice(CONSTRAINED_ADVICE):
            build_catalogue(prompts)
    if config.retriever_path:
        with advice(RETRAIN):
            load_retriever(Path(config.retriever_path), data.num_items)


def check_window(
    config: AugmentationConfig,
    data: SequenceDataset,
    prompts: IdPrompts,
    language_model: LanguageModel,
) -> None:
    """Refuse texts that would grow beyond the positions that the language model has.

    Only the published prompts do not leave room for the generated tokens.

    Raises:
        UserError: a user's prompt is too long.
    """
    _, positions = sizes(language_model.base.folder)
    room = positions - config.max_new_tokens
    if config.id_prompt != "published" or config.llm_max_text_len <= room:
        return
    users = range(data.num_users)
    longest = max(len(prompts.encode(user, training_history(data, user))) for user in users)
    if longest > room:
        raise UserError(
            f"--max_new_tokens {config.max_new_tokens}: {language_model.base.name} reads at most "
            f"{positions:,} tokens, and a prompt has {longest:,}: lower it, or --llm_max_text_len "
            f"to {room} to cut prompts"
        )


def reuse_stages(
    earlier_dir: Path, run_dir: Path, earlier: Mapping[str, str], stages: Mapping[str, str]
) -> None:
    """Copy the outputs of an earlier run's stages whose fingerprints agree with this run's.

    Raises:
        UserError: an output of the earlier run is damaged, or a copy cannot be written.
    """
    for stage, name in OUTPUT_BY_STAGE.items():
        source, target = earlier_dir / name, run_dir / name
        if target.exists():
            continue
        if earlier.get(stage) != stages[stage]:
            print(f"note: {source} was made with other settings or data: not reused")
            continue
        with advice("name another run with --reuse, or run that one again"):
            check_adapter(source) if source.is_dir() else read_texts(source)
        if source.is_dir():
            with atomic_folder(target) as temporary:
                shutil.copytree(source, temporary, dirs_exist_ok=True)
        else:
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
        print(f"{name}: reused from {earlier_dir}")


# Tune ---------------------------------------------------------------------------------------------


def tuned_model(
    config: AugmentationConfig,
    data: SequenceDataset,
    run: RunFolder,
    language_model: LanguageModel,
    prompts: IdPrompts,
    accelerator: Accelerator,
    log: RunLog,
) -> PeftModel:
    """The language model with the adapter of the run's folder, tuned first if there is none."""
    model = load_with_adapters(language_model, config, accelerator)
    if not is_tuned(run):
        tune(config, data, run, language_model, prompts, accelerator, log, model)
    with advice(FROM_SCRATCH):
        load_adapter(model, run.path / ADAPTER)
    dequantize_for_inference(model)
    return model.eval()


def is_tuned(run: RunFolder) -> bool:
    """Whether the run's folder has an adapter whose tuning is finished."""
    return (run.path / ADAPTER).exists() and not run.is_interrupted()


def tune(
    config: AugmentationConfig,
    data: SequenceDataset,
    run: RunFolder,
    language_model: LanguageModel,
    prompts: IdPrompts,
    accelerator: Accelerator,
    log: RunLog,
    model: PeftModel,
) -> None:
    """Tune the adapters on users' training items and save the best or the last."""
    language_model = fit_memory(model, language_model, config)
    limits = batch_limits(config, language_model)
    examples = training_examples(config, data, prompts, limits, seed=config.seed)
    # Validation examples are other samples of the same training items: no held-out item is read.
    val_limits = limits._replace(max_rows=config.val_batch_size)
    val_examples = training_examples(config, data, prompts, val_limits, seed=config.seed + 1)
    sampler = ShuffledBatches(len(examples), config.train_batch_size, config.seed)

    validation = Validation(model, val_examples)

    def keep() -> None:
        in_main_process(save_adapter)(model, run.path / ADAPTER)

    def validate() -> Metrics:
        if config.kept_weights == "last":
            keep()  # at every validation; the last one follows the last step
        return validation()

    trainer = build_trainer(
        config,
        run,
        log,
        accelerator=accelerator,
        model=model,
        dataset=examples,
        sampler=sampler,
        settings=tuning_loop(config, language_model, len(sampler)),
        lr=config.lora_lr,
        paged=language_model.paged,
        loss=response_loss,
        validate=validate,
        save_best=keep if config.kept_weights == "best" else lambda: None,
        user_names=data.user_names,
    )
    with advice(FROM_SCRATCH):
        trainer.fit(config.resume)


def tuning_loop(
    config: AugmentationConfig, language_model: LanguageModel, batches_per_epoch: int
) -> LoopSettings:
    """Settings of the training loop, with as many epochs as ``--max_steps`` needs."""
    return loop_settings(
        config,
        num_epochs=-(-config.max_steps // batches_per_epoch),
        val_iterations=config.lora_val_iterations,
        patience=config.lora_early_stopping_patience,
        best_metric=BEST_METRIC,
        advice=tuning_advice(language_model),
    )


def training_examples(
    config: AugmentationConfig,
    data: SequenceDataset,
    prompts: IdPrompts,
    limits: BatchLimits,
    *,
    seed: int,
) -> TrainingExamples:
    """Training examples from samples of users' training items."""
    return TrainingExamples(
        data,
        prompts,
        global_examples=config.global_examples,
        local_examples=config.local_examples,
        local_items=config.local_items,
        min_targets=config.min_targets,
        in_order=config.item_order == "time",
        on_inputs=config.llm_train_on_inputs,
        limits=limits,
        seed=seed,
    )


def first_step(
    config: AugmentationConfig,
    data: SequenceDataset,
    prompts: IdPrompts,
    language_model: LanguageModel,
) -> list[Batch]:
    """Micro-batches of the first optimizer step."""
    limits = batch_limits(config, language_model)
    examples = training_examples(config, data, prompts, limits, seed=config.seed)
    sampler = ShuffledBatches(len(examples), config.train_batch_size, config.seed)
    step: list[Batch] = next(iter(training_loader(examples, sampler, 0)))
    return step


class Validation:
    """Log-likelihood of a fixed sample of examples.

    Args:
        model: the model.
        examples: examples to sample from, evenly spaced.
    """

    def __init__(self, model: nn.Module, examples: TrainingExamples) -> None:
        self.model = model
        size = min(MAX_VAL_EXAMPLES, len(examples))
        chosen = np.linspace(0, len(examples), size, endpoint=False)
        self.batches = examples.__getitems__(chosen.astype(int).tolist())

    @torch.inference_mode()
    def __call__(self) -> Metrics:
        """Compute the mean log-likelihood per token."""
        batches = send_to_device(self.batches, next(self.model.parameters()).device)
        losses = [response_loss(self.model, b).item() * b["num_targets"] for b in batches]
        return {BEST_METRIC: -sum(losses) / sum(batch["num_targets"] for batch in batches)}


# Generate -----------------------------------------------------------------------------------------


def generate_texts(
    config: AugmentationConfig,
    data: SequenceDataset,
    prompts: IdPrompts,
    model: PeftModel,
    texts: dict[int, GeneratedText],
    path: Path,
) -> dict[int, GeneratedText]:
    """Sample a text for every user that has none, and keep all in the file."""
    batches = generation_batches(config, data, prompts, model)
    with advice(CONSTRAINED_ADVICE):
        return generate(
            model,
            prompts,
            batches,
            texts,
            path,
            constrained=config.constrained,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=config.seed,
            save_seconds=config.save_seconds,
            if_out_of_memory="continue with --resume and a lower --test_batch_size than "
            f"{len(batches.batches[0])}",
        )


def generation_batches(
    config: AugmentationConfig, data: SequenceDataset, prompts: IdPrompts, model: PeftModel
) -> GenerationPrompts:
    """The prompts of all users, in batches of the size that the flags set or that fits."""
    if config.test_batch_size or not config.constrained:
        return GenerationPrompts(data, prompts, config.test_batch_size or FREE_BATCH)
    fitting = -largest(-fitting_tokens(model))  # what fits in every process
    return GenerationPrompts(data, prompts, CONSTRAINED_BATCH, fitting)


# Filter and write ---------------------------------------------------------------------------------


def filter_texts(
    config: AugmentationConfig,
    data: SequenceDataset,
    texts: dict[int, GeneratedText],
    prefix: str,
    device: torch.device,
) -> tuple[Interactions, dict[str, Any]]:
    """Turn texts into interactions; returns them and the content of ``augmentation.json``."""
    interactions, dropped = extract_interactions(texts, data, prefix)
    num_generated = len(interactions.items) + dropped.total()
    max_rank = None
    if config.retriever_path:
        interactions, max_rank = plausible(config, data, interactions, dropped, device)
    return interactions, count(data, interactions, dropped, num_generated, max_rank)


def plausible(
    config: AugmentationConfig,
    data: SequenceDataset,
    interactions: Interactions,
    dropped: Counter[str],
    device: torch.device,
) -> tuple[Interactions, int]:
    """Drop the interactions that a retriever ranks low for their user.

    Args:
        config: all settings.
        data: the data set.
        interactions: what to filter.
        dropped: number of dropped interactions by reason, updated in place.
        device: device of the retriever.

    Returns:
        The remaining interactions, and the largest rank that is kept.
    """
    with advice(RETRAIN):
        ranks, target_ranks = judge(Path(str(config.retriever_path)), data, interactions, device)
    max_rank = config.plausible_rank or plausible_rank(target_ranks, config.plausible_share)
    dropped["implausible"] = int((ranks > max_rank).sum())
    kept = ranks <= max_rank
    return Interactions(interactions.users[kept], interactions.items[kept]), max_rank


def count(
    data: SequenceDataset,
    interactions: Interactions,
    dropped: Counter[str],
    num_generated: int,
    max_rank: int | None,
) -> dict[str, Any]:
    """What was generated, dropped and kept, for ``augmentation.json``."""
    invalid = dropped["malformed"] + dropped["unknown"]
    return {
        "num_users": data.num_users,
        "training_interactions": int(data.training_counts().sum()),
        "written": num_generated,
        "valid_share": 1 - invalid / max(1, num_generated),
        "dropped": {reason: dropped[reason] for reason in REASONS},
        "plausible_rank": max_rank,
        "kept": len(interactions.items),
        "users_with_items": len(set(interactions.users.tolist())),
    }


@in_main_process
def write(
    data: SequenceDataset, interactions: Interactions, counts: dict[str, Any], run_dir: Path
) -> None:
    """Write the generated interactions, what became of them, and exports for other programs."""
    save_augmented(run_dir / AUGMENTED_FILE, interactions, data.fingerprint)
    write_json(run_dir / COUNTS, counts)
    export_merged(data, interactions, run_dir)
