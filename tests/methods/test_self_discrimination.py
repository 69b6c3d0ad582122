"""Test SD-DiT's method: its loss against DINO's and iBOT's formulas in fp64, its two views and its teacher."""

import math
from statistics import NormalDist

import pytest
import torch
from sd_dit_reference import encode, fp64, generate, logits, norm, part, project, randomise
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastdit.kernels import split_tokens
from fastdit.methods.denoising import Denoising
from fastdit.methods.self_discrimination import SDDiT, SelfDiscrimination
from fastdit.models import Encoder, EncoderDecoder, SplitDiT, Student
from fastdit.noise import DDPM, EDM, Flow

CLASSES, PROTOTYPES = 5, 37
PROCESSES = [EDM(), DDPM(), Flow()]
HEAD = {"head_width": 40, "bottleneck": 20, "prototypes": PROTOTYPES}
DECODER = {"decoder": "extra", "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}


def make(process=PROCESSES[0], drop=0.3, random=True, decoder="extra", depth=2, **changes):
    """Return a method and its student, with random values in every parameter; the teacher is unlike the student."""
    decoder_settings = DECODER if decoder == "extra" else {"decoder": "split"}
    settings = SDDiT(**(HEAD | decoder_settings | changes))
    sizes = {
        "input_size": (6, 10), "patch": 2, "channels": 2, "width": 36, "depth": depth, "heads": 3, "classes": CLASSES,
        "attention_backend": "math",
    }  # fmt: skip
    outputs = {"out_channels": process.out_channels(2), "hidden_tokens": settings.hidden_tokens}
    if decoder == "extra":
        encoder = Encoder(**sizes, class_token=settings.cls == "token")
        network = EncoderDecoder(encoder, **outputs, width=24, depth=1, heads=2, attention_backend="math")
    else:
        network = SplitDiT(split=settings.split_of(depth), **outputs, **sizes)
    student = Student(network, head_width=40, bottleneck=20, prototypes=PROTOTYPES)
    method = SelfDiscrimination(process, CLASSES, drop, settings, student)
    if random:
        randomise(student, seed=1)
        randomise(method.teacher, seed=2)
        method.centers = 0.1 * torch.randn(method.centers.shape, generator=torch.Generator().manual_seed(3))
    return method, student


def batch(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, 6, 10, generator=generator) * 2 - 1, torch.randint(CLASSES, (n,), generator=generator)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def sinkhorn_knopp(logits, temperature):
    """SwAV's assignments (K prototypes by T tokens, in turns rows and columns to equal sums), 3 iterations."""
    q = torch.exp(logits / temperature).T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def dino(student, teacher, center, settings, temperature):
    """The loss of DINO and iBOT between logits (T, K), teacher entropy and KL; means over tokens."""
    if settings.centering == "sinkhorn":
        q = sinkhorn_knopp(teacher, temperature)
    else:
        q = torch.softmax((teacher - (center if settings.centering == "ema" else 0)) / temperature, -1)
    log_p = torch.log_softmax(student / settings.student_temperature, -1)
    cross, entropy = -(q * log_p).sum(-1).mean(), -(q * q.log()).sum(-1).mean()
    return cross, entropy, cross - entropy


def transcription(method, student, x0, y, generator):
    """Return L, its terms, the student's parameters with gradients and the teacher's logits, in fp64."""
    settings, process = method.settings, method.noise
    level = process.draw(len(x0), generator=generator, device="cpu")
    eps = torch.randn(x0.shape, generator=generator)
    y = torch.where(torch.rand(y.shape, generator=generator) < method.label_drop, CLASSES, y)
    keep = round((1 - settings.mask_ratio) * 15)
    split = split_tokens(len(x0), 15, keep, generator=generator, device="cpu") if keep < 15 else None
    x0, eps = x0.double(), eps.double()

    def view(level):
        return process.network_input(process.add_noise(x0, eps, level.double()), level.double())

    network, w, count = student.network, fp64(student), max(1, round(settings.share * len(x0)))
    out, tokens = generate(part(w, "network."), network, *view(level), y, split)
    # The 5 % quantiles of exp(N(-1.2, 1.2^2)), of 0 .. 999, and of sigmoid(N(0, 1)).
    z = NormalDist().inv_cdf(0.05)
    quiet = {"edm": math.exp(-1.2 + 1.2 * z), "ddpm": 50.0, "flow": 1 / (1 + math.exp(-z))}[process.name]
    teacher = {name: value.detach() for name, value in fp64(method.teacher).items()}
    quiet = torch.full((len(x0),), quiet, dtype=torch.float64)
    taught, *_ = encode(part(teacher, "encoder."), method.teacher.encoder, *view(quiet), y)

    sides = []
    for weights, stream, chosen in ((part(w, "head."), tokens, None), (part(teacher, "head."), taught, split)):
        stream = norm(stream)
        patches = stream[:, 1:] if settings.cls == "token" else stream
        first = stream[:, 0] if settings.cls == "token" else patches.mean(1)  # the teacher's: of all patches
        if chosen is not None:
            patches = torch.stack([row[ids] for row, ids in zip(patches, chosen[0])])
        both = first[:count], patches[:count].flatten(0, 1)
        sides.append([logits(weights, project(weights, t)) for t in both])
    centers, raw = method.centers.double(), sides[1]
    parts = [dino(s, t, c, settings, method.temperature) for s, t, c in zip(*sides, centers)]
    generative = process.loss(out, x0, eps, level.double())[0].mean()  # tests/noise/test_noise.py has its formulas
    loss = generative + settings.beta * (parts[0][0] + parts[1][0])
    loss.backward()
    terms = {
        "loss": generative,
        "discriminative_loss": parts[0][0] + parts[1][0],
        "cls_teacher_entropy": parts[0][1],
        "cls_teacher_student_kl": parts[0][2],
        "teacher_entropy": parts[1][1],
        "teacher_student_kl": parts[1][2],
    }
    return loss, terms, w, raw


CASES = {
    "split": {"cls": "mean", "decoder": "split"},
    "split-zeros": {"cls": "mean", "decoder": "split", "depth": 3, "split": 2, "hidden_tokens": "zeros"},
    "split-nothing-hidden": {"cls": "mean", "decoder": "split", "mask_ratio": 0.0},
    "split-part": {"cls": "mean", "decoder": "split", "share": 0.5},
    "extra-part": {"cls": "mean", "share": 0.5},
    "token-ema": {},
    "mean-ema": {"cls": "mean"},
    "token-none": {"centering": "none", "hidden_tokens": "mask_token"},
    "mean-none": {"cls": "mean", "centering": "none", "hidden_tokens": "zeros"},
    "token-sinkhorn": {"centering": "sinkhorn", "teacher_temperature_start": 0.05},
    "mean-sinkhorn": {"cls": "mean", "centering": "sinkhorn"},
    "nothing-hidden": {"mask_ratio": 0.0},
    "ddpm": {"process": DDPM()},
    "flow": {"process": Flow(), "beta": 1.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_the_published_formulas(case):
    method, student = make(**({"cls": "token", "mask_ratio": 0.35, "beta": 0.5, "student_temperature": 0.13} | case))
    method.begin_step(1, 20)
    x0, y = batch()
    expected, terms, w, raw = transcription(method, student, x0, y, seeded())
    outcome = method.loss(student, x0, y, seeded())
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert {name: value.item() for name, value in outcome.terms.items()} == pytest.approx(
        {name: value.item() for name, value in terms.items()}, rel=1e-4
    )
    assert terms["cls_teacher_student_kl"] > 0.1
    assert not any(value.requires_grad for value in outcome.terms.values())
    outcome.loss.backward()
    for name, p in student.named_parameters():
        want = w[name].grad
        assert want.any(), name
        scale = want.square().mean().sqrt().item()
        torch.testing.assert_close(p.grad.double(), want, rtol=0, atol=2e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")
    # what the centres move towards, and the share of prototypes that win a patch
    before, signals = method.centers, method.end_step()
    for i in range(2):
        moved = 0.9 * before[i].double() + 0.1 * raw[i].mean(0)
        torch.testing.assert_close(method.centers[i].double(), moved, rtol=0, atol=1e-6)
    assert signals["center_norm"].item() == pytest.approx(method.centers[1].norm().item())
    if method.settings.centering != "sinkhorn":
        shifted = raw[1] - (before[1].double() if method.settings.centering == "ema" else 0)
        assert signals["prototype_usage"].item() == pytest.approx(len(shifted.argmax(1).unique()) / PROTOTYPES)


@pytest.mark.parametrize("decoder", ["extra", "split"])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_without_mask_and_weight_it_is_the_plain_method_to_the_bit(process, decoder):
    method, student = make(process, decoder=decoder, mask_ratio=0.0, beta=0.0)
    x0, y = batch()
    plain = Denoising(process, CLASSES, 0.3).loss(student.network, x0, y, seeded())
    expected = torch.autograd.grad(plain.loss, list(student.network.parameters()))
    got = method.loss(student, x0, y, seeded())
    found = torch.autograd.grad(got.loss, list(student.network.parameters()))
    assert torch.equal(got.loss, plain.loss)
    for key in ("x0_hat", "level"):
        assert torch.equal(getattr(got, key), getattr(plain, key))
    assert torch.equal(got.terms["loss"], plain.terms["loss"])
    assert any(grad.any() for grad in expected)
    for (name, _), a, b in zip(student.network.named_parameters(), found, expected):
        assert torch.equal(a, b), name


def test_the_teacher_gets_no_gradient_and_keeps_nothing():
    method, student = make()
    saved, views = [], []
    forward = method.teacher.forward

    def watched(view, *args):
        views.append(view.requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            features = forward(view, *args)
        assert features.grad_fn is None
        assert not features.requires_grad
        return features

    method.teacher.forward = watched
    method.loss(student, *batch(), seeded()).loss.backward()
    assert saved == []
    assert views[0].grad is None
    for name, p in method.teacher.named_parameters():
        assert not p.requires_grad, name
        assert p.grad is None, name
    assert not method.centers.requires_grad


def test_the_teacher_starts_as_the_student_and_shares_nothing_with_it():
    method, student = make(random=False)
    teacher, sources = method.ema_replicas(student)["teacher"]
    assert [p.shape for p in teacher] == [p.shape for p in sources]
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(teacher, sources))
    names = {name for name, p in student.named_parameters() if any(p is source for source in sources)}
    assert names == {name for name, _ in student.named_parameters() if "decoder" not in name and "bridge" not in name}


def test_a_split_students_teacher_is_its_first_blocks():
    method, student = make(decoder="split", depth=3, split=2, random=False)
    randomise(student, seed=1)
    other = SelfDiscrimination(EDM(), CLASSES, 0.1, method.settings, student)
    teacher, sources = other.ema_replicas(student)["teacher"]
    assert all(torch.equal(a.flatten(), b.flatten()[: a.numel()]) for a, b in zip(teacher, sources, strict=True))
    names = {name for name, p in student.named_parameters() if any(p is source for source in sources)}
    skipped = ("network.blocks.2.", "network.head.")
    assert names == {name for name, _ in student.named_parameters() if not name.startswith(skipped)}
    shorter = {tuple(a.shape) for a, b in zip(teacher, sources) if a.shape != b.shape}
    assert shorter == {(14 * 36, 36), (14 * 36,)}, "modulation of two blocks, and of the norm behind them"


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_both_views_are_of_one_image_one_noise_and_one_label(process):
    asked = 0.02
    method, student = make(process, teacher_noise=asked)
    seen = {}
    method.teacher.register_forward_pre_hook(lambda m, args: seen.update(teacher=args))
    student.register_forward_pre_hook(lambda m, args: seen.update(student=args))
    x0, y = batch()
    outcome = method.loss(student, x0, y, seeded())
    quiet = process.level_at(asked, len(x0), x0.device)
    assert process.noise_to_signal(quiet) == pytest.approx(
        torch.full((4,), asked), rel=0.2 if process == DDPM() else 1e-5
    )
    noises = []
    for name, level in (("student", outcome.level), ("teacher", quiet)):
        view, t, labels, *_ = seen[name]
        zero = torch.zeros(1, 1, 1, 1).expand(4, -1, -1, -1)
        signal = process.network_input(process.add_noise(zero + 1, zero, level), level)[0].double()
        noise = process.network_input(process.add_noise(zero, zero + 1, level), level)[0].double()
        noises.append((view.double() - signal * x0.double()) / noise)
        assert torch.equal(t, process.network_input(view, level)[1])
        assert torch.equal(labels, seen["student"][2])
    torch.testing.assert_close(*noises, rtol=0, atol=5e-4)
    assert noises[0].std() == pytest.approx(1, abs=0.1)
    assert (seen["student"][2] == CLASSES).any()
    assert torch.equal(seen["student"][3][0], seen["teacher"][3]), "the patches that are compared"
    assert seen["student"][3][0].shape == (4, 12)


def test_a_fresh_teacher_agrees_with_its_student():
    """With one view and all patches both heads see the same tokens, including the class token's small variance."""
    method, student = make(random=False, mask_ratio=0.0, cls="token", teacher_noise=0.002)
    heads = []
    for module in (method.teacher, student):
        module.head.register_forward_hook(lambda module, args, out: heads.append(out))
    x0, y = batch()
    method.draw = lambda x0, y, generator: (torch.full((4,), 0.002), torch.zeros_like(x0), y)
    method.loss(student, x0, y, None)
    torch.testing.assert_close(heads[0], heads[1].detach(), rtol=1e-4, atol=1e-6)  # features are near one


@pytest.mark.parametrize("changes", [{"teacher_noise": "relative:0.2"}, {"share": 0.5}, {"momentum": 1.0}])
@pytest.mark.parametrize("decoder", ["extra", "split"])
@pytest.mark.parametrize("centering", ["ema", "sinkhorn", "none"])
def test_no_step_waits_for_the_device(centering, decoder, changes):
    """The tensors have no values: whatever asked for one would raise."""
    method, student = make(centering=centering, decoder=decoder, **changes)
    x0, y = batch()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        outcome = method.loss(student, fake.from_tensor(x0), fake.from_tensor(y), None)
        outcome.loss.backward()
        method.end_step()
        with pytest.raises(DataDependentOutputException):
            bool(outcome.loss > 0)
