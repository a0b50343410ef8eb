"""Training of low-rank adapters on SmolLM2-135M's architecture: ours, full fine-tuning, and peft's in PyTorch."""

from collections.abc import Callable
from typing import Any

import numpy as np

PRESET = "smollm2-135m"
BATCH, CONTEXT, STEPS = 8, 128, 1  # of a turn
RATE = 1e-3


def train_adapters(job: dict[str, Any], make_steps: Callable[[Any, int], Any]) -> Any:
    """Return a turn of the trainer's compiled step; on the side `full`, of all weights without adapters.

    Args:
        make_steps: (config, number of steps) -> the turn.
    """
    from gptjax.configfile import config_from_dict
    from gptjax.process import prepare_process

    lora = {} if job["side"] == "full" else {"rank": job["rank"], "base_dtype": job["base_dtype"]}
    cfg = config_from_dict(
        {
            "workdir": "-",
            "model": {"preset": PRESET, "context_length": CONTEXT},
            "train": {"batch_sequences": BATCH},
            "optim": {"peak_lr": RATE, "schedule": "constant", "weight_decay": 0.0},
            "lora": lora,
        }
    )
    prepare_process()
    return make_steps(cfg, STEPS)


def train_in_peft(job: dict[str, Any]) -> Any:
    """Return a turn of the same steps by transformers, peft and PyTorch's AdamW: adapters of every linear layer."""
    import peft
    import torch
    import transformers

    from gptjax.presets import PRESETS

    shape = PRESETS[PRESET]
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        intermediate_size=shape["mlp"]["width"],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    base = transformers.AutoModelForCausalLM.from_config(config)
    adapted = peft.LoraConfig(r=job["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, adapted)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, shape["vocab_size"], (BATCH, CONTEXT)))

    def turn() -> None:
        for _ in range(STEPS):
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return turn
