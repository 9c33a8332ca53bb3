"""Classifiers of a data set's own classes, behind `IS[cub]`: the networks, their file, and their input.

eval/train_classifier.py trains them. StackGAN's fine-tuned Inception, which the papers' scores on CUB are by, can no longer
be downloaded; so a score says which classifier it is by, and compares with others by the same one.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import inception_v3

from eval.features.networks import RESIZE, TRUNK, FeatureNetwork
from miscc.checkpoint import hash_tensors, load_file
from miscc.errors import CheckpointError
from models.registry import from_state
from models.types import Network

SCORED_AS = {"birds": "cub"}  # data sets that the papers call by another name
NORMALISATION = (127.5, 127.5)  # (x - mean) / scale: [-1, 1]
MADE_BY = "python eval/train_classifier.py --cfg cfg/bird.yml"


class ImageClassifier(Network):
    """What every classifier has: (N, 3, S, S) in [-1, 1] -> logits (N, num_classes).

    trunk, head: features, and the classes by them.
    resize: the filter that images are brought to `input_size` with, a name in RESIZE.
    """

    trunk: nn.Sequential
    head: nn.Linear
    resize: str
    input_size: int

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images.contiguous(memory_format=torch.channels_last)))


class InceptionClassifier(ImageClassifier):
    """torchvision's Inception-v3 with a new last layer: (N, 3, 299, 299) in [-1, 1] -> logits (N, num_classes)."""

    resize = "bilinear"

    def __init__(self, num_classes: int):
        super().__init__()
        self.arguments = {"num_classes": num_classes}
        self.input_size = 299
        whole = inception_v3(weights=None, transform_input=False, aux_logits=False, init_weights=False)
        self.trunk = nn.Sequential(*(getattr(whole, name) for name in TRUNK), nn.Flatten())
        self.head = nn.Linear(2048, num_classes)

    def load_imagenet(self, state: dict[str, Tensor], path: str | Path) -> None:
        """Put torchvision's ImageNet weights into the trunk. Raises CheckpointError where they are something else."""
        # Our tensors by torchvision's names.
        own_state = self.trunk.state_dict()
        named = {name: f"{TRUNK[int(name.split('.')[0])]}.{name.split('.', 1)[1]}" for name in own_state}
        missing = [n for own, n in named.items() if n not in state or state[n].shape != own_state[own].shape]
        if missing:
            raise CheckpointError(
                f"{path}: is not torchvision's inception_v3, {len(missing)} tensors missing ({missing[0]})"
            )
        self.trunk.load_state_dict({own: state[name] for own, name in named.items()})


class SmallClassifier(ImageClassifier):
    """A light network from scratch, for small images and CPUs; ours: (N, 3, S, S) in [-1, 1] -> logits (N, num_classes).

    image_size: S, from 16 on; every layer halves it down to 4 pixels or fewer.
    """

    resize = "clean"

    def __init__(self, num_classes: int, image_size: int = 64, width: int = 24):
        super().__init__()
        self.arguments = {"num_classes": num_classes, "image_size": image_size, "width": width}
        self.input_size = image_size

        # Half the size and up to twice the channels with each layer.
        layers, channels, size = [], 3, image_size
        while size > 4:
            wider = width if channels == 3 else min(2 * channels, 8 * width)
            convolution = nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(wider), nn.ReLU()]
            channels, size = wider, (size + 1) // 2

        # Pooled features, and the classes by them.
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)


CLASSIFIERS: dict[str, type[Network]] = {"inception": InceptionClassifier, "small": SmallClassifier}


def classifier_input(images: Tensor, network: ImageClassifier) -> Tensor:
    """(N, 3, H, W) in [-1, 1] -> what the classifier takes, through the filter that scoring uses, so that
    training images look like scored ones."""
    mean, scale = NORMALISATION
    return (RESIZE[network.resize](images * scale + mean, network.input_size) - mean) / scale


class ClassifierNetwork(FeatureNetwork):
    """A trained classifier as a feature network; its score is `IS[<data set>]`, whose protocol says whose it was."""

    def __init__(self, network: ImageClassifier, content: dict[str, Any]) -> None:
        data_set = content["dataset"]
        weights_hash = hash_tensors(network.state_dict())
        parts = (network.trunk, network.head, weights_hash, network.resize, network.input_size, NORMALISATION)
        super().__init__(f"classifier-{data_set}", *parts, published=False)
        self.label = SCORED_AS.get(data_set, data_set)
        self.about = {
            "statement": content["statement"],
            "accuracy": content["measured"]["accuracy"],
            "num_held_out": content["measured"]["num_held_out"],
            "num_classes": len(content["classes"]),
            "data": content["data"],
            "settings": content["settings"],
        }

    def protocol(self) -> dict:
        """As every network's, with the statement in the classifier's file."""
        return super().protocol() | {"classifier": self.about}


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> ClassifierNetwork:
    """The classifier that train_classifier.py saved. Raises CheckpointError for a file of another kind."""
    # A file of train_classifier.py?
    content = load_file(path)
    networks = content.get("networks") if isinstance(content, dict) else None
    if not isinstance(networks, dict) or "classifier" not in networks:
        what = f"a checkpoint with {', '.join(networks)}" if isinstance(networks, dict) else "another kind of weights"
        raise CheckpointError(f"--classifier {path}: holds no classifier, but {what}; train one with `{MADE_BY}`")

    # Of this version?
    try:
        network = cast(ImageClassifier, from_state(networks["classifier"], CLASSIFIERS).eval())
        return ClassifierNetwork(network, content).to(device)
    except (KeyError, TypeError, ValueError, RuntimeError, CheckpointError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"--classifier {path}: does not fit this version of the project ({reason}); train it again with `{MADE_BY}`"
        ) from None
