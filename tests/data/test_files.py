"""Formats of files: the same rows in every format give the same ids, and bad files are named."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from dpo_eqx import data

from .chat import chat_tokenizer

TEXTS = [
    {"prompt": 'Why, "so"?\n', "chosen": " 42", "rejected": "NA", "weight": 0.5},
    {"prompt": "Zwölf;\t水\u2028", "chosen": "", "rejected": "true\r\n", "weight": 2.0},
    {"prompt": "[{", "chosen": "2020-01-01", "rejected": '[{"a": 1}]', "weight": 1.0},
]
SAID = [{"role": "user", "content": "Why, 'so'?"}]
TURNS = [
    {
        "prompt": SAID,
        "chosen": [{"role": "assistant", "content": f'So "{i}".\n'}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for i in range(3)
]
IDS = [{"prompt_ids": [1, 2], "completion_ids": [3, i], "label": i == 1} for i in range(3)]


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def table(records):
    return pa.Table.from_pylist(records)


def arrow_bytes(records, make):
    sink = pa.BufferOutputStream()
    with make(sink, table(records).schema) as writer:
        writer.write_table(table(records), max_chunksize=2)
    return sink.getvalue().to_pybytes()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def separated(records, delimiter, written=json.dumps, newline="\n"):
    """As spreadsheets and pandas write it: cells of text, and of JSON or of Python."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=newline)
    writer.writerow(records[0])
    for record in records:
        writer.writerow(
            written(value) if isinstance(value, list) else value for value in record.values()
        )
    return text.getvalue().encode()


def parquet(records):
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table(records), sink)
    return sink.getvalue().to_pybytes()


