from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.errors import ConfigError
from ckptd.shm.memory import available_bytes, choose_slots
from ckptd.units import MIB

GIB = 1024 * MIB


class Machine:
    """Files as the kernel shows them, under a temporary directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("meminfo", f"MemTotal: {8 << 20} kB\nMemAvailable: {4 << 20} kB\n")

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def available(self) -> int:
        r = self.root
        return available_bytes(str(r / "meminfo"), str(r / "membership"), str(r / "cgroup"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_cgroups_it_is_what_the_machine_has(machine: Machine) -> None:
    assert machine.available() == 4 * GIB


def test_m4_a_cgroup_limit_counts_without_page_cache(machine: Machine) -> None:
    machine.write("membership", "0::/job/rank")
    machine.write("cgroup/job/rank/memory.max", 2 * GIB)
    machine.write("cgroup/job/rank/memory.current", GIB)
    machine.write("cgroup/job/rank/memory.stat", f"anon 5\ninactive_file {512 * MIB}")
    assert machine.available() == GIB + 512 * MIB


def test_m4_a_limit_of_a_cgroup_above_counts_too(machine: Machine) -> None:
    machine.write("membership", "0::/job/rank")
    machine.write("cgroup/job/rank/memory.max", "max")
    machine.write("cgroup/job/rank/memory.current", MIB)
    machine.write("cgroup/job/memory.max", GIB)
    machine.write("cgroup/job/memory.current", 256 * MIB)
    assert machine.available() == 768 * MIB


def test_m4_inside_a_container_the_top_folder_is_its_own(machine: Machine) -> None:
    machine.write("membership", "0::/../../kubepods/pod1")
    machine.write("cgroup/memory.max", GIB)
    machine.write("cgroup/memory.current", 0)
    assert machine.available() == GIB


def test_m4_version_1_limits_count(machine: Machine) -> None:
    machine.write("membership", "5:cpu,cpuacct:/x\n4:memory:/docker/abc")
    machine.write("cgroup/memory/memory.limit_in_bytes", 3 * GIB)
    machine.write("cgroup/memory/memory.usage_in_bytes", 2 * GIB)
    machine.write("cgroup/memory/memory.stat", f"inactive_file 7\ntotal_inactive_file {MIB}")
    assert machine.available() == GIB + MIB


def test_version_1_writes_a_huge_number_for_no_limit(machine: Machine) -> None:
    machine.write("membership", "4:memory:/")
    machine.write("cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    machine.write("cgroup/memory/memory.usage_in_bytes", 0)
    assert machine.available() == 4 * GIB


def test_a_cgroup_over_its_limit_leaves_nothing(machine: Machine) -> None:
    machine.write("membership", "0::/")
    machine.write("cgroup/memory.max", GIB)
    machine.write("cgroup/memory.current", 2 * GIB)
    assert machine.available() == 0


@pytest.mark.parametrize("text", ["", "nonsense", "0", "::", "\ufffd:memory", "9:memory"])
def test_a_membership_that_cannot_be_read_counts_for_nothing(machine: Machine, text: str) -> None:
    machine.write("membership", text)
    assert machine.available() == 4 * GIB


def test_without_meminfo_it_is_the_memory_of_the_machine(tmp_path: Path) -> None:
    nothing = str(tmp_path / "x")
    assert available_bytes(nothing, nothing, nothing) > MIB


def test_the_real_machine_has_some_left() -> None:
    assert available_bytes() > MIB


# --- how many slots ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slot_gib", "ranks", "slots"), [(1, 1, 2), (3, 1, 2), (4, 1, 1), (6, 1, 1), (1, 2, 2), (1, 5, 1)]
)  # fmt: skip
def test_auto_is_two_slots_if_they_fit_in_sixty_percent_else_one(
    slot_gib: int, ranks: int, slots: int
) -> None:
    assert choose_slots(slot_gib * GIB, "auto", ranks, 10 * GIB) == slots


def test_p3_auto_says_the_figures_where_nothing_fits() -> None:
    with pytest.raises(ConfigError, match=r"7\.0 GiB per rank.*10\.0 GiB.*6\.0 GiB.*slots=1"):
        choose_slots(7 * GIB, "auto", 1, 10 * GIB)
    with pytest.raises(ConfigError) as caught:
        choose_slots(11 * GIB, "auto", 1, 10 * GIB)
    assert "slots=1" not in str(caught.value)


def test_a_number_is_taken_as_it_is_if_it_fits() -> None:
    assert choose_slots(3 * GIB, 3, 1, 10 * GIB) == 3
    with pytest.raises(ConfigError, match=r"3\.0 GiB.*10\.0 GiB"):
        choose_slots(3 * GIB, 4, 1, 10 * GIB)
    with pytest.raises(ConfigError, match=r"2 ranks"):
        choose_slots(3 * GIB, 2, 2, 10 * GIB)


@pytest.mark.parametrize("wanted", [0, -1])
def test_no_slots_at_all_is_refused(wanted: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        choose_slots(GIB, wanted, 1, 10 * GIB)
