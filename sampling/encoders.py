"""Loads encoders with their vocabulary: DAMSM's, of a checkpoint or of the authors' files, and CLIP's."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch

from datasets.captions import METADATA_NAMES, load_captions_pickle
from miscc.byte_pairs import vocabulary_of
from miscc.checkpoint import load_file, validate
from miscc.errors import CheckpointError, DataError
from miscc.vocabulary import Vocabulary
from models import networks_of
from models.clip_files import load_clip_weights, load_tokenizer
from models.registry import from_state, with_weight_file
from models.released import load_image_encoder, load_text_encoder, naming
from models.types import CaptionEncoder, Generator, ImageEncoder, Network
from sampling.published import is_published, read_published, weight_file


class Encoders(NamedTuple):
    """A text encoder with what was trained with it.

    text_encoder, image_encoder: networks in eval mode without gradients; None where there is no image encoder
    vocabulary: None for the authors' files, which hold none: it then comes from the data's captions.pickle
    max_words: words of a caption at most
    file: the weight file that they were loaded from, where there is one
    """

    text_encoder: CaptionEncoder
    image_encoder: ImageEncoder | None
    vocabulary: Vocabulary | None
    max_words: int
    file: Path | None = None

    @property
    def image_size(self) -> int:
        """The size, in pixels, that the image encoder resizes images to."""
        if self.image_encoder is None:
            raise CheckpointError("there is no image encoder beside this text encoder")
        return self.image_encoder.image_size


def load_encoders(
    path: str | Path,
    device: str | torch.device = "cpu",
    max_words: int = 18,
    backbone_weights: str = "",
    backbone: str | None = None,
    with_image_encoder: bool = True,
) -> Encoders:
    """DAMSM's encoders, frozen and in eval mode, from our checkpoint, a published model or the authors' text_encoder*.pth.

    The authors' image_encoder*.pth is looked for beside it.

    max_words: for the authors' files, which do not store it
    backbone_weights: where the weights of the image encoder's frozen backbone lie now; "": where they did
    backbone: whose weights those are; None: the image encoder's, whichever it is
    with_image_encoder: False: the image encoder is not read, whatever it is

    Raises CheckpointError when a file is missing, broken or of another kind.
    """
    path = Path(path)
    if not weight_file(path).is_file():
        raise CheckpointError(
            f"{path}: no such encoders; train them with `python pretrain_DAMSM.py --cfg cfg/DAMSM/...` and the file of your "
            f"data set (bird.yml, coco.yml, folder.yml), or point TEXT.DAMSM_NAME at a released text_encoder200.pth"
        )

    # One of ours, or a published model, which has no image encoder.
    content = read_published(path) if is_published(path) else load_file(path)
    if isinstance(content, dict) and "networks" in content:
        validate(content, path)
        parts = ("text_encoder", "image_encoder") if with_image_encoder else ("text_encoder",)
        entries = {
            name: with_weight_file(entry, backbone_weights, backbone) for name, entry in content["networks"].items()
        }
        networks = networks_from_state({"networks": entries}, parts, path)
        if "text_encoder" not in networks:
            raise CheckpointError(f"{path}: holds no text encoder but {', '.join(content['networks'])}")
        text_encoder = cast(CaptionEncoder, networks["text_encoder"])
        image_encoder = cast("ImageEncoder | None", networks.get("image_encoder"))
        vocabulary, max_words = vocabulary_of(content["vocabulary"]), text_encoder.max_words

    # The authors'.
    else:
        with naming(path):
            text_encoder, vocabulary = load_text_encoder(content), None
        text_encoder.change_settings(max_words=max_words)
        beside = path.with_name(path.name.replace("text_encoder", "image_encoder"))
        found = with_image_encoder and beside != path and beside.is_file()
        with naming(beside):
            image_encoder = load_image_encoder(load_file(beside)) if found else None

    # Frozen: a loss or a score reads them, nothing trains them.
    for encoder in (text_encoder, image_encoder):
        if encoder is not None:
            encoder.to(device).eval().requires_grad_(False)
    return Encoders(text_encoder, image_encoder, vocabulary, max_words, path)


def load_clip_encoders(
    name: str | Path, device: str | torch.device = "cpu", max_words: int = 77, scaled_twice: bool = True
) -> Encoders:
    """CLIP's towers with its own tokenizer, see models/clip_files.py for `name`; captions are read whole, up to 77 tokens.

    scaled_twice: as GALIP's images were. Raises CheckpointError when weights or tokenizer are missing.
    """
    clip, files = load_clip_weights(name, scaled_twice=scaled_twice)
    clip = clip.to(device)
    return Encoders(clip.text_encoder, clip.visual, load_tokenizer(files), clip.text_encoder.max_words, files.weights)


# What TEXT.ENCODER may be: kinds of encoders, each loaded by (path, device, words of a caption at most).
ENCODERS: dict[str, Callable[..., Encoders]] = {"damsm": load_encoders, "clip": load_clip_encoders}


def released_vocabulary(data_dir: str | Path) -> Vocabulary:
    """The vocabulary of AttnGAN's captions.pickle in a data folder. Raises DataError when there is none."""
    for name in METADATA_NAMES:
        if (Path(data_dir) / name).is_file():
            return load_captions_pickle(Path(data_dir) / name)[2]
    raise DataError(
        f"{data_dir}: holds no captions.pickle; the authors' encoders need the vocabulary in it (one built anew has other "
        f"indices): set DATA_DIR to the folder of AttnGAN's metadata"
    )


def check_sentence_length(text_encoder: CaptionEncoder, generator: Generator, path: str | Path) -> None:
    """Raises CheckpointError where the encoders of this path give other features than the generator takes."""
    # A generator without that argument takes any.
    actual = text_encoder.arguments["text_dim"]
    expected = generator.arguments.get("sentence_dim", actual)
    if actual != expected:
        raise CheckpointError(f"{path}: gives features of length {actual}, the generator expects {expected}")


def check_vocabulary(text_encoder: CaptionEncoder, vocabulary: Vocabulary, source: str, data_dir: str | Path) -> None:
    """Raises CheckpointError where the encoder knows another number of words than the vocabulary has: its indices differ.

    source: the encoder's setting and file, for the error.
    data_dir: whose captions.pickle gives the vocabulary of encoders that hold none.
    """
    num_known = text_encoder.embedding.num_embeddings
    if num_known != len(vocabulary):
        raise CheckpointError(
            f"{source} knows {num_known} words, its vocabulary (without one of its own, the captions.pickle in {data_dir}) has "
            f"{len(vocabulary)}; take the one that these encoders were trained with"
        )


def networks_from_state(checkpoint: dict, names: tuple[str, ...], path: str | Path) -> dict[str, Network]:
    """{name: network} of these names that the checkpoint holds, in eval mode without gradients.

    path: for errors.
    """
    networks = {}
    for name in names:
        if name not in checkpoint["networks"]:
            continue

        # A tensor that does not fit is reported with file and network.
        with naming(f"{path}: its {name}"):
            network = from_state(checkpoint["networks"][name], networks_of(name))
        networks[name] = network.eval().requires_grad_(False)
    return networks
