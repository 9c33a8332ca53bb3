"""R-precision as AttnGAN defines it (Xu et al. 2018): `python eval/R_precision.py --samples DIR --encoders CKPT`.

For each generated image its own caption is ranked among 99 captions of other images by the cosine of DAMSM's global
codes; the score is the share of images whose own caption comes first, in 10 folds. Chance is 1 in 100. The lists of
captions are drawn by a seed and written to disk, so that another system can be asked the very same questions.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder hides the standard library's and others' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from datasets.captions import encode_batch
from eval.features.sources import ImageSource, Sample, batches, read_samples
from eval.features.statistics import load_source
from eval.protocol.scores import Score, add_arguments, named_device, report, seed_number
from miscc.checkpoint import hash_tensors
from miscc.errors import CheckpointError, DataError, UserError, run_command
from miscc.files import write_text
from miscc.images import from_uint8
from miscc.randomness import stream
from miscc.vocabulary import Vocabulary, tokenize
from models.modes import no_tf32
from sampling.encoders import Encoders, load_encoders, released_vocabulary

ABOUT_FILE = "samples.json"  # beside the samples: what they were made with, `encoder_hash` among it

SAME = 1e-12  # cosines that differ by less are equal: captions that differ only in words that the encoder does not know


@dataclass(frozen=True)
class CandidateLists:
    """For each of N images its own caption and K wrong ones, as indices into `pool`."""

    pool: tuple[str, ...]
    true: np.ndarray  # (N,)
    candidates: np.ndarray  # (N, K)
    seed: int

    def save(self, path: str | Path, files: Sequence[str]) -> None:
        """Write JSON: the captions once, and for each image's file its own caption and the wrong ones."""
        head = json.dumps({"seed": self.seed, "pool": list(self.pool)}, ensure_ascii=False, indent=0)
        rows = zip(files, self.true.tolist(), self.candidates.tolist(), strict=True)
        lines = ",\n".join(json.dumps({"file": f, "true": t, "candidates": c}) for f, t, c in rows)
        write_text(path, f'{head[:-2]},\n"images": [\n{lines}\n]\n}}\n')

    @classmethod
    def load(cls, path: str | Path, files: Sequence[str], captions: Sequence[str]) -> "CandidateLists":
        """Read what `save` wrote, for these images with these captions. Raises DataError if it is for others."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = {row["file"]: row for row in content["images"]}
            pool = tuple(str(caption) for caption in content["pool"])
            lists = cls(
                pool=pool,
                true=np.array([rows[file]["true"] for file in files], dtype=np.int64),
                candidates=np.array([rows[file]["candidates"] for file in files], dtype=np.int64),
                seed=int(content["seed"]),
            )
            told = [pool[index] for index in lists.true]
            if lists.candidates.size and not 0 <= lists.candidates.min() <= lists.candidates.max() < len(pool):
                raise ValueError("a candidate is not in the pool")
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"{path}: holds no candidate lists for these images ({error!r}); remove it to draw new ones"
            ) from None
        wrong = next((i for i, caption in enumerate(captions) if tokenize(caption) != tokenize(told[i])), None)
        if wrong is not None:
            raise DataError(
                f"{path}: says that {files[wrong]} shows {told[wrong]!r}, the samples say {captions[wrong]!r}; "
                "the lists are for other samples: remove them to draw new ones"
            )
        return lists


def draw_candidates(
    captions: Sequence[str], keys: Sequence[str], num_candidates: int = 99, seed: int = 2020
) -> CandidateLists:
    """Draw wrong captions for each image from all images' captions.

    captions, keys: each generated image's caption and the key of the real image whose caption that is ("" for none).
    No candidate is another caption of the same key, nor has the words of the true caption; no two candidates of an
    image have the same words. An image's list depends on (seed, its position) and the pool alone.
    Raises DataError when there are too few captions of other images.
    """
    words = [" ".join(tokenize(caption)) for caption in captions]
    pool: dict[str, int] = {}
    texts: list[str] = []
    pool_of_key = defaultdict(set)
    for caption, text, key in zip(captions, words, keys, strict=True):
        if text not in pool:
            pool[text] = len(texts)
            texts.append(caption)
        pool_of_key[key].add(pool[text])
    candidates = np.empty((len(captions), num_candidates), dtype=np.int64)
    for row, (text, key) in enumerate(zip(words, keys, strict=True)):
        forbidden = {pool[text]} | (pool_of_key[key] if key else set())
        if len(texts) - len(forbidden) < num_candidates:
            raise DataError(
                f"R-precision needs {num_candidates} captions of other images for each image; there are "
                f"{len(texts) - len(forbidden)} for {captions[row]!r}: draw images for more captions, or rank among fewer"
            )
        drawn = stream(seed, "r-precision candidates", row).choice(
            len(texts), min(len(texts), num_candidates + len(forbidden)), replace=False
        )
        candidates[row] = [index for index in drawn if index not in forbidden][:num_candidates]
    return CandidateLists(tuple(texts), np.array([pool[text] for text in words], dtype=np.int64), candidates, seed)


def r_precision(
    image_codes: torch.Tensor,
    caption_codes: torch.Tensor,
    true: np.ndarray,
    candidates: np.ndarray,
    folds: int = 10,
    seed: int = 2020,
) -> tuple[float, float]:
    """Mean and standard deviation over folds of the share of images whose own caption ranks first; in [0, 1].

    image_codes (N, D); caption_codes (P, D) of the pool; true (N,) and candidates (N, K) are rows of the pool. A tie
    with k candidates counts 1 / (1 + k). Images are dealt to the folds by the seed.
    """
    if not 1 <= folds <= len(image_codes):
        raise DataError(f"--folds {folds}: {len(image_codes)} images cannot be dealt to as many folds")
    images, captions = F.normalize(image_codes.double(), dim=1), F.normalize(caption_codes.double(), dim=1)
    hits = []
    for start in range(0, len(images), 1024):
        rows = slice(start, start + 1024)
        chosen = np.concatenate([true[rows, None], candidates[rows]], axis=1)
        cosines = torch.einsum("nd,nkd->nk", images[rows], captions[torch.from_numpy(chosen)])
        ahead = cosines[:, 1:] - cosines[:, :1]
        above = (ahead > SAME).any(dim=1)
        ties = (ahead.abs() <= SAME).sum(dim=1)
        hits.append(torch.where(above, 0.0, 1 / (1.0 + ties)))
    order = stream(seed, "r-precision folds").permutation(len(images))
    shares = [float(fold.mean()) for fold in np.array_split(torch.cat(hits).numpy()[order], folds)]
    return float(np.mean(shares)), float(np.std(shares))


@torch.inference_mode()
def encode_captions(
    captions: Sequence[str], encoders: Encoders, vocabulary: Vocabulary, batch_size: int = 256
) -> torch.Tensor:
    """DAMSM's sentence codes (N, D) on the CPU. Raises DataError for a caption without a known word."""
    device = next(encoders.text_encoder.parameters()).device
    codes = []
    for start in range(0, len(captions), batch_size):
        encoded = encode_batch(captions[start : start + batch_size], vocabulary, encoders.max_words)
        codes.append(encoders.text_encoder(encoded.tokens.to(device), encoded.lengths).sentence.cpu())
    return torch.cat(codes)


