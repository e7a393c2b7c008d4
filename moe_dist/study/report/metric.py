"""Numbers of the ledger: which way is better, what they are called, how they are shown."""

from collections.abc import Sequence
from statistics import fmean, stdev

_TITLES = {
    "validation_loss": "validation loss",
    "validation_loss_capped": "validation loss, capped",
    "loss": "training loss",
    "validation_bits_per_byte": "validation bits/byte",
    "validation_bits_per_token": "validation bits/token",
    "validation_accuracy": "validation accuracy",
    "validation_macro_f1": "validation macro-F1",
    "test_accuracy": "test accuracy",
    "test_macro_f1": "test macro-F1",
    "drop_rate": "dropped, end",
    "drop_rate_whole_run": "dropped, whole run",
    "steps_until_few_drops": "steps until under 3% are dropped",
}


def lower_is_better(metric: str) -> bool:
    """Unless its name says accuracy or f1."""
    return not ("accuracy" in metric or "f1" in metric.split("_"))


def title(metric: str) -> str:
    return _TITLES.get(metric, metric.replace("_", " "))


def difference_form(*values: float) -> str:
    """How differences of such values are written: four places where the values are of the size of losses and shares,
    else four digits.

    >>> difference_form(2.31, 0.5), difference_form(3.2e12), difference_form(0.002)
    ('+.4f', '+.4g', '+.4g')
    """
    return "+.4f" if 0.01 <= max(map(abs, values), default=1.0) < 1000 else "+.4g"


def spread(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    """mean ± sample standard deviation, as `form` says; the mean alone when all are equal, a dash of none.

    >>> spread([1.0, 2.0, 3.0], "{:.1f} s")
    '2.0 ± 1.0 s'
    """
    if not values:
        return "–"
    mean = form.format(fmean(values) * scale)
    if len(set(values)) == 1:
        return mean
    number, space, unit = mean.partition(" ")
    deviation = form.replace("+", "").format(stdev(values) * scale).partition(" ")[0]
    return f"{number} ± {deviation}{space}{unit}"
