"""What is behind a toy bird, and the canvas on which both are painted. The bird itself is in drawing.py."""

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]


def mix(first: Color, second: Color, share: float) -> Color:
    """RGB between two colours: `share` of the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def arc(
    x: float,
    y: float,
    rx: float,
    ry: float,
    angle: float = 0.0,
    start: float = 0.0,
    end: float = 2 * np.pi,
    points: int = 32,
) -> np.ndarray:
    """Points (n, 2) along an ellipse that is turned by `angle`, from `start` to `end` (radians, y down)."""
    t = np.linspace(start, end, points)
    across, along = rx * np.cos(t), ry * np.sin(t)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([x + across * cos - along * sin, y + across * sin + along * cos], axis=1)


class Canvas:
    """A square picture painted in frame coordinates (0 to 1) at several times its size, then reduced: antialiased."""

    def __init__(self, image_size: int, mode: str = "RGB"):
        self.factor = max(3, -(-256 // image_size))
        self.side = image_size * self.factor
        self.image = Image.new(mode, (self.side, self.side))
        self.pencil = ImageDraw.Draw(self.image)

    def polygon(self, points: np.ndarray, color: Color | int) -> None:
        """Fill a polygon, points (n, 2)."""
        self.pencil.polygon((points * self.side).ravel().tolist(), fill=color)

    def line(self, points: np.ndarray, color: Color | int, width: float, closed: bool = False) -> None:
        """A line through points (n, 2), `width` in frame sides."""
        if closed:
            points = np.concatenate([points, points[:2]])
        path = (points * self.side).ravel().tolist()
        self.pencil.line(path, fill=color, width=max(1, round(width * self.side)), joint="curve")

    def fill(self, colors: np.ndarray) -> None:
        """Cover the canvas with a coarse picture (h, w, 3), 0 to 255, smoothly enlarged."""
        coarse = Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8))
        self.image.paste(coarse.resize((self.side, self.side), Image.Resampling.BICUBIC))

    def pixels(self) -> np.ndarray:
        """The picture at its own size: (S, S, 3), or (S, S) for a mode with one channel, uint8."""
        return np.asarray(self.image.reduce(self.factor))


def gradient(stops: list[Color], rng: np.random.Generator, noise: float = 5.0) -> np.ndarray:
    """Colours from top to bottom as a coarse picture (16, 16, 3), a little cloudy."""
    rows = np.linspace(0, len(stops) - 1, 16)
    levels = [np.interp(rows, np.arange(len(stops)), [stop[channel] for stop in stops]) for channel in range(3)]
    column = np.stack(levels, axis=1)[:, None]
    return column + rng.uniform(-noise, noise, size=(16, 16, 1)) + rng.uniform(-8, 8, size=3)


def draw_scenery(canvas: Canvas, kind: str, rng: np.random.Generator, ground: float) -> None:
    """Paint one of the backgrounds over the whole canvas; the bird's feet will stand at height `ground`."""
    SCENERIES[kind](canvas, rng, ground)


def _branch(canvas: Canvas, rng: np.random.Generator, ground: float) -> None:
    slope, thickness = rng.uniform(-0.03, 0.03), rng.uniform(0.03, 0.042)
    ends = np.array([[-0.05, ground + thickness / 2 - slope], [1.05, ground + thickness / 2 + slope]])
    canvas.line(ends, (104, 78, 58), thickness)
    canvas.line(ends - (0, thickness * 0.25), (146, 116, 88), thickness * 0.35)


def _sky(canvas: Canvas, rng: np.random.Generator, ground: float) -> None:
    canvas.fill(gradient([(112, 178, 232), (160, 208, 242), (206, 232, 248)], rng))

    # Two to four clouds of five puffs each, over their shadow.
    for _ in range(rng.integers(2, 5)):
        x, y, size = rng.uniform(0, 1), rng.uniform(0.05, 0.95), rng.uniform(0.06, 0.11)
        puffs = [
            (
                x + rng.uniform(-1.5, 1.5) * size,
                y + rng.uniform(-0.3, 0.2) * size,
                size * rng.uniform(0.5, 0.9),
            )
            for _ in range(5)
        ]
        for shift, color in ((0.02, (206, 224, 240)), (0.0, (240, 247, 252))):
            for px, py, radius in puffs:
                canvas.polygon(arc(px, py + shift, radius * 1.3, radius * 0.75, points=20), color)
    _branch(canvas, rng, ground)


