"""`python -m datasets.prepare`: what it writes, says and refuses."""

import json
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from dataset_samples import REAL_DATA, python2_pickle, write_broken_image, write_cub, write_image

from datasets import load_records, prepare
from miscc.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(tmp_path):
    for number in range(6):
        write_image(tmp_path / "images" / f"{number}.jpg", seed=number)
    lines = [f"{number}.jpg,a dog number {number}\n{number}.jpg,a dog\n" for number in range(6)]
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(lines))
    (tmp_path / "train.txt").write_text("0\n1\n2\n3\n")
    (tmp_path / "test.txt").write_text("4\n5\n")
    return tmp_path


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "datasets.prepare", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command(root):
    done = run("folder", "--root", root)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"captions: {root}/captions.csv, image from column 'image', captions from 'caption'"
    assert lines[1] == "folder: 6 images"
    assert lines[2].split() == "train 4 images, 8 captions (2 an image), each its own class".split()
    assert lines[3].split() == "test 2 images, 4 captions (2 an image), each its own class".split()
    assert "10 entries, the words of train and test captions and <end>; longest caption: 4 words" in lines[4]
    assert lines[-1] == f"ready: {root} (vocabulary.json, train.jsonl, test.jsonl)"
    records, vocabulary = load_records("folder", root, "test")
    assert records.keys == ["4", "5"] and len(vocabulary) == 10


def test_errors_are_lines_without_a_traceback(tmp_path):
    done = run("birds", "--root", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}: the data set is not complete; missing:\n  - ")
    assert len(done.stderr.splitlines()) == 5
    done = run("bird", "--root", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_broken_images_are_found_when_asked(root, capsys):
    write_broken_image(root / "images" / "1.jpg")
    prepare.main(["folder", "--root", str(root)])
    assert load_records("folder", root, "train")[0].keys == ["0", "1", "2", "3"]
    with pytest.raises(DataError, match=r"1 images cannot be read(.|\n)*1\.jpg"):
        prepare.main(["folder", "--root", str(root), "--verify"])
    prepare.main(["folder", "--root", str(root), "--drop-broken"])
    assert load_records("folder", root, "train")[0].keys == ["0", "2", "3"]
    for number in (4, 5):
        write_broken_image(root / "images" / f"{number}.jpg")
    with pytest.raises(DataError, match="not one image of the split 'test'"):
        prepare.main(["folder", "--root", str(root), "--drop-broken"])
    capsys.readouterr()


def test_a_changed_vocabulary_is_told(root, capsys):
    prepare.main(["folder", "--root", str(root)])
    prepare.main(["folder", "--root", str(root)])
    assert "has changed" not in capsys.readouterr().out
    with (root / "captions.csv").open("a") as file:
        file.write("0.jpg,something new\n")
    prepare.main(["folder", "--root", str(root)])
    assert "the vocabulary has changed" in capsys.readouterr().out


def test_metadata_beside_it_is_told(root, capsys):
    (root / "train").mkdir()
    (root / "train/filenames.pickle").write_bytes(python2_pickle(["0"]))
    (root / "captions.pickle").write_bytes(python2_pickle([]))
    prepare.main(["folder", "--root", str(root)])
    assert f"{root / 'captions.pickle'} is there, too, and comes first" in capsys.readouterr().out


def test_options_reach_the_data_set(root, capsys):
    (root / "train.txt").unlink()
    (root / "test.txt").unlink()
    (root / "captions.csv").rename(root / "table.csv")
    (root / "table.csv").write_text((root / "table.csv").read_text().replace("image,caption", "a,b"))
    chosen = ["--captions", str(root / "table.csv"), "--image-column", "a", "--caption-column", "b"]
    prepare.main(["folder", "--root", str(root), *chosen, "--test-fraction", "0.5", "--seed", "3"])
    sizes = [len(load_records("folder", root, split)[0]) for split in ("train", "test")]
    assert sum(sizes) == 6 and min(sizes) >= 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["birds", "--image-column", "a"], "--image-column has no meaning for birds, only for folder"),
        (["coco", "--caption-column", "a"], "--caption-column has no meaning for coco"),
        (["folder", "--allow-partial"], "--allow-partial has no meaning for folder, only for birds and coco"),
        (["folder", "--train-size", "5"], "--train-size has no meaning for folder, only for toybirds"),
    ],
)
def test_options_without_meaning_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        prepare.main(arguments)


@pytest.mark.parametrize("fraction", ["1", "-0.1", "1.5"])
def test_fractions_are_fractions(root, fraction, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["folder", "--root", str(root), "--test-fraction", fraction])
    assert "at least 0 and below 1" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(root):
    root.chmod(0o555)
    with pytest.raises(DataError, match="cannot be written"):
        prepare.main(["folder", "--root", str(root)])
    root.chmod(0o755)


