"""Training the rows that captions use is training the whole table."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.pairs import read_pairs
from vlkit.models import dual_encoder, tiny, tuning
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.fast.partial_embedding import PartialEmbedding, train_used_rows
from vlkit.training.loop import adamw, steps
from vlkit.training.losses import LOSSES

WIDER = 4  # times the vocabulary that the captions need
CAPTIONS = ["a red soup", "green pie with salt", "a loaf of white bread", "yellow cake"]
UNSEEN = ["blue salad, twice", "a red cake"]


def widened(folder, name, seed=3):
    """A tiny model whose token table has rows, and tokens, that no caption of these tests uses."""
    if name == "tiny-xlmr":
        from vlkit.models import loading

        made = loading.load_or_create("tiny-clip", [*CAPTIONS, *UNSEEN], seed=seed, text_model=name, keep_in=folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        tiny.write_tiny(name, [*CAPTIONS, *UNSEEN], folder, seed=seed)
        made = dual_encoder.load(str(folder))
    table = made.model.text_model.get_input_embeddings()
    rows = len(table.weight)
    with torch.no_grad():
        more = torch.randn((WIDER - 1) * rows, table.embedding_dim, generator=torch.Generator().manual_seed(seed))
        table.weight = torch.nn.Parameter(torch.cat([table.weight, 0.02 * more]))
    table.num_embeddings = made.model.config.text_config.vocab_size = WIDER * rows
    return made


def trained(made: DualEncoder, taken: int = 5):
    """Losses and gradient norms of a few steps with a weight decay that shows."""
    tuning.train_mode(made)
    ids = made.pad(made.tokenize(CAPTIONS)[0])
    side = made.pixel_spec.size
    pixels = torch.randint(0, 255, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    optimizer = adamw(tuning.trainable(made), lr=3e-3, weight_decay=0.5)

    def loss(_):
        return LOSSES[made.family.loss](made.logits(made.embed_images(pixels), made.embed_texts(ids)), torch.eye(4))

    found = list(steps([0] * taken, loss, lambda _: 4, optimizer, total=taken, schedule=lambda n: 1 / (n + 1)))
    return [(step.loss, step.grad_norm) for step in found]


@pytest.mark.parametrize("tune", ["full", "text"])
@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip", "tiny-xlmr"])
def test_the_rows_that_occur_and_those_that_do_not_end_as_in_the_whole_table(name, tune, tmp_path):
    whole, narrowed = (widened(tmp_path / kind, name) for kind in ("whole", "narrowed"))
    start = {key: value.clone() for key, value in whole.model.state_dict().items()}
    for each in (whole, narrowed):
        tuning.apply_tuning(each, TrainRetrievalConfig(tune=tune), seed=0)
    table = train_used_rows(narrowed, narrowed.tokenize(CAPTIONS)[0])
    assert isinstance(table, PartialEmbedding) and len(table.used) < len(table.weight) / 2
    assert tuning.count_parameters(narrowed).trainable < tuning.count_parameters(whole).trainable
    ids = narrowed.pad(narrowed.tokenize([*CAPTIONS, *UNSEEN])[0])
    with torch.no_grad():
        assert torch.equal(narrowed.embed_texts(ids), whole.embed_texts(ids)), "before a step they are the same"
    for ours, exact in zip(trained(narrowed), trained(whole), strict=True):
        assert ours == pytest.approx(exact, rel=1e-5)
    found, exact = narrowed.model.state_dict(), whole.model.state_dict()
    assert found.keys() == exact.keys() == start.keys()
    for key, value in exact.items():
        assert torch.allclose(found[key], value, rtol=1e-5, atol=1e-6), key
    key = next(key for key in start if key.endswith((".token_embedding.weight", ".word_embeddings.weight")))
    # 5 steps of rates 3e-3 / n decay by half of their sum: 0.34 %.
    decay = (exact[key][-1].norm() / start[key][-1].norm()).item()
    assert decay == pytest.approx(1 - 0.5 * 3e-3 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5), rel=1e-4)
    with torch.no_grad():
        for each in (narrowed, whole):
            each.eval()
        assert torch.allclose(narrowed.embed_texts(ids), whole.embed_texts(ids), atol=1e-5), "unseen tokens, too"


def test_a_token_that_was_not_to_occur_is_looked_up_and_not_trained(tmp_path):
    made = widened(tmp_path / "model", "tiny-clip")
    tuning.apply_tuning(made, TrainRetrievalConfig(), seed=0)
    table = train_used_rows(made, made.tokenize(CAPTIONS)[0])
    unseen = len(table.weight) - 1
    found = table(torch.tensor([unseen, int(made.pad_id)]))
    assert torch.equal(found[0], table.weight[unseen])
    found.sum().backward()
    assert table.used.grad[-1].abs().max() == 0 and table.used.grad.abs().sum() == table.embedding_dim


def test_what_a_table_saves_it_can_load(tmp_path):
    narrowed, other = (widened(tmp_path / kind, "tiny-clip") for kind in ("narrowed", "other"))
    for made, seen in ((narrowed, CAPTIONS), (other, UNSEEN)):
        tuning.apply_tuning(made, TrainRetrievalConfig(), seed=0)
        train_used_rows(made, made.tokenize(seen)[0])
    trained(narrowed)
    state = {key: value.clone() for key, value in narrowed.model.state_dict().items()}
    fresh = widened(tmp_path / "fresh", "tiny-clip", seed=4)
    for made in (narrowed, other, fresh):  # Its own table, one of other rows, a whole one.
        made.model.load_state_dict(state)
        assert all(torch.equal(made.model.state_dict()[key], value) for key, value in state.items())
    key = next(key for key in state if key.endswith("token_embedding.weight"))
    with pytest.raises(RuntimeError, match="token_embedding"):
        narrowed.model.load_state_dict({**state, key: state[key][:-1]})
    with pytest.raises(RuntimeError, match=r"Missing key.*token_embedding\.weight"):
        narrowed.model.load_state_dict({name: value for name, value in state.items() if name != key})


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-xlmr"])
def test_padding_is_trained_where_it_ends_a_text_and_no_caption_has_it(name, tmp_path):
    made = widened(tmp_path / "model", name)
    tuning.apply_tuning(made, TrainRetrievalConfig(), seed=0)
    table = train_used_rows(made, [[tokens[1]] for tokens in made.tokenize(CAPTIONS)[0]])
    assert table.place[made.pad_id] < len(table.used) - 1


@pytest.mark.parametrize("other", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}, {}])
def test_a_table_of_a_kind_of_its_own_stays_whole(other, tmp_path):
    """Gemma's, for one, is a subclass that scales its rows."""
    made = widened(tmp_path / "model", "tiny-clip")
    tuning.apply_tuning(made, TrainRetrievalConfig(), seed=0)
    table = made.model.text_model.get_input_embeddings()
    for name, value in other.items():
        setattr(table, name, value)
    if not other:
        table.__class__ = type("Scaled", (torch.nn.Embedding,), {})
    assert train_used_rows(made, made.tokenize(CAPTIONS)[0]) is None
    assert table.weight.requires_grad


