"""download-coco against a server on this machine that breaks off, lies, changes its mind; and archives that attack."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT

from vlkit.config.data import COCO_SPLITS
from vlkit.data.coco import archives, http
from vlkit.data.coco.folder import CocoFolder, choose_names
from vlkit.errors import ArtifactError

VAL, TRAIN, NOTES = "/zips/val2017.zip", "/zips/train2017.zip", "/annotations/annotations_trainval2017.zip"
PAGE = b"<html><head><title>Welcome</title><style>p {}</style></head><body><p>Please sign in</p></body></html>"


class Server(ThreadingHTTPServer):
    """A COCO server. `faults` has what happens to the next GETs of a path, `sent` the bytes of every one."""

    daemon_threads = True

    def __init__(self, tree):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tree, self.faults, self.asked, self.sent = dict(tree), {}, [], []
        self.ignores_range, self.marks = False, True
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def got(self, path):
        """Bytes of `path` that were sent in all."""
        return sum(count for item, count in self.sent if item == path)

    def gets(self, prefix="/"):
        return [path for method, path, _ in self.asked if method == "GET" and path.startswith(prefix)]

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def parse_request(self):
        parsed = super().parse_request()
        if parsed:
            # What a proxy is asked for has the server's name in it.
            self.path = self.path.removeprefix("http://coco.invalid")
        return parsed

    def do_HEAD(self):
        self.server.asked.append(("HEAD", self.path, None))
        body = self.server.tree.get(self.path)
        self._begin(200 if body is not None else 404, len(body or b""))

    def do_GET(self):
        server = self.server
        server.asked.append(("GET", self.path, self.headers.get("Range")))
        faults = server.faults.get(self.path) or [("",)]
        what, *flags = faults.pop(0) if len(faults) > 1 or faults[0][0] != "trickle" else faults[0]
        if what == "change":
            server.tree[self.path] = flags[0]
        body = server.tree.get(self.path)
        if what == "answer" or body is None:
            code, headers = flags or (404, {})
            return self._begin(code, 0, **headers)
        if what == "page":
            self._begin(200, len(PAGE), **{"Content-Type": "text/html"})
            return self._send(PAGE)
        mark, start = self._mark(body), 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and not server.ignores_range and self.headers.get("If-Range", mark) == mark:
            start = int(asked[1])
        if start and start >= len(body):
            return self._begin(416, 0, **{"Content-Range": f"bytes */{len(body)}"})
        part = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self._begin(206 if start else 200, len(body) - start, **({"ETag": mark} if server.marks else {}), **part)
        if what == "trickle":
            for place in range(start, len(body), flags[0]):
                self._send(body[place : min(place + flags[0], len(body))])
                time.sleep(flags[1])
        elif what in ("truncate", "reset"):
            self._send(body[start : start + flags[0]])
            self.close_connection = True
            if what == "reset":
                time.sleep(0.05)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        else:
            self._send(body[start:])

    def _mark(self, body):
        return f'"{hash(body)}"'

    def _begin(self, code, length, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": length, "Content-Type": "application/zip", **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _send(self, content):
        # Noted first: who asked may have it, and look, before this thread goes on.
        self.server.sent.append((self.path, len(content)))
        self.wfile.write(content)


def zipped(path, members, **attributes):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = attributes.get("mode", stat.S_IFREG | 0o644) << 16
            entry.compress_type = attributes.get("method", zipfile.ZIP_STORED)
            archive.writestr(entry, content)
    return path


@pytest.fixture(scope="module")
def scenes(vlkit, tmp_path_factory):
    """A small COCO: archives by their names, and the server's tree of path -> bytes."""
    folder = tmp_path_factory.mktemp("scenes")
    assert vlkit("sample", "coco", folder / "raw").code == 0
    tree, notes = {}, {}
    for split, count in (("val2017", 30), ("train2017", 50)):
        content = json.loads((folder / f"raw/annotations/captions_{split}.json").read_text())
        content["images"] = content["images"][:count]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [item for item in content["annotations"] if item["image_id"] in ids]
        notes[f"annotations/captions_{split}.json"] = json.dumps(content)
        notes[f"annotations/instances_{split}.json"] = json.dumps({"images": content["images"], "annotations": []})
        names = [image["file_name"] for image in content["images"]]
        pictures = {f"{split}/{name}": (folder / "raw/images" / split / name).read_bytes() for name in names}
        tree |= {f"/{name}": picture for name, picture in pictures.items()}
        zipped(folder / f"{split}.zip", {f"{split}/": b"", **pictures})
    zipped(folder / "annotations_trainval2017.zip", notes, method=zipfile.ZIP_DEFLATED)
    for path in (VAL, TRAIN, NOTES):
        tree[path] = (folder / path.rpartition("/")[2]).read_bytes()
    return folder, tree


