"""One optimizer step: the only place that clears gradients, runs backward passes, and steps an optimizer.

The trainers, the benchmarks and the tests take their steps here. Which losses there are is the system's part
(models/types.py); when to log, draw, save or stop is the trainer's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from miscc import distributed
from miscc.batch import Batch
from miscc.distributed import World, global_damsm
from miscc.errors import CollapseError, ConfigError
from models.types import OptimizerSpec, Update

Objective = Callable[[Batch, Tensor], Iterator[Update]]  # a system's `updates`
PhaseHook = Callable[[Update, str], None]


class Clipping(NamedTuple):
    """Scale the gradients of these parameters down to a joint norm of at most `max_norm`."""

    parameters: Sequence[nn.Parameter]
    max_norm: float


class Stepper:
    """Takes the optimizer steps that an objective yields.

    objective: yields the updates of one training step.
    optimizers: by the names that the updates give.
    precision: "fp32"; "tf32" (float32 whose products on a GPU round to 19 bits); "bf16" (autocast; penalties and losses
        stay in float32); "auto", see `supported_precision`.
    accumulate: micro-batches of each update. Each has its own mismatched pairs and batch statistics. G's graphs live
        until G's update, so this lowers the memory of D and the penalty; checkpointed activations lower G's.
    global_damsm: whether DAMSM's losses compare the images and captions of all processes.
    clipping: of gradients, before the optimizer steps.
    """

    def __init__(
        self,
        objective: Objective,
        optimizers: Mapping[str, torch.optim.Optimizer],
        world: World,
        precision: str = "tf32",
        accumulate: int = 1,
        global_damsm: bool = False,
        clipping: Clipping | None = None,
    ):
        self.objective, self.optimizers, self.world = objective, optimizers, world
        precision = supported_precision(precision, world.device)
        self.precision, self.accumulate, self.global_damsm = precision, accumulate, global_damsm
        self.clipping = clipping
        if world.device.type == "cuda":
            if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
                raise ConfigError("TRAIN.PRECISION: this GPU does not compute in bf16; take tf32 or fp32")
            torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
            torch.backends.cudnn.allow_tf32 = precision != "fp32"

    def steps(self, batch: Batch, noise: Tensor, on_phase: PhaseHook | None = None) -> Iterator[Update]:
        """Take one training step, update by update; noise (N, noise_dim). The iterator must be read to its end.

        Yields each update after its optimizer step, the gradients still in place. With micro-batches its losses and
        stats are the means over them, and so are the gradients.
        on_phase: called as (update, "forward" | "backward" | "step") at the end of each phase.
        """
        micro_batches = zip(split_batch(batch, self.accumulate), noise.chunk(self.accumulate), strict=True)
        runs = [iter(self.objective(*micro_batch)) for micro_batch in micro_batches]
        names: set[str] = set()  # of the step's losses
        while True:
            # Forward and backward, one micro-batch after the other; their gradients add up to the mean.
            done: list[Update] = []
            for run in runs:
                with self.forward_context():
                    update = next(run, None)
                if update is None:
                    continue  # every run is read to its end, where the objective cleans up
                if on_phase:
                    on_phase(update, "forward")
                if not done:
                    self.optimizers[update.optimizer].zero_grad(set_to_none=True)
                loss = sum_of_losses(update)
                (loss if len(runs) == 1 else loss / len(runs)).backward()
                losses = {name: value.detach() for name, value in update.losses.items()}
                done.append(update._replace(losses=losses))
                del update, loss  # or their graph would live through the next micro-batch
            if not done:
                return

            # Gradients: one for every parameter, the mean over the processes.
            update = done[0] if len(done) == 1 else mean_update(done)
            check_names(update, names)
            optimizer = self.optimizers[update.optimizer]
            parameters = parameters_of(optimizer)
            fill_absent_gradients(parameters)
            distributed.average_gradients(parameters, self.world)
            if self.clipping is not None:
                nn.utils.clip_grad_norm_(self.clipping.parameters, self.clipping.max_norm)
            if on_phase:
                on_phase(update, "backward")

            # Step.
            optimizer.step()
            if on_phase:
                on_phase(update, "step")
            yield update

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """The precision of forward passes, and which samples DAMSM's losses see."""
        with ExitStack() as contexts:
            if self.precision == "bf16":
                contexts.enter_context(torch.autocast(self.world.device.type, dtype=torch.bfloat16))
            if self.global_damsm:
                contexts.enter_context(global_damsm(self.world))
            yield


def supported_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on this device: "bf16" where it multiplies in it, else "tf32". Another name stays."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "tf32"
    # A CPU without these instructions would emulate them, many times slower.
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if is_supported() else "tf32"


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that an optimizer moves, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def fill_absent_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give zeros to parameters without a gradient: Adam also moves by past gradients where the present one is zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


# -- micro-batches -------------------------------------------------------------------------------------------------


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """A batch in `count` equal parts, in order."""
    if count == 1:
        return [batch]
    size = len(batch.keys) // count

    def rows(value: Any, part: slice) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):  # images of several sizes
            return [scale[part] for scale in value]
        return value[part]

    slices = [slice(n * size, (n + 1) * size) for n in range(count)]
    return [type(batch)(*(rows(value, part) for value in batch)) for part in slices]


def mean_update(updates: Sequence[Update]) -> Update:
    """The updates of several micro-batches as one: losses and stats are their means."""

    def mean(members: Sequence[Mapping[str, Tensor | float]]) -> dict[str, Tensor]:
        return {
            name: torch.stack([torch.as_tensor(member[name]).detach() for member in members]).mean()
            for name in members[0]
        }

    losses, stats = mean([update.losses for update in updates]), mean([update.stats for update in updates])
    return updates[0]._replace(losses=losses, stats=stats)


