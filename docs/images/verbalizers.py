"""Draw the picture of letters and titles in ``docs/training.md``.

Example:
    python docs/images/verbalizers.py > docs/images/verbalizers.svg
"""

from __future__ import annotations

from drawing import arrow, box, cell, picture, text

HISTORY = ("Halo 3", "Gears of War", "Mass Effect")
PROMPT = (
    "User history: (1) Halo 3",
    " (2) Gears of War",
    " (3) Mass Effect;",
    "Candidate pool: (A) Crysis 2",
    " (B) Mass Effect 2",
    " … (T) Portal 2",
    "### Response:",
)
LETTERS = (("A", 46), ("B", 92), ("…", 0), ("T", 28))  # and their logits, as lengths of bars
# Pieces of titles. Where other titles of the catalogue go on differently, there is a choice.
BRANCHES = (
    (("Crysis", True), ("2", True)),
    (("Mass", True), ("Effect", False), ("2", True)),
    (("Mass", True), ("Effect", False), ("3", True)),
    (("Portal", True), ("2", True)),
)
WIDTHS = {"Crysis": 62, "Mass": 54, "Effect": 58, "Portal": 60, "2": 28, "3": 28}
LABEL = (
    "Letters: one prompt lists the history and the candidates, each with a letter, and the logits "
    "of the letters are the scores. Titles: each candidate's title is a branch behind one history, "
    "and its score sums the choices along the branch."
)


def letters(x: float, y: float) -> list[str]:
    """A prompt with lettered candidates, and the letters' logits."""
    parts = [text(x, y - 44, "letters", "name"), text(x, y - 14, "one prompt", "small")]
    parts.append(box(x, y, 232, 25 * len(PROMPT) + 18))
    parts += [
        text(x + 12, y + 28 + 25 * index, line.replace(" ", "\u00a0"))
        for index, line in enumerate(PROMPT)
    ]
    parts.append(arrow(f"M {x + 232} {y + 173} H {x + 266}"))
    parts.append(text(x + 274, y + 52, "logits of the letters", "small"))
    for index, (letter, size) in enumerate(LETTERS):
        top = y + 68 + 34 * index
        kind = "chosen" if letter == "B" else ""
        parts.append(text(x + 284, top + 18, letter, kind, "middle"))
        if size:
            parts.append(box(x + 300, top + 2, size, 22, "model", radius=2))
    return parts


def titles(x: float, y: float) -> list[str]:
    """Titles of candidates as branches behind a history."""
    parts = [text(x, y - 44, "titles", "name"), text(x, y - 14, "one history", "small")]
    parts.append(box(x, y, 130, 25 * len(HISTORY) + 18))
    parts += [text(x + 12, y + 28 + 25 * index, line) for index, line in enumerate(HISTORY)]
    left = x + 182
    parts.append(text(left, y - 14, "a branch for each candidate", "small"))
    for index, branch in enumerate(BRANCHES):
        top = y + 44 * index
        start, end = f"{x + 130} {y + 46}", f"{left - 6} {top + 15}"
        parts.append(arrow(f"M {start} C {x + 160} {y + 46} {left - 40} {top + 15} {end}"))
        right = left
        for piece, is_choice in branch:
            parts.append(cell(right, top, WIDTHS[piece], 30, piece, "model" if is_choice else ""))
            right += WIDTHS[piece]
    parts.append(box(left, y + 181, 14, 14, "model", radius=2))
    parts.append(text(left + 22, y + 193, "a choice, by language model and retriever;", "small"))
    parts.append(text(left + 22, y + 211, "the score adds up their log-probabilities", "small"))
    return parts


def parts() -> list[str]:
    """The elements of the picture."""
    return [*letters(10, 66), *titles(470, 66)]


if __name__ == "__main__":
    print(picture(960, 290, LABEL, parts()))
