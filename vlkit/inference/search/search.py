"""search: texts, pictures and what an index holds already -> its nearest texts and pictures."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlkit import console
from vlkit.config.search import INDEXES, Contents, SearchConfig
from vlkit.data.captions import clean
from vlkit.errors import DataError, UsageError
from vlkit.inference.index.documents import Modality
from vlkit.inference.index.index_folder import ABOUT, Index, open_index
from vlkit.inference.index.query_encoder import QueryEncoder, decode_of, open_towers
from vlkit.inference.search import filters as filtering
from vlkit.storage import Location

KEPT_MASKS = 16
SHOWN_TEXT, SHOWN_PLACE = 90, 60


@dataclass(frozen=True)
class Query:
    """A query: a text, a picture, or an entry of the index, and what is wanted of the answer.

    Attributes:
        pixels: uint8 [3, size, size], as `Embedder.pixels` makes them.
        like: kind and place of an entry.
        k: hits of each kind.
        filters: lines such as class=rust.
    """

    text: str | None = None
    pixels: np.ndarray | None = None
    like: tuple[Modality, int] | None = None
    k: int = 5
    of: Contents = "both"
    filters: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[Any, ...]:
        """Queries that have this in common are answered together."""
        return self.k, self.of, tuple(sorted(self.filters)), self.like


@dataclass(frozen=True)
class Hit:
    """An entry that was found.

    Attributes:
        place: in the index of its kind.
        score: cosine, -1 to 1.
    """

    kind: Modality
    place: int
    score: float
    entry: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        further = json.loads(self.entry["metadata"] or "{}")
        return {"score": round(self.score, 6), "row": self.place, **self.entry, "metadata": further}


@dataclass
class SearchResult:
    """What was found, best first; and what the asker should know."""

    hits: dict[Modality, list[Hit]]
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {kind: [hit.facts() for hit in hits] for kind, hits in self.hits.items()} | {"notes": self.notes}


class Searcher:
    """An opened index and its model."""

    def __init__(self, index: Index, embedder: QueryEncoder) -> None:
        self.index, self.embedder = index, embedder
        self._masks: dict[tuple[Modality, tuple[str, ...]], np.ndarray] = {}

    @classmethod
    def open(cls, location: Location, model: str | None = None) -> Searcher:
        """Open an index and the model that made it.

        Args:
            model: where the run or the model lies now.

        Raises:
            ArtifactError: the index is damaged, or its model is gone.
        """
        index = open_index(location)
        encoder = open_towers(index.about["model"], model, decode_of(index.about))
        return cls(index, QueryEncoder.of(encoder, None, persian=index.about["data"].get("script") == "persian"))

    def check(self, filters: Sequence[str]) -> None:
        """Refuse a filter that nothing passes.

        Raises:
            UsageError: names the nearest value that something has.
        """
        lines = tuple(filters)
        if lines and not any(self._mask(kind, lines).any() for kind in self.index.nearest):
            filtering.refuse_unknown(self.index, filtering.parsed(lines))

    def locate(self, key: str) -> tuple[Modality, int]:
        """An entry by its id.

        Raises:
            UsageError: there is none.
        """
        for kind, places in self.index.places.items():
            if key in places:
                return kind, places[key]
        raise UsageError(f"{self.index.location} holds nothing with the id {key!r}", hint="search --json shows ids")

    def answer(self, asks: Sequence[Query]) -> list[SearchResult]:
        """Answer queries; all texts are encoded together, and all pictures.

        Raises:
            ArtifactError: the model is not the one that made the index.
        """
        answers = [SearchResult({kind: [] for kind in self._kinds(ask.of)}) for ask in asks]
        queries = self._embedded(asks, answers)
        together: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, ask in enumerate(asks):
            together[ask.wanted].append(number)
        for numbers in together.values():
            for kind in answers[numbers[0]].hits:
                found = self._found(kind, asks[numbers[0]], queries[numbers], [answers[number] for number in numbers])
                for number, hits in zip(numbers, found, strict=True):
                    answers[number].hits[kind] = hits
        return answers

    def _kinds(self, of: Contents) -> list[Modality]:
        kinds = [kind for kind in self.index.nearest if of in (kind, "both")]
        if not kinds:
            raise UsageError(f"{self.index.location} holds no {of}", hint="vlkit index --of both")
        return kinds

    def _embedded(self, asks: Sequence[Query], answers: Sequence[SearchResult]) -> np.ndarray:
        """float32 unit rows [queries, width]."""
        rows = np.zeros((len(asks), self.index.about["width"]), np.float32)
        texts = [number for number, ask in enumerate(asks) if ask.text is not None]
        if texts:
            self.embedder.agree(self.index.about, "texts")
            rows[texts], cut = self.embedder.texts([self.embedder.clean(str(asks[number].text)) for number in texts])
            for number, over in zip(texts, cut, strict=True):
                if over:
                    limit = self.embedder.encoder.text_limit
                    answers[number].notes.append(
                        f"the query is longer than the {limit} tokens that the model reads: its end does not count"
                    )
        pictures = [number for number, ask in enumerate(asks) if ask.pixels is not None]
        if pictures:
            self.embedder.agree(self.index.about, "images")
            rows[pictures] = self.embedder.pictures([asks[number].pixels for number in pictures])  # type: ignore[misc]
        for number, ask in enumerate(asks):
            if ask.like is not None:
                kind, place = ask.like
                rows[number] = self.index.nearest[kind].rows(np.array([place]))[0]
        return rows

    def _found(self, kind: Modality, ask: Query, queries: np.ndarray, answers: Sequence[SearchResult]) -> list[list[Hit]]:
        """The hits of one kind for queries that want the same."""
        mask = self._mask(kind, ask.filters) if ask.filters else None
        itself = ask.like is not None and ask.like[0] == kind
        possible = len(self.index.nearest[kind]) - itself if mask is None else int(mask.sum())
        if ask.k > possible:
            for answer in answers:
                answer.notes.append(f"{ask.k} {kind} were asked for: there are {possible}")
        scores, places = self.index.nearest[kind].search(queries, ask.k + itself, mask)
        found = []
        for some, cosines in zip(places, scores, strict=True):
            kept = some >= 0
            if itself and ask.like is not None:
                kept &= some != ask.like[1]
            some, cosines = some[kept][: ask.k], cosines[kept][: ask.k]
            rows = zip(some.tolist(), cosines.tolist(), self.index.rows(kind, some), strict=True)
            found.append([Hit(kind, *row) for row in rows])
        return found

    def _mask(self, kind: Modality, lines: tuple[str, ...]) -> np.ndarray:
        key = kind, tuple(sorted(lines))
        if key not in self._masks:
            if len(self._masks) >= KEPT_MASKS:
                self._masks.pop(next(iter(self._masks)))
            self._masks[key] = filtering.allowed(self.index, kind, filtering.parsed(lines))
        return self._masks[key]


def only_index(root: Path = INDEXES) -> Location:
    """The one index under indexes/, for commands called without --index.

    Raises:
        UsageError: there is none, or several.
    """
    found = sorted(path.parent for path in root.glob(f"*/{ABOUT}") if not path.parent.name.startswith("."))
    if len(found) == 1:
        return Location(found[0])
    if not found:
        raise UsageError(f"no --index, and none under {root}/", hint="make one: vlkit index --run RUN")
    told = f"no --index, and {len(found)} under {root}/: {', '.join(map(str, found))}"
    raise UsageError(told, hint=f"say which: --index {found[0]}")


def search(config: SearchConfig) -> dict[str, Any]:
    """Run `vlkit search`: print a table a query and kind, return the hits.

    Raises:
        UsageError, DataError: a query that cannot be read. ArtifactError: see `Searcher`.
    """
    location = config.index or only_index()
    texts = [*config.texts, *(_lines(config.queries) if config.queries else ())]
    searcher = Searcher.open(location, config.model)
    searcher.check(config.filter)
    wanted: dict[str, Any] = {"k": config.k, "of": config.of, "filters": config.filter}
    asked: list[tuple[dict[str, str], Query]] = []
    for text in texts:
        if not searcher.embedder.clean(text):
            raise UsageError(f"the query {text!r} is empty")
        asked.append(({"text": text}, Query(text=text, **wanted)))
    for name in config.image:
        asked.append(({"image": name}, Query(pixels=_picture(Path(name), searcher.embedder), **wanted)))
    if config.like is not None:
        asked.append(({"like": config.like}, Query(like=searcher.locate(config.like), **wanted)))
    answers = searcher.answer([ask for _, ask in asked])
    for (query, _), answer in zip(asked, answers, strict=True):
        _tell(query, answer)
    queries = [{"query": query, **answer.facts()} for (query, _), answer in zip(asked, answers, strict=True)]
    return {"index": str(location), "model": searcher.index.about["model"]["name"], "queries": queries}


def _lines(path: Path) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--queries {path} cannot be read: {error}") from None
    if not any(map(clean, found)):
        raise DataError(f"--queries {path} has no query", hint="a query a line")
    return [line for line in found if clean(line)]


def _picture(path: Path, embedder: QueryEncoder) -> np.ndarray:
    try:
        return embedder.pixels(path)
    except DataError as error:
        raise DataError(f"--image {path}: {error.message}") from None


def _tell(query: dict[str, str], answer: SearchResult) -> None:
    """Tables for people."""
    (what, said), *_ = query.items()
    title = f"“{_cut(said, SHOWN_TEXT)}”" if what == "text" else said
    for note in answer.notes:
        console.warn(note)
    for kind, hits in answer.hits.items():
        with_class = any(hit.entry["class"] for hit in hits)
        columns = ["text"] if kind == "texts" else ["picture", "one of its texts"]
        rows = []
        for hit in hits:
            text = _cut(hit.entry["text"], SHOWN_TEXT if kind == "texts" else SHOWN_PLACE)
            told = [text] if kind == "texts" else [_place(hit.entry["path"]), text]
            rows.append([*told, *([hit.entry["class"] or ""] if with_class else []), f"{hit.score:.3f}"])
        console.print_table(
            f"{title}: {kind}",
            [*columns, *(["class"] if with_class else []), "cosine"],
            rows or [["(none)"] + [""] * (len(columns) + with_class)],
            left=len(columns) + with_class,
        )


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _place(path: str) -> str:
    """A path as it is reached from here."""
    if "://" in path:
        return path
    near = os.path.relpath(path)
    return path if near.startswith("..") else near
