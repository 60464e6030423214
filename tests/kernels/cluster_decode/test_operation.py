"""`decode_block` in a graph of torch.compile: one operation, no break, and the cache is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ygglight.kernels.cluster_decode import decode_block
from ygglight.kernels.cluster_decode.testing import make_block, make_spec


@pytest.mark.parametrize("in_place", [True, False])
def test_a_whole_graph(in_place: bool) -> None:
    spec = replace(make_spec(4, 2, 16, 32), window=8, softcap=5.0)
    block = make_block(spec, [9, 4], bias=True, mask="bool", in_place=in_place, slots=12)
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def note(functional: Any, given: Any) -> Any:
            seen.extend(str(node.target) for node in functional.graph.nodes if node.op == "call_function")
            return make_boxed_func(functional.forward)

        return aot_autograd(fw_compiler=note)(graph, inputs)

    def twice(**arguments: Any) -> Tensor:
        return decode_block(**arguments) + decode_block(**arguments)

    with torch.no_grad():
        expected = block.run(twice)
        actual = block.run(torch.compile(twice, fullgraph=True, backend=backend))
    assert all(map(torch.equal, actual, expected))
    assert sum("auto_functionalized" in name or "decode_block" in name for name in seen) == 2


def test_the_schema_says_what_is_written() -> None:
    spec = make_spec(2, 1, 16, 32)
    block = make_block(spec, [3], in_place=True, slots=6)
    block.inputs["keys"].nan_to_num_(), block.inputs["values"].nan_to_num_()
    given, w = block.inputs, block.weights
    flat = [*vars(w).values(), *vars(spec).values(), given["cos"], given["sin"]]
    caches = [given["keys"].clone(), given["values"].clone()]
    rest = [given["keys"], given["values"], given["lengths"], *caches, None, given["slots"], None]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ygglight.decode_block.default, (given["x"], *flat, *rest), test_utils=checks)
