"""One thread and a fixed seed for every test, so that float32 sums and draws repeat."""
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
