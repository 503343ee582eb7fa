"""Draw the tables of the results of LLM4IDRec: held-out items among those added, and gains.

Example:
    python docs/images/llm4idrec.py > docs/images/llm4idrec.svg
"""

from __future__ import annotations

from pathlib import Path

from drawing import box, intervals, number, picture, table, text

PAGE = Path(__file__).parents[1] / "results" / "llm4idrec.md"
HITS, GAINS = "## What the added items are like", ("## Retrievers trained on them", "## RecBole")
LEFT, BAR, ROW, TOP = 330, 380, 26, 34
SCALE, ZERO = 9000, LEFT + 230  # points per unit of NDCG@10, and where no difference is drawn
GAP = 46  # between the parts
TICKS = ("-.02", "-.01", "0", "+.01")
LABEL = (
    "Held-out items among the added ones as multiples of chance, and differences in NDCG@10 with "
    "their intervals: the tables below."
)


def hits() -> list[str]:
    """A bar for each source of items that has a multiple of chance."""
    rows = [cells for cells in table(PAGE, HITS)[1:] if cells[5]]
    longest = max(number(cells[5]) for cells in rows)
    drawn = [text(LEFT, 18, "held-out items among the added ones, 1 is chance", "name")]
    for index, cells in enumerate(rows):
        y, width = TOP + ROW * index, BAR * number(cells[5]) / longest
        kind = "model" if cells[0].startswith("generated") else ""
        drawn.append(text(LEFT - 14, y + 15, cells[0], "small", "end"))
        drawn.append(box(LEFT, y, width, ROW - 7, kind, radius=2))
        drawn.append(text(LEFT + width + 8, y + 15, cells[5]))
    return drawn


def gains(top: float) -> tuple[list[str], float]:
    """The differences of both tables, and where they end."""
    rows = []
    for heading in GAINS:
        head, *lines = table(PAGE, heading)
        mean, ends = head.index("difference in NDCG@10"), head.index("95% interval")
        rows += [(f"{x[0]}, {x[1]}", x[mean], x[ends]) for x in lines if x[mean]]
    title = "difference in test NDCG@10, 95% interval"
    return intervals(LEFT, top, title, rows, zero=ZERO, scale=SCALE, ticks=TICKS)


if __name__ == "__main__":
    bars = hits()
    points, end = gains(TOP + ROW * (len(bars) // 3) + GAP - TOP)
    print(picture(LEFT + BAR + 60, int(end) + 8, LABEL, [*bars, *points]))
