"""A store of frozen features: rows by key, kills, damage, and folders that follow what changes the features."""

import dataclasses
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.data.loading.stores import TokenStore
from vlkit.errors import ArtifactError, DataError, UsageError
from vlkit.models.cache import feature_cache
from vlkit.models.cache.feature_cache import FrozenImages, FrozenTexts, image_keys, text_keys
from vlkit.models.cache.feature_store import FeatureStore

ROWS = np.arange(60, dtype=np.float32).reshape(10, 2, 3)


def opened(folder, **about):
    return FeatureStore(folder, (2, 3), np.float32, about)


def test_rows_come_back_by_key_in_any_order_from_any_process(tmp_path):
    store, other = opened(tmp_path / "s"), opened(tmp_path / "s")
    store.append(list("abc"), ROWS[:3])
    assert other.missing(list("abcd")) == [0, 1, 2, 3]
    other.append(list("cde"), ROWS[2:5])  # c is there already
    store.reload()
    assert store.row_of == dict(zip("abcde", range(5), strict=True))
    assert np.array_equal(store.read([4, 0, 2, 0]), ROWS[[4, 0, 2, 0]])
    again = opened(tmp_path / "s")
    assert again.row_of == store.row_of and np.array_equal(again.read(range(5)), ROWS[:5])
    assert (tmp_path / "s/rows.bin").stat().st_size == 5 * 24


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400), st.integers(0, 120))
def test_what_a_kill_leaves_is_cut_off(index_bytes, row_bytes):
    """Any prefix of the index's last line, any tail of rows: the blocks before stay, the last one is written anew."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        store = opened(Path(folder) / "s")
        store.append(list("abc"), ROWS[:3])
        index, rows = Path(folder) / "s/index.jsonl", Path(folder) / "s/rows.bin"
        before = index.read_bytes()
        store.append(list("defg"), ROWS[3:7])
        line = index.read_bytes()[len(before) :]
        torn = line[: min(index_bytes, len(line) - 1)]
        index.write_bytes(before + torn)
        rows.write_bytes(rows.read_bytes()[:72] + bytes(range(1, 1 + row_bytes)))
        again = opened(Path(folder) / "s")
        assert list(again.row_of) == list("abc")
        again.append(list("de"), ROWS[3:5])
        assert np.array_equal(again.read(range(5)), ROWS[:5])
        assert [json.loads(item)["keys"] for item in index.read_text().splitlines()] == [list("abc"), list("de")]


def test_damage_is_found(tmp_path):
    store = opened(tmp_path / "s")
    store.append(list("abc"), ROWS[:3])
    path = tmp_path / "s/rows.bin"
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)
    again = opened(tmp_path / "s")
    assert np.array_equal(again.read([0, 2]), ROWS[[0, 2]])
    with pytest.raises(ArtifactError, match="damaged"):
        again.read([1])
    path.write_bytes(content[:40])
    with pytest.raises(ArtifactError, match="damaged"):
        opened(tmp_path / "s").read([0])
    (tmp_path / "s/index.jsonl").write_text("{no json\n")
    with pytest.raises(ArtifactError, match="damaged"):
        opened(tmp_path / "s")


def test_a_key_that_repeats_in_a_block_shifts_nothing(tmp_path):
    store = opened(tmp_path / "s")
    assert store.missing(["a", "a", "b", "a"]) == [0, 2]
    store.append(["a", "a", "b"], ROWS[[0, 0, 1]])
    store.append(["c", "c"], ROWS[[2, 2]])
    for again in (store, opened(tmp_path / "s")):
        assert np.array_equal(again.read([again.row_of[key] for key in "abc"]), ROWS[:3])


def fill(folder, first):
    store = opened(folder)
    for number in range(first, first + 40):
        store.append([f"k{number}"], np.full((1, 2, 3), number, np.float32))


def test_two_processes_fill_one_store_at_once(tmp_path):
    """Half of their keys are the same; every row is under its key, once."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(tmp_path / "s", first)) for first in (0, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    store = opened(tmp_path / "s")
    assert len(store.row_of) == 60 and (tmp_path / "s/rows.bin").stat().st_size == 60 * 24
    for key, place in store.row_of.items():
        assert (store.read([place]) == int(key[1:])).all()


