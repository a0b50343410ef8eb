"""A model of gptjax for lm-eval (EleutherAI's evaluation harness), under the name `gptjax`.

Importing this module registers it (`lm_eval.api.registry.register_model`). lm-eval's command line imports no module
of others, so `gptjax eval lm-eval` is that command line with this module imported.
"""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from gptjax.apps.evaluate.generation import answer_prompts
from gptjax.convert import load
from gptjax.decoding.scoring import Scorer, rolling_windows
from gptjax.errors import UserError
from gptjax.sampling import Sampling

MAX_NEW_TOKENS = 256  # where a task names no number, as in lm-eval's Hugging Face backend


@register_model("gptjax")
class GptjaxLM(TemplateLM):
    """A run, a Hugging Face directory or id, or a GGUF file as a model of lm-eval.

    Args:
        path: of the model.
        dtype: float32 or bfloat16; None computes as the model was trained.
        mesh: devices to shard over, as `fsdp:4;tensor:2` (lm-eval itself splits at commas and equals signs).
        batch_tokens: tokens of one forward pass; None for the platform's default.
        options: lm-eval's batch_size, max_batch_size and device, which say nothing here.
    """

    def __init__(
        self,
        path: str,
        dtype: str | None = None,
        mesh: str | None = None,
        batch_tokens: int | None = None,
        **options: Any,
    ):
        super().__init__()
        if unknown := options.keys() - {"batch_size", "max_batch_size", "device"}:
            raise UserError(f"model_args has no {', '.join(sorted(unknown))}; give path, dtype, mesh or batch_tokens")
        self.lm = load(path, dtype, None if mesh is None else _axes(mesh))
        self.scorer = Scorer(self.lm, batch_tokens)

    @property
    def eot_token_id(self) -> int:
        ends = self.lm.tokenizer.eos_ids
        return ends[0] if ends else 0

    @property
    def prefix_token_id(self) -> int:
        bos = getattr(self.lm.tokenizer, "bos_id", None)
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.lm.config.context_length

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer.kind

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is False:
            return self.lm.tokenizer.encode(string).tolist()
        ids = self.lm.tokenizer.encode_prompt(string).tolist()
        twice = len(ids) > 1 and ids[0] == ids[1] == getattr(self.lm.tokenizer, "bos_id", None)
        return ids[1:] if twice else ids  # a text that begins with the token's name gets no second one

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        scores = self.scorer.score(pairs)
        for number, score in tqdm(scores, "loglikelihood", len(pairs), disable=disable_tqdm):
            results[number] = (float(score.logprobs.sum()), score.greedy)
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], results[number])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            found = rolling_windows(ids, self.prefix_token_id, self.max_length)
            windows += [(None, *window) for window in found]
            owners += [number] * len(found)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                self._generate_group(requests, numbers, texts, bar)
        return texts

    def _generate_group(self, requests: list[Instance], numbers: list[int], texts: list[str], bar: tqdm) -> None:
        """Answer the requests that have one way of generating."""
        options = normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_NEW_TOKENS)
        stops = handle_stop_sequences(options.get("until"), eos=None)
        drawn = bool(options.get("do_sample")) and options.get("temperature", 1.0) > 0
        sampling = Sampling(options.get("temperature", 1.0), options.get("top_k"), options.get("top_p"))
        prompts = [self.tok_encode(requests[number].args[0]) or [self.prefix_token_id] for number in numbers]
        answers = answer_prompts(self.lm, prompts, options["max_gen_toks"], stops, sampling if drawn else None)
        for place, answer in answers:
            number = numbers[place]
            texts[number] = postprocess_generated_text(answer.text, stops, None)
            self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
            bar.update(1)


def _axes(mesh: str) -> dict[str, int]:
    pairs = [part.partition(":") for part in mesh.split(";")]
    if not all(name and size.lstrip("-").isdecimal() for name, _, size in pairs):
        raise UserError(f"mesh={mesh!r} is not a list of axes and sizes; write it as mesh=fsdp:4;tensor:2")
    return {name: int(size) for name, _, size in pairs}
