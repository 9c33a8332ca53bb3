"""Published models: folders without pickles that draw the same bytes, carry their scores, and are refused when damaged."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CAPTIONS, GENERATORS, tiny_checkpoint, tiny_pipeline

from main import main as main_command
from miscc.errors import CheckpointError, UserError
from miscc.files import hash_of_file
from models.registry import network_name, to_state
from models.ssa_gan import OneWayDiscriminator
from sampling import published
from sampling.convert import describe
from sampling.pipeline import TextToImage
from sampling.publish import example_captions, publish, read_evaluations
from sampling.publish import main as publish_command
from sampling.published import load_model, weight_file
from sampling.side_by_side import side_by_side


@pytest.mark.parametrize("system", GENERATORS)
def test_a_published_model_draws_the_same_bytes(system, tmp_path):
    pipeline = tiny_pipeline(system)
    pipeline.save_pretrained(tmp_path / "model", examples=CAPTIONS)
    again = TextToImage.from_pretrained(tmp_path / "model", device="cpu")
    before, after = (one.generate(CAPTIONS, seed=4, with_attention=True) for one in (pipeline, again))
    assert np.array_equal(before.images, after.images) and before.images.std() > 0
    for a, b in zip([*before.masks, *before.attention], [*after.masks, *after.attention], strict=True):
        assert np.array_equal(a, b)
    assert again.origin["step"] == 7 and again.origin["examples"] == CAPTIONS
    assert again.vocabulary == pipeline.vocabulary


def test_the_folder_holds_what_was_promised_and_no_pickle(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model", examples=CAPTIONS)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"model.safetensors", "config.json", "vocabulary.json", "README.md", "samples.png"}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["system"] == "ssa_gan" and config["image_size"] == 16
    assert config["generator"]["arguments"]["nf"] == 2 and config["text_encoder"]["name"] == "rnn"
    with (tmp_path / "model" / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    assert {name.split(".")[0] for name in header} == {"generator", "text_encoder", "__metadata__"}


def test_half_precision_takes_half_of_the_room_and_draws_nearly_the_same(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "whole")
    pipeline.save_pretrained(tmp_path / "half", examples=CAPTIONS, half=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]

    # Matrices are rounded, the rest is not, and all of it computes in float32.
    again, checkpoint = TextToImage.from_pretrained(tmp_path / "half", "cpu"), load_model(tmp_path / "half")
    kinds = {(value.dim() > 1, value.dtype) for value in checkpoint["networks"]["generator"]["state"].values()}
    assert kinds == {(True, torch.float16), (False, torch.float32), (False, torch.int64)}
    assert all(parameter.dtype == torch.float32 for parameter in again.generator.parameters())
    images = [one.generate(CAPTIONS, seed=4).images.astype(int) for one in (pipeline, again)]
    assert 0 < np.abs(images[0] - images[1]).max() <= 3
    assert "rounded to half precision" in (tmp_path / "half" / "README.md").read_text()
    assert "half precision" not in (tmp_path / "whole" / "README.md").read_text()


def test_what_half_precision_does_not_hold_is_refused(tmp_path):
    pipeline = tiny_pipeline()
    torch.nn.init.constant_(pipeline.generator.fc.weight, 70_000.0)
    with pytest.raises(
        CheckpointError, match="fc.weight has values that half precision does not hold; publish it without"
    ):
        pipeline.save_pretrained(tmp_path / "model", half=True)
    with pytest.raises(CheckpointError, match="no such|a folder without"):
        load_model(tmp_path / "model")


def test_a_refused_model_leaves_the_one_that_is_there(tmp_path):
    folder = tiny_pipeline().save_pretrained(tmp_path / "model", examples=CAPTIONS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pipeline = tiny_pipeline()
    torch.nn.init.constant_(pipeline.generator.fc.weight, 70_000.0)
    with pytest.raises(CheckpointError, match="generator.fc.weight has values"):
        pipeline.save_pretrained(folder, examples=CAPTIONS[:1], half=True, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_leaves_the_model_that_is_there(tmp_path, monkeypatch):
    folder = tiny_pipeline().save_pretrained(tmp_path / "model", examples=CAPTIONS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(path, write):
        raise UserError(f"{path}: the disk is full")

    monkeypatch.setattr("sampling.published.write_atomically", refuse)
    with pytest.raises(UserError, match="the disk is full"):
        tiny_pipeline().save_pretrained(folder, half=True, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    TextToImage.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("full_at", [1, 2, 3])
def test_a_disk_that_is_full_later_leaves_the_model_and_its_discriminators(tmp_path, monkeypatch, full_at):
    """All that draws and all that trains is of one publication, whichever file is the one that does not fit."""
    network = OneWayDiscriminator(nf=1, image_size=16, sentence_dim=8)
    discriminators = {"discriminator": to_state(network_name(network), network)}
    folder = publish(tiny_pipeline(), tmp_path / "model", examples=CAPTIONS, discriminators=discriminators)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = []

    def refuse(path, *arguments):
        files.append(Path(path).name)
        if len(files) == full_at:
            raise UserError(f"{path}: the disk is full")
        return plain(path, *arguments)

    plain = published.write_atomically
    monkeypatch.setattr(published, "write_atomically", refuse)
    monkeypatch.setattr(published, "write_json", lambda path, value: refuse(path, lambda stream: stream.write(b"{}")))
    with pytest.raises(UserError, match="the disk is full"):
        publish(tiny_pipeline(), folder, half=True, overwrite=True, discriminators=discriminators)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "discriminator" in published.load_weights(folder)["networks"]


def test_a_model_without_examples_keeps_no_picture_of_the_former_one(tmp_path):
    folder = tiny_pipeline().save_pretrained(tmp_path / "model", examples=CAPTIONS)
    assert (folder / published.PICTURE).is_file()
    tiny_pipeline().save_pretrained(folder, overwrite=True)
    assert not (folder / published.PICTURE).is_file()


@pytest.mark.parametrize(
    "record", [1, {"scores": [1]}, {"scores": [{"name": "FID", "value": None}]}, {"scores": [], "protocol": "x"}, {}]
)
def test_odd_results_beside_a_checkpoint_are_named(tmp_path, record):
    (tmp_path / "evaluation.json").write_text(json.dumps([{"scores": []}, record]))
    with pytest.raises(UserError, match="evaluation.json: entry 2 is no result of an evaluation; move the file away"):
        read_evaluations(tmp_path / "evaluation.json")


def test_a_model_that_was_rounded_says_so_when_it_is_published_again(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "half", half=True)
    TextToImage.from_pretrained(tmp_path / "half", "cpu").save_pretrained(tmp_path / "again")
    assert "rounded to half precision" in (tmp_path / "again" / "README.md").read_text()
    assert TextToImage.from_pretrained(tmp_path / "again", "cpu").origin["half"] is True


def test_loading_runs_no_code(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "model")

    def refuse(*_, **__):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert TextToImage.from_pretrained(tmp_path / "model", device="cpu").image_size == 16


def test_the_command_writes_scores_with_protocol_hash_and_warnings(tmp_path):
    config = {"DATASET_NAME": "toybirds", "DATA_DIR": "/home/me/birds", "TRAIN": {"NF": 2, "NET_G": "/secret/a.pth"}}
    checkpoint = tiny_checkpoint(tmp_path / "last.pth", config=config)
    sha256 = hash_of_file(checkpoint)
    score = {"name": "FD[efficientnet-lite0]", "value": 12.3456, "std": 0.5, "protocol": {}, "warnings": []}
    records = [
        {"protocol": {"name": "small"}, "scores": [score], "num_images": 500, "overrides": {"num_images": 500},
         "warnings": ["only 500 images"], "not_computed": {"IS": "no weights"},
         "checkpoint": {"path": "/home/me/last.pth", "sha256": sha256, "step": 7}},
        {"protocol": {"name": "cub-30k"}, "scores": [score | {"name": "FID", "std": None}], "num_images": 30000,
         "checkpoint": {"path": "/home/me/old.pth", "sha256": "f" * 64, "step": 3}},
    ]  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(records))
    publish_command(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "birds"), "--caption", CAPTIONS[0]])
    card = (tmp_path / "birds" / "README.md").read_text()
    row = (
        f"| FD[efficientnet-lite0] | 12.3456 ± 0.5 | small (changed: num_images 500) | 500 | step 7, `{sha256[:16]}` |"
    )
    assert row in card
    assert f"| FID | 12.3456 | cub-30k | 30000 | step 3, `{'f' * 16}`, another file |" in card
    assert "only 500 images" in card and "IS: no weights" in card and "`TRAIN.NF` | `2`" in card
    everything = card + (tmp_path / "birds" / "config.json").read_text()
    assert "/home/me" not in everything and "/secret" not in everything
    with pytest.raises(UserError, match="exists already; give --overwrite"):
        publish_command(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "birds")])


def test_the_average_is_published_unless_told_otherwise(tmp_path):
    average = tiny_pipeline().generator
    torch.nn.init.constant_(average.fc.bias, 0.5)
    checkpoint = tiny_checkpoint(tmp_path / "last.pth", averaged=average)
    for name, options in (("average", []), ("plain", ["--no-average"])):
        publish_command(["--checkpoint", str(checkpoint), "--out", str(tmp_path / name), *options])
    average, plain = (TextToImage.from_pretrained(tmp_path / name, "cpu") for name in ("average", "plain"))
    assert average.origin["averaged"] is True and plain.origin["averaged"] is False
    assert (average.generator.fc.bias == 0.5).all() and not (plain.generator.fc.bias == 0.5).all()
    with pytest.raises(CheckpointError, match="holds no generator but text_encoder, generator_ema"):
        TextToImage.load(tmp_path / "average", "cpu", averaged=False)


def test_commands_that_take_a_checkpoint_take_the_folder(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    arguments = ["--cfg", "cfg/demo.yml", "--gpu", "-1", "--checkpoint", str(tmp_path / "model")]
    assert main_command([*arguments, "--caption", CAPTIONS[0]]) == 0
    assert "model/samples/step7/captions" in capsys.readouterr().out
    assert weight_file(tmp_path / "model") == tmp_path / "model" / "model.safetensors"
    assert weight_file(tmp_path / "last.pth") == tmp_path / "last.pth"
    pipelines = {"A": TextToImage.load(tmp_path / "model", "cpu"), "B": tiny_pipeline("df_gan")}
    assert side_by_side(pipelines, CAPTIONS).shape[2] == 3


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text('{"format": 9}'), "has format 9, this version reads up to 1"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "`format` is missing"),
        (lambda f: (f / "config.json").write_text('{"format": 1}'), "does not describe the generator"),
        (lambda f: (f / "vocabulary.json").unlink(), "copy all files of the published model"),
        (lambda f: (f / "config.json").unlink(), "a folder without config.json and model.safetensors"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, reason):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=reason):
        load_model(tmp_path / "model")


def test_arguments_that_do_not_fit_the_weights_are_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for changed, reason in (({"nf": 3}, "does not fit"), ({"os": "rm"}, "does not fit")):
        entry = config["generator"] | {"arguments": config["generator"]["arguments"] | changed}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"generator": entry}))
        with pytest.raises(CheckpointError, match=reason):
            TextToImage.from_pretrained(tmp_path / "model", device="cpu")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"generator": entry | {"name": "os.system"}}))
    with pytest.raises(CheckpointError, match="a network 'os.system', which this version does not know"):
        TextToImage.from_pretrained(tmp_path / "model", device="cpu")


def test_a_name_online_needs_huggingface_hub_and_a_folder_does_not(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert TextToImage.from_pretrained(tmp_path / "model", device="cpu").image_size == 16
    with pytest.raises(CheckpointError, match="me/birds: no such folder; .* pip install huggingface_hub"):
        TextToImage.from_pretrained("me/birds", device="cpu")
    with pytest.raises(CheckpointError, match="no such folder; give the folder of a published model"):
        TextToImage.from_pretrained("../birds", device="cpu")


def test_a_name_online_fetches_the_four_files_alone(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        if name == "me/gone":
            raise OSError("no network")
        return str(tmp_path / "model")

    package, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    package.snapshot_download = snapshot_download
    for name in ("HfHubHTTPError", "HFValidationError", "LocalEntryNotFoundError"):
        setattr(errors, name, type(name, (Exception,), {}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    assert TextToImage.from_pretrained("me/birds", device="cpu").image_size == 16
    assert asked == [("me/birds", ["README.md", "config.json", "model.safetensors", "vocabulary.json"])]
    with pytest.raises(CheckpointError, match="cannot be fetched: no network"):
        TextToImage.from_pretrained("me/gone", device="cpu")


def test_a_published_folder_is_described_like_a_checkpoint(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model", examples=CAPTIONS)
    lines = describe(tmp_path / "model")
    assert "checkpoint of this project, step 7" in lines[0] and "generator: ssa_gan" in "".join(lines)


@pytest.mark.parametrize("value", [1.5, torch.zeros(2), None])
def test_a_checkpoint_whose_data_folder_is_no_text_has_no_example_captions(value):
    pipeline = tiny_pipeline()
    pipeline.origin = {**pipeline.origin, "config": {"DATASET_NAME": "toybirds", "DATA_DIR": value}}
    assert example_captions(pipeline) == []
