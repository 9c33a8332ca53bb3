"""Checkpoints that are not what they should be: every reader of them ends in one line."""

import numpy as np
import pytest
import torch

from miscc.checkpoint import load_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, UserError
from sampling.convert import describe
from sampling.pipeline import TextToImage
from training.run_dir import RunDir
from training.trainer import Trainer

CPU = World(0, 1, torch.device("cpu"))


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 600, error.value
    return str(error.value)


ODD = (None, "x", -1, 10**9, 0.5, [], {}, {1: 2}, [1], torch.zeros(2), torch.tensor(float("nan")),
       torch.zeros(1).expand(10**6, 10**6))  # fmt: skip


def places(tree, depth=4, path=()):
    """The path of every value in nested dicts, the first and last two of each."""
    names = list(tree) if isinstance(tree, dict) else []
    for name in dict.fromkeys([*names[:2], *names[-2:]] if len(names) > 12 else names):
        yield (*path, name)
        if depth > 1:
            yield from places(tree[name], depth - 1, (*path, name))


def replaced(tree, path, value):
    """A copy of a tree with another value at a path; `places` itself as the value: without it."""
    copy = dict(tree)
    if len(path) > 1:
        copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    elif value is places:
        del copy[path[0]]
    else:
        copy[path[0]] = value
    return copy


def odd_checkpoints(whole, rng):
    """(place, value) of everything but the settings, each left out and replaced once; and of some settings."""
    everywhere = [place for place in places(whole) if place[0] != "config"]
    everywhere += [("config",), ("config", "TRAIN"), ("config", "TRAIN", "EVAL_EVERY"), ("config", "SEED")]
    return [(place, value) for place in everywhere for value in (places, ODD[rng.integers(len(ODD))])]


def tracebacks_of(cases, whole, run, cfg, path):
    """Those cases in which `--resume`, NET_G, drawing or `models.released` end in no UserError; and how many do."""
    from training.build import networks_from_files
    from training.settings import StartSettings

    start = StartSettings(**(vars(StartSettings()) | {"generator_file": str(path), "dataset": "folder"}))
    fresh = Trainer(cfg, CPU).networks
    odd, found, refused = RunDir(run.path), [], 0
    odd.last = path
    uses = {
        "resume": lambda: Trainer(cfg, CPU, odd.load()),
        "NET_G": lambda: networks_from_files(
            start, {part: fresh[part] for part in ("generator", "discriminator")}, "ssa_gan"
        ),
        "drawing": lambda: TextToImage.load(path, "cpu"),
        "released": lambda: describe(path),
    }
    for place, value in cases:
        torch.save(replaced(whole, place, value), path)
        for name, use in uses.items():
            try:
                use()
            except UserError as error:
                refused += 1
                if "\n" in str(error) or len(str(error)) > 700:
                    found.append((name, place, value, error))
            except Exception as error:
                found.append((name, place, value, repr(error)))
    return found, refused


def test_malformed_checkpoints_are_refused_in_one_line(run, tiny, tmp_path):
    """Each 21st case, by turns one with a value left out and one with another value; all of them by `-m slow`."""
    whole = load_checkpoint(run.last)
    cases = odd_checkpoints(whole, np.random.default_rng(11))[::21]
    assert 0 < sum(value is places for _, value in cases) < len(cases)
    found, refused = tracebacks_of(cases, whole, run, tiny(), tmp_path / "odd.pth")
    assert not found and refused > len(cases)


@pytest.mark.slow
def test_every_malformed_checkpoint_is_refused_in_one_line(run, tiny, tmp_path):
    whole = load_checkpoint(run.last)
    for seed in (11, 12):
        cases = odd_checkpoints(whole, np.random.default_rng(seed))
        found, refused = tracebacks_of(cases, whole, run, tiny(), tmp_path / "odd.pth")
        assert not found and refused > len(cases)


@pytest.mark.parametrize(
    "place", [("TRAIN", "BATCH_SIZE"), ("TREE", "BASE_SIZE"), ("DATA_DIR",), ("NEW", "DEEP", "KEY")]
)
def test_a_tensor_among_the_stored_settings_is_refused(run, tiny, tmp_path, place):
    """The fuzzer's seed 8: comparing it with a number was a traceback."""
    whole = load_checkpoint(run.last)
    whole["config"]["NEW"] = {"DEEP": {"KEY": 1}}
    cases = [(("config", *place), torch.zeros(2))]
    found, refused = tracebacks_of(cases, whole, run, tiny(), tmp_path / "odd.pth")
    assert not found and refused == 4
    with pytest.raises(CheckpointError, match="its config holds a Tensor among the settings"):
        TextToImage.load(tmp_path / "odd.pth", "cpu")


def test_an_empty_optimizer_state_is_refused(run, tiny):
    checkpoint = run.load()
    for part, value in (("state", {}), ("param_groups", [])):
        odd = replaced(checkpoint, ("optimizers", "generator", part), value)
        with pytest.raises(CheckpointError, match="optimizer 'generator' is missing, empty or another's"):
            Trainer(tiny(), CPU, odd)


def test_odd_weight_files_end_in_one_line(tmp_path):
    """`python -m models.released`, the tool that is meant for odd files."""
    from models.released_formats import FORMATS

    rng, path, refused = np.random.default_rng(3), tmp_path / "odd.pth", 0
    shapes = [(), (0,), (3,), (4, 3), (256, 100), (4, 3, 3, 3), (10**4, 1, 1, 1)]
    for form in FORMATS:
        for _ in range(12):
            state = {name: torch.zeros(shapes[rng.integers(len(shapes))]) for name in form.signature}
            state |= {
                f"block{n}.{name}": torch.zeros(2) for n in range(rng.integers(3)) for name in ("a", "conv_r.0.weight")
            }
            if rng.random() < 0.2:
                state[int(rng.integers(9))] = torch.zeros(1)
            torch.save(state, path)
            with pytest.raises(CheckpointError) as error:
                describe(path)
            one_line(error)
            refused += 1
    for content in (
        {},
        [],
        3,
        None,
        {"netG": 3},
        {"state_dict": {"a": None}},
        {"networks": 3},
        {"networks": {"generator": 1}},
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError) as error:
            describe(path)
        one_line(error)
    assert refused
