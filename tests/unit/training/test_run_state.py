"""What RunState decides after a step, and what a checkpoint says to the process that goes on from it."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from helpers import read_metrics

from vlkit import checkpoints
from vlkit.config.training import TrainRetrievalConfig
from vlkit.distributed import SINGLE
from vlkit.errors import Stopped
from vlkit.models.tuning import ParameterCounts
from vlkit.runs import Run
from vlkit.signals import StopRequested
from vlkit.storage import Location
from vlkit.training.loop import Step
from vlkit.training.run_state import RunState

SETTINGS = {"steps": 5, "eval_every": 2, "save_every": 3, "lr": 0.1, "precision": "fp32"}


@pytest.fixture
def new_state(tmp_path):
    """Make the state of one run as each of its processes makes it anew; the folder is all that they share."""

    def make(previous=None, *, batches_per_epoch=4, validates=True, **changes):
        config = TrainRetrievalConfig(
            data=Location("data"), name="run", runs_dir=Location(str(tmp_path)), **SETTINGS | changes
        )
        run = Run(tmp_path / "run", is_writer=config.replay is None)
        if config.replay is None:
            run.begin(config, {"fingerprint": "0"}, previous.config if previous else None)
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        return RunState(
            config,
            run,
            SINGLE,
            parameters=dict(model.named_parameters()),
            counts=ParameterCounts(3, 3),
            rates={},
            batches_per_epoch=batches_per_epoch,
            validates=validates,
            best_metric_name="recall",
        )

    return make


def take_step(state):
    """Change the weights, and log the step, as a trainer's loop does."""
    for parameter in state.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.log(Step(state.step + 1, loss=1.0, grad_norm=1.0, lr=0.1, items=2, skipped=False), {})


def evaluate(state, key):
    state.record({"score": key}, [key], f"{key}")


def train(state, keys, until=None):
    """Go on as both trainers' loops do, to `until` or where the run ends; `keys`: step -> what its evaluation gives."""
    while state.step != until:
        take_step(state)
        if state.step == until:
            return
        if state.eval_due():
            evaluate(state, keys[state.step])
        if state.save_due():
            state.save()
        if state.stop_due():
            return


def due(state):
    """Return the names of what is due after this step."""
    answers = {"eval": state.eval_due(), "save": state.save_due(), "stop": state.stop_due()}
    return {name for name, answer in answers.items() if answer}


def due_by_step(state, steps):
    seen = {}
    for _ in range(steps):
        take_step(state)
        seen[state.step] = due(state)
    return seen


def stop_in_evaluation(state):
    """End the process as a signal in the middle of an evaluation does: the step is saved, its evaluation is not."""
    with pytest.raises(Stopped, match=f"step {state.step} of {state.total_steps}"), state.stoppable():
        raise StopRequested


def saved_state(state, step):
    return checkpoints.read_verified(state.run.checkpoints / checkpoints.folder_name(step)).state


def weights(state, step):
    return (state.run.checkpoints / checkpoints.folder_name(step) / "trainable.safetensors").read_bytes()


def evaluations(state):
    """Return (step, score) of the evaluations in metrics.jsonl."""
    return [(line["step"], line["val"]["score"]) for line in read_metrics(state.run.folder) if "val" in line]


def test_what_is_due_after_each_step(new_state):
    """Every second step is evaluated, every third saved; an epoch ends with step 4 and the run with step 5."""
    expected = {1: set(), 2: {"eval"}, 3: {"save"}, 4: {"eval", "save"}, 5: {"eval", "save", "stop"}}
    assert due_by_step(new_state(), 5) == expected


def test_an_epoch_ends_within_the_step_that_takes_its_last_batch(new_state):
    """Of 3 batches, 2 a step: epochs end within steps 2, 3, 5 and, as the run does, 6."""
    answers = due_by_step(new_state(steps=6, save_every=100, grad_accum=2, batches_per_epoch=3), 6)
    assert [step for step, names in answers.items() if "save" in names] == [2, 3, 5, 6]


def test_a_run_without_rows_to_evaluate_on_only_saves(new_state):
    answers = due_by_step(new_state(validates=False), 5)
    assert answers == {1: set(), 2: set(), 3: {"save"}, 4: {"save"}, 5: {"save", "stop"}}


def test_a_step_is_evaluated_once(new_state):
    state = new_state()
    train(state, {}, until=2)
    assert state.eval_due()
    evaluate(state, 1.0)
    assert not state.eval_due() and saved_state(state, 2)["evaluation_due"] is False


def test_the_later_of_equal_evaluations_is_the_best_and_no_improvement(new_state):
    state = new_state(steps=20, keep=1)
    bests = {}
    for key in (1.0, 1.0, 0.5, 2.0):
        train(state, {}, until=state.step + 2)
        evaluate(state, key)
        bests[state.step] = (state.best["step"], state.best["improved"], state.exported_step())
        pointer = json.loads((state.run.folder / "best.json").read_text())
        assert pointer == {"checkpoint": f"checkpoints/step-{state.best['step']:06d}", **state.best}
        assert saved_state(state, state.best["step"])["best"] == state.best, "its checkpoint is there"
    assert bests == {2: (2, 2, 2), 4: (4, 2, 4), 6: (4, 2, 4), 8: (8, 8, 8)}


@pytest.mark.parametrize(
    ("scores", "last"),
    [
        ((1.0, 0.5, 0.5), 6),
        ((1.0, 1.0, 1.0), 6),
        ((1.0, 2.0, 1.0, 1.0), 8),
        ((1.0, 0.5, 2.0, 0.5, 3.0), 10),
        ((1.0, 2.0, 3.0, 4.0, 5.0), 10),
    ],
    ids=["worse", "equal", "worse after a better one", "never twice in a row", "always better"],
)
def test_patience_ends_a_run_after_evaluations_without_improvement(scores, last, new_state):
    state = new_state(steps=10, patience=2)
    train(state, dict(zip(range(2, 11, 2), scores, strict=False)))
    assert state.step == last and state.best["val"]["score"] == max(scores)
    assert evaluations(state) == list(zip(range(2, last + 1, 2), scores, strict=True))


