"""CLIPScore and CLIP-R-precision: values by hand with an encoder that sees colours, and a tiny random CLIP where there is one."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from eval.CLIP import clip_score, clip_scores, load_clip
from eval.CLIP import main as clip_main
from miscc.errors import CheckpointError, run_command

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


def test_a_missing_package_or_missing_weights_are_one_line(tmp_path, monkeypatch, capsys):
    folder = write_samples(tmp_path / "samples", [("red", "red")])
    monkeypatch.setattr(sys, "argv", ["CLIP.py", "--samples", str(folder), "--device", "cpu"])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)
        with pytest.raises(SystemExit) as stop:
            run_command(clip_main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: CLIP needs the package transformers") and error.count("\n") == 1


# -- with transformers, which is optional ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A folder with a CLIP of random weights and its processor, as Hugging Face keeps one."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": len(words) - 1}
    text |= {"bos_token_id": len(words) - 2, "pad_token_id": len(words) - 1}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    return folder


def test_codes_are_those_of_the_model(tiny_clip):
    clip = load_clip(tiny_clip)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    captions = ["a red bird", "blue", "a caption far longer than the network has places for"]
    codes, texts = clip.encode_images(list(pixels)), clip.encode_captions(captions)
    assert codes.shape == texts.shape == (3, 8)
    inputs = clip.processor(
        text=captions, images=list(pixels), return_tensors="pt", padding=True, truncation=True, max_length=12
    )
    with torch.inference_mode():
        output = clip.model(**inputs)
    for ours, theirs in ((codes, output.image_embeds), (texts, output.text_embeds)):
        assert torch.allclose(torch.nn.functional.normalize(ours), theirs, atol=1e-5)
    assert not torch.allclose(codes[0], codes[1], atol=1e-3) and not torch.allclose(texts[0], texts[1], atol=1e-3)
    assert clip.label == f"{tiny_clip.name}:{clip.protocol['weights_hash'][:8]}"


def test_score_is_that_of_torchmetrics(tiny_clip, tmp_path):
    theirs = pytest.importorskip("torchmetrics.functional.multimodal").clip_score
    pairs = [("red", "a red bird"), ("green", "a green bird"), ("red", "a blue bird"), ("blue", "grey")]
    folder = write_samples(tmp_path / "samples", pairs)
    clip = load_clip(tiny_clip)
    model = type("Plain", (), {})()  # transformers 5 wraps codes in a way that torchmetrics does not know yet
    model.config, model.to = clip.model.config, lambda device: model
    model.get_image_features = lambda pixels: _plain(clip.model.get_image_features(pixels))
    model.get_text_features = lambda tokens, mask: _plain(clip.model.get_text_features(tokens, mask))
    pixels = torch.from_numpy(np.stack([np.full((8, 8, 3), COLOURS[c], np.uint8) for c, _ in pairs])).permute(
        0, 3, 1, 2
    )
    captions = [caption for _, caption in pairs]
    value = theirs(list(pixels), captions, model_name_or_path=lambda: (model, clip.processor))
    score, _ = clip_scores(folder, clip, num_candidates=3, folds=1)
    assert score.value == pytest.approx(float(value), rel=1e-4, abs=1e-4)


def _plain(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def test_what_is_no_clip_is_refused(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="nobody/nothing is neither a folder.*nothing is downloaded.*--clip"):
        load_clip("nobody/nothing")
    (tmp_path / "no-weights").mkdir()
    with pytest.raises(CheckpointError, match="no-weights is neither a folder with a CLIP's weights"):
        load_clip(tmp_path / "no-weights")
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_clip, tmp_path / "half")
    state = load_file(tmp_path / "half" / "model.safetensors")
    del state["visual_projection.weight"]  # transformers would only warn, and draw it anew
    save_file(state, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors of a CLIP, e.g. visual_projection.weight"):
        load_clip(tmp_path / "half")


def test_the_command_with_a_tiny_clip(tiny_clip, tmp_path, monkeypatch, capsys):
    folder = write_samples(tmp_path / "samples", [(c, f"a {c} bird") for c in COLOURS])
    words = ["--samples", folder, "--clip", tiny_clip, "--candidates", "2", "--folds", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["CLIP.py", *map(str, words), "--json"])
    clip_main()
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [score["name"].split("[")[0] for score in scores] == ["CLIPScore", "CLIP-R-precision%"]
    assert scores[1]["protocol"]["chance"] == pytest.approx(100 / 3)
