"""R-precision as AttnGAN defines it (Xu et al. 2018): `python eval/R_precision.py --samples DIR --encoders CKPT`.

For each generated image its own caption is ranked among 99 captions of other images by the cosine of DAMSM's global
codes; the score is the share of images whose own caption comes first, in 10 folds. Chance is 1 in 100. The lists of
captions are drawn by a seed and written to disk, so that another system can be scored with the same ones.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F

from datasets.captions import encode_batch
from eval.metric import Metric, Needs, Run, Score, ScoringBatch, Tools
from eval.scripts import add_ranking_arguments, run_script
from miscc.checkpoint import hash_tensors
from miscc.command_line import named_device
from miscc.errors import CheckpointError, DataError, UserError, run_command
from miscc.files import read_json, write_text
from miscc.images import from_uint8
from miscc.randomness import stream
from miscc.vocabulary import Vocabulary, tokenize
from models.modes import no_tf32
from sampling.encoders import Encoders, check_vocabulary, load_encoders, released_vocabulary

MOST_BYTES = 1 << 27  # of a file of candidates; those of 30,000 images with 99 wrong captions each have 25 MB
SAME = 1e-12  # cosines that differ by less are equal: captions that differ only in words that the encoder does not know


class TooFewCaptionsError(DataError):
    """There are fewer captions of other images than an image's own is ranked among."""


@dataclass(frozen=True)
class CandidateLists:
    """For each of N images its own caption and K wrong ones, as indices into `pool`.

    file: where they are kept, "" nowhere.
    """

    pool: tuple[str, ...]
    true: np.ndarray  # (N,)
    candidates: np.ndarray  # (N, K)
    seed: int
    file: str = ""

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
            content = read_json(path, MOST_BYTES)
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
        except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise DataError(
                f"{path}: holds no candidate lists for these images ({error!r}); remove it to draw new ones"
            ) from None

        # The lists must be of these captions.
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
    Raises TooFewCaptionsError when there are too few captions of other images.
    """
    # The captions' different words, and which of them belong to an image.
    words = [" ".join(tokenize(caption)) for caption in captions]
    pool: dict[str, int] = {}
    texts: list[str] = []
    pool_of_key = defaultdict(set)
    for caption, text, key in zip(captions, words, keys, strict=True):
        if text not in pool:
            pool[text] = len(texts)
            texts.append(caption)
        pool_of_key[key].add(pool[text])

    # Wrong captions for each image.
    candidates = np.empty((len(captions), num_candidates), dtype=np.int64)
    for row, (text, key) in enumerate(zip(words, keys, strict=True)):
        forbidden = {pool[text]} | (pool_of_key[key] if key else set())
        if len(texts) - len(forbidden) < num_candidates:
            raise TooFewCaptionsError(
                f"R-precision needs {num_candidates} captions of other images for each image; there are "
                f"{len(texts) - len(forbidden)} for {captions[row]!r}: score images of more captions, or sample them with "
                f"main.py and rank among fewer by eval/R_precision.py with {max(1, len(texts) - len(forbidden))} candidates"
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

    # 1 for each image whose own caption is nearest, a share of it for a tie.
    images, captions = F.normalize(image_codes.double(), dim=1), F.normalize(caption_codes.double(), dim=1)
    hits = []
    for start in range(0, len(images), 1024):
        rows = slice(start, start + 1024)
        chosen = np.concatenate([true[rows, None], candidates[rows]], axis=1)
        cosines = torch.einsum("nd,nkd->nk", images[rows], captions[torch.from_numpy(chosen)])  # own caption first
        ahead = cosines[:, 1:] - cosines[:, :1]
        above = (ahead > SAME).any(dim=1)
        ties = (ahead.abs() <= SAME).sum(dim=1)
        hits.append(torch.where(above, 0.0, 1 / (1.0 + ties)))

    # Folds at random, always alike.
    order = stream(seed, "r-precision folds").permutation(len(images))
    shares = [float(fold.mean()) for fold in np.array_split(torch.cat(hits).numpy()[order], folds)]
    return float(np.mean(shares)), float(np.std(shares))


@torch.inference_mode()
def encode_captions(
    captions: Sequence[str], encoders: Encoders, vocabulary: Vocabulary, batch_size: int = 256
) -> torch.Tensor:
    """DAMSM's sentence codes (N, D) on the CPU. Raises DataError for a caption without a known word."""
    device = next(encoders.text_encoder.parameters()).device

    # In parts: a pool has thousands of captions.
    codes = []
    for start in range(0, len(captions), batch_size):
        encoded = encode_batch(captions[start : start + batch_size], vocabulary, encoders.max_words)
        with no_tf32():
            codes.append(encoders.text_encoder(encoded.tokens.to(device), encoded.lengths).sentence.cpu())
    return torch.cat(codes)


