import threading

import pytest

from ygglight.compat.folders import cache_root, publish


def test_the_folder_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("YGGLIGHT_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("YGGLIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "ygglight"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "ygglight"


def test_an_entry_is_built_once(cache):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "value").write_text("1")

    assert publish("a/b", build) == publish("a/b", build) == cache / "a" / "b"
    assert len(calls) == 1 and (cache / "a" / "b" / "value").read_text() == "1"


def test_a_failed_build_leaves_nothing(cache):
    def build(folder):
        (folder / "half").write_text("")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        publish("x/y", build)
    assert list((cache / "x").iterdir()) == []


def test_two_builders_at_once_agree(cache):
    together = threading.Barrier(2)

    def build(folder):
        (folder / "value").write_text("same")
        together.wait(10)

    threads = [threading.Thread(target=publish, args=("t/e", build)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.name for p in (cache / "t").iterdir()] == ["e"]


def test_an_unwritable_cache_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("YGGLIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set YGGLIGHT_CACHE"):
        publish("a", lambda folder: None)
