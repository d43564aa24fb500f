"""Which vector instructions inductor compiles for."""

import platform
import sys

import pytest
import torch

from pyro_avi.compilation import inductor
from pyro_avi.toolchain import vector_units
from pyro_avi.toolchain.vector_units import asked_in_full, forget, found_quickly, may_be_others
from pyro_avi.tracing.operations import record
from tests.marks import needs_compiler

on_x86 = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="inductor asks in its own way"
)


@pytest.fixture
def isas():
    """Inductor's module, which has found nothing yet, and finds anew afterwards."""
    from torch._inductor import cpu_vec_isa

    def clear():
        forget()
        for each in (asked_in_full, vector_units._knows_options, vector_units._has_functions):
            each.cache_clear()

    clear()
    yield cpu_vec_isa
    clear()


def names(isas):
    return [str(isa) for isa in isas.valid_vec_isa_list()]


@pytest.mark.slow
@on_x86
@needs_compiler
def test_inductors_own_programs_find_the_same_instructions(isas, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with found_quickly():
        quickly = vector_units._found()
    assert not list(tmp_path.rglob("*.cpp"))
    assert not asked_in_full()
    assert vector_units._found() == quickly
    assert quickly == [] or list(tmp_path.rglob("*.cpp"))


@on_x86
@needs_compiler
def test_instructions_that_the_compiler_or_torch_lack_are_not_used(isas, monkeypatch):
    with found_quickly():
        found = names(isas)
    if not found:
        pytest.skip("this processor has no vector instructions that inductor knows")
    best = isas.valid_vec_isa_list()[0]
    forget()
    with monkeypatch.context() as patch:
        # As to a compiler of before this processor.
        patch.setattr(best, "_arch_flags", f"{best._arch_flags} -mno-such-instructions")
        with found_quickly():
            assert names(isas) == found[1:]
    forget()
    # As in a torch without vector functions.
    monkeypatch.setattr(vector_units, "_has_functions", lambda bits: False)
    with found_quickly():
        assert names(isas) == []


@on_x86
def test_outside_of_the_block_inductor_asks_as_ever(isas):
    before = isas.VecISA.check_build
    with pytest.raises(RuntimeError), found_quickly():
        assert isas.VecISA.check_build is not before
        raise RuntimeError
    assert isas.VecISA.check_build is before


def test_versions_of_torch_that_ask_otherwise_are_left_alone(isas, monkeypatch):
    monkeypatch.delattr(isas.VecISA, "check_build")
    with found_quickly():
        assert not hasattr(isas.VecISA, "check_build")
    assert not asked_in_full()


@pytest.mark.parametrize(
    "message, others, attempts",
    [
        ("C++ compile error\n\nCommand: g++", True, 2),
        ("/tmp/x.so: undefined symbol: Sleef_expf16_u10", True, 2),
        ("C++ compile error\n\nCommand: g++", False, 1),
        ("no lowering of this operation", True, 1),
    ],
)
def test_a_graph_that_fails_is_compiled_for_what_inductors_programs_find(monkeypatch, message, others, attempts):
    tried = []

    def compile_once(*args):
        tried.append(args)
        if len(tried) == 1:
            raise RuntimeError(message)
        return "compiled"

    monkeypatch.setattr(inductor, "_compile", compile_once)
    monkeypatch.setattr(inductor, "asked_in_full", lambda: others)
    x = torch.ones(2)
    traced, _ = record(lambda x: [torch.neg(x)], [x], held_at=1)
    if attempts == 1:
        with pytest.raises(RuntimeError, match="no lowering|compile error"):
            inductor.compile_graph(traced, [x], with_draws=False)
    else:
        assert inductor.compile_graph(traced, [x], with_draws=False) == "compiled"
    assert len(tried) == attempts


def test_an_error_is_searched_with_those_that_it_came_from():
    try:
        try:
            raise RuntimeError("C++ compile error")
        except RuntimeError as error:
            raise ValueError("inductor failed") from error
    except ValueError as error:
        assert may_be_others(error)
    assert not may_be_others(ValueError("inductor failed"))
