"""Where completions start, BOS and EOS, limits and reports."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_eqx import data
from dpo_eqx.data._records.prompts import split_shared_prompt

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
BYTES = data.ByteTokenizer()
BOS, EOS = BYTES.bos_token_id, BYTES.eos_token_id


def record(prompt="Why?", chosen=" So.", rejected=" No."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def one(records, tokenizer=BYTES, **settings):
    (row,), report = data.tokenize([records], tokenizer, **settings)
    return row, report


SPLITS = [
    ("Q: a. A: yes", "Q: a. A: no", ("Q: a. A:", " yes", " no")),
    ("Q:yes", "Q:no", ("Q:", "yes", "no")),
    ("abc", "abcd", ("ab", "c", "cd")),
    ("abc", "abc", ("ab", "c", "c")),
    ("", "abc", ("", "", "abc")),
    ("", "", ("", "", "")),
    # TRL looks at the character before the first here, which is the last: `chosen[-1]`.
    ("yes ", "no", ("", "yes ", "no")),
    ([1, 2, 3], [1, 2, 4, 5], ([1, 2], [3], [4, 5])),
]


@pytest.mark.parametrize(("chosen", "rejected", "want"), SPLITS)
def test_the_shared_prompt(chosen, rejected, want):
    assert split_shared_prompt(chosen, rejected) == want
    swapped = split_shared_prompt(rejected, chosen)
    assert swapped == (want[0], want[2], want[1])


def test_all_shared_turns_are_prompt():
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row, _ = one({"chosen": turns + " yes", "rejected": turns + " no"})
    assert BYTES.decode(row["prompt_ids"]) == turns


def test_the_byte_tokenizer():
    row, report = one(record(prompt="ä"))
    assert row == {
        "prompt_ids": [BOS, 0xC3, 0xA4],
        "chosen_ids": [*b" So.", EOS],
        "rejected_ids": [*b" No.", EOS],
    }
    assert BYTES.decode(row["prompt_ids"] + row["chosen_ids"]) == "ä So."
    assert report.tokens == 13


class Toy:
    """Words of two letters, the last of odd length, and special tokens as told."""

    def __init__(self, *, bos=None, eos=None, adds_eos=False, parses="", **names):
        self.bos_token_id, self.eos_token_id = bos, eos
        self.adds_eos, self.parses = adds_eos, parses
        vars(self).update(names)

    def encode(self, text):
        end = [self.eos_token_id] if self.adds_eos else []
        if self.parses and text.endswith(self.parses):
            text, end = text.removesuffix(self.parses), [self.eos_token_id]
        words = [text[i : i + 2] for i in range(0, len(text), 2)]
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        return start + [1000 + sum(map(ord, word)) for word in words] + end


EOS_CASES = [
    Toy(eos=7),
    Toy(eos=7, adds_eos=True),
    Toy(eos=7, parses="</s>", eos_token="</s>"),
    Toy(eos=7, eos_token="</s>"),
    Toy(bos=5, eos=7),
]


@pytest.mark.parametrize("tokenizer", EOS_CASES)
@pytest.mark.parametrize("chosen", ["abcd", "abc", ""])
def test_eos_once_and_bos_at_the_start(tokenizer, chosen):
    row, _ = one(record("PPQQ", chosen, "xy"), tokenizer)
    for name in ("chosen_ids", "rejected_ids"):
        assert row[name].count(7) == 1
        assert row[name][-1] == 7
        assert 5 not in row[name]
    assert row["prompt_ids"] == [*([5] if tokenizer.bos_token_id else []), 1160, 1162]


def test_an_eos_that_the_text_has_is_not_added():
    tokenizer = Toy(eos=7, parses="</s>", eos_token="</s>")
    row, _ = one(record("PPQQ", "ab</s>", "xy"), tokenizer)
    assert row["chosen_ids"] == [1195, 7]


def test_a_bos_that_the_text_has_is_there_once():
    tokenizer = data.load_tokenizer(GOLDEN / "llama")
    row, _ = one(record(prompt="<s>Why?"), tokenizer)
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1


def test_without_eos():
    row, _ = one(record(), append_eos=False)
    assert row["chosen_ids"] == [*b" So."]
    with pytest.raises(ValueError, match=r"`tokenizer` must have an EOS.*`eos_token_id=`"):
        one(record(), Toy())
    assert one(record(), Toy(), eos_token_id=3)[0]["chosen_ids"][-1] == 3


def test_a_tokenizer_of_the_tokenizers_library():
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(GOLDEN / "gpt2" / "tokenizer.json"))
    whole = data.load_tokenizer(GOLDEN / "gpt2")
    assert one(record(), raw, eos_token_id=whole.eos_token_id) == one(record(), whole)


def test_a_token_across_the_boundary_goes_to_both_completions():
    # "PPQ|QR": the prompt's odd "Q" merges with what follows.
    row, report = one(record("PPQ", "Qab", "Zxy"), Toy(eos=7))
    assert row["prompt_ids"] == [1160]
    assert row["chosen_ids"] == [1162, 1195, 7]
    assert report.noted == {"boundary_moved": 1}
    # Only one answer merges, and the other starts there too.
    row, _ = one(record("PPQ", "Qab", ""), Toy(eos=7))
    assert (row["prompt_ids"], row["rejected_ids"]) == ([1160], [1081, 7])


@pytest.mark.parametrize(
    ("limits", "lengths", "cut"),
    [
        ({}, (5, 5, 4), {}),
        ({"max_length": 9}, (5, 4, 4), {"chosen_cut": 1}),
        ({"max_length": 6}, (5, 1, 1), {"chosen_cut": 1, "rejected_cut": 1}),
        ({"max_completion_length": 4}, (5, 4, 4), {"chosen_cut": 1}),
        ({"max_prompt_length": 3}, (3, 5, 4), {"prompt_cut": 1}),
        ({"max_prompt_length": 3, "max_length": 7}, (3, 4, 4), {"prompt_cut": 1, "chosen_cut": 1}),
        (
            {"max_completion_length": 3, "max_length": 9},
            (5, 3, 3),
            {"chosen_cut": 1, "rejected_cut": 1},
        ),
    ],
)
def test_limits(limits, lengths, cut):
    row, report = one(record("Why?", " So.", " No"), **limits)
    assert tuple(len(row[name]) for name in row) == lengths
    assert report.cut == cut
    whole, _ = one(record("Why?", " So.", " No"))
    assert row["prompt_ids"] == whole["prompt_ids"][-lengths[0] :], "prompts keep their end"
    assert row["chosen_ids"] == whole["chosen_ids"][: lengths[1]], "completions keep their start"


def test_a_prompt_that_fills_the_length_is_dropped_and_counted(tmp_path):
    records = [record(), record(prompt="Why on earth?"), record()]
    rows, report = data.tokenize(records, BYTES, max_length=14)
    assert len(rows) == report.kept == 2
    assert report.dropped == {"prompt_fills_max_length": 1}
    _, on_disk = data.tokenize(records, BYTES, max_length=14, cache=tmp_path)
    for each in (report, on_disk):
        assert each.without_row == [1]
        assert each.numbers_of_rows().tolist() == [0, 2]
    assert "dropped 1: the prompt alone has `max_length` tokens or more (records 1)" in str(report)


def test_empty_completions():
    rows, report = data.tokenize([record(rejected="")], BYTES)
    assert rows[0]["rejected_ids"] == [EOS]
    assert report.noted == {"empty_completion": 1}
    rows, report = data.tokenize([record(rejected="")], BYTES, append_eos=False)
    assert (rows, report.dropped) == ([], {"no_completion_token": 1})


@pytest.mark.parametrize(
    ("bad", "limits", "match"),
    [
        (record(prompt="Why on earth?"), {"max_length": 14}, "record 1 .*prompt alone"),
        (record(chosen=" So it is."), {"max_length": 12}, "record 1 .*chosen completion cut"),
        (record(prompt="Why so?"), {"max_prompt_length": 6}, "record 1 .*prompt cut"),
        (record(rejected=" So."), {}, "record 1 .*chosen and rejected are the same"),
    ],
)
def test_strict(bad, limits, match):
    with pytest.raises(ValueError, match=match):
        data.tokenize([record(), bad], BYTES, strict=True, **limits)
    data.tokenize([record(), bad], BYTES, **limits)


def test_identical_completions_are_kept_and_counted():
    rows, report = data.tokenize([record(rejected=" So.")], BYTES)
    assert len(rows) == 1
    assert report.noted == {"identical_completions": 1}


def test_ids_beyond_the_vocabulary_are_named():
    with pytest.raises(ValueError, match=r"ids below `vocab_size`, 257; record 0 .* has 257"):
        one(record(), vocab_size=257)
    one(record(), vocab_size=258)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_bad_limits_are_named(value):
    with pytest.raises(ValueError, match="`max_length` must be a positive integer"):
        one(record(), max_length=value)


def test_records_of_ids_and_numbers_pass_through():
    given = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "weight": 2}
    given |= {"beta": 0.5, "ref_chosen_logps": -1, "reference_rejected": -2.5}
    row, _ = one(given, None)
    want = {"weight": 2.0, "beta": 0.5, "reference_chosen": -1.0, "reference_rejected": -2.5}
    assert (
        row == {name: given[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} | want
    )


def test_unpaired():
    row, report = one({"prompt": "Why?", "completion": " So.", "label": 0})
    assert row == {"prompt_ids": [BOS, *b"Why?"], "completion_ids": [*b" So.", EOS], "label": False}
    assert report.form.endswith("unpaired, text: `prompt`, `completion`, `label`")


CONVERSATION = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "So."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{{ mood or '' }}{% for m in messages %}[{{ m.role }}]"
    "{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def templated():
    tokenizer = data.load_tokenizer(GOLDEN / "gpt2")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_chat_template_says_all_and_nothing_is_added(templated):
    row, _ = one(CONVERSATION, templated)
    assert templated.decode(row["prompt_ids"]) == "[user]Why?;[assistant]"
    assert templated.decode(row["chosen_ids"]) == "So.;"


def test_tools_and_template_arguments_are_passed_on(templated):
    tool = {"type": "function", "function": {"name": "look"}}
    row, _ = one(CONVERSATION, templated, tools=[tool], template_arguments={"mood": "!"})
    assert templated.decode(row["prompt_ids"]).startswith('[{"type": "function"')
    assert "]![user]" in templated.decode(row["prompt_ids"])
    own = CONVERSATION | {"tools": '[{"name": "own"}]', "chat_template_kwargs": {"mood": "?"}}
    row, _ = one(own, templated, tools=[tool], template_arguments={"mood": "!"})
    assert templated.decode(row["prompt_ids"]).startswith('[{"name": "own"}]?[user]')


def test_implicit_conversations(templated):
    whole = {name: CONVERSATION["prompt"] + CONVERSATION[name] for name in ("chosen", "rejected")}
    assert one(whole, templated)[0] == one(CONVERSATION, templated)[0]


def test_no_template_or_a_failing_one_is_named(templated):
    with pytest.raises(ValueError, match=r"must have a chat template .*ByteTokenizer has none"):
        one(CONVERSATION)
    with pytest.raises(ValueError, match="must have a chat template"):
        one(CONVERSATION, data.load_tokenizer(GOLDEN / "llama"))
    row, _ = one(
        CONVERSATION,
        data.load_tokenizer(GOLDEN / "gpt2"),
        template_arguments={"chat_template": TEMPLATE},
    )
    assert row == one(CONVERSATION, templated)[0]
    bad = {"chat_template": "{{ raise_exception('no user') }}"}
    with pytest.raises(ValueError, match=r"refuses the conversation .*record 0 .*: no user"):
        one(CONVERSATION, templated, template_arguments=bad, strict=True)


def test_no_tokenizer_is_named(tmp_path):
    for name, message in ((None, "has no file of one"), ("tokenizer.json", "does not load")):
        if name is not None:
            (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=rf"`path` must hold a tokenizer; .* {message}"):
            data.load_tokenizer(tmp_path)


def test_no_notice_is_printed_that_pytorch_is_missing():
    command = f"from dpo_eqx import data; data.load_tokenizer({str(GOLDEN / 'llama')!r})"
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    result = run([sys.executable, "-c", command], cwd=Path(__file__).parents[2])
    assert result.stdout + result.stderr == ""


def test_an_eos_that_begins_in_the_shared_prompt_occurs_once():
    tokenizer = data.load_tokenizer(GOLDEN / "gpt2")
    eos = tokenizer.eos_token
    row, _ = one({"chosen": f"Hi {eos}", "rejected": f"Hi {eos[:3]}x"}, tokenizer)
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == f"Hi {eos}"
    # A prompt that ends with the EOS still gets an answer, of the EOS alone.
    row, _ = one(record(prompt=f"Hi{eos}", chosen=""), tokenizer)
    assert row["chosen_ids"] == [tokenizer.eos_token_id]


def test_a_completion_of_which_nothing_is_scored_is_dropped():
    tokenizer = data.load_tokenizer(GOLDEN / "gpt2")  # has no BOS before the text
    rows, report = data.tokenize([record(prompt="", rejected=""), record()], tokenizer)
    assert (len(rows), report.dropped) == (1, {"nothing_scored": 1})
    ids = {"prompt_ids": [], "completion_ids": [3], "label": True}
    assert data.tokenize([ids], None)[1].dropped == {"nothing_scored": 1}


def test_a_saved_truncation_and_padding_are_off():
    import tokenizers

    plain = tokenizers.Tokenizer.from_file(str(GOLDEN / "gpt2" / "tokenizer.json"))
    limited = tokenizers.Tokenizer.from_str(plain.to_str())
    limited.enable_truncation(2)
    limited.enable_padding(length=12)
    rows = [one(record(), tokenizer, eos_token_id=0)[0] for tokenizer in (plain, limited)]
    assert rows[0] == rows[1]
    assert limited.truncation is not None, "the user's own stays as it is"
