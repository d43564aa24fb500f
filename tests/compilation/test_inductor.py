"""What is rewritten in a graph before inductor takes it."""

import pytest
import torch

from pyro_avi.compilation.inductor import _simplify
from pyro_avi.tracing.operations import record

aten = torch.ops.aten


@pytest.mark.parametrize("on_cpu, biases", [(True, 0), (False, 1)])
def test_divisions_and_biases_are_rewritten_and_nothing_changes(on_cpu, biases):
    def f(x, weight, bias, scale, count):
        of_many = torch.addmm(bias, x, weight) / scale, x / scale.expand(4, 3), x / scale[0]
        return *of_many, x / x.sum(0), scale / scale, x / count, x / scale.float()

    given = [torch.rand(shape, dtype=torch.double) for shape in ((4, 3), (3, 2), (2,), (1,))]
    given.append(torch.tensor(3))
    traced, _ = record(f, given, held_at=len(given))
    expected = traced(*given)

    _simplify(traced, on_cpu)

    torch.testing.assert_close(traced(*given), expected, rtol=1e-15, atol=1e-15)

    def count(target):
        return len(traced.graph.find_nodes(op="call_function", target=target))

    # By more than one number, of one number by one, and by numbers whose inverses would be rounded to single precision.
    assert count(aten.div.Tensor) == 4
    assert count(aten.reciprocal.default) == 3
    assert count(aten.addmm.default) == biases
