"""LPIPS: the published reference distances, the `lpips` package itself, and which images are compared with which."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics_help import picture, write_pictures
from PIL import Image

from eval.LPIPS import Diversity, PerceptualDistance, caption_diversity, load_perceptual_distance, paired_distance
from eval.metric import ScoringBatch
from miscc.errors import CheckpointError, DataError
from miscc.images import from_uint8, open_rgb
from sampling.folders import key_stem
from sampling.requests import Request

WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "weights"
SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


@pytest.fixture(scope="module")
def network():
    """LPIPS over a random AlexNet."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer, shape in SHAPES.items():
        fan_in = shape[1] * shape[2] * shape[3]
        state[f"features.{layer}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        state[f"features.{layer}.bias"] = torch.zeros(shape[0])
    return PerceptualDistance(state)


def as_input(*images):
    return from_uint8(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


def package(network, first, second) -> float:
    """The distance of two (H, W, 3) uint8 images by the package's own forward pass."""
    with torch.no_grad():
        return float(network.network(as_input(first), as_input(second)))


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="AlexNet's weights and the reference images are not here")
def test_published_reference_distances():
    network = load_perceptual_distance(WEIGHTS / "alexnet_imagenet_features.pth")
    reference, near, far = (
        np.array(open_rgb(WEIGHTS / "lpips_reference" / f"ex_{name}.png")) for name in ("ref", "p1", "p0")
    )
    distances = network(as_input(reference, reference), as_input(far, near))
    assert distances.tolist() == pytest.approx([0.7219, 0.1376], abs=1e-4)
    assert network.name == "LPIPS[alex]"


def test_distance_is_the_packages(network):
    images = [picture(number, 64) for number in range(3)]
    ours = network(as_input(*images), as_input(images[1], images[2], images[2]))
    theirs = [package(network, *pair) for pair in ((images[0], images[1]), (images[1], images[2]))]
    assert ours[:2].tolist() == pytest.approx(theirs, rel=1e-4) and theirs[0] > 0.01
    assert float(ours[2]) == pytest.approx(0, abs=1e-7)
    assert network.name == f"LPIPS[alex:{network.weights_hash[:8]}]"


def test_diversity_is_the_mean_over_all_pairs_of_a_group(network):
    images = [picture(number, 40) for number in range(12)]
    groups = ["a"] * 5 + ["single"] + ["b", "b"] + ["a"] * 4
    members = [images[i] for i in (0, 1, 2, 3, 4, 8, 9, 10, 11)]
    expected = np.mean([package(network, *pair) for pair in itertools.combinations(members, 2)])
    metric = Diversity(network, groups)
    for part in (range(5), range(5, 12)):  # group "a" goes on in the second batch
        requests = [Request(i, groups[i], "", 0, 0) for i in part]
        metric.update(ScoringBatch([images[i] for i in part], part, requests))
    found = metric.means
    assert set(found) == {"a", "b"}
    assert found["a"] == pytest.approx(expected, rel=1e-4)
    assert found["b"] == pytest.approx(package(network, images[6], images[7]), rel=1e-4)


def sample_folder(root, captions, keys=None):
    folder = write_pictures(root, len(captions), size=40)
    with open(folder / "captions.jsonl", "w") as stream:
        for number, caption in enumerate(captions):
            line = {"file": f"{number:03d}.png", "caption": caption, "key": (keys or captions)[number]}
            stream.write(json.dumps(line) + "\n")
    return folder


def test_diversity_of_a_sample_folder_groups_by_caption(tmp_path, network):
    folder = sample_folder(tmp_path / "out", ["a red bird", "a blue bird", "A red  bird", "one", "a blue bird"])
    score = caption_diversity(folder, network)
    pairs = [package(network, picture(a, 40), picture(b, 40)) for a, b in ((0, 2), (1, 4))]
    assert score.value == pytest.approx(np.mean(pairs), rel=1e-4) and score.std == pytest.approx(
        np.std(pairs), rel=1e-3
    )
    assert score.protocol["num_captions"] == 2 and score.protocol["captions_with_one_image"] == 1
    assert score.protocol["num_images"] == 4
    (folder / "002.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"002\.png"):
        caption_diversity(folder, network)
    left = caption_diversity(folder, network, skip_broken=True)
    assert left.value == pytest.approx(pairs[1], rel=1e-4) and left.protocol["skipped_names"] == ["002.png"]
    few = caption_diversity(sample_folder(tmp_path / "many", ["x"] * 6), network, max_images=2)
    assert few.protocol["num_images"] == 2
    with pytest.raises(DataError, match="no caption has two images"):
        caption_diversity(sample_folder(tmp_path / "singles", ["x", "y"]), network)
    with pytest.raises(DataError, match=r"no captions\.jsonl"):
        caption_diversity(write_pictures(tmp_path / "plain", 2), network)


def test_pairs_are_matched_by_key_and_by_file_name(tmp_path, network):
    real = write_pictures(tmp_path / "real" / "class.1", 3, size=40, tone=50).parent
    keys = ["class.1/002", "class.1/000", "002"]
    fake = sample_folder(tmp_path / "fake", ["x", "y", "z"], keys)
    score = paired_distance(real, fake, network, batch_size=2)
    expected = [
        package(network, picture(number, 40, tone=50), picture(index, 40)) for index, number in enumerate((2, 0, 2))
    ]
    assert score.value == pytest.approx(np.mean(expected), rel=1e-4)
    assert score.std == pytest.approx(np.std(expected), rel=1e-3)
    assert score.protocol["num_pairs"] == 3 and score.protocol["real_images_resized"] == 0
    (fake / "captions.jsonl").unlink()
    by_name = paired_distance(real, fake, network)
    expected = [package(network, picture(n, 40, tone=50), picture(n, 40)) for n in range(3)]
    assert by_name.value == pytest.approx(np.mean(expected), rel=1e-4)


def test_pairs_of_odd_keys_are_matched_as_the_sampler_writes_them(tmp_path, network):
    """With `--real`: odd characters are replaced, and a checksum tells `a b` and `a_b` apart."""
    keys = ["001.Bird/a b", "001.Bird/a_b", "(1) c"]
    real = tmp_path / "real"
    for number, key in enumerate(keys):
        file = real / f"{key_stem(key)}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, 40, tone=50)).save(file)
    fake = sample_folder(tmp_path / "fake", ["x", "y", "z"], [keys[1], keys[2], keys[0]])
    score = paired_distance(real, fake, network)
    expected = [package(network, picture(real, 40, tone=50), picture(n, 40)) for n, real in enumerate((1, 2, 0))]
    assert score.value == pytest.approx(np.mean(expected), rel=1e-4) and score.protocol["num_pairs"] == 3


def test_a_name_that_two_real_images_share_is_no_partner(tmp_path, network):
    (tmp_path / "real").mkdir()
    for number, name in enumerate(("a b", "a_b")):
        Image.fromarray(picture(number, 40)).save(tmp_path / "real" / f"{name}.png")
    fake = sample_folder(tmp_path / "fake", ["x"], ["a+b"])
    with pytest.raises(DataError, match="no real image, or several, for 1 of 1 generated ones"):
        paired_distance(tmp_path / "real", fake, network)


def test_pairs_without_partner_and_of_other_sizes(tmp_path, network):
    real, fake = write_pictures(tmp_path / "real", 2, size=80), write_pictures(tmp_path / "fake", 3, size=40)
    with pytest.raises(DataError, match=r"for 1 of 3 generated ones, e\.g\. 002\.png"):
        paired_distance(real, fake, network)
    score = paired_distance(real, fake, network, skip_broken=True)
    small = [np.array(Image.fromarray(picture(n, 80)).resize((40, 40), Image.Resampling.BICUBIC)) for n in range(2)]
    expected = np.mean([package(network, small[n], picture(n, 40)) for n in range(2)])
    assert score.value == pytest.approx(expected, rel=1e-4)
    assert score.protocol["real_images_resized"] == 2 and score.protocol["without_partner"] == 1
    assert "1 generated images have no real partner" in score.warnings[0]
    with pytest.raises(DataError, match="16x16 px are too small for LPIPS"):
        paired_distance(real, write_pictures(tmp_path / "small", 2, size=16), network)


def test_missing_and_foreign_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"get alexnet-owt-7be5be79\.pth"):
        load_perceptual_distance()
    torch.save({"conv": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="is no AlexNet"):
        load_perceptual_distance(tmp_path / "other.pth")
