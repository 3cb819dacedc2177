"""Names of Kubernetes objects in a job, and references to those of its own namespace."""

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel
from finetune_api.cel import matching

_DNS_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DNS_NAME = f"^{_DNS_LABEL}$"
_DNS_SUBDOMAIN = rf"^{_DNS_LABEL}([.]{_DNS_LABEL})*$"
DnsName = Annotated[
    str,
    StringConstraints(pattern=_DNS_NAME, max_length=63),
    matching(_DNS_NAME, "write lower-case letters, digits and -, for example chat-2"),
]
DnsSubdomain = Annotated[
    str,
    StringConstraints(pattern=_DNS_SUBDOMAIN, max_length=253),
    matching(_DNS_SUBDOMAIN, "write the name of a Kubernetes object: lower-case letters, digits, - and ."),
]


class LocalObjectRef(ApiModel):
    """An object in the job's own namespace."""

    name: DnsSubdomain = Field(description="Name of an object in the same namespace.")
