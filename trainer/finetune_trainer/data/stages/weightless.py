"""Leave out rows whose own weight is 0: they are there to be read by people, not to be learned."""

from collections.abc import Sequence

from finetune_trainer.data.problems import Drop
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.stages.stage import Stage, Staged, dropping


def _run(rows: Sequence[Checked]) -> Staged:
    return dropping(rows, lambda item: None if item.row.weight else Drop.NO_LABEL, "weight")


WEIGHTLESS = Stage("weightless", "leaves out rows whose weight is 0", _run)
