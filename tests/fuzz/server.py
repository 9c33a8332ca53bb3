"""The fuzzer's kind of requests to the server: its whole app in this process, without a socket."""

import asyncio
import functools
import importlib.util
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.odd import ODD, WORDS, Call, mutated, odd_json

from miscc.errors import UserError

PATHS = ["/api/v1.0/images", "/api/v1.0/images", "/api/v1.0/images", "/api/v1.0/bird", "/api/v1.0/birds"]
OTHERS = [
    "/", "/health", "/version", "/metrics", "/openapi.json", "/favicon.ico", "/images/x.png", "/images/../x", "/images/%2e%2e",
    "/api/v1.0", "/api/v1.0/images/", "/page/", "//", "/images/\0", "/\xff", "/" + "x" * 9000, "",
]  # fmt: skip
MEANT = (200, 201, 204, 307)  # besides them 4xx with a reason


def is_missing() -> bool:
    """Whether the server's extras are not installed."""
    return not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn"))


@functools.cache
def app(token: str) -> Any:
    """The whole app but the page, around a tiny model. Its thread and its folder end with the process."""
    from tiny_models import tiny_pipeline

    from serve.app import Settings, build_app
    from serve.torch_model import TorchModel

    folder = tempfile.TemporaryDirectory(prefix="fuzz-server-")
    built, studio = build_app(
        {"x": TorchModel("x", tiny_pipeline())}, Settings(page=False, token=token), Path(folder.name)
    )
    built.of_fuzzer = (folder, studio)  # as long as the app
    return built


async def ask(guarded: Any, scope: dict[str, Any], chunks: list[bytes]) -> tuple[int, dict[bytes, bytes], bytes]:
    """(status, headers, body) of a request whose body comes in chunks."""
    sent: list[dict[str, Any]] = []
    waiting = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop(0)
        await asyncio.sleep(3600)  # the client waits for the answer
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await guarded(scope, receive, send)
    start = sent[0]
    return start["status"], dict(start.get("headers", ())), b"".join(one.get("body", b"") for one in sent[1:])


def _body(rng: random.Random, path: str) -> bytes:
    """What a client sends: fields that are right, odd ones among them, any JSON, or none."""
    words = WORDS if rng.random() < 0.3 else ["red", "bird", "small"]
    captions = [" ".join(rng.choices(words, k=rng.choice([0, 1, 4, 4, 300]))) for _ in range(rng.choice([1, 1, 2, 70]))]
    content: dict[str, Any] = {"captions": captions} if path.endswith("images") else {"caption": captions[0]}
    if rng.random() < 0.5:
        content |= {"n": 1, "seed": 3, "truncation": 0.5, "masks": False, "format": "json", "model": "x"}
    for _ in range(rng.choice([0, 1, 2])):
        odd = rng.choice([odd_json(rng), 2**70, -1, 1e308, float("nan"), "1", True, "zip", "png", [odd_json(rng)] * 3])
        content[rng.choice([*content, rng.choice(ODD)])] = odd

    # As bytes: damaged, deep, long, in another coding.
    text = json.dumps(content).encode() if rng.random() < 0.9 else json.dumps(odd_json(rng)).encode()
    kind = rng.random()
    if kind < 0.2:
        text = mutated(rng, text)
    elif kind < 0.3:
        text = rng.choice([
            b"[" * 60_000, b'{"captions":' * 4000, b"9" * 50_000, b"x" * 70_000, b"", b"\xff\xfe\x00", b"NaN", b"-0", 
            b'"\\ud800"', b'{"captions": ["\\ud800 bird"]}', b'{"captions": ["a\\u0000bird"]}', b'{"n": ' + b"9" * 5000 + b"}",
            json.dumps(content).encode("utf-16"), b"captions=a+bird", b'{"captions": ["red"], "captions": 3}',
            b'{"captions": ["red bird"], "seed": 1e999}', b'{"captions": ["red bird"], "n": 1E400}',
        ])  # fmt: skip
    return text


def http(rng: random.Random, folder: Path) -> Call:
    """A request to the server: 200 and the like, or 4xx with a reason."""
    path = rng.choice([*PATHS * 9, *OTHERS])
    method = rng.choice(["POST"] * 60 + ["GET", "PUT", "HEAD", "OPTIONS", "DELETE", "post", "X" * 50])
    body = _body(rng, path)
    headers = [(b"host", rng.choice([b"127.0.0.1"] * 90 + [b"evil.example", b"", b"[::1]:7860", b"[", b"\xff"]))]
    if rng.random() < 0.9:
        kinds = [b"application/json"] * 30 + [
            b"",
            b"text/plain",
            b"multipart/form-data",
            b"application/json; charset=x",
            b"\xff",
        ]
        headers.append((b"content-type", rng.choice(kinds)))
    if rng.random() < 0.1:
        headers.append((b"content-length", rng.choice([b"-1", b"9" * 30, b"x", "²".encode("latin-1"), b"", b"10"])))
    token = rng.choice(["", "", "", "grün"])
    if rng.random() < 0.9 and token:
        sent = rng.choice([b"Bearer " + token.encode()] * 4 + [b"Bearer", b"Basic x", b"\xff\xfe", b"bearer x y"])
        headers.append((b"authorization", sent))
    if rng.random() < 0.1:
        odd_names = [b"accept", b"origin", b"cookie", b"transfer-encoding", b"content-encoding", b"range", b"expect"]
        headers.append((rng.choice(odd_names), rng.choice([b"\xff", b"text/html", b"gzip", b"x" * 9000, b""])))
    query = rng.choice([b""] * 20 + [b"a=b", b"\xff=%", b"n=" + b"9" * 5000])
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
        "raw_path": path.encode("utf-8", "replace"), "query_string": query, "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 7860),
    }  # fmt: skip
    cut = rng.randrange(len(body) + 1)
    chunks = [body] if rng.random() < 0.8 else [body[:cut], body[cut:]]

    def call() -> None:
        status, _, answer = asyncio.run(ask(app(token), scope, chunks))
        if status in MEANT:
            return
        if not 400 <= status < 500:
            raise AssertionError(f"{status} {answer[:200]!r}")
        # A reason, in one line; HEAD's answers are cut off by the server around the app.
        reason = json.loads(answer)["error"]
        if "\n" in reason or not reason:
            raise AssertionError(f"{status} {answer[:200]!r}")
        raise UserError(reason)

    return call


KINDS: dict[str, tuple[Callable[[random.Random, Path], Call], int]] = {"http": (http, 8)}
