"""What the fuzzer tries: for each kind of input a function (rng, folder) -> a call that must succeed or raise a UserError."""

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuzz import server, weights
from fuzz.odd import ODD, WORDS, Call, mutated, odd_json, scalar
from PIL import Image

from datasets import load_records
from datasets.layout import Entry, write_layout
from datasets.pickles import load_legacy_pickle
from datasets.sources import folder as own_folder
from datasets.sources.building import BuildOptions
from datasets.text_image import load_resized
from eval.features.sources import batches, open_source
from eval.features.statistics import load_statistics
from miscc.settings import Setting
from miscc.vocabulary import Vocabulary, encode_rows
from sampling.folders import prepare_folder
from sampling.requests import example_requests, read_captions
from training.settings import load_config, schema

SCHEMA: dict[str, Setting] = schema()


# -- kinds ---------------------------------------------------------------------------------------------------------


def settings(rng: random.Random, folder: Path) -> Call:
    """A YAML file and `--set` pairs."""
    lines = []
    for key in rng.sample(sorted(SCHEMA), rng.randrange(4)):
        *groups, last = key.split(".")
        lines.append("".join(f"{group}: {{" for group in groups) + f"{last}: {scalar(rng)}" + "}" * len(groups))
    text = rng.choice(["\n", "\n", "\r\n", "\n\n"]).join([*lines, *rng.sample(ODD, rng.randrange(2))])
    data = text.encode("utf-8", "surrogatepass")
    (folder / "x.yml").write_bytes(mutated(rng, data) if rng.random() < 0.5 else data)
    pairs = [(rng.choice([*SCHEMA, *ODD]), scalar(rng)) for _ in range(rng.randrange(3))]
    return lambda: load_config(folder / "x.yml", pairs, rng.choice(["gan", "damsm"]))


def one_setting(rng: random.Random, folder: Path) -> Call:
    """`--set` alone."""
    (folder / "x.yml").write_text("DATASET_NAME: folder\n")
    pairs = [(rng.choice([*SCHEMA]), scalar(rng)) for _ in range(rng.choice([1, 1, 2]))]
    return lambda: load_config(folder / "x.yml", pairs)


def caption_file(rng: random.Random, folder: Path) -> Call:
    """Captions that somebody typed, from a file."""
    lines = [" ".join(rng.choices(WORDS, k=rng.choice([0, 1, 5, 200]))) for _ in range(rng.randrange(4))]
    data = "\n".join(lines).encode(rng.choice(["utf-8", "utf-16", "latin-1"]), "replace")
    name = rng.choice(["captions.txt", "grüne Vögel.txt", "my captions.txt"])
    (folder / name).write_bytes(mutated(rng, data) if rng.random() < 0.5 else data)
    (folder / "example_filenames.txt").write_text(rng.choice([name, "../x", "x\0y", "/etc/hosts", *ODD[:9]]))
    vocabulary = Vocabulary(["<end>", "red", "bird"])

    def call() -> None:
        read = read_captions(folder / name) if rng.random() < 0.7 else [r.caption for r in example_requests(folder)]
        encode_rows(read, vocabulary, rng.choice([1, 18]))

    return call


def typed_caption(rng: random.Random, folder: Path) -> Call:
    """A caption of the command line or of a request."""
    text = rng.choice([" ", "", "-"]).join(rng.choices(WORDS, k=rng.choice([0, 1, 3, 20])))
    return lambda: encode_rows([text], Vocabulary(["<end>", "red", "bird"]), 18)


