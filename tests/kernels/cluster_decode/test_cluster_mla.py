"""The block of latent attention on clusters: its source emulated against the reference, and compiled for Hopper."""

import dataclasses
import importlib.util

import pytest
import torch

from ygglight.kernels.cluster_decode.emulated import emulated
from ygglight.kernels.cluster_decode.mla import LatentSpec, LatentWeights, latent_block_reference
from ygglight.kernels.testing import SHARED_MEMORY_LIMIT, compile_ahead, poisoned_empty, resources, rms_ratio

SMALL = LatentSpec(256, 2, 128, 64, 128, 512, 1e-6, 1e-5, 192**-0.5)
LITE = LatentSpec(2048, 16, 128, 64, 128, 512, 1e-6, 1e-6, 192**-0.5)  # DeepSeek-V2-Lite
LARGE = LatentSpec(5120, 128, 128, 64, 128, 512, 1e-6, 1e-6, 192**-0.5)  # DeepSeek-V2
SLOTS = 4096


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on tensors of a few KiB wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(spec, lengths, count, query=0, bias=False, mask=False, dtype=torch.float16, rotary="pairs", slots=False):
    """Committed tokens as given, of ``count`` slots; with ``slots`` the new token's is one among them."""
    spec = dataclasses.replace(spec, rotary=rotary)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0, mean=0.0):
        return (torch.randn(*shape, generator=generator) * scale + mean).to(dtype)

    def weight(rows, columns):
        return normal(rows, columns, scale=columns**-0.5)

    batch, values = len(lengths), spec.heads * spec.value_dim
    weights = LatentWeights(
        norm=normal(spec.hidden, scale=0.3, mean=1.0),
        q=weight(spec.heads * (spec.nope_dim + spec.rope_dim), query or spec.hidden),
        kv_a=weight(spec.latent + spec.rope_dim, spec.hidden),
        kv_a_norm=normal(spec.latent, scale=0.3, mean=1.0),
        kv_b=weight(spec.heads * (spec.nope_dim + spec.value_dim), spec.latent),
        o=weight(spec.hidden, values),
        q_a=weight(query, spec.hidden) if query else None,
        q_a_norm=normal(query, scale=0.3, mean=1.0) if query else None,
        q_a_bias=normal(query) if query and bias else None,
        kv_a_bias=normal(spec.latent + spec.rope_dim) if bias else None,
        o_bias=normal(spec.hidden) if bias else None,
    )
    cache = normal(batch, count, spec.latent + spec.rope_dim)
    for row, length in zip(cache, lengths, strict=True):
        row[length:] = torch.nan
    angles = torch.rand(batch, spec.rope_dim // 2, generator=generator) * 6
    return {
        "x": normal(batch, spec.hidden, scale=2.0), "weights": weights, "spec": spec, "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype), "latents": cache[..., : spec.latent], "rotated": cache[..., spec.latent :],
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "mask": torch.rand(batch, count, generator=generator) < 0.6 if mask else None,
        "slots": (torch.tensor(lengths) - 2).clamp(min=0) if slots else None,
    }  # fmt: skip


def in_dtype(arguments, dtype):
    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    weights = LatentWeights(**{name: cast(value) for name, value in vars(arguments["weights"]).items()})
    return {name: cast(value) for name, value in arguments.items()} | {"weights": weights}


def run(function, arguments, **options):
    x, spec, slots = arguments["x"], arguments["spec"], arguments["slots"]
    if slots is not None:  # into the cache that is read, of which later runs see nothing
        arguments = arguments | {name: arguments[name].clone() for name in ("latents", "rotated")}
        new = [arguments["latents"], arguments["rotated"]]
        with poisoned_empty():
            out = function(**arguments, new_latents=new[0], new_rotated=new[1], **options)
        rows = torch.arange(len(x), device=x.device)
        return out, *(each[rows, slots] for each in new)
    new = [
        torch.full((len(x), size), torch.nan, dtype=x.dtype, device=x.device) for size in (spec.latent, spec.rope_dim)
    ]
    with poisoned_empty():
        out = function(**arguments, new_latents=new[0], new_rotated=new[1], **options)
    return out, *new


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        (1, {"mask": True, "bias": True}),
        (2, {"query": 160, "rotary": "unzipped", "slots": True}),
        (4, {"rotary": "halves"}),
        (8, {"query": 96, "bias": True, "mask": True, "dtype": torch.bfloat16, "slots": True}),
    ],
)
def test_agrees_with_the_reference(blocks, options):
    arguments = sample(SMALL, [70, 0, 5], 80, **options)
    exact = run(latent_block_reference, in_dtype(arguments, torch.float64))
    rounded = run(latent_block_reference, arguments)
    launch = emulated("cluster_mla").launch
    for got, expected, unfused in zip(run(launch, arguments, blocks=blocks), exact, rounded, strict=True):
        assert rms_ratio(got, expected) <= 1.5 * rms_ratio(unfused, expected)
    # Controls: the sine's sign, one slot less, and the halves of a head's rows of kv_b changed for each other.
    swapped = arguments["weights"].kv_b.unflatten(0, (-1, 128)).flip(0).flatten(0, 1)
    for change in (
        {"sin": -arguments["sin"]},
        {"lengths": (arguments["lengths"] - 1).clamp(min=0)},
        {"weights": dataclasses.replace(arguments["weights"], kv_b=swapped)},
    ):
        wrong = run(launch, arguments | change, blocks=blocks)[0]
        assert rms_ratio(wrong, exact[0]) > 3 * rms_ratio(rounded[0], exact[0])


