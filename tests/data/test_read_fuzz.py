"""Readers on arbitrary input: an error that names the place, or every record, never less."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from dpo_eqx import data

RULES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
text = st.text(max_size=12)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
good = st.just(b'{"chosen": "yes", "rejected": "no"}') | st.sampled_from([b"", b" ", b"{}", b"\r"])
names = st.sampled_from(["prompt", "chosen", "rejected", "completion", "label", "weight", "x"])
names |= st.sampled_from(["prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "tools"])


def attempt(run):
    """What `run` returns, or the message of its `ValueError`: any other error is a crash."""
    try:
        return run(), ""
    except ValueError as error:
        return None, str(error)


@RULES
@given(st.lists(st.fixed_dictionaries({"prompt": text, "chosen": text, "rejected": text})))
def test_what_is_written_is_read(tmp_path, records):
    path = tmp_path / "records.jsonl"
    lines = [json.dumps(record, ensure_ascii=bool(i % 2)) for i, record in enumerate(records)]
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if len(records) % 2 else content)
    if not records:
        with pytest.raises(ValueError, match="holds no records"):
            list(data.read(path))
        return
    assert list(data.read(path)) == records
    rows, report = data.tokenize(data.read(path), data.ByteTokenizer(), max_length=12)
    assert report.read == len(records)
    assert report.kept == len(rows) == report.read - sum(report.dropped.values())


@RULES
@given(st.lists(good | st.binary(max_size=40) | values.map(lambda v: json.dumps(v).encode())))
def test_any_bytes_are_read_or_refused(tmp_path, lines):
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    records, error = attempt(lambda: list(data.read(path)))
    if error:
        assert str(path) in error
    else:
        assert len(records) == sum(1 for x in path.read_bytes().split(b"\n") if x.strip())


@RULES
@given(st.lists(st.dictionaries(names, values, max_size=6), max_size=4))
def test_any_records_are_tokenised_or_refused(records):
    result, error = attempt(
        lambda: data.tokenize(data.read(records), data.ByteTokenizer(), max_length=20)
    )
    if not error:
        rows, report = result
        assert report.read == len(records)
        assert len(rows) == report.read - sum(report.dropped.values())
