"""Vary texts by rules that keep the meaning: synonyms, prefixes, suffixes, order, case, simplification.

A rule makes variants of a text or none; the word lists come from the domain's YAML. Rules of form (prefix, suffix,
order, case) are for titles in scripts that have cases: a passage in whole sentences, or a Persian text, gets only
synonyms of its own script and simplification.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from vlkit.config.data import TEXT_RULES, parse_synonyms
from vlkit.data import captions

if TYPE_CHECKING:
    from vlkit.config.data import AugmentConfig

MAX_TITLE_WORDS = 10
_PARENTHESES = re.compile(r"\s+\([^()]*\)")
_LAST_PARENTHESES = re.compile(r"\s+\([^()]*\)(?=\s*[.!?]?$)")
_NUMBERING = re.compile(
    r"^\s*(?:#?\d+\s*[.):]|#\d+|no\.\s*\d+\s*[.:)])\s+|\s+(?:#\s*\d+|no\.\s*\d+)\s*$", re.IGNORECASE
)
_DANGLING = " ,;:-\u2013\u2014"
# First words of titles that are phrases, and take no prefix or suffix.
_PHRASE = re.compile(
    r"(?:an?|the|my|our|your|his|her|their|this|that|these|how|why|what|when|where|for|to|with)\b", re.IGNORECASE
)
# Signs that a title is more than a plain name: lists, brackets, numbering, possessives.
_ODD = re.compile(r"[,:;()\[\]#]|\bno\.\s*\d|['\u2019]s\b", re.IGNORECASE)
# Words in lower case within a title.
_SMALL = re.compile(r"an?|and|as|at|but|by|de|di|du|for|from|in|la|le|of|on|or|the|to|with", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
# Word boundaries: a zero-width non-joiner is inside a Persian word, a hyphen inside an English one, and the apostrophe
# of a genitive belongs to its word.
_BEFORE, _AFTER = r"(?<![\w\u200c-])", r"(?![\w\u200c'\u2019-])"


@dataclass(frozen=True)
class TextRules:
    """The rules with their word lists.

    Attributes:
        enabled: names of the rules that are on.
        synonyms: word or phrase in lower case -> its replacements.
        prefixes, suffixes: words that may be added before or after a title.
        leading: first words that may be moved behind a `with`, but not from before one of `compounds`.
    """

    enabled: tuple[str, ...]
    synonyms: Mapping[str, Sequence[str]]
    prefixes: Sequence[str] = ()
    suffixes: Sequence[str] = ()
    leading: Sequence[str] = ()
    compounds: Sequence[str] = ()

    @classmethod
    def from_config(cls, config: AugmentConfig) -> TextRules:
        """Build them from the settings of augment."""
        lists = (config.prefixes, config.suffixes, config.leading, config.compounds)
        return cls(config.text_rules, parse_synonyms(config.synonyms), *lists)

    def variants(self, text: str) -> dict[str, str]:
        """Return variant -> the rule that makes it, in the rules' order: cleaned, not empty, not equal to the text."""
        variants: dict[str, str] = {}
        title = is_title(text)
        for name in TEXT_RULES:
            rule, for_titles = RULES[name]
            if name in self.enabled and (title or not for_titles):
                for variant in map(captions.clean, rule(self, text)):
                    if any(letter.isalnum() for letter in variant) and variant != text:
                        variants.setdefault(variant, name)
        return variants


def is_title(text: str) -> bool:
    """Return whether a text is short, no sentence, and in a script that has cases."""
    words = text.split()
    return 0 < len(words) <= MAX_TITLE_WORDS and not text.endswith((".", "!", "?")) and _has_cases(text)


def _is_plain(text: str) -> bool:
    """Return whether a title is a name and nothing else: no phrase, list, numbering or brackets."""
    return text[:1].isalpha() and text[-1:].isalnum() and not _PHRASE.match(text) and not _ODD.search(text)


