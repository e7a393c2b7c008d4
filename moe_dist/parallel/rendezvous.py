"""Where the members of a run, its ranks or torchrun's nodes, meet: a store that member 0 or torchrun serves.

Nobody waits in silence: an address that leads nowhere and a port that is taken are refused at once, and whoever waits
for long says for whom. Nobody trains with strangers: the store holds the name of the start that it belongs to, and a
member of another start that comes to the same port is told both names, and leaves no trace.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from moe_dist.parallel.slurm import resolves

TIMEOUT = timedelta(minutes=10)
_PATIENCE = 30.0  # seconds that a member waits before it says so
_POLL = 0.05, 2.0  # seconds between two looks, at first and in the end
_LISTED = 8  # members that a message names

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Member:
    """Number `number` of `total` that meet. start: the name of what was started, the same for all that belong together.
    speaks: it says so when it waits for member 0; one on each machine is enough."""

    number: int
    total: int
    start: str = ""
    kind: str = "rank"
    speaks: bool = True

    def __str__(self) -> str:
        of = f" of {self.start}" if self.start else ""
        return f"{self.kind} {self.number}{of} (process {os.getpid()} on {socket.gethostname()})"


def meet(member: Member, host: str, port: int, served: bool, attempt: int = 0) -> dist.Store:
    """The store of this start, once all members have come. Where `served`, torchrun serves the port; else member 0
    does, for host 127.0.0.1 on that address only.

    attempt: how often torchrun has started the members again. Raises ValueError when they cannot meet: in one line,
    with both names where two starts meet.
    """
    if member.number == 0 and not served:
        store = _serve(host, port)
    else:
        store = _reach(member, host, port)
    try:
        _introduce(member, dist.PrefixStore(_desk(member.kind, attempt), store), f"{host}:{port}")
    except RuntimeError as error:  # of the store: member 0 has ended, or another program listens there
        raise ValueError(f"{member} lost {host}:{port}, where all meet, before all had come: {error}") from None
    return dist.PrefixStore(f"moe_dist/{member.start}/{attempt}", store)


def _serve(host: str, port: int) -> dist.Store:
    # TCPStore would listen on every interface, also when told 127.0.0.1: give it a socket that does not.
    listener = _listen_on_loopback(port).detach() if host == LOOPBACK else None
    try:
        return dist.TCPStore(
            host, port, is_master=True, timeout=TIMEOUT, wait_for_workers=False, master_listen_fd=listener
        )
    except RuntimeError as error:
        reason = "Address already in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ValueError(f"port {port} of this machine, where all meet: {reason}; set MASTER_PORT") from None


def _listen_on_loopback(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise ValueError(f"port {port} of {LOOPBACK}, where ranks meet: {error.strerror}; set MASTER_PORT") from None
    return listener


def _reach(member: Member, host: str, port: int) -> dist.Store:
    """The store, as soon as somebody serves it. TCPStore itself would try in silence, or with a traceback a second."""
    if not resolves(host):
        raise ValueError(f"{member} finds no host {host!r}: set MASTER_ADDR to an address of the machine of rank 0")
    whom = f"{member.kind} 0 at {host}:{port}"
    for _ in _looks(member, lambda: whom, member.speaks):
        try:
            socket.create_connection((host, port), timeout=10).close()
            break
        except OSError:
            continue
    with _said_when_long(member, whom) if member.speaks else nullcontext():
        try:
            return dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT, wait_for_workers=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{host}:{port} does not answer {member} as {whom} would: {reason}") from None


def _introduce(member: Member, desk: dist.Store, where: str) -> None:
    """Returns when all have come. Writes nothing before it is sure that the store is that of this start."""
    if member.number == 0:
        desk.compare_set("start", "", _named(member.start))
    else:
        for _ in _looks(member, lambda: f"{member.kind} 0 at {where}", member.speaks):
            if desk.check(["start"]):
                break
    found = desk.get("start").decode()
    if found != _named(member.start):
        raise ValueError(
            f"{member} came to {where}, where {found} meets: two starts share a port, set another MASTER_PORT for one"
        )
    there = desk.compare_set(_seat(member.number), "", str(member)).decode()
    if there != str(member):
        raise ValueError(
            f"{member} came to {where}, but {there} is there already: two starts share a port, or a number"
        )
    if desk.add("come", 1) == member.total:
        desk.set("all", "come")
    for _ in _looks(member, lambda: _absent(member, desk), aloud=member.number == 0):
        if desk.check(["all"]):
            return


def _desk(kind: str, attempt: int) -> str:
    """Ranks meet in the store in which torchrun's nodes have met."""
    return f"moe_dist/{kind}s meet/{attempt}"


def _named(start: str) -> str:
    return start or "a start without a name"


def _seat(number: int) -> str:
    return f"member {number}"


def _absent(member: Member, desk: dist.Store) -> str:
    absent = [number for number in range(member.total) if not desk.check([_seat(number)])]
    more = f" and {len(absent) - _LISTED} more" if len(absent) > _LISTED else ""
    return f"{member.kind} {', '.join(map(str, absent[:_LISTED]))}{more} of {member.total}"


def _looks(member: Member, whom: Callable[[], str], aloud: bool) -> Iterator[None]:
    """One turn for each look at what the member waits for; aloud: it says so when that takes long. Raises ValueError
    when it has waited for TIMEOUT."""
    began, pause = time.monotonic(), _POLL[0]
    speak_at = began + _PATIENCE
    while True:
        yield
        now = time.monotonic()
        if now - began > TIMEOUT.total_seconds():
            raise ValueError(f"{member} has waited {TIMEOUT.total_seconds():.0f} s for {whom()}")
        if aloud and now >= speak_at:
            _say(member, now - began, whom())
            speak_at = now + 2 * (now - began)
        time.sleep(pause)
        pause = min(pause * 1.5, _POLL[1])


@contextmanager
def _said_when_long(member: Member, whom: str) -> Iterator[None]:
    """For a call that waits by itself."""
    timer = threading.Timer(_PATIENCE, _say, (member, _PATIENCE, whom))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(member: Member, seconds: float, whom: str) -> None:
    print(f"moe-dist: {member} has waited {seconds:.0f} s for {whom}", file=sys.stderr, flush=True)
