"""Every cause by what is known of it, and what follows."""

from dataclasses import replace

import pytest

from moe_dist.cluster.cause import Cause, Decision, Ended, Kind, cause_of, decide
from moe_dist.config import Config, batch_shape
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.advice import explained

SAVED = {"state": "preempted", "step": 31, "signal": "SIGUSR2"}
LOST_ONE = {"state": "failed", "reason": "RankLost: rank 0 lost another rank, which has ended; last here: step 3"}


def failed(reason: str, code: int | None = None) -> dict[str, object]:
    return {"state": "failed", "reason": reason} | ({"code": code} if code is not None else {})


@pytest.mark.parametrize(
    ("ended", "kind"),
    [
        (Ended(code=0, status={"state": "finished", "step": 40}), "finished"),
        (Ended(code=1, status={"state": "finished", "step": 40}, ranks={("a", 1): -9}), "finished"),
        (Ended(code=1, status=SAVED), "signal"),
        (Ended(code=1, status=SAVED, seconds_left=100.0), "time limit"),
        (Ended(code=1, status=SAVED | {"signal": "time limit"}), "time limit"),
        (Ended(code=1, status=SAVED | {"signal": "SIGTERM"}), "preempted"),
        (Ended(code=1, status=SAVED | {"signal": "SIGTERM"}, told_to_end=True), "cancelled"),
        (Ended(code=143, told_to_end=True), "cancelled"),
        (Ended(code=1, status=SAVED, told_to_end=True, requeued=True), "taken back"),
        (Ended(code=1, status=SAVED, told_to_end=True, requeued=True, lost=("b",)), "node lost"),
        (Ended(code=1, status=SAVED, cancelled=True), "cancelled"),
        (Ended(code=1, status=LOST_ONE, cancelled=True, lost=("b",)), "cancelled"),
        (Ended(code=1, status=failed("the loss went off", 76), lost=("b",)), "diverged"),
        (Ended(code=1, status=failed("experts.0 differs", 78)), "replicas differ"),
        (Ended(code=1, status=failed("6 starts", 79)), "crash loop"),
        (Ended(code=137, lost=("b",)), "node lost"),
        (Ended(code=1, status=failed("rank 1 has made no progress", 77), lost=("b",)), "node lost"),
        (Ended(code=1, status=failed("rank 1 has made no progress", 77), ranks={("b", 1): -9}), "stalled"),
        (Ended(code=1, status=LOST_ONE, ranks={("b", 1): -9, ("a", 0): 1}), "rank died"),
        (Ended(code=1, status={"state": "running"}, ranks={("b", 1): -11}), "rank died"),
        (Ended(code=1, status=LOST_ONE, ranks={("a", 0): 1}), "collective"),
        (Ended(code=1, status=LOST_ONE, ranks={("a", 0): 1, ("b", 1): -15}), "collective"),
        (Ended(code=1, status=failed("DistBackendError: NCCL error in: x"), ranks={("a", 0): 1}), "collective"),
        (Ended(code=1, ranks={("a", 0): 2, ("b", 1): -15}), "mistake"),
        (Ended(code=1, status=failed("ValueError: no such file"), ranks={("a", 0): 2}), "mistake"),
        (
            Ended(code=1, status=failed("RuntimeError: out of memory: 3 parameters"), ranks={("a", 0): 1}),
            "out of memory",
        ),
        (Ended(code=1, status=failed("RuntimeError: shapes"), ranks={("a", 0): 1}), "error"),
        (Ended(code=127), "error"),
    ],
)
def test_the_surest_cause_is_named(ended: Ended, kind: Kind) -> None:
    assert cause_of(ended).kind == kind


