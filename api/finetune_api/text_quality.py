"""What is done about the quality of texts: repair of damaged characters."""

from pydantic import Field

from finetune_api.base import ApiModel


class QualitySpec(ApiModel):
    """What is done about the quality of texts before they are rendered."""

    repair: bool | None = Field(
        default=None,
        description="Whether damaged characters are put right: what a wrong encoding made of others, control "
        "characters, line ends, Unicode in several parts. Code is left as it is but for its line ends, and what "
        "functions are called with is not touched. Every changed row is in decisions.jsonl. Absent: true.",
    )
