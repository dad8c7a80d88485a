"""Captions -> tokens as COCO's evaluation counts them: the Penn Treebank's, in lower case, without punctuation.

COCO uses Stanford's tokenizer; these are its rules as far as captions need them, derived by comparing the two. The
tokens of a word rarely depend on its neighbours, so each word is tokenized once and cached.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

# COCO drops these. Its list has brackets in capitals, tokens have them in lower case, so brackets stay.
DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
BREAKS = re.compile("[\\r\\x0b\\x0c\\u2028\\u2029\\n]")
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
WRITTEN = {
    **BRACKETS,
    **dict.fromkeys("\u2018\u2039", "`"),
    **dict.fromkeys("\u2019\u203a", "'"),
    **dict.fromkeys("\u201c\u00ab", "``"),
    **dict.fromkeys('\u201d\u00bb"', "''"),
    **dict.fromkeys("\u2013\u2014\u2015", "--"),
    "\u2026": "...",
    "\u20ac": "$",
    "\u00a3": "#",
    "\u00a2": "cents",
    **{"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
}
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''"}
# "22 3/4".
MIXED = re.compile(r"(?<![\w/.])(\d{1,4}) (\d{1,4}/\d{1,4})(?![\d/])")
SPACES = re.compile(r"[ \t]+")
UNSEEN = re.compile("[\ufe0f\u00ad\u200b-\u200f\u2060\ufeff]")
APOSTROPHE = "['\u2019]"
LETTER = "[^\\W\\d_]"
# Combining accents and vowels belong to the letter before them.
MARKS = "".join(chr(code) for code in range(0x300, 0xFE30) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
ALNUM = f"(?:[^\\W_\u00bc-\u00be\u2153-\u215e]|[{MARKS}])"
# Words that always keep their full stop.
ABBREVIATIONS = "|".join(
    [
        "mr|mrs|ms|messrs|dr|drs|prof|profs|sen|sens|rep|reps|atty|attys|lt|col|gen|gov|govs|adm|rev|maj|sgt|cpl",
        "pvt|capt|st|ste|ave|pres|lieut|hon|brig|cmdr|comdr|pfc|spc|supt|supts|det|mt|ft|adj|adv|asst|assoc|ens|insp",
        "mlle|mme|msgr|sfc|ala|ariz|calif|colo|conn|dak|fla|ga|ind|kan|kans|ky|md|mich|minn",
        "mo|mont|neb|nev|okla|penn|tenn|vt|va|wis|wyo|jan|feb|mar|apr|jun|jul|aug|sep",
        "sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|inc|cos|corp|ltd|plc|bancorp|bhd|assn|univ|intl|sys|co|jr",
        "sr|bros|esq|blvd|rd|tel|est|ext|sq|etc|al|seq|vs|dept|ph|bldg|cf",
    ]
)
# These keep it only where they begin with a capital.
STATES = "|".join(f"(?-i:{name[0]}){name[1:]}" for name in ("Ark", "Del", "Ill", "La", "Mass", "Miss", "Ore", "Pa"))
STATES += "|(?-i:T)ex|(?-i:W)ash"
CONTRACTION = f"{APOSTROPHE}(?:s|m|d|re|ve|ll)(?!{ALNUM})"
# These are split after their third letter.
SPLIT_WORDS = frozenset(["cannot", "gonna", "gotta", "wanna", "lemme", "gimme"])

# After one of these a single letter's full stop ends a sentence: "vitamin A. Then" is not "John F. Kennedy".
STARTERS = frozenset(
    [
        *("About", "According", "Additionally", "After", "An", "A", "As", "At", "But", "Earlier", "He"),
        *("Her", "Here", "However", "If", "In", "It", "Last", "Many", "More", "Now", "Once"),
        *("One", "Other", "Our", "She", "Since", "So", "Some", "Such", "That", "The", "Their"),
        *("Then", "There", "These", "They", "This", "We", "When", "While", "What", "Yet", "You"),
    ]
)
VULGAR = "\u00bc-\u00be\u2153\u2154"
INSIDE = (
    rf"{ALNUM}|_(?={ALNUM})|-(?={ALNUM})|/(?={ALNUM})|[.!?](?={LETTER})|(?<=[aeiou]){APOSTROPHE}(?=[aeiou])"
    rf"|(?<=(?-i:[A-Z]))&(?=(?-i:[A-Z])(?!{ALNUM}))"
)
TOKEN = re.compile(
    "|".join(
        [
            r"(?P<whole>https?://[^\s\"<>|(){}]*[^\s\"'<>|.!?(){},-]|www\.[^\s\"<>|(){}]*[^\s\"'<>|.!?(){},-]"
            r"|(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+|</?[a-z!?][^<>\s]*>)",
            r"(?P<entity>&(?:amp|lt|gt|quot);)",
            rf"(?P<apostrophe>(?<!\d){APOSTROPHE}\d\ds?(?!{ALNUM})|{APOSTROPHE}n{APOSTROPHE}|{APOSTROPHE}(?:n|em|cause|till?)(?!{ALNUM})"
            rf"|{CONTRACTION}|n{APOSTROPHE}t(?!{ALNUM}))",
            rf"(?P<tis>{APOSTROPHE}t(?:is|was)(?!{ALNUM}))",
            rf"(?P<date>\d{{1,2}}[-/]\d{{1,2}}[-/]\d{{2,4}}(?!{ALNUM}))",
            rf"(?P<fraction>(?:\d{{1,4}}[-\xa0])?\d{{1,4}}/\d{{1,4}}(?!{ALNUM}))",
            rf"(?P<acronym>{LETTER}(?:\.{LETTER})+\.?(?!{ALNUM}))",
            rf"(?P<letter>(?<!{ALNUM}){LETTER}\.(?!{ALNUM}))",
            rf"(?P<abbreviation>(?:{ABBREVIATIONS}|{STATES})\.(?!{ALNUM}))",
            r"(?P<number_of>(?:no|nos|figs?|prop|art)\.(?=\d|$))",
            rf"(?P<number>[-+]?\d+(?:[.:,]\d+)+|[-+]\d+(?!{ALNUM})|\.\d+)",
            r"(?P<currency>[a-z]{1,3}\$(?=\d))",
            rf"(?P<vulgar>[{VULGAR}])",
            rf"(?P<word>(?:[dol]{APOSTROPHE})?{ALNUM}(?:(?!n{APOSTROPHE}t(?!{ALNUM}))(?:{INSIDE}))*(?:(?<=[a-z])(?:\++|#(?!\w)))?)",
            r"(?P<dots>\.\.+|\u2026)",
            r"(?P<run>[?!]+|\*+|\#{2,}|\\\*|[#@](?!\d)\w+)",
            r"(?P<dashes>--+)",
            rf"(?P<smiley>[:;=](?:[-o*'])?[()](?!{ALNUM}))",
            r"(?P<other>[^\s\U00010000-\U0010ffff])",
        ]
    ),
    re.IGNORECASE,
)


def coco_tokens(captions: Sequence[str]) -> list[list[str]]:
    """Tokenize captions, in the order in which COCO writes them into one file.

    A caption's last word is followed by the first of the next caption, as in that file: this decides whether a single
    letter keeps its full stop. A number joined to its fraction by a no-break space is one token.
    """
    captions_words = [_words(caption) for caption in captions]
    tokens, following = [], ""
    for words in reversed(captions_words):
        next_words = [*words[1:], following][: len(words)]
        pairs = zip(words, next_words, strict=True)
        tokens.append(
            [token for word, after in pairs for token in _tokens(word, after[:1].isdigit(), after in STARTERS)]
        )
        following = words[0] if words else following
    return tokens[::-1]


def _words(caption: str) -> list[str]:
    text = UNSEEN.sub("", BREAKS.sub(" ", caption))
    if "/" in text:
        text = MIXED.sub("\\1\u00a0\\2", text)
    return [word for word in SPACES.split(text) if word]


@lru_cache(maxsize=200_000)
def _tokens(word: str, before_digit: bool, before_sentence: bool) -> tuple[str, ...]:
    """Return the tokens of a word, the text between two spaces.

    Args:
        before_digit, before_sentence: the next word begins with a digit, or begins a sentence.
    """
    tokens: list[str] = []
    for match in TOKEN.finditer(word):
        last = match.end() == len(word)
        tokens += _normalize(
            match.lastgroup or "", match[0].lower(), before_digit or not last, before_sentence and last
        )
    return tuple(token for token in tokens if token not in DROPPED)


def _normalize(kind: str, text: str, before_digit: bool, before_sentence: bool) -> Sequence[str]:
    """Return a piece of a word as the Treebank writes it."""
    if kind == "word" and text in SPLIT_WORDS:
        return text[:3], text[3:]
    if kind in ("apostrophe", "word"):
        return (text.replace("\u2019", "'"),)
    if kind == "tis":
        return "'t", text[2:]
    if (kind == "number_of" and not before_digit) or (kind == "letter" and before_sentence):
        return text[:-1], "."
    if kind in ("dots", "dashes"):
        return ()  # COCO drops them in any case.
    if kind == "smiley":
        return (text[:-1] + BRACKETS[text[-1]],)
    return (ENTITIES[text],) if kind == "entity" else (WRITTEN.get(text, text),)
