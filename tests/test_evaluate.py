"""Protocols and evaluations: requests, real images and their cache, scores, self-check."""

import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from evaluate_help import QUICK, add_quick_protocol, one_step_checkpoint
from metrics_help import tiny_network

from datasets import load_records
from eval.evaluate import (
    arguments,
    evaluate,
    real_images_of,
    requests_of,
    self_check,
)
from eval.features.reference import RealImages, reference
from eval.features.statistics import statistics_of_features
from eval.FID import distance
from eval.metric import Tools
from eval.protocol.protocols import PROTOCOLS, Protocol, find_protocol
from eval.protocol.runner import ImageStream, run_protocol
from miscc.errors import ConfigError, DataError, UserError
from sampling.encoders import load_encoders
from sampling.pipeline import Generated, TextToImage


@pytest.fixture(autouse=True)
def quick_protocol(monkeypatch):
    add_quick_protocol(monkeypatch)


@pytest.fixture
def records(drawn_folder):
    return load_records("folder", drawn_folder, "test")[0]


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return one_step_checkpoint(tiny, tmp_path)


# -- protocols ----------------------------------------------------------------------------------------------------------


def test_every_protocol_has_the_fields_that_papers_differ_in():
    assert set(PROTOCOLS) >= {"cub-30k", "coco-30k", "df-gan", "clean-fid", "toybirds", "small"}
    assert all(name == protocol.name and protocol.about for name, protocol in PROTOCOLS.items())
    assert PROTOCOLS["cub-30k"].num_images == PROTOCOLS["coco-30k"].num_images == 30_000
    assert (PROTOCOLS["df-gan"].truncation, PROTOCOLS["df-gan"].real_crop) == (0.88, "augmented")
    assert PROTOCOLS["clean-fid"].resize == "clean" and PROTOCOLS["small"].num_images <= 2000


def test_an_unknown_protocol_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean cub-30k"):
        find_protocol("cub-3k")
    with pytest.raises(ConfigError, match="unknown; There are cub-30k"):
        find_protocol("xyz")


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_every_protocol_can_be_run(name, checkpoint, records):
    """With a feature network that is instant, and few images."""
    more = PROTOCOLS[name].more_networks and ("tiny",)
    protocol = replace(PROTOCOLS[name], network="tiny", resize="bilinear", more_networks=more)
    record = evaluate(TextToImage.load(checkpoint, "cpu"), protocol, records, num_images=20)
    assert record["overrides"] == {"num_images": 20} and record["num_images"] == 20
    computed = {score["name"].split("[")[0] for score in record["scores"]}
    assert {"FD", "FID"} & computed and len(computed) + len(record["not_computed"]) == len(protocol.metrics)


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": ("FIDD",)},
        {"metrics": ()},
        {"real_crop": "left"},
        {"caption_choice": "all"},
        {"num_images": None},
        {"num_images": 1},
        {"num_real": 1},
        {"quantisation": "float"},
    ],
)
def test_a_protocol_that_contradicts_itself_is_refused(change):
    with pytest.raises(ConfigError, match="protocol quick"):
        replace(QUICK, **change)


def test_what_is_drawn(records):
    pairs = requests_of(replace(QUICK, images_per_caption=2), records)
    assert len(pairs) == 24 and [r.index for r in pairs] == list(range(24))
    assert [r.caption for r in pairs[::2]] == [r.caption for r in pairs[1::2]]
    assert len({(r.key, r.caption_number) for r in pairs}) == 12
    assert requests_of(QUICK, records) != requests_of(replace(QUICK, seed=1), records)
    tens = requests_of(PROTOCOLS["df-gan"], records)
    assert len(tens) == 120 and {r.caption_number for r in tens} == {0} and tens[9].sample == 9
    few = requests_of(PROTOCOLS["df-gan"], records, 7)
    assert [r.index for r in few] == list(range(7)) and len(requests_of(QUICK, records, 5)) == 5


def test_a_light_protocol_takes_so_many_real_images(records):
    light = replace(QUICK, num_real=8)
    some = real_images_of(light, records)
    assert len(some) == 8 and set(some.keys) < set(records.keys)
    assert some.keys == real_images_of(light, records).keys != real_images_of(replace(light, seed=1), records).keys
    assert len(real_images_of(light, records, 5)) == 5 and len(real_images_of(light, records, 100)) == 8
    for whole in (QUICK, replace(QUICK, num_real=12), replace(QUICK, num_real=500)):
        assert real_images_of(whole, records) is records
    assert real_images_of(QUICK, records, 2) is records  # the papers' protocols compare with the whole set
    assert all(
        (p.num_real is None) == (p.network != "efficientnet-lite0") for p in PROTOCOLS.values() if p is not QUICK
    )


