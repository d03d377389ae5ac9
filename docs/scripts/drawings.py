"""Draws the pictures of the documentation's explanations. A test compares them with the files.

    python docs/scripts/drawings.py

The masks are those of the library's own layouts. Pictures of results are not here: `plots.py` draws
the benchmarks, and the scripts that compute other results draw them.
"""

import math
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from svg import Drawing

import dpo_eqx as dpx

FOLDER = Path(__file__).parents[1] / "drawings"
KINDS = {-1: "empty", 0: "first", 1: "second", 2: "third"}  # by the segment of a token


def optimum() -> Drawing:
    """The optimum of the objective for three values of beta, and the loss over the margin."""
    drawing = Drawing(520, 520, "What DPO converges to, and its loss")
    rewards = np.array([-1.0, 0.0, 0.5, 1.0, 2.0])
    reference = np.array([0.3, 0.3, 0.2, 0.15, 0.05])
    drawing.text(10, 22, "Five answers: reference and optimum", "bold", "start")
    for number, (x, name) in enumerate(((14, "reference"), (120, "β = 1"), (196, "β = 0.4"))):
        drawing.rect(x, 34, 12, 12, ("empty", "first", "second")[number])
        drawing.text(x + 18, 45, name, "small", "start")
    bottom, height = 220, 160
    for answer, reward in enumerate(rewards):
        left = 30 + 96 * answer
        for number, beta in enumerate((math.inf, 1.0, 0.4)):
            tilted = reference * np.exp(rewards / beta)
            share = tilted[answer] / tilted.sum()
            bar = height * share
            kind = ("empty", "first", "second")[number]
            drawing.rect(left + 24 * number, round(bottom - bar, 1), 22, round(bar, 1), kind)
        drawing.text(left + 35, bottom + 18, f"reward {reward:g}", "small")
    drawing.path([(14, bottom), (506, bottom)], "axis")
    _loss_curve(drawing, 290)
    return drawing


def _loss_curve(drawing: Drawing, top: float) -> None:
    """The loss of DPO over the margin of a pair, with the place where training starts."""
    drawing.text(10, top, "The loss of a pair over z = β (log-ratio difference)", "bold", "start")
    bottom, left, scale = top + 190, 260, 55

    def place(z: float) -> tuple[float, float]:
        return left + scale * z, bottom - 40 * math.log1p(math.exp(-z))

    drawing.path([(20, bottom), (500, bottom)], "axis")
    drawing.path([(left, bottom), (left, top + 20)], "axis")
    drawing.path([place(z) for z in np.linspace(-4.2, 4.2, 85).tolist()], "curve")
    drawing.circle(*place(0), 5, "point")
    drawing.text(left + 14, place(0)[1] - 8, "log 2: policy = reference", "small", "start")
    for z in (-4, -2, 0, 2, 4):
        drawing.text(left + scale * z, bottom + 18, f"{z}", "small")
    drawing.text(40, bottom - 12, "ranks the pair wrongly", "small", "start")
    drawing.text(490, bottom - 12, "ranks it rightly", "small", "end")


def way() -> Drawing:
    """The functions of a step, and the records between them."""
    drawing = Drawing(520, 480, "The way of the data through one step")
    drawing.box(170, 10, 180, 36, "records, texts, ids")
    drawing.arrow((260, 46), (260, 86))
    drawing.text(270, 71, "data", "code", "start")
    drawing.box(170, 86, 180, 36, "PreferenceBatch")
    drawing.arrow((215, 122), (130, 186))
    drawing.arrow((305, 122), (390, 186))
    drawing.text(158, 150, "score, policy", "code", "end")
    drawing.text(362, 150, "score, reference", "code", "start")
    drawing.box(30, 186, 200, 48, "PairLogProbs", "of the policy")
    drawing.box(290, 186, 200, 48, "PairLogProbs of the", "reference: no gradient")
    drawing.arrow((130, 234), (215, 298))
    drawing.arrow((390, 234), (305, 298))
    drawing.text(260, 272, "loss", "code")
    drawing.box(170, 298, 180, 48, "PairLoss", "one number for each pair")
    drawing.arrow((260, 346), (260, 386))
    drawing.text(270, 371, "weighted mean, gradient", "", "start")
    drawing.box(170, 386, 180, 36, "gradients, metrics")
    drawing.arrow((260, 422), (260, 452))
    drawing.text(270, 442, "optax", "code", "start")
    drawing.text(260, 470, "the next policy", "bold")
    return drawing


def shared_prompt() -> Drawing:
    """A row of one prompt with both completions, and its mask."""
    layout = dpx.Layout(jnp.asarray(3), 4, (3, 4))
    return _row(layout, "A row with a shared prompt, and which tokens see which")


def packed() -> Drawing:
    """A packed row of two pairs, and its mask."""
    lengths = jnp.asarray([[3, 2, 3], [2, 2, 2]])
    layout = dpx.PackedLayout(lengths, length=16, longest=6, longest_pair=8)
    return _row(layout, "A packed row of two pairs, and which tokens see which")


