"""English text as token ids: Wikipedia articles out of a pinned package, or a text file of your own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

from examples.demo import wikipedia_articles
from examples.training import device, picks

TEST_SHARE = 0.1  # of the text, at its end: other articles than those that are trained on


@dataclass(frozen=True)
class Size:
    """Of a language model, of the texts that it sees in a step, and of its run.

    Attributes:
        length: Tokens of a piece of text.
        batch: Pieces in a step.
        lr: Peak learning rate.
    """

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int
    batch: int
    steps: int
    lr: float
    test_batches: int


@dataclass
class Corpus:
    """Token ids of the training and of the test text; (tokens,)."""

    train: Tensor
    test: Tensor
    vocabulary: int

    def batch(self, step: int, size: int, length: int, seed: int) -> Tensor:
        """Pieces of the training text; (size, length)."""
        starts = picks(len(self.train) - length, size, step, seed).to(self.train.device)
        return self.train[starts.unsqueeze(-1) + torch.arange(length, device=self.train.device)]

    def test_batches(self, size: int, length: int, count: int) -> list[Tensor]:
        """``count`` batches, or as many as there are, of the test text, one piece after the other."""
        pieces = self.test[: len(self.test) // length * length].view(-1, length)
        return list(pieces.split(size))[:count]

    def __str__(self) -> str:
        return f"{len(self.train):,} tokens of text to train on, {len(self.test):,} to test, {self.vocabulary:,} kinds"


def load_corpus(file: Path | None, vocabulary: int) -> Corpus:
    """Byte-level BPE of ``vocabulary`` tokens, learned on the training text.

    Args:
        file: Plain text; None for the articles of the package gensim.
    """
    text = "\n".join(line for article in wikipedia_articles() for line in article) if file is None else file.read_text()
    lines = text.splitlines(keepends=True)
    cut = round((1 - TEST_SHARE) * len(lines))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(lines[:cut], vocabulary, show_progress=False)

    def ids(part: list[str]) -> Tensor:
        return torch.tensor([number for line in tokenizer.encode_batch(part) for number in line.ids])

    corpus = Corpus(ids(lines[:cut]).to(device()), ids(lines[cut:]).to(device()), tokenizer.get_vocab_size())
    print(corpus, flush=True)
    return corpus
