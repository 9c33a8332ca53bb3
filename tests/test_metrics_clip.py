"""CLIPScore and CLIP-R-precision: values by hand with an encoder that sees colours, and a tiny random CLIP where there is one."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_clip import hugging_face_state

from eval.CLIP import ClipScore, clip_score, load_clip, resized_and_cropped
from eval.CLIP import main as clip_main
from eval.metric import Tools
from eval.protocol.protocols import Protocol
from eval.R_precision import lists_for
from eval.scripts import score_images
from miscc.byte_pairs import BytePairs
from miscc.errors import DataError, run_command
from models.clip_features import untrained_clip

COLOURS = {"red": (220, 0, 0), "green": (0, 220, 0), "blue": (0, 0, 220)}


class ColourEncoder:
    """Images and captions into the space of colours: an image's mean colour, the sum of the colours that a caption names."""

    label, protocol = "colours", {"network": "colours", "weights_hash": "0"}

    def encode_images(self, images):
        return torch.stack([torch.from_numpy(image.mean(axis=(0, 1))).float() for image in images])

    def encode_captions(self, captions):
        rows = [sum(np.array(c) for name, c in COLOURS.items() if name in caption.lower()) for caption in captions]
        return torch.from_numpy(np.stack(rows)).float()


def write_samples(folder, pairs):
    """Images of one colour with the captions that they were drawn for: pairs of (colour shown, caption)."""
    folder.mkdir()
    lines = []
    for number, (shown, caption) in enumerate(pairs):
        Image.fromarray(np.full((8, 8, 3), COLOURS[shown], np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "caption": caption, "key": f"k{number}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def clip_scores(folder, encoder, num_candidates, folds, **options):
    """As the script scores a folder, by an encoder of our own."""

    def build(run):
        return ClipScore(encoder, [request.caption for request in run.requests], lists_for(run), folds)

    protocol = Protocol("ranking", "", candidates=num_candidates, folds=folds)
    return score_images(ClipScore, folder, build=build, protocol=protocol, **options)


def test_score_by_hand():
    images = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    captions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
    assert clip_score(images, captions).tolist() == pytest.approx([100, 100 / math.sqrt(2), 0, -100], abs=1e-9)


def test_a_folder_by_hand(tmp_path):
    """Two right, one wrong, one that shows half of what its caption says."""
    pairs = [("red", "a red bird"), ("green", "a green bird"), ("red", "a blue bird"), ("red", "red and green")]
    folder = write_samples(tmp_path / "samples", pairs)
    score, precision = clip_scores(folder, ColourEncoder(), num_candidates=3, folds=2, batch_size=3)
    assert score.name == "CLIPScore[colours]" and precision.name == "CLIP-R-precision%[colours]"
    single = np.array([100, 100, 0, 100 / math.sqrt(2)])
    assert score.value == pytest.approx(single.mean(), rel=1e-6) and score.std == pytest.approx(single.std(), rel=1e-6)
    # "red and green" loses against "a red bird" for a red image; its neighbours win theirs.
    assert precision.value == pytest.approx(50.0)
    assert precision.protocol["chance"] == 25 and precision.protocol["candidates"] == 3
    assert score.protocol["network"] == "colours" and score.protocol["num_images"] == 4
    assert (folder / "r_precision_3_seed2020.json").is_file()
    again = clip_scores(folder, ColourEncoder(), num_candidates=3, folds=2)
    assert [s.value for s in again] == [score.value, precision.value]


def test_images_that_say_the_opposite_score_nothing(tmp_path):
    class Opposite(ColourEncoder):
        def encode_images(self, images):
            return -super().encode_images(images)

    folder = write_samples(tmp_path / "samples", [(c, f"a {c} bird") for c in COLOURS])
    right = clip_scores(folder, ColourEncoder(), num_candidates=2, folds=1)
    wrong = clip_scores(folder, Opposite(), num_candidates=2, folds=1)
    assert [s.value for s in right] == [pytest.approx(100), pytest.approx(100)]
    assert [s.value for s in wrong] == [0, 0]


def test_captions_of_the_same_words_are_scored_as_they_are_written(tmp_path):
    class Loud(ColourEncoder):
        def encode_captions(self, captions):
            return torch.stack(
                [c if t.islower() else -c for t, c in zip(captions, super().encode_captions(captions), strict=True)]
            )

    folder = write_samples(tmp_path / "samples", [("red", "red"), ("red", "RED"), ("green", "green"), ("blue", "blue")])
    score, _ = clip_scores(folder, Loud(), num_candidates=2, folds=1)
    assert score.value == pytest.approx(50.0)  # three right, one the opposite


def test_missing_weights_are_one_line(tmp_path, monkeypatch, capsys):
    folder = write_samples(tmp_path / "samples", [("red", "red")])
    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "empty"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(sys, "argv", ["CLIP.py", "--samples", str(folder), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        run_command(clip_main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: openai/clip-vit-base-patch32: no such file or folder") and error.count("\n") == 1
    assert "nothing is downloaded" in error and "ViT-B-32.pt" in error


# -- with a tiny CLIP of random weights ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """As Hugging Face keeps one: weights, their description, the tokenizer's merges (none: every character is a token)."""
    folder = tmp_path_factory.mktemp("clip")
    clip = untrained_clip(16, 8, 64, 2, 8, 514)
    save_file(hugging_face_state(clip), folder / "model.safetensors", metadata={"format": "pt"})
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "hidden_act": "quick_gelu"}
    tower |= {"num_attention_heads": 1}
    text = tower | {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 0}
    vision = tower | {"image_size": 16, "patch_size": 8}
    config = {"model_type": "clip", "projection_dim": 8, "text_config": text, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="module")
def theirs(clip_folder):
    """transformers' model and processor for the same folder; the package is optional."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers' CLIPModel")
    pieces = {piece: index for index, piece in enumerate(BytePairs.of_merges([]).words)}
    tokenizer = transformers.CLIPTokenizer(vocab=pieces, merges=[])
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model = transformers.CLIPModel.from_pretrained(clip_folder, local_files_only=True).eval()
    return model, transformers.CLIPProcessor(images, tokenizer)


def test_codes_are_those_of_transformers(clip_folder, theirs):
    clip, (model, processor) = load_clip(clip_folder), theirs
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 28, 3), dtype=np.uint8)
    captions = ["a red bird", "blue", "a caption far longer than the network has places for, " * 3]
    codes, texts = clip.encode_images(list(pixels)), clip.encode_captions(captions)
    assert codes.shape == texts.shape == (3, 8)
    images = [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]
    inputs = processor(text=captions, images=images, return_tensors="pt", padding=True, truncation=True, max_length=77)
    with torch.inference_mode():
        output = model(**inputs)
    for ours, their_codes in ((codes, output.image_embeds), (texts, output.text_embeds)):
        assert torch.allclose(torch.nn.functional.normalize(ours), their_codes, atol=1e-5)
    assert not torch.allclose(codes[0], codes[1], atol=1e-3) and not torch.allclose(texts[0], texts[1], atol=1e-3)


def test_score_is_that_of_torchmetrics(clip_folder, theirs, tmp_path):
    their_score = pytest.importorskip("torchmetrics.functional.multimodal").clip_score
    model, processor = theirs
    pairs = [("red", "a red bird"), ("green", "a green bird"), ("red", "a blue bird"), ("blue", "grey")]
    folder = write_samples(tmp_path / "samples", pairs)
    plain = type("Plain", (), {})()  # transformers 5 wraps codes in a way that torchmetrics does not know yet
    plain.config, plain.to = model.config, lambda device: plain
    plain.get_image_features = lambda pixels: _plain(model.get_image_features(pixels))
    plain.get_text_features = lambda tokens, mask: _plain(model.get_text_features(tokens, mask))
    pixels = torch.from_numpy(np.stack([np.full((8, 8, 3), COLOURS[c], np.uint8) for c, _ in pairs]))
    captions = [caption for _, caption in pairs]
    value = their_score(list(pixels.permute(0, 3, 1, 2)), captions, model_name_or_path=lambda: (plain, processor))
    score, _ = clip_scores(folder, load_clip(clip_folder), num_candidates=3, folds=1)
    assert score.value == pytest.approx(float(value), rel=1e-4, abs=1e-4)


def _plain(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def test_images_are_scaled_to_the_shorter_side_and_cropped():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30, 0] = 255  # the square in the middle
    cropped = resized_and_cropped(image, 10)
    assert cropped.shape == (3, 10, 10) and cropped.dtype == torch.uint8
    assert (cropped[0, :, 1:-1] > 240).all() and not cropped[1:].any()


def test_the_label_says_which_weights(clip_folder):
    clip = load_clip(clip_folder)
    assert clip.label == f"{clip_folder.name}:{clip.protocol['weights_hash'][:8]}"


def test_the_command_with_a_tiny_clip(clip_folder, tmp_path, monkeypatch, capsys):
    folder = write_samples(tmp_path / "samples", [(c, f"a {c} bird") for c in COLOURS])
    words = ["--samples", folder, "--clip", clip_folder, "--candidates", "2", "--folds", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["CLIP.py", *map(str, words), "--json"])
    clip_main()
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [score["name"].split("[")[0] for score in scores] == ["CLIPScore", "CLIP-R-precision%"]
    assert scores[1]["protocol"]["chance"] == pytest.approx(100 / 3)


def test_few_captions_cost_the_ranking_alone(clip_folder, tmp_path):
    folder = write_samples(tmp_path / "samples", [(c, f"a {c} bird") for c in COLOURS])
    tools = Tools(clip=str(clip_folder))
    (alone,) = score_images(ClipScore, folder, tools=tools)
    assert alone.warnings[0].startswith("CLIP-R-precision is not computed: R-precision needs 99 captions")
    both = score_images(ClipScore, folder, tools=tools, protocol=Protocol("few", "", candidates=2, folds=1))
    assert len(both) == 2 and not both[0].warnings
    assert (alone.name, alone.value, alone.std) == (both[0].name, both[0].value, both[0].std)

    # A file that the user has to mend stays an error.
    (tmp_path / "lists.json").write_text("{}")
    with pytest.raises(DataError, match="holds no candidate lists"):
        score_images(ClipScore, folder, tools=Tools(clip=str(clip_folder), lists=tmp_path / "lists.json"))
