"""Metrics of generated images, one a file. `METRICS` is what the protocols, `eval.evaluate --help` and the tests read."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.metric import Metric

# Name in a protocol: where its class is, and what its score says. A metric is imported when it is asked for, not before.
METRICS = {
    "FID": ("eval.FID:FrechetDistance", "Fréchet distance of features: generated against real images as two clouds"),
    "KID": ("eval.KID:KernelDistance", "kernel distance of features: as FID, fair for few images too"),
    "IS": ("eval.IS:InceptionScore", "Inception score: each image shows one thing clearly, all together many things"),
    "precision_recall": (
        "eval.precision_recall:PrecisionRecall",
        "share of generated images that could be real, and of real ones that could be generated",
    ),
    "R_precision": ("eval.R_precision:RPrecision", "how often DAMSM finds an image's own caption among 99 others"),
    "CLIP": ("eval.CLIP:ClipScore", "CLIPScore and CLIP-R-precision: do images and captions match for CLIP"),
    "diversity": ("eval.LPIPS:Diversity", "perceptual distance (LPIPS) among images of the same caption"),
    "LPIPS": ("eval.LPIPS:PairedDistance", "perceptual distance of an image to the real one whose caption it shows"),
    "attributes": ("eval.attributes:AttributeAccuracy", "ToyBirds only: how many of the named attributes images show"),
    "variety": (
        "eval.variety:Variety",
        "ToyBirds only: how much images of one caption differ in pose, facing and place",
    ),
    "mask_iou": ("eval.mask_iou:MaskIoU", "ToyBirds only: how well the generator's masks cover the birds"),
}


def find_metric(name: str) -> "type[Metric]":
    """The class of a metric of METRICS; imports its file."""
    target = METRICS[name][0]
    module, _, class_name = target.partition(":")
    try:
        file = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # a package that the metric needs
            raise
        raise ValueError(f"METRICS in eval/__init__.py: {name}: there is no {target}") from None
    if not hasattr(file, class_name):
        raise ValueError(f"METRICS in eval/__init__.py: {name}: there is no {target}")
    return getattr(file, class_name)
