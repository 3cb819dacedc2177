"""The FineTuneJob spec: the single source of truth for the CRD, the operator, the trainer and the CLI.

No field has a schema default. An absent field means "choose for me": the value chosen and why land in
`status.plan.resolved`. Rules that need more than one field are CEL, written beside the model they belong to,
and are evaluated by the API server and, without a cluster, by the CLI.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from finetune_api import defaults
from finetune_api.base import ApiModel
from finetune_api.cel import matching, rules
from finetune_api.data_files import listed_documents, listed_endings
from finetune_api.documents import DocumentsSpec
from finetune_api.duplicates import MAX_EVALUATION_SETS, DeduplicationSpec, EvaluationSetSpec
from finetune_api.governance import OriginSpec
from finetune_api.objects import DnsName, DnsSubdomain, LocalObjectRef
from finetune_api.pii import PiiSpec
from finetune_api.replay import ReplaySpec
from finetune_api.row_words import SHARED_WORDS
from finetune_api.text_quality import QualitySpec
from finetune_api.uris import FilesUri, FolderUri, OutputUri


class AdapterMode(StrEnum):
    """What becomes of an earlier adapter."""

    CONTINUE = "Continue"
    STACK = "Stack"


class AdapterFromSpec(ApiModel):
    """The adapter that training goes on with."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("has(self.jobName) != has(self.uri)", "write either jobName or uri in model.adapterFrom"),
        )
    )
    job_name: DnsName | None = Field(
        default=None,
        description="A FineTuneJob of the same namespace, which may come later. This job waits until that one has "
        "committed its adapter, and ends where it fails, is deleted, or is only planned. Absent: uri names the "
        "adapter. Example: support-cpt",
    )
    uri: FolderUri | None = Field(
        default=None,
        description="Folder of an adapter that a FineTuneJob committed, as status.artifacts[].uri of that job names "
        "it. Absent: jobName names its job. Example: s3://adapters/support/support-cpt-1a2b3/adapter",
    )
    mode: AdapterMode | None = Field(
        default=None,
        description="Continue trains that adapter on: its rank and alpha stay. Stack keeps it as it is beside a new "
        "one, with the rank and alpha of peft, so that what it has learned is not trained over; one adapter of both, "
        f"whose rank is the sum of theirs, is committed for the bare base model. Absent: {defaults.ADAPTER_MODE}.",
    )


class ModelSpec(ApiModel):
    """The base model."""

    uri: FolderUri = Field(
        description="Folder with the model in Hugging Face layout: config.json, tokenizer files and safetensors "
        "weights. Pickled weights and models that need their own code are refused. Example: s3://models/smollm2-135m"
    )
    adapter_from: AdapterFromSpec | None = Field(
        default=None,
        description="An earlier adapter of the same base model that training goes on with, so that one adapter holds "
        "what both have learned: continued pre-training, then answers. Absent: a new adapter.",
    )


class MethodType(StrEnum):
    CPT = "CPT"
    SFT = "SFT"
    DPO = "DPO"
    ORPO = "ORPO"
    KTO = "KTO"


class LossOn(StrEnum):
    ASSISTANT = "Assistant"
    ALL = "All"


class SftSpec(ApiModel):
    """Options of supervised fine-tuning."""

    loss_on: LossOn | None = Field(
        default=None,
        description="Which tokens are learned: Assistant (the answers and the token that ends them) or All. "
        f"Absent: {defaults.LOSS_ON}.",
    )


class DpoLoss(StrEnum):
    SIGMOID = "Sigmoid"
    IPO = "IPO"
    SIMPO = "SimPO"


