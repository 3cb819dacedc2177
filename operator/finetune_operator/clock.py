"""Times as the API writes them."""

from datetime import UTC, datetime


def utcnow() -> datetime:
    """Now, in whole seconds, as the API server keeps times."""
    return datetime.now(UTC).replace(microsecond=0)


def parse_time(text: object) -> datetime | None:
    """The time of an RFC 3339 text with zone; None for anything else, and for years that no sum may leave."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.astimezone(UTC) if moment.tzinfo is not None and 1970 <= moment.year < 9000 else None


def format_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