@pytest.fixture
def server(scenes):
    served = Server(scenes[1])
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Attempts follow each other without a wait, and no proxy stands between."""
    monkeypatch.setattr(http, "FIRST_DELAY", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def get(vlkit, server, tmp_path):
    """Run download-coco into tmp_path/d from the server; its JSON, or the outcome where it is to fail."""

    def run(*flags, code=0, url=True):
        base = ("--url", server.url) if url else ()
        outcome = vlkit("download-coco", "--root", tmp_path / "d", *base, "--json", *flags)
        assert outcome.code == code, outcome.err
        return outcome.json() if code == 0 else outcome

    return run


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def whole(folder, tree, split="val2017", count=30):
    """The split's pictures are there, byte for byte, and its captions."""
    actual = {path.name: path.read_bytes() for path in (folder / "coco/images" / split).iterdir()}
    assert actual == {name.rpartition("/")[2]: item for name, item in tree.items() if name.startswith(f"/{split}/")}
    content = json.loads((folder / f"coco/annotations/captions_{split}.json").read_text())
    assert len(actual) == len(content["images"]) == count and len(content["annotations"]) == 5 * count


def test_a_split_and_its_captions(get, server, scenes, tmp_path):
    report = get("--split", "val2017,train2017", "--instances")
    size = sum(len(item) for name, item in server.tree.items() if name.startswith("/val2017/"))
    expected = {"pictures": 30, "captions": 150, "bytes": size, "fetched": 30, "skipped": 0, "missing": 0}
    assert report["splits"]["val2017"] == expected and report["splits"]["train2017"]["pictures"] == 50
    assert report["root"] == str(tmp_path / "d/coco")
    assert report["received"] == sum(len(server.tree[path]) for path in (VAL, TRAIN, NOTES))
    whole(tmp_path / "d", scenes[1])
    whole(tmp_path / "d", scenes[1], "train2017", 50)
    left = {name for name in files(tmp_path / "d/coco") if not name.startswith("images/")}
    notes = {f"{kind}_{split}.json" for kind in ("captions", "instances") for split in ("val2017", "train2017")}
    assert left == {".lock"} | {f"annotations/{name}" for name in notes} | {
        f"annotations/full/captions_{split}.json" for split in ("val2017", "train2017")
    }


def test_again_fetches_nothing_and_other_splits_of_the_year_share_the_annotations(get, server):
    get()
    server.asked.clear()
    report = get()
    assert server.asked == [] and report["received"] == 0
    assert report["splits"]["val2017"]["fetched"] == 0 and report["splits"]["val2017"]["skipped"] == 30
    get("--split", "train2017")
    assert server.gets() == [TRAIN]


def test_says_sizes_before_it_fetches_and_what_comes_next(vlkit, server, tmp_path):
    outcome = vlkit("download-coco", "--root", tmp_path / "d", "--url", server.url)
    assert outcome.code == 0
    assert "val2017.zip: " in outcome.err and "30" in outcome.out
    assert [method for method, path, _ in server.asked if path == VAL] == ["HEAD", "GET"]
    assert f"vlkit prep --domain coco --source {tmp_path / 'd/coco'} --out" in outcome.err
    outcome = vlkit("download-coco", "--root", tmp_path / "d", "--url", server.url)
    assert "everything is here" in outcome.err


