"""AttnGAN and AttnDCGAN as a user runs them: the authors' discriminators, settings files, examples, attention pictures."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import fill_state
from PIL import Image

from main import main
from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError, DataError
from miscc.settings import from_config
from models.attn_discriminator import AttnDiscriminator, StageDiscriminator
from models.choice import chosen_system
from models.registry import network_name
from models.released import load_discriminator, load_generator
from sampling.attention import caption_words
from sampling.pipeline import TextToImage
from training.build import build_networks, networks_from_files
from training.settings import StartSettings
from training.trainer import Trainer, train

ROOT = Path(__file__).parents[1]
CPU = World(0, 1, torch.device("cpu"))


# -- the authors' discriminators --------------------------------------------------------------------------------------


def stage_state(image_size, sentence_dim=8, df_dim=1, has_unconditional_head=True):
    """A state dict with the released names, for a stage from 64 px on."""
    stage = StageDiscriminator(df_dim, image_size, sentence_dim, has_unconditional_head)
    parts = {"encoder.": "img_code_s16.", "down.0.": "img_code_s32.", "down.1.": "img_code_s64.",
             "unconditional_head.": "UNCOND_DNET.outlogits.0.", "joint.": "COND_DNET.jointConv.",
             "conditional_head.": "COND_DNET.outlogits.0."}  # fmt: skip
    longest = {128: "32", 256: "64"}.get(image_size, "")
    parts |= {f"back.{number}.": f"img_code_s{longest}_{number + 1}." for number in range(2)}
    shapes = {}
    for name, tensor in stage.state_dict().items():
        ours = next(part for part in parts if name.startswith(part))
        shapes[f"module.{parts[ours]}{name.removeprefix(ours)}"] = tensor.shape
    return fill_state(shapes, image_size)


@pytest.fixture
def wide(tiny):
    """Settings of a tiny AttnGAN of 64 and 128 px, as the released discriminators have it."""
    return lambda *more: tiny(("GAN.NAME", "attn_gan"), ("TREE.BASE_SIZE", "64"), ("TREE.BRANCH_NUM", "2"),
                              ("GAN.GF_DIM", "1"), ("GAN.DF_DIM", "1"), *more)  # fmt: skip


def networks_given(cfg):
    """What the weight files of these settings hold."""
    chosen = chosen_system(cfg)
    return networks_from_files(from_config(StartSettings, cfg), build_networks(chosen), chosen.name)


def test_stages_come_from_the_files_beside_the_first(wide, tmp_path):
    for number, size in enumerate((64, 128)):
        torch.save(stage_state(size, sentence_dim=256), tmp_path / f"netD{number}.pth")
    cfg = wide(("TRAIN.NET_D", str(tmp_path / "netD0.pth")))
    network = networks_given(cfg)["discriminator"]
    assert network_name(network) == "attn_gan" and [stage.image_size for stage in network.stages] == [64, 128]
    released = load_discriminator(stage_state(128, sentence_dim=256))
    for ours, theirs in zip(network.stages[1].state_dict().values(), released.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    rebuilt = AttnDiscriminator(**network.arguments)
    rebuilt.load_state_dict(network.state_dict())
    (tmp_path / "netD1.pth").unlink()
    with pytest.raises(CheckpointError, match=r"netD0.pth: .* images of 128 px is missing .*netD1.pth"):
        networks_given(cfg)


def test_networks_given_another_system_are_refused(wide, tmp_path):
    for number, size in enumerate((64, 128)):
        torch.save(stage_state(size, sentence_dim=256, has_unconditional_head=False), tmp_path / f"netD{number}.pth")
    cfg = wide(("TRAIN.NET_D", str(tmp_path / "netD0.pth")))
    with pytest.raises(CheckpointError, match="not of one training of this system"):
        networks_given(cfg)


def test_a_generator_of_another_system_is_refused(wide, tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    last = tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"
    with pytest.raises(
        CheckpointError, match="TRAIN.NET_G: holds the generator of ssa_gan, the settings are for attn_gan"
    ):
        Trainer(wide(("TRAIN.NET_G", str(last))), CPU)


# -- whole runs -------------------------------------------------------------------------------------------------------


def small_run(cfg, data, encoders, output, *more):
    """Arguments for main.py that make one of our settings files tiny."""
    changes = {"DATASET_NAME": "folder", "OUTPUT_DIR": output, "WORKERS": 0, "TREE.BASE_SIZE": 8, "GAN.GF_DIM": 2,
               "GAN.DF_DIM": 2, "TRAIN.BATCH_SIZE": 8, "TRAIN.LOG_EVERY": 1, "TRAIN.SAMPLE_EVERY": 0,
               "TEXT.CAPTIONS_PER_IMAGE": 3, "TEXT.DAMSM_NAME": encoders, "TRAIN.NET_E": ""}  # fmt: skip
    changes |= dict(zip(more[::2], more[1::2], strict=True))
    pairs = [str(item) for pair in changes.items() for item in pair]
    return ["--cfg", str(ROOT / "cfg" / f"{cfg}.yml"), "--gpu", "-1", "--data_dir", str(data), "--set", *pairs]


@pytest.mark.parametrize("cfg", ["bird_attn2", "coco_attn2", "bird_attnDCGAN2"])
def test_the_released_settings_train_resume_and_draw(cfg, drawn_folder, encoders, tmp_path, capsys):
    run = small_run(cfg, drawn_folder, encoders, tmp_path, "TRAIN.MAX_STEPS", 2)
    assert main(run) == 0
    assert main([*small_run(cfg, drawn_folder, encoders, tmp_path, "TRAIN.MAX_STEPS", 3), "--resume"]) == 0
    folder = next(tmp_path.glob("00000-*"))
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    sizes = [32] if "DCGAN" in cfg else [8, 16, 32]
    assert [line["step"] for line in lines] == [1, 2, 3]
    wanted = {f"loss/{name}_{size}" for name in ("discriminator", "adversarial") for size in sizes}
    assert wanted <= lines[0].keys() and all(math.isfinite(value) for line in lines for value in line.values())
    names = {
        part: entry["name"] for part, entry in load_checkpoint(folder / "checkpoints" / "last.pth")["networks"].items()
    }
    assert (
        names["generator"]
        == names["discriminator"]
        == names["generator_ema"]
        == folder.name.partition("-")[2].split("-")[-1]
    )
    capsys.readouterr()
    assert main([*run, "--caption", "a small red bird", "--out", str(tmp_path / "drawn"), "--attention"]) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]).is_file()
    assert (tmp_path / "drawn" / "caption000_c0_s0.png").is_file()
    for size in (8, 16):
        strip = np.asarray(Image.open(tmp_path / "drawn" / "attention" / f"caption000_c0_s0_{size}px.png"))
        assert strip.shape == (154, 5 * 132 + 4, 3)  # the image and four words, each with its name above


def test_stopping_and_resuming_changes_nothing(drawn_folder, encoders, tmp_path):
    for name, stops in (("whole", [4]), ("parts", [1, 4])):
        for stop in stops:
            arguments = small_run("bird_attn2", drawn_folder, encoders, tmp_path / name, "TRAIN.MAX_STEPS", stop)
            main([*arguments, "--continue"])
    whole, parts = (
        load_checkpoint(next((tmp_path / name).glob("*/checkpoints/last.pth"))) for name in ("whole", "parts")
    )
    for part in ("generator", "generator_ema", "discriminator"):
        for ours, theirs in zip(*(c["networks"][part]["state"].values() for c in (whole, parts)), strict=True):
            assert torch.equal(ours, theirs)


def test_a_base_size_that_does_not_work_is_named(drawn_folder, encoders, tmp_path):
    with pytest.raises(ConfigError, match="TREE.BASE_SIZE: .* not 12"):
        main(small_run("bird_attn2", drawn_folder, encoders, tmp_path, "TREE.BASE_SIZE", 12))


@pytest.mark.parametrize("cfg", ["eval_bird", "eval_coco"])
def test_the_eval_settings_draw_with_released_weights(cfg, drawn_folder, encoders, tmp_path, capsys):
    from golden import OWN, load

    about, _ = load(OWN, "attn_gan")
    shapes = dict(about["netG"])
    for name, shape in shapes.items():  # the fixture's generator, with text features as long as these encoders'
        if name == "ca_net.fc.weight" or name.endswith("conv_context.weight"):
            shapes[name] = [shape[0], 256, *shape[2:]]
    torch.save(fill_state(shapes, 1), tmp_path / "bird_AttnGAN2.pth")
    assert load_generator(fill_state(shapes, 1)).arguments["num_stages"] == 3
    run = small_run(cfg, drawn_folder, encoders, tmp_path, "TRAIN.NET_G", tmp_path / "bird_AttnGAN2.pth")
    assert main([*run, "--out", str(tmp_path / "drawn")]) == 0
    assert len(list((tmp_path / "drawn").glob("test*_c0_s0.png"))) == 12


# -- pictures of attention, examples, splits --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(drawn_folder, encoders, tmp_path_factory):
    """Arguments of a finished two-step run of 8 and 16 px, and a copy of its data to put examples into."""
    folder = tmp_path_factory.mktemp("attn")
    shutil.copytree(drawn_folder, folder / "data")
    more = ("TREE.BRANCH_NUM", 2, "TRAIN.MAX_STEPS", 2)
    arguments = small_run("bird_attn2", folder / "data", encoders, folder / "output", *more)
    assert main(arguments) == 0
    return arguments, folder / "data"


def test_attention_is_kept_only_when_asked_for(trained):
    arguments, _ = trained
    pipeline = TextToImage.load(next((Path(arguments[5]).parent / "output").glob("*/checkpoints/last.pth")))
    captions = ["a small red bird", "a bird with long blue wings and a yellow head", "a bird"]
    plain, drawn = (pipeline.generate(captions, batch_size=2, with_attention=kept) for kept in (False, True))
    assert plain.attention == [] and plain.stages == [] and np.array_equal(plain.images, drawn.images)
    assert [maps.shape[::2] for maps in drawn.attention] == [(3, 8)] and drawn.stages[0].shape == (3, 16, 16, 3)
    assert np.array_equal(drawn.stages[-1], drawn.images)
    words = caption_words(pipeline, captions)
    assert words[0] == ["a", "small", "red", "bird"]
    for row, caption in enumerate(words):
        assert drawn.attention[0][row, len(caption) :].max(initial=0) == 0
        assert drawn.attention[0][row].sum(axis=0) == pytest.approx(1, abs=1e-5)


def test_examples_are_drawn_with_attention(trained, tmp_path, capsys):
    arguments, data = trained
    (data / "example_filenames.txt").write_text("example_captions\ntext/more.txt\n")
    (data / "example_captions.txt").write_text("a small red bird\na blue bird\n\n")
    (data / "text").mkdir()
    (data / "text" / "more.txt").write_text("a bird with long wings\n")
    examples = [*arguments, "TRAIN.FLAG", "False", "--out", str(tmp_path / "out")]
    assert main(examples) == 0
    assert "3 images in" in capsys.readouterr().out
    stems = ["example_captions_c0_s0", "example_captions_c1_s0", "text/more_c0_s0"]
    files = [f"{stem}.png" for stem in stems] + [f"attention/{stem}_8px.png" for stem in stems]
    assert all((tmp_path / "out" / name).is_file() for name in files)
    assert main([*examples, "--overwrite", "--split", "test"]) == 0  # something else was asked for: the old ones go
    assert not any((tmp_path / "out" / name).exists() for name in files)
    assert len(list((tmp_path / "out").glob("test*.png"))) == 12
    (data / "text" / "more.txt").unlink()
    with pytest.raises(DataError, match="text/more.txt: no such file of captions, which .*_filenames.txt names"):
        main([*arguments, "TRAIN.FLAG", "False", "--out", str(tmp_path / "other")])
    (data / "example_filenames.txt").write_text("\n")
    with pytest.raises(DataError, match="example_filenames.txt: names no file of captions"):
        main([*arguments, "TRAIN.FLAG", "False", "--out", str(tmp_path / "other")])
    (data / "example_filenames.txt").unlink()


def test_masks_of_a_generator_without_them_are_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="--masks: this generator predicts no masks"):
        main([*trained[0], "--caption", "a bird", "--masks", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_each_split_is_drawn_without_replacement(trained, tmp_path, caplog):
    arguments, _ = trained
    assert main([*arguments, "--each-split", "40", "--out", str(tmp_path)]) == 0
    assert "no split 'val': skipped" in caplog.text
    assert "the split 'test' has only 36 captions: all of them are drawn, not 40" in caplog.text
    for split, number in (("train", 40), ("test", 36)):
        lines = [json.loads(line) for line in (tmp_path / split / "captions.jsonl").read_text().splitlines()]
        assert len({(line["key"], line["caption_number"]) for line in lines}) == number == len(lines)
        assert all(line["key"].startswith(split) and line["sample"] == 0 for line in lines)
        assert json.loads((tmp_path / split / "samples.json").read_text())["split"] == split


def test_a_generator_without_attention_is_named(tiny_yaml, tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "1")), CPU)
    with pytest.raises(ConfigError, match="--attention: this generator has no word attention"):
        main(
            ["--cfg", str(tiny_yaml), "--gpu", "-1", "--caption", "a bird", "--attention", "--out", str(tmp_path / "x")]
        )
    assert not (tmp_path / "x").exists()
