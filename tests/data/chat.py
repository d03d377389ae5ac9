"""A tokenizer with a chat template that shows every turn, and the texts of its rows."""

from pathlib import Path

from dpo_eqx import data

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer():
    loaded = data.load_tokenizer(GOLDEN / "gpt2")
    loaded.chat_template = TEMPLATE
    return loaded


def texts(tokenizer, row):
    """The texts of a row's prompt and completions."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
    return tuple(tokenizer.decode(row[name]) for name in names if name in row)
