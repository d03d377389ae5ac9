"""What a record holds reaches the tokens, or the report says that it does not."""

import json
import random
from pathlib import Path

import pytest

from dpo_eqx import data
from dpo_eqx.data._tokens.report import DROPPED, LOST

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
END = "{% if add_generation_prompt %}<assistant>{% endif %}"


def chat(turn, before="", messages="messages", end=END):
    """A template that writes `turn` for each message `m`."""
    return before + "{% for m in " + messages + " %}<{{ m.role }}>" + turn + ";{% endfor %}" + end


CALLS = "{% for t in m.tool_calls or [] %}({{ t.function.name }} {{ t.function.arguments }})"
CALLS_AS_JSON = CALLS.replace("t.function.arguments", "t.function.arguments | tojson")
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
REASONS = "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
TEMPLATES = {
    "text alone": chat("{{ m.content or '' }}"),
    "all": chat("{{ m.content or '' }}" + REASONS + CALLS + "{% endfor %}", TOOLS),
    "all as JSON": chat(
        "{{ (m.content or '') | tojson }}" + REASONS + CALLS_AS_JSON + "{% endfor %}", TOOLS
    ),
    "trimmed": chat("{{ (m.content or '') | trim }}" + CALLS_AS_JSON + "{% endfor %}", TOOLS),
    "no reasoning": chat("{{ (m.content or '').split('</think>')[-1] }}"),
    "no system turn": chat("{{ m.content or '' }}", messages="messages if m.role != 'system'"),
    "only tools": chat(CALLS + "{% endfor %}", TOOLS),
    "the last turns": chat("{{ m.content or '' }}", messages="messages[-2:]"),
    "generation prompt that thinks": chat(
        "{{ m.content or '' }}" + REASONS, end="{% if add_generation_prompt %}<assistant><think>\n"
        "{% endif %}",
    ),
    "no system role": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}" + chat("{{ m.content or '' }}"),
}  # fmt: skip


FATES = {"all": {"kept"}, "all as JSON": {"kept"}, "only tools": {"told"}}


def tokenizer_with(template):
    tokenizer = data.load_tokenizer(GOLDEN / "gpt2")  # of bytes: ids keep every text
    tokenizer.chat_template = template
    return tokenizer


class Drawn:
    """A random record, and the texts in it. No text is a part of another text."""

    def __init__(self, seed):
        self.random, self.texts = random.Random(seed), []
        draw = self.random.random
        # Half of the records have nothing but text.
        self.kinds = ["text"] if draw() < 0.5 else ["text", "thinks", "reasons", "calls", "calls"]
        self.record = {"prompt": [self.turn("system")] if draw() < 0.4 else []}
        for _ in range(self.random.randint(0, 2)):
            self.record["prompt"] += [self.turn("user"), self.answer()]
        self.record["prompt"].append(self.turn("user"))
        for name in ("chosen", "rejected"):
            self.record[name] = [self.answer()]
            if draw() < 0.2:
                self.record[name] += [self.turn("tool"), self.answer()]
        if draw() < 0.4 and len(self.kinds) > 1:
            names = [self.text() for _ in range(3)]
            parameters = {"type": "object", "properties": {names[1]: {"type": "string"}}}
            tool = {"name": names[0], "description": names[2], "parameters": parameters}
            tools = [{"type": "function", "function": tool}]
            self.record["tools"] = json.dumps(tools) if draw() < 0.5 else tools

    def text(self):
        letters = "abc XYZ äßé 中文字 🙂👩‍💻 \t\"'\\<&>{}٣"
        word = "".join(self.random.choices(letters, k=self.random.randint(1, 12)))
        self.texts.append(f"q{len(self.texts)}{word}z")
        return self.texts[-1]

    def turn(self, role):
        text = f"{self.text()}\n {self.text()}" if self.random.random() < 0.3 else self.text()
        if self.random.random() < 0.2:
            return {"role": role, "content": [{"type": "text", "text": text}]}
        return {"role": role, "content": text, "name": None}

    def answer(self):
        kind = self.random.choice(self.kinds)
        if kind == "thinks":
            content = f"<think>{self.text()}</think>{self.text()}"
            return {"role": "assistant", "content": content}
        if kind == "reasons":
            texts = {"content": self.text(), "reasoning_content": self.text()}
            return {"role": "assistant", **texts}
        if kind == "text":
            return self.turn("assistant")
        call = {"name": self.text(), "arguments": {self.text(): self.text(), "n": None}}
        calls = [{"type": "function", "id": "x1", "function": call}]
        return {"role": "assistant", "content": None, "tool_calls": calls}


def is_in(text, rendered):
    """Whether the text is there, as it is or as JSON or Python write it."""
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1])
    return any(form in rendered for form in forms)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_text_is_in_the_tokens_or_in_the_report(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    fates = set()
    for seed in range(40):
        drawn = Drawn(seed)
        rows, report = data.tokenize([drawn.record], tokenizer)
        told = {*report.lost, *report.dropped}
        assert told <= LOST.keys() | DROPPED.keys()
        if rows:
            parts = [tokenizer.decode(rows[0][part]) for part in rows[0] if part.endswith("_ids")]
            all_there = all(is_in(text, " ".join(parts)) for text in drawn.texts)
            # Neither silence about a lost text, nor an alarm if all texts are there.
            assert all_there == (not told), (seed, drawn.record, str(report))
        assert rows or told
        fates.add("told" if told else "kept")
    assert fates == FATES.get(name, {"kept", "told"})


def conversation(*turns):
    return [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]


def record(chosen, rejected="no", prompt=(("user", "2+5?"),), **columns):
    def messages(answer):
        return [answer] if isinstance(answer, dict) else conversation(("assistant", answer))

    answers = {"chosen": messages(chosen), "rejected": messages(rejected)}
    return {"prompt": conversation(*prompt), **answers, **columns}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 5}}}],
}
LOSSES = {
    "answer_text_lost": (
        "no reasoning",
        record("<think>2 and 5 make 7</think>It is 7"),
        "`chosen`, message 0, `content`: '2 and 5 make 7'",
    ),
    "prompt_text_lost": (
        "no system turn",
        record("7", prompt=(("system", "Be terse."), ("user", "2+5?"))),
        "the prompt, message 0, `content`: 'Be terse.'",
    ),
    "tools_lost": ("text alone", record("7", tools=[{"function": {"name": "add"}}]), ": 'add'"),
    "answer_not_rendered": ("text alone", record(CALL), "`chosen`"),
    "template_refused": (
        "no system role",
        record("7", prompt=(("system", "Be terse."), ("user", "2+5?"))),
        ": no system",
    ),
}


