"""Reading attributes off generated birds, counted by hand with a classifier whose answers are known."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from toybirds_help import write_checkpoint

import eval.attributes as attributes
from datasets.toybirds.dataset import ATTRIBUTES, ToyBirds, named_attributes
from eval.attributes import NAMES, UNKNOWN, UNNAMED, named_values, other_captions, read_attributes
from eval.toybirds.classifiers import Recipe
from eval.toybirds.samples import captions_of_test_birds
from miscc.errors import DataError, run_command

CEILING = {name: 0.99 for name in NAMES}
COLORS = ATTRIBUTES["crown_color"]
RED, ORANGE, YELLOW, BLUE = 0, 1, 2, 4


@dataclasses.dataclass
class KnownClassifier:
    """Reads off image i what row i of `answers` (N, 9) says; images carry their number in their first pixel."""

    answers: np.ndarray
    ceiling: dict

    def predict(self, images):
        return self.answers[images[:, 0, 0, 0].astype(int) + 256 * images[:, 0, 0, 1].astype(int)]


def numbered(count):
    images = np.zeros((count, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return images


def answers(*rows, count=None):
    """Rows {attribute: number of its value}, the rest 0."""
    read = np.zeros((count or len(rows), len(NAMES)), dtype=np.int64)
    for row, said in enumerate(rows):
        for name, value in said.items():
            read[row, NAMES.index(name)] = value
    return read


def test_values_that_captions_name_by_number():
    truth = named_values(["a small bird with red wings and a green beak", "something else"])
    expected = np.full((2, 9), UNNAMED)
    expected[0, NAMES.index("wing_color")] = COLORS.index("red")
    expected[0, NAMES.index("size")] = ATTRIBUTES["size"].index("small")
    expected[0, NAMES.index("beak_color")] = UNKNOWN  # there is no green beak
    assert np.array_equal(truth, expected)


def test_accuracy_by_hand():
    captions = [
        "a bird with a red crown and blue wings",
        "a bird with a yellow crown and red wings",
        "a bird with an orange crown and blue wings",
        "a bird with an orange belly and a green beak",
    ]
    read = answers(
        {"crown_color": RED, "wing_color": BLUE},
        {"crown_color": RED, "wing_color": RED},
        {"crown_color": ORANGE, "wing_color": BLUE},
        {"crown_color": YELLOW, "belly_color": RED},
    )
    report = read_attributes(numbered(4), captions, KnownClassifier(read, CEILING | {"crown_color": 0.98}), seed=3)
    crown, wing, belly = (report.attributes[name] for name in attributes.COLOURS)
    assert (crown.named, crown.accuracy, crown.chance, crown.ceiling) == (3, pytest.approx(2 / 3), 1 / 11, 0.98)
    assert (wing.named, wing.accuracy) == (3, 1.0)
    assert (belly.named, belly.accuracy) == (1, 0.0)
    assert report.colour_accuracy == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert report.colour_ceiling == pytest.approx((0.98 + 0.99 + 0.99) / 3)
    assert report.colour_chance == pytest.approx(1 / 11)
    beak = report.attributes["beak_color"]
    assert (beak.named, beak.accuracy, beak.impossible, beak.open) == (0, None, 1, 3)
    size = report.attributes["size"]
    assert (size.named, size.accuracy, size.open, size.chance) == (0, None, 4, 0.5)
    # Captions 0 to 2 name the same, so each gets one of the other two; the last one has no attribute in common.
    assert (crown.mismatched, wing.mismatched, belly.mismatched, belly.mismatched_accuracy) == (3, 3, 0, None)


def test_mismatched_accuracy_by_hand():
    captions = ["a bird with a red crown", "a bird with a yellow crown"]  # each is the other's only choice
    read = answers({"crown_color": YELLOW}, {"crown_color": YELLOW})
    crown = read_attributes(numbered(2), captions, KnownClassifier(read, CEILING)).attributes["crown_color"]
    assert (crown.accuracy, crown.mismatched, crown.mismatched_accuracy) == (0.5, 2, 0.5)
    read = answers({"crown_color": YELLOW}, {"crown_color": RED})
    crown = read_attributes(numbered(2), captions, KnownClassifier(read, CEILING)).attributes["crown_color"]
    assert (crown.accuracy, crown.mismatched_accuracy) == (0.0, 1.0)
    crown = read_attributes(numbered(2), captions, KnownClassifier(read, CEILING), ["a", "a"]).attributes["crown_color"]
    assert (crown.named, crown.mismatched, crown.mismatched_accuracy) == (2, 0, None)  # both are of one bird


def test_the_other_caption_is_another_birds_and_names_the_same_where_there_is_one():
    captions = ["a red crown", "a blue crown", "a red crown", "red wings and a red belly", "blue wings", "a red belly"]
    captions = [f"a bird with {text}" for text in captions]
    truth = named_values(captions)
    seen = [set(), set(), set(), set()]
    for seed in range(40):
        others = other_captions(truth, captions, ["a", "b", "c", "d", "e", "f"], seed)
        assert others[0] == others[2] == 1  # not the same words again
        for row in (1, 3):
            seen[row].add(int(others[row]))
        assert others[4] == others[5] == 3  # names the most of what they name
    assert seen[1] == {0, 2} and seen[3] == {4, 5}  # by lot
    names_three = ["a bird with a red crown, red wings and a red belly", "a bird with a blue crown"]
    names_three.append("a small bird with a blue crown and blue wings and a long black beak in the snow")
    assert other_captions(named_values(names_three), names_three, ["a", "b", "c"])[0] == 2  # two in common, not one
    same_bird = other_captions(truth[:2], captions[:2], ["a", "a"])
    assert same_bird.tolist() == [-1, -1]
    assert other_captions(truth[:2], captions[:2], ["", ""]).tolist() == [1, 0]  # captions without a key
    again = other_captions(truth, captions, ["a", "b", "c", "d", "e", "f"], 7)
    assert np.array_equal(again, other_captions(truth, captions, ["a", "b", "c", "d", "e", "f"], 7))


def test_images_that_show_their_captions_are_at_chance_for_others():
    """Test captions, and a classifier that reads off each image exactly the attributes of the bird that it was made for."""
    birds = ToyBirds("test", 1500)
    captions = [birds.captions(index)[0] for index in range(1500)]
    rows = [birds.attributes(index) for index in range(1500)]
    read = np.array([[values.index(row[name]) for name, values in ATTRIBUTES.items()] for row in rows])
    report = read_attributes(numbered(1500), captions, KnownClassifier(read, CEILING), [str(i) for i in range(1500)])
    for name, score in report.attributes.items():
        if name == "facing":
            assert (score.named, score.open) == (0, 1500)
            continue
        assert score.accuracy == 1 and score.named + score.open == 1500
        spread = math.sqrt(score.chance * (1 - score.chance) / score.mismatched)
        assert score.mismatched > 0.9 * score.named and abs(score.mismatched_accuracy - score.chance) < 5 * spread
    assert report.colour_accuracy == 1 and abs(report.mismatched_colour_accuracy - 1 / 11) < 0.03
    assert all(score.diversity > 0.97 for score in report.attributes.values())


def test_images_that_ignore_their_captions_are_at_chance_for_their_own():
    captions = [ToyBirds("test", 1500).captions(index)[0] for index in range(1500)]
    rng = np.random.default_rng(0)
    read = np.stack([rng.integers(0, len(values), 1500) for values in ATTRIBUTES.values()], axis=1)
    report = read_attributes(numbered(1500), captions, KnownClassifier(read, CEILING))
    assert abs(report.colour_accuracy - 1 / 11) < 0.03 and abs(report.mismatched_colour_accuracy - 1 / 11) < 0.03
    assert abs(report.attributes["size"].accuracy - 0.5) < 0.1


def test_diversity_by_hand():
    """Backgrounds of five captions' images that do not name it: two values alike, of five that there are."""
    captions = ["a red crown"] * 3 + ["a blue crown"] * 3 + ["a red crown in the snow"]
    captions = [f"a bird with {text}" for text in captions]
    read = answers(*({"background": value} for value in (0, 0, 2, 0, 2, 2, 1)))
    background = read_attributes(numbered(7), captions, KnownClassifier(read, CEILING)).attributes["background"]
    assert (background.open, background.named) == (6, 1)
    assert background.diversity == pytest.approx(math.log(2) / math.log(5))
    # Pairs of one caption: 0-0, 0-2, 0-2 and 0-2, 0-2, 2-2: four of six differ; by lot it would be four of five.
    assert background.pairs == 6 and background.pair_diversity == pytest.approx((4 / 6) / (4 / 5))
    crown = read_attributes(numbered(7), captions, KnownClassifier(read, CEILING)).attributes["crown_color"]
    assert (crown.open, crown.diversity, crown.pairs, crown.pair_diversity) == (0, None, 0, None)
    one_value = read_attributes(numbered(7), captions, KnownClassifier(read * 0, CEILING)).attributes["background"]
    assert (one_value.diversity, one_value.pair_diversity) == (0.0, 0.0)
    everything = answers(*({"facing": value} for value in (0, 1, 0, 1, 0, 1, 1)))
    facing = read_attributes(numbered(7)[:6], captions[:6], KnownClassifier(everything, CEILING)).attributes["facing"]
    assert facing.diversity == pytest.approx(1.0)


