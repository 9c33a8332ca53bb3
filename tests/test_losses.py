"""Losses against values worked out by hand and against their formulas written with loops, from both sides."""

import math

import pytest
import torch
import torch.nn.functional as F

import miscc.losses
from miscc.losses import (
    hinge_discriminator_loss,
    hinge_generator_loss,
    lecam_loss,
    matching_aware_gradient_penalty,
    mode_seeking_loss,
    semantic_distance,
    sentence_loss,
    word_attention,
    word_loss,
)


def test_hinge_by_hand():
    real, fake, mismatched = torch.tensor([0.5, 2.0]), torch.tensor([-2.0, 0.0]), torch.tensor([1.0])
    # real: (0.5 + 0) / 2; fake: (0 + 1) / 2; mismatched: 2
    assert hinge_discriminator_loss(real, fake, mismatched) == pytest.approx(0.25 + (0.5 + 2.0) / 2)


def test_hinge_is_zero_exactly_beyond_the_margins_and_pulls_the_right_way():
    far = torch.tensor([1.0, 5.0])
    assert hinge_discriminator_loss(far, -far, -far) == 0
    real, fake, wrong = (torch.zeros(2, requires_grad=True) for _ in range(3))
    hinge_discriminator_loss(real, fake, wrong).backward()
    assert real.grad.tolist() == [-0.5, -0.5] and fake.grad.tolist() == [0.25, 0.25] == wrong.grad.tolist()


def test_the_generators_hinge_by_hand():
    fake = torch.tensor([1.0, -4.0], requires_grad=True)
    loss = hinge_generator_loss(fake)
    loss.backward()
    assert loss.item() == 1.5 and fake.grad.tolist() == [-0.5, -0.5]  # fake images go up


def test_semantic_distance_by_hand():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert semantic_distance(a, b).tolist() == pytest.approx([0.0, 1.0, 2.0])


def test_lecam_by_hand():
    real, fake = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([0.5], requires_grad=True)
    # real pairs to a_F = -1: (4 + 1) / 2; fake ones to a_R = 3: 6.25
    loss = lecam_loss(real, fake, torch.tensor(3.0), torch.tensor(-1.0))
    assert loss.item() == pytest.approx(2.5 + 6.25)
    loss.backward()
    # No relu: the real logit below a_F is drawn up to it.
    assert real.grad.tolist() == [2.0, -1.0] and fake.grad.tolist() == [-5.0]


def test_mode_seeking_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.5, 0.5]], requires_grad=True)
    others, noise, other_noise = torch.zeros(2, 2), torch.tensor([[2.0], [0.0]]), torch.tensor([[-1.0], [1.0]])
    loss = mode_seeking_loss(images, others, noise, other_noise)  # mean |x1 - x2| = 0.5, mean |z1 - z2| = 2
    assert loss.item() == pytest.approx(4, rel=1e-4)
    loss.backward()
    assert images.grad[0, 0] < 0  # images that differ more have a smaller loss
    assert mode_seeking_loss(others, others, noise, other_noise).item() == pytest.approx(1e5)  # one image for all noise


