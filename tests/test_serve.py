"""The server: OpenAI's own client, answers that do not depend on the others, clients that leave, and a signal."""

import concurrent.futures
import json
import queue
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")
pytest.importorskip("jinja2", reason="pip install -e '.[serve]'")

import jax
from bad_requests import BODIES, HOSTILE, REFUSED, TEXT, send_nonsense
from conftest import ROOT, run_script
from serving import CONTEXT, Client, serving, tiny_model, tiny_tokenizer

from gptjax.apps.serve.metrics import Meters
from gptjax.apps.serve.scheduler import Job, Scheduler
from gptjax.engine import Request
from gptjax.inspection import Inspector
from gptjax.sampling import Sampling


@pytest.fixture(scope="module")
def lm(hf_directory):
    return tiny_model(tiny_tokenizer(hf_directory), n_layers=1)


@pytest.fixture(scope="module")
def server(lm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptjax.decoding.prompts.CPU_CHUNK_TOKENS", 16)  # so that most prompts have several
        with serving(lm, slots=4) as client:
            yield client


@pytest.fixture
def openai(server):
    library = pytest.importorskip("openai", reason="pip install -e '.[peer]'")
    return library.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def prompts(n: int) -> list[str]:
    rng = np.random.default_rng(0)
    words = ["the king", " that is", " this dies", " queen", " and", " what", "\n"]
    return ["".join(words[i] for i in rng.integers(0, len(words), 1 + number % 40)) for number in range(n)]


@pytest.mark.whole
def test_32_clients_get_the_answers_that_each_gets_alone(server, lm):
    def ask(number: int) -> tuple[str, str]:
        temperature = [0.0, 0.9][number % 2]
        how = {"temperature": temperature, "seed": number, "max_tokens": 20, "top_p": [1, 0.9][number % 3 > 0]}
        answer = server.complete(prompts(32)[number], **how)["choices"][0]
        return answer["text"], answer["finish_reason"]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    assert together == [ask(number) for number in range(32)]
    assert len(set(together)) > 20
    used = server.metrics()
    assert used["gptjax_slots"] == 4 and used["gptjax_slots_used"] == used["gptjax_queue_length"] == 0


def test_the_same_text_as_sample(server, lm):
    """A prompt's answers are those of `--num_samples`, and several prompts are rows one after another."""
    some = prompts(3)
    for sampling, how in (
        (Sampling(0.0), {"temperature": 0}),
        (Sampling(0.8, 40), {"temperature": 0.8, "top_k": 40}),
    ):
        wanted = lm.complete([p for p in some for _ in range(2)], 20, sampling, seed=7)
        found = server.complete(some, n=2, seed=7, max_tokens=20, **how)["choices"]
        assert [c["text"] for c in found] == [c.text for c in wanted]


def test_a_beginning_that_was_read_is_not_read_again_and_changes_nothing(server, lm):
    text = prompts(36)[35] + " this is asked once alone"
    first, second = (server.complete(text, max_tokens=8, seed=1) for _ in range(2))
    read = first["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 32
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == (read - 1) // 16 * 16 >= 32
    assert first["choices"] == second["choices"]
    assert first["choices"][0]["text"] == lm.complete([text], 8, Sampling(1.0), seed=1)[0].text


def test_openais_client_completes_chats_and_streams(openai, server, lm):
    assert [m.id for m in openai.models.list()] == ["tiny"] == [openai.models.retrieve("tiny").id]
    whole = openai.completions.create(model="tiny", prompt="the king", temperature=0, max_tokens=12, logprobs=3)
    choice = whole.choices[0]
    assert choice.text == lm.complete(["the king"], 12, Sampling(0.0))[0].text
    assert "".join(choice.logprobs.tokens) == choice.text or "�" in choice.text
    assert all(len(top) >= 3 for top in choice.logprobs.top_logprobs)
    assert whole.usage.completion_tokens == len(choice.logprobs.tokens) == 12
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "who is the king?"}]
    how = {"model": "tiny", "messages": talk, "seed": 5, "max_completion_tokens": 15, "logprobs": True}
    answer = openai.chat.completions.create(**how, top_logprobs=4, n=2)
    contents = [c.message.content for c in answer.choices]
    text = "<system>Be brief.\n<user>who is the king?\n<assistant>"
    ids = lm.tokenizer.encode(text).tolist()
    assert answer.usage.prompt_tokens == len(ids) and len(set(contents)) == 2
    logprobs = answer.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in logprobs).decode(errors="replace") == contents[0]
    assert all(len(t.top_logprobs) == 4 for t in logprobs)
    parts: dict[int, str] = {0: "", 1: ""}
    usage = None
    for chunk in openai.chat.completions.create(**how, n=2, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for part in chunk.choices:
            parts[part.index] += part.delta.content or ""
    assert [parts[0], parts[1]] == contents and usage == answer.usage.model_copy(
        update={"prompt_tokens_details": usage.prompt_tokens_details}
    )


def test_a_stop_ends_the_text_before_it_in_whole_and_in_parts(openai, lm):
    free = lm.complete(["the king"], 30, Sampling(0.9), seed=3)[0].text
    stop = free[8:11]
    how = {
        "model": "tiny",
        "prompt": "the king",
        "temperature": 0.9,
        "seed": 3,
        "max_tokens": 30,
        "stop": [stop, "@@"],
    }
    whole = openai.completions.create(**how).choices[0]
    assert whole.text == free[: free.index(stop)] and whole.finish_reason == "stop"
    parts = [chunk.choices[0] for chunk in openai.completions.create(**how, stream=True)]
    assert "".join(part.text for part in parts) == whole.text and parts[-1].finish_reason == "stop"


def test_best_of_returns_the_likeliest(server):
    how = {"seed": 2, "max_tokens": 6, "logprobs": 0}
    all_four = server.complete("the", n=4, **how)["choices"]
    mean = [np.mean(c["logprobs"]["token_logprobs"]) for c in all_four]
    best = server.complete("the", n=1, best_of=4, **how)
    assert best["choices"][0]["text"] == all_four[int(np.argmax(mean))]["text"]
    assert best["usage"]["completion_tokens"] == 24


def test_an_echo_scores_the_prompt_as_the_model_does(server, lm):
    text = prompts(30)[29]
    for prompt in (text, lm.prompt_ids(text)):
        choice = server.complete(prompt, max_tokens=1, temperature=0, logprobs=1, echo=True)["choices"][0]
        ids = lm.prompt_ids(text)
        log_p = np.asarray(jax.nn.log_softmax(lm.logits([ids])[0], axis=-1))
        scores = choice["logprobs"]["token_logprobs"]
        assert scores[0] is None and len(scores) == len(ids) + 1
        np.testing.assert_allclose(scores[1:-1], log_p[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
        np.testing.assert_allclose(scores[-1], log_p[-1].max(), atol=1e-4)
        tops = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:]]
        np.testing.assert_allclose(tops, log_p.max(-1), atol=1e-4)
        assert choice["text"].startswith(text)
    scored = server.complete(text, max_tokens=0, logprobs=1, echo=True)["choices"][0]
    assert scored["logprobs"]["token_logprobs"] == scores[:-1] and scored["text"] == text


def test_an_embedding_is_the_mean_of_the_last_hidden_states(openai, lm):
    texts = prompts(12)[10:]
    found = openai.embeddings.create(model="tiny", input=texts).data
    head = np.asarray(lm.params[0]["embed"])[: lm.config.vocab_size]
    for text, one in zip(texts, found, strict=True):
        of_logits = lm.logits([lm.prompt_ids(text)])[0].mean(axis=0)  # logits are the states times the head
        np.testing.assert_allclose(head @ np.array(one.embedding), of_logits, atol=1e-3)


def test_ids_of_a_text_and_of_a_conversation(server, lm):
    status, found = server.post("/tokenize", prompt="the king")
    assert status == 200 and found["ids"] == lm.tokenizer.encode_prompt("the king").tolist()
    assert found["count"] == len(found["tokens"]) and "".join(found["tokens"][1:]) == "the king"
    status, found = server.post("/tokenize", messages=[{"role": "user", "content": "a"}])
    assert found["ids"] == lm.tokenizer.encode("<user>a\n<assistant>").tolist()


def test_a_look_inside_is_what_the_model_computes(server, lm):
    text = "the king and queen"
    ids = np.array(lm.prompt_ids(text), np.int32)
    trace = Inspector(lm).trace(ids)
    for head in (0, 3):
        status, found = server.post("/inspect", prompt=text, head=head)
        assert status == 200 and (found["layers"], found["heads"]) == (1, 4)
        for i, row in enumerate(found["attention"]):
            np.testing.assert_allclose(row, trace.attention[0, head, i, : i + 1], atol=6e-4)
    shares = np.asarray(jax.nn.softmax(trace.lens))
    got = [[cell["probability"] for cell in row] for row in found["lens"]]
    np.testing.assert_allclose(got, shares.max(-1), atol=1e-5)
    tokens = [cell["probability"] for cell in found["tokens"][1:]]
    np.testing.assert_allclose(tokens, shares[-1, np.arange(len(ids) - 1), ids[1:]], rtol=1e-3)
    status, found = server.post("/inspect", messages=[{"role": "user", "content": "a"}])
    assert status == 200 and "".join(token["text"] for token in found["tokens"]) == "<user>a\n<assistant>"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots_within_a_token(server, monkeypatch, stream):
    """Four texts; the server stands still after their first token until it has seen that the client left."""
    may_draw, drawn, draw = threading.Semaphore(1), [], server.scheduler._draw

    def draw_when_allowed(jobs: list[Job]) -> None:
        if len(jobs) == 4:  # all prompts are read
            assert may_draw.acquire(timeout=60)
            drawn.append(jobs)
        draw(jobs)

    monkeypatch.setattr(server.scheduler, "_draw", draw_when_allowed)
    body = json.dumps({"prompt": "the", "max_tokens": CONTEXT - 8, "stream": stream, "n": 4, "seed": 1})
    connection = server.connect()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    server.wait(lambda: drawn)
    if stream:
        connection.getresponse().fp.readline()
    connection.close()
    server.wait(lambda: all(job.cancelled for job in drawn[0]))
    may_draw.release()
    server.wait(lambda: server.metrics()["gptjax_slots_used"] == 0)
    assert len(drawn) <= 2


def test_a_long_prompt_does_not_hold_up_a_short_one(server):
    """By the order of events, not by the clock: the short prompt's answer is whole before the long prompt is read."""
    draws, events = Request(Sampling(0.0), np.zeros(2, np.uint32), 3), queue.Queue()
    long, short = (Job([7] * n, draws, inbox=SimpleNamespace(put_nowait=events.put)) for n in (CONTEXT - 4, 4))
    server.scheduler.submit([long, short])
    found = [events.get(timeout=60) for _ in range(6)]
    assert [event.job for event in found] == [short] * 3 + [long] * 3
    assert [event.finish for event in found] == [None, None, "length"] * 2


def test_a_request_that_arrives_before_the_server_is_ready_is_answered(lm):
    events: list = []
    scheduler = Scheduler(lm, 2, CONTEXT, events.extend, Meters())
    job = Job([7] * 4, Request(Sampling(0.0), np.zeros(2, np.uint32), 3), inbox=queue.Queue())
    scheduler.submit([job])
    scheduler._warm_up()
    assert [(event.job, event.finish) for event in events] == [(job, None), (job, None), (job, "length")]


def test_short_prompts_are_read_first_and_long_ones_in_their_turn(lm, monkeypatch):
    """Turns of a scheduler without its thread: what each reads, in order, and what it delivers."""
    monkeypatch.setattr("gptjax.decoding.prompts.CPU_CHUNK_TOKENS", 16)
    draws, events, parts = Request(Sampling(0.0), np.zeros(2, np.uint32), 1), [], []
    scheduler = Scheduler(lm, 8, CONTEXT, events.extend, Meters())
    advance = scheduler._reader.advance
    monkeypatch.setattr(scheduler._reader, "advance", lambda r: (parts.append(len(r.ids)), advance(r)))

    def turn() -> tuple[list[int], list[int]]:
        events.clear(), parts.clear()
        scheduler.turn()
        return list(parts), [len(event.job.ids) for event in events]

    rng = np.random.default_rng(0)
    jobs = {n: Job(rng.integers(0, 99, n).tolist(), draws) for n in (90, 60, 12, 11)}
    scheduler.submit([jobs[90]])
    assert turn() == ([90], [])
    scheduler.submit([jobs[n] for n in (60, 12, 11)])
    assert turn() == ([11], [11])  # its token comes before a part of a longer prompt
    assert turn() == ([12], [12])
    assert turn() == ([60], [])
    assert turn() == ([60], [])
    assert turn() == ([90], [])  # which was passed over four times
    for _ in range(5 * (-(-60 // 16) + -(-90 // 16))):
        scheduler.submit([Job([7] * 5, draws)])  # a shorter one in every turn
        turn()
    assert not {60, 90} & {len(job.ids) for job in scheduler._being_read}


SCHEMA = {
    "type": "object",
    "properties": {"who": {"enum": ["king", "queen"]}, "n": {"type": "array", "items": {"type": "integer"}}},
    "required": ["who", "n"],
    "additionalProperties": False,
}
SCHEMA["properties"]["n"] |= {"maxItems": 2, "items": {"enum": [1, 22, 333]}}


def test_an_answer_matches_its_schema_beside_free_ones(openai, lm):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    how = {"model": "tiny", "messages": [{"role": "user", "content": "who?"}], "max_completion_tokens": 60, "seed": 1}
    free = openai.chat.completions.create(**how).choices[0].message.content
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        beside = pool.submit(openai.chat.completions.create, **how)
        bound = openai.chat.completions.create(**how, response_format=schema, n=3, temperature=3)
    for choice in bound.choices:
        found = json.loads(choice.message.content)
        assert (
            found["who"] in ("king", "queen") and set(found["n"]) <= {1, 22, 333} and choice.finish_reason == "stop"
        )
    assert beside.result().choices[0].message.content == free


@pytest.mark.parametrize(("path", "values", "status", "said"), REFUSED)
def test_a_bad_field_is_one_line(server, path, values, status, said):
    found, answer = server.post(path, **values)
    message = answer["error"]["message"]
    assert found == status and said in message and "\n" not in message and len(message) < 600, answer


@pytest.mark.parametrize(("body", "status", "said"), BODIES, ids=range(len(BODIES)))
def test_a_bad_body_is_one_line(server, body, status, said):
    found, answer = server.send("POST", TEXT, body, Content_Type="application/json")
    assert found == status and said in json.loads(answer)["error"]["message"]


def test_paths_methods_hosts_and_content_types(server):
    assert server.send("GET", "/v1/completions")[0] == 405
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", f"/{HOSTILE.replace(' ', '')}", "/v1", "//"):
        status, answer = server.send("GET", path)
        assert status == 404 and "script" not in answer.decode() and "root:" not in answer.decode()
    assert server.send("POST", TEXT, b'{"prompt": "a"}', Content_Type="text/plain")[0] == 415
    assert server.send("GET", "/v1/models", Host="evil.example")[0] == 400
    connection = server.connect()
    connection.putrequest("POST", TEXT)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(10**7))
    connection.endheaders()  # of a body that never comes
    assert connection.getresponse().status == 413


def test_the_key(server):
    application = server.application
    application._key = "sesame"
    try:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "é"}):
            for method, path in (("GET", "/v1/models"), ("POST", "/inspect")):
                status, answer = server.send(method, path, **header)
                assert status == 401 and json.loads(answer)["error"]["code"] == "invalid_api_key"
        assert server.send("GET", "/v1/models", Authorization="Bearer sesame")[0] == 200
        assert server.send("GET", "/healthz")[0] == 200
    finally:
        application._key = None


def test_a_full_queue_and_a_slow_answer(server, monkeypatch):
    monkeypatch.setattr(server.scheduler, "_limit", 3)
    assert server.post(TEXT, prompt="a", n=4)[0] == 429
    limits = server.application._limits
    monkeypatch.setattr(server.application, "_limits", replace(limits, answer_s=0.0, body_s=0.2))
    assert server.post(TEXT, prompt="a", max_tokens=100)[0] == 504
    assert (
        b"timeout"
        in server.send("POST", TEXT, b'{"prompt": "a", "stream": true}', Content_Type="application/json")[1]
    )
    connection = server.connect()
    connection.putrequest("POST", TEXT)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"{")  # and no more
    assert connection.getresponse().status == 408
    server.wait(lambda: server.metrics()["gptjax_slots_used"] == 0)


