"""`data.hold_out`: which records are held out, and that no prompt is on both sides."""

import random

import pytest

from dpo_eqx import data

USER = "user"


def texts(count, per_prompt=3):
    return [
        {"prompt": f"Question {i}?", "chosen": f" yes {j}", "rejected": f" no {i}"}
        for i in range(count)
        for j in range(per_prompt)
    ]


def prompts(records):
    return {str(record["prompt"]) for record in records}


def held(records, fraction=0.3):
    return list(data.hold_out(data.read(records), fraction)[1])


def test_a_fraction_of_the_prompts_is_held_out_and_no_prompt_is_on_both_sides():
    records = texts(1000)
    training, held_out = data.hold_out(data.read(records), 0.3)
    kept, out = list(training), list(held_out)
    assert len(kept) + len(out) == 3000
    assert prompts(kept).isdisjoint(prompts(out))
    # Four standard deviations of a binomial draw.
    assert len(prompts(out)) == pytest.approx(300, abs=60)
    assert training.left_out == {"records held out for evaluation": len(out)}
    assert held_out.left_out == {"records to train on": len(kept)}


def test_order_and_added_records_move_no_record():
    records = texts(200)
    shuffled = random.Random(0).sample(records, len(records))
    assert prompts(held(records)) == prompts(held(shuffled))
    more = [*records, *({**r, "prompt": "New " + r["prompt"]} for r in records)]
    assert prompts(held(records)) == prompts(held(more)) & prompts(records)
    # A greater fraction holds out what a smaller one does.
    assert prompts(held(records, 0.1)) < prompts(held(records, 0.3))


def turn(role, content):
    return {"role": role, "content": content}


def conversation(i, answer="Yes."):
    return {
        "prompt": [turn(USER, f"Question {i}?")],
        "chosen": [turn("assistant", answer)],
        "rejected": [turn("assistant", "No.")],
    }


def in_parts(i):
    record = conversation(i)
    return record | {"prompt": [turn(USER, [{"type": "text", "text": f"Question {i}?"}])]}


def whole(i):
    record = conversation(i)
    answers = {name: record["prompt"] + record[name] for name in ("chosen", "rejected")}
    return answers | {"number": i}


FORMS = [
    lambda i: {"prompt": f"Question {i}?", "completion": " yes", "label": i % 2 == 0},
    conversation,
    lambda i: conversation(i, "Another answer."),
    in_parts,
    whole,
]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_prompt_is_on_the_same_side_in_every_form(form):
    """Numbers stand for the prompts: the same ones are held out as of the texts."""
    chosen = [i for i in range(100) if held([texts(i + 1, 1)[i]])]
    assert 10 < len(chosen) < 50
    assert [i for i in range(100) if held([form(i)])] == chosen


DIALOGUE = "\n\nHuman: What is {}?\n\nAssistant:"


def test_dialogues_of_text_are_on_the_side_of_their_prompt():
    """Two pairs of one prompt share more or fewer words of their answers."""
    pairs = [(" I think", " I believe"), (" Yes", " No"), (" A cat.\nIt", " A cat.\nHe")]
    for i in range(60):
        start = DIALOGUE.format(i)
        sides = {bool(held([{"chosen": start + a, "rejected": start + b}])) for a, b in pairs}
        assert len(sides) == 1


def test_ids_are_held_out_by_the_ids_of_the_prompt():
    records = [{"prompt_ids": [i], "chosen_ids": [1], "rejected_ids": [2]} for i in range(200)]
    out = held(records)
    assert 30 < len(out) < 90
    again = [{**r, "chosen_ids": [3, 4]} for r in records[::-1]]
    assert {r["prompt_ids"][0] for r in held(again)} == {r["prompt_ids"][0] for r in out}


def test_the_parts_have_caches_of_their_own(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "{i}", "chosen": "a", "rejected": "b"}}\n' for i in range(50))
    )
    parts = data.hold_out(data.read(path), 0.4)
    sizes = []
    for part in (*parts, data.read(path)):
        rows, _ = data.tokenize(part, data.ByteTokenizer(), cache=tmp_path / "cache")
        sizes.append(len(rows))
    assert sizes[0] + sizes[1] == sizes[2] == 50
    assert 0 < sizes[1] < 50


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_wrong_fractions(fraction):
    with pytest.raises(ValueError, match="`fraction` must be above 0 and below 1; got"):
        data.hold_out(data.read(texts(1)), fraction)


def test_a_generator_cannot_be_read_twice():
    with pytest.raises(ValueError, match="can be read only once, so no records can be held out"):
        data.hold_out(data.read(iter(texts(1))), 0.5)
