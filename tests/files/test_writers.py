"""Several writers of one name, and writers that died: what was saved last loads whole, and nothing else is left."""

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import ifjax
from ifjax import atomic

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Writers of one name in one file or in shards, all at once, and a reader: no device is started, so fork is harmless.
PARALLEL = """
import os, sys
import numpy as np
import ifjax
from pathlib import Path

path = Path(sys.argv[1]) / "model.safetensors"
OPTIONS = [{"max_shard_bytes": 5000}, {}, {"max_shard_bytes": 9000}]

def tree(version):
    return {f"l{i}": np.full(1000, version, np.int32) for i in range(4)}

def version(where):
    opened = ifjax.open_file(where, check=True)
    try:
        versions = {int(v) for a in opened.values() for v in np.unique(a)}
    except (ifjax.files.FileError, FileNotFoundError) as error:  # replaced after its header was read: said as such
        assert "changed since" in str(error) or isinstance(error, FileNotFoundError), error
        return None
    assert len(versions) == 1 and len(opened) == 4, versions
    return versions.pop()

ifjax.save_file(tree(0), path)
children = []
for writer in range(3):
    child = os.fork()
    if child == 0:
        try:
            for i in range(40):
                ifjax.save_file(tree(1 + 100 * writer + i), path, **OPTIONS[(writer + i // 10) % 3])
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
seen, status = set(), []
while children:
    seen.add(version(path if len(seen) % 2 else path.parent))
    done, how = os.waitpid(-1, os.WNOHANG)
    if done:
        children.remove(done)
        status.append(how)
assert status == [0, 0, 0], status
last = version(path)
files = {p.name for p in path.parent.iterdir()}
named = {p.name for p in ifjax.open_file(path).files} | {Path(ifjax.open_file(path).path).name}
assert files == named, (files, named)
assert last % 100 == 40 and len(seen) > 2, (last, seen)
"""


