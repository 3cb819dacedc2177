"""Personal data and secrets are told by their form: what is found, what is not, and what stands in its place."""

# ruff: noqa: RUF001

import json
import re

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.pii import PII_REGIONS, PII_WORDS, PiiType
from finetune_trainer.data.pii import find as finding
from finetune_trainer.data.pii.find import RECOGNISERS, Found, find
from finetune_trainer.data.pii.national_ids import COUNTRIES
from finetune_trainer.data.pii.replacing import placeholder, pseudonym, replaced
from finetune_trainer.data.pii.subject import Subject

PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEowIBAAKCAQEAu1SU1LfVLPHCozMxH2Mo\n" * 3 + "-----END RSA PRIVATE KEY-----"
)
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
GITHUB = "ghp_" + "a1B2c3D4e5F6" * 3

# Each value is written between « and », which are taken out before it is looked for.
FOUND: list[tuple[PiiType, str]] = [
    (PiiType.EMAIL, "Write to «ada.lovelace@example.org»."),
    (PiiType.EMAIL, "<a href='mailto:«o'neil+news@mail.example.co.uk»'>"),
    (PiiType.EMAIL, "Schreib an «jürgen.groß@bücher.example»!"),
    (PiiType.EMAIL, "?user=«ada%40example.org»&x=1"),
    (PiiType.EMAIL, "reach me: «ada (at) example (dot) org»"),
    (PiiType.EMAIL, "邮箱是«ada@example.cn»谢谢"),
    (PiiType.EMAIL, "A «ADA_L@EXAMPLE.ORG», B «b@x.io»"),
    (PiiType.EMAIL, "ada «ada&#64;example&#46;org», «bob&#x40;example.org», «eve[at]example[.]org»"),
    (PiiType.EMAIL, "(HELO ada) («ada@mail.example.org@81.2.69.142» with login)"),
    (PiiType.EMAIL, "X-Sender: «ada@[81.2.69.142]», «bob@81.2.69.143»"),
    (PiiType.EMAIL, "* changes («ada.l at example.org») and <«bob at mail.example.org»>"),
    (PiiType.EMAIL, "ask «ada AT example DOT co DOT uk» or «bob at example dot org»"),
    (PiiType.PHONE, "Call me at «+1 415-555-2671»."),
    (PiiType.PHONE, "(«(212) 555-0187», ask for Ada)"),
    (PiiType.PHONE, "phone «212-555-0187x123»"),
    (PiiType.PHONE, "Tel. «030 901820» oder «0151/23456789»"),
    (PiiType.PHONE, "Mon numéro: «06 12 34 56 78»"),
    (PiiType.PHONE, "Ring «+44 (0)20 7946 0018» today"),
    (PiiType.PHONE, "my cell is «4155552671», thanks"),
    (PiiType.PHONE, "«+4915123456789»"),
    (PiiType.PHONE, "numbers: «+1 415-555-2671» «+1 415-555-2672»"),
    (PiiType.PHONE, "the post office («1-800-725-2161» 24 hrs)"),
    (PiiType.PHONE, "Direct Tel No: «+873-762-692484»."),
    (PiiType.PHONE, "Tél. «01 56 77 01 20» / «06 81 57 85 47»; Tel. «030 / 901820»"),
    (PiiType.PHONE, "Phone: «(01) 605 3737» / «(086) 880 4187»"),
    (PiiType.PHONE, "call «030 901820» at 10:30"),
    (PiiType.PHONE, "Phone: «+1 412-268-7090» (24-hour hotline), «703-724-0118»W"),
    (PiiType.PHONE, "?phone=«%2B14155552671»&x=1"),
    (PiiType.CARD, "pay with «4111 1111 1111 1111» 12/26"),
    (PiiType.CARD, "«4111111111111111»,«5555555555554444»\nAda,«4111111111111111»,7"),
    (PiiType.CARD, "«4111.1111.1111.1111», «2221000000000009» and «6205500000000000004»"),
    (PiiType.CARD, "amex «3782 822463 10005» ok"),
    (PiiType.CARD, "«5555555555554444»"),
    (PiiType.CARD, "«4111-1111-1111-1111»."),
    (PiiType.CARD, "diners «30569309025904»"),
    (PiiType.IBAN, "IBAN «DE89 3704 0044 0532 0130 00» is mine"),
    (PiiType.IBAN, "to «GB29NWBK60161331926819»."),
    (PiiType.IBAN, "«fr1420041010050500013M02606»"),
    (PiiType.IP_ADDRESS, "from «81.2.69.142» at noon"),
    (PiiType.IP_ADDRESS, "Our server «81.2.69.142» is up, version 81.2.69.143"),
    (PiiType.IP_ADDRESS, "[«2a02:2e0:3fe:1001:302::»]"),
    (PiiType.IP_ADDRESS, "from relay ([«::ffff:81.2.69.142»]), not ::ffff:192.168.0.1"),
    (PiiType.IP_ADDRESS, "host «2001:4860:4860::8888»: up"),
    (PiiType.MAC_ADDRESS, "nic «00:1A:2b:3c:4D:5e»"),
    (PiiType.MAC_ADDRESS, "«00-1a-2b-3c-4d-5e», «001a.2b3c.4d5e»"),
    (PiiType.MAC_ADDRESS, "eui «00:1A:2B:3C:4D:5E:6F:70», {'mac': '«001A2B3C4D5E»'}"),
    (PiiType.NATIONAL_ID, "SSN «536-90-4399»"),
    (PiiType.NATIONAL_ID, "NINO: «AB 12 34 56 C»"),
    (PiiType.NATIONAL_ID, "my DNI is «12345678Z»"),
    (PiiType.NATIONAL_ID, "codice fiscale «RCCMNL83S18D969H»"),
    (PiiType.NATIONAL_ID, "numéro «2 95 10 99 126 111 93»"),
    (PiiType.NATIONAL_ID, "Steuer-ID «36 574 261 809»"),
    (PiiType.NATIONAL_ID, "Rentenversicherung «15 070649 C 103»"),
    (PiiType.NATIONAL_ID, "PESEL «44051401359»"),
    (PiiType.NATIONAL_ID, "CPF «390.533.447-05»"),
    (PiiType.API_KEY, "export AWS_ACCESS_KEY_ID=«AKIAIOSFODNN7ABCDEFG»"),
    (PiiType.API_KEY, f"token {'«' + GITHUB + '»'} here"),
    (PiiType.API_KEY, "«sk-proj-Ab3dEf9hIj2kLmN4pQrS6tUvWx»"),
    (PiiType.API_KEY, "key: «AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY»"),
    (PiiType.API_KEY, f"Authorization: Bearer «{JWT}»"),
    (PiiType.API_KEY, "«xoxb-123456789012-abcdefGHIJKL»"),
    (PiiType.API_KEY, "api_key = '«9f8c2b7d1e6a4f30b5d7c9e1»'"),
    (PiiType.API_KEY, "the password is «Tr0ub4dor&3xyz»"),
    (PiiType.PRIVATE_KEY, f"look:\n«{PEM}»\nbye"),
    (PiiType.URL_CREDENTIALS, "clone «https://ada:s3cr3t@git.example.org»/x.git"),
    (PiiType.URL_CREDENTIALS, "«postgres://app:p@ss:word@db.internal:5432»/prod"),
    (PiiType.COORDINATES, "(GPS: «48.858370, 2.294481»)"),
    (PiiType.COORDINATES, """«40°26'46"N 79°58'56"W»"""),
    (PiiType.COORDINATES, '{"type": "Point", "coordinates": [«151.209296, -33.868820»]}'),
    (PiiType.COORDINATES, "[«48.858370, 2.294481»] location"),
    (PiiType.COORDINATES, "lat=«48.85837»&lon=«2.294481»"),
    (PiiType.COORDINATES, "maps/@«48.8583701,2.2922926»,17z"),
    (PiiType.DATE_OF_BIRTH, "born on «12 March 1980» in Rome"),
    (PiiType.DATE_OF_BIRTH, "Geburtsdatum: «12.03.1980»"),
    (PiiType.DATE_OF_BIRTH, "date of birth «1980-03-12»"),
    (PiiType.DATE_OF_BIRTH, "née le «3 août 1979»"),
    (PiiType.DATE_OF_BIRTH, "DOB: «03/12/80»,"),
]
NOT_FOUND = [
    "version 1.2.3.4 of driver 10.20.30.40, v8.8.4.4",
    "192.168.0.1, 10.0.0.1, 127.0.0.1, 2001:db8::1, fe80::1, ::1",
    "std::vector<int> a::b::c at 12:30:45 on 2023-10-05",
    "SMTP; Jun, 03 2002 8:30:03 AM; Sep, 02 2002 12:11:57; At 13:06 06/08/2002, until 08/26/2002 5:00 pm",
    "Suite 330, Boston, MA  02111-1307  USA; Newark, NJ 07102-2992.",
    "by contact.example.org (8.11.0/8.11.0) with SMTP; contact: Build 8.0.1603 (8.0.1603.0)",
    "?product_id=0735613788&x=1 and your serial number is 1519761310, digits 0123456789",
    "from 01-058.036.popsite.example and 200-207-55-243.dsl.example",
    "sends 01 01 00 00 00 00 00 00 back",
    "ESMTP id BADCC4415C and BACAA4022B",
    "the lucky numbers 37-13-34-85-56-42 won",
    "secret=\ns.net/bnr/3010098220 target",
    "we meet at example.org. It is at work. Please look at Mail.Org",
    "3.4111111111111111 and 0,4111111111111111 and 4111.11111111 and 4111111111111111.25",
    "order 4111111111111112 and order number 0151234567",
    '{"share": 4111111111111111.5}',
    "Order no. 123-456-7890, invoice 555 123 4567",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "commit 4adb6b5f2c8e and uuid 123e4567-e89b-12d3-a456-426614174000",
    "between 1990 - 1995 and 2,345,678 people; 3.141592653589793",
    "git@localhost and icon@2x.png and @decorator and lodash@4.17.21",
    "ISBN 978-3-16-148410-0",
    "token = get_token(request); password: str; api_key=API_KEY_FROM_ENVIRONMENT",
    "https://user:${PASSWORD}@example.org https://example.org:8080/@ada",
    "-----BEGIN PRIVATE KEY----- is how it begins",
    "on 12 March 1980 the treaty was signed",
    "[0.1234, 0.5678, 0.9012] and position 0.1234",
    "timestamps 1577836800000, 1577836800",
    "0.0.0.0 255.255.255.255 00:00:00:00:00:00",
    "aa:bb:cc:dd:ee:ff:00:11:22:33:44:55:66:77:88:99",
    "DE89 3704 0044 0532 0130 01",
    "123-45-6789012 and 12-345",
]


