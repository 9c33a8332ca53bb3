"""Two processes (gloo) with half a batch each take the step of one process with the whole batch, to 1e-5.

What two processes exchange is imitated in one where both have the same images: a sum over the processes is twice one's own.
"""

from pathlib import Path

import pytest
import torch
from test_distributed import torchrun
from torch import nn

from miscc import distributed
from miscc.distributed import JointBatchNorm

ROOT = Path(__file__).parents[1]

STEP = """
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
import torch
from test_bench_reference import make_batch, make_system

from miscc import distributed
from models.ssa_gan import SSAGAN
from training.step import Stepper, split_batch


class Halves(SSAGAN):
    '''Mismatched pairs are formed within each half of the batch, as each process forms its own.'''

    def _discriminator_losses(self, real, fake, sentence):
        parts = [SSAGAN._discriminator_losses(self, real[r], fake[r], sentence[r]) for r in (slice(0, 2), slice(2, 4))]
        return {"hinge": sum(losses["hinge"] for losses, _ in parts) / 2}, parts[0][1]


def run(system, world, batch, noise):
    groups = {name: spec.parameters for name, spec in system.optimizers().items()}
    optimizers = {name: torch.optim.SGD(parameters, lr=0.01) for name, parameters in groups.items()}
    found = []
    for update in Stepper(system.updates, optimizers, world, global_damsm=True).steps(batch, noise):
        found.append([None if p.grad is None else p.grad.clone() for p in groups[update.optimizer]])
    return found


world = distributed.start(gpu=-1)
whole, noise = make_batch(), torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
alone = make_system()
alone.__class__ = Halves
expected = run(alone, distributed.World(0, 1, world.device), whole, noise)
shared = make_system()
for network in shared.networks.values():
    distributed.synchronise(network, world)
found = run(shared, world, split_batch(whole, 2)[world.rank], noise.chunk(2)[world.rank])
assert len(found) == len(expected) == 3
for ours, theirs in zip(found, expected, strict=True):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
for name, value in alone.networks["generator"].state_dict().items():  # weights after the step, running statistics
    torch.testing.assert_close(shared.networks["generator"].state_dict()[name], value, rtol=1e-6, atol=1e-8)

# Each part by itself: batch norm over all images, and rows of all processes, with gradients.
torch.manual_seed(5)
x, direction = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
theirs, ours = torch.nn.BatchNorm2d(3).double(), torch.nn.BatchNorm2d(3).double()
ours = distributed.synchronise(ours, world)
half = slice(2 * world.rank, 2 * world.rank + 2)
joint, own = x.clone().requires_grad_(), x[half].clone().requires_grad_()
(theirs(joint) * direction).sum().backward()
(ours(own) * direction[half]).sum().backward()
torch.testing.assert_close(own.grad, joint.grad[half])
distributed.average_gradients([ours.weight, ours.bias], world)
torch.testing.assert_close(2 * ours.weight.grad, theirs.weight.grad)
torch.testing.assert_close(ours.running_var, theirs.running_var)
assert ours.num_batches_tracked == 1
torch.testing.assert_close(ours.eval()(own), theirs.eval()(joint)[half])

# Under bf16 autocast: finite, of the dtype that comes in, and the running statistics those of all images in float32.
low = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(6)).bfloat16()
norm, expected = distributed.synchronise(torch.nn.BatchNorm2d(3), world), torch.nn.BatchNorm2d(3)
with torch.autocast("cpu", dtype=torch.bfloat16):
    value, value_of_all = norm(low[half]), expected(low)
assert value.dtype == value_of_all.dtype == torch.bfloat16
torch.testing.assert_close(value, value_of_all[half])
torch.testing.assert_close(norm.running_mean, expected.running_mean)
torch.testing.assert_close(norm.running_var, expected.running_var)

rows = torch.full((2, 1), float(world.rank), requires_grad=True)
assert distributed.all_gather_with_grad(rows)[0] is rows
with distributed.global_damsm(world):
    (gathered,) = distributed.all_gather_with_grad(rows)
assert gathered.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
(gathered.flatten() * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
assert rows.grad.flatten().tolist() == [[2.0, 4.0], [6.0, 8.0]][world.rank]
(Path(sys.argv[1]) / f"fine{world.rank}").touch()
distributed.stop()
"""


