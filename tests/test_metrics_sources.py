"""Where scores read images: every kind of input, odd and broken images, and how many are held at a time."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from metrics_help import picture, write_pictures
from PIL import Image

from eval.features.sources import batches, drop_broken, open_source, read_samples
from miscc.errors import DataError
from miscc.images import open_pixels, open_rgb


def all_images(source, batch_size=4):
    return [image for batch in batches(source, batch_size, workers=2) for image in batch]


def test_folder_is_read_to_its_depth_in_order_of_paths_and_other_files_are_passed_over(tmp_path):
    write_pictures(tmp_path / "set" / "b", 2)
    write_pictures(tmp_path / "set" / "a", 1, first=5)
    (tmp_path / "set" / "notes.txt").write_text("no image")
    (tmp_path / "set" / ".hidden.png").write_bytes(b"no image either")
    Image.fromarray(picture(9)).save(tmp_path / "set" / "Z.JPG")
    source = open_source(tmp_path / "set")
    assert source.names == ("Z.JPG", "a/000.png", "b/000.png", "b/001.png")
    assert np.array_equal(all_images(source)[1], picture(5))


def test_list_zip_and_arrays_give_the_same_images_as_the_folder(tmp_path):
    folder = write_pictures(tmp_path / "set", 5)
    expected = np.stack([picture(number) for number in range(5)])
    (tmp_path / "list.txt").write_text("\n".join(f"set/{i:03d}.png" for i in range(5)) + "\n\n")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("__MACOSX/x/._000.png", b"junk")
        for file in sorted(folder.iterdir(), reverse=True):
            archive.write(file, f"x/{file.name}")
    np.savez_compressed(tmp_path / "images.npz", images=expected, labels=np.arange(5))
    np.savez(tmp_path / "channels_first.npz", expected.transpose(0, 3, 1, 2).copy())
    np.save(tmp_path / "images.npy", expected)
    for name in ("set", "list.txt", "set.zip", "images.npz", "channels_first.npz", "images.npy"):
        source = open_source(tmp_path / name)
        assert len(source) == 5
        assert np.array_equal(np.stack(all_images(source, 2)), expected), name
        assert np.array_equal(source.read(3), expected[3])
        assert np.array_equal(source.subset([4, 1]).read(1), expected[1])


def test_grey_and_transparent_images_come_out_as_rgb_on_white(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.fromarray(np.full((4, 6), 77, np.uint8)).save(folder / "grey.png")
    see_through = np.zeros((4, 6, 4), np.uint8)
    see_through[:, 3:] = (10, 20, 30, 255)
    Image.fromarray(see_through).save(folder / "rgba.png")
    grey, rgba = all_images(open_source(folder))
    assert grey.shape == (4, 6, 3) and (grey == 77).all()
    assert (rgba[:, :3] == 255).all() and (rgba[0, 5] == (10, 20, 30)).all()
    np.save(tmp_path / "grey.npy", np.full((2, 4, 6), 77, np.uint8))
    assert np.array_equal(open_source(tmp_path / "grey.npy").read(1), grey)


def test_truncated_image_is_named_or_skipped_and_counted(tmp_path):
    folder = write_pictures(tmp_path / "set", 4)
    whole = (folder / "002.png").read_bytes()
    (folder / "002.png").write_bytes(whole[: len(whole) // 2])
    source = open_source(folder)
    with pytest.raises(DataError, match=r"002\.png"):
        all_images(source)
    left, broken = drop_broken(source)
    assert broken == ["002.png"] and left.names == ("000.png", "001.png", "003.png")
    assert np.array_equal(all_images(left)[2], picture(3))
    assert left.fingerprint() != source.fingerprint()
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    with pytest.raises(DataError, match=r"set\.zip: 002\.png"):
        all_images(open_source(tmp_path / "set.zip"))
    assert drop_broken(open_source(tmp_path / "set.zip"))[1] == ["002.png"]
    for name in ("000", "001", "003"):
        (folder / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match="not one of the 4"):
        drop_broken(open_source(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("floats.npz", {"images": np.zeros((2, 4, 4, 3), np.float32)}, "float32; store the images as uint8"),
        ("flat.npz", {"images": np.zeros((2, 48), np.uint8)}, r"shape \(2, 48\)"),
        ("two.npz", {"a": np.zeros((2, 4, 4, 3), np.uint8), "b": np.zeros(3)}, "call that of the images `images`"),
        ("one.npz", {"images": np.zeros((64, 64, 3), np.uint8)}, r"single image; store \(N, H, W, 3\)"),
        ("grey.npz", {"images": np.zeros((64, 64, 1), np.uint8)}, r"single image; store \(N, H, W, 3\)"),
        ("stats.npz", {"mu": np.zeros(3), "sigma": np.eye(3)}, "holds statistics"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_the_reason(tmp_path, name, content, message):
    np.savez(tmp_path / name, **content)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / name)


def test_what_holds_no_images_is_refused_with_the_reason(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("nowhere.png\n")
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    Image.fromarray(picture(0)).save(tmp_path / "one.png")
    for name, message in {
        "missing": "no such folder",
        "empty": "no image in it",
        "list.txt": r"1 of its 1 images are not there, e\.g\. nowhere\.png",
        "broken.zip": "cannot be read as a zip",
        "one.png": "is a single image",
    }.items():
        with pytest.raises(DataError, match=message):
            open_source(tmp_path / name)


def test_cut_off_array_names_the_image_at_which_it_ends(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([picture(i, 8) for i in range(3)]))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-10])
    source = open_source(tmp_path / "a.npy")
    assert np.array_equal(source.read(1), picture(1, 8))
    with pytest.raises(DataError, match="ends within image 2 of 3"):
        source.read(2)


def test_sample_folder_gives_what_captions_jsonl_names_and_nothing_beside_it(tmp_path):
    folder = write_pictures(tmp_path / "out", 3)
    write_pictures(folder / "masks", 2)
    lines = [{"file": f"{i:03d}.png", "caption": "a bird", "key": f"c/{i}", "caption_number": 1} for i in (0, 2)]
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    assert open_source(folder).names == ("000.png", "002.png")
    assert [(s.file, s.key, s.caption_number, s.sample) for s in read_samples(folder)] == [
        ("000.png", "c/0", 1, 0),
        ("002.png", "c/2", 1, 0),
    ]
    (folder / "002.png").unlink()
    with pytest.raises(DataError, match=r"names 1 images that are not there, e\.g\. 002\.png"):
        open_source(folder)
    (folder / "captions.jsonl").write_text('{"file": "000.png"}\n')
    with pytest.raises(DataError, match="line 1: not a record"):
        open_source(folder)


def test_fingerprint_changes_with_the_files_and_with_nothing_else(tmp_path):
    folder = write_pictures(tmp_path / "set", 3)
    first = open_source(folder).fingerprint()
    (folder / "notes.txt").write_text("x")
    assert open_source(folder).fingerprint() == first
    os.utime(folder / "001.png", ns=(1, 1))
    touched = open_source(folder).fingerprint()
    assert touched != first
    Image.fromarray(picture(7)).save(folder / "007.png")
    assert open_source(folder).fingerprint() != touched


def test_few_images_are_held_however_many_there_are(tmp_path):
    np.save(tmp_path / "many.npy", np.zeros((3000, 8, 8, 3), np.uint8))
    source = open_source(tmp_path / "many.npy")
    fetched, used, most = 0, 0, 0

    def counting(index):
        nonlocal fetched
        fetched += 1
        return source.fetch(index)

    counted = type(source)(source.path, source.names, counting, source.stamp)
    for batch in batches(counted, 10, workers=3):
        most = max(most, fetched - used)
        used += len(batch)
    assert used == 3000 and most == 10 + 2 * 3


@pytest.mark.parametrize("shape", [(10**9, 1000, 1000, 3), (2, 10**12, 10**12, 3), (3, -4, 4, 3)])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_array_that_declares_more_than_its_file_holds(tmp_path, shape, suffix):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "|u1", "fortran_order": False, "shape": shape})
    path = tmp_path / f"images{suffix}"
    if suffix == ".npy":
        path.write_bytes(content.getvalue() + bytes(48))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content.getvalue() + bytes(48))
    with pytest.raises(DataError, match="more than the file can hold|has shape"):
        open_source(path)


def test_a_pipe_named_as_an_image_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match="x.png: is no file"):
        open_rgb(tmp_path / "x.png")
    with pytest.raises(DataError, match="x.png: is no file"):
        open_pixels(tmp_path / "x.png")
    with pytest.raises(DataError, match="x.png: is no file, or leave such files out with --skip-broken"):
        open_source(tmp_path).read(0)


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd"])
def test_samples_outside_their_folder_are_refused(tmp_path, name):
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": name, "caption": "a bird"}) + "\n")
    with pytest.raises(DataError, match="captions.jsonl, line 1: .*outside the folder"):
        open_source(tmp_path)


def test_captions_of_samples_may_hold_any_sign(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a_c0_s0.png")
    line = json.dumps({"file": "a_c0_s0.png", "caption": "red\u2028bird\x85"}, ensure_ascii=False)
    (tmp_path / "captions.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read_samples(tmp_path)[0].caption == "red\u2028bird\x85"


@pytest.mark.parametrize("suffix", [".zip", ".npz"])
def test_a_zip_of_a_version_to_come_is_named(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 255  # the version that unpacking needs, in the directory
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a .*zip file version 25.5"):
        open_source(path)


# -- folders of folders -------------------------------------------------------------------------------------------------


def test_a_parent_of_sample_folders_is_refused(tmp_path):
    """As `main.py --each-split` with masks leaves it: masks and grids are no generated images."""
    folder = write_pictures(tmp_path / "out" / "test", 2)
    write_pictures(folder / "masks", 2)
    (folder / "captions.jsonl").write_text('{"file": "000.png", "caption": "a bird"}\n')
    with pytest.raises(DataError, match=r"out: holds folders of samples \(.*test\); give one of them"):
        open_source(tmp_path / "out")
    assert open_source(folder).names == ("000.png",)


def test_a_folder_counts_once_whatever_links_lead_to_it_and_hidden_ones_do_not(tmp_path):
    folder = write_pictures(tmp_path / "set" / "a", 2).parent
    write_pictures(folder / ".thumbnails", 2)
    write_pictures(tmp_path / "elsewhere", 1)
    (folder / "b").symlink_to(folder / "a")
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    assert open_source(folder).names == ("a/000.png", "a/001.png", "c/000.png")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    assert open_source(tmp_path / "elsewhere").names == ("000.png",)
    (tmp_path / ".kept").symlink_to(folder)  # what the user names is read
    assert len(open_source(tmp_path / ".kept")) == 3


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder, scan = write_pictures(tmp_path / "set" / "locked", 1).parent, os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"set/locked: cannot be read \(Permission denied\)"):
        open_source(folder)


# -- damaged archives ---------------------------------------------------------------------------------------------------


def test_a_zip_whose_first_image_is_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(write_pictures(tmp_path / "set", 3).iterdir()):
            archive.write(file, file.name)
    content = bytearray((tmp_path / "set.zip").read_bytes())
    content[100] ^= 255  # in the first member, which is stored: its checksum tells
    (tmp_path / "set.zip").write_bytes(content)
    source = open_source(tmp_path / "set.zip")
    with pytest.raises(DataError, match=r"000\.png: cannot be unpacked .* leave such images out with --skip-broken"):
        all_images(source)
    left, broken = drop_broken(source)
    assert broken == ["000.png"] and np.array_equal(all_images(left)[1], picture(2))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_array_is_to_be_copied_again(tmp_path, save):
    """Its one checksum concerns all images: none is named, and none can be left out."""
    save(tmp_path / "a.npz", np.stack([picture(i, 32) for i in range(40)]))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    (tmp_path / "a.npz").write_bytes(content)
    for read in (all_images, drop_broken, lambda source: source.subset([39]).read(0) + source.subset([0]).read(0)):
        if save is np.savez and read not in (all_images, drop_broken):
            continue  # the checksum is known once all has been read
        with pytest.raises(DataError, match=r"a\.npz: cannot be unpacked \(.*\); copy it again$"):
            read(open_source(tmp_path / "a.npz"))
