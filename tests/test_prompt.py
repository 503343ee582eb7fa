"""Prompts from cached tokens equal the tokenised text; labels are what follows the heading."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from config import RankerConfig, UserError
from dataloader.prompt import LABELS, PromptBuilder
from datasets import SequenceDataset, load_dataset
from datasets.base import Filters
from model.hub import load_tokenizer

DEFAULTS = RankerConfig(dataset_code="ml-100k")


def make_builder(tokenizer: Tokenizer, titles: list[str], **options: object) -> PromptBuilder:
    arguments = {
        "instruction": DEFAULTS.llm_system_template,
        "input_template": DEFAULTS.llm_input_template,
        "num_candidates": 20,
    }
    return PromptBuilder(tokenizer, titles, **(arguments | options))


def read_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=["llama-2", "smollm2"])
def tokenizer_folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2")
    return request.getfixturevalue("shared") / "tokenizers" / "llama-2"


def random_prompts(data: SequenceDataset, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        (
            rng.integers(1, data.num_items + 1, rng.integers(1, 21)),
            rng.choice(np.arange(1, data.num_items + 1), rng.integers(2, 21), replace=False),
        )
        for _ in range(size)
    ]


@pytest.mark.parametrize("code", ["ml-100k", "beauty", "games"])
def test_prompts_equal_tokenised_text(
    code: str, tokenizer_folder: Path, shared: Path, tmp_path: Path
):
    from transformers import AutoTokenizer

    data = load_dataset(
        code, data_root=str(shared / "data"), cache_root=str(tmp_path), filters=Filters()
    )
    builder = make_builder(read_tokenizer(tokenizer_folder), data.titles)
    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    for history, candidates in random_prompts(data, 1000):
        text = builder.text(history, candidates)
        assert builder.encode(history, candidates).tolist() == stock(text)["input_ids"]


def test_label_ids_are_the_tokens_after_the_heading(tokenizer_folder: Path):
    from transformers import AutoTokenizer

    builder = make_builder(read_tokenizer(tokenizer_folder), ["", "Heat (1995)", "Ran"])
    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    heading = builder.text([1], [1, 2])
    assert heading.endswith("\n\n### Response:\n")
    for label, token in zip(LABELS, builder.label_ids):
        assert stock(heading + label)["input_ids"] == [*stock(heading)["input_ids"], token]
    if "llama-2" in str(tokenizer_folder):
        assert builder.label_ids[0] == 29909  # and not 319, "A" on its own


def test_text(tiny_llama: Path):
    builder = make_builder(read_tokenizer(tiny_llama), ["", "Heat (1995)", "Ran", "Up"])
    assert builder.text([3, 1], [2, 1]) == (
        "### Instruction:\nGiven user history in chronological order, recommend an item from the "
        "candidate pool with its index letter.\n\n"
        "### Input:\nUser history: (1) Up \n (2) Heat (1995); \n "
        "Candidate pool: (A) Ran \n (B) Heat (1995)\n\n### Response:\n"
    )


@pytest.mark.parametrize("template", ["{}{}", "Had {}. Choose: {} Now!", "H:{}\nC: {}"])
def test_other_templates(template: str, tokenizer_folder: Path):
    titles = ["", "Heat (1995)", "Ran", "Up; down", "What?", "Ça va (Été)", "日本"]
    tokenizer = read_tokenizer(tokenizer_folder)
    builder = make_builder(tokenizer, titles, input_template=template)
    for history, candidates in (([1], [2, 3]), ([4, 5, 6], [6, 1, 2]), ([3, 4], [5, 4])):
        ids = tokenizer.encode(builder.text(history, candidates)).ids
        assert builder.encode(history, candidates).tolist() == ids


def test_long_titles_are_cut(tokenizer_folder: Path):
    tokenizer = read_tokenizer(tokenizer_folder)
    titles = ["", "word " * 100, "日本語" * 50, "x" * 500, "short", "🎬🎥" * 40]
    builder = make_builder(tokenizer, [t.strip() for t in titles], max_title_len=8)
    assert builder.titles[4] == "short"
    for item in (1, 2, 3, 5):
        assert 1 <= len(builder._title[item]) <= 8
        assert titles[item].startswith(builder.titles[item]) and builder.titles[item]
    ids = tokenizer.encode(builder.text([1, 2, 3], [5, 4])).ids
    assert builder.encode([1, 2, 3], [5, 4]).tolist() == ids


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_first_character_of_many_tokens_stays(limit: int, tokenizer_folder: Path):
    tokenizer = read_tokenizer(tokenizer_folder)
    builder = make_builder(tokenizer, ["", "\U0001f600 film", "☃", "Ran"], max_title_len=limit)
    assert builder.titles[1].startswith("\U0001f600") and builder.titles[2] == "☃"
    ids = tokenizer.encode(builder.text([1, 2], [3, 1])).ids
    assert builder.encode([1, 2], [3, 1]).tolist() == ids


def test_padding_and_truncation_kept_in_a_file_are_left_out(tiny_llama: Path, tmp_path: Path):
    kept = read_tokenizer(tiny_llama)
    kept.enable_padding(length=64, pad_id=1, pad_token="</s>")
    kept.enable_truncation(16)
    kept.save(str(tmp_path / "tokenizer.json"))
    titles = ["", "Heat (1995)", "Ran"]
    ids = [
        make_builder(tokenizer, titles).encode([1, 2], [2, 1]).tolist()
        for tokenizer in (read_tokenizer(tiny_llama), load_tokenizer(tmp_path))
    ]
    assert ids[0] == ids[1]


def test_oldest_history_goes_first(tiny_llama: Path):
    tokenizer = read_tokenizer(tiny_llama)
    titles = ["", *(f"title {i}" for i in range(60))]
    limit = 400
    builder = make_builder(tokenizer, titles, num_candidates=3, max_text_len=limit)
    history = list(range(1, 51))
    ids = builder.encode(history, [51, 52, 53])
    assert len(ids) <= limit - 2
    text = builder.text(history, [51, 52, 53])
    assert "title 49; \n" in text and "(1) title 0 " not in text and "(C) title 52\n" in text
    kept = text.count(" \n (") - 2 + 1  # two separate the candidates
    free = make_builder(tokenizer, titles, num_candidates=3, max_text_len=100_000)
    assert len(free.encode(history[-kept - 1 :], [51, 52, 53])) > limit - 2  # one more is too much
    assert free.encode(history[-kept:], [51, 52, 53]).tolist() == ids.tolist()


def test_special_tokens_in_titles_are_text(tiny_llama: Path):
    tokenizer = read_tokenizer(tiny_llama)
    builder = make_builder(tokenizer, ["", "The </s> Story", "Ran"])
    assert tokenizer.token_to_id("</s>") not in builder.encode([1], [1, 2])


def test_too_many_candidates(tiny_llama: Path):
    with pytest.raises(UserError, match="62 labels"):
        make_builder(read_tokenizer(tiny_llama), ["", "a"], num_candidates=63)


def test_too_short_a_limit(tiny_llama: Path):
    with pytest.raises(UserError, match="--llm_max_text_len 50"):
        make_builder(read_tokenizer(tiny_llama), ["", "a", "b"], max_text_len=50)
