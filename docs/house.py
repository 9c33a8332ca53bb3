"""Draws the house as docs/house.svg: rooms, files, and who imports whom: `python docs/house.py`.

Reads the sources with ast and imports nothing of the project, so it runs on a bare Python.
"""

import argparse
import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("miscc", "models", "datasets", "sampling", "eval", "training", "serve", "bench")
ENTRY_SCRIPTS = ("main.py", "pretrain_DAMSM.py")
ENTRANCE = "entry scripts"  # drawn like a room

# Sizes in pixels.
WIDTH, MARGIN, GAP = 1180, 24, 56  # of the picture; GAP between two floors, where the arrows are
COLUMN, LINE, TITLE = 166, 16, 34  # a column of files, a line of text, the head of a room
MIN_LINES = 9  # in a column; longer where a floor would be too wide


@dataclass(frozen=True)
class Room:
    """One folder of the top level, or the entry scripts together.

    name: the folder's name
    files: paths within the room, sub-folders included, without those of one line: a package file
    imports: names of the other rooms that its files import
    """

    name: str
    files: tuple[str, ...]
    imports: frozenset[str]


def read_rooms(root: Path = ROOT) -> dict[str, Room]:
    """{name: room} for every folder of ROOMS that exists, and the entry scripts."""
    present = [name for name in ROOMS if (root / name).is_dir()]
    rooms = {}
    for name in present:
        rooms[name] = _read_room(name, root / name, sorted((root / name).rglob("*.py")), present)

    # The entry scripts together, as one more room.
    scripts = [root / script for script in ENTRY_SCRIPTS if (root / script).is_file()]
    rooms[ENTRANCE] = _read_room(ENTRANCE, root, scripts, present)
    return rooms


def _read_room(name: str, folder: Path, paths: Iterable[Path], known: Iterable[str]) -> Room:
    files, imports = [], set()
    for path in paths:
        # A package file of one line says no more than its folder's name.
        source = path.read_text(encoding="utf-8")
        if len(source.splitlines()) > 1:
            files.append(path.relative_to(folder).as_posix())
        imports |= {module.split(".")[0] for module in _imported_modules(source)}
    return Room(name, tuple(files), frozenset(imports & set(known) - {name}))


def _imported_modules(source: str) -> Iterator[str]:
    """The modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def floors(rooms: Mapping[str, Room]) -> list[list[str]]:
    """The rooms by height: a room stands one floor above the highest room that it imports. Lowest floor first."""
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 0  # ends the recursion if two rooms import each other
            heights[name] = 1 + max((height(other) for other in rooms[name].imports), default=-1)
        return heights[name]

    # Every room has its height; group by it.
    for name in rooms:
        height(name)
    return [[name for name in rooms if heights[name] == level] for level in range(1 + max(heights.values()))]


def direct_imports(rooms: Mapping[str, Room]) -> list[tuple[str, str]]:
    """(importing, imported) pairs without those that a longer way implies: eval -> sampling -> miscc hides eval -> miscc."""

    def reachable(name: str, seen: set[str]) -> set[str]:
        for other in rooms[name].imports - seen:
            seen.add(other)
            reachable(other, seen)
        return seen

    # An arrow for each import that no detour implies.
    pairs = []
    for name, room in rooms.items():
        for other in sorted(room.imports):
            implied = any(other in reachable(between, set()) for between in room.imports - {other})
            if not implied:
                pairs.append((name, other))
    return pairs


@dataclass(frozen=True)
class Box:
    """Where a room is drawn: left upper corner and size, in pixels."""

    x: float
    y: float
    width: float
    height: float


def place(rooms: Mapping[str, Room]) -> dict[str, Box]:
    """A box for each room: the floors stacked with the entry scripts on top, the rooms of a floor side by side."""
    boxes, y = {}, float(MARGIN)
    num_lines = column_length(rooms)
    for names in reversed(floors(rooms)):
        # Equal gaps between the rooms of a floor.
        sizes = {name: _box_size(rooms[name], num_lines) for name in names}
        free = WIDTH - 2 * MARGIN - sum(width for width, _ in sizes.values())
        space = free / (len(names) + 1)
        x = MARGIN + space
        for name, (width, height) in sizes.items():
            boxes[name] = Box(x, y, width, height)
            x += width + space
        y += max(height for _, height in sizes.values()) + GAP
    return boxes


def column_length(rooms: Mapping[str, Room]) -> int:
    """The smallest number of lines a column with which every floor fits the picture's width."""
    num_lines = MIN_LINES
    while True:
        # Longer columns are fewer, so a floor becomes narrower.
        widths = [sum(_box_size(rooms[name], num_lines)[0] + MARGIN for name in names) for names in floors(rooms)]
        if max(widths) + MARGIN <= WIDTH or num_lines > max(len(room.files) for room in rooms.values()):
            return num_lines
        num_lines += 1


def _box_size(room: Room, num_lines: int) -> tuple[float, float]:
    columns = list(_columns(room, num_lines))
    return len(columns) * COLUMN + 16, TITLE + max(map(len, columns)) * LINE + 10


def _columns(room: Room, num_lines: int) -> Iterator[list[str]]:
    """The room's files in columns of num_lines, those of sub-folders last."""
    names = sorted(room.files, key=lambda name: (name.count("/"), name))
    for start in range(0, len(names), num_lines):
        yield names[start : start + num_lines]


def draw(rooms: Mapping[str, Room]) -> str:
    """The picture as SVG."""
    boxes = place(rooms)
    height = max(box.y + box.height for box in boxes.values()) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#555"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>',
    ]

    # Arrows first, so that a room covers the end of a line that would run into it.
    parts += [_arrow(boxes[importing], boxes[imported]) for importing, imported in direct_imports(rooms)]
    num_lines = column_length(rooms)
    for name, box in boxes.items():
        parts += _draw_room(rooms[name], box, num_lines)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_room(room: Room, box: Box, num_lines: int) -> Iterator[str]:
    yield (
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="6" '
        f'fill="#f4f7fb" stroke="#345"/>'
    )

    # The room's name.
    title = room.name if room.name == ENTRANCE else f"{room.name}/"
    yield (
        f'<text x="{box.x + 12:.0f}" y="{box.y + 21:.0f}" font-size="15" font-weight="bold" fill="#123">{title}</text>'
    )

    # Its files.
    for index, names in enumerate(_columns(room, num_lines)):
        x = box.x + 12 + index * COLUMN
        for row, name in enumerate(names):
            y = box.y + TITLE + row * LINE + 10
            yield f'<text x="{x:.0f}" y="{y:.0f}" font-size="11" fill="#222">{escape(name)}</text>'


def _arrow(importing: Box, imported: Box) -> str:
    """From the lower edge of the importing room to the upper edge of the imported one."""
    # Straight down where the rooms overlap enough, else from middle to middle.
    overlap = max(importing.x, imported.x), min(importing.x + importing.width, imported.x + imported.width)
    if overlap[0] + 40 < overlap[1]:
        start = end = sum(overlap) / 2
    else:
        start, end = importing.x + importing.width / 2, imported.x + imported.width / 2
    return (
        f'<line x1="{start:.0f}" y1="{importing.y + importing.height:.0f}" x2="{end:.0f}" y2="{imported.y - 2:.0f}" '
        f'stroke="#555" stroke-width="1.5" marker-end="url(#head)"/>'
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw rooms, files and imports of this project as an SVG.")
    parser.add_argument("--out", default=ROOT / "docs" / "house.svg", type=Path, metavar="FILE", help="the picture")
    out = parser.parse_args(arguments).out
    out.write_text(draw(read_rooms()), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
