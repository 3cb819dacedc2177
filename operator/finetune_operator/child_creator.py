"""Creates what a decision asks for: the run's ConfigMap, then the objects of one attempt.

What exists under a name of ours is used only if it is what we would have made; what is refused becomes words in the
job's status, as somebody can mend it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from pydantic import ValidationError

from finetune_api import defaults, names
from finetune_api.names import Stage
from finetune_api.reasons import Reason
from finetune_api.status import AttemptStatus, FineTuneJobStatus, OperatorRecord
from finetune_operator.attempt_outcome import FIRST_SIGNAL, is_open
from finetune_operator.children import prepare, train
from finetune_operator.children.base import Manifest, Run
from finetune_operator.close_attempts import has_begun
from finetune_operator.cluster import ApiError, Body, Cluster, Kind
from finetune_operator.decision import CreateK8sJob
from finetune_operator.job_reader import FineTuneJob
from finetune_operator.observation import Blocked
from finetune_operator.observed import observe_k8s_job
from finetune_operator.parent_job import starting_adapter
from finetune_operator.run_config import config_map, digest_of, new_run, of_earlier_operator, renewed_run, stored_run
from finetune_operator.runtimes import Runtimes

log = logging.getLogger(__name__)

KINDS: Mapping[str, Kind] = {"ConfigMap": "configmaps", "Job": "jobs"}  # of what is created, as the API's paths say


class RefusedError(Exception):
    """A child cannot be created now; the job's status says why."""

    def __init__(self, blocked: Blocked) -> None:
        super().__init__(blocked.message)
        self.blocked = blocked


class LaterError(Exception):
    """What was observed is out of date; a later round will observe it anew."""


@dataclass(frozen=True)
class FoundRun:
    """A run, and whether its ConfigMap exists already, with the content that we gave it."""

    run: Run
    exists: bool


@dataclass(frozen=True)
class Creation:
    """What a round is about to create. proof: by which the attempt's Kubernetes Job will be known."""

    found: FoundRun
    proof: str


