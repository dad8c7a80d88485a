"""The settings of the commands that search: index, search, serve."""

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
# Maximum number of hits per query.
MAX_HITS = 1000


@dataclass(frozen=True, kw_only=True)
class IndexConfig(Settings):
    """`vlkit index`."""

    run: Annotated[Path | None, "finished run whose model embeds the documents"] = None
    model: Annotated[str | None, "untouched model by hub name or folder, instead of --run"] = None
    untouched: Annotated[bool, "with --run: use its base model, to search it beside the tuned one"] = False
    data: Annotated[
        Location | None,
        "prepared folder, s3:// too, or a table of texts: docstore.parquet, CSV, JSONL (default: the run's data, else "
        "the only one under data/)",
    ] = None
    out: Annotated[Location | None, "folder of the index (default: indexes/<run or model>); s3:// too"] = None
    of: Annotated[Contents, "documents: the docstore's texts, the images, or both, each with an index of its own"] = (
        "both"
    )
    type: Annotated[
        IndexType | None,
        "search algorithm: exact, graph, or compressed lists (default: flat below 200,000 vectors, hnsw to 3 million)",
    ] = None
    target_recall: Annotated[
        float, "share of the exact top ten that hnsw and ivf-pq must find; their search is tuned to it"
    ] = 0.95
    queries: Annotated[int, "held-out queries: half tune the search, half measure it"] = 1000
    update: Annotated[bool, "embed only new and changed documents, and drop removed ones"] = False
    batch_size: Annotated[int, "images or texts encoded at once"] = 64
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, "precision of matrix products (default: the run's)"
    ] = None
    decode: Annotated[Decode | None, "how images are read (default: the run's way; for a model fast)"] = None
    cache: Annotated[
        str,
        "keep finished embeddings, so that an interrupted index resumes: off, auto (~/.cache/vlkit), or a folder",
    ] = "auto"
    limit: Annotated[int | None, "index about this many texts and images, drawn by the seed"] = None
    seed: Annotated[int, "seed of --limit and of the queries"] = 42

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "limit")
        require_at_least(self, 20, "queries")
        require_at_least(self, 0, "seed")
        require_between(self, 0.01, 1.0, "target_recall")
        require_cache(self.cache)
        if (self.run is None) == (self.model is None):
            raise UsageError("index needs --run RUN or --model M, not both")
        if self.model in TINY_MODELS:
            message = f"--model {self.model}: a tiny model exists only in the run that made it"
            raise UsageError(message, hint="give --run RUN, or --run RUN --untouched for its base model")
        if self.untouched and self.run is None:
            raise UsageError("--untouched has no effect without --run", hint="give --run RUN")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Settings):
    """`vlkit search`."""

    texts: Annotated[tuple[str, ...], "texts to search for; several are searched at once", POSITIONAL, REPEATED] = ()
    index: Annotated[Location | None, "folder of an index (default: the only one under indexes/); s3:// too"] = None
    image: Annotated[tuple[str, ...], "image to search by; repeat for more", REPEATED] = ()
    queries: Annotated[Path | None, "file with one query per line"] = None
    like: Annotated[str | None, "id of a text or image of the index to search by"] = None
    k: Annotated[int, "hits of each modality"] = 5
    of: Annotated[Contents, "modality to find"] = "both"
    filter: Annotated[
        tuple[str, ...],
        "find only documents with this value: class=rust, group=..., or a column of the data; repeat for more",
        REPEATED,
    ] = ()
    model: Annotated[str | None, "run or model of the index, if it was moved"] = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "k")
        if self.k > MAX_HITS:
            raise UsageError(f"-k {self.k} must be at most {MAX_HITS}")
        if not (self.texts or self.image or self.queries or self.like):
            hint = 'for example: vlkit search "a tart with plums", or --image FILE'
            raise UsageError("search needs a text, --image, --queries or --like", hint=hint)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Settings):
    """`vlkit serve`."""

    index: Annotated[
        tuple[str, ...],
        "folder of an index; a second one is searched beside it (default: the only one under indexes/)",
        REPEATED,
    ] = ()
    host: Annotated[str, "address to listen on; 0.0.0.0 admits other machines"] = "127.0.0.1"
    port: Annotated[int, "port to listen on; 0: any free one"] = 8000
    max_upload: Annotated[float, "maximum megabytes of an uploaded image"] = 10.0
    model: Annotated[
        tuple[str, ...], "runs or models of the indexes, in the same order, if they were moved", REPEATED
    ] = ()

    def __post_init__(self) -> None:
        require_between(self, 0, 65535, "port")
        require_between(self, 0.001, 1000, "max_upload")
        if self.model and len(self.model) != max(1, len(self.index)):
            message = f"--model is given {len(self.model)} times, --index {len(self.index)} times"
            raise UsageError(message, hint="give one --model for every --index")
