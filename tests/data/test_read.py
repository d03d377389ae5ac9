"""Sources, forms and columns of records, and what is said of bad ones."""

import gzip
import json

import pytest

from dpo_eqx import data

PAIR = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
SAID = [{"role": "user", "content": "Why?"}]
ANSWER = [{"role": "assistant", "content": "So."}]


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def sources(tmp_path):
    """One set of records in every kind of source."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [PAIR | {"chosen": f" So {i}.\u2028\x85"} for i in range(5)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    plain = write(tmp_path / "plain.jsonl", *lines[:2], "", *lines[2:])
    with gzip.open(tmp_path / "packed.jsonl.gz", "wb") as file:
        file.write(plain.read_bytes())
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "table.parquet")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=datasets.Dataset.from_list(records)).save_to_disk(tmp_path / "dict")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "b.jsonl", *lines[2:])
    write(folder / "a.jsonl", *lines[:2])
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    paths = [plain, tmp_path / "packed.jsonl.gz", tmp_path / "table.parquet", marked]
    paths += [tmp_path / "saved", tmp_path / "dict", folder, str(plain)]
    return records, [*paths, records, datasets.Dataset.from_list(records), tuple(records)]


def test_every_source_gives_the_same_records(sources):
    records, given = sources
    for source in given:
        got = data.read(source)
        assert list(got) == list(got) == records
        assert got.form.name == "explicit prompt"


def test_a_generator_is_read_once():
    records = data.read(PAIR for _ in range(3))
    assert records.form.name == "explicit prompt"
    assert list(records) == [PAIR] * 3
    with pytest.raises(ValueError, match="can be read only once and has been"):
        list(records)


UNPAIRED = {"prompt": "Why?", "completion": " So.", "label": True}
IDS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}
FORMS = [
    (PAIR, "explicit prompt, text: `prompt`, `chosen`, `rejected`"),
    ({"chosen": "a", "rejected": "b"}, "implicit prompt, text: `chosen`, `rejected`"),
    ({"prompt": SAID, "chosen": ANSWER, "rejected": ANSWER}, "explicit prompt, conversations: "),
    # UltraFeedback: the prompt is there as text, and in both conversations.
    (
        {"prompt": "Why?", "chosen": SAID + ANSWER, "rejected": SAID + ANSWER, "score": 1},
        "implicit prompt, conversations: `chosen`, `rejected`; not used: `prompt`, `score`",
    ),
    (UNPAIRED, "unpaired, text: `prompt`, `completion`, `label`"),
    (IDS | {"prompt": "text"}, "token ids: `prompt_ids`, `chosen_ids`, `rejected_ids`; not used: "),
    ({"prompt_ids": [1], "completion_ids": [2], "label": 0}, "unpaired token ids: `prompt_ids`"),
    (
        PAIR | {"weight": 2, "beta": 0.5, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
        "with `weight`, `beta`, `reference_chosen`, `reference_rejected`",
    ),
]


@pytest.mark.parametrize(("record", "said"), FORMS)
def test_the_form_is_recognised_and_said(record, said, caplog):
    with caplog.at_level("INFO", logger="dpo_eqx.data"):
        records = data.read([record])
        assert said in str(records)
    assert said in caplog.text
    assert len(list(records)) == 1


@pytest.mark.parametrize(
    "columns",
    [{"prompt": "question", "weight": None}, {"question": "prompt"}],
)
def test_columns_map_names(columns):
    record = {"question": "Why?", "chosen": " So.", "rejected": " No.", "weight": 1.0}
    (got,) = data.read([record], columns=columns)
    assert got == PAIR | ({} if "weight" in columns else {"weight": 1.0})


def test_columns_can_swap():
    (got,) = data.read([PAIR], columns={"chosen": "rejected", "rejected": "chosen"})
    assert (got["chosen"], got["rejected"]) == (" No.", " So.")


GOOD = json.dumps(PAIR)
LINES = [
    ('{"prompt": "a" "chosen"', r"line 2 of .*bad.jsonl, column 16: .*found '\"chosen\"'"),
    ('{"prompt": ', "column 12: .*found the end of the line"),
    ("[1, 2]", r"column 1: must be a JSON object .*found \[1, 2\] \(list\)"),
    ('{"prompt": "a", "prompt": "b"}', "The name `prompt` is given twice"),
    ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ('{"a": ' + "[" * 100_000, "cannot be read as JSON"),
    (
        json.dumps({"prompt": "a", "chosen": "b"}),
        "`rejected` is missing in line 2 of .*found: `pro",
    ),
    (json.dumps(PAIR | {"chosen": None}), "`chosen` is null in line 2 .* Repair this record"),
    (json.dumps(PAIR | {"chosen": 3}), r"`chosen` in line 2 of .* must be text; got 3 \(int\)"),
    (json.dumps(PAIR | {"chosen": ANSWER}), r"`chosen` in line 2 of .* must be text; got \["),
    (json.dumps(PAIR | {"chosen": "\ud800"}), "lone surrogate '.ud800'"),
    (json.dumps(PAIR | {"weight": 1}), "`weight` is in line 2 of .* but not in the first record"),
]


@pytest.mark.parametrize(("line", "match"), LINES)
def test_a_bad_line_is_named(line, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        list(data.read(write(tmp_path / "bad.jsonl", GOOD, line)))


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes('{"prompt": "ä'.encode() + b'\xff"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*, column 14: must be UTF-8; found b'\\xff'"):
        list(data.read(path))


RECORDS = [
    (
        {"prompt": "a", "chosen": "b"},
        "nearest is `explicit prompt`.*missing: `rejected`; found: `p",
    ),
    ({}, "must have the columns of one form: .*; found: none"),
    ({"info": "a", "summaries": ["b", "c"]}, "one form: .*; found: `info`, `summaries`"),
    ({"prompt_ids": [1], "chosen_ids": [2]}, "nearest is `token ids`.*missing: `rejected_ids`"),
    (PAIR | {"weight": -1}, "`weight` in record 0 .* must not be negative; got -1"),
    (PAIR | {"weight": float("nan")}, "`weight` .* must be a finite number; got nan"),
    (PAIR | {"weight": 10**400}, "`weight` .* must be a finite number; got 1000"),
    (PAIR | {"weight": "heavy"}, r"`weight` .* must be a finite number; got 'heavy' \(str\)"),
    (PAIR | {"beta": 0}, "`beta` .* must be positive; got 0"),
    (UNPAIRED | {"label": "yes"}, "`label` .* must be true .* or false; got 'yes'"),
    (UNPAIRED | {"label": 2}, "`label` .* must be true .* or false; got 2"),
    (IDS | {"chosen_ids": [1, -1]}, "`chosen_ids` .* must hold token ids .* got -1"),
    (IDS | {"chosen_ids": [True]}, "`chosen_ids` .* must be a list of integers"),
    ({"chosen": [{"content": "a"}], "rejected": ANSWER}, "message 0 of `chosen` .* `role` of text"),
    ({"chosen": [{"role": "user"}], "rejected": ANSWER}, "must have a `content`"),
    ({"chosen": ANSWER, "rejected": "No."}, "`rejected` in record 0 .* must be a list of messages"),
    ("text", "record 0 .* must be a mapping of columns by name; got 'text'"),
]


@pytest.mark.parametrize(("record", "match"), RECORDS)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_record_is_named(record, match):
    with pytest.raises(ValueError, match=match):
        list(data.read([record]))


@pytest.mark.parametrize("make", [list, lambda: iter(())])
def test_nothing_to_read_is_an_error(make):
    with pytest.raises(ValueError, match="holds no records"):
        list(data.read(make()))


def test_broken_and_missing_files_are_named(tmp_path):
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"empty.jsonl holds no records"):
        list(data.read(empty))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(GOOD.encode() * 1000)[:-20])
    with pytest.raises(ValueError, match=r"cut.gz is broken after line"):
        list(data.read(tmp_path / "cut.gz"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match=r"cut.parquet cannot be read after row 0"):
        list(data.read(tmp_path / "cut.parquet"))
    with pytest.raises(FileNotFoundError, match=r"there is no `.*none.jsonl`"):
        data.read(str(tmp_path / "none.jsonl"))
    (tmp_path / "hollow").mkdir()
    with pytest.raises(FileNotFoundError, match="hollow` is neither"):
        data.read(tmp_path / "hollow")


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`columns` must map .*`nonsense` is not one of our"):
        data.read([PAIR], columns={"nonsense": "more"})
    with pytest.raises(ValueError, match="`columns` maps `prompt` to `question`, which record 0"):
        list(data.read([PAIR], columns={"prompt": "question"}))
    with pytest.raises(ValueError, match=r"must be a path, .*; got dict"):
        data.read(PAIR)


def test_the_nearest_form_is_named_only_if_it_is_near():
    with pytest.raises(ValueError, match=r"columns of one form: .*; found: `a`, `b`") as error:
        list(data.read([{"a": 1, "b": 2}]))
    assert "nearest" not in str(error.value)
    with pytest.raises(ValueError, match="The nearest is `implicit prompt`"):
        list(data.read([{"chosen": "x"}]))
