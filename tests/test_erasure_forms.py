"""The closed forms of concept erasure on toys, against float64 least squares and constrained solves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffaccel.edits.concepts import ErasureError
from diffaccel.erasure.closed_forms import (
    Columns,
    Hardened,
    LowRank,
    augment,
    centres,
    compose,
    compress,
    harden,
    hidden,
    influential,
    mean_square,
    null_edit,
    null_space,
    recover,
    recovered_error,
    relative_change,
    residuals,
    ridge,
    ridge_for_strength,
    strengths,
)
from diffaccel.erasure.problem import Problem, Scale
from diffaccel.erasure.settings import SPEED
from diffaccel.erasure.solvers import SOLVERS

WIDTH = 64


def rows(seed: int, count: int, width: int = WIDTH) -> Tensor:
    """Columns that share a large mean, as text embeddings do."""
    maker = torch.Generator().manual_seed(seed)
    shared = 2 * torch.randn(width, 1, generator=maker, dtype=torch.float64)
    return shared + torch.randn(width, count, generator=maker, dtype=torch.float64)


def toy(targets: int = 4, keeps: int = 20, invariants: int = 3, width: int = WIDTH) -> Columns:
    every = rows(0, 2 * targets + keeps + invariants, width)
    parts = every.split([targets, targets, keeps, invariants], 1)
    return Columns(
        parts[0],
        parts[1],
        torch.linspace(0.5, 2, targets, dtype=torch.float64),
        torch.arange(targets) // 2,
        parts[2],
        parts[3],
    )


def weight(seed: int = 7, out: int = 48, width: int = WIDTH) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(edit: LowRank) -> Tensor:
    """M = I + L R."""
    return torch.eye(edit.left.shape[0], dtype=torch.float64) + edit.left @ edit.right


# --- ridge ---


def lstsq_ridge(w: Tensor, columns: Columns, lam: float, keep_weight: float) -> Tensor:
    """Minimise the UCE objective as one tall least squares problem, row by row of W'."""
    root = columns.weights.sqrt()
    inputs = [columns.target * root, columns.keep * keep_weight**0.5, lam**0.5 * torch.eye(w.shape[1]).double()]
    outputs = [w @ (columns.anchor * root), w @ columns.keep * keep_weight**0.5, lam**0.5 * w]
    return torch.linalg.lstsq(torch.cat(inputs, 1).T, torch.cat(outputs, 1).T, driver="gelsd").solution.T


@pytest.mark.parametrize("targets", [1, 4, 63, 64, 90])
@pytest.mark.parametrize(("lam", "keep_weight"), [(0.5, 1.0), (3.0, 0.25), (0.1, 0.0)])
def test_ridge_is_the_least_squares_solution(targets: int, lam: float, keep_weight: float) -> None:
    columns, w = toy(targets), weight()
    expected = lstsq_ridge(w, columns, lam, keep_weight)
    torch.testing.assert_close(w @ dense(ridge(columns, lam, keep_weight)), expected, rtol=1e-10, atol=1e-10)


def test_ridge_has_the_rank_of_its_targets_and_serves_every_weight() -> None:
    columns = toy(4)
    edit = ridge(columns, 0.5, 1.0)
    assert int(torch.linalg.matrix_rank(dense(edit) - torch.eye(WIDTH).double())) == 4
    for seed in (1, 2):
        w = weight(seed)
        torch.testing.assert_close(w @ dense(edit), lstsq_ridge(w, columns, 0.5, 1.0), rtol=1e-10, atol=1e-10)


def test_anchors_equal_to_targets_change_nothing() -> None:
    columns = toy()
    same = replace(columns, anchor=columns.target)
    assert float(dense(ridge(same, 0.1, 1.0)).sub(torch.eye(WIDTH).double()).abs().max()) == 0
    space = null_space(columns.keep, columns.invariants, threshold=0.1, relative=False)
    assert float(null_edit(same, space, 1.0).change(columns.target).abs().max()) == 0


