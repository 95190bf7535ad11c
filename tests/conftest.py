"""One thread and a fixed seed for every test, so that float32 sums and draws repeat."""
import os

import pytest
import torch

from tests.runs import ToyRun

os.environ['OMP_NUM_THREADS'] = '1'  # of processes that tests start, too
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    """Runs by (model, flags), made on demand."""
    done = {}

    def get(model, *flags):
        if (model, flags) not in done:
            done[model, flags] = ToyRun(tmp_path_factory.mktemp(model), model, *flags)
        return done[model, flags]
    return get


def pytest_collection_modifyitems(items):
    """The files with whole trainings first: they take longest, and two processes share the files."""
    items.sort(key=lambda item: item.path.name not in ('test_toy.py', 'test_toy_others.py', 'test_run.py'))
