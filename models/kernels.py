"""Operations that cost less than torch's own where gradients are taken, above all twice, as a gradient penalty does.

Values and derivatives are torch's (tests/test_derivatives.py); what changes is the way to them:
- the second derivative of a piecewise linear operation is zero, but torch sends a tensor of zeros on, through a whole
  convolution backward: here nothing is sent;
- torch's double backward of a convolution finds the weight's gradient by a convolution whose kernel is as large as the
  image; here the ordinary backward for weights does it;
- torch's average pooling and nearest upsampling on CPUs are several times slower than sums and copies of slices.

Compilers get torch's operations: they fuse them and never see a second derivative (models.modes.full_precision); and torch 2.11's
compiler silently computes wrong gradients of a Function whose forward ends in an operation in place, such as _Halve's mul_.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _LeakyReLU(torch.autograd.Function):
    """LeakyReLU. `set_materialize_grads(False)` keeps "no gradient" from being turned into zeros on its way back."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.slope = slope
        return F.leaky_relu(x, slope)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        return None if grad is None else _LeakyReLUGradient.apply(grad, x, ctx.slope), None


class _LeakyReLUGradient(torch.autograd.Function):
    """grad where x > 0, slope·grad elsewhere: linear in grad, and constant in x as far as autograd is told."""

    @staticmethod
    def forward(ctx, grad: Tensor, x: Tensor, slope: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.slope = slope
        return torch.ops.aten.leaky_relu_backward(grad, x, slope, False)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        return None if grad is None else _LeakyReLUGradient.apply(grad, x, ctx.slope), None, None


class _AvgPool2x(torch.autograd.Function):
    """2×2 average pooling; with _Double, each is the other's adjoint but for a factor of four."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        if not _slices_pay(x):
            return F.avg_pool2d(x, 2)
        rows = x[:, :, 0::2] + x[:, :, 1::2]
        return (rows[..., 0::2] + rows[..., 1::2]).mul_(0.25)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else _Upsample2x.apply(grad * 0.25)


class _Upsample2x(torch.autograd.Function):
    """Nearest upsampling to twice the size."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        if not _slices_pay(x):
            return F.interpolate(x, scale_factor=2, mode="nearest")
        n, channels, height, width = x.shape
        row = torch.stack((x, x), dim=-1).view(n, channels, height, 1, 2 * width)
        return row.expand(-1, -1, -1, 2, -1).reshape(n, channels, 2 * height, 2 * width)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else _AvgPool2x.apply(grad) * 4


def _slices_pay(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.is_contiguous()


class _Convolution(torch.autograd.Function):
    """A convolution (N, C, H, W), (C', C, k, k), (C',) or None -> (N, C', H', W').

    Where a gradient is taken that will be differentiated again (create_graph), it is the input's: a penalty wants no
    other, and torch does not tell a Function which ones are wanted. The weight's is NaN then, should anybody use it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, None, None, None
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            return *_gradients(ctx, grad, x, weight, (by_x, by_weight, by_bias)), None, None
        unknown = grad.new_full((), torch.nan)
        return (
            _ConvolutionInputGradient.apply(grad, x, weight, ctx.stride, ctx.padding) if by_x else None,
            unknown.expand_as(weight) if by_weight else None,
            unknown.expand(len(weight)) if by_bias else None,
            None,
            None,
        )


class _ConvolutionInputGradient(torch.autograd.Function):
    """The gradient by a convolution's input: linear in the gradient by its output and in the weight; x lends its shape."""

    @staticmethod
    def forward(ctx, grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, weight)
        ctx.stride, ctx.padding = stride, padding
        return _gradients(ctx, grad, x, weight, (True, False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, by_input: Tensor | None) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        if by_input is None:
            return None, None, None, None, None
        grad, weight = ctx.saved_tensors
        by_grad, by_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        return (
            F.conv2d(by_input, weight, None, ctx.stride, ctx.padding) if by_grad else None,
            None,
            _gradients(ctx, grad, by_input, weight, (False, by_weight, False))[1],
            None,
            None,
        )


def _gradients(
    ctx, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of a convolution by input, weight and bias that are wanted; None for the others."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], ctx.stride, ctx.padding, [1, 1], False, [0, 0], 1, list(wanted)
    )


def leaky_relu(x: Tensor, slope: float = 0.2) -> Tensor:
    """LeakyReLU for networks under a gradient penalty; same values and gradients as `F.leaky_relu`."""
    return F.leaky_relu(x, slope) if torch.compiler.is_compiling() else _LeakyReLU.apply(x, slope)


def avg_pool_2x(x: Tensor) -> Tensor:
    """2×2 average pooling: (N, C, H, W) -> (N, C, H/2, W/2); may be differentiated any number of times.

    Raises ValueError for an odd size.
    """
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"only even sizes can be halved, not {x.shape[2]}×{x.shape[3]}")
    return F.avg_pool2d(x, 2) if torch.compiler.is_compiling() else _AvgPool2x.apply(x)


def upsample_2x(x: Tensor) -> Tensor:
    """Nearest upsampling: (N, C, H, W) -> (N, C, 2H, 2W); may be differentiated any number of times."""
    if torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return _Upsample2x.apply(x)


class LeakyReLU(nn.Module):
    """`leaky_relu` as a layer."""

    def __init__(self, slope: float = 0.2):
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(x, self.slope)


class Upsample2x(nn.Module):
    """`double` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample_2x(x)


class Conv2d(nn.Conv2d):
    """A convolution for networks under a gradient penalty.

    A gradient that is itself differentiated (create_graph=True) is right by the inputs alone; the weights' is NaN.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True
    ):
        super().__init__(channels_in, channels_out, kernel, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # Compilers and autocast have their own convolution; penalties run under neither (modes.full_precision).
        # Anomaly detection would stumble over the NaN.
        autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        if autocast or torch.compiler.is_compiling() or torch.is_anomaly_enabled():
            return super().forward(x)
        return _Convolution.apply(x, self.weight, self.bias, list(self.stride), list(self.padding))


def conv_after_upsample_2x(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """convolution(double(x)) of a 3×3 convolution that keeps the size: (N, C, H, W) -> (N, C', 2H, 2W).

    The 9 weights meet 4 pixels of x; those that meet the same one are added up first. What is left is a transposed 4×4
    convolution: 16 products for 36.
    """
    if min(x.shape[2:]) < 8:  # too small to pay
        return convolution(upsample_2x(x))
    flipped = convolution.weight.flip(2, 3).transpose(0, 1)
    columns = F.pad(flipped, (0, 1)) + F.pad(flipped, (1, 0))
    weight = F.pad(columns, (0, 0, 0, 1)) + F.pad(columns, (0, 0, 1, 0))  # (C, C', 4, 4)
    return F.conv_transpose2d(x, weight, convolution.bias, stride=2, padding=1)
