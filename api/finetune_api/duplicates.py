"""What becomes of rows that say the same as others, or nearly so, and of those that evaluation sets have too:
`preprocessing.deduplication` and `preprocessing.decontaminateAgainst`."""

from enum import StrEnum

from pydantic import ConfigDict, Field

from finetune_api import defaults
from finetune_api.base import ApiModel
from finetune_api.cel import rules
from finetune_api.objects import DnsName
from finetune_api.uris import FilesUri

MAX_EVALUATION_SETS = 20


class Copies(StrEnum):
    """What becomes of copies."""

    DROP = "Drop"
    REPORT = "Report"
    OFF = "Off"


class DeduplicationSpec(ApiModel):
    """What becomes of rows that say the same as others, in any file of any dataset."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.near) || self.near != 'Drop' || !has(self.exact) || self.exact == 'Drop'",
                "near: Drop drops rows that say the same too; write exact: Drop, or near: Report",
            ),
            (
                "!has(self.similarity) || !has(self.near) || self.near != 'Off'",
                "with near: Off nothing is compared; leave similarity out",
            ),
        )
    )

    exact: Copies | None = Field(
        default=None,
        description="What becomes of rows that say the same as another one, but for Unicode form, line ends and blanks "
        "where lines and texts end. Drop keeps one, that which counts the most by its own weight and its dataset's, of "
        "several the first; write datasets[].weight to learn rows more often. Report counts them and keeps all. Off "
        f"does not look for them. Absent: {defaults.EXACT_COPIES}.",
    )
    near: Copies | None = Field(
        default=None,
        description="What becomes of rows that say nearly the same: whose words in runs of five (of short rows, two) "
        "have so much in common as similarity says, system prompts left out, in the whole row and in its answers by "
        "themselves. Drop keeps the longest of them. Report counts them and tells where the most are. Either way they "
        "are trained on or held out together. Off does not look for them. "
        f"Absent: {defaults.CPT_NEAR_COPIES} for CPT where exact is Drop, {defaults.NEAR_COPIES} for others.",
    )
    similarity: float | None = Field(
        default=None,
        ge=0.5,
        le=1,
        description="From which share of common runs of words on, of all that two rows have, they are near copies "
        f"(Jaccard similarity). Absent: {defaults.SIMILARITY}.",
    )


class EvaluationSetSpec(ApiModel):
    """Rows that are to be kept out of training."""

    name: DnsName = Field(description="What report and decisions call it. Example: gsm8k")
    uri: FilesUri = Field(
        description="A file, a folder ending in /, or a pattern, as in datasets[].uri, of rows of any shape, all texts "
        "of which are compared, or of documents. Example: s3://evaluation/gsm8k/*.parquet"
    )
