"""The ids that end a text: from wherever a model's files name them, into runs, generation and exports."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import gptjax
from gptjax.convert import export_model, import_model, open_model
from gptjax.generate import Sampling
from gptjax.tokenizers import make_tokenizer, read_huggingface_tokenizer, tokenizer_from_dict

torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")

PROMPT = "The king and queen of night"


def write_json(path: Path, **values) -> None:
    path.write_text(json.dumps(values))


@pytest.fixture
def model(tmp_path, hf_directory) -> Path:
    """A random Llama whose greedy text runs on for 20 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    folder = tmp_path / "model"
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    made.save_pretrained(folder)
    shutil.copytree(hf_directory, folder, dirs_exist_ok=True)
    return folder


def greedy(folder: Path) -> list[int]:
    """Twenty greedy tokens of transformers, without the end token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    found = theirs.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
    ends = theirs.generation_config.eos_token_id
    return found[:-1] if found[-1] in (ends if isinstance(ends, list) else [ends]) else found


def test_generation_stops_where_transformers_does_at_each_of_several_ends(model, tmp_path):
    write_json(model / "generation_config.json", eos_token_id=0)
    ids = greedy(model)
    assert len(ids) == 20
    end = next(id for n, id in enumerate(ids) if n > 4 and id not in ids[:n])
    write_json(model / "generation_config.json", eos_token_id=[0, end])
    ours = gptjax.load(str(model))
    assert ours.tokenizer.eos_ids == (0, end)
    sampling = Sampling(temperature=0)
    stopped = ours.complete([PROMPT], 20, sampling)[0]
    assert stopped.tokens == greedy(model) == ids[: ids.index(end)]
    assert "".join(ours.stream_text(PROMPT, 20, sampling)) == stopped.text
    # The ends travel into a run, to those who train on with its tokenizer, and out again.
    import_model(str(model), str(tmp_path / "run"))
    run = gptjax.load(str(tmp_path / "run"))
    assert run.tokenizer.eos_ids == (0, end)
    assert run.complete([PROMPT], 20, sampling)[0].tokens == stopped.tokens
    assert make_tokenizer(str(tmp_path / "run" / "tokenizer.json"), []).eos_ids == (0, end)
    export_model(str(tmp_path / "run"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, end]
    assert greedy(tmp_path / "out") == stopped.tokens


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"generation_config.json": {"eos_token_id": [7, 9]}}, (0, 7, 9)),
        ({"generation_config.json": {"eos_token_id": 7}, "config.json": {"eos_token_id": [9, 0]}}, (0, 7)),
        ({"config.json": {"eos_token_id": 9}}, (0, 9)),
        ({"config.json": {"text_config": {"eos_token_id": [9, 8]}}}, (0, 9, 8)),
        ({"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": [None, -1, 5]}}, (0, 5)),
        ({}, (0,)),
    ],
)
def test_end_tokens_are_found_in_each_file(files, ends, hf_directory, tmp_path):
    shutil.copytree(hf_directory, tmp_path, dirs_exist_ok=True)
    for name, values in files.items():
        write_json(tmp_path / name, **values)
    ours = read_huggingface_tokenizer(tmp_path)
    assert ours.eos_ids == ends
    assert (ours.eos_id, ours.eos_ids[0]) == (0, 0)
    assert tokenizer_from_dict(json.loads(json.dumps(ours.to_dict()))).eos_ids == ends


def test_a_tokenizer_of_an_older_checkpoint_ends_at_its_one_token(hf_directory):
    spec = read_huggingface_tokenizer(hf_directory).to_dict()
    del spec["eos_ids"]
    assert tokenizer_from_dict(spec).eos_ids == (0,)
    assert tokenizer_from_dict({"kind": "byte"}).eos_ids == (256,)
    assert tokenizer_from_dict({"kind": "char", "alphabet": "ab"}).eos_ids == ()
    assert tokenizer_from_dict({"kind": "none"}).eos_ids == ()


def test_a_single_end_stays_a_number_in_an_export(model, tmp_path):
    import_model(str(model), str(tmp_path / "run"))
    export_model(str(tmp_path / "run"), str(tmp_path / "out"))
    ends = open_model(str(tmp_path / "out")).tokenizer.eos_ids
    assert np.array_equal(ends, json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"])
