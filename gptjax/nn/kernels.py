"""Attention by the kernels of other libraries, under the protocol of `nn/attention.py`.

They compute causal attention of rows to themselves, in the order of the row and within its segments. They ignore
positions, which rise with that order inside a segment; padding at the end of a row is thereby never attended to.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.nn.attention import AttentionInput, KeysValues, as_cache
from gptjax.sharding import by_shard

QUERIES = ("batch", None, "heads", None)
KEYS = ("batch", None, "kv_heads", None)


def dot_product_attention(
    implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, inputs: AttentionInput
) -> tuple[jax.Array, KeysValues]:
    """Call `jax.nn.dot_product_attention` (with an implementation, a `Kernel`).

    `xla` runs anywhere; `cudnn` is the fused kernel of NVIDIA's GPUs, for bfloat16 only. Segments become a mask
    [B, 1, T, T] here, which splash attention does without. It has neither caps nor sinks.
    """
    assert inputs.cache is None and inputs.cap is None and inputs.sinks is None
    segments = inputs.segments
    window = None if inputs.window is None else (inputs.window - 1, 0)
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    y = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, local_window_size=window, implementation=implementation
    )
    return checkpoint_name(y, "attention"), as_cache(k, v)


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, inputs: AttentionInput, interpret: bool = False
) -> tuple[jax.Array, KeysValues]:
    """Run the Pallas kernel for TPUs, which skips blocks above the diagonal, on each device's sequences and heads.

    Args:
        interpret: run it without a TPU, slowly.
    """
    assert inputs.cache is None
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # here: its import takes time

    def local(q, k, v, segments, sinks):
        T, (H, K) = q.shape[1], q.shape[2:]
        padded = -(-T // 128) * 128  # padding comes after every query, so none attends to it
        block = next(size for size in (512, 256, 128) if padded % size == 0)
        names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        shape, window = (padded, padded), inputs.window
        mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * H),
            attn_logits_soft_cap=inputs.cap,
            block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
            residual_checkpoint_name="attention",
            interpret=interpret,
        )

        def heads_first(x):
            return jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))).swapaxes(1, 2)

        ids = None
        if segments is not None:
            ids = splash.SegmentIds(*[jnp.pad(segments, ((0, 0), (0, padded - T)))] * 2)
        on_rows = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
        y = on_rows(heads_first(q * K**-0.5), heads_first(k), heads_first(v), ids, sinks)
        return y.swapaxes(1, 2)[:, :T]

    on_each_shard = by_shard(local, (QUERIES, KEYS, KEYS, ("batch", None), ("heads",)), QUERIES)
    return on_each_shard(q, k, v, inputs.segments, inputs.sinks), as_cache(k, v)
