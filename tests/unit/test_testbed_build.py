"""The test cluster's programs are built at once from one Go module. A script plays Go, as building takes minutes."""

import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed import binaries, components, debian
from testbed.instance import TestbedError
from waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
MULTIBIN = ROOT / "testbed/multibin"
BUILDS = """#!/bin/sh
echo "$@" >> "$FINETUNE_CACHE/asked"
for word; do
  case "$word" in
    */built.partial/) folder=$word ;;
    */cmd/* | finetune.dev/*) echo program > "$folder${word##*/}" ;;
  esac
done
"""
FAILS = """#!/bin/sh
echo "main.go:7: undefined: nothing" >&2
exit 1
"""


@pytest.fixture
def play_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let `go` be this script, and the cache be empty."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def play(script: str) -> None:
        go = tmp_path / "bin/go"
        go.write_text(script)
        go.chmod(0o755)

    return play


def asked(cache: Path) -> list[str]:
    return (cache / "asked").read_text().splitlines()


def test_one_call_builds_all_programs_so_that_what_they_share_is_compiled_once(
    play_go: Callable[[str], None], tmp_path: Path
) -> None:
    play_go(BUILDS)

    binaries.build()
    binaries.build()

    assert len(asked(tmp_path)) == 1
    assert binaries.missing() == []
    for tool in binaries.TOOLS:
        for name in tool.names:
            assert Path(binaries.binary(name)).read_text() == "program\n"


def test_a_control_plane_alone_needs_no_program_of_a_node(play_go: Callable[[str], None], tmp_path: Path) -> None:
    play_go(BUILDS)

    binaries.build(node=False)

    assert "containerd" not in asked(tmp_path)[0]
    assert {tool.name for tool in binaries.missing()} == {"containerd", "shim", "ctr"}


def test_a_build_that_fails_shows_the_end_of_its_log_and_can_be_done_again(play_go: Callable[[str], None]) -> None:
    play_go(FAILS)
    with pytest.raises(TestbedError, match="undefined: nothing"):
        binaries.build()
    assert binaries.missing() == binaries.TOOLS

    play_go(BUILDS)
    binaries.build()

    assert binaries.missing() == []


def test_a_change_of_the_module_is_built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in ("go.mod", "go.sum", "main.go"):
        (tmp_path / file).write_bytes((MULTIBIN / file).read_bytes())
    before = [tool.key() for tool in binaries.TOOLS]
    monkeypatch.setattr(binaries, "_SOURCE", tmp_path)
    assert [tool.key() for tool in binaries.TOOLS] == before

    (tmp_path / "go.sum").write_text("another")

    assert not set(before) & {tool.key() for tool in binaries.TOOLS}


def test_coredns_is_built_with_the_plugins_of_the_corefile_and_no_others() -> None:
    program = (MULTIBIN / "main.go").read_text()
    named = set(re.findall(r"^ {4}(\w+)", components._corefile(Path("/d")), re.MULTILINE))  # pyright: ignore[reportPrivateUsage]

    assert set(re.findall(r'_ "github\.com/coredns/coredns/plugin/(\w+)"', program)) == named
    directives = re.search(r"dnsserver\.Directives = .*\{(.*)\}", program)
    assert directives is not None
    assert set(re.findall(r"\w+", directives[1])) == named


def test_one_version_of_kubernetes_is_compiled_for_all_and_pages_name_what_is_built() -> None:
    module = (MULTIBIN / "go.mod").read_text()
    versions = set(re.findall(r"^\tk8s\.io/\S+ => k8s\.io/\S+ v0\.(\S+)", module, re.MULTILINE))
    containerd = re.search(r"containerd/containerd/v2 v(\S+)", module)
    assert containerd is not None

    assert f"\tk8s.io/kubernetes {binaries.KUBERNETES_VERSION}\n" in module
    assert versions == {binaries.KUBERNETES_VERSION.removeprefix("v1.")}
    built = f"Kubernetes {binaries.KUBERNETES_VERSION[1:]}, containerd {containerd[1]}"
    assert built in (ROOT / "testbed/README.md").read_text()


def test_images_are_made_beside_the_programs_not_after_them() -> None:
    told = subprocess.run(
        ["make", "--dry-run", "images"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    ).stdout
    assert "testbed build-image" in told
    assert "testbed build\n" not in told


def test_packages_that_two_need_at_once_are_installed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    askers: set[int] = set()
    both_asked = threading.Event()
    installed: list[list[str]] = []

    def missing(*, node: bool) -> list[str]:
        assert node
        askers.add(threading.get_ident())
        if len(askers) == 2:
            both_asked.set()
        return [] if installed else ["runc"]

    def install(wanted: list[str]) -> None:
        assert both_asked.wait(PATIENCE_S)
        installed.append(wanted)

    monkeypatch.setattr(debian, "missing", missing)
    monkeypatch.setattr(debian, "_install", install)
    threads = [threading.Thread(target=debian.ensure_packages, kwargs={"node": True}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)

    assert installed == [["runc"]]
