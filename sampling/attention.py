"""Word attention as pictures: for each stage, the image and, word by word, where the caption attends to it.

Images are drawn by pipeline.py, folders of samples written by folders.py, the picture itself made in miscc/pictures.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from miscc.errors import ConfigError
from miscc.pictures import attention_picture
from sampling.pipeline import Generated, TextToImage

CELL = 128  # pixels of the image and of each word's map in a strip


def check_attends(pipeline: TextToImage) -> None:
    """Raises ConfigError where the generator has no word attention to show."""
    if not pipeline.attends:
        raise ConfigError("--attention: this generator has no word attention; AttnGAN's has from two stages on")


def caption_words(pipeline: TextToImage, captions: Sequence[str]) -> list[list[str]]:
    """The words of each caption that the model reads: known ones, at most max_words."""
    encoded = pipeline.tokens(captions)

    # Indices back to words, without the padding.
    words = pipeline.vocabulary.words
    return [
        [words[index] for index in row[:length].tolist()]
        for row, length in zip(encoded.tokens, encoded.lengths.tolist(), strict=True)
    ]


def write_strips(
    drawn: Generated, words: Sequence[Sequence[str]], stems: Sequence[Path], write: Callable[[np.ndarray, Path], None]
) -> None:
    """One strip for each image and stage, `<stem>_<h>px.png` by the height of its maps in pixels.

    drawn: images with their attention
    words: of each image's caption
    stems: of each image's files
    write: write(pixels, path) writes a picture
    """
    for images, attention in zip(drawn.stages, drawn.attention, strict=True):
        for image, maps, caption, stem in zip(images, attention, words, stems, strict=True):
            # One row: the image, then each word over its heat map.
            strip = attention_picture([image], [caption], [maps], CELL)
            write(strip, stem.with_name(f"{stem.name}_{maps.shape[1]}px.png"))
