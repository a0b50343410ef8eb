"""Requests that a server refuses, with what it says of them, and nonsense made of these."""

import json
from collections.abc import Sequence

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "a"}]
HOSTILE = "<script>alert(1)</script>"
BOMBS = [
    {"$ref": "http://localhost/x"},
    {"type": HOSTILE},
    {"anyOf": [{"type": "string", "pattern": "x" * 70000}]},
]
REFUSED = [
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": [{"role": HOSTILE, "content": "a"}]}, 400, "role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "text alone"),
    (CHAT, {"messages": ["a"]}, 400, "object"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools"),
    (CHAT, {"messages": HELLO, "top_logprobs": 3}, 400, "logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, 400, "[0, 20]"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 9000}]}, 400, "tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 10**6}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "n": 10000}, 400, "128"),
    (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}, 400, "unknown field"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    *((CHAT, {"messages": HELLO, "response_format": x}, 400, "response_format") for x in (1, {"type": HOSTILE})),
    *(
        (TEXT, {"response_format": {"type": "json_schema", "json_schema": {"schema": x}}}, 400, "schema")
        for x in BOMBS
    ),
    (TEXT, {"prompt": "a", "n": 0}, 400, "n 0"),
    (TEXT, {"prompt": "a", "n": 2, "best_of": 1}, 400, "best_of"),
    (TEXT, {"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of"),
    (TEXT, {"prompt": ["a"] * 129}, 400, "128"),
    (TEXT, {"prompt": [10**9]}, 400, "ids"),
    (TEXT, {"prompt": [[]]}, 400, "ids"),
    (TEXT, {"prompt": {"a": 1}}, 400, "prompt"),
    (TEXT, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    (TEXT, {"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
    (TEXT, {"prompt": "a", "temperature": -1}, 400, "temperature"),
    (TEXT, {"prompt": "a", "temperature": 1e999}, 400, "JSON"),
    (TEXT, {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    (TEXT, {"prompt": "a", "stop": ["x"] * 17}, 400, "stop"),
    (TEXT, {"prompt": "a", "stop": [""]}, 400, "stop"),
    (TEXT, {"prompt": "a", "logprobs": 6}, 400, "logprobs"),
    (TEXT, {"prompt": "a", "logit_bias": {"5": 100}}, 400, "logit_bias"),
    (TEXT, {"prompt": "a", "stream_options": 3, "stream": True}, 400, "stream_options"),
    (TEXT, {"prompt": "a", "model": HOSTILE}, 404, "not here"),
    (TEXT, {"prompt": "a", "temprature": 1}, 400, "temperature"),
    ("/v1/embeddings", {}, 400, "input"),
    ("/v1/embeddings", {"input": "a", "dimensions": 5}, 400, "dimensions"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "x"}, 400, "encoding_format"),
    ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "either"),
    ("/inspect", {"prompt": "a", "messages": HELLO}, 400, "either"),
    ("/inspect", {"prompt": "a", "layer": 1}, 400, "layer 1 must be an integer in [0, 0]"),
    ("/inspect", {"prompt": "a", "head": -1}, 400, "head"),
    ("/inspect", {"prompt": "a " * 200}, 400, "at most 128 are looked at"),
    ("/inspect", {"prompt": "a", "max_tokens": 3}, 400, "unknown field"),
]

BODIES = [
    (b"{", 400, "JSON"),
    (b"[1]", 400, "object"),
    (b'{"prompt": "\xff\xfe"}', 400, "UTF-8"),
    (b'{"prompt": NaN}', 400, "NaN"),
    (b"[" * 10**5, 400, "nested"),
    (b'{"n": ' + b"9" * 10**4 + b"}", 400, "JSON"),
    (b" " * (2**21 + 1), 413, "bytes"),
]

ODD = [
    None,
    -1,
    0,
    1,
    2**70,
    1e300,
    "",
    "é\0",
    HOSTILE,
    [],
    {},
    [[]],
    ["a", 1],
    True,
    "a" * 500,
    {"type": "text"},
]
FIELDS = [
    "prompt",
    "messages",
    "n",
    "stop",
    "temperature",
    "seed",
    "stream",
    "logprobs",
    "echo",
    "top_p",
    "é",
    "model",
]


def send_nonsense(server, rng, n: int, models: Sequence[str] = ()) -> None:
    """Send mutated requests; every answer is JSON with a status that a client's fault or a good request has.

    Args:
        models: names of the server's models, of which requests name one or none.
    """
    good = [(path, {"max_tokens": 2, **values}) for path, values, _, _ in REFUSED]
    for _ in range(n):
        path, values = good[rng.integers(len(good))]
        changed = {FIELDS[rng.integers(len(FIELDS))]: ODD[rng.integers(len(ODD))] for _ in range(rng.integers(4))}
        if models and rng.random() < 0.8:
            changed["model"] = models[rng.integers(len(models))]
        body = bytearray(json.dumps(values | changed).encode())
        if rng.random() < 0.3:
            body[rng.integers(len(body))] = rng.integers(256)
        if rng.random() < 0.1:
            del body[rng.integers(len(body)) :]
        status, answer = server.send("POST", path, bytes(body), Content_Type="application/json")
        assert status in (200, 400, 404, 413), (status, answer, bytes(body))
        assert status == 200 or json.loads(answer)["error"]["message"]
