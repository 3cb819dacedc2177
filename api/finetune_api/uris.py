"""URIs that a job names: of folders, of its output, of files to read."""

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import Uri
from finetune_api.cel import rules

# The CLI also takes file:///… and exchanges this one rule for it: what runs there needs no cluster and no bucket.
S3_URI_RULE = "self.matches('^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^/ ].*$')"

_FOLDER = Field(
    json_schema_extra=rules(
        (S3_URI_RULE, "write s3://BUCKET/FOLDER, for example s3://models/smollm2"),
        ("!self.matches('[*?]')", "write one folder; patterns with * and ? are for datasets"),
    )
)
FolderUri = Annotated[Uri, _FOLDER]
# The keys of a run, some 150 characters longer, must still be keys of S3 and fit into a Uri.
OutputUri = Annotated[str, StringConstraints(max_length=512), _FOLDER]
FilesUri = Annotated[
    Uri,
    Field(
        json_schema_extra=rules(
            (S3_URI_RULE, "write s3://BUCKET/PATH, for example s3://data/chat/*.jsonl"),
        )
    ),
]