class DpoSpec(ApiModel):
    """Options of direct preference optimisation."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.gamma) || (has(self.loss) && self.loss == 'SimPO')",
                "gamma belongs to loss: SimPO; remove it or write loss: SimPO",
            ),
            (
                "!has(self.labelSmoothing) || !has(self.loss) || self.loss != 'IPO'",
                "labelSmoothing is for Sigmoid and SimPO; with loss: IPO leave it out",
            ),
        )
    )
    loss: DpoLoss | None = Field(
        default=None,
        description="Sigmoid is DPO as published. IPO aims at a fixed distance between both answers, for rows that "
        "hold the same few preferences again and again. SimPO compares mean log-probabilities of tokens and needs no "
        f"reference, so it is cheaper, and nothing holds it near the base model. Absent: {defaults.DPO_LOSS}.",
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="How much a deviation from the base model must be worth: lower lets the model move further away. "
        f"Absent: {defaults.DPO_BETA}, with SimPO {defaults.SIMPO_BETA}.",
    )
    gamma: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="SimPO: by how much the chosen answer shall be ahead, in the same unit as beta. "
        f"Absent: beta times {defaults.SIMPO_GAMMA_SHARE}.",
    )
    label_smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=0.5,
        description="Share of the rows whose answers are believed to be the wrong way round. "
        f"Absent: {defaults.DPO_LABEL_SMOOTHING:g}.",
    )
    nll_weight: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Adds so many times the mean negative log-likelihood of the chosen answer's tokens, which keeps it "
        f"from becoming unlikely itself; 0.1 to 1 is usual. Absent: {defaults.DPO_NLL_WEIGHT:g}.",
    )


class OrpoSpec(ApiModel):
    """Options of odds ratio preference optimisation."""

    lambda_: float | None = Field(
        default=None,
        ge=0,
        le=100,
        alias="lambda",
        description="Weight of the odds ratio beside the likelihood of the chosen answer. "
        f"Absent: {defaults.ORPO_LAMBDA}.",
    )


MAX_ANSWER_WEIGHT = 10_000


class KtoSpec(ApiModel):
    """Options of Kahneman-Tversky optimisation."""

    beta: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="How much a deviation from the base model must be worth: lower lets the model move further away. "
        f"Absent: {defaults.KTO_BETA}.",
    )
    desirable_weight: float | None = Field(
        default=None,
        gt=0,
        le=MAX_ANSWER_WEIGHT,
        description="What the losses of good answers are multiplied with. Absent: so that good and bad answers count "
        "alike, however many there are of each.",
    )
    undesirable_weight: float | None = Field(
        default=None,
        gt=0,
        le=MAX_ANSWER_WEIGHT,
        description="What the losses of bad answers are multiplied with. Absent: so that good and bad answers count "
        "alike, however many there are of each.",
    )


class MethodSpec(ApiModel):
    """The training method."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("!has(self.sft) || self.type == 'SFT'", "method.sft belongs to type: SFT; remove it or write type: SFT"),
            ("!has(self.dpo) || self.type == 'DPO'", "method.dpo belongs to type: DPO; remove it or write type: DPO"),
            (
                "!has(self.orpo) || self.type == 'ORPO'",
                "method.orpo belongs to type: ORPO; remove it or write type: ORPO",
            ),
            ("!has(self.kto) || self.type == 'KTO'", "method.kto belongs to type: KTO; remove it or write type: KTO"),
        )
    )
    type: MethodType = Field(
        description="CPT continues pre-training on plain text (field `text`). SFT learns answers from conversations "
        "(`messages`) or `prompt` and `completion`. DPO learns from pairs of answers, of which one was preferred "
        "(`chosen`, `rejected`), or of which a prompt has a good and a bad one (`label`). ORPO learns the chosen "
        "answers of such pairs as SFT does and which are preferred at once, from a model that was not tuned before. "
        "KTO learns from single answers that are each good or bad (`label`)."
    )
    sft: SftSpec | None = Field(default=None, description="Options of SFT; only with type: SFT.")
    dpo: DpoSpec | None = Field(default=None, description="Options of DPO; only with type: DPO.")
    orpo: OrpoSpec | None = Field(default=None, description="Options of ORPO; only with type: ORPO.")
    kto: KtoSpec | None = Field(default=None, description="Options of KTO; only with type: KTO.")


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(str(number) for number in numbers[:-1])} and {numbers[-1]}"


class PeftSpec(ApiModel):
    """The adapter that is trained."""

    type: Literal["LoRA"] = Field(description="LoRA trains low-rank matrices beside every linear layer.")
    rank: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description=f"Rank of the LoRA matrices. Absent: the smallest of {_listed(defaults.LORA_RANKS)} (CPT: of "
        f"{_listed(defaults.CPT_LORA_RANKS)}) with at least as many weights as there are tokens to learn, or the "
        "largest. vLLM serves 8, 16, 32, 64, 128 and 256, up to its --max-lora-rank.",
    )
    alpha: int | None = Field(
        default=None, ge=1, le=1024, description=f"LoRA scale is alpha / rank. Absent: {defaults.LORA_ALPHA}."
    )


class DatasetFormat(StrEnum):
    """What rows look like; docs/data.md shows each."""

    MESSAGES = "Messages"
    SHARE_GPT = "ShareGPT"
    ALPACA = "Alpaca"
    DOLLY = "Dolly"
    QUESTION_ANSWER = "QuestionAnswer"
    PROMPT_COMPLETION = "PromptCompletion"
    TEXT = "Text"
    PAIR = "Pair"
    THUMB = "Thumb"
    RANKING = "Ranking"


