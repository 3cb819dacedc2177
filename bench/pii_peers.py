"""Programs of their own, one for each peer of `bench.pii`: texts come as JSON lines, what they find goes back so.

They import no code of ours, and of each other nothing: each runs in an environment with that peer alone.
"""

PRESIDIO = """
import spacy
import tldextract
from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
from presidio_analyzer.nlp_engine import SpacyNlpEngine
from presidio_analyzer.predefined_recognizers import CreditCardRecognizer, PhoneRecognizer, UkNinoRecognizer
from spacy.language import Language

@Language.component("lower_lemmas")
def lower_lemmas(doc):
    for token in doc:
        token.lemma_ = token.lower_
    return doc

LANGUAGES = ["en", "de", "fr", "es"]

# Its own looks for a list on the network with the first address.
tldextract.extract = tldextract.TLDExtract(suffix_list_urls=())

class Blank(SpacyNlpEngine):
    def __init__(self):
        super().__init__(models=[{"lang_code": each, "model_name": each} for each in LANGUAGES])
        self.nlp = {}
        for each in LANGUAGES:
            self.nlp[each] = spacy.blank(each)
            self.nlp[each].add_pipe("lower_lemmas")

    def load(self):
        pass

    def is_loaded(self):
        return True

registry = RecognizerRegistry(supported_languages=LANGUAGES)
registry.load_predefined_recognizers(languages=LANGUAGES)
# As its documentation says: those that are off, languages without cards, and the countries of the texts.
replaced = ("Spacy", "PhoneRecognizer", "UkNino")
registry.recognizers = [each for each in registry.recognizers if not type(each).__name__.startswith(replaced)]
registry.add_recognizer(UkNinoRecognizer())
for language in LANGUAGES:
    regions = ("US", "GB", "DE", "FR", "ES")
    registry.add_recognizer(PhoneRecognizer(supported_language=language, supported_regions=regions))
    if language in ("de", "fr"):
        registry.add_recognizer(CreditCardRecognizer(supported_language=language))
engine = AnalyzerEngine(registry=registry, nlp_engine=Blank(), supported_languages=LANGUAGES)
TYPES = {
    "EMAIL_ADDRESS": "EMAIL", "PHONE_NUMBER": "PHONE", "CREDIT_CARD": "CARD", "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP_ADDRESS", "US_SSN": "NATIONAL_ID", "US_ITIN": "NATIONAL_ID", "UK_NINO": "NATIONAL_ID",
    "UK_NHS": "NATIONAL_ID", "ES_NIF": "NATIONAL_ID", "ES_NIE": "NATIONAL_ID",
}

def found(text, locale):
    results = engine.analyze(text=text, language=locale[:2], score_threshold=0.4)
    return [(TYPES[each.entity_type], each.start, each.end) for each in results if each.entity_type in TYPES]
"""
SCRUBADUB = """
import scrubadub
TYPES = {
    "email": "EMAIL", "phone": "PHONE", "credit_card": "CARD", "social_security_number": "NATIONAL_ID",
    "national_insurance_number": "NATIONAL_ID", "date_of_birth": "DATE_OF_BIRTH", "credential": "URL_CREDENTIALS",
}
scrubbers = {}

def found(text, locale):
    if locale not in scrubbers:
        scrubbers[locale] = scrubadub.Scrubber(locale=locale)
        for name in ("date_of_birth",):
            try:
                scrubbers[locale].add_detector(name)
            except Exception:
                pass
    every = scrubbers[locale].iter_filth(text)
    flat = [each for one in every for each in (getattr(one, "filths", None) or [one])]
    return [(TYPES[each.type], each.beg, each.end) for each in flat if each.type in TYPES]
"""
DATATROVE = """
from datatrove.pipeline.formatters.pii import PIIFormatter
formatter = PIIFormatter()
REPLACERS = (("EMAIL", formatter.emails_replacer), ("IP_ADDRESS", formatter.ip_replacer))

def found(text, locale):
    return [
        (name, match.start(), match.end())
        for name, replacer in REPLACERS
        for match in replacer.regex.finditer(text)
        if replacer.validator is None or replacer.validator(match.group(0))
    ]
"""
_MAIN = """
import json, logging, sys, time, warnings
logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
out = sys.stdout
sys.stdout = sys.stderr
texts = [json.loads(line) for line in sys.stdin]
found(texts[0][1], texts[0][0])
begin = time.process_time()
lines = [found(text, locale) for locale, text in texts]
out.write(json.dumps({"found": lines, "cpu_s": time.process_time() - begin}))
"""
# The packages of each, beside what they need themselves: scrubadub 2 says of some of them no version.
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Presidio": (PRESIDIO + _MAIN, ("presidio-analyzer==2.2.360",)),
    "scrubadub": (SCRUBADUB + _MAIN, ("scrubadub==2.0.1", "setuptools<81")),
    "datatrove": (DATATROVE + _MAIN, ("datatrove==0.10.0", "regex")),
}
