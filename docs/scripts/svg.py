"""A small canvas that writes Scalable Vector Graphics (SVG). It draws nothing by itself.

It has colours for light and for dark pages. A browser chooses the colours by
the colour scheme of the page around the picture.
"""

from html import escape
from pathlib import Path

STYLE = """
text { font: 14px sans-serif; fill: #20242c }
.small { font-size: 12px }
.code { font-family: monospace }
.bold { font-weight: bold }
.line { stroke: #565f70; fill: none; stroke-width: 1.5 }
.axis { stroke: #98a0b0; fill: none }
.head { fill: #565f70 }
.box { fill: #eef1fb; stroke: #5c6bc0 }
.cell { stroke: #ffffff; stroke-width: 1 }
.empty { fill: #e7e9ee }
.other { fill: #c3c8d4 }
.first { fill: #8c9eff }
.second { fill: #4db6ac }
.third { fill: #ff9e80 }
.curve { stroke: #3949ab; fill: none; stroke-width: 2.5 }
.point { fill: #d84315 }
@media (prefers-color-scheme: dark) {
text { fill: #e4e6ee }
.line { stroke: #a9b1c4 }
.axis { stroke: #6b7388 }
.head { fill: #a9b1c4 }
.box { fill: #2b3047; stroke: #9fa8da }
.cell { stroke: #1e2129 }
.empty { fill: #3a3f4e }
.other { fill: #596175 }
.first { fill: #6f7fe0 }
.second { fill: #26a69a }
.third { fill: #e07a5a }
.curve { stroke: #9fa8da }
.point { fill: #ff8a65 }
}
"""


class Drawing:
    """A picture of a fixed size, in pixels; `label` says in words what it shows."""

    def __init__(self, width: int, height: int, label: str):
        self.width, self.height, self.label = width, height, label
        self.parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, kind: str = "box") -> None:
        """A rectangle of a class of `STYLE`; boxes have round corners."""
        radius = ' rx="6"' if kind == "box" else ""
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
            f"{radius}/>"
        )

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> None:
        """A line of text with its baseline at `y`."""
        head = f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">'
        self.parts.append(f"{head}{escape(words)}</text>")

    def box(self, x: float, y: float, width: float, height: float, *lines: str) -> None:
        """A box with lines of text in its middle."""
        self.rect(x, y, width, height)
        top = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * number, line)

    def path(self, points: list[tuple[float, float]], kind: str = "line") -> None:
        """A line through some points."""
        places = " L".join(f"{x:.5g} {y:.5g}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="M{places}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through some points with a head at its end; its last part is straight."""
        (x, y), (end_x, end_y) = points[-2:]
        length = ((end_x - x) ** 2 + (end_y - y) ** 2) ** 0.5
        along = (end_x - x) / length, (end_y - y) / length
        base = end_x - 9 * along[0], end_y - 9 * along[1]
        across = -4.5 * along[1], 4.5 * along[0]
        corners = [(base[0] + s * across[0], base[1] + s * across[1]) for s in (1, -1)]
        self.path([*points[:-1], base])
        self.path([*corners, (end_x, end_y)], "head")

    def circle(self, x: float, y: float, radius: float, kind: str) -> None:
        """A filled circle."""
        self.parts.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>')

    def svg(self) -> str:
        """The picture as a file of SVG."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{self.width}" '
            f'height="{self.height}" viewBox="0 0 {self.width} {self.height}">\n'
            f"<title>{escape(self.label)}</title>\n<style>{STYLE}</style>\n"
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"

    def write(self, path: Path) -> None:
        """Writes the picture to a file."""
        path.write_text(self.svg(), encoding="utf-8")