def encoder_hash(encoders: Encoders) -> str:
    """The fingerprint of a text encoder that `samples.json` has as `encoder_hash`."""
    return hash_tensors(encoders.text_encoder.state_dict())


class RPrecision(Metric):
    """R-precision, in per cent, by DAMSM's encoders."""

    needs = Needs(encoders=True, captions=True)
    accumulated = ("codes",)

    def __init__(
        self,
        encoders: Encoders,
        vocabulary: Vocabulary | None,
        lists: CandidateLists,
        folds: int = 10,
        seed: int = 2020,
        generators_encoder: str | None = None,
        folder: Path | None = None,
    ) -> None:
        """Raises DataError without a vocabulary, CheckpointError for one of other encoders, or without an image encoder.

        vocabulary: for encoders that have none;
        lists: of all images, in the order in which they come;
        generators_encoder: fingerprint of the generator's text encoder, None where it is not known;
        folder: of the samples, None where images come from elsewhere.
        """
        vocabulary = encoders.vocabulary or vocabulary
        if vocabulary is None:
            raise DataError("these encoders carry no vocabulary; give --data-dir, the folder of their captions.pickle")
        if encoders.image_encoder is None:
            raise CheckpointError(
                "these encoders have no image encoder; put image_encoder*.pth beside text_encoder*.pth"
            )
        check_vocabulary(encoders.text_encoder, vocabulary, str(encoders.file or "the text encoder"), "--data-dir")
        self.encoders, self.image_encoder, self.vocabulary = encoders, encoders.image_encoder, vocabulary
        self.lists, self.folds, self.seed = lists, folds, seed
        self.generators_encoder, self.folder = generators_encoder, folder
        self.device = next(self.image_encoder.parameters()).device
        self.codes: list[torch.Tensor] = []

    @classmethod
    def from_run(cls, run: Run) -> "RPrecision":
        protocol, encoders = run.protocol, run.tools.encoders
        if encoders is None:
            raise CheckpointError("no encoders; name a DAMSM checkpoint by --encoders")
        if len(run.requests) < protocol.folds:
            raise DataError(
                f"{len(run.requests)} images cannot be dealt to {protocol.folds} folds; score more, or sample them "
                f"with main.py and take fewer by eval/R_precision.py with {len(run.requests)} folds"
            )

        # The same lists for the script, and for other systems' images.
        lists = lists_for(run)
        about_samples = (run.text_encoder_hash, run.folder)
        return cls(encoders, run.vocabulary, lists, protocol.folds, protocol.seed, *about_samples)

    @torch.inference_mode()
    def update(self, batch: ScoringBatch) -> None:
        if len({image.shape for image in batch.images}) > 1:
            raise DataError("the sampled images differ in size; sample them again into one folder")

        pixels = torch.from_numpy(np.stack(batch.images)).to(self.device).permute(0, 3, 1, 2)
        with no_tf32():  # the encoder resizes the images itself
            self.codes.append(self.image_encoder(from_uint8(pixels))[1].float().cpu())

    def compute(self) -> list[Score]:
        lists, encoder = self.lists, encoder_hash(self.encoders)
        captions = encode_captions(lists.pool, self.encoders, self.vocabulary)
        codes = torch.cat(self.codes)  # (N, D)
        mean, std = r_precision(codes, captions, lists.true, lists.candidates, self.folds, self.seed)

        # Whether the generator was trained by these encoders.
        same = None if self.generators_encoder is None else self.generators_encoder == encoder
        about = {"encoder_hash": encoder, "num_images": len(codes), **about_lists(lists), "folds": self.folds}
        about |= {
            "seed": self.seed,
            "encoder_of_the_generator": same,
            "family": "damsm",
            "file": str(self.encoders.file or ""),
        }
        warnings = ()
        if same:
            warnings = (
                "R-precision: these are the encoders that the generator was trained with, which flatters it; score with "
                "encoders that were trained apart (--encoders)",
            )
        if same is None and self.folder is not None:
            warnings = (
                f"{self.folder}: does not say which encoders the generator was trained with; R-precision by the same ones "
                "would flatter it",
            )
        return [Score(f"R-precision%[damsm:{encoder[:8]}]", 100 * mean, about, std=100 * std, warnings=warnings)]


