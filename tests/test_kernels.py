"""Every kernel equals its plain form in value, gradient and second gradient, in both memory layouts; and does less."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miscc.losses import matching_aware_gradient_penalty
from models import kernels
from models.kernels import Conv2d, avg_pool_2x, conv_after_upsample_2x, leaky_relu, masked_affine, upsample_2x

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
PIECEWISE_LINEAR = ("leaky_relu", "avg_pool_2x", "upsample_2x")
# channels in, channels out, kernel, stride, padding, bias: what a discriminator has
CONVOLUTIONS = [
    (3, 4, 3, 1, 1, True),
    (4, 5, 4, 2, 1, False),
    (4, 5, 1, 1, 0, True),
    (6, 1, 4, 1, 0, False),
    (2, 3, 3, 2, 0, True),
]


def pair(name):
    """(kernel, plain form)."""
    return getattr(kernels, name), getattr(kernels, f"{name}_plain")


def float64(*shape, layout=torch.contiguous_format):
    x = torch.randn(*shape, dtype=torch.float64)
    return (x.to(memory_format=layout) if len(shape) == 4 else x).requires_grad_()


def assert_all_close(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiler_gets_the_plain_forms():
    """torch 2.11's compiler computed wrong gradients of ours."""
    seen = []

    def record(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(lambda x: avg_pool_2x(upsample_2x(leaky_relu(x))), backend=record)(torch.randn(1, 2, 4, 4))
    assert [getattr(function, "__name__", "") for function in seen] == ["leaky_relu", "interpolate", "avg_pool2d"]


# -- piecewise linear operations -----------------------------------------------------------------------------------------


def second_gradients(function, x, weight):
    """Value, gradient of a function of x, and the gradient of that gradient's size by a weight before it."""
    value = function(x * weight).square().sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    return value, gradient, second


@LAYOUTS
@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_a_piecewise_linear_kernel_equals_its_plain_form(name, layout):
    torch.manual_seed(0)
    inputs = [float64(2, 3, 4, 6, layout=layout) for _ in range(2)]
    assert_all_close(*(second_gradients(function, *inputs) for function in pair(name)))


@LAYOUTS
@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_a_piecewise_linear_kernel_by_finite_differences(name, layout):
    torch.manual_seed(1)
    x = float64(1, 2, 4, 4, layout=layout)
    assert torch.autograd.gradcheck(pair(name)[0], (x,))
    assert torch.autograd.gradgradcheck(pair(name)[0], (x,))


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_a_piecewise_linear_kernel_differentiated_three_times(name):
    """The gradient of the second gradient: backward functions have backward functions, and those too."""
    torch.manual_seed(1)
    x, weight = float64(1, 2, 4, 4), float64(1, 2, 4, 4)
    found = []
    for function in pair(name):
        (first,) = torch.autograd.grad(function(x * weight).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), weight, create_graph=True)
        found.append([first, second, *torch.autograd.grad(second.square().sum(), [x, weight])])
    assert_all_close(*found)


def test_a_leaky_relu_of_another_slope_by_finite_differences():
    torch.manual_seed(1)
    x = float64(3, 4)
    assert leaky_relu(torch.tensor([-2.0, 0.0, 3.0]), 0.25).tolist() == [-0.5, 0.0, 3.0]
    assert torch.autograd.gradcheck(lambda x: leaky_relu(x, 0.25), (x,))
    assert torch.autograd.gradgradcheck(lambda x: leaky_relu(x, 0.25), (x,))
    assert kernels.LeakyReLU(0.25)(torch.tensor([-2.0])).item() == -0.5


def test_the_second_gradient_of_a_leaky_relu_is_none_rather_than_zeros():
    x = torch.randn(3, requires_grad=True)
    scale = torch.ones(3, requires_grad=True)
    second = []
    for function in pair("leaky_relu"):
        (gradient,) = torch.autograd.grad((function(x) * scale).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(gradient.sum(), x, allow_unused=True)[0])
    assert second[0] is None and second[1].tolist() == [0, 0, 0]


def test_only_even_sizes_can_be_halved():
    with pytest.raises(ValueError, match="not 3×4"):
        avg_pool_2x(torch.zeros(1, 1, 3, 4))


# -- convolutions --------------------------------------------------------------------------------------------------------


