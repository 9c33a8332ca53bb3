"""The commands as a user types them, in their own process: what they print, write and refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd=ROOT, code=0, script="main.py"):
    """Run a script and return what it printed; a traceback is never right."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def trained(drawn_folder, encoders, tmp_path_factory):
    """A settings file whose run is finished."""
    from conftest import GAN_YAML

    folder = tmp_path_factory.mktemp("cli")
    path = folder / "tiny.yml"
    path.write_text(GAN_YAML.format(data=drawn_folder, output=folder / "output", encoders=encoders))
    run("--cfg", path, "--gpu", "-1", "--set", "TRAIN.MAX_EPOCH", "1")
    return path


def test_train_resume_and_continue(trained):
    output = run("--cfg", trained, "--gpu", "-1", "--resume")
    assert "step 5 of 10" in output and "finished at step 10" in output
    assert "finished at step 10" in run("--cfg", trained, "--gpu", "-1", "--continue")
    assert [path.name for path in (trained.parent / "output").iterdir()] == ["00000-tiny-ssa_gan"]


def test_validation_samples_the_test_captions(trained, tmp_path):
    options = ("--cfg", trained, "--gpu", "-1", "--set", "B_VALIDATION", "True", "--out", tmp_path / "s")
    last = run(*options, "--per-caption", "2", "--masks").strip().splitlines()[-1]
    assert last == str(tmp_path / "s" / "samples.png") and Path(last).is_file()
    assert len((tmp_path / "s" / "captions.jsonl").read_text().splitlines()) == 24
    assert "holds samples already" in run(*options, code=2)
    assert "5 images in" in run(*options, "--num-images", "5", "--overwrite")