def permuted(columns: Columns, order: Tensor) -> Columns:
    return replace(
        columns,
        target=columns.target[:, order],
        anchor=columns.anchor[:, order],
        weights=columns.weights[order],
        owner=columns.owner[order],
    )


@pytest.mark.parametrize("form", ["ridge", "null space"])
def test_the_order_of_targets_does_not_matter(form: str) -> None:
    columns = toy(5)
    space = null_space(columns.keep, columns.invariants, threshold=0.5, relative=False)

    def solve(which: Columns) -> Tensor:
        return dense(ridge(which, 0.5, 1.0) if form == "ridge" else null_edit(which, space, 0.5))

    torch.testing.assert_close(
        solve(permuted(columns, torch.tensor([3, 1, 4, 0, 2]))), solve(columns), rtol=1e-11, atol=1e-11
    )


def test_scaling_weights_and_ridge_together_changes_nothing() -> None:
    columns = toy()
    scaled = replace(columns, weights=7 * columns.weights)
    torch.testing.assert_close(dense(ridge(scaled, 3.5, 7.0)), dense(ridge(columns, 0.5, 1.0)), rtol=1e-11, atol=1e-11)
    space = null_space(columns.keep, columns.invariants, threshold=0.5, relative=False)
    torch.testing.assert_close(
        dense(null_edit(scaled, space, 3.5)), dense(null_edit(columns, space, 0.5)), rtol=1e-11, atol=1e-11
    )


def test_a_relative_ridge_follows_the_scale_of_the_embeddings() -> None:
    columns = toy()
    large = replace(columns, target=30 * columns.target, anchor=30 * columns.anchor, keep=30 * columns.keep)
    maps = [dense(ridge(one, 0.01 * mean_square(one, 1.0), 1.0)) for one in (columns, large)]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-10, atol=1e-10)


# --- null space ---


def constrained(w: Tensor, columns: Columns, basis: Tensor, lam: float) -> Tensor:
    """SPEED's problem for one W by its KKT system: D = X U^T, sum_i w_i ||X c_i - W (c*_i - c_i)||^2 + lam ||X||^2, X U^T C2 = 0."""
    c, c2 = basis.T @ columns.target, basis.T @ columns.invariants
    goal = w @ (columns.anchor - columns.target)
    normal = (c * columns.weights) @ c.T + lam * torch.eye(len(c)).double()
    size = c2.shape[1]
    system = torch.cat([torch.cat([normal, c2], 1), torch.cat([c2.T, torch.zeros(size, size, dtype=torch.float64)], 1)])
    right = torch.cat([(c * columns.weights) @ goal.T, torch.zeros(size, len(w), dtype=torch.float64)])
    return torch.linalg.solve(system, right)[: len(c)].T @ basis.T


@pytest.mark.parametrize(("targets", "keeps"), [(4, 0), (4, 10), (4, 20), (4, 200), (64, 20), (90, 20)])
def test_null_edit_solves_the_constrained_problem(targets: int, keeps: int) -> None:
    columns, w, threshold = toy(targets, keeps), weight(), 0.9
    moment = columns.keep @ columns.keep.T / max(keeps, 1)
    values, vectors = torch.linalg.eigh(moment)
    basis = vectors[:, values < threshold]
    space = null_space(columns.keep, columns.invariants, threshold=threshold, relative=False)
    assert space.free == basis.shape[1] - 3
    edit = null_edit(columns, space, 0.3)
    torch.testing.assert_close(w @ edit.left @ edit.right, constrained(w, columns, basis, 0.3), rtol=1e-8, atol=1e-9)


def test_invariants_do_not_move_and_exact_null_directions_keep_everything() -> None:
    columns = toy(4, 20)
    space = null_space(columns.keep, columns.invariants, threshold=1e-9, relative=True)
    assert space.free == WIDTH - 20 - 3
    edit = null_edit(columns, space, 1e-3)
    for still in (columns.invariants, columns.keep):
        assert float(edit.change(still).abs().max()) < 1e-12
    assert float(strengths(columns, edit).min()) > 0.99
    assert int(torch.linalg.matrix_rank(edit.left @ edit.right)) == 4


