"""The table of accepted and refused FineTuneJobs, tests/specs/refused.yaml, as pytest parameters."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
LOCAL_EXAMPLE = ROOT / "examples" / "local.yaml"  # for `finetune run` alone: no cluster reads file:///
EXAMPLES = sorted(set((ROOT / "examples").glob("*.yaml")) - {LOCAL_EXAMPLE})
_TABLE: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "tests/specs/refused.yaml")


def accepted() -> list[tuple[str, dict[str, Any]]]:
    return [(name, merged(_TABLE["base"], patch)) for name, patch in _TABLE["accepted"].items()]


def refused() -> list[tuple[str, dict[str, Any], str]]:
    """Name, object, and what the message must say."""
    return [(name, merged(_TABLE["base"], case["patch"]), case["says"]) for name, case in _TABLE["refused"].items()]


def refused_changes() -> list[tuple[str, dict[str, Any], str]]:
    """Name, the object as it would become, and what the message must say."""
    return [(name, merged(_TABLE["base"], case["patch"]), case["says"]) for name, case in _TABLE["changes"].items()]


def allowed_changes() -> list[tuple[str, dict[str, Any]]]:
    return [(name, merged(_TABLE["base"], patch)) for name, patch in _TABLE["allowed_changes"].items()]


def base() -> dict[str, Any]:
    return deepcopy(_TABLE["base"])


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386 merge patch; `REPEAT-n` stands for something too long to write down."""
    if isinstance(patch, str) and "REPEAT-" in patch:
        prefix, _, count = patch.partition("REPEAT-")
        return prefix + "x" * int(count) if prefix else [{"uri": "s3://data/a/"}] * int(count)
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
