"""Why something ended or waits: the fixed list of reasons, their exit codes, and their words.

Two levels. A `Reason` is what code and dashboards read: it has an exit code, and the exit code decides
whether a retry can help. A `Fault` is what exactly happened: it belongs to one reason and has a sentence
with places for arguments, which says the object, the place, what was found and what to do. Trainers send
the fault's code and its arguments, never free text and never data; the words are made here.
"""

from enum import StrEnum
from typing import NamedTuple

from finetune_api.data_files import listed_documents, listed_endings
from finetune_api.names import Stage
from finetune_api.printable import printable


class Reason(StrEnum):
    """Reasons of conditions, events and attempts. Those with an exit code come from the trainer."""

    # The trainer's own verdicts; see EXIT_CODES.
    COMMITTED = "Committed"
    CONFIG_INVALID = "ConfigInvalid"
    DATA_INVALID = "DataInvalid"
    DATA_NOT_FOUND = "DataNotFound"
    ACCESS_DENIED = "AccessDenied"
    UNTRUSTED_MODEL = "UntrustedModel"
    DIVERGED = "Diverged"
    GPU_OOM = "GpuOOM"
    OUTPUT_CONFLICT = "OutputConflict"
    NO_VALID_CHECKPOINT = "NoValidCheckpoint"
    DISK_FULL = "DiskFull"
    ADAPTER_NO_EFFECT = "AdapterNoEffect"
    MODEL_MISMATCH = "ModelMismatch"
    INTERRUPTED = "Interrupted"
    STORAGE_TRANSIENT = "StorageTransient"
    DISTRIBUTED_FAULT = "DistributedFault"
    GPU_FAULT = "GpuFault"
    SUPERSEDED = "Superseded"
    HOST_OOM = "HostOOM"
    PLAN_OUTDATED = "PlanOutdated"
    CONFIG_REPLACED = "ConfigReplaced"
    NO_PROGRESS = "NoProgress"  # also the operator's, of a pod that tells so
    UNKNOWN = "Unknown"
    # The operator's: progress.
    ACCEPTED = "Accepted"
    PREPARING = "Preparing"
    PREPARED = "Prepared"
    TRAINING = "Training"
    SUSPENDED = "Suspended"
    SUSPENDING = "Suspending"
    RESUMED = "Resumed"
    AWAITING_APPROVAL = "AwaitingApproval"
    WAITING_FOR_JOB = "WaitingForJob"
    PLANNED = "Planned"
    HEALTHY = "Healthy"
    SUCCEEDED = "Succeeded"
    # Of QualityConcern: what the trainer measured of the model; see quality.py.
    WORSE_THAN_START = "WorseThanStart"
    ANSWERS_DO_NOT_END = "AnswersDoNotEnd"
    DIVERGING = "Diverging"
    CHOSEN_UNLIKELY = "ChosenUnlikely"
    FAR_FROM_START = "FarFromStart"
    START_PREFERS_REJECTED = "StartPrefersRejected"
    NO_CONCERN = "NoConcern"
    NOT_MEASURED = "NotMeasured"
    # The operator's: waits that a person or the cluster can end.
    UNSCHEDULABLE = "Unschedulable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    IMAGE_PULL = "ImagePull"
    MISSING_REF = "MissingRef"
    FORBIDDEN = "Forbidden"
    NODE_UNREACHABLE = "NodeUnreachable"
    NO_ANSWER = "NoAnswer"  # of a pod that runs, when it is asked for its progress
    POD_NOT_STARTED = "PodNotStarted"  # the node refuses the pod, or cannot set it up
    JOB_SUSPENDED = "JobSuspended"  # the Kubernetes Job, by somebody else: Kueue, say
    JOB_LOST = "JobLost"
    POD_LOST = "PodLost"
    DISRUPTED = "Disrupted"
    BAD_REPORT = "BadReport"
    # The operator's: ends.
    SPEC_INVALID = "SpecInvalid"
    RUNTIME_NOT_FOUND = "RuntimeNotFound"
    INVALID_MANIFEST = "InvalidManifest"
    NAME_COLLISION = "NameCollision"
    DISK_LIMIT = "DiskLimit"
    RETRIES_EXHAUSTED = "RetriesExhausted"
    DISRUPTION_BUDGET = "DisruptionBudget"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    NO_ADAPTER_TO_COME = "NoAdapterToCome"  # of a job whose adapter was waited for
    REFUSED_BY_POLICY = "RefusedByPolicy"  # of the runtime, about data