def test_two_processes_take_the_step_of_one(tmp_path):
    (tmp_path / "step.py").write_text(STEP)
    torchrun(tmp_path / "step.py", tmp_path, ROOT)
    assert sorted(path.name for path in tmp_path.glob("fine*")) == ["fine0", "fine1"]


@pytest.fixture
def twins(monkeypatch):
    """This process and one with the same tensors."""
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(distributed.dist, "all_gather", lambda parts, own: [part.copy_(own) for part in parts])


def joint(norm):
    norm.__class__ = JointBatchNorm
    return norm


def norm_and_input(dtype, affine=True):
    torch.manual_seed(7)
    norm = nn.BatchNorm2d(3, affine=affine).to(dtype)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm, torch.randn(2, 3, 2, 2, dtype=dtype)


@pytest.mark.parametrize("affine", [True, False])
def test_joint_batch_norm_by_finite_differences(twins, affine):
    norm, x = norm_and_input(torch.float64, affine)
    joint(norm)
    parameters = dict(norm.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(norm, dict(zip(parameters, values, strict=True)), (x,))

    inputs = (x.requires_grad_(), *(parameter.detach().requires_grad_() for parameter in parameters.values()))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_sum_over_processes_by_finite_differences(twins):
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert distributed._SumOverProcesses.apply(x).tolist() == [2 * value for value in x.tolist()]
    assert torch.autograd.gradcheck(distributed._SumOverProcesses.apply, (x,))
    assert torch.autograd.gradgradcheck(distributed._SumOverProcesses.apply, (x,))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_joint_batch_norm_equals_torchs_of_all_images(twins, dtype, momentum):
    """Of 16 bits, too: statistics in float32, so that nothing but the result is rounded."""
    norm, x = norm_and_input(torch.float32)
    norm.momentum = momentum
    expected = nn.BatchNorm2d(3, momentum=momentum)
    expected.load_state_dict(norm.state_dict())
    joint(norm)
    for factor in (1, 3):
        value = norm((factor * x).to(dtype))
        value_of_all = expected((factor * x).to(dtype).float().repeat(2, 1, 1, 1))
    assert value.dtype == dtype and norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(value, value_of_all[:2].to(dtype))
    torch.testing.assert_close(norm.running_mean, expected.running_mean)
    torch.testing.assert_close(norm.running_var, expected.running_var)
    assert norm.num_batches_tracked == expected.num_batches_tracked == 2


def test_gradients_and_logged_numbers_are_averaged(twins):
    """Both have 4 and 6: their mean is 4 and 6 again."""
    world = distributed.World(0, 2, torch.device("cpu"))
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([4.0]), torch.tensor([6.0])
    distributed.average_gradients(parameters, world)
    assert [None if p.grad is None else p.grad.item() for p in parameters] == [4.0, 6.0, None]
    assert distributed.average({"b": torch.tensor(4.0), "a": torch.tensor(6.0)}, world) == {"a": 6.0, "b": 4.0}


def test_gathered_rows_say_that_they_cannot_be_differentiated_twice(twins):
    world = distributed.World(1, 2, torch.device("cpu"))
    rows = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with distributed.global_damsm(world):
        (gathered,) = distributed.all_gather_with_grad(rows)
    assert gathered.shape == (4, 3)
    weights = torch.arange(12, dtype=torch.float64).view(4, 3)
    (gradient,) = torch.autograd.grad((gathered.square() * weights).sum(), rows, create_graph=True)
    torch.testing.assert_close(gradient, 2 * 2 * rows * weights[2:])  # rank 1 has the last rows; both processes' losses
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
