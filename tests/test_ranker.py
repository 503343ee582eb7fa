"""The ranker: batches, the verbalizer against stock transformers, NF4 with LoRA, adapters."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from config import UserError
from dataloader import ranker as ranker_batches
from dataloader.candidates import Candidates
from dataloader.prompt import PromptBuilder
from dataloader.ranker import EvaluationPrompts, TrainingPrompts, pad_left, sample_negatives
from dataloader.sampler import ShuffledBatches, evaluation_loader
from model import attention
from model.ranker import (
    activation_bytes_per_token,
    add_lora,
    load_causal_lm,
    needs_checkpointing,
    recompute_activations,
)
from model.verbalizer import candidate_scores, response_loss
from tests.test_models import make_data
from trainer.loop import build_optimizer
from trainer.ranker import (
    fused_scores,
    fusion_weight,
    reranked,
    score_users,
    two_stage_ranks,
)

CPU = torch.device("cpu")
LORA = {
    "rank": 8, "alpha": 32, "dropout": 0.0, "target_modules": ("q_proj", "v_proj"),
}  # fmt: skip


@pytest.fixture()
def prompts(tiny_llama: Path) -> PromptBuilder:
    return PromptBuilder(
        Tokenizer.from_file(str(tiny_llama / "tokenizer.json")),
        ["", *(f"Part {i} of the Story" for i in range(30))],
        instruction="Choose.",
        input_template="User history: {}; Candidate pool: {}",
        num_candidates=20,
    )


@pytest.fixture(autouse=True)
def few_micro_batches(monkeypatch: pytest.MonkeyPatch):
    """Short prompts would mostly stand alone otherwise."""
    monkeypatch.setattr(ranker_batches, "GROUP_TOKENS", 10**6)


def training_prompts(prompts: PromptBuilder, **options: object) -> TrainingPrompts:
    arguments = {
        "num_negatives": 4, "max_history": 5, "max_rows": 3, "eos_id": 1,
        "on_inputs": False, "seed": 0,
    }  # fmt: skip
    return TrainingPrompts(make_data([6, 3, 9]), prompts, **(arguments | options))


def test_every_prefix_is_an_example(prompts: PromptBuilder):
    data = make_data([6, 3, 9])  # training sequences of 4, 1 and 7 items
    examples = training_prompts(prompts)
    assert len(examples) == 3 + 0 + 6
    answers = []
    for number in range(len(examples)):
        history, candidates, place = examples.example(number)
        answers.append(candidates[place])
        assert len(candidates) == 5 == len(set(candidates.tolist()))
        negatives = np.delete(candidates, place)
        start = 0 if number < 3 else 9
        read = data.item_ids[start : start + (number if number < 3 else number - 3) + 1]
        assert history.tolist() == read[-5:].tolist()
        assert not set(negatives.tolist()) & set(read.tolist())
    assert answers == [*data.item_ids[1:4], *data.item_ids[10:16]]


def test_examples_depend_on_their_number_alone(prompts: PromptBuilder):
    first, second = training_prompts(prompts), training_prompts(prompts)
    for number in (5, 0, 5):
        for a, b in zip(first.example(number), second.example(number)):
            assert np.array_equal(a, b)
    again = first.example(5 + len(first))  # the next epoch samples anew
    assert np.array_equal(again[0], first.example(5)[0])
    assert not np.array_equal(again[1], first.example(5)[1])


def test_places_of_the_answer_are_uniform(prompts: PromptBuilder):
    examples = training_prompts(prompts)
    places = [examples.example(n)[2] for n in range(2000)]
    assert np.bincount(places, minlength=5).min() > 330


def test_hard_negatives_are_all_there(prompts: PromptBuilder):
    data = make_data([6, 3, 9])
    starts, ends = data.training_prefixes()
    free = [
        np.setdiff1d(np.arange(1, 31), data.item_ids[s : e + 1])[:3] for s, e in zip(starts, ends)
    ]
    hard = np.stack(free).astype(np.int32)
    hard[4, 1:] = 0  # the retriever had no more to offer
    examples = training_prompts(prompts, num_negatives=7, hard_negatives=hard)
    for number in range(2 * len(examples)):
        history, candidates, place = examples.example(number)
        wanted = hard[number % len(examples)]
        assert set(wanted[wanted > 0]) <= set(np.delete(candidates, place).tolist())
        assert len(set(candidates.tolist())) == 8
        assert not set(np.delete(candidates, place)) & set(history.tolist())
    only = training_prompts(prompts, num_negatives=3, hard_negatives=hard)
    history, candidates, place = only.example(0)
    assert sorted(np.delete(candidates, place)) == hard[0].tolist()


@pytest.mark.parametrize("batches", [0, 1, 3, 5, 9])
def test_the_examples_that_are_seen(batches: int):
    sampler = ShuffledBatches(num_examples=17, batch_size=4, seed=3)
    seen = []
    for epoch in range(2):
        sampler.seek(epoch)
        seen += list(sampler)
    expected = {number % 17 for batch in seen[:batches] for number in batch}
    assert sampler.seen(batches).tolist() == sorted(expected)


def test_negatives_where_few_items_are_left():
    rng = np.random.default_rng(0)
    found = sample_negatives(rng, 6, np.array([1, 2, 3]), 5)
    assert sorted(found) == [4, 5, 6]


def padded_tokens(lengths: np.ndarray, groups: list[np.ndarray]) -> int:
    return sum(int(lengths[group].max()) * len(group) for group in groups)


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_are_the_cheapest(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranker_batches, "GROUP_TOKENS", 20)
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 100, size=int(rng.integers(1, 9)))
    max_rows, max_tokens = int(rng.integers(1, 6)), int(rng.integers(50, 400))
    groups = ranker_batches.micro_batches(lengths, max_rows, max_tokens)
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    ordered = lengths[np.concatenate(groups)]
    assert (np.diff(ordered) <= 0).all()
    for group in groups:
        assert len(group) <= max_rows
        assert len(group) == 1 or lengths[group].max() * len(group) <= max_tokens
    costs = []
    for cuts in range(2 ** (len(lengths) - 1)):  # every way to cut the sorted sequences
        edges = [0, *(i + 1 for i in range(len(lengths) - 1) if cuts >> i & 1), len(lengths)]
        parts = [ordered[a:b] for a, b in itertools.pairwise(edges)]
        if all(len(p) <= max_rows and (len(p) == 1 or p[0] * len(p) <= max_tokens) for p in parts):
            costs.append(sum(p[0] * len(p) + 20 for p in parts))
    assert padded_tokens(lengths, groups) + 20 * len(groups) == min(costs)


def test_micro_batches_weigh_their_targets(prompts: PromptBuilder):
    for on_inputs in (False, True):
        examples = training_prompts(prompts, on_inputs=on_inputs)
        batch = examples.__getitems__(list(range(8)))
        rows = [len(m["input_ids"]) for m in batch]
        assert sum(rows) == 8 and max(rows) <= 3
        assert sum(m["weight"] for m in batch) == pytest.approx(1)
        for micro_batch in batch:
            assert (micro_batch["input_ids"][:, -1] == 1).all()
            assert micro_batch["attention_mask"][:, -1].all()


def test_loss_equals_stock_and_micro_batches_change_nothing(
    prompts: PromptBuilder, tiny_llama: Path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for on_inputs in (False, True):
        whole = training_prompts(prompts, max_rows=8, on_inputs=on_inputs)
        parts = training_prompts(prompts, max_rows=3, on_inputs=on_inputs)
        (batch,) = whole.__getitems__(list(range(8)))
        ours = response_loss(model, batch)
        split = sum(
            response_loss(model, m) * m["weight"] for m in parts.__getitems__(list(range(8)))
        )
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        total, count = 0.0, 0
        for row, real in zip(ids, mask):  # each prompt alone and unpadded
            row = row[real][None]
            labels = row.clone()
            if not on_inputs:
                labels[:, :-2] = -100
            targets = (labels[:, 1:] != -100).sum().item()
            total += model(input_ids=row, labels=labels).loss.item() * targets
            count += targets
        assert ours.item() == pytest.approx(total / count, rel=1e-5)
        assert split.item() == pytest.approx(total / count, rel=1e-5)


def padded(sequences: list[np.ndarray], side: str) -> dict[str, torch.Tensor]:
    longest = max(map(len, sequences))
    ids = torch.ones(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if side == "left" else 0
        ids[row, start : start + len(sequence)] = torch.from_numpy(sequence)
        mask[row, start : start + len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def stock_scores(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], label_ids: torch.Tensor
) -> torch.Tensor:
    """The labels' logits as stock transformers computes them for a padded batch."""
    mask = batch["attention_mask"]
    last = mask.cumsum(1).argmax(1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=places).logits
    return logits[torch.arange(len(mask)), last][:, label_ids]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_scores_equal_full_logits(
    prompts: PromptBuilder, tiny_llama: Path, batch_size: int, side: str
):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    rng = np.random.default_rng(0)
    sequences = [
        prompts.encode(rng.integers(1, 31, rng.integers(1, 9)), rng.integers(1, 31, 20))
        for _ in range(16)
    ]
    label_ids = torch.from_numpy(prompts.label_ids)
    groups = [sequences[i : i + batch_size] for i in range(0, 16, batch_size)]
    with torch.no_grad():
        stock = torch.cat([stock_scores(model, padded(x, side), label_ids) for x in groups])
        for batches in ([padded(x, side) for x in groups], [pad_left(x, 1) for x in groups]):
            ours = torch.cat([candidate_scores(model, x, label_ids) for x in batches])
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_4bit", [True, False])
def test_lora_step_and_saved_adapter(
    prompts: PromptBuilder, tiny_llama: Path, tmp_path: Path, in_4bit: bool
):
    torch.manual_seed(0)
    base = load_causal_lm(tiny_llama, device=CPU, in_4bit=in_4bit)
    projection = base.model.layers[0].self_attn.q_proj
    assert type(projection).__name__ == ("Linear4bit" if in_4bit else "Linear")
    if in_4bit:
        state = projection.weight.quant_state
        assert state.quant_type == "nf4" and state.nested
        assert projection.compute_dtype == torch.bfloat16
    model = add_lora(base, **LORA)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 2 and all("lora_" in name for name in trainable)
    frozen = projection.weight.clone()
    optimizer = build_optimizer(
        model, "AdamW", lr=1e-2, weight_decay=0.0, epsilon=1e-8, paged=False
    )
    (batch,) = training_prompts(prompts, max_rows=8).__getitems__(list(range(8)))
    losses = []
    for _ in range(8):
        loss = response_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(frozen, projection.weight)

    model.eval()
    label_ids = torch.from_numpy(prompts.label_ids)
    with torch.no_grad():
        scores = candidate_scores(model, batch, label_ids)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    fresh = load_causal_lm(tiny_llama, device=CPU, in_4bit=in_4bit)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(candidate_scores(loaded, batch, label_ids), scores)


