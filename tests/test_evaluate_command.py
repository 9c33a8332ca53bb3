"""The command of an evaluation: its record, what it refuses, the file that it scores, several processes."""

import json
from dataclasses import replace

import pytest
import torch
from evaluate_help import QUICK, add_quick_protocol, one_step_checkpoint
from test_distributed import torchrun

from datasets import load_records
from eval.evaluate import (
    _world,
    arguments,
    evaluate,
    load_everywhere,
    load_with_hash,
    main,
    self_check,
)
from miscc import distributed
from miscc.checkpoint import load_checkpoint, save_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, DataError, TrainingError
from miscc.files import hash_of_file
from sampling.pipeline import TextToImage
from sampling.publish import read_evaluations


@pytest.fixture(autouse=True)
def quick_protocol(monkeypatch):
    add_quick_protocol(monkeypatch)


@pytest.fixture
def records(drawn_folder):
    return load_records("folder", drawn_folder, "test")[0]


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return one_step_checkpoint(tiny, tmp_path)


def values(record):
    return {score["name"]: score["value"] for score in record["scores"]}


def test_the_command_adds_a_record_beside_the_checkpoint(checkpoint, capsys, tmp_path, drawn_folder):
    words = [
        "--checkpoint",
        str(checkpoint),
        "--protocol",
        "quick",
        "--device",
        "cpu",
        "--cache-dir",
        str(tmp_path / "c"),
    ]
    main(words)
    main([*words, "--num-images", "10", "--data-dir", str(drawn_folder)])
    main([*words, "--selfcheck"])
    found = read_evaluations(checkpoint.with_name("evaluation.json"))
    assert [record["image_source"] for record in found] == [
        "generated",
        "generated",
        "real train",
        "the same real images",
    ]
    first, second = found[:2]
    assert first["protocol"] == json.loads(json.dumps(QUICK.__dict__)) and first["overrides"] == {}
    assert second["overrides"] == {"num_images": 10} and second["real"]["from_cache"]
    assert len(first["checkpoint"]["sha256"]) == 64 and first["checkpoint"]["step"] == 1
    assert first["generator"]["averaged"] is True and first["generator"]["image_size"] == 16
    assert {"torch", "torchvision"} <= set(first["versions"]) and first["date"] and "cpu" in first["device"]
    assert "git_commit" in first and first["real"]["data_dir"] == str(drawn_folder)
    printed = capsys.readouterr().out
    assert "12 the same real images by protocol quick, no generator" in printed
    assert "by protocol quick\n" in printed and "NOT its own numbers: num_images 10" in printed
    assert printed.count("against 12 of folder's test set, middle crop") == 4
    assert "not computed: diversity" in printed and "FD[tiny" in printed and "written to" in printed


def test_a_file_that_is_no_list_of_results_is_left_alone(checkpoint):
    results = checkpoint.with_name("evaluation.json")
    for content in ("{}", "half a fi"):
        results.write_text(content)
        with pytest.raises(DataError, match="move it away"):
            main(["--checkpoint", str(checkpoint), "--protocol", "quick", "--device", "cpu", "--no-cache"])
        assert results.read_text() == content


def test_a_protocol_for_other_data_warns(checkpoint, records):
    pipeline = TextToImage.load(checkpoint, "cpu", averaged=False)
    record = evaluate(pipeline, replace(QUICK, dataset="birds", metrics=("FID",)), records)
    assert "meant for birds, this generator was trained on folder" in record["warnings"][0]
    assert "no moving average" in record["warnings"][1]


def test_as_many_images_as_the_protocol_draws_are_no_override(checkpoint, drawn_folder, records):
    pipeline, protocol = TextToImage.load(checkpoint, "cpu"), replace(QUICK, metrics=("FID",), num_real=10)

    def overrides(protocol, number):
        return evaluate(pipeline, protocol, records, num_images=number)["overrides"]

    assert overrides(protocol, 24) == {} and overrides(protocol, 23) == {"num_images": 23}
    first = replace(protocol, num_images=None, caption_choice="first", captions_per_image=1)  # 12 images
    assert overrides(first, 500) == overrides(first, 12) == {} and overrides(first, 11) == {"num_images": 11}
    few = replace(protocol, num_images=6)  # but of 10 real images `--num-images 6` takes 6
    assert overrides(few, 6) == {"num_images": 6} and overrides(few, None) == {}

    train_records = load_records("folder", drawn_folder, "train")[0]
    for number, expected in ((24, {}), (11, {"num_images": 11}), (25, {"num_images": 25})):
        found = self_check(protocol, train_records, records, 16, torch.device("cpu"), num_images=number)
        assert [record["overrides"] for record in found] == [expected] * 2


