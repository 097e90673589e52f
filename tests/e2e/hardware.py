"""The machines of the e2e cluster: two GPUs each, as a text file that the fake NVML library reads on every call."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fixtures.fake_nvml import LIBRARY, build

MIB = 1 << 20
RESERVED_MIB = 400
"""What the driver keeps of each GPU's memory."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Memory in MiB; `foreign` is used by something that is not llorch's."""

    uuid: str
    name: str
    total: int
    foreign: int = 0

    @property
    def free(self) -> int:
        """MiB that the driver calls free."""
        return self.total - RESERVED_MIB - self.foreign


WORKERS: tuple[tuple[Gpu, ...], ...] = (
    (
        Gpu("GPU-a0000000-0000-4000-8000-000000000000", "NVIDIA L4", 23_034),
        Gpu("GPU-a0000000-0000-4000-8000-000000000001", "NVIDIA L4", 23_034, foreign=16_384),
    ),
    (
        Gpu("GPU-b0000000-0000-4000-8000-000000000000", "NVIDIA A10", 24_564),
        Gpu("GPU-b0000000-0000-4000-8000-000000000001", "NVIDIA A10", 24_564),
    ),
)
"""The GPUs of the first and the second worker."""


def describe(gpus: tuple[Gpu, ...]) -> str:
    """The configuration text of these GPUs."""
    lines = [f"gpus {len(gpus)}", "driver 570.124.06", "cuda 12080"]
    for index, gpu in enumerate(gpus):
        facts = {
            "uuid": gpu.uuid,
            "name": gpu.name,
            "total": gpu.total * MIB,
            "reserved": RESERVED_MIB * MIB,
            "used": gpu.foreign * MIB,
            "cc": 89,
        }
        lines += [f"{index}.{key} {value}" for key, value in facts.items()]
    return "\n".join(lines) + "\n"


def write_fake_driver(directory: Path, gpus: tuple[Gpu, ...]) -> None:
    """The library and its configuration, to be mounted into a kind node."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / LIBRARY).unlink(missing_ok=True)  # a process that has it mapped keeps the old file
    shutil.copy(build() / LIBRARY, directory / LIBRARY)
    (directory / "gpus.conf").write_text(describe(gpus))
