"""What is scored of a conversation: the tokens of each choice, in rows, batches and caches."""

import json

import numpy as np
import pytest

from dpo_eqx import data

from .chat import TEMPLATE, chat_tokenizer

# The same text, with the assistant's words marked.
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[assistant]{% generation %}"
    "{{ m.content }};{% endgeneration %}{% else %}[{{ m.role }}]{{ m.content }};{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Earlier answers are shortened if a turn of the user follows, as templates drop reasoning.
UNSTABLE = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:1] }}")


def turns(*pairs, **keys):
    names = {"u": "user", "a": "assistant", "t": "tool", "s": "system"}
    return [{"role": names[role], "content": content} | keys for role, content in pairs]


ASKED = turns(("s", "Be kind."), ("u", "Why?"), ("a", "Because."), ("u", "And?"))
LONG = turns(("a", "Look."), ("t", "42"), ("a", "It is 42."))
SHORT = turns(("a", "No idea."))
PAIR = {"prompt": ASKED, "chosen": LONG, "rejected": SHORT}


def tokenizer_of(template):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def scored_texts(record, score, template=TEMPLATE, side="chosen", **limits):
    """The texts of the runs of scored tokens of one completion, joined by `|`."""
    tokenizer = tokenizer_of(template)
    (row,), _ = data.tokenize([record], tokenizer, score=score, **limits)
    ids = row[f"{side}_ids"]
    mask = row.get(f"{side}_mask", [True] * len(ids))
    assert len(mask) == len(ids)
    text, last = "", True
    for i, scored in zip(ids, mask, strict=True):
        text += ("" if last or not scored else "|") + (tokenizer.decode([i]) if scored else "")
        last = scored
    return text.removeprefix("|")


ALL = "Look.;[tool]42;[assistant]It is 42.;"
CHOICES = [("completion", ALL), ("assistant", "Look.;|It is 42.;"), ("last", "It is 42.;")]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
@pytest.mark.parametrize(("score", "wanted"), CHOICES)
def test_each_choice_scores_its_tokens(score, wanted, template):
    assert scored_texts(PAIR, score, template) == wanted
    assert scored_texts(PAIR, score, template, side="rejected") == "No idea.;"


def without(turn, weight=0):
    """The pair with a weight on one turn of the chosen answer."""
    chosen = [m | ({"weight": weight} if n == turn else {}) for n, m in enumerate(LONG)]
    return PAIR | {"chosen": chosen}


LEFT_OUT = [
    ("completion", 0, "[tool]42;[assistant]It is 42.;"),
    ("completion", 1, "Look.;|[assistant]It is 42.;"),
    ("completion", 2, "Look.;[tool]42;"),
    ("assistant", 0, "It is 42.;"),
    ("assistant", 1, "Look.;|It is 42.;"),
    ("assistant", 2, "Look.;"),
    ("last", 0, "It is 42.;"),
]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
@pytest.mark.parametrize(("score", "turn", "wanted"), LEFT_OUT)
def test_a_turn_of_weight_zero_is_not_scored(score, turn, wanted, template):
    assert scored_texts(without(turn), score, template) == wanted
    assert scored_texts(without(turn, weight=1), score, template) == dict(CHOICES)[score]


def test_the_ids_are_those_of_the_whole_completion():
    rows = [data.tokenize([PAIR], chat_tokenizer(), score=score)[0][0] for score, _ in CHOICES]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert all([row[n] for n in names] == [rows[0][n] for n in names] for row in rows)
    assert set(rows[0]) == set(names)


def test_the_only_turn_left_out_is_a_dropped_row():
    record = PAIR | {"rejected": turns(("a", "No idea."), weight=0)}
    rows, report = data.tokenize([record], chat_tokenizer())
    assert not rows
    assert report.dropped == {"nothing_scored": 1}
    # The last turn is cut off by the limit, so nothing that is scored remains.
    rows, report = data.tokenize([PAIR], chat_tokenizer(), score="last", max_completion_length=4)
    assert report.dropped == {"nothing_scored": 1}


def test_a_limit_cuts_ids_and_masks_alike():
    assert scored_texts(without(0), "completion", max_completion_length=12).startswith("[tool]4")
    assert scored_texts(PAIR, "assistant", max_completion_length=5) == "Look."


def test_an_unstable_template_is_an_error_that_names_the_row(tmp_path):
    path = tmp_path / "data.jsonl"
    single = {"prompt": turns(("u", "?")), "chosen": SHORT, "rejected": turns(("a", "Well."))}
    path.write_text(json.dumps(single) + "\n" + json.dumps(PAIR) + "\n")
    tokenizer = tokenizer_of(UNSTABLE)
    message = r"line 2 of .*: the chat template renders message \d \(from 0\) otherwise"
    for score in ("assistant", "last"):
        with pytest.raises(ValueError, match=message):
            data.tokenize(path, tokenizer, score=score)
    assert len(data.tokenize(path, tokenizer)[0]) == 2
    # The prompt itself is rendered otherwise before an answer.
    with pytest.raises(ValueError, match=r"record 0 of .*renders message 3 \(from 0\) otherwise"):
        data.tokenize([PAIR | {"chosen": turns(("a", "So."))}], tokenizer, score="last")


