"""Makes `tests/golden/models/traces/llama/sft.json`: supervised training in plain PyTorch.

It needs `torch` and `transformers`, and nothing of this library: `python -m tests.cli.make_sft`.
"""

import json
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
DATA, TRACE = GOLDEN / "data" / "llama", GOLDEN / "models" / "traces" / "llama"
STEPS, BATCH, RATE = 5, 4, 0.5
# What PyTorch leaves out of a cross-entropy.
UNSCORED = -100


def row_of(tokenizer, record):
    """The ids of a prompt with its completion, and the same ids as labels of the completion."""
    prompt = tokenizer(record["prompt"])["input_ids"]
    # One answer of the data ends with the EOS already.
    answer = record["completion"].removesuffix(tokenizer.eos_token) + tokenizer.eos_token
    ids = tokenizer(record["prompt"] + answer)["input_ids"]
    # A token that merges across the end of the prompt belongs to the completion.
    shared = 0
    while shared < len(prompt) and prompt[shared] == ids[shared]:
        shared += 1
    return ids, [UNSCORED] * shared + ids[shared:]


def padded(sequences, fill):
    import torch

    width = max(map(len, sequences))
    return torch.tensor([[*sequence, *[fill] * (width - len(sequence))] for sequence in sequences])


def step_of(model, optimizer, rows):
    """One update on the mean over all scored tokens, and what it was computed from."""
    import torch

    columns = zip(*rows, strict=True)
    ids, labels = (
        padded(column, fill) for column, fill in zip(columns, (0, UNSCORED), strict=True)
    )
    real = padded([[1] * len(row) for row, _ in rows], 0)
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
    targets = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=UNSCORED)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    scored = targets != UNSCORED
    correct = (logits.argmax(-1) == targets)[scored].double().mean()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[scored].mean()
    optimizer.step()
    return {
        "loss": float(loss.detach()),
        "grad_norm": float(norm.detach()),
        "mean_token_accuracy": float(correct),
        "entropy": float(entropy.detach()),
        "logits/chosen": float(logits.detach().mean(-1)[scored].mean()),
        "scored": int(scored.sum()),
        "tokens": int(real.sum()),
    }


def main():
    import torch
    import transformers

    lines = (DATA / "dataset.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[: STEPS * BATCH]]
    records = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in records]
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        TRACE / "model", dtype=torch.float64, attn_implementation="eager"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    rows = [row_of(tokenizer, record) for record in records]
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    steps = [step_of(model, optimizer, batch) for batch in batches]
    norms = {name: float(p.detach().norm()) for name, p in model.named_parameters()}
    about = {
        "made with": {m.__name__: m.__version__ for m in (torch, transformers)},
        "batch_size": BATCH,
        "learning_rate": RATE,
    }
    trace = {**about, "steps": steps, "final_norms": norms}
    (TRACE / "sft.json").write_text(json.dumps(trace, indent=1) + "\n")


if __name__ == "__main__":
    main()
