"""Pixel correlation: activation maps spread to places that look alike. Wang et al., SEAM, arXiv:2004.04581; as L2G
(arXiv:2204.03206) uses it, on the last map."""

import torch
from torch import Tensor, nn

#: columns of the affinity held at a time: of a picture of 1000 x 750 pixels the whole of it is 138 million numbers
COLUMNS = 4096
EPSILON = 1e-5


class PixelCorrelation(nn.Module):
    """Every place of a map becomes a weighted mean of all places, by how alike their features are.

    Args:
        in_channels: of the features that places are compared by.
        channels: that they are compared in.
    """

    def __init__(self, in_channels: int, channels: int = 192):
        super().__init__()
        self.f9 = nn.Conv2d(in_channels, channels, 1, bias=False)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """x: (B, C, h, w), what is spread. features: (B, in_channels, h, w). Returns (B, C, h, w).

        Raises ValueError where the two are of different sizes.
        """
        if x.shape[2:] != features.shape[2:]:
            raise ValueError(
                f"the map is {tuple(x.shape[2:])} and the features are {tuple(features.shape[2:])}; "
                "resize the features to the map's (height, width)"
            )
        return propagate(x.flatten(2), self.f9(features).flatten(2)).view_as(x)


def propagate(x: Tensor, q: Tensor) -> Tensor:
    """``x A`` with ``A = relu(q^T q)`` of q over its norm, each of A's columns divided by its sum (+ 1e-5).

    Args:
        x: (B, C, N). q: (B, K, N), of N places.
    """
    q = q / (q.norm(dim=1, keepdim=True) + EPSILON)
    parts = []
    for columns in q.split(COLUMNS, dim=2):
        affinity = torch.relu(q.transpose(1, 2) @ columns)  # (B, N, n)
        parts.append(x @ (affinity / (affinity.sum(1, keepdim=True) + EPSILON)))
    return torch.cat(parts, 2)
