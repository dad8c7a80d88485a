"""The settings of the commands that put a model to use: index, search, serve. See `config.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vlkit.config.base import POSITIONAL, REPEATED, Settings
from vlkit.config.checks import require_at_least, require_between, require_cache
from vlkit.config.data import TINY_MODELS, Decode
from vlkit.errors import UsageError
from vlkit.storage import Location

INDEXES = Path("indexes")
Contents = Literal["texts", "images", "both"]
IndexType = Literal["flat", "hnsw", "ivf-pq"]
# Hits that may be asked for at once.
MAX_HITS = 1000


@dataclass(frozen=True, kw_only=True)
class IndexConfig(Settings):
    """`vlkit index`."""

    run: Annotated[Path | None, "finished run whose model embeds"] = None
    model: Annotated[str | None, "instead of --run: a model as it is, by hub name or folder"] = None
    untouched: Annotated[bool, "with --run: the model that it began with, to be searched beside the tuned one"] = False
    data: Annotated[
        Location | None,
        "prepared folder, s3:// too, or a table of texts: docstore.parquet, CSV, JSONL (default: the run's data, or "
        "the only one under data/)",
    ] = None
    out: Annotated[
        Location | None, "folder of the index (default: indexes/ and the name of run or model); s3:// too"
    ] = None
    of: Annotated[
        Contents, "what is found: the docstore's texts, the pictures, or both, each in an index of its own"
    ] = "both"
    type: Annotated[
        IndexType | None,
        "of search: exact, a graph, or compressed lists (default: flat below 200,000 vectors, hnsw to 3 million)",
    ] = None
    target_recall: Annotated[
        float, "how much of the exact ten first hnsw and ivf-pq must find; their search is tuned to it"
    ] = 0.95
    queries: Annotated[int, "held-out queries that it is tuned and measured by, half for each"] = 1000
    update: Annotated[bool, "embed only what is new or changed, and drop what is gone"] = False
    batch_size: Annotated[int, "pictures or texts encoded at a time"] = 64
    precision: Annotated[Literal["bf16", "fp16", "fp32"] | None, "of the encoders (default: the run's)"] = None
    decode: Annotated[Decode | None, "how pictures are read (default: as the run read them; of a model fast)"] = None
    cache: Annotated[
        str,
        "keep embeddings while they are made, so that an interrupted index goes on: off, auto (~/.cache/vlkit), or a "
        "folder",
    ] = "auto"
    limit: Annotated[int | None, "index about this many texts and pictures, drawn by the seed"] = None
    seed: Annotated[int, "of --limit, and of the queries"] = 42

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "limit")
        require_at_least(self, 20, "queries")
        require_at_least(self, 0, "seed")
        require_between(self, 0.01, 1.0, "target_recall")
        require_cache(self.cache)
        if (self.run is None) == (self.model is None):
            raise UsageError("index embeds with a run's model or another: give --run RUN or --model M")
        if self.model in TINY_MODELS:
            told = f"--model {self.model}: a tiny model exists only in the run that it was made for"
            raise UsageError(told, hint="--run RUN, or --run RUN --untouched for the one it began with")
        if self.untouched and self.run is None:
            raise UsageError("--untouched is about a run's model: give --run RUN")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Settings):
    """`vlkit search`."""

    texts: Annotated[tuple[str, ...], "what to search for; several are searched at once", POSITIONAL, REPEATED] = ()
    index: Annotated[Location | None, "folder of an index (default: the only one under indexes/); s3:// too"] = None
    image: Annotated[tuple[str, ...], "search by a picture; give it again for more", REPEATED] = ()
    queries: Annotated[Path | None, "file with a query a line"] = None
    like: Annotated[str | None, "search by what the index holds: the id of a text or picture"] = None
    k: Annotated[int, "hits of each kind"] = 5
    of: Annotated[Contents, "what to find"] = "both"
    filter: Annotated[
        tuple[str, ...],
        "only what has this value: class=rust, group=..., or a column of the data; the same name again: this value too",
        REPEATED,
    ] = ()
    model: Annotated[str | None, "the index's run or model, where it lies elsewhere now"] = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "k")
        if self.k > MAX_HITS:
            raise UsageError(f"-k {self.k}: at most {MAX_HITS} hits can be asked for")
        if not (self.texts or self.image or self.queries or self.like):
            raise UsageError(
                "search needs something to search for", hint='vlkit search "a tart with plums", or --image FILE'
            )


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Settings):
    """`vlkit serve`."""

    index: Annotated[
        tuple[str, ...],
        "folder of an index; a second one is shown beside it (default: the only one under indexes/)",
        REPEATED,
    ] = ()
    host: Annotated[str, "address to listen at; 0.0.0.0 lets others in"] = "127.0.0.1"
    port: Annotated[int, "0: any that is free"] = 8000
    max_upload: Annotated[float, "megabytes that a picture may have"] = 10.0
    model: Annotated[
        tuple[str, ...], "the indexes' runs or models, where they lie elsewhere now, in the same order", REPEATED
    ] = ()

    def __post_init__(self) -> None:
        require_between(self, 0, 65535, "port")
        require_between(self, 0.001, 1000, "max_upload")
        if self.model and len(self.model) != max(1, len(self.index)):
            raise UsageError(f"--model is given {len(self.model)} times, --index {len(self.index)} times")
