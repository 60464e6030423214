"""The plain Triton kernels of the decode block compile for Ampere and Hopper without a GPU, and spill nothing."""

from __future__ import annotations

from typing import Any

import pytest

from ygglight.kernels.testing import SHARED_MEMORY_LIMIT, compile_ahead, resources

pytest.importorskip("triton")

POINTER = {"bfloat16": ("*bf16", 2), "float16": ("*fp16", 2), "float32": ("*fp32", 4)}


def check(compiled: Any, target: int) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[target]
    taken = resources(compiled)
    if taken is None:
        pytest.skip("no cuobjdump: registers and spills not read")
    assert taken.spill_bytes == 0


def wide_loads(compiled: Any) -> int:
    """Loads and asynchronous copies of 16 bytes."""
    lines = compiled.asm["ptx"].splitlines()
    copies = sum("cp.async.cg" in line and ", 0x10," in line for line in lines)
    return copies + sum("ld.global" in line and ".v4.b32" in line for line in lines)


# dtype, hidden size, rows of queries, rows of keys, sequences, biases
PROJECTIONS = [
    ("bfloat16", 4096, 4096, 1024, 1, False),
    ("float16", 896, 896, 128, 1, True),
    ("bfloat16", 4096, 4096, 1024, 4, False),
    ("float32", 576, 576, 192, 1, False),
    ("float32", 576, 576, 192, 2, True),
]


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", PROJECTIONS, ids=str)
def test_project_kernel_compiles(case: Any, target: int) -> None:
    from ygglight.kernels.cluster_decode.split_k import choose_tile
    from ygglight.kernels.cluster_decode.split_k_kernels import project_kernel

    dtype, hidden, queries, states, batch, bias = case
    pointer, itemsize = POINTER[dtype]
    tile = choose_tile(queries + 2 * states, hidden, batch, itemsize, processors=132)
    names = ("x", "norm", "q", "k", "v", "q_bias", "k_bias", "v_bias")
    signature = {f"{name}_ptr": pointer for name in names} | {"out_ptr": "*fp32", "eps": "fp32", "offset": "fp32"}
    signature |= {"batch": "i32"}
    # Strides as constants, since a launch would know those of a linear layer to be multiples of 16.
    constants = dict.fromkeys(("x_b", "q_r", "k_r", "v_r"), hidden)
    constants |= {
        "K": hidden, "Q_ROWS": queries, "KV_ROWS": states, "HAS_Q_BIAS": bias, "HAS_K_BIAS": bias, "HAS_V_BIAS": bias,
        "BLOCK_R": tile.rows, "BLOCK_K": tile.columns, "BLOCK_B": tile.sequences,
    }  # fmt: skip
    compiled = compile_ahead(project_kernel, signature, constants, target, num_warps=4)
    check(compiled, target)
    assert wide_loads(compiled) >= 3


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(("dtype", "batch"), [("bfloat16", 1), ("float16", 3)])
def test_output_kernel_compiles(dtype: str, batch: int, target: int) -> None:
    from ygglight.kernels.cluster_decode.split_k import choose_tile
    from ygglight.kernels.cluster_decode.split_k_kernels import output_kernel

    pointer, itemsize = POINTER[dtype]
    tile = choose_tile(4096, 4096, batch, itemsize, processors=132)
    signature = {f"{name}_ptr": pointer for name in ("x", "w", "bias", "out")} | {"rows": "i32", "batch": "i32"}
    constants = {
        "w_r": 4096, "K": 4096, "HAS_BIAS": True, "BLOCK_R": tile.rows, "BLOCK_K": tile.columns,
        "BLOCK_B": tile.sequences,
    }  # fmt: skip
    compiled = compile_ahead(output_kernel, signature, constants, target, num_warps=4)
    check(compiled, target)
    assert wide_loads(compiled) >= 1


# dtype, query heads a key head, head size, window, norm of heads, softcap, mask, writes to a slot, one split
ATTENTIONS = [
    ("bfloat16", 4, 128, 0, False, False, 0, False, False),
    ("bfloat16", 1, 128, 0, False, False, 1, True, False),
    ("bfloat16", 7, 64, 0, True, False, 1, True, True),
    ("float16", 1, 80, 4096, False, False, 0, True, False),
    ("float16", 1, 96, 0, False, False, 2, False, True),
    ("bfloat16", 8, 256, 4096, True, True, 1, True, False),
    ("float32", 3, 64, 0, True, False, 1, True, False),
]


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attend_kernel_compiles(case: Any, target: int) -> None:
    from ygglight.kernels.cluster_decode.split_k import BOOL
    from ygglight.kernels.cluster_decode.split_k_kernels import attend_kernel
    from ygglight.kernels.tree_attention.triton import choose_blocks

    dtype, group, head, window, qk_norm, softcap, mask, own, one_split = case
    pointer, itemsize = POINTER[dtype]
    slots, kv_heads, block = 8192, 8, choose_blocks(group, head, head, itemsize)
    names = ("q_norm", "k_norm", "cos", "sin", "k", "v", "new_k", "new_v", "out")
    signature = {f"{name}_ptr": pointer for name in names}
    signature |= {f"{name}_ptr": "*fp32" for name in ("qkv", "acc", "max", "sum")}
    signature |= {"length_ptr": "*i32", "own_ptr": "*i64", "mask_ptr": "*u8" if mask == BOOL else pointer}
    signature |= dict.fromkeys(("inner", "outer", "eps", "offset"), "fp32") | {"slots": "i32", "splits": "i32"}
    constants: dict[str, Any] = {"cos_b": head, "sin_b": head, "m_b": 0, "m_c": 1}
    for name in ("k", "v", "nk", "nv"):
        constants |= {
            f"{name}_b": kv_heads * slots * head,
            f"{name}_h": slots * head,
            f"{name}_c": head,
            f"{name}_d": 1,
        }
    constants |= {
        "KV_HEADS": kv_heads, "GROUP": group, "D": head, "ROT": head, "WINDOW": window, "INTERLEAVED": False,
        "QK_NORM": qk_norm, "HAS_SOFTCAP": softcap, "MASK": mask, "OWN": own, "ONE_SPLIT": one_split, "BLOCK_G": 16,
        "BLOCK_N": block.slots, "BLOCK_D": block.head,
    }  # fmt: skip
    compiled = compile_ahead(attend_kernel, signature, constants, target, num_warps=4, num_stages=3)
    check(compiled, target)
    # Keys and values are copied in stages, 16 bytes at a time.
    assert sum("cp.async.cg" in line and ", 0x10," in line for line in compiled.asm["ptx"].splitlines()) >= 4
