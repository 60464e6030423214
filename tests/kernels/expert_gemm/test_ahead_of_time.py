"""The kernels compile for Ampere and Hopper without a GPU, spill nothing, and read weights in stages."""

import pytest

from ygglight.kernels.testing import SHARED_MEMORY_LIMIT, compile_ahead, resources

pytest.importorskip("triton")

POINTER = {"bfloat16": ("*bf16", 2), "float16": ("*fp16", 2), "float32": ("*fp32", 4)}
# dtype, rows, columns, group (0: no codes), gate, bias, transposed: gate_up and down of OLMoE, Mixtral and gpt-oss, ...
CASES = [
    ("bfloat16", 1024, 2048, 0, 1, False, False),
    ("bfloat16", 2048, 1024, 0, 0, False, False),
    ("bfloat16", 5760, 2880, 0, 0, True, True),
    ("float16", 14336, 4096, 0, 2, True, False),
    ("float32", 1536, 576, 0, 1, False, False),
    ("bfloat16", 1024, 2048, 128, 1, False, False),
    ("bfloat16", 2048, 1024, 128, 0, False, False),
    ("bfloat16", 5760, 2880, 64, 0, True, False),
    ("float16", 1408, 2048, 128, 2, False, False),
    ("float32", 576, 1536, 128, 0, False, False),
    ("float32", 1536, 576, 64, 1, True, False),
    ("float32", 768, 2048, 128, 2, True, False),
    ("bfloat16", 64, 96, 32, 1, False, False),
]


def check(compiled, target):
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[target]
    taken = resources(compiled)
    if taken is None:
        pytest.skip("no cuobjdump: registers and spills not read")
    assert taken.spill_bytes == 0
    assert taken.registers <= 255


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_kernel_compiles(case, target):
    from ygglight.kernels.expert_gemm import triton as kernels

    dtype, rows, columns, group, gate, bias, transposed = case
    pointer, itemsize = POINTER[dtype]
    block = kernels.choose_blocks(itemsize, group)
    outputs = rows * (2 if gate else 1)
    width = columns // 2 if group else columns
    # Strides as constants, since a launch would know those of a stack to be multiples of 16; between experts of a slab
    # lie the bytes of the other matrix.
    w_e = outputs * width + 256 * 7
    layout = {"x_s": columns, "w_e": w_e, "w_n": 1 if transposed else width, "w_k": outputs if transposed else 1}
    layout |= {"b_e": w_e, "b_n": 1}
    signature = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), pointer)
    signature |= {"w_ptr": "*u8" if group else pointer, "scale_ptr": "*bf16" if group else pointer}
    signature |= {"sorted_ptr": "*i32", "pairs": "i32"}
    constants = {
        "ROWS": rows, "COLUMNS": columns, "BLOCK_M": kernels.BLOCK_M, "BLOCK_N": block.rows, "BLOCK_K": block.columns,
        "GROUP": group, "GATE": gate, "HAS_BIAS": bias,
    }  # fmt: skip
    options = {"num_warps": block.num_warps, "num_stages": block.num_stages}
    compiled = compile_ahead(kernels.product_kernel, signature, layout | constants, target, **options)
    check(compiled, target)
    # Asynchronous copies for the weights, as wide as a thread's share of a tile: they are lost, and all overlap with
    # them, when the compiler does not understand the alignment. (In float32 it does without them, whatever it knows.)
    wide = ", 0x8," if group == 32 else ", 0x10,"
    copies = [line for line in compiled.asm["ptx"].splitlines() if "cp.async" in line and wide in line]
    if itemsize == 2:
        assert len(copies) >= (2 if gate else 1) * (block.num_stages - 1)
        assert "mma.sync" in compiled.asm["ptx"]


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("kind", ["*i32", "*i64"])
def test_sort_kernel_compiles(kind, target):
    from ygglight.kernels.expert_gemm import triton as kernels

    signature = {"experts_ptr": kind, "sorted_ptr": "*i32", "pairs": "i32"}
    compiled = compile_ahead(kernels.sort_kernel, signature, {"BLOCK": 32, "CHUNK": 64}, target, num_warps=4)
    check(compiled, target)
    assert "atom" not in compiled.asm["ptx"]


def test_sizes_of_launches():
    from ygglight.kernels.expert_gemm.triton import BLOCK_M, choose_blocks

    for itemsize in (2, 4):
        for group in (0, 32, 64, 128):
            block = choose_blocks(itemsize, group)
            assert all(size >= 16 and size & (size - 1) == 0 for size in block[:2])
            weights = block.rows * block.columns * (1 if group else itemsize)
            inputs = BLOCK_M * block.columns * itemsize * (2 if group else 1)
            assert (2 * weights + inputs) * block.num_stages <= SHARED_MEMORY_LIMIT[80]
