"""A tiny model behind the HTTP interface, for tests: a server in a thread, and requests to it."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from conftest import make_config, without_zeros

from gptjax.generate import LanguageModel
from gptjax.nn.transformer import init_params
from gptjax.tokenizers import HuggingFaceTokenizer

CHATML = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONTEXT = 128


def tiny_tokenizer(hf_directory: Path, template: str | None = CHATML) -> HuggingFaceTokenizer:
    files = {name: (hf_directory / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    config = json.loads(files["tokenizer_config.json"])
    config["chat_template"] = template
    return HuggingFaceTokenizer({**files, "tokenizer_config.json": json.dumps(config)})


def tiny_model(tokenizer: Any, **model: Any) -> LanguageModel:
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "context_length": CONTEXT, "init": "gpt2"}
    cfg = make_config({**shape, "vocab_size": tokenizer.vocab_size, "vocab_multiple": 8, **model}).model
    params = jax.tree.map(lambda x: 5 * x, without_zeros(init_params(cfg, jax.random.key(0))))  # far from uniform
    return LanguageModel(cfg, params, tokenizer)


@contextmanager
def serving(lm: LanguageModel | list, **settings: Any) -> Iterator["Client"]:
    """Serve a model, or groups of models, from a thread until the block ends."""
    from gptjax.apps.serve.models import Group, Member
    from gptjax.apps.serve.run import Settings, run_server

    groups = lm if isinstance(lm, list) else [Group(lm, [Member("tiny", lm)])]

    running: list[Any] = []
    listening = threading.Event()

    def started(server: Any, address: str) -> None:
        running.extend([server, address])
        listening.set()

    def run() -> None:
        try:
            run_server(groups, Settings(**{"context": groups[0].lm.config.context_length, **settings}), started)
        finally:
            listening.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert listening.wait(60) and running
    client = Client(running[1], settings.get("api_key"))
    client.running, client.thread = running[0], thread
    client.application = client.running._application
    client.scheduler = client.application._schedulers[0]
    try:
        client.wait_until_ready()
        yield client
    finally:
        running[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class Client:
    """Sends requests to a server, and returns status and JSON."""

    def __init__(self, address: str, key: str | None = None):
        self.address, self.key = address, key
        self.running: Any = None
        self.thread: Any = None
        self.application: Any = None
        self.scheduler: Any = None
        self.host, self.port = address.removeprefix("http://").split(":")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, int(self.port), timeout=60)

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = self.connect()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key and "Authorization" not in named:
            named["Authorization"] = f"Bearer {self.key}"
        try:
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, **values: Any) -> tuple[int, Any]:
        status, body = self.send("POST", path, json.dumps(values).encode(), Content_Type="application/json")
        return status, json.loads(body)

    def complete(self, prompt: Any, **values: Any) -> Any:
        status, answer = self.post("/v1/completions", prompt=prompt, **values)
        assert status == 200, answer
        return answer

    def metrics(self) -> dict[str, float]:
        """Return the metrics by their names with labels, and without them summed over all labels."""
        found: dict[str, float] = {}
        for line in self.send("GET", "/metrics")[1].decode().splitlines():
            if line[0] != "#":
                name, value = line.rsplit(" ", 1)
                for key in {name, name.partition("{")[0]}:
                    found[key] = found.get(key, 0.0) + float(value)
        return found

    def wait_until_ready(self) -> None:
        self.wait(lambda: self.send("GET", "/healthz")[0] == 200)

    def wait(self, what: Any, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end
            time.sleep(0.01)