FieldName = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class ColumnsSpec(ApiModel):
    """What the files call a field that is known here under another name."""

    messages: FieldName | None = Field(
        default=None, description="The conversation, a list of messages. Absent: messages."
    )
    role: FieldName | None = Field(default=None, description="Of a message: who says it. Absent: role.")
    content: FieldName | None = Field(default=None, description="Of a message: what is said. Absent: content.")
    system: FieldName | None = Field(default=None, description="The system prompt of a conversation. Absent: system.")
    tools: FieldName | None = Field(default=None, description="The functions that the model may call. Absent: tools.")
    instruction: FieldName | None = Field(
        default=None, description="What is asked for (Alpaca, Dolly). Absent: instruction."
    )
    input: FieldName | None = Field(default=None, description="What an instruction is about (Alpaca). Absent: input.")
    output: FieldName | None = Field(default=None, description="The answer to an instruction (Alpaca). Absent: output.")
    context: FieldName | None = Field(
        default=None, description="What an instruction is about (Dolly). Absent: context."
    )
    response: FieldName | None = Field(
        default=None, description="The answer to an instruction (Dolly). Absent: response."
    )
    question: FieldName | None = Field(default=None, description="A question (QuestionAnswer). Absent: question.")
    answer: FieldName | None = Field(default=None, description="Its answer (QuestionAnswer). Absent: answer.")
    prompt: FieldName | None = Field(
        default=None, description="A text to go on with (PromptCompletion). Absent: prompt."
    )
    completion: FieldName | None = Field(
        default=None, description="How it goes on (PromptCompletion). Absent: completion."
    )
    text: FieldName | None = Field(default=None, description="A document (Text). Absent: text.")
    chosen: FieldName | None = Field(default=None, description="The preferred answer (Pair). Absent: chosen.")
    rejected: FieldName | None = Field(default=None, description="The other answer (Pair). Absent: rejected.")
    responses: FieldName | None = Field(
        default=None, description="Several answers to one prompt (Ranking). Absent: responses."
    )
    scores: FieldName | None = Field(
        default=None, description="Their scores, of which the highest is the best (Ranking). Absent: scores."
    )
    rating: FieldName | None = Field(
        default=None, description="How good an answer is, as a number (Thumb). Absent: rating."
    )
    label: FieldName | None = Field(
        default=None, description="Whether an answer is good or bad (Thumb). Absent: label."
    )
    weight: FieldName | None = Field(
        default=None,
        description="What the losses of a row's tokens are multiplied with: 0 leaves it out, 2 counts it twice. "
        "Absent: weight.",
    )


class Pairing(StrEnum):
    """Which answers of a ranking make pairs."""

    BEST_VS_WORST = "BestVsWorst"
    ALL = "All"


