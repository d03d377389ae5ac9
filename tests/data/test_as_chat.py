"""`as_chat`: texts as turns, from the records to the ids, and what it refuses."""

import pytest

from dpo_eqx import data

from .chat import chat_tokenizer, texts


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def shown(record):
    rows, _ = data.tokenize(data.read([record], as_chat=True), chat_tokenizer())
    return texts(chat_tokenizer(), rows[0])


START = "\n\nHuman: What is it?\n\nAssistant:"
DIALOGUE = START + " A cat.\n\nHuman: And that?\n\nAssistant:"
ASKED = "[user]What is it?;[assistant]"
LONGER = "[user]What is it?;[assistant]A cat.;[user]And that?;[assistant]"
CASES = {
    "prompt": (
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        ("[user]Why?;[assistant]", "So.;", "No.;"),
    ),
    "unpaired": (
        {"prompt": "Why?", "completion": "So.", "label": True},
        ("[user]Why?;[assistant]", "So.;"),
    ),
    "dialogue in a prompt": (
        {"prompt": DIALOGUE, "chosen": " A dog.", "rejected": " No."},
        (LONGER, " A dog.;", " No.;"),
    ),
    "dialogue in the answers": (
        {"chosen": START + " A cat.", "rejected": START + " A bat."},
        (ASKED, "A cat.;", "A bat.;"),
    ),
    "longer dialogue": (
        {"chosen": DIALOGUE + " I see.", "rejected": DIALOGUE + " I say."},
        (LONGER, "I see.;", "I say.;"),
    ),
    "system": (
        {"system": "Be kind.", "prompt": "Why?", "chosen": "So.", "rejected": "No."},
        ("[system]Be kind.;[user]Why?;[assistant]", "So.;", "No.;"),
    ),
    "question": (
        {"question": "Why?", "chosen": "So.", "rejected": "No."},
        ("[user]Why?;[assistant]", "So.;", "No.;"),
    ),
    "conversation": (
        {
            "prompt": turns(("user", "Why?")),
            "chosen": turns(("assistant", "So.")),
            "rejected": turns(("assistant", "No.")),
        },
        ("[user]Why?;[assistant]", "So.;", "No.;"),
    ),
    "scores": (
        {"prompt": "Why?", "responses": ["So.", "No."], "scores": [2, 1]},
        ("[user]Why?;[assistant]", "So.;", "No.;"),
    ),
    "a colon is no turn": (
        {"prompt": "Human rights: why?", "chosen": "So.", "rejected": "No."},
        ("[user]Human rights: why?;[assistant]", "So.;", "No.;"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_texts_become_turns(case):
    record, wanted = CASES[case]
    assert shown(record) == wanted


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "Why? So.", "rejected": "Why? No."}, "`chosen` in record 0 .* must begin with"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, "record 0 .* holds token id"),
    ],
)
def test_what_has_no_turns_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        list(data.read([record], as_chat=True))


def test_the_choice_is_part_of_the_key_of_the_cache(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "No."}')
    rows = [
        data.tokenize(data.read(path, as_chat=chat), chat_tokenizer(), cache=tmp_path / "cache")[0]
        for chat in (False, True)
    ]
    assert rows[0][0]["prompt_ids"] != rows[1][0]["prompt_ids"]
