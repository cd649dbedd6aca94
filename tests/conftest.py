"""Shared by all tests: a deterministic hypothesis profile, and the reason why a GPU test is skipped."""

import pytest
import torch
from hypothesis import settings


settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("deterministic")

# The tensors are small and several workers share the cores: more threads only wait for one another.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))
