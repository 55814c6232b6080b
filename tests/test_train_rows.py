"""Reading training data: what fits is read, and what does not is told with its line and what there is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon.errors import DataError
from surgeon.train.rows import Row, hold_out, read_rows

NAMES = ("negative", "positive")


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def problem(tmp_path, name, content, labels=NAMES, **columns):
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_rows(path, labels, **columns)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_csv_tsv_and_json_lines_say_the_same(tmp_path):
    rows = [Row('so, "good"\ntruly', 1), Row("bad", 0)]
    table = 'id,text,label\n1,"so, ""good""\ntruly",positive\n\n2,bad,negative\n'
    tabs = 'text\tlabel\n"so, ""good""\ntruly"\tpositive\nbad\tnegative\n'
    lines = "".join(json.dumps({"text": r.text, "label": NAMES[r.label]}) + "\n\n" for r in rows)
    assert read_rows(written(tmp_path, "a.csv", table), NAMES) == rows
    assert (
        read_rows(written(tmp_path, "a.csv", b"\xef\xbb\xbf" + table.replace("\n", "\r\n").encode()), NAMES)[1]
        == rows[1]
    )
    assert read_rows(written(tmp_path, "a.tsv", tabs), NAMES) == rows
    assert read_rows(written(tmp_path, "a.jsonl", lines), NAMES) == rows


def test_numbers_are_labels_where_the_task_has_a_count_only(tmp_path):
    assert read_rows(written(tmp_path, "a.csv", "text,label\na,2\n"), 3) == [Row("a", 2)]
    assert (
        read_rows(written(tmp_path, "a.jsonl", '{"text": "a", "label": 2}\n{"text": "b", "label": "1"}'), 3)[1].label
        == 1
    )
    assert problem(tmp_path, "a.csv", "text,label\na,1\n").startswith("a.csv:2: unknown label '1'")


@pytest.mark.parametrize("label", ["3", "-1", "1.0", "", "²", '"x"'])
def test_a_label_that_is_no_number_of_the_task_is_refused(tmp_path, label):
    assert "is no number from 0 to 2" in problem(tmp_path, "a.csv", f"text,label\na,{label}\n", 3)


@pytest.mark.parametrize("label", ["true", "1.0", "null", "[1]", '{"a": 1}', "NaN"])
def test_a_json_label_of_another_type_is_refused(tmp_path, label):
    line = f'{{"text": "a", "label": {label}}}'
    assert "is no number from 0 to 2" in problem(tmp_path, "a.jsonl", line, 3)
    assert "unknown label" in problem(tmp_path, "a.jsonl", line)


def test_a_missing_column_lists_the_columns_and_the_closest(tmp_path):
    told = "a.csv:1: there is no column 'label'\n  there is: text, labels\n  try: did you mean 'labels'?"
    assert problem(tmp_path, "a.csv", "text,labels\na,positive\n") == told
    assert problem(tmp_path, "a.jsonl", '\n{"text": "a", "labels": 1}').startswith(
        "a.jsonl:2: there is no column 'label'"
    )


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    assert "column 'text' is there twice" in problem(tmp_path, "a.csv", "text,text,label\na,b,positive\n")


def test_an_unknown_label_names_its_line_the_closest_and_how_many(tmp_path):
    content = 'text,label\n"two\nlines",positive\na,positve\nb,positve\n'
    assert problem(tmp_path, "a.csv", content) == (
        "a.csv:4: unknown label 'positve' (the first of 2 rows that do not fit)\n"
        "  there is: negative, positive\n  try: did you mean 'positive'?"
    )


def test_a_row_without_text_is_refused(tmp_path):
    assert problem(tmp_path, "a.csv", "text,label\n  ,positive\n") == "a.csv:2: column 'text' holds no text"
    assert problem(tmp_path, "a.jsonl", '{"text": 3, "label": "positive"}') == "a.jsonl:1: column 'text' holds no text"


def test_a_row_of_too_many_values_is_refused(tmp_path):
    assert problem(tmp_path, "a.csv", "text,label\na,b,positive\n").startswith(
        "a.csv:2: 3 values in a row of 2 columns"
    )


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    assert problem(tmp_path, "a.csv", content) == "a.csv: the file is empty"


def test_a_header_alone_has_no_rows(tmp_path):
    assert problem(tmp_path, "a.csv", "text,label\n") == "a.csv: there are no rows"


def test_text_that_is_not_utf8_names_byte_and_line(tmp_path):
    told = problem(tmp_path, "a.csv", "text,label\ncafé,positive\n".encode("latin-1"))
    assert told == "a.csv:2: the file is not UTF-8: byte 0xe9 in line 2\n  try: save it as UTF-8"


@pytest.mark.parametrize("line", ['{"text": "a"', "[1]", "positive", "[" * 10_000])
def test_a_malformed_json_line_names_its_line(tmp_path, line):
    told = problem(tmp_path, "a.jsonl", '{"text": "a", "label": "positive"}\n' + line)
    assert told.startswith("a.jsonl:2: ")
    assert "try: write one object a line" in told


def test_an_open_quote_is_told_where_it_begins(tmp_path):
    assert problem(tmp_path, "a.csv", 'text,label\n"a,positive\nb,negative\n').startswith("a.csv:2: malformed CSV")


def test_a_file_that_is_missing_or_of_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_rows(tmp_path / "none.csv", NAMES)
    assert "there is: .csv, .tsv, .jsonl" in problem(tmp_path, "a.xlsx", "x")


@given(st.binary(max_size=200), st.sampled_from([".csv", ".jsonl"]))
def test_no_bytes_make_the_reader_fail_with_another_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("rows") / f"a{suffix}"
    path.write_bytes(b"text,label\n" + content if suffix == ".csv" else content)
    try:
        assert all(row.text.strip() for row in read_rows(path, NAMES))
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome will do


def test_rows_held_out_are_not_trained_on():
    rows = [Row(str(i), 0) for i in range(20)]
    trained, held = hold_out(rows, 0.1)
    assert len(held) == 2
    assert sorted(trained + held) == sorted(rows)
    assert hold_out(rows, 0.1) == (trained, held)
    with pytest.raises(DataError, match="one row"):
        hold_out(rows[:1], 0.1)
