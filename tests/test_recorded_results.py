"""Small results, recorded to notice when a change of the code changes results.

Earlier checkpoints and stages must not be resumed with code that gives other results. Whoever
changes results raises ``trainer.fingerprint.RESULTS_FORMAT``; these tests are the reminder. Record
the new results with

    python -m tests.test_recorded_results

which refuses to replace results as long as the format is the same.

Each result is recorded in one of two ways:

- Integers, text and shapes are exact. Random draws of NumPy are among them. They do not depend on
  the machine.
- Arrays of float32 numbers are recorded by their norm and three projections, which together depend
  on every element. They must agree within ``TOLERANCE`` times the norm. The recorded quantities are
  continuous: scores are in the order of the items and every item is scored, so that it does not
  matter in which order nearly equal scores are ranked. Between kernels (AVX512, AVX2, none) and
  numbers of threads they differ by less than 5% of the tolerance.

The recorded runs cover preprocessing, batches, models, losses, optimizers, prompts and filters;
micro-batches too, although they affect rounding alone. Left out is what is not stable enough from
machine to machine: bfloat16 and NF4, title encodings (the signs of eigenvectors), and the texts
that a language model generates.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from augmentation.filters import extract_interactions, plausible_rank
from augmentation.generation import GeneratedText, generate
from augmentation.merge import merge
from augmentation.prompts import GenerationPrompts, IdPrompts, TrainingExamples
from config import RetrieverConfig
from dataloader.candidates import Candidates, load_candidates
from dataloader.guided_titles import GuidedCandidates, GuidedDocuments
from dataloader.item_prior import ItemScores, RetrieverPrior
from dataloader.prompt import PromptBuilder
from dataloader.prompt_batches import BatchLimits, EvaluationPrompts, TrainingPrompts
from dataloader.sampler import ShuffledBatches, evaluation_loader
from dataloader.sequences import Histories, MaskedWindows, Prefixes, TrainingWindows
from dataloader.title_prompt import TitlePrompts
from datasets import SequenceDataset
from datasets.base import Filters, RawData
from datasets.preprocessing import build
from evaluation.reranking import score_candidates
from evaluation.retrieval import hard_negatives, rank_interactions, retrieve
from jagged import JaggedBatch
from model.base import Retriever, RetrieverSpec
from model.registry import load_retriever
from tests.helpers import shares
from trainer.fingerprint import RESULTS_FORMAT
from trainer.optimization import build_optimizer
from trainer.run_folder import RunFolder

RECORD = Path(__file__).with_name("recorded_results.json")
COMMAND = "python -m tests.test_recorded_results"
TOLERANCE = 1e-4
NUM_PROJECTIONS = 3
Results = dict[str, Any]  # float arrays, or values that are exact


# Data -------------------------------------------------------------------------------------------


def make_data() -> SequenceDataset:
    """Users who walk through the items in steps of 1 to 3, two at a time; no random numbers."""
    rows = [
        (str(user), str((7 * user + step * (1 + user % 3)) % 43), step // 2, 1 + step % 5)
        for user in range(26)
        for step in range(5 + 5 * user % 17)
    ]
    table = pd.DataFrame(rows, columns=["user", "item", "timestamp", "rating"])
    titles = {item: f"Part {item}" for item in table["item"].unique()}
    return build("test", RawData(table, titles), Filters(min_rating=2, min_uc=5, min_sc=5))


def data_results(_: Path) -> Results:
    data = make_data()
    prefixes = data.training_prefixes()
    return {
        "sequences": [data.item_ids, data.offsets, data.user_names, data.item_names, data.titles],
        "fingerprint": data.fingerprint,
        "split": [data.targets("val"), data.targets("test"), data.training_counts(), *prefixes],
    }


def batch_results(_: Path) -> Results:
    """Batches of sequences, and the order of the examples."""
    data = make_data()
    sampler = ShuffledBatches(50, 7, seed=42)
    numbers = [5, 3, 0, 30, 17, 3 + 1000]
    return {
        "order": [list(sampler), sampler.first_examples(3)],
        "training windows": without_weights(TrainingWindows(data, 6, 0.5).__getitems__(numbers)),
        "masked windows": without_weights(
            MaskedWindows(data, 6, 1.0, 0.3, 42).__getitems__(numbers)
        ),
        "histories": Histories(data, "test", 6).__getitems__([4, 0, 9]),
        "histories with a mask": Histories(data, "val", 6, 30).__getitems__([4, 0, 9]),
        "prefixes": Prefixes(data, 6).__getitems__([0, 8, 21]),
    }


# Retrievers -------------------------------------------------------------------------------------

RETRIEVER_FLAGS: dict[str, dict[str, Any]] = {
    "lru": {},
    "sas": {},
    "bert": {"mask_prob": 0.4},
    "narm": {},
    "lru, every option": {
        "negatives": 8, "label_smoothing": 0.2, "ema_decay": 0.8, "enable_lr_schedule": True,
        "lr_decay": "cosine", "enable_lr_warmup": True, "warmup_steps": 3, "optimizer": "Adam",
        "sliding_window_size": 0.5, "max_grad_norm": 0.5,
    },
    "sas, label smoothing": {"label_smoothing": 0.2},
}  # fmt: skip


def retriever_results(name: str, folder: Path) -> Results:
    """A run of the recipe: loss, weights and scores.

    There is one validation, after the last step: the choice of the best one depends on ranks.
    """
    from recipes.fit_retriever import train
    from train_retriever import OUTPUTS

    data = make_data()
    flags: dict[str, Any] = {
        "dataset_code": "games", "device": "cpu", "seed": 42, "model_code": name.split(",")[0],
        "max_steps": 20, "val_iterations": 20, "train_batch_size": 8, "lr": 0.01,
        "hidden_units": 16, "num_blocks": 2, "num_heads": 2, "max_len": 8, "dropout": 0.3,
        "attn_dropout": 0.2, "num_candidates": data.num_items, "mask_history": "test",
    }  # fmt: skip
    config = RetrieverConfig(**(flags | RETRIEVER_FLAGS[name]))
    train(config, data, RunFolder(folder, OUTPUTS, ""), None, None)
    model = load_retriever(folder, data.num_items)
    weights = model.state_dict()
    # The gradient of the keys' bias is 0 but for rounding errors, which Adam scales up.
    stable = [x.flatten() for name, x in weights.items() if "attention.in_proj.bias" not in name]
    results: Results = {
        "loss": np.array([json.loads(line)["loss"] for line in (folder / "log.jsonl").open()]),
        "parameters": {name: list(weight.shape) for name, weight in weights.items()},
        "weights": torch.cat(stable),
    }
    for split, candidates in load_candidates(folder / "candidates.npz", data).items():
        by_item = np.empty_like(candidates.scores)
        np.put_along_axis(by_item, candidates.items - 1, candidates.scores, axis=1)
        is_new = np.isfinite(by_item)  # not in the user's history
        results[f"{split} items"] = [is_new.astype(int), candidates.labels]
        results[f"{split} scores"] = by_item[is_new]
    return results


class ExactRetriever(Retriever):
    """Scores that are small integers, all of them different, so that no machine rounds them."""

    def __init__(self, num_items: int) -> None:
        super().__init__(RetrieverSpec("lru", num_items, 6, 1, 1, 1, 0.0, 0.0))
        self.weight = nn.Parameter((torch.arange(num_items + 1.0) * 11 % (num_items + 1))[:, None])

    def encode(self, sequences: JaggedBatch) -> Tensor:
        """1 or -1, after the last item."""
        assert sequences.scored is not None
        return sequences.item_ids[sequences.scored, None].float() % 2 * 2 - 1

    @property
    def item_embeddings(self) -> Tensor:
        return self.weight


def ranking_results(_: Path) -> Results:
    """Candidates, ranks and hard negatives for exact scores."""
    data = make_data()
    model = ExactRetriever(data.num_items)
    results: Results = {}
    for mask_history in (True, False):
        loader = evaluation_loader(Histories(data, "test", 6), 7, 0)
        candidates = retrieve(
            model, loader, mask_history=mask_history, num_candidates=5, description=""
        )
        results[f"candidates, mask_history={mask_history}"] = list(candidates)
    results["hard negatives"] = hard_negatives(model, evaluation_loader(Prefixes(data, 6), 7, 0), 4)
    users, items = np.array([0, 0, 2, 9]), np.array([1, 29, 5, 7])
    loader = evaluation_loader(Histories(data, "val", 6), 7, 0)
    results["ranks"] = list(rank_interactions(model, loader, users, items, ""))
    return results


# Language models --------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """One token per byte, after the tokens that begin and end a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


