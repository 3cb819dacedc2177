"""Debian packages that the node and the image build need.

As root with apt-get they are installed without asking (this is a tool for throw-away machines and CI); otherwise the
exact line to type is the error. No service that a package brings is ever started: Prometheus, for one, would take port
9090.
"""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from testbed.instance import TestbedError, cache_dir, file_lock
from testbed.processes import run

# Package → a file that proves it is there. Debian's crun 1.8 is too old for containerd 2; runc 1.1 works.
CONTROL_PLANE = {"openssl": "/usr/bin/openssl"}
NODE = {
    "runc": "/usr/sbin/runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iproute2": "/usr/bin/ip",
    "nftables": "/usr/sbin/nft",
    "mount": "/usr/bin/umount",
    "gcc": "/usr/bin/gcc",
    "libc6-dev": "/usr/include/stdlib.h",
    "buildah": "/usr/bin/buildah",
    "skopeo": "/usr/bin/skopeo",
    "mmdebstrap": "/usr/bin/mmdebstrap",
    "prometheus": "/usr/bin/promtool",
    "chromium": "/usr/bin/chromium",  # a test looks at report.html with it
}
_LOCK_TIMEOUT_S = 2400.0  # both installations and the refresh of the lists
_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = (
    "#!/bin/sh\n# Written by finetune-operator's testbed for the time of one installation; safe to delete.\nexit 101\n"
)


def missing(*, node: bool) -> list[str]:
    """Names of packages that are not installed yet."""
    wanted = CONTROL_PLANE | (NODE if node else {})
    return [package for package, proof in wanted.items() if not Path(proof).exists()]


def ensure_packages(*, node: bool) -> None:
    if not missing(node=node):
        return
    # One at a time: programs and images are made side by side, and both need packages.
    lock = cache_dir() / "packages.lock"
    with file_lock(lock, _LOCK_TIMEOUT_S, f"packages are being installed (lock {lock})"):
        if wanted := missing(node=node):
            _install(wanted)


def _install(wanted: list[str]) -> None:
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *wanted]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise TestbedError(f"packages are missing; as root on Debian 12 or newer: {' '.join(command)}")
    print(f"installing Debian packages: {' '.join(wanted)}", flush=True)
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with _no_service_starts("prometheus" in wanted):
        if run(command, timeout_s=900, env=env, check=False).returncode != 0:
            # Package lists that are absent or older than the mirror are the usual reason; one refresh, then it must
            # work.
            run(["apt-get", "update", "-q"], timeout_s=300, env=env)
            run(command, timeout_s=900, env=env)


@contextmanager
def _no_service_starts(prometheus: bool) -> Generator[None]:
    if _POLICY.exists() and _POLICY.read_text() == _POLICY_TEXT:
        _POLICY.unlink()  # left by a killed run
    ours = not _POLICY.exists()
    if ours:
        _POLICY.write_text(_POLICY_TEXT)
        _POLICY.chmod(0o755)
    if prometheus:
        # policy-rc.d holds only now; the mask also keeps it down after the next boot of a systemd machine.
        unit = Path("/etc/systemd/system/prometheus.service")
        if unit.parent.is_dir() and not unit.is_symlink() and not unit.exists():
            unit.symlink_to("/dev/null")
    try:
        yield
    finally:
        if ours:
            _POLICY.unlink(missing_ok=True)
