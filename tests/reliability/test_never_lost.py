"""Killed for real, at named places and at random, and started again: the bytes of a run that was left alone."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import ROOT, final_state
from safetensors.torch import save_file

from vlkit import checkpoints, fault_injection
from vlkit.errors import ArtifactError, NonFiniteError, ResourceError

BASE = ("--steps", 7, "--batch-size", 20, "--lr", 1e-2, "--warmup", 1, "--save-every", 3, "--eval-every", 4)
WAYS = {
    # Dropout, gradient caching, accumulation over the end of an epoch, pictures varied in every one.
    "lora": (
        *BASE,
        "--tune",
        "lora",
        "--lora-dropout",
        0.3,
        "--micro-batch",
        6,
        "--grad-accum",
        2,
        "--augment",
        "FILE",
    ),
    # The least that there is to save.
    "head": ("--steps", 4, "--batch-size", 20, "--lr", 1e-2, "--save-every", 2, "--eval-every", 3, "--tune", "head"),
    # A cache of features, which may be half filled.
    "cached": (*BASE, "--tune", "last", "--unfreeze-layers", 1, "--micro-batch", 7, "--cache", "CACHE"),
}


class Runs:
    """Starts one way of training below a folder, as often as asked."""

    def __init__(self, zygote, prepared, folder, way):
        (folder / "augment.yaml").write_text("rotate: 0.5\nbrightness: 0.9\nnoise: 0.5\n")
        places = {"FILE": folder / "augment.yaml", "CACHE": folder / "cache"}
        flags = [places.get(flag, flag) for flag in WAYS[way]]
        train = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", folder / "runs")
        self.command, self.zygote, self.folder = (*train, *flags, "--name"), zygote, folder

    def start(self, name, **env):
        return self.zygote.start(*self.command, name, log=self.folder / f"{name}.log", **env)

    def run(self, name, **env):
        return self.zygote.wait(self.start(name, **env))

    def said(self, name):
        return (self.folder / f"{name}.log").read_text()

    def state(self, name):
        """Everything that the run left: weights, moments, losses, what is exported, what was best."""
        run = self.folder / "runs" / name
        assert (run / "finished.json").is_file(), self.said(name)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        chosen = [line["step"] for line in lines if "loss" in line]
        assert chosen == list(range(1, len(chosen) + 1)), "each step once"
        evaluated = [(line["step"], line["val"]) for line in lines if "val" in line]
        exported = [p for p in sorted(run.glob("*/*.safetensors")) if p.parent.name in ("model", "adapter")]
        hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in exported}
        best = json.loads((run / "best.json").read_text())
        return final_state(run), evaluated, hashes, best


@pytest.fixture(scope="module")
def runs(zygote, prepared, tmp_path_factory):
    created = {}

    def of(way):
        if way not in created:
            created[way] = Runs(zygote, prepared, tmp_path_factory.mktemp(way), way)
            assert created[way].run("whole") == 0, created[way].said("whole")
        return created[way]

    return of


def places_of(runs):
    """What a run passes, in order, each name once."""
    listed = runs.folder / "places"
    if not listed.exists():
        assert runs.run("recorded", VLKIT_FAULT=f"record={listed}") == 0
    return list(dict.fromkeys(listed.read_text().splitlines()))


def killed_at(runs, number, place):
    name = f"at-{number}"
    here = place.replace("of recorded", f"of {name}")  # The run's own folder is flushed, too.
    assert runs.run(name, VLKIT_FAULT=f"kill@{here}") == -9, place
    if not (runs.folder / "runs" / name / "finished.json").is_file():
        assert runs.run(name) == 0, (place, runs.said(name))
    assert runs.state(name) == runs.state("whole"), place
    shutil.rmtree(runs.folder / "runs" / name)


INSIDE = ("step-000004", "safetensors", "state.json", "MANIFEST.json", "last.json", "best.json")


@pytest.mark.slow
def test_killed_at_every_place_inside_a_save(runs):
    """Of the last of three checkpoints, its files and the pointers to it."""
    own = runs("head")
    inside = [place for place in places_of(own) if place.endswith(INSIDE)]
    assert len(inside) >= 12 and "before rename of step-000004" in inside and "after fsync of best.json" in inside
    for number, place in enumerate(inside):
        killed_at(own, number, place)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "cached"])
def test_killed_at_every_place_at_all(way, runs, tmp_path):
    own = runs(way)
    places = places_of(own)
    assert len(places) >= 40, places
    for number, place in enumerate(places):
        shutil.rmtree(own.folder / "cache", ignore_errors=True)
        killed_at(own, number, place)


def killed_at_random(runs, name, rng, kills):
    """Start, kill after a random while, and again; at last to the end. Returns how often it was really killed."""
    done = 0
    for _ in range(kills):
        pid = runs.start(name)
        time.sleep(rng.uniform(0.05, 2.0))
        os.kill(pid, signal.SIGKILL)
        done += runs.zygote.wait(pid) == -9
        if (runs.folder / "runs" / name / "finished.json").exists():
            break
    if not (runs.folder / "runs" / name / "finished.json").exists():
        assert runs.run(name) == 0, runs.said(name)
    return done


@pytest.mark.parametrize("way", [pytest.param("lora", marks=pytest.mark.slow), "cached"])
def test_killed_at_random_moments(way, runs):
    own, rng = runs(way), random.Random(way)
    if way == "cached":
        shutil.rmtree(own.folder / "cache")
    killed_at_random(own, "random", rng, 4)
    assert own.state("random") == own.state("whole")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "cached"])
def test_killed_in_chains(way, runs):
    own, rng, kills, chain = runs(way), random.Random(f"{way}, slow"), 0, 0
    while kills < 20:
        chain += 1
        if way == "cached":
            shutil.rmtree(own.folder / "cache", ignore_errors=True)
        kills += killed_at_random(own, f"chain-{chain}", rng, rng.randint(2, 6))
        assert own.state(f"chain-{chain}") == own.state("whole")


@pytest.mark.soak
def test_soak(runs):
    """200 kills; what it prints stands in README."""
    kills = chains = differ = 0
    rng = random.Random("soak")
    while kills < 200:
        own = runs(rng.choice(list(WAYS)))
        chains += 1
        if rng.random() < 0.5:
            shutil.rmtree(own.folder / "cache", ignore_errors=True)
        kills += killed_at_random(own, f"soak-{chains}", rng, rng.randint(2, 6))
        differ += own.state(f"soak-{chains}") != own.state("whole")
        shutil.rmtree(own.folder / "runs" / f"soak-{chains}")
    print(f"\n{kills} kills in {chains} runs, {differ} runs that differ")
    assert differ == 0


def test_every_rename_and_flush_has_its_places():
    """A place stands after each flush, and on both sides of a rename; three of them swap two folders between theirs."""
    observed = 0
    for path in sorted((ROOT / "vlkit").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if re.search(r"os\.(replace|rename|fsync)\(|_exchange\(aside", line) and "def " not in line:
                around = "\n".join(lines[max(0, number - 5) : number + 6])
                inner = re.search(r"os\.rename\((other|one|old)", line)
                expected = 1 if "fsync" in line else 2
                assert inner or around.count("fault_point(") >= expected, f"{path.name}:{number + 1}"
                observed += 1
    assert observed >= 6


def test_a_place_costs_nothing_when_off(monkeypatch, tmp_path):
    monkeypatch.delenv(fault_injection.VARIABLE, raising=False)
    fault_injection.fault_point("before rename", tmp_path)
    monkeypatch.setenv(fault_injection.VARIABLE, f"eio@before rename of {tmp_path.name}#2")
    fault_injection._reached.clear()
    fault_injection.fault_point("before rename", tmp_path)
    fault_injection.fault_point("after rename", tmp_path)
    with pytest.raises(OSError, match="before rename"):
        fault_injection.fault_point("before rename", tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_step_drops_the_step(number, runs):
    """Exit 75 with what was done saved; started again, the same bytes."""
    own, name = runs("lora"), f"signal-{number}"
    metrics = own.folder / "runs" / name / "metrics.jsonl"
    pid = own.start(name)
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.01)
    os.kill(pid, number)
    began = time.monotonic()
    assert own.zygote.wait(pid) == 75, own.said(name)
    assert time.monotonic() - began < 5
    assert own.run(name) == 0
    assert own.state(name) == own.state("whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step(number, code, runs):
    own, name = runs("lora"), f"early-{code}"
    pid = own.start(name)
    log = own.folder / f"{name}.log"
    while not (log.exists() and "parameters are trained" in log.read_text()):
        time.sleep(0.002)
    os.kill(pid, number)
    actual = own.zygote.wait(pid)
    if (own.folder / "runs" / name / "last.json").exists():
        assert actual == 75, "a step was faster"
    else:
        assert actual == code, own.said(name)
    assert own.run(name) == 0 and own.state(name) == own.state("whole")


def test_an_evaluation_that_was_dropped_is_made_when_the_run_goes_on(runs, prepared, vlkit, tmp_path, monkeypatch):
    """Asked to stop in the middle of one: the step is saved, and its evaluation is the first thing that comes next."""
    from vlkit.signals import StopRequested
    from vlkit.training import validation

    own, real, calls = runs("lora"), validation.score_task, []

    def asked(*args, **settings):
        calls.append(1)
        if len(calls) == 1:
            raise StopRequested
        return real(*args, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(validation, "score_task", asked)
        outcome = vlkit(*own.command, "dropped")
        assert outcome.code == 75 and "step 4" in outcome.err, outcome.err
    assert vlkit(*own.command, "dropped").code == 0
    assert own.state("dropped") == own.state("whole")


def small():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": list(dict(model.named_parameters()).items()), "peak_lr": 1.0}])
    return dict(model.named_parameters()), optimizer


@pytest.mark.parametrize("what", ["enospc", "eio"])
@pytest.mark.parametrize("place", ["after fsync of optimizer.safetensors", "before rename of step-000002"])
def test_a_disk_that_fails_while_saving(what, place, tmp_path, monkeypatch):
    named, optimizer = small()
    checkpoints.save(tmp_path, 1, named, optimizer, {})
    monkeypatch.setenv(fault_injection.VARIABLE, f"{what}@{place}")
    fault_injection._reached.clear()
    with pytest.raises(ResourceError, match="needs"):
        checkpoints.save(tmp_path, 2, named, optimizer, {})
    monkeypatch.delenv(fault_injection.VARIABLE)
    assert checkpoints.newest(tmp_path).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"], "nothing is left aside"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few hundred kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(kilobytes):
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder], capture_output=True)
        if done.returncode:
            pytest.skip("no right to mount a small disk")
        mounted.append(1)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up_anywhere(small_disk):
    """Room for the first checkpoint and for less than the second, down to nothing: the first one stays whole."""
    named = {"weight": torch.nn.Parameter(torch.randn(100, 100))}
    optimizer = torch.optim.AdamW([{"params": list(named.items()), "peak_lr": 1.0}])
    named["weight"].sum().backward()
    optimizer.step()
    needed = 4 * 10_000 * 3 / 1024
    rng, failed = random.Random(0), 0
    for _ in range(12):
        folder = small_disk(int(needed + 30 + rng.uniform(0, needed)))
        checkpoints.save(folder, 1, named, optimizer, {})
        try:
            checkpoints.save(folder, 2, named, optimizer, {})
        except ResourceError as error:
            failed += 1
            assert "make room" in error.hint and "it needs 149.2 kB" in error.message
            assert checkpoints.newest(folder).step == 1
            assert [path.name for path in folder.iterdir()] == ["step-000001"]
    assert failed >= 8


def test_no_checkpoint_holds_what_is_not_finite(tmp_path):
    named, optimizer = small()
    with torch.no_grad():
        named["bias"][1] = torch.nan
    with pytest.raises(NonFiniteError, match="bias"):
        checkpoints.save(tmp_path, 2, named, optimizer, {})
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("poison", ["pickle", "header", "outside", "schema", "huge"])
def test_a_poisoned_checkpoint_is_refused(poison, tmp_path):
    """Exit 6's error, nothing executed, nothing written or read outside."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    named, optimizer = small()
    folder = tmp_path / "checkpoints"
    checkpoints.save(folder, 3, named, optimizer, {})
    step = folder / "step-000003"
    target = step / "trainable.safetensors"
    if poison == "pickle":
        target.write_bytes(pickle.dumps(Bomb()))
    elif poison == "header":
        target.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    elif poison == "huge":
        save_file({"weight": torch.zeros(3, 3)}, target)
    manifest = json.loads((step / "MANIFEST.json").read_text())
    if poison == "outside":
        (tmp_path / "secret").write_text("x")
        manifest["files"] = {f"../../{name}": value for name, value in manifest["files"].items()}
    if poison == "schema":
        state = json.loads((step / "state.json").read_text()) | {"schema": 99}
        (step / "state.json").write_text(json.dumps(state))
    for name in manifest["files"]:
        if (step / name).is_file():
            manifest["files"][name] = hashlib.sha256((step / name).read_bytes()).hexdigest()
    (step / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError):
        actual = checkpoints.newest(folder)
        actual.restore(named, optimizer)
    assert not (tmp_path / "executed").exists()


