"""Held-out preference accuracy on hh-rlhf's harmless-base test split, by `dpo-eqx train` alone.

    python -m benchmarks.hh_rlhf harmless-base-test.jsonl.gz --work FOLDER

The last 312 of its 2312 pairs are held out. The first 2000 pairs train a byte-pair tokenizer and a
small decoder: the loss `sft` fits the decoder to the chosen answers, then DPO trains it, with
several seeds of the order. The program prints each accuracy with Wilson's 95% interval.
"""

import argparse
import json
import os
from pathlib import Path

import jax

from dpo_eqx import data, models
from dpo_eqx.cli import main as dpo_eqx

HELD_OUT = 312
VOCAB, WIDTH, LAYERS, HEADS = 2048, 128, 2, 4
# Prompts keep their end and answers their start, so that no pair is dropped.
DATA = {"max-prompt-length": 128, "max-completion-length": 64, "batch-size": 16, "buckets": 2}
FIT = {"loss": "sft", "learning-rate": 3e-3, "schedule": "cosine", "warmup-steps": 30}
DPO = {"loss": "sigmoid", "beta": 0.1, "learning-rate": 3e-4, "schedule": "cosine"}


def split(path: Path, work: Path) -> tuple[Path, Path]:
    """The pairs to train on and the held-out pairs, each in a file."""
    records = list(data.read(path))
    files = work / "train.jsonl", work / "held-out.jsonl"
    parts = records[:-HELD_OUT], records[-HELD_OUT:]
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(json.dumps(record) + "\n" for record in part))
    return files


def new_model(texts: Path, folder: Path) -> None:
    """A decoder with random weights, and a tokenizer learned from the texts."""
    # Suppresses the notice that PyTorch is missing.
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = (json.loads(line) for line in texts.read_text().splitlines())
    bpe.train_from_iterator((record["chosen"] for record in records), trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder / "tokenizer")
    config = models.Config(vocab=VOCAB, width=WIDTH, layers=LAYERS, heads=HEADS, tied=True)
    policy = models.Transformer(config, key=jax.random.key(0))
    models.save(policy, folder / "new", tokenizer_from=folder / "tokenizer")


def train(settings: dict, **more: object) -> None:
    """Runs `dpo-eqx train`, which must succeed. A finished run is not repeated."""
    given = {**DATA, **settings, **more}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    status = dpo_eqx(["train", "--resume", *flags])
    if status:
        raise SystemExit(status)


def last_accuracy(output: Path) -> float:
    """The held-out accuracy at the end; a tie counts one half."""
    line = (output / "eval.jsonl").read_text().splitlines()[-1]
    return json.loads(line)["eval/rewards/accuracies"]


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval around a share of `count` trials."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    half *= z / (1 + z**2 / count)
    return middle - half, middle + half


def main() -> None:
    """Makes the model, fits it, trains it with each seed, and prints the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="harmless-base-test.jsonl.gz")
    parser.add_argument("--work", type=Path, required=True, help="a folder for all output files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fit-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))
    training, held_out = split(options.data, work)
    if not (work / "new").exists():
        new_model(training, work)

    common = {"data": training, "eval-data": held_out}
    fitted = work / "fitted"
    train(FIT, **common, epochs=options.fit_epochs, model=work / "new", output=fitted)
    accuracies = []
    for seed in range(options.seeds):
        output = work / f"dpo-{seed}"
        more = {"seed": seed, "epochs": options.epochs, "model": fitted / "model"}
        train(DPO, **common, **more, output=output)
        accuracies.append(last_accuracy(output))
    for seed, accuracy in enumerate(accuracies):
        low, high = wilson(accuracy, HELD_OUT)
        print(f"seed {seed}: held-out accuracy {accuracy:.3f} ({low:.3f} to {high:.3f})")
    mean = sum(accuracies) / len(accuracies)
    low, high = wilson(mean, HELD_OUT)
    print(f"mean of {len(accuracies)} seeds: {mean:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
