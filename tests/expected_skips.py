"""Why a test may be skipped: a run in which one is skipped for another reason fails, so nothing is skipped quietly."""

import re


EXPECTED_SKIPS = (
    # What this machine is not.
    r"needs a CUDA device; torch\.cuda\.is_available\(\) is False",
    r"shows the refusal on machines without CUDA",
    r"this machine has CUDA: the triton backend may run",
    r"needs \d+ GB of free GPU memory",
    r"needs \d+ CUDA devices, found \d+",
    r"needs Linux with glibc: .*",
    r"torch\.compile's own backend needs a C\+\+ compiler",
    r"torch was built without distributed",
    # What is not installed with `.[test]`; other targets of the Makefile install it.
    r"triton is not installed",
    r"liger-kernel is not installed",
    r"could not import '(bitsandbytes|deepspeed|trl)': .*",
    r'loss_implementation="liger" (cannot import|runs on CUDA).*',
    # Versions.
    r'loss_implementation="torch" needs torch 2\.13 or newer, .*',
    r"the interpreter of triton .* does not know numpy .*",
    r"triton .* has another specializer than 3\.6",
    # Fused kernels that leave a drawn case to the portable ones, which are tested on it beside them.
    r"the portable kernels take this: .*",
)


def is_expected(reason: str) -> bool:
    """Say whether tests may be skipped for this reason."""
    reason = reason.removeprefix("Skipped: ")
    return any(re.fullmatch(pattern, reason, flags=re.DOTALL) for pattern in EXPECTED_SKIPS)
