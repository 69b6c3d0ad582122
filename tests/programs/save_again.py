"""A program of tests/training/test_elastic.py: resumes a run and saves it again at once, without a step.

AS_OLDER: where this variable is set, it writes the checkpoint as the first version of fastdit did.
"""

import os
import shutil

import torch
from safetensors.torch import save_file


def main(argv: list[str]) -> None:
    from fastdit import distributed
    from fastdit.parser import parse

    config = parse(argv)
    ranks = distributed.start(config)

    from fastdit.training.session import Session

    session = Session(config, ranks)
    assert session.first_step > 0, "there was nothing to resume"
    if "AS_OLDER" in os.environ:
        save_as_older(session)
    else:
        session.run.save(session.first_step)
    session.close()


def save_as_older(session) -> None:
    """Replace the checkpoint by one of the first version's, for one rank."""
    from fastdit.rundir.checkpoint_files import MANIFEST, OLDER_EMA_FILE, checkpoints, manifest, seal
    from fastdit.rundir.run_files import CHECKPOINTS
    from fastdit.training.ema import ema_state

    run, runtime = session.run, session.runtime
    (path,) = checkpoints(run.folder / CHECKPOINTS)
    written = {k: v for k, v in manifest(path).items() if k not in ("format", "seal", "sampled", "sha256")}
    shutil.rmtree(path)
    run.engine.save_checkpoint(str(path), tag="deepspeed", save_latest=False)
    state = run.state()
    meter = state["meter"]
    meter["sums"] = {name: torch.tensor(value) for name, value in meter["sums"].items()}
    meter["skipped"] = torch.tensor(meter["skipped"])
    torch.save(state | {"torch": torch.get_rng_state()}, path / f"rank-{runtime.rank}.pt")
    torch.save(run.method.state_dict(), path / "method.pt")
    save_file(ema_state(run.engine, run.sampled_network, "cpu"), path / OLDER_EMA_FILE)
    seal(path, written)
    manifest_file = path / MANIFEST
    manifest_file.write_text(manifest_file.read_text().replace('"seal"', '"older"'))
