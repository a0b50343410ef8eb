"""The command `gptjax serve`."""

import os
import secrets
from pathlib import Path
from typing import Literal

from gptjax.errors import UserError
from gptjax.process import prepare_process
from gptjax.shell.commandline import mesh_axes
from gptjax.shell.paths import UserPath

MISSING = "serving needs: pip install 'gptjax[serve]'"
MOST_CONTEXT = 4096  # tokens, where --context is not given: every slot's memory is allocated


def serve(
    models: list[UserPath],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    slots: int = 8,
    context: int | None = None,
    queue: int = 256,
    timeout_s: float = 600.0,
    name: str | None = None,
    runs: UserPath | None = None,
    dtype: Literal["float32", "bfloat16", "int8"] | None = None,
    mesh: str | None = None,
    cpu_devices: int | None = None,
) -> None:
    """Serve models over HTTP in the form of OpenAI's API (docs/serving.md).

    Args:
        models: each a run's directory, a Hugging Face directory, a .gguf file, or a Hugging Face id such as gpt2.
            Runs with adapters of one base, and the base, share its weights.
        host: address to listen at; 0.0.0.0 for every network that the machine is in.
        port: port to listen at; 0 for any free one.
        api_key: what clients must send; the default is the environment variable GPTJAX_API_KEY, or no key.
        slots: number of texts that are generated at the same time by models that share weights; the others wait.
        context: most tokens of a prompt and its answer; the default is each model's own, at most 4096.
        queue: most texts that wait; beyond it, requests are refused with status 429.
        timeout_s: longest time of an answer in seconds, the wait included.
        name: of the model, as requests name it, or of several with commas between them; the default is the last part
            of each path.
        runs: a run, or a folder of runs, whose curves the page at / shows while they train.
        dtype: data type of the weights; bfloat16 takes half the memory, int8 a quarter. By default as in training.
        mesh: shard the model over several devices, such as fsdp=4,tensor=2, if it does not fit on one.
        cpu_devices: number of virtual CPU devices, to try a mesh without its hardware.
    """
    axes = mesh_axes(mesh)
    _check_ranges(
        port=(port, 0, 65535), slots=(slots, 1, 4096), queue=(queue, 1, 10**6), timeout_s=(timeout_s, 0.1, 1e6)
    )
    if runs is not None and not Path(runs).is_dir():
        raise UserError(f"--runs {runs!r} is no folder; give the directory of a run, or of several")
    key = _api_key(api_key)
    try:
        from gptjax.apps.serve.app import Limits
        from gptjax.apps.serve.models import check_context, describe_group, name_models, open_groups
        from gptjax.apps.serve.run import Settings, run_server
    except ImportError as error:
        raise UserError(f"{MISSING} ({error})") from None
    names = name_models(models, name)
    prepare_process(cpu_devices)
    groups = open_groups(models, names, dtype, axes)
    if context is not None:
        check_context(groups, context)
    settings = Settings(host, port, key, slots, context or MOST_CONTEXT, queue, Limits(answer_s=timeout_s), runs)

    def started(_, address: str) -> None:
        print(f"{','.join(names)} at {address} ; {address}/healthz says when it is ready")
        print("\n".join(describe_group(group, slots, settings.context) for group in groups))
        print(f"limits: {queue} texts wait for each line above, {timeout_s:g} s an answer", flush=True)

    run_server(groups, settings, started, names)


def _check_ranges(**options: tuple[float, float, float]) -> None:
    for option, (value, low, high) in options.items():
        if not low <= value <= high:
            raise UserError(f"--{option} {value} must lie in [{low:g}, {high:g}]")


def _api_key(given: str | None) -> str | None:
    """Return the key of the option or the environment; None for none."""
    key = given if given is not None else os.environ.get("GPTJAX_API_KEY")
    if key is not None and not (key and key.isascii() and key.isprintable()):
        example = secrets.token_urlsafe(24)
        raise UserError(f"the API key must be printable ASCII of at least one character, such as {example}")
    return key
