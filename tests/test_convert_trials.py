"""Random models in every way that they are saved: equal logits or a refusal by name, never another model.

All of them: `pytest -m slow -n 0 -s tests/test_convert_trials.py`, which prints the counts and the reasons of
refusals (docs/huggingface.md).
"""

import warnings

import pytest

transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
pytest.importorskip("gguf", reason="pip install -e '.[hf]'")

import gguf_trials  # noqa: E402, both need what is skipped without above
import weight_trials  # noqa: E402

from gptjax.convert.families import FAMILIES  # noqa: E402

FEW, MANY = range(3, 6), range(200)  # the numbers of models


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def assert_no_difference(trial, families, numbers: range) -> None:
    outcomes = {family: [trial(family, number) for number in numbers] for family in families}
    print("\n" + weight_trials.table(outcomes))
    different = [
        f"{family} {number}: {outcome.reason}"
        for family, found in outcomes.items()
        for number, outcome in zip(numbers, found, strict=True)
        if outcome.kind == "different"
    ]
    assert not different, different
    for family, found in outcomes.items() if numbers == MANY else ():  # of a few, a family may have none that is read
        assert any(outcome.kind == "equal" for outcome in found), family


def test_every_family_that_is_read_is_tried():
    assert sorted(weight_trials.FAMILIES) == sorted(FAMILIES)


@pytest.mark.whole
def test_a_few_random_models_of_transformers_are_equal_or_refused():
    assert_no_difference(weight_trials.trial, weight_trials.FAMILIES, FEW)


@pytest.mark.whole
def test_a_few_random_gguf_files_are_equal_or_refused():
    assert_no_difference(gguf_trials.trial, gguf_trials.ARCHITECTURES, FEW)


@pytest.mark.slow
def test_many_random_models_of_transformers_are_equal_or_refused():
    assert_no_difference(weight_trials.trial, weight_trials.FAMILIES, MANY)


@pytest.mark.slow
def test_many_random_gguf_files_are_equal_or_refused():
    assert_no_difference(gguf_trials.trial, gguf_trials.ARCHITECTURES, MANY)
