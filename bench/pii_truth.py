"""Texts with personal data whose places are known: values of Faker in templates of five languages, and decoys.

Templates and values of the dev half may be looked at; recognisers are judged by the test half, whose digest is fixed.
"""

import hashlib
import json
import random
import re
import string
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

from faker import Faker

# ruff: noqa: RUF001, E501

LOCALES = ("en_US", "en_GB", "de_DE", "fr_FR", "es_ES")
_ROUNDS = 25  # of all templates of a half
_FIRST_BORN, _LAST_BORN = date(1930, 1, 1), date(2008, 12, 31)
_OF_NOBODY = re.compile("^ZZ|T$")  # as all of Faker's begin and end, and no number of anybody
_NINO_ENDS = {"ZZ": ("AB", "CE", "JG", "LM", "NS", "PX", "SR", "WK", "YZ"), "T": tuple("ABCD")}
_SLOT = re.compile(r"\{(\w+)\}")


class Truth(NamedTuple):
    """A text, and the type, begin and end of each value in it."""

    locale: str
    text: str
    values: list[tuple[str, int, int]]


# Slots in capitals are values; those in small letters are words and numbers that are nobody's.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "en_US": (
        "Hi, this is {name}. You can reach me at {EMAIL} or on my cell, {PHONE}. Thanks!",
        "Customer {name} called from {PHONE} about order {order}; please write back to {EMAIL}.",
        "Please update my file: SSN {NATIONAL_ID}, born {DATE_OF_BIRTH}, living at {street}.",
        "Card on file: {CARD}, expires 09/27. Ship order {order} to {street}.",
        "Agent: may I have your number?\nCaller: sure, it's {PHONE}\nAgent: and the card?\nCaller: {CARD}",
        "Login from {IP_ADDRESS} (device {MAC_ADDRESS}) at 2024-03-11T08:14:55Z, build {version}",
        "{street}\nTel: {PHONE}\nFax: {PHONE}\nE-mail: {EMAIL}",
        "Social security number on the W-2 was {NATIONAL_ID}; the ticket is {order}.",
        "The patient ({DATE_OF_BIRTH}, date of birth) was moved to room 12. Contact: {PHONE}.",
        "She typed {EMAIL} where {EMAIL} was meant.",
        "Meet us at {COORDINATES} (GPS), parking is free. Questions: {PHONE}",
        "curl -H 'Authorization: Bearer {API_KEY}' https://api.example.com/v1/orders/{order}",
    ),
    "en_GB": (
        "Dear {name}, we tried to ring you on {PHONE}. Please reply to {EMAIL}.",
        "National Insurance number: {NATIONAL_ID}. Date of birth: {DATE_OF_BIRTH}.",
        "Pay into {IBAN} quoting reference {order}, or by card {CARD}.",
        "My mobile number's changed to {PHONE}, email's still {EMAIL}.",
        "NINO {NATIONAL_ID} / invoice {order} / version {version}",
        "He was born on {DATE_OF_BIRTH} and can be contacted via {EMAIL} only.",
        "refund to IBAN {IBAN}; telephone {PHONE} (home)",
        "Our server {IP_ADDRESS} refused {IP_ADDRESS} after five tries; hash {hash}",
    ),
    "de_DE": (
        "Sehr geehrte Damen und Herren, bitte überweisen Sie auf {IBAN}. Rückfragen: {PHONE} oder {EMAIL}.",
        "{name}, geboren am {DATE_OF_BIRTH}, Rentenversicherungsnummer {NATIONAL_ID}",
        "Kundin ruft zurück unter {PHONE}, Bestellnummer {order}.",
        "Telefon: {PHONE}\nE-Mail: {EMAIL}\nIBAN: {IBAN}",
        "Meine Handynummer ist {PHONE}. Bitte nicht an {EMAIL} schreiben!",
        "Geburtsdatum {DATE_OF_BIRTH}, Sozialversicherungsnummer: {NATIONAL_ID}, Rechnung {order}",
        "Kreditkarte {CARD} wurde belastet, Vorgang {order}, Fassung {version}.",
        "Gesperrt: {IP_ADDRESS}, zuletzt gesehen mit {MAC_ADDRESS}",
    ),
    "fr_FR": (
        "Bonjour, je suis {name}, vous pouvez m'appeler au {PHONE} ou m'écrire à {EMAIL}.",
        "Numéro de sécurité sociale : {NATIONAL_ID}, date de naissance : {DATE_OF_BIRTH}.",
        "Virement sur le compte {IBAN}, commande {order}.",
        "Tél. {PHONE} – courriel {EMAIL} – facture {order}",
        "La carte {CARD} a été refusée. Rappelez le client : {PHONE}",
        "Née le {DATE_OF_BIRTH}, son NIR est {NATIONAL_ID}.",
        "Connexion depuis {IP_ADDRESS} refusée (version {version}).",
        "Mon portable : {PHONE}. Mon adresse : {street}. Merci !",
    ),
    "es_ES": (
        "Hola, soy {name}. Mi teléfono es {PHONE} y mi correo {EMAIL}.",
        "DNI/NIE {NATIONAL_ID}, fecha de nacimiento {DATE_OF_BIRTH}, pedido {order}",
        "Ingrese el importe en {IBAN} antes del 12/05/2024.",
        "Llámame al {PHONE} o escribe a {EMAIL}, por favor.",
        "Tarjeta {CARD}, titular {name}, factura {order}",
        "El documento {NATIONAL_ID} caducó; nacido el {DATE_OF_BIRTH}.",
        "Móvil: {PHONE}. Dirección: {street}.",
        "IP {IP_ADDRESS}, versión {version}, resumen {hash}",
    ),
}
_OF_ALL = (
    '{{"user": {{"email": "{EMAIL}", "phone": "{PHONE}"}}, "order": "{order}", "sha": "{hash}"}}',
    '{{"card": "{CARD}", "iban": "{IBAN}", "amount": 12.50, "version": "{version}"}}',
    '{{"dob": "{DATE_OF_BIRTH}", "ip": "{IP_ADDRESS}", "mac": "{MAC_ADDRESS}", "id": {order}}}',
    '{IP_ADDRESS} - - [11/Mar/2024:08:14:55 +0000] "GET /u/{order}?mail={EMAIL} HTTP/1.1" 200 5120',
    "id,email,phone,created\n{order},{EMAIL},{PHONE},2024-03-11\n{order},{EMAIL},{PHONE},2024-03-12",
    "DATABASE_URL={URL_CREDENTIALS}/app\nAPI_TOKEN={API_KEY}\nVERSION={version}",
    "git clone {URL_CREDENTIALS}/team/app.git && git checkout {hash}",
    "eth0: {MAC_ADDRESS}  inet {IP_ADDRESS}  inet6 {IPV6}",
    "lat: {COORDINATES}",
    "position {COORDINATES}; altitude 120 m",
    'key = "{API_KEY}"  # rotate after {version}',
    "# config\nsecret: {API_KEY}\nhost: {IPV6}\n",
    "From: {name} <{EMAIL}>\nTo: {EMAIL}\nDate: Mon, 11 Mar 2024 08:14:55 +0000\nMessage-ID: <{hash}@mx>\n\nsee {order}",
    "build {version} of {hash} took 192.168.1.{octet} and 10.0.0.{octet} at 12:30:45",
    "Part no. {order}, serial {serial}, tracking {serial}; see chapter {version}",
    "order {serial} was shipped on 2024-03-11, {order} follows; total 1,234,567.89",
    "commit {hash}\nAuthor: {name}\nDate:   2024-03-11 08:14:55 +0100\n\n    bump to {version}",
    "ISBN 978-3-16-148410-0, DOI 10.1000/{serial}, {uuid}",
    "uuid={uuid} count={serial} ratio=0.{serial} epoch={epoch}",
    "{epoch} {epoch} {serial}; range 1990-2024; 2024-03-11 08:14; 1 000 000 rows",
)


