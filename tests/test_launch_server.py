"""The Deployment of a model's server: Kubernetes' own client reads it, and its command line is one that serves."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
import yaml
from conftest import ROOT, run_script

from gptjax.apps.launch.commands import VERBS
from gptjax.cli import launch
from gptjax.errors import UserError

BUCKET = "gs://bucket/runs/My_Run"


def write(tmp_path, model: str = BUCKET, **options) -> list[dict]:
    VERBS["serve-gke"](model, image="i", out=str(tmp_path), **options)
    return list(yaml.safe_load_all((tmp_path / "serve.yaml").read_text()))


@pytest.mark.parametrize(
    "options",
    [
        {
            "gpu": "nvidia-l4",
            "api_key": "gptjax/key",
            "secret": ["s"],
            "env": ["A=$(B)"],
            "service_account": "reader",
        },
        {"topology": "v5e:2x2", "volume": ["claim:/models"], "replicas": 3},
        {},
    ],
    ids=["gpu", "tpu", "cpu"],
)
def test_manifests_load_through_the_official_client(tmp_path, options):
    client = pytest.importorskip("kubernetes.client", reason="pip install -e '.[peer]'")
    api = client.ApiClient()
    for value, model in zip(write(tmp_path, **options), (client.V1Deployment, client.V1Service), strict=True):
        assert api.sanitize_for_serialization(api._ApiClient__deserialize(value, model)) == value


def test_the_service_finds_the_pods_and_their_probes_the_server(tmp_path):
    deployment, service = write(tmp_path, topology="v5e:2x2", timeout_s=50, env=["A=$(B)"])
    spec = deployment["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"] == service["spec"]["selector"]
    assert service["metadata"]["name"] == "my-run"
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["containerPort"]
    assert container["env"] == [{"name": "A", "value": "$$(B)"}]  # which Kubernetes does not expand
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert pod["terminationGracePeriodSeconds"] > 50


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("./runs/mine", {}, "not in the container"),
        ("/models/a", {"volume": ["claim:/other"]}, "not in the container"),
        (BUCKET, {"topology": "v5e:4x4"}, "hosts"),
        (BUCKET, {"topology": "v5e:2x2", "gpu": "nvidia-l4"}, "exclude"),
        (BUCKET, {"api_key": "sesame"}, "SECRET/KEY"),
        (BUCKET, {"name": "My Run"}, "DNS label"),
        (BUCKET, {"replicas": 0}, "at least 1"),
        (BUCKET, {"options": "--slots '4"}, "quot"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path, model, options, said):
    with pytest.raises(UserError, match=said):
        write(tmp_path, model, **options)
    assert not (tmp_path / "serve.yaml").exists()


def test_options_of_the_server_are_passed_on(tmp_path, capsys):
    words = ["gpt2", "--image", "i", "--options", "--slots 2 --dtype int8", "--out", str(tmp_path)]
    assert launch(["serve-gke", *words]) == 0
    assert "kubectl apply -f" in capsys.readouterr().out
    (container,) = next(yaml.safe_load_all((tmp_path / "serve.yaml").read_text()))["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["command"][4:11] == ["serve", "gpt2", "--name", "gpt2", "--slots", "2", "--dtype"]


@pytest.mark.slow
def test_the_pods_command_serves(tiny_run, tmp_path):
    """As it stands, but for the address: this machine's loopback, and a port that is free."""
    pytest.importorskip("uvicorn", reason="pip install -e '.[serve]'")
    run = tmp_path / "run"
    assert run_script(*tiny_run, "--train.total_steps=5", "--workdir", run).returncode == 0
    deployment, _ = write(tmp_path / "job", str(run), volume=[f"claim:{tmp_path}"], options="--slots 2")
    command = deployment["spec"]["template"]["spec"]["containers"][0]["command"]
    address = {"0.0.0.0": "127.0.0.1", "8000": "0", "python": sys.executable}
    words = [address.get(word, word) for word in command]
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    at = process.stdout.readline().split()[2]
    body = json.dumps({"prompt": "the", "max_tokens": 4}).encode()
    asked = urllib.request.Request(f"{at}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=200) as answer:
        assert json.load(answer)["model"] == "run"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
