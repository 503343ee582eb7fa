r"""The ranking prompt as text and as token ids (LlamaRec, section 3.2.2).

::

    ### Instruction:
    Given user history in chronological order, recommend ...

    ### Input:
    User history: (1) Toy Story (1995) \n (2) ...; \n Candidate pool: (A) Heat (1995) \n (B) ...

    ### Response:
    A

The same titles occur in prompts over and over. Each is tokenized once, and prompts are concatenated
from token ids. For a history h of m items and k candidates c::

    begin  title(h1) number(2) title(h2) ... number(m) last_in_history(hm)
           title(c1) letter(2) title(c2) ... letter(k) last_candidate(ck)

``begin`` ends with "(1)", ``last_in_history`` is a title followed by the text up to "(A)", and
``last_candidate`` is a title followed by the text up to the response. Every piece but the first
starts with a space and follows a character other than a space. If no token of the tokenizer extends
across such a boundary, the concatenation equals the token ids of the whole text. This holds for the
tokenizers of Llama 2 and SmolLM2 (``tests/dataloader/test_prompt.py`` checks it on real titles).

This module does not import torch.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from errors import ArgumentError

LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
ItemIds = Sequence[int] | np.ndarray
RESPONSE_TOKENS = 2  # the letter and the end of the sequence

SEPARATOR = " \n "
_HEAD = "### Instruction:\n{instruction}\n\n### Input:\n"
_TAIL = "\n\n### Response:\n"
_ANCHOR = ")"  # precedes a piece while it is tokenized


def encode_pieces(
    tokenizer: Tokenizer, pieces: Sequence[str], before: str = _ANCHOR
) -> list[np.ndarray]:
    """Tokenize pieces of a text as they occur within it.

    Args:
        tokenizer: tokenizer without padding or truncation.
        pieces: pieces that share no token with what precedes them, for example those that start
            with a space and follow another character.
        before: a text that precedes each of them.

    Returns:
        (length,) int64 token ids of each piece, without special tokens.
    """
    anchor = tokenizer.encode(before, add_special_tokens=False).ids
    texts = [before + piece for piece in pieces]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(e.ids[len(anchor) :], dtype=np.int64) for e in encodings]


class PromptBuilder:
    """Build ranking prompts for a data set and a tokenizer.

    Args:
        tokenizer: tokenizer of the language model; special tokens in titles become plain text.
        titles: title of each item; item 0 is padding.
        instruction: the task.
        input_template: the input, with one ``{}`` for the history and one for the candidates.
        num_candidates: maximum number of candidates in a prompt.
        max_title_len: maximum number of tokens in a title; longer titles are cut.
        max_text_len: maximum number of tokens in a prompt with its response; if it is exceeded, the
            oldest items of the history are dropped.

    Attributes:
        head, between, end: what precedes the history, the candidates, and the response.
        letters: letters of the candidates, in order.
        letter_ids: (num_candidates,) int64, their token ids.
        titles: titles, cut to ``max_title_len`` tokens.

    Raises:
        ArgumentError: the tokenizer has fewer than ``num_candidates`` one-token letters, or
            ``max_text_len`` is too small for some prompt with a history of one item.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        titles: Sequence[str],
        *,
        instruction: str,
        input_template: str,
        num_candidates: int,
        max_title_len: int = 32,
        max_text_len: int = 1536,
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True  # "</s>" in a title does not end the sequence
        self.max_text_len = max_text_len
        before, self.between, after = input_template.split("{}")
        self.head, self.end = _HEAD.format(instruction=instruction) + before, after + _TAIL
        self.letters = LETTERS[:num_candidates]
        self.letter_ids = self._find_letter_ids(num_candidates)
        self.titles = ["", *self._cut(titles[1:], max_title_len)]
        self._prepare_pieces()
        self._check_length()

    def _prepare_pieces(self) -> None:
        """Tokenize all pieces of prompts, indexed by item, number or letter."""
        begin = self.tokenizer.encode(f"{self.head}(1)").ids  # with the special tokens at the start
        titles = [f" {title}" for title in self.titles]
        last_in_history = [f"{title}{self.between}(A)" for title in titles]
        last_candidate = [f"{title}{self.end}" for title in titles]
        numbers = [f"{SEPARATOR}({n})" for n in range(1, self.max_text_len)]
        letters = [f"{SEPARATOR}({letter})" for letter in self.letters]
        self._begin = np.array(begin, dtype=np.int64)
        self._title_ids = encode_pieces(self.tokenizer, titles)
        self._last_in_history = encode_pieces(self.tokenizer, last_in_history)
        self._last_candidate = encode_pieces(self.tokenizer, last_candidate)
        self._number_ids = encode_pieces(self.tokenizer, numbers)
        self._joined_letter_ids = encode_pieces(self.tokenizer, letters)

    def _cut(self, titles: Sequence[str], max_title_len: int) -> list[str]:
        """Cut titles where the first token beyond the limit starts.

        The first character is kept even if it has more tokens. A cut can change the tokens before
        it, so cuts are repeated until all titles fit.
        """
        cut_titles = list(titles)
        anchor = self.tokenizer.encode(_ANCHOR, add_special_tokens=False).ids
        limit = len(anchor) + max_title_len
        min_length = len(_ANCHOR) + 2  # a space and one character
        pending: Sequence[int] = range(len(cut_titles))
        while pending:
            texts = [f"{_ANCHOR} {cut_titles[i]}" for i in pending]
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            too_long = []
            for i, text, encoding in zip(pending, texts, encodings):
                if len(encoding.ids) > limit and len(text) > min_length:
                    end = max(encoding.offsets[limit][0], min_length)
                    cut_titles[i] = text[:end][len(_ANCHOR) :].strip()
                    too_long.append(i)
            pending = too_long
        return cut_titles

    def _find_letter_ids(self, num_candidates: int) -> np.ndarray:
        """Return the (num_candidates,) token ids of the letters as they follow the heading.

        The token of a letter depends on the characters before it, so each letter is tokenized after
        the response heading. It must add exactly one token, different from that of other letters.
        """
        context = f"{_ANCHOR}{_TAIL}"
        context_ids = self.tokenizer.encode(context, add_special_tokens=False).ids
        letter_ids: list[int] = []
        for letter in LETTERS:
            ids = self.tokenizer.encode(context + letter, add_special_tokens=False).ids
            if ids[:-1] != context_ids or ids[-1] in letter_ids:
                break
            letter_ids.append(ids[-1])
        if num_candidates > len(letter_ids):
            raise ArgumentError(
                "num_candidates",
                num_candidates,
                f"the tokenizer has only {len(letter_ids)} one-token letters",
            )
        return np.array(letter_ids[:num_candidates], dtype=np.int64)

    def _check_length(self) -> None:
        """Check that all prompts with a history of one item are short enough."""
        lengths = sorted((len(ids) for ids in self._title_ids), reverse=True)
        longest = len(self._begin)
        longest += max(map(len, self._last_in_history)) + max(map(len, self._last_candidate))
        longest += sum(lengths[: len(self.letters)])
        longest += sum(map(len, self._joined_letter_ids)) + RESPONSE_TOKENS
        if longest > self.max_text_len:
            raise ArgumentError(
                "max_text_len",
                self.max_text_len,
                f"a prompt with {len(self.letters)} candidates can take {longest} tokens",
            )

    def text(self, history: ItemIds, candidates: ItemIds) -> str:
        """Return the prompt as text; arguments as in ``encode``."""
        history = self._fit(history, candidates)

        def listed(items: ItemIds, indices: Sequence[object]) -> str:
            lines = (f"({index}) {self.titles[item]}" for index, item in zip(indices, items))
            return SEPARATOR.join(lines)

        numbers = range(1, len(history) + 1)
        return (
            f"{self.head}{listed(history, numbers)}{self.between}"
            f"{listed(candidates, self.letters)}{self.end}"
        )

    def encode(self, history: ItemIds, candidates: ItemIds) -> np.ndarray:
        """Return the token ids of the prompt, up to and including the response heading.

        Args:
            history: at least one item id, oldest first.
            candidates: item ids in the order of their letters.

        Returns:
            (length,) int64, with the special tokens that the tokenizer puts at the start.
        """
        history = self._fit(history, candidates)
        pieces = [self._begin]
        numbers = self._number_ids[1 : len(history)]
        for item, number in zip(history[:-1], numbers, strict=True):
            pieces += [self._title_ids[item], number]
        pieces.append(self._last_in_history[history[-1]])
        letters = self._joined_letter_ids[1 : len(candidates)]
        for item, letter in zip(candidates[:-1], letters, strict=True):
            pieces += [self._title_ids[item], letter]
        pieces.append(self._last_candidate[candidates[-1]])
        return np.concatenate(pieces)

    def _fit(self, history: ItemIds, candidates: ItemIds) -> ItemIds:
        """Return the most recent part of the history that fits into the prompt."""
        room = self.max_text_len - RESPONSE_TOKENS - len(self._begin)
        room -= sum(len(self._title_ids[item]) for item in candidates[:-1])
        room -= sum(map(len, self._joined_letter_ids[1 : len(candidates)]))
        room -= len(self._last_candidate[candidates[-1]])
        room -= len(self._last_in_history[history[-1]])
        size = 1
        for item in reversed(history[:-1]):
            room -= len(self._title_ids[item]) + len(self._number_ids[size])
            if room < 0:
                break
            size += 1
        return history[-size:]
