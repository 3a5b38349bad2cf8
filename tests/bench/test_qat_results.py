"""The committed results of quantization-aware training add up, and say what they promise."""

import pytest

from qlearn.bench.qat import JOBS
from qlearn.bench.results import read


@pytest.fixture(scope="module")
def runs():
    return {run["name"]: run for run in read("qat")["runs"]}


@pytest.fixture(scope="module")
def longer():
    return read("qat_5000_steps")["runs"]


def test_every_job_is_there(runs):
    assert list(runs) == [job.name for job in JOBS]
    for job in JOBS:
        assert all(runs[job.name][field] == value for field, value in vars(job).items())


def test_the_shares_follow_from_the_perplexities(runs, longer):
    for run in (*runs.values(), *longer):
        for text, removed in run["removed"].items():
            plain, trained, float_ = (run[which][text]["perplexity"] for which in ("plain", "trained", "float"))
            assert removed == pytest.approx((plain - trained) / (plain - float_))


def test_training_removes_most_of_the_damage(runs):
    """Of Q4_0's, at least 85 % on the package's text; of fewer bits', more than more training alone could."""
    assert runs["4 bit"]["removed"]["evaluation"] >= 0.85
    assert runs["control, next-token loss"]["removed"]["evaluation"] < 0.1
    for bits in (3, 2):
        assert all(share > 0.8 for share in runs[f"{bits} bit"]["removed"].values())


def test_every_export_was_exact(runs, longer):
    exact = [run["export_is_exact"] for run in (*runs.values(), *longer)]
    assert exact == [None, None] + 9 * [True]


def test_longer_trainings_differ_in_their_learning_rate_alone(runs, longer):
    given = ("bits", "fake_quant", "loss", "clip_mask", "scale_gradient", "group_size", "tokens_per_step")
    assert all(run[field] == runs["4 bit"][field] for run in longer for field in given)
    assert sorted(run["lr"] for run in longer) == [5e-5, 1e-4, 2e-4, 4e-4] and {run["steps"] for run in longer} == {
        5000
    }


def test_the_way_there_is_recorded(runs, longer):
    for run in (*runs.values(), *longer):
        assert len(run["on_the_way"]) == 10 and run["on_the_way"][-1]["step"] == run["steps"] <= 5000
        assert [step for step, _ in run["curve"]][-1] == run["steps"] - 1
