"""Every codec kernel compiles for Ampere and Hopper without a GPU, spills nothing and fits in shared memory."""

import itertools

import pytest

from ygglight.kernels.testing import SHARED_MEMORY_LIMIT, compile_ahead, resources

pytest.importorskip("triton")

POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
CASES = list(itertools.product((80, 90), ("bfloat16", "float32"), ((4, 2), (8, 0))))


def check(compiled, target):
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[target]
    # A contracted multiply-add rounds once where the twin rounds twice, and the bytes would differ.
    assert "fma." not in compiled.asm["ptx"]
    taken = resources(compiled)
    if taken is None:
        pytest.skip("no cuobjdump: registers and spills not read")
    assert taken.spill_bytes == 0
    # 128 threads a program: at 128 registers four programs (half of the 64 Ki registers) still share an SM.
    assert taken.registers <= 128


@pytest.mark.parametrize(("target", "dtype", "shape"), CASES)
def test_affine_kernels_compile(target, dtype, shape):
    from ygglight.kernels.act_codec import triton as kernels

    value = POINTER[dtype]
    payload = {"code_ptr": "*u8", "scale_ptr": "*bf16", "offset_ptr": value, "value_ptr": value, "place_ptr": "*u8"}
    constants = {"GROUP": 128, "BITS": shape[0], "OUTLIERS": shape[1], "ROWS": kernels.ROWS}
    options = {"num_warps": kernels.NUM_WARPS, "enable_fp_fusion": False}
    scalars = {"n_groups": "i32", "first_group": "i32", "word0": "i32", "word1": "i32", "widened": "fp32"}
    packing = compile_ahead(
        kernels.pack_kernel,
        {"x_ptr": value, **payload, **scalars},
        {**constants, "RANDOM": True, "EXACT": dtype != "float32"},
        target,
        **options,
    )
    check(packing, target)
    unpacking = compile_ahead(
        kernels.unpack_kernel, {"out_ptr": value, **payload, "n_groups": "i32"}, constants, target, **options
    )
    check(unpacking, target)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("has_value", [False, True])
def test_mask_kernels_compile(target, has_value):
    from ygglight.kernels.act_codec import triton_mask as kernels

    value = "*bf16" if has_value else "*u8"
    constants = {"HAS_VALUE": has_value, "BLOCK": kernels.BLOCK}
    options = {"num_warps": kernels.NUM_WARPS, "enable_fp_fusion": False}
    rest = {"code_ptr": "*u8", "c_ptr": value, "numel": "i32"}
    check(compile_ahead(kernels.pack_mask_kernel, {"x_ptr": value, **rest}, constants, target, **options), target)
    check(compile_ahead(kernels.unpack_mask_kernel, {"out_ptr": value, **rest}, constants, target, **options), target)
