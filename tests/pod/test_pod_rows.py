"""What each host reads and hands over, on the recorded coordinates of clusters of up to 4,096 chips."""

import itertools
import math

import jax
import numpy as np
import pytest
from conftest import ROOT, run_script
from places import GPU_NODES, PLACES, RECORDED, devices_of, slices_of

from gptjax.apps.plan.chips import parse_topology
from gptjax.apps.plan.hosts import describe_hosts, planned_devices, report_hosts
from gptjax.apps.plan.planning import config_on_accelerators, meshes_to_try
from gptjax.configfile import load_config
from gptjax.data.batches import Batches, Endless, Windows, validation_batches
from gptjax.hosts import part_of, rows_of_hosts
from gptjax.sharding import make_mesh, sharding

COMPARED = ("process_index", "slice_index", "platform", "device_kind", "coords")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def batches_of_configs() -> dict[int, int]:
    """Return the batch sizes of all shipped configs, each with one of its context lengths."""
    loaded = [load_config([str(path)]) for path in CONFIGS]
    return {cfg.train.batch_sequences: cfg.model.context_length for cfg in loaded}


def axes_tried(place: str, context: int) -> list[dict[str, int]]:
    """Return the axes that `plan --search` tries for a place: the meshes that it proposes are among them."""
    name, slices = place.partition(",")[0].partition(" x ")[0], slices_of(place)
    tried = meshes_to_try(parse_topology(name, slices), context)
    names = ("data", "fsdp", "tensor")
    return [{**{axis: mesh[f"mesh.{axis}"] for axis in names}, "context": context} for mesh in tried]


def batch_sharding(place: str, axes: dict[str, int]) -> jax.sharding.NamedSharding:
    return sharding(make_mesh(axes, list(devices_of(place)), slices_of(place)), ("batch", "length"))


def check_hosts(of: jax.sharding.NamedSharding, shape: tuple[int, int]) -> None:
    """Assert that hosts read all rows, each in as many hosts as hold it, and hand over what JAX asks for."""
    axes, wanted = of.mesh.shape, of.shard_shape(shape)
    rows = rows_of_hosts(of, shape)
    hosts_of_row = np.zeros(shape[0], int)
    for held in rows.values():
        assert (np.diff(held) > 0).all()
        hosts_of_row[held] += 1
    assert hosts_of_row.min() >= 1
    assert hosts_of_row.max() <= axes["tensor"] * axes["context"]
    # A row's number stands for its tokens, and a stride of 0 for its length: nothing of a batch's size is allocated.
    read = {process: np.broadcast_to(held[:, None], (len(held), shape[1])) for process, held in rows.items()}
    used = {process: set() for process in rows}
    for device, index in of.devices_indices_map(shape).items():
        process = device.process_index
        part = part_of(read[process], rows[process], index)
        start, stop, _ = index[0].indices(shape[0])
        assert part.shape == wanted
        assert part[0, 0] == start
        assert part[-1, 0] == stop - 1
        assert not part.size or (np.diff(part[:, 0]) == 1).all()
        used[process].add((start, stop))
    for process, spans in used.items():  # no row is read in vain
        assert sum(stop - start for start, stop in spans) == len(rows[process])


ALSO_LARGE = ("h100:512x8", "v5e:16x16 x 16")  # 4,096 devices, as v5p:16x16x16 has


MARKS = {"v5p:16x16x16": [pytest.mark.whole], **{place: [pytest.mark.slow] for place in ALSO_LARGE}}


@pytest.mark.parametrize("place", [pytest.param(place, marks=MARKS.get(place, [])) for place in PLACES])
def test_hosts_read_and_hand_over_what_the_mesh_asks(place):
    """Every shipped config's batch, on every mesh that `plan --search` may propose; pytest -s prints how many."""
    batches, cases, hosts = batches_of_configs(), 0, len({d.process_index for d in devices_of(place)})
    for axes in axes_tried(place, context=1):
        of, ways = None, axes["data"] * axes["fsdp"]
        for batch, length in batches.items():
            if batch % ways == 0:
                of = of or batch_sharding(place, axes)
                check_hosts(of, (batch, length))
                cases += 1
    print(f"{place}: {cases} meshes and batches, {cases * hosts:,} hosts")
    assert cases


@pytest.mark.parametrize("place", [place for place in PLACES if len(devices_of(place)) <= 512])
def test_hosts_share_the_rows_whose_sequences_are_cut(place):
    tried = itertools.chain.from_iterable(axes_tried(place, context) for context in (2, 4))
    for axes in tried:
        check_hosts(batch_sharding(place, axes), (2 * axes["data"] * axes["fsdp"], 64))


def is_one_range(rows: np.ndarray) -> bool:
    return bool(rows[-1] - rows[0] == len(rows) - 1)


