"""The comparisons that a question names: its family, over which the claims of a report are adjusted."""

from collections.abc import Sequence

from moe_dist.study.design.names import Scalar
from moe_dist.study.design.study_file import Question

Axes = dict[str, Scalar]


def comparisons(question: Question, cells: Sequence[Axes]) -> list[tuple[Axes, Axes]]:
    """(axes of a combination, axes of its baseline), in the order of `cells`, which are the combinations of a study.

    A combination whose baseline is not among them, because it is excluded, is compared with nothing.
    """
    found = []
    for axes in cells:
        baseline = axes | question.baseline
        wanted = all(axes[axis] in values for axis, values in question.compare.items())
        if wanted and axes != baseline and baseline in cells:
            found.append((axes, baseline))
    return found
