"""Names that are used and never defined, in all Python files of the repository.

Ruff's own check (F821) is off, because it takes the words of jaxtyping's shapes for names. This
check leaves out what stands in a plain string, and keeps the rest.

    python .ci/names.py
"""

import json
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

Span = tuple[tuple[int, int], tuple[int, int]]


def main() -> int:
    """Prints each undefined name, and returns 1 if there is one."""
    found = defaultdict(list)
    for fault in faults():
        place = fault["location"]["row"], fault["location"]["column"] - 1
        found[Path(fault["filename"])].append((place, fault["message"]))
    lines = [
        f"{path.relative_to(Path.cwd())}:{place[0]}: {message}"
        for path, places in found.items()
        for place, message in places
        if not any(start <= place < end for start, end in strings(path))
    ]
    for line in lines:
        print(line)
    return int(bool(lines))


def faults() -> list[dict]:
    """What Ruff's check finds, shapes included."""
    command = ["ruff", "check", "--isolated", "--select", "F821", "--output-format", "json"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    return json.loads(done.stdout)


def strings(path: Path) -> list[Span]:
    """The places of the strings of a file, without f-strings, which hold code."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return [
        (token.start, token.end)
        for token in tokens
        if token.type == tokenize.STRING and "f" not in token.string.split(token.string[-1])[0]
    ]


if __name__ == "__main__":
    sys.exit(main())
