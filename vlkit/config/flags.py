"""A config dataclass becomes a command: its fields are the flags, --config reads the same names from YAML.

`command` builds the function that Typer sees. Each flag defaults to None there, so that what was not given on the
command line can come from the YAML file, a preset or the dataclass. It is also where every error is told to the user,
once.
"""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

from vlkit import console
from vlkit.config.base import ALTERNATIVES, Field, Settings, read_yaml
from vlkit.errors import ResourceError, UsageError, VlkitError
from vlkit.signals import Terminated
from vlkit.storage import Location

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)

C = TypeVar("C", bound=Settings)
Body = Callable[..., dict[str, Any] | None]


def command(
    app: typer.Typer,
    name: str,
    config_class: type[C],
    *,
    resolve: Callable[[Mapping[str, Any]], C] | None = None,
    dry_run: bool = False,
) -> Callable[[Body], Body]:
    """Register `body(config)` as `vlkit name`, its flags made from `config_class`.

    Args:
        resolve: turns the given values (YAML under flags) into a config; else the dataclass' own defaults fill up.
        dry_run: the command writes or trains, so it takes --dry-run, and the body a second argument of that name.
    """

    def register(body: Body) -> Body:
        def run(**flags: Any) -> None:
            config_file, as_json = flags.pop("config"), flags.pop("json")
            extra = {"dry_run": flags.pop("dry_run")} if dry_run else {}
            console.set_json_mode(as_json)

            def work() -> dict[str, Any] | None:
                given = _given(config_class, config_file, flags)
                config = resolve(given) if resolve else config_class.from_layers(given)
                return body(config, **extra)

            outcome = guarded(work)
            if as_json:
                console.print_json(outcome or {})

        parameters = [_parameter(field) for field in config_class.fields().values()] + _shared(dry_run)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = body.__doc__
        app.command(name, no_args_is_help=False)(run)
        return body

    return register


def _given(config_class: type[Settings], config_file: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the user said: the YAML file's values, and over them the flags'."""
    layers: dict[str, Any] = {}
    if config_file is not None:
        layers = read_yaml(config_file)
        config_class.check_keys(layers, str(config_file))
        fields = config_class.fields()
        layers = {key: fields[key].read(each, str(config_file)) for key, each in layers.items() if each is not None}
    # A flag that may be repeated and was not given is an empty list.
    said = {key: value for key, value in flags.items() if value is not None and value != []}
    for pair in ALTERNATIVES:
        if pair & said.keys():
            layers = {key: value for key, value in layers.items() if key not in pair}
        if pair <= said.keys() or pair <= {key for key, value in layers.items() if value is not None}:
            raise UsageError("steps and epochs say the same thing twice", hint="give one of them")
    return {**layers, **said}


def _parameter(field: Field) -> inspect.Parameter:
    is_list = get_origin(field.kind) is tuple
    nested = isinstance(field.kind, type) and issubclass(field.kind, Settings)
    kind: Any = field.kind
    if field.repeated:
        kind = list[str]
    elif field.choices or is_list or nested or kind is Location:
        kind = str
    shown = (
        "; ".join(field.default)
        if field.repeated
        else ",".join(f"{part:g}" if isinstance(part, float) else part for part in field.default)
        if is_list and field.default
        else field.default
    )
    text = f"{field.help} [dim]\\[{' | '.join(field.choices)}][/dim]" if field.choices else field.help
    if shown not in (None, "", ()) and not isinstance(shown, bool):
        text += f" [dim]\\[default: {shown}][/dim]"
    metavar = {int: "N", float: "X", Path: "PATH", Location: "PATH"}.get(field.kind, "FILE" if nested else "TEXT")
    if is_list and not field.repeated:
        metavar = "LOW,HIGH" if float in get_args(field.kind) else "A,B,..."
    flag = "--" + field.name.replace("_", "-")
    if field.positional:
        argument = typer.Argument(help=text, metavar=field.name.upper(), show_default=False)
        needed: Any = inspect.Parameter.empty if field.required else None
        annotation: Any = Annotated[kind if field.required else kind | None, argument]
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=needed, annotation=annotation)
    if kind is bool:
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}",
            help=f"{text} [dim]\\[default: {'yes' if field.default else 'no'}][/dim]",
            show_default=False,
        )
    else:
        names = [f"-{field.name}"] if len(field.name) == 1 else [flag]
        option = typer.Option(*names, help=text, metavar=metavar, show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _shared(dry_run: bool) -> list[inspect.Parameter]:
    options: list[tuple[str, Any, Any]] = [
        (
            "config",
            Path | None,
            typer.Option(
                "--config", help="YAML file with settings; a flag wins over it", metavar="FILE", show_default=False
            ),
        ),
        (
            "json",
            bool,
            typer.Option("--json", help="print one JSON object on stdout, all talk on stderr", show_default=False),
        ),
    ]
    if dry_run:
        options.append(
            (
                "dry_run",
                bool,
                typer.Option("--dry-run", help="say what would be done; write nothing", show_default=False),
            )
        )
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if name == "config" else False,
            annotation=Annotated[kind, option],
        )
        for name, kind, option in options
    ]


def guarded(work: Callable[[], Any]) -> Any:
    """Run `work`; turn what it raises into one message and the exit code that belongs to it."""
    try:
        return work()
    except KeyboardInterrupt as error:
        status = 143 if isinstance(error, Terminated) else 130
        console.fail("stopped", None, status)
        raise typer.Exit(status) from None
    except VlkitError as error:
        failure = error
    except OSError as error:
        if error.errno not in (*FULL, *REFUSED):
            _bug(error)
        failure = _disk(error)
    except MemoryError:
        failure = ResourceError("memory ran out", hint="a smaller --batch-size or --limit needs less")
    except Exception as error:
        if type(error).__name__ == "SafetensorError" and f"os error {errno.ENOSPC}" in str(error):
            failure = _disk(OSError(errno.ENOSPC, str(error)))
        elif type(error).__name__ == "OutOfMemoryError":
            failure = ResourceError(f"the device's memory ran out: {error}", hint="a smaller --batch-size needs less")
        else:
            _bug(error)
    _show_traceback_if_wanted()
    console.fail(failure.message, failure.hint, failure.exit_code)
    raise typer.Exit(failure.exit_code)


def _disk(error: OSError) -> VlkitError:
    if error.errno in FULL:
        return ResourceError(f"the disk is full: {error}", hint="free some space and run the same command again")
    return UsageError(f"the system refuses: {error}", hint="choose another file or folder, or change its permissions")


def _bug(error: BaseException) -> None:
    _show_traceback_if_wanted()
    console.fail(f"this is a bug in vlkit: {type(error).__name__}: {error}", "VLKIT_DEBUG=1 shows where", 1)
    raise typer.Exit(1)


def _show_traceback_if_wanted() -> None:
    if os.environ.get("VLKIT_DEBUG"):
        console.stderr().print_exception()
