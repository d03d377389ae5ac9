"""Places in messages: the file and the line, counted from 1, or the number in an iterable."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_eqx import data

BYTES = data.ByteTokenizer()
GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
LONG = GOOD | {"prompt": "a" * 40}
ROWS = [GOOD, LONG, GOOD, LONG]


def written(folder, kind):
    """A file of the rows; the words for its first and second row, and for both long ones."""
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
        return path, f"line 1 of {path}", f"line 2 of {path}", f"lines 2, 4 of {path}"
    if kind == "json":
        path.write_text("[" + ",\n".join(json.dumps(row) for row in ROWS) + "]")
        places = [f"item {n} (line {n}) of {path}" for n in (1, 2, 4)]
        return path, *places[:2], ", ".join(places[1:])
    if kind == "csv":
        lines = ["prompt,chosen,rejected", *(",".join(row.values()) for row in ROWS)]
        path.write_text("\n".join(lines))
        return path, f"line 2 of {path}", f"line 3 of {path}", f"lines 3, 5 of {path}"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path, f"row 1 of {path}", f"row 2 of {path}", f"rows 2, 4 of {path}"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_messages_name_the_file_and_the_place_in_it(kind, tmp_path):
    path, first, second, both = written(tmp_path, kind)
    _, report = data.tokenize(path, BYTES, max_length=20)
    assert f"({both})" in str(report)
    for settings, words in [
        ({"max_length": 20, "strict": True}, f"and {second} would be: the prompt alone has"),
        ({"vocab_size": 257}, f"; {first} has 257."),
    ]:
        with pytest.raises(ValueError, match=r".") as error:
            data.tokenize(path, BYTES, **settings)
        assert words in str(error.value)


def test_records_of_an_iterable_are_counted_from_zero():
    _, report = data.tokenize(ROWS, BYTES, max_length=20)
    assert "(records 1, 3)" in str(report)
    with pytest.raises(ValueError, match="and record 1 of `path_or_iterable` would be"):
        data.tokenize(ROWS, BYTES, max_length=20, strict=True)


def test_places_of_several_files_are_all_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(LONG) + "\n" + json.dumps(GOOD))
    _, report = data.tokenize(tmp_path, BYTES, max_length=20)
    assert f"(line 1 of {tmp_path / 'a.jsonl'}, line 1 of {tmp_path / 'b.jsonl'})" in str(report)
    many = [LONG] * 9
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, many)))
    _, report = data.tokenize(tmp_path / "c.jsonl", BYTES, max_length=20, cache=tmp_path / "cache")
    assert f"(lines 1, 2, 3, 4, 5, ... of {tmp_path / 'c.jsonl'})" in str(report)
    assert report.examples == {"prompt_fills_max_length": [0, 1, 2, 3, 4]}
