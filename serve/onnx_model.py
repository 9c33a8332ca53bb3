"""An exported model behind the server's interface: onnxruntime alone, torch is not imported."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from miscc.byte_pairs import vocabulary_of
from miscc.errors import CheckpointError, DataError, UserError
from miscc.vocabulary import Vocabulary
from serve.models import Drawn, Model, told_of, truncation_of


class OnnxModel(Model):
    """Draws with an onnxruntime session.

    outputs: the graph's names, as serve.export gives them.
    """

    def __init__(self, name: str, session: Any, about: dict[str, Any], vocabulary: Vocabulary, outputs: list[str]):
        settings = about.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        super().__init__(
            name=name,
            system=about["system"],
            image_size=about["image_size"],
            noise_dim=about["noise_dim"],
            max_words=about["max_words"],
            vocabulary=vocabulary,
            mask_sizes=[],
            attends="attention0" in outputs,
            truncation=truncation_of(settings),
            examples=list(about.get("examples") or []),
            origin=told_of(settings, about.get("step"), about.get("epoch")),
        )

        self._session = session
        self._outputs = [name for name in outputs if name != "values"]
        # Drawing once gives the sizes of the masks and shows whether the file works as it declares.
        some = np.ones((1, self.max_words), dtype=np.int64), np.ones(1, dtype=np.int64)
        self.mask_sizes = [m.shape[1] for m in self.draw(*some, np.zeros((1, self.noise_dim), dtype=np.float32)).masks]

    def draw(self, tokens: np.ndarray, lengths: np.ndarray, noise: np.ndarray) -> Drawn:
        inputs = {"tokens": tokens, "lengths": lengths, "noise": noise}

        # By kind, in the order of the stages.
        found = dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))
        parts = [
            [found[name] for name in self._outputs if name.startswith(kind)] for kind in ("stage", "mask", "attention")
        ]
        return Drawn(*parts)


def open_session(path: str | Path) -> Any:
    """An onnxruntime session on the CPU. Raises CheckpointError for a file that is none, UserError without the package."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is missing; pip install onnxruntime") from None

    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; write one with `python -m serve.export --checkpoint CKPT`")

    # Errors alone: onnxruntime's warnings are for its developers.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base but this
        raise CheckpointError(f"{path}: cannot be read as an ONNX model ({str(error)[:160]})") from None


def load_onnx_model(path: str | Path) -> OnnxModel:
    """From a file that serve.export wrote, with all that drawing needs. Raises CheckpointError for others."""
    session = open_session(path)
    metadata = session.get_modelmeta().custom_metadata_map
    try:
        about, outputs = json.loads(metadata["model"]), json.loads(metadata["outputs"])
        vocabulary = vocabulary_of(json.loads(metadata["vocabulary"]))
        return OnnxModel(Path(path).stem, session, about, vocabulary, outputs)
    except (KeyError, TypeError, ValueError, DataError) as error:
        raise CheckpointError(
            f"{path}: is not a model that serve.export of this version wrote ({type(error).__name__}: {error})"
        ) from None
