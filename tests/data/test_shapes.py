"""Public layouts of preferences become the same rows: other names, messages, verdicts."""

import json

import pytest

from dpo_eqx import data
from dpo_eqx.cli.terminal.prompts import encode_prompt, read_prompts

from .chat import chat_tokenizer, texts

ASK = "Where do otters sleep?"
GOOD, BAD = "They sleep afloat.", "They do not."
USER = {"role": "user", "content": ASK}
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def said(text):
    return {"role": "assistant", "content": text}


def whole(text):
    return [USER, said(text)]


def from_value(*turns):
    return [{"from": role, "value": text} for role, text in turns]


SHARE = {
    name: {"from": "gpt", "value": text} for name, text in (("chosen", GOOD), ("rejected", BAD))
}
RESPONSES = {"response_1": BAD, "response_2": GOOD}
ARENA = {"conversation_a": whole(GOOD), "conversation_b": whole(BAD), "model_a": "m", "turn": 1}
SHP = {"history": ASK, "human_ref_A": GOOD, "human_ref_B": BAD, "score_A": 9, "score_B": 3}
WEBGPT = {"answer_0": BAD, "answer_1": GOOD, "score_0": -0.5, "score_1": 0.5}
LISTS = {"prompt": [ASK], "response_a": [GOOD], "response_b": [BAD]}
HUMAN = from_value(("human", ASK))
# All of them ask the same and prefer the same answer.
CONVERSATIONS = {
    "LLaMA-Factory, ShareGPT": {"conversations": HUMAN} | SHARE,
    "ShareGPT, whole": {
        "chosen": from_value(("human", ASK), ("gpt", GOOD)),
        "rejected": from_value(("human", ASK), ("gpt", BAD)),
    },
    "one message as a dict": {"prompt": ASK, "chosen": said(GOOD), "rejected": said(BAD)},
    "dicts everywhere": {"prompt": USER, "chosen": said(GOOD), "rejected": said(BAD)},
    "answers of text": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "JSON text": {"chosen": json.dumps(whole(GOOD)), "rejected": json.dumps(whole(BAD))},
    "messages before answers": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "ms-swift": {"messages": whole(GOOD), "rejected_response": BAD},
    "ms-swift, whole": {"messages": whole(GOOD), "rejected_messages": whole(BAD)},
    "ms-swift, query": {"query": ASK, "response": GOOD, "rejected_response": BAD},
    "Argilla": {"instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD},
    "OpenAI": {
        "input": {"messages": [USER], "tools": []},
        "preferred_output": [said(GOOD)],
        "non_preferred_output": [said(BAD)],
    },
    "better and worse": {"question": ASK, "answer_better": GOOD, "answer_worse": BAD},
    "stack-exchange-paired": {"question": ASK, "response_j": GOOD, "response_k": BAD, "qid": 1},
    "UltraInteract": {
        "trajectory": [{"from": "user", "value": ASK}],
        "chosen": GOOD,
        "rejected": BAD,
        "id": "1",
    },
    "other roles": {
        "chosen": [{"role": "human", "content": ASK}, {"role": "gpt", "content": GOOD}],
        "rejected": [{"role": "human", "content": ASK}, {"role": "gpt", "content": BAD}],
    },
    "HelpSteer3": {
        "domain": "general",
        "language": "english",
        "context": [USER],
        "response1": GOOD,
        "response2": BAD,
        "overall_preference": -2,
        "individual_preference": [{"score": -2, "reasoning": "Better."}],
    },
    "SHP, A": SHP | {"labels": 1},
    "SHP, B": SHP | {"labels": 0, "human_ref_A": BAD, "human_ref_B": GOOD},
    "Chatbot Arena": ARENA | {"winner": "model_a", "language": "English"},
    "MT-bench": ARENA
    | {"winner": "model_b", "conversation_a": whole(BAD)}
    | {"conversation_b": whole(GOOD)},
    "Arena of 55k": {name: json.dumps(value) for name, value in LISTS.items()}
    | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
    "WebGPT": WEBGPT | {"question": {"full_text": ASK, "dataset": "eli5"}},
    "AlpacaFarm": {
        "instruction": ASK,
        "input": "",
        "output_1": BAD,
        "output_2": GOOD,
        "preference": 2,
    },
}
TEXTS = {
    "other names": {"prompt": ASK, "chosen_response": GOOD, "rejected_response": BAD},
    "mixed names": {"prompt": ASK, "chosen": GOOD, "rejected_response": BAD},
    "preferred": {"prompt": ASK, "preferred": GOOD, "dispreferred": BAD, "chosen_score": 1},
    "HelpSteer2": RESPONSES | {"prompt": ASK, "preference_strength": 3},
    "PKU-SafeRLHF": {
        "prompt": ASK,
        "response_0": BAD,
        "response_1": GOOD,
        "better_response_id": 1,
        "safer_response_id": 0,
    },
    "a winner": {"prompt": ASK, "response_a": BAD, "response_b": GOOD, "winner": "B"},
    "scores": {"prompt": ASK, "response_A": GOOD, "response_B": BAD, "score_A": 2, "score_B": 1},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name, tokenizer, tmp_path):
    (row,), report = data.tokenize([CONVERSATIONS[name]], tokenizer)
    assert texts(tokenizer, row) == (f"[user]{ASK};[assistant]", GOOD + ";", BAD + ";")
    assert not report.left_out
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(CONVERSATIONS[name]))
    (prompt,) = read_prompts(str(path), None)
    assert encode_prompt(tokenizer, prompt, chat=False) == row["prompt_ids"]


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name):
    records = data.read([TEXTS[name]])
    assert list(records) == [{"prompt": ASK, "chosen": GOOD, "rejected": BAD}]
    assert " from `" in str(records)