def caption_table(rng: random.Random, folder: Path) -> Call:
    """A folder of somebody's own images with a CSV, JSONL or COCO's JSON, and lists of splits."""
    (folder / "images").mkdir()
    for name in ("0.png", "1.png", "ein Vogel.png", "鳥.png"):
        (folder / "images" / name).touch()
    names = ["0.png", "1", "ein Vogel.png", "鳥", "2.png", "../x.png", *ODD[:4]]
    rows = [(rng.choice(names), " ".join(rng.choices(WORDS, k=rng.randrange(5)))) for _ in range(rng.randrange(6))]
    kind = rng.choice(["csv", "tsv", "jsonl", "json"])
    if kind == "jsonl":
        values = [
            rng.choice([{"image": i, "caption": c}, {"image": i, "captions": [c]}, odd_json(rng)]) for i, c in rows
        ]
        text = "\n".join(map(json.dumps, values))
    elif kind == "json":
        images = [{"id": n, "file_name": i} for n, (i, _) in enumerate(rows)] + [odd_json(rng)] * rng.randrange(2)
        annotations = [{"image_id": n, "caption": c} for n, (_, c) in enumerate(rows)] + [
            odd_json(rng)
        ] * rng.randrange(2)
        text = json.dumps({"images": images, "annotations": annotations})
    else:
        mark = rng.choice([",", ";", "\t", "|"])
        text = "\n".join(mark.join(row) for row in [("image", "caption"), *rows])
    data = text.encode(rng.choice(["utf-8", "utf-8", "utf-16", "latin-1"]), "replace")
    (folder / f"captions.{kind}").write_bytes(mutated(rng, data) if rng.random() < 0.5 else data)
    (folder / "train.txt").write_text("\n".join(rng.sample(["0.png", "1.png", "鳥", "x"], rng.randrange(4))))
    return lambda: own_folder.build(folder, BuildOptions(name="folder"))


def layout(rng: random.Random, folder: Path) -> Call:
    """The common layout, edited by hand."""
    (folder / "images").mkdir()
    (folder / "images" / "0.png").touch()
    entries = [Entry(f"k{n}", "images/0.png", ["a red bird"], n) for n in range(3)]
    write_layout(folder, {"train": entries, "test": entries})
    path = folder / rng.choice(["train.jsonl", "train.jsonl", "vocabulary.json"])
    if rng.random() < 0.5 and path.suffix == ".jsonl":
        record = {"key": "k", "image": "images/0.png", "captions": ["a bird"], "class_id": 0, "box": [1, 2, 3, 4]}
        record[rng.choice(list(record))] = odd_json(rng)
        path.write_text(path.read_text() + json.dumps(record) + "\n")
    else:
        path.write_bytes(mutated(rng, path.read_bytes()))
    return lambda: load_records("folder", folder, "train")


_PICKLES = [
    pickle.dumps([[[1, 2], [2]], [[1]], {0: "<end>", 1: "red", 2: "bird"}, {"red": 1}], protocol=protocol)
    for protocol in (0, 1, 2, 4)
]


def metadata(rng: random.Random, folder: Path) -> Call:
    """AttnGAN's pickles."""
    (folder / "images").mkdir()
    for name in ("a", "b"):
        (folder / "images" / f"{name}.png").touch()
    (folder / "train").mkdir()
    files = {
        "captions.pickle": rng.choice(_PICKLES),
        "train/filenames.pickle": pickle.dumps(["a", "b"], protocol=2),
        "train/class_info.pickle": pickle.dumps([1, 2], protocol=2),
    }
    changed = rng.choice(list(files))
    for name, content in files.items():
        odd = (
            pickle.dumps(odd_json(rng), protocol=rng.choice([0, 2, 4])) if rng.random() < 0.3 else mutated(rng, content)
        )
        (folder / name).write_bytes(odd if name == changed else content)
    return lambda: load_records("folder", folder, "train")


def raw_pickle(rng: random.Random, folder: Path) -> Call:
    """A pickle of random operations."""
    codes = b"()]}aesubtRcio\x8c\x93\x94.0124NKMJUTXBCprqhgj\x80\x95\x96\x8e\x8b\x8d\x88\x89\x85\x86\x87\x81"
    array = pickle.dumps(np.arange(3), protocol=rng.choice([2, 4]))
    data = bytes(rng.choice(codes) if rng.random() < 0.7 else rng.randrange(256) for _ in range(rng.randrange(40)))
    (folder / "x.pickle").write_bytes(rng.choice([data + b".", mutated(rng, array), b"\x80\x02" + data]))
    return lambda: load_legacy_pickle(folder / "x.pickle")


