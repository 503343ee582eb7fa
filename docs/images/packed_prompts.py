"""Draw the picture of packed prompts in ``docs/architecture.md``.

Example:
    python docs/images/packed_prompts.py > docs/images/packed-prompts.svg
"""

from __future__ import annotations

from drawing import arrow, box, cell, neighbor_kind, padded_rows, picture, text

LENGTHS = (8, 5, 3)
TOTAL = sum(LENGTHS)
SIZE, ROW = 24, 32  # of a token
DOT = 11  # of the attention
LABEL = (
    "Three prompts of 8, 5 and 3 tokens: padded, they take 24 tokens, 8 of them empty. Packed, "
    "they follow each other in one row of 16, and attention stays within each."
)


def padded(x: float, y: float) -> list[str]:
    """A row for each prompt, padded on the left; the last token is scored."""
    contents = [[""] * length for length in LENGTHS]
    return padded_rows(x, y, contents, SIZE, ROW, "padded: 24 tokens, 8 of them empty")


def packed(x: float, y: float) -> list[str]:
    """The prompts in one row."""
    parts = [text(x, y - 14, f"packed: {TOTAL} tokens", "small")]
    column = 0
    for prompt, length in enumerate(LENGTHS):
        for position in range(length):
            kind = neighbor_kind(prompt)
            parts.append(cell(x + SIZE * column, y, SIZE, ROW, str(position), kind))
            column += 1
    return [*parts, text(x, y + ROW + 22, "positions start again at 0", "small")]


def attention(x: float, y: float) -> list[str]:
    """Which tokens a token attends to: the earlier ones of its own prompt."""
    parts = [text(x, y - 14, "attention", "small")]
    parts.append(box(x, y, DOT * TOTAL, DOT * TOTAL, "empty", radius=0))
    first = 0
    for prompt, length in enumerate(LENGTHS):
        for row in range(length):
            left, top = x + DOT * first, y + DOT * (first + row)
            parts.append(box(left, top, DOT * (row + 1), DOT, neighbor_kind(prompt), radius=0))
        first += length
    return parts


def parts() -> list[str]:
    """The elements of the picture."""
    return [
        *padded(10, 72),
        arrow("M 216 120 H 266"),
        *packed(280, 104),
        arrow("M 680 120 H 730"),
        *attention(744, 40),
    ]


if __name__ == "__main__":
    print(picture(940, 230, LABEL, parts()))
