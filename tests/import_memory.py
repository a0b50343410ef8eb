"""Peak anonymous memory of an import, as a share of the model's size in float32 (Linux):

python tests/import_memory.py DIR [DEVICES] [--out RUN]     onto so many virtual devices, fsdp; or `convert from-hf`
"""

import dataclasses
import os
import sys
import threading
import time

directory, devices = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "1"
out = sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else None
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
os.environ["NPROC"] = str(2 * int(devices))


def anonymous_bytes() -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The largest `anonymous_bytes` since it was started."""

    value = 0

    def run(self) -> None:
        while True:
            self.value = max(self.value, anonymous_bytes())
            time.sleep(0.002)


def main() -> None:
    from gptjax.process import prepare_process

    prepare_process()
    import jax

    from gptjax.configfile import config_from_dict
    from gptjax.convert import import_model, open_model
    from gptjax.nn.transformer import count_params
    from gptjax.sharding import make_mesh
    from gptjax.step import make_trainable

    model = open_model(directory)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1, "context": 1})
    form = dataclasses.asdict(model.config)
    train = {"batch_sequences": 8}
    trainable = make_trainable(config_from_dict({"model": form, "train": train, "workdir": "unused"}), mesh)
    size = 4 * count_params(model.config)["total"]
    before, began, peak = anonymous_bytes(), time.perf_counter(), Peak(daemon=True)
    peak.start()
    if out is None:
        params = jax.block_until_ready(model.read(trainable.state.params))
        held = dict.fromkeys(jax.devices(), 0)
        for leaf in jax.tree.leaves(params):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        shares = sorted(n / size for n in held.values())
        print(f"each of {len(jax.devices())} devices holds {shares[0]:.4f} to {shares[-1]:.4f} of it")
    else:
        import_model(directory, out)
    grown = peak.value - before
    print(f"{grown / size:.3f} of {size / 1e9:.2f} GB at the peak, in {time.perf_counter() - began:.0f} s")


main()
