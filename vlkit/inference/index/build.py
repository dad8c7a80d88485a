"""index: build an index folder from a model and documents, tune it, and measure it."""

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
from vlkit.errors import ArtifactError, ResourceError
from vlkit.evaluation.efficiency import measure_query_latency
from vlkit.inference.index import index_folder
from vlkit.inference.index.documents import MODALITIES, DocumentSource
from vlkit.inference.index.embed_documents import EmbeddedDocuments, HeldOutQueries, draw_queries, embed_documents
from vlkit.inference.index.faiss_index import (
    EFFORT_PARAMETERS,
    VectorIndex,
    choose_type,
    estimate_bytes,
    refuse_too_few_rows,
)
from vlkit.inference.index.index_folder import Index
from vlkit.inference.index.query_encoder import QueryEncoder, image_decode, load_encoder, model_reference
from vlkit.inference.index.tune import SearchQuality, tune_and_measure
from vlkit.models.loading import model_config
from vlkit.models.stages import Modality
from vlkit.runs import Run
from vlkit.storage import Location, format_bytes, json_text, nearest_existing, refuse_unwritable

# Approximate bytes of a docstore row without its text.
ROW_BYTES = 200
Tables = dict[Modality, pa.Table]
Types = dict[Modality, IndexType]


def index(config: IndexConfig, *, dry_run: bool) -> dict[str, Any]:
    """Run `vlkit index`: embed, build, tune, measure, write; return the content of index.yaml.

    Raises:
        DataError: there is nothing to index. ArtifactError: --update of an index that another model built.
        ResourceError: the disk is too small.
    """
    out = config.out or Location(INDEXES / _default_name(config))
    index_folder.refuse_foreign_folder(out)
    if not out.is_remote:
        refuse_unwritable(out.path, "--out")
    reference = model_reference(config)
    run = Run(config.run) if config.run else None
    data = config.data or (run.data_location() if run else Location(only_prepared_folder()))
    before = _open_for_update(config, out)
    if before is not None:
        config, data = _inherit(config, before), data if config.data else Location(before.about["data"]["path"])
    source = DocumentSource.read(data, limit=config.limit, seed=config.seed)
    tables = _read_tables(source, config)
    types = {modality: _choose_type(modality, len(table), config, before) for modality, table in tables.items()}
    if dry_run:
        return _print_plan(config, out, tables, types, _embedding_width(config, run))
    precision = config.precision or (run.config().get("precision") if run else None)
    encoder = load_encoder(reference, decode=config.decode)
    query_encoder = QueryEncoder.from_encoder(encoder, precision, persian=source.script == "persian")
    _refuse_full_disk(out, _estimate_bytes(tables, types, encoder.width))
    about = {
        "model": {**reference, "precision": query_encoder.precision},
        **query_encoder.identity(),
        "data": {
            "path": str(data.absolute),
            "fingerprint": source.fingerprint,
            "script": source.script,
            "limit": config.limit,
        },
        "width": encoder.width,
        "target_recall": config.target_recall,
    }
    if before is not None:
        _refuse_other_model(before, about)
    every = [
        embed_documents(query_encoder, config, source, modality, table, before) for modality, table in tables.items()
    ]
    drawn = [draw_queries(documents, types[documents.modality] != "flat", config, source, every) for documents in every]
    table = pa.concat_tables([documents.table for documents, _ in drawn])
    if before is not None and _is_unchanged(before, table, types, config):
        console.print_result(f"{out} is up to date: nothing is new, changed or removed")
        return {"index": str(out), **before.about}
    searched, vectors = {}, {}
    for documents, queries in drawn:
        modality = documents.modality
        vectors[modality], quality = _build(documents, types[modality], queries, config)
        searched[modality] = _describe(documents, vectors[modality], quality)
    median, p95 = measure_query_latency(encoder, source.sample_texts(), query_encoder.precision)
    about |= {
        "searched": searched,
        "encoding_ms": median * 1000,
        "encoding_ms_p95": p95 * 1000,
        "vlkit": __version__,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    index_folder.write_index(out, about, table, vectors)
    _print_summary(out, about)
    return {"index": str(out), "schema": index_folder.VERSION, **about}


def _read_tables(source: DocumentSource, config: IndexConfig) -> Tables:
    """Return modality -> documents, of those that --of asks for and the source has."""
    modalities = [
        modality
        for modality in MODALITIES
        if config.of in (modality, "both") and (modality == "texts" or source.pairs is not None)
    ]
    # With none left, --of images meets a table of texts, which the source refuses.
    return {modality: source.documents(modality) for modality in modalities or ["images"]}


def _refuse_other_model(before: Index, about: dict[str, Any]) -> None:
    """Refuse to update an index with another model than the one that built it.

    Raises:
        ArtifactError: says what differs.
    """
    pairs = [(name, before.about.get(name), about[name]) for name in ("weights", "preprocessing")]
    pairs.append(("precision", before.about["model"]["precision"], about["model"]["precision"]))
    for name, old, new in pairs:
        if json_text(old) != json_text(new):
            message = (
                f"{before.location} was built with another model: its vectors have other {name} and cannot be reused"
            )
            raise ArtifactError(message, hint="leave out --update to build the index from scratch")


def _default_name(config: IndexConfig) -> str:
    """Return the name of run or model, "-untouched" behind it for the base model of a run."""
    folder = config.run or Path(str(config.model))
    name = folder.resolve().name if folder.exists() else folder.name
    return f"{name}-untouched" if config.untouched else name


def _embedding_width(config: IndexConfig, run: Run | None) -> int:
    """Return the width of the embeddings, read from the configuration without loading weights."""
    settings = run.config() if run else {}
    name = config.model or (str(run.base) if run and run.base.is_dir() else settings["model"])
    model = model_config(name, None if run and run.base.is_dir() else settings.get("text_model"))
    return int(getattr(model, "projection_dim", None) or model.vision_config.hidden_size)


def _print_plan(config: IndexConfig, out: Location, tables: Tables, types: Types, width: int) -> dict[str, Any]:
    """Print and return what --dry-run reports."""
    rows = [
        [modality, f"{len(table):,}", types[modality], format_bytes(estimate_bytes(len(table), width, types[modality]))]
        for modality, table in tables.items()
    ]
    console.print_table(f"{out}: planned", ["", "rows", "type", "on disk"], rows)
    memory = 2 * sum(len(table) for table in tables.values()) * width * 4
    needed = _estimate_bytes(tables, types, width)
    console.print_result(f"embeddings need about {format_bytes(memory)} of memory; {needed:,} bytes on disk")
    return {
        "index": str(out),
        "settings": config.to_dict(),
        "rows": {modality: len(table) for modality, table in tables.items()},
        "types": types,
        "bytes": needed,
        "memory_bytes": memory,
    }


def _estimate_bytes(tables: Tables, types: Types, width: int) -> int:
    """Estimate the size of the index folder."""
    vectors = sum(estimate_bytes(len(table), width, types[modality]) for modality, table in tables.items())
    return vectors + sum(int(table.nbytes) + ROW_BYTES * len(table) for table in tables.values())


def _refuse_full_disk(out: Location, needed: int) -> None:
    """Refuse, before anything is embedded, a disk with too little space.

    Raises:
        ResourceError: says how much is needed and how much is free.
    """
    folder = Path(tempfile.gettempdir()) if out.is_remote else nearest_existing(out.path)
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"{out} needs {format_bytes(needed)}, but only {format_bytes(free)} are free"
        raise ResourceError(message, hint="free some space, or choose another --out; --type ivf-pq needs half")


def _open_for_update(config: IndexConfig, out: Location) -> Index | None:
    """Open the index that --update updates; None without --update or an earlier index."""
    if not config.update:
        return None
    if not index_folder.index_exists(out):
        console.say(f"{out} does not exist yet: everything is embedded")
        return None
    return index_folder.open_index(out)


def _inherit(config: IndexConfig, before: Index) -> IndexConfig:
    """Fill in the settings of the index that is updated, except those that the user gave."""
    about = before.about
    modalities = list(before.vectors)
    settings = {
        "of": "both" if len(modalities) > 1 else modalities[0],
        "limit": about["data"].get("limit"),
        "target_recall": about["target_recall"],
        "precision": about["model"]["precision"],
        "decode": image_decode(about),
    }
    return replace(config, **{name: value for name, value in settings.items() if not config.was_given(name)})


def _choose_type(modality: Modality, count: int, config: IndexConfig, before: Index | None) -> IndexType:
    """Return the index type: the one given, else that of the older index, else one that suits the size.

    Raises:
        UsageError: it needs more rows.
    """
    older = before.vectors[modality].type if before and modality in before.vectors else None
    index_type = config.type or older or choose_type(count)
    refuse_too_few_rows(count, index_type)
    return index_type


def _is_unchanged(before: Index, table: pa.Table, types: Types, config: IndexConfig) -> bool:
    same_types = {modality: vectors.type for modality, vectors in before.vectors.items()} == types
    same_target = before.about.get("target_recall") == config.target_recall
    return bool(same_types and same_target and before.table.equals(table))


def _build(
    documents: EmbeddedDocuments, index_type: IndexType, queries: HeldOutQueries, config: IndexConfig
) -> tuple[VectorIndex, SearchQuality]:
    """Build, tune and measure the index of one modality without the documents that are queries, then add those."""
    if index_type != "flat":
        console.say(f"{documents.modality}: building {index_type} of {len(documents.rows):,} rows")
    rows = documents.rows[: len(documents.rows) - queries.last]
    vectors, quality = tune_and_measure(
        VectorIndex.build(rows, index_type), rows, queries.rows, queries.own, config.target_recall
    )
    if queries.last:
        vectors.add(documents.rows[len(rows) :])
    if not quality.reached:
        console.warn(
            f"{documents.modality}: {index_type} finds {quality.recall:.3f} of the ten exact neighbours, below the "
            f"target of {config.target_recall:g}; --type flat finds all of them"
        )
    return vectors, quality


def _describe(documents: EmbeddedDocuments, vectors: VectorIndex, quality: SearchQuality) -> dict[str, Any]:
    """Return the entry of one modality in index.yaml."""
    parameter = EFFORT_PARAMETERS[vectors.type]
    effort = {parameter: vectors.effort} if parameter else {}
    counts = {"count": len(documents.rows), "embedded": documents.embedded}
    return {**counts, "type": vectors.type, **effort, **quality.to_dict()}


def _print_summary(out: Location, about: dict[str, Any]) -> None:
    """Print the index as a table, and the next command."""
    rows = []
    for modality, facts in about["searched"].items():
        parameter = EFFORT_PARAMETERS[facts["type"]]
        search = f"{facts['type']}, {parameter} {facts[parameter]}" if parameter else facts["type"]
        times = f"{facts['latency_ms']:.2f}, {facts['latency_ms_p95']:.2f}"
        rows.append([modality, f"{facts['count']:,}", search, f"{facts['recall@10']:.3f}", times])
    console.print_table(f"{out}", ["", "rows", "search", "recall@10", "ms (median, p95)"], rows)
    measured = max(facts["queries"] for facts in about["searched"].values())
    encoding = f"{about['encoding_ms']:.1f} ms (p95 {about['encoding_ms_p95']:.1f} ms)"
    console.print_result(
        f"recall@10 against exact search, on up to {measured} held-out queries; encoding a text takes {encoding}"
    )
    console.hint(f'search it: vlkit search --index {out} "what you look for"; as a page: vlkit serve --index {out}')