EOS = 1


def make_prompts(data: SequenceDataset) -> PromptBuilder:
    return PromptBuilder(
        make_tokenizer(), data.titles, instruction="Choose.",
        input_template="History: {}; candidates: {}", num_candidates=8, max_title_len=6,
        max_text_len=200,
    )  # fmt: skip


def training_prompts(data: SequenceDataset, **options: Any) -> TrainingPrompts:
    arguments: dict[str, Any] = {
        "num_negatives": 4, "max_history": 5, "limits": BatchLimits(3, 450), "eos_id": EOS,
        "on_inputs": False, "seed": 42,
    }  # fmt: skip
    return TrainingPrompts(data, make_prompts(data), **(arguments | options))


def evaluation_prompts(data: SequenceDataset, permutations: int) -> EvaluationPrompts:
    """Prompts with 8 candidates, which hold the target of all users but every fifth."""
    targets = data.targets("test")
    offsets = np.arange(8) * 5 + (np.arange(data.num_users) % 5 == 0)[:, None]
    items = ((targets[:, None] - 1 + np.roll(offsets, 3, axis=1)) % data.num_items + 1).astype(
        np.int32
    )
    scores = np.tile(-np.arange(8, dtype=np.float32), (data.num_users, 1))
    ranks = np.ones(data.num_users, dtype=np.int32)
    candidates = Candidates(items.astype(np.int32), scores, targets, ranks)
    return EvaluationPrompts(
        data, "test", candidates, make_prompts(data), max_history=5, pad_id=EOS,
        permutations=permutations, seed=42,
    )  # fmt: skip


