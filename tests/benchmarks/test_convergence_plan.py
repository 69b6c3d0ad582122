"""The plan of benchmarks/convergence.py and what it makes of the runs: sweeps, finalists, tables and verdicts."""

import json
import math
import sys
from dataclasses import replace

from launching import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from convergence_plan import Plan, count_steps, rates_around
from convergence_tables import convergence_lines, convergence_record, write_chart

# -- the plan --

PLAN = Plan(
    contenders={"dit": "", "a": "--method a", "b": "--method b"}, rates=(1e-3, 2e-3, 4e-3), rate_budget=30.0,
    budget=55.0, rate_samples=10, samples=20, seeds=(0, 1), settings={"batch": 8},
)  # fmt: skip
SWEPT = replace(PLAN, contender_rates=3, extend=1, finalists=2, equal_steps=1)


def finish(plan, lines, values, what="run", **more):
    """Add lines of the next runs of a plan, one for each value of FD-PCA; None is a run that diverged."""
    for value in values:
        asked = plan.asked(next(run for run in plan.remaining(lines) if run.known))
        figures = {"loss": {"value": 0.5}, "FD-lite0": {"skipped": "no network"}, "FD-PCA": {"1": {"value": value}}}
        result = {"failed": "diverged at step 3"} if value is None else {"figures": figures}
        lines.append({"what": what, "asked": json.loads(json.dumps(asked)), **result, **more})


def told(runs):
    return [(run.phase, run.contender, run.lr, run.seed) for run in runs]


def test_the_best_rate_comes_from_the_journal():
    lines = [{"what": "record"}]
    assert [run.lr for run in PLAN.remaining(lines)[:3]] == [1e-3, 2e-3, 4e-3]
    assert not any(run.known for run in PLAN.remaining(lines)[3:])
    assert str(PLAN.remaining(lines)[3]) == "contenders: dit, the best rate, seed 0"
    finish(PLAN, lines, [3.0, 2.0])
    assert not any(run.known for run in PLAN.remaining(lines)[1:])
    finish(PLAN, lines, [None])
    left = PLAN.remaining(lines)
    assert [(run.contender, run.lr, run.budget, run.samples) for run in left[:3]] == [
        ("dit", 2e-3, 55.0, 20), ("a", 2e-3, 55.0, 20), ("b", 2e-3, 55.0, 20),
    ]  # fmt: skip
    finish(PLAN, lines, [1.0, 7.0, 5.0])
    assert [(run.contender, run.lr, run.seed) for run in PLAN.remaining(lines)] == [("dit", 2e-3, 1), ("b", 2e-3, 1)]
    finish(PLAN, lines, [1.0, 2.0])
    assert PLAN.remaining(lines) == []


def test_every_contender_has_its_own_rate():
    """Sweeps center on plain DiT's best rate, and go on beyond an edge at which the best lies, once here."""
    lines = []
    finish(SWEPT, lines, [3.0, 2.0, 1.0])
    assert told(SWEPT.remaining(lines))[0] == ("rates", "dit", 8e-3, 0)
    assert not any(run.known for run in SWEPT.remaining(lines)[1:])
    finish(SWEPT, lines, [2.0])
    around = [2e-3, 4e-3, 8e-3]
    swept = [("rates", name, lr, 0) for name in "ab" for lr in around]
    assert told(SWEPT.remaining(lines))[:6] == swept
    finish(SWEPT, lines, [9.0, 8.0, 9.0])
    finish(SWEPT, lines, [1.0, 2.0, 3.0])
    assert told(SWEPT.remaining(lines))[0] == ("rates", "b", 1e-3, 0)
    finish(SWEPT, lines, [0.5])
    assert told(SWEPT.remaining(lines))[:3] == [
        ("contenders", "dit", 4e-3, 0), ("contenders", "a", 4e-3, 0), ("contenders", "b", 1e-3, 0),
    ]  # fmt: skip
    finish(SWEPT, lines, [1.0, 3.0, 2.0])
    assert told(SWEPT.remaining(lines)) == [
        ("contenders", "dit", 4e-3, 1), ("contenders", "b", 1e-3, 1), ("contenders", "a", 4e-3, 1),
        ("equal steps", "a", 4e-3, 0), ("equal steps", "b", 1e-3, 0),
    ]  # fmt: skip


