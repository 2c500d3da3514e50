"""Cost models against hand-computed tiny networks; completions against brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from amc_hw.errors import BudgetError, UserError
from amc_hw.graph import LayerGraph, build_graph, width_grid
from amc_hw.min_sum import MinSum, Sum
from amc_hw.models.load import load_model
from amc_hw.resources import (
    Budget,
    Completer,
    CostModel,
    Grids,
    SumTerm,
    Term,
    budget_from,
    choose_width,
    feasible_widths,
    free_width,
    keeps,
    latency_model,
    macs_model,
    params_model,
    require_feasible,
    snap,
)
from profilers.ops import OpGraph, OpSpec, fuse_adds


def tiny_graph() -> LayerGraph:
    """conv 3->8 on 8x8, conv 8->16 to 4x4, linear 16->10: two groups, 8 and 16."""
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return build_graph(net.eval(), (3, 8, 8))


GRIDS = ((2, 4, 8), (4, 8, 16))


class FakePredictor:
    """An additive staircase, counted per call, that fuses adds where asked."""

    constant_ms = 0.25
    error_pct: float | None = 2.0

    def __init__(self, *, fuse: bool = True) -> None:
        self.fuse, self.asked = fuse, []

    def lower(self, op_graph: OpGraph) -> OpGraph:
        return fuse_adds(op_graph) if self.fuse else op_graph

    def stated_error_pct(self, anchor: str) -> float | None:
        return self.error_pct

    def op_ms(self, ops) -> np.ndarray:
        self.asked.append(list(ops))
        return np.array([self.one(op) for op in ops])

    @staticmethod
    def one(op: OpSpec) -> float:
        slow = 1.5 if op.out_channels % 3 == 1 else 1.0  # not monotone
        extras = 0.01 * op.fused_add + 0.002 * (op.activation != "none")
        return 1e-6 * op.macs * slow + 1e-3 + extras

    def network_ms(self, op_graph: OpGraph) -> float:
        return self.constant_ms + sum(self.one(node.op) for node in self.lower(op_graph).nodes)


def test_macs_and_params_by_hand():
    graph = tiny_graph()
    macs, params = macs_model(graph, GRIDS), params_model(graph, GRIDS)
    assert macs.unit == "MACs" and params.unit == "params" and macs.noise == params.noise == 0
    assert macs.full_cost == 27 * 8 * 64 + 72 * 16 * 16 + 160
    assert macs.cost((2, 8)) == 27 * 2 * 64 + 18 * 8 * 16 + 80
    assert params.cost((2, 8)) == 28 * 2 + 19 * 8 + 9 * 10
    # conv1 and conv2 belong to the last group that touches them: conv1 to group 0, conv2 and linear to group 1
    assert macs.group_costs().tolist() == [27 * 8 * 64, 72 * 16 * 16 + 160]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1?width=0.25"])
def test_models_agree_with_the_graph_at_random_widths(name):
    loaded = load_model(name)
    graph = build_graph(loaded.module.eval(), loaded.input_shape)
    grids = [width_grid(group.width) for group in graph.groups]
    predictor = FakePredictor()
    macs, params = macs_model(graph, grids), params_model(graph, grids)
    latency = latency_model(graph, grids, predictor)
    rng = np.random.default_rng(0)
    for _ in range(20):
        widths = [int(rng.choice(grid)) for grid in grids]
        assert macs.cost(widths) == graph.macs(widths)
        assert params.cost(widths) == graph.op_graph(widths).params
        assert latency.cost(widths) == pytest.approx(predictor.network_ms(graph.op_graph(widths)), rel=1e-12)
    for model in (macs, params, latency):
        assert model.group_costs().sum() == pytest.approx(model.full_cost - model.constant)
        assert Completer(model).exact
    (asked,) = predictor.asked
    assert len(set(asked)) == len(asked)
    assert any(op.fused_add for op in asked) == (name == "resnet20")
    assert latency.noise == pytest.approx(0.02)


def test_unknown_prediction_is_refused():
    class Unknown(FakePredictor):
        def op_ms(self, ops):
            return np.full(len(ops), np.nan)

    with pytest.raises(ValueError, match="finite"):
        latency_model(tiny_graph(), GRIDS, Unknown())


def test_an_operator_of_too_many_widths_is_named(monkeypatch):
    monkeypatch.setattr("amc_hw.resources.MAX_TERM_ENTRIES", 8)
    with pytest.raises(UserError, match="operator 2 has 9 combinations of widths .at most 8.: use a larger"):
        macs_model(tiny_graph(), GRIDS)


def test_widths_off_the_grid_and_bad_grids():
    model = macs_model(tiny_graph(), GRIDS)
    with pytest.raises(UserError, match="width 3 for group 0: choose one of 2, 4, 8"):
        model.cost((3, 4))
    with pytest.raises(UserError, match="1 widths given"):
        model.cost((8,))
    with pytest.raises(ValueError, match="full width 8"):
        macs_model(tiny_graph(), ((2, 4), (4, 16)))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -0.5])
def test_budget_validation(value):
    model = macs_model(tiny_graph(), GRIDS)
    for given_as in ("ratio", "absolute"):
        with pytest.raises(UserError, match=str(value).replace("+", "")) as caught:
            budget_from(model, **{given_as: value})
        assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="1.01"):
        budget_from(model, ratio=1.01)
    with pytest.raises(UserError, match="either"):
        budget_from(model)
    assert budget_from(model, ratio=0.5).limit == model.full_cost / 2
    assert budget_from(model, ratio=1.0).limit == model.full_cost
    assert budget_from(model, absolute=1000).limit == 1000


def test_infeasible_budget_names_the_smallest_that_is_not():
    model = macs_model(tiny_graph(), GRIDS)
    completer = Completer(model)
    least = model.cost((2, 4))  # 4648
    with pytest.raises(BudgetError, match="cannot be met: the smallest reachable is 4,648 MACs") as caught:
        require_feasible(completer, budget_from(model, absolute=least - 1))
    assert caught.value.exit_code == 4
    ratio = float(str(caught.value).split("a ratio of ")[1].split(";")[0])
    require_feasible(completer, budget_from(model, ratio=ratio))
    require_feasible(completer, budget_from(model, absolute=least))
    assert completer.lower_bound <= least


@st.composite
def random_models(draw) -> CostModel:
    """Costs that are not monotone over chains, trees, cycles or all pairs of 2 to 5 groups."""
    count = draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = [int(size) for size in rng.integers(1, 5, count)]
    chain = [(i, i + 1) for i in range(count - 1)]
    kinds = {
        "chain": chain,
        "tree": [(int(rng.integers(i)), i) for i in range(1, count)],
        "star, hub last": [(i, count - 1) for i in range(count - 1)],
        "cycle": chain + ([(0, count - 1)] if count > 2 else []),
        "all pairs": list(itertools.combinations(range(count), 2)),
        "single and triple": [(0,), *([(0, 1, 2)] if count > 2 else [])],
    }
    scopes = kinds[draw(st.sampled_from(sorted(kinds)))]
    grids = tuple(tuple(8 * (i + 1) for i in range(size)) for size in sizes)
    terms: tuple[Term | SumTerm, ...] = tuple(
        Term(scope, rng.normal(3, 2, [sizes[g] for g in scope])) for scope in scopes
    )
    terms += tuple(random_sum(grids, rng) for _ in range(draw(st.integers(0, 4))))
    return CostModel(grids, terms, float(rng.normal()), "ms", draw(st.sampled_from([0.0, 0.05])))


def random_sum(grids: Grids, rng: np.random.Generator) -> SumTerm:
    """A cost of one or two sums of some of the groups, each as often as a flattening repeats it."""
    axes = []
    for _ in range(int(rng.integers(1, 3))):
        groups = sorted(rng.choice(len(grids), int(rng.integers(1, len(grids) + 1)), replace=False).tolist())
        parts = tuple((group, int(rng.integers(1, 4)) * np.array(grids[group])) for group in groups)
        sums = {int(sum(each)) for each in itertools.product(*(amounts for _, amounts in parts))}
        axes.append(Sum(parts, np.array(sorted(sums))))
    return SumTerm(tuple(axes), rng.normal(3, 2, [len(axis.levels) for axis in axes]))


def brute_force(model: CostModel, decided: tuple[int, ...]) -> float:
    left = itertools.product(*model.grids[len(decided) :])
    return min(model.cost((*decided, *rest)) for rest in left)


@settings(max_examples=150)
@given(model=random_models(), data=st.data())
def test_completions_equal_brute_force(model, data):
    """Exact with tables for all steps, and with elimination step by step where those tables are too large."""
    widest = max(term.values.size for term in model.terms)
    for completer in (Completer(model), Completer(model, max_entries=widest)):
        decided: tuple[int, ...] = ()
        for grid in model.grids:
            expected = [brute_force(model, (*decided, width)) for width in grid]
            offers = completer.offers(decided)
            if completer.exact:
                np.testing.assert_allclose(offers, expected, rtol=1e-9, atol=1e-9)
            else:
                assert (offers >= np.array(expected) - 1e-9).all()
            cost, widths = completer.best(decided)
            assert widths[: len(decided)] == decided
            assert cost == pytest.approx(min(offers)) and cost == model.cost(widths)
            decided += (data.draw(st.sampled_from(grid)),)
        assert completer.best(decided)[1] == decided
        assert completer.lower_bound <= brute_force(model, ()) + 1e-9


def test_step_by_step_where_the_hub_is_decided_last():
    """Reverse elimination of a star's hub would need one axis per leaf; leaves first needs two."""
    rng = np.random.default_rng(0)
    grids = ((8, 16, 24, 32),) * 5
    model = CostModel(grids, tuple(Term((i, 4), rng.normal(size=(4, 4))) for i in range(4)), 0.0, "ms")
    completer = Completer(model, max_entries=16)
    assert completer.exact
    np.testing.assert_allclose(completer.offers((8,)), [brute_force(model, (8, width)) for width in grids[1]])
    assert completer.best((8,))[0] == pytest.approx(brute_force(model, (8,)))