def test_scores_with_an_adapter_on_the_output_layer(prompts: PromptBuilder, tiny_llama: Path):
    options = LORA | {"target_modules": ("q_proj", "lm_head")}
    model = add_lora(load_causal_lm(tiny_llama, device=CPU, in_4bit=False), **options).eval()
    label_ids = torch.from_numpy(prompts.label_ids)
    batch = pad_left([prompts.encode([1, 2], range(1, 21)), prompts.encode([3], range(2, 22))], 1)
    with torch.no_grad():
        before = candidate_scores(model, batch, label_ids)
        for name, parameter in model.named_parameters():
            if "lm_head.lora_B" in name:
                parameter.normal_()
        scores = candidate_scores(model, batch, label_ids)
        assert (scores - before).abs().max() > 0.1
        stock = stock_scores(model, batch, label_ids)
    torch.testing.assert_close(scores, stock.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_4bit", [True, False])
def test_evaluation_in_between_changes_no_gradient(
    prompts: PromptBuilder, tiny_llama: Path, in_4bit: bool
):
    model = add_lora(load_causal_lm(tiny_llama, device=CPU, in_4bit=in_4bit), **LORA)
    (batch,) = training_prompts(prompts, max_rows=8).__getitems__(list(range(8)))

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        response_loss(model, batch).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    with torch.inference_mode():
        candidate_scores(model.eval(), batch, torch.from_numpy(prompts.label_ids))
    assert any(g.abs().max() > 0 for g in before)
    for gradient, later in zip(before, gradients()):
        assert torch.equal(gradient, later)


def test_gradient_checkpointing_changes_no_gradient(prompts: PromptBuilder, tiny_llama: Path):
    (batch,) = training_prompts(prompts, max_rows=8).__getitems__(list(range(8)))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = load_causal_lm(tiny_llama, device=CPU, in_4bit=False)
        model = add_lora(base, **LORA).train()
        if checkpointing:
            recompute_activations(model)
        assert getattr(base.model, "gradient_checkpointing", False) == checkpointing
        response_loss(model, batch).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_by_blocks_has_stock_gradients(
    tiny_llama: Path, padded: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "BLOCK", 16)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    embeddings = torch.randn(3, 50, 64, dtype=torch.float64)
    mask = torch.ones(3, 50, dtype=torch.int64)
    if padded:
        mask[0, :20] = 0
        mask[1, :1] = 0
    results = []
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        inputs = embeddings.clone().requires_grad_()
        hidden = model.model(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        hidden = hidden * mask[:, :, None]
        hidden.sin().sum().backward()
        weights = [p.grad for p in model.model.parameters() if p.grad is not None]
        results.append([hidden.detach(), inputs.grad, *weights])
    assert len(results[0]) > 10
    for stock, ours in zip(*results):
        torch.testing.assert_close(ours, stock)
    assert load_causal_lm(tiny_llama, device=CPU, in_4bit=False).config._attn_implementation == (
        attention.NAME
    )


def toy_candidates() -> Candidates:
    return Candidates(
        items=np.array([[4, 5, 6], [7, 8, 9], [1, 2, 3]], dtype=np.int32),
        scores=np.array([[3, 2, 1]] * 3, dtype=np.float32),
        labels=np.array([6, 10, 1], dtype=np.int32),
        label_ranks=np.array([3, 25, 1], dtype=np.int32),
    )


def test_ranks_of_two_stages():
    candidates = toy_candidates()
    users = candidates.retrieved
    assert users.tolist() == [0, 2]
    scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.2, 0.3]], dtype=np.float32)
    ranking = reranked(candidates, users, scores)
    assert ranking.items.tolist() == [[5, 6, 4], [3, 1, 2]]  # equal scores keep their order
    assert ranking.label_ranks.tolist() == [2, 2]
    assert two_stage_ranks(candidates, users, ranking).tolist() == [2, 25, 2]
    assert candidates.label_ranks.tolist() == [3, 25, 1]


