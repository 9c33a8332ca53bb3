"""The page: each bound of the security list, and a real browser that draws, compares, and asks no other host for anything."""

import io
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import CAPTIONS, tiny_checkpoint

pytest.importorskip("fastapi", reason="the server: pip install -r requirements-serve.txt")
pytest.importorskip("gradio", reason="the page: pip install -r requirements-serve.txt")
import gradio
from serve_help import running, tiny_models

from serve.page import _noise_inputs, _shown, build_page, mount_page, read_words

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with running(tiny_models("ssa_gan", "attn_gan"), folder, page=True) as (client, studio):
        client.studio, client.folder = studio, folder
        yield client


def call(client, function, data, session="abc"):
    """One of the page's events through Gradio's queue, as its script does it: the answer's data."""
    joined = client.post("/page/gradio_api/queue/join", {"fn_index": function, "data": data, "session_hash": session})
    assert joined.status == 200, joined
    stream = client.get(f"/page/gradio_api/queue/data?session_hash={session}").body.decode()
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    return next(event for event in events if event["msg"] == "process_completed")


# -- the security list -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/upload_progress?upload_id=1"),
        ("GET", "/gradio_api/proxy=https://huggingface.co/x"),
        ("HEAD", "/gradio_api/proxy=https://huggingface.co/x"),
        ("GET", "/gradio_api/file=https://example.com/x.png"),
        ("GET", "/gradio_api/file=http:/example.com/x.png"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=/proc/self/environ"),
        ("GET", "/gradio_api/file={folder}/page/../images/x.png"),
        ("GET", "/gradio_api/file=/x%00"),
        ("GET", "/gradio_api/file=README.md"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("POST", "/gradio_api/run/draw"),
        ("POST", "/gradio_api/api/draw"),
        ("POST", "/gradio_api/call/draw"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("GET", "/gradio_api/custom_component/a/b/c/d.js"),
        ("GET", "/gradio_api/stream/a/b/c/playlist.m3u8"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/mcp/"),
        ("GET", "/monitoring"),
        ("POST", "/login"),
        ("PUT", "/"),
    ],
)
def test_uploads_proxies_remote_files_and_all_else_are_closed(server, method, path):
    answer = server.request(method, "/page" + path.format(folder=server.folder), b"" if method == "POST" else None)
    assert answer.status in (403, 404)
    assert method == "HEAD" or "error" in answer.json()


def test_every_default_of_mounting_that_opens_something_is_set(monkeypatch, server, tmp_path):
    given = {}
    monkeypatch.setattr(gradio, "mount_gradio_app", lambda app, page, path, **options: given.update(options))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    mount_page(None, server.studio, "/page", tmp_path / "page")
    expected = {
        "server_name": "127.0.0.1", "allowed_paths": [], "show_error": False, "ssr_mode": False, "pwa": False,
        "enable_monitoring": False, "mcp_server": False, "run_history": False, "footer_links": [], "auth": None,
        "max_file_size": "1kb",
    }  # fmt: skip
    assert {name: given[name] for name in expected} == expected
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "page")
    assert all(isinstance(font, str) for font in (given["theme"].font, given["theme"].font_mono))


def test_no_analytics_and_no_component_that_loads_something_from_elsewhere(server):
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    page = build_page(server.studio)
    assert page.analytics_enabled is False and page.api_open is False and page.delete_cache == (600, 1800)
    kinds = {type(block).__name__ for block in page.blocks.values()}
    assert kinds.isdisjoint({"Plot", "LinePlot", "Map", "File", "UploadButton", "HTML", "Image", "Chatbot", "Code"})
    config = server.get("/page/config").json()
    assert not any(event["api_visibility"] == "public" for event in config["dependencies"])
    galleries = [one["props"] for one in config["components"] if one["type"] == "gallery"]
    assert galleries and all("share" not in props["buttons"] and not props["interactive"] for props in galleries)


def test_the_page_itself_names_no_other_host_that_a_browser_would_ask(server):
    html = server.get("/page/").body.decode()
    for tag in ("<script", "<link", "<img", "<iframe"):
        for part in html.split(tag)[1:]:
            assert "http" not in part.split(">")[0].replace(f"http://127.0.0.1:{server.port}", ""), part[:200]
    assert "connect-src 'self'" in server.get("/page/").headers["content-security-policy"]


def test_gradios_own_cors_is_off(server):
    for origin in ("http://localhost:3000", "https://evil.example", "null"):
        answer = server.get("/page/config", Origin=origin)
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_the_page_asks_for_the_token(tmp_path):
    with running(tiny_models(), tmp_path, page=True, token="secret") as (client, _):
        assert client.get("/page/config").status == 401
        refused = client.request("POST", "/page/login", "username=me&password=wrong",
                                 {"Content-Type": "application/x-www-form-urlencoded"})  # fmt: skip
        assert refused.status == 400
        answer = client.request("POST", "/page/login", "username=me&password=secret",
                                {"Content-Type": "application/x-www-form-urlencoded"})  # fmt: skip
        assert answer.status == 200
        cookie = answer.headers["set-cookie"].split(";")[0]
        assert client.get("/page/config", Cookie=cookie).status == 200


def test_the_temporary_folder_is_emptied(tmp_path):
    from test_serve_api import start

    (tmp_path / "tmp").mkdir()
    process, client = start(["--checkpoint", str(tiny_checkpoint(tmp_path / "last.pth"))],
                            page=True, TMPDIR=str(tmp_path / "tmp"))  # fmt: skip
    assert client.get("/page/").status == 200
    call(client, draw_index(client), ["a red bird", 2, 0, 0, "last", "image alone", 0.5])
    assert list((tmp_path / "tmp").rglob("*.png"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0 and not list((tmp_path / "tmp").iterdir())


def draw_index(client):
    """Gradio's number of the event that draws: the first that ends in four outputs."""
    return next(d["id"] for d in client.get("/page/config").json()["dependencies"] if len(d["outputs"]) == 4)


# -- drawing without a browser ---------------------------------------------------------------------------------------------


def test_drawing_gives_pngs_with_their_settings(server):
    answer = call(server, draw_index(server), [CAPTIONS[0] + " zyzzyva", 3, 5, 0.5, "ssa_gan", "image alone", 0.7])
    gallery, status, strips, asked = answer["output"]["data"]
    assert [item["caption"] for item in gallery] == ["#0, seed 5", "#1, seed 5", "#2, seed 5"]
    assert "3 images in" in status and "seed 5, truncation 0.5" in status and "left out: zyzzyva" in status
    assert not strips and asked is None  # a state stays on the server
    path = gallery[1]["image"]["url"].partition("/page/")[2]
    image = np.asarray(Image.open(io.BytesIO(server.get(f"/page/{path}").body)).convert("RGB"))
    expected = server.studio.models["ssa_gan"].pipeline.generate([CAPTIONS[0]] * 3, seed=5, truncation=0.5).images[1]
    assert np.abs(image.astype(int) - expected).max() <= 1


def test_masks_and_attention_are_shown(server):
    plain, masked = (
        call(server, draw_index(server), [CAPTIONS[0], 1, 5, 0, "ssa_gan", overlay, 1.0])["output"]["data"][0][0]
        for overlay in ("image alone", "8 px")
    )
    assert masked["caption"] == "#0, seed 5, 8 px" and plain["image"]["path"] != masked["image"]["path"]
    strips = call(server, draw_index(server), [CAPTIONS[0], 2, 5, 0, "attn_gan", "image alone", 1.0])["output"]["data"][
        2
    ]
    assert [strip["caption"] for strip in strips] == [f"image {i}, stage {s}" for i in (0, 1) for s in (2, 3)]


def test_an_overlay_of_another_model_leaves_the_images_alone(server):
    pictures = server.studio.submit([CAPTIONS[0]], 2, 5, model="ssa_gan").pictures()
    alone = _shown(pictures, "256 px", 1.0)
    assert [label for _, label in alone] == ["#0, seed 5", "#1, seed 5"]
    assert all(shown is picture.image for (shown, _), picture in zip(alone, pictures, strict=True))
    assert [label for _, label in _shown(pictures, "16 px", 1.0)] == ["#0, seed 5, 16 px", "#1, seed 5, 16 px"]


def test_a_walk_names_the_words_that_it_leaves_out(server):
    dependencies = server.get("/page/config").json()["dependencies"]
    walk = next(d["id"] for d in dependencies if len(d["inputs"]) == 5 and len(d["outputs"]) == 2)
    answer = call(server, walk, [CAPTIONS[0], "a blue zyzzyva bird", 0, 0, "ssa_gan"])
    gallery, status = answer["output"]["data"]
    assert len(gallery) == 8 and status.endswith("unknown to the model and left out: zyzzyva")


@pytest.mark.parametrize(("own", "highest", "value"), [(None, 2, 0), (0.8, 2, 0.8), (6.0, 5.0, 5.0)])
def test_a_models_own_truncation_is_on_the_slider(server, monkeypatch, own, highest, value):
    monkeypatch.setattr(server.studio.first, "truncation", own)
    slider = _noise_inputs(server.studio)[1]
    assert (slider.maximum, slider.value) == (highest, value)


def test_errors_are_shown_in_words_and_others_are_not(server, monkeypatch):
    refused = call(server, draw_index(server), ["zyzzyva", 1, 0, 0, "ssa_gan", "image alone", 1.0])
    assert refused["success"] is False and "none of its words" in refused["output"]["error"]
    long = call(server, draw_index(server), ["bird " * 200, 1, 0, 0, "ssa_gan", "image alone", 1.0])
    assert long["success"] is False
    monkeypatch.setattr(server.studio.first, "draw", lambda *_: 1 / 0)
    broken = call(server, draw_index(server), ["a bird", 1, 0, 0, "ssa_gan", "image alone", 1.0])
    assert broken["success"] is False and not (broken["output"].get("error") or "").strip("None")


def test_words_are_read_as_the_model_reads_them(server):
    read = read_words(server.studio, "A small ZYZZYVA bird <end>")
    assert read == [("a ", None), ("small ", None), ("zyzzyva ", "unknown"), ("bird ", None), ("end ", "unknown")]
    assert [label for _, label in read_words(server.studio, "a " * 20)] == [None] * 18 + ["left out"] * 2
    assert read_words(server.studio, None) == []


# -- in a browser ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the browser test: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


def open_page(browser, server, width=1280, scheme="light"):
    """The page, and the hosts that it asks for anything."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.set_default_timeout(30_000)
    page.hosts = set()
    page.on("request", lambda request: page.hosts.add(request.url.split("/")[2] if "://" in request.url else "inline"))
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector("#draw")
    return page


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_draws_compares_and_walks(browser, server, width, scheme):
    page = open_page(browser, server, width, scheme)
    assert page.url.endswith("/page/")  # a browser that asks for / is sent on
    page.get_by_label("Caption", exact=True).fill("a small zyzzyva bird")
    page.wait_for_function("document.querySelector('#words').innerText.toLowerCase().includes('unknown')")
    page.get_by_label("Caption", exact=True).press("Enter")  # no mouse needed
    page.wait_for_selector("#gallery img")
    assert page.locator("#gallery .grid-container img").count() == 4
    assert "unknown to the model and left out: zyzzyva" in page.locator("#status").inner_text()
    before = page.locator("#gallery img").first.get_attribute("src")
    page.get_by_label("16 px").check()
    page.wait_for_function("before => document.querySelector('#gallery img').src != before", arg=before)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare").click()
    page.wait_for_selector("#slider img")
    page.get_by_role("tab", name="Walk").click()
    page.locator("#walk").click()
    page.wait_for_function("document.querySelectorAll('#steps .grid-container img').length == 8")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(","))) < 200) == (scheme == "dark")
    assert page.hosts - {"inline"} == {f"127.0.0.1:{server.port}"}
    page.context.close()


def test_a_browser_is_told_of_a_full_queue(browser, server):
    gate, model = threading.Event(), server.studio.first
    plain, model.draw = model.draw, lambda *arguments: gate.wait(60) and plain(*arguments)
    page = open_page(browser, server)
    try:
        orders = [server.studio.submit(["a bird"], 16, seed) for seed in range(1)]
        deadline = time.monotonic() + 10
        while server.studio.batcher.waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        orders += [server.studio.submit(["a bird"], 16, seed) for seed in range(16)]
        page.locator("#draw").click()
        page.get_by_text("the queue is full").wait_for()
    finally:
        gate.set()
        model.draw = plain
        for order in orders:
            order.pictures()
        page.context.close()


def test_the_screenshot_of_the_readme_is_there():
    assert Image.open(Path(__file__).parents[1] / "docs" / "page.png").width >= 390
