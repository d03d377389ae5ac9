"""The fate of the records, by reason: each is kept, dropped or an error.

`truncate.py` and `tokenize.py` find the reasons; this file counts them and puts them in words.
"""

import collections
import dataclasses
import re
from pathlib import Path

import numpy as np
from jaxtyping import Int

DROPPED = {
    "prompt_fills_max_length": "the prompt alone has `max_length` tokens or more",
    "no_completion_token": "a completion has no token at all",
    "nothing_scored": "no token of a completion is scored, such as one token after an empty prompt",
    "template_refused": "the chat template refuses the conversation",
    "answer_not_rendered": "the chat template leaves out all of an answer",
}
CUT = {
    "prompt_cut": "prompt cut to `max_prompt_length`, keeping its end",
    "chosen_cut": "chosen completion cut, keeping its start, its EOS lost",
    "rejected_cut": "rejected completion cut, keeping its start, its EOS lost",
    "completion_cut": "completion cut, keeping its start, its EOS lost",
}
# The reasons that a higher limit takes away.
LIMITED = CUT.keys() | {"prompt_fills_max_length"}
LOST = {
    "prompt_text_lost": "the chat template leaves out text of the prompt",
    "answer_text_lost": "the chat template leaves out text of an answer",
    "tools_lost": "the chat template leaves out the tools",
}
NOTED = {
    "empty_completion": "an empty completion, which is now its EOS alone",
    "identical_completions": "chosen and rejected are the same: no preference to learn from",
    "nothing_before_completion": "nothing before the completion: its first token is not scored",
    "boundary_moved": "tokens merge across the end of the prompt: completions start before it",
    "prompt_not_kept": "the chat template renders the prompt otherwise before an answer: "
    "completions start before its end",
    "message_keys_unused": "the chat template leaves out the text of some keys of messages",
    "template_arguments_unused": "the chat template does not use some of `chat_template_kwargs`",
}
REASONS = DROPPED | CUT | LOST | NOTED

# The reasons to report a record, each with an example in words or with empty text.
Account = dict[str, str]


@dataclasses.dataclass
class Report:
    """What `tokenize` did, counted by reason; `str(report)` prints it in a few lines.

    - `form`: the form of the records, in words.
    - `read`: the number of records; `kept`: the number of rows. The difference is `dropped`.
    - `counts`: the number of records for each reason, a key of `REASONS`; one record can have
        several reasons.
    - `examples`: for each reason the first five records that it applies to, by number from 0.
    - `where`: the places of these records in words, such as `line 3 of a.jsonl`.
    - `places`: for some reasons an example in words, with its file, line and text.
    - `without_row`: the numbers of all dropped records.
    - `tokens`: the tokens of prompts and completions in all rows.
    - `left_out`: the number of records and answers of the source that are not among these
        records, by reason.
    - `cache`: the folder that holds the rows, if they are on disk.
    """

    form: str = ""
    read: int = 0
    kept: int = 0
    tokens: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    where: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    without_row: list[int] = dataclasses.field(default_factory=list)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    cache: Path | None = None

    @property
    def dropped(self) -> dict[str, int]:
        """The counts of dropped records, which have no row."""
        return self._of(DROPPED)

    @property
    def cut(self) -> dict[str, int]:
        """The counts of rows that lost tokens."""
        return self._of(CUT)

    @property
    def lost(self) -> dict[str, int]:
        """The counts of rows with text that the chat template leaves out."""
        return self._of(LOST)

    @property
    def noted(self) -> dict[str, int]:
        """The counts of rows that are uncut but worth a look."""
        return self._of(NOTED)

    def _of(self, reasons: dict[str, str]) -> dict[str, int]:
        return {reason: self.counts[reason] for reason in reasons if self.counts.get(reason)}

    def add(self, reasons: list[str], account: Account, where: str) -> None:
        """Counts one record, whose number is `read`, under each of `reasons`.

        `account` has an example of some reasons in words. `where` is the record's place.
        """
        for reason in reasons:
            if account.get(reason):
                self.places.setdefault(reason, account[reason])
            self.counts[reason] = self.counts.get(reason, 0) + 1
            examples = self.examples.setdefault(reason, [])
            # The report stays small however many records there are.
            if len(examples) < 5:
                examples.append(self.read)
                self.where.setdefault(reason, []).append(where)
        if not DROPPED.keys().isdisjoint(reasons):
            self.without_row.append(self.read)
        self.read += 1

    def numbers_of_rows(self) -> Int[np.ndarray, " rows"]:
        """For each row the number of its record, from 0."""
        return np.delete(np.arange(self.read), self.without_row)

    def __str__(self):
        dropped = sum(self.dropped.values())
        lines = [
            self.form,
            f"{self.read} records: {self.kept} rows kept, {dropped} dropped; {self.tokens} tokens",
            *(f"  left out {n}: {what}" for what, n in self.left_out.items()),
            *(self._line("dropped", reason) for reason in self.dropped),
            *(self._line("cut", reason) for reason in self.cut),
            *(self._line("lost", reason) for reason in self.lost),
            *(self._line("note", reason) for reason in self.noted),
            *([f"  rows in {self.cache}"] if self.cache else []),
        ]
        return "\n".join(lines)

    def _line(self, kind: str, reason: str) -> str:
        count, examples = self.counts[reason], self.where[reason]
        which = _together(examples, ", ..." if count > len(examples) else "")
        place = f"; {self.places[reason]}" if reason in self.places else ""
        return f"  {kind} {count}: {REASONS[reason]} ({which}){place}"


def _together(places: list[str], more: str) -> str:
    """Places in words, those in one file together: `lines 3, 7 of a.jsonl`."""
    parts = [re.fullmatch(r"(line|row|record) (\d+) of (.*)", place, re.DOTALL) for place in places]
    found = [(part[1], part[2], part[3]) for part in parts if part]
    if len(found) < len(places) or len({(kind, source) for kind, _, source in found}) > 1:
        return ", ".join(places) + more
    kind, _, source = found[0]
    numbers = ", ".join(number for _, number, _ in found) + more
    # Records of an iterable are counted from 0; naming the argument again would say nothing.
    of = "" if source == "`path_or_iterable`" else f" of {source}"
    return f"{kind}{'' if len(found) == 1 and of else 's'} {numbers}{of}"
