"""Settings of all scripts: every flag with its default, and the presets.

Each flag is declared once, as a field of a frozen dataclass (see ``flags.py``). Its value comes
from the command line, else from the preset, else from the field's default. Nothing here imports
torch, so that ``--help`` and error messages appear at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from errors import UserError
from flags import (
    any_number,
    at_least_two,
    boolean,
    boolean_or_auto,
    count,
    fraction,
    handling_flag,
    immaterial_flags,
    nonnegative,
    number,
    path,
    positive,
    probability,
    result_flag,
    rounding_flag,
    up_to,
)
from metrics import split_metric

DATASET_CODES = ("ml-100k", "beauty", "games", "ml-100k-classic", "custom")
DATASET_KEYS = {"1": "ml-100k", "b": "beauty", "g": "games"}  # at the prompt
MODEL_CODES = ("lru", "sas", "bert", "narm")
UNUSED_FLAGS = {  # by the value of another flag
    ("optimizer", "AdamW"): ("momentum",),
    ("optimizer", "Adam"): ("momentum",),
    ("enable_lr_schedule", False): ("decay_step", "gamma"),
    ("enable_lr_warmup", True): ("decay_step", "gamma"),
    ("model_code", "lru"): ("num_heads", "mask_prob"),
    ("model_code", "sas"): ("mask_prob",),
    ("model_code", "narm"): ("num_heads", "mask_prob"),
    ("verbalizer", "letters"): ("title_prior", "folds"),
    ("title_prior", "popularity"): ("folds",),
    ("title_prior", "none"): ("folds",),
    ("verbalizer", "titles"): (
        "llm_train_on_inputs", "llm_negative_sample_size", "llm_system_template",
        "llm_input_template", "train_candidates", "response_loss", "permutations",
    ),
}  # fmt: skip
DATA_FLAGS = (  # what selects the data set; later stages take it over from a run
    "dataset_code", "data_root", "cache_root", "interactions", "items",
    "min_rating", "min_uc", "min_sc", "ties",
)  # fmt: skip
# Flags of the published code that have no effect here: retrievers are evaluated on the whole
# catalogue, and the width of an attention head follows from --hidden_units and --num_heads.
IGNORED_FLAGS = ("negative_sample_size", "bert_head_size")
# Left out of config.json and of the fingerprint unless given, so that runs from before these flags
# existed keep their fingerprints.
LATER_FLAGS = ("momentum", "decay_step", "gamma")
MAX_BATCH = 65_536
LOG_LIKELIHOOD = "log_likelihood"  # a value of --rerank_best_metric
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 1024}  # default of --tokens_per_batch


# Settings -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CommonConfig:
    """Settings that mean the same in all scripts."""

    dataset_code: str | None = result_flag(
        None, "data set; the script asks for it if absent", choices=DATASET_CODES
    )
    data_root: str = handling_flag("data", "folder of raw data; missing files are downloaded", path)
    cache_root: str = handling_flag(
        "data/cache", "folder of preprocessed data and converted models", path
    )
    interactions: str | None = handling_flag(
        None, "custom data: interactions as a CSV, TSV, Parquet or .inter file", path
    )
    items: str | None = handling_flag(
        None, "custom data: item titles as a CSV, TSV, Parquet or .item file", path
    )
    min_rating: float = result_flag(
        0.0, "discard interactions with a lower rating than this", any_number
    )
    min_uc: int = result_flag(5, "discard users with fewer interactions than this", positive)
    min_sc: int = result_flag(5, "discard items with fewer interactions than this", positive)
    ties: str = result_flag(
        "item",
        "order of a user's interactions with equal timestamps: by item number, or as in the file",
        choices=("item", "file"),
    )

    seed: int = result_flag(42, "seed of all random choices", count)
    device: str | None = result_flag(
        None, "cpu or cuda; cuda if available", choices=("cpu", "cuda")
    )
    experiment_root: str = handling_flag("experiments", "folder of all runs", path)
    export_root: str | None = handling_flag(
        None, "folder of this run, in place of the default one under --experiment_root", path
    )
    resume: bool = handling_flag(False, "continue an interrupted run", boolean)
    overwrite: bool = handling_flag(False, "replace an earlier run in the same folder", boolean)
    dry_run: bool = handling_flag(
        False, "print the settings, estimate time and memory from a few steps, then stop",
        boolean,
    )  # fmt: skip
    save_seconds: float = handling_flag(
        300.0, "longest time between two checkpoints, in seconds", nonnegative
    )
    use_wandb: bool = handling_flag(False, "also log to Weights & Biases", boolean)
    use_tensorboard: bool = handling_flag(
        False, "also log to TensorBoard, in the run's folder", boolean
    )
    num_workers: int = handling_flag(
        0, "worker processes that prepare batches", up_to(256, lowest=0)
    )

    train_batch_size: int = result_flag(64, "examples per optimizer step", up_to(MAX_BATCH))
    val_batch_size: int = rounding_flag(64, "users per batch in validation", up_to(MAX_BATCH))
    test_batch_size: int = rounding_flag(64, "users per batch in testing", up_to(MAX_BATCH))
    max_steps: int | None = result_flag(None, "stop after this many optimizer steps", positive)
    optimizer: str = result_flag("AdamW", "optimizer", choices=("AdamW", "Adam", "SGD"))
    momentum: float | None = result_flag(None, "momentum of SGD; 0 if absent", probability)
    weight_decay: float = result_flag(
        0.01, "weight decay; biases and norms are exempt", nonnegative
    )
    adam_epsilon: float = result_flag(1e-9, "epsilon of the optimizer", nonnegative)
    max_grad_norm: float = result_flag(
        5.0, "gradients are clipped to this norm; 0 disables clipping", nonnegative
    )
    enable_lr_schedule: bool = result_flag(False, "decay the learning rate to 0", boolean)
    lr_decay: str = result_flag(
        "linear", "shape of the decay over all steps", choices=("linear", "cosine")
    )
    decay_step: int | None = result_flag(
        None,
        "multiply the learning rate by --gamma every this many steps instead of following "
        "--lr_decay; only with --enable_lr_schedule and without --enable_lr_warmup",
        positive,
    )
    gamma: float | None = result_flag(None, "factor of --decay_step; 1 if absent", nonnegative)
    enable_lr_warmup: bool = result_flag(False, "warm up the learning rate", boolean)
    warmup_steps: int = result_flag(100, "length of the warm-up in optimizer steps", count)
    ema_decay: float = result_flag(
        0.0, "evaluate a moving average of the weights with this decay; 0 disables it", probability
    )
    val_strategy: str = result_flag(
        "iteration", "validate after a number of steps or every epoch",
        choices=("iteration", "epoch"),
    )  # fmt: skip
    early_stopping: bool = result_flag(True, "stop when validation no longer improves", boolean)

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UserError("--resume continues the run that --overwrite replaces: choose one")
        if self.use_tensorboard and find_spec("tensorboard") is None:
            raise UserError("--use_tensorboard needs a package: pip install tensorboard")
        if self.min_uc < 3:
            raise UserError(
                f"--min_uc {self.min_uc}: a user needs at least 3 interactions, "
                "one each for training, validation and test"
            )
        files = (self.interactions, self.items)
        if not all(files) if self.dataset_code == "custom" else any(files):
            raise UserError(
                "--dataset_code custom needs both --interactions and --items; "
                "no other data set takes them"
            )

    def as_dict(self) -> dict[str, Any]:
        """All settings as plain values, for ``config.json``."""
        settings = asdict(self)
        return {
            name: value
            for name, value in settings.items()
            if value is not None or name not in LATER_FLAGS
        }

    def _run_dir(self, name: str, data_code: str) -> Path:
        """``--export_root`` if given, else ``<experiment root>/<name>/<data set>``."""
        default = Path(self.experiment_root, name, data_code)
        return Path(self.export_root) if self.export_root else default


@dataclass(frozen=True)
class RetrieverConfig(CommonConfig):
    """Settings of ``train_retriever.py``; the defaults are the paper's (section 4.0.4)."""

    model_code: str = result_flag(
        "lru", "retriever: LRURec, SASRec, BERT4Rec or NARM", choices=MODEL_CODES
    )
    preset: str = result_flag(
        "paper", "the paper's recipe, or a better and faster one", choices=("paper", "tuned")
    )
    num_epochs: int = result_flag(500, "passes over the training data", positive)
    lr: float = result_flag(0.001, "learning rate", nonnegative)
    val_iterations: int = result_flag(500, "optimizer steps between validations", positive)
    early_stopping_patience: int = result_flag(
        20, "stop after this many validations without improvement", positive
    )
    metric_ks: tuple[int, ...] = result_flag(
        (1, 5, 10, 20, 50), "cut-offs of the metrics", positive, many=True
    )
    best_metric: str = result_flag("Recall@10", "validation metric that selects the checkpoint")
    mask_history: str = result_flag(
        "test",
        "exclude the items of a user's history from ranking: in testing and for the candidates, "
        "also in validation, or never",
        choices=("test", "always", "never"),
    )
    title_encoder: str = result_flag(
        "none",
        "initialize item embeddings with this model's encodings of the titles: minilm-l6, a name "
        "on the hub or a folder; none for random embeddings",
    )
    label_smoothing: float = result_flag(
        0.0, "share of the target probability that is spread over all items", probability
    )
    negatives: int | None = result_flag(
        None, "train on this many sampled items in place of the whole catalogue", positive
    )
    loss_precision: str = result_flag(
        "float32",
        "precision of the loss's matrix products; bfloat16 is faster on hardware that supports it",
        choices=("float32", "bfloat16"),
    )
    search: bool = handling_flag(
        False, "train every point of the grid and keep the one that validates best", boolean
    )
    search_weight_decay: tuple[float, ...] = handling_flag(
        (0.0, 0.01), "weight decays of the grid", nonnegative, many=True
    )
    search_dropout: tuple[float, ...] = handling_flag(
        (0.1, 0.2, 0.3, 0.4, 0.5), "dropouts of the grid", probability, many=True
    )
    search_jobs: int | None = handling_flag(
        None, "runs of the search in parallel; one per GPU, or per core without CUDA", up_to(1024)
    )
    num_candidates: int = result_flag(20, "candidates per user", at_least_two)
    sliding_window_size: float = result_flag(
        1.0, "stride of the training windows as a fraction of --max_len", number(float, 0.0, 1000.0)
    )
    max_len: int = result_flag(
        50, "most recent items that the model reads", up_to(65_536), alias="bert_max_len"
    )
    hidden_units: int = result_flag(64, "embedding size", up_to(16_384), alias="bert_hidden_units")
    num_blocks: int = result_flag(2, "number of blocks", up_to(256), alias="bert_num_blocks")
    num_heads: int = result_flag(2, "attention heads", up_to(1024), alias="bert_num_heads")
    dropout: float = result_flag(0.5, "dropout", probability, alias="bert_dropout")
    attn_dropout: float = result_flag(
        0.5, "dropout of attention or recurrence", probability, alias="bert_attn_dropout"
    )
    mask_prob: float = result_flag(
        0.25, "fraction of masked items", probability, alias="bert_mask_prob"
    )
    augmented: str | None = handling_flag(
        None, "also train on the interactions generated by this run of augment_data.py", path
    )
    augmented_place: str = result_flag(
        "before",
        "put generated interactions before or after the real ones of a user's training sequence",
        choices=("before", "after"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_metric("best_metric", self.best_metric, "metric_ks", self.metric_ks)
        if self.model_code in ("sas", "bert") and self.hidden_units % self.num_heads:
            raise UserError(
                f"--num_heads {self.num_heads} does not divide --hidden_units {self.hidden_units}"
            )
        if self.dry_run and self.search:
            raise UserError("--dry_run shows a single run: leave out --search")
        if int(self.sliding_window_size * self.max_len) < 1:
            raise UserError(
                f"--sliding_window_size {self.sliding_window_size}: "
                f"the stride is less than one item at --max_len {self.max_len}"
            )

    def run_dir(self, data_code: str) -> Path:
        """Folder of this run, ``experiments/<model>/<data set>`` by default."""
        return self._run_dir(self.model_code, data_code)

    @property
    def excludes_history(self) -> bool:
        """Whether candidates exclude the items of the user's history."""
        return self.mask_history != "never"


@dataclass(frozen=True)
class LanguageModelConfig(CommonConfig):
    """Settings of the language model, shared by ranker and augmentation."""

    llm_base_model: str | None = result_flag(
        None,
        "causal LM: owner/name@revision on the hub, or a folder; by default Llama-2-7b with CUDA, "
        "else smollm2-135m",
    )
    llm_base_tokenizer: str | None = result_flag(
        None, "tokenizer, by name or folder; the model's own if absent"
    )
    llm_cache_dir: str | None = handling_flag(None, "cache of the hub; its default if absent")
    llm_load_in_4bit: bool | None = result_flag(
        None, "quantize the frozen weights to NF4; true with CUDA, else false", boolean
    )
    llm_dequantize: bool = rounding_flag(
        False,
        "with NF4, train on its values in bfloat16, computed once: faster, but 13 GB for 7B",
        boolean,
    )
    gradient_checkpointing: str = rounding_flag(
        "auto",
        "recompute activations to save memory; auto: only if they would not fit",
        choices=("auto", "true", "false"),
    )
    use_liger_kernel: bool | None = result_flag(
        None,
        "fused kernels of the package liger-kernel; auto, the default: on CUDA, if it is installed "
        "and supports the model",
        boolean_or_auto,
    )
    tokens_per_batch: int | None = rounding_flag(
        None,
        "maximum number of tokens per micro-batch in training; by default "
        f"{TOKENS_PER_BATCH['cuda']} on CUDA, {TOKENS_PER_BATCH['cpu']} on the CPU",
        positive,
    )
    llm_max_text_len: int = result_flag(
        1536, "longest prompt in tokens; the oldest items are dropped first", positive
    )
    lora_r: int = result_flag(8, "rank of the adapters", up_to(4096))
    lora_alpha: int = result_flag(32, "scale of the adapters", positive)
    lora_dropout: float = result_flag(0.05, "dropout of the adapters", probability)
    lora_target_modules: tuple[str, ...] = result_flag(
        ("q_proj", "v_proj"), "modules with adapters", many=True
    )
    lora_val_iterations: int = result_flag(100, "optimizer steps between validations", positive)
    lora_early_stopping_patience: int = result_flag(
        20, "stop after this many validations without improvement", positive
    )
    lora_micro_batch_size: int | None = rounding_flag(
        None, "maximum number of prompts per micro-batch, besides --tokens_per_batch", positive
    )

    # The published code leaves these to the Hugging Face Trainer, so its defaults apply.
    weight_decay: float = result_flag(0.0, "weight decay of the adapters", nonnegative)
    adam_epsilon: float = result_flag(1e-8, "epsilon of the optimizer", nonnegative)
    max_grad_norm: float = result_flag(
        1.0, "gradients are clipped to this norm; 0 disables clipping", nonnegative
    )
    enable_lr_schedule: bool = result_flag(True, "decay the learning rate to 0", boolean)
    enable_lr_warmup: bool = result_flag(True, "warm up the learning rate", boolean)


@dataclass(frozen=True)
class RankerConfig(LanguageModelConfig):
    """Settings of ``train_ranker.py``; the defaults are the paper's (section 4.0.4)."""

    llm_retrieved_path: str | None = handling_flag(
        None, "run of the retriever; experiments/lru/<data set> by default", path
    )
    llm_shard_weights: bool = rounding_flag(
        False,
        "split the frozen weights among the processes of torchrun, for a model that does not fit "
        "on one GPU",
        boolean,
    )
    verbalizer: str = result_flag(
        "letters",
        "score candidates by the logits of their index letters, as in the paper, or by the "
        "likelihood of their titles",
        choices=("letters", "titles"),
    )
    title_prior: str = result_flag(
        "retriever",
        "probabilities of items that the language model learns to correct with titles: the "
        "retriever's, or popularity, their share of the training interactions; none: score titles "
        "by their likelihood as plain text",
        choices=("retriever", "popularity", "none"),
    )
    folds: int = result_flag(
        3,
        "number of retrievers, each trained without one part of the users, which give the "
        "probabilities of that part's training interactions",
        up_to(100),
    )
    llm_max_title_len: int = result_flag(32, "longest title in tokens", positive)
    llm_max_history: int = result_flag(20, "most recent items in the prompt", up_to(10_000))
    llm_train_on_inputs: bool = result_flag(
        False, "train on the whole prompt, not only on the response", boolean
    )
    llm_negative_sample_size: int = result_flag(19, "negatives in a training prompt", positive)
    llm_system_template: str = result_flag(
        "Given user history in chronological order, recommend an item from the candidate pool "
        "with its index letter.",
        "instruction of the prompt",
    )
    llm_input_template: str = result_flag(
        "User history: {}; \n Candidate pool: {}",
        "input of the prompt, {} for the history and for the candidates",
    )
    lora_num_epochs: int = result_flag(1, "passes over the training prompts", positive)
    lora_lr: float = result_flag(1e-4, "learning rate", nonnegative)
    train_candidates: str = result_flag(
        "random",
        "negatives of the training prompts: random, the retriever's candidates, or half of each",
        choices=("random", "retrieved", "mixed"),
    )
    response_loss: str = result_flag(
        "vocabulary",
        "softmax of the loss: over the vocabulary, or over the index letters",
        choices=("vocabulary", "letters"),
    )
    permutations: int = result_flag(
        1, "average the scores over this many orders of the candidates", up_to(1000)
    )
    rerank_metric_ks: tuple[int, ...] = result_flag(
        (1, 5, 10), "cut-offs of the metrics", positive, many=True
    )
    val_users: int | None = result_flag(
        None, "validate on this many random users; on all if absent", positive
    )
    rerank_best_metric: str = result_flag(
        "NDCG@10",
        "validation metric that selects the adapter; log_likelihood for the mean log-probability "
        "of the target",
    )
    train_batch_size: int = result_flag(16, "prompts per optimizer step", up_to(MAX_BATCH))
    val_batch_size: int = rounding_flag(16, "prompts per batch in validation", up_to(MAX_BATCH))
    test_batch_size: int = rounding_flag(16, "prompts per batch in testing", up_to(MAX_BATCH))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rerank_best_metric != LOG_LIKELIHOOD:
            _check_metric(
                "rerank_best_metric",
                self.rerank_best_metric,
                "rerank_metric_ks",
                self.rerank_metric_ks,
            )
        if self.folds < 2:
            raise UserError(f"--folds {self.folds}: at least 2 are needed")
        if self.response_loss == "letters" and self.llm_train_on_inputs:
            raise UserError(
                "--response_loss letters has no loss for the prompt: leave out "
                "--llm_train_on_inputs"
            )
        if self.llm_input_template.count("{}") != 2:
            raise UserError(
                "--llm_input_template needs {} twice, for the history and the candidates"
            )

    @property
    def is_guided(self) -> bool:
        """Whether titles are scored relative to probabilities of their items."""
        return self.verbalizer == "titles" and self.title_prior != "none"

    @property
    def uses_folds(self) -> bool:
        """Whether these probabilities come from retrievers that were trained on other users."""
        return self.verbalizer == "titles" and self.title_prior == "retriever"

    def with_retriever(self, data_code: str) -> RankerConfig:
        """These settings with the retriever's run, by default LRURec's on the data set."""
        default = str(Path(self.experiment_root, "lru", data_code))
        return replace(self, llm_retrieved_path=self.llm_retrieved_path or default)

    @property
    def retrieved_dir(self) -> Path:
        """Folder of the retriever's run; see ``with_retriever``."""
        return Path(str(self.llm_retrieved_path))

    def run_dir(self, model_name: str, data_code: str) -> Path:
        """Folder of this run, ``experiments/<base model>/<data set>`` by default."""
        return self._run_dir(model_name, data_code)


@dataclass(frozen=True)
class AugmentationConfig(LanguageModelConfig):
    """Settings of ``augment_data.py``, based on LLM4IDRec, whose own recipe is a preset.

    A flag with a ``stage`` affects that stage and the following ones; the others affect all.
    """

    preset: str = result_flag(
        "sequential",
        "sequential: items in chronological order, short examples, loss on the answers only; "
        "published: LLM4IDRec as in its code, with several times as many tokens",
        choices=("sequential", "published"),
    )
    id_prompt: str = result_flag(
        "short",
        "prompts: short, cut to the most recent items, or in the published wording, cut on the "
        "right",
        choices=("short", "published"),
    )
    item_order: str = result_flag(
        "time",
        "order of the items in a training example",
        choices=("time", "random"),
    )
    global_examples: int = result_flag(
        1,
        "training examples per user and epoch from all training items, split at a random position",
        up_to(1000, lowest=0),
    )
    local_examples: int = result_flag(
        20,
        "further training examples per user and epoch, each from a random subset of the items",
        up_to(1000, lowest=0),
    )
    local_items: int = result_flag(10, "items in such a subset, targets included", positive)
    min_targets: int = result_flag(
        1,
        "minimum number of items in the answer of an example from all items; users need one more "
        "training item than this, or have no examples",
        positive,
    )
    llm_train_on_inputs: bool = result_flag(
        False, "train on the whole prompt, not only on the answer", boolean
    )
    kept_weights: str = result_flag(
        "best", "adapter to keep: the one that validates best, or that of the last step",
        choices=("best", "last"),
    )  # fmt: skip
    lora_lr: float = result_flag(1e-3, "learning rate", nonnegative)
    train_batch_size: int = result_flag(32, "examples per optimizer step", up_to(MAX_BATCH))
    max_steps: int = result_flag(400, "optimizer steps", positive)
    warmup_steps: int = result_flag(20, "length of the warm-up in optimizer steps", count)
    constrained: bool = result_flag(
        False, "generate only items of the catalogue", boolean, stage="generation"
    )
    temperature: float = result_flag(
        0.8, "temperature of the sampling", number(float, 0.01, 100.0), stage="generation"
    )
    top_p: float = result_flag(
        0.9, "sample from the most likely tokens with this total probability", fraction,
        stage="generation",
    )  # fmt: skip
    top_k: int = result_flag(
        0, "sample from at most this many tokens; 0 for no such limit, 1 for the most likely one",
        count, stage="generation",
    )  # fmt: skip
    max_new_tokens: int = result_flag(200, "maximum number of tokens generated per user", positive)
    val_batch_size: int = rounding_flag(16, "examples per batch in validation", up_to(MAX_BATCH))
    # Without --constrained, the users of a batch share one stream of random numbers.
    test_batch_size: int = rounding_flag(
        0,
        "users per batch in generation; 0 for 16, or with --constrained for up to 1024, as far as "
        "they fit in half of the free memory on CUDA or in 2 GiB on the CPU",
        up_to(MAX_BATCH, lowest=0),
    )
    retriever_path: str | None = handling_flag(
        None, "run of a retriever that filters implausible items; no such filter if absent"
    )
    plausible_rank: int | None = result_flag(
        None,
        "drop items that the retriever ranks below this for their user; chosen by "
        "--plausible_share if absent",
        positive,
        stage="filter",
    )
    plausible_share: float = result_flag(
        0.5, "choose the rank that keeps this share of the validation targets", fraction,
        stage="filter",
    )  # fmt: skip
    reuse: str | None = handling_flag(
        None, "earlier run whose tuned model and texts are reused as far as its flags agree"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_items < 2:
            raise UserError(
                f"--local_items {self.local_items}: at least 2 are needed, a history and a target"
            )
        if not self.global_examples and not self.local_examples:
            raise UserError("--global_examples 0 --local_examples 0 leave nothing to train on")
        if self.dry_run:
            raise UserError("--dry_run: augment_data.py cannot estimate a run; leave out the flag")
        if not self.top_p:
            raise UserError("--top_p must be above 0 to sample anything")
        if self.max_new_tokens >= self.llm_max_text_len:
            raise UserError(
                f"--max_new_tokens {self.max_new_tokens} leaves no room for a prompt in "
                f"--llm_max_text_len {self.llm_max_text_len}"
            )
        if self.plausible_rank and not self.retriever_path:
            raise UserError("--plausible_rank needs --retriever_path, whose ranks it bounds")

    def run_dir(self, data_code: str) -> Path:
        """Folder of this run, ``experiments/llm4idrec/<data set>`` by default."""
        return self._run_dir("llm4idrec", data_code)


ALL_CONFIGS: tuple[type[CommonConfig], ...] = (RetrieverConfig, RankerConfig, AugmentationConfig)
IMMATERIAL_FLAGS = immaterial_flags(*ALL_CONFIGS)


def _check_metric(flag: str, metric: str, ks_flag: str, ks: tuple[int, ...]) -> None:
    try:
        _, k = split_metric(metric)
    except ValueError as error:
        raise UserError(f"--{flag} {metric}: {error}") from error
    if k not in ks:
        raise UserError(f"--{flag} {metric}: {k} is not among --{ks_flag}")


# Presets: values that differ from the defaults ----------------------------------------------------


def _dropouts(probability: float) -> dict[str, float]:
    return {"dropout": probability, "attn_dropout": probability}


# Section 4.0.4. Where the paper searches a grid (dropout, weight decay), one point of it.
_LONG_HISTORIES = {"max_len": 200, "train_batch_size": 16}
_PAPER_BY_DATASET: dict[str, dict[str, Any]] = {
    "ml-100k": _LONG_HISTORIES,
    "ml-100k-classic": _LONG_HISTORIES,
}
_PAPER_BY_MODEL: dict[str, dict[str, Any]] = {
    "bert": _dropouts(0.2),
    "narm": {"num_blocks": 1},  # as in its own paper
}
# Chosen on validation, see docs/results/ablations.md. With averaged weights and a decaying learning
# rate, far fewer steps are needed. Validation excludes the history, as testing does.
_TUNED: dict[str, Any] = {
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
_TUNED_BY_DATASET: dict[str, dict[str, Any]] = {"beauty": {"max_steps": 5000}}
_TUNED_BY_MODEL: dict[str, dict[str, Any]] = {
    "bert": {"max_steps": 6000} | _dropouts(0.1),  # more steps: the loss covers only masked items
    "narm": _dropouts(0.1),
    "sas": _dropouts(0.3),
}
_TUNED_BY_BOTH: dict[tuple[str, str], dict[str, Any]] = {
    ("ml-100k", "lru"): {"title_encoder": "none"} | _dropouts(0.6),
    ("ml-100k", "narm"): _dropouts(0.4),
}


# With --verbalizer titles, a target costs the tokens of its title instead of a whole prompt, so
# larger adapters can be trained for an entire epoch on a CPU.
_TITLES: dict[str, Any] = {
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "lora_target_modules": (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ),
    "lora_lr": 1e-3,
    "lr_decay": "cosine",
    "warmup_steps": 20,
    "train_batch_size": 32,
    "lora_val_iterations": 200,
    "val_users": 500,
}  # fmt: skip


def ranker_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Look up the settings of a verbalizer.

    Args:
        given: ``verbalizer`` unless it is the default.
    """
    if given.get("verbalizer") != "titles":
        return {}
    # Without the retriever, the likelihood among its candidates says little.
    with_retriever = given.get("title_prior", "retriever") == "retriever"
    return _TITLES | ({"rerank_best_metric": LOG_LIKELIHOOD} if with_retriever else {})


# What the published code does, see docs/llm4idrec.md.
_PUBLISHED: dict[str, Any] = {
    "id_prompt": "published",
    "item_order": "random",
    "global_examples": 20,
    "local_examples": 0,
    "min_targets": 2,
    "llm_train_on_inputs": True,
    "kept_weights": "last",
    "early_stopping": False,
    "llm_max_text_len": 2048,
    "llm_load_in_4bit": False,
    "enable_lr_warmup": False,
    "top_k": 50,
}


def augmentation_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Look up the settings of an augmentation recipe.

    Args:
        given: ``preset`` unless it is the default.
    """
    return _PUBLISHED if given.get("preset") == "published" else {}


def retriever_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Look up the settings of a retriever's recipe.

    Args:
        given: ``dataset_code`` and, unless they are the defaults, ``preset`` and ``model_code``.
    """
    dataset, model = given["dataset_code"], given.get("model_code", "lru")
    settings = _PAPER_BY_DATASET.get(dataset, {}) | _PAPER_BY_MODEL.get(model, {})
    if given.get("preset") == "tuned":
        settings |= _TUNED | _TUNED_BY_DATASET.get(dataset, {}) | _TUNED_BY_MODEL.get(model, {})
        settings |= _TUNED_BY_BOTH.get((dataset, model), {})
    return settings
