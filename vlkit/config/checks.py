"""Checks that the settings share: numbers within bounds, names that are known.

Each raises a UsageError that names the flag.
"""

from __future__ import annotations

from typing import Any

from vlkit.config.base import Settings
from vlkit.errors import UsageError, suggest_name

CACHE_MODES = ("off", "auto")


def _values(config: Settings, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(name, getattr(config, name)) for name in names if getattr(config, name) is not None]


def require_at_least(config: Settings, low: float, *names: str) -> None:
    """Refuse a number below `low`."""
    for name, value in _values(config, names):
        if not value >= low:
            raise UsageError(f"{config.fields()[name].flag} {value} must be at least {low}")


def require_above(config: Settings, low: float, *names: str) -> None:
    """Refuse a number that is not above `low`."""
    for name, value in _values(config, names):
        if not value > low:
            raise UsageError(f"{config.fields()[name].flag} {value} must be above {low}")


def require_between(config: Settings, low: float, high: float, *names: str) -> None:
    """Refuse a number outside of `low` to `high`."""
    for name, value in _values(config, names):
        if not low <= value <= high:
            raise UsageError(f"{config.fields()[name].flag} {value} must lie between {low:g} and {high:g}")


def require_range(config: Settings, low: float, high: float, name: str) -> None:
    """Refuse a range that falls, or leaves its bounds."""
    start, end = getattr(config, name)
    if not low <= start <= end <= high:
        flag = config.fields()[name].flag
        raise UsageError(f"{flag} {start:g},{end:g} must rise and lie between {low:g} and {high:g}")


def require_known(config: Settings, name: str, known: tuple[str, ...]) -> None:
    """Refuse a list with an unknown name."""
    for value in getattr(config, name):
        if value not in known:
            message = f"{config.fields()[name].flag}: unknown {value!r}"
            raise UsageError(message, hint=suggest_name(value, known))


def require_cache(cache: str) -> None:
    """Refuse a --cache that is none of off, auto, or a local folder."""
    if not cache.strip() or "://" in cache or (cache not in CACHE_MODES and cache.lower() in CACHE_MODES):
        raise UsageError(f"--cache {cache!r} is none of off, auto, or a folder on this machine")
