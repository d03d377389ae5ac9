"""A tokenizer of words, for texts of people and decoders that are small."""

import collections
import re
from collections.abc import Iterable


class Words:
    """A tokenizer of the most frequent words. All others are one unknown word."""

    bos_token_id, eos_token_id, unknown, vocab_size = 0, 1, 2, 1000

    def __init__(self, texts: Iterable[str]):
        counts = collections.Counter(word for text in texts for word in self.split(text))
        words = counts.most_common(self.vocab_size - 3)
        self.ids = {word: number for number, (word, _) in enumerate(words, start=3)}

    @staticmethod
    def split(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def encode(self, text: str) -> list[int]:
        words = self.split(text)
        return [self.bos_token_id, *(self.ids.get(word, self.unknown) for word in words)]
