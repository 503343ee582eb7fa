"""Draw the picture of the two stages in the README.

Example:
    python docs/images/two_stages.py > docs/images/two-stages.svg
"""

from __future__ import annotations

from drawing import arrow, box, picture, text

HISTORY = ("Halo 3", "Gears of War", "Mass Effect")
CANDIDATES = ("(A) Crysis 2", "(B) Mass Effect 2", "(C) Call of Duty", "…", "(T) Portal 2")
RANKING = ("1  Mass Effect 2", "2  Portal 2", "3  Crysis 2", "…", "20  Call of Duty")
LABEL = "A user's history goes to LRURec, which retrieves 20 of 7,676 items. Llama ranks them."


def listing(x: float, y: float, width: float, title: str, lines: tuple[str, ...]) -> list[str]:
    """A box with a title and lines; the line of the held-out item stands out."""
    parts = [text(x + 2, y - 10, title, "small"), box(x, y, width, 26 * len(lines) + 16)]
    for index, line in enumerate(lines):
        kind = "chosen" if "Mass Effect 2" in line else ""
        parts.append(text(x + 14, y + 29 + 26 * index, line, kind))
    return parts


def model(x: float, name: str, *lines: str) -> list[str]:
    """The box of a model."""
    parts = [box(x, 78, 170, 104, "model"), text(x + 85, 108, name, "name", "middle")]
    return parts + [
        text(x + 85, 133 + 20 * index, line, "small", "middle") for index, line in enumerate(lines)
    ]


def parts() -> list[str]:
    """The elements of the picture."""
    return [
        *listing(10, 83, 140, "a user's history", HISTORY),
        arrow("M 150 130 H 183"),
        *model(190, "LRURec", "scores all", "7,676 items"),
        arrow("M 360 130 H 393"),
        *listing(400, 57, 166, "20 candidates", CANDIDATES),
        arrow("M 566 130 H 593"),
        *model(600, "Llama + QLoRA", "reads titles, one", "forward pass"),
        arrow("M 770 130 H 803"),
        *listing(810, 57, 170, "the ranking", RANKING),
        arrow("M 80 177 V 250 H 685 V 189"),
        text(190, 240, "the same history, as text", "small"),
        text(275, 30, "1. retrieve", "name", "middle"),
        text(685, 30, "2. rank", "name", "middle"),
    ]


if __name__ == "__main__":
    print(picture(990, 270, LABEL, parts()))