class ChildCreator:
    """Knows the API server and the runtimes; keeps nothing between two calls."""

    def __init__(self, cluster: Cluster, runtimes: Runtimes) -> None:
        self._cluster, self._runtimes = cluster, runtimes

    def find_run(self, job: FineTuneJob, status: FineTuneJobStatus) -> FoundRun:
        """Return the run for the job's next attempt, `status` being what was decided. Writes nothing.

        A run stays as it was made, until then with the runtime as it is now: while no pod has finished a step, a mended
        runtime is what the job waits for. Raises RefusedError for what only a person can fix."""
        assert job.spec is not None
        record = job.status.record or OperatorRecord()
        if record.run_digest is not None and record.run_config is not None:
            found = self._stored(job, record.run_config, record.run_digest)
        elif has_begun(job.status):  # under an operator that kept no digest
            found = self._stored(job, names.run_name(job.name, job.uid), None)
        else:
            found = None
        if found is not None and has_stepped(status):
            return FoundRun(found, exists=True)
        asked = defaults.given(job.spec.runtime, defaults.RUNTIME)
        runtime = self._runtimes.get(asked)
        if runtime is None and found is not None:
            return FoundRun(found, exists=True)
        if runtime is None:
            text = f"this cluster has no runtime {asked}: ask the platform team, or name another in a new job"
            raise RefusedError(Blocked(Reason.RUNTIME_NOT_FOUND, text))
        if found is None:
            return FoundRun(new_run(job, job.spec, runtime, starting_adapter(job.spec, status)), exists=False)
        if found.runtime == runtime:
            return FoundRun(found, exists=True)
        return FoundRun(renewed_run(found, job.spec, runtime, planned=status.plan is not None), exists=False)

    def runtime_changed(self, job: FineTuneJob) -> bool:
        """Return True if the job's next attempt would get another run than the one that its last attempt has."""
        try:
            return not self.find_run(job, job.status).exists
        except RefusedError:
            return False  # what is refused is told when something is to be created

    def create(self, job: FineTuneJob, creation: Creation, action: CreateK8sJob) -> None:
        """Create the attempt's objects.

        job: as it is stored, with the run's digest in its record, which a CRD of an earlier release leaves out."""
        run, stage, attempt = creation.found.run, action.stage, action.attempt
        # The watch may be behind: what exists now decides whether a second writer would come to life.
        wanted = names.child_name(job.name, job.uid, stage, attempt)
        existing = [observe_k8s_job(body) for body in self._cluster.list_children(job.namespace, job.uid)]
        if any(child is not None and child.live and child.name != wanted for child in existing):
            raise LaterError("another Job of this FineTuneJob is alive")
        if any(child is not None and child.name == wanted for child in existing):
            return
        record = job.status.record or OperatorRecord()
        if record.run_digest is None:
            run = of_earlier_operator(run)
        if not creation.found.exists:
            found = self._create_or_find(job, config_map(run))
            if digest_of(cast(Mapping[str, str], found.get("data") or {})) != run.digest:
                raise RefusedError(_collision("ConfigMap", job.namespace, run.name))
        digest = action.plan_digest
        manifests = prepare.render(run, attempt) if stage == Stage.PREPARE else train.render(run, attempt, digest)
        for manifest in manifests:
            if manifest["kind"] == "Job":
                manifest["metadata"]["annotations"] = {names.ANNOTATION_PROOF: creation.proof}
            self._create_or_find(job, manifest)
            log.info("%s/%s: created %s %s", job.namespace, job.name, manifest["kind"], manifest["metadata"]["name"])

    def _stored(self, job: FineTuneJob, name: str, digest: str | None) -> Run | None:
        """Return the run in a ConfigMap; None if there is none, or none that this version can read."""
        body = self._cluster.get("configmaps", job.namespace, name)
        if body is None:
            return None
        files = cast(Mapping[str, str], body.get("data") or {})
        if not is_ours(body, job) or (digest is not None and digest_of(files) != digest):
            raise RefusedError(_collision("ConfigMap", job.namespace, name))
        try:
            run = stored_run(job, name, files)
        except ValidationError as error:
            if not has_stepped(job.status):
                return None
            text = f"ConfigMap {job.namespace}/{name} was written by another version of the operator, and the job has"
            text += " begun with it: bring that version back, or create a new job"
            raise RefusedError(Blocked(Reason.INVALID_MANIFEST, text)) from error
        return of_earlier_operator(run) if digest is None else run

    def _create_or_find(self, job: FineTuneJob, manifest: Manifest) -> Body:
        """Return what is created, or what exists of this job under its name.

        Raises RefusedError for what a person can fix, LaterError."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        what = f"{kind} {job.namespace}/{name}"
        try:
            return self._cluster.create(KINDS[kind], manifest)
        except ApiError as error:
            if error.status == 409:
                found = self._cluster.get(KINDS[kind], job.namespace, name)
                if found is None:
                    raise LaterError(f"{what} has just vanished") from error
                if is_ours(found, job):
                    return found
                raise RefusedError(_collision(kind, job.namespace, name)) from error
            blocked = refusal(error, what)
            if blocked is None:
                raise
            raise RefusedError(blocked) from error


def refusal(error: ApiError, what: str) -> Blocked | None:
    """Return why `what` may not be created, in words; None for what a server does that is merely busy."""
    if error.status in (400, 422):
        return Blocked(Reason.INVALID_MANIFEST, f"{what} is refused: {error.message}")
    if error.status == 403:
        reason = Reason.QUOTA_EXCEEDED if "exceeded quota" in error.message else Reason.FORBIDDEN
        return Blocked(reason, f"{what} may not be created: {error.message}")
    if error.status >= 500 and "webhook" in error.message:
        return Blocked(Reason.FORBIDDEN, f"{what} cannot be created: {error.message}")
    return None


def has_stepped(status: FineTuneJobStatus) -> bool:
    """Return True once a pod of the job has finished a step of the training, or may have done so.

    What a trainer did that was killed before it could say so, and that nobody could ask, is not known."""
    if status.progress is not None and status.progress.step > 0:
        return True
    return any(entry.last_step or _said_nothing(entry) for entry in status.attempts)


def _said_nothing(entry: AttemptStatus) -> bool:
    """Return True for an attempt whose trainer started and ended without a word on how far it came."""
    trained = entry.stage == Stage.TRAIN and entry.started_at is not None and entry.last_step is None
    was_killed = entry.exit_code is None or entry.exit_code > FIRST_SIGNAL
    return trained and not is_open(entry) and was_killed


def is_ours(body: Body, job: FineTuneJob) -> bool:
    owners = cast(list[Body], body.get("metadata", {}).get("ownerReferences") or [])
    return any(owner.get("uid") == job.uid and owner.get("controller") is True for owner in owners)


def _collision(kind: str, namespace: str, name: str) -> Blocked:
    text = f"{kind} {namespace}/{name} exists and is not what the operator made for this job"
    return Blocked(Reason.NAME_COLLISION, f"{text}: remove it, or rename the job")
