"""Adapters: against peft on the same weights; on meshes and microbatches; saved alone, resumed, merged, exported."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import MODERN, make_config, trainable_on
from flax.traverse_util import flatten_dict, unflatten_dict
from test_step import run_steps, some_batch

import gptjax
from gptjax.config import LoraConfig, plain_values
from gptjax.configfile import config_from_dict
from gptjax.convert import export_adapter, export_model, import_model, open_model
from gptjax.errors import UserError
from gptjax.nn.adapters import ADAPTER, join_adapter, merge_adapter, without_adapter
from gptjax.nn.transformer import abstract_model, bind, logits
from gptjax.nn.weights import Int8, dense, hold
from gptjax.step import init_state, make_train_step
from gptjax.trainer import train

SMALL = {**MODERN, "n_layers": 1}
LORA = {"rank": 4, "alpha": 8.0, "targets": ["matrix"]}
NO_DECAY = {"schedule": "constant", "peak_lr": 1e-2, "weight_decay": 0.0, "clip_norm": None, "b2": 0.999}


def with_random_b(state):
    """The state with small normal values in B, so that the adapters have an effect."""
    leaves = flatten_dict(state.params[ADAPTER])
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = {
        path: 0.1 * jax.random.normal(key, leaf.shape) if path[-1] == "b" else leaf
        for (path, leaf), key in zip(sorted(leaves.items()), keys, strict=True)
    }
    placed = jax.device_put(unflatten_dict(moved), jax.tree.map(lambda x: x.sharding, state.params[ADAPTER]))
    return state._replace(params={**state.params, ADAPTER: placed})


@pytest.mark.whole
@pytest.mark.parametrize("base_dtype", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_mesh_and_microbatches_give_the_losses_of_one_device(base_dtype):
    lora = {**LORA, "base_dtype": base_dtype}
    one = trainable_on(make_config(SMALL, lora=lora, optim=NO_DECAY))
    first = init_state(one)
    base, adapters = (jax.tree.map(np.array, part) for part in (without_adapter(first.params), first.params[ADAPTER]))
    expected, state, _ = run_steps(one, 4, state=first)
    jax.tree.map(np.testing.assert_array_equal, without_adapter(state.params), base)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params[ADAPTER], adapters)
    assert all(jax.tree.leaves(changed))
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {
        leaf.shape for leaf in jax.tree.leaves(state.params[ADAPTER])
    }
    cut = make_config(SMALL, lora=lora, optim=NO_DECAY, train={"batch_sequences": 8, "microbatches": 4})
    np.testing.assert_allclose(run_steps(trainable_on(cut), 4)[0], expected, atol=1e-5)
    sharded = trainable_on(make_config(SMALL, lora=lora, optim=NO_DECAY), 8, fsdp=4, tensor=2)
    np.testing.assert_allclose(run_steps(sharded, 4)[0], expected, atol=1e-5)


@pytest.mark.whole
def test_no_gradient_of_a_frozen_matrix_is_kept():
    """The compiled step's temporaries are smaller than one copy of the blocks' matrices."""
    shape = {**MODERN, "d_model": 256, "mlp": "gelu", "qk_norm": False, "conv_width": None}
    cfg = make_config(shape, lora=LORA, run={"scan_layers": True})
    t = trainable_on(cfg)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=t.batch_sharding), some_batch(t, 0, B=8)
    )

    def temporaries(t):
        with jax.set_mesh(t.mesh):
            return make_train_step(t).compiled.lower(t.state, batch).compile().memory_analysis().temp_size_in_bytes

    matrices = sum(4 * leaf.size for leaf in jax.tree.leaves(t.state.params["blocks"]))
    assert temporaries(trainable_on(dataclasses.replace(cfg, lora=LoraConfig()))) - temporaries(t) > 0.8 * matrices


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["matrx"], r"lora.targets 'matrx' matches no matrix of the blocks; did you mean 'matrix'\?"),
        (["q_proj"], r"'q_proj' matches no matrix .* such as blocks/attention/key"),
        (["embed"], r"lora.targets 'embed' matches no matrix of the blocks"),
        (["attention/("], r"lora.targets 'attention/\(' is neither a role nor a regular expression"),
    ],
    ids=str,
)
def test_targets_that_match_nothing_are_refused(targets, message):
    with pytest.raises(UserError, match=message) as refused:
        trainable_on(make_config(MODERN, lora={"rank": 2, "targets": targets}))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.whole
def test_merged_weights_compute_the_same():
    cfg = make_config(SMALL, lora={**LORA, "base_dtype": "int8", "targets": ["attention", "mlp/(up|down)"]})
    t = trainable_on(cfg)
    state = with_random_b(init_state(t))
    graphdef, _, metadata = abstract_model(cfg.model, cfg.run)
    tokens = some_batch(t, 0)["tokens"]

    @jax.jit
    def logits_of(params):
        model = bind(graphdef, params)
        return logits(model, model(tokens)[0])

    apart = logits_of(join_adapter(state.params, cfg.lora))
    np.testing.assert_allclose(logits_of(merge_adapter(state.params, cfg.lora, metadata)), apart, atol=1e-4)
    assert np.abs(apart - logits_of(without_adapter(state.params))).max() > 0.01


def test_eight_bits_are_within_half_a_step_of_each_channel():
    declared = {"role": "matrix", "axes": ("layers", "embed", "heads", "head_dim"), "n_stacked": 1, "n_in": 1}
    weight = jax.random.normal(jax.random.key(0), (2, 16, 3, 4)).at[0, :, 1, 2].set(0)
    held = hold(weight, declared, "int8")
    assert isinstance(held, Int8)
    assert held.scales.shape == (2, 1, 3, 4)
    assert (np.abs(dense(held) - weight) <= held.scales / 2 * (1 + 1e-5)).all()
    assert hold(weight, {**declared, "role": "norm"}, "int8") is weight


torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
peft = pytest.importorskip("peft", reason="pip install -e '.[peer]'")

VOCAB, T = 384, 32
SHAPES = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=T, tie_word_embeddings=True,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=T, bos_token_id=1, eos_token_id=0
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A random model of each shape, written by transformers; weights large enough for logits to differ."""
    found = {}
    for name, config in SHAPES.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0) if parameter.ndim > 1 else None
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


