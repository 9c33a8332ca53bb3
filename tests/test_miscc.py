"""Files written whole or not at all, images and their ranges, stateless randomness, devices."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from miscc.checkpoint import load_checkpoint, load_file, save_checkpoint
from miscc.distributed import choose_device, start
from miscc.errors import CheckpointError, ConfigError, DataError, UserError, run_command
from miscc.files import read_bytes, write_atomically, write_text
from miscc.images import from_uint8, open_rgb, to_uint8
from miscc.pictures import attention_picture, caption_grid, encode_png, grid, save_image, unit_to_uint8
from miscc.randomness import noise_for, stream


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a" / "file"
    write_text(path, "old")

    def fail(stream):
        stream.write(b"half of the n")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_files_are_read_where_the_system_has_no_flag_for_pipes(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"a\r\nb")
    monkeypatch.delattr(os, "O_NONBLOCK")  # as on Windows
    assert read_bytes(tmp_path / "file") == b"a\r\nb"


def test_colleagues_may_read_what_is_written(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "ours")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_checkpoints(tmp_path):
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"networks": {}, "step": 3, "weights": torch.arange(3)})
    assert load_checkpoint(path)["step"] == 3
    torch.save({"weights": torch.zeros(1)}, tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match="is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "state.pth")
    save_checkpoint(path, {"networks": {}, "format": 99})
    with pytest.raises(CheckpointError, match="has format 99"):
        load_checkpoint(path)
    save_checkpoint(path, {"networks": {"weights": torch.zeros(10_000)}})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="c.pth: cannot be read as a weight file"):
        load_checkpoint(path)
    for content in (b"", b"<html>404</html>"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="c.pth"):
            load_file(path)
    with pytest.raises(CheckpointError, match="no such weight file"):
        load_file(tmp_path / "gone.pth")


def test_ranges_by_hand():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 1, 6)
    assert to_uint8(values).flatten().tolist() == [0, 0, 128, 255, 255, 255]  # 127.5 rounds to even
    assert from_uint8(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    every = torch.arange(256, dtype=torch.uint8)
    assert to_uint8(from_uint8(every).view(1, 1, 16, 16)).flatten().tolist() == every.tolist()
    assert unit_to_uint8(np.array([-0.1, 0.0, 0.5, 1.0, 1.1])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("shape", [(5, 7), (64, 64, 3)])
def test_quickly_encoded_pixels_are_the_same(shape):
    for pixels in (np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), np.full(shape, 7, dtype=np.uint8)):
        encoded = encode_png(pixels)
        with Image.open(io.BytesIO(encoded)) as image:
            assert image.format == "PNG" and np.array_equal(np.asarray(image), pixels)
        # Runs are found, and noise grows by no more than its headers.
        assert len(encoded) < (pixels.size / 20 + 100 if pixels.min() == pixels.max() else 1.02 * pixels.size + 100)


def test_image_modes(tmp_path):
    def opened(image, name, **options):
        image.save(tmp_path / name, **options)
        return np.asarray(open_rgb(tmp_path / name))

    assert opened(Image.new("L", (2, 2), 100), "grey.png")[0, 0].tolist() == [100, 100, 100]
    assert opened(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "clear.png")[0, 0].tolist() == [255, 255, 255]
    assert opened(Image.new("RGBA", (2, 2), (255, 0, 0, 255)), "solid.webp", lossless=True)[0, 0].tolist() == [
        255,
        0,
        0,
    ]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert opened(palette, "palette.png")[0, 0].tolist() == [10, 20, 30]
    assert opened(palette, "hole.png", transparency=1)[0, 0].tolist() == [255, 255, 255]
    assert opened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "cmyk.jpg")[4, 4].tolist() == pytest.approx(
        [255, 0, 0], abs=8
    )
    deep = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    assert opened(deep, "deep.png")[0, 0].tolist() == [128, 128, 128]
    assert opened(Image.new("LA", (2, 2), (0, 128)), "half.png")[0, 0].tolist() == pytest.approx([127] * 3, abs=1)


def test_one_level_of_16_bit_grey_may_be_transparent(tmp_path):
    levels = np.array([[0x8000, 0x1234], [0xFFFF, 0]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "hole.png", transparency=0x1234)
    assert np.asarray(open_rgb(tmp_path / "hole.png"))[..., 1].tolist() == [[128, 255], [255, 0]]


def test_pixels_that_are_floats_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(
        DataError, match=r"depth\.tif: cannot be read as an image \(its pixels are floats; save it as 8-bit"
    ):
        open_rgb(tmp_path / "depth.tif")


def test_photos_are_turned_upright(tmp_path):
    photo = Image.fromarray(np.stack([np.zeros((8, 16), np.uint8)] * 3, axis=-1))
    photo.paste((255, 255, 255), (0, 0, 8, 8))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter to the right
    photo.save(tmp_path / "phone.png", exif=exif)
    turned = np.asarray(open_rgb(tmp_path / "phone.png"))
    assert turned.shape == (16, 8, 3) and turned[0, 0, 0] == 255 and turned[-1, 0, 0] == 0
    assert np.asarray(open_rgb(tmp_path / "phone.png", upright=False)).shape == (8, 16, 3)


def test_broken_images_are_named(tmp_path):
    save_image(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8), tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("this is no picture")
    for name in ("cut.png", "text.jpg"):
        with pytest.raises(DataError, match=f"{name}: cannot be read as an image"):
            open_rgb(tmp_path / name)
    with pytest.raises(DataError, match="no such image"):
        open_rgb(tmp_path / "gone.png")


def test_a_long_heading_is_cut_where_the_next_one_begins():
    cells = [[np.zeros((8, 8, 3), dtype=np.uint8)] * 3]

    def strip(*headings):
        """(rows of the headings, pixels from the third picture on)"""
        return caption_grid(["red"], cells, columns=1, headings=headings)[:22, 200 + 6 + 2 * (96 + 6) :]

    long = "a name that would cover two pictures and more"
    assert np.array_equal(strip(long, "", "mask"), strip("a", "", "mask")) and strip("a", "", "mask").min() < 255
    assert strip(long, "", "").min() < 255, "without another heading it has the whole row"


def test_pictures_for_people():
    red, blue = (np.full((4, 4, 3), colour, dtype=np.uint8) for colour in ([255, 0, 0], [0, 0, 255]))
    tiled = grid([[red, blue], [blue]], gap=1)
    assert tiled.shape == (11, 11, 3)
    assert tiled[1, 1].tolist() == [255, 0, 0] and tiled[6, 1].tolist() == [0, 0, 255]
    assert tiled[0, 0].tolist() == [255] * 3 == tiled[7, 7].tolist()
    mask = np.full((2, 2), 200, dtype=np.uint8)
    picture = caption_grid(["red", "blue", "red"], [[red, mask], [blue, mask], [red, mask]], columns=2, cell_size=8)
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (0, 0, 255), (200, 200, 200), (255, 255, 255)} <= colours
    attention = np.zeros((2, 2, 2))
    attention[0, 0, 0] = 1.0
    shown = attention_picture([np.full((8, 8, 3), 255, dtype=np.uint8)], [["red", "bird"]], [attention], cell_size=8)
    cells = [shown[22:30, 4 + 12 * n : 12 + 12 * n] for n in range(3)]
    assert cells[0].min() == 255
    assert cells[1][0, 0].min() > cells[1][7, 7].max() and cells[2].max() < 80  # bright where the word looks


def test_streams_depend_on_all_they_are_given_and_on_nothing_else():
    first = stream(1, "crop", 2, 3).random()
    np.random.random()
    assert stream(1, "crop", 2, 3).random() == first
    others = [stream(2, "crop", 2, 3), stream(1, "flip", 2, 3), stream(1, "crop", 3, 3), stream(1, "crop", 2, 4)]
    assert len({first, *(other.random() for other in others)}) == 5


def test_noise():
    noise = noise_for(0, 1, range(200), 100)
    assert noise.shape == (200, 100) and noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.02
    assert torch.equal(noise[7:9], noise_for(0, 1, [7, 8], 100))
    assert not torch.equal(noise[0], noise_for(0, 2, [0], 100)[0])
    cut = noise_for(0, 0, range(200), 100, truncation=0.8)
    assert cut.abs().max() <= 1.6 and cut.abs().max() > 1.5
    assert abs(cut.std() - 0.8 * 0.88) < 0.02  # a normal cut at 2 has standard deviation 0.88
    assert noise_for(0, 0, [], 5).shape == (0, 5)


def test_devices(monkeypatch):
    assert choose_device(-1).type == "cpu" and choose_device(0, cuda=False).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None).type == "cpu"
    with pytest.raises(ConfigError, match=r"--gpu 3: no CUDA GPU is usable here; use --gpu -1"):
        choose_device(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="GPUs here: 0 to 1"):
        choose_device(2)
    for name, value in {"WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="process 2 has no GPU: start at most 2 processes here, or use --gpu -1"):
        start()


def test_commands_turn_user_errors_into_one_line(capsys):
    def fail():
        raise UserError("the thing is missing; put it there")

    with pytest.raises(SystemExit) as leaving:
        run_command(fail)
    assert leaving.value.code == 2 and capsys.readouterr().err == "error: the thing is missing; put it there\n"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run_command(lambda: 1 / 0)
    with pytest.raises(SystemExit) as leaving:
        run_command(lambda: 130)
    assert leaving.value.code == 130


def test_helping_needs_no_torch():
    code = "import sys, main; sys.argv=['main.py','--help']; main.parser_of(main.OPTIONS).parse_args()"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert "--caption" in done.stdout and " torch\n" not in done.stderr
