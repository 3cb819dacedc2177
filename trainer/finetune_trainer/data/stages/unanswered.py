"""Leave out rows of which nothing is to be learned, as conversations whose every answer is masked."""

from collections.abc import Sequence

from finetune_trainer.data.kinds import kind_of
from finetune_trainer.data.problems import Drop
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.stages.stage import Stage, Staged, dropping


def _run(rows: Sequence[Checked]) -> Staged:
    return dropping(rows, lambda item: not kind_of(item.row).has_answer(item.row), Drop.NO_LABEL)


UNANSWERED = Stage("unanswered", "leaves out conversations of which no answer is to be learned", _run)
