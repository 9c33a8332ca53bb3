"""GALIP from its settings files to pictures: training, resuming, drawing, dry run, released files, CLIP's
sentence for others.

CLIP is a tiny random one, as everywhere in the tests.
"""

import json

import pytest
import torch
from test_clip import hugging_face_state
from test_galip import released_content
from tiny_clip import SIZES, tiny_galip
from tiny_systems import run_main, tiny_overrides, trains_resumes_and_samples

from miscc.byte_pairs import BytePairs
from miscc.checkpoint import load_checkpoint
from miscc.errors import CheckpointError, ConfigError
from models.clip_features import untrained_clip
from sampling.convert import convert, describe
from sampling.pipeline import TextToImage
from training.dry_run import describe as dry_run
from training.settings import load_config

UNTRAINED = {
    "TREE.BASE_SIZE": "28", "CLIP.WEIGHTS": "untrained", "CLIP.WIDTH": "64", "CLIP.BLOCKS": "9", "GALIP.REAL_SIZE": "32",
    "TEXT.EMBEDDING_DIM": "16",
}  # fmt: skip
MERGES = ["b i", "bi r", "bir d</w>", "r e", "re d</w>"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP as Hugging Face keeps one: weights, their description, the tokenizer's merges."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    clip = untrained_clip(**SIZES | {"vocabulary_size": len(BytePairs.of_merges(MERGES))})
    save_file(hugging_face_state(clip), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"text_config": {"hidden_act": "quick_gelu"}}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return folder


@pytest.mark.parametrize("yaml", ["cfg/bird_galip.yml", "cfg/coco_galip.yml"])
def test_the_settings_files_train_resume_and_draw(yaml, drawn_folder, tmp_path):
    overrides = tiny_overrides(drawn_folder, "", tmp_path) | UNTRAINED
    last = trains_resumes_and_samples(yaml, "galip", overrides)
    names = {part: entry["name"] for part, entry in last["networks"].items()}
    assert names["generator"] == names["discriminator"] == "galip"
    assert names["text_encoder"] == names["image_encoder"] == "clip"
    assert last["optimizers"].keys() == {"generator", "discriminator"}

    # The ViT is in the file, once for generator and image encoder; the checkpoint draws alone.
    inside = "transformer.resblocks.0.mlp.c_fc.weight"
    states = {part: entry["state"] for part, entry in last["networks"].items()}
    assert states["generator"][f"vit.{inside}"].data_ptr() == states["image_encoder"][inside].data_ptr()
    pipeline = TextToImage.load(tmp_path / f"00000-{yaml[4:-4]}-galip" / "checkpoints" / "last.pth", "cpu")
    assert pipeline.generate(["A bird, isn't it?"]).images.shape == (1, 28, 28, 3)


def test_toybirds_file_is_as_published_but_for_its_size(tmp_path):
    cfg, bird = load_config("cfg/toybirds_galip.yml"), load_config("cfg/bird_galip.yml")
    assert (cfg.CLIP.WEIGHTS, cfg.TREE.BASE_SIZE, cfg.TEXT.EMBEDDING_DIM) == ("untrained", 56, 64)
    for values in (cfg, bird):
        assert (values.TEXT.ENCODER, values.TEXT.WORDS_NUM, values.GALIP.SIMILARITY_WEIGHT) == ("clip", 77, 4.0)
        assert (values.TRAIN.GENERATOR_LR, values.TRAIN.DISCRIMINATOR_LR, values.TRAIN.BETAS) == (
            1e-4,
            4e-4,
            [0.0, 0.9],
        )
        assert values.CLIP.SCALED_TWICE and values.GAN.TRUNCATION is None
    assert (bird.TREE.BASE_SIZE, bird.GALIP.REAL_SIZE, bird.TRAIN.NF, bird.TEXT.EMBEDDING_DIM) == (224, 256, 64, 512)


@pytest.mark.parametrize("encoder", ["damsm", "clip"])
@pytest.mark.parametrize(("yaml", "system"), [("cfg/bird.yml", "ssa_gan"), ("cfg/bird_df.yml", "df_gan")])
def test_others_take_either_sentence_by_one_key(encoder, yaml, system, drawn_folder, encoders, clip_folder, tmp_path):
    overrides = tiny_overrides(drawn_folder, encoders, tmp_path)
    overrides |= {"CLIP.WEIGHTS": str(clip_folder), "TEXT.ENCODER": encoder}
    if encoder == "clip":  # of this CLIP; the real one's length is the default
        overrides |= {"TEXT.EMBEDDING_DIM": "16"}
    assert run_main(yaml, overrides) == 0
    name = yaml[4:-4]
    last = load_checkpoint(tmp_path / f"00000-{name}-{system}" / "checkpoints" / "last.pth")
    assert last["networks"]["text_encoder"]["name"] == {"damsm": "rnn", "clip": "clip"}[encoder]
    assert (last["vocabulary"][0] == "<end>") == (encoder == "damsm")
    assert last["networks"]["generator"]["arguments"]["sentence_dim"] == {"damsm": 256, "clip": 16}[encoder]
    assert encoder == "damsm" or "image_encoder" not in last["networks"]


def test_captions_are_read_whole(drawn_folder, clip_folder, tmp_path):
    """Not cut to the 18 words that bird.yml has for DAMSM's encoder."""
    from miscc.distributed import World
    from training.trainer import Trainer

    overrides = tiny_overrides(drawn_folder, "", tmp_path) | {"CLIP.WEIGHTS": str(clip_folder), "TEXT.ENCODER": "clip"}
    cfg = load_config("cfg/bird.yml", [*overrides.items(), ("TEXT.EMBEDDING_DIM", "16")])
    assert cfg.TEXT.WORDS_NUM == 18
    trainer = Trainer(cfg, World(0, 1, torch.device("cpu")))
    sample = trainer.dataset[0]
    written = trainer.records.texts[0][sample.caption_number]
    assert sample.caption[: sample.length].tolist() == trainer.vocabulary.encode(written)[0]
    read = trainer.vocabulary.decode(sample.caption[: sample.length].tolist())
    assert sample.length > 18 and read.replace(" ", "") == written.lower().replace(" ", "")


def test_what_does_not_go_together_is_named(drawn_folder, encoders, clip_folder, tmp_path):
    common = tiny_overrides(drawn_folder, encoders, tmp_path)
    with pytest.raises(ConfigError, match="TEXT.ENCODER: is damsm, but a loss .* encoder of clip"):
        run_main("cfg/bird_galip.yml", common | {"TEXT.ENCODER": "damsm"})
    with pytest.raises(
        ConfigError, match="TEXT.ENCODER: is clip, but a loss .* encoder of damsm; .*TRAIN.DAMSM_WEIGHT 0"
    ):
        run_main("cfg/bird.yml", common | {"TEXT.ENCODER": "clip", "TRAIN.DAMSM_WEIGHT": "0.05"})
    with pytest.raises(ConfigError, match="TEXT.EMBEDDING_DIM: is 512, but the encoders give 16"):
        run_main("cfg/bird_galip.yml", common | {"CLIP.WEIGHTS": str(clip_folder)})
    galip = common | {"CLIP.WEIGHTS": str(clip_folder), "TEXT.EMBEDDING_DIM": "16"}
    with pytest.raises(ConfigError, match="made for another CLIP .*; set CLIP.WIDTH and CLIP.BLOCKS"):
        run_main("cfg/bird_galip.yml", galip)
    galip |= {"CLIP.WIDTH": "64", "CLIP.BLOCKS": "10"}
    with pytest.raises(ConfigError, match="TREE.BASE_SIZE: is 16, but this CLIP reads images of 56 pixels"):
        run_main("cfg/bird_galip.yml", galip)
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder.*nothing is downloaded"):
        run_main("cfg/bird_galip.yml", galip | {"CLIP.WEIGHTS": str(tmp_path / "nowhere")})


def test_the_dry_run_counts_and_names_what_is_missing(drawn_folder, tmp_path):
    overrides = tiny_overrides(drawn_folder, "", tmp_path) | UNTRAINED
    report = dry_run(load_config("cfg/bird_galip.yml", list(overrides.items())))
    assert "data and encoders: found" in report and "memory: about" in report
    overrides |= {"CLIP.WEIGHTS": str(tmp_path / "missing.pt")}
    report = dry_run(load_config("cfg/bird_galip.yml", list(overrides.items())))
    assert "not there yet: " in report and "missing.pt" in report
    published = dry_run(load_config("cfg/bird_galip.yml", [("DATA_DIR", str(tmp_path))]))
    # 28.7 M and 2.1 M in the authors' files, less two shortcuts of 0.6 M that they never use.
    assert "generator: 51.8 M parameters" in published and "discriminator: 29.6 M parameters" in published


@pytest.fixture(scope="module")
def released_file(clip_folder, tmp_path_factory):
    from models.clip_files import load_clip_weights

    clip, _ = load_clip_weights(clip_folder)
    path = tmp_path_factory.mktemp("released") / "pre_coco.pth"
    torch.save(released_content(tiny_galip(clip), clip), path)
    return path


def test_one_command_draws_with_the_released_file(released_file, clip_folder, tmp_path):
    overrides = {"TRAIN.NET_G": str(released_file), "CLIP.WEIGHTS": str(clip_folder), "OUTPUT_DIR": str(tmp_path)}
    overrides |= {"DATA_DIR": str(tmp_path / "no-data")}
    assert run_main("cfg/coco_galip.yml", overrides, "--caption", "a red bird", "--out", str(tmp_path / "drawn")) == 0
    assert list((tmp_path / "drawn").glob("*.png"))


def test_released_files_become_one_of_ours_which_trains_on(
    released_file, clip_folder, drawn_folder, tmp_path, monkeypatch
):
    assert "generator galip" in describe(released_file)[0] and "discriminator galip" in describe(released_file)[1]
    out = tmp_path / "ours.pth"
    convert(released_file, clip_folder, drawn_folder, out, dataset="folder")
    lines = describe(out)
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "generator",
        "text_encoder",
        "image_encoder",
        "discriminator",
    ]
    drawn = TextToImage.load(out, "cpu").generate(["a red bird"], seed=3).images
    loose = TextToImage.from_released(released_file, clip_folder, drawn_folder, "cpu", encoders="clip")
    assert (drawn == loose.generate(["a red bird"], seed=3).images).all()

    overrides = tiny_overrides(drawn_folder, "", tmp_path) | {
        "TRAIN.NET_G": str(out), "CLIP.WEIGHTS": str(clip_folder), "TEXT.EMBEDDING_DIM": "16", "CLIP.WIDTH": "64",
        "CLIP.BLOCKS": "10", "TREE.BASE_SIZE": "56", "GALIP.REAL_SIZE": "0", "TRAIN.NF": "2", "GAN.Z_DIM": "5",
    }  # fmt: skip
    # The discriminator's sizes that no setting has are the file's.
    assert run_main("cfg/coco_galip.yml", overrides) == 0
    before = load_checkpoint(out)["networks"]["discriminator"]["state"]["head.0.weight"]
    last = load_checkpoint(tmp_path / "00000-coco_galip-galip" / "checkpoints" / "last.pth")
    after = last["networks"]["discriminator"]["state"]["head.0.weight"]
    assert after.shape == before.shape and 0 < (after - before).abs().max() < 0.01


