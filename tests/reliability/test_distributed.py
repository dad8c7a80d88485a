"""Two and four processes against one: the same loss, gradients and weights, uneven batches included."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import read_metrics, torchrun
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.images.spec import PixelSpec
from vlkit.data.loading.epoch_sampler import EpochSampler, batch_stream
from vlkit.data.loading.retrieval_batches import PairDataset
from vlkit.data.pairs import read_pairs
from vlkit.distributed import SINGLE, World, _shards
from vlkit.models import tuning
from vlkit.models.loading import load_dual_encoder
from vlkit.remote import file_sha256
from vlkit.training.gradient_cache import ContrastiveLoss
from vlkit.training.loop import steps


@given(st.integers(0, 200), st.integers(1, 9))
def test_shards_are_all_of_it_once_and_even(count, size):
    parts = _shards(count, size)
    assert list(itertools.chain.from_iterable(range(part.start, part.stop) for part in parts)) == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


def work(rank, size, folder, task):
    """One process: train as `task` says, write losses, the first step's gradients and the weights."""
    torch.set_num_threads(1)
    world = SINGLE
    if size > 1:
        path = f"file://{folder}/meet-{task['name']}-{size}"
        torch.distributed.init_process_group("gloo", init_method=path, rank=rank, world_size=size)
        world = World(rank, size)
    encoder = load_dual_encoder(task["model"])
    tuning.apply_tuning(encoder, TrainRetrievalConfig(tune=task["tune"], lora_dropout=0.0), seed=0)
    frame = read_pairs(task["data"]).frame
    wrong = frame[(frame["match"] == 0) & (frame["split"] == "train")].reset_index(drop=True)
    pairs = read_pairs(task["data"]).positives().split("train", limit=task["rows"])
    spec = PixelSpec(encoder.pixel_spec.size)
    items = PairDataset(
        pairs,
        spec,
        encoder.tokenize,
        encoder.pad,
        labels=task["labels"],
        negatives=wrong if len(wrong) else None,
        world=world,
    )
    order = EpochSampler.from_pair_ids(items.pair_ids, task["batch"], seed=1)
    named = tuning.trainable(encoder)
    optimizer = torch.optim.SGD([{"params": list(named.items()), "peak_lr": 0.01}], lr=0.01)
    grads = {}

    def keep(*_):
        if not grads:
            grads.update({name: p.grad.clone() for name, p in named.items()})

    optimizer.register_step_pre_hook(keep)
    contrast = ContrastiveLoss(encoder, task["loss"], task["micro"], world)
    batches = batch_stream(items, order, workers=0)
    actual = steps(batches, contrast, len, optimizer, total=task["steps"], world=world, max_grad_norm=1e9)
    losses = [step.loss for step in actual]
    if rank == 0:
        save_file(grads, f"{folder}/{task['name']}-{size}-grads.safetensors")
        save_file({k: p.detach().contiguous() for k, p in named.items()}, f"{folder}/{task['name']}-{size}.safetensors")
        with open(f"{folder}/{task['name']}-{size}.json", "w", encoding="utf-8") as file:
            json.dump(losses, file)
    if size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run(size, folder, task):
    """Losses, gradients and weights of `size` processes."""
    if size == 1:
        work(0, 1, folder, task)
    else:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=work, args=(rank, size, folder, task)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
    name = f"{folder}/{task['name']}-{size}"
    with open(f"{name}.json", encoding="utf-8") as file:
        return json.load(file), load_file(f"{name}-grads.safetensors"), load_file(f"{name}.safetensors")


def apart(one, other):
    """Norm of the difference over the total norm."""
    total = torch.sqrt(sum((g.double() ** 2).sum() for g in one.values()))
    return (torch.sqrt(sum(((one[k].double() - other[k].double()) ** 2).sum() for k in one)) / total).item()


@pytest.fixture(scope="module")
def augmented(prepared, tmp_path_factory, vlkit):
    data = shutil.copytree(prepared, tmp_path_factory.mktemp("augmented") / "data")
    assert vlkit("augment", "--data", data, "--pictures", 0).code == 0
    return data


TASKS = [
    # 43 rows in batches of 20: the last has 3, fewer than four processes.
    {
        "name": "uneven",
        "model": "tiny-siglip",
        "loss": "sigmoid",
        "labels": "multi-positive",
        "micro": None,
        "steps": 10,
    },
    {"name": "softmax", "model": "tiny-clip", "loss": "softmax", "labels": "mask", "micro": None, "steps": 6},
    {"name": "micro", "model": "tiny-siglip", "loss": "sigmoid", "labels": "eye", "micro": 3, "steps": 6},
    {"name": "lora", "model": "tiny-clip", "loss": "softmax", "labels": "multi-positive", "micro": 4, "steps": 6},
]


