"""Draw the tables of the results of LLM4IDRec: held-out items among those added, and gains.

Example:
    python docs/images/llm4idrec.py > docs/images/llm4idrec.svg
"""

from __future__ import annotations

from pathlib import Path

from drawing import box, picture, table, text

PAGE = Path(__file__).parents[1] / "results" / "llm4idrec.md"
HITS, GAINS = "## What the added items are like", ("## Retrievers trained on them", "## RecBole")
LEFT, BAR, ROW, TOP = 330, 380, 26, 34
SCALE, ZERO = 9000, LEFT + 230  # points per unit of NDCG@10, and where no difference is drawn
GAP = 46  # between the parts
LABEL = (
    "Held-out items among the added ones as multiples of chance, and differences in NDCG@10 with "
    "their intervals: the tables below."
)


def number(cell: str) -> float:
    """A number of a table, such as ``+.0012``, ``-.0110`` or ``4.7``."""
    return float(cell.replace("**", ""))


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
    """A point with its interval for each difference of both tables, and where they end."""
    drawn = [text(LEFT, top + 18, "difference in test NDCG@10, 95% interval", "name")]
    y = start = top + TOP
    for heading in GAINS:
        head, *rows = table(PAGE, heading)
        mean, ends = head.index("difference in NDCG@10"), head.index("95% interval")
        for cells in rows:
            if not cells[mean]:
                continue
            low, high = (ZERO + SCALE * number(end) for end in cells[ends].split(" to "))
            middle = ZERO + SCALE * number(cells[mean])
            kind = "model" if cells[1].startswith("generated") else ""
            drawn.append(text(LEFT - 14, y + 15, f"{cells[0]}, {cells[1]}", "small", "end"))
            drawn.append(f'  <path d="M {low:g} {y + 10:g} H {high:g}"/>')
            drawn.append(box(middle - 5, y + 5, 10, 10, kind, radius=2))
            y += ROW
    drawn.append(f'  <path d="M {ZERO:g} {start - 4:g} V {y:g}" stroke-dasharray="3 3"/>')
    for tick in ("-.02", "-.01", "0", "+.01"):
        drawn.append(text(ZERO + SCALE * number(tick), y + 18, tick, "small", "middle"))
    return drawn, y + 18


if __name__ == "__main__":
    bars = hits()
    points, end = gains(TOP + ROW * (len(bars) // 3) + GAP - TOP)
    print(picture(LEFT + BAR + 60, int(end) + 8, LABEL, [*bars, *points]))
