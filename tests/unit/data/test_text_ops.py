"""Rules for texts, one by one and on anything; and what keeps their variants honest."""

import re

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlkit.config.data import TEXT_RULES, AugmentConfig, parse_synonyms
from vlkit.data import captions
from vlkit.data.augment.text_ops import RULES, TextRules
from vlkit.data.augment.text_variants import HELD_OUT, OTHER_GROUP, TextVariants
from vlkit.errors import UsageError

WORDS = {
    "synonyms": parse_synonyms(
        ("delicious = tasty, appetizing", "crispy = crunchy", "a photo of = an image of", "خوشمزه = لذیذ")
    ),
    "prefixes": ("Homemade", "Classic"),
    "suffixes": ("Recipe", "- Easy Recipe"),
    "leading": ("banana", "sweet potato"),
    "compounds": ("bread", "leaf"),
}


def variants(rule: str, text: str) -> list[str]:
    return list(TextRules((rule,), **WORDS).variants(text))


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        (
            "synonyms",
            "Delicious crispy tofu",
            ["Tasty crispy tofu", "Appetizing crispy tofu", "Delicious crunchy tofu"],
        ),
        ("synonyms", "a delicious pie", ["a tasty pie", "an appetizing pie"]),
        ("synonyms", "CRISPY tofu", ["CRUNCHY tofu"]),
        ("synonyms", "A photo of rice blast", ["An image of rice blast"]),
        ("synonyms", "undelicious and crispyness", []),
        ("synonyms", "کباب خوشمزه", ["کباب لذیذ"]),
        ("synonyms", "خوشمزه‌ترین کباب", []),
        ("add-prefix", "Banana Bread", ["Homemade Banana Bread", "Classic Banana Bread"]),
        ("add-prefix", "Homemade Bread", []),
        ("add-prefix", "A soup", []),
        ("add-prefix", "- Prep time 30 min", []),
        ("add-prefix", "This is a whole sentence of a soup.", []),
        ("add-prefix", "نان", []),
        ("remove-prefix", "Homemade Bread", ["Bread"]),
        ("remove-prefix", "homemade bread", ["bread"]),
        ("remove-prefix", "Homemade", []),
        ("add-suffix", "Lemon Tart", ["Lemon Tart Recipe", "Lemon Tart - Easy Recipe"]),
        ("add-suffix", "Lemon Tart recipe", []),
        ("reorder", "Banana French Toast", ["French Toast with Banana"]),
        ("reorder", "Sweet potato oven fries", ["oven fries with Sweet potato"]),
        ("reorder", "Banana Bread", []),
        ("reorder", "Banana French Toast with Honey", []),
        ("title-case", "lemon tart with BBQ sauce", ["Lemon Tart with BBQ Sauce"]),
        ("title-case", "LEMON TART", ["Lemon Tart"]),
        ("title-case", "(vegan) bacon-wrapped figs, McDonald's way", ["(Vegan) Bacon-Wrapped Figs, McDonald's Way"]),
        ("lower-case", "\u0130skender", []),
        ("upper-case", "Gr\u00fc\u00dfe", []),
        ("synonyms", "Crispy's crispy-fried crispy tofu", ["Crispy's crispy-fried crunchy tofu"]),
        ("add-prefix", "Best Home-made Pizza", []),
        ("add-prefix", "How to Make Pizza", []),
        ("add-prefix", "1. Lemon Tart", []),
        ("add-suffix", "Pizza Recipe (vegan)", []),
        ("add-suffix", "Turkey, smoked on a grill", []),
        ("add-suffix", "Pie: a story", []),
        ("add-suffix", "Is this pie good?", []),
        ("add-suffix", "Prep time 30 min -", []),
        ("add-suffix", "one two three four five six seven eight nine ten", None),
        ("add-suffix", "one two three four five six seven eight nine ten eleven", []),
        ("reorder", "Banana Nuts and Oats", []),
        ("reorder", "Banana & Oat Muffins", []),
        ("reorder", "Banana 'n' Oats", []),
        ("add-prefix", "Mom's Famous Chili", []),
        ("add-prefix", "No. 7 Burger", []),
        ("add-suffix", "Grandma Pie Recipes", []),
        ("remove-prefix", "Homemade - Easy Recipe", []),
        ("simplify", "No. 7 Burger", []),
        ("simplify", "(Vegan) Crispy Tofu", []),
        ("synonyms", "A DELICIOUS PIE", ["A TASTY PIE", "AN APPETIZING PIE"]),
        ("simplify", "1: Tart", ["Tart"]),
        ("remove-prefix", "Homemade Recipe", []),
        ("reorder", "Banana Free Carbonara", []),
        ("reorder", "Banana or Cherry Pie", []),
        ("reorder", "Banana Bread Pudding", []),
        ("simplify", "Beef [Wellington]", []),
        ("simplify", "Dough (do not knead!) rests for two hours, then it is baked until brown.", []),
        (
            "simplify",
            "It rests, and is then baked in a very hot oven (200 C).",
            ["It rests, and is then baked in a very hot oven."],
        ),
        ("lower-case", "Lemon Tart", ["lemon tart"]),
        ("upper-case", "Lemon Tart", ["LEMON TART"]),
        ("upper-case", "نان سنگک", []),
        ("simplify", "1. Lemon Tart (vegan)", ["Lemon Tart"]),
        ("simplify", "Lemon Tart #3", ["Lemon Tart"]),
        ("simplify", "Tart No. 2", ["Tart"]),
        ("simplify", "Chicken 65", []),
        ("simplify", "7 Up cake", []),
        ("simplify", "(vegan)", []),
        ("simplify", "کباب (ساده)", ["کباب"]),
    ],
)
def test_what_a_rule_makes_of_a_text(rule, text, expected):
    assert variants(rule, text) == (expected or []) or (expected is None and len(variants(rule, text)) == 2)


