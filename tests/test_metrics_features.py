"""Streamed statistics, their cache and files, and the resize filters and labels of the networks."""

import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from metrics_help import picture, tiny_network, write_pictures
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from eval.features.networks import (
    find_weights,
    load_network,
    random_inception_state,
    resize_bilinear,
    resize_clean,
    resize_tf1,
)
from eval.features.sources import open_source
from eval.features.statistics import (
    Statistics,
    StreamedStatistics,
    collect_features,
    extract,
    image_statistics,
    load_statistics,
    save_statistics,
)
from eval.IS import InceptionScore
from eval.metric import Score, distance_name, score_name
from miscc.checkpoint import hash_tensors
from miscc.errors import CheckpointError, ConfigError, DataError


def test_streamed_statistics_by_hand():
    streamed = StreamedStatistics(2)
    streamed.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    streamed.update(torch.tensor([[5.0, 6.0]]))
    result = streamed.result()
    assert result.num_images == 3
    assert result.mean.tolist() == [3.0, 2.0]
    assert np.allclose(result.covariance, [[4.0, 6.0], [6.0, 12.0]], rtol=0, atol=1e-14)


def test_streamed_statistics_keep_their_digits_beside_a_large_mean():
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(1000, 5)) + 1e7)
    streamed = StreamedStatistics(5)
    for part in rows.split(7):
        streamed.update(part)
    difference = np.abs(streamed.result().covariance - np.cov(rows.numpy(), rowvar=False)).max()
    assert difference < 1e-7  # sums of squares alone would be off by 0.01


def test_streamed_statistics_of_two_halves_merge_to_those_of_all():
    rows = torch.from_numpy(np.random.default_rng(1).normal(size=(90, 4)))
    whole, first, second = (StreamedStatistics(4) for _ in range(3))
    whole.update(rows)
    first.update(rows[:31])
    second.update(rows[31:])
    first.merge(second)
    first.merge(StreamedStatistics(4))
    assert first.count == 90
    assert np.allclose(first.result().covariance, whole.result().covariance, rtol=0, atol=1e-13)
    assert np.allclose(first.result().mean, whole.result().mean, rtol=0, atol=1e-14)


def test_the_inception_score_of_two_halves_merges_to_that_of_all():
    """As two processes share the images: every image counts, and a missing one is seen."""
    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(60, 5)))
    whole, first, second = (InceptionScore(60, splits=3) for _ in range(3))
    for score, rows in ((whole, range(60)), (first, range(25)), (second, range(25, 60))):
        score.update(SimpleNamespace(logits=logits[list(rows)], indices=list(rows)))
    with pytest.raises(ValueError, match="25 of 60 images seen"):
        first.values()
    first.merge(second)
    assert np.allclose(first.values(), whole.values(), rtol=0, atol=1e-12)


