"""What the server draws with: a model in PyTorch, or an exported one without torch being imported, behind one interface."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from miscc.command_line import named_device
from miscc.errors import UserError
from miscc.vocabulary import Vocabulary


class Drawn(NamedTuple):
    """A batch as it comes out of a model.

    images: of every stage (N, h, w, 3) uint8, coarse to fine
    masks: of every stage (N, h, w) float32 in [0, 1], empty where the system predicts none
    attention: of every stage that attends (N, T, h, w) float32, empty where there is none
    """

    images: list[np.ndarray]
    masks: list[np.ndarray]
    attention: list[np.ndarray]

    def row(self, index: int) -> "Drawn":
        """One image of the batch, with arrays of its own: a view would keep the whole batch in memory."""
        return Drawn(*([values[index].copy() for values in part] for part in self))


@dataclass
class Model:
    """What is known of a model without drawing: sizes, words, what it gives besides images. Subclasses draw."""

    name: str
    system: str
    image_size: int
    noise_dim: int
    max_words: int
    vocabulary: Vocabulary
    mask_sizes: list[int]  # pixels of each stage's masks; [] without masks
    attends: bool
    truncation: float | None = None  # that its settings draw with
    examples: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)  # step, epoch and data, for people

    mixes_captions = False  # whether `walk` can go from one caption to another

    def draw(self, tokens: np.ndarray, lengths: np.ndarray, noise: np.ndarray) -> Drawn:
        """tokens (N, T) int64, lengths (N,) int64, noise (N, noise_dim) float32 -> what the model draws."""
        raise NotImplementedError

    def walk(self, first: str, second: str, steps: int, seed: int, truncation: float | None) -> list[np.ndarray]:
        """`steps` images (H, W, 3) uint8 from one caption to another under the same noise."""
        raise NotImplementedError

    def words_of(self, tokens: np.ndarray, length: int) -> list[str]:
        """The words of a caption as the model reads them."""
        return [self.vocabulary.words[index] for index in tokens[:length].tolist()]

    def describe(self) -> dict[str, Any]:
        """For /version and people."""
        return {
            "name": self.name, "system": self.system, "image_size": self.image_size, "words": len(self.vocabulary),
            "max_words": self.max_words, "masks": self.mask_sizes, "attention": self.attends, **self.origin,
        }  # fmt: skip


def load_models(checkpoints: Sequence[str], onnx: Sequence[str], device: str | None = None) -> dict[str, Model]:
    """The models that the command line names, by name; two of one name get a number. Raises UserError.

    checkpoints: of ours or folders of published models.
    onnx: files that serve.export wrote, for which torch stays out.
    device: as `--gpu` gives it, see `named_device`.
    """
    # Each kind imports its own library.
    loaded: list[Model] = []
    if checkpoints:
        from serve.torch_model import load_torch_model

        place = named_device(device)
        loaded += [load_torch_model(path, place) for path in checkpoints]
    if onnx:
        from serve.onnx_model import load_onnx_model

        loaded += [load_onnx_model(path) for path in onnx]
    if not loaded:
        raise UserError("nothing to serve; give --checkpoint CKPT, or --onnx FILE of an exported model")

    # Names that are the same get a number.
    models: dict[str, Model] = {}
    for model in loaded:
        number = sum(name == model.name or name.startswith(f"{model.name} (") for name in models)
        model.name = f"{model.name} ({number + 1})" if number else model.name
        models[model.name] = model
    return models


def truncation_of(settings: Mapping[str, Any]) -> float | None:
    """GAN.TRUNCATION in a model's settings, which may be anything; None where there is no number above 0."""
    gan = settings.get("GAN")
    value = gan.get("TRUNCATION") if isinstance(gan, Mapping) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None


def told_of(config: Mapping[str, Any], step: Any, epoch: Any) -> dict[str, Any]:
    """The part of a model's origin that is told to clients: data set, step, epoch; no path of this machine."""
    return {"data": config.get("DATASET_NAME"), "step": step, "epoch": epoch}
