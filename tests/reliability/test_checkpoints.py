"""Checkpoints: what is saved comes back, what is damaged is passed over, nothing is half there."""

import json
import os
import threading

import pytest
import torch

from vlkit import checkpoints
from vlkit.errors import ArtifactError
from vlkit.training.optimizer import adamw


def made(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    return model, adamw(dict(model.named_parameters()), lr=1e-2, weight_decay=0.1)


def step(model, optimizer, times=3):
    for _ in range(times):
        model(torch.ones(2, 3)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_optimizer_goes_on_as_if_nothing_had_happened(tmp_path):
    model, optimizer = made()
    step(model, optimizer)
    checkpoints.save(tmp_path, 3, dict(model.named_parameters()), optimizer, {"note": "x"})
    step(model, optimizer)
    other, fresh = made(seed=1)
    restored = checkpoints.newest(tmp_path)
    restored.restore(dict(other.named_parameters()), fresh)
    step(other, fresh)
    assert restored.step == 3
    assert restored.state["note"] == "x"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("damage", ["flip", "missing", "manifest", "schema", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage, tmp_path, capsys):
    model, optimizer = made()
    step(model, optimizer)
    for number in (2, 4):
        checkpoints.save(tmp_path, number, dict(model.named_parameters()), optimizer, {})
    newest = tmp_path / "step-000004"
    if damage == "flip":
        content = bytearray((newest / "trainable.safetensors").read_bytes())
        content[-1] ^= 1
        (newest / "trainable.safetensors").write_bytes(content)
    elif damage == "missing":
        (newest / "optimizer.safetensors").unlink()
    elif damage == "manifest":
        (newest / "MANIFEST.json").write_text('{"schema": 1, "files": {"../../x": "0"}}')
    elif damage == "schema":
        manifest = json.loads((newest / "MANIFEST.json").read_text())
        (newest / "MANIFEST.json").write_text(json.dumps({**manifest, "schema": 99}))
    else:
        (newest / "state.json").write_text("")
    assert checkpoints.newest(tmp_path).step == 2
    assert "step-000004" in capsys.readouterr().err
    (tmp_path / "step-000002" / "state.json").write_text("{}")
    with pytest.raises(ArtifactError, match="all 2 checkpoints are damaged"):
        checkpoints.newest(tmp_path)


def test_what_another_process_left_aside_is_no_checkpoint(tmp_path):
    (tmp_path / ".step-000009.abc.part").mkdir()
    (tmp_path / "step-000001x").mkdir()
    assert checkpoints.newest(tmp_path) is None


def test_another_model_is_refused(tmp_path):
    model, optimizer = made()
    saved = checkpoints.save(tmp_path, 1, dict(model.named_parameters()), optimizer, {})
    wider = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    with pytest.raises(ArtifactError, match="another model"):
        saved.restore(dict(wider.named_parameters()))


def test_the_newest_and_the_best_are_kept(tmp_path):
    model, optimizer = made()
    for number in (1, 2, 3, 4, 5):
        checkpoints.save(tmp_path, number, dict(model.named_parameters()), optimizer, {})
    checkpoints.prune(tmp_path, keep=2, best=2)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        "step-000002",
        "step-000004",
        "step-000005",
    ]


def test_a_failed_write_leaves_the_old_state(tmp_path):
    from vlkit.storage import atomic_file, atomic_folder

    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as aside:
        aside.write_text("half")
        raise RuntimeError
    with atomic_folder(tmp_path / "folder") as aside:
        (aside / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as aside:
        (aside / "x").write_text("half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "folder" / "x").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_reader_meets_a_whole_folder_at_every_moment(tmp_path):
    """While a folder is replaced over and over, every look finds it there, its two files of the same version."""
    from vlkit.storage import atomic_folder

    def write(version):
        with atomic_folder(tmp_path / "folder") as aside:
            (aside / "a").write_text(str(version))
            (aside / "b").write_text(str(version))

    write(0)
    torn, done = [], threading.Event()

    def look():
        while not done.is_set():
            try:
                handle = os.open(tmp_path / "folder", os.O_RDONLY)
            except FileNotFoundError:
                torn.append("gone")
                return
            try:
                names = [os.open(name, os.O_RDONLY, dir_fd=handle) for name in ("a", "b")]
                if len({os.read(name, 10) for name in names}) != 1:
                    torn.append("mixed")
                for name in names:
                    os.close(name)
            except FileNotFoundError:
                pass  # The folder that was opened has been replaced and is being removed: a reader opens it again.
            finally:
                os.close(handle)

    reader = threading.Thread(target=look)
    reader.start()
    for version in range(1, 60):
        write(version)
        assert (tmp_path / "folder/a").read_text() == str(version)
    done.set()
    reader.join()
    assert torn == []
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("table", ["token_embedding", "word_embeddings"])
def test_a_part_of_a_token_table_that_earlier_versions_trained_is_refused_with_a_way_out(table, tmp_path):
    part = {f"text_model.embeddings.{table}.used": torch.nn.Parameter(torch.ones(3, 4))}
    checkpoints.save(tmp_path, 1, part, adamw(part, lr=1e-2, weight_decay=0.1), {})
    whole = {f"text_model.embeddings.{table}.weight": torch.nn.Parameter(torch.ones(9, 4))}
    with pytest.raises(ArtifactError, match="earlier vlkit") as refused:
        checkpoints.newest(tmp_path).restore(whole)
    assert "--name" in refused.value.hint
