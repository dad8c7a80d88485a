"""README, examples and shipped YAML say what is so.

After a flag has changed: VLKIT_UPDATE_README=1 pytest tests/docs
"""

import ast
import fcntl
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from vlkit.config.base import read_yaml
from vlkit.config.data import AugmentConfig, ImageAugmentSettings
from vlkit.config.presets import (
    SECTIONS,
    domain_preset,
    resolve_augment,
    resolve_prep,
    resolve_train_fusion,
    resolve_train_retrieval,
)
from vlkit.config.training import TrainRetrievalConfig
from vlkit.remote import file_sha256

README = ROOT / "README.md"
COMMANDS = (
    "quickstart",
    "sample",
    "download-coco",
    "prep",
    "augment",
    "train-retrieval",
    "train-fusion",
    "eval",
    "index",
    "search",
    "serve",
    "caption",
    "report",
    "runs",
)


def help_text(command: str) -> str:
    """What the command prints for --help, 100 columns wide."""
    env = {**os.environ, "TERMINAL_WIDTH": "100", "COLUMNS": "100", "NO_COLOR": "1"}
    program = [
        sys.executable,
        "-c",
        f"import sys; sys.argv = ['vlkit', '{command}', '--help']; from vlkit.cli import main; main()",
    ]
    out = subprocess.run(program, capture_output=True, text=True, check=True, env=env).stdout
    return "\n".join(line.rstrip() for line in out.strip().splitlines()).replace("python -m vlkit", "vlkit").strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_shows_every_commands_help(command):
    readme = README.read_text(encoding="utf-8")
    block = re.search(rf"(<!-- help: {command} -->\n```text\n)(.*?)(\n```)", readme, re.DOTALL)
    assert block, f"README has no help block for {command}"
    if os.environ.get("VLKIT_UPDATE_README"):
        text = help_text(command)
        # Another worker may write another command's.
        with README.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            readme = re.sub(
                rf"(<!-- help: {command} -->\n```text\n)(.*?)(\n```)",
                lambda m: m[1] + text + m[3],
                file.read(),
                flags=re.DOTALL,
            )
            file.seek(0)
            file.truncate()
            file.write(readme)
        return
    assert block[2].split() == help_text(command).split()


def test_readme_knows_every_command():
    from vlkit.cli import app

    assert {command.name for command in app.registered_commands} == set(COMMANDS)


def rooms_map() -> str:
    """Return the package's rooms and foundation, each with the first sentence of its docstring."""

    def line(depth: int, name: str, path: Path) -> str:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        sentence = docstring.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")
        return textwrap.fill(
            sentence, 118, initial_indent=f"{'  ' * depth}{name}".ljust(24), subsequent_indent=" " * 24
        )

    package = ROOT / "vlkit"
    lines = ["vlkit/"]
    lines += [line(1, path.name, path) for path in sorted(package.glob("*.py")) if not path.name.startswith("__")]
    for room in ("config", "data", "models", "evaluation", "training", "inference", "report"):
        lines.append(line(1, f"{room}/", package / room / "__init__.py"))
        for path in sorted((package / room).glob("*/__init__.py")):
            lines.append(line(2, f"{path.parent.name}/", path))
    return "\n".join(lines)


def test_readme_shows_the_rooms():
    """In the order of their imports, with the words of their own docstrings; VLKIT_UPDATE_README=1 writes them anew."""
    readme = README.read_text(encoding="utf-8")
    block = re.search(r"(<!-- tree -->\n```text\n)(.*?)(\n```)", readme, re.DOTALL)
    assert block
    if os.environ.get("VLKIT_UPDATE_README"):
        README.write_text(readme[: block.start(2)] + rooms_map() + readme[block.end(2) :], encoding="utf-8")
        return
    assert block[2] == rooms_map()


DOMAINS = sorted((ROOT / "vlkit/config/domains").glob("*.yaml"))


