"""The operator at scale and in small, beside that of an earlier commit in the same run.

finished: 10,000 finished jobs that are kept. namespaces: as many in 50 namespaces, each watched by itself. thousand:
1,000 jobs in a minute, in turns with a bare client. These need a control plane alone (`make testbed`); pods are acted.
real: real jobs to their end on the real node (`make images`).
"""

import argparse
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import testbed
from bench import operator_finished, operator_real_jobs, operator_thousand, tables
from bench.operator_process import Release, of_checkout, of_commit, start_control_plane

INSTANCE = f"bench-operator-{os.getpid()}"
BASELINE = "723dcf3"
SECONDS = 60.0
FINISHED_S = 1800  # for one table
THOUSAND_S = 1200


def finished(cluster: testbed.Cluster, releases: list[Release], folder: Path, arguments: argparse.Namespace) -> str:
    return _finished(cluster, releases, folder, arguments.finished, ["finished"])


def namespaces(cluster: testbed.Cluster, releases: list[Release], folder: Path, arguments: argparse.Namespace) -> str:
    many = [f"finished-{number}" for number in range(arguments.namespaces)]
    return _finished(cluster, releases, folder, arguments.finished, many)


def _finished(
    cluster: testbed.Cluster, releases: list[Release], folder: Path, count: int, namespaces: list[str]
) -> str:
    operator_finished.fill(cluster, of_checkout(), namespaces, count)
    runs = [
        operator_finished.measure(cluster, release, namespaces, count, folder / f"{namespaces[0]}-{number}")
        for number, release in enumerate(releases)
    ]
    place = f"in {len(namespaces)} watched namespaces" if len(namespaces) > 1 else "in one watched namespace"
    title = f"{count} finished jobs that are kept {place}, with a filled status of 7 KiB each."
    return f"{title}\n\n{tables.table(*operator_finished.table_rows(runs))}"


def thousand(cluster: testbed.Cluster, releases: list[Release], folder: Path, arguments: argparse.Namespace) -> str:
    count, seconds = arguments.jobs, SECONDS * arguments.jobs / 1000
    runs: list[operator_thousand.OperatorRun] = []
    bare: list[operator_thousand.Waits] = []
    for number, release in enumerate(releases):
        like = f"operator-{number}"
        runs.append(operator_thousand.run_operator(cluster, release, like, count, seconds, folder / like))
        bare.append(operator_thousand.run_bare(cluster, like, f"bare-{number}", count, seconds))
    title = (
        f"{count} jobs in {seconds:.0f} s, each to its end or until {operator_thousand.LAST_S:.0f} s after the last; "
        "one pod in ten takes 40 s to start. In turns with a client that creates as many Kubernetes Jobs, and nothing "
        "else."
    )
    return f"{title}\n\n{tables.table(*operator_thousand.table_rows(runs, bare))}"


@dataclass(frozen=True)
class AtScale:
    make: Callable[[testbed.Cluster, list[Release], Path, argparse.Namespace], str]
    limit_s: int


AT_SCALE = {
    "finished": AtScale(finished, FINISHED_S),
    "namespaces": AtScale(namespaces, FINISHED_S),
    "thousand": AtScale(thousand, THOUSAND_S),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=[*AT_SCALE, "real"], help=f"of {', '.join(AT_SCALE)} and real")
    parser.add_argument("--baseline", default=BASELINE, help="commit to compare with; empty: none")
    parser.add_argument("--finished", type=int, default=10_000, help="finished jobs, in all")
    parser.add_argument("--namespaces", type=int, default=50, help="of the table of that name, 2 to 100")
    parser.add_argument("--jobs", type=int, default=1_000, help="jobs that come in, at 1,000 a minute")
    parser.add_argument("--runs", type=int, default=3, help="real jobs")
    parser.add_argument("--steps", type=int, default=6, help="of each real job")
    arguments = parser.parse_args()
    if not 2 <= arguments.namespaces <= 100:
        parser.error("--namespaces: write a number from 2 to 100")
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _end)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        before = [of_commit(arguments.baseline, folder / "baseline")] if arguments.baseline else []
        for name in [name for name in AT_SCALE if name in arguments.tables]:
            signal.alarm(AT_SCALE[name].limit_s)
            try:
                cluster = start_control_plane(INSTANCE)
                body = AT_SCALE[name].make(cluster, [*before, of_checkout()], folder, arguments)
            finally:
                signal.alarm(0)
                testbed.down(INSTANCE)
            title = f"The operator at scale: {name}"
            tables.write(f"operator-{name}", title, f"python -m bench.operator {name}", ["kopf", "kubernetes"], body)
    if "real" in arguments.tables:
        body, over_the_limit = operator_real_jobs.table(arguments.runs, arguments.steps)
        title = "Memory and writes of the operator"
        tables.write("operator", title, "python -m bench.operator real", ["kopf", "kubernetes"], body)
        if over_the_limit:
            raise SystemExit("over the limit")


def _end(number: int, _frame: object) -> None:
    """End with all that was started, which the default of a signal would leave behind."""
    raise SystemExit(f"ended by {signal.Signals(number).name}: no table is written")


if __name__ == "__main__":
    main()