def test_fusion_lies_between_the_stages_and_is_chosen_on_validation():
    candidates = toy_candidates()
    users = candidates.retrieved
    scores = np.array([[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]], dtype=np.float32)  # third, always

    def items(weight: float) -> list:
        return reranked(
            candidates, users, fused_scores(candidates, users, scores, weight)
        ).items.tolist()

    assert items(0) == candidates.items[users].tolist()
    assert items(1) == reranked(candidates, users, scores).items.tolist()
    fused = fused_scores(candidates, users, scores, 0.5)[0]
    ours = np.exp([0, 0, 9]) / np.exp([0, 0, 9]).sum()
    theirs = np.exp([3, 2, 1]) / np.exp([3, 2, 1]).sum()
    assert fused == pytest.approx(0.5 * np.log(ours) + 0.5 * np.log(theirs))
    # User 0 has the answer third, user 2 first: MRR@3 is the same for both orders and better for
    # neither, while a ranker that is right for both wins.
    right = np.array([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0]], dtype=np.float32)
    assert fusion_weight(candidates, users, right, "MRR@3") > 0
    wrong = np.array([[0.0, 9.0, 0.0], [0.0, 9.0, 0.0]], dtype=np.float32)
    assert fusion_weight(candidates, users, wrong, "MRR@3") == 0