def test_a_past_run_without_checkpoints_does_not_begin_anew(runs, vlkit):
    own = runs("lora")
    shutil.copytree(own.folder / "runs/whole", own.folder / "runs/robbed")
    (own.folder / "runs/robbed/finished.json").unlink()
    shutil.rmtree(own.folder / "runs/robbed/checkpoints")
    outcome = vlkit(*own.command, "robbed")
    assert outcome.code == 6 and "none of its checkpoints" in outcome.err
    assert (own.folder / "runs/robbed/metrics.jsonl").read_text()
    (own.folder / "runs/robbed/metrics.jsonl").unlink()
    assert vlkit(*own.command, "robbed").code == 6, "last.json knows it, too"
    (own.folder / "runs/robbed/environment.yaml").write_text("a: [")
    assert vlkit(*own.command, "robbed").code == 6


def test_a_run_that_was_moved_and_whose_times_are_scrambled_goes_on(runs, vlkit):
    own = runs("lora")
    assert own.run("moving", VLKIT_FAULT="kill@before rename of step-000006") == -9
    run = (own.folder / "runs/moving").rename(own.folder / "runs/moved")
    rng = random.Random(0)
    for path in sorted(run.rglob("*")):
        os.utime(path, (rng.uniform(0, 4e9),) * 2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    outcome = vlkit(*own.command, "moved")
    assert outcome.code == 0 and "resuming from step" in outcome.err, outcome.err
    assert own.state("moved") == own.state("whole")


def test_the_second_of_two_processes_says_who_has_the_run_at_once(runs):
    """Before torch is even imported: its message is there within the import of torch."""
    own = runs("lora")
    pid = own.start("two")
    lock = own.folder / "runs/two/.lock"
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.01)
    program = [sys.executable, "-X", "importtime", "-m", "vlkit", *map(str, own.command), "two"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 2 and f"process {pid} on {socket.gethostname()} since" in done.stderr
    assert "| torch\n" not in done.stderr and own.zygote.wait(pid) == 0


def test_a_lock_that_a_kill_left_does_not_block(runs):
    own = runs("lora")
    assert own.run("locked", VLKIT_FAULT="kill@before rename of step-000003") == -9
    assert "process" in (own.folder / "runs/locked/.lock").read_text()
    assert own.run("locked") == 0


def test_settings_that_make_another_run_are_refused(runs, vlkit):
    own = runs("lora")
    assert own.run("other", VLKIT_FAULT="kill@before rename of step-000006") == -9
    command = [*own.command, "other"]
    for flag, value in (("--batch-size", 19), ("--lr", 2e-2)):
        outcome = vlkit(*command, flag, value)
        assert outcome.code == 2 and flag[2:].replace("-", "_") in outcome.err
    settings = yaml.safe_load((own.folder / "runs/other/config.yaml").read_text())
    assert settings["batch_size"] == 20


def test_a_step_is_replayed_from_the_run_folder(runs, vlkit):
    """Any step: the pairs that the order says, the loss and the gradient to the bit; nothing in the folder changes."""
    own = runs("lora")
    run = own.folder / "runs/whole"

    def content():
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in run.rglob("*") if p.is_file()}

    before = content()
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in line}
    for step in (1, 4, 7):
        outcome = vlkit("train-retrieval", "--config", run / "config.yaml", "--replay", step, "--json")
        assert outcome.code == 0, outcome.err
        again = outcome.json()
        assert (again["loss"], again["grad_norm"]) == (lines[step]["loss"], lines[step]["grad_norm"])
        assert again["recorded"] == {"loss": again["loss"], "grad_norm": again["grad_norm"]}
        assert len(again["pair_ids"]) == lines[step]["items"]
    assert content() == before
    assert vlkit("train-retrieval", "--config", run / "config.yaml", "--replay", 8).code == 2


