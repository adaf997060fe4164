"""Closed forms of concept erasure: float64 tensors in, a low-rank map out.

A projection W (d_out, d) reads text rows c (d). Every form here changes it into W (I + L R) with L (d, n) and R (n, d),
the same for all projections of a route, so that c acts like c + L (R c).

- ridge: Gandikota et al., "Unified Concept Editing in Diffusion Models" (arXiv 2308.14761).
- hardening: Gong et al., "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models" (RECE, 2407.12383).
- null space: Li et al., "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models" (2503.07392).
- context refinement: Lu et al., "MACE: Mass Concept Erasure in Diffusion Models" (2403.06135), which is the ridge form
  on the words around a concept.

Where we deviate: SPEED filters what to preserve in every layer by itself. We measure ||W D c|| over all projections of
the route together, ||W D c||^2 = (D c)^T S (D c) with S = sum of W^T W, so that all of them share one map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows come from encoders of single precision: a share of a row's length below this is rounding, which differs from one
# processor to the next. No rank, threshold or division may rest on it.
ROUNDING = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Columns:
    """What an edit is solved from; all float64, one row of text per column.

    Attributes:
        target: (d, n) to erase.
        anchor: (d, n) what each of them shall act like.
        weights: (n,) positive.
        owner: (n,) number of the concept of each column.
        keep: (d, m) to preserve.
        invariants: (d, q) start token and centres of the empty prompt's rows.
        keep_weights: (m,) of a ridge regression, against each other; None is 1 each.
    """

    target: Tensor
    anchor: Tensor
    weights: Tensor
    owner: Tensor
    keep: Tensor
    invariants: Tensor
    keep_weights: Tensor | None = None

    @property
    def weighted_keep(self) -> Tensor:
        """`keep` with each column times the root of its weight; its square is what a regression preserves."""
        return self.keep if self.keep_weights is None else self.keep * self.keep_weights.sqrt()


@dataclass(frozen=True)
class LowRank:
    """The map c -> c + left (right c), with left (d, n) and right (n, d)."""

    left: Tensor
    right: Tensor

    def change(self, columns: Tensor) -> Tensor:
        """What the map adds to columns (d, m)."""
        return self.left @ (self.right @ columns)


# --- ridge regression ---


def ridge(columns: Columns, ridge: float, keep_weight: float) -> LowRank:
    """The minimiser of sum_i w_i ||M c_i - c*_i||^2 + keep_weight sum_j v_j ||M k_j - k_j||^2 + ridge ||M - I||^2.

    L = C* - C, R = (diag(w)^-1 + C^T Y)^-1 Y^T with Y = B^-1 C and B = ridge I + keep_weight K diag(v) K^T: an n x n system
    behind the Cholesky factor of B. With more targets than dimensions, R = diag(w) C^T (B + C diag(w) C^T)^-1.

    Raises:
        torch.linalg.LinAlgError: ridge so small that the system is singular in float64.
    """
    target, weights = columns.target, columns.weights
    kept = columns.weighted_keep
    base = keep_weight * (kept @ kept.T)
    base.diagonal().add_(ridge)
    left = columns.anchor - target
    if target.shape[1] < target.shape[0]:
        solved = torch.cholesky_solve(target, torch.linalg.cholesky(base))
        small = target.T @ solved
        small = (small + small.T) / 2
        small.diagonal().add_(1 / weights)
        return LowRank(left, torch.cholesky_solve(solved.T, torch.linalg.cholesky(small)))
    whole = base + (target * weights) @ target.T
    right = torch.cholesky_solve(target * weights, torch.linalg.cholesky((whole + whole.T) / 2)).T
    return LowRank(left, right)


def mean_square(columns: Columns, keep_weight: float) -> float:
    """Mean diagonal of the weighted sum of squares of all columns: the scale on which a relative ridge is stated."""
    total = (columns.weights * columns.target.square()).sum() + keep_weight * columns.weighted_keep.square().sum()
    return float(total) / columns.target.shape[0]


# --- hardening ---


@dataclass(frozen=True)
class Hardened:
    """Outcome of `harden`: the map, the rows that were added as targets, and norm ratios of every round's attack."""

    map: LowRank
    columns: Columns
    added: int
    ratios: tuple[float, ...]
    errors: tuple[float, ...]


def recover(edit: LowRank, gram: Tensor, columns: Tensor, ridge: float) -> Tensor:
    """Rows that make the edited projections act as the original ones do on `columns` (d, a).

    c_adv = (sum W'^T W' + ridge I)^-1 (sum W'^T W) c with W' = W M: M^T S M and M^T S, where S = `gram` = sum W^T W.
    """
    whole = torch.eye(gram.shape[0], dtype=gram.dtype) + edit.left @ edit.right
    product = whole.T @ gram
    normal = product @ whole
    normal = (normal + normal.T) / 2
    normal.diagonal().add_(ridge)
    return torch.cholesky_solve(product @ columns, torch.linalg.cholesky(normal))


