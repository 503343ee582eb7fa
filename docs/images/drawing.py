"""Parts of the pictures in these documents: SVG that follows the reader's light or dark theme."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

STYLE = """\
    text { font: 15px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
    .name { font-weight: 600 }
    .small { font-size: 13px; fill: #59636e }
    rect { fill: #f6f8fa; stroke: #c8d1da }
    .model { fill: #ddf4ff; stroke: #54aeff }
    .empty { fill: none; stroke-dasharray: 3 3 }
    .chosen { font-weight: 600; fill: #0550ae }
    path { fill: none; stroke: #59636e; stroke-width: 1.6 }
    marker path { fill: #59636e; stroke: none }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 }
      .small { fill: #9198a1 }
      rect { fill: #151b23; stroke: #3d444d }
      .model { fill: #0c2d6b; stroke: #1f6feb }
      .empty { fill: none }
      .chosen { fill: #79c0ff }
      path { stroke: #9198a1 }
      marker path { fill: #9198a1 }
    }"""


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without the line below the table's head."""
    lines = page.read_text(encoding="utf-8").split(heading)[1].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def differences(page: Path, heading: str) -> list[tuple[list[str], str, str]]:
    """The cells, the difference in NDCG@10 and its interval, of each line that has a difference."""
    head, *lines = table(page, heading)
    mean, ends = head.index("difference in NDCG@10"), head.index("95% interval")
    return [(cells, cells[mean], cells[ends]) for cells in lines if cells[mean]]


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text."""
    kinds = f' class="{kind}"' if kind else ""
    return f'  <text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kinds}>{escape(content)}</text>'


def box(
    x: float, y: float, width: float, height: float, kind: str = "", *, radius: float = 8
) -> str:
    """A rounded box."""
    kinds = f' class="{kind}"' if kind else ""
    size = f'width="{width:g}" height="{height:g}"'
    return f'  <rect x="{x:g}" y="{y:g}" {size} rx="{radius:g}"{kinds}/>'


def cell(x: float, y: float, width: float, height: float, content: str, kind: str = "") -> str:
    """A box of a row of boxes, with a text in its middle."""
    frame = box(x, y, width, height, kind, radius=2)
    middle = text(x + width / 2, y + height / 2 + 5, content, anchor="middle")
    return f"{frame}\n{middle}" if content else frame


def neighbor_kind(index: int) -> str:
    """A kind of box for each of several things in a row, so that neighbors look different."""
    return "model" if index % 2 == 0 else ""


def padded_rows(
    x: float, y: float, rows: Sequence[Sequence[str]], width: float, height: float, caption: str
) -> list[str]:
    """A row of cells for each sequence of contents, padded on the left, below a caption."""
    parts = [text(x, y - 14, caption, "small")]
    longest = max(map(len, rows))
    for index, contents in enumerate(rows):
        num_empty = longest - len(contents)
        for column, content in enumerate([*[""] * num_empty, *contents]):
            kind = "empty" if column < num_empty else neighbor_kind(index)
            left, top = x + width * column, y + height * index
            parts.append(cell(left, top, width, height, content, kind))
    return parts


def intervals(
    left: float,
    top: float,
    title: str,
    rows: Sequence[tuple[str, str, str]],
    *,
    zero: float,
    scale: float,
    ticks: Sequence[str],
) -> tuple[list[str], float]:
    """A point with its interval for each difference, one below the other, and where they end.

    Args:
        left: where the labels end.
        top: where the title begins.
        title: what is shown.
        rows: label of each difference, the difference and its interval as in ``-.01 to +.02``.
            Labels that contain ``generated`` are highlighted.
        zero: where no difference is drawn.
        scale: points per unit.
        ticks: differences to mark below.
    """
    y = start = top + 34
    drawn = [text(left, top + 18, title, "name")]
    for label, mean, ends in rows:
        low, high = (zero + scale * number(end) for end in ends.split(" to "))
        kind = "model" if "generated" in label else ""
        drawn.append(text(left - 14, y + 15, label, "small", "end"))
        drawn.append(f'  <path d="M {low:g} {y + 10:g} H {high:g}"/>')
        drawn.append(box(zero + scale * number(mean) - 5, y + 5, 10, 10, kind, radius=2))
        y += 26
    drawn.append(f'  <path d="M {zero:g} {start - 4:g} V {y:g}" stroke-dasharray="3 3"/>')
    drawn += [text(zero + scale * number(tick), y + 18, tick, "small", "middle") for tick in ticks]
    return drawn, y + 18


def number(cell: str) -> float:
    """A number of a table, such as ``+.0012``, ``-.0110`` or ``4.7``."""
    return float(cell.replace("**", ""))


def arrow(path: str) -> str:
    """A line that ends in an arrow head."""
    return f'  <path d="{path}" marker-end="url(#head)"/>'


def picture(width: int, height: int, label: str, parts: Iterable[str]) -> str:
    """A whole picture as SVG.

    Args:
        width: its width.
        height: its height.
        label: what it shows, for those who cannot see it.
        parts: its elements.
    """
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' role="img" aria-label={quoteattr(label)}>',
            f"  <style>\n{STYLE}\n  </style>",
            '  <marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8"'
            ' markerHeight="8" orient="auto"><path d="M 0 0 L 8 4 L 0 8 z"/></marker>',
            *parts,
            "</svg>",
        ]
    )