def test_a_caption_becomes_a_picture(trained, tmp_path):
    (tmp_path / "captions.txt").write_text("a blue bird\n")
    output = run("--cfg", trained, "--gpu", "-1", "--caption", "a small red bird", "--caption", "a bird with xyzzy wings",
                 "--captions", tmp_path / "captions.txt", "--out", tmp_path / "out", "--truncation", "0.8")  # fmt: skip
    assert "left out: xyzzy" in output
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == ["a small red bird", "a bird with xyzzy wings", "a blue bird"]
    assert all((tmp_path / "out" / line["file"]).is_file() for line in lines)
    again = run("--cfg", trained, "--gpu", "-1", "--caption", "a small red bird").strip().splitlines()[-1]
    third = run("--cfg", trained, "--gpu", "-1", "--caption", "a small red bird").strip().splitlines()[-1]
    assert Path(again).is_file() and Path(third).is_file() and again != third  # nothing is overwritten silently
    strip = run("--cfg", trained, "--gpu", "-1", "--interpolate", "a red bird", "a blue bird").strip().splitlines()[-1]
    assert strip.endswith(".png") and Path(strip).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", "cfg/brid.yml"], "error: cfg/brid.yml: no such settings file"),
        (["--set", "TRAIN.BATCH_SIZ", "8"], "did you mean TRAIN.BATCH_SIZE"),
        (["--set", "TRAIN.BATCH_SIZE"], "give pairs of a key and a value"),
        (["--gpu", "99"], "error: --gpu 99"),
        (["--caption", "qqq www"], "none of its words (qqq, www)"),
        (["--captions", "gone.txt"], "gone.txt: no such file of captions"),
        (["--caption", "a bird", "--checkpoint", "gone.pth"], "gone.pth: no such weight file"),
        (["--caption", "a bird", "--checkpoint", "README.md"], "README.md: is no weight file"),
        (
            ["--data_dir", "/nowhere"],
            "/nowhere: does not exist; run `python -m datasets.prepare folder --root /nowhere`",
        ),
        (["--set", "DATASET_NAME", "brids"], "no data set 'brids'; did you mean birds?"),
        (["--caption", "a bird", "--out", "/proc/nowhere"], "/proc/nowhere"),
        (["--caption", "a bird", "--seed", "-1"], "must not be negative"),
        (["--caption", "a bird", "--truncation", "nan"], "must be a number above 0"),
        (["--caption", "a bird", "--real"], "--real writes the real images of a split's captions"),
        (["--each-split", "2", "--split", "train"], "--each-split draws every split"),
        (
            ["--dry-run", "--set", "TRAIN.ACCUMULATE", "5"],
            "of 5 micro-batches (TRAIN.ACCUMULATE); give a multiple of 5",
        ),
        (["--set", "OUTPUT_DIR", "/proc/nowhere"], "/proc/nowhere"),
        (["--set", "TRAIN.NET_G", "gone.pth"], "gone.pth: no such weight file"),
        (["--num-images", "5"], "--num-images: is for drawing"),  # and not a training
        (["--interpolate", "a bird", "a bird", "--masks"], "--interpolate draws one strip"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_mistakes_get_one_line(trained, arguments, message):
    arguments = arguments if "--cfg" in arguments else ["--cfg", trained, *arguments]
    arguments = arguments if "--gpu" in arguments else ["--gpu", "-1", *arguments]
    output = run(*arguments, code=2)
    assert message in output
    assert len([line for line in output.splitlines() if "error: " in line]) == 1


def test_keys_without_effect_are_named_also_from_set(trained):
    output = run("--cfg", trained, "--dry-run", "--set", "GAN.R_NUM", "7", "CONFIG_NAME", "0012")
    assert "GAN.R_NUM has no effect for ssa_gan" in output and "CONFIG_NAME: '0012'" in output


def test_nothing_to_draw_with(trained, tmp_path):
    output = run("--cfg", trained, "--set", "OUTPUT_DIR", tmp_path, "--caption", "a bird", "--gpu", "-1", code=2)
    assert "nothing to draw with: no run of 'tiny-ssa_gan'" in output


def test_dry_run_tells_what_is_missing_and_is_no_error(trained):
    output = run("--cfg", "cfg/bird.yml", "--dry-run", "--data_dir", "/nowhere", "--set", "TEXT.DAMSM_NAME", "gone.pth")
    assert "generator: 29.5 M parameters" in output and "discriminator: 80.4 M parameters" in output
    assert "NF: 64" in output and "steps per epoch: unknown" in output
    assert "DAMSM_WEIGHT:" in output and "R_NUM:" not in output  # SSA-GAN's keys, and none of AttnGAN's
    missing = [line for line in output.splitlines() if line.startswith("not there yet")]
    assert len(missing) == 2 and "no such encoders" in missing[0] and "/nowhere: does not exist" in missing[1]
    output = run("--cfg", trained, "--dry-run", "--set", "TRAIN.NET_G", "gone.pth")
    assert "not there yet: TRAIN.NET_G: gone.pth: no such weight file" in output
    output = run("--cfg", trained, "--dry-run")
    assert "steps per epoch: 5 (40 images), 10 in all" in output and "data and encoders: found" in output


def test_the_memory_estimate_is_of_the_right_size(trained):
    """PERFORMANCE.md has 16.4 GiB and 1.6 GiB of state measured for 256 px, nf 64, batch 24, with Inception's share."""
    output = run("--cfg", "cfg/bird.yml", "--dry-run")
    gibibytes = float(output.split("memory: about ")[1].split(" GiB")[0])
    assert gibibytes == pytest.approx(18.0, rel=0.15)


def test_main_alone_means_birds(tmp_path):
    output = run("--gpu", "-1", "--set", "OUTPUT_DIR", tmp_path, "TEXT.DAMSM_NAME", "gone.pth", code=2)
    assert "gone.pth: no such encoders" in output and not any(tmp_path.iterdir())


def test_encoders_from_the_command_line(drawn_folder, tmp_path):
    from conftest import DAMSM_YAML

    path = tmp_path / "damsm.yml"
    path.write_text(DAMSM_YAML.format(data=drawn_folder, epochs=1))
    options = ("--cfg", path, "--gpu", "-1", "--out", tmp_path / "out")
    assert "R@1" in run(*options, script="pretrain_DAMSM.py")
    assert "holds encoders already" in run(*options, script="pretrain_DAMSM.py", code=2)
    run(*options, "--continue", "--set", "TRAIN.MAX_EPOCH", "2", script="pretrain_DAMSM.py")
    assert (tmp_path / "out" / "attention" / "epoch_0002.png").is_file()
