"""Runs that several tests look at: each is trained once, when first asked for."""

from pathlib import Path

import kernel_checks  # noqa: F401 - before anything imports triton: it may choose the interpreter
import pytest
from launching import RECIPE, deepspeed, run, torchrun

STARTERS = {"zero2": torchrun}  # every other by deepspeed


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """`straight(ds_config)`: the folder of RECIPE on 2 ranks, from the first step to the last without a stop."""
    folders: dict[str, Path] = {}

    def trained(ds_config: str) -> Path:
        if ds_config not in folders:
            base = tmp_path_factory.mktemp(ds_config)
            start = STARTERS.get(ds_config, deepspeed)
            run(start(*RECIPE, "--ds_config", ds_config, "--out", base / "run"), base / "log").succeeded()
            folders[ds_config] = base / "run"
        return folders[ds_config]

    return trained
