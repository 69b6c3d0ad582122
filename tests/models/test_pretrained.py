"""Test checkpoints of other projects: outputs against diffusers' class, and the original's files bit for bit."""

import argparse
import json

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from fastdit.errors import UserError
from fastdit.models import DiT, load_checkpoint, save_official
from fastdit.models.pretrained import from_diffusers, from_official, to_official

# patch 2 with learned sigma and head dim 24; patch 4 with one channel and head dim 16
CASES = {
    "patch2": {
        "input_size": 12,
        "patch": 2,
        "channels": 3,
        "width": 72,
        "depth": 3,
        "heads": 3,
        "classes": 7,
    },
    "patch4": {
        "input_size": 20,
        "patch": 4,
        "channels": 1,
        "width": 64,
        "depth": 2,
        "heads": 4,
        "classes": 3,
    },
}
CASES["patch2"]["out_channels"] = 6
SMALL = CASES["patch2"]


def random_like(shape, generator):
    """Values that keep activations near one; biases are as large as the rest, nothing is zero."""
    fan_in = torch.Size(shape)[1:].numel() if len(shape) > 1 else 4
    return torch.randn(shape, generator=generator) / fan_in**0.5


def make_diffusers(case, **changes):
    """diffusers' model with random values everywhere; its blocks' embedders are equal, as in a real DiT."""
    config = {
        "num_attention_heads": case["heads"],
        "attention_head_dim": case["width"] // case["heads"],
        "in_channels": case["channels"],
        "out_channels": case.get("out_channels"),
        "num_layers": case["depth"],
        "sample_size": case["input_size"],
        "patch_size": case["patch"],
        "num_embeds_ada_norm": case["classes"],
    }
    model = DiTTransformer2DModel(**(config | changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(random_like(weight.shape, generator))
    shared = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
    return model


def official_positions(side, width):
    """Return the original's position table (1, side^2, width), column first, by a transcription of its code."""
    table = np.zeros((side, side, 2, 2, width // 4))
    for i in range(width // 4):
        omega = 1.0 / 10000 ** (i / (width / 4))
        for n in range(side):
            table[:, n, 0, 0, i], table[:, n, 0, 1, i] = np.sin(n * omega), np.cos(n * omega)
            table[n, :, 1, 0, i], table[n, :, 1, 1, i] = np.sin(n * omega), np.cos(n * omega)
    return torch.from_numpy(table.reshape(1, side * side, width)).float()


def make_official(case, seed=2):
    """Return a state dict with the keys and shapes of the original's published .pt files."""
    width, patch, generator = case["width"], case["patch"], torch.Generator().manual_seed(seed)
    outputs = patch**2 * case.get("out_channels", case["channels"])
    shapes = {
        "x_embedder.proj": (width, case["channels"], patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (outputs, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(case["depth"]):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    state = {"pos_embed": official_positions(case["input_size"] // patch, width)}
    state["y_embedder.embedding_table.weight"] = random_like((case["classes"] + 1, width), generator)
    for module, shape in shapes.items():
        state[f"{module}.weight"] = random_like(shape, generator)
        state[f"{module}.bias"] = random_like(shape[:1], generator)
    return state


def make_batch(case):
    x = torch.randn(
        3,
        case["channels"],
        case["input_size"],
        case["input_size"],
        generator=torch.Generator().manual_seed(3),
    )
    return x, torch.tensor([0.0, 999.0, 417.0]), torch.tensor([0, case["classes"], 2])


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


# diffusers


@pytest.mark.parametrize("norm_eps", [1e-6, 1e-5])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_outputs_as_diffusers(tmp_path, case, safe, norm_eps):
    reference = make_diffusers(case, norm_eps=norm_eps)
    reference.save_pretrained(tmp_path, safe_serialization=safe)
    ours = DiT(**case)
    load_checkpoint(ours, tmp_path)
    x, t, y = make_batch(case)
    with torch.no_grad():
        expected, got = reference(x, t, y).sample, ours(x, t, y)
    assert expected.std() > 0.3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_every_diffusers_tensor_matters(tmp_path):
    """Guards the test above: changing any one of diffusers' tensors changes our output."""
    reference = make_diffusers(SMALL).state_dict()
    x, t, y = make_batch(SMALL)

    def output(state):
        model = DiT(**SMALL)
        model.load_state_dict(from_diffusers(state))
        with torch.no_grad():
            return model(x, t, y)

    baseline = output(reference)
    for key in reference:
        keys = [key]
        if ".norm1.emb." in key:
            keys = [f"transformer_blocks.{i}.norm1.emb.{key.split('.norm1.emb.')[1]}" for i in range(3)]
        changed = output(reference | {k: reference[k].flip(0) for k in keys})
        # A constant added to every key of a head cancels in the softmax.
        assert torch.allclose(changed, baseline, atol=1e-5) == key.endswith("to_k.bias"), key


def test_frequency_shift_travels_with_the_weights(tmp_path):
    """diffusers spaces the time features differently: a model loaded from it stays what it is when saved."""
    reference, ours, again = make_diffusers(SMALL), DiT(**SMALL), DiT(**SMALL)
    reference.save_pretrained(tmp_path / "theirs")
    load_checkpoint(ours, tmp_path / "theirs")
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    load_checkpoint(again, tmp_path / "ours.safetensors")
    batch = make_batch(SMALL)
    assert torch.equal(again(*batch), ours(*batch))
    with pytest.raises(UserError, match=r"time_embed\.freq_shift: these weights use diffusers"):
        save_official(ours.state_dict(), tmp_path / "ours.pt", grid=ours.grid)
    torch.save(make_official(SMALL), tmp_path / "official.pt")
    load_checkpoint(again, tmp_path / "official.pt")
    assert again.time_embed.freq_shift == 0


def test_trained_apart_embedders_are_refused(tmp_path):
    reference = make_diffusers(SMALL)
    with torch.no_grad():
        reference.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias[5] += 1
    reference.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"norm1.emb.timestep_embedder.linear_1.bias differs between blocks"):
        load_checkpoint(DiT(**SMALL), tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm_eps", 1e-3, "norm_eps is 0.001 in config.json"),
        ("activation_fn", "gelu", "activation_fn is 'gelu' in config.json, a DiT has 'gelu-approximate'"),
        ("norm_type", "ada_norm", "norm_type"),
        ("num_attention_heads", 6, "number of heads is 6 in config.json, 3 in this model"),
    ],
)
def test_a_config_of_another_function_is_refused(tmp_path, field, value, message):
    make_diffusers(SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    assert_refused(DiT(**SMALL), tmp_path, message)


def test_damaged_folders(tmp_path):
    model = DiT(**SMALL)
    assert_refused(model, tmp_path, "it has no config.json")
    make_diffusers(SMALL).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()
    for bad in ("{", "[1]", ""):
        config.write_text(bad)
        assert_refused(model, tmp_path, "config.json cannot be read")
    config.write_text(good_config)
    weights.write_bytes(good_weights[: len(good_weights) // 2])
    assert_refused(model, tmp_path, "diffusion_pytorch_model.safetensors cannot be read")
    weights.unlink()
    assert_refused(model, tmp_path, "neither diffusion_pytorch_model.safetensors nor diffusion_pytorch_model.bin")


# The original layout


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_official_equals_diffusers_up_to_the_time_frequencies(tmp_path, case):
    """diffusers' weights in an original .pt: its function, once its time features are the original's."""
    reference, ours = make_diffusers(case), DiT(**case)
    state = from_diffusers(reference.state_dict()) | {"time_embed.freq_shift": torch.tensor(0)}
    save_official(state, tmp_path / "dit.pt", grid=ours.grid)
    load_checkpoint(ours, tmp_path / "dit.pt")
    for block in reference.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = make_batch(case)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y), reference(x, t, y).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_round_trip_is_exact(tmp_path, case):
    original, model = make_official(case), DiT(**case)
    assert same(to_official(from_official(original), model.grid), original)
    torch.save(original, tmp_path / "theirs.pt")
    load_checkpoint(model, tmp_path / "theirs.pt")
    save_official(model.state_dict(), tmp_path / "ours.pt", grid=model.grid)
    assert same(torch.load(tmp_path / "ours.pt", weights_only=True), original)
    assert same(from_official(to_official(model.state_dict(), model.grid)), model.state_dict())
    assert (tmp_path / "ours.pt").stat().st_size < 1.2 * (tmp_path / "theirs.pt").stat().st_size


def test_half_precision_round_trip():
    original = {key: value.bfloat16() for key, value in make_official(SMALL).items() if key != "pos_embed"}
    written = to_official(from_official(original), (6, 6))
    positions = written.pop("pos_embed")
    assert same(written, original)
    assert torch.equal(positions, official_positions(6, 72))


def test_ema_weights_are_read(tmp_path):
    model, ema = make_official(SMALL, seed=4), make_official(SMALL, seed=5)
    ours = DiT(**SMALL)
    # The original trainer also writes the optimizer and the command line.
    extra = {
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-S/2"),
    }
    torch.save({"model": model, "ema": ema, **extra}, tmp_path / "0050000.pt")
    load_checkpoint(ours, tmp_path / "0050000.pt")
    assert same(to_official(ours.state_dict(), ours.grid), ema)
    load_checkpoint(ours, tmp_path / "0050000.pt", weights="model")
    assert same(to_official(ours.state_dict(), ours.grid), model)


# What does not fit


def assert_refused(model, path, message):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as refused:
        load_checkpoint(model, path)
    text = str(refused.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 48}, "width is 72 in this file, 48 in this model; take --model.depth 3 --model.width 72"),
        ({"depth": 2}, "depth is 3 in this file, 2 in this model; take --model.depth 3"),
        ({"depth": 4}, "depth is 3 in this file, 4 in this model; take --model.depth 3"),
        ({"patch": 4}, "patch is 2 in this file, 4 in this model; take --model.patch 2"),
        ({"channels": 4}, "channels is 3 in this file, 4 in this model; .*--data.channels 3"),
        ({"mlp_ratio": 2.0}, "MLP width is 288 in this file, 144 in this model; take --model.mlp_ratio 4"),
        (
            {"classes": 10},
            "number of classes, the null class included, is 8 in this file, 11 in this model; take --finetune all",
        ),
        (
            {"null_class": False},
            "number of classes, the null class included, is 8 in this file, 7 in this model",
        ),
        (
            {"out_channels": 3},
            "number of outputs per token is 24 in this file, 12 in this model; it predicts a variance too: "
            "take --noise.name ddpm",
        ),
        ({"out_channels": 12}, "is 24 in this file, 48 in this model; it predicts no variance: take --noise.name edm"),
    ],
)
def test_another_size_is_refused(tmp_path, changes, message):
    model = DiT(**(SMALL | changes))
    torch.save(make_official(SMALL), tmp_path / "dit.pt")
    assert_refused(model, tmp_path / "dit.pt", message)
    save_file(DiT(**SMALL).state_dict(), tmp_path / "dit.safetensors")
    assert_refused(model, tmp_path / "dit.safetensors", message)
    make_diffusers(SMALL).save_pretrained(tmp_path / "folder")
    assert_refused(model, tmp_path / "folder", message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    """A damaged file that holds all tensors in their shapes; training would end at its first step."""
    state = make_official(SMALL)
    state["blocks.1.attn.qkv.weight"][3, 4] = value
    torch.save(state, tmp_path / "dit.pt")
    assert_refused(DiT(**SMALL), tmp_path / "dit.pt", "blocks.1.qkv.weight holds values that are not finite; copy the")


def test_weights_in_fp8_load(tmp_path):
    state = make_official(SMALL)
    for name in [name for name in state if name.endswith("qkv.weight")]:
        state[name] = state[name].to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "dit.pt")
    model = DiT(**SMALL)
    load_checkpoint(model, tmp_path / "dit.pt")
    assert torch.equal(model.blocks[1].qkv.weight, state["blocks.1.attn.qkv.weight"].float())


@pytest.mark.parametrize("size", [16, 8, (8, 18), (8, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_image_size_loads(tmp_path, size, dtype):
    """The position table is computed, so that weights serve any grid. A line says so."""
    state, lines = {key: value.to(dtype) for key, value in make_official(SMALL).items()}, []
    torch.save(state, tmp_path / "dit.pt")
    model = DiT(**(SMALL | {"input_size": size}))
    load_checkpoint(model, tmp_path / "dit.pt", say=lines.append)
    assert torch.equal(model.blocks[1].qkv.weight, state["blocks.1.attn.qkv.weight"].float())
    now = "x".join(map(str, model.grid))
    assert lines == [
        f"{tmp_path}/dit.pt: it was trained on 6x6 patches, and this model has {now}; the positions are computed anew"
    ]
    torch.save(to_official(model.state_dict(), model.grid), tmp_path / "other.pt")
    back = DiT(**SMALL)
    load_checkpoint(back, tmp_path / "other.pt")
    assert same(
        to_official(back.state_dict(), back.grid) | {"pos_embed": 0 * state["pos_embed"].float()},
        {key: value.float() for key, value in state.items()} | {"pos_embed": 0 * state["pos_embed"].float()},
    )
    make_diffusers(SMALL).save_pretrained(tmp_path / "folder")
    load_checkpoint(model, tmp_path / "folder", say=lines.append)
    assert lines[-1].endswith(f"6x6 patches, and this model has {now}; the positions are computed anew")


def test_learned_positions_are_refused(tmp_path):
    state = make_official(SMALL)
    torch.save(state | {"pos_embed": state["pos_embed"] + 0.1}, tmp_path / "dit.pt")
    assert_refused(DiT(**SMALL), tmp_path / "dit.pt", "pos_embed is no sin-cos table")


@pytest.mark.parametrize(
    "key",
    [
        "pos_embed",
        "x_embedder.proj.bias",
        "y_embedder.embedding_table.weight",
        "blocks.1.attn.qkv.weight",
        "blocks.2.adaLN_modulation.1.bias",
        "final_layer.adaLN_modulation.1.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path, key):
    state = make_official(SMALL)
    del state[key]
    torch.save(state, tmp_path / "dit.pt")
    assert_refused(DiT(**SMALL), tmp_path / "dit.pt", f"{key} is missing")


def test_other_faults_are_named(tmp_path):
    path, model, good = tmp_path / "dit.pt", DiT(**SMALL), make_official(SMALL)
    torch.save(good | {"blocks.0.attn.rel_pos": torch.zeros(3)}, path)
    assert_refused(model, path, "blocks.0.attn.rel_pos is not part of this model")
    torch.save(good | {"blocks.0.attn.proj.weight": torch.zeros(72, 36)}, path)
    assert_refused(model, path, r"blocks.0.proj.weight is \(72, 36\), this model needs \(72, 72\)")
    ours = DiT(**SMALL).state_dict()
    save_file({k: v for k, v in ours.items() if k != "adaln.bias"}, tmp_path / "ours.safetensors")
    assert_refused(model, tmp_path / "ours.safetensors", "adaln.bias is missing")
    save_file({k: v for k, v in ours.items() if "blocks" not in k}, tmp_path / "ours.safetensors")
    assert_refused(model, tmp_path / "ours.safetensors", "blocks.0 is missing")


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('this code must never run')",))


def test_what_is_no_checkpoint(tmp_path):
    path, model = tmp_path / "dit.pt", DiT(**SMALL)
    assert_refused(model, path, "no such file")
    for content in (b"", b"not a checkpoint\n", bytes(40)):
        path.write_bytes(content)
        assert_refused(model, path, "dit.pt cannot be read as a checkpoint")
    torch.save(make_official(SMALL), path)
    whole = path.read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 50):
        path.write_bytes(whole[:length])
        assert_refused(model, path, "cannot be read as a checkpoint")
    torch.save({"ema": Hostile()}, path)
    assert_refused(model, path, "cannot be read as a checkpoint")
    for content in ([1, 2], {"step": 3}, torch.zeros(3), {"ema": 5}):
        torch.save(content, path)
        assert_refused(model, path, "it does not hold a dict of tensors")
    for content in ({}, {"conv.weight": torch.zeros(3)}):
        torch.save(content, path)
        assert_refused(model, path, "not a DiT checkpoint")
    (tmp_path / "dit.safetensors").write_bytes(b"\0" * 40)
    assert_refused(model, tmp_path / "dit.safetensors", "dit.safetensors cannot be read")
