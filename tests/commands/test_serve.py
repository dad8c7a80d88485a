"""serve: its API and its page, over a real server; what it gives away, and what it refuses."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import uvicorn
from browser import needs_browser, open_page
from helpers import rewrite_manifest, write_class_folders
from PIL import Image

from vlkit.data.images import decode
from vlkit.inference.search.search import Searcher
from vlkit.inference.serve import server_state
from vlkit.inference.serve.web_app import MAX_QUERY_CHARACTERS, create_app
from vlkit.storage import Location

LIMIT = 300_000
MARKUP = "<b>red</b> spot"


@pytest.fixture(scope="module")
def site(tmp_path_factory, vlkit):
    """Tuned and untouched index of class folders; one class' name, and one text, try to be markup."""
    root = tmp_path_factory.mktemp("site")
    write_class_folders(root / "raw", per_class=8)
    (root / "raw/Leaf___blue_spot").rename(root / "raw/Leaf___برگ سبز")
    assert vlkit("prep", "--domain", "agriculture", "--source", root / "raw", "--out", root / "data").code == 0
    train = ("train-retrieval", "--data", root / "data", "--model", "tiny-clip", "--runs-dir", root / "runs")
    assert vlkit(*train, "--name", "leaf", "--steps", 40, "--batch-size", 16).code == 0
    run = root / "runs/leaf"
    assert vlkit("index", "--run", run, "--out", root / "tuned").code == 0
    assert vlkit("index", "--run", run, "--untouched", "--out", root / "base").code == 0
    # prep takes markup out; another program's docstore may have it.
    for index in (root / "tuned", root / "base"):
        table = pd.read_parquet(index / "docstore.parquet")
        table["class"] = table["class"].str.replace("Leaf___red_spot", MARKUP)
        table["text"] += " <img src=x onerror=alert(1)>"
        table.to_parquet(index / "docstore.parquet", index=False)
        rewrite_manifest(index)
    return root


