"""The cluster kernels compile for Hopper without a GPU: they exchange on the chip, spill nothing, keep no scratch."""

import itertools
import re

import pytest
import torch

from ygglight.kernels.cluster_decode.testing import make_spec
from ygglight.kernels.testing import SHARED_MEMORY_LIMIT, compile_ahead, resources

triton = pytest.importorskip("triton")
VERSION = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
pytestmark = pytest.mark.skipif(VERSION < (3, 8), reason="Triton before 3.8 reduces within a block only")

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TENSORS = (
    "x", "norm", "q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "cos", "sin", "keys", "values",
    "new_keys", "new_values",
)  # fmt: skip
SLOTS = 4096
LLAMA_2 = make_spec(32, 32, 128, 4096)
LLAMA_3 = make_spec(32, 8, 128, 4096)
QWEN_2 = make_spec(28, 4, 128, 3584)
QWEN_2_SMALL = make_spec(14, 2, 64, 896)
QWEN_3 = make_spec(32, 8, 128, 4096, qk_norm=True)
GEMMA = make_spec(16, 16, 256, 3072, norm_offset=1.0)
GEMMA_2 = make_spec(16, 8, 256, 3584, norm_offset=1.0, softcap=50.0, window=4096)
GEMMA_MQA = make_spec(8, 1, 256, 2048, norm_offset=1.0)
PHI = make_spec(32, 32, 80, 2560, rotary_dim=32)
PHI_3 = make_spec(32, 32, 96, 3072)
GPT_J = make_spec(16, 16, 256, 4096, rotary_dim=64, interleaved_rope=True)

# spec, shares, dtype, bias, mask, slots given
FEW = [
    (LLAMA_2, 1, torch.bfloat16, False, False, False),
    (LLAMA_3, 2, torch.bfloat16, False, False, True),
    (QWEN_2, 1, torch.float16, True, True, True),
]
MANY = [
    (LLAMA_3, 1, torch.float16, False, False, True),
    (LLAMA_3, 4, torch.bfloat16, False, True, True),
    (QWEN_2_SMALL, 1, torch.bfloat16, True, False, True),
    (QWEN_3, 2, torch.bfloat16, False, False, True),
    (GEMMA, 1, torch.bfloat16, False, False, False),
    (GEMMA_2, 2, torch.bfloat16, False, False, True),
    (GEMMA_MQA, 1, torch.bfloat16, False, False, True),
    (PHI, 1, torch.float16, True, False, True),
    (PHI_3, 1, torch.bfloat16, False, True, True),
    (GPT_J, 1, torch.float16, False, False, True),
]
CASES = [
    *((case, blocks) for case, blocks in zip(FEW, (4, 8, 2), strict=True)),
    (FEW[0], 1),
    *(
        pytest.param(case, blocks, marks=pytest.mark.slow)
        for case, blocks in itertools.product(FEW + MANY, (1, 2, 4, 8))
        if (case, blocks) not in [(FEW[0], 4), (FEW[1], 8), (FEW[2], 2), (FEW[0], 1)]
    ),
]


def counted(compiled, pattern):
    return len(re.findall(pattern, compiled.asm["ptx"]))


def check(compiled, blocks, registers=255):
    """Blocks meet if there are several, and only then; nothing spills."""
    crossings = [counted(compiled, word) for word in (r"mapa\b", r"ld\.shared::cluster", r"barrier\.cluster\.arrive")]
    assert all(crossings) if blocks > 1 else not any(crossings)
    if blocks > 1:
        # A block waits for the others before it leaves, for they may still read its shared memory.
        body = compiled.asm["ptx"]
        assert body.rindex("barrier.cluster.wait") > body.rindex("ld.shared::cluster")
    assert compiled.metadata.num_ctas == blocks
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[90]
    taken = resources(compiled)
    if taken is None:
        pytest.skip("no cuobjdump: registers and spills not read")
    assert taken.spill_bytes == 0
    assert taken.registers <= registers


def compiled_block(spec, shares, dtype, bias, mask, slots, blocks):
    from ygglight.kernels.cluster_decode import cluster, cluster_kernels

    head, hidden = spec.head_dim, spec.hidden
    # Strides as constants, since a launch would know those of caches and weights to be multiples of 16.
    constants = {"x_b": hidden, "q_r": hidden, "k_r": hidden, "v_r": hidden, "o_r": spec.heads * head}
    constants |= {"cos_b": spec.rotary_dim, "sin_b": spec.rotary_dim, "mask_b": SLOTS, "mask_c": 1}
    for name in ("keys", "values", "new_keys", "new_values"):
        constants |= {f"{name}_b": spec.kv_heads * SLOTS * head, f"{name}_h": SLOTS * head, f"{name}_c": head}
    signature = {f"{name}_ptr": POINTER[dtype] for name in TENSORS}
    signature |= {"lengths_ptr": "*i32", "slots_ptr": "*i64", "mask_ptr": "*u8", "parts_ptr": "*fp32"}
    signature |= dict.fromkeys(("batches", "kv_heads", "window"), "i32")
    signature |= dict.fromkeys(("eps", "offset", "inner", "outer"), "fp32")
    absent = [] if bias else ["q_bias", "k_bias", "v_bias"]
    absent += [] if spec.qk_norm else ["q_norm", "k_norm"]
    absent += [name for name, given in (("mask", mask), ("slots", slots)) if not given]
    constants |= {f"{name}_ptr": None for name in absent}
    constants |= cluster.constants(spec, hidden, blocks, shares)
    options = {"num_warps": cluster.NUM_WARPS, "num_ctas": blocks, "enable_fp_fusion": True}
    return compile_ahead(cluster_kernels.block_kernel, signature, constants, 90, **options)


