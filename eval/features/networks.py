"""The networks whose features the metrics use: which weights, which resize filter, and their fingerprints.

Scores by different networks, weights or filters do not compare (up to 10 FID apart), so every score carries the name of
its network. Nothing is downloaded: the error for a missing weight file says which file to get and where to put it.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from miscc.checkpoint import hash_tensors, load_file
from miscc.errors import CheckpointError, ConfigError, DataError
from miscc.randomness import stream
from models import backbones
from models.modes import no_tf32

TRUNK = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "avgpool"),
)
TORCH_FIDELITY_NAMES = {"maxpool1": "MaxPool_1", "maxpool2": "MaxPool_2", "avgpool": "AvgPool"}
NORMALISATION = {"tf1": (128.0, 128.0), "clean": (128.0, 128.0), "bilinear": (127.5, 127.5)}  # (x - mean) / scale
TENSORFLOW_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
EFFICIENTNET_FILES = ("efficientnet-lite0-57934424.pth", "efficientnet-lite2-9656183e.pth")  # in their packages
TORCHVISION_FILES = ("inception_v3_google-0cc3c7bd.pth", "inception_v3_google-1a9a5a14.pth")


class WeightsError(CheckpointError):
    """There is no weight file.

    text: the message without its last words, which name the option for another place.
    """

    def __init__(self, text: str, option: str = "--weights") -> None:
        super().__init__(f"{text}, or give its place with {option} PATH")
        self.text = text


class FeatureNetwork(nn.Module):
    """A trunk that gives pooled features and a linear classifier over them, frozen, in eval mode, channels_last.

    name: as on the command line; label: as on a score, `name:hash` where the weights are not the published ones.
    """

    def __init__(
        self,
        name: str,
        trunk: nn.Module,
        classifier: nn.Linear,
        weights_hash: str,
        resize: str,
        input_size: int,
        normalisation: tuple[float, float],
        published: bool,
    ) -> None:
        super().__init__()
        self.name, self.weights_hash, self.published = name, weights_hash, published
        self.label = name if published else f"{name}:{weights_hash[:8]}"
        self.resize, self.input_size, self.normalisation = resize, input_size, normalisation
        self.trunk, self.classifier = trunk, classifier
        self.num_features, self.num_classes = classifier.in_features, classifier.out_features
        self.requires_grad_(False).eval()
        _fuse_batch_norm(self.trunk)
        self.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        return self.classifier.weight.device

    def prepare(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """(H, W, 3) uint8 images of any sizes -> (N, 3, input_size, input_size) float, normalised, on the device."""
        shapes = {image.shape for image in images}
        groups = [np.stack(images)] if len(shapes) == 1 else [image[None] for image in images]

        # Each size in one call.
        resized = []
        for group in groups:
            pixels = torch.from_numpy(np.ascontiguousarray(group)).to(self.device)
            resized.append(RESIZE[self.resize](pixels.permute(0, 3, 1, 2).float().contiguous(), self.input_size))
        mean, scale = self.normalisation
        return (torch.cat(resized) - mean) / scale

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, S, S) from `prepare` -> features (N, num_features), class logits (N, num_classes)."""
        features = self.trunk(inputs.contiguous(memory_format=torch.channels_last))
        return features, self.classifier(features)

    @torch.inference_mode()
    def extract_features(self, images: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """(H, W, 3) uint8 images -> features and logits on the device, in full float32 (no TF32) also on GPUs."""
        with no_tf32():
            features, logits = self(self.prepare(images))

        if not bool(torch.isfinite(features).all()):
            raise DataError(
                f"{self.label}: a feature is not finite; the weight file is damaged or not for this network"
            )
        return features, logits

    def protocol(self) -> dict:
        """What must be the same for two numbers to be comparable."""
        mean, scale = self.normalisation
        return {
            "network": self.name,
            "weights_hash": self.weights_hash,
            "published_weights": self.published,
            "resize": self.resize,
            "input_size": self.input_size,
            "normalisation": f"(x - {mean:g}) / {scale:g}",
        }


def load_network(
    name: str = "inception-tf",
    weights: str | Path | None = None,
    resize: str | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> FeatureNetwork:
    """Build a network of `NETWORKS` by name.

    weights: a file in place of the one in torch hub's cache.
    resize: a name in `RESIZE`, None for the network's own.
    seed: of `random`, which has no meaning but to compare implementations.

    Raises ConfigError for an unknown name, CheckpointError when the weights are missing or of another network.
    """
    if name not in NETWORKS:
        raise ConfigError(f"--network {name}: unknown; choose from {', '.join(NETWORKS)}")
    if resize is not None and resize not in RESIZE:
        raise ConfigError(f"--resize {resize}: unknown; choose from {', '.join(RESIZE)}")

    with torch.random.fork_rng(devices=[]):  # a network draws initial weights; the caller's random state stays
        network = NETWORKS[name](weights, resize, seed)
    return network.to(device)


def _tensorflow_inception(weights: str | Path | None, resize: str | None, seed: int) -> FeatureNetwork:
    path = find_weights(weights, TENSORFLOW_FILES, "inception-tf", "the release `fid_weights` of pytorch-fid")
    state = _read_state(path)
    network = build_tensorflow_inception()
    _load(network, state, path, "TensorFlow's 2015 Inception as torch-fidelity and pytorch-fid keep it")
    return _inception("inception-tf", network, state, resize or "tf1", _is_published(path, TENSORFLOW_FILES))


def _random_inception(weights: str | Path | None, resize: str | None, seed: int) -> FeatureNetwork:
    state = random_inception_state(seed)
    network = build_tensorflow_inception()
    network.load_state_dict(state)
    return _inception("random", network, state, resize or "tf1", published=False)


def _torchvision_inception(weights: str | Path | None, resize: str | None, seed: int) -> FeatureNetwork:
    # torchvision's own network, without the classifier that only its training uses.
    source = "https://download.pytorch.org/models/"
    path = find_weights(weights, TORCHVISION_FILES, "inception-torchvision", source)
    state = {name: tensor for name, tensor in _read_state(path).items() if not name.startswith("AuxLogits.")}
    network = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False)
    _load(network, state, path, "torchvision's inception_v3")

    # Its layers up to the pooled features.
    trunk = nn.Sequential(*(getattr(network, name) for name in TRUNK), nn.Flatten())
    return FeatureNetwork(
        name="inception-torchvision",
        trunk=trunk,
        classifier=network.fc,
        weights_hash=hash_tensors(state),
        resize=resize or "bilinear",
        input_size=299,
        normalisation=(127.5, 127.5),  # what torchvision's own `transform_input` comes to: [-1, 1]
        published=_is_published(path, TORCHVISION_FILES),
    )


def _efficientnet_lite(name: str, input_size: int, weights: str | Path | None, resize: str | None) -> FeatureNetwork:
    path = Path(weights) if weights else backbones.efficientnet_lite_file(name)
    network, state = backbones.load_efficientnet_lite(name, path)
    return FeatureNetwork(
        name=name,
        trunk=_EfficientNetTrunk(network),
        classifier=network._fc,
        weights_hash=hash_tensors(state),
        resize=resize or "clean",
        input_size=input_size,
        normalisation=(127.0, 128.0),  # of TensorFlow's EfficientNet-lite, from which the weights were converted
        published=_is_published(path, EFFICIENTNET_FILES),
    )


def _efficientnet_lite0(weights: str | Path | None, resize: str | None, seed: int) -> FeatureNetwork:
    return _efficientnet_lite("efficientnet-lite0", 224, weights, resize)


def _efficientnet_lite2(weights: str | Path | None, resize: str | None, seed: int) -> FeatureNetwork:
    return _efficientnet_lite("efficientnet-lite2", 260, weights, resize)


class _EfficientNetTrunk(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network  # of a package without types

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network.extract_features(inputs).mean(dim=(2, 3))


NETWORKS: dict[str, Callable[[str | Path | None, str | None, int], FeatureNetwork]] = {
    "inception-tf": _tensorflow_inception,  # what papers mean by FID and IS
    "inception-torchvision": _torchvision_inception,
    "efficientnet-lite0": _efficientnet_lite0,  # its weights come with the package: works offline
    "efficientnet-lite2": _efficientnet_lite2,  # likewise; for generators whose discriminator saw through the one above
    "random": _random_inception,
}


def build_tensorflow_inception() -> nn.Module:
    """torch-fidelity's port of the TensorFlow Inception, randomly initialised."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        """The constructor would unpickle a file without limits, or download one; this class gives it no file."""

        def __init__(self) -> None:
            nothing = io.BytesIO()
            torch.save({}, nothing)
            nothing.seek(0)
            layers = ["2048", "logits_unbiased"]
            super().__init__("inception-v3-compat", layers, feature_extractor_weights_path=nothing)

        def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict, assign) if state_dict else None

    return Empty()


def random_inception_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded weights for `build_tensorflow_inception`, scaled so that activations keep their size (He et al. 2015)."""
    state = build_tensorflow_inception().state_dict()

    # In the order of their names: the draws do not depend on the network's layout.
    for index, (name, tensor) in enumerate(sorted(state.items())):
        if tensor.ndim >= 2:
            fan_in = tensor[0].numel()
            draws = stream(seed, "random inception", index).standard_normal(tensor.shape, dtype=np.float32)
            state[name] = torch.from_numpy(draws * np.float32((2 / fan_in) ** 0.5))
        elif name == "fc.bias":
            state[name] = torch.zeros_like(tensor)
    return state


def _inception(name: str, network: nn.Module, state: dict, resize: str, published: bool) -> FeatureNetwork:
    trunk = nn.Sequential(*(getattr(network, TORCH_FIDELITY_NAMES.get(n, n)) for n in TRUNK), nn.Flatten())
    last = cast(nn.Linear, network.get_submodule("fc"))
    classifier = nn.Linear(2048, last.out_features, bias=False)  # the graph of the Inception score has no bias
    classifier.weight = last.weight
    return FeatureNetwork(name, trunk, classifier, hash_tensors(state), resize, 299, NORMALISATION[resize], published)


def _fuse_batch_norm(trunk: nn.Module) -> None:
    """Fold each batch norm of an Inception into the convolution before it: the same maths, a sixth faster."""
    for module in trunk.modules():
        convolution, norm = getattr(module, "conv", None), getattr(module, "bn", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module.conv = torch.nn.utils.fusion.fuse_conv_bn_eval(convolution, norm)
            module.bn = nn.Identity()


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    state = load_file(path)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: is not a plain state dict, names to tensors")
    return state


def _load(network: nn.Module, state: dict[str, torch.Tensor], path: Path, what: str) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:160]
        raise CheckpointError(f"{path}: are not the weights of {what} ({reason})") from None


def find_weights(
    path: str | Path | None, file_names: Sequence[str], network: str, origin: str, option: str = "--weights"
) -> Path:
    """The file that the user gave, else the first of `file_names` in torch hub's cache (moved by TORCH_HOME).

    option: by which the user gives it.
    Raises WeightsError that says which file to get from where, and where to put it.
    """
    # The user's file, then torch hub's cache.
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if path:
        if Path(path).is_dir():
            raise CheckpointError(f"{option} {path}: is a folder; give the file, e.g. {file_names[0]}")
        return Path(path)
    for name in file_names:
        if (folder / name).is_file():
            return folder / name

    # Nothing is downloaded.
    raise WeightsError(
        f"{network}: its weights are not on this machine and nothing is downloaded; get {file_names[0]} from {origin} "
        f"and put it in {folder}",
        option,
    )


def _is_published(path: Path, file_names: Sequence[str]) -> bool:
    """Whether a file's content has the hash that the published file carries in its name, whatever it is called."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return any(digest.startswith(Path(name).stem.rsplit("-", 1)[1]) for name in file_names)


def resize_tf1(images: torch.Tensor, size: int) -> torch.Tensor:
    """TensorFlow 1's bilinear resize, bit for bit as torch-fidelity has it: corners at 0, no antialiasing.

    (N, C, H, W) float -> (N, C, size, size). Interpolates along x before it picks rows, which changes no value.
    """

    def positions(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        position = torch.arange(size, dtype=torch.float32, device=images.device)
        position = position * torch.tensor(length / size, dtype=torch.float32, device=images.device)
        low = position.long()
        return low, (low + 1).clamp_max(length - 1), position - low.float()

    # Along x, then along y.
    low, high, share = positions(images.shape[3])
    left, right = images[..., low], images[..., high]
    rows = left + (right - left) * share
    low, high, share = positions(images.shape[2])
    above, below = rows[:, :, low], rows[:, :, high]
    return above + (below - above) * share[:, None]


def resize_bilinear(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear between pixel centres without antialiasing, as pytorch-fid has it."""
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def resize_clean(images: torch.Tensor, size: int) -> torch.Tensor:
    """Antialiased bicubic on unrounded values, clipped to 0..255, as clean-fid (Parmar et al. 2022) has it."""
    resized = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 255)


RESIZE: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "tf1": resize_tf1,
    "bilinear": resize_bilinear,
    "clean": resize_clean,
}
