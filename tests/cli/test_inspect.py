"""`inspect` shows every boundary where TRL puts it, and says what is cut and dropped."""

import json
import re
import sys

import pytest

from dpo_eqx import data
from dpo_eqx.cli.commands.inspect import look_at
from dpo_eqx.cli.terminal.tokens import Token, in_marks, shortened

from .commands import one_message, run
from .runs import DATA
from .small import MODEL, write_data

COLLATION = json.loads((DATA / "collation" / "collation.json").read_text())
ROW = re.compile(r"^record (\d+): ", re.M)


def inspect(capsys, model, data, *flags):
    return run(capsys, "inspect", "--model", model, "--data", data, *flags)


def shown(text):
    """From the plain text, by record: its first line, its reasons, and each part's ids."""
    pieces = ROW.split(text)[1:]
    for number, body in zip(pieces[::2], pieces[1::2], strict=True):
        parts = re.findall(r"^  (prompt|chosen|rejected) +(.*)\n  ids +([\d ]*)$", body, re.M)
        yield int(number), body, {n: (m, [int(i) for i in ids.split()]) for n, m, ids in parts}


@pytest.mark.parametrize(
    "case",
    [c if c.endswith("=40") else pytest.param(c, marks=pytest.mark.slow) for c in COLLATION],
)
def test_every_boundary_is_where_trl_puts_it(case, models, capsys):
    form, limit = case.split("|max_length=")
    name = "rows.jsonl" if form == "explicit" else "rows_implicit_prompt.jsonl"
    limits = [] if limit == "None" else ["--max-length", limit]
    flags = ["--rows", *map(str, range(22)), "--ids", "--tokens", "0", *limits]
    status, out, err = inspect(capsys, models("llama"), DATA / "collation" / name, *flags)
    assert (status, err) == (0, "")
    kept = [record for record in shown(out) if record[1].startswith("kept")]
    want = COLLATION[case]
    assert len(kept) == want["n_rows"]
    for (_, body, parts), example in zip(kept, want["examples"], strict=False):
        assert {f"{name}_ids": ids for name, (_, ids) in parts.items()} == example, body
        assert parts["prompt"][0].startswith("(<s>)")
    assert f"22 records: {want['n_rows']} rows kept" in out


def looks(models, name, **limits):
    tokenizer = data.load_tokenizer(models("llama"))
    records = list(data.read(DATA / "collation" / name).located())
    return [look_at(i, record, tokenizer, limits) for i, record in enumerate(records)]


@pytest.mark.parametrize("limit", [40, 64])
def test_what_is_scored_is_what_trl_scores(limit, models):
    """The batch that TRL's collator makes of the first six rows it keeps."""
    want = COLLATION[f"explicit|max_length={limit}"]["batch"]
    every = looks(models, "rows.jsonl", max_length=limit)
    kept = [look for look in every if "prompt_fills_max_length" not in look.reasons][:6]
    for half, name in enumerate(("chosen", "rejected")):
        for row, look in enumerate(kept, start=half * 6):
            parts = {part.name: part for part in look.parts}
            tokens = [
                (token, int(state == "scored"))
                for part in (parts["prompt"], parts[name])
                for token, state in zip(part.ids, part.states, strict=True)
                if state != "cut"
            ]
            ids, scored = want["input_ids"][row], want["completion_mask"][row]
            assert tokens == list(zip(ids, scored, strict=True))[: len(tokens)]
            assert not any(scored[len(tokens) :]), "TRL scores no more than we"


def test_marks():
    states = ("context", "scored", "cut")
    assert in_marks(map(Token, ["a", " b", "c"], states)) == "(a)[ b]{c}"


def test_of_many_tokens_the_two_ends_are_shown():
    tokens = [Token(str(i), "scored", str(i)) for i in range(9)] + [Token("x", "cut", "9")] * 3
    assert in_marks(shortened(tokens, 4)) == "[0][1] ... 5 more ... [7][8]{x}{x}{x}"
    assert [t.id for t in shortened(tokens, 3)][:4] == ["0", "1", "... 6 more ...", "8"]
    assert in_marks(shortened(tokens, 1)) == "[0] ... 8 more ... {x} ... 2 more ... "
    for enough in (0, 9):
        assert list(shortened(tokens, enough)) == tokens


def test_the_first_rows_that_are_kept_are_shown(models, capsys):
    """And of the dropped ones only the first."""
    rows = DATA / "collation" / "rows.jsonl"
    status, out, _ = inspect(capsys, models("llama"), rows, "--max-length", "22")
    assert status == 0
    fates = re.findall(r"^record \d+: (kept|dropped)", out, re.M)
    lines = re.search(r"dropped \d+: .* \(lines (\d+), (\d+),", out)
    dropped = [None, *(int(line) - 1 for line in lines.groups())]
    assert fates.count("kept") >= 3
    assert fates.count("dropped") == 1
    assert f"record {dropped[1]}: dropped" in out
    assert f"record {dropped[2]}: " not in out


