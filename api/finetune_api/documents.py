"""What a job says of the texts of documents: how they are put together, and how long ones are cut."""

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel
from finetune_api.cel import matching

_MAX_TEMPLATE = 2000  # characters
_AROUND = "([^{}]|[{](title|source)[}])*"
_TEMPLATE = f"^{_AROUND}[{{]text[}}]{_AROUND}$"


_Template = Annotated[
    str,
    StringConstraints(max_length=_MAX_TEMPLATE),
    matching(_TEMPLATE, "template must name {text} once, may name {title} and {source}, and has no other { or }"),
]


class DocumentsSpec(ApiModel):
    """How the texts of documents are put together and cut."""

    heading_context: bool | None = Field(
        default=None,
        description="Whether each piece of a text that is split begins with the headings above it (Markdown's #), "
        "which are shown to the model and not learned again. Absent: false.",
    )
    template: _Template | None = Field(
        default=None,
        description="What is learned of a document: {text}, and where wanted {title} (its own, else the name of its "
        "file) and {source} (its path below the folder of datasets[].uri). Absent: {text}.",
    )
