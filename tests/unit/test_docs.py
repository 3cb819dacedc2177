"""Pages say what is so: files, links, commands, versions, variables."""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from finetune_api import names
from finetune_api.job import DatasetSpec, HyperparametersSpec, PreprocessingSpec
from finetune_api.names import HTTP_PORT
from finetune_api.platform import RESERVED_ENV
from finetune_cli.main import app
from finetune_cli.validate import problems
from finetune_operator.runtimes import parse_runtimes
from finetune_operator.settings import Settings
from testbed import binaries
from waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "testbed/README.md"]
# Their commands are run by tests/cluster/test_readme.py.
RUN_ON_THE_NODE = {ROOT / "README.md", ROOT / "docs/operations.md"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "crds/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tracked(ending: str) -> list[Path]:
    """Return the files with this ending that are in Git."""
    listed = subprocess.run(["git", "ls-files", "-z", f"*{ending}"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name]


def commands(page: Path) -> list[str]:
    """The lines of all ```sh blocks of a page, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_map_of_files_is_current() -> None:
    module = generator()
    assert module.FILES.read_text() == module.files_page(), "docs/files.md is stale; run `make crds`"


def test_every_product_module_is_in_the_map() -> None:
    text = (ROOT / "docs/files.md").read_text()
    for package in ("api/finetune_api", "operator/finetune_operator", "trainer/finetune_trainer", "cli/finetune_cli"):
        section = text.partition(f"## {package}\n")[2].partition("\n## ")[0]
        named = set(re.findall(r"^\| `([^`]+)` \| .{10}", section, re.MULTILINE))
        assert named == {str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*.py")}


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "docs/architecture.md", ROOT / "docs/security.md"])
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    files = [str(path.relative_to(ROOT)) for path in tracked(".py")]
    named = set(re.findall(r"`([a-z_/]+\.py)`", page.read_text()))
    assert [name for name in sorted(named) if not any(f"/{file}".endswith(f"/{name}") for file in files)] == []


def test_the_pod_monitor_of_the_page_about_operations_selects_and_labels_what_pods_have() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/operations.md").read_text(), re.MULTILINE | re.DOTALL)
    (monitor,) = [found for block in blocks if (found := yaml.safe_load(block)).get("kind") == "PodMonitor"]
    assert monitor["spec"]["selector"] == {"matchLabels": {names.LABEL_MANAGED_BY: names.FIELD_MANAGER}}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == names.PORT_NAME
    sources = {label for each in endpoint["relabelings"] for label in each.get("sourceLabels", ())}
    for label in (names.LABEL_JOB_NAME, names.LABEL_STAGE):
        assert f"__meta_kubernetes_pod_label_{re.sub(r'[^a-zA-Z0-9_]', '_', label)}" in sources


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_make_target_that_is_named_exists(page: Path) -> None:
    assert set(re.findall(r"`make ([a-z-]+)", page.read_text())) <= TARGETS


@pytest.mark.parametrize(
    ("page", "command"),
    [(page, command) for page in PAGES if page not in RUN_ON_THE_NODE for command in commands(page)],
)
def test_a_command_that_no_test_runs_names_things_that_exist(page: Path, command: str) -> None:
    words = shlex.split(command, comments=True)
    match words:
        case ["make", target]:
            assert target in TARGETS
        case [".venv/bin/pytest", path, *rest]:
            assert (ROOT / path).is_file()
            if rest:
                assert rest[0] == "-k"
                assert re.search(rf"def test_\w*{rest[1]}", (ROOT / path).read_text()), f"-k {rest[1]} selects nothing"
        case ["python3", "-m", "testbed", command_word]:
            done = subprocess.run(
                [sys.executable, "-m", "testbed", command_word, "--help"],
                cwd=ROOT,
                capture_output=True,
                timeout=PATIENCE_S,
            )
            assert done.returncode == 0
        case ["eval", inner] | ["export", inner]:
            assert "python3 -m testbed" in inner
        case ["finetune", "data", *_]:
            assert page.name == "data.md"  # run by tests/unit/test_cli_data.py
        case _:
            assert words[:3] == ["kubectl", "get", "nodes"], f"{page}: what runs `{command}`?"


def test_datasets_in_the_page_about_data_are_valid() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/data.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    datasets = [each for block in blocks for each in yaml.safe_load(block).get("datasets", ())]
    assert datasets
    for dataset in datasets:
        read = DatasetSpec.model_validate(dataset)
        assert read.model_dump(exclude_none=True, by_alias=True) == dataset


def test_what_the_page_about_data_says_to_preprocess_is_valid() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/data.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    found = [given for block in blocks if (given := yaml.safe_load(block).get("preprocessing"))]
    assert found
    for given in found:
        assert PreprocessingSpec.model_validate(given).model_dump(exclude_none=True, by_alias=True) == given


@pytest.mark.parametrize("page", sorted(RUN_ON_THE_NODE), ids=lambda path: path.name)
def test_the_subcommands_of_finetune_exist(page: Path) -> None:
    known = {each.name for each in (*app.registered_commands, *app.registered_groups)}
    assert set(re.findall(r"(?:^|`)finetune ([a-z]+)", page.read_text(), re.MULTILINE)) <= known


def test_the_oldest_kubernetes_is_the_same_everywhere_and_the_tested_one_is_the_testbeds() -> None:
    readme = re.search(r"Kubernetes \| ([\d.]+) and newer \(tested on ([\d.]+)\)", (ROOT / "README.md").read_text())
    chart = re.search(r'kubeVersion: ">=([\d]+\.[\d]+)', (ROOT / "charts/finetune-operator/Chart.yaml").read_text())
    assert readme is not None
    assert chart is not None
    assert readme[1] == chart[1]
    assert binaries.KUBERNETES_VERSION.startswith(f"v{readme[2]}.")


def test_every_variable_of_the_operator_is_explained() -> None:
    code = (ROOT / "operator/finetune_operator/settings.py").read_text()
    assert set(re.findall(r"FINETUNE_\w+", code)) == set(
        re.findall(r"FINETUNE_\w+", (ROOT / "docs/operations.md").read_text())
    )


def test_the_page_names_the_defaults_that_the_operator_has() -> None:
    rows = re.findall(r"^\| `FINETUNE_(\w+)` \| ([\d.]+) \|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert len(rows) == 4
    assert {name: float(value) for name, value in rows} == {
        name: float(getattr(Settings(), name.lower())) for name, _ in rows
    }


def test_the_field_that_the_readme_explains_has_the_text_it_shows() -> None:
    shown = re.search(
        r"FIELD: learningRate <number>\n\nDESCRIPTION:\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert shown is not None
    assert " ".join(shown[1].split()) == HyperparametersSpec.model_fields["learning_rate"].description


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    for page in (*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"):
        assert f"({page.relative_to(ROOT)})" in text


_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "s": 1, "min": 60, "h": 3600, "%": 0.01}


def limits() -> list[tuple[str, float, str]]:
    """Return (what, value in bytes, seconds or pieces, name of the constant) of the page's table of limits."""
    rows = re.findall(
        r"^\| ([^|]+) \| ([\d,.]+) ?(\w+|%|) \| `([\w.]+)` \|$", (ROOT / "docs/security.md").read_text(), re.M
    )
    return [(what, float(number.replace(",", "")) * _UNITS.get(unit, 1), name) for what, number, unit, name in rows]


def test_the_page_on_security_names_limits_that_are_enforced() -> None:
    section = (ROOT / "docs/security.md").read_text().partition("## Limits")[2].partition("\n## ")[0]
    assert len(limits()) == len(re.findall(r"^\| .*`", section, re.MULTILINE))
    for what, value, name in limits():
        module, _, constant = name.rpartition(".")
        assert getattr(importlib.import_module(module), constant) == pytest.approx(value), what


def test_the_page_on_security_names_all_rights_of_the_operator_and_the_ports_that_answer() -> None:
    page = (ROOT / "docs/security.md").read_text()
    chart = ROOT / "charts/finetune-operator/templates"
    rules = "".join((chart / name).read_text() for name in ("_helpers.tpl", "rbac.yaml"))
    rights = re.findall(r"^ *resources: \[(.+)\]\n *verbs: \[(.+)\]$", rules, re.MULTILINE)
    assert len(rights) == rules.count("apiGroups:")
    assert [f"{what}: {verbs}" for what, verbs in rights if f"{what}: {verbs}" not in page] == []
    assert set(re.findall(r"port (\d+)", page)) == {str(HTTP_PORT), str(Settings().http_port)}


def test_the_variables_that_a_runtime_cannot_set_are_listed() -> None:
    section = (ROOT / "docs/operations.md").read_text().partition("`env` must not set")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([A-Z_0-9]+)`", section)) == RESERVED_ENV


def policy_of(text: str) -> dict[str, Any]:
    (runtime,) = parse_runtimes(text.replace("  default:\n", "  default:\n    image: trainer:1\n")).values()
    assert runtime.policy is not None
    return runtime.policy.model_dump(mode="json", by_alias=True)


def test_the_policies_that_are_shown_are_ones_and_show_every_field() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/operations.md").read_text(), re.MULTILINE | re.DOTALL)
    (shown,) = [block for block in blocks if "policy:" in block]
    assert all(policy_of(shown).values())
    comments = (ROOT / "charts/finetune-operator/values.yaml").read_text()
    commented = comments.partition("#   policy:\n")[2].partition("# A change")[0]
    lines = re.sub("^# ", "  ", commented, flags=re.MULTILINE)
    assert all(policy_of("runtimes:\n  default:\n    policy:\n" + lines).values())


def test_the_replay_that_is_shown_is_of_a_dataset_that_is_shown() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/data.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (shown,) = [found for block in blocks if "replay" in (found := yaml.safe_load(block))]
    spec = {"model": {"uri": "s3://models/base"}, "method": {"type": "CPT"}, "output": {"uri": "s3://adapters/bot"}}
    job = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": "bot"}, "spec": spec | shown}
    assert problems(job, local=False) == []
