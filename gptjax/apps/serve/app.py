"""The HTTP interface: routes, limits and streams, on Starlette."""

import asyncio
import base64
import contextlib
import hmac
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gptjax.apps.serve.ask import Ask
from gptjax.apps.serve.errors import ApiError
from gptjax.apps.serve.fields import Fields, parse_object, shown
from gptjax.apps.serve.metrics import Meters
from gptjax.apps.serve.page import read_curves, read_page
from gptjax.apps.serve.replies import Answer, Replies
from gptjax.apps.serve.scheduler import Event, Job, QueueFull
from gptjax.apps.serve.served import Served
from gptjax.errors import UserError
from gptjax.shell.console import describe_failure

MOST_INSPECTIONS = 8  # texts that wait to be looked into
MODELS_SHOWN = 20  # names that an error lists
CLIENT_LEFT = 499  # what nginx logs for it; nobody receives it


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        body_bytes: the longest body.
        body_s: how long a client may take to send it.
        answer_s: how long an answer may take, the wait in the queue included.
    """

    body_bytes: int = 2**21
    body_s: float = 30.0
    answer_s: float = 600.0


class Server:
    """The routes of a server.

    Args:
        models: those that requests can name; a request need not name the only one. The `deliver` of their schedulers
            must be this module's.
        meters: what is counted.
        api_key: what clients must send; None for no key.
        limits: of a request.
        runs: a run, or a folder of runs, whose curves the page shows; None for none.
    """

    def __init__(
        self,
        models: Sequence[Served],
        meters: Meters,
        api_key: str | None,
        limits: Limits,
        runs: str | None = None,
    ):
        self._models, self._meters = {model.name: model for model in models}, meters
        self._schedulers = list({id(model.scheduler): model.scheduler for model in models}.values())
        self._key, self._limits, self._runs = api_key, limits, runs
        self._page, self._policy = read_page()
        self._created = int(time.time())
        self._draining = False
        self._inspecting, self._to_inspect = asyncio.Lock(), 0

    def app(self, hosts: list[str] | None = None) -> Starlette:
        """Return the ASGI application.

        Args:
            hosts: names by which clients may address it; None for any. On a loopback address, a page of another site
                could otherwise reach the server by a name that it makes resolve here.
        """
        routes = [
            Route("/healthz", self._guarded(self.health, open_to_all=True)),
            Route("/", self._guarded(self.page, open_to_all=True)),
            Route("/runs", self._guarded(self.runs)),
            Route("/metrics", self._guarded(self.metrics)),
            Route("/tokenize", self._guarded(self.tokenize), methods=["POST"]),
            Route("/inspect", self._guarded(self.inspect), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.model)),
            Route("/v1/completions", self._guarded(self.complete), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/embeddings", self._guarded(self.embed), methods=["POST"]),
        ]
        middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if hosts else []
        return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error})

    def drain(self) -> None:
        """Report that the server ends; what runs is finished."""
        self._draining = True

    async def health(self, request: Request) -> Response:
        """200 when a request would be served at once or queued, 503 while programs compile or the server ends."""
        if any(scheduler.error is not None for scheduler in self._schedulers):
            status = "failed"
        elif self._draining:
            status = "draining"
        else:
            status = "ready" if all(s.ready.is_set() for s in self._schedulers) else "warming up"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def page(self, request: Request) -> Response:
        """The page, which asks for the rest by the same routes as anyone, with the key that its user types."""
        guards = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
        return Response(
            self._page, headers={"Content-Security-Policy": self._policy, **guards}, media_type="text/html"
        )

    async def runs(self, request: Request) -> Response:
        """The curves of the runs beside the server."""
        return JSONResponse({"runs": await run_in_threadpool(read_curves, self._runs) if self._runs else []})

    async def metrics(self, request: Request) -> Response:
        """Counters and clocks for Prometheus."""
        return Response(self._meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The list of models."""
        return JSONResponse({"object": "list", "data": [self._described(model) for model in self._models.values()]})

    async def model(self, request: Request) -> Response:
        """A model, by its name."""
        return JSONResponse(self._described(self._named(request.path_params["name"])))

    def _described(self, model: Served) -> dict[str, Any]:
        return {**model.describe(), "created": self._created}

    def _named(self, name: str | None) -> Served:
        """Return the model of a name, which may be missing where there is only one."""
        known = list(self._models)
        there = ", ".join(map(repr, known[:MODELS_SHOWN])) + ", ..." * (len(known) > MODELS_SHOWN)
        if name is None and len(known) > 1:
            raise ApiError(400, f"model is missing; there are {there}", "model")
        model = self._models.get(known[0] if name is None else name)
        if model is None:
            said = f"model {shown(name)} is not here; there {'is' if len(known) == 1 else 'are'} {there}"
            raise ApiError(404, said, "model", "model_not_found")
        return model

    async def _asked(self, request: Request) -> tuple[Served, dict[str, Any]]:
        """Return the model that a request names, and its JSON object."""
        values = await self._values(request)
        return self._named(Fields(values).text("model")), values

    async def tokenize(self, request: Request) -> Response:
        """The ids of a text, and what each stands for."""
        model, values = await self._asked(request)
        ids = await run_in_threadpool(model.asking.tokens, values)
        tokens = [model.spellings.text(id) for id in ids]
        return JSONResponse({"count": len(ids), "max_model_len": model.context, "ids": ids, "tokens": tokens})

    async def inspect(self, request: Request) -> Response:
        """What a model computes for a text; one request at a time, beside those for answers."""
        model, values = await self._asked(request)
        if self._to_inspect >= MOST_INSPECTIONS:
            raise ApiError(429, "too many texts wait to be looked into; try again later", code="queue_full")
        self._to_inspect += 1
        try:
            async with self._inspecting:
                return JSONResponse(await run_in_threadpool(model.look_inside, values))
        finally:
            self._to_inspect -= 1

    async def complete(self, request: Request) -> Response:
        """Continue prompts (OpenAI's legacy completions)."""
        model, values = await self._asked(request)
        return await self._answer(
            request, model, await run_in_threadpool(model.asking.completion, values), chat=False
        )

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        model, values = await self._asked(request)
        ask = await run_in_threadpool(model.asking.chat, values)
        return await self._answer(request, model, ask, chat=True)

    async def embed(self, request: Request) -> Response:
        """The mean of the last hidden states of each text."""
        model, values = await self._asked(request)
        prompts, as_base64 = await run_in_threadpool(model.asking.embedding, values)
        jobs = model.embeddings(prompts)
        await self._or_left(request, self._collect(model, jobs))
        data = []
        for number, job in enumerate(jobs):
            assert job.reading is not None
            mean = np.asarray(job.reading.hidden / len(job.ids), np.float32)
            value = base64.b64encode(mean.tobytes()).decode() if as_base64 else mean.tolist()
            data.append({"object": "embedding", "index": number, "embedding": value})
        read = sum(map(len, prompts))
        usage = {"prompt_tokens": read, "total_tokens": read}
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})

    async def _answer(self, request: Request, model: Served, ask: Ask, chat: bool) -> Response:
        jobs = await model.answers(ask)
        replies = Replies(chat, model.name, ask, model.spellings)
        if not ask.stream:
            return JSONResponse(replies.whole(await self._or_left(request, self._collect(model, jobs))))
        _submit(model, jobs)
        return _Stream(self._stream(model, jobs, replies), lambda: model.scheduler.cancel(jobs))

    async def _collect(self, model: Served, jobs: list[Job]) -> list[Answer]:
        """Return the answers of jobs when all have ended."""
        answers = {job: Answer(job) for job in jobs}
        _submit(model, jobs)
        try:
            async with asyncio.timeout(self._limits.answer_s):
                async for event in _events(jobs):
                    answers[event.job].add(event)
        except TimeoutError:
            limit = f"{self._limits.answer_s:g}"
            raise ApiError(
                504, f"the answer took over {limit} seconds; ask for fewer tokens", code="timeout"
            ) from None
        finally:
            model.scheduler.cancel(jobs)
        return list(answers.values())

    async def _stream(self, model: Served, jobs: list[Job], replies: Replies) -> AsyncIterator[str]:
        """Yield the events of a stream; when the client leaves, this is closed, and the rows become free."""
        answers = {job: (number, Answer(job)) for number, job in enumerate(jobs)}
        begun: set[Job] = set()
        try:
            async with asyncio.timeout(self._limits.answer_s):
                async for event in _events(jobs):
                    number, answer = answers[event.job]
                    chunks = [] if event.job in begun else replies.first(number, answer)
                    begun.add(event.job)
                    answer.add(event)
                    for chunk in [*chunks, *replies.next(number, answer, event)]:
                        yield _sse(chunk)
            for chunk in replies.last([answer for _, answer in answers.values()]):
                yield _sse(chunk)
        except TimeoutError:
            yield _sse(ApiError(504, "the answer took too long; ask for fewer tokens", code="timeout").body())
        except ApiError as error:
            yield _sse(error.body())
        finally:
            model.scheduler.cancel(jobs)
        yield "data: [DONE]\n\n"

    async def _or_left(self, request: Request, work: Any) -> Any:
        """Return the result of work, unless the client leaves before: then the work is cancelled."""
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_until_left(request))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise ClientDisconnect
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _values(self, request: Request) -> dict[str, Any]:
        """Return the JSON object that a request carries."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another site cannot send without asking
            raise ApiError(415, "send the body as Content-Type: application/json")
        most, body = self._limits.body_bytes, bytearray()
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > most:
            raise ApiError(413, f"the body has {declared} bytes, and the limit is {most}")
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise ApiError(413, f"the body has more bytes than the limit of {most}")
        except TimeoutError:
            raise ApiError(408, f"the body took over {self._limits.body_s:g} seconds to arrive") from None
        return await run_in_threadpool(parse_object, bytes(body))

    def _guarded(
        self, handle: Callable[[Request], Awaitable[Response]], open_to_all: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return a route's function that checks the key, and answers every error in OpenAI's form."""

        async def route(request: Request) -> Response:
            try:
                if not open_to_all:
                    self._check_key(request)
                response = await handle(request)
            except ApiError as error:
                response = _error(error)
            except UserError as error:
                response = _error(ApiError(400, str(error)))
            except ClientDisconnect:
                response = Response(status_code=CLIENT_LEFT)
            except Exception as error:
                print(describe_failure(error)[1], file=sys.stderr)
                response = _error(ApiError(500, "the server failed on this request; its log says how"))
            self._meters.responses.labels(response.status_code).inc()
            return response

        return route

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        wanted = f"Bearer {self._key}".encode()
        if self._key is not None and not hmac.compare_digest(given, wanted):
            raise ApiError(401, "send Authorization: Bearer KEY with this server's key", code="invalid_api_key")


