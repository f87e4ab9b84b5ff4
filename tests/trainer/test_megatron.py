"""megatron-core on the CPU: parallel groups against a formula, and the MoE's router and permutation against numpy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from parallel import Layout, Seen, form_groups
from ranks import run_ranks

ORDER = "tp-cp-ep-dp-pp"
"""megatron-core's own: neighbours in tp are neighbours in rank, pp is the slowest."""


def expected_groups(world: int, layout: Layout) -> dict[str, list[list[int]]]:
    """All groups of a layout: the ranks as a box with a side for each dimension, cut along some of them.

    Experts have a box of their own: the same ranks, cut otherwise within a pipeline stage.
    """
    dense = np.arange(world).reshape(layout.pp, -1, layout.cp, layout.tp)
    expert = np.arange(world).reshape(layout.pp, -1, layout.ep, layout.expert_tp)

    def cut(box: np.ndarray, *along: int) -> list[list[int]]:
        last = np.moveaxis(box, along, range(-len(along), 0))
        size = int(np.prod([box.shape[side] for side in along]))
        return [sorted(group) for group in last.reshape(-1, size).tolist()]

    return {
        "tp": cut(dense, 3), "cp": cut(dense, 2), "dp": cut(dense, 1), "pp": cut(dense, 0),
        "dp-cp": cut(dense, 1, 2), "tp-pp": cut(dense, 0, 3), "tp-cp": cut(dense, 2, 3),
        "expert tp": cut(expert, 3), "ep": cut(expert, 2), "expert dp": cut(expert, 1),
        "expert tp-ep": cut(expert, 2, 3),
    }  # fmt: skip


def check_groups(world: int, layouts: list[Layout], seen: list[list[Seen]]) -> None:
    """See that every rank is in the groups of the formula, and that a reduction reaches just their ranks.

    Raises:
        AssertionError: it is not, with the layout, the group and the rank.
    """
    for number, layout in enumerate(layouts):
        for name, groups in expected_groups(world, layout).items():
            assert sorted(itertools.chain(*groups)) == list(range(world)), "the formula is no partition"
            for rank in range(world):
                (own,) = [group for group in groups if rank in group]
                ranks, total = seen[rank][number][name]
                assert sorted(ranks) == own, f"{layout}: {name} of rank {rank}"
                assert total == sum(2**member for member in own), f"{layout}: reduced over {name}, {rank}"


@pytest.fixture(scope="module")
def layouts(profile: Mapping[str, Any]) -> list[Layout]:
    """Every layout that fits the profile's ranks, of ones and twos, and with expert parallelism of four."""
    world = profile["ranks"]
    return [
        Layout(tp=tp, pp=pp, cp=cp, ep=ep, expert_tp=expert_tp)
        for tp, pp, cp, ep, expert_tp in itertools.product((1, 2), (1, 2), (1, 2), (1, 2, 4), (1, 2))
        if world % (tp * pp * cp) == 0 and world % (expert_tp * ep * pp) == 0 and expert_tp in (1, tp)
    ]


@pytest.mark.usefixtures("preloaded")
def test_groups_are_the_formulas(layouts: list[Layout], profile: Mapping[str, Any]) -> None:
    world = profile["ranks"]
    assert len(layouts) > 20
    seen = run_ranks(form_groups, world, layouts, ORDER, deadline=profile["ranks_deadline"])
    check_groups(world, layouts, seen)

    # One layout is enough to see a fault: two ranks with each other's groups, a reduction that misses one.
    with pytest.raises(AssertionError):
        check_groups(world, layouts, [seen[1], seen[0], *seen[2:]])
    missed = [[{**groups, "tp": (groups["tp"][0], groups["tp"][1] & ~1)} for groups in rank] for rank in seen]
    with pytest.raises(AssertionError, match="reduced over tp"):
        check_groups(world, layouts, missed)


@pytest.mark.usefixtures("preloaded")
def test_groups_in_another_order_are_caught() -> None:
    layout = Layout(cp=2)
    seen = run_ranks(form_groups, 4, [layout], "tp-dp-cp-ep-pp")
    with pytest.raises(AssertionError, match="cp=2: "):
        check_groups(4, [layout], seen)


def test_groups_of_larger_worlds_are_the_formulas(profile: Mapping[str, Any]) -> None:
    """Without processes: the generator that megatron-core makes its groups with, up to 512 ranks."""

    @settings(
        max_examples=profile["examples"], derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(*[st.sampled_from([1, 2, 3, 4, 8]) for _ in range(4)], st.sampled_from([1, 2, 4]))
    def run(tp: int, pp: int, cp: int, dp: int, ep: int) -> None:
        world = tp * pp * cp * dp
        assume(world <= 512 and (cp * dp) % ep == 0)
        expected = expected_groups(world, Layout(tp=tp, pp=pp, cp=cp, ep=ep, expert_tp=tp))
        dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=ORDER)
        for name in ("tp", "pp", "cp", "dp", "dp-cp", "tp-pp", "tp-cp"):
            found = [sorted(group) for group in dense.get_ranks(name)]
            assert sorted(found) == sorted(expected[name]), name
        expert = RankGenerator(tp=tp, ep=ep, dp=world // (tp * ep * pp), pp=pp, cp=1, order=ORDER)
        for name in ("tp", "ep", "dp", "tp-ep"):
            found = [sorted(group) for group in expert.get_ranks(name)]
            assert sorted(found) == sorted(expected["ep" if name == "ep" else f"expert {name}"]), name

    run()


Routing = tuple[np.ndarray, np.ndarray]
"""Probabilities, and the map of who goes where, both (tokens, experts)."""
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax after": {"moe_router_pre_softmax": False},
    "softmax before": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True},
    "scaled": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    "in groups": {
        "moe_router_pre_softmax": True, "moe_router_num_groups": 4, "moe_router_group_topk": 2,
    },
}  # fmt: skip
TOP = 3


