"""Compile the training step in a process of its own, so that a failure of libtpu cannot reach the planner.

Reads one JSON object from stdin (`config` as YAML text, `topology`, `num_slices`) and prints one as its last line.
"""

import json
import re
import sys
from typing import Any

import yaml

from gptjax.process import prepare_process

# libtpu's messages for a program that does not fit: with the total, or with the temporaries only.
_SIZE, _LIMIT = r"(?P<used>[\d.]+)(?P<unit>[KMGT])", r"(?P<limit>[\d.]+)(?P<limit_unit>[KMGT])"
OUT_OF_MEMORY = {
    "all": rf"Used {_SIZE} of {_LIMIT} hbm",
    "temporaries": rf"temporaries \({_SIZE}\) exceeds available HBM \({_LIMIT}",
}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_out_of_memory(message: str) -> dict[str, Any] | None:
    """Return the bytes that a program needs (`of`: all, or temporaries) and may use; None for any other error."""
    for of, pattern in OUT_OF_MEMORY.items():
        found = re.search(pattern, message)
        if found:
            used, limit = float(found["used"]), float(found["limit"])
            used, limit = used * UNITS[found["unit"]], limit * UNITS[found["limit_unit"]]
            return {"of": of, "used_bytes": used, "limit_bytes": limit}
    return None


def devices_of(topology_name: str, num_slices: int) -> list[Any]:
    """Return the devices of a topology, slice by slice; the two cores of a v4 chip are one device, as in training."""
    from jax.experimental import topologies

    wanted = {"num_slices": num_slices} if num_slices > 1 else {}
    if topology_name.startswith("v4:"):
        wanted["chip_config_name"] = "megacore"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology_name, **wanted).devices)


def compile_step(config: dict[str, Any], topology_name: str, num_slices: int) -> dict[str, Any]:
    """Compile the training step for a topology.

    Returns:
        `memory` (bytes of one device by kind; `peak` is the most that arguments and temporaries take at once),
        `hbm_bytes`, `collectives`; or `out_of_memory`.
    """
    import jax
    import jax.numpy as jnp

    from gptjax.apps.plan.hlo import Program
    from gptjax.configfile import config_from_dict
    from gptjax.convert import teacher_config
    from gptjax.sharding import make_mesh
    from gptjax.step import make_train_step, make_trainable

    cfg = config_from_dict(config)
    devices = devices_of(topology_name, num_slices)
    t = make_trainable(cfg, make_mesh(cfg.mesh.axes, devices, num_slices), teacher_config(cfg))
    shape = (cfg.train.batch_sequences, cfg.model.context_length)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    kinds |= dict.fromkeys(t.objective.arrays, jnp.float32)
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=t.batch_sharding) for name, kind in kinds.items()}
    try:
        with jax.set_mesh(t.mesh):
            compiled = make_train_step(t).compiled.lower(t.state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        too_much = read_out_of_memory(str(error))
        if too_much is None:
            raise
        return {"out_of_memory": too_much}
    analysis = compiled.memory_analysis()
    program = Program(compiled.as_text())
    return {
        "memory": {
            "argument": analysis.argument_size_in_bytes,
            "peak": analysis.peak_memory_in_bytes,
            "generated_code": analysis.generated_code_size_in_bytes,
        },
        "hbm_bytes": program.hbm_bytes(),
        "collectives": [c._asdict() for c in program.collectives(len(devices) // num_slices, num_slices)],
    }


def main() -> None:
    """Answer one request; any other error of the compiler is part of the answer."""
    request = json.load(sys.stdin)
    prepare_process()
    try:
        answer = compile_step(yaml.safe_load(request["config"]), request["topology"], request["num_slices"])
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
