"""Reading: from a file, a folder, a name or an iterable to records of a known form.

Reading is lazy, and nothing is tokenised here.
"""

import collections
import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

from .._fingerprint import digest_files
from .folders import choose
from .names import ends_with_answer
from .part import Part
from .records import Form, check_columns, check_record, recognise, rename
from .shapes import DEFAULTS, NO_ANSWER, PLAIN, Options, Shape, check_options, records_of, shape_of
from .sources import Located, check_not_given, files_of, is_saved, located, open_source, saved_split
from .threads import assembled

logger = logging.getLogger("dpo_eqx.data")

# Files up to this size are tokenised in memory, larger ones into a cache on disk.
IN_MEMORY_BYTES = 2**28


class Records:
    """Preference records of one form, read during iteration. `read` makes it.

    Iterating yields dictionaries with the columns of the form, checked and under our names.
    `str(records)` gives their source and their form.

    **Arguments:**

    - `open_records`: makes an iterator of `(where, record)` from the start.
    - `source`: the source in words, for messages.
    - `columns`: maps our names to the names in the source.
    - `path`: the file or folder, if there is one; its content is the key of caches.
    - `split`: the split that was asked for; it is part of that key, as is `subset`.
    - `subset`: the subset of the data set that was asked for.
    - `options`: how records become pairs.
    - `once`: whether the records can be read only once.
    - `in_memory`: whether the records are known to fit in memory.

    `left_out` counts the records and answers of the source that are in no record, by reason, since
    the latest iteration began.
    """

    def __init__(
        self,
        open_records: Callable[[], Iterator[Located]],
        source: str,
        columns: Mapping[str, str | None],
        *,
        path: Path | None = None,
        split: str | None = None,
        subset: str | None = None,
        options: Options = DEFAULTS,
        once: bool = False,
        in_memory: bool = True,
    ):
        self._open, self._columns, self._path = open_records, columns, path
        self._split, self._subset = split, subset
        self._options = options
        self._form: Form | None = None
        self._shape: Shape | None = None
        self.left_out: collections.Counter[str] = collections.Counter()
        self._once, self._spent = once, False
        self._part: Part | None = None
        self.source, self.in_memory = source, in_memory

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (record for _, record in self.located())

    def located(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The same records, each with its place in words, such as `line 3 of a.jsonl`."""
        form = self.form
        if self._spent:
            raise ValueError(
                f"{self.source} can be read only once and has been read. Give a list, or tokenise "
                "it once and keep the rows."
            )
        self._spent = self._once
        self.left_out.clear()
        for where, record in self._shaped(self._assembled(self._open())):
            checked = check_record(record, form, where)
            if "messages" in form.columns and not ends_with_answer(checked["messages"]):
                self.left_out[NO_ANSWER] += 1
            elif self._part is None or self._part.takes(checked, form):
                yield where, checked
            else:
                self.left_out[str(self._part)] += 1

    def part(self, part: Part) -> "Records":
        """The records of one part of the source: see `hold_out`."""
        if self._once:
            raise ValueError(
                f"{self.source} can be read only once, so no records can be held out. Give a list."
            )
        records = copy.copy(self)
        records._part, records.left_out = part, collections.Counter()
        return records

    def _assembled(self, records: Iterable[Located]) -> Iterator[Located]:
        return assembled(records, dict(self._options.where), self.left_out)

    def _shaped(self, records: Iterable[Located]) -> Iterator[Located]:
        """The records with our columns: for each record of the source one, several or none."""
        for where, source in records:
            record = rename(source, self._columns, where)
            if self._shape is None:
                self._shape = shape_of(record)
            if self._shape is PLAIN and not self._options.changes_plain:
                yield where, record
                continue
            made = records_of(record, self._shape, self._options, where, self.left_out)
            yield from ((where, record) for record in made)

    @property
    def form(self) -> Form:
        """The form, recognised from the first record.

        **Raises:**

        `ValueError` if there is no record, or its columns match no form.
        """
        if self._form is None:
            where, record = self._first()
            self._form = recognise(record, where)
            logger.info("%s", self)
        return self._form

    def _first(self) -> Located:
        """The first record with our columns; the first records of the source may make none."""
        records, taken = self._open(), []

        def noted() -> Iterator[Located]:
            for record in records:
                taken.append(record)
                yield record

        first = next(self._shaped(self._assembled(noted())), None)
        if first is None:
            reasons = "".join(f"; left out {n}: {what}" for what, n in self.left_out.items())
            raise ValueError(f"{self.source} holds no records; one is required at least{reasons}.")
        if self._once:
            # These records are already taken from the only iterator: put them back in front.
            self._open = lambda: itertools.chain(taken, records)
        return first

    def fingerprint(self) -> str | None:
        """A digest of all that decides the records: the files, the split and the column names.

        It is `None` without files.
        """
        if self._path is None:
            return None
        files = files_of(self._path, self._split, self._subset)
        # The names within a folder decide which split a file belongs to.
        names = [file.relative_to(self._path).as_posix() for file in files]
        settings = self._split, self._subset, self._columns, self._options, self._part
        return digest_files(files, names, *settings)

    def place(self) -> tuple[object, ...]:
        """The files and the split that are read: the same for the same records."""
        if self._path is None:
            return self.source, self._split, self._subset
        files = files_of(self._path, self._split, self._subset)
        split = saved_split(self._path, self._split) if is_saved(self._path) else None
        return *(file.resolve() for file in files), split

    def __str__(self):
        form = f"{self.source}{self._chosen_files()}: {self.form}"
        return f"{form}; {self._in_words()}" if self._in_words() else form

    def _in_words(self) -> str:
        shape = self._shape or PLAIN
        return f"{shape}, paired {self._options.pairs}" if shape.ranking else str(shape)

    def _chosen_files(self) -> str:
        if self._path is None or self._path.is_file() or is_saved(self._path):
            return ""
        return f" ({choose(self._path, self._split, self._subset)})"


def read(
    path_or_iterable: str | Path | Iterable[Mapping[str, Any]],
    *,
    columns: Mapping[str, str | None] | None = None,
    split: str | None = None,
    subset: str | None = None,
    pairs: str = "best-worst",
    ties: str = "drop",
    offset_from_scores: bool = False,
    where: Mapping[str, Any] | None = None,
    as_chat: bool = False,
) -> Records:
    """Records to learn from: from a file, a folder, a name on the Hugging Face hub, an iterable.

    Files are JSON Lines, a list in JSON, CSV, TSV, Parquet or Arrow, plain or compressed by gzip,
    bzip2, xz or Zstandard. The content decides, not the name; only a table of text must be named
    `.csv` or `.tsv`. The form is recognised from the columns of the first record; `str(records)`
    and the log report it:

    | form | columns |
    |---|---|
    | explicit prompt | `prompt`, `chosen`, `rejected` |
    | implicit prompt | `chosen`, `rejected`, both with the prompt, which is their common prefix |
    | unpaired | `prompt`, `completion`, `label` |
    | token ids | `prompt_ids`, `chosen_ids`, `rejected_ids` |
    | unpaired token ids | `prompt_ids`, `completion_ids`, `label` |
    | completion (or its token ids) | the same without `label`, for supervised training |
    | messages | `messages`: a conversation; the assistant's turns at its end are the completion |
    | text | `text`, a completion without a prompt |

    Prompts and completions are text, or lists of messages with `role` and `content`. A record may
    also hold the numbers `weight`, `beta` and `offset`, precomputed log-probabilities of the
    reference (`reference_chosen` and `reference_rejected`, or `reference_completion`; TRL's names
    are understood), and, for the chat template, `tools` and `chat_template_kwargs`. Public layouts
    become these forms: other names of columns, ShareGPT's messages, two answers with a verdict,
    several answers with scores or ranks, and OpenAssistant's trees, which are read into memory.

    **Arguments:**

    - `path_or_iterable`: the source. A generator can be read only once.
    - `columns`: maps our names to the names in the source, as in `{"prompt": "question"}`; the
        inverse mapping is understood too. `{"weight": None}` leaves a column out.
    - `split`: the split of a data set with several, by default `"train"`. In a folder of files
        their names and those of folders say `train`, `validation` or `test`, or `configs:` in
        `README.md` lists them. Hidden files and metadata are never read.
    - `subset`: the subset (`config_name`) of a data set with several.
    - `pairs`: the pairs of several answers: `"best-worst"`, `"best-rest"` (the best one with every
        worse one) or `"all"`. Equal scores make no pair.
    - `ties`: whether two answers of equal worth are left out, `"drop"`, or make both pairs with the
        weight 0.5 each, `"half"`. `Records.left_out` counts what is left out.
    - `offset_from_scores`: whether the difference of both scores becomes `offset`, as
        `losses.odpo` takes it. The scores are those of several answers, or columns such as
        `score_chosen`.
    - `where`: values that columns of the source must have, as in `{"lang": "en"}`. Other records
        are left out.
    - `as_chat`: whether a prompt of text becomes a turn of the user, and an answer of text a turn
        of the assistant. A dialogue with `Human:` and `Assistant:` becomes its turns.

    **Returns:**

    `Records`, to iterate over; nothing is read yet.

    **Raises:**

    `FileNotFoundError` for a source that does not exist; while reading, `ValueError` that names
    file, line, column and what was found.
    """
    columns = check_columns(columns)
    options = Options(pairs, ties, offset_from_scores, tuple((where or {}).items()), as_chat)
    check_options(options)
    if isinstance(path_or_iterable, str | Path):
        return _read_path(path_or_iterable, columns, split, subset, options)
    if not isinstance(path_or_iterable, Iterable) or isinstance(path_or_iterable, Mapping | bytes):
        raise ValueError(
            "`path_or_iterable` must be a path, a name of the Hugging Face hub or an iterable of "
            f"mappings; got {type(path_or_iterable).__name__}. If it maps splits, give one."
        )
    if split != str(getattr(path_or_iterable, "split", None)):
        check_not_given("an iterable of records", split=split)
    check_not_given("an iterable of records", subset=subset)
    source = "`path_or_iterable`"
    return Records(
        lambda: located(path_or_iterable, source),
        source,
        columns,
        options=options,
        once=iter(path_or_iterable) is path_or_iterable,
        in_memory=isinstance(path_or_iterable, Sized),
    )


def _read_path(
    source: str | Path,
    columns: Mapping[str, str | None],
    split: str | None,
    subset: str | None,
    options: Options,
) -> Records:
    opened, path = open_source(source, split, subset), Path(source)
    if not path.exists():
        return Records(opened, str(source), columns, options=options, in_memory=False)
    size = sum(file.stat().st_size for file in files_of(path, split, subset))
    return Records(
        opened,
        str(source),
        columns,
        path=path,
        split=split,
        subset=subset,
        options=options,
        in_memory=size <= IN_MEMORY_BYTES,
    )
