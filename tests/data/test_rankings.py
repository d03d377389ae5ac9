"""Several answers with scores or ranks become pairs, and the difference of scores an offset."""

import json

import pytest

from dpo_eqx import data

ASK = "Where do otters sleep?"
ANSWERS = {"a": 2.0, "b": 5.0, "c": 1.0, "d": 5.0, "e": 1.0}
PAIRS = {
    "best-worst": [("b", "c")],
    "best-rest": [("b", "a"), ("b", "c"), ("b", "e")],
    "all": [tuple(pair) for pair in ("ac", "ae", "ba", "bc", "be", "da", "dc", "de")],
}


def numbered(name, text, score, sign=1):
    return {name: [{text: a, score: sign * s, "model": "m"} for a, s in ANSWERS.items()]}


def beside(name, score, sign=1):
    return {name: list(ANSWERS), score: [sign * s for s in ANSWERS.values()]}


SCORED = {
    "UltraFeedback": numbered("completions", "response", "overall_score"),
    "stack-exchange-preferences": numbered("answers", "text", "pm_score"),
    "distilabel": beside("generations", "ratings"),
    "responses and scores": beside("responses", "scores"),
    "responses and rewards": beside("completions", "rewards"),
    "text in a table": {name: json.dumps(v) for name, v in beside("responses", "scores").items()},
}
RANKED = {
    "Nectar": numbered("answers", "answer", "rank", -1),
    "responses and ranks": beside("responses", "ranks", -1),
}


def pairs(record, **settings):
    got = list(data.read([record | {"prompt": ASK}], **settings))
    assert all(pair["prompt"] == ASK for pair in got)
    return [(pair["chosen"], pair["rejected"]) for pair in got], got


@pytest.mark.parametrize("how", PAIRS)
@pytest.mark.parametrize("name", SCORED | RANKED)
def test_pairs_of_several_answers(name, how):
    got, records = pairs((SCORED | RANKED)[name], pairs=how, offset_from_scores=True)
    assert got == PAIRS[how]
    if name in SCORED:
        offsets = [ANSWERS[one] - ANSWERS[other] for one, other in PAIRS[how]]
        assert [record["offset"] for record in records] == offsets
    else:
        assert "offset" not in records[0]


def test_best_and_worst_is_the_default_and_there_is_no_offset():
    got, (record,) = pairs(SCORED["UltraFeedback"])
    assert got == PAIRS["best-worst"]
    assert record.keys() == {"prompt", "chosen", "rejected"}


def test_what_is_in_no_pair_is_counted():
    record = SCORED["UltraFeedback"] | {"prompt": ASK}
    equal = {"prompt": ASK, "completions": [{"response": x, "overall_score": 3} for x in "abc"]}
    lone = {"prompt": ASK, "completions": [{"response": "a", "overall_score": None}]}
    records = data.read([equal, record, record, lone])
    assert len(list(records)) == 2
    assert records.left_out == {
        "records whose answers are equally good": 1,
        "answers in no pair": 6,
        "records with fewer than two answers that have a score": 1,
    }
    records = data.read([record], pairs="all")
    assert len(list(records)) == 8
    assert not records.left_out
    assert "by `overall_score`, paired all" in str(records)


def test_an_answer_without_a_score_is_not_paired():
    answers = [{"response": x, "overall_score": s} for x, s in (("a", "N/A"), ("b", 1), ("c", 2))]
    got, _ = pairs({"completions": answers}, pairs="all")
    assert got == [("c", "b")]


REJECTED = {"chosen": "a", "rejected": ["b", "c", "d"]}


@pytest.mark.parametrize(("how", "count"), [("best-worst", 1), ("best-rest", 3), ("all", 3)])
def test_several_rejected_answers(how, count):
    got, records = pairs(REJECTED, pairs=how, offset_from_scores=True)
    assert got == [("a", x) for x in "bcd"][:count]
    assert "offset" not in records[0]


def test_several_rejected_conversations():
    turn = {name: [{"role": "assistant", "content": name}] for name in "abc"}
    ask = [{"role": "user", "content": ASK}]
    record = {"prompt": ask, "chosen": turn["a"], "rejected": [turn["b"], turn["c"]]}
    got = list(data.read([record], pairs="all"))
    assert got == [{"prompt": ask, "chosen": turn["a"], "rejected": turn[x]} for x in "bc"]


def test_messages_before_several_answers():
    ask = {"role": "user", "content": ASK}
    (got,) = data.read([{"messages": [ask]} | beside("responses", "scores")])
    assert (got["prompt"], got["chosen"]) == ([ask], [{"role": "assistant", "content": "b"}])


def test_a_weight_counts_for_each_pair():
    _, records = pairs(SCORED["UltraFeedback"] | {"weight": 3}, pairs="best-rest")
    assert [record["weight"] for record in records] == [3, 3, 3]
    equal = {"responses": ["a", "b"], "scores": [1, 1], "weight": 3}
    _, records = pairs(equal, ties="half")
    assert [record["weight"] for record in records] == [1.5, 1.5]


NAMES = [
    "score_chosen score_rejected",
    "chosen_score rejected_score",
    "chosen_reward rejected_reward",
]
NAMES += [
    "chosen_rating rejected_rating",
    "chosen-rating rejected-rating",
    "score-chosen score-rejected",
]


@pytest.mark.parametrize("names", NAMES)
def test_scores_beside_a_pair_are_an_offset(names):
    scores = dict(zip(names.split(), (2.5, 1), strict=True))
    record = {"prompt": ASK, "chosen": "a", "rejected": "b"} | scores
    (got,) = data.read([record], offset_from_scores=True)
    assert got["offset"] == 1.5
    (got,) = data.read([record])
    assert "offset" not in got
    (got,) = data.read([record | {"margin": 7}], columns={"offset": "margin"})
    assert got["offset"] == 7


WRONG = [
    ({"scores": [1, 2]}, "`scores` in record 1 .* must hold a number for each .* 2 numbers for 5"),
    ({"scores": ["x"] * 5}, "`scores` in record 1 .* must be a finite number; got 'x'"),
    ({"scores": 3}, "`scores` in record 1 .* must be a list like the other records'; got 3"),
    ({"responses": "a"}, "`responses` in record 1 .* must be a list like the other records'"),
]


@pytest.mark.parametrize(("change", "match"), WRONG)
def test_a_bad_record_is_named(change, match):
    good = beside("responses", "scores") | {"prompt": ASK}
    with pytest.raises(ValueError, match=match):
        list(data.read([good, good | change]))


def test_a_text_among_lists_of_rejected_is_named():
    with pytest.raises(ValueError, match=r"`rejected` in record 1 .* must be a list of answers"):
        list(data.read([REJECTED | {"prompt": ASK}, REJECTED | {"prompt": ASK, "rejected": "b"}]))
