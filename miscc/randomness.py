"""Stateless randomness: every random draw is a function of (seed, purpose, numbers) and of nothing that ran before.

So a resumed run equals one that never stopped, and the number of workers or GPUs changes nothing. torch is imported where
it is needed: an exported model is served without it, with the same noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

if TYPE_CHECKING:
    import torch


def stream(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """An independent random stream for one purpose, e.g. `stream(100, "caption", epoch, index)`.

    seed and numbers are integers >= 0; purpose keeps draws of different kinds apart.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *(int(n) for n in numbers)])


def noise_array(
    seed: int, epoch: int, indices: Iterable[int], z_dim: int, truncation: float | None = None
) -> np.ndarray:
    """Noise (N, z_dim) float32; row i depends on (seed, epoch, indices[i]) alone.

    truncation None: standard normal. Otherwise a normal truncated to [-2, 2], times `truncation` (the
    truncated sampling of DF-GAN, 0.88, and SEMA, 0.8).
    """
    # A stream for each row, which then does not depend on its batch.
    rows = [stream(seed, "noise", epoch, index).random(z_dim) for index in indices]
    uniform = np.stack(rows) if rows else np.zeros((0, z_dim))

    # Normal numbers by the inverse of their distribution function; 0 and 1 would be infinite.
    if truncation is None:
        values = special.ndtri(np.clip(uniform, 1e-12, 1 - 1e-12))
    else:
        low, high = special.ndtr(-2.0), special.ndtr(2.0)
        values = special.ndtri(low + uniform * (high - low)) * truncation
    return values.astype(np.float32)


def noise_for(
    seed: int, epoch: int, indices: Iterable[int], z_dim: int, truncation: float | None = None
) -> torch.Tensor:
    """`noise_array` as a tensor (N, z_dim) on the CPU."""
    import torch

    return torch.from_numpy(noise_array(seed, epoch, indices, z_dim, truncation))


def seed_everything(seed: int, *numbers: int) -> None:
    """Seed torch's global generators (dropout, weight initialisation) from (seed, numbers)."""
    import torch

    torch.manual_seed(int(stream(seed, "torch", *numbers).integers(2**62)))
