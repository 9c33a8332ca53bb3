"""A strip of images from one caption to another, or from one noise to another."""

import numpy as np
import torch

from miscc.images import to_uint8
from miscc.pictures import grid
from models.types import TextFeatures
from sampling.pipeline import TextToImage


def interpolate(
    pipeline: TextToImage, first: str, second: str, steps: int = 8, seed: int = 0, truncation: float | None = None
) -> np.ndarray:
    """The images of `interpolated` side by side: a strip (H, steps·W, 3) uint8."""
    return grid([list(interpolated(pipeline, first, second, steps, seed, truncation))])


@torch.inference_mode()
def interpolated(
    pipeline: TextToImage, first: str, second: str, steps: int = 8, seed: int = 0, truncation: float | None = None
) -> np.ndarray:
    """Images (steps, H, W, 3) uint8 from one caption to another under the same noise: text features mixed linearly.

    With the same caption twice: from one noise to another, along the arc between them.

    steps: number of images
    seed, truncation: of the noise
    """
    # The two ends.
    text = pipeline.encode([first, second])
    weights = torch.linspace(0, 1, steps, device=pipeline.device)
    noise = pipeline.noise(seed, [0, 1], truncation).to(pipeline.device)

    # What lies between them: noise or text.
    rows = pipeline.tokens([first, second]).tokens
    if bool((rows[0] == rows[1]).all()):  # also where they differ in what the model does not read
        mixed_noise, text = _along_arc(noise[0], noise[1], weights), text.select([0] * steps)
    else:
        mixed_noise, text = noise[:1].expand(steps, -1), _mix(text, weights)
    return to_uint8(pipeline.synthesize(text, mixed_noise).images[-1])


def _mix(text: TextFeatures, weights: torch.Tensor) -> TextFeatures:
    """Two captions' features -> (steps, …) from the first to the second; padding where both are padded."""
    sentence = torch.lerp(text.sentence[:1], text.sentence[1:], weights[:, None])
    words = torch.lerp(text.words[:1], text.words[1:], weights[:, None, None])
    return TextFeatures(sentence, words, (text.mask[0] & text.mask[1]).expand(len(weights), -1))


def _along_arc(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985), as a mean of two normal vectors is too short: a, b (D,) -> (steps, D)."""
    if torch.allclose(a, b):
        return a.expand(len(weights), -1)
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    parts = torch.sin(torch.stack([(1 - weights) * angle, weights * angle], dim=1)) / torch.sin(angle)
    return parts @ torch.stack([a, b])
