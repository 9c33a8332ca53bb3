"""What a toy bird can be: the attributes, the colours, the 200 classes and which of them are kept for testing.

How a bird is drawn is in drawing.py, what its captions say in captions.py.
"""

from collections.abc import Mapping

import numpy as np

# Colour names to RGB, far enough apart that a bird's own shade of a colour is still nearest to that colour.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (208, 28, 34),
    "orange": (245, 130, 16),
    "yellow": (250, 222, 50),
    "green": (44, 158, 58),
    "blue": (40, 92, 220),
    "purple": (128, 44, 172),
    "pink": (250, 150, 192),
    "brown": (118, 70, 34),
    "black": (30, 30, 34),
    "grey": (138, 141, 148),
    "white": (246, 246, 243),
}
COLORS = tuple(PALETTE)

# Every attribute with its values, in the order of a classifier's outputs.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "crown_color": COLORS,
    "wing_color": COLORS,
    "belly_color": COLORS,
    "beak_color": ("red", "yellow", "black", "grey"),
    "beak_length": ("short", "long"),
    "size": ("small", "large"),
    "wing_pattern": ("plain", "striped", "spotted"),
    "background": ("sky", "leaves", "water", "sunset", "snow"),
    "facing": ("left", "right"),
}

SPLITS = ("train", "test")
NUM_CLASSES = 200

# How far apart in COLORS the two colours of a pair are. Each distance gives eleven pairs and their reverses, in which
# every colour is twice a wing and twice a belly; distance 0, birds of one colour, is left out.
_DISTANCES = (3, 5, 1, 2, 4)


def _choose_classes() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """The training and the test classes as (wing, belly, size).

    Eleven colours give 110 pairs of wing and belly, so 200 classes are 100 pairs in two sizes, and ten pairs are not
    used. The split is by pair, 25 of them for testing: training sees a test bird's pair in neither size. A pair and
    its reverse are in the same split; otherwise a test bird could be a training bird with its two colours exchanged.
    """
    # Each pair is followed by its reverse, so that a slice keeps both together.
    count = len(COLORS)
    steps = [(i, (i + distance) % count) for distance in _DISTANCES for i in range(count)]
    pairs = [
        (COLORS[wing], COLORS[belly]) for first, second in steps for wing, belly in ((first, second), (second, first))
    ]

    # The last 75 pairs for training, the first 25 for testing; the ten in between are not used.
    train, test = (
        [(*pair, size) for pair in part for size in ATTRIBUTES["size"]] for part in (pairs[-75:], pairs[:25])
    )
    return train, test


_TRAIN_CLASSES, _TEST_CLASSES = _choose_classes()
CLASSES = tuple(sorted(_TRAIN_CLASSES + _TEST_CLASSES))
_CLASS_IDS = {description: class_id for class_id, description in enumerate(CLASSES, start=1)}
CLASS_IDS: dict[str, tuple[int, ...]] = {
    "train": tuple(sorted(_CLASS_IDS[c] for c in _TRAIN_CLASSES)),
    "test": tuple(sorted(_CLASS_IDS[c] for c in _TEST_CLASSES)),
}


def class_id(attributes: Mapping[str, str]) -> int:
    """The class of a bird, 1 to 200 as CUB numbers them; KeyError for a pair of colours that is no class."""
    return _CLASS_IDS[attributes["wing_color"], attributes["belly_color"], attributes["size"]]


def class_name(class_id: int) -> str:
    """The name of class 1 to 200 as CUB writes its folders, e.g. `017.Blue_wing_orange_belly_small`."""
    wing, belly, size = CLASSES[class_id - 1]
    return f"{class_id:03d}.{wing.capitalize()}_wing_{belly}_belly_{size}"


def choose_attributes(split: str, index: int, rng: np.random.Generator) -> dict[str, str]:
    """The attributes of bird `index`: its class follows from the index, the rest is drawn from `rng`."""
    # 47 shares no factor with 150 or 50: every class comes equally often, and neighbours differ.
    class_ids = CLASS_IDS[split]
    wing, belly, size = CLASSES[class_ids[index * 47 % len(class_ids)] - 1]

    # Drawn for all attributes, so that a bird's other attributes do not depend on its class.
    attributes = {name: values[int(rng.random() * len(values))] for name, values in ATTRIBUTES.items()}
    return attributes | {"wing_color": wing, "belly_color": belly, "size": size}
