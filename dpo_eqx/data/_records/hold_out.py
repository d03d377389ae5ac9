"""Two parts of one source: records to train on, and records held out for evaluation.

`part.py` decides to which part a record belongs.
"""

from .part import Part
from .read import Records


def hold_out(records: Records, fraction: float) -> tuple[Records, Records]:
    """The records to train on, and about `fraction` of them, held out for evaluation.

    A hash of the prompt decides, so no prompt is in both parts, and the parts are the same in every
    order, file and process. Records that are added later move no other record.

    ```python
    training, held_out = data.hold_out(data.read("preferences.jsonl"), 0.02)
    ```

    If text has no column `prompt`, the prompt ends behind the last `Assistant:` that both answers
    share, or behind the last shared line, since answers may begin with the same words.

    **Arguments:**

    - `records`: records from `read`, which can be read several times.
    - `fraction`: the fraction of the prompts to hold out, in `(0, 1)`.

    **Returns:**

    `(training, held_out)`. Each counts the records of the other in `left_out`.

    **Raises:**

    `ValueError` if `fraction` is not in `(0, 1)`, or if the records can be read only once.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` must be above 0 and below 1; got {fraction}.")
    training, held_out = (records.part(Part(fraction, held)) for held in (False, True))
    return training, held_out
