"""Attention by other people's kernels, as `make_` functions with the signature of `attention.make_reference`.

They serve training: keys are the queries' own tokens, causal in the order of the row, within its segments. Positions
are not looked at: inside a segment they rise with the order.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.nn.attention import Attend
from gptjax.sharding import by_shard

QUERIES = ("batch", None, "heads", None)
KEYS = ("batch", None, "kv_heads", None)


def make_dot_product(implementation: str, positions, segments: jax.Array | None) -> Attend:
    """`jax.nn.dot_product_attention`: `xla` anywhere, `cudnn` the fused kernel of NVIDIA's GPUs, bfloat16 only.

    Segments become a mask [B, 1, T, T] here, which splash attention does without.
    """
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]

    def attend(q, k, v):
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)
        return checkpoint_name(y, "attention")

    return attend


def make_splash(positions, segments: jax.Array | None, interpret: bool = False) -> Attend:
    """The Pallas kernel for TPUs that skips the blocks above the diagonal, on each device's sequences and heads.

    Args:
        interpret: run it without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # here: its import takes time

    def local(q, k, v, segments):
        T, (H, K) = q.shape[1], q.shape[2:]
        padded = -(-T // 128) * 128  # what is added comes after every query, so none sees it
        block = next(size for size in (512, 256, 128) if padded % size == 0)
        names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([splash.CausalMask((padded, padded))] * H),
            block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
            residual_checkpoint_name="attention",
            interpret=interpret,
        )

        def heads_first(x):
            return jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))).swapaxes(1, 2)

        ids = None
        if segments is not None:
            ids = splash.SegmentIds(*[jnp.pad(segments, ((0, 0), (0, padded - T)))] * 2)
        y = jax.vmap(kernel)(heads_first(q * K**-0.5), heads_first(k), heads_first(v), ids)
        return y.swapaxes(1, 2)[:, :T]

    attend = by_shard(local, (QUERIES, KEYS, KEYS, ("batch", None)), QUERIES)
    return lambda q, k, v: attend(q, k, v, segments)
