"""Rows of published files: what is wrong with one is named with its file and place."""

import re

import hypothesis
import pytest
from hypothesis import strategies as st

from qwen_jax.evaluation.rows import Row, csv_rows, first_rows, json_items, json_rows, labels
from qwen_jax.evaluation.subjects import Subjects
from tests.evaluation.published import write_csv

ROW = Row("file:3", {"text": "a", "blank": " ", "count": 2, "truth": True, "texts": ["a", "b"], "one": {"x": "y"}})


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: ROW.text("name"), r"file:3: expected a field 'name', found text, blank, count, truth, texts, one"),
        (lambda: ROW.text("count"), r"file:3: expected 'count' of type str, found 2"),
        (lambda: ROW.text("blank"), r"file:3: expected text in 'blank', found none"),
        (lambda: ROW.get("truth", int), r"file:3: expected 'truth' of type int, found True"),
        (lambda: ROW.texts("texts", 4), r"file:3: expected 4 texts in 'texts', found \['a', 'b'\]"),
        (lambda: ROW.one_of("text", "ABCD"), r"file:3: expected 'text' to be one of A, B, C, D, found 'a'"),
        (lambda: ROW.one_of("count", (True, 1)), r"found 2"),
        (lambda: ROW.one_of("truth", (0, 1)), r"found True"),
        (lambda: ROW.row("one").text("z"), r"file:3: expected a field 'z', found x"),
        (lambda: ROW.row("text"), r"file:3: expected 'text' of type dict, found 'a'"),
    ],
    ids=range(10),
)
def test_a_field_that_is_not_as_expected(read, message):
    with pytest.raises(ValueError, match=message):
        read()


def test_letters_are_one_of_and_not_part_of():
    with pytest.raises(ValueError, match="found 'AB'"):
        Row("f:1", {"answer": "AB"}).one_of("answer", "ABCD")


@hypothesis.given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r")), min_size=2, max_size=2), min_size=1
    )
)
def test_what_a_csv_writer_wrote_is_read_back(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("csv") / "rows.csv"
    write_csv(file, [["a", "b"], *rows])
    assert [[row.fields["a"], row.fields["b"]] for row in csv_rows(file, ("b", "a"))] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a,b\n1,2\n3\n", r"row 3: expected 2 columns, found 1"),
        (b"a,c\n1,2\n", r"row 1: no column b; expected a, b"),
        (b'a,b\n1,"2\n', r"row 2: .*is the file cut\?"),
        (b"a,b\n", r"has no rows: is it cut\?"),
        (b"", r"has no rows"),
        (b"a,b\n1,\xff\n", r"not UTF-8"),
    ],
    ids=range(6),
)
def test_a_csv_file_that_is_not_as_published(tmp_path, text, message):
    file = tmp_path / "rows.csv"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        list(csv_rows(file, ("a", "b")))


def test_json_rows_and_items(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: expected a JSON object, found \[2\]"):
        list(json_rows(file))
    whole = tmp_path / "whole.json"
    whole.write_text('{"rows": [{"a": 1}, 2]}')
    with pytest.raises(ValueError, match=r"whole.json: item 1: expected an object, found 2"):
        list(json_items(whole, "rows"))
    with pytest.raises(ValueError, match=r"whole.json: expected an object with a list 'examples'"):
        list(json_items(whole, "examples"))
    whole.write_text('{"rows": [{"a"')
    with pytest.raises(ValueError, match=r"whole.json: not JSON: .*is the file cut\?"):
        list(json_items(whole, "rows"))


def test_labels_stand_one_a_line_for_each_row(tmp_path):
    file, rows = tmp_path / "dev-labels.lst", [ROW] * 3
    file.write_text("1\n2\r\n1")
    assert labels(file, rows, ("1", "2")) == ["1", "2", "1"]
    file.write_text("1\n2\n")
    with pytest.raises(ValueError, match=r"2 labels for 3 rows beside it: is one of the files cut\?"):
        labels(file, rows, ("1", "2"))
    file.write_text("1\n\n1\n")
    with pytest.raises(ValueError, match=r"dev-labels.lst:2: expected one of 1, 2, found ''"):
        labels(file, rows, ("1", "2"))


def test_fewer_solved_examples_than_shots(tmp_path):
    with pytest.raises(ValueError, match=r"dev.csv: 1 rows, but 5 solved examples are needed: is the file cut\?"):
        first_rows(tmp_path / "dev.csv", [ROW], 5)


@pytest.fixture
def subjects(tmp_path):
    """A set with the files of two of three subjects."""
    for subject in ("law", "logic"):
        write_csv(tmp_path / "dev" / f"{subject}_dev.csv", [["a"], ["1"], ["2"]])
        write_csv(tmp_path / "test" / f"{subject}_test.csv", [["a"], ["3"]])
    found = Subjects("dev/{}_dev.csv", "test/{}_test.csv", ["art", "law", "logic"], lambda file: csv_rows(file, ("a",)))
    return found, tmp_path


def test_subjects_are_read_by_name_and_those_without_files_left_out(subjects):
    found, folder = subjects
    assert [(name, len(shots), len(rows)) for name, shots, rows in found.read(folder, 2)] == [
        ("law", 2, 1),
        ("logic", 2, 1),
    ]
    assert [(one.where, one.reason) for one in found.missing(folder)] == [
        (str(folder / "test/art_test.csv"), "no files of this subject")
    ]


@pytest.mark.parametrize("gone", ["dev/law_dev.csv", "test/logic_test.csv"])
def test_a_subject_with_one_file_of_two_is_an_error(subjects, gone):
    found, folder = subjects
    (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"{gone}: no such file, beside"):
        list(found.read(folder, 2))


def test_a_folder_without_any_subject_is_an_error(subjects):
    found, folder = subjects
    with pytest.raises(FileNotFoundError, match=r"no file of any subject; expected dev/SUBJECT_dev.csv and test/SUB"):
        list(found.read(folder / "dev", 2))
