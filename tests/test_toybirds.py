"""ToyBirds: the drawings are a pure function, captions and masks tell the truth."""

import hashlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.toybirds import attributes as toybirds_attributes
from datasets.toybirds import dataset as toybirds
from datasets.toybirds.captions import write_captions
from datasets.toybirds.dataset import ATTRIBUTES, CLASS_IDS, PALETTE, ToyBirds, class_id, class_name, named_attributes
from datasets.toybirds.drawing import JITTER, draw, shade
from miscc.errors import DataError
from miscc.randomness import stream

ROOT = Path(__file__).parents[1]
PARTS = ("crown_color", "wing_color", "belly_color")


def digest(birds, indices):
    value = hashlib.sha256()
    for index in indices:
        bird = birds[index]
        value.update(bird.image.tobytes() + bird.mask.tobytes())
        value.update(json.dumps([bird.attributes, bird.captions]).encode())
    return value.hexdigest()


def run_python(code, **environment):
    """Run code in a process of its own in the repository."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


# --- a pure function of (split, index, image_size) ---


def test_item_has_the_promised_form():
    bird = ToyBirds("test", image_size=48)[7]
    assert bird.image.shape == (48, 48, 3) and bird.image.dtype == np.uint8
    assert bird.mask.shape == (48, 48) and bird.mask.dtype == np.uint8
    assert list(bird.attributes) == list(ATTRIBUTES)
    assert all(value in ATTRIBUTES[name] for name, value in bird.attributes.items())
    assert len(bird.captions) == 10 and all(isinstance(caption, str) for caption in bird.captions)


def test_another_process_draws_the_same():
    code = f"import hashlib, json\n{inspect.getsource(digest)}\n"
    code += "from datasets.toybirds import ToyBirds; print(digest(ToyBirds('train', 9, 64), [8, 3]))"
    assert run_python(code, PYTHONHASHSEED="1").stdout.strip() == digest(ToyBirds("train", 9, 64), [8, 3])


def test_number_of_items_and_order_of_access_change_nothing():
    small, large = ToyBirds("train", 5), ToyBirds("train")
    assert len(small) == 5 and len(large) == 8000 and len(ToyBirds("test")) == 2000
    assert digest(large, [4, 1]) == digest(small, [4, 1])
    assert [large.attributes(i) for i in (2, 0)] == [small[2].attributes, small[0].attributes]
    assert small.captions(3) == large[3].captions


def test_splits_and_indices_differ():
    train, test = ToyBirds("train", 40), ToyBirds("test", 40)
    assert len({digest(birds, [i]) for birds in (train, test) for i in range(40)}) == 80


@pytest.mark.parametrize("index", range(4))
def test_the_same_bird_at_every_size(index):
    birds = {size: ToyBirds("train", 10, size)[index] for size in (32, 64, 128, 256)}
    for size in (64, 128, 256):
        assert birds[size].attributes == birds[32].attributes and birds[size].captions == birds[32].captions
        for name in ("image", "mask"):
            reduced = Image.fromarray(getattr(birds[size], name)).reduce(size // 32)
            difference = np.abs(np.asarray(reduced, dtype=int) - getattr(birds[32], name))
            assert difference.mean() < 4  # another bird differs by 30 and more, see below
    other = ToyBirds("train", 10, 32)[index + 1]
    assert np.abs(birds[32].image.astype(int) - other.image).mean() > 15


def test_it_can_be_iterated():
    assert len(list(ToyBirds("test", 3, 32))) == 3


@pytest.mark.parametrize(
    "arguments", [("val",), ("Train",), ("train", 0), ("test", -1), ("train", 5, 16), ("train", 5, 1024)]
)
def test_wrong_arguments_are_named(arguments):
    with pytest.raises(DataError, match=str(arguments[-1])):
        ToyBirds(*arguments)


# --- classes ---


def test_classes_and_their_split():
    assert len(CLASS_IDS["train"]) == 150 and len(CLASS_IDS["test"]) == 50
    assert sorted(CLASS_IDS["train"] + CLASS_IDS["test"]) == list(range(1, 201))
    assert len({class_name(number) for number in range(1, 201)}) == 200
    pairs, wings, bellies = {}, {}, {}
    for split, numbers in CLASS_IDS.items():
        described = [toybirds_attributes.CLASSES[number - 1] for number in numbers]
        pairs[split] = {(wing, belly) for wing, belly, _ in described}
        wings[split], bellies[split] = {wing for wing, _ in pairs[split]}, {belly for _, belly in pairs[split]}
        assert wings[split] == bellies[split] == set(PALETTE)  # each colour in both splits, on both parts
    assert not pairs["train"] & pairs["test"]  # a pair kept for testing is unseen in every size
    assert (len(pairs["train"]), len(pairs["test"])) == (75, 25)
    assert all(wing != belly for wing, belly in pairs["train"] | pairs["test"])


@pytest.mark.parametrize(("split", "count"), [("train", 150), ("test", 50)])
def test_birds_are_of_their_splits_classes(split, count):
    birds = ToyBirds(split, 2 * count)
    numbers = [class_id(birds.attributes(index)) for index in range(len(birds))]
    assert sorted(numbers) == sorted(CLASS_IDS[split] * 2)  # every class, equally often


def test_class_of_a_bird():
    attributes = {"wing_color": "black", "belly_color": "white", "size": "small"}
    name = class_name(class_id(attributes))
    assert name == f"{class_id(attributes):03d}.Black_wing_white_belly_small"


def test_attributes_are_balanced():
    birds = ToyBirds("train")
    drawn = [birds.attributes(index) for index in range(3000)]
    for name, values in ATTRIBUTES.items():
        counts = [sum(attributes[name] == value for attributes in drawn) for value in values]
        assert min(counts) > 0.6 * 3000 / len(values)


# --- drawings ---


def test_shades_keep_their_names():
    rng, names = np.random.default_rng(3), list(PALETTE)
    colors = np.array(list(PALETTE.values()))
    nearest = min(np.linalg.norm(np.subtract(*pair)) for pair in itertools.combinations(colors, 2))
    assert nearest > 2 * JITTER * 3**0.5 + 40  # the worst jitter stays far on its own side
    shades = {name: {shade(name, rng) for _ in range(50)} for name in names}
    for name, found in shades.items():
        assert len(found) > 20
        assert all(np.abs(np.subtract(color, PALETTE[name])).max() <= JITTER for color in found)


@pytest.mark.parametrize("background", ATTRIBUTES["background"])
def test_mask_is_where_the_bird_was_painted(background):
    """Outside the mask the picture is the scenery to the bit; inside it nearly everything differs from it."""
    birds = ToyBirds("train", 60)
    for index in range(60):
        attributes = birds.attributes(index) | {"background": background}
        if index % 5:
            continue
        image, mask = draw(attributes, stream(1, "test", index), 64)
        empty, no_mask = draw(attributes, stream(1, "test", index), 64, bird=False)
        assert not no_mask.any()
        changed = np.abs(image.astype(int) - empty).max(axis=2) > 0
        assert not changed[mask == 0].any()
        assert changed[mask == 255].mean() > 0.9  # legs behind the body, a blue belly before a blue sky
        assert 0.08 < (mask > 127).mean() < 0.35
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert not border.any()  # the whole bird is in the frame


def test_mask_is_antialiased_and_of_one_piece():
    mask = ToyBirds("train", 1, 64)[0].mask
    assert 20 < ((mask > 0) & (mask < 255)).sum() < 400
    rows = np.flatnonzero((mask > 127).any(axis=1))
    assert (np.diff(rows) == 1).all()


@pytest.mark.parametrize(("size", "share"), [(32, 0.004), (64, 0.006), (128, 0.01)])
def test_named_colors_are_on_the_bird(size, share):
    """Crown, wing and belly each cover a visible part of the inside of the mask in their own colour."""
    for index in range(30):
        bird = ToyBirds("train", 30, size)[index]
        inside = bird.image[bird.mask == 255].astype(int)
        for part in PARTS:
            away = np.linalg.norm(inside - PALETTE[bird.attributes[part]], axis=1)
            assert (away < 50).sum() > share * size**2, (index, part, bird.attributes)


def test_attributes_change_the_picture_and_only_where_they_should():
    attributes = ToyBirds("train", 4).attributes(3)
    image, mask = draw(attributes, stream(0, "x"), 64)
    for name, values in ATTRIBUTES.items():
        for value in set(values) - {attributes[name]}:
            other, other_mask = draw(attributes | {name: value}, stream(0, "x"), 64)
            assert (other != image).any()
            same_outline = name not in ("size", "beak_length", "facing")
            assert (other_mask == mask).all() == same_outline
            if same_outline and name != "background":
                assert (other == image)[mask == 0].all()


def test_left_is_right_mirrored():
    """The head lies on the side that the bird faces."""
    for index in range(12):
        attributes = ToyBirds("test", 12).attributes(index) | {"crown_color": "red", "beak_color": "black"}
        attributes |= {"wing_color": "blue", "belly_color": "white"}
        for facing, sign in (("right", 1), ("left", -1)):
            image, mask = draw(attributes | {"facing": facing}, stream(2, "x", index), 64)
            red = (np.linalg.norm(image.astype(int) - PALETTE["red"], axis=2) < 40) & (mask == 255)
            assert sign * (np.nonzero(red)[1].mean() - np.nonzero(mask > 127)[1].mean()) > 1


def test_small_birds_are_smaller():
    widths = {"small": [], "large": []}
    for index in range(60):
        bird = ToyBirds("train", 60)[index]
        widths[bird.attributes["size"]].append(toybirds.bounding_box(bird.mask)[2] / 64)
    assert 0.40 < np.mean(widths["small"]) < 0.55 < np.mean(widths["large"]) < 0.68
    assert min(widths["small"]) > 0.35 and max(widths["large"]) < 0.8


# --- captions ---


@pytest.fixture(scope="module")
def written():
    """(attributes, [(caption, named), ...]) of 600 birds: 6,000 captions."""
    birds = [ToyBirds("train", 300), ToyBirds("test", 300)]
    return [
        (b.attributes(i), write_captions(b.attributes(i), stream(5, b.split, i))) for b in birds for i in range(300)
    ]


def test_captions_name_what_was_chosen_and_nothing_else(written):
    for attributes, captions in written:
        for caption, named in captions:
            assert named_attributes(caption) == named, caption
            assert named.items() <= attributes.items()


def test_captions_name_two_to_four_topics(written):
    topics = []
    for _, captions in written:
        for _, named in captions:
            topics.append(len({"beak" if name.startswith("beak") else name for name in named}))
            assert set(named) & set(PARTS)
    assert set(topics) == {2, 3, 4}


def test_colors_are_named_often_and_the_rest_sometimes(written):
    names = [name for _, captions in written for _, named in captions for name in named]
    share = {name: names.count(name) / 6000 for name in ATTRIBUTES}
    assert all(share[name] > 0.5 for name in PARTS)
    assert all(0.1 < share[name] < 0.5 for name in set(ATTRIBUTES) - set(PARTS) - {"facing"})
    assert share["facing"] == 0


def test_vocabulary_and_length(written):
    captions = [caption for _, pairs in written for caption, _ in pairs]
    tokens = [re.findall(r"\w+", caption) for caption in captions]
    words = {word for caption in tokens for word in caption}
    assert 80 <= len(words) <= 130
    assert max(map(len, tokens)) <= 18 and min(map(len, tokens)) >= 5
    assert not words & {"left", "right", "facing", "looking"}
    assert {"bill", "beak", "breast", "belly", "chest", "crown", "head", "small", "large", "striped"} <= words
    assert all(caption == caption.lower() and "  " not in caption for caption in captions)
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|,,| ,|, \.", "\n".join(captions))
    assert len(set(captions)) > 0.95 * len(captions)


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        (
            "this small bird has a yellow belly, blue wings and a long black beak",
            {
                "size": "small",
                "belly_color": "yellow",
                "wing_color": "blue",
                "beak_length": "long",
                "beak_color": "black",
            },
        ),
        ("A bird with a red crown, white breast.", {"crown_color": "red", "belly_color": "white"}),
        (
            "the wings of this big bird are gray and striped, and it has an orange head",
            {"wing_color": "grey", "size": "large", "wing_pattern": "striped", "crown_color": "orange"},
        ),
        (
            "a bird whose bill is short and red with black wings in the snow",
            {"beak_length": "short", "beak_color": "red", "wing_color": "black", "background": "snow"},
        ),
        ("brown wings with spots on a bird", {"wing_color": "brown", "wing_pattern": "spotted"}),
        ("a bird with wings", {}),
        ("", {}),
    ],
)
def test_reading_a_caption(caption, named):
    assert named_attributes(caption) == named
