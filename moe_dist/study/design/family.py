"""The comparisons that a question names: its family, over which the claims of a report are adjusted."""

from collections.abc import Sequence

from moe_dist.study.design.names import Scalar
from moe_dist.study.design.study_file import Question

Axes = dict[str, Scalar]


def comparisons(question: Question, cells: Sequence[Axes]) -> list[tuple[Axes, Axes]]:
    """(axes of a combination, axes of its baseline), in the order of `cells`, which are the combinations of a study.

    A combination whose baseline is not among them, because it is excluded, is compared with nothing.
    """
    return [
        (cells[number], cells[other])
        for number, other in with_baselines(question.baseline, cells)
        if other is not None and is_asked(question, cells[number])
    ]


def with_baselines(baseline: Axes, cells: Sequence[Axes]) -> list[tuple[int, int | None]]:
    """(place of a combination among `cells`, that of its baseline), of all that are not baselines themselves: the one
    that has the baseline's values and shares all else; None where it is not among them."""
    places = {frozenset(axes.items()): place for place, axes in enumerate(cells)}
    wanted = [frozenset((axes | baseline).items()) for axes in cells]
    return [(place, places.get(each)) for place, each in enumerate(wanted) if places.get(each) != place]


def is_asked(question: Question, axes: Axes) -> bool:
    """Whether `compare` lets a combination in."""
    return all(axes[axis] in values for axis, values in question.compare.items())
