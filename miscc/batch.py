"""Batch: what passes from the data sets to networks, objectives and scores."""

from typing import NamedTuple

import torch

from miscc.images import from_uint8


class Batch(NamedTuple):
    """N images, each with a caption.

    images: (N, 3, H, W) float32 in [-1, 1], or a list of them, one an image size, where several sizes were requested;
        uint8 until `to` where the data set gives bytes
    captions: (N, T) int64 word indices, padded with 0
    lengths: (N,) int64, 1 to T
    class_ids: (N,) int64
    keys: N names of images
    indices: (N,) int64, of the images in the records
    caption_numbers: (N,) int64, which of an image's captions
    """

    images: torch.Tensor | list[torch.Tensor]
    captions: torch.Tensor
    lengths: torch.Tensor
    class_ids: torch.Tensor
    keys: list[str]
    indices: torch.Tensor
    caption_numbers: torch.Tensor

    @property
    def single_size(self) -> torch.Tensor:
        """The images (N, 3, H, W), where one image size was requested. Raises ValueError where there are several."""
        if not isinstance(self.images, torch.Tensor):
            raise ValueError(f"the batch has images of {len(self.images)} sizes; take those of one with images_at")
        return self.images

    def images_at(self, size: int) -> torch.Tensor:
        """The images of this size in pixels, one of those requested: (N, 3, size, size)."""
        scales = [self.images] if isinstance(self.images, torch.Tensor) else self.images
        return next(images for images in scales if images.shape[-1] == size)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same with images, captions and class ids on `device`, uint8 images as floats.

        Lengths and indices stay on the CPU, where packing and random streams read them without waiting for a GPU.
        """

        def move(value: torch.Tensor) -> torch.Tensor:
            return value.to(device, non_blocking=non_blocking)

        # Bytes are converted on the device: a quarter of the transfer.
        scales = [self.images] if isinstance(self.images, torch.Tensor) else self.images
        scales = [move(scale) for scale in scales]
        scales = [from_uint8(scale) if scale.dtype == torch.uint8 else scale for scale in scales]

        # One size is a tensor, several are a list, as before.
        images = scales[0] if isinstance(self.images, torch.Tensor) else scales
        return self._replace(images=images, captions=move(self.captions), class_ids=move(self.class_ids))