def test_a_contender_without_a_good_rate_does_not_stop_the_others():
    lines = []
    finish(SWEPT, lines, [3.0, 1.0, 2.0])
    finish(SWEPT, lines, [None, None, None])
    finish(SWEPT, lines, [2.0, 1.0, 2.0])
    assert told(SWEPT.remaining(lines))[:3] == [("contenders", name, 2e-3, 0) for name in ("dit", "a", "b")]
    finish(SWEPT, lines, [1.0, None, 1.0])
    assert [run.contender for run in SWEPT.remaining(lines) if run.seed == 1] == ["dit", "b"]


def test_a_rate_among_the_flags_is_not_swept():
    plan = replace(SWEPT, contenders={"dit": "", "a": "--method a --lr 5e-4", "b": "--lr=7e-4"})
    lines = []
    finish(plan, lines, [3.0, 1.0, 2.0])
    assert told(plan.remaining(lines))[:3] == [
        ("contenders", "dit", 2e-3, 0), ("contenders", "a", 5e-4, 0), ("contenders", "b", 7e-4, 0),
    ]  # fmt: skip


def test_rates_lie_around_the_best():
    assert rates_around(4e-3, [2e-3, 8e-3, 4e-3], 3) == (2e-3, 4e-3, 8e-3)
    assert rates_around(8e-3, [2e-3, 8e-3, 4e-3], 3) == (4e-3, 8e-3, 1.6e-2)
    assert rates_around(2e-3, [2e-3, 6e-3], 5) == (2.22e-4, 6.67e-4, 2e-3, 6e-3, 1.8e-2)
    assert rates_around(2e-3, [2e-3], 3) == (1e-3, 2e-3, 4e-3)


def test_runs_of_other_settings_do_not_count():
    lines = []
    finish(PLAN, lines, [1.0, 2.0, 3.0])
    for other in (replace(PLAN, settings={"batch": 9}), replace(PLAN, rate_budget=31.0), replace(PLAN, seeds=(1,))):
        assert other.finished(lines, other.remaining(lines)[0]) is None
        assert other.remaining(lines)[3].lr is None


def test_failed_runs_do_not_stop_a_plan():
    """A run that an exception ended decides as a failed one, and is tried again by the next call."""
    lines = []
    finish(PLAN, lines, [None, None, None])
    assert not any(run.known for run in PLAN.remaining(lines)), "no rate is left"
    lines = []
    finish(PLAN, lines, [math.nan, 2.0, 3.0])
    finish(PLAN, lines, [1.0])
    finish(PLAN, lines, [None], "run failed")
    assert PLAN.remaining(lines)[0].contender == "a"
    (a, b, *_), failed = PLAN.remaining(lines), lines.pop()
    finish(PLAN, lines, [9.0])
    lines[-1]["asked"]["contender"], lines[-1]["asked"]["flags"] = b.contender, b.flags
    lines.append(failed)
    assert [(run.phase, run.contender) for run in PLAN.remaining(lines)] == [
        ("contenders", a.contender), ("contenders", "dit"), ("contenders", "b"),
    ]  # fmt: skip


def test_steps_are_equal_for_an_equal_price():
    assert count_steps(55.0, 0.031) == count_steps(55.0, 0.031) == 1774
    assert count_steps(55.0, 0.062) == count_steps(60.0, 0.062, fixed=5.0) == 887
    assert count_steps(0.001, 5.0) == 1


# -- the record --