def test_the_server_goes_on_after_nonsense(server, capfd):
    send_nonsense(server, np.random.default_rng(0), 100)
    assert "Traceback" not in capfd.readouterr().err
    assert server.complete("the king", temperature=0, max_tokens=3)["usage"]["completion_tokens"] == 3


@pytest.mark.slow
def test_2000_bad_requests_leave_no_memory_behind(server, capfd):
    """`pytest -m slow -n 0 tests/test_serve.py -k 2000`"""
    resident = []
    for seed in range(4):
        send_nonsense(server, np.random.default_rng(seed), 500)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert resident[3] - resident[0] < 30e6, resident
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_lets_what_runs_end_and_refuses_what_comes(server):
    """The last test of this server, which it ends."""
    connection = server.connect()
    body = json.dumps({"prompt": "the", "max_tokens": 40, "stream": True, "temperature": 9})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    stream = connection.getresponse()
    first = stream.read(6)
    server.running.handle_exit(signal.SIGTERM, None)
    rest = stream.read().decode()
    assert first == b"data: " and rest.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in rest or '"finish_reason":"stop"' in rest
    server.wait(lambda: not server.thread.is_alive())
    with pytest.raises(OSError):
        server.send("GET", "/healthz")


@pytest.mark.slow
def test_sigterm_of_the_command_ends_it_with_0_and_the_answer_whole(tmp_path, tiny_run):
    """`pytest -m slow -n 0 tests/test_serve.py -k sigterm`"""
    assert run_script(*tiny_run, "--train.total_steps=5", "--workdir", tmp_path / "run").returncode == 0
    command = [sys.executable, "-m", "gptjax", "serve", str(tmp_path / "run"), "--port=0", "--slots=2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server = Client(process.stdout.readline().split()[2].rstrip(";"))
    server.wait_until_ready()
    connection = server.connect()
    body = json.dumps({"prompt": "the", "max_tokens": 20, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    stream = connection.getresponse()
    stream.read(6)
    process.send_signal(signal.SIGTERM)
    assert stream.read().decode().endswith("data: [DONE]\n\n")
    assert process.wait(60) == 0 and process.stderr.read() == ""
