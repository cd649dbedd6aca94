"""When did a rank's GPU talk, and was it computing meanwhile? From a profile of one call."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


Interval = tuple[float, float]  # milliseconds
KINDS = ("exchange", "halo", "local")


def kind_of(kernel: str) -> str:
    """Tell collectives, the fused kernels for what they bring, and everything else apart."""
    if "nccl" in kernel.lower():
        return "exchange"
    return "halo" if kernel.startswith("halo_") else "local"


class Timeline(NamedTuple):
    """When kernels of each kind ran, from the first one's start on; intervals of a kind do not touch."""

    exchange: list[Interval]
    halo: list[Interval]
    local: list[Interval]

    def milliseconds(self, kind: str) -> float:
        return sum(end - start for start, end in getattr(self, kind))

    def overlapped(self) -> float:
        """Return which part of the exchange had computation beside it, 1.0 if nothing was exchanged."""
        busy = merged([*self.halo, *self.local])
        shared = sum(max(0.0, min(end, b) - max(start, a)) for start, end in self.exchange for a, b in busy)
        total = self.milliseconds("exchange")
        return shared / total if total else 1.0


def timeline(kernels: Iterable[tuple[str, float, float]]) -> Timeline:
    """Sort kernels ``(name, start, end)`` by kind."""
    found: dict[str, list[Interval]] = {kind: [] for kind in KINDS}
    for name, start, end in kernels:
        found[kind_of(name)].append((start, end))
    origin = min((start for intervals in found.values() for start, _ in intervals), default=0.0)
    return Timeline(*(merged([(a - origin, b - origin) for a, b in found[kind]]) for kind in KINDS))


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def profile_call(call: Callable[[], object]) -> Timeline:
    """Profile what a call runs on the GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return timeline(
        (event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
        for event in profiled.events()
        # Annotations span the kernels under them, idle time included.
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
