"""What the report shows of a run's samples: the nearest training images, captions that fit worst, confusions of the encoders."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.captions import encode_batch
from datasets.records import Records, evenly_spaced
from datasets.text_image import load_resized
from miscc.errors import CheckpointError
from miscc.images import from_uint8
from miscc.vocabulary import Vocabulary
from sampling.encoders import Encoders
from sampling.pipeline import TextToImage

SMALL = 16  # pixels at which images are compared: layout and colours, not noise
BATCH = 50


class Shown(NamedTuple):
    """One thing to look at: pictures (H, W, 3) uint8, each with words, and what is said of all."""

    pictures: list[tuple[np.ndarray, str]]
    text: str


def nearest_images(
    samples: np.ndarray, captions: Sequence[str], training: Records, most: int, size: int
) -> list[Shown]:
    """For each sample (H, W, 3) uint8 the three nearest of at most `most` training images, by mean colour difference."""
    # Layout and colours of training images, at a few pixels.
    chosen = evenly_spaced(len(training), most)
    images = [_crop(training, index, size) for index in chosen]
    features = np.stack([_small(image) for image in images])  # (M, SMALL * SMALL * 3)

    # The three nearest of each sample.
    shown = []
    for sample, caption in zip(samples, captions, strict=True):
        distances = np.abs(features - _small(sample)).mean(axis=1)
        nearest = np.argsort(distances, kind="stable")[:3]
        pictures = [(images[i], f"{training.keys[chosen[i]]}: {distances[i]:.1f}") for i in nearest]
        shown.append(Shown([(sample, "sample"), *pictures], caption))
    return shown


@torch.inference_mode()
def similarities(encoders: Encoders, images: np.ndarray, captions: Sequence[str], vocabulary: Vocabulary) -> Tensor:
    """(N, M) cosines of every image (N, H, W, 3) uint8 with every caption, by the DAMSM encoders.

    Raises CheckpointError where there is no image encoder.
    """
    if encoders.image_encoder is None:
        raise CheckpointError(
            "there is no image encoder beside the text encoder, so captions and images cannot be compared"
        )

    # Codes of images and captions in one space.
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    codes = [encoders.image_encoder(from_uint8(pixels[i : i + BATCH]))[1] for i in range(0, len(pixels), BATCH)]
    encoded = encode_batch(captions, vocabulary, encoders.max_words)
    sentence = encoders.text_encoder(encoded.tokens, encoded.lengths).sentence
    normal = torch.nn.functional.normalize
    return normal(torch.cat(codes)) @ normal(sentence).T


def worst_captions(pipeline: TextToImage, encoders: Encoders, captions: Sequence[str], show: int = 8) -> list[Shown]:
    """The captions whose images resemble them least, by the encoders that the run was trained with."""
    drawn = pipeline.generate(captions, with_masks=False).images
    cosines = similarities(encoders, drawn, captions, pipeline.vocabulary).diagonal()

    # The lowest first.
    order = cosines.argsort()[:show].tolist()
    return [Shown([(drawn[i], f"similarity {cosines[i]:.2f}")], captions[i]) for i in order]


def confusions(encoders: Encoders, records: Records, most: int, show: int = 8) -> tuple[str, list[Shown]]:
    """How often encoders take another image's caption for an image's own, and the worst cases of it."""
    chosen = evenly_spaced(len(records), most)
    images = np.stack([_crop(records, index, encoders.image_size) for index in chosen])
    captions = [records.text(index, 0) for index in chosen]
    cosines = similarities(encoders, images, captions, records.vocabulary)

    # An image is confused where another's caption comes first.
    own, best = cosines.diagonal(), cosines.max(dim=1)
    wrong = (best.values - own).argsort(descending=True)[:show].tolist()
    right = (best.indices == torch.arange(len(chosen))).float().mean().item()
    shown = [
        Shown([(images[i], f"own {own[i]:.2f}, taken {best.values[i]:.2f}")],
              f"own: {captions[i]} | taken: {captions[best.indices[i]]}")
        for i in wrong if best.indices[i] != i
    ]  # fmt: skip
    return f"{right:.1%} of {len(chosen)} images find their own caption first (chance {1 / len(chosen):.1%})", shown


def _crop(records: Records, index: int, size: int) -> np.ndarray:
    """The middle of what training crops from: (size, size, 3) uint8."""
    box = None if records.boxes is None else records.boxes[index]
    pixels = np.asarray(load_resized(records.image_paths[index], box, size))

    # The middle of it.
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def _small(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> SMALL x SMALL means, flat, float32."""
    return np.asarray(Image.fromarray(image).resize((SMALL, SMALL), Image.Resampling.BOX), dtype=np.float32).ravel()
