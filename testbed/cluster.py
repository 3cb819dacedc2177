"""`up`, `down` and what a test holds in its hand: `Cluster`.

`up` never repairs: it returns a cluster that is already healthy, or clears what a dead run left and starts from
nothing. `down` is that same clearing. So there is one path to test, and a kill at any moment leaves nothing that the
next command cannot end.
"""

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from testbed import binaries, components, debian, health, host, images, manifests, pki
from testbed.instance import CHECKOUT, NODE_RUN, Instance, State, TestbedError, containerd_root, file_lock, free_ports
from testbed.processes import end, marked_pids, recorded_pid, run, spawn, wait_until

# The API server first: once etcd is gone it hangs on shutdown. containerd last, so that the kubelet cannot start pods
# meanwhile.
STOP_ORDER = [
    "kubelet",
    "kube-proxy",
    "coredns",
    "kube-apiserver",
    "kube-scheduler",
    "kube-controller-manager",
    "s3",
    "etcd",
]


@dataclass(frozen=True)
class Cluster:
    """A running test cluster."""

    instance: Instance
    kubeconfig: Path
    api_server: str
    node_name: str | None
    s3_endpoint_host: str
    s3_endpoint_pod: str | None
    s3_access_key: str = components.S3_ACCESS_KEY
    s3_secret_key: str = components.S3_SECRET_KEY
    s3_region: str = components.S3_REGION

    def kubectl(self, *arguments: str, timeout_s: float = 60, stdin: str | None = None, check: bool = True) -> str:
        """stdout of kubectl as cluster admin. Raises TestbedError with stderr on failure, unless `check` is off."""
        command = [binaries.binary("kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        return run(command, timeout_s=timeout_s, stdin=stdin, check=check).stdout

    def apply(self, *objects: Mapping[str, object]) -> None:
        self.kubectl("apply", "--server-side", "-f", "-", stdin="\n---\n".join(json.dumps(item) for item in objects))

    def pid(self, component: str) -> int | None:
        """Pid of a living component, for tests that kill or stop it."""
        return recorded_pid(self.instance.pid_file(component))

    def stop_component(self, component: str, grace_s: float = 0) -> None:
        """End one component, by SIGKILL unless it gets a grace: the fault that a test injects."""
        pid = self.pid(component)
        end([pid] if pid else [], grace_s=grace_s)

    def start_component(self, component: str) -> None:
        """Start again what `stop_component` ended, with the same ports and data. Returns when it serves."""
        state = self._state()
        if component not in state.commands:
            raise TestbedError(f"instance {self.instance.name!r} has no component {component!r}")
        if self.pid(component) is None:
            self.instance.pid_file(component).unlink(missing_ok=True)
            spawn(self.instance, component, state.commands[component], binaries.search_path())
        health.wait_for(self.instance, state, component)

    def _state(self) -> State:
        state = self.instance.load()
        if state is None:
            raise TestbedError(f"instance {self.instance.name!r} is down")
        return state

    def add_s3_account(self, access_key: str, secret_key: str) -> None:
        """An account, made anew, that may do nothing until a bucket's policy allows it something."""
        admin = [binaries.binary("versitygw"), "admin", "--access", self.s3_access_key, "--secret", self.s3_secret_key]
        admin += ["--endpoint-url", self.s3_endpoint_host]
        run([*admin, "delete-user", "--access", access_key], timeout_s=30, check=False)
        run([*admin, "create-user", "--role", "user", "--access", access_key, "--secret", secret_key], timeout_s=30)

    def advertise_gpus(self, count: int) -> None:
        """Let the node offer `nvidia.com/gpu`: devices that count in scheduling and quota and do nothing else."""
        patch = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(count)}]
        state, node = self._state(), str(self.node_name)
        self.kubectl("patch", "node", node, "--subresource=status", "--type=json", "-p", json.dumps(patch))

        def allocatable() -> bool:
            status = (health.get(self.instance, state, f"/api/v1/nodes/{node}") or {}).get("status", {})
            return status.get("allocatable", {}).get("nvidia.com/gpu") == str(count)

        wait_until(
            self.instance, "kubelet", allocatable, timeout_s=30, what=f"{count} nvidia.com/gpu allocatable on the node"
        )


def missing(*, node: bool = True) -> list[str]:
    """What `up` would have to install and build first, which takes many minutes."""
    return [*debian.missing(node=node), *(tool.name for tool in binaries.missing(node=node))]


def up(name: str = "default", *, node: bool = True) -> Cluster:
    """Start a cluster, or return the healthy one that runs. Raises TestbedError when it belongs to another checkout."""
    if node and os.geteuid() != 0:
        raise TestbedError("a node (containerd, kubelet) needs root; `--control-plane-only` does not")
    instance = Instance(name)
    with instance.lock():
        running = instance.load()
        if running is not None:
            _refuse_foreign(instance, running)
            if _healthy(instance, running):
                if running.node != node:
                    kind = "with" if running.node else "without"
                    raise TestbedError(
                        f"instance {name!r} is up {kind} a node: `down` first, or use another --instance"
                    )
                return _cluster(instance, running)
        debian.ensure_packages(node=node)
        binaries.build(node=node)
        with _node_lock(node or (running is not None and running.node)):
            if node:
                _refuse_second_node(instance)
            _clear(instance, node=node or (running is not None and running.node))
            return _start(instance, node=node)


