"""The settings of `vlkit download-coco`, and what COCO's server holds. See `config.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from vlkit.config.base import Settings
from vlkit.config.checks import above, at_least, between, only
from vlkit.errors import UsageError

COCO_URL = "http://images.cocodataset.org"


class Split(NamedTuple):
    """What COCO has published of one split; sizes in bytes.

    Attributes:
        archive: of the ZIP file of its pictures; unpacked they take about the same.
        captions, instances: of its annotation files, unpacked.
    """

    pictures: int
    archive: int
    captions: int
    instances: int


SPLITS = {
    "val2017": Split(5_000, 815_585_330, 3_900_000, 20_000_000),
    "train2017": Split(118_287, 19_336_861_798, 91_900_000, 449_000_000),
    "val2014": Split(40_504, 6_645_013_297, 32_500_000, 161_000_000),
    "train2014": Split(82_783, 13_510_573_713, 66_800_000, 333_000_000),
}
# One archive a year, for both splits.
ANNOTATIONS = {"2017": 252_907_541, "2014": 252_872_794}


@dataclass(frozen=True, kw_only=True)
class DownloadCocoConfig(Settings):
    """`vlkit download-coco`."""

    root: Annotated[Path, "folder that coco/ is made in"] = Path("data")
    split: Annotated[tuple[str, ...], f"what to fetch, of {', '.join(SPLITS)}"] = ("val2017",)
    instances: Annotated[bool, "the objects' annotations too: instances_<split>.json"] = False
    limit: Annotated[
        int | None, "only this many pictures of each split, fetched singly; the annotations still come whole"
    ] = None
    seed: Annotated[int, "draws the pictures of --limit; a larger limit has those of a smaller one"] = 42
    from_archive: Annotated[Path | None, "folder with the ZIP files; nothing is fetched, and they stay"] = None
    keep_archives: Annotated[bool, "keep the ZIP files, in coco/archives, after they are unpacked"] = False
    workers: Annotated[int, "pictures fetched at once where they are fetched singly"] = 8
    retries: Annotated[int, "times that a broken connection is tried again without a byte of progress"] = 5
    timeout: Annotated[float, "seconds without an answer after which a connection counts as broken"] = 30.0
    url: Annotated[str, "server, or a mirror of it"] = COCO_URL

    def __post_init__(self) -> None:
        only(self, "split", tuple(SPLITS))
        if not self.split:
            raise UsageError("--split is empty", hint=f"known: {', '.join(SPLITS)}")
        at_least(self, 1, "limit")
        at_least(self, 0, "seed", "retries")
        between(self, 1, 64, "workers")
        above(self, 0, "timeout")
        if not self.url.lower().startswith(("http://", "https://")) or len(self.url.split("://", 1)[1]) == 0:
            raise UsageError(f"--url {self.url!r} is not http:// or https://", hint=f"COCO's own is {COCO_URL}")
        if self.from_archive is not None and self.was_given("url"):
            raise UsageError("--from-archive fetches nothing, so --url has no use", hint="give one of them")
