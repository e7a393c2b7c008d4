"""Hardware files: those that come with the package, what is refused, and how times are read off them."""

import re
from pathlib import Path

import pytest

from moe_dist.plan.hardware import Curve, Link, Memory, Products, dump_hardware, load_hardware
from tests.unit.plan.toys import toy_hardware

SHIPPED = Path("configs/hardware")
PLAIN = """
name: mine
device: cpu
source: measured
origin: [by hand]
ranks_per_node: 2
memory: {bytes: 1000, bandwidth: 1e9}
products: {fp32: {peak: 1e9}}
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_files_that_come_along_load_and_say_what_is_assumed(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.source == "datasheet" and hardware.device == "cuda"
    assert any("datasheet" in line for line in hardware.origin) and any("ASSUMED" in line for line in hardware.origin)
    assert {"bf16", "fp32"} <= hardware.products.keys()
    assert hardware.peak("bf16") > hardware.peak("fp32")
    # What is inside of a node is faster than a rank's part of what is between.
    assert hardware.link("inside").bandwidth > hardware.link("between").bandwidth / hardware.ranks_per_node


def test_all_four_come_along() -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {"a100", "b200", "h100", "h200"}


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    curve = Curve(ranks=2, seconds=[(10.0, 0.5), (20.0, 1.0)])
    hardware = toy_hardware(inside=Link(bandwidth=1.5, latency=0.0, curves={"all_reduce": curve}), between=None)
    assert load_hardware(written(tmp_path, dump_hardware(hardware))) == hardware
    assert load_hardware(written(tmp_path, PLAIN)).name == "mine"


@pytest.mark.parametrize(
    ("changed", "to", "said"),
    [
        ("ranks_per_node: 2", "ranks_per_nod: 2", "ranks_per_nod: unknown key; did you mean ranks_per_node?"),
        ("bytes: 1000", "bytes: many", "memory.bytes: 'many' is not an integer"),
        ("source: measured", "source: heard", "source: 'heard' is not one of"),
        ("bandwidth: 1e9", "bandwidth: 0", "memory.bandwidth: 0.0 is not above 0"),
        ("ranks_per_node: 2", "ranks_per_node: 0", "ranks_per_node: 0 is not above 0"),
        ("{peak: 1e9}", "{peak: 1e9, reached: 1.5}", "products.fp32.reached: 1.5 is outside 0 < share <= 1"),
        ("{peak: 1e9}", "{peak: 1e9, attention: 0}", "products.fp32.attention: 0.0 is outside 0 < share <= 1"),
        ("fp32: {", "fp64: {", "products.fp64: is none of fp32, bf16, fp8"),
        ("{fp32: {peak: 1e9}}", "{}", "products: says nothing; give fp32, bf16 or fp8"),
        ("bytes: 1000", "bytes: 1000, reserved: 1000", "memory.reserved: 1000 is not below memory.bytes=1000"),
        ("{peak: 1e9}", "{peak: 1e9, rates: [[1, 2, 3], [1, 4, 3], [2, 2, 3]]}", "products.fp32.rates: is no grid"),
        ("{peak: 1e9}", "{peak: 1e9, rates: [[0, 2, 3]]}", "products.fp32.rates: 0.0 is not above 0"),
        ("bytes: 1000", "bytes: 1000, rates: [[0, 2], [1, 2]]", "memory.rates: 0.0 is not above 0"),
        ("name:", "host: {step: -1}\nname:", "host.step: -1.0 is below 0"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path: Path, changed: str, to: str, said: str) -> None:
    path = written(tmp_path, PLAIN.replace(changed, to))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {said}")):
        load_hardware(path)


def test_wrong_links_are_refused_by_name(tmp_path: Path) -> None:
    links = "inside: {bandwidth: 1, latency: -1, curves: {all_reduce: {ranks: 2, seconds: [[2, 1], [1, 1]]}}}\n"
    with pytest.raises(ValueError) as caught:
        load_hardware(written(tmp_path, PLAIN + links))
    assert "inside.latency: -1.0 is below 0" in str(caught.value)
    assert "inside.curves.all_reduce.seconds: sizes must grow, got [2.0, 1.0]" in str(caught.value)


@pytest.mark.parametrize(
    ("of_link", "said"),
    [
        ("curves: {all_reduce: {ranks: 2, seconds: [[0, 1]]}}", "curves.all_reduce.seconds: 0.0 is not above 0"),
        ("curves: {all_reduce: {ranks: 2, seconds: [[8, -1]]}}", "curves.all_reduce.seconds: -1.0 is not above 0"),
        ("curves: {all_reduce: {ranks: 0, seconds: [[8, 1]]}}", "curves.all_reduce.ranks: 0 is not above 0"),
        ("curves: {gossip: {ranks: 2, seconds: [[8, 1]]}}", "curves.gossip: is none of all_reduce, all_gather"),
        ("reached: {all-reduce: 0.5}", "reached.all-reduce: is none of all_reduce, all_gather"),
    ],
)
def test_wrong_measurements_of_links_are_refused_by_name(tmp_path: Path, of_link: str, said: str) -> None:
    path = written(tmp_path, PLAIN + f"between: {{bandwidth: 1, latency: 1, {of_link}}}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: between.{said}")):
        load_hardware(path)


def test_a_name_that_is_none_is_told_those_that_are() -> None:
    with pytest.raises(
        ValueError, match=r"--hardware 'h300' is none of a100, b200, h100, h200; give one of them or the"
    ):
        load_hardware("h300")
    with pytest.raises(ValueError, match=r"nowhere/x\.yaml: no such file"):
        load_hardware("nowhere/x.yaml")


def test_a_product_takes_its_slower_roof() -> None:
    """[100, 10] x [10, 20] on 4 matrices: 40,000 FLOPs; 4 * (4 * 200 + 100 * 30) = 15,200 bytes."""
    fast = toy_hardware(peak=1e3, bandwidth=1e9)
    assert fast.product_seconds("fp32", 100, 10, 20, 4) == pytest.approx(40.0)
    narrow = toy_hardware(peak=1e9, bandwidth=100.0)
    assert narrow.product_seconds("fp32", 100, 10, 20, 4) == pytest.approx(152.0)
    half = toy_hardware(products={"fp32": Products(peak=1e3, reached=0.5, attention=0.25)})
    assert half.product_seconds("fp32", 100, 10, 20) == pytest.approx(80.0)
    assert half.attention_seconds("fp32", 1e3) == pytest.approx(4.0)


def test_measured_products_are_read_between_sizes() -> None:
    """Rates of 100 and 200 at 1 and 4 rows: 150 at 2, halfway in the logarithm; twice that at sides four times as long,
    and a half more on the way. Rows are those of a group; outside the grid its edge."""
    rates = [(1.0, 1.0, 100.0), (4.0, 1.0, 200.0), (1.0, 4.0, 200.0), (4.0, 4.0, 400.0)]
    hardware = toy_hardware(products={"fp32": Products(peak=400.0, rates=rates)})

    def rate(rows: float, side: float, groups: int = 1) -> float:
        return 2 * rows * side * side / hardware.product_seconds("fp32", rows, side, side, groups)

    assert [rate(2, 1), rate(8, 1, groups=4), rate(2, 2), rate(0.1, 9)] == pytest.approx([150, 150, 225, 200])


def test_measured_copies_are_read_between_sizes() -> None:
    hardware = toy_hardware(memory=Memory(bytes=1, bandwidth=9.0, rates=[(10.0, 4.0), (1000.0, 2.0)]))
    assert hardware.memory_seconds(100.0) == pytest.approx(100 / 3)
    assert hardware.memory_seconds(1.0, times=3) == pytest.approx(3 / 4)
    assert hardware.memory_seconds(1e6) == pytest.approx(5e5)


def test_links_by_datasheet_and_by_measurement() -> None:
    link = Link(bandwidth=100.0, latency=1.0, reached={"all_reduce": 0.5, "all_to_all": 0.25})
    assert link.seconds("all_to_all", 100.0, 8) == pytest.approx(3 + 4)
    assert link.seconds("all_gather", 100.0, 2) == pytest.approx(1 + 2)
    link.curves = {
        "all_reduce": Curve(ranks=4, seconds=[(10.0, 1.0), (20.0, 2.0)]),
        "all_to_all": Curve(ranks=4, seconds=[(10.0, 3.0)]),
    }
    # Below the smallest as long as it, between on a line, above in proportion.
    assert [link.seconds("all_gather", sent, 4) for sent in (1.0, 15.0, 40.0)] == pytest.approx([1.0, 1.5, 4.0])
    assert link.seconds("all_to_all", 20.0, 4) == pytest.approx(6.0)
    # 16 ranks are twice as many hops as 4, 2 ranks half as many: so much more or less of the smallest message.
    assert [link.seconds("all_reduce", 20.0, ranks) for ranks in (16, 2)] == pytest.approx([3.0, 1.5])
