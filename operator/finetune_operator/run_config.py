"""The configuration of a job's run, decided once for all attempts, and the immutable ConfigMap that holds it. Pure.

Whoever may create ConfigMaps in a namespace could else choose image, priority and Secrets of a job's pods: the
ConfigMap is named by its content, the status holds its digest before it exists, and each pod is told what it must read.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

from finetune_api import defaults, names
from finetune_api.base import sha256_digest
from finetune_api.job import FineTuneJobSpec
from finetune_api.layout import join
from finetune_api.names import Stage
from finetune_api.platform import Runtime, runtime_of_snapshot
from finetune_api.run import CONTRACT_VERSION, JobRef, RunConfig, StartingAdapter, StorageConfig
from finetune_operator.children.base import Manifest, Run, default_resources, owned_metadata, pii_secret
from finetune_operator.job_reader import FineTuneJob

RUNTIME_FILE = "runtime.json"


def new_run(job: FineTuneJob, spec: FineTuneJobSpec, runtime: Runtime, adapter: StartingAdapter | None = None) -> Run:
    """Return the run of a job that begins now with this runtime, and with this adapter."""
    return _made_run(job, run_config(job, spec, runtime, adapter), runtime)


def renewed_run(run: Run, spec: FineTuneJobSpec, runtime: Runtime, *, planned: bool) -> Run:
    """Return the run with the runtime as it is now, for a job of which no pod has finished a step.

    planned: its data is prepared; the plan was made for the resources that the run has, which stay then."""
    if not planned:
        return new_run(run.job, spec, runtime, run.config.starting_adapter)
    update = {"image": runtime.image, "grace_period_s": runtime.termination_grace_period_seconds}
    return _made_run(run.job, run.config.model_copy(update=update), runtime)


def stored_run(job: FineTuneJob, name: str, files: Mapping[str, str]) -> Run:
    """Return the run that a ConfigMap holds. Raises pydantic.ValidationError if this version cannot read it."""
    config = RunConfig.model_validate_json(files.get(names.CONFIG_FILE, ""))
    runtime = runtime_of_snapshot(files.get(RUNTIME_FILE, ""))
    return _run(job, config, runtime, name, files)


def of_earlier_operator(run: Run) -> Run:
    """Return the run as operators named it that kept no digest: for their jobs, and for a CRD of their time."""
    return replace(run, name=names.run_name(run.job.name, run.job.uid), config_digest=None)


def run_config(
    job: FineTuneJob, spec: FineTuneJobSpec, runtime: Runtime, adapter: StartingAdapter | None = None
) -> RunConfig:
    """Return the configuration, every default of the platform decided, so that all attempts of the job run alike."""
    storage = spec.storage
    endpoint = storage.endpoint if storage else None
    path_style = storage.path_style if storage else None
    asked = spec.resources
    return RunConfig(
        contract_version=CONTRACT_VERSION,
        job=JobRef(name=job.name, namespace=job.namespace, uid=job.uid, created_at=job.created_at),
        spec=spec,
        starting_adapter=adapter,
        run_uri=join(spec.output.uri, names.run_name(job.name, job.uid)),
        image=runtime.image,
        storage=StorageConfig(
            endpoint=endpoint,
            region=defaults.given(storage.region if storage else None, defaults.REGION),
            path_style=endpoint is not None if path_style is None else path_style,
            credentials_dir=names.CREDENTIALS_DIR if storage and storage.secret_ref else None,
            ca_bundle_path=f"{names.CA_BUNDLE_DIR}/{names.CA_BUNDLE_KEY}" if storage and storage.ca_bundle else None,
        ),
        resources=default_resources(runtime, Stage.TRAIN).with_asked(asked),
        prepare_resources=default_resources(runtime, Stage.PREPARE).with_asked(asked and asked.prepare),
        pii_key_path=f"{names.PII_KEY_DIR}/{names.PII_SECRET_KEY}" if pii_secret(spec) is not None else None,
        grace_period_s=runtime.termination_grace_period_seconds,
    )


def config_map(run: Run) -> Manifest:
    """Return the run's configuration for the trainer, and the runtime as it was, for the operator after an upgrade."""
    labels = {
        names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
        names.LABEL_JOB_UID: run.job.uid,
        names.LABEL_JOB_NAME: run.job.name,
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": owned_metadata(run.job, run.name, labels),
        "immutable": True,
        "data": _files(run.config, run.runtime),
    }


def digest_of(files: Mapping[str, str]) -> str:
    """Return the SHA-256 of a ConfigMap's data."""
    return sha256_digest(json.dumps(dict(files), sort_keys=True).encode())


def _made_run(job: FineTuneJob, config: RunConfig, runtime: Runtime) -> Run:
    files = _files(config, runtime)
    return _run(job, config, runtime, names.run_config_name(job.name, job.uid, digest_of(files)), files)


def _run(job: FineTuneJob, config: RunConfig, runtime: Runtime, name: str, files: Mapping[str, str]) -> Run:
    """Digests are of the files as they are: another release may write the same in other words."""
    config_digest = sha256_digest(files[names.CONFIG_FILE].encode())
    return Run(job=job, config=config, runtime=runtime, name=name, digest=digest_of(files), config_digest=config_digest)


def _files(config: RunConfig, runtime: Runtime) -> dict[str, str]:
    snapshot = json.dumps(runtime.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=True)
    return {names.CONFIG_FILE: config.to_json(), RUNTIME_FILE: snapshot}
