"""Tokens a second of servers with OpenAI's interface, together for several clients, as JSON:
python tests/serve_throughput.py URL=MODEL [URL=MODEL ...] [--clients 8] [--rounds 5] [--tokens 64]

Servers take turns within a round, so that a busy machine slows all of them; medians over the rounds. Each client
sends one request of `--tokens` tokens, greedy, on a prompt of its own.
"""

import argparse
import concurrent.futures
import json
import statistics
import time
import urllib.request

WORDS = ["rivers", "mountains", "cities", "planets", "animals", "painters", "languages", "colours"]


def complete(url: str, model: str, number: int, tokens: int) -> int:
    """Return how many tokens one request got."""
    text = f"Question {number}: write a long list of {WORDS[number % len(WORDS)]}.\nAnswer:"
    values = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(values).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    return answer["usage"]["completion_tokens"]


def measure(url: str, model: str, clients: int, tokens: int) -> tuple[float, int]:
    """Return the tokens a second of all clients together, and how many tokens these were."""
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        drawn = sum(pool.map(lambda number: complete(url, model, number, tokens), range(clients)))
    return drawn / (time.perf_counter() - started), drawn


def main() -> None:
    """Measure the servers in turns, and print the median of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("servers", nargs="+")
    for name, default in (("clients", 8), ("rounds", 5), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    servers = [server.partition("=")[::2] for server in given.servers]
    found: dict[str, list[tuple[float, int]]] = {server: [] for server in given.servers}
    for url, model in servers:
        measure(url, model, given.clients, 4)  # warm up
    for _ in range(given.rounds):
        for server, (url, model) in zip(given.servers, servers, strict=True):
            found[server].append(measure(url, model, given.clients, given.tokens))
    medians = {
        server: {"tokens_per_s": round(statistics.median(rate for rate, _ in values), 2), "tokens": values[-1][1]}
        for server, values in found.items()
    }
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
