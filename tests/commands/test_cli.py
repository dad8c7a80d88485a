"""The front door: flags, YAML, JSON, dry runs, exit codes, and how little is imported for a help text."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers import write_recipes

from vlkit.config.data import PrepConfig
from vlkit.config.presets import resolve_train_retrieval
from vlkit.config.training import TrainRetrievalConfig
from vlkit.errors import UsageError

COMMANDS = ("quickstart", "sample", "prep", "train-retrieval", "eval")
HEAVY = ("torch", "transformers", "pandas", "PIL", "numpy", "faiss", "pyarrow", "peft")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command):
    program = f"""
import sys
from vlkit.cli import app
try:
    app([{command!r}, "--help"] if {command!r} else ["--help"])
except SystemExit as end:
    assert end.code == 0
print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "HEAVY []"
    assert "Usage" in out


def test_every_setting_is_a_flag_with_a_help_text(vlkit):
    out = vlkit("train-retrieval", "--help").out
    for name, field in TrainRetrievalConfig.fields().items():
        assert field.help
        assert f"--{name.replace('_', '-')}"[:15] in out
    for shared in ("--config", "--json", "--dry-run"):
        assert shared in out


def test_an_unknown_flag_is_refused_with_the_nearest(vlkit):
    outcome = vlkit("train-retrieval", "--batchsize", 8)
    assert outcome.code == 2
    assert "--batch-size" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prep",), "--domain"),
        (("prep", "--domain", "recipies"), "recipes"),
        (("eval",), "--run RUN"),
        (("eval", "--model", "tiny-clip"), "--data"),
        (("eval", "--captions", "c.json"), "--captions needs --references FILE"),
        (("eval", "--model", "m", "--data", "d", "--out", "o", "--against", "r"), "vlkit report --run RUN --against r"),
        (("sample", "recepies", "x"), "recipes"),
        (("train-retrieval", "--data", "x", "--loss", "sigmoyd"), "sigmoid"),
        (("train-retrieval", "--data", "x", "--batch-size", "1"), "at least 2"),
        (("train-retrieval", "--data", "x", "--lr", "-1"), "above 0"),
        (("train-retrieval", "--data", "x", "--lr", "fast"), "error: --lr 'fast' is not a number"),
        (("train-retrieval", "--data", "x", "--steps", "2.5"), "error: --steps '2.5' is not a whole number"),
        (("train-retrieval", "--data", "x", "--micro-batch", "many"), "error: --micro-batch 'many' is not"),
        (("train-retrieval", "--data", "x", "--merge"), "leave it out, or add --tune lora"),
        (("train-retrieval", "--data", "x", "--steps", "1", "--epochs", "1"), "--steps and --epochs"),
        (("train-retrieval", "--data", "x", "--lora-targets", "q,w"), "choose from"),
        (("train-retrieval", "--data", "x", "--name", "../up"), "folder"),
    ],
)
def test_bad_settings_exit_2_with_one_message(arguments, message, vlkit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = vlkit(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "tiny-siglop"), 2, "tiny-siglip"),
        (("--model", "google/siglip-base-patch16-224"), 7, "local folder"),
        (("--model", "./nowhere"), 2, "no such folder"),
        (("--model", "tiny-clip", "--batch-size", "1000"), 2, "at most --batch-size 88"),
        (("--model", "tiny-clip", "--tune", "last", "--unfreeze-layers", "9"), 2, "layers"),
    ],
)
def test_bad_models_and_batches(arguments, code, message, prepared, vlkit, tmp_path):
    outcome = vlkit("train-retrieval", "--data", prepared, "--runs-dir", tmp_path / "runs", "--name", "x", *arguments)
    assert outcome.code == code
    assert message in outcome.err
    assert not (tmp_path / "runs").exists()