def down(name: str = "default", *, force: bool = False) -> None:
    """End everything that the instance runs and remove its directory; images and binaries stay in the cache."""
    instance = Instance(name)
    with instance.lock():
        state = instance.load()
        if state is not None and not force:
            _refuse_foreign(instance, state)
        node = state is not None and state.node
        with _node_lock(node):
            _clear(instance, node=node)


def find(name: str = "default") -> Cluster | None:
    """The running cluster, if it is complete and alive."""
    instance = Instance(name)
    state = instance.load()
    return _cluster(instance, state) if state is not None and _healthy(instance, state) else None


def left_over(instance: Instance) -> list[str]:
    """Traces of a dead node, in words; nothing while a living one (of another instance) accounts for them."""
    owner = _node_owner()
    if owner is not None and marked_pids(owner):
        return []
    return host.leftovers([instance.dir, containerd_root()])


def _start(instance: Instance, *, node: bool) -> Cluster:
    instance.dir.mkdir(parents=True, mode=0o700)
    host_ip = host.NODE_IP if node else "127.0.0.1"
    state = State(node=node, checkout=str(CHECKOUT), ports=free_ports("127.0.0.1", components.PORTS), host_ip=host_ip)
    instance.save(state)
    if node:
        NODE_RUN.mkdir(mode=0o711)
        (NODE_RUN / "owner").write_text(str(instance.dir))
        host.create_bridge()
        host.create_cgroup()
        state.commands |= components.node(instance, state)
    pki.make(
        instance.dir, sorted({host_ip, "127.0.0.1", str(host.SERVICE_NETWORK[1])}), components.api_server_url(state)
    )
    for name in ("s3", "s3-accounts"):
        (instance.dir / name).mkdir()
    state.commands |= components.control_plane(instance, state)
    instance.save(state)
    path = binaries.search_path()

    def start(*names: str) -> None:
        for component in names:
            spawn(instance, component, state.commands[component], path)

    start("etcd", "s3", *(["containerd"] if node else []))
    health.wait_for(instance, state, "etcd")
    start("kube-apiserver")
    cluster = _cluster(instance, state)
    if node:
        health.wait_for(instance, state, "containerd")
        images.remove_stale_containers()
        images.ensure_pause()
    health.wait_for(instance, state, "kube-apiserver")
    start("kube-controller-manager", "kube-scheduler")
    if node:
        cluster.apply(*manifests.dns_role(), *manifests.s3_service(state))
        start("kubelet", "kube-proxy", "coredns")
    for component in ("s3", "kube-controller-manager", *(("kubelet", "kube-proxy", "coredns") if node else ())):
        health.wait_for(instance, state, component)
    state.ready = True
    instance.save(state)
    return cluster


def _clear(instance: Instance, *, node: bool) -> None:
    for component in STOP_ORDER:
        pid = recorded_pid(instance.pid_file(component))
        end([pid] if pid else [], grace_s=0 if component in ("kube-apiserver", "etcd") else 5)
    if node and shutil.which("ip"):
        pid = recorded_pid(instance.pid_file("containerd"))
        if pid:
            images.remove_stale_containers(check=False)
            end([pid], grace_s=10)
    # Shims, and whatever a killed `up` started without us knowing.
    end(marked_pids(instance.dir), grace_s=0)
    if node and _node_owner() in (instance.dir, None):
        host.sweep([instance.dir, containerd_root()])
    if instance.dir.exists():
        shutil.rmtree(instance.dir)


def _refuse_foreign(instance: Instance, state: State) -> None:
    if state.checkout != str(CHECKOUT) and marked_pids(instance.dir):
        raise TestbedError(
            f"instance {instance.name!r} is in use by the checkout {state.checkout}. Use --instance NAME for another "
            f"one (with --control-plane-only if that one has a node), or end it with `down --force`"
        )


def _refuse_second_node(instance: Instance) -> None:
    """There is one bridge, one nftables table and one image store: two nodes would break each other in silence."""
    owner = _node_owner()
    if owner is None or owner == instance.dir:
        return
    if marked_pids(owner):
        raise TestbedError(f"this machine's node belongs to {owner}: end it there, or use --control-plane-only here")
    host.sweep([owner, containerd_root()])


def _node_owner() -> Path | None:
    try:
        return Path((NODE_RUN / "owner").read_text())
    except FileNotFoundError:
        return None


@contextmanager
def _node_lock(needed: bool) -> Generator[None]:
    if not needed:
        yield
        return
    with file_lock(NODE_RUN.with_suffix(".lock"), 300, "another `up` or `down` of this machine's node is running"):
        yield


def _healthy(instance: Instance, state: State) -> bool:
    alive = all(recorded_pid(instance.pid_file(component)) for component in state.commands)
    return state.ready and alive and health.serves_api(instance, state)


def _cluster(instance: Instance, state: State) -> Cluster:
    return Cluster(
        instance=instance,
        kubeconfig=instance.kubeconfig,
        api_server=components.api_server_url(state),
        node_name=pki.NODE_NAME if state.node else None,
        s3_endpoint_host=f"http://127.0.0.1:{state.ports['s3']}",
        s3_endpoint_pod=manifests.S3_POD_ENDPOINT if state.node else None,
    )
