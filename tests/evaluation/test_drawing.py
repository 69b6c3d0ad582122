"""Samples as pictures: one (seed, index) is one picture; grids; and the judge of classes against scikit-learn's."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from autoencoder_helpers import diffusers_model
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from fastdit.config import SampleConfig
from fastdit.data import open_source
from fastdit.errors import UserError
from fastdit.evaluation.draw_samples import BATCH as BATCHES
from fastdit.evaluation.draw_samples import balanced_labels, draw, grid, padded, precision_on, prepare, to_uint8
from fastdit.evaluation.sample_grids import describe_divergence
from fastdit.metrics.class_agreement import class_agreement, knn_labels
from fastdit.models import DiT, LatentDecoder, open_autoencoder
from fastdit.noise import DDPM, EDM, Flow
from fastdit.run_parts import Shape

BATCH = BATCHES["cpu"]

SHAPE = Shape(channels=1, height=12, width=8, classes=5)
PROCESSES = {"heun": EDM(), "ddpm": DDPM(), "euler": Flow(), "euler_maruyama": Flow(convention="sit")}


def trained_like(process) -> DiT:
    """A small DiT with no zero weights, so that labels, levels and guidance all matter."""
    network = DiT(
        input_size=(SHAPE.height, SHAPE.width),
        patch=2,
        channels=SHAPE.channels,
        out_channels=process.out_channels(SHAPE.channels),
        width=32,
        depth=2,
        heads=2,
        classes=SHAPE.classes,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in network.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.05)
    return network.eval()


@dataclass
class Studio:
    sampler: str

    def __post_init__(self):
        self.process = PROCESSES[self.sampler]
        self.network = trained_like(self.process)

    def __call__(self, indices, labels, seed=0, decoder=None, batch=None, **settings) -> torch.Tensor:
        settings = {"sampler": self.sampler, "steps": 4, "guidance": 2.0, "interval": (0.1, 20.0), **settings}
        return draw(
            self.network,
            self.process,
            SampleConfig(**settings),
            SHAPE,
            labels,
            indices=indices,
            seed=seed,
            device=torch.device("cpu"),
            decoder=decoder,
            batch=batch,
        )


@pytest.fixture(params=PROCESSES, scope="module")
def studio(request):
    return Studio(request.param)


def test_a_sample_is_the_same_to_the_bit_whatever_is_drawn_with_it(studio):
    """Drawn alone, in other numbers, in another order, with other labels around it, as two ranks would."""
    labels = balanced_labels(21, range(SHAPE.classes))
    whole = studio(range(21), labels)
    assert whole.shape == (21, 1, 12, 8)
    assert whole.dtype == torch.float32
    assert whole.isfinite().all()
    for some in ([0], [20], range(3), range(BATCH + 1), [17, 3, 3, 20, 0], range(1, 21, 2)):
        assert torch.equal(studio(some, labels), whole[list(some)])
    others = labels.copy()
    others[np.arange(21) != 6] = 0
    assert torch.equal(studio(range(21), others)[6], whole[6])


def test_labels_seed_and_index_all_matter(studio):
    labels = balanced_labels(4, [0])
    drawn = studio(range(4), labels)
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))
    assert not torch.equal(studio([1], labels, seed=1)[0], drawn[1])
    assert not torch.equal(studio([1], balanced_labels(4, [2]))[0], drawn[1])
    assert not torch.equal(studio([1], labels, guidance=1.0)[0], drawn[1])


def test_the_global_generator_is_neither_read_nor_moved(studio):
    labels = balanced_labels(2, [0, 1])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = studio(range(2), labels)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(studio(range(2), labels), first)


def test_the_network_always_sees_full_batches(studio):
    seen = set()
    hook = studio.network.register_forward_hook(lambda module, args, out: seen.add(len(args[0])))
    studio(range(2 * BATCH + 1), balanced_labels(2 * BATCH + 1, [0]))
    hook.remove()
    assert seen == {BATCH, 2 * BATCH}, "plain where guidance does not act, double where it does"


def test_batches_that_are_not_full_have_a_few_sizes():
    """On a GPU a small request does not pay for 128 samples; on a CPU the default batch is the only size."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [padded(n, 128, gpu) for n in (1, 8, 9, 17, 64, 65, 128)] == [8, 8, 16, 32, 64, 128, 128]
    assert [padded(n, 100, gpu) for n in (3, 33, 65, 100)] == [8, 64, 100, 100]
    assert [padded(n, 5, gpu) for n in (1, 5)] == [5, 5]
    assert {padded(n, BATCH, cpu) for n in range(1, BATCH + 1)} == {BATCH}
    assert [padded(n, 50, cpu) for n in (1, 12, 13, 25, 49)] == [12, 12, 24, 48, 50]


