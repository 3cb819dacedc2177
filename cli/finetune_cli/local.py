"""A job without a cluster: the same RunConfig as in a pod, with this machine in the place of the node."""

import fcntl
import json
import os
import shutil
import stat
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from pydantic import AwareDatetime, Field, ValidationError

from finetune_api import defaults, layout
from finetune_api.base import Digest, WireModel
from finetune_api.crd import MUTABLE_FIELDS
from finetune_api.job import FineTuneJobSpec, PrepareResourcesSpec, ResourcesSpec
from finetune_api.names import Stage, run_name
from finetune_api.run import CONTRACT_VERSION, JobRef, RunConfig, RunResources, StartingAdapter, StorageConfig
from finetune_cli.errors import CommandError, Exit

NAMESPACE = "local"
_STATE_FILE = "state.json"
_LOCK_FILE = "lock"
_PARENT_NAME = ".finetune"
_MAX_ENTRIES = 100_000  # far above what the files of a model, a data set and checkpoints are


@dataclass(frozen=True)
class Machine:
    """What this machine has."""

    cpu_count: int
    memory_bytes: int
    disk_bytes: int
    gpus: int


class State(WireModel):
    """What a later call has to know of the earlier ones. Read across releases, as the messages of a trainer are."""

    uid: str
    created_at: AwareDatetime | None = None  # of the first call; None: of a release that did not keep it
    attempts: dict[Stage, int] = Field(default_factory=dict[Stage, int])
    plan_digest: Digest | None = None  # prepare has succeeded

    def next_attempt(self, stage: Stage) -> "State":
        return self.model_copy(update={"attempts": {**self.attempts, stage: self.attempts.get(stage, 0) + 1}})


def local_uid(path: Path, job: dict[str, Any]) -> str:
    """Same file, name and spec: the next call goes on with this job. A changed spec is a new one, as in a cluster."""
    spec = {name: value for name, value in job["spec"].items() if name not in MUTABLE_FIELDS}
    identity = json.dumps([str(path.resolve()), job["metadata"]["name"], spec], sort_keys=True)
    return str(uuid.uuid5(uuid.NAMESPACE_URL, identity))


def default_work_dir(path: Path, job: dict[str, Any]) -> Path:
    return path.resolve().parent / _PARENT_NAME / run_name(job["metadata"]["name"], local_uid(path, job))


def run_config(
    job: dict[str, Any],
    state: State,
    work_dir: Path,
    machine: Machine,
    env: Mapping[str, str],
    *,
    trains_here: bool = True,
) -> RunConfig:
    """The configuration for all stages. Pure.

    trains_here: no more is granted than this machine has; else what the job asks for, which is a cluster's to give.

    The endpoint in the file is written for pods, so AWS_ENDPOINT_URL_S3 and AWS_REGION win over it here, as they do
    for every other tool on this machine; credentials come from the usual AWS places, and the key of
    pseudonyms from the file that FINETUNE_PII_KEY_FILE names.
    """
    spec = FineTuneJobSpec.model_validate(job["spec"])
    asked, storage = spec.resources, spec.storage
    endpoint = _endpoint_of(env) or (storage and storage.endpoint) or None
    asked_region = defaults.given(storage.region if storage else None, defaults.REGION)
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or asked_region
    path_style = storage.path_style if storage and storage.path_style is not None else endpoint is not None
    return RunConfig(
        contract_version=CONTRACT_VERSION,
        job=JobRef(name=job["metadata"]["name"], namespace=NAMESPACE, uid=state.uid, created_at=state.created_at),
        spec=spec,
        starting_adapter=_starting_adapter(spec) if trains_here else None,
        run_uri=layout.join(spec.output.uri, run_name(job["metadata"]["name"], state.uid)),
        storage=StorageConfig(endpoint=endpoint, region=region, path_style=path_style),
        resources=_granted(machine, asked) if trains_here else RunResources(**asdict(machine)).with_asked(asked),
        prepare_resources=_granted(replace(machine, gpus=0), asked and asked.prepare),
        pii_key_path=env.get("FINETUNE_PII_KEY_FILE") or None,
        work_dir=str(work_dir),
        http_port=0,
        termination_log=str(work_dir / "termination-log"),
    )


def _starting_adapter(spec: FineTuneJobSpec) -> StartingAdapter | None:
    """Return the adapter that training goes on with. Raises CommandError for a job's: only a cluster knows it."""
    source = spec.model.adapter_from
    if source is None:
        return None
    if source.uri is None:
        text = f"model.adapterFrom.jobName: {source.job_name} is a job in a cluster, which is not asked here"
        raise CommandError(f"{text}; write model.adapterFrom.uri, the folder of its adapter", Exit.USAGE)
    return StartingAdapter(uri=source.uri)


