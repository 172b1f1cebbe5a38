"""An order of hidden features in which the blocks that write and read them have low rank.

A block of rows keeps what lies in a space of as many dimensions as it has rank. So features whose rows, and whose
columns of the next product, lie near a common space belong into one block: subspace clustering with groups of equal
size. Assigning features and fitting spaces in turn stops at once in high dimensions, since every feature lies nearest
to a space that was fitted to it. Spaces of few dimensions, which grow in small steps, don't know single features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monarch_fx.projection.activation import damped

HALVINGS = 3  # eight blocks; grids of two and four are made of whole ones
STARTS = 2  # the better one is taken
FIRST, LAST, GROWTH = 0.01, 0.09, 1.15  # dimensions of a space, as a share of those that there are
ROUNDS = 6  # at most, before spaces grow
STILL = 0.002  # a share of the features: fewer that change sides are the last ones


def written_features(weight: Tensor, gram: Tensor, gradients: Tensor | None) -> Tensor:
    """The features that a product gives, as rows (out, in) in which squared lengths are what errors cost.

    Args:
        weight: (out, in).
        gram: (in, in), the mean of x x^T; see ``project_on_inputs``.
        gradients: (out, out), the mean of g g^T, or None; see there. A feature's error is weighed with 1 / (G^-1)_ii:
            as if the other features made up for it as well as they can.
    """
    rows = weight.detach().double() @ torch.linalg.cholesky(damped(gram.to(weight.device), weight.shape[1]))
    if gradients is not None:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gradients.to(weight.device), len(weight))))
        rows = rows / inverse.diagonal().sqrt()[:, None]
    return rows.float()


def read_features(weight: Tensor, gram: Tensor, gradients: Tensor | None) -> Tensor:
    """As ``written_features``, of the features that a product sees: (in, out)."""
    identity = torch.eye(len(weight), dtype=gram.dtype, device=weight.device) if gradients is None else gradients
    return written_features(weight.mT, identity, gram)


@torch.no_grad()
def feature_order(products: Sequence[Tensor], halvings: int = HALVINGS) -> Tensor:
    """An order (hidden,) of hidden features, on the CPU: halves, quarters, ... of it are groups.

    Args:
        products: For each product that writes or reads them the features as rows (hidden, n).
        halvings: How often groups are cut in two.
    """
    features = torch.arange(len(products[0]), device="cpu")
    if halvings == 0 or len(features) < 4:
        return features
    first = _half(products).cpu()
    halves = (features[first], features[~first])
    return torch.cat([half[feature_order([rows[half] for rows in products], halvings - 1)] for half in halves])


def _half(products: Sequence[Tensor]) -> Tensor:
    """Which features (hidden,) belong to the first of two groups of equal size."""
    found = [_grown(products, torch.Generator().manual_seed(start)) for start in range(STARTS)]
    return max(found, key=lambda pair: pair[1])[0]


def _grown(products: Sequence[Tensor], random: torch.Generator) -> tuple[Tensor, float]:
    """From one start: the first group, and the energy of all features in the last spaces of their groups."""
    hidden, device = len(products[0]), products[0].device
    size = -(-hidden // 2)
    drawn: dict[str, Any] = {"generator": random, "dtype": products[0].dtype, "device": "cpu"}  # whatever the defaults
    first = _largest(torch.rand(hidden, **drawn).to(device), size)
    spaces = [[rows.new_zeros(rows.shape[1], 0) for rows in products] for _ in range(2)]
    share = FIRST
    while share <= LAST:
        for group in spaces:
            for i, rows in enumerate(products):
                dimensions = max(1, int(share * min(rows.shape[1], size)))
                more = torch.randn(rows.shape[1], dimensions - group[i].shape[1], **drawn)
                group[i] = torch.cat([group[i], more.to(device)], 1)
        for _ in range(ROUNDS):
            kept = [_fit(products, members, group) for members, group in zip((first, ~first), spaces, strict=True)]
            last, first = first, _largest(kept[0] - kept[1], size)
            if float((first != last).float().mean()) < STILL:
                break
        share *= GROWTH
    return first, float(torch.where(first, kept[0], kept[1]).sum())


def _fit(products: Sequence[Tensor], members: Tensor, spaces: list[Tensor]) -> Tensor:
    """Turns the spaces towards the members' leading directions, in place; the energy (hidden,) of all features."""
    kept = products[0].new_zeros(len(members))
    for i, rows in enumerate(products):
        mine = rows[members]
        spaces[i] = torch.linalg.qr(mine.mT @ (mine @ spaces[i])).Q
        kept += (rows @ spaces[i]).square().sum(1)
    return kept


def _largest(values: Tensor, number: int) -> Tensor:
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[values.topk(number).indices] = True
    return mask