def test_parallel_savers_of_one_name_leave_one_whole_checkpoint(tmp_path):
    ran = subprocess.run([sys.executable, "-c", PARALLEL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def die_while(work):
    """Run in a child that ends without any clean-up."""
    with warnings.catch_warnings():  # JAX's threads are not in the child, which needs none of them
        warnings.simplefilter("ignore", RuntimeWarning)
        child = os.fork()
    if child == 0:
        with work():
            os._exit(7)
    assert os.waitpid(child, 0)[1] >> 8 == 7


KILL_AT = """
import os, sys
import numpy as np
import ifjax
from ifjax import atomic
from ifjax.files import safetensors as files
from pathlib import Path

folder, MANY = Path(sys.argv[1]), {"max_shard_bytes": 9000}

def tree(version):
    return {f"l{i}": np.full(1000, version, np.int32) for i in range(4)}

def version(where):
    opened = dict(ifjax.open_file(where))
    versions = {int(v) for a in opened.values() for v in np.unique(a)}
    assert len(versions) == 1 and len(opened) == 4, versions
    return versions.pop()

def die(work, at):
    # In a child, which ends at its at-th call that renames or removes; returns whether it came so far.
    child = os.fork()
    if child == 0:
        left = [at]
        def counted(call):
            def wrapped(*args, **kwargs):
                left[0] -= 1
                if not left[0]:
                    os._exit(7)
                return call(*args, **kwargs)
            return wrapped
        os.replace, os.rename, Path.unlink = counted(os.replace), counted(os.rename), counted(Path.unlink)
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] >> 8 == 7

for name in "model", "other":
    path = folder / f"{name}.safetensors"
    for first, then, last in (MANY, MANY, {}), ({}, MANY, MANY), (MANY, {}, MANY):
        at = 1
        while True:
            for file in folder.iterdir():
                file.unlink()
            ifjax.save_file(tree(1), path, **first)
            if not die(lambda: ifjax.save_file(tree(2), path, **then), at):
                break
            assert version(path) in (1, 2)
            try:
                found = version(folder)
                assert found in (1, 2)
            except ifjax.files.FileError as error:  # between the new one's coming and the old one's going
                assert "holds 2 checkpoints" in str(error), error
                assert first != then
            ifjax.save_file(tree(3), path, **last)
            assert version(folder) == version(path) == 3
            opened = ifjax.open_file(path)
            left = {p.name for p in folder.iterdir()} - {p.name for p in (*opened.files, opened.path)}
            assert not left, (at, left)
            at += 1
        print(name, at - 1)
"""


def test_a_kill_between_any_two_renames_leaves_nothing_that_the_next_writer_does_not_remove(tmp_path):
    ran = subprocess.run([sys.executable, "-c", KILL_AT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert all(int(line.split()[1]) > 2 for line in ran.stdout.splitlines()), ran.stdout


def test_files_of_others_under_names_of_a_dead_writer_stay(tmp_path):
    path = tmp_path / "m.safetensors"
    shards = [tmp_path / f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]

    @contextlib.contextmanager
    def work():
        with atomic.temporary_folder(path) as folder:
            files = {folder / str(i): shard.name for i, shard in enumerate(shards)}
            for file, name in files.items():
                file.write_bytes(b"ours")
                os.link(file, tmp_path / name)
            atomic.note_doubtful(folder, files, tmp_path / "m.safetensors.index.json")
            yield

    die_while(work)
    assert all(shard.exists() for shard in shards)
    shards[0].unlink()
    (tmp_path / "x").write_bytes(b"theirs")
    (tmp_path / "x").rename(shards[0])
    with atomic.replacing(path) as file:
        file.write(b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [shards[0].name, path.name]


def temporaries(folder):
    return sorted(p.name for p in folder.glob(".*.tmp"))


@pytest.mark.parametrize("make", [atomic.replacing, atomic.new_folder, atomic.temporary_folder])
def test_temporaries_of_dead_writers_are_removed_by_the_next_one_of_the_name(make, tmp_path):
    mine, others = tmp_path / "m.safetensors", tmp_path / "m2.safetensors"
    for path in (mine, mine, others):
        die_while(lambda path=path: make(path))
        assert temporaries(tmp_path)  # of `mine` the second writer has removed what the first one left
    assert len(temporaries(tmp_path)) == 2
    with atomic.replacing(mine) as at_work, atomic.replacing(mine):  # one that is at work stays
        at_work.write(b"x")
        assert len(temporaries(tmp_path)) == 3  # two at work, and one of `others`
    assert mine.read_bytes() == b"x"
    assert [name.startswith(".m2.safetensors.") for name in temporaries(tmp_path)] == [True]
    ifjax.save_file({"a": np.zeros(3, np.float32)}, others, max_shard_bytes=1)
    assert temporaries(tmp_path) == []


def test_names_with_wildcards_are_names(tmp_path):
    die_while(lambda: atomic.replacing(tmp_path / "abc.safetensors"))
    ifjax.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "[a-c]*.safetensors")
    assert len(temporaries(tmp_path)) == 1


def test_a_file_system_without_locks_is_written_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    path = ifjax.save_file({"a": np.zeros(3, np.float32), "b": np.ones(3)}, tmp_path / "m.safetensors",
                           max_shard_bytes=8)  # fmt: skip
    assert list(ifjax.open_file(path)) == ["a", "b"]
    ifjax.save_file({"c": np.zeros(3, np.float32)}, tmp_path / "m.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_shards_that_are_replaced_while_their_headers_are_read_are_read_again(tmp_path, monkeypatch):
    """The index was read, and then the files that it names are gone, or hold another checkpoint under their names."""
    from ifjax.files import safetensors as files

    path, read = tmp_path / "m.safetensors", files.read_contents
    for saves in (1, 2):  # the second time under the first names
        ifjax.save_file({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}, path)
        ifjax.save_file({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}, path, max_shard_bytes=1)
        left = [1.0] * saves

        def slowly(file, left=left):
            if (left and file.name.startswith("m-00002")) or (left and "-00002-of-" in file.name):
                for value in [left.pop() for _ in list(left)]:
                    new = {name: np.full(2, value, np.float32) for name in ("a", "b")}
                    ifjax.save_file(new, path, max_shard_bytes=1)
            return read(file)

        monkeypatch.setattr(files, "read_contents", slowly)
        opened = ifjax.open_file(path)
        monkeypatch.setattr(files, "read_contents", read)
        assert {float(v) for name in ("a", "b") for v in opened[name]} == {1.0}
        assert not left


@pytest.mark.exchange
def test_a_gguf_file_that_is_replaced_or_written_to_while_open(tmp_path):
    """Replaced: the old one lives on, as it is mapped. Written to: said so."""
    pytest.importorskip("gguf")
    from ifjax import exchange
    from ifjax.files import FileError

    path = tmp_path / "m.gguf"

    def save(value, **more):
        exchange.save({"a.weight": ifjax.quantize(np.full((4, 64), value, np.float32), "mxfp4")} | more, path, "gguf")

    save(1.0)
    opened = exchange.open_checkpoint(path)
    old = opened.copied("a.weight")
    save(2.0, b=np.ones(64, np.float32))
    np.testing.assert_array_equal(opened.copied("a.weight"), old)
    assert (exchange.open_checkpoint(path).copied("a.weight") != old).any()
    opened = exchange.open_checkpoint(path)
    with open(path, "r+b") as file:
        file.write(b"GGUF")
    os.utime(path, ns=(1, 1))
    for read in (lambda: opened.array("a.weight"), lambda: opened.read("a.weight", 0, 4)):
        with pytest.raises(FileError, match="changed since it was opened"):
            read()
