"""The ranking prompt (LlamaRec, section 3.2.2) as text and as token ids, and its index labels.

    ### Instruction:
    Given user history in chronological order, recommend ...

    ### Input:
    User history: (1) Toy Story (1995) \\n (2) ...; \\n Candidate pool: (A) Heat (1995) \\n (B) ...

    ### Response:
    A

Tokenising every prompt as text repeats the same titles thousands of times. Here each title is
tokenised once and prompts are put together from token ids. The pieces meet only where a space
follows another character; no token of the tokenizers in use reaches across such a place, so that
the ids equal those of the whole text (``tests/test_prompt.py`` checks it on real titles).
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from config import UserError

LABELS = string.ascii_uppercase + string.ascii_lowercase + string.digits
RESPONSE_TOKENS = 2  # the label and the end of the sequence

_HEAD = "### Instruction:\n{instruction}\n\n### Input:\n"
_TAIL = "\n\n### Response:\n"
_JOIN = " \n"
_ANCHOR = ")"  # what stands before a piece while it is tokenised


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[np.ndarray]:
    """Token ids of pieces as they are in a text, where each begins with a space and follows
    another character.
    """
    anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False).ids
    texts = [_ANCHOR + piece for piece in pieces]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(e.ids[len(anchor) :], dtype=np.int64) for e in encodings]


class PromptBuilder:
    """Builds prompts for one data set with one tokenizer.

    Args:
        tokenizer: the LM's tokenizer.
        titles: titles[i] is item i's title; titles[0] belongs to no item.
        instruction: what the LM is to do.
        input_template: the input with ``{}`` for the history and for the candidates.
        num_candidates: most candidates in a prompt.
        max_title_len: longest title in tokens; a longer one is cut.
        max_text_len: longest prompt in tokens, its answer included; the oldest history goes first.

    Raises:
        UserError: the tokenizer has too few labels, or a prompt cannot be short enough.
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
        self.tokenizer.encode_special_tokens = True  # a title's "</s>" is text, not an end
        self.max_text_len = max_text_len
        self.before, self.between, self.after = input_template.split("{}")
        self.head = _HEAD.format(instruction=instruction) + self.before
        self.label_ids = self._label_ids(num_candidates)
        self.labels = LABELS[:num_candidates]

        self.titles = ["", *self._shorten(titles[1:], max_title_len)]
        plain = [f" {title}" for title in self.titles]
        self._title = encode_pieces(tokenizer, plain)
        self._last_of_history = encode_pieces(tokenizer, [f"{x}{self.between}(A)" for x in plain])
        self._last_candidate = encode_pieces(tokenizer, [f"{x}{self.after}{_TAIL}" for x in plain])
        self._begin = np.array(tokenizer.encode(f"{self.head}(1)").ids, dtype=np.int64)
        self._number = encode_pieces(tokenizer, [f"{_JOIN} ({n})" for n in range(1, max_text_len)])
        self._letter = encode_pieces(tokenizer, [f"{_JOIN} ({label})" for label in self.labels])
        self._check_length()

    def _shorten(self, titles: Sequence[str], max_title_len: int) -> list[str]:
        """Titles cut to the limit, at the start of the first token too many, but for the first
        character, which stays however many tokens it takes.
        """
        shortened = list(titles)
        anchor = self.tokenizer.encode(_ANCHOR, add_special_tokens=False).ids
        limit = len(anchor) + max_title_len
        least = len(_ANCHOR) + 2  # with the space and the first character
        pending = range(len(shortened))
        while pending:
            texts = [f"{_ANCHOR} {shortened[i]}" for i in pending]
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            long = []
            for i, text, encoding in zip(pending, texts, encodings):
                if len(encoding.ids) > limit and len(text) > least:
                    cut = max(encoding.offsets[limit][0], least)
                    shortened[i] = text[:cut][len(_ANCHOR) :].strip()
                    long.append(i)
            pending = long
        return shortened

    def _label_ids(self, num_candidates: int) -> np.ndarray:
        """Token ids of the labels as they follow the response heading.

        Which token is "A" depends on what stands before it, so the heading is tokenised with each
        label. Each must add one token, and all must differ.
        """
        usable = len(LABELS)
        context = f"{_ANCHOR}{_TAIL}"
        ids = self.tokenizer.encode(context, add_special_tokens=False).ids
        answers: list[int] = []
        for place, label in enumerate(LABELS):
            extended = self.tokenizer.encode(context + label, add_special_tokens=False).ids
            if extended[:-1] != ids or extended[-1] in answers:
                usable = place
                break
            answers.append(extended[-1])
        if num_candidates > usable:
            raise UserError(
                f"{num_candidates} candidates, but this tokenizer has {usable} labels of one "
                "token: lower --num_candidates of the retriever and --llm_negative_sample_size"
            )
        return np.array(answers[:num_candidates], dtype=np.int64)

    def _check_length(self) -> None:
        """Refuse limits under which some prompt could not fit even with a single history item."""
        longest = sorted((len(ids) for ids in self._title), reverse=True)
        ends = max(map(len, self._last_candidate)) + max(map(len, self._last_of_history))
        worst = len(self._begin) + ends + sum(longest[: len(self.labels)])
        worst += sum(map(len, self._letter)) + RESPONSE_TOKENS
        if worst > self.max_text_len:
            raise UserError(
                f"--llm_max_text_len {self.max_text_len}: a prompt with {len(self.labels)} "
                f"candidates can take {worst} tokens; raise it or lower --llm_max_title_len"
            )

    def text(self, history: Sequence[int], candidates: Sequence[int]) -> str:
        """The prompt as text, without the history that ``max_text_len`` leaves out."""
        history = self._fit(history, candidates)

        def listed(items: Sequence[int], indices: Sequence[object]) -> str:
            lines = (f"({index}) {self.titles[item]}" for index, item in zip(indices, items))
            return f"{_JOIN} ".join(lines)

        numbers = range(1, len(history) + 1)
        return (
            f"{self.head}{listed(history, numbers)}{self.between}"
            f"{listed(candidates, self.labels)}{self.after}{_TAIL}"
        )

    def encode(self, history: Sequence[int], candidates: Sequence[int]) -> np.ndarray:
        """The prompt's token ids up to and including the response heading.

        Args:
            history: item ids, oldest first, at least one.
            candidates: item ids in the order of their labels.

        Returns:
            (length,) int64, with the special tokens that the tokenizer puts first.
        """
        history = self._fit(history, candidates)
        pieces = [self._begin]
        for place, item in enumerate(history[:-1]):
            pieces += [self._title[item], self._number[place + 1]]
        pieces.append(self._last_of_history[history[-1]])
        for place, item in enumerate(candidates[:-1]):
            pieces += [self._title[item], self._letter[place + 1]]
        pieces.append(self._last_candidate[candidates[-1]])
        return np.concatenate(pieces)

    def _fit(self, history: Sequence[int], candidates: Sequence[int]) -> Sequence[int]:
        """The most recent history that leaves the prompt short enough."""
        room = self.max_text_len - RESPONSE_TOKENS - len(self._begin)
        room -= sum(len(self._title[item]) for item in candidates[:-1])
        room -= sum(map(len, self._letter[1 : len(candidates)]))
        room -= len(self._last_candidate[candidates[-1]]) + len(self._last_of_history[history[-1]])
        kept = 1
        for item in reversed(history[:-1]):
            room -= len(self._title[item]) + len(self._number[kept])
            if room < 0:
                break
            kept += 1
        return history[-kept:]
