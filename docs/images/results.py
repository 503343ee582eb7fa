"""Draw the table of the README's results.

Example:
    python docs/images/results.py > docs/images/results.svg
"""

from __future__ import annotations

from pathlib import Path

from drawing import box, picture, text

README = Path(__file__).parents[2] / "README.md"
HEADING = "## What it achieves"
LEFT, PANEL, BAR, ROW, TOP = 430, 185, 105, 30, 44  # the longest bar of a panel has the width BAR
LABEL = "Test NDCG@10 of the paper and of this project, the table above as bars."


def table() -> list[list[str]]:
    """The cells of the first table below the heading, without the line below its head."""
    lines = README.read_text(encoding="utf-8").split(HEADING)[1].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def parts() -> list[str]:
    """A row for each row of the table, and a panel for each data set."""
    (_, *datasets), *rows = table()
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
    print(picture(LEFT + 3 * PANEL, TOP + ROW * (len(table()) - 1) + 6, LABEL, parts()))