def test_relative_thresholds_and_counts_of_directions() -> None:
    columns = toy(4, 200)
    values = torch.linalg.eigvalsh(columns.keep @ columns.keep.T / 200)
    none = columns.invariants[:, :0]
    for share in (0.001, 0.01):
        space = null_space(columns.keep, none, threshold=share, relative=True)
        assert space.free == int((values < share * values.max()).sum())
        assert space.largest == pytest.approx(float(values.max()))
        scaled = null_space(50 * columns.keep, none, threshold=share, relative=True)
        torch.testing.assert_close(scaled.project(columns.target), space.project(columns.target), rtol=1e-9, atol=1e-9)
    assert null_space(columns.keep, none, threshold=1, relative=False, directions=17).free == 17
    assert null_space(columns.keep, none, threshold=1e-30, relative=False).free == 0


def test_dependent_invariants_take_one_direction_only() -> None:
    columns = toy(4, 10)
    doubled = torch.cat([columns.invariants, columns.invariants[:, :1] * 2, columns.keep[:, :1]], 1)
    one = null_space(columns.keep, columns.invariants, threshold=1e-9, relative=True)
    two = null_space(columns.keep, doubled, threshold=1e-9, relative=True)
    assert one.free == two.free


def test_strength_of_a_single_concept_is_the_published_fraction() -> None:
    columns = toy(1)
    space = null_space(columns.keep, columns.invariants, threshold=0.5, relative=False)
    seen = float(space.project(columns.target).square().sum())
    edit = null_edit(replace(columns, weights=torch.ones(1).double()), space, 2.0)
    assert float(strengths(columns, edit)) == pytest.approx(seen / (seen + 2.0), rel=1e-12)
    assert float(residuals(columns, edit)) == pytest.approx(1 - seen / (seen + 2.0), rel=1e-9)


def test_a_requested_strength_is_met_by_the_largest_ridge() -> None:
    columns = toy(6)
    space = null_space(columns.keep, columns.invariants, threshold=1e-6, relative=True)
    found = ridge_for_strength(columns, space, 0.8)
    assert found is not None
    assert float(strengths(columns, null_edit(columns, space, found)).min()) == pytest.approx(0.8, abs=1e-6)
    assert float(strengths(columns, null_edit(columns, space, 1.01 * found)).min()) < 0.8


@pytest.mark.parametrize("rounding", [0.0, 1e-7, -3e-7], ids=["exact", "single precision", "other encoder batch"])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_what_lies_within_the_kept_rows_cannot_be_erased(scale: float, rounding: float) -> None:
    """Neither the unit of the embeddings nor the last bits of an encoder make a concept visible to a null space."""
    columns = replace(toy(2), owner=torch.arange(2))
    spoken = columns.target[:, :1] + rounding * columns.target[:, :1].norm() * rows(9, 1) / WIDTH**0.5
    hidden_one = replace(columns, keep=scale * torch.cat([columns.keep, spoken], 1))
    hidden_one = replace(hidden_one, target=scale * columns.target, anchor=scale * columns.anchor)
    space = null_space(hidden_one.keep, columns.invariants, threshold=1e-9, relative=True)
    assert hidden(hidden_one, space) == [0]
    assert ridge_for_strength(hidden_one, space, 0.5) is None
    left_alone = strengths(hidden_one, null_edit(hidden_one, space, 1e-12 * scale**2))
    assert abs(float(left_alone[0])) < 1e-6
    assert float(left_alone[1]) > 0.9
    problem = Problem(None, hidden_one, None, (), Scale.of(hidden_one, ()), "sequence", ("ring", "star"))
    settings = {"threshold": 1e-9, "threshold_relative": True, "prior_filter": False, "augment": 0}
    for given in ({"ridge": 1.0}, {"strength": 0.5}):
        with pytest.raises(
            ErasureError, match=r"^'ring' lies within what is preserved of the sequence text, so it cannot"
        ):
            SOLVERS[SPEED](problem, SPEED(**settings, **given))


