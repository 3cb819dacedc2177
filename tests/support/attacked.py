"""Prepare stages over hostile input, each in a process of its own whose memory is measured: `python attacked.py`.

Reads a JSON list of `Case`s from stdin and writes a list of `Seen` to stdout. The processes are forked from one that
has imported everything and judged the model, so that an attack costs no start of Python.
"""

import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.reasons import words as told
from finetune_api.run import RunResult

if TYPE_CHECKING:
    from finetune_trainer.data.structure import LoadReport

_ADDRESS_BYTES = 6 * 2**30  # what is not bounded fails here, and not on the machine's memory
_CASE_TIMEOUT_S = 900.0  # seconds, on an idle machine
_HASTE = 50.0  # a look of the watch each second is less than half of a deadline of 300 s later


@dataclass(frozen=True)
class Case:
    """One prepare stage; see `data_run.context` for `folder` and `spec`.

    template: of the model, if there is none in the folder; the model's weights are taken as judged. limits:
    module.CONSTANT -> a smaller value. deadline_s: recovery.progressDeadlineSeconds, also below the least that a job
    may have. hangs: name of the module whose child process stands still from its start on; time flies then."""

    folder: str
    spec: dict[str, Any] = field(default_factory=dict[str, Any])
    template: str | None = None
    limits: dict[str, float] = field(default_factory=dict[str, float])
    deadline_s: float | None = None
    hangs: str | None = None


@dataclass(frozen=True)
class Seen:
    """How the stage ended, and the most memory that it, and the largest of its own children, held at once."""

    fault: str
    words: str
    peak_bytes: int
    child_peak_bytes: int


def attack(cases: Sequence[Case]) -> list[Seen]:
    """Run the cases one after another in a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-P", __file__],
        input=json.dumps([asdict(case) for case in cases]).encode(),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        timeout=_CASE_TIMEOUT_S * (len(cases) + 1),
        check=True,
    )
    return [Seen(**each) for each in json.loads(done.stdout)]


def _run(case: Case, of_template: "LoadReport") -> dict[str, Any]:
    import data_run
    from finetune_api.errors import StageError
    from finetune_api.job import RecoverySpec
    from finetune_trainer import prepare, results
    from finetune_trainer.data import structure

    data_run.use_own_process()
    if case.template is not None:
        structure.load_without_values = lambda _request: of_template
    for name, value in case.limits.items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant)
        setattr(importlib.import_module(module), constant, value)
    if not Path(case.folder, "model").exists():
        data_run.write_model(Path(case.folder, "model"), template=case.template or data_run.CHATML)
    ctx = data_run.context(Path(case.folder), case.spec)
    if case.deadline_s is not None:
        recovery = RecoverySpec.model_construct(progress_deadline_seconds=case.deadline_s)
        spec = ctx.config.spec.model_copy(update={"recovery": recovery})
        ctx = replace(ctx, config=ctx.config.model_copy(update={"spec": spec}), result_file=_result_file(case))
    if case.hangs is not None:
        _let_hang(case.hangs)
    try:
        ended = prepare.run(ctx)
        fault, words = ended.fault.value, json.dumps(ended.args)
    except Exception as error:  # noqa: BLE001 (as the stage does)
        known = error if isinstance(error, StageError) else results.of_unexpected(error)
        fault, words = known.fault.value, str(known)
        error.__traceback__ = None  # its frames would hold child processes
    peaks = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return asdict(Seen(fault, words, *peaks))


def _result_file(case: Case) -> Path:
    return Path(case.folder, "result.json")


def _let_hang(module: str) -> None:
    """Stop the child that runs `module` as soon as it is started: it never answers. The clock runs faster from then on,
    so that the deadline may be one that no slow machine misses, and comes soon all the same."""
    from finetune_trainer.data import child

    start, clock = child.start, time.monotonic

    def start_and_stop(started: str, *arguments: Any) -> child.Process:
        process = start(started, *arguments)
        if started.endswith(module):
            os.kill(process.pid, signal.SIGSTOP)
            since_s = clock()
            time.monotonic = lambda: since_s + _HASTE * (clock() - since_s)
        return process

    child.start = start_and_stop


def _forked(case: Case, of_template: "LoadReport") -> dict[str, Any]:
    """Run the case in a child of this process; how it died where it told nothing."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
        signal.alarm(int(_CASE_TIMEOUT_S))
        os.write(writer, json.dumps(_run(case, of_template)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    _, status, usage = os.wait4(pid, 0)
    if said:
        return json.loads(said)
    fault, words = f"died of {os.waitstatus_to_exitcode(status)}", ""
    if _result_file(case).exists():
        result = RunResult.model_validate_json(_result_file(case).read_bytes())
        assert os.waitstatus_to_exitcode(status) == result.exit_code
        fault, words = result.fault.value, told(result.fault, result.args)
    return asdict(Seen(fault, words, usage.ru_maxrss * 1024, 0))


def main() -> None:
    cases = [Case(**each) for each in json.load(sys.stdin)]
    import data_run
    from finetune_api.run import StorageConfig
    from finetune_trainer.data import structure
    from finetune_trainer.data.model_facts import read_model
    from finetune_trainer.store import open_store

    logging.disable()
    first = Path(cases[0].folder) / "model"
    data_run.write_model(first)
    judge = structure.load_without_values
    reports: list[structure.LoadReport] = []

    def judge_once(request: bytes) -> structure.LoadReport:
        reports.append(judge(request))
        return reports[-1]

    structure.load_without_values = judge_once
    read_model(open_store(StorageConfig()), first.as_uri())
    structure.load_without_values = judge
    seen: list[dict[str, Any]] = []
    for case in cases:
        began_s = time.monotonic()
        seen.append(_forked(case, reports[0]))
        print(case.folder, round(time.monotonic() - began_s, 1), seen[-1], file=sys.stderr)
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