def name_of(value):
    if isinstance(value, int):
        return str(value)
    spec, shares, dtype, *_ = value
    return f"{spec.heads}/{spec.kv_heads}x{spec.head_dim}/{shares}-{str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize(("case", "blocks"), CASES, ids=name_of)
def test_block_kernel(case, blocks):
    from ygglight.kernels.cluster_decode.cluster import LOADS, choose_tiles

    compiled = compiled_block(*case, blocks)
    check(compiled, blocks)
    # Weights, keys and values are loaded 16 bytes at a time, in the loops and once in front of them.
    spec, shares, *_ = case
    group = spec.group // shares
    tiles = choose_tiles(spec.hidden, spec.head_dim, group, blocks)
    rows, outputs = tiles.ROWS, LOADS // tiles.BLOCK_G * group
    assert counted(compiled, r"ld\.global[.\w]*\.v4") >= 2 * (LOADS + 2 * rows + outputs)


def test_block_kernel_has_no_scratch_between_its_stages():
    """It gets tensors of the model and the cache and one buffer that it writes only: parts of its output."""
    from ygglight.kernels.cluster_decode.cluster_kernels import block_kernel

    pointers = {name for name in block_kernel.arg_names if name.endswith("_ptr")}
    known = {f"{name}_ptr" for name in (*TENSORS, "lengths", "slots", "mask")}
    assert pointers - known == {"parts_ptr"}
    compiled = compiled_block(*FEW[0], 4)
    module = compiled.asm["ttgir"]
    written = set(re.findall(r"tt\.store (%\w+)", module))
    assert written and not re.findall(r"atomic", compiled.asm["ptx"])
    # Three kinds of stores: the new key, the new value, parts of the output; the last one alone is in float32.
    types = re.findall(r"tt\.store [^\n]*: tensor<[^,]*x!tt\.ptr<(\w+)>", module)
    assert sorted(types) == ["bf16", "bf16", "f32"]
    loads = re.findall(r"tt\.load [^\n]*: tensor<[^,]*x!tt\.ptr<(\w+)>", module)
    assert loads and "f32" not in loads


def loops(ptx):
    """The bodies of loops: from a label to a branch behind it that goes back there."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if line.startswith("$L__BB")}
    for number, line in enumerate(lines):
        target = re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if target and labels[target[1]] <= number:
            yield "\n".join(lines[labels[target[1]] : number + 1])


def test_no_loop_waits_for_another_thread():
    bodies = list(loops(compiled_block(*FEW[0], 4).asm["ptx"]))
    assert len([body for body in bodies if body.count("ld.global.v4") >= 8]) >= 3  # projections, attention, output
    for body in bodies:
        assert not re.search(r"bar\.sync|barrier\.cluster|st\.shared|ld\.shared", body)


@pytest.mark.parametrize(("blocks", "dtype"), [(2, "*fp32"), (8, "*bf16")])
def test_collectives(blocks, dtype):
    from ygglight.kernels.cluster_decode import collectives

    signature = {"x_ptr": dtype, "y_ptr": dtype}
    options = {"num_warps": collectives.NUM_WARPS, "num_ctas": blocks, "enable_fp_fusion": True}
    for maximum in (False, True):
        constants = {"SIZE": 100, "BLOCK": 128, "MAXIMUM": maximum}
        check(compile_ahead(collectives.reduce_kernel, signature, constants, 90, **options), blocks)
    gathered = compile_ahead(collectives.gather_kernel, signature, {"SIZE": 77, "BLOCK": 128}, 90, **options)
    check(gathered, blocks)


def test_summing_kernel():
    from ygglight.kernels.cluster_decode.cluster import SUM_BLOCK
    from ygglight.kernels.cluster_decode.cluster_kernels import sum_kernel

    signature = {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    compiled = compile_ahead(sum_kernel, signature, {"PARTS": 32, "OUT": 4096, "BLOCK": SUM_BLOCK}, 90, num_warps=4)
    check(compiled, 1, registers=128)


def test_sizes_of_launches():
    from ygglight.kernels.cluster_decode.cluster import BLOCKS, MAX_GROUP, NUM_WARPS, choose_cluster, choose_tiles

    assert choose_cluster(1, 32, 1, 132) == (4, 1)  # Llama-2-7B, as in the paper
    assert choose_cluster(1, 8, 4, 132) == (8, 2)
    assert choose_cluster(4, 32, 1, 132) == (1, 1)
    assert choose_cluster(1, 1, 16, 132)[1] >= 2  # no more heads than registers
    for head, group, blocks, hidden in itertools.product(
        (64, 80, 96, 128, 256), range(1, MAX_GROUP + 1), BLOCKS, (896, 8192)
    ):
        tiles = choose_tiles(hidden, head, group, blocks)
        assert all(size & (size - 1) == 0 for size in tiles)
        assert max(group + 2, tiles.BLOCK_G) <= tiles.HEADS and NUM_WARPS % tiles.WARPS == 0 and 32 % tiles.LANES == 0
        assert tiles.BLOCK_O % blocks == 0
