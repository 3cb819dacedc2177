"""One measurement in a process of its own, with pinned threads: what it prints in its last line, as JSON."""

import json
import os
import resource
import subprocess
import sys
from typing import Any

_TIMEOUT_S = 1800


def run(module: str, threads: int, *arguments: str) -> dict[str, Any]:
    """Run a module with these arguments and `--threads`. Raises SystemExit with the end of what it says went wrong."""
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", module, "--threads", str(threads), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes(device: str) -> int:
    """Return the most memory this process has held: the GPU's, or else the host's."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
