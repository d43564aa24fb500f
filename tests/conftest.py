"""What every test begins with."""

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """The same random state for every test, and an empty parameter store, which is empty again behind it."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
