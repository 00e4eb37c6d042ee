"""Names of devices, and the cores that they stand for."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.errors import UsageError
from shoal.jobs import devices
from shoal.jobs.devices import Device, devices_of, first_of, kind_of, memory_nodes, parse_cores, split_cores
from shoal.jobs.options import JobOptions


@pytest.mark.parametrize("text", ["tpu", "", "0,", "cuda:x", "cpu,cuda", "0,0", "0,00", "cuda:0,cpu:1", "-1"])
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="device is"):
        JobOptions(Path("in"), Path("out"), device=text)


def test_numbers_are_cards_where_there_are_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cards_there", lambda: True)
    assert kind_of("0,1") == "cuda" and kind_of("cpu:0,cpu:1") == kind_of("cpu") == "cpu"
    assert devices_of("0, 1") == [Device("cuda:0"), Device("cuda:1")] and first_of("1,0") == "cuda:1"
    assert devices_of("cuda") == [Device("cuda")] and devices_of("cuda:1") == [Device("cuda:1")]
    monkeypatch.setattr(devices, "cards_there", lambda: False)
    monkeypatch.setattr(devices, "allowed_cores", lambda: [4, 5, 6, 7])
    monkeypatch.setattr(devices, "memory_nodes", list)
    assert devices_of("0,1") == [Device("cpu", (4, 5), 2), Device("cpu", (6, 7), 2)] and first_of("0,1") == "cpu"
    assert devices_of("cpu") == [Device("cpu")], "as without the flag"
    assert JobOptions(Path("in"), Path("out"), device="0,1").engine().device == "cpu"


@given(st.sets(st.integers(0, 300), min_size=1, max_size=64), st.integers(1, 8))
def test_no_core_is_in_two_parts_and_the_parts_are_equal(allowed: set[int], parts: int) -> None:
    if parts > len(allowed):
        with pytest.raises(UsageError, match="name fewer"):
            split_cores(range(parts), sorted(allowed), [])
        return
    found = split_cores(range(parts), sorted(allowed), [])
    assert sorted(chain(*found)) == sorted(allowed)
    sizes = sorted(map(len, found))
    assert sizes[-1] - sizes[0] <= 1


def test_memory_nodes_are_the_parts_where_there_are_several() -> None:
    nodes = [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert split_cores([1, 0], range(8), nodes) == [(4, 5, 6, 7), (0, 1, 2, 3)]
    assert split_cores([0, 1], [0, 1, 2], nodes) == [(0,), (1, 2)], "only one of them may be used"
    assert split_cores([0, 1], [1, 4], nodes) == [(1,), (4,)]
    assert split_cores([0, 1, 2, 3], range(8), nodes) == [(0, 1), (2, 3), (4, 5), (6, 7)], "more than there are nodes"
    assert split_cores([0, 1], range(4), nodes[:1]) == [(0, 1), (2, 3)]


def test_the_system_says_which_cores_a_node_has(tmp_path: Path) -> None:
    assert parse_cores("0-3,8\n") == (0, 1, 2, 3, 8) and parse_cores("\n") == ()
    for number, cores in ((0, "0-1"), (2, "2-3")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(cores + "\n")
    assert memory_nodes(tmp_path) == [(0, 1), (), (2, 3)]
    assert memory_nodes(tmp_path / "none") == []
