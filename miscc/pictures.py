"""Pixels as pictures for people: grids, captions beside images, attention over them, PNG. Works without torch.

Reading image files and tensors is miscc/images.py's.
"""

import io
import math
import textwrap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from miscc.files import write_atomically


def unit_to_uint8(values: np.ndarray) -> np.ndarray:
    """Floats in [0, 1], of masks for instance, -> uint8 of the same shape, rounded and clamped."""
    return np.clip(np.round(values * 255), 0, 255).astype(np.uint8)


def resize_pixels(pixels: np.ndarray, size: int) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 -> the same at size x size, enlarged by nearest pixels or reduced by box averages."""
    method = Image.Resampling.NEAREST if size >= pixels.shape[0] else Image.Resampling.BOX
    return np.asarray(Image.fromarray(pixels).resize((size, size), method))


def grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 2) -> np.ndarray:
    """Rows of equally sized (H, W, 3) uint8 images -> one (.., .., 3) uint8 picture on white, `gap` pixels apart."""
    # A white canvas for all of them.
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)

    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            top, left = gap + y * (height + gap), gap + x * (width + gap)
            canvas[top : top + height, left : left + width] = image if image.ndim == 3 else image[..., None]
    return canvas


def _fitted(text: str, font: Any, width: int) -> str:
    """The text, or its start with an ellipsis, in at most so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def caption_grid(
    captions: Sequence[str],
    cells: Sequence[Sequence[np.ndarray]],
    columns: int = 2,
    cell_size: int = 96,
    headings: Sequence[str] = (),
) -> np.ndarray:
    """A picture for people: each caption written beside its images (and masks). Returns (.., .., 3) uint8.

    captions: n texts
    cells: for each caption its (H, W, 3) or (H, W) uint8 pictures
    columns: captions side by side
    cell_size: of a picture, in pixels
    headings: a title over each picture of a caption
    """
    # Sizes, in pixels.
    font = ImageFont.load_default(size=13)
    per_caption = max(len(row) for row in cells)
    text_width, gap, line = 200, 6, 16
    block_width = text_width + per_caption * (cell_size + gap) + 2 * gap
    block_height, top = cell_size + gap, line + gap if headings else gap
    rows = math.ceil(len(captions) / columns)

    # Headings over every column of captions.
    canvas = Image.new("RGB", (columns * block_width, top + rows * block_height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for column in range(min(columns, len(captions))):
        for index, heading in enumerate(headings):
            # Cut where the next one begins.
            following = next((i for i in range(index + 1, len(headings)) if headings[i]), per_caption)
            room = (following - index) * (cell_size + gap) - gap
            x = column * block_width + text_width + gap + index * (cell_size + gap)
            draw.text((x, gap // 2), _fitted(heading, font, room), fill="black", font=font)

    # A caption, wrapped, and its pictures to the right of it.
    for row, (caption, pictures) in enumerate(zip(captions, cells, strict=True)):
        left = (row // rows) * block_width
        y = top + (row % rows) * block_height
        wrapped = textwrap.wrap(caption, width=28)[: max(1, cell_size // line)]
        draw.multiline_text((left + gap, y), "\n".join(wrapped), fill="black", font=font, spacing=2)
        for index, picture in enumerate(pictures):
            tile = Image.fromarray(resize_pixels(picture, cell_size)).convert("RGB")
            canvas.paste(tile, (left + text_width + gap + index * (cell_size + gap), y))
    return np.asarray(canvas)


def attention_picture(
    images: Sequence[np.ndarray], words: Sequence[Sequence[str]], attention: Sequence[np.ndarray], cell_size: int = 96
) -> np.ndarray:
    """Word attention: a row for each image, first the image, then for each word a heat map over it.

    images: (H, W, 3) uint8
    words: of each caption
    attention: of each caption (at least as many as words, h, w), >= 0; shown relative to the largest of its caption
    cell_size: of a picture, in pixels

    Returns (.., .., 3) uint8.
    """
    # A white canvas for all of them.
    font, gap, line = ImageFont.load_default(size=13), 4, 18
    columns = 1 + max(len(row) for row in words)
    canvas = Image.new(
        "RGB", (columns * (cell_size + gap) + gap, len(images) * (cell_size + line + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(canvas)

    for row, (image, caption) in enumerate(zip(images, words, strict=True)):
        top = gap + row * (cell_size + line + gap)
        picture = Image.fromarray(image).resize((cell_size, cell_size), Image.Resampling.BICUBIC)
        canvas.paste(picture, (gap, top + line))

        # Its words, each over its heat map.
        largest = max(float(attention[row][: len(caption)].max()), 1e-12)
        for column, word in enumerate(caption, start=1):
            left = gap + column * (cell_size + gap)
            draw.text((left, top), word[:12], fill="black", font=font)
            canvas.paste(_heat(picture, attention[row][column - 1] / largest), (left, top + line))
    return np.asarray(canvas)


def overlay(pixels: np.ndarray, weights: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """(H, W, 3) uint8, darkened where weights (h, w) in [0, 1] are low and reddish where they are high; strength 0: as it is."""
    heated = np.asarray(_heat(Image.fromarray(pixels), weights), dtype=np.float32)
    mixed = pixels + strength * (heated - pixels)
    return mixed.round().clip(0, 255).astype(np.uint8)


def _heat(picture: Image.Image, attention: np.ndarray) -> Image.Image:
    """The picture, dark where attention (h, w) in [0, 1] is low and reddish where it is high."""
    coarse = Image.fromarray(attention.astype(np.float32))
    weights = np.asarray(coarse.resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    pixels = np.asarray(picture, dtype=np.float32)
    shown = pixels * (0.25 + 0.75 * weights) * (1 - 0.35 * weights) + 0.35 * weights * np.array([255.0, 40.0, 0.0])
    return Image.fromarray(shown.round().clip(0, 255).astype(np.uint8))


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W) or (H, W, 3) uint8 as a PNG file, for thousands of images: 1.3 to 7 times as fast as PIL's defaults.

    After PNG's filters an image has few repetitions other than runs, so a search for runs alone suffices: images are as
    large within a few per cent, masks and pictures with flat areas up to a half larger.
    """
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return stream.getvalue()


def save_image(pixels: np.ndarray, path: str | Path) -> None:
    """Write (H, W) or (H, W, 3) uint8 as PNG, whole or not at all; makes the folder."""
    write_atomically(path, lambda stream: Image.fromarray(pixels).save(stream, format="PNG"))
