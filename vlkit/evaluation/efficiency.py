"""The cost of a model: measured on this machine, and of its training as its run recorded it."""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
import torch

from vlkit.evaluation.results import Efficiency
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalTask
from vlkit.models import tuning
from vlkit.models.device import Precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.encode import encode_texts
from vlkit.runs import Run

LATENCY_QUERIES, LATENCY_SECONDS, WARM_UP_QUERIES = 200, 2.0, 3


def peak_memory_gb() -> dict[str, float | None]:
    """Return the peak memory of this process so far, in GB of 2^30 bytes; of the GPU what torch had allocated."""
    # macOS counts bytes, Linux kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return {"process": process, "gpu": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None}


def measure_efficiency(
    encoder: DualEncoder, embeddings: Embeddings, task: RetrievalTask, run: Run | None, precision: Precision
) -> Efficiency:
    """Measure speeds and latency on this machine; read training's time and memory from the run."""
    facts = run.read_json("finished.json") if run else {}
    median, p95 = measure_query_latency(encoder, list(task.texts["text"]), precision)
    peak = peak_memory_gb()
    training_peak = facts.get("peak_memory_gb") or {}
    return Efficiency(
        images_per_second=embeddings.images_per_second,
        texts_per_second=embeddings.texts_per_second,
        latency_ms=median * 1000,
        latency_ms_p95=p95 * 1000,
        peak_memory_gb=peak["process"] if peak["gpu"] is None else peak["gpu"],
        peak_memory_process_gb=peak["process"],
        peak_memory_gpu_gb=peak["gpu"],
        train_seconds=facts.get("train_seconds"),
        train_peak_memory_process_gb=training_peak.get("process"),
        train_peak_memory_gpu_gb=training_peak.get("gpu"),
        trainable_parameters=facts.get("trainable_parameters", 0),
        total_parameters=tuning.count_parameters(encoder).total,
    )


def measure_query_latency(encoder: DualEncoder, texts: list[str], precision: Precision) -> tuple[float, float]:
    """Return the seconds to encode one text as a query: the median and the 95th percentile."""
    seconds: list[float] = []
    began = time.perf_counter()
    for number in range(WARM_UP_QUERIES + LATENCY_QUERIES):
        started = time.perf_counter()
        encode_texts(encoder, [texts[number % len(texts)]], batch_size=1, precision=precision).cpu()
        seconds.append(time.perf_counter() - started)
        if number > 2 * WARM_UP_QUERIES and time.perf_counter() - began > LATENCY_SECONDS:
            break
    return float(np.median(seconds[WARM_UP_QUERIES:])), float(np.quantile(seconds[WARM_UP_QUERIES:], 0.95))
