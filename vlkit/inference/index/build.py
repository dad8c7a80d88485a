"""index: a model, and what it is to find -> an index folder, tuned and measured."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlkit import __version__, console
from vlkit.config.presets import only_prepared_folder
from vlkit.config.search import INDEXES, IndexConfig, IndexType
from vlkit.data.pairs import data_of
from vlkit.errors import ArtifactError, ResourceError
from vlkit.evaluation.efficiency import measure_query_latency
from vlkit.inference.index import index_folder
from vlkit.inference.index import query_encoder as embedders
from vlkit.inference.index.documents import MODALITIES, Modality, DocumentSource
from vlkit.inference.index.embed_documents import Part, Queries, embedded, held_out_queries
from vlkit.inference.index.faiss_index import PARAMETERS, Nearest, index_bytes, refuse_few, type_for
from vlkit.inference.index.index_folder import Index
from vlkit.inference.index.query_encoder import QueryEncoder, decode_of
from vlkit.inference.index.tune import Found, tuned
from vlkit.models.loading import model_config
from vlkit.runs import Run
from vlkit.storage import Location, nearest_existing, json_text, refuse_unwritable, format_bytes

# Bytes of a docstore's row beside its text, about.
ROW_BYTES = 200


def index(config: IndexConfig, *, dry_run: bool) -> dict[str, Any]:
    """Run `vlkit index`: embed, build, tune, measure, write; returns index.yaml's content.

    Raises:
        DataError: nothing to index. ArtifactError: --update of another model's index. ResourceError: the disk.
    """
    out = config.out or Location(INDEXES / _default_name(config))
    index_folder.refuse_other(out)
    if not out.is_remote:
        refuse_unwritable(out.path, "--out")
    said = embedders.named(config)
    run = Run(config.run) if config.run else None
    data = config.data or (data_of(run) if run else Location(only_prepared_folder()))
    before = _to_update(config, out)
    if before is not None:
        config, data = _as_before(config, before), data if config.data else Location(before.about["data"]["path"])
    source = DocumentSource.read(data, limit=config.limit, seed=config.seed)
    kinds = [kind for kind in MODALITIES if config.of in (kind, "both") and (kind == "texts" or source.pairs is not None)]
    tables = {kind: source.entries(kind) for kind in kinds or ["images"]}
    types = {kind: _type(kind, len(table), config, before) for kind, table in tables.items()}
    if dry_run:
        return _planned(config, out, tables, types, _width(config, run))
    precision = config.precision or (run.config().get("precision") if run else None)
    embedder = QueryEncoder.of(
        embedders.open_towers(said, decode=config.decode), precision, persian=source.script == "persian"
    )
    _refuse_full(out, _needed(tables, types, embedder.encoder.width))
    about = {
        "model": {**said, "precision": embedder.precision},
        **embedder.identity(),
        "data": {
            "path": str(data.absolute),
            "fingerprint": source.fingerprint,
            "script": source.script,
            "limit": config.limit,
        },
        "width": embedder.encoder.width,
        "target_recall": config.target_recall,
    }
    if before is not None:
        _refuse_other_model(before, about)
    parts = [embedded(embedder, config, source, kind, table, before) for kind, table in tables.items()]
    drawn = {part.kind: held_out_queries(part, types[part.kind] != "flat", config, source, parts) for part in parts}
    table = pa.concat_tables([part.table for part, _ in drawn.values()])
    if before is not None and _unchanged(before, table, types, config):
        console.print_result(f"{out} is up to date: nothing is new, changed or gone")
        return {"index": str(out), **before.about}
    searched, nearest = {}, {}
    for kind, (part, queries) in drawn.items():
        nearest[kind], found = _built(part, types[kind], queries, config)
        searched[kind] = _facts(part, nearest[kind], found)
    latency, late = measure_query_latency(embedder.encoder, source.some_texts(), embedder.precision)
    about |= {
        "searched": searched,
        "encoding_ms": latency * 1000,
        "encoding_ms_p95": late * 1000,
        "vlkit": __version__,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    index_folder.write(out, about, table, nearest)
    _tell(out, about)
    return {"index": str(out), "schema": index_folder.VERSION, **about}


def _refuse_other_model(before: Index, about: dict[str, Any]) -> None:
    """An index is added to by the model that made it, or not at all.

    Raises:
        ArtifactError: says what differs.
    """
    pairs = [(name, before.about.get(name), about[name]) for name in ("weights", "preprocessing")]
    pairs.append(("precision", before.about["model"]["precision"], about["model"]["precision"]))
    for name, old, new in pairs:
        if json_text(old) != json_text(new):
            told = f"{before.location} was made with another model: its vectors, of other {name}, cannot be used again"
            raise ArtifactError(told, hint="leave out --update to build it anew")


def _default_name(config: IndexConfig) -> str:
    folder = config.run or Path(str(config.model))
    name = folder.resolve().name if folder.exists() else folder.name
    return f"{name}-untouched" if config.untouched else name


def _width(config: IndexConfig, run: Run | None) -> int:
    """Of the common space, without loading a weight."""
    settings = run.config() if run else {}
    name = config.model or (str(run.base) if run and run.base.is_dir() else settings["model"])
    found = model_config(name, None if run and run.base.is_dir() else settings.get("text_model"))
    return int(getattr(found, "projection_dim", None) or found.vision_config.hidden_size)


def _planned(
    config: IndexConfig, out: Location, tables: dict[Modality, pa.Table], types: dict[Modality, IndexType], width: int
) -> dict[str, Any]:
    """What --dry-run says."""
    sizes = {kind: index_bytes(len(table), width, types[kind]) for kind, table in tables.items()}
    rows = [[kind, f"{len(table):,}", types[kind], format_bytes(sizes[kind])] for kind, table in tables.items()]
    console.print_table(f"{out}: would be", ["", "rows", "type", "on disk"], rows)
    memory = 2 * sum(len(table) for table in tables.values()) * width * 4
    console.print_result(
        f"embeddings need about {format_bytes(memory)} of memory; {_needed(tables, types, width):,} bytes on disk"
    )
    return {
        "index": str(out),
        "settings": config.to_dict(),
        "rows": {kind: len(table) for kind, table in tables.items()},
        "types": types,
        "bytes": _needed(tables, types, width),
        "memory_bytes": memory,
    }


def _needed(tables: dict[Modality, pa.Table], types: dict[Modality, IndexType], width: int) -> int:
    vectors = sum(index_bytes(len(table), width, types[kind]) for kind, table in tables.items())
    return vectors + sum(table.nbytes + ROW_BYTES * len(table) for table in tables.values())


def _refuse_full(out: Location, needed: int) -> None:
    place = Path(tempfile.gettempdir()) if out.is_remote else nearest_existing(out.path)
    free = shutil.disk_usage(place).free
    if needed > free:
        told = f"{out} needs {format_bytes(needed)}, {format_bytes(free)} are free"
        raise ResourceError(told, hint="free some space, or choose another --out; --type ivf-pq takes half")


def _to_update(config: IndexConfig, out: Location) -> Index | None:
    """The index that --update is about; None: there is none yet, or all is made anew."""
    if not config.update:
        return None
    if not index_folder.is_there(out):
        console.say(f"{out} is not there yet: everything is embedded")
        return None
    return index_folder.open_index(out)


def _as_before(config: IndexConfig, before: Index) -> IndexConfig:
    """What --update was not told stays as it was."""
    about = before.about
    kinds = list(before.nearest)
    was = {
        "of": "both" if len(kinds) > 1 else kinds[0],
        "limit": about["data"].get("limit"),
        "target_recall": about["target_recall"],
        "precision": about["model"]["precision"],
        "decode": decode_of(about),
    }
    return replace(config, **{name: value for name, value in was.items() if not config.was_given(name)}).given_as(
        config
    )


def _type(kind: Modality, count: int, config: IndexConfig, before: Index | None) -> IndexType:
    """The type of one kind's index: the one asked for, the one there is, or what suits its size.

    Raises:
        UsageError: too few rows for it.
    """
    known = before.nearest[kind].type if before and kind in before.nearest else None
    chosen = config.type or known or type_for(count)
    refuse_few(count, chosen)
    return chosen


def _unchanged(before: Index, table: pa.Table, types: dict[Modality, IndexType], config: IndexConfig) -> bool:
    same_types = {kind: nearest.type for kind, nearest in before.nearest.items()} == types
    return same_types and before.about.get("target_recall") == config.target_recall and before.table.equals(table)


def _built(part: Part, kind: IndexType, queries: Queries, config: IndexConfig) -> tuple[Nearest, Found]:
    """The index of one kind, tuned and measured without the rows that are queries, which then come in, too."""
    if kind != "flat":
        console.say(f"{part.kind}: building {kind} of {len(part.rows):,} rows")
    rows = part.rows[: len(part.rows) - queries.last]
    nearest, found = tuned(Nearest.build(rows, kind), rows, queries.rows, queries.own, config.target_recall)
    if queries.last:
        nearest.add(part.rows[len(rows) :])
    if not found.reached:
        told = f"{part.kind}: {kind} finds {found.recall:.3f} of the exact ten first"
        console.warn(f"{told}, {config.target_recall:g} was demanded; --type flat finds all")
    return nearest, found


def _facts(part: Part, nearest: Nearest, found: Found) -> dict[str, Any]:
    """What index.yaml says of one kind."""
    parameter = PARAMETERS[nearest.type]
    tried = {parameter: nearest.effort} if parameter else {}
    return {"count": len(part.rows), "embedded": part.embedded, "type": nearest.type, **tried, **found.facts()}


def _tell(out: Location, about: dict[str, Any]) -> None:
    """The table that people read, and what to do next."""
    rows = []
    for kind, how in about["searched"].items():
        parameter = PARAMETERS[how["type"]]
        tried = f"{how['type']}, {parameter} {how[parameter]}" if parameter else how["type"]
        times = f"{how['latency_ms']:.2f}, {how['latency_ms_p95']:.2f}"
        rows.append([kind, f"{how['count']:,}", tried, f"{how['recall@10']:.3f}", times])
    console.print_table(f"{out}", ["", "rows", "search", "recall@10", "ms (median, p95)"], rows)
    measured = max(how["queries"] for how in about["searched"].values())
    told = f"recall@10 against exact search, on {measured} held-out queries at most; encoding a text takes"
    console.print_result(f"{told} {about['encoding_ms']:.1f} ms ({about['encoding_ms_p95']:.1f})")
    console.hint(f'vlkit search --index {out} "what you look for"; or a page: vlkit serve --index {out}')
