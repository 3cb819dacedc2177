"""Show answers by the tokenizer that read the rows, in a process of its own."""

import json
import logging
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.run import MAX_ARG_CHARS
from finetune_trainer.data.added_tokens import NAMING_FILES
from finetune_trainer.data.tokenizer import Tokenizer, TokenizerFailedError
from finetune_trainer.runplan import RunPlan

log = logging.getLogger(__name__)


def _tokenizer_of(folder: Path) -> Tokenizer:
    paths = [folder / name for name in NAMING_FILES]
    files = [json.loads(path.read_bytes()) if path.exists() else {} for path in paths]
    return Tokenizer((folder / "tokenizer.json").read_bytes(), files=files)


@contextmanager
def open_tokenizer(model_folder: Path, plan: RunPlan) -> Generator[Tokenizer]:
    """Start the tokenizer of the model in `model_folder`. Raises UNSUPPORTED_MODEL, also for what it does inside."""
    try:
        with closing(_tokenizer_of(model_folder)) as tokenizer:
            yield tokenizer
    except TokenizerFailedError as error:
        facts, problem = plan.model, shortened(str(error), MAX_ARG_CHARS)
        raise StageError(
            Fault.UNSUPPORTED_MODEL, uri=facts.uri, architecture=facts.architecture, problem=problem
        ) from error


class LastWords:
    """Decodes answers after the last step, where nothing that a tokenizer does may lose what was trained."""

    def __init__(self, model_folder: Path) -> None:
        self._folder = model_folder
        self._tokenizer: Tokenizer | None = None
        self._failed = False

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, or "" once the tokenizer has failed."""
        if self._failed:
            return ""
        try:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer_of(self._folder)
            return self._tokenizer.decode(ids)
        except (TokenizerFailedError, MemoryError, OSError) as error:
            self._failed = True
            log.warning("answers are left out of eval.json and the card: %s", error)
            return ""

    def close(self) -> None:
        if self._tokenizer is not None:
            self._tokenizer.close()
