"""The fuzzer's kinds of weight files: checkpoints, the authors' files, published folders."""

import functools
import io
import json
import os
import pickle
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from fuzz.odd import ODD, Call, mutated, odd_json
from golden import OWN, fill_state, load

from miscc.checkpoint import load_checkpoint, validate
from miscc.config import Config, to_plain
from models.choice import chosen_system
from models.damsm import TextEncoder
from models.df_gan import DFGenerator
from models.registry import network_name, to_state
from models.released import load_discriminator_files
from models.types import Discriminator
from sampling.convert import describe
from sampling.encoders import load_encoders
from sampling.pipeline import TextToImage
from sampling.published import find_published, hash_of_file
from serve.torch_model import TorchModel
from training.build import build_networks, build_system, resumed_networks
from training.resume import check_resumable, restore_state
from training.settings import load_config
from training.step import make_optimizers

WORDS = ["<end>", "red", "bird", "with", "wings"]
TINY = [
    ("DATASET_NAME", "folder"), ("TREE.BASE_SIZE", "16"), ("TRAIN.NF", "1"), ("TRAIN.DAMSM_WEIGHT", "0"),
    ("GAN.NAME", "ssa_gan"), ("TEXT.EMBEDDING_DIM", "16"),
]  # fmt: skip


# -- whole files ---------------------------------------------------------------------------------------------------


@functools.cache
def settings() -> Config:
    """The settings of a training of tiny networks."""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "x.yml")).write_text("")
        return load_config(path, TINY)


def whole() -> dict[str, Any]:
    """A checkpoint of a training with everything; its dicts are new each time, its tensors shared."""
    return _copy(_whole())


@functools.cache
def _whole() -> dict[str, Any]:
    torch.manual_seed(0)
    system = chosen_system(settings())
    networks: dict[str, Any] = {**build_networks(system), "text_encoder": TextEncoder(len(WORDS), text_dim=16)}
    optimizers = make_optimizers(build_system(system, networks).optimizers())
    for optimizer in optimizers.values():  # a step, after which there is a state
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    states = {part: to_state(network_name(network), network) for part, network in networks.items()}
    return {
        "format": 1, "config": to_plain(settings()), "vocabulary": WORDS, "step": 3, "epoch": 1, "num_averaged": 3,
        "networks": states | {"generator_ema": states["generator"]}, "data": {"num_images": 4},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
    }  # fmt: skip