def convolutions(settings, layout=torch.contiguous_format):
    """One of ours and torch's with the same weights, and an input of a size that both take."""
    channels_in, channels_out, kernel, stride, padding, bias = settings
    torch.manual_seed(2)
    ours = Conv2d(channels_in, channels_out, kernel, stride, padding, bias=bias).double()
    torchs = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=bias).double()
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs, float64(2, channels_in, 8, 8, layout=layout)


@LAYOUTS
@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_convolution_and_its_gradients(settings, layout):
    ours, torchs, x = convolutions(settings, layout)
    values = [convolution(x) for convolution in (ours, torchs)]
    torch.testing.assert_close(*values)
    gradients = [
        torch.autograd.grad(value.square().sum(), [x, *convolution.parameters()])
        for value, convolution in zip(values, (ours, torchs), strict=True)
    ]
    assert_all_close(*gradients)


@LAYOUTS
@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_convolution_differentiated_twice(settings, layout):
    """By the weight and by what lies before the convolution, as in a penalty on the gradient by the images."""
    ours, torchs, x = convolutions(settings, layout)
    second = []
    for convolution in (ours, torchs):
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        value = leaky_relu(convolution(x * scale))
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        second.append(torch.autograd.grad(gradient.pow(4).sum(), [convolution.weight, scale]))
    assert all(value.abs().max() > 0 for value in second[0])
    assert_all_close(*second)


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_convolution_by_finite_differences(settings):
    ours, _, x = convolutions(settings)
    parameters = dict(ours.named_parameters())
    x = x.detach()[:1, :, :5, :5].requires_grad_()

    def function(x, *values):
        return torch.func.functional_call(ours, dict(zip(parameters, values, strict=True)), (x,))

    inputs = (x, *(parameter.detach().requires_grad_() for parameter in parameters.values()))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_penalty_on_the_weights_gradients_has_the_right_values(settings):
    """Gradients by weight and bias under create_graph, differentiated by all there is."""
    ours, torchs, x = convolutions(settings)
    found = []
    for convolution in (ours, torchs):
        parameters = list(convolution.parameters())
        first = torch.autograd.grad(convolution(x).pow(3).sum(), parameters, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found.append([*first, *torch.autograd.grad(penalty, [x, *parameters])])
    assert_all_close(*found)


def test_a_gradient_by_the_input_alone_computes_none_by_the_weight(monkeypatch):
    """As the penalty takes it: one backward pass of the convolution, and one convolution of the second derivative."""
    ours, _, x = convolutions(CONVOLUTIONS[0])
    requests, original = [], kernels._convolution_backward

    def record(ctx, grad, x, weight, requested):
        requests.append(requested)
        return original(ctx, grad, x, weight, requested)

    monkeypatch.setattr(kernels, "_convolution_backward", record)
    (gradient,) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    assert requests == [(True, False, False)]
    gradient.square().sum().backward()
    assert requests[1:] == [(False, True, False)]


def test_a_frozen_convolution_takes_no_gradient():
    ours, torchs, x = convolutions(CONVOLUTIONS[0])
    ours.requires_grad_(False)
    ours(x).square().sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is None
    torch.testing.assert_close(x.grad, torch.autograd.grad(torchs(x).square().sum(), x)[0])


def test_a_convolution_of_images_that_take_no_gradient():
    ours, torchs, x = convolutions(CONVOLUTIONS[0])
    for convolution in (ours, torchs):
        convolution(x.detach()).square().sum().backward()
    assert_all_close(*([p.grad for p in convolution.parameters()] for convolution in (ours, torchs)))


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


@LAYOUTS
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (8, 10)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_after_upsampling_equals_its_plain_form(size, bias, layout):
    torch.manual_seed(4)
    convolution = nn.Conv2d(3, 5, 3, padding=1, bias=bias).double()
    x = float64(2, 3, *size, layout=layout)
    found = []
    for function in pair("conv_after_upsample_2x"):
        value = function(convolution, x)
        inputs = [x, *convolution.parameters()]
        first = torch.autograd.grad(value.pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)
        found.append([value, *first, *second])
    assert_all_close(*found)


def test_a_convolution_after_upsampling_by_finite_differences():
    torch.manual_seed(4)
    convolution = nn.Conv2d(1, 2, 3, padding=1).double()

    def function(x, weight, bias):
        return torch.func.functional_call(_Fused(convolution), {"layer.weight": weight, "layer.bias": bias}, (x,))

    inputs = (float64(1, 1, 8, 8), float64(2, 1, 3, 3), float64(2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


class _Fused(nn.Module):
    """conv_after_upsample_2x as a module, whose parameters can be replaced."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return conv_after_upsample_2x(self.layer, x)


# -- the masked affine layer ---------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("size", [(4, 8), (2, 4)], ids=["same size", "upsampled"])
def test_the_masked_affine_equals_its_plain_form_and_its_finite_differences(size, layout):
    torch.manual_seed(3)
    inputs = [float64(2, 3, *size, layout=layout), float64(2, 3), float64(2, 3), float64(2, 1, 4, 8)]
    found = []
    for function in pair("masked_affine"):
        value = function(*inputs)
        found.append([value, *torch.autograd.grad(value.pow(3).sum(), inputs)])
    assert_all_close(*found)
    assert found[0][0].is_contiguous(memory_format=layout)
    assert torch.autograd.gradcheck(masked_affine, inputs)


def test_the_masked_affine_says_that_it_cannot_be_differentiated_twice():
    inputs = [float64(1, 2, 2, 2), float64(1, 2), float64(1, 2), float64(1, 1, 4, 4)]
    (gradient,) = torch.autograd.grad(masked_affine(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_before_upsampling_equals_its_plain_form(training):
    """Two passes, so that the running statistics of the first count in the second."""
    torch.manual_seed(5)
    x, found = float64(2, 3, 4, 4), []
    norm = nn.BatchNorm2d(3, affine=False).double().train(training)
    ours, plain = pair("batch_norm_before_upsample_2x")
    for function, own in ((lambda n, x: upsample_2x(ours(n, x)), copy.deepcopy(norm)), (plain, copy.deepcopy(norm))):
        for factor in (1.0, 3.0):
            value = function(own, factor * x + factor)
        (gradient,) = torch.autograd.grad(value.pow(3).sum(), x)
        found.append([value, gradient, own.running_mean, own.running_var])
    assert_all_close(*found)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_before_upsampling_by_finite_differences(training):
    torch.manual_seed(5)
    norm = nn.BatchNorm2d(2, affine=False).double().train(training)
    assert torch.autograd.gradcheck(
        lambda x: upsample_2x(kernels.batch_norm_before_upsample_2x(norm, x)), (float64(2, 2, 2, 2),)
    )


# -- together ------------------------------------------------------------------------------------------------------------


@LAYOUTS
def test_a_penalty_through_kernels_equals_one_through_plain_forms(layout):
    """MA-GP of a small discriminator: value and gradients of all weights."""
    torch.manual_seed(6)
    convolution, head = Conv2d(3, 4, 4, 2, 1).double(), Conv2d(4, 1, 2, bias=False).double()
    images, sentence = float64(2, 3, 8, 8, layout=layout), float64(2, 5)
    parameters = [convolution.weight, head.weight]

    def penalty(convolve, activate, pool):
        x = pool(activate(convolve(images, convolution)))
        logits = convolve(x, head).flatten() * sentence.square().sum(dim=1)
        value = matching_aware_gradient_penalty(logits, images, sentence)
        return [value, *torch.autograd.grad(value, parameters)]

    def stock(x, layer):
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)

    ours = penalty(lambda x, layer: layer(x), leaky_relu, avg_pool_2x)
    assert_all_close(ours, penalty(stock, kernels.leaky_relu_plain, kernels.avg_pool_2x_plain))


def test_a_penalty_through_kernels_by_finite_differences():
    """By the weights of all layers, the second derivative that a step of D takes."""
    torch.manual_seed(6)
    images, sentence = float64(1, 2, 4, 4), float64(1, 2)
    layers = nn.Sequential(Conv2d(2, 2, 3, 1, 1), kernels.LeakyReLU(), Conv2d(2, 1, 2, bias=False)).double()
    weights = dict(layers.named_parameters())

    def penalty(*values):
        x = avg_pool_2x(
            torch.func.functional_call(layers[:2], dict(zip(list(weights)[:2], values, strict=False)), images)
        )
        x = torch.func.functional_call(layers[2], {"weight": values[2]}, x)
        return matching_aware_gradient_penalty(x.flatten() * sentence.sum(), images, sentence)

    assert torch.autograd.gradcheck(penalty, tuple(value.detach().requires_grad_() for value in weights.values()))
