"""The server under load, over HTTP on the loopback: `python -m bench.serve --checkpoint CKPT`.

Starts `python -m serve --no-page`, asks for one image after the other, then for many at once, then sends malformed requests,
and reads the server's memory in between. Also used by tests: `malformed` makes requests that a server must refuse.
"""

import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import common
from miscc.command_line import positive
from miscc.errors import UserError, run_command

IMAGES = "/api/v1.0/images"
JSON = {"Content-Type": "application/json"}
WORDS = (
    "a small red bird with black wings and yellow blue white brown grey crown belly beak on green background".split()
)


def main(words: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="what to serve")
    parser.add_argument("--requests", type=positive, default=1000, metavar="N", help="at once, in all")
    parser.add_argument("--clients", type=positive, default=50, metavar="N", help="that ask at once")
    parser.add_argument("--alone", type=positive, default=200, metavar="N", help="requests one at a time")
    parser.add_argument("--malformed", type=positive, default=1000, metavar="N", help="malformed requests")
    options = parser.parse_args(words)
    device = common.start(options)
    results = {"machine": common.machine(device)} | measure(options)
    common.report(options, results, _text(results, options))


def measure(options) -> dict[str, Any]:
    """Every figure, from a server of its own."""
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "serve", "--checkpoint", options.checkpoint, "--no-page", "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            # Its first line names the port, once it answers.
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line.startswith("http"):
                errors.seek(0)
                raise UserError(f"the server did not start: {errors.read().decode()[-500:].strip()}")
            port = int(line.split(":")[2].split("/")[0])
            ask_many(port, 100, options.clients)  # warm: buffers, threads, the allocator

            # One after the other, many at once, malformed ones; memory in between.
            alone = ask_many(port, options.alone, 1)
            start = resident_bytes(server.pid)
            together = ask_many(port, options.requests, options.clients)
            grown = resident_bytes(server.pid) - start
            refused = refuse_many(port, options.malformed)
            after = resident_bytes(server.pid) - start
        finally:
            server.terminate()
            server.wait(60)
        errors.seek(0)
        logged = errors.read().decode()
    return {
        "alone": alone, "together": together, "refused": refused, "grown_bytes": grown, "grown_with_malformed_bytes": after,
        "tracebacks": logged.count("Traceback"), "exit_code": server.returncode,
    }  # fmt: skip


def ask_many(port: int, requests: int, clients: int) -> dict[str, Any]:
    """So many requests of one image, each with a seed of its own, by so many clients at once."""
    seconds, lost, lock = [], [], threading.Lock()
    seeds = iter(range(requests))

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            with lock:
                seed = next(seeds, None)
            if seed is None:
                connection.close()
                return

            # A caption and seed of its own, so that no answer comes from a cache.
            rng = random.Random(seed)
            body = json.dumps({"captions": [" ".join(rng.choices(WORDS, k=8))], "seed": seed, "format": "png"})
            start = time.perf_counter()
            connection.request("POST", IMAGES, body, JSON)
            response = connection.getresponse()
            content = response.read()
            spent = time.perf_counter() - start
            with lock:
                seconds.append(spent)
                if response.status != 200 or not content.startswith(b"\x89PNG"):
                    lost.append((response.status, content[:200].decode("latin-1")))

    # All clients at once; the rate counts from the first request to the last answer.
    start = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = time.perf_counter() - start
    return {
        "requests": len(seconds), "clients": clients, "lost": lost[:5], "num_lost": len(lost),
        "p50_ms": 1000 * float(np.percentile(seconds, 50)), "p95_ms": 1000 * float(np.percentile(seconds, 95)),
        "images_per_second": (len(seconds) - len(lost)) / total,
    }  # fmt: skip


def refuse_many(port: int, number: int) -> dict[str, Any]:
    """Malformed requests: how many of each status, and those that were not refused with a reason."""
    rng, counts, wrong = random.Random(0), {}, []
    for _ in range(number):
        method, path, body, headers = malformed(rng)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        counts[response.status] = counts.get(response.status, 0) + 1

        # Refused means 4xx and a reason, never a traceback.
        if not 400 <= response.status < 500 or b"Traceback" in content or not _reason(content):
            wrong.append((response.status, method, path, str(body)[:200], content[:200].decode("latin-1")))
    return {"counts": dict(sorted(counts.items())), "wrong": wrong[:5], "num_wrong": len(wrong)}


