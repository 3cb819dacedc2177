"""Credentials are taken out of texts, in every form in which a library may quote them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import MAX_CHARS, without_secrets

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
FORMS = [
    "AWS_SECRET_ACCESS_KEY={}",
    "export aws_secret_access_key = {}",
    "AWS_SESSION_TOKEN={} and more",
    '{{"SecretAccessKey": "{}"}}',
    '{{"SecretAccessKey":"{}","Expiration":"2026"}}',
    "{{'SessionToken': '{}'}}",
    '{{"Token": "{}"}}',
    "<SecretAccessKey>{}</SecretAccessKey>",
    "<SessionToken>{}</SessionToken>",
    "X-Amz-Security-Token: {}",
    "b'X-Amz-Security-Token': b'{}'",
    "('X-Amz-Security-Token', '{}')",
    "GET https://b.s3.amazonaws.com/k?X-Amz-Signature={}&X-Amz-Date=1",
    "GET https://b.s3.amazonaws.com/k?X-Amz-Security-Token={}",
    "GET https://b.s3.amazonaws.com/k?X-Amz-Credential={}",
    "GET https://b.s3.amazonaws.com/k?AWSAccessKeyId={}&Expires=1",
    "GET https://b.s3.amazonaws.com/k?Expires=1&Signature={}",
    "https://storage.googleapis.com/b/k?X-Goog-Signature={}",
    "https://a.blob.core.windows.net/b?sig={}",
    "Authorization: AWS4-HMAC-SHA256 Credential=a/b, Signature={}",
    "{{'Authorization': 'Basic {}'}}",
    "Proxy-Authorization: Basic {}",
    "sent Bearer {}",
    "HF_TOKEN={}",
    "password={}",
]


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_is_hidden_in_every_form(form: str) -> None:
    shown = without_secrets(form.format(SECRET))
    assert not any(SECRET[at : at + 6] in shown for at in range(len(SECRET) - 6))
    assert "***" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:password@minio:9000/b", "http://***@minio:9000/b"),
        ("proxy https://token@proxy:3128 failed", "proxy https://***@proxy:3128 failed"),
        ("at http://us:p@ss@host", "at http://***@host"),
        (f"at http://me:{SECRET}@minio:9000/b", "at http://***@minio:9000/b"),
        ("key AKIAIOSFODNN7EXAMPLE used", "key *** used"),
        ("key ASIAIOSFODNN7EXAMPLE used", "key *** used"),
        ("hf_" + "abcDEF123" * 4, "***"),
        ("a eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl b", "a *** b"),
        ("<a>hf_" + "x" * 34 + "</a>", "<a>***</a>"),
    ],
)
def test_credentials_are_told_by_their_looks(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "could not read s3://bucket/chat/part-0001.jsonl after 3 tries: no connection to http://minio:9000",
        "file:///home/me/mail@home/rows.jsonl row 7: the field password_hint is missing",
        "751 tokens: 803 rows; token: 5; bearer of news",
        "see https://docs.example/a?b=c@d and http://minio:9000/bucket/mail@home",
        "hf_model and AKIA and eyJ",
        "the tokenizer's eos_token is <|im_end|>",
    ],
)
def test_plain_words_stay(text: str) -> None:
    assert without_secrets(text) == text


@settings(max_examples=20)
@given(st.text(max_size=50), st.integers(MAX_CHARS - 200, MAX_CHARS + 200))
def test_no_place_of_a_secret_lets_half_of_it_through(before: str, at: int) -> None:
    text = (before + " " * MAX_CHARS)[:at] + " AKIAIOSFODNN7EXAMPLE AWS_SECRET_ACCESS_KEY=" + SECRET
    shown = without_secrets(text)
    assert "AKIAIO" not in shown
    assert SECRET[:6] not in shown


@pytest.mark.parametrize(
    "word", ["://", "://a:", "eyJ", "hf_", "AKIA", "secretaccesskey", "authorization", "a ", "bearer "]
)
@pytest.mark.timeout(300)
def test_no_text_takes_long(word: str) -> None:
    """It takes milliseconds; patterns that try again from each place take minutes, and pytest ends the test then."""
    without_secrets(word * (MAX_CHARS // len(word)))
    without_secrets(word * MAX_CHARS)


def test_a_fault_holds_no_secret_whoever_raises_it() -> None:
    error = StageError(
        Fault.CONFIG_UNREADABLE, field="model.uri", problem=f"https://me:{SECRET}@hub.example/x is no URI"
    )
    assert "me:" not in str(error)
    assert error.args_by_name["problem"] == "https://***@hub.example/x is no URI"
