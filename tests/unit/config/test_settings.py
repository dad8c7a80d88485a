"""Settings: types, what was given, and settings that have no effect."""

import dataclasses

import pytest
import yaml

from vlkit.config.base import Settings
from vlkit.config.fusion import TrainFusionConfig
from vlkit.config.presets import resolve_train_fusion, resolve_train_retrieval
from vlkit.config.training import TrainRetrievalConfig
from vlkit.errors import UsageError
from vlkit.runs import Run


def resolve(**values):
    return resolve_train_retrieval({"data": "data", "model": "tiny-siglip", **values})


@pytest.mark.parametrize(
    ("value", "expected"), [("32", 32), (32, 32), (32.0, 32), ("auto", "auto"), (None, None), ("1", 1)]
)
def test_a_micro_batch_is_a_number_auto_or_nothing(value, expected):
    config = resolve(micro_batch=value)
    assert config.micro_batch == expected and type(config.micro_batch) is type(expected)
    assert yaml.safe_load(config.to_yaml())["micro_batch"] == expected


@pytest.mark.parametrize("value", ["0", 0, -3, "-3", "many", "1.5", 1.5, "007", "\u0663", True, [3], {}])
def test_another_micro_batch_is_refused(value):
    for trainer in (resolve, lambda **values: resolve_train_fusion({"data": "data", **values})):
        with pytest.raises(UsageError, match="--micro-batch"):
            trainer(micro_batch=value)


def test_a_run_with_a_quoted_micro_batch_is_the_same_run(tmp_path):
    """Older versions wrote '32' into config.yaml."""
    run, config = Run(tmp_path / "run"), resolve(micro_batch="32")
    run.checkpoints.joinpath("step-000001").mkdir(parents=True)
    written = config.to_yaml().replace("micro_batch: 32", "micro_batch: '32'")
    assert "'32'" in written
    (run.folder / "config.yaml").write_text(written)
    run.begin(config, {})
    with pytest.raises(UsageError, match="micro_batch was 32, now 16"):
        run.begin(dataclasses.replace(config, micro_batch=16), {})
    assert TrainRetrievalConfig.from_layers(run.config()).micro_batch == 32


def test_what_was_given_is_no_setting_and_replace_carries_it():
    config = resolve(lr="1e-3")
    assert config.given == {"data", "model", "lr"}
    assert "given" not in config.fields() and "given" not in config.to_dict() and "given" not in repr(config)
    with pytest.raises(UsageError, match="unknown key 'given'"):
        TrainRetrievalConfig.from_layers({"given": ["lr"]})
    changed = dataclasses.replace(config, batch_size=8, warmup=0.5)
    assert changed.given == config.given and changed.was_given("lr")
    assert not changed.was_given("batch_size") and not changed.was_given("warmup")


def test_in_code_what_differs_from_the_default_was_given():
    config = TrainRetrievalConfig(lr=1e-3)
    assert config.given is None and config.was_given("lr") and not config.was_given("tune")


def test_equal_settings_are_equal_whoever_gave_them():
    assert TrainRetrievalConfig() == TrainRetrievalConfig.from_layers({"tune": "full"})
    assert hash(TrainRetrievalConfig()) == hash(TrainRetrievalConfig.from_layers({"tune": "full"}))


def test_idle_settings_are_refused_with_their_flags_and_a_way_out():
    with pytest.raises(UsageError) as caught:
        resolve(tune="full", lora_rank="16", unfreeze_layers=5)
    assert caught.value.exit_code == 2
    for text in ("--lora-rank 16", "--unfreeze-layers 5", "--tune full"):
        assert text in caught.value.message
    assert "--tune lora" in caught.value.hint and "--tune last" in caught.value.hint and "out" in caught.value.hint


@pytest.mark.parametrize(
    ("values", "flag", "way"),
    [
        ({"fusion": "mlp", "queries": 8}, "--queries 8", "--fusion cross-attention"),
        ({"fusion": "mlp", "fusion_layers": 2}, "--fusion-layers 2", "--fusion cross-attention"),
        ({"lora_alpha": 8}, "--lora-alpha 8: no effect without --llm-lora", "--llm-lora"),
        ({"lora_dropout": 0.5}, "--lora-dropout 0.5", "--llm-lora"),
        ({"llm": "other", "teach_steps": 5}, "--teach-steps 5: no effect with --llm other", "--llm tiny-qwen"),
    ],
)
def test_train_fusion_refuses_them_by_the_same_marks(values, flag, way):
    with pytest.raises(UsageError) as caught:
        resolve_train_fusion({"data": "data", **values})
    assert flag in caught.value.message and way in caught.value.hint


def test_at_its_default_or_with_what_it_needs_a_setting_is_accepted():
    assert resolve(tune="full", lora_rank=8, lora_targets=("q", "k", "v", "out")).lora_rank == 8
    assert resolve(tune="lora", lora_rank=16).lora_rank == 16
    assert resolve_train_fusion({"data": "data", "llm_lora": 4, "lora_alpha": 8}).lora_alpha == 8
    assert resolve_train_fusion({"data": "data", "llm": "tiny-qwen", "teach_steps": 5}).teach_steps == 5


def test_idle_settings_of_a_preset_are_not_refused_and_not_recorded():
    preset = {"tune": "last", "unfreeze_layers": 4}
    assert TrainRetrievalConfig.from_layers(preset, {}).unfreeze_layers == 4
    config = TrainRetrievalConfig.from_layers(preset, {"tune": "full"})
    config.refuse_idle()
    assert config.unfreeze_layers == 2


def test_a_run_begun_with_idle_settings_resumes_without_them(tmp_path):
    """Older versions recorded what a preset said, with effect or without."""
    run, config = Run(tmp_path / "run"), resolve(tune="full")
    run.checkpoints.joinpath("step-000001").mkdir(parents=True)
    (run.folder / "config.yaml").write_text(config.to_yaml().replace("unfreeze_layers: 2", "unfreeze_layers: 4"))
    run.begin(config, {})
    with pytest.raises(UsageError, match="unfreeze_layers was 4, now 2"):
        run.refuse_changes(dataclasses.replace(config, tune="last"))


@pytest.mark.parametrize("config", [TrainRetrievalConfig, TrainFusionConfig])
def test_every_requirement_names_a_setting_and_a_value_of_it(config: type[Settings]):
    marks = [field.requirement for field in config.fields().values() if field.requirement]
    assert marks
    for mark in marks:
        assert mark.setting in config.fields()
        assert all(value in choices for value in mark.values if (choices := config.fields()[mark.setting].choices))
