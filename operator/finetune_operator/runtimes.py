"""The runtimes file as it is now: a changed ConfigMap mount is seen without a restart."""

import logging
import threading
from pathlib import Path

import yaml
from pydantic import ValidationError

from finetune_api.platform import DataPolicy, Runtime, RuntimesFile
from finetune_operator.settings import SettingsError

log = logging.getLogger(__name__)


class Runtimes:
    """Thread-safe look-up by name. The file is parsed again only when it changed; a broken change is not taken."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError when the file cannot be read or used."""
        self._path = path
        self._lock = threading.Lock()
        self._stamp = self._now()
        self._by_name = parse_runtimes(self._read())

    def get(self, name: str) -> Runtime | None:
        """Return what a job is started with: all but the policy, which is asked for by itself."""
        found = self._find(name)
        return found.model_copy(update={"policy": None}) if found is not None else None

    def policy(self, name: str) -> DataPolicy | None:
        """Return which data jobs of the runtime may learn; None for any."""
        found = self._find(name)
        return found.policy if found is not None else None

    def _find(self, name: str) -> Runtime | None:
        with self._lock:
            stamp = self._now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._by_name = parse_runtimes(self._read())
                except SettingsError as error:
                    log.error("keeping the runtimes read before: %s", error)
            return self._by_name.get(name)

    def _read(self) -> str:
        try:
            return self._path.read_text()
        except OSError as error:
            raise SettingsError(f"the runtimes file {self._path} cannot be read: {error}") from error

    def _now(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None  # between the two halves of a ConfigMap update
        return stat.st_mtime_ns, stat.st_size


def parse_runtimes(text: str) -> dict[str, Runtime]:
    """Return runtimes by name from YAML or JSON. Raises SettingsError that names the field."""
    try:
        return dict(RuntimesFile.model_validate(yaml.safe_load(text)).runtimes)
    except yaml.YAMLError as error:
        raise SettingsError(f"the runtimes file is not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"the runtimes file has a mistake at {place}: {first['msg']}") from error