def test_fusion_where_an_item_cannot_be_recommended():
    candidates = toy_candidates()
    candidates.scores[0, 2] = -np.inf
    scores = np.array([[0.0, 1.0, 9.0]], dtype=np.float32)
    for weight in (0.0, 0.5, 1.0):
        assert not np.isnan(fused_scores(candidates, np.array([0]), scores, weight)).any()


def test_evaluation_prompts_cover_retrieved_users(prompts: PromptBuilder):
    data = make_data([6, 4, 9], num_items=30)
    items = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.int32)
    labels = data.answers("test")
    items[0, 1], items[2, 0] = labels[0], labels[2]
    items[1] = [x for x in range(1, 31) if x != labels[1]][:3]
    candidates = Candidates(items, np.zeros((3, 3), np.float32), labels, np.ones(3, np.int32))
    dataset = EvaluationPrompts(data, "test", candidates, prompts, max_history=4, pad_id=1)
    assert sorted(dataset.users.tolist()) == [0, 2]
    batch = dataset.__getitems__([0, 1])
    for user, ids, mask in zip(batch["users"], batch["input_ids"], batch["attention_mask"]):
        history = data.item_ids[data.offsets[user] : data.offsets[user + 1] - 1][-4:]
        assert ids[mask.bool()].tolist() == prompts.encode(history, items[user]).tolist()


