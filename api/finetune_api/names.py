"""Every string that two parts of the system must agree on: API group, labels, child names, mount paths."""

from enum import StrEnum

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAMES = ("ftj",)
CATEGORIES = ("finetune",)
FIELD_MANAGER = "finetune-operator"

# A name may begin with a digit (7b-bot), as those of Jobs, pods and their host names may. That of a Service must not:
# the headless Service of several nodes will be called `ftj-NAME-UID5`, whatever NAME begins with.
MAX_NAME_LENGTH = 40  # so that NAME-UID5-prepare-999-0, the pod's host name, stays below 63
MAX_ATTEMPTS = 999

LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"  # = FIELD_MANAGER on every child: the watch selects by it
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_JOB_NAME = f"{GROUP}/job-name"
LABEL_STAGE = f"{GROUP}/stage"
LABEL_ATTEMPT = f"{GROUP}/attempt"

ANNOTATION_PROOF = f"{GROUP}/proof"  # on a Kubernetes Job: the status held its SHA-256 before the Job existed

CONTAINER = "trainer"
PORT_NAME = "metrics"
HTTP_PORT = 9400  # /progress and /metrics

# Inside the trainer's container.
CONFIG_DIR = "/etc/finetune/config"
CONFIG_FILE = "run.json"
CREDENTIALS_DIR = "/etc/finetune/credentials"
CA_BUNDLE_DIR = "/etc/finetune/ca"
CA_BUNDLE_KEY = "ca.crt"
PII_KEY_VOLUME = "pii-key"
PII_KEY_DIR = "/etc/finetune/pii-key"  # in prepare alone
PII_SECRET_KEY = "FINETUNE_PII_KEY"  # of the Secret that preprocessing.pii.keySecretRef names
SCRATCH_DIR = "/scratch"
TERMINATION_LOG = "/dev/termination-log"
PORT_FILE = "port"  # in the work folder, a line with the port that serves when RunConfig.http_port is 0

REQUIRED_SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
OPTIONAL_SECRET_KEYS = ("AWS_SESSION_TOKEN",)
SECRET_KEYS = (*REQUIRED_SECRET_KEYS, *OPTIONAL_SECRET_KEYS)


class Stage(StrEnum):
    """A containerised step of one job; also the word in the names of its Kubernetes Jobs."""

    PREPARE = "prepare"
    TRAIN = "train"


def uid5(uid: str) -> str:
    """First five hexadecimal digits of a Kubernetes UID: tells re-created objects of one name apart."""
    return uid.replace("-", "")[:5]


def run_name(job_name: str, uid: str) -> str:
    """Name of one job's run: its folder below `output.uri`, and what the names of its objects begin with."""
    return f"{job_name}-{uid5(uid)}"


def run_config_name(job_name: str, uid: str, digest: str) -> str:
    """Name of the ConfigMap of a run with this content, e.g. `bot-1a2b3-0f1e2d3c`."""
    return f"{run_name(job_name, uid)}-{digest.removeprefix('sha256:')[:8]}"


def child_name(job_name: str, uid: str, stage: Stage, attempt: int) -> str:
    """Deterministic name of the Kubernetes Job of one attempt, e.g. `bot-1a2b3-train-2`."""
    return f"{run_name(job_name, uid)}-{stage.value}-{attempt}"


def child_labels(job_name: str, uid: str, stage: Stage, attempt: int) -> dict[str, str]:
    """Labels of a child Job and of its pods."""
    return {
        LABEL_MANAGED_BY: FIELD_MANAGER,
        LABEL_JOB_UID: uid,
        LABEL_JOB_NAME: job_name,
        LABEL_STAGE: stage.value,
        LABEL_ATTEMPT: str(attempt),
    }
