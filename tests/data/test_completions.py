"""Records to imitate: a prompt with its completion, a conversation, or a text alone."""

import json

import numpy as np
import pytest

from dpo_eqx import data
from dpo_eqx.data import ByteTokenizer

from .chat import chat_tokenizer

ASK, AGAIN = ({"role": "user", "content": text} for text in ("Why?", "And then?"))
SO, THEN = ({"role": "assistant", "content": text} for text in ("So.", "That."))
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [ASK, SO, AGAIN, THEN]


@pytest.mark.parametrize(
    ("record", "form", "checked"),
    [
        ({"prompt": "a", "completion": "b"}, "completion, text: `prompt`, `completion`", None),
        ({"prompt": [ASK], "completion": [SO]}, "completion, conversations: ", None),
        ({"prompt_ids": [1], "completion_ids": [2]}, "completion token ids: ", None),
        ({"text": "So it is."}, "text, text: `text`", None),
        ({"messages": TURNS}, "messages, conversations: `messages`", None),
        # Alpaca with its answer named, UltraChat, and ShareGPT with a system turn.
        (
            {"instruction": "Add.", "input": "1 1", "completion": "2"},
            "completion, conversations: `prompt`, `completion`; turns from `instruction`, `input`",
            {
                "prompt": [{"role": "user", "content": "Add.\n1 1"}],
                "completion": [{"role": "assistant", "content": "2"}],
            },
        ),
        (
            {"prompt": "Why?", "messages": TURNS},
            "messages, conversations: `messages`; not used: `prompt`",
            {"messages": TURNS},
        ),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
            | {"system": "Be brief."},
            "messages, conversations: `messages`; turns from `system`",
            {"messages": [SYSTEM, ASK, SO]},
        ),
        (
            {"messages": json.dumps([ASK, SO])},
            "messages, conversations: `messages`",
            {"messages": [ASK, SO]},
        ),
        ({"messages": [ASK, SO], "tools": []}, "messages, conversations: `messages`", None),
        # Labels and preferences come first.
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired, text: ", None),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "text": "d"}, "explicit prompt, ", None),
    ],
)
def test_forms(record, form, checked):
    records = data.read([record])
    assert str(records.form).startswith(form)
    (got,) = records
    assert got == (checked or {name: record[name] for name in got})


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"prompt": "Who?", "messages": TURNS}, "`prompt` in record 0 .* reads like the prompt"),
        ({"prompt": "Who?", "text": "So it is."}, "`prompt` in record 0 .* reads like the prompt"),
        ({"prompt": "a", "completions": "b"}, "nearest is `explicit prompt`"),
        ({"completion": "b"}, "nearest is `completion`.*missing: `prompt`"),
        ({"text": 3}, "`text` in record 0 .* must be text; got 3"),
    ],
)
def test_bad_records(record, error):
    with pytest.raises(ValueError, match=error):
        list(data.read([record]))


def test_a_conversation_without_an_answer_is_left_out():
    records = data.read([{"messages": TURNS}, {"messages": TURNS[:3]}])
    rows, report = data.tokenize(records, chat_tokenizer())
    assert len(rows) == 1
    assert "left out 1: conversations that do not end with a turn of the assistant" in str(report)


def scored_text(record, **settings):
    """The texts of the tokens that are scored, and the text before the completion."""
    tokenizer = settings.pop("tokenizer", None) or chat_tokenizer()
    (row,), _ = data.tokenize([record], tokenizer, **settings)
    batch = next(data.batches([row], batch_size=1, kl=False))
    ids, mask = batch.completion.ids[0], batch.completion.mask[0]
    assert batch.label.tolist() == [True]
    return tokenizer.decode(ids[mask]), tokenizer.decode(batch.prompt.ids[0][batch.prompt.mask[0]])


def test_what_is_scored_of_a_conversation():
    """The last answer, or with `assistant` each of them; never a word of the user's."""
    for score in ("completion", "last", "assistant"):
        text, before = scored_text({"messages": TURNS}, score=score)
        assert "That." in text
        assert ("So." in text) == (score == "assistant")
        assert "Why?" not in text
        assert "And then?" not in text
        assert ("So." in before) == (score != "assistant")
    two = [ASK, SO, THEN]
    text, _ = scored_text({"messages": two})
    assert text.index("So.") < text.index("That."), "both turns at the end are the answer"
    assert "So." not in scored_text({"messages": two}, score="last")[0]