@torch.inference_mode()
def encode_images(
    source: ImageSource,
    encoders: Encoders,
    batch_size: int = 32,
    workers: int | None = None,
    progress: bool | None = None,
) -> torch.Tensor:
    """DAMSM's global image codes (N, D) on the CPU; the encoder resizes the images itself."""
    device = next(encoders.image_encoder.parameters()).device
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    codes = []
    with tqdm(total=len(source), desc="images", unit="image", leave=False, disable=hidden) as bar:
        for images in batches(source, batch_size, workers):
            if len({image.shape for image in images}) > 1:
                raise DataError(f"{source.path}: the sampled images differ in size; sample them again into one folder")
            pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
            with no_tf32():
                codes.append(encoders.image_encoder(from_uint8(pixels))[1].float().cpu())
            bar.update(len(images))
    return torch.cat(codes)


def encoder_hash(encoders: Encoders) -> str:
    """The fingerprint of a text encoder that `samples.json` has as `encoder_hash`."""
    return hash_tensors(encoders.text_encoder.state_dict())


def sample_precision(
    folder: str | Path,
    encoders: Encoders,
    *,
    vocabulary: Vocabulary | None = None,
    num_candidates: int = 99,
    folds: int = 10,
    seed: int = 2020,
    lists: str | Path | None = None,
    skip_broken: bool = False,
    **options,
) -> Score:
    """R-precision, in per cent, of a folder that the sampler wrote.

    vocabulary: for encoders that carry none; lists: where the candidate lists are, or shall be written (default: in
    the folder, by seed); options as `encode_images`. Raises DataError, or CheckpointError without an image encoder.
    """
    vocabulary = encoders.vocabulary or vocabulary
    if vocabulary is None:
        raise DataError("these encoders carry no vocabulary; give --data-dir, the folder of their captions.pickle")
    if encoders.image_encoder is None:
        raise CheckpointError("these encoders have no image encoder; put image_encoder*.pth beside text_encoder*.pth")
    by_file = {sample.file: sample for sample in read_samples(folder)}
    source, skipped = load_source(folder, skip_broken)
    samples = [by_file[name] for name in source.names]
    name = f"r_precision_{num_candidates}_seed{seed}.json"
    drawn, path = candidate_lists(samples, Path(lists or Path(folder) / name), num_candidates, seed)
    caption_codes = encode_captions(drawn.pool, encoders, vocabulary)
    image_codes = encode_images(source, encoders, **options)
    mean, std = r_precision(image_codes, caption_codes, drawn.true, drawn.candidates, folds, seed)
    judge, made_with = encoder_hash(encoders), _made_with(Path(folder))
    protocol = {
        "encoder_hash": judge,
        "images": str(folder),
        "num_images": len(samples),
        "skipped": len(skipped),
        "skipped_names": list(skipped),
        "candidates": drawn.candidates.shape[1],
        "pool": len(drawn.pool),
        "lists": str(path),
        "lists_seed": drawn.seed,
        "folds": folds,
        "seed": seed,
        "unit": "%",
        "chance": 100 / (1 + drawn.candidates.shape[1]),
        "encoder_of_the_generator": None if made_with is None else made_with == judge,
    }
    warnings = tuple(_warnings(Path(folder), made_with, judge, skipped))
    return Score(f"R-precision%[damsm:{judge[:8]}]", 100 * mean, protocol, std=100 * std, warnings=warnings)