def lists_for(run: Run) -> CandidateLists:
    """The candidate lists of a run: drawn; for a folder of samples read from their file, or drawn and written to it.

    Raises DataError for too few captions, or a file of other samples or of another number of candidates.
    """
    protocol = run.protocol
    captions, keys = [r.caption for r in run.requests], [r.key for r in run.requests]
    if run.folder is None:
        return draw_candidates(captions, keys, protocol.candidates, protocol.seed)

    # Lists of an earlier run of the script.
    name = f"r_precision_{protocol.candidates}_seed{protocol.seed}.json"
    path = Path(run.tools.lists or run.folder / name)
    if path.is_file():
        lists = CandidateLists.load(path, run.files, captions)
        found = lists.candidates.shape[1]
        if found != protocol.candidates:
            raise DataError(
                f"{path}: has {found} wrong captions an image, --candidates says {protocol.candidates}; give "
                f"--candidates {found}, or another file with --lists"
            )
        return replace(lists, file=str(path))

    # New ones, kept for other systems.
    lists = draw_candidates(captions, keys, protocol.candidates, protocol.seed)
    try:
        lists.save(path, run.files)
    except (OSError, UserError) as error:
        raise DataError(
            f"{path}: the candidate lists cannot be written ({error}); give another place with --lists"
        ) from None
    return replace(lists, file=str(path))


def about_lists(lists: CandidateLists) -> dict:
    """The fields of a score's protocol that say among what captions an image's own was ranked."""
    num_candidates = lists.candidates.shape[1]
    about = {"candidates": num_candidates, "candidates_from": "other images, any class", "pool": len(lists.pool)}
    about |= {"unit": "%", "chance": 100 / (1 + num_candidates)}
    return about | ({"lists": lists.file, "lists_seed": lists.seed} if lists.file else {})


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--encoders", required=True, metavar="CKPT", help="DAMSM checkpoint, or text_encoder*.pth")
    add("--data-dir", metavar="DIR", help="folder of captions.pickle, for the authors' encoders")
    add_ranking_arguments(parser)


def tools_of(args: argparse.Namespace) -> Tools:
    """The encoders that the options name, with a vocabulary where --data-dir has one."""
    encoders = load_encoders(args.encoders, named_device(args.device))

    # The authors' encoders have no vocabulary.
    if args.data_dir and encoders.vocabulary is None:
        encoders = encoders._replace(vocabulary=released_vocabulary(args.data_dir))
    return Tools(encoders, lists=args.lists)


def main() -> None:
    run_script(RPrecision, add_options, tools_of=tools_of)


if __name__ == "__main__":
    run_command(main)