class Server:
    """The app behind uvicorn, in a thread of this process."""

    def __init__(self, *indexes, **flags):
        self.searchers = [Searcher.open(Location(index)) for index in indexes]
        self.app = create_app(self.searchers, max_upload=LIMIT, hosts=("127.0.0.1", "localhost"))
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="error", **flags))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join(20)

    def ask(self, path, body=None, headers=None, **query):
        """Status, headers and content of an answer."""
        report = urllib.parse.urlencode(query, doseq=True)
        request = urllib.request.Request(f"{self.url}{path}?{report}", data=body, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def json(self, path, body=None, **query):
        status, _, content = self.ask(path, body, **query)
        assert status == 200, content
        return json.loads(content)


@pytest.fixture(scope="module")
def server(site):
    started = Server(site / "tuned", site / "base")
    yield started
    started.close()


def test_the_api_answers_as_the_command_does(server, site, vlkit):
    actual = server.json("/api/search", q="a leaf with red spots", k=4)
    for number, index in enumerate(("tuned", "base")):
        output = vlkit("search", "--index", site / index, "a leaf with red spots", "-k", 4, "--json").json()["queries"][
            0
        ]
        answer = actual["results"][number]
        assert answer["index"] == index
        for kind in ("texts", "images"):
            assert [(hit["id"], hit["score"]) for hit in answer[kind]] == [(h["id"], h["score"]) for h in output[kind]]
    picture = next((site / "raw").rglob("3.png"))
    by_picture = server.json("/api/search", picture.read_bytes(), k=3, of="images")["results"][0]
    output = vlkit("search", "--index", site / "tuned", "--image", picture, "-k", 3, "--of", "images", "--json").json()
    assert [hit["id"] for hit in by_picture["images"]] == [hit["id"] for hit in output["queries"][0]["images"]]
    assert by_picture["images"][0]["score"] > 0.9999 and by_picture["texts"] is None
    first = by_picture["images"][0]["id"]
    like = server.json("/api/like", id=first, k=5)["results"]
    assert first not in [hit["id"] for hit in like[0]["images"]] and len(like[1]["images"]) == 5
    assert {hit["picture"].split("/")[3] for hit in like[1]["images"]} == {"1"}
    described = server.json("/api/indexes")
    assert [(item["name"], item["untouched"], item["images"]) for item in described] == [
        ("tuned", False, 40),
        ("base", True, 40),
    ]


def test_filters_of_the_api(server):
    name = MARKUP
    actual = server.json("/api/search", q="leaf", k=50, filter=f"class={name}")["results"][0]
    assert len(actual["images"]) == 8 and {hit["class"] for hit in actual["images"]} == {name}
    assert "50 images were asked for: there are 8" in actual["notes"]
    status, _, content = server.ask("/api/search", q="leaf", filter="class=nothing")
    assert status == 422 and "has class=nothing" in json.loads(content)["error"]
    assert server.ask("/api/search", q="leaf", filter="nonsense")[0] == 422


def test_pictures_are_small_jpegs_by_row_and_nothing_else_is_given_away(server, site):
    (hit, *_) = server.json("/api/search", q="leaf", of="images")["results"][0]["images"]
    status, headers, content = server.ask(hit["picture"])
    assert status == 200 and headers["Content-Type"] == "image/jpeg" and "path" not in hit
    with Image.open(io.BytesIO(content)) as created:
        assert created.format == "JPEG" and max(created.size) <= 320
    places = ("0/40", "0/-1", "2/0", "-1/0", "0/x", "0/..%2f..%2fetc%2fpasswd", "0/0/../../../../etc/passwd")
    outside = [f"/api/pictures/{place}" for place in places]
    outside += [
        "/files/web_app.py",
        "/files/..%2fweb_app.py",
        "/docs/files/..%2f..%2fcore.py",
        f"//{site}/raw",
        "/files/",
    ]
    for path in outside:
        status, _, content = server.ask(path)
        assert status in (404, 422, 405), path
        assert b"root:" not in content and b"import" not in content
    # What http clients would tidy up, said as it is.
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/docs/files/../../core.py")
    assert connection.getresponse().status == 404


@pytest.mark.parametrize("path", ["/", "/docs", "/files/serve.js", "/api/indexes", "/openapi.json", "/nowhere"])
def test_every_answer_has_the_headers_that_keep_it_here(path, server):
    _, headers, content = server.ask(path)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "script-src 'unsafe" not in policy and "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY" and headers["Cross-Origin-Resource-Policy"] == "same-origin"
    if path in ("/", "/docs"):
        assert not re.search(rb"""(src|href)=["']?(https?:)?//""", content) and b"<script>" not in content


def test_only_this_machines_names_are_answered(server):
    assert server.ask("/api/indexes", headers={"Host": "evil.example"})[0] == 400
    assert server.ask("/api/indexes", headers={"Host": f"localhost:{server.port}"})[0] == 200


def test_a_page_of_another_site_gets_no_answer(server):
    """Its script may send a request, but is told nothing, and nothing is done for it."""
    queue = server.app.app.state.server.queues[0]
    queue.batches.clear()
    own = f"127.0.0.1:{server.port}"
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{server.port + 1}", f"https://{own}"):
        assert server.ask("/api/search", packed((30, 30)), headers={"Origin": origin})[0] == 403
    assert not queue.batches
    assert server.ask("/api/search", packed((30, 30)), headers={"Origin": server.url})[0] == 200


def test_what_cannot_be_asked(server):
    assert server.ask("/api/search")[0] == 422
    assert server.ask("/api/search", q="")[0] == 422
    assert server.ask("/api/search", q=" \u200b ")[0] == 422
    assert server.ask("/api/search", q="x" * (MAX_QUERY_CHARACTERS + 1))[0] == 422
    for k in (0, -1, 1001, "many"):
        assert server.ask("/api/search", q="leaf", k=k)[0] == 422
    status, _, content = server.ask("/api/search", q="leaf", of="sounds")
    assert status == 422 and json.loads(content)["error"].startswith("of: ")
    assert server.ask("/api/like", id="nobody")[0] == 422
    long = server.json("/api/search", q="leaf " * 700)["results"][0]
    assert "the rest is ignored" in long["notes"][0] and long["texts"]


def packed(size, kind="PNG", **flags):
    content = io.BytesIO()
    Image.new("RGB", size, "green").save(content, kind, **flags)
    return content.getvalue()


def test_uploads_that_are_no_picture(server, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    bomb = packed((250, 250))
    for content, report in [
        (b"", "not an image"),
        (b"<html><script>alert(1)</script>", "an HTML page"),
        (packed((50, 50))[:60], "does not decode"),
        (b"\x00" * 1000, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "not an image"),
        (bomb, "more pixels than is safe"),
    ]:
        status, _, answer = server.ask("/api/search", content)
        assert status == 422 and report in json.loads(answer)["error"], answer
    assert server.json("/api/search", packed((30, 20), "TIFF"))["results"]


def test_a_large_jpeg_is_taken_smaller_and_other_large_pictures_are_refused(server, monkeypatch):
    """Few bytes can be many pixels: they are counted before they take memory."""
    monkeypatch.setattr(server_state, "MAX_PIXELS", 10_000)
    status, _, content = server.ask("/api/search", packed((120, 90)))
    assert status == 422 and "it has 120 x 90 pixels" in json.loads(content)["error"]
    assert server.json("/api/search", packed((100, 100)))["results"]
    large, whole = packed((320, 240), "JPEG"), []
    fitted = decode.resize_to_spec

    def noted(picture, *flags):
        whole.append(np.asarray(picture).shape)
        return fitted(picture, *flags)

    monkeypatch.setattr(decode, "resize_to_spec", noted)
    assert server.json("/api/search", large)["results"]
    assert whole == [(60, 80, 3)] * 2
    # A progressive one takes memory for all of it, however small it is decoded.
    assert server.ask("/api/search", packed((320, 240), "JPEG", progressive=True))[0] == 422


def test_uploads_that_do_not_come_hold_nobody_up(server, monkeypatch):
    """Four that stall, and a fifth; and one that never ends is sent away."""
    monkeypatch.setattr(server_state, "UPLOAD_SECONDS", 1.0)
    stalled = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=30) for _ in range(6)]
    for connection in stalled:
        connection.putrequest("POST", "/api/search")
        connection.putheader("Content-Length", "1000")
        connection.endheaders()
        connection.send(b"abc")
    began = time.monotonic()
    assert server.json("/api/search", packed((30, 30)))["results"]
    assert time.monotonic() - began < 0.9
    assert {connection.getresponse().status for connection in stalled} == {408}
    assert server.app.app.state.server.bytes_held == 0
    monkeypatch.setattr(server_state, "MAX_UPLOADS_HELD", 1000)
    monkeypatch.setattr(server.app.app.state.server, "bytes_held", 2 * LIMIT)
    assert server.ask("/api/search", packed((30, 30)))[0] == 503


