"""Texts: cleaned once and for all, with what carries meaning kept."""

import html
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.data import captions

marked_up = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["<b>", "</b>", "<br/>", "&amp;", "&lt;", "&#233;", "<p class='x'>", "<!-- no -->", "a < b", "&"]
        ),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=30), marked_up), st.booleans())
def test_cleaning_twice_changes_nothing(text, persian):
    once = captions.clean(text, persian=persian)
    assert captions.clean(once, persian=persian) == once
    assert "  " not in once and once == once.strip()
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(c) == "Cc" for c in once)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab \u200c\u200d\u06cc", max_size=20))
def test_zero_width_joiners_stay(text):
    once = captions.clean(text, persian=True)
    assert once.count("\u200c") == text.count("\u200c")
    assert once.count("\u200d") == text.count("\u200d")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abc é<>&;1", max_size=20).map(lambda text: " ".join(text.split())))
def test_what_html_escapes_comes_back(text):
    """An independent escaper; then the text as a browser shows it."""
    escaped = html.escape(text)
    assert captions.clean(escaped) == captions.clean(text)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("<b>Bold</b> &amp; <i>brave</i>\u0000 soup", "Bold & brave soup"),
        ("line one<br>line two", "line one line two"),
        ("<style>p {}</style><p>Pasta</p><p>Bake</p><script>x()</script>", "Pasta Bake"),
        ("5 < 7 and 9 > 2 & so on", "5 < 7 and 9 > 2 & so on"),
        ("I <3 you", "I <3 you"),
        ("write to <joe@x.org> or use <unk>", "write to <joe@x.org> or use <unk>"),
        ("<b>write</b> to <joe@x.org> or </unk>", "write to <joe@x.org> or </unk>"),
        ("cafe\u0301", "café"),
        ("\ufeffsoup\t\n of  the\u00a0day ", "soup of the day"),
        ("&amp;lt;b&amp;gt;twice&amp;lt;/b&amp;gt;", "twice"),
        ("so\u00adft \u200bspace\u202e", "soft space"),
        (None, ""),
        (float("nan"), ""),
        (7, "7"),
    ],
)
def test_what_cleaning_does(raw, expected):
    assert captions.clean(raw) == expected


def test_persian_letters_are_unified_and_joiners_kept():
    arabic = "كيك مي\u200cخواهم"  # noqa: RUF001
    assert captions.clean(arabic, persian=True) == "کیک می\u200cخواهم"  # noqa: RUF001
    assert captions.clean(arabic) == arabic
    assert captions.clean("کـــباب", persian=True) == "کباب"


def test_class_names_become_words():
    assert captions.readable_class("Tomato___Early_blight") == "tomato early blight"
    assert captions.readable_class("rice/leafBlast") == "rice leaf blast"


def test_templates_are_filled_or_left_out():
    fields = {"condition": "acne", "description": ""}
    assert captions.fill_template("An image of {condition}.", fields) == "An image of acne."
    assert captions.fill_template("{condition}: {description}", fields) is None
    assert captions.fill_template("{condition}: {site}", fields) is None
    assert captions.fill_template("{condition} {0}", {**fields, "0": "{condition}"}) == "acne {condition}"


@pytest.mark.parametrize(
    "text", ["&lt;" * 5000 + "b>" * 5000, "&amp;" + "amp;" * 20000 + "lt;", "<!--" * 40000, "<" * 50000]
)
def test_markup_within_markup_comes_to_an_end(text):
    once = captions.clean(text)
    assert captions.clean(once) == once
