"""A Hugging Face tokenizer with one word for each id, for trainers that need a tokenizer."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.problem import END, Problem


def word(token: int) -> str:
    """The text of a token id."""
    return {0: "<pad>", 1: "<s>", END: "</s>"}.get(token, f"t{token}")


def tokenizer_of(problem: Problem) -> PreTrainedTokenizerFast:
    """A tokenizer that splits text at spaces, and adds no tokens."""
    vocab = {word(token): token for token in range(problem.vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=word(3)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": word(0), "bos_token": word(1), "eos_token": word(END)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