def _copy(tree: Any) -> Any:
    """The same with containers of its own."""
    if isinstance(tree, dict):
        return {name: _copy(value) for name, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


@functools.cache
def published_files() -> dict[str, bytes]:
    """The files of a published model, by name."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(_whole(), Path(folder, "x.pth"))
        made = TextToImage.load(Path(folder, "x.pth"), "cpu").save_pretrained(Path(folder, "model"), ["a red bird"])
        return {path.name: path.read_bytes() for path in made.iterdir()}


@functools.cache
def _released(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors as the authors' files have them, by part."""
    about, _ = load(OWN, name)
    return {
        part: fill_state(shapes, 1)
        for part, shapes in about.items()
        if isinstance(shapes, dict) and all(isinstance(shape, list) for shape in shapes.values())
    }


# -- damage --------------------------------------------------------------------------------------------------------


def odd_tensors(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Another shape, type, layout or value than a tensor had."""
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t[:-1] if t.dim() else t[None],
        lambda t: t.T if t.dim() == 2 else t[None],
        lambda t: t.reshape(-1),
        lambda t: t[:0] if t.dim() else t,
        lambda t: torch.zeros(1).expand(rng.choice([7, 10**4]), 10**6),
        lambda t: t.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64])),
        lambda t: torch.full_like(t, rng.choice([float("nan"), float("inf"), 1e38, 0.0]), dtype=torch.float32),
        lambda t: t.to_sparse() if t.dim() else t,
        lambda t: torch.zeros(t.shape, device="meta"),
        lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    ]  # fmt: skip
    try:
        return rng.choice(changes)(tensor)
    except (RuntimeError, NotImplementedError):  # of a tensor that was changed already
        return tensor


def odd_value(rng: random.Random, value: Any) -> Any:
    """Something else in the place of a value of a checkpoint."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.6:
        return odd_tensors(rng, value)
    other: Any = rng.choice(
        [None, True, -1, 10**9, 2**70, 0.5, float("nan"), "x", [], {}, {1: 2}, [1], (), odd_json(rng)]
    )
    return torch.zeros(2) if rng.random() < 0.1 else other


def _places(tree: Any) -> Iterator[tuple[dict[Any, Any], Any]]:
    """(dict, name) of every value in nested dicts."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield tree, name
        yield from _places(value)


def damage(rng: random.Random, tree: dict[str, Any]) -> None:
    """Replace, remove, rename, add or exchange a value of nested dicts; values near the top as often as the many tensors."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, name = tree, rng.choice(list(tree))
        while isinstance(at[name], dict) and at[name] and rng.random() < 0.8:
            at, name = at[name], rng.choice(list(at[name]))
        what = rng.randrange(6)
        if what < 3:
            at[name] = odd_value(rng, at[name])
        elif what == 3:
            del at[name]
        elif what == 4:
            at[rng.choice(["x", 3, "", "..", *ODD[:9]])] = at[name] if rng.random() < 0.5 else at.pop(name)
        else:
            others = list(_places(tree))
            other, its_name = rng.choice(others)
            at[name] = _copy(other[its_name])  # a copy: no value may hold itself
        if not tree:
            return


def _archive(rng: random.Random, data: bytes) -> bytes:
    """torch's zip file with members that are missing, twice, cut off or changed, under right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    place = rng.randrange(len(members)) if rng.random() < 0.5 else 0  # the first is the pickle
    name, content = members[place]
    what = rng.randrange(7)
    if what == 0:
        del members[place]
    elif what == 1:
        members.append((name, mutated(rng, content)))
    elif what == 2:
        members[place] = (rng.choice(["../x", "/x", "x/data.pkl", *ODD[8:12]]).replace("\ud800", "x") or "x", content)
    else:
        members[place] = (name, content[: len(content) // 2] if what == 3 else mutated(rng, content))

    # The file anew.
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream := io.BytesIO(), "w", kind) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def write_weights(rng: random.Random, path: Path, content: Any) -> None:
    """Save as torch does, then perhaps damage the bytes."""
    is_zip = rng.random() < 0.85
    try:
        torch.save(content, stream := io.BytesIO(), _use_new_zipfile_serialization=is_zip)
    except (RuntimeError, AttributeError, NotImplementedError, pickle.PicklingError):  # what torch does not save
        torch.save(torch.zeros(1), stream := io.BytesIO())
    data = stream.getvalue()
    kind = rng.random()
    if kind < 0.15:
        data = mutated(rng, data)
    elif kind < 0.3 and is_zip:
        data = _archive(rng, data)
    elif kind < 0.33:
        data = rng.choice(
            [b"", b"PK", b"PK\x03\x04", b"\x80", b"\x80\x02.", b"version https://git-lfs", pickle.dumps([1])]
        )
    path.write_bytes(data)


# -- kinds ---------------------------------------------------------------------------------------------------------


def _draw(model: TextToImage) -> None:
    """An image of a model that could be loaded."""
    images, _ = model.generate(["a red bird with red wings"])
    assert images.shape[0] == 1 and images.shape[3] == 3


def _resume(path: Path) -> None:
    """What `--resume` does with a checkpoint before it reads the data."""
    validate(checkpoint := load_checkpoint(path), path)
    check_resumable(checkpoint, settings())
    system = chosen_system(settings())
    networks, _ = resumed_networks(system, checkpoint)
    restore_state(make_optimizers(build_system(system, cast(Any, networks)).optimizers()), None, checkpoint)


def checkpoint(rng: random.Random, folder: Path) -> Call:
    """A checkpoint of ours: other values, tensors, systems and words; damaged archives."""
    content, resumes = whole(), rng.random() < 0.2
    if not resumes:  # other uses read neither
        del content["optimizers"], content["networks"]["discriminator"]
    what = rng.random()
    if what < 0.1:
        other = DFGenerator(nf=rng.choice([1, 2]), image_size=16, sentence_dim=rng.choice([16, 256]))
        content["networks"][rng.choice(["generator", "generator_ema"])] = to_state("df_gan", other)
    elif what < 0.2:
        words = rng.choice([WORDS[::-1], WORDS[:-1], [*WORDS, "x"], ["red"] * 5, [], ["<end>", *ODD[:4]], [1] * 5])
        content["vocabulary"] = words
    elif what < 0.8:
        damage(rng, content)
    path = folder / rng.choice(["last.pth", "ein Vogel.pth", "x"])
    write_weights(rng, path, content)
    if resumes:
        return lambda: _resume(path)
    return rng.choice([
        lambda: _draw(TextToImage.load(path, "cpu", averaged=rng.random() < 0.5)),
        lambda: TorchModel("x", TextToImage.load(path, "cpu")).describe(),
        lambda: describe(path),
        lambda: load_encoders(path),
    ])  # fmt: skip


def released(rng: random.Random, folder: Path) -> Call:
    """The authors' weight files: tensors missing, of other shapes and types, in other wrappings."""
    parts = _released(rng.choice(["ssa_gan", "df_gan", "damsm", "sema", "attn_gan"]))
    part = rng.choice(list(parts))
    content: dict[str, Any] = dict(parts[part])
    if rng.random() < 0.7:
        damage(rng, content)
    if rng.random() < 0.5:
        prefix = rng.choice(["module.", "module.module.", "x.", ""])
        content = {f"{prefix}{name}": tensor for name, tensor in content.items()}
    for _ in range(rng.choice([0, 0, 1, 2, 6])):
        content = {rng.choice(["netG", "netD", "model", "state_dict", "x", "networks", "format"]): content}
    path = folder / rng.choice(["netG.pth", "text_encoder.pth", "netD0.pth"])
    write_weights(rng, path, content)
    like = cast(Discriminator, build_networks(chosen_system(settings()))["discriminator"])
    reads: list[Call] = [lambda: describe(path), lambda: load_encoders(path)]
    return rng.choice([*reads, lambda: load_discriminator_files(path, like)])


def _odd_header(rng: random.Random, data: bytes) -> bytes:
    """safetensors' file with another header: sizes, offsets, types and shapes that cannot be, overlaps, odd JSON."""
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    what = rng.randrange(7)
    if what == 0:
        entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I64", "BOOL", "U8", "F8_E4M3", "F4", "C64", "x", 3, None])
    elif what == 1:
        entry["shape"] = rng.choice([[], [0], [-1], [2**63], [2**40, 2**40], [1] * 99, "x", [0.5], [10**30], [3, 3]])
    elif what == 2:
        entry["data_offsets"] = rng.choice([[0, 4], [0, len(values)], [4, 0], [-1, 3], [2**63, 2**64 - 1], [1], "x"])
    elif what == 3:
        damage(rng, header)
    elif what == 4:
        header["__metadata__"] = odd_json(rng)
    text = json.dumps(header, default=str).encode()
    text = mutated(rng, text) if what == 5 else text
    size = rng.choice([0, 1, len(text) * 2, 2**31, 2**40, 2**64 - 1]) if what == 6 else len(text)
    return size.to_bytes(8, "little") + text + values[: rng.choice([None, None, 0, -1, 7])]


def _odd_text(rng: random.Random, text: bytes) -> bytes:
    """JSON with another value, keys given twice, damaged, deep, large, or in another coding."""
    what = rng.randrange(8)
    value = json.loads(text)
    if what < 3 and isinstance(value, dict):
        damage(rng, value)
        text = json.dumps(value, default=str).encode()
    elif what == 3:
        text = mutated(rng, text)
    elif what == 4:
        text = json.dumps(odd_json(rng)).encode()
    elif what == 5:
        text = rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe" + text, text.decode().encode("utf-16"), b""])
    elif what == 6 and isinstance(value, dict):
        text = b'{"format": 1, "generator": {}, ' + text.lstrip(b"{ \n")
    elif rng.random() < 0.2:
        text = text.rstrip()[:-1] + b"," + b" " * rng.choice([1 << 20, 1 << 26]) + text.lstrip()[1:]
    return text


def _odd_file(rng: random.Random, path: Path) -> None:
    """Something else in the place of a file: nothing, a folder, a pipe, a link outside, to itself or without end."""
    content = path.read_bytes()
    path.unlink()
    outside = path.parent.parent / "outside"
    rng.choice([
        lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path), lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("../../../etc/passwd"), lambda: (outside.write_bytes(content), path.symlink_to(outside)),
    ])()  # fmt: skip


def published(rng: random.Random, folder: Path) -> Call:
    """The folder of a published model with one of its files damaged, missing, or something else."""
    model = folder / rng.choice(["model", "ein Vogel", "鳥"])
    model.mkdir()
    files = dict(published_files())
    weights, what = files["model.safetensors"], rng.random()
    if what < 0.4:
        files["model.safetensors"] = _odd_header(rng, weights) if rng.random() < 0.8 else mutated(rng, weights)
    elif what < 0.9:
        name = "config.json" if what < 0.7 else "vocabulary.json"
        files[name] = _odd_text(rng, files[name])
    for name, content in files.items():
        (model / name).write_bytes(content)

    # The checksum of the weights as they are now, of former ones, or none.
    if what < 0.4 and rng.random() < 0.9:
        config = json.loads(files["config.json"])
        del config["sha256"]
        if rng.random() < 0.5:
            config["sha256"] = hash_of_file(model / "model.safetensors")
        (model / "config.json").write_text(json.dumps(config))
    elif what >= 0.9:
        _odd_file(rng, model / rng.choice(list(files)))
        (model / "model.py").write_text("raise SystemExit")
    return rng.choice([
        lambda: _draw(TextToImage.from_pretrained(model, "cpu")),
        lambda: TorchModel("x", TextToImage.load(find_published(model), "cpu")).describe(),
        lambda: describe(model),
    ])  # fmt: skip


KINDS: dict[str, tuple[Callable[[random.Random, Path], Call], int]] = {
    "checkpoint": (checkpoint, 3), "released": (released, 1), "published": (published, 3),
}  # fmt: skip