def test_a_dry_run_needs_no_network_and_writes_nothing(vlkit, tmp_path):
    nowhere = ("--url", "http://127.0.0.1:9", "--root", tmp_path / "d", "--dry-run")
    output = vlkit("download-coco", *nowhere, "--split", "val2017,train2017", "--json").json()
    sizes = {piece["name"]: piece["bytes"] for piece in output["pieces"]}
    assert sizes["train2017.zip"] == COCO_SPLITS["train2017"].archive and len(sizes) == 3
    assert output["bytes_to_fetch"] == sum(sizes.values()) < output["disk"]["needed"]
    outcome = vlkit("download-coco", *nowhere)
    assert outcome.code == 0 and "val2017.zip: 777.8 MB, 5000 images" in outcome.out
    outcome = vlkit("download-coco", *nowhere, "--limit", 500)
    assert "500 images of val2017: about 77.8 MB" in outcome.out and "one archive" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fault",
    [
        [("truncate", 9000)],
        [("reset", 9000)],
        [("truncate", 5000), ("truncate", 5000), ("reset", 5000), ("truncate", 4000)],
        [("answer", 503, {"Retry-After": "0"}), ("answer", 429, {}), ("truncate", 0)],
        [("truncate", 7000), ("answer", 503, {"Retry-After": "0"})],
    ],
)
def test_what_breaks_off_goes_on(fault, get, server, tmp_path, scenes):
    server.faults[VAL] = [*fault, ("",)]
    get("--retries", 3)
    whole(tmp_path / "d", scenes[1])
    assert server.got(VAL) <= len(server.tree[VAL]) and not server.faults[VAL]


def test_progress_counts_the_attempts_anew_and_none_ends_them(get, server):
    server.faults[VAL] = [("truncate", 3000)] * 6 + [("",)]
    get("--retries", 1)
    server.faults[TRAIN] = [("truncate", 3000)] + [("truncate", 0)] * 20
    outcome = get("--split", "train2017", "--retries", 2, code=7)
    assert len(server.gets(TRAIN)) == 1 + 2, "one attempt with progress, which is the first failure; two without"
    assert TRAIN in outcome.err and "--url" in outcome.err and "run the same command" in outcome.err
    assert len(server.gets(VAL)) == 7


def test_a_server_that_ignores_ranges_begins_anew(get, server, tmp_path, scenes):
    server.ignores_range = True
    server.faults[VAL] = [("truncate", 9000), ("",)]
    get()
    whole(tmp_path / "d", scenes[1])
    assert server.got(VAL) == 9000 + len(server.tree[VAL])


def test_one_that_breaks_off_at_the_same_byte_for_ever_is_given_up(get, server):
    server.ignores_range = True
    server.faults[VAL] = [("truncate", 9000)] * 50
    get("--retries", 2, code=7)
    assert len(server.gets(VAL)) == 3


@pytest.mark.parametrize("marks", [True, False])
def test_a_file_that_changes_on_the_way_begins_anew(marks, get, server, tmp_path, scenes):
    """Without a mark of its version there is no telling, so it begins anew always."""
    server.marks = marks
    pictures = {name[1:]: item for name, item in scenes[1].items() if name.startswith("/val2017/")}
    other = zipped(tmp_path / "other.zip", {"val2017/extra.txt": b"x" * 500, **pictures}).read_bytes()
    server.faults[VAL] = [("truncate", 9000), ("change", other), ("",)]
    get()
    whole(tmp_path / "d", scenes[1])
    assert server.got(VAL) == 9000 + len(other)


def test_a_page_instead_of_the_archive_is_told_and_not_kept(get, server, tmp_path):
    server.faults[VAL] = [("page",)]
    outcome = get(code=7)
    assert "Welcome Please sign in" in outcome.err and "text/html" in outcome.err and "--from-archive" in outcome.err
    assert not list((tmp_path / "d").rglob("*.part"))
    # One that comes in the middle does not cost what is here.
    server.faults[VAL] = [("truncate", 9000), ("page",)]
    get(code=7)
    server.faults.clear()
    server.sent.clear()
    get()
    assert server.got(VAL) == len(server.tree[VAL]) - 9000


@pytest.mark.parametrize("code", [403, 404])
def test_what_the_server_refuses_is_not_asked_for_again(code, get, server):
    server.faults[VAL] = [("answer", code, {})] * 9
    outcome = get(code=7)
    assert len(server.gets(VAL)) == 1
    assert server.url + VAL in outcome.err and str(code) in outcome.err and "--url" in outcome.err


def test_no_connection(vlkit, tmp_path):
    outcome = vlkit("download-coco", "--root", tmp_path / "d", "--url", "http://127.0.0.1:9", "--retries", 2)
    assert outcome.code == 7 and "127.0.0.1:9" in outcome.err and "2 in 0 s" in outcome.err


def test_a_server_that_says_nothing_is_waited_for_as_long_as_asked(get, server):
    server.faults[VAL] = [("trickle", 20000, 5.0), ("",)]
    began = time.monotonic()
    get("--timeout", 0.3, "--retries", 0, code=7)
    assert time.monotonic() - began < 3


