"""`finetune wait`: until a job in the cluster has ended."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

from finetune_api.printable import printable
from finetune_api.quality import WATCHED_FIGURE
from finetune_api.reasons import Reason
from finetune_cli.cluster import Cluster, UnavailableError
from finetune_cli.errors import CommandError, Exit
from finetune_cli.show import accuracy, rate

POLL_S = 2.0
MAX_SILENCE_S = 300.0


def condition(job: dict[str, Any], kind: str) -> dict[str, Any]:
    conditions = (job.get("status") or {}).get("conditions") or []
    return next((item for item in conditions if item.get("type") == kind), {})


def verdict(job: dict[str, Any]) -> Exit | None:
    """How the job ended; None while it runs, or while the status speaks of an older spec."""
    if (job.get("status") or {}).get("observedGeneration") != job["metadata"].get("generation"):
        return None
    succeeded = condition(job, "Succeeded")
    if succeeded.get("reason") == Reason.PLANNED:  # all that startPolicy: PlanOnly asks for
        return Exit.SUCCEEDED
    return {"True": Exit.SUCCEEDED, "False": Exit.FAILED}.get(succeeded.get("status", ""))


def line(job: dict[str, Any]) -> str:
    """Return phase, place, loss and what the operator says, on one printable line."""
    status = job.get("status") or {}
    progress = status.get("progress") or {}
    eta, rows_per_second = progress.get("eta"), progress.get("rowsPerSecond")
    loss = (status.get("metrics") or {}).get("loss")
    figures = {each["name"]: each["value"] for each in progress.get("figures") or []}
    degraded = condition(job, "Degraded")
    told = degraded if degraded.get("status") == "True" else condition(job, "Succeeded")
    running = condition(job, "Running")
    if not told.get("message") and running.get("status") == "False":
        told = running  # it says what is waited for
    parts = [
        status.get("phase") or "Waiting for the operator",
        progress.get("text"),
        rows_per_second and rate(rows_per_second),
        eta and f"{eta} left",
        loss and f"loss {loss}",
        WATCHED_FIGURE in figures and accuracy(figures[WATCHED_FIGURE]),
        told.get("message"),
    ]
    return printable(" · ".join(str(part) for part in parts if part))  # it also stands in a live line


def wait(
    cluster: Cluster,
    namespace: str,
    name: str,
    timeout_s: float | None,
    console: Console,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Exit:
    """Show the job until it ends. Raises CommandError when the cluster stays silent or the job is gone."""
    started_s = heard_s = clock()
    said = ""
    with console.status("") as live:
        while True:
            try:
                job = cluster.get(namespace, name)
                heard_s = clock()
            except UnavailableError as error:
                if clock() - heard_s > MAX_SILENCE_S:
                    raise CommandError(f"{error} for {MAX_SILENCE_S:.0f} s", Exit.CLUSTER) from error
            else:
                text = line(job)
                live.update(text)
                phase = (job.get("status") or {}).get("phase", "")
                ended = verdict(job)
                if ended is not None or phase != said:
                    console.print(f"{name}: {text}", markup=False, soft_wrap=True)
                    said = phase
                if ended is not None:
                    say_concern(job, console)
                    _show_artifacts(job, console)
                    return ended
            if timeout_s is not None and clock() - started_s >= timeout_s:
                console.print(f"{name}: not ended after {timeout_s:.0f} s", markup=False)
                return Exit.TIMEOUT
            sleep(POLL_S)


def say_concern(job: dict[str, Any], console: Console) -> None:
    """Say in red what speaks against the model; a job with a concern succeeds all the same."""
    found = condition(job, "QualityConcern")
    if found.get("status") == "True":
        console.print(f"[bold red]{escape(found['reason'])}[/] {escape(found['message'])}", soft_wrap=True)


def _show_artifacts(job: dict[str, Any], console: Console) -> None:
    for artifact in (job.get("status") or {}).get("artifacts") or []:
        console.print(f"  adapter {artifact['uri']}\n  digest  {artifact['digest']}", markup=False, soft_wrap=True)
