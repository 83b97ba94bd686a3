"""The gate: compile every shipped kernel configuration, without a GPU, and check its machine code.

    python tests/kernels/compile_gate.py [80 90 100]     # a line for each kernel; exit code 1 if any fails
    python tests/kernels/compile_gate.py planted         # tests the gate: four bad kernels, all refused

It refuses mistakes that have shipped somewhere: register spills; more shared or tensor memory than the chip
has (Triton then emits an *empty* kernel, without an error); products that do not run on the tensor cores; the
transpose of a computed tile, which Triton before 3.7.1 can get wrong on Hopper; wgmma instructions that ptxas
had to serialize; and a recompilation for each sequence length. Every core of the machine compiles; with two,
the first run takes about a minute for each chip. TRITON_INTERPRET must not be set.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, prototypes

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KB = {80: 163, 90: 227, 100: 227}  # shared memory of one SM that a program may use
TENSOR_COLUMNS = 512  # of tensor memory
FEWEST_INSTRUCTIONS = 40  # an empty kernel has fewer
HEAD_WIDTHS = (32, 64, 80, 96, 128)
LONGEST = 2100  # tokens; choose_kernels has nothing new for longer sequences
VARIABLE = ("length", "T", "first_token")  # differ from batch to batch, and must not cause a recompilation
FP32_POINTERS = (
    "lse_ptr", "delta_ptr", "potential_ptr", "loss_ptr", "student_lse_ptr", "teacher_lse_ptr", "gradient_ptr",
    "u_ptr", "v_ptr", "result_ptr",
)  # fmt: skip


@cache
def shipped(arch):
    """Every configuration for sm_`arch`, once: {its name: (kernel, constants, warps, stages)}."""
    found = {}
    for D in HEAD_WIDTHS:
        for length in range(1, LONGEST + 1):
            plan = attention.choose_kernels(length, D, arch)
            for kernel, _, constants, warps, stages in plan.forward + plan.backward:
                constants = dict(constants, D=D, DP=triton.next_power_of_2(D))
                found[kernel.__name__, *constants.values(), warps, stages] = kernel, constants, warps, stages
    block = prototypes.BLOCK
    warps = prototypes.WARPS
    for kernel in (prototypes.ce_forward, prototypes.ce_backward, prototypes.normalize_rows):
        found[kernel.__name__, block, warps] = kernel, dict(BLOCK=block), warps, 3
    kernel = prototypes.reduce_columns
    tile = dict(BN=prototypes.BN, BK=prototypes.BK)
    for largest in (False, True):
        found[kernel.__name__, largest, *tile.values()] = kernel, dict(tile, LARGEST=largest), 4, 3
    return found


def type_of(name, constants, dtype):
    """The Triton type of a kernel's argument, by the naming convention of kernels/."""
    if name in constants:
        return "constexpr"
    if name in FP32_POINTERS:
        return "*fp32"
    if name.endswith("_ptr"):
        return "*" + dtype
    if name.startswith("scale") or name == "temp":
        return "fp32"
    return "i32"


def signature(kernel, constants, dtype):
    """-> ({argument: type}, {its position: attributes}), with multiples of 16 marked as they are at run time.

    Pointers are multiples of 16; so are K and the strides of our models. Triton does not check a number with
    do_not_specialize.
    """
    types = {name: type_of(name, constants, dtype) for name in kernel.arg_names}
    attributes = {}
    for position, parameter in enumerate(kernel.params):
        kind = types[parameter.name]
        if kind[0] == "*" or (kind == "i32" and not parameter.do_not_specialize):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return types, attributes


def transposes_a_product(ttir):
    """Whether some transposed tile is not simply a loaded one: a product, or carried around a loop."""
    loaded = {}  # name of a value: whether only loads and constants went into it
    for line in ttir.splitlines():
        results, equals, operation = line.partition(" = ")
        if not equals:
            continue
        inputs = re.findall(r"%\w+", operation)
        product = re.search(r"tt\.dot|scf\.", operation)
        plain = "tt.load" in operation or (not product and all(loaded.get(name, False) for name in inputs))
        for name in re.findall(r"%\w+", results):
            loaded[name] = plain
        if "tt.trans" in operation and not plain:
            return True
    return False


