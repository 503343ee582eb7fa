"""LLM4IDRec: prompts of numbers, constrained sampling, filters, merging, exports, the script."""

import json
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from augmentation.exports import export
from augmentation.filters import REASONS, first_filter, judge, parse_items, plausible_rank
from augmentation.generation import Catalogue, CatalogueProcessor, Written
from augmentation.merge import Interactions, load_augmented, merge, save_augmented
from augmentation.prompts import GenerationPrompts, IdPrompts, TrainingExamples, training_history
from config import UserError
from dataloader.ranker import IGNORED
from dataloader.retriever import TrainingWindows
from datasets import SequenceDataset
from model.hub import load_tokenizer
from model.retriever import load_retriever
from tests.conftest import contents, run_script, toy_interactions
from tests.test_models import make_data
from tests.test_scripts import interrupt
from trainer import folder

EOS = 1
FLAGS = [
    "--device", "cpu", "--max_steps", 6, "--lora_val_iterations", 3, "--train_batch_size", 8,
    "--max_new_tokens", 24, "--test_batch_size", 16,
]  # fmt: skip


def make_prompts(tokenizer: Tokenizer, data: SequenceDataset, **options: int) -> IdPrompts:
    limits = {"max_text_len": 512, "max_answer_len": 100} | options
    return IdPrompts(
        tokenizer, num_users=data.num_users, num_items=data.num_items, eos_id=EOS, **limits
    )


@pytest.fixture(scope="module")
def data() -> SequenceDataset:
    rng = np.random.default_rng(0)
    return make_data(rng.integers(4, 30, 25).tolist(), num_items=2500)


@pytest.fixture(scope="module")
def prompts(tiny_llama: Path, data: SequenceDataset) -> IdPrompts:
    return make_prompts(load_tokenizer(tiny_llama), data)


def shuffle_held_out(data: SequenceDataset, splits: tuple[str, ...]) -> SequenceDataset:
    """The same data with other users' held-out items."""
    items = data.item_ids.copy()
    for split in splits:
        items[data.history_ends(split)] = np.roll(data.answers(split), 1)
    return replace(data, item_ids=items)


# Prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-2", "smollm2"])
def test_prompts_and_answers_equal_the_tokenised_text(name: str, request: pytest.FixtureRequest):
    if name == "smollm2":
        folder = request.getfixturevalue("smollm2")
    else:
        folder = request.getfixturevalue("shared") / "tokenizers" / name
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    data = make_data([5] * 1200, num_items=12_000)
    prompts = make_prompts(tokenizer, data)
    rng = np.random.default_rng(0)
    for _ in range(300):
        user = int(rng.integers(data.num_users))
        history, answer = (rng.integers(1, 12_001, rng.integers(1, 15)) for _ in range(2))
        found = np.append(prompts.encode(user, history), prompts.answer(answer))
        text = prompts.text(user, history) + "".join(f" {item}" for item in answer)
        assert found.tolist() == [*tokenizer.encode(text).ids, EOS]


def test_long_histories_lose_their_oldest_items(tiny_llama: Path, data: SequenceDataset):
    prompts = make_prompts(load_tokenizer(tiny_llama), data, max_text_len=140, max_answer_len=40)
    whole = make_prompts(prompts.tokenizer, data)
    history = list(range(1000, 1030))
    found = prompts.encode(3, history)
    kept = next(n for n in range(30, 0, -1) if len(whole.encode(3, history[-n:])) <= 100)
    assert 1 < kept < 30 and found.tolist() == whole.encode(3, history[-kept:]).tolist()
    answer = prompts.answer(history)
    assert len(answer) <= 40 < len(answer) + len(prompts.items[1000])
    assert answer[-1] == EOS and whole.answer(history).tolist()[: len(answer) - 1] == (
        answer[:-1].tolist()
    )


def make_examples(data: SequenceDataset, prompts: IdPrompts) -> TrainingExamples:
    return TrainingExamples(
        data, prompts, local_examples=4, local_items=6, max_rows=4, max_tokens=None, seed=0
    )