# 10-29 are final (but prepare is tried again for a while after 12 and 13, see retry.py), 30-49 retryable, and so are 1
# and everything else, which count as Unknown. 20 is kept for GateFailed.
EXIT_CODES: dict[Reason, int] = {
    Reason.COMMITTED: 0,
    Reason.UNKNOWN: 1,
    Reason.CONFIG_INVALID: 10,
    Reason.DATA_INVALID: 11,
    Reason.DATA_NOT_FOUND: 12,
    Reason.ACCESS_DENIED: 13,
    Reason.UNTRUSTED_MODEL: 14,
    Reason.DIVERGED: 15,
    Reason.GPU_OOM: 16,
    Reason.OUTPUT_CONFLICT: 17,
    Reason.NO_VALID_CHECKPOINT: 18,
    Reason.DISK_FULL: 19,
    Reason.ADAPTER_NO_EFFECT: 21,
    Reason.MODEL_MISMATCH: 22,
    Reason.INTERRUPTED: 30,
    Reason.STORAGE_TRANSIENT: 31,
    Reason.DISTRIBUTED_FAULT: 32,
    Reason.GPU_FAULT: 33,
    Reason.SUPERSEDED: 34,
    Reason.HOST_OOM: 35,
    Reason.PLAN_OUTDATED: 36,
    Reason.NO_PROGRESS: 37,
    Reason.CONFIG_REPLACED: 38,
}
REASON_BY_EXIT_CODE: dict[int, Reason] = {code: reason for reason, code in EXIT_CODES.items()}
FINAL_EXIT_CODES = range(10, 30)  # also those of a newer trainer, which have no name here


def reason_of_exit(exit_code: int) -> Reason:
    """The reason a container's exit code stands for; Unknown for codes outside the table."""
    return REASON_BY_EXIT_CODE.get(exit_code, Reason.UNKNOWN)


LARGEST_COUNT = 2**63  # that a fault's argument may be; more is said to be more


class FaultText(NamedTuple):
    """What a fault means: its reason, and a sentence with `{places}` for its arguments.

    `unknown`: words for places that not every one who tells of the fault can fill, such as earlier trainers."""

    reason: Reason
    text: str
    unknown: dict[str, str] = {}  # noqa: RUF012 (never changed)


# The fields that say what the pod of a stage gets.
MEMORY_FIELDS = {Stage.PREPARE: "resources.prepare.memory", Stage.TRAIN: "resources.memory"}
DISK_FIELDS = {Stage.PREPARE: "resources.prepare.disk", Stage.TRAIN: "resources.disk"}


