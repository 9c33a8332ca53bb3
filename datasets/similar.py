"""Batches of captions that resemble each other. Ours; the idea is that of hard negatives (Faghri et al., VSE++, 2018).

The captions of a random batch differ in most words, so that a few of them, such as the main colour, are enough to match each
image, and the others are not learned. To match "a red bird with striped wings" against "a red bird with plain wings" the
encoders must use the pattern. The same holds for D's mismatched pairs, which are captions of the same batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from scipy import sparse

from datasets.phrases import Phrase, phrases_in


def with_similar_batches(
    order: np.ndarray,
    caption_of: Callable[[int], Sequence[int]],
    batch_size: int,
    share: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """An epoch's order in which a share of the batches, spread over the epoch, holds captions that resemble each other.

    order: (N,) shuffled indices of images; similar batches are made of the first ones, so that each epoch has other images
    caption_of: index of an image -> indices of its caption's words in this epoch
    batch_size: images of a batch, on all processes together
    share: of the batches, in [0, 1]
    rng: draws the groups and the order of the batches

    Returns (M,) indices, M the largest multiple of batch_size up to N: each image at most once.
    """
    # Similar batches, beside random ones. A share above 0 is one batch at least.
    num_batches = len(order) // batch_size
    num_similar = min(num_batches, max(1, math.ceil(round(share * num_batches, 6)))) if share else 0
    num_grouped = num_similar * batch_size
    grouped = order[:num_grouped]
    groups = similar_groups(word_vectors([caption_of(int(index)) for index in grouped]), batch_size, rng)
    others = order[num_grouped : num_batches * batch_size].reshape(-1, batch_size)

    # Mixed: the batches, and the images of each, since neighbours are the most alike.
    batches = np.concatenate([grouped[groups], others])
    return rng.permuted(batches[rng.permutation(num_batches)], axis=1).reshape(-1)


def word_vectors(captions: Sequence[Sequence[int]]) -> sparse.csr_matrix:
    """(N, words and pairs of neighbouring words): which caption has what, weighted by log(N / captions that have it).

    captions: indices of words.

    Rows have norm 1, or 0 where a caption holds only what all captions have.
    """
    # Which caption has which words and pairs.
    seen: dict[Phrase, int] = {}
    rows, columns = [], []
    for row, words in enumerate(captions):
        phrases = phrases_in(words)
        rows += [row] * len(phrases)
        columns += [seen.setdefault(phrase, len(seen)) for phrase in sorted(phrases)]

    # Weights: what all captions have counts nothing.
    counts = np.bincount(columns, minlength=len(seen))
    weights = np.log(len(captions) / counts)[columns]
    lengths = np.sqrt(np.bincount(rows, weights**2, minlength=len(captions)))[rows]
    values = np.divide(weights, lengths, out=np.zeros_like(weights), where=lengths > 0)
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(captions), len(seen)))


def similar_groups(vectors: sparse.csr_matrix, size: int, rng: np.random.Generator) -> np.ndarray:
    """(N / size, size) indices of rows of `vectors`, similar ones together.

    Splits the rows in two until each part has `size` of them (random projection tree, Dasgupta and Freund 2008): a split draws
    two rows and sorts all by the difference of their similarities to the two. The rows of a group are similar, but they are not
    nearest neighbours, which often have the same content: nothing could match those. O(N log N).

    vectors: (N, M) with rows of norm 1 or 0; N is a multiple of size.
    rng: draws the two rows of each split.
    """
    if vectors.shape[0] == 0:
        return np.empty((0, size), dtype=np.int64)
    groups, pending = [], [np.arange(vectors.shape[0])]
    while pending:
        rows = pending.pop()
        if len(rows) == size:
            groups.append(rows)
            continue

        # Similarity of all rows to two of them.
        first, second = rng.choice(rows, 2, replace=False)
        candidates, two = (cast(sparse.csr_matrix, vectors[part]) for part in (rows, [first, second]))
        to_first, to_second = (candidates @ two.T).toarray().T

        # Sorted from the first to the second, and split at a multiple of the size. Equals keep their order; rounded, since
        # processors differ in the last bit, and every process must have the same order.
        rows = rows[np.argsort(np.round(to_second - to_first, 9), kind="stable")]
        middle = len(rows) // size // 2 * size
        pending += [rows[:middle], rows[middle:]]
    return np.stack(groups)
