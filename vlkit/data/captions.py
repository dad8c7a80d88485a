"""Clean texts, fill them into templates, identify them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from html import unescape
from html.parser import HTMLParser

_SPACE = re.compile(r"\s+")
_PLAIN = re.compile(r"[ !-%\'-;=?-~]*")  # ASCII without markup, entities and control characters
_TAGS = frozenset(
    re.findall(
        r"\w+",
        """a abbr acronym address article aside audio b base bdi bdo big blink blockquote body br button caption center
        cite code col colgroup dd del details dfn div dl dt em embed fieldset figcaption figure font footer form frame
        frameset h1 h2 h3 h4 h5 h6 head header hr html i iframe img input ins kbd label legend li link main map mark
        menu meta nav noscript object ol option p param picture pre q s samp script section select small source span
        strike strong style sub summary sup svg table tbody td textarea tfoot th thead time title tr tt u ul var video
        wbr""",
    )
)
_MARKUP = re.compile(
    rf"</?(?:{'|'.join(sorted(_TAGS))})(?:\s[^<>]*)?/?>|<!|&(?:#\d+|#x[\da-f]+|[a-z][a-z\d]*);", re.IGNORECASE
)
_COMMENT, _ESCAPED = re.compile(r"<!--(?:(?!-->)[^<]|<(?!!--))*(?:-->)?"), re.compile(r"&(?:amp;)+(?=[#a-zA-Z])")
_HIDDEN_TAGS = frozenset(["script", "style"])
# Characters that are invisible and mean nothing here; zero-width joiners and non-joiners are not among them.
_INVISIBLE = frozenset("\ufeff\u200b\u2060\u00ad\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_BLOCKS = frozenset(["br", "p", "div", "li", "ul", "ol", "tr", "td", "th", "table", "h1", "h2", "h3", "h4", "h5", "h6"])
MAX_ESCAPE_DEPTH = 8
_FIELD = re.compile(r"\{(\w+)\}")

# Arabic letters that Persian keyboards and sites mix with its own.
_PERSIAN = str.maketrans({"\u064a": "\u06cc", "\u0649": "\u06cc", "\u0643": "\u06a9", "\u0640": None})


def clean(text: object, *, persian: bool = False) -> str:
    """Normalise a text: NFC, no markup, no control characters, single spaces; meaningful zero-width joiners stay.

    None and NaN become an empty string, a number its digits. Cleaning twice changes nothing.

    Args:
        persian: unify letters that Persian texts write in two ways (Arabic ye and kaf), and drop the tatweel.
    """
    if text is None or (isinstance(text, float) and text != text):
        return ""
    cleaned = str(text)
    if not _PLAIN.fullmatch(cleaned):
        for _ in range(MAX_ESCAPE_DEPTH):
            visible = _normalize(_visible_text(cleaned), persian)
            if visible == cleaned:
                break
            cleaned = visible
        else:
            # Markup nested this deep is not a text that somebody wrote.
            cleaned = _normalize(re.sub("[<>&]", " ", cleaned), persian)
    return _SPACE.sub(" ", cleaned).strip()


def _normalize(text: str, persian: bool) -> str:
    visible = "".join(
        c for c in text if c.isspace() or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _INVISIBLE)
    )
    normal = unicodedata.normalize("NFC", visible)
    return normal.translate(_PERSIAN) if persian else normal


def _visible_text(text: str) -> str:
    """Return the text that a browser would show: without tags, comments and entities; `a < b` stays."""
    # Entities escaped many times over and comments without an end make the parser slow.
    text = _COMMENT.sub(" ", _ESCAPED.sub("&", text))
    if not _MARKUP.search(text):
        return text
    reader = _VisibleText()
    reader.feed(text)
    reader.close()
    visible = "".join(reader.parts)
    # A lone `<` makes the parser wait for a tag that never comes; then only entities are left to decode.
    return visible if visible != text else unescape(text)


class _VisibleText(HTMLParser):
    """Collects the visible text of a page; a block's end is a space."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden_depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in _TAGS:
            self.parts.append(self.get_starttag_text() or "")
        self._hidden_depth += tag in _HIDDEN_TAGS
        if tag in _BLOCKS:
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag not in _TAGS:
            self.parts.append(f"</{tag}>")
        self._hidden_depth -= tag in _HIDDEN_TAGS and self._hidden_depth > 0
        if tag in _BLOCKS:
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self._hidden_depth:
            self.parts.append(data)


def text_id(text: str) -> str:
    """Return the identity of a cleaned text: 20 hex digits of its SHA-256."""
    return hashlib.sha256(clean(text).encode("utf-8", "surrogatepass")).hexdigest()[:20]


def fold_case(text: str) -> str:
    """Return a cleaned, case-folded text, for comparisons where case does not matter."""
    return clean(text).casefold()


def readable_class(name: str) -> str:
    """Return a class folder's name as words: `Tomato___Early_blight` -> `tomato early blight`."""
    words = re.sub(r"[_\-./\\]+", " ", name)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words)
    return clean(words).lower()


def template_fields(template: str) -> list[str]:
    """Return the names in {braces}."""
    return _FIELD.findall(template)


def fill_template(template: str, fields: Mapping[str, str]) -> str | None:
    """Fill in the {fields} of a template and clean it; return None if one of them is empty or missing."""
    if not all(fields.get(name) for name in template_fields(template)):
        return None
    return clean(_FIELD.sub(lambda match: fields[match[1]], template))
