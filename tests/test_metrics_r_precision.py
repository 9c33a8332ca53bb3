"""R-precision: rankings worked out by hand, which captions may stand against an image's own, and a whole folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eval.metric import Tools
from eval.protocol.protocols import Protocol
from eval.R_precision import CandidateLists, RPrecision, draw_candidates, encoder_hash, r_precision
from eval.scripts import score_images
from miscc.errors import CheckpointError, DataError
from miscc.vocabulary import Vocabulary, tokenize
from models.types import TextFeatures
from sampling.encoders import Encoders

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1), "black": (-1, -1, -1)}


def test_ranking_by_hand():
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])  # 0°, 90°, 45°
    images = torch.tensor([[5.0, 1.0], [5.0, 3.9], [0.0, 2.0]])  # 11°, 38°, 90°: nearest are 0, 2, 1
    true, wrong = np.array([0, 0, 1]), np.array([[1, 2], [1, 2], [0, 2]])
    assert r_precision(images, codes, true, wrong, folds=1) == (pytest.approx(2 / 3), 0)
    assert r_precision(images, codes, np.array([0, 2, 1]), np.array([[1], [0], [2]]), folds=1)[0] == 1
    assert r_precision(-images, codes, true, wrong, folds=1)[0] == 0  # the cosine has a sign: all are farthest now


def test_a_tie_counts_its_share():
    codes = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [0.0, 1.0]])  # three captions in the same direction
    image = torch.tensor([[1.0, 0.1]])
    assert r_precision(image, codes, np.array([0]), np.array([[1, 2, 3]]), folds=1)[0] == pytest.approx(1 / 3)
    assert r_precision(image, codes, np.array([3]), np.array([[1, 2]]), folds=1)[0] == 0


def test_mean_and_spread_over_folds():
    codes = torch.eye(2)
    images = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)  # the first four are right, the others wrong
    true, wrong = np.zeros(8, dtype=int), np.ones((8, 1), dtype=int)
    mean, std = r_precision(images, codes, true, wrong, folds=8)
    assert mean == pytest.approx(0.5) and std == pytest.approx(0.5)
    assert r_precision(images, codes, true, wrong, folds=1) == (pytest.approx(0.5), 0)
    with pytest.raises(DataError, match="--folds 9"):
        r_precision(images, codes, true, wrong, folds=9)


def test_random_codes_are_right_one_time_in_a_hundred():
    random = np.random.default_rng(0)
    images, codes = (torch.from_numpy(random.normal(size=(n, 64))) for n in (6000, 500))
    true = random.integers(0, 250, 6000)
    wrong = random.integers(250, 500, (6000, 99))
    assert r_precision(images, codes, true, wrong)[0] == pytest.approx(0.01, abs=0.005)


def test_candidates_are_never_of_the_same_image_nor_the_same_words():
    keys = [f"image{number // 2}" for number in range(40)]
    captions = [f"a bird number {number}" for number in range(40)]
    captions[7] = "A bird, number 30!"  # image 3 has the words of image 15
    lists = draw_candidates(captions, keys, num_candidates=20, seed=1)
    assert lists.candidates.shape == (40, 20) and len(lists.pool) == 39
    owners = {}
    for caption, key in zip(captions, keys, strict=True):
        owners.setdefault(tuple(tokenize(caption)), set()).add(key)
    for row in range(40):
        assert tokenize(lists.pool[lists.true[row]]) == tokenize(captions[row])
        chosen = [tuple(tokenize(lists.pool[index])) for index in lists.candidates[row]]
        assert len(set(chosen)) == 20 and tuple(tokenize(captions[row])) not in chosen
        assert not any(keys[row] in owners[words] for words in chosen)
    counts = np.bincount(lists.candidates.ravel(), minlength=39)
    assert counts.min() > 8 and counts.max() < 35  # each stands about 20 times
    again = draw_candidates(captions, keys, num_candidates=20, seed=1)
    assert np.array_equal(again.candidates, lists.candidates)
    assert not np.array_equal(draw_candidates(captions, keys, 20, seed=2).candidates, lists.candidates)


def test_captions_without_a_key_stand_against_each_other_and_too_few_are_refused():
    captions = ["red", "green", "blue"]
    lists = draw_candidates(captions, [""] * 3, num_candidates=2)
    assert [set(row) for row in lists.candidates.tolist()] == [{1, 2}, {0, 2}, {0, 1}]
    with pytest.raises(DataError, match="needs 99 captions of other images for each image; there are 2"):
        draw_candidates(captions, [""] * 3)
    with pytest.raises(DataError, match="there are 0"):
        draw_candidates(captions, ["same"] * 3, num_candidates=1)


def test_lists_come_back_from_disk_and_only_for_the_same_samples(tmp_path):
    captions, files = ["a red bird", "a “green” bird", "a blue bird"], ["0.png", "1.png", "2.png"]
    lists = draw_candidates(captions, ["", "", ""], num_candidates=2, seed=5)
    lists.save(tmp_path / "lists.json", files)
    assert set(json.loads((tmp_path / "lists.json").read_text(encoding="utf-8"))) == {"seed", "pool", "images"}
    again = CandidateLists.load(tmp_path / "lists.json", files, captions)
    assert again.pool == lists.pool and again.seed == 5
    assert np.array_equal(again.true, lists.true) and np.array_equal(again.candidates, lists.candidates)
    part = CandidateLists.load(tmp_path / "lists.json", files[1:], captions[1:])
    assert np.array_equal(part.candidates, lists.candidates[1:])
    with pytest.raises(DataError, match="says that 2.png shows 'a blue bird', the samples say 'a pink bird'"):
        CandidateLists.load(tmp_path / "lists.json", files, [*captions[:2], "a pink bird"])
    with pytest.raises(DataError, match="no candidate lists for these images"):
        CandidateLists.load(tmp_path / "lists.json", ["9.png"], captions[:1])


class WordColours(nn.Module):
    """A text encoder whose sentence code is the mean colour of the words."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.tensor([(0.0, 0, 0), *COLOURS.values()]))
        self.saw_tf32 = None

    def forward(self, captions, lengths):
        self.saw_tf32 = torch.backends.cudnn.allow_tf32
        return TextFeatures(self.embedding(captions).sum(dim=1), None, captions == 0)


