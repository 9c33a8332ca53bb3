"""From captions to pictures: the pipeline, sample folders, the authors' loose files."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.settings import DataSettings
from datasets.toybirds.dataset import ToyBirds
from main import main
from miscc.checkpoint import hash_tensors
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError, DataError, UserError
from miscc.images import to_uint8
from miscc.settings import from_config
from miscc.vocabulary import Vocabulary
from models.attn_gan import AttnGenerator
from models.damsm import TextEncoder
from models.ssa_gan import SSAGenerator
from models.types import TextFeatures
from sampling import folders as sampling
from sampling.drawing import open_pipeline
from sampling.encoders import load_encoders
from sampling.folders import file_stem, prepare_folder, sample
from sampling.interpolate import _mix, interpolate
from sampling.pipeline import TextToImage
from sampling.requests import caption_requests, example_requests, read_captions, split_requests
from training.data import read_records
from training.trainer import train

CAPTIONS = ["a small bird with a red crown", "this bird has blue wings", "a bird with a yellow belly"]


@pytest.fixture(scope="module")
def pipeline():
    """Random networks whose output depends on the caption."""
    torch.manual_seed(3)
    vocabulary = Vocabulary.build(caption for index in range(40) for caption in ToyBirds("train").captions(index))
    generator = SSAGenerator(nf=2, image_size=16)
    for block in generator.blocks:
        torch.nn.init.constant_(block.gate, 1.0)
        for sscbn in (block.sscbn1, block.sscbn2):
            torch.nn.init.normal_(sscbn.beta[2].weight)
    return TextToImage(generator.eval(), TextEncoder(len(vocabulary)).eval(), vocabulary)


def test_images_and_masks(pipeline):
    drawn = pipeline.generate(CAPTIONS, seed=1)
    assert drawn.images.shape == (3, 16, 16, 3) and drawn.images.dtype == np.uint8
    assert [mask.shape for mask in drawn.masks] == [(3, 4, 4), (3, 8, 8), (3, 16, 16)]
    assert all(mask.min() >= 0 and mask.max() <= 1 for mask in drawn.masks)
    assert drawn.images.std() > 0
    images, masks = drawn  # as the README has it
    assert images is drawn.images and masks is drawn.masks


def test_the_same_seed_gives_the_same_images_whatever_the_batch(pipeline):
    captions = CAPTIONS * 3
    whole = pipeline.generate(captions, seed=5).images
    assert np.array_equal(whole, pipeline.generate(captions, seed=5, batch_size=2).images)
    assert np.array_equal(whole[4:6], pipeline.generate(captions[4:6], seed=5, indices=[4, 5]).images)
    assert not np.array_equal(whole, pipeline.generate(captions, seed=6).images)
    assert not np.array_equal(whole[0], whole[3])  # the same caption again has other noise


def test_the_same_seed_at_64_px_differs_by_rounding_at_most(pipeline):
    torch.manual_seed(1)
    larger = TextToImage(SSAGenerator(nf=8, image_size=64).eval(), pipeline.text_encoder, pipeline.vocabulary)
    whole = larger.generate(CAPTIONS * 5, seed=1).images.astype(int)
    for batch_size in (1, 2, 7):
        assert np.abs(whole - larger.generate(CAPTIONS * 5, seed=1, batch_size=batch_size).images).max() <= 1


def test_captions_matter(pipeline):
    red, blue = (pipeline.generate([caption], seed=1).images for caption in CAPTIONS[:2])
    assert not np.array_equal(red, blue)


def test_truncated_noise_is_bounded(pipeline):
    noise = pipeline.noise(0, range(50), truncation=0.5)
    assert noise.abs().max() <= 1.0 and 0.35 < noise.std() < 0.5
    assert abs(pipeline.noise(0, range(50)).std().item() - 1) < 0.05


def test_images_are_drawn_from_the_truncated_noise_of_their_indices(pipeline):
    drawn = pipeline.generate(CAPTIONS[:2], seed=4, truncation=0.5, indices=[7, 9]).images
    noise = pipeline.noise(4, [7, 9], 0.5)
    assert np.array_equal(drawn, to_uint8(pipeline.synthesize(pipeline.encode(CAPTIONS[:2]), noise).images[-1]))
    assert not np.array_equal(drawn, pipeline.generate(CAPTIONS[:2], seed=4, indices=[7, 9]).images)


def test_of_several_stages_the_last_is_drawn(pipeline):
    torch.manual_seed(2)
    stages = AttnGenerator(gf_dim=4, base_size=8, num_stages=2).eval()
    attending = TextToImage(stages, pipeline.text_encoder, pipeline.vocabulary)
    drawn = attending.generate(CAPTIONS, with_attention=True)
    assert attending.attends and not pipeline.attends
    assert drawn.images.shape == (3, 16, 16, 3) and [maps.shape for maps in drawn.attention] == [(3, 18, 8, 8)]
    assert len(drawn.stages) == 1 and np.array_equal(drawn.stages[0], drawn.images)


def test_mixed_captions_go_from_the_first_to_the_second_by_hand():
    """A sentence of 0 and one of 4, words of 1 and 5: a quarter of the way 1 and 2; padding where both have it."""
    sentence, words = torch.tensor([[0.0], [4.0]]), torch.tensor([[[1.0, 1.0, 1.0]], [[5.0, 5.0, 5.0]]])
    mask = torch.tensor([[False, False, True], [False, True, True]])
    mixed = _mix(TextFeatures(sentence, words, mask), torch.tensor([0.0, 0.25, 1.0]))
    assert mixed.sentence.flatten().tolist() == [0.0, 1.0, 4.0] and mixed.words[:, 0, 0].tolist() == [1.0, 2.0, 5.0]
    assert mixed.mask.tolist() == [[False, False, True]] * 3


def test_unknown_words_are_named_and_left_out(pipeline, caplog):
    same = pipeline.generate(["a small bird"], seed=2).images
    assert np.array_equal(pipeline.generate(["a small zyzzyva bird"], seed=2).images, same)
    assert "zyzzyva" in caplog.text
    with pytest.raises(DataError, match="none of its words.*zyzzyva, qwerty"):
        pipeline.generate(["zyzzyva qwerty"])
    with pytest.raises(DataError, match="holds no word"):
        pipeline.generate(["a bird", " ?! "])
    with pytest.raises(DataError, match="no caption to draw"):
        pipeline.generate([])


def test_long_captions_are_shortened_the_same_way_each_time_and_that_is_said(pipeline, caplog):
    long = "a bird with a red crown and " + "a yellow belly and " * 10
    assert np.array_equal(pipeline.generate([long]).images, pipeline.generate([long]).images)
    assert pipeline.tokens([long]).lengths.tolist() == [18]
    assert "the first 18 that it knows" in caplog.text


def test_a_vocabulary_of_another_size_is_refused(pipeline):
    with pytest.raises(CheckpointError, match="knows 7 words, the vocabulary has"):
        TextToImage(pipeline.generator, TextEncoder(7), pipeline.vocabulary)


# -- sample folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny, tmp_path):
    train(tiny(("TRAIN.MAX_STEPS", "2")), World(0, 1, torch.device("cpu")))
    return tmp_path / "output" / "00000-tiny-ssa_gan" / "checkpoints" / "last.pth"


def test_a_checkpoint_is_all_that_drawing_needs(trained, encoders, drawn_folder):
    pipeline = TextToImage.load(trained, device="cpu")
    assert pipeline.origin["step"] == 2 and pipeline.origin["averaged"] is True
    assert pipeline.generate(CAPTIONS).images.shape == (3, 16, 16, 3)
    plain = TextToImage.load(trained, device="cpu", averaged=False)
    assert not torch.equal(plain.generator.fc.weight, pipeline.generator.fc.weight)
    with pytest.raises(CheckpointError, match="holds no generator but"):
        TextToImage.load(encoders, device="cpu")


def test_masks_are_left_out_on_request(trained):
    pipeline = TextToImage.load(trained, device="cpu")
    drawn, without = (pipeline.generate(CAPTIONS, with_masks=wanted) for wanted in (True, False))
    assert without.masks == [] and [len(stage) for stage in drawn.masks] == [3] * 3
    assert np.array_equal(without.images, drawn.images)


@pytest.mark.parametrize("broken", [0, 19])  # waited for while others are drawn, or at the very end
def test_a_failed_write_ends_the_sampling(pipeline, tmp_path, monkeypatch, broken):
    written = sampling._write_png

    def write(pixels, path):
        if path.name == f"caption{broken:03d}_c0_s0.png":
            raise UserError("the disk is full")
        written(pixels, path)

    monkeypatch.setattr(sampling, "_write_png", write)
    with pytest.raises(UserError, match="the disk is full"):
        sample(pipeline, caption_requests(["a red bird"] * 20), tmp_path / "samples", batch_size=2)
    assert json.loads((tmp_path / "samples" / "samples.json").read_text())["finished"] is False


def test_sampling_a_split(trained, tiny, tmp_path):
    pipeline = TextToImage.load(trained, device="cpu")
    records = read_records(from_config(DataSettings, tiny()), "test", pipeline.vocabulary)
    requests = split_requests(records, captions_per_image=2, per_caption=3)
    folder = tmp_path / "samples"
    picture = sample(pipeline, requests, folder, seed=4, batch_size=7, with_masks=True, real=records)
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(lines) == 12 * 2 * 3 == len(list(folder.glob("*.png"))) - 1  # the last short batch is there, too
    assert lines[4] == {"file": "test000_c1_s1.png", "key": "test000", "caption_number": 1, "sample": 1,
                        "caption": records.text(0, 1), "seed": 4, "index": 4}  # fmt: skip
    again = pipeline.generate([lines[4]["caption"]], seed=4, indices=[4]).images[0]
    assert np.array_equal(np.asarray(Image.open(folder / lines[4]["file"])), again)
    assert sorted(path.name for path in (folder / "masks").glob("test000_c1_s1*")) == [
        f"test000_c1_s1_{size}px.png" for size in (16, 4, 8)
    ]
    assert len(list((folder / "real").iterdir())) == 12
    assert picture == folder / "samples.png" and Image.open(picture).width > 100
    about = json.loads((folder / "samples.json").read_text())
    assert about["finished"] is True and about["encoder_hash"] == hash_tensors(pipeline.text_encoder.state_dict())
    assert about["seed"] == 4 and about["num_images"] == 72 and about["step"] == 2
    with pytest.raises(DataError, match="holds samples already; give --overwrite"):
        sample(pipeline, requests, folder)
    bad = [requests[0]._replace(caption="zyzzyva")]
    with pytest.raises(DataError, match="zyzzyva"):
        sample(pipeline, bad, folder, overwrite=True)
    assert (folder / lines[4]["file"]).is_file()  # nothing is lost to a caption that cannot be drawn
    (folder / "mine.png").write_bytes(b"keep me")
    sample(pipeline, requests[:2], folder, overwrite=True)
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "mine.png", "samples.png", "test000_c0_s0.png", "test000_c0_s1.png",
    ]  # fmt: skip
    assert not list((folder / "masks").iterdir()) and not list((folder / "real").iterdir())


def test_many_images_are_a_seeded_choice_of_captions(drawn_folder, tiny):
    records = read_records(from_config(DataSettings, tiny()), "test")
    some = split_requests(records, num_images=30, seed=1)
    assert some == split_requests(records, num_images=30, seed=1) != split_requests(records, num_images=30, seed=2)
    assert len({(r.key, r.caption_number) for r in some}) == 30  # no caption twice while there are others
    more = split_requests(records, num_images=100, seed=1)
    names = [file_stem(request) for request in more]
    assert len(more) == 100 == len(set(names)) and max(request.sample for request in more) == 2
    assert [request.index for request in more] == list(range(100))
    everything = split_requests(records, captions_per_image=0)
    assert len(everything) == 36


def test_many_captions_are_drawn_as_often_as_is_said(drawn_folder, tiny):
    records = read_records(from_config(DataSettings, tiny()), "test")
    one, three = (split_requests(records, per_caption=n, num_images=4, seed=1) for n in (1, 3))
    assert [r.caption for r in three] == [r.caption for r in one for _ in range(3)]
    assert [r.sample for r in three[:3]] == [0, 1, 2] and [r.index for r in three] == list(range(12))
    with pytest.raises(
        ConfigError, match="--num-images: draws out of all captions .*; leave it or --captions-per-image"
    ):
        split_requests(records, captions_per_image=0, num_images=4)


def test_a_picture_is_never_written_over_another_file(pipeline, tmp_path):
    for name in ("samples.png", "caption001_c0_s0.png"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"mine")
        with pytest.raises(DataError, match=f"{name}: exists already; give --overwrite, or another folder"):
            sample(pipeline, caption_requests(CAPTIONS[:2]), folder)
        assert [path.read_bytes() for path in folder.iterdir()] == [b"mine"]


def test_names_stay_inside_the_folder_and_apart():
    request = caption_requests(["a bird"])[0]
    stems = [file_stem(request._replace(key=key)) for key in ("../../etc/pass wd", "../../etc/pass_wd", "a/b.c-1")]
    assert all(stem.startswith("etc/pass_wd-") for stem in stems[:2]) and stems[0] != stems[1]
    assert stems[2] == "a/b.c-1_c0_s0"


def test_more_images_than_memory_holds_are_refused():
    with pytest.raises(ConfigError, match="--per-caption 500001: makes more than 1,000,000 images of 2 "):
        caption_requests(["a red bird", "a blue bird"], 500_001)
    assert len(caption_requests(["a red bird"], 3)) == 3


def test_a_part_of_a_published_model_is_told_where_the_model_is(tmp_path):
    with pytest.raises(CheckpointError, match="model.safetensors: is a part of a published model; name its folder"):
        open_pipeline(tmp_path / "model.safetensors", torch.device("cpu"), True, tmp_path)


def test_files_of_captions(tmp_path):
    (tmp_path / "captions.txt").write_text("a bird\n\n  a red bird \n")
    assert read_captions(tmp_path / "captions.txt") == ["a bird", "a red bird"]
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfa bird\r\na red bird\r\n")
    assert read_captions(tmp_path / "windows.txt") == ["a bird", "a red bird"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no caption"):
        read_captions(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="no such file"):
        read_captions(tmp_path / "gone.txt")


def test_interpolation_starts_and_ends_at_the_images_it_joins(pipeline):
    strip = interpolate(pipeline, CAPTIONS[0], CAPTIONS[1], steps=5, seed=3)
    assert strip.shape == (16 + 4, 5 * 18 + 2, 3)
    first = pipeline.generate([CAPTIONS[0]], seed=3, indices=[0]).images[0]
    last = pipeline.generate([CAPTIONS[1]], seed=3, indices=[0]).images[0]
    assert np.abs(strip[2:18, 2:18].astype(int) - first).max() <= 1
    assert np.abs(strip[2:18, 74:90].astype(int) - last).max() <= 1
    noises = interpolate(pipeline, CAPTIONS[0], CAPTIONS[0], steps=3, seed=3)
    assert np.abs(noises[2:18, 2:18].astype(int) - first).max() <= 1
    other = pipeline.generate([CAPTIONS[0]], seed=3, indices=[1]).images[0]
    assert np.abs(noises[2:18, 38:54].astype(int) - other).max() <= 1
    same = interpolate(pipeline, CAPTIONS[0], f"{CAPTIONS[0].capitalize()}.", steps=3, seed=3)
    assert np.array_equal(same, noises), "the same words are the same caption"


# -- the authors' files --------------------------------------------------------------------------------------------------


def as_released(module, renames):
    """Our weights under the authors' names, as DataParallel saved them."""
    state = {}
    for name, tensor in module.state_dict().items():
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        state[f"module.{name}"] = tensor
    return state


