"""Pull the progress of running pods. A pod is hostile: time, size and shape of its answer are bounded.

The pod is asked in HTTP/1.0 over a plain connection, so there are no redirects, no chunks and no compression, and
one deadline covers the whole exchange, however slowly the bytes come.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from pydantic import ValidationError

from finetune_api.names import HTTP_PORT
from finetune_api.quality import Concern
from finetune_api.run import MAX_PROGRESS_BYTES, Progress
from finetune_operator.child_cache import ChildCache, Owner
from finetune_operator.metrics import Metrics
from finetune_operator.observation import PodAnswer, PodSilence
from finetune_operator.observed import ObservedPod

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
MAX_HEADER_BYTES = 4096
MAX_CONNECTIONS = 64
MAX_PODS_OF_JOB = 4  # asked in a round; where one Kubernetes Job has more, they are made to look like its own
MIN_WRITE_INTERVAL_S = 30.0
WRITES_PER_S = 10.0


class ProgressError(Exception):
    """No usable answer; the text is a word for the metric.

    `silent`: it is the pod that does not answer. False: the network may be what keeps us apart."""

    def __init__(self, word: str, *, silent: bool = True) -> None:
        self.silent = silent
        super().__init__(word)


def write_interval_s(running: int) -> float:
    """Seconds between two writes of one job's progress, so that all together write at most ten a second."""
    return max(MIN_WRITE_INTERVAL_S, running / WRITES_PER_S)


async def fetch(host: str, port: int, timeout_s: float = TIMEOUT_S) -> Progress:
    """GET /progress. Raises ProgressError within `timeout_s`, after at most 20 KiB."""
    reached = asyncio.Event()
    try:
        answer = await asyncio.wait_for(_exchange(host, port, reached), timeout_s)
    except TimeoutError:
        raise ProgressError("timeout", silent=reached.is_set()) from None
    except OSError:
        raise ProgressError("unreachable", silent=reached.is_set()) from None
    return parse(answer)


def parse(answer: bytes) -> Progress:
    """The Progress in an HTTP answer. Raises ProgressError."""
    head, _, content = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].split(b" ")
    if len(status) < 2 or not status[0].startswith(b"HTTP/1.") or status[1] != b"200":
        raise ProgressError("status")
    if len(content) > MAX_PROGRESS_BYTES or len(head) > MAX_HEADER_BYTES:
        raise ProgressError("size")
    try:
        return Progress.model_validate_json(content)
    except ValidationError:
        raise ProgressError("schema") from None


async def _exchange(host: str, port: int, reached: asyncio.Event) -> bytes:
    """Sets `reached` once there is a connection: the kernel accepts it even for a process that stands still."""
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_PROGRESS_BYTES)
    reached.set()
    try:
        writer.write(f"GET /progress HTTP/1.0\r\nHost: {host}\r\nAccept: application/json\r\n\r\n".encode())
        await writer.drain()
        answer = bytearray()
        while len(answer) <= MAX_PROGRESS_BYTES + MAX_HEADER_BYTES:
            part = await reader.read(8192)
            if not part:
                return bytes(answer)
            answer += part
        raise ProgressError("size")
    finally:
        writer.transport.abort()  # a polite close could wait for the pod


@dataclass
class _Heard:
    """What the pod of one Kubernetes Job has said."""

    answer: PodAnswer | None = None  # the last
    silence: PodSilence | None = None  # while it does not answer
    looked_at: datetime | None = None


