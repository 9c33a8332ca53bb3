"""Adversarial and matching losses: tensors in, scalars out. Weights and schedules live with the system that uses them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Largest number of attention values (images × captions × words × regions) that word_loss keeps in memory at once.
MAX_ATTENTION_VALUES = 64 * 2**20
NUM_LENGTH_GROUPS = 4  # of captions with similar lengths, so that word_loss computes little for padding


def in_float32(loss: Callable) -> Callable:
    """Decorator: the loss computes without autocast, in float32 where its tensors are of 16 bits, else in their own dtype."""

    def widened(value: Any) -> Any:
        half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if half else value

    @functools.wraps(loss)
    def computed(*arguments: Any, **keywords: Any) -> Any:
        device = next((a.device.type for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)), "cpu")
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):  # autocast knows no meta device
            return loss(*map(widened, arguments), **{name: widened(value) for name, value in keywords.items()})

    return computed


@in_float32
def hinge_discriminator_loss(real: Tensor, fake: Tensor, mismatched: Tensor) -> Tensor:
    """Matching-aware hinge (Tao et al. 2022, eq. 1): real pairs up; fake images and wrong captions, half each, down.

    real, fake, mismatched: logits, each of any shape.

    Returns a scalar >= 0.
    """
    return F.relu(1 - real).mean() + (F.relu(1 + fake).mean() + F.relu(1 + mismatched).mean()) / 2


@in_float32
def hinge_generator_loss(fake: Tensor) -> Tensor:
    """G's part of the hinge (Tao et al. 2022, eq. 1): fake images with their captions up. Logits of any shape -> scalar."""
    return -fake.mean()


