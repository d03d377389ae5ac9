"""`dpo-eqx sample`: several answers of a policy to each prompt, in a file that can be continued.

`cli/compose/draws.py` draws them, and `dpo-eqx label` makes preferences of them.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data._fingerprint import digest
from ...models._checkpoint.folder import ADAPTER, ADAPTER_CONFIG, resolve
from ..compose import draws
from ..compose.data import learned_positions, vocab_size
from ..compose.tokenizer import NONE, load_tokenizer
from ..run import devices, growing, parts
from ..run.compilation_cache import use_compilation_cache
from ..run.inputs import digest_weights
from ..settings.check import check_positive, flag
from ..settings.groups.reading import RecordFlags, TextFlags
from ..settings.shared_flags import Loading, check_writable, in_shared_names, parse_flags
from ..settings.words import naming
from ..terminal.answers import ends_of
from ..terminal.display import display, say
from ..terminal.prompts import Reading, read_prompts, stored

# These decide where the lines go and who draws them, not what they hold.
_FREE = ("output", "resume", "process_id", "compilation_cache")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Loading, TextFlags, RecordFlags):
    """Draws several answers to each prompt, for `dpo-eqx label`."""

    model: str
    """The policy: a folder with `config.json`, safetensors and a tokenizer, or a hub name.
    `--policy` is the same flag."""
    data: str
    """Prompts: a `.txt` with one on each line, records with `prompt`, or preferences. `--prompts`
    is the same flag."""
    output: Path
    """The JSON Lines file to write: for each prompt its answers and their log-probabilities."""
    limit: int | None = None
    """Largest number of prompts to take from `--data` (default: all)."""
    as_chat: bool = False
    """Make a turn of the user from a prompt of text. Otherwise texts stay as they are, as in
    `train`."""
    max_prompt_length: int | None = None
    """Largest number of tokens of a prompt; a longer prompt loses its start."""
    samples: int = 4
    """Number of answers to each prompt."""
    max_new_tokens: int = 256
    """Largest number of tokens in an answer, which ends at the EOS if that is drawn first."""
    temperature: float = 1.0
    """Sampling temperature, by which logits are divided; 0 takes the likeliest token."""
    top_k: int | None = None
    """Number of likeliest tokens to sample from (default: all)."""
    top_p: float | None = None
    """Sample from the fewest likeliest tokens whose probabilities sum to at least this."""
    min_p: float | None = None
    """Sample from the tokens at least this times as likely as the likeliest one."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 8
    """Number of prompts answered at once."""
    buckets: int = 4
    """Number of widths that prompts are padded to. Fewer widths compile less and pad more."""
    resume: bool = True
    """Continue the answers in `--output`, if an earlier process has begun them; otherwise an
    existing file is an error."""
    num_processes: int = 1
    """Number of processes that answer a part of the prompts each. The last one to end joins the
    parts."""
    process_id: int = 0
    """The number of this process, from 0."""


def sample(arguments: Sequence[str]) -> None:
    """Runs the command with its flags in `arguments`.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for the user.
    """
    flags = parse_flags(Sample, "sample", in_shared_names(arguments))
    use_compilation_cache(flags.compilation_cache)
    _check(flags)
    vocab, positions = vocab_size(flags.model), learned_positions(flags.model)
    tokenizer = load_tokenizer(flags.model, flags.tokenizer, flags.chat_template)
    encoded = draws.encode(
        read_prompts(flags.data, flags.limit, Reading.of(flags)),
        tokenizer,
        as_turns=flags.as_chat,
        max_prompt_length=flags.max_prompt_length,
    )
    draws.check_fits(encoded, positions, flags.max_new_tokens, vocab)
    count = len(encoded.ids)
    paths = parts.part_paths(flags.output, flags.num_processes)
    shares = [parts.share_of(count, i, len(paths)) for i in range(len(paths))]
    growing.begin(
        flags.output,
        _facts(flags, encoded, tokenizer),
        resume=flags.resume,
        outputs=(flags.output, *paths),
    )
    say(_about(flags, encoded, shares[flags.process_id]))
    if len(paths) == 1 or not flags.output.exists():
        _write(flags, encoded, tokenizer, shares[flags.process_id], paths[flags.process_id])
    if parts.join(flags.output, paths, [len(share) for share in shares]):
        say(f"done: {flags.output}: {_account(flags.output)}")
    else:
        say(f"done: {paths[flags.process_id]}; the last process to end joins the parts")


