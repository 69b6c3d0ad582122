"""SIGTERM and Ctrl-C: the ranks save, say so, leave nothing behind, and the run goes on as if it had never stopped."""

import os
import signal

import pytest
from launching import RECIPE, TINY, Launched, checkpoint, deepspeed, metrics, run, torchrun
from test_resume import assert_same_run

pytestmark = pytest.mark.launch

SLOW = ["--sample_every", 8, "--sample.steps", 40]  # pauses long enough for a signal to fall into them


def stopped(launched: Launched, folder, at: int, send) -> int:
    """Send a signal after step `at`; returns the step at which the ranks stopped."""
    launched.until(lambda: f"step {at}/" in launched.text, f"step {at}")
    send(launched)
    text = launched.wait().text
    line = next(line for line in text.splitlines() if line.startswith("stopped by"))
    ranks = text.replace(launcher_words(text), "")
    assert "Traceback" not in ranks, text
    step = int(line.split("after step ")[1].split(";")[0])
    assert step >= at
    assert str(checkpoint(folder, step)) in line
    assert checkpoint(folder, step).is_dir()
    return step


def launcher_words(text: str) -> str:
    """Ctrl-C ends the `deepspeed` command with a KeyboardInterrupt of its own, which is not ours to mend."""
    at = text.find('Traceback (most recent call last):\n  File "' + deepspeed()[0])
    return "" if at < 0 else text[at : text.index("KeyboardInterrupt", at)]


def to_launcher(launched: Launched) -> None:
    os.kill(launched.process.pid, signal.SIGTERM)


def to_group(number: signal.Signals):
    """Signal a process group, as a terminal does with Ctrl-C, or a batch system that ends a job."""
    return lambda launched: os.killpg(launched.process.pid, number)


def test_two_ranks_stopped_twice_end_as_if_never_stopped(straight, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = [*RECIPE, "--ds_config", "zero3", "--out", folder]
    with Launched(deepspeed(*flags, *SLOW), log) as launched:
        first = stopped(launched, folder, 6, to_launcher)
        assert "stopped by the end of its launcher" in launched.text
    with Launched(deepspeed(*flags, *SLOW, "--resume"), log) as launched:
        second = stopped(launched, folder, 21, to_group(signal.SIGINT))
        assert "stopped by SIGINT" in launched.text
    assert 6 <= first < 21 <= second < 40
    outcome = run(deepspeed(*flags, "--resume"), log).succeeded()
    assert f"steps {second} to 40" in outcome.text
    assert_same_run(folder, straight("zero3"), 40)


def test_torchrun_is_killed(tmp_path):
    """Its ranks get no signal then."""
    folder = tmp_path / "run"
    flags = ["--save_every", 1000, "--sample.agreement", 0, "--steps", 100_000]
    with Launched(torchrun(*TINY, *flags, "--out", folder), tmp_path / "log") as launched:
        launched.until(lambda: "step 6/" in launched.text, "step 6")
        os.kill(launched.process.pid, signal.SIGKILL)
        text = launched.wait().text
    assert "stopped by the end of its launcher after step" in text
    assert "Traceback" not in text
    (saved,) = (folder / "checkpoints").iterdir()
    assert f"saved {saved}; go on with --resume" in text


def test_torchrun_passes_sigterm_on(tmp_path):
    folder = tmp_path / "run"
    with Launched(torchrun(*RECIPE, *SLOW, "--out", folder), tmp_path / "log") as launched:
        launched.until(lambda: "step 6/" in launched.text, "step 6")
        to_launcher(launched)
        text = launched.wait().text
    assert "stopped by SIGTERM after step" in text
    assert metrics(folder)[-1]["step"] < 40
    assert len(list((folder / "checkpoints").iterdir())) == 1