class PreferenceSpec(ApiModel):
    """How scores and ratings say which answers are preferred."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.maxPairsPerPrompt) || (has(self.pairs) && self.pairs == 'All')",
                "maxPairsPerPrompt needs more pairs than one; write pairs: All beside it, or leave it out",
            ),
        )
    )
    pairs: Pairing | None = Field(
        default=None,
        description="Which answers of a Ranking make pairs: BestVsWorst, or All, those of the largest margin first. "
        f"Answers that are scored alike make none. Absent: {defaults.PAIRING}.",
    )
    min_margin: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="By how much the chosen answer of a Ranking is to be scored better, or ranked. "
        "Absent: by anything.",
    )
    max_pairs_per_prompt: int | None = Field(
        default=None,
        ge=1,
        le=16,
        description=f"How many pairs a row of a Ranking makes at most. Absent: {defaults.MAX_PAIRS_PER_PROMPT}.",
    )
    good_from: float | None = Field(
        default=None,
        ge=-1e6,
        le=1e6,
        description="From which `rating` (or `score`) on an answer is good, where rows of Thumb have no `label`. "
        "Absent: such rows are broken.",
    )


class DatasetSpec(OriginSpec):
    """A set of files with rows."""

    name: DnsName | None = Field(
        default=None, description="A name for people, different for each dataset. Absent: none."
    )
    uri: FilesUri = Field(
        description="A file, a folder ending in /, or a pattern with *, ? and ** (any folders). Read are "
        f"{listed_endings()}, in any case; JSON as rows line by line, one list, or one behind another; CSV with a "
        "header; and for CPT, where no such file is among them, documents, each a row: "
        f"{listed_documents()}. Hidden and temporary files and others are passed over and reported. "
        "Example: s3://data/chat/*.jsonl"
    )
    format: DatasetFormat | None = Field(
        default=None,
        description="Messages (`messages`), ShareGPT (`conversations`), Alpaca (`instruction`, `input`, `output`), "
        "Dolly (`instruction`, `context`, `response`), QuestionAnswer (`question`, `answer`), PromptCompletion "
        "(`prompt`, `completion`: plain text), Text (`text`), Pair (`chosen`, `rejected`), Thumb (an answer "
        "and its `label`) or Ranking (`responses`, `scores`). Absent: told from the first thousand rows, and every "
        "row is checked.",
    )
    columns: ColumnsSpec | None = Field(
        default=None,
        description="What the files call a field that is known here under another name. Example: {messages: dialog} "
        "reads the conversation from `dialog`. Absent: the names of the format.",
    )
    preference: PreferenceSpec | None = Field(
        default=None,
        description="How scores and ratings say which answers are preferred. Absent: as the fields in it say.",
    )
    ignore_fields: list[FieldName] | None = Field(
        default=None,
        max_length=20,
        description="Fields of rows, and of their messages, that may be passed over; the report counts them. Absent: "
        "none, so that a field that is not known ends the job, but for names such as id and source, which say nothing "
        "to learn.",
    )
    weight: float | None = Field(
        default=None,
        ge=0.01,
        le=100,
        description="How often each of its rows is read in one epoch: 2 reads all of them twice, 0.5 another half of "
        "them in every epoch. The plan tells the share that each dataset really has. "
        f"Absent: {defaults.DATASET_WEIGHT}.",
    )


class OnBadRow(StrEnum):
    FAIL = "Fail"
    QUARANTINE = "Quarantine"


class SystemMessages(StrEnum):
    KEEP = "Keep"
    IN_USER = "InUser"


class SameRoleMessages(StrEnum):
    KEEP = "Keep"
    JOIN = "Join"


class Vanishing(StrEnum):
    """What a chat template may leave out of a row where that is accepted."""

    SYSTEM = "System"
    REASONING = "Reasoning"
    TOOLS = "Tools"
    TOOL_CALLS = "ToolCalls"
    TOOL_RESULTS = "ToolResults"
    NAME = "Name"


class TooLong(StrEnum):
    DROP = "Drop"
    TRUNCATE = "Truncate"
    SPLIT = "Split"
    FAIL = "Fail"


class PreprocessingSpec(ApiModel):
    """How rows become tokens."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.maxBrokenFraction) || (has(self.onBadRow) && self.onBadRow == 'Quarantine')",
                "maxBrokenFraction needs onBadRow: Quarantine; write onBadRow: Quarantine beside it",
            ),
            (
                "!has(self.maxTooLongFraction) || !has(self.tooLong) || self.tooLong in ['Drop', 'Truncate']",
                "with tooLong: Split or Fail no row is dropped; leave maxTooLongFraction out",
            ),
        )
    )
    chat_template: Literal["plain"] | None = Field(
        default=None,
        description="plain renders conversations with the built-in plain template, for base models that have none. "
        "Absent: the model's own chat template.",
    )
    accept_vanishing: list[Vanishing] | None = Field(
        default=None,
        max_length=6,
        description="What the chat template may leave out of rows: System (prompts), Reasoning, Tools (definitions), "
        "ToolCalls, ToolResults, Name (of who speaks). It is counted in the report. Absent: nothing; a row that would "
        "lose something is broken. Example: [Reasoning], to learn the answers of a reasoning dataset with a model that "
        "does not reason.",
    )
    add_end_token: bool | None = Field(
        default=None,
        description="Whether the model's own end token is added to answers that the chat template ends in no token at "
        "which the model stops. Absent: false; such answers are refused, since a server would never end them.",
    )
    max_unrolled_fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Where a chat template writes an answer differently once others follow (reasoning is kept in the "
        "last one alone), each answer is learned in a sequence of its own, after the conversation before it. The job "
        "fails when more than this share of all tokens is what is so repeated. "
        f"Absent: {defaults.MAX_UNROLLED_FRACTION}.",
    )
    max_sequence_length: int | None = Field(
        default=None,
        ge=16,
        le=131072,
        description="Longest sequence in tokens; tooLong says what becomes of longer rows. Absent: the longest row, "
        "at most what the model was made for and as far as the memory allows, and texts (CPT) in pieces of at most "
        f"{defaults.TEXT_SEQUENCE_LENGTH}.",
    )
    too_long: TooLong | None = Field(
        default=None,
        description="What becomes of rows above maxSequenceLength. Drop leaves them out. Truncate drops the oldest "
        "turns of a conversation, the beginning of a prompt, or the end of a text; an answer is never cut, where it "
        "does not fit its row is dropped. Split cuts texts (CPT) into pieces. Fail ends the job. Every such row is in "
        f"decisions.jsonl. Absent: {defaults.CPT_TOO_LONG} for CPT, {defaults.SFT_TOO_LONG} for SFT and others.",
    )
    max_too_long_fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="With Drop and Truncate: the job fails when a larger share of rows is dropped as too long. "
        f"Absent: {defaults.MAX_TOO_LONG_FRACTION}.",
    )
    documents: DocumentsSpec | None = Field(
        default=None,
        description="How the texts of documents (CPT) are put together and cut. Absent: as its fields say.",
    )
    packing: bool | None = Field(
        default=None,
        description="Whether several rows share one forward pass, each seeing only itself. Absent: true where the "
        "model passes the packed = unpacked test.",
    )
    system_messages: SystemMessages | None = Field(
        default=None,
        description="Keep hands system messages to the chat template. InUser begins the first user message with them, "
        f"for templates that have no place for them, such as Gemma's. Absent: {defaults.SYSTEM_MESSAGES}.",
    )
    same_role_messages: SameRoleMessages | None = Field(
        default=None,
        description="What to do with two messages of one role after another: Keep hands both to the chat template, "
        "Join makes one of them with an empty line between, for templates that want roles to alternate. "
        f"Absent: {defaults.SAME_ROLE_MESSAGES}.",
    )
    pii: PiiSpec | None = Field(
        default=None,
        description="What becomes of personal data and secrets in the texts of rows. Absent: they are counted by type "
        "in report.json, and learned.",
    )
    on_bad_row: OnBadRow | None = Field(
        default=None,
        description="What to do with a row that is not valid: Fail ends the job, naming the row; Quarantine drops "
        f"the row and keeps its place and reason in the report. Absent: {defaults.ON_BAD_ROW}.",
    )
    max_broken_fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="With Quarantine: the job fails when a larger share of rows is broken. "
        f"Absent: {defaults.MAX_BROKEN_FRACTION}.",
    )
    quality: QualitySpec | None = Field(
        default=None,
        description="What is done about damaged and poor texts. Absent: as its fields say of themselves.",
    )
    deduplication: DeduplicationSpec | None = Field(
        default=None,
        description="What becomes of rows that say the same as others. Absent: as the fields in it say.",
    )
    decontaminate_against: list[EvaluationSetSpec] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_EVALUATION_SETS,
        description="Evaluation sets that the model is to be measured by later: rows that share "
        f"{SHARED_WORDS} words in a row with one of them are dropped, so that it does not learn the answers. "
        "Absent: rows are compared with none.",
        json_schema_extra=rules(
            (
                "self.all(a, self.filter(b, b.name == a.name).size() <= 1)",
                "two evaluation sets have the same name; give each its own",
            ),
        ),
    )


