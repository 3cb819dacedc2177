"""The one exception that crosses stages: a known fault with its arguments."""

from finetune_api.reasons import EXIT_CODES, FAULTS, Fault, Reason, words
from finetune_api.redact import without_secrets


class StageError(Exception):
    """A stage ends for a known reason.

    The reason's exit code tells what kind it is: final (the user must change something; in prepare,
    the operator waits for that where storage is missing or denied), retryable (another attempt may work), or Unknown
    (our bug, tried again, too). Arguments are places and counts, never rows and never secrets.
    """

    def __init__(self, fault: Fault, **args: str | int | float) -> None:
        self.fault = fault
        self.args_by_name = {k: without_secrets(v) if isinstance(v, str) else v for k, v in args.items()}
        super().__init__(words(fault, self.args_by_name))

    @property
    def reason(self) -> Reason:
        return FAULTS[self.fault].reason

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.reason]
