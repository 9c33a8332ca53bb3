"""Protocols: everything that makes two published scores of the same generator differ, as one named record each.

eval/evaluate.py runs them.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from eval import METRICS
from miscc.errors import ConfigError

CROPS = ("middle", "augmented")
CHOICES = ("random", "first", "all")


@dataclass(frozen=True)
class Protocol:
    """What to draw, what to compare it with, and by which metrics. With the weights' hash and the files this repeats a score.

    dataset: DATASET_NAME that the scores are meant for, "" for any;
    real_split, real_crop: the real images; "middle": box cut out, scaled, middle crop, as our test images; "augmented":
    a random crop of the same and a flip, one of each image;
    num_real: so many of them, drawn by the seed, and in a quick run no more than are drawn; None: always all;
    caption_split, caption_choice: whose captions are drawn; "random": `num_images` captions of all, by the seed, again
    with other noise when they run out; "first": the first `captions_per_image` of every image; "all": every caption;
    num_images: generated images in all, None: images_per_caption of each caption that caption_choice selects;
    captions_per_image: of each real image, 0 for all that TEXT.CAPTIONS_PER_IMAGE leaves;
    images_per_caption: of each;
    metrics: names of METRICS in eval/__init__.py;
    network, resize: of FID, KID and IS, see eval/features/networks.py (the hash of its weights is taken when it is loaded);
    more_networks: by which FID is computed, too: a score by a network that took part in the training flatters;
    quantisation: of the images before any metric reads them;
    truncation: of the noise, None: plain normal;
    averaged: the generator's moving average (EMA) where the checkpoint has one;
    seed: of captions, noise and draws.
    """

    name: str
    about: str
    dataset: str = ""
    real_split: str = "test"
    real_crop: str = "middle"
    num_real: int | None = None
    caption_split: str = "test"
    caption_choice: str = "random"
    num_images: int | None = 30_000
    captions_per_image: int = 0
    images_per_caption: int = 1
    metrics: tuple[str, ...] = ("FID", "IS")
    network: str = "inception-tf"
    resize: str = "tf1"
    more_networks: tuple[str, ...] = ()
    quantisation: str = "uint8"
    truncation: float | None = None
    averaged: bool = True
    seed: int = 2020
    splits: int = 10  # of the class score, as the papers
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    candidates: int = 99  # wrong captions for R-precision, as AttnGAN
    folds: int = 10  # of R-precision
    diversity_captions: int = 0  # drawn beside the others, for LPIPS among images of one caption
    diversity_images: int = 0  # of each of them

    def __post_init__(self) -> None:
        wrong = [metric for metric in self.metrics if metric not in METRICS]
        if wrong or not self.metrics:
            raise ConfigError(
                f"protocol {self.name}: metrics {wrong}: choose from {', '.join(METRICS)} (METRICS in eval/__init__.py)"
            )

        # What is drawn, and what it is compared with.
        if self.real_crop not in CROPS or self.caption_choice not in CHOICES:
            raise ConfigError(
                f"protocol {self.name}: real_crop is one of {', '.join(CROPS)}, caption_choice of {', '.join(CHOICES)}"
            )
        if (self.num_images is not None) != (self.caption_choice == "random"):
            raise ConfigError(f"protocol {self.name}: num_images goes with caption_choice random, and only with it")
        if self.num_real is not None and self.num_real < 2:
            raise ConfigError(f"protocol {self.name}: num_real must be 2 or more")
        if self.images_per_caption < 1 or (self.num_images or 2) < 2:
            raise ConfigError(f"protocol {self.name}: draw at least two images, at least one of each caption")
        if self.quantisation != "uint8":
            raise ConfigError(f"protocol {self.name}: quantisation {self.quantisation}: images are scored as uint8")


_LIGHT: dict[str, Any] = {
    "network": "efficientnet-lite0",
    "more_networks": ("efficientnet-lite2",),
    "resize": "clean",
    "kid_subset_size": 500,
    "num_real": 2000,
}

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("cub-30k", "the papers' on CUB: 30,000 random test captions against the test set", dataset="birds"),
        Protocol("coco-30k", "the papers' on COCO: 30,000 random test captions against the test set", dataset="coco"),
        Protocol(
            name="df-gan",
            about="DF-GAN's: ten images of one caption of every test image, real images augmented, noise truncated",
            real_crop="augmented",
            caption_choice="first",
            num_images=None,
            captions_per_image=1,
            images_per_caption=10,
            truncation=0.88,
        ),
        Protocol(
            name="clean-fid",
            about="30,000 random test captions, antialiased bicubic resize as clean-fid's",
            metrics=("FID", "KID"),
            resize="clean",
        ),
        Protocol(
            name="clip",
            about="the papers' FID, and by CLIP how well images match their captions (wants CLIP's weights)",
            metrics=("FID", "CLIP"),
        ),
        Protocol(
            name="toybirds",
            about="offline: attributes and outlines read off drawn birds, distances by EfficientNet-lite0 and -lite2",
            dataset="toybirds",
            num_images=1000,
            images_per_caption=2,
            metrics=("attributes", "mask_iou", "variety", "FID", "KID", "IS", "R_precision"),
            **_LIGHT,
        ),
        Protocol(
            name="small",
            about="offline, for small images and data sets: distances by EfficientNet-lite0 and -lite2, diversity by LPIPS",
            num_images=2000,
            metrics=("FID", "KID", "IS", "R_precision", "diversity"),
            diversity_captions=50,
            diversity_images=6,
            **_LIGHT,
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of this name. Raises ConfigError with the nearest name."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        hint = "that is a metric, which has a script of its own under eval/." if name in METRICS else hint
        raise ConfigError(f"--protocol {name}: unknown; {hint} There are {', '.join(PROTOCOLS)}".replace(";  ", "; "))
    return PROTOCOLS[name]