# Processes take long to start: the default suite has the hardest task, the slow one the others.
SLOW = ("softmax", "lora", "uneven")
SIZES = [
    *(
        pytest.param(2, task, id=f"{task['name']}-2", marks=pytest.mark.slow if task["name"] in SLOW else [])
        for task in TASKS
    ),
    pytest.param(4, TASKS[0], id="uneven-4", marks=pytest.mark.slow),
    pytest.param(4, TASKS[2], id="micro-4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "task"), SIZES)
def test_processes_take_the_steps_of_one(size, task, augmented, tiny_folder, tmp_path):
    task = {
        **task,
        "steps": 10,
        "model": str(tiny_folder(task["model"])),
        "data": str(augmented),
        "rows": 43,
        "batch": 20,
    }
    task["tune"] = "lora" if task["name"] == "lora" else "full"
    losses, grads, weights = run(1, tmp_path, task)
    actual = run(size, tmp_path, task)
    assert actual[0] == pytest.approx(losses, rel=1e-3), "of every step"
    assert actual[0][0] == pytest.approx(losses[0], rel=1e-6)
    assert apart(grads, actual[1]) <= 1e-5
    start = {key: p.detach() for key, p in load_dual_encoder(task["model"]).model.named_parameters()}
    moved = {key: weights[key] - start.get(key, torch.zeros(())) for key in weights}
    assert apart(moved, {key: actual[2][key] - start.get(key, torch.zeros(())) for key in moved}) <= 1e-4
    assert apart(weights, actual[2]) <= 1e-5
    for key in ("logit_scale", "logit_bias"):
        if key in grads:
            assert actual[1][key].item() == pytest.approx(grads[key].item(), rel=1e-4, abs=1e-7)


@pytest.mark.slow
def test_torchrun_writes_one_run_that_is_the_run(prepared, vlkit, tmp_path):
    """Losses, validation scores and weights of one process; each line once, said once; the same command repeats it."""
    flags = ("--data", prepared, "--steps", 6, "--batch-size", 24, "--eval-every", 3, "--seed", 5)
    one = vlkit("train-retrieval", "--model", "tiny-siglip", "--runs-dir", tmp_path, "--name", "one", *flags, "--json")
    assert one.code == 0, one.err
    done = torchrun(2, tmp_path, "--name", "two", *flags, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exported_step"] == one.json()["exported_step"]
    assert done.stderr.count("matching texts per row") == 1
    for mine, its in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert mine["step"] == its["step"]
        if "loss" in mine:
            assert its["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        else:
            assert its["val"]["text_to_image"]["recall@10"] == mine["val"]["text_to_image"]["recall@10"]
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two")]
    start = load_file(tmp_path / "one/base/model.safetensors")
    # AdamW makes a whole step of the rounding of a gradient that is truly zero, as that of a key's bias.
    moved = [{k: w[k] - start[k] for k in w if not k.endswith("k_proj.bias")} for w in weights]
    assert apart(*moved) < 0.02
    assert vlkit("eval", "--run", tmp_path / "two").code == 0
    again = torchrun(2, tmp_path, "--name", "two", *flags)
    assert again.returncode != 0 and "is finished" in again.stderr
    refused = torchrun(2, tmp_path, "--name", "three", *flags, "--micro-batch", "auto")
    assert refused.returncode != 0 and "give a number" in refused.stderr and not (tmp_path / "three").exists()


@pytest.mark.slow
def test_torchrun_stops_together_and_goes_on(prepared, tmp_path):
    """SIGTERM to torchrun: every process takes the same last step, one saves it, none hangs; then to the end."""
    flags = ("--data", prepared, "--batch-size", 24, "--steps", 400, "--save-every", 400, "--eval-every", 400)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words = [*program, "vlkit", "train-retrieval", "--model", "tiny-siglip", "--runs-dir", tmp_path, "--name", "s"]
    words = list(map(str, [*words, *flags]))
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "s/metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, report = process.communicate(timeout=60)
    assert process.returncode != 0 and "a second signal stops at once" in report, report
    saved = json.loads((tmp_path / "s/last.json").read_text())["step"]
    assert 3 <= saved < 400 and len(read_metrics(tmp_path / "s")) == saved
    assert not (tmp_path / "s/finished.json").exists()


@pytest.mark.slow
def test_torchrun_goes_on_where_it_stopped(prepared, vlkit, tmp_path):
    flags = ("--data", prepared, "--steps", 6, "--batch-size", 24, "--save-every", 2, "--eval-every", 2)
    assert torchrun(2, tmp_path, "--name", "whole", *flags).returncode == 0
    assert torchrun(2, tmp_path, "--name", "again", *flags).returncode == 0
    run = tmp_path / "again"
    for path in (run / "finished.json", run / "checkpoints/step-000006"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(run / "model")
    done = torchrun(2, tmp_path, "--name", "again", *flags)
    assert done.returncode == 0 and "resuming from step 4" in done.stderr
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("whole", "again"))
    assert file_sha256(one) == file_sha256(other)
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]
