"""Measure whether samples look like their classes, by nearest neighbors in pixels, for small data sets."""

import torch


def knn_labels(queries: torch.Tensor, known: torch.Tensor, labels: torch.Tensor, k: int = 5) -> torch.Tensor:
    """Return the label of each query, int64 (n,): the majority among its `k` nearest known images in raw pixels.

    queries: (n, ...). known: (m, ...) of the same scale and shape. labels: class labels of `known`, (m,) int64. A tie
    goes to the smallest label. The method is ours.
    """
    distance = torch.cdist(queries.flatten(1).float(), known.flatten(1).float())
    votes = labels[distance.topk(k, largest=False).indices]
    classes = int(labels.max()) + 1
    return torch.nn.functional.one_hot(votes, classes).sum(1).argmax(1)


def class_agreement(
    samples: torch.Tensor, asked: torch.Tensor, known: torch.Tensor, labels: torch.Tensor, k: int = 5
) -> float:
    """Return the share, from 0 to 1, of `samples` that `knn_labels` assigns to the classes that they were sampled for.

    samples: (n, ...). asked: these class labels, (n,) int64. known, labels, k: as in `knn_labels`.
    """
    return (knn_labels(samples, known, labels, k) == asked).float().mean().item()
