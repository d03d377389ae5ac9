"""Nulls that a column schema added are left out at every depth, and nulls with a meaning stay."""

import json
from pathlib import Path

import pytest

from dpo_eqx import data
from dpo_eqx.data._records.nulls import AddedDefaults, without_nulls, without_nulls_in_tools

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{{ mood if mood is defined else '' }}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{{ m.tool_calls | tojson "
    "if m.tool_calls else '' }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return [{"type": "function", "function": {"name": name, "parameters": parameters}}]


def record(chosen, tools, **more):
    turns = {"prompt": [{"role": "user", "content": "Well?"}], "chosen": chosen}
    return turns | {"rejected": [{"role": "assistant", "content": "No."}], "tools": tools} | more


RECORDS = [
    record(call("weather", city="Oslo"), tool("weather", city={"type": "string"})),
    record(
        call("add", a=3, b={"parts": [1, 2]}),
        tool("add", a={"type": "integer"}, b={"type": "object", "default": None}),
        chat_template_kwargs={"mood": "!"},
    ),
    record(
        call("pick", unit="c"),
        tool("pick", unit={"type": "string", "enum": ["c", None], "description": "d"}),
        chat_template_kwargs={"other": 1},
    ),
]


@pytest.fixture(scope="module")
def tokenizer():
    loaded = data.load_tokenizer(GOLDEN / "gpt2")
    loaded.chat_template = TEMPLATE
    return loaded


def saved_as(kind, records, folder):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / kind
    if kind == "lines":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    elif kind == "exported":
        datasets.Dataset.from_list(records).to_json(path)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif kind == "saved":
        datasets.Dataset.from_list(records).save_to_disk(path)
    else:
        return datasets.Dataset.from_list(records)
    return path


KINDS = ["lines", "exported", "parquet", "saved", "in memory"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_give_the_same_ids_from_every_kind_of_source(kind, tokenizer, tmp_path):
    # A first record with every column: a column that starts later is another matter.
    records = [RECORDS[1], RECORDS[0], RECORDS[2]]
    want, _ = data.tokenize(records, tokenizer)
    rows, _ = data.tokenize(data.read(saved_as(kind, records, tmp_path)), tokenizer)
    assert rows == want
    texts = [tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) for row in rows]
    assert '{"city": "Oslo"}' in texts[1]
    assert texts[1].startswith('[{"type": "function"')
    assert "null" not in texts[1]
    assert "None" not in texts[1]
    assert '"default": null' in texts[0]
    assert '"enum": ["c", null]' in texts[2]


# Not JSON Lines: they have no types, so a null there counts as written by hand.
@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_default_that_another_tool_has_is_not_added(kind, tokenizer, tmp_path):
    units = [
        {"type": "string", "default": "c"},
        {"type": "string"},
        {"type": "string", "default": None, "enum": ["c", None]},
    ]
    records = [record(call("a", unit="c"), tool("a", unit=unit)) for unit in units]
    want, _ = data.tokenize(records, tokenizer)
    source = saved_as(kind, records, tmp_path)
    rows, _ = data.tokenize(data.read(source), tokenizer)
    assert rows == want
    defaults = [tokenizer.decode(row["prompt_ids"]).count('"default": null') for row in rows]
    assert defaults == [0, 0, 1]


def test_depths_and_lists():
    given = {"a": None, "b": [{"c": None, "d": [None, 1, {"e": None}]}], "f": {"g": {"h": None}}}
    assert without_nulls(given) == {"b": [{"d": [None, 1, {}]}], "f": {"g": {}}}


def test_a_parameter_may_have_the_name_of_a_keyword():
    given = tool("t", default=None, const={"type": "string", "default": None, "title": None})
    assert without_nulls_in_tools(given) == tool("t", const={"type": "string", "default": None})


def test_without_a_schema_nothing_is_guessed():
    given = {"tools": tool("t", a={"default": None})}
    assert AddedDefaults(()).removed(given) is given


@pytest.mark.parametrize("kind", ["lines", "parquet"])
def test_a_message_without_content_and_calls_is_refused(kind, tmp_path):
    silent = record([{"role": "assistant", "content": None, "tool_calls": None}], [])
    source = data.read(saved_as(kind, [RECORDS[0], silent], tmp_path))
    place = {"lines": "line 2", "parquet": "row 2"}[kind]
    with pytest.raises(ValueError, match=rf"message 0 of `chosen` in {place} of .* a `content`"):
        list(source)