def test_sizes_that_do_not_fit_are_refused():
    launch = emulated("cluster_mla").launch
    arguments = sample(dataclasses.replace(SMALL, value_dim=96), [3], 4)
    with pytest.raises(ValueError, match="powers of two"):
        run(launch, arguments)
    with pytest.raises(ValueError, match="blocks=16"):
        run(launch, sample(SMALL, [3], 4), blocks=16)


V3 = dataclasses.replace(LARGE, rotary="unzipped")
CASES = [
    (LITE, 0, 8, "*bf16", False),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(LITE, 0, 1, "*fp16", False), (LITE, 0, 2, "*bf16", True), (LITE, 0, 4, "*bf16", False),
                     (LITE, 0, 8, "*bf16", True), (V3, 1536, 1, "*bf16", True), (V3, 1536, 2, "*bf16", False),
                     (LARGE, 1536, 4, "*fp16", True),
                     (dataclasses.replace(LARGE, rotary="halves"), 1536, 4, "*bf16", True)]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "query", "blocks", "dtype", "slots"), CASES)
def test_it_compiles(spec, query, blocks, dtype, slots):
    triton = pytest.importorskip("triton")
    if tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2]) < (3, 8):
        pytest.skip("Triton before 3.8 reduces within a block only")
    from ygglight.kernels.cluster_decode import cluster_mla, cluster_mla_kernels

    kernel = cluster_mla_kernels.latent_kernel
    token = spec.latent + spec.rope_dim
    constants = {
        "x_b": spec.hidden, "query_b": query, "q_r": query or spec.hidden, "kv_a_r": spec.hidden,
        "kv_b_r": spec.latent, "o_r": spec.heads * spec.value_dim, "cos_b": spec.rope_dim // 2,
        "sin_b": spec.rope_dim // 2, "latents_b": SLOTS * token, "latents_c": token, "rotated_b": SLOTS * token,
        "rotated_c": token, "mask_b": 0, "mask_c": 1, "mask_ptr": None, "kv_a_bias_ptr": None,
    }  # fmt: skip
    if slots:
        constants |= {"new_latents_b": SLOTS * token, "new_latents_c": token}
        constants |= {"new_rotated_b": SLOTS * token, "new_rotated_c": token}
    else:
        constants |= {"slots_ptr": None, "new_latents_b": spec.latent, "new_latents_c": 0}
        constants |= {"new_rotated_b": spec.rope_dim, "new_rotated_c": 0}
    constants |= {} if query else {"query_ptr": None, "query_norm_ptr": None}
    signature = {name: dtype for name in kernel.arg_names if name.endswith("_ptr")}
    signature |= {"slots_ptr": "*i64", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    signature |= {"query_ptr": "*fp32", "parts_ptr": "*fp32", "lengths_ptr": "*i32", "batches": "i32", "heads": "i32"}
    signature |= {"eps": "fp32", "latent_eps": "fp32", "inner": "fp32"}
    constants |= cluster_mla.constants(spec, spec.hidden, query, blocks)
    options = {"num_warps": cluster_mla.NUM_WARPS, "num_ctas": blocks, "enable_fp_fusion": True}
    compiled = compile_ahead(kernel, signature, constants, 90, **options)
    for word in ("mapa", "ld.shared::cluster", "barrier.cluster.arrive"):
        assert (word in compiled.asm["ptx"]) == (blocks > 1)
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[90]
    taken = resources(compiled)
    if taken is None:
        pytest.skip("no cuobjdump: registers and spills not read")
    assert taken.spill_bytes == 0


def test_the_query_latents_kernel_compiles():
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.experimental") is None:
        pytest.skip("no Gluon")
    from ygglight.kernels.cluster_decode.cluster_mla import QUERY_BLOCK, QUERY_ROWS
    from ygglight.kernels.cluster_decode.cluster_mla_kernels import query_latent_kernel

    signature = dict.fromkeys(("x_ptr", "norm_ptr", "weight_ptr"), "*bf16") | {"out_ptr": "*fp32", "eps": "fp32"}
    constants = {"bias_ptr": None, "x_b": 5120, "weight_r": 5120, "HIDDEN": 5120, "QUERY": 1536, "ROWS": QUERY_ROWS}
    compiled = compile_ahead(query_latent_kernel, signature, constants | {"BLOCK": QUERY_BLOCK}, 90, num_warps=4)
    taken = resources(compiled)
    assert taken is None or taken.spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize(("spec", "query"), [(LITE, 0), (dataclasses.replace(V3, heads=16), 1536)])
def test_on_a_gpu(spec, query, blocks):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the cluster block is for compute capability 9.0")
    from ygglight.kernels.cluster_decode import cluster_mla

    for number, lengths in enumerate(([1], [0, 4096], [1023])):
        options = {"rotary": spec.rotary, "slots": number == 2}
        arguments = sample(spec, lengths, 4100, query=query, bias=True, dtype=torch.bfloat16, **options)
        exact = run(latent_block_reference, in_dtype(arguments, torch.float64))
        rounded = run(latent_block_reference, arguments)
        on_device = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        weights = {name: value if value is None else value.cuda() for name, value in vars(arguments["weights"]).items()}
        on_device |= {"weights": LatentWeights(**weights)}
        actual = run(cluster_mla.launch, on_device, blocks=blocks)
        for got, expected, unfused in zip(actual, exact, rounded, strict=True):
            assert rms_ratio(got.cpu(), expected) <= 1.5 * rms_ratio(unfused, expected)
        assert all(map(torch.equal, actual, run(cluster_mla.launch, on_device, blocks=blocks)))
