"""Which of Gradio's addresses are open: those that the page needs. Uploads, proxies, remote files and all others are not."""

from pathlib import Path

from serve.guards import App, Guard, Message, Receive, Scope, Send

# Of Gradio's routes below the page's path; what ends in "/" stands for all below it.
READ = (
    "", "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/assets/", "/static/", "/svelte/",
    "/gradio_api/theme.css", "/gradio_api/queue/data", "/gradio_api/heartbeat/", "/gradio_api/startup-events",
    "/gradio_api/app_id",
)  # fmt: skip
WRITTEN = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
SIGN_IN = ("/login", "/login/")  # where a token is asked for
FILE = "/gradio_api/file="


class PageGuard(Guard):
    """Answers 404 for every address below `path` that the page does not need, and 403 for files outside `folder`."""

    def __init__(self, app: App, path: str, folder: Path, signs_in: bool):
        super().__init__(app)
        self.path, self.folder = path, folder.resolve()
        self.written = (*WRITTEN, *SIGN_IN) if signs_in else WRITTEN

    def check(self, scope: Scope) -> tuple | None:
        if scope["path"] != self.path and not scope["path"].startswith(f"{self.path}/"):
            return None

        # Files: only those that the page itself has written.
        below, method = scope["path"].removeprefix(self.path), scope["method"]
        if method in ("GET", "HEAD") and below.startswith(FILE):
            return None if self._is_ours(below.removeprefix(FILE)) else (403, "this file is not for reading")

        # Addresses: those that the page is known to ask for.
        allowed = READ if method in ("GET", "HEAD") else self.written if method == "POST" else ()
        if any(below == one or (one.endswith("/") and len(one) > 1 and below.startswith(one)) for one in allowed):
            return None
        return 404, "there is no such address"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_cors(message: Message) -> None:
            """Gradio lets scripts of some origins in by itself; here only --cors does."""
            if message["type"] == "http.response.start" and scope["path"].startswith(self.path):
                kept = [(key, value) for key, value in message["headers"] if not key.startswith(b"access-control-")]
                message = {**message, "headers": kept}
            await send(message)

        await super().__call__(scope, receive, send_without_cors)

    def _is_ours(self, path: str) -> bool:
        """Whether a path names a file in the page's own folder; addresses elsewhere do not."""
        if "://" in path or "\0" in path or not path.startswith("/"):
            return False
        return Path(path).resolve().is_relative_to(self.folder)