@settings(max_examples=100)
@given(model=random_models(), seed=st.integers(0, 2**32 - 1))
def test_a_term_is_its_table_and_its_table_of_some_positions_alone(model, seed):
    rng = np.random.default_rng(seed)
    allowed = [sorted(rng.choice(len(grid), rng.integers(1, len(grid) + 1), replace=False)) for grid in model.grids]
    for term in model.terms:
        table = term.table(allowed)
        for places in itertools.product(*(range(len(allowed[group])) for group in term.groups)):
            at = [0] * len(model.grids)
            for group, place in zip(term.groups, places, strict=True):
                at[group] = int(allowed[group][place])
            assert term.at(at) == table[places]
    some = MinSum([term.factor(allowed) for term in model.terms], [len(each) for each in allowed])
    least = min(model.cost_at(at) for at in itertools.product(*allowed)) - model.constant
    known = float(min(some.offers(())))  # of many sums over many groups a table is too large: then what descent finds
    assert known == pytest.approx(least) if some.exact else known >= least - 1e-9


class Dense(nn.Module):
    """Every layer reads all that were before it, through a bottleneck."""

    def __init__(self, layers: int, growth: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        widths = [64 + growth * index for index in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.narrow = nn.ModuleList(nn.Conv2d(width, 128, 1) for width in widths)
        self.wide = nn.ModuleList(nn.Conv2d(128, growth, 3, padding=1) for _ in widths)
        self.head = nn.Linear((widths[-1] + growth) * 4, 10)

    def forward(self, x):
        found = [self.stem(x)]
        for norm, narrow, wide in zip(self.norms, self.narrow, self.wide, strict=True):
            found.append(wide(narrow(norm(torch.cat(found, 1)).relu()).relu()))
        return self.head(nn.functional.adaptive_avg_pool2d(torch.cat(found, 1), 2).flatten(1))


def test_layers_that_read_many_others_are_counted_over_sums():
    graph = build_graph(Dense(10).eval(), (3, 8, 8))
    grids = [width_grid(group.width) for group in graph.groups]
    assert math.prod(len(grids[group]) for group in graph.layer("head").groups) > 10**8
    macs, params, latency = (
        macs_model(graph, grids),
        params_model(graph, grids),
        latency_model(graph, grids, FakePredictor()),
    )
    rng = np.random.default_rng(0)
    for _ in range(20):
        widths = [int(rng.choice(grid)) for grid in grids]
        assert macs.cost(widths) == graph.macs(widths) and params.cost(widths) == graph.params(widths)
        assert latency.cost(widths) == pytest.approx(FakePredictor().network_ms(graph.op_graph(widths)), rel=1e-12)
    for model in (macs, params, latency):
        assert model.group_costs().sum() == pytest.approx(model.full_cost - model.constant)
        completer, budget = Completer(model), budget_from(model, ratio=0.5)
        assert completer.exact
        decided: list[int] = []
        for _ in grids:
            decided.append(choose_width(completer, decided, float(rng.uniform(0.2, 1.0)), budget))
        assert model.cost(decided) <= budget.limit * (1 + 1e-9)


def test_a_layer_that_reads_and_writes_one_group_counts_it_once():
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(32, 16, 1)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.a(x)
            return self.head(x + self.b(torch.cat([x, x.relu()], 1)))

    graph = build_graph(Stream().eval(), (3, 4, 4))
    assert graph.full_widths == (16,)
    model = macs_model(graph, [(4, 8, 16)])
    for width in (4, 8, 16):
        assert model.cost((width,)) == graph.macs((width,))
    assert Completer(model).best() == (graph.macs((4,)), (4,))


@settings(max_examples=150)
@given(
    model=random_models(),
    share=st.floats(0, 1),
    fractions=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    descend=st.booleans(),
)
def test_no_choice_ever_exceeds_the_budget(model, share, fractions, descend):
    limit = 1 if descend else 10**6
    model = replace(model, constant=model.constant + 1 - Completer(model, max_entries=limit).best()[0])  # least: 1
    completer = Completer(model, max_entries=limit)
    budget = Budget(1 + share * max(model.full_cost - 1, 0), share, "a share")
    decided: list[int] = []
    for fraction in fractions[: len(model.grids)]:
        offered = feasible_widths(completer, decided, budget)
        decided.append(choose_width(completer, decided, fraction, budget))
        assert decided[-1] in offered
    assert keeps(model.cost(decided), budget.limit)


def test_only_what_is_proven_is_said_to_be_impossible():
    """Costs of pairs, cheap where the two differ: around a triangle not all can, so the bound lies below what is."""
    differ = np.array([[1.0, 0.0], [0.0, 1.0]])
    terms = tuple(Term(pair, differ) for pair in ((0, 1), (0, 2), (1, 2)))
    model = CostModel(((1, 2),) * 3, terms, 1.0, "ms")
    between = Budget(1.5, 1.5, "1.5 ms")  # above the bound of 1, below the 2 that can be reached
    with pytest.raises(BudgetError, match="1.5 ms cannot be met: the smallest reachable is 2 ms"):
        require_feasible(Completer(model), between)
    descending = Completer(model, max_entries=1)
    assert not descending.exact and descending.lower_bound == 1.0
    with pytest.raises(
        BudgetError, match="1.5 ms is met by no known widths: the smallest known to be reachable is 2 ms"
    ):
        require_feasible(descending, between)
    with pytest.raises(BudgetError, match="0.5 ms cannot be met: the smallest reachable is 2 ms"):
        require_feasible(descending, Budget(0.5, 0.5, "0.5 ms"))


def test_what_descent_offers_does_not_depend_on_earlier_questions():
    rng = np.random.default_rng(2)
    grids = ((8, 16, 24),) * 4
    terms = tuple(Term(pair, rng.normal(size=(3, 3))) for pair in itertools.combinations(range(4), 2))
    model = CostModel(grids, terms, 0.0, "ms")
    asked = Completer(model, max_entries=1)
    assert not asked.exact
    for decided in ((), (8,), (24, 8), (24, 8, 16)):
        np.testing.assert_array_equal(asked.offers(decided), Completer(model, max_entries=1).offers(decided))


def staircase(noise: float = 0.0) -> CostModel:
    """One group that matters; 16 costs as much as 8, 24 a little more, and 10 ms stand beside it."""
    terms = (Term((0,), np.array([1.0, 1.0, 1.04, 2.0])), Term((1,), np.array([10.0, 20.0])))
    return CostModel(((8, 16, 24, 32), (8, 16)), terms, 0.0, "ms", noise)


def test_free_channels():
    exact, noisy = Completer(staircase()), Completer(staircase(noise=0.05))
    widths = [8, 16, 24, 32]
    assert free_width(exact, (), 8, widths) == 16
    assert free_width(exact, (), 24, widths) == 24
    assert free_width(noisy, (), 8, widths) == 24  # within 5% of this group's 1 ms, ...
    assert free_width(noisy, (), 24, widths) == 24  # ... not within 5% of the network's 11 ms
    assert free_width(exact, (), 8, [8, 24, 32]) == 8  # only what is offered
    assert choose_width(exact, (), 0.25) == 16


def test_a_larger_width_that_is_faster_replaces_a_smaller():
    model = CostModel(((8, 16, 24),), (Term((0,), np.array([3.0, 1.0, 2.0])),), 0.0, "ms")
    completer = Completer(model)
    assert feasible_widths(completer, (), Budget(2.0, 2.0, "2 ms")) == [16, 24]
    assert choose_width(completer, (), 0.2, Budget(2.0, 2.0, "2 ms")) == 16
    assert choose_width(completer, (), 0.2) == 24  # 8 costs most of all
    assert choose_width(completer, (), 0.6) == 16


def test_snap_takes_the_nearest_and_of_two_the_larger():
    assert snap(0.5, 32, [8, 24]) == 24
    assert snap(0.45, 32, [8, 24]) == 8
    assert snap(5.0, 32, [8, 24]) == 24
    with pytest.raises(ValueError):
        snap(math.nan, 32, [8])


def test_term_is_checked():
    for groups, shape in (((1, 0), (2, 2)), ((0, 1), (2,)), ((), ())):
        with pytest.raises(ValueError, match="ascending"):
            Term(groups, np.zeros(shape))
