"""Where kernels run in the tests: on the GPU, or, without one, in Triton's interpreter on the CPU.

Triton decides when it is imported, so this file decides before. Tests of kernels put their tensors on
`DEVICE`. Where neither way works, a test that launches a kernel is skipped and says what to install.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
from packaging.version import Version

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if "OMP_NUM_THREADS" not in os.environ:  # whoever sets it, as test_mutants.py does, has chosen
    torch.set_num_threads(2)
sys.path.insert(0, str(Path(__file__).parent.parent))


def hindrance():
    """Why no kernel can be launched here, in a sentence, or "" if it can."""
    if not find_spec("triton"):
        return "Triton is not installed"
    import triton

    old = Version(triton.__version__) < Version("3.7")
    if INTERPRETED and old and Version(numpy.__version__) >= Version("2.4"):
        both = f"triton {triton.__version__} fails with numpy {numpy.__version__}"
        return f"without a GPU, the interpreter of {both}: install numpy<2.4, or triton 3.7.1"
    return ""


@pytest.fixture
def kernels():
    """For a test that launches kernels in processes of its own: skips where none can be launched."""
    if hindrance():
        pytest.skip(hindrance())


@pytest.fixture
def interpreter(kernels):
    """For a test of kernels on the CPU, or in fp32: skips where they are compiled for a GPU."""
    if not INTERPRETED:
        pytest.skip("needs Triton's interpreter, and on this GPU kernels are compiled")


@pytest.fixture(autouse=True, scope="session")
def a_launch_skips():
    """The same for all other tests, without their asking: it is the launch of a kernel that skips them."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("triton") and hindrance():
            run = "triton.runtime.interpreter.InterpretedFunction.run"
            patch.setattr(run, lambda *args, **options: pytest.skip(hindrance()))
        yield


@pytest.fixture
def one_thread():
    """Small products on two threads of a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def forkserver(tmp_path_factory):
    """Starts runs without the seconds that importing torch takes."""
    from forkserver import ForkServer

    server = ForkServer(tmp_path_factory.mktemp("forkserver") / "log")
    yield server
    server.close()


@pytest.fixture
def bf16(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bf16 and cuts instead of rounding: mend both.

    On a GPU there is nothing to mend.
    """
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype
    from triton.runtime.interpreter import tl as language

    plain_dot = InterpreterBuilder.create_dot
    plain_cast = InterpreterBuilder.cast_impl

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

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
