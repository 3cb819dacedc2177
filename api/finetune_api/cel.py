"""Rules in CEL, which the API server and the CLI evaluate, as extras of a field's or a model's JSON schema."""

from typing import Any

from pydantic import Field


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """JSON-schema extra with CEL rules, each with the message that tells what to write."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


def matching(pattern: str, message: str) -> Any:
    """Field whose text matches `pattern`, refused with words instead of the pattern."""
    return Field(json_schema_extra=rules((f"self.matches('{pattern}')", message)))
