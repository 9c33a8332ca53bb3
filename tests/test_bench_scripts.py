"""The benchmarks measure what they say: counts and tables; how fast something is depends on the machine and is no test."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import common, data, gpu_table, losses, onnx, sample, systems, train_step
from miscc.errors import ConfigError

CPU = torch.device("cpu")


def test_operations_are_counted_through_a_double_backward():
    a, b = torch.randn(4, 5, requires_grad=True), torch.randn(5, 6)

    def run():
        (gradient,) = torch.autograd.grad((a @ b).square().sum(), a, create_graph=True)
        gradient.sum().backward()

    # Products of 2·4·5·6 operations: forward, its gradient by a, and two more by the gradient's own.
    assert common.count_flops(run) == 4 * 2 * 4 * 5 * 6
    assert common.count_flops(lambda: a + 1) == 0


def test_ratios_and_spread():
    found = common.ratio([4.0, 2.0, 6.0], [1.0, 2.0, 2.0])
    assert found == {"of_medians": 2.0, "of_fastest": 2.0, "by_round": 3.0}
    assert common.summary([1.0, 2.0, 3.0]) == {"median": 2.0, "fastest": 1.0, "spread": 1.0}


def test_ways_take_turns():
    order = []
    seconds = common.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warm_up=1)
    assert order == list("ababab") and [len(runs) for runs in seconds.values()] == [2, 2]
    common.take_turns({"a": lambda: order.append("a")}, 2, 0, prepare=lambda name: order.append(f"for {name}"))
    assert order[6:] == ["for a", "a"] * 2


def test_memory_is_what_a_call_needs_beyond_what_was_held():
    held = torch.ones(2**20)
    found = common.peak_bytes(lambda: torch.ones(2**24).sum(), CPU)
    if found is None:
        pytest.skip("this system does not say")
    assert 0.8 * 2**26 < found < 1.5 * 2**26 and held.sum() == 2**20


@pytest.mark.parametrize("bench", [data, losses, onnx, sample, systems, train_step], ids=lambda module: module.__name__)
def test_the_batch_size_has_one_name_and_its_former_one(bench, monkeypatch):
    class ParsedError(Exception):
        pass

    def parse(parser, words):
        parser.allow_abbrev = False
        raise ParsedError(parser.parse_known_args(words)[0].batch)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    needed = ["--checkpoint", "x", "--onnx", "x"] if bench is onnx else []
    for spelling in ("--batch-size", "--batch"):
        with pytest.raises(ParsedError, match="^7$"):
            bench.main([*needed, spelling, "7"])


@pytest.mark.parametrize("extra", [["--reference"], ["--system", "df_gan"], ["--set", "TRAIN.PRECISION", "bf16"]])
def test_a_step_is_measured_phase_by_phase(tmp_path, capsys, extra):
    tiny = "--gpu -1 --image-size 16 --nf 2 --batch-size 3 --rounds 1 --warm-up 1".split()
    train_step.main([*tiny, "--json", str(tmp_path / "step-tf32.json"), *extra])
    found = json.loads((tmp_path / "step-tf32.json").read_text())
    ours = found["steps"]["ours"]
    assert ours["flops"] > 0 and set(found["peak_flops"]) == {"float32"}
    wanted = {"G forward", "D forward", "D backward", "optimizers, average", "D for G forward", "G backward"}
    assert wanted <= ours["phases"].keys()
    assert "**whole step**" in capsys.readouterr().out
    if extra == ["--reference"]:
        assert {"penalty forward", "penalty backward", "DAMSM forward"} <= ours["phases"].keys()
        plain = found["steps"]["reference"]
        assert plain["phases"].keys() == ours["phases"].keys() and plain["flops"] > 0
        gpu_table.main([str(tmp_path)])
        table = capsys.readouterr().out
        assert "| tf32 |" in table and "| plain, tf32 |" in table and "not measured: step-fp32" in table


def test_projected_hours():
    assert gpu_table.hours(1000.0) == pytest.approx(600 * 8855 / 1000 / 3600)


def test_losses_are_compared_in_value_and_gradient():
    for ways in (losses.hinge_ways(4, CPU), losses.penalty_ways(2, 16, 2, CPU)):
        found = losses.compare(ways, 2, CPU)
        assert found["difference"]["value"] < 1e-4 and found["difference"]["gradient"] < 2e-2
    apart = losses.compare({"ours": lambda: [torch.ones(1)] * 2, "plain": lambda: [2 * torch.ones(1)] * 2}, 1, CPU)
    assert apart["difference"] == {"value": 0.5, "gradient": 0.5}


def test_what_workers_read_in_advance_does_not_count(monkeypatch, tmp_path):
    taken, open_paths = {"plain": 0, "ours": 0}, []

    def path(name):
        open_paths.append(name)
        assert open_paths == [name]  # the one before has been stopped
        try:
            while True:
                taken[name] += 1
                yield taken[name]
        finally:
            open_paths.remove(name)

    monkeypatch.setattr(data, "paths_of", lambda *_: ({name: lambda name=name: path(name) for name in taken}, 5))
    timed = []
    monkeypatch.setattr(
        common, "seconds_of", lambda run, device: timed.append((sum(taken.values()), run(), sum(taken.values()))) or 1.0
    )
    found = data.measure(SimpleNamespace(batch=2, rounds=1, workers=3), tmp_path)
    assert [after - before for before, _, after in timed] == [5] * 4 and not open_paths
    assert set(taken.values()) == {2 * (1 + 2 * 3 + 5)}  # a round to warm up, and one that counts
    assert found["plain"]["images_per_second"] == 10 and found["ours"]["ratio"]["of_medians"] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_every_data_path_hands_over_every_image(tmp_path, workers):
    options = SimpleNamespace(images=4, image_size=32, batch=2, rounds=1, workers=workers)
    found = data.measure(options, tmp_path)
    assert set(found) == {"plain", "ours", "ours, floats by the loader", "ours with the cache",
                          "ours with the cache, floats by the loader"}  # fmt: skip
    plain = data.PlainDataset(data.write_photographs(tmp_path, 1), 32)[0]
    assert plain[0].shape == (3, 32, 32) and -1 <= plain[0].min() and plain[0].max() <= 1


def test_sampling_is_measured_where_it_writes(tmp_path, capsys, monkeypatch):
    folder, figures = tmp_path / "disk", tmp_path / "sample.json"
    folder.mkdir()
    original, places = sample.sample, []
    monkeypatch.setattr(
        sample, "sample", lambda *given, **named: places.append(Path(given[2]).parent) or original(*given, **named)
    )
    size = "--gpu -1 --image-size 16 --nf 2 --images 6 --batch-size 4 --rounds 2".split()
    sample.main([*size, "--folder", str(folder), "--json", str(figures)])
    found = json.loads(figures.read_text())
    assert found["ways"]["generator alone"]["of_the_generators"] == 1.0 and len(found["ways"]) == 3
    assert all(row["images_per_second"] > 0 for row in found["ways"].values())
    assert found["seconds"].keys() == {"encoding", "writing"} and min(found["seconds"].values()) > 0
    assert places == [folder] * 3  # once to warm up
    assert str(folder) in capsys.readouterr().out and not list(folder.iterdir())
    for wrong in (["--folder", str(tmp_path / "none")], ["--image-size", "48"]):
        with pytest.raises(ConfigError, match=f"{wrong[0]}: "):
            sample.main([*size, *wrong])