def test_a_finished_run_is_extended_and_the_extension_survives_a_kill(runs, vlkit):
    """A second cosine over the steps to come; killed in between, the same bytes; its snapshot repeats it as a whole."""
    own = runs("head")
    for name in ("long", "killed"):
        assert own.run(name) == 0
    longer = (*own.command, "long", "--extend-to", 9)
    assert vlkit(*own.command, "long").code == 2, "finished"
    outcome = vlkit(*longer)
    assert outcome.code == 0 and "resuming from step 4" in outcome.err, outcome.err
    lines = [json.loads(line) for line in (own.folder / "runs/long/metrics.jsonl").open()]
    rates = [line["lr"] for line in lines if "loss" in line]
    assert len(rates) == 9 and rates[4] > rates[3] and rates[8] < rates[5]
    killed = (*own.command, "killed", "--extend-to", 9)
    environment = {"VLKIT_FAULT": "kill@before rename of step-000006"}
    assert own.zygote.run(*killed, log=own.folder / "k.log", **environment) == -9
    assert own.zygote.run(*killed, log=own.folder / "k.log") == 0, (own.folder / "k.log").read_text()
    assert own.state("killed") == own.state("long")
    repeat = ("train-retrieval", "--config", own.folder / "runs/long/config.yaml", "--name", "repeat")
    assert vlkit(*repeat).code == 0
    assert own.state("repeat")[0] == own.state("long")[0]
    for flags, word in (((9,), "already"), ((12, "--lr", 1e-4), "lr was")):
        refused = vlkit(*own.command, "long", "--extend-to", *flags)
        assert refused.code == 2 and word in refused.err, refused.err
    assert vlkit(*own.command, "nothing", "--extend-to", 9).code == 2