def test_two_indexes_that_differ(site, tmp_path, vlkit):
    """What one has and the other has not is asked of the one; names that are the same are told apart."""
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a leaf", "class_name": "only here"}))
    created = ("index", "--run", site / "runs/leaf", "--data", tmp_path / "t.jsonl", "--out", tmp_path / "tuned")
    assert vlkit(*created).code == 0
    both = Server(site / "tuned", tmp_path / "tuned")
    try:
        names = [item["name"] for item in both.json("/api/indexes")]
        assert names == [str(site / "tuned"), str(tmp_path / "tuned")]
        one, other = both.json("/api/search", q="leaf", filter="class=only here")["results"]
        assert one["texts"] == [] and [hit["text"] for hit in other["texts"]] == ["a leaf"]
        one, other = both.json("/api/search", q="leaf", of="images")["results"]
        assert one["images"] and other["images"] is None and other["notes"] == ["this index holds none of these"]
        assert both.ask("/api/search", q="leaf", filter="class=nowhere")[0] == 422
        assert both.ask("/api/pictures/1/0")[0] == 404
        assert {hit["picture"].split("/")[3] for hit in one["images"]} == {"0"}
    finally:
        both.close()


def test_an_upload_of_a_gigabyte_ends_at_the_limit(server, monkeypatch):
    """Said beforehand, or not: it is refused after the limit, and the server holds no more of it."""

    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    monkeypatch.setattr(server_state, "DISCARD_SECONDS", 0.5)
    before, gigabyte = peak(), 2**30
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("POST", "/api/search")
    connection.putheader("Content-Length", str(gigabyte))
    connection.endheaders()
    assert connection.getresponse().status == 413
    # One that is sent whole is told why, by whatever client.
    status, _, content = server.ask("/api/search", b"\xff" * (20 * LIMIT))
    assert status == 413 and "an image may have" in json.loads(content)["error"]
    sent, block, refused = 0, b"\xff" * 2**16, None
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("POST", "/api/search")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    try:
        while sent < gigabyte:
            connection.send(b"%x\r\n%s\r\n" % (len(block), block))
            sent += len(block)
    except OSError as error:
        refused = error
    assert refused is not None and sent < 128 * 2**20
    assert peak() - before < 100_000  # kB
    assert server.json("/api/search", q="leaf")["results"]


