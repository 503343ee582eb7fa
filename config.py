"""Every setting of all scripts: defaults, presets, command-line flags and their checks.

Each flag is declared once, as a field of a frozen dataclass. A value is taken from the first of
the command line, the data set's preset and the field's default that has one, so what the user
passes always wins. Standard library only, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

DATASET_CODES = ("ml-100k", "beauty", "games", "ml-100k-classic", "custom")
DATASET_KEYS = {"1": "ml-100k", "b": "beauty", "g": "games"}
MODEL_CODES = ("lru", "sas", "bert", "narm")
NO_EFFECT = {  # flags that a model does not read
    "lru": ("num_heads", "mask_prob"),
    "sas": ("mask_prob",),
    "narm": ("num_heads", "mask_prob"),
}
METRICS = ("Recall", "MRR", "NDCG")
LARGEST = 2**31 - 1  # of whole numbers
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 1024}  # the default of the flag


class UserError(Exception):
    """A mistake the user can mend. Entry scripts print it as one line and exit with status 2.

    What a file or flag holds may be in the message: its line breaks and control characters are
    shown escaped.
    """

    def __init__(self, message: str) -> None:
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__("".join(shown))


# Flag types -----------------------------------------------------------------------------------


def boolean(text: str) -> bool:
    """Read ``true`` or ``false``: ``bool("false")`` is True, which argparse would take as is."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def _number(kind: type, lowest: float, highest: float, open_end: bool = False) -> Callable:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"'{text}' is not {noun}") from None
        if math.isnan(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not a number")
        if value < lowest:
            limit = f"at least {lowest}"
        elif value > highest or (open_end and value == highest):
            limit = f"{'below' if open_end else 'at most'} {highest}"
        else:
            return value
        raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {limit}")

    return read


positive = _number(int, 1, LARGEST)
count = _number(int, 0, LARGEST)
real = _number(float, 0.0, math.inf, open_end=True)
rating = _number(float, -math.inf, math.inf)
probability = _number(float, 0.0, 1.0, open_end=True)
share = _number(float, 0.0, 1.0)


def flag(default: Any, help: str, type: Callable = str, **options: Any) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        default: value without a preset and without the flag.
        help: one line for ``--help``.
        type: reads one word of the command line.
        options: ``alias`` (the reference's name for the flag), ``many`` (a list of words),
            ``choices``.
    """
    return field(default=default, metadata={"help": help, "type": type, **options})


# Settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CommonConfig:
    """Settings that mean the same in all scripts."""

    dataset_code: str | None = flag(None, "data set; asked for when absent", choices=DATASET_CODES)
    data_root: str = flag("data", "folder of the raw files, downloaded where missing")
    cache_root: str = flag("data/cache", "folder of preprocessed data and converted models")
    interactions: str | None = flag(None, "custom data: CSV, TSV, Parquet or .inter file")
    items: str | None = flag(None, "custom data: item titles, CSV, TSV, Parquet or .item file")
    min_rating: float = flag(0.0, "keep interactions rated at least this", rating)
    min_uc: int = flag(5, "keep users with at least this many interactions", positive)
    min_sc: int = flag(5, "keep items with at least this many interactions", positive)

    seed: int = flag(42, "seed of every random choice", count)
    device: str | None = flag(None, "cpu or cuda; cuda where there is one", choices=("cpu", "cuda"))
    experiment_root: str = flag("experiments", "folder of all runs")
    export_root: str | None = flag(None, "folder of this run, instead of one under the root")
    resume: bool = flag(False, "go on from where an interrupted run stopped", boolean)
    overwrite: bool = flag(False, "replace what an earlier run left in the folder", boolean)
    save_seconds: float = flag(
        300.0, "at most this long between two states a run can be resumed from", real
    )
    use_wandb: bool = flag(False, "log to Weights & Biases as well", boolean)
    num_workers: int = flag(0, "processes that prepare batches beside the training", count)

    train_batch_size: int = flag(64, "examples in an optimizer step", positive)
    val_batch_size: int = flag(64, "users scored at once in validation", positive)
    test_batch_size: int = flag(64, "users scored at once in the test", positive)
    max_steps: int | None = flag(None, "stop after this many optimizer steps", positive)
    optimizer: str = flag("AdamW", "optimizer", choices=("AdamW", "Adam"))
    weight_decay: float = flag(0.01, "weight decay, not on biases and norms", real)
    adam_epsilon: float = flag(1e-9, "epsilon of the optimizer", real)
    max_grad_norm: float = flag(5.0, "gradients are clipped to this norm, 0 for never", real)
    enable_lr_schedule: bool = flag(False, "let the learning rate decay to 0", boolean)
    lr_decay: str = flag(
        "linear", "form of that decay, over all steps there may be", choices=("linear", "cosine")
    )
    enable_lr_warmup: bool = flag(False, "warm the learning rate up first", boolean)
    warmup_steps: int = flag(100, "length of the warm-up in optimizer steps", count)
    ema_decay: float = flag(
        0.0, "keep a moving average of the weights with this decay, 0 for none", probability
    )
    val_strategy: str = flag(
        "iteration", "validate by steps or by epochs", choices=("iteration", "epoch")
    )
    early_stopping: bool = flag(True, "stop when validation no longer improves", boolean)

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UserError("--resume true goes on with what --overwrite true replaces: choose one")
        if self.min_uc < 3:
            raise UserError(
                f"--min_uc {self.min_uc}: a user needs 3 interactions, "
                "one each for training, validation and test"
            )
        files = (self.interactions, self.items)
        if not all(files) if self.dataset_code == "custom" else any(files):
            raise UserError(
                "--dataset_code custom needs both --interactions and --items, and they need it"
            )

    def as_dict(self) -> dict[str, Any]:
        """All settings as plain values, for ``config.json``."""
        return asdict(self)


@dataclass(frozen=True)
class RetrieverConfig(CommonConfig):
    """Settings of ``train_retriever.py``; the defaults are the paper's (section 4.0.4)."""

    model_code: str = flag(
        "lru", "retriever model: LRURec, SASRec, BERT4Rec or NARM", choices=MODEL_CODES
    )
    preset: str = flag(
        "paper", "recipe: the paper's, or one that is better and faster", choices=("paper", "tuned")
    )
    num_epochs: int = flag(500, "at most this many passes over the training data", positive)
    lr: float = flag(0.001, "learning rate", real)
    val_iterations: int = flag(500, "optimizer steps between validations", positive)
    early_stopping_patience: int = flag(20, "validations without a gain before stopping", positive)
    metric_ks: tuple[int, ...] = flag((1, 5, 10, 20, 50), "cut-offs", positive, many=True)
    best_metric: str = flag("Recall@10", "validation metric that selects the model")
    mask_history: str = flag(
        "test",
        "where a user's own items cannot be recommended: in the test and the candidates, "
        "in validation too, or nowhere",
        choices=("test", "always", "never"),
    )
    title_encoder: str = flag(
        "none",
        "begin item embeddings at their titles' encodings by this model: minilm-l6, a hub name or "
        "a folder; none for random ones",
    )
    label_smoothing: float = flag(0.0, "share of the target spread over all items", probability)
    negatives: int | None = flag(
        None, "score this many sampled items in training; the whole catalogue if absent", positive
    )
    loss_precision: str = flag(
        "float32",
        "of the matrix products with the catalogue in training; bfloat16 is faster on CPUs and "
        "GPUs that multiply it",
        choices=("float32", "bfloat16"),
    )
    search: bool = flag(
        False, "train every point of the grid below and keep the best in validation", boolean
    )
    search_weight_decay: tuple[float, ...] = flag(
        (0.0, 0.01), "weight decays of the search", real, many=True
    )
    search_dropout: tuple[float, ...] = flag(
        (0.1, 0.2, 0.3, 0.4, 0.5), "dropouts of the search", probability, many=True
    )
    search_jobs: int | None = flag(
        None, "runs of the search at once; one a GPU, or a core without CUDA", positive
    )
    num_candidates: int = flag(20, "candidates kept for every user", _number(int, 2, LARGEST))
    sliding_window_size: float = flag(
        1.0, "stride of the training windows as a share of --max_len", real
    )
    max_len: int = flag(50, "longest sequence the model reads", positive, alias="bert_max_len")
    hidden_units: int = flag(64, "embedding size", positive, alias="bert_hidden_units")
    num_blocks: int = flag(2, "number of blocks", positive, alias="bert_num_blocks")
    num_heads: int = flag(2, "attention heads", positive, alias="bert_num_heads")
    dropout: float = flag(0.5, "dropout", probability, alias="bert_dropout")
    attn_dropout: float = flag(
        0.5, "dropout in attention or recurrence", probability, alias="bert_attn_dropout"
    )
    mask_prob: float = flag(0.25, "share of masked items", probability, alias="bert_mask_prob")
    augmented: str | None = flag(
        None, "run folder of augment_data.py whose interactions are trained on besides"
    )
    augmented_place: str = flag(
        "before",
        "where they stand in a user's training sequence: before the real ones or after them",
        choices=("before", "after"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_metric("best_metric", self.best_metric, "metric_ks", self.metric_ks)
        if self.model_code in ("sas", "bert") and self.hidden_units % self.num_heads:
            raise UserError(f"--num_heads {self.num_heads} does not divide --hidden_units")
        if int(self.sliding_window_size * self.max_len) < 1:
            raise UserError(
                f"--sliding_window_size {self.sliding_window_size}: "
                f"less than one item at --max_len {self.max_len}"
            )

    @property
    def run_dir(self) -> Path:
        """Where this run writes, ``experiments/<model>/<data set>`` unless told otherwise."""
        default = Path(self.experiment_root, self.model_code, str(self.dataset_code))
        return Path(self.export_root) if self.export_root else default


@dataclass(frozen=True)
class LanguageModelConfig(CommonConfig):
    """Settings of the language model and its tuning, which ranker and augmentation share."""

    llm_base_model: str | None = flag(
        None,
        "causal LM, owner/name@revision or folder; Llama-2-7b on CUDA, else smollm2-135m",
    )
    llm_base_tokenizer: str | None = flag(None, "tokenizer by name or folder; the model's own")
    llm_cache_dir: str | None = flag(None, "folder of models from the hub; the hub's own default")
    llm_load_in_4bit: bool | None = flag(
        None, "quantise the frozen weights to NF4; true on CUDA, else false", boolean
    )
    gradient_checkpointing: str = flag(
        "auto",
        "recompute activations to save memory; auto: if they would not fit",
        choices=("auto", "true", "false"),
    )
    use_liger_kernel: bool = flag(
        False, "fused kernels of the package liger-kernel, where it is installed; CUDA", boolean
    )
    tokens_per_batch: int | None = flag(
        None,
        f"most tokens in memory at once in training; {TOKENS_PER_BATCH['cuda']} on CUDA, "
        f"{TOKENS_PER_BATCH['cpu']} on the CPU",
        positive,
    )
    llm_max_text_len: int = flag(1536, "longest prompt in tokens, oldest history goes", positive)
    lora_r: int = flag(8, "rank of the adapters", positive)
    lora_alpha: int = flag(32, "scale of the adapters", positive)
    lora_dropout: float = flag(0.05, "dropout of the adapters", probability)
    lora_target_modules: tuple[str, ...] = flag(
        ("q_proj", "v_proj"), "modules with adapters", many=True
    )
    lora_val_iterations: int = flag(100, "optimizer steps between validations", positive)
    lora_early_stopping_patience: int = flag(20, "validations without a gain", positive)
    lora_micro_batch_size: int | None = flag(
        None, "most prompts in memory at once in training, besides --tokens_per_batch", positive
    )

    # Where the references leave these to the Hugging Face Trainer, its defaults hold.
    weight_decay: float = flag(0.0, "weight decay of the adapters", real)
    adam_epsilon: float = flag(1e-8, "epsilon of the optimizer", real)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm, 0 for never", real)
    enable_lr_schedule: bool = flag(True, "let the learning rate decay to 0", boolean)
    enable_lr_warmup: bool = flag(True, "warm the learning rate up first", boolean)


@dataclass(frozen=True)
class RankerConfig(LanguageModelConfig):
    """Settings of ``train_ranker.py``; the defaults are the paper's (section 4.0.4)."""

    llm_retrieved_path: str | None = flag(
        None, "run folder of the retriever; experiments/lru/<data set> under the root"
    )
    llm_max_title_len: int = flag(32, "longest title in tokens", positive)
    llm_max_history: int = flag(20, "most recent items in the prompt", positive)
    llm_train_on_inputs: bool = flag(False, "train on the whole prompt, not the answer", boolean)
    llm_negative_sample_size: int = flag(19, "sampled negatives in a training prompt", positive)
    llm_system_template: str = flag(
        "Given user history in chronological order, recommend an item from the candidate pool "
        "with its index letter.",
        "instruction of the prompt",
    )
    llm_input_template: str = flag(
        "User history: {}; \n Candidate pool: {}", "input of the prompt: history, candidates"
    )
    lora_num_epochs: int = flag(1, "passes over the training prompts", positive)
    lora_lr: float = flag(1e-4, "learning rate", real)
    train_candidates: str = flag(
        "random",
        "negatives of the training prompts: random, the retriever's own candidates, or half each",
        choices=("random", "retrieved", "mixed"),
    )
    response_loss: str = flag(
        "vocabulary",
        "softmax of the loss: over the vocabulary, for the letter and the end of the sequence, or "
        "over the letters alone",
        choices=("vocabulary", "letters"),
    )
    permutations: int = flag(
        1, "orders of the candidates a user's scores are averaged over", positive
    )
    rerank_metric_ks: tuple[int, ...] = flag((1, 5, 10), "cut-offs", positive, many=True)
    rerank_best_metric: str = flag("NDCG@10", "validation metric that selects the adapter")
    train_batch_size: int = flag(16, "prompts in an optimizer step", positive)
    val_batch_size: int = flag(16, "prompts scored at once in validation", positive)
    test_batch_size: int = flag(16, "prompts scored at once in the test", positive)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_metric(
            "rerank_best_metric", self.rerank_best_metric, "rerank_metric_ks", self.rerank_metric_ks
        )
        if self.response_loss == "letters" and self.llm_train_on_inputs:
            raise UserError("--response_loss letters leaves no loss for --llm_train_on_inputs true")
        if self.llm_input_template.count("{}") != 2:
            raise UserError(
                "--llm_input_template needs {} twice, for the history and the candidates"
            )

    @property
    def retrieved_dir(self) -> Path:
        """The retriever's run folder."""
        default = Path(self.experiment_root, "lru", str(self.dataset_code))
        return Path(self.llm_retrieved_path) if self.llm_retrieved_path else default

    def run_dir(self, model_name: str) -> Path:
        """Where this run writes, ``experiments/<base model>/<data set>`` unless told otherwise."""
        default = Path(self.experiment_root, model_name, str(self.dataset_code))
        return Path(self.export_root) if self.export_root else default


@dataclass(frozen=True)
class AugmentationConfig(LanguageModelConfig):
    """Settings of ``augment_data.py``; the defaults are LLM4IDRec's."""

    local_examples: int = flag(
        20, "training examples an epoch from random items of a user, beside one from all", count
    )
    local_items: int = flag(10, "items of such an example, answer included", positive)
    lora_lr: float = flag(1e-3, "learning rate", real)
    train_batch_size: int = flag(32, "examples in an optimizer step", positive)
    max_steps: int = flag(400, "optimizer steps", positive)
    warmup_steps: int = flag(20, "length of the warm-up in optimizer steps", count)
    constrained: bool = flag(
        False, "let the model write nothing but items of the catalogue", boolean
    )
    temperature: float = flag(0.8, "temperature of the sampling", real)
    top_p: float = flag(0.9, "sample among the likeliest tokens of this probability", share)
    max_new_tokens: int = flag(200, "most tokens written for a user", positive)
    val_batch_size: int = flag(16, "examples scored at once in validation", positive)
    test_batch_size: int = flag(16, "users written for at once", positive)
    retriever_path: str | None = flag(
        None, "run folder of a retriever that judges what was written; nothing judges it if absent"
    )
    plausible_rank: int | None = flag(
        None,
        "keep items that the retriever ranks this high for their user; chosen by "
        "--plausible_share if absent",
        positive,
    )
    plausible_share: float = flag(
        0.5, "share of the validation answers that the rank chosen lets through", share
    )
    reuse: str | None = flag(
        None, "run folder to take the tuned model and the texts from, as far as the flags agree"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_items < 2:
            raise UserError(
                f"--local_items {self.local_items}: 2 at least, a history and an answer"
            )
        if not self.temperature or not self.top_p:
            raise UserError("--temperature and --top_p must be above 0: nothing could be sampled")
        if self.max_new_tokens >= self.llm_max_text_len:
            raise UserError(
                f"--max_new_tokens {self.max_new_tokens} leaves no room for a prompt in "
                f"--llm_max_text_len {self.llm_max_text_len}"
            )
        if self.plausible_rank and not self.retriever_path:
            raise UserError("--plausible_rank needs --retriever_path, whose ranks they are")

    @property
    def run_dir(self) -> Path:
        """Where this run writes, ``experiments/llm4idrec/<data set>`` unless told otherwise."""
        default = Path(self.experiment_root, "llm4idrec", str(self.dataset_code))
        return Path(self.export_root) if self.export_root else default


def split_metric(flag_name: str, metric: str) -> tuple[str, int]:
    """Name and cut-off of a metric that a flag asks for: ``NDCG`` and 10 of ``NDCG@10``.

    Raises:
        UserError: it is no metric.
    """
    name, _, k = metric.partition("@")
    if name not in METRICS or not re.fullmatch("[1-9][0-9]*", k):
        raise UserError(
            f"--{flag_name} {metric}: use {', '.join(METRICS)} and a cut-off, Recall@10"
        )
    return name, int(k)


def _check_metric(flag_name: str, metric: str, ks_flag: str, ks: tuple[int, ...]) -> None:
    _, k = split_metric(flag_name, metric)
    if k not in ks:
        raise UserError(f"--{flag_name} {metric}: {k} is not among --{ks_flag}")


# Presets: what differs from the fields' defaults -----------------------------------------------


def _dropouts(share: float) -> dict[str, float]:
    return {"dropout": share, "attn_dropout": share}


# Section 4.0.4. Where it gives a grid (dropout, weight decay), a point of it.
_LONG_HISTORIES = {"max_len": 200, "train_batch_size": 16}
_PAPER_BY_DATASET = {"ml-100k": _LONG_HISTORIES, "ml-100k-classic": _LONG_HISTORIES}
_PAPER_BY_MODEL = {
    "bert": _dropouts(0.2),
    "narm": {"num_blocks": 1},  # as in its own paper
}
# Found on validation, see RESULTS.md. A moving average and a decaying rate need far fewer steps;
# validation leaves the history out, as the test does.
_TUNED = {
    "max_steps": 3000,
    "hidden_units": 128,
    "ema_decay": 0.999,
    "enable_lr_schedule": True,
    "lr_decay": "cosine",
    "enable_lr_warmup": True,
    "warmup_steps": 200,
    "label_smoothing": 0.3,
    "title_encoder": "minilm-l6",
    "mask_history": "always",
    "best_metric": "NDCG@10",
}
_TUNED_BY_DATASET = {"beauty": {"max_steps": 5000}}
_TUNED_BY_MODEL = {
    "bert": {"max_steps": 6000} | _dropouts(0.1),  # a step learns from the masked items alone
    "narm": _dropouts(0.1),
    "sas": _dropouts(0.3),
}
_TUNED_BY_BOTH = {
    ("ml-100k", "lru"): {"title_encoder": "none"} | _dropouts(0.6),
    ("ml-100k", "narm"): _dropouts(0.4),
}


def retriever_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a recipe.

    Args:
        given: ``dataset_code`` and, where they are not the defaults, ``preset`` and ``model_code``.
    """
    dataset, model = given["dataset_code"], given.get("model_code", "lru")
    settings = _PAPER_BY_DATASET.get(dataset, {}) | _PAPER_BY_MODEL.get(model, {})
    if given.get("preset") == "tuned":
        settings |= _TUNED | _TUNED_BY_DATASET.get(dataset, {}) | _TUNED_BY_MODEL.get(model, {})
        settings |= _TUNED_BY_BOTH.get((dataset, model), {})
    return settings


ConfigT = TypeVar("ConfigT", bound=CommonConfig)


# Command line ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> Any:
        raise UserError(message.removeprefix("argument "))


def _add(parser: Any, name: str, spec: Field) -> None:
    meta = spec.metadata
    names = [f"--{name}"] + ([f"--{meta['alias']}"] if "alias" in meta else [])
    default = spec.default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = meta["help"] + ("" if default is None else f" (default: {shown!s})")
    options: dict[str, Any] = {"nargs": "+"} if meta.get("many") else {}
    if "choices" in meta:
        options["choices"] = meta["choices"]
    elif meta["type"] is boolean:
        options["metavar"] = "true|false"
    else:
        options["metavar"] = name.rsplit("_", 1)[-1].upper()
    parser.add_argument(
        *names,
        dest=name,
        type=meta["type"],
        default=argparse.SUPPRESS,
        help=text.replace("%", "%%").replace("\n", "\\n"),
        **options,
    )


def _flags(config: type) -> dict[str, Field]:
    return {spec.name: spec for spec in fields(config)}


def parse(
    config: type[ConfigT],
    argv: Sequence[str] | None,
    description: str,
    *,
    preset: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: {},
    inherit: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: {},
) -> ConfigT:
    """Read the command line into a config.

    Flags of the other scripts are understood, so that one list of flags serves them all, and said
    to have no effect.

    Args:
        config: the dataclass to fill.
        argv: the words of the command line, ``sys.argv`` if None.
        description: the first lines of ``--help``.
        preset: from the flags given, data set included, settings between defaults and flags.
        inherit: from the flags given, further settings between these and the flags.

    Raises:
        UserError: a flag that is unknown, malformed or out of range.
    """
    parser = _Parser(
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    common = _flags(CommonConfig)
    general, own = parser.add_argument_group("general"), parser.add_argument_group("this stage")
    for name, spec in _flags(config).items():
        _add(general if name in common else own, name, spec)
    others = [c for c in (RetrieverConfig, RankerConfig, AugmentationConfig) if c is not config]
    foreign = {n: s for c in others for n, s in _flags(c).items() if n not in _flags(config)}
    for name, spec in foreign.items():
        _add(parser, name, spec)
    for action in parser._actions:
        if action.dest in foreign:
            action.help = argparse.SUPPRESS

    given = vars(parser.parse_args(argv))
    idle = {*foreign, *NO_EFFECT.get(given.get("model_code", "lru"), ())}
    unused = [f"--{name}" for name in given if name in idle]
    given = {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k not in foreign
    }
    given = inherit(given) | given
    if given.get("dataset_code") is None:
        given["dataset_code"] = _ask_dataset()
    settings = config(**{**preset(given), **given})
    if unused:
        print(f"note: no effect on this run: {' '.join(unused)}", file=sys.stderr)
    return settings


def reread(config: type[CommonConfig], settings: dict[str, Any]) -> dict[str, Any]:
    """Check settings from a file as if they were given as flags.

    Raises:
        ValueError: a value is none that its flag takes.
    """
    checked = {}
    for name, value in settings.items():
        spec = _flags(config)[name]
        try:
            checked[name] = None if value is None else spec.metadata["type"](str(value))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name}: {error}") from error
        if (value is None and spec.default is not None) or (
            checked[name] not in spec.metadata.get("choices", [checked[name]])
        ):
            raise ValueError(f"{name} is {value}")
    return checked


def _ask_dataset() -> str:
    codes = ", ".join(DATASET_CODES)
    if not sys.stdin.isatty():
        raise UserError(f"--dataset_code is missing: choose one of {codes}")
    try:
        choice = input("Data set: 1 for ml-100k, b for beauty, g for games: ").strip()
    except EOFError:
        raise UserError(f"no data set was chosen: pass --dataset_code, one of {codes}") from None
    code = DATASET_KEYS.get(choice, choice)
    if code not in DATASET_CODES:
        raise UserError(f"'{choice}' is no data set: type 1, b or g, or one of {codes}")
    return code


def cuda_driver() -> bool:
    """Whether there is a CUDA driver, without the seconds that importing torch takes."""
    if sys.platform != "linux":
        return True  # torch will tell
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def check_device(device: str | None) -> None:
    """Answer at once, before torch is imported, where a run cannot be what is asked for.

    Raises:
        UserError: CUDA without a driver, or several processes for one run.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":  # set by accelerate launch and torchrun
        raise UserError("a run is one process on one device: start it with python")
    if device == "cuda" and not cuda_driver():
        raise UserError("--device cuda: this machine has no CUDA driver; use --device cpu")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def _terminate(*_: object) -> None:
    raise Terminated


def _user_message(error: Exception) -> str | None:
    """What to tell the user of an error; None if it is the program's own."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    torch_says = ("allocate memory", "out of memory")  # on the CPU, on CUDA
    if isinstance(error, MemoryError) or any(words in str(error) for words in torch_says):
        return "the memory is full: lower the sizes of the model, the batches or --num_workers"
    return None


def run_main(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run an entry script.

    A user's mistake becomes one line on stderr and exit status 2, Ctrl-C and SIGTERM one line and
    130 or 143.
    """
    # Jagged batches hardly ever have the same size again, for which oneDNN would keep up to 1,024
    # kernels: gigabytes in a long run.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main(None)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = _user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        sys.unraisablehook = lambda _: None  # of a progress bar that was half made when it came
        print("interrupted: the same command with --resume true goes on", file=sys.stderr)
        sys.exit(143 if isinstance(error, Terminated) else 130)