@pytest.fixture
def released(tmp_path):
    """A folder as a user of the original code has it: netG, text encoder, captions.pickle."""
    torch.manual_seed(0)
    words = ["<end>", "a", "small", "red", "bird"]
    generator, encoder = SSAGenerator(nf=1, image_size=16), TextEncoder(len(words))
    renames = [
        ("first_mask_predictor.", "conv_mask."), ("mask_predictor.", "conv_mask."), ("to_rgb.", "conv_img."),
        ("blocks.", "block"), (".gate", ".gamma"), (".shortcut.", ".c_sc."), (".conv1.", ".c1."), (".conv2.", ".c2."),
        (".sscbn1.", ".affine0."), (".sscbn2.", ".affine2."), (".norm.", ".batch_norm2d."),
        *((f".{kind}.{ours}.", f".fc_{kind}.linear{theirs}.") for kind in ("gamma", "beta") for ours, theirs in ((0, 1), (2, 2))),
    ]  # fmt: skip
    torch.save(as_released(generator, renames), tmp_path / "netG_550.pth")
    torch.save({k.removeprefix("module."): v for k, v in as_released(encoder, [("embedding.", "encoder.")]).items()},
               tmp_path / "text_encoder200.pth")  # fmt: skip
    mapping = dict(enumerate(words))
    with (tmp_path / "captions.pickle").open("wb") as stream:
        pickle.dump([[], [], mapping, {word: i for i, word in mapping.items()}], stream, protocol=2)
    return tmp_path, generator, encoder


