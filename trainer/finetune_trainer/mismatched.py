"""Prompts with the answers of others: what tells how far a model has moved, whatever it is asked.

Each example's partner is fixed by the plan's seed, so that the base model scores them once: `reference`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.examples import Examples, FlatSequence, TokenRun

_TRIES = 8  # partners with the same prompt that are passed over
_USE = 2  # of random numbers; `batches` has the others


def _stride(examples: int, seed: int) -> int:
    """Return how many examples behind each its partner lies: at least one, if there are two."""
    if examples < 2:
        return 0
    return int(np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, _USE, 0])).integers(1, examples))


@dataclass(frozen=True)
class Mismatched(Examples):
    """Examples of one sequence each, read as their prompt and the answer of their partner.

    A prompt is what comes before the first label. Where both are longer together than a sequence may be, the beginning
    of the prompt is left out."""

    stride: int = 0
    longest: int = 0  # tokens that a sequence may have

    @classmethod
    def of(cls, examples: Examples, seed: int, longest: int) -> Self:
        """Return the same prompts with other answers. longest: tokens that a sequence may have."""
        values = {name: getattr(examples, name) for name in Examples.__dataclass_fields__}
        return cls(**values, stride=_stride(len(examples), seed), longest=longest)

    def partner(self, example: int) -> int:
        """Return whose answer an example is read with: one of another prompt, if there is one among the first tried.

        It is never its own, unless there is only one example."""
        prompt = self._prompt(example)
        tried = [(example + self.stride + place) % len(self) for place in range(_TRIES)]
        others = [each for each in tried if each != example] or [example]
        return next((each for each in others if not np.array_equal(self._prompt(each), prompt)), others[-1])

    def read(self, sequence: FlatSequence) -> TokenRun:
        """Return a prompt with the answer of its partner."""
        other = super().read(self._own(self.partner(sequence.example)))
        begin = int(other.labels.argmax())
        answer = TokenRun(other.tokens[begin:], other.labels[begin:])
        prompt = self._prompt(sequence.example)
        prompt = prompt[max(0, min(len(prompt) - 1, len(prompt) + len(answer.tokens) - self.longest)) :]
        return TokenRun(
            np.concatenate([prompt, answer.tokens]),
            np.concatenate([np.zeros(len(prompt), dtype=np.uint8), answer.labels]),
        )

    def lengths(self, sequences: Sequence[FlatSequence]) -> list[int]:
        """Return the number of tokens of each flat sequence."""
        return [len(self.read(each).tokens) for each in sequences]

    def _own(self, example: int) -> FlatSequence:
        (sequence,) = self.sequences_of([example])
        return sequence

    def _prompt(self, example: int) -> npt.NDArray[np.uint32]:
        tokens, labels = super().read(self._own(example))
        return tokens[: int(labels.argmax())]
