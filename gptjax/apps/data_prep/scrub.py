"""`gptjax data scrub`: replace personal data and secrets in documents by the name of their kind."""

import ipaddress
import json as json_format
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gptjax.data.reading import Reading, documents
from gptjax.data.sources import list_files, pieces_of
from gptjax.errors import UserError
from gptjax.shell.files import write_atomically
from gptjax.shell.paths import UserPath, writing

LEAST_BITS = (
    3.0  # entropy of a character in a secret that has no known prefix; English words have fewer distinct ones
)


class Hit(NamedTuple):
    """A place of a text that is replaced: characters start ... end - 1."""

    kind: str
    start: int
    end: int


def luhn(digits: str) -> bool:
    """Return whether digits have the check digit of payment cards (ISO/IEC 7812-1, annex B)."""
    values = [int(d) for d in reversed(digits)]
    doubled = [2 * d - 9 * (d > 4) for d in values[1::2]]
    return (sum(values[::2]) + sum(doubled)) % 10 == 0


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


def _is_iban(text: str) -> bool:
    """Return whether a text has the check digits of an IBAN (ISO 13616: modulo 97)."""
    code = text.replace(" ", "").upper()
    return 15 <= len(code) <= 34 and int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_secret(text: str) -> bool:
    """Return whether a text looks random: at least LEAST_BITS of entropy a character, and a digit."""
    counts = Counter(text)
    bits = -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())
    return bits >= LEAST_BITS and any(c.isdigit() for c in text)


def _any(text: str) -> bool:
    return True


# Kind -> pattern, and what its last group must satisfy. An earlier kind wins where two overlap.
PATTERNS: list[tuple[str, re.Pattern[str], Callable[[str], bool]]] = [
    ("KEY", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.S), _any),
    ("KEY", re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), _any),  # AWS
    ("KEY", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{60,}|glpat-[\w-]{20,})"), _any),
    ("KEY", re.compile(r"\b(?:sk|pk|rk)[-_](?:live_|test_|proj-|ant-)?[A-Za-z0-9_-]{20,}"), _is_secret),
    ("KEY", re.compile(r"\bAIza[\w-]{35}|\bhf_[A-Za-z0-9]{30,}|\bxox[abprs]-[A-Za-z0-9-]{10,}"), _any),
    ("KEY", re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"), _any),  # JSON Web Token
    (
        "KEY",
        re.compile(
            r"(?i)(?:key|secret|token|passw(?:or)?d|credential)s?[\"']?\s*[:=]\s*[\"']?([A-Za-z0-9/+_.-]{16,}=*)"
        ),
        _is_secret,
    ),
    ("EMAIL", re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]+@(?:[^\W_](?:[\w-]*[^\W_])?\.)+[^\W\d_]{2,}"), _any),
    ("IBAN", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[0-9A-Z]{4}){2,7}(?: ?[0-9A-Z]{1,3})?\b"), _is_iban),
    ("CARD", re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-])"), _is_card),
    ("SSN", re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\d-])"), _any),
    ("IP", re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)"), _is_address),
    ("IP", re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{0,4}(?![\w:])"), _is_address),
]
KINDS = ("KEY", "EMAIL", "IBAN", "CARD", "SSN", "IP", "PHONE")


def find(text: str, region: str) -> list[Hit]:
    """Return the places to replace, in order, none overlapping.

    Args:
        region: country (ISO 3166) whose national phone numbers count; those with + count everywhere.
    """
    hits: list[Hit] = []

    def add(kind: str, start: int, end: int) -> None:
        if all(end <= hit.start or hit.end <= start for hit in hits):
            hits.append(Hit(kind, start, end))

    for kind, pattern, check in PATTERNS:
        for match in pattern.finditer(text):
            group = match.lastindex or 0
            if check(match[group]):
                add(kind, *match.span(group))
    for start, end in _phones(text, region):
        add("PHONE", start, end)
    return sorted(hits, key=lambda hit: hit.start)


DIGITS = re.compile(r"\d(?:[^\n\d]{0,4}\d){6,}")  # without which a text has no phone number


def _phones(text: str, region: str) -> Iterator[tuple[int, int]]:
    """Yield the spans of phone numbers: valid ones, and possible ones that are written as such."""
    import phonenumbers

    if not DIGITS.search(text):
        return
    for match in phonenumbers.PhoneNumberMatcher(text, region, phonenumbers.Leniency.POSSIBLE, max_tries=len(text)):
        written = match.raw_string.startswith("+") or re.search(r"\d[ ().-]+\d", match.raw_string)
        if written or phonenumbers.is_valid_number(match.number):
            yield match.start, match.end


def replace(text: str, hits: list[Hit]) -> str:
    """Return the text with every hit replaced by its kind, such as <EMAIL>."""
    parts, end = [], 0
    for hit in hits:
        parts += [text[end : hit.start], f"<{hit.kind}>"]
        end = hit.end
    return "".join([*parts, text[end:]])


def scrub(
    sources: list[UserPath],
    out: UserPath,
    report: UserPath | None = None,
    region: str = "US",
    text_field: str = "text",
    json: bool = False,
) -> None:
    """Replace mail addresses, phone numbers, card and account numbers, IP addresses, SSNs and keys by their kind.

    Args:
        sources: as for gptjax data prepare.
        out: the JSON Lines file to write, a document a line.
        report: also write where each replacement is to this JSON Lines file, without what was replaced.
        region: the country whose national phone numbers are recognised; international ones (+44 ...) always are.
        text_field: the field of a JSON line that holds a document's text.
        json: print the counts as JSON.
    """
    try:
        import phonenumbers
    except ImportError:
        raise UserError("gptjax data scrub needs: pip install 'gptjax[data]'") from None
    if region.upper() not in phonenumbers.SUPPORTED_REGIONS:
        raise UserError(f"region {region!r} is not a country's code of two letters; give one such as US or DE")
    counts, found = Counter(dict.fromkeys(KINDS, 0)), []
    how, n, clean = Reading(text_field, None), 0, []
    for piece in pieces_of([list_files(source).files for source in sources], how, val_frac=0):
        for document in documents(piece, how):
            hits = find(document.text, region.upper())
            counts.update(hit.kind for hit in hits)
            found += [{"document": n, "kind": hit.kind, "start": hit.start, "end": hit.end} for hit in hits]
            clean.append(json_format.dumps({"text": replace(document.text, hits)}, ensure_ascii=False))
            n += 1
    for path, lines in ((out, clean), (report, map(json_format.dumps, found))):
        if path is not None:
            with writing(path) as file:
                write_atomically(file, "".join(f"{line}\n" for line in lines))
    print(_summary(out, n, counts, json))


def _summary(out: str, n: int, counts: Counter[str], json: bool) -> str:
    values: dict[str, Any] = {"documents": n, "replaced": dict(counts)}
    if json:
        return json_format.dumps(values)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return f"{out}: {n:,} documents; replaced {listed or 'nothing'}"
