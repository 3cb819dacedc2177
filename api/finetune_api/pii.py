"""Personal data and secrets in rows: the types that are looked for, and what a job does about them."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints

from finetune_api import defaults
from finetune_api.base import ApiModel
from finetune_api.cel import matching, rules
from finetune_api.names import PII_SECRET_KEY
from finetune_api.objects import LocalObjectRef


class PiiType(StrEnum):
    """What is told by its form and its check digits. Where two are equally long in a text, the first one counts."""

    PRIVATE_KEY = "PRIVATE_KEY"
    URL_CREDENTIALS = "URL_CREDENTIALS"
    API_KEY = "API_KEY"
    EMAIL = "EMAIL"
    IBAN = "IBAN"
    CARD = "CARD"
    MAC_ADDRESS = "MAC_ADDRESS"
    IP_ADDRESS = "IP_ADDRESS"
    COORDINATES = "COORDINATES"
    DATE_OF_BIRTH = "DATE_OF_BIRTH"
    NATIONAL_ID = "NATIONAL_ID"
    PHONE = "PHONE"


PII_WORDS: Mapping[PiiType, str] = {
    PiiType.PRIVATE_KEY: "private keys in PEM: RSA, EC, OpenSSH, PGP and others",
    PiiType.URL_CREDENTIALS: "URLs with a user and a password, up to the end of the host",
    PiiType.API_KEY: "keys and tokens that begin as those of AWS, GitHub, GitLab, Slack, Stripe, OpenAI, Anthropic, "
    "Google, Hugging Face and others do, JSON web tokens, and random words behind a word such as api_key or password",
    PiiType.EMAIL: "e-mail addresses",
    PiiType.IBAN: "bank accounts (IBAN), by the form of their country and their check digits",
    PiiType.CARD: "payment cards, by issuer, length and check digit",
    PiiType.MAC_ADDRESS: "hardware addresses of network cards",
    PiiType.IP_ADDRESS: "public addresses of IPv4 and IPv6; private addresses and those for documentation are nobody's",
    PiiType.COORDINATES: "places on earth in degrees, with minutes, or with decimals where a word or sign says so",
    PiiType.DATE_OF_BIRTH: "dates behind a word such as born or date of birth, in ten languages",
    PiiType.NATIONAL_ID: "numbers that a state gives to its people, by form and check digit",
    PiiType.PHONE: "telephone numbers with the code of any country, or as they are dialled within one of the regions",
}
# Whose numbers are told unless a job names others: those countries whose national numbers are known.
PII_REGIONS = (
    *("AU", "BE", "BR", "CA", "CH", "CZ", "DE", "DK", "ES", "FI", "FR", "GB", "IE"),
    *("IN", "IT", "KR", "MX", "NL", "NO", "PL", "PT", "RO", "SE", "TR", "US", "ZA"),
)
MAX_PII_REGIONS = 20


class PiiAction(StrEnum):
    """What becomes of a value that is found, or of its row."""

    REPORT = "Report"
    REDACT = "Redact"
    PSEUDONYMISE = "Pseudonymise"
    DROP = "Drop"


_Region = Annotated[
    str,
    StringConstraints(pattern="^[A-Z]{2}$", min_length=2, max_length=2),
    matching("^[A-Z]{2}$", "write countries by two capital letters, as DE or US"),
]


def _of(type_: PiiType) -> Any:
    described = f"What becomes of {PII_WORDS[type_]}. Absent: action."
    return Field(default=None, alias=type_.value, description=described)


class PiiTypesSpec(ApiModel):
    """What becomes of values of single types."""

    private_key: PiiAction | None = _of(PiiType.PRIVATE_KEY)
    url_credentials: PiiAction | None = _of(PiiType.URL_CREDENTIALS)
    api_key: PiiAction | None = _of(PiiType.API_KEY)
    email: PiiAction | None = _of(PiiType.EMAIL)
    iban: PiiAction | None = _of(PiiType.IBAN)
    card: PiiAction | None = _of(PiiType.CARD)
    mac_address: PiiAction | None = _of(PiiType.MAC_ADDRESS)
    ip_address: PiiAction | None = _of(PiiType.IP_ADDRESS)
    coordinates: PiiAction | None = _of(PiiType.COORDINATES)
    date_of_birth: PiiAction | None = _of(PiiType.DATE_OF_BIRTH)
    national_id: PiiAction | None = _of(PiiType.NATIONAL_ID)
    phone: PiiAction | None = _of(PiiType.PHONE)


_TYPES_PSEUDONYMISED = " || ".join(
    f"(has(self.types.{each}) && self.types.{each} == 'Pseudonymise')" for each in PiiType
)
_PSEUDONYMISED = f"(has(self.action) && self.action == 'Pseudonymise') || (has(self.types) && ({_TYPES_PSEUDONYMISED}))"


class PiiSpec(ApiModel):
    """What becomes of personal data and secrets in the texts of rows. Names and addresses of people are not told."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                f"has(self.keySecretRef) || !({_PSEUDONYMISED})",
                "Pseudonymise needs preprocessing.pii.keySecretRef: the name of a Secret with a key of 32 random bytes "
                f"or more under {PII_SECRET_KEY}",
            ),
            (
                f"!has(self.keySecretRef) || {_PSEUDONYMISED}",
                "keySecretRef is for Pseudonymise alone; leave it out, or write action: Pseudonymise",
            ),
        )
    )
    action: PiiAction | None = Field(
        default=None,
        description="Report counts values by type and changes nothing. Redact writes the type in the place of each, "
        "such as <EMAIL>. Pseudonymise writes the type and a keyed hash, so that the same value has the same name "
        "everywhere, such as <EMAIL_0a1b2c3d4e5f6a7b>. Drop leaves out rows that hold any. Values are counted in "
        f"report.json and never written to it. Absent: {defaults.PII_ACTION}.",
    )
    types: PiiTypesSpec | None = Field(
        default=None,
        description="What becomes of single types, in the place of action. Example: {API_KEY: Drop}. "
        "Absent: action for all.",
    )
    regions: list[_Region] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_PII_REGIONS,
        description="Countries whose national numbers are told, and whose telephone numbers are without a country "
        "code. Fewer make fewer mistakes. Example: [DE, US]. Absent: those of docs/data.md.",
    )
    key_secret_ref: LocalObjectRef | None = Field(
        default=None,
        description=f"Secret with the key of the pseudonyms under {PII_SECRET_KEY}: at least 32 random bytes, such as "
        "`openssl rand -hex 32` writes. It is mounted into the prepare pod alone; the operator never reads it. "
        "For finetune run, FINETUNE_PII_KEY_FILE names a file with it. Absent: no pseudonyms. Example: {name: pii-key}",
    )
