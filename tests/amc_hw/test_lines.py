"""What results say as text, where it depends on more than one number."""

from __future__ import annotations

from typing import Any

from amc_hw import lines


def budget(result: dict[str, Any], *, method: str = "ddpg", episodes: int = 400) -> list[str]:
    return list(lines._budget(result, method=method, episodes=episodes, slack=0.02))


def test_more_episodes_are_not_advised_where_the_method_ended_by_itself() -> None:
    result = {"budget": ("latency_ratio", 0.6), "budget_used": 0.8, "found_by": "method", "episodes": 16}
    (line,) = budget(result, episodes=30)
    assert line.endswith("80% used; more --episodes may find a wider policy")
    (line,) = budget(result, episodes=200)
    assert line.endswith("80% used")


def test_a_uniform_policy_is_a_surprise_to_other_methods_alone() -> None:
    result = {"budget": None, "found_by": "uniform"}
    assert budget(result, method="uniform") == []
    (line,) = budget(result)
    assert line.endswith("the best uniform policy: the method found none better")
    (line,) = budget(result | {"over": 1.0214})
    assert line.endswith("the best uniform policy: the method's better ones were over the budget, by 2.1% or more")