def test_a_run_that_patience_ended_takes_no_further_step(new_state):
    train(new_state(steps=10, patience=2), {2: 1.0, 4: 0.5, 6: 0.5})
    state = new_state(steps=10, patience=2)
    state.resume()
    assert state.step == state.loop_settings(None)["total"] == 6
    state.raise_if_stopped()


def test_an_extended_run_counts_its_patience_anew(new_state):
    """Of two evaluations without improvement one was before the extension, so that two more are made."""
    first = new_state(steps=4, patience=2)
    train(first, {2: 1.0, 4: 0.5})
    assert first.step == 4
    state = new_state(first, steps=12, patience=2, legs=(4,))
    state.resume()
    assert (state.step, state.best["improved"], due(state)) == (4, 2, {"save"})
    assert state.loop_settings(None)["total"] == 12
    train(state, {6: 0.5, 8: 0.5})
    assert state.step == 8


def test_a_signal_ends_a_run_after_the_step_which_is_saved(new_state):
    state = new_state()
    with pytest.raises(Stopped, match="SIGTERM after step 1 of 5"), state.stoppable():
        take_step(state)
        state.sync_stop()
        assert due(state) == set()
        signal.raise_signal(signal.SIGTERM)
        assert due(state) == set(), "heard by sync_stop alone, at the same step on all processes"
        state.sync_stop()
        assert due(state) == {"save", "stop"}
        state.save()
        state.raise_if_stopped()
    again = new_state()
    again.resume()
    assert again.step == 1 and not again.stop_due()


KEYS = pytest.mark.parametrize("key", [2.0, 1.0, 0.5], ids=["better", "equal", "worse"])
STOPS = pytest.mark.parametrize(
    ("stopped_at", "changes"),
    [(4, {}), (5, {}), (5, {"steps": 9, "legs": (5,)})],
    ids=["every second step", "the last step", "neither, in an extended run"],
)


@KEYS
@STOPS
def test_the_evaluation_that_a_stop_interrupted_is_made_on_resuming(stopped_at, changes, key, new_state):
    first = new_state()
    train(first, {2: 1.0, 4: 0.75}, until=stopped_at)
    stop_in_evaluation(first)
    evaluated = evaluations(first)
    assert saved_state(first, stopped_at)["evaluation_due"] is True
    state = new_state(first, **changes)
    state.resume()
    assert state.step == stopped_at and state.eval_due() and state.best["step"] == 2
    evaluate(state, key)
    assert not state.eval_due()
    assert state.best["step"] == (stopped_at if key >= 1.0 else 2)
    assert state.best["improved"] == (stopped_at if key > 1.0 else 2)
    assert evaluations(state) == [*evaluated, (stopped_at, key)]


@KEYS
@STOPS
def test_an_evaluation_made_on_resuming_is_made_again_by_whoever_resumes_there_once_more(
    stopped_at, changes, key, new_state
):
    """The checkpoint is never written twice: it goes on saying what it said, and the evaluation gives the same."""
    first = new_state()
    train(first, {2: 1.0, 4: 0.75}, until=stopped_at)
    stop_in_evaluation(first)
    before = weights(first, stopped_at)
    state = new_state(first, **changes)
    state.resume()
    evaluate(state, key)
    assert saved_state(state, stopped_at)["evaluation_due"] is True and weights(state, stopped_at) == before
    again = new_state(**changes)
    again.resume()
    assert again.step == stopped_at and again.eval_due()
    evaluate(again, key)
    assert again.best == state.best and not again.eval_due()


def test_a_second_stop_in_the_same_evaluation_repeats_it_again(new_state):
    first = new_state()
    train(first, {2: 1.0}, until=4)
    stop_in_evaluation(first)
    state = new_state()
    state.resume()
    stop_in_evaluation(state)
    state = new_state()
    state.resume()
    assert state.step == 4 and state.eval_due() and saved_state(state, 4)["evaluation_due"] is True


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(new_state):
    keys = {2: 1.0, 4: 2.0, 5: 1.5}
    first = new_state()
    train(first, keys, until=4)
    stop_in_evaluation(first)
    state = new_state()
    state.resume()
    evaluate(state, keys[4])
    train(state, keys)
    resumed = weights(state, 5)
    for folder in state.run.checkpoints.iterdir():
        folder.rename(folder.with_name(f"old-{folder.name}"))
    (state.run.folder / "last.json").unlink()
    (state.run.folder / "metrics.jsonl").unlink()
    whole = new_state()
    train(whole, keys)
    assert weights(whole, 5) == resumed and whole.best == state.best


def test_a_replay_evaluates_and_saves_nothing_and_stops_at_its_step(new_state):
    first = new_state(save_every=1, keep=9)
    train(first, {2: 1.0, 4: 2.0, 5: 3.0})
    before = {path: path.read_bytes() for path in sorted(first.run.folder.rglob("*")) if path.is_file()}
    state = new_state(replay=4)
    state.resume()
    assert (state.step, state.replaying) == (3, 4), "from the newest checkpoint before it"
    assert due_by_step(state, 2) == {4: {"stop"}, 5: set()}
    state = new_state(replay=2)
    assert due_by_step(state, 5) == {1: set(), 2: {"stop"}, 3: set(), 4: set(), 5: set()}
    assert {path: path.read_bytes() for path in sorted(first.run.folder.rglob("*")) if path.is_file()} == before