class ProgressPuller:
    """Asks each running pod that counts each `interval_s` and keeps the last answers. `due` gets the FineTuneJob whose
    answer should be looked at.

    They are kept by the UID of the pod's Kubernetes Job: a pod that somebody makes with the labels of a job can take
    no other's place. Which of them count is for who decides."""

    def __init__(
        self,
        children: ChildCache,
        metrics: Metrics,
        due: Callable[[Owner], None],
        now: Callable[[], datetime],
        port: int = HTTP_PORT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._children, self._metrics, self._due, self._now, self._port = children, metrics, due, now, port
        self._lock = threading.Lock()
        self._heard: dict[Owner, dict[str, _Heard]] = {}  # by UID of the Kubernetes Job
        self._followed: dict[Owner, str] = {}  # UID of the Kubernetes Job whose pods are asked
        self._running = self._rounds = 0
        self._clock = clock
        self._round_at_s = clock()
        self._stop = threading.Event()

    def answers(self, owner: Owner) -> tuple[PodAnswer, ...]:
        """Return the last answer of each pod of the FineTuneJob."""
        with self._lock:
            return tuple(each.answer for each in self._heard.get(owner, {}).values() if each.answer is not None)

    def silences(self, owner: Owner) -> tuple[PodSilence, ...]:
        """Return how long each pod that was asked and has not answered is silent."""
        with self._lock:
            return tuple(each.silence for each in self._heard.get(owner, {}).values() if each.silence is not None)

    def follow(self, owner: Owner, job_uid: str | None) -> None:
        """Ask from now on the pods of this Kubernetes Job of the FineTuneJob, and no others: they would not count."""
        with self._lock:
            if job_uid is None:
                self._followed.pop(owner, None)
            else:
                self._followed[owner] = job_uid

    def next_pods(self) -> list[tuple[Owner, ObservedPod]]:
        """Return the pods to ask in the next round: of each Kubernetes Job a few, in turns."""
        of_jobs: dict[Owner, list[ObservedPod]] = {}
        with self._lock:
            for owner, pod in self._children.running_pods():
                if self._followed.get(owner) == pod.owner_uid:
                    of_jobs.setdefault(owner, []).append(pod)
        first, self._rounds = self._rounds * MAX_PODS_OF_JOB, self._rounds + 1
        return [(owner, pod) for owner, pods in of_jobs.items() for pod in _some(pods, first)]

    def age_s(self) -> float:
        """Seconds since a round began or ended, or a pod of it was asked: it grows when the thread is dead or hangs."""
        return self._clock() - self._round_at_s

    def interval_s(self) -> float:
        return write_interval_s(self._running)

    def retain(self, owners: set[Owner]) -> None:
        """Forget all other FineTuneJobs, and Kubernetes Jobs of which nothing is known any more."""
        known = {owner: self._children.job_uids(owner) for owner in owners}
        with self._lock:
            self._followed = {owner: uid for owner, uid in self._followed.items() if owner in known}
            self._heard = {
                owner: {uid: each for uid, each in by_uid.items() if uid in known[owner]}
                for owner, by_uid in self._heard.items()
                if owner in known
            }

    def run(self, interval_s: float) -> None:
        """Until `stop`, in a thread of its own."""
        self._round_at_s = self._clock()
        while not self._stop.wait(interval_s):
            self._round_at_s = self._clock()
            asyncio.run(self.pull(self.next_pods()))
            self._round_at_s = self._clock()

    def stop(self) -> None:
        self._stop.set()

    async def pull(self, pods: Iterable[tuple[Owner, ObservedPod]]) -> None:
        """One round over these pods, at most MAX_CONNECTIONS at a time."""
        targets = list(pods)
        self._running = len(targets)
        free = asyncio.Semaphore(MAX_CONNECTIONS)

        async def ask(owner: Owner, pod: ObservedPod) -> None:
            async with free:
                self._round_at_s = self._clock()  # thousands of silent pods take longer than a stall
                try:
                    said = await fetch(pod.ip or "", self._port)
                except ProgressError as error:
                    self._metrics.progress_pulls.labels(str(error)).inc()
                    self._note_silence(owner, pod, silent=error.silent)
                    return
            if (said.stage, said.attempt) != (pod.stage, pod.attempt):
                self._metrics.progress_pulls.labels("stranger").inc()
                self._note_silence(owner, pod, silent=True)
                return
            self._metrics.progress_pulls.labels("ok").inc()
            self._keep(owner, PodAnswer(said, self._now(), pod.owner_uid))

        await asyncio.gather(*(ask(owner, pod) for owner, pod in targets))

    def _note_silence(self, owner: Owner, pod: ObservedPod, *, silent: bool) -> None:
        """Begin or go on with the pod's silence.

        One that was never reached is not held against the pod, as a policy or a fault of the network, ours even, is not
        the pod's. It goes on with one that is: for a process that stands still the kernel takes a hundred connections,
        no more."""
        now = self._now()
        with self._lock:
            heard = self._heard_of(owner, pod.owner_uid)
            before = heard.silence
            if before is None or before.pod_uid != pod.uid:
                before = PodSilence(pod.stage, pod.attempt, pod.owner_uid, pod.uid, now, now)
            reached_since = before.reached_since or (now if silent else None)
            heard.silence = replace(before, until=now, reached_since=reached_since)

    def _keep(self, owner: Owner, answer: PodAnswer) -> None:
        with self._lock:
            heard = self._heard_of(owner, answer.job_uid)
            before, heard.answer, heard.silence = heard.answer, answer, None
            is_due = (
                heard.looked_at is None
                or _concerns(before) != _concerns(answer)
                or (answer.at - heard.looked_at).total_seconds() >= self.interval_s()
            )
            if is_due:
                heard.looked_at = answer.at
        if is_due:
            self._due(owner)

    def _heard_of(self, owner: Owner, job_uid: str) -> _Heard:
        return self._heard.setdefault(owner, {}).setdefault(job_uid, _Heard())


def _some(pods: list[ObservedPod], first: int) -> list[ObservedPod]:
    """Return at most MAX_PODS_OF_JOB of them, from the one of that number on, as if they stood in a circle."""
    if len(pods) <= MAX_PODS_OF_JOB:
        return pods
    pods.sort(key=lambda pod: (pod.created_at, pod.uid))
    return [pods[(first + number) % len(pods)] for number in range(MAX_PODS_OF_JOB)]


def _concerns(answer: PodAnswer | None) -> list[Concern]:
    quality = answer.progress.quality if answer is not None else None
    return quality.concerns if quality is not None else []
