"""Texts, varied by rules that keep the meaning: synonyms, prefixes, suffixes, order, case, simplification.

A rule gives variants of a text or none; the word lists come from the domain's YAML. Rules of form (prefix, suffix,
order, case) are for titles in scripts that have cases: a passage in whole sentences, or a Persian text, passes only
through synonyms of its own script and simplification.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from vlkit.config.data import TEXT_RULES, parse_synonyms
from vlkit.data import captions

if TYPE_CHECKING:
    from vlkit.config.data import AugmentConfig

LONGEST_TITLE = 10  # words
_PARENTHESES = re.compile(r"\s+\([^()]*\)")
_LAST_PARENTHESES = re.compile(r"\s+\([^()]*\)(?=\s*[.!?]?$)")
_NUMBERING = re.compile(
    r"^\s*(?:#?\d+\s*[.):]|#\d+|no\.\s*\d+\s*[.:)])\s+|\s+(?:#\s*\d+|no\.\s*\d+)\s*$", re.IGNORECASE
)
_HANGING = " ,;:-\u2013\u2014"
# How a title begins that is a phrase, and takes no prefix or suffix.
_PHRASE = re.compile(
    r"(?:an?|the|my|our|your|his|her|their|this|that|these|how|why|what|when|where|for|to|with)\b", re.IGNORECASE
)
# What a plain name has nothing of: lists, brackets, numbering, somebody whose it is.
_ODD = re.compile(r"[,:;()\[\]#]|\bno\.\s*\d|['\u2019]s\b", re.IGNORECASE)
# Words that stay small within a title.
_SMALL = re.compile(r"an?|and|as|at|but|by|de|di|du|for|from|in|la|le|of|on|or|the|to|with", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
# Where a word begins and ends: a zero-width non-joiner is inside of a Persian word, a hyphen of an English one, and a
# genitive's apostrophe belongs to it.
_BEFORE, _AFTER = r"(?<![\w\u200c-])", r"(?![\w\u200c'\u2019-])"


@dataclass(frozen=True)
class TextRules:
    """The rules under their word lists.

    Attributes:
        on: names of the rules that are switched on.
        synonyms: word or phrase in lower case -> what may stand for it.
        prefixes, suffixes: what may stand before or after a title.
        leading: first words that may be moved behind a `with`, but not from before one of `compounds`.
    """

    on: tuple[str, ...]
    synonyms: Mapping[str, Sequence[str]]
    prefixes: Sequence[str] = ()
    suffixes: Sequence[str] = ()
    leading: Sequence[str] = ()
    compounds: Sequence[str] = ()

    @classmethod
    def from_config(cls, config: AugmentConfig) -> TextRules:
        """From the settings of augment."""
        lists = (config.prefixes, config.suffixes, config.leading, config.compounds)
        return cls(config.text_rules, parse_synonyms(config.synonyms), *lists)

    def variants(self, text: str) -> dict[str, str]:
        """Variant -> the rule that gives it, in the rules' order: cleaned, none empty, none equal to the text."""
        found: dict[str, str] = {}
        title = is_title(text)
        for name in TEXT_RULES:
            rule, for_titles = RULES[name]
            if name in self.on and (title or not for_titles):
                for variant in map(captions.clean, rule(self, text)):
                    if any(letter.isalnum() for letter in variant) and variant != text:
                        found.setdefault(variant, name)
        return found


def is_title(text: str) -> bool:
    """Short, no sentence, in a script that has cases."""
    words = text.split()
    return 0 < len(words) <= LONGEST_TITLE and not text.endswith((".", "!", "?")) and _has_cases(text)


def _is_plain(text: str) -> bool:
    """A title that is a name and nothing else: no phrase, no list, no numbering, nothing in brackets."""
    return text[:1].isalpha() and text[-1:].isalnum() and not _PHRASE.match(text) and not _ODD.search(text)


