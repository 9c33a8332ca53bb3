"""The layers that systems share equal their plain forms, and a gradient penalty through them does less."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.kernels import upsample_2x
from models.layers import DownBlock, FusionBlock, OneWayDiscriminator, num_upsamples


def test_the_penalty_sends_nothing_through_the_forward_convolutions():
    """With torch's own operations the biases get a gradient of zeros, at the price of a convolution backward each."""
    torch.manual_seed(2)
    discriminator = OneWayDiscriminator(nf=2, image_size=16, sentence_dim=4)
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(images, torch.randn(2, 4)).sum(), images, create_graph=True)
    gradient.square().sum().backward()
    assert discriminator.from_rgb.bias.grad is None
    assert discriminator.from_rgb.weight.grad.abs().max() > 0


def plain_down_block(block, x):
    """As the papers draw it: shortcut convolution at full size, then pooling; stock operations."""
    shortcut = block.shortcut(x) if block.changes_channels else x
    residual = F.leaky_relu(block.residual[0](x), 0.2)
    residual = F.leaky_relu(block.residual[2](residual), 0.2)
    return F.avg_pool2d(shortcut, 2) + block.gate * residual


@pytest.mark.parametrize("channels", [(3, 5), (4, 4)])
def test_down_block_equals_the_plain_form(channels):
    torch.manual_seed(3)
    block = DownBlock(*channels).double()
    assert block.gate.item() == 0
    nn.init.constant_(block.gate, 0.7)
    x = torch.randn(2, channels[0], 8, 8, dtype=torch.float64, requires_grad=True)
    ours, plain = block(x), plain_down_block(block, x)
    torch.testing.assert_close(ours, plain)
    assert ours.shape == (2, channels[1], 4, 4)
    used = [p for name, p in block.named_parameters() if block.changes_channels or "shortcut" not in name]
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), used), torch.autograd.grad(plain.square().sum(), used), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channels_out", [4, 6])
def test_a_block_that_upsamples_equals_one_of_upsampled_features(channels_out):
    torch.manual_seed(5)
    block = FusionBlock(4, channels_out, condition_dim=3).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    ours, plain = block(x, condition, upsample=True), block(upsample_2x(x), condition)
    torch.testing.assert_close(ours, plain)
    wanted = [x, condition, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), wanted), torch.autograd.grad(plain.square().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("size", "steps"), [(8, 1), (32, 3), (256, 6), (512, 7)])
def test_num_upsamples(size, steps):
    assert num_upsamples(size) == steps


@pytest.mark.parametrize("size", [0, 4, 48, 100, 255])
def test_sizes_that_are_no_doublings_of_four_are_refused(size):
    with pytest.raises(ValueError, match=f"not {size}"):
        num_upsamples(size)


def test_spectral_normalisation_bounds_every_convolution():
    torch.manual_seed(4)
    discriminator = OneWayDiscriminator(nf=4, image_size=16, sentence_dim=4, spectral_normalisation=True).eval()
    for _ in range(50):
        discriminator.train()(torch.randn(1, 3, 16, 16), torch.randn(1, 4))
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    largest = [torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() for m in convolutions]
    assert largest == pytest.approx([1.0] * len(largest), abs=0.05)
