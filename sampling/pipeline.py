"""TextToImage: a checkpoint's generator with all that it needs: captions in, images and masks out."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from datasets.captions import EncodedCaptions, encode_batch
from miscc.byte_pairs import vocabulary_of
from miscc.checkpoint import load_file
from miscc.distributed import choose_device
from miscc.errors import CheckpointError, DataError
from miscc.images import to_uint8
from miscc.randomness import noise_for
from miscc.vocabulary import Vocabulary
from models.mixed_text import mixed_text_encoder
from models.modes import device_of
from models.released import load_generator, naming
from models.types import CaptionEncoder, Generator, GeneratorOutput, TextFeatures
from sampling.encoders import ENCODERS, check_sentence_length, networks_from_state, released_vocabulary
from sampling.published import find_published, load_model
from sampling.requests import Request
from sampling.trained_with import networks_in_training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """N images, and what else was requested. Lists have an array for each stage, coarse to fine.

    Unpacks into two: `images, masks = model.generate(captions)`.

    images: (N, H, W, 3) uint8
    masks: (N, h, w) float32 in [0, 1]; empty where the system predicts none
    attention: (N, T, h, w) float32, of the stages that attend to words
    stages: (N, h', w', 3) uint8, the images of these stages
    """

    images: np.ndarray
    masks: list[np.ndarray]
    attention: list[np.ndarray] = field(default_factory=list)
    stages: list[np.ndarray] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.masks))


class TextToImage:
    """A generator with its text encoder and vocabulary.

    The same seed gives the same images, whatever the batch size and whatever was drawn before. (The noise is the same;
    rounding may change single values by one level of 255.)
    """

    def __init__(
        self,
        generator: Generator,
        text_encoder: CaptionEncoder,
        vocabulary: Vocabulary,
        origin: dict[str, Any] | None = None,
    ):
        """
        generator, text_encoder: in eval mode
        vocabulary: what the text encoder was trained with
        origin: where the weights come from (file, step, epoch, config, trained_with), for reports

        Raises CheckpointError where text encoder and vocabulary are of different sizes.
        """
        known = text_encoder.embedding.num_embeddings
        if known != len(vocabulary):
            raise CheckpointError(
                f"the text encoder knows {known} words, the vocabulary has {len(vocabulary)}: they do not belong "
                f"together; use the captions.pickle or vocabulary.json that the encoder was trained with"
            )

        # The parts, and what was warned of already.
        self.generator = generator
        self.text_encoder = text_encoder
        self.vocabulary = vocabulary
        self.origin = origin or {}
        self._named_length = False
        self._named: set[str] = set()  # unknown words that were warned of already

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None, averaged: bool = True) -> "TextToImage":
        """From one of our checkpoints, or from the folder of a published model.

        device None: a GPU if there is one. averaged False: G itself, not its average.
        Raises CheckpointError for a file that is missing, broken, of another kind or without a generator.
        """
        # The text encoder, and the averaged generator where there is one.
        device = choose_device() if device is None else torch.device(device)
        checkpoint = load_model(path)
        if "text_encoder" not in checkpoint["networks"]:
            raise CheckpointError(f"{path}: holds no text encoder but {', '.join(checkpoint['networks'])}")
        part = "generator_ema" if averaged and "generator_ema" in checkpoint["networks"] else "generator"
        networks = networks_from_state(checkpoint, (part, "text_encoder"), path)
        if part not in networks:
            raise CheckpointError(
                f"{path}: holds no generator but {', '.join(checkpoint['networks'])}; train one first"
            )

        # Where the weights come from, for reports.
        origin = {
            "checkpoint": str(path),
            "averaged": part == "generator_ema",
            "step": checkpoint.get("step"),
            "epoch": checkpoint.get("epoch"),
            "config": checkpoint.get("config", {}),
            "examples": checkpoint.get("examples", []),
            "half": checkpoint.get("half", False),
            "trained_with": networks_in_training(checkpoint),
        }
        vocabulary = vocabulary_of(checkpoint["vocabulary"])
        generator = cast(Generator, networks[part].to(device))
        text_encoder = cast(CaptionEncoder, networks["text_encoder"].to(device))
        check_sentence_length(text_encoder, generator, path)
        return cls(generator, text_encoder, vocabulary, origin)

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | torch.device | None = None) -> "TextToImage":
        """From the folder of a published model, or "owner/name" of one online, which takes the package huggingface_hub.

        No code from there is run. Raises CheckpointError as `load`, and where there is no such model.
        """
        return cls.load(find_published(name), device)

    def save_pretrained(
        self, folder: str | Path, examples: Sequence[str] = (), half: bool = False, overwrite: bool = False
    ) -> Path:
        """Write model.safetensors, config.json, vocabulary.json and README.md into a folder, and return it.

        examples: captions that README.md shows with their images.
        half: weights in half precision.

        Raises UserError where something is there already.
        """
        from sampling.publish import publish  # which imports this file

        return publish(self, folder, examples=examples, half=half, overwrite=overwrite)

    @classmethod
    def from_released(
        cls,
        generator_path: str | Path,
        text_encoder_path: str | Path,
        data_dir: str | Path,
        device: str | torch.device | None = None,
        max_words: int = 18,
        transformer: str = "",
        encoders: str = "damsm",
    ) -> "TextToImage":
        """From the authors' loose files.

        generator_path: netG*.pth
        text_encoder_path: text_encoder*.pth, or one of our encoder checkpoints
        data_dir: the folder of captions.pickle; not read for our encoders, which hold their vocabulary
        max_words: words of a caption at most; for the authors' encoders, which do not store it
        transformer: folder of a Transformer that gives half of the sentence, see models/mixed_text.py
        encoders: kind of text encoder, a name in sampling.encoders.ENCODERS; "clip": text_encoder_path is CLIP's weights
        """
        device = choose_device() if device is None else torch.device(device)
        loaded = ENCODERS[encoders](text_encoder_path, device, max_words)
        vocabulary = loaded.vocabulary or released_vocabulary(data_dir)

        # The generator: it must take sentences of this encoder's length.
        with naming(generator_path):
            generator = load_generator(load_file(generator_path)).to(device)
        text_encoder = loaded.text_encoder
        check_sentence_length(text_encoder, generator, text_encoder_path)
        if transformer:
            text_encoder = mixed_text_encoder(text_encoder, vocabulary.words, transformer).to(device)
        return cls(generator, text_encoder, vocabulary, {"checkpoint": str(generator_path), "averaged": False})

    @property
    def device(self) -> torch.device:
        return device_of(self.generator)

    @property
    def image_size(self) -> int:
        return self.generator.image_size

    @property
    def attends(self) -> bool:
        """Whether the generator's output has word attention."""
        return self.generator.num_attending > 0

    @property
    def predicts_masks(self) -> bool:
        """Whether the generator's output has masks."""
        return self.generator.predicts_masks

    def tokens(self, captions: Sequence[str]) -> EncodedCaptions:
        """Captions as indices. A warning names each unknown word once, and once that captions are shortened.

        Raises DataError for a caption without a known word.
        """
        most = self.text_encoder.max_words
        encoded = encode_batch(captions, self.vocabulary, most)

        # Captions that are shortened.
        longest = max((len(self.vocabulary.encode(caption)[0]) for caption in captions), default=0)
        if longest > most and not self._named_length:
            self._named_length = True
            logger.warning("captions of up to %d words: the model reads the first %d that it knows", longest, most)

        # Words that are left out.
        unknown = sorted({word for words in encoded.unknown for word in words} - self._named)
        if unknown:
            self._named.update(unknown)
            logger.warning("words that the model does not know are left out: %s", ", ".join(unknown))
        return encoded

    def check(self, captions: Sequence[str]) -> None:
        """Warn of unknown words in any of the captions, once. Raises DataError for a caption without a known word."""
        self.tokens(captions)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Captions -> text features on the generator's device. Raises DataError as `tokens` does."""
        encoded = self.tokens(captions)
        return self.text_encoder(encoded.tokens.to(self.device), encoded.lengths)

    @torch.inference_mode()
    def synthesize(self, text: TextFeatures, noise: Tensor) -> GeneratorOutput:
        """Text features and noise (N, noise_dim) -> images in [-1, 1], masks, attention."""
        return self.generator(noise.to(self.device), text)

    def noise(self, seed: int, indices: Iterable[int], truncation: float | None = None) -> Tensor:
        """Noise (N, noise_dim); a row depends on (seed, its index) alone.

        truncation: see miscc.randomness.noise_for.
        """
        return noise_for(seed, 0, indices, self.generator.noise_dim, truncation)

    def generate(
        self,
        captions: Sequence[str],
        seed: int = 0,
        truncation: float | None = None,
        batch_size: int = 32,
        indices: Sequence[int] | None = None,
        with_attention: bool = False,
        with_masks: bool = True,
    ) -> Generated:
        """Draw one image for each caption.

        seed: the i-th image's noise is a function of (seed, i)
        truncation: cut the noise at ±2 and scale it by this
        batch_size: images drawn at once
        indices: use (seed, indices[i]) instead, so that a long list can be drawn in parts
        with_attention: return the word attention
        with_masks: return the masks; False saves copying more bytes than the images have

        Raises DataError for an empty list, and for a caption of which no word is known.
        """
        # Captions to indices, all at once.
        if isinstance(captions, str):
            captions = [captions]
        if not captions:
            raise DataError("there is no caption to draw")
        indices = range(len(captions)) if indices is None else indices
        encoded = self.tokens(captions)

        # Batch by batch: images, and what was requested beside them.
        images, masks, attention, stages = [], [], [], []
        for start in range(0, len(captions), batch_size):
            rows = slice(start, start + batch_size)
            with torch.inference_mode():
                text = self.text_encoder(encoded.tokens[rows].to(self.device), encoded.lengths[rows])
                output = self.synthesize(text, self.noise(seed, indices[rows], truncation))
            images.append(to_uint8(output.images[-1]))
            if with_masks:
                masks.append([mask[:, 0].float().cpu().numpy() for mask in output.masks])

            # AttnDCGAN attends at every stage, but draws at the last alone.
            if with_attention:
                attention.append([maps.float().cpu().numpy() for maps in output.attention])
                last = len(output.images) - 1
                shown = [output.images[min(stage, last)] for stage in range(1, len(output.attention) + 1)]
                stages.append([to_uint8(image) for image in shown])

        # Lists of batches of stages -> lists of stages.
        parts = (masks, attention, stages)
        return Generated(
            np.concatenate(images), *([np.concatenate(stage) for stage in zip(*part, strict=True)] for part in parts)
        )

    def generate_batches(
        self,
        requests: Sequence[Request],
        seed: int = 0,
        truncation: float | None = None,
        batch_size: int = 32,
        with_masks: bool = True,
    ) -> Iterator[Generated]:
        """Draw requests in batches, for scores: the same images as `generate`, and no warning of unknown words.

        A split's captions hold words that the model does not know; an evaluation counts these captions once.
        """
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]
            captions, indices = [r.caption for r in part], [r.index for r in part]
            with _quiet():
                drawn = self.generate(captions, seed, truncation, batch_size, indices, with_masks=with_masks)
            yield drawn


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings by this file."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