def test_a_write_that_fails(root, monkeypatch):
    def fail(root, splits):
        raise OSError("No space left on device")

    monkeypatch.setattr(prepare, "write_layout", fail)
    with pytest.raises(DataError, match="cannot be written .*No space left"):
        prepare.main(["folder", "--root", str(root)])


def test_birds_with_allow_partial(tmp_path, capsys):
    write_cub(tmp_path, {"001.Finch": 2, "002.Gull": 1})
    (tmp_path / "trainvalclasses.txt").write_text("001.Finch\n")
    (tmp_path / "testclasses.txt").write_text("002.Gull\n")
    with pytest.raises(DataError, match="2 images instead of 8,855"):
        prepare.main(["birds", "--root", str(tmp_path)])
    prepare.main(["birds", "--root", str(tmp_path), "--allow-partial"])
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"ready: {tmp_path}")
    assert len(load_records("birds", tmp_path, "train")[0]) == 2


def test_toybirds(tmp_path, capsys):
    sizes = ["--train-size", "12", "--test-size", "5", "--image-size", "32"]
    prepare.main(["toybirds", "--root", str(tmp_path), *sizes])
    output = capsys.readouterr().out
    assert "toybirds: 17 images" in output and output.splitlines()[-1].startswith(f"ready: {tmp_path}")
    records, _ = load_records("toybirds", tmp_path, "train")
    assert len(records) == 12 and records.boxes.shape == (12, 4)
    assert {len(group) for group in records.captions} == {10}
    test, _ = load_records("toybirds", tmp_path, "test")
    assert len(test) == 5 and not set(test.class_ids.tolist()) & set(records.class_ids.tolist())


