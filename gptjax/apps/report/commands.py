"""The commands `gptjax report` and `gptjax compare`."""

import json as json_format
from pathlib import Path

from gptjax.apps.report.runs import find_runs, read_run
from gptjax.errors import UserError
from gptjax.shell import display
from gptjax.shell.files import write_atomically
from gptjax.shell.paths import UserPath, shell

MISSING = "pages and pictures need: pip install 'gptjax[report]'"


def report(run: UserPath, out: UserPath | None = None) -> None:
    """Write one run as a self-contained HTML page: figures, curves, samples, config, provenance.

    Args:
        run: the directory of a run, finished or still training.
        out: the file to write; the default is report.html in the run's directory.
    """
    found = read_run(run)
    try:
        from gptjax.apps.report.run import run_page, summary
        from gptjax.pages.page import write_page
    except ImportError:
        raise UserError(MISSING) from None
    path = Path(run, "report.html") if out is None else Path(out)
    write_page(path, run_page(found))
    print(f"{path}  {display.size(path.stat().st_size)}\n{summary(found)}")


def compare(
    runs: list[UserPath], html: UserPath | None = None, png: UserPath | None = None, json: bool = False
) -> None:
    """Compare runs: losses over steps, tokens, FLOPs and time, what differs, and final figures with seeds grouped.

    Args:
        runs: directories of runs, folders that contain runs, and CSV files of other trainers (columns step and
            val_loss; optionally tokens, flops and seconds).
        html: also write the comparison as a page to this file.
        png: also write the loss curves as a picture to this file.
        json: print one JSON object instead of the table.
    """
    found = find_runs(runs)
    from gptjax.process import prepare_process

    prepare_process()
    from gptjax.apps.report import compare as comparing

    rates = [comparing.flops_per_token(run) for run in found]
    values = comparing.compare(found, rates)
    print(json_format.dumps(values) if json else "\n".join(comparing.lines(values)))
    command = shell("gptjax", "compare", *runs)
    if html is not None:
        from gptjax.pages.page import write_page

        write_page(html, comparing.compare_page(found, rates, values, command))
    if png is not None:
        from gptjax.figures.runs import draw_compare
        from gptjax.figures.style import to_bytes

        what = comparing.LOSSES[values["loss"]]
        try:
            write_atomically(png, to_bytes(draw_compare(comparing.curves(found, rates), what)))
        except OSError as error:
            raise UserError(f"cannot write --png {png}: {error.strerror or error}; give another file") from None