def test_what_cannot_be_read_is_said():
    classifier = KnownClassifier(answers({}, {}), CEILING)
    with pytest.raises(DataError, match="no caption names an attribute"):
        read_attributes(numbered(2), ["a photo of a dog", "a bird with a green beak"], classifier)
    with pytest.raises(DataError, match="2 images, 1 captions"):
        read_attributes(numbered(2), ["a red bird"], classifier)


def test_the_table_and_the_record_have_every_attribute():
    captions = ["a bird with a red crown", "a bird with a yellow crown"]
    report = read_attributes(numbered(2), captions, KnownClassifier(answers({"crown_color": RED}, {}), CEILING))
    lines = report.lines()
    assert len(lines) == 2 + len(NAMES) and len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["crown_color", "2", "0.500", "0.500", "0.091", "0.990", "0", "-", "-"]
    assert lines[-1].split() == ["colours", "(mean)", "0.500", "0.500", "0.091", "0.990"]
    record = json.loads(json.dumps(report.record()))
    assert record["attributes"]["crown_color"]["accuracy"] == 0.5 and record["colour_accuracy"] == 0.5
    assert record["attributes"]["wing_color"]["accuracy"] is None and set(record["attributes"]) == set(NAMES)


def test_the_networks_heads_fit_the_attributes():
    for size in (32, 64):
        network = attributes.AttributeNetwork(size, 4).eval()
        assert [head.shape for head in network(torch.zeros(2, 3, size, size))] == [
            (2, len(values)) for values in ATTRIBUTES.values()
        ]


