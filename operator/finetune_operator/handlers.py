"""Kopf is the watcher of FineTuneJobs, and nothing else: no state, no finalizer, no annotation, no event of its own."""

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import kopf

from finetune_api import names
from finetune_operator.engine import Engine

RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


def registry(engine: Engine) -> kopf.OperatorRegistry:
    """All handlers of the operator."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)

    @kopf.on.startup(registry=handlers)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        try:
            await asyncio.get_running_loop().run_in_executor(None, engine.start)
        except asyncio.CancelledError:  # told to end while waiting for the lease: Kopf then cleans nothing up
            engine.stop()
            raise

    @kopf.on.cleanup(registry=handlers)
    async def stop(**_: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(None, engine.stop)

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=handlers)
    async def changed(namespace: str | None, name: str | None, uid: str | None, meta: kopf.Meta, **_: Any) -> None:
        if namespace and name and uid:
            engine.put(namespace, name, uid, int(meta.get("generation") or 0), str(meta.get("resourceVersion")))

    return handlers


class NoDifferences(kopf.DiffBaseStorage):
    """Finds none: Kopf would copy each object for that, with every event, and no handler here asks for them."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return {}

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        """Kopf keeps nothing on users' objects."""


class Backoffs:
    """Seconds between two tries of one request, without end: Kopf ends as a whole once a single watch has no more."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain(RETRY_AFTER_S, itertools.repeat(RETRY_AFTER_S[-1]))


def configure(settings: kopf.OperatorSettings) -> None:
    """Bound every wait of Kopf, and keep it from reading or writing anything but FineTuneJobs."""
    settings.posting.enabled = False
    settings.scanning.disabled = True  # else it lists CRDs and namespaces
    settings.peering.standalone = True
    settings.persistence.diffbase_storage = NoDifferences()
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.inactivity_timeout = 90
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.networking.enforce_retry_after = True
    settings.networking.error_backoffs = Backoffs()