def recovered_error(edit: LowRank, gram: Tensor, found: Tensor, columns: Tensor) -> float:
    """||W' c_adv - W c|| / ||W c|| over all projections and columns: 0 is a perfect attack, also where W c is nothing."""
    difference = found + edit.change(found) - columns
    share = _energy(gram, difference) / _energy(gram, columns) if _energy(gram, columns) > 0 else 0.0
    return math.sqrt(share)


def harden(
    columns: Columns,
    solve: Callable[[Columns], LowRank],
    gram: Tensor,
    attacked: Columns,
    *,
    rounds: int,
    ridge: float,
    largest_norm: float,
    joint: bool,
) -> Hardened:
    """Attack the edit in closed form, erase what the attack finds, and repeat.

    Args:
        solve: the ridge edit.
        attacked: the rows an attacker wants back; found embeddings get their anchors, weights and owners.
        ridge: the attack's regulariser; larger keeps found embeddings short and limits the damage.
        largest_norm: found embeddings longer than this are not realistic and are left out; a round that finds no other
            ends the hardening.
        joint: solve again from the original weights for everything (True), or edit the edited weights (as published).
    """
    edit = solve(columns)
    every, added, ratios, errors = columns, 0, [], []
    for _ in range(rounds):
        found = recover(edit, gram, attacked.target, ridge)
        ratios.append(float((found.norm(dim=0) / attacked.target.norm(dim=0)).median()))
        errors.append(recovered_error(edit, gram, found, attacked.target))
        near = found.norm(dim=0) <= largest_norm
        if not bool(near.any()):
            break
        added += int(near.sum())
        more = replace(
            attacked,
            target=found[:, near],
            anchor=attacked.anchor[:, near],
            weights=attacked.weights[near],
            owner=attacked.owner[near],
        )
        every = join(every, more)
        edit = solve(every) if joint else compose(edit, solve(more))
    return Hardened(edit, every, added, tuple(ratios), tuple(errors))


def join(first: Columns, second: Columns) -> Columns:
    """Targets of both; what to preserve is the first's."""
    return replace(
        first,
        target=torch.cat([first.target, second.target], 1),
        anchor=torch.cat([first.anchor, second.anchor], 1),
        weights=torch.cat([first.weights, second.weights]),
        owner=torch.cat([first.owner, second.owner]),
    )


def compose(first: LowRank, second: LowRank) -> LowRank:
    """W -> W (I + L1 R1) (I + L2 R2), as one map."""
    left = torch.cat([first.left, second.left + first.left @ (first.right @ second.left)], 1)
    return LowRank(left, torch.cat([first.right, second.right]))


# --- null space ---


def influential(columns: Columns, gram: Tensor, candidates: Tensor) -> Tensor:
    """Which candidates (d, m) a trial edit disturbs more than their average: SPEED's prior filter, a mask (m,).

    The trial edit is D = (C* - C) C^T (I + C C^T)^-1; its effect on c is ||W D c|| over all projections.
    """
    if candidates.shape[1] == 0:
        return torch.zeros(0, dtype=torch.bool)
    target = columns.target
    left = columns.anchor - target
    if target.shape[1] < target.shape[0]:
        inner = target.T @ target
        inner.diagonal().add_(1.0)
        right = torch.cholesky_solve(target.T @ candidates, torch.linalg.cholesky(inner))
        change = left @ right
    else:  # the same by the other side: C^T (I + C C^T)^-1 = (I + C^T C)^-1 C^T
        outer = target @ target.T
        outer.diagonal().add_(1.0)
        change = left @ target.T @ torch.cholesky_solve(candidates, torch.linalg.cholesky(outer))
    effect = (gram @ change * change).sum(0).clamp(min=0).sqrt()
    above: Tensor = effect > effect.mean()
    return above


def augment(keep: Tensor, gram: Tensor, copies: int, directions: int, generator: torch.Generator) -> Tensor:
    """Neighbours (d, m * copies) of `keep` (d, m) along which the projections change least: SPEED's directed noise.

    c + P e with Gaussian e and P the projector on the `directions` eigenvectors of S = sum W^T W with the smallest
    eigenvalues.
    """
    _, vectors = torch.linalg.eigh(gram)  # ascending
    quiet = vectors[:, :directions]
    noise = torch.randn(directions, keep.shape[1] * copies, generator=generator, dtype=torch.float64)
    near: Tensor = keep.repeat_interleave(copies, 1) + quiet @ noise  # P e has this distribution
    return near


