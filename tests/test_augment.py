"""Differentiable augmentation against values worked out by hand."""

import pytest
import torch

from miscc.augment import augmentation, cut_out, recolour, translate


def numbered(num_images: int = 1, size: int = 8) -> torch.Tensor:
    """(N, 3, S, S) whose pixels are all different and none 0."""
    return torch.arange(1.0, num_images * 3 * size * size + 1).view(num_images, 3, size, size)


def test_translation_moves_by_whole_pixels_and_fills_with_zero():
    images = numbered(2)
    # 8 px move by -1, 0 or 1: each a third of [0, 1).
    draws = torch.tensor([[0.9, 0.5], [0.5, 0.1]])  # down by 1; left by 1

    moved = translate(images, draws)

    assert torch.equal(moved[0, :, 1:], images[0, :, :-1]) and not moved[0, :, 0].any()
    assert torch.equal(moved[1, :, :, :-1], images[1, :, :, 1:]) and not moved[1, :, :, -1].any()


def test_cutout_removes_a_square_of_half_the_side_and_nothing_else():
    images = numbered()
    draws = torch.tensor([[0.5, 0.0]])  # middle at row floor(0.5 · 9) = 4, column 0

    cut = cut_out(images, draws)

    removed = torch.zeros(8, 8, dtype=torch.bool)
    removed[2:6, 0:2] = True  # rows 4 ± 2, columns 0 ± 2 as far as there are any
    assert not cut[0, :, removed].any()
    assert torch.equal(cut[0, :, ~removed], images[0, :, ~removed])


def test_recolouring_by_hand():
    images = torch.tensor([0.1, 0.2, 0.6]).view(1, 3, 1, 1)
    draws = torch.tensor([[0.7, 1.0, 0.0]])  # b = 0.2, s = 2, c = 0.5

    # + 0.2: 0.3 0.4 0.8, grey 0.5; twice as far from it: 0.1 0.3 1.1, mean 0.5; half as far: 0.3 0.4 0.8.
    assert recolour(images, draws).flatten().tolist() == pytest.approx([0.3, 0.4, 0.8])
    # Draws in the middle of b's range, halfway up s's and c's, change nothing.
    assert recolour(images, torch.tensor([[0.5, 0.5, 0.5]])).flatten().tolist() == pytest.approx([0.1, 0.2, 0.6])


def test_contrast_is_about_the_mean_of_each_image():
    """Half the contrast: 0 and 1 become 0.25 and 0.75, about 0.5; 3 and 5 become 3.5 and 4.5, about 4."""
    images = torch.tensor([[0.0, 1.0], [3.0, 5.0]]).view(2, 1, 1, 2).expand(-1, 3, -1, -1)
    halved = recolour(images, torch.tensor([[0.5, 0.5, 0.0]] * 2))
    assert halved[:, 0, 0].tolist() == [[0.25, 0.75], [3.5, 4.5]]


def test_a_draw_depends_on_seed_step_and_index_alone():
    images = torch.ones(3, 3, 32, 32)
    kinds = ("translation", "cutout")
    whole = augmentation(kinds, seed=1, step=5, indices=[10, 11, 12])(images)

    assert torch.equal(augmentation(kinds, 1, 5, [11])(images[:1]), whole[1:2])
    assert not torch.equal(augmentation(kinds, 1, 6, [10, 11, 12])(images), whole)
    assert not torch.equal(augmentation(kinds, 2, 5, [10, 11, 12])(images), whole)


def test_real_and_fake_get_the_same_draw_and_gradients_pass():
    apply = augmentation(("cutout",), seed=0, step=0, indices=[0, 1])
    real, fake = torch.ones(2, 3, 16, 16), torch.full((2, 3, 16, 16), 2.0, requires_grad=True)

    seen_real, seen_fake = apply(real), apply(fake)
    seen_fake.sum().backward()

    assert torch.equal(seen_fake.detach(), 2 * seen_real)
    assert torch.equal(fake.grad, seen_real) and 0 < seen_real.mean() < 1


def test_no_kind_leaves_images_as_they_are():
    images = torch.rand(2, 3, 8, 8)
    assert augmentation((), 0, 0, [0, 1])(images) is images
