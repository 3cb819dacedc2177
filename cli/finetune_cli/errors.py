"""How the command ends when it does not succeed."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of `finetune`. Of a failed `run` it is the trainer's own: 10-29 final, 30-49 worth a retry."""

    SUCCEEDED = 0
    FAILED = 1
    USAGE = 2  # wrong arguments, or a job that is refused
    CLUSTER = 3  # no answer from the cluster, or no such object
    TIMEOUT = 124  # as timeout(1)
    INTERRUPTED = 130  # as a shell reports Ctrl-C


class CommandError(Exception):
    """Something the person at the keyboard can act on; printed without a trace."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
