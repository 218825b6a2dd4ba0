"""The commands of the speed benchmarks run, and what they compare is the same."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from tests.commands import run, script


@pytest.mark.parametrize(
    "command",
    ["patterns --lengths 24 --width 64 --layers 1", "products --length 12 --layers 1 --count 2"],
)
def test_two_ways_give_the_same_products(command, capsys):
    rows = re.findall(r"^\| \d.*", run("benchmarks.heta_speed", command, capsys), re.MULTILINE)
    assert rows and all(float(row.split("|")[-2]) < 1e-4 for row in rows)


def test_throughput_and_a_long_text(capsys):
    assert "ratio" in run("benchmarks.heta_speed", "throughput --length 24 --width 64 --layers 1", capsys)
    out = run("benchmarks.heta_speed", "long --length 96 --width 64 --layers 1 --rank 2", capsys)
    assert "20 products" in out and "GiB" in out


def test_batches_beside_one_by_one(capsys):
    command = "--texts 3 --length 24 --methods flashtrace --repeats 1"
    rows = re.findall(r"^\| [bl].* \| flashtrace \|.*", run("benchmarks.batch_speed", command, capsys), re.MULTILINE)
    assert len(rows) == 4


def test_flashtrace_beside_the_authors_package(capsys):
    out = run("benchmarks.flashtrace_speed", "--lengths 128 --repeats 1 --width 64 --layers 1 --no-memory", capsys)
    rows = re.findall(r"^\| \d.*", out, re.MULTILINE)
    assert len(rows) == 2 and all(float(row.split("|")[-2]) < 1e-3 for row in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("benchmarks.memory", ("llama", "half of all", 160)),
        ("benchmarks.lens_memory", ("lens", 160)),
        ("benchmarks.lens_memory", ("cache", 160)),
    ],
)
def test_one_part_of_a_memory_benchmark_prints_two_numbers(module, arguments, capsys):
    if "lens" in module:
        pytest.importorskip("transformer_lens")
    threads = torch.get_num_threads()
    script(module).measure(*arguments)
    torch.set_num_threads(threads)
    assert len([float(number) for number in capsys.readouterr().out.split()]) == 2


def test_graphs_beside_the_forward_pass(capsys):
    command = "--methods flashtrace,lrp --lengths 256 --steps 4 --repeats 1 --width 64 --layers 1 --no-memory"
    rows = re.findall(r"^\| [fl]\w+ \|.*", run("benchmarks.graph_speed", command, capsys), re.MULTILINE)
    assert [row.split()[1] for row in rows] == ["flashtrace", "lrp"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_scale_measures_a_method_and_fits_a_line():
    threads, scale = torch.get_num_threads(), script("benchmarks.scale")
    assert all(value > 0 for value in scale.times("flashtrace", 300, 256, 1))
    assert scale.memory("lrp", 300, 256, 1) >= 0
    torch.set_num_threads(threads)
    assert scale.line([1024, 2048, 4096], [3, 5, 9.3]) == "1 MiB + 2.11 KiB per token, largest residual 0.1 MiB"
