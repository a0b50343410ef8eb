"""Experts in the ways that files hold them: all of a layer in one tensor, and in 4 bits."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import LoraConfig
from gptjax.convert import open_model
from gptjax.convert.base import SavedAdapter
from gptjax.convert.models import on_first_device
from gptjax.convert.peft import write_adapter
from gptjax.errors import UserError

torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="pip install -e '.[peer]'")

from test_convert import build  # noqa: E402, needs what is skipped without above
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe"])
def test_experts_as_transformers_5_has_them_in_memory_are_the_same(name, tmp_path):
    """What torch and accelerate save of a model's state_dict, in which all experts of a layer are one tensor."""
    source = build(name, tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    models = [open_model(path) for path in (source, tmp_path)]
    params = [jax.tree.leaves(found.read(on_first_device(found.config))) for found in models]
    assert all(np.array_equal(a, b) for a, b in zip(*params, strict=True))

    tensors["model.layers.0.mlp.experts.down_proj"] = tensors["model.layers.0.mlp.experts.down_proj"][:3].clone()
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"experts.down_proj \(3, .* rows instead of 256"):
        open_model(tmp_path)


def test_experts_in_mxfp4_are_read_as_transformers_dequantizes_them(tmp_path):
    """Every byte and every exponent occurs; the files have no prefix, as a base model's."""
    random = np.random.default_rng(0)
    source = build("gpt-oss", tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    packed, plain = ({"lm_head.weight": model.lm_head.weight} for _ in range(2))
    for name, value in model.model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = plain[name] = value
            continue
        n_experts, n_in, n_out = value.shape
        blocks = random.permutation(np.arange(value.numel() // 2, dtype=np.uint32).astype(np.uint8))
        blocks = torch.from_numpy(blocks.reshape(n_experts, n_out, n_in // 32, 16))
        scales = torch.from_numpy(random.integers(0, 255, blocks.shape[:-1], np.uint8))
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    found = []
    for folder, tensors, more in (
        (tmp_path / "packed", packed, {"quantization_config": {"quant_method": "mxfp4"}}),
        (tmp_path / "plain", plain, {}),
    ):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | more))
        safetensors_torch.save_file(tensors, folder / "model.safetensors")
        opened = open_model(folder)
        found.append(jax.tree.leaves(opened.read(on_first_device(opened.config))))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))

    lost = {name: value for name, value in packed.items() if name != "layers.1.mlp.experts.down_proj_scales"}
    safetensors_torch.save_file(lost, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(UserError, match=r"quantized by mxfp4 .* which cannot be run here; give the model"):
        open_model(tmp_path / "packed")


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_adapters_of_experts_are_not_written_as_others(name, tmp_path):
    model = open_model(build(name, tmp_path / "source"))
    zeros = partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
    adapter = SavedAdapter(LoraConfig(rank=2), {"path": "x", "fingerprint": "y"}, zeros)
    with pytest.raises(UserError, match=r"adapters of experts, which .* --merged true --out DIR"):
        write_adapter(model, adapter, tmp_path)
