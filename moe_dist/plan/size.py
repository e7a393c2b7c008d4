"""Bytes and seconds for people."""

from moe_dist.plan.memory import MemoryPlan


def size(count: float) -> str:
    """Bytes.

    >>> size(0), size(1536), size(3 * 2**30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    for unit, of in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= of:
            return f"{count / of:.1f} {unit}"
    return f"{count:.0f} B"


def span(seconds: float) -> str:
    """Seconds, to three digits.

    >>> span(2.5), span(0.0123), span(0.000004)
    ('2.5 s', '12.3 ms', '4 us')
    """
    for unit, of in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= of:
            return f"{seconds / of:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def largest(memory: MemoryPlan) -> tuple[str, int]:
    """The part that takes most, and its bytes."""
    return max(memory.parts.items(), key=lambda part: part[1])
