"""`transformers`' own `generate`, with its cache, and fused attention."""

import torch
from transformers import AutoModelForCausalLM

from benchmarks.sample import Drawing, checksum
from benchmarks.turns import Turns
from benchmarks.workers import given


def main() -> None:
    turns = Turns(version=f"PyTorch {torch.__version__}")
    drawing, folder = given(Drawing)
    settings = {"attn_implementation": "sdpa", "dtype": getattr(torch, drawing.dtype)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", **settings).eval().to(device)
    how = {"do_sample": False}
    if drawing.top_p is not None:
        how = {"do_sample": True, "top_p": drawing.top_p, "top_k": 0}
    turns.begin()
    for batch, length, new in drawing.calls():
        ids = torch.from_numpy(drawing.ids(batch, length)).long().to(device)
        with torch.inference_mode():
            drawn = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
                **how,
            )
        if not turns.step_done(checksum(drawing, drawn[:, length:].cpu().numpy())):
            return


if __name__ == "__main__":
    main()
