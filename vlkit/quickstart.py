"""Take the offline tour: sample data, a tiny model before and after training, an index, a search, and captions.

It calls the commands' own functions, so it shows what the commands do.
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

    out, start = config.out, time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty", hint="give another folder: vlkit quickstart --out elsewhere")
    raw, data, runs = out / "raw", out / "data" / "recipes", out / "runs"

    _step(1, f"write sample recipes: vlkit sample recipes {raw}")
    sample(SampleConfig(layout="recipes", out=raw))
    _step(2, f"prepare a table of pairs: vlkit prep --domain recipes --source {raw} --out {data}")
    prepare(resolve_prep({"domain": "recipes", "source": raw, "out": data, "seed": config.seed}))
    _step(3, f"train: vlkit train-retrieval --data {data} --model {MODEL} --runs-dir {runs} --name first")
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
    _step(4, f"measure the untouched and the trained model: vlkit eval --run {runs / 'first'}")
    results = evaluate(EvalConfig(run=runs / "first"))
    _step(5, f"write a page with images: vlkit report --run {runs / 'first'}")
    page = report(ReportConfig(run=runs / "first"))
    index_folder = out / "indexes" / "first"
    _step(6, f"index its texts and images: vlkit index --run {runs / 'first'} --out {index_folder}")
    indexed = index(IndexConfig(run=runs / "first", out=Location(index_folder)), dry_run=False)
    _step(7, f'search: vlkit search --index {index_folder} -k 3 "{QUERY}"')
    hits = search(SearchConfig(texts=(QUERY,), index=Location(index_folder), k=3))

    fusion_run = runs / "captions"
    settings = {"data": data, "vision": runs / "first", "llm": TINY_LLM, "runs_dir": runs, "name": "captions"}
    steps = {"teach_steps": config.steps or TEACH_STEPS, "steps": config.steps or FUSION_STEPS, "seed": config.seed}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in {**settings, **steps}.items())
    _step(8, f"teach a language model to caption images: vlkit train-fusion {flags}")
    fused = train_fusion(resolve_train_fusion({**settings, **steps}))
    images = _test_images(data)
    _step(9, f"caption images it has not seen: vlkit caption --run {fusion_run} {' '.join(images)}")
    captions = caption(CaptionConfig(run=fusion_run, pictures=images))

    console.say(f"\ndone in {time.perf_counter() - start:.0f} s. The run is {runs / 'first'}. Next:")
    console.hint(f"open {page['report']} in a browser")
    console.hint(f"search in a browser (pip install '.[serve]'): vlkit serve --index {index_folder}")
    console.hint(f"train CLIP: vlkit train-retrieval --data {data} --model tiny-clip --runs-dir {runs} --name second")
    console.hint(
        "prepare your own images, one folder per class: "
        "vlkit prep --domain agriculture --source my-folder --out data/mine"
    )
    console.hint("train a real model: vlkit train-retrieval --data data/mine --model google/siglip-base-patch16-224")
    return {"run": trained["run"], "data": str(data), "results": results, "report": page["report"]} | {
        "index": indexed["index"],
        "found": hits["queries"],
        "looking": fused["validation"].get("looking"),
        "captions": captions["captions"],
    }


def _test_images(data: Path, count: int = 3) -> tuple[str, ...]:
    """Return the paths of some images of the test split."""
    from vlkit.data.pairs import read_pairs

    pairs = read_pairs(data).split("test")
    paths = pairs.image_paths(pairs.unique_images().drop_duplicates("unit").head(count))
    folder = Path.cwd()
    return tuple(str(path.relative_to(folder) if path.is_relative_to(folder) else path) for path in paths)


def _step(number: int, description: str) -> None:
    console.say(f"\n[{number}/9] {description}")
