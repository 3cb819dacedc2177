"""What every table has: the machine, the versions, medians with their spread, and one way to be written."""

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> str:
    """CPU, cores and memory, in words."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "CPU")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, Linux {platform.release()}"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and interquartile range, as `170.2 (168.9-171.0)`."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def write(name: str, title: str, command: str, packages: Sequence[str], body: str) -> None:
    """Write results/NAME.md and show it."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    load = os.getloadavg()[0]
    text = (
        f"# {title}\n\nMade by `{command}` on {datetime.now(UTC):%Y-%m-%d}; {machine()}; load {load:.1f} at the end; "
        f"Python {platform.python_version()}{', ' + versions if versions else ''}.\n\n{body}\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