def test_an_exchange_of_several_turns(tokenizer):
    """System, tools and calls of ShareGPT; a system column; more than one question."""
    call = {"name": "nap", "arguments": {"place": "kelp"}}
    turns = from_value(("human", ASK), ("function_call", json.dumps(call)), ("observation", "yes"))
    record = {"system": "Be brief.", "conversations": turns} | SHARE
    (got,) = data.read([record])
    assert got["prompt"] == [
        BRIEF,
        USER,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "yes"},
    ]
    in_turns = from_value(("system", "Be brief."), ("human", ASK), ("gpt", "Hm?"), ("human", "So?"))
    (row,), _ = data.tokenize([{"conversations": in_turns} | SHARE], tokenizer)
    assert texts(tokenizer, row)[0] == (
        f"[system]Be brief.;[user]{ASK};[assistant]Hm?;[user]So?;[assistant]"
    )


def test_lists_of_several_turns():
    lists = {"prompt": ["1?", "2?"], "response_a": ["1.", "2."], "response_b": ["3.", None]}
    record = {name: json.dumps(value) for name, value in lists.items()}
    (got,) = data.read([record | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}])
    assert [turn["content"] for turn in got["chosen"]] == ["1?", "3.", "2?", ""]
    assert [turn["content"] for turn in got["rejected"]] == ["1?", "1.", "2?", "2."]


