"""Images: reading files as RGB, [-1, 1] <-> uint8. Pictures for people are miscc/pictures.py's."""

import os
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from miscc.errors import DataError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # built without libjpeg, or a torchvision without decoders
    decode_jpeg = None

_EXIF_ORIENTATION = 0x0112

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_rgb(path: str | Path | BytesIO, upright: bool = True) -> Image.Image:
    """Read any image file as RGB: grey, palette and CMYK are converted, transparent parts become white.

    upright: turn photos as their EXIF data say, as every viewer does; False for images whose boxes refer to stored pixels

    Raises DataError, naming the file, when it is missing, truncated, no image, or no file at all, such as a pipe.
    """
    if isinstance(path, (str, Path)) and not os.path.isfile(path):
        raise DataError(f"{path}: {'is no file' if os.path.lexists(path) else 'no such image'}")
    try:
        with Image.open(path) as image:
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # a damaged image can raise nearly anything
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None


def open_pixels(path: str | Path | BytesIO, upright: bool = True) -> torch.Tensor:
    """`open_rgb` as (H, W, 3) uint8.

    Plain JPEG files are decoded by torchvision where it can: the same pixels without PIL's copies.
    """
    pixels = _decode_jpeg(path, upright)
    return torch.from_numpy(np.array(open_rgb(path, upright))) if pixels is None else pixels


def _decode_jpeg(path: str | Path | BytesIO, upright: bool) -> torch.Tensor | None:
    """An upright RGB JPEG without errors as (H, W, 3) uint8; None for everything else, which is left to PIL."""
    if decode_jpeg is None or not isinstance(path, (str, Path)) or not os.path.isfile(path):
        return None

    try:
        # Only the header is read here: is it one of those?
        data = np.fromfile(path, dtype=np.uint8)
        if data[:2].tobytes() != b"\xff\xd8":
            return None
        with Image.open(BytesIO(data.data)) as image:
            turned = upright and "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) != 1
            if image.format != "JPEG" or image.mode != "RGB" or turned:
                return None

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision 0.29 warns that its decoders will be moved
            decoded = decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
        return decoded.permute(1, 2, 0) if isinstance(decoded, torch.Tensor) else None
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError):
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; transparent parts become white. What is RGB already is not copied.

    Raises DataError for pixels that are floats: they have no known range.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image

    # 16-bit grey: PIL's own conversions would clip at 255. One level may stand for transparent.
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        levels = np.asarray(image, dtype=np.float64)
        scale = 65535.0 if levels.max(initial=0) > 255 else 255.0
        grey = (levels / scale * 255).round().clip(0, 255).astype(np.uint8)
        grey[levels == image.info.get("transparency")] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise DataError("its pixels are floats; save it as 8-bit")

    # Transparency, over white.
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(N, C, H, W) float in [-1, 1] -> (N, H, W, C) uint8, rounded and clamped."""
    pixels = (images.detach().float() * 127.5 + 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of any layout -> float32 in [-1, 1] of the same layout."""
    return pixels.to(torch.float32) / 127.5 - 1.0
