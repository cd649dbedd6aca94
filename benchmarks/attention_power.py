"""What do attention kernels make of the watts that a card may draw? Sustained rates, clocks and power, side by side.

A card that multiplies matrices without a pause draws all the power that it may, and lowers its clock until that
suffices: rates of long runs are then a matter of energy per product, not of idle tensor cores. Each pass is repeated
without a pause for ``--seconds`` while clock, power and the driver's reasons for a lower clock are sampled; the first
half is not looked at. ``rested``: the rate of calls in the first ``RESTED_MS`` after a pause. ``tensor_cores``: the share
of what they could do at the sustained clock that goes into useful products; a backward of five products (``paper``)
spends all of its products on them, one of seven (``retrofit``) ten of fourteen. ``capped``: the share of the samples in
which the driver names the power limit. A product of two large matrices of the same kind stands beside them.

    PYTHONPATH=. python benchmarks/attention_power.py
"""

import argparse
import csv
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from benchmark_attention import PRESETS, dense, fused, geometric_pattern, queued_ms, random_tensors
from torch import Tensor


HEADS = 16
MATRIX = 8192
RESTED_MS = 20.0
PAUSE_SECONDS = 1.0
SAMPLE_SECONDS = 0.02
FLOPS_PER_CLOCK = {(9, 0): 4096}  # of a processor's tensor cores, bfloat16, by compute capability
COLUMNS = (
    "what", "pass", "length", "head_dim", "rested_tflops", "tflops", "watts", "limit_watts", "mhz", "tensor_cores",
    "capped",
)  # fmt: skip


class Sampler:
    """Reads clock, power and whether the power limit lowers the clock, again and again, while it is entered."""

    def __init__(self) -> None:
        """Find the card that torch uses."""
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        self.limit_watts = pynvml.nvmlDeviceGetEnforcedPowerLimit(self._card) / 1000

    def __enter__(self) -> "Sampler":
        """Begin."""
        self.samples: list[tuple[float, float, bool]] = []  # MHz, W
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        nvml, card = self._nvml, self._card
        while not self._over.wait(SAMPLE_SECONDS):
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(card)
            (power,) = nvml.nvmlDeviceGetFieldValues(card, [nvml.NVML_FI_DEV_POWER_INSTANT])
            self.samples.append(
                (
                    nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
                    power.value.uiVal / 1000,
                    bool(reasons & nvml.nvmlClocksEventReasonSwPowerCap),
                )
            )

    def settled(self) -> tuple[float, float, float]:
        """Return the median clock and power of the second half, and the share of it that was capped."""
        clocks, watts, capped = zip(*self.samples[len(self.samples) // 2 :])
        return statistics.median(clocks), statistics.median(watts), statistics.mean(capped)


def measure(call: Callable[[], object], flops: float, sampler: Sampler, seconds: float) -> dict[str, float]:
    """Return a row's numbers of one call of so many useful FLOPs."""
    call()
    (once,) = queued_ms(call, 1)
    torch.cuda.synchronize()
    time.sleep(PAUSE_SECONDS)
    rested = statistics.median(queued_ms(call, max(1, round(RESTED_MS / once))))
    at_once = max(1, round(500 / once))
    times = []
    began = time.perf_counter()
    with sampler:
        while time.perf_counter() < began + seconds:
            times += queued_ms(call, at_once)
    clock, watts, capped = sampler.settled()
    tflops = flops / statistics.median(times[len(times) // 2 :]) / 1e9
    card = torch.cuda.get_device_properties()
    per_clock = FLOPS_PER_CLOCK.get((card.major, card.minor))
    peak = per_clock and card.multi_processor_count * per_clock * clock / 1e6
    return {
        "rested_tflops": round(flops / rested / 1e9, 1), "tflops": round(tflops, 1), "watts": round(watts),
        "limit_watts": round(sampler.limit_watts), "mhz": round(clock),
        "tensor_cores": round(tflops / peak, 3) if peak else "", "capped": round(capped, 2),
    }  # fmt: skip


def passes(
    attention: Callable[..., Tensor], tensors: list[Tensor]
) -> Iterator[tuple[str, Callable[[], object], float]]:
    """Yield each pass alone: its name, a call, and its share of the FLOPs of forward and backward."""
    *inputs, do = tensors
    yield "forward", torch.no_grad()(lambda: attention(*inputs)), 2 / 7
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves)
    yield "backward", lambda: torch.autograd.grad(out, leaves, do, retain_graph=True), 5 / 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**15, 2**17])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--seconds", type=float, default=3.0, help="that each pass is repeated")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device; this measures what an NVIDIA GPU draws")
    try:
        sampler = Sampler()
    except ImportError:
        raise SystemExit("clocks and power are read with nvidia-ml-py: pip install nvidia-ml-py") from None

    card = torch.cuda.get_device_name()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"attention_power_{card.replace(' ', '-')}_{datetime.now(UTC):%Y-%m-%d}.csv"
    with path.open("w", newline="") as file:
        import triton

        file.write(f"# {card}, torch {torch.__version__}, triton {triton.__version__}, bf16, causal, medians\n")
        file.write(f"# python {' '.join(sys.argv)}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()

        def record(what: str, pass_: str, length: int, head_dim: int, numbers: dict[str, float]) -> None:
            row = {"what": what, "pass": pass_, "length": length, "head_dim": head_dim, **numbers}
            writer.writerow(row)
            file.flush()
            print(*(row[column] for column in COLUMNS), sep="\t", flush=True)

        print(*COLUMNS, sep="\t")
        a, b = torch.randn(2, MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)
        record("matrix product", "", MATRIX, 0, measure(lambda: a @ b, 2 * MATRIX**3, sampler, arguments.seconds))
        for head_dim in arguments.head_dims:
            for length in arguments.lengths:
                tensors = random_tensors(1, length, HEADS, HEADS, head_dim)
                attentions = {"dense cudnn": (dense("cudnn"), 14 * HEADS * head_dim * length * (length + 1) / 2)}
                for preset in PRESETS:
                    pattern = geometric_pattern(length, preset)
                    flops = pattern.attention_flops(length, HEADS, head_dim) * 7 / 2
                    attentions[preset] = fused(pattern), flops
                for name, (attention, flops) in attentions.items():
                    for pass_, call, share in passes(attention, tensors):
                        numbers = measure(call, flops * share, sampler, arguments.seconds)
                        record(name, pass_, length, head_dim, numbers)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
