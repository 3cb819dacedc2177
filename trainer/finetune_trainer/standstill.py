"""Ends a stage that stands still: what hangs in a library, or in what data made it do, would hang for ever."""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import NoReturn

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer import results
from finetune_trainer.context import StageContext

log = logging.getLogger(__name__)


def end_process(ctx: StageContext, error: StageError) -> NoReturn:
    """End the process from another thread than the main one, which hangs, perhaps in native code."""
    if ctx.result_file is not None:
        result = results.failed(ctx.stage, ctx.attempt, error, ctx.reporter.progress(), None)
        results.write(result, ctx.result_file)
    os._exit(error.exit_code)


@contextmanager
def ended_by_standstill(ctx: StageContext, limit_s: float) -> Generator[None]:
    """End the process with NO_PROGRESS when nothing moved for `limit_s`, as the reporter is told, within the block.

    Time in which the whole process was paused, as a container or a virtual machine can be, does not count."""
    over = threading.Event()
    begun_s = time.monotonic()
    ctx.reporter.touch()

    def watch() -> None:
        looked_s = begun_s
        while not over.wait(min(1.0, limit_s / 4)):
            # The progress is taken before the clock: a pause that is in its seconds is in this turn's length too.
            progress = ctx.reporter.progress()
            looked_s, before_s = time.monotonic(), looked_s
            if looked_s - before_s > limit_s / 2:
                ctx.reporter.touch()
                continue
            seconds = progress.seconds_since_step
            if seconds > limit_s:
                error = StageError(
                    Fault.NO_PROGRESS, seconds=round(seconds), activity=progress.activity, rows=progress.rows_read
                )
                faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
                log.error("%s", error)
                end_process(ctx, error)

    thread = threading.Thread(target=watch, name="standstill", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
