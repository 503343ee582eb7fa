"""Draw the gains from LLM4IDRec by length of the history and by number of added items.

Example:
    python docs/images/llm4idrec_slices.py > docs/images/llm4idrec-slices.svg
"""

from __future__ import annotations

import re
from pathlib import Path

from drawing import differences, intervals, picture, table

PAGE = Path(__file__).parents[1] / "results" / "llm4idrec.md"
LENGTHS, AMOUNTS = "### By length of the history", "### By amount"
LEFT, WIDTH, ZERO, SCALE, GAP = 330, 810, 600, 5600, 30
TICKS = ("-.04", "-.02", "0", "+.02")
LABEL = (
    "Differences in NDCG@10 with their intervals by length of the history and by number of added "
    "items: the two tables of differences below."
)


def by_length() -> list[tuple[str, str, str]]:
    """Model, quarter and source of the items, with the difference and its interval."""
    (_, _, _, *quarters), *lines = table(PAGE, LENGTHS)
    rows = []
    for model in dict.fromkeys(cells[0] for cells in lines):
        for column, quarter in enumerate(quarters, 3):
            name = f"{model}, {quarter.removesuffix(' items')} items"
            for cells in (cells for cells in lines if cells[0] == model):
                mean, ends = re.fullmatch(r"(\S+) \((.*)\)", cells[column]).groups()
                rows.append((f"{name}, {cells[1]}", mean, ends))
    return rows


def by_amount() -> list[tuple[str, str, str]]:
    """Most added items per user, with the difference and its interval."""
    rows = differences(PAGE, AMOUNTS)
    return [(f"{cells[0]}, generated", mean, ends) for cells, mean, ends in rows]


if __name__ == "__main__":
    scale = {"zero": ZERO, "scale": SCALE, "ticks": TICKS}
    title = "difference in NDCG@10 by length of the history"
    lengths, end = intervals(LEFT, 0, title, by_length(), **scale)
    title = "LRURec by maximum of added items per user"
    amounts, end = intervals(LEFT, end + GAP, title, by_amount(), **scale)
    print(picture(WIDTH, int(end) + 8, LABEL, [*lengths, *amounts]))
