"""The gate: every shipped kernel configuration is compiled, without a GPU, and its machine code is looked at.

    python tests/compile_gate.py [80 90 100]     # a line per kernel; exit code 1 if any fails
    python tests/compile_gate.py planted         # the gate's own test: four bad kernels, all refused

What it refuses, since each of these has shipped somewhere: register spills; more shared or tensor memory
than the chip has (Triton then emits an *empty* kernel, without an error); a kernel whose products do not run
on the tensor cores; the transpose of a computed tile, which Triton before 3.7.1 can get wrong on Hopper; and
wgmma instructions that ptxas had to serialize. Run it by itself: the interpreter must not be on.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, prototypes

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163, 90: 227, 100: 227}  # KB of one SM that a program may have
LENGTHS = {64: (54, 65, 96, 128, 192, 197, 201, 261, 1374), 32: (54, 261, 1374), 80: (54, 261),
           96: (261,), 128: (54, 261)}  # fmt: skip


def shipped(arch):
    """Every (kernel, constants, warps, stages) that `plan` names for these lengths, once."""
    found = {}
    for D, lengths in LENGTHS.items():
        for n in lengths:
            for kernel, _, constants, warps, stages in attention.plan(n, D, arch):
                constants = dict(constants, D=D, DP=triton.next_power_of_2(D))
                found[kernel.__name__, *constants.values(), warps, stages] = kernel, constants, warps, stages
    along, across = dict(BLOCK=prototypes.BLOCK), dict(BN=prototypes.BN, BK=prototypes.BK)
    for kernel in (prototypes.ce_forward, prototypes.ce_backward, prototypes.rows):
        found[kernel.__name__, prototypes.BLOCK, prototypes.WARPS] = kernel, along, prototypes.WARPS, 3
    for largest in (False, True):
        found["columns", largest, *across.values()] = prototypes.columns, dict(across, LARGEST=largest), 4, 3
    return found


def signature(kernel, constants, dtype):
    """Types of the arguments, and those that are multiples of 16, pointers and strides, as at run time."""
    half = ("qkv", "out", "dout", "dqkv", "x", "student", "teacher", "logits")
    single = ("lse", "delta", "potential", "loss", "lse_s", "lse_t", "gradient", "u", "v")
    types = {name: "*" + dtype for name in half} | {name: "*fp32" for name in single}
    types |= {name: "fp32" for name in ("c", "cs", "ct", "scale", "temp")} | {
        name: "constexpr" for name in constants
    }
    if "logits" in kernel.arg_names:
        types["out"] = "*fp32"
    types = {name: types.get(name, "i32") for name in kernel.arg_names}
    strides = ("st", "s3", "sh", "sdt", "sdh", "stride", "stride_s", "stride_t", "K")
    even = [i for i, (name, kind) in enumerate(types.items()) if kind[0] == "*" or name in strides]
    return types, {(i,): [["tt.divisibility", 16]] for i in even}


def inspect(kernel, constants, warps, stages, arch, dtype="bf16"):
    """Compile for sm_`arch` -> (what is wrong: a list of sentences, facts: a line)."""
    types, attrs = signature(kernel, constants, dtype)
    source = ASTSource(kernel, types, constants, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                              options=dict(num_warps=warps, num_stages=stages))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        tool = BIN / ("ptxas-blackwell" if arch >= 100 and (BIN / "ptxas-blackwell").exists() else "ptxas")
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        log = subprocess.run(
            [tool, "-v", f"--gpu-name={target}", ptx, "-o", cubin], capture_output=True, text=True
        )
        cubin.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([BIN / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
    registers = int(re.search(r"Used (\d+) registers", log.stderr)[1])
    lines = len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", sass, re.M))
    shared, tensor = compiled.metadata.shared / 1024, getattr(compiled.metadata, "tmem_size", 0) or 0
    multiplies = "tt.dot" in compiled.asm["ttir"]
    wrong = []
    if spilled := len(re.findall(r"\b(?:STL|LDL)\b", sass)):
        wrong.append(f"{spilled} register spills")
    if shared > SHARED[arch]:
        wrong.append(f"{shared:.0f} KB of shared memory, the limit is {SHARED[arch]}")
    if tensor > 512:
        wrong.append(f"{tensor} columns of tensor memory, the limit is 512")
    if lines < 40:
        wrong.append(f"an empty kernel of {lines} instructions")
    if multiplies and not re.search(r"HMMA|HGMMA|UTC\w*MMA", sass):
        wrong.append("no tensor-core instruction")
    if multiplies and arch == 90 and "wgmma" not in compiled.asm["ptx"]:
        wrong.append("no wgmma")
    if arch == 90 and re.search(r"tt\.trans .*#mma", compiled.asm["ttgir"]):
        wrong.append("the transpose of a computed tile")
    wrong += re.findall(r"\(C75\d\d\)[^\n]*", log.stderr)
    return wrong, f"{registers:4d} registers  {shared:4.0f} KB shared  {lines:5d} instructions"


@triton.jit
def transposed(x, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + i)
    tl.store(x + i, tl.dot(tl.trans(tl.dot(a, a).to(a.dtype)), a).to(a.dtype))


@triton.jit
def untensored(x, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + i).to(tl.float32)
    tl.store(x + i, tl.dot(a, a, input_precision="ieee").to(x.dtype.element_ty))


def planted():
    """Four mistakes: a tile too large for the registers, too many stages, and the two kernels above."""
    head = dict(D=64, DP=64)
    return {("large",): (attention.fwd_loop, dict(head, BM=128, BN=128), 4, 2),
            ("deep",): (attention.fwd_loop, dict(head, BM=128, BN=128), 8, 9),
            ("transposed",): (transposed, dict(N=64), 4, 2),
            ("untensored",): (untensored, dict(N=64), 4, 2)}  # fmt: skip


def main():
    self_test = sys.argv[1:] == ["planted"]
    arches, failed = [90] if self_test else [int(x) for x in sys.argv[1:]] or [80, 90], 0
    assert os.environ.get("TRITON_INTERPRET") != "1", (
        "the interpreter compiles nothing: unset TRITON_INTERPRET"
    )
    for arch in arches:
        for name, configuration in (planted() if self_test else shipped(arch)).items():
            wrong, facts = inspect(*configuration, arch)
            failed += bool(wrong)
            print(f"sm_{arch} {' '.join(map(str, name)):38s} {facts}  {'; '.join(wrong) or 'ok'}", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
