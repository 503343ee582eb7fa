"""Prompts assembled from cached token ids equal the tokenized text, for any titles."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dataloader.prompt import LETTERS, PromptBuilder, encode_pieces
from datasets import SequenceDataset
from datasets.titles import clean_title
from errors import ArgumentError
from model.hub import load_tokenizer
from tests.helpers import hostile_titles, load, make_builder, read_tokenizer


@pytest.fixture(scope="module", params=["llama-2", "smollm2"])
def tokenizer_folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2")
    return request.getfixturevalue("shared") / "tokenizers" / "llama-2"


# Token ids --------------------------------------------------------------------------------------


def random_prompts(data: SequenceDataset, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw histories of up to 20 items and up to 20 candidates."""
    rng = np.random.default_rng(0)
    return [
        (
            rng.integers(1, data.num_items + 1, rng.integers(1, 21)),
            rng.choice(np.arange(1, data.num_items + 1), rng.integers(2, 21), replace=False),
        )
        for _ in range(size)
    ]


@pytest.mark.parametrize("code", ["ml-100k", "beauty", "games"])
def test_prompts_equal_tokenized_text(
    code: str, tokenizer_folder: Path, shared: Path, tmp_path: Path
):
    from transformers import AutoTokenizer

    data = load(code, shared / "data", tmp_path)
    builder = make_builder(read_tokenizer(tokenizer_folder), data.titles)
    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    for history, candidates in random_prompts(data, 1000):
        text = builder.text(history, candidates)
        assert builder.encode(history, candidates).tolist() == stock(text)["input_ids"]


@pytest.mark.parametrize("template", ["{}{}", "Had {}. Choose: {} Now!", "H:{}\nC: {}"])
def test_other_templates(template: str, tokenizer_folder: Path):
    titles = ["", "Heat (1995)", "Ran", "Up; down", "What?", "Ça va (Été)", "日本"]
    tokenizer = read_tokenizer(tokenizer_folder)
    builder = make_builder(tokenizer, titles, input_template=template)
    for history, candidates in (([1], [2, 3]), ([4, 5, 6], [6, 1, 2]), ([3, 4], [5, 4])):
        ids = tokenizer.encode(builder.text(history, candidates)).ids
        assert builder.encode(history, candidates).tolist() == ids


def test_pieces_concatenate_to_the_text(tokenizer_folder: Path):
    tokenizer = read_tokenizer(tokenizer_folder)
    pieces = [" Heat (1995)", " \n (2)", " Été", " 日本; \n Candidate pool: (A)"]
    ids = np.concatenate(encode_pieces(tokenizer, pieces))
    assert ids.dtype == np.int64
    start = tokenizer.encode("x").ids
    assert [*start, *ids] == tokenizer.encode("x" + "".join(pieces)).ids


def test_text(tiny_llama: Path):
    builder = make_builder(read_tokenizer(tiny_llama), ["", "Heat (1995)", "Ran", "Up"])
    assert builder.text([3, 1], [2, 1]) == (
        "### Instruction:\nGiven user history in chronological order, recommend an item from the "
        "candidate pool with its index letter.\n\n"
        "### Input:\nUser history: (1) Up \n (2) Heat (1995); \n "
        "Candidate pool: (A) Ran \n (B) Heat (1995)\n\n### Response:\n"
    )


def test_special_tokens_in_titles_are_text(tiny_llama: Path):
    tokenizer = read_tokenizer(tiny_llama)
    builder = make_builder(tokenizer, ["", "The </s> Story", "Ran"])
    assert tokenizer.token_to_id("</s>") not in builder.encode([1], [1, 2])


# Letters ----------------------------------------------------------------------------------------


def test_letter_ids_are_the_tokens_after_the_heading(tokenizer_folder: Path):
    from transformers import AutoTokenizer

    builder = make_builder(read_tokenizer(tokenizer_folder), ["", "Heat (1995)", "Ran"])
    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    heading = builder.text([1], [1, 2])
    assert heading.endswith("\n\n### Response:\n")
    assert builder.letters == LETTERS[:20] and len(builder.letter_ids) == 20
    for letter, token in zip(builder.letters, builder.letter_ids):
        assert stock(heading + letter)["input_ids"] == [*stock(heading)["input_ids"], token]
    if "llama-2" in str(tokenizer_folder):
        assert builder.letter_ids[0] == 29909  # not 319, which is "A" on its own


def test_too_many_candidates(tiny_llama: Path):
    tokenizer = read_tokenizer(tiny_llama)
    assert len(make_builder(tokenizer, ["", "a"], num_candidates=62).letter_ids) == 62
    with pytest.raises(ArgumentError, match="only 62 one-token letters") as raised:
        make_builder(tokenizer, ["", "a"], num_candidates=63)
    assert (raised.value.argument, raised.value.value) == ("num_candidates", 63)