# -- real images --------------------------------------------------------------------------------------------------------


def test_real_images_are_cropped_as_said(records):
    middle = RealImages(records, 16)
    batches = list(middle.batches(5))
    assert [len(batch) for batch in batches] == [5, 5, 2] and batches[0].dtype == np.uint8
    assert np.array_equal(batches[1][2], middle.read(7))
    assert np.array_equal(next(middle.batches(5, range(3, 12))), np.stack([middle.read(i) for i in range(3, 8)]))
    augmented = RealImages(records, 16, "augmented", seed=1)
    assert any(not np.array_equal(augmented.read(i), middle.read(i)) for i in range(12))
    assert np.array_equal(augmented.read(3), RealImages(records, 16, "augmented", seed=1).read(3))
    prints = {RealImages(records, *a).fingerprint() for a in [(16,), (17,), (16, "augmented"), (16, "augmented", 1)]}
    assert len(prints) == 4 and middle.fingerprint() == RealImages(records, 16, seed=9).fingerprint()


@pytest.mark.parametrize("with_features", [False, True])
def test_features_of_real_images_are_kept_until_something_changes(records, tmp_path, with_features):
    network, images = tiny_network(), RealImages(records, 16)
    first = reference(images, network, with_features, tmp_path)
    again = reference(images, network, with_features, tmp_path)
    assert (first.from_cache, again.from_cache) == (False, True)
    assert np.array_equal(first.statistics.mean, again.statistics.mean)
    assert (again.features is not None) == with_features
    assert not reference(images, tiny_network(seed=1), with_features, tmp_path).from_cache
    assert not reference(RealImages(records, 16, "augmented"), network, with_features, tmp_path).from_cache
    for kept in tmp_path.rglob("*.np*"):
        kept.write_bytes(b"cut off")
    assert not reference(images, network, with_features, tmp_path).from_cache
    with pytest.raises(DataError, match="1 image"):
        reference(RealImages(records.select([0]), 16), network)


# -- evaluations --------------------------------------------------------------------------------------------------------


def values(record):
    return {score["name"]: score["value"] for score in record["scores"]}


def test_one_call_scores_and_says_how(checkpoint, encoders, records):
    pipeline, tools = TextToImage.load(checkpoint, "cpu"), Tools(load_encoders(encoders), batch_size=7)
    record = evaluate(pipeline, QUICK, records, tools=tools)
    label = tiny_network().label
    expected = [f"FD[{label}]", f"KD[{label}]", f"IS[{label}]", f"precision[{label}]", f"recall[{label}]"]
    assert list(values(record))[:5] == expected and list(values(record))[5].startswith("R-precision%[damsm:")
    assert "too small for LPIPS" in record["not_computed"]["diversity"]  # 16 px
    assert set(record["protocol"]) == {field.name for field in fields(Protocol)}
    assert record["network"]["weights_hash"] == tiny_network().weights_hash and record["num_images"] == 24
    assert record["overrides"] == {} and record["real"]["num_images"] == 12
    assert any("encoders that the generator was trained with" in warning for warning in record["warnings"])
    assert all(np.isfinite(value) for value in values(record).values())
    again = evaluate(pipeline, QUICK, records, tools=replace(tools, batch_size=24))
    assert values(again) == pytest.approx(values(record), rel=1e-6, abs=1e-9)
    other = evaluate(pipeline, replace(QUICK, seed=1), records, tools=tools)
    assert values(other)[expected[0]] != pytest.approx(values(record)[expected[0]], rel=1e-4)


def test_the_distance_is_that_of_the_same_files(checkpoint, records):
    """By hand: the drawn images' features against the real ones'."""
    pipeline, network = TextToImage.load(checkpoint, "cpu"), tiny_network()
    protocol = replace(QUICK, metrics=("FID",), diversity_captions=0)
    requests = requests_of(protocol, records)
    drawn = pipeline.generate([r.caption for r in requests], seed=protocol.seed).images
    real = np.stack([RealImages(records, 16).read(index) for index in range(12)])
    by_hand = distance(*(statistics_of_features(network.extract_features(list(images))[0]) for images in (real, drawn)))
    (value,) = values(evaluate(pipeline, protocol, records)).values()
    assert value == pytest.approx(by_hand, rel=1e-4, abs=1e-9)