@dataclass(frozen=True)
class NullSpace:
    """Directions an edit may use: everything orthogonal to `taken` (d, r), whose columns are orthonormal.

    Attributes:
        taken: directions with energy in what is preserved, then the invariants.
        free: how many directions are left.
        largest: largest eigenvalue of the mean second moment of what is preserved.
    """

    taken: Tensor
    free: int
    largest: float

    def project(self, columns: Tensor) -> Tensor:
        """The part of columns (d, n) inside the null space; projected twice, and zero where only rounding is left."""
        once = columns - self.taken @ (self.taken.T @ columns)
        twice = once - self.taken @ (self.taken.T @ once)
        seen: Tensor = twice * (twice.norm(dim=0) > ROUNDING * columns.norm(dim=0))
        return seen


def null_space(
    keep: Tensor, invariants: Tensor, *, threshold: float, relative: bool, directions: int | None = None
) -> NullSpace:
    """Directions in which the mean second moment of `keep` (d, m) stays below a threshold, without the invariants.

    Args:
        threshold: eigenvalues below it count as null; a share of the largest one if `relative`.
        directions: keep this many directions with the smallest eigenvalues instead.
    """
    size, count = keep.shape
    if count == 0:
        return _without(torch.zeros(size, 0, dtype=torch.float64), invariants, 0.0)
    values, vectors = _spectrum(keep)
    largest = max(float(values.max()), 0.0)
    present = values > _noise(keep, largest)  # directions that carry nothing at all are free anyway
    if directions is None:
        strong = present & (values >= (threshold * largest if relative else threshold))
    else:
        strong = present & (torch.arange(len(values)) < size - directions)
    return _without(vectors[:, strong], invariants, largest)