@pytest.mark.parametrize(
    ("place", "axes", "apart"),
    [
        ("v5e:16x16", {"data": 32, "fsdp": 8}, 64),
        ("v5p:8x8x8", {"data": 1, "fsdp": 512}, 128),
        ("v5e:4x4", {"data": 4, "fsdp": 4}, 4),
        ("v5e:4x4", {"data": 16, "fsdp": 1}, 2),
        ("v6e:8x8", {"data": 1, "fsdp": 64}, 16),
        ("v5p:16x16x16", {"data": 1, "fsdp": 4096}, 1024),
    ],
    ids=str,
)
def test_the_recorded_coordinates_hold_hosts_whose_rows_lie_apart(place, axes, apart):
    """So that the tests above see what a range from the first row to the last got wrong."""
    rows = rows_of_hosts(batch_sharding(place, {**axes, "tensor": 1, "context": 1}), (4096, 64))
    assert sum(not is_one_range(held) for held in rows.values()) == apart


def test_data_gives_exactly_the_rows_that_are_asked_for():
    rows = np.array([0, 3, 4, 7])
    tokens = np.arange(32 * 40 + 1)
    examples = Endless(Windows(tokens, 32, "training", 1), 1)
    whole, part = Batches(examples, 8, range(8))[5], Batches(examples, 8, rows)[5]
    for name, array in whole.items():
        np.testing.assert_array_equal(part[name], array[rows])
    # 40 windows in batches of 12: the last one is filled up with rows of weight 0.
    every, some = (list(validation_batches(tokens, 32, 12, None, asked)) for asked in (range(12), rows))
    assert len(every) == len(some) == 4
    for all_rows, of_host in zip(every, some, strict=True):
        for name, array in all_rows.items():
            np.testing.assert_array_equal(of_host[name], array[rows])


@pytest.mark.parametrize("place", [place for place in PLACES if "process" not in place])
def test_the_planner_places_hosts_as_libtpu_does(place):
    """Of GPUs a process a node, as `gptjax launch` starts them where a node has one task."""
    planned = planned_devices(parse_topology(place.partition(" x ")[0], slices_of(place)))
    recorded = devices_of(place)
    names = ("process_index", "slice_index", "platform") if place in GPU_NODES else COMPARED
    assert [[getattr(d, name) for name in names] for d in planned] == [
        [getattr(d, name) for name in names] for d in recorded
    ]


def test_plan_tells_what_each_host_does():
    cfg = config_on_accelerators(load_config([str(ROOT / "configs/gpt2_1.5b.yaml")]))
    topology = parse_topology("v5e:16x16")
    described = describe_hosts(cfg, topology)
    rows = rows_of_hosts(batch_sharding("v5e:16x16", described["mesh"]), (1024, 1024))
    for host, (process, held) in zip(described["hosts"], rows.items(), strict=True):
        assert host["process"] == process
        assert host["row_count"] == len(held)
        listed = [row for first, last in host["rows"] for row in range(first, last + 1)]
        assert listed == held.tolist()
        assert len(host["rows"]) > 1  # 64 of 64 hosts of this config: no range
        assert host["read_bytes"] == len(held) * 1025 * 2
        assert host["placed_bytes"] == 4 * 4 * 1024 * 12
        assert ("metrics.jsonl" in host["writes"]) == (process == 0)
        assert host["writes"][-1].endswith(f"ocdbt.process_{process}")
    text = report_hosts({"config": "gpt2_1.5b.yaml", **described})
    assert len(text) == 64 + 8
    assert text[4].split()[:4] == ["0", "0,0,0", "4", "16"]


def test_every_place_has_the_hosts_that_its_name_says():
    for place in PLACES:
        devices, slices = devices_of(place), slices_of(place)
        name = place.partition(",")[0].partition(" x ")[0]
        assert len(devices) == parse_topology(name, slices).n_chips
        assert len({(d.slice_index, d.coords) for d in devices}) == len(devices) or place in GPU_NODES
        assert math.prod(
            batch_sharding(place, {"data": -1, "fsdp": 1, "tensor": 1, "context": 1}).mesh.shape.values()
        )
    assert max(len(devices_of(place)) for place in RECORDED) == 4096


ALL_HOSTS = """
import hashlib, os, sys
import numpy as np
from gptjax.data.shards import Tokens
path, count, hosts, length = sys.argv[1], *map(int, sys.argv[2:])
tokens = Tokens([(path, count)], "uint16", 2**16)
print(int(tokens[0:1][0]), flush=True)  # mapped, as in a process that forks its data workers
children = []
for host in range(hosts):
    if not (child := os.fork()):
        for start in range(host * length, count, hosts * length):
            assert np.array_equal(tokens[start : start + length], np.arange(start, start + length) % 65_000)
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def test_64_hosts_read_one_shard_at_once(tmp_path):
    count = 64 * 1024 * 32
    (np.arange(count) % 65_000).astype(np.uint16).tofile(tmp_path / "train.bin")
    done = run_script("-c", ALL_HOSTS, tmp_path / "train.bin", count, 64, 1024)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
