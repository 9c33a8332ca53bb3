"""Hand-written derivatives and rewritten operations, each beside its plain form, which computes the same with torch's own ones.

tests/test_kernels.py holds both equal in value, gradient and, where a gradient penalty needs it, second gradient. "Gain"
in a docstring is the time of a whole training step without the kernel over the time with it (SSA-GAN where no other is
named; one thread). Some gain less than 5 % and stay: without them the pinned float32 steps would round differently.

Compilers get the plain forms: they fuse them themselves and never see a second derivative (models.modes.full_precision).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from miscc.distributed import processes_of

# -- for networks under a gradient penalty: cheap to differentiate twice -----------------------------------------------


def leaky_relu_plain(x: Tensor, slope: float = 0.2) -> Tensor:
    """x where it is positive, slope·x elsewhere; any shape."""
    return F.leaky_relu(x, slope)


def leaky_relu(x: Tensor, slope: float = 0.2) -> Tensor:
    """LeakyReLU whose second derivative is no gradient, rather than a tensor of zeros.

    torch would send the zeros on through the backward pass of every convolution before it.
    Gain: ×1.08 at 64 px.
    """
    return leaky_relu_plain(x, slope) if torch.compiler.is_compiling() else _LeakyReLU.apply(x, slope)


class _OneOutput(torch.autograd.Function):
    """A function of one output: backward takes one gradient."""

    @staticmethod
    def backward(ctx, grad: Any) -> Any:  # pyrefly: ignore[bad-override]  # torch declares *grad_outputs
        raise NotImplementedError


class _LeakyReLU(_OneOutput):
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


class _LeakyReLUGradient(_OneOutput):
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


class LeakyReLU(nn.Module):
    """`leaky_relu` as a layer."""

    def __init__(self, slope: float = 0.2):
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(x, self.slope)


class Conv2d(nn.Conv2d):
    """A convolution (N, C, H, W) -> (N, C', H', W'); its plain form is nn.Conv2d.

    Differentiating it twice costs less. torch's double backward finds the weight's gradient by a convolution whose
    kernel is as large as the image; here the ordinary backward pass for weights does it. And a gradient by the input
    alone, which a penalty takes, does not compute the one by the weight. Twice differentiable by inputs and weights.
    Gain: ×1.03 at 64 px.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True
    ):
        super().__init__(channels_in, channels_out, kernel, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # Compilers and autocast have their own convolution; penalties run under neither (models.modes.full_precision).
        autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        if autocast or torch.compiler.is_compiling():
            return super().forward(x)

        # Two nodes of the graph for one value: autograd runs only those whose gradient is requested. The weight is read
        # once, as reading it takes a step of spectral normalisation.
        weight, stride, padding = self.weight, list(self.stride), list(self.padding)
        out = _ParameterPath.apply(weight, self.bias, (x,), stride, padding)  # (N, C', H', W')
        return _InputPath.apply(out, x, weight, stride, padding)


class _ParameterPath(_OneOutput):
    """The convolution as a function of weight and bias. x comes in a tuple, so that autograd makes no edge to it."""

    @staticmethod
    def forward(
        ctx, weight: Tensor, bias: Tensor | None, inputs: tuple[Tensor], stride: list[int], padding: list[int]
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *inputs)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(inputs[0], weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None, None
        weight, x = ctx.saved_tensors
        requested = (False, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        _, by_weight, by_bias = _convolution_backward(ctx, grad, x, weight, requested)
        return by_weight, by_bias, None, None, None


class _InputPath(_OneOutput):
    """The same convolution as a function of x: `out` (N, C', H', W') is its value, computed by _ParameterPath."""

    @staticmethod
    def forward(ctx, out: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return out

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if grad is None or not ctx.needs_input_grad[1]:
            return grad, None, None, None, None
        x, weight = ctx.saved_tensors
        return grad, _ConvolutionInputGradient.apply(grad, x, weight, ctx.stride, ctx.padding), None, None, None


class _ConvolutionInputGradient(_OneOutput):
    """The gradient by a convolution's input: linear in `grad` and in the weight; of x only the shape matters."""

    @staticmethod
    def forward(ctx, grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, weight)
        ctx.stride, ctx.padding = stride, padding
        by_input, _, _ = _convolution_backward(ctx, grad, x, weight, (True, False, False))
        assert by_input is not None  # as requested
        return by_input

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  # torch gives the wrapped function no types
    def backward(ctx, by_input: Tensor | None) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        if by_input is None:
            return None, None, None, None, None
        grad, weight = ctx.saved_tensors

        # The operation is linear: its adjoint by `grad` is the convolution itself, that by the weight takes `by_input`
        # where the first backward pass takes x.
        by_grad = F.conv2d(by_input, weight, None, ctx.stride, ctx.padding) if ctx.needs_input_grad[0] else None
        requested = (False, ctx.needs_input_grad[2], False)
        by_weight = _convolution_backward(ctx, grad, by_input, weight, requested)[1]
        return by_grad, None, by_weight, None, None


def _convolution_backward(
    ctx, grad: Tensor, x: Tensor, weight: Tensor, requested: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The requested gradients by input, weight and bias; None for the others."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], ctx.stride, ctx.padding, [1, 1], False, [0, 0], 1, list(requested)
    )


# -- pooling and upsampling ----------------------------------------------------------------------------------------------


def avg_pool_2x_plain(x: Tensor) -> Tensor:
    """2×2 average pooling: (N, C, H, W) -> (N, C, H/2, W/2)."""
    return F.avg_pool2d(x, 2)


def avg_pool_2x(x: Tensor) -> Tensor:
    """2×2 average pooling: (N, C, H, W) -> (N, C, H/2, W/2); may be differentiated any number of times.

    Its gradient is upsampling, not torch's slow backward pass; sums of slices alone gain nothing at 64 px (×1.01).
    Gain, with upsample_2x: ×1.09 at 64 px.
    Raises ValueError for an odd size.
    """
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"only even sizes can be halved, not {x.shape[2]}×{x.shape[3]}")
    return avg_pool_2x_plain(x) if torch.compiler.is_compiling() else _AvgPool2x.apply(x)


def upsample_2x_plain(x: Tensor) -> Tensor:
    """Nearest upsampling: (N, C, H, W) -> (N, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def upsample_2x(x: Tensor) -> Tensor:
    """Nearest upsampling: (N, C, H, W) -> (N, C, 2H, 2W); may be differentiated any number of times.

    On CPUs copies of slices are several times faster than torch's kernel.
    Gain, with avg_pool_2x: ×1.09 at 64 px.
    """
    return upsample_2x_plain(x) if torch.compiler.is_compiling() else _Upsample2x.apply(x)


class _AvgPool2x(_OneOutput):
    """2×2 average pooling; with _Upsample2x, each is the other's adjoint but for a factor of four."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        if not _slices_pay(x):
            return avg_pool_2x_plain(x)
        rows = x[:, :, 0::2] + x[:, :, 1::2]  # (N, C, H/2, W)
        return (rows[..., 0::2] + rows[..., 1::2]).mul_(0.25)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else _Upsample2x.apply(grad * 0.25)


class _Upsample2x(_OneOutput):
    """Nearest upsampling to twice the size."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        if not _slices_pay(x):
            return upsample_2x_plain(x)
        n, channels, height, width = x.shape
        row = torch.stack((x, x), dim=-1).view(n, channels, height, 1, 2 * width)
        return row.expand(-1, -1, -1, 2, -1).reshape(n, channels, 2 * height, 2 * width)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else _AvgPool2x.apply(grad) * 4


def _slices_pay(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.is_contiguous()


class Upsample2x(nn.Module):
    """`upsample_2x` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample_2x(x)


def conv_after_upsample_2x_plain(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Nearest upsampling, then a 3×3 convolution with padding 1: (N, C, H, W) -> (N, C', 2H, 2W)."""
    return convolution(upsample_2x(x))


def conv_after_upsample_2x(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Fuses nearest upsampling and a 3×3 convolution into a 4×4 transposed convolution: 16 products for 36.

    (N, C, H, W) -> (N, C', 2H, 2W).
    Gain: ×1.12 at 64 px (DF-GAN).
    """
    if min(x.shape[2:]) < 8:  # too small for a gain
        return conv_after_upsample_2x_plain(convolution, x)

    # The 9 weights meet only 4 pixels of x; weights that meet the same pixel are summed.
    flipped = convolution.weight.flip(2, 3).transpose(0, 1)  # (C, C', 3, 3)
    columns = F.pad(flipped, (0, 1)) + F.pad(flipped, (1, 0))
    weight = F.pad(columns, (0, 0, 0, 1)) + F.pad(columns, (0, 0, 1, 0))  # (C, C', 4, 4)
    return F.conv_transpose2d(x, weight, convolution.bias, stride=2, padding=1)


# -- SSA-GAN's masked affine layer ---------------------------------------------------------------------------------------


def masked_affine_plain(x: Tensor, gamma: Tensor, beta: Tensor, mask: Tensor) -> Tensor:
    """x + m·(γ·x + β), of x upsampled where the mask is twice as large.

    x (N, C, H, W) or (N, C, H/2, W/2); γ and β (N, C); m (N, 1, H, W) -> (N, C, H, W).
    """
    if x.shape[2:] != mask.shape[2:]:
        x = upsample_2x(x)
    return torch.addcmul(x, mask, torch.addcmul(beta[:, :, None, None], x, gamma[:, :, None, None]))


def masked_affine(x: Tensor, gamma: Tensor, beta: Tensor, mask: Tensor) -> Tensor:
    """`masked_affine_plain` with a backward pass that reads the features less often and keeps fewer tensors.

    Autograd would keep γ·x + β; here sums over pixels and channels are matrix products, and of features that are
    upsampled only those of the smaller size are kept and computed with. Differentiable once.
    Gain: ×1.06 at 64 px.
    """
    if torch.compiler.is_compiling():
        return masked_affine_plain(x, gamma, beta, mask)
    same_size = x.shape[2:] == mask.shape[2:]
    return (_MaskedAffine if same_size else _UpsampledMaskedAffine).apply(x, gamma, beta, mask)


class _MaskedAffine(_OneOutput):
    """x + m·(γ·x + β) of x (N, C, H, W), γ and β (N, C), m (N, 1, H, W)."""

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, gamma, beta, mask)
        return masked_affine_plain(x, gamma, beta, mask)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  # torch gives the wrapped function no types
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, gamma, beta, mask = ctx.saved_tensors
        column = mask.flatten(1)[:, :, None]  # (N, HW, 1)
        product = grad * x

        # Sums over pixels for γ and β, over channels for the mask.
        by_gamma = (product.flatten(2) @ column)[:, :, 0]
        by_beta = (grad.flatten(2) @ column)[:, :, 0]
        by_mask = gamma[:, None] @ product.flatten(2) + beta[:, None] @ grad.flatten(2)  # (N, 1, HW)

        scale = torch.mul(mask, gamma[:, :, None, None], out=product)
        return torch.addcmul(grad, grad, scale), by_gamma, by_beta, by_mask.view_as(mask)


class _UpsampledMaskedAffine(_OneOutput):
    """_MaskedAffine of upsampled features: x (N, C, h, w), γ and β (N, C), m (N, 1, 2h, 2w) -> (N, C, 2h, 2w)."""

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, gamma, beta, mask)
        shift = torch.addcmul(beta[:, :, None, None], x, gamma[:, :, None, None])  # (N, C, h, w)
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        out = torch.empty(*x.shape[:2], *mask.shape[2:], dtype=x.dtype, device=x.device, memory_format=layout)
        torch.addcmul(_repeat_columns(x), _pair_rows(mask), _repeat_columns(shift), out=_pair_rows(out))
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  # torch gives the wrapped function no types
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, gamma, beta, mask = ctx.saved_tensors
        gamma, beta = gamma[:, :, None, None], beta[:, :, None, None]

        # Sums over the four pixels that share a feature.
        masked = avg_pool_2x(grad * mask) * 4  # (N, C, h, w)
        by_x = torch.addcmul(avg_pool_2x(grad) * 4, masked, gamma)

        shift = _repeat_columns(torch.addcmul(beta, x, gamma))
        by_mask = (_pair_rows(grad) * shift).flatten(2).sum(dim=1)
        return by_x, (masked * x).sum(dim=(2, 3)), masked.sum(dim=(2, 3)), by_mask.view_as(mask)


def _repeat_columns(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C, h, 1, 2w): every column twice, to be broadcast over pairs of rows."""
    return torch.stack((x, x), dim=-1).flatten(3).unsqueeze(3)


def _pair_rows(x: Tensor) -> Tensor:
    """(N, C, 2h, 2w) -> (N, C, h, 2, 2w)."""
    return x.unflatten(2, (-1, 2))


def batch_norm_before_upsample_2x_plain(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """The upsampled features, normalised: (N, C, h, w) -> (N, C, 2h, 2w)."""
    return norm(upsample_2x(x))


def batch_norm_before_upsample_2x(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Normalises (N, C, h, w) so that upsampling gives batch_norm_before_upsample_2x_plain, running statistics included.

    Repeated pixels change neither mean nor variance, only the factor n / (n - 1) of the running variance.
    Gain, with masked_affine of upsampled features: none measured at 64 px (×0.99).
    """
    if not norm.training:
        return norm(x)
    assert norm.running_var is not None and norm.momentum is not None  # every batch norm here tracks statistics
    kept = norm.running_var * (1 - norm.momentum)
    normalised = norm(x)

    # By .data: autograd watches the statistics, though batch norm's backward pass in training does not read them.
    count = x.numel() // x.shape[1] * processes_of(norm)
    variance = norm.running_var.data
    variance.copy_(kept + (variance - kept) * ((count - 1) / (count - 1 / 4)))
    return normalised