def feather(records):
    sink = pa.BufferOutputStream()
    pa.feather.write_feather(table(records), sink)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "a list.json": lambda r: json.dumps(r, indent=2).encode(),
    "a list in one line.json": lambda r: b"\xef\xbb\xbf \n" + json.dumps(r).encode(),
    "a list.dat": lambda r: json.dumps(r, ensure_ascii=False).encode(),
    "a list.json.xz": lambda r: lzma.compress(json.dumps(r).encode()),
    "a.csv": lambda r: separated(r, ","),
    "python.csv": lambda r: separated(r, ",", str),
    "semicolons.csv": lambda r: b"\xef\xbb\xbf" + separated(r, ";", newline="\r\n"),
    "tabs.csv": lambda r: separated(r, "\t"),
    "a.tsv": lambda r: separated(r, "\t"),
    "a.CSV.gz": lambda r: gzip.compress(separated(r, ",")),
    "a.tsv.zst": lambda r: zstd(separated(r, "\t")),
    "a.arrow": lambda r: arrow_bytes(r, pa.ipc.new_file),
    "stream.arrow": lambda r: arrow_bytes(r, pa.ipc.new_stream),
    "stream.gz": lambda r: gzip.compress(arrow_bytes(r, pa.ipc.new_stream)),
    "a.feather": feather,
    "a.parquet": parquet,
    "a.parquet.bz2": lambda r: bz2.compress(parquet(r)),
    "a.jsonl.gz": lambda r: gzip.compress(lines(r)),
    "a.jsonl.bz2": lambda r: bz2.compress(lines(r[:1])) + bz2.compress(lines(r[1:])),
    "a.jsonl.xz": lambda r: lzma.compress(lines(r)),
    "a.jsonl.zst": lambda r: zstd(lines(r[:1])) + zstd(lines(r[1:])),
    "another name.csv": lines,
}


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_ids(name, tmp_path, tokenizer):
    for number, records in enumerate((TEXTS, TURNS, IDS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "want").write_bytes(lines(records))
        (folder / name).write_bytes(FORMATS[name](records))
        want, report = data.tokenize(data.read(folder / "want"), tokenizer)
        assert report.kept == 3
        assert data.tokenize(data.read(folder / name), tokenizer)[0] == want
        # The same as the one file of a folder, if its name is one of a data file.
        if not name.endswith(".dat"):
            assert data.tokenize(data.read(folder), tokenizer)[0] == want


def test_a_compressed_table_begins_with_spaces_and_long_cells(tmp_path):
    record = {"prompt": " " * 5000, "chosen": "x" * 200_000, "rejected": ""}
    (tmp_path / "a.csv").write_bytes(separated([record], ","))
    assert list(data.read(tmp_path / "a.csv")) == [record]


def cut(content):
    return content[: len(content) // 2]


BAD = {
    "utf-16.csv": ("prompt,chosen\n".encode("utf-16"), "must be UTF-8, and it is UTF-16.*`iconv"),
    "utf-16.jsonl": ('{"prompt": 1}'.encode("utf-16-le"), "is UTF-16"),
    "a list in utf-16.json": ('[{"prompt": 1}]'.encode("utf-16-be"), "is UTF-16"),
    "latin.csv": (
        b"prompt,chosen,rejected\na,b,c\nd,\xe4,f\n",
        r"line 3 of .*, column 3: must be UTF-8; found b'\\xe4'",
    ),
    "latin.json": (b'[{"prompt":\n"\xe4"}]', "line 2 of .*, column 2: must be UTF-8"),
    "short.csv": (b"prompt,chosen,rejected\na,b,c\nd,e\n", "line 3 of .* must have 3 cells.* 2"),
    "long.csv": (b"prompt,chosen,rejected\na,b,c,d\n", "line 2 of .* must have 3 cells.* found 4"),
    "twice.csv": (
        b"prompt,chosen,chosen\n",
        "must name each column once; `chosen` is twice in line 1",
    ),
    "quote.csv": (b'prompt,chosen,rejected\na,"b"b,c\n', "line 2 of .*cannot be read as a table"),
    "open.csv": (b'prompt,chosen,rejected\na,b,c\nd,"b,c\n', "line 3 .*cannot be read as a table"),
    "numpy.csv": (
        b"prompt,chosen,rejected\na,\"[{'role': 'user'} {'role': 'user'}]\",c\n",
        "`chosen` in line 2 of .* must be messages as JSON",
    ),
    "comma.json": (b'[{"chosen": "a", "rejected": "b"},\n]', "line 2 of .*, column 1: Expecting"),
    "no comma.json": (
        b'[{"chosen": "a", "rejected": "b"}\n{"chosen": "a", "rejected": "b"}]',
        r"line 2 of .*, column 1: Expecting ',' or '\]'; found '{\"chosen",
    ),
    "cut.json": (b'[{"chosen": "a", "rejected": "b"}', "Expecting ',' .*found the end"),
    "more.json": (b'[{"chosen": "a", "rejected": "b"}]\n[]', r"must end after its list; found '\["),
    "texts.json": (b'[{"chosen": "a", "rejected": "b"},\n\n"c"]', r"item 2 \(line 3\) of .*object"),
    "same name.json": (b'[{"chosen": "a", "chosen": "b"}]', "item 1 .*`chosen` is given twice"),
    "table.txt": (b"prompt,chosen,rejected\n", "The name of a table ends with `.csv`"),
    "a.zip": (b"PK\x03\x04....", "is a zip archive or an Excel workbook. Unpack it"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "cut.jsonl.xz": (cut(lzma.compress(lines(TEXTS * 99))), "is broken after line"),
    "cut.jsonl.bz2": (cut(bz2.compress(lines(TEXTS * 99))), "is broken after line"),
    "cut.jsonl.zst": (cut(zstd(lines(TEXTS * 99))), "is broken after line"),
    "cut.csv.gz": (cut(gzip.compress(separated(TEXTS * 99, ","))), "is broken after line"),
    "cut.json.gz": (cut(gzip.compress(json.dumps(TEXTS).encode())), "is broken after line"),
    "cut.arrow": (cut(arrow_bytes(TEXTS, pa.ipc.new_file)), "cannot be read after row 0"),
    "cut stream.arrow": (cut(arrow_bytes(TEXTS, pa.ipc.new_stream)), "cannot be read after row"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named(name, tmp_path):
    content, match = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        list(data.read(path))
    assert str(path) in str(error.value)


CELLS = [("weight", "heavy", "finite number"), ("weight", "", "finite number")]
CELLS += [("weight", "-1", "not be negative")]


@pytest.mark.parametrize(("column", "cell", "match"), CELLS)
def test_a_bad_cell_is_named(column, cell, match, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(separated([TEXTS[0] | {column: cell}], ","))
    with pytest.raises(ValueError, match=f"`{column}` in line 2 of .* must .*{match}"):
        list(data.read(path))
