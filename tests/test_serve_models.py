"""Several models behind one server: adapters that share their base's weights and its batch, and models apart."""

import concurrent.futures
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")
pytest.importorskip("jinja2", reason="pip install -e '.[serve]'")

from bad_requests import send_nonsense
from conftest import MODERN
from serving import serving, tiny_model, tiny_tokenizer

import gptjax
from gptjax.apps.serve.commands import serve
from gptjax.apps.serve.models import Group, Member, describe_group, name_models, open_groups
from gptjax.config import LoraConfig
from gptjax.convert import import_model
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.nn.adapters import abstract_adapter, init_adapter, merge_adapter
from gptjax.nn.transformer import abstract_model, init_params
from gptjax.nn.weights import Int8
from gptjax.sampling import Sampling

SHAPE = {name: MODERN[name] for name in ("n_kv_heads", "positions", "norm", "mlp", "conv_width", "tie_embeddings")}
NAMES = ["base", "one", "two", "other"]
LORAS = [LoraConfig(rank=2, alpha=8.0), LoraConfig(rank=3, alpha=3.0, targets=("attention",))]


def make_adapter(lora: LoraConfig, cfg, seed: int):
    """Random adapters with an effect."""
    shapes, declared = abstract_adapter(lora, *abstract_model(cfg)[1:])
    first = init_adapter(shapes, declared, jax.random.key(seed))
    return jax.tree.map(lambda x: 0.7 * jax.random.normal(jax.random.key(seed), x.shape), first)


@pytest.fixture(scope="module")
def models(hf_directory):
    """A base and two adapters of it in one group, another model, and the weights of each of the four alone."""
    tokenizer = tiny_tokenizer(hf_directory)
    base = tiny_model(tokenizer, n_layers=1, **SHAPE)
    cfg, metadata = base.config, abstract_model(base.config)[2]
    first, other = (jax.tree.map(lambda x: 5 * x, init_params(cfg, jax.random.key(seed))) for seed in (3, 4))
    adapters = [(lora, make_adapter(lora, cfg, seed)) for seed, lora in enumerate(LORAS)]
    merged = [merge_adapter({**first, **values}, lora, metadata) for lora, values in adapters]
    shared, apart = LanguageModel(cfg, first, tokenizer), LanguageModel(cfg, other, tokenizer)
    shared.engine.adapt(adapters)
    group = Group(shared, [Member(name, shared, number) for number, name in enumerate(NAMES[:3])])
    weights = dict(zip(NAMES, [first, *merged, other], strict=True))
    return [group, Group(apart, [Member("other", apart)])], base, weights


