r"""Histories as plain text, for a language model that scores titles by their likelihood.

::

    User history in chronological order:\n
    Toy Story (1995)\n
    Heat (1995)\n
    ...

A title and its line break form a line. The score of a candidate is the log-likelihood of its line
after the lines of the history, so it needs no letter, and candidates do not see each other.

Each line is tokenized once, as it is after a line break, and texts are concatenated from the
heading and lines. The concatenation equals the token ids of the whole text if no token extends
across a line break, which holds for the tokenizers of Llama 2 and SmolLM2
(``tests/dataloader/test_title_prompt.py`` checks it on real titles).

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from errors import ArgumentError

if TYPE_CHECKING:
    from dataloader.title_trie import TitleTrie

HEADING = "User history in chronological order:"
_BREAK = "\n"


class TitlePrompts:
    """Token ids of histories and of titles that may follow them.

    Args:
        tokenizer: tokenizer of the language model; special tokens in titles become plain text.
        titles: title of each item; item 0 is padding.
        max_history: maximum number of items in a history; the most recent ones are kept.
        max_title_len: maximum number of tokens in a title; longer titles are cut.
        max_text_len: maximum number of tokens in a history with one more title.

    Attributes:
        heading: (h,) int64 token ids of the heading, with the special tokens at the start.
        lines: token ids of each item's title and its line break, int64; lines[0] is empty.

    Raises:
        ArgumentError: a text with ``max_history`` items can exceed ``max_text_len``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        titles: Sequence[str],
        *,
        max_history: int,
        max_title_len: int = 32,
        max_text_len: int = 1536,
    ) -> None:
        tokenizer.encode_special_tokens = True  # "</s>" in a title does not end the sequence
        self.tokenizer, self.max_history = tokenizer, max_history
        self.heading = np.array(tokenizer.encode(HEADING + _BREAK).ids, dtype=np.int64)
        line_break = tokenizer.encode(_BREAK, add_special_tokens=False).ids
        texts = [f"{_BREAK}{title}{_BREAK}" for title in titles[1:]]
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = [encoding.ids[len(line_break) :] for encoding in encodings]
        cut = (
            x if len(x) <= max_title_len + 1 else x[:max_title_len] + line_break[-1:] for x in ids
        )
        self.lines = [np.empty(0, np.int64), *(np.array(x, dtype=np.int64) for x in cut)]
        longest = sorted((len(line) for line in self.lines), reverse=True)[: max_history + 1]
        num_tokens = len(self.heading) + (max_history + 1) * longest[0]
        if num_tokens > max_text_len:
            raise ArgumentError(
                "max_text_len", max_text_len, f"{max_history} titles can take {num_tokens} tokens"
            )

    @cached_property
    def trie(self) -> TitleTrie:
        """The prefix tree of the lines."""
        from dataloader.title_trie import TitleTrie  # it imports torch

        return TitleTrie(self.lines)

    def encode(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokenize the heading and the lines of items, oldest first.

        Returns:
            (length,) int64.
        """
        return np.concatenate([self.heading, *(self.lines[item] for item in items)])

    def text(self, items: Sequence[int] | np.ndarray) -> str:
        """The text of a history as the language model reads it."""
        text: str = self.tokenizer.decode(
            self.encode_history(items).tolist(), skip_special_tokens=False
        )
        return text

    def encode_history(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokenize the most recent ``max_history`` of the items; see ``encode``."""
        return self.encode(items[-self.max_history :])
