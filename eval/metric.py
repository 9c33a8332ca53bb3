"""What a metric is: the batch that it reads, the statement of what it needs, and the scores that it gives.

The metrics themselves stand in a file each, such as FID.py; `eval/__init__.py` lists them. Their scripts, the protocols, the
evaluation during training and the benchmark use the same classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from eval.features.networks import FeatureNetwork
from eval.features.reference import Reference
from eval.protocol.protocols import Protocol
from miscc.vocabulary import Vocabulary
from sampling.encoders import Encoders
from sampling.requests import Request

if TYPE_CHECKING:
    from typing_extensions import Self

NOTHING = torch.empty(0, 0)  # features and logits where no metric needs any
COUNTS = {  # fields of a score's protocol that stand beside the value
    "num_real": "real",
    "num_fake": "generated",
    "num_images": "images",
    "num_pairs": "pairs",
    "num_captions": "captions",
    "splits": "splits",
    "subset_size": "a subset",
    "folds": "folds",
}


@dataclass(frozen=True)
class Score:
    """One value with everything that is needed to compute it again.

    name: with the network that it is by, such as "FID[inception-tf]";
    std: over splits, folds, subsets or images, as the protocol says;
    interval: 95 %;
    flattering: the role in which the score's network took part in the training of what is scored; "": none that is known.
    """

    name: str
    value: float
    protocol: dict
    std: float | None = None
    interval: tuple[float, float] | None = None
    details: dict = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    flattering: str = ""

    def line(self) -> str:
        """`IS[imagenet] 4.361 ± 0.032  [30000 images, 10 splits, resize tf1]`"""
        # Value, then spread or interval where there is one.
        text = f"{self.name} {self.value:.6g}"
        if self.std is not None:
            text += f" ± {self.std:.3g}"
        if self.interval is not None:
            text += f" (95 %: {self.interval[0]:.6g} to {self.interval[1]:.6g})"

        # Counts and filter in brackets.
        said = [f"{self.protocol[key]} {word}" for key, word in COUNTS.items() if self.protocol.get(key) is not None]
        if "resize" in self.protocol:
            said.append(f"resize {self.protocol['resize']}")
        if self.flattering:
            said.append(f"flattering: by a network of the training ({self.flattering})")
        return f"{text}  [{', '.join(said)}]" if said else text

    def record(self) -> dict:
        """The score as JSON can hold it."""
        return {
            "name": self.name,
            "value": self.value,
            "std": self.std,
            "interval": list(self.interval) if self.interval else None,
            "details": self.details,
            "protocol": self.protocol,
            "warnings": list(self.warnings),
            "flattering": self.flattering or None,
        }

    def of(self, origin: Mapping[str, Any], warnings: Sequence[str] = ()) -> "Score":
        """The score with a description of its images."""
        return replace(self, protocol={**self.protocol, **origin}, warnings=(*self.warnings, *warnings))

    def after_training(self, trained_with: Sequence[Mapping[str, str]] | None) -> "Score":
        """The score with the networks of its images' generator's training, and with a warning where one of them flatters it.

        trained_with: see sampling/trained_with.py, None where it is not known.
        """
        if trained_with is None:
            return self

        # The first network of the training that is the score's own.
        role = next((entry["role"] for entry in trained_with if self._is_by(entry)), "")
        said = {"trained_with": [f"{entry['network']} ({entry['role']})" for entry in trained_with]}
        warnings = (f"{self.name} flatters this generator: that network took part in its training ({role})",)
        is_said = any("flatters" in warning for warning in self.warnings)
        return replace(self.of(said, warnings if role and not is_said else ()), flattering=role)

    def _is_by(self, entry: Mapping[str, str]) -> bool:
        """Whether the score's network is this one of a training."""
        about = self.protocol
        if about.get("family", about.get("network")) != entry["network"]:
            return False

        # The same name: compare files, then hashes. Unknown weights count as the same.
        file = str(about.get("file") or "")
        same_file = bool(file and entry["file"]) and Path(file).resolve() == Path(entry["file"]).resolve()
        weights_hash = about.get("weights_hash", about.get("encoder_hash"))
        is_start = bool(weights_hash) and entry.get("starting_hash") == weights_hash
        return same_file or is_start or entry["weights_hash"] in ("", weights_hash)


