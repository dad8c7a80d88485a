"""search: find the nearest texts and images to a text, an image, or a document of the index."""

from __future__ import annotations

import json
import os
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlkit import console
from vlkit.config.search import INDEXES, Contents, SearchConfig
from vlkit.data.captions import clean
from vlkit.errors import DataError, UsageError
from vlkit.inference.index.index_folder import ABOUT, Index, open_index
from vlkit.inference.index.query_encoder import QueryEncoder, image_decode, load_encoder
from vlkit.inference.search.filters import allowed_mask, parse_filters, refuse_unknown
from vlkit.models.stages import Modality
from vlkit.storage import Location

if TYPE_CHECKING:
    from PIL import Image

CACHED_MASKS = 16
# Characters that a table shows of a text, and of a text beside an image.
TEXT_CHARACTERS, SIDE_TEXT_CHARACTERS = 90, 60


@dataclass(frozen=True)
class Query:
    """A text, an image, or a document of the index, with the number and kind of hits to find.

    Attributes:
        pixels: uint8 [3, size, size], see `QueryEncoder.load_pixels`.
        like: modality and position of a document.
        k: hits of each modality.
        contents: modality to find.
        filters: lines such as class=rust.
    """

    text: str | None = None
    pixels: np.ndarray | None = None
    like: tuple[Modality, int] | None = None
    k: int = 5
    contents: Contents = "both"
    filters: tuple[str, ...] = ()

    @property
    def search_key(self) -> tuple[Any, ...]:
        """Queries with the same key are searched together."""
        return self.k, self.contents, tuple(sorted(self.filters)), self.like


@dataclass(frozen=True)
class Hit:
    """A document that was found.

    Attributes:
        position: in the index of its modality.
        score: cosine, -1 to 1.
        document: its columns, see `index_folder.HIT_COLUMNS`.
    """

    modality: Modality
    position: int
    score: float
    document: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the hit as JSON."""
        metadata = json.loads(self.document["metadata"] or "{}")
        return {"score": round(self.score, 6), "row": self.position, **self.document, "metadata": metadata}


@dataclass
class SearchResult:
    """Hits of each modality, best first, and warnings about the query."""

    hits: dict[Modality, list[Hit]]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON."""
        hits = {modality: [hit.to_dict() for hit in hits] for modality, hits in self.hits.items()}
        return hits | {"notes": self.notes}


