"""A writer in a process of its own: for each line on stdin it tries to win that round, and says how it went.

`python race.py ENDPOINT NAME`; the line is the URI of the round and the ETag of its pointer. Storage credentials come
from the environment.
"""

import json
import sys

from finetune_api import layout
from finetune_api.errors import StageError
from finetune_api.run import StorageConfig
from finetune_api.status import Artifact
from finetune_trainer import commit
from finetune_trainer.store import PreconditionFailed, Store, open_store


def main(endpoint: str, name: str) -> None:
    store = open_store(StorageConfig(endpoint=endpoint, path_style=True))
    store.head("s3://bucket/warm-up")
    print("ready", flush=True)
    for line in sys.stdin:
        uri, etag = line.split()
        print(json.dumps(play(store, uri, etag, name)), flush=True)


def play(store: Store, uri: str, etag: str, name: str) -> dict[str, object]:
    """Which of the round's prizes this writer won."""
    outcome: dict[str, object] = {}
    outcome["created"] = _won(store, f"{uri}/object", name, if_none_match=True)
    outcome["moved"] = _won(store, f"{uri}/pointer", name, if_match=etag)
    try:
        commit.claim(store, f"{uri}/claimed", name)
        outcome["claimed"] = True
    except StageError:
        outcome["claimed"] = False
    fence = commit.raise_epoch(store, f"{uri}/run", 1, name)
    outcome["epoch"] = fence.epoch
    artifact = Artifact(
        type="Adapter",
        uri=f"{uri}/run/{layout.ADAPTER}/",
        digest=f"sha256:{name * 64}",
        manifest_uri=f"{uri}/run/{name}.json",
        rank=16,
    )
    try:
        commit.move_latest(store, commit.commit(store, fence, f"{uri}/run", artifact))
        outcome["committed"] = True
    except StageError as error:
        outcome["committed"] = error.fault.value
    return outcome


def _won(store: Store, uri: str, name: str, **condition: bool | str) -> bool:
    try:
        store.put(uri, name.encode(), **condition)  # type: ignore[arg-type]
    except PreconditionFailed:
        return False
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