def test_fifty_at_once(server):
    """No error, the answers of each alone, and waiting queries encoded together."""
    words = [f"a leaf with {colour} spots and {number} more" for colour in ("red", "blue") for number in range(25)]
    alone = {item: server.json("/api/search", q=item, k=3) for item in words[::7]}
    queue = server.app.app.state.server.queues[0]
    queue.batches.clear()
    picture = packed((60, 40))
    target = server.json("/api/search", picture, k=3)

    def client(number):
        actual = []
        for turn in range(6):
            text = words[(number + turn) % len(words)]
            body = picture if (number + turn) % 5 == 0 else None
            status, _, content = server.ask("/api/search", body, **({} if body else {"q": text}), k=3)
            actual.append((status, text if body is None else None, json.loads(content)))
        return actual

    with ThreadPoolExecutor(50) as clients:
        answers = [item for actual in clients.map(client, range(50)) for item in actual]
    assert len(answers) == 300 and {status for status, _, _ in answers} == {200}
    for _, text, answer in answers:
        expected = target if text is None else alone.get(text)
        if expected:
            for one, other in zip(expected["results"], answer["results"], strict=True):
                for kind in ("texts", "images"):
                    scores = [[hit["score"] for hit in result[kind]] for result in (one, other)]
                    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert max(queue.batches) >= 4 and sum(queue.batches) == 301


def test_an_answer_that_fails_leaves_the_server_up(server, monkeypatch):
    """A picture that is gone, and a bug."""
    searcher = server.searchers[0]
    paths = searcher.index.column("images", "path").to_pylist()
    gone = paths[7]
    os.rename(gone, gone + ".away")
    try:
        status, _, content = server.ask("/api/pictures/0/7")
        assert status == 404 and "cannot be read" in json.loads(content)["error"]
    finally:
        os.rename(gone + ".away", gone)
    assert server.ask("/api/pictures/0/7")[0] == 200
    with monkeypatch.context() as patched:
        patched.setattr(searcher.query_encoder, "embed_texts", lambda _: 1 / 0)
        status, headers, _ = server.ask("/api/search", q="leaf")
        assert status == 500 and headers["X-Content-Type-Options"] == "nosniff"
    assert server.ask("/api/search", q="leaf")[0] == 200


def test_the_openapi_page_describes_every_route(server):
    described = server.json("/openapi.json")
    assert set(described["paths"]) == {*("/api/indexes", "/api/search", "/api/like", "/api/pictures/{index}/{row}")}
    assert set(described["paths"]["/api/search"]) == {"get", "post"}
    assert "image/*" in described["paths"]["/api/search"]["post"]["requestBody"]["content"]


