"""How a toy bird looks: attributes in, picture and outline out. Shapes are polygons, so every image size shows the same bird.

The bird is made in its own coordinates (facing right, y down, the body about one unit long, its middle at the
origin) and then placed in the frame, whose sides are 0 to 1. The scene behind it is in scenery.py.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from datasets.toybirds.attributes import PALETTE
from datasets.toybirds.scenery import Canvas, Color, arc, draw_scenery, mix

OUTLINE = 0.009  # width of the dark line around each part, in frame sides
DARKENING = 0.5  # of that line, against the part that it surrounds
JITTER = 14  # how far a bird's shade may lie from the palette, in each of R, G and B
INK = (24, 22, 26)


class Shape(NamedTuple):
    """A filled polygon.

    points: (n, 2)
    color: RGB
    outlined: whether a darker line surrounds it
    """

    points: np.ndarray
    color: Color
    outlined: bool = True


class Build(NamedTuple):
    """Proportions, in bird units. A small bird is round with a large head, a large one has a long neck.

    So the shape alone shows the size, also where a crop makes all birds equally large (CUB's box crop).
    """

    body: tuple[float, float]  # half length, half height
    tilt: float  # radians that the breast is raised by
    chest: tuple[float, float, float]  # centre and radius of the round lower end of the neck
    head: tuple[float, float, float]  # centre and radius
    tail: float  # length
    wing: tuple[float, float, float, float]  # shoulder x and y, length, half width
    leg: float  # from the hips to the ground
    unit: float  # in sides of the frame


BUILDS = {
    "small": Build(
        body=(0.48, 0.42),
        tilt=0.22,
        chest=(0.22, -0.06, 0.31),
        head=(0.34, -0.44, 0.38),
        tail=0.24,
        wing=(0.28, -0.13, 0.80, 0.26),
        leg=0.27,
        unit=0.295,
    ),
    "large": Build(
        body=(0.60, 0.40),
        tilt=0.30,
        chest=(0.30, -0.12, 0.27),
        head=(0.52, -0.67, 0.31),
        tail=0.33,
        wing=(0.38, -0.19, 0.98, 0.23),
        leg=0.48,
        unit=0.305,
    ),
}


def draw(
    attributes: Mapping[str, str], rng: np.random.Generator, image_size: int, bird: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """A picture (S, S, 3) and the bird's outline (S, S), both uint8; outside is 0, edges lie between.

    The outline holds body, head, beak, wing and tail with their dark lines, but not the thin legs.

    rng: gives pose, shades and scenery; the same stream draws the same bird at each size
    bird: False draws scenery and legs alone
    """
    # Scenery and legs, behind the bird.
    shapes, hip, foot = _place(attributes, rng)
    canvas = Canvas(image_size)
    draw_scenery(canvas, attributes["background"], rng, ground=foot[0][1])
    for end in foot:
        _draw_leg(canvas, hip, end, attributes["facing"])
    if not bird:
        return canvas.pixels(), np.zeros((image_size, image_size), dtype=np.uint8)

    # The bird, part by part: in colours on the picture, in white on the outline.
    outline = Canvas(image_size, mode="L")
    for shape in shapes:
        for target, fill, line in ((canvas, shape.color, darken(shape.color)), (outline, 255, 255)):
            target.polygon(shape.points, fill)
            if shape.outlined:
                target.line(shape.points, line, OUTLINE, closed=True)
    return canvas.pixels(), outline.pixels()


def darken(color: Color, factor: float = DARKENING) -> Color:
    """A darker shade of an RGB colour."""
    return mix(INK, color, factor)


def shade(name: str, rng: np.random.Generator) -> Color:
    """One bird's own shade of a palette colour: lighter or darker, a little off in hue, at most JITTER away."""
    light = rng.uniform(-0.6, 0.6)
    offsets = (light + rng.uniform(-0.4, 0.4, size=3)) * JITTER
    red, green, blue = np.clip(np.add(PALETTE[name], offsets).round(), 0, 255)
    return int(red), int(green), int(blue)


def _place(attributes: Mapping[str, str], rng: np.random.Generator) -> tuple[list[Shape], np.ndarray, np.ndarray]:
    """The bird in the frame: its shapes, the hips (2,) and the ends of both legs (2, 2), in frame coordinates."""
    build = BUILDS[attributes["size"]]
    shapes = _bird(attributes, build, rng)

    # A random turn, size and position; birds that face left are mirrored.
    angle, unit = rng.uniform(-0.13, 0.13), build.unit * rng.uniform(0.94, 1.06)
    shift = rng.uniform(-0.045, 0.045, size=2) + (0.5, 0.49)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * unit
    if attributes["facing"] == "left":
        turn[:, 0] *= -1

    # The middle of the whole bird, not of its body, goes to that position.
    everything = np.concatenate([shape.points for shape in shapes]) @ turn
    low, high = everything.min(axis=0), everything.max(axis=0)
    offset = shift - (low + high) / 2
    placed = [shape._replace(points=shape.points @ turn + offset) for shape in shapes]

    # Legs are vertical in the frame, however the bird is turned.
    hip = np.array([0.0, build.body[1] * 0.8]) @ turn + offset
    ground = hip[1] + build.leg * unit
    spread = 0.09 * unit
    return placed, hip, np.array([[hip[0] - spread, ground], [hip[0] + spread, ground + 0.02 * unit]])


def _bird(attributes: Mapping[str, str], build: Build, rng: np.random.Generator) -> list[Shape]:
    """All parts from back to front, in bird coordinates, facing right."""
    # Shades and pose, drawn in this order: a change of it would draw other birds.
    crown, wing, belly = (shade(attributes[part], rng) for part in ("crown_color", "wing_color", "belly_color"))
    beak = shade(attributes["beak_color"], rng)
    head_x, head_y, radius = build.head + rng.uniform(-1, 1, size=3) * (0.03, 0.03, 0.012)
    tilt = build.tilt + rng.uniform(-0.08, 0.08)

    # Body and neck.
    rx, ry = build.body
    body = arc(0, 0, rx, ry, -tilt)
    neck = _hull(build.chest, (head_x, head_y, radius))
    (chest_x, chest_y, chest), inner = build.chest, 0.975  # the neck again, within its line, hides the body's line
    throat = _hull((chest_x, chest_y, chest * inner), (head_x, head_y, radius * inner))
    back = arc(0, 0, rx, ry, -tilt, np.pi * 0.93, np.pi * 1.62)
    tail = _tail(build, tilt, rng)
    nod = rng.uniform(-0.12, 0.12)
    return [
        Shape(tail, darken(wing, 0.88)),
        *_beak(head_x, head_y, radius, nod, attributes["beak_length"], beak),
        Shape(neck, belly),
        Shape(body, belly),
        Shape(throat, belly, False),
        Shape(back, wing, False),
        Shape(_crown(head_x, head_y, radius, nod), crown),
        *_eye(head_x, head_y, radius, nod),
        *_wing(build, tilt, attributes["wing_pattern"], wing, rng),
    ]


def _hull(first: tuple[float, float, float], second: tuple[float, float, float]) -> np.ndarray:
    """The outline (n, 2) around two circles (x, y, radius) and what lies between them."""
    (x0, y0, r0), (x1, y1, r1) = first, second
    direction = np.arctan2(y1 - y0, x1 - x0)
    half = np.arccos((r0 - r1) / np.hypot(x1 - x0, y1 - y0))
    lower = arc(x0, y0, r0, r0, 0, direction + half, direction + 2 * np.pi - half)
    return np.concatenate([lower, arc(x1, y1, r1, r1, 0, direction - half, direction + half)])


def _tail(build: Build, tilt: float, rng: np.random.Generator) -> np.ndarray:
    """A tail (n, 2) that widens from the rear of the body."""
    angle = np.pi - tilt + rng.uniform(-0.15, 0.2)
    length, width = build.tail * rng.uniform(0.9, 1.1), rng.uniform(0.10, 0.14)
    root = np.array([-build.body[0] * 0.72, build.body[0] * 0.72 * np.sin(tilt)])
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    end = root + along * (length + build.body[0] * 0.28)
    steps = [(-0.12, 0), (-width, 1), (-width * 0.35, 1.06), (width * 0.35, 1.06), (width, 1), (0.12, 0)]
    return np.array([root + (end - root) * at + across * side for side, at in steps])


def _crown(x: float, y: float, radius: float, nod: float) -> np.ndarray:
    """The cap (n, 2): the head above a line from the beak's root to the nape."""
    return arc(x, y, radius, radius, 0, np.pi * 0.8 + nod, np.pi * 1.97 + nod)


def _beak(x: float, y: float, radius: float, nod: float, length: str, color: Color) -> list[Shape]:
    """Two mandibles; a long one is slim, a short one a stout triangle."""
    reach, height = (0.45, 0.09) if length == "long" else (0.17, 0.12)
    base = np.array([x, y + radius * 0.22])
    along = np.array([np.cos(nod + 0.1), np.sin(nod + 0.1)])
    across = np.array([-along[1], along[0]])
    root, tip = base + along * radius * 0.7, base + along * (radius + reach)
    upper = np.array([root - across * height, tip, root])
    lower = np.array([root + across * height, tip - along * 0.05, root])
    return [Shape(lower, darken(color, 0.85)), Shape(upper, color)]


def _eye(x: float, y: float, radius: float, nod: float) -> list[Shape]:
    """A dark eye with a highlight, in a white ring, so that it can be seen on every colour."""
    along = np.array([np.cos(nod), np.sin(nod)])
    cx, cy = np.array([x, y]) + along * radius * 0.42 + np.array([0, radius * 0.02])
    size = radius * 0.2 + 0.012
    return [
        Shape(arc(cx, cy, size * 1.35, size * 1.35), (250, 250, 248), False),
        Shape(arc(cx, cy, size, size), INK, False),
        Shape(arc(cx + size * 0.3, cy - size * 0.35, size * 0.3, size * 0.3), (255, 255, 255), False),
    ]


def _wing(build: Build, tilt: float, pattern: str, color: Color, rng: np.random.Generator) -> list[Shape]:
    """The folded wing with its bars or spots; marks are light on a dark wing and dark on a light one."""
    # The wing has coordinates of its own: u along it, v across.
    *shoulder, length, half = build.wing
    angle = np.pi - tilt + rng.uniform(-0.14, 0.1)
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([along[1], -along[0]])  # towards the belly

    def at(u: np.ndarray, v: np.ndarray) -> np.ndarray:  # u: shoulder 0 to tip 1; v: back -1 to belly 1
        width = half * 1.75 * np.clip(u, 0, 1) ** 0.55 * np.clip(1 - u, 0, 1) ** 0.75
        return shoulder + np.outer(u * length, along) + np.outer(v * width, across)

    # The wing itself.
    ends = np.linspace(0, 1, 24)
    feathers = np.concatenate([at(ends, np.full(24, -0.8)), at(ends[::-1], np.full(24, 1.15))])

    # Its marks.
    mark = mix(color, (255, 255, 255), 0.55) if _brightness(color) < 125 else mix(color, INK, 0.5)
    marks = []
    if pattern == "striped":
        v = np.linspace(-0.8, 1.15, 8)
        for u in (0.24, 0.48, 0.72):
            bar = np.concatenate([at(u + 0.05 * v**2, v), at(u + 0.095 + 0.05 * v[::-1] ** 2, v[::-1])])
            marks.append(Shape(bar, mark, False))
    if pattern == "spotted":
        for u, v in ((0.2, 0.2), (0.4, -0.3), (0.43, 0.65), (0.62, 0.15), (0.78, 0.4)):
            x, y = at(np.array([u]), np.array([v]))[0]
            marks.append(Shape(arc(x, y, 0.052, 0.052, points=14), mark, False))
    return [Shape(feathers, color), *marks]


def _brightness(color: Color) -> float:
    return float(np.dot(color, (0.299, 0.587, 0.114)))


def _draw_leg(canvas: Canvas, hip: np.ndarray, end: np.ndarray, facing: str) -> None:
    """One leg with three toes, in front of the scenery and behind the body."""
    color = (104, 72, 48)
    forward = 1 if facing == "right" else -1
    canvas.line(np.array([[end[0], hip[1]], end]), color, 0.013)
    for reach in (0.035, 0.02, -0.02):
        canvas.line(np.array([end, end + (forward * reach, 0.012)]), color, 0.009)
