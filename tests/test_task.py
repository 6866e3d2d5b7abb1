"""Task files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.errors import NotFoundError, UsageError
from hubkit.task import Example, load_task


@pytest.fixture
def write(tmp_path):
    def give(text):
        path = tmp_path / "task.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return give


def test_reads_rows_in_order(write):
    path = write('{"input": "a", "output": "b", "split": "x"}\n\n{"input": "", "output": "y", "choices": ["x", "y"]}')
    assert load_task(path) == [Example("a", "b"), Example("", "y", ("x", "y"))]


@pytest.mark.parametrize("text", [b'\xef\xbb\xbf{"input": "a", "output": "b"}', '{"input": "a", "output": "b"}\r\n'])
def test_takes_what_editors_make_of_it(write, text):
    assert load_task(write(text)) == [Example("a", "b")]


def test_a_line_separator_inside_a_text_ends_no_line(write):
    row = {"input": "a\u2028b\x85c", "output": "d"}
    assert load_task(write(json.dumps(row, ensure_ascii=False))) == [Example("a\u2028b\x85c", "d")]


GOOD = '{"input": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "null",
        '{"input": "a"}',
        '{"output": "a"}',
        '{"input": 1, "output": "b"}',
        '{"input": "a", "output": " \\n"}',
        '{"input": "a", "output": "b", "choices": "b"}',
        '{"input": "a", "output": "b", "choices": []}',
        '{"input": "a", "output": "b", "choices": ["c"]}',
        '{"input": "a", "output": "b", "choices": ["b", 1]}',
        '{"input": "a", "output": "b", "choices": ["b", " "]}',
        '{"input": "\\ud800", "output": "b"}',
        '{"input": "a", "output": "b\\udc00"}',
        '{"input": "a", "output": "b", "choices": ["b", "\\ud800"]}',
        '{"input": "a", "output": "b", "n": ' + "1" * 5000 + "}",
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named(write, line):
    path = write(GOOD + line + "\n" + GOOD)
    with pytest.raises(UsageError) as caught:
        load_task(path)
    assert f"{path}:2" in caught.value.cause
    assert caught.value.remedy
    assert len(caught.value.cause) < 500


@pytest.mark.parametrize("text", ["", "\n \n", b"\xff\xfe{"])
def test_an_empty_file_or_one_that_is_no_text(write, text):
    with pytest.raises(UsageError, match=r"task\.jsonl"):
        load_task(write(text))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(NotFoundError, match="nothing"):
        load_task(tmp_path / "nothing.jsonl")
    with pytest.raises(UsageError):
        load_task(tmp_path)


text = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(deadline=None)
@given(st.lists(st.tuples(text, text.filter(str.strip)), min_size=1, max_size=5))
def test_what_json_writes_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("task") / "t.jsonl"
    path.write_text("\n".join(json.dumps({"input": i, "output": o}) for i, o in rows), encoding="utf-8")
    assert load_task(path) == [Example(i, o) for i, o in rows]
