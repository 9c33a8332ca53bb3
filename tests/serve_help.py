"""A running server for the tests of serve/, and a client for it that needs no package. No tests here."""

import http.client
import json
import threading
import time
from contextlib import contextmanager, suppress
from typing import NamedTuple

import uvicorn
from tiny_models import tiny_pipeline

from serve.app import Settings, build_app
from serve.torch_model import TorchModel


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes

    def json(self):
        return json.loads(self.body)


class Client:
    """One connection a request, as plain as HTTP is."""

    def __init__(self, port):
        self.port = port

    def request(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            with suppress(BrokenPipeError):  # the server has answered, and closed, before it has read the body
                connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            return Answer(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.request("GET", path, headers=headers)

    def post(self, path, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content)
        return self.request("POST", path, body, {"Content-Type": "application/json", **headers})


def tiny_models(*systems):
    return {system: TorchModel(system, tiny_pipeline(system)) for system in systems or ("ssa_gan",)}


@contextmanager
def running(models, folder, **settings):
    """A server on a free port of the loopback, in a thread: (client, studio)."""
    app, studio = build_app(models, Settings(**{"page": False, **settings}), folder)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Client(server.servers[0].sockets[0].getsockname()[1]), studio
    finally:
        server.should_exit = True
        thread.join(20)
        studio.batcher.close(20)
