"""The report: in a real browser, at two widths; what it says is what the files say; what it refuses; and `runs`."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from browser import needs_browser, open_page
from helpers import write_patterned_image, write_table
from PIL import Image

from vlkit.errors import UsageError
from vlkit.runs import Run

HOSTILE = '<script>alert("x")</script> & <img src=x onerror=alert(1)> $\\foo$ soup'


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data.replace("\xa0", " ")


def read(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def skin(tmp_path_factory, vlkit):
    """A run on classes, some pictures with two, Persian texts among them; measured in every way."""
    folder = tmp_path_factory.mktemp("skin")
    names, rows = ("acne", "psoriasis", "eczema"), []
    for number in range(60):
        write_patterned_image(folder / f"raw/{number}.png", number)
        label = names[number % 3] if number % 10 else "acne|eczema"
        text = f"{names[number % 3]} on an arm, number {number}"
        text = f"تصویر شماره‌ی {number} از پوست" if number % 5 == 0 else text
        rows.append({"image": f"{number}.png", "caption": text, "label": label, "site": "arm" if number % 2 else "leg"})
    write_table(folder / "raw", rows)
    assert vlkit("prep", "--source", folder / "raw", "--out", folder / "data", "--test-share", 0.4).code == 0
    train = ("train-retrieval", "--data", folder / "data", "--model", "tiny-siglip", "--runs-dir", folder / "runs")
    assert vlkit(*train, "--name", "one", "--steps", 12, "--batch-size", 16, "--eval-every", 4).code == 0
    assert vlkit(*train, "--name", "two", "--steps", 30, "--batch-size", 16, "--lr", 3e-3).code == 0
    flags = ("--shift", "low-light,jpeg", "--guard", folder / "data", "--slice-by", "site")
    assert vlkit("eval", "--run", folder / "runs/one", *flags).code == 0
    assert vlkit("eval", "--run", folder / "runs/two").code == 0
    return folder


@pytest.fixture(scope="module")
def page(skin, vlkit):
    outcome = vlkit("report", "--run", skin / "runs/one", "--against", skin / "runs/two")
    assert outcome.code == 0, outcome.err
    return skin / "runs/one"


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1600, "light")])
def test_it_reads_well_in_a_browser(page, width, scheme):
    """Nothing sticks out, nothing fails to load, the console is silent, keys reach everything, text is not tiny."""
    with open_page(width, scheme) as (tab, messages):
        tab.goto((page / "report.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        pictures = tab.evaluate("[...document.images].map(each => [each.complete, each.naturalWidth])")
        assert len(pictures) > 40 and all(complete and wide > 0 for complete, wide in pictures)
        assert messages == []
        svg = tab.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)")
        assert len(svg) >= 14 and all(100 < wide <= width for wide in svg)
        text = tab.evaluate("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
        assert min(text) > 5
        background, ink = tab.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('svg text')).fill]"
        )
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (background, ink)]
        assert (light[0] < light[1]) == (scheme == "dark"), "the plots take on the theme"
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        tab.keyboard.press("Enter")
        assert tab.url.endswith("#main")
        reached = set()
        for _ in range(80):
            tab.keyboard.press("Tab")
            reached.add(tab.evaluate("document.activeElement.tagName"))
        assert {"A", "DIV", "SUMMARY"} <= reached
        persian = tab.evaluate(
            "[...document.querySelectorAll('blockquote, .item p')]"
            ".filter(e => /^[\\u0600-\\u06ff]/.test(e.textContent)).map(e => getComputedStyle(e).direction)"
        )
        assert persian and set(persian) == {"rtl"}


@needs_browser
def test_it_prints(page, tmp_path):
    with open_page(1200) as (tab, _):
        tab.goto((page / "report.html").as_uri())
        tab.pdf(path=tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").stat().st_size > 100_000


def test_it_needs_nothing_but_itself(page):
    """No script, no address but data: and places in the page; every picture has words; headings do not skip."""
    html = read(page)
    for tag, attributes in html.tags:
        assert tag not in ("script", "iframe", "object", "embed", "form"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
        assert tag != "img" or attributes["alt"].strip()
        assert attributes.get("role") != "img" or attributes["aria-label"].strip()
    text = (page / "report.html").read_text(encoding="utf-8")
    assert "url(http" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in html.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(link[1:] in ids for _, a in html.tags if (link := a.get("href", "")).startswith("#"))
    assert "Content-Security-Policy" in text and "default-src 'none'" in text


def test_hostile_texts_are_words(skin, vlkit, tmp_path):
    """Whatever a table brings along, as captions, classes and names: shown as it was written."""
    run, data = tmp_path / "<b>run", tmp_path / "data"
    shutil.copytree(skin / "runs/one", run)
    shutil.copytree(skin / "data", data)
    table = pd.read_parquet(data / "pairs.parquet")
    table["text"] = HOSTILE
    table.to_parquet(data / "pairs.parquet")
    described = (data / "data.yaml").read_text().replace("acne", "'<i onclick=alert(2)>'")
    (data / "data.yaml").write_text(described)
    results = (run / "results.json").read_text().replace('"acne"', json.dumps(HOSTILE))
    (run / "results.json").write_text(results.replace(str(skin / "data"), str(data)))
    outcome = vlkit("report", "--run", run)
    assert outcome.code == 0, outcome.err
    html, actual = (run / "report.html").read_text(encoding="utf-8"), read(run)
    assert "<script" not in html and "<img src=x" not in html and "<i onclick" not in html and "<b>run" not in html
    assert actual.text.count(HOSTILE) > 20 and "<b>run" in actual.text
    assert any(HOSTILE in attributes.get("alt", "") for _, attributes in actual.tags)


def test_the_numbers_are_those_of_the_files(page):
    results, text = json.loads((page / "results.json").read_text()), read(page).text
    for group, sentence in results["verdict"].items():
        assert sentence in text, group
    for group in ("text_to_image", "image_to_text", "classification"):
        for name, (low, high) in results["intervals"][group].items():
            form = ".1f" if name.endswith("rank") else ".3f"
            assert f"{results['metrics'][group][name]:{form}} [{low:{form}}, {high:{form}}]" in text, (group, name)
    for name in ("acne", "psoriasis", "eczema", "low-light", "jpeg", "site: arm", "One-to-one", "Retention on"):
        assert name in text, name


def test_the_plots_are_there_as_pictures_too(page):
    report = sorted(path.stem for path in (page / "plots").iterdir())
    needed = {
        *("loss", "lr", "grad_norm", "validation", "against-loss", "confusion-tuned", "confusion-base", "class-sizes"),
        *("metrics-text_to_image", "metrics-image_to_text", "metrics-classification", "picture-sizes"),
        *("recall-text_to_image", "ranks-image_to_text", "slices-image_to_text", "caption-lengths"),
    }
    assert needed <= set(report)
    for path in (page / "plots").iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
            assert picture.convert("L").getextrema() == (0, 255) or picture.convert("L").getextrema()[0] < 120


def test_galleries_show_what_they_say(page):
    """Ranks fall or rise as the title has it; marks stand where the hits are."""
    frame = pd.read_parquet(page / "queries.parquet")
    html = (page / "report.html").read_text(encoding="utf-8")
    for direction, arrow in (("text_to_image", "text -&gt; image"), ("image_to_text", "image -&gt; text")):
        rows = frame[frame["direction"] == direction]
        part = html[html.index(f"{arrow}: worst") :]
        part = part[: part.index("</details>")]
        tuned = [
            float(item.replace(",", "")) for item in re.findall(r"tuned: first right answer at rank ([\d.,]+)", part)
        ]
        worst = rows.sort_values("rank", ascending=False).drop_duplicates("unit")["rank"].head(4)
        assert tuned == pytest.approx(worst.tolist(), rel=1e-2)
        best = html[html.index(f"{arrow}: most improved") :]
        best = best[: best.index("</details>")]
        pairs = zip(
            re.findall(r"untouched: first right answer at rank ([\d.,]+)", best),
            re.findall(r"tuned: first right answer at rank ([\d.,]+)", best),
            strict=True,
        )
        assert all(float(after.replace(",", "")) < float(before.replace(",", "")) for before, after in pairs)
    assert html.count('class="item hit"') == html.count("\u2713 right")


def test_two_runs_are_compared_query_by_query(page, skin):
    from vlkit.evaluation.comparison import PerQueryMetrics, compare

    one, two = (pd.read_parquet(skin / f"runs/{name}/queries.parquet") for name in ("one", "two"))
    text = read(page).text
    for direction in ("text_to_image", "image_to_text"):
        ours, theirs = (of[of["direction"] == direction].set_index("query_id") for of in (one, two))
        value = ours["mrr"].mean() - theirs["mrr"].mean()
        actual = compare(
            PerQueryMetrics({"mrr": ours["mrr"].to_numpy()}),
            PerQueryMetrics({"mrr": theirs.loc[ours.index]["mrr"].to_numpy()}),
            list(ours["unit"]),
            draws=2000,
            seed=42,
        ).difference["mrr"]
        assert actual.value == pytest.approx(value)
        assert f"{value:+.3f} [{actual.low:+.3f}, {actual.high:+.3f}]" in text
    assert "one against two" in text


def test_runs_on_other_data_are_not_compared_unless_it_is_said(skin, trained, vlkit, tmp_path):
    assert vlkit("eval", "--run", trained, "--out", tmp_path / "other").code == 0
    flags = ("report", "--run", skin / "runs/one", "--against", tmp_path / "other", "--out", tmp_path / "page")
    outcome = vlkit(*flags)
    assert outcome.code == 2 and "evaluated on different data" in outcome.err and "--across-data" in outcome.err
    assert not (tmp_path / "page").exists()
    outcome = vlkit(*flags, "--across-data")
    assert outcome.code == 0, outcome.err
    text = read(tmp_path / "page").text
    assert "other cannot be compared with this run" in text and "evaluated on different data" in text
    assert "minus other" not in text


def test_bad_input_has_a_message(skin, trained, vlkit, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(skin / "runs/one", run)
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"schema": 2}))
    outcome = vlkit("report", "--run", run)
    assert outcome.code == 6 and "schema 2" in outcome.err and "vlkit eval" in outcome.err
    (run / "results.json").write_text('{"schema": 1, "metrics"')
    outcome = vlkit("report", "--run", run)
    assert outcome.code == 6 and "damaged" in outcome.err
    (run / "results.json").write_text('{"schema": 1}')
    assert vlkit("report", "--run", run).code == 6
    assert vlkit("report", "--run", tmp_path / "none").code == 6
    (tmp_path / "empty").mkdir()
    assert vlkit("report", "--run", tmp_path / "empty").code == 6
    assert vlkit("report", "--run", skin / "runs/one", "--against", skin / "runs/one").code == 2
    outcome = vlkit("report", "--run", skin / "runs/one", "--against", trained, "--out", tmp_path)
    assert outcome.code == 2 and ("not evaluated" in outcome.err or "different data" in outcome.err)


@pytest.mark.slow
def test_what_is_missing_is_marked(skin, vlkit, tmp_path):
    """No data folder, one picture gone, queries of another evaluation: a page with notes, and no wrong picture."""
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(skin / "runs/one", run)
    shutil.copytree(skin / "data", data)
    frame = pd.read_parquet(run / "queries.parquet")
    gone = frame[frame["direction"] == "image_to_text"].sort_values("rank")["shown"].tolist()
    results = json.loads((run / "results.json").read_text())
    table = pd.read_parquet(data / "pairs.parquet")
    table["image"] = [image if image not in gone else f"/nowhere/{Path(image).name}" for image in table["image"]]
    table.to_parquet(data / "pairs.parquet")
    results["data"]["path"] = str(data)
    (run / "results.json").write_text(json.dumps(results))
    assert vlkit("report", "--run", run).code == 0
    assert "no such image" in read(run).text
    results["data"]["path"] = str(tmp_path / "nowhere")
    (run / "results.json").write_text(json.dumps(results))
    environment = (run / "environment.yaml").read_text().replace(str(skin / "data"), str(tmp_path / "nowhere"))
    (run / "environment.yaml").write_text(environment)
    outcome = vlkit("report", "--run", run, "--json")
    assert outcome.code == 0 and "cannot be read" in outcome.json()["notes"][0]
    assert "most improved" not in read(run).text
    frame.iloc[:5].to_parquet(run / "queries.parquet")
    results["data"]["path"] = str(data)
    (run / "results.json").write_text(json.dumps(results))
    outcome = vlkit("report", "--run", run)
    assert outcome.code == 0 and "does not belong to results.json" in outcome.err


def test_a_model_as_it_is_has_a_report(skin, vlkit, tmp_path):
    model = ("eval", "--model", skin / "runs/one/model", "--data", skin / "data", "--out", tmp_path / "base")
    assert vlkit(*model).code == 0
    outcome = vlkit("report", "--run", tmp_path / "base")
    assert outcome.code == 0, outcome.err
    text = read(tmp_path / "base").text
    assert "untouched, on" in text and "Training" not in text and "untouched:" not in text


def test_a_run_that_failed_says_why_and_how_to_go_on(skin, vlkit, tmp_path):
    train = ("train-retrieval", "--data", skin / "data", "--model", "tiny-siglip", "--runs-dir", tmp_path)
    outcome = vlkit(*train, "--name", "nan", "--steps", 20, "--batch-size", 16, "--lr", 1e30, "--warmup", 0)
    assert outcome.code == 4
    assert vlkit("report", "--run", tmp_path / "nan").code == 0
    text = read(tmp_path / "nan").text
    why = json.loads((tmp_path / "nan/stopped.json").read_text())
    assert "This run failed" in text and why["why"] in text and why["exit_code"] == 4
    assert f"vlkit train-retrieval --config {tmp_path / 'nan/config.yaml'}" in text
    listed = vlkit("runs", "--runs-dir", tmp_path, "--json").json()["runs"]
    assert [(run["name"], run["state"], run["why"]) for run in listed] == [("nan", "failed", why["why"])]


@pytest.mark.slow
def test_a_run_that_was_stopped_and_one_that_was_killed(skin, vlkit, tmp_path):
    """SIGTERM and SIGKILL to real processes; while one works, it is running."""
    states = {}
    for name, number in (("stopped", signal.SIGTERM), ("killed", signal.SIGKILL)):
        arguments = ("--data", skin / "data", "--model", "tiny-siglip", "--runs-dir", tmp_path, "--name", name)
        program = [sys.executable, "-m", "vlkit", "train-retrieval", *map(str, arguments)]
        process = subprocess.Popen([*program, "--steps", "3000", "--batch-size", "8"], stderr=subprocess.PIPE)
        metrics = tmp_path / name / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            time.sleep(0.05)
        listed = {run["name"]: run for run in vlkit("runs", "--runs-dir", tmp_path, "--json").json()["runs"]}
        assert listed[name]["state"] == "running" and listed[name]["steps"] == 3000
        process.send_signal(number)
        process.communicate(timeout=60)
        listed = {run["name"]: run for run in vlkit("runs", "--runs-dir", tmp_path, "--json").json()["runs"]}
        states[name] = listed[name]["state"]
        assert vlkit("report", "--run", tmp_path / name).code == 0
    assert states == {"stopped": "stopped", "killed": "interrupted"}
    assert "stopped by SIGTERM" in read(tmp_path / "stopped").text
    assert "it was killed, or the machine went down" in read(tmp_path / "killed").text


def test_the_list_of_runs(skin, vlkit, tmp_path):
    outcome = vlkit("runs", "--runs-dir", skin / "runs")
    assert outcome.code == 0
    results = json.loads((skin / "runs/one/results.json").read_text())
    low, high = results["intervals"]["text_to_image"]["recall@1"]
    line = next(line for line in outcome.out.splitlines() if line.startswith("one "))
    value = results["metrics"]["text_to_image"]["recall@1"]
    assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in line
    assert all(word in line for word in ("finished", "tiny-siglip", "data"))
    os.utime(skin / "runs/two/results.json", (0, 0))
    listed = vlkit("runs", "--runs-dir", skin / "runs", "--json").json()["runs"]
    assert {run["name"] for run in listed} == {"one", "two"}
    shutil.copytree(skin / "runs/two", tmp_path / "hurt")
    (tmp_path / "hurt/config.yaml").write_text("model: [")
    (tmp_path / "thesis").mkdir()
    outcome = vlkit("runs", "--runs-dir", tmp_path, "--json")
    assert outcome.code == 0 and [(r["name"], r["state"]) for r in outcome.json()["runs"]] == [("hurt", "damaged")]
    outcome = vlkit("runs", "--runs-dir", tmp_path / "none")
    assert outcome.code == 2 and "no such folder: " in outcome.err


def test_a_finished_run_that_was_not_measured_says_so(trained, vlkit, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for name in ("results.json", "queries.parquet"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    outcome = vlkit("report", "--run", tmp_path / "run")
    assert outcome.code == 0 and "vlkit eval --run" in outcome.err
    assert "Not evaluated yet" in read(tmp_path / "run").text
    assert Run(tmp_path / "run").finished


def test_names_that_other_tools_would_read_as_more(skin, vlkit, tmp_path):
    """A run called _x$: in the legend, and no mathematics."""
    shutil.copytree(skin / "runs/two", tmp_path / "_x$\\z$")
    outcome = vlkit("report", "--run", skin / "runs/one", "--against", tmp_path / "_x$\\z$", "--out", tmp_path / "page")
    assert outcome.code == 0, outcome.err
    assert " _x$\\z$</text>" in (tmp_path / "page/report.html").read_text(encoding="utf-8")
    assert vlkit("report", "--run", skin / "runs/one", "--against", "").code == 2


def test_data_that_has_changed_since_is_said(skin, vlkit, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(skin / "runs/one", run)
    results = json.loads((run / "results.json").read_text())
    results["data"]["fingerprint"] = "0" * 20
    (run / "results.json").write_text(json.dumps(results))
    outcome = vlkit("report", "--run", run, "--json")
    assert outcome.code == 0 and "has changed since" in outcome.json()["notes"][0]
    assert "has changed since" in read(run).text


def test_another_order_of_the_queries_is_the_same_comparison(page, skin, vlkit, tmp_path):
    from vlkit.remote import file_sha256

    shutil.copytree(skin / "runs/two", tmp_path / "two")
    frame = pd.read_parquet(tmp_path / "two/queries.parquet").sample(frac=1, random_state=0)
    frame.to_parquet(tmp_path / "two/queries.parquet", index=False)
    results = json.loads((tmp_path / "two/results.json").read_text())
    results["queries"]["hash"] = file_sha256(tmp_path / "two/queries.parquet")
    (tmp_path / "two/results.json").write_text(json.dumps(results))
    against = ("report", "--run", skin / "runs/one", "--against", tmp_path / "two", "--out", tmp_path / "page")
    assert vlkit(*against).code == 0
    report = [re.findall(r"minus two\s*([^A-Za-z]+)", read(folder).text) for folder in (page, tmp_path / "page")]
    assert report[0] and report[0] == report[1]


def test_a_look_at_a_run_beside_its_trainer(skin, tmp_path):
    """While the lock is held it is running; a stopped.json says how it ended; looking refuses no trainer."""
    from vlkit.run_status import run_status

    shutil.copytree(skin / "runs/one", tmp_path / "run")
    run = Run(tmp_path / "run")
    (run.folder / "finished.json").unlink()
    with run.lock():
        assert run_status(run).state == "running"
        with pytest.raises(UsageError, match="in use by"), Run(run.folder).lock():
            pass
    assert run_status(run).state == "interrupted"
    for code, state in ((75, "stopped"), (4, "failed")):
        run.write_json("stopped.json", {"why": "so", "hint": None, "exit_code": code})
        assert (run_status(run).state, run_status(run).why) == (state, "so")
    with (run.folder / ".lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with run.lock():
            pass


def test_any_error_leaves_a_word(skin, tmp_path):
    from vlkit.run_status import record_failure, run_status

    shutil.copytree(skin / "runs/one", tmp_path / "run")
    (tmp_path / "run/finished.json").unlink()
    with pytest.raises(KeyError), record_failure(Run(tmp_path / "run")):
        raise KeyError("weights")
    assert run_status(Run(tmp_path / "run")).why == "KeyError: 'weights'"


@pytest.mark.parametrize("content", ["[1]", "null", '{"schema": 1, "metrics": {}, "intervals": {}, "data": {}}'])
def test_one_damaged_folder_is_one_damaged_line(content, skin, vlkit, tmp_path):
    shutil.copytree(skin / "runs/two", tmp_path / "runs/good")
    (tmp_path / "runs/odd").mkdir()
    (tmp_path / "runs/odd/results.json").write_text(content)
    outcome = vlkit("runs", "--runs-dir", tmp_path / "runs", "--json")
    assert outcome.code == 0, outcome.err
    assert {run["name"]: run["state"] for run in outcome.json()["runs"]} == {"good": "finished", "odd": "damaged"}
    assert vlkit("report", "--run", tmp_path / "runs/odd").code == 6


def test_neither_loads_a_model_library():
    """A list of runs, and a page, that wait for torch are not looked at."""
    program = (
        "import sys, vlkit.report.report, vlkit.report.list_runs; print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "set()"