class Fault(StrEnum):
    """What exactly happened, as a code. Words and arguments: see FAULTS."""

    COMMITTED = "Committed"
    PREPARED = "Prepared"
    CONTRACT_SKEW = "ContractSkew"
    CONFIG_UNREADABLE = "ConfigUnreadable"
    CONFIG_REPLACED = "ConfigReplaced"
    CONFIG_CHANGED = "ConfigChanged"
    NO_CHAT_TEMPLATE = "NoChatTemplate"
    TEMPLATE_FAILED = "TemplateFailed"
    TEMPLATE_INVALID = "TemplateInvalid"
    TEMPLATE_RANDOM = "TemplateRandom"
    OTHER_TEXT = "OtherText"
    OTHER_IDS = "OtherIds"
    TOKENIZER_CLASS_DIFFERS = "TokenizerClassDiffers"
    ANSWER_NOT_AS_SERVED = "AnswerNotAsServed"
    NO_REASONING = "NoReasoning"
    NO_STOP_TOKEN = "NoStopToken"
    STOP_TOKEN_SPLIT = "StopTokenSplit"
    END_TOKEN_NO_STOP = "EndTokenNoStop"
    PART_VANISHES = "PartVanishes"
    UNROLLED_TOO_MUCH = "UnrolledTooMuch"
    SEQUENCE_LENGTH_TOO_LONG = "SequenceLengthTooLong"
    UNSUPPORTED_MODEL = "UnsupportedModel"
    BROKEN_MODEL = "BrokenModel"
    ADAPTER_UNUSABLE = "AdapterUnusable"
    ADAPTER_NOT_FOUND = "AdapterNotFound"
    ADAPTER_OF_OTHER_BASE = "AdapterOfOtherBase"
    MEMORY_TOO_SMALL = "MemoryTooSmall"
    DISK_TOO_SMALL = "DiskTooSmall"
    PREPARE_TOO_SMALL = "PrepareTooSmall"
    BROKEN_ROW = "BrokenRow"
    BROKEN_FILE = "BrokenFile"
    WRONG_FILE = "WrongFile"
    WRONG_FORMAT = "WrongFormat"
    TOO_MANY_LONG_ROWS = "TooManyLongRows"
    TOO_MANY_POOR_ROWS = "TooManyPoorRows"
    EVALUATION_SET_UNREADABLE = "EvaluationSetUnreadable"
    EVALUATION_SET_SAYS_NOTHING = "EvaluationSetSaysNothing"
    EVALUATION_SETS_TOO_LARGE = "EvaluationSetsTooLarge"
    NO_TRAINING_DATA = "NoTrainingData"
    ONE_SIDED_THUMBS = "OneSidedThumbs"
    INPUT_CHANGED = "InputChanged"
    BUCKET_NOT_FOUND = "BucketNotFound"
    OBJECT_NOT_FOUND = "ObjectNotFound"
    NO_FILES_MATCH = "NoFilesMatch"
    FILE_NAMED_TWICE = "FileNamedTwice"
    TOO_MANY_FILES = "TooManyFiles"
    ACCESS_DENIED = "AccessDenied"
    TOKEN_EXPIRED = "TokenExpired"
    NO_CREDENTIALS = "NoCredentials"
    CERTIFICATE_UNTRUSTED = "CertificateUntrusted"
    WRONG_REGION = "WrongRegion"
    PICKLE_ONLY = "PickleOnly"
    NO_SAFETENSORS = "NoSafetensors"
    REMOTE_CODE = "RemoteCode"
    NOT_FINITE = "NotFinite"
    GPU_OOM = "GpuOOM"
    OUTPUT_CONFLICT = "OutputConflict"
    NO_VALID_CHECKPOINT = "NoValidCheckpoint"
    DISK_FULL = "DiskFull"
    ADAPTER_NO_EFFECT = "AdapterNoEffect"
    RELOAD_MISMATCH = "ReloadMismatch"
    MODEL_CHANGED = "ModelChanged"
    INTERRUPTED = "Interrupted"
    STOPPED = "Stopped"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    CORRUPT_TRANSFER = "CorruptTransfer"
    STALLED = "Stalled"
    NO_PROGRESS = "NoProgress"
    GPU_FAULT = "GpuFault"
    SUPERSEDED = "Superseded"
    HOST_OOM = "HostOOM"
    KILLED = "Killed"
    BUG = "Bug"
    OBJECT_TOO_LARGE = "ObjectTooLarge"
    CONDITIONAL_WRITES_UNSUPPORTED = "ConditionalWritesUnsupported"
    UNRECOGNISED = "Unrecognised"
    PLAN_OUTDATED = "PlanOutdated"
    PLAN_OF_OTHER_RELEASE = "PlanOfOtherRelease"


