"""Published models, as the `ModelConfig` values that differ from its defaults (GPT-2's smallest); and devices' peak
FLOP/s.

Sources: GPT-2, Radford et al. 2019, table 2, and the released hparams.json; Llama 2, Touvron et al. 2023 (arXiv
2307.09288), and the released config.json; Llama 3.1 and 3.2, Dubey et al. 2024 (arXiv 2407.21783), table 3, and the
released config.json; SmolLM2, Allal et al. 2025 (arXiv 2502.02737).
"""

from typing import Any

_GPT2 = {"vocab_size": 50257}
_LLAMA: dict[str, Any] = {
    "positions": {"kind": "rope"},
    "norm": {"kind": "rmsnorm"},
    "mlp": {"kind": "swiglu"},
    "bias": False,
}
_LLAMA3 = {
    **_LLAMA,
    "vocab_size": 128256,
    "context_length": 131072,
    "positions": {"kind": "rope", "theta": 500000.0},
    "tie_embeddings": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2},
    "gpt2-medium": {**_GPT2, "n_layers": 24, "d_model": 1024, "n_heads": 16},
    "gpt2-large": {**_GPT2, "n_layers": 36, "d_model": 1280, "n_heads": 20},
    "gpt2-xl": {**_GPT2, "n_layers": 48, "d_model": 1600, "n_heads": 25},
    "llama-2-70b": {
        **_LLAMA,
        "n_layers": 80,
        "d_model": 8192,
        "n_heads": 64,
        "n_kv_heads": 8,
        "mlp": {"kind": "swiglu", "width": 28672},
        "vocab_size": 32000,
        "context_length": 4096,
        "tie_embeddings": False,
    },
    "llama-3.1-8b": {
        **_LLAMA3,
        "n_layers": 32,
        "d_model": 4096,
        "n_heads": 32,
        "n_kv_heads": 8,
        "mlp": {"kind": "swiglu", "width": 14336},
        "positions": {"kind": "rope", "theta": 500000.0, "scaling": {"factor": 8.0}},
    },
    "llama-3.1-70b": {
        **_LLAMA3,
        "n_layers": 80,
        "d_model": 8192,
        "n_heads": 64,
        "n_kv_heads": 8,
        "mlp": {"kind": "swiglu", "width": 28672},
        "positions": {"kind": "rope", "theta": 500000.0, "scaling": {"factor": 8.0}},
    },
    "llama-3.1-405b": {
        **_LLAMA3,
        "n_layers": 126,
        "d_model": 16384,
        "n_heads": 128,
        "n_kv_heads": 8,
        "mlp": {"kind": "swiglu", "width": 53248},
        "positions": {"kind": "rope", "theta": 500000.0, "scaling": {"factor": 8.0}},
    },
    "llama-3.2-1b": {
        **_LLAMA3,
        "n_layers": 16,
        "d_model": 2048,
        "n_heads": 32,
        "n_kv_heads": 8,
        "mlp": {"kind": "swiglu", "width": 8192},
        "positions": {"kind": "rope", "theta": 500000.0, "scaling": {"factor": 32.0}},
        "tie_embeddings": True,
    },
    "smollm2-135m": {
        **_LLAMA,
        "n_layers": 30,
        "d_model": 576,
        "n_heads": 9,
        "n_kv_heads": 3,
        "mlp": {"kind": "swiglu", "width": 1536},
        "vocab_size": 49152,
        "context_length": 8192,
        "positions": {"kind": "rope", "theta": 100000.0},
    },
}

# Peak dense bfloat16 FLOP/s of a device, by JAX's `device_kind`. Sources: Google Cloud's TPU pages (v4, v5e, v5p,
# v6e); NVIDIA's data sheets of A100, H100 SXM and H200 SXM, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Return the FLOP/s of one device; None for a kind that is not in the table, such as a CPU."""
    matches = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None
