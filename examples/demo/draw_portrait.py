"""Draw portrait.png, the demo's reference image: a person in a room, all splines, gradients and soft shadows.

    python examples/demo/draw_portrait.py [OUTPUT.png]

Everything is drawn at four times the size and reduced at the end. Coordinates are pixels of the final image.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT, SCALE = 640, 360, 4
Point = tuple[float, float]
Points = Sequence[Point]
Layer = NDArray[np.float32]  # (rows, columns): coverage 0..1
Colour = tuple[int, int, int]

SKIN, SKIN_LIGHT, SKIN_SHADE, SKIN_DEEP = (231, 178, 149), (252, 216, 190), (186, 118, 92), (120, 62, 48)
HAIR, HAIR_DARK, HAIR_LIGHT = (88, 54, 40), (40, 24, 20), (190, 128, 84)
SWEATER, SWEATER_DARK, SWEATER_LIGHT = (42, 108, 114), (16, 56, 66), (104, 172, 170)

grid_y, grid_x = np.mgrid[0 : HEIGHT * SCALE, 0 : WIDTH * SCALE].astype(np.float32) / SCALE
random = np.random.default_rng(7)


# ---- coverage ----
def spline(points: Points, closed: bool = True, steps: int = 20) -> list[Point]:
    """Catmull-Rom curve through `points`."""
    p = np.asarray(points, dtype=np.float64)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = []
    for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True):
        pieces.append(
            0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        )
    curve = np.concatenate([*pieces, p[-2:-1]])
    return [(float(x), float(y)) for x, y in curve]


def stroke_outline(points: Points, width: float) -> list[Point]:
    """Outline of a brush stroke along `points`: `width` at its widest (the middle), thin at both ends."""
    line = np.asarray(spline(points, closed=False))
    direction = np.gradient(line, axis=0)
    normal = np.stack([-direction[:, 1], direction[:, 0]], 1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    half = 0.5 * width * np.sin(np.linspace(0.06, math.pi - 0.06, len(line)))[:, None] ** 0.7
    outline = np.concatenate([line + normal * half, (line - normal * half)[::-1]])
    return [(float(x), float(y)) for x, y in outline]


def tilted(points: Iterable[Point]) -> list[Point]:
    """The head leans a little: rotate about the neck."""
    angle, cx, cy = math.radians(3.2), 320.0, 250.0
    c, s = math.cos(angle), math.sin(angle)
    return [(cx + c * (x - cx) - s * (y - cy), cy + s * (x - cx) + c * (y - cy)) for x, y in points]


def mirrored(half: Points) -> list[Point]:
    """Close a shape given from top to bottom on its right side, symmetric about x = 320."""
    return [*half, *[(640 - x, y) for x, y in reversed(half) if abs(x - 320) > 1e-6]]


def oval(x: float, y: float, rx: float, ry: float) -> list[Point]:
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def fill(*shapes: Points, blur: float = 0.0) -> Layer:
    """Coverage of polygons, optionally blurred by `blur` pixels."""
    image = Image.new("L", (WIDTH * SCALE, HEIGHT * SCALE))
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        draw.polygon([(x * SCALE, y * SCALE) for x, y in shape], fill=255)
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur * SCALE))
    return np.asarray(image, dtype=np.float32) / 255


def soft(layer: Layer, blur: float, shift: Point = (0, 0)) -> Layer:
    """A blurred, shifted copy: the shadow or the glow of `layer`."""
    image = Image.fromarray((layer * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur * SCALE))
    moved = np.roll(np.asarray(image), (round(shift[1] * SCALE), round(shift[0] * SCALE)), (0, 1))
    return moved.astype(np.float32) / 255


def glow(x: float, y: float, rx: float, ry: float) -> Layer:
    """A Gaussian spot."""
    return np.exp(-(((grid_x - x) / rx) ** 2) - ((grid_y - y) / ry) ** 2)


def ramp(values: NDArray[np.float32], start: float, stop: float) -> Layer:
    """0 at `start`, 1 at `stop`, smooth between."""
    t = np.clip((values - start) / (stop - start), 0, 1)
    return t * t * (3 - 2 * t)


class Canvas:
    def __init__(self) -> None:
        self.pixels = np.zeros((HEIGHT * SCALE, WIDTH * SCALE, 3), dtype=np.float32)

    def paint(self, colour: Colour, coverage: Layer | float, opacity: float = 1.0) -> None:
        alpha = np.asarray(coverage, dtype=np.float32)[..., None] * opacity
        self.pixels += (np.asarray(colour, dtype=np.float32) - self.pixels) * alpha

    def line(
        self,
        colour: Colour,
        points: Points,
        width: float,
        blur: float,
        opacity: float,
        within: Layer | float = 1.0,
    ) -> None:
        self.paint(colour, fill(stroke_outline(points, width), blur=blur) * within, opacity)

    def strands(
        self,
        colour: Colour,
        lines: Iterable[Points],
        width: float,
        opacity: float,
        within: Layer | float = 1.0,
    ) -> None:
        self.paint(
            colour, fill(*(stroke_outline(line, width) for line in lines), blur=0.25) * within, opacity
        )

    def save(self, path: Path) -> None:
        grain = random.normal(0, 0.8, (HEIGHT, WIDTH, 1))
        small = self.pixels.reshape(HEIGHT, SCALE, WIDTH, SCALE, 3).mean((1, 3))
        Image.fromarray(np.clip(small + grain, 0, 255).astype(np.uint8)).save(path, optimize=True)


# ---- the picture, back to front ----
def background(canvas: Canvas) -> None:
    canvas.paint((222, 206, 188), 1.0)
    canvas.paint((126, 120, 122), ramp(grid_x + 0.25 * grid_y, 150, 720))
    canvas.paint((96, 82, 76), ramp(grid_y, 250, 400), 0.55)
    for x, y in ((22, 8), (98, 8), (22, 122), (98, 122)):  # window panes
        pane = fill([(x, y), (x + 66, y), (x + 66, y + 104), (x, y + 104)], blur=7)
        canvas.paint((255, 248, 230), pane, 0.92)
    canvas.paint((255, 238, 205), glow(90, 120, 190, 190), 0.45)
    for y in (92, 178):  # shelves with books
        canvas.paint((86, 66, 58), fill([(470, y), (640, y), (640, y + 7), (470, y + 7)], blur=4), 0.8)
    books = [(482, 60, 13), (497, 54, 10), (509, 64, 16), (560, 50, 12), (575, 58, 15), (592, 52, 9)]
    tones = [(160, 84, 66), (196, 160, 104), (88, 116, 122), (178, 128, 96), (84, 92, 112), (206, 184, 150)]
    for (x, y, w), tone in zip(books, tones, strict=True):
        canvas.paint(tone, fill([(x, y), (x + w, y), (x + w, 92), (x, 92)], blur=4), 0.85)
    for angle, length in zip(np.linspace(-1.5, 1.5, 9), (44, 60, 50, 66, 56, 68, 48, 58, 42), strict=True):
        bend = (556 + 0.45 * length * math.sin(0.5 * angle), 164 - 0.6 * length)
        tip = (556 + length * math.sin(angle), 164 - length * math.cos(0.8 * angle))
        canvas.line((78, 112, 84), [(556, 166), bend, tip], 9, 3, 0.7)
    canvas.paint((196, 120, 88), fill([(541, 156), (571, 156), (567, 179), (545, 179)], blur=3), 0.9)
    canvas.paint((255, 214, 150), glow(602, 246, 52, 52), 0.75)
    canvas.paint((255, 240, 205), glow(602, 246, 20, 20), 0.8)


RIGHT_CHEEK = [(320, 74), (352, 80), (373, 106), (378, 142), (373, 176), (358, 205), (338, 221), (320, 225)]
HEAD = tilted(spline(mirrored(RIGHT_CHEEK)))
BACK_HAIR = [
    *tilted([(320, 42), (362, 50), (394, 82), (404, 128), (408, 172)]),
    *[
        (412, 222),
        (420, 262),
        (406, 292),
        (378, 298),
        (320, 290),
        (264, 298),
        (236, 290),
        (222, 258),
        (230, 216),
    ],
    *tilted([(233, 172), (236, 124), (246, 82), (278, 50)]),
]
# The two locks that frame the face: down the outer edge from the parting, back up the inner one.
PARTING = (337, 43)
LOCK_RIGHT_OUTER = [PARTING, (364, 50), (394, 82), (404, 128), (408, 174), (413, 226), (419, 262), (404, 292)]
LOCK_RIGHT_INNER = [
    (338, 77),
    (348, 82),
    (364, 96),
    (378, 120),
    (383, 160),
    (384, 204),
    (382, 246),
    (386, 290),
]
LOCK_LEFT_OUTER = [
    PARTING,
    (318, 42),
    (278, 50),
    (246, 82),
    (236, 126),
    (231, 178),
    (224, 230),
    (218, 268),
    (238, 300),
]
LOCK_LEFT_INNER = [
    (338, 77),
    (320, 84),
    (288, 101),
    (266, 122),
    (258, 152),
    (259, 196),
    (262, 236),
    (258, 272),
    (264, 298),
]


def hair_behind(canvas: Canvas) -> None:
    hair = fill(spline(BACK_HAIR), blur=0.5)
    canvas.paint(HAIR_DARK, soft(hair, 9, (6, 6)), 0.25)
    canvas.paint(HAIR_DARK, hair)
    canvas.paint(HAIR, hair * ramp(np.abs(grid_x - 320), 62, 104), 0.9)
    for side, colour in ((-1, HAIR_LIGHT), (-1, HAIR), (1, HAIR), (-1, HAIR_DARK), (1, HAIR_DARK)):
        lines = []
        for _ in range(34):
            x = 320 + side * random.uniform(66, 98)
            bend = random.uniform(-6, 6)
            lines.append(
                [(x - side * 6, 118), (x, 180), (x + side * 5 + bend, 236), (x - side * 8 + bend, 300)]
            )
        canvas.strands(colour, lines, 1.5, 0.4, hair)


def body(canvas: Canvas) -> None:
    neck = fill(
        spline(
            [
                (292, 196),
                (292, 232),
                (284, 258),
                (262, 276),
                (320, 318),
                (378, 276),
                (356, 258),
                (350, 232),
                (350, 196),
            ]
        )
    )
    canvas.paint(SKIN, neck)
    canvas.paint(SKIN_SHADE, neck * ramp(grid_x, 305, 372), 0.75)
    canvas.paint(SKIN_LIGHT, neck * glow(288, 266, 22, 22), 0.5)
    canvas.paint(SKIN_DEEP, neck * soft(fill(HEAD), 7, (3, 17)), 0.62)
    canvas.line(SKIN_SHADE, [(300, 262), (309, 280), (318, 291)], 5, 2, 0.5, neck)
    canvas.line(SKIN_SHADE, [(342, 262), (332, 280), (324, 291)], 5, 2, 0.5, neck)

    shoulders = [
        (262, 268),
        (282, 292),
        (320, 305),
        (358, 292),
        (378, 268),
        (412, 284),
        (458, 300),
        (494, 328),
        (512, 372),
    ]
    shoulders += [(500, 400), (140, 400), (128, 372), (146, 328), (182, 300), (228, 284)]
    sweater = fill(spline(shoulders))
    canvas.paint(SWEATER_DARK, neck * soft(sweater, 3, (0, -3)), 0.45)
    canvas.paint(SWEATER, sweater)
    canvas.paint(SWEATER_LIGHT, sweater * ramp(-grid_x, -300, -130), 0.5)
    canvas.paint(SWEATER_LIGHT, sweater * glow(200, 312, 52, 24), 0.45)
    canvas.paint(SWEATER_DARK, sweater * ramp(grid_x, 330, 500), 0.7)
    canvas.paint(SWEATER_DARK, sweater * ramp(grid_y, 318, 380), 0.35)
    for points in ([(206, 372), (214, 346), (234, 326)], [(434, 372), (424, 346), (404, 328)]):
        canvas.line(SWEATER_DARK, points, 14, 5, 0.6, sweater)
    ribs = [[(x, 255), (x + (x - 320) * 0.12, 400)] for x in np.arange(130, 515, 4.2)]
    canvas.paint(SWEATER_DARK, sweater * fill(*(stroke_outline(rib, 1.4) for rib in ribs), blur=0.4), 0.22)
    collar_line = [(259, 267), (280, 294), (320, 308), (360, 294), (381, 267)]
    collar = fill(stroke_outline([(x, y + 3) for x, y in collar_line], 13))
    canvas.paint(SWEATER_DARK, sweater * soft(collar, 2.5, (1, 4)), 0.55)
    canvas.paint(SWEATER, collar)
    canvas.paint(SWEATER_LIGHT, collar * ramp(-grid_x, -350, -260), 0.55)
    canvas.paint(SWEATER_DARK, collar * ramp(grid_x, 325, 385), 0.6)


def face(canvas: Canvas) -> None:
    head = fill(HEAD)
    canvas.paint(SKIN, head)
    canvas.paint(SKIN_LIGHT, head * glow(288, 136, 54, 66), 0.85)
    canvas.paint(SKIN_LIGHT, head * glow(318, 102, 38, 22), 0.35)
    canvas.paint(SKIN_SHADE, head * ramp(grid_x, 326, 392), 0.72)
    canvas.paint(SKIN_SHADE, head * ramp(grid_y, 196, 236), 0.5)
    canvas.paint(SKIN_SHADE, head * (1 - soft(head, 8)), 0.8)
    for x, y in tilted([(283, 176), (358, 176)]):
        canvas.paint((226, 112, 96), head * glow(x, y, 19, 13), 0.34)
    for x, y in tilted([(277, 166)]):
        canvas.paint((255, 236, 216), head * glow(x, y, 13, 9), 0.5)
    for x, y in tilted([(293, 148), (347, 148)]):
        canvas.paint(SKIN_SHADE, head * glow(x, y, 19, 11), 0.42)


def eye(canvas: Canvas, x: float, y: float, side: int) -> None:
    """One eye; `side` is -1 for the one on the left of the picture, whose outer corner points left."""

    def at(*points: Point) -> list[Point]:
        return tilted((x + side * dx, y + dy) for dx, dy in points)

    opening = fill(
        spline(at((-12.5, 2.2), (-7, -3.6), (0, -6.2), (7, -4.8), (13, -0.8), (8, 3.6), (0, 5), (-7, 4.2)))
    )
    canvas.paint(SKIN_DEEP, soft(opening, 1.6, (0, -1)), 0.4)
    canvas.paint((244, 238, 233), opening)
    cx, cy = at((0.2 - side * 0.8, -0.6))[0]
    canvas.paint((46, 28, 22), opening * fill(oval(cx, cy, 6.4, 6.4), blur=0.3))
    canvas.paint((112, 72, 44), opening * fill(oval(cx, cy, 5.5, 5.5), blur=0.5))
    canvas.paint((186, 126, 72), opening * fill(oval(cx, cy + 2.2, 3.9, 2.6), blur=1), 0.75)
    canvas.paint((16, 10, 10), opening * fill(oval(cx, cy, 2.7, 2.7), blur=0.2))
    canvas.paint((60, 34, 30), opening * soft(1 - opening, 1.6, (0, 2.6)), 0.75)
    canvas.paint((255, 255, 255), fill(oval(cx - 2.0, cy - 2.3, 1.5, 1.7), blur=0.2))
    canvas.paint((255, 255, 255), fill(oval(cx + 2.2, cy + 2.0, 0.8, 0.8), blur=0.2), 0.6)
    canvas.line(
        (36, 20, 18), at((-12.8, 2.4), (-7, -4), (0, -6.8), (7.5, -5.4), (15.4, -2.6)), 2.5, 0.25, 0.95
    )
    roots = [(5.5, -5.2), (8.5, -4.4), (11.2, -3.2), (13.4, -2)]
    lashes = [
        at((x, y), (x + 1.2 + k * 0.5, y - 2), (x + 2.6 + k * 0.8, y - 2.6)) for k, (x, y) in enumerate(roots)
    ]
    canvas.strands((36, 20, 18), lashes, 1.0, 0.7)
    canvas.line(SKIN_DEEP, at((-11, -3.4), (-4, -9.4), (5, -10.2), (14, -6)), 1.3, 0.5, 0.55)
    canvas.line(SKIN_DEEP, at((-11, 4.2), (-2, 6.6), (8, 5), (13, 0.4)), 1.1, 0.5, 0.5)
    canvas.line(SKIN_SHADE, at((-10, 9), (0, 11.6), (10, 8.6)), 2.4, 1.4, 0.4)
    canvas.line(HAIR, at((-14, -14.6), (-5, -18.2), (6, -19.6), (17, -14.2)), 4.6, 0.9, 0.75)
    hairs = []
    for dx in np.arange(-14, 11, 1.5):
        arch = 3.3 * math.sin((dx + 14) / 9.4)
        hairs.append(at((dx, -14.4 - arch), (dx + 3.6, -18 - arch)))
    canvas.strands(HAIR_DARK, hairs, 0.9, 0.4)


def nose_and_mouth(canvas: Canvas) -> None:
    shade = spline(
        tilted([(327, 146), (329, 162), (333, 174), (331, 182), (325, 184), (324, 168), (324, 150)])
    )
    canvas.paint(SKIN_SHADE, fill(shade, blur=3), 0.65)
    canvas.line((255, 238, 220), tilted([(317, 140), (316.5, 158), (317, 171)]), 6, 2.4, 0.55)
    canvas.paint((255, 244, 232), fill(oval(*tilted([(317.5, 174)])[0], 3.2, 2.4), blur=1.2), 0.8)
    canvas.line(
        SKIN_SHADE, tilted([(306, 181), (313, 185), (320, 186.5), (327, 185), (334, 181)]), 4, 1.4, 0.75
    )
    for side in (-1, 1):
        nostril = tilted([(320 + side * 3.6, 183.6), (320 + side * 6.4, 182), (320 + side * 9.4, 183)])
        canvas.line(SKIN_DEEP, nostril, 2.2, 0.5, 0.85)
        wing = tilted([(320 + side * 10.2, 174), (320 + side * 13.4, 179), (320 + side * 11, 184.4)])
        canvas.line(SKIN_SHADE, wing, 1.8, 0.8, 0.7)
        fold = tilted([(320 + side * 15, 182), (320 + side * 24, 191), (320 + side * 27, 201)])
        canvas.line(SKIN_SHADE, fold, 3, 1.6, 0.5)

    # Speaking, with a smile: lips apart.
    outer = [(297, 196.5), (306, 194), (314.5, 191.6), (320, 193), (325.5, 191.6), (334, 194), (343, 196.5)]
    lower = [(336, 205), (328, 210.4), (320, 211.8), (312, 210.4), (304, 205)]
    lips = fill(spline(tilted([*outer, *lower])), blur=0.4)
    gap_points = [
        (300.5, 197.2),
        (310, 197.2),
        (320, 198),
        (330, 197.2),
        (339.5, 197.2),
        (331, 203.4),
        (320, 205.6),
        (309, 203.4),
    ]
    gap = fill(spline(tilted(gap_points)), blur=0.25)
    canvas.paint(SKIN_SHADE, soft(lips, 2.5, (1, 3)), 0.5)
    canvas.paint((196, 84, 80), lips)
    canvas.paint((150, 54, 56), lips * ramp(-grid_y, -199, -190), 0.45)
    canvas.paint((86, 22, 26), gap)
    teeth = fill(
        spline(tilted([(304, 197), (320, 197.6), (336, 197), (332, 201), (320, 202.6), (308, 201)])), blur=0.3
    )
    canvas.paint((250, 244, 238), gap * teeth, 0.96)
    canvas.paint((120, 60, 58), gap * (soft(1 - gap, 1.2)), 0.5)
    canvas.paint((255, 206, 196), lips * (1 - gap) * glow(*tilted([(316, 208)])[0], 9, 1.8), 0.7)
    for side in (-1, 1):
        canvas.paint(SKIN_DEEP, fill(oval(*tilted([(320 + side * 23.4, 196.8)])[0], 1.8, 1.4), blur=0.8), 0.7)
    canvas.line(SKIN_SHADE, tilted([(311, 215.4), (320, 217), (329, 215.4)]), 2.6, 1.2, 0.5)


def lock(a: Points, b: Points, position: float) -> list[Point]:
    """A line between the edges `a` and `b` of a lock of hair, at `position` 0..1 across."""
    count = 10
    pa, pb = (np.asarray(spline(edge, closed=False)) for edge in (a, b))
    pa, pb = (p[np.linspace(0, len(p) - 1, count).round().astype(int)] for p in (pa, pb))
    wobble = random.normal(0, 0.8, (count, 2))
    return [(float(x), float(y)) for x, y in pa + (pb - pa) * position + wobble]


def hair_in_front(canvas: Canvas) -> None:
    for outer_edge, inner_edge in ((LOCK_RIGHT_OUTER, LOCK_RIGHT_INNER), (LOCK_LEFT_OUTER, LOCK_LEFT_INNER)):
        outer, inner = tilted(outer_edge), tilted(inner_edge)
        hair = fill([*spline(outer, closed=False), *reversed(spline(inner, closed=False))], blur=0.4)
        canvas.paint(SKIN_DEEP, fill(HEAD) * soft(hair, 5, (3, 6)) * (1 - hair), 0.55)
        canvas.paint(SWEATER_DARK, soft(hair, 4, (3, 4)) * ramp(grid_y, 262, 284) * (1 - hair), 0.5)
        canvas.paint(HAIR, hair)
        canvas.paint(HAIR_DARK, hair * ramp(grid_x, 330, 410), 0.55)
        canvas.paint(HAIR_DARK, hair * ramp(grid_y, 120, 290), 0.4)
        tones = ((HAIR_DARK, 46, 1.8, 0.45), (HAIR, 46, 1.4, 0.5), (HAIR_LIGHT, 34, 1.1, 0.34))
        for colour, count, width, opacity in tones:
            lines = [lock(outer, inner, random.uniform(0.01, 0.99)) for _ in range(count)]
            canvas.strands(colour, lines, width, opacity, hair)
        shine = glow(270, 86, 42, 18) + 0.5 * glow(376, 88, 22, 17) + 0.6 * glow(238, 236, 24, 30)
        lines = [lock(outer, inner, random.uniform(0.05, 0.95)) for _ in range(60)]
        canvas.strands((226, 168, 120), lines, 1.3, 0.6, hair * np.clip(shine, 0, 1))
        canvas.paint((255, 232, 196), hair * (1 - soft(hair, 3)) * ramp(-grid_x, -262, -232), 0.45)
    for x in (286, 292, 298):  # loose hairs
        points = [(x, 48 + random.uniform(0, 8)), (x - 30, 70), (x - 52 + random.uniform(-6, 4), 130)]
        canvas.line(HAIR, tilted([*points, (x - 50, 200)]), 0.8, 0.25, 0.6)


def main(path: Path) -> None:
    canvas = Canvas()
    background(canvas)
    hair_behind(canvas)
    body(canvas)
    face(canvas)
    for side in (-1, 1):
        eye(canvas, 320 + side * 27, 149, side)
    nose_and_mouth(canvas)
    hair_in_front(canvas)
    # Window light from the left, a little darkness in the corners.
    canvas.paint((255, 236, 206), glow(150, 110, 190, 170), 0.14)
    distance = ((grid_x - 320) / 420) ** 2 + ((grid_y - 170) / 300) ** 2
    canvas.paint((30, 22, 28), np.clip(distance, 0, 1) ** 1.5, 0.4)
    canvas.save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("portrait.png"))