FAULTS: dict[Fault, FaultText] = {
    Fault.COMMITTED: FaultText(Reason.COMMITTED, "the adapter is committed at {uri}"),
    Fault.PREPARED: FaultText(
        Reason.COMMITTED,
        "{rows_in} rows: {rows_used} to train on, {rows_held_out} held out, {rows_dropped} dropped; {steps} steps",
        {"rows_held_out": "some", "rows_dropped": "some"},
    ),
    Fault.CONTRACT_SKEW: FaultText(
        Reason.CONFIG_INVALID,
        "the operator speaks contract version {operator}, the trainer image {trainer}; "
        "set the runtime's image to the one released with the operator",
    ),
    Fault.CONFIG_UNREADABLE: FaultText(Reason.CONFIG_INVALID, "{field} cannot be used: {problem}"),
    Fault.CONFIG_REPLACED: FaultText(
        Reason.CONFIG_REPLACED,
        "{file} is not the configuration that the operator wrote for this job: somebody has replaced its ConfigMap. "
        "Delete that ConfigMap, which the operator writes anew, and see who may write ConfigMaps in this namespace",
    ),
    Fault.CONFIG_CHANGED: FaultText(
        Reason.CONFIG_INVALID,
        "{what} differs from what step {step} was trained with ({found}, not {expected}); create a new job",
    ),
    Fault.NO_CHAT_TEMPLATE: FaultText(
        Reason.CONFIG_INVALID,
        "the tokenizer at {uri} has no chat template; set preprocessing.chatTemplate: plain, "
        "or use a model that has one",
    ),
    Fault.TEMPLATE_FAILED: FaultText(
        Reason.CONFIG_INVALID,
        "the chat template of {uri} failed on {file} row {row}: {problem}; fix the row, or set preprocessing."
        "systemMessages: InUser where the template has no place for a system message, sameRoleMessages: Join where "
        "roles must alternate, or preprocessing.onBadRow: Quarantine to leave such rows out",
    ),
    Fault.TEMPLATE_INVALID: FaultText(
        Reason.CONFIG_INVALID,
        "the chat template of {uri} cannot be used, whatever the rows are: {problem}; fix the template beside the "
        "model, or set preprocessing.chatTemplate: plain for a base model",
    ),
    Fault.TEMPLATE_RANDOM: FaultText(
        Reason.CONFIG_INVALID,
        "the chat template of {uri} writes {file} row {row} differently each time (token {token} of its sequence "
        "{sequence}), so that no server sends what would be learned; write the template beside the model without "
        "random choices, or set preprocessing.chatTemplate: plain",
    ),
    Fault.OTHER_TEXT: FaultText(
        Reason.CONFIG_INVALID,
        "the chat template of {uri} was rendered otherwise than by transformers' apply_chat_template: {file} row {row} "
        "differs from token {token} of its sequence {sequence} on, so what would be learned is not what servers send; "
        "this is an error of finetune-operator, so please report it with the template; until then, set "
        "preprocessing.chatTemplate: plain",
    ),
    Fault.OTHER_IDS: FaultText(
        Reason.CONFIG_INVALID,
        "the tokenizer of {uri} gave other ids than transformers' apply_chat_template for the same text: {file} row "
        "{row} differs from token {token} of its sequence {sequence} on; load the tokenizer with AutoTokenizer and "
        "save it again with save_pretrained, and if that does not help, please report it: this is then an error of "
        "finetune-operator",
    ),
    Fault.TOKENIZER_CLASS_DIFFERS: FaultText(
        Reason.CONFIG_INVALID,
        "{name}, which transformers loads for {uri}, does not read tokenizer.json as it is: {file} row {row} differs "
        "from token {token} of its sequence {sequence} on, so servers would send other ids than would be learned; name "
        "PreTrainedTokenizerFast as tokenizer_class in the model's tokenizer_config.json, or load the tokenizer with "
        "AutoTokenizer and save it again with save_pretrained",
    ),
    Fault.ANSWER_NOT_AS_SERVED: FaultText(
        Reason.DATA_INVALID,
        "{file} row {row}: the chat template writes message {message} without text that its own prompt for it has, so "
        "the model would not learn to answer the prompts that it gets; set preprocessing.chatTemplate: plain, write "
        "the rows with prompt and completion as plain strings, which no template renders, or change the chat "
        "template beside the model",
    ),
    Fault.NO_REASONING: FaultText(
        Reason.DATA_INVALID,
        "{file} row {row}: the chat template's prompt for message {message} opens a block of reasoning, of which the "
        "message has none, and the template has no prompt without it; write the reasoning into reasoning_content, or "
        "before the answer as <think>…</think>, or set preprocessing.chatTemplate: plain",
    ),
    Fault.NO_STOP_TOKEN: FaultText(
        Reason.CONFIG_INVALID,
        "{file} row {row}: the chat template ends message {message} in no token at which the model stops, which are "
        "{stops}, so that a server would never end its answers; if the template has an end token, name it as "
        "eos_token_id in the model's generation_config.json, which servers read; else set preprocessing.addEndToken: "
        "true, which ends each answer with {added}",
    ),
    Fault.STOP_TOKEN_SPLIT: FaultText(
        Reason.CONFIG_INVALID,
        "{file} row {row}: message {message} ends in the text of a token at which the model stops, which are {stops}, "
        "but the tokenizer reads that text as other tokens, so that a server would never end its answers; name it "
        "among the added tokens of tokenizer.json",
    ),
    Fault.END_TOKEN_NO_STOP: FaultText(
        Reason.CONFIG_INVALID,
        "the tokenizer of {uri} ends completions with {end}, at which the model does not stop, as it stops at {stops}, "
        "so that a server would never end them; name it as eos_token_id in the model's generation_config.json, which "
        "servers read, or one of those as eos_token in tokenizer_config.json",
    ),
    Fault.PART_VANISHES: FaultText(
        Reason.DATA_INVALID,
        "{file} row {row}: {field} is not in what the chat template makes of the row, so that it would be lost; "
        "{remedy}, or leave such rows out by preprocessing.onBadRow: Quarantine",
        {"remedy": "accept that by preprocessing.acceptVanishing"},
    ),
    Fault.UNROLLED_TOO_MUCH: FaultText(
        Reason.DATA_INVALID,
        "{repeated} of {tokens} tokens are the beginnings of conversations, repeated for each answer since the chat "
        "template writes an answer differently once others follow; preprocessing.maxUnrolledFraction allows "
        "{allowed} of all tokens: raise it, cut conversations into shorter ones, or set "
        "preprocessing.chatTemplate: plain, by which one sequence carries a conversation",
    ),
    Fault.SEQUENCE_LENGTH_TOO_LONG: FaultText(
        Reason.CONFIG_INVALID,
        "preprocessing.maxSequenceLength is {asked}, but the model at {uri} was made for {limit}; "
        "write {limit} or less",
    ),
    Fault.UNSUPPORTED_MODEL: FaultText(
        Reason.CONFIG_INVALID, "the model at {uri}, a {architecture}, cannot be trained as it is: {problem}"
    ),
    Fault.BROKEN_MODEL: FaultText(Reason.CONFIG_INVALID, "the model at {uri} cannot be used as it is: {problem}"),
    Fault.ADAPTER_UNUSABLE: FaultText(
        Reason.CONFIG_INVALID,
        "training cannot go on with the adapter at {uri}: {problem}; name in model.adapterFrom one that a FineTuneJob "
        "of this release committed, or leave model.adapterFrom out",
    ),
    Fault.ADAPTER_NOT_FOUND: FaultText(
        Reason.DATA_NOT_FOUND,
        "no adapter is at {uri}, as no manifest.json is there: name in model.adapterFrom the folder that "
        "status.artifacts[].uri of its job names, or that finetune run told; or put the adapter back",
    ),
    Fault.ADAPTER_OF_OTHER_BASE: FaultText(
        Reason.MODEL_MISMATCH,
        "the adapter at {uri} was trained on another base model than {model}: {file} differs; name in model.uri the "
        "model that it was trained on",
    ),
    Fault.MEMORY_TOO_SMALL: FaultText(
        Reason.CONFIG_INVALID,
        "training needs about {needed_gib} GiB of memory, but resources.memory allows {limit_gib} GiB; "
        "raise it, or lower preprocessing.maxSequenceLength",
    ),
    Fault.DISK_TOO_SMALL: FaultText(
        Reason.CONFIG_INVALID,
        "training needs about {needed_gib} GiB of disk for model, data and checkpoints, but gets {limit_gib} GiB; "
        "raise resources.disk, or free space where finetune run works",
    ),
    Fault.PREPARE_TOO_SMALL: FaultText(
        Reason.CONFIG_INVALID,
        "preparing the data takes at least {needed_gib} GiB of {what}, but prepare gets {limit_gib} GiB; raise "
        "{field}, or give finetune run more where it works",
    ),
    Fault.BROKEN_ROW: FaultText(
        Reason.DATA_INVALID,
        "{file} row {row}{field}: {problem}. {broken} of {rows} rows read are broken; fix them, or {remedy}",
        unknown={"remedy": "see preprocessing.onBadRow and preprocessing.maxBrokenFraction"},
    ),
    Fault.BROKEN_FILE: FaultText(
        Reason.DATA_INVALID,
        "{file} cannot be read from row {row} on: {problem}; write the file again, or leave it out",
    ),
    Fault.WRONG_FILE: FaultText(
        Reason.DATA_INVALID,
        "{file} cannot be read: it is {found}; {remedy}",
        unknown={"remedy": "write its rows as JSON Lines, CSV or Parquet"},
    ),
    Fault.WRONG_FORMAT: FaultText(
        Reason.DATA_INVALID, "{file} row {row}: method {method} needs {expected}; found the fields {found}"
    ),
    Fault.TOO_MANY_LONG_ROWS: FaultText(
        Reason.DATA_INVALID,
        "{dropped} of {rows} rows read are longer than {limit} tokens, {source}; the first is row {row} of {file} with "
        "{tokens}, the longest has {longest}; {remedy}",
        unknown={"remedy": "see preprocessing.tooLong and preprocessing.maxTooLongFraction"},
    ),
    Fault.TOO_MANY_POOR_ROWS: FaultText(
        Reason.DATA_INVALID,
        "the rules of preset {preset} would leave out {dropped} of {rows} rows ({percent} %), where "
        "preprocessing.quality.maxDroppedFraction allows {allowed} %: {table}. decisions.jsonl in .job/ or "
        "finetune data check names the rows; raise maxDroppedFraction to go on without them, or write other thresholds "
        "or preset: Off",
    ),
    Fault.EVALUATION_SET_UNREADABLE: FaultText(
        Reason.DATA_INVALID,
        "the evaluation set of {field} cannot be read, so that no row can be kept out for it: {problem}",
    ),
    Fault.EVALUATION_SET_SAYS_NOTHING: FaultText(
        Reason.DATA_INVALID,
        "the evaluation set of {field} has {rows} rows, and no text of {words} words by which rows could be found that "
        "share it; name the files with its questions, or remove it",
    ),
    Fault.EVALUATION_SETS_TOO_LARGE: FaultText(
        Reason.DATA_INVALID,
        "the evaluation sets up to {field} have more than {limit} different runs of {words} words; name fewer or "
        "smaller ones",
    ),
    Fault.NO_TRAINING_DATA: FaultText(
        Reason.DATA_INVALID,
        "no row is left to train on: {rows_in} rows read, {rows_dropped} dropped, most because each {reason}; "
        "finetune data check names the rows, as do report.json and decisions.jsonl in .job/ of a run",
    ),
    Fault.ONE_SIDED_THUMBS: FaultText(
        Reason.DATA_INVALID,
        "of the answers to train on {good} are good and {bad} are bad; KTO learns from both: add rows with the other "
        "`label`, or, where all are good, learn them by method.type: SFT with datasets[].ignoreFields: [label]",
    ),
    Fault.INPUT_CHANGED: FaultText(
        Reason.DATA_INVALID,
        "{file} changed while it was read, or since the data was prepared; create a new job once it is complete",
    ),
    Fault.BUCKET_NOT_FOUND: FaultText(
        Reason.DATA_NOT_FOUND, "the bucket {bucket} does not exist at {endpoint}; create it, or fix {field}"
    ),
    Fault.OBJECT_NOT_FOUND: FaultText(Reason.DATA_NOT_FOUND, "{uri} does not exist; put it there, or fix {field}"),
    Fault.NO_FILES_MATCH: FaultText(
        Reason.DATA_NOT_FOUND,
        f"no data file matches {{uri}}{{found}}; expected at least one {listed_endings()}, "
        f"or for method CPT a document ({listed_documents()}); "
        "a folder is written with / at its end",
        unknown={"found": ""},
    ),
    Fault.FILE_NAMED_TWICE: FaultText(
        Reason.CONFIG_INVALID,
        "{file} is named by {first} and again by {second}, so that each of its rows would count twice; name it once",
    ),
    Fault.TOO_MANY_FILES: FaultText(
        Reason.DATA_INVALID, "{uri} matches more than {limit} files; name a narrower prefix or merge the files"
    ),
    Fault.ACCESS_DENIED: FaultText(
        Reason.ACCESS_DENIED,
        "the job's credentials may not {action} {uri}; grant it, or fix what storage.secretRef or "
        "storage.serviceAccountName names (for finetune run: the credentials of this machine)",
    ),
    Fault.TOKEN_EXPIRED: FaultText(
        Reason.ACCESS_DENIED,
        "the session token has expired while trying to {action} {uri}; renew it in the Secret of storage.secretRef "
        "(for finetune run: on this machine)",
    ),
    Fault.NO_CREDENTIALS: FaultText(
        Reason.ACCESS_DENIED,
        "no storage credentials: set storage.secretRef, or storage.serviceAccountName with a cloud identity; the role "
        "of the node is used only where the platform team lets the runtime do so "
        "(for finetune run: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)",
    ),
    Fault.CERTIFICATE_UNTRUSTED: FaultText(
        Reason.ACCESS_DENIED,
        "the TLS certificate of {endpoint} is not trusted ({problem}); put its authority into storage.caBundle",
    ),
    Fault.WRONG_REGION: FaultText(
        Reason.CONFIG_INVALID,
        "the bucket {bucket} is not in region {region} of {endpoint}; fix storage.region or storage.endpoint",
    ),
    Fault.PICKLE_ONLY: FaultText(
        Reason.UNTRUSTED_MODEL,
        "{uri} has no safetensors weights (found {found}); pickles can run code and are refused: convert the model",
    ),
    Fault.NO_SAFETENSORS: FaultText(
        Reason.CONFIG_INVALID,
        "{uri} has no safetensors weights; {found} is of a format that cannot be trained: "
        "name the safetensors model that it was made from",
    ),
    Fault.REMOTE_CODE: FaultText(
        Reason.UNTRUSTED_MODEL,
        "{file} of the model at {uri} asks for the model's own code (auto_map), which is never run; where transformers "
        "has code for it, remove auto_map from that file, else choose another model",
        {"file": "a file"},
    ),
    Fault.NOT_FINITE: FaultText(
        Reason.DIVERGED,
        "{count} steps in a row had a loss, a gradient or a figure of the method, such as the reward margin, "
        "that is not finite, last at step {step}; lower hyperparameters.learningRate",
    ),
    Fault.GPU_OOM: FaultText(
        Reason.GPU_OOM, "the GPU's memory ran out at step {step}; lower preprocessing.maxSequenceLength"
    ),
    Fault.OUTPUT_CONFLICT: FaultText(
        Reason.OUTPUT_CONFLICT, "{uri} belongs to another job ({owner}); choose another output.uri"
    ),
    Fault.NO_VALID_CHECKPOINT: FaultText(
        Reason.NO_VALID_CHECKPOINT,
        "none of the {count} checkpoints at {uri} is whole; create a new job to train from the start",
    ),
    Fault.DISK_FULL: FaultText(
        Reason.DISK_FULL,
        "the disk is full while writing {what}; raise {field}, or free space where finetune run works",
        {"field": "resources.disk, or resources.prepare.disk while data is prepared"},
    ),
    Fault.ADAPTER_NO_EFFECT: FaultText(
        Reason.ADAPTER_NO_EFFECT,
        "the reloaded adapter does not change the model (largest log-probability difference {difference}); "
        "raise hyperparameters.learningRate, and see in report.json whether the rows have answers to learn",
    ),
    Fault.RELOAD_MISMATCH: FaultText(
        Reason.ADAPTER_NO_EFFECT,
        "the reloaded adapter differs from the trained one (largest log-probability difference {difference}): "
        "it was damaged on its way to the disk, or this is a bug of the trainer",
    ),
    Fault.MODEL_CHANGED: FaultText(Reason.MODEL_MISMATCH, "{uri} changed since the job was prepared; create a new job"),
    Fault.INTERRUPTED: FaultText(Reason.INTERRUPTED, "stopped on request at step {step}, checkpoint kept"),
    Fault.STOPPED: FaultText(
        Reason.INTERRUPTED, "stopped on request; the next attempt goes on from what was saved before"
    ),
    Fault.STORAGE_UNAVAILABLE: FaultText(
        Reason.STORAGE_TRANSIENT, "could not {action} {uri} after {tries} tries over {seconds} s: {problem}"
    ),
    Fault.CORRUPT_TRANSFER: FaultText(
        Reason.STORAGE_TRANSIENT, "{uri} arrived with a wrong size or digest {tries} times"
    ),
    Fault.STALLED: FaultText(
        Reason.DISTRIBUTED_FAULT, "no forward or backward pass finished for {seconds} s after step {step}"
    ),
    Fault.NO_PROGRESS: FaultText(
        Reason.NO_PROGRESS,
        "no row and no part of a file was read or written for {seconds} s (doing: {activity}; {rows} rows read); the "
        "log shows where it hangs. For a machine that slow, raise recovery.progressDeadlineSeconds",
    ),
    Fault.GPU_FAULT: FaultText(Reason.GPU_FAULT, "the GPU failed at step {step}"),
    Fault.SUPERSEDED: FaultText(
        Reason.SUPERSEDED, "a newer attempt (epoch {newer}) has taken over from this one (epoch {own})"
    ),
    Fault.HOST_OOM: FaultText(
        Reason.HOST_OOM,
        "memory ran out (the limit: {limit}); raise {field}",
        {"limit": "not known", "field": "resources.memory, or resources.prepare.memory while data is prepared"},
    ),
    Fault.KILLED: FaultText(Reason.UNKNOWN, "the trainer was killed by signal {signal}"),
    Fault.BUG: FaultText(
        Reason.UNKNOWN, "unexpected {exception} at {place}: this is a bug of the trainer; its log has the trace"
    ),
    Fault.OBJECT_TOO_LARGE: FaultText(
        Reason.DATA_INVALID, "{uri} has {size_bytes} bytes; at most {limit_bytes} are read of such an object"
    ),
    Fault.CONDITIONAL_WRITES_UNSUPPORTED: FaultText(
        Reason.CONFIG_INVALID,
        "the store at {endpoint} does not honour conditional writes (If-None-Match), so two jobs could overwrite each "
        "other; use one that does, such as AWS S3, MinIO or Ceph",
    ),
    Fault.UNRECOGNISED: FaultText(
        Reason.UNKNOWN,
        "the trainer, which is newer than the operator, ended with {code}, which the operator has no words for; "
        "the trainer's log says what it is",
    ),
    Fault.PLAN_OUTDATED: FaultText(
        Reason.PLAN_OUTDATED,
        "the plan is of version {found}, and this trainer follows plans of version {expected}; no step is finished, so "
        "the job is prepared again",
    ),
    Fault.PLAN_OF_OTHER_RELEASE: FaultText(
        Reason.CONFIG_INVALID,
        "the plan is of version {found}, and this trainer follows plans of version {expected}, but {step} steps are "
        "finished by the old plan; go on with the release that began the job, or create a new job",
    ),
}


def words(fault: Fault, args: dict[str, str | int | float]) -> str:
    """Return the fault's sentence with its arguments on one printable line; never raises.

    A missing argument shows as `?`."""
    known = {**FAULTS[fault].unknown, **{name: _readable(value) for name, value in args.items()}}
    return FAULTS[fault].text.format_map(_Args(known))


class _Args(dict[str, str | int | float]):
    """The arguments of a sentence; one that is missing shows as `?`."""

    def __missing__(self, key: str) -> str:
        return "?"


def _readable(value: str | int | float) -> str | int | float:
    if isinstance(value, str):
        return printable(value)
    # Python refuses to write numbers of more than 4,300 digits, and a hostile file's may have any number of them.
    return value if isinstance(value, float) or abs(value) < LARGEST_COUNT else f"more than {LARGEST_COUNT}"