def test_loss_over_the_letters_alone(prompts: PromptBuilder, tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    (batch,) = training_prompts(prompts, max_rows=8).__getitems__(list(range(8)))
    label_ids = torch.from_numpy(prompts.label_ids)
    found = response_loss(model, batch, label_ids=label_ids)
    shorter = {k: batch[k][:, :-2] for k in ("input_ids", "attention_mask")}
    scores = candidate_scores(model, shorter, label_ids)
    labels = [prompts.label_ids.tolist().index(x) for x in batch["input_ids"][:, -2].tolist()]
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor(labels))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_scores_are_averaged_over_orders(prompts: PromptBuilder, tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    accelerator = Accelerator(cpu=True)
    data = make_data([6, 5, 9, 4])
    rng = np.random.default_rng(0)
    labels = data.answers("test")
    items = np.stack([rng.permutation(30)[:20] + 1 for _ in labels])
    items[[0, 2, 3], [3, 0, 19]] = labels[[0, 2, 3]]  # user 1's answer may be absent
    ranks = np.ones(4, dtype=np.int32)
    candidates = Candidates(items, -np.cumsum(np.ones((4, 20)), axis=1), labels, ranks)
    label_ids = torch.from_numpy(prompts.label_ids)

    def score(permutations: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        dataset = EvaluationPrompts(
            data, "test", candidates, prompts, max_history=5, pad_id=1, permutations=permutations
        )
        loader = accelerator.prepare(evaluation_loader(dataset, batch_size, 0))
        return score_users(model, loader, label_ids, "test")

    users, scores = score(3, 4)
    assert users.tolist() == candidates.retrieved.tolist()
    for user, averaged in zip(users, scores):
        history = data.item_ids[data.offsets[user] : data.offsets[user + 1] - 1][-5:]
        expected = np.zeros(20)
        for permutation in range(3):
            order = np.arange(20)
            if permutation:
                order = np.random.default_rng([0, user, permutation]).permutation(20)
            prompt = torch.from_numpy(prompts.encode(history, items[user][order]))[None]
            with torch.no_grad():
                logits = model(prompt).logits[0, -1, label_ids].numpy()
            expected[order] += logits / 3
        np.testing.assert_allclose(averaged, expected, atol=1e-4)
    alone = score(1, 4)[1]
    assert not np.allclose(alone, scores, atol=1e-3)
    model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="scores that are no numbers"):
        score(1, 4)


def test_activations_are_measured(tiny_llama: Path, capsys: pytest.CaptureFixture):
    def measured(**options: object) -> float:
        base = load_causal_lm(tiny_llama, device=CPU, in_4bit=False)
        return activation_bytes_per_token(add_lora(base, **(LORA | options)))

    model = add_lora(load_causal_lm(tiny_llama, device=CPU, in_4bit=False), **LORA)
    state = torch.get_rng_state()
    each = activation_bytes_per_token(model)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    # At least the inputs of the two layers' seven projections: 64 wide but for one of 128.
    assert 2 * 2 * (6 * 64 + 128) / 2 < each < 1e5
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # What more adapters keep: a float32 copy of their input each.
    assert measured(target_modules=every) > each + 4 * 2 * (64 * 4 + 128)
    assert measured(dropout=0.1) > each
    assert not needs_checkpointing(model, 100)
    assert needs_checkpointing(model, 10**12)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(": no gradient checkpointing") and len(said) == 2
    assert all(p.grad is None for p in model.parameters())
