"""Retrieval of images by captions and captions by images: R@k over a set of pairs. Generated images are R_precision's."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor


def retrieval_at(code: Tensor, sentence: Tensor, ks: Iterable[int] = (1, 5)) -> dict[str, float]:
    """R@k by cosine: code (N, D) of images, sentence (N, D) of their captions, row i belonging together.

    Returns {"image_to_text_r1": ..., "text_to_image_r1": ..., "chance_r1": k/N, ...}, shares from 0 to 1. Among pairs
    that are equally alike each order counts the same, so that codes that are all alike give chance.
    """
    # Double precision, so that equal pairs tie exactly.
    similarity = F.normalize(code.double(), dim=1) @ F.normalize(sentence.double(), dim=1).T  # (N, N)

    # The share of rows whose own column is among the first k; a tie counts by its chance.
    scores = {}
    for name, rows in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        own = rows.diagonal()[:, None]
        better = (rows > own).sum(dim=1)
        tied = (rows == own).sum(dim=1)  # itself included
        scores |= {f"{name}_r{k}": ((k - better) / tied).clamp(0, 1).mean().item() for k in ks}
    return scores | {f"chance_r{k}": min(1.0, k / len(similarity)) for k in ks}