def test_examples_are_the_users_training_items(data: SequenceDataset, prompts: IdPrompts):
    examples = make_examples(data, prompts)
    assert len(examples) == 5 * data.num_users
    for number in range(2 * len(examples)):
        user, history, answer = examples.example(number)
        real = training_history(data, user).tolist()
        items = [*history, *answer]
        assert len(history) and len(answer)
        if examples.is_global[number % len(examples)]:
            assert items == real
        else:
            assert len(items) == min(6, len(real)) and len(history) - len(answer) in (0, 1)
            assert not Counter(items) - Counter(real)
    first, again = (
        [examples.example(number + epoch)[1].tolist() for number in range(len(examples))]
        for epoch in (0, len(examples))
    )
    assert first != again


def test_held_out_items_change_no_prompt(data: SequenceDataset, prompts: IdPrompts):
    other = shuffle_held_out(data, ("val", "test"))
    assert (other.item_ids != data.item_ids).any()
    ours, theirs = make_examples(data, prompts), make_examples(other, prompts)
    for number in range(len(ours)):
        for mine, yours in zip(ours.example(number), theirs.example(number)):
            assert np.array_equal(mine, yours)
    pair = [GenerationPrompts(x, prompts, 4).prompts for x in (data, other)]
    assert all(np.array_equal(*x) for x in zip(*pair))


def test_targets_are_the_answers(data: SequenceDataset, prompts: IdPrompts):
    examples = make_examples(data, prompts)
    numbers = list(range(0, 40, 3))
    batches = examples.__getitems__(numbers)
    assert sum(batch["weight"] for batch in batches) == pytest.approx(1)
    found = Counter()
    for batch in batches:
        size = batch["targets"].shape[1]
        for row, targets in zip(batch["input_ids"], batch["targets"]):
            trained = targets != IGNORED
            assert trained[trained.int().argmax() :].all()  # the last ones of the row
            assert torch.equal(row[-size:][trained], targets[trained])
            found[tuple(targets[trained].tolist())] += 1
    answers = (prompts.answer(examples.example(number)[2]) for number in numbers)
    assert found == Counter(tuple(answer.tolist()) for answer in answers)


# Constrained sampling --------------------------------------------------------------------------


def test_catalogue_allows_items_and_nothing_else(prompts: IdPrompts, data: SequenceDataset):
    catalogue = Catalogue(prompts.items, EOS)
    rng = np.random.default_rng(0)
    for _ in range(200):
        state, tokens = Catalogue.START, []
        while state != Catalogue.END and len(tokens) < 60:
            token = int(rng.choice(catalogue.allowed(state)))
            state = catalogue.step(state, token)
            tokens.append(token)
        assert state != Catalogue.START and EOS not in tokens[:-1]
        text = prompts.tokenizer.decode([t for t in tokens if t != EOS])
        items, dropped = parse_items(Written(text, state == Catalogue.END), data.num_items)
        assert items and set(dropped) <= {"cut"}
    for item in (1, 9, 10, 999, 2500):  # and each of them
        state = Catalogue.START
        for token in prompts.items[item].tolist():
            assert token in catalogue.allowed(state)
            state = catalogue.step(state, token)
        assert EOS in catalogue.allowed(state)
    assert catalogue.allowed(Catalogue.END).tolist() == [EOS]


def test_catalogue_needs_tokens_that_show_an_items_end():
    items = [np.array([]), np.array([5]), np.array([5, 5])]  # 5 5 is two items or one
    with pytest.raises(UserError, match="--constrained"):
        Catalogue(items, EOS)


