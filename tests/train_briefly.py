"""train.py without its picture and its closing sample, which take a third of a run of thirty steps."""

import sys

import gptjax.cli

prepare_process = gptjax.cli.prepare_process


def prepare_and_leave_out_the_end(*arguments) -> None:
    """Prepare the process, as `train` does before it imports JAX; then put nothing in place of the end's parts."""
    prepare_process(*arguments)
    import gptjax.lifecycle.report
    import gptjax.trainer

    gptjax.lifecycle.report.plot_loss = lambda _: None
    gptjax.trainer.conclude = lambda *_: None


if __name__ == "__main__":
    gptjax.cli.prepare_process = prepare_and_leave_out_the_end
    sys.exit(gptjax.cli.train(sys.argv[1:]))
