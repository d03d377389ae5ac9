"""Reading preference pairs: every line becomes a pair, or is blank, or is a fault with a reason."""

import gzip
import json

import pytest
from support import preference_file
from support.vocabulary import BYTES, Pair, Widths

EXPLICIT = {"prompt": "Hi", "chosen": " there", "rejected": " you"}
IMPLICIT = {"chosen": "Q: é? A: yes", "rejected": "Q: é? A: no", "other": 1}


def write(path, *lines, compress=False):
    text = b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
    )
    path.write_bytes(gzip.compress(text) if compress else text)
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_both_forms_in_one_file(tmp_path, compress):
    reading = preference_file.read_pairs(
        write(tmp_path / "x", EXPLICIT, IMPLICIT, compress=compress)
    )
    assert reading.pairs == [
        Pair(b"Hi", b" there", b" you"),
        Pair("Q: é? A:".encode(), b" yes", b" no"),
    ]
    assert (reading.lines, reading.blank, reading.faults) == (2, 0, [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"chosen": "a"', r"The line is not JSON: .* at column"),
        (b"[1, 2]", r"must be an object; got \[1, 2\]"),
        (b'{"chosen": "a"}', r"`rejected` is missing; the line has chosen"),
        (b"{}", r"`chosen` is missing; the line has nothing"),
        (b'{"chosen": "a", "rejected": 3}', r"`rejected` must be text; got 3"),
        (b'{"prompt": null, "chosen": "a", "rejected": "b"}', r"`prompt` must be text; got null"),
        (b'{"chosen": "a", "rejected": "a"}', r"are the same, so neither is preferred"),
        (b'{"chosen": "\xff", "rejected": "a"}', r"utf-8.* can't decode"),
        (b'{"chosen": "\\ud800", "rejected": "a"}', r"surrogates not allowed"),
        (b"[" * 100_000, r"recursion"),
    ],
)
def test_a_fault_has_its_line_and_reason_and_costs_no_other(tmp_path, line, reason):
    path = write(tmp_path / "x.jsonl", EXPLICIT, b"", line, IMPLICIT, b"  ")
    reading = preference_file.read_pairs(path)
    assert len(reading.pairs) == 2
    assert (reading.lines, reading.blank) == (5, 2)
    (fault,) = reading.faults
    assert fault.line == 3
    (told,) = preference_file.faults(path, reading)
    assert told.startswith(f"{path}:3: ")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(told)


def test_a_damaged_gzip_keeps_what_came_before(tmp_path):
    path = write(tmp_path / "x.gz", *[EXPLICIT] * 5000, compress=True)
    path.write_bytes(path.read_bytes()[:-12])
    reading = preference_file.read_pairs(path)
    assert len(reading.pairs) > 0
    assert len(reading.faults) == 1
    assert "The rest of the file cannot be read" in reading.faults[0].reason
    assert reading.lines == len(reading.pairs) + 1


def test_many_faults_are_counted(tmp_path):
    reading = preference_file.read_pairs(write(tmp_path / "x", *[b"?"] * 30))
    told = preference_file.faults("x", reading)
    assert len(told) == 21
    assert told[-1] == "x: 10 more faulty lines"


@pytest.mark.parametrize(
    ("chosen", "rejected", "pair"),
    [
        ("ab", "abc", Pair(b"a", b"b", b"bc")),
        ("abc", "ab", Pair(b"a", b"bc", b"b")),
        ("a b", "a c", Pair(b"a", b" b", b" c")),
        ("", "a", Pair(b"", b"", b"a")),
        ("xa", "ya", Pair(b"", b"xa", b"ya")),
    ],
)
def test_a_shared_prompt_is_the_one_that_the_library_reads(chosen, rejected, pair):
    line = json.dumps({"chosen": chosen, "rejected": rejected}).encode()
    assert preference_file.parse_pair(line) == pair
    batch = BYTES.pairs([pair], Widths(4, 4))  # no completion is empty: each has its end token
    assert batch.prompt.mask.sum() == len(pair.prompt) + 1
    assert batch.chosen.mask.sum() == len(pair.chosen) + 1
    assert batch.rejected.mask.sum() == len(pair.rejected) + 1


def test_what_is_cut_and_dropped_is_told():
    pairs = [
        Pair(b"123", b"abc", b"x"),  # all of it fits, with the end token
        Pair(b"1234", b"abcd", b"x"),
        Pair(b"1", b"abcdef", b"abcdeg"),  # the same where they are cut
        Pair(b"12345", b"x", b"abcde"),
    ]
    reading = preference_file.Reading(lines=7, blank=2, pairs=pairs, faults=[])
    reading.faults.append(preference_file.Fault(1, "?"))
    used, account = preference_file.usable(reading, Widths(prompt=4, completion=4))
    assert used == [pairs[0], pairs[1], pairs[3]]
    assert account.splitlines() == [
        "7 lines read: 4 pairs, 2 blank, 1 faulty.",
        "3 pairs used; 1 dropped, whose answers do not differ in their first 4 bytes.",
        "Cut to 4 tokens, the end kept: 2 prompts. Cut to 4, the start kept: 1 chosen, 1 rejected.",
    ]