def _spectrum(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors of K K^T / m, by the smaller side; eigenvalues of zero may be absent."""
    size, count = keep.shape
    if count >= size:
        moment = keep @ keep.T / count
        values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
        return values.flip(0), vectors.flip(1)
    inner = keep.T @ keep / count
    values, small = torch.linalg.eigh((inner + inner.T) / 2)
    values, small = values.flip(0), small.flip(1)
    present = values > _noise(keep, float(values[0]))
    values = values[present]
    vectors, signs = torch.linalg.qr(keep @ small[:, present])  # orthogonal already; QR takes the rounding away
    return values, vectors * signs.diagonal().sign()


def _noise(keep: Tensor, largest: float) -> float:
    """What rounding alone can make of an eigenvalue of K K^T."""
    return max(keep.shape) * torch.finfo(keep.dtype).eps * largest


def _without(taken: Tensor, invariants: Tensor, largest: float) -> NullSpace:
    space = NullSpace(taken, taken.shape[0] - taken.shape[1], largest)
    for column in invariants.T:  # few; one by one, so that dependent ones add nothing
        left = space.project(column[:, None])
        if float(left.norm()) > 0:
            space = NullSpace(torch.cat([space.taken, left / left.norm()], 1), space.free - 1, largest)
    return space


def null_edit(columns: Columns, space: NullSpace, ridge: float) -> LowRank:
    """The minimiser of sum_i w_i ||W c_i + D P c_i - W c*_i||^2 + ridge ||D P||^2 with D C2 = 0 (SPEED's exact solution).

    L = C* - C, R = (c^T c + ridge diag(w)^-1)^-1 c^T with c = P C, P the projector on the null space.
    """
    seen, left = space.project(columns.target), columns.anchor - columns.target
    if seen.shape[1] < seen.shape[0]:
        inner = seen.T @ seen
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(ridge / columns.weights)
        return LowRank(left, torch.cholesky_solve(seen.T, torch.linalg.cholesky(inner)))
    weighted = seen * columns.weights  # the same by the other side: diag(w) c^T (c diag(w) c^T + ridge I)^-1
    outer = weighted @ seen.T
    outer = (outer + outer.T) / 2
    outer.diagonal().add_(ridge)
    return LowRank(left, torch.cholesky_solve(weighted, torch.linalg.cholesky(outer)).T)


def ridge_for_strength(columns: Columns, space: NullSpace, strength: float) -> float | None:
    """The largest ridge at which every concept is erased by at least `strength`; None if no ridge gives as much."""
    seen = space.project(columns.target).square().sum(0)
    if hidden(columns, space):
        return None
    largest, smallest = float(seen.max()), float(seen[seen > 0].min())
    low = math.log(max(1e-10 * smallest, 1e-12 * largest))  # below, the system behind it is singular in float64
    high = math.log(1e6 * largest)

    def weakest(exponent: float) -> float:
        return float(strengths(columns, null_edit(columns, space, math.exp(exponent))).min())

    if weakest(low) < strength:
        return None
    for _ in range(48):
        middle = (low + high) / 2
        low, high = (middle, high) if weakest(middle) >= strength else (low, middle)
    return math.exp(low)


def hidden(columns: Columns, space: NullSpace) -> list[int]:
    """Concepts of which the null space sees nothing but rounding: they lie within what is preserved."""
    seen, moves = space.project(columns.target).any(0), _moving(columns)
    mine = [(concept, columns.owner == concept) for concept in sorted(set(columns.owner.tolist()))]
    return [concept for concept, own in mine if bool((own & moves).any()) and not bool((own & moves & seen).any())]


# --- what an edit does ---


def strengths(columns: Columns, edit: LowRank) -> Tensor:
    """By how much each concept moves towards its anchor: 0 not at all, 1 all the way; (concepts,).

    The mean over its columns of <c* - c, D c> / ||c* - c||^2. For a single column of a null-space edit this is SPEED's
    ||P c||^2 / (||P c||^2 + ridge).
    """
    wanted, moves = columns.anchor - columns.target, _moving(columns)
    share = (wanted * edit.change(columns.target)).sum(0) / wanted.square().sum(0)
    return _by_owner(share, columns.owner, moves, empty=1.0)


def residuals(columns: Columns, edit: LowRank) -> Tensor:
    """How far each concept stays from its anchor, ||c + D c - c*|| / ||c - c*||, mean over its columns; (concepts,)."""
    wanted, moves = columns.anchor - columns.target, _moving(columns)
    share = (wanted - edit.change(columns.target)).norm(dim=0) / wanted.norm(dim=0)
    return _by_owner(share, columns.owner, moves, empty=0.0)


def _moving(columns: Columns) -> Tensor:
    """Columns whose anchor is another row than they are, beyond rounding; a mask (n,)."""
    longest = torch.maximum(columns.target.norm(dim=0), columns.anchor.norm(dim=0))
    moves: Tensor = (columns.anchor - columns.target).norm(dim=0) > ROUNDING * longest
    return moves


def relative_change(columns: Tensor, edit: LowRank) -> Tensor:
    """||D c|| / ||c|| of every column, 0 for an empty one; (m,)."""
    lengths = columns.norm(dim=0)
    share: Tensor = edit.change(columns).norm(dim=0) / torch.where(lengths > 0, lengths, 1.0)
    return share


def compress(edit: LowRank, tolerance: float = 1e-9) -> LowRank:
    """The same map with as few columns as `tolerance` (a share of its largest singular value) allows.

    A map with no more columns than that comes back as it is.
    """
    outer, first = torch.linalg.qr(edit.left)
    inner, second = torch.linalg.qr(edit.right.T)
    left, values, right = torch.linalg.svd(first @ second.T)
    rank = max(1, int((values > tolerance * values.max()).sum()))
    if rank >= edit.left.shape[1]:
        return edit
    root = values[:rank].sqrt()
    return LowRank(outer @ left[:, :rank] * root, (right[:rank] * root[:, None]) @ inner.T)


def _by_owner(share: Tensor, owner: Tensor, counted: Tensor, *, empty: float) -> Tensor:
    found = torch.full((int(owner.max()) + 1,), empty, dtype=torch.float64)
    for concept in sorted(set(owner.tolist())):
        mine = (owner == concept) & counted
        if bool(mine.any()):
            found[concept] = share[mine].mean()
    return found


def _energy(gram: Tensor, columns: Tensor) -> float:
    """sum ||W c||^2 >= 0; what rounding alone can leave of it counts as nothing."""
    found = float((columns * (gram @ columns)).sum())
    noise = len(gram) * torch.finfo(gram.dtype).eps * float(gram.norm() * columns.square().sum())
    return found if found > noise else 0.0


def centres(rows: Tensor, count: int) -> Tensor:
    """k-means centres (d, at most count) of columns (d, m): farthest-point starts, Lloyd steps until nothing moves."""
    chosen = [0]
    distance = (rows - rows[:, :1]).square().sum(0)
    while len(chosen) < count and float(distance.max()) > ROUNDING**2 * float(rows.square().sum(0).max()):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (rows - rows[:, chosen[-1] :][:, :1]).square().sum(0))
    found, label = rows[:, chosen], None
    for _ in range(100):
        new = torch.cdist(rows.T, found.T).argmin(1)
        if label is not None and bool((new == label).all()):
            break
        label = new
        means = [rows[:, label == k].mean(1) if bool((label == k).any()) else found[:, k] for k in range(len(chosen))]
        found = torch.stack(means, 1)
    return found