def test_a_conversation_is_its_prompt_and_completion():
    tokenizer = chat_tokenizer()
    (one,), _ = data.tokenize([{"messages": TURNS}], tokenizer)
    (other,), _ = data.tokenize([{"prompt": TURNS[:3], "completion": TURNS[3:]}], tokenizer)
    assert one == other


def test_all_of_a_text_is_scored_after_its_first_token():
    tokenizer = ByteTokenizer()
    (row,), report = data.tokenize([{"text": "So."}], tokenizer)
    assert row["prompt_ids"] + row["completion_ids"] == [257, *b"So.", 256]
    assert report.counts == {}
    batch = next(data.batches([row], batch_size=1, kl=False))
    assert batch.completion.mask.sum() == 4

    (row,), report = data.tokenize([{"text": "So."}], WithoutStart())
    batch = next(data.batches([row], batch_size=1, kl=False))
    assert batch.prompt.ids[0, 0] == ord("S"), "the first token has none before it"
    assert batch.completion.mask.sum() == 3
    assert report.counts == {"nothing_before_completion": 1}


class WithoutStart:
    """The bytes of a text, without a BOS."""

    eos_token_id = 256

    def encode(self, text):
        return list(text.encode())


def test_long_answers_are_cut_and_told():
    rows, report = data.tokenize([{"text": "So it is."}], ByteTokenizer(), max_length=5)
    assert len(rows[0]["prompt_ids"] + rows[0]["completion_ids"]) == 5
    assert report.cut == {"completion_cut": 1}


def test_held_out_conversations_share_no_prompt():
    """Two conversations that begin alike are on one side, whatever follows."""
    asks = [{"role": "user", "content": f"Why {n}?"} for n in range(20)]
    records = [{"messages": [ask, answer]} for ask in asks for answer in (SO, THEN)]
    training, held_out = data.hold_out(data.read(records), 0.5)
    asked = [{r["messages"][0]["content"] for r in part} for part in (training, held_out)]
    assert all(asked)
    assert not asked[0] & asked[1]
    training, held_out = data.hold_out(data.read([{"text": str(n)} for n in range(20)]), 0.5)
    assert len(list(training)) + len(list(held_out)) == 20
    assert list(held_out)


def test_chat_of_a_text():
    text = "Human: Why?\n\nAssistant: So."
    (got,) = data.read([{"text": text}], as_chat=True)
    assert got == {"messages": [ASK, SO]}
    with pytest.raises(ValueError, match=r"`text` .* must begin with `Human:`"):
        list(data.read([{"text": "So it is."}], as_chat=True))


def test_rows_come_back_from_the_disk(tmp_path):
    records = [{"prompt": f"{n}", "completion": "b" * n} for n in range(1, 5)]
    rows, _ = data.tokenize(records, ByteTokenizer())
    stored, _ = data.tokenize(records, ByteTokenizer(), cache=tmp_path)
    assert list(stored) == rows


def test_weights_of_an_average_over_tokens():
    records = [{"prompt": "a", "completion": "b" * n, "weight": n + 1.0} for n in range(1, 4)]
    rows, _ = data.tokenize(records, ByteTokenizer())
    given = {"batch_size": 4, "shuffle": False, "kl": False}
    by_rows, by_tokens = (next(data.batches(rows, **given, average=a)) for a in ("rows", "tokens"))
    assert by_rows.weight.tolist() == [2, 3, 4, 0]
    # Each completion has its EOS, too.
    assert by_tokens.weight.tolist() == [2 * 2, 3 * 3, 4 * 4, 0]
    assert by_tokens.weight.dtype == np.float32
    pairs = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    with pytest.raises(
        ValueError, match='`average` must be "rows", or "tokens" for rows of single'
    ):
        data.batches(pairs, batch_size=1, average="tokens")