def test_the_hash_is_of_the_file_that_was_loaded(checkpoint, monkeypatch):
    """A training replaces the checkpoint while it is read; then it is read again."""
    load, loaded = TextToImage.load, []

    def replaced_meanwhile(*arguments, **options):
        loaded.append(load(*arguments, **options))
        if len(loaded) == 1:
            save_checkpoint(checkpoint, load_checkpoint(checkpoint) | {"step": 7})
        return loaded[-1]

    monkeypatch.setattr(TextToImage, "load", replaced_meanwhile)
    pipeline, sha256 = load_with_hash(checkpoint, torch.device("cpu"), averaged=True)
    assert [one.origin["step"] for one in loaded] == [1, 7] and pipeline is loaded[-1]
    assert sha256 == hash_of_file(checkpoint)
    with pytest.raises(CheckpointError, match="none.pth: no such"):
        load_with_hash(checkpoint.with_name("none.pth"), torch.device("cpu"), averaged=True)


def test_all_processes_score_the_same_checkpoint(monkeypatch):
    """A training has replaced the file after this process's first reading and before the main process's."""
    found = iter([("former", "a"), ("latter", "b")])
    monkeypatch.setattr("eval.evaluate.load_with_hash", lambda *_: next(found))
    monkeypatch.setattr("eval.evaluate.distributed.share", lambda value, world: "b")
    monkeypatch.setattr("eval.evaluate.distributed.any_process", lambda flag, world: flag)
    assert load_everywhere("last.pth", World(1, 2, torch.device("cpu")), averaged=True) == ("latter", "b")


def test_encoders_of_the_training_that_are_damaged_cost_r_precision_alone(checkpoint, encoders, tmp_path):
    damaged = tmp_path / "encoders.pth"
    damaged.write_bytes(encoders.read_bytes()[:1000])
    content = load_checkpoint(checkpoint)
    content["config"]["TEXT"]["DAMSM_NAME"] = str(damaged)
    save_checkpoint(checkpoint, content)
    words = ["--checkpoint", str(checkpoint), "--protocol", "quick", "--device", "cpu", "--no-cache"]
    main(words)
    (record,) = read_evaluations(checkpoint.with_name("evaluation.json"))
    assert str(damaged) in record["not_computed"]["R_precision"] and len(record["scores"]) == 5
    with pytest.raises(CheckpointError, match=str(damaged)):
        main([*words, "--encoders", str(damaged)])


def test_several_processes_compute_as_one_does(monkeypatch):
    def start(gpu):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        return World(0, 2, torch.device("cpu"))

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    monkeypatch.setattr(distributed, "launched", lambda: True)
    monkeypatch.setattr(distributed, "start", start)
    try:
        assert _world(arguments().parse_args(["--checkpoint", "x", "--protocol", "quick"])).size == 2
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("highest", False)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize("lost_in", ["load_everywhere", "evaluate"])
def test_a_lost_process_is_one_line_with_a_remedy_of_this_command(checkpoint, monkeypatch, lost_in):
    def lose(*arguments, **options):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    monkeypatch.setattr(
        "eval.evaluate.load_everywhere", lambda path, world, _: load_with_hash(path, world.device, True)
    )
    monkeypatch.setattr(f"eval.evaluate.{lost_in}", lose)
    monkeypatch.setattr("eval.evaluate._world", lambda args: World(0, 2, torch.device("cpu")))
    with pytest.raises(TrainingError, match="another process has ended, .*; start the evaluation again$"):
        main(["--checkpoint", str(checkpoint), "--protocol", "quick"])


SHARED = """
import sys, json, dataclasses
sys.path[:0] = ["tests"]
from eval import evaluate
from eval.features import networks
from eval.protocol import protocols
from metrics_help import tiny_network
networks.NETWORKS["tiny"] = lambda weights, resize, seed: tiny_network(resize, seed)
protocols.PROTOCOLS["quick"] = protocols.Protocol(**json.loads(sys.argv.pop(1)))
evaluate.main()
"""


def test_two_processes_give_the_numbers_of_one(checkpoint, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    words = ["--checkpoint", checkpoint, "--protocol", "quick", "--device", "cpu", "--no-cache"]
    torchrun(tmp_path / "shared.py", json.dumps(QUICK.__dict__), *words)
    main([str(word) for word in words])
    two, one = read_evaluations(checkpoint.with_name("evaluation.json"))
    assert (two["num_processes"], one["num_processes"]) == (2, 1)
    assert len(values(one)) == 6 and values(two) == pytest.approx(values(one), rel=1e-5, abs=1e-9)
