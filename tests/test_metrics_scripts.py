"""The scores as a user calls them: from a shell, from any folder, with JSON, and with something wrong."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from metrics_help import write_pictures

from eval.features.statistics import Statistics, save_statistics
from eval.FID import main as fid_main
from miscc.errors import run_command

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ["--network", "efficientnet-lite0", "--device", "cpu"]


def shell(command, folder):
    environment = {**os.environ, "TORCH_HOME": str(folder / "hub"), "XDG_CACHE_HOME": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_fid_as_a_script_from_another_folder_prints_json_and_keeps_the_real_statistics(tmp_path):
    write_pictures(tmp_path / "real", 5)
    write_pictures(tmp_path / "fake", 4, tone=60)
    done = shell([ROOT / "eval" / "FID.py", "real", "fake", *OFFLINE, "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    (score,) = json.loads(done.stdout)["scores"]
    assert score["name"] == "FD[efficientnet-lite0]" and score["value"] > 1
    assert score["protocol"]["num_real"] == 5 and score["protocol"]["weights_hash"] == "b60c494fe6705d1d"
    assert "FD[efficientnet-lite0] " in done.stderr and "the covariance is singular" in done.stderr
    assert len(list((tmp_path / "cache" / "text-to-image-gans" / "statistics").glob("*.npz"))) == 1


def test_inception_score_as_a_module_without_weights_is_one_line_and_no_traceback(tmp_path):
    write_pictures(tmp_path / "set", 3)
    done = subprocess.run(
        [sys.executable, "-m", "eval.IS", str(tmp_path / "set")],
        **{"cwd": ROOT, "env": {**os.environ, "TORCH_HOME": str(tmp_path)}, "capture_output": True, "text": True},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: inception-tf: its weights are not on this machine .*\n", done.stderr)


def run(monkeypatch, capsys, main, *arguments) -> tuple[int, str, str]:
    """Call a script's main in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_options_of_fid(tmp_path, monkeypatch, capsys):
    real, fake = write_pictures(tmp_path / "real", 6), write_pictures(tmp_path / "fake", 6, tone=60)
    (fake / "002.png").write_bytes(b"broken")
    common = [real, fake, *OFFLINE, "--no-cache"]
    code, out, err = run(monkeypatch, capsys, fid_main, *common)
    assert code == 2 and out == "" and re.search(r"error: .*002\.png: cannot be read as an image", err)
    code, out, err = run(monkeypatch, capsys, fid_main, *common, "--skip-broken", "--json", tmp_path / "out.json")
    assert code == 0 and re.fullmatch(r"FD\[efficientnet-lite0\] [\d.]+  \[6 real, 5 generated, resize clean\]\n", out)
    assert "1 broken images were left out, e.g. 002.png" in err
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["scores"][0]["protocol"]["skipped_fake"] == 1 and "torch" in written["versions"]
    statistics = tmp_path / "real.npz"
    code, out, _ = run(monkeypatch, capsys, fid_main, *common, "--skip-broken", "--save-statistics", statistics)
    code, again, _ = run(monkeypatch, capsys, fid_main, statistics, fake, *OFFLINE, "--no-cache", "--skip-broken")
    assert code == 0 and again == out
    code, _, err = run(monkeypatch, capsys, fid_main, statistics, fake, *OFFLINE, "--no-cache", "--resize", "bilinear")
    assert code == 2 and "was made with resize clean, not bilinear" in err
    code, _, err = run(monkeypatch, capsys, fid_main, *common, "--device", "cuda:77")
    assert code == 2 and err.startswith("error: --gpu (--device) cuda:77: cannot be used here")


def test_two_files_of_statistics_need_no_network(tmp_path, monkeypatch, capsys):
    """By hand: (3 - 0)² + 0, and one variance of 4 against one of 1: 4 + 1 - 2 · 2."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    np.savez(tmp_path / "real.npz", mu=np.zeros(2), sigma=np.diag([1.0, 1.0]))
    np.savez(tmp_path / "fake.npz", mu=np.array([3.0, 0.0]), sigma=np.diag([4.0, 1.0]))
    code, out, err = run(monkeypatch, capsys, fid_main, tmp_path / "real.npz", tmp_path / "fake.npz", "--device", "cpu")
    assert code == 0 and out == "FD[unknown network] 10\n"
    assert err.count("does not say with which network") == 2

    # What made them is known, and must be the same.
    made_by = {"network": "inception-tf", "weights_hash": "0123456789", "published_weights": True, "resize": "tf1"}
    for name, resize in (("real", "tf1"), ("fake", "tf1"), ("other", "clean")):
        found = Statistics(np.zeros(2), np.eye(2), 5000, made_by | {"resize": resize})
        save_statistics(tmp_path / f"{name}.npz", found)
    code, out, err = run(monkeypatch, capsys, fid_main, tmp_path / "real.npz", tmp_path / "fake.npz")
    assert code == 0 and re.fullmatch(r"FID\[inception-tf\] [-\d.e]+  \[5000 real, 5000 generated, resize tf1\]\n", out)
    assert err == ""
    code, _, err = run(monkeypatch, capsys, fid_main, tmp_path / "real.npz", tmp_path / "other.npz")
    assert code == 2 and "was made with resize tf1" in err and "with clean: they do not compare" in err

    # A file that says less.
    for made_by, name in (
        ({"resize": "tf1"}, "unknown network"),
        ({"network": "inception-tf"}, "inception-tf:unknown"),
    ):
        save_statistics(tmp_path / "less.npz", Statistics(np.zeros(2), np.eye(2), 5000, made_by))
        code, out, _ = run(monkeypatch, capsys, fid_main, tmp_path / "less.npz", tmp_path / "less.npz")
        assert code == 0 and out.startswith(f"FD[{name}] ")


def test_without_inceptions_weights_the_error_names_the_network_that_works_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = write_pictures(tmp_path / "set", 3)
    code, out, err = run(monkeypatch, capsys, fid_main, folder, folder, "--device", "cpu")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "--weights PATH" in err and err.rstrip().endswith("--network efficientnet-lite0")


@pytest.mark.parametrize("package", ["lpips", "torch_fidelity", "efficientnet_lite_pytorch"])
def test_no_package_of_ours_needs_hugging_face_datasets(package):
    """Our folder of that name would hide it."""
    folder = Path(importlib.import_module(package).__file__).parent
    for file in folder.rglob("*.py"):
        assert not re.search(r"^\s*(import|from) datasets\b", file.read_text(encoding="utf-8"), re.MULTILINE), file