def test_texts_of_the_same_tokens_are_one_row_and_the_others_stay_theirs(tiny, tmp_path):
    """Texts that a tokenizer cannot tell apart, among others: every embedding is that of no cache."""
    encoder = tiny("tiny-clip")
    encoder.model.requires_grad_(False)
    texts = [form for word in ("tart", "soup", "pie", "bread") for form in (word, word.upper(), f"a {word}, blue")] * 2
    tokens = TokenStore(encoder.tokenize(texts)[0], encoder.pad)
    frozen = FrozenTexts.from_encoder(encoder, "fp32", max(map(len, tokens.tokens)))
    features = frozen.features(frozen.open_store(str(tmp_path)), tokens, text_keys(tokens.tokens))
    assert len(frozen.open_store(str(tmp_path)).row_of) < len(set(texts))
    with torch.no_grad():
        expected = encoder.embed_texts(tokens[range(len(texts))])
        assert torch.allclose(encoder.embed_texts(features[range(len(texts))]), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip"])
def test_whatever_changes_the_features_changes_the_folder(name, tiny, tmp_path):
    """Weights, preprocessing, precision, depth, length, configuration: one by one."""

    def folders(change=lambda encoder: None, precision="fp32", longest=20):
        encoder = tiny(name)
        encoder.model.requires_grad_(False)
        change(encoder)
        prefixes = FrozenImages.from_encoder(encoder, precision), FrozenTexts.from_encoder(encoder, precision, longest)
        return tuple(prefix.folder(tmp_path) for prefix in prefixes)

    def weights(encoder):
        with torch.no_grad():
            encoder.model.vision_model.encoder.layers[0].mlp.fc1.bias[0] += 1e-3
            encoder.model.text_model.encoder.layers[0].mlp.fc1.bias[0] += 1e-3

    def heads(encoder):
        encoder.model.config.vision_config.num_attention_heads = (
            encoder.model.config.text_config.num_attention_heads
        ) = 1

    def depth(encoder):
        for chain in (encoder.image_chain, encoder.text_chain):
            chain[-1].modules[0].requires_grad_(True)

    def preprocessing(encoder):
        encoder.pixel_spec = dataclasses.replace(encoder.pixel_spec, mean=(0.1, 0.2, 0.3))

    plain = folders()
    assert plain == folders()
    for change in (weights, heads, depth):
        assert all(one != other for one, other in zip(plain, folders(change), strict=True)), change.__name__
    assert all(one != other for one, other in zip(plain, folders(precision="bf16"), strict=True))
    pictures, texts = folders(preprocessing)
    assert pictures != plain[0] and texts == plain[1]
    longer = folders(longest=40)
    assert longer[0] == plain[0] and (longer[1] != plain[1]) == (name == "tiny-clip")


def test_the_names_in_a_key_stay_so_that_older_caches_are_found(tiny, tmp_path):
    encoder = tiny("tiny-clip")
    encoder.model.requires_grad_(False)
    images, texts = FrozenImages.from_encoder(encoder, "fp32"), FrozenTexts.from_encoder(encoder, "fp32", 8)
    assert [prefix.folder(tmp_path).name.split("-")[0] for prefix in (images, texts)] == ["pictures", "texts"]
    for prefix in (images, texts):
        about = {"schema": 2, "kind": prefix.kind, "depth": prefix.depth, "precision": "fp32"}
        assert about.items() <= prefix.identity.items()
        assert prefix.identity.keys() - about.keys() == {"weights", "preprocessing", "config"}
    assert texts.identity["preprocessing"] == {"length": 8, "pad": encoder.pad_id, "pooling": None}
    assert images.identity["preprocessing"] == encoder.pixel_spec.identity()


@pytest.mark.parametrize("asked", [True, False])
def test_a_cache_that_cannot_be_written_is_done_without_unless_it_was_asked_for(asked, tiny, tmp_path, monkeypatch):
    encoder = tiny("tiny-clip")
    encoder.model.requires_grad_(False)
    tokens = TokenStore(encoder.tokenize(["red tart", "soup"])[0], encoder.pad)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("x")
    prefix, keys = FrozenTexts.from_encoder(encoder, "fp32", 8), text_keys(tokens.tokens)
    if asked:
        with pytest.raises(OSError, match="file"):
            feature_cache.fill(prefix, str(tmp_path / "file/below"), tokens, keys)
    else:
        assert feature_cache.fill(prefix, "auto", tokens, keys) is None


def test_a_picture_that_was_changed_is_computed_again(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    before = image_keys([path], ["id"])
    os.utime(path, (1, 1))
    touched = image_keys([path], ["id"])
    path.write_bytes(b"xx")
    os.utime(path, (1, 1))
    assert len({*before, *touched, *image_keys([path], ["id"])}) == 3
    with pytest.raises(DataError, match="no such image"):
        image_keys([tmp_path / "b.png"], ["id"])


def test_frozen_parts_run_without_dropout(tiny, tmp_path):
    encoder = tiny("tiny-clip")
    encoder.model.requires_grad_(False)
    for module in encoder.model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    encoder.train()
    tokens = TokenStore(encoder.tokenize(["red tart", "soup"])[0], encoder.pad)
    frozen = FrozenTexts.from_encoder(encoder, "fp32", 8)
    features = frozen.features(frozen.open_store(str(tmp_path)), tokens, text_keys(tokens.tokens))
    encoder.eval()
    with torch.no_grad():
        assert torch.allclose(encoder.embed_texts(features[[0, 1]]), encoder.embed_texts(tokens[[0, 1]]), atol=1e-6)


def test_numbers_that_16_bits_cannot_hold_are_refused(tiny, tmp_path):
    encoder = tiny("tiny-clip")
    encoder.model.requires_grad_(False)
    with torch.no_grad():
        encoder.model.text_projection.weight.mul_(1e8)
    tokens = TokenStore(encoder.tokenize(["red tart", "soup"])[0], encoder.pad)
    frozen = FrozenTexts.from_encoder(encoder, "bf16", 8)
    with pytest.raises(UsageError, match="cannot hold"):
        frozen.features(frozen.open_store(str(tmp_path / "c")), tokens, text_keys(tokens.tokens))
