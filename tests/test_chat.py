"""Conversations in the terminal: what is kept of them, and lines that are no messages."""

import io
import json

import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install -e '.[serve]'")

from serving import CONTEXT, tiny_model, tiny_tokenizer

from gptjax import cli
from gptjax.apps.chat.commands import Conversation
from gptjax.errors import UserError
from gptjax.sampling import Sampling


@pytest.fixture(scope="module")
def lm(hf_directory):
    return tiny_model(tiny_tokenizer(hf_directory), n_layers=1)


def talk(lm, lines: str | bytes, monkeypatch, capsys, *options: str) -> tuple[int, str, str]:
    """Exit code and output of `gptjax chat` with these lines from a pipe."""
    import gptjax.convert

    monkeypatch.setattr(gptjax.convert, "open_model", lambda path: lm)
    monkeypatch.setattr(gptjax.convert, "load", lambda *_: lm)
    monkeypatch.setattr("gptjax.apps.chat.commands.prepare_process", lambda *_: None)
    data = lines if isinstance(lines, bytes) else lines.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    try:
        code = cli.chat(["tiny", "--max_new_tokens=8", *options])
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def test_a_conversation_over_a_pipe(lm, monkeypatch, capsys, tmp_path):
    saved = tmp_path / "talk.jsonl"
    lines = f"the king\n\n//and\n/save {saved}\n/seed 1337\n/reset\nthe king\n"
    code, out, err = talk(lm, lines, monkeypatch, capsys, "--system", "Be brief.")
    assert code == 0 and "error" not in err
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["the king", "/and"]
    first, second = (m["content"] for m in messages if m["role"] == "assistant")
    assert out == f"{first}\n{second}\n{first}\n"
    ids = lm.tokenizer.encode("<system>Be brief.\n<user>the king\n<assistant>").tolist()
    assert first == "".join(lm.stream_text(ids, 8, Sampling(0.8), 1337))


def test_a_long_conversation_forgets_whole_turns_from_its_beginning(lm):
    conversation = Conversation(lm, Sampling(0.0), 8, 0, "Be brief.")
    for number in range(12):
        assert len("".join(conversation.answer(f"the king is {number}"))) > 0
        roles = [turn["role"] for turn in conversation.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert conversation.turns[-2]["content"] == f"the king is {number}"
    assert 2 <= len(conversation.turns) < 24
    with pytest.raises(UserError, match="shorten"):
        list(conversation.answer("queen " * CONTEXT))
    assert conversation.turns[-2]["content"] == "the king is 11"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("/sistem x\n", "/system"),
        ("/seed -1\n", "/seed"),
        ("/save\n", "/save talk.jsonl"),
        ("/save /absent/folder/x\n", "cannot write"),
        (b"\xff\n", "UTF-8"),
        ("king " * 300, "shorten"),
    ],
)
def test_a_wrong_line_of_a_pipe_is_one_line(lm, monkeypatch, capsys, lines, said):
    code, _, err = talk(lm, lines, monkeypatch, capsys)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_a_model_without_a_template_is_one_line(lm, monkeypatch, capsys):
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    code, _, err = talk(lm, "a\n", monkeypatch, capsys)
    assert code == 2 and err.startswith("error: this model has no chat template") and len(err.splitlines()) == 1
