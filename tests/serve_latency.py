"""Time to first token of `gptjax serve` on the quickstart's shape (0.8M) with a context of 4,352 tokens, as JSON:
python tests/serve_latency.py [ROUNDS]

Kinds of requests alternate within a round, so that a busy machine slows all of them; medians over the rounds.
"""

import json
import statistics
import sys
import time

import numpy as np
from conftest import ROOT
from serving import Client, serving, tiny_model

from gptjax.configfile import read_yaml
from gptjax.process import prepare_process
from gptjax.tokenizers import make_tokenizer

LONG, SYSTEM, CONTEXT = 4000, 1000, 4352
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.;:!?'ABCDEFGHIJKLMNOPQRSTUVWXYZ-&$3\n"


def first_token_s(server: Client, prompt: str) -> float:
    """Seconds from a request to the first event of its stream; the request then ends."""
    connection = server.connect()
    connection.connect()
    body = json.dumps({"prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True})
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.readline()
    elapsed = time.perf_counter() - started
    response.read()
    connection.close()
    return elapsed


def during_long_s(server: Client, rng: np.random.Generator) -> float:
    """The same for a short prompt, sent while a long one is being read."""
    connection = server.connect()
    body = json.dumps({"prompt": text(rng, LONG), "max_tokens": 1, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    time.sleep(rng.uniform(0.02, 0.1))  # the long prompt takes a second or more
    elapsed = first_token_s(server, text(rng, 12))
    connection.getresponse().read()
    connection.close()
    return elapsed


def text(rng: np.random.Generator, n: int) -> str:
    return "".join(LETTERS[i] for i in rng.integers(0, len(LETTERS), n))


def measure(server: Client, rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        system = text(rng, SYSTEM)
        for kind, ask in (
            ("short_idle_s", lambda: first_token_s(server, text(rng, 12))),
            ("short_beside_long_s", lambda: during_long_s(server, rng)),
            ("long_s", lambda: first_token_s(server, text(rng, LONG))),
            ("system_first_s", lambda: first_token_s(server, system + text(rng, 12))),  # noqa: B023
            ("system_again_s", lambda: first_token_s(server, system + text(rng, 12))),  # noqa: B023
        ):
            found.setdefault(kind, []).append(ask())
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    medians["short_beside_long_over_idle"] = medians["short_beside_long_s"] / medians["short_idle_s"]
    medians["system_again_over_first"] = medians["system_again_s"] / medians["system_first_s"]
    return {kind: round(value, 4) for kind, value in medians.items()}


if __name__ == "__main__":
    prepare_process(None)
    shape = {**read_yaml(ROOT / "configs" / "quickstart.yaml")["model"], "context_length": CONTEXT}
    lm = tiny_model(make_tokenizer("char", [LETTERS]), **shape)
    with serving(lm, slots=4) as server:
        print(json.dumps(measure(server, int(sys.argv[1]) if len(sys.argv) > 1 else 20)))
