"""Who shares what with whom, counted by hand; no rank is started."""

from itertools import product

import pytest
import torch

from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Layout, create_mesh, mesh_without_processes, single_process_mesh

AXES = ("world", "tp", "dp", "ep", "edp", "ep_node", "ep_across")


def test_eight_ranks_by_hand() -> None:
    layout = Layout(world=8, ep=4, tp=2)
    assert (layout.dp, layout.edp) == (4, 2)
    assert layout.groups("world") == [(0, 1, 2, 3, 4, 5, 6, 7)]
    assert layout.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert layout.groups("dp") == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert layout.groups("ep") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert layout.groups("edp") == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_expert_tensor_parallelism_widens_the_ep_group() -> None:
    """Two ranks for each of two halves of the experts: the groups of ep=4, under the sizes of the configuration."""
    layout, wide = Layout(world=8, ep=2, tp=2, node_size=2, etp=2), Layout(world=8, ep=4, tp=2, node_size=2)
    assert (layout.ep, layout.etp, layout.expert_ranks, layout.edp) == (2, 2, 4, 2)
    assert [layout.groups(axis) for axis in AXES] == [wide.groups(axis) for axis in AXES]


def test_experts_fold_over_tensor_parallelism() -> None:
    """ep neither divides tp nor is divided by it: still consecutive ranks of the world."""
    layout = Layout(world=12, ep=3, tp=4)
    assert layout.ranks("tp", 5) == (4, 5, 6, 7)
    assert layout.ranks("ep", 5) == (3, 4, 5)
    assert layout.ranks("edp", 5) == (2, 5, 8, 11)
    assert layout.ranks("dp", 5) == (1, 5, 9)


@pytest.mark.parametrize("world", [1, 2, 4, 6, 8, 12])
def test_groups_partition_the_world(world: int) -> None:
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    for ep, tp in product(divisors, divisors):
        layout = Layout(world, ep, tp)
        sizes = {"world": world, "tp": tp, "dp": world // tp, "ep": ep, "edp": world // ep}
        sizes |= {"ep_node": ep, "ep_across": 1}  # one node
        for axis in AXES:
            groups = layout.groups(axis)
            assert sorted(rank for group in groups for rank in group) == list(range(world))
            assert {len(group) for group in groups} == {sizes[axis]}
            for group in groups:
                assert all(layout.ranks(axis, rank) == group for rank in group)


def test_sixteen_thousand_ranks() -> None:
    layout = Layout(world=16384, ep=64, tp=8, node_size=8)
    assert (layout.dp, layout.edp) == (2048, 256)
    assert [len(layout.groups(axis)) for axis in AXES] == [1, 2048, 8, 256, 64, 2048, 2048]
    assert layout.ranks("ep_node", 16383) == tuple(range(16376, 16384))
    assert layout.ranks("ep_across", 16383) == tuple(range(16327, 16384, 8))
    assert layout.ranks("ep", 16383) == tuple(range(16320, 16384))
    assert layout.ranks("edp", 65) == tuple(range(1, 16384, 64))
    assert layout.ranks("dp", 16383) == tuple(range(7, 16384, 8))


def test_an_ep_group_on_two_nodes_by_hand() -> None:
    layout = Layout(world=8, ep=4, node_size=2)
    assert layout.ep_local == 2
    assert layout.groups("ep_node") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert layout.groups("ep_across") == [(0, 2), (1, 3), (4, 6), (5, 7)]


@pytest.mark.parametrize(
    ("world", "ep", "node_size", "local"),
    [
        (8, 4, None, 4),
        (8, 4, 1, 1),
        (8, 4, 2, 2),
        (8, 4, 4, 4),
        (8, 4, 8, 4),
        (8, 4, 64, 4),
        (24, 3, 6, 3),
        (6, 3, 8, 3),
    ],
)
def test_groups_on_nodes_partition_the_world(world: int, ep: int, node_size: int | None, local: int) -> None:
    layout = Layout(world, ep, node_size=node_size)
    for axis, size in (("ep_node", local), ("ep_across", ep // local)):
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        assert {len(group) for group in groups} == {size}
        for group in groups:
            assert all(layout.ranks(axis, rank) == group for rank in group)
            assert {rank // ep for rank in group} == {group[0] // ep}
            where = {rank // (node_size or world) for rank in group}
            assert len(where) == (1 if axis == "ep_node" else ep // local)


@pytest.mark.parametrize(("world", "ep", "node_size"), [(12, 6, 4), (12, 3, 4), (12, 4, 3), (16, 8, 5)])
def test_ep_groups_that_lie_unevenly_on_nodes(world: int, ep: int, node_size: int) -> None:
    layout = Layout(world, ep, node_size=node_size)
    assert not layout.even_nodes
    assert layout.ranks("ep", 0) == tuple(range(ep))  # all else works
    with pytest.raises(
        ValueError, match=f"{ep} consecutive ranks lie unevenly on nodes of node_size={node_size}: make"
    ):
        layout.groups("ep_node")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(world=8, ep=3), "ep=3 does not divide world size 8"),
        (dict(world=8, tp=5), "tp=5 does not divide world size 8"),
        (dict(world=4, ep=8), "ep=8 does not divide world size 4"),
        (dict(world=4, ep=2, etp=4), r"ep\*etp=8 does not divide world size 4"),
        (dict(world=4, ep=-2, etp=-2), "etp=-2 does not divide world size 4"),
        (dict(world=4, tp=0), "tp=0 does not divide world size 4"),
        (dict(world=4, ep=-2), "ep=-2 does not divide world size 4"),
        (dict(world=4, node_size=0), "node_size=0 is below 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**sizes)


def test_unknown_axis() -> None:
    with pytest.raises(ValueError, match="unknown axis 'pp'"):
        Layout(4).ranks("pp", 0)


def test_a_process_alone() -> None:
    mesh = single_process_mesh()
    assert (mesh.layout, mesh.rank) == (Layout(1, 1, 1), 0)
    for axis in AXES:
        group = getattr(mesh, axis)
        assert (group.ranks, group.rank, group.size, group.process_group) == ((0,), 0, 1, None)


def test_create_mesh_without_process_group() -> None:
    assert create_mesh(ep=1, tp=1) == single_process_mesh()
    with pytest.raises(ValueError, match="ep=2 does not divide world size 1"):
        create_mesh(ep=2, tp=1)


def test_a_rank_of_a_layout_that_nobody_starts() -> None:
    """The sixth of eight ranks, on the third of four nodes: all its groups, by hand."""
    mesh = mesh_without_processes(Layout(world=8, ep=2, tp=2, node_size=2, etp=2), 5, sequence_parallel=True)
    assert (mesh.rank, mesh.etp, mesh.sequence_parallel) == (5, 2, True)
    expected = dict(world=(tuple(range(8)), 5), tp=((4, 5), 1), dp=((1, 3, 5, 7), 2), ep=((4, 5, 6, 7), 1))
    expected |= dict(edp=((1, 5), 1), ep_node=((4, 5), 1), ep_across=((5, 7), 0))
    for axis, (ranks, rank) in expected.items():
        group = getattr(mesh, axis)
        assert (group.ranks, group.rank, group.process_group) == (ranks, rank, None), axis
    assert mesh.token_ranks == mesh.world
    with pytest.raises(AssertionError, match="all_reduce in a mesh without processes"):
        all_reduce(torch.ones(1), mesh.tp)


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    assert not mesh_without_processes(Layout(4, ep=4), 0, sequence_parallel=True).sequence_parallel
    assert not create_mesh(ep=1, tp=1, sequence_parallel=True).sequence_parallel