class Searcher:
    """An open index and its model."""

    def __init__(self, index: Index, query_encoder: QueryEncoder) -> None:
        self.index, self.query_encoder = index, query_encoder
        self._masks: dict[tuple[Modality, tuple[str, ...]], np.ndarray] = {}

    @classmethod
    def open(cls, location: Location, model: str | None = None) -> Searcher:
        """Open an index and load the model that built it.

        Args:
            model: where the run or the model is now, if it was moved.

        Raises:
            ArtifactError: the index is damaged, or its model is gone.
        """
        index = open_index(location)
        encoder = load_encoder(index.about["model"], model, image_decode(index.about))
        persian = index.about["data"].get("script") == "persian"
        return cls(index, QueryEncoder.from_encoder(encoder, None, persian=persian))

    def check_filters(self, lines: Sequence[str]) -> None:
        """Check that some document passes the filters.

        Raises:
            UsageError: suggests the most similar value that exists.
        """
        lines = tuple(lines)
        if lines and not any(self._mask(modality, lines).any() for modality in self.index.vectors):
            refuse_unknown(self.index, parse_filters(lines))

    def locate(self, key: str) -> tuple[Modality, int]:
        """Return modality and position of the document with this id.

        Raises:
            UsageError: there is none.
        """
        for modality, positions in self.index.positions.items():
            if key in positions:
                return modality, positions[key]
        raise UsageError(f"{self.index.location} has no document with the id {key!r}", hint="search --json shows ids")

    def answer(self, queries: Sequence[Query]) -> list[SearchResult]:
        """Answer queries; all texts are encoded together, and so are all images.

        Raises:
            UsageError: the index does not hold what is asked for.
            ArtifactError: the model is not the one that built the index.
        """
        results = [SearchResult({modality: [] for modality in self._modalities(query.contents)}) for query in queries]
        rows = self._embed(queries, results)
        batches: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, query in enumerate(queries):
            batches[query.search_key].append(number)
        for numbers in batches.values():
            for modality in results[numbers[0]].hits:
                batch = [results[number] for number in numbers]
                hits = self._search(modality, queries[numbers[0]], rows[numbers], batch)
                for result, own_hits in zip(batch, hits, strict=True):
                    result.hits[modality] = own_hits
        return results

    def _modalities(self, contents: Contents) -> list[Modality]:
        modalities: list[Modality] = [modality for modality in self.index.vectors if contents in (modality, "both")]
        if not modalities:
            raise UsageError(f"{self.index.location} holds no {contents}", hint=self._rebuild_hint())
        return modalities

    def _rebuild_hint(self) -> str:
        """Return the command that builds this index again, of texts and images; a table of texts has no images."""
        model, data = self.index.about["model"], self.index.about["data"]
        if Path(data["path"]).suffix in (".parquet", ".csv", ".jsonl"):
            return f"it was built from a table: {data['path']}; build one from a prepared folder"
        flags = ["--run", model["run"]] if model["run"] else ["--model", model["name"]]
        flags += ["--untouched"] if model["run"] and model["untouched"] else []
        flags += ["--data", data["path"], "--out", self.index.location, "--of", "both"]
        flags += ["--limit", data["limit"]] if data.get("limit") else []
        return f"build it again: {shlex.join(['vlkit', 'index', *map(str, flags)])}"

    def _embed(self, queries: Sequence[Query], results: Sequence[SearchResult]) -> np.ndarray:
        """Return float32 unit rows [queries, width]; note in the results which texts were cut."""
        encoder = self.query_encoder
        rows = np.zeros((len(queries), self.index.about["width"]), np.float32)
        texts = {number: query.text for number, query in enumerate(queries) if query.text is not None}
        if texts:
            encoder.check_index(self.index.about, "texts")
            rows[list(texts)], cut = encoder.embed_texts([encoder.clean(text) for text in texts.values()])
            for number, is_cut in zip(texts, cut, strict=True):
                if is_cut:
                    limit = encoder.encoder.text_limit
                    results[number].notes.append(
                        f"the query is longer than the {limit} tokens that the model reads: the rest is ignored"
                    )
        images = {number: query.pixels for number, query in enumerate(queries) if query.pixels is not None}
        if images:
            encoder.check_index(self.index.about, "images")
            rows[list(images)] = encoder.embed_images(list(images.values()))
        for number, query in enumerate(queries):
            if query.like is not None:
                modality, position = query.like
                rows[number] = self.index.vectors[modality].rows(np.array([position]))[0]
        return rows

    def _search(
        self, modality: Modality, query: Query, rows: np.ndarray, results: Sequence[SearchResult]
    ) -> list[list[Hit]]:
        """Return the hits of one modality for queries that share the search key of `query`."""
        vectors = self.index.vectors[modality]
        mask = self._mask(modality, query.filters) if query.filters else None
        # A document is no hit of itself, so one more is searched for.
        own = query.like[1] if query.like is not None and query.like[0] == modality else None
        extra = int(own is not None)
        available = len(vectors) - extra if mask is None else int(mask.sum())
        if query.k > available:
            for result in results:
                result.notes.append(f"{query.k} {modality} were asked for: there are {available}")
        hits = []
        for scores, positions in zip(*vectors.search(rows, query.k + extra, mask), strict=True):
            valid = positions >= 0
            if own is not None:
                valid &= positions != own
            positions, scores = positions[valid][: query.k], scores[valid][: query.k]
            documents = self.index.documents(modality, positions)
            columns = zip(positions.tolist(), scores.tolist(), documents, strict=True)
            hits.append([Hit(modality, *values) for values in columns])
        return hits

    def _mask(self, modality: Modality, lines: tuple[str, ...]) -> np.ndarray:
        key = modality, tuple(sorted(lines))
        if key not in self._masks:
            if len(self._masks) >= CACHED_MASKS:
                self._masks.pop(next(iter(self._masks)))
            self._masks[key] = allowed_mask(self.index, modality, parse_filters(lines))
        return self._masks[key]


def find_only_index(root: Path = INDEXES) -> Location:
    """Return the only index under indexes/, for commands called without --index.

    Raises:
        UsageError: there is none, or more than one.
    """
    folders = sorted(path.parent for path in root.glob(f"*/{ABOUT}") if not path.parent.name.startswith("."))
    if len(folders) == 1:
        return Location(folders[0])
    if not folders:
        raise UsageError(f"no --index is given, and there is none under {root}/", hint="vlkit index --run RUN")
    message = f"no --index is given, and there are {len(folders)} under {root}/: {', '.join(map(str, folders))}"
    raise UsageError(message, hint=f"choose one: --index {folders[0]}")


