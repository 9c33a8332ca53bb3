"""CLIPScore and CLIP-R-precision of sampled images: `python eval/CLIP.py --samples DIR`.

CLIP (Radford et al. 2021) puts images and captions into one space. CLIPScore (Hessel et al. 2021) is 100 times the mean
cosine of an image and its caption, as torchmetrics has it (the paper's 2.5 times the cosine is a fortieth of that);
CLIP-R-precision (Park et al. 2021) is how often an image's own caption is found among 99 others, with the lists of
R_precision.py. It flatters GALIP, in which a CLIP took part, and no other system.
The network is models/clip_features.py, its weights come from a file, a folder or Hugging Face's cache.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from eval.metric import Metric, Needs, Run, Score, ScoringBatch, Tools
from eval.R_precision import CandidateLists, TooFewCaptionsError, about_lists, lists_for, r_precision
from eval.scripts import add_ranking_arguments, run_script
from miscc.checkpoint import hash_tensors
from miscc.errors import run_command
from miscc.images import from_uint8
from miscc.vocabulary import Vocabulary, encode_rows
from models import clip_features
from models.clip_files import MODEL, load_clip_weights, load_tokenizer
from models.modes import device_of, no_tf32


class ImageTextEncoder(Protocol):
    """Encodes images and captions into one space.

    label: on the score;
    protocol: what made the codes.
    """

    label: str
    protocol: dict[str, Any]

    def encode_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """(H, W, 3) uint8 images of any sizes -> codes (N, D) float32 on the CPU."""

    def encode_captions(self, captions: Sequence[str]) -> torch.Tensor:
        """Captions -> codes (N, D) float32 on the CPU."""


class Clip:
    """A CLIP of models/clip_features.py with its tokenizer; made by `load_clip`. See ImageTextEncoder."""

    def __init__(self, towers: clip_features.Clip, tokenizer: Vocabulary, name: str, is_file: bool) -> None:
        self.towers, self.tokenizer = towers, tokenizer
        weights_hash = hash_tensors(towers.state_dict())
        short = Path(name).name
        self.label = f"{short}:{weights_hash[:8]}" if is_file else short
        self.protocol = {"family": "clip", "network": name, "weights_hash": weights_hash}

    @torch.inference_mode()
    def encode_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        # Each image to CLIP's size as it was trained, then all at once.
        size = self.towers.visual.image_size
        pixels = torch.stack([resized_and_cropped(image, size) for image in images])  # (N, 3, size, size)
        with no_tf32():
            return self.towers.visual(from_uint8(pixels.to(self._device)))[1].float().cpu()

    @torch.inference_mode()
    def encode_captions(self, captions: Sequence[str]) -> torch.Tensor:
        encoder = self.towers.text_encoder
        tokens, lengths, _ = encode_rows(captions, self.tokenizer, encoder.max_words)
        with no_tf32():
            text = encoder(torch.from_numpy(tokens).to(self._device), torch.from_numpy(lengths))
        return text.sentence.float().cpu()

    @property
    def _device(self) -> torch.device:
        return device_of(self.towers)


def resized_and_cropped(image: np.ndarray, size: int) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, size, size) uint8 as CLIP was trained: the shorter side to size, bicubic; then the middle."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    scaled = resize(pixels, [size], InterpolationMode.BICUBIC, antialias=True)
    return center_crop(scaled, [size])


def load_clip(name: str | Path = MODEL, device: str | torch.device = "cpu") -> Clip:
    """A CLIP from a file or folder, or by its name in Hugging Face's cache; see models/clip_files.py. Nothing is downloaded.

    Raises CheckpointError without the weights or the tokenizer, and for another network.
    """
    towers, files = load_clip_weights(name)
    return Clip(towers.to(device), load_tokenizer(files), str(name), Path(name).exists())


def clip_score(image_codes: torch.Tensor, caption_codes: torch.Tensor) -> torch.Tensor:
    """100 times the cosine of each image (N, D) and its caption (N, D): (N,) float64. torchmetrics' CLIPScore is the mean
    of these, or 0 where that is negative."""
    return 100 * F.cosine_similarity(image_codes.double(), caption_codes.double(), dim=1)


class ClipScore(Metric):
    """CLIPScore and CLIP-R-precision, the latter in per cent."""

    needs = Needs(captions=True)
    accumulated = ("codes",)

    def __init__(
        self,
        encoder: ImageTextEncoder,
        captions: Sequence[str],
        lists: CandidateLists | None,
        folds: int = 10,
        seed: int = 2020,
        without_lists: str = "",
    ) -> None:
        """captions, lists: of all images, in the order in which they come; without lists there is CLIPScore alone.

        without_lists: why there are none.
        """
        self.encoder, self.captions, self.lists, self.folds, self.seed = encoder, captions, lists, folds, seed
        self.without_lists = without_lists
        self.codes: list[torch.Tensor] = []

    @classmethod
    def from_run(cls, run: Run) -> "ClipScore":
        encoder = load_clip(run.tools.clip or MODEL, run.device)
        captions = [request.caption for request in run.requests]

        # CLIPScore needs no candidates: too few captions cost the ranking alone.
        lists, reason = None, ""
        try:
            lists = lists_for(run)
        except TooFewCaptionsError as error:
            reason = str(error)
        return cls(encoder, captions, lists, run.protocol.folds, run.protocol.seed, reason)

    def update(self, batch: ScoringBatch) -> None:
        self.codes.append(self.encoder.encode_images(batch.images))

    def compute(self) -> list[Score]:
        encoder, lists, image_codes = self.encoder, self.lists, torch.cat(self.codes)  # (N, D)

        # Each caption once. The pool has one caption of those with the same words; CLIP may see a difference.
        texts = list(dict.fromkeys([*(lists.pool if lists else ()), *self.captions]))
        index_of = {text: index for index, text in enumerate(texts)}
        text_codes = torch.cat([encoder.encode_captions(texts[i : i + 256]) for i in range(0, len(texts), 256)])

        # An image and its own caption.
        single = clip_score(image_codes, text_codes[[index_of[caption] for caption in self.captions]])  # (N,)
        about = encoder.protocol | {"num_images": len(image_codes)}
        said = about | {"unit": "100 x cosine, mean and deviation over images"}
        value, spread = max(0.0, float(single.mean())), float(single.std(correction=0))
        warnings = () if lists else (f"CLIP-R-precision is not computed: {self.without_lists}",)
        score = Score(f"CLIPScore[{encoder.label}]", value, said, std=spread, warnings=warnings)
        if lists is None:
            return [score]

        # Its own caption among others.
        pool_codes = text_codes[: len(lists.pool)]
        mean, std = r_precision(image_codes, pool_codes, lists.true, lists.candidates, self.folds, self.seed)
        said = about | about_lists(lists) | {"folds": self.folds, "seed": self.seed}
        return [score, Score(f"CLIP-R-precision%[{encoder.label}]", 100 * mean, said, std=100 * std)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clip", default=MODEL, metavar="NAME", help=f"file, folder, or name in the cache (default {MODEL})"
    )
    add_ranking_arguments(parser)


def main() -> None:
    run_script(ClipScore, add_options, tools_of=lambda args: Tools(clip=args.clip, lists=args.lists))


if __name__ == "__main__":
    run_command(main)
