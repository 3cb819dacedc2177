"""Where the rows of a dataset come from and who may use them: what a job says of it, and which rows it takes by it."""

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints

from finetune_api.base import ApiModel
from finetune_api.cel import matching, rules
from finetune_api.spdx import EXPRESSION, MAX_EXPRESSION_CHARS

MAX_LICENSES = 20  # that rows are chosen by

LicenseExpression = Annotated[
    str,
    StringConstraints(pattern=EXPRESSION, max_length=MAX_EXPRESSION_CHARS),
    matching(
        EXPRESSION,
        "write a licence as SPDX does, such as Apache-2.0, MIT OR Apache-2.0, or LicenseRef-NAME for one of your own",
    ),
]
Line = Annotated[
    str,
    StringConstraints(min_length=1, max_length=256),
    matching("[^ ]", "write what is known, or leave the field out"),
]
RowLicense = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class Confidentiality(StrEnum):
    """How far data may be passed on: to everybody first, to the fewest last."""

    PUBLIC = "Public"
    INTERNAL = "Internal"
    CONFIDENTIAL = "Confidential"
    RESTRICTED = "Restricted"

    @property
    def rank(self) -> int:
        """Return how confidential that is: the higher, the fewer may see it."""
        return list(Confidentiality).index(self)


class OriginSpec(ApiModel):
    """What is said of a dataset beside its rows. It lands in plan, report, manifest and card."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.licenses) || has(self.licenseField)",
                "licenses chooses rows by a field of theirs; name it in licenseField beside it, or write license for "
                "the whole dataset",
            ),
        )
    )
    license: LicenseExpression | None = Field(
        default=None,
        description="The licence of the whole dataset, as SPDX writes it; for one of your own LicenseRef-NAME. Prepare "
        "refuses names that SPDX does not have. A runtime's policy may allow some licences only. Absent: not said. "
        "Example: CC-BY-4.0",
    )
    license_field: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        default=None,
        description="The field of a row that holds the row's own licence, a text or a list of texts that all apply. "
        "The report counts rows by it. Absent: rows have none.",
    )
    licenses: list[RowLicense] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_LICENSES,
        description="Rows are taken whose licenseField these licences allow, in any case; others, and rows that say "
        "none, are dropped, each with a decision. Absent: rows of any licence. Example: [MIT, Apache-2.0]",
    )
    source: Line | None = Field(
        default=None,
        description="Where the rows come from, in words or as a URL, for whoever asks later. Absent: not said.",
    )
    confidentiality: Confidentiality | None = Field(
        default=None,
        description="How far the rows, and what was learned from them, may be passed on: "
        f"{' < '.join(Confidentiality)}. A runtime's policy may say where the adapter may then be written. "
        "Absent: not said.",
    )
    copyright_holder: Line | None = Field(default=None, description="Who owns the rows. Absent: not said.")
