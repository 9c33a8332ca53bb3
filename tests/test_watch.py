"""What the watch finds, from both sides of every threshold, in numbers worked out by hand."""

import dataclasses

import pytest

from miscc.errors import CheckpointError, ConfigError
from training.settings import load_config
from training.watch import FEWEST_LOOKS, NUM_LOOKS, REPEAT, Margin, Reading, Watch, WatchSettings

AT_ONCE = WatchSettings(patience=1)


def kinds(watch, *readings):
    """The kinds of the findings after each reading."""
    return [[finding.kind for finding in watch.update(reading)] for reading in readings]


def margin_of(gap, accuracy=1.0):
    return Reading(margins={"discriminator": Margin(gap, accuracy)})


def varieties(*values):
    return [Reading(variety=value) for value in values]


def test_a_discriminator_wins_outright_above_the_gap_and_from_the_accuracy_on():
    assert kinds(Watch(AT_ONCE), margin_of(10.0), margin_of(10.01)) == [[], ["discriminator"]]
    assert kinds(Watch(AT_ONCE), margin_of(50.0, 0.979), margin_of(50.0, 0.98)) == [[], ["discriminator"]]
    # Without signs in the log, as AttnGAN's, the gap alone decides; logits the wrong way round are no victory.
    assert kinds(Watch(AT_ONCE), margin_of(9.9, None), margin_of(10.1, None), margin_of(-50.0)) == [
        [],
        ["discriminator"],
        [],
    ]
    assert kinds(Watch(AT_ONCE), margin_of(float("nan"))) == [[]]


def test_each_discriminator_is_watched_and_named():
    reading = Reading(margins={"discriminator": Margin(1.0, 0.9), "projected": Margin(12.5, 1.0)})
    (finding,) = Watch(AT_ONCE).update(reading)
    assert finding.text.startswith("D wins outright (projected): its logits of real and fake images lie 12.5 apart")
    assert "LOGIT_GAP 10" in finding.text and "100.0 %" in finding.text


def test_a_penalty_explodes_above_its_threshold():
    assert kinds(Watch(AT_ONCE), Reading(penalty=100.0), Reading(penalty=100.1), Reading()) == [[], ["penalty"], []]


def test_variety_collapses_below_a_share_of_the_median_of_the_run():
    # The median of 0.1, 0.2, 0.4, 0.4, 0.5 is 0.4, a quarter of it 0.1.
    usual = varieties(0.1, 0.2, 0.4, 0.4, 0.5)
    assert kinds(Watch(AT_ONCE), *usual, *varieties(0.101)) == [[]] * 6
    assert kinds(Watch(AT_ONCE), *usual, *varieties(0.099)) == [[]] * 5 + [["variety"]]
    # Before there are five looks nothing is usual.
    assert kinds(Watch(AT_ONCE), *usual[1:], *varieties(0.001)) == [[]] * 5


def test_variety_collapses_below_the_floor_if_it_ever_was_above():
    by_floor = dataclasses.replace(AT_ONCE, variety=0.0)
    assert kinds(Watch(by_floor), *varieties(*[0.02] * 5, 0.0101, 0.0099)) == [[]] * 6 + [["variety"]]
    assert kinds(Watch(by_floor), *varieties(*[0.009] * 9)) == [[]] * 9  # as it was drawn at first


def test_a_collapsed_generator_does_not_become_the_usual_one():
    watch = Watch(AT_ONCE)
    found = kinds(watch, *varieties(*[0.4] * FEWEST_LOOKS, *[0.05] * (2 * NUM_LOOKS)))
    assert watch.varieties == [0.4] * FEWEST_LOOKS and found[-REPEAT:].count(["variety"]) == 1
    # What declines slowly is followed, and no more is kept than needed.
    watch = Watch(AT_ONCE)
    assert not any(kinds(watch, *varieties(*(0.4 * 0.99**n for n in range(300))))) and len(watch.varieties) == NUM_LOOKS


def test_one_odd_look_warns_nobody_and_a_lasting_finding_is_repeated_from_time_to_time():
    watch = Watch(WatchSettings(patience=3))
    bad, good = Reading(penalty=1e6), Reading(penalty=1.0)
    assert kinds(watch, bad, bad, good, bad, bad) == [[]] * 5
    assert watch.suspects and watch.streaks == {"penalty": 2}
    found = kinds(watch, *[bad] * (2 * REPEAT + 1))
    assert [number for number, one in enumerate(found) if one] == [0, REPEAT, 2 * REPEAT]
    assert kinds(watch, good) == [[]] and not watch.suspects


def test_the_state_goes_on_where_it_was_written():
    readings = [Reading({"projected": Margin(11.0)}, 5.0, 0.4 + n / 100) for n in range(6)]
    whole, first, second = (Watch(WatchSettings(patience=5)) for _ in range(3))
    expected = kinds(whole, *readings)
    begun = kinds(first, *readings[:3])
    second.restore(first.state())
    assert begun + kinds(second, *readings[3:]) == expected == [[]] * 4 + [["discriminator"], []]
    assert second.state() == whole.state()
    second.restore({})
    assert second.state() == {"streaks": {}, "varieties": []}


@pytest.mark.parametrize(
    "state",
    [
        {"streaks": 3}, {"streaks": {"penalty": "x"}}, {"streaks": {"penalty": float("nan")}}, {"varieties": {}},
        {"varieties": [None]}, {"varieties": [float("nan")]}, {"streaks": None},
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_in_one_line(state):
    with pytest.raises(CheckpointError, match="watch is damaged .*; use another checkpoint"):
        Watch(AT_ONCE).restore(state)


@pytest.mark.parametrize(
    "key, value",
    [
        ("TRAIN.ON_COLLAPSE", "explode"), ("TRAIN.WATCH.EVERY", "-1"), ("TRAIN.WATCH.PATIENCE", "0"),
        ("TRAIN.WATCH.LOGIT_GAP", "0"), ("TRAIN.WATCH.ACCURACY", "1.1"), ("TRAIN.WATCH.VARIETY", "1"),
        ("TRAIN.WATCH.VARIETY_FLOOR", "3"), ("TRAIN.WATCH.PENALTY", "nan"), ("TRAIN.WATCH.ROLLBACKS", "99"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_with_its_key(tiny_yaml, key, value):
    with pytest.raises(ConfigError, match=key) as error:
        load_config(tiny_yaml, [(key, value)])
    assert "\n" not in str(error.value)