def test_a_sample_depends_on_the_size_of_its_batch_alone():
    """In batches of 48, a small one is filled up to 12 or 24, and has the bits of full batches of these sizes."""
    studio, labels, seen = Studio("heun"), balanced_labels(60, range(SHAPE.classes)), []
    hook = studio.network.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    whole = studio(range(60), labels, batch=48)
    hook.remove()
    assert set(seen) == {48, 96, 12, 24}
    assert torch.equal(whole[48:], studio(range(48, 60), labels))
    torch.testing.assert_close(whole, studio(range(60), labels), rtol=1e-3, atol=1e-3)


def test_bf16_computes_as_training_does():
    studio, labels = Studio("heun"), balanced_labels(3, range(SHAPE.classes))
    plain = studio(range(3), labels)
    settings = SampleConfig(precision="bf16")
    prepare(studio.network, settings, torch.device("cpu"))
    assert {param.dtype for param in studio.network.parameters()} == {torch.bfloat16}
    half = studio(range(3), labels, precision="bf16")
    assert half.dtype == torch.float32
    error = (half - plain).norm() / plain.norm()
    assert 1e-5 < error < 0.05
    assert torch.equal(half[:1], studio(range(1), labels, precision="bf16"))


def test_precision_on_a_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    found = [precision_on(SampleConfig(precision=name), gpu) for name in ("auto", "bf16", "tf32", "fp32")]
    assert found == ["bf16", "bf16", "tf32", "fp32"]
    assert [precision_on(SampleConfig(precision=name), cpu) for name in ("auto", "bf16", "fp32")] == [
        "fp32",
        "bf16",
        "fp32",
    ]
    with pytest.raises(UserError, match="tf32 is for GPUs"):
        precision_on(SampleConfig(precision="tf32"), cpu)


