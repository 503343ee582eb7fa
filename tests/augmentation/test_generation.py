"""Sampling of texts: resumable, constrained on request; and the file that holds them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from augmentation import generation
from augmentation.filters import extract_interactions, parse_items
from augmentation.generation import GeneratedText, generate, read_texts, save_texts
from augmentation.prompts import GenerationPrompts, IdPrompts, training_history
from datasets import SequenceDataset
from errors import ArgumentError, InputError, UserError
from tests.augmentation.helpers import make_prompts
from tests.helpers import make_data


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def small_data() -> SequenceDataset:
    return make_data([4, 9, 5, 6, 20, 7], num_items=40)


@pytest.fixture(scope="module")
def short_prompts(prompts: IdPrompts, small_data: SequenceDataset) -> IdPrompts:
    return make_prompts(prompts.tokenizer, small_data, max_response_len=24)


@pytest.fixture()
def arguments(
    model: PreTrainedModel, short_prompts: IdPrompts, small_data: SequenceDataset, tmp_path: Path
) -> dict[str, Any]:
    return {
        "model": model,
        "prompts": short_prompts,
        "batches": GenerationPrompts(small_data, short_prompts, 2),
        "texts": {},
        "path": tmp_path / "generated.jsonl",
        "constrained": False,
        "temperature": 1.0,
        "top_p": 0.9,
        "seed": 3,
        "save_seconds": 60,
        "if_out_of_memory": "buy a larger one",
    }


@pytest.mark.parametrize("constrained", [False, True])
def test_generation_resumes_to_the_same_texts(constrained: bool, arguments: dict[str, Any]):
    arguments["constrained"] = constrained
    texts = generate(**arguments)
    assert sorted(texts) == list(range(6)) and read_texts(arguments["path"]) == texts
    content = arguments["path"].read_bytes()
    # Users of a batch that was interrupted in between are sampled again with their batch.
    users = arguments["batches"].batches
    started = {int(user): texts[int(user)] for user in (*users[1], users[2][0])}
    arguments["path"].unlink()
    assert generate(**arguments | {"texts": started}) == texts
    assert arguments["path"].read_bytes() == content
    assert generate(**arguments | {"seed": 4}) != texts


def test_constrained_texts_list_items(arguments: dict[str, Any], small_data: SequenceDataset):
    texts = generate(**arguments | {"constrained": True})
    for user, text in texts.items():
        items, dropped = parse_items(text, small_data.num_items)
        assert items and set(dropped) <= {"cut"}
        assert not set(items) & set(training_history(small_data, user).tolist())
    _, dropped = extract_interactions(texts, small_data)
    assert set(dropped) <= {"cut"}


def test_texts_do_not_depend_on_other_batches(arguments: dict[str, Any]):
    texts = generate(**arguments)
    users = arguments["batches"].batches[0].tolist()
    kept = {user: GeneratedText("1 2", True) for user in texts if user not in users}
    again = generate(**arguments | {"texts": kept})
    assert {user: again[user] for user in users} == {user: texts[user] for user in users}
    assert kept.items() <= again.items()


def test_texts_are_saved_when_generation_fails(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    sample_batch, calls = generation._sample_batch, []

    def fails_at_the_second(*positional: Any, **options: Any) -> dict[int, GeneratedText]:
        calls.append(positional)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample_batch(*positional, **options)

    monkeypatch.setattr(generation, "_sample_batch", fails_at_the_second)
    with pytest.raises(UserError, match="buy a larger one"):
        generate(**arguments)
    assert list(read_texts(arguments["path"])) == sorted(arguments["batches"].batches[0].tolist())


def test_constraints_name_their_argument(
    arguments: dict[str, Any], short_prompts: IdPrompts, monkeypatch: pytest.MonkeyPatch
):
    ambiguous = [*short_prompts.items[:-1], np.tile(short_prompts.items[1], 2)]
    monkeypatch.setattr(short_prompts, "first_items", ambiguous)
    monkeypatch.setattr(short_prompts, "later_items", ambiguous)
    with pytest.raises(ArgumentError, match="where an item's number ends") as error:
        generate(**arguments | {"constrained": True})
    assert error.value.argument == "constrained"


def test_file_of_texts(tmp_path: Path):
    path = tmp_path / "generated.jsonl"
    assert read_texts(path) == {}
    texts = {3: GeneratedText(" 12 é\n\u2028", False), 0: GeneratedText("", True)}
    save_texts(path, texts)
    assert read_texts(path) == texts
    assert [json.loads(line) for line in path.open(encoding="utf-8")] == [
        {"user": 0, "text": "", "ended": True},
        {"user": 3, "text": " 12 é\n\u2028", "ended": False},
    ]


@pytest.mark.parametrize("line", ['{"user": 0, "text": "1', '{"user": 0, "text": "1"}', "3"])
def test_damaged_files_of_texts_are_refused(line: str, tmp_path: Path):
    path = tmp_path / "generated.jsonl"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match="is damaged"):
        read_texts(path)
