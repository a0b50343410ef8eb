"""Conversations to fine-tune on: their ids and masks against transformers, rows, bad input, whole runs."""

import json
import random
import re
import shutil

import jax
import numpy as np
import pytest
from chats import SMOLLM2, make_tokenizer_folder, published, random_conversation, write_rows
from conftest import GPT2_LIKE, TINY_RUN, make_config, trainable_on

from gptjax.apps.data_prep.conversations import conversations_in
from gptjax.apps.data_prep.inspect import inspect
from gptjax.config import DataConfig
from gptjax.configfile import load_config
from gptjax.convert import export_model, open_model
from gptjax.data.batches import as_batch, examples_of
from gptjax.data.corpus import load_corpus
from gptjax.data.layout import lay_out
from gptjax.errors import UserError
from gptjax.lifecycle.closing import changes_by_source
from gptjax.metrics import read_metrics
from gptjax.step import init_state, make_train_step
from gptjax.tokenizers import ByteTokenizer, ChatTemplate, chat_template, read_huggingface_tokenizer
from gptjax.tokenizers.chat import chatml
from gptjax.trainer import train

pytest.importorskip("jinja2", reason="pip install -e '.[finetune]'")
TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The king é."}]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, corpus_file):
    return make_tokenizer_folder(tmp_path_factory.mktemp("tok") / "chat", corpus_file, None)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """60 conversations of very unequal lengths."""
    rng = random.Random(1)
    rows = [{"messages": random_conversation(rng)} for _ in range(60)]
    return write_rows(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


def data_of(path, tokenizer_folder, token_cache, **more) -> DataConfig:
    how = {"kind": "sft", "tokenizer": str(tokenizer_folder), "cache_dir": str(token_cache), **more}
    return DataConfig(path=str(path), **how)


TEMPLATES = {
    "SmolLM2": lambda tokenizer: SMOLLM2,
    "Llama-3": lambda tokenizer: published("llama3"),
    "Llama-3, marked": lambda tokenizer: published("llama3_training"),
    "Qwen2.5": lambda tokenizer: published("qwen2_5"),
    "Qwen2.5, marked": lambda tokenizer: published("qwen2_5_training"),
    "Qwen3": lambda tokenizer: published("qwen3"),
    "Qwen3, marked": lambda tokenizer: published("qwen3_training"),
    "ChatML": chatml,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(name, tokenizer_folder):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
    ours = read_huggingface_tokenizer(tokenizer_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    text = TEMPLATES[name](ours)
    template = ChatTemplate(text, {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>"})
    rng = random.Random(0)
    for _ in range(200):
        messages = random_conversation(rng)
        laid = lay_out(template, ours, messages, "here")
        wanted = theirs.apply_chat_template(
            messages, chat_template=text, return_dict=True, return_assistant_tokens_mask=template.marks
        )
        assert laid.ids.tolist() == wanted["input_ids"]
        if template.marks:
            assert laid.learnt.astype(int).tolist() == wanted["assistant_masks"]
        assert len(laid.turns) == sum(message["role"] == "assistant" for message in messages)
        assert not laid.straddles


@pytest.mark.parametrize(("plain", "marked"), [("llama3", "llama3_training"), ("qwen2_5", "qwen2_5_training")])
def test_a_template_without_marks_learns_what_the_marked_one_marks(plain, marked, tokenizer_folder):
    ours, rng = read_huggingface_tokenizer(tokenizer_folder), random.Random(2)
    templates = [ChatTemplate(published(name), {"bos_token": "<|begin_of_text|>"}) for name in (plain, marked)]
    for _ in range(50):
        messages = random_conversation(rng)
        found, wanted = (lay_out(template, ours, messages, "here") for template in templates)
        np.testing.assert_array_equal(found.ids, wanted.ids)
        # The marks of some templates include the line end after a turn, which no model is asked to write.
        assert not (found.learnt & ~wanted.learnt).any()
        extra = ours.decode(wanted.ids[wanted.learnt & ~found.learnt].tolist())
        assert not extra.strip()


def test_rows_hold_every_conversation_once_and_learn_the_responses(chats, tokenizer_folder, token_cache):
    cfg = data_of(chats, tokenizer_folder, token_cache)
    source = load_corpus(cfg).sources[0]
    tokenizer, seen = source.tokenizer, []
    end, line = tokenizer.special_tokens["<|im_end|>"], int(tokenizer.encode("\n")[0])
    for half in (source.train, source.val):
        examples = examples_of(half, 512, "training")
        for i in range(len(examples)):
            row = examples.example(i, 0)
            for segment in conversations_in(row):
                inside = row["segments"] == segment
                learnt = row["targets"][inside][row["weights"][inside] > 0].tolist()
                seen.append(tokenizer.decode([line if id == end else id for id in learnt]))
                np.testing.assert_array_equal(row["positions"][inside], np.arange(inside.sum()))
    rows = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    said = ["".join(m["content"] + "\n" for m in row if m["role"] == "assistant") for row in rows]
    assert sorted(seen) == sorted(said)
    assert len(source.val.array("ends")) == 6
    everything = load_corpus(data_of(chats, tokenizer_folder, token_cache, train_on="all")).sources[0].train
    weights = [examples_of(everything, 512, "training").example(i, 0)["weights"].sum() for i in range(3)]
    assert all(w > 400 for w in weights)


def test_a_long_conversation_is_cut_at_whole_turns_or_left_out_and_said(tmp_path, token_cache):
    short = {"prompt": "a", "response": "b"}
    turns = [{"role": role, "content": "x" * 20} for role in ("user", "assistant") * 3]
    rows = [short] * 8 + [{"messages": turns}, {"prompt": "p" * 300, "response": "r"}]
    path = write_rows(tmp_path / "long.jsonl", rows)
    corpus = load_corpus(data_of(path, "byte", token_cache, val_frac=0.2))
    train = corpus.sources[0].train
    examples = examples_of(train, 130, "training")
    texts = [corpus.tokenizer.decode(examples.example(i, 0)["tokens"].tolist()) for i in range(len(examples))]
    assert max(text.count("x" * 20) for text in texts) == 2  # one of its three exchanges
    notes = [note.partition(": ")[2] for note in corpus.notes]
    beyond = "are longer than model.context_length 130 and are"
    assert notes == [f"1 of 8 conversations {beyond} cut after a whole turn"]
    assert sum(e["weights"].sum() for e in (examples.example(i, 0) for i in range(len(examples)))) > 0
    with pytest.raises(UserError, match=r"all 8 conversations are longer than model.context_length 20; raise it"):
        examples_of(train, 20, "training")


BAD = {
    '{"messages": []}': "has no messages",
    '{"messages": [{"role": "asistant", "content": "x"}]}': "role 'asistant'.*did you mean 'assistant'",
    '{"prompt": "x", "response": ""}': "response without tokens",
    '{"prompt": "x", "response": " "}': "response without tokens",
    '{"messages": [{"role": "user", "content": "x"}]}': "no message of role assistant",
    '{"messages": [{"role": "user", "content": 3}]}': "content is no text",
    '{"messages": ["Who?"]}': "a message without a role: 'Who\\?'",
    '{"messages": [{"content": "Who?"}]}': "a message without a role",
    '{"prompt": "x"}': "has the fields 'prompt'",
    '["x"]': "is no JSON object",
    "{": "is not JSON",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_one_line_with_its_place(line, tmp_path, token_cache):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"line 2.* {BAD[line]}|line 2 {BAD[line]}") as refused:
        load_corpus(data_of(path, "byte", token_cache))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__ }}", "reaches for the attribute '__class__' of a list"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "more",
        ),
        ("{{ 'a' * 10**9 }}", "characters"),
        ("{{ '%999999999d' % 3 }}", "formats to a width"),
        ("{% for m in messages %}{{ loop.index }}{% endfor %}{% if", "damaged"),
        ("{{ messages | length }}", "differently|does not show"),
        ("Hello", "the chat template writes nothing of what the assistant says"),
    ],
)
def test_a_template_that_misbehaves_is_one_line(template, why, tmp_path, token_cache):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}] * 3)
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(UserError, match=why) as refused:
        load_corpus(data_of(path, "byte", token_cache, chat_template=str(tmp_path / "t.jinja")))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "row"),
    [("sft", {"prompt": "a", "response": "b"}), ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c"})],
)
def test_too_few_rows_are_counted_as_the_file_has_them(kind, row, tmp_path, token_cache):
    path = write_rows(tmp_path / "few.jsonl", [row] * 2)
    with pytest.raises(UserError, match=r"has too few rows, 2, to leave any for validation \(data.val_frac\)"):
        load_corpus(data_of(path, "byte", token_cache, kind=kind))


