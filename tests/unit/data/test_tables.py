"""Tables as users have them: every dialect gives the same records, and what is cut off is refused."""

import csv
import io
import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.data.prep.tables import BadLine, cell_values, read_records
from vlkit.errors import DataError

ROWS = [
    {"image": "a b.jpg", "caption": 'said "so",\nin two lines'},
    {"image": "سیب.jpg", "caption": "naïve; 50 % | more\ttabs"},
    {"image": "c.jpg", "caption": ""},
]


def as_csv(delimiter=",", end="\n"):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["image", "caption"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


DIALECTS = {
    "plain.csv": as_csv().encode(),
    "bom.csv": as_csv().encode("utf-8-sig"),
    "crlf.csv": as_csv(end="\r\n").encode(),
    "mixed.csv": as_csv(end="\r\n").replace("\r\n", "\n", 2).encode(),
    "semicolons.csv": as_csv(";").encode(),
    "tabs.tsv": as_csv("\t").encode(),
    "tabs.csv": as_csv("\t").encode(),
    "utf16.tsv": as_csv("\t").encode("utf-16"),
    "blank lines.csv": ("\n\n" + as_csv() + "\n\n").encode(),
    "lines.jsonl": "\n".join(json.dumps(row) for row in ROWS).encode(),
    "crlf.jsonl": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode("utf-8-sig"),
    "list.json": json.dumps(ROWS).encode(),
    "lines in a.json": "\n".join(json.dumps(row) for row in ROWS).encode(),
}


@pytest.mark.parametrize("name", [*DIALECTS, "table.parquet"])
def test_every_dialect_gives_the_same_records(name, tmp_path):
    path = tmp_path / name
    if name == "table.parquet":
        pd.DataFrame(ROWS).to_parquet(path)
    else:
        path.write_bytes(DIALECTS[name])
    assert [record for _, record in read_records(path)] == ROWS


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=9),
            min_size=2,
            max_size=2,
        ),
        max_size=6,
    )
)
def test_whatever_csv_writes_is_read_back(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(("one", "two"))
        writer.writerows(cells)
    expected = [dict(zip(("one", "two"), row, strict=True)) for row in cells if any(cell.strip() for cell in row)]
    assert [record for _, record in read_records(path)] == expected


def test_a_file_that_ends_inside_a_quote_is_refused_with_the_row(tmp_path):
    (tmp_path / "cut.csv").write_text('image,caption\na.jpg,fine\nb.jpg,"begins here\nc.jpg,and swallows\n', newline="")
    with pytest.raises(DataError, match=r"cut\.csv, line 3: a quote that opens in this row is never closed"):
        list(read_records(tmp_path / "cut.csv"))
    (tmp_path / "stray.csv").write_text('image,caption\na.jpg,"x"y\n')
    with pytest.raises(DataError, match=r"stray\.csv, line 2") as caught:
        list(read_records(tmp_path / "stray.csv"))
    assert "doubled" in caught.value.hint


def test_what_is_no_text_is_refused_with_the_line(tmp_path):
    (tmp_path / "latin.csv").write_bytes("image,caption\na.jpg,ok\nb.jpg,crème\n".encode("latin1"))
    with pytest.raises(DataError, match="line 3: not UTF-8") as caught:
        list(read_records(tmp_path / "latin.csv"))
    assert "iconv" in caught.value.hint


def test_lines_that_are_no_records_do_not_stop_the_rest(tmp_path):
    (tmp_path / "x.csv").write_text("image,caption\na.jpg\nb.jpg,fine\nc.jpg,too,many\n")
    actual = list(read_records(tmp_path / "x.csv"))
    assert [where for where, _ in actual] == ["x.csv:2", "x.csv:3", "x.csv:4"]
    assert isinstance(actual[0][1], BadLine) and "cut off" in actual[0][1].reason
    assert actual[1][1] == {"image": "b.jpg", "caption": "fine"}
    assert isinstance(actual[2][1], BadLine)
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{no\n[1]\n')
    kinds = [type(record) for _, record in read_records(tmp_path / "x.jsonl")]
    assert kinds == [dict, BadLine, BadLine]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"a,a\n1,2\n", b"a\0b,c\n1,2\n"])
def test_a_header_that_cannot_be_used_is_refused(content, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError):
        list(read_records(tmp_path / "x.csv"))


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("one", ["one"]),
        ("['a', \"b\"]", ["a", "b"]),
        ('["a", ["b", null]]', ["a", "b"]),
        ("[Vegan] soup", ["[Vegan] soup"]),
        ("[not, a list]", ["[not, a list]"]),
        ("[1, 2]", ["1", "2"]),
        (["x", None, "", float("nan"), 3.0], ["x", "3"]),
        ("#NAME?", []),
        ("nan", []),
        ("N/A", []),
        (None, []),
        (float("nan"), []),
        (7.0, ["7"]),
        ({"a": 1}, []),
    ],
)
def test_what_a_cell_holds(cell, expected):
    assert cell_values(cell) == expected
