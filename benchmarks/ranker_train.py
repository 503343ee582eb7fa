"""Training of the ranker: ours against the published recipe, on the same prompts.

The published recipe tokenizes every prompt as text, pads a batch to its longest prompt, computes
the logits of all positions and recomputes activations in the backward pass. Its embeddings, norms
and output layer are in float32, and it trains under autocast to bfloat16. Ours concatenates cached
title tokens, computes logits only where the loss needs them, recomputes activations only if memory
demands it and has adapters of its own. On CUDA it packs prompts; on the CPU it splits the batch
where that saves padding and has attention and norms of its own. For titles, which have not been
published, the published recipe trains on the same histories as plain text.

Both alternate with one optimizer step each; times are medians. ``floor_share`` is the time of the
arithmetic alone (4 x parameters x tokens of the prompts, at the rate of a large bfloat16 matrix
product measured here) over our time. Peak memory is that of a process of its own for each recipe on
the CPU, and the allocator's on CUDA. ``liger_s`` and ``liger_mib`` are ours with
``--use_liger_kernel``, on CUDA if that package is installed.

``llama-2-7b`` has the true shape and random weights, because Llama 2 cannot be redistributed.

Example:
    python -m benchmarks.ranker_train --data_root data --datasets games ml-100k
    python -m benchmarks.ranker_train --device cuda --models smollm2-135m llama-2-7b \\
        --tokenizer path/to/llama-2
"""

from __future__ import annotations

import argparse
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor

from benchmarks.common import (
    DATASETS,
    Row,
    add_data_flags,
    add_device_flag,
    alternating_medians,
    load_data,
    make_parser,
    matmul_rate,
    report,
    run,
    update,
    use_stock_modules,
)
from benchmarks.language_models import (
    Setup,
    add_model_flags,
    build_prompts,
    prepare,
)
from benchmarks.memory import in_own_process, peak_mib, rss_mib
from config import RankerConfig, ranker_preset
from dataloader.guided_titles import GuidedDocuments
from dataloader.item_prior import ItemScores, RetrieverPrior
from dataloader.prompt import RESPONSE_TOKENS
from dataloader.prompt_batches import IGNORE_INDEX, BatchLimits, TrainingPrompts, pad_left
from dataloader.title_batches import pad_right
from dataloader.title_prompt import HEADING, TitlePrompts
from datasets import SequenceDataset
from model.guided_titles import add_prior_weights, guided_loss
from model.language_model import (
    add_lora,
    load_causal_lm,
    plan_activations,
    recompute_activations,
)
from model.packing import packs
from model.verbalizer import response_loss
from recipes.tuning import FIXED_TOKENS, LEAST_TOKENS
from trainer.optimization import build_optimizer

PUBLISHED, OURS, LIGER = "published", "ours", "liger"
EXAMPLES = 10_000  # the steps draw from this many
WIDTH = 64  # of the retriever with random weights


class Work(NamedTuple):
    """What is trained and where; it can be sent to another process.

    Attributes:
        setup: the language model.
        verbalizer: ``letters`` or ``titles``.
        data: the data set.
        batch_size: prompts or documents per step.
        device: device of the training.
    """

    setup: Setup
    verbalizer: str
    data: SequenceDataset
    batch_size: int
    device: torch.device

    @property
    def config(self) -> RankerConfig:
        """The defaults of ``train_ranker.py`` for the verbalizer."""
        given = {"verbalizer": self.verbalizer}
        return RankerConfig(dataset_code="games", **(ranker_preset(given) | given))


def build_model(work: Work, recipe: str) -> PeftModel:
    """Build the model with adapters as a recipe has it."""
    causal_lm = load_causal_lm(
        work.setup.folder,
        device=work.device,
        in_4bit=work.setup.in_4bit,
        fused_kernels=recipe == LIGER,
    )
    config = work.config
    model = add_lora(
        causal_lm,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
    )
    if recipe == PUBLISHED:
        use_stock_modules(model)
        keep_in_float32(model)
    return model


def fit_memory(model: PeftModel, work: Work, recipe: str) -> int:
    """Recompute activations where a recipe does; returns the most tokens in a micro-batch."""
    tokens, recompute = work.setup.max_tokens, recipe == PUBLISHED
    if recipe != PUBLISHED:
        least = tokens
        if work.device.type == "cuda":  # as in recipes.tuning
            least = max(LEAST_TOKENS, work.config.llm_max_text_len)
        tokens, recompute = plan_activations(model, tokens, least)
    if recompute:
        recompute_activations(model)
    return tokens


