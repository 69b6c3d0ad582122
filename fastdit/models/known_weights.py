"""List the published weights that fastdit knows by name, and find verified ones in their folder.

Each entry says where its publishers have the files, under which license, and which flags fit. A size and a SHA-256 are
listed only if at least two independent public projects pin the same ones. Files without a listed sum are verified by
their content: see `weight_content`. `fastdit-data weights` downloads and verifies.
"""

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdit.errors import UserError
from fastdit.files import sha256_of, write_text

FOLDER = "models"  # default folder of all weights, each in a folder of its name
RECORD = "verified.json"  # what was verified, beside the files


@dataclass(frozen=True)
class WeightFile:
    """Describe one published file.

    Args:
        name: its name in our folder.
        addresses: where it is published, the first that is tried first.
        size: bytes; None if no two sources agree on a number.
        sha256: the checksum; None if none is published.
        about: bytes by a count of its tensors, where `size` is None.
    """

    name: str
    addresses: tuple[str, ...]
    size: int | None = None
    sha256: str | None = None
    about: int | None = None

    @property
    def bytes(self) -> int | None:
        """Return the size, or the estimate of it; None if neither is known."""
        return self.size or self.about


@dataclass(frozen=True)
class Network:
    """Describe the DiT that weights belong to: 4 latent channels, patch 2, 1000 classes and the null class.

    Args:
        size: its name in `dit.SIZES`.
        latents: side of its latents; pixels are 8 times as many.
        outputs: `ddpm`, noise and a learned variance; `sit`, SiT's convention of flow matching (twice the outputs in
            the file, half of them unused); `repa`, REPA's convention.
        layout: `original`, one .pt, or `diffusers`, a folder.
    """

    size: Literal["S", "B", "L", "XL"] = "XL"
    latents: int = 32
    outputs: Literal["ddpm", "sit", "repa"] = "ddpm"
    layout: Literal["original", "diffusers"] = "original"


@dataclass(frozen=True)
class KnownWeights:
    """Describe published weights.

    Args:
        title: what they are.
        license: terms of the project that publishes them.
        home: that project's page.
        kind: what they are for.
        files: the files; the largest is the first.
        network: the network of `kind` "network".
        subfolder: folder in the publisher's folder that holds the files, for a user who has the whole.
        flags: training flags under which they load with --init_from, for `kind` "network".
    """

    title: str
    license: str
    home: str
    kind: Literal["network", "autoencoder", "inception", "reference"]
    files: tuple[WeightFile, ...]
    network: Network | None = None
    subfolder: str = ""
    flags: str = ""

    def path_in(self, folder: Path) -> Path:
        """Return what other commands take: the only file in `folder`, or the folder itself if there are several."""
        return folder / self.files[0].name if len(self.files) == 1 else folder

    @property
    def bytes(self) -> int | None:
        """Return the size of all files, at least about; None if it is not known."""
        sizes = [file.bytes for file in self.files]
        return None if None in sizes else sum(sizes)


_HUGGING_FACE = "https://huggingface.co"
_NON_COMMERCIAL = "CC BY-NC 4.0"


