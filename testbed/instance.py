"""Where a test cluster keeps its things, and who owns it.

Two kinds of directory, with different lives:

* the **cache** (`$FINETUNE_CACHE`, else `~/.cache/finetune-operator`): built binaries and containerd's content store.
  It is outside every checkout and survives `down`, so the second `up` takes seconds.
* an **instance** (`<cache>/testbed/<name>`): certificates, etcd data, S3 data, logs and pids of one run. `up` makes it
  anew.

A node (containerd, kubelet, bridge, nftables table) is a thing of the whole machine: there is at most one, and its
sockets and mounts live in `NODE_RUN`. Control-plane-only instances touch nothing but their own directory and loopback
ports, so any number of them may run side by side.
"""

import fcntl
import json
import os
import random
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
NODE_RUN = Path("/run/finetune-testbed")
MARK_ENV = "FINETUNE_TESTBED_STATE"
"""Set in the environment of every process we start (and inherited by shims), so that none can be lost."""


class TestbedError(Exception):
    """Something the person at the keyboard can act on; printed without a stack trace."""

    __test__ = False  # pytest: not a test class


def cache_dir() -> Path:
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune-operator").resolve()


def containerd_root() -> Path:
    """Images live here, in the cache, so that a 3 GB trainer image is imported once and not at each `up`."""
    return cache_dir() / "testbed-images"


@dataclass
class State:
    """What `up` decided; written before anything starts, so that the next run can clean after a killed one."""

    node: bool
    checkout: str
    ports: dict[str, int]
    host_ip: str
    ready: bool = False
    started_at: float = field(default_factory=time.time)
    commands: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """argv by component name, so that a test can start again what it killed."""


@dataclass(frozen=True)
class Instance:
    name: str

    @property
    def dir(self) -> Path:
        return cache_dir() / "testbed" / self.name

    @property
    def kubeconfig(self) -> Path:
        return self.dir / "admin.kubeconfig"

    def pid_file(self, component: str) -> Path:
        return self.dir / "pids" / component

    def log_file(self, component: str) -> Path:
        return self.dir / "logs" / f"{component}.log"

    def load(self) -> State | None:
        try:
            return State(**json.loads((self.dir / "state.json").read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError):
            # Written by another version of this tool: nothing to trust but the mark in its processes' environment.
            return State(node=True, checkout=str(CHECKOUT), ports={}, host_ip="127.0.0.1")

    def save(self, state: State) -> None:
        write_atomically(self.dir / "state.json", json.dumps(asdict(state), indent=1))

    @contextmanager
    def lock(self, timeout_s: float = 300) -> Generator[None]:
        """One `up` or `down` of this instance at a time. The kernel drops the lock when the tool is killed."""
        path = self.dir.with_suffix(".lock")
        with file_lock(path, timeout_s, f"another `up` or `down` of instance {self.name!r} is running (lock {path})"):
            yield


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(mode)
    os.replace(temporary, path)


@contextmanager
def file_lock(path: Path, timeout_s: float, busy: str) -> Generator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    # Python opens files close-on-exec, so no daemon that we start inherits the lock.
    with path.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TestbedError(f"{busy}; gave up after {timeout_s:.0f} s") from None
                time.sleep(0.2)
        yield


def free_ports(host: str, names: list[str]) -> dict[str, int]:
    """A free port for each name, below the ephemeral range so that no outgoing connection takes it before we bind."""
    chosen: dict[str, int] = {}
    for name in names:
        for candidate in random.sample(range(20_000, 30_000), 200):
            with socket.socket() as probe:
                try:
                    probe.bind((host, candidate))
                except OSError:
                    continue
            if candidate not in chosen.values():
                chosen[name] = candidate
                break
        else:
            raise TestbedError(f"no free port on {host} between 20000 and 30000 for {name}")
    return chosen
