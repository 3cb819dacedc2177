"""Kopf watches unfinished FineTuneJobs, and nothing else: no state, finalizer, annotation or event of its own."""

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import aiohttp
import kopf

from finetune_api import names
from finetune_operator.engine import Engine
from finetune_operator.kopf_requests import RETRY_AFTER_S, AskedAgain
from finetune_operator.phase_selectors import UNFINISHED

KOPF_PAGE = 25  # objects, which Kopf has in memory three times, however large they are


def registry(engine: Engine) -> kopf.OperatorRegistry:
    """All handlers of the operator."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def login(**arguments: Any) -> kopf.AiohttpSession | None:
        found = kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)
        return session(found, AskedAgain(engine.selection, engine.takes_echo)) if found is not None else None

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
    async def told(type: str | None, body: kopf.Body, **_: Any) -> None:
        engine.hear(type, body)

    return handlers


class NoDifferences(kopf.DiffBaseStorage):
    """Finds none: Kopf would copy each object for that, with every event, and no handler here asks for them."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return {}

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        """Kopf keeps nothing on users' objects."""


def session(info: kopf.ConnectionInfo, *middlewares: aiohttp.ClientMiddlewareType) -> kopf.AiohttpSession:
    """The session that Kopf would make of its credentials, with middlewares."""
    made = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
        headers=info.as_http_headers(),
        proxy=info.proxy_url,
        trust_env=info.trust_env,
        middlewares=middlewares,
    )
    return kopf.AiohttpSession(
        server=info.server,
        priority=info.priority,
        default_namespace=info.default_namespace,
        expiration=info.expiration,
        aiohttp_session=made,
    )


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
    settings.watching.field_selectors[names.GROUP, names.PLURAL] = UNFINISHED
    settings.watching.chunk_size = KOPF_PAGE
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.inactivity_timeout = 90
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.networking.enforce_retry_after = True
    settings.networking.error_backoffs = Backoffs()
