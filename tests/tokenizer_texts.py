"""Texts on which tokenizers are compared: twenty scripts, emoji, control characters, names of tokens, long spaces."""

import random

SCRIPTS = (
    "The king's son, I'll say, isn't here; WE'RE 1234567 strong in 3.14 ways.",
    "Größe, Straße, naïve café, Ærøskøbing, Żółć, İstanbul, œuvre",
    "Привет, как дела? Ёлка и съезд в 2024 году.",
    "Καλημέρα κόσμε, τι κάνεις; Άνθρωπος",
    "שלום עולם, מה שלומך? בְּרֵאשִׁית",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣٤ لغةٌ",
    "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय १२३",
    "হ্যালো বিশ্ব, কেমন আছো? ৪৫৬",
    "வணக்கம் உலகம், எப்படி இருக்கிறீர்கள்?",
    "హలో ప్రపంచం, మీరు ఎలా ఉన్నారు?",
    "สวัสดีชาวโลก เป็นอย่างไรบ้าง ๑๒๓",
    "გამარჯობა მსოფლიო, როგორ ხარ?",
    "Բարեւ աշխարհ, ինչպե՞ս ես",
    "ሰላም ዓለም፣ እንዴት ነህ?",
    "ꦱꦸꦒꦼꦁ ꦫꦮꦸꦃ, ສະບາຍດີ ໂລກ",
    "你好,世界!今天天气怎么样?一二三。",
    "こんにちは世界、お元気ですか?ガギグ",
    "안녕하세요 세계, 어떻게 지내세요? 각",
    "ᚠᚢᚦᚨᚱᚲ 𐌰𐌱𐌲 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ＦＵＬＬ ｗｉｄｔｈ ﬁne",
    "ខ្មែរ မြန်မာ བོད་ཡིག ᠮᠣᠩᠭᠣᠯ",
)
ODD = (
    "🎈👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 👍🏽 ☃️",
    "e\u0301 vs é, \u1e9b\u0323 \ufb01 \u2126 ①½",
    "\x00\x01\x07\x1b[0m\x7f \x1c\x1d\x1e\x1f\x85\u2028\u2029",
    "\ufeffBOM \u200b\u200c\u200d\u2060 \u00a0\u3000\u2003 \ufffd \U0010ffff \ue000",
    "tab\tand\r\nlines\n\n\n\rand\r\r \n x",
    "def f(x):\n    return {'a': [x**2, -1e-9], \"b\": x != 0}  # <- ok\n\t\treturn\n",
    "https://example.org/a_b?c=d&e=%20#f user@host.org C:\\dir\\x $5.00 €7 100% a/b",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!????----____====....",
    "▁▁ under ▁bar Ġthe ĠĊ",
    "",
    " ",
    "\n",
)
NAMES = (
    *("<|endoftext|>", "<|begin|>", "</s>", "<s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|user|>"),
    *("<|extra|>", "[CLS]", "[SEP]", "[UNK]", "<0x0A>", "<|eot_id|>", "<mask>"),
)


def texts(count: int = 300, seed: int = 0) -> list[str]:
    """The first so many texts: the plain ones, then random mixtures, the same on every machine."""
    rng = random.Random(seed)
    whole = [*SCRIPTS, *ODD]
    whole += [*NAMES] + [f"a{name}b" for name in NAMES[:8]] + [f" {name} \n{name}" for name in NAMES[:8]]
    whole += [" " * n + "x" + " " * (n // 2) for n in (2, 3, 7, 8, 16, 31, 64, 200)]
    pieces = [*SCRIPTS, *ODD, *NAMES, "  ", "    ", "\n\n", "\t", " a", "1", "é"]
    while len(whole) < count:
        parts = [rng.choice(pieces) for _ in range(rng.randint(2, 5))]
        cut = [part[rng.randrange(len(part) or 1) :] if rng.random() < 0.5 else part for part in parts]
        whole.append(rng.choice(("", " ", "\n")).join(cut))
    return rng.sample(whole, count) if count < len(whole) else whole
