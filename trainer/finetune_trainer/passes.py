"""How the flat sequences of some examples are divided into forward passes. Pure numpy, read by both stages."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from finetune_trainer.batches import pack
from finetune_trainer.data.examples import Examples, FlatSequence, example_counts
from finetune_trainer.runplan import PassLayout


def passes(
    examples: Examples, numbers: Sequence[int], budget_tokens: int, layout: PassLayout, *, whole: bool = False
) -> Iterator[list[FlatSequence]]:
    """Divide the flat sequences of these examples into passes of at most `budget_tokens` that are computed.

    whole: all sequences of an example are in one pass, as they always are in trees; one example that is larger than
    the budget has a pass of its own."""
    sequences = examples.sequences_of(numbers)
    lengths = computed_tokens(examples, sequences, layout)
    yield from _divided(sequences, lengths, budget_tokens, layout, whole=whole)


def computed_tokens(examples: Examples, sequences: Sequence[FlatSequence], layout: PassLayout) -> list[int]:
    """Return how many tokens each flat sequence adds to a pass."""
    lengths = examples.lengths(sequences)
    if layout is not PassLayout.TREES:
        return lengths
    return [length - shared for length, shared in zip(lengths, examples.shared(sequences), strict=True)]


def _divided(
    sequences: Sequence[FlatSequence],
    lengths: Sequence[int],
    budget_tokens: int,
    layout: PassLayout,
    *,
    whole: bool,
) -> Iterator[list[FlatSequence]]:
    whole = whole or layout is PassLayout.TREES
    counts = example_counts(sequences) if whole else [1] * len(sequences)
    ends = list(accumulate(counts))
    together = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    if layout is PassLayout.APART:
        yield from (list(sequences[part]) for part in together)
        return
    sizes = [sum(lengths[part]) for part in together]
    for places in pack(sizes, max(budget_tokens, max(sizes, default=0))):
        yield [sequence for place in places for sequence in sequences[together[place]]]
