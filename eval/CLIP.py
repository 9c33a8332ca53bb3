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

if __package__ in (None, ""):  # run as a script: this folder hides the standard library's and others' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval.features.sources import batches, read_samples
from eval.features.statistics import load_source
from eval.protocol.scores import Score, add_arguments, named_device, report, seed_number
from eval.R_precision import candidate_lists, r_precision
from miscc.checkpoint import hash_tensors
from miscc.errors import CheckpointError, run_command
from models.modes import no_tf32

MODEL = "openai/clip-vit-base-patch32"  # of both papers


class ImageTextEncoder(Protocol):
    """Whoever puts images and captions into one space. label: on the score; protocol: what made the codes."""

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
    try:
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import logging as their_logging
    except ImportError as error:
        raise CheckpointError(
            f"CLIP needs the package transformers, which cannot be imported here ({error}); pip install transformers"
        ) from None
    their_logging.set_verbosity(logging.ERROR)  # what matters of its warnings is an error below
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
    missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")] or info["mismatched_keys"]
    if missing:
        raise CheckpointError(f"CLIP: {name} lacks {len(missing)} tensors of a CLIP, e.g. {sorted(missing)[0]}")
    return Clip(model.to(device), processor, name, is_file)


def clip_score(image_codes: torch.Tensor, caption_codes: torch.Tensor) -> torch.Tensor:
    """100 times the cosine of each image (N, D) and its caption (N, D): (N,) float64. torchmetrics' CLIPScore is the mean
    of these, or 0 where that is negative."""
    return 100 * F.cosine_similarity(image_codes.double(), caption_codes.double(), dim=1)


def clip_scores(
    folder: str | Path,
    encoder: ImageTextEncoder,
    *,
    num_candidates: int = 99,
    folds: int = 10,
    seed: int = 2020,
    lists: str | Path | None = None,
    skip_broken: bool = False,
    batch_size: int = 32,
    workers: int | None = None,
    progress: bool | None = None,
) -> list[Score]:
    """CLIPScore and, in per cent, CLIP-R-precision of a folder that the sampler wrote.

    lists: where the candidate lists are, or shall be written (default: in the folder, by seed). Raises DataError.
    """
    by_file = {sample.file: sample for sample in read_samples(folder)}
    source, skipped = load_source(folder, skip_broken)
    samples = [by_file[name] for name in source.names]
    path = Path(lists or Path(folder) / f"r_precision_{num_candidates}_seed{seed}.json")
    drawn, path = candidate_lists(samples, path, num_candidates, seed)
    captions = [sample.caption for sample in samples]
    # The pool has one caption of those with the same words; CLIP may see a difference.
    texts = {text: place for place, text in enumerate(dict.fromkeys([*drawn.pool, *captions]))}
    order = list(texts)
    text_codes = torch.cat([encoder.encode_captions(order[i : i + 256]) for i in range(0, len(order), 256)])
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    codes = []
    with tqdm(total=len(source), desc="images", unit="image", leave=False, disable=hidden) as bar:
        for images in batches(source, batch_size, workers):
            codes.append(encoder.encode_images(images))
            bar.update(len(images))
    image_codes = torch.cat(codes)
    single = clip_score(image_codes, text_codes[[texts[caption] for caption in captions]])
    pool_codes = text_codes[: len(drawn.pool)]
    mean, std = r_precision(image_codes, pool_codes, drawn.true, drawn.candidates, folds, seed)
    common = encoder.protocol | {"images": str(folder), "num_images": len(samples), "skipped": len(skipped)}
    common |= {"skipped_names": list(skipped)}
    ranked = {"candidates": drawn.candidates.shape[1], "pool": len(drawn.pool), "lists": str(path)}
    ranked |= {"lists_seed": drawn.seed, "folds": folds, "seed": seed, "unit": "%"}
    ranked |= {"chance": 100 / (1 + drawn.candidates.shape[1])}
    warnings = (f"{folder}: {len(skipped)} broken images were left out, e.g. {skipped[0]}",) if skipped else ()
    unit = {"unit": "100 x cosine, mean and deviation over images"}
    value, spread = max(0.0, float(single.mean())), float(single.std(correction=0))
    return [
        Score(f"CLIPScore[{encoder.label}]", value, common | unit, std=spread, warnings=warnings),
        Score(f"CLIP-R-precision%[{encoder.label}]", 100 * mean, common | ranked, std=100 * std, warnings=warnings),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="CLIPScore and CLIP-R-precision of sampled images")
    parser.add_argument("--samples", required=True, metavar="DIR", help="folder that main.py sampled into")
    parser.add_argument("--clip", default=MODEL, metavar="NAME", help=f"folder, or name in the cache (default {MODEL})")
    parser.add_argument("--candidates", type=int, default=99, metavar="N", help="wrong captions an image (default 99)")
    parser.add_argument("--lists", metavar="PATH", help="candidate lists as JSON: read if there, else written")
    parser.add_argument("--folds", type=int, default=10, help="default 10")
    parser.add_argument("--seed", type=seed_number, default=2020, help="of candidate lists and folds")
    add_arguments(parser, network=False, weights=False)
    args = parser.parse_args()
    if args.candidates < 1:
        parser.error("--candidates must be at least 1")
    encoder = load_clip(args.clip, named_device(args.device))
    choices = {"num_candidates": args.candidates, "folds": args.folds, "seed": args.seed, "lists": args.lists}
    choices |= {"skip_broken": args.skip_broken, "batch_size": args.batch_size, "workers": args.workers}
    report(clip_scores(args.samples, encoder, progress=True, **choices), args.json)


if __name__ == "__main__":
    run_command(main)
