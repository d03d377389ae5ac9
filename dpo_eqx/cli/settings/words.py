"""Messages of the library in the words of the command: flags in place of Python arguments."""

import contextlib
import re
from collections.abc import Callable, Iterator


def _limit(match: re.Match[str]) -> str:
    return f"`--max-{(match[1] or '').replace('_', '-')}length`"


OF_ARGUMENT = r"(?= (?:must|maps|makes|allows|is for|is '|is \"))"

_WORDS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r'columns=\{"([^"`]+)": None\}', r"--columns \1="),
    (r'columns=\{"([^"`]+)": "([^"`]+)"\}', r"--columns \1=\2"),
    (
        r", set `tokenizer\.chat_template`, or give\s+`template_arguments=[^`]*`",
        ", or give `--chat-template FILE`",
    ),
    (r"`score='(\w+)'`", r"`--score \1`"),
    (r" or `append_eos=False`[^.]*", " or another tokenizer"),
    (r"Give `eos_token_id=`, or another tokenizer", "Give another tokenizer"),
    (r"below `vocab_size`, (\d+)", r"below \1, the size of the vocabulary of `--model`"),
    # A column of the data may have such a name, so the words behind it must tell an argument.
    (rf"`(columns|strict|tokenizer|score|split|subset|mesh)`{OF_ARGUMENT}", r"`--\1`"),
    (r"`function` must", "`--reward` must"),
    (
        r"by `timeout`, or judge fewer answers at once by `batch_size`",
        "by `--reward-timeout`, or judge fewer answers at once by `--batch-size`",
    ),
    (rf"`as_chat`{OF_ARGUMENT}", "`--as-chat`"),
    (r"`max_(prompt_|completion_)?length`", _limit),
    (r"`path_or_iterable`", "`--data`"),
    (r"`modules_to_save` must match the", "`--lora-modules-to-save` must match the"),
    (
        r"`target` and `modules_to_save` must match",
        "`--lora-target` and `--lora-modules-to-save` must match",
    ),
    (r"`target` must match", "`--lora-target` must match"),
    (
        r"a folder, a name of the Hugging Face hub \(`owner/name`\) or an iterable of mappings",
        "a folder, or a name of the Hugging Face hub (`owner/name`)",
    ),
    (
        r"(`--model` must hold a tokenizer; .* has no file of one.*) Give another folder",
        r"\1 Put it there, or give one as `--tokenizer`",
    ),
    (r"`only` must match", "`--train` must match"),
    (r"`without` must match", "`--freeze` must match"),
    (
        r"`only` and `without` must leave (.*) got only=.* and without=.*, which leave",
        r"`--train` and `--freeze` must leave \1 these leave",
    ),
    (r"`where` names", "`--where` names"),
    (r"`(pairs|ties)` must", r"`--\1` must"),
]


def in_flags(message: str) -> str:
    """`message` with the flag in place of each Python argument that has one."""
    for pattern, words in _WORDS:
        message = re.sub(pattern, words, message)
    return message


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Lets errors about the argument `path` name the flag that gave the path."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(str(error).replace("`path`", f"`{flag}`")) from error