@dataclass(frozen=True)
class ScoringBatch:
    """N generated images, with what the metrics need beside them.

    images: N of (H, W, 3) uint8;
    indices: N, of each image among all that are scored; in a single process the batches come in this order;
    requests: N, caption and key of each image;
    masks: the generator's, of each stage (N, h, w) float32 in [0, 1], coarse to fine;
    features, logits: (N, D) and (N, K) of the feature network, NOTHING without one;
    real_images: N of (H, W, 3) uint8, the real image of each request's key.
    """

    images: Sequence[np.ndarray] = ()
    indices: Sequence[int] = ()
    requests: Sequence[Request] = ()
    masks: Sequence[np.ndarray] = ()
    features: Tensor = NOTHING
    logits: Tensor = NOTHING
    real_images: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Needs:
    """What a metric must be given, beside generated images.

    features: features and logits of the feature network;
    real: "statistics" or single "features" of the real images by that network;
    encoders: DAMSM's;
    masks: the generator's;
    repeats: several images of each caption, drawn apart from the others;
    real_images: the real image of each generated one's key;
    captions: the caption of each image, so that its script reads folders of samples alone;
    data_set: images of this data set alone.
    """

    features: bool = False
    real: str = ""
    encoders: bool = False
    masks: bool = False
    repeats: bool = False
    real_images: bool = False
    captions: bool = False
    data_set: str = ""


@dataclass(frozen=True)
class Tools:
    """What a protocol does not name because it changes no score, or because only the user can say where it is.

    encoders: of R-precision;
    no_encoders: why those of the training cannot be loaded, "" where that was not tried or there are some;
    weights, lpips_weights: files in place of those in torch hub's cache;
    clip: folder of a CLIP, or its name in Hugging Face's cache, None: the usual one;
    lists: file of R-precision's candidate lists, for a folder of samples; None: in that folder, by seed;
    cache: folder of kept features and classifiers, None: keep no features;
    progress: whether to show any.
    """

    encoders: Encoders | None = None
    weights: str | Path | None = None
    lpips_weights: str | Path | None = None
    clip: str | None = None
    cache: str | Path | None = None
    batch_size: int = 32
    progress: bool = True
    lists: str | Path | None = None
    no_encoders: str = ""


@dataclass(frozen=True)
class Run:
    """The run of a protocol or a script, from which a metric takes what it needs.

    requests: of all images that are scored, or of those drawn apart for a metric that needs repeats;
    text_encoder_hash: of the generator, None for real images;
    vocabulary: None for a folder of images;
    network, reference: None where no metric needs them; reference only in the main process;
    folder, files: the folder of samples that a script scores, and its images, in the order of the requests.
    """

    protocol: Protocol
    tools: Tools
    device: torch.device
    requests: Sequence[Request]
    image_size: int
    vocabulary: Vocabulary | None
    text_encoder_hash: str | None = None
    network: FeatureNetwork | None = None
    reference: Reference | None = None
    folder: Path | None = None
    files: Sequence[str] = ()

    @property
    def feature_network(self) -> FeatureNetwork:
        """The network of a metric that needs features."""
        assert self.network is not None
        return self.network


class Metric(ABC):
    """Reads images batch by batch and computes scores of them all.

    needs: what the batches and the constructor must be given;
    accumulated: the attributes that `update` fills; nothing else travels between processes. `merge` joins lists; a metric
    that accumulates something else has a `merge` of its own.
    """

    needs: ClassVar[Needs] = Needs()
    accumulated: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not isinstance(cls.accumulated, tuple) or not cls.accumulated:
            # Several processes would score the images of the first alone.
            raise TypeError(f"{cls.__name__}: name in the tuple `accumulated` what its update fills")

    @classmethod
    def from_run(cls, run: Run) -> "Metric":
        """The metric as a protocol asks for it. Raises UserError or ImportError where it cannot be computed."""
        return cls()

    @abstractmethod
    def update(self, batch: ScoringBatch) -> None:
        """Read the next images of this process."""

    def merge(self, other: "Self") -> None:
        """Add what the same metric has accumulated in another process."""
        for name in self.accumulated:
            getattr(self, name).extend(getattr(other, name))

    @abstractmethod
    def compute(self) -> list[Score]:
        """The scores of all images. Raises UserError where there are none."""

    def __getstate__(self) -> dict[str, Any]:
        # What other processes need: nothing but what `update` fills.
        return {name: getattr(self, name) for name in self.accumulated}


def distance_name(prefix: str, network: FeatureNetwork) -> str:
    """`FID[inception-tf]`, but `FD[efficientnet-lite0]`: only an Inception with its published weights gives an FID."""
    inception = network.name.startswith("inception") and network.published
    return f"{prefix if inception else prefix.replace('I', '')}[{network.label}]"


def score_name(network: FeatureNetwork) -> str:
    """`IS[imagenet]` for the network of the original score, else `IS[<network>]`."""
    return f"IS[{'imagenet' if network.label == 'inception-tf' else network.label}]"
