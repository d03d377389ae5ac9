"""`dpo-eqx generate`: the answers of a model, or of two models side by side.

`models.generate` samples; `cli/terminal/prompts.py` makes the prompts.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..._extras import require
from ..compose.data import vocab_size
from ..compose.tokenizer import NONE, load_tokenizer
from ..compose.vocabulary import check_one_vocabulary
from ..run import devices
from ..run.compilation_cache import use_compilation_cache
from ..run.folder import replace_text
from ..settings.check import flag
from ..settings.groups.reading import RecordFlags, TextFlags
from ..settings.shared_flags import Loading, check_writable, in_shared_names, parse_flags
from ..terminal.answers import Answer, draw_answers
from ..terminal.display import say
from ..terminal.prompts import Prompt, Reading, encode_prompt, read_prompts, shown, stored
from ..terminal.texts import counted, for_screen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Loading, TextFlags, RecordFlags):
    """Lets a model answer prompts, and with `--compare` a second model."""

    model: str
    """A folder with `config.json`, safetensors and a tokenizer, or a hub name."""
    prompt: tuple[str, ...] = ()
    """Prompts to answer, one or several."""
    data: str | None = None
    """A file of prompts: a `.txt` with one on each line, records with `prompt`, or preferences."""
    compare: str | None = None
    """Another model with the same vocabulary, whose answers are shown next to the first model's."""
    limit: int | None = None
    """Largest number of prompts to take from `--data` (default: all)."""
    chat: bool = True
    """Put texts through the chat template, if there is one; texts of preferences stay as in
    training."""
    as_chat: bool = False
    """Make a turn of the user from a text that is the prompt of preferences, too."""
    max_new_tokens: int = 128
    """Largest number of tokens in an answer, which ends at the EOS if that is sampled first."""
    temperature: float = 1.0
    """Sampling temperature, by which logits are divided; 0 takes the likeliest token."""
    top_k: int | None = None
    """Number of likeliest tokens to sample from (default: all)."""
    top_p: float | None = None
    """Sample from the fewest likeliest tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Seed of the sampling, the same for both models."""
    batch_size: int = 8
    """Number of prompts answered at once."""
    output: Path | None = None
    """A JSON Lines file to write the prompts and answers to, in addition to showing them;
    conversations are written as messages."""


def generate(arguments: Sequence[str]) -> None:
    """Runs the command with its flags in `arguments`.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for the user.
    """
    flags = parse_flags(Generate, "generate", in_shared_names(arguments))
    use_compilation_cache(flags.compilation_cache)
    _check(flags)
    vocab_size(flags.model)  # raises if there is no model
    check_one_vocabulary(flags.model, flags.compare, "--compare")
    given = [Prompt(text, "`--prompt`") for text in flags.prompt]
    if flags.data is not None:
        given += read_prompts(flags.data, flags.limit, Reading.of(flags, as_chat=flags.as_chat))
    tokenizer = load_tokenizer(flags.model, flags.tokenizer, flags.chat_template)
    prompts = [encode_prompt(tokenizer, prompt, chat=flags.chat) for prompt in given]
    sides = [(flags.model, flags.lora)]
    sides += [] if flags.compare is None else [(flags.compare, None)]
    answers = [_answers_of(*side, prompts, tokenizer, flags) for side in sides]
    names = [" with ".join(filter(None, side)) for side in sides]
    by_prompt = list(zip(*answers, strict=True))
    # The file first: a terminal that cannot show the answers must not lose them.
    if flags.output is not None:
        values = [stored(tokenizer, prompt) for prompt in given]
        replace_text(flags.output, "".join(_lines(values, by_prompt)))
    _show([shown(tokenizer, prompt) for prompt in given], names, by_prompt)


def _answers_of(
    path: str, lora: str | None, prompts: list, tokenizer: Any, flags: Generate
) -> list[Answer]:
    """One model's answers. The model is freed before the next one is loaded."""
    return draw_answers(
        flags.load(path, lora=lora),
        prompts,
        tokenizer,
        batch_size=flags.batch_size,
        seed=flags.seed,
        mesh=flags.devices(),
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
    )


def _show(texts: list[str], names: list[str], answers: list[tuple[Answer, ...]]) -> None:
    side_by_side = len(names) > 1 and sys.stdout.isatty()
    for number, (text, answer_row) in enumerate(zip(texts, answers, strict=True), 1):
        say(f"=== prompt {number} of {len(texts)}\n{for_screen(text)}")
        titles = [f"{name} ({_length(a)})" for name, a in zip(names, answer_row, strict=True)]
        if side_by_side:
            _table(titles, answer_row)
            continue
        for title, answer in zip(titles, answer_row, strict=True):
            say(f"--- {title}\n{for_screen(answer.text)}")


def _table(titles: list[str], answers: tuple[Answer, ...]) -> None:
    table = require("rich.table", extra="train").Table(show_lines=True, expand=True)
    for title in titles:
        table.add_column(title, ratio=1, overflow="fold")
    text = require("rich.text", extra="train").Text
    table.add_row(*(text(for_screen(answer.text)) for answer in answers))
    require("rich.console", extra="train").Console().print(table)


def _length(answer: Answer) -> str:
    return f"{counted(answer.tokens)}, {'ended' if answer.ended else 'cut off'}"


def _lines(prompts: list[Any], answers: list[tuple[Answer, ...]]) -> Iterator[str]:
    for prompt, answer_row in zip(prompts, answers, strict=True):
        named = zip(("answer", "compared"), answer_row, strict=False)
        line = {"prompt": prompt} | {name: answer.text for name, answer in named}
        yield json.dumps(line) + "\n"


def _check(flags: Generate) -> None:
    if not flags.prompt and flags.data is None:
        raise ValueError("`--prompt` or `--data` must give a prompt to answer; both are missing.")
    if flags.as_chat and not flags.chat:
        raise ValueError("`--as-chat` and `--no-chat` contradict each other; leave out one.")
    if flags.as_chat and flags.chat_template == NONE:
        raise ValueError("`--as-chat` needs a chat template; leave out `--chat-template none`.")
    for name in ("max_new_tokens", "batch_size", "limit"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)} must be positive; got {value}.")
    devices.check_rows(flags.batch_size, flags.devices())
    check_writable("--output", flags.output)
