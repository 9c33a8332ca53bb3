"""How a step is computed changes what it costs, not what it is: micro-batches, checkpointing, compiling, bf16."""

import copy

import pytest
import torch
from test_bench_reference import make_batch, make_system

from miscc.distributed import World
from miscc.errors import ConfigError
from miscc.losses import hinge_discriminator_loss, hinge_generator_loss
from models.modes import full_precision
from training.compute import checkpoint_activations, compile_networks, use_channels_last
from training.step import Stepper, adam, check_batch_size, restore_adam, split_batch, supported_precision

CPU = World(0, 1, torch.device("cpu"))
NOISE = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def optimizers_of(system, lr):
    return {name: torch.optim.SGD(parameters, lr=lr) for name, (parameters, _, _) in system.optimizers().items()}


def run(system, batch=None, noise=NOISE, steps=True, **settings):
    """(losses, gradients) of every update, with steps of plain descent between them."""
    optimizers, found = optimizers_of(system, 0.01 if steps else 0.0), []
    for update in Stepper(system.updates, optimizers, CPU, **settings).steps(batch or make_batch(), noise):
        parameters = system.optimizers()[update.optimizer].parameters
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        found.append(({name: value.item() for name, value in update.losses.items()}, gradients))
    return found


def assert_same(first, second, **tolerance):
    assert len(first) == len(second) == 3
    for (losses, gradients), (others, their_gradients) in zip(first, second, strict=True):
        assert losses == pytest.approx(others, rel=tolerance.get("rtol", 1e-9), abs=1e-12)
        for a, b in zip(gradients, their_gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


def test_micro_batches_give_the_mean_of_their_gradients():
    whole = make_batch()
    parts = split_batch(whole, 2)
    assert [part.keys for part in parts] == [["a", "b"], ["c", "d"]]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    separate = [run(make_system(), part, noise, steps=False) for part, noise in zip(parts, NOISE.chunk(2), strict=True)]
    together = run(make_system(), whole, steps=False, accumulate=2)
    assert len(together) == 3
    for (losses, gradients), one, two in zip(together, *separate, strict=True):
        assert losses == pytest.approx({name: (one[0][name] + two[0][name]) / 2 for name in losses}, rel=1e-12)
        for found, a, b in zip(gradients, one[1], two[1], strict=True):
            assert (found is None) == (a is None)
            if found is not None:
                torch.testing.assert_close(found, (a + b) / 2, rtol=1e-9, atol=1e-12)


def test_images_of_several_sizes_are_split_each():
    batch = make_batch()._replace(images=[torch.randn(4, 3, 8, 8), torch.randn(4, 3, 16, 16)])
    assert [[scale.shape[0] for scale in part.images] for part in split_batch(batch, 2)] == [[2, 2], [2, 2]]


@pytest.mark.parametrize(("batch", "processes", "accumulate"), [(24, 1, 5), (8, 2, 4), (8, 4, 2)])
def test_batches_that_cannot_be_cut_are_refused(batch, processes, accumulate):
    with pytest.raises(
        ConfigError, match=f"TRAIN.BATCH_SIZE: {batch} cannot .* of {accumulate} micro-batches .TRAIN.ACCUM"
    ):
        check_batch_size(batch, processes, accumulate)
    check_batch_size(batch)


def test_a_batch_for_several_processes_names_the_batch_alone():
    with pytest.raises(
        ConfigError, match=r"^TRAIN.BATCH_SIZE: 7 .* for 2 process\(es\); give a multiple of 2, 4 or more$"
    ):
        check_batch_size(7, 2)
    check_batch_size(6, 2)


def test_checkpointed_activations_change_no_bit():
    plain, checkpointed = make_system(), make_system()
    assert checkpoint_activations(checkpointed.networks["generator"]) == 3
    assert_same(run(plain), run(checkpointed))
    for name, buffer in plain.networks["generator"].named_buffers():  # no batch counted twice
        assert torch.equal(buffer, checkpointed.networks["generator"].state_dict()[name]), name


def test_a_copy_of_a_checkpointed_generator_computes_with_its_own_weights():
    generator = make_system().networks["generator"]
    checkpoint_activations(generator)
    copied = copy.deepcopy(generator)
    assert copied.blocks[0].forward.block is copied.blocks[0]


def test_channels_last_is_a_matter_of_layout():
    plain, other = make_system(), make_system()
    use_channels_last(other.networks)
    assert_same(run(plain), run(other), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "layouts", [(torch.contiguous_format, torch.channels_last), (torch.channels_last, torch.contiguous_format)]
)
def test_adam_goes_on_in_another_layout(layouts):
    """The fused form goes over the memory as it lies; a restored average in another order would be mixed up."""
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 3, 3, 3), torch.randn(2, 4, 3, 3, 3)

    def optimised(layout):
        parameter = torch.nn.Parameter(start.to(memory_format=layout))
        return parameter, adam([parameter], 0.1, [0.5, 0.9])

    def descend(parameter, optimizer, gradient):
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()

    stock = torch.nn.Parameter(start.clone())
    expected = torch.optim.Adam([stock], lr=0.1, betas=(0.5, 0.9))
    for gradient in gradients:
        stock.grad = gradient
        expected.step()
    first, optimizer = optimised(layouts[0])
    descend(first, optimizer, gradients[0])
    second, restored = optimised(layouts[1])
    second.data.copy_(first.data)
    restore_adam(restored, optimizer.state_dict())
    descend(second, restored, gradients[1])
    torch.testing.assert_close(second.data, stock.data)