def machine_code(compiled, arch):
    """-> (SASS, the messages of ptxas)."""
    assembler = TOOLS / "ptxas"
    if arch >= 100 and (TOOLS / "ptxas-blackwell").exists():
        assembler = TOOLS / "ptxas-blackwell"
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "k.ptx")
        cubin = Path(folder, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        command = [assembler, "-v", f"--gpu-name={target}", ptx, "-o", cubin]
        messages = subprocess.run(command, capture_output=True, text=True).stderr
        cubin.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
    return sass, messages


def inspect(kernel, constants, warps, stages, arch, dtype="bf16"):
    """Compile for sm_`arch` -> ([complaint], a line of facts)."""
    types, attributes = signature(kernel, constants, dtype)
    source = ASTSource(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                              options=dict(num_warps=warps, num_stages=stages))  # fmt: skip
    sass, messages = machine_code(compiled, arch)
    registers = int(re.search(r"Used (\d+) registers", messages)[1])
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", sass, re.M))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    shared = compiled.metadata.shared / 1024
    tensor = getattr(compiled.metadata, "tmem_size", None)
    multiplies = "tt.dot" in compiled.asm["ttir"]
    complaints = []
    for parameter in kernel.params:
        if parameter.name in VARIABLE and not parameter.do_not_specialize:
            complaints.append(f"recompiled for another {parameter.name}")
    if spills:
        complaints.append(f"{spills} register spills")
    if shared > SHARED_KB[arch]:
        complaints.append(f"{shared:.0f} KB of shared memory, the limit is {SHARED_KB[arch]}")
    if tensor and tensor > TENSOR_COLUMNS:
        complaints.append(f"{tensor} columns of tensor memory, the limit is {TENSOR_COLUMNS}")
    if instructions < FEWEST_INSTRUCTIONS:
        complaints.append(f"an empty kernel of {instructions} instructions")
    if multiplies and not re.search(r"HMMA|HGMMA|UTC\w*MMA", sass):
        complaints.append("no tensor-core instruction")
    if multiplies and arch == 90 and "wgmma" not in compiled.asm["ptx"]:
        complaints.append("no wgmma")
    if arch == 90 and transposes_a_product(compiled.asm["ttir"]):
        complaints.append("the transpose of a computed tile")
    complaints += re.findall(r"\(C75\d\d\)[^\n]*", messages)
    return complaints, f"{registers:4d} registers  {shared:4.0f} KB shared  {instructions:5d} instructions"


@triton.jit
def transposed(x_ptr, N: tl.constexpr):
    where = x_ptr + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(where)
    squared = tl.dot(x, x).to(x.dtype)
    tl.store(where, tl.dot(tl.trans(squared), x).to(x.dtype))


@triton.jit
def without_tensor_cores(x_ptr, N: tl.constexpr):
    where = x_ptr + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(where).to(tl.float32)
    squared = tl.dot(x, x, input_precision="ieee")
    tl.store(where, squared.to(x_ptr.dtype.element_ty))


def planted():
    """Four mistakes: a tile too large for the registers, too many stages, and the two kernels above."""
    large = dict(D=64, DP=64, BM=128, BN=128)
    return {
        ("large",): (attention.fwd_loop, large, 4, 2),
        ("deep",): (attention.fwd_loop, large, 8, 9),
        ("transposed",): (transposed, dict(N=64), 4, 2),
        ("without_tensor_cores",): (without_tensor_cores, dict(N=64), 4, 2),
    }


def check(job):
    """Inspect one kernel, in a process of its own -> (a line to print, [complaint])."""
    arch, name = job
    if arch == "planted":
        target = 90
        configuration = planted()[name]
    else:
        target = arch
        configuration = shipped(arch)[name]
    complaints, facts = inspect(*configuration, target)
    title = " ".join(map(str, name))
    verdict = "; ".join(complaints) if complaints else "ok"
    return f"sm_{target} {title:38s} {facts}  {verdict}", complaints


def main():
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("the interpreter compiles nothing: unset TRITON_INTERPRET")
    jobs = []
    if sys.argv[1:] == ["planted"]:
        jobs = [("planted", name) for name in planted()]
    else:
        for arch in sys.argv[1:] or ("80", "90"):
            jobs += [(int(arch), name) for name in shipped(int(arch))]
    failed = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for line, complaints in pool.map(check, jobs):
            if complaints:
                failed += 1
            print(line, flush=True)
    print(f"{len(jobs)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
