"""The host side of the node: bridge, mounts, cgroups, nftables, and taking every trace of them away again.

There is one way to stop a node, `sweep`: it works from what the kernel shows (mount table, cgroup tree, links) and not
from what we believe we did. So it is the same after an orderly `down`, after SIGKILL of any component, and of the tool
itself.
"""

import ipaddress
import os
import shutil
import time
from pathlib import Path

from testbed.instance import NODE_RUN, TestbedError
from testbed.processes import end, run, start_time

BRIDGE = "ftb0"
NETWORK = "finetune-testbed"
POD_NETWORK = ipaddress.ip_network("10.231.0.0/24")
SERVICE_NETWORK = ipaddress.ip_network("10.232.0.0/24")
NODE_IP = str(POD_NETWORK[1])
"""The bridge's own address: API server, cluster DNS and S3 listen here; pods and host reach them, others do not."""
CGROUP = "finetune-testbed"
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def cgroup_v1() -> bool:
    return not (_CGROUP_ROOT / "cgroup.controllers").exists()


def create_bridge() -> None:
    routes = run(["ip", "-4", "route", "show", "match", str(POD_NETWORK)], timeout_s=10).stdout
    if any(not line.startswith("default") for line in routes.splitlines()):
        raise TestbedError(f"this machine already routes {POD_NETWORK}, which the pods need:\n{routes}")
    run(["ip", "link", "add", BRIDGE, "type", "bridge"], timeout_s=10)
    run(["ip", "address", "add", f"{NODE_IP}/{POD_NETWORK.prefixlen}", "dev", BRIDGE], timeout_s=10)
    run(["ip", "link", "set", BRIDGE, "up"], timeout_s=10)
    # Service traffic is routed from the bridge back into it. Per interface, so it vanishes with the bridge.
    Path(f"/proc/sys/net/ipv4/conf/{BRIDGE}/forwarding").write_text("1")


def create_cgroup() -> None:
    """The kubelet's root group; it insists that it exists in every hierarchy."""
    for root in _hierarchies():
        (root / CGROUP).mkdir(exist_ok=True)
        # By default a group weighs as much as one process: beside a few busy ones the whole node would starve.
        for name, one_core in (("cpu.shares", 1024), ("cpu.weight", 100)):
            if (root / CGROUP / name).exists():
                (root / CGROUP / name).write_text(str(one_core * 2 * (os.cpu_count() or 1)))
        for name in ("cpuset.cpus", "cpuset.mems"):  # v1: empty sets refuse every process
            if (root / CGROUP / name).exists() and not (root / CGROUP / name).read_text().strip():
                (root / CGROUP / name).write_text((root / name).read_text())


def sweep(mount_roots: list[Path]) -> None:
    """Remove containers' processes, mounts, cgroups, the bridge, nftables tables and files of a stopped node."""
    end(_cgroup_pids(), grace_s=0)
    for root in [NODE_RUN, *mount_roots]:
        _unmount_below(root)
    _remove_cgroups()
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        for port in Path(
            f"/sys/class/net/{BRIDGE}/brif"
        ).iterdir():  # veths whose namespace is already gone go by themselves
            run(["ip", "link", "delete", port.name], timeout_s=10, check=False)
        run(["ip", "link", "delete", BRIDGE], timeout_s=10)
    if shutil.which("nft"):
        for family in ("ip", "ip6"):
            run(["nft", "delete", "table", family, "kube-proxy"], timeout_s=10, check=False)
    for result in Path("/var/lib/cni/results").glob(f"{NETWORK}-*"):
        result.unlink(missing_ok=True)
    for directory in ("/var/lib/cni/results", "/var/lib/cni"):
        _remove_empty(Path(directory))
    _remove_log_links(mount_roots)
    _remove_dead_sockets()
    shutil.rmtree(NODE_RUN, ignore_errors=True)


def leftovers(mount_roots: list[Path]) -> list[str]:
    """What a stopped node must not leave, in words; empty when the machine is clean."""
    found = [f"mount {point}" for root in [NODE_RUN, *mount_roots] for point in _mounts_below(root)]
    found += [f"cgroup {path}" for root in _hierarchies() for path in [root / CGROUP] if path.exists()]
    found += [f"process {pid} in a pod cgroup" for pid in _cgroup_pids()]
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        found.append(f"bridge {BRIDGE}")
    if shutil.which("nft") and "kube-proxy" in run(["nft", "list", "tables"], timeout_s=10, check=False).stdout:
        found.append("nftables table kube-proxy")
    if NODE_RUN.exists():
        found.append(f"directory {NODE_RUN}")
    return found


def _hierarchies() -> list[Path]:
    """Roots of the cgroup trees: one on v2, one for each controller on v1."""
    if not cgroup_v1():
        return [_CGROUP_ROOT]
    return sorted({path.resolve() for path in _CGROUP_ROOT.iterdir() if (path / "cgroup.procs").exists()})


def _cgroup_pids() -> set[int]:
    groups = [
        group for root in _hierarchies() if (root / CGROUP).exists() for group in (root / CGROUP).rglob("cgroup.procs")
    ]
    pids: set[int] = set()
    for group in groups:
        try:
            pids |= {int(line) for line in group.read_text().split()}
        except OSError:  # a threaded group, or one removed meanwhile
            continue
    return {pid for pid in pids if pid > 1 and pid != os.getpid() and start_time(pid) is not None}


def _remove_cgroups() -> None:
    for root in _hierarchies():
        top = root / CGROUP
        if not top.exists():
            continue
        deadline = time.monotonic() + 10
        for group in [*sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True), top]:
            while group.exists():
                try:
                    group.rmdir()
                except OSError as error:  # the last process is still on its way out
                    if time.monotonic() > deadline:
                        raise TestbedError(f"cannot remove cgroup {group}: {error}") from error
                    time.sleep(0.05)


def _mounts_below(root: Path) -> list[str]:
    points = [
        line.split()[4].encode().decode("unicode_escape")
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
    ]
    return [point for point in points if point == str(root) or point.startswith(f"{root}/")]


def _unmount_below(root: Path) -> None:
    # Newest first: a mount on top of another hides it.
    for point in reversed(_mounts_below(root)):
        if run(["umount", point], timeout_s=20, check=False).returncode != 0:
            run(["umount", "--lazy", point], timeout_s=20)


def _remove_log_links(mount_roots: list[Path]) -> None:
    """The kubelet links each container's log into /var/log/containers, whatever its own log directory is."""
    directory = Path("/var/log/containers")
    for link in directory.glob("*.log"):
        target = Path(os.readlink(link)) if link.is_symlink() else link
        if any(target.is_relative_to(root) for root in mount_roots):
            link.unlink()
    _remove_empty(directory)


def _remove_dead_sockets() -> None:
    """Two places that no option moves: shims listen in /run/containerd/s, and the kubelet for device plugins."""
    bound = Path("/proc/net/unix").read_text()
    for directory in (Path("/run/containerd/s"), Path("/var/lib/kubelet/device-plugins")):
        for path in directory.glob("*"):
            if path.is_socket() and str(path) not in bound:
                path.unlink(missing_ok=True)
        _remove_empty(directory)
        _remove_empty(directory.parent)


def _remove_empty(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
