"""`--chat-template` and `--as-chat` in three commands, and in the saved model."""

import json

import pytest

from dpo_eqx import data
from dpo_eqx.cli.run.loop import loop
from dpo_eqx.models import load as load_model, save as save_model

from .commands import one_message, run
from .runs import DATA, GOLDEN, train

TOKENIZER = DATA / "qwen3"
FAMILY = GOLDEN / "models" / "families" / "qwen3"

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "So."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
TEXTS = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


@pytest.fixture
def files(tmp_path):
    paths = {"turns": TURNS, "texts": TEXTS}
    for name, record in paths.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return tmp_path


def marked(out):
    """The texts of the prompt and of the completions that `inspect` shows."""
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ")]
    return {line[0]: line[1] for line in lines if line[0] in ("prompt", "chosen")}


def test_inspect_shows_the_chosen_template(models, files, capsys):
    flags = ["inspect", "--model", models("qwen3"), "--tokens", 0]
    template = ["--chat-template", files / "template.jinja"]
    for name, more in (("turns", []), ("texts", ["--as-chat"])):
        source = ["--data", files / f"{name}.jsonl"]
        status, out, _ = run(capsys, *flags, *source, *template, *more)
        assert status == 0
        shown = marked(out)
        prompt = shown["prompt"].replace(")(", "").strip("()")
        assert prompt == "<user>Why?;<assistant>"
        assert shown["chosen"].replace("][", "").strip("[]") == "So.;"
    _, out, _ = run(capsys, *flags, "--data", files / "texts.jsonl", *template)
    assert marked(out)["prompt"].replace(")(", "").strip("()") == "Why?"


@pytest.fixture
def seen(monkeypatch):
    """The texts of the prompts that a model would answer; nothing is sampled."""
    texts = []

    def draw(policy, prompts, tokenizer, **kwargs):
        texts.extend(tokenizer.decode(ids) for ids in prompts)
        raise ValueError("enough")

    monkeypatch.setattr("dpo_eqx.cli.commands.generate.draw_answers", draw)
    return texts


def test_generate_has_the_prompts_of_training(models, files, capsys, seen):
    template = ("--chat-template", files / "template.jinja")
    flags = ("generate", "--model", models("qwen3"), "--data")
    for name, more in [
        ("turns", template),
        ("texts", (*template, "--as-chat")),
        ("texts", template),
        ("texts", ("--chat-template", "none")),
    ]:
        run(capsys, *flags, files / f"{name}.jsonl", *more)
    run(capsys, *flags[:3], "--prompt", "Why?", "--chat-template", "none")
    chat = "<user>Why?;<assistant>"
    assert seen == [chat, chat, "Why?", "Why?", "Why?"]


def test_a_model_is_saved_with_a_template(tmp_path):
    policy = load_model(FAMILY)
    save_model(policy, tmp_path / "saved", tokenizer_from=TOKENIZER, chat_template=TEMPLATE)
    assert data.load_tokenizer(tmp_path / "saved").chat_template == TEMPLATE


def gone_before(path):
    def run_loop(*args, **kwargs):
        path.unlink()
        return loop(*args, **kwargs)

    return run_loop


@pytest.mark.slow
def test_the_saved_model_carries_the_template(models, files, monkeypatch):
    flags = {"model": models("qwen3"), "batch_size": 1, "steps": 1, "as_chat": True}
    template = files / "template.jinja"
    output = files / "run"
    source = {"data": files / "texts.jsonl", "output": output}
    with monkeypatch.context() as patch:
        # The file may be gone at the end of the run.
        patch.setattr("dpo_eqx.cli.commands.train.loop", gone_before(template))
        assert train(**flags, **source, chat_template=template) == 0
    saved = data.load_tokenizer(output / "model")
    assert saved.chat_template == TEMPLATE
    want = "<user>Why?;<assistant>"
    turn = [{"role": "user", "content": "Why?"}]
    assert saved.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == want
    assert (output / "model" / "tokenizer.json").exists()


WRONG = [
    (("--data", "turns.jsonl", "--chat-template", "none"), "or give `--chat-template FILE`"),
    (("--data", "texts.jsonl", "--chat-template", "no.jinja"), "there is no file no.jinja"),
    (
        ("--data", "turns.jsonl", "--chat-template", "template.jinja", "--tokenizer", "bytes"),
        "`--chat-template` needs a tokenizer that takes a template; ByteTokenizer takes none",
    ),
    (("--data", "ids.jsonl", "--as-chat"), "`--as-chat` makes turns of text, and line 1 of ids"),
]


@pytest.mark.parametrize(("flags", "words"), WRONG)
def test_wrong_choices(flags, words, models, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    (files / "ids.jsonl").write_text(json.dumps(ids))
    status, _, err = run(capsys, "inspect", "--model", models("qwen3"), *flags)
    one_message(status, err, "inspect", words)
    assert train(model=models("qwen3"), output=files / "run", **_as_settings(flags)) == 2
    assert not (files / "run").exists()


def _as_settings(flags):
    names = [word.removeprefix("--").replace("-", "_") for word in flags if word.startswith("--")]
    values = [word for word in flags if not word.startswith("--")] + [True]
    return dict(zip(names, values, strict=False))


GENERATE = [
    (("--as-chat", "--no-chat"), "`--as-chat` and `--no-chat` contradict each other"),
    (("--as-chat", "--chat-template", "none"), "`--as-chat` needs a chat template"),
]


@pytest.mark.parametrize(("flags", "words"), GENERATE)
def test_wrong_choices_of_generate(flags, words, models, files, capsys):
    source = ("--model", models("qwen3"), "--data", files / "texts.jsonl")
    status, _, err = run(capsys, "generate", *source, *flags)
    one_message(status, err, "generate", words)


def test_generate_chooses_records_as_train_does(models, tmp_path, capsys, seen):
    path = tmp_path / "data.jsonl"
    records = [{"ask": f"Why {n}?", "lang": n} for n in ("en", "de", "en")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ("--model", models("llama"), "--data", path, "--columns", "prompt=ask")
    run(capsys, "generate", *flags, "--where", "lang=en")
    assert [text.removeprefix("<s>").strip() for text in seen] == ["Why en?", "Why en?"]
    status, _, err = run(capsys, "generate", *flags, "--where", "lang=fr")
    one_message(status, err, "generate", "holds none; left out 3: records that are not of lang=fr")
    text = tmp_path / "p.txt"
    text.write_text("Why?\n")
    status, _, err = run(capsys, "generate", "--model", models("llama"), "--data", text, *flags[4:])
    one_message(status, err, "generate", "`--columns` is for records; `--data` is a text file")