def test_a_faint_concept_is_erased_as_strongly_as_the_others() -> None:
    columns = replace(toy(2), owner=torch.arange(2))
    faint = replace(columns, target=columns.target * torch.tensor([1.0, 1e-4]).double())
    space = null_space(columns.keep, columns.invariants, threshold=1e-9, relative=True)
    found = ridge_for_strength(faint, space, 0.9)
    assert found is not None
    assert float(strengths(faint, null_edit(faint, space, found)).min()) == pytest.approx(0.9, abs=1e-4)


def test_rounding_is_no_direction_to_preserve() -> None:
    """An absolute threshold below what rounding makes of a zero eigenvalue does not count that rounding as content."""
    columns = toy(4, 20)
    many = columns.keep @ rows(4, 20).T @ rows(5, 300)  # 300 rows of 20 dimensions
    noisy = many + 1e-9 * many.norm() / many.numel() ** 0.5 * rows(6, 300)
    for keep in (many, noisy):
        space = null_space(keep, columns.invariants, threshold=1e-30, relative=False)
        assert space.free == WIDTH - 20 - 3


def test_no_error_of_an_attack_on_what_no_projection_reads() -> None:
    columns = toy(2)
    edit = ridge(columns, 0.5, 1.0)
    blind = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    assert recovered_error(edit, blind, columns.target, columns.target) == 0


# --- prior filter and augmentation ---


