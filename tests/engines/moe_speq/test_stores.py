"""Experts in host memory and in a file: the same bytes, files that are not theirs, reads that fail."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ygglight.engines.moe_speq.disk import DiskStore
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.engines.moe_speq.stores import ExpertStore, HostStore, store_for

from .conftest import FAMILIES, tiny_moe, tokens

pytestmark = pytest.mark.usefixtures("own_cache")


def holds(store: Any, sites: Any, expected: dict[str, torch.Tensor]) -> bool:
    """Whether every slab of a store is what the model had."""
    out, right = torch.empty(store.nbytes, dtype=torch.uint8), True
    for site in sites:
        for expert in range(site.experts):
            store.read_into(site.index, expert, out)
            slab = store.slab(site.index, expert)
            for name, view in site.layout.views(out).items():
                right &= torch.equal(view, expected[f"{site.name}.{name}"][expert])
                right &= slab is None or torch.equal(site.layout.views(slab)[name], view)
    return right


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_store_holds_the_model_and_the_model_still_works(name: str, where: str, tmp_path: Path) -> None:
    model = tiny_moe(name, dtype=torch.bfloat16 if name == "olmoe" else torch.float32)
    sites = find_sites(model)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(tokens()).logits
    store = store_for(model, sites, where=where, device="cpu")
    assert isinstance(store, ExpertStore) and store.kind == where and store.layers == 2
    assert store.bytes_total == 16 * store.nbytes and store.nbytes == sites[0].layout.nbytes
    assert holds(store, sites, values)
    values[f"{sites[1].name}.down_proj"][7, 0, 0] += 1
    assert not holds(store, sites, values)
    values[f"{sites[1].name}.down_proj"] = model.state_dict()[f"{sites[1].name}.down_proj"].clone()
    experts = sites[0].module
    memory = experts.gate_up_proj.untyped_storage().data_ptr()
    assert experts.down_proj.untyped_storage().data_ptr() == memory  # both lie in the slabs: no second copy
    assert torch.equal(model(tokens()).logits, expected)
    store.close()
    store.close()
    assert experts.gate_up_proj.untyped_storage().data_ptr() != experts.down_proj.untyped_storage().data_ptr()
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(tokens()).logits, expected)
    model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("drop_cache", [False, True])
def test_reads_from_many_threads(drop_cache: bool, tmp_path: Path) -> None:
    model = tiny_moe("gpt_oss", num_hidden_layers=4)
    sites = find_sites(model)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    store = DiskStore.from_sites(sites, path=tmp_path / "x.slabs", drop_cache=drop_cache)
    assert store.io in (("direct", "dropped") if drop_cache else ("cached",))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: holds(store, sites, values), range(8)))
    store.close()


def test_reads_without_direct_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe("mixtral")
    sites, values = find_sites(model), {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    store = DiskStore.from_sites(sites, path=tmp_path / "x.slabs", drop_cache=True)
    assert store.io == "dropped" and holds(store, sites, values)
    store.close()


def test_a_file_is_written_once_and_only_for_these_weights(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def build(seed: int) -> DiskStore:
        model = tiny_moe("mixtral", seed=seed)
        return DiskStore.from_sites(find_sites(model), progress=lambda done, all_: seen.append((done, all_)))

    first = build(0)
    assert len(seen) == 16 and seen[-1][0] == seen[-1][1]
    assert first.path.is_relative_to(tmp_path / "cache")
    second = build(0)
    assert second.path == first.path and len(seen) == 16
    third = build(1)
    assert third.path != first.path and len(seen) == 32
    for store in (first, second, third):
        store.close()


def _truncated(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


def _foreign(path: Path) -> None:
    path.write_bytes(b"something of the user's")


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def _short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:90])


def _other(path: Path) -> None:
    path.unlink()
    model = tiny_moe("mixtral", seed=9)
    DiskStore.from_sites(find_sites(model), path=path).close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, "bytes and should have"),
        (_foreign, "no file of experts"),
        (_flipped, "header of .* is damaged"),
        (_short, "header of .* is damaged"),
        (_other, "another model"),
    ],
)
def test_files_that_are_not_theirs_are_refused_and_left_alone(damage: Any, message: str, tmp_path: Path) -> None:
    model, path = tiny_moe("mixtral"), tmp_path / "x.slabs"
    sites = find_sites(model)
    DiskStore.from_sites(sites, path=path).close()
    damage(path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        DiskStore.from_sites(sites, path=path)
    assert path.read_bytes() == content
    if damage is not _other:
        with pytest.raises(ValueError, match=message):
            DiskStore.open(path, sites[0].layout)
    else:
        with pytest.raises(ValueError, match="another model or dtype"):
            DiskStore.open(path, find_sites(tiny_moe("mixtral", hidden_size=32))[0].layout)


@pytest.mark.parametrize("drop_cache", [False, True])
def test_a_read_that_fails_names_file_layer_and_expert(drop_cache: bool, tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    store = DiskStore.from_sites(find_sites(model), path=tmp_path / "x.slabs", drop_cache=drop_cache)
    out = torch.empty(store.nbytes, dtype=torch.uint8)
    store.close()  # while the parameters' memory is still there
    store = DiskStore.open(tmp_path / "x.slabs", find_sites(model)[0].layout, drop_cache=drop_cache)
    os.truncate(tmp_path / "x.slabs", 8192)
    with pytest.raises(OSError, match=r"expert 5 of sparse layer 1 .*x\.slabs") as error:
        store.read_into(1, 5, out)
    assert error.value.filename == str(tmp_path / "x.slabs") and error.value.errno
    with pytest.raises(ValueError, match="uint8"):
        store.read_into(0, 0, out[:-1])
    store.close()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe("mixtral")
    sites, folder = find_sites(model), tmp_path / "slabs"

    def stop(done: int, whole: int) -> None:
        if done > whole // 2:
            raise KeyboardInterrupt

    for path in (folder / "x.slabs", None):
        with pytest.raises(KeyboardInterrupt):
            DiskStore.from_sites(sites, path=path, progress=stop)
    assert not [file for root in (folder, tmp_path / "cache") for file in root.rglob("*") if file.is_file()]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="YGGLIGHT_CACHE"):
        DiskStore.from_sites(sites, path=folder / "x.slabs")


def test_where_experts_go() -> None:
    model = tiny_moe("mixtral")
    sites = find_sites(model)
    for where, device, kind in (("auto", "cpu", DiskStore), ("auto", "cuda", HostStore), ("host", "cpu", HostStore)):
        store = store_for(model, sites, where=where, device=device)
        assert isinstance(store, kind)
        store.close()
    with pytest.raises(ValueError, match="'host' or 'disk'"):
        store_for(model, sites, where="gpu", device="cpu")
    with pytest.raises(ValueError, match="another model"):
        store_for(tiny_moe("mixtral"), sites, device="cpu")
    with pytest.raises(ValueError, match="where='disk'"):
        store_for(model, sites, where="host", device="cpu", path="x")
    with pytest.raises(ValueError, match="load_without_experts"):
        store_for(model, find_sites(model.to("meta")), device="cpu")


@pytest.mark.gpu
def test_a_model_that_was_on_the_gpu_has_its_experts_there_again() -> None:
    model = tiny_moe("mixtral").cuda()
    experts = model.model.layers[0].mlp.experts
    expected = experts.down_proj.clone()
    store = store_for(model, find_sites(model), device="cuda")
    assert not experts.down_proj.is_cuda
    store.close()
    assert all(p.is_cuda for p in model.parameters()) and torch.equal(experts.down_proj, expected)
