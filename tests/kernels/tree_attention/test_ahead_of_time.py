"""The kernels compile for Ampere and Hopper without a GPU, spill nothing in a loop, read keys and values in stages."""

import pytest

from ygglight.kernels.testing import SHARED_MEMORY_LIMIT, compile_ahead, resources

pytest.importorskip("triton")

POINTER = {"bfloat16": ("*bf16", 2), "float16": ("*fp16", 2), "float32": ("*fp32", 4)}
SLOTS = 4096
# dtype, rows, head size, softcap, sinks, one split, slots of a page (0: no block table)
CASES = [
    ("bfloat16", 4, 128, False, False, False, 0),
    ("bfloat16", 256, 128, False, False, False, 0),
    ("bfloat16", 32, 80, False, False, True, 0),
    ("bfloat16", 64, 256, True, False, False, 0),
    ("bfloat16", 4, 512, False, False, False, 0),
    ("float16", 64, 64, True, True, True, 0),
    ("float32", 24, 128, False, True, False, 0),
    ("bfloat16", 4, 128, False, False, False, 16),
    ("bfloat16", 32, 80, False, False, True, 64),
    ("bfloat16", 64, 256, True, False, False, 16),
    ("float16", 3, 64, False, False, False, 256),
    ("float16", 64, 64, True, True, True, 16),
    ("float32", 24, 128, False, True, False, 16),
]


def check(compiled, target):
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[target]
    taken = resources(compiled)
    if taken is None:
        pytest.skip("no cuobjdump: registers and spills not read")
    # ptxas 12.9 puts up to four numbers that only the end needs on the stack, before the loop, and so fits two programs
    # on an SM. Spills within the loop are more: 424 bytes where each round looked up the pages that it read.
    assert taken.spill_bytes <= 16


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_kernel_compiles(case, target):
    from ygglight.kernels.tree_attention import triton as kernels

    dtype, rows, head, softcap, sinks, one_split, page = case
    pointer, itemsize = POINTER[dtype]
    block = kernels.choose_blocks(rows, head, head, itemsize)
    assert block.rows >= 16 and block.slots >= 16
    # Strides as constants, since a launch would know those of a cache to be multiples of 16, as those of an arena.
    layout = {"q_b": 32 * head, "q_h": head, "q_w": 32 * head, "q_d": 1, "m_b": 0, "m_w": SLOTS, "m_c": 1}
    for name in ("k", "v"):
        between, slots = (32 * 2 * 8 * page * head, page) if page else (8 * SLOTS * head, SLOTS)
        layout |= {f"{name}_b": between, f"{name}_h": slots * head, f"{name}_c": head, f"{name}_d": 1}
    layout |= {"t_n": 1} if page else {"table_ptr": None, "t_b": None, "t_n": None}
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), pointer)
    signature |= {"mask_ptr": "*u8", "sink_ptr": "*bf16", "inner": "fp32", "outer": "fp32"}
    signature |= {"table_ptr": "*i64" if page > block.slots else "*i32"}
    signature |= dict.fromkeys(("acc_ptr", "max_ptr", "sum_ptr"), "*fp32")
    signature |= dict.fromkeys(("t_b", "key_heads", "width", "rows", "slots", "splits"), "i32")
    constants = {
        "HEAD": head, "VALUE": head, "BLOCK_H": block.head, "BLOCK_V": block.value, "BLOCK_M": block.rows,
        "BLOCK_N": block.slots, "PAGE": page, "HAS_SOFTCAP": softcap, "HAS_SINKS": sinks, "ONE_SPLIT": one_split,
    }  # fmt: skip
    options = {"num_warps": block.num_warps, "num_stages": block.num_stages}
    compiled = compile_ahead(kernels.split_kernel, signature, layout | constants, target, **options)
    check(compiled, target)
    # Asynchronous copies of 16 bytes for keys and values: they are lost, and all overlap with them, when the compiler
    # does not understand the alignment. (Those of the mask are smaller.)
    copies = [line for line in compiled.asm["ptx"].splitlines() if "cp.async.cg" in line and ", 0x10," in line]
    assert len(copies) >= 2 * (block.num_stages - 1)
    if target == 90 and block.rows >= 64:
        assert "wgmma" in compiled.asm["ptx"]


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(("dtype", "head", "splits"), [("bfloat16", 128, 33), ("float32", 512, 128)])
def test_merge_kernel_compiles(dtype, head, splits, target):
    from ygglight.kernels.tree_attention import triton as kernels

    signature = dict.fromkeys(("acc_ptr", "max_ptr", "sum_ptr"), "*fp32") | {"sink_ptr": "*bf16"}
    signature |= {"out_ptr": POINTER[dtype][0]} | dict.fromkeys(("key_heads", "width", "rows", "splits"), "i32")
    constants = {
        "VALUE": head, "BLOCK_V": head, "SPLITS": 1 << (splits - 1).bit_length(), "CHUNK": kernels.MERGE_SPLITS,
        "HAS_SINKS": True,
    }  # fmt: skip
    check(compile_ahead(kernels.merge_kernel, signature, constants, target, num_warps=4), target)


def test_sizes_of_launches():
    from ygglight.kernels.tree_attention.triton import MAX_SPLITS, choose_blocks, choose_splits

    assert choose_splits(programs=8, blocks=1000, processors=132) == 33
    assert choose_splits(programs=8, blocks=3, processors=132) == 3
    assert choose_splits(programs=1000, blocks=64, processors=132) == 1
    assert choose_splits(programs=1, blocks=1000, processors=132) == MAX_SPLITS
    for rows in (1, 17, 1000):
        for head in (16, 48, 64, 80, 128, 192, 256, 512):
            for itemsize in (2, 4):
                block = choose_blocks(rows, head, head, itemsize)
                assert all(size >= 16 and size & (size - 1) == 0 for size in block[:4])
                held = (block.head + block.value) * block.slots * block.num_stages + block.rows * block.head
                assert held * itemsize <= SHARED_MEMORY_LIMIT[80]
