"""Faster ways to compute what transformers' layers compute. `VLKIT_FAST=off` switches all of them off."""

from __future__ import annotations

import os

from vlkit.errors import UsageError


def enabled() -> bool:
    """Return whether the fast ways are used: unless the environment variable VLKIT_FAST is "off".

    A model that was loaded keeps the layers that it was loaded with.

    Raises:
        UsageError: VLKIT_FAST is neither "on" nor "off".
    """
    value = os.environ.get("VLKIT_FAST") or "on"
    if value not in ("on", "off"):
        raise UsageError(f"VLKIT_FAST is {value!r}", hint="set it to on or off")
    return value == "on"
