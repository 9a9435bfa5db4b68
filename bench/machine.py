"""Say what the figures depend on: the machine, its disk, and what else it was doing."""

import contextlib
import os
import platform
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

APPEND = """
import os, statistics, sys, time
times = []
with open(sys.argv[1], "wb", buffering=0) as file:
    for _ in range(200):
        file.write(bytes(4096))
        began = time.perf_counter()
        os.fdatasync(file.fileno())
        times.append(time.perf_counter() - began)
print(statistics.median(times) * 1000)
"""


def describe_machine(folder: Path, shim: Path) -> dict[str, str]:
    """Return the properties of this machine, by name."""
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    software = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    packages = "".join(f", {name} {version(name)}" for name in ("flask", "gunicorn"))
    usual, slow = time_fsync(folder), time_fsync(folder, {"LD_PRELOAD": str(shim)})
    return {
        "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "CPU": f"{cpu[1] if cpu else platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "Memory": f"{memory:.1f} GiB",
        "Kernel": f"{platform.system()} {platform.release()}",
        "Software": software + packages,
        "File system": file_system(folder),
        "fdatasync of 4 KiB, idle": f"{usual:.2f} ms; with the shim {slow:.2f} ms",
    }


@contextlib.contextmanager
def watch_others(machine: dict[str, str]) -> Iterator[None]:
    """Note how busy the machine is before the block, and what others take during it."""
    machine["Load before the start"] = f"{os.getloadavg()[0]:.2f}, average of a minute"
    before, own = cpu_ticks(), sum(os.times()[:4])
    yield
    spent = [now - then for now, then in zip(cpu_ticks(), before, strict=True)]
    own = (sum(os.times()[:4]) - own) * os.sysconf("SC_CLK_TCK")
    others = sum(spent[:3]) + sum(spent[5:7]) - own
    machine["Taken during the run"] = (
        f"{max(0, others) / sum(spent):.0%} of the CPU time by other processes and "
        f"the kernel, {spent[7] / sum(spent):.1%} by other virtual machines"
    )


def cpu_ticks() -> list[int]:
    """Return ticks: user, nice, system, idle, waiting for the disk, two of interrupts, steal."""
    first, *_ = Path("/proc/stat").read_text().splitlines()
    return [int(ticks) for ticks in first.split()[1:9]]


def file_system(folder: Path) -> str:
    """Return the type of the file system that holds `folder`."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(above)[1]


def time_fsync(folder: Path, environ: dict[str, str] | None = None) -> float:
    """Return the median milliseconds of appending 4 KiB durably, in a process of its own."""
    command = [sys.executable, "-c", APPEND, str(folder / "probe")]
    return float(subprocess.check_output(command, env=os.environ | (environ or {}), timeout=60))