def test_published_and_exported_it_draws_the_same(released_file, clip_folder, drawn_folder, tmp_path):
    convert(released_file, clip_folder, drawn_folder, tmp_path / "ours.pth", dataset="folder")
    pipeline = TextToImage.load(tmp_path / "ours.pth", "cpu")
    drawn = pipeline.generate(["A red bird!"], seed=5).images
    pipeline.save_pretrained(tmp_path / "published", examples=["a red bird"])
    again = TextToImage.from_pretrained(tmp_path / "published", "cpu")
    assert again.vocabulary == pipeline.vocabulary and (again.generate(["A red bird!"], seed=5).images == drawn).all()

    # The graph that is exported, without capturing it: captions over all positions, the same images.
    from serve.export import INPUTS, ExportedModel, output_names

    encoded, noise = pipeline.tokens(["A red bird!"]), pipeline.noise(5, [0])
    with torch.no_grad():
        inputs = dict(zip(INPUTS, (encoded.tokens, encoded.lengths, noise), strict=True))
        outputs = ExportedModel(pipeline)(*inputs.values())
    assert len(outputs) == len(output_names(pipeline)) == 2
    assert (outputs[0].numpy().astype(int) - drawn.astype(int)).max() <= 1


def test_it_is_scored_while_it_trains(drawn_folder, tmp_path):
    overrides = tiny_overrides(drawn_folder, "", tmp_path) | UNTRAINED | {
        "TRAIN.MAX_STEPS": "0", "TRAIN.MAX_EPOCH": "1", "TRAIN.EVAL_EVERY": "1", "TRAIN.EVAL_IMAGES": "8",
        "TRAIN.EVAL_CLASSES": "0.3",
    }  # fmt: skip
    assert run_main("cfg/bird_galip.yml", overrides) == 0
    lines = (tmp_path / "00000-bird_galip-galip" / "stats.jsonl").read_text().splitlines()
    scores = [value for line in lines for name, value in json.loads(line).items() if name.startswith("evaluation/")]
    assert len(scores) == 1 and scores[0] > 0
    assert (tmp_path / "00000-bird_galip-galip" / "checkpoints" / "best.pth").is_file()
