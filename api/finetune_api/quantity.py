"""Kubernetes quantities as plain numbers."""

_UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity_bytes(quantity: str) -> int:
    """Bytes of a quantity such as `512Mi` or `16Gi`.

    Raises ValueError for other units."""
    number, unit = quantity[:-2], quantity[-2:]
    if unit not in _UNITS or not number.isdigit():
        raise ValueError(f"{quantity!r} is not a whole number of Mi, Gi or Ti")
    return int(number) * _UNITS[unit]


def cpu_count(quantity: int | str) -> float:
    """Cores of a quantity such as 2, `4` or `500m`."""
    text = str(quantity)
    return int(text[:-1]) / 1000 if text.endswith("m") else float(text)