def _api_key(generator: random.Random) -> str:
    def of(letters: str, size: int) -> str:
        return "".join(generator.choices(letters, k=size))

    word, upper, small = (
        string.ascii_letters + string.digits,
        string.ascii_uppercase + string.digits,
        "0123456789abcdef",
    )
    return generator.choice(
        (
            "AKIA" + of(upper, 16),
            "ghp_" + of(word, 36),
            "glpat-" + of(word, 20),
            "xoxb-" + of(string.digits, 12) + "-" + of(string.digits, 12) + "-" + of(word, 24),
            "sk_live_" + of(word, 24),
            "sk-proj-" + of(word, 48),
            "AIza" + of(word, 35),
            "hf_" + of(word, 34),
            "eyJ" + of(word, 30) + ".eyJ" + of(word, 60) + "." + of(word, 43),
            of(small, 40),
            of(word, 32),
        )
    )


def _values(locale: str, fake: Faker, generator: random.Random) -> dict[str, Callable[[], str]]:
    def birth() -> str:
        born = fake.date_between_dates(_FIRST_BORN, _LAST_BORN)
        forms = ["%Y-%m-%d", "%d/%m/%Y", "%d.%m.%Y"] if locale != "en_US" else ["%Y-%m-%d", "%m/%d/%Y", "%B %d, %Y"]
        return born.strftime(generator.choice(forms))

    def card() -> str:
        number = fake.credit_card_number()
        is_grouped = len(number) == 16 and generator.random() < 0.5
        return generator.choice(" -").join(re.findall("....", number)) if is_grouped else number

    def iban() -> str:
        number = fake.iban()
        return " ".join(re.findall(".{1,4}", number)) if generator.random() < 0.5 else number

    def place() -> str:
        latitude, longitude = generator.uniform(-80, 80), generator.uniform(-170, 170)
        return f"{latitude:.5f}, {longitude:.5f}"

    def version() -> str:
        return ".".join(str(generator.randrange(30)) for _ in range(generator.choice((3, 4))))

    def ipv6() -> str:
        groups = [f"{0x2000 + generator.randrange(0x1000):x}", *(f"{generator.randrange(2**16):x}" for _ in range(7))]
        return ":".join(groups[:4]) + "::" + groups[4] if generator.random() < 0.5 else ":".join(groups)

    national: dict[str, Callable[[], str]] = {
        "es_ES": lambda: generator.choice((fake.nif, fake.nie))(),
        "de_DE": lambda: fake.rvnr(fake.date_between_dates(_FIRST_BORN, _LAST_BORN)),  # by itself it asks the clock
        "en_GB": lambda: _OF_NOBODY.sub(lambda end: generator.choice(_NINO_ENDS[end[0]]), fake.ssn()),
    }
    return {
        "EMAIL": lambda: generator.choice((fake.email, fake.company_email, fake.ascii_free_email))(),
        "PHONE": fake.phone_number,
        "CARD": card,
        "IBAN": iban,
        "IP_ADDRESS": fake.ipv4_public,
        "IPV6": ipv6,
        "MAC_ADDRESS": lambda: fake.mac_address(),
        "NATIONAL_ID": national.get(locale, lambda: fake.ssn()),
        "DATE_OF_BIRTH": birth,
        "COORDINATES": place,
        "API_KEY": lambda: _api_key(generator),
        "URL_CREDENTIALS": lambda: (
            f"https://{fake.user_name()}:{fake.password(special_chars=False)}@{fake.domain_name()}"
        ),
        "name": fake.name,
        "street": lambda: fake.street_address().replace("\n", ", "),
        "order": lambda: str(generator.randrange(10**5, 10**10)),
        "serial": lambda: str(generator.randrange(10**9, 10**16)),
        "version": version,
        "octet": lambda: str(generator.randrange(1, 255)),
        "hash": lambda: f"{generator.getrandbits(160):040x}",
        "uuid": fake.uuid4,
        "epoch": lambda: str(generator.randrange(1_500_000_000, 1_700_000_000) * generator.choice((1, 1000))),
    }