@pytest.mark.parametrize("path", DOMAINS, ids=lambda path: path.stem)
def test_every_shipped_domain_loads(path, tmp_path):
    assert domain_preset(path.stem, "prep")
    prepared = resolve_prep({"domain": path.stem})
    assert prepared.out.path == Path("data") / path.stem
    (tmp_path / "data.yaml").write_text(f"settings: {{domain: {path.stem}}}\n")
    trained = resolve_train_retrieval({"data": tmp_path})
    assert trained.model == domain_preset(path.stem, "train-retrieval")["model"]
    assert resolve_augment({"data": tmp_path}).forbid == tuple(domain_preset(path.stem, "augment").get("forbid", ()))
    for section, config in SECTIONS.items():
        assert set(domain_preset(path.stem, section)) <= set(config.fields())


def test_the_example_domain_prepares_what_its_comments_say(tmp_path, vlkit):
    import pandas as pd
    from helpers import write_patterned_image

    rows = []
    for number in range(30):
        write_patterned_image(tmp_path / f"raw/{number}.png", number)
        species = ("Daisy", "Rose", "Daisy|Rose")[number % 3]
        rows.append(
            (str(number), "" if number % 2 else f"flower number {number}", "", species, f"p{number // 2}", "May")
        )
    columns = ["file", "caption", "notes", "species", "plant", "month"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "raw/labels.csv", index=False)
    domain = ROOT / "examples/own-domain.yaml"
    outcome = vlkit("prep", "--domain", domain, "--source", tmp_path / "raw", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    frame = pd.read_parquet(tmp_path / "out/pairs.parquet")
    assert {"flower number 2", "a photo of rose", "daisy, photographed in May"} <= set(frame["text"])
    assert set(frame["unit"]) == {f"p{number}" for number in range(15)}
    assert resolve_train_retrieval({"data": tmp_path / "out"}).tune == "lora"


OTHERS = ("own-domain", "augmentation")
CAPTIONS = sorted((ROOT / "examples").glob("captions*.yaml"))
RUN_YAMLS = [p for p in sorted((ROOT / "examples").glob("*.yaml")) if p.stem not in OTHERS and p not in CAPTIONS]
PUBLISHED = [path for path in sorted((ROOT / "examples").glob("*.sh")) if path.stem not in ("ci-smoke", "captions")]


def test_the_examples_are_there():
    """The tests below go through what a pattern finds, which must not be nothing."""
    assert {path.stem for path in RUN_YAMLS} >= {"agriculture", "dermatology", "persian-food", "recipes"}
    assert {path.stem for path in CAPTIONS} >= {"captions", "captions-t4", "captions-tiny"}
    assert {path.stem for path in PUBLISHED} == {path.stem for path in RUN_YAMLS}
    assert {path.stem for path in DOMAINS} >= {"agriculture", "coco", "dermatology", "persian-food", "recipes"}


@pytest.mark.parametrize("path", RUN_YAMLS, ids=lambda path: path.stem)
def test_every_example_yaml_loads(path, tmp_path):
    config = resolve_train_retrieval({"data": tmp_path, **read_yaml(path)})
    assert all(getattr(config, key) is not None for key in read_yaml(path))


@pytest.mark.parametrize("path", CAPTIONS, ids=lambda path: path.stem)
def test_every_example_of_captions_loads(path, tmp_path):
    values = read_yaml(path)
    config = resolve_train_fusion({**values, "data": tmp_path})
    for key in values.keys() - {"data"}:
        assert str(getattr(config, key)) == str(type(config).fields()[key].read(values[key], "")), key
    assert config.quantize == ("none" if path.stem == "captions-tiny" else "nf4")


@pytest.mark.slow
def test_the_notebook_runs_at_a_tiny_size(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.read(ROOT / "examples/captions.ipynb", as_version=4)
    nbformat.validate(book)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("RETRIEVAL_STEPS", "20")
    monkeypatch.setenv("FUSION_STEPS", "20")
    monkeypatch.chdir(tmp_path)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs/captions/report.html").is_file()
    written = json.loads((tmp_path / "runs/captions/captions-limit200.json").read_text())
    assert len(written) == 200


def test_the_example_augmentation_says_every_default(tmp_path):
    """And train-retrieval reads the same file."""
    path = ROOT / "examples/augmentation.yaml"
    settings = "\n".join(re.findall(r"^# ([a-z_]+: .*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    plain, messages = AugmentConfig().to_dict(), yaml.safe_load(settings)
    messages = {key: value for key, value in messages.items() if plain[key] != []}
    assert read_yaml(path) == {}
    picture_settings = ImageAugmentSettings().to_dict()
    assert picture_settings.keys() - {"forbid"} <= messages.keys()
    assert messages == {key: plain[key] for key in messages}
    assert resolve_train_retrieval({"data": tmp_path, "augment": str(path)}).augment.to_dict() == picture_settings


def test_every_example_script_is_valid_bash_and_calls_real_flags():
    from vlkit.config.data import DownloadCocoConfig, SampleConfig
    from vlkit.config.evaluation import EvalConfig, ReportConfig
    from vlkit.config.fusion import CaptionConfig, TrainFusionConfig
    from vlkit.config.search import IndexConfig, SearchConfig

    flags = {**SECTIONS, "eval": EvalConfig, "sample": SampleConfig, "report": ReportConfig}
    flags |= {"index": IndexConfig, "search": SearchConfig, "download-coco": DownloadCocoConfig}
    flags |= {"train-fusion": TrainFusionConfig, "caption": CaptionConfig}
    scripts = sorted((ROOT / "examples").glob("*.sh"))
    assert len(scripts) >= 6
    for path in scripts:
        subprocess.run(["bash", "-n", path], check=True)
        lines = re.findall(r"^\s*vlkit (\S+)(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert lines, path
        for command, rest in lines:
            known = {"--" + name.replace("_", "-") for name in flags[command].fields()} | {
                "--config",
                "--json",
                "--dry-run",
            }
            assert set(re.findall(r"--[a-z-]+", rest)) <= known, (path, command)


@pytest.mark.slow
def test_the_smoke_example_runs(tmp_path):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", ROOT / "examples/ci-smoke.sh"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "recall@1" in done.stdout.splitlines()[-1]


TRIES = re.compile(r"^#   (vlkit sample .*)$", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_every_published_recipe_runs_as_its_script_says(path, tmp_path):
    """Its line for a try, as it stands: from sample data to a results.json with an interval."""
    line = TRIES.search(path.read_text(encoding="utf-8"))[1]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(["bash", "-euc", line], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("runs/*/results.json")
    assert (results.parent / "report.html").is_file()
    assert "recall@1" in json.loads(results.read_text())["intervals"]["text_to_image"]
    settings = read_yaml(results.parent / "config.yaml")
    published = read_yaml(path.with_suffix(".yaml"))
    meant = TrainRetrievalConfig.from_layers(published).to_dict()
    messages = set(re.findall(r"--([a-z-]+)", line)) | {"epochs"}
    for key in published.keys() - {name.replace("-", "_") for name in messages}:
        assert settings[key] == meant[key] or key == "eval_every", key


@pytest.mark.slow
def test_the_lines_of_readme_run_as_they_stand(tmp_path):
    """The lines by hand, then the one that repeats the run: the same weights to the byte, and from chance to most."""
    readme = README.read_text(encoding="utf-8")
    by_hand = re.search(r"## Run the steps yourself\n\n```sh\n(.*?)```", readme, re.DOTALL)[1]
    repeat = re.search(r"repeated to the byte:\n\n```sh\n(.*?)```", readme, re.DOTALL)[1]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", by_hand + repeat], cwd=tmp_path, env=env, check=True, capture_output=True)
    first, second = (tmp_path / "runs" / name / "model/model.safetensors" for name in ("first", "second"))
    assert file_sha256(first) == file_sha256(second)
    results = json.loads((tmp_path / "runs/first/results.json").read_text())
    assert results["baseline"]["text_to_image"]["recall@1"] < 0.03
    assert results["metrics"]["text_to_image"]["recall@1"] >= 0.8
    assert results["verdict"]["text_to_image"].startswith("better")
