"""The configuration of a job's run, decided once for all attempts, and the immutable ConfigMap that holds it. Pure."""

import json

from finetune_api import defaults, names
from finetune_api.job import FineTuneJobSpec
from finetune_api.layout import join
from finetune_api.names import Stage
from finetune_api.platform import Runtime
from finetune_api.run import CONTRACT_VERSION, JobRef, RunConfig, StorageConfig
from finetune_operator.children.base import Manifest, Run, default_resources, owned_metadata
from finetune_operator.job_reader import FineTuneJob

RUNTIME_FILE = "runtime.json"


def run_config(job: FineTuneJob, spec: FineTuneJobSpec, runtime: Runtime) -> RunConfig:
    """Return the configuration, every default of the platform decided, so that all attempts of the job run alike."""
    storage = spec.storage
    endpoint = storage.endpoint if storage else None
    path_style = storage.path_style if storage else None
    asked = spec.resources
    return RunConfig(
        contract_version=CONTRACT_VERSION,
        job=JobRef(name=job.name, namespace=job.namespace, uid=job.uid, created_at=job.created_at),
        spec=spec,
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
        grace_period_s=runtime.termination_grace_period_seconds,
    )


def config_map(run: Run) -> Manifest:
    """Return the run's configuration for the trainer, and the runtime as it was, for the operator after an upgrade."""
    labels = {
        names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
        names.LABEL_JOB_UID: run.job.uid,
        names.LABEL_JOB_NAME: run.job.name,
    }
    snapshot = json.dumps(run.runtime.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": owned_metadata(run.job, names.run_name(run.job.name, run.job.uid), labels),
        "immutable": True,
        "data": {names.CONFIG_FILE: run.config.to_json(), RUNTIME_FILE: snapshot},
    }
