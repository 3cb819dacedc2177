"""The testbed keeps its word: a node that runs pods, a `down` that leaves nothing, and an `up` that survives SIGKILL.

The node is a thing of the whole machine: while another instance has it (yours, say), these tests fail and leave it
alone. `down` it first.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import testbed
from built import require_testbed
from testbed import host, images
from testbed.instance import Instance, containerd_root
from testbed.processes import marked_pids, run
from waiting import PATIENCE_S

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
INSTANCE = Instance("selftest")
NAMESPACE = {
    "apiVersion": "v1",
    "kind": "Namespace",
    "metadata": {"name": "probe", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
}
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@pytest.fixture(scope="module", autouse=True)
def _clean_machine() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    if os.geteuid() != 0:
        pytest.skip("a node needs root")
    require_testbed(node=True)
    testbed.down(INSTANCE.name)
    yield
    testbed.down(INSTANCE.name)


@pytest.fixture
def cluster() -> testbed.Cluster:
    running = testbed.up(INSTANCE.name)
    testbed.ensure_base_image()
    testbed.load_image("localhost/finetune-base:bookworm")
    return running


def pod_spec(program: str, *, memory: str = "128Mi", gpus: int = 0) -> dict[str, object]:
    limits = {"memory": memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    container = {
        "name": "main",
        "image": "localhost/finetune-base:bookworm",
        "imagePullPolicy": "Never",
        "command": ["python3", "-c", program],
        "securityContext": RESTRICTED,
        "resources": {"limits": limits},
    }
    return {"restartPolicy": "Never", "containers": [container]}


def run_pod(cluster: testbed.Cluster, name: str, spec: Mapping[str, object]) -> tuple[dict[str, object], str]:
    """Run to the end; returns the container's terminated state and its log."""
    cluster.apply(NAMESPACE)
    # The ServiceAccount of a new namespace comes a moment later, and a pod is refused until then.
    account = ["-n", "probe", "get", "serviceaccount", "default"]
    until(
        lambda: cluster.kubectl(*account, check=False) != "",
        timeout_s=PATIENCE_S,
        what="the namespace's ServiceAccount",
    )
    cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "probe"}, "spec": spec})

    def terminated() -> dict[str, object] | None:
        status = json.loads(cluster.kubectl("-n", "probe", "get", "pod", name, "-o", "json"))["status"]
        return status.get("containerStatuses", [{}])[0].get("state", {}).get("terminated")

    until(lambda: terminated() is not None, timeout_s=PATIENCE_S, what=f"pod {name} ends")
    return terminated() or {}, cluster.kubectl("-n", "probe", "logs", name)


def until(check: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)


def assert_nothing_is_left() -> None:
    assert marked_pids(INSTANCE.dir) == []
    assert host.leftovers([INSTANCE.dir, containerd_root()]) == []
    assert not INSTANCE.dir.exists()
    for path in ("/run/containerd", "/var/log/containers", "/var/lib/kubelet"):
        assert not Path(path).exists(), f"{path} was left behind"


def test_a_pod_reaches_the_api_server_and_s3_by_name_and_down_leaves_nothing(cluster: testbed.Cluster):
    program = f"""
import ssl, urllib.request, urllib.error
account = "/var/run/secrets/kubernetes.io/serviceaccount/"
context = ssl.create_default_context(cafile=account + "ca.crt")
headers = {{"Authorization": "Bearer " + open(account + "token").read()}}
request = urllib.request.Request("https://kubernetes.default.svc/version", headers=headers)
print("api", urllib.request.urlopen(request, context=context, timeout=100).status)
try:
    urllib.request.urlopen("{cluster.s3_endpoint_pod}/", timeout=100)
except urllib.error.HTTPError as error:
    print("s3", error.code)
open("/dev/termination-log", "w").write("done")
"""
    ended, log = run_pod(cluster, "names", pod_spec(program))
    assert (ended["exitCode"], ended["message"]) == (0, "done"), log
    assert log == "api 200\ns3 403\n"

    # The same server on the host's loopback; 403: it asks for a signature.
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(cluster.s3_endpoint_host, timeout=PATIENCE_S)

    testbed.down(INSTANCE.name)
    assert_nothing_is_left()