def test_a_table_and_messages_give_the_same_tokens(tmp_path, token_cache):
    table = tmp_path / "pairs.tsv"
    table.write_text("source\ttarget\n" + "Who?\tThe king é.\n" * 12)
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}] * 12)
    found = [load_corpus(data_of(path, "byte", token_cache)).sources[0].train.array("ids") for path in (table, rows)]
    np.testing.assert_array_equal(*found)


def test_inspect_shows_what_is_learnt_in_two_colours(chats, tokenizer_folder, token_cache, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(token_cache))  # the cache of what inspect reads
    how = {"kind": "sft", "tokenizer": str(tokenizer_folder), "context_length": 512}
    inspect(str(chats), **how)
    plain = capsys.readouterr().out
    assert re.search(r"<\|im_start\|>assistant\n«[^«»]*<\|im_end\|>»", plain)
    monkeypatch.setattr("gptjax.shell.display.colours_allowed", lambda stream=None: True)
    monkeypatch.setattr("gptjax.apps.data_prep.conversations.colours_allowed", lambda stream=None: True)
    inspect(str(chats), **how)
    coloured = capsys.readouterr().out
    assert "\x1b[32m" in coloured and "\x1b[2m" in coloured
    shown = coloured.split("\nrow 1", 1)[1], plain.split("\nrow 1", 1)[1]
    assert re.sub(r"\x1b\[\d+m", "", shown[0]) == re.sub("[«»]", "", shown[1])