UNPAIRED = {
    "KTO of ms-swift": {"messages": whole(GOOD), "label": True},
    "KTO of LLaMA-Factory": {"conversations": from_value(("human", ASK), ("gpt", GOOD))}
    | {"kto_tag": True},
    "messages and a dict": {"prompt": [USER], "completion": said(GOOD), "label": True},
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_single_completions(name):
    (got,) = data.read([UNPAIRED[name]])
    assert got == {"prompt": [USER], "completion": [said(GOOD)], "label": True}


def test_single_responses_of_text():
    (got,) = data.read([{"prompt": ASK, "response": GOOD, "label": False}])
    assert got == {"prompt": ASK, "completion": GOOD, "label": False}


TIES = {
    "HelpSteer2": RESPONSES | {"prompt": ASK, "preference_strength": 0},
    "Chatbot Arena": ARENA | {"winner": "tie"},
    "both bad": ARENA | {"winner": "tie (bothbad)"},
    "both bad, 100k": ARENA | {"winner": "both_bad"},
    "WebGPT": WEBGPT | {"question": ASK, "score_0": 0.5},
    "Arena of 55k": CONVERSATIONS["Arena of 55k"] | {"winner_model_a": 0, "winner_tie": 1},
}


@pytest.mark.parametrize("name", TIES)
def test_a_tie_is_left_out_and_counted(name):
    # The first record may be a tie as well.
    known = CONVERSATIONS | TEXTS
    other = known[name if name in known else "Chatbot Arena"]
    records = data.read([TIES[name], other, TIES[name]])
    (got,) = records
    assert records.left_out == {"records whose answers are equally good": 2}
    assert [got] == list(data.read([other]))
    with pytest.raises(ValueError, match=r"holds no records.*left out 1: records whose answers"):
        list(data.read([TIES[name]]))


def test_the_report_counts_ties(tokenizer, tmp_path):
    records = [TIES["Chatbot Arena"], CONVERSATIONS["Chatbot Arena"]]
    for _ in range(2):  # written, then read from the cache
        path = tmp_path / "arena.json"
        path.write_text(json.dumps(records))
        _, report = data.tokenize(data.read(path), tokenizer, cache=tmp_path)
        assert "left out 1: records whose answers are equally good" in str(report)
        assert report.read == 1


def test_ties_can_count_half_each_way():
    records = list(data.read([CONVERSATIONS["Chatbot Arena"], TIES["Chatbot Arena"]], ties="half"))
    assert [record["weight"] for record in records] == [1.0, 0.5, 0.5]
    assert records[1]["chosen"] == records[2]["rejected"] == whole(GOOD)
    weighted = TIES["Chatbot Arena"] | {"weight": 3}
    assert [record["weight"] for record in data.read([weighted], ties="half")] == [1.5, 1.5]


def test_a_generator_that_begins_with_ties_is_read_whole():
    made = (r for r in [TIES["Chatbot Arena"], CONVERSATIONS["Chatbot Arena"]] * 2)
    records = data.read(made)
    assert records.form.conversational
    assert len(list(records)) == 2
    assert records.left_out.total() == 2


BAD_RECORDS = [
    (ARENA | {"winner": "model_c"}, "`winner` in record 1 .* must name a or b, or say .*'model_c'"),
    (RESPONSES | {"prompt": ASK, "preference_strength": "much"}, "must be a finite number; got"),
    (SHP | {"labels": 2}, "`labels` in record 1 .* must be 1 for the first answer or 0; got 2"),
    ({"conversations": "Hi"} | SHARE, "`conversations` in record 1 .* must be messages like"),
    (RESPONSES | {"prompt": ASK, "response_1": None} | {"preference_strength": 1}, "`response_1`"),
    ({"question": 3} | WEBGPT, "`question` in record 1 .* must be text"),
]


@pytest.mark.parametrize(("record", "match"), BAD_RECORDS)
def test_a_bad_record_is_named(record, match):
    first = next(r for r in (CONVERSATIONS | TEXTS).values() if r.keys() >= record.keys())
    with pytest.raises(ValueError, match=match):
        list(data.read([first, record]))


def test_records_without_a_verdict_are_counted():
    good = RESPONSES | {"prompt": ASK, "preference_strength": 3}
    records = data.read([good, good | {"preference_strength": None}])
    assert len(list(records)) == 1
    assert records.left_out == {"records with fewer than two answers that have a score": 1}


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="`ties` must be one of `drop`, `half`; got 'keep'"):
        data.read([], ties="keep")
    with pytest.raises(ValueError, match=r"`pairs` must be one of .*; got 'some'"):
        data.read([], pairs="some")


OURS = [
    {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "response_a": BAD}
    | {"response_b": "y", "winner": "b"},
    {"chosen": whole(GOOD), "rejected": whole(BAD), "messages": whole(GOOD)},
]


@pytest.mark.parametrize("record", OURS)
def test_our_own_columns_come_first(record):
    (got,) = data.read([record])
    assert (got["chosen"], got["rejected"]) == (record["chosen"], record["rejected"])
