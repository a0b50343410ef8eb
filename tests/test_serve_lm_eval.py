"""lm-eval's own client of completions against the server: the figures that it gets with the model in its process."""

import json

import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")
pytest.importorskip("jinja2", reason="pip install -e '.[serve]'")
pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")
pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
pytest.importorskip("tenacity", reason="pip install -e '.[peer]'")

import lm_eval
from lm_eval.tasks import TaskManager
from serving import CONTEXT, serving, tiny_model, tiny_tokenizer

from gptjax.apps.evaluate import harness

TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n",
    "perplexity": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "answers": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{choices[0]}}'\n"
    "generation_kwargs: {until: [' my'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.mark.slow
def test_local_completions_gives_the_figures_of_the_model_in_process(hf_directory, tmp_path, monkeypatch):
    """Log-likelihoods (echo of lists of ids), of whole texts, and answers.

    `pytest -m slow -n 0 tests/test_serve_lm_eval.py`
    """
    lm = tiny_model(tiny_tokenizer(hf_directory), n_layers=1)
    words = ["the", "king", "and", "queen", "of", "night", "do", "speak", "in", "thee"]
    rows = [
        {"q": " ".join(words[i:] + words[:i]), "choices": ["my lord", "what love is", "dies"], "answer": i % 3}
        for i in range(6)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/d.jsonl}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}{task}")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(harness, "load", lambda *args: lm)

    def evaluate(kind: str, **arguments) -> dict:
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        how = {"task_manager": manager, "bootstrap_iters": 0, "verbosity": "ERROR"}
        return lm_eval.simple_evaluate(kind, arguments, tasks=list(TASKS), batch_size=2, **how)

    with serving(lm, slots=4) as server:
        remote = {"base_url": f"{server.address}/v1/completions", "model": "tiny", "tokenizer": str(hf_directory)}
        remote |= {"tokenizer_backend": "huggingface", "add_bos_token": True, "max_length": CONTEXT}
        there = evaluate("local-completions", **remote, num_concurrent=4)
    here = evaluate("gptjax", path="MODEL")
    for name in TASKS:
        for sample, other in zip(*(found["samples"][name] for found in (there, here)), strict=True):
            assert sample["doc_id"] == other["doc_id"]
            for response, expected in zip(sample["resps"], other["resps"], strict=True):
                if name == "answers":
                    assert response == expected
                else:
                    got, wanted = (np.array(one[0], float) for one in (response, expected))
                    np.testing.assert_allclose(got, wanted, atol=1e-3)
        for metric, value in here["results"][name].items():
            if isinstance(value, float):
                assert there["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    assert len({str(sample["resps"]) for sample in here["samples"]["answers"]}) > 3