def config_on(base: Path, corpus_file: Path, workdir: Path, **sections):
    model = plain_values(open_model(str(base)).config) | {"vocab_multiple": 8}
    values = {
        "model": {key: value for key, value in model.items() if "." not in key},
        "data": {"path": str(corpus_file), "tokenizer": "byte", "cache_dir": str(corpus_file.parent)},
        "train": {"batch_sequences": 8, "total_steps": 4, "eval_sequences": 8, "log_interval_steps": 1},
        "checkpoint": {"save_interval_steps": 2},
        "init_from": str(base),
        "workdir": str(workdir),
        "lora": LORA,
        "optim": NO_DECAY,
        **sections,
    }
    for key, value in model.items():
        if "." in key:
            section, _, name = key.partition(".")
            values["model"].setdefault(section, {})[name] = value
    return config_from_dict(values)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_an_exported_adapter_is_pefts_and_comes_back(bases, corpus_file, tmp_path, name, no_closing_sample):
    """Train a few steps, export, load in peft: the same logits; import again: the same; merged: the same."""
    cfg = config_on(bases[name], corpus_file, tmp_path / "run")
    assert train(cfg) == 0
    folder = tmp_path / "run" / "checkpoints" / "4" / "params"
    saved = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    run, ids = gptjax.load(tmp_path / "run"), np.arange(24).reshape(2, 12) + 40
    assert saved < 200_000
    expected = run.logits(ids)
    assert np.abs(expected - gptjax.load(bases[name]).logits(ids)).max() > 0.05  # the adapter has an effect
    export_adapter(str(tmp_path / "run"), str(tmp_path / "peft"))
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[name])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.from_numpy(ids)).logits.numpy(), expected, atol=1e-4)
    import_model(str(tmp_path / "peft"), str(tmp_path / "again"))
    np.testing.assert_allclose(gptjax.load(tmp_path / "again").logits(ids), expected, atol=1e-4)
    with torch.no_grad():
        next(base.parameters()).add_(0.1)
    theirs.unload().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"is an adapter for a base with fingerprint .*give its own with --base"):
        import_model(str(tmp_path / "peft"), str(tmp_path / "wrong"), base=str(tmp_path / "other"))
    export_model(str(tmp_path / "run"), str(tmp_path / "whole"))
    np.testing.assert_allclose(gptjax.load(tmp_path / "whole").logits(ids), expected, atol=1e-4)
    with pytest.raises(UserError, match=r"is an adapter \(PEFT\) of .*gptjax convert from-hf"):
        open_model(str(tmp_path / "peft"))