def search_index(
    index: str | Path,
    query: str | Path | Image.Image,
    k: int = 5,
    *,
    of: Contents = "both",
    filters: Sequence[str] = (),
    model: str | None = None,
) -> dict[str, Any]:
    """Return the documents of an index that are most similar to a text or an image, as `vlkit search --json` does.

    It opens the index and loads its model; for many queries open a `Searcher` once.

    Args:
        query: a text; the path of an image, as a `Path`; or an image of Pillow.
        k: hits of each modality.
        filters: lines such as "class=rust".
        model: where the run or the model of the index is now, if it was moved.

    Returns:
        "texts" and "images", each a list of hits, best first; "notes", warnings about the query.

    Raises:
        UsageError: the query is empty, or the index does not hold what is asked for.
        DataError: the image cannot be read.
        ArtifactError: the index is damaged, or its model is gone.
    """
    searcher = Searcher.open(Location(index), model)
    searcher.check_filters(filters)
    if isinstance(query, str):
        if not searcher.query_encoder.clean(query):
            raise UsageError(f"the query {query!r} is empty")
        parsed = Query(text=query, k=k, contents=of, filters=tuple(filters))
    else:
        parsed = Query(pixels=searcher.query_encoder.image_pixels(query), k=k, contents=of, filters=tuple(filters))
    return searcher.answer([parsed])[0].to_dict()


def search(config: SearchConfig) -> dict[str, Any]:
    """Run `vlkit search`: print a table for each query and modality, return the hits.

    Raises:
        UsageError, DataError: a query cannot be read. ArtifactError: see `Searcher`.
    """
    location = config.index or find_only_index()
    texts = [*config.texts, *(_read_queries(config.queries) if config.queries else ())]
    searcher = Searcher.open(location, config.model)
    searcher.check_filters(config.filter)
    options: dict[str, Any] = {"k": config.k, "contents": config.of, "filters": config.filter}
    labels: list[dict[str, str]] = []
    queries: list[Query] = []
    for text in texts:
        if not searcher.query_encoder.clean(text):
            raise UsageError(f"the query {text!r} is empty")
        labels.append({"text": text})
        queries.append(Query(text=text, **options))
    for name in config.image:
        labels.append({"image": name})
        queries.append(Query(pixels=_load_image(Path(name), searcher.query_encoder), **options))
    if config.like is not None:
        labels.append({"like": config.like})
        queries.append(Query(like=searcher.locate(config.like), **options))
    results = searcher.answer(queries)
    for label, result in zip(labels, results, strict=True):
        _print_result(label, result)
    return {
        "index": str(location),
        "model": searcher.index.about["model"]["name"],
        "queries": [{"query": label, **result.to_dict()} for label, result in zip(labels, results, strict=True)],
    }


def _read_queries(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--queries {path} cannot be read: {error}") from None
    queries = [line for line in lines if clean(line)]
    if not queries:
        raise DataError(f"--queries {path} is empty", hint="write one query per line")
    return queries


def _load_image(path: Path, query_encoder: QueryEncoder) -> np.ndarray:
    try:
        return query_encoder.load_pixels(path)
    except DataError as error:
        raise DataError(f"--image {path}: {error.message}") from None


def _print_result(label: dict[str, str], result: SearchResult) -> None:
    """Print one table per modality."""
    ((kind, query),) = label.items()
    title = f"“{_shorten(query, TEXT_CHARACTERS)}”" if kind == "text" else query
    for note in result.notes:
        console.warn(note)
    for modality, hits in result.hits.items():
        with_class = any(hit.document["class"] for hit in hits)
        columns = [*(["text"] if modality == "texts" else ["image", "one of its texts"]), *["class"] * with_class]
        rows = []
        for hit in hits:
            text = _shorten(hit.document["text"], TEXT_CHARACTERS if modality == "texts" else SIDE_TEXT_CHARACTERS)
            cells = [text] if modality == "texts" else [_relative(hit.document["path"]), text]
            rows.append([*cells, *[hit.document["class"] or ""] * with_class, f"{hit.score:.3f}"])
        empty = [["(none)"] + [""] * len(columns)]
        console.print_table(f"{title}: {modality}", [*columns, "cosine"], rows or empty, left=len(columns))


def _shorten(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _relative(path: str) -> str:
    """Return a path below the working directory relative to it; other paths and URLs unchanged."""
    if "://" in path:
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
