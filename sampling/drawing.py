"""What main.py draws with, and where that goes: the pipeline that options and settings mean, and folders for samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from datasets.records import Records
from miscc.checkpoint import load_file
from miscc.errors import CheckpointError
from sampling.folders import sample
from sampling.pipeline import TextToImage
from sampling.requests import Request


def open_pipeline(
    path: str | Path, device: torch.device, averaged: bool, output_dir: str | Path, **released: Any
) -> tuple[TextToImage, Path]:
    """The pipeline of a weight file or published model, and the folder that its samples go to.

    averaged: draw with G's average, where there is one.
    output_dir: where the samples of the authors' files go.
    released: further arguments of `TextToImage.from_released`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: is a part of a published model; name its folder, {path.parent}")
    content = None if path.is_dir() else load_file(path)

    # Without `networks`: a loose file of the authors.
    if content is not None and not (isinstance(content, dict) and "networks" in content):
        pipeline = TextToImage.from_released(path, device=device, **released)
        return pipeline, Path(output_dir) / "samples" / path.stem

    pipeline = TextToImage.load(path, device, averaged=averaged)
    step = f"step{pipeline.origin['step']}"
    if path.is_dir():
        return pipeline, path / "samples" / step

    # Beside the checkpoints of a run, not among them.
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return pipeline, run / "samples" / f"{path.stem}-{step}"


def free_path(path: Path, overwrite: bool) -> Path:
    """The path, or path-2, path-3 ... if it is taken and may not be overwritten."""
    count, free = 1, path
    while free.exists() and not overwrite:
        count += 1
        free = path.with_name(f"{path.stem}-{count}{path.suffix}")
    return free


@dataclass(frozen=True)
class Drawing:
    """How requests are drawn into a folder; `into` draws and prints where everything is.

    folder: where samples go by default.
    out: where the user wants them instead, if anywhere.
    The others are arguments of `sampling.folders.sample`.
    """

    pipeline: TextToImage
    folder: Path
    out: Path | None
    seed: int
    truncation: float | None
    overwrite: bool
    dataset: str
    batch_size: int = 32
    masks: bool = False
    attention: bool = False
    real: bool = False

    def with_attention(self) -> "Drawing":
        """The same, but with the word attention of a generator that has any."""
        return replace(self, attention=self.attention or self.pipeline.attends)

    def into(self, folder: Path, requests: Sequence[Request], records: Records | None = None) -> None:
        """Draw; the picture's path is the last line printed.

        records: the split of the captions, if they are of one.
        """
        picture = sample(
            self.pipeline,
            requests,
            folder,
            seed=self.seed,
            truncation=self.truncation,
            batch_size=self.batch_size,
            with_masks=self.masks,
            with_attention=self.attention,
            real=records if self.real else None,
            overwrite=self.overwrite,
            about={"dataset": self.dataset, "split": records.split if records is not None else None},
        )

        # Where everything is: other programs read the last line.
        print(f"{len(requests)} image{'s' if len(requests) > 1 else ''} in {folder}")
        for kind, written in (("masks", self.masks), ("attention", self.attention), ("real", self.real)):
            if written:
                print(Path(folder) / kind)
        print(picture)