@pytest.mark.whole
def test_ten_steps_equal_pefts(bases):
    """The same base, A and B (not zero), batches and AdamW."""
    cfg = make_config({**shape_of(bases["llama"]), "vocab_multiple": 1}, lora=LORA, optim=NO_DECAY)
    t = trainable_on(cfg)
    read = open_model(str(bases["llama"])).read(without_adapter(t.state.params))
    state = with_random_b(init_state(t, read))
    theirs = peft_with(bases["llama"], state.params[ADAPTER])
    step = make_train_step(t)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for number in range(10):
        batch = some_batch(t, number, T=T)
        state, metrics = step(state, batch)
        raw = theirs(torch.from_numpy(np.asarray(batch["tokens"], np.int64))).logits
        targets = torch.from_numpy(np.asarray(batch["targets"], np.int64))
        losses = torch.nn.functional.cross_entropy(raw.transpose(1, 2), targets, reduction="none")
        weights = torch.from_numpy(np.array(batch["weights"]))
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, float("inf"))
        optimizer.step()
        assert abs(float(metrics["train/loss"]) - loss.item()) < 1e-5
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)


def shape_of(base: Path) -> dict:
    """The model's config as nested plain values."""
    return dataclasses.asdict(open_model(str(base)).config)


def peft_with(base: Path, adapters):
    """The base in peft, with our A and B."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    ours = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if found := re.search(r"layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])", name):
                layer, part, module, letter = found.groups()
                pair = adapters["blocks"]["attention" if part == "self_attn" else "mlp"][
                    ours.get(module) or module.removesuffix("_proj")
                ]
                value = np.array(pair[letter.lower()][int(layer)])
                value = value.reshape(-1, 4).T if letter == "A" else value.reshape(4, -1).T
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    return model


@pytest.mark.whole
def test_a_run_resumes_bitwise_and_needs_its_own_base(bases, corpus_file, tmp_path, no_closing_sample):
    def run(name: str, steps: int, **sections):
        cfg = config_on(bases["llama"], corpus_file, tmp_path / name, **sections)
        cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, ema_decay=0.9))
        assert train(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, total_steps=steps))) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return cfg, {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}

    _, whole = run("whole", 4)
    run("parts", 2)
    cfg, parts = run("parts", 4)
    assert parts == whole
    for name in ("params", "rest"):
        assert_same_arrays(*(tmp_path / run / "checkpoints" / "4" / name for run in ("whole", "parts")))

    with pytest.raises(UserError, match=r"holds adapters for another base: .*; give that model as init_from"):
        other = tmp_path / "other"
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(SHAPES["llama"]()).save_pretrained(other)
        train(dataclasses.replace(cfg, init_from=str(other), train=dataclasses.replace(cfg.train, total_steps=6)))
    with pytest.raises(UserError, match=r"lora.rank 4 needs init_from, the model that the adapters belong to"):
        train(dataclasses.replace(cfg, init_from=None, workdir=str(tmp_path / "new")))

    # A run that starts from the adapters of another brings them along, over the same base.
    run("next", 2, init_from=str(tmp_path / "whole"))
    meta = json.loads(next((tmp_path / "next" / "checkpoints" / "2" / "meta").glob("metadata")).read_text())
    assert meta["base"]["path"] == str(bases["llama"])
    with pytest.raises(UserError, match=r"a run with other adapters: lora.rank 4 there and 2 here; .*--merged"):
        run("another", 2, init_from=str(tmp_path / "whole"), lora={**LORA, "rank": 2})


def assert_same_arrays(first: Path, second: Path) -> None:
    """Two folders of Orbax hold the same arrays."""
    import orbax.checkpoint as ocp

    trees = [ocp.StandardCheckpointer().restore(folder) for folder in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_an_adapter_for_another_base_is_refused(bases, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["llama"])
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"is an adapter for another base than the GPT-2 given; .*--base"):
        import_model(str(tmp_path / "adapter"), str(tmp_path / "run"), base=str(bases["gpt2"]))
