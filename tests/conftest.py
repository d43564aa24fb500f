"""What every test begins with."""

import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

# For copies of the checkout: see test_new_files.
collect_ignore = ["new_files"]


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
