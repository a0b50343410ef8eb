"""The command `gptjax chat`."""

import json
import sys
from collections.abc import Iterator
from typing import Any, Literal

from gptjax.checks import check
from gptjax.errors import UserError, nearest
from gptjax.process import prepare_process
from gptjax.shell.commandline import mesh_axes
from gptjax.shell.files import write_atomically
from gptjax.shell.paths import UserPath, local_path

LEAST_SHARE = 4  # an answer has room for a quarter of the context at least, or for max_new_tokens
HELP = "/reset  /system TEXT  /save FILE  /seed N  /quit; a message that begins with a slash takes a second one"


def chat(
    model: UserPath,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 1337,
    dtype: Literal["float32", "bfloat16", "int8"] | None = None,
    mesh: str | None = None,
    cpu_devices: int | None = None,
) -> None:
    """Talk with a model that was tuned on conversations; each line is a message. /help lists what else a line can be.

    Args:
        model: the directory of a run, a Hugging Face directory, a .gguf file, or a Hugging Face id.
        system: instructions that come before the conversation.
        max_new_tokens: most tokens of an answer.
        temperature: 0 always takes the most probable token; 1 samples from the model's probabilities; lower is safer.
        top_k: sample from the k most probable tokens only.
        top_p: sample from the smallest set of tokens whose total probability is at least p.
        min_p: sample from the tokens that are at least p times as probable as the most probable one.
        seed: seed of the first answer; the next one's is larger by 1, and so on.
        dtype: data type of the weights; bfloat16 takes half the memory, int8 a quarter. By default as in training.
        mesh: shard the model over several devices, such as fsdp=4,tensor=2, if it does not fit on one.
        cpu_devices: number of virtual CPU devices, to try a mesh without its hardware.
    """
    check(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "must be at least 1")
    axes = mesh_axes(mesh)
    prepare_process(cpu_devices)
    from gptjax.convert import load, open_model
    from gptjax.sampling import Sampling
    from gptjax.tokenizers import chat_template

    sampling = Sampling(temperature, top_k, top_p, min_p).check()
    chat_template(open_model(model).tokenizer)  # before the weights are read
    talk = Conversation(load(model, dtype, axes), sampling, max_new_tokens, seed, system)
    typing = sys.stdin is not None and sys.stdin.isatty()
    for line in _lines(typing):
        try:
            if line.startswith("/") and not line.startswith("//"):
                if line.strip() == "/quit":
                    return
                print(talk.command(line), file=sys.stderr)
            elif line.strip():
                _answer(talk, line.removeprefix("/") if line.startswith("//") else line)
        except UserError as error:
            if not typing:
                raise
            print(f"error: {error}", file=sys.stderr)


class Conversation:
    """The messages so far, and the model that answers.

    Args:
        lm: the model, whose tokenizer has a chat template.
        sampling: how answers are drawn.
        max_new_tokens: of an answer.
        seed: of the next answer; each answer adds 1.
        system: instructions before the first message.
    """

    def __init__(self, lm: Any, sampling: Any, max_new_tokens: int, seed: int, system: str | None = None):
        from gptjax.tokenizers import chat_template

        self._lm, self._sampling, self._most, self._seed = lm, sampling, max_new_tokens, seed
        self._template = chat_template(lm.tokenizer)
        self._system = system
        self.turns: list[dict[str, str]] = []

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash, and return what to say of it.

        Raises:
            UserError: an unknown command, or a wrong argument.
        """
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name == "/reset":
            self.turns = []
            return "the conversation begins anew"
        if name == "/system":
            self._system, self.turns = argument or None, []
            return "the conversation begins anew" + (", with these instructions" if argument else "")
        if name == "/seed":
            if not argument.isdecimal() or not int(argument) < 2**32:
                raise UserError(f"/seed {argument!r} must be an integer in [0, 2^32)")
            self._seed = int(argument)
            return f"the next answer has seed {argument}"
        if name == "/save":
            return self._save(argument)
        if name == "/help":
            return HELP
        known = ("/reset", "/system", "/seed", "/save", "/help", "/quit")
        raise UserError(f"unknown command {name!r}{nearest(name, known)}; {HELP}")

    def answer(self, message: str) -> Iterator[str]:
        """Yield the model's answer piece by piece; message and answer then belong to the conversation.

        Raises:
            UserError: the message does not fit the context, or the template refuses it.
        """
        turns = [*self.turns, {"role": "user", "content": message}]
        ids, turns = self._fitting(turns)
        pieces: list[str] = []
        limit = min(self._most, self._lm.config.context_length - len(ids))
        try:
            for piece in self._lm.stream_text(ids, limit, self._sampling, self._seed):
                pieces.append(piece)
                yield piece
        finally:  # also where the user interrupts the answer
            self._seed = (self._seed + 1) % 2**32
            self.turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]

    def _fitting(self, turns: list[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """Return the ids of a conversation and its turns, without the oldest ones that leave an answer no room."""
        T = self._lm.config.context_length
        room = min(self._most, T // LEAST_SHARE)
        head = [] if self._system is None else [{"role": "system", "content": self._system}]
        while True:
            ids = self._lm.tokenizer.encode(self._template.render([*head, *turns])).tolist()
            if len(ids) + room <= T:
                return ids, turns
            if len(turns) == 1:
                raise UserError(
                    f"the message has {len(ids)} tokens with its instructions; {T - room} fit the model's context of "
                    f"{T} with an answer; shorten it"
                )
            turns = turns[2:]

    def _save(self, path: str) -> str:
        if not path:
            raise UserError("/save needs a file: /save talk.jsonl")
        head = [] if self._system is None else [{"role": "system", "content": self._system}]
        target = local_path(path, "/save")
        try:
            write_atomically(target, json.dumps({"messages": [*head, *self.turns]}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path!r}: {error.strerror or error}; give another file") from None
        return f"{target}: {len(self.turns)} messages"


def _answer(talk: Conversation, message: str) -> None:
    """Print an answer as it comes; an interrupt ends it, and not the conversation."""
    try:
        for piece in talk.answer(message):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    print(flush=True)


def _lines(typing: bool) -> Iterator[str]:
    """Yield the lines of standard input, in UTF-8 where it is a pipe; a terminal shows a prompt."""
    if sys.stdin is None:
        return
    if typing:
        import readline  # noqa: F401  lines can then be edited

        while True:
            try:
                yield input("> ")
            except EOFError:
                print(file=sys.stderr)
                return
    for number, line in enumerate(getattr(sys.stdin, "buffer", None) or sys.stdin, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(line, bytes) else line
        except UnicodeDecodeError:
            raise UserError(f"line {number} of standard input is not UTF-8; convert it by iconv") from None
        yield text.rstrip("\r\n")
