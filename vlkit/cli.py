"""Every command: its docstring, a late import, one call."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlkit import __version__, console
from vlkit.config.data import AugmentConfig, DownloadCocoConfig, PrepConfig, QuickstartConfig, SampleConfig
from vlkit.config.evaluation import (
    EvalCaptionerConfig,
    EvalCaptionsConfig,
    EvalConfig,
    EvalRetrievalConfig,
    ReportConfig,
    RunsConfig,
)
from vlkit.config.flags import command
from vlkit.config.fusion import CaptionConfig, TrainFusionConfig
from vlkit.config.presets import resolve_augment, resolve_prep, resolve_train_fusion, resolve_train_retrieval
from vlkit.config.search import IndexConfig, SearchConfig, ServeConfig
from vlkit.config.training import TrainRetrievalConfig
from vlkit.errors import VlkitError, suggest_name
from vlkit.signals import Terminated, install_sigterm_handler

if TYPE_CHECKING:
    from vlkit.data.augment.negatives import EmbedTexts
    from vlkit.data.prep.summary import TokenCounter

app = typer.Typer(
    help="Adapt vision-language models to a domain, and know whether it helped.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _print_version(
    version: Annotated[bool, typer.Option("--version", help="print the version", show_default=False)] = False,
) -> None:
    if version:
        typer.echo(f"vlkit {__version__}")
        raise typer.Exit()


@command(app, "quickstart", QuickstartConfig)
def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Take the offline tour: sample data, a tiny model before and after training, an index, a search and captions."""
    from vlkit.quickstart import quickstart

    return quickstart(config)


@command(app, "sample", SampleConfig)
def sample(config: SampleConfig) -> dict[str, Any]:
    """Write sample data in a raw layout, to try the other commands on."""
    from vlkit.data.samples.write import sample

    return sample(config)


@command(app, "download-coco", DownloadCocoConfig, dry_run=True)
def download_coco(config: DownloadCocoConfig, dry_run: bool) -> dict[str, Any]:
    """Download COCO's images and captions, resume after an interruption, and check that none is missing."""
    from vlkit.data.coco.download import download_coco

    return download_coco(config, dry_run=dry_run)


@command(app, "prep", PrepConfig, resolve=resolve_prep, dry_run=True)
def prep(config: PrepConfig, dry_run: bool) -> dict[str, Any]:
    """Turn a raw folder into a clean, leak-free table of pairs."""
    from vlkit.data.prep.prepare import prepare

    return prepare(config, dry_run=dry_run, load_token_counter=_load_token_counter)


def _load_token_counter(model: str) -> TokenCounter | None:
    """Return how a model counts tokens; None if its tokenizer is not on this machine, which is known without torch."""
    from vlkit.models.hub import has_local_tokenizer

    if not has_local_tokenizer(model):
        return None
    from vlkit.data.prep.summary import TokenCounter
    from vlkit.models.loading import load_tokenizer

    try:
        tokenize, limit = load_tokenizer(model)
    except VlkitError:
        return None
    return TokenCounter(lambda texts: [len(ids) for ids in tokenize(texts)], limit)


@command(app, "augment", AugmentConfig, resolve=resolve_augment, dry_run=True)
def augment(config: AugmentConfig, dry_run: bool) -> dict[str, Any]:
    """Add varied images, reworded texts and hard negatives to the training rows of a prepared folder."""
    from vlkit.data.augment.augment import augment

    return augment(config, dry_run=dry_run, embed_of=_load_text_encoder)


def _load_text_encoder(model: str) -> EmbedTexts:
    """Return how a model, or the model of a finished run, embeds texts."""
    from vlkit.models.encode import text_encoder
    from vlkit.models.loading import load_model

    return text_encoder(load_model(model))