def _reason(content: bytes) -> bool:
    try:
        return bool(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return False


def malformed(rng: random.Random) -> tuple[str, str, bytes | None, dict[str, str]]:
    """A request that must be refused: (method, path, body, headers), a function of the generator's state."""
    path = rng.choice([IMAGES, "/api/v1.0/bird", "/api/v1.0/birds"])
    return rng.choice([_bad_address, _bad_bytes, _bad_values, _bad_values, _bad_headers])(rng, path)


def _bad_address(rng: random.Random, path: str):
    nowhere = [
        f"/{rng.randbytes(6).hex()}",
        "/api/v1.0/images/../../etc/passwd",
        "/images/%00.png",
        "/api/v2/bird",
        path + "/x",
    ]

    # A method that is not allowed, or a path that is not there.
    if rng.random() < 0.5:
        return rng.choice(["GET", "PUT", "DELETE", "PATCH", "TRACE", "BREW"]), path, None, {}
    return rng.choice(["GET", "POST"]), rng.choice(nowhere), None, {}


def _bad_bytes(rng: random.Random, path: str):
    whole = json.dumps({"captions": ["a red bird"], "caption": "a red bird"}).encode()

    # Cut off, nested deeply, in another encoding, too large, or no JSON.
    body = rng.choice([
        b"", rng.randbytes(rng.randrange(1, 300)), whole[: rng.randrange(1, len(whole))], b"[" * rng.randrange(1, 20_000),
        b'{"a":' * 5000, whole + b"}", b"\xff\xfe" + whole, b"null", b"[]", b'"a red bird"', b"1e999", b"x" * 70_000,
        b'{"captions": ["a \\ud800 bird"], "caption": "a \\udfff bird"}',
    ])  # fmt: skip
    return "POST", path, body, JSON


def _bad_values(rng: random.Random, path: str):
    strange = [
        None,
        True,
        -1,
        1.5,
        2**70,
        "",
        "  ",
        "zyzzyva qwerty",
        "a\x00b",
        [],
        {},
        ["a bird", 3],
        "é" * 600,
        float("nan"),
    ]
    if path != IMAGES:
        return "POST", path, json.dumps({"caption": rng.choice(strange)}).encode(), JSON

    # One value of an otherwise good request.
    content: dict[str, Any] = {"captions": ["a red bird"], "n": 1, "seed": 0}
    wrong: dict[str, list[Any]] = {
        "captions": [*strange, ["a bird"] * 65, [["a bird"]]], "n": [0, 17, -5, "1", None, 2.5, []],
        "seed": [-1, 2**32, "0", None, 0.5, float("inf")], "truncation": [0, -1, 6, "1", float("nan"), [], True],
        "masks": ["yes", 1, None], "format": ["gif", 1, None, "PNG", []], "model": ["none", 1, []], "steps": [1],
    }  # fmt: skip
    key = rng.choice(list(wrong))
    content[key] = rng.choice(wrong[key])
    return "POST", path, json.dumps(content).encode(), JSON


def _bad_headers(rng: random.Random, path: str):
    body = json.dumps({"captions": ["a red bird"], "caption": "a red bird"}).encode()
    kind = rng.choice(
        ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "image/png", "x"]
    )

    # Another type of content, another host, a length that nothing follows.
    return rng.choice([
        ("POST", path, body, {"Content-Type": kind}),
        ("POST", path, body, JSON | {"Host": f"{rng.randbytes(4).hex()}.example"}),
        ("POST", path, None, JSON | {"Content-Length": "99999999999"}),
    ])  # fmt: skip


def resident_bytes(pid: int) -> int:
    """The memory that a process holds (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise UserError(f"/proc/{pid}/status: names no VmRSS; this is for Linux")


def _text(results: dict[str, Any], options) -> str:
    alone, together, refused = results["alone"], results["together"], results["refused"]

    # Served requests as a table, the rest in sentences.
    rows = [
        [name, row["clients"], row["requests"], row["num_lost"], f"{row['p50_ms']:.0f}", f"{row['p95_ms']:.0f}",
         f"{row['images_per_second']:.1f}"]
        for name, row in (("one at a time", alone), ("together", together))
    ]  # fmt: skip
    header = ["requests of one image", "clients", "requests", "lost", "p50 ms", "p95 ms", "images/s"]
    statuses = ", ".join(f"{number} times {status}" for status, number in refused["counts"].items())
    return (
        f"# The server under load\n\n{common.machine_line(results['machine'])}; server and clients share it. "
        f"{Path(options.checkpoint).name}.\n\n{common.markdown_table(header, rows)}\n"
        f"Memory grew by {results['grown_bytes'] / 2**20:.1f} MB during the requests together, by "
        f"{results['grown_with_malformed_bytes'] / 2**20:.1f} MB with the malformed ones.\n\n"
        f"Malformed requests: {statuses}; {refused['num_wrong']} without a 4xx and a reason; {results['tracebacks']} "
        f"tracebacks in the server's log; exit code {results['exit_code']} on SIGTERM.\n"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    run_command(main)