def test_loose_files_draw_the_same_images(released):
    folder, generator, encoder = released
    pipeline = TextToImage.from_released(folder / "netG_550.pth", folder / "text_encoder200.pth", folder, "cpu")
    ours = TextToImage(generator.eval(), encoder.eval(), pipeline.vocabulary)
    assert np.array_equal(pipeline.generate(["a red bird"]).images, ours.generate(["a red bird"]).images)


def test_the_command_draws_with_loose_files(released, capsys):
    folder, generator, encoder = released
    (folder / "bird.yml").write_text(
        f"DATASET_NAME: birds\nDATA_DIR: {folder}\nGPU_ID: -1\nTRAIN: {{NET_G: {folder / 'netG_550.pth'}}}\n"
        f"TEXT: {{DAMSM_NAME: {folder / 'text_encoder200.pth'}}}\n"
    )
    assert main(["--cfg", str(folder / "bird.yml"), "--caption", "a red bird", "--out", str(folder / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "out" / "samples.png")
    line = json.loads((folder / "out" / "captions.jsonl").read_text())
    drawn = np.asarray(Image.open(folder / "out" / line["file"]))
    words = Vocabulary(["<end>", "a", "small", "red", "bird"])
    assert np.array_equal(
        drawn, TextToImage(generator.eval(), encoder.eval(), words).generate(["a red bird"]).images[0]
    )


def test_the_wrong_vocabulary_is_refused(released):
    folder, _, _ = released
    with (folder / "captions.pickle").open("wb") as stream:
        pickle.dump([[], [], {0: "<end>", 1: "bird"}, {}], stream)
    with pytest.raises(CheckpointError, match="knows 5 words, the vocabulary has 2"):
        TextToImage.from_released(folder / "netG_550.pth", folder / "text_encoder200.pth", folder, "cpu")
    (folder / "captions.pickle").unlink()
    with pytest.raises(DataError, match="holds no captions.pickle"):
        TextToImage.from_released(folder / "netG_550.pth", folder / "text_encoder200.pth", folder, "cpu")


def test_encoders_of_the_authors_without_an_image_encoder(released):
    folder, _, _ = released
    encoders = load_encoders(folder / "text_encoder200.pth", max_words=12)
    assert encoders.vocabulary is None and encoders.image_encoder is None and encoders.max_words == 12
    with pytest.raises(
        CheckpointError, match="text_encoder200.pth: expected a generator, but the tensors are of a DAMSM"
    ):
        TextToImage.from_released(folder / "text_encoder200.pth", folder / "text_encoder200.pth", folder, "cpu")


FOREIGN = [
    json.dumps({"image": "a.png", "caption": "a bird"}), json.dumps({"file": "mine.txt"}), json.dumps({"file": "photo.png"}),
    json.dumps({"file": "../a_c0_s0.png"}), json.dumps({"file": 3}), "[1]", "no JSON", "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: line[:30])
def test_overwrite_removes_nothing_that_no_sampling_wrote(tmp_path, line):
    files = {tmp_path / name for name in ("mine.txt", "photo.png", "a.png", "captions.jsonl")}
    for path in files:
        path.write_text(line + "\n")
    with pytest.raises(DataError, match="captions.jsonl: no sampling wrote this file; give another folder"):
        prepare_folder(tmp_path, overwrite=True)
    assert set(tmp_path.iterdir()) == files


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret.txt", ".", "x" * 5000])
def test_examples_outside_the_data_folder_are_refused(tmp_path, name):
    (tmp_path / "example_filenames.txt").write_text(name + "\n")
    with pytest.raises(DataError, match="example_filenames.txt: names .*, which is not inside") as error:
        example_requests(tmp_path)
    assert len(str(error.value)) < 500


def test_a_file_of_examples_that_is_named_twice_is_drawn_once(tmp_path):
    (tmp_path / "ex.txt").write_text("a red bird\n")
    (tmp_path / "example_filenames.txt").write_text("ex\nex.txt\nex\n")
    assert len(example_requests(tmp_path)) == 1


def test_examples_behind_a_link_of_the_user_are_read(tmp_path):
    (tmp_path / "elsewhere.txt").write_text("a red bird\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "data" / "example_filenames.txt").write_text("linked\n")
    assert [request.caption for request in example_requests(tmp_path / "data")] == ["a red bird"]