def step_on(batch, microbatches=1, devices=1, **axes):
    """Loss, gradient norm and weights after one step on the rows of a batch."""
    train = {"objective": "sft", "batch_sequences": len(batch["tokens"]), "microbatches": microbatches}
    model = {**GPT2_LIKE, "n_layers": 1, "vocab_size": 500, "context_length": 128}
    t = trainable_on(make_config(model, train=train, optim={"clip_norm": None}), devices, **axes)
    state, metrics = make_train_step(t)(init_state(t), jax.device_put(batch, t.batch_sharding))
    return float(metrics["train/loss"]), float(metrics["grad_norm"]), state.params


@pytest.mark.whole
def test_packing_microbatches_and_devices_change_nothing(tmp_path, tokenizer_folder, token_cache):
    lengths = [1, 40, 2, 35, 1, 1, 30, 3, 1, 2, 20, 1, 1, 2, 1, 1, 4]
    chats = [{"prompt": "Who?", "response": "king " * n + "é"} for n in lengths]
    path, rows = write_rows(tmp_path / "unequal.jsonl", chats), {}
    for pack in (True, False):
        cfg = data_of(path, tokenizer_folder, token_cache, pack=pack, val_frac=0.06)
        examples = examples_of(load_corpus(cfg).sources[0].train, 128, "training")
        everything = [examples.example(i, 0) for i in range(len(examples))]
        everything += [{**everything[0], "weights": np.zeros(128, np.float32)}] * (-len(everything) % 8)
        rows[pack] = as_batch(everything)
    assert len(rows[True]["tokens"]) < len(rows[False]["tokens"])
    per_row = rows[False]["weights"].sum(axis=1)
    assert per_row.max() > 5 * per_row[per_row > 0].min()  # very unequal masks
    loss, norm, params = step_on(rows[False])
    for batch, M, devices, axes in ((rows[False], 4, 1, {}), (rows[True], 1, 8, {"fsdp": 4, "tensor": 2})):
        other, other_norm, other_params = step_on(batch, M, devices, **axes)
        assert other == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other_params, params)


