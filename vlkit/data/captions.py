"""Texts: cleaned, filled into templates, identified."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

_SPACE = re.compile(r"\s+")


def clean(text: object) -> str:
    """NFC, control characters removed, white space collapsed; zero-width joiners carry meaning and stay.

    What is not a text (None, NaN, a number) becomes an empty string or its digits.
    """
    if text is None or (isinstance(text, float) and text != text):
        return ""
    printable = "".join(c for c in str(text) if c.isspace() or (unicodedata.category(c) != "Cc" and c != "\ufeff"))
    return _SPACE.sub(" ", unicodedata.normalize("NFC", printable)).strip()


def text_id(text: str) -> str:
    """Identity of a cleaned text: 20 hex digits of its SHA-256."""
    return hashlib.sha256(clean(text).encode("utf-8")).hexdigest()[:20]


def readable_class(name: str) -> str:
    """A class folder's name as words: `Tomato___Early_blight` -> `tomato early blight`."""
    words = re.sub(r"[_\-./\\]+", " ", name)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words)
    return clean(words).lower()


def from_templates(templates: Sequence[str], class_name: str) -> list[str]:
    """Captions of a class: every template filled with its readable name."""
    return [clean(template.replace("{class_name}", readable_class(class_name))) for template in templates]