def test_processor_masks_each_row_by_what_it_has_written(prompts: IdPrompts, tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    catalogue = Catalogue(prompts.items, EOS)
    batch = torch.full((8, 3), 7)
    torch.manual_seed(0)
    output = model.generate(
        input_ids=batch, attention_mask=torch.ones_like(batch), do_sample=True, max_new_tokens=40,
        eos_token_id=EOS, pad_token_id=EOS, logits_processor=[CatalogueProcessor(catalogue, 3)],
    )  # fmt: skip
    rows = {tuple(row) for row in output[:, 3:].tolist()}
    assert len(rows) == 8
    for row in rows:
        state = Catalogue.START
        for token in row:
            assert token in catalogue.allowed(state)
            state = catalogue.step(state, token)


# Filters ---------------------------------------------------------------------------------------


@given(st.text(), st.booleans())
def test_any_text_is_parsed_and_every_word_counted(text: str, ended: bool):
    items, dropped = parse_items(Written(text, ended), 30)
    assert all(1 <= item <= 30 for item in items)
    assert set(dropped) <= {"cut", "malformed", "unknown"}
    words = text.replace(",", " ").replace(";", " ").split()
    assert len(items) + dropped.total() == len(words)


@given(st.lists(st.integers(1, 60)), st.sampled_from([" ", ", ", ";\n"]))
def test_numbers_are_found_in_any_list(numbers: list[int], separator: str):
    items, dropped = parse_items(Written(separator.join(map(str, numbers)), True), 30)
    assert items == [n for n in numbers if n <= 30] and dropped.total() == sum(
        n > 30 for n in numbers
    )


def test_first_filter_knows_training_items_only(data: SequenceDataset):
    user = 3
    had = training_history(data, user)
    val, test = data.answers("val")[user], data.answers("test")[user]
    new = next(i for i in range(1, 2501) if i not in data.item_ids)
    words = [had[0], new, "twelve", new, 2501, "007", val, test]
    held_out = [i for i in dict.fromkeys([int(val), int(test)]) if i not in had]
    text = " ".join(map(str, words)) + " 25"
    found, dropped = first_filter({user: Written(text, False), 1: Written("", True)}, data)
    assert found.users.tolist() == [user] * len(found.items)
    assert found.items.tolist() == [new, *held_out]
    assert dropped == {"cut": 1, "malformed": 2, "unknown": 1, "had": 1, "repeated": 1}
    assert set(dropped) <= set(REASONS)


def test_judge_ranks_after_the_training_items(retrieved: Path, toy_data: SequenceDataset):
    data = toy_data
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, data.num_users, 150)).astype(np.int32)
    written = Interactions(users, rng.integers(1, data.num_items + 1, 150).astype(np.int32))
    ranks, val_ranks = judge(retrieved, data, written, torch.device("cpu"))
    model = load_retriever(retrieved, data.num_items).model
    for user in range(data.num_users):
        history = training_history(data, user)
        ids = torch.from_numpy(history.astype(np.int64))
        with torch.no_grad():
            scores = model(ids, torch.arange(len(ids)), len(ids), torch.tensor([len(ids) - 1]))[0]
        scores[0], scores[ids] = -torch.inf, -torch.inf
        asked = [*written.items[users == user], data.answers("val")[user]]
        expected = [1 + int((scores > scores[item]).sum()) for item in asked]
        assert [*ranks[users == user], val_ranks[user]] == expected
    # What is judged never depends on the test, and on validation in this one number alone.
    other = shuffle_held_out(data, ("val", "test"))
    assert np.array_equal(judge(retrieved, other, written, torch.device("cpu")).ranks, ranks)
    other = shuffle_held_out(data, ("test",))
    assert np.array_equal(
        judge(retrieved, other, written, torch.device("cpu")).val_ranks, val_ranks
    )


def test_plausible_rank_lets_the_share_through():
    ranks = np.array([7, 1, 30, 2, 5, 100, 8, 9, 3, 4])
    for share in (0.1, 0.5, 0.75, 0.99):
        highest = plausible_rank(ranks, share)
        assert (ranks <= highest).mean() >= share > (ranks < highest).mean()


# Merging ---------------------------------------------------------------------------------------


def written_for(data: SequenceDataset) -> Interactions:
    rng = np.random.default_rng(1)
    users = np.sort(rng.integers(0, data.num_users, 60)).astype(np.int32)
    return Interactions(users, rng.integers(1, data.num_items + 1, 60).astype(np.int32))