def test_missing_things_name_themselves(vlkit, tmp_path):
    outcome = vlkit("train-retrieval", "--data", tmp_path / "gone")
    assert (outcome.code, "no such prepared folder" in outcome.err) == (3, True)
    outcome = vlkit("eval", "--run", tmp_path / "gone")
    assert (outcome.code, "no such run: " in outcome.err) == (6, True)


def test_yaml_is_read_with_the_types_of_the_settings(tmp_path, vlkit):
    """PyYAML reads 1e-5 as a text; the field's type decides."""
    (tmp_path / "c.yaml").write_text("lr: 1e-5\ntune: lora\nlora_targets: q,v\nbatch_size: 16\ndata: d\nsteps: 3\n")
    config = resolve_train_retrieval(yaml.safe_load((tmp_path / "c.yaml").read_text()))
    assert (config.lr, config.lora_targets, config.batch_size) == (1e-5, ("q", "v"), 16)
    with pytest.raises(UsageError, match="'fast' is not a number"):
        resolve_train_retrieval({"data": "d", "lr": "fast"})
    with pytest.raises(UsageError, match=r"2\.5"):
        resolve_train_retrieval({"data": "d", "batch_size": 2.5})


@pytest.mark.parametrize(
    ("text", "message"),
    [("batchsize: 3", "batch_size"), ("- 1", "key: value"), ("a: [", "not valid YAML"), ("tune: all", "full")],
)
def test_bad_yaml_is_refused(text, message, tmp_path, vlkit):
    (tmp_path / "c.yaml").write_text(text)
    outcome = vlkit("train-retrieval", "--config", tmp_path / "c.yaml", "--data", "x")
    assert outcome.code == 2
    assert message in outcome.err
    assert "c.yaml" in outcome.err