class MeanColour(nn.Module):
    """An image encoder whose code is the mean colour."""

    image_size = 8

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return None, images.mean(dim=(2, 3)) * self.gain


@pytest.fixture
def encoders():
    return Encoders(WordColours(), MeanColour(), Vocabulary(["<end>", *COLOURS]), max_words=4)


def write_samples(folder, shown, captions):
    """One 8 px image of one colour a caption."""
    folder.mkdir()
    lines = []
    for number, (name, caption) in enumerate(zip(shown, captions, strict=True)):
        colour = ((np.array(COLOURS[name]) + 1) * 127.5).astype(np.uint8)
        Image.fromarray(np.broadcast_to(colour, (8, 8, 3)).copy()).save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "caption": caption, "key": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def sample_precision(folder, encoders, num_candidates, folds=1, lists=None):
    """As the script scores a folder."""
    protocol = Protocol("ranking", "", candidates=num_candidates, folds=folds)
    (score,) = score_images(RPrecision, folder, protocol=protocol, tools=Tools(encoders, lists=lists))
    return score


def test_a_folder_of_right_images_scores_100_and_one_of_wrong_images_0(tmp_path, encoders):
    names = list(COLOURS)
    right = write_samples(tmp_path / "right", names, names)
    score = sample_precision(right, encoders, num_candidates=4, folds=5)
    assert (score.value, score.std) == (100, 0) and score.protocol["chance"] == 20
    assert score.name == f"R-precision%[damsm:{encoder_hash(encoders)[:8]}]"
    wrong = write_samples(tmp_path / "wrong", names[1:] + names[:1], names)
    assert sample_precision(wrong, encoders, num_candidates=4, folds=5).value == 0
    half = write_samples(tmp_path / "half", ["red", "green", "red", "red", "red"], names)
    score = sample_precision(half, encoders, num_candidates=4, folds=5)
    assert score.value == pytest.approx(40) and score.std == pytest.approx(100 * (0.4 * 0.6) ** 0.5)


