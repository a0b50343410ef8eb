"""A device that remembers or computes wrongly is found and named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2_LIKE, TINY_RUN, make_config, trainable_on

from gptjax import trainer
from gptjax.checkpoint import Checkpoints
from gptjax.configfile import load_config
from gptjax.errors import CorruptDevice
from gptjax.fingerprint import hash_tree
from gptjax.lifecycle import verification
from gptjax.lifecycle.verification import make_verify
from gptjax.step import init_state


def flip_bit(params: dict, device: jax.Device) -> dict:
    """The weights, with one bit flipped in the copy of the embedding that one device holds."""

    def flipped(x: jax.Array) -> jax.Array:
        parts = []
        for shard in x.addressable_shards:
            data = np.array(shard.data)
            if shard.device == device:
                data.view(np.uint32).flat[5] ^= 1 << 3
            parts.append(jax.device_put(data, shard.device))
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)

    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [flipped(leaves[0]), *leaves[1:]])


@pytest.mark.whole
def test_a_flipped_bit_stops_a_run_within_the_interval(corpus_file, token_cache, tmp_path, monkeypatch):
    culprit, make_step = jax.devices()[5], trainer.make_train_step

    def make_faulty_step(t):
        step = make_step(t)

        def faulty(state, batch):
            state, metrics = step(state, batch)
            return (state._replace(params=flip_bit(state.params, culprit)) if state.step == 7 else state), metrics

        return faulty

    monkeypatch.setattr(trainer, "make_train_step", make_faulty_step)
    args = [f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}", f"--workdir={tmp_path / 'run'}"]
    args += ["--mesh.data=8", "--train.total_steps=20", "--run.verify_interval_steps=4"]
    with pytest.raises(CorruptDevice, match=r"replicas of .* hold other bits") as caught:
        trainer.train(load_config([*TINY_RUN, *args]))
    assert caught.value.devices == [culprit]
    checkpoints = Checkpoints(str(tmp_path / "run"))
    assert checkpoints.steps() == [5]  # step 4 was verified, step 8 is not saved
    assert checkpoints.meta(5)["weights_hash"] > 0


def batch_of(t) -> dict[str, jax.Array]:
    ids = np.random.default_rng(0).integers(0, 61, (8, 33), np.int32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((8, 32), np.float32)}
    return jax.device_put(batch, t.batch_sharding)


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_devices_without_a_fault_agree(axes):
    t = trainable_on(make_config(GPT2_LIKE), int(np.prod(list(axes.values()))), **axes)
    state, verify = init_state(t), make_verify(t)
    for _ in range(2):
        verify(state, batch_of(t))


def test_a_replica_that_computes_another_gradient_is_named(monkeypatch):
    t = trainable_on(make_config(GPT2_LIKE), 4, data=4)
    make = verification.make_hash_of_gradient

    def faulty(t):
        compute, calls = make(t), []

        def run(params, batch, replica):
            calls.append(int(replica))
            return compute(params, batch, replica) + (int(replica) == 2) * len(calls)

        return run

    monkeypatch.setattr(verification, "make_hash_of_gradient", faulty)
    verify, state = make_verify(t), init_state(t)
    verify(state, batch_of(t))  # replicas 0 and 1
    with pytest.raises(CorruptDevice, match="another gradient") as caught:
        verify(state, batch_of(t))  # 1 and 2
    assert caught.value.devices == [jax.devices()[2]]
    with pytest.raises(CorruptDevice, match="same gradient twice") as caught:
        verify(state, batch_of(t))  # 2 and 3
    assert caught.value.devices == [jax.devices()[2]]


def test_a_hash_is_that_of_the_bits_whatever_the_mesh():
    cfg = make_config(GPT2_LIKE)
    hashes = {
        int(hash_tree(init_state(trainable_on(cfg, n, **axes)).params))
        for n, axes in ((1, {}), (8, {"data": 8}), (8, {"fsdp": 4, "tensor": 2}))
    }
    assert len(hashes) == 1
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    changed = [x.T.copy().reshape(4, 6), np.roll(x, 1), -x, np.nextafter(x, np.float32(9e9))]
    assert len({int(hash_tree(jnp.array(one))) for one in (x, *changed)}) == 5
