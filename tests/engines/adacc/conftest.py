"""Region graphs in plain numbers for the planner's tests: random ones, and a block with the shape of a Llama layer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from ygglight.engines.adacc.graph import Action, CodecOption, Operator, Policy, RegionGraph, Value
from ygglight.engines.adacc.schedule import validate_policy


def random_graph(
    rng: random.Random,
    n_ops: int = 8,
    *,
    saved: float = 0.6,
    rich: bool = True,
    codecs: float = 0.4,
    n_actionable: int | None = None,
) -> RegionGraph:
    """A random region. ``rich`` adds in-place and multi-output operators, non-replayable ones, workspaces."""
    values: list[dict] = [
        {"nbytes": rng.randint(1, 9), "producer": None, "saved": rng.random() < 0.5},
        {"nbytes": 0, "producer": None, "saved": rng.random() < 0.5},
    ]
    if rich and rng.random() < 0.5:
        values.append({"nbytes": rng.randint(1, 9), "producer": None})
    operators, actionable = [], 0
    for index in range(n_ops):
        pool = range(len(values))
        inputs = set(rng.choices(pool, weights=[1 + i for i in pool], k=rng.choice((1, 1, 2, 2, 3))))
        outputs = []
        for _ in range(2 if rich and rng.random() < 0.2 else 1):
            keep = rng.random() < saved and (n_actionable is None or actionable < n_actionable)
            actionable += keep
            nbytes = rng.randint(1, 20)
            if rich and rng.random() < 0.15:
                nbytes = values[max(inputs)]["nbytes"]  # in place: another value of the same size
            options = ()
            if keep and nbytes and rng.random() < codecs:
                options = tuple(
                    CodecOption(
                        name,
                        nbytes // part,
                        rng.randint(1, 12),
                        error=rng.randint(0, 4) if part > 1 else 0,
                        workspace=rng.randint(0, 3) if rich else 0,
                    )
                    for name, part in (("int8", 2), ("int4", 4))[: rng.choice((1, 2))]
                )
            outputs.append(len(values))
            values.append({"nbytes": nbytes, "producer": index, "saved": keep, "birth": index, "codecs": options})
            values[-1]["pinned"] = keep and rich and rng.random() < 0.1
        operators.append(
            Operator(
                index,
                f"op{index}",
                tuple(sorted(inputs)),
                tuple(outputs),
                seconds=rng.randint(1, 10),
                replayable=not (rich and rng.random() < 0.12),
                workspace=rng.randint(0, 4) if rich and rng.random() < 0.4 else 0,
            )
        )
    for op in operators:
        for v in op.inputs:
            values[v]["death"] = op.index
    for v, spec in enumerate(values):
        spec.setdefault("death", spec["producer"] or 0)
        if rng.random() < 0.2:
            spec["death"] = min(n_ops, spec["death"] + rng.randint(0, n_ops))
        spec["name"] = f"t{v}"
    uses = [v for v, spec in enumerate(values) if spec.get("saved") and (not rich or rng.random() < 0.95)]
    uses.sort(key=lambda v: -v + rng.uniform(-3, 3))
    if rich:
        for _ in range(rng.randint(0, 3)):
            if uses:
                uses.insert(rng.randint(0, len(uses)), rng.choice(uses))
    nodes, node = [], 0
    for _ in uses:  # every other graph: several reads per backward node
        node += not rich or rng.random() < 0.6
        nodes.append(node)
    return RegionGraph(
        name="random",
        operators=tuple(operators),
        values=tuple(Value(id=i, **spec) for i, spec in enumerate(values)),
        uses=tuple(uses),
        forward_workspace=tuple(rng.randint(0, 6) if rich else 0 for _ in range(max(1, n_ops))),
        backward_workspace=tuple(rng.randint(0, 12) for _ in range(len(uses) + 1)),
        use_nodes=tuple(nodes) if rng.random() < 0.5 else (),
        tape_seconds=rng.choice((0, 0, 1)),
        hook_seconds=rng.choice((0, 0, 1)),
    )


def random_policy(rng: random.Random, graph: RegionGraph) -> Policy:
    """A random policy that can be executed."""
    actions: dict[int, Action] = {}
    codecs: dict[int, str] = {}
    weights = (rng.random(), rng.random(), rng.random() * 2)
    for value in graph.actionable:
        actions[value.id] = Action.KEEP
    for value in graph.actionable:
        choices = [Action.KEEP, Action.COMPRESS, Action.RECOMPUTE]
        action = rng.choices(choices, weights=weights)[0]
        if value.pinned or (action is Action.COMPRESS and not value.codecs):
            continue
        actions[value.id] = action
        if action is Action.COMPRESS:
            codecs[value.id] = rng.choice(value.codecs).name
        else:
            try:
                validate_policy(graph, Policy(actions, codecs))
            except ValueError:
                actions[value.id] = Action.KEEP
    return Policy(dict(actions), dict(codecs))


def llama_block(
    tokens: int = 8192, h: int = 4096, kv: int = 1024, ffn: int = 14336, *, lossy: bool = False, name: str = "Llama"
) -> RegionGraph:
    """The saved values and the operators of a Llama-3 layer in bf16 with flash attention (see ``adacc.md`` 2.1).

    Seconds assume 600 TFLOP/s and 3 TB/s; about 60 operators, norms and rotary embedding spelt out in fp32.
    """
    values = [Value(0, 2 * tokens * h, None, saved=True, name="input"), Value(1, 0, None, saved=True, name="weights")]
    operators: list[Operator] = []
    specs: list[dict] = []
    saved: set[int] = {0}

    def op(kind: str, inputs: list[int], sizes: list[int], *, flop: float = 0.0) -> list[int]:
        index, outputs = len(operators), []
        moved = sum(sizes)
        for nbytes in sizes:
            outputs.append(2 + len(specs))
            specs.append({"nbytes": nbytes, "producer": index, "birth": index, "name": f"{kind}:{index}"})
        moved += sum(values[i].nbytes if i < 2 else specs[i - 2]["nbytes"] for i in inputs)
        seconds = max(flop / 600e12, moved / 3e12) + 4e-6
        operators.append(Operator(index, f"aten.{kind}", tuple(inputs), tuple(outputs), seconds))
        return outputs

    def elementwise(kind: str, inputs: list[int], columns: float, width: int = 2) -> int:
        return op(kind, inputs, [int(tokens * columns * width)])[0]

    def mm(x: int, k: int, n: int) -> int:
        saved.add(x)
        return op("mm", [x, 1], [2 * tokens * n], flop=2.0 * tokens * k * n)[0]

    def norm(x: int) -> int:
        wide = elementwise("_to_copy", [x], h, 4)
        mean = elementwise("mean", [elementwise("pow", [wide], h, 4)], 1, 4)
        rstd = elementwise("rsqrt", [elementwise("add", [mean], 1, 4)], 1, 4)
        scaled = elementwise("mul", [wide, rstd], h, 4)
        narrow = elementwise("_to_copy", [scaled], h)
        saved.update((wide, rstd, narrow))
        return elementwise("mul", [narrow, 1], h)

    def rotary(x: int, columns: int) -> int:
        half = elementwise("neg", [x], columns / 2)
        turned = elementwise("cat", [half, x], columns)
        parts = [elementwise("mul", [part, 1], columns) for part in (x, turned)]
        return elementwise("add", parts, columns)

    x = norm(0)
    q, k, v = rotary(mm(x, h, h), h), rotary(mm(x, h, kv), kv), mm(x, h, kv)
    attended, lse = op("attention", [q, k, v], [2 * tokens * h, 4 * tokens * h // 128], flop=2.0 * tokens * tokens * h)
    saved.update((q, k, v, attended, lse))
    residual = elementwise("add", [0, mm(attended, h, h)], h)
    x = norm(residual)
    gate, up = mm(x, h, ffn), mm(x, h, ffn)
    act = elementwise("silu", [gate], ffn)
    saved.update((gate, up, act))
    out = elementwise("add", [residual, mm(elementwise("mul", [act, up], ffn), ffn, h)], h)

    last_read = {i: o.index for o in operators for i in o.inputs}
    for i, spec in enumerate(specs, start=2):
        options: tuple[CodecOption, ...] = ()
        if lossy and i in saved and i not in (q, k, v, attended, lse) and spec["nbytes"] > tokens * h:
            n = spec["nbytes"]
            options = (
                CodecOption("int8", n // 2, 1.6 * n / 3e12 * 2 + 1e-5, error=1e-7, workspace=n // 64),
                CodecOption("int4", int(n * 0.29), 1.3 * n / 3e12 * 2 + 1e-5, error=2e-5, workspace=n // 64),
            )
        spec["death"] = len(operators) if i == out else last_read.get(i, spec["producer"])
        values.append(Value(i, saved=i in saved, codecs=options, **spec))
    # A node of backward reads what it saved at once; nodes run in the reverse order of forward.
    uses: list[int] = []
    nodes: list[int] = []
    for o in reversed(operators):
        if o.name in ("aten.mm", "aten.mul", "aten.silu", "aten.pow", "aten.rsqrt", "aten.attention"):
            reads = (*o.inputs, *(o.outputs if o.name in ("aten.attention", "aten.rsqrt") else ()))
            uses.extend(i for i in reads if i in saved or i == 1)
            nodes.extend([len(operators) - o.index] * (len(uses) - len(nodes)))
    wide = 2 * tokens * ffn
    return RegionGraph(
        name=name,
        operators=tuple(operators),
        values=tuple(values),
        uses=tuple(uses),
        forward_workspace=(0,) * len(operators),
        backward_workspace=tuple(3 * wide if m < len(uses) // 3 else wide // 2 for m in range(len(uses) + 1)),
        use_nodes=tuple(nodes),
        tape_seconds=60 * 8e-6,
        hook_seconds=40e-6,
    )


@pytest.fixture(scope="session")
def graphs() -> SimpleNamespace:
    return SimpleNamespace(random_graph=random_graph, random_policy=random_policy, llama_block=llama_block)


@pytest.fixture(autouse=True)
def one_thread(no_leaked_torch_state: None) -> Iterator[None]:
    """Models this small run 20 times slower on two threads as soon as anything else runs on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
