"""Models of Hugging Face, in and out, against transformers: logits, text, every tensor, and the tokenizer's ids."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import TINY_RUN, make_config, run_script, trainable_on

import gptjax
from gptjax.checkpoint import Checkpoints
from gptjax.config import ModelConfig
from gptjax.configfile import config_from_dict, config_to_yaml
from gptjax.convert import export_model, import_model, initial_model, open_model
from gptjax.convert.configs import DEFAULT_FULL_LAYERS, import_config
from gptjax.convert.families import FAMILIES
from gptjax.convert.forms import family_for
from gptjax.convert.models import on_first_device
from gptjax.data.batches import validation_batches
from gptjax.data.corpus import load_corpus
from gptjax.errors import UserError
from gptjax.generate import Sampling
from gptjax.lifecycle.evaluation import make_evaluate
from gptjax.lifecycle.start import Fixed, first_state
from gptjax.nn.transformer import init_params
from gptjax.presets import PRESETS
from gptjax.tokenizers import ByteTokenizer, tokenizer_from_dict

torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")

VOCAB = 400
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
UNCUT_YARN = {**YARN, "truncate": False}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0],
}
FLAT = {**TINY, "num_hidden_layers": 1}  # one layer is enough where another variant has the same tensors in two
# Each family, and each variant that takes another way through the tables.
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=0
    ),
    "gpt2-untied": lambda: transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        n_inner=96,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=0,
    ),
    "llama2": lambda: transformers.LlamaConfig(**FLAT),
    "llama3-tied": lambda: transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-linear-biased": lambda: transformers.LlamaConfig(
        **FLAT,
        rope_parameters=LINEAR,
        attention_bias=True,
        mlp_bias=True,
    ),
    "mistral-wide-heads": lambda: transformers.MistralConfig(**FLAT, head_dim=24, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**FLAT, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**TINY, head_dim=24, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(**FLAT, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **TINY, head_dim=24, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**FLAT, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **TINY, num_local_experts=4, num_experts_per_tok=2, head_dim=24, sliding_window=40, rope_parameters=UNCUT_YARN
    ),
    "arcee": lambda: transformers.ArceeConfig(**FLAT),
    # Of 128 tokens, most lie past the windows, and all past 4 times the original context.
    "mistral-window": lambda: transformers.MistralConfig(**FLAT, sliding_window=40),
    "qwen3-yarn": lambda: transformers.Qwen3Config(
        **TINY, head_dim=24, use_sliding_window=True, sliding_window=40, max_window_layers=1, rope_parameters=YARN
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **TINY, head_dim=24, sliding_window=40, query_pre_attn_scalar=20, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**TINY, "num_hidden_layers": 3},
        head_dim=24,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}},
    ),
    "phi3-long": lambda: transformers.Phi3Config(
        **FLAT, original_max_position_embeddings=32, rope_parameters=LONGROPE, sliding_window=40
    ),
    "olmo2": lambda: transformers.Olmo2Config(**TINY),
    "olmo3": lambda: transformers.Olmo3Config(
        **TINY,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}},
    ),
}

# Text is compared once a family; in transformers, Phi-3's factors change where a text outgrows its first context.
WITHOUT_TEXT = ("gpt2-untied", "llama-linear-biased", "mistral-window", "qwen3-yarn", "gemma2", "phi3-long", "olmo2")
WITHOUT_TEXT += ("olmoe",)
FAMILIES_ONCE = [name for name in CONFIGS if name not in WITHOUT_TEXT]


def build(name: str, folder: Path, **save) -> Path:
    """A model of transformers with random weights, norms and biases included, far from uniform logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder, **save)
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory, hf_directory) -> dict[str, Path]:
    folders = {}
    for name in CONFIGS:
        folders[name] = build(name, tmp_path_factory.mktemp(name))
        shutil.copytree(hf_directory, folders[name], dirs_exist_ok=True)
    return folders