def row(phase, contender, value, lr=2e-3, seed=0, machine="GPU a1", **more):
    figures = {"FD-lite0": {"1": {"value": value, "floor": 3.0, "n": 9}}, "FD-PCA": {"1": {"value": 2 * value}}}
    figures |= {"probe": {"value": 0.8, "n": 9, "blocks": [0.5, 0.8]}}
    return {
        "what": "run", "asked": [phase, contender, lr, seed], "phase": phase, "contender": contender, "lr": lr,
        "seed": seed, "steps": 7, "seconds": 54.9, "planned_seconds": 55.0, "images_per_s": 8123.0, "machine": machine,
        "began": 1.0, "build_s": 2.0, "figures": {"loss": {"value": 0.25, "n": 9}, **figures}, "sampling_s": 4.0,
        "judging_s": 1.0, "sampling_flops": 8e14, "samples": 9, **more,
    }  # fmt: skip


def table(*rows):
    return "\n".join(convergence_lines(convergence_record(rows)))


def test_the_table_shows_contenders_sweeps_and_edges():
    rates = [row("rates", "dit", value, lr) for value, lr in ((9.0, 1e-3), (8.0, 2e-3), (10.0, 4e-3))]
    text = table(*rates)
    assert "| FD-lite0 at learning rate | 0.001 | 0.002 | 0.004 |" in text
    assert "| dit                       | 9.0   | 8.0   | 10.0  |" in text
    assert "edge" not in text
    runs = [row("contenders", "dit", value, seed=seed) for seed, value in enumerate((8.5, 8.25))]
    runs += [row("contenders", "a", 7.0, 4e-3, gradient_ratios={"gradient_ratio": 0.11})]
    sweep = [row("rates", "a", value, lr) for value, lr in ((7.0, 2e-3), (6.0, 4e-3))]
    lines = table(*rates, *sweep, *runs, row("equal steps", "a", 6.5, 4e-3)).splitlines()
    assert "FD-lite0, guidance 1 (floor 3.0)" in lines[0]
    assert "FD-lite0, guidance 1, equal steps" in lines[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]]
    assert cells[0][:4] == ["dit", "0.002", "7", "8.5 8.2"]
    assert cells[1][:4] == ["a", "0.004*", "7", "7.0"]
    assert {"6.5", "13.00", "structure 0.11", "80.0% (2 of 2)"} <= set(cells[1])
    assert "- * The best learning rate lies at an edge of those tried, a better one may lie beyond: a (0.004)." in lines
    text = table(*rates, row("contenders", "dit", 1, seconds=50.0))
    assert "missed the planned ones by up to 9%" in text
    failed = row("rates", "dit", 0.0, 8e-3, failed="diverged at step 9")
    del failed["figures"]
    assert "Failed: dit at 0.008, seed 0 (diverged at step 9)." in table(*rates, failed)
    assert "| 10.0  | failed |" in table(*rates, failed)
    assert table() == "No run is finished yet."


def test_the_verdict_takes_both_distances_and_all_seeds(tmp_path):
    dit = [row("contenders", "dit", 10.0), row("contenders", "dit", 10.0, seed=1)]
    better = [row("contenders", "a", 8.0), row("contenders", "a", 8.9, seed=1)]
    assert "a against dit: FD-lite0 -20% -11%, FD-PCA -20% -11%; pays" in table(*dit, *better)
    assert "for all 2 seeds" in table(*dit, *better)
    close = row("contenders", "a", 9.5, seed=1)
    assert "FD-lite0 -20% -5%, FD-PCA -20% -5%; does not pay" in table(*dit, better[0], close)
    equal_steps = row("equal steps", "a", 9.9)
    assert "pays: both" in table(*dit, *better, equal_steps), "equal steps do not decide"
    record = {"device": "a machine", **convergence_record([*dit, *better])}
    write_chart(record, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000
    better[0]["figures"]["FD-lite0"] = {"skipped": "needs a package"}
    text = table(*dit, *better)
    assert "undecided" in text
    assert "FD-lite0 was not measured: needs a package." in text