def _has_cases(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return bool(letters) and all(letter.lower() != letter.upper() for letter in letters)


def _synonyms(rules: TextRules, text: str) -> Iterator[str]:
    for word, synonyms in rules.synonyms.items():
        pattern = _word_pattern(word)
        if pattern.search(text):
            for synonym in synonyms:
                yield pattern.sub(partial(_fit_synonym, synonym), text)


@cache
def _word_pattern(word: str) -> re.Pattern[str]:
    """Return a pattern of a word or phrase, with the article before it."""
    return re.compile(rf"(?:{_BEFORE}(an?)(\s+))?{_BEFORE}({re.escape(word)}){_AFTER}", re.IGNORECASE)


def _fit_synonym(synonym: str, match: re.Match[str]) -> str:
    """Return the synonym in the case of the matched word, with `a` or `an` before it to suit its first letter."""
    article, space, word = match[1], match[2], match[3]
    all_capitals = word.isupper() and len(word) > 1
    if all_capitals:
        synonym = synonym.upper()
    elif word[:1].isupper():
        synonym = synonym[:1].upper() + synonym[1:]
    if article is None:
        return synonym
    if _starts_with_vowel(word) != _starts_with_vowel(synonym):
        ending = "" if not _starts_with_vowel(synonym) else "N" if all_capitals and article.isupper() else "n"
        article = article[0] + ending
    return f"{article}{space}{synonym}"


def _starts_with_vowel(word: str) -> bool:
    return word[:1].lower() in "aeiou"


def _add_prefix(rules: TextRules, text: str) -> Iterator[str]:
    letters = _letters(text)
    if _is_plain(text) and not any(_letters(prefix) in letters for prefix in rules.prefixes):
        yield from (f"{prefix} {text}" for prefix in rules.prefixes)


def _letters(text: str) -> str:
    """Return the letters alone, so that `Home-made` equals `homemade`."""
    return re.sub(r"[\W_]", "", text).lower()


def _remove_prefix(rules: TextRules, text: str) -> Iterator[str]:
    suffixes = {suffix.strip(_DANGLING).lower() for suffix in rules.suffixes}
    for prefix in rules.prefixes:
        rest = text[len(prefix) :].lstrip()
        if _starts_with(text, prefix) and rest[:1].isalnum() and rest.lower() not in suffixes:
            yield rest[:1].upper() + rest[1:] if text[:1].isupper() else rest


def _starts_with(text: str, prefix: str) -> bool:
    return text[: len(prefix) + 1].lower() == f"{prefix.lower()} "


def _add_suffix(rules: TextRules, text: str) -> Iterator[str]:
    """Append each suffix, but not to a title that holds the last word of one, which is its topic."""
    topics = {suffix.split()[-1].lower() for suffix in rules.suffixes if suffix.split()}
    if _is_plain(text) and not any(re.search(rf"\b{re.escape(word)}", text.lower()) for word in topics):
        yield from (f"{text} {suffix}" for suffix in rules.suffixes)


def _reorder(rules: TextRules, text: str) -> Iterator[str]:
    """Turn Banana French Toast into French Toast with Banana; banana bread stays together."""
    conjunctions = {"and", "or", "with"}
    compounds = conjunctions | {"free"} | {word.lower() for word in rules.compounds}
    for words in rules.leading:
        rest = text[len(words) :].split()
        is_name = len(rest) > 1 and len(rest[0]) > 2 and rest[0].isalpha() and rest[0].lower() not in compounds
        if _starts_with(text, words) and _is_plain(text) and is_name and conjunctions.isdisjoint(map(str.lower, rest)):
            yield f"{' '.join(rest)} with {text[: len(words)]}"


def _title_case(rules: TextRules, text: str) -> Iterator[str]:
    """Capitalise every word but the small ones; a word with inner capitals keeps them, unless all are capitals."""
    all_capitals = text.isupper()

    def capitalise(match: re.Match[str]) -> str:
        word = match[0]
        if any(letter.isupper() for letter in word[1:]) and not all_capitals:
            return word
        return word.lower() if match.start() and _SMALL.fullmatch(word) else word.capitalize()

    titled = _WORD.sub(capitalise, text)
    # A title in capitals would be changed differently the next time.
    yield from [] if titled.isupper() else _if_same_length(text, titled)


def _lower_case(rules: TextRules, text: str) -> Iterator[str]:
    yield from _if_same_length(text, text.lower())


def _upper_case(rules: TextRules, text: str) -> Iterator[str]:
    yield from _if_same_length(text, text.upper())


def _if_same_length(text: str, changed: str) -> Iterator[str]:
    """Yield a change of case unless it changes the spelling: a sharp s has no capital, a dotted capital I no small."""
    if len(changed) == len(text):
        yield changed


def _simplify(rules: TextRules, text: str) -> Iterator[str]:
    """Drop numbering at either end, and parentheses: in a passage only those at its end."""
    parentheses = _PARENTHESES if is_title(text) else _LAST_PARENTHESES
    yield _NUMBERING.sub("", parentheses.sub("", text)).strip(_DANGLING)


Rule = Callable[[TextRules, str], Iterator[str]]

# Name -> the rule, and whether it is for titles alone.
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
