"""A real one-node Kubernetes without Docker, for tests and the demo: `python3 -m testbed up`
in the root of the repository.

Standard library only, so any Python 3.11 runs it, before the project's environment exists.
"""

from testbed.cluster import Cluster, down, find, missing, up
from testbed.images import build_image, ensure_base_image, load_image
from testbed.instance import TestbedError

__all__ = ["Cluster", "TestbedError", "build_image", "down", "ensure_base_image", "find", "load_image", "missing", "up"]
