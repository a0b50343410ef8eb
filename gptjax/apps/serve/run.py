"""The server's process: it listens, serves until a signal, and finishes what runs."""

import asyncio
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptjax.apps.serve.app import Limits, Server, make_deliver
from gptjax.apps.serve.metrics import Meters
from gptjax.apps.serve.models import Group, Member
from gptjax.apps.serve.scheduler import Scheduler
from gptjax.apps.serve.served import Served
from gptjax.errors import UserError
from gptjax.tokenizers import ChatTemplate, chat_template

BACKLOG = 2048  # connections that wait to be accepted
HEADERS_S = 15.0  # how long a new connection may take to send its first request
MAX_HEADER_BYTES = 2**16
MORE_CONNECTIONS = 512  # beyond the queue and the slots
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes connections whose first request does not come."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._headers_due = self.loop.call_later(HEADERS_S, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_due.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()


class _Uvicorn(uvicorn.Server):
    """A server that reports the end to its application, and returns after a signal instead of raising it again."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self._application = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._application.drain()
        self.force_exit = self.should_exit  # a second signal does not wait
        self.should_exit = True


@dataclass(frozen=True)
class Settings:
    """How models are served: the options of `gptjax serve`; `context` is of each model at most."""

    host: str = "127.0.0.1"
    port: int = 0
    api_key: str | None = None
    slots: int = 8
    context: int = 2048
    queue: int = 256
    limits: Limits = field(default_factory=Limits)
    runs: str | None = None


def run_server(
    groups: Sequence[Group],
    settings: Settings,
    started: Callable[[uvicorn.Server, str], None],
    order: Sequence[str] = (),
) -> None:
    """Serve models until SIGTERM or SIGINT; answers that have begun are finished.

    Args:
        started: called with the running server and its address when it listens.
        order: names of the models as clients see them; by default, as in the groups.

    Raises:
        UserError: the address cannot be listened at.
    """
    templates = {member.name: _template(member) for group in groups for member in group.members}
    host = settings.host
    listening = _listen(host, settings.port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    if host not in LOOPBACK and settings.api_key is None:
        print("note: anyone who reaches this address can use the server; --api_key keeps others out", file=sys.stderr)

    async def main() -> None:
        deliver, meters = make_deliver(asyncio.get_running_loop()), Meters()
        models, schedulers = [], []
        for group in groups:
            context = group.context(settings.context)
            scheduler = Scheduler(group.lm, settings.slots, context, deliver, meters, settings.queue, group.name)
            schedulers.append(scheduler)
            for member in group.members:
                context = min(settings.context, member.lm.config.context_length)
                models.append(Served(member, group, scheduler, context, templates[member.name]))
        if order:
            models.sort(key=lambda model: order.index(model.name))
        server = Server(models, meters, settings.api_key, settings.limits, settings.runs)
        running = _Uvicorn(_config(server, settings), server)
        for scheduler in schedulers:
            scheduler.start()
        started(running, address)
        watching = asyncio.create_task(_end_on_failure(schedulers, running))
        try:
            await running.serve(sockets=[listening])
        finally:
            watching.cancel()
            for scheduler in schedulers:
                await asyncio.to_thread(scheduler.stop)
        for scheduler in schedulers:
            if scheduler.error is not None:
                raise scheduler.error

    asyncio.run(main())


def _template(member: Member) -> ChatTemplate | None:
    """Return the chat template of a model; None without one, or with one that is refused, which is noted."""
    try:
        return None if member.lm.tokenizer.chat_template is None else chat_template(member.lm.tokenizer)
    except UserError as error:
        print(f"note: {error}; there is no chat with {member.name}", file=sys.stderr)
        return None


def _config(server: Server, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        server.app([*LOOPBACK, "[::1]"] if settings.host in LOOPBACK else None),
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        limit_concurrency=settings.queue + settings.slots + MORE_CONNECTIONS,
        timeout_graceful_shutdown=int(settings.limits.answer_s) + 1,
    )


async def _end_on_failure(schedulers: Sequence[Scheduler], running: uvicorn.Server) -> None:
    """End the server when a scheduler has failed: whoever started it should know."""
    while all(scheduler.error is None for scheduler in schedulers):
        await asyncio.sleep(1)
    running.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at the address, so that whoever connects from now on waits and is not refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror or error}; give another --port") from None
    return listening