def loss_of(model, ids: np.ndarray) -> float:
    """Mean cross-entropy of the next id, by transformers, in nats."""
    with torch.no_grad():
        return model(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss.item()


def their_tensors(folder: Path) -> dict[str, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


IDS = np.random.default_rng(0).integers(0, VOCAB, (4, 128))
PROMPT = "The king and queen of night"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_transformers_computes_the_same_here_and_leaves_as_it_came(name, built, tmp_path):
    source = built[name]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
    ours = gptjax.load(str(source))
    with torch.no_grad():
        np.testing.assert_allclose(ours.logits(IDS), theirs(torch.from_numpy(IDS)).logits, atol=1e-4, rtol=0)

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if name in FAMILIES_ONCE:
        prompt = tokenizer(PROMPT, return_tensors="pt")
        generated = theirs.generate(**prompt, max_new_tokens=50, do_sample=False, eos_token_id=None)[0]
        expected = generated[prompt["input_ids"].shape[1] :].tolist()
        expected = expected[: expected.index(0)] if 0 in expected else expected
        # 64: two chunks of 32, so that one program is compiled.
        assert ours.complete([PROMPT], 64, Sampling(temperature=0))[0].tokens[:50] == expected

    run, back = tmp_path / "run", tmp_path / "back"
    import_model(str(source), str(run))
    export_model(str(run), str(back))
    before, after = their_tensors(source), their_tensors(back)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[tensor], after[tensor]) for tensor in before)
    assert json.loads((back / "config.json").read_text())["model_type"] == theirs.config.model_type
    returned = transformers.AutoTokenizer.from_pretrained(back)
    assert (
        returned(PROMPT)["input_ids"]
        == tokenizer(PROMPT)["input_ids"]
        == ours.tokenizer.encode_prompt(PROMPT).tolist()
    )
    # transformers rebuilds a Qwen2 tokenizer by its class, and the tokenizer.json that leaves is what it then is.
    for file in ("tokenizer.json", "tokenizer_config.json") if name != "qwen2" else ():
        assert (back / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_key_that_a_config_lacks_has_the_value_of_its_class(kind):
    """What `transformers` computes with where a config.json has few keys."""
    config, family = transformers.AutoConfig.for_model(kind), FAMILIES[kind]
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for ours, theirs, default in family.keys:
        if theirs in defaults or (default is not None and ours != "positions.rotated_frac"):
            assert defaults[theirs] == default, theirs
    for key, allowed in family.demands.items():
        assert key not in defaults or defaults[key] in allowed, key
    if family.window is not None:
        key, switch, window = family.window
        assert defaults[key] == window
        assert switch is None or defaults[switch] is False
        assert defaults.get("max_window_layers") in (None, DEFAULT_FULL_LAYERS)
    if family.form["positions.kind"] == "rope":
        rope = config.rope_parameters
        assert rope.get("full_attention", rope)["rope_theta"] == family.theta
        assert rope.get("sliding_attention", {"rope_theta": None})["rope_theta"] == family.local_theta
        bare = import_config({"model_type": kind}).model
        scaled = rope.get("full_attention", rope).get("rope_type", "default") != "default"
        assert (bare.positions.scaling is not None) == scaled
        assert (bare.positions.theta, bare.positions.local_theta) == (family.theta, family.local_theta)
        everywhere = getattr(config, "sliding_window", None) is not None
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * bare.n_layers
        assert bare.local_layers == tuple(everywhere and kind == "sliding_attention" for kind in kinds)


def test_a_bfloat16_model_in_shards_is_read_and_written_in_bfloat16(built, tmp_path):
    source = tmp_path / "source"
    model = transformers.AutoModelForCausalLM.from_pretrained(built["llama2"], dtype=torch.bfloat16)
    model.save_pretrained(source, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(IDS)).logits
    np.testing.assert_allclose(gptjax.load(str(source)).logits(IDS), expected, atol=1e-4, rtol=0)
    import_model(str(source), str(tmp_path / "run"))
    export_model(str(tmp_path / "run"), str(tmp_path / "back"), "bfloat16")
    before, after = their_tensors(source), their_tensors(tmp_path / "back")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    returned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert returned.dtype == torch.bfloat16


def test_a_large_export_is_cut_into_shards_with_an_index(built, tmp_path, monkeypatch):
    monkeypatch.setattr("gptjax.convert.safetensors.MAX_SHARD_BYTES", 100_000)
    import_model(str(built["qwen2"]), str(tmp_path / "run"))
    export_model(str(tmp_path / "run"), str(tmp_path / "back"))
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    before, after = their_tensors(built["qwen2"]), their_tensors(tmp_path / "back")
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_weights_go_straight_to_eight_devices_an_eighth_each(name, built):
    model = open_model(str(built[name]))
    cfg = config_from_dict(
        {"model": {"vocab_multiple": 512, **_exact(model.config)}, "train": {"batch_sequences": 8}}
    )
    t = trainable_on(cfg, devices=8, fsdp=8)
    params = initial_model(str(built[name]), cfg.model, model.tokenizer).read(t.state.params)
    of_device = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            of_device[shard.device] += shard.data.nbytes
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(params) if leaf.sharding.is_fully_replicated)
    assert set(of_device.values()) == {(whole - small) // 8 + small}
    assert small < 0.06 * whole  # norms, biases and learned positions, which every device holds
    model = open_model(str(built[name]))
    alone = model.read(on_first_device(model.config))
    for one, eight in zip(jax.tree.leaves(alone), jax.tree.leaves(params), strict=True):
        cut = tuple(slice(0, n) for n in one.shape)  # but for the padding of the vocabulary, equal
        np.testing.assert_array_equal(np.asarray(one)[cut], np.asarray(eight)[cut])


def _exact(model: ModelConfig) -> dict:
    values = dataclasses.asdict(model)
    del values["vocab_multiple"], values["positions"]["scaling"]
    return values


def equal_in_transformers(run: Path, out: Path, kind: str, text: str) -> None:
    """An export of a run gives the run's loss to 1e-5, and the run's ids."""
    export_model(str(run), str(out))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = gptjax.load(str(run))
    assert theirs.config.model_type == kind
    ids = ours.tokenizer.encode(text)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == ours.tokenizer.eos_id
    windows = ids[: 8 * 32].reshape(8, 32).astype(np.int64)
    log_p = jax.nn.log_softmax(ours.logits(windows)[:, :-1])
    loss = -jnp.take_along_axis(log_p, windows[:, 1:, None], axis=-1).mean()
    assert abs(float(loss) - loss_of(theirs, windows)) < 1e-5


RMS = {"positions": "rope", "norm": "rmsnorm", "bias": False}


@pytest.mark.whole
def test_a_model_trained_here_has_the_same_loss_in_transformers(corpus_file, token_cache, tmp_path):
    run = tmp_path / "run"
    modern = {**RMS, "norm_weights": False, "qk_norm": True, "mlp": "swiglu", "tie_embeddings": False, "init": "zero"}
    form = [f"--model.{key}={str(value).lower()}" for key, value in modern.items()]
    data = (f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}", f"--workdir={run}")
    result = run_script("tests/train_briefly.py", *TINY_RUN, *form, *data, "--train.total_steps=20")
    assert result.returncode == 0, result.stderr
    equal_in_transformers(run, tmp_path / "out", "qwen3", corpus_file.read_text()[:2000])
    card = (tmp_path / "out" / "README.md").read_text()
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = next(row["val/loss"] for row in reversed(written) if "val/loss" in row)
    for fact in (
        str(corpus_file),
        f"| validation loss, nats a token | {final:.4f} |",
        "20 steps",
        "Limits",
        "adamw",
        "# run",
    ):
        assert fact in card


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        # What GPT-2's form has and this model lacks is exported as what changes nothing.
        ({"bias": False, "norm_weights": False}, "gpt2"),
        ({"qkv_bias": False}, "gpt2"),
        ({**RMS, "mlp": "relu2", "tie_embeddings": False}, "arcee"),
        ({**RMS, "mlp": "swiglu", "n_heads": 3, "head_dim": 24}, "mistral"),
        ({**RMS, "mlp": "swiglu", "qkv_bias": True}, "qwen2"),
        # With windows in some layers, and rotary positions alike in all.
        (
            {
                **RMS,
                "norm": {"kind": "rmsnorm", "place": "post"},
                "attention": {"qk_norm": True, "qk_norm_over": "heads", "window": 8, "pattern": ["local", "global"]},
                "mlp": "swiglu",
                "n_layers": 2,
            },
            "olmo3",
        ),
        (
            {
                **RMS,
                "bias": True,
                "attention": {"sinks": True},
                "mlp": {"kind": "moe", "moe": {"width": 48, "activation": "clamped_swiglu", "router_bias": True}},
            },
            "gpt_oss",
        ),
        (
            {
                **RMS,
                "norm": {"kind": "rmsnorm", "place": "post", "weights": False},
                "attention": {"qk_norm": True, "qk_norm_over": "heads"},
                "mlp": "swiglu",
            },
            "olmo2",
        ),
    ],
    ids=str,
)
def test_a_form_of_our_own_leaves_in_the_family_that_has_it(form, kind, tmp_path):
    shape = {"n_layers": 1, "d_model": 64, "n_heads": 4, "context_length": 32, "vocab_size": 257}
    cfg = config_from_dict({"model": {**shape, **form}})
    params = jax.tree.map(lambda x: x + 0.05, init_params(cfg.model, jax.random.key(0)))
    meta = {"config": yaml.safe_load(config_to_yaml(cfg)), "tokenizer": {"kind": "byte"}}
    checkpoints = Checkpoints(str(tmp_path / "run"), cfg.checkpoint)
    checkpoints.save(0, params, None, meta, None)
    checkpoints.close()
    equal_in_transformers(tmp_path / "run", tmp_path / "out", kind, "What, ho! Käse 日本 \n\n 12  " * 20)