@pytest.mark.parametrize(
    ("name", "images", "train", "test"), [("flickr8k_dogs", 1_977, 1_502, 236), ("coco_real", 363, None, None)]
)
def test_real_photos(tmp_path, capsys, name, images, train, test):
    archive = REAL_DATA / f"{name}.tar"
    if not archive.is_file():
        pytest.skip(f"{archive} is not here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    root = tmp_path / name
    prepare.main(["folder", "--root", str(root), "--verify"])
    assert f"folder: {images:,} images" in capsys.readouterr().out
    records, vocabulary = load_records("folder", root, "train")
    assert train is None or len(records) == train
    assert test is None or len(load_records("folder", root, "test")[0]) == test
    assert {len(group) for group in records.captions} <= {5, 6}
    assert vocabulary.decode(records.captions[0][0]).split() == prepare.tokenize(records.texts[0][0])


def test_the_next_commands_are_filled_in(root, capsys, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    spaced = root.rename(root.with_name("my birds"))
    prepare.main(["folder", "--root", str(spaced)])
    encoders, gan = (line.split() for line in capsys.readouterr().out.splitlines()[-3:-1])
    pretrain = "python pretrain_DAMSM.py --cfg cfg/DAMSM/folder.yml --data-dir"
    assert " ".join(encoders) == f"{pretrain} '{spaced}' --set TRAIN.BATCH_SIZE 8"
    assert (
        " ".join(gan) == f"python main.py --cfg cfg/folder_projected.yml --data-dir '{spaced}' --set TRAIN.BATCH_SIZE 8"
    )

    # A second data set of one's own: its encoders do not meet those of the first.
    Path("DAMSMencoders/folder").mkdir(parents=True)
    Path("DAMSMencoders/folder/best.pth").touch()
    encoders, gan = prepare.next_commands("folder", Path("data/second"), 500)
    assert encoders.endswith("--out DAMSMencoders/second --data-dir data/second")
    assert gan.endswith("--data-dir data/second --set TEXT.DAMSM_NAME DAMSMencoders/second/best.pth")
    assert prepare.next_commands("birds", Path("data/birds"), 8855)[1] == "python main.py --cfg cfg/bird.yml"


def test_verify_says_so_when_all_is_well(root, capsys):
    prepare.main(["folder", "--root", str(root), "--verify"])
    assert "verified: all 6 images can be read" in capsys.readouterr().out


def test_images_outside_the_data_folder_are_reached_through_a_link(root, tmp_path_factory, capsys):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "photos"
    (root / "images").rename(elsewhere)
    for _ in range(2):
        prepare.main(["folder", "--root", str(root), "--images", str(elsewhere)])
    records, _ = load_records("folder", root, "train")
    assert [path.name for path in records.image_paths] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert records.image_paths[0].parent == root / "linked_images" and records.image_paths[0].is_file()


@pytest.mark.parametrize("option", [["--seed", "-1"], ["--seed", str(2**32)]])
def test_a_seed_that_no_draw_can_use(root, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(["folder", "--root", str(root), *option])
    assert stopped.value.code == 2 and "argument --seed: must" in capsys.readouterr().err


def test_sizes_of_toybirds_are_positive(tmp_path, capsys):
    for option in ("--train-size", "--test-size", "--image-size"):
        with pytest.raises(SystemExit):
            prepare.main(["toybirds", "--root", str(tmp_path), option, "-5"])
        assert "must be at least 1" in capsys.readouterr().err


def test_words_that_lose_letters_are_named(root, capsys, caplog):
    with (root / "captions.csv").open("a", encoding="utf-8") as file:
        file.write("0.jpg,ein grüner Vogel über 鳥\n")
    with caplog.at_level(logging.WARNING):
        prepare.main(["folder", "--root", str(root)])
    assert (
        "3 words lose letters outside ASCII, as in AttnGAN: grüner -> grner, über -> ber, 鳥 -> nothing" in caplog.text
    )
    assert "TEXT.ENCODER clip" in caplog.text


def test_captions_without_latin_letters_are_called_that(root, capsys, caplog):
    rows = [f"{number}.jpg,赤い鳥{'！' * number}" for number in range(6)]
    (root / "captions.csv").write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    with pytest.raises(DataError, match="6 captions hold no word in Latin letters or digits, e.g. '赤い鳥") as error:
        prepare.main(["folder", "--root", str(root)])
    assert "fit none" not in str(error.value)
    rows[0] = "0.jpg,a bird"
    rows[5] = "5.jpg,another bird"
    (root / "captions.csv").write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    (root / "train.txt").write_text("0\n")
    (root / "test.txt").write_text("5\n")
    prepare.main(["folder", "--root", str(root)])
    assert "4 captions without a word in Latin letters or digits are left out" in caplog.text


def test_half_a_character_in_a_caption_is_one_line(root):
    lines = [json.dumps({"image": f"{number}.jpg", "caption": "a bird \ud800"}) for number in range(6)]
    (root / "captions.csv").unlink()
    (root / "captions.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="is not UTF-8; rename the file, or write the caption anew"):
        prepare.main(["folder", "--root", str(root)])
    assert not (root / "train.jsonl").exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"image": "0.jpg", "caption": "\xff"}', b"9" * 5000])
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.json"])
def test_json_that_is_none_is_one_line(root, content, name):
    (root / "captions.csv").unlink()
    (root / name).write_bytes(content)
    with pytest.raises(DataError, match=r"captions\.json|no captions found"):
        prepare.main(["folder", "--root", str(root), "--captions", str(root / name)])


# Files that are not ours


@pytest.mark.parametrize("name", ["train.jsonl", "val.jsonl", "test.jsonl", "vocabulary.json"])
def test_files_of_the_user_are_kept(root, name, capsys):
    own = json.dumps({"image": "0.jpg", "caption": "mine"}) + "\n"
    (root / name).write_text(own)
    with pytest.raises(DataError, match=rf"{name}: is not a layout('s vocabulary)?; rename it"):
        prepare.main(["folder", "--root", str(root)])
    assert (root / name).read_text() == own and not list(root.glob("t*.jsonl"))[int(name[0] == "t") :]

    # Layouts of former builds, and empty files, are replaced or go.
    (root / name).unlink()
    for _ in range(2):
        prepare.main(["folder", "--root", str(root)])
        (root / "val.jsonl").touch()
    assert len(load_records("folder", root, "train")[0]) == 4
    capsys.readouterr()


def test_captions_are_not_read_from_a_file_that_is_replaced(root, capsys):
    prepare.main(["folder", "--root", str(root)])
    before = (root / "train.jsonl").read_text()
    for name in (str(root / "train.jsonl"), "train.jsonl"):
        with pytest.raises(DataError, match="train.jsonl: prepare writes or removes a file of this name; rename it"):
            prepare.main(["folder", "--root", str(root), "--captions", name])
    assert (root / "train.jsonl").read_text() == before
    capsys.readouterr()


def test_images_beside_the_current_folder(root, capsys, monkeypatch):
    (root / "data").mkdir()
    (root / "images").rename(root / "pics")
    (root / "captions.csv").rename(root / "data" / "captions.csv")
    monkeypatch.chdir(root / "data")
    prepare.main(["folder", "--root", ".", "--images", "../pics", "--test-fraction", "0.5"])
    records, _ = load_records("folder", Path("."), "train")
    assert len(records) == 3 and records.image_paths[0].parent == Path("linked_images")
    assert all(path.is_file() for path in records.image_paths)
    capsys.readouterr()


def test_an_image_whose_name_is_not_utf8_is_one_line(root):
    name = os.fsdecode(b"images/caf\xe9.jpg")
    (root / "images" / "0.jpg").rename(root / name)
    (root / "captions.csv").unlink()
    for path in (root / "images").iterdir():
        path.with_suffix(".txt").write_text("a dog\n")
    for split in ("train", "test"):  # a seeded split
        (root / f"{split}.txt").unlink()
    with pytest.raises(DataError, match=r"caf\\udce9.* is not UTF-8; rename the file"):
        prepare.main(["folder", "--root", str(root)])
    assert not (root / "train.jsonl").exists()