def test_waits_grow_and_are_as_long_as_the_server_asks(get, server, monkeypatch):
    waits = []
    monkeypatch.setattr(http, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(http, "FIRST_DELAY", 1.0)
    asked = [{"Retry-After": "7"}, {}, {"Retry-After": "99999"}, {}, {"Retry-After": "Wed, 01 Jan 2020 00:00:00 GMT"}]
    server.faults[VAL] = [*(("answer", 503, item) for item in asked), ("",)]
    get()
    assert [waits[0], waits[2], waits[4]] == [7, http.MAX_SERVER_DELAY, 0]
    assert 1 <= waits[1] <= 3 and 4 <= waits[3] <= 12


def test_the_proxy_of_the_environment_is_used(get, server, monkeypatch, tmp_path, scenes):
    monkeypatch.setenv("http_proxy", server.url)
    get("--url", "http://coco.invalid", url=False)
    whole(tmp_path / "d", scenes[1])


def broken_zip(content):
    """One byte in the middle of a picture is another."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [broken_zip, lambda content: content[:-3000]])
def test_a_damaged_archive_is_fetched_once_more(damage, get, server, tmp_path, scenes):
    good = server.tree[VAL]
    server.tree[VAL] = damage(good)
    server.faults[VAL] = [("",), ("change", good)]
    get()
    whole(tmp_path / "d", scenes[1])
    shutil.rmtree(tmp_path / "d")
    server.tree[VAL] = damage(good)
    server.asked.clear()
    outcome = get(code=6)
    assert len(server.gets(VAL)) == 2 and "val2017.zip is damaged" in outcome.err
    assert not (tmp_path / "d/coco/archives/val2017.zip").exists()


def test_unpacking_goes_on_and_notices_what_is_not_as_it_was(scenes, tmp_path):
    folder, tree = scenes
    names = [name[1:] for name in tree if name.startswith("/val2017/")]
    targets = {name: tmp_path / name for name in names}
    assert archives.unpack(folder / "val2017.zip", targets) == (30, 0)
    targets[names[0]].unlink()
    targets[names[1]].write_bytes(b"\xff\xd8\xff")
    size = targets[names[2]].stat().st_size
    targets[names[2]].write_bytes(b"\0" * size)
    assert archives.unpack(folder / "val2017.zip", targets) == (3, 27)
    assert all(targets[name].read_bytes() == tree[f"/{name}"] for name in names)


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("val2017/../../../slipped.jpg", b"x", {}, "leads out"),
        ("/tmp/slipped.jpg", b"x", {}, "leads out"),
        ("..\\slipped.jpg", b"x", {}, "backslash"),
        ("C:/slipped.jpg", b"x", {}, "colon"),
        ("val2017/link.jpg", b"/etc/passwd", {"mode": stat.S_IFLNK | 0o777}, "a link"),
        ("val2017/big.jpg", b"\0" * 2**23, {"method": zipfile.ZIP_DEFLATED}, "packed into"),
    ],
)
def test_an_archive_that_attacks_is_refused_before_anything_is_written(
    name, content, flags, message, get, server, tmp_path
):
    zipped(tmp_path / "bad.zip", {"val2017/good.jpg": b"x", name: content}, **flags)
    server.tree[VAL] = (tmp_path / "bad.zip").read_bytes()
    outcome = get(code=6)
    assert message in outcome.err and len(server.gets(VAL)) == 1
    assert not (tmp_path / "d/coco/images").exists() and not list(tmp_path.rglob("slipped*"))
    assert not (tmp_path / "d/coco/archives/val2017.zip").exists()


def test_entries_that_share_their_bytes_or_lie_about_their_size_are_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"one.jpg": b"x" * 5000, "two.jpg": b"y" * 10})
    content = bytearray(path.read_bytes())
    second = content.rindex(b"PK\x01\x02")
    shared = bytearray(content)
    struct.pack_into("<II", shared, second + 20, 5000, 5000)
    path.write_bytes(bytes(shared))
    targets = {name: tmp_path / name for name in ("one.jpg", "two.jpg")}
    with pytest.raises(ArtifactError, match="more than the file itself"):
        archives.unpack(path, targets)
    # Says 5 bytes, holds 10.
    struct.pack_into("<I", content, second + 24, 5)
    path.write_bytes(bytes(content))
    with pytest.raises(archives.DamagedArchive):
        archives.unpack(path, targets)
    assert not (tmp_path / "two.jpg").exists() and not list(tmp_path.glob(".*.part"))


def test_missing_pictures_are_fetched_singly_and_told_where_they_stay_missing(get, server, scenes, tmp_path):
    pictures = {name[1:]: item for name, item in scenes[1].items() if name.startswith("/val2017/")}
    first, second, *_ = sorted(pictures)
    lacking = {**pictures, first: b"", second: b"no picture"}
    server.tree[VAL] = zipped(tmp_path / "less.zip", lacking).read_bytes()
    del server.tree[f"/{second}"]
    outcome = get(code=3)
    assert "1 image of val2017" in outcome.err and second.rpartition("/")[2] in outcome.err
    assert server.gets(f"/{first}") == [f"/{first}"]
    content = json.loads((tmp_path / "d/coco/annotations/captions_val2017.json").read_text())
    assert len(content["images"]) == 29 and len(content["annotations"]) == 145
    # The next time only the missing one is asked for.
    server.tree[f"/{second}"] = scenes[1][f"/{second}"]
    server.asked.clear()
    assert get()["splits"]["val2017"] | {"bytes": 0} == {
        **{"pictures": 30, "captions": 150, "bytes": 0, "fetched": 1, "skipped": 29, "missing": 0}
    }
    assert server.gets() == [f"/{second}"]
    whole(tmp_path / "d", scenes[1])
    # So it is with one that somebody removes.
    (tmp_path / "d/coco/images" / first).unlink()
    server.asked.clear()
    get()
    assert server.gets() == [f"/{first}"]


def test_a_subset_grows_and_prep_takes_it(get, server, vlkit, scenes, tmp_path):
    report = get("--limit", 8)
    assert report["splits"]["val2017"]["pictures"] == 8 and VAL not in server.gets()
    small = {path.name for path in (tmp_path / "d/coco/images/val2017").iterdir()}
    line = ("prep", "--domain", "coco", "--source", tmp_path / "d/coco", "--out", tmp_path / "p", "--json")
    counts = vlkit(*line).json()["counts"]
    assert counts["pairs"] == 40 and counts["pictures"] == 8
    assert len((tmp_path / "p/rejects.csv").read_text().splitlines()) == 1
    server.asked.clear()
    report = get("--limit", 20)
    large = {path.name for path in (tmp_path / "d/coco/images/val2017").iterdir()}
    assert small < large and len(large) == 20 and len(server.gets()) == 12
    assert report["splits"]["val2017"]["fetched"] == 12 and report["splits"]["val2017"]["skipped"] == 8
    assert vlkit(*line).json()["counts"]["pairs"] == 100
    server.asked.clear()
    get()
    assert server.gets() == [VAL]
    whole(tmp_path / "d", scenes[1])


def test_the_seed_draws_the_subset():
    names = [f"{number:012d}.jpg" for number in range(200)]
    drawn = choose_names(names, 40, 42)
    assert len(drawn) == 40 == len(set(drawn)) and drawn == sorted(drawn)
    assert drawn == choose_names(names, 40, 42) != choose_names(names, 40, 43)
    assert set(choose_names(names, 10, 42)) < set(drawn) and choose_names(names, 500, 42) == names
    assert set(choose_names(names[::-1], 40, 42)) == set(drawn)


def test_several_pictures_come_at_once(get, server):
    get("--limit", 1)
    for path in [path for path in server.tree if path.startswith("/val2017/")]:
        server.faults[path] = [("trickle", 200, 0.02)]
    began = time.monotonic()
    get("--limit", 17, "--workers", 1)
    alone, began = time.monotonic() - began, time.monotonic()
    shutil.rmtree(Path(get("--limit", 17)["root"]) / "images")
    get("--limit", 17, "--workers", 16)
    assert time.monotonic() - began < 0.6 * alone


def test_single_pictures_that_fail_for_a_while_or_for_good(get, server, tmp_path):
    get("--limit", 1)
    for path in [path for path in server.tree if path.startswith("/val2017/")]:
        server.faults[path] = [("truncate", 100), ("answer", 503, {"Retry-After": "0"}), ("",)]
    get("--limit", 20)
    for path in list(server.faults):
        server.faults[path] = [("page",)] * 9
    outcome = get("--limit", 25, code=7)
    assert "Please sign in" in outcome.err
    shutil.rmtree(tmp_path / "d/coco/images")
    for path in list(server.faults):
        server.faults[path] = [("answer", 404, {})] * 9
    assert "404" in get("--limit", 5, code=7).err


def test_from_archives_without_network(get, server, scenes, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(scenes[0], own, ignore=shutil.ignore_patterns("raw"))
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in own.iterdir()}
    get("--from-archive", own, "--limit", 7, url=False)
    assert len(list((tmp_path / "d/coco/images/val2017").iterdir())) == 7
    get("--from-archive", own, url=False)
    whole(tmp_path / "d", scenes[1])
    assert server.asked == []
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in own.iterdir()}
    (own / "train2017.zip").unlink()
    outcome = get("--from-archive", own, "--split", "train2017", url=False, code=3)
    assert f"no such file: {own / 'train2017.zip'}" in outcome.err
    (own / "train2017.zip").write_bytes(broken_zip(scenes[1][TRAIN]))
    assert "damaged" in get("--from-archive", own, "--split", "train2017", url=False, code=6).err
    assert (own / "train2017.zip").exists()
    pictures = {name[1:]: item for name, item in scenes[1].items() if name.startswith("/train2017/")}
    zipped(own / "train2017.zip", dict(list(pictures.items())[:-3]))
    assert "3 images of train2017" in get("--from-archive", own, "--split", "train2017", url=False, code=3).err


def test_an_archive_of_the_annotations_of_one_split_is_enough_for_it(get, scenes, tmp_path):
    import zipfile

    own = tmp_path / "own"
    shutil.copytree(scenes[0], own, ignore=shutil.ignore_patterns("raw"))
    (archive,) = own.glob("annotations*.zip")
    with zipfile.ZipFile(archive) as opened:
        members = {name: opened.read(name) for name in opened.namelist() if "val2017" in name}
    zipped(archive, members)
    get("--from-archive", own, url=False)
    assert len(list((tmp_path / "d/coco/images/val2017").iterdir())) > 7
    outcome = get("--from-archive", own, "--split", "train2017", url=False, code=6)
    assert "holds no annotations/captions_train2017.json" in outcome.err


def test_kept_archives_serve_as_archives(get, server, tmp_path, scenes):
    get("--keep-archives")
    remaining = tmp_path / "d/coco/archives"
    assert files(remaining) == {"val2017.zip", "annotations_trainval2017.zip"}
    shutil.rmtree(tmp_path / "d/coco/images")
    get("--from-archive", remaining, url=False)
    whole(tmp_path / "d", scenes[1])
    assert files(remaining) == {"val2017.zip", "annotations_trainval2017.zip"}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(get, server, monkeypatch, tmp_path):
    usage, archive = shutil.disk_usage(tmp_path), len(server.tree[VAL])
    # Archive and pictures, not the archive alone.
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=int(1.5 * archive)))
    outcome = get(code=5)
    assert "needed" in outcome.err and "free" in outcome.err and "--root" in outcome.err
    assert server.gets() == []
    annotations = sum(split.captions for name, split in COCO_SPLITS.items() if name.endswith("2017"))
    assert annotations > 2**20, "of the real COCO; the server's are as much smaller as its archive"
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=int(2.5 * archive)))
    get()


def test_a_second_one_at_once_is_refused(get, tmp_path):
    with CocoFolder(tmp_path / "d").lock():
        outcome = get(code=2)
    assert f"process {os.getpid()}" in outcome.err and "--root" in outcome.err
    get()


def test_a_caption_file_of_somebody_else_is_not_overwritten(get, server, tmp_path, monkeypatch, scenes):
    own = tmp_path / "d/coco/annotations/captions_val2017.json"
    own.parent.mkdir(parents=True)
    full = zipfile.ZipFile(scenes[0] / "annotations_trainval2017.zip").read("annotations/captions_val2017.json")
    own.write_bytes(full)
    assert str(own) in get(code=2).err and server.asked == []
    # A whole one is taken for the complete one.
    monkeypatch.setitem(COCO_SPLITS, "val2017", COCO_SPLITS["val2017"]._replace(images=30))
    get()
    assert server.gets() == [VAL] and own.read_bytes() == full


@pytest.mark.parametrize("name", ["../../out.jpg", "/etc/x.jpg", "a/b.jpg", "x.png", ""])
def test_names_in_the_caption_file_do_not_lead_out(name, get, server, tmp_path):
    content = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]}
    notes = {f"annotations/captions_{split}.json": json.dumps(content) for split in ("val2017", "train2017")}
    server.tree[NOTES] = zipped(tmp_path / "n.zip", notes).read_bytes()
    assert repr(name) in get(code=6).err
    assert not (tmp_path / "d/coco/images").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split", "val2018"), "val2017"),
        (("--url", "ftp://x"), "http"),
        (("--limit", "0"), "at least 1"),
        (("--from-archive", ".", "--url", "http://x"), "--from-archive"),
    ],
)
def test_bad_settings(flags, message, vlkit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = vlkit("download-coco", *flags)
    assert outcome.code == 2 and message in outcome.err and list(tmp_path.iterdir()) == []


def started(server, tmp_path, *flags):
    """download-coco as a process of its own."""
    line = [sys.executable, "-m", "vlkit", "download-coco", "--root", str(tmp_path / "d"), "--url", server.url, *flags]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(what):
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_killed_on_the_way_it_goes_on_without_fetching_twice(number, code, get, server, tmp_path, scenes):
    server.faults[VAL] = [("trickle", 2000, 0.03)]
    process = started(server, tmp_path)
    part = http.part_path(tmp_path / "d/coco/archives/val2017.zip")
    wait_for(lambda: part.exists() and part.stat().st_size > 10000)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert number == signal.SIGKILL or "run the same command" in err
    here = part.stat().st_size
    server.faults.clear()
    time.sleep(0.1)
    server.sent.clear()
    get()
    assert server.got(VAL) == len(server.tree[VAL]) - here
    whole(tmp_path / "d", scenes[1])


def test_killed_while_pictures_come_singly(get, server, tmp_path):
    get("--limit", 1)
    for path in [path for path in server.tree if path.startswith("/val2017/")]:
        server.faults[path] = [("trickle", 300, 0.05)]
    # Some hang, and are not waited for.
    for path in list(server.faults)[:7]:
        server.faults[path] = [("trickle", 300, 8.0)]
    process = started(server, tmp_path, "--limit", "25")
    folder = tmp_path / "d/coco/images/val2017"
    wait_for(lambda: len(list(folder.glob("*.jpg"))) > 6)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=20)
    assert process.returncode == 143 and time.monotonic() - began < 2
    for path in folder.glob("*.jpg"):
        assert path.read_bytes() == server.tree[f"/val2017/{path.name}"], "whole or not at all"
    server.faults.clear()
    here = len(list(folder.glob("*.jpg")))
    assert get("--limit", 25)["splits"]["val2017"]["pictures"] == 25 > here
    assert json.loads((folder.parents[1] / "annotations/captions_val2017.json").read_text())["images"]


def test_the_help_imports_nothing_heavy():
    program = """
import sys
from vlkit.cli import app
try:
    app(["download-coco", "--help"])
except SystemExit as end:
    assert end.code == 0
import vlkit.data.coco
heavy = ("torch", "transformers", "pandas", "PIL", "numpy", "pyarrow")
print("HEAVY", [name for name in heavy if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "HEAVY []" and "--from-archive" in out


def test_a_raw_coco_folder_is_prepared_as_it_says(scenes, prep, tmp_path):
    """Against the annotation files read by hand: five captions a picture, ids as groups and units, val as the test."""
    shutil.copytree(scenes[0] / "raw", tmp_path / "raw", copy_function=os.link)
    frame = prep("--domain", "coco", "--near-duplicates", -1)
    expected, split_of = set(), {}
    for split in ("train2017", "val2017"):
        content = json.loads((tmp_path / f"raw/annotations/captions_{split}.json").read_text())
        file_of = {image["id"]: image["file_name"] for image in content["images"]}
        for item in content["annotations"]:
            expected.add((f"images/{split}/{file_of[item['image_id']]}", item["caption"], str(item["image_id"])))
            split_of[str(item["image_id"])] = split
    assert set(zip(frame["image_key"], frame["text"], frame["image_group"], strict=True)) == expected
    assert (frame["unit"] == frame["image_group"]).all()
    for unit, split in zip(frame["unit"], frame["split"], strict=True):
        assert split == "test" if split_of[unit] == "val2017" else split in ("train", "val")
    assert 0 < frame.loc[frame["split"] == "val", "unit"].nunique() < 120
    seeded = prep("--domain", "coco", "--near-duplicates", -1, "--split-by", "seed")
    shares = seeded.drop_duplicates("unit")["split"].value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.1, abs=0.001)