NUMBERS = [0, 7, 50, 21, 100, 63, 3 + 1000]


def prompt_results(_: Path) -> Results:
    """Ranking prompts: negatives, orders, token ids, micro-batches."""
    data = make_data()
    examples = training_prompts(data)
    hard = np.arange(2 * len(examples), dtype=np.int32).reshape(-1, 2) % data.num_items + 1
    evaluation = evaluation_prompts(data, permutations=2)
    return {
        "examples": [examples.example(number) for number in NUMBERS],
        "hard negatives": [
            training_prompts(data, hard_negatives=hard).example(number) for number in NUMBERS
        ],
        "training": without_weights(examples.__getitems__(NUMBERS)),
        "training on inputs": without_weights(
            training_prompts(data, on_inputs=True).__getitems__(NUMBERS)
        ),
        "weights": np.array(shares(examples.__getitems__(NUMBERS))),
        "evaluation": evaluation.__getitems__([0, 1, 2, 9]),
        "users": evaluation.users,
    }


def without_weights(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Micro-batches without their numbers of targets, which are recorded as shares."""
    return [{k: v for k, v in batch.items() if k != "num_targets"} for batch in batches]


def save_llama(folder: Path) -> None:
    """A two-layer Llama with weights that depend on NumPy's random numbers alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rng = np.random.default_rng(0)
    for name, parameter in sorted(model.named_parameters()):
        values = 0.2 * rng.standard_normal(tuple(parameter.shape)) + ("norm" in name)
        parameter.data = torch.from_numpy(values).float()
    model.save_pretrained(folder)


def language_model_results(folder: Path) -> Results:
    """Two steps of LoRA in float32: losses, adapters, scores of the candidates."""
    from model.language_model import add_lora, load_causal_lm
    from model.verbalizer import response_loss

    save_llama(folder)
    data = make_data()
    prompts = make_prompts(data)
    letter_ids = torch.from_numpy(prompts.letter_ids)
    torch.manual_seed(42)
    causal_lm = load_causal_lm(folder, device=torch.device("cpu"), in_4bit=False)
    model: Any = add_lora(
        causal_lm, rank=4, alpha=8, dropout=0.1, target_modules=("q_proj", "v_proj")
    )
    model = model.float()
    loader = evaluation_loader(evaluation_prompts(data, permutations=2), 5, 0)
    results: Results = {"scores before": score_candidates(model, loader, letter_ids, "")[1]}
    optimizer = build_optimizer(
        model, "AdamW", lr=0.01, weight_decay=0.01, epsilon=1e-8, paged=False
    )
    step_losses = []
    for options in ({"letter_ids": None}, {"letter_ids": letter_ids}):
        model.train()
        batches = training_prompts(data).__getitems__(NUMBERS)
        for batch, share in zip(batches, shares(batches)):
            loss = response_loss(model, batch, **options) * share
            loss.backward()
            step_losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    users, scores = score_candidates(model, loader, letter_ids, "")
    model.eval()
    with torch.no_grad():
        whole = training_prompts(data, on_inputs=True).__getitems__(NUMBERS)
        whole_losses = [response_loss(model, batch).item() for batch in whole]
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return results | {
        "users": users,
        "scores after": scores,
        "training losses": np.array(step_losses),
        "losses on inputs": np.array(whole_losses),
        "adapter names": {name: list(p.shape) for name, p in adapters.items()},
        "adapters": torch.cat([p.detach().flatten() for p in adapters.values()]),
    }


def guided_title_results(folder: Path) -> Results:
    """Titles relative to a retriever: batches, losses, gradients, scores."""
    from model.guided_titles import add_prior_weights, guided_loss, guided_scores
    from model.language_model import load_causal_lm

    save_llama(folder)
    data = make_data()
    prompts = TitlePrompts(make_tokenizer(), data.titles, max_history=5, max_text_len=500)
    documents = GuidedDocuments(data, prompts, limits=BatchLimits(3, 300), pad_id=EOS)
    rng = np.random.default_rng(0)

    def prior(keys: np.ndarray) -> RetrieverPrior:
        layer = ItemScores(
            rng.standard_normal((data.num_items + 1, 4)), rng.standard_normal(data.num_items + 1)
        )
        encodings, layer_of = rng.standard_normal((len(keys), 4)), np.zeros_like(keys)
        return RetrieverPrior(keys, encodings, [layer], layer_of, mask_history=True)

    documents.prior = prior(documents.interactions(np.arange(len(documents))))
    items = (data.targets("test")[:, None] + np.arange(6)) % data.num_items + 1
    unused = np.empty(0)
    candidates = GuidedCandidates(
        data, "test", Candidates(items, unused, unused, unused), prompts,
        users=np.arange(0, data.num_users, 3), pad_id=EOS,
        prior=prior(np.arange(data.num_users)),
    )  # fmt: skip
    model = load_causal_lm(folder, device=torch.device("cpu"), in_4bit=False).float()
    add_prior_weights(model)
    tokens = torch.from_numpy(prompts.trie.tokens)
    batches = documents.__getitems__(NUMBERS)
    losses = [
        guided_loss(model, batch, tokens) * share for batch, share in zip(batches, shares(batches))
    ]
    torch.stack(losses).sum().backward()
    scored = candidates.__getitems__(list(range(len(candidates))))
    with torch.no_grad():
        scores = guided_scores(model, scored, tokens)
    return {
        "training": without_weights(batches),
        "scoring": scored,
        "losses": torch.stack(losses).detach(),
        "gradients": torch.cat([p.grad.flatten() for p in model.parameters()]),
        "scores": scores,
    }


# Augmentation -----------------------------------------------------------------------------------


class RecordingModel:
    """Generates nothing; keeps what it is asked for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        shown = {k: v for k, v in options.items() if k != "logits_processor"}
        self.requests.append([torch.initial_seed(), input_ids, attention_mask, repr(shown)])
        return torch.cat([input_ids, torch.full((len(input_ids), 1), EOS)], dim=1)


def augmentation_results(folder: Path) -> Results:
    """Examples and prompts of item numbers, requests to the model, filters, merged sequences."""
    data = make_data()
    prompts = IdPrompts(
        make_tokenizer(), num_users=data.num_users, num_items=data.num_items, eos_id=EOS,
        max_text_len=80, max_response_len=12,
    )  # fmt: skip
    examples = TrainingExamples(
        data, prompts, local_examples=3, local_items=6, limits=BatchLimits(3, 200), seed=42
    )
    model: Any = RecordingModel()
    generate(
        model, prompts, GenerationPrompts(data, prompts, 7), {}, folder / "texts.jsonl",
        constrained=False, temperature=0.8, top_p=0.9, seed=42, save_seconds=300,
        if_out_of_memory="",
    )  # fmt: skip
    texts = {
        user: GeneratedText(f" {user + 3} 07 {29 - user}, 41; x {user + 9} {user + 3} 12", user % 2)
        for user in range(data.num_users)
    }
    interactions, dropped = extract_interactions(texts, data)
    merged = {place: merge(data, interactions, place) for place in ("before", "after")}
    return {
        "examples": [examples.example(number) for number in NUMBERS],
        "training": without_weights(examples.__getitems__(NUMBERS)),
        "requests": model.requests,
        "interactions": list(interactions),
        "dropped": dict(sorted(dropped.items())),
        "plausible rank": [
            plausible_rank(np.arange(1, 41) ** 2, share) for share in (0.1, 0.5, 0.99)
        ],
        "merged": {place: [x.item_ids, x.offsets] for place, x in merged.items()},
    }


# Recording and comparing ------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Path], Results]] = {
    "data": data_results,
    "batches": batch_results,
    "ranking": ranking_results,
    **{f"retriever {name}": partial(retriever_results, name) for name in RETRIEVER_FLAGS},
    "prompts": prompt_results,
    "language model": language_model_results,
    "guided titles": guided_title_results,
    "augmentation": augmentation_results,
}


def is_float_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, Tensor)) and torch.as_tensor(value).is_floating_point()


def projections(value: Any) -> list[float]:
    """The norm of an array, then its inner products with waves of different lengths."""
    x = np.asarray(value, dtype=np.float64).ravel()
    index = np.arange(len(x))
    products = [x @ np.cos(1 + k * index) for k in range(1, NUM_PROJECTIONS + 1)]
    return [float(f"{y:.7g}") for y in (np.linalg.norm(x), *products)]


def plain(value: Any) -> Any:
    """Exact values as JSON has them."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    return value


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(plain(value)).encode()).hexdigest()


