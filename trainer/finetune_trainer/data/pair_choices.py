"""Which of several answers to one prompt, each with a score, make pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from finetune_api import defaults
from finetune_api.job import Pairing, PreferenceSpec
from finetune_trainer.data.rows import RankedPair

_PAIRING = Pairing(defaults.PAIRING)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairChoices:
    """What the job chose. min_margin: by how much the chosen answer is scored better at least; most: pairs of a row."""

    pairing: Pairing = _PAIRING
    min_margin: float = 0.0
    most: int = defaults.MAX_PAIRS_PER_PROMPT

    @classmethod
    def of(cls, spec: PreferenceSpec | None) -> "PairChoices":
        """Return the choices with a value for each that the job leaves open."""
        given = spec or PreferenceSpec()
        return cls(
            pairing=defaults.given(given.pairs, _PAIRING),
            min_margin=given.min_margin or 0.0,
            most=defaults.given(given.max_pairs_per_prompt, defaults.MAX_PAIRS_PER_PROMPT),
        )


def pairs_of(scores: Sequence[float], said: Sequence[object], choices: PairChoices) -> list[RankedPair]:
    """Return the pairs that answers make, those of the largest margin first; of equal ones those that come first.

    said: what each answer says. Two that are scored alike, or say the same, make no pair."""

    def is_pair(pair: RankedPair) -> bool:
        margin = scores[pair.chosen] - scores[pair.rejected]
        return margin > 0 and margin >= choices.min_margin and said[pair.chosen] != said[pair.rejected]

    most = 1 if choices.pairing is Pairing.BEST_VS_WORST else choices.most
    found = filter(is_pair, (RankedPair(*places) for places in permutations(range(len(scores)), 2)))
    return sorted(found, key=lambda pair: scores[pair.rejected] - scores[pair.chosen])[:most]
