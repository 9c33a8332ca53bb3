"""`make faults N=500 SEED=1`: faults at seeded random moments of small trainings, which must end as if undisturbed.

Each training is hit several times, goes on with --resume after each fault, and must reach the weights of a training that
nothing disturbed, bit for bit. The seed chooses kinds, places and moments; a moment with a delay is as exact as the
machine is even (see `Moment`).
"""

import argparse
import collections
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process that starts threads cannot be forked safely

import torch  # noqa: E402

torch.set_num_threads(1)

from faults.harness import Outcome, chosen_kinds, each_kind, run_case, small_disk  # noqa: E402
from faults.kinds import KINDS  # noqa: E402
from faults.trainings import Material, quicken  # noqa: E402

from miscc.command_line import CommandParser, not_negative, positive  # noqa: E402
from miscc.progress import ProgressBar  # noqa: E402

MOST_TRIALS = 5  # of a kind that came too late


def table(outcomes: list[Outcome]) -> str:
    """Markdown: faults by kind, how many came in time, how many were wrong."""
    rows = ["| kind | faults | came too late | wrong |", "|---|---|---|---|"]
    counts = collections.Counter((o.kind, o.struck, bool(o.wrong)) for o in outcomes)
    for kind in KINDS:
        struck, late = (counts[kind, struck, False] + counts[kind, struck, True] for struck in (True, False))
        wrong = counts[kind, True, True] + counts[kind, False, True]
        if struck + late:
            rows.append(f"| {kind} | {struck} | {late} | {wrong} |")
    return "\n".join(rows)


def cases(
    options: argparse.Namespace, names: Sequence[str], outcomes: Sequence[Outcome]
) -> Iterator[tuple[int, list[str]]]:
    """(number, kinds) of one case after the other, without end unless --each or --case was given.

    outcomes: of the cases so far. Which faults come too late depends on the machine's speed: with --each such a kind is
    tried again in trainings of its own, so that each comes on every machine.
    """
    if options.each:
        yield from enumerate(each_kind(names, Random(f"{options.seed}-each")))
        for trial in range(MOST_TRIALS):
            struck = {outcome.kind for outcome in outcomes if outcome.struck}
            yield from ((100 * (trial + 1) + n, [name]) for n, name in enumerate(names) if name not in struck)
        return
    for case in itertools.count() if options.case is None else (options.case,):
        yield case, chosen_kinds(names, Random(f"{options.seed}-{case}"))


def main() -> int:
    parser = CommandParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--number", type=positive, default=100, metavar="N", help="apply at least so many faults")
    parser.add_argument("--seed", type=not_negative, default=1, metavar="N", help="chooses kinds and moments")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"of these alone: {', '.join(KINDS)}")
    parser.add_argument("--case", type=not_negative, metavar="N", help="run this case of the seed alone, again")
    parser.add_argument("--minutes", type=positive, metavar="N", help="begin no further training after so many minutes")
    parser.add_argument("--each", action="store_true", help="apply each kind, mostly once, instead of --number")
    options = parser.parse_args()
    names, started = options.kinds or list(KINDS), time.monotonic()

    # What all cases share, and a disk that can be filled, where root may mount one.
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    quicken()
    material = Material(folder / "shared", options.seed)
    outcomes: list[Outcome] = []
    num_trainings = 0
    print(f"files of what goes wrong, and table.md with the counts so far: {folder}", flush=True)
    with small_disk(folder / "disk") as disk, ProgressBar(what="faults", total=options.number, unit="faults") as bar:
        for case, kinds in cases(options, names, outcomes):
            rng = Random(f"{options.seed}-{case}-disk")
            disk_of_case = disk if "disk full" in kinds else rng.choice((disk, None))
            found = run_case(material, folder / f"case{case}", disk_of_case, kinds, f"{options.seed}-{case}-faults")
            outcomes += found
            num_trainings += 1
            bar.update(min(options.number, sum(o.struck for o in outcomes)) - bar.done)

            # The counts so far, for people who cannot wait; what is wrong, at once; and whether it is enough.
            (folder / "table.md").write_text(table(outcomes) + "\n")
            if wrong := found[-1].wrong:
                again = f"--each --kinds {' '.join(map(repr, kinds))}" if options.each else f"--case {case}"
                print(f"seed {options.seed}, {again} ({', '.join(o.kind for o in found)}): {wrong}")
                print(f"  its files: {folder / f'case{case}'}", flush=True)
            if not options.each and sum(o.struck for o in outcomes) >= options.number:
                break
            if options.minutes and time.monotonic() - started > 60 * options.minutes:
                break

    # What went well leaves nothing.
    if not any(outcome.wrong for outcome in outcomes):
        shutil.rmtree(folder)

    # The counts.
    print(table(outcomes))
    struck, wrong = sum(o.struck for o in outcomes), sum(bool(o.wrong) for o in outcomes)
    seconds = time.monotonic() - started
    print(f"{struck} faults in {num_trainings} trainings, seed {options.seed}, {seconds:.0f} s: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