class Schedule(StrEnum):
    LINEAR = "Linear"
    COSINE = "Cosine"
    CONSTANT = "Constant"


class HyperparametersSpec(ApiModel):
    """Numbers of the training loop."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("!(has(self.epochs) && has(self.maxSteps))", "write either epochs or maxSteps, not both"),
        )
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Passes over the data. Absent: by the number of rows, "
        f"{defaults.MIN_EPOCHS} to {defaults.MAX_EPOCHS}; 1 for CPT, {defaults.PREFERENCE_EPOCHS:g} for DPO, "
        "ORPO and KTO.",
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Number of optimizer steps, instead of epochs. Absent: as many as the epochs have.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Peak learning rate of AdamW, a number such as 2e-4. Absent: by the model's family and width: "
        f"{defaults.LEARNING_RATE:.0e} for Llama and Qwen up to a width of {defaults.LEARNING_RATE_WIDTH}, less for "
        f"wider ones, {defaults.OTHER_LEARNING_RATE:.0e} for other families; times {defaults.SHORT_RUN_FACTOR} for "
        f"fewer than {defaults.SHORT_RUN_STEPS} steps; {defaults.DPO_LEARNING_RATE:.0e} for DPO and KTO, "
        f"{defaults.ORPO_LEARNING_RATE:.0e} for ORPO.".replace("e-0", "e-"),
    )
    global_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description=f"Rows per optimizer step, over all GPUs. Absent: the most of "
        f"{_listed(defaults.BATCH_SIZES[::-1])} that leaves at least {defaults.WANTED_STEPS} steps, else the least "
        "of them.",
    )
    warmup_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description=f"Share of the steps over which the learning rate rises. Absent: {defaults.WARMUP_RATIO}.",
    )
    schedule: Schedule | None = Field(
        default=None,
        description="How the learning rate falls after warm-up. "
        f"Absent: {defaults.SFT_SCHEDULE} for SFT, {defaults.CPT_SCHEDULE} for CPT, "
        f"{defaults.PREFERENCE_SCHEDULE} for others.",
    )
    weight_decay: float | None = Field(
        default=None, ge=0, le=1, description=f"AdamW weight decay. Absent: {defaults.WEIGHT_DECAY:g}."
    )
    seed: int | None = Field(
        default=None, ge=0, le=2**31 - 1, description=f"Seed of order and weights. Absent: {defaults.SEED}."
    )


class EvaluationSpec(ApiModel):
    """What is measured on rows that are not trained on."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.groupBy) || !has(self.holdoutFraction) || self.holdoutFraction > 0.0",
                "with holdoutFraction: 0 no row is held out; leave groupBy out, or write a larger holdoutFraction",
            ),
        )
    )
    holdout_fraction: float | None = Field(
        default=None,
        ge=0,
        le=0.5,
        description="Share of rows held out, chosen by a hash of their content so that equal rows stay together. "
        "All of them are measured before the first and after the last step, between them a sample of at most "
        f"{defaults.MAX_HELD_OUT_ROWS}. Absent: {defaults.HOLDOUT_FRACTION}, at most {defaults.MAX_HELD_OUT_ROWS} "
        f"rows; none of fewer than {defaults.MIN_ROWS_TO_HOLD_OUT}.",
    )
    group_by: FieldName | None = Field(
        default=None,
        description="A field of the rows, such as user or document, with a text or a whole number: rows of one value "
        "are trained on or held out together, with their near copies, so that what is measured is not known by another "
        "row of the same value. A row without it is broken. Absent: rows are divided by their content alone.",
    )