def _write(flags: Sample, encoded: draws.Encoded, tokenizer: Any, share: range, path: Path) -> None:
    """Draws the answers of a share of the prompts that the file does not hold yet."""
    done = growing.complete_lines(path)
    path.touch()  # a share may be empty
    if done == len(share):
        return
    policy = flags.load(flags.model, lora=flags.lora)
    draw = draws.make_draw(
        policy,
        tokenizer,
        batch_size=flags.batch_size,
        seed=flags.seed,
        mesh=flags.devices(),
        samples=flags.samples,
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
    )
    lines_of = functools.partial(
        draws.lines_of, tokenizer=tokenizer, seed=flags.seed, ends=ends_of(policy, tokenizer)
    )
    batches = draws.batches_of(
        [len(row) for row in encoded.ids], share, flags.batch_size, flags.buckets
    )
    # A batch that was half written is drawn again as a whole: its answers then have the same bits.
    first, skipped = divmod(done, flags.batch_size)
    with growing.appending(path) as write, display(first, len(batches), what="batch") as show:
        for number, batch in enumerate(batches[first:], first + 1):
            began = time.perf_counter()
            samples = draw(encoded, batch)
            for line in list(lines_of(encoded, batch, samples))[skipped:]:
                write(line)
            skipped = 0
            speed = samples.tokens.mask.sum() / max(time.perf_counter() - began, 1e-9)
            show(number, {"tokens_per_second": float(speed)})


def _facts(flags: Sample, encoded: draws.Encoded, tokenizer: Any) -> dict[str, Any]:
    """What decides the samples, for the note beside them."""
    settings = {
        name.replace("_", "-"): str(value) if isinstance(value, Path) else value
        for name, value in vars(flags).items()
        if name not in _FREE
    }
    values = [stored(tokenizer, prompt) for prompt in encoded.prompts]
    with naming("--lora"):
        adapter = flags.lora and digest_weights(resolve(flags.lora, (ADAPTER, ADAPTER_CONFIG)))
    return {
        "command": "sample",
        **{f"--{name}": value for name, value in settings.items()},
        "number of prompts": len(encoded.ids),
        "digest of the prompts": digest(encoded.ids, values),
        "digest of --model": digest_weights(resolve(flags.model)),
        "digest of --lora": adapter,
    }


def _about(flags: Sample, encoded: draws.Encoded, share: range) -> str:
    lengths = [len(row) for row in encoded.ids]
    words = f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens"
    if encoded.cut:
        words += f"; {encoded.cut} lost their start (`--max-prompt-length`)"
    if flags.num_processes > 1:
        words += f"; process {flags.process_id} of {flags.num_processes} answers {len(share)}"
    return words


def _account(path: Path) -> str:
    lines = growing.read_objects(path, "--output")
    ended = [is_ended for line in lines for is_ended in line["ended"]]
    words = f"{len(lines)} prompts, {len(ended)} answers"
    cut = len(ended) - sum(ended)
    return f"{words}, {cut} of them cut off by `--max-new-tokens`" if cut else words


def _check(flags: Sample) -> None:
    names = ("samples", "max_new_tokens", "batch_size", "buckets", "limit", "max_prompt_length")
    for name in (*names, "top_k", "num_processes"):
        check_positive(name, getattr(flags, name))
    devices.check_rows(flags.batch_size, flags.devices())
    for name in ("temperature", "seed"):
        if not 0 <= getattr(flags, name) < float("inf"):
            raise ValueError(f"{flag(name)} must not be negative; got {getattr(flags, name)}.")
    for name in ("top_p", "min_p"):
        value = getattr(flags, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{flag(name)} must be in (0, 1]; got {value}.")
    if flags.as_chat and flags.chat_template == NONE:
        raise ValueError("`--as-chat` needs a chat template; leave out `--chat-template none`.")
    parts.check_number(flags.process_id, flags.num_processes)
    check_writable("--output", flags.output)
