"""Draw the picture of the two stages in the README.

Example:
    python docs/images/two_stages.py > docs/images/two-stages.svg
"""

from __future__ import annotations

from xml.sax.saxutils import escape

WIDTH, HEIGHT = 990, 270
STYLE = """\
    text { font: 15px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
    .name { font-weight: 600 }
    .small { font-size: 13px; fill: #59636e }
    rect { fill: #f6f8fa; stroke: #c8d1da }
    .model { fill: #ddf4ff; stroke: #54aeff }
    .chosen { font-weight: 600; fill: #0550ae }
    path { fill: none; stroke: #59636e; stroke-width: 1.6 }
    marker path { fill: #59636e; stroke: none }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 }
      .small { fill: #9198a1 }
      rect { fill: #151b23; stroke: #3d444d }
      .model { fill: #0c2d6b; stroke: #1f6feb }
      .chosen { fill: #79c0ff }
      path { stroke: #9198a1 }
      marker path { fill: #9198a1 }
    }"""
HISTORY = ("Halo 3", "Gears of War", "Mass Effect")
CANDIDATES = ("(A) Crysis 2", "(B) Mass Effect 2", "(C) Call of Duty", "…", "(T) Portal 2")
RANKING = ("1  Mass Effect 2", "2  Portal 2", "3  Crysis 2", "…", "20  Call of Duty")


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text."""
    kinds = f' class="{kind}"' if kind else ""
    return f'  <text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kinds}>{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "") -> str:
    """A rounded box."""
    kinds = f' class="{kind}"' if kind else ""
    return f'  <rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"{kinds}/>'


def arrow(path: str) -> str:
    """A line that ends in an arrow head."""
    return f'  <path d="{path}" marker-end="url(#head)"/>'


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


def picture() -> str:
    """The whole picture as SVG."""
    parts = [
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
    label = "A user's history goes to LRURec, which retrieves 20 of 7,676 items. Llama ranks them."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
            f' role="img" aria-label="{escape(label)}">',
            f"  <style>\n{STYLE}\n  </style>",
            '  <marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8"'
            ' markerHeight="8" orient="auto"><path d="M 0 0 L 8 4 L 0 8 z"/></marker>',
            *parts,
            "</svg>",
        ]
    )


if __name__ == "__main__":
    print(picture())
