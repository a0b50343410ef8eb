"""What a resume says of its schedule."""

import pytest
from conftest import GPT2_LIKE, make_config

from gptjax.lifecycle.start import warn_of_another_rate

# Schedule, step, total before, total now -> whether the rate jumps.
RESUMES = [
    ("wsd", 700, 1000, 2000, False),  # the decay begins at 800
    ("wsd", 900, 1000, 2000, True),
    ("wsd", 900, 1000, 1000, False),
    ("wsd", 700, 1000, 750, True),
    ("cosine", 500, 1000, 2000, True),
    ("constant", 900, 1000, 2000, False),
]


@pytest.mark.parametrize(("schedule", "step", "before", "now", "jumps"), RESUMES)
def test_a_resume_with_other_total_steps_warns_where_the_rate_jumps(capsys, schedule, step, before, now, jumps):
    optim = {"schedule": schedule, "decay_frac": 0.2, "peak_lr": 0.01}
    cfg = make_config(GPT2_LIKE, train={"batch_sequences": 8, "total_steps": now}, optim=optim)
    warn_of_another_rate(cfg, step, before)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: train.total_steps {now} instead of {before} moves the") == jumps
    assert jumps or not said
