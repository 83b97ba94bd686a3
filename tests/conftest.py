"""Before anything imports triton: kernels run in its interpreter where there is no GPU."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)
sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture
def one_thread():
    """Small products on two threads of a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    from nursery import Nursery

    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "log")
    yield nursery
    nursery.close()


@pytest.fixture
def bf16(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bf16 and cuts instead of rounding: mend both."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype
    from triton.runtime.interpreter import tl as language

    def numbers(x):
        return torch.from_numpy(x.data.copy().view("int16")).view(torch.bfloat16).float().numpy()

    def dot(self, a, b, d, *rest):
        a, b = (TensorHandle(numbers(x), language.float32) if x.dtype.is_bf16() else x for x in (a, b))
        return plain_dot(self, a, b, d, *rest)

    def cast(self, x, to):
        if x.dtype.scalar == language.bfloat16 and to.scalar == language.float32:
            return TensorHandle(numbers(x), to.scalar)
        if x.dtype.scalar == language.float32 and to.scalar == language.bfloat16:
            bits = torch.from_numpy(x.data.copy()).bfloat16().view(torch.int16).numpy()
            return TensorHandle(bits.view(_get_np_dtype(to)), to.scalar)
        return plain_cast(self, x, to)

    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
