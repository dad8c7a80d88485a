"""Turn a config dataclass into a command: its fields are the flags, --config reads the same names from YAML.

`command` builds the function that Typer sees. Every flag defaults to None there, so that what the command line leaves
out can come from the YAML file, a preset or the dataclass. Every error is printed here, once.
"""

from __future__ import annotations

import errno
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

from vlkit import console
from vlkit.config.base import ALTERNATIVES, Field, Settings, read_yaml
from vlkit.errors import ResourceError, UsageError, VlkitError
from vlkit.signals import Terminated
from vlkit.storage import Location

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (
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
                given = _merge_given(config_class, config_file, flags)
                config = resolve(given) if resolve else config_class.from_layers(given)
                return body(config, **extra)

            outcome = run_guarded(work)
            if as_json:
                console.print_json(outcome or {})

        parameters = [_parameter(field) for field in config_class.fields().values()] + _common_parameters(dry_run)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = body.__doc__
        app.command(name, no_args_is_help=False)(run)
        return body

    return register


def _merge_given(config_class: type[Settings], config_file: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the user gave: the YAML file's values, and over them the flags'."""
    layer: dict[str, Any] = {}
    if config_file is not None:
        values = read_yaml(config_file)
        config_class.check_keys(values, str(config_file))
        fields = config_class.fields()
        layer = {key: fields[key].read(value, str(config_file)) for key, value in values.items() if value is not None}
        if fields.keys() <= values.keys():
            # A run's snapshot names every setting; what has no effect in it came from a preset.
            layer = config_class.drop_idle(layer)
    # A flag that may be repeated and was not given is an empty list.
    from_flags = {key: value for key, value in flags.items() if value is not None and value != []}
    numbers = {key for key in from_flags if config_class.fields()[key].kind in (int, float)}
    from_flags |= {key: config_class.fields()[key].read(from_flags[key], "") for key in numbers}
    for pair in ALTERNATIVES:
        if pair & from_flags.keys():
            layer = {key: value for key, value in layer.items() if key not in pair}
        if pair <= from_flags.keys() or pair <= {key for key, value in layer.items() if value is not None}:
            raise UsageError("--steps and --epochs exclude each other", hint="give one of them")
    return {**layer, **from_flags}


def _parameter(field: Field) -> inspect.Parameter:
    """Return the Typer argument or option of a setting."""
    kind, help_text = _flag_type(field), _help_text(field)
    if field.positional:
        argument = typer.Argument(help=help_text, metavar=field.name.upper(), show_default=False)
        default: Any = inspect.Parameter.empty if field.required else None
        annotation: Any = Annotated[kind if field.required else kind | None, argument]
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    names = [f"{field.flag}/--no-{field.flag[2:]}" if kind is bool else field.flag]
    metavar = None if kind is bool else _metavar(field)
    option = typer.Option(*names, help=help_text, metavar=metavar, show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _is_nested(field: Field) -> bool:
    return isinstance(field.kind, type) and issubclass(field.kind, Settings)


def _flag_type(field: Field) -> Any:
    """Return the type that Typer parses; other values are texts, which `Field.read` parses, numbers among them."""
    if field.repeated:
        return list[str]
    as_text = field.choices or field.is_union or get_origin(field.kind) is tuple or _is_nested(field)
    return str if as_text or field.kind in (int, float, Location) else field.kind


def _help_text(field: Field) -> str:
    """Return the help of a flag with its choices and its default."""
    default = field.default
    if field.kind is bool:
        default = "yes" if default else "no"
    elif field.repeated:
        default = "; ".join(default)
    elif isinstance(default, tuple):
        default = ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in default)
    text = f"{field.help} [dim]\\[{' | '.join(field.choices)}][/dim]" if field.choices else field.help
    return text if default in (None, "") else f"{text} [dim]\\[default: {default}][/dim]"


def _metavar(field: Field) -> str:
    if field.is_union:
        return "N|auto"
    if get_origin(field.kind) is tuple and not field.repeated:
        return "LOW,HIGH" if float in get_args(field.kind) else "A,B,..."
    if _is_nested(field):
        return "FILE"
    return {int: "N", float: "X", Path: "PATH", Location: "PATH"}.get(field.kind, "TEXT")


def _common_parameters(dry_run: bool) -> list[inspect.Parameter]:
    """Return the flags that every command has, and --dry-run for those that write."""
    config = typer.Option(
        "--config", help="YAML file with settings; a flag wins over it", metavar="FILE", show_default=False
    )
    json = typer.Option("--json", help="print one JSON object on stdout, messages on stderr", show_default=False)
    preview = typer.Option("--dry-run", help="print what would be done; write nothing", show_default=False)
    options: list[tuple[str, Any, Any, Any]] = [("config", Path | None, config, None), ("json", bool, json, False)]
    if dry_run:
        options.append(("dry_run", bool, preview, False))
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option])
        for name, kind, option, default in options
    ]


def run_guarded(work: Callable[[], Any]) -> Any:
    """Run `work`; turn what it raises into one message and the exit code that belongs to it."""
    try:
        return work()
    except KeyboardInterrupt as error:
        status = 143 if isinstance(error, Terminated) else 130
        console.fail("stopped", None, status)
        raise typer.Exit(status) from None
    except Exception as error:
        if os.environ.get("VLKIT_DEBUG"):
            console.stderr().print_exception()
        failure = _translate(error)
        console.fail(failure.message, failure.hint, failure.exit_code)
        raise typer.Exit(failure.exit_code) from None


def _translate(error: Exception) -> VlkitError:
    """Return an error as one with a message and a way out; what the user can do nothing about is a bug."""
    if isinstance(error, VlkitError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("memory ran out", hint="a smaller --batch-size or --limit needs less")
    if _is_raised_by("torch", "OutOfMemoryError", error):
        return ResourceError(f"the device's memory ran out: {error}", hint="a smaller --batch-size needs less")
    # safetensors writes in Rust, which has no errno but in its text.
    full = _is_raised_by("safetensors", "SafetensorError", error) and f"os error {errno.ENOSPC}" in str(error)
    if full or (isinstance(error, OSError) and error.errno in DISK_FULL):
        return ResourceError(f"the disk is full: {error}", hint="free some space and run the same command again")
    if isinstance(error, OSError) and error.errno in DENIED:
        hint = "choose another file or folder, or change its permissions"
        return UsageError(f"the system denies access: {error}", hint=hint)
    return VlkitError(
        f"this is a bug in vlkit: {type(error).__name__}: {error}", hint="VLKIT_DEBUG=1 prints the traceback"
    )


def _is_raised_by(package: str, name: str, error: Exception) -> bool:
    """Return whether `error` is an instance of `package.name`, without importing a package that nothing has loaded."""
    module = sys.modules.get(package)
    return module is not None and isinstance(error, getattr(module, name, ()))