@pytest.fixture(scope="module")
def server(models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptjax.decoding.prompts.CPU_CHUNK_TOKENS", 16)
        with serving(models[0], slots=4) as client:
            yield client


@pytest.mark.whole
def test_clients_of_all_models_together_get_the_answers_that_each_model_gives_alone(server, models):
    _, lm, weights = models
    prompts = ["what is this king and that queen, my lord", "this dies and that love is what the night do speak"]
    names = list(weights)

    def ask(number: int) -> str:
        how = {"temperature": [0.0, 0.9][number // 4 % 2], "seed": number, "max_tokens": 12}
        answer = server.complete(prompts[number // 8 % 2], model=names[number % 4], **how)
        assert answer["model"] == names[number % 4]
        return answer["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == [ask(number) for number in range(16)]
    for number, text in enumerate(together):
        lm.engine.load(weights[names[number % 4]])
        how = Sampling([0.0, 0.9][number // 4 % 2])
        assert text == lm.complete([prompts[number // 8 % 2]], 12, how, seed=number)[0].text
    assert len(set(together)) > 14


def test_beginnings_of_prompts_scores_and_embeddings_are_the_models_own(server, models):
    _, lm, weights = models
    text = "this beginning has more than two chunks of tokens, my lord, and the queen speaks of night"
    asked = [server.complete(text, model=name, max_tokens=3, temperature=0) for name in ("one", "two", "one")]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in asked]
    assert cached[:2] == [0, 0] and cached[2] >= 32
    assert asked[0]["choices"] == asked[2]["choices"] != asked[1]["choices"]
    for name in ("base", "two"):
        scored = server.complete(text, model=name, max_tokens=0, logprobs=0, echo=True)["choices"][0]
        lm.engine.load(weights[name])
        ids = lm.prompt_ids(text)
        log_p = np.asarray(jax.nn.log_softmax(lm.logits([ids])[0], axis=-1))[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(scored["logprobs"]["token_logprobs"][1:], log_p, atol=1e-3)
    vectors = [server.post("/v1/embeddings", model=name, input=text)[1]["data"][0]["embedding"] for name in weights]
    assert len({json.dumps(vector) for vector in vectors}) == 4


def test_models_are_listed_named_and_counted(server):
    listed = json.loads(server.send("GET", "/v1/models")[1])["data"]
    assert [model["id"] for model in listed] == ["base", "one", "two", "other"]
    assert [model["parent"] for model in listed] == [None, "base", "base", None]
    assert json.loads(server.send("GET", "/v1/models/two")[1])["id"] == "two"
    for path, values in (("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        status, answer = server.post(path, model="three", **values)
        assert (
            status == 404 and answer["error"]["code"] == "model_not_found" and "'other'" in answer["error"]["message"]
        )
        status, answer = server.post(path, **values)
        assert status == 400 and answer["error"]["param"] == "model"
        assert server.post(path, model=["base"], **values)[0] == 400
    assert server.send("GET", "/v1/models/three")[0] == 404
    before = server.metrics()
    used = server.complete("the king", model="one", max_tokens=5, temperature=0)["usage"]
    after = server.metrics()
    counted = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    assert counted['gptjax_prompt_tokens_total{model="one"}'] == used["prompt_tokens"]
    assert counted['gptjax_generated_tokens_total{model="one"}'] == used["completion_tokens"]
    assert not any('"two"' in name or '"base"' in name for name in counted)
    assert after['gptjax_slots{batch="base"}'] == after['gptjax_slots{batch="other"}'] == 4
    assert not any('model=""' in name for name in after)  # which the warm-up was counted as


@pytest.mark.whole
def test_runs_with_adapters_of_one_base_are_read_as_one_group(tmp_path, hf_directory):
    """What a command line names: a base of Hugging Face, and two of PEFT's adapters of it, imported."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
    peft = pytest.importorskip("peft", reason="pip install -e '.[peer]'")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    shape |= {"vocab_size": 400, "max_position_embeddings": 32, "initializer_range": 0.2}
    paths = [str(shutil.copytree(hf_directory, tmp_path / "base"))]
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(paths[0])
    for rank, modules in ((2, ["q_proj", "down_proj"]), (3, ["v_proj"])):
        model = transformers.AutoModelForCausalLM.from_pretrained(paths[0])
        lora = peft.LoraConfig(r=rank, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(model, lora).save_pretrained(tmp_path / f"peft{rank}")
        paths.append(str(tmp_path / f"run{rank}"))
        import_model(str(tmp_path / f"peft{rank}"), paths[-1], paths[0])
    ids = np.arange(24).reshape(2, 12) + 40
    expected = [gptjax.load(path).logits(ids) for path in paths]
    assert all(np.abs(expected[0] - other).max() > 0.1 for other in expected[1:])

    (group,) = open_groups(paths, ["base", "one", "two"], None, None)
    assert [(member.name, member.adapter) for member in group.members] == [("base", 0), ("one", 1), ("two", 2)]
    engine = group.lm.engine
    for member, logits in zip(group.members, expected, strict=True):
        found = engine._logits(engine.stack.of_one(member.adapter), ids)
        np.testing.assert_allclose(found, logits, atol=1e-4)
    said = describe_group(group, 4, 4096)
    assert said.startswith("base, one, two: weights ") and "adapters" in said and "4 slots of 32 tokens" in said

    (eighth,) = open_groups(paths[1:], ["one", "two"], "int8", None)
    assert any(isinstance(leaf, Int8) for leaf in eighth.lm.params[1][0]["mlp"].values())
    found = eighth.lm.engine._logits(eighth.lm.engine.stack.of_one(2), ids)
    np.testing.assert_allclose(found, expected[2], atol=0.3)
    with pytest.raises(UserError, match=r"--context 64 must lie in \[2, 32\], the context of base"):
        serve(paths, context=64, port=0)


@pytest.mark.slow
def test_2000_odd_requests_to_several_models_leave_no_memory_behind(server, capfd):
    """`pytest -m slow -n 0 tests/test_serve_models.py -k 2000`"""
    resident = []
    for seed in range(4):
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            parts = [
                pool.submit(send_nonsense, server, np.random.default_rng((seed, i)), 100, NAMES) for i in range(5)
            ]
            for part in parts:
                part.result()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert resident[3] - resident[0] < 30e6, resident
    assert "Traceback" not in capfd.readouterr().err
    assert server.complete("the king", model="two", max_tokens=3)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("paths", "name", "message"),
    [
        (["a/x", "b/x"], None, "two models have the name 'x'.*--name first,second"),
        (["a", "b"], "one", "--name 'one' must hold one name for each of 2 models"),
        (["a", "b"], "one,", "one name for each"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(paths, name, message):
    with pytest.raises(UserError, match=message):
        name_models(paths, name)


def test_names_are_the_last_parts_of_paths():
    assert name_models(["runs/a", "m/b.gguf"], None) == ["a", "b"]
    assert name_models(["runs/a"], "mine") == ["mine"]
