"""Names of licences that SPDX does not have, which prepare refuses and no API server can know."""

from typing import Any


def unknown_licenses(job: dict[str, Any]) -> list[str]:
    """Return what prepare would say of the licences of a job that fits the schema.

    Nothing where the trainer's packages are not installed, which know the names."""
    try:
        from finetune_trainer.data.licenses import license_problem
    except ImportError:
        return []
    datasets: list[dict[str, Any]] = job["spec"]["datasets"]
    problems = [license_problem(each["license"]) if "license" in each else None for each in datasets]
    return [f"spec.datasets[{at}].license: {words}" for at, words in enumerate(problems) if words is not None]
