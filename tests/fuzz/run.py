"""`make fuzz N=5000 SEED=1`: seeded odd inputs, in one process, each within 20 seconds and 3 GB; nothing may be changed.

A case must succeed or end in a UserError of one line, or in an OSError that names a file, which commands print as one line.
"""

import argparse
import collections
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzz import server  # noqa: E402
from fuzz.cases import KINDS  # noqa: E402

from miscc.errors import UserError  # noqa: E402

SECONDS, BYTES = 20, 3 << 30  # of a case; beside what the process has when it starts


class TooLongError(BaseException):
    """A case took longer than SECONDS. No Exception: broad handlers must not take it for a damaged file."""


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path)] = (about.st_size, about.st_mtime_ns)
    return found


def outcome(kind: str, seed: str, folder: Path) -> str:
    """What becomes of one case: "success", "refused", or what is wrong."""
    call = KINDS[kind][0](random.Random(seed), folder)
    before = state(folder)
    LIMIT.start()
    try:
        call()
        result = "success"
    except UserError as error:
        text = str(error)
        result = "refused" if text and len(text) < 3000 else f"message of {len(text)} characters"
    except OSError as error:
        result = "refused" if error.filename is not None else _place(error)
    except (TooLongError, Exception) as error:
        result = _place(error)
    finally:
        signal.alarm(0)
    return result if state(folder) == before else "changed a file"


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frame = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:100]!r}"


class Limit:
    """Ends a case after SECONDS, not counting the time in which other processes had its core (where the system tells it)."""

    def __init__(self):
        self.began = 0.0

    def start(self) -> None:
        self.began = self._own_time()
        signal.alarm(SECONDS)

    def stop(self, *_: object) -> None:
        """For SIGALRM. Raises TooLongError, or gives the case what it has left."""
        left = SECONDS - (self._own_time() - self.began)
        if left < 1:
            raise TooLongError
        signal.alarm(round(left))

    @staticmethod
    def _own_time() -> float:
        """Seconds of a clock that stands still while this thread waits for a core."""
        try:
            waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            waited = 0.0
        return time.monotonic() - waited


LIMIT = Limit()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="end after so many, with what there is by then"
    )
    options = parser.parse_args()

    # Limits, and silence.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    signal.signal(signal.SIGALRM, LIMIT.stop)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    # What cannot be tried here; the other kinds get the same inputs as elsewhere.
    skipped = {"http"} if server.is_missing() else set()
    if skipped:
        print("http: skipped, the server's extras are missing (pip install -r requirements-serve.txt)", flush=True)

    # The cases.
    names = [options.kind] if options.kind else [name for name, (_, weight) in KINDS.items() for _ in range(weight)]
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    started = time.monotonic()
    for number in range(options.number):
        if time.monotonic() - started > 60 * options.minutes:
            break
        seed = f"{options.seed}-{number}"
        kind = random.Random(f"kind-{seed}").choice(names)
        if kind in skipped:
            counts[kind, "skipped"] += 1
            continue
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            found = outcome(kind, f"{kind}-{seed}", folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if found not in ("success", "refused") and not counts[kind, found]:
            print(f"{kind} {kind}-{seed}: {found}", flush=True)
        counts[kind, found] += 1

    # The table.
    for kind in [kind for kind in KINDS if kind not in skipped]:
        rows = {found: count for (name, found), count in counts.items() if name == kind}
        bad = sum(rows.values()) - rows.get("success", 0) - rows.get("refused", 0)
        print(f"{kind:<14} {sum(rows.values()):6} inputs: {rows.get('success', 0):6} read, {rows.get('refused', 0):6} "
              f"refused, {bad} wrong")  # fmt: skip
    total_bad = sum(count for (_, found), count in counts.items() if found not in ("success", "refused", "skipped"))
    tried = sum(counts.values()) - counts["http", "skipped"]
    print(f"{tried} inputs, seed {options.seed}, {time.monotonic() - started:.0f} s: {total_bad} wrong")
    return 1 if total_bad else 0


if __name__ == "__main__":
    sys.exit(main())
