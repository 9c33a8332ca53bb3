"""Operations under a gradient penalty equal torch's own in value, gradient and second gradient, and do less."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.kernels import Conv2d, avg_pool_2x, leaky_relu, upsample_2x

PIECEWISE_LINEAR = {
    "leaky_relu": (leaky_relu, lambda x: F.leaky_relu(x, 0.2)),
    "halve": (avg_pool_2x, lambda x: F.avg_pool2d(x, 2)),
    "double": (upsample_2x, lambda x: F.interpolate(x, scale_factor=2, mode="nearest")),
}
# channels in, channels out, kernel, stride, padding, bias: what a discriminator has
CONVOLUTIONS = [
    (3, 4, 3, 1, 1, True),
    (4, 5, 4, 2, 1, False),
    (4, 5, 1, 1, 0, True),
    (6, 1, 4, 1, 0, False),
    (2, 3, 3, 2, 0, True),
]


def test_a_compiler_gets_torchs_own_operations():
    """torch 2.11's took wrong gradients of ours."""
    seen = []

    def record(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(lambda x: avg_pool_2x(upsample_2x(leaky_relu(x))), backend=record)(torch.randn(1, 2, 4, 4))
    assert [getattr(function, "__name__", "") for function in seen] == ["leaky_relu", "interpolate", "avg_pool2d"]


def second_gradients(function, x, weight):
    """Value, gradient of a function of x, and the gradient of that gradient's size by a weight before it."""
    value = function(x * weight).square().sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    return value, gradient, second


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_same_values_and_derivatives_as_torch(name, layout):
    torch.manual_seed(0)
    x, weight = (torch.randn(2, 3, 4, 6, dtype=torch.float64).to(memory_format=layout) for _ in range(2))
    x.requires_grad_(), weight.requires_grad_()
    ours, torchs = PIECEWISE_LINEAR[name]
    for a, b in zip(second_gradients(ours, x, weight), second_gradients(torchs, x, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_gradients_by_finite_differences(name):
    torch.manual_seed(1)
    function = PIECEWISE_LINEAR[name][0]
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_only_even_sizes_can_be_halved():
    with pytest.raises(ValueError, match="not 3×4"):
        avg_pool_2x(torch.zeros(1, 1, 3, 4))


def convolutions(settings):
    """One of ours and torch's with the same weights, and an input of a size that both take."""
    channels_in, channels_out, kernel, stride, padding, bias = settings
    torch.manual_seed(2)
    ours = Conv2d(channels_in, channels_out, kernel, stride, padding, bias=bias).double()
    torchs = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=bias).double()
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs, torch.randn(2, channels_in, 8, 8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_convolution_and_its_gradients(settings):
    ours, torchs, x = convolutions(settings)
    values = [convolution(x) for convolution in (ours, torchs)]
    torch.testing.assert_close(*values)
    gradients = [
        torch.autograd.grad(value.square().sum(), [x, *convolution.parameters()])
        for value, convolution in zip(values, (ours, torchs), strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_convolution_differentiated_twice(settings):
    """By the weight and by what lies before the convolution, as in a penalty on the gradient by the images."""
    ours, torchs, x = convolutions(settings)
    second = []
    for convolution in (ours, torchs):
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        value = leaky_relu(convolution(x * scale))
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        second.append(torch.autograd.grad(gradient.pow(4).sum(), [convolution.weight, scale]))
    for a, b in zip(*second, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_a_frozen_convolution_takes_no_gradient():
    ours, torchs, x = convolutions(CONVOLUTIONS[0])
    ours.requires_grad_(False)
    ours(x).square().sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is None
    torch.testing.assert_close(x.grad, torch.autograd.grad(torchs(x).square().sum(), x)[0])


def test_a_weights_gradient_that_cannot_be_differentiated_again_is_not_mistaken_for_one():
    ours, _, x = convolutions(CONVOLUTIONS[0])
    gradients = torch.autograd.grad(ours(x).square().sum(), [x, ours.weight, ours.bias], create_graph=True)
    assert gradients[0].isfinite().all()
    assert gradients[1].isnan().all() and gradients[1].shape == ours.weight.shape
    assert gradients[2].isnan().all() and gradients[2].shape == ours.bias.shape


def test_anomaly_detection_finds_no_anomaly():
    ours, _, x = convolutions(CONVOLUTIONS[0])
    with torch.autograd.detect_anomaly(check_nan=True):
        (gradient,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert ours.weight.grad.isfinite().all()


def test_autocast_has_its_own_way_with_a_convolution():
    ours, torchs, x = convolutions(CONVOLUTIONS[0])
    ours, torchs, x = ours.float(), torchs.float(), x.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = [convolution(x) for convolution in (ours, torchs)]
    assert values[0].dtype == torch.bfloat16
    gradients = [torch.autograd.grad(value.float().sum(), x)[0] for value in values]
    assert torch.equal(*values) and torch.equal(*gradients)
