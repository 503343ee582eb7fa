"""Histories as text: token ids, cut titles, limits."""

from pathlib import Path

import numpy as np
import pytest

from dataloader.title_prompt import HEADING, TitlePrompts
from datasets import SequenceDataset
from errors import ArgumentError
from tests.helpers import load, read_tokenizer


def text_of(titles: list[str]) -> str:
    return f"{HEADING}\n" + "".join(f"{title}\n" for title in titles)


def test_pieces_equal_the_whole_text(tiny_llama: Path, toy_data: SequenceDataset):
    tokenizer = read_tokenizer(tiny_llama)
    prompts = TitlePrompts(tokenizer, toy_data.titles, max_history=5)
    items = toy_data.item_ids[:8]
    expected = tokenizer.encode(text_of([toy_data.titles[i] for i in items])).ids
    assert prompts.encode(items).tolist() == expected
    recent = tokenizer.encode(text_of([toy_data.titles[i] for i in items[-5:]])).ids
    assert prompts.encode_history(items).tolist() == recent


@pytest.mark.parametrize("code", ["ml-100k", "games", "beauty"])
@pytest.mark.parametrize("model", ["llama-2", "smollm2"])
def test_pieces_equal_the_whole_text_on_real_titles(
    code: str, model: str, shared: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    if model == "llama-2":
        folder = shared / "tokenizers" / "llama-2"
    else:
        folder = request.getfixturevalue("smollm2")
    tokenizer = read_tokenizer(folder)
    data = load(code, shared / "data", tmp_path)
    prompts = TitlePrompts(tokenizer, data.titles, max_history=20)
    whole = [i for i in range(1, data.num_items + 1) if len(prompts.lines[i]) <= 32]
    items = np.random.default_rng(0).permutation(whole)
    for part in np.array_split(items, len(items) // 10):
        expected = tokenizer.encode(text_of([data.titles[i] for i in part])).ids
        assert prompts.encode(part).tolist() == expected


def test_long_titles_are_cut_and_keep_their_line_break(tiny_llama: Path):
    tokenizer = read_tokenizer(tiny_llama)
    titles = ["", "ab", "abcdefghij" * 9]
    prompts = TitlePrompts(tokenizer, titles, max_history=2, max_title_len=7)
    whole = TitlePrompts(tokenizer, titles, max_history=2, max_title_len=100)
    line_break = tokenizer.encode("\n").ids[-1]
    assert len(prompts.lines[2]) == 8 and len(whole.lines[2]) > 8
    assert prompts.lines[2][-1] == line_break
    assert prompts.lines[2][:-1].tolist() == whole.lines[2][:7].tolist()
    assert prompts.lines[1].tolist() == whole.lines[1].tolist()


def test_special_tokens_in_titles_are_text(tiny_llama: Path):
    prompts = TitlePrompts(read_tokenizer(tiny_llama), ["", "</s>"], max_history=2)
    assert 1 not in prompts.lines[1]  # the end of the sequence


def test_texts_that_can_be_too_long(tiny_llama: Path, toy_data: SequenceDataset):
    tokenizer = read_tokenizer(tiny_llama)
    prompts = TitlePrompts(tokenizer, toy_data.titles, max_history=20)
    longest = len(prompts.heading) + 21 * max(map(len, prompts.lines))
    TitlePrompts(tokenizer, toy_data.titles, max_history=20, max_text_len=longest)
    with pytest.raises(ArgumentError, match=f"^max_text_len {longest - 1}: 20 titles can take"):
        TitlePrompts(tokenizer, toy_data.titles, max_history=20, max_text_len=longest - 1)
