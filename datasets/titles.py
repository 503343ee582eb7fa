"""Cleaning of item titles."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # zero-width (non-)joiner
_SENTENCEPIECE_SPACE = "\u2581"


def clean_title(title: str) -> str:
    """Reduce a title to one line of visible characters, so that it cannot forge lines of a prompt.

    White space, line breaks and control characters become single spaces. So does the character
    that SentencePiece tokenizers use for a space, as they would merge it with adjacent spaces.
    Format characters (such as direction marks and zero-width characters) and unpaired surrogates
    are removed, except for the joiners that emoji and some scripts need within a title.

    Returns:
        The clean title; empty if no visible character is left.
    """
    if not title.isprintable():
        title = "".join(map(_replace_invisible, title))
    words = title.replace(_SENTENCEPIECE_SPACE, " ").split()
    return " ".join(words).strip(_JOINERS + " ")


def _replace_invisible(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cc":
        return " "
    return "" if category in ("Cf", "Cs") and character not in _JOINERS else character
