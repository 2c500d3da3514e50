"""Sampled networks: corners reach every pair of groups, random ones stay on the grid and repeat."""

from __future__ import annotations

from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from profilers.sampling import corner_widths, random_widths

GRID = st.lists(st.integers(1, 512), min_size=1, max_size=8, unique=True).map(sorted)
GRIDS = st.lists(GRID, min_size=1, max_size=40)
EIGHTHS = tuple(range(8, 65, 8))


def test_three_groups_take_these_corners() -> None:
    assert set(corner_widths([(1, 2, 9), (1, 5, 9), (1, 9)])) == {
        (1, 1, 1),
        (9, 9, 9),
        (1, 9, 1),  # bit 0 of the group's number, and its complement
        (9, 1, 9),
        (1, 1, 9),  # bit 1
        (9, 9, 1),
    }


def test_one_group_takes_both_ends() -> None:
    assert set(corner_widths([(4, 8, 12)])) == {(4,), (12,)}


@given(grids=GRIDS)
def test_every_pair_of_groups_is_seen_in_all_four_corners(grids: list[list[int]]) -> None:
    sampled = corner_widths(grids)
    for left, right in combinations(range(len(grids)), 2):
        seen = {(widths[left], widths[right]) for widths in sampled}
        ends = [(grids[group][0], grids[group][-1]) for group in (left, right)]
        assert seen == set(product(*ends))


@given(grids=GRIDS)
def test_corners_are_few_and_hold_the_smallest_and_the_unpruned_network(grids: list[list[int]]) -> None:
    sampled = corner_widths(grids)
    assert len(sampled) <= 2 + 2 * max(1, (len(grids) - 1).bit_length())
    assert tuple(grid[0] for grid in grids) in sampled
    assert tuple(grid[-1] for grid in grids) in sampled


@given(grids=GRIDS, count=st.integers(0, 12), seed=st.integers(0, 2**32))
def test_random_widths_lie_on_the_grid(grids: list[list[int]], count: int, seed: int) -> None:
    sampled = random_widths(grids, count, seed=seed)
    assert len(sampled) == count
    for widths in sampled:
        assert len(widths) == len(grids)
        assert all(type(width) is int and width in grid for width, grid in zip(widths, grids, strict=True))


@given(grids=GRIDS, seed=st.integers(0, 2**32), few=st.integers(0, 6), more=st.integers(0, 6))
def test_a_seed_always_gives_the_same_networks_and_more_of_them_go_on(
    grids: list[list[int]], seed: int, few: int, more: int
) -> None:
    assert random_widths(grids, few + more, seed=seed)[:few] == random_widths(grids, few, seed=seed)


def test_seeds_differ() -> None:
    assert len({tuple(random_widths([EIGHTHS] * 6, 5, seed=seed)) for seed in range(10)}) == 10


@given(seed=st.integers(0, 2**32))
def test_the_widths_of_one_network_stay_near_its_scale(seed: int) -> None:
    for widths in random_widths([EIGHTHS] * 12, 20, seed=seed):
        # 0.3 to both sides of the scale, and half a step of the grid to both sides
        assert max(widths) - min(widths) <= (0.6 + 1 / 8) * 64


def test_random_networks_reach_from_small_to_unpruned() -> None:
    sampled = random_widths([EIGHTHS] * 6, 200, seed=0)
    assert {width for widths in sampled for width in widths} == set(EIGHTHS)
    means = [sum(widths) / 6 / 64 for widths in sampled]
    assert min(means) < 0.4 and max(means) > 0.9
    assert len(set(sampled)) > 190


@given(inner=st.sets(st.integers(1, 999), max_size=6), seed=st.integers(0, 2**32))
def test_the_nearest_width_of_an_uneven_grid_is_taken(inner: set[int], seed: int) -> None:
    coarse = (*sorted(inner), 1000)
    asked = random_widths([range(1, 1001)] * 4, 5, seed=seed)  # a grid on which rounding hardly shows
    for fine, found in zip(asked, random_widths([coarse] * 4, 5, seed=seed), strict=True):
        for wanted, width in zip(fine, found, strict=True):
            assert abs(width - wanted) <= min(abs(other - wanted) for other in coarse) + 1


# Widths free of a multiple

FINE = tuple(range(13, 65))


@given(grids=GRIDS, count=st.integers(0, 12), seed=st.integers(0, 2**32))
def test_every_second_network_is_on_the_fine_grid_and_the_others_are_as_without_one(
    grids: list[list[int]], count: int, seed: int
) -> None:
    fine = [range(grid[0], grid[-1] + 1) for grid in grids]
    found = random_widths(grids, count, seed=seed, fine=fine)
    assert found[::2] == random_widths(grids, count, seed=seed)[::2]
    assert found[1::2] == random_widths(fine, count, seed=seed)[1::2]
    assert random_widths(grids, count, seed=seed, fine=()) == random_widths(grids, count, seed=seed)


def test_networks_on_the_fine_grid_leave_the_multiple_and_the_others_keep_it() -> None:
    found = random_widths([EIGHTHS] * 6, 80, seed=0, fine=[FINE] * 6)
    assert all(width % 8 == 0 for widths in found[::2] for width in widths)
    assert all(any(width % 8 for width in widths) for widths in found[1::2])
    assert len({width for widths in found[1::2] for width in widths}) > 40


def test_a_fine_grid_goes_below_the_smallest_multiple() -> None:
    found = random_widths([(16, 24, 32)] * 4, 200, seed=0, fine=[range(10, 33)] * 4)
    assert min(min(widths) for widths in found[1::2]) == 10 and min(min(widths) for widths in found[::2]) == 16
