"""Draw the picture of a jagged batch in ``docs/architecture.md``.

Example:
    python docs/images/jagged_batch.py > docs/images/jagged-batch.svg
"""

from __future__ import annotations

from drawing import arrow, cell, neighbor_kind, padded_rows, picture, text

SEQUENCES = ((4, 9, 2), (7,), (3, 3, 8, 1, 6), (5, 2))
SIZE, ROW = 42, 36  # of a cell
LABEL = (
    "Four sequences of 3, 1, 5 and 2 items: a padded batch has 20 cells, 9 of them empty; a jagged "
    "batch has 11, with the position of each item in its sequence."
)


def padded(x: float, y: float) -> list[str]:
    """A row for each sequence, padded on the left."""
    contents = [list(map(str, items)) for items in SEQUENCES]
    return padded_rows(x, y, contents, SIZE, ROW, "padded: 20 cells, 9 of them empty")


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
            parts.append(cell(left, y, SIZE, ROW, str(item), neighbor_kind(user)))
            parts.append(cell(left, y + ROW, SIZE, ROW, str(position), neighbor_kind(user)))
            column += 1
    return [*parts, text(x, y + 2 * ROW + 24, "a sequence starts wherever this is 0", "small")]


def parts() -> list[str]:
    """The elements of the picture."""
    return [*padded(10, 40), arrow("M 240 112 H 330"), *jagged(430, 58)]


if __name__ == "__main__":
    print(picture(910, 200, LABEL, parts()))
