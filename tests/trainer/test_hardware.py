"""Known accelerators, and the devices that the command line names."""

import pytest

from trainer.hardware import ACCELERATORS, GIB, Hardware, assumed_hardware, find_accelerator


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "name"),
    [
        ("8xh100", 1, 8, "h100"),
        ("2x8xH100", 2, 8, "h100"),
        ("8xascend910b", 1, 8, "ascend910b"),
        ("1xa100-40", 1, 1, "a100-40"),
    ],
)
def test_devices_are_named_by_hosts_count_and_name(text: str, nodes: int, per_node: int, name: str) -> None:
    found, row = assumed_hardware(text), ACCELERATORS[name]
    assert found == Hardware(row.kind, nodes, per_node, row.memory, name, row.peak_flops)
    assert found.count == nodes * per_node


@pytest.mark.parametrize("text", ["h100", "0xh100", "8xh99", "8 x h100", "x8xh100", "2x2x8xh100", "8xh100\n"])
def test_other_forms_and_names_are_one_line_with_the_remedy(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--assume: .* is not \[NODESx\]COUNTxNAME, such as 8xh100 .*correct it$"):
        assumed_hardware(text)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Ascend910B3", "ascend910b"),
        ("NVIDIA H20", "h20"),
        ("Tesla T4", None),
    ],
)
def test_what_a_driver_reports_is_recognised(reported: str, name: str | None) -> None:
    assert find_accelerator(reported) == name


def test_tensors_may_take_what_libraries_and_fragmentation_leave() -> None:
    """4 % and 1 GiB of a device; a rank on CPU has its process counted in what it needs."""
    assert Hardware("cuda", 1, 1, 80 * GIB).usable == pytest.approx(75.8 * GIB)
    assert Hardware("cpu", 1, 1, 80 * GIB).usable == 80 * GIB
