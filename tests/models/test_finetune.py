"""Fine-tuning to other data: which weights move, what starts where, and the whole way from one data set to another."""

import json

import pytest
import torch
from launching import TINY, averages, checkpoint, forked, metrics, pieces
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from fastdit import run_parts
from fastdit.errors import UserError
from fastdit.export import main as export_command
from fastdit.models import (
    DiT,
    Encoder,
    EncoderDecoder,
    add_block_scales,
    fold_block_scales,
    freeze_for_diffit,
    load_checkpoint,
    save_official,
)
from fastdit.parser import parse

SMALL = {"input_size": 12, "patch": 2, "channels": 3, "width": 24, "depth": 3, "heads": 3}


def export(run, out):
    with pytest.raises(SystemExit) as ended:
        export_command(["--run", str(run), "--out", str(out)])
    assert ended.value.code == 0


def filled(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.3, generator=generator)
    return network


def inputs(classes=5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 12, 12, generator=generator), torch.rand(4, generator=generator), torch.arange(4) % classes


@pytest.fixture(params=["dit", "encoder_decoder"])
def network(request):
    if request.param == "dit":
        return filled(DiT(**SMALL, classes=5))
    encoder = Encoder(**SMALL, classes=5, class_token=True)
    return filled(EncoderDecoder(encoder, out_channels=3, width=16, depth=1, heads=2))


def test_gains_change_nothing_at_first(network):
    before = network(*inputs())
    add_block_scales(network)
    assert torch.equal(network(*inputs()), before)


def test_gains_are_factors_on_the_gates():
    """Against blocks whose branches are scaled by hand."""
    network, plain = filled(DiT(**SMALL, classes=5)).double(), DiT(**SMALL, classes=5).double()
    plain.load_state_dict(network.state_dict())
    add_block_scales(network)
    with torch.no_grad():
        network.gains.double().weight.normal_(generator=torch.Generator().manual_seed(2))
    gains = network.gains.weight.detach()
    for block, (attention, mlp) in zip(plain.blocks, gains):
        for layer, gain in ((block.proj, attention), (block.fc2, mlp)):
            layer.weight.data = layer.weight.data * gain[:, None]
            layer.bias.data = layer.bias.data * gain
    x, t, y = inputs()
    torch.testing.assert_close(network(x.double(), t, y), plain(x.double(), t, y))


def test_folded_gains_make_the_same_ordinary_network(network):
    x, t, y = inputs()
    network.double()
    state = network.state_dict()
    add_block_scales(network)
    encoder = network.encoder if isinstance(network, EncoderDecoder) else network
    with torch.no_grad():
        encoder.gains.double().weight.normal_(generator=torch.Generator().manual_seed(2))
    expected = network(x.double(), t, y)
    folded = fold_block_scales(network.state_dict())
    assert folded.keys() == state.keys()
    assert fold_block_scales(state).keys() == state.keys()
    encoder.gains = None
    network.load_state_dict(folded)
    torch.testing.assert_close(network(x.double(), t, y), expected)


def test_diffit_trains_less_than_a_percent_of_xl():
    with torch.device("meta"):
        network = DiT(input_size=32, patch=2, channels=4, width=1152, depth=28, heads=16, classes=1000, out_channels=8)
        add_block_scales(network)
    freeze_for_diffit(network)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trained / sum(p.numel() for p in network.parameters()) < 0.01
    assert network.label_embed.weight.requires_grad
    assert network.gains.weight.requires_grad
    assert not network.blocks[0].qkv.weight.requires_grad


