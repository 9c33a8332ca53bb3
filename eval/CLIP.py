"""CLIPScore and CLIP-R-precision of sampled images: `python eval/CLIP.py --samples DIR`.

CLIP (Radford et al. 2021) puts images and captions into one space. CLIPScore (Hessel et al. 2021) is 100 times the mean
cosine of an image and its caption, as torchmetrics has it (the paper's 2.5 times the cosine is a fortieth of that);
CLIP-R-precision (Park et al. 2021) is how often an image's own caption is found among 99 others, with the lists of
R_precision.py. CLIP has seen none of our generators' losses, so it flatters none of them.
The network comes from the optional package transformers, its weights from a folder or Hugging Face's cache.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F

from eval.metric import Metric, Run, Score, ScoringBatch
from eval.R_precision import CandidateLists, about_lists, candidate_lists, lists_for, r_precision
from eval.scripts import add_ranking_arguments, broken, open_samples, ranking_options, report, update_from
from miscc.checkpoint import hash_tensors
from miscc.command_line import named_device
from miscc.errors import CheckpointError, run_command
from models.modes import no_tf32

MODEL = "openai/clip-vit-base-patch32"  # of both papers


class ImageTextEncoder(Protocol):
    """Encodes images and captions into one space.

    label: on the score;
    protocol: what made the codes.
    """

    label: str
    protocol: dict[str, Any]

    def encode_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """(H, W, 3) uint8 images of any sizes -> codes (N, D) float32 on the CPU."""

    def encode_captions(self, captions: Sequence[str]) -> torch.Tensor:
        """Captions -> codes (N, D) float32 on the CPU."""


class Clip:
    """A CLIP of the package transformers with its own processor; made by `load_clip`. See ImageTextEncoder."""

    def __init__(self, model: torch.nn.Module, processor: Any, name: str, is_file: bool) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        weights_hash = hash_tensors(model.state_dict())
        short = Path(name).name
        self.label = f"{short}:{weights_hash[:8]}" if is_file else short
        self.protocol = {"network": name, "weights_hash": weights_hash}
        self.max_tokens = int(model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        pixels = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) for image in images]
        inputs = self.processor(images=pixels, return_tensors="pt")["pixel_values"]
        with no_tf32():
            return _codes(self.model.get_image_features(pixel_values=inputs.to(self.model.device)))

    @torch.inference_mode()
    def encode_captions(self, captions: Sequence[str]) -> torch.Tensor:
        cut = {"padding": True, "truncation": True, "max_length": self.max_tokens}
        inputs = self.processor(text=list(captions), return_tensors="pt", **cut).to(self.model.device)
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with no_tf32():
            return _codes(self.model.get_text_features(**tokens))


def _codes(output: Any) -> torch.Tensor:
    """transformers 5 wraps what earlier ones give as a tensor."""
    return (output if isinstance(output, torch.Tensor) else output.pooler_output).float().cpu()


def load_clip(name: str | Path = MODEL, device: str | torch.device = "cpu") -> Clip:
    """A CLIP by its name on Hugging Face, if it is in the cache here, or from a folder. Nothing is downloaded.

    Raises CheckpointError without the package, without the weights, and for a folder of another network.
    """
    # The package, which is optional.
    try:
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import logging as their_logging
    except ImportError as error:
        raise CheckpointError(
            f"CLIP needs the package transformers, which cannot be imported here ({error}); pip install transformers"
        ) from None
    their_logging.set_verbosity(logging.ERROR)  # what matters of its warnings is an error below

    # Network and processor, from this machine alone.
    name, is_file = str(name), Path(name).is_dir()
    try:
        model, info = CLIPModel.from_pretrained(name, local_files_only=True, output_loading_info=True)
        processor = CLIPProcessor.from_pretrained(name, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, safetensors' and huggingface_hub's own
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"CLIP: {name} is neither a folder with a CLIP's weights and processor nor in Hugging Face's cache, and "
            f"nothing is downloaded ({type(error).__name__}: {reason}); run `hf download {MODEL}` where there is a "
            f"network, or give the folder with --clip"
        ) from None

    # transformers would draw missing tensors at random.
    missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")] or info["mismatched_keys"]
    if missing:
        raise CheckpointError(f"CLIP: {name} lacks {len(missing)} tensors of a CLIP, e.g. {sorted(missing)[0]}")
    return Clip(model.to(device), processor, name, is_file)


def clip_score(image_codes: torch.Tensor, caption_codes: torch.Tensor) -> torch.Tensor:
    """100 times the cosine of each image (N, D) and its caption (N, D): (N,) float64. torchmetrics' CLIPScore is the mean
    of these, or 0 where that is negative."""
    return 100 * F.cosine_similarity(image_codes.double(), caption_codes.double(), dim=1)


class ClipScore(Metric):
    """CLIPScore and CLIP-R-precision, the latter in per cent."""

    accumulated = ("codes",)

    def __init__(
        self,
        encoder: ImageTextEncoder,
        captions: Sequence[str],
        lists: CandidateLists,
        folds: int = 10,
        seed: int = 2020,
    ) -> None:
        """captions, lists: of all images, in the order in which they come."""
        self.encoder, self.captions, self.lists, self.folds, self.seed = encoder, captions, lists, folds, seed
        self.codes: list[torch.Tensor] = []

    @classmethod
    def from_run(cls, run: Run) -> "ClipScore":
        encoder = load_clip(run.tools.clip or MODEL, run.device)
        captions = [request.caption for request in run.requests]
        return cls(encoder, captions, lists_for(run), run.protocol.folds, run.protocol.seed)

    def update(self, batch: ScoringBatch) -> None:
        self.codes.append(self.encoder.encode_images(batch.images))

    def compute(self) -> list[Score]:
        encoder, lists, image_codes = self.encoder, self.lists, torch.cat(self.codes)  # (N, D)

        # Each caption once. The pool has one caption of those with the same words; CLIP may see a difference.
        texts = list(dict.fromkeys([*lists.pool, *self.captions]))
        index_of = {text: index for index, text in enumerate(texts)}
        text_codes = torch.cat([encoder.encode_captions(texts[i : i + 256]) for i in range(0, len(texts), 256)])

        # An image and its own caption.
        single = clip_score(image_codes, text_codes[[index_of[caption] for caption in self.captions]])  # (N,)
        about = encoder.protocol | {"num_images": len(image_codes)}
        said = about | {"unit": "100 x cosine, mean and deviation over images"}
        value, spread = max(0.0, float(single.mean())), float(single.std(correction=0))
        score = Score(f"CLIPScore[{encoder.label}]", value, said, std=spread)

        # Its own caption among others.
        pool_codes = text_codes[: len(lists.pool)]
        mean, std = r_precision(image_codes, pool_codes, lists.true, lists.candidates, self.folds, self.seed)
        said = about | about_lists(lists) | {"folds": self.folds, "seed": self.seed}
        return [score, Score(f"CLIP-R-precision%[{encoder.label}]", 100 * mean, said, std=100 * std)]


def clip_scores(
    folder: str | Path,
    encoder: ImageTextEncoder,
    *,
    num_candidates: int = 99,
    folds: int = 10,
    seed: int = 2020,
    lists: str | Path | None = None,
    skip_broken: bool = False,
    **options,
) -> list[Score]:
    """CLIPScore and, in per cent, CLIP-R-precision of a folder that the sampler wrote.

    lists: where the candidate lists are, or shall be written (default: in the folder, by seed);
    options: as `eval.scripts.update_from`.
    Raises DataError.
    """
    source, samples, skipped = open_samples(folder, skip_broken)
    drawn, about = candidate_lists(folder, samples, lists, num_candidates, seed)
    metric = ClipScore(encoder, [sample.caption for sample in samples], drawn, folds, seed)
    score, precision = update_from(source, metric, **options).compute()

    origin = {"images": str(folder), "skipped": len(skipped), "skipped_names": list(skipped)}
    warnings = broken(folder, skipped)
    return [score.of(origin, warnings), precision.of(origin | about, warnings)]


def main() -> None:
    parser = argparse.ArgumentParser(description="CLIPScore and CLIP-R-precision of sampled images")
    parser.add_argument("--clip", default=MODEL, metavar="NAME", help=f"folder, or name in the cache (default {MODEL})")
    add_ranking_arguments(parser)
    args = parser.parse_args()
    encoder = load_clip(args.clip, named_device(args.device))
    report(clip_scores(args.samples, encoder, **ranking_options(args)), args.json)


if __name__ == "__main__":
    run_command(main)
