"""Writes the CRD, made from the models, and the chart's copy of it: `python crds/generate.py`.

The copy is a template and not in Helm's `crds/`, as Helm never upgrades what lies there.
"""

from pathlib import Path

import yaml

from finetune_api.crd import custom_resource_definition

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Generated from api/finetune_api/job.py and status.py by `python crds/generate.py`; do not edit.\n"
KEEP = """\
  {{- if .Values.crds.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
"""


def generated() -> dict[Path, str]:
    """Content by file. Raises ValueError if the CRD would be read as template text by Helm."""
    crd = yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=110, allow_unicode=True)
    if "{{" in crd:
        raise ValueError("the CRD contains {{, which Helm would take for a template")
    first, metadata, rest = crd.partition("metadata:\n")
    return {
        ROOT / "crds/finetunejobs.yaml": HEADER + crd,
        ROOT / "charts/finetune-operator/templates/crd.yaml": (
            HEADER + "{{- if .Values.crds.enabled }}\n" + first + metadata + KEEP + rest + "{{- end }}\n"
        ),
    }


if __name__ == "__main__":
    for path, content in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