def _row(layout: dpx.Layout | dpx.PackedLayout, label: str) -> Drawing:
    """The tokens of a row, their positions, and the mask of their attention."""
    length, side = layout.length, 24
    left, top = 110, 130
    drawing = Drawing(left + side * length + 20, top + side * length + 40, label)
    names = ("prompt", "chosen", "rejected", "padding")
    for number, (segment, name) in enumerate(zip((0, 1, 2, -1), names, strict=True)):
        drawing.rect(10 + 100 * number, 10, 14, 14, KINDS[segment])
        drawing.text(30 + 100 * number, 22, name, "small", "start")
    segments, positions = np.asarray(layout.segments), np.asarray(layout.positions)
    drawing.text(left - 10, 65, "row", "", "end")
    drawing.text(left - 10, 95, "positions", "", "end")
    for place, (segment, position) in enumerate(zip(segments, positions, strict=True)):
        drawing.rect(left + side * place, 48, side, side, f"cell {KINDS[segment]}")
        drawing.text(left + side * (place + 0.5), 95, f"{position}", "small")
    drawing.text(left, 122, "a token (line) sees the tokens (columns) in colour", "small", "start")
    for token, line in enumerate(np.asarray(layout.mask())):
        y = top + side * token
        drawing.rect(left - side - 6, y, side, side, f"cell {KINDS[segments[token]]}")
        for place, sees in enumerate(line):
            kind = KINDS[segments[place]] if sees else ""
            fill = "" if sees else ' fill-opacity="0.06"'
            _cell(drawing, left + side * place, y, side, kind, fill)
    return drawing


def _cell(drawing: Drawing, x: float, y: float, side: float, kind: str, more: str) -> None:
    drawing.parts.append(
        f'<rect class="cell {kind}" x="{x:g}" y="{y:g}" width="{side}" height="{side}"{more}/>'
    )


def axes() -> Drawing:
    """What each of eight devices holds on a mesh with two along each axis."""
    drawing = Drawing(520, 500, "Rows and parameters on a mesh of data=2, fsdp=2, tensor=2")
    drawing.text(10, 22, "mesh: data=2, fsdp=2, tensor=2", "code", "start")
    drawing.text(10, 46, "In each device: its rows of the batch (green),", "small", "start")
    drawing.text(10, 62, "and its part of each weight (blue).", "small", "start")
    for device in range(8):
        data, fsdp, tensor = device >> 2 & 1, device >> 1 & 1, device & 1
        x, y = 60 + 115 * (2 * data + fsdp), 116 + 185 * tensor
        drawing.rect(x, y, 100, 165)
        for part in range(4):
            mine = part == 2 * data + fsdp
            drawing.rect(x + 10, y + 10 + 18 * part, 22, 16, "second" if mine else "empty")
        for down in range(2):
            for right in range(2):
                mine = (down, right) == (fsdp, tensor)
                kind = "first" if mine else "empty"
                drawing.rect(x + 42 + 24 * right, y + 10 + 35 * down, 22, 33, kind)
        drawing.text(x + 50, y + 106, f"rows {4 * data + 2 * fsdp}, {4 * data + 2 * fsdp + 1}")
        drawing.text(x + 50, y + 128, f"heads {tensor} of 2", "small")
        drawing.text(x + 50, y + 148, f"fsdp part {fsdp}", "small")
    for group in range(4):
        x = 110 + 115 * group
        drawing.text(x, 106, f"data {group // 2}, fsdp {group % 2}", "small")
    for tensor in range(2):
        drawing.text(8, 200 + 185 * tensor, "tensor", "small", "start")
        drawing.text(8, 216 + 185 * tensor, f"{tensor}", "small", "start")
    return drawing


def two_passes() -> Drawing:
    """The gradient of a loss that couples pairs, over three microbatches."""
    drawing = Drawing(520, 480, "The gradient in two passes over the microbatches")
    for number in range(3):
        x = 20 + 170 * number
        drawing.box(x, 10, 140, 36, f"microbatch {number + 1}")
        drawing.arrow((x + 70, 46), (x + 70, 86))
        drawing.arrow((x + 70, 122), (x + 70, 166))
        drawing.box(x, 86, 140, 36, "log-probabilities")
        drawing.arrow((x + 70, 258), (x + 70, 302))
        drawing.box(x, 302, 140, 48, "score again,", "pull slopes back")
        drawing.arrow((x + 70, 350), (x + 70, 402))
    drawing.text(98, 71, "score: pass 1", "small", "start")
    drawing.box(20, 166, 480, 36, "loss of all pairs of the global batch")
    drawing.arrow((260, 202), (260, 222))
    drawing.box(20, 222, 480, 36, "slopes: d loss / d log-probability, one for each pair")
    drawing.text(98, 285, "pass 2", "small", "start")
    drawing.box(20, 402, 480, 36, "sum: the gradient")
    drawing.text(260, 464, "If a loss does not couple pairs, both passes are one.", "small")
    return drawing


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "optimum": optimum,
    "way": way,
    "shared_prompt": shared_prompt,
    "packed": packed,
    "axes": axes,
    "two_passes": two_passes,
}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw().write(FOLDER / f"{name}.svg")
