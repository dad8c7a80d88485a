"""The offline tour: sample data, a tiny model untouched and trained, both measured, and the trained one put to use:
searched with, and looked through by a language model that describes what it sees.

It calls the commands' own functions, so what it shows is what the commands do.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from vlkit import console
from vlkit.config.data import TINY_LLM, QuickstartConfig, SampleConfig
from vlkit.config.evaluation import EvalConfig, ReportConfig
from vlkit.config.fusion import CaptionConfig
from vlkit.config.presets import resolve_prep, resolve_train_fusion, resolve_train_retrieval
from vlkit.config.search import IndexConfig, SearchConfig
from vlkit.errors import UsageError
from vlkit.storage import Location

MODEL = "tiny-siglip"
TEACH_STEPS, FUSION_STEPS = 400, 300
# Words that no sample recipe has in this order.
QUERY = "a chocolate flan, pastry stars around it, on a blue plate"


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run `vlkit quickstart` in a folder of its own.

    Raises:
        UsageError: the folder exists and is not empty.
    """
    from vlkit.data.prep.prepare import prepare
    from vlkit.data.samples.write import sample
    from vlkit.evaluation.evaluate import evaluate
    from vlkit.inference.caption import caption
    from vlkit.inference.index.build import index
    from vlkit.inference.search.search import search
    from vlkit.report.report import report
    from vlkit.training.train_fusion import train_fusion
    from vlkit.training.train_retrieval import train_retrieval

    out, began = config.out, time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty", hint="give another folder: vlkit quickstart --out elsewhere")
    raw, data, runs = out / "raw", out / "data" / "recipes", out / "runs"

    _step(1, f"sample recipes: vlkit sample recipes {raw}")
    sample(SampleConfig(layout="recipes", out=raw))
    _step(2, f"a table of pairs: vlkit prep --domain recipes --source {raw} --out {data}")
    prepare(resolve_prep({"domain": "recipes", "source": raw, "out": data, "seed": config.seed}))
    _step(3, f"training: vlkit train-retrieval --data {data} --model {MODEL} --runs-dir {runs} --name first")
    given = {
        "data": data,
        "model": MODEL,
        "runs_dir": runs,
        "name": "first",
        "seed": config.seed,
        "steps": config.steps,
    }
    trained = train_retrieval(
        resolve_train_retrieval({key: value for key, value in given.items() if value is not None})
    )
    _step(4, f"the untouched model and the trained one: vlkit eval --run {runs / 'first'}")
    results = evaluate(EvalConfig(run=runs / "first"))
    _step(5, f"a page with pictures: vlkit report --run {runs / 'first'}")
    page = report(ReportConfig(run=runs / "first"))
    found_in = out / "indexes" / "first"
    _step(6, f"an index of its texts and pictures: vlkit index --run {runs / 'first'} --out {found_in}")
    indexed = index(IndexConfig(run=runs / "first", out=Location(found_in)), dry_run=False)
    _step(7, f'a search: vlkit search --index {found_in} -k 3 "{QUERY}"')
    found = search(SearchConfig(texts=(QUERY,), index=Location(found_in), k=3))

    taught, told = runs / "first", runs / "captions"
    settings = {"data": data, "vision": taught, "llm": TINY_LLM, "runs_dir": runs, "name": "captions"}
    steps = {"teach_steps": config.steps or TEACH_STEPS, "steps": config.steps or FUSION_STEPS, "seed": config.seed}
    line = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in {**settings, **steps}.items())
    _step(8, f"a language model learns to describe pictures: vlkit train-fusion {line}")
    described = train_fusion(resolve_train_fusion({**settings, **steps}))
    pictures = _unseen(data)
    _step(9, f"what it says of pictures it has not seen: vlkit caption --run {told} {' '.join(pictures)}")
    captions = caption(CaptionConfig(run=told, pictures=pictures))

    console.say(f"\ndone in {time.perf_counter() - began:.0f} s. The run is {runs / 'first'}. Next:")
    console.hint(f"look at {page['report']}, which opens from disk")
    console.hint(f"a page to search with (pip install '.[serve]'): vlkit serve --index {found_in}")
    console.hint(f"CLIP instead: vlkit train-retrieval --data {data} --model tiny-clip --runs-dir {runs} --name second")
    console.hint(
        "your own pictures, one folder a class: vlkit prep --domain agriculture --source my-folder --out data/mine"
    )
    console.hint("a real model on them: vlkit train-retrieval --data data/mine --model google/siglip-base-patch16-224")
    return {"run": trained["run"], "data": str(data), "results": results, "report": page["report"]} | {
        "index": indexed["index"],
        "found": found["queries"],
        "looking": described["validation"].get("looking"),
        "captions": captions["captions"],
    }


def _unseen(data: Path, count: int = 3) -> tuple[str, ...]:
    """Some pictures of the test split."""
    from vlkit.data.pairs import read_pairs

    pairs = read_pairs(data).split("test")
    paths = pairs.image_paths(pairs.unique_images().drop_duplicates("unit").head(count))
    here = Path.cwd()
    return tuple(str(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths)


def _step(number: int, what: str) -> None:
    console.say(f"\n[{number}/9] {what}")
