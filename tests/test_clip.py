"""CLIP's towers and their files: sizes from shapes, the three kinds of files, what is missing; the golden numbers are
test_golden_galip.py's."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import tiny_clip

from miscc.byte_pairs import BytePairs
from miscc.errors import CheckpointError, ConfigError
from models.clip_features import load_clip, untrained_clip
from models.clip_files import MODEL, find_clip, load_clip_weights, load_tokenizer, openai_names, read_tensors
from models.registry import from_state, to_state


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def openai_state(clip):
    visual = {f"visual.{name}": value for name, value in clip.visual.state_dict().items()}
    return visual | clip.text_encoder.state_dict() | {"logit_scale": torch.tensor(4.6)}


def hugging_face_state(clip):
    """The same tensors as Hugging Face names them."""
    renamed = {}
    for name, value in openai_state(clip).items():
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        plain = name.removeprefix("visual.")
        if ".in_proj_" in plain:
            start, _, kind = plain.partition(".attn.in_proj_")
            block = f"{tower}.encoder.layers.{start.rpartition('.')[2]}.self_attn."
            renamed |= {f"{block}{p}_proj.{kind}": part for p, part in zip("qkv", value.chunk(3), strict=True)}
            continue
        for theirs, ours in (
            ("transformer.resblocks", "encoder.layers"), (".attn.", ".self_attn."), (".ln_", ".layer_norm"),
            (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."), ("conv1.", "embeddings.patch_embedding."),
            ("class_embedding", "embeddings.class_embedding"), ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"),
            ("positional_embedding", "embeddings.position_embedding.weight"), ("ln_final", "final_layer_norm"),
            ("token_embedding", "embeddings.token_embedding"),
        ):  # fmt: skip
            plain = plain.replace(theirs, ours)
        if name in ("visual.proj", "text_projection"):
            renamed["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = value.T
        else:
            renamed[f"{tower}.{plain}"] = value
    return {name: value.contiguous() for name, value in renamed.items()}


class Holder(torch.nn.Module):
    """A module that holds tensors by their names, for a TorchScript archive as OpenAI's files are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def holder(state):
    root = Holder()
    for name, value in state.items():
        node = root
        *path, last = name.split(".")
        for part in path:
            if part not in node._modules:
                node.add_module(part, Holder())
            node = node._modules[part]
        node.register_parameter(last, torch.nn.Parameter(value))
    return root


def test_sizes_come_from_the_shapes(clip):
    again = load_clip({name: value.half() for name, value in openai_state(clip).items()})
    assert again.visual.arguments == clip.visual.arguments
    assert again.text_encoder.arguments == clip.text_encoder.arguments
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in again.parameters())
    assert again.visual.arguments["image_size"] == 56 and again.text_encoder.arguments["max_words"] == 77


def test_patches_are_those_of_the_whole_pass_and_stop_early(clip):
    images = torch.randn(2, 3, 56, 56)
    maps, embedding = clip.visual(images)
    assert [tuple(m.shape) for m in maps] == [(2, 64, 7, 7)] * 3 and embedding.shape == (2, 16)
    ran = []
    last = clip.visual.transformer.resblocks[9].register_forward_hook(lambda *_: ran.append(1))
    assert all(torch.equal(a, b) for a, b in zip(clip.visual.patches(images), maps, strict=True)) and not ran
    clip.visual(images)
    last.remove()
    assert ran == [1]


def test_padding_changes_nothing(clip):
    captions = torch.zeros(2, 77, dtype=torch.int64)
    captions[0, :4], captions[1, :9] = torch.tensor([518, 3, 4, 519]), torch.tensor([518, 1, 2, 3, 4, 5, 6, 7, 519])
    both = clip.text_encoder(captions, torch.tensor([4, 9]))
    alone = clip.text_encoder(captions[:1], torch.tensor([4]))
    torch.testing.assert_close(both.sentence[:1], alone.sentence)
    assert both.words.shape == (2, 64, 9) and both.mask[0].tolist() == [False] * 4 + [True] * 5
    assert (both.sentence[0] - both.sentence[1]).abs().max() > 0.01
    torch.testing.assert_close(clip.text(captions), both.sentence)


