"""A checkpoint or a published model behind the server's interface."""

import os
from pathlib import Path

import numpy as np
import torch

from miscc.images import to_uint8
from models.registry import network_name
from sampling.interpolate import interpolated
from sampling.pipeline import TextToImage
from sampling.publish import example_captions
from serve.models import Drawn, Model, told_of, truncation_of

FILE_SUFFIXES = (".pth", ".pt", ".pt2", ".onnx", ".safetensors")  # of files, not of names online


class TorchModel(Model):
    """Draws with a TextToImage."""

    mixes_captions = True

    def __init__(self, name: str, pipeline: TextToImage):
        config = pipeline.origin.get("config") or {}
        super().__init__(
            name=name,
            system=network_name(pipeline.generator),
            image_size=pipeline.image_size,
            noise_dim=pipeline.generator.noise_dim,
            max_words=pipeline.text_encoder.max_words,
            vocabulary=pipeline.vocabulary,
            mask_sizes=[],
            attends=pipeline.attends,
            truncation=truncation_of(config),
            examples=example_captions(pipeline),
            origin=told_of(config, pipeline.origin.get("step"), pipeline.origin.get("epoch")),
        )

        self.pipeline = pipeline
        # Drawing once gives the sizes of the masks and makes the first request as fast as the others.
        some = np.ones((1, self.max_words), dtype=np.int64), np.ones(1, dtype=np.int64)
        drawn = self.draw(*some, np.zeros((1, self.noise_dim), dtype=np.float32))
        self.mask_sizes = [mask.shape[1] for mask in drawn.masks]

    @torch.inference_mode()
    def draw(self, tokens: np.ndarray, lengths: np.ndarray, noise: np.ndarray) -> Drawn:
        pipeline = self.pipeline
        text = pipeline.text_encoder(torch.from_numpy(tokens).to(pipeline.device), torch.from_numpy(lengths))
        output = pipeline.synthesize(text, torch.from_numpy(noise))
        return Drawn(
            images=[to_uint8(images) for images in output.images],
            masks=[mask[:, 0].float().cpu().numpy() for mask in output.masks],
            attention=[maps.float().cpu().numpy() for maps in output.attention],
        )

    def walk(self, first: str, second: str, steps: int, seed: int, truncation: float | None) -> list[np.ndarray]:
        first, second = self._known_words(first), self._known_words(second)
        return list(interpolated(self.pipeline, first, second, steps, seed, truncation))

    def _known_words(self, caption: str) -> str:
        """The caption without unknown words, each of which the pipeline would remember to warn of it once."""
        words = self.vocabulary
        return caption if words.reads_whole_captions else words.decode(words.encode(caption)[0])


def load_torch_model(path: str, device: torch.device) -> TorchModel:
    """From a checkpoint of ours, or the folder or the online name of a published model. Raises CheckpointError."""
    # A name such as owner/name is of a published model online.
    found = Path(path)
    looks_online = not found.exists() and found.suffix not in FILE_SUFFIXES and path.count("/") == 1
    pipeline = TextToImage.from_pretrained(path, device) if looks_online else TextToImage.load(path, device)
    return TorchModel(_name_of(found), pipeline)


def _name_of(path: Path) -> str:
    """A model's name: its run's, as a run's file is called last.pth; else its file's or folder's own."""
    path = Path(os.path.abspath(path))
    run = path.parent.parent.name if path.parent.name == "checkpoints" else ""
    return run or (path.stem if path.is_file() else path.name)
