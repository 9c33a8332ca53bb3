"""Batch: what passes from the data sets to networks, objectives and scores."""

from typing import NamedTuple

import torch

from miscc.images import from_uint8


class Batch(NamedTuple):
    """What passes from here to training and evaluation.

    images: (N, 3, H, W) float32 in [-1, 1], or a list of them where several image sizes were asked for, in
    that order; uint8 until `to` where the data set gives bytes; captions: (N, T) int64, padded with 0; lengths:
    (N,) int64, 1 to T; class_ids: (N,) int64; keys: N names of images; indices: (N,) int64, positions in the
    records; caption_numbers: (N,) int64, which caption.
    """

    images: torch.Tensor | list[torch.Tensor]
    captions: torch.Tensor
    lengths: torch.Tensor
    class_ids: torch.Tensor
    keys: list[str]
    indices: torch.Tensor
    caption_numbers: torch.Tensor

    def images_at(self, size: int) -> torch.Tensor:
        """The images of this size in pixels, which must be one of those asked for: (N, 3, size, size)."""
        scales = [self.images] if isinstance(self.images, torch.Tensor) else self.images
        return next(images for images in scales if images.shape[-1] == size)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same with images, captions and class ids on `device`, images of bytes as floats.

        Lengths and numbers stay on the CPU, where packing and random streams read them without waiting for a GPU.
        """

        def move(value):
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=non_blocking)
            return [move(item) for item in value]

        images = move(self.images)
        scales = [from_uint8(scale) if scale.dtype == torch.uint8 else scale for scale in _as_list(images)]
        images = scales if isinstance(images, list) else scales[0]
        return self._replace(images=images, captions=move(self.captions), class_ids=move(self.class_ids))


def _as_list(images: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return images if isinstance(images, list) else [images]
