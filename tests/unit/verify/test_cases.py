"""Which cases a verification runs."""

from math import prod

import pytest

from moe_dist.config import validate
from moe_dist.verify.cases import (
    LAYOUT_AXES,
    QUICK_LAYOUTS,
    SETTING_AXES,
    LayoutCase,
    Setting,
    case_config,
    every_layout,
    every_setting,
    layouts_of,
    parse_axes,
    settings_of,
)


def test_axes_not_given_keep_their_default() -> None:
    default = {"ep": ("1",), "tp": ("1", "2")}
    assert parse_axes([], LAYOUT_AXES, default) == default
    assert parse_axes(["ep=1,2", "zero=native,0"], LAYOUT_AXES, default) == {
        "ep": ("1", "2"),
        "tp": ("1", "2"),
        "zero": ("native", "0"),
    }
    assert default == {"ep": ("1",), "tp": ("1", "2")}


def test_sizes_beyond_the_list_are_fine() -> None:
    assert parse_axes(["ep=8", "tp=16"], LAYOUT_AXES, {}) == {"ep": ("8",), "tp": ("16",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pp=2", "'pp=2': unknown axis 'pp'; choose from ep, tp, sp, zero, etp, dispatch"),
        ("ep", "'ep': '' is no value of ep; choose from 1, 2, 4"),
        ("ep=", "'ep=': '' is no value of ep"),
        ("ep=0", "'0' is no value of ep"),
        ("ep=-1", "'-1' is no value of ep"),
        ("ep=two", "'two' is no value of ep"),
        ("sp=1", "'1' is no value of sp; choose from off, on"),
        ("zero=4", "'4' is no value of zero"),
        ("dispatch=ragged,none", "'none' is no value of dispatch"),
    ],
)
def test_what_axes_refuse(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_axes([text], LAYOUT_AXES, QUICK_LAYOUTS)


def test_layouts_that_say_the_same_are_dropped() -> None:
    axes = {"ep": ("1", "2"), "tp": ("1", "2"), "sp": ("off", "on"), "zero": ("native",), "etp": ("1",)}
    axes["dispatch"] = ("ragged", "padded")
    found = layouts_of(axes)
    # 16 combinations; sp needs tp = 2 (4 gone), padded needs ep = 2 (4 gone), both at once (1 counted twice)
    assert len(found) == len(set(found)) == 16 - 4 - 4 + 1
    assert not any(case.sp == "on" and case.tp == "1" for case in found)
    assert not any(case.dispatch == "padded" and case.ep == "1" for case in found)
    assert LayoutCase("2", "2", "on", "native", "1", "padded") in found


def test_layouts_asked_for_by_name_are_kept() -> None:
    """Only `sp=on`: there is no plain twin to stand for it, so it is tried, and refused with a reason."""
    assert layouts_of({"tp": ("1",), "sp": ("on",)}) == (LayoutCase(tp="1", sp="on"),)
    assert layouts_of({"ep": ("1",), "dispatch": ("padded",)}) == (LayoutCase(ep="1", dispatch="padded"),)


def test_settings_are_all_combinations() -> None:
    axes = {name: values[:2] for name, values in SETTING_AXES.items()}
    found = settings_of(axes)
    assert len(found) == len(set(found)) == prod(map(len, axes.values()))


@pytest.mark.parametrize("setting", every_setting(), ids=str)
def test_every_setting_is_a_valid_config(setting: Setting) -> None:
    config = case_config(setting, None, steps=3)
    shape = validate(config, 1)
    assert shape.accumulation == int(setting.accumulation)
    moe = config.model.moe
    assert (moe.top_k, moe.experts, config.model.recompute) == (int(setting.top_k), setting.experts, setting.recompute)
    assert (moe.capacity_factor is None) == (setting.drops == "dropless")
    assert moe.drop_policy == {"dropless": "position", "choice": "position"}.get(setting.drops, setting.drops)
    assert moe.drop_order == ("choice" if setting.drops == "choice" else "token")
    assert (moe.overflow, moe.balance_scope) == (setting.overflow, setting.balance_scope)
    assert moe.balance == setting.balance
    assert setting.router in (moe.router, "jitter", "groups")


def test_a_layout_changes_how_the_model_is_cut_and_nothing_else() -> None:
    setting, layout = Setting(), LayoutCase("2", "2", "on", "1", "1", "padded")
    alone, cut = case_config(setting, None, 5), case_config(setting, layout, 5)
    assert (cut.parallel.ep, cut.parallel.tp, cut.parallel.sequence_parallel) == (2, 2, True)
    assert (cut.engine.name, cut.engine.zero_stage) == ("deepspeed", 1)
    assert (alone.engine.name, alone.parallel.ep, alone.parallel.tp) == ("native", 1, 1)
    cut.model.moe.wire = alone.model.moe.wire
    assert (cut.model, cut.optim, cut.train) == (alone.model, alone.optim, alone.train)


def test_every_layout_is_valid_on_enough_ranks_and_covers_every_axis() -> None:
    layouts = every_layout()
    assert len(set(layouts)) == len(layouts)
    for axis, values in LAYOUT_AXES.items():
        assert {getattr(layout, axis) for layout in layouts} == set(values)
    for layout in layouts:
        if layout.tp == "1" and layout.sp == "on":
            continue
        validate(case_config(Setting(), layout, 5), 8)


def test_every_setting_covers_every_value_of_every_axis() -> None:
    settings = every_setting()
    for axis, values in SETTING_AXES.items():
        assert {getattr(setting, axis) for setting in settings} == set(values)
    assert len(set(settings)) == len(settings)
