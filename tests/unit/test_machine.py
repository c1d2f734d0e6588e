"""What people type for a machine."""

import json

import pytest
from conftest import need_shared

from ullage.errors import InputError
from ullage.read.machine import parse_gpu, parse_machine
from ullage.units import GiB


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "name"),
    [
        ("8xH200", 1, 8, "H200-SXM-141GB"),
        ("2x8xH20", 2, 8, "H20-96GB"),
        ("16xH100", 2, 8, "H100-SXM5-80GB"),
        ("12xH100", 1, 12, "H100-SXM5-80GB"),
        ("H100-80GB-SXM", 1, 1, "H100-SXM5-80GB"),
        ("NVIDIA H100 80GB HBM3", 1, 1, "H100-SXM5-80GB"),
        ("H100 NVL", 1, 1, "H100-NVL-94GB"),
        ("h100-96gb", 1, 1, "H100-SXM5-96GB"),
        ("H200-141GB (NVL)", 1, 1, "H200-NVL-141GB"),
        ("A100-40GB", 1, 1, "A100-SXM4-40GB"),
        ("A100-80GB-PCIe", 1, 1, "A100-PCIe-80GB"),
        ("NVIDIA A100-SXM4-80GB", 1, 1, "A100-SXM4-80GB"),
        ("GB10", 1, 1, "GB10-128GB"),
        ("4 x RTX 4090", 1, 4, "RTX-4090-24GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 1, 1, "RTX-4070TiSuper-16GB"),
        ("RTX5090-Laptop-24GB", 1, 1, "RTX-5090-Laptop-24GB"),
        ("8xMI300X", 1, 8, "MI300X-192GB"),
        ("8x910B", 1, 8, "Ascend-910B-64GB"),
    ],
)
def test_known_machines(text, nodes, per_node, name):
    machine = parse_machine(text)
    assert (machine.num_nodes, machine.gpus_per_node, machine.gpu.name) == (nodes, per_node, name)


def test_a_size_in_gib_is_taken_as_it_is():
    machine = parse_machine("4x24GiB")
    assert machine.num_gpus == 4
    assert machine.gpu.total_bytes == machine.gpu.total_low_bytes == machine.gpu.total_high_bytes == 24 * GiB


def test_a_size_as_sold_is_a_range():
    gpu = parse_gpu("80GB card")
    assert gpu.source.startswith("assumed: ")
    assert 78 * GiB < gpu.total_low_bytes < gpu.total_bytes < gpu.total_high_bytes <= 80 * GiB


def test_a_stated_total_wins():
    assert parse_gpu("22GB card (21.48 GiB)").total_bytes == int(21.48 * GiB)
    assert parse_gpu("80GB card (79.10)").total_bytes == int(79.10 * GiB)


def test_free_memory_is_not_a_total():
    assert parse_gpu("24GB card (21.63 GB free before loading)").total_high_bytes > 23 * GiB


def test_a_modded_card_keeps_its_other_facts():
    gpu, usual = parse_gpu("RTX4090-48GB"), parse_gpu("RTX4090")
    assert gpu.bandwidth_bytes_per_s == usual.bandwidth_bytes_per_s
    assert 46 * GiB < gpu.total_bytes < 48 * GiB
    assert gpu.source.startswith("assumed: ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "8x",
        "0xH100",
        "999999999xH100",
        "H300",
        "8xH9",
        "RTX5070Ti-16GB + RTX5090D-32GB",
        "a" * 300,
        "8x8x8xH100",
    ],
)
def test_what_is_not_a_machine_is_one_sentence(text):
    with pytest.raises(InputError) as caught:
        parse_machine(text)
    assert "\n" not in str(caught.value)


def test_unknown_names_get_the_nearest():
    with pytest.raises(InputError, match="H100-SXM5-80GB"):
        parse_machine("H100X")


def test_cards_of_measured_runs_are_understood():
    unknown = set()
    for line in need_shared("truth", "serving.jsonl").read_text().splitlines():
        text = json.loads(line)["job"].get("gpu")
        if not text or "+" in text:
            continue
        try:
            parse_machine(text)
        except InputError:
            unknown.add(text)
    assert unknown == set()
