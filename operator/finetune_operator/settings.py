"""The operator's own settings, from its environment."""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_INTERVAL_S = 120  # below health.STALL_S: what is done more seldom would look stalled


class SettingsError(Exception):
    """The operator cannot start, or a changed runtimes file cannot be used: says which field and why."""


@dataclass(frozen=True)
class Settings:
    """The operator's own environment. Durations in seconds."""

    namespace: str = "finetune-system"
    identity: str = "finetune-operator"
    watch_namespaces: tuple[str, ...] = ()  # empty: the whole cluster
    runtimes_file: Path = Path("/etc/finetune/runtimes.yaml")
    http_port: int = 8080
    workers: int = 16  # a round is five requests, most of it waiting for a busy API server
    resync_interval_s: float = 60
    progress_interval_s: float = 15
    lease_name: str = "finetune-operator"
    lease_duration_s: float = 30
    log_level: str = "INFO"

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        """Raises SettingsError for a number that is none or out of bounds, and for an unknown level."""
        namespaces = [name.strip() for name in env.get("FINETUNE_WATCH_NAMESPACES", "").split(",")]
        return cls(
            namespace=env.get("FINETUNE_NAMESPACE", cls.namespace),
            identity=env.get("FINETUNE_IDENTITY") or socket.gethostname(),
            watch_namespaces=tuple(sorted({name for name in namespaces if name})),
            runtimes_file=Path(env.get("FINETUNE_RUNTIMES_FILE", str(cls.runtimes_file))),
            http_port=int(_number(env, "FINETUNE_HTTP_PORT", cls.http_port, 0, 65535)),
            workers=int(_number(env, "FINETUNE_WORKERS", cls.workers, 1, 64)),
            resync_interval_s=_number(env, "FINETUNE_RESYNC_INTERVAL_S", cls.resync_interval_s, 1, MAX_INTERVAL_S),
            progress_interval_s=_number(
                env, "FINETUNE_PROGRESS_INTERVAL_S", cls.progress_interval_s, 1, MAX_INTERVAL_S
            ),
            lease_name=env.get("FINETUNE_LEASE_NAME") or cls.lease_name,
            lease_duration_s=_number(env, "FINETUNE_LEASE_DURATION_S", cls.lease_duration_s, 2, 3 * MAX_INTERVAL_S),
            log_level=_level(env.get("FINETUNE_LOG_LEVEL", cls.log_level)),
        )


def _level(name: str) -> str:
    if name not in logging.getLevelNamesMapping():
        raise SettingsError(f"FINETUNE_LOG_LEVEL is {name!r}; write DEBUG, INFO, WARNING or ERROR")
    return name


def _number(env: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    text = env.get(name, "")
    try:
        value = float(text) if text else float(default)
    except ValueError:
        raise SettingsError(f"{name} is {text!r}, which is not a number") from None
    if not low <= value <= high:
        raise SettingsError(f"{name} is {text}; write a number from {low:g} to {high:g}")
    return value