def summary(results: Results) -> Results:
    """What the file holds of a section: a digest, or the norm and projections."""
    return {
        name: projections(value) if is_float_array(value) else digest(value)
        for name, value in results.items()
    }


def differences(results: Results, recorded: Results) -> list[str]:
    """Names of the results that are not as recorded."""
    different = list(results.keys() ^ recorded.keys())
    for name in results.keys() & recorded.keys():
        ours, expected = results[name], recorded[name]
        if isinstance(ours, str) or isinstance(expected, str):
            same = ours == expected
        else:
            same = np.allclose(ours, expected, rtol=0, atol=TOLERANCE * expected[0])
        if not same:
            different.append(name)
    return sorted(different)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What the file holds."""
    return json.loads(RECORD.read_text())


def test_the_format_of_the_recorded_results(record: dict[str, Any]):
    assert record["results_format"] == RESULTS_FORMAT, f"record the results with `{COMMAND}`"
    assert list(record["sections"]) == list(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_results_are_as_recorded(section: str, record: dict[str, Any], tmp_path: Path):
    different = differences(summary(SECTIONS[section](tmp_path)), record["sections"][section])
    assert not different, (
        f"results changed: {', '.join(different)} of {section}. If that is intended, raise "
        f"RESULTS_FORMAT in trainer/fingerprint.py and record the results with `{COMMAND}`"
    )


def main() -> None:
    """Record the results of the current format."""
    sections = {}
    for name, function in SECTIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            sections[name] = summary(function(Path(folder)))
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
        changed = [
            name
            for name, recorded in record["sections"].items()
            if name in sections and differences(sections[name], recorded)
        ]
        if changed and record["results_format"] == RESULTS_FORMAT:
            sys.exit(f"results changed: {', '.join(changed)}: raise RESULTS_FORMAT first")
    value = {"results_format": RESULTS_FORMAT, "sections": sections}
    RECORD.write_text(json.dumps(value, indent=2) + "\n")
    print(f"recorded {len(sections)} sections in {RECORD}")


if __name__ == "__main__":
    main()
