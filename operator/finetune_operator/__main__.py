"""`python -m finetune_operator`: one process, standalone, configured by its environment."""

import logging
import sys
from typing import Any, cast

import kopf
from prometheus_client import REGISTRY

from finetune_operator import logs
from finetune_operator.engine import MISSING_CRD, Engine
from finetune_operator.handlers import registry
from finetune_operator.health import HttpServer
from finetune_operator.heaps import bound_heaps
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings, SettingsError

log = logging.getLogger("finetune_operator")

EXIT_CRD_GONE = 4


def main() -> int:
    bound_heaps()
    try:
        settings = Settings.from_env()
        logs.configure(settings.log_level)
        metrics = Metrics(REGISTRY)
        engine = Engine(settings, metrics)
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201 - there may be no log yet
        return 2
    server = HttpServer(settings.http_port, metrics.registry, engine.health)
    try:
        kopf.run(
            registry=registry(engine),
            identity=cast(Any, settings.identity),  # else Kopf asks for its user's name, and 10001 has none
            standalone=True,
            clusterwide=not settings.watch_namespaces,
            namespaces=settings.watch_namespaces,
        )
    except Exception:  # Kopf ends as a whole where one watch finds no CRD; its errors are no part of its interface
        if not engine.crd_is_missing():
            raise
        log.error("%s after a restart", MISSING_CRD)
        return EXIT_CRD_GONE
    finally:
        engine.stop()
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
