"""The gate: every shipped kernel configuration is compiled, without a GPU, and its machine code is looked at.

    python tests/compile_gate.py [80 90 100]     # a line per kernel; exit code 1 if any fails
    python tests/compile_gate.py planted         # the gate's own test: four bad kernels, all refused

What it refuses, since each of these has shipped somewhere: register spills; more shared or tensor memory
than the chip has (Triton then emits an *empty* kernel, without an error); a kernel whose products do not run
on the tensor cores; the transpose of a computed tile, which Triton before 3.7.1 can get wrong on Hopper;
wgmma instructions that ptxas had to serialize; and a compilation for each length of a sequence. Every core of
the machine compiles; the first time takes about a minute for each chip on two. Run it by itself: the
interpreter must not be on.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, prototypes

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163, 90: 227, 100: 227}  # KB of one SM that a program may have
WIDTHS = (32, 64, 80, 96, 128)  # of a head
LONGEST = 2100  # tokens; beyond, `plan` has nothing new
VARIABLE = ("n", "T", "first_token")  # what differs from batch to batch, and must not wait for the compiler


@cache
def shipped(arch):
    """Every (kernel, constants, warps, stages) that `plan` can name on sm_`arch`, once, by its name."""
    found = {}
    for D in WIDTHS:
        for n in range(1, LONGEST + 1):
            for kernel, _, constants, warps, stages in attention.plan(n, D, arch):
                constants = dict(constants, D=D, DP=triton.next_power_of_2(D))
                found[kernel.__name__, *constants.values(), warps, stages] = kernel, constants, warps, stages
    along = dict(BLOCK=prototypes.BLOCK)
    across = dict(BN=prototypes.BN, BK=prototypes.BK)
    for kernel in (prototypes.ce_forward, prototypes.ce_backward, prototypes.rows):
        found[kernel.__name__, prototypes.BLOCK, prototypes.WARPS] = kernel, along, prototypes.WARPS, 3
    for largest in (False, True):
        found["columns", largest, *across.values()] = prototypes.columns, dict(across, LARGEST=largest), 4, 3
    return found


def signature(kernel, constants, dtype):
    """Types of the arguments, and which of them are multiples of 16, as at run time.

    Pointers are, and in our models the strides and K. Of a number with do_not_specialize Triton does not ask.
    """
    half = ("qkv", "out", "dout", "dqkv", "x", "student", "teacher", "logits")
    single = ("lse", "delta", "potential", "loss", "lse_s", "lse_t", "gradient", "u", "v")
    types = {name: "*" + dtype for name in half} | {name: "*fp32" for name in single}
    types |= {name: "fp32" for name in ("c", "cs", "ct", "scale", "temp")}
    types |= {name: "constexpr" for name in constants}
    if "logits" in kernel.arg_names:
        types["out"] = "*fp32"
    types = {name: types.get(name, "i32") for name in kernel.arg_names}
    even = []
    for i, parameter in enumerate(kernel.params):
        kind = types[parameter.name]
        if kind[0] == "*" or (kind == "i32" and not parameter.do_not_specialize):
            even.append(i)
    return types, {(i,): [["tt.divisibility", 16]] for i in even}


def transposes_a_product(ttir):
    """Whether some transposed tile is more than what was loaded: a product, or carried around a loop."""
    loaded = {}  # by the name of a value, whether it is made of loads and constants only
    for line in ttir.splitlines():
        results, equals, operation = line.partition(" = ")
        if not equals:
            continue
        inputs = re.findall(r"%\w+", operation)
        product = re.search(r"tt\.dot|scf\.", operation)
        plain = "tt.load" in operation or (not product and all(loaded.get(x, False) for x in inputs))
        for name in re.findall(r"%\w+", results):
            loaded[name] = plain
        if "tt.trans" in operation and not plain:
            return True
    return False


def inspect(kernel, constants, warps, stages, arch, dtype="bf16"):
    """Compile for sm_`arch` -> (what is wrong: a list of sentences, facts: a line)."""
    types, attrs = signature(kernel, constants, dtype)
    source = ASTSource(kernel, types, constants, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                              options=dict(num_warps=warps, num_stages=stages))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "k.ptx")
        cubin = Path(folder, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        tool = BIN / ("ptxas-blackwell" if arch >= 100 and (BIN / "ptxas-blackwell").exists() else "ptxas")
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        command = [tool, "-v", f"--gpu-name={target}", ptx, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True)
        cubin.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([BIN / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
    registers = int(re.search(r"Used (\d+) registers", log.stderr)[1])
    lines = len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", sass, re.M))
    shared = compiled.metadata.shared / 1024
    tensor = getattr(compiled.metadata, "tmem_size", 0) or 0
    multiplies = "tt.dot" in compiled.asm["ttir"]
    wrong = []
    for parameter in kernel.params:
        if parameter.name in VARIABLE and not parameter.do_not_specialize:
            wrong.append(f"compiled anew for another {parameter.name}")
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
    if arch == 90 and transposes_a_product(compiled.asm["ttir"]):
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


def judge(job):
    """One kernel, in a process of its own -> (its line, what is wrong)."""
    arch, name = job
    configuration = (planted() if arch == "planted" else shipped(arch))[name]
    target = 90 if arch == "planted" else arch
    wrong, facts = inspect(*configuration, target)
    return f"sm_{target} {' '.join(map(str, name)):38s} {facts}  {'; '.join(wrong) or 'ok'}", wrong


def main():
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("the interpreter compiles nothing: unset TRITON_INTERPRET")
    if sys.argv[1:] == ["planted"]:
        jobs = [("planted", name) for name in planted()]
    else:
        arches = [int(x) for x in sys.argv[1:]] or [80, 90]
        jobs = [(arch, name) for arch in arches for name in shipped(arch)]
    failed = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for line, wrong in pool.map(judge, jobs):
            failed += bool(wrong)
            print(line, flush=True)
    print(f"{len(jobs)} compiled, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