def check_batch_size(batch_size: int, num_processes: int = 1, accumulate: int = 1) -> None:
    """Raises ConfigError where processes, or their micro-batches, would not have equally many images, at least two.

    One image has no mismatched caption beside it, which the losses need.
    """
    num_parts = num_processes * accumulate
    if batch_size % num_parts == 0 and batch_size >= 2 * num_parts:
        return
    parts = f"{num_processes} process(es)" + (
        f" of {accumulate} micro-batches (TRAIN.ACCUMULATE)" if accumulate > 1 else ""
    )
    raise ConfigError(
        f"TRAIN.BATCH_SIZE: {batch_size} cannot be cut into equal parts of at least 2 images for {parts}; "
        f"give a multiple of {num_parts}, {2 * num_parts} or more"
    )


def sum_of_losses(update: Update) -> Tensor:
    """What the update minimises. Raises ValueError where a loss is not a scalar, naming it."""
    for name, loss in update.losses.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else loss
            raise ValueError(f"the loss {name!r} of the update {update.kind!r} is no scalar tensor but {shape}")
    return torch.stack(list(update.losses.values())).sum()


def check_names(update: Update, names: set[str]) -> None:
    """Raises ValueError where another update of the step has a loss of the same name; adds the update's to `names`."""
    if repeated := sorted(names & update.named_losses().keys()):
        raise ValueError(
            f"two updates of a step have the loss {', '.join(repeated)}: give it another name, or another group"
        )
    names.update(update.named_losses())


# -- what a step tells ---------------------------------------------------------------------------------------------


def log_values(update: Update, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{name in the log: scalar} of an update that has been taken: losses, stats, norm of the gradient."""
    losses = {name: loss.detach() for name, loss in update.named_losses().items()}
    stats = {name: torch.as_tensor(value).detach() for name, value in update.stats.items()}
    gradients = [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)
    return losses | stats | {f"gradient_norm/{update.kind}": torch.stack(norms).norm()}


class FiniteCheck:
    """Records at which step each loss was first not finite.

    On the device: reading the losses at every step would make a GPU wait.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.first_bad: dict[str, Tensor] = {}  # -1: none yet

    def record(self, update: Update, step: int) -> None:
        """Record the losses of an update of this step."""
        for name, loss in update.named_losses().items():
            known = self.first_bad.setdefault(name, torch.full((), -1, device=self.device))
            self.first_bad[name] = torch.where((known < 0) & ~torch.isfinite(loss.detach()), step, known)

    def check(self, world: World | None = None) -> None:
        """Raise CollapseError, naming loss and step, if a loss was not finite.

        world: the processes of which one loss is enough.
        """
        bad = {name: int(step) for name, step in self.first_bad.items() if step >= 0}
        anywhere = bool(bad) if world is None else distributed.any_process(bool(bad), world)
        message = "a loss was not finite in another process"
        if bad:
            name = min(bad, key=lambda loss: bad[loss])
            message = f"the loss `{name.removeprefix('loss/')}` was not finite at step {bad[name]}"
        if anywhere:
            raise CollapseError(
                f"{message}; the last good checkpoint is kept. Lower the learning rates or raise TRAIN.BATCH_SIZE, then go "
                f"on with --resume"
            )


def check_finite_weights(networks: Mapping[str, nn.Module], step: int) -> None:
    """Raise CollapseError, naming the network, if a weight is not finite.

    step: the one that was taken last.
    """
    for part, network in networks.items():
        # One sum a tensor: it is finite only if all its values are.
        tensors = [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
        sums = torch.stack([tensor.float().sum() for tensor in tensors])
        if not torch.isfinite(sums).all():
            raise CollapseError(
                f"the weights of the {part} are not finite at step {step}; the last good checkpoint is kept. "
                f"Lower the learning rates, then go on with --resume"
            )


# -- optimizers ----------------------------------------------------------------------------------------------------


def make_optimizers(specs: Mapping[str, OptimizerSpec]) -> dict[str, torch.optim.Optimizer]:
    """An Adam for each of a system's `optimizers()`."""
    return {name: adam(parameters, lr, betas) for name, (parameters, lr, betas) in specs.items()}


def adam(parameters: Sequence[nn.Parameter], lr: float, betas: Sequence[float]) -> torch.optim.Adam:
    """Adam in its fused form, which goes over the memory once: four times faster than PyTorch's default also on CPUs."""
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(float(betas[0]), float(betas[1])), fused=True)

    # What PyTorch does in the first step: a checkpoint before it, of a network that joins later, is then complete, too.
    for parameter in parameters:
        averages = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **averages}
    return optimizer


def restore_adam(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load an optimizer's saved state. Learning rate and betas stay those of the settings, which may have changed.

    Raises ValueError where the state is not this optimizer's.
    """
    # The averages of every parameter, in its shape.
    parameters, states = parameters_of(optimizer), dict(saved["state"])
    for index, parameter in enumerate(parameters):
        if not isinstance(states[index], Mapping):  # a damaged file's tensor, for example
            raise ValueError(f"the state of parameter {index} holds nothing by name")
        for name in ("exp_avg", "exp_avg_sq"):
            if states[index][name].shape != parameter.shape or not torch.isfinite(states[index][name].sum()):
                raise ValueError(f"the {name} of parameter {index} has another shape, or is not finite")
        torch.as_tensor(states[index]["step"]).float().item()

    # Older checkpoints were not fused.
    groups = [
        old | {key: new[key] for key in ("lr", "betas", "fused")}
        for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**saved, "param_groups": groups})

    # The fused form needs averages in their parameter's layout, which TRAIN.CHANNELS_LAST may have changed.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
