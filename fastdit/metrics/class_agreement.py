"""Does a sample look like the class that was asked for? An independent judge for small data sets."""

import torch


def knn_labels(queries: torch.Tensor, known: torch.Tensor, labels: torch.Tensor, k: int = 5) -> torch.Tensor:
    """Label (n,) of each query by majority among its `k` nearest known images in raw pixels (ours).

    queries (n, ...), known (m, ...) of one scale and shape, labels (m,) int64. Ties go to the smallest label.
    """
    distance = torch.cdist(queries.flatten(1).float(), known.flatten(1).float())
    votes = labels[distance.topk(k, largest=False).indices]
    classes = int(labels.max()) + 1
    return torch.nn.functional.one_hot(votes, classes).sum(1).argmax(1)


def class_agreement(
    samples: torch.Tensor, asked: torch.Tensor, known: torch.Tensor, labels: torch.Tensor, k: int = 5
) -> float:
    """Share of `samples` (n, ...) that the k-NN fitted on (known, labels) assigns to the class `asked` (n,)."""
    return (knn_labels(samples, known, labels, k) == asked).float().mean().item()