def marked(case: str) -> tuple[str, list[str]]:
    return case.replace("«", "").replace("»", ""), re.findall("«(.*?)»", case, re.DOTALL)


def said(text: str) -> list[tuple[PiiType, str]]:
    return [(each.type, text[each.begin : each.end]) for each in find(text)]


@pytest.mark.parametrize(("type_", "case"), FOUND)
def test_a_value_is_found_whole_and_with_its_type(type_: PiiType, case: str) -> None:
    text, values = marked(case)
    assert said(text) == [(type_, value) for value in values]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_only_looks_like_a_value_is_not_found(text: str) -> None:
    assert said(text) == []


def test_every_type_has_one_recogniser_words_and_an_example_in_the_order_that_decides() -> None:
    assert list(RECOGNISERS) == list(PiiType) == list(PII_WORDS)
    assert {type_ for type_, _ in FOUND} == set(PiiType)
    assert set(COUNTRIES) <= set(PII_REGIONS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("call +١ ٤١٥-٥٥٥-٢٦٧١ now", "+١ ٤١٥-٥٥٥-٢٦٧١"),  # Arabic digits
        ("card 4111\u200b1111\u200b1111\u20601111.", "4111\u200b1111\u200b1111\u20601111"),  # invisible between
        ("mail ａｄａ＠ｅｘａｍｐｌｅ．ｏｒｇ ok", "ａｄａ＠ｅｘａｍｐｌｅ．ｏｒｇ"),  # of full width
        ("ａｄａ mail ada\u00ad@example.org ok", "ada\u00ad@example.org"),  # a soft hyphen
        ("SSN 536\u201190\u20114399 é", "536\u201190\u20114399"),  # hyphens at which no line breaks
        ("Tél. 06\u202f12\u202f34\u202f56\u202f78", "06\u202f12\u202f34\u202f56\u202f78"),  # narrow spaces
    ],
)
def test_digits_of_other_scripts_and_what_nobody_sees_hide_nothing(text: str, value: str) -> None:
    assert [each for _, each in said(text)] == [value]