def test_a_row_that_is_padding_gets_no_gradient_where_the_encoder_gives_it_none(tmp_path):
    made = widened(tmp_path / "model", "tiny-clip")
    tuning.apply_tuning(made, TrainRetrievalConfig(), seed=0)
    ids = made.tokenize(CAPTIONS)[0]
    made.model.text_model.get_input_embeddings().padding_idx = ids[0][1]
    table = train_used_rows(made, ids)
    table(torch.tensor(ids[0][:3])).sum().backward()
    rows = table.used.grad.abs().sum(1)[table.place[torch.tensor(ids[0][:3])]]
    assert rows[1] == 0 and rows[0] > 0 and rows[2] > 0


@pytest.mark.parametrize("tune", ["head", "image", "lora", "last"])
def test_a_table_that_is_not_trained_or_mostly_used_stays_as_it_is(tune, tmp_path):
    made = widened(tmp_path / "model", "tiny-clip")
    tuning.apply_tuning(made, TrainRetrievalConfig(tune=tune, unfreeze_layers=1), seed=0)
    assert train_used_rows(made, made.tokenize(CAPTIONS)[0]) is None
    tuning.apply_tuning(made, TrainRetrievalConfig(), seed=0)
    half = range(len(made.model.text_model.get_input_embeddings().weight) // 2 + 1)
    assert train_used_rows(made, [half]) is None
    ids = made.tokenize(CAPTIONS)[0]
    assert train_used_rows(made, ids, whole={"text_model.embeddings.token_embedding.weight"}) is None, (
        "a run that had it whole"
    )
    made.model.text_model.get_input_embeddings = lambda: (_ for _ in ()).throw(NotImplementedError)
    assert train_used_rows(made, ids) is None, "an encoder without a table"


def wide(folder, prepared):
    """Folder of a tiny CLIP whose tokenizer knows many words beside those of the prepared recipes."""
    folder.mkdir()
    words = [f"{first}{second}" for first in "kvwxz" for second in ("ab", "ec", "id", "of", "ug", "yh")]
    others = [" ".join(words[n % 30 :] + words[: n % 7]) for n in range(60)]
    tiny.write_tiny("tiny-clip", [*(3 * others), *read_pairs(prepared).frame["text"]], folder, seed=1)
    return folder


@pytest.mark.parametrize("sort", ["full", "text"])
def test_a_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(sort, prepared, vlkit, tmp_path):
    folder = wide(tmp_path / "wide", prepared)
    command = ("train-retrieval", "--data", prepared, "--model", folder, "--runs-dir", tmp_path, "--tune", sort)
    command = (*command, "--batch-size", 16, "--save-every", 2, "--keep", 9, "--weight-decay", 0.3)
    outcome = vlkit(*command, "--name", "one", "--steps", 6)
    assert outcome.code == 0 and "rows occur in the captions" in outcome.err, outcome.err
    assert vlkit(*command, "--name", "two", "--steps", 6).code == 0
    for later in set((tmp_path / "two/checkpoints").iterdir()) - {tmp_path / "two/checkpoints/step-000002"}:
        shutil.rmtree(later)
    for name in ("finished.json", "model/model.safetensors", "best.json", "last.json"):
        (tmp_path / "two" / name).unlink()
    again = vlkit(*command, "--name", "two", "--steps", 6)
    assert again.code == 0 and "going on from step 2" in again.err, again.err
    ends = [load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    saved = load_file(next((tmp_path / "one/checkpoints").glob("*/trainable.safetensors")))
    table = "text_model.embeddings.token_embedding"
    assert f"{table}.weight" not in saved and len(saved[f"{table}.used"]) < len(ends[0][f"{table}.weight"]) / 2
    start = load_file(folder / "model.safetensors")[f"{table}.weight"]
    decay = ends[0][f"{table}.weight"] / start
    unused = decay.std(1) < 1e-6
    assert unused.sum() > len(start) / 2 and decay[unused].mean() < 1


def test_a_run_that_was_begun_with_the_whole_table_goes_on_with_it(prepared, vlkit, tmp_path, monkeypatch):
    from vlkit.training import train_retrieval

    folder = wide(tmp_path / "wide", prepared)
    command = ("train-retrieval", "--data", prepared, "--model", folder, "--runs-dir", tmp_path, "--tune", "text")
    command = (*command, "--batch-size", 16, "--eval-every", 2, "--save-every", 2, "--name", "before")
    with monkeypatch.context() as patch:
        patch.setattr(train_retrieval, "narrow", lambda *_: None)
        assert vlkit(*command, "--steps", 4).code == 0
    outcome = vlkit(*command, "--extend-to", 6)
    assert outcome.code == 0 and "going on from step 4" in outcome.err, outcome.err
    assert "rows occur in the captions" not in outcome.err
    assert "rows occur in the captions" in vlkit(*command[:-1], "after", "--steps", 2).err