def _dit(pixels: int, **checked) -> KnownWeights:
    """Return the original DiT-XL/2 of `pixels`; checked: size and sum of its file, or an estimate."""
    address = f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{pixels}x{pixels}.pt"
    return KnownWeights(
        title=f"DiT-XL/2, ImageNet {pixels}x{pixels}, the original file",
        license=_NON_COMMERCIAL,
        home="https://github.com/facebookresearch/DiT",
        kind="network",
        files=(WeightFile(f"DiT-XL-2-{pixels}x{pixels}.pt", (address,), **checked),),
        network=Network("XL", pixels // 8, "ddpm"),
        flags=_flags("XL", pixels),
    )


def _dit_of_diffusers(pixels: int) -> KnownWeights:
    """Return the same weights as diffusers has them, with an embedder in every block."""
    home = f"{_HUGGING_FACE}/facebook/DiT-XL-2-{pixels}"
    base = f"{home}/resolve/main/transformer"
    return KnownWeights(
        title=f"DiT-XL/2, ImageNet {pixels}x{pixels}, diffusers' transformer folder",
        license=_NON_COMMERCIAL,
        home=home,
        kind="network",
        files=(
            WeightFile("diffusion_pytorch_model.bin", (f"{base}/diffusion_pytorch_model.bin",), about=2_999_500_000),
            WeightFile("config.json", (f"{base}/config.json",), about=1_000),
        ),
        network=Network("XL", pixels // 8, "ddpm", "diffusers"),
        subfolder="transformer",
        flags=_flags("XL", pixels),
    )


def _sit(size: str, *mirrors: str, **checked) -> KnownWeights:
    """Return a SiT of 256 pixels; mirrors: other addresses of its file."""
    name = f"SiT-{size}-2-256.pt"
    address = f"{_HUGGING_FACE}/nyu-visionx/SiT-collections/resolve/main/{name}"
    return KnownWeights(
        title=f"SiT-{size}/2, ImageNet 256x256",
        license="MIT",
        home="https://github.com/willisma/SiT",
        kind="network",
        files=(WeightFile(name, (address, *mirrors), **checked),),
        network=Network(size, 32, "sit"),
        flags=_flags(size, 256, "sit"),
    )


def _flags(size: str, pixels: int, convention: str | None = None) -> str:
    """Return the flags to train on; convention: that of flow matching, or None for DDPM."""
    flags = f"--preset imagenet256 --model.size {size}"
    if pixels != 256:
        flags += f" --data.size {pixels // 8}"
    if convention:
        flags += f" --noise.name flow --noise.flow.convention {convention} --noise.flow.law uniform"
    return flags


def _vae(decoder: str, revision: str, sha256: str) -> KnownWeights:
    """Return the VAE of Stable Diffusion with a decoder that was tuned further; both decoders have one encoder."""
    home = f"{_HUGGING_FACE}/stabilityai/sd-vae-ft-{decoder}"
    base, weights = f"{home}/resolve/{revision}", "diffusion_pytorch_model.safetensors"
    config_sum = "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"
    return KnownWeights(
        title=f"autoencoder of all DiT and SiT weights here, decoder ft-{decoder.upper()}",
        license="MIT",
        home=home,
        kind="autoencoder",
        files=(
            WeightFile(weights, (f"{base}/{weights}",), 334_643_276, sha256),
            WeightFile("config.json", (f"{base}/config.json",), 547, config_sum),
        ),
    )


def _adm_batch(pixels: int, name: str, **checked) -> KnownWeights:
    """Return a reference batch of ADM's evaluation suite."""
    base = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
    return KnownWeights(
        title=f"ADM's reference batch, ImageNet {pixels}x{pixels}, for evaluate.py --data",
        license="MIT; ImageNet's terms",
        home="https://github.com/openai/guided-diffusion",
        kind="reference",
        files=(WeightFile(name, (f"{base}/{pixels}/{name}",), **checked),),
    )


KNOWN: dict[str, KnownWeights] = {
    "dit-xl-2-256": _dit(
        256, size=2_700_611_775, sha256="9ec1876e4c03471bca126663a30e2d1b20610b6d2f87850a39a36f25cc685521"
    ),
    "dit-xl-2-512": _dit(512, about=2_704_150_000),
    "dit-xl-2-256-diffusers": _dit_of_diffusers(256),
    "dit-xl-2-512-diffusers": _dit_of_diffusers(512),
    "sit-s-2-256": _sit("S", about=131_890_000),
    "sit-b-2-256": _sit("B", about=522_100_000),
    "sit-xl-2-256": _sit(
        "XL",
        "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
        "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
        sha256="e645b5cd82d1d645cfd9b7c96041b56b2a0aa61faed90c0869e79be02ab55aca",
        about=2_700_600_000,
    ),
    "repa-sit-xl-2-256": KnownWeights(
        title="SiT-XL/2 with REPA, 4M steps, ImageNet 256x256",
        license="MIT",
        home="https://github.com/sihyun-yu/REPA",
        kind="network",
        files=(
            WeightFile(
                "REPA-SiT-XL-2-256.pt",
                (
                    "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt"
                    "?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0",
                ),
                about=2_733_000_000,
            ),
        ),
        network=Network("XL", 32, "repa"),
        # REPA guides all channels (samplers.py), where the preset guides three.
        flags=f"{_flags('XL', 256, 'repa')} --sample.guided_channels null",
    ),
    "sd-vae-ft-ema": _vae(
        "ema",
        "f04b2c4b98319346dad8c65879f680b1997b204a",
        "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
    ),
    "sd-vae-ft-mse": _vae(
        "mse",
        "31f26fdeee1355a5c34592e401dd41e45d25a493",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    "inception-2015": KnownWeights(
        title="Inception network of 2015, which defines FID, for evaluate.py --features inception",
        license="Apache-2.0",
        home="https://github.com/toshas/torch-fidelity",
        kind="inception",
        files=(
            WeightFile(
                "weights-inception-2015-12-05-6726825d.pth",
                (
                    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                    "weights-inception-2015-12-05-6726825d.pth",
                ),
                95_628_359,
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            ),
        ),
    ),
    "adm-imagenet256": _adm_batch(
        256,
        "VIRTUAL_imagenet256_labeled.npz",
        size=2_037_122_530,
        sha256="b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
    ),
    "adm-imagenet512": _adm_batch(512, "VIRTUAL_imagenet512.npz"),
}


def find_known(name: str) -> KnownWeights:
    """Return the weights of that name. Raises UserError that lists the names if there are none."""
    if name in KNOWN:
        return KNOWN[name]
    near = difflib.get_close_matches(name, KNOWN, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{name}: no weights of that name; {hint}fastdit-data weights knows {', '.join(KNOWN)}")


def verified_weights(name: str, folder: str | Path | None = None) -> Path:
    """Return the path of known weights that `fastdit-data weights` has verified: one file, or a folder of several.

    Nothing is downloaded or written. A file that was changed since is compared again, by its SHA-256.

    folder: where they are; None: models/NAME.

    Raises UserError, with the command to run, for an unknown name and for weights that are missing, not verified or
    changed.
    """
    known = find_known(name)
    place = Path(folder or Path(FOLDER) / name)
    remedy = f"run: fastdit-data weights {name}" + (f" --out {folder}" if folder else "")
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        entries = dict(record["files"]) if record["name"] == name else {}
        stamps = {file.name: _stamp_of(entries[file.name]) for file in known.files}
    except FileNotFoundError:
        raise UserError(f"{place}: holds no verified weights; {remedy}") from None
    except (KeyError, TypeError, ValueError, OSError):
        raise UserError(f"{place / RECORD}: does not say that {name} is verified; {remedy}") from None
    for file, (sha256, stamp) in stamps.items():
        path = place / file
        if not path.is_file():
            raise UserError(f"{path}: no such file any more; {remedy}")
        if _stamp(path) != stamp and sha256_of(path) != sha256:
            raise UserError(f"{path}: is not the file that was verified; {remedy}")
    return known.path_in(place)


def record_verified(name: str, place: Path, sums: dict[str, str]) -> None:
    """Write down that the files in `place` were verified, with their SHA-256 sums by file name."""
    files = {
        file: {"sha256": sha256, "bytes": _stamp(place / file)[0], "mtime_ns": _stamp(place / file)[1]}
        for file, sha256 in sums.items()
    }
    write_text(place / RECORD, json.dumps({"name": name, "files": files}, indent=1) + "\n")


def _stamp(path: Path) -> tuple[int, int]:
    """Return size and time of the last change of a file, which differ after it is written again."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _stamp_of(entry: dict) -> tuple[str, tuple[int, int]]:
    """Return SHA-256 and stamp of a file in the record. Raises KeyError or TypeError for anything else."""
    return str(entry["sha256"]), (int(entry["bytes"]), int(entry["mtime_ns"]))
