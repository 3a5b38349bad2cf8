"""The comparison of adapters: what each job builds, how learning rates are chosen, and one small run of each part."""

import json

import pytest
import torch

from qlearn import load_model, quantize
from qlearn.bench import adapters, results
from qlearn.bench.adapters import JOBS, Job, best, learn, step_memory, summary
from qlearn.methods import METHODS
from qlearn.models import QuantLinear
from qlearn.training.finetune import Settings
from qlearn.training.lora import lora_layers

FEW = {"trained": 4, "choosing": 2, "measured": 2, "tokens": 32}
SMALL = adapters.BILLION | {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def small():
    torch.manual_seed(0)
    return adapters.random_model(SMALL, "cpu")


def test_the_jobs_can_be_done():
    assert len({job.name for job in JOBS}) == len(JOBS)
    for job in JOBS:
        if job.method is not None:
            assert job.method in METHODS
            quantize(torch.randn(64, 128), job.method, job.bits, adapters.GROUP_SIZE, **dict(job.options))
    assert {job.r for job in adapters.MEMORY_JOBS} == {None, 16}


@pytest.mark.parametrize(
    "job",
    [Job("a"), Job("b", 2), Job("c", 2, "zero_point", 4), Job("d", 2, "sinq", 2, True, (("order", 4),))],
    ids=["full", "LoRA", "QLoRA", "LoftQ"],
)
def test_a_job_builds_what_it_says(job):
    model = job.build(small())
    learned = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    layers = lora_layers(model)
    assert learned == {torch.float32} and frozen == (set() if job.r is None else {torch.bfloat16})
    assert len(layers) == (0 if job.r is None else 7)
    assert {isinstance(layer.base, QuantLinear) for layer in layers.values()} <= {job.method is not None}
    assert all(layer.B.any().item() == job.loftq for layer in layers.values())


def run_of(name, lr, chosen_by, loss=1.0, **more):
    return {"name": name, "lr": lr, "chosen_by": chosen_by, "after": {"loss": loss}, **more}


def test_the_rate_is_chosen_without_the_pairs_that_are_measured():
    runs = [run_of("a", 1, 0.5, loss=0.1), run_of("a", 2, 0.3, loss=0.9), run_of("b", 1, 0.7), run_of("a", 3, 0.4)]
    assert [(run["name"], run["lr"]) for run in best(runs)] == [("a", 2), ("b", 1)]
    assert summary(runs)[0]["rates"] == [{"lr": lr, "loss": loss} for lr, loss in ((1, 0.1), (2, 0.9), (3, 1.0))]


def test_a_run_that_failed_is_never_the_best():
    runs = [{"name": "a", "lr": 9, "failed": "the loss is nan at step 3"}, run_of("a", 1, 0.5)]
    assert [run["lr"] for run in best(runs)] == [1]
    assert summary(runs)[0]["rates"] == [{"lr": 1, "loss": 1.0}, {"lr": 9}]


@pytest.mark.parametrize("job", [Job("x"), Job("y", 2, "zero_point", 4)], ids=["full", "QLoRA"])
def test_memory_of_a_step(job):
    found = step_memory(job.build(small()), job.name, 2, 8, checkpointing=True)
    assert found["formula"] == found["held"] and found["seconds"] > 0
    assert found["peak"] is None and found["allocated"] is None  # not on a GPU
    json.dumps(found)


def test_one_run(monkeypatch):
    """Two layers of the bundled model, that it may be quick."""
    tokenizer = load_model()[1]
    monkeypatch.setattr(adapters, "load_model", lambda: (shortened(), tokenizer))
    monkeypatch.setattr(adapters, "perplexity", lambda *args, **options: 8.0)
    run = learn(Job("q", 4, "zero_point", 4), 5e-3, Settings(steps=2, batch=2), "cpu", FEW)
    assert run["after"].keys() == {"loss", "exact", "perplexity"}
    assert [row["name"] for row in run["merging"]][:3] == ["adapters", "Q + BA", "W + BA"]
    assert run["bits_per_weight"] == 4.3125
    json.dumps(run)


def test_a_rate_that_is_too_high_is_a_result(monkeypatch):
    tokenizer = load_model()[1]
    monkeypatch.setattr(adapters, "load_model", lambda: (shortened(), tokenizer))
    run = learn(Job("full"), 1e30, Settings(steps=4, batch=2, warmup=1), "cpu", FEW)
    assert "lower lr" in run["failed"] and "after" not in run


def shortened():
    model, _ = load_model()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


def test_on_a_cpu_only_a_trial(capsys):
    with pytest.raises(SystemExit):
        adapters.main(["--device", "cpu"])
    assert "hours on a CPU; see whether it runs with --trial" in capsys.readouterr().err


# ---- the committed figures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    return results.read("adapters")


@pytest.fixture(scope="module")
def runs(record):
    return {run["name"]: run for run in record["runs"]}


def test_every_job_was_run_with_every_rate(record, runs):
    assert (
        record["gpu"]
        and record["date"]
        and record["command"] == "python -m qlearn.bench.adapters --steps 100 --batch 32"
    )
    assert list(runs) == [job.name for job in JOBS]
    for job in JOBS:
        run = runs[job.name]
        assert [row["lr"] for row in run["rates"]] == list(adapters.RATES[job.r is None])
        assert {"lr": run["lr"], **run["after"]} in run["rates"]
        assert run["after"]["loss"] < run["before"]["loss"] / 100


@pytest.mark.parametrize("r", adapters.RANKS)
def test_what_bits_cost_and_loftq_gives_back(runs, r):
    full, lora, two, loftq = (
        runs[name]["after"]["loss"] for name in ("full", f"LoRA, r {r}", f"QLoRA, 2 bit, r {r}", f"LoftQ, 2 bit, r {r}")
    )
    assert full < lora < loftq < two
    assert runs[f"LoftQ, 2 bit, r {r}"]["before"]["loss"] < runs[f"QLoRA, 2 bit, r {r}"]["before"]["loss"]


def test_only_the_trained_sum_is_right(runs):
    for run in runs.values():
        if run["method"]:
            loss = {way["name"]: way["loss"] for way in run["merging"]}
            others = [loss[name] for name in ("W + BA", "quantize(Q + BA)", "quantize(W + BA)")]
            assert loss["Q + BA"] == pytest.approx(loss["adapters"], rel=1e-3) and min(others) > loss["adapters"]


def test_the_memory_by_formula_is_what_is_held(record):
    for rows in record["memory"].values():
        assert len(rows) == 2 * len(adapters.MEMORY_JOBS)
        for row in rows:
            assert row["formula"] == row["held"] and row["peak"] > row["allocated"] >= sum(row["held"].values())
