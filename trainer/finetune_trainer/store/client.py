"""The boto3 client: credentials that rotate, explicit timeouts, bounded retries."""

import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, PartialCredentialsError

from finetune_api.errors import StageError
from finetune_api.names import SECRET_KEYS
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.store import faults, transport

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# One call: at most 12 tries and 151 s of pauses (2^n s with full jitter, cut at 20 s), and no try after
# transport.CALL_TIMEOUT_S.
CONNECT_TIMEOUT_S = 5
MAX_TRIES = 12
# A rotated Secret reaches a running pod within about a minute (the kubelet's sync period).
ROTATION_WAIT_S = 60.0
_ROTATION_POLL_S = 2.0

_TRIED_AGAIN = frozenset({429, 500, 502, 503, 504})  # HTTP statuses
_KEY = re.compile(r"[!-~]+")

_Stamp = tuple[tuple[int, int] | None, ...]


class Clients:
    """Hands out the current client, and makes a new one when the credential files have changed."""

    def __init__(self, storage: StorageConfig) -> None:
        if storage.ca_bundle_path and not Path(storage.ca_bundle_path).is_file():
            raise StageError(
                Fault.CONFIG_UNREADABLE, field="storage.caBundle", problem=f"{storage.ca_bundle_path} is missing"
            )
        if storage.endpoint and "@" in storage.endpoint:  # of an operator that took it; every fault would show it
            problem = "it holds a user name or a password; create a job with those in the Secret of storage.secretRef"
            raise StageError(Fault.CONFIG_UNREADABLE, field="storage.endpoint", problem=problem)
        self._storage = storage
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._stamp: _Stamp = ()
        self.accepted = False  # whether the store has ever accepted our credentials

    def get(self) -> "S3Client":
        """Raises StageError(NO_CREDENTIALS) when the credentials folder lacks the files."""
        with self._lock:
            stamp = self._credentials_stamp()
            if self._client is None or stamp != self._stamp:
                self._client, self._stamp = self._create(), stamp
            return self._client

    def renew(self, refused: "S3Client") -> bool:
        """After the store refused the credentials: whether there is another client to try with.

        Waits for mounted files to change, as their rotation and the old token's end race each other; not when they
        never worked. Other sources of credentials are asked again at once."""
        if self._storage.credentials_dir is None:
            with self._lock:
                self._client = None
            return True
        deadline_s = time.monotonic() + (ROTATION_WAIT_S if self.accepted else 0)
        while self.get() is refused:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_ROTATION_POLL_S)
        return True

    def _create(self) -> "S3Client":
        try:
            client = self._boto3_client(self._read_secrets())
        except PartialCredentialsError as error:
            raise StageError(Fault.NO_CREDENTIALS) from error
        except (ValueError, BotoCoreError) as error:
            # Its text may quote an endpoint or a proxy with a password, so it is not even chained.
            problem = f"boto3 does not accept endpoint, region, proxy or profile ({type(error).__name__})"
            raise StageError(Fault.CONFIG_UNREADABLE, field="storage", problem=problem) from None
        client.meta.events.register_first("needs-retry.s3", _give_up)
        endpoint = cast("Any", client)._endpoint
        endpoint.http_session = transport.BoundedSession(endpoint.http_session)
        return client

    def _boto3_client(self, secrets: dict[str, str]) -> "S3Client":
        storage = self._storage
        # A session of its own: boto3's default session caches credentials.
        return boto3.session.Session().client(
            "s3",
            endpoint_url=storage.endpoint,
            region_name=storage.region,
            verify=storage.ca_bundle_path,
            aws_access_key_id=secrets.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=secrets.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=secrets.get("AWS_SESSION_TOKEN"),
            config=Config(
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=transport.STALL_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": MAX_TRIES},
                max_pool_connections=32,
                s3={"addressing_style": "path" if storage.path_style else "auto"},
                # The default of boto3 >= 1.36 (CRC trailers) breaks S3-compatible stores. Without it every body
                # is signed by its SHA-256, which the store checks.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def _read_secrets(self) -> dict[str, str]:
        folder = self._storage.credentials_dir
        if folder is None:
            return {}
        paths = [Path(folder, name) for name in SECRET_KEYS]
        found = {path.name: path.read_text(errors="replace").strip() for path in paths if path.is_file()}
        if not (found.get("AWS_ACCESS_KEY_ID") and found.get("AWS_SECRET_ACCESS_KEY")):
            raise StageError(Fault.NO_CREDENTIALS)
        for name, value in found.items():
            if value and not _KEY.fullmatch(value):  # else an error of http.client would quote the whole header
                problem = f"{name} holds a line break, a space or another character that no key has"
                raise StageError(Fault.CONFIG_UNREADABLE, field="storage.secretRef", problem=problem)
        return {name: value for name, value in found.items() if value}

    def _credentials_stamp(self) -> _Stamp:
        """Identity of the mounted files: the kubelet replaces them all by moving one symbolic link."""
        if self._storage.credentials_dir is None:
            return ()
        return tuple(_stamp(Path(self._storage.credentials_dir, name)) for name in SECRET_KEYS)


def _give_up(
    response: tuple[Any, Any] | None = None,
    attempts: int = 1,
    request_dict: dict[str, Any] | None = None,
    caught_exception: BaseException | None = None,
    **_: object,
) -> None:
    """Before botocore tries again: not what is as wrong the twelfth time as the first, and not for ever."""
    if caught_exception is not None and (
        faults.untrusted(caught_exception)
        or isinstance(caught_exception, transport.AnswerTooLargeError | transport.ForbiddenAnswerError)
    ):
        raise caught_exception
    failed = caught_exception is not None or (response is not None and response[0].status_code in _TRIED_AGAIN)
    context = request_dict["context"] if request_dict is not None else {}
    if failed and time.monotonic() >= transport.call_deadline_s(context):
        raise transport.CallTimeoutError(error=caught_exception, tries=attempts)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino
