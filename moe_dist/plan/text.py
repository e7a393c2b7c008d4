"""Plans as tables of at most 100 columns, for a terminal or a file."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_dist.config import Config
from moe_dist.models.parameters import classifier_parameter_counts, parameter_counts
from moe_dist.plan.advice import advice
from moe_dist.plan.hardware import Hardware
from moe_dist.plan.plan import Plan, needs
from moe_dist.plan.search import Price, Search
from moe_dist.plan.size import size, span
from moe_dist.plan.time import exchange_seconds, part_of
from moe_dist.plan.transfer import links

_WIDTH = 100
_FEWEST = 0.001  # shares of a step below this are summed up as "others"


def console() -> Console:
    """The standard output, plain where it is no terminal."""
    return Console(width=_WIDTH, highlight=False, markup=False, emoji=False)


def print_plan(plan: Plan, out: Console) -> None:
    """Everything about one layout."""
    _say(out, [*_head(plan), ""])
    out.print(_memory(plan))
    _say(out, [*_verdict(plan), ""])
    out.print(_exchanges(plan))
    _say(out, [_sent(plan), ""])
    out.print(_time(plan))
    _say(out, [*_speed(plan), *_warnings(plan.hardware)])


def print_search(found: Search, hardware: Hardware, out: Console) -> None:
    """The fastest layouts, and why others fell out."""
    fastest = f"the {len(found.ranked)} fastest of those that are valid and fit {size(hardware.memory.usable)} a rank"
    _say(out, [f"{found.tried} layouts; {fastest}", ""])
    if found.ranked:
        table = _table(
            "ep", "tp", "etp", "engine", "micro", "recompute", "dispatch", "step", "MFU", "memory", "most time"
        )
        for choice, plan in found.ranked:
            engine = choice.engine if choice.engine == "native" else f"ZeRO-{choice.zero_stage}"
            way = f"{choice.dispatch} {choice.wire}" if choice.dispatch == "all_to_all" else choice.dispatch
            time = plan.time
            table.add_row(
                *(str(each) for each in (choice.ep, choice.tp, choice.etp)),
                *(engine, str(choice.micro_batch), choice.recompute, way),
                *(span(time.seconds), f"{time.mfu:.1%}", size(plan.memory.total), time.bottleneck.partition(",")[0]),
            )
        out.print(table)
        _say(out, ["", "the fastest, as flags:", f"  {found.ranked[0][0].flags()}", ""])
    if found.reasons:
        _say(out, ["fell out:"])
        for reason in found.reasons:
            _say(out, [f"  {reason.count:>7}  such as: {reason.example}"])
    _say(out, list(_warnings(hardware)))


def print_prices(found: Sequence[Price], out: Console) -> None:
    """A row for each capacity factor."""
    table = _table("capacity", "step", "MFU", "FLOPs a step", "sent a rank", "between nodes", "memory", "fits")
    for price in found:
        inside, between = price.plan.sent()
        table.add_row(
            "null" if price.factor is None else f"{price.factor:g}",
            *(span(price.plan.time.seconds), f"{price.plan.time.mfu:.1%}", f"{price.flops:.3g}"),
            *(size(inside + between), size(between), size(price.plan.memory.total)),
            "yes" if price.plan.fits else "no",
        )
    out.print(table)
    _say(out, ["FLOPs leave out what no capacity could hold; MFU counts it, so that dropping does not lower it."])
    _say(
        out, ["without --skew experts are asked for alike, and a factor of 1 or more drops nothing and costs the same"]
    )
    if found:
        _say(out, list(_warnings(found[0].plan.hardware)))


def _head(plan: Plan) -> Iterator[str]:
    layout, shape, config, hardware = plan.layout, plan.shape, plan.config, plan.hardware
    total, active = _parameters(config)
    engine = config.engine
    zero = f"ZeRO-{engine.zero_stage}" if engine.name == "deepspeed" else "native"
    yield f"{total:.4g} parameters, {active:.4g} of them met by a token; {engine.precision}, {zero}"
    yield (
        f"{layout.world} ranks: dp {layout.dp} x tp {layout.tp}; experts on ep {layout.ep} x etp {layout.etp}, "
        f"{layout.edp} copies; {hardware.ranks_per_node} ranks a node"
    )
    yield (
        f"{shape.tokens_per_step} tokens a step: micro_batch {shape.micro_batch} x accumulation {shape.accumulation} "
        f"x dp {shape.dp} x {shape.seq_len}; recompute {config.model.recompute}"
    )
    yield f"hardware: {hardware.name} ({hardware.source})"


def _parameters(config: Config) -> tuple[int, int]:
    if config.task == "classification":
        model = replace(config.model, num_classes=config.model.num_classes or 2)
        counts = classifier_parameter_counts(model, config.train.seq_len)
    else:
        counts = parameter_counts(config.model)
    return counts.total, counts.active


def _memory(plan: Plan) -> Table:
    table = _table("memory of the fullest rank", "", "share")
    total = plan.memory.total
    for part, each in plan.memory.parts.items():
        table.add_row(part if part != "margin" else "margin for skewed routing", size(each), f"{each / total:.1%}")
    table.add_row(f"together, of rank {plan.rank}, {plan.memory.moment}", size(total), "")
    table.add_row("a rank has", size(plan.hardware.memory.usable), f"{total / plan.hardware.memory.usable:.1%} used")
    for recompute in ("none", "activation", "block"):
        if recompute != plan.config.model.recompute:
            changed = replace(plan.config, model=replace(plan.config.model, recompute=recompute))
            with suppress(ValueError):  # a rule refuses it: blocks of a classifier, say
                other = needs(changed, plan.layout.world, plan.hardware).memory.total
                table.add_row(f"together with recompute={recompute}", size(other), "")
    return table


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.fits:
        yield "it fits"
    else:
        device, usable = plan.hardware.device, plan.hardware.memory.usable
        change = advice(plan.config, plan.shape, plan.layout, plan.rank, device_type=device, available=usable)
        yield f"IT DOES NOT FIT: {change}"


def _exchanges(plan: Plan) -> Table:
    table = _table("exchanged in a step", "collective", "group", "calls", "inside", "between", "time")
    for each in sorted(plan.transfers, key=lambda each: -exchange_seconds(each, plan.layout, plan.hardware)):
        inside, between = links(each, plan.hardware.ranks_per_node)
        table.add_row(
            f"{each.what} ({each.phase})",
            each.collective,
            f"{each.axis} {len(each.ranks)}",
            str(each.calls),
            *(size(inside), size(between), span(exchange_seconds(each, plan.layout, plan.hardware))),
        )
    return table


def _sent(plan: Plan) -> str:
    inside, between = plan.sent()
    return f"a rank sends {size(inside)} inside its node and {size(between)} between nodes"


def _time(plan: Plan) -> Table:
    time, few = plan.time, 0.0
    across = {part_of(each) for each in plan.transfers if links(each, plan.hardware.ranks_per_node)[1]}
    table = _table("time of a step", "", "share")
    for part, seconds in sorted(time.parts.items(), key=lambda item: -item[1]):
        if seconds < _FEWEST * time.seconds:
            few += seconds
        else:
            name = f"{part} (between nodes)" if part in across else part
            table.add_row(name, span(seconds), f"{seconds / time.seconds:.1%}")
    if few:
        table.add_row("others", span(few), f"{few / time.seconds:.1%}")
    if time.hidden:
        table.add_row("hidden behind compute", f"-{span(time.hidden)}", f"-{time.hidden / time.seconds:.1%}")
    table.add_row("together", span(time.seconds), "")
    return table


def _speed(plan: Plan) -> Iterator[str]:
    time = plan.time
    yield (
        f"{plan.tokens_per_second:.4g} tokens/s, {plan.tflops:.4g} TFLOP/s a rank, MFU {time.mfu:.1%}; "
        f"{time.flops:.4g} FLOPs a step"
    )
    yield f"most time: {time.bottleneck}"
    yield f"to change: {time.advice}"


def _warnings(hardware: Hardware) -> Iterator[str]:
    if hardware.source == "datasheet":
        yield (
            "times are of a datasheet, with assumed shares of it that are reached; moe-dist plan --measure FILE on the "
            "machine itself makes them its own"
        )


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(names):
        words = number == 0 or name in ("engine", "recompute", "dispatch", "collective", "group", "most time")
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    return table


def _say(out: Console, lines: Sequence[str]) -> None:
    for line in lines:
        out.print(Text(line), soft_wrap=True)