@pytest.mark.parametrize("place", ["before", "after"])
def test_merging_changes_training_alone(data: SequenceDataset, place: str):
    written = written_for(data)
    merged = merge(data, written, place)
    for user in range(data.num_users):
        real = training_history(data, user).tolist()
        new = written.items[written.users == user].tolist()
        expected = new + real if place == "before" else real + new
        assert training_history(merged, user).tolist() == expected
    for split in ("val", "test"):
        assert np.array_equal(merged.answers(split), data.answers(split))
    counts = np.bincount(written.items, minlength=data.num_items + 1)
    assert np.array_equal(merged.training_counts(), data.training_counts() + counts)
    windows = TrainingWindows(merged, 100, 1.0)
    labels = windows.__getitems__(list(range(len(windows))))[0]["labels"]
    assert Counter(labels.tolist()) == Counter(
        {item: n for item, n in enumerate(merged.training_counts().tolist()) if n}
    )
    nothing = merge(data, Interactions(*(np.empty(0, np.int32) for _ in range(2))), place)
    assert np.array_equal(nothing.item_ids, data.item_ids)
    assert np.array_equal(nothing.offsets, data.offsets)


def test_file_of_interactions(data: SequenceDataset, tmp_path: Path):
    written = written_for(data)
    path = tmp_path / "augmented.npz"
    save_augmented(path, written, data.fingerprint)
    for found, expected in zip(load_augmented(tmp_path, data), written):
        assert np.array_equal(found, expected) and found.dtype == np.int32
    with pytest.raises(UserError, match="another data set"):
        load_augmented(tmp_path, replace(data, fingerprint="other"))
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_augmented(tmp_path, data)
    for users, items, says in (
        ([0, 1], [1], "one each"),
        ([1, 0], [1, 1], "ascend"),
        ([-1, 0], [1, 1], "ascend"),
        ([0, 25], [1, 1], "below 25"),
        ([0, 1], [1, 0], "from 1 to 2500"),
        ([0, 1], [1, 2501], "from 1 to 2500"),
        ([0.0, 1.0], [1, 1], "integers"),
    ):
        save_augmented(path, Interactions(np.array(users), np.array(items)), data.fingerprint)
        with pytest.raises(UserError, match=says):
            load_augmented(tmp_path, data)
    path.unlink()
    with pytest.raises(UserError, match=r"no augmented\.npz there"):
        load_augmented(tmp_path, data)


def test_exports_hold_every_interaction_once(data: SequenceDataset, tmp_path: Path):
    names = [f'user "{n}"\t' for n in range(data.num_users)]
    merged = merge(replace(data, user_names=names), written_for(data), "before")
    export(merged, tmp_path / "exports", "toy")
    recbole = tmp_path / "exports" / "recbole" / "toy"
    header, *rows = (recbole / "toy.inter").read_text().splitlines()
    assert header == "user_id:token\titem_id:token\ttimestamp:float"
    assert len(rows) == len(merged.item_ids) and all(row.count("\t") == 2 for row in rows)
    by_user = [[r.split("\t") for r in rows if r.startswith(f"user '{n}'\t")] for n in range(25)]
    for user, found in enumerate(by_user):
        sequence = merged.item_ids[merged.offsets[user] : merged.offsets[user + 1]]
        assert [row[1] for row in found] == [merged.item_names[item] for item in sequence]
        assert [int(row[2]) for row in found] == list(range(len(sequence)))
    header, *titles = (recbole / "toy.item").read_text().splitlines()
    assert header == "item_id:token\ttitle:token_seq" and len(titles) == data.num_items
    selfrec = tmp_path / "exports" / "selfrec"
    train = [line.split() for line in (selfrec / "train.txt").read_text().splitlines()]
    assert len(train) == merged.training_counts().sum()
    assert Counter(int(item) for _, item, _ in train) == Counter(
        {item: n for item, n in enumerate(merged.training_counts().tolist()) if n}
    )
    test = (selfrec / "test.txt").read_text().splitlines()
    assert test == [f"{user} {item} 1" for user, item in enumerate(data.answers("test"))]
    for split, pairs in (("train", train), ("test", [line.split() for line in test])):
        lines = (selfrec / f"sequences_{split}.txt").read_text().splitlines()
        found = [
            [user, item, "1"]
            for user, items in (line.split(":") for line in lines)
            for item in items.split()
        ]
        assert found == pairs