class _Stream(StreamingResponse):
    """A response of events; whatever ends it, also before the first, calls `end`."""

    def __init__(self, content: AsyncIterator[str], end: Callable[[], None]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def _submit(model: Served, jobs: list[Job]) -> None:
    """Hand jobs to the model's scheduler, with one inbox for all their events."""
    inbox: asyncio.Queue[Event] = asyncio.Queue()
    for job in jobs:
        job.inbox = inbox
    try:
        model.scheduler.submit(jobs)
    except QueueFull:
        raise ApiError(429, "too many requests wait; try again later", code="queue_full") from None


def make_deliver(loop: asyncio.AbstractEventLoop) -> Callable[[list[Event]], None]:
    """Return what brings a scheduler's events from its thread into their inboxes."""

    def put(events: list[Event]) -> None:
        for event in events:
            event.job.inbox.put_nowait(event)

    def deliver(events: list[Event]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(put, events)

    return deliver


async def _events(jobs: list[Job]) -> AsyncIterator[Event]:
    """Yield what happens to jobs until all of them have ended; raises ApiError where the scheduler fails."""
    left = len(jobs)
    while left:
        event = await jobs[0].inbox.get()
        if event.finish == "failed":
            raise ApiError(500, "the server failed; its log says how")
        left -= event.finish is not None
        yield event


async def _until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sse(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _error(error: ApiError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer what Starlette itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    said = {404: "there is no such path", 405: "this path takes another method"}.get(error.status_code, error.detail)
    response = _error(ApiError(error.status_code, said))
    response.headers.update(error.headers or {})
    return response
