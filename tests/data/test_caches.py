"""Caches on disk: of tokens and of the reference's log-probabilities, keyed by content."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import chex
import equinox as eqx
import jax
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import data, models
from dpo_eqx._scoring.score import score_pairs
from dpo_eqx.data._fingerprint import digest
from dpo_eqx.data._tokens.store import digest_ids

BYTES = data.ByteTokenizer()
RECORDS = [
    {"prompt": "Why" * i, "chosen": f" So {i}.", "rejected": " No." * (i % 3), "weight": i + 0.5}
    for i in range(20)
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_rows_on_disk_are_those_in_memory(tmp_path):
    path = write(tmp_path / "records.jsonl", RECORDS)
    memory, report = data.tokenize(data.read(path), BYTES, max_length=40)
    disk, other = data.tokenize(data.read(path), BYTES, max_length=40, cache=tmp_path / "cache")
    assert isinstance(disk, data.TokenCache)
    assert list(disk) == memory
    assert [disk[i] for i in (-1, 3)] == [memory[i] for i in (-1, 3)]
    assert digest_ids(disk) == digest_ids(memory)
    assert dataclasses.replace(other, cache=None) == report
    assert str(other.cache) in str(other)
    with pytest.raises(IndexError, match="`index` must be below the number of rows"):
        disk[len(disk)]
    for one, two in zip(*(data.batches(r, batch_size=4) for r in (disk, memory)), strict=True):
        chex.assert_trees_all_equal(one, two)


class Shifted(data.ByteTokenizer):
    """Other ids under the class that has the key of the bytes."""

    def encode(self, text):
        return [self.bos_token_id, *(byte ^ 1 for byte in text.encode())]


def test_the_key_is_the_content(tmp_path, monkeypatch):
    path, cache = write(tmp_path / "records.jsonl", RECORDS), tmp_path / "cache"
    texts, encode = [], data.ByteTokenizer.encode
    monkeypatch.setattr(
        data.ByteTokenizer, "encode", lambda self, text: texts.append(text) or encode(self, text)
    )

    def tokenize(tokenizer=BYTES, columns=None, **settings):
        return data.tokenize(data.read(path, columns=columns), tokenizer, cache=cache, **settings)

    rows, report = tokenize()
    texts.clear()
    again, same = tokenize()
    assert set(texts) == {"a"}, "found on disk, nothing tokenised but to ask for the EOS"
    assert (list(again), same) == (list(rows), report)
    changed = [tokenize(max_length=30), tokenize(append_eos=False), tokenize(Shifted())]
    write(path, [*RECORDS[:-1], RECORDS[-1] | {"chosen": " So 20."}])
    changed += [tokenize(), tokenize(columns={"weight": None})]
    assert len({report.cache, *(report.cache for _, report in changed)}) == 6
    assert changed[3][0][-1] != rows[-1]


def test_each_split_has_its_own_cache(tmp_path, monkeypatch):
    import datasets

    parts = {"train": RECORDS[:12], "test": RECORDS[12:]}
    saved, cache = tmp_path / "saved", tmp_path / "cache"
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(records) for name, records in parts.items()}
    ).save_to_disk(saved)
    want = {name: data.tokenize(records, BYTES)[0] for name, records in parts.items()}
    for name in ("train", "test", "train"):
        rows, report = data.tokenize(data.read(saved, split=name), BYTES, cache=cache)
        assert list(rows) == want[name]
        assert report.kept == len(want[name])
    assert list(data.tokenize(data.read(saved), BYTES, cache=cache)[0]) == want["train"]

    # Sets that are too large for memory are cached without being asked.
    monkeypatch.setenv("DPO_EQX_CACHE", str(tmp_path / "large"))
    monkeypatch.setattr("dpo_eqx.data._records.read.IN_MEMORY_BYTES", 0)
    for name in ("train", "test"):
        rows, _ = data.tokenize(data.read(saved, split=name), BYTES)
        assert isinstance(rows, data.TokenCache)
        assert list(rows) == want[name]


def test_a_stream_is_tokenised_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_EQX_CACHE", str(tmp_path))
    rows, report = data.tokenize((record for record in RECORDS), BYTES)
    assert isinstance(rows, data.TokenCache)
    assert report.cache.parent == tmp_path
    assert list(rows) == data.tokenize(RECORDS, BYTES)[0]
    _, again = data.tokenize((record for record in RECORDS), BYTES)
    assert again.cache == report.cache
    assert not list(tmp_path.glob(".unfinished*"))


def test_an_error_leaves_no_cache(tmp_path):
    with pytest.raises(ValueError, match="`chosen` is missing in record 20"):
        data.tokenize([*RECORDS, {"prompt": "a"}], BYTES, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_empty_prompts_and_unpaired_rows_on_disk(tmp_path):
    plain = type("Plain", (), {"eos_token_id": 9, "encode": lambda _, text: [*text.encode()]})()
    records = [{"prompt": "" if i else "a", "completion": "b", "label": i} for i in range(2)]
    memory, _ = data.tokenize(records, plain)
    disk, _ = data.tokenize(records, plain, cache=tmp_path)
    assert list(disk) == memory
    assert memory[1]["start_id"] == 9


FLAT = """
import sys
from dpo_eqx import data, models

def memory():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def records(count):
    for i in range(count):
        yield {"prompt": f"{i} why" * 20, "chosen": " so" * 60, "rejected": " no" * 50}