# At most 999Ti, so that its bytes fit into the 64 bits of a Kubernetes quantity.
QUANTITY_PATTERN = "^([1-9][0-9]{0,7}Mi|[1-9][0-9]{0,5}Gi|[1-9][0-9]{0,2}Ti)$"
_CPU = "^([1-9][0-9]{0,3}|[1-9][0-9]{1,5}m)$"
Quantity = Annotated[
    str,
    StringConstraints(pattern=QUANTITY_PATTERN, max_length=16),
    matching(QUANTITY_PATTERN, "write a whole number of Mi, Gi or Ti up to 999Ti, such as 16Gi"),
]
Cores = Annotated[int, Field(ge=1, le=9999)]
Cpu = Annotated[str, StringConstraints(pattern=_CPU)]


class _PodResources(ApiModel):
    cpu: Cores | Cpu | None = Field(
        default=None,
        description='CPU cores, as 4 or "500m". Absent: the runtime\'s default.',
        json_schema_extra=rules(
            (
                f"type(self) == int ? self >= 1 && self <= 9999 : self.matches('{_CPU}')",
                'write whole cores such as 4, or thousandths such as "500m"',
            )
        ),
    )
    memory: Quantity | None = Field(default=None, description="Memory, such as 16Gi. Absent: the runtime's default.")


class PrepareResourcesSpec(_PodResources):
    """What the pod that prepares the data gets. Requests equal limits; it never gets a GPU."""

    disk: Quantity | None = Field(
        default=None,
        description="Local disk (ephemeral-storage), such as 20Gi: for the tokens of all rows, twice, 5 bytes each, "
        "and for each Parquet file while it is read. Absent: the runtime's default.",
    )


class ResourcesSpec(_PodResources):
    """What the training pod gets and, under prepare, the pod that prepares the data. Requests equal limits."""

    disk: Quantity | None = Field(
        default=None,
        description="Local disk (ephemeral-storage), such as 50Gi, for the model, the prepared data and checkpoints. "
        "What is needed is planned before training, and shown in status.plan.diskBytes; too little ends the job then. "
        "Absent: the runtime's default.",
    )
    gpus_per_node: int | None = Field(
        default=None, ge=0, le=1, description="0 trains on the CPU, 1 on one GPU. Absent: the runtime's default."
    )
    prepare: PrepareResourcesSpec | None = Field(
        default=None, description="What the pod that prepares the data gets. Absent: the runtime's defaults."
    )


class CheckpointSpec(ApiModel):
    """How often progress is made safe."""

    interval_seconds: int | None = Field(
        default=None,
        ge=1,
        le=86400,
        description=f"Seconds between checkpoints. Absent: {defaults.CHECKPOINT_INTERVAL_S}.",
    )
    keep_last: int | None = Field(
        default=None,
        ge=1,
        le=20,
        description=f"Checkpoints kept while training. Absent: {defaults.CHECKPOINTS_KEPT}.",
    )