@pytest.mark.parametrize("targets", [3, 64, 80])
def test_prior_filter_keeps_what_a_trial_edit_disturbs_more_than_average(targets: int) -> None:
    columns = toy(targets, 30)
    layers = [weight(1, 20), weight(2, 50)]
    c, goal = columns.target, columns.anchor
    scores = []
    for column in columns.keep.T:
        total = 0.0
        for w in layers:
            trial = (w @ goal @ c.T - w @ c @ c.T) @ torch.linalg.inv(torch.eye(WIDTH).double() + c @ c.T)
            total += float((trial @ column).square().sum())
        scores.append(total**0.5)
    gram = sum((w.T @ w for w in layers), torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
    expected = torch.tensor(scores) > torch.tensor(scores).mean()
    assert bool(expected.any())
    assert not bool(expected.all())
    assert torch.equal(influential(columns, gram, columns.keep), expected)


def test_augmentation_moves_only_along_the_quietest_directions() -> None:
    columns, w = toy(), weight(3, 100)
    near = augment(columns.keep, w.T @ w, 5, 2, torch.Generator().manual_seed(0))
    assert near.shape == (WIDTH, 5 * columns.keep.shape[1])
    moved = near - columns.keep.repeat_interleave(5, 1)
    _, _, right = torch.linalg.svd(w, full_matrices=True)
    quiet = right[-2:]
    torch.testing.assert_close(quiet.T @ (quiet @ moved), moved, rtol=1e-9, atol=1e-9)
    assert float(moved.norm(dim=0).min()) > 0
    again = augment(columns.keep, w.T @ w, 5, 2, torch.Generator().manual_seed(0))
    assert torch.equal(near, again)


# --- hardening ---


def test_recover_finds_the_best_embedding_of_the_regularised_attack() -> None:
    columns, lam = toy(), 0.1
    layers = [weight(1, 20), weight(2, 70)]
    edit = ridge(columns, 0.5, 1.0)
    edited = [w @ dense(edit) for w in layers]
    inputs = torch.cat([*edited, lam**0.5 * torch.eye(WIDTH).double()])
    outputs = torch.cat([*(w @ columns.target for w in layers), torch.zeros(WIDTH, 4).double()])
    expected = torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution
    gram = sum((w.T @ w for w in layers), torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
    found = recover(edit, gram, columns.target, lam)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    got = torch.cat([w @ found for w in edited]) - torch.cat([w @ columns.target for w in layers])
    share = float(got.norm() / torch.cat([w @ columns.target for w in layers]).norm())
    assert recovered_error(edit, gram, found, columns.target) == pytest.approx(share, rel=1e-8)


def setting(joint: bool, rounds: int, budget: float = 1e9) -> tuple[Columns, Tensor, Hardened]:
    columns = toy(2, 20)
    gram = sum((weight(s, 50).T @ weight(s, 50) for s in range(3)), torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
    done = harden(
        columns,
        lambda which: ridge(which, 0.1, 1.0),
        gram,
        columns,
        rounds=rounds,
        ridge=1e-3,
        largest_norm=budget,
        joint=joint,
    )
    return columns, gram, done


@pytest.mark.parametrize("joint", [True, False])
def test_one_round_makes_the_attack_fail(joint: bool) -> None:
    columns, gram, done = setting(joint, 1)
    before = recovered_error(
        ridge(columns, 0.1, 1.0), gram, recover(ridge(columns, 0.1, 1.0), gram, columns.target, 1e-3), columns.target
    )
    after = recovered_error(done.map, gram, recover(done.map, gram, columns.target, 1e-3), columns.target)
    assert before < 0.1
    assert after > 3 * before
    assert done.added == 2


def test_a_joint_round_keeps_the_targets_erased_better_than_a_chained_one() -> None:
    columns, _, joint = setting(True, 1)
    _, _, chained = setting(False, 1)
    assert float(residuals(columns, joint.map).max()) < float(residuals(columns, chained.map).max())


def test_no_round_is_the_plain_ridge_and_a_small_budget_ends_it() -> None:
    columns, _, done = setting(True, 0)
    assert torch.equal(dense(done.map), dense(ridge(columns, 0.1, 1.0)))
    _, _, stopped = setting(True, 3, budget=1e-6)
    assert stopped.added == 0
    assert len(stopped.ratios) == 1
    assert torch.equal(dense(stopped.map), dense(ridge(columns, 0.1, 1.0)))


def test_composition_is_the_product() -> None:
    first, second = ridge(toy(2), 0.5, 1.0), ridge(replace(toy(3), target=rows(5, 3)), 0.5, 1.0)
    torch.testing.assert_close(dense(compose(first, second)), dense(first) @ dense(second), rtol=1e-12, atol=1e-12)


# --- helpers ---


def test_compression_drops_what_is_not_there() -> None:
    edit = ridge(toy(4), 0.5, 1.0)
    assert compress(edit) is edit
    doubled = LowRank(torch.cat([edit.left, edit.left], 1), torch.cat([edit.right, 2 * edit.right]))
    small = compress(doubled)
    assert small.left.shape == (WIDTH, 4)
    torch.testing.assert_close(dense(small), dense(doubled), rtol=1e-10, atol=1e-10)
    many = ridge(toy(100), 0.5, 1.0)
    assert compress(many).left.shape[1] <= WIDTH
    torch.testing.assert_close(dense(compress(many)), dense(many), rtol=1e-7, atol=1e-7)


def test_relative_change_measures_columns() -> None:
    edit, columns = ridge(toy(), 0.5, 1.0), toy()
    expected = [float((dense(edit) @ c - c).norm() / c.norm()) for c in columns.keep.T]
    assert relative_change(columns.keep, edit).tolist() == pytest.approx(expected)


def test_centres_find_clusters_whatever_their_order() -> None:
    means = 10 * rows(3, 3)
    points = means.repeat_interleave(8, 1) + 0.01 * rows(4, 24)
    for order in ([0, 1, 2], [2, 0, 1]):
        shuffled = torch.cat([points[:, 8 * i : 8 * i + 8] for i in order], 1)
        found = centres(shuffled, 3)
        exact = torch.stack([points[:, 8 * i : 8 * i + 8].mean(1) for i in range(3)], 1)
        assert any(torch.allclose(found[:, list(p)], exact) for p in itertools.permutations(range(3)))


def test_centres_of_equal_rows_are_one() -> None:
    assert centres(rows(1, 1).expand(-1, 9), 3).shape[1] == 1