@command(app, "train-retrieval", TrainRetrievalConfig, resolve=resolve_train_retrieval, dry_run=True)
def train_retrieval(config: TrainRetrievalConfig, dry_run: bool) -> dict[str, Any]:
    """Adapt CLIP or SigLIP to a prepared folder: all weights, upper layers, or LoRA."""
    from vlkit.runs import refuse_locked

    if not dry_run and config.replay is None:
        refuse_locked(config.runs_dir, config.name)
    from vlkit.training.train_retrieval import train_retrieval

    return train_retrieval(config, dry_run=dry_run)


@command(app, "train-fusion", TrainFusionConfig, resolve=resolve_train_fusion, dry_run=True)
def train_fusion(config: TrainFusionConfig, dry_run: bool) -> dict[str, Any]:
    """Train a captioner: the layers that connect a frozen image encoder with a frozen language model."""
    from vlkit.runs import refuse_locked

    if not dry_run and config.replay is None:
        refuse_locked(config.runs_dir, config.name)
    from vlkit.training.train_fusion import train_fusion

    return train_fusion(config, dry_run=dry_run)


@command(app, "eval", EvalConfig)
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a run beside the untouched model on the same rows, with intervals; or a model as it is, or captions."""
    if config.captions is not None:
        from vlkit.evaluation.captioning.score_captions import score_captions

        return score_captions(config.narrow(EvalCaptionsConfig))
    from vlkit.runs import Run

    if config.run is not None and Run(config.run).task == "captioning":
        from vlkit.evaluation.captioning.evaluate_captions import evaluate_captions

        return evaluate_captions(config.narrow(EvalCaptionerConfig))
    from vlkit.evaluation.evaluate import evaluate

    return evaluate(config.narrow(EvalRetrievalConfig))


@command(app, "index", IndexConfig, dry_run=True)
def index(config: IndexConfig, dry_run: bool) -> dict[str, Any]:
    """Embed a docstore's texts, the images, or both, and build an index for search and serve."""
    from vlkit.inference.index.build import index

    return index(config, dry_run=dry_run)


@command(app, "search", SearchConfig)
def search(config: SearchConfig) -> dict[str, Any]:
    """Find the texts and images of an index that are nearest to words or to an image."""
    from vlkit.inference.search.search import search

    return search(config)


@command(app, "serve", ServeConfig)
def serve(config: ServeConfig) -> dict[str, Any]:
    """Serve a local page and a JSON API that search one index, or two side by side."""
    from vlkit.inference.serve.serve import serve

    return serve(config)


@command(app, "caption", CaptionConfig)
def caption(config: CaptionConfig) -> dict[str, Any]:
    """Caption images with a run of train-fusion."""
    from vlkit.inference.caption import caption

    return caption(config)


@command(app, "report", ReportConfig)
def report(config: ReportConfig) -> dict[str, Any]:
    """Write one page about a run: curves, metrics with intervals, images; and compare runs."""
    from vlkit.report.report import report

    return report(config)


@command(app, "runs", RunsConfig)
def runs(config: RunsConfig) -> dict[str, Any]:
    """List the runs with their status and their metrics."""
    from vlkit.report.list_runs import list_runs

    return list_runs(config)


def main() -> None:
    """Run the `vlkit` program."""
    # On cores shared with other work, OpenMP's busy waiting makes a step several times slower; a short wait before
    # sleeping costs nothing on idle cores. It must be set before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    install_sigterm_handler()
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        status = 130
    except KeyboardInterrupt as error:
        status = 143 if isinstance(error, Terminated) else 130
    except Exception as error:
        # Typer's own usage errors are printed as vlkit's, and under --json as the one object.
        if not hasattr(error, "format_message"):
            raise
        console.set_json_mode("--json" in sys.argv)
        console.fail(error.format_message(), _usage_hint(error), 2)
        status = 2
    sys.exit(status or 0)


def _usage_hint(error: Exception) -> str:
    """Return the known command most similar to a mistyped one, or the --help to read."""
    context, known = getattr(error, "ctx", None), [str(entry.name) for entry in app.registered_commands]
    mistyped = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if mistyped and mistyped not in known:
        return suggest_name(mistyped, known)
    return f"see: {context.command_path if context else 'vlkit'} --help"
