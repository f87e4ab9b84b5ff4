"""Shapes and loads for the planners: fixed ones, and a Hypothesis strategy over many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from planners import Shape


@dataclass(frozen=True, kw_only=True)
class Case:
    """A load, [layers, experts] in tokens, and the shape to plan it for."""

    load: np.ndarray
    shape: Shape
    kind: str

    @property
    def tied(self) -> bool:
        """Whether replicas of different experts may weigh the same, so that the order taken changes the balance."""
        return self.kind == "ties"


README = Case(
    load=np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    ),
    shape=Shape(experts=12, slots=16, groups=4, nodes=2, ranks=8),
    kind="random",
)
"""The example in the README of DeepSeek's EPLB."""

README_PHY2LOG = np.array(
    [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
)
"""The map printed there. In the first layer its seventh rank is the busiest: 90 + 132 / 2 = 156 of 129.125."""


def load_of(kind: str, layers: int, experts: int, seed: int) -> np.ndarray:
    """[layers, experts] tokens, int64, of one kind of skew; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    if kind == "zero":
        return np.zeros((layers, experts), dtype=np.int64)
    if kind == "equal":
        return np.full((layers, experts), int(rng.integers(1, 1000)))
    if kind == "one-hot":
        load = np.zeros((layers, experts), dtype=np.int64)
        load[np.arange(layers), rng.integers(0, experts, layers)] = 1000
        return load
    if kind == "ties":
        return rng.integers(0, 4, (layers, experts)) * 60
    if kind == "zipf":
        ranked = 1e6 / np.arange(1, experts + 1) ** rng.uniform(0.5, 2.0)
        return np.array([rng.permutation(ranked) for _ in range(layers)]).astype(np.int64)
    assert kind == "random", kind
    # From so wide a range that no two replicas weigh the same by accident.
    return rng.integers(0, 1_000_000, (layers, experts))


KINDS = ("zero", "equal", "one-hot", "ties", "zipf", "random")


@st.composite
def planning(draw: st.DrawFn) -> Case:
    """A load and a shape that every planner must take; hierarchical about every other time."""
    nodes = draw(st.sampled_from((1, 2, 3, 4)), label="nodes")
    ranks = nodes * draw(st.integers(1, 4), label="ranks per node")
    if draw(st.booleans(), label="hierarchical"):
        groups = nodes * draw(st.integers(1, 3), label="groups per node")
    else:
        groups = draw(st.sampled_from((1, 2, 3, 5, 8)), label="groups")
    experts = groups * draw(st.integers(1, 5), label="experts per group")
    least = -(-experts // ranks)
    slots = ranks * draw(st.integers(least, least + 3), label="slots per rank")
    kind = draw(st.sampled_from(KINDS), label="kind of load")
    layers, seed = draw(st.integers(1, 3), label="layers"), draw(st.integers(0, 2**16), label="seed")
    shape = Shape(experts=experts, slots=slots, groups=groups, nodes=nodes, ranks=ranks)
    return Case(load=load_of(kind, layers, experts, seed), shape=shape, kind=kind)


def random_cases(count: int) -> list[Case]:
    """Shapes and loads by chance, the same for the same count, with more ranks and experts than Hypothesis likes."""
    rng = np.random.default_rng(240)
    cases = []
    for seed in range(count):
        nodes = int(rng.integers(1, 5))
        ranks = nodes * int(rng.integers(1, 9))
        groups = int(rng.choice([nodes, 2 * nodes, 1, 5]))
        experts = groups * int(rng.integers(2, 13))
        slots = ranks * (-(-experts // ranks) + int(rng.integers(0, 4)))
        kind = str(rng.choice(KINDS))
        shape = Shape(experts=experts, slots=slots, groups=groups, nodes=nodes, ranks=ranks)
        cases.append(Case(load=load_of(kind, 1, experts, seed), shape=shape, kind=kind))
    return cases


def fixed_cases() -> list[Case]:
    """The README's example and every kind of load on a few shapes, for what runs again for every mutant."""
    shapes = (
        Shape(experts=16, slots=20, groups=1, nodes=1, ranks=4),
        Shape(experts=24, slots=32, groups=6, nodes=2, ranks=8),
        Shape(experts=8, slots=8, groups=4, nodes=2, ranks=4),
    )
    return [README] + [
        Case(load=load_of(kind, 3, shape.experts, seed), shape=shape, kind=kind)
        for seed, shape in enumerate(shapes)
        for kind in KINDS
    ]
