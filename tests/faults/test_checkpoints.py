"""What a run keeps when its disk, its files or its processes fail. A test bears the name of what was found."""

import json
import os
import resource
import shutil
import signal
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from datasets.loading import training_loader
from miscc.checkpoint import load_checkpoint, load_file, save_checkpoint
from miscc.distributed import World
from miscc.errors import CheckpointError, ConfigError, DamagedError, DataError, TrainingError, UserError, WriteError
from miscc.files import write_text
from miscc.lock import FolderLock
from sampling.pipeline import TextToImage
from sampling.published import load_model
from training.data import make_dataset, read_records
from training.progress import Progress
from training.run_dir import EncoderDir, RunDir, run_name
from training.trainer import Trainer, train

CPU = World(0, 1, torch.device("cpu"))
NAME = "00000-tiny-ssa_gan"


@contextmanager
def files_of_at_most(size):
    """Inside, no file can grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 600, error.value
    return str(error.value)


# -- the disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_while_a_checkpoint_is_written_keeps_the_old_one(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"networks": {}, "step": 1})
    before = path.read_bytes()
    with (
        files_of_at_most(100_000),
        pytest.raises(WriteError, match="last.pth: cannot be written .*File too large") as e,
    ):
        save_checkpoint(path, {"networks": {"weights": torch.ones(100_000)}})
    assert "what was there before is kept" in one_line(e)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_errors_of_what_is_written_are_not_taken_for_the_disks(tmp_path):
    with pytest.raises(RuntimeError, match="of its own"):
        from miscc.files import write_atomically

        def write(stream):
            raise RuntimeError("of its own")

        write_atomically(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())


def test_stats_log_and_pictures_on_a_full_disk_cost_a_warning_each(run, tiny, capsys):
    trainer = Trainer(tiny(), CPU, run.load())
    progress = Progress(run, trainer.step)
    with files_of_at_most(0):
        for step in (4, 5):
            progress.log(step, 1.0, {"loss/hinge": 1.0})
            trainer.draw(run, progress)
    output = capsys.readouterr().out
    for what in ("stats.jsonl", "pictures", "log.txt"):
        assert output.count(f"warning: {what} cannot be written") == 1, output
    progress.log(6, 1.2, {"loss/hinge": 2.0})  # the disk has space again
    progress.close()
    assert json.loads(run.stats.read_text().splitlines()[-1])["loss/hinge"] == 2.0


def test_tensorboards_thread_ends_in_a_warning(run, capsys):
    progress = Progress(run)
    with files_of_at_most(0):
        for step in range(3):
            progress.picture("samples", np.zeros((64, 64, 3), np.uint8), step)
        with progress.optional("TensorBoard's files"):
            progress.board.flush()
        progress.close()
    output = "".join(capsys.readouterr())
    assert output.count("TensorBoard's files cannot be written") == 1 and "Traceback" not in output


def test_an_output_folder_that_takes_no_directory_is_said(tmp_path, monkeypatch):
    def read_only(path, *arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("training.run_dir.os.mkdir", read_only)
    with pytest.raises(WriteError, match="OUTPUT_DIR: .*00000-x cannot be made .Read-only file system.; choose"):
        RunDir.create(tmp_path, "x", "")


def test_a_run_directory_deleted_while_training_is_made_again_for_the_checkpoint(run, capsys):
    progress = Progress(run)
    shutil.rmtree(run.path)
    progress.log(1, 0.1, {"a": 1.0})
    progress.log(2, 0.2, {"a": 1.0})
    run.save({"networks": {}, "step": 2})
    progress.close()
    assert capsys.readouterr().out.count("stats.jsonl cannot be written") == 1
    assert load_checkpoint(run.last)["step"] == 2


@pytest.mark.parametrize("name", ["a/b", "../x", "/tmp/x", ".", "..", "a\\b", "x" * 101])
def test_config_names_with_slashes_are_refused(tiny, tmp_path, name):
    with pytest.raises(ConfigError, match="CONFIG_NAME: .* must be a file name"):
        train(tiny(("CONFIG_NAME", name)), CPU)
    assert not (tmp_path / "output").exists()


def test_other_config_names_are_taken():
    assert run_name({"CONFIG_NAME": "grüne vögel 2.1", "GAN": {"NAME": "ssa_gan"}}) == "grüne vögel 2.1-ssa_gan"


# -- damaged files -------------------------------------------------------------------------------------------------


def test_no_flipped_bit_in_a_checkpoint_loads_silently(run, tmp_path):
    path, whole = tmp_path / "flipped.pth", run.last.read_bytes()
    expected = str(load_checkpoint(run.last))
    found, positions = 0, np.random.default_rng(5).integers(0, len(whole), 25)
    for position in positions:
        path.write_bytes(whole)
        flip(path, position)
        try:
            assert str(load_file(path)) == expected  # padding between parts
        except CheckpointError as error:
            assert "copy it again" not in str(error) and "\n" not in str(error)
            found += 1
    assert found > 20


def test_a_flipped_bit_in_a_published_model_is_found(run, tmp_path):
    folder = TextToImage.load(run.last, "cpu").save_pretrained(tmp_path / "model")
    assert load_model(folder)["networks"]
    flip(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
    with pytest.raises(DamagedError, match="model.safetensors: cannot be read, its checksum differs"):
        load_model(folder)


def test_compressed_weight_files_could_fill_the_memory_and_are_refused(run, tmp_path):
    with zipfile.ZipFile(run.last) as old, zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part))
    with pytest.raises(CheckpointError, match="is compressed"):
        load_file(tmp_path / "x.pth")


def test_the_checkpoint_before_the_newest_is_kept(run):
    assert load_checkpoint(run.last)["step"] == 3 and load_checkpoint(run.previous)["step"] == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(run, tiny, capsys, damage):
    size = run.last.stat().st_size
    {
        "flip": lambda: flip(run.last, size // 2),
        "cut": lambda: os.truncate(run.last, size // 2),
        "remove": run.last.unlink,
        "empty": lambda: os.truncate(run.last, 0),
    }[damage]()
    kept = run.previous.read_bytes()
    assert train(tiny(("TRAIN.MAX_STEPS", "3")), CPU, resume=True) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "goes on from previous.pth, step 2" in line]
    assert len(said) == 1 and "last.pth" in said[0] and "goes on from" in (run.path / "log.txt").read_text()
    # What is damaged never takes the place of what is whole.
    assert load_checkpoint(run.last)["step"] == 3 and run.previous.read_bytes() == kept


def test_where_both_are_damaged_the_newest_numbered_one_with_everything_is_taken(run, trained):
    for path in (run.last, run.previous):
        flip(path, path.stat().st_size // 2)
    whole = load_checkpoint(trained / NAME / "checkpoints" / "last.pth")
    drawing = {name: value for name, value in whole.items() if name != "optimizers"}
    for epoch, content in ((1, whole), (2, whole | {"step": 1}), (3, drawing)):
        save_checkpoint(run.numbered(epoch), content)
        os.utime(run.numbered(epoch), (10**9 + epoch, 10**9 + epoch))
    assert run.load()["step"] == 1 and "goes on from epoch_0002.pth, step 1" in run.note
    assert run.newest_whole() == run.numbered(3)  # drawing needs no optimizers
    for epoch in (1, 2, 3):
        run.numbered(epoch).unlink()
    with pytest.raises(CheckpointError, match="last.pth: .*damaged.*, and there is no older checkpoint to go on from"):
        run.load()


def test_drawing_takes_the_one_before_too(run, tiny_yaml, tmp_path, caplog):
    from main import main

    flip(run.last, run.last.stat().st_size // 2)
    assert (
        main(["--cfg", str(tiny_yaml), "--gpu", "-1", "--caption", "a small red bird", "--out", str(tmp_path / "o")])
        == 0
    )
    assert "drawing with previous.pth" in caplog.text and list((tmp_path / "o").glob("*.png"))


def test_encoders_fall_back_as_runs_do(run, tmp_path):
    folder = EncoderDir(tmp_path / "encoders")
    folder.save(load_checkpoint(run.previous))
    folder.save(load_checkpoint(run.last))
    folder.last.unlink()
    assert folder.has_state() and folder.load()["step"] == 2 and "previous.pth" in folder.note


# -- weights that are no numbers -----------------------------------------------------------------------------------


def with_nan(run, part):
    checkpoint = load_checkpoint(run.last)
    state = checkpoint["networks"][part]["state"]
    next(tensor for tensor in state.values() if tensor.is_floating_point()).view(-1)[0] = float("nan")
    save_checkpoint(run.last, checkpoint)
    return run.last


@pytest.mark.parametrize("part", ["generator_ema", "text_encoder"])
def test_nan_weights_are_neither_drawn_nor_scored_nor_trained(run, tiny, tiny_yaml, part):
    path = with_nan(run, part)
    with pytest.raises(CheckpointError, match=f"its {part} is not finite .*it has diverged") as error:
        TextToImage.load(path)
    one_line(error)
    from main import main

    for command in (["--caption", "a red bird"], ["--resume"], ["--set", "TRAIN.NET_G", str(path)]):
        with pytest.raises(CheckpointError, match="is not finite"):
            main(["--cfg", str(tiny_yaml), "--gpu", "-1", *command])
    from eval.evaluate import main as evaluate

    with pytest.raises(CheckpointError, match="is not finite"):
        evaluate(["--checkpoint", str(path), "--protocol", "small", "--device", "cpu"])


def test_the_check_before_saving_includes_the_average_and_buffers(run, tiny):
    for spoil in (lambda t: t.average.module.fc.weight, lambda t: next(t.networks["generator"].buffers())):
        trainer = Trainer(tiny(), CPU, run.load())
        spoil(trainer).data.view(-1)[:1] = float("nan")
        trainer.step, before = trainer.last_step, run.last.read_bytes()
        with pytest.raises(TrainingError, match="weights of the generator(_ema)? are not finite"):
            trainer.save_when_due(run, stopped=False)
        assert run.last.read_bytes() == before


# -- processes -----------------------------------------------------------------------------------------------------


def test_a_second_process_on_a_run_directory_refuses(tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        lock = FolderLock(tmp_path)
        os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    with pytest.raises(UserError, match=f"is being trained by process {child} on .*; wait until it ends") as error:
        FolderLock(tmp_path)
    one_line(error)

    # A crash leaves no lock behind.
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = FolderLock(tmp_path)
    assert lock.held and lock.path.read_text().startswith(f"process {os.getpid()} on")
    lock.release()


def test_a_killed_data_worker_names_the_setting(tiny, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    from datasets.settings import DataSettings
    from miscc.settings import from_config

    data = from_config(DataSettings, tiny())
    dataset = make_dataset(data, read_records(data, "train"), [16], 0, True)
    loader = training_loader(dataset, 4, 0, workers=1)
    batches = iter(loader)
    next(batches)
    for process in torch.multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with pytest.raises(DataError, match="WORKERS: a process that reads images was killed.*--set WORKERS 0") as error:
        for _ in range(10):
            next(batches)
    one_line(error)


def test_a_broken_image_while_training_saves_first(tiny, drawn_folder, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(drawn_folder, data)
    changes = (("DATA_DIR", str(data)), ("TRAIN.SAVE_EVERY", "0"), ("TRAIN.MAX_STEPS", "4"))

    # The image that the third step reads first.
    from datasets.loading import EpochBatches

    steps = iter(EpochBatches(40, 8, 100))
    _, index = [next(steps) for _ in range(3)][2][0]
    path = data / "images" / f"train{index:03d}.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    with pytest.raises(
        DataError, match=f"{path.name}.*SKIP_BROKEN True; step 2 is saved, go on with --resume"
    ) as error:
        train(tiny(*changes), CPU)
    one_line(error)

    # With the image back, the run ends as if nothing had happened.
    path.write_bytes(whole)
    assert train(tiny(*changes), CPU, resume=True) == 0
    assert train(tiny(*changes, ("OUTPUT_DIR", str(tmp_path / "other"))), CPU) == 0
    one, other = (load_checkpoint(tmp_path / name / NAME / "checkpoints" / "last.pth") for name in ("output", "other"))
    assert str(one["networks"]) == str(other["networks"]) and one["step"] == other["step"] == 4


def test_resume_with_a_caption_is_refused(tiny_yaml):
    from main import main

    for option in ("--resume", "--continue"):
        with pytest.raises(ConfigError, match=f"{option}: goes on with a training, but these options draw"):
            main(["--cfg", str(tiny_yaml), option, "--caption", "a bird"])
        with pytest.raises(ConfigError, match=f"{option}: goes on with a training"):
            main(["--cfg", str(tiny_yaml), option, "--set", "B_VALIDATION", "True"])


def test_half_a_line_of_stats_is_dropped(tmp_path):
    run = RunDir(tmp_path)
    write_text(run.stats, '{"step": 1}\n{"step": 2}\n[3]\n{"step": "x"}\n{"st')
    run.truncate_stats(1)
    assert run.stats.read_text() == '{"step": 1}\n'
