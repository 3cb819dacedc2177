"""Kubernetes, containerd, CoreDNS, versitygw and Helm, built from source once into the cache.

Only package registries are needed (the Go module proxy): there is no download of release binaries. All are built from
one Go module (`multibin/go.mod`), so that what several need is downloaded and compiled once, in one version: the
versions of containerd, CoreDNS and Helm are the newest that ask for no newer client of Kubernetes than ours. etcd, the
parts of Kubernetes, CoreDNS and Helm are even one program that acts by the name it is called with (`multibin/main.go`),
as linking them separately would cost 1 GB and minutes.

Each tool lies in `<cache>/tools/<tool>-<key>/`; the key covers everything that decides its content, and the directory
is renamed into place when complete. So a build killed at any moment leaves only a temporary directory, removed by the
next one.
"""

import hashlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from testbed.instance import TestbedError, cache_dir, file_lock
from testbed.processes import last_lines

KUBERNETES_VERSION = "v1.36.3"
_SOURCE = Path(__file__).parent / "multibin"
_MULTIBIN_NAMES = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
    "coredns",
    "helm",
)
# Without these the servers call themselves v0.0.0-master, and clients' version checks fail.
_VERSION_FLAGS = " ".join(
    f"-X k8s.io/component-base/version.{name}={value}"
    for name, value in {
        "gitVersion": KUBERNETES_VERSION,
        "gitMajor": "1",
        "gitMinor": "36",
        "gitTreeState": "clean",
        "gitCommit": "0" * 40,
    }.items()
)
# Nothing for debuggers, which the linker would throw away: 15 % of the work of building containerd.
_FLAGS = ("-trimpath", "-gcflags=all=-dwarf=false", "-ldflags", f"-s -w {_VERSION_FLAGS}")


@dataclass(frozen=True)
class Tool:
    name: str
    package: str
    """Import path of the program, which `multibin/go.mod` names."""
    names: tuple[str, ...]
    """The program, and the links to it."""
    node_only: bool = False

    def key(self) -> str:
        digest = hashlib.sha256("\0".join([self.package, *self.names, *_FLAGS]).encode())
        for file in ("go.mod", "go.sum", "main.go"):
            digest.update((_SOURCE / file).read_bytes())
        return digest.hexdigest()[:12]

    def directory(self) -> Path:
        return cache_dir() / "tools" / f"{self.name}-{self.key()}"


_CONTAINERD = "github.com/containerd/containerd/v2/cmd"
TOOLS = [
    Tool("kubernetes", "finetune.dev/kubernetes", _MULTIBIN_NAMES),
    Tool("versitygw", "github.com/versity/versitygw/cmd/versitygw", ("versitygw",)),
    Tool("containerd", f"{_CONTAINERD}/containerd", ("containerd",), node_only=True),
    Tool("shim", f"{_CONTAINERD}/containerd-shim-runc-v2", ("containerd-shim-runc-v2",), node_only=True),
    Tool("ctr", f"{_CONTAINERD}/ctr", ("ctr",), node_only=True),
]


def binary(name: str) -> str:
    """Path of a built program."""
    tool = next(tool for tool in TOOLS if name in tool.names)
    return str(tool.directory() / name)


def search_path() -> str:
    """PATH for our daemons: containerd finds its shim and runc through it."""
    ours = ":".join(str(tool.directory()) for tool in TOOLS)
    return f"{ours}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing(*, node: bool = True) -> list[Tool]:
    """Tools that are not built yet."""
    return [tool for tool in TOOLS if (node or not tool.node_only) and not tool.directory().is_dir()]


def build(*, node: bool = True, timeout_s: float = 3600) -> None:
    """Build what is missing. Nothing to do takes milliseconds."""
    if not missing(node=node):
        return
    if shutil.which("go") is None:
        raise TestbedError("Go 1.26 or newer is needed to build the cluster's programs: https://go.dev/doc/install")
    tools = cache_dir() / "tools"
    with file_lock(tools / ".lock", timeout_s, f"another build is running (lock {tools / '.lock'})"):
        for leftover in tools.glob("*.partial"):
            shutil.rmtree(leftover)
        _build(missing(node=node), timeout_s)
        # 9 GB of modules and objects that nothing reads again; a build that was killed goes on from them.
        shutil.rmtree(_go_caches(), ignore_errors=True)


def _go_caches() -> Path:
    return cache_dir() / "tools" / "go-caches"


def _build(tools: list[Tool], timeout_s: float) -> None:
    """Build in one go, which links one program on a core while others still compile."""
    if not tools:
        return
    built = cache_dir() / "tools" / "built.partial"
    built.mkdir(parents=True)
    log_file = cache_dir() / "logs" / "build.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    names = ", ".join(tool.name for tool in tools)
    print(f"building {names} (once; log {log_file})", flush=True)
    started = time.monotonic()
    command = ["go", "build", *_FLAGS, "-o", f"{built}/", *(tool.package for tool in tools)]
    with log_file.open("w") as log:
        try:
            subprocess.run(
                command, cwd=_SOURCE, env=_environment(), stdout=log, stderr=log, timeout=timeout_s, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            tail = last_lines(log_file.read_text(errors="replace"))
            raise TestbedError(f"building {names} failed: {error}. Log: {log_file}\n{tail}") from error
    for tool in tools:
        _put_in_place(tool, built)
    built.rmdir()
    print(f"built {names} in {time.monotonic() - started:.0f} s", flush=True)


def _environment() -> dict[str, str]:
    return os.environ | {
        "CGO_ENABLED": "0",
        "GOCACHE": str(_go_caches() / "objects"),
        "GOMODCACHE": str(_go_caches() / "modules"),
        # Collecting the compiler's garbage less often is a fifth less work; the limit holds for each of two compilers.
        "GOGC": "400",
        "GOMEMLIMIT": "2GiB",
        # -modcacherw: without it, modules are read-only and only root could remove them.
        "GOFLAGS": "-buildvcs=false -p=2 -modcacherw",
    }


def _put_in_place(tool: Tool, built: Path) -> None:
    target = tool.directory()
    partial = target.with_name(target.name + ".partial")
    partial.mkdir()
    os.replace(built / tool.package.rpartition("/")[2], partial / tool.names[0])
    for name in tool.names[1:]:
        (partial / name).symlink_to(tool.names[0])
    os.replace(partial, target)