@pytest.mark.parametrize("names", [("NA", "b"), ('a"', "a'"), ("a  b", "a b")])
def test_exports_number_what_could_be_mistaken(names: tuple, data: SequenceDataset, tmp_path: Path):
    users = [*names, *(f"u{n}" for n in range(2, data.num_users))]
    export(replace(data, user_names=users), tmp_path / "exports", "toy")
    table = pd.read_csv(tmp_path / "exports" / "recbole" / "toy" / "toy.inter", sep="\t")
    sizes = table.groupby("user_id:token").size()  # pandas leaves out what it takes for missing
    assert sizes.tolist() == np.diff(data.offsets).tolist()


# The script ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def augmented(toy_flags: list, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the toy data with a model that knows nothing."""
    run = tmp_path_factory.mktemp("augmentation") / "free"
    done = run_script(
        "augment_data.py", *toy_flags, *FLAGS, "--llm_base_model", tiny_llama,
        "--export_root", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "write: 100%" in done.stderr and "numbers written for 60 users" in done.stdout
    return run


def test_augmentation_writes_the_contract(augmented: Path):
    assert sorted(path.name for path in augmented.iterdir()) == [
        "adapter", "augmentation.json", "augmented.npz", "config.json", "exports",
        "generated.jsonl", "log.jsonl",
    ]  # fmt: skip
    written = [json.loads(line) for line in (augmented / "generated.jsonl").open()]
    assert [record["user"] for record in written] == list(range(60))
    counts = json.loads((augmented / "augmentation.json").read_text())
    assert counts["written"] == counts["kept"] + sum(counts["dropped"].values()) > 0
    assert list(counts["dropped"]) == list(REASONS) and counts["valid_share"] < 1
    log = [json.loads(line) for line in (augmented / "log.jsonl").open()]
    assert [record["step"] for record in log] == [3, 6]
    assert log[1]["val_log_likelihood"] > log[0]["val_log_likelihood"]


def test_constrained_sampling_reuses_the_model_and_feeds_a_retriever(
    augmented: Path, retrieved: Path, toy_flags: list, tiny_llama: Path, tmp_path: Path
):
    run = tmp_path / "constrained"
    flags = [*toy_flags, *FLAGS, "--llm_base_model", tiny_llama, "--constrained", "true"]
    done = run_script("augment_data.py", *flags, "--reuse", augmented, "--export_root", run)
    assert done.returncode == 0, done.stderr
    assert "adapter: taken from" in done.stdout and "generated.jsonl: taken" not in done.stdout
    assert contents(run / "adapter") == contents(augmented / "adapter")
    counts = json.loads((run / "augmentation.json").read_text())
    assert counts["valid_share"] == 1 and counts["kept"] > 60

    judged = tmp_path / "judged"
    flags += ["--retriever_path", retrieved]
    done = run_script("augment_data.py", *flags, "--reuse", run, "--export_root", judged)
    assert done.returncode == 0, done.stderr
    assert "generated.jsonl: taken from" in done.stdout
    found = json.loads((judged / "augmentation.json").read_text())
    assert found["written"] == counts["written"] and found["plausible_rank"] >= 1
    assert found["kept"] + found["dropped"]["implausible"] == counts["kept"]
    assert 0 < found["kept"] < counts["kept"]

    retriever = tmp_path / "retriever"
    done = run_script(
        "train_retriever.py", *toy_flags, "--device", "cpu", "--max_steps", 60,
        "--val_iterations", 30, "--train_batch_size", 16, "--augmented", judged,
        "--export_root", retriever,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (
        np.load(retriever / "candidates.npz", allow_pickle=False) as ours,
        np.load(retrieved / "candidates.npz", allow_pickle=False) as theirs,
    ):
        for split in ("val", "test"):
            assert np.array_equal(ours[f"{split}_labels"], theirs[f"{split}_labels"])
            assert not np.array_equal(ours[f"{split}_items"], theirs[f"{split}_items"])
        # What was written for a user is no history in evaluation: it can be recommended.
        candidates = ours["test_items"]
        with np.load(judged / "augmented.npz", allow_pickle=False) as file:
            written = Interactions(file["users"], file["items"])
        assert any(item in candidates[user] for user, item in zip(*written))


def test_interrupted_augmentation_resumes_to_the_same_bytes(
    augmented: Path, toy_flags: list, tiny_llama: Path, tmp_path: Path
):
    run = tmp_path / "run"
    flags = [
        *toy_flags, *FLAGS, "--llm_base_model", tiny_llama, "--save_seconds", 0,
        "--export_root", run,
    ]  # fmt: skip
    interrupt("augment_data.py", *flags, when=run / "checkpoint.safetensors")
    before = contents(run)
    done = run_script("augment_data.py", *flags)
    assert done.returncode == 2 and "--resume true goes on" in done.stderr
    assert contents(run) == before
    flags += ["--resume", "true"]
    found = interrupt("augment_data.py", *flags, when=run / "generated.jsonl", how=signal.SIGTERM)
    assert found == (143, "interrupted: the same command with --resume true goes on")
    assert 0 < len((run / "generated.jsonl").read_text().splitlines()) < 60
    other = run_script("augment_data.py", *flags, "--top_p", 0.5)
    assert other.returncode == 2 and "other flags" in other.stderr
    done = run_script("augment_data.py", *flags)
    assert done.returncode == 0, done.stderr
    assert contents(run) == contents(augmented)
    done = run_script("augment_data.py", *flags)
    assert done.returncode == 0 and "nothing to resume" in done.stdout


def test_a_checkpoint_alone_is_gone_on_with(tmp_path: Path):
    assert not folder.is_started(tmp_path, ("adapter",), "mine")
    (tmp_path / folder.CHECKPOINT).touch()
    (tmp_path / "config.json").write_text('{"fingerprint": "mine"}')
    assert folder.is_started(tmp_path, ("adapter",), "mine")
    with pytest.raises(UserError, match="other flags"):
        folder.is_started(tmp_path, ("adapter",), "another")


def test_held_out_items_change_nothing_that_is_written(
    augmented: Path, toy: dict[str, Path], tiny_llama: Path, tmp_path: Path
):
    """The last two items of all users change places; the catalogue stays."""
    rows = toy_interactions()
    by_user: dict[str, list[tuple]] = {}
    for row in rows:
        by_user.setdefault(row[0], []).append(row)
    users = list(by_user)
    lines = ["user,item,timestamp"]
    for user, lender in zip(users, users[1:] + users[:1]):
        own = by_user[user]
        items = [item for _, item, _ in own[:-2]] + [item for _, item, _ in by_user[lender][-2:]]
        lines += [f"{user},{item},{row[2]}" for row, item in zip(own, items)]
    interactions = tmp_path / "interactions.csv"
    interactions.write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    done = run_script(
        "augment_data.py", "--dataset_code", "custom", "--interactions", interactions,
        "--items", toy["items"], "--cache_root", tmp_path / "cache", *FLAGS,
        "--llm_base_model", tiny_llama, "--export_root", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = contents(run), contents(augmented)
    same = {name for name in ours if ours[name] == theirs[name]}
    assert {"generated.jsonl", "log.jsonl", "augmentation.json"} <= same
    assert "adapter/adapter_model.safetensors" in same
    assert "augmented.npz" not in same  # it names the data it belongs to
    with np.load(run / "augmented.npz") as mine, np.load(augmented / "augmented.npz") as yours:
        assert np.array_equal(mine["users"], yours["users"])
        assert np.array_equal(mine["items"], yours["items"])