def truth(half: str) -> list[Truth]:
    """Return the texts of a half, the same each time. half: dev or test, which share no template of a language."""
    found: list[Truth] = []
    for locale in LOCALES:
        fake = Faker(locale)
        fake.seed_instance(f"{half} {locale}")
        generator = random.Random(f"{half} {locale}")
        values = _values(locale, fake, generator)
        templates = (*TEMPLATES[locale], *_OF_ALL)[half == "test" :: 2]
        found += [_filled(locale, template, values) for _ in range(_ROUNDS) for template in templates]
    return found


def _filled(locale: str, template: str, values: dict[str, Callable[[], str]]) -> Truth:
    """Return a template with values in its slots; doubled braces are braces."""
    plain = template.replace("{{", "\1").replace("}}", "\2")
    parts: list[str] = []
    places: list[tuple[str, int, int]] = []
    size = at = 0
    for slot in _SLOT.finditer(plain):
        before, value = plain[at : slot.start()], values[slot[1]]()
        size += len(before)
        if slot[1].isupper():
            places.append(("IP_ADDRESS" if slot[1] == "IPV6" else slot[1], size, size + len(value)))
        size += len(value)
        parts += (before, value)
        at = slot.end()
    text = "".join((*parts, plain[at:])).replace("\1", "{").replace("\2", "}")
    return Truth(locale, text, places)


def digest(half: str) -> str:
    """Return the SHA-256 of a half's texts and places."""
    return hashlib.sha256(json.dumps(truth(half), ensure_ascii=False).encode()).hexdigest()