def test_streamed_statistics_hold_as_much_for_30000_rows_as_for_300():
    def held(rows: int) -> int:
        streamed = StreamedStatistics(16)
        for _ in range(rows // 100):
            streamed.update(torch.ones(100, 16))
        assert streamed.count == rows
        tensors = [value for value in vars(streamed).values() if isinstance(value, torch.Tensor)]
        assert not [value for value in vars(streamed).values() if isinstance(value, (list, dict))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert held(300) == held(30_000) == (16 + 16 * 16) * 8


def test_one_row_has_no_covariance(tmp_path):
    streamed = StreamedStatistics(3)
    streamed.update(torch.ones(1, 3))
    with pytest.raises(DataError, match="at least two"):
        streamed.result()
    with pytest.raises(DataError, match="a single image"):
        image_statistics(write_pictures(tmp_path / "one", 1), tiny_network())


def test_features_do_not_depend_on_the_batch_and_images_may_differ_in_size(tmp_path):
    folder = write_pictures(tmp_path / "set", 5)
    Image.fromarray(picture(9, 31)).save(folder / "009.png")
    source, network = open_source(folder), tiny_network()
    one_by_one = collect_features(source, network, batch_size=1)
    assert one_by_one.shape == (6, 6)
    assert torch.allclose(collect_features(source, network, batch_size=4), one_by_one, rtol=0, atol=1e-5)
    logits = torch.cat([logits for _, logits in extract(source, network)])
    assert torch.allclose(logits, one_by_one @ network.classifier.weight.T, rtol=0, atol=1e-4)


def test_image_statistics_are_those_of_the_features(tmp_path):
    folder = write_pictures(tmp_path / "set", 9)
    network = tiny_network()
    statistics = image_statistics(folder, network, batch_size=4)
    features = collect_features(open_source(folder), network).double().numpy()
    assert statistics.num_images == 9 and statistics.protocol == network.protocol()
    assert np.allclose(statistics.mean, features.mean(axis=0), rtol=0, atol=1e-5)
    assert np.allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=0, atol=1e-4)


class Counting:
    """Counts the images that a network looks at."""

    def __init__(self, network):
        self.network, self.seen = network, 0

    def __getattr__(self, name):
        return getattr(self.network, name)

    def extract_features(self, images):
        self.seen += len(images)
        return self.network.extract_features(images)


def test_cached_statistics_are_read_until_files_network_or_filter_change(tmp_path):
    folder, cache = write_pictures(tmp_path / "set", 6), tmp_path / "cache"
    network = Counting(tiny_network())
    first = image_statistics(folder, network, cache=cache)
    again = image_statistics(folder, network, cache=cache)
    assert network.seen == 6
    assert np.array_equal(first.covariance, again.covariance) and again.num_images == 6
    other = Counting(tiny_network(resize="clean"))
    image_statistics(folder, other, cache=cache)
    assert other.seen == 6
    other = Counting(tiny_network(seed=1))
    image_statistics(folder, other, cache=cache)
    assert other.seen == 6
    Image.fromarray(picture(50)).save(folder / "003.png")
    changed = image_statistics(folder, network, cache=cache)
    assert network.seen == 12 and not np.array_equal(first.mean, changed.mean)
    kept = sorted((cache / "statistics").iterdir())
    assert len(kept) == 4 and all(file.suffix == ".npz" for file in kept)
    for file in kept:
        file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(image_statistics(folder, network, cache=cache).mean, changed.mean)
    assert network.seen == 18


def test_cache_keeps_apart_with_and_without_broken_images(tmp_path):
    folder, cache = write_pictures(tmp_path / "set", 6), tmp_path / "cache"
    (folder / "001.png").write_bytes(b"broken")
    network = tiny_network()
    for _ in range(2):  # made, then read from the cache
        statistics = image_statistics(folder, network, skip_broken=True, cache=cache)
        assert statistics.num_images == 5 and statistics.skipped == ("001.png",)
        with pytest.raises(DataError, match=r"001\.png"):
            image_statistics(folder, network, cache=cache)


def test_statistics_files_are_pytorch_fids_and_know_what_made_them(tmp_path):
    network = tiny_network()
    made = Statistics(np.arange(6.0), np.eye(6), 123, network.protocol(), ("a.png",))
    save_statistics(tmp_path / "own.npz", made)
    with np.load(tmp_path / "own.npz") as arrays:
        assert arrays["mu"].tolist() == list(range(6)) and np.array_equal(arrays["sigma"], np.eye(6))
    assert load_statistics(tmp_path / "own.npz", network).num_images == 123
    assert load_statistics(tmp_path / "own.npz").skipped == ("a.png",)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(6), sigma=np.eye(6))
    foreign = image_statistics(tmp_path / "foreign.npz", network)
    assert foreign.num_images is None and foreign.protocol == {}
    with pytest.raises(DataError, match="made with weights_hash"):
        load_statistics(tmp_path / "own.npz", tiny_network(seed=1))
    with pytest.raises(DataError, match="made with resize bilinear, not clean"):
        load_statistics(tmp_path / "own.npz", tiny_network(resize="clean"))
    np.savez(tmp_path / "large.npz", mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(DataError, match="has 9 features, tiny:.* gives 6"):
        load_statistics(tmp_path / "large.npz", network)
    np.savez(tmp_path / "odd.npz", mu=np.zeros(9), sigma=np.eye(8))
    with pytest.raises(DataError, match="do not fit"):
        load_statistics(tmp_path / "odd.npz")


@pytest.mark.parametrize(("height", "width"), [(64, 64), (75, 50), (299, 299), (320, 31)])
def test_tf1_resize_is_torch_fidelitys_bit_for_bit(height, width):
    images = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    assert torch.equal(resize_tf1(images, 299), theirs)


def test_tf1_resize_by_hand():
    row = torch.tensor([[[[0.0, 30.0]]]]).expand(1, 1, 2, 2)
    assert torch.equal(resize_tf1(row, 4)[0, 0, 0], torch.tensor([0.0, 15.0, 30.0, 30.0]))  # corners at 0, then held
    assert torch.allclose(resize_bilinear(row, 4)[0, 0, 0], torch.tensor([0.0, 7.5, 22.5, 30.0]))  # centres


@pytest.mark.parametrize(("height", "width"), [(64, 64), (400, 310)])
def test_clean_resize_is_pils_bicubic_on_floats(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.float32)
    theirs = np.asarray(Image.fromarray(pixels).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
    ours = resize_clean(torch.from_numpy(pixels)[None, None], 299)[0, 0].numpy()
    assert np.abs(ours - theirs).max() < 0.02  # of 255 levels


def test_inception_inputs_are_normalised_as_the_tools_whose_filter_it_is():
    pixels = np.zeros((299, 299, 3), np.uint8)
    pixels[..., 0] = 255
    network = load_network("random", resize="tf1")
    assert network.prepare([pixels])[0, :, 0, 0].tolist() == [127 / 128, -1, -1]
    assert load_network("random", resize="bilinear").prepare([pixels])[0, :, 0, 0].tolist() == [1, -1, -1]


def test_random_inception_is_a_function_of_the_seed_and_leaves_other_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    network = load_network("random", seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert network.weights_hash == hash_tensors(random_inception_state(1)) != hash_tensors(random_inception_state(2))
    features, logits = network.extract_features([picture(0), picture(1)])
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert 0.05 < float(features.mean()) < 5  # the signal neither dies nor explodes on its way


def test_torchvisions_inception_sees_what_torchvision_sees(tmp_path):
    """With auxiliary head in the file, as the published one has, and in [-1, 1], as that was trained."""
    torch.manual_seed(0)
    reference = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=False).eval()
    for tensor in reference.state_dict().values():
        if tensor.ndim == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    network = load_network("inception-torchvision", weights=tmp_path / "weights.pth")
    image = picture(3, 299)
    features, logits = network.extract_features([image])
    with torch.no_grad():
        expected = reference(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
    assert features.shape == (1, 2048) and float(expected.std()) > 0.1
    assert torch.allclose(logits, expected, rtol=0, atol=1e-3)
    assert network.label == f"inception-torchvision:{network.weights_hash[:8]}" and network.resize == "bilinear"


def test_every_score_says_by_which_network_it_is():
    network = tiny_network()
    assert distance_name("FID", network) == f"FD[tiny:{network.weights_hash[:8]}]"
    network = load_network("efficientnet-lite0")
    assert (distance_name("FID", network), distance_name("KID", network), score_name(network)) == (
        "FD[efficientnet-lite0]",
        "KD[efficientnet-lite0]",
        "IS[efficientnet-lite0]",
    )
    network.name = network.label = "inception-tf"
    assert (distance_name("FID", network), distance_name("FID∞", network), score_name(network)) == (
        "FID[inception-tf]",
        "FID∞[inception-tf]",
        "IS[imagenet]",
    )
    protocol = {"num_images": 30000, "splits": 10, "resize": "tf1"}
    assert Score("IS[imagenet]", 4.3612, protocol, std=0.0321).line() == (
        "IS[imagenet] 4.3612 ± 0.0321  [30000 images, 10 splits, resize tf1]"
    )


def test_missing_and_foreign_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"pt_inception-2015-12-05-6726825d\.pth .*checkpoints"):
        load_network("inception-tf")
    file = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    file.parent.mkdir(parents=True)
    torch.save({"conv.weight": torch.ones(1)}, file)
    assert find_weights(None, [file.name], "x", "y") == file
    with pytest.raises(CheckpointError, match="are not the weights of TensorFlow's 2015 Inception"):
        load_network("inception-tf")
    with pytest.raises(CheckpointError, match="no such weight file"):
        load_network("inception-tf", weights=tmp_path / "nowhere.pth")
    with pytest.raises(ConfigError, match="choose from inception-tf"):
        load_network("inception-v4")


def test_efficientnet_knows_what_it_sees():
    """Its weights came with the package and fit: a flat picture and a striped one are far apart, and it is sure."""
    stripes = np.zeros((224, 224, 3), np.uint8)
    stripes[:, (np.arange(224) // 14) % 2 == 0] = 255
    network = load_network("efficientnet-lite0")
    _, logits = network.extract_features([stripes, np.full((224, 224, 3), 128, np.uint8)])
    zebra, flat = logits.softmax(dim=1)
    assert network.published and float(zebra.max()) > 0.2 and int(zebra.argmax()) != int(flat.argmax())


@pytest.mark.parametrize(
    "changed",
    [
        {"made_by": np.array("[]")}, {"made_by": np.array("{")}, {"made_by": np.array('{"protocol": 3}')},
        {"made_by": np.array('{"skipped": 3}')}, {"made_by": np.array("[" * 100_000)}, {"num_images": np.arange(3)},
        {"num_images": np.array("many")}, {"mu": np.array(["a"])}, {"mu": np.array(3.0)}, {"sigma": np.zeros((2, 3))},
    ],
    ids=lambda changed: str(changed)[:50],
)  # fmt: skip
def test_statistics_of_another_form_are_one_line(tmp_path, changed):
    arrays = {"mu": np.zeros(2), "sigma": np.eye(2), "num_images": np.array(5), "made_by": np.array("{}")}
    np.savez(tmp_path / "good.npz", **arrays)
    assert load_statistics(tmp_path / "good.npz").num_images == 5
    np.savez(tmp_path / "bad.npz", **(arrays | changed))
    with pytest.raises(DataError, match="bad.npz") as error:
        load_statistics(tmp_path / "bad.npz")
    assert len(str(error.value)) < 500


def test_statistics_that_declare_more_than_memory_are_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**9)})
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue())
        archive.writestr("sigma.npy", header.getvalue())
    with pytest.raises(DataError, match="large.npz: cannot be read as statistics"):
        load_statistics(tmp_path / "large.npz")
