"""What a run would take: settings, data, steps, time and memory, estimated from a few steps.

The steps run in a temporary folder, so that nothing is written except downloads and caches.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from augmentation.merge import Interactions
from config import CommonConfig, RankerConfig, RetrieverConfig
from dataloader.candidates import Candidates
from dataloader.prompt import PromptBuilder
from dataloader.prompt_batches import TrainingPrompts
from dataloader.title_prompt import TitlePrompts
from datasets import SequenceDataset
from model.hub import BaseModel
from recipes import fit_ranker, fit_retriever
from recipes.language_model import LanguageModel
from recipes.out_of_fold import users_of
from storage import read_json
from trainer.loop import LoopSettings, Trainer
from trainer.run_folder import CONFIG, RunFolder

STEPS = 5  # the first one warms up
SECONDS = 60.0  # after which no further step is taken
USERS = 256  # users ranked to time the retriever's evaluation
RANKED_USERS = 32
PROMPTS = 1000
# Entries of config.json that are not shown: origin of the run, and what holds only for the trial.
HIDDEN = ("command", "commit", "fingerprint", "results_format", "retriever", "torch", "total_steps")
ConfigT = TypeVar("ConfigT", bound=CommonConfig)


class Evaluation(NamedTuple):
    """How long evaluation takes.

    Attributes:
        seconds_per_user: time to rank one user's candidates, or the catalogue.
        val_users: number of users in a validation.
        last_users: number of users ranked after training, over all splits.
    """

    seconds_per_user: float
    val_users: int
    last_users: int


def dry_run_retriever(
    config: RetrieverConfig,
    data: SequenceDataset,
    augmented: Interactions | None,
    encoder: BaseModel | None,
) -> None:
    """Print what a run of the retriever would take; see ``fit_retriever.train``."""
    with trial(config) as (trial_config, run):
        trainer, evaluator = fit_retriever.set_up(trial_config, data, run, augmented, encoder)
    step_seconds = time_steps(trainer)
    some = users_of(data, np.arange(data.num_users) < USERS)
    probe = fit_retriever.Evaluator(trial_config, some, evaluator.model)
    seconds = timed(probe.validate) / some.num_users
    evaluation = Evaluation(seconds, data.num_users, 3 * data.num_users)
    show(config, trainer, fit_retriever.retriever_loop(config), step_seconds, evaluation)


def dry_run_ranker(
    config: RankerConfig,
    data: SequenceDataset,
    candidates: dict[str, Candidates],
    language_model: LanguageModel,
    prompts: PromptBuilder | TitlePrompts,
    details: Mapping[str, Any],
) -> None:
    """Print what a run of the ranker would take; see ``fit_ranker.train``."""
    with trial(config) as (trial_config, run):
        trainer, evaluator = fit_ranker.set_up(
            trial_config, data, run, candidates, language_model, prompts, details
        )
    lengths = prompt_lengths(trainer.loader.dataset, trainer.sampler.first_examples(PROMPTS))
    print(f"tokens a prompt: median {np.median(lengths):,.0f}, at most {lengths.max():,}")
    step_seconds = time_steps(trainer)
    users = evaluator.val_users[:RANKED_USERS]
    evaluator.score("val", users[:1], "validate")  # loads what all users share
    seconds = timed(lambda: evaluator.score("val", users, "validate")) / len(users)
    last = sum(len(split.retrieved) for split in candidates.values())
    evaluation = Evaluation(seconds, len(evaluator.val_users), last)
    settings = fit_ranker.ranker_loop(config, language_model)
    if config.uses_folds:
        print(
            f"before: {config.folds} retrievers, each taking about as long as the given one, "
            "unless an earlier ranker has trained them"
        )
    show(config, trainer, settings, step_seconds, evaluation)


@contextmanager
def trial(config: ConfigT) -> Iterator[tuple[ConfigT, RunFolder]]:
    """Yield settings and a temporary folder for the first steps of a run, then print settings."""
    steps = min(STEPS, config.max_steps or STEPS)
    with tempfile.TemporaryDirectory() as folder:
        trial_config = replace(
            config,
            export_root=folder,
            max_steps=steps,
            resume=False,
            overwrite=False,
            use_wandb=False,
            use_tensorboard=False,
        )
        run = RunFolder(Path(folder), (), "dry run")
        yield trial_config, run
        show_settings(config, trial_config, read_json(run.path / CONFIG))


def time_steps(trainer: Trainer) -> list[float]:
    """Seconds of the first steps; the very first is left out unless it is the only one."""
    seconds: list[float] = []
    for step in trainer.step_seconds(min(STEPS, len(trainer.loader))):
        seconds.append(step)
        if sum(seconds) > SECONDS:
            break
    return seconds[1:] or seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds that a piece of work takes."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


def prompt_lengths(examples: Any, numbers: np.ndarray) -> np.ndarray:
    """(n,) lengths in tokens of the training prompts or documents with these numbers."""
    if isinstance(examples, TrainingPrompts):
        prompts = (examples.example(number)[:2] for number in numbers)
        return np.array([len(examples.prompts.encode(*prompt)) for prompt in prompts])
    return np.array([len(examples.document(number)[0]) for number in numbers])


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: reserved on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show_settings(config: ConfigT, trial_config: ConfigT, record: Mapping[str, Any]) -> None:
    """Print what ``config.json`` would contain, given the trial's ``record``."""
    own, of_trial = asdict(config), asdict(trial_config)
    shown = {name: value for name, value in record.items() if name not in HIDDEN}
    width = max(map(len, shown))
    for name, value in shown.items():
        same = name not in own or own[name] == of_trial[name]
        text = str(value if same else own[name]).replace("\n", "\\n")
        print(f"  {name:<{width}} {text}")


def show(
    config: CommonConfig,
    trainer: Trainer,
    settings: LoopSettings,
    step_seconds: list[float],
    evaluation: Evaluation,
) -> None:
    """Print the number of steps and the estimates of time and memory."""
    epoch = len(trainer.loader)
    total = settings.total_steps(epoch)
    validations = -(-total // (settings.val_steps or epoch))
    step = statistics.median(step_seconds)
    validation = evaluation.val_users * evaluation.seconds_per_user
    parts = {
        "training": total * step,
        f"{validations:,} validations": validations * validation,
        "evaluation": evaluation.last_users * evaluation.seconds_per_user,
    }
    shown = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    early = "; early stopping may end it sooner" if settings.patience is not None else ""
    print(
        f"steps: {total:,} of {config.train_batch_size} examples, {epoch:,} an epoch\n"
        f"a step takes {step:.3g} s (median of {len(step_seconds)}), a validation "
        f"{duration(validation)}\n"
        f"time: about {duration(sum(parts.values()))} ({shown}){early}\n"
        f"memory: {peak_memory(trainer.accelerator.device) / 2**30:.1f} GiB at most so far on "
        f"{trainer.accelerator.device}\n"
        "Nothing was written but downloads and caches."
    )


def duration(seconds: float) -> str:
    """Format a time in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