def test_letters_of_several_tokens_are_not_used():
    from tokenizers import models, pre_tokenizers

    # "A" and "B" have a token each; "C" is unknown, and so are all other characters.
    vocabulary = {"?": 0, "A": 1, "B": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    with pytest.raises(ArgumentError, match="only 3 one-token letters"):  # "D" equals "C"
        make_builder(tokenizer, ["", "a"], num_candidates=4)


# Limits -----------------------------------------------------------------------------------------


def test_long_titles_are_cut(tokenizer_folder: Path):
    tokenizer = read_tokenizer(tokenizer_folder)
    titles = ["", "word " * 100, "日本語" * 50, "x" * 500, "short", "🎬🎥" * 40]
    builder = make_builder(tokenizer, [t.strip() for t in titles], max_title_len=8)
    assert builder.titles[4] == "short"
    for item in (1, 2, 3, 5):
        (ids,) = encode_pieces(tokenizer, [f" {builder.titles[item]}"])
        assert 1 <= len(ids) <= 8
        assert titles[item].startswith(builder.titles[item]) and builder.titles[item]
    ids = tokenizer.encode(builder.text([1, 2, 3], [5, 4])).ids
    assert builder.encode([1, 2, 3], [5, 4]).tolist() == ids


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_first_character_is_kept_whatever_its_tokens(limit: int, tokenizer_folder: Path):
    tokenizer = read_tokenizer(tokenizer_folder)
    builder = make_builder(tokenizer, ["", "\U0001f600 film", "☃", "Ran"], max_title_len=limit)
    assert builder.titles[1].startswith("\U0001f600") and builder.titles[2] == "☃"
    ids = tokenizer.encode(builder.text([1, 2], [3, 1])).ids
    assert builder.encode([1, 2], [3, 1]).tolist() == ids


def test_oldest_history_is_dropped(tiny_llama: Path):
    tokenizer = read_tokenizer(tiny_llama)
    titles = ["", *(f"title {i}" for i in range(60))]
    limit = 400
    builder = make_builder(tokenizer, titles, num_candidates=3, max_text_len=limit)
    history = list(range(1, 51))
    ids = builder.encode(history, [51, 52, 53])
    assert len(ids) <= limit - 2
    text = builder.text(history, [51, 52, 53])
    assert "title 49; \n" in text and "(1) title 0 " not in text and "(C) title 52\n" in text
    size = text.count(" \n (") - 2 + 1  # two of them separate candidates
    free = make_builder(tokenizer, titles, num_candidates=3, max_text_len=100_000)
    assert free.encode(history[-size:], [51, 52, 53]).tolist() == ids.tolist()
    assert len(free.encode(history[-size - 1 :], [51, 52, 53])) > limit - 2  # one item more


def test_prompts_that_can_be_too_long(tiny_llama: Path):
    tokenizer = read_tokenizer(tiny_llama)
    titles = ["", "a", "b"]
    with pytest.raises(ArgumentError, match=r"a prompt with 20 candidates can take") as raised:
        make_builder(tokenizer, titles, max_text_len=50)
    assert (raised.value.argument, raised.value.value) == ("max_text_len", 50)


def test_more_candidates_than_letters(tiny_llama: Path):
    builder = make_builder(read_tokenizer(tiny_llama), ["", "a", "b", "c"], num_candidates=2)
    with pytest.raises(ValueError):
        builder.encode([1], [1, 2, 3])


# Hostile titles ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny", "smollm2", "llama-2"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "llama-2":
        return load_tokenizer(request.getfixturevalue("shared") / "tokenizers" / "llama-2")
    name = {"tiny": "tiny_llama", "smollm2": "smollm2"}[request.param]
    return load_tokenizer(request.getfixturevalue(name))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(hostile_titles, min_size=8, max_size=8), st.data())
def test_titles_cannot_forge_a_prompt(any_tokenizer: Tokenizer, titles: list, data: st.DataObject):
    titles = [clean_title(title) or "untitled" for title in titles]
    prompts = PromptBuilder(
        any_tokenizer,
        ["", *titles],
        instruction="Choose.",
        input_template="User history: {}; \n Candidate pool: {}",
        num_candidates=4,
        max_title_len=12,
        max_text_len=600,
    )
    items = data.draw(st.permutations(range(1, 9)))
    history, candidates = items[:4], items[4:]
    text = prompts.text(history, candidates)
    cut = prompts.titles
    assert all(cut[i] and titles[i - 1].startswith(cut[i]) for i in range(1, 9))
    listed = [f"({index}) {cut[i]}" for index, i in zip([1, 2, 3, 4, *"ABCD"], items)]
    assert text == (
        "### Instruction:\nChoose.\n\n### Input:\nUser history: " + " \n ".join(listed[:4])
        + "; \n Candidate pool: " + " \n ".join(listed[4:]) + "\n\n### Response:\n"
    )  # fmt: skip
    assert text.splitlines() == text.removesuffix("\n").split("\n")
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == ["### Instruction:", "### Input:", "### Response:"]
    assert prompts.encode(history, candidates).tolist() == any_tokenizer.encode(text).ids
