# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Grouped products of few rows with the matrices of many experts, in 16 or 4 bits: a sort, then one launch a product.

Pairs are sorted by expert with counts alone, so nothing is read on the host and no atomic is needed. A program takes a
tile of one expert's rows and columns of its matrix; tiles are led by every BLOCK_M-th row of an expert, and programs of
other rows leave at once. Few tokens are bound by the bytes of the weights, and each is read once a tile of rows.

Sums are float32, and are rounded where transformers rounds: after gate and up (with their biases), the activation, the
product of the two, and the second matrix. BLOCK_M never follows from the number of rows: a wider tile may run other
instructions, and a row's bits must not depend on which other rows share the call.

Codes of four bits become numbers of 16 bits exactly and the scale multiplies a group's sum, in float32, so a product is
no less accurate than one with weights that were widened before. A byte holds codes of both halves of a group (see
int4.py), so a group is products of contiguous inputs. Not yet timed on a GPU.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ygglight.kernels.expert_gemm.int4 import Int4Weight
from ygglight.kernels.expert_gemm.reference import Activation, activation_of

BLOCK_M = 16
"""Rows of a tile, the fewest that tl.dot takes."""
_GATES = {"silu": 1, "gelu": 2}


@triton.jit(do_not_specialize=["pairs"])
def sort_kernel(experts_ptr, sorted_ptr, pairs, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Stable counting sort; grid (blocks of pairs). Writes int32 [3, pairs]: expert, pair and the pair's rank in it."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + pair, mask=pair < pairs, other=0).to(tl.int32)
    lower = tl.zeros([BLOCK], tl.int32)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = tl.load(experts_ptr + other, mask=other < pairs, other=2147483647).to(tl.int32)
        lower += tl.sum((theirs[None, :] < expert[:, None]).to(tl.int32), 1)
        earlier = (theirs[None, :] == expert[:, None]) & (other[None, :] < pair[:, None])
        rank += tl.sum(earlier.to(tl.int32), 1)
    place = lower + rank
    tl.store(sorted_ptr + place, expert, mask=pair < pairs)
    tl.store(sorted_ptr + pairs + place, pair, mask=pair < pairs)
    tl.store(sorted_ptr + 2 * pairs + place, rank, mask=pair < pairs)


@triton.jit
def _widen(codes, dtype: tl.constexpr):
    return (codes.to(tl.int32) - 8).to(dtype)


@triton.jit
def _add_codes(acc, x_low, x_high, codes, scale):
    total = tl.dot(x_low, _widen(codes & 15, x_low.dtype), input_precision="ieee")
    total = tl.dot(x_high, _widen(codes >> 4, x_low.dtype), total, input_precision="ieee")
    return acc + total * scale.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["pairs"])
