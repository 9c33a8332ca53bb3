"""Batches of captions that resemble each other. Ours; the idea is that of hard negatives (Faghri et al., VSE++, 2018).

Two captions of a random batch differ in most words, so that a few words, such as the main colour, tell them apart, and nothing
is learned of the others. Between "a red bird with striped wings" and "a red bird with plain wings" it takes the pattern. The
same holds for D's mismatched pairs, which are captions of the same batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from scipy import sparse


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
    share: of the batches, in [0, 1]

    Returns (M,) indices, M the largest multiple of batch_size up to N: each image at most once.
    """
    # Similar batches, beside random ones.
    num_batches = len(order) // batch_size
    num_grouped = math.ceil(share * num_batches) * batch_size  # a share above 0 is one batch at least
    grouped = order[:num_grouped]
    groups = similar_groups(word_vectors([caption_of(int(index)) for index in grouped]), batch_size, rng)
    others = order[num_grouped : num_batches * batch_size].reshape(-1, batch_size)

    # Mixed: the batches, and the images of each, since neighbours are the most alike.
    batches = np.concatenate([grouped[groups], others])
    return rng.permuted(batches[rng.permutation(num_batches)], axis=1).reshape(-1)


def word_vectors(captions: Sequence[Sequence[int]]) -> sparse.csr_matrix:
    """(N, words and pairs of neighbouring words): which caption has what, weighted by log(N / captions that have it).

    captions: indices of words. Pairs, since "red wings" and "a red head" share no more than a colour.

    Rows are of length 1, or 0 where a caption holds nothing but what all have.
    """
    # Which caption has which words and pairs.
    seen: dict[tuple[int, ...], int] = {}
    rows, columns = [], []
    for row, words in enumerate(captions):
        ngrams = {(word,) for word in words} | set(zip(words, words[1:], strict=False))
        rows += [row] * len(ngrams)
        columns += [seen.setdefault(ngram, len(seen)) for ngram in sorted(ngrams)]

    # Weights: what all captions have counts nothing.
    counts = np.bincount(columns, minlength=len(seen))
    weights = np.log(len(captions) / counts)[columns]
    lengths = np.sqrt(np.bincount(rows, weights**2, minlength=len(captions)))[rows]
    values = np.divide(weights, lengths, out=np.zeros_like(weights), where=lengths > 0)
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(captions), len(seen)))


def similar_groups(vectors: sparse.csr_matrix, size: int, rng: np.random.Generator) -> np.ndarray:
    """(N / size, size) rows of `vectors`, similar ones together; N is a multiple of size.

    Halves halved again: each cut sorts the rows by which of two of them, drawn at random, they resemble more (a random
    projection tree). Groups are alike, but not each row's nearest ones: those would often be captions of the same content,
    which nothing can tell apart. N rows take N log N steps.
    """
    if vectors.shape[0] == 0:
        return np.empty((0, size), dtype=np.int64)
    groups, waiting = [], [np.arange(vectors.shape[0])]
    while waiting:
        rows = waiting.pop()
        if len(rows) == size:
            groups.append(rows)
            continue

        # Sorted between the two, and cut at a multiple of the size. Equals keep their order.
        first, second = rng.choice(rows, 2, replace=False)
        these, two = (cast(sparse.csr_matrix, vectors[part]) for part in (rows, [second, first]))
        to_second, to_first = (these @ two.T).toarray().T
        rows = rows[np.argsort(to_second - to_first, kind="stable")]
        middle = len(rows) // size // 2 * size
        waiting += [rows[:middle], rows[middle:]]
    return np.stack(groups)