@pytest.mark.parametrize("way", ["lora", "head"])
def test_a_new_run_begins_with_the_weights_of_another(way, runs, vlkit, prepared, tmp_path):
    """Its untouched model is the other one's tuned model, measured on the same rows."""
    own = runs(way)
    base = ("train-retrieval", "--data", prepared, "--runs-dir", tmp_path, "--name", "n", "--steps", 2)
    flags = ("--batch-size", 16, "--tune", "lora", "--init-from", own.folder / "runs/whole")
    outcome = vlkit(*base, *flags)
    assert outcome.code == 0, outcome.err
    fresh = vlkit("eval", "--run", tmp_path / "n", "--json").json()["baseline"]
    old = vlkit("eval", "--run", own.folder / "runs/whole", "--json", "--out", tmp_path / "o").json()["metrics"]
    for direction, metrics in old.items():
        assert fresh[direction]["mrr"] == pytest.approx(metrics["mrr"], abs=1e-6)
    refused = vlkit(*base[:-4], "--name", "m", *flags, "--model", "tiny-clip")
    assert refused.code == 2 and "--model says" in refused.err
    assert vlkit(*base[:-4], "--name", "m", *flags[:-1], tmp_path / "nowhere").code == 6


def test_a_run_that_does_not_fit_on_its_disk_is_refused_before_it_begins(prepared, vlkit, small_disk):
    for kilobytes, report in ((5000, "checkpoints and model need"), (1000, "the disk is full")):
        disk = small_disk(kilobytes)
        base = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", disk, "--name", "n")
        outcome = vlkit(*base, "--steps", 2, "--batch-size", 16)
        assert outcome.code == 5 and report in outcome.err, outcome.err


