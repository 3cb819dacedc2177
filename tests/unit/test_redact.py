"""Credentials are taken out of texts, in every form in which a library may quote them."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import MAX_CHARS, shortened, without_secrets
from finetune_operator.conditions import one_line
from finetune_operator.pod_waits import explain
from finetune_trainer.data.problems import place

ROOT = Path(__file__).parents[2]

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
    # Within other texts, once or more often.
    r"{{\"SecretAccessKey\": \"{}\"}}",
    r"{{\\\"SecretAccessKey\\\": \\\"{}\\\"}}",
    r"'{{\'AWS_SECRET_ACCESS_KEY\': \'{}\'}}'",
    "&lt;SecretAccessKey&gt;{}&lt;/SecretAccessKey&gt;",
    "&quot;SecretAccessKey&quot;: &quot;{}&quot;",
    '<SecretAccessKey xsi:type="string">{}</SecretAccessKey>',
    # In a URL.
    "X-Amz-Security-Token%3D{}",
    "aws_secret_access_key%3A%20{}",
    "Authorization%3A%20Basic%20{}",
    "sent Bearer%20{}",
    # With what ends a word elsewhere.
    'password="a b {} c"',
    '{{"password": "a&{}"}}',
    "{{'password': 'a,;)]}}{}'}}",
    r'password="a\"b{}"',
    "password=&,;{}",
    # As Kubernetes, Go and others show an environment.
    '{{"name":"AWS_SECRET_ACCESS_KEY","value":"{}"}}',
    "- name: AWS_SECRET_ACCESS_KEY\n  value: {}",
    "EnvVar(name='AWS_SECRET_ACCESS_KEY', value='{}')",
    'v1.EnvVar{{Name:"AWS_SECRET_ACCESS_KEY", Value:"{}"}}',
    "password:[]byte({})",
    "AWS_SECRET_ACCESS_KEY -> {}",
    "'password' => '{}'",
    # Over more than a line.
    "AWS_SECRET_ACCESS_KEY:\n  {}",
    "<SecretAccessKey>\n  {}\n</SecretAccessKey>",
    "Authorization: AWS4-HMAC-SHA256\n  Credential=a/b,\n  Signature={}",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE{}\n-----END RSA PRIVATE KEY-----",
    # Under other names.
    "MINIO_SECRET_KEY={}",
    '"secretKey":"{}"',
    "AWS_CONTAINER_AUTHORIZATION_TOKEN={}",
    "WebIdentityToken={}",
    "x-amz-server-side-encryption-customer-key: {}",
    "Set-Cookie: session={}",
    "X-Api-Key: {}",
    "AccountKey={};",
    '"private_key": "{}"',
    "token: {}",
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
        ("token%3Dhf_" + "x" * 34, "token%3D***"),
        ("model_hf_" + "x" * 34, "model_***"),
        ("ghp_" + "x" * 36 + " glpat-" + "x" * 20 + " xoxb-" + "1" * 20 + " sk-" + "x" * 30, "*** *** *** ***"),
        ("no file s3:/me:secret@bucket/key", "no file s3:/***@bucket/key"),
        ("https%3A%2F%2Fuser%3Asecret%40proxy", "https%3A%2F%2F***%40proxy"),
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
        "the user name or password, put where they belong; columns prompt, password, email",
        "HF_TOKEN is not set; the access token expired; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "task-specific-fine-tuning-of-models, file:///data/a:b/c, s3://bucket/a//b:c@d, sha256:" + "a" * 64,
        "eos_token: </s>, pad_token: <pad>, max_tokens=5",
    ],
)
def test_plain_words_stay(text: str) -> None:
    assert without_secrets(text) == text


NAMES = [
    *("secret access key", "secret-key", "private_key", "account-key", "customerkey", "client-secret", "api_key"),
    *("session_token", "security-token", "access-token", "refresh_token", "identity-token", "id_token", "auth-token"),
    *("authorization_token", "hf_token", "hub-token", "huggingface_token", "password", "passwd", "aws_access_key_id"),
    *("x-amz-signature", "x-goog-signature", "x-amz-credential", "x-goog-credential", "signature", "sig", "token"),
    *("bearer", "cookie", "set-cookie", "authorization", "proxy-authorization"),
]
LOOKS = [
    *(f"{start}IOSFODNN7EXAMPLES" for start in ("AKIA", "ASIA", "ABIA", "ACCA", "AROA", "AIDA")),
    *(f"{start}{'x1' * 10}" for start in ("hf_", "api_org_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_")),
    *(f"{start}{'x1' * 10}" for start in ("glpat-", "ya29.", "sk-", "xoxa-", "xoxb-", "xoxr-", "xoxe-", "xoxs-")),
    *("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0", "-----BEGIN PRIVATE KEY-----", "bearer wJalrXUtnFEMI"),
    *("http://u:p@h", "http://u@h", "http://u:p/q@h", "s3:/me:p@b", "https%3A%2F%2Fu%3As%40p", "?sig=a", "&token=a"),
]
VALUE = "wJalrXUtnFEMI+bPxRfi&x7"  # which has none of the words itself
AFTER_A_NAME = [f"={VALUE}", f": {VALUE}", f'": "{VALUE}"', f'", "{VALUE}"', f" {VALUE}", f"%3A%20{VALUE}"]
QUOTED = [
    *(form.format(VALUE) for form in FORMS),
    *(start + name + value for name in NAMES for value in AFTER_A_NAME for start in ("?", "'", '"')),
    *LOOKS,
]


def by_every_pattern(text: str) -> str:
    """Without secrets, where a letter before it that is not ASCII keeps the search for words from sparing patterns."""
    before = "\u00e9\n"
    return without_secrets(before + text).removeprefix(before)


@pytest.mark.parametrize("change", [str, str.upper, str.lower, str.title])
def test_a_search_for_words_spares_no_pattern_that_finds_a_secret(change: Callable[[str], str]) -> None:
    for text in map(change, QUOTED):
        assert without_secrets(text) == by_every_pattern(text)


@settings(max_examples=50)
@given(st.lists(st.sampled_from([*QUOTED, *NAMES, *"\"'&= @:/*\n"]) | st.text(max_size=5), max_size=6).map("".join))
def test_a_search_for_words_changes_nothing_in_any_text(text: str) -> None:
    assert without_secrets(text) == by_every_pattern(text)


@settings(max_examples=20)
@given(st.text(max_size=50), st.integers(MAX_CHARS - 200, MAX_CHARS + 200))
def test_no_place_of_a_secret_lets_half_of_it_through(before: str, at: int) -> None:
    text = (before + " " * MAX_CHARS)[:at] + " AKIAIOSFODNN7EXAMPLE AWS_SECRET_ACCESS_KEY=" + SECRET
    shown = without_secrets(text)
    assert "AKIAIO" not in shown
    assert SECRET[:6] not in shown


@pytest.mark.parametrize(
    "word",
    [
        "://",
        "://a:",
        ":/a:",
        "eyJ",
        "-eyJ",
        "eyJa-",
        "hf_",
        "AKIA",
        "secretaccesskey",
        "authorization",
        "%3A%2F%2F",
        "%20",
        "\\",
        "password\\",
        "a ",
        "bearer ",
        "password value",
        'password="',
        "-----BEGIN PRIVATE KEY-----",
    ],
)
@pytest.mark.timeout(300)
def test_no_text_takes_long(word: str) -> None:
    """It takes milliseconds; patterns that try again from each place take minutes, and pytest ends the test then."""
    for _ in range(20 if "-" in word else 1):  # "-eyJ" took 17 s once
        without_secrets(word * (MAX_CHARS // len(word)))
    without_secrets(word * MAX_CHARS)


def test_a_fault_holds_no_secret_whoever_raises_it() -> None:
    error = StageError(
        Fault.CONFIG_UNREADABLE, field="model.uri", problem=f"https://me:{SECRET}@hub.example/x is no URI"
    )
    assert "me:" not in str(error)
    assert error.args_by_name["problem"] == "https://***@hub.example/x is no URI"


@pytest.mark.parametrize("cut", range(20, 60))
def test_no_cut_lets_a_part_of_a_secret_through(cut: int) -> None:
    text = f"the proxy https://me:{SECRET}@host refuses"
    event = explain("FailedCreate", "x" * (512 - cut) + f" AWS_SECRET_ACCESS_KEY: {SECRET}", "team")
    assert event is not None
    uri = f"https://me:{SECRET}@hub.example/{'x' * (270 - cut)}"
    for shown in (shortened(text, cut), one_line("x" * (1020 - cut) + text), event.message, place(uri)):
        assert not any(SECRET[at : at + 4] in shown for at in range(len(SECRET) - 4))


def _cuts(call: ast.Call) -> bool:
    """Return whether an argument is the beginning of a text: `words[:200]`, also within an f-string."""
    return any(
        isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and node.slice.lower is None
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
        for node in ast.walk(argument)
    )


def test_no_argument_of_a_fault_is_cut_before_its_secrets_are_taken_out() -> None:
    """`StageError` takes them out of what it gets, and knows half a token no longer; `shortened` does both."""
    faults = {"StageError", "CommandError", "unsupported", "broken", "_unsupported", "_broken"}
    found: list[str] = []
    for path in [each for part in ("api", "operator", "trainer", "cli") for each in (ROOT / part).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _cuts(node):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                found += [f"{path.name}:{node.lineno}"] if name in faults else []
    assert found == []
