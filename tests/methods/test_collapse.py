"""Test SD-DiT's health signals on shipped images: they show a provoked collapse, and the default does not collapse."""

import math
from contextlib import closing

import pytest
import torch

from fastdit.data import make_loader, open_source
from fastdit.methods.self_discrimination import SDDiT, SelfDiscrimination
from fastdit.models import Encoder, EncoderDecoder, SplitDiT, Student
from fastdit.noise import EDM

STEPS, PROTOTYPES, BATCH = 300, 48, 16
# Nothing keeps this teacher from collapse: no centering, no sharpening, and hardly a lag behind the student.
UNGUARDED = {
    "centering": "none",
    "teacher_temperature": 0.1,
    "teacher_temperature_start": 0.1,
    "momentum": 0.5,
    "momentum_end": 0.5,
    "beta": 1.0,
}


def signals(decoder: str, **settings) -> list[dict[str, float]]:
    """Return means over every 50 of STEPS steps on Fashion-MNIST, with torch's AdamW and the teacher's EMA by hand."""
    settings = SDDiT(decoder=decoder, **settings)
    sizes = {"input_size": 28, "patch": 7, "channels": 1, "width": 32, "depth": 2, "heads": 2, "classes": 10}
    if decoder == "split":
        network = SplitDiT(split=1, **sizes)
    else:
        network = EncoderDecoder(Encoder(**sizes), out_channels=1, width=32, depth=1, heads=2)
    student = Student(network, head_width=64, bottleneck=16, prototypes=PROTOTYPES)
    method = SelfDiscrimination(EDM(), 10, 0.1, settings, student)
    ((teacher, sources),) = method.ema_replicas(student).values()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    generator, means = torch.Generator().manual_seed(0), []
    here = {"rank": 0, "world": 1, "device": torch.device("cpu"), "threads": 1}
    source = open_source("fashion_mnist")
    with closing(make_loader(source, batch=BATCH, size=28, channels=1, flip=False, seed=0, **here)) as loader:
        for step in range(STEPS):
            momentum = method.begin_step(step, STEPS)["teacher"]
            outcome = method.loss(student, *next(loader), generator)
            optimizer.zero_grad()
            outcome.loss.backward()
            optimizer.step()
            with torch.no_grad():
                for weight, source in zip(teacher, sources, strict=True):
                    weight.lerp_(source.flatten()[: weight.numel()].view_as(weight), 1 - momentum)
            if step % 50 == 0:
                means.append({})
            for name, value in (outcome.terms | method.end_step()).items():
                means[-1][name] = means[-1].get(name, 0.0) + value.item() / 50
    return means


@pytest.fixture(scope="module", params=["split", "extra"])
def decoder(request):
    return request.param


@pytest.fixture(scope="module")
def default(decoder):
    return signals(decoder)


@pytest.fixture(scope="module")
def collapsed(decoder):
    return signals(decoder, **UNGUARDED)


def test_the_default_does_not_collapse(default):
    """The student must still guess which of many prototypes a patch has, and the teacher tells patches apart."""
    for line in default:
        assert line["prototype_usage"] > 0.25
        assert line["teacher_student_kl"] > 0.1
        assert 0.3 < line["teacher_entropy"] < 0.8 * math.log(PROTOTYPES)
    assert default[-1]["loss"] < 0.8 * default[0]["loss"]


def test_a_collapse_shows_in_usage_and_divergence(collapsed):
    """All patches have one prototype, which the student knows beforehand. Its entropy is a matter of chance."""
    first, last = collapsed[0], collapsed[-1]
    assert last["prototype_usage"] < 2.5 / PROTOTYPES
    assert last["teacher_student_kl"] < 0.01
    assert last["cls_teacher_student_kl"] < 0.01
    assert first["teacher_student_kl"] > 3 * last["teacher_student_kl"]


def test_what_is_generated_does_not_tell(default, collapsed):
    """The denoising loss looks the same, which is why there are signals."""
    assert collapsed[-1]["loss"] == pytest.approx(default[-1]["loss"], rel=0.1)


def test_the_centre_tells_too(default, collapsed):
    """All teacher logits are alike, so their mean is as long as each of them."""
    assert collapsed[-1]["center_norm"] > 1.3 * default[-1]["center_norm"]
