"""The chart in a real API server: every object is taken, and the operator may do what it must and nothing else."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import testbed
from built import require_program
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.control_plane

CHART = Path(__file__).resolve().parents[2] / "charts/finetune-operator"


def helm(cluster: testbed.Cluster, *arguments: str) -> str:
    done = subprocess.run(
        [require_program("helm"), *arguments],
        env=os.environ | {"KUBECONFIG": str(cluster.kubeconfig)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def may(cluster: testbed.Cluster, user: str, verb: str, resource: str, namespace: str, name: str = "") -> bool:
    kind, _, subresource = resource.partition("/")
    part = [f"--subresource={subresource}"] if subresource else []
    kind += f"/{name}" if name else ""
    answer = cluster.kubectl("auth", "can-i", verb, kind, *part, f"--as={user}", "-n", namespace, check=False)
    return answer.strip() == "yes"


@pytest.fixture
def release(control_plane: testbed.Cluster, namespace: str) -> Iterator[str]:
    """A release that watches `team` alone, in a namespace of its own."""
    control_plane.kubectl("create", "namespace", f"{namespace}-team")
    # The CRD is there already, made by another hand.
    values = ["--set", f"watchNamespaces={{{namespace}-team}}", "--set", "crds.enabled=false"]
    helm(control_plane, "install", namespace, str(CHART), "--namespace", namespace, *values)
    yield namespace
    helm(control_plane, "uninstall", namespace, "--namespace", namespace)


def test_the_api_server_takes_every_object_as_it_is(control_plane: testbed.Cluster, namespace: str):
    objects = helm(control_plane, "template", "x", str(CHART), "--namespace", namespace)
    control_plane.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=objects)


def test_the_pod_passes_the_restricted_standard(control_plane: testbed.Cluster, namespace: str):
    control_plane.kubectl("label", "ns", namespace, "pod-security.kubernetes.io/enforce=restricted")
    objects = helm(control_plane, "template", "x", str(CHART), "-n", namespace, "-s", "templates/deployment.yaml")
    # For a Deployment the standard only warns; kubectl turns that into an error.
    control_plane.kubectl("label", "ns", namespace, "pod-security.kubernetes.io/warn=restricted")
    control_plane.kubectl("apply", "--dry-run=server", "--warnings-as-errors", "-f", "-", stdin=objects)


def test_the_operator_may_do_what_it_must_and_only_where_it_watches(control_plane: testbed.Cluster, release: str):
    team, user = f"{release}-team", f"system:serviceaccount:{release}:{release}-finetune-operator"
    for verb, resource in (
        ("watch", "finetunejobs.finetune.dev"),
        ("patch", "finetunejobs.finetune.dev/status"),
        ("create", "jobs.batch"),
        ("delete", "jobs.batch"),
        ("create", "configmaps"),
        ("create", "events"),
    ):
        assert may(control_plane, user, verb, resource, team), f"{verb} {resource}"
        assert not may(control_plane, user, verb, resource, "default"), f"{verb} {resource} elsewhere"
    leases = "leases.coordination.k8s.io"
    assert may(control_plane, user, "create", leases, release)
    assert may(control_plane, user, "update", leases, release, f"{release}-finetune-operator")
    assert not may(control_plane, user, "update", leases, release, "of-another")
    for verb, resource in (
        ("get", "secrets"),
        ("patch", "finetunejobs.finetune.dev"),
        ("delete", "pods"),
        ("create", "pods/exec"),
        ("update", "configmaps"),
    ):
        assert not may(control_plane, user, verb, resource, team), f"{verb} {resource}"


def test_who_may_view_or_edit_a_namespace_may_do_so_with_its_jobs(control_plane: testbed.Cluster, release: str):
    team, jobs = f"{release}-team", "finetunejobs.finetune.dev"
    for role in ("view", "edit"):
        control_plane.kubectl("create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}er", "-n", team)
    # Roles are aggregated by a controller, one after another.
    for user, verb in (("viewer", "watch"), ("editer", "create"), ("editer", "patch")):
        until(lambda user=user, verb=verb: may(control_plane, user, verb, jobs, team), f"{user} may {verb} jobs")
    assert not may(control_plane, "viewer", "create", jobs, team)
    assert not may(control_plane, "editer", "patch", f"{jobs}/status", team)