def test_a_stop_in_the_sweep_of_a_run_that_patience_ended(prepared, vlkit, tmp_path, monkeypatch):
    """The weights are then at some strength, and never get into the last step's checkpoint."""
    from vlkit.signals import StopRequested
    from vlkit.training.wise_ft import WeightInterpolation

    train = ("train-retrieval", "--data", prepared, "--model", "tiny-siglip", "--runs-dir", tmp_path, "--name")
    flags = ("--steps", 40, "--batch-size", 44, "--lr", 1e-9, "--eval-every", 3, "--save-every", 40, "--patience", 1)
    assert vlkit(*train, "whole", *flags, "--interpolate").code == 0

    def asked(self, *args):
        for parameter in self.parameters.values():
            parameter.data.zero_()
        raise StopRequested

    with monkeypatch.context() as patched:
        patched.setattr(WeightInterpolation, "measure", asked)
        outcome = vlkit(*train, "stopped", *flags, "--interpolate")
        assert outcome.code == 75, outcome.err
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")
    assert vlkit(*train, "stopped", *flags, "--interpolate").code == 0
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("whole", "stopped"))
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def test_killed_before_the_first_save_a_run_without_validation_begins_anew(raw, vlkit, tmp_path):
    """What such a kill leaves: lines of metrics, and no checkpoint; there are no evaluations that would save one."""
    prep = ("prep", "--domain", "recipes", "--source", raw, "--out", tmp_path / "data", "--val-share", 0)
    assert vlkit(*prep).code == 0
    train = ("train-retrieval", "--data", tmp_path / "data", "--model", "tiny-siglip", "--runs-dir", tmp_path)
    flags = ("--name", "n", "--steps", 12, "--batch-size", 4, "--eval-every", 2, "--save-every", 12)
    assert vlkit(*train, *flags).code == 0
    run, whole = tmp_path / "n", (tmp_path / "n/metrics.jsonl").read_text()
    for name in ("finished.json", "last.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text("".join(whole.splitlines(keepends=True)[:5]))
    outcome = vlkit(*train, *flags)
    assert outcome.code == 0 and "going on" not in outcome.err, outcome.err
    assert (run / "metrics.jsonl").read_text() == whole