def _images() -> dict[str, bytes]:
    """One of each kind, small."""
    found = {}
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 4), dtype=np.uint8)
    rgb = Image.fromarray(pixels[..., :3])
    grey16 = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    for name, image, options in (
        ("a.jpg", rgb, {}), ("b.jpg", rgb.convert("CMYK"), {}), ("c.png", Image.fromarray(pixels), {}), ("d.png", grey16, {}),
        ("e.gif", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}), ("f.webp", rgb, {}), ("g.bmp", rgb, {}),
        ("h.tif", rgb, {}), ("i.png", rgb.convert("P"), {}), ("j.png", rgb.resize((1, 1)), {}), ("k.tif", grey16, {}),
    ):  # fmt: skip
        stream = io.BytesIO()
        image.save(stream, {"jpg": "jpeg", "tif": "tiff"}.get(name[2:], name[2:]), **options)
        found[name] = stream.getvalue()
    stream = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(stream, "png")
    Image.new("L", (1, 65_000)).save(narrow := io.BytesIO(), "png")
    return found | {"bomb.png": stream.getvalue(), "narrow.png": narrow.getvalue(), "empty.png": b""}


IMAGES = _images()


def image(rng: random.Random, folder: Path) -> Call:
    """An image, whole or damaged, perhaps with the suffix of another kind."""
    name = rng.choice(list(IMAGES))
    data = IMAGES[name] if rng.random() < 0.2 else mutated(rng, IMAGES[name])
    path = folder / rng.choice([name, "x.jpg", "x.png", "ein grüner Vogel.png", "鳥.jpg"])
    path.write_bytes(data)
    if rng.random() < 0.02:
        path.unlink()
        rng.choice([lambda: path.symlink_to(path), lambda: os.mkfifo(path), path.mkdir])()
    box = rng.choice([None, None, [0, 0, 5, 5], [-3, -3, 50, 50], [float("nan"), 0, 1, 1], [1e8, 1, 2, 2]])
    return lambda: load_resized(path, box, rng.choice([16, 64]))


def samples(rng: random.Random, folder: Path) -> Call:
    """A folder, list, zip or array of images to be scored."""
    Image.new("RGB", (4, 4)).save(folder / "a_c0_s0.png")
    kind = rng.choice(["folder", "list", "zip", "npy", "npz"])
    if kind == "folder":
        record = {"file": "a_c0_s0.png", "caption": "a bird", "key": "k", "caption_number": 0, "sample": 0}
        record[rng.choice(list(record))] = odd_json(rng)
        line = json.dumps(rng.choice([record, odd_json(rng)])).encode()
        (folder / "captions.jsonl").write_bytes(mutated(rng, line) if rng.random() < 0.5 else line)
        if rng.random() < 0.3:
            return lambda: prepare_folder(folder, overwrite=False)
        path = folder
    elif kind == "list":
        path = folder / "list.txt"
        path.write_bytes(mutated(rng, b"a_c0_s0.png\n./a_c0_s0.png\n"))
    elif kind == "zip":
        path = folder / "x.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(folder / "a_c0_s0.png", "a.png")
        path.write_bytes(mutated(rng, path.read_bytes()))
    else:
        path = folder / f"x.{kind}"
        array = np.zeros(rng.choice([(2, 4, 4, 3), (2, 3, 4, 4), (2, 4, 4), (0, 4, 4, 3), ()]), np.uint8)
        (np.save if kind == "npy" else np.savez)(path, array)
        path.write_bytes(mutated(rng, path.read_bytes()))
    return lambda: list(batches(open_source(path), 2, workers=1))


def statistics(rng: random.Random, folder: Path) -> Call:
    """A .npz of mean and covariance."""
    made_by = np.array(rng.choice(["{}", json.dumps(odd_json(rng)), '{"protocol": 3}', "["]))
    np.savez(
        folder / "x.npz", mu=np.zeros(2), sigma=np.eye(rng.choice([2, 2, 3])), num_images=np.array(5), made_by=made_by
    )
    if rng.random() < 0.7:
        (folder / "x.npz").write_bytes(mutated(rng, (folder / "x.npz").read_bytes()))
    return lambda: load_statistics(folder / "x.npz")


# Each kind, and how often it is tried.
KINDS: dict[str, tuple[Callable[[random.Random, Path], Call], int]] = {
    "settings": (settings, 6), "one_setting": (one_setting, 12), "caption_file": (caption_file, 12),
    "typed_caption": (typed_caption, 20), "caption_table": (caption_table, 6), "layout": (layout, 6),
    "metadata": (metadata, 8), "raw_pickle": (raw_pickle, 12), "image": (image, 10), "samples": (samples, 5),
    "statistics": (statistics, 3), **weights.KINDS, **server.KINDS,
}  # fmt: skip