def test_a_column_with_the_name_of_a_flag_is_a_column(models, tmp_path, capsys):
    record = {"prompt": "Why?", "chosen": " So.", "rejected": " No.", "split": "a", "score": 1}
    (tmp_path / "data.jsonl").write_text(json.dumps(record | {"strict": "", "tokenizer": "b"}))
    _, out, _ = inspect(capsys, models("llama"), tmp_path / "data.jsonl")
    assert "not used: `split`, `score`, `strict`, `tokenizer`\n" in out
    del record["prompt"], record["chosen"]
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    for more in ((), ("--columns", "prompt=x")):
        status, _, err = inspect(capsys, models("llama"), tmp_path / "data.jsonl", *more)
        assert status == 2
        assert "found: `rejected`, `split`, `score`." in err


def test_plain_text(models, capsys):
    """BOS, EOS, boundary, what is cut and why: to be seen without colours."""
    rows = DATA / "collation" / "rows.jsonl"
    flags = ("--rows", "0", "5", "2", "--max-length", "40", "--max-prompt-length", "20")
    status, out, _ = inspect(capsys, models("llama"), rows, *flags)
    assert status == 0
    first, dropped, cut = out.split("record ")[1:4]
    assert first.startswith("0: kept; prompt 15 tokens, chosen 21 tokens, rejected 7 tokens\n")
    assert "  prompt     (<s>)(Explain)( briefly)" in first
    assert "(\\n)(Response)(:)\n  chosen     [ ][Y][es]" in first
    assert "[.][</s>]\n" in first
    assert f"\n  line 1 of {rows}\n" in first
    assert "prompt_cut: prompt cut to `--max-prompt-length`, keeping its end" in dropped
    assert cut.startswith("2: kept, cut; prompt 20 tokens (2 cut off), chosen 20 tokens")
    assert "  prompt     {<s>}{Human}(:)( Where)" in cut
    assert "{.}{</s>}\n" in cut
    assert "(not scored), [scored], {cut off or dropped}" in out
    assert "BOS: first in" in out
    assert "EOS: last in" in out


def test_a_row_that_is_dropped_says_why(models, capsys):
    rows = DATA / "collation" / "rows.jsonl"
    _, out, _ = inspect(capsys, models("llama"), rows, "--max-length", "40")
    body = out.split("record 5: ")[1].split("\n\n")[0]
    assert body.startswith("dropped; prompt 166 tokens, chosen 51 tokens, rejected 9 tokens\n")
    assert re.search(r"prompt .* \.\.\. 66 more \.\.\. ", body)
    assert "the prompt alone has `--max-length` tokens or more" in body
    assert "[" not in body.split("prompt  ")[1], "nothing of it is scored"


def test_an_empty_prompt_has_a_token_before_it_that_is_not_scored(models, tmp_path, capsys):
    """gpt2's tokenizer has no BOS: what stands in for it is context, and so is the first token."""
    record = {"prompt": "", "chosen": "Yes.", "rejected": "No."}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    _, out, _ = inspect(capsys, models("gpt2"), tmp_path / "data.jsonl")
    body = out.split("record 0: ")[1].split("\n\n")[0]
    assert "nothing_before_completion" in body
    assert "(1 not scored)" in body
    assert re.search(r"chosen +\(\w+\)\[", body)


def test_conversations(models, capsys):
    turns = DATA / "qwen3" / "dataset_conversational.jsonl"
    status, out, _ = inspect(capsys, models("qwen3"), turns, "--rows", "0")
    assert status == 0
    assert re.search(r"prompt +\(<\|im_start\|>\)\(u\)\(ser\)\(\\n\)", out)
    assert re.search(r"chosen +\[.*\[<\|im_end\|>\]", out)


def test_ids_without_a_tokenizer(tmp_path, capsys):
    status, out, _ = inspect(capsys, MODEL, write_data(tmp_path / "data.jsonl"), "--rows", "1")
    assert status == 0
    record = json.loads((tmp_path / "data.jsonl").read_text().splitlines()[1])
    assert "".join(f"[<{i}>]" for i in record["chosen_ids"]) in out
    assert "BOS" not in out


def test_colours_on_a_terminal(models, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    rows = DATA / "collation" / "rows.jsonl"
    _, out, _ = inspect(capsys, models("llama"), rows, "--rows", "0")
    assert "\x1b[" in out
    assert "[ ][Y]" not in out
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "<s>Explain briefly" in plain
    assert re.search(r"\x1b\[1;4;[\d;]*m</s>", out), "what is no text stands out"
    assert "not scored, scored, cut off or dropped" in plain


BAD = {
    "no data": (["--data", "nowhere.jsonl"], "there is no `nowhere.jsonl`"),
    "a row that is not there": (["--rows", "99"], "`--rows` must be below 22; got 99"),
    "scan": (["--scan", "0"], "`--scan` must be positive; got 0"),
    "tokens": (["--tokens", "-1"], "`--tokens` must not be negative; got -1"),
    "a column": (["--columns", "prompt=question"], "maps `prompt` to `question`"),
    "a limit": (["--max-length", "0"], "`--max-length` must be a positive integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, models, capsys):
    flags, words = BAD[case]
    status, _, err = inspect(capsys, models("llama"), DATA / "collation" / "rows.jsonl", *flags)
    one_message(status, err, "inspect", words)
