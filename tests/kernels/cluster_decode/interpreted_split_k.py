"""Run by test_split_k.py in a process of its own, with TRITON_INTERPRET=1 set before Triton is first imported.

Prints one line a case: "ok NAME" or "FAIL NAME: why". Never in bfloat16: the interpreter's dot of bfloat16 is garbage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ygglight.kernels.cluster_decode import decode_block, decode_block_reference, split_k
from ygglight.kernels.cluster_decode.testing import Block, make_block, make_spec
from ygglight.kernels.testing import poisoned_empty, rms_ratio

F16, F32 = torch.float16, torch.float32
RATIO = {F32: 1e-6, F16: 1e-3}
GQA = make_spec(4, 2, 64, 48)
MHA = make_spec(3, 3, 80, 48)
GEMMA = make_spec(4, 1, 256, 64, norm_offset=1.0, softcap=5.0, window=20)
QWEN3 = make_spec(6, 2, 128, 80, qk_norm=True)
# name, spec, lengths, splits, arguments of make_block
CASES: list[tuple[str, Any, list[int], int, dict[str, Any]]] = [
    *((f"context {n} of {kind}", GQA, [n], 2, {"dtype": kind}) for n in (0, 1, 63, 64, 65, 300) for kind in (F16, F32)),
    ("first slot of a cache", GQA, [0], 1, {"slots": 70, "in_place": True}),
    ("last slot of a cache", GQA, [69], 3, {"slots": 70, "in_place": True, "dtype": F16}),
    ("an empty cache", GQA, [0], 1, {"slots": 0}),
    ("MHA, 80", MHA, [65], 2, {"bias": True}),
    ("MHA, 80, half", MHA, [70], 1, {"bias": True, "dtype": F16}),
    ("heads of 96", make_spec(4, 2, 96, 64), [65], 2, {"bias": True}),
    ("heads of 128, norm of heads", QWEN3, [65], 3, {}),
    ("heads of 128, norm of heads, half", QWEN3, [40], 2, {"dtype": F16}),
    ("heads of 256, window, softcap, offset", GEMMA, [70], 2, {}),
    ("window that begins inside", replace(GQA, window=5), [2], 1, {}),
    ("window, half, batch", replace(GQA, window=40), [3, 100, 64], 4, {"dtype": F16}),
    ("batch in place", GQA, [0, 5, 63], 2, {"slots": 80, "in_place": True, "bias": True}),
    ("batch, norm of heads, half", QWEN3, [1, 66], 2, {"dtype": F16}),
    ("more sequences than a tile", make_spec(2, 1, 64, 32), [3] * 17, 1, {}),
    ("mask", GQA, [200], 3, {"mask": "bool", "slots": 220}),
    ("mask, batch, in place", GQA, [200, 17], 3, {"mask": "bool", "slots": 220, "in_place": True}),
    ("added mask", GQA, [65], 2, {"mask": "added", "slots": 70}),
    ("added mask, softcap", replace(GQA, softcap=2.0), [65], 2, {"mask": "added"}),
    ("interleaved", replace(GQA, interleaved_rope=True), [9], 1, {}),
    ("interleaved, partial", replace(GQA, interleaved_rope=True, rotary_dim=24), [9], 1, {}),
    ("partial", replace(QWEN3, rotary_dim=32), [9], 1, {}),
    ("no rotary", replace(GQA, rotary_dim=0), [9], 1, {}),
]


def why_wrong(block: Block, splits: int) -> str:
    """The empty string if all is well."""
    ratio = RATIO[block.inputs["x"].dtype]
    expected = block.to(torch.float64).run(decode_block_reference)
    with poisoned_empty():
        actual = block.run(split_k.launch, splits=splits)
    for name, one, other in zip(("output", "new keys", "new values"), actual, expected, strict=True):
        if not rms_ratio(one, other) <= ratio:
            return f"{name}: rms ratio {rms_ratio(one, other):.3g}"
    return ""


def why_control_passed() -> str:
    """What the comparison must see: one token more or less, a rotary of the other kind, a norm left out."""
    right = make_block(GQA, [9])
    expected = right.to(torch.float64).run(decode_block_reference)[0]
    for name, changed in (
        (
            "a length that is one off",
            Block(GQA, right.weights, right.inputs | {"lengths": right.inputs["lengths"] - 1}),
        ),
        ("the other rotary", Block(replace(GQA, interleaved_rope=True), right.weights, right.inputs)),
        ("a window", Block(replace(GQA, window=9), right.weights, right.inputs)),
    ):
        if not rms_ratio(changed.run(split_k.launch)[0], expected) > 10 * RATIO[F16]:
            return name
    return ""


def why_cache_wrong() -> str:
    """Of a whole cache nothing but the one slot may change."""
    block = make_block(GQA, [3, 9], slots=12, in_place=True)
    keys, values = (block.inputs[name].nan_to_num(7.0) for name in ("keys", "values"))
    before = keys.clone()
    named = block.inputs | {"keys": keys, "values": values, "new_keys": keys, "new_values": values}
    split_k.launch(weights=block.weights, spec=block.spec, **named)
    changed = (keys != before).any(dim=-1).any(dim=1).nonzero().tolist()
    return "" if changed == [[0, 3], [1, 9]] else f"slots {changed} changed"


def main() -> None:
    """Runs every case."""
    for name, spec, lengths, splits, options in CASES:
        why = why_wrong(make_block(spec, lengths, **options), splits)
        print(f"FAIL {name}: {why}" if why else f"ok {name}", flush=True)
    why = why_control_passed()
    print(f"FAIL controls passed: {why}" if why else "ok controls", flush=True)
    why = why_cache_wrong()
    print(f"FAIL cache: {why}" if why else "ok cache", flush=True)
    block = make_block(GQA, [65])
    runs = [block.run(decode_block), block.run(split_k.launch), block.run(split_k.launch)]
    same = all(map(torch.equal, runs[0], runs[1])) and all(map(torch.equal, runs[1], runs[2]))
    print("ok public function, the same bits" if same else "FAIL public function, the same bits", flush=True)


if __name__ == "__main__":
    main()