def test_every_word_list_reaches_the_rules():
    lists = {"prefixes": ("A",), "suffixes": ("B",), "leading": ("c",), "compounds": ("d",)}
    rules = TextRules.from_config(AugmentConfig(**lists, synonyms=("e = f",), text_rules=("simplify",)))
    assert {name: getattr(rules, name) for name in lists} == lists
    assert (rules.synonyms, rules.enabled) == ({"e": ["f"]}, ("simplify",))


def test_a_rule_that_is_off_says_nothing():
    rules = TextRules(("simplify",), **WORDS)
    assert rules.variants("Banana French Toast") == {}
    assert set(RULES) == set(TEXT_RULES)


@pytest.mark.parametrize("line", ["delicious", "= tasty", "delicious =", "delicious = , "])
def test_a_synonym_that_says_nothing_is_refused(line):
    with pytest.raises(UsageError, match="crispy = crunchy"):
        AugmentConfig(synonyms=(line,))


pieces = st.sampled_from(
    [
        *"abAZßİǆ()[]#.,:-\u2013\u200c12é ",
        "delicious ",
        "crispy ",
        "Homemade ",
        " Recipe",
        "banana ",
        "خوشمزه ",
        "no. 3",
    ]
)
texts = st.lists(pieces, max_size=14).map(lambda parts: captions.clean("".join(parts)))


@settings(max_examples=400, deadline=None)
@given(texts | st.text(max_size=40).map(captions.clean))
@example("-_")
def test_no_rule_gives_an_empty_an_unclean_or_the_same_text(text):
    for variant, rule in TextRules(TEXT_RULES, **WORDS).variants(text).items():
        assert any(letter.isalnum() for letter in variant)
        assert variant != text
        assert captions.clean(variant) == variant
        assert rule in RULES


@settings(max_examples=400, deadline=None)
@given(texts | st.text(max_size=40).map(captions.clean), st.sampled_from(["title-case", "lower-case", "upper-case"]))
@example("0A b", "title-case")
@example("BBQ b", "title-case")
@example("BBQ BLT b", "title-case")
def test_case_rules_change_nothing_the_second_time(text, rule):
    for variant in variants(rule, text):
        assert variants(rule, variant) == []


@settings(max_examples=200, deadline=None)
@given(st.text("ابپتخوشمزهلذیذ ()1۲\u200c", max_size=30).map(captions.clean))
def test_persian_texts_pass_through_synonyms_and_simplification_only(text):
    assert set(TextRules(TEXT_RULES, **WORDS).variants(text).values()) <= {"synonyms", "simplify"}


TITLES = """Tart;tart;TART;Homemade Tart;Classic Tart;Tart Recipe;Tart (vegan);Pie;Pie (a);Pie (b);delicious pie
tasty pie;Banana Rye Bread;Rye Bread with Banana;crispy tofu;crunchy tofu"""
groups_of_rows = st.sets(st.sampled_from("abc"), min_size=1, max_size=2)
row = st.tuples(st.sampled_from(re.split("[;\n]", TITLES)), groups_of_rows, st.sampled_from(["train", "val", "test"]))
table = st.lists(row, min_size=1, max_size=10)


