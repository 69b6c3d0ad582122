"""Flags of other trainers are answered with ours."""

import re
import subprocess
import sys

import pytest
from test_config import TRAIN, complaint

from fastdit.other_trainers import _OURS


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--learning_rate 1e-3", "--lr"),
        ("--image-size 32", "--data.size"),
        ("--global-batch-size=256", "--batch"),
        ("--epochs 80", "--steps, the number of optimizer steps"),
        ("--num-workers 4", "--data.threads"),
        ("--cfg-scale 1.5", "--sample.guidance"),
        ("--results-dir out", "--out"),
        ("--data-path photos", "--data.source"),
    ],
)
def test_flags_of_other_trainers_are_answered_with_ours(argv, words):
    flag = argv.split()[0].split("=")[0]
    assert complaint(*argv.split()).startswith(f"{flag}: no such setting; fastdit has {words}")


def test_every_answer_to_another_trainers_flag_is_a_setting():
    known = help_of_everything()
    for stands in set(_OURS.values()):
        flag = stands.split()[0].rstrip(",")
        assert stands.startswith("the launcher") or flag in known, stands
    assert not {f"--{name}" for name in _OURS} & set(known), "ours are not answered"


def help_of_everything() -> list[str]:
    answer = subprocess.run([sys.executable, TRAIN, "--help", "all"], capture_output=True, text=True, check=True)
    return re.findall(r"--[\w.]+", answer.stdout)


@pytest.mark.parametrize("argv", ["--model DiT-XL/2", "--model=SiT-XL/2"])
def test_the_name_of_a_model_is_answered_with_flags(argv):
    assert "write --model.size XL --model.patch 2" in complaint(*argv.split())
