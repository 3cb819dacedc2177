"""Logs: JSON lines in pods and in the bucket, plain lines in a terminal; never rows of data, never secrets."""

import json
import logging
import logging.handlers
import os
import re
import sys
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from finetune_api import layout
from finetune_api.errors import StageError
from finetune_api.names import Stage
from finetune_api.printable import printable_lines
from finetune_api.redact import without_secrets
from finetune_trainer.store import Store

log = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 4000
MAX_LOCAL_BYTES = 32 << 20  # of the log file, twice with its predecessor
MAX_UPLOAD_BYTES = 16 << 20  # the newest part of a longer file

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

_step: int | None = None  # of the whole process: threads of the loop log for the loop's step


def bind_step(step: int | None) -> None:
    """The optimizer step that log lines belong to from now on."""
    global _step
    _step = step


def configure(job: str, stage: Stage, attempt: int, json_lines: bool, file: Path) -> None:
    """Send log records to stderr (JSON or plain) and, always as JSON, to `file`.

    Our own packages log from INFO, all others from WARNING."""
    # What was read may be quoted in the message of an unexpected error, and only prepare reads rows.
    messages = stage is not Stage.PREPARE
    as_json = JsonFormatter({"job": job, "stage": stage.value, "attempt": attempt}, exception_messages=messages)
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(as_json if json_lines else PlainFormatter(exception_messages=messages))
    file.parent.mkdir(parents=True, exist_ok=True)
    local = logging.handlers.RotatingFileHandler(file, maxBytes=MAX_LOCAL_BYTES, backupCount=1, encoding="utf-8")
    local.setFormatter(as_json)
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.WARNING)
    root.addHandler(stderr)
    root.addHandler(local)
    for name in ("finetune_trainer", "finetune_api", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    bind_step(None)
    logging.captureWarnings(True)
    # A full disk must not turn every log line into a trace on stderr.
    logging.raiseExceptions = False


def take_over_transformers() -> None:
    """Send what transformers and its hub client warn of through our handlers, and let neither draw progress bars."""
    from transformers.utils import logging as of_transformers  # not above: prepare does without its imports

    of_transformers.disable_default_handler()
    of_transformers.enable_propagation()
    of_transformers.disable_progress_bar()


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with the fields of the run in each."""

    def __init__(self, fields: dict[str, object], *, exception_messages: bool) -> None:
        super().__init__()
        self._fields = fields
        self._exception_messages = exception_messages

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            **self._fields,
            "step": _step,
            "logger": record.name,
            "message": clean(record.getMessage()),
        }
        if trace := _trace(record, messages=self._exception_messages):
            line["trace"] = trace
        return json.dumps(line, ensure_ascii=False)


class PlainFormatter(logging.Formatter):
    """For people at a terminal: time, level where it matters, step, message."""

    def __init__(self, *, exception_messages: bool) -> None:
        super().__init__()
        self._exception_messages = exception_messages

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        level = "" if record.levelno <= logging.INFO else f"{record.levelname} "
        step = "" if _step is None else f"step {_step}: "
        trace = _trace(record, messages=self._exception_messages)
        return f"{time} {level}{step}{clean(record.getMessage())}" + (f"\n{trace}" if trace else "")


def clean(message: str) -> str:
    """Return the message without colours and secrets, as letters, then cut to MAX_MESSAGE_CHARS."""
    whole = without_secrets(_COLOURS.sub("", message))
    cut = whole if len(whole) <= MAX_MESSAGE_CHARS else whole[:MAX_MESSAGE_CHARS] + "…"
    return printable_lines(cut)


def trace_text(error: BaseException, *, messages: bool) -> str:
    """Where an exception and its causes came from; their messages only if `messages`, except StageError's own."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < 10:
        said = f": {without_secrets(str(current))}"[:500] if messages or isinstance(current, StageError) else ""
        parts.append(f"{type(current).__name__}{said}\n{_frames(current.__traceback__)}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return clean("\ncaused by ".join(parts))


def _frames(trace: TracebackType | None) -> str:
    return "".join(traceback.format_tb(trace, limit=-20)).rstrip()


def _trace(record: logging.LogRecord, *, messages: bool) -> str | None:
    error = record.exc_info[1] if record.exc_info else None
    return trace_text(error, messages=messages) if error else None


class Uploader:
    """Uploads growing local files to `uri_prefix/NAME` every `interval_s` when they changed, and once at `close`.

    A file is replaced as a whole, by its newest MAX_UPLOAD_BYTES. Storage that fails is logged once and never ends
    the job: these files are for people."""

    def __init__(self, store: Store, uri_prefix: str, files: list[Path], interval_s: float = 60) -> None:
        self._store = store
        self._targets = [(path, layout.join(uri_prefix, path.name)) for path in files]
        self._interval_s = interval_s
        self._sent: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._failed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upload-logs", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 60) -> None:
        """Upload what is new, waiting at most `timeout_s`."""
        self._closing.set()
        self._thread.join(timeout_s)

    def flush(self) -> None:
        """Upload what is new, now and in this thread."""
        with self._lock:
            self._upload()

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            self.flush()
        self.flush()

    def _upload(self) -> None:
        for path, uri in self._targets:
            try:
                found = path.stat()
                stamp = (found.st_size, found.st_mtime_ns)
                if self._sent.get(path) == stamp:
                    continue
                self._store.put(uri, newest_lines(path, MAX_UPLOAD_BYTES))
                self._sent[path] = stamp
            except FileNotFoundError:
                continue
            except (StageError, OSError) as error:
                if not self._failed:
                    self._failed = True
                    log.warning("%s could not be uploaded: %s", path.name, error)


def newest_lines(path: Path, max_bytes: int) -> bytes:
    """The file's end, at most `max_bytes`, from the beginning of a line to the end of a line."""
    with path.open("rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - max_bytes)
        file.seek(start)
        data = file.read(max_bytes)
    if start:
        data = data.partition(b"\n")[2]
    return data[: data.rfind(b"\n") + 1] if b"\n" in data else data
