"""The operator's log: lines that no other program can forge, without credentials.

Answers of the API server quote what users wrote and what admission webhooks say of it.
"""

import logging
from types import TracebackType

from finetune_api.printable import printable, printable_lines
from finetune_api.redact import without_secrets


def configure(level: str) -> None:
    """Send the log of all threads and libraries to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("kopf").setLevel("WARNING")


class LineFormatter(logging.Formatter):
    """Writes a record as one printable line; the trace of an exception follows it, set in."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the name of the hook)
        return printable(without_secrets(super().formatMessage(record)))

    def formatException(  # noqa: N802 (the same)
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        trace = printable_lines(without_secrets(super().formatException(ei)))
        return "\n".join(f"    {line}" for line in trace.split("\n"))