def _has_cases(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return bool(letters) and all(letter.lower() != letter.upper() for letter in letters)


def _synonyms(rules: TextRules, text: str) -> Iterator[str]:
    for word, others in rules.synonyms.items():
        pattern = _pattern(word)
        if pattern.search(text):
            for other in others:
                yield pattern.sub(lambda found, other=other: _replaced(found, other), text)


@cache
def _pattern(word: str) -> re.Pattern[str]:
    """A word or phrase, with the article before it."""
    return re.compile(rf"(?:{_BEFORE}(an?)(\s+))?{_BEFORE}({re.escape(word)}){_AFTER}", re.IGNORECASE)


def _replaced(found: re.Match[str], other: str) -> str:
    """The synonym in the case of the word it stands for, and `a` or `an` before it as its first letter wants."""
    article, space, word = found[1], found[2], found[3]
    shouted = word.isupper() and len(word) > 1
    if shouted:
        other = other.upper()
    elif word[:1].isupper():
        other = other[:1].upper() + other[1:]
    if article is None:
        return other
    if _vowel(word) != _vowel(other):
        article = article[0] + ("" if not _vowel(other) else "N" if shouted and article.isupper() else "n")
    return article + space + other


def _vowel(word: str) -> bool:
    return word[:1].lower() in "aeiou"


def _add_prefix(rules: TextRules, text: str) -> Iterator[str]:
    said = _letters(text)
    if _is_plain(text) and not any(_letters(prefix) in said for prefix in rules.prefixes):
        yield from (f"{prefix} {text}" for prefix in rules.prefixes)


def _letters(text: str) -> str:
    """`Home-made` and `homemade` say the same."""
    return re.sub(r"[\W_]", "", text).lower()


def _remove_prefix(rules: TextRules, text: str) -> Iterator[str]:
    ends = {suffix.strip(_HANGING).lower() for suffix in rules.suffixes}
    for prefix in rules.prefixes:
        rest = text[len(prefix) :].lstrip()
        if _begins(text, prefix) and rest[:1].isalnum() and rest.lower() not in ends:
            yield rest[:1].upper() + rest[1:] if text[:1].isupper() else rest


def _begins(text: str, prefix: str) -> bool:
    return text[: len(prefix) + 1].lower() == f"{prefix.lower()} "


def _add_suffix(rules: TextRules, text: str) -> Iterator[str]:
    """Not to a title that says it already: the last word of a suffix is what it is about."""
    about = {suffix.split()[-1].lower() for suffix in rules.suffixes if suffix.split()}
    if _is_plain(text) and not any(re.search(rf"\b{re.escape(word)}", text.lower()) for word in about):
        yield from (f"{text} {suffix}" for suffix in rules.suffixes)


def _reorder(rules: TextRules, text: str) -> Iterator[str]:
    """Banana French Toast -> French Toast with Banana; but banana bread stays together."""
    apart = {"and", "or", "with"}
    joined = apart | {"free"} | {word.lower() for word in rules.compounds}
    for words in rules.leading:
        rest = text[len(words) :].split()
        named = len(rest) > 1 and len(rest[0]) > 2 and rest[0].isalpha() and rest[0].lower() not in joined
        if _begins(text, words) and _is_plain(text) and named and apart.isdisjoint(map(str.lower, rest)):
            yield f"{' '.join(rest)} with {text[: len(words)]}"


def _title_case(rules: TextRules, text: str) -> Iterator[str]:
    """Every word but the small ones; what has capitals of its own keeps them, unless all are capitals."""
    shouted = text.isupper()

    def changed(found: re.Match[str]) -> str:
        word = found[0]
        if any(letter.isupper() for letter in word[1:]) and not shouted:
            return word
        return word.lower() if found.start() and _SMALL.fullmatch(word) else word.capitalize()

    titled = _WORD.sub(changed, text)
    # All capitals would be read as shouted the next time.
    yield from [] if titled.isupper() else _one_to_one(text, titled)


def _lower_case(rules: TextRules, text: str) -> Iterator[str]:
    yield from _one_to_one(text, text.lower())


def _upper_case(rules: TextRules, text: str) -> Iterator[str]:
    yield from _one_to_one(text, text.upper())


def _one_to_one(text: str, changed: str) -> Iterator[str]:
    """A change of case that is none of spelling: a dotted capital I has no small letter, a sharp s no capital."""
    if len(changed) == len(text):
        yield changed


def _simplify(rules: TextRules, text: str) -> Iterator[str]:
    """Without numbering at either end, and without parentheses: of a passage only those at its end."""
    found = _PARENTHESES if is_title(text) else _LAST_PARENTHESES
    yield _NUMBERING.sub("", found.sub("", text)).strip(_HANGING)


Rule = Callable[[TextRules, str], Iterator[str]]

# Name -> the rule, and whether it is for titles only.
RULES: dict[str, tuple[Rule, bool]] = {
    "synonyms": (_synonyms, False),
    "add-prefix": (_add_prefix, True),
    "remove-prefix": (_remove_prefix, True),
    "add-suffix": (_add_suffix, True),
    "reorder": (_reorder, True),
    "simplify": (_simplify, False),
    "title-case": (_title_case, True),
    "lower-case": (_lower_case, True),
    "upper-case": (_upper_case, True),
}