def test_gradient_penalty_by_hand():
    images, sentence = torch.zeros(2, 1, 1, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    slope = torch.tensor(3.0, requires_grad=True)
    logits = (slope * images).flatten() + 4 * sentence.flatten()
    penalty = matching_aware_gradient_penalty(logits, images, sentence)
    assert penalty.item() == pytest.approx(2 * 5**6)  # one norm over both gradients: hypot(3, 4)
    penalty.backward()
    assert slope.grad.item() == pytest.approx(2 * 6 * 5**4 * 3, rel=1e-6)  # d/da 2(a²+16)³ = 12a(a²+16)²
    other = matching_aware_gradient_penalty((slope * images).flatten() + 0 * sentence.flatten(), images, sentence, 1, 2)
    assert other.item() == pytest.approx(9)


def test_gradient_penalty_sums_over_the_pixels_of_an_image_and_averages_over_images():
    """Slopes 2 and 4 at two pixels, 1 and 0 at the other image's; 5 and 3 by the sentences: norms² 45 and 10."""
    images, sentence = torch.zeros(2, 1, 1, 2, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    slopes = torch.tensor([[[[2.0, 4.0]]], [[[1.0, 0.0]]]])
    logits = (slopes * images).flatten(1).sum(1) + torch.tensor([5.0, 3.0]) * sentence[:, 0]
    assert matching_aware_gradient_penalty(logits, images, sentence, 3.0, 4.0).item() == 3 * (45**2 + 10**2) / 2


def test_gradient_penalty_has_a_gradient_where_the_slope_is_zero():
    images, sentence = torch.ones(1, 1, 1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    slope = torch.zeros((), requires_grad=True)
    matching_aware_gradient_penalty((slope * images).flatten() + 0 * sentence.flatten(), images, sentence).backward()
    assert slope.grad.item() == 0


def word_loss_by_the_formulas(regions, words, lengths, class_ids, gamma1, gamma2, gamma3):
    """Eq. 7 to 12 of the paper, one caption and one image at a time."""
    number = len(regions)
    similarity = torch.zeros(number, number, dtype=regions.dtype)
    for i in range(number):
        v = regions[i].flatten(1)  # (D, R)
        for j in range(number):
            e = words[j, :, : lengths[j]]  # (D, T)
            s = F.softmax(e.T @ v, dim=0)  # over the words
            alpha = F.softmax(gamma1 * s, dim=1)  # over the regions
            c = v @ alpha.T  # (D, T)
            relevance = F.cosine_similarity(c, e, dim=0)
            similarity[i, j] = torch.log(torch.exp(gamma2 * relevance).sum())
    return cross_entropies(gamma3 * similarity, class_ids)


def cross_entropies(similarity, class_ids):
    losses = []
    for matrix in (similarity, similarity.T):
        total = 0
        for i in range(len(matrix)):
            others = [j for j in range(len(matrix)) if j == i or class_ids is None or class_ids[j] != class_ids[i]]
            total += torch.logsumexp(matrix[i, others], 0) - matrix[i, i]
        losses.append(total / len(matrix))
    return losses


@pytest.fixture
def pairs():
    torch.manual_seed(5)
    regions = torch.randn(5, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    words = torch.randn(5, 6, 4, dtype=torch.float64, requires_grad=True)
    return regions, words, torch.tensor([4, 1, 3, 2, 4])


@pytest.mark.parametrize("class_ids", [None, torch.tensor([0, 1, 0, 2, 3])])
@pytest.mark.parametrize("gamma1", [4.0, 5.0])
def test_word_loss_follows_the_formulas(pairs, class_ids, gamma1):
    ours = word_loss(*pairs, class_ids, gamma1, 5.0, 10.0)
    theirs = word_loss_by_the_formulas(*pairs, class_ids, gamma1, 5.0, 10.0)
    assert torch.stack(ours).tolist() == pytest.approx(torch.stack(theirs).tolist(), rel=1e-10)
    our_gradients = torch.autograd.grad(sum(ours), pairs[:2])
    their_gradients = torch.autograd.grad(sum(theirs), pairs[:2])
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("values", [miscc.losses.MAX_ATTENTION_VALUES, 1])
def test_word_loss_in_groups_of_similar_length_follows_the_formulas(values, monkeypatch):
    """From eight captions on they are sorted by length; the result is in their own order."""
    monkeypatch.setattr(miscc.losses, "MAX_ATTENTION_VALUES", values)
    torch.manual_seed(6)
    regions = torch.randn(9, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    words = torch.randn(9, 6, 7, dtype=torch.float64, requires_grad=True)
    lengths, class_ids = torch.tensor([7, 1, 3, 2, 4, 7, 5, 1, 6]), torch.tensor([0, 1, 0, 2, 3, 4, 5, 1, 6])
    ours = word_loss(regions, words, lengths, class_ids, 4.0, 5.0, 10.0)
    theirs = word_loss_by_the_formulas(regions, words, lengths, class_ids, 4.0, 5.0, 10.0)
    assert torch.stack(ours).tolist() == pytest.approx(torch.stack(theirs).tolist(), rel=1e-10)
    gradients = [torch.autograd.grad(sum(losses), (regions, words)) for losses in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_context_norms_by_hand_and_by_finite_differences():
    """αᵀPα with P = [[2, 1], [1, 3]] and α = (1, 2): 2 + 2·2 + 3·4; by α: 2Pα; by P: ααᵀ."""
    alpha = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    products = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]], dtype=torch.float64, requires_grad=True)
    norms = miscc.losses._SquaredContextNorms.apply(alpha, products)
    by_alpha, by_products = torch.autograd.grad(norms.sum(), (alpha, products))
    assert norms.tolist() == [[18.0]] and by_alpha.tolist() == [[[8.0, 14.0]]]
    assert by_products.tolist() == [[[1.0, 2.0], [2.0, 4.0]]]
    torch.manual_seed(9)
    vectors = torch.randn(2, 3, 4, dtype=torch.float64)
    inputs = (torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True), (vectors.mT @ vectors).requires_grad_())
    assert torch.autograd.gradcheck(miscc.losses._SquaredContextNorms.apply, inputs)


@pytest.mark.parametrize("number", [3, 8])  # from eight on, captions are sorted by length
def test_word_and_sentence_loss_by_finite_differences(number):
    torch.manual_seed(8)
    regions = torch.randn(number, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    words = torch.randn(number, 2, 3, dtype=torch.float64, requires_grad=True)
    lengths, class_ids = torch.arange(number) % 3 + 1, torch.arange(number) // 2
    assert torch.autograd.gradcheck(lambda r, w: word_loss(r, w, lengths, class_ids, 2.0, 2.0, 2.0), (regions, words))
    code, sentence = regions[:, :, 0, 0].detach().requires_grad_(), words[:, :, 0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda c, s: sentence_loss(c, s, class_ids, 2.0), (code, sentence))


def test_word_loss_in_parts_is_the_same(pairs, monkeypatch):
    whole = word_loss(*pairs)
    gradient = torch.autograd.grad(sum(whole), pairs[0])[0]
    monkeypatch.setattr(miscc.losses, "MAX_ATTENTION_VALUES", 1)  # one image at a time
    parts = word_loss(*pairs)
    assert torch.stack(parts).tolist() == pytest.approx(torch.stack(whole).tolist(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), pairs[0])[0], gradient)


def test_word_loss_does_not_see_padding(pairs):
    regions, words, lengths = pairs
    changed = words.detach().clone()
    changed[1, :, 1:] = 100.0  # that caption has one word
    assert torch.stack(word_loss(regions, changed, lengths)).tolist() == pytest.approx(
        torch.stack(word_loss(regions, words, lengths)).tolist(), rel=1e-12
    )
    changed[1, :, 0] += 1.0
    assert word_loss(regions, changed, lengths)[0].item() != pytest.approx(word_loss(*pairs)[0].item(), rel=1e-6)


def test_word_loss_of_two_captions_by_hand():
    """One region an image and one word a caption: the cosine of word and region is the match, times γ2, times γ3."""
    regions = torch.tensor([[1.0, 0.0], [0.0, 2.0]])[:, :, None, None]
    words = torch.tensor([[3.0, 0.0], [1.0, 1.0]])[:, :, None]
    match = 2.0 * 0.5 * torch.tensor([[1.0, math.sqrt(0.5)], [0.0, math.sqrt(0.5)]])  # image by caption
    rows, columns = (-(matrix.diagonal() - matrix.logsumexp(1)).mean().item() for matrix in (match, match.T))
    found = word_loss(regions, words, torch.tensor([1, 1]), None, 7.0, 0.5, 2.0)
    assert [loss.item() for loss in found] == pytest.approx([rows, columns], rel=1e-5)
    assert rows != pytest.approx(columns, rel=1e-2)


def test_attention_of_words_by_hand():
    """Scores 0 and log 2 of two words at one region, log 3 and 0 at the other: shares 1/3 and 2/3, 3/4 and 1/4 of the words."""
    regions = torch.tensor([[[0.0, math.log(3)], [math.log(2), 0.0]]])[..., None]  # (1, D, 2, 1)
    words = torch.eye(2)[None]  # word t has the t-th number of a region as its score
    first = torch.softmax(2.0 * torch.tensor([1 / 3, 3 / 4]), 0)
    second = torch.softmax(2.0 * torch.tensor([2 / 3, 1 / 4]), 0)
    found = word_attention(regions, words, torch.tensor([2]), 2.0)
    torch.testing.assert_close(found[0, :, :, 0], torch.stack([first, second]))


def test_zero_words_and_regions_give_finite_gradients():
    regions, words = torch.zeros(3, 4, 2, 2, requires_grad=True), torch.zeros(3, 4, 3, requires_grad=True)
    sum(word_loss(regions, words, torch.tensor([3, 2, 1]))).backward()
    assert torch.isfinite(regions.grad).all() and torch.isfinite(words.grad).all()


def test_sentence_loss_by_hand():
    code = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    sentence = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    # cosines times 10: rows [10, 7.0711], [0, 7.0711]
    diagonal, side = 10.0, 10 / math.sqrt(2)
    rows = [math.log(math.exp(diagonal) + math.exp(side)) - diagonal, math.log(1 + math.exp(side)) - side]
    columns = [math.log(math.exp(diagonal) + 1) - diagonal, math.log(2 * math.exp(side)) - side]
    image_to_text, text_to_image = sentence_loss(code, sentence)
    assert image_to_text.item() == pytest.approx(sum(rows) / 2, rel=1e-5)
    assert text_to_image.item() == pytest.approx(sum(columns) / 2, rel=1e-5)


def test_samples_of_one_class_are_no_mismatches():
    code, sentence = torch.randn(4, 8), torch.randn(4, 8)
    one_class = sentence_loss(code, sentence, torch.zeros(4, dtype=torch.long))
    assert [loss.item() for loss in one_class] == [0.0, 0.0]
    different = sentence_loss(code, sentence, torch.arange(4))
    assert [loss.item() for loss in different] == [loss.item() for loss in sentence_loss(code, sentence)]
    assert different[0].item() > 0.01


def test_attention_sums_to_one_over_regions_and_is_zero_past_the_caption(pairs):
    regions, words, lengths = pairs
    attention = word_attention(regions, words, lengths, 4.0)
    assert attention.shape == (5, 4, 2, 3)
    for row, length in enumerate(lengths):
        sums = attention[row].sum(dim=(1, 2)).tolist()
        assert sums == pytest.approx([1.0] * length + [0.0] * (4 - length))