@pytest.mark.parametrize(("precision", "allowed"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_tf32_is_on_while_samples_are_drawn_only(precision, allowed):
    studio, seen = Studio("heun"), []
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    studio.network.register_forward_hook(lambda *args: seen.append([flag.allow_tf32 for flag in flags]))
    studio(range(1), balanced_labels(1, [0]), precision=precision)
    assert all(state == [allowed, allowed] for state in seen)
    assert [flag.allow_tf32 for flag in flags] == before


def test_nothing_to_draw_is_nothing_drawn(studio):
    assert studio([], balanced_labels(3, [0])).shape == (0, 1, 12, 8)


def test_latents_are_shown_decoded(tmp_path):
    """Each to the bit the same, whatever is drawn with it, in rounding too."""
    diffusers_model("AutoencoderTiny", latent_channels=SHAPE.channels).save_pretrained(tmp_path)
    decoder = LatentDecoder(open_autoencoder(str(tmp_path)), scale=0.5, shift=0.1)
    studio, labels = Studio("heun"), balanced_labels(BATCH + 3, range(SHAPE.classes))
    plain, shown = studio(range(BATCH + 3), labels), studio(range(BATCH + 3), labels, decoder=decoder)
    assert shown.shape == (BATCH + 3, 3, 24, 16)
    torch.testing.assert_close(shown, decoder.autoencoder.decode(plain / 0.5 + 0.1), rtol=1e-5, atol=1e-5)
    for some in ([BATCH + 2], [3, 0, BATCH], range(5)):
        assert torch.equal(studio(some, labels, decoder=decoder), shown[list(some)])
    assert studio([], labels, decoder=decoder).shape == (0, 3, 24, 16)


def test_balanced_labels():
    assert balanced_labels(7, [4, 1, 9]).tolist() == [4, 1, 9, 4, 1, 9, 4]
    assert balanced_labels(2, range(10)).tolist() == [0, 1]
    counts = np.bincount(balanced_labels(101, range(10)))
    assert counts.max() - counts.min() == 1
    assert balanced_labels(3, [0]).dtype == np.int64


def test_to_uint8_rounds_to_the_nearest_level_and_clips():
    levels = torch.arange(256, dtype=torch.float64)
    for shift in (-0.49, 0.0, 0.49):
        x = ((levels + shift) / 127.5 - 1).float().reshape(2, 2, 8, 8)
        assert np.array_equal(to_uint8(x), levels.reshape(2, 2, 8, 8).permute(0, 2, 3, 1).numpy().astype(np.uint8))
    assert to_uint8(torch.tensor([-9.0, -1.0, 1.0, 9.0]).reshape(1, 1, 2, 2)).ravel().tolist() == [0, 0, 255, 255]
    assert to_uint8(torch.zeros(2, 3, 5, 7)).shape == (2, 5, 7, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(5, 7), (28, 28), (80, 70)])
def test_each_tile_stands_in_the_row_of_its_class_in_order(channels, size):
    """Every picture is found once by its content, magnified by a whole factor, in its class's row and its turn."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, *size, channels), dtype=np.uint8)
    labels = np.array([4, 1, 4, 0, 1, 4, 1])
    page = grid(images, labels, ["a", "a longer name", "c", "d", "e"])
    scale = max(1, 64 // max(size))
    assert page.mode == "RGB"
    pixels = np.asarray(page).astype(int)
    height, width = size[0] * scale, size[1] * scale
    left = page.width - 3 * (width + 2)
    assert page.height == 2 + 3 * (height + 2)
    for i, (row, column) in enumerate([(2, 0), (1, 0), (2, 1), (0, 0), (1, 1), (2, 2), (1, 2)]):
        top, start = 2 + row * (height + 2), left + column * (width + 2)
        tile = pixels[top : top + height, start : start + width]
        expected = np.repeat(np.repeat(images[i], scale, 0), scale, 1)
        assert np.array_equal(tile, np.broadcast_to(expected, (height, width, 3)))
    for row, name_width in enumerate((1, 13, 1)):
        dark = (pixels[2 + row * (height + 2) :][: height + 2, :left] < 128).any((0, 2)).nonzero()[0]
        assert len(dark) > 0, "its name is in front"
        assert dark.min() >= 0
        assert (dark.max() - dark.min() > 40) == (name_width > 1)
    empty = pixels[2 : 2 + height, left + width + 2 :]
    assert (empty == 255).all(), "a class with fewer pictures ends earlier"


def real_images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` shipped images, spread over the set, in [-1, 1], and their labels."""
    source = open_source("fashion_mnist")
    ids = np.random.default_rng(0).permutation(source.n)[:n]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(source.read(int(i)).tobytes()))) for i in ids])
    return torch.from_numpy(pixels)[:, None] / 127.5 - 1, torch.from_numpy(source.labels[ids])


@pytest.mark.parametrize("k", [1, 5])
def test_the_judge_is_scikit_learns_on_real_images_and_good_at_it(k):
    images, labels = real_images(4300)
    known, queries = images[:4000], images[4000:]
    judge = KNeighborsClassifier(k, algorithm="brute").fit(known.flatten(1).numpy(), labels[:4000].numpy())
    expected = judge.predict(queries.flatten(1).numpy())
    found = knn_labels(queries, known, labels[:4000], k)
    assert np.array_equal(found.numpy(), expected)
    share = class_agreement(queries, labels[4000:], known, labels[:4000], k)
    assert share == pytest.approx((expected == labels[4000:].numpy()).mean())
    assert share > 0.75
    wrong = (labels[4000:] + 1) % 10
    assert class_agreement(queries, wrong, known, labels[:4000], k) < 0.1


def test_ties_go_to_the_smallest_label():
    known = torch.tensor([[1.0], [-1.0], [1.1], [-1.1]])
    assert knn_labels(torch.zeros(1, 1), known, torch.tensor([3, 2, 3, 2]), k=4).tolist() == [2]


def test_a_run_whose_loss_is_not_finite_has_diverged():
    assert describe_divergence([]) is None
    assert describe_divergence([{"loss": float("nan")}, {"loss": 0.5}, {"eval/FD-lite0": 3.0}]) is None
    for last in (float("inf"), float("nan"), None):
        assert describe_divergence([{"loss": 0.5}, {"loss": last}]) == "the last loss is not finite"


def test_a_run_whose_loss_rose_far_has_diverged():
    assert describe_divergence([{"loss": x} for x in (1.0, 30.0, 40.0, 50.0)]) == "the loss rose from 1 to 40"
    assert describe_divergence([{"loss": x} for x in (1.0, 0.5, 30.0, 0.4, 0.6)]) is None
    assert describe_divergence([{"loss": 1.0}]) is None