def test_precedence_is_default_preset_yaml_flag(raw, tmp_path, vlkit):
    (tmp_path / "c.yaml").write_text("seed: 7\ntest_share: 0.3\n")
    base = ("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "out", "--config", tmp_path / "c.yaml")
    vlkit(*base, "--seed", 9)
    written = yaml.safe_load((tmp_path / "out/data.yaml").read_text())["settings"]
    assert (written["seed"], written["test_share"], written["text_column"]) == (9, 0.3, ["title", "description"])
    assert written["val_share"] == PrepConfig.fields()["val_share"].default


def test_a_domains_training_preset_belongs_to_its_model(prepared):
    published = resolve_train_retrieval({"data": prepared})
    assert (published.model, published.tune, published.lr) == ("openai/clip-vit-base-patch32", "lora", 1e-4)
    tiny = resolve_train_retrieval({"data": prepared, "model": "tiny-siglip"})
    assert (tiny.tune, tiny.lora_rank) == ("full", 8)
    assert tiny.lr > 1e-4
    assert resolve_train_retrieval({"data": prepared, "epochs": 2, "model": "tiny-siglip"}).steps is None


def test_the_bare_lines_work(tmp_path, vlkit, monkeypatch):
    """raw/ and data/<domain> are found where there is just one."""
    monkeypatch.chdir(tmp_path)
    write_recipes(tmp_path / "raw")
    assert vlkit("prep", "--domain", "recipes").code == 0
    assert (tmp_path / "data/recipes/pairs.parquet").is_file()
    outcome = vlkit("train-retrieval", "--model", "tiny-clip", "--steps", 2, "--json")
    assert outcome.code == 0
    run = tmp_path / outcome.json()["run"]
    assert run.name.endswith("-train-retrieval-recipes")
    assert vlkit("prep", "--domain", "recipes", "--out", "data/second").code == 0
    outcome = vlkit("train-retrieval", "--model", "tiny-clip", "--steps", 2)
    assert (outcome.code, "2 prepared folders" in outcome.err) == (2, True)


def test_json_is_one_object_on_stdout_and_talk_goes_to_stderr(prepared, tmp_path, vlkit):
    outcome = vlkit(
        "train-retrieval",
        "--data",
        prepared,
        "--model",
        "tiny-clip",
        "--runs-dir",
        tmp_path,
        "--name",
        "j",
        "--steps",
        2,
        "--json",
    )
    assert outcome.json()["steps"] == 2
    assert "matching texts per row" in outcome.err
    failed = vlkit("train-retrieval", "--data", tmp_path / "gone", "--json")
    assert failed.json()["error"]["exit_code"] == failed.code == 3


def test_a_dry_run_writes_nothing(prepared, tmp_path, vlkit):
    outcome = vlkit(
        "train-retrieval",
        "--data",
        prepared,
        "--model",
        "tiny-clip",
        "--runs-dir",
        tmp_path / "runs",
        "--name",
        "d",
        "--dry-run",
        "--json",
    )
    facts = outcome.json()
    assert facts["settings"]["batch_size"] == 64
    assert facts["rows"]["train"] == 88
    assert facts["memory_gb"] > 0
    assert facts["trainable_parameters"] == facts["total_parameters"]
    assert list(tmp_path.iterdir()) == []


def test_python_dash_m_is_the_same_program():
    out = subprocess.run(
        [sys.executable, "-m", "vlkit", "--version"], capture_output=True, text=True, check=True
    ).stdout
    from vlkit import __version__

    assert out.strip() == f"vlkit {__version__}"


def test_a_bug_says_so_and_keeps_its_traceback_for_those_who_ask(prepared, tmp_path, vlkit, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("surprise")

    monkeypatch.setattr("vlkit.data.prep.prepare.prepare", broken)
    arguments = ("prep", "--domain", "recipes", "--source", prepared, "--out", tmp_path / "o")
    quiet = vlkit(*arguments)
    assert (quiet.code, "this is a bug in vlkit" in quiet.err, "Traceback" in quiet.err) == (1, True, False)
    monkeypatch.setenv("VLKIT_DEBUG", "1")
    assert "Traceback" in vlkit(*arguments).err


def test_a_full_disk_is_exit_5(prepared, tmp_path, vlkit, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlkit.data.prep.prepare.prepare", full)
    outcome = vlkit("prep", "--domain", "recipes", "--source", prepared, "--out", tmp_path / "o", "--json")
    assert outcome.code == 5
    assert json.loads(outcome.out)["error"]["hint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("trian",), "train-retrieval"), (("train-retrieval", "--stps", "3"), "--steps"), (("sample", "recipes"), "OUT")],
)
def test_usage_errors_of_the_program_are_one_json_object_too(arguments, message):
    done = subprocess.run([sys.executable, "-m", "vlkit", *arguments, "--json"], capture_output=True, text=True)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["exit_code"]) == (2, 2)
    assert message in f"{error['message']} {error['hint']}"


def test_a_model_that_cannot_be_loaded_leaves_no_run(prepared, tiny_folder, tmp_path, vlkit):
    """A folder without its tokenizer: transformers would make an empty one and train on nothing."""
    shutil.copytree(tiny_folder("tiny-clip"), tmp_path / "m")
    for file in (tmp_path / "m").glob("tokenizer*"):
        file.unlink()
    outcome = vlkit(
        "train-retrieval", "--data", prepared, "--model", tmp_path / "m", "--runs-dir", tmp_path / "runs", "--name", "x"
    )
    assert (outcome.code, "tokenizer" in outcome.err) == (6, True)
    assert not (tmp_path / "runs/x").exists()


def test_prep_does_not_replace_a_folder_that_holds_something_else(raw, tmp_path, vlkit):
    """YOLO's folders have a data.yaml too."""
    (tmp_path / "yolo/labels").mkdir(parents=True)
    (tmp_path / "yolo/data.yaml").write_text("names: [a]")
    outcome = vlkit("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "yolo")
    assert (outcome.code, "labels" in outcome.err) == (2, True)
    assert (tmp_path / "yolo/labels").is_dir()
