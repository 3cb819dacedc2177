"""How licence expressions are read."""

import pytest

from finetune_api.spdx import MAX_EXPRESSION_CHARS, NotAnExpressionError, is_allowed

ALLOWED = ("MIT", "Apache-2.0", "GPL-2.0-only WITH Classpath-exception-2.0")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("GPL-3.0-only or mit", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT AND Apache-2.0", True),
        ("GPL-3.0-only OR MIT AND Apache-2.0", True),  # AND binds more tightly
        ("MIT AND GPL-3.0-only OR BSD-2-Clause", False),
        ("MIT AND (GPL-3.0-only OR Apache-2.0)", True),
        ("(((MIT)))", True),
        ("Apache-2.0+", True),
        ("MIT WITH An-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", True),
        ("GPL-2.0-only WITH Another-exception", False),
        ("GPL-2.0-only", False),
        ("LicenseRef-Acme-1", False),
        ("DocumentRef-a:LicenseRef-b OR MIT", True),
    ],
)
def test_what_some_licences_allow(expression: str, expected: bool) -> None:
    assert is_allowed(expression, ALLOWED) is expected


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "Apache 2.0", "MIT OR", "OR MIT", "MIT AND OR MIT", "(MIT", "MIT)", "()", "MIT WITH", "MIT (MIT)",
        "WITH", "MIT, Apache-2.0", "$", "(" * 100 + "MIT" + ")" * 100, "M" * (MAX_EXPRESSION_CHARS + 1),
        "see the file", "MIT\x00",
    ],
)  # fmt: skip
def test_what_is_no_expression_is_said_to_be_none(text: str) -> None:
    with pytest.raises(NotAnExpressionError):
        is_allowed(text, ALLOWED)
