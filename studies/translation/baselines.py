"""Score what needs no model: a copy of the source, and the translation of the most similar training verse.

python studies/translation/baselines.py PAIRS.tsv     needs sacrebleu; see docs/applications.md

Similar is the cosine of word counts, each word weighted by log(N / verses that have it).
"""

import re
import sys
from collections import Counter, defaultdict

import numpy as np
from make_data import split
from sacrebleu.metrics import BLEU, CHRF


def words(text: str) -> Counter:
    """Return how often each word occurs, in lower case."""
    return Counter(re.findall(r"\w+", text.lower()))


class Nearest:
    """Finds the most similar of given texts."""

    def __init__(self, texts: list[str]):
        counts = [words(text) for text in texts]
        frequency = Counter(word for some in counts for word in some)
        self.idf = {word: np.log(len(texts) / n) for word, n in frequency.items()}
        places: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for number, some in enumerate(counts):
            norm = np.sqrt(sum((n * self.idf[word]) ** 2 for word, n in some.items())) or 1.0
            for word, n in some.items():
                places[word].append((number, n * self.idf[word] / norm))
        self.places = {w: (np.array([n for n, _ in p]), np.array([v for _, v in p])) for w, p in places.items()}
        self.count = len(texts)

    def of(self, text: str) -> int:
        """Return the number of the text with the largest cosine."""
        scores = np.zeros(self.count)
        for word, n in words(text).items():
            if word in self.places:
                numbers, values = self.places[word]
                scores[numbers] += n * self.idf[word] * values
        return int(scores.argmax())


def report(name: str, found: list[str], references: list[str]) -> None:
    """Print the chrF and BLEU of some translations."""
    scores = (metric.corpus_score(found, [references]).score for metric in (CHRF(), BLEU()))
    print(f"{name}: chrF {{:.2f}}, BLEU {{:.2f}}".format(*scores))


if __name__ == "__main__":
    train, test = split(sys.argv[1])
    for direction, turn in (("en>es", 1), ("es>en", -1)):
        sources, targets = zip(*(pair[::turn] for pair in train), strict=True)
        asked, references = map(list, zip(*(pair[::turn] for pair in test), strict=True))
        report(f"{direction}, copy of the source", asked, references)
        nearest = Nearest(list(sources))
        report(f"{direction}, nearest training verse", [targets[nearest.of(text)] for text in asked], references)