def route(logits: torch.Tensor, options: Mapping[str, Any]) -> Routing:
    """What megatron-core's router makes of logits (tokens, experts)."""
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=logits.shape[1],
        moe_router_topk=TOP, moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True, **options,
    )  # fmt: skip
    none = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
    router = TopKRouter(config, pg_collection=none)
    probabilities, chosen = router.routing(logits[:, None])
    return probabilities.detach().numpy(), chosen.numpy()


def expected_routing(logits: np.ndarray, options: Mapping[str, Any]) -> Routing:
    """The same in numpy, one token at a time."""
    probabilities, chosen = np.zeros_like(logits), np.zeros(logits.shape, dtype=bool)
    before = options["moe_router_pre_softmax"]
    for token, row in enumerate(logits):
        if options.get("moe_router_score_function") == "sigmoid":
            scores = 1 / (1 + np.exp(-row))
        elif before:
            scores = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        else:
            scores = row
        candidates = list(range(len(row)))
        if groups := options.get("moe_router_num_groups"):
            parts = np.split(np.arange(len(row)), groups)
            # A group is worth the sum of its best; TOP // group_topk of them, as DeepSeek-V3 does it.
            best = TOP // options["moe_router_group_topk"]
            worth = [np.sort(scores[part])[-best:].sum() for part in parts]
            kept = np.argsort(worth)[-options["moe_router_group_topk"] :]
            candidates = [expert for group in kept for expert in parts[group]]
        top = sorted(candidates, key=lambda expert: -scores[expert])[:TOP]
        shares = scores[top]
        if not before:
            shares = np.exp(shares - shares.max()) / np.exp(shares - shares.max()).sum()
        elif options.get("moe_router_score_function") == "sigmoid":
            shares = shares / shares.sum()
        probabilities[token, top] = shares * options.get("moe_router_topk_scaling_factor", 1.0)
        chosen[token, top] = True
    return probabilities, chosen


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(200, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ROUTERS)
def test_the_router_is_numpys(logits: torch.Tensor, name: str) -> None:
    probabilities, chosen = route(logits, ROUTERS[name])
    expected, expected_chosen = expected_routing(logits.numpy().astype(np.float64), ROUTERS[name])
    assert np.array_equal(chosen, expected_chosen)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5, atol=1e-6)


def test_a_router_with_other_options_is_another(logits: torch.Tensor) -> None:
    """Each of the routers above is told from each of the others by the same comparison."""
    made = {name: route(logits, options) for name, options in ROUTERS.items()}
    for name, options in ROUTERS.items():
        expected, _ = expected_routing(logits.numpy().astype(np.float64), options)
        for other, (probabilities, _) in made.items():
            assert np.allclose(probabilities, expected, rtol=1e-5, atol=1e-6) == (name == other), (
                name,
                other,
            )


def round_trip(
    tokens: torch.Tensor,
    probabilities: torch.Tensor,
    chosen: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    fault: Callable[[torch.Tensor], torch.Tensor] = lambda indices: indices,
) -> torch.Tensor:
    """Tokens to their experts and back, weighted: what an MoE layer does, in one process."""
    permuted, _, indices, *_ = permute(tokens, chosen, num_out_tokens=int(chosen.sum()))
    counts = chosen.sum(dim=0).tolist()
    done = torch.cat([expert(number, part) for number, part in enumerate(permuted.split(counts))])
    return unpermute(done, fault(indices), tokens.shape, probs=probabilities, routing_map=chosen)


def swap_first_two(indices: torch.Tensor) -> torch.Tensor:
    return torch.cat([indices[[1, 0]], indices[2:]])


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "two neighbours swapped": swap_first_two,
    "off by one": lambda indices: indices.roll(1),
    "reversed": lambda indices: indices.flip(0),
    "in token order": lambda indices: indices.sort().values,
    "all to the first token": torch.zeros_like,
}


def test_tokens_come_back_from_their_experts(logits: torch.Tensor) -> None:
    probabilities, chosen = (torch.from_numpy(part) for part in route(logits, ROUTERS["softmax after"]))
    tokens = torch.randn(len(logits), 16, generator=torch.Generator().manual_seed(1))

    same = round_trip(tokens, probabilities, chosen, lambda _, part: part)
    torch.testing.assert_close(same, tokens)  # the shares of a token sum to one

    def scale(number: int, part: torch.Tensor) -> torch.Tensor:
        return part * (number + 1)

    scales = torch.arange(1.0, logits.shape[1] + 1)
    expected = tokens * (probabilities * scales).sum(dim=1, keepdim=True)
    torch.testing.assert_close(round_trip(tokens, probabilities, chosen, scale), expected)
    for name, fault in FAULTS.items():
        wrong = round_trip(tokens, probabilities, chosen, scale, fault)
        assert not torch.allclose(wrong, expected), f"{name} is not caught"
