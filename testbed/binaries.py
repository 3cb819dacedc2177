"""Kubernetes, containerd, CoreDNS, versitygw and Helm, built from source once into the cache.

Only package registries are needed (the Go module proxy): there is no download of release binaries. Kubernetes' parts
and etcd are one program that acts by the name it is called with (`multibin/`), as linking them separately would cost 1
GB and minutes.

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
# Nothing for debuggers, which the linker would throw away: 15 % of the work of building containerd.
_FLAGS = ("-trimpath", "-gcflags=all=-dwarf=false")
_MULTIBIN_NAMES = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
]
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


@dataclass(frozen=True)
class Tool:
    name: str
    package: str
    """`module/path/cmd@version` for `go install`, or "" for our own module."""
    names: tuple[str, ...]
    node_only: bool = False

    def key(self) -> str:
        digest = hashlib.sha256(f"{self.package}\0{_VERSION_FLAGS}".encode())
        if not self.package:
            for file in ("go.mod", "go.sum", "main.go"):
                digest.update((_SOURCE / file).read_bytes())
        return digest.hexdigest()[:12]

    def directory(self) -> Path:
        return cache_dir() / "tools" / f"{self.name}-{self.key()}"


TOOLS = [
    Tool("kubernetes", "", tuple(_MULTIBIN_NAMES)),
    Tool("versitygw", "github.com/versity/versitygw/cmd/versitygw@v1.8.0", ("versitygw",)),
    Tool("containerd", "github.com/containerd/containerd/v2/cmd/containerd@v2.4.2", ("containerd",), node_only=True),
    Tool(
        "shim",
        "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@v2.4.2",
        ("containerd-shim-runc-v2",),
        True,
    ),
    Tool("ctr", "github.com/containerd/containerd/v2/cmd/ctr@v2.4.2", ("ctr",), node_only=True),
    Tool("coredns", "github.com/coredns/coredns@v1.15.0", ("coredns",), node_only=True),
    Tool("helm", "helm.sh/helm/v4/cmd/helm@v4.3.1", ("helm",), node_only=True),
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
    """Tools that are not built yet, in the order in which `build` makes them."""
    return [tool for tool in TOOLS if (node or not tool.node_only) and not tool.directory().is_dir()]


def build(*, node: bool = True, timeout_s: float = 3600) -> None:
    """Build what is missing, one tool at a time. Nothing to do takes milliseconds."""
    if not missing(node=node):
        return
    if shutil.which("go") is None:
        raise TestbedError("Go 1.26 or newer is needed to build the cluster's programs: https://go.dev/doc/install")
    tools = cache_dir() / "tools"
    with file_lock(tools / ".lock", timeout_s, f"another build is running (lock {tools / '.lock'})"):
        for leftover in tools.glob("*.partial"):
            shutil.rmtree(leftover)
        for tool in missing(node=node):
            _build_one(tool, timeout_s)
        # 9 GB of modules and objects that nothing reads again; a build that was killed goes on from them.
        shutil.rmtree(_go_caches(), ignore_errors=True)


def _go_caches() -> Path:
    return cache_dir() / "tools" / "go-caches"


def _build_one(tool: Tool, timeout_s: float) -> None:
    target = tool.directory()
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True)
    log_file = cache_dir() / "logs" / f"build-{tool.name}.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = ["go", "build", *_FLAGS, "-ldflags", f"-s -w {_VERSION_FLAGS}", "-o", str(partial / tool.names[0]), "."]
    if tool.package:
        command = ["go", "install", *_FLAGS, "-ldflags", "-s -w", tool.package]
    print(f"building {tool.name} (once; log {log_file})", flush=True)
    started = time.monotonic()
    env = os.environ | {
        "CGO_ENABLED": "0",
        "GOBIN": str(partial),
        "GOCACHE": str(_go_caches() / "objects"),
        "GOMODCACHE": str(_go_caches() / "modules"),
        # Collecting the compiler's garbage less often is a fifth less work; the limit holds for each of two compilers.
        "GOGC": "400",
        "GOMEMLIMIT": "2GiB",
        # -modcacherw: without it, modules are read-only and only root could remove them.
        "GOFLAGS": "-buildvcs=false -p=2 -modcacherw",
    }
    with log_file.open("w") as log:
        try:
            subprocess.run(command, cwd=_SOURCE, env=env, stdout=log, stderr=log, timeout=timeout_s, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            tail = last_lines(log_file.read_text(errors="replace"))
            raise TestbedError(f"building {tool.name} failed: {error}. Log: {log_file}\n{tail}") from error
    for name in tool.names[1:]:
        (partial / name).symlink_to(tool.names[0])
    os.replace(partial, target)
    print(f"built {tool.name} in {time.monotonic() - started:.0f} s", flush=True)
