"""Budget of a training in steps and minutes, and the learning rates that follow from it, against values by hand."""

import pytest
import torch
from torch import nn

from miscc.distributed import World
from training.ema import EMA
from training.schedule import Budget, learning_rate_factor, set_learning_rates

ALONE = World(0, 1, torch.device("cpu"))


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_steps_alone_need_no_clock():
    budget = Budget(last_step=200, clock=lambda: 1 / 0)
    budget.agree(ALONE)
    assert [budget.share(step) for step in (0, 50, 200, 300)] == [0, 0.25, 1, 1]
    assert not budget.is_over(199) and budget.is_over(200)


def test_whichever_is_used_up_first_ends_it():
    clock = Clock()
    budget = Budget(last_step=100, max_minutes=2, clock=clock)
    budget.start()
    clock.now += 30
    budget.agree(ALONE)
    assert budget.share(10) == 0.25, "30 of 120 seconds are more than 10 of 100 steps"
    assert budget.share(50) == 0.5
    clock.now += 90
    assert not budget.is_over(10), "the clock is read at `agree` alone, where all processes read it"
    budget.agree(ALONE)
    assert budget.is_over(10)


def test_a_resumed_run_counts_on():
    clock = Clock()
    budget = Budget(last_step=10**6, max_minutes=1, seconds_before=45.0, clock=clock)
    assert budget.seconds == 45 and budget.share(0) == 0.75
    clock.now += 500  # building networks before the loop starts is not counted
    budget.start()
    clock.now += 15
    budget.agree(ALONE)
    assert budget.seconds == 60 and budget.is_over(0)


def test_learning_rates_fall_linearly_in_the_last_part():
    assert [learning_rate_factor(share, 0.6) for share in (0, 0.6, 0.8, 1)] == pytest.approx([1, 1, 0.5, 0])
    assert learning_rate_factor(1.0, 1.0) == 1

    optimizer = torch.optim.Adam(nn.Linear(1, 1).parameters(), lr=0.123)
    set_learning_rates({"generator": optimizer}, {"generator": 0.2}, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_average_over_a_share_of_the_updates():
    network = nn.Linear(1, 1, bias=False)
    average = EMA(network, decay=0.999, share=0.5)
    nn.init.constant_(network.weight, 0.0)
    average.update(network)  # n = 0: decay 0
    nn.init.constant_(network.weight, 1.0)
    average.num_updates = 4
    average.update(network)  # n = 4: decay min(5 / 14, 4 · 0.5 / (1 + 4 · 0.5)) = 5 / 14
    assert average.module.weight.item() == pytest.approx(1 - 5 / 14)
    average.num_updates = 40
    average.module.weight.zero_()
    average.update(network)  # n = 40: decay min(41 / 50, 20 / 21) = 41 / 50; without a share the same
    assert average.module.weight.item() == pytest.approx(9 / 50)
    average.num_updates = 10_000
    average.share = 0.01
    average.module.weight.zero_()
    average.update(network)  # decay min(0.999, 100 / 101) = 100 / 101: the last hundredth of the updates
    assert average.module.weight.item() == pytest.approx(1 / 101)


def test_the_average_has_the_generators_batch_statistics():
    network = nn.BatchNorm1d(1)
    average = EMA(network, decay=0.9)
    network.running_mean.fill_(3.0)
    network.num_batches_tracked.fill_(7)
    average.update(network)
    assert average.module.running_mean.item() == 3.0 and average.module.num_batches_tracked.item() == 7
    network.running_mean.fill_(4.0)
    assert average.module.running_mean.item() == 3.0  # a copy, not the same tensor