def _leaves(canvas: Canvas, rng: np.random.Generator, ground: float) -> None:
    canvas.fill(gradient([(86, 128, 78), (64, 104, 62), (52, 88, 54)], rng))

    # Leaves all over the frame, each with a vein.
    count = 44
    places, sizes = rng.uniform(-0.05, 1.05, size=(count, 2)), rng.uniform(0.045, 0.085, size=count)
    angles, tones = rng.uniform(0, np.pi, size=count), rng.uniform(0, 1, size=count)
    for (x, y), size, angle, tone in zip(places, sizes, angles, tones, strict=True):
        color = mix((62, 102, 56), (150, 182, 104), float(tone))
        canvas.polygon(arc(x, y, size, size * 0.45, angle, points=12), color)
        vein = np.array([np.cos(angle), np.sin(angle)]) * size * 0.8
        canvas.line(np.array([(x, y) - vein, (x, y) + vein]), mix(color, (40, 70, 40), 0.35), 0.006)
    _branch(canvas, rng, ground)


def _water(canvas: Canvas, rng: np.random.Generator, ground: float) -> None:
    canvas.fill(gradient([(66, 156, 168), (52, 136, 156), (34, 104, 134)], rng))

    # Waves, broader towards the viewer.
    x = np.linspace(-0.05, 1.05, 40)
    for row in range(9):
        y = (row + rng.uniform(0.2, 0.8)) / 9
        height, length, phase = rng.uniform(0.008, 0.016), rng.uniform(0.16, 0.3), rng.uniform(0, 2 * np.pi)
        wave = np.stack([x, y + height * np.sin(2 * np.pi * x / length + phase)], axis=1)
        color = (146, 208, 212) if row % 2 else (112, 184, 196)
        canvas.line(wave, color, 0.012 + 0.008 * y)

    # A rock to stand on.
    width = rng.uniform(0.2, 0.28)
    canvas.polygon(arc(0.5, ground + 0.075, width, 0.085, points=24), (92, 94, 98))
    canvas.polygon(arc(0.5, ground + 0.06, width * 0.85, 0.055, points=24), (122, 124, 126))


def _sunset(canvas: Canvas, rng: np.random.Generator, ground: float) -> None:
    canvas.fill(gradient([(112, 84, 146), (196, 112, 138), (244, 158, 112), (252, 204, 132)], rng))

    # The sun in its glow.
    x, y, radius = rng.uniform(0.1, 0.9), rng.uniform(0.35, 0.7), rng.uniform(0.09, 0.13)
    canvas.polygon(arc(x, y, radius * 1.35, radius * 1.35), (252, 206, 140))
    canvas.polygon(arc(x, y, radius, radius), (255, 240, 186))

    # Thin clouds, and the ground.
    for _ in range(3):
        cx, cy, length = rng.uniform(0, 1), rng.uniform(0.1, 0.6), rng.uniform(0.12, 0.25)
        canvas.polygon(arc(cx, cy, length, 0.014, points=20), (226, 148, 140))
    _hill(canvas, rng, ground + 0.005, (74, 48, 72))


def _snow(canvas: Canvas, rng: np.random.Generator, ground: float) -> None:
    canvas.fill(gradient([(164, 182, 202), (190, 204, 218), (214, 222, 232)], rng))

    # Four fir trees of three triangles each.
    for x in rng.uniform(0, 1, size=4):
        base, height = ground + 0.02, rng.uniform(0.28, 0.5)
        for level in range(3):
            top, width = base - height + level * height * 0.24, 0.05 + 0.03 * level
            canvas.polygon(
                np.array([[x - width, top + height * 0.42], [x, top], [x + width, top + height * 0.42]]),
                (112, 138, 140),
            )
    _hill(canvas, rng, ground, (236, 240, 246))

    # Snowflakes in front of everything but the bird.
    for x, y, size in rng.uniform((0, 0, 0.006), (1, 1, 0.013), size=(34, 3)):
        canvas.polygon(arc(x, y, size, size, points=10), (252, 253, 255))


def _hill(canvas: Canvas, rng: np.random.Generator, ground: float, color: Color) -> None:
    """Ground to stand on, its edge gently waved and at `ground` in the middle of the frame."""
    x = np.linspace(-0.05, 1.05, 24)
    edge = ground + rng.uniform(-0.04, 0.04) * np.sin((x - 0.5) * 5) + rng.uniform(0, 0.02) * np.cos((x - 0.5) * 9)
    canvas.polygon(np.concatenate([np.stack([x, edge], axis=1), [[1.05, 1.05], [-0.05, 1.05]]]), color)


SCENERIES = {"sky": _sky, "leaves": _leaves, "water": _water, "sunset": _sunset, "snow": _snow}
