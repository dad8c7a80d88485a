"""sample: write sample data in the raw layouts, offline, to try everything on.

Every item has its own generator seeded from (seed, item), so the same seed gives the same files in whatever order they
are written.
"""

from __future__ import annotations

from typing import Any

from vlkit import console
from vlkit.config.data import SampleConfig
from vlkit.data.samples.dishes import write_dishes
from vlkit.data.samples.leaves import write_leaves
from vlkit.data.samples.recipes import write_recipes
from vlkit.data.samples.scenes import write_scenes
from vlkit.data.samples.skin import write_skin
from vlkit.data.samples.ugly import add_ugly
from vlkit.errors import UsageError

WRITERS = {
    "recipes": write_recipes,
    "agriculture": write_leaves,
    "dermatology": write_skin,
    "persian-food": write_dishes,
    "coco": write_scenes,
}


def sample(config: SampleConfig) -> dict[str, Any]:
    """Run `vlkit sample`: write the sample data of a layout; the same seed gives the same bytes.

    Returns:
        Counts by kind of item, as --json prints them.

    Raises:
        UsageError: the folder is not empty: its files would mix into the data.
    """
    out = config.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty", hint="give a new folder for the sample data")
    out.mkdir(parents=True, exist_ok=True)
    counts = WRITERS[config.layout](out, config.seed)
    if config.ugly:
        counts |= add_ugly(config.layout, out)
    listed = ", ".join(f"{count} {kind.replace('pictures', 'images')}" for kind, count in counts.items())
    console.print_result(f"{out}: {listed}")
    console.hint(f"vlkit prep --domain {config.layout} --source {out}")
    return {"out": str(out), **counts}
