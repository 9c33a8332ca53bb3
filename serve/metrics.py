"""Counts of the server in Prometheus's text form. Nothing is sent anywhere: the server's operator reads /metrics."""

import threading
import time
from collections import Counter

from serve.batcher import Batcher
from serve.guards import App, Guard, Message, Receive, Scope, Send


class Metrics:
    """Requests by route and status, and seconds they took; images and queue come from the batcher."""

    def __init__(self, batcher: Batcher):
        self.batcher = batcher
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = 0.0
        self._lock = threading.Lock()

    def count(self, route: str, status: int, seconds: float) -> None:
        """One answered request.

        route: its template, never the client's path, of which there could be any number.
        """
        with self._lock:
            self._requests[route, status] += 1
            self._seconds += seconds

    def text(self) -> str:
        """All counts, a line each."""
        with self._lock:
            requests, seconds = sorted(self._requests.items()), self._seconds

        # Requests, one line for each route and status.
        batcher, prefix = self.batcher, "text_to_image"
        lines = [f"# HELP {prefix}_requests_total Requests answered.", f"# TYPE {prefix}_requests_total counter"]
        lines += [
            f'{prefix}_requests_total{{route="{route}",status="{status}"}} {number}'
            for (route, status), number in requests
        ]

        # All others have one value.
        for name, kind, meaning, value in (
            ("request_seconds_total", "counter", "Seconds from request to answer, summed.", f"{seconds:.6f}"),
            ("images_total", "counter", "Images drawn.", batcher.num_images),
            ("batches_total", "counter", "Batches drawn.", batcher.num_batches),
            ("dropped_total", "counter", "Images given up before they were drawn.", batcher.num_dropped),
            ("draw_seconds_total", "counter", "Seconds spent drawing.", f"{batcher.seconds:.6f}"),
            ("queue_images", "gauge", "Images waiting.", batcher.waiting),
            ("queue_limit_images", "gauge", "Images that may wait.", batcher.queue_size),
        ):
            lines += [f"# HELP {prefix}_{name} {meaning}", f"# TYPE {prefix}_{name} {kind}", f"{prefix}_{name} {value}"]
        return "\n".join(lines) + "\n"


class CountRequests(Guard):
    """Counts every answer of the app inside it."""

    def __init__(self, app: App, metrics: Metrics):
        super().__init__(app)
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await super().__call__(scope, receive, send)
        start, status = time.monotonic(), 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # Counted by the route's template; unknown addresses are "other".
        try:
            await self.app(scope, receive, send_and_note)
        finally:
            route = getattr(scope.get("route"), "path", None) or "other"
            self.metrics.count(route, status, time.monotonic() - start)