def test_what_is_missing_is_listed_and_costs_the_rest_nothing(checkpoint, records, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    pipeline = TextToImage.load(checkpoint, "cpu")
    protocol = replace(QUICK, metrics=("FID", "IS", "R_precision"), network="inception-tf", resize="tf1")
    with pytest.raises(UserError, match="nothing can be computed: FID: inception-tf.*R_precision: no encoders"):
        evaluate(pipeline, protocol, records)
    record = evaluate(pipeline, replace(QUICK, metrics=("FID", "R_precision", "attributes", "mask_iou")), records)
    assert len(record["scores"]) == 1 and "--encoders" in record["not_computed"]["R_precision"]
    for metric in ("attributes", "mask_iou"):
        assert "reads images of toybirds alone, these are of folder" in record["not_computed"][metric]
    pipeline.origin["config"]["DATASET_NAME"] = "toybirds"
    record = evaluate(pipeline, replace(QUICK, metrics=("FID", "attributes", "mask_iou")), records)
    assert "too small to read birds off" in record["not_computed"]["attributes"]
    assert "too small to read birds off" in record["not_computed"]["mask_iou"]
    few = evaluate(pipeline, replace(QUICK, metrics=("FID", "IS")), records, num_images=3)
    assert "cannot be dealt to 4 splits" in few["not_computed"]["IS"]
    assert few["overrides"] == {"num_images": 3} and few["protocol"]["num_images"] == 24 and few["num_images"] == 3


def test_a_quick_look_takes_few_real_images(checkpoint, records):
    protocol = replace(QUICK, metrics=("FID",), num_real=10)
    pipeline = TextToImage.load(checkpoint, "cpu")
    quick = evaluate(pipeline, protocol, records, num_images=6)
    assert quick["real"]["num_images"] == quick["scores"][0]["protocol"]["num_real"] == 6
    assert evaluate(pipeline, protocol, records)["real"]["num_images"] == 10


def test_hints_name_options_of_this_command(checkpoint, encoders, records, monkeypatch, tmp_path):
    """Every option that a record's reasons name is one of `python -m eval.evaluate`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    pipeline, known = TextToImage.load(checkpoint, "cpu"), {o for a in arguments()._actions for o in a.option_strings}
    few = replace(QUICK, metrics=("FID", "R_precision"), candidates=99)
    reasons = [evaluate(pipeline, few, records, tools=Tools(load_encoders(encoders)))["not_computed"]["R_precision"]]
    assert "rank among fewer" in reasons[0]
    with pytest.raises(UserError) as stop:
        evaluate(pipeline, replace(QUICK, metrics=("FID",), network="inception-tf"), records)
    images = np.zeros((4, 40, 40, 3), np.uint8)
    draw = lambda requests, with_masks: iter([Generated(images, [])])  # noqa: E731
    requests = requests_of(QUICK, records, 4)
    large = ImageStream("generated", requests, draw, 40, records.vocabulary, repeats=requests)
    found = run_protocol(large, replace(QUICK, metrics=("FID", "diversity")), records, torch.device("cpu"), Tools())
    reasons += [str(stop.value), found["not_computed"]["diversity"]]
    named = [re.findall(r"--[a-z-]+", reason) for reason in reasons]
    assert named == [[], ["--weights"], ["--lpips-weights"]]
    assert all(option in known for options in named for option in options)


def test_diversity_among_images_of_one_caption(checkpoint, records):
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    alexnet = {f"features.{layer}": shape for layer, shape in shapes.items()}
    weights = checkpoint.with_name("alexnet.pth")
    torch.manual_seed(0)
    state = {f"{name}.weight": torch.randn(shape) * 0.05 for name, shape in alexnet.items()}
    torch.save(state | {f"{name}.bias": torch.zeros(shape[0]) for name, shape in alexnet.items()}, weights)

    def streamed(different):
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
        if not different:
            images[1], images[3] = images[0], images[2]
        requests = requests_of(QUICK, records, 4)
        repeats = [request._replace(caption=caption) for request, caption in zip(requests, "aabb", strict=True)]
        draw = lambda part, with_masks: iter([Generated(images[[r.index for r in part]], [])])  # noqa: E731
        return ImageStream("generated", requests, draw, 40, records.vocabulary, None, repeats)

    protocol, tools = replace(QUICK, metrics=("FID", "diversity")), Tools(lpips_weights=weights)
    found = [run_protocol(streamed(d), protocol, records, torch.device("cpu"), tools) for d in (False, True)]
    same, other = ([v for name, v in values(record).items() if "diversity" in name] for record in found)
    assert same == [pytest.approx(0.0, abs=1e-6)] and other[0] > 0.01


def test_self_check(drawn_folder, records, tmp_path):
    train_records = load_records("folder", drawn_folder, "train")[0]
    protocol, tools = replace(QUICK, metrics=("FID", "KID")), Tools(cache=tmp_path)
    other, same = self_check(protocol, train_records, records, 16, torch.device("cpu"), tools=tools)
    names = list(values(same))
    assert values(same)[names[0]] == pytest.approx(0.0, abs=1e-6) and values(other)[names[0]] > 1e-4
    assert other["num_images"] == 24 and same["num_images"] == 12
    assert other["image_source"] == "real train" and same["generator"] is None