def _endpoint_of(env: Mapping[str, str]) -> str | None:
    """Return the endpoint that the environment names. Raises CommandError where it holds a password."""
    name = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if env.get(name)), None)
    if name is None:
        return None
    if "@" in env[name]:
        words = f"{name} holds a user name or a password, which messages would show; write it without, and set"
        raise CommandError(f"{words} AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", Exit.USAGE)
    return env[name]


def _granted(machine: Machine, asked: ResourcesSpec | PrepareResourcesSpec | None) -> RunResources:
    """Return what the job asks for, but never more than there is: what is planned with must be real.

    Raises CommandError where it asks for a GPU and there is none."""
    whole = RunResources(**asdict(machine))
    wanted = whole.with_asked(asked)
    if wanted.gpus and not whole.gpus:
        raise CommandError("this machine has no GPU: write spec.resources.gpusPerNode: 0, or leave it out", Exit.USAGE)
    return wanted.model_copy(
        update={
            "cpu_count": min(wanted.cpu_count, whole.cpu_count),
            "memory_bytes": min(wanted.memory_bytes, whole.memory_bytes),
            "disk_bytes": min(wanted.disk_bytes, whole.disk_bytes),
        }
    )


def this_machine(work_dir: Path) -> Machine:
    """What can be used here and now."""
    return Machine(
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_bytes=shutil.disk_usage(work_dir).free,
        gpus=1 if Path("/dev/nvidia0").exists() else 0,
    )


@contextmanager
def locked(work_dir: Path) -> Generator[IO[str]]:
    """One run at a time in a work folder. The lock is handed to the stage, so that it holds as long as anything runs.

    Raises CommandError when another run is at work, or the folder cannot be made or trusted.
    """
    try:
        _make_private(work_dir)
        descriptor = os.open(work_dir / _LOCK_FILE, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CommandError(
            f"{work_dir} cannot be used: {error.strerror}; choose another --work-dir", Exit.USAGE
        ) from error
    with os.fdopen(descriptor, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(f"this job is running already in {work_dir}; wait until it ends", Exit.USAGE) from None
        yield handle


def _make_private(work_dir: Path) -> None:
    """Make the folder, or make sure that nobody else has put anything into it.

    It holds tokens of the data, and files in it are written without looking. Raises CommandError for a folder that is
    another user's or a link, or that has a link in it: whoever packed or shared it chooses what a link leads to.
    """
    above = [work_dir.parent] if work_dir.parent.name == _PARENT_NAME else []
    for folder in (*above, work_dir):
        if folder.is_symlink():
            raise _untrusted(folder, "is a link: remove it")
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = work_dir.lstat()
    if found.st_uid != os.geteuid():
        raise _untrusted(work_dir, "belongs to another user: remove it")
    if stat.S_IMODE(found.st_mode) & 0o077:
        work_dir.chmod(0o700)
    for entry in _entries(work_dir):
        if entry.is_symlink():
            raise _untrusted(Path(entry.path), "is a link, which no run makes: remove it")


def _untrusted(path: Path, problem: str) -> CommandError:
    return CommandError(f"{path} {problem}, or choose another --work-dir", Exit.USAGE)


def _entries(folder: Path) -> Generator[os.DirEntry[str]]:
    """Yield all that lies below a folder, without following links. Raises CommandError when it is very much."""
    folders, seen = [str(folder)], 0
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                seen += 1
                if seen > _MAX_ENTRIES:
                    raise _untrusted(folder, f"holds over {_MAX_ENTRIES:,} files: remove it")
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                yield entry


def load_state(work_dir: Path, uid: str, now: datetime) -> State:
    """What is known of the job; a new job begins now. Raises CommandError when the folder is another job's."""
    path = work_dir / _STATE_FILE
    if not path.exists():
        return State(uid=uid, created_at=now)
    try:
        state = State.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise CommandError(f"{path} is not readable; remove the folder or choose another --work-dir", 2) from error
    if state.uid != uid:
        raise CommandError(
            f"{work_dir} belongs to another job, or to this one before its spec changed; choose another --work-dir",
            Exit.USAGE,
        )
    return state if state.created_at is not None else state.model_copy(update={"created_at": now})


def save_state(work_dir: Path, state: State) -> None:
    """Whole or not at all."""
    staged = work_dir / f"{_STATE_FILE}.new"
    staged.write_text(state.model_dump_json())
    os.replace(staged, work_dir / _STATE_FILE)
