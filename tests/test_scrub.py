"""`gptjax data scrub`: what it finds among planted items, and what it leaves alone."""

import json
import random
import string

import pytest

from gptjax.apps.data_prep.scrub import find, luhn, replace, scrub
from gptjax.errors import UserError

phonenumbers = pytest.importorskip("phonenumbers", reason="pip install -e '.[data]'")

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "was",
    "his",
    "he",
    "it",
    "with",
    "had",
    "not",
    "on",
    "which",
    "from",
]


def with_check_digit(digits: str) -> str:
    return next(digits + d for d in string.digits if luhn(digits + d))


def iban(rng: random.Random) -> str:
    account = "".join(rng.choices(string.digits, k=18))
    rest = int("".join(str(int(c, 36)) for c in account + "DE00")) % 97
    code = f"DE{98 - rest:02d}{account}"
    return rng.choice([code, " ".join(code[i : i + 4] for i in range(0, len(code), 4))])


def phone(rng: random.Random) -> str:
    region = rng.choice(["US", "GB", "DE", "FR", "JP", "BR", "IN"])
    number = phonenumbers.example_number_for_type(region, phonenumbers.PhoneNumberType.MOBILE)
    kind = phonenumbers.PhoneNumberFormat
    if region == "US":
        national = f"{rng.randint(201, 989)}-{rng.randint(201, 989)}-{rng.randint(0, 9999):04d}"
        return rng.choice([national, "+1 " + national, f"({national[:3]}) {national[4:]}"])
    return phonenumbers.format_number(number, rng.choice([kind.INTERNATIONAL, kind.E164]))


def mail(rng: random.Random) -> str:
    name = rng.choice(["anna", "j.doe", "x_y+tag", "o'neil", "müller"])
    return f"{name}{rng.randint(0, 99)}@{rng.choice(['example.com', 'mail.co.uk', 'uni-köln.de', 'a.b.org'])}"


def card(rng: random.Random) -> str:
    digits = with_check_digit(rng.choice("345") + "".join(rng.choices(string.digits, k=14)))
    joint = rng.choice(["", " ", "-"])
    return joint.join(digits[i : i + 4] for i in range(0, 16, 4))


def key(rng: random.Random) -> str:
    def some(n: int, alphabet: str = string.ascii_letters + string.digits) -> str:
        return "".join(rng.choices(alphabet, k=n))

    return rng.choice(
        [
            "AKIA" + some(16, string.ascii_uppercase + string.digits),
            "ghp_" + some(36),
            "sk-" + some(48),
            "AIza" + some(35),
            "hf_" + some(34),
        ]
    )


def address(rng: random.Random) -> str:
    return rng.choice(
        [".".join(str(rng.randint(1, 254)) for _ in range(4)), f"2001:db8:0:{rng.randint(1, 9999)}::1:5"]
    )


PLANTED = {"PHONE": phone, "EMAIL": mail, "CARD": card, "KEY": key, "IBAN": iban, "IP": address}


def test_recall_of_500_planted_items_of_six_kinds_is_at_least_99_percent():
    rng = random.Random(0)
    right = {kind: [] for kind in PLANTED}
    for i in range(500):
        kind = list(PLANTED)[i % len(PLANTED)]
        item = PLANTED[kind](rng)
        before, after = (" ".join(rng.choices(WORDS, k=8)) for _ in range(2))
        text = f"{before} {item}{rng.choice([' ', ', ', '. ', chr(10)])}{after}"
        hits = find(text, "US")
        right[kind].append(item not in replace(text, hits) and [hit.kind for hit in hits] == [kind])
    everything = [hit for hits in right.values() for hit in hits]
    assert sum(everything) / len(everything) >= 0.99, {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    assert all(sum(hits) / len(hits) >= 0.97 for hits in right.values())


def test_at_most_one_false_hit_in_100_kilobytes_of_plays(tinyshakespeare):
    text = tinyshakespeare.read_text()
    assert len(find(text, "US")) <= len(text) / 100_000


@pytest.mark.parametrize(
    "text",
    [
        "on 2024-01-05 at 10:22:31, version 1.2.3",
        "card 4111 1111 1111 1112 has a wrong digit",
        "token = aaaaaaaaaaaaaaaaaaaaaaaa",
        "pi is 3.14159265358979323846",
        "500,000,000 of 7,000,000,000 people",
        "ISBN 978-3-16-148410-0",
    ],
)
def test_what_only_resembles_an_item_stays(text):
    assert replace(text, find(text, "US")) == text


def test_the_command_writes_documents_and_a_report_without_what_was_replaced(tmp_path, capsys):
    rows = [{"text": "write to anna@example.com or call (212) 555-0123"}, {"text": "nothing here"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, report = tmp_path / "out.jsonl", tmp_path / "report.jsonl"
    scrub([str(tmp_path / "in.jsonl")], str(out), str(report), json=True)
    counts = json.loads(capsys.readouterr().out)
    assert counts["documents"] == 2
    assert {kind: n for kind, n in counts["replaced"].items() if n} == {"EMAIL": 1, "PHONE": 1}
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert texts == ["write to <EMAIL> or call <PHONE>", "nothing here"]
    places = [json.loads(line) for line in report.read_text().splitlines()]
    assert [rows[0]["text"][p["start"] : p["end"]] for p in places] == ["anna@example.com", "(212) 555-0123"]
    assert "anna" not in report.read_text()
    with pytest.raises(UserError, match="two letters"):
        scrub([str(tmp_path / "in.jsonl")], str(out), region="Utopia")
