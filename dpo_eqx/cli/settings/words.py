"""Messages of the library in the words of the command: flags in place of Python arguments."""

import re

_WORDS = [
    (r'columns=\{"([^"`]+)": None\}', r"--columns \1="),
    (r'columns=\{"([^"`]+)": "([^"`]+)"\}', r"--columns \1=\2"),
    (r"`columns`", "`--columns`"),
    (r"`path_or_iterable`", "`--data`"),
    (r"`where` names", "`--where` names"),
    (r"`(pairs|ties)` must", r"`--\1` must"),
    (r"`split`", "`--split`"),
    (r"`subset`", "`--subset`"),
]


def in_flags(message: str) -> str:
    """`message` with the flag in place of each Python argument that has one."""
    for pattern, words in _WORDS:
        message = re.sub(pattern, words, message)
    return message
