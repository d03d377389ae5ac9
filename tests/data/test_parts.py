"""Content in parts: text is joined, unless the chat template takes parts; images are refused."""

import copy
import json
from pathlib import Path

import pytest

from dpo_eqx import data
from dpo_eqx.cli.terminal.prompts import encode_prompt, read_prompts

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
HEAD = "{% for m in messages %}[{{ m.role }}]"
TAIL = ";{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
LOOP = "{% for p in m.content if p.type == 'text' %}<{{ p.text }}>{% endfor %}"
TEMPLATES = {
    "text": HEAD + "{{ m.content }}" + TAIL,
    "trimmed text": HEAD + "{{ m.content.strip() if m.content is string else m.content }}" + TAIL,
    "parts": HEAD + LOOP + TAIL,
    "both": HEAD + "{% if m.content is string %}<{{ m.content }}>{% else %}" + LOOP + "{% endif %}"
    "" + TAIL,
    # Parts of users only, as in templates for models that see but do not draw.
    "users' parts": HEAD + "{% if m.role == 'user' %}" + LOOP + "{% else %}{{ m.content }}"
    "{% endif %}" + TAIL,
}


def tokenizer_with(template):
    loaded = data.load_tokenizer(GOLDEN / "gpt2")
    loaded.chat_template = TEMPLATES[template]
    return loaded


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


RECORD = {
    "prompt": [
        {"role": "system", "content": parts("Be brief.")},
        {"role": "user", "content": parts("Name a ", "red fruit.")},
    ],
    "chosen": [{"role": "assistant", "content": parts("A ", "cherry.")}],
    "rejected": [{"role": "assistant", "content": parts("A banana.")}],
}
RENDERED = [
    ("text", "[system]Be brief.;[user]Name a red fruit.;[assistant]A cherry.;"),
    ("trimmed text", "[system]Be brief.;[user]Name a red fruit.;[assistant]A cherry.;"),
    ("parts", "[system]<Be brief.>;[user]<Name a ><red fruit.>;[assistant]<A ><cherry.>;"),
    ("both", "[system]<Be brief.>;[user]<Name a ><red fruit.>;[assistant]<A ><cherry.>;"),
    ("users' parts", "[system]Be brief.;[user]<Name a ><red fruit.>;[assistant]A cherry.;"),
]


@pytest.mark.parametrize(("template", "want"), RENDERED)
def test_parts_are_joined_unless_the_template_takes_them(template, want, tmp_path):
    tokenizer = tokenizer_with(template)
    (row,), report = data.tokenize([RECORD], tokenizer)
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == want
    assert report.noted == {}
    whole = {name: RECORD["prompt"] + RECORD[name] for name in ("chosen", "rejected")}
    assert data.tokenize([whole], tokenizer)[0] == [row]
    # `generate` makes the same prompt.
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(RECORD))
    (prompt,) = read_prompts(str(path), None)
    assert encode_prompt(tokenizer, prompt, chat=True) == row["prompt_ids"]


def test_the_keys_that_a_schema_added_to_parts_are_left_out(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    filled = copy.deepcopy(RECORD)
    filled["chosen"][0]["content"][0]["image_url"] = None
    path = tmp_path / "parts.parquet"
    pq.write_table(pa.Table.from_pylist([filled]), path)
    tokenizer = tokenizer_with("text")
    assert data.tokenize(data.read(path), tokenizer)[0] == data.tokenize([RECORD], tokenizer)[0]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "x.png"}},
        {"type": "audio", "text": "hm"},
        {"type": "text"},
        {"type": "text", "text": 3},
        "A cherry.",
    ],
)
def test_other_parts_are_refused_with_their_place(part, tmp_path):
    bad = RECORD | {"chosen": [{"role": "assistant", "content": [*parts("A"), part]}]}
    path = tmp_path / "parts.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + json.dumps(bad))
    match = r"part 1 of `content` of message 0 of `chosen` in line 2 of .*parts.jsonl must be text"
    with pytest.raises(ValueError, match=match) as error:
        list(data.read(path))
    assert "leave the record out" in str(error.value)
