"""Record where the chips of TPU topologies lie and which host holds them, from libtpu, in topologies.json.

The tests read that file and need no libtpu. To record anew, in an environment with `pip install 'gptjax[tpu]'`:

    python tests/pod/record.py
"""

import json
import os
from pathlib import Path

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

from jax.experimental import topologies

WANTED = [
    *(("v4:4x4x4", 1), ("v5e:4x4", 1), ("v5e:8x8", 1), ("v5e:16x16", 1), ("v5p:4x4x4", 1), ("v5p:8x8x8", 1)),
    *(("v6e:8x8", 1), ("v5e:4x4", 2), ("v5p:16x16x16", 1), ("v5e:16x16", 16)),
    *(("v5e:2x4", 1), ("v5p:2x2x2", 1)),  # small enough for virtual devices
]


def record(name: str, slices: int) -> dict:
    """Return a topology as the first chip of each host, and where its other chips lie beside that one."""
    options = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    hosts: dict[int, list] = {}
    for device in devices:
        hosts.setdefault(device.process_index, []).append((getattr(device, "slice_index", 0), *device.coords))
    assert sorted(hosts) == list(range(len(hosts)))
    firsts = [hosts[process][0] for process in sorted(hosts)]
    beside = {
        tuple(tuple(chip[axis] - chips[0][axis] for axis in (1, 2, 3)) for chip in chips) for chips in hosts.values()
    }
    assert len(beside) == 1, f"the hosts of {name} differ in shape"
    assert all(chip[0] == chips[0][0] for chips in hosts.values() for chip in chips)
    kind = devices[0].device_kind
    return {"platform": "tpu", "kind": kind, "slices": slices, "chips_of_a_host": beside.pop(), "hosts": firsts}


if __name__ == "__main__":
    recorded = {name + (f" x {slices}" if slices > 1 else ""): record(name, slices) for name, slices in WANTED}
    lines = (f" {json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in recorded.items())
    Path(__file__).with_name("topologies.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
