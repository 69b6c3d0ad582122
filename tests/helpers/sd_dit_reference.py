"""Transcribe SD-DiT's networks from the formulas, in plain torch and any dtype, for tests of networks and method."""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def randomise(module: torch.nn.Module, seed: int, scale: float = 1.0) -> None:
    """Fill every parameter with random values instead of zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            fan_in = weight[0].numel() if weight.dim() > 1 else 4
            weight.copy_(scale * torch.randn(weight.shape, generator=generator) / fan_in**0.5)


def fp64(module: torch.nn.Module) -> State:
    """Return the parameters as fp64 leaves that collect gradients of their own."""
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def part(w: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)}


def linear(w: State, name: str, a: Tensor) -> Tensor:
    return a @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(a: Tensor) -> Tensor:
    return 0.5 * a * (1 + torch.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a**3)))


def norm(a: Tensor) -> Tensor:
    centred = a - a.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def modulated(a: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return norm(a) * (1 + scale[:, None]) + shift[:, None]


def positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return positions (rows * cols, width) fp64: column, then row; each the sines, then the cosines."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [coordinate.reshape(-1, 1) * omega for coordinate in (cols, rows)]
    return torch.cat([torch.cat([a.sin(), a.cos()], 1) for a in angles], 1)


def patches_of(x: Tensor, patch: int) -> Tensor:
    """Return the patches (B, N, channels * patch * patch), row by row."""
    return torch.nn.functional.unfold(x, patch, stride=patch).transpose(1, 2)


def places_of(network) -> Tensor | None:
    """Return row and column of each patch (N, 2) fp64, if the network's blocks rotate by them."""
    if network.rope is None:
        return None
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in network.grid))


