"""Measure everything that the README states about GPUs, with one command, on however many GPUs this machine has.

The steps below run in their order, those of one GPU side by side. A step that would end after ``--minutes`` is not
begun, one that takes longer than it is given is ended. What each printed is in ``OUTPUT/NAME.log``, how it ended in
``OUTPUT/run_all.json``; given the same folder again, the command goes on with the steps that have not ended well.

    PYTHONPATH=. python benchmarks/run_all.py --output FOLDER
    PYTHONPATH=. python benchmarks/run_all.py --output FOLDER --minutes 25 --steps tests attention training
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


HERE = Path(__file__).parent
ROOT = HERE.parent
GRACE = 10.0  # seconds that a step has to end by itself


class Step(NamedTuple):
    """A command, where ``{output}``, ``{gpus}`` and ``{seconds}`` (what it is given, less a minute) are filled in.

    ``seconds``: what it takes at most. ``until_end``: it is given all time that is left, and takes so much at least.
    ``all_gpus``: it needs them all at once, and more than one. ``needs``: a package that may not be installed.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    until_end: bool = False
    all_gpus: bool = False
    needs: str | None = None


def _script(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE / f"{name}.py"), *arguments)


def _ranks(*arguments: str) -> tuple[str, ...]:
    # By number: not every machine can look up its own name.
    address = ("--master-addr", "127.0.0.1", "--master-port", "29511")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "{gpus}", *address)
    script = str(HERE / "benchmark_sequence_parallel.py")
    return (*launcher, script, "--output", "{output}", "--limit", "{seconds}", *arguments)


QUALITY = _script(
    "retrofit_quality", "--work", "{output}/quality", "--output", "{output}", "--pretrain-seconds", "300",
    "--limit", "{seconds}",
)  # fmt: skip
STEPS = [
    Step("ranks_check", _ranks("--stages", "check"), 150, all_gpus=True),
    Step("ranks_paper", _ranks("--presets", "paper"), 200, all_gpus=True),
    Step("ranks_retrofit", _ranks("--presets", "retrofit"), 200, all_gpus=True),
    Step("ranks_longest", _ranks("--stages", "longest", "--presets", "paper"), 240, all_gpus=True),
    Step("quality", QUALITY, 900, until_end=True),
    Step(
        "tests",
        # pytest-benchmark, where it is installed, warns beside xdist, and warnings are errors.
        (
            sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:benchmark",
            "-n", "12", str(ROOT / "tests"),
        ),
        420, needs="xdist",
    ),
    Step("attention", _script("benchmark_attention", "--output", "{output}"), 600),
    Step("power", _script("attention_power", "--output", "{output}"), 150, needs="pynvml"),
    Step(
        "training",
        _script("benchmark_training", "--liger", "--limit", "{seconds}", "--output", "{output}"),
        420, needs="liger_kernel",
    ),
    Step("generation", _script("benchmark_generation", "--results", "{output}"), 240),
    Step(
        "generation_liger", _script("benchmark_generation", "--liger", "--results", "{output}"), 240,
        needs="liger_kernel",
    ),
    Step("decoding", _script("profile_decoding"), 120),
    Step("quality_beside", QUALITY, 120, until_end=True),
]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of tables, plots and logs")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS])
    return parser.parse_args()


class Running(NamedTuple):
    """A step under way."""

    step: Step
    process: subprocess.Popen
    gpus: tuple[int, ...]
    began: float
    seconds: float


class Runner:
    """Runs steps on GPUs, each GPU for one step at a time.

    Args:
        steps: in the order in which they begin.
        num_gpus: how many GPUs there are.
        output: folder of what the steps write.
        seconds: how long all of it may take.
    """

    def __init__(self, steps: Sequence[Step], num_gpus: int, output: Path, seconds: float):
        self.waiting, self.gpus = list(steps), tuple(range(num_gpus))
        self.output, self.end = output, time.monotonic() + seconds
        self.running: list[Running] = []
        output.mkdir(parents=True, exist_ok=True)
        self.record_path = output / "run_all.json"
        self.record = json.loads(self.record_path.read_text()) if self.record_path.exists() else {}

    def run(self) -> bool:
        """Run all steps; whether all of them ended well, now or before."""
        names = [step.name for step in self.waiting]
        try:
            while self.waiting or self.running:
                self._begin_what_fits()
                time.sleep(0.2)
                self._collect()
        finally:
            for running in self.running:
                _end(running.process)
        return all(self.record[name] == "passed" for name in names)

    def _begin_what_fits(self) -> None:
        while self.waiting:
            step = self.waiting[0]
            free = [gpu for gpu in self.gpus if all(gpu not in running.gpus for running in self.running)]
            left = self.end - time.monotonic()
            if self.record.get(step.name) == "passed":
                print(f"{step.name}: has passed before", flush=True)
            elif refusal := self._refusal(step, left):
                self._note(step.name, f"not begun: {refusal}")
            elif len(free) < (len(self.gpus) if step.all_gpus else 1):
                return
            else:
                self._begin(step, tuple(free) if step.all_gpus else (free[0],), left)
            self.waiting.pop(0)

    def _refusal(self, step: Step, left: float) -> str | None:
        if step.all_gpus and len(self.gpus) < 2:
            return "it needs several GPUs"
        if step.needs and importlib.util.find_spec(step.needs) is None:
            return f"{step.needs} is not installed"
        if step.seconds > left:
            return f"it may take {step.seconds:.0f} s, {max(left, 0):.0f} s are left"
        return None

    def _begin(self, step: Step, gpus: tuple[int, ...], left: float) -> None:
        seconds = left if step.until_end else step.seconds
        values = {"output": self.output, "gpus": len(gpus), "seconds": max(30, int(seconds) - 60)}
        command = [part.format(**values) for part in step.command]
        log = (self.output / f"{step.name}.log").open("w")
        print(f"$ {' '.join(command)}", file=log, flush=True)
        paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        log.close()
        self.running.append(Running(step, process, gpus, time.monotonic(), seconds))
        print(f"{step.name}: begun on GPU {', '.join(map(str, gpus))}", flush=True)

    def _collect(self) -> None:
        for running in list(self.running):
            step, code, took = running.step, running.process.poll(), time.monotonic() - running.began
            if code is None and took > running.seconds:
                _end(running.process)
                self._note(step.name, f"ended after {took:.0f} s, which is all it was given")
            elif code is not None:
                self._note(step.name, "passed" if code == 0 else f"failed with exit code {code} after {took:.0f} s")
            else:
                continue
            self.running.remove(running)

    def _note(self, name: str, outcome: str) -> None:
        self.record[name] = outcome
        part = self.record_path.with_suffix(".part")
        part.write_text(json.dumps(self.record, indent=1))
        part.replace(self.record_path)
        print(f"{name}: {outcome}", flush=True)


def _end(process: subprocess.Popen) -> None:
    """Ask a step and all its processes to end, then make them."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def main() -> int:
    import torch

    args = arguments()
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        raise SystemExit("no CUDA device; the benchmarks' --small options test their paths without one")
    steps = [step for step in STEPS if args.steps is None or step.name in args.steps]
    return 0 if Runner(steps, num_gpus, args.output.resolve(), 60 * args.minutes).run() else 1


if __name__ == "__main__":
    sys.exit(main())
