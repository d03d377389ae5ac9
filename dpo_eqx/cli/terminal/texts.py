"""Token ids as text: whole answers, single tokens, and texts that a terminal can show.

`dpo_eqx.data` makes ids from text; this file only makes text from ids.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

from ...data._tokens.tokenizers import special_id

_BROKEN = "\ufffd"  # the result of decoding a part of a character


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of `ids`, without BOS and EOS; the ids as numbers if there is no tokenizer."""
    if not hasattr(tokenizer, "decode"):
        return " ".join(map(str, ids))
    specials = {special_id(tokenizer, kind) for kind in ("bos", "eos")}
    return _decode(tokenizer, [i for i in ids if i not in specials])


def continuation(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` behind the text of `before`, with the space that some tokenizers drop.

    The two texts together are the text of all ids, except where a character spans both.
    """
    last = [] if not hasattr(tokenizer, "decode") else list(before[-1:])
    start, whole = decode(tokenizer, last), decode(tokenizer, [*last, *ids])
    is_clean = whole.startswith(start) and not start.endswith(_BROKEN)
    return whole.removeprefix(start) if is_clean else decode(tokenizer, ids)


def end_of(text: str, room: int) -> str:
    """The end of a prompt, since that is what its answer follows."""
    text = text.strip("\n")
    return text if len(text) <= room else f"... {text[-room:]}"


def for_screen(text: str) -> str:
    """`text` with escapes for characters that would move a terminal's cursor, except line ends."""
    return escaped(text, keep="\n")


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token in its context; `<5>` if token 5 has no text of its own."""
    if not hasattr(tokenizer, "decode"):
        return [f"<{i}>" for i in ids]
    names = special_names(tokenizer)
    pairs = zip([None, *ids], ids, strict=False)
    return [_piece(tokenizer, names, before, token) for before, token in pairs]


def escaped(text: str, *, keep: str = "") -> str:
    """`text` with control and formatting characters escaped, except the characters in `keep`."""

    def one(character: str) -> str:
        is_plain = character in keep or unicodedata.category(character) not in ("Cc", "Cf", "Zl")
        return character if is_plain else character.encode("unicode_escape").decode()

    return "".join(map(one, text))


def special_names(tokenizer: Any) -> dict[int, str]:
    """The names of special tokens by id, including BOS and EOS."""
    ids = getattr(tokenizer, "all_special_ids", ())
    names = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in ids}
    for kind in ("bos", "eos"):
        token = special_id(tokenizer, kind)
        if token is not None:
            names[token] = str(getattr(tokenizer, f"{kind}_token", None) or f"<{kind}>")
    return names


def counted(tokens: int) -> str:
    """A number of tokens in words."""
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def _piece(tokenizer: Any, names: dict[int, str], before: int | None, token: int) -> str:
    if token in names:
        return names[token]
    # Decoded together with the previous token: at the start of a text some tokenizers drop a space.
    pair = [token] if before is None or before in names else [before, token]
    text, start = _decode(tokenizer, pair), _decode(tokenizer, pair[:-1])
    text = text.removeprefix(start) if text.startswith(start) else _decode(tokenizer, [token])
    return escaped(text) if text and _BROKEN not in text else f"<{token}>"


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids)) if ids else ""