@pytest.mark.parametrize(
    ("regions", "values"),
    [({"GB"}, ["020 7946 0018"]), ({"US"}, ["(212) 736-5000"]), ({"FR", "US"}, ["(212) 736-5000"])],
)
def test_numbers_without_a_country_code_are_told_by_the_regions(regions: set[str], values: list[str]) -> None:
    text = "UK 020 7946 0018; US (212) 736-5000"
    assert [text[each.begin : each.end] for each in find(text, frozenset(regions))] == values


def test_the_name_of_a_field_says_what_its_text_is() -> None:
    assert find("4155552671") == find("1980-03-12") == []
    assert find("4155552671", field="phone") == [Found(PiiType.PHONE, 0, 10, "4155552671")]
    assert find("1980-03-12", field="date_of_birth") == [Found(PiiType.DATE_OF_BIRTH, 0, 10, "1980-03-12")]


def test_of_values_that_overlap_the_longest_counts() -> None:
    assert said("https://ada:pw1x@mail.example.org") == [(PiiType.URL_CREDENTIALS, "https://ada:pw1x@mail.example.org")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"mail": "ada@example.org", "n": 1}', '{"mail": "<EMAIL>", "n": 1}'),
        ('{"card": 4111111111111111}', '{"card": "<CARD>"}'),
        ('{"lat": 48.85837, "lon": 2.294481}', '{"lat": "<COORDINATES>", "lon": "<COORDINATES>"}'),
        ('{"m": "mail:\\nada\\u0040example.org"}', '{"m": "mail:\\n<EMAIL>"}'),
        ('["+1 415\\u002d555-2671"]', '["<PHONE>"]'),
        ('{"a": "{\\"mail\\": \\"ada@example.org\\"}"}', '{"a": "{\\"mail\\": \\"<EMAIL>\\"}"}'),
        ("{ada@example.org}", "{<EMAIL>}"),
    ],
)
def test_placeholders_leave_json_as_json(text: str, expected: str) -> None:
    assert replaced(text, find(text), placeholder) == expected
    if '"' in text:
        json.loads(expected)