def test_a_form_that_no_family_has_is_refused_with_the_fields_in_the_way():
    form = {**RMS, "mlp": "relu2", "qk_norm": True, "logit_softcap": 15.0, "conv_width": 2}
    modern = config_from_dict({"model": form}).model
    with pytest.raises(UserError, match="differing: ") as refused:
        family_for(modern)
    for part in (
        "model.logit_softcap 15.0 where Arcee has null",
        "model.conv_width 2 where Arcee has null",
        "model.attention.qk_norm true where Arcee has false",
        "model.preset smollm2-135m can be exported",
    ):
        assert part in str(refused.value), refused.value
    assert len(str(refused.value).splitlines()) == 1
    for name, preset in PRESETS.items():
        assert family_for(config_from_dict({"model": preset}).model) in ("gpt2", "llama"), name


def test_training_goes_on_from_a_directory_of_hugging_face(built, corpus_file, token_cache):
    """From GPT-2's with half its context and another padding: the loss before the first step is theirs."""
    source = built["gpt2"]
    shape = {"n_layers": 2, "d_model": 64, "n_heads": 4, "context_length": 128, "scan_layers": True}
    data = {"path": str(corpus_file), "cache_dir": str(token_cache), "tokenizer": str(source)}
    values = {"data": data, "init_from": str(source), "train": {"eval_sequences": 8}, "optim": {"ema_decay": 0.9}}
    cfg = make_config({**shape, "vocab_size": VOCAB, "vocab_multiple": 512}, **values)
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_sequences=8))
    corpus = load_corpus(cfg.data)
    t = trainable_on(cfg, devices=2, fsdp=2)
    state = first_state(t, corpus, Fixed())
    found = make_evaluate(t, corpus)(state)["val/loss"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
    batch = next(iter(validation_batches(corpus.sources[0].val, 128, 8, 8, range(8))))
    with torch.no_grad():
        raw = theirs(torch.from_numpy(batch["tokens"].astype(np.int64))).logits
    targets = torch.from_numpy(batch["targets"].astype(np.int64))
    losses = torch.nn.functional.cross_entropy(raw.transpose(1, 2), targets, reduction="none").numpy()
    assert abs(found - np.average(losses, weights=batch["weights"])) < 1e-4

    # The step gives its input's memory away: weights read into memory of this process's own must survive that.
    before = jax.tree.map(np.array, state.params)
    add_one = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
    after = add_one(state.params)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a + 1, b), before, after))

    with pytest.raises(UserError, match=r"another tokenizer.*set data\.tokenizer to "):
        other_ids = dataclasses.replace(corpus.sources[0], tokenizer=ByteTokenizer())
        first_state(t, dataclasses.replace(corpus, sources=(other_ids,)), Fixed())
    other = trainable_on(
        make_config({**shape, "vocab_size": VOCAB, "norm_eps": 1e-6, "d_mlp": 64}, init_from=str(source))
    )
    with pytest.raises(
        UserError, match=r"model\.mlp\.width 256 there and 64 here, model\.norm\.eps 1e-05 there and 1e-06 here"
    ):
        first_state(other, corpus, Fixed())


def test_an_imported_run_is_a_run(built, tmp_path):
    run = tmp_path / "run"
    import_model(str(built["qwen3"]), str(run))
    ours = gptjax.load(str(run))
    same = gptjax.load(str(built["qwen3"]))
    assert ours.config == same.config
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, same.params))
    again = tokenizer_from_dict(ours.tokenizer.to_dict())
    assert again.encode_prompt("king").tolist()[0] == again.bos_id
    with pytest.raises(UserError, match="not empty"):
        import_model(str(built["qwen3"]), str(run))
    with pytest.raises(UserError, match="is already a run"):
        import_model(str(run), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