@pytest.mark.parametrize("reason", LOSSES)
def test_a_loss_is_told_with_its_place_and_refused_by_strict(reason, tmp_path):
    template, lossy, example = LOSSES[reason]
    path = write(tmp_path / "a.jsonl", record("7"), lossy, lossy)
    tokenizer = tokenizer_with(TEMPLATES[template])
    rows, report = data.tokenize(path, tokenizer)
    assert report.counts == {reason: 2}
    assert len(rows) == (1 if reason in DROPPED else 3)
    (line,) = [line for line in str(report).splitlines() if f"(lines 2, 3 of {path})" in line]
    separator = "" if example.startswith(":") else ", "
    assert line.endswith(f"; line 2 of {path}{separator}{example}")
    with pytest.raises(ValueError, match=r"`strict` .* lost, and line 2 of .* would be") as error:
        data.tokenize(path, tokenizer, strict=True)
    assert example in str(error.value)
    assert data.tokenize([record("7")], tokenizer, strict=True)[1].counts == {}


def test_other_space_between_words_loses_nothing():
    spaces = record("<think>\n so,  2 and 5 </think>\n\n7", prompt=(("user", "2 +\t5?"),))
    template = chat("{{ m.content.split() | join(' ') }}")
    _, report = data.tokenize([spaces], tokenizer_with(template))
    assert report.counts == {}


def test_the_account_is_kept_with_a_cache(tmp_path):
    _, lossy, _ = LOSSES["tools_lost"]
    path = write(tmp_path / "a.jsonl", lossy)
    tokenizer = tokenizer_with(TEMPLATES["text alone"])
    first, second = (data.tokenize(path, tokenizer, cache=tmp_path / "c")[1] for _ in range(2))
    assert str(first) == str(second)
    assert "tools" in str(second)


NOTES = {
    "empty_completion": ("text alone", record(""), "`chosen`"),
    "message_keys_unused": (
        "text alone",
        record({"role": "assistant", "content": "7", "written": "today"}),
        "`written`",
    ),
    "template_arguments_unused": (
        "text alone",
        record("7") | {"chat_template_kwargs": {"enable_thinking": False}},
        "`enable_thinking`",
    ),
    "prompt_not_kept": ("generation prompt that thinks", record("7"), ""),
}


@pytest.mark.parametrize("reason", NOTES)
def test_what_is_odd_is_noted(reason):
    template, odd, example = NOTES[reason]
    rows, report = data.tokenize([odd], tokenizer_with(TEMPLATES[template]), strict=True)
    assert (len(rows), report.noted) == (1, {reason: 1})
    assert report.places[reason].endswith(example)


def test_the_answer_is_not_looked_for_in_the_question():
    """The template drops the answer's text, which the question holds, too."""
    turn = "{{ m.content if m.role == 'user' else '' }}"
    lossy = record("7", "8", prompt=(("user", "Is it 7 or 8?"),))
    _, report = data.tokenize([lossy], tokenizer_with(chat(turn)))
    assert report.dropped == {"answer_not_rendered": 1}


BAD_COLUMNS = [
    ({"tools": '[{"name": "a"'}, "`tools` in line 2 of .* must be JSON if it is text, .* ends"),
    ({"tools": "[1, x]"}, "`tools` in line 2 of .* character 5 of it: Expecting value; found 'x]'"),
    ({"tools": "[1]"}, r"`tools` in line 2 of .* must be a list of tools.*; got \[1\]"),
    ({"chat_template_kwargs": "[]"}, "`chat_template_kwargs` in line 2 of .* by name"),
]


@pytest.mark.parametrize(("columns", "message"), BAD_COLUMNS)
def test_columns_for_the_template_are_named_with_their_place(columns, message, tmp_path):
    path = write(tmp_path / "a.jsonl", record("7"), record("7", **columns))
    with pytest.raises(ValueError, match=message):
        data.tokenize(path, tokenizer_with(TEMPLATES["all"]))


def test_columns_for_the_template_may_be_json_text():
    template = chat("{{ m.content }}", "{{ style }}" + TOOLS)
    values = {"tools": [{"name": "add"}], "chat_template_kwargs": {"style": "short"}}
    as_text = {name: json.dumps(value) for name, value in values.items()}
    tokenizer = tokenizer_with(template)
    records = [record("7", **columns) for columns in (values, as_text)]
    rows, _ = data.tokenize(records, tokenizer)
    assert rows[0] == rows[1]
    assert tokenizer.decode(rows[0]["prompt_ids"]).startswith('short[{"name": "add"}]<user>')
    blank = record("7", tools="", chat_template_kwargs=" ")
    rows, _ = data.tokenize([blank, record("7")], tokenizer)
    assert rows[0] == rows[1]


def test_tools_beside_texts_are_listed_as_not_used():
    text = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": "[]"}
    assert str(data.read([text])).endswith("not used: `tools`")