def test_the_script_on_a_checkpoint(tmp_path, monkeypatch, capsys):
    """A generator of noise, and a classifier that reads 0 everywhere: red, short, small ..."""
    checkpoint = write_checkpoint(tmp_path / "last.pth")
    classifier = KnownClassifier(np.zeros((256 * 256, 9), dtype=np.int64), CEILING)
    classifier.recipe = Recipe("attribute-classifier", 32, epochs=1, width=4, most_noise=0.0, most_blur=0.0)
    asked = []
    monkeypatch.setattr(attributes, "load_classifier", lambda *arguments: asked.append(arguments) or classifier)
    out = tmp_path / "out.json"
    command = ["attributes.py", "--checkpoint", str(checkpoint), "--num-images", "30", "--per-caption", "3"]
    monkeypatch.setattr("sys.argv", [*command, "--device", "cpu", "--json", str(out), "--cache-dir", str(tmp_path)])
    attributes.main()
    assert asked == [(32, torch.device("cpu"), tmp_path)]
    written = json.loads(out.read_text())
    captions = captions_of_test_birds(30, 0, 3)[0]
    crowns = [named_attributes(caption).get("crown_color") for caption in captions]
    crown = written["attributes"]["attributes"]["crown_color"]
    assert crown["named"] == sum(color is not None for color in crowns)
    assert crown["accuracy"] == pytest.approx(crowns.count("red") / crown["named"])
    assert written["attributes"]["attributes"]["facing"]["pairs"] == 30  # ten captions, three pairs each
    assert written["origin"]["checkpoint"] == str(checkpoint) and written["origin"]["seed"] == 0
    assert written["reader"]["recipe_hash"] == classifier.recipe.key() and "torch" in written["versions"]
    assert "crown_color" in capsys.readouterr().out


def test_the_script_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    for command, message in (
        (["--checkpoint", str(tmp_path / "none.pth")], "none.pth: no such weight file"),
        (["--samples", str(tmp_path)], "no captions.jsonl in it"),
        (["--samples", str(tmp_path), "--num-images", "500"], "--num-images: is for drawing with --checkpoint"),
        (["--samples", str(tmp_path), "--per-caption", "1"], "--per-caption: is for drawing with --checkpoint"),
        (["--samples", str(tmp_path), "--truncation", "0.8"], "--truncation: is for drawing with --checkpoint"),
    ):
        monkeypatch.setattr("sys.argv", ["attributes.py", *command, "--device", "cpu"])
        with pytest.raises(SystemExit) as stopped:
            run_command(attributes.main)
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ") and message in lines[-1]


@pytest.mark.parametrize("value", ["nan", "0", "inf", "-1"])
def test_a_truncation_that_draws_nothing_is_refused(value, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attributes.py", "--checkpoint", "none.pth", f"--truncation={value}"])
    with pytest.raises(SystemExit):
        attributes.main()
    assert f"argument --truncation: must be a number above 0, such as 0.8, not {value}" in capsys.readouterr().err
