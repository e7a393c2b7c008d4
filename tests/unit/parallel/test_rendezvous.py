"""Members meet when all are there, never with those of another start, and never in silence. Each is a thread here."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from moe_dist.parallel import rendezvous
from moe_dist.parallel.rendezvous import LOOPBACK, Member, meet


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def at_once(*calls: Callable[[], Any]) -> Iterator[list[Future[Any]]]:
    with ThreadPoolExecutor(len(calls)) as pool:
        yield [pool.submit(call) for call in calls]


def test_all_meet_in_one_store() -> None:
    port = free_port()
    calls = [partial(meet, Member(number, 3, "mine"), LOOPBACK, port, served=False) for number in range(3)]
    with at_once(*calls) as came:
        stores = [store.result(60) for store in came]
    stores[1].set("key", "value")
    assert stores[2].get("key") == stores[0].get("key") == b"value"


def test_a_member_of_another_start_is_told_both_names_and_harms_nobody() -> None:
    port = free_port()
    with at_once(
        lambda: meet(Member(0, 2, "Slurm step 7.0"), LOOPBACK, port, served=False),
        lambda: meet(Member(1, 2, "Slurm step 7.1"), LOOPBACK, port, served=False),
    ) as (ours, theirs):
        with pytest.raises(ValueError, match=r"rank 1 of Slurm step 7\.1 .*came to .*, where Slurm step 7\.0 meets"):
            theirs.result(60)
        assert not ours.done()
        meet(Member(1, 2, "Slurm step 7.0"), LOOPBACK, port, served=False)
        ours.result(60)


def test_one_number_is_taken_once() -> None:
    """Two starts without a name, or with the same one: their ranks cannot be told apart, but not both are let in."""
    port = free_port()
    with at_once(
        lambda: meet(Member(0, 3), LOOPBACK, port, served=False),
        lambda: meet(Member(1, 3), LOOPBACK, port, served=False),
    ) as (first, second):
        store, seat = (
            dist.TCPStore(LOOPBACK, port, is_master=False, wait_for_workers=False),
            "moe_dist/ranks meet/0/member 1",
        )
        store.wait([seat], timedelta(seconds=60))
        seated = store.get(seat).decode()
        store.set(seat, f"{seated} elsewhere")  # else it is this process itself
        with pytest.raises(ValueError, match=r"rank 1 .*, but rank 1 .* elsewhere is there already"):
            meet(Member(1, 3), LOOPBACK, port, served=False)
        meet(Member(2, 3), LOOPBACK, port, served=False)
        first.result(60), second.result(60)


def test_ranks_that_torchrun_starts_again_meet_anew() -> None:
    port = free_port()
    server = dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False)
    for attempt in (0, 1):
        calls = [partial(meet, Member(number, 2, "it"), LOOPBACK, port, True, attempt) for number in range(2)]
        with at_once(*calls) as came:
            for store in came:
                assert store.result(60).add("started", 1) in (1, 2)
    del server


def test_ranks_meet_where_their_nodes_have_met() -> None:
    """torchrun's nodes keep the store; their ranks go by another name of the start."""
    port = free_port()
    nodes = [partial(meet, Member(number, 2, "train x", "node"), LOOPBACK, port, False) for number in range(2)]
    ranks = [partial(meet, Member(number, 4, "torchrun train-x"), LOOPBACK, port, True) for number in range(4)]
    with at_once(*nodes) as came:
        kept = [store.result(60) for store in came]
    with at_once(*ranks) as came:
        assert sorted(store.result(60).add("come", 1) for store in came) == [1, 2, 3, 4]
    del kept


def test_who_waits_says_for_whom(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rendezvous, "_PATIENCE", 0.0)
    said, port = "", free_port()

    def until(text: str) -> None:
        nonlocal said
        while text not in said:
            said += capfd.readouterr().err
            threading.Event().wait(0.02)

    with at_once(lambda: meet(Member(1, 3), LOOPBACK, port, served=False)) as (early,):
        until(f"s for rank 0 at {LOOPBACK}:{port}")
        with at_once(lambda: meet(Member(0, 3), LOOPBACK, port, served=False)) as (server,):
            until("s for rank 2 of 3")
            meet(Member(2, 3), LOOPBACK, port, served=False)
            server.result(60), early.result(60)


def test_it_ends_when_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "TIMEOUT", timedelta(seconds=0.2))
    port = free_port()
    with pytest.raises(ValueError, match=rf"rank 1 .* has waited \d s for rank 0 at {LOOPBACK}:{port}"):
        meet(Member(1, 2), LOOPBACK, port, served=False)
    with pytest.raises(ValueError, match=r"rank 0 .* has waited \d s for rank 1, 2, 3, 4, 5, 6, 7, 8 and 1 more of 10"):
        meet(Member(0, 10), LOOPBACK, port, served=False)


def test_an_address_that_leads_nowhere() -> None:
    with pytest.raises(ValueError, match=r"rank 1 .* finds no host 'no-such-host\.invalid': set MASTER_ADDR"):
        meet(Member(1, 2), "no-such-host.invalid", 20000, served=False)


@pytest.mark.parametrize("host", [LOOPBACK, "localhost"])
def test_a_port_that_is_taken(host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"port \d+ of .*, where .* meet: Address already in use; set MASTER_PORT"):
            meet(Member(0, 2), host, taken.getsockname()[1], served=False)