def candidate_lists(
    samples: Sequence[Sample], path: Path, num_candidates: int, seed: int
) -> tuple[CandidateLists, Path]:
    """Read the lists at `path`, or draw them and write them there."""
    files, captions = [sample.file for sample in samples], [sample.caption for sample in samples]
    if path.is_file():
        return CandidateLists.load(path, files, captions), path
    lists = draw_candidates(captions, [sample.key for sample in samples], num_candidates, seed)
    try:
        lists.save(path, files)
    except (OSError, UserError) as error:
        raise DataError(
            f"{path}: the candidate lists cannot be written ({error}); give another place with --lists"
        ) from None
    return lists, path


def _made_with(folder: Path) -> str | None:
    """The fingerprint of the text encoder behind the samples, None where they do not say."""
    try:
        return json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8")).get("encoder_hash")
    except (OSError, ValueError, AttributeError):
        return None


def _warnings(folder: Path, made_with: str | None, judge: str, skipped: Sequence[str]) -> list[str]:
    warnings = []
    if made_with is None:
        warnings.append(
            f"{folder}: does not say which encoders the generator was trained with; R-precision by the same ones "
            "would flatter it"
        )
    elif made_with == judge:
        warnings.append(
            f"{folder}: these are the encoders that the generator was trained with, which flatters it; "
            "judge with encoders that were trained apart"
        )
    if skipped:
        warnings.append(f"{folder}: {len(skipped)} broken images were left out, e.g. {skipped[0]}")
    return warnings


def main() -> None:
    parser = argparse.ArgumentParser(description="R-precision of sampled images by DAMSM encoders")
    parser.add_argument("--samples", required=True, metavar="DIR", help="folder that main.py sampled into")
    parser.add_argument("--encoders", required=True, metavar="CKPT", help="DAMSM checkpoint, or text_encoder*.pth")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of captions.pickle, for the authors' encoders")
    parser.add_argument("--candidates", type=int, default=99, metavar="N", help="wrong captions an image (default 99)")
    parser.add_argument("--lists", metavar="PATH", help="candidate lists as JSON: read if there, else written")
    parser.add_argument("--folds", type=int, default=10, help="default 10, as AttnGAN")
    parser.add_argument("--seed", type=seed_number, default=2020, help="of candidate lists and folds")
    add_arguments(parser, network=False, weights=False)
    args = parser.parse_args()
    if args.candidates < 1:
        parser.error("--candidates must be at least 1")
    encoders = load_encoders(args.encoders, named_device(args.device))
    vocabulary = released_vocabulary(args.data_dir) if args.data_dir and encoders.vocabulary is None else None
    choices = {"num_candidates": args.candidates, "folds": args.folds, "seed": args.seed, "lists": args.lists}
    choices |= {"skip_broken": args.skip_broken, "batch_size": args.batch_size, "workers": args.workers}
    report([sample_precision(args.samples, encoders, vocabulary=vocabulary, progress=True, **choices)], args.json)


if __name__ == "__main__":
    run_command(main)