count, folder = int(sys.argv[1]), sys.argv[2]
list(data.batches(data.tokenize(records(300), data.ByteTokenizer(), cache=folder)[0], batch_size=8))
before = memory()
rows, report = data.tokenize(records(count), data.ByteTokenizer(), cache=folder)
for batch in data.batches(rows, batch_size=64):
    pass
print(memory() - before, (report.cache / "ids.bin").stat().st_size / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat(tmp_path):
    grown = []
    for count in (5_000, 40_000):
        command = [sys.executable, "-c", FLAT, str(count), str(tmp_path)]
        root = Path(__file__).parents[2]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        memory, size = map(float, result.stdout.split())
        grown.append(memory)
    assert size > 60
    assert grown[1] - grown[0] < 0.2 * size


class Policy(eqx.Module):
    table: jax.Array
    scale: float = eqx.field(static=True, default=1.0)

    def __call__(self, ids, *, key=None):
        return self.table[ids] * self.scale


def make_policy(seed=0, scale=1.0, dtype=np.float32):
    table = np.random.default_rng(seed).normal(size=(258, 258)).astype(dtype)
    return Policy(jax.numpy.asarray(table), scale)


def test_the_reference_is_computed_once_and_right(tmp_path):
    rows, _ = data.tokenize(RECORDS, BYTES)
    policy = make_policy()
    cached = data.cache_reference(policy, rows, batch_size=3, folder=tmp_path)
    again = data.cache_reference(policy, rows, batch_size=7, folder=tmp_path, score=score_pairs)
    assert list(cached) == list(again)
    assert len(list(tmp_path.iterdir())) == 1
    precompute = eqx.filter_jit(dpx.precompute_reference)
    for batch in data.batches(cached, batch_size=8, seed=1):
        want = precompute(policy, batch)
        chex.assert_trees_all_close(batch.reference.chosen, want.chosen, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(batch.reference.rejected, want.rejected, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_equal(batch.reference.chosen_length, want.chosen_length)


def other_score(policy, batch, *, key=None):
    return score_pairs(policy, batch, key=key)


def test_a_changed_input_meets_no_stale_reference(tmp_path):
    rows, _ = data.tokenize(RECORDS[:4], BYTES)
    policy, moved = make_policy(), make_policy()
    table = np.asarray(moved.table).copy()
    table[0, 0] = np.nextafter(table[0, 0], np.float32(9))
    moved = Policy(jax.numpy.asarray(table))
    changed = [rows[0] | {"chosen_ids": [*rows[0]["chosen_ids"][:-1], 7]}, *rows[1:]]
    # The same ids, another boundary.
    *chosen, last = rows[3]["chosen_ids"]
    shifted = rows[3] | {"chosen_ids": chosen, "rejected_ids": [last, *rows[3]["rejected_ids"]]}
    runs = [
        (policy, rows, {}),
        (moved, rows, {}),
        (make_policy(scale=2.0), rows, {}),
        (make_policy(dtype=np.float16), rows, {}),
        (policy, changed, {}),
        (policy, [*rows[:3], shifted], {}),
        (policy, rows[::-1], {}),
        (policy, rows, {"compute_dtype": np.float16}),
        (policy, rows, {"score": other_score}),
    ]
    for reference, given, settings in runs:
        data.cache_reference(reference, given, folder=tmp_path, **settings)
    assert len(list(tmp_path.iterdir())) == len(runs)
    weighted = [row | {"weight": 3.0, "beta": 0.7} for row in rows]
    data.cache_reference(policy, weighted, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(runs), "numbers beside the ids change nothing"


def test_unpaired_rows_are_refused(tmp_path):
    rows = [{"prompt_ids": [1], "completion_ids": [2], "label": True}]
    with pytest.raises(ValueError, match="`rows` must be pairs"):
        data.cache_reference(make_policy(), rows, folder=tmp_path)


def test_digests_are_those_of_another_process():
    command = """
from functools import partial
import numpy as np
from dpo_eqx.data._fingerprint import digest
from dpo_eqx import score_pairs
score = partial(score_pairs, chunk_size=2)
known = lambda x: x in {"p", "q", "r", "s"}
print(digest({"a": [1, 2.5, None, {"x", "y", "z"}]}, np.arange(3), score, known))
"""
    root = Path(__file__).parents[2]
    results = {
        subprocess.run(
            [sys.executable, "-c", command], capture_output=True, check=True, cwd=root
        ).stdout
        for _ in range(2)
    }
    assert len(results) == 1


def test_a_loaded_checkpoint_has_a_digest():
    folder = Path(__file__).parents[1] / "golden" / "models" / "families" / "gpt2"
    policy = models.load(folder)
    assert digest(policy) == digest(models.load(folder))
    moved = eqx.tree_at(lambda p: p.norm.weight, policy, 2 * policy.norm.weight)
    assert digest(policy) != digest(moved)


def test_digests_tell_apart_what_differs():
    scale = 2.0
    values = [1, 1.0, "1", True, None, [1], (1,), [[1], []], [[], [1]], b"1", {"a": 1}, {"b": 1}]
    values += [np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), lambda x: x, lambda x: x + 1]
    values += [lambda x: x * scale, make_policy(), make_policy(1), make_policy(scale=2.0)]
    values += [lambda x: x in {"a", "b"}, jax.random.key(0), jax.random.key(1), np.float64]
    assert len({digest(value) for value in values}) == len(values)
    with pytest.raises(ValueError, match="keyed by content, and object has none"):
        digest(object())