def rotated(a: Tensor, places: Tensor) -> Tensor:
    """Rotate a (B, heads, N, d) by places ([B,] N, 2): a complex number for each pair of channels d/2 apart."""
    half = a.shape[-1] // 2
    frequencies = 10000.0 ** -(torch.arange(half // 2, dtype=torch.float64) / (half // 2))
    angles = (places[..., None] * frequencies).flatten(-2)  # rows turn the first half of the pairs
    turned = torch.complex(a[..., :half], a[..., half:]) * torch.exp(1j * angles).unsqueeze(-3)
    return torch.cat([turned.real, turned.imag], -1)


def blocks(
    w: State, x: Tensor, c: Tensor, heads: int, first: int = 0, last: int | None = None, places: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run adaLN-Zero blocks `first` to `last`; return the tokens, and the last shift and scale of all modulation.

    places: rows and columns of the tokens ([B,] N, 2), if queries and keys are rotated by them.
    """
    batch, tokens, width = x.shape
    vectors = linear(w, "adaln", c).split(width, dim=1)
    for i in range(first, len(vectors) // 6 if last is None else last):
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors[6 * i : 6 * i + 6]
        qkv = linear(w, f"blocks.{i}.qkv", modulated(x, shift1, scale1)).reshape(batch, tokens, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if f"blocks.{i}.q_norm" in w:
            norms = ((a, w[f"blocks.{i}.{name}_norm"]) for name, a in (("q", q), ("k", k)))
            q, k = (a / torch.sqrt((a**2).mean(-1, keepdim=True) + 1e-6) * weight for a, weight in norms)
        if places is not None:
            q, k = rotated(q, places), rotated(k, places)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        attended = (weights @ v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate1[:, None] * linear(w, f"blocks.{i}.proj", attended)
        hidden = gelu(linear(w, f"blocks.{i}.fc1", modulated(x, shift2, scale2)))
        x = x + gate2[:, None] * linear(w, f"blocks.{i}.fc2", hidden)
    return x, *vectors[-2:]


def embed(w: State, encoder, x: Tensor) -> Tensor:
    """Return all patches as tokens at their places."""
    kernel = w["patch_embed.weight"].flatten(1)
    tokens = patches_of(x, encoder.patch) @ kernel.T + w["patch_embed.bias"]
    return tokens + positions(encoder.grid, encoder.width).to(x.dtype)


def condition(w: State, t: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return silu(time + label)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    angles = t.double()[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], 1).to(dtype)
    hidden = linear(w, "time_embed.fc1", features)
    c = linear(w, "time_embed.fc2", hidden * torch.sigmoid(hidden)) + w["label_embed.weight"][y]
    return c * torch.sigmoid(c)


def encode(w: State, encoder, x: Tensor, t: Tensor, y: Tensor, visible: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return (tokens, the class token first, shift, scale, condition) of weights w in the shape of `encoder`."""
    c = condition(w, t, y, x.dtype)
    tokens = embed(w, encoder, x)
    places = places_of(encoder)
    if visible is not None:
        tokens = torch.stack([row[ids] for row, ids in zip(tokens, visible)])
        places = None if places is None else places[visible]
    if places is not None and "class_token.weight" in w:
        places = torch.cat([torch.zeros_like(places[..., :1, :]), places], -2)
    if "class_token.weight" in w:
        tokens = torch.cat([w["class_token.weight"].expand(len(x), 1, -1), tokens], 1)
    return *blocks(w, tokens, c, encoder.heads, places=places), c


def generate(w: State, network, x: Tensor, t: Tensor, y: Tensor, split=None) -> tuple[Tensor, Tensor]:
    """Return the output and the encoder's tokens, sample by sample where patches are hidden."""
    if hasattr(network, "split"):
        return generate_by_split(w, network, x, t, y, split)
    encoder, decoder = part(w, "encoder."), part(w, "decoder.")
    tokens, shift, scale, c = encode(encoder, network.encoder, x, t, y, split and split[0])
    seen = tokens[:, 1:] if "class_token.weight" in encoder else tokens
    full = linear(w, "bridge", modulated(seen, shift, scale))
    if split is not None:
        raw = linear(w, "bridge", modulated(embed(encoder, network.encoder, x), shift, scale))
        rows = []
        for i, (visible, hidden) in enumerate(zip(*split)):
            row = torch.zeros_like(raw[i])
            if network.hidden_tokens == "noised_patch":
                row = row.index_put((hidden,), raw[i][hidden])
            if network.hidden_tokens == "mask_token":
                row = row + w["mask_token.weight"]
            rows.append(row.index_put((visible,), full[i]))
        full = torch.stack(rows)
    grid, heads = network.grid, network.decoder.blocks[0].heads
    full = full + positions(grid, full.shape[2]).to(x.dtype)
    out, shift, scale = blocks(decoder, full, c, heads, places=places_of(network.encoder))
    return image_of(linear(decoder, "head", modulated(out, shift, scale)), grid, network.encoder.patch), tokens


def generate_by_split(w: State, network, x: Tensor, t: Tensor, y: Tensor, split) -> tuple[Tensor, Tensor]:
    """Return the same for a `SplitDiT`: its first blocks see the visible tokens, the others see all."""
    c, everything = condition(w, t, y, x.dtype), embed(w, network, x)
    seen, places = everything, places_of(network)
    seen_places = places
    if split is not None:
        seen = torch.stack([row[ids] for row, ids in zip(everything, split[0])])
        seen_places = None if places is None else places[split[0]]
    tokens, *_ = blocks(w, seen, c, network.heads, 0, network.split, seen_places)
    full = tokens
    if split is not None:
        base = everything
        if network.hidden_tokens == "zeros":
            base = positions(network.grid, network.width).to(x.dtype).expand_as(everything)
        full = torch.stack([row.index_put((ids,), encoded) for row, ids, encoded in zip(base, split[0], tokens)])
    out, shift, scale = blocks(w, full, c, network.heads, network.split, places=places)
    return image_of(linear(w, "head", modulated(out, shift, scale)), network.grid, network.patch), tokens


def image_of(out: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Return the image of output tokens."""
    out = out.reshape(len(out), *grid, patch, patch, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(len(out), -1, grid[0] * patch, grid[1] * patch)


def project(w: State, tokens: Tensor) -> Tensor:
    """Return the features of iBOT's head before its last layer."""
    hidden = gelu(linear(w, "fc1", tokens))
    return linear(w, "fc3", gelu(linear(w, "fc2", hidden)))


def logits(w: State, features: Tensor) -> Tensor:
    """Return the output of iBOT's last layer: unit features times unit prototypes."""
    unit = features / features.norm(dim=-1, keepdim=True)
    weight = w["prototypes.weight"]
    return unit @ (weight / weight.norm(dim=-1, keepdim=True)).T
