"""One optimizer step by hand: two parameters, losses that can be differentiated in one's head."""

import pytest
import torch

from miscc.batch import Batch
from miscc.distributed import World
from miscc.errors import TrainingError
from models.types import Update
from training.step import Clipping, FiniteCheck, Stepper, adam, log_values, restore_adam, supported_precision

CPU = World(0, 1, torch.device("cpu"))


def batch_of(*values):
    """Images of one pixel with these values."""
    count = len(values)
    indices = torch.arange(count)
    images = torch.tensor(values).view(count, 1, 1, 1)
    return Batch(images, indices, indices, indices, [str(n) for n in range(count)], indices, indices)


def stepper_of(*updates, lr=1.0, **options):
    """Parameters a = 1 and b = 2 in one optimizer; each of `updates` makes an Update of (a, b, images)."""
    a, b = (torch.nn.Parameter(torch.tensor(value)) for value in (1.0, 2.0))

    def objective(batch, noise):
        for update in updates:
            yield update(a, b, batch.images)

    return Stepper(objective, {"both": torch.optim.SGD([a, b], lr=lr)}, CPU, **options), a, b


def squared(a, b, images):
    return Update("both", {"square": 3 * a**2, "images": a * images.mean()}, {"stat/mean": images.mean()})


def penalty(a, b, images):
    return Update("both", {"anything": 5 * b}, is_penalty=True)


def test_a_step_descends_before_the_next_update_is_computed():
    stepper, a, b = stepper_of(squared, lambda *values: squared(*values)._replace(group="again"), lr=0.1)
    losses = [update.losses["square"].item() for update in stepper.steps(batch_of(2.0), torch.zeros(1, 1))]
    # d/da (3a² + 2a) = 6a + 2: 8 at 1, then 3.2 at 0.2.
    assert losses == pytest.approx([3.0, 3 * 0.2**2])
    assert a.item() == pytest.approx(0.2 - 0.1 * 3.2) and b.item() == 2.0


def test_a_parameter_without_gradient_gets_zeros():
    stepper, _, b = stepper_of(squared)
    list(stepper.steps(batch_of(2.0), torch.zeros(1, 1)))
    assert b.grad is not None and b.grad.item() == 0.0


def test_micro_batches_step_once_by_the_mean():
    stepper, a, _ = stepper_of(squared, lr=0.1, accumulate=2)
    (update,) = stepper.steps(batch_of(1.0, 1.0, 3.0, 3.0), torch.zeros(4, 1))
    assert a.item() == pytest.approx(1 - 0.1 * (6 + 2))  # mean of 6 + 1 and 6 + 3
    assert update.losses["images"].item() == 2.0 and update.stats["stat/mean"].item() == 2.0


def test_clipping_touches_its_parameters_alone():
    def steep(a, b, images):
        return Update("both", {"steep": 8 * a + 5 * b})

    stepper, a, b = stepper_of(steep)
    stepper.clipping = Clipping([a], 2.0)
    list(stepper.steps(batch_of(2.0), torch.zeros(1, 1)))
    assert a.item() == pytest.approx(1 - 2.0) and b.item() == 2 - 5.0


def test_the_phases_of_every_update_come_in_order():
    stepper, a, _ = stepper_of(squared, penalty)
    seen = []
    for _ in stepper.steps(
        batch_of(2.0), torch.zeros(1, 1), lambda update, phase: seen.append((update.kind, phase, a.item()))
    ):
        pass
    moved = 1 - 8.0
    assert seen == [
        ("both", "forward", 1.0), ("both", "backward", 1.0), ("both", "step", moved),
        ("penalty", "forward", moved), ("penalty", "backward", moved), ("penalty", "step", moved),
    ]  # fmt: skip


def test_what_is_logged_of_an_update():
    stepper, *_ = stepper_of(squared, penalty)
    first, second = (
        log_values(update, stepper.optimizers["both"]) for update in stepper.steps(batch_of(2.0), torch.zeros(1, 1))
    )
    assert {name: value.item() for name, value in first.items()} == {
        "loss/square": 3.0, "loss/images": 2.0, "stat/mean": 2.0, "gradient_norm/both": 8.0,
    }  # fmt: skip
    # A penalty is declared, not recognised by the name of its loss.
    assert {name: value.item() for name, value in second.items()} == {
        "loss/anything": 10.0,
        "gradient_norm/penalty": 5.0,
    }


def test_a_loss_that_is_no_scalar_is_named():
    stepper, *_ = stepper_of(lambda a, b, images: Update("both", {"good": a, "pixels": a * images}))
    with pytest.raises(
        ValueError, match=r"the loss 'pixels' of the update 'both' is no scalar tensor but \(1, 1, 1, 1\)"
    ):
        list(stepper.steps(batch_of(2.0), torch.zeros(1, 1)))


def test_two_updates_of_a_step_cannot_have_a_loss_of_one_name():
    """One would hide the other in the log."""
    stepper, *_ = stepper_of(squared, squared)
    with pytest.raises(
        ValueError, match="two updates of a step have the loss loss/images, loss/square: give it another"
    ):
        list(stepper.steps(batch_of(2.0), torch.zeros(1, 1)))

    stepper, *_ = stepper_of(squared, lambda *values: squared(*values)._replace(group="encoders"))
    first, second = (
        log_values(update, stepper.optimizers["both"]) for update in stepper.steps(batch_of(2.0), torch.zeros(1, 1))
    )
    assert first["loss/square"] == 3.0 and "encoders/square" in second and "loss/square" not in second


@pytest.mark.parametrize("emulated", [True, False])
def test_a_gpu_that_emulates_bf16_takes_tf32(monkeypatch, emulated):
    supported = lambda including_emulation=True: including_emulation or not emulated  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert supported_precision("auto", torch.device("cuda")) == ("tf32" if emulated else "bf16")


def test_the_first_step_with_a_loss_that_is_not_finite_is_named():
    check = FiniteCheck(CPU.device)
    for step, value in ((1, 1.0), (2, float("nan")), (3, 1.0), (4, float("inf"))):
        check.record(Update("both", {"good": torch.tensor(0.0), "bad": torch.tensor(value)}), step)
        if step == 1:
            check.check()
    with pytest.raises(TrainingError, match="the loss `bad` was not finite at step 2"):
        check.check()


def test_a_restored_optimizer_has_the_averages_of_the_run_and_the_rates_of_the_settings():
    a = torch.nn.Parameter(torch.tensor([1.0]))
    before, now = adam([a], 0.1, (0.5, 0.9)), adam([a], 0.2, (0.0, 0.99))
    a.grad = torch.tensor([2.0])
    before.step()
    restore_adam(now, before.state_dict())
    assert now.param_groups[0]["lr"] == 0.2 and now.param_groups[0]["betas"] == (0.0, 0.99)
    assert now.state[a]["exp_avg"].item() == 1.0  # (1 - 0.5) · 2
    assert now.state[a]["exp_avg_sq"].item() == pytest.approx(0.4)  # (1 - 0.9) · 2²