def test_lists_are_written_once_and_used_again(tmp_path, encoders):
    names = list(COLOURS)
    folder = write_samples(tmp_path / "out", names, names)
    first = sample_precision(folder, encoders, num_candidates=2, folds=1)
    path = folder / "r_precision_2_seed2020.json"
    assert first.protocol["lists"] == str(path)
    content = json.loads(path.read_text())
    for row in content["images"]:  # now the true caption stands against itself twice
        row["candidates"] = [row["true"]] * 2
    path.write_text(json.dumps(content))
    assert sample_precision(folder, encoders, num_candidates=2, folds=1).value == pytest.approx(100 / 3)
    assert json.loads(path.read_text()) == content
    other = sample_precision(folder, encoders, num_candidates=2, folds=1, lists=tmp_path / "mine.json")
    assert (tmp_path / "mine.json").is_file() and other.value == 100


def test_the_generators_own_encoders_are_named_as_such(tmp_path, encoders):
    names = list(COLOURS)
    folder = write_samples(tmp_path / "out", names, names)
    options = {"num_candidates": 4, "folds": 1}
    score = sample_precision(folder, encoders, **options)
    assert "does not say which encoders" in score.warnings[0]
    assert score.protocol["encoder_of_the_generator"] is None
    (folder / "samples.json").write_text(json.dumps({"encoder_hash": encoder_hash(encoders)}))
    score = sample_precision(folder, encoders, **options)
    assert "which flatters it" in score.warnings[0] and score.protocol["encoder_of_the_generator"] is True
    encoders.text_encoder.embedding.weight.data[1] += 0.1
    score = sample_precision(folder, encoders, **options)
    assert score.warnings == () and score.protocol["encoder_of_the_generator"] is False


def test_encoders_that_cannot_score_are_refused(tmp_path, encoders):
    names = list(COLOURS)
    folder = write_samples(tmp_path / "out", names, names)
    with pytest.raises(CheckpointError, match="no image encoder"):
        sample_precision(folder, encoders._replace(image_encoder=None), num_candidates=2)
    bare = encoders._replace(vocabulary=None)
    with pytest.raises(DataError, match="give --data-dir"):
        sample_precision(folder, bare, num_candidates=2)
    assert sample_precision(folder, bare._replace(vocabulary=encoders.vocabulary), num_candidates=4).value == 100
    Image.new("RGB", (9, 9)).save(folder / "0.png")
    with pytest.raises(DataError, match="differ in size"):
        sample_precision(folder, encoders, num_candidates=2)


def test_a_vocabulary_of_other_encoders_is_refused(tmp_path, encoders):
    names = list(COLOURS)
    folder = write_samples(tmp_path / "out", names, names)
    other = encoders._replace(vocabulary=Vocabulary(["<end>", *names[:-1]]))
    with pytest.raises(CheckpointError, match=r"knows 6 words, its vocabulary \(.*--data-dir\) has 5"):
        sample_precision(folder, other, num_candidates=4)


def test_lists_of_another_number_of_candidates_are_refused(tmp_path, encoders):
    names, lists = list(COLOURS), tmp_path / "mine.json"
    folder = write_samples(tmp_path / "out", names, names)
    score = sample_precision(folder, encoders, num_candidates=2, lists=lists)
    assert score.protocol["candidates"] == 2 and score.protocol["candidates_from"] == "other images, any class"
    with pytest.raises(
        DataError, match=r"mine.json: has 2 wrong captions an image, .* give --candidates 2, or another"
    ):
        sample_precision(folder, encoders, num_candidates=4, lists=lists)
    assert sample_precision(folder, encoders, num_candidates=2, lists=lists).value == score.value


def test_captions_are_encoded_in_full_float32_as_images_are(tmp_path, encoders, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    names = list(COLOURS)
    sample_precision(write_samples(tmp_path / "out", names, names), encoders, num_candidates=4)
    assert encoders.text_encoder.saw_tf32 is False and torch.backends.cudnn.allow_tf32