def test_a_new_decoder_is_trained_whole():
    encoder = Encoder(**SMALL, classes=5, class_token=True)
    network = EncoderDecoder(encoder, out_channels=3, width=16, depth=1, heads=2)
    add_block_scales(network)
    freeze_for_diffit(network)
    assert all(p.requires_grad for p in [*network.decoder.parameters(), *network.bridge.parameters()])
    assert encoder.class_token.weight.requires_grad
    assert not encoder.adaln.weight.requires_grad


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_new_labels(tmp_path, suffix):
    """The file gives all weights except the label table, of which it gives the null row only."""
    source, path = filled(DiT(**SMALL, classes=7)), tmp_path / f"w{suffix}"
    if suffix == ".pt":
        save_official(source.state_dict(), path, grid=source.grid)
    else:
        save_file(source.state_dict(), path)
    loaded = DiT(**SMALL, classes=3, seed=5)
    fresh = loaded.label_embed.weight.detach().clone()
    load_checkpoint(loaded, path, new_labels=True)
    assert torch.equal(loaded.label_embed.weight[:-1], fresh[:-1])
    assert torch.equal(loaded.label_embed.weight[-1], source.label_embed.weight[-1])
    for name, value in source.state_dict().items():
        if name != "label_embed.weight":
            assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(UserError, match="number of classes"):
        load_checkpoint(DiT(**SMALL, classes=3), path)
    with pytest.raises(UserError, match="width is 24 in this file, 48 in this model"):
        load_checkpoint(DiT(**SMALL | {"width": 48}, classes=3), path, new_labels=True)


def test_finetune_needs_weights():
    with pytest.raises(UserError, match="finetune: needs the weights to start from; give --init_from"):
        parse(["--finetune", "all"])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """scikit-learn's handwritten digits, 28x28, as class folders; only three of the classes."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for i, (pixels, label) in enumerate(zip(images, labels)):
        if label < 3:
            (folder / str(label)).mkdir(exist_ok=True)
            image = Image.fromarray((pixels.reshape(8, 8) * 15.9).astype("uint8")).resize((28, 28))
            image.save(folder / str(label) / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A tiny DiT of Fashion-MNIST, exported in the original layout."""
    folder = tmp_path_factory.mktemp("pretrained")
    forked(*TINY, "--steps", 12, "--out", folder / "run").succeeded()
    export(folder / "run", folder / "dit.pt")
    return folder


@pytest.mark.launch
@pytest.mark.parametrize(
    ("flags", "stage"),
    [
        (["--finetune", "diffit"], "zero1"),
        (["--finetune", "diffit", "--method", "sadm", "--sadm.psi_width", "16"], "zero3"),
        (["--finetune", "all", "--method", "sadm", "--sadm.psi_width", "16"], "zero0"),
    ],
)
def test_from_one_data_set_to_another(pretrained, digits, tmp_path, flags, stage):
    common = [*TINY, "--data.source", digits, "--ds_config", stage, "--init_from", pretrained / "dit.pt", *flags]
    forked(*common, "--steps", 8, "--out", tmp_path / "run").succeeded()
    found, start = averages(tmp_path / "run", 8), averages(pretrained / "run", 12)
    assert found["label_embed.weight"].shape == (4, 32)
    diffit = "diffit" in flags
    for name, value in found.items():
        if name in ("label_embed.weight", "gains.weight") or value.dtype == torch.int64:
            continue
        unchanged = torch.equal(value, start[name])
        assert unchanged == (diffit and not name.endswith("bias")), name
    if diffit:
        assert not torch.equal(found["gains.weight"], torch.ones_like(found["gains.weight"]))
    assert all(line["loss"] < 10 for line in metrics(tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "out.pt")
    plain = run_parts.build_network(parse([*map(str, TINY)]), run_parts.Shape(1, 28, 28, 3))
    load_checkpoint(plain, tmp_path / "out.pt")  # an ordinary DiT again
    assert json.loads((checkpoint(tmp_path / "run", 8) / "manifest.json").read_text())["finetune"] == flags[1]
    if stage == "zero1":  # only what is trained has optimizer state
        trained = [v for n, v in found.items() if n.endswith("bias") or n.startswith(("label_embed", "gains"))]
        moments = pieces(tmp_path / "run", 8, "exp_avg")
        assert sum(moment.numel() for moment in moments.values()) == sum(v.numel() for v in trained)
