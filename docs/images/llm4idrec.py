"""Draw the tables of the results of LLM4IDRec: held-out items among those added, and gains.

Example:
    python docs/images/llm4idrec.py > docs/images/llm4idrec.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drawing import box, differences, intervals, number, picture, table, text

PAGE = Path(__file__).parents[1] / "results" / "llm4idrec.md"
HITS = "## What the added items are like"
ML_100K = ("## Retrievers trained on them", "## RecBole")
GAMES = ("### Retrievers on Games",)
LEFT, BAR, ROW, TOP = 330, 380, 26, 34
GAP = 46  # between the parts
LABEL = (
    "Held-out items among those added to ML-100k as multiples of chance, and differences in "
    "NDCG@10 on ML-100k and Games with their intervals: the tables below."
)


def hits() -> list[str]:
    """A bar for each source of items that has a multiple of chance."""
    rows = [cells for cells in table(PAGE, HITS)[1:] if cells[5]]
    longest = max(number(cells[5]) for cells in rows)
    drawn = [text(LEFT, 18, "ML-100k: hits as multiples of chance", "name")]
    for index, cells in enumerate(rows):
        y, width = TOP + ROW * index, BAR * number(cells[5]) / longest
        kind = "model" if cells[0].startswith("generated") else ""
        drawn.append(text(LEFT - 14, y + 15, cells[0], "small", "end"))
        drawn.append(box(LEFT, y, width, ROW - 7, kind, radius=2))
        drawn.append(text(LEFT + width + 8, y + 15, cells[5]))
    return drawn


def gains(headings: Sequence[str]) -> list[tuple[str, str, str]]:
    """Model and source of the items, with the difference and its interval."""
    return [
        (f"{cells[0]}, {cells[1]}", mean, ends)
        for heading in headings
        for cells, mean, ends in differences(PAGE, heading)
    ]


if __name__ == "__main__":
    bars = hits()
    end = ROW * (len(bars) // 3) + GAP
    title = "difference in test NDCG@10, 95% interval"
    ticks = ("-.02", "-.01", "0", "+.01")
    ml_100k, end = intervals(
        LEFT, end, f"ML-100k: {title}", gains(ML_100K), zero=LEFT + 230, scale=9000, ticks=ticks
    )
    ticks = ("-.04", "-.02", "0")
    games, end = intervals(
        LEFT,
        end + GAP - TOP,
        f"Games: {title}",
        gains(GAMES),
        zero=LEFT + 380,
        scale=6800,
        ticks=ticks,
    )
    print(picture(LEFT + BAR + 60, int(end) + 8, LABEL, [*bars, *ml_100k, *games]))