@in_float32
def lecam_loss(real: Tensor, fake: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """LeCam regularisation of D (Tseng et al., CVPR 2021, arXiv 2104.03310): E[(D(x) - a_F)²] + E[(D(G(z)) - a_R)²].

    As the paper's formula has it. The authors' code squares relu(D(x) - a_F) and relu(a_R - D(G(z))): the same where D
    tells real from fake, 0 for a real logit below a_F and for a fake one above a_R.

    real, fake: logits, each of any shape.
    average_real, average_fake: a_R and a_F, scalars: averages of D's mean logits over the steps before.
    """
    return (real - average_fake).square().mean() + (fake - average_real).square().mean()


@in_float32
def mode_seeking_loss(images: Tensor, others: Tensor, noise: Tensor, other_noise: Tensor) -> Tensor:
    """How little the images of the same captions differ for the difference of their noise (Mao et al. 2019, eq. 3).

    mean |z1 - z2| / mean |x1 - x2|: the inverse of the ratio that the paper maximises, as its code has it.

    images, others: (N, 3, H, W), of the same captions.
    noise, other_noise: (N, Z), of which they were drawn.
    """
    ratio = (images - others).abs().mean() / (noise - other_noise).abs().mean()
    return 1 / (ratio + 1e-5)


@in_float32
def binary_discriminator_loss(
    real: Tensor,
    fake: Tensor,
    mismatched: Tensor,
    real_alone: Tensor | None = None,
    fake_alone: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of AttnGAN's discriminators (Xu et al. 2018, eq. 6), weighted as in the authors' code.

    (real + real_alone)/2 + (fake + fake_alone + mismatched)/3; without the *_alone: real + (fake + mismatched)/2.

    real, fake, mismatched: logits of pairs, before the sigmoid, each of any shape.
    real_alone, fake_alone: logits of images without a caption; None where the discriminator has none.

    Returns a scalar >= 0.
    """
    # With captions alone.
    if real_alone is None or fake_alone is None:
        return _binary(real, 1.0) + (_binary(fake, 0.0) + _binary(mismatched, 0.0)) / 2

    # With and without captions.
    up = _binary(real, 1.0) + _binary(real_alone, 1.0)
    down = _binary(fake, 0.0) + _binary(fake_alone, 0.0) + _binary(mismatched, 0.0)
    return up / 2 + down / 3


@in_float32
def binary_generator_loss(*logits: Tensor) -> Tensor:
    """AttnGAN's loss of G (Xu et al. 2018): −log sigmoid(fake logits), mean over each tensor, summed over the tensors.

    Without the paper's factor 1/2, as in the authors' code.
    """
    return torch.stack([_binary(values, 1.0) for values in logits]).sum()


@in_float32
def kl_to_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) = (μ² + σ² − 1 − log σ²) / 2, averaged over samples and dimensions.

    The paper (Zhang et al. 2017, eq. 2) sums over the dimensions; the authors' code averages, as here.

    mu, logvar: μ and log σ², of one shape.

    Returns a scalar >= 0.
    """
    return (mu.square() + logvar.exp() - 1 - logvar).mean() / 2


def matching_aware_gradient_penalty(
    logits: Tensor, images: Tensor, sentence: Tensor, weight: float = 2.0, power: float = 6.0
) -> Tensor:
    """MA-GP (Tao et al. 2022, eq. 2): weight · mean ‖(∂D/∂x, ∂D/∂s)‖^power on real images with their own captions.

    One norm over both gradients together.

    logits: (N,), computed from images and sentence.
    images, sentence: (N, 3, H, W) and (N, D); both must require gradients.

    Returns a scalar >= 0 that can be differentiated once more.
    """
    gradients = torch.autograd.grad(logits.sum(), (images, sentence), create_graph=True)
    by_images, by_sentence = (gradient.flatten(1).square().sum(dim=1) for gradient in gradients)  # (N,) each

    # The power of the squared norm, not of its root: the root has no derivative where the gradient vanishes.
    return weight * (by_images + by_sentence).pow(power / 2).mean()


def word_attention(regions: Tensor, words: Tensor, lengths: Tensor, gamma1: float = 5.0) -> Tensor:
    """Attention of each word of a caption over the regions of its own image (Xu et al. 2018, eq. 8-9).

    regions (N, D, h, w), words (N, D, T), lengths (N,) -> (N, T, h, w): sums to 1 over the regions; 0 for padding.
    """
    padding = _padding(lengths, words)

    # Softmax over the words of each region, then over the regions of each word.
    scores = torch.einsum("ndt,ndr->ntr", words, regions.flatten(2))
    scores = scores.masked_fill(padding[:, :, None], -torch.inf).softmax(dim=1)
    attention = (gamma1 * scores).softmax(dim=2).masked_fill(padding[:, :, None], 0.0)
    return attention.unflatten(2, regions.shape[2:])


@in_float32
def word_loss(
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    class_ids: Tensor | None = None,
    gamma1: float = 5.0,
    gamma2: float = 5.0,
    gamma3: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """DAMSM at word level (Xu et al. 2018, eq. 8-12), without the outer 1/γ2 of eq. 10, as in the authors' code.

    regions: (N, D, h, w).
    words: (N, D, T).
    lengths: (N,), number of words that are not padding.
    class_ids: (N,), other samples of the same class do not count as mismatches; None: all of them do.
    gamma1, gamma2, gamma3: sharpness of attention, of joining the words, of the match over the batch.

    Returns (image-to-text, text-to-image), two scalars >= 0.
    """
    regions, padding = regions.flatten(2), _padding(lengths, words)
    products = regions.transpose(1, 2) @ regions  # VᵀV, (N, R, R)

    # R(Q, D) of every image with every caption, (N, N): in groups of similar length, each cut to its longest caption.
    groups = _of_similar_length(lengths)
    if groups is None:
        matching = _bounded_matching(regions, products, words, padding, gamma1, gamma2)
    else:
        parts = []
        for rows, longest in groups:
            rows = rows.to(words.device, non_blocking=True)  # indexing with a CPU tensor would wait for the GPU
            own = words[rows, :, :longest], padding[rows, :longest]
            parts.append(_bounded_matching(regions, products, *own, gamma1, gamma2))

        # Back in the order of the batch.
        back = torch.cat([rows for rows, _ in groups]).argsort().to(words.device, non_blocking=True)
        matching = torch.cat(parts, dim=1)[:, back]

    return _matching_loss(gamma3 * matching, class_ids)


@in_float32
def sentence_loss(
    code: Tensor, sentence: Tensor, class_ids: Tensor | None = None, gamma3: float = 10.0
) -> tuple[Tensor, Tensor]:
    """DAMSM at sentence level (Xu et al. 2018, eq. 13): cosine of code and sentence, times γ3.

    code, sentence: (N, D).
    class_ids, gamma3: as in word_loss.

    Returns (image-to-text, text-to-image), two scalars >= 0.
    """
    similarity = F.normalize(code, dim=1, eps=1e-8) @ F.normalize(sentence, dim=1, eps=1e-8).T
    return _matching_loss(gamma3 * similarity, class_ids)


@in_float32
def phrase_loss(logits: Tensor, phrases: Tensor) -> Tensor:
    """Which phrases there are: binary cross-entropy, the sum over the P phrases, the mean over N images or captions.

    logits: (N, P).
    phrases: (N, P), 1 where there is the phrase, else 0.

    Returns a scalar >= 0.
    """
    return F.binary_cross_entropy_with_logits(logits, phrases, reduction="none").sum(dim=1).mean()


@in_float32
def semantic_distance(a: Tensor, b: Tensor) -> Tensor:
    """SEM(a, b) = 1 − cos(a, b), in [0, 2]; (N, D), (N, D) -> (N,). SEMA's distance is not published; this one is ours."""
    return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-8)


def _binary(logits: Tensor, target: float) -> Tensor:
    """Mean binary cross-entropy of sigmoid(logits) against one target for all."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _of_similar_length(lengths: Tensor) -> list[tuple[Tensor, int]] | None:
    """Captions in groups of similar length: [(their indices, length of the longest)]; None: one group for all."""
    # Small batches gain nothing. Reading lengths from a GPU would wait for it.
    if lengths.device.type != "cpu" or len(lengths) < 2 * NUM_LENGTH_GROUPS:
        return None

    order = lengths.argsort(stable=True)
    return [(rows, int(lengths[rows[-1]])) for rows in order.tensor_split(NUM_LENGTH_GROUPS)]


def _bounded_matching(
    regions: Tensor, products: Tensor, words: Tensor, padding: Tensor, gamma1: float, gamma2: float
) -> Tensor:
    """_word_matching in bounded memory: for a large batch some images at a time, recomputed in the backward pass."""
    rows = max(1, MAX_ATTENTION_VALUES // (len(words) * words.shape[2] * regions.shape[2]))
    inputs = (words, padding, gamma1, gamma2)
    if rows >= len(regions):
        return _word_matching(regions, products, *inputs)

    blocks = zip(regions.split(rows), products.split(rows), strict=True)
    return torch.cat([checkpoint(_word_matching, *block, *inputs, use_reentrant=False) for block in blocks])


def _word_matching(
    regions: Tensor, products: Tensor, words: Tensor, padding: Tensor, gamma1: float, gamma2: float
) -> Tensor:
    """R(Q, D) of every image with every caption (Xu et al. 2018, eq. 10), without the outer 1/γ2.

    regions (I, D, R), products VᵀV (I, R, R), words (N, D, T), padding (N, T) -> (I, N).

    The region contexts c = Σ_r α_r·v_r, I·N·T vectors of length D, are never computed. Their cosine with a word e needs
    only c·e = Σ_r α_r·s_r, with the scores s_r = v_r·e, and ‖c‖² = αᵀ(VᵀV)α.
    """
    # Attention of each word over the regions: softmax over the words, then over the regions.
    num_captions, dim, num_words = words.shape
    queries = words.transpose(1, 2).reshape(num_captions * num_words, dim)
    scores = (queries @ regions).unflatten(1, (num_captions, num_words))  # (I, N, T, R)
    attention = scores.masked_fill(padding[None, :, :, None], -torch.inf).softmax(dim=2)
    attention = (gamma1 * attention).softmax(dim=3)

    # Cosine of each word with its region context, (I, N, T).
    agreement = (attention * scores).sum(dim=3)
    squared_norms = _SquaredContextNorms.apply(attention.flatten(1, 2), products)
    context_norms = squared_norms.clamp_min(1e-16).sqrt().unflatten(1, (num_captions, num_words))
    word_norms = queries.norm(dim=1).clamp_min(1e-8).unflatten(0, (num_captions, num_words))
    cosine = agreement / (context_norms * word_norms)

    # A caption's words joined into one score.
    return (gamma2 * cosine).masked_fill(padding, -torch.inf).logsumexp(dim=2)


class _SquaredContextNorms(torch.autograd.Function):
    """αᵀPα for each row α of (I, K, R) with symmetric P (I, R, R) -> (I, K).

    The gradient by α is 2Pα, as P is symmetric: twice the product that the forward pass has. Autograd would compute another.
    """

    @staticmethod
    def forward(ctx, attention: Tensor, products: Tensor) -> Tensor:
        weighted = attention @ products
        ctx.save_for_backward(attention, weighted)
        return torch.linalg.vecdot(weighted, attention)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # pyrefly: ignore[bad-override]  # torch's *grads
        attention, weighted = ctx.saved_tensors
        by_products = None
        if ctx.needs_input_grad[1]:
            by_products = (attention * grad[..., None]).transpose(1, 2) @ attention
        return weighted * (2 * grad[..., None]), by_products


def _matching_loss(similarity: Tensor, class_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding the own caption of each image (rows) and vice versa (columns): (N, N) -> two scalars."""
    # Others of the same class are no mismatches: left out of the softmax.
    if class_ids is not None:
        same_class = class_ids[:, None] == class_ids[None, :]
        itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
        similarity = similarity.masked_fill(same_class & ~itself, -torch.inf)

    own = torch.arange(len(similarity), device=similarity.device)
    return F.cross_entropy(similarity, own), F.cross_entropy(similarity.T, own)


def _padding(lengths: Tensor, words: Tensor) -> Tensor:
    """lengths (N,), words (N, D, T) -> (N, T) on the device of words, True = padding."""
    lengths = lengths.to(words.device, non_blocking=True)
    return torch.arange(words.shape[2], device=words.device) >= lengths[:, None]