def test_a_private_key_in_a_string_of_json_is_found_to_its_end() -> None:
    text = json.dumps({"key": PEM, "n": 1})
    assert replaced(text, find(text), placeholder) == '{"key": "<PRIVATE_KEY>", "n": 1}'


def test_a_value_has_one_pseudonym_however_it_is_written_and_another_with_another_key() -> None:
    def names(key: bytes, text: str) -> list[str]:
        return re.findall("<.*?>", replaced(text, find(text), lambda each: pseudonym(key, each)))

    text = "Ada@Example.org ada@example.org bob@example.org; card 4111 1111 1111 1111 or 4111111111111111"
    ada, again, bob, card, as_one = names(b"k" * 32, text)
    assert ada == again != bob
    assert card == as_one
    assert re.fullmatch("<EMAIL_[0-9a-f]{16}>", ada)
    assert names(b"l" * 32, text)[0] != ada
    assert find(" ".join((ada, card))) == []


@given(st.text(max_size=60), st.sampled_from(FOUND), st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_places_are_right_in_any_text(before: str, case: tuple[PiiType, str], after: str) -> None:
    text = f"{before} \n{marked(case[1])[0]}\n {after}"
    every = find(text)
    ends = [0, *(each.end for each in every)]
    assert all(end <= each.begin < each.end for end, each in zip(ends, every, strict=False))
    for each in every:
        assert Subject(text[each.begin : each.end]).content.decode() == each.value
    assert find(replaced(text, every, placeholder)) == [] or before or after


@pytest.mark.parametrize("text", [each for _, case in FOUND for each in (marked(case)[0], json.dumps(marked(case)[0]))])
def test_the_gate_lets_through_whatever_a_family_finds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = find(text)
    assert told

    class EveryOne:
        def Match(self, content: bytes) -> list[int]:
            return list(range(len(RECOGNISERS)))

    monkeypatch.setattr(finding, "_gate", EveryOne)
    assert find(text) == told


HARD = [
    *("1 " * 50_000, "1-" * 50_000, "(0 " * 30_000, "+1 " * 30_000, "0151 " * 20_000, "4111 " * 20_000),
    *("a@" * 50_000, "x." * 50_000, "::" * 50_000, "\\u0040" * 20_000, "de89 " * 20_000, '{"a": ' * 20_000),
    *("-----BEGIN PRIVATE KEY-----\n" * 3000, "password: " * 9000, "https://a:" * 9000, "born " * 20_000),
    *("12.345, " * 12_000, "lat 1.234 " * 9000, "é" + "ada@example.org " * 30_000),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", HARD, ids=lambda text: orjson.dumps(text[:12]).decode())
def test_a_text_that_is_hard_to_read_takes_no_longer_than_others(text: str) -> None:
    find(text)
