"""With whose answers prompts are read that tell how far a model has moved: another prompt's, and never their own."""

from collections.abc import Sequence

import numpy as np
import pytest

from finetune_trainer.data.examples import Examples
from finetune_trainer.mismatched import Mismatched

LONGEST = 20


def answered(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Examples:
    """Return examples of one sequence each, of which the answer is learned."""
    tokens = np.concatenate([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    labels = np.concatenate(
        [[0] * len(prompt) + [1] * len(each) for prompt, each in zip(prompts, answers, strict=True)]
    )
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return Examples.of_rows(tokens.astype("u4"), labels.astype("u1"), np.cumsum([0, *lengths]))


def partners(examples: Examples, seed: int) -> list[int]:
    found = Mismatched.of(examples, seed, LONGEST)
    return [found.partner(example) for example in range(len(examples))]


@pytest.mark.parametrize("seed", range(8))
def test_a_partner_has_another_prompt_where_one_of_the_next_has(seed: int) -> None:
    prompts = [[each // 3, 7] for each in range(12)]
    found = partners(answered(prompts, [[each + 100] for each in range(12)]), seed)
    assert all(prompts[example] != prompts[partner] for example, partner in enumerate(found))


@pytest.mark.parametrize("count", range(2, 12))
@pytest.mark.parametrize("seed", range(4))
def test_no_answer_is_its_own_partner_even_if_all_prompts_are_the_same(count: int, seed: int) -> None:
    found = partners(answered([[1, 2]] * count, [[each + 100] for each in range(count)]), seed)
    assert all(example != partner for example, partner in enumerate(found))


def test_the_seed_decides_who_is_whose_partner() -> None:
    examples = answered([[each] for each in range(50)], [[each + 100] for each in range(50)])
    assert partners(examples, 1) == partners(examples, 1)
    assert len({tuple(partners(examples, seed)) for seed in range(10)}) > 5


def test_a_prompt_is_read_with_the_whole_answer_of_its_partner_and_only_that_is_a_label() -> None:
    found = Mismatched.of(answered([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]]), 0, LONGEST)
    first, second = (found.read(each) for each in found.sequences_of([0, 1]))
    assert (first.tokens.tolist(), first.labels.tolist()) == ([1, 2, 3, 7, 8, 9], [0, 0, 0, 1, 1, 1])
    assert (second.tokens.tolist(), second.labels.tolist()) == ([4, 5, 6], [0, 1, 1])
    assert found.lengths(found.sequences_of([0, 1])) == [6, 3]


@pytest.mark.parametrize(("longest", "prompt"), [(7, [1, 2, 3, 4]), (6, [2, 3, 4]), (4, [4]), (3, [4])])
def test_where_both_are_too_long_the_beginning_of_the_prompt_is_left_out(longest: int, prompt: list[int]) -> None:
    found = Mismatched.of(answered([[1, 2, 3, 4], [9]], [[5], [6, 7, 8]]), 0, longest)
    (first, _) = found.sequences_of([0, 1])
    assert found.read(first).tokens.tolist() == [*prompt, 6, 7, 8]
