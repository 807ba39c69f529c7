"""What this machine has: memory, and which kind of device would train. torch is asked only for a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

from veneer.errors import ConfigError

__all__ = ["free_memory", "total_memory", "usual_device"]

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CGROUP_USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def usual_device() -> str:
    """cuda where there is a GPU, else cpu. torch is asked only if it is imported already, since that costs nothing."""
    torch = sys.modules.get("torch")
    there = torch.cuda.is_available() if torch is not None else Path("/dev/nvidia0").exists()
    return "cuda" if there else "cpu"


def free_memory(device: str = "cpu") -> int:
    """Bytes that a new process could take: of RAM within the container's limit, or of the GPU."""
    if device.startswith("cuda"):
        return _cuda(device)[0]
    free = _meminfo("MemAvailable")
    limit, used = _number(CGROUP_LIMITS), _number(CGROUP_USED)
    return min(free, max(0, limit - used)) if limit is not None and used is not None else free


def total_memory(device: str = "cpu") -> int:
    """Bytes there are, used or not."""
    if device.startswith("cuda"):
        return _cuda(device)[1]
    limit = _number(CGROUP_LIMITS)
    return min(_meminfo("MemTotal"), limit) if limit is not None else _meminfo("MemTotal")


def _cuda(device: str) -> tuple[int, int]:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"there is no GPU for {device!r}", fix="give the memory yourself, as in memory='24GB'")
    return torch.cuda.mem_get_info(device)


def _meminfo(field: str) -> int:
    path = Path("/proc/meminfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    from os import sysconf  # macOS and others: all of the memory, since nothing says what is free

    return sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES")


def _number(paths: tuple[str, ...]) -> int | None:
    for path in map(Path, paths):
        try:
            return int(path.read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None
