"""What every test begins with."""

import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

# For copies of the checkout: see test_new_files.
collect_ignore = ["new_files"]


def pytest_collection_modifyitems(items):
    """Tests of the marker ``cuda`` are skipped where there is no device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    """The same random state for every test, and an empty parameter store, which is empty again behind it.

    A handler of Pyro that a test leaves on the stack fails this test, and none after it.
    """
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
    left = list(_PYRO_STACK)
    _PYRO_STACK.clear()
    assert not left
