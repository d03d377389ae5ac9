"""Tokens per second on pairs of real lengths: padded to one width, bucketed, packed.

    python -m benchmarks.packing --data harmless-base-test.jsonl.gz

A byte-pair tokenizer is learned from the file. A step's time depends on the shape of the batch, not
on the tokens. So each shape of an epoch is timed alone, in turns with all other shapes. The epoch's
time is the sum over its batches, and the rate is its real tokens (no padding) over this time.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import optax

import dpo_eqx as dpx
from dpo_eqx import data, losses, models
from dpo_eqx.data._tokens.rows import Row

WIDTH, LAYERS, HEADS, FEED_FORWARD = 256, 4, 8, 688


class BytePairs:
    """A byte-pair tokenizer learned from the texts, with an EOS."""

    def __init__(self, texts: Sequence[str], vocab: int):
        import tokenizers

        self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        self.bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=["</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self.bpe.train_from_iterator(texts, trainer)
        self.eos_token_id, self.bos_token_id = 0, None

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.bpe.encode(text).ids


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to make an epoch of batches: one batch of each shape, and the number of its batches."""

    name: str
    score: Callable[..., Any]
    shapes: list[tuple[Any, int]]
    positions: int


def padded(name: str, rows: list[Row], pairs: int, buckets: int) -> Way:
    """Batches of `data.batches`, without prefetching."""
    batches = data.batches(rows, batch_size=pairs, buckets=buckets, prefetch=0)
    shapes: dict[tuple[int, ...], list[Any]] = {}
    for batch in batches:
        widths = batch.prompt.ids.shape[1], batch.chosen.ids.shape[1]
        shapes.setdefault(widths, [batch, 0])[1] += 1
    found = [(batch, count) for batch, count in shapes.values()]
    return Way(name, dpx.score_pairs, found, batches.shapes().padded)


def as_the_command(rows: list[Row], pairs: int) -> Way:
    """Batches of `data.packed_batches`, which `dpo-eqx train --pack` takes."""
    with data.packed_batches(rows, batch_size=pairs, prefetch=0) as batches:
        batch, shapes = next(batches), batches.shapes()
    name = f"--pack, {shapes.rows} rows of {shapes.length}, {batch.scored.shape[1]} scored"
    return Way(name, dpx.score_packed, [(batch, shapes.steps)], shapes.padded)


def packed(rows: list[Row], pairs: int, length: int, scored: int | None) -> Way:
    """Batches of packed rows, with as many rows as hold about `pairs` pairs."""
    whole = data.pack(rows, length, scored=scored)
    count = max(round(pairs * whole.rows / len(rows)), 1)
    whole = data.pack(rows, length, scored=scored, multiple_of=count)
    name = f"packed, {count} rows of {length}, {whole.scored.shape[1]} scored"
    steps = whole.rows // count
    return Way(name, dpx.score_packed, [(whole.take(slice(count)), steps)], whole.ids.size)


def compiled(step: Callable, frozen: Any, policy: Any, opt_state: Any) -> Callable:
    """The step, compiled for a batch and a reference, with its state donated."""

    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        return step(policy, opt_state, *frozen)

    return train.lower(frozen, policy, opt_state).compile()


def timed(ways: Sequence[Way], vocab: int, length: int, rounds: int) -> list[float]:
    """Seconds of an epoch for each way: the sum over batches of the median time of their shape."""
    config = models.Config(
        vocab=vocab,
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        feed_forward=FEED_FORWARD,
        max_length=length,
    )
    policy = models.Transformer(config, key=jax.random.key(0))
    reference, optimizer = dpx.snapshot(policy), optax.adamw(1e-6)
    opt_state = optimizer.init(eqx.filter(policy, eqx.is_array))
    runs = []
    for way in ways:
        step = dpx.make_step(losses.dpo, optimizer, score=way.score)
        for batch, _ in way.shapes:
            frozen = jax.device_put(batch), reference
            runs.append((compiled(step, frozen, policy, opt_state), frozen, []))
    for number in range(rounds + 1):
        for train, frozen, times in runs:
            started = time.perf_counter()
            policy, opt_state, _ = jax.block_until_ready(train(frozen, policy, opt_state))
            # The first run has cold caches.
            if number:
                times.append(time.perf_counter() - started)
    medians = iter([statistics.median(times) for _, _, times in runs])
    return [sum(next(medians) * count for _, count in way.shapes) for way in ways]


def report(ways: Sequence[Way], seconds: Sequence[float], rows: list[Row]) -> None:
    """The table: real tokens of an epoch over its time, and the ratio to the first row."""
    tokens = sum(len(ids) for row in rows for name, ids in row.items() if name.endswith("_ids"))
    print("| | shapes | padding | real tokens/s | pairs/s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for way, spent in zip(ways, seconds, strict=True):
        rates = f"{tokens / spent:.0f} | {len(rows) / spent:.1f} | {seconds[0] / spent:.2f}"
        print(f"| {way.name} | {len(way.shapes)} | {1 - tokens / way.positions:.0%} | {rates} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads, tokenises, times and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a file of preferences")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument(
        "--max-length", type=int, default=256, help="tokens of prompt and completion"
    )
    parser.add_argument(
        "--pairs", type=int, default=16, help="pairs in a batch; approximate if packed"
    )
    parser.add_argument("--buckets", type=int, default=4)
    parser.add_argument(
        "--length", type=int, nargs="*", default=[], help="further lengths of a packed row"
    )
    parser.add_argument("--scored", type=int, nargs="*", help="scored tokens of a packed row")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    records = list(data.read(options.data))
    texts = [record["chosen"] for record in records]
    tokenizer = BytePairs(texts, options.vocab)
    rows, counts = data.tokenize(records, tokenizer, max_length=options.max_length)
    print(counts, flush=True)
    rows = list(rows)
    ways = [
        padded("one width", rows, options.pairs, 1),
        padded(f"buckets={options.buckets}", rows, options.pairs, options.buckets),
        as_the_command(rows, options.pairs),
    ]
    for length, scored in itertools.product(options.length, options.scored or [None]):
        ways.append(packed(rows, options.pairs, length, scored))
    report(ways, timed(ways, options.vocab, options.max_length, options.rounds), rows)


if __name__ == "__main__":
    main()