def test_marked_answers_need_no_stable_template():
    unstable = MARKED.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:2] }}")
    assert scored_texts(PAIR, "assistant", unstable) == "Lo;|It is 42.;"


def test_a_generation_prompt_with_more_text_ends_where_the_answer_differs():
    """Templates without reasoning put empty tags into the generation prompt, as Qwen's do."""
    template = TEMPLATE.replace("%}[assistant]{% endif", "%}[assistant]<think></think>{% endif")
    assert scored_texts(PAIR, "assistant", template) == "Look.;|It is 42.;"


def test_text_is_one_turn():
    record = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
    rows = [data.tokenize([record], data.ByteTokenizer(), score=s)[0] for s, _ in CHOICES]
    assert rows[0] == rows[1] == rows[2]
    assert "chosen_mask" not in rows[0][0]


WRONG = [
    ({}, {"score": "all"}, "`score` must be one of `completion`, `assistant`, `last`; got 'all'"),
    (without(0, weight=0.5), {}, "`weight` of message 0 of `chosen` in record 0 .* got 0.5"),
    (
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
        {"score": "last"},
        "`score` must be `completion` for records of token ids",
    ),
]


@pytest.mark.parametrize(("record", "choice", "message"), WRONG)
def test_wrong_choices(record, choice, message):
    with pytest.raises(ValueError, match=message):
        data.tokenize([record or PAIR], chat_tokenizer(), **choice)


def masked_rows():
    """Rows of ids with and without masks, one with an empty prompt."""
    return [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6, 7]}
        | {"chosen_mask": [False, True, True], "rejected_mask": [True, False]},
        {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [6, 7, 8, 9]}
        | {"rejected_mask": [False, True, False, True]},
        {"prompt_ids": [], "start_id": 0, "chosen_ids": [3, 4, 5], "rejected_ids": [3, 8]}
        | {"chosen_mask": [True, False, True]},
        {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [6]},
    ]


def test_masks_reach_the_batch():
    with data.batches(masked_rows(), batch_size=4, shuffle=False, multiple_of=1) as batches:
        batch = next(batches)
    chosen = [[0, 1, 1], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    rejected = [[1, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal(batch.chosen.mask[:, :3], np.array(chosen, bool))
    np.testing.assert_array_equal(batch.rejected.mask[:, :4], np.array(rejected, bool))
    np.testing.assert_array_equal(batch.chosen.ids[0, :3], [3, 4, 5])


def test_a_pack_scores_the_same_tokens():
    rows = masked_rows()
    packed = data.pack(rows, 12)
    for place, index in np.ndenumerate(packed.indices):
        if index < 0:
            continue
        row, slot = place
        start = packed.lengths[row, :slot].sum()
        end = start + packed.lengths[row, slot].sum()
        here = packed.scored[row]
        ids = packed.ids[row][here[(here >= start) & (here < end)]].tolist()
        names = ("chosen", "rejected")
        masks = [rows[index].get(f"{n}_mask", [True] * len(rows[index][f"{n}_ids"])) for n in names]
        want = [
            i
            for n, mask in zip(names, masks, strict=True)
            for i, scored in zip(rows[index][f"{n}_ids"], mask, strict=True)
            if scored
        ]
        # The first token of an empty prompt's completions became the prompt.
        assert ids == [i for i in want if rows[index]["prompt_ids"] or i != 3]


def test_masks_of_mismatched_completions_are_kept():
    rows = [
        {"prompt_ids": [n], "completion_ids": [5, 6, 7], "label": n > 1}
        | {"completion_mask": [False, True, False]}
        for n in (1, 2)
    ]
    with data.batches(rows, batch_size=2, multiple_of=1, max_length=3) as batches:
        batch = next(batches)
    np.testing.assert_array_equal(batch.completion.mask, [[False, True, False]] * 2)
    np.testing.assert_array_equal(batch.kl.mask[:, :2], [[False, True]] * 2)


def test_the_cache_keeps_masks_and_knows_the_choice(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(without(0)) + "\n")
    for score, _ in CHOICES:
        stored, _ = data.tokenize(path, chat_tokenizer(), score=score, cache=tmp_path / "cache")
        again, _ = data.tokenize(path, chat_tokenizer(), score=score, cache=tmp_path / "cache")
        plain, _ = data.tokenize(path, chat_tokenizer(), score=score)
        assert list(stored) == list(again) == plain


def test_a_state_of_other_masks_is_refused():
    rows = masked_rows()
    with data.batches(rows, batch_size=2) as batches:
        next(batches)
        state = batches.get_state()
    rows[0] = rows[0] | {"chosen_mask": [True, False, True]}
    with data.batches(rows, batch_size=2) as batches, pytest.raises(ValueError, match="same rows"):
        batches.set_state(state)
