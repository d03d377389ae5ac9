"""OpenAssistant's flat messages and trees: pairs of ranked replies below the thread above them."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_eqx import data
from dpo_eqx.cli.terminal.prompts import read_prompts

from .chat import chat_tokenizer, texts


def message(name, parent, role, rank=None, **changes):
    return {
        "message_id": name,
        "parent_id": parent,
        "text": f"text of {name}",
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "message_tree_id": "q",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [1]},
    } | changes


def prompter(name, parent=None, **changes):
    return message(name, parent, "prompter", **changes)


def reply(name, parent, rank, **changes):
    return message(name, parent, "assistant", rank, **changes)


ROWS = [
    prompter("q"),
    reply("a", "q", 1.0),
    reply("b", "q", 0.0),
    reply("c", "q", 2.0),
    reply("deleted", "q", 3.0, deleted=True),
    reply("unreviewed", "q", 4.0, review_result=None),
    reply("refused", "q", 5.0, review_result=False),
    reply("unranked", "q", None),
    prompter("q2", "b"),
    reply("d", "q2", 1),
    reply("e", "q2", 0),
    prompter("q3", "b"),
    reply("f", "q3", None),
    prompter("q4", "deleted"),
    reply("g", "q4", 0),
    reply("h", "q4", 1),
]
PROMPTS = [prompter("Frage", lang="de", message_tree_id="r")]
PROMPTS += [reply(name, "Frage", rank, lang="de") for name, rank in (("eins", 0), ("zwei", 1))]


def trees(rows):
    """The rows nested, as in the files of trees."""
    nodes = {row["message_id"]: row | {"replies": []} for row in rows}
    for row in rows:
        if row["parent_id"] is not None:
            nodes[row["parent_id"]]["replies"].append(nodes[row["message_id"]])
    roots = [node for node in nodes.values() if node["parent_id"] is None]
    for node in nodes.values():
        del node["parent_id"]
    return [{"message_tree_id": n["message_id"], "prompt": n} for n in roots]


def turn(role, name):
    return {"role": role, "content": f"text of {name}"}


LEFT_OUT = {
    "answers in no pair": 1,
    "replies that are deleted or not reviewed": 3,
    "replies without a rank": 2,
    "prompts with fewer than two ranked replies": 1,
    "prompts whose thread is incomplete, deleted or not reviewed": 1,
}
THREAD = [turn("user", "q"), turn("assistant", "b"), turn("user", "q2")]


@pytest.mark.parametrize("make", [list, trees, lambda rows: rows[::-1]])
def test_ranked_replies_are_pairs(make, tmp_path):
    path = tmp_path / "oasst.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in make(ROWS)))
    records = data.read(path)
    got = sorted(records, key=lambda record: len(record["prompt"]))
    assert got == [
        {
            "prompt": [turn("user", "q")],
            "chosen": [turn("assistant", "b")],
            "rejected": [turn("assistant", "c")],
        },
        {
            "prompt": THREAD,
            "chosen": [turn("assistant", "e")],
            "rejected": [turn("assistant", "d")],
        },
    ]
    assert records.left_out == LEFT_OUT
    assert "answers from `replies` by `rank`, paired best-worst" in str(records)
    everything = data.read(path, pairs="all")
    assert len(list(everything)) == 4
    assert "answers in no pair" not in everything.left_out
    prompts = sorted((prompt.value for prompt in read_prompts(str(path), None)), key=len)
    assert prompts == [record["prompt"] for record in got]


def test_parquet_gives_the_same_ids(tmp_path):
    (tmp_path / "oasst.jsonl").write_text("\n".join(map(json.dumps, ROWS + PROMPTS)))
    pa.parquet.write_table(pa.Table.from_pylist(ROWS + PROMPTS), tmp_path / "oasst.parquet")
    tokenizer = chat_tokenizer()
    rows, report = data.tokenize(data.read(tmp_path / "oasst.jsonl"), tokenizer)
    assert data.tokenize(data.read(tmp_path / "oasst.parquet"), tokenizer)[0] == rows
    assert texts(tokenizer, rows[1]) == (
        "[user]text of q;[assistant]text of b;[user]text of q2;[assistant]",
        "text of e;",
        "text of d;",
    )
    assert "left out 3: replies that are deleted or not reviewed" in str(report)
    assert report.read == 3


@pytest.mark.parametrize("make", [list, trees])
def test_where_filters_messages(make):
    records = data.read(make(ROWS + PROMPTS), where={"lang": "de"})
    ((record,), counts) = list(records), records.left_out
    assert record["prompt"] == [turn("user", "Frage")]
    assert counts["records that are not of lang=de"] == len(ROWS)


def test_what_no_column_says_is_not_asked_for():
    """Neither reviews nor deletions, nor a language, are in every copy of the data."""
    names = ("message_id", "parent_id", "text", "role", "rank")
    rows = [{name: row[name] for name in names} for row in ROWS[:4]]
    (record,) = data.read(iter(rows))
    assert record["chosen"] == [turn("assistant", "b")]


def test_a_thread_that_is_not_whole_is_left_out():
    records = data.read([*ROWS[8:11], *PROMPTS])
    assert len(list(records)) == 1
    assert records.left_out["prompts whose thread is incomplete, deleted or not reviewed"] == 1
    loop = [prompter("x", "y"), prompter("y", "x"), reply("z", "x", 0), reply("w", "x", 1)]
    assert len(list(data.read(PROMPTS + loop))) == 1


PAIR = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
VALUES = [("en", "en"), (True, "true"), (False, "False"), (3, "3"), (2.5, "2.5")]


@pytest.mark.parametrize(("value", "text"), VALUES)
def test_where_filters_any_source(value, text):
    records = data.read([PAIR | {"x": value}, PAIR | {"x": "other"}, PAIR], where={"x": text})
    assert list(records) == [PAIR]
    assert records.left_out == {f"records that are not of x={text}": 2}


WRONG = [
    (
        [prompter("q"), reply("q", "q", 0)],
        "`message_id` in record 1 .* differ from all others; got",
    ),
    (
        [prompter("q") | {"role": "clown"}],
        "`role` in record 0 .* must be `prompter` or `assistant`",
    ),
    ([prompter("q") | {"text": None}], "`text` in record 0 .* must be text; got None"),
    ([prompter("q"), reply("a", "q", 0)], "holds no records.*prompts with fewer than two ranked"),
    ([{"prompt": prompter("a") | {"replies": [3]}}], "`prompt` in record 0 .* messages; got 3"),
]


@pytest.mark.parametrize(("records", "match"), WRONG)
def test_bad_messages_are_named(records, match):
    with pytest.raises(ValueError, match=match):
        list(data.read(records))


def test_a_filter_on_no_column_is_an_error():
    with pytest.raises(
        ValueError, match=r"`where` names `lang`, which record 0 .* found: `prompt`"
    ):
        list(data.read([PAIR], where={"lang": "en"}))
