"""What every test begins with."""

import pyro
import pytest
import torch

# For copies of the checkout: see test_new_files.
collect_ignore = ["new_files"]


@pytest.fixture(autouse=True)
def seeded():
    """The same random state for every test, and an empty parameter store, which is empty again behind it."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