def test_loss_and_gradient_norm_are_those_of_transformers(chats, tokenizer_folder, token_cache, tmp_path):
    torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=500, max_position_embeddings=256, num_key_value_heads=2, **sizes)
    )
    folder = shutil.copytree(tokenizer_folder, tmp_path / "model")
    made.save_pretrained(folder)
    half = load_corpus(data_of(chats, folder, token_cache, pack=False)).sources[0].train
    examples = examples_of(half, 256, "training")
    batch = as_batch([examples.example(i, 0) for i in range(8)])
    labels = np.where(batch["weights"] > 0, batch["targets"], -100)
    labels = np.concatenate([np.full((8, 1), -100), labels], axis=1)  # transformers shifts them itself
    ids = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)
    wanted = made(torch.tensor(ids[:, :256]).long(), labels=torch.tensor(labels[:, :256]).long()).loss
    assert not batch["weights"][:, -1].any()
    wanted.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in made.parameters()))
    model = open_model(folder)
    cfg = make_config({}, train={"objective": "sft", "batch_sequences": 8}, optim={"clip_norm": None})
    t = trainable_on(type(cfg)(**{**vars(cfg), "model": model.config}))
    state = init_state(t)._replace(params=model.read(t.state.params))
    _, metrics = make_train_step(t)(state, batch)
    assert float(metrics["train/loss"]) == pytest.approx(wanted.item(), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.whole
def test_a_run_resumes_bitwise_and_exports_its_template(
    chats, tokenizer_folder, token_cache, tmp_path, no_closing_sample
):
    flags = [*TINY_RUN, "--data.kind=sft", f"--data.path={chats}", f"--data.tokenizer={tokenizer_folder}"]
    flags += [f"--data.cache_dir={token_cache}", "--train.objective=sft", "--model.context_length=256"]
    flags += ["--train.total_steps=4", "--checkpoint.keep_last=5", "--checkpoint.save_interval_steps=2"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(load_config([*flags, f"--workdir={whole}"]))
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "4")
    train(load_config([*flags, f"--workdir={part}"]))
    names = ("step", "train/loss", "val/loss", "grad_norm")
    first, second = ([{n: row.get(n) for n in names} for row in read_metrics(folder)] for folder in (whole, part))
    assert first == second
    assert "val/bpb" not in read_metrics(whole)[-1]
    model = open_model(whole)
    assert model.tokenizer.chat_template == chatml(read_huggingface_tokenizer(tokenizer_folder))
    assert model.tokenizer.special_tokens["<|im_end|>"] in model.tokenizer.eos_ids
    export_model(str(whole), str(tmp_path / "export"))
    exported = read_huggingface_tokenizer(tmp_path / "export")
    assert exported.chat_template == model.tokenizer.chat_template
    assert exported.eos_ids == model.tokenizer.eos_ids
    assert chat_template(exported).render(TALK, False).endswith("The king é.<|im_end|>\n")


def test_the_byte_tokenizer_ends_turns_with_its_own_end():
    tokenizer = ByteTokenizer()
    laid = lay_out(ChatTemplate(chatml(tokenizer)), tokenizer, TALK, "here")
    assert laid.ids[laid.learnt][-1] == tokenizer.eos_id
    assert tokenizer.decode(laid.ids[laid.learnt].tolist()) == "The king é."


def test_the_end_of_a_run_says_what_each_source_lost():
    rows = [{"step": 0, "val/loss": 2.0, "val/loss/old": 1.5, "val/loss/new": 2.5}, {"step": 1, "train/loss": 2.0}]
    rows += [{"step": 2, "val/loss": 1.9, "val/loss/old": 1.75, "val/loss/new": 2.0}]
    assert changes_by_source(rows) == [
        "val/loss/old 1.5000 before, 1.7500 after (+0.2500)",
        "val/loss/new 2.5000 before, 2.0000 after (-0.5000)",
    ]