def test_two_pods_of_an_indexed_job_find_each_other_and_exit_code_11_ends_the_job(cluster: testbed.Cluster):
    program = """
import os, socket, sys, time
index = int(os.environ["JOB_COMPLETION_INDEX"])
server = socket.create_server(("", 29500))
deadline = time.monotonic() + 200
while True:
    try:
        socket.create_connection((f"ring-{1 - index}.ring", 29500), timeout=20)
        break
    except OSError:
        assert time.monotonic() < deadline, "the other pod was not found"
        time.sleep(0.1)
server.settimeout(200)
server.accept()  # the other one has found this pod, too
sys.exit(11 * index)
"""
    selector = {"job-name": "ring"}
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector, "ports": [{"port": 29500}]}
    job = {
        "completions": 2,
        "parallelism": 2,
        "completionMode": "Indexed",
        "backoffLimit": 5,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [11]}}]},
        "template": {"spec": pod_spec(program) | {"subdomain": "ring"}},
    }
    metadata = {"name": "ring", "namespace": "probe"}
    cluster.apply(
        NAMESPACE,
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job},
    )
    cluster.kubectl("-n", "probe", "wait", "--for=condition=Failed", "job/ring", "--timeout=240s", timeout_s=300)
    message = cluster.kubectl("-n", "probe", "get", "job", "ring", "-o", "jsonpath={.status.conditions[*].message}")
    assert "exit code 11 matching FailJob rule" in message


def test_memory_over_the_limit_is_an_oom_kill_that_the_container_itself_can_count(cluster: testbed.Cluster):
    ended, _ = run_pod(cluster, "hungry", pod_spec("b = bytearray(400 << 20)", memory="64Mi"))
    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)

    program = """
import os, subprocess, sys
child = subprocess.run([sys.executable, "-c", "b = bytearray(400 << 20)"])
v1, v2 = "/sys/fs/cgroup/memory/memory.oom_control", "/sys/fs/cgroup/memory.events"
counters = dict(line.split() for line in open(v1 if os.path.exists(v1) else v2))
print(child.returncode, counters["oom_kill"])
"""
    _, log = run_pod(cluster, "parent", pod_spec(program, memory="64Mi"))
    assert log == "-9 1\n"


def test_a_pod_that_asks_for_advertised_gpus_runs(cluster: testbed.Cluster):
    cluster.advertise_gpus(2)
    ended, log = run_pod(cluster, "gpu", pod_spec("print('scheduled')", gpus=2))
    assert (ended["exitCode"], log) == (0, "scheduled\n")


def test_a_privileged_pod_is_refused_in_a_restricted_namespace(cluster: testbed.Cluster):
    cluster.apply(NAMESPACE)
    spec = pod_spec("") | {"hostPID": True}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bad", "namespace": "probe"}, "spec": spec}
    with pytest.raises(testbed.TestbedError, match="violates PodSecurity"):
        cluster.apply(pod)


def test_an_api_server_that_a_test_killed_comes_back_with_its_objects(cluster: testbed.Cluster):
    cluster.kubectl("create", "namespace", "survivor")
    cluster.stop_component("kube-apiserver")
    assert cluster.kubectl("get", "namespaces", check=False, timeout_s=60) == ""
    cluster.start_component("kube-apiserver")
    assert "survivor" in cluster.kubectl("get", "namespaces", "-o", "name")