def product_kernel(
    x_ptr,  # [pairs, COLUMNS]
    sorted_ptr,  # int32 [3, pairs], of sort_kernel
    w_ptr,  # [M, ROWS (twice with GATE), COLUMNS]; with GROUP uint8 and half the columns
    scale_ptr,  # [M, ROWS (twice with GATE), COLUMNS / GROUP], contiguous; unread without GROUP
    bias_ptr,  # [M, ROWS (twice with GATE)], unread without HAS_BIAS
    out_ptr,  # [pairs, ROWS], contiguous
    x_s, w_e, w_n, w_k, b_e, b_n, pairs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # with GROUP a part of half of that
    GROUP: tl.constexpr,  # weights of four bits that share a scale; 0: weights in the dtype of x
    GATE: tl.constexpr,  # 0: none; else the matrix holds gate and up, of which 1 silu, 2 gelu
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Multiplies rows of one expert with columns of its matrix; grid (tiles of ROWS, pairs)."""
    lead = tl.program_id(1)
    if tl.load(sorted_ptr + 2 * pairs + lead) % BLOCK_M != 0:
        return
    expert = tl.load(sorted_ptr + lead)
    place = lead + tl.arange(0, BLOCK_M)
    live = place < pairs
    live = live & (tl.load(sorted_ptr + place, mask=live, other=-2) == expert)
    pair = tl.load(sorted_ptr + pairs + place, mask=live, other=0).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < ROWS
    out_at = out_ptr + pair[:, None] * ROWS + row[None, :]
    if expert < 0:
        nothing = tl.zeros([BLOCK_M, BLOCK_N], out_ptr.dtype.element_ty)
        tl.store(out_at, nothing, mask=live[:, None] & inside[None, :])
        return

    at_k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + pair[:, None] * x_s + at_k[None, :]
    owner = expert.to(tl.int64)
    w_at = w_ptr + owner * w_e + row[None, :] * w_n + at_k[:, None] * w_k
    up_at = w_at + ROWS * w_n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GROUP > 0:
        groups: tl.constexpr = COLUMNS // GROUP
        matrix_rows: tl.constexpr = ROWS * 2 if GATE > 0 else ROWS
        scale_at = scale_ptr + owner * (matrix_rows * groups) + row * groups
        pieces: tl.constexpr = GROUP // 2 // BLOCK_K
        for i in range(groups * pieces):
            group = i // pieces
            x_piece = x_row + group * GROUP + i % pieces * BLOCK_K
            x_low = tl.load(x_piece, mask=live[:, None], other=0.0)
            x_high = tl.load(x_piece + GROUP // 2, mask=live[:, None], other=0.0)
            codes = tl.load(w_at + i * BLOCK_K, mask=inside[None, :], other=0)
            scale = tl.load(scale_at + group, mask=inside, other=0.0)
            acc = _add_codes(acc, x_low, x_high, codes, scale)
            if GATE > 0:
                codes = tl.load(up_at + i * BLOCK_K, mask=inside[None, :], other=0)
                scale = tl.load(scale_at + ROWS * groups + group, mask=inside, other=0.0)
                up = _add_codes(up, x_low, x_high, codes, scale)
    else:
        for k in range(0, COLUMNS, BLOCK_K):
            known = at_k < COLUMNS - k
            x = tl.load(x_row + k, mask=live[:, None] & known[None, :], other=0.0)
            w = tl.load(w_at + k * w_k, mask=known[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            if GATE > 0:
                w = tl.load(up_at + k * w_k, mask=known[:, None] & inside[None, :], other=0.0)
                up = tl.dot(x, w, up, input_precision="ieee")

    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if HAS_BIAS:
        bias_at = bias_ptr + owner * b_e + row * b_n
        acc += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATE > 0:
            up += tl.load(bias_at + ROWS * b_n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATE > 0:
        acc = acc.to(dtype).to(tl.float32)
        if GATE == 1:
            acc = acc / (1.0 + tl.exp(-acc))
        else:
            acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
        acc = acc.to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    tl.store(out_at, acc.to(dtype), mask=live[:, None] & inside[None, :])


class Blocks(NamedTuple):
    """Sizes of a launch, from the dtype and the kind of weights alone."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def choose_blocks(itemsize: int, group: int) -> Blocks:
    """Tile sizes: a stage of gate and up takes 16 KiB in 16 bits, so that several programs fit on an SM.

    Args:
        itemsize: bytes of an element of x. group: weights that share a scale; 0: no codes.
    """
    # Products in float32 run without tensor cores from registers, which larger tiles would spill (so says cuobjdump).
    size = 32 if itemsize == 4 else 64
    return Blocks(size, min(size, group // 2) if group else size, 4, 4)


class _Matrix(NamedTuple):
    """One of the two matrices of each expert; strides in elements of ``weight``."""

    weight: Tensor
    scale: Tensor
    rows: int
    columns: int
    strides: tuple[int, int, int]
    group: int


def _dense(stack: Tensor, transposed: bool) -> _Matrix:
    stack = stack.mT if transposed else stack
    expert, row, column = stack.stride()
    return _Matrix(stack, stack, stack.shape[1], stack.shape[2], (expert, row, column), 0)


def _coded(weight: Int4Weight) -> _Matrix:
    packed, (_, rows, columns) = weight.packed, weight.shape
    return _Matrix(packed, weight.scale, rows, columns, (rows * columns // 2, columns // 2, 1), weight.group)


def _product(x: Tensor, order: Tensor, matrix: _Matrix, gate: int, bias: Tensor | None) -> Tensor:
    rows = matrix.rows // 2 if gate else matrix.rows
    block = choose_blocks(x.element_size(), matrix.group)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    used, b_strides = (x, (0, 0)) if bias is None else (bias, bias.stride())
    product_kernel[(triton.cdiv(rows, block.rows), len(x))](
        x, order, matrix.weight, matrix.scale, used, out, x.stride(0), *matrix.strides, *b_strides, len(x),
        ROWS=rows, COLUMNS=matrix.columns, BLOCK_M=BLOCK_M, BLOCK_N=block.rows, BLOCK_K=block.columns,
        GROUP=matrix.group, GATE=gate, HAS_BIAS=bias is not None, num_warps=block.num_warps,
        num_stages=block.num_stages,
    )  # fmt: skip
    return out


def _launch(
    x: Tensor,
    experts: Tensor,
    first: _Matrix,
    second: _Matrix,
    activation: Activation,
    biases: tuple[Tensor, Tensor] | None,
) -> Tensor:
    gate = _GATES[activation] if isinstance(activation, str) else 0
    b_first, b_second = (None, None) if biases is None else biases
    pairs = len(x)
    order = torch.empty(3, pairs, dtype=torch.int32, device=x.device)
    on_device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on_device:  # Triton launches on the current device, whatever its arguments
        sort_kernel[(triton.cdiv(pairs, 32),)](experts.contiguous(), order, pairs, BLOCK=32, CHUNK=64, num_warps=4)
        hidden = _product(x if x.stride(1) == 1 else x.contiguous(), order, first, gate, b_first)
        if not gate:
            hidden = activation_of(activation)(hidden).contiguous()
        return _product(hidden, order, second, 0, b_second)


def launch(
    x: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    biases: tuple[Tensor, Tensor] | None = None,
    transposed: bool = False,
) -> Tensor:
    """Runs three kernels on the current stream, and the activation if it is a function; inputs are not checked.

    Args:
        x: See :func:`ygglight.kernels.expert_gemm.expert_mlp`, as for all others.
    """
    return _launch(x, experts, _dense(gate_up, transposed), _dense(down, transposed), activation, biases)


def launch_int4(
    x: Tensor,
    experts: Tensor,
    gate_up: Int4Weight,
    down: Int4Weight,
    activation: Activation,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """:func:`launch` with weights in four bits.

    Args:
        x: See :func:`ygglight.kernels.expert_gemm.expert_mlp_int4`, as for all others.
    """
    return _launch(x, experts, _coded(gate_up), _coded(down), activation, biases)