def test_a_cause_says_who_is_to_blame_and_with_which_code_the_job_would_end() -> None:
    cause = cause_of(Ended(code=1, status=LOST_ONE, ranks={("b", 1): -9, ("a", 0): 1}))
    assert cause.nodes == ("b",) and cause.detail == "rank 1 on b died of signal 9 (SIGKILL)"
    lost = cause_of(Ended(code=137, lost=("b", "c")))
    assert lost.nodes == ("b", "c") and lost.detail == "b, c do not answer"
    codes = {
        76: cause_of(Ended(code=1, status=failed("x", 76))).code,
        77: cause_of(Ended(code=1, status=failed("x", 77))).code,
        78: cause_of(Ended(code=1, status=failed("x", 78))).code,
        2: cause_of(Ended(code=1, ranks={("a", 0): 2})).code,
        0: cause_of(Ended(code=0, status={"state": "finished"})).code,
        75: cause_of(Ended(code=1, status=SAVED)).code,
    }
    assert all(want == got for want, got in codes.items())


@pytest.mark.parametrize(
    "ended",
    [
        Ended(code=0, status={"state": "finished"}),
        Ended(code=1, cancelled=True),
        Ended(code=1, told_to_end=True),
        Ended(code=1, told_to_end=True, requeued=True),
        Ended(code=1, told_to_end=True, requeued=True, lost=("b",)),
    ],
)
def test_what_others_have_decided_is_final(ended: Ended) -> None:
    assert cause_of(ended).final
    assert not cause_of(replace(ended, status={}, cancelled=False, told_to_end=False)).final


def test_want_of_memory_is_known_by_what_the_run_says_of_it() -> None:
    config = Config()
    with (
        pytest.raises(RuntimeError) as caught,
        explained(config, batch_shape(config.train, 1), Layout(1), 0, "cpu"),
    ):
        raise MemoryError
    reason = f"{type(caught.value).__name__}: {caught.value}"  # as failures_noted writes it
    assert cause_of(Ended(code=1, status=failed(reason), ranks={("a", 0): 1})).kind == "out of memory"


def decision(kind: Kind, **known: object) -> Decision:
    usual: dict[str, object] = dict(fruitless=1, max_restarts=5, enough_nodes=True, seconds_left=None)
    final = kind in ("finished", "cancelled", "taken back")
    return decide(Cause(kind, code=9, final=final), **(usual | known))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["finished", "cancelled", "taken back"])
def test_what_is_over_stays_over(kind: Kind) -> None:
    assert decision(kind, enough_nodes=False) == Decision("stop", 9)


@pytest.mark.parametrize("kind", ["preempted", "time limit", "signal"])
def test_what_has_saved_is_queued_again(kind: Kind) -> None:
    assert decision(kind, fruitless=99, seconds_left=1.0).next == "requeue"


@pytest.mark.parametrize("kind", ["diverged", "replicas differ", "crash loop", "out of memory", "mistake"])
def test_what_repeats_itself_is_not_started_again(kind: Kind) -> None:
    assert decision(kind, fruitless=0).next == "stop" and decision(kind).code == 9


@pytest.mark.parametrize("kind", ["node lost", "stalled", "rank died", "collective"])
def test_a_fault_is_started_again_within_limits(kind: Kind) -> None:
    assert decision(kind).next == "restart" and decision(kind, fruitless=0).next == "restart"
    assert decision(kind, fruitless=5).next == "restart"
    stopped = decision(kind, fruitless=6)
    assert (stopped.next, stopped.code) == ("stop", 79) and "guard.max_restarts=5" in stopped.why
    assert decision(kind, fruitless=99, max_restarts=None).next == "restart"
    assert (
        decision(kind, max_restarts=0).next == "stop" and decision(kind, fruitless=0, max_restarts=0).next == "restart"
    )
    assert decision(kind, enough_nodes=False).next == "requeue"
    assert decision(kind, seconds_left=100.0).next == "requeue" and decision(kind, seconds_left=1e4).next == "restart"
    assert decision(kind, fruitless=6, enough_nodes=False).next == "stop", "queued again, it would go round for ever"


def test_an_error_that_nobody_knows_is_tried_once_more() -> None:
    assert decision("error", fruitless=0).next == decision("error", fruitless=1).next == "restart"
    assert decision("error", fruitless=2) == Decision("stop", 9, "it has happened again, no step further")