class RecoverySpec(ApiModel):
    """How much may go wrong."""

    max_retries: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Attempts after retryable failures, over all stages; some reasons are tried again once only, see "
        f"docs/reasons.md. Absent: {defaults.MAX_RETRIES}.",
    )
    max_disruptions: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Evictions, preemptions and drains that do not count as retries. "
        f"Absent: {defaults.MAX_DISRUPTIONS}.",
    )
    progress_deadline_seconds: int | None = Field(
        default=None,
        ge=30,
        le=86400,
        description="A pod that gets no further for so long is restarted: in training not by one forward and backward "
        f"pass, in prepare not by one row or part of a file. Absent: {defaults.PROGRESS_DEADLINE_S}.",
    )


class CaBundleSpec(ApiModel):
    """Certificates of a private storage endpoint."""

    config_map_ref: LocalObjectRef = Field(description="ConfigMap with the PEM certificates under the key ca.crt.")


_ENDPOINT = "^https?://[^ /@?#]+$"  # no user:password@, as the endpoint stands in messages and events
_REGION = "^[a-z0-9-]+$"
Endpoint = Annotated[
    str,
    StringConstraints(pattern=_ENDPOINT, max_length=256),
    matching(
        _ENDPOINT,
        "write http:// or https:// with host and port and no path, such as https://minio.example:9000; "
        "passwords belong into the Secret of storage.secretRef",
    ),
]
Region = Annotated[
    str,
    StringConstraints(pattern=_REGION, max_length=64),
    matching(_REGION, "write a region such as eu-central-1"),
]


class StorageSpec(ApiModel):
    """How the pods reach object storage."""

    service_account_name: DnsSubdomain | None = Field(
        default=None, description="ServiceAccount of the pods, for cloud identities. Absent: the namespace's default."
    )
    secret_ref: LocalObjectRef | None = Field(
        default=None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if needed, AWS_SESSION_TOKEN. It is "
        "mounted as files in the pods; the operator never reads it. "
        "Absent: the cloud identity of the pods' ServiceAccount.",
    )
    endpoint: Endpoint | None = Field(
        default=None, description="URL of an S3-compatible server, such as https://minio.example:9000. Absent: AWS."
    )
    region: Region | None = Field(default=None, description=f"Region of the buckets. Absent: {defaults.REGION}.")
    path_style: bool | None = Field(
        default=None,
        description="Whether the bucket is in the path instead of the host name. Absent: true with an endpoint.",
    )
    ca_bundle: CaBundleSpec | None = Field(
        default=None, description="Certificates of a private endpoint. Absent: the usual authorities."
    )


class OutputSpec(ApiModel):
    """Where the adapter goes."""

    uri: OutputUri = Field(
        description="Parent folder. The job writes only below URI/NAME-UID5/, the adapter to URI/NAME-UID5/adapter/, "
        "and URI/latest.json, which names the newest. Example: s3://adapters/support-bot"
    )


class StartPolicy(StrEnum):
    AUTOMATIC = "Automatic"
    MANUAL = "Manual"
    PLAN_ONLY = "PlanOnly"


_OUTPUT_FOLDER = "(self.output.uri.endsWith('/') ? self.output.uri : self.output.uri + '/')"
_MODEL_FOLDER = "(self.model.uri.endsWith('/') ? self.model.uri : self.model.uri + '/')"
_IS_FILE = "!d.uri.matches('[*?]|/$')"
# The part of a pattern before its first wildcard: an output below it might be read as data by the next job.
_FIXED_PART = "d.uri.find('^[^*?]+')"