def test_the_mean_of_16_bit_logits_is_not_rounded_to_16_bits():
    logits = torch.tensor([1, 1 + 2**-7], dtype=torch.bfloat16)
    assert hinge_generator_loss(logits).item() == -(1 + 2**-8)


def test_bf16_stays_near_and_the_penalty_is_exact():
    def floats(system):
        for network in system.networks.values():
            network.float()
        return system

    batch = make_batch()
    batch = batch._replace(images=batch.images.float())
    exact = run(floats(make_system()), batch, NOISE.float(), steps=False)
    near = run(floats(make_system()), batch, NOISE.float(), steps=False, precision="bf16")
    for (losses, _), (others, _) in zip(exact, near, strict=True):
        assert losses == pytest.approx(others, rel=0.1)
    assert exact[0][0]["hinge"] != near[0][0]["hinge"]  # autocast was at work
    # The penalty sees bf16 in the sentence alone, which the text encoder computes.
    assert exact[1][0]["penalty"] == pytest.approx(near[1][0]["penalty"], rel=0.03)


def test_exactly_switches_autocast_off():
    a = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with full_precision(a.device):
            assert torch.equal(a @ a, (a.double() @ a.double()).float()) or (a @ a).dtype == torch.float32
        assert hinge_discriminator_loss(*(a.bfloat16() for _ in range(3))).dtype == torch.float32


def test_compiled_networks_take_the_same_step(monkeypatch):
    """With the backend that does everything but generate code; the penalty stays uncompiled."""
    original, calls = torch.compile, []

    def compile_eagerly(function, **options):
        calls.append(function)
        return original(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    plain, compiled = make_system(), make_system()
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: setattr(self, "_compiled_call_impl", original(self._call_impl, backend="aot_eager")),
    )
    compile_networks(compiled.networks)
    assert len(calls) == 2  # D's features and logits
    assert_same(run(plain), run(compiled), rtol=1e-7, atol=1e-10)


def test_every_discriminator_is_compiled_where_steps_call_it(monkeypatch):
    """AttnGAN's in its stages; SEMA's F in its forward, too, which is not made of compiled methods."""
    from models.attn_discriminator import AttnDiscriminator
    from models.damsm import TextEncoder
    from models.sema_modules import FeatureExtractor

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda method: compiled.append((method.__self__, method.__name__)) or method)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append((self, "forward")))
    discriminator = AttnDiscriminator(df_dim=1, base_size=8, num_stages=2, sentence_dim=4)
    extractor = FeatureExtractor(nf=1, image_size=8)
    compile_networks({"discriminator": discriminator, "feature_extractor": extractor, "text_encoder": TextEncoder(20)})
    by_stage = [(stage, name) for stage in discriminator.stages for name in ("features", "logits", "unconditional")]
    assert compiled == [*by_stage, (extractor, "logits"), (extractor, "forward")]
    generator = make_system().networks["generator"]
    checkpoint_activations(generator)
    compile_networks({"generator": generator})
    assert len(compiled) == 8  # the compiler refuses to follow a checkpointed generator


@pytest.mark.parametrize(
    "settings",
    [
        [("TRAIN.ACCUMULATE", "2"), ("TRAIN.ACTIVATION_CHECKPOINTING", "True")],
        [("TRAIN.PRECISION", "bf16"), ("TRAIN.GLOBAL_DAMSM", "True"), ("TRAIN.CHANNELS_LAST", "True")],
    ],
)
def test_the_trainer_stops_and_goes_on_exactly_with_them(tiny, tmp_path, settings):
    from test_trainer import assert_same_state, final_state, trained_whole_and_in_parts

    whole, parts = trained_whole_and_in_parts(tiny, tmp_path, 1, *settings, ("TRAIN.MAX_STEPS", "3"))
    assert_same_state(final_state(whole), final_state(parts))


@pytest.mark.parametrize(("multiplies_in_it", "expected"), [(True, "bf16"), (False, "tf32")])
def test_auto_takes_bf16_where_the_processor_multiplies_in_it(monkeypatch, multiplies_in_it, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies_in_it, raising=False)
    assert supported_precision("auto", torch.device("cpu")) == expected
    assert supported_precision("fp32", torch.device("cpu")) == "fp32"


def test_small_encoder_shrinks_larger_images_under_bf16():
    from models.damsm import SmallImageEncoder

    encoder, images = SmallImageEncoder(image_size=16, nf=2).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(images)[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = encoder(images.to(torch.bfloat16))[1]
    assert torch.allclose(actual.float(), expected, atol=0.05)
