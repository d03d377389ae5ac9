"""The tokenizer of a command, with the chat template that `--chat-template` chooses.

`data/_tokens/` makes ids with it.
"""

from pathlib import Path
from typing import Any

from ... import data
from ...models._checkpoint.folder import resolve
from ..settings.settings import Settings
from ..settings.words import naming

OWN, NONE = "tokenizer", "none"


def tokenizer_of(settings: Settings) -> Any:
    """The tokenizer of a run, with the chat template that its settings choose."""
    return load_tokenizer(settings.model, settings.tokenizer, settings.chat_template)


def load_tokenizer(model: str, named: str | None, chat_template: str = OWN) -> Any:
    """The tokenizer that `--tokenizer` names, or the tokenizer of the model.

    **Arguments:**

    - `chat_template`: the value of `--chat-template`.

    **Raises:**

    `ValueError` or `FileNotFoundError` if the tokenizer or the template does not load.
    """
    if named == "bytes":
        return _with_template(data.ByteTokenizer(), chat_template)
    with naming("--model" if named is None else "--tokenizer"):
        tokenizer = data.load_tokenizer(named or resolve(model))
    return _with_template(tokenizer, chat_template)


def template_in_file(choice: str) -> str | None:
    """The text of the template in a file; `None` if no file is chosen.

    **Raises:**

    `FileNotFoundError` if there is no such file; `ValueError` if it is not text in UTF-8.
    """
    if choice in (OWN, NONE):
        return None
    path = Path(choice)
    if not path.is_file():
        raise FileNotFoundError(
            f"`--chat-template` must be a file with a Jinja template, `{NONE}`, or `{OWN}` for the "
            f"tokenizer's own; there is no file {choice}."
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}.") from None


def _with_template(tokenizer: Any, choice: str) -> Any:
    """The tokenizer with the chosen template; it is changed in place.

    **Raises:**

    `ValueError` if a file is chosen, and the tokenizer takes no template.
    """
    text = template_in_file(choice)
    if choice == OWN:
        return tokenizer
    if hasattr(tokenizer, "chat_template"):
        tokenizer.chat_template = text
    elif text is not None:
        raise ValueError(
            f"`--chat-template` needs a tokenizer that takes a template; {type(tokenizer).__name__}"
            " takes none. Leave out the flag, or give another `--tokenizer`."
        )
    return tokenizer
