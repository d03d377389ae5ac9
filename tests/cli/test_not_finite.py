"""What a run says of a metric that is not finite: which, and what can be its cause."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx.cli.run.late_metrics import TOKENS, Lines

CASES = {
    "the first step": (1, ("loss", "logps/chosen"), "learning rate is not the cause: the model"),
    "a later step": (5, ("grad_norm",), "Start again with another `--output`, and with a lower"),
    "the reference": (1, ("loss", "rewards/chosen"), "those of the reference are not. Give ano"),
    "the reference later": (5, ("rewards/rejected",), "those of the reference are not"),
    "both": (5, ("logps/chosen", "rewards/chosen"), "`--resume` would come to the same"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_remedy(case):
    step, names, message = CASES[case]
    written = []
    lines = Lines(lambda *line: written.append(line), np.ones(5))
    line = dict.fromkeys(("loss", "grad_norm", "logps/chosen", "rewards/chosen", TOKENS), 1.0)
    line |= dict.fromkeys(names, np.nan)
    metrics = jax.block_until_ready({name: jnp.asarray(value) for name, value in line.items()})
    verb = "is" if len(names) == 1 else "are"
    said = ", ".join(f"`{name}`" for name in line if name in names)
    with pytest.raises(ValueError, match=f"^{said} {verb} not finite at step {step},.*{message}"):
        lines.add(step, metrics, 0.0)
    assert [n for n, _ in written] == [step], "the line is written before"
