"""An image encoder for small images that sees the features of a frozen network beside its own. Ours, from no paper.

Trained from scratch on a few thousand pairs, DAMSM's small encoder learns colours and places. It does not find what rarely
tells two images of a batch apart, such as the pattern of a wing; a network trained on ImageNet has that from the start.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miscc.settings import setting
from models.backbones import BACKBONES, Backbone
from models.damsm import GRID, SmallImageEncoder
from models.layers import resize

NUM_STAGES = 3  # of the backbone's four: the coarsest tells what an image shows, not where


def backbone_weights_setting() -> Any:
    """DAMSM.BACKBONE_WEIGHTS, which the GANs' loop reads, too: the file may lie elsewhere than when the encoder was trained."""
    return setting(
        "DAMSM.BACKBONE_WEIGHTS",
        "",
        "weight file of the image encoder's frozen network; empty: where it was in pretraining, at first the one in its package",
    )


class PretrainedImageEncoder(SmallImageEncoder):
    """SmallImageEncoder, with features of a frozen network added to its own on the same 8×8 grid.

    text_dim, image_size, nf: as for SmallImageEncoder.
    backbone: name of the frozen network, in models.backbones.BACKBONES.
    weights: its weight file; "": the one in its package, where there is one.
    weights_hash: of the weights that the encoder was trained with; "": any.

    Raises CheckpointError for missing weights and for weights of another hash.
    """

    @dataclass(frozen=True)
    class Settings(SmallImageEncoder.Settings):
        backbone: str = setting(
            "DAMSM.BACKBONE", "efficientnet-lite0", "frozen network of DAMSM.IMAGE_ENCODER pretrained", tuple(BACKBONES)
        )
        weights: str = backbone_weights_setting()
        weights_hash: str = ""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)

        # The frozen part: always the same numbers, brought to one scale by a batch norm.
        self.backbone = Backbone(self.settings.backbone, self.settings.weights, key="DAMSM.BACKBONE_WEIGHTS")
        self.backbone.check_hash(self.settings.weights_hash, "encoder")
        self.change_settings(weights_hash=self.backbone.weights_hash)
        num_frozen = sum(self.backbone.channels[:NUM_STAGES])
        self.norm = nn.BatchNorm2d(num_frozen, affine=False)

        # What it adds to the encoder's own features.
        num_own = 8 * self.settings.nf
        self.added = nn.Sequential(*self._layer(num_own + num_frozen, num_own, stride=1))

    @classmethod
    def from_small(cls, small: SmallImageEncoder, backbone: str, weights: str) -> "PretrainedImageEncoder":
        """An encoder with the same output as `small`: the scale of what the frozen network adds is 0.

        small: trained or not; its sizes are kept.
        backbone, weights: as for the class.

        Raises CheckpointError as the class does.
        """
        encoder = cls(**small.arguments, backbone=backbone, weights=weights)
        encoder.load_state_dict(encoder.state_dict() | small.state_dict())
        nn.init.zeros_(cast(Tensor, encoder.added[1].weight))  # 1 in a fresh one, which learns faster so
        return encoder

    def features(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> (N, 8·nf, 8, 8)."""
        own = super().features(images)

        # Of the size that the backbone reads. Fine features are averaged, coarse ones enlarged.
        seen = resize(images, self.backbone.image_size or max(self.image_size, self.backbone.strides[-1]))
        frozen = [to_grid(scale, GRID) for scale in self.backbone(seen)[:NUM_STAGES]]
        return own + self.added(torch.cat([own, self.norm(torch.cat(frozen, dim=1)).to(own.dtype)], dim=1))


def to_grid(x: Tensor, size: int) -> Tensor:
    """(N, C, h, w) -> (N, C, size, size): averaged where there are more values, bilinear where there are fewer."""
    if x.shape[-1] >= size:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