def test_the_command_serves_until_it_is_told_to_end(site, tmp_path):
    """A free port, its address on stdout, an index that is replaced meanwhile, SIGTERM, and a port that is taken."""
    shutil.copytree(site / "tuned", tmp_path / "index")
    program = [sys.executable, "-m", "vlkit", "serve", "--index", str(tmp_path / "index"), "--port"]
    running = subprocess.Popen([*program, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = re.match(r"(http://127.0.0.1:(\d+)) searches", running.stdout.readline())
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{address[1]}/api/search?q=leaf", timeout=30) as answer:
                    before = answer.read()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        chosen = subprocess.run([*program, address[2]], capture_output=True, text=True)
        assert chosen.returncode == 2 and "cannot listen on" in chosen.stderr
        shutil.rmtree(tmp_path / "index")
        shutil.copytree(site / "base", tmp_path / "index")
        with urllib.request.urlopen(f"{address[1]}/api/search?q=leaf", timeout=30) as answer:
            assert answer.read() == before
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(30)
    assert running.returncode == 143 and "Traceback" not in running.stderr.read()


def test_without_its_packages_it_says_what_to_install(site, vlkit, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    outcome = vlkit("serve", "--index", site / "tuned")
    assert outcome.code == 2 and "pip install 'vlkit[serve]'" in outcome.err


@contextmanager
def at_the_page(server):
    """The page, and what its console says."""
    with open_page(1300) as (page, messages):
        page.goto(server.url)
        until(page, "document.getElementById('status').textContent.includes('images')")
        yield page, messages


def until(page, condition):
    """Wait for an expression to become true; the page itself forbids strings that are evaluated."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    pytest.fail(f"never true: {condition}")


def pictures_loaded(page):
    until(page, "[...document.images].filter(i => !i.hidden).every(i => i.complete)")
    return page.evaluate("[...document.querySelectorAll('.hit img')].every(i => i.naturalWidth > 0)")


def test_ctrl_c_is_the_way_to_end_it(site):
    program = [sys.executable, "-m", "vlkit", "serve", "--index", str(site / "tuned"), "--port", "0"]
    running = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = running.stdout.readline().split()[0]
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/nowhere", timeout=30)
        except urllib.error.HTTPError as error:
            assert json.loads(error.read()) == {"error": "Not Found", "hint": None}
            break
        except OSError:
            time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    running.wait(30)
    assert running.returncode == 0 and "error" not in running.stderr.read()


@needs_browser
def test_a_person_types_clicks_filters_and_drops(server, site):
    with at_the_page(server) as (tab, messages):
        types_clicks_filters_and_drops(tab, server, site)
        assert messages == []


def types_clicks_filters_and_drops(tab, server, site):
    tab.fill("#text", "a leaf with red spots")
    tab.press("#text", "Enter")
    tab.wait_for_selector(".images .hit")
    assert tab.locator("section").count() == 2 and "base (untouched)" in tab.inner_text("main")
    assert pictures_loaded(tab)
    shown = tab.locator("section >> nth=0 >> .images .score").all_inner_texts()
    messages = server.json("/api/search", q="a leaf with red spots")["results"][0]["images"]
    assert [float(item) for item in shown] == [round(hit["score"], 3) for hit in messages]
    # Names that are markup are shown, not obeyed; right-to-left ones by their own direction.
    assert MARKUP in tab.inner_text("#class") and "onerror" in tab.inner_text(".texts")
    assert tab.locator("main b, option b, img[src=x]").count() == 0
    tab.select_option("#class", "Leaf___برگ سبز")
    names = "[...document.querySelectorAll('.images .details span:first-child')].map(e => e.textContent)"
    until(tab, f"{names}.every(each => each.includes('برگ'))")
    tab.select_option("#class", "")
    until(tab, "document.querySelectorAll('.images .hit').length === 24")
    # Click one: it is what is searched by, and no hit of itself.
    expected = tab.locator(".images .hit img >> nth=2").get_attribute("src")
    tab.locator(".images .hit >> nth=2").click()
    tab.wait_for_selector("#query-image:not([hidden])")
    assert tab.get_attribute("#query-image", "src") == expected
    until(tab, "document.getElementById('status').textContent.startsWith('answered')")
    assert expected not in [item.get_attribute("src") for item in tab.locator("section >> nth=0 >> .hit img").all()]
    # Choose a picture, then drop one: the page's own file is its own best hit.
    file = next((site / "raw").rglob("5.png"))
    tab.set_input_files("#file", file)
    until(tab, "document.querySelector('section .images .score').textContent === '1.000'")
    tab.click("#clear")
    assert tab.locator(".hit").count() == 0 and tab.locator("#query").is_hidden()
    moved = tab.evaluate_handle(
        """bytes => { const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" })); return files; }""",
        list(file.read_bytes()),
    )
    tab.dispatch_event("body", "dragover", {"dataTransfer": moved})
    assert tab.locator("#drop").is_visible()
    tab.dispatch_event("body", "drop", {"dataTransfer": moved})
    until(tab, "document.querySelector('section .images .score')?.textContent === '1.000'")
    assert tab.inner_text("#query-text") == "dropped.png" and tab.locator("#drop").is_hidden()
    assert pictures_loaded(tab)


@needs_browser
def test_a_person_is_told_what_is_wrong(server):
    with at_the_page(server) as (tab, _):
        told_what_is_wrong(tab)


def told_what_is_wrong(tab):
    tab.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    tab.wait_for_selector("#status.error")
    assert "not an image" in tab.inner_text("#status")
    tab.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"large" * 4_000_000})
    until(tab, "document.getElementById('status').textContent.includes('an image may have')")
    tab.context.set_offline(True)
    tab.fill("#text", "leaf")
    tab.press("#text", "Enter")
    until(tab, "document.getElementById('status').textContent.includes('still running')")
    tab.context.set_offline(False)
    tab.press("#text", "Enter")
    tab.wait_for_selector(".images .hit")
    assert tab.locator("#status.error").count() == 0


@needs_browser
@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1600, "light")])
def test_the_page_fits_and_is_reached_by_keys(width, scheme, server):
    with open_page(width, scheme) as (page, messages):
        page.goto(server.url)
        page.keyboard.type("برگ سبز")
        assert page.evaluate("document.activeElement.id") == "text"
        page.keyboard.press("Enter")
        page.wait_for_selector(".images .hit")
        assert page.evaluate("getComputedStyle(document.getElementById('text')).direction") == "rtl"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        reached = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        assert {"file", "class", "k", "clear", "hit"} <= reached
        page.goto(f"{server.url}/docs")
        page.wait_for_selector("text=Search with an image")
        assert messages == []
