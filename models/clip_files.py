"""CLIP's weights and tokenizer on this disk: OpenAI's, Hugging Face's and open_clip's files. Nothing is downloaded.

The user names a weight file, a folder, or a model in Hugging Face's cache.
"""

import importlib.util
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from miscc.byte_pairs import FILES, BytePairs, read_merges
from miscc.checkpoint import load_file
from miscc.errors import CheckpointError
from miscc.files import read_bytes, read_json
from models.clip_features import LAYERS, Clip, load_clip

MODEL = "openai/clip-vit-base-patch32"  # GALIP's, and that of CLIPScore's and CLIP-R-precision's papers
UNTRAINED = "untrained"  # instead of a file: a small CLIP with random weights
# In a folder, the first of these that is there.
WEIGHT_FILES = ("ViT-B-32.pt", "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
                "open_clip_pytorch_model.bin")  # fmt: skip
WHERE = (
    "copy OpenAI's ViT-B-32.pt, or a folder as Hugging Face (`hf download openai/clip-vit-base-patch32`) or open_clip keep one, "
    "to this machine and name its path"
)

# Hugging Face's tensor names -> OpenAI's, after the three projections of an attention are joined.
HUGGING_FACE = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.self_attn\.in_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


class ClipFiles(NamedTuple):
    """Where a CLIP lies, and what the shapes of its tensors do not say.

    weights: the weight file.
    merges: the tokenizer's file; None where there is none.
    activation: of both towers.
    image_heads, text_heads: attention heads of the towers; 0: width/64.
    """

    weights: Path
    merges: Path | None
    activation: str = "quick_gelu"
    image_heads: int = 0
    text_heads: int = 0


def find_clip(name: str | Path) -> ClipFiles:
    """The files of a CLIP. Raises CheckpointError with all places that were searched.

    name: a weight file, a folder, or owner/name of a model in Hugging Face's cache.
    """
    path = Path(name).expanduser()

    # A weight file, with its tokenizer and description beside it.
    if path.is_file():
        return ClipFiles(path, find_merges(path.parent), **read_description(path.parent))

    # A folder, or the caches under this name.
    folders = [path, *cached_folders(str(name))]
    for folder in folders:
        for file in WEIGHT_FILES:
            if (folder / file).is_file():
                return ClipFiles(folder / file, find_merges(folder), **read_description(folder))

    # Nothing found.
    what = "a folder without a CLIP's weights" if path.is_dir() else "no such file or folder"
    places = ", ".join(str(folder) for folder in folders[1:])
    raise CheckpointError(f"{name}: {what}{f', and not in {places}' if places else ''}; nothing is downloaded: {WHERE}")


def load_clip_weights(
    name: str | Path, layers: Sequence[int] = LAYERS, scaled_twice: bool = False
) -> tuple[Clip, ClipFiles]:
    """Both towers of a CLIP on this disk, frozen; see `find_clip` and models.clip_features.load_clip."""
    files = find_clip(name)
    state = openai_names(read_tensors(files.weights))

    # Shapes that do not fit are reported with the file.
    try:
        return load_clip(state, layers, files.activation, scaled_twice, files.image_heads, files.text_heads), files
    except CheckpointError as error:
        raise CheckpointError(f"{files.weights}: {error}") from None


def load_tokenizer(files: ClipFiles) -> BytePairs:
    """The tokenizer that goes with a CLIP. Raises CheckpointError where there is none, DataError for a damaged one."""
    if files.merges is None:
        raise CheckpointError(
            f"{files.weights.parent}: holds CLIP's weights, but not its tokenizer; copy one of {', '.join(FILES)} beside them "
            f"(of Hugging Face's or OpenAI's CLIP), or pip install open_clip_torch, which brings it along"
        )
    return BytePairs.of_merges(read_merges(files.merges))


def cached_folders(name: str) -> list[Path]:
    """Where the caches of Hugging Face and of OpenAI's package would have a CLIP of this name; [] if it is no such name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return []

    # Hugging Face's folders, by its own environment variables.
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home / "huggingface") / "hub"
    model = Path(hub) / f"models--{name.replace('/', '--')}"

    # The snapshot that `main` points to, else whichever is there.
    reference = model / "refs" / "main"
    if reference.is_file():
        try:
            folders = [model / "snapshots" / read_bytes(reference, 1 << 10).decode("utf-8").strip()]
        except ValueError as error:
            raise CheckpointError(f"{reference}: names no snapshot ({error}); download the model again") from None
    else:
        folders = sorted((model / "snapshots").glob("*")) or [model]
    return [*folders, *([home / "clip"] if name == MODEL else [])]


def find_merges(folder: Path) -> Path | None:
    """The tokenizer's merges in a folder, else those that an installed open_clip or clip brings along; None without any."""
    # Packages are searched, not imported: an import takes seconds.
    packages = [importlib.util.find_spec(package) for package in ("open_clip", "clip")]
    installed = [Path(place) for spec in packages if spec for place in spec.submodule_search_locations or ()]
    return next((place / file for place in (folder, *installed) for file in FILES if (place / file).is_file()), None)


def read_description(folder: Path) -> dict[str, Any]:
    """{"activation", "image_heads", "text_heads"} from Hugging Face's or open_clip's description in a folder; {} without one."""
    for file, read in (("config.json", _hugging_face), ("open_clip_config.json", _open_clip)):
        # Descriptions are optional: a damaged one is ignored.
        try:
            return read(read_json(folder / file))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return {}


def _hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    image, text = config.get("vision_config") or {}, config.get("text_config") or {}
    heads = {f"{name}_heads": part.get("num_attention_heads", 0) for name, part in (("image", image), ("text", text))}
    return {"activation": text.get("hidden_act") or "quick_gelu"} | heads


def _open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    config = config.get("model_cfg", config)
    image, text = config.get("vision_cfg") or {}, config.get("text_cfg") or {}

    # open_clip gives the width of a head, not their number.
    image_heads = image.get("width", 0) // image.get("head_width", 64)
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    return {"activation": activation, "image_heads": image_heads, "text_heads": text.get("heads", 0)}


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """A weight file's tensors by name. Raises CheckpointError."""
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)

        # OpenAI's own files contain code, too: it is loaded, but not called.
        if _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch.jit's future: OpenAI's files are what they are
                return torch.jit.load(path, map_location="cpu").state_dict()
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise CheckpointError(f"{path}: cannot be read as CLIP's weights ({reason}); copy it again") from None

    # Everything else as a weight file, which runs no code.
    content = load_file(path)
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds something else than the tensors of a network; name CLIP's weight file")
    return {name.removeprefix("module."): value for name, value in content.items()}


def openai_names(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors under OpenAI's names: Hugging Face's are renamed, open_clip's have these names already."""
    if not any(name.startswith("vision_model.") for name in state):
        return state

    # Join query, key and value, once for all three; transpose the projections, which are linear layers there.
    joined: dict[str, Any] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.self_attn\.)([qkv])_proj\.(weight|bias)", name)
        if found is None:
            joined[name] = value.T if name in ("visual_projection.weight", "text_projection.weight") else value
        elif found[2] == "q":
            names = [f"{found[1]}{part}_proj.{found[3]}" for part in "qkv"]
            if all(part in state for part in names):
                joined[f"{found[1]}in_proj.{found[3]}"] = torch.cat([state[part] for part in names])

    # Then rename, pattern by pattern.
    renamed = {}
    for name, value in joined.items():
        for pattern, replacement in HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _is_torchscript(path: Path) -> bool:
    """OpenAI's files are TorchScript archives: zip files with code beside the tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())