@pytest.mark.parametrize("component", ["kube-apiserver", "containerd"])
def test_up_renews_a_cluster_of_which_a_component_was_killed(cluster: testbed.Cluster, component: str):
    sleeper = pod_spec("import time; time.sleep(600)")
    cluster.apply(NAMESPACE)
    cluster.apply(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "left", "namespace": "probe"}, "spec": sleeper}
    )
    cluster.kubectl("-n", "probe", "wait", "--for=condition=Ready", "pod/left", "--timeout=240s", timeout_s=300)
    cluster.stop_component(component)

    renewed = testbed.up(INSTANCE.name)

    assert renewed.pid(component) is not None
    assert "probe" not in renewed.kubectl("get", "namespaces", "-o", "name")
    ended, _ = run_pod(renewed, "after", pod_spec("print('ok')"))
    assert ended["exitCode"] == 0


@pytest.mark.parametrize("moment", ["state.json", "pids/etcd", "pids/kube-apiserver", "pids/kubelet"])
def test_down_and_up_work_after_the_tool_was_killed_in_mid_start(moment: str):
    testbed.down(INSTANCE.name)
    tool = subprocess.Popen(
        [sys.executable, "-m", "testbed", "--instance", INSTANCE.name, "up"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    until((INSTANCE.dir / moment).exists, timeout_s=PATIENCE_S, what=moment)
    assert tool.poll() is None
    tool.send_signal(signal.SIGKILL)
    tool.wait(timeout=PATIENCE_S)

    testbed.down(INSTANCE.name)

    assert_nothing_is_left()
    assert testbed.up(INSTANCE.name).kubectl("get", "nodes", "-o", "name") == "node/testbed-node\n"


def test_an_instance_of_another_checkout_is_not_touched(monkeypatch: pytest.MonkeyPatch):
    mine = testbed.up("mine", node=False)
    try:
        monkeypatch.setattr("testbed.cluster.CHECKOUT", Path("/elsewhere"))
        with pytest.raises(testbed.TestbedError, match="in use by the checkout"):
            testbed.up("mine", node=False)
        with pytest.raises(testbed.TestbedError, match="in use by the checkout"):
            testbed.down("mine")
        assert mine.pid("kube-apiserver") is not None
    finally:
        testbed.down("mine", force=True)


def test_a_second_node_is_refused_while_the_first_one_runs(cluster: testbed.Cluster):
    with pytest.raises(testbed.TestbedError, match="this machine's node belongs to"):
        testbed.up("second")
    testbed.down("second")
    assert cluster.kubectl("get", "nodes", "-o", "name") == "node/testbed-node\n"


def test_an_image_that_the_disk_cannot_hold_is_refused_with_the_sizes_and_loads_once_there_is_room(
    cluster: testbed.Cluster, monkeypatch: pytest.MonkeyPatch
):
    name = "localhost/finetune-base:bookworm"
    container = run(["buildah", "from", name], timeout_s=PATIENCE_S).stdout.strip()
    try:
        run(
            [
                "buildah",
                "run",
                "--isolation",
                "chroot",
                container,
                "dd",
                "if=/dev/urandom",
                "of=/new",
                "bs=1M",
                "count=20",
            ],
            timeout_s=60,
        )
        run(["buildah", "commit", "--quiet", container, "localhost/larger:1"], timeout_s=300)
        monkeypatch.setattr(images, "_free_bytes", lambda: images.DISK_RESERVE_BYTES)
        with pytest.raises(testbed.TestbedError, match=r"localhost/larger:1 brings 0.0 GB of layers.* GB are free"):
            testbed.load_image("localhost/larger:1")
        monkeypatch.undo()
        assert testbed.load_image("localhost/larger:1")
    finally:
        run(["buildah", "rm", container], timeout_s=60, check=False)
        run(["buildah", "rmi", "localhost/larger:1"], timeout_s=60, check=False)


def test_a_second_control_plane_runs_beside_the_node(cluster: testbed.Cluster):
    other = testbed.up("beside", node=False)
    try:
        assert other.api_server != cluster.api_server
        assert other.kubectl("get", "nodes", "-o", "name") == ""
        assert cluster.kubectl("get", "nodes", "-o", "name") == "node/testbed-node\n"
    finally:
        testbed.down("beside")
    assert marked_pids(Instance("beside").dir) == []