@pytest.mark.parametrize("kind", ["openai", "openai_scripted", "hugging_face", "hugging_face_bin", "open_clip"])
def test_three_kinds_of_files(clip, kind, tmp_path):
    if kind == "openai":
        torch.save(openai_state(clip), tmp_path / "ViT-B-32.pt")
    elif kind == "openai_scripted":
        torch.jit.save(torch.jit.script(holder(openai_state(clip))), tmp_path / "ViT-B-32.pt")
    elif kind == "hugging_face":
        save_file(hugging_face_state(clip), tmp_path / "model.safetensors")
    elif kind == "hugging_face_bin":
        torch.save(hugging_face_state(clip), tmp_path / "pytorch_model.bin")
    else:
        save_file(openai_state(clip), tmp_path / "open_clip_model.safetensors")
    loaded, files = load_clip_weights(tmp_path)
    assert files.activation == "quick_gelu"
    for name, value in clip.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", {"text_config": {"hidden_act": "gelu"}}, "gelu"),
        ("config.json", {"text_config": {}}, "quick_gelu"),
        ("open_clip_config.json", {"model_cfg": {"quick_gelu": True}}, "quick_gelu"),
        ("open_clip_config.json", {"model_cfg": {"embed_dim": 512}}, "gelu"),
    ],
)
def test_activation_comes_from_the_description(file, content, expected, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_clip(tmp_path).activation == expected


def test_names_in_the_cache_are_found_and_nothing_is_downloaded(clip, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="nothing is downloaded") as error:
        find_clip(MODEL)
    assert str(tmp_path) in str(error.value) and "ViT-B-32.pt" in str(error.value) and "\n" not in str(error.value)
    snapshot = tmp_path / "hub" / "models--openai--clip-vit-base-patch32" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    save_file(hugging_face_state(clip), snapshot / "model.safetensors")
    (snapshot / "merges.txt").write_text("#version: 0.2\na b\nab c</w>\n")
    files = find_clip(MODEL)
    assert files.weights == snapshot / "model.safetensors"
    assert load_tokenizer(files) == BytePairs.of_merges(["a b", "ab c</w>"])


def test_what_is_missing_is_named(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="a folder without a CLIP's weights"):
        find_clip(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: no such file"):
        find_clip(tmp_path / "nowhere.pt")
    torch.save(openai_state(clip), tmp_path / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match="not its tokenizer; copy one of merges.txt"):
        load_tokenizer(find_clip(tmp_path))
    (tmp_path / "bad.pt").write_text("<html>")
    with pytest.raises(CheckpointError, match="is no weight file"):
        read_tensors(tmp_path / "bad.pt")
    state = openai_state(clip)
    del state["visual.ln_post.bias"]
    with pytest.raises(CheckpointError, match=r"ln_post\.bias is missing"):
        load_clip(state)
    with pytest.raises(CheckpointError, match=r"conv1\.weight is missing"):
        load_clip({"a": torch.zeros(1)})


def test_towers_come_back_from_a_checkpoint(clip):
    for tower, name in ((clip.visual, "clip"), (clip.text_encoder, "clip")):
        again = from_state(to_state(name, tower), {"clip": type(tower)})
        assert again.arguments == tower.arguments
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), tower.state_dict().values(), strict=True)
        )


def test_as_transformers(clip, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers' CLIPModel")
    text = {"vocab_size": 520, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 1, "eos_token_id": 519, "bos_token_id": 518}  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 10, "num_attention_heads": 1,
              "image_size": 56, "patch_size": 8}  # fmt: skip
    theirs = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = load_clip(openai_names(theirs.state_dict()))
    images, captions = torch.randn(2, 3, 56, 56), torch.tensor([[518, 3, 4, 519, 0], [518, 1, 2, 3, 519]])
    with torch.no_grad():
        seen = theirs.vision_model(pixel_values=ours.visual.pixels(images), output_hidden_states=True)
        maps, embedding = ours.visual(images)
        torch.testing.assert_close(embedding, theirs.visual_projection(seen.pooler_output), rtol=1e-4, atol=1e-4)
        for layer, own in zip((1, 4, 8), maps, strict=True):
            torch.testing.assert_close(own.flatten(2).mT, seen.hidden_states[layer + 1][:, 1:], rtol=1e-4, atol=1e-4)
        sentence = theirs.text_projection(theirs.text_model(input_ids=captions).pooler_output)
        torch.testing.assert_close(ours.text(captions), sentence, rtol=1e-4, atol=1e-4)


def test_an_untrained_clip_of_the_largest_settings_is_refused_before_it_fills_the_memory():
    sizes = {"image_size": 28, "patch_size": 4, "text_dim": 64, "vocabulary_size": 600}
    with pytest.raises(
        ConfigError, match="CLIP.WIDTH: an untrained CLIP of width 16384 and 128 blocks has .* lower CLIP.WIDTH"
    ):
        untrained_clip(width=16384, num_blocks=128, **sizes)
    assert untrained_clip(width=64, num_blocks=2, **sizes).text_encoder.max_words == 77