class FineTuneJobSpec(ApiModel):
    """What to train, from what, and where to put it. Immutable but for startPolicy, suspend and
    ttlSecondsAfterFinished."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.datasets.all(d, self.datasets.filter(e, has(d.name) && has(e.name) && e.name == d.name)"
                ".size() <= 1)",
                "two datasets have the same name; give each its own",
            ),
            (
                f"!self.datasets.exists(d, {_OUTPUT_FOLDER}.startsWith({_IS_FILE} ? d.uri + '/' : {_FIXED_PART}))",
                "output.uri lies inside a dataset, so that the next job would read it as data; "
                "write a folder that no dataset's uri covers",
            ),
            (
                "!has(self.preprocessing) || !has(self.preprocessing.decontaminateAgainst)"
                " || !self.preprocessing.decontaminateAgainst.exists(e, self.datasets.exists(d, d.uri == e.uri))",
                "preprocessing.decontaminateAgainst names a dataset's own uri, so that all its rows would be dropped; "
                "remove it there, or from datasets",
            ),
            (
                f"!self.datasets.exists(d, d.uri.startsWith({_OUTPUT_FOLDER}))",
                "a dataset lies inside output.uri; write another output.uri, or move the data out of it",
            ),
            (
                "self.method.type == 'CPT' || !has(self.preprocessing) || !has(self.preprocessing.tooLong)"
                " || self.preprocessing.tooLong != 'Split'",
                "tooLong: Split is for texts (CPT); for other methods write Drop, Truncate or Fail",
            ),
            (
                f"!{_OUTPUT_FOLDER}.startsWith({_MODEL_FOLDER}) && !{_MODEL_FOLDER}.startsWith({_OUTPUT_FOLDER})",
                "output.uri and model.uri lie in one another; write an output.uri beside the model's folder",
            ),
            (
                "!(self.method.type in ['CPT', 'SFT']) || !self.datasets.exists(d, has(d.preference))",
                "datasets[].preference says which answers are preferred, which CPT and SFT do not learn; remove it, or "
                "write another method",
            ),
            (
                "self.method.type != 'KTO' || !self.datasets.exists(d, has(d.preference) && (has(d.preference.pairs) "
                "|| has(d.preference.minMargin)))",
                "KTO learns no pairs; of datasets[].preference write goodFrom alone, or another method",
            ),
            (
                "!has(self.replay) || self.method.type in ['CPT', 'SFT']",
                "replay is for CPT and SFT; with other methods mix datasets by datasets[].weight",
            ),
            (
                "!has(self.replay) || self.replay.datasets.all(n, self.datasets.exists(d, has(d.name) && d.name == n))",
                "replay.datasets names a dataset that this job does not have; write one of datasets[].name",
            ),
            (
                "!has(self.replay) || self.datasets.exists(d, !has(d.name) || !(d.name in self.replay.datasets))",
                "replay.datasets names all datasets, so that nothing is new; leave out those that are to be learned",
            ),
            (
                "!has(self.model.adapterFrom) || (has(self.model.adapterFrom.mode) && self.model.adapterFrom.mode == "
                "'Stack') || !has(self.peft) || (!has(self.peft.rank) && !has(self.peft.alpha))",
                "the adapter of model.adapterFrom keeps its rank and alpha; remove peft.rank and peft.alpha, or write "
                "mode: Stack to train a new one beside it",
            ),
        )
    )
    start_policy: StartPolicy | None = Field(
        default=None,
        description="What follows the plan, which is made on a CPU before any GPU is claimed. Automatic trains. Manual "
        "waits at status.plan until this is patched to Automatic; once training has begun it changes nothing, and "
        "the wait does not count against activeDeadlineSeconds. PlanOnly ends the job there, as Planned and Finished: "
        f"a dry run with the plan and the data report. Absent: {defaults.START_POLICY}.",
    )
    suspend: bool | None = Field(
        default=None,
        description="true checkpoints and frees the pod; false continues at the checkpoint. May change at any time. "
        "Absent: false.",
    )
    runtime: DnsName | None = Field(
        default=None,
        description=f"Name of a runtime that the platform team set up by Helm. Absent: {defaults.RUNTIME}.",
    )
    model: ModelSpec = Field(description="The base model.")
    method: MethodSpec = Field(description="The training method.")
    peft: PeftSpec | None = Field(default=None, description="The adapter. Absent: LoRA.")
    datasets: list[DatasetSpec] = Field(min_length=1, max_length=20, description="Where the rows are.")
    replay: ReplaySpec | None = Field(
        default=None,
        description="Mixes in rows like those that the model has seen before, so that it does not forget them. "
        "Absent: nothing is replayed.",
    )
    preprocessing: PreprocessingSpec | None = Field(default=None, description="How rows become tokens.")
    hyperparameters: HyperparametersSpec | None = Field(default=None, description="Numbers of the training loop.")
    evaluation: EvaluationSpec | None = Field(default=None, description="What is measured on held-out rows.")
    resources: ResourcesSpec | None = Field(
        default=None, description="What the pods get. Absent: the runtime's defaults."
    )
    checkpoint: CheckpointSpec | None = Field(default=None, description="How often progress is made safe.")
    recovery: RecoverySpec | None = Field(default=None, description="How much may go wrong.")
    storage: StorageSpec | None = Field(default=None, description="How the pods reach object storage.")
    output: OutputSpec = Field(description="Where the adapter goes.")
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=60,
        le=31_536_000,
        description="The job fails when it is not done so long after it was accepted, waiting and all attempts "
        "included. Time in which it is suspended, by suspend or by a queue such as Kueue, does not count. "
        "Absent: no limit.",
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=31_536_000,
        description="When a finished job's pods and Kubernetes Jobs are removed; the FineTuneJob stays. "
        f"Absent: {defaults.TTL_S}.",
    )
