"""Put damaged characters of rows right before anything compares, counts or renders them."""

from collections.abc import Sequence

from finetune_trainer.data.accounts import Action
from finetune_trainer.data.kinds import with_texts
from finetune_trainer.data.problems import Change
from finetune_trainer.data.prose import prose
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.repairs import repaired
from finetune_trainer.data.stages.stage import Stage, Staged


def _run(rows: Sequence[Checked]) -> Staged:
    staged = Staged([])
    for item in rows:
        texts: dict[str, str] = {}
        first_path: dict[Change, str] = {}
        for path, text in prose(item.row).items():
            found = repaired(text)
            if found.changes:
                texts[path] = found.text
            for change in found.changes:
                first_path.setdefault(change, path)
        staged.rows.append(item.with_row(with_texts(item.row, texts)) if texts else item)
        for change, path in first_path.items():
            staged.decide(item, Action.CHANGE, change, path)
    return staged


REPAIR = Stage("repair", "puts characters right that a wrong encoding, or what else they went through, damaged", _run)
