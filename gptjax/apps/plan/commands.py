"""`gptjax plan`."""

import json as json_format
from typing import Any

import yaml

from gptjax.config import Config, override
from gptjax.configfile import load_config, parse_option, put_value, read_yaml
from gptjax.configversions import current_key, upgrade
from gptjax.errors import DOES_NOT_FIT, UserError
from gptjax.process import prepare_process
from gptjax.shell.paths import UserPath, shell, writing


def plan(
    config: UserPath,
    flags: list[str],
    *,
    topology: str,
    num_slices: int = 1,
    tokens: float | None = None,
    price_per_chip_hour: float | None = None,
    search: bool = False,
    out: UserPath | None = None,
    hosts: bool = False,
    analytic: bool = False,
    html: UserPath | None = None,
    json: bool = False,
) -> None:
    """Predict whether a run fits on given chips, what limits its speed, and what it costs, without the chips.

    With libtpu (pip install 'gptjax[tpu]') it compiles the step in a minute or two. Exit code 3: does not fit.

    Args:
        config: the run's config file, as for train.py; flags such as --run.remat full override its keys.
        topology: chips and shape, such as v5e:16x16, v5p:8x8x8, or h100:16x8 (16 hosts of 8 GPUs, estimated).
        num_slices: number of such slices, joined by the data-centre network; mesh.data must be a multiple of it.
        tokens: training tokens of the whole run, such as 300e9; give it to see the days that the run takes.
        price_per_chip_hour: price of one chip for one hour; give it, with --tokens, to see the cost in that currency.
        search: try every mesh, remat and number of microbatches for the same batch, and print the fastest that fits.
        out: with --search, write the config with the best overrides to this file.
        hosts: print instead which rows and bytes each host reads, and which files it writes.
        analytic: estimate by arithmetic in seconds, without compiling; use it to compare many layouts.
        html: also write a page to this file: memory, roofline, mesh, and what a search tried.
        json: print one JSON object instead of the table.
    """
    if out is not None and not search:
        raise UserError("--out is the file that --search writes; add --search")
    cfg = load_config([*flags, "--", config])
    named = " ".join([config, *(flag.removeprefix("--") for flag in flags)])
    prepare_process()
    _leave_accelerators()
    from gptjax.apps.plan import planning
    from gptjax.apps.plan.chips import parse_topology
    from gptjax.apps.plan.roofline import run_costs

    chips, cfg = parse_topology(topology, num_slices), planning.config_on_accelerators(cfg)
    if hosts:
        print_hosts(cfg, chips, named, json)
        return
    made, cfg, tried = find_plan(cfg, chips, search, analytic)
    made["config"] = named
    for speed in (made["ceiling"], made["expected"]):
        speed |= run_costs(speed["tokens_per_s"], chips.n_chips, tokens, price_per_chip_hour)
    print_plan(made, json)
    if out is not None:
        write_config(out, config, flags, made["overrides"])
    if html is not None:
        given = {"topology": topology, "num_slices": None if num_slices == 1 else num_slices, "tokens": tokens}
        given |= {"price_per_chip_hour": price_per_chip_hour, "search": search, "analytic": analytic, "html": html}
        write_plan_page(html, cfg, chips, made, tried, command_of(config, flags, given))
    if not made["fits"]:
        raise SystemExit(DOES_NOT_FIT)


def find_plan(
    cfg: Config, chips: Any, search: bool, analytic: bool
) -> tuple[dict[str, Any], Config, list[tuple[float, dict[str, Any], float]]]:
    """Return the plan of a config, or of the best that a search finds; its config; and what the search tried."""
    from gptjax.apps.plan import planning

    if search:
        overrides, made, tried = planning.search(cfg, chips, analytic)
        return made | {"overrides": overrides}, override(cfg, overrides), tried
    made = planning.make_plan(cfg, chips, analytic)
    return made | {"suggestion": None if made["fits"] else planning.suggest(cfg, chips)}, cfg, []


def print_plan(plan: dict[str, Any], json: bool) -> None:
    """Print a plan as a table or as one JSON object; after a search, also the overrides that it found."""
    from gptjax.apps.plan.report import flags, report

    if json:
        print(json_format.dumps(plan, allow_nan=False))
        return
    print("\n".join(report(plan)))
    if "overrides" in plan:
        print(f"\nthe best of {plan['candidates']} that fit by arithmetic: {flags(plan['overrides'])}")


def print_hosts(cfg: Config, chips: Any, named: str, json: bool) -> None:
    """Print what each host of a run does."""
    from gptjax.apps.plan.hosts import describe_hosts, report_hosts

    described = {"config": named, **describe_hosts(cfg, chips)}
    print(json_format.dumps(described) if json else "\n".join(report_hosts(described)))


def _leave_accelerators() -> None:
    """Use the CPU alone: a plan must not occupy the TPU of the machine that it runs on."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def command_of(config: str, flags: list[str], options: dict[str, Any]) -> str:
    """Return the command line that makes a plan; options that are None or False were not given."""
    words = ["gptjax", "plan", config, *flags]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else value]
    return shell(*words)


def write_plan_page(path: str, cfg: Config, chips: Any, plan: dict[str, Any], tried: list[Any], command: str) -> None:
    """Write a plan as an HTML page; raise UserError if it cannot be written or a library is missing.

    Args:
        command: makes the page again.
    """
    try:
        from gptjax.apps.plan.page import plan_page
        from gptjax.apps.plan.placement import place_chips
        from gptjax.apps.plan.report import flags
        from gptjax.figures.plan import Candidate
        from gptjax.pages.page import write_page
    except ImportError:
        raise UserError("a page needs: pip install 'gptjax[report]'") from None
    best = plan.get("overrides")
    marks = [
        Candidate(flags(overrides), n_bytes, seconds, overrides == best) for seconds, overrides, n_bytes in tried
    ]
    write_page(path, plan_page(plan, chips, place_chips(cfg, chips), marks, command))


def write_config(out: str, config: str, flags: list[str], overrides: dict[str, object]) -> None:
    """Write a config file with the overrides applied: the user's own first, then those that the search found.

    Args:
        flags: the user's overrides, each as `--section.key=value`.
        overrides: `section.key` -> value.

    Raises:
        UserError: `out` cannot be written.
    """
    values = upgrade(read_yaml(config))
    own = {}
    for name, _, text in (flag.removeprefix("--").partition("=") for flag in flags):
        value = parse_option(name, text)
        own[current_key(name, plain=not isinstance(value, dict))] = value
    for name, value in {**own, **overrides}.items():
        put_value(values, name, value)
    with writing(out) as path:
        path.write_text(yaml.safe_dump(values, sort_keys=False))
