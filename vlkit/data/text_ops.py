"""Texts, varied by rules that keep the meaning: synonyms, prefixes, suffixes, order, case, simplification.

A rule gives variants of a text or none; the word lists come from the domain's YAML. Rules of form (prefix, suffix,
order, case) are for titles in scripts that have cases: a passage in whole sentences, or a Persian text, passes only
through synonyms of its own script and simplification.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlkit.config_data import TEXT_RULES, parsed_synonyms
from vlkit.data import captions

if TYPE_CHECKING:
    from vlkit.config_data import AugmentConfig

LONGEST_TITLE = 10  # words
_PARENTHESES = re.compile(r"\s*(?:\([^()]*\)|\[[^\[\]]*\])")
_NUMBERING = re.compile(
    r"^\s*(?:#?\d+\s*[.):]|#\d+|no\.\s*\d+\s*[.:)]?)\s+|\s+(?:#\s*\d+|no\.\s*\d+)\s*$", re.IGNORECASE
)
_HANGING = " ,;:-\u2013\u2014"
_DETERMINERS = ("a", "an", "the", "my", "our", "your", "this", "these")
# Where a word begins and ends. A zero-width non-joiner is inside of a Persian word.
_BEFORE, _AFTER = r"(?<![\w\u200c])", r"(?![\w\u200c])"


@dataclass(frozen=True)
class TextRules:
    """The rules under their word lists.

    Attributes:
        on: names of the rules that are switched on.
        synonyms: word or phrase in lower case -> what may stand for it.
        prefixes, suffixes: what may stand before or after a title.
        leading: first words that may be moved behind a `with`.
    """

    on: tuple[str, ...]
    synonyms: Mapping[str, Sequence[str]]
    prefixes: Sequence[str] = ()
    suffixes: Sequence[str] = ()
    leading: Sequence[str] = ()

    @classmethod
    def of(cls, config: AugmentConfig) -> TextRules:
        """From the settings of augment."""
        return cls(
            config.text_rules, parsed_synonyms(config.synonyms), config.prefixes, config.suffixes, config.leading
        )

    def variants(self, text: str) -> dict[str, str]:
        """Variant -> the rule that gives it, in the rules' order: cleaned, none empty, none equal to the text."""
        found: dict[str, str] = {}
        title = is_title(text)
        for name in TEXT_RULES:
            rule, for_titles = RULES[name]
            if name in self.on and (title or not for_titles):
                for variant in map(captions.clean, rule(self, text)):
                    if re.search(r"\w", variant) and variant != text:
                        found.setdefault(variant, name)
        return found


def is_title(text: str) -> bool:
    """Short, no sentence and no list, in a script that has cases."""
    plain = text[:1].isalnum() and ":" not in text and not text.endswith((".", "!", "?"))
    return plain and len(text.split()) <= LONGEST_TITLE and _has_cases(text)


def _has_cases(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return bool(letters) and all(letter.lower() != letter.upper() for letter in letters)


def _synonyms(rules: TextRules, text: str) -> Iterator[str]:
    for word, others in rules.synonyms.items():
        pattern = re.compile(rf"(?:{_BEFORE}(an?)(\s+))?{_BEFORE}({re.escape(word)}){_AFTER}", re.IGNORECASE)
        if pattern.search(text):
            for other in others:
                yield pattern.sub(lambda found, other=other: _replaced(found, other), text)


def _replaced(found: re.Match[str], other: str) -> str:
    """The synonym in the case of the word it stands for, and `a` or `an` before it as its first letter wants."""
    article, space, word = found[1], found[2], found[3]
    if word.isupper() and len(word) > 1:
        other = other.upper()
    elif word[:1].isupper():
        other = other[:1].upper() + other[1:]
    if article is None:
        return other
    if _vowel(word) != _vowel(other):
        article = (article[0] + "n" if _vowel(other) else article[0]) if len(article) < 3 else article
    return article + space + other


def _vowel(word: str) -> bool:
    return word[:1].lower() in "aeiou"


def _add_prefix(rules: TextRules, text: str) -> Iterator[str]:
    if text[:1].isalpha() and not any(_begins(text, word) for word in (*rules.prefixes, *_DETERMINERS)):
        yield from (f"{prefix} {text}" for prefix in rules.prefixes)


def _remove_prefix(rules: TextRules, text: str) -> Iterator[str]:
    for prefix in rules.prefixes:
        if _begins(text, prefix):
            rest = text[len(prefix) :].lstrip()
            yield rest[:1].upper() + rest[1:] if text[:1].isupper() else rest


def _begins(text: str, prefix: str) -> bool:
    return text[: len(prefix) + 1].lower() == f"{prefix.lower()} "


def _add_suffix(rules: TextRules, text: str) -> Iterator[str]:
    ends = tuple(suffix.strip(_HANGING).lower() for suffix in rules.suffixes)
    if not text.lower().endswith(ends):
        yield from (f"{text} {suffix}" for suffix in rules.suffixes)


def _reorder(rules: TextRules, text: str) -> Iterator[str]:
    """Banana French Toast -> French Toast with Banana."""
    for words in rules.leading:
        rest = text[len(words) :].strip()
        if _begins(text, words) and len(rest.split()) > 1 and not re.search(r"\b(?:and|with)\b|[&,(]", rest.lower()):
            yield f"{rest} with {text[: len(words)]}"


def _title_case(rules: TextRules, text: str) -> Iterator[str]:
    shouted = text.isupper()
    yield " ".join(
        word if len(word) > 1 and word.isupper() and not shouted else word.capitalize() for word in text.split(" ")
    )


def _lower_case(rules: TextRules, text: str) -> Iterator[str]:
    yield text.lower()


def _upper_case(rules: TextRules, text: str) -> Iterator[str]:
    yield text.upper()


def _simplify(rules: TextRules, text: str) -> Iterator[str]:
    """Without what stands in parentheses, and without numbering at either end."""
    yield _NUMBERING.sub("", _PARENTHESES.sub("", text)).strip(_HANGING)


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
