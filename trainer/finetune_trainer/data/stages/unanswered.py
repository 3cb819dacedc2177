"""Leave out rows of which nothing can be learned, as conversations whose every answer is masked."""

from collections.abc import Sequence

from finetune_trainer.data.kinds import kind_of
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.stages.stage import Stage, Staged, dropping


def _run(rows: Sequence[Checked]) -> Staged:
    return dropping(rows, lambda item: kind_of(item.row).unlearnable(item.row))


UNANSWERED = Stage("unanswered", "leaves out rows of which nothing can be learned, as where no answer is", _run)