@settings(max_examples=300, deadline=None)
@given(table, st.integers(1, 3))
def test_no_variant_belongs_to_two_groups_or_is_held_out(rows, expected):
    """Against every other text, one by one."""
    frame = pd.DataFrame(rows, columns=["text", "text_group", "split"])
    frame["text_group"] = [sorted(groups) for groups in frame["text_group"]]
    frame["text_id"] = frame["text"]
    words = {**WORDS, "synonyms": ("delicious = tasty", "crispy = crunchy")}
    actual = TextVariants(frame, AugmentConfig(texts=expected, text_rules=TEXT_RULES, **words))
    training = [(text, groups) for text, groups, split in rows if split == "train"]
    own = {text: set().union(*(groups for other, groups in training if other == text)) for text, _ in training}
    assert actual.by_text.keys() == own.keys()
    messages = [(variant, text) for text, of in actual.by_text.items() for variant in of]
    for variant, text in messages:
        for other, groups, split in rows:
            if other.casefold() == variant.casefold():
                assert groups <= own[text], (variant, other)
                assert split == "train" or (other != variant and other.casefold() == text.casefold())
        for again, source in messages:
            if again.casefold() == variant.casefold():
                assert own[source] == own[text]


def test_what_was_left_out_is_counted():
    frame = pd.DataFrame(
        [("Pie (vegan)", "a", "train"), ("Pie", "b", "train"), ("Tart (plain)", "c", "train"), ("Tart", "d", "test")],
        columns=["text", "text_group", "split"],
    )
    frame["text_id"] = frame["text"]
    actual = TextVariants(frame, AugmentConfig(text_rules=("simplify",)))
    assert not any(actual.by_text.values())
    assert actual.dropped == {OTHER_GROUP: 1, HELD_OUT: 1}


def test_a_phrasing_that_differs_in_case_alone_from_its_own_text_is_no_leak():
    """A class' caption stands in all splits; the same in other letters says no more than it."""
    rows = [("Tart", "a", "train"), ("TART", "a", "val"), ("Pie", "b", "train"), ("pie", "b", "test")]
    frame = pd.DataFrame(rows, columns=["text", "text_group", "split"])
    frame["text_id"] = frame["text"]
    actual = TextVariants(frame, AugmentConfig(text_rules=("lower-case",)))
    assert {text: list(of) for text, of in actual.by_text.items()} == {"Tart": ["tart"], "Pie": []}


def test_two_groups_that_would_say_the_same_both_do_not():
    rows = [("Nevus (benign)", "a", "train"), ("Nevus (malignant)", "b", "train")]
    for order in (rows, rows[::-1]):
        frame = pd.DataFrame(order, columns=["text", "text_group", "split"])
        frame["text_id"] = frame["text"]
        actual = TextVariants(frame, AugmentConfig(text_rules=("simplify",)))
        assert not any(actual.by_text.values()) and actual.dropped == {OTHER_GROUP: 2}


def test_another_seed_chooses_other_phrasings():
    frame = pd.DataFrame([("Tart", "a", "train")], columns=["text", "text_group", "split"])
    frame["text_id"] = frame["text"]
    words = {**WORDS, "synonyms": (), "prefixes": ("Big", "Fine", "Good", "New", "Old", "Hot")}
    actual = [TextVariants(frame, AugmentConfig(seed=seed, **words)).for_pair("p", "Tart") for seed in (1, 1, 2)]
    assert actual[0] == actual[1] != actual[2]


def test_a_text_of_several_groups_has_the_same_variants_in_every_row():
    """Else a variant would belong to one of the groups, and be pushed away from pictures of the other."""
    rows = [("Tart", group, "train") for group in "abcdef"] + [("Pie", "g", "train")] * 6
    frame = pd.DataFrame(rows, columns=["text", "text_group", "split"])
    frame["text_id"] = frame["text"]
    actual = TextVariants(frame, AugmentConfig(text_rules=("add-prefix", "add-suffix"), **{**WORDS, "synonyms": ()}))
    assert len({tuple(actual.for_pair(str(row), "Tart")) for row in range(30)}) == 1
    assert len({tuple(actual.for_pair(str(row), "Pie")) for row in range(30)}) == 4