def keep_in_float32(model: PeftModel) -> None:
    """Convert embeddings, norms and output layer, as PEFT's preparation for QLoRA does."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("embed", "norm", "lm_head")):
            parameter.data = parameter.data.float()


class Training(ABC):
    """A model with adapters and its optimizer, trained as a recipe does.

    Args:
        work: what is trained and where.
        recipe: ``published``, ``ours`` or ``liger``.
        model: the model with adapters; built as the recipe has it if absent.

    Attributes:
        examples: the training examples.
    """

    examples: Any

    def __init__(self, work: Work, recipe: str, model: PeftModel | None = None) -> None:
        self.recipe, self.device, self.eos_id = recipe, work.device, work.setup.eos_id
        torch.manual_seed(0)
        self.model = model or build_model(work, recipe)
        self.max_tokens = fit_memory(self.model, work, recipe)
        self.prepare(work)
        self.model.train()
        config = work.config
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = build_optimizer(
            self.model,
            "AdamW",
            lr=config.lora_lr,
            weight_decay=config.weight_decay,
            epsilon=config.adam_epsilon,
            paged=work.setup.in_4bit,
        )

    def limits(self, work: Work) -> BatchLimits:
        """Limits on the micro-batches."""
        return BatchLimits(
            work.batch_size,
            self.max_tokens,
            FIXED_TOKENS[work.device.type],
            packs(self.model.get_base_model()),
        )

    @abstractmethod
    def prepare(self, work: Work) -> None:
        """Build the training examples of ``train_ranker.py`` with its default flags."""

    @abstractmethod
    def texts(self, numbers: list[int]) -> list[np.ndarray]:
        """Token ids of examples, as the published recipe tokenizes them."""

    @abstractmethod
    def published_loss(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Loss of a padded batch by the model's own forward pass."""

    @abstractmethod
    def micro_batches(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Our micro-batches of a step."""

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Our loss of a micro-batch."""

    def step(self, numbers: list[int]) -> None:
        """Take one optimizer step on the examples with the given numbers."""
        if self.recipe == PUBLISHED:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.published_loss(self.texts(numbers))
            loss.backward()
        else:
            micro_batches = self.micro_batches(numbers)
            num_targets = sum(batch["num_targets"] for batch in micro_batches)
            for micro_batch in micro_batches:
                batch: dict[str, Any] = send_to_device(micro_batch, self.device)
                (self.loss(batch) * (batch["num_targets"] / num_targets)).backward()
        update(self.model, self.optimizer, self.max_grad_norm)


class Letters(Training):
    """Prompts with the candidates under letters."""

    def prepare(self, work: Work) -> None:
        """Build the prompts."""
        config = work.config
        self.examples = TrainingPrompts(
            work.data,
            build_prompts(work.setup, work.data.titles),
            num_negatives=config.llm_negative_sample_size,
            max_history=config.llm_max_history,
            limits=self.limits(work),
            eos_id=self.eos_id,
            on_inputs=False,
            seed=0,
        )

    def texts(self, numbers: list[int]) -> list[np.ndarray]:
        """Prompts and responses."""
        prompts, sequences = self.examples.prompts, []
        for number in numbers:
            history, candidates, index = self.examples.example(number)
            token_ids = prompts.tokenizer.encode(prompts.text(history, candidates)).ids
            sequences.append(np.array([*token_ids, prompts.letter_ids[index], self.eos_id]))
        return sequences

    def published_loss(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Cross-entropy of the responses."""
        batch: dict[str, Any] = send_to_device(pad_left(list(texts), self.eos_id), self.device)
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        labels[:, -RESPONSE_TOKENS:] = batch["input_ids"][:, -RESPONSE_TOKENS:]
        loss: Tensor = self.model(**batch, labels=labels, use_cache=False).loss
        return loss

    def micro_batches(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Prompts from cached tokens."""
        return self.examples.__getitems__(numbers)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy of the response."""
        return response_loss(self.model, batch)


class Titles(Training):
    """Histories as documents, guided by a retriever with random weights."""

    def prepare(self, work: Work) -> None:
        """Build the documents."""
        config, data = work.config, work.data
        self.tokenizer, self.data = work.setup.load_tokenizer(), data
        prompts = TitlePrompts(
            self.tokenizer,
            data.titles,
            max_history=config.llm_max_history,
            max_title_len=config.llm_max_title_len,
            max_text_len=config.llm_max_text_len,
        )
        self.tokens = torch.from_numpy(prompts.trie.tokens).to(self.device)
        self.examples = GuidedDocuments(
            data,
            prompts,
            limits=self.limits(work),
            pad_id=self.eos_id,
        )
        rng = np.random.default_rng(0)
        interactions = self.examples.interactions(np.arange(len(self.examples)))
        self.examples.prior = RetrieverPrior(
            interactions,
            rng.normal(size=(len(interactions), WIDTH)).astype(np.float32),
            [
                ItemScores(
                    rng.normal(size=(data.num_items + 1, WIDTH)), np.zeros(data.num_items + 1)
                )
            ],
            np.zeros(len(interactions), np.int64),
            mask_history=True,
        )
        add_prior_weights(self.model)

    def texts(self, numbers: list[int]) -> list[np.ndarray]:
        """Histories, one title a line."""
        texts = []
        for index in np.array(numbers) % len(self.examples):
            items = self.data.item_ids[self.examples.starts[index] : self.examples.ends[index]]
            text = "\n".join([HEADING, *(self.data.titles[item] for item in items), ""])
            texts.append(np.array(self.tokenizer.encode(text).ids))
        return texts

    def published_loss(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Cross-entropy of all tokens."""
        input_ids = torch.from_numpy(pad_right(texts, self.eos_id))
        lengths = torch.tensor([len(text) for text in texts])
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        labels = input_ids.masked_fill(~mask, IGNORE_INDEX)
        batch = {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}
        loss: Tensor = self.model(**send_to_device(batch, self.device), use_cache=False).loss
        return loss

    def micro_batches(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Documents from cached tokens, with the options at their forks."""
        return self.examples.__getitems__(numbers)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Log-loss of the titles, less the retriever's."""
        return guided_loss(self.model, batch, self.tokens)


TRAININGS: dict[str, type[Training]] = {"letters": Letters, "titles": Titles}


def peak_of_training(work: Work, recipe: str) -> float:
    """Measure the peak memory of two steps in MiB, without what was used before the model.

    It is to be called in a process of its own.
    """
    before = rss_mib()
    training = TRAININGS[work.verbalizer](work, recipe)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training.step(list(range(work.batch_size)))
    training.step(list(range(work.batch_size, 2 * work.batch_size)))
    if work.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_mib() - before


def time_steps(
    work: Work, batches: list[list[int]], recipes: tuple[str, ...]
) -> tuple[list[float], float]:
    """Time the recipes in turn on the same prompts.

    Args:
        work: what is trained and where.
        batches: numbers of the examples of each step; the first step is the warm-up.
        recipes: the recipes.

    Returns:
        Median seconds of a step by recipe, and the mean number of tokens of a step.
    """
    trainings = [TRAININGS[work.verbalizer](work, recipe) for recipe in recipes]

    def stepper(training: Training) -> Callable[[int], None]:
        return lambda index: training.step(batches[index])

    steps = [stepper(training) for training in trainings]
    medians = alternating_medians(steps, len(batches) - 1, work.device)
    tokens = [sum(map(len, trainings[0].texts(numbers))) for numbers in batches[1:]]
    return medians, statistics.mean(tokens)


def measure(work: Work, rounds: int) -> Row:
    """Times, memory and ratios of one model on one data set."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(EXAMPLES, size=work.batch_size).tolist() for _ in range(rounds + 1)]
    recipes = (PUBLISHED, OURS)
    memory = {name: in_own_process(peak_of_training, work, name) for name in recipes}
    liger: Row = {}
    if work.device.type == "cuda" and find_spec("liger_kernel"):
        # Liger patches the rotary embeddings of all models of a process.
        (liger_s,), _ = in_own_process(time_steps, work, batches, (LIGER,))
        liger_mib = in_own_process(peak_of_training, work, LIGER)
        liger = {"liger_s": round(liger_s, 3), "liger_mib": round(liger_mib, 1)}
    (published_s, ours_s), tokens = in_own_process(time_steps, work, batches, recipes)
    floor_s = 4 * work.setup.num_parameters * tokens / matmul_rate(work.device)
    return {
        "model": work.setup.name,
        "verbalizer": work.verbalizer,
        "dataset": work.data.code,
        "in_4bit": work.setup.in_4bit,
        "batch_size": work.batch_size,
        "published_s": round(published_s, 3),
        "ours_s": round(ours_s, 3),
        "examples_per_s": round(work.batch_size / ours_s, 3),
        "tokens_per_s": round(tokens / ours_s, 1),
        "throughput_ratio": round(published_s / ours_s, 2),
        "published_mib": round(memory[PUBLISHED], 1),
        "ours_mib": round(memory[OURS], 1),
        "memory_ratio": round(memory[PUBLISHED] / memory[OURS], 2),
        "floor_share": round(floor_s / ours_s, 3),
        **liger,
    }


def measure_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure each model on each data set."""
    device = torch.device(flags.device)
    for name in flags.models:
        setup = prepare(name, device, flags.cache_root, flags.tokenizer)
        for verbalizer, code in product(flags.verbalizers, flags.datasets):
            data = load_data(code, flags)
            yield measure(Work(setup, verbalizer, data, flags.batch_size, device), flags.rounds)


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to train on, with which models, where."""
    add_data_flags(parser)
    parser.add_argument("--datasets", nargs="+", default=["games", "ml-100k"], choices=DATASETS)
    parser.add_argument("--verbalizers", nargs="+", default=["letters"], choices=TRAININGS)
    add_model_flags(parser)
    add_device_flag(parser)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the flags select."""
    parser = make_parser(__doc__)
    add_work_flags(parser)
    parser.add_argument(
        "--batch_size", type=int, default=4, help="prompts or documents per step (default: 4)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured steps (default: 5)")
    flags = parser.parse_args(argv)
    report("ranker_train", flags.device, measure_all(flags))


if __name__ == "__main__":
    run(main)
