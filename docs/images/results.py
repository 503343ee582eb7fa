"""Draw the table of the README's results.

Example:
    python docs/images/results.py > docs/images/results.svg
"""

from __future__ import annotations

from pathlib import Path

from drawing import box, picture, table, text

README = Path(__file__).parents[2] / "README.md"
HEADING = "## Results"
LEFT, PANEL, BAR, ROW, TOP = 430, 185, 105, 30, 44  # the longest bar of a panel has the width BAR
LABEL = "Test NDCG@10 of the paper and of this project, the table above as bars."


def parts() -> list[str]:
    """A row for each row of the table, and a panel for each data set."""
    (_, *datasets), *rows = table(README, HEADING)
    drawn = []
    for row, (name, *_) in enumerate(rows):
        drawn.append(text(LEFT - 14, TOP + ROW * row + 18, name, "small", "end"))
    for column, dataset in enumerate(datasets, 1):
        x, highest = LEFT + PANEL * (column - 1), max(float(cells[column]) for cells in rows)
        drawn.append(text(x, TOP - 16, dataset, "name"))
        for row, cells in enumerate(rows):
            y, width = TOP + ROW * row, BAR * float(cells[column]) / highest
            kind = "" if "paper," in cells[0] or cells[0].endswith(": paper") else "model"
            drawn.append(box(x, y, width, ROW - 7, kind, radius=2))
            bold = "chosen" if float(cells[column]) == highest else ""
            drawn.append(text(x + width + 8, y + 17, cells[column], bold))
    return drawn


if __name__ == "__main__":
    num_rows = len(table(README, HEADING)) - 1
    print(picture(LEFT + 3 * PANEL, TOP + ROW * num_rows + 6, LABEL, parts()))
