"""The drawing of the house (docs/house.py): its rooms are those of the import test, and its arrows follow the imports."""

import xml.etree.ElementTree as ElementTree

import pytest
from test_imports import ROOMS, ROOT

from docs import house

SVG = "{http://www.w3.org/2000/svg}"


def words_of(svg):
    return {"".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}


@pytest.fixture
def small_house(tmp_path):
    """miscc <- models <- eval, where eval imports miscc, too, inside a function; and an entry script."""
    files = {
        "miscc/images.py": '"""Images."""\nimport numpy\n',
        "models/ssa_gan.py": '"""SSA-GAN."""\nfrom miscc.images import save_image\nfrom models import layers\n',
        "eval/FID.py": '"""FID."""\nimport models\ndef f():\n    from miscc import images\n',
        "main.py": '"""Entry."""\nimport eval.FID\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return house.read_rooms(tmp_path)


def test_files_and_imports_are_read(small_house):
    assert small_house["eval"].files == ("FID.py",)
    assert small_house["eval"].imports == {"models", "miscc"}
    assert small_house["models"].imports == {"miscc"} and not small_house["miscc"].imports
    assert small_house[house.ENTRANCE].imports == {"eval"}


def test_a_room_stands_above_what_it_imports_and_implied_arrows_are_left_out(small_house):
    assert house.floors(small_house) == [["miscc"], ["models"], ["eval"], [house.ENTRANCE]]
    pairs = set(house.direct_imports(small_house))
    assert pairs == {("models", "miscc"), ("eval", "models"), (house.ENTRANCE, "eval")}


def test_every_file_is_drawn_inside_its_room(small_house):
    drawing = ElementTree.fromstring(house.draw(small_house))
    assert {"FID.py", "ssa_gan.py", "images.py", "main.py"} <= words_of(house.draw(small_house))
    assert len(list(drawing.iter(f"{SVG}line"))) == 3
    boxes = house.place(small_house)
    assert boxes["eval"].y + boxes["eval"].height < boxes["models"].y


def test_no_two_rooms_overlap_and_all_lie_within_the_picture():
    boxes = list(house.place(house.read_rooms()).values())
    for index, box in enumerate(boxes):
        assert 0 < box.x and box.x + box.width < house.WIDTH
        for other in boxes[index + 1 :]:
            beside = box.x + box.width <= other.x or other.x + other.width <= box.x
            assert beside or box.y + box.height <= other.y or other.y + other.height <= box.y


def test_the_rooms_are_those_whose_imports_are_checked():
    present = {room for room in ROOMS if (ROOT / room).is_dir()}
    assert set(house.read_rooms()) == present | {house.ENTRANCE}
    assert set(house.ROOMS) == set(ROOMS)


def test_the_committed_drawing_is_what_the_command_draws_now(tmp_path, capsys):
    house.main(["--out", str(tmp_path / "house.svg")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "house.svg")
    drawn = (tmp_path / "house.svg").read_text(encoding="utf-8")
    assert {room for room in ROOMS if (ROOT / room).is_dir()} <= {word.rstrip("/") for word in words_of(drawn)}
    committed = (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")
    assert committed == drawn, "a file or an import was added or removed: run `make house`"
