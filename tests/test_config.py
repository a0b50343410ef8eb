"""Configs: files, command line, and the errors in both."""

import dataclasses
import inspect

import pytest
import yaml
from conftest import ROOT
from jax.sharding import AbstractMesh

from gptjax.config import Config, override, plain_values
from gptjax.configfile import config_from_dict, config_to_yaml, differing_keys, load_config
from gptjax.errors import UserError
from gptjax.nn.transformer import count_params
from gptjax.step import make_trainable

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_short_builds_abstractly_and_divides_its_mesh(path):
    assert 10 <= len(path.read_text().splitlines()) <= 40
    assert path.read_text().startswith("# ")
    cfg = load_config([str(path)])
    if cfg.model.vocab_size is None:
        cfg = override(cfg, {"model.vocab_size": 65})
    sizes = {name: 4 if size == -1 else size for name, size in cfg.mesh.axes.items()}
    t = make_trainable(cfg, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
    assert t.state.params["embed"].shape[1] == cfg.model.d_model


def test_the_baby_gpt_has_its_published_size():
    cfg = load_config([str(ROOT / "configs" / "shakespeare_char.yaml")])
    model = dataclasses.replace(cfg.model, vocab_size=65)
    counts = count_params(model)
    assert counts["total"] - counts["positions"] == 10_646_784  # nanoGPT counts no positions: "10.65M"


def test_a_config_survives_the_way_through_yaml():
    cfg = load_config([str(CONFIGS[0]), "--model.positions.scaling.factor=4", "--optim.lr_scales={embed: 0.5}"])
    assert cfg.model.positions.scaling.factor == 4
    again = config_from_dict(yaml.safe_load(config_to_yaml(cfg)))
    assert again == cfg


def test_numbers_may_be_written_with_exponents(tmp_path):
    (tmp_path / "c.yaml").write_text("optim: {peak_lr: 6e-4}\n")
    assert load_config([str(tmp_path / "c.yaml")]).optim.peak_lr == 6e-4


def test_the_command_line_beats_the_file_and_the_file_beats_the_preset(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {preset: gpt2-xl, d_model: 900}\n")
    cfg = load_config([str(tmp_path / "c.yaml"), "--model.n_layers", "2"])
    assert (cfg.model.n_layers, cfg.model.d_model, cfg.model.n_heads) == (2, 900, 25)
    other = load_config([str(tmp_path / "c.yaml"), "--model.preset=gpt2"])
    assert (other.model.n_layers, other.model.d_model) == (12, 900)
    assert cfg.workdir == "runs/c"


def test_every_field_is_documented():
    def undocumented(cls):
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.default_factory):
                yield from undocumented(field.default_factory)
            elif f"\n    {field.name}: " not in inspect.cleandoc(cls.__doc__):
                yield f"{cls.__name__}.{field.name}"

    assert not list(undocumented(Config))


def test_help_shows_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config([str(CONFIGS[0]), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{key}" in shown for key in plain_values(Config()))


def test_what_only_carries_out_a_run_may_differ_on_resume():
    base = load_config([str(CONFIGS[0])])
    free = load_config([str(CONFIGS[0]), "--mesh.data=2", "--train.total_steps=7", "--log.project=x"])
    assert not differing_keys(base, free)
    assert set(differing_keys(base, load_config([str(CONFIGS[0]), "--seed=1"]))) == {"seed"}


OLD = """
profile: "3:5"
model:
  positions: rope
  rope_theta: 500
  rope_scaling: {factor: 2}
  norm: rmsnorm
  norm_weights: false
  norm_eps: 1.0e-6
  mlp: swiglu
  d_mlp: 96
  qk_norm: true
  qkv_bias: true
  parametrization: completep
  base_width: 64
  base_layers: 2
  attention: ring
  remat: named
  remat_names: [qkv]
  scan_layers: true
"""
NEW = """
format: 2
model:
  positions: {kind: rope, theta: 500, scaling: {factor: 2}}
  norm: {kind: rmsnorm, weights: false, eps: 1.0e-6}
  mlp: {kind: swiglu, width: 96}
  attention: {qk_norm: true, qkv_bias: true}
  parametrization: {kind: completep, base_width: 64, base_layers: 2}
run: {attention: ring, remat: named, remat_names: [qkv], scan_layers: true, profile: "3:5"}
"""


def test_a_config_of_format_1_is_read_as_todays(tmp_path):
    (tmp_path / "old.yaml").write_text(OLD)
    (tmp_path / "new.yaml").write_text(NEW)
    old, new = (load_config([str(tmp_path / name), "--workdir=w"]) for name in ("old.yaml", "new.yaml"))
    assert old == new
    flags = ["--model.norm=layernorm", "--model.d_mlp", "80", "--model.remat", "full"]
    flags += ["--model.attention=blocked", "--profile=2:4", "--model.rope_theta=7"]
    changed = load_config([str(tmp_path / "new.yaml"), "--workdir=w", *flags])
    values = {"model.norm.kind": "layernorm", "model.mlp.width": 80}
    values |= {"run.remat": "full", "run.attention": "blocked", "run.profile": "2:4", "model.positions.theta": 7.0}
    assert changed == override(new, values)


def test_a_preset_keeps_what_a_section_does_not_override(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {preset: llama-3.1-8b, positions: {scaling: null}}\n")
    model = load_config([str(tmp_path / "c.yaml")]).model
    assert (model.positions.kind, model.positions.theta, model.positions.scaling) == ("rope", 500000.0, None)
    assert (model.mlp.kind, model.mlp.width) == ("swiglu", 14336)


BAD = [
    ("modle: {n_layers: 2}", [], "unknown key 'modle'; did you mean 'model'?"),
    ("model: {n_layer: 2}", [], "did you mean 'model.n_layers'?"),
    ("model: 3", [], "must be a section"),
    ("model: {preset: gpt3}", [], "did you mean 'gpt2'?"),
    ("- a", [], "must hold `key: value` lines"),
    ("model: {", [], "is not YAML"),
    ("model: {mlp: {kind: gleu}}", [], "gleu"),
    ("model: {mlp: 3}", [], "model.mlp"),
    ("format: 3", [], "has format 3, and this version reads up to 2; upgrade gptjax"),
    ("model: {d_mlp: 8, mlp: {width: 9}}", [], "is given twice, once by its old name model.d_mlp"),
    ("run: 3\nprofile: 1:2", [], "run: 3 must be a section"),
    ("1: 2", [], "unknown key 1"),
    ("model: {n_layers: }", [], "model.n_layers is empty"),
    ("model: {preset: [1]}", [], "model.preset [1] is not known"),
    ("model: {n_layers: 2}\nmodel: {n_layers: 3}", [], "'model' is there twice"),
    ("model: {positions: {scaling: {factr: 3}}}", [], "did you mean 'model.positions.scaling.factor'?"),
    ("seed: 1", ["--optim.clip_norm=-1"], "optim.clip_norm -1.0 must be a number above 0"),
    ("seed: 1", ["--optim.lr_scales={'[': 1}"], "is not a regular expression"),
    ("seed: -1", [], "seed -1 must lie in"),
    ("seed: 1", ["--optim.b1=1.5"], "optim.b1 1.5"),
    ("optim: {moments_dtype: bfloat16, b2: 0.999}", [], "optim.b2 0.999 changes a moment by less than bfloat16"),
    ("run: {remat_names: [qvk]}", [], "remat_names"),
    ("seed: 1", ["--mesh.fsdp=-1"], "has -1 twice"),
    ("seed: 1", ["--mesh.data=0"], "mesh.data 0"),
    ("seed: 1", ["--train.loss_chunks=7"], "train.loss_chunks 7 does not divide model.context_length 1024"),
    ("seed: 1", ["--distributed.process_id=1"], "needs coordinator, num_processes and process_id together"),
    ("seed: 1", ["seven"], "seven"),
]


@pytest.mark.parametrize(("text", "args", "message"), BAD)
def test_bad_configs_are_named_in_one_line(tmp_path, text, args, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config([str(tmp_path / "c.yaml"), *args])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
