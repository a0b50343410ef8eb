"""Continuous batching: one thread reads prompts and draws tokens for whoever is there.

Each turn of the thread gives free rows of the batch to those who wait, reads at most a chunk of prompts, the shortest
first, and draws one token for every row. Requests thus join and leave between two tokens, and a long prompt delays
the others by the chunk at hand.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from gptjax.apps.serve.metrics import Meters
from gptjax.decoding.answers import AnswerText
from gptjax.decoding.prompts import N_ALTERNATIVES, PromptReader, Reading, Wanted
from gptjax.engine import Request
from gptjax.generate import LanguageModel
from gptjax.sampling import Sampling

KEPT_CONTEXTS = 4  # as many contexts' worth of beginnings of prompts are kept for reuse
MOST_PASSED = 4  # turns in which shorter prompts go before one; it is then read first


class Grammar(Protocol):
    """What allows or forbids each next token of a text."""

    def allowed(self) -> np.ndarray:
        """Return which ids may come next, [V] bool."""

    def accept(self, token: int) -> bool:
        """Take the token that was drawn; return whether the text is complete."""


class QueueFull(Exception):
    """More texts wait than the server holds."""


@dataclass(eq=False)
class Job:
    """One text to generate, or one to score or embed.

    Attributes:
        ids: the prompt, at least one token.
        request: how tokens are drawn.
        wanted: what is computed of the prompt (see `Reading`).
        model: whose meters count it.
        stops: texts that end the answer.
        alternatives: whether each token comes with the likeliest ones at its place.
        grammar: restricts the tokens; None for none.
        arrived: when, in seconds of the monotonic clock.
        cancelled: nobody waits for it any more.
        inbox: where the server puts its events.
        row: of the batch; -1 while it waits.
        reading: its prompt, with the scores or hidden states that are wanted.
        passed: turns since a part of its prompt was read.
        drawing: whether the prompt is read and tokens are drawn.
        text: of the answer.
        drawn: how many tokens are drawn.
        latest: when the last one was, as `arrived`.
    """

    ids: Sequence[int]
    request: Request
    wanted: Wanted = "next"
    model: str = ""
    stops: Sequence[str] = ()
    alternatives: bool = False
    grammar: Grammar | None = None
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    inbox: Any = None
    row: int = -1
    reading: Reading | None = None
    passed: int = 0
    drawing: bool = False
    text: AnswerText | None = None
    drawn: int = 0
    latest: float = 0.0


class Event(NamedTuple):
    """What happened to a job.

    Attributes:
        token: the token drawn; None where none was, or where it ends the text and is no part of it.
        logprob: its log-probability under the model.
        alternatives: ids and log-probabilities of the likeliest tokens at its place, most likely first.
        text: further text of the answer.
        finish: why the text ends here: `stop`, `length`, or `failed` where the server did; None where it does not.
    """

    job: Job
    token: int | None = None
    logprob: float = 0.0
    alternatives: tuple[np.ndarray, np.ndarray] | None = None
    text: str = ""
    finish: str | None = None


class Scheduler:
    """Runs jobs on a model in a thread of its own.

    Args:
        lm: the model.
        rows: how many texts are generated at the same time.
        context: the most tokens of prompt and answer together.
        deliver: called in the scheduler's thread with the events of each turn.
        queue: the most texts that wait.
        name: of the batch, in the meters.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: int,
        context: int,
        deliver: Callable[[list[Event]], None],
        meters: Meters,
        queue: int = 256,
        name: str = "",
    ):
        self.lm, self.context, self._deliver = lm, context, deliver
        self.meters, self._of_batch = meters, meters.batch(name)
        self._reader = PromptReader(lm.engine, context, KEPT_CONTEXTS * context)
        self._rows: list[Job | None] = [None] * rows
        self._state = lm.engine.init_state(rows, context)
        self._limit = queue
        self._waiting: deque[Job] = deque()
        self._being_read: list[Job] = []
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._likeliest = jax.jit(_likeliest)
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.ready, self.error = threading.Event(), None
        self._of_batch.slots.set(rows)

    def start(self) -> None:
        """Start the thread, which compiles every program before it serves."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the turn at hand."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their turn; raises QueueFull where not all of them find room."""
        with self._changed:
            if len(self._waiting) + len(jobs) > self._limit or self.error is not None:
                raise QueueFull
            self._waiting += jobs
            self._changed.notify()
            self._of_batch.queue.set(len(self._waiting))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs at the next turn, wherever they are."""
        for job in jobs:
            job.cancelled = True

    def _run(self) -> None:
        try:
            self._warm_up()
            self.ready.set()
            while self._wait():
                self.turn()
        except BaseException as error:
            self.error = error
            self._fail_all()

    def _wait(self) -> bool:
        """Wait until there is work; return False when the thread is to end."""
        with self._changed:
            while not (self._stopping or self._waiting or self._being_read or any(self._rows)):
                self._changed.wait()
            return not self._stopping

    def _warm_up(self) -> None:
        """Compile every program by serving a prompt of each width, with all that a request can ask for."""
        vocabulary = self.lm.config.vocab_size
        chunk, draws = self._reader.chunk, Request(Sampling(), np.zeros(2, np.uint32), 1)
        of_each_width = {self._reader.width(n, "next"): n for n in range(1, chunk + 1)}
        asked = [(n, "next") for n in (*of_each_width.values(), chunk + 1, chunk + 1)]  # the last one is reused
        for n, wanted in (*asked, (1, "scores"), (1, "hidden")):
            if n < self.context:
                job = Job([0] * n, draws, wanted, alternatives=True, grammar=_Everything(vocabulary))
                self._waiting.append(job)
        deliver = self._deliver
        # Requests that arrive meanwhile are served too; nobody waits for the others.
        self._deliver = lambda events: deliver([event for event in events if event.job.inbox is not None])
        while self._waiting or self._being_read or any(self._rows):
            self.turn()
        self._state = self.lm.engine.release(self._state, 0)
        self._deliver = deliver
        self.meters.forget("")

    def turn(self) -> None:
        """Admit, read a chunk, draw a token for each row, and deliver what happened."""
        self._drop_cancelled()
        self._admit()
        self._read()
        if drawing := [job for job in self._rows if job is not None and job.drawing]:
            self._draw(drawing)
        events, self._events = self._events, []
        if events:
            self._deliver(events)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._rows if job is not None and job.cancelled]:
            if job.drawing:
                self._state = self.lm.engine.release(self._state, job.row)
            else:
                self._being_read.remove(job)
            self._leave(job)

    def _leave(self, job: Job) -> None:
        self._rows[job.row] = None
        self._of_batch.slots_used.set(sum(job is not None for job in self._rows))

    def _admit(self) -> None:
        """Give free rows to those that wait longest."""
        free = [row for row, job in enumerate(self._rows) if job is None]
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            admitted = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
            self._of_batch.queue.set(len(self._waiting))
        for row, job in zip(free, admitted, strict=False):
            self._rows[row], job.row = job, row
            job.reading = self._reader.begin(job.ids, job.wanted, job.request.adapter)
            self._being_read.append(job)
            of_model = self.meters.model(job.model)
            of_model.prompt_tokens.inc(len(job.ids))
            of_model.reused_tokens.inc(job.reading.reused)
        self._of_batch.slots_used.set(sum(job is not None for job in self._rows))

    def _read(self) -> None:
        """Read at most one chunk of prompts: those that were passed over too often first, then the shortest.

        A prompt's next part is begun only where it fits the rest of the chunk, so that after a short prompt its
        first token is drawn before a long one is continued.
        """
        budget = self._reader.chunk
        for job in sorted(self._being_read, key=_reading_order):
            assert job.reading is not None
            job.passed += 1
            while not job.reading.done and (cost := self._reader.cost(job.reading)) <= budget:
                self._reader.advance(job.reading)
                budget -= cost
                job.passed = 0
            if job.reading.done:
                self._being_read.remove(job)
                self._begin_answer(job, job.reading)

    def _begin_answer(self, job: Job, reading: Reading) -> None:
        """Place a prompt that is read in the batch, or end a job that draws nothing."""
        prefix = reading.take_prefix()
        if job.request.max_new_tokens == 0:
            self._events.append(Event(job, finish="length"))
            self._leave(job)
        else:
            self._state = self.lm.engine.insert(self._state, prefix, [job.row], [job.request])
            job.text, job.drawing = AnswerText(self.lm.tokenizer, job.ids, job.stops), True

    def _draw(self, drawing: list[Job]) -> None:
        """Draw one token for each of these jobs, which have rows."""
        top = None
        if any(job.alternatives for job in drawing):
            top = [np.asarray(x) for x in self._likeliest(self._state.logits)]
        if restricted := [job for job in drawing if job.grammar is not None]:
            allowed = np.ones((len(self._rows), self.lm.config.vocab_size), bool)
            for job in restricted:
                assert job.grammar is not None
                allowed[job.row] = job.grammar.allowed()
            self._state = self.lm.engine.restrict(self._state, allowed)
        self._state, tokens, logprobs = self.lm.engine.step(self._state, 1)
        now = time.monotonic()
        for job in drawing:
            alternatives = (top[0][job.row], top[1][job.row]) if top is not None and job.alternatives else None
            event = self._take(job, int(tokens[job.row, 0]), float(logprobs[job.row, 0]), alternatives)
            self._events.append(event)
            job.drawn += 1
            of_model = self.meters.model(job.model)
            of_model.drawn_tokens.inc()
            if job.drawn == 1:
                of_model.first.observe(now - job.arrived)
            else:
                of_model.between.observe(now - job.latest)
            job.latest = now

    def _take(self, job: Job, token: int, logprob: float, alternatives: Any) -> Event:
        """Return what a drawn token means for a job, and end the job where it does."""
        assert job.text is not None
        if token in self.lm.tokenizer.eos_ids:
            self._leave(job)
            return Event(job, text=job.text.finish(), finish="stop")
        text = job.text.add(token)
        complete = job.grammar is not None and job.grammar.accept(token)
        if job.text.stopped or complete:
            self._state = self.lm.engine.release(self._state, job.row)
            self._leave(job)
            part = None if job.text.stopped else token
            return Event(job, part, logprob, alternatives, text + job.text.finish(), "stop")
        if job.drawn + 1 == job.request.max_new_tokens:
            self._leave(job)
            text += job.text.finish()
            return Event(job, token, logprob, alternatives, text, "stop" if job.text.stopped else "length")
        return Event(job, token, logprob, alternatives, text)

    def _fail_all(self) -> None:
        """Tell everyone that nothing more comes."""
        with self._changed:
            left = [*self._waiting, *(job for job in self._rows if job is not None)]
            self._waiting.clear()
        self._deliver([Event(job, finish="failed") for job in left])


def _reading_order(job: Job) -> tuple[bool, int]:
    """Sort those first that were passed over too often, the longest passed before; then the shortest."""
    assert job.reading is not None
    if job.passed >= MOST_PASSED:
        return False, -job.passed
    return True, len(job.reading.ids) - job.reading.read


class _Everything:
    """A grammar that allows any token."""

    def __init__(self, n: int):
        self._allowed = np.ones(n, bool)

    def allowed(self) -> np.ndarray:
        return self._allowed

    def accept(self, token: int) -> bool:
        return False


def _likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ids and log-probabilities of each row's likeliest tokens, [B, N_ALTERNATIVES] each."""
    values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), min(N_ALTERNATIVES, logits.shape[-1]))
    return ids, values
