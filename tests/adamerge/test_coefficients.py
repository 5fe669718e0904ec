"""The file of learned coefficients: it reads back exactly, a person can read it, and other files are refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamerge import CoefficientTable, InputError, read_coefficients, write_coefficients

TABLE = CoefficientTable(
    {"blocks.0.weight": {"digits": 0.1 + 0.2, "signs": -1e-310}, "s": {"digits": 1 / 3, "signs": 12345678.9}},
    {"base": "ab" * 32, "digits": "cd" * 32, "signs": "ef" * 32},
)


def test_a_table_reads_back_exactly(tmp_path):
    write_coefficients(TABLE, tmp_path / "new folder" / "coefficients.json")
    assert read_coefficients(tmp_path / "new folder" / "coefficients.json") == TABLE


names = st.text(min_size=1)
tables = st.lists(names, min_size=1, max_size=3, unique=True).flatmap(
    lambda tasks: st.dictionaries(
        names, st.fixed_dictionaries(dict.fromkeys(tasks, st.floats(allow_nan=False, allow_infinity=False))), min_size=1
    )
)


@given(rows=tables, fingerprints=st.dictionaries(names, st.text()))
def test_any_names_and_numbers_read_back_exactly(tmp_path_factory, rows, fingerprints):
    path = tmp_path_factory.mktemp("tables") / "c.json"
    write_coefficients(CoefficientTable(rows, fingerprints), str(path))
    table = read_coefficients(str(path))
    assert table == CoefficientTable(rows, fingerprints)
    assert list(table.rows) == list(rows)
    assert table.tasks == tuple(next(iter(rows.values())))


def test_the_file_has_one_line_a_tensor(tmp_path):
    write_coefficients(TABLE, tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    assert '"s": {"digits": 0.3333333333333333, "signs": 12345678.9}' in text.splitlines()[-2]
    assert json.loads(text)["format"] == "adamerge-coefficients-1"


def test_writing_leaves_nothing_else(tmp_path):
    write_coefficients(TABLE, tmp_path / "c.json")
    write_coefficients(TABLE, tmp_path / "c.json")
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_a_row_in_the_order_of_the_tasks():
    assert TABLE.tasks == ("digits", "signs")
    assert TABLE.tensor("s", ("signs", "digits")).tolist() == [12345678.9, 1 / 3]


def test_columns_read_back_exactly(tmp_path):
    table = CoefficientTable({"w": {"a": [0.1 + 0.2, 1 / 3], "b": [1e-310, -2.0]}, "v": {"a": 1.0, "b": 2.0}})
    write_coefficients(table, tmp_path / "c.json")
    again = read_coefficients(tmp_path / "c.json")
    assert again == table
    assert again.tensor("w", ("b", "a")).tolist() == [[1e-310, 0.1 + 0.2], [-2.0, 1 / 3]]


def test_rows_may_name_the_tasks_in_any_order():
    table = CoefficientTable({"w": {"a": 1.0, "b": 2.0}, "v": {"b": 4.0, "a": 3.0}})
    assert table.tensor("v", table.tasks).tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "at least one tensor"),
        ({"w": {"a": 1.0}, "v": {"b": 1.0}}, r"coefficients of v are for tasks \['b'\], those before: \['a'\]"),
        ({"w": {"a": 1.0, "b": 2.0}, "v": {"a": 1.0}}, r"coefficients of v are for tasks \['a'\]"),
        ({"w": {"a": float("nan")}}, "coefficients of w are not all finite"),
        ({"w": {"a": float("inf")}}, "coefficients of w are not all finite"),
        ({"w": {"a": [0.1, float("nan")]}}, "coefficients of w are not all finite"),
        ({"w": {"a": []}}, "coefficients of w are not all finite"),
        ({"w": {"a": [0.1, 0.2], "b": [0.1]}}, "coefficients of w differ in their number of columns"),
        ({"w": {"a": [0.1], "b": 0.1}}, "coefficients of w differ in their number of columns"),
    ],
    ids=["empty", "other task", "missing task", "nan", "infinite", "nan column", "no column", "columns", "a number"],
)
def test_a_table_that_does_not_hold_together_is_refused(rows, message):
    with pytest.raises(InputError, match=message):
        CoefficientTable(rows)


HEAD = '"format": "adamerge-coefficients-1", "fingerprints": {}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "weights",
        "[]",
        '{"coefficients": {}}',
        '{"format": "adamerge-coefficients-1"}',
        f"{{{HEAD}}}",
        f'{{{HEAD}, "coefficients": {{}}}}',
        f'{{{HEAD}, "coefficients": {{"w": [0.3]}}}}',
        f'{{{HEAD}, "coefficients": {{"w": {{"a": "much"}}}}}}',
        f'{{{HEAD}, "coefficients": {{"w": {{"a": NaN}}}}}}',
        f'{{{HEAD}, "coefficients": {{"w": {{"a": 0.',
    ],
)
def test_another_file_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=r"c\.json( is not a file of|: a table of|:) coefficients"):
        read_coefficients(tmp_path / "c.json")


def test_another_format_is_named(tmp_path):
    (tmp_path / "c.json").write_text('{"format": "other-2", "fingerprints": {}, "coefficients": {"w": {"a": 1}}}')
    with pytest.raises(InputError, match="format 'other-2', expected 'adamerge-coefficients-1'"):
        read_coefficients(tmp_path / "c.json")


def test_bytes_and_folders_are_no_coefficients(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00PK")
    for path in (tmp_path / "c.json", tmp_path):
        with pytest.raises(InputError, match="is not a file of coefficients"):
            read_coefficients(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no such file of coefficients: .*none\.json"):
        read_coefficients(tmp_path / "none.json")
