"""Draw the picture of a jagged batch in ``docs/architecture.md``.

Example:
    python docs/images/jagged_batch.py > docs/images/jagged-batch.svg
"""

from __future__ import annotations

from drawing import arrow, cell, picture, text

SEQUENCES = ((4, 9, 2), (7,), (3, 3, 8, 1, 6), (5, 2))
LENGTH = max(map(len, SEQUENCES))
SIZE, ROW = 42, 36  # of a cell
LABEL = (
    "Four sequences of 3, 1, 5 and 2 items: a padded batch has 20 cells, 9 of them empty; a jagged "
    "batch has 11, with the position of each item in its sequence."
)


def kind_of(user: int) -> str:
    """Neighbors look different."""
    return "model" if user % 2 == 0 else ""


def padded(x: float, y: float) -> list[str]:
    """A row for each sequence, padded on the left."""
    parts = [text(x, y - 14, "padded: 20 cells, 9 of them empty", "small")]
    for user, items in enumerate(SEQUENCES):
        for column, item in enumerate([None] * (LENGTH - len(items)) + list(items)):
            kind = "empty" if item is None else kind_of(user)
            content = "" if item is None else str(item)
            parts.append(cell(x + SIZE * column, y + ROW * user, SIZE, ROW, content, kind))
    return parts


def jagged(x: float, y: float) -> list[str]:
    """The sequences one after another, and their positions."""
    total = sum(map(len, SEQUENCES))
    parts = [text(x, y - 14, f"jagged: {total} cells", "small")]
    parts += [
        text(x - 12, y + ROW * row + 23, name, anchor="end")
        for row, name in enumerate(("item_ids", "positions"))
    ]
    column = 0
    for user, items in enumerate(SEQUENCES):
        for position, item in enumerate(items):
            left = x + SIZE * column
            parts.append(cell(left, y, SIZE, ROW, str(item), kind_of(user)))
            parts.append(cell(left, y + ROW, SIZE, ROW, str(position), kind_of(user)))
            column += 1
    return [*parts, text(x, y + 2 * ROW + 24, "a sequence starts wherever this is 0", "small")]


def parts() -> list[str]:
    """The elements of the picture."""
    return [*padded(10, 40), arrow("M 240 112 H 330"), *jagged(430, 58)]


if __name__ == "__main__":
    print(picture(910, 200, LABEL, parts()))
