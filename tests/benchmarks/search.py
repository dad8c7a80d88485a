"""A warm query beside transformers' encoding plus the bare FAISS call: milliseconds, and what is paid on top.

python tests/benchmarks/search.py [--json] [--rows 20000] [--queries 200] [-k 10] [--runs 5]

The model is the tiny one: a larger one takes longer to encode a text, and the rest stays what it is. Both ways take
turns, query by query. Also: queries a second where 32 wait and are answered together.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from typing import Any

import measuring
import peers

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def made(rows: int, kind: str) -> Any:
    """A searcher over random texts, with the tiny SigLIP."""
    import numpy as np
    import pyarrow as pa

    peers.declare_torchvision()
    from vlkit.inference.index.documents import SCHEMA
    from vlkit.inference.index.faiss_index import VectorIndex
    from vlkit.inference.index.index_folder import Index
    from vlkit.inference.index.query_encoder import QueryEncoder
    from vlkit.inference.search.search import Searcher
    from vlkit.models.loading import load_or_create
    from vlkit.storage import Location

    texts = [f"a recipe of {number % 97} eggs and {number % 89} plums, number {number}" for number in range(rows)]
    encoder = load_or_create("tiny-siglip", texts[:500], seed=0)
    query_encoder = QueryEncoder.from_encoder(encoder, None, persian=False)
    vectors = np.random.default_rng(0).standard_normal((rows, encoder.width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = pa.Table.from_pylist(
        [
            {"id": str(number), "kind": "texts", "text": text, "group": ["x"], "metadata": "{}", "key": str(number)}
            for number, text in enumerate(texts)
        ],
        schema=SCHEMA,
    )
    vectors = VectorIndex.build(vectors, kind)  # type: ignore[arg-type]
    about = {"width": encoder.width, **query_encoder.identity()}
    return Searcher(Index(Location(tempfile.gettempdir()), about, table, {"texts": vectors}), query_encoder)


def opened(searcher: Any) -> Any:
    """The same model as transformers opens it."""
    from transformers import SiglipModel

    with tempfile.TemporaryDirectory() as folder:
        searcher.query_encoder.encoder.save(folder)
        return SiglipModel.from_pretrained(folder).eval()


def encoded(searcher: Any, model: Any, text: str) -> Any:
    """As transformers encodes it: its tokenizer, its model, a unit vector."""
    import torch

    encoder = searcher.query_encoder.encoder
    options = {"padding": "max_length", "max_length": encoder.text_limit, "truncation": True, "return_tensors": "pt"}
    with torch.inference_mode():
        ids = encoder.tokenizer([text], **options)["input_ids"]
        found = model.get_text_features(input_ids=ids).pooler_output
        return torch.nn.functional.normalize(found, dim=-1).numpy()


def measured(searcher: Any, queries: int, runs: int, hits: int) -> dict[str, Any]:
    """Both ways, in turns."""
    from vlkit.inference.search.search import Query

    bare_index, model = searcher.index.vectors["texts"], opened(searcher)
    texts = [f"{number} plums in a cake, and {number % 7} cherries" for number in range(queries)]
    bare, whole, ratios = [], [], []
    for _ in range(runs + 1):
        one, other = [], []
        for text in texts:
            began = time.perf_counter()
            rows = encoded(searcher, model, text)
            bare_index.index.search(rows, hits, params=bare_index._search_parameters(hits, None))
            between = time.perf_counter()
            searcher.answer([Query(text=text, k=hits)])
            one.append(between - began)
            other.append(time.perf_counter() - between)
        bare.append(statistics.median(one))
        whole.append(statistics.median(other))
        ratios.append(whole[-1] / bare[-1])
    began = time.perf_counter()
    for start in range(0, queries, 32):
        searcher.answer([Query(text=text, k=hits) for text in texts[start : start + 32]])
    together = queries / (time.perf_counter() - began)
    # The first run warms up.
    return {
        "bare_ms": statistics.median(bare[1:]) * 1000,
        "search_ms": statistics.median(whole[1:]) * 1000,
        "ratio": statistics.median(ratios[1:]),
        "spread": (min(ratios[1:]), max(ratios[1:])),
        "together_per_second": together,
    }


def main() -> None:
    """Print the table."""
    parser = measuring.parser(__doc__, rounds=5, peers=False)
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("-k", type=int, default=10)
    options = parser.parse_args()
    found = {}
    for kind in ("flat", "hnsw"):
        searcher = made(options.rows, kind)
        found[kind] = measured(searcher, options.queries, options.runs, options.k)
    if options.json:
        print(json.dumps({"machine": measuring.machine(), "rows": options.rows, "found": found}, indent=2))
        return
    print(measuring.header(("torch", "transformers", "faiss-cpu")))
    told = f"medians of {options.queries} queries, {options.runs} rounds; milliseconds"
    print(f"{options.rows} rows, {options.k} hits, tiny SigLIP; {told}")
    lines = []
    for kind, each in found.items():
        low, high = each["spread"]
        times = [f"{each['bare_ms']:.2f}", f"{each['search_ms']:.2f}"]
        ratio = [f"{each['ratio']:.2f} x", f"{low:.2f}-{high:.2f}"]
        lines.append([kind, *times, *ratio, f"{each['together_per_second']:.0f} /s"])
    print(measuring.table(["", "encode + FAISS", "search", "ratio", "spread", "32 at once"], lines))


if __name__ == "__main__":
    main()
