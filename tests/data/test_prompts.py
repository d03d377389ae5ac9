"""The prompt reaches the tokens, or an error says which column would be lost."""

import json
from pathlib import Path

import pytest

from dpo_eqx import data
from dpo_eqx.cli.terminal.prompts import encode_prompt, read_prompts

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ANSWERS = {"chosen": "They sleep afloat.", "rejected": "They do not."}
WHY = {"role": "user", "content": "Where do otters sleep?"}
BRIEF = {"role": "system", "content": "Be brief."}
SYSTEM, QUESTION = BRIEF["content"], WHY["content"]


def turns(*before):
    said = {name: {"role": "assistant", "content": text} for name, text in ANSWERS.items()}
    return {name: [*before, turn] for name, turn in said.items()}


@pytest.fixture(scope="module")
def tokenizer():
    loaded = data.load_tokenizer(GOLDEN / "gpt2")
    loaded.chat_template = TEMPLATE
    return loaded


ASKED = f"[user]{QUESTION};[assistant]"
LAYOUTS = {
    "Intel/orca_dpo_pairs": ({"system": SYSTEM, "question": QUESTION} | ANSWERS, True),
    "without a system turn": ({"system": "", "question": QUESTION} | ANSWERS, False),
    "null as the system turn": ({"system": None, "question": QUESTION} | ANSWERS, False),
    "LLaMA-Factory": ({"instruction": QUESTION, "input": ""} | ANSWERS, False),
    "LLaMA-Factory, system": ({"instruction": QUESTION, "system": SYSTEM} | ANSWERS, True),
    "distilabel": ({"system": SYSTEM, "input": QUESTION, "model": "m"} | ANSWERS, True),
    "truthy-dpo": ({"system": SYSTEM, "prompt": QUESTION, "source": "s"} | ANSWERS, True),
    "a text before turns": ({"prompt": QUESTION} | turns(), False),
    "a text before turns, system": ({"prompt": QUESTION} | turns(BRIEF), True),
    "a question before turns": ({"question": QUESTION} | turns(), False),
    "a system column": ({"system": SYSTEM} | turns(WHY), True),
    "a system column, prompt": ({"system": SYSTEM, "prompt": [WHY]} | turns(), True),
    "a system column that is there": ({"system": SYSTEM} | turns(BRIEF, WHY), True),
    "a prompt that is there twice": ({"prompt": [BRIEF, WHY]} | turns(BRIEF, WHY), True),
    "UltraFeedback": (
        {"prompt": QUESTION + "\n", "messages": turns(WHY)["chosen"]} | turns(WHY),
        False,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_known_layouts_become_the_same_conversation(name, tokenizer, tmp_path):
    record, has_system = LAYOUTS[name]
    (row,), _ = data.tokenize([record], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == f"[system]{SYSTEM};" * has_system + ASKED
    assert tokenizer.decode(row["chosen_ids"]) == ANSWERS["chosen"] + ";"
    assert tokenizer.decode(row["rejected_ids"]) == ANSWERS["rejected"] + ";"
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record))
    (prompt,) = read_prompts(str(path), None)
    assert encode_prompt(tokenizer, prompt, chat=False) == row["prompt_ids"]


def test_texts_of_one_turn_are_lines(tokenizer):
    record = {"instruction": "Translate.", "input": "otter"} | ANSWERS
    (row,), report = data.tokenize([record], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "[user]Translate.\notter;[assistant]"
    assert "turns from `instruction`, `input`" in report.form


def test_unpaired_layouts(tokenizer):
    record = {"question": QUESTION, "completion": "Afloat.", "label": True}
    (row,), _ = data.tokenize([record], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == ASKED


def test_columns_decide_against_a_layout():
    record = {"system": SYSTEM, "question": QUESTION} | ANSWERS
    records = data.read([record], columns={"prompt": "question", "system": None})
    assert list(records) == [{"prompt": QUESTION} | ANSWERS]
    assert str(records).endswith("explicit prompt, text: `prompt`, `chosen`, `rejected`")


def test_layouts_need_a_template():
    with pytest.raises(ValueError, match=r"Turns are read from `system`, `question`"):
        data.tokenize([{"system": "", "question": QUESTION} | ANSWERS], data.ByteTokenizer())


HH = {
    "chosen": "Human: Hi there, you Assistant: a",
    "rejected": "Human: Hi there, you Assistant: b",
}
LOST = [
    # The prompt of the issue: an answer without it, and a conversation that has another one.
    ([{"prompt": QUESTION} | turns({"role": "user", "content": "Hi."})], "prompt", "line 1"),
    ([{"prompt": "is"} | turns({"role": "user", "content": "This."})], "prompt", "line 1"),
    ([{"prompt": QUESTION} | turns(WHY), {"prompt": QUESTION} | turns()], "prompt", "line 2"),
    # A column that starts later.
    ([HH, {"prompt": "Hi", "chosen": "a", "rejected": "b"}], "prompt", "line 2"),
    ([HH, HH | {"question": QUESTION}], "question", "line 2"),
    (
        [{"prompt": "Hi"} | ANSWERS, {"prompt": "Hi", "system": SYSTEM} | ANSWERS],
        "system",
        "line 2",
    ),
    # Other names, by name or by what they hold.
    ([{"query": QUESTION} | ANSWERS], "query", "line 1"),
    ([{"Aufgabe": QUESTION} | ANSWERS], "Aufgabe", "line 1"),
    ([{"问题": "水獭在哪里睡觉", "chosen": "水上", "rejected": "不知道"}], "问题", "line 1"),
    ([{"prompt": "Sum up:", "messages": [WHY]} | ANSWERS], "messages", "line 1"),
    (
        [{"prompt": [BRIEF], "conversations": [{"from": "human", "value": QUESTION}]} | ANSWERS],
        "conversations",
        "line 1",
    ),
    ([{"prompt": "Sum up:", "article": QUESTION} | ANSWERS], "article", "line 1"),
    ([{"prompt": [WHY], "context": "Otters are mammals."} | turns()], "context", "line 1"),
    ([HH | {"system": SYSTEM}], "system", "line 1"),
]


@pytest.mark.parametrize(("records", "column", "place"), LOST)
def test_a_prompt_that_would_be_lost_is_refused(records, column, place, tmp_path):
    path = tmp_path / "lost.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=f"^`{column}` .*{place} of .*lost.jsonl") as error:
        list(data.read(path))
    assert f'columns={{"{column}": None}}' in str(error.value)
    # The remedy works, as far as the rest is good.
    left = list(data.read(path, columns={column: None})) if len(records) == 1 else records
    assert len(left) == len(records)


def test_a_prompt_in_the_second_file_of_a_folder_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(HH))
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "Hi", "chosen": "a", "rejected": "b"}))
    with pytest.raises(
        ValueError, match=r"`prompt` is in line 1 of .*b.jsonl but not in the first"
    ):
        list(data.read(tmp_path))


FINE = [
    HH | {"source": "made up by hand", "chosen_model": "a model of ours", "question_id": "q"},
    {"prompt": QUESTION, "备注": "x", "id": "x_0", "question": QUESTION} | ANSWERS,
    {"prompt": f"user: {QUESTION}\nassistant: Where?"}
    | turns(WHY, {"role": "assistant", "content": "Where?"}),
    turns(WHY) | {"critique": "One is better than the other.", "input": ""},
]


@pytest.mark.parametrize("record", FINE)
def test_other_columns_are_left_out_and_named(record):
    records = data.read([record])
    assert len(list(records)) == 1
    assert "not used: " in str(records)
