"""A model as requests name it: how they are read, run and spelled for it."""

import asyncio
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool

from gptjax.apps.serve.ask import Ask, Asking
from gptjax.apps.serve.errors import ApiError
from gptjax.apps.serve.models import Group, Member
from gptjax.apps.serve.replies import Spellings
from gptjax.apps.serve.scheduler import Job, Scheduler
from gptjax.decoding.adapter_stack import for_one
from gptjax.decoding.grammars import Grammars, TokenGrammar
from gptjax.decoding.prompts import Wanted
from gptjax.engine import Request as Draws
from gptjax.engine import power_of_two
from gptjax.generate import row_keys
from gptjax.inspection import Inspector, look_inside
from gptjax.sampling import Sampling
from gptjax.tokenizers import ChatTemplate

N_INSPECTED = 5  # alternatives of each token of a text that is looked into


class Served:
    """One model of a server.

    Args:
        member: the model, of the group whose batch the scheduler runs.
        context: the most tokens of its prompts and answers.
        template: lays out its conversations; None where it has none.
    """

    def __init__(
        self, member: Member, group: Group, scheduler: Scheduler, context: int, template: ChatTemplate | None
    ):
        self.name, self.context, self.scheduler = member.name, context, scheduler
        self.asking = Asking(member.lm, context, template)
        self.spellings = Spellings(member.lm.tokenizer)
        self._lm, self._adapter = member.lm, member.adapter
        base = next((other.name for other in group.members if other.adapter == 0), None)
        self._parent = base if member.adapter else None
        self._inspector: Inspector | None = None
        self._grammars: Grammars | None = None
        self._compiling = asyncio.Lock()

    def describe(self) -> dict[str, Any]:
        """Return what /v1/models says of it; an adapter has a `parent` where its base is served too."""
        return {
            "id": self.name,
            "object": "model",
            "owned_by": "gptjax",
            "max_model_len": self.context,
            "chat": self.asking.chats,
            "parent": self._parent,
        }

    async def answers(self, ask: Ask) -> list[Job]:
        """Return a job for each answer that is drawn: best_of for the first prompt, then for the second."""
        return await run_in_threadpool(self._answers, ask, await self._grammar(ask))

    def embeddings(self, prompts: list[list[int]]) -> list[Job]:
        """Return a job for each prompt whose hidden states are wanted."""
        draws = Draws(Sampling(0.0), np.zeros(2, np.uint32), 0, adapter=self._adapter)
        return [Job(ids, draws, "hidden", model=self.name) for ids in prompts]

    def look_inside(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return what the model computes for a text: probabilities, one head's attention, the logit lens."""
        if self._lm.engine.mesh is not None:
            raise ApiError(400, "a model on several devices cannot be looked into; serve it without --mesh")
        ids, layer, head = self.asking.inspection(values)
        if not ids:
            raise ApiError(400, "the text is empty; give at least one token", "prompt")
        if self._inspector is None:
            engine = self._lm.engine
            self._inspector = Inspector(self._lm, for_one(engine.weights, self._adapter))
        return look_inside(self._inspector, np.array(ids, np.int32), layer, head, N_INSPECTED)

    def _answers(self, ask: Ask, grammar: TokenGrammar | None) -> list[Job]:
        count = len(ask.prompts) * ask.best_of
        keys = row_keys(ask.seed, power_of_two(count))
        wanted: Wanted = "scores" if ask.echo and ask.logprobs is not None else "next"
        return [
            Job(
                ask.prompts[number // ask.best_of],
                Draws(ask.sampling, keys[number], ask.max_tokens, adapter=self._adapter),
                wanted,
                model=self.name,
                stops=ask.stops,
                alternatives=ask.logprobs is not None,
                grammar=None if grammar is None else grammar.copy(),
            )
            for number in range(count)
        ]

    async def _grammar(self, ask: Ask) -> TokenGrammar | None:
        """Return what restricts the answers; None for nothing. Schemas can take seconds, and are compiled in turn."""
        if ask.schema is None:
            return None
        async with self._compiling:
            return await run_in_threadpool(self._compile, ask.schema)

    def _compile(self, schema: dict[str, Any]) -> TokenGrammar:
        if self._grammars is None:
            self._grammars = Grammars(self._lm.tokenizer, self._lm.config.vocab_size)
        return self._grammars.json_schema(schema)
