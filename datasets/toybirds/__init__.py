"""ToyBirds: drawn birds with captions, attributes and outlines. Nothing to download; the same seed draws the same bird."""

from datasets.toybirds.attributes import ATTRIBUTES
from datasets.toybirds.captions import named_attributes
from datasets.toybirds.dataset import VERSION, ToyBird, ToyBirds, bounding_box, write_cub_layout

__all__ = ["ATTRIBUTES", "VERSION", "ToyBird", "ToyBirds", "bounding_box", "named_attributes", "write_cub_layout"]
