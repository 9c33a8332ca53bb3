"""What stands before every request: known hosts, small bodies, a rate, a token, headers. ASGI, so it guards the page, too."""

import asyncio
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Whatever a page asks for comes from this server: a second protection, beside naming no foreign address.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
BODY_SECONDS = 30.0  # for a client to send its body


def header(scope: Scope, name: bytes) -> str:
    """A request header's value, "" without it."""
    return next((value.decode("latin-1") for key, value in scope.get("headers", ()) if key == name), "")


async def answer(send: Send, status: int, message: str, extra: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """A whole response: an error as JSON."""
    body = json.dumps({"error": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Guard:
    """A layer around an app. `check` returns None to let a request through, (status, message, headers) to refuse it."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks over web sockets
            return await send({"type": "websocket.close", "code": 1003})

        # The subclass's refusal, if any.
        refusal = self.check(scope)
        if refusal is not None:
            return await answer(send, *refusal)
        await self.app(scope, receive, send)

    def check(self, scope: Scope) -> tuple | None:
        return None


class SecurityHeaders(Guard):
    """HEADERS on every response. Refuses addresses with bytes that no client may send, which frameworks fail to decode."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        await super().__call__(scope, receive, send_with_headers)

    def check(self, scope: Scope) -> tuple | None:
        if scope.get("query_string", b"").isascii() and scope.get("raw_path", b"").isascii():
            return None
        return 400, "address: holds bytes beyond ASCII; percent-encode them"


class KnownHosts(Guard):
    """Refuses foreign Host headers. Otherwise a site whose name is pointed at this address could read answers (DNS rebinding)."""

    def __init__(self, app: App, hosts: Iterable[str]):
        super().__init__(app)
        self.hosts = {host.lower() for host in hosts}

    def check(self, scope: Scope) -> tuple | None:
        # The name without its port; an IPv6 address stands in brackets.
        host = header(scope, b"host").lower()
        name = host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if name in self.hosts:
            return None
        return 421, "Host: this server answers to " + ", ".join(sorted(self.hosts)) + "; see --allow-host"


class BodyLimit(Guard):
    """Reads a body before anything else does, up to `limit` bytes and for a while only."""

    def __init__(self, app: App, limit: int):
        super().__init__(app)
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await super().__call__(scope, receive, send)

        # What the client declares is checked before anything is read.
        too_large = 413, f"body: is larger than {self.limit} bytes; send less", [(b"connection", b"close")]
        declared = header(scope, b"content-length")
        if declared and (not declared.isdecimal() or int(declared[:20]) > self.limit):
            return await answer(send, *too_large)

        # The body itself, for a while only.
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            return await answer(send, 408, "body: did not arrive in time; send it again", [(b"connection", b"close")])

        if body is None:
            return None  # the client has gone
        if len(body) > self.limit:
            return await answer(send, *too_large)

        # The app inside reads it again, from memory.
        sent = False

        async def receive_again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_again, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or what there is of it once it is too large; None where the client went away."""
        body = bytearray()
        while len(body) <= self.limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        return bytes(body)


class RateLimit(Guard):
    """At most `per_minute` drawing requests of a client in a minute, saved up to as many; 0: no limit."""

    MAX_CLIENTS = 10_000  # remembered; the least recent is forgotten first

    def __init__(self, app: App, per_minute: int, clock: Callable[[], float] = time.monotonic):
        super().__init__(app)
        self.per_minute, self.clock = per_minute, clock
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, when that was

    def check(self, scope: Scope) -> tuple | None:
        draws = scope["method"] == "POST" and (scope["path"].startswith("/api/") or scope["path"].endswith("/join"))
        if not self.per_minute or not draws:
            return None

        # What this client has left: it grows with time, up to a minute's worth.
        client, now = (scope.get("client") or ("unknown",))[0], self.clock()
        left, since = self._clients.pop(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - since) * self.per_minute / 60)
        self._clients[client] = (max(0.0, left - 1), now) if left >= 1 else (left, now)

        # Forget the least recent clients, so that memory stays bounded.
        while len(self._clients) > self.MAX_CLIENTS:
            self._clients.popitem(last=False)

        if left >= 1:
            return None

        # Refused: with when to come again.
        wait = max(1, round((1 - left) * 60 / self.per_minute))
        message = f"too many requests: {self.per_minute} a minute are allowed; wait {wait} s"
        return 429, message, [(b"retry-after", str(wait).encode())]


class BearerToken(Guard):
    """Refuses requests to /api/, /metrics and /openapi.json without the token. The page asks for it by itself."""

    def __init__(self, app: App, token: str):
        super().__init__(app)
        self.token = token

    def check(self, scope: Scope) -> tuple | None:
        if not scope["path"].startswith(("/api/", "/metrics", "/openapi.json")):
            return None

        # A header is latin-1 on the wire; the token in it may be UTF-8.
        kind, _, actual = header(scope, b"authorization").partition(" ")
        actual = actual.strip().encode("latin-1").decode("utf-8", "replace")
        if kind.lower() == "bearer" and same_token(actual, self.token):
            return None
        message = "Authorization: send 'Bearer TOKEN' with the token of this server"
        return 401, message, [(b"www-authenticate", b"Bearer")]


def same_token(actual: str, expected: str) -> bool:
    """Whether two tokens are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(actual.encode("utf-8", "replace"), expected.encode("utf-8", "replace"))
