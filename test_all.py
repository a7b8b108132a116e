"""What this repository claims, as tests: one section a file, in the order of the files.

bash run.sh test            everything that is quick
bash run.sh test all        and what takes minutes or gigabytes
"""
import asyncio
import builtins
import contextlib
import copy
import ctypes
import datetime as dt
import functools
import gc
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import warnings
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import actors as small_ray
import arrowlite as al
import engine as E
import evaluate as ev
import kernels as K
import parallel as P
import ppo
import sft
from engine import LLM, SamplingParams

HERE = Path(__file__).parent
signal.signal(signal.SIGINT, signal.default_int_handler)        # shells have it ignored by what runs in the background


def in_child(function, *args, timeout=60):
    """Run a function in a forked process and return what it returns: for limits, crashes and memory."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def body():
        try:
            theirs.send((True, function(*args)))
        except BaseException:
            theirs.send((False, traceback.format_exc()))

    process = context.Process(target=body)
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise TimeoutError(f"{function.__name__} took more than {timeout} s")
        done, value = ours.recv()
    except EOFError:
        process.join(10)
        return f"died of signal {-process.exitcode}"
    finally:
        if process.is_alive():
            process.join(1)
        if process.is_alive():
            process.kill()
    assert done, value
    return value


# What the sections below share.

def gpu(test):
    """For a test that needs a GPU: `pytest -m gpu` runs these alone."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def until(condition, seconds=20):
    """Wait for something that should soon be true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def _rank(rank, world, store, results, function, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        results.put((rank, True, pickle.dumps(function(*args))))    # bytes: shared memory would die with us
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def on_ranks(world, function, *args, timeout=100):
    """What function(*args) returns in each of as many forked processes, which are one group."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        children = [context.Process(target=_rank, args=(rank, world, f"{folder}/store", results, function, args),
                                    daemon=True) for rank in range(world)]
        try:
            for child in children:
                child.start()
            found, deadline = {}, time.monotonic() + timeout
            while len(found) < world:
                rank, fine, value = results.get(timeout=max(0.1, deadline - time.monotonic()))
                assert fine, f"rank {rank}:\n{value}"
                found[rank] = pickle.loads(value)
            for child in children:
                child.join(10)
        finally:
            for child in children:
                child.kill()
    return [found[rank] for rank in range(world)]


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# --- arrowlite.py ----------------------------------------------------------------------------------------------------

pa = pytest.importorskip("pyarrow")
ipc = pytest.importorskip("pyarrow.ipc")
UTC = dt.timezone.utc


def every_type(n=11):
    """A pyarrow table with every type there is, nulls in each, nested to a depth of four."""
    pytest.importorskip("pandas")           # without it pyarrow has no objects for nanoseconds

    def nulled(values, kind, every=4):
        return pa.array([None if i % every == 1 else v for i, v in enumerate(values)], kind)

    columns = {"null": pa.nulls(n), "bool": nulled([i % 3 == 0 for i in range(n)], pa.bool_())}
    for bits in (8, 16, 32, 64):
        low, high = -(2 ** (bits - 1)), 2**bits - 1
        columns[f"int{bits}"] = nulled([low + i for i in range(n)], getattr(pa, f"int{bits}")())
        columns[f"uint{bits}"] = nulled([high - i for i in range(n)], getattr(pa, f"uint{bits}")())
    for bits in (16, 32, 64):
        values = np.arange(n).astype(f"f{bits // 8}") / 4
        columns[f"float{bits}"] = nulled(list(values), getattr(pa, f"float{bits}")())
    texts = ["", "a", "é€😀", "x" * 13, "null", "\0", "end", "日本", "tab\t", "b", "twelve bytes"][:n]
    columns |= {
        "utf8": nulled(texts, pa.utf8()), "large_utf8": nulled(texts, pa.large_utf8()),
        "binary": nulled([t.encode() + b"\xff" for t in texts], pa.binary()),
        "large_binary": nulled([t.encode() for t in texts], pa.large_binary()),
        "fixed": nulled([bytes([i, 0, 255]) for i in range(n)], pa.binary(3)),
        "string_view": nulled(texts, pa.string_view()),
        "binary_view": nulled([b"y" * i for i in range(n)], pa.binary_view()),
        "date32": nulled([dt.date(1960, 1, 1) + dt.timedelta(days=999 * i) for i in range(n)], pa.date32()),
        "date64": nulled([dt.date(2020, 1, 1) + dt.timedelta(days=i) for i in range(n)], pa.date64()),
        "list": nulled([list(range(i)) for i in range(n)], pa.list_(pa.int32())),
        "large_list": nulled([[str(i), None] * (i % 3) for i in range(n)], pa.large_list(pa.utf8())),
        "fixed_list": nulled([[i, None, -i] for i in range(n)], pa.list_(pa.int16(), 3)),
        "struct": nulled([{"a": i, "b": [{"c": [bool(i & 1), None]}, None]} for i in range(n)],
                         pa.struct([("a", pa.int64()), ("b", pa.list_(pa.struct([("c", pa.list_(pa.bool_()))])))])),
        "dictionary": nulled(["red", "green", "red"] * n, pa.utf8())[:n].dictionary_encode(),
        "listed_dictionary": pa.ListArray.from_arrays([0] * (n // 2) + [3] * (n - n // 2) + [7],
                                                      pa.array(list("abacaba")).dictionary_encode()),
    }
    for unit in ("s", "ms", "us", "ns"):
        moments = np.arange(n) * 86_399_999_999_999 // 10 ** (9 - 3 * ["s", "ms", "us", "ns"].index(unit))
        columns[f"timestamp_{unit}"] = nulled(list(moments), pa.int64()).cast(pa.timestamp(unit))
        columns[f"zoned_{unit}"] = nulled(list(moments), pa.int64()).cast(pa.timestamp(unit, "UTC"))
        columns[f"duration_{unit}"] = nulled(list(moments), pa.int64()).cast(pa.duration(unit))
    return pa.table(columns)


def sane(rows):
    """pyarrow's Python values in our convention: nanoseconds as numpy scalars, which keep all digits."""
    def value(x):
        name = type(x).__name__
        if name == "Timestamp":
            return np.datetime64(x.value, "ns")
        if name == "Timedelta":
            return np.timedelta64(x.value, "ns")
        if isinstance(x, np.generic) and not isinstance(x, (np.datetime64, np.timedelta64)):
            return x.item()
        if isinstance(x, dict):
            return {k: value(v) for k, v in x.items()}
        return [value(y) for y in x] if isinstance(x, list) else x
    return [value(row) for row in rows]


def without_views(table):
    """The table as we give it back: views are read as large types."""
    for i, f in enumerate(table.schema):
        if f.type in (pa.string_view(), pa.binary_view()):
            kind = pa.large_utf8() if f.type == pa.string_view() else pa.large_binary()
            table = table.set_column(i, f.name, pa.chunked_array([c.cast(kind) for c in table.column(i).chunks], kind))
    return table


def save(table, path, stream=False, max_chunksize=None, **options):
    new = ipc.new_stream if stream else ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=max_chunksize)
    return path


def load(path):
    with pa.OSFile(str(path)) as source:
        start = source.read(6)
    reader = ipc.open_file(str(path)) if start == b"ARROW1" else ipc.open_stream(str(path))
    table = reader.read_all()
    table.validate(full=True)
    return table


def addresses(path):
    """The spans of memory into which a file is mapped in this process."""
    spans = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith(str(path))]
    return [(int(a, 16), int(b, 16)) for a, b in spans]


def is_inside(path, a):
    start = a.__array_interface__["data"][0]
    return any(low <= start and start + a.nbytes <= high for low, high in addresses(path))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_arrowlite_reads_every_type_that_pyarrow_writes(tmp_path, stream, chunk):
    table = every_type()
    path = save(table, tmp_path / "t.arrow", stream, chunk)
    ours = al.read(path)
    assert ours.to_pylist() == sane(table.to_pylist())
    assert ours.column_names == table.column_names and ours.num_rows == len(table)
    for name in table.column_names:
        for i in (0, 1, -1):
            assert ours[name][i] == sane([table[name][i].as_py()])[0]
        assert ours[name].null_count == table[name].null_count


@pytest.mark.parametrize("stream", [False, True])
def test_arrowlite_writes_every_type_so_that_pyarrow_reads_the_same(tmp_path, stream):
    table = every_type()
    al.write(al.read(save(table, tmp_path / "in.arrow", max_chunksize=4)), tmp_path / "out.arrow", stream=stream)
    again = load(tmp_path / "out.arrow")
    assert again.schema.equals(without_views(table).schema)
    assert again.equals(without_views(table))


def test_arrowlite_slices_at_any_offset_keep_values_and_write_dense(tmp_path):
    table = every_type()
    ours = al.read(save(table, tmp_path / "in.arrow"))
    rows = sane(table.to_pylist())
    for start in range(len(table)):
        for stop in (start, start + 1, start + 5, len(table)):
            part = ours[start:stop]
            assert part.to_pylist() == rows[start:stop]
            al.write(part, tmp_path / "part.arrow")
            assert load(tmp_path / "part.arrow").equals(without_views(table).slice(start, max(0, stop - start)))


def test_arrowlite_reads_sliced_pyarrow_arrays_in_memory():
    table = every_type()
    rows = sane(table.to_pylist())
    for start in range(1, len(table)):
        assert al.Table.from_arrow(table.slice(start, 4)).to_pylist() == rows[start : start + 4]


def test_arrowlite_empty_tables_and_batches_without_rows(tmp_path):
    table = every_type()
    empty = table.slice(0, 0)
    for source in (empty, pa.concat_tables([empty, table, empty, table.slice(3), empty])):
        path = tmp_path / "t.arrow"
        with pa.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, source.schema) as writer:
            for piece in (empty, source, empty):
                for batch in piece.to_batches() or [pa.RecordBatch.from_pylist([], schema=source.schema)]:
                    writer.write_batch(batch)
        ours = al.read(path)
        assert ours.to_pylist() == sane(source.to_pylist())
        al.write(ours, tmp_path / "again.arrow")
        assert load(tmp_path / "again.arrow").equals(without_views(source))
    nothing = al.Table.from_pydict({})
    al.write(nothing, tmp_path / "nothing.arrow")
    assert al.read(tmp_path / "nothing.arrow").to_pylist() == [] and load(tmp_path / "nothing.arrow").num_rows == 0
    assert al.Table.from_pylist([]).num_rows == 0
    assert al.read(tmp_path / "again.arrow")[:0].to_pydict()["utf8"] == []


@pytest.mark.slow
def test_arrowlite_holds_more_than_two_gigabytes_of_text(tmp_path):
    word = "x" * (1 << 20)
    table = al.Table.from_pydict({"text": [word] * 2100})
    assert table["text"].type == "large_utf8"
    al.write(table, tmp_path / "big.arrow")
    del table
    again = al.read(tmp_path / "big.arrow")
    assert len(again) == 2100 and again[2099]["text"] == word
    assert ipc.open_file(pa.memory_map(str(tmp_path / "big.arrow"))).read_all()["text"][2099].as_py() == word
    with pytest.raises(ValueError, match="large_utf8"):
        al.array(again["text"], "utf8")


def test_arrowlite_files_open_in_feather_polars_duckdb_and_datasets(tmp_path):
    feather, polars = pytest.importorskip("pyarrow.feather"), pytest.importorskip("polars")
    duckdb, datasets = pytest.importorskip("duckdb"), pytest.importorskip("datasets")
    table = al.Table.from_pydict({"i": [1, None, 3], "text": ["a", None, "日本"], "tokens": [[1, 2], [], None],
                                  "s": [{"x": 1.5}, None, {"x": None}], "b": [True, False, None]})
    rows = table.to_pylist()
    file, stream = tmp_path / "t.arrow", tmp_path / "s.arrow"
    al.write(table, file)
    al.write(table, stream, stream=True)
    assert feather.read_table(file).to_pylist() == rows
    for frame in (polars.read_ipc(file), polars.scan_ipc(file).collect()):          # polars maps the file to scan it
        assert frame.drop("s").to_dicts() == [{k: r[k] for k in r if k != "s"} for r in rows]
    mapped = ipc.open_file(pa.memory_map(str(file))).read_all()
    assert duckdb.from_arrow(mapped).aggregate("sum(i), count(text)").fetchall() == [(4, 2)]
    assert datasets.Dataset.from_file(str(stream)).to_list() == rows


def test_arrowlite_reads_what_polars_and_datasets_write(tmp_path):
    polars, datasets = pytest.importorskip("polars"), pytest.importorskip("datasets")
    frame = polars.DataFrame({"i": [1, None, 3], "text": ["a", None, "a text of more than twelve bytes"],
                              "l": [["x"], [], None], "c": polars.Series(["u", "v", "u"], dtype=polars.Categorical)})
    frame.write_ipc(tmp_path / "p.arrow")
    assert al.read(tmp_path / "p.arrow").to_pylist() == frame.to_dicts()
    frame.write_ipc_stream(tmp_path / "p.arrows")
    assert al.read(tmp_path / "p.arrows").to_pylist() == frame.to_dicts()
    rows = [{"messages": [{"role": "user", "content": f"é{i}"}], "n": i} for i in range(2500)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    assert al.read(tmp_path / "d" / "data-00000-of-00001.arrow").to_pylist() == rows


def test_arrowlite_metadata_of_schema_and_fields_survives(tmp_path):
    inner = pa.field("item", pa.int8(), nullable=False, metadata={"deep": "yes"})
    column = pa.field("x", pa.list_(inner), nullable=False, metadata={b"k": b"\xff\0"})
    schema = pa.schema([column], metadata={"a": "é"})
    path = save(pa.table({"x": [[1], []]}, schema), tmp_path / "t.arrow")
    al.write(al.read(path).shuffle(0).filter(lambda row: True), tmp_path / "u.arrow")
    assert load(tmp_path / "u.arrow").schema.equals(schema, check_metadata=True)
    assert pa.table(al.read(path)).schema.equals(schema, check_metadata=True)
    assert al.read(path).schema.metadata == {b"a": "é".encode()}
    assert str(al.read(path).schema) == "x: list<int8> not null" == str(al.read(path).schema.field("x"))
    assert pa.table(al.Table.from_arrow(pa.table(al.read(path)))).schema.equals(schema, check_metadata=True)


def test_arrowlite_reads_delta_and_replaced_dictionaries(tmp_path):
    def column(*words):
        return pa.table({"c": pa.array(words).dictionary_encode()})
    parts = [column("a", "b"), column("a", "b", "c"), column("a", "b", "c", "d", None)]
    wanted = [row for part in parts for row in part.to_pylist()]
    for name, stream, deltas, tables in (("delta.arrow", False, True, parts), ("delta.arrows", True, True, parts),
                                         ("new.arrows", True, False, parts + [column("z", "a")])):
        with pa.OSFile(str(tmp_path / name), "wb") as sink:
            options = ipc.IpcWriteOptions(emit_dictionary_deltas=deltas)
            with (ipc.new_stream if stream else ipc.new_file)(sink, parts[0].schema, options=options) as writer:
                for part in tables:
                    writer.write_table(part)
        ours = al.read(tmp_path / name)
        expected = wanted + ([{"c": "z"}, {"c": "a"}] if len(tables) > 3 else [])
        assert ours.to_pylist() == expected and ours.shuffle(1)["c"].to_pylist() is not None
        assert [ours[i] for i in range(len(ours))] == expected
        for framing in (False, True):
            al.write(ours, tmp_path / "again.arrow", stream=framing)
            assert load(tmp_path / "again.arrow").to_pylist() == expected
            assert load(tmp_path / "again.arrow").schema == parts[0].schema
    with al.Writer(tmp_path / "w.arrow", {"c": "dictionary<int32, utf8>"}) as writer:
        for part in tables:
            writer.write(al.Table.from_arrow(part))
    assert load(tmp_path / "w.arrow").to_pylist() == expected


def test_arrowlite_dictionaries_of_different_values_become_one(tmp_path):
    nothing = pa.table({"c": pa.array([None, None], pa.utf8()).dictionary_encode()})    # its dictionary is empty
    some = pa.table({"c": pa.array(["x", "y"]).dictionary_encode()})
    for order in ((nothing, some), (some, nothing), (nothing, nothing)):
        table = al.concat([al.Table.from_arrow(part) for part in order])
        rows = [row for part in order for row in part.to_pylist()]
        for view, wanted in ((table, rows), (table.select([3, 1, 0, 2]), [rows[i] for i in (3, 1, 0, 2)])):
            al.write(view, tmp_path / "t.arrow")
            assert load(tmp_path / "t.arrow").to_pylist() == pa.table(view).to_pylist() == view.to_pylist() == wanted
    parts = [al.Table.from_pydict({"c": al.array([f"{p}{i}" for i in range(100)], "dictionary<int8, utf8>")})
             for p in "ab"]
    both = al.concat(parts)
    assert both["c"].type == "dictionary<int32, utf8>"       # 200 values are more than int8 counts
    al.write(both.shuffle(0), tmp_path / "t.arrow")
    assert load(tmp_path / "t.arrow").to_pylist() == both.shuffle(0).to_pylist()
    with pytest.raises(ValueError, match="200 distinct values are too many .* wider index"):
        with al.Writer(tmp_path / "u.arrow", parts[0].schema) as writer:
            writer.write(parts[0])
            writer.write(parts[1])
    assert not (tmp_path / "u.arrow").exists()


@pytest.mark.parametrize("below", [lambda c: pa.struct([("a", c)]), lambda c: pa.struct([("s", pa.struct([("a", c)]))]),
                                   lambda c: pa.list_(c, 2), lambda c: pa.struct([("f", pa.list_(c, 1))])])
def test_arrowlite_an_index_below_a_null_need_not_have_a_value(tmp_path, below):
    there = pa.table({"x": pa.array([None, None], below(pa.dictionary(pa.int8(), pa.string())))})
    save(there, tmp_path / "t.arrow")
    for ours in (al.read(tmp_path / "t.arrow"), al.Table.from_arrow(there)):
        al.write(ours, tmp_path / "u.arrow")
        again = al.read(tmp_path / "u.arrow")
        for table in (ours, ours.select([1, 0]), pa.table(ours), again, load(tmp_path / "u.arrow")):
            assert table.to_pylist() == [{"x": None}, {"x": None}]
    bad = pa.DictionaryArray.from_arrays(pa.array([1, 7], pa.int8()), ["u", "v"], safe=False)
    hidden, seen = (al.array(pa.StructArray.from_arrays([bad], ["a"], mask=pa.array([not last, last])))
                    for last in (True, False))
    assert hidden.to_pylist() == [{"a": "v"}, None]
    with pytest.raises(ValueError, match="outside of its data"):
        seen.to_pylist()


def test_arrowlite_a_dictionary_within_a_dictionary_is_read_and_not_written_wrongly(tmp_path):
    inner = pa.ListArray.from_arrays([0, 2, 3], pa.array(["a", "b", "a"]).dictionary_encode())
    table = pa.table({"c": pa.DictionaryArray.from_arrays([1, 0, 1], inner)})
    ours = al.Table.from_arrow(table)
    assert ours.to_pylist() == table.to_pylist()
    with pytest.raises(ValueError, match="column 'c': a dictionary within"):
        al.write(ours, tmp_path / "t.arrow")
    assert not list(tmp_path.iterdir())


def test_arrowlite_an_error_while_a_batch_is_made_is_not_the_end_of_the_table(tmp_path):
    table = al.Table.from_pydict({"x": [1, 2, 3]})

    def fail(k):
        raise IndexError("within a batch")
    broken = al.Table(table.schema, al.Lazy(1, fail), [3])
    path = tmp_path / "t.arrow"
    for use in (lambda: al.write(broken, path), lambda: al.write(broken.shuffle(0), path), lambda: list(broken),
                lambda: broken.to_pylist(), lambda: list(broken["x"])):
        with pytest.raises(IndexError, match="within a batch"):
            use()
    assert not (tmp_path / "t.arrow").exists()


def test_arrowlite_tables_without_columns_keep_their_rows(tmp_path):
    for table in (al.Table.from_pylist([{}, {}]), al.Table.from_pydict({"a": [1, 2]}).drop(["a"])):
        for stream in (False, True):
            al.write(table, tmp_path / "t.arrow", stream=stream)
            assert al.read(tmp_path / "t.arrow").num_rows == load(tmp_path / "t.arrow").num_rows == 2
    (tmp_path / "x.jsonl").write_text("{}\n{}\n")
    assert al.Table.from_jsonl(tmp_path / "x.jsonl").num_rows == 2


def test_arrowlite_anything_that_is_no_table_or_column_is_refused_in_words(tmp_path):
    table, path = al.Table.from_pydict({"a": [1]}), tmp_path / "t.arrow"
    assert al.Table.from_pylist({"a": i} for i in range(3)).num_rows == 3               # a generator is read, not lost
    assert al.concat(part for part in (table, table)).num_rows == 2
    al.write(pa.table({"a": [1]}), path)
    assert al.read(path).to_pylist() == [{"a": 1}]
    with al.Writer(path, {"a": "int8"}) as writer:
        writer.write({"a": i} for i in range(3))
        writer.write(pa.table({"a": [3]}))
    assert al.read(path)["a"].to_pylist() == [0, 1, 2, 3]
    strict = [al.Field("a", "int8", nullable=False)]
    assert not al.Table.from_pylist([{"a": 1}], strict).schema.field("a").nullable
    os.chmod(path, 0o600)
    al.write(table, path)
    assert os.stat(path).st_mode & 0o777 == 0o600                                       # not opened up by a rewrite
    for call, words in ((lambda: al.Table.from_pydict({1: [1]}), "name must be text"), (lambda: al.array(1), "a list"),
                        (lambda: al.write([1], path), "does not speak"), (lambda: al.concat(table), "a list of one"),
                        (lambda: al.array("text"), "a list of values"), (lambda: al.array([1], 5), "is no type"),
                        (lambda: al.Table.from_pydict([1]), "a dict"), (lambda: table.split(math.nan), "nan"),
                        (lambda: al.Table.from_pylist([1]), "must be dicts"),
                        (lambda: al.Table.from_pydict({"a": 1}), "column 'a'"),
                        (lambda: table.map(dict, batch_size=0), "batch_size"),
                        (lambda: table.map(dict, workers=-1), "workers"),
                        (lambda: al.Table.from_pylist([{"b": 1}], {"a": "int8"}), "column 'b' is not in"),
                        (lambda: al.Table.from_pylist([{"a": None}], strict), "nulls, which its schema forbids"),
                        (lambda: table.map(lambda b: {"a": 1}, batched=True), "a list of values"),
                        (lambda: al.array([1e300], "float32"), "is no float32"),
                        (lambda: al.array([2**63], "int64"), "is no int64"),
                        (lambda: al.array([np.int64(-1), np.uint64(2**64 - 1)]), "64 bits"),
                        (lambda: al.array([dt.datetime(2020, 1, 1, 5)], "date64"), "is no date64"),
                        (lambda: al.array(np.array([2**60], "M8[Y]")), "does not fit")):
        with pytest.raises(ValueError, match=words):
            call()
    assert al.array([np.uint64(2**64 - 1), np.int64(1)]).to_pylist() == [2**64 - 1, 1]
    assert al.array([np.datetime64("NaT"), np.datetime64("2020-01-01")]).to_pylist() == [None, dt.date(2020, 1, 1)]
    for index in (1.0, None, [0], ("a", "b")):
        with pytest.raises(TypeError):
            table[index]
    assert not hasattr(table, "iloc")


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_arrowlite_compressed_files_are_read_or_refused_with_the_fix(tmp_path, codec, monkeypatch):
    pytest.importorskip({"lz4": "lz4.frame", "zstd": "zstandard"}[codec])
    table = every_type(11)
    path = save(table, tmp_path / "c.arrow", max_chunksize=6, compression=codec)
    assert al.read(path).to_pylist() == sane(table.to_pylist())
    package = {"lz4": "lz4", "zstd": "zstandard"}[codec]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.frame", None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        al.read(path).to_pylist()


def test_arrowlite_reads_both_alignments_and_the_framing_before_2019(tmp_path):
    table = every_type()
    for alignment in (8, 64):
        sink = io.BytesIO()
        options = ipc.IpcWriteOptions(use_legacy_format=alignment == 8)
        with ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        (tmp_path / "t.arrows").write_bytes(sink.getvalue())
        assert al.read(tmp_path / "t.arrows").to_pylist() == sane(table.to_pylist())


def test_arrowlite_refuses_foreign_types_and_big_endian_by_name(tmp_path):
    cases = {"decimal": pa.array([Decimal("1.5")]), "time": pa.array([dt.time(1)]),
             "map": pa.array([[("a", 1)]], pa.map_(pa.utf8(), pa.int8())),
             "union": pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]),
             "run_end_encoded": pa.RunEndEncodedArray.from_arrays([1], ["a"]),
             "list_view": pa.array([[1]], pa.list_view(pa.int8())),
             "interval": pa.array([(1, 2, 3)], pa.month_day_nano_interval())}
    for name, values in cases.items():
        table = pa.table({"the column": values})
        with pytest.raises(ValueError, match=f"'the column'.*{name}"):
            al.read(save(table, tmp_path / "t.arrow"))
        with pytest.raises(ValueError, match=f"'the column'.*{name}"):
            al.Table.from_arrow(table)
    data = bytearray(save(pa.table({"x": [1]}), tmp_path / "t.arrows", stream=True).read_bytes())
    node = al._Flat(bytes(data[8:]))
    schema = node.table(2)
    if schema.place(0):                         # flip the endianness in place where it is stored
        struct.pack_into("<h", data, 8 + schema.place(0), 1)
        (tmp_path / "t.arrows").write_bytes(data)
        with pytest.raises(ValueError, match="big-endian"):
            al.read(tmp_path / "t.arrows")
    big = al._flat({0: ("h", 4), 1: ("B", 1), 2: {0: ("h", 1), 1: []}, 3: ("q", 0)})
    (tmp_path / "big.arrows").write_bytes(struct.pack("<ii", -1, len(big)) + big + struct.pack("<ii", -1, 0))
    with pytest.raises(ValueError, match="big-endian"):
        al.read(tmp_path / "big.arrows")
    for head in (b"PAR1" + bytes(20), b"", b"A", b"ARROW1\0\0", b'{"a": 1}\n{"a": 2}\n', b"FEA1" + bytes(40)):
        (tmp_path / "x").write_bytes(head)
        with pytest.raises(ValueError, match="is not an Arrow file"):
            al.read(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        al.read(tmp_path / "none.arrow")


def test_arrowlite_values_are_views_of_the_memory_map(tmp_path):
    path = tmp_path / "t.arrow"
    al.write(al.Table.from_pydict({
        "x": np.arange(1000), "tokens": [np.arange(i % 5, dtype=np.int32) for i in range(1000)],
        "when": np.arange(1000).astype("M8[us]"), "matrix": np.zeros((1000, 4), np.float32),
        "s": [{"y": float(i), "z": "text"} for i in range(1000)]}), path)
    table = al.read(path)
    for a in (table["x"].to_numpy(), table["x"][100:200].to_numpy(), table.slice(7, 50)["x"].to_numpy(),
              table["when"].to_numpy(), table["matrix"].to_numpy(), table["tokens"].values.to_numpy(),
              table["tokens"].offsets.to_numpy(), table["s"].field("y").to_numpy(), table["tokens"].to_numpy()[4],
              table["x"].to_torch().numpy(), table["matrix"].to_torch().numpy(), table["tokens"].to_torch()[4].numpy()):
        assert is_inside(path, a) and len(a)
    assert table["matrix"].to_numpy().shape == (1000, 4)
    for a in (table["x"].to_numpy(), al.array(np.arange(3)).to_numpy()):
        with pytest.raises(ValueError, match="read-only"):
            a[0] = 1
    before = path.read_bytes()
    table["x"].to_torch()[0] = 99               # a write to private pages: neither a crash nor a change of the file
    assert path.read_bytes() == before


def resident_growth(path, bytes_):
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    al.read(path)[:0].to_pylist()               # whatever the first call imports or allocates
    start = resident()
    began = time.perf_counter()
    table = al.read(path)
    part = table[len(table) // 2 : len(table) // 2 + 10]
    view = table["x"][5 : len(table) - 5].to_numpy()
    opened = time.perf_counter() - began
    assert part.to_pylist()[0]["x"] == len(table) // 2 and view[0] == 5 and view.nbytes > 0.9 * bytes_
    return resident() - start, opened


@pytest.mark.parametrize("megabytes", [64, pytest.param(1024, marks=pytest.mark.slow)])
def test_arrowlite_opening_and_slicing_adds_no_memory_and_does_not_depend_on_rows(tmp_path, megabytes):
    path, n = tmp_path / "big.arrow", megabytes << 17
    al.write(al.Table.from_pydict({"x": np.arange(n)}), path)
    growth, _ = in_child(resident_growth, path, 8 * n)
    assert growth < 10 << 20
    with al.Writer(path, {"x": "int64"}) as writer:
        for start in range(0, n, n // 16):
            writer.write({"x": np.arange(start, start + n // 16)})
    table = al.read(path)
    assert len(table.chunks) == 16
    assert in_child(lambda: al.read(path) and sum(b - a for a, b in addresses(path))) >= 8 * n


def test_arrowlite_opening_touches_no_page_of_the_data(tmp_path):
    al.write(al.Table.from_pydict({"x": np.arange(1 << 20), "t": ["text"] * (1 << 20)}), tmp_path / "t.arrow")
    table = al.read(tmp_path / "t.arrow")
    assert table.num_rows == 1 << 20 and len(table[10:]) == (1 << 20) - 10
    shares = [line for line in open("/proc/self/smaps").read().split("VmFlags") if str(tmp_path) in line]
    assert shares and all("Rss:                   0 kB" in share for share in shares)


def test_arrowlite_exchanges_tables_with_pyarrow_polars_and_duckdb_over_the_same_memory():
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    table = every_type()
    plain = without_views(table)
    there = pa.table(al.Table.from_arrow(table))
    there.validate(full=True)
    assert there.equals(plain)
    numbers = np.arange(1000)
    ours = al.Table.from_pydict({"x": numbers, "t": [[i, i] for i in range(1000)]})
    where = ours["x"].to_numpy().__array_interface__["data"][0]
    for other in (pa.table(ours), pa.table(al.Table.from_arrow(pa.table(ours)))):
        assert other["x"].chunk(0).buffers()[1].address == where
        assert al.Table.from_arrow(other)["x"].to_numpy().__array_interface__["data"][0] == where
    frame = polars.DataFrame(ours)
    assert frame["x"].to_numpy().__array_interface__["data"][0] == where
    assert al.Table.from_arrow(frame).to_pylist() == ours.to_pylist()
    relation = duckdb.sql("select x * 2 as y, t from ours where x < 3")         # it finds the variable by its name
    assert al.Table.from_arrow(relation).to_pylist() == [{"y": 2 * i, "t": [i, i]} for i in range(3)]
    assert pa.array(al.array([1, None, 3]).to_pylist()).equals(pa.chunked_array(al.array([1, None, 3])).chunk(0))
    assert al.array(pa.array(["a", None])).to_pylist() == ["a", None]
    assert al.array(polars.Series([1.5, None])).to_pylist() == [1.5, None]


def test_arrowlite_lends_until_released_exactly_once():
    gc.collect()
    assert not al._lent
    for _ in range(20):
        ours = al.Table.from_pydict({"x": np.arange(1000), "d": al.array(["a", "b"] * 500, "dictionary<int8, utf8>"),
                                     "l": [[{"a": [i]}] for i in range(1000)]})
        unread = ours.__arrow_c_stream__()              # a capsule that nobody reads
        there = pa.table(ours)
        del ours, unread                                # the exporter goes first
        assert there["x"].to_pylist() == list(range(1000)) and there["d"][1].as_py() == "b"
        assert al._lent
        back = al.Table.from_arrow(there)
        del there
        assert back[999] == {"x": 999, "d": "b", "l": [{"a": [999]}]}
        del back
    gc.collect()
    assert not al._lent

    with pytest.raises(KeyError):                       # a release while an exception is pending leaves it alone
        pa.table(al.Table.from_pydict({"x": np.arange(9)})).column("nope")
    gc.collect()
    assert not al._lent

    released = []                                       # and what we borrow, we release once

    def make(address):
        @al._OnPointer
        def release(at):
            released.append(at)
            al._CArray.from_address(at).release = 0
        al._CArray.from_address(address).release = ctypes.cast(release, ctypes.c_void_p).value
        return release

    c = al._CArray()
    keep = make(ctypes.addressof(c))
    owner = al._Borrowed(al._CArray, ctypes.addressof(c))
    assert c.release == 0 and not released and keep
    view = np.asarray(al._Memory(ctypes.addressof(c), 8, owner))
    part = view[2:4]
    del owner, view
    gc.collect()
    assert not released
    del part
    gc.collect()
    assert len(released) == 1


def test_arrowlite_lends_thousands_at_once_and_a_stream_only_once():
    kept = [pa.table(al.Table.from_pydict({"a": [i]})) for i in range(2000)]
    assert [t["a"][0].as_py() for t in kept] == list(range(2000))
    del kept
    gc.collect()
    assert not al._lent and len(al._capsules) == 1

    class Once:
        def __init__(self, capsule):
            self.capsule = capsule

        def __arrow_c_stream__(self, requested_schema=None):
            return self.capsule
    for source in (al.Table.from_pydict({"a": [1]}), pa.table({"a": [1]})):
        once = Once(source.__arrow_c_stream__())
        assert al.Table.from_arrow(once).to_pylist() == [{"a": 1}]
        with pytest.raises(ValueError, match="only once"):
            al.Table.from_arrow(once)
    for bad in (object(), [1], pa.chunked_array([[1]])):
        with pytest.raises(ValueError):
            al.Table.from_arrow(bad)
    capsule = al.Table.from_pydict({"a": [7]}).__arrow_c_stream__()     # held but not read yet: not swept away
    gc.collect()
    pa.table(al.Table.from_pydict({"a": [8]}))
    assert al._lent
    assert al.Table.from_arrow(Once(capsule)).to_pylist() == [{"a": 7}]


def test_arrowlite_lending_loses_no_interrupt_that_arrives_during_a_garbage_collection():
    there = pa.table(al.Table.from_pydict({"x": np.arange(9)}))
    # the signal comes from C, as those of a terminal do: no Python between it and our part of the collection
    kill = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, *[ctypes.py_object] * 2)(("raise", ctypes.CDLL(None)))
    interrupt = partial(kill, signal.SIGINT)
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            gc.callbacks.insert(0, interrupt)
            gc.collect()
    finally:
        gc.callbacks.remove(interrupt)
        gc.enable()
    del there
    gc.collect()
    assert not al._lent


def test_arrowlite_what_is_lent_may_outlive_the_interpreter():
    code = ("import arrowlite as al, pyarrow as pa, polars as pl, logging\n"
            "class H(logging.Handler): pass\n"
            "logging.getLogger().addHandler(H())\n"          # keeps this module's names until after all others are gone
            "q = pa.table(al.Table.from_pydict({'a': [1, 2, 3]}))\n"
            "f = pl.DataFrame(al.Table.from_arrow(q))\n"
            "b = al.Table.from_arrow(pa.table({'x': ['y']}))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert (done.returncode, done.stderr) == (0, "")


def test_arrowlite_errors_cross_the_c_interface_as_messages():
    ours = al.Table.from_pydict({"t": [[1], [2, 3]]})
    bad = al.Array(ours["t"].type, 2, np.array([0, 5, 1], np.int32), [al.array([1, 2, 3])])
    with pytest.raises(Exception, match="outside of its data"):
        pa.table(al.Table(ours.schema, [al.Array(ours.type, 2, None, [bad])]))


def hammer(path):
    """Read a perhaps damaged file in every way; a ValueError is fine, a crash or anything else is not."""
    try:
        table = al.read(path)
        table.to_pylist()
        table[:3].to_pydict()
        table.shuffle(0)[:5].to_pylist()
        for name in table.column_names:
            column = table[name]
            len(column) and column[len(column) - 1]
            column.to_numpy()
            _ = column.null_count, column.nbytes
        al.write(table, f"{path}.out")
        pa.table(table)
    except ValueError:
        return "ValueError"
    return "read"


def limited_hammer(path, blobs):
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    counts = {}
    for blob in blobs:
        signal.alarm(20)                # for each: all together may take long on a busy machine
        path.write_bytes(blob)
        result = hammer(path)
        counts[result] = counts.get(result, 0) + 1
    return counts


def metadata_spans(data):
    """The parts of a stream that are not bodies."""
    spans, at = [], 0
    while at < len(data):
        size = struct.unpack_from("<i", data, at + 4)[0]
        spans.append((at, at + 8 + size))
        at += 8 + size + (al._Flat(data[at + 8 : at + 8 + size]).number(3, "q") if size else 0)
    return spans


def hostile_examples(tmp_path):
    small = every_type(5).select(["null", "bool", "int32", "utf8", "list", "fixed_list", "struct", "dictionary",
                                  "string_view", "zoned_us", "fixed"])
    ours = al.Table.from_arrow(small)
    for stream in (False, True):
        al.write(ours, tmp_path / "seed.arrow", stream=stream)
        yield (tmp_path / "seed.arrow").read_bytes()
        yield save(small, tmp_path / "theirs.arrow", stream, max_chunksize=3).read_bytes()


def test_arrowlite_every_prefix_of_a_file_is_refused(tmp_path):
    for data in hostile_examples(tmp_path):
        counts = in_child(limited_hammer, tmp_path / "x.arrow", [data[:n] for n in range(0, len(data), 7)])
        assert set(counts) == {"ValueError"}, counts


def test_arrowlite_every_changed_byte_of_metadata_gives_an_error_or_data(tmp_path):
    data = list(hostile_examples(tmp_path))[2]                                          # our stream
    places = [i for a, b in metadata_spans(data) for i in range(a, b)]
    rng = random.Random(0)
    blobs = [data[:i] + bytes([rng.choice([0, 1, 127, 128, 255, data[i] ^ (1 << rng.randrange(8))])]) + data[i + 1 :]
             for i in places]
    counts = in_child(limited_hammer, tmp_path / "x.arrow", blobs, timeout=120)
    assert isinstance(counts, dict) and set(counts) <= {"ValueError", "read"} and counts["ValueError"] > 100, counts


def test_arrowlite_forged_lengths_of_rows_without_bytes_are_refused(tmp_path):
    honest = struct.pack("<q", 12345)
    listed = pa.array([[None] * 12345], pa.large_list(pa.null()))
    for table in (pa.table({"n": pa.nulls(12345)}), pa.table({"l": listed})):
        data = save(table, tmp_path / "t.arrows", stream=True).read_bytes()
        assert honest in data and al.read(tmp_path / "t.arrows").to_pylist() == table.to_pylist()
        for forged in (2**40, 2**62, -1, -(2**63)):
            (tmp_path / "t.arrows").write_bytes(data.replace(honest, struct.pack("<q", forged)))
            with pytest.raises(ValueError, match="t.arrows"):
                al.read(tmp_path / "t.arrows").to_pylist()


@pytest.mark.parametrize("rounds", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_arrowlite_survives_mutations(tmp_path, rounds):
    examples, rng = list(hostile_examples(tmp_path)), random.Random(1)
    numbers = [b"\xff" * 8, bytes(7) + b"\x40", b"\xff\xff\xff\x7f", bytes(4), b"\1\0\0\0\0\0\0\x80", b"\0\0\0\x80"]

    def mutate(data):
        data = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[at] = rng.randrange(256)
            else:
                at, number = at & ~3, rng.choice(numbers)
                data[at : at + len(number)] = number
        return bytes(data)

    for data in examples:
        counts = in_child(limited_hammer, tmp_path / "x.arrow", [mutate(data) for _ in range(rounds)], timeout=550)
        assert isinstance(counts, dict) and set(counts) <= {"ValueError", "read"}, counts
        assert counts["ValueError"] > rounds // 20 and counts["read"] > rounds // 20


def sample(n=50, seed=0):
    rng = random.Random(seed)
    return [{"i": rng.choice([None, i]), "t": rng.choice([None, "é" * (i % 5)]),
             "l": rng.choice([None, list(range(i % 4))]),
             "s": rng.choice([None, {"a": i, "b": [str(i)] * (i % 2)}]), "b": rng.choice([None, True, False])}
            for i in range(n)]


def many_batches(rows, tmp_path, size=7):
    with al.Writer(tmp_path / "batches.arrow", al.Table.from_pylist(rows).schema) as writer:
        for start in range(0, len(rows), size):
            piece = al.Table.from_pylist(rows[start : start + size], writer.schema)
            writer._message(al._BATCH, *writer._record_batch(piece.combine()))      # write() would join small ones
    table = al.read(tmp_path / "batches.arrow")
    assert len(table.chunks) == -(-len(rows) // size)
    return table


def test_arrowlite_views_of_views_read_like_lists(tmp_path):
    rows = sample()
    for table in (al.Table.from_pylist(rows), many_batches(rows, tmp_path)):
        rng = random.Random(1)
        for _ in range(30):
            expected, view = rows, table
            for _ in range(4):
                kind = rng.randrange(6)
                if kind == 0:
                    n = len(expected)
                    picks = [rng.randrange(-n, n) for _ in range(rng.randrange(40))] if n else []
                    expected, view = [expected[i] for i in picks], view.select(picks)
                elif kind == 1:
                    start, n = rng.randrange(10), rng.randrange(40)
                    expected, view = expected[start : start + n], view.slice(start, n)
                elif kind == 2:
                    expected, view = [r for r in expected if r["i"]], view.filter(lambda row: row["i"])
                elif kind == 3:
                    mask = [rng.random() < 0.8 for _ in expected]
                    expected, view = [r for r, ok in zip(expected, mask) if ok], view.filter(np.array(mask, bool))
                elif kind == 4:
                    start, stop, step = rng.randrange(5), rng.randrange(60), rng.choice([1, 2, 3])
                    expected, view = expected[start:stop:step], view[start:stop:step]
                else:
                    order = view["i"].to_pylist()
                    view = view.shuffle(3)
                    positions = np.random.default_rng(3).permutation(len(order)).tolist()
                    expected = [expected[p] for p in positions]
            assert view.to_pylist() == expected == list(view)
            assert [view[i] for i in range(len(view))] == expected
            assert view.to_pydict() == {name: [r[name] for r in expected] for name in table.column_names}
            for name in table.column_names:
                assert view[name].null_count == sum(r[name] is None for r in expected)
                assert [view[name][i] for i in range(-len(expected), 0)] == [r[name] for r in expected]
            assert pa.table(view).to_pylist() == expected


def test_arrowlite_row_numbers_and_names_are_checked():
    table = al.Table.from_pylist(sample())
    for call in (lambda: table[50], lambda: table[-51], lambda: table["i"][50], lambda: table.select([50]),
                 lambda: table.select([-51]), lambda: al.array([1])[1],
                 lambda: table.select(np.array([2**64 - 1], "u8"))):
        with pytest.raises(IndexError, match="row -?5?1?0?.* of"):
            call()
    assert table.select(np.array([49, 0], "u1"))["i"].to_pylist() == table["i"].to_pylist()[::-49]
    for call in (lambda: table["nope"], lambda: table.drop(["nope"]), lambda: table.rename({"nope": "x"}),
                 lambda: table.select_columns(["nope"]), lambda: table["s"].field("nope")):
        with pytest.raises(KeyError, match="no column 'nope'; there are: "):
            call()
    for call in (lambda: table.slice(-1, 2), lambda: table.slice(0, -1), lambda: table.select([0.5]),
                 lambda: table.select([True] * 50), lambda: table.filter([True]), lambda: table.filter([1] * 50),
                 lambda: table.split(2.0), lambda: table.split(51), lambda: table.with_column("x", [1]),
                 lambda: table.rename({"i": "t"}), lambda: table["i"].offsets, lambda: table["t"].to_torch(),
                 lambda: al.concat([]), lambda: al.Table.from_pydict({"a": [1], "b": [1, 2]})):
        with pytest.raises(ValueError):
            call()


def test_arrowlite_columns_can_be_added_renamed_dropped_and_chosen(tmp_path):
    rows = sample()
    for table in (al.Table.from_pylist(rows), many_batches(rows, tmp_path), many_batches(rows, tmp_path).shuffle(5)):
        rows = table.to_pylist()
        wider = table.with_column("n", range(50)).with_column("i", ["new"] * 50)
        assert wider.to_pylist() == [{**r, "i": "new", "n": k} for k, r in enumerate(rows)]
        assert wider["n"].type == "int64" and table.column_names == ["i", "t", "l", "s", "b"]
        fewer = [{"I": r["i"], "s": r["s"], "b": r["b"]} for r in rows]
        assert table.rename({"i": "I"}).drop(["t", "l"]).to_pylist() == fewer
        assert table.select_columns(["b", "i"]).column_names == ["b", "i"]
        assert wider.num_columns == 6 and wider.num_rows == len(wider) == 50 and wider.nbytes > 0
    assert table.drop("t", "l").column_names == ["i", "s", "b"] == table.select_columns("i", ["s", "b"]).column_names
    assert table["s"]["a"].to_pylist()[:3] == [r["s"] and r["s"]["a"] for r in rows[:3]]
    one = al.Table.from_pydict({}).with_column("x", [1, 2])
    assert one.to_pylist() == [{"x": 1}, {"x": 2}]


def test_arrowlite_shuffle_and_split_follow_the_seed(tmp_path):
    table = many_batches(sample(500), tmp_path)
    assert table.shuffle(1).to_pylist() == table.shuffle(1).to_pylist() != table.shuffle(2).to_pylist()
    key = lambda row: json.dumps(row)                                                                  # noqa: E731
    assert sorted(table.shuffle(1).to_pylist(), key=key) == sorted(table.to_pylist(), key=key)
    train, test = table.split(0.1, seed=7)
    again, _ = table.split(50, seed=7)
    assert (len(train), len(test)) == (450, 50) and train.to_pylist() == again.to_pylist()
    assert sorted(train.to_pylist() + test.to_pylist(), key=key) == sorted(table.to_pylist(), key=key)


def test_arrowlite_a_saved_shuffle_is_dense_and_no_larger(tmp_path):
    table = al.Table.from_pydict({"x": np.arange(100_000), "t": ["text %d" % i for i in range(100_000)]})
    al.write(table, tmp_path / "a.arrow")
    mapped = al.read(tmp_path / "a.arrow")
    shuffled = mapped.shuffle(0)
    al.write(shuffled, tmp_path / "b.arrow")
    again = al.read(tmp_path / "b.arrow")
    assert len(again.chunks) <= 2
    assert os.path.getsize(tmp_path / "b.arrow") < 1.01 * os.path.getsize(tmp_path / "a.arrow")
    assert again["x"].to_numpy().tolist() == shuffled["x"].to_numpy().tolist()
    al.write(mapped.select(np.arange(0, 100_000, 10)), tmp_path / "c.arrow")
    assert os.path.getsize(tmp_path / "c.arrow") < 0.12 * os.path.getsize(tmp_path / "a.arrow")
    al.write(mapped[5:15], tmp_path / "d.arrow")
    assert os.path.getsize(tmp_path / "d.arrow") < 2000
    with al.Writer(tmp_path / "e.arrow", {"x": "int64"}) as writer:
        for _ in range(100):
            writer.write(al.concat([al.Table.from_pydict({"x": [i]}) for i in range(50)]))
    assert len(al.read(tmp_path / "e.arrow").chunks) == 100       # pieces of one write are joined


def test_arrowlite_saving_a_shuffle_needs_the_memory_of_a_batch(tmp_path):
    n = 32 << 20
    al.write(al.Table.from_pydict({"x": np.arange(n)}), tmp_path / "a.arrow")           # 256 MB
    shuffled = al.read(tmp_path / "a.arrow").shuffle(0)
    tracemalloc.start()
    al.write(shuffled, tmp_path / "b.arrow")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 180 << 20
    again = al.read(tmp_path / "b.arrow")
    assert len(again.chunks) < 20 and again[n - 1] == shuffled[n - 1]


def test_arrowlite_concat_unifies_what_the_parts_call_by_one_name(tmp_path):
    parts = [al.Table.from_pydict(c) for c in (
        {"x": [None], "l": [[]]}, {"x": [1], "only": ["here"]}, {"x": [1.5], "l": [[1]], "s": [{"a": 1}]},
        {"x": np.array([2], np.int8), "l": [None], "s": [{"b": "t"}]}, {"x": al.array([None, 3])})]
    whole = al.concat(parts)
    names = whole.column_names
    assert names == ["x", "l", "only", "s"]
    assert {n: str(whole[n].type) for n in names} == {"x": "float64", "l": "list<int64>", "only": "utf8",
                                                      "s": "struct<a: int64, b: utf8>"}
    assert [r["x"] for r in whole] == [None, 1.0, 1.5, 2.0, None, 3.0]
    assert [r["s"] for r in whole] == [None, None, {"a": 1, "b": None}, {"a": None, "b": "t"}, None, None]
    al.write(whole.shuffle(0), tmp_path / "t.arrow")
    assert load(tmp_path / "t.arrow").to_pylist() == whole.shuffle(0).to_pylist()
    pairs = {("int8", "int32"): "int32", ("uint8", "int8"): "int16", ("int64", "float32"): "float64",
             ("uint64", "int8"): "uint64",
             ("utf8", "large_utf8"): "large_utf8", ("timestamp[s]", "timestamp[ns]"): "timestamp[ns]",
             ("dictionary<int8, utf8>", "utf8"): "utf8", ("list<int8>", "large_list<null>"): "large_list<int8>",
             ("fixed_size_list<int8>[2]", "list<int16>"): "list<int16>"}
    for (a, b), wanted in pairs.items():
        assert al.unify(al.as_type(a), al.as_type(b)) == al.unify(al.as_type(b), al.as_type(a)) == wanted
    for a, b in (("int64", "utf8"), ("bool", "int8"), ("timestamp[s]", "date32"),
                 ("utf8", "binary"), ("date32", "int32"), ("timestamp[s]", "timestamp[s, UTC]"),
                 ("struct<a: int8>", "struct<a: utf8>")):
        with pytest.raises(ValueError, match="no common type"):
            al.concat([al.Table.from_pylist([], {"c": a}), al.Table.from_pylist([], {"c": b})])
    strict, loose = ([al.Field("x", "int8", nullable=nullable)] for nullable in (False, True))
    one, two = al.Table.from_pylist([{"x": 1}], strict), al.Table.from_pylist([{"x": None}], loose)
    for parts, nullable in (([one, one], False), ([one, two], True), ([one, al.Table.from_pydict({"y": [1]})], True)):
        assert al.concat(parts).schema.field("x").nullable == nullable
        assert pa.table(al.concat(parts[::-1])).schema.field("x").nullable == nullable
    with pytest.raises(ValueError, match="column 'x': .*9007199254740993"):
        al.concat([al.Table.from_pydict({"x": [2**53 + 1]}), al.Table.from_pydict({"x": [0.5]})]).to_pylist()


def test_arrowlite_arrays_take_the_natural_type_or_the_one_that_is_asked_for():
    pytest.importorskip("pandas")
    natural = {"null": [None], "bool": [True, None], "int64": [1, -(2**63)], "uint64": [2**64 - 1, 0],
               "float64": [1, 0.5], "utf8": ["a"], "binary": [b"a", None], "date32": [dt.date(2020, 1, 1)],
               "duration[us]": [dt.timedelta(1)],
               "timestamp[us]": [dt.datetime(2020, 1, 1)], "timestamp[us, UTC]": [dt.datetime(2020, 1, 1, tzinfo=UTC)],
               "timestamp[us, +05:30]": [dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(minutes=330)))],
               "list<list<int64>>": [[[1], None], []], "struct<a: int64, b: utf8>": [{"a": 1}, {"b": "x"}, None],
               "list<int16>": [np.array([1], np.int16), None]}
    for kind, values in natural.items():
        a = al.array(values)
        assert a.type == kind and str(a.type) == kind
        assert a.to_pylist() == [v.tolist() if isinstance(v, np.ndarray) else
                                 {"a": None, "b": None} | v if isinstance(v, dict) else v for v in values]
    asked = {"int8": [1, None], "float32": [0.5, None, 1], "large_utf8": ["a", None],
             "fixed_size_binary[2]": [b"ab", None],
             "fixed_size_list<int16>[2]": [[1, 2], None, [3, None]], "large_list<utf8>": [["a", None], None, []],
             "dictionary<int8, utf8>": ["a", "b", None, "a"], "date64": [dt.date(2020, 1, 1), None],
             "timestamp[s, Europe/Paris]": [dt.datetime(2020, 1, 1, tzinfo=UTC), None], "duration[ns]": [None],
             "struct<a: int8, b: float32>": [{"a": 1}, None], "list<fixed_size_binary[1]>": [[b"a"], [None]],
             "timestamp[ns]": [np.datetime64("2020-01-01T00:00:00.123456789"), None], "null": [None, None]}
    for kind, values in asked.items():
        a = al.array(values, kind)
        expected = [{"a": None, "b": None} | v if isinstance(v, dict) else v for v in values]
        assert a.type == kind and a.to_pylist() == expected and al.array([], kind).to_pylist() == []
        assert a.null_count == values.count(None) and pa.chunked_array(a).to_pylist() == sane(expected) or "ns" in kind
        assert al.array(a, kind).type == kind and al.array(a[1:], kind).to_pylist() == expected[1:]
    day = dt.datetime(2020, 1, 1)
    assert al.array([{"a": 1}, {}, None]).to_pylist() == [{"a": 1}, {"a": None}, None]
    for values, kind in (([2**64], None), ([-1, 2**63], None), ([1, "a"], None), ([True, 1], None), ([object()], None),
                         ([{1: 2}], None), ([300], "int8"), ([-1], "uint8"), ([1.5], "int64"), (["a"], "int64"),
                         ([2**53 + 1], "float64"), ([b"abc"], "fixed_size_binary[2]"),
                         ([[1]], "fixed_size_list<int8>[2]"), ([day.replace(hour=1)], "date32"),
                         ([day.replace(microsecond=1)], "timestamp[s]"), (["a"] * 2, "list<utf8>"),
                         ([{"b": 1}], "struct<a: int64>"), (["\ud800"], None), ([1 + 2j], None),
                         (list(range(300)), "dictionary<int8, int64>"), ([day, day.date()], None),
                         ([day, day.replace(tzinfo=UTC)], None), ([1], "no_such_type"), ([1], "list"),
                         ([1], "timestamp[h]"), ([1], "fixed_size_binary[0]"), ([1], "dictionary<utf8, utf8>")):
        with pytest.raises(ValueError):
            al.array(values, kind)
    for spelling in ("list<item: int32>", "struct<a: list<item: string>, b: double>", "fixed_size_list<item: float>[4]",
                     "timestamp[us, tz=UTC]", "large_list<item: halffloat>"):
        assert str(al.as_type(spelling)) == str(al.as_type(str(al.as_type(spelling))))
    for theirs in (pa.int32(), pa.list_(pa.utf8()), pa.dictionary(pa.int8(), pa.utf8()), pa.timestamp("ns", "UTC"),
                   pa.binary(3)):
        assert pa.array([], pa.chunked_array(al.array([], theirs)).type).type == theirs
    for spec, name in ((np.float32, "float32"), ("float", "float32"), (int, "int64"), (str, "utf8"), (bool, "bool")):
        assert al.as_type(spec) == name
    assert al.as_type("int32") != "utf8" and al.as_type("int32") != "banana"
    assert len({al.as_type("list<int8>"), al.as_type("list<item: int8>")}) == 1


def test_arrowlite_numpy_and_torch_go_in_and_out_with_their_dtypes():
    torch = pytest.importorskip("torch")
    for code in "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 M8[s] M8[us] M8[ns] m8[ms]".split():
        a = np.arange(4).astype("i8").astype(code)
        again = al.array(a).to_numpy()
        assert again.dtype == a.dtype and (again == a).all()
        assert (al.array(np.arange(12).astype("i8").astype(code).reshape(2, 3, 2)).to_numpy().ravel()
                == np.arange(12).astype("i8").astype(code)).all()
    a = np.arange(5)
    assert np.shares_memory(al.array(a).to_numpy(), a) and a.flags.writeable
    assert al.array(a[::2]).to_pylist() == [0, 2, 4] and al.array(a.astype(">i4")).to_pylist() == [0, 1, 2, 3, 4]
    assert al.array(np.array(["NaT", "2020-01-01"], "M8[D]")).to_pylist() == [None, dt.date(2020, 1, 1)]
    assert al.array(np.array(["x", None], object)).to_pylist() == ["x", None]
    assert al.array(np.array(["x"])).type == "utf8"
    assert al.array(np.ma.array([1, 2], mask=[0, 1])).to_pylist() == [1, None]
    assert math.isnan(al.array([1, None]).to_numpy()[1])
    assert np.isnat(al.array([dt.datetime(2020, 1, 1), None]).to_numpy()[1])
    assert al.array(torch.arange(3)).type == "int64"
    assert al.array(torch.ones(2, 3)).type == "fixed_size_list<float32>[3]"
    assert al.array([torch.ones(2), None, torch.ones(1)]).type == "list<float32>"
    assert al.array([torch.tensor(1), torch.tensor(2)]).to_pylist() == [1, 2]
    assert al.array([{"z": [torch.zeros(2, 1)]}]).to_pylist() == [{"z": [[[0.0], [0.0]]]}]
    with pytest.raises(ValueError, match="BFloat16; convert"):
        al.array([torch.ones(1, dtype=torch.bfloat16)])
    assert al.array([True, False]).to_torch().tolist() == [True, False]
    ragged = al.array([[1, 2], [], [3]]).to_torch()
    assert [t.tolist() for t in ragged] == [[1, 2], [], [3]]
    assert al.array([[1, 2], None]).to_numpy()[1] is None and al.array(["a", None]).to_numpy().tolist() == ["a", None]
    assert al.array(["a", "b", "a"], "dictionary<int8, utf8>").to_numpy().tolist() == ["a", "b", "a"]
    assert np.asarray(al.array([1, 2])).tolist() == [1, 2]
    assert al.array(list(range(10_000))).to_pylist() == list(range(10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert al.array(np.arange(3)).to_torch().tolist() == [0, 1, 2]
    for bad in (np.float64(1), np.array([1j]), np.zeros(1, np.longdouble)):
        with pytest.raises(ValueError):
            al.array(bad)


def test_arrowlite_times_come_back_without_loss():
    far = np.array([-(2**62), 2**62], "i8")
    for unit in ("s", "ms", "us", "ns"):
        values = al.array(far, f"timestamp[{unit}]").to_pylist()
        assert [np.datetime64(v, unit).astype("i8") for v in values] == far.tolist()
    paris = al.array([dt.datetime(2020, 7, 1, 12, tzinfo=UTC)], "timestamp[us, Europe/Paris]")[0]
    assert paris == dt.datetime(2020, 7, 1, 12, tzinfo=UTC) and paris.utcoffset() == dt.timedelta(hours=2)
    edge = [dt.datetime.min.replace(tzinfo=UTC), dt.datetime.max.replace(tzinfo=UTC)]
    assert al.array(edge, "timestamp[us, Asia/Tokyo]").to_pylist() == edge
    assert al.array(edge, "timestamp[us, No/Where]").to_pylist() == edge


def test_arrowlite_durations_of_numpy_are_durations():
    for unit in ("s", "ms", "us", "ns"):
        for values in ([np.timedelta64(5, unit)], [np.timedelta64(5, unit), np.timedelta64("NaT", unit), None]):
            a = al.array(values)
            assert a.type == f"duration[{unit}]" and a.null_count == len(values) - 1
            assert a.to_pylist()[0] == values[0] and pa.chunked_array(a)[0].value == 5
    assert al.array([np.timedelta64(1, "D")]).to_pylist() == [dt.timedelta(1)]
    assert al.array([np.timedelta64(5, "ns"), dt.timedelta(1)]).to_numpy().astype(int).tolist() == [5, 86_400 * 10**9]
    assert al.array([[np.timedelta64(5, "us")], []]).type == "list<duration[us]>"
    for other in (5, 0.5, np.int64(5), "5"):
        with pytest.raises(ValueError, match="cannot hold duration and|and duration values"):
            al.array([np.timedelta64(5, "ns"), other])


def test_arrowlite_times_beyond_64_bits_are_refused():
    nano, year = np.datetime64(1, "ns"), np.datetime64("9000-01-01", "s")
    for values in ([dt.timedelta.max], [dt.timedelta.min, None], [dt.timedelta(days=200_000_000)], [year, nano],
                   [nano, year], [dt.datetime.max, nano], [nano, None, dt.datetime.max],
                   [dt.timedelta(106_752), np.timedelta64(1, "ns")], [np.timedelta64(2**62, "s"), dt.timedelta(1)]):
        with pytest.raises(ValueError, match="does not fit in 64 bits"):
            al.array(values)
    for values in ([np.timedelta64(1, "M"), np.timedelta64(1, "D")], [np.datetime64(1, "Y"), np.datetime64(1, "as")]):
        with pytest.raises(ValueError, match="no common unit"):
            al.array(values)
    longest = dt.timedelta(microseconds=2**63 - 1)
    for values in ([longest, -longest], [dt.datetime.min, dt.datetime.max], [dt.date.min, dt.date.max],
                   [dt.datetime(2020, 1, 1, tzinfo=UTC)], [np.datetime64("2020", "ns"), np.datetime64("2021", "ns")]):
        assert al.array(values).to_pylist() == values


def test_arrowlite_map_merges_keeps_types_and_is_the_same_over_processes(tmp_path, capfd):
    rows = sample(1200)
    table = many_batches(rows, tmp_path, 100).with_column("x", np.arange(1200, dtype=np.int32))
    rows = table.to_pylist()
    offset = 10

    def add(row):                               # a closure, a changed column, a new one, nothing for some rows
        return None if row["x"] % 3 == 0 else {"x": row["x"] + offset, "double": row["x"] * 2}

    expected = [r | ({"double": None} if r["x"] % 3 == 0 else {"x": r["x"] + 10, "double": r["x"] * 2}) for r in rows]
    for source, wanted in ((table, expected), (table.shuffle(1), [expected[i["x"]] for i in table.shuffle(1)])):
        for workers in (0, 2):
            mapped = source.map(add, batch_size=77, workers=workers)
            assert mapped.to_pylist() == wanted and mapped["x"].type == "int32" and mapped["i"].type == table["i"].type
    batched = table.map(lambda b: {"n": np.array([len(t or "") for t in b["t"]], "i2")}, batched=True, batch_size=100)
    assert batched["n"].to_pylist() == [len(r["t"] or "") for r in rows] and batched["n"].type == "int16"
    flat = table.map(lambda b: {"item": [x for row in b["l"] for x in row or []]}, batched=True, batch_size=64,
                     remove_columns=table.column_names, workers=2)
    assert flat.to_pylist() == [{"item": x} for r in rows for x in r["l"] or []]
    assert table.map(lambda row: {"y": 1 if row["x"] < 600 else 0.5})["y"].type == "float64"     # an int in one batch
    assert table.map(lambda row: {"x": row["x"] / 2})["x"].type == "float64"
    assert al.Table.from_pylist([], table.schema).map(add).schema.names == table.column_names
    with pytest.raises(ValueError, match="remove_columns"):
        table.map(lambda b: {"y": [1]}, batched=True)
    with pytest.raises(ValueError, match="row 5: .* returned int"):
        table.map(lambda row: 7 if row["x"] == 5 else None)
    for workers in (0, 2):
        with pytest.raises(ZeroDivisionError) as caught:
            table.map(lambda row: {"y": 1 // (row["x"] - 700)}, workers=workers)
        assert getattr(caught.value, "__notes__", ["map: row 700"])[-1] == "map: row 700"
    with pytest.raises(ValueError, match="map: column 'z': .* int and utf8"):
        table.map(lambda row: {"z": row["x"] or "none"})
    assert table.map(lambda b: {"n": [len(b["x"])] * 1200}, batched=True, batch_size=None)["n"][0] == 1200
    assert len(table[:0].map(add, batch_size=None)) == 0

    class Odd(Exception):                                   # its pickle cannot be read
        def __init__(self, a, b):
            super().__init__("odd", a)

    def odd(row):
        raise Odd(1, 2)
    with pytest.raises(RuntimeError, match="Odd: .*odd"):
        table.map(odd, workers=2)
    strict = al.Table.from_pylist([{"a": 1}], [al.Field("a", "int8", False, {"k": "v"})])
    assert strict.map(lambda row: row | {"b": 2}).schema.field("a") == strict.schema.field("a")
    with pytest.raises(KeyError):
        table.map(add, remove_columns=["nope"])
    letters = al.Table.from_pydict({"a": [1], "b": [2], "ab": [3]})
    assert letters.map(lambda row: None, remove_columns="ab").column_names == ["a", "b"]    # one name, not two letters
    assert letters.map(lambda row: {"c": 4}, remove_columns=("a", "b")).column_names == ["ab", "c"]
    with pytest.raises(Exception, match="terminated abruptly"):
        table.map(lambda row: os._exit(1) if row["x"] == 700 else {}, workers=2)


def test_arrowlite_what_outgrows_memory_is_spooled_to_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(al, "_SPOOL_BYTES", 1000)
    rows = sample(1000)
    assert al.Table.from_pylist(rows).map(lambda row: {"j": row["i"]}, batch_size=50).to_pylist() == [
        {**r, "j": r["i"]} for r in rows]
    lines = [{"a": 1}, {"a": 2.5, "b": [1]}, {"b": ["x"][:0], "c": {"d": None}}, {"c": {"d": "late"}}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + " " * 9_000_000 + "\n" for row in lines))
    table = al.Table.from_jsonl(tmp_path / "x.jsonl")
    assert table.to_pylist() == [{k: row.get(k) for k in "abc"} for row in lines] and table["a"].type == "float64"


def test_arrowlite_jsonl_goes_in_and_out_unchanged(tmp_path):
    rows = [{"t": 'é😀"\n\u2028', "i": 2**63 - 1, "f": 1.5, "l": [None, [1]], "o": {"k": True}, "n": None},
            {"t": "", "i": -(2**63), "f": float("nan"), "l": [], "o": {"k": None}, "n": None},
            {"t": None, "i": None, "f": float("-inf"), "l": None, "o": None, "n": None}]
    path, out = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    lines = [json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\n" + lines[1] + b"\r\n\n" + lines[2])
    table = al.Table.from_jsonl(path)
    assert repr(table.to_pylist()) == repr(rows)
    table.to_jsonl(out)
    assert repr([json.loads(line) for line in open(out)]) == repr(rows) and "é😀" in out.read_text()
    assert repr(al.Table.from_jsonl(out).to_pylist()) == repr(rows)
    (tmp_path / "big.jsonl").write_text('{"u": 18446744073709551615}\n{"u": 0}')
    assert al.Table.from_jsonl(tmp_path / "big.jsonl").to_pylist() == [{"u": 2**64 - 1}, {"u": 0}]
    with pytest.raises(ValueError, match="line 1: .*18446744073709551615"):
        al.Table.from_jsonl(tmp_path / "big.jsonl", {"u": "int64"})
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert al.Table.from_jsonl(empty).to_pylist() == []
    assert al.Table.from_jsonl(empty, {"a": "int8"}).column_names == ["a"]
    bad = {b'{"a": 1}\n{"a": oops}\n': "line 2: not JSON", b'{"a": 1}\n\n[1]\n': "line 3: .* must be an object",
           b'{"a": 1}\n{"a": "x"}\n': "line 2: .*column 'a'",
           b'{"a": 1}\n{"a": 18446744073709551616}\n': "line 2: .*64 bits",
           b'{"a": {"b": [1]}}\n{"a": {"b": [{}]}}\n': "line 2: ",
           b'{"a": "\\ud800"}\n': "line 1: ", b'{"a": "\xff"}\n': "line 1: ",
           b"[" * 100_000: "line 1: not JSON"}
    for data, message in bad.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            al.Table.from_jsonl(path)
    with pytest.raises(ValueError, match="bytes"):
        al.Table.from_pydict({"a": [b"x"]}).to_jsonl(out)
    assert repr(al.Table.from_jsonl(out).to_pylist()) == repr(rows)         # the failed write left the old file
    al.Table.from_pydict({"a": [dt.datetime(2020, 1, 1)], "b": [np.datetime64(1, "ns")]}).to_jsonl(out)
    assert json.loads(out.read_text()) == {"a": "2020-01-01T00:00:00", "b": "1970-01-01T00:00:00.000000001"}


@pytest.mark.parametrize("megabytes", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_arrowlite_jsonl_streams(tmp_path, megabytes):
    path = tmp_path / "big.jsonl"
    line = json.dumps({"text": "word " * 2000, "n": 1}) + "\n"
    with open(path, "w") as file:
        for _ in range(megabytes * 100):
            file.write(line)

    def peak():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        table = al.Table.from_jsonl(path)
        assert len(table) == megabytes * 100 and table[-1]["n"] == 1
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert in_child(peak, timeout=500) < 0.3 * megabytes + 250


def test_arrowlite_a_crash_while_writing_leaves_the_old_file_or_none(tmp_path):
    path = tmp_path / "t.arrow"
    old = al.Table.from_pydict({"x": [1, 2, 3]})

    def crash(how):
        with al.Writer(path, old.schema) as writer:
            writer.write(al.Table.from_pydict({"x": np.arange(1_000_000)}))
            how()

    def interrupted():
        raise KeyboardInterrupt
    for exists in (False, True):
        if exists:
            al.write(old, path)
        with pytest.raises(KeyboardInterrupt):
            crash(interrupted)
        assert os.listdir(tmp_path) == ["t.arrow"] * exists
        assert "signal 9" in in_child(crash, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert path.exists() == exists and (not exists or al.read(path).to_pylist() == old.to_pylist())
        for leftover in tmp_path.glob("*.tmp"):
            leftover.unlink()
    mapped = al.read(path)
    al.write(mapped.map(lambda row: {"x": row["x"] * 2}), path)             # over the very file that is mapped
    assert mapped.to_pylist() == old.to_pylist() and al.read(path)["x"].to_pylist() == [2, 4, 6]
    link = tmp_path / "link.arrow"
    link.symlink_to(path)
    al.write(old, link)
    assert link.is_symlink() and al.read(path).to_pylist() == old.to_pylist()
    for bad in (tmp_path / "no" / "where.arrow", tmp_path):
        with pytest.raises(FileNotFoundError):
            al.write(old, bad)


def test_arrowlite_a_full_disk_raises_and_leaves_nothing(tmp_path):
    path = tmp_path / "t.arrow"
    al.write(al.Table.from_pydict({"x": [1]}), path)

    def fill(rows):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for write in (lambda t: al.write(t, path), lambda t: t.to_jsonl(path)):
            try:
                write(al.Table.from_pydict({"x": np.arange(rows)}))
                return "no error"
            except OSError:
                pass
        return sorted(os.listdir(tmp_path))
    for rows in (200_000, 140_000, 1_000_000):      # over the limit in the middle, in the last flush, by far
        assert in_child(fill, rows) == ["t.arrow"]
        assert al.read(path).to_pylist() == [{"x": 1}]


def test_arrowlite_devices_and_pipes_are_written_not_replaced(tmp_path):
    table = al.Table.from_pydict({"x": np.arange(1000)})
    al.write(table, "/dev/null")
    with pytest.raises(OSError, match="No space left"):
        al.write(table, "/dev/full")
    assert os.path.exists("/dev/full") and not os.path.isfile("/dev/full") and not os.path.isfile("/dev/null")


def test_arrowlite_writer_takes_the_columns_and_types_of_its_schema(tmp_path):
    path = tmp_path / "t.arrow"
    for stream in (False, True):
        with al.Writer(path, {"x": "float64", "t": "utf8", "l": "list<int32>"}, stream=stream) as writer:
            writer.write([{"x": 1, "l": [1]}])
            writer.write({"t": ["a", None]})
            writer.write(al.Table.from_pydict({"l": [[2**31 - 1]], "x": [None]}))
            for bad, message in (([{"y": 1}], "y"), ([{"x": "text"}], "column 'x'"), ([{"l": [2**31]}], "2147483648")):
                with pytest.raises(ValueError, match=message):
                    writer.write(bad)
        assert load(path).to_pylist() == al.read(path).to_pylist() == [
            {"x": 1.0, "t": None, "l": [1]}, {"x": None, "t": "a", "l": None}, {"x": None, "t": None, "l": None},
            {"x": None, "t": None, "l": [2**31 - 1]}]
    with al.Writer(path, pa.schema([("a", pa.int8())])) as writer:
        pass
    assert al.read(path).to_pylist() == [] and al.read(path)["a"].type == "int8"


def test_arrowlite_nulls_never_reach_a_column_that_may_have_none(tmp_path):
    path, strict = tmp_path / "t.arrow", al.Schema([al.Field("a", "int64", nullable=False), ("b", "int8")])
    table = al.concat([al.Table.from_pydict({"a": [0, 1]}), al.Table.from_pydict({"a": [2, None]})])
    with al.Writer(path, strict) as writer:
        for rows in ({"a": [1, None]}, [{"b": 1}], table, table.shuffle(0), pa.table({"a": [None, 1]})):
            with pytest.raises(ValueError, match="column 'a' has nulls, which its schema forbids"):
                writer.write(rows)
            if isinstance(rows, al.Table):
                with pytest.raises(ValueError, match="column 'a' has nulls, which its schema forbids"):
                    rows.cast(strict.type)
        whole = table.shuffle(0).filter(lambda row: row["a"] is not None)       # its chunks have a null, it has none
        writer.write(whole)
        writer.write({"a": [3]})
    assert sorted(al.read(path)["a"].to_pylist()) == load(path)["a"].combine_chunks().sort().to_pylist() == [0, 1, 2, 3]
    assert whole.cast(strict.type).schema.field("a").nullable is False and al.concat([whole.cast(strict.type)] * 2)


@pytest.mark.parametrize("stream", [False, True])
def test_arrowlite_a_writer_is_closed_once_and_takes_nothing_after_that(tmp_path, stream):
    path, memory = tmp_path / "t.arrow", io.BytesIO()
    for target in (path, memory):
        with al.Writer(target, {"a": "int8"}, stream) as writer:
            writer.write({"a": [1]})
            writer.close()
            size = os.path.getsize(path) if target is path else len(memory.getvalue())
            with pytest.raises(ValueError, match="this Writer is closed; open a new one"):
                writer.write({"a": [2]})
        writer.close()
        assert (os.path.getsize(path) if target is path else len(memory.getvalue())) == size
        assert al.read(path)["a"].to_pylist() == [1] and os.listdir(tmp_path) == ["t.arrow"]
    with pytest.raises(ZeroDivisionError):
        with al.Writer(tmp_path / "none.arrow", {"a": "int8"}, stream) as writer:
            raise ZeroDivisionError
    writer.close()
    assert os.listdir(tmp_path) == ["t.arrow"]


def test_arrowlite_two_processes_read_one_file(tmp_path):
    path = tmp_path / "t.arrow"
    al.write(al.Table.from_pydict({"x": np.arange(100_000)}), path)
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        sums = pool.map(lambda_sum, [path] * 4)
    assert sums == [99_999 * 50_000] * 4


def lambda_sum(path):
    return int(al.read(path)["x"].to_numpy().sum())


def test_arrowlite_tables_pickle_by_their_buffers(tmp_path):
    import pickle
    table = many_batches(sample(100), tmp_path).shuffle(0)[10:60]
    assert pickle.loads(pickle.dumps(table)).to_pylist() == table.to_pylist()
    buffers = []
    big = al.Table.from_pydict({"x": np.arange(100_000)})[1000:2000]
    data = pickle.dumps(big, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 4000 and sum(b.raw().nbytes for b in buffers) == 8000
    assert pickle.loads(data, buffers=buffers).to_pylist() == big.to_pylist()


def test_arrowlite_command_line(tmp_path):
    def run(*args):
        command = [sys.executable, str(HERE / "arrowlite.py"), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    theirs = save(every_type(), tmp_path / "t.arrow")
    code, out, _ = run("schema", theirs, save(every_type(), tmp_path / "s.arrows", stream=True))
    assert code == 0 and "11 rows" in out and "zoned_ns: timestamp[ns, UTC]" in out and "stream format" in out
    code, out, _ = run("head", "-n", 2, theirs)
    assert code == 0 and len(out.splitlines()) == 2 and json.loads(out.splitlines()[0])["int64"] == -(2**63)
    source = tmp_path / "x.jsonl"
    source.write_text('{"a": 1, "b": "é"}\n{"a": null, "b": "x"}\n')
    for target in ("x.arrow", "x.arrows"):
        assert run("convert", source, tmp_path / target)[0] == 0
        assert load(tmp_path / target).to_pylist() == [{"a": 1, "b": "é"}, {"a": None, "b": "x"}]
    assert run("convert", tmp_path / "x.arrows", tmp_path / "y.jsonl")[0] == 0
    assert [json.loads(line) for line in open(tmp_path / "y.jsonl")] == [{"a": 1, "b": "é"}, {"a": None, "b": "x"}]
    al.write(al.Table.from_pydict({"x": np.arange(50_000)}), tmp_path / "long.arrow")
    for rows in (2, 50_000):                                    # what waits in a buffer till the end, and what does not
        ours, closed = os.pipe()
        os.close(ours)
        command = [sys.executable, str(HERE / "arrowlite.py"), "head", str(tmp_path / "long.arrow"), "-n", str(rows)]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE)
        os.close(closed)
        assert (done.returncode, done.stderr) == (0, b"")
    for args in (("schema", tmp_path / "none"), ("head", source),
                 ("convert", tmp_path / "none.jsonl", tmp_path / "z.arrow")):
        code, out, error = run(*args)
        assert code == 1 and error.startswith("error: ") and len(error.splitlines()) == 1
    assert run("frobnicate")[0] == 2


def test_arrowlite_demo_runs():
    done = subprocess.run([sys.executable, str(HERE / "arrowlite.py")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "1 shuffled row" in done.stdout


def test_arrowlite_days_that_no_date32_counts_are_refused():
    far = np.array([3_650_000_000], "M8[D]")            # more days than 32 bits hold: they came back as year -1763891
    for values in (far, far.astype("M8[s]")):
        with pytest.raises(ValueError, match="does not fit"):
            al.array(values, "date32")
    assert al.array(np.array([2**31 - 1], "M8[D]"), "date32").to_numpy()[0] == np.datetime64(2**31 - 1, "D")


def test_arrowlite_every_spelling_of_a_type_is_a_type_or_refused_in_words():
    for text in ("dictionary<null, utf8>", "dictionary<date32, utf8>", "dictionary<bool, utf8>", "dictionary<utf8>",
                 "dictionary<list<int8>, utf8>", "list<>", "list<int8, int8>", "timestamp", "fixed_size_list<int8>",
                 "fixed_size_binary[0]", "duration[h]"):
        with pytest.raises(ValueError, match="not a complete type"):
            al.array([], text)
    for text, kind in (("string_view", "large_utf8"), ("binary_view", "large_binary")):     # as views are read
        assert al.array([], text).type == kind


def test_arrowlite_bytes_and_lists_of_one_length_take_a_fixed_size():
    for source in ("binary", "large_binary"):
        assert al.array(al.array([b"ab", None], source), "fixed_size_binary[2]").to_pylist() == [b"ab", None]
    for source in ("utf8", "large_utf8"):
        with pytest.raises(ValueError, match="cannot become"):
            al.array(al.array(["ab"], source), "fixed_size_binary[2]")
    assert al.array([[], None, []], "fixed_size_list<int8>[0]").to_pylist() == [[], None, []]
    with pytest.raises(ValueError, match="a row of 1 is no"):
        al.array([[], [1]], "fixed_size_list<int8>[0]")
    pairs = al.array([[1, 2], None], "fixed_size_list<int8>[2]")
    assert al.array(pairs, "fixed_size_list<float32>[2]").to_pylist() == [[1.0, 2.0], None]
    with pytest.raises(ValueError, match="a row of 2 is no"):
        al.array(pairs, "fixed_size_list<int8>[3]")


def test_arrowlite_a_slice_is_pickled_without_the_rest():
    import pickle
    words, flags = [f"word {i}" for i in range(100_000)], [i % 3 == 0 or None for i in range(100_000)]
    lists = [[i, None, str(i)][: i % 4 and 1] for i in range(100_000)]
    table = al.Table.from_pydict({"t": words, "b": flags, "l": lists, "when": [dt.date(2020, 1, 1)] * 100_000})
    part = table[50_003:50_010]
    data = pickle.dumps(part)
    assert len(data) < 4000 and pickle.loads(data).to_pylist() == part.to_pylist()


def test_arrowlite_a_damaged_column_has_no_size_and_a_forged_count_of_rows_is_refused(tmp_path):
    lists = al.array([[1], [2]], "list<int8>")
    bad = al.Array(al.as_type("list<list<int8>>"), 1, np.array([5, 6], np.int32), [lists])     # row 5 of 2
    with pytest.raises(ValueError, match="outside of its data"):
        _ = bad.nbytes
    with pytest.raises(ValueError, match="outside of its data"):
        al.write(al.Table(al.Schema({"l": bad.type}), [al.Array(al.Schema({"l": bad.type}).type, 1, None, [bad])]),
                 tmp_path / "t.arrow")
    al.write(al.Table.from_pydict({"x": np.arange(12345)}), tmp_path / "t.arrows", stream=True)
    data, honest = (tmp_path / "t.arrows").read_bytes(), struct.pack("<q", 12345)
    (tmp_path / "t.arrows").write_bytes(data.replace(honest, struct.pack("<q", 2**31), 2))
    with pytest.raises(ValueError, match="rows in .* bytes cannot be"):         # not when 17 GB of row numbers are made
        al.read(tmp_path / "t.arrows")


# --- actors.py -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["actors", "ray"])
def either(request):
    module = pytest.importorskip(request.param)
    for name in ("exceptions", "util.queue", "util.placement_group", "util.scheduling_strategies"):
        importlib.import_module(f"{request.param}.{name}")
    yield module
    module.shutdown()


@pytest.fixture
def ray(either):
    """The same claims, of the small Ray and of the real one."""
    if not either.is_initialized():
        either.init(num_cpus=4, resources={"token": 2}, include_dashboard=False, logging_level="ERROR",
                    log_to_driver=False)
    return either


@pytest.fixture
def small():
    """The small Ray alone, with GPUs that need not exist and little memory."""
    small_ray.shutdown()
    small_ray.init(num_cpus=4, num_gpus=2, object_store_memory=400 << 20)
    yield small_ray
    small_ray.shutdown()


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_tasks_take_arguments_and_return_values(ray):
    @ray.remote
    def f(a, b=2, *rest, key=None):
        return a, b, rest, key

    @ray.remote(num_cpus=2)
    def nothing():
        return None

    assert ray.get(f.remote(1)) == (1, 2, (), None)
    assert ray.get(f.remote(1, 3, 4, 5, key="k")) == (1, 3, (4, 5), "k")
    assert ray.get(nothing.remote()) is None
    assert ray.get(nothing.options(num_cpus=1).remote()) is None
    assert ray.get(ray.remote(lambda x: x + 1).remote(1)) == 2
    with pytest.raises(TypeError):
        f(1)


def test_wrong_arguments_are_noticed_where_the_call_is(ray):
    def doubled(function):
        @functools.wraps(function)
        def wrapper(self, x):
            return function(self, x, x)
        return wrapper

    @ray.remote
    def task(x: "int" = small_ray, /, *, key):
        return key

    @ray.remote
    class Actor:
        def __init__(self, x, y=(1, 2)):
            self.x = x, y

        def get(self, *rest, **more):
            return self.x, rest, more

        @doubled
        def add(self, a, b):
            return a + b

        @staticmethod
        def static(z):
            return z

        @classmethod
        def of_class(cls, z):
            return z

    actor = Actor.remote(1)
    for call in (Actor.remote, partial(Actor.remote, 1, x=2), task.remote, partial(task.remote, x=1, key=2),
                 partial(task.remote, 1, 2, key=3), actor.static.remote, partial(actor.of_class.remote, 1, 2)):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError, match="'key'"):
        task.remote()
    calls = [task.remote(key=1), task.remote(5, key=2), actor.get.remote(1, a=2), actor.static.remote(3),
             actor.of_class.remote(4)]
    assert ray.get(calls) == [1, 2, ((1, (1, 2)), (1,), {"a": 2}), 3, 4]
    if ray is small_ray:                                         # Ray counts the arguments of what is wrapped
        assert ray.get(actor.add.remote(2)) == 4
    assert ray.get(actor.__ray_call__.remote(lambda self, x: x, 6)) == 6


def test_a_task_returns_as_many_values_as_it_says(ray):
    @ray.remote(num_returns=3)
    def three():
        return 1, "two", [3]

    @ray.remote(num_returns=0)
    def none():
        return None

    assert ray.get(three.remote()) == [1, "two", [3]]
    assert none.remote() is None
    assert ray.get(three.options(num_returns=1).remote()) == (1, "two", [3])
    with pytest.raises(ValueError):
        ray.get(three.options(num_returns=2).remote())


def test_refs_are_resolved_as_arguments_but_not_in_containers(ray):
    @ray.remote
    def one():
        return 1

    @ray.remote
    def look(a, nested, *, key, more):
        return a, key, type(nested[0]).__name__, ray.get(nested[0]), type(more["x"]).__name__, ray.get(more["x"])

    ref = one.remote()
    assert ray.get(look.remote(ref, [ref], key=ray.put(5), more={"x": ref})) == (1, 5, "ObjectRef", 1, "ObjectRef", 1)


def test_nested_tasks_never_deadlock(ray):
    @ray.remote
    def leaves(depth):
        return 1 if depth == 0 else sum(ray.get([leaves.remote(depth - 1), leaves.remote(depth - 1)]))
    assert ray.get(leaves.remote(4), timeout=60) == 16          # up to 31 tasks that hold or wait for one of 4 CPUs


def test_a_failed_argument_fails_the_task_with_its_cause(ray):
    @ray.remote
    def fail():
        raise KeyError("lost")

    @ray.remote
    def use(x, y=None):
        return x

    for ref in (use.remote(fail.remote()), use.remote(1, y=fail.remote()), use.remote(use.remote(fail.remote()))):
        with pytest.raises(KeyError):
            ray.get(ref)


def test_errors_keep_their_type_and_their_traceback(ray):
    class Custom(Exception):
        def __init__(self, code):
            super().__init__(f"code {code}")
            self.code = code

        def __reduce__(self):
            return Custom, (self.code,)

    @ray.remote
    def fail():
        raise Custom(7)

    @ray.remote
    def outer():
        return ray.get(fail.remote())

    @ray.remote
    def missing_file():
        open("/no/such/file")

    with pytest.raises(Custom) as caught:
        ray.get(fail.remote())
    assert isinstance(caught.value, ray.exceptions.RayTaskError)
    assert "raise Custom(7)" in str(caught.value) and caught.value.cause.code == 7
    with pytest.raises(Custom):
        ray.get(outer.remote())
    with pytest.raises(FileNotFoundError):
        ray.get(missing_file.remote())
    if sys.version_info >= (3, 11):
        @ray.remote
        def several():
            raise vars(builtins)["ExceptionGroup"]("two", [KeyError(1), Custom(7)])

        with pytest.raises(vars(builtins)["ExceptionGroup"]) as caught:
            ray.get(several.remote())
        assert isinstance(caught.value, ray.exceptions.RayTaskError)
        assert caught.value.message == "two" and caught.value.exceptions[1].code == 7


def test_errors_that_cannot_be_pickled_still_arrive(ray):
    class Holds(Exception):
        def __init__(self):
            super().__init__("it has a lock")
            self.lock = threading.Lock()

    class Breaks(Exception):
        def __init__(self, a, b):
            super().__init__("it needs two")

    @ray.remote
    def holds():
        raise Holds()

    @ray.remote
    def breaks():
        raise Breaks(1, 2)

    with pytest.raises(ray.exceptions.RayError, match="it has a lock"):
        ray.get(holds.remote())
    with pytest.raises(ray.exceptions.RayError, match="it needs two"):
        ray.get(breaks.remote())


def test_actors_keep_state_and_order(ray):
    @ray.remote
    class Log:
        def __init__(self, first):
            self.items = [first]

        def add(self, item):
            self.items.append(item)
            return len(self.items)

        def all(self):
            return self.items

    @ray.remote
    def slow():
        time.sleep(0.3)
        return "slow"

    log = Log.remote("first")
    assert ray.get([log.add.remote(i) for i in range(100)]) == list(range(2, 102))
    log.add.remote(slow.remote())                               # its argument comes late, but it goes first
    log.add.remote("quick")
    assert ray.get(log.all.remote()) == ["first", *range(100), "slow", "quick"]


def test_a_failed_argument_does_not_hold_up_the_calls_behind_it(ray):
    @ray.remote
    def fail():
        time.sleep(0.2)
        raise KeyError

    @ray.remote
    class Actor:
        def f(self, x):
            return x

    actor = Actor.remote()
    first, second = actor.f.remote(fail.remote()), actor.f.remote(2)
    assert ray.get(second, timeout=60) == 2
    with pytest.raises(KeyError):
        ray.get(first)


def test_a_constructor_that_fails_fails_all_calls(ray):
    @ray.remote
    class Bad:
        def __init__(self):
            raise ValueError("no such thing")

        def f(self):
            return 1

    with pytest.raises(ray.exceptions.RayActorError, match="no such thing"):
        ray.get(Bad.remote().f.remote())


def test_named_actors_are_found_and_their_names_come_free(ray):
    @ray.remote
    class Actor:
        def pid(self):
            return os.getpid()

    def is_free():
        try:
            return not ray.get_actor("one")
        except ValueError:
            return True

    actor = Actor.options(name="one").remote()
    pid = ray.get(actor.pid.remote())
    assert ray.get(ray.get_actor("one").pid.remote()) == pid
    assert ray.get(Actor.options(name="one", get_if_exists=True).remote().pid.remote()) == pid
    with pytest.raises(ValueError):
        Actor.options(name="one").remote()
    ray.kill(actor)
    with pytest.raises(ray.exceptions.RayActorError):
        for _ in range(100):                                    # Ray's kill may take a moment
            ray.get(actor.pid.remote())
            time.sleep(0.05)
    eventually(is_free)
    again = Actor.options(name="one").remote()
    assert ray.get(again.pid.remote()) != pid
    with pytest.raises(ValueError):
        ray.get_actor("nobody")


def test_handles_travel_to_tasks_and_actors(ray):
    @ray.remote
    class Counter:
        def __init__(self):
            self.count = 0

        def add(self):
            self.count += 1
            return self.count

    @ray.remote
    def use(counter):
        return ray.get(counter.add.remote())

    @ray.remote
    class Owner:
        def __init__(self, counters):
            self.counters = counters

        def use(self):
            return ray.get(self.counters[0].add.remote())

    counter = Counter.remote()
    owner = Owner.remote([counter])
    assert ray.get(use.remote(counter)) == 1
    assert ray.get(owner.use.remote()) == 2
    del counter
    assert ray.get(owner.use.remote()) == 3                     # the owner's handle keeps it alive


def test_threaded_actors_run_calls_at_the_same_time(ray):
    @ray.remote(max_concurrency=4)
    class Meeting:
        def __init__(self):
            self.barrier = threading.Barrier(4)

        def join(self):
            return self.barrier.wait(20) >= 0

    meeting = Meeting.remote()
    assert all(ray.get([meeting.join.remote() for _ in range(4)], timeout=30))


def test_async_actors_have_many_calls_in_flight(ray):
    @ray.remote
    class Gate:
        def __init__(self):
            self.event, self.count = asyncio.Event(), 0

        async def wait(self):
            self.count += 1
            await self.event.wait()
            return self.count

        async def open(self):
            self.event.set()

        def waiting(self):
            return self.count

    gate = Gate.remote()
    refs = [gate.wait.remote() for _ in range(200)]
    eventually(lambda: ray.get(gate.waiting.remote()) == 200)
    ray.get(gate.open.remote())
    assert ray.get(refs, timeout=60) == [200] * 200


def test_refs_are_awaited_inside_and_outside_of_actors(ray):
    @ray.remote
    def square(x):
        if x is None:
            raise KeyError
        return x * x

    @ray.remote
    class Sum:
        async def of(self, numbers):
            return sum(await asyncio.gather(*[square.remote(i) for i in numbers]))

        async def fail(self):
            try:
                await square.remote(None)
            except KeyError:
                return "caught"

    async def main():
        assert await square.remote(3) == 9
        return await asyncio.gather(*[square.remote(i) for i in range(6)], asyncio.wait_for(square.remote(9), 20))

    actor = Sum.remote()
    assert ray.get(actor.of.remote(range(5))) == 30
    assert ray.get(actor.fail.remote()) == "caught"
    for _ in range(2):                                          # each time in an event loop of its own
        assert asyncio.run(main()) == [0, 1, 4, 9, 16, 25, 81]


def test_an_actor_calls_itself_by_its_handle(ray):
    @ray.remote
    class Chain:
        def me(self):
            return ray.get_runtime_context().current_actor

        async def follow(self, n):
            return "end" if n == 0 else await ray.get_runtime_context().current_actor.follow.remote(n - 1)

    chain = Chain.remote()
    assert ray.get(chain.follow.remote(5)) == "end"
    assert ray.get(ray.get(chain.me.remote()).follow.remote(0)) == "end"


def test_actors_end_when_they_say_so_or_when_no_handle_is_left(ray):
    @ray.remote
    class Actor:
        def pid(self):
            return os.getpid()

        def slow(self):
            time.sleep(0.3)
            return "done"

        def leave(self):
            ray.actor.exit_actor()

    actor = Actor.remote()
    pid = ray.get(actor.pid.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.leave.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.pid.remote())
    eventually(lambda: not alive(pid))
    assert ray.get(Actor.remote().slow.remote()) == "done"      # calls that were made are still answered
    actor = Actor.remote()
    pid = ray.get(actor.pid.remote())
    assert alive(pid)
    del actor
    eventually(lambda: not alive(pid))


def test_actors_restart_and_calls_are_tried_again(ray, tmp_path):
    @ray.remote(max_restarts=1, max_task_retries=1)
    class Actor:
        def __init__(self):
            self.count = 0

        def add(self):
            self.count += 1
            return self.count

        def pid(self):
            return os.getpid()

        def die_once(self, path):
            if not os.path.exists(path):
                open(path, "w").close()
                os._exit(1)
            return "alive"

    actor = Actor.remote()
    assert ray.get([actor.add.remote(), actor.add.remote()]) == [1, 2]
    assert ray.get(actor.die_once.remote(str(tmp_path / "died")), timeout=30) == "alive"
    assert ray.get(actor.add.remote()) == 1                     # a new state
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)        # once too often
    with pytest.raises(ray.exceptions.RayActorError):
        for _ in range(100):
            ray.get(actor.add.remote(), timeout=30)
            time.sleep(0.05)


def test_a_restarted_actor_gets_its_arguments_again(small):
    @small.remote(max_restarts=-1, max_task_retries=-1)
    class Actor:
        def __init__(self, array):
            self.array = array

        def total(self):
            return int(self.array.sum()), os.getpid()

    full, actor = free_memory(), Actor.remote(small.put(np.ones(1 << 20, np.uint8)))
    for _ in range(3):
        total, pid = small.get(actor.total.remote(), timeout=10)
        assert total == 1 << 20
        os.kill(pid, signal.SIGKILL)
    del actor
    eventually(lambda: free_memory() == full)


def test_kill_may_be_a_restart(ray):
    @ray.remote(max_restarts=-1, max_task_retries=-1)
    class Actor:
        def pid(self):
            return os.getpid()

    actor = Actor.remote()
    first = ray.get(actor.pid.remote())
    ray.kill(actor, no_restart=False)
    eventually(lambda: not alive(first))
    assert ray.get(actor.pid.remote(), timeout=30) != first


@pytest.mark.parametrize("how", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "ctypes.string_at(0)"])
def test_crashes_fail_what_was_running_by_name(ray, how):
    @ray.remote(max_retries=0)
    def crash():
        exec(how, {"os": os, "signal": signal, "ctypes": ctypes})

    @ray.remote
    class Actor:
        def crash(self):
            exec(how, {"os": os, "signal": signal, "ctypes": ctypes})

        def f(self):
            return 1

    actor, deadline = Actor.remote(), 1 if ray is small_ray else 20        # noticed within a second
    ray.get(actor.f.remote())
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(crash.remote(), timeout=deadline)
    for ref in [actor.crash.remote(), *[actor.f.remote() for _ in range(3)]]:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(ref, timeout=deadline)


def test_tasks_are_tried_again_when_their_process_dies(ray, tmp_path):
    @ray.remote
    def die_twice(path):
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) < 3:
            os._exit(1)
        return os.path.getsize(path)

    @ray.remote(retry_exceptions=True, max_retries=2)
    def fail_twice(path):
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) < 3:
            raise ValueError
        return os.path.getsize(path)

    assert ray.get(die_twice.remote(str(tmp_path / "died")), timeout=30) == 3
    assert ray.get(fail_twice.remote(str(tmp_path / "failed")), timeout=30) == 3


def test_calls_that_raise_what_they_name_are_tried_again(small):
    class Mine(KeyError):
        pass

    @small.remote(max_task_retries=2)
    class Actor:
        tries = 0

        def fail(self, error):
            self.tries += 1
            raise error

        @small.method(retry_exceptions=[Mine, OSError])
        def named(self, error):
            self.fail(error)

        def counted(self):
            tries, self.tries = self.tries, 0
            return tries

    @small.remote(max_task_retries=2)
    class Async(Actor._target):
        async def fail(self, error):
            super().fail(error)

    def task(error):
        small_ray.get(actor.fail.remote(error))

    def tries(call, error):
        with pytest.raises(error):
            small.get(call.remote(error), timeout=20)
        return sum(small.get([each.counted.remote() for each in (actor, other)]))

    actor, other, some = Actor.options(name="A").remote(), Async.remote(), {"retry_exceptions": [Mine, OSError]}
    task = small.remote(max_retries=2, **some)(task)
    for call in (task, actor.named, actor.fail.options(**some), other.fail.options(**some)):
        assert [tries(call, error) for error in (Mine, FileNotFoundError, KeyError)] == [3, 3, 1]
    for call in (task, actor.fail, other.fail):
        assert [tries(call.options(retry_exceptions=again), Mine) for again in (True, False, [])] == [3, 1, 1]
        for wrong in (5, [5]):
            with pytest.raises(ValueError, match="list of exceptions"):
                call.options(retry_exceptions=wrong)


def test_get_takes_lists_and_timeouts(ray):
    @ray.remote
    def sleep(seconds):
        time.sleep(seconds)
        return seconds

    assert ray.get([]) == []
    assert ray.get([ray.put(i) for i in range(3)]) == [0, 1, 2]
    ref = sleep.remote(1.5)
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(ref, timeout=0.2)
    with pytest.raises(TimeoutError):
        ray.get(ref, timeout=0)
    assert ray.get(ref) == 1.5
    with pytest.raises((TypeError, ValueError)):
        ray.get(5)
    with pytest.raises(TypeError):
        ray.put(ref)


def test_wait_returns_what_is_ready_in_order_and_no_more_than_asked(ray, tmp_path):
    @ray.remote
    def when(path):
        while not os.path.exists(path):
            time.sleep(0.01)

    @ray.remote
    def fail():
        raise ValueError

    refs = [when.remote(str(tmp_path / "go")), ray.put(1), fail.remote(), ray.put(2)]
    ready, rest = ray.wait(refs, num_returns=3, timeout=30)
    assert (ready, rest) == (refs[1:], refs[:1])                # what failed is ready, too
    ready, rest = ray.wait(refs, num_returns=2, timeout=30)
    assert len(ready) == 2 and ready == [r for r in refs if r in ready] and rest == [r for r in refs if r not in ready]
    assert ray.wait(refs, num_returns=4, timeout=0.2) == (refs[1:], refs[:1])
    assert len(ray.wait(refs, timeout=0)[0]) == 1
    (tmp_path / "go").touch()
    assert ray.wait(refs, num_returns=4, timeout=30) == (refs, [])
    for bad in (lambda: ray.wait([refs[0], refs[0]]), lambda: ray.wait(refs, num_returns=5),
                lambda: ray.wait(refs, num_returns=0)):
        with pytest.raises(ValueError):
            bad()


def test_cancel_of_what_is_done_changes_nothing(small):
    refs = [small.remote(lambda: 1).remote() for _ in range(200)]       # the real Ray may abort its driver here
    for ref in refs:
        small.wait([ref])
        small.cancel(ref)
    assert small.get(refs) == [1] * 200


def test_cancel_stops_calls_of_async_actors(ray):
    @ray.remote
    class Actor:
        def __init__(self):
            self.waits = 0

        async def forever(self):
            self.waits += 1
            await asyncio.sleep(1000)

        async def count(self):
            return self.waits

    actor = Actor.remote()
    ref = actor.forever.remote()
    eventually(lambda: ray.get(actor.count.remote()) == 1)
    ray.cancel(ref)
    with pytest.raises((ray.exceptions.TaskCancelledError, asyncio.CancelledError)):
        ray.get(ref, timeout=60)
    assert ray.get(actor.count.remote()) == 1


def test_arrays_are_read_only_views_of_one_copy(ray):
    array = np.arange(1_000_000)
    ref = ray.put(array)
    array[0] = 5                                                # put took a snapshot
    a, b = ray.get(ref), ray.get(ref)
    assert a[0] == 0 and not a.flags.writeable and a.ctypes.data == b.ctypes.data

    @ray.remote
    def look(x):
        return int(x.sum()), x.flags.writeable
    assert ray.get(look.remote(ref)) == (499_999_500_000, False)
    assert ray.get(look.remote(np.ones(1_000_000))) == (1_000_000, False)


def test_refs_inside_of_values_keep_their_objects(ray):
    @ray.remote
    def make():
        return [ray.put(np.full(100_000, 7.0)), ray.put("x")]

    refs = ray.get(make.remote())
    outer = ray.put({"deep": [ray.put(np.ones(100_000))]})
    time.sleep(0.3)                                             # time enough to free what nobody holds
    assert ray.get(refs[0]).sum() == 700_000 and ray.get(refs[1]) == "x"
    assert ray.get(ray.get(outer)["deep"][0]).sum() == 100_000


def test_custom_resources_are_limits(ray):
    @ray.remote(resources={"token": 1}, num_cpus=0)
    def hold():
        begin = time.monotonic()
        time.sleep(0.3)
        return begin, time.monotonic()

    spans = ray.get([hold.remote() for _ in range(5)])
    assert max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans) <= 2
    assert ray.cluster_resources()["token"] == 2
    eventually(lambda: ray.available_resources().get("token") == 2)


def test_placement_groups_reserve_their_bundles(ray):
    group = ray.util.placement_group([{"CPU": 1}, {"CPU": 2}], strategy="PACK", lifetime="detached")
    assert ray.get(group.ready(), timeout=60).bundle_specs == [{"CPU": 1}, {"CPU": 2}]
    assert group.wait(5) and group.bundle_count == 2
    assert ray.util.placement_group_table(group)["state"] == "CREATED"
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True)

    @ray.remote(num_cpus=1, scheduling_strategy=strategy)
    class Actor:
        def f(self):
            return 1

    first, second = Actor.remote(), Actor.remote()
    assert ray.get(first.f.remote(), timeout=60) == 1
    assert ray.wait([second.f.remote()], timeout=0.5)[0] == []
    ray.util.remove_placement_group(group)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(first.f.remote(), timeout=60)


def test_bundles_of_nothing_are_refused(ray):
    for bundles in ([{"CPU": 0}], [{"CPU": 1}, {"CPU": 0, "GPU": 0.0}], [{}], []):
        with pytest.raises(ValueError):
            ray.util.placement_group(bundles)
    group = ray.util.placement_group([{"CPU": 1, "GPU": 0}])
    assert group.wait(60)
    ray.util.remove_placement_group(group)


def test_actor_pool_spreads_and_orders(ray):
    @ray.remote
    class Actor:
        def double(self, x):
            time.sleep(0.01 * (x % 3))
            return 2 * x

    def double(actor, x):
        return actor.double.remote(x)

    actors = [Actor.remote(), Actor.remote()]
    pool = ray.util.ActorPool(actors)
    assert list(pool.map(double, range(10))) == [2 * i for i in range(10)]
    assert sorted(pool.map_unordered(double, range(10))) == [2 * i for i in range(10)]
    pool.submit(double, 5)
    assert pool.has_next() and pool.has_free() and pool.get_next() == 10 and not pool.has_next()
    with pytest.raises(TypeError):
        list(pool.map(double, [1, None, 2, 3]))
    assert list(pool.map(double, [10, 11])) == [20, 22]          # and nothing of 2 and 3
    pool.map(double, [6, 7])
    assert pool.has_next() and next(pool.map(double, [8, 9, 9])) == 16
    assert next(pool.map_unordered(double, [5, 5, 5])) == 10 and list(pool.map_unordered(double, [9])) == [18]
    pool = ray.util.ActorPool(actors)
    pool.submit(lambda actor, x: actor.__ray_call__.remote(lambda self: time.sleep(x)), 1)
    with pytest.raises(TimeoutError):
        pool.get_next(timeout=0, ignore_if_timedout=True)
    assert not pool.has_next()
    with pytest.raises(ValueError, match="belongs"):
        pool.push(actors[0])


def test_queue_between_processes(ray):
    queue = ray.util.queue.Queue(maxsize=2)

    @ray.remote
    def produce(queue, count):
        for i in range(count):
            queue.put(i)

    ref = produce.remote(queue, 5)
    assert [queue.get(timeout=60) for _ in range(5)] == list(range(5))
    ray.get(ref)
    with pytest.raises(ray.util.queue.Empty):
        queue.get_nowait()
    with pytest.raises(ray.util.queue.Empty):
        queue.get(timeout=0.1)
    queue.put_nowait(1), queue.put_nowait(2)
    with pytest.raises(ray.util.queue.Full):
        queue.put(3, timeout=0.1)
    assert queue.full() and queue.qsize() == len(queue) == 2 and not queue.empty()
    assert queue.get_nowait_batch(2) == [1, 2] and queue.empty()
    queue.shutdown()


def test_environment_variables_belong_to_their_task_alone(ray):
    @ray.remote(runtime_env={"env_vars": {"MY_VARIABLE": "yes"}})
    def with_variable():
        return os.environ.get("MY_VARIABLE")

    @ray.remote
    def without():
        return os.environ.get("MY_VARIABLE")

    assert ray.get(with_variable.remote(), timeout=60) == "yes"
    assert ray.get([without.remote() for _ in range(8)]) == [None] * 8


def test_what_a_task_or_an_actor_starts_inherits_its_environment(small):
    def look():
        return os.environ.get("A"), os.environ.get("B"), os.environ["CUDA_VISIBLE_DEVICES"]

    class Actor:
        def look(self):
            return look()

        def call(self, task):
            return small_ray.get(task.remote())

        def make(self, cls):
            return small_ray.get(cls.remote().look.remote())

    def having(target, **variables):
        return small.remote(runtime_env={"env_vars": variables})(target)

    actor, task = having(Actor, A="1", CUDA_VISIBLE_DEVICES="7").remote(), small.remote(look)
    assert small.get(actor.call.remote(task)) == ("1", None, "")              # which GPUs it may use is not inherited
    assert small.get(actor.call.remote(task.options(num_gpus=1))) == ("1", None, "0")
    assert small.get(actor.make.remote(small.remote(Actor))) == ("1", None, "")
    assert small.get(actor.make.remote(having(Actor, A="2", B="3"))) == ("2", "3", "")
    assert small.get(having(lambda: small_ray.get(task.remote()), B="4").remote()) == (None, "4", "")
    assert small.get(task.remote()) == (None, None, "")


@pytest.mark.parametrize("env", [5, {"env_vars": ["A"]}, *({"env_vars": {name: value}} for name, value in (
    ("A", 1), ("A", None), ("A=B", "1"), ("", "1"), ("A", "\0"), (1, "1")))])
def test_an_environment_that_is_not_text_is_refused(env):
    small_ray.shutdown()
    for refused in (small_ray.init, small_ray.remote(len).options):
        with pytest.raises(TypeError, match="such as {'env_vars': {'OMP_NUM_THREADS': '1'}}"):
            refused(runtime_env=env)
    assert not small_ray.is_initialized()


def test_methods_have_options(ray):
    @ray.remote
    class Actor:
        @ray.method(num_returns=2)
        def two(self):
            return 1, 2

    actor = Actor.remote()
    assert ray.get(list(actor.two.remote())) == [1, 2]
    assert ray.get(actor.two.options(num_returns=1).remote()) == (1, 2)
    with pytest.raises(AttributeError):
        actor.nothing.remote()


def test_the_runtime_context_says_where_one_is(ray):
    def what():
        context = ray.get_runtime_context()
        return context.get_actor_name(), context.get_task_name(), context.get_assigned_resources()

    @ray.remote
    class Actor:
        def where(self):
            context = ray.get_runtime_context()
            return context.get_actor_id(), context.get_node_id(), context.get_job_id()

        def what(self):
            return what()

    actor, here = Actor.remote(), ray.get_runtime_context()
    assert ray.get(actor.where.remote()) == (actor._actor_id.hex(), here.get_node_id(), here.get_job_id())
    assert ray.get(actor.what.remote()) == ("", "Actor.what", {})
    named = Actor.options(name="the name", num_cpus=0.5).remote()
    assert ray.get(named.what.remote()) == ("the name", "Actor.what", {"CPU": 0.5})
    assert ray.get(ray.remote(what).remote()) == (None, "what", {"CPU": 1})
    assert here.get_actor_name() is None and here.get_task_name() is None
    assert here.get_node_id() in [node["NodeID"] for node in ray.nodes()]


def test_cancel_stops_running_and_queued_tasks(ray, tmp_path):
    @ray.remote
    def forever(path):
        open(path, "w").close()
        while True:
            time.sleep(0.01)

    @ray.remote
    def f():
        return 1

    running = forever.remote(str(tmp_path / "a"))
    eventually(lambda: (tmp_path / "a").exists())
    ray.cancel(running)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(running, timeout=60)
    blocking = forever.options(num_cpus=4).remote(str(tmp_path / "b"))
    eventually(lambda: (tmp_path / "b").exists())
    queued = forever.options(num_cpus=4).remote(str(tmp_path / "c"))
    for ref in (queued, blocking):
        ray.cancel(ref)
        with pytest.raises(ray.exceptions.TaskCancelledError):
            ray.get(ref, timeout=60)
    assert ray.get(f.options(num_cpus=4).remote(), timeout=60) == 1 and not (tmp_path / "c").exists()


def test_cancel_by_force_kills_what_does_not_listen(small, tmp_path):
    @small.remote
    def deaf(path):
        open(path, "w").close()
        while True:
            try:
                time.sleep(10)
            except KeyboardInterrupt:
                pass

    ref = deaf.remote(str(tmp_path / "a"))
    eventually(lambda: (tmp_path / "a").exists())
    small.cancel(ref)
    assert small.wait([ref], timeout=0.3) == ([], [ref])
    small.cancel(ref, force=True)
    with pytest.raises(small.exceptions.TaskCancelledError):
        small.get(ref, timeout=5)


def test_cancel_by_force_is_for_tasks(ray):
    @ray.remote
    class Actor:
        def sleep(self):
            time.sleep(60)

    actor = Actor.remote()
    ref = actor.sleep.remote()
    with pytest.raises(ValueError, match="force"):
        ray.cancel(ref, force=True)
    assert ray.wait([ref], timeout=0)[0] == []
    ray.kill(actor)


def test_cancel_reaches_the_tasks_that_a_task_started(small, tmp_path):
    @small.remote
    def forever(path):
        open(path, "w").close()
        while True:
            time.sleep(0.01)

    @small.remote
    def parent(path):
        return small_ray.get(forever.remote(path))

    ref = parent.remote(str(tmp_path / "a"))
    eventually(lambda: (tmp_path / "a").exists())
    small.cancel(ref)
    with pytest.raises(small.exceptions.TaskCancelledError):
        small.get(ref, timeout=5)
    eventually(lambda: small.available_resources()["CPU"] == 4)


def test_arguments_that_cannot_be_pickled_are_named(small):
    @small.remote
    def f(x, y=None):
        return x

    with pytest.raises(TypeError, match="argument 'y', of type lock, cannot be pickled"):
        f.remote(1, y=threading.Lock())
    with pytest.raises(TypeError, match="argument 0, of type list"):
        f.remote([threading.Lock()])
    assert small.get(f.remote(1)) == 1


def free_memory():
    return small_ray.available_resources()["object_store_memory"]


def shared_bytes(pid):
    """What a process has touched of the shared memory, each page divided by the number of its users."""
    total, shared = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            shared = "memfd:actors" in line
        elif shared and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_eight_readers_share_the_pages_of_one_array(small):
    @small.remote(num_cpus=0)
    class Reader:
        def read(self, refs):
            self.array = small_ray.get(refs[0])
            return int(self.array.sum()), os.getpid()

    gc.collect()                                                # arenas of sessions before, in cycles of pytest.raises
    ref = small.put(np.ones(256 << 20, np.uint8))
    readers = [Reader.remote() for _ in range(8)]
    results = small.get([reader.read.remote([ref]) for reader in readers])
    assert {total for total, _ in results} == {256 << 20}
    assert sum(shared_bytes(pid) for _, pid in results) + shared_bytes(os.getpid()) < 260 << 20


def test_objects_are_freed_when_the_last_ref_is_gone(small):
    @small.remote
    def make():
        return [small_ray.put(np.ones(50 << 20, np.uint8))]

    @small.remote
    class Keeper:
        def keep(self, refs):
            self.refs = refs

        def forget(self):
            del self.refs

        def die(self):
            os._exit(1)

    def die_while_writing():
        small_ray._client.ask("allocate", 50 << 20, True)
        os._exit(1)

    full, keeper = free_memory(), Keeper.remote()
    with pytest.raises(small.exceptions.WorkerCrashedError):
        small.get(small.remote(max_retries=0)(die_while_writing).remote())
    eventually(lambda: free_memory() == full)
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1)):             # holes become one again
        refs = {i: small.put(np.ones(120 << 20, np.uint8)) for i in range(3)}
        for i in order:
            del refs[i]
        small.put(np.ones(380 << 20, np.uint8))
    for i in range(12):                                         # 12 times 100 MB through 400 MB
        assert small.get(small.put(np.full(100 << 20, i, np.uint8)))[-1] == i
    eventually(lambda: free_memory() == full)
    outer = small.put({"inside": small.get(make.remote())})     # inside of another object
    assert small.get(small.get(outer)["inside"][0])[0] == 1 and free_memory() < full
    del outer
    eventually(lambda: free_memory() == full)
    small.get(keeper.keep.remote([small.put(np.ones(50 << 20, np.uint8))]))     # borrowed by an actor
    time.sleep(0.2)
    assert free_memory() < full
    small.get(keeper.forget.remote())
    eventually(lambda: free_memory() == full)
    small.get(keeper.keep.remote([small.put(np.ones(50 << 20, np.uint8))]))     # by one that dies
    with pytest.raises(small.exceptions.ActorDiedError):
        small.get(keeper.die.remote())
    eventually(lambda: free_memory() == full)


def test_a_view_outlives_its_ref(small):
    full = free_memory()
    view = small.get(small.put(np.full(50 << 20, 7, np.uint8)))[1000:]
    refs = [small.put(np.zeros(50 << 20, np.uint8)) for _ in range(6)]
    assert (view == 7).all()
    del refs, view
    eventually(lambda: free_memory() == full)


def test_full_shared_memory_is_an_error_and_not_the_end(small):
    large = np.ones(150 << 20, np.uint8)

    @small.remote
    def make():
        return np.ones(150 << 20, np.uint8)

    @small.remote
    def take(x):
        return len(x)

    refs = [small.put(large), small.put(large)]
    for too_much in (lambda: small.put(large), lambda: small.get(make.remote()), lambda: take.remote(large)):
        with pytest.raises(small.exceptions.ObjectStoreFullError, match="object_store_memory"):
            too_much()
    refs.pop()
    assert small.get(take.remote(large)) == 150 << 20


def test_refs_in_cycles_of_idle_processes_make_room(small):
    def make_cycle():
        cycle = [small_ray.put(np.ones(200 << 20, np.uint8))]
        cycle.append(cycle)

    small.get(small.remote(make_cycle).remote())
    assert small.get(small.put(np.ones(300 << 20, np.uint8))).size == 300 << 20


def test_tensors_and_tables_travel_by_their_buffers(small):
    torch = pytest.importorskip("torch")
    state = {"nested": {"w": torch.randn(300, 400).to(torch.bfloat16), "b": torch.arange(3)},
             "transposed": torch.randn(500, 100).t(), "empty": torch.empty(0, 4), "scalar": torch.tensor(3.5),
             "mask": torch.tensor([True, False]), "gradient": torch.randn(200, 200, requires_grad=True),
             "complex": torch.randn(4, dtype=torch.complex64), "parameter": torch.nn.Parameter(torch.randn(200, 200))}

    def same(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) and (a.dtype, a.requires_grad, type(a)) == (b.dtype, b.requires_grad, type(b))

    @small.remote
    def back(x):
        return x

    ref = small.put(state)
    assert same(state, small.get(ref)) and same(state, small.get(back.remote(ref)))
    assert small.get(ref)["nested"]["w"].data_ptr() == small.get(ref)["nested"]["w"].data_ptr()
    table = al.Table.from_pydict({"x": list(range(100_000)), "s": ["text"] * 100_000})
    ref = small.put(table)
    assert small.get(ref).to_pydict() == table.to_pydict()
    one, two = small.get(ref)["x"].to_numpy(), small.get(ref)["x"].to_numpy()
    assert one.ctypes.data == two.ctypes.data and not one.flags.writeable
    for value in ("text" * 100_000, b"\0" * 500_000, bytearray(b"ab" * 100_000), np.arange(100_000)[::2], np.float32(3),
                  np.array(["a", None], dtype=object), np.asfortranarray(np.random.rand(300, 300)), [], {}, None):
        got = small.get(back.remote(value))
        assert type(got) is type(value) and np.array_equal(got, value)


def test_what_can_never_fit_is_an_error_at_once(small):
    @small.remote
    def f():
        return 1

    @small.remote
    class Actor:
        def f(self):
            return 1

    for ref in (f.options(num_cpus=5).remote(), f.options(num_gpus=3).remote(), f.options(resources={"x": 1}).remote()):
        with pytest.raises(small.exceptions.TaskUnschedulableError, match="asks for"):
            small.get(ref, timeout=5)
    with pytest.raises(small.exceptions.ActorUnschedulableError):
        small.get(Actor.options(num_cpus=5).remote().f.remote(), timeout=5)
    with pytest.raises(ValueError, match="whole"):
        f.options(num_gpus=1.5)
    with pytest.raises(ValueError, match="unknown option"):
        f.options(cpus=1)
    for bundles in ([{"CPU": 100}], [{"CPU": 1}] * 2):
        assert small.util.placement_group(bundles, strategy="STRICT_SPREAD").wait(5) is False


def test_gpus_are_given_out_whole_or_in_shares(small):
    class Actor:
        def visible(self):
            return os.environ["CUDA_VISIBLE_DEVICES"], small_ray.get_gpu_ids()

    whole, half = small.remote(num_gpus=1)(Actor), small.remote(num_gpus=0.5)(Actor)
    first, halves = whole.remote(), [half.remote(), half.remote()]
    visible, ids = small.get(first.visible.remote())
    shares = small.get([actor.visible.remote() for actor in halves])
    assert visible == str(ids[0]) and shares[0] == shares[1] != (visible, ids)
    late = whole.remote()
    assert small.wait([late.visible.remote()], timeout=0.3)[0] == []
    del first
    assert small.get(late.visible.remote(), timeout=10) == (visible, ids)
    del late, halves
    eventually(lambda: small.available_resources().get("GPU") == 2)
    some = [small.remote(num_gpus=share)(Actor).remote() for share in (0.4, 0.7, 0.3)]
    small.get([actor.visible.remote() for actor in some])
    del some[1]
    late = whole.remote()                                       # 1.3 GPUs are free, but no whole one
    assert small.wait([late.visible.remote()], timeout=0.3)[0] == []
    assert small.get(small.remote(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).remote()) == ""


def test_what_makes_no_sense_is_refused_at_once(small):
    @small.remote
    class Actor:
        pass

    async def coroutine():
        pass

    def strategy(index):
        return small.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, index)

    group = small.util.placement_group([{"CPU": 1}, {"CPU": 1}])
    for name, value in (("lifetime", "foo"), ("max_concurrency", -1), ("max_concurrency", "2"), ("max_restarts", 1.5),
                        ("max_restarts", -2), ("max_task_retries", "1"), ("name", 5), ("name", ""),
                        ("get_if_exists", True), ("scheduling_strategy", strategy(-2)),
                        ("scheduling_strategy", strategy(2))):
        with pytest.raises(ValueError, match={"scheduling_strategy": "bundle_index"}.get(name, name)):
            Actor.options(**{name: value})
    Actor.options(max_restarts=None, max_concurrency=None, name=None, lifetime=None, num_cpus=None, resources=None,
                  scheduling_strategy=strategy(1), runtime_env=None)
    with pytest.raises(ValueError, match="timeout=-1"):
        small.wait([small.put(1)], timeout=-1)
    with pytest.raises(ValueError, match="async"):
        small.remote(coroutine)
    for bundles in ({"CPU": 1}, [], [{}], [5]):
        with pytest.raises(ValueError, match="list of bundles"):
            small.util.placement_group(bundles)
    with pytest.raises(TypeError, match="foo"):
        small.util.placement_group([{"CPU": 1}], foo=1)


def test_tenths_of_a_cpu_add_up(small):
    @small.remote(num_cpus=0.1)
    class Actor:
        def f(self):
            return 1

    actors = [Actor.remote() for _ in range(40)]
    assert small.get([actor.f.remote() for actor in actors], timeout=30) == [1] * 40
    assert "CPU" not in small.available_resources()
    late = Actor.remote()
    assert small.wait([late.f.remote()], timeout=0.3)[0] == []


@pytest.fixture
def cluster():
    small_ray.shutdown()
    cluster = small_ray.cluster_utils.Cluster(head_node_args={"num_cpus": 1, "object_store_memory": 300 << 20})
    small_ray.init(address=cluster.address)
    yield cluster
    cluster.shutdown()


def on(node, soft=False):
    return small_ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.node_id, soft=soft)


def test_bundles_are_packed_and_spread_over_nodes(cluster):
    for _ in range(2):
        cluster.add_node(num_cpus=2)                            # and 1 CPU on the head
    for count, strategy, nodes in ((2, "STRICT_PACK", 1), (3, "STRICT_SPREAD", 3), (5, "PACK", 3), (2, "PACK", 1),
                                   (3, "PACK", 2), (2, "SPREAD", 2), (3, "SPREAD", 3)):
        group = small_ray.util.placement_group([{"CPU": 1}] * count, strategy=strategy)
        assert group.wait(5)
        homes = small_ray.util.placement_group_table()[group.id.hex()]["bundles_to_node_id"]
        assert len(homes) == count and len(set(homes.values())) == nodes, (count, strategy)
        small_ray.util.remove_placement_group(group)
    for count, strategy in ((4, "STRICT_SPREAD"), (3, "STRICT_PACK"), (6, "PACK"), (6, "SPREAD")):
        group = small_ray.util.placement_group([{"CPU": 1}] * count, strategy=strategy)
        with pytest.raises(small_ray.exceptions.TaskUnschedulableError):
            small_ray.get(group.ready(), timeout=5)


def test_objects_move_between_nodes_when_they_are_needed(cluster):
    here, there = [cluster.add_node(num_cpus=1, object_store_memory=200 << 20) for _ in range(2)]

    @small_ray.remote
    def make(count):
        return np.arange(count), small_ray.get_runtime_context().get_node_id()

    @small_ray.remote
    def total(made):
        return int(made[0].sum()), small_ray.get_runtime_context().get_node_id()

    for count in (0, 10, 100_000, 5_000_000):
        ref = make.options(scheduling_strategy=on(here)).remote(count)
        remote_sum = total.options(scheduling_strategy=on(there)).remote(ref)
        assert small_ray.get(remote_sum, timeout=60) == (count * (count - 1) // 2, there.node_id)
        array, home = small_ray.get(ref, timeout=60)
        assert home == here.node_id and len(array) == count and (array[-100:] == np.arange(count)[-100:]).all()


def test_a_dead_node_fails_clearly_and_its_actors_move(cluster):
    node, other = cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)

    @small_ray.remote(num_cpus=2, max_restarts=1, max_task_retries=1)
    class Actor:
        def where(self):
            return small_ray.get_runtime_context().get_node_id()

        def large(self):
            return np.ones(1_000_000)

    bound = Actor.options(num_cpus=0, scheduling_strategy=on(node)).remote()
    moving = Actor.options(scheduling_strategy=on(node, soft=True)).remote()
    assert small_ray.get([bound.where.remote(), moving.where.remote()], timeout=60) == [node.node_id] * 2
    only_there = bound.large.remote()
    small_ray.wait([only_there])
    cluster.remove_node(node)
    with pytest.raises(small_ray.exceptions.RayActorError, match="unschedulable|asks for"):
        small_ray.get(bound.where.remote(), timeout=10)
    with pytest.raises(small_ray.exceptions.ObjectLostError):
        small_ray.get(only_there, timeout=10)
    assert small_ray.get(moving.where.remote(), timeout=60) == other.node_id


def test_strangers_are_not_unpickled(cluster, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    host, port = cluster.address.split(":")
    bomb = small_ray.frame("hello_worker", Bomb())
    for payload in (bomb, bytes(64) + bomb, b"", b"x" * 63):
        with socket.create_connection((host, int(port)), timeout=5) as sock:
            assert len(sock.recv(32, socket.MSG_WAITALL)) == 32
            try:
                sock.sendall(payload)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(100) == b""
            except OSError:                                     # the hub has hung up already
                pass
    sock = socket.create_connection((host, int(port)), timeout=5)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()                                                # a reset
    with pytest.raises((PermissionError, ConnectionError)):
        small_ray._connect((host, int(port)), b"a wrong key")
    assert small_ray.get(small_ray.remote(lambda: 1).remote()) == 1
    assert not (tmp_path / "exploded").exists()


DRIVER = f"""
import sys, os, time, subprocess
sys.path.insert(0, {str(HERE)!r})
import actors as ray
ray.init(num_cpus=2)

@ray.remote
class Actor:
    def start(self): self.child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    def hang(self): time.sleep(1000)

@ray.remote
def busy():
    print("busy")
    while True: pass

actor, large = Actor.remote(), ray.put(bytes(10_000_000))
ray.get(actor.start.remote())
refs = [actor.hang.remote(), *[busy.remote() for _ in range(3)]]
print("up", flush=True)
"""


def descendants(root):
    children, found, stack = {}, [], [root]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
    while stack:
        below = children.get(stack.pop(), [])
        found += below
        stack += below
    return found


@pytest.mark.parametrize("end", ["ray.shutdown()", "1 / 0", "os._exit(1)", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_outlives_the_driver(end):
    before = set(os.listdir("/dev/shm"))
    code = DRIVER + ("time.sleep(1000)" if end.startswith("SIG") else f"time.sleep(0.5)\n{end}")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
        assert driver.stdout.readline() == b"up\n"
        eventually(lambda: len(descendants(driver.pid)) >= 5)   # the hub, an actor, its child, two busy workers
        below = descendants(driver.pid)
        if end.startswith("SIG"):
            driver.send_signal(getattr(signal, end))
        driver.wait(15)
    eventually(lambda: not any(map(alive, below)), seconds=5)
    assert set(os.listdir("/dev/shm")) == before


def start_and_end(times):
    small_ray.shutdown()

    def use():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), threading.active_count(), pages

    def cycle():
        small_ray.init(num_cpus=1)
        assert small_ray.get(small_ray.put(np.ones(100_000))).sum() == 100_000
        small_ray.shutdown()

    for _ in range(5):
        cycle()
    gc.collect()
    before = use()
    for _ in range(times):
        cycle()
    gc.collect()
    after = use()
    assert after[:2] == before[:2] and after[2] - before[2] < 2000      # descriptors, threads; 8 MB


def test_start_and_end_leak_nothing():
    start_and_end(15)


@pytest.mark.slow
def test_start_and_end_two_hundred_times():
    start_and_end(200)


def test_logs_reach_the_drivers_stderr_with_a_prefix():
    code = f"""
import sys, time; sys.path.insert(0, {str(HERE)!r})
import actors as ray
@ray.remote
def talk():
    print("one"); print("two", end="", flush=True); time.sleep(0.2); print(" more"); print("three", file=sys.stderr)
@ray.remote
class Parrot:
    def say(self): print("hello")
ray.get(talk.remote()); parrot = Parrot.remote(); ray.get(parrot.say.remote())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    lines = [re.sub(r"pid=\d+", "pid=N", line) for line in done.stderr.splitlines()]
    assert done.stdout == "" and lines == ["(talk pid=N) one", "(talk pid=N) two more", "(talk pid=N) three",
                                           "(Parrot pid=N) hello"]


def test_ctrl_c_leaves_a_session_that_works(small):
    @small.remote
    def slow():
        time.sleep(1)
        return 1

    def interrupt(seconds, action):
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            action()
            time.sleep(5)
        timer.join()

    ref = slow.remote()
    interrupt(0.3, lambda: small.get(ref))
    assert small.get(ref) == 1
    for _ in range(10):                                         # in the middle of messages
        interrupt(0.02, lambda: [small.put(b"x" * 50_000) for _ in range(2000)])
    assert small.get(slow.remote()) == 1


def test_ten_thousand_tasks_and_a_hundred_thousand_calls(small):
    @small.remote
    def f(i):
        return i

    @small.remote
    class Counter:
        def __init__(self):
            self.count = 0

        def add(self):
            self.count += 1
            return self.count

    assert small.get([f.remote(i) for i in range(10_000)]) == list(range(10_000))
    counter = Counter.remote()
    for k in range(10):
        assert small.get([counter.add.remote() for _ in range(10_000)])[-1] == 10_000 * (k + 1)


def test_fifty_actors(small):
    @small.remote
    class Actor:
        def f(self, x):
            return x

    actors = [Actor.remote() for _ in range(50)]
    for _ in range(5):
        assert small.get([actor.f.remote(i) for i, actor in enumerate(actors)], timeout=60) == list(range(50))


def test_objects_of_every_size(small):
    @small.remote
    def look(x):
        return len(x), int(x[:1].sum())

    for size in (0, 1, 99_000, 100_000, 101_000, 1 << 20, 10 << 20, 100 << 20):
        assert small.get(look.remote(np.ones(size, np.uint8))) == (size, min(size, 1))


@pytest.mark.slow
def test_an_object_of_a_gigabyte():
    small_ray.shutdown()
    with small_ray.init(object_store_memory=3 << 30):
        array = np.arange(1 << 27)
        assert small_ray.get(small_ray.remote(lambda x: int(x[-1])).remote(array)) == (1 << 27) - 1
        assert (small_ray.get(small_ray.put(array)) == array).all()


def test_threads_share_one_client(small):
    @small.remote
    def f(i):
        return i

    wrong = []

    def work(base):
        for i in range(200):
            if small_ray.get(f.remote(base + i)) != base + i:
                wrong.append(base + i)

    threads = [threading.Thread(target=work, args=(1000 * t,)) for t in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not wrong


def test_shutdown_does_not_wait_for_threads_and_forks_of_the_driver(small):
    refs = [small.remote(lambda: time.sleep(1000)).remote()]
    threads = [threading.Thread(target=pytest.raises, args=(small.exceptions.RaySystemError, small.get, refs))]
    threads[0].start()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
    child.start()
    begin = time.monotonic()
    small.shutdown()
    assert time.monotonic() - begin < 5
    threads[0].join(5)
    child.kill()
    child.join()
    assert not threads[0].is_alive()


def test_when_the_hub_dies_everything_says_so_and_nothing_stays(small):
    @small.remote
    class Actor:
        def start(self):
            self.child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            return self.child.pid

        def hang(self):
            time.sleep(1000)

    async def main():
        os.kill(small_ray._session.process.pid, signal.SIGTERM)
        await actor.hang.remote()

    actor = Actor.remote()
    child = small.get(actor.start.remote())
    with pytest.raises(small.exceptions.RaySystemError):
        asyncio.run(asyncio.wait_for(main(), 10))
    with pytest.raises(small.exceptions.RaySystemError):
        for _ in range(1000):
            actor.hang.remote()
    with pytest.raises(small.exceptions.RaySystemError):
        small.get(small.put(1))
    eventually(lambda: not alive(child))


def test_what_an_actor_started_ends_with_it(small):
    @small.remote
    class Actor:
        def start(self):
            self.child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            return self.child.pid

    actor = Actor.remote()
    child = small.get(actor.start.remote())
    small.kill(actor)
    eventually(lambda: not alive(child))


def test_get_if_exists_makes_one_actor_however_many_ask(small):
    @small.remote(num_cpus=0)
    class Actor:
        def pid(self):
            return os.getpid()

    @small.remote(num_cpus=0)
    def ask(i):
        return small_ray.get(Actor.options(name=f"n{i}", get_if_exists=True, lifetime="detached").remote().pid.remote())

    for i in range(3):
        assert len(set(small.get([ask.remote(i) for _ in range(10)], timeout=30))) == 1


def test_memory_of_failed_and_interrupted_work_comes_back(small):
    @small.remote(num_returns=2)
    def half_packable():
        return np.ones(60 << 20, np.uint8), threading.Lock()

    @small.remote
    def fail():
        raise ValueError

    full, large = free_memory(), np.ones(60 << 20, np.uint8)
    for _ in range(8):
        with pytest.raises(TypeError):
            small.get(half_packable.remote())
    interrupted = 0
    for _ in range(8):
        timer = threading.Timer(random.random() * 0.05, os.kill, (os.getpid(), signal.SIGINT))
        end = time.monotonic() + 3
        try:
            timer.start()
            while time.monotonic() < end:                       # Python drops an interrupt that finds it in a finaliser
                small.put(large)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
    assert interrupted > 3
    gc.disable()                                                # no help from the collector of cycles
    try:
        for _ in range(8):
            with pytest.raises(ValueError):
                small.get([small.put(large), fail.remote()])
    finally:
        gc.enable()
    eventually(lambda: free_memory() == full)


def test_a_task_that_closes_stdout_harms_no_other(small):
    def close():
        sys.stdout.close()

    for _ in range(8):
        small.get(small.remote(close).remote())
    assert small.get([small.remote(lambda: 1).remote() for _ in range(20)]) == [1] * 20


def test_wait_for_nothing_returns_at_once(small):
    assert small.wait([]) == ([], [])


def test_threads_of_a_task_lend_its_cpu(small):
    @small.remote(num_cpus=4)
    def outer():
        result = []
        thread = threading.Thread(target=lambda: result.append(small_ray.get(small_ray.remote(lambda: 5).remote())))
        thread.start()
        thread.join()
        return result
    assert small.get(outer.remote(), timeout=60) == [5]


def test_bundles_of_a_dead_node_are_placed_again(cluster):
    node = cluster.add_node(num_cpus=2)
    group = small_ray.util.placement_group([{"CPU": 2}])
    strategy = small_ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group)

    @small_ray.remote(num_cpus=2, scheduling_strategy=strategy)
    def where():
        return small_ray.get_runtime_context().get_node_id()

    assert small_ray.get(where.remote(), timeout=60) == node.node_id
    other = cluster.add_node(num_cpus=2)
    cluster.remove_node(node)
    assert small_ray.get(where.remote(), timeout=60) == other.node_id
    waiting = small_ray.util.placement_group([{"CPU": 2}])
    small_ray.util.remove_placement_group(waiting)
    with pytest.raises(small_ray.exceptions.TaskUnschedulableError, match="removed"):
        small_ray.get(waiting.ready(), timeout=10)


def test_refs_of_an_ended_session_say_so(small):
    ref, view = small.remote(lambda: time.sleep(1000)).remote(), small.get(small.put(np.ones(100_000)))
    small.shutdown()
    small.init(num_cpus=1)
    with pytest.raises(small.exceptions.ObjectLostError, match="session"):
        small.get(ref, timeout=5)
    assert view.sum() == 100_000                                # what was got stays


def test_the_demo_of_actors_runs():
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import actors; actors.demo(); "
            "print(len(actors.measure('actors', seconds=0.02, large=1 << 20)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "it runs again" in done.stdout and done.stdout.endswith("\n12\n"), done.stderr


def test_an_event_loop_can_be_used_again_in_the_next_session():
    code = """
import asyncio, os, time, actors as ray
loop = asyncio.new_event_loop()
async def ask():
    return await asyncio.wait_for(ray.remote(lambda: time.sleep(0.2) or 1).remote(), 10)
spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
for _ in range(3):
    ray.init(num_cpus=1)
    print(loop.run_until_complete(ask()))
    ray.shutdown()
    os.close(spare.pop())               # so that the next socket gets a number that was taken
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n1\n1\n", done.stdout + done.stderr


def test_what_is_over_does_not_start_when_its_arguments_come(small):
    @small.remote
    def slow():
        time.sleep(0.3)
        return 1

    @small.remote
    def f(*values):
        return values

    @small.remote
    class Actor:
        def f(self, *values):
            return values

    late, actor = slow.remote(), Actor.remote()
    cancelled, killed = f.remote(late, small.put(2)), actor.f.remote(late, small.put(2))
    small.cancel(cancelled)
    small.kill(actor)                                           # the second argument of both is freed now
    with pytest.raises(small.exceptions.TaskCancelledError):
        small.get(cancelled, timeout=10)
    with pytest.raises(small.exceptions.ActorDiedError):
        small.get(killed, timeout=10)
    assert small.get(late, timeout=10) == 1 and small.get(f.remote(3), timeout=10) == (3,)


def test_a_long_chain_of_failures_ends_with_the_first_cause(small):
    @small.remote
    def fail():
        time.sleep(0.3)
        raise KeyError("lost")

    @small.remote
    def use(x):
        return x

    @small.remote
    class Actor:
        def use(self, x):
            return x

    actor = Actor.remote()
    for link in (use, actor.use):
        ref = fail.remote()
        for _ in range(1000):
            ref = link.remote(ref)
        with pytest.raises(KeyError, match="lost"):
            small.get(ref, timeout=30)
    assert small.get(use.remote(1), timeout=10) == 1


def test_a_cancelled_task_leaves_the_actors_that_it_made(small):
    @small.remote(num_cpus=4)
    class Actor:
        def f(self):
            return 1

    @small.remote
    def make():
        actor = Actor.options(name="waits for four CPUs", lifetime="detached").remote()
        while actor:
            time.sleep(0.01)

    def named():
        try:
            return small.get_actor("waits for four CPUs")
        except ValueError:
            return None

    ref = make.remote()
    eventually(named)
    actor = named()
    small.cancel(ref)
    with pytest.raises(small.exceptions.TaskCancelledError):
        small.get(ref, timeout=10)
    assert small.get(actor.f.remote(), timeout=10) == 1
    small.kill(actor)


def test_more_workers_than_the_soft_limit_of_descriptors():
    code = f"""
import resource, sys; sys.path.insert(0, {str(HERE)!r})
import actors as ray
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
ray.init(num_cpus=1)
@ray.remote
class Actor:
    def f(self): return 1
actors = [Actor.remote() for _ in range(40)]
print(sum(ray.get([actor.f.remote() for actor in actors])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "40\n", done.stderr


def test_a_worker_of_another_node_is_heard_to_the_end(cluster):
    """What it says and prints before it dies comes before the news of its death: both go through its node."""
    node = cluster.add_node(num_cpus=2)

    @small_ray.remote(num_cpus=0, scheduling_strategy=on(node))
    class Actor:
        def work(self):
            return os.getpid()

        def leave(self):
            small_ray.actor.exit_actor()

    for _ in range(10):
        actor = Actor.remote()
        refs, last = [actor.work.remote() for _ in range(50)], actor.leave.remote()
        assert len(set(small_ray.get(refs, timeout=20))) == 1
        with pytest.raises(small_ray.exceptions.ActorDiedError):
            small_ray.get(last, timeout=20)


def test_a_node_joins_by_command(cluster):
    command = [sys.executable, str(HERE / "actors.py"), "node", cluster.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as node:
        with node.stdin:
            node.stdin.write(cluster.key + "\n")
        try:
            assert node.stdout.readline() == "ready\n"
            eventually(lambda: len(small_ray.nodes()) == 2)
        finally:
            cluster.shutdown()                                  # the node ends when the hub does
        assert node.wait(10) == 0


def test_a_node_that_cannot_join_says_why_in_a_sentence(cluster, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = "127.0.0.1:%d" % free.getsockname()[1]             # when this is closed, that is
    with pytest.raises(PermissionError):
        small_ray._connect(("127.0.0.1", int(cluster.address.split(":")[1])), b"other")
    for address, key, code, words in (
            (None, b"", 2, "which HOST:PORT"), ("foo", b"", 2, "not 'foo'"), ("foo:", b"", 2, "not 'foo:'"),
            (":80", b"", 2, "not ':80'"), ("localhost:99999", b"", 2, "not 'localhost:99999'"),
            ("localhost:0", b"", 2, "which HOST:PORT"), (nobody, b"", 2, "the key of the Cluster"),
            (nobody, b"no hex\n", 2, "the key of the Cluster"), (nobody, b"\xff\xfe\n", 2, "the key of the Cluster"),
            (nobody, b"abc\n", 2, "the key of the Cluster"), (nobody, b"ab\n", 1, f"no hub answers at {nobody}:"),
            ("a" * 64 + ".x:80", b"ab\n", 1, "error: no hub answers at aaa"),
            (cluster.address, b"ab\n", 1, f"error: the hub at {cluster.address} refused the key")):
        monkeypatch.setattr(sys, "argv", ["actors.py", "node", *([address] if address else [])])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(key)))
        with pytest.raises(SystemExit) as caught:
            small_ray.main()
        said = capsys.readouterr().err if code == 2 else caught.value.code      # which Python prints, and exits with 1
        assert words in said and (caught.value.code == 2) == (code == 2)
    assert len(small_ray.nodes()) == 1


def test_hello_in_pieces_is_heard(cluster):
    """64 bytes of proof that come one by one are as good as those that come at once; so is a config in pieces."""
    host, port = cluster.address.split(":")
    key = bytes.fromhex(cluster.key)
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        theirs, mine = sock.recv(32, socket.MSG_WAITALL), os.urandom(32)
        for byte in mine + small_ray._proof(key, b"client", theirs, mine):
            sock.sendall(bytes([byte]))
            time.sleep(0.001)
        assert sock.recv(32, socket.MSG_WAITALL) == small_ray._proof(key, b"hub", mine, theirs)
        config = small_ray.frame({"node": "f" * 56, "resources": {"CPU": 10_000}, "store": 1 << 20})
        for start in range(0, len(config), 20):
            sock.sendall(config[start:start + 20])
            time.sleep(0.001)
        eventually(lambda: "f" * 56 in [node["NodeID"] for node in small_ray.nodes()])
    eventually(lambda: len(small_ray.nodes()) == 1)
    assert small_ray.get(small_ray.remote(lambda: 1).remote(), timeout=20) == 1


def test_a_question_that_makes_no_sense_is_the_askers_problem(small):
    with pytest.raises(TypeError):
        small.get_actor(["no", "name"])
    assert small.get(small.remote(lambda: 1).remote(), timeout=10) == 1


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_in_whatever_order_all_comes_back(small, seed):
    """Two seconds of random calls, crashes, restarts, kills and cancels: the hub lives, and nothing is held then."""
    dice = random.Random(seed)

    @small.remote
    def work(*values):
        time.sleep(0.005)
        return values[:1]

    @small.remote(num_returns=2)
    def large(*values):
        return np.ones(200_000), [small_ray.put(np.ones(100_000))]

    @small.remote(max_retries=1)
    def crash(*values):
        os._exit(1)

    @small.remote(num_cpus=0)
    def nested(values):
        return small_ray.get(work.remote(values[0]))

    @small.remote(max_restarts=1, max_task_retries=1)
    class Actor:
        def __init__(self, *values):
            self.values = values

        def call(self, *values):
            if not values:
                os._exit(1)
            return values

    full, refs, actors = small.available_resources(), [small.put(0)], [Actor.remote()]

    def act(ref, actor):
        dice.choice([
            lambda: refs.append(work.remote(ref, dice.choice(refs))), lambda: refs.extend(large.remote(ref)),
            lambda: refs.append(crash.remote(ref)), lambda: refs.append(nested.remote([ref])),
            lambda: refs.append(small.put([ref, np.ones(dice.choice([1, 100_000]))])),
            lambda: refs.append(actor.call.remote(ref)), lambda: refs.append(actor.call.remote()),
            lambda: actors.__setitem__(0, Actor.remote(ref)), lambda: actors.append(Actor.remote(ref)),
            lambda: actors.__setitem__(0, Actor.options(name=f"{seed}", get_if_exists=True).remote(ref)),
            lambda: small.kill(actor, no_restart=dice.random() < 0.5),
            lambda: small.cancel(ref, force=dice.random() < 0.5), lambda: small.get(ref, timeout=0.02)])()

    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            act(dice.choice(refs), dice.choice(actors))
        except small.exceptions.RaySystemError:                 # the hub is gone
            raise
        except (small.exceptions.RayError, ValueError):
            pass
        del refs[:max(0, len(refs) - 40)], actors[:max(0, len(actors) - 3)]
    refs.clear(), actors.clear()
    eventually(lambda: gc.collect() >= 0 and small.get(nested.remote([0]), timeout=20) == (0,)
               and small.available_resources() == full)


def test_an_actor_that_is_there_needs_no_arguments(small):
    @small.remote
    class Actor:
        def __init__(self, value):
            self.value = value

        def get(self):
            return self.value

    actor = Actor.options(name="one", get_if_exists=True).remote(1)
    again = Actor.options(name="one", get_if_exists=True).remote(threading.Lock())
    assert again == actor and small.get(again.get.remote()) == 1
    with pytest.raises(TypeError, match="argument 0, of type lock"):
        Actor.options(name="two", get_if_exists=True).remote(threading.Lock())
    with pytest.raises(ValueError, match="two"):
        small.get_actor("two")


# --- kernels.py ------------------------------------------------------------------------------------------------------

LENGTHS = [1, 7, 63, 64, 65, 200]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape)).to(dtype)


def ends(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def relative(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item() if bool(torch.isfinite(a).all()) else math.inf


def run(function, *inputs):
    """Outputs, and gradients for arbitrary upstream gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    seeds = [randn(*y.shape, seed=7, dtype=torch.float64).to(y.dtype) for y in out]
    return list(out), list(torch.autograd.grad(out, inputs, seeds))


def errors(kernel, reference, *inputs, wide=torch.float64):
    """[forward, gradients]: the worst against a reference on the same numbers in a wider type."""
    ours, theirs = run(kernel, *inputs), run(reference, *(x.to(wide) for x in inputs))
    return [max(map(relative, a, b)) for a, b in zip(ours, theirs)]


def qkv(heads, kv, dim, lengths, key_lengths=None, dtype=torch.float32):
    n, m = sum(lengths), sum(key_lengths or lengths)
    return randn(n, heads, dim, dtype=dtype), *(randn(m, kv, dim, seed=i, dtype=dtype) for i in (1, 2))


def paged(batch, heads, kv, dim, page, lengths, dtype=torch.float32):
    """Inputs of paged_attention; pages are shuffled, and what no sequence owns is NaN."""
    width = max(1, -(-max(lengths) // page))
    order = np.random.default_rng(3).permutation(batch * width + 3)
    table = torch.full((batch, width), 10**6, dtype=torch.int32)        # an entry beyond the length points nowhere
    cache = torch.full((2, batch * width + 3, page, kv, dim), math.nan, dtype=dtype)
    for i, n in enumerate(lengths):
        for j in range(-(-n // page)):
            table[i, j] = int(order[i * width + j])
            used = min(page, n - j * page)
            cache[:, table[i, j], :used] = randn(2, used, kv, dim, seed=5 + i + 99 * j, dtype=dtype)
    return randn(batch, heads, dim, dtype=dtype), cache[0], cache[1], table, torch.tensor(lengths, dtype=torch.int32)


def plain_logprobs(hidden, weight, targets, temperature=1.0, vocab=None):
    """What linear_cross_entropy means, by autograd on whole logits."""
    logp = ((hidden @ weight.T)[:, :vocab] / temperature).log_softmax(-1)
    live = targets >= 0
    return logp.gather(1, targets.clamp(min=0)[:, None])[:, 0] * live, -(logp.exp() * logp).sum(-1) * live


# The interpreter is chosen when kernels are defined, so all that is interpreted runs in one child process. Each
# function yields (what, error, bound), and is asserted by the test of its name.

def interpreted_attention(dtype=torch.float32, bounds=(1e-6, 1e-5)):
    cases = [(64, 4, 2, LENGTHS, None, True), (128, 8, 1, [65, 0, 7], None, True), (80, 9, 3, [63, 70], None, True),
             (96, 4, 4, [1, 64], None, False), (256, 4, 1, [65], None, True),
             (64, 2, 1, [70, 1, 200], [131, 64, 7], True), (64, 2, 2, [5, 40, 0], [0, 33, 9], False)]
    if dtype == torch.float32:
        cases.append((64, 2, 1, [1000], None, True))
    for dim, heads, kv, lq, lk, causal in cases:
        q_ends, k_ends = ends(lq), ends(lk or lq)
        pair = errors(lambda q, k, v, a=q_ends, b=k_ends, c=causal: K.flash_attention(q, k, v, a, b, causal=c),
                      lambda q, k, v, a=q_ends, b=k_ends, c=causal: K.flash_attention_reference(q, k, v, a, b, c),
                      *qkv(heads, kv, dim, lq, lk, dtype))
        for what, error, bound in zip(("forward", "gradient"), pair, bounds):
            yield f"{dim} {heads}/{kv} {lq} {lk} {what}", error, bound


def interpreted_covered():
    """What is not zeroed first is written, all of it: also by sequences without queries or without keys."""
    def poisoned(x, **settings):
        return torch.full_like(x, math.nan, **settings)

    empty = torch.Tensor.new_empty
    def nothing(x, *shape, **settings):                         # the interpreter's own name no dtype
        return empty(x, *shape, **settings).fill_(math.nan) if settings.get("dtype") else empty(x, *shape, **settings)

    for lq, lk, causal in (([70, 0, 33, 128], None, True), ([5, 40, 0], [0, 33, 9], False), ([70, 3], [31, 64], True)):
        inputs, call = qkv(4, 2, 64, lq, lk), partial(K.flash_attention, causal=causal)
        want = run(lambda *x: call(*x, ends(lq), ends(lk or lq)), *inputs)                              # noqa: B023
        with mock.patch.object(torch, "empty_like", poisoned), mock.patch.object(torch.Tensor, "new_empty", nothing):
            got = run(lambda *x: call(*x, ends(lq), ends(lk or lq), covered=True), *inputs)             # noqa: B023
        for a, b in zip(sum(got, []), sum(want, [])):
            yield f"{lq} {lk}", float(not torch.equal(a, b)), 0


def interpreted_neighbours():
    q, k, v = qkv(4, 2, 64, [50, 77, 90])
    middle = K.flash_attention(q[50:127], k[50:127], v[50:127], ends([77]))
    for x in (q, k, v):
        x[:50] = x[127:] = math.nan
    out, grads = run(lambda q, k, v: K.flash_attention(q, k, v, ends([50, 77, 90])), q, k, v)
    yield "forward", relative(out[0][50:127], middle), 0
    for g in grads:
        yield "gradient is finite", float(not torch.isfinite(g[50:127]).all()), 0


def interpreted_strangers():
    q, k, v = qkv(2, 1, 64, [40])
    out, grads = run(lambda q, k, v: K.flash_attention(q, k, v, ends([30])), q, k, v)
    for x in (*out, *grads):
        yield "tokens of no sequence", x[30:].abs().max().item(), 0
    merged = randn(33, 6, 64)
    parts = merged[:, :4], merged[:, 4:5], merged[:, 5:]
    yield "slices of one matrix", relative(K.flash_attention(*parts, ends([33])), K.flash_attention(
        *(x.contiguous() for x in parts), ends([33]))), 0


def interpreted_columns():
    """What comes as a column of a matrix, or as a transposed one, is taken for what it says."""
    def column(x):
        return torch.stack([x, x.flip(0)], -1)[..., 0]

    q, k, v = qkv(4, 2, 64, [2, 4])
    weight, angles, positions = randn(64), randn(32, 50), torch.tensor([7, 0, 49, 3, 3, 20])
    logits, rows, cache = randn(40, 6), torch.arange(6), paged(2, 4, 2, 64, 16, [40, 3])
    for what, call, inputs in (
            ("flash_attention", lambda *x: K.flash_attention(q, k, v, *x), [ends([2, 4])]),
            ("paged_attention", lambda *x: K.paged_attention(*cache[:3], *x), cache[3:]),
            ("rms_norm", lambda *x: K.rms_norm(q, *x), [weight]),
            ("qkv_rotary", lambda *x: K.qkv_rotary(q.flatten(1), 2, 1, angles.cos().T, angles.sin().T, positions,
                                                   *x)[0], [weight, weight + 1]),
            ("rotary", lambda *x: K.rotary(q, k, angles.cos().T.contiguous(), angles.sin().T.contiguous(), *x)[0],
             [positions]),
            ("tables", lambda *x: K.rotary(q, k, *x, positions)[1], [angles.cos().T, angles.sin().T]),
            ("sample", lambda *x: K.sample(*x, 1.0, 9, 0.9, rows, rows)[1], [logits.T])):
        yield what, relative(call(*map(column, inputs)), call(*(x.contiguous() for x in inputs))), 0
    into = torch.zeros(2, 2, 1, 16, 2, 64)
    for cells, slots in zip(into, (rows, column(rows))):
        K.store_kv(k, v, *cells, slots)
    yield "store_kv", relative(into[1], into[0]), 0


def interpreted_paged(dtype=torch.float32, bound=1e-6):
    for heads, kv, dim, page, lengths in ((9, 3, 80, 16, [1, 7, 64, 65, 200]), (8, 1, 64, 4, [63, 0, 130]),
                                          (4, 4, 128, 256, [1000, 3]), (4, 1, 256, 16, [40]),
                                          (2, 1, 64, 16, [1500, 1])):
        x = paged(len(lengths), heads, kv, dim, page, lengths, dtype)
        want = K.paged_attention_reference(*(y.double() if y.is_floating_point() else y for y in x))
        yield f"{heads}/{kv} {dim} page {page} {lengths}", relative(K.paged_attention(*x), want), bound


def interpreted_rows(dtype=torch.float32, bounds=(1e-6, 1e-5)):
    for width in (128, 576, 2560, 5120):
        x, r, w = (randn(*s, dtype=dtype) for s in ((5, width), (5, width), (width,)))
        for what, kernel, reference, inputs in (
                ("rms_norm", K.rms_norm, K.rms_norm_reference, (x, w)),
                ("residual", lambda x, w, r: K.rms_norm(x, w, 1e-6, r),
                 lambda x, w, r: K.rms_norm_reference(x, w, 1e-6, r.to(x.dtype)), (x, w, r)),
                ("swiglu", K.swiglu, K.swiglu_reference, (randn(2, 3, 2 * width, dtype=dtype),))):
            if what == "residual" and dtype == torch.bfloat16:  # the sum is stored in bf16: like with like
                out = K.rms_norm(x, w, 1e-6, r)
                for a, b in zip(out, K.rms_norm_reference(x, w, 1e-6, r)):
                    yield f"residual {width}", relative(a, b), 4e-3
                continue
            for part, error, bound in zip(("forward", "gradient"), errors(kernel, reference, *inputs), bounds):
                yield f"{what} {width} {part}", error, bound
    merged, w = randn(6, 8, 128, dtype=dtype), randn(128, dtype=dtype)
    pair = errors(K.rms_norm, K.rms_norm_reference, merged[:, 2:5], w)
    for part, error, bound in zip(("forward", "gradient"), pair, bounds):
        yield f"rms_norm of a slice {part}", error, bound
    for heads, kv, dim in ((9, 3, 80), (16, 8, 128), (1, 1, 64)):
        q, k = randn(13, heads + kv, dim, dtype=dtype).split([heads, kv], 1)
        cos, sin, positions = randn(50, dim // 2), randn(50, dim // 2, seed=1), torch.arange(13) * 29 % 50
        pair = errors(lambda q, k: K.rotary(q, k, cos, sin, positions),                                 # noqa: B023
                      lambda q, k: K.rotary_reference(q, k, cos.to(q.dtype), sin.to(q.dtype), positions), q, k)     # noqa: B023
        for part, error, bound in zip(("forward", "gradient"), pair, bounds):
            yield f"rotary {heads}/{kv} {dim} {part}", error, bound
        merged, rest = randn(13, (heads + 2 * kv) * dim, dtype=dtype), (heads, kv, cos, sin, positions)
        for norms in ((), (randn(dim, dtype=dtype), randn(dim, dtype=dtype, seed=1))):
            pair = errors(lambda x, *w: K.qkv_rotary(x, *rest, *w),                                         # noqa: B023
                          lambda x, *w: K.qkv_rotary_reference(x, *rest[:2], *(t.to(x.dtype) for t in rest[2:4]),   # noqa: B023
                                                               positions, *w), merged, *norms)          # noqa: B023
            for part, error, bound in zip(("forward", "gradient"), pair, bounds):
                yield f"qkv_rotary {heads}/{kv} {dim} {len(norms)} norms {part}", error, bound


def interpreted_head(dtype=torch.float32, bounds=(1e-6, 1e-5)):
    for n, vocab, width, temperature, padded in ((70, 600, 80, 0.7, None), (1, 257, 64, 1.0, None),
                                                 (130, 1000, 576, 1.5, 777)):
        hidden, weight = randn(n, width, dtype=dtype), randn(vocab, width, dtype=dtype) * 0.2
        targets = torch.arange(n) * 37 % (padded or vocab)
        targets[3::5] = -100
        pair = errors(lambda h, w: K.linear_cross_entropy(h, w, targets, temperature, vocab_size=padded),      # noqa: B023
                      lambda h, w: plain_logprobs(h, w, targets, temperature, padded), hidden, weight)          # noqa: B023
        for part, error, bound in zip(("forward", "gradient"), pair, bounds):
            yield f"linear_cross_entropy {n} {vocab} {part}", error, bound
        logits = randn(n, vocab, dtype=dtype) * 3
        pair = errors(lambda y: K.cross_entropy(y, targets, temperature),                                       # noqa: B023
                      lambda y: plain_logprobs(y, torch.eye(len(y.T), dtype=y.dtype), targets, temperature),    # noqa: B023
                      logits)
        for part, error, bound in zip(("forward", "gradient"), pair, bounds):
            yield f"cross_entropy {n} {vocab} {part}", error, bound


def interpreted_slices():
    hidden, weight, targets = randn(50, 64), randn(1500, 64) * 0.2, torch.arange(50)
    whole = run(lambda h, w: K.linear_cross_entropy(h, w, targets), hidden, weight)[1]
    K.SLICE_BYTES = 50 * 4 * 512
    parts = run(lambda h, w: K.linear_cross_entropy(h, w, targets), hidden, weight)[1]
    for a, b in zip(whole, parts):
        yield "slices of the vocabulary give the whole gradient", relative(a, b), 1e-6


def sampling_inputs(rows, vocab):
    """Rows with every kind of limit, among them those at the edges."""
    rng = np.random.default_rng(0)
    temperature = torch.from_numpy(rng.uniform(0.3, 1.5, rows)).float()
    top_k, top_p = torch.from_numpy(rng.integers(-1, vocab, rows)), torch.from_numpy(rng.uniform(0.2, 1, rows)).float()
    temperature[:2], top_k[2], top_p[3], top_k[4], top_p[5], top_p[6], top_k[6] = 0, 1, 1e-9, vocab + 5, 1, 1, -1
    return temperature, top_k, top_p, torch.from_numpy(rng.integers(-2**62, 2**62, rows)), torch.arange(rows) * 1000


def interpreted_sampling():
    for dtype, vocab in ((torch.float32, 700), (torch.bfloat16, 3000)):
        logits, settings = randn(12, vocab, dtype=dtype) * 3, sampling_inputs(12, vocab)
        ours, theirs = K.sample(logits, *settings, True), K.sample_reference(logits, *settings)
        yield f"{dtype} tokens", float((ours[0] != theirs[0]).sum()), 0
        yield f"{dtype} logprobs", (ours[1] - theirs[1]).abs().max().item(), 1e-5
        yield f"{dtype} full logprobs", (ours[2] - theirs[2]).abs().max().item(), 1e-5
    ties = torch.zeros(3, 300)
    ties[1, 7] = ties[1, 250] = 2
    ties[2] = -math.inf
    ties[2, 9] = -1e4
    greedy = K.sample(ties, 0.0, -1, 1.0, torch.arange(3), torch.arange(3), True)
    yield "greedy takes the lowest of equals", float((greedy[0] != torch.tensor([0, 7, 9])).sum()), 0


def interpreted_optimizer():
    for dtype in (torch.float32, torch.bfloat16):
        state = [randn(3000, dtype=dtype), randn(3000, seed=1), randn(3000, seed=2), randn(3000, seed=3).square()]
        grad = randn(3000, seed=4, dtype=dtype)
        ours, theirs = [x.clone() for x in state], [x.clone() for x in state]
        K.adamw_step(*ours, grad, 3, 1e-2, weight_decay=0.1, grad_scale=torch.tensor(0.5))
        K.adamw_step_reference(*theirs, grad, 3, 1e-2, (0.9, 0.95), 1e-8, 0.1, 0.5)
        for name, a, b in zip(("param", "master", "m", "v"), ours, theirs):
            yield f"adamw {dtype} {name}", relative(a, b), 1e-6 if a.dtype == torch.float32 else 1e-3
        before, nan = [x.clone() for x in ours], torch.tensor(math.nan)
        K.adamw_step(*ours, grad, 4, 1e-2, grad_scale=nan)
        K.adamw_step_reference(*ours, grad, 4, 1e-2, (0.9, 0.95), 1e-8, 0.1, nan)
        yield f"adamw {dtype} by NaN", float(not all(map(torch.equal, ours, before))), 0
        cache, both = torch.zeros(2, 5, 16, 3, 80, dtype=dtype), randn(7, 6, 80, dtype=dtype)
        slots = torch.tensor([3, -1, 79, 16, 17, 0, 5])
        K.store_kv(both[:, :3], both[:, 3:], cache[0], cache[1], slots)
        want = torch.zeros(80, 6, 80, dtype=dtype)
        want[slots[slots >= 0]] = both[slots >= 0]
        got = torch.cat([cache[0].view(80, 3, 80), cache[1].view(80, 3, 80)], 1)
        yield f"store_kv {dtype}", float(not torch.equal(got, want)), 0


def interpreted_edges():
    """What is masked, spoilt or outside, and what lies oddly in memory; of the references, too."""
    logits, targets = randn(3, 5000), torch.tensor([4100, 4999, -100])
    logits[:, :4100] = -math.inf
    ours = run(lambda y: K.cross_entropy(y, targets), logits)
    theirs = run(lambda y: plain_logprobs(y, torch.eye(900), targets - 4100), logits[:, 4100:])
    for a, b in zip(sum(ours, []), (*theirs[0], F.pad(theirs[1][0], (4100, 0)))):
        yield "words of -inf have no probability", relative(a, b), 1e-5
    spoilt = logits[[0, 0, 0, 0, 2]]
    spoilt[0, 4200], spoilt[1, 4200], spoilt[2] = math.nan, math.inf, -math.inf
    goals = torch.tensor([4100, 4100, 4100, 5000, -100])
    for x in sum(run(lambda y: K.cross_entropy(y, goals), spoilt), []):
        yield "NaN where there is no logprob", float((x.view(5, -1).isnan().any(1) != (goals > 0)).sum()), 0
    words, goals = randn(30, 16), torch.tensor([3, 29, 30])
    for x in sum(run(lambda h: K.linear_cross_entropy(h, words, goals, vocab_size=29), randn(3, 16)), []):
        yield "a target that is padding", float((x.view(3, -1).isnan().any(1) != (goals > 28)).sum()), 0
    row = randn(4, 100)
    row[0, 3], row[1, 3], row[2, 3], row[3] = math.nan, -torch.tensor(math.nan), math.inf, -math.inf
    for x in K.sample(row, 1.0, 5, 0.9, torch.arange(4), torch.arange(4), True)[1:]:
        yield "a spoilt row has no logprob", float((~x.isnan()).sum()), 0
    for hidden, weight in ((randn(3, 20)[:, 2:18], randn(30, 17)[:, 1:]), (randn(3, 18), randn(30, 18))):
        ours, theirs = (run(partial(head, targets=torch.arange(3)), hidden, weight)
                        for head in (K.linear_cross_entropy, plain_logprobs))
        for a, b in zip(sum(ours, []), sum(theirs, [])):
            yield "views that begin anywhere, and any width", relative(a, b), 1e-5
    inputs = qkv(2, 1, 64, [3, 4])
    yield "ends in int64", relative(*(K.flash_attention(*inputs, x) for x in (ends([3, 4]).long(), ends([3, 4])))), 0


def interpreted_bf16():
    """Against fp64 on the same bf16 numbers: what is left is the rounding of results and of probabilities."""
    yield from interpreted_attention(torch.bfloat16, (4e-3, 4e-3))
    yield from interpreted_paged(torch.bfloat16, 4e-3)
    yield from interpreted_rows(torch.bfloat16, (4e-3, 4e-3))
    yield from interpreted_head(torch.bfloat16, (4e-3, 4e-3))


INTERPRETED = ["attention", "covered", "neighbours", "strangers", "columns", "paged", "rows", "head", "slices",
               "sampling", "edges", "optimizer", "bf16"]


def interpret():
    """The child: one line of JSON a function."""
    torch.set_num_threads(1)
    assert K.INTERPRET.value
    for name in INTERPRETED:
        try:
            result = [list(x) for x in globals()["interpreted_" + name]()]
        except Exception:
            result = traceback.format_exc()[-3000:]
        print(json.dumps({name: result}), flush=True)


@pytest.fixture(scope="session")
def interpreted():
    code = f"import {Path(__file__).stem} as tests; tests.interpret()"
    child = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=600,
                           env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    results = {}
    for line in child.stdout.splitlines():
        if line.startswith("{"):
            results |= json.loads(line)
    assert len(results) == len(INTERPRETED), child.stderr[-3000:]
    return results


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernels_equal_their_references(interpreted, name):
    assert isinstance(interpreted[name], list), interpreted[name]
    wrong = [f"{what}: {error:.2e} > {bound:.0e}" for what, error, bound in interpreted[name] if not error <= bound]
    assert interpreted[name] and not wrong, "\n".join(wrong)


def test_references_have_the_edges_of_kernels():
    wrong = [(what, error) for what, error, bound in interpreted_edges() if not error <= bound]
    assert not wrong


# The references themselves, against torch's own operations.

@pytest.mark.parametrize("heads,kv,dim", [(4, 4, 64), (4, 2, 80), (9, 3, 64)])
@pytest.mark.parametrize("lengths,key_lengths,causal", [
    (LENGTHS, None, True), ([5, 64], [9, 200], True), ([7, 30], [40, 3], False)])
def test_attention_reference_is_scaled_dot_product_attention(heads, kv, dim, lengths, key_lengths, causal):
    q, k, v = qkv(heads, kv, dim, lengths, key_lengths, torch.float64)
    a, b = ends(lengths), ends(key_lengths or lengths)
    ours = run(lambda q, k, v: K.flash_attention(q, k, v, a, b, causal=causal), q, k, v)

    def torchs(q, k, v):
        outs = []
        for i in range(len(lengths)):
            x, y, z = (t[e[i]:e[i + 1]].transpose(0, 1) for t, e in ((q, a), (k, b), (v, b)))
            mask = torch.ones(x.shape[1], y.shape[1], dtype=torch.bool).tril(y.shape[1] - x.shape[1])
            y, z = (t.repeat_interleave(heads // kv, 0) for t in (y, z))
            outs.append(F.scaled_dot_product_attention(x, y, z, attn_mask=mask if causal else None).transpose(0, 1))
        return torch.cat(outs)

    for x, y in zip(sum(ours, []), sum(run(torchs, q, k, v), [])):
        assert relative(x, y) < 1e-12


def test_a_query_that_sees_no_key_gives_zero_and_no_gradient():
    q, k, v = qkv(2, 1, 64, [5], [3], torch.float64)
    (out,), grads = run(lambda q, k, v: K.flash_attention(q, k, v, ends([5]), ends([3])), q, k, v)
    assert out[:2].eq(0).all() and grads[0][:2].eq(0).all() and out[2:].ne(0).any()
    assert all(torch.isfinite(g).all() for g in grads)


def test_packed_documents_do_not_see_each_other():
    q, k, v = qkv(4, 2, 64, [50, 77, 90])
    alone = K.flash_attention(q[50:127], k[50:127], v[50:127], ends([77]))
    for x in (q, k, v):
        x[:50] = x[127:] = math.nan
    assert torch.equal(K.flash_attention(q, k, v, ends([50, 77, 90]))[50:127], alone)


@pytest.mark.parametrize("call,sentence", [
    (lambda: K.flash_attention(*qkv(5, 2, 64, [3]), ends([3])), "5 query heads cannot share 2 key heads"),
    (lambda: K.flash_attention(*qkv(2, 2, 65, [3]), ends([3])), "head dim 65"),
    (lambda: K.flash_attention(*qkv(2, 2, 64, [9]), ends([4, 5]), ends([9]), 5, 9), "equally many sequences"),
    (lambda: K.flash_attention(*qkv(2, 2, 64, [9])[:2], qkv(2, 2, 64, [8])[2], ends([9])), "k and v one shape"),
    (lambda: K.paged_attention(*paged(1, 3, 2, 64, 16, [5])), "3 heads of 64 .* 2 of 64"),
    (lambda: K.paged_attention(randn(1, 2, 32), *paged(1, 2, 2, 64, 16, [5])[1:]), "2 heads of 32 .* 2 of 64"),
    (lambda: K.rms_norm(randn(3, 64), randn(32)), "weight must be as wide"),
    (lambda: K.rms_norm(randn(3, 64), randn(64), 1e-6, randn(64)), "residual"),
    (lambda: K.rms_norm(randn(3, 64).bfloat16(), randn(64), 1e-6, randn(3, 64)), "residual"),
    (lambda: K.rotary(randn(3, 2, 33), randn(3, 1, 33), randn(9, 33), randn(9, 33), torch.arange(3)), "head dim 33"),
    (lambda: K.rotary(randn(3, 2, 64), randn(3, 1, 64), randn(9, 16), randn(9, 16), torch.arange(3)), "head dim 64"),
    (lambda: K.swiglu(randn(3, 33)), "33 wide"),
    (lambda: K.linear_cross_entropy(randn(2, 16), randn(5, 8), torch.arange(2)), "16 wide, and weight 8"),
    (lambda: K.linear_cross_entropy(randn(2, 16), randn(5, 16), torch.arange(3)), "3 targets .* 2"),
    (lambda: K.cross_entropy(randn(2, 16), torch.arange(2), 0.0), "temperature 0.0"),
    (lambda: K.linear_cross_entropy(randn(2, 16), randn(5, 16), torch.arange(2), -1.0), "temperature -1.0"),
])
def test_what_does_not_fit_is_refused_with_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_paged_attention_is_attention_over_the_tokens_of_the_pages():
    q, k_cache, v_cache, table, lengths = paged(3, 4, 2, 64, 16, [1, 40, 0], torch.float64)
    out = K.paged_attention(q, k_cache, v_cache, table, lengths)
    assert out[2].eq(0).all()
    for i in (0, 1):
        slots = [int(table[i, t // 16]) * 16 + t % 16 for t in range(int(lengths[i]))]
        x, y = (c.flatten(0, 1)[slots].transpose(0, 1).repeat_interleave(2, 0) for c in (k_cache, v_cache))
        assert relative(out[i], F.scaled_dot_product_attention(q[i][:, None], x, y)[:, 0]) < 1e-12


@pytest.mark.parametrize("width", [128, 576])
def test_rms_norm_and_swiglu_references_are_their_formulas(width):
    x, w, r = (randn(*s, dtype=torch.float64) for s in ((7, width), (width,), (7, width)))

    def norm(x, w):
        return x / ((x * x).sum(-1, keepdim=True) / width + 1e-6).sqrt() * w

    assert max(errors(K.rms_norm, norm, x, w)) < 1e-12
    out, summed = K.rms_norm(x, w, 1e-6, r)
    assert torch.equal(summed, x + r) and relative(out, norm(x + r, w)) < 1e-12
    both = randn(6, 2 * width, dtype=torch.float64)
    assert max(errors(K.swiglu, lambda y: F.silu(y[..., :width]) * y[..., width:], both)) < 1e-12


def test_rotary_turns_as_hugging_face_does():
    q, k = randn(9, 4, 64, dtype=torch.float64), randn(9, 2, 64, dtype=torch.float64)
    angles = torch.outer(torch.arange(40.0).double(), 1e4 ** -torch.linspace(0, 1, 32).double())
    cos, sin, positions = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2), torch.arange(9) * 4

    def half(x):
        return torch.cat([-x[..., 32:], x[..., :32]], -1)

    for x, y in zip((q, k), K.rotary(q, k, cos, sin, positions)):
        assert relative(y, x * cos[positions][:, None] + half(x) * sin[positions][:, None]) < 1e-12


def test_queries_and_keys_are_normalised_head_by_head_before_they_turn():
    x, w = randn(9, 8, 64, dtype=torch.float64), randn(2, 64, dtype=torch.float64)
    tables = randn(40, 32, dtype=torch.float64), randn(40, 32, seed=1, dtype=torch.float64), torch.arange(9) * 4
    q, k, v = K.qkv_rotary(x.flatten(1), 4, 2, *tables, *w, 1e-6)
    want = K.rotary(F.rms_norm(x[:, :4], [64], w[0], 1e-6), F.rms_norm(x[:, 4:6], [64], w[1], 1e-6), *tables)
    assert max(map(relative, (q, k), want)) < 1e-12 and torch.equal(v, x[:, 6:])


@pytest.mark.parametrize("temperature,vocab", [(1.0, None), (0.7, 90)])
def test_logprob_and_entropy_are_those_of_the_softmax_and_both_differentiable(temperature, vocab):
    hidden, weight = randn(20, 16, dtype=torch.float64), randn(100, 16, dtype=torch.float64)
    targets = torch.arange(20) * 7 % 90
    targets[::6] = -100
    ours = run(lambda h, w: K.linear_cross_entropy(h, w, targets, temperature, vocab_size=vocab), hidden, weight)
    theirs = run(lambda h, w: plain_logprobs(h, w, targets, temperature, vocab), hidden, weight)
    for a, b in zip(sum(ours, []), sum(theirs, [])):
        assert relative(a, b) < 1e-12
    logits = (hidden @ weight.T).detach()
    assert relative(-K.cross_entropy(logits, targets, temperature)[0],
                    F.cross_entropy(logits / temperature, targets, reduction="none")) < 1e-12
    assert ours[0][0][::6].eq(0).all() and ours[1][0][::6].eq(0).all() and ours[1][1][vocab or 100:].eq(0).all()


def test_a_logprob_is_never_positive():
    hidden, weight = randn(64, 8) * 40, randn(50, 8)
    best = (hidden @ weight.T).argmax(1)
    logprob, entropy = K.linear_cross_entropy(hidden, weight, best)
    assert logprob.max() <= 0 and logprob.max() > -1e-6 and entropy.min() > -1e-6


def _sharded(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    hidden, weight = randn(20, 16, dtype=torch.float64), randn(102, 16, dtype=torch.float64)
    targets = torch.arange(20) * 7 % 97
    targets[::6] = -100
    mine = weight[51 * rank:51 * rank + 51]
    out, grads = run(lambda h, w: K.linear_cross_entropy(h, w, targets, 0.7, dist.group.WORLD, 97), hidden, mine)
    whole, wants = run(lambda h, w: plain_logprobs(h, w, targets, 0.7, 97), hidden, weight)
    wants[1] = wants[1][51 * rank:51 * rank + 51]
    last = K.linear_cross_entropy(hidden[:3], mine, torch.tensor([60, 97, -100]), 0.7, dist.group.WORLD, 97)[0]
    outside = float(last.isnan().tolist() != [False, True, False])              # of the whole vocabulary
    results.put([outside, *(relative(a, b) for a, b in zip(out + grads, whole + wants))])
    dist.destroy_process_group()


def test_a_vocabulary_sharded_over_two_processes_gives_the_same():
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        children = [context.Process(target=_sharded, args=(rank, f"{folder}/store", results), daemon=True)
                    for rank in range(2)]
        for child in children:
            child.start()
        found = [results.get(timeout=60) for _ in children]
        for child in children:
            child.join(10)
    assert max(map(max, found)) < 1e-12, found


def test_greedy_is_the_lowest_of_the_largest():
    logits = torch.zeros(2, 50)
    logits[1, 9] = logits[1, 30] = 1
    tokens, logprobs, full = K.sample(logits, 0.0, -1, 1.0, torch.arange(2), torch.arange(2), return_full=True)
    assert tokens.tolist() == [0, 9] and logprobs.tolist() == [0, 0]
    assert torch.allclose(full, logits.log_softmax(-1)[[0, 1], tokens])


@pytest.mark.parametrize("temperature,top_k,top_p", [
    (1.0, -1, 1.0), (0.6, -1, 1.0), (1.3, 3, 1.0), (1.0, -1, 0.7), (0.9, 4, 0.8)])
def test_samples_have_the_frequencies_of_the_distribution(temperature, top_k, top_p):
    logits, n = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0, -3.0]), 50_000
    p = (logits / temperature).softmax(0)
    order = p.argsort(descending=True)
    keep = torch.zeros(6, dtype=torch.bool)
    keep[order[:top_k if top_k > 0 else 6]] = True
    p = p * keep / (p * keep).sum()
    keep[order] &= (p[order].cumsum(0) - p[order]) < top_p
    p = p * keep / (p * keep).sum()
    tokens, logprobs = K.sample(logits.expand(n, 6), temperature, top_k, top_p, torch.full((n,), 7), torch.arange(n))
    counts = torch.bincount(tokens, minlength=6).double()
    assert counts[~keep].sum() == 0
    chi = ((counts - n * p) ** 2 / (n * p))[keep].sum()
    assert chi < 26                                     # at most 5 degrees of freedom: one in ten thousand is above
    assert torch.allclose(logprobs, p.log()[tokens], atol=1e-5)


def test_limits_at_their_edges():
    logits, seeds = randn(200, 40) * 2, torch.arange(200)
    for top_k, top_p in ((1, 1.0), (-1, 1e-9), (40, 1e-9), (1, 0.5)):
        tokens, logprobs = K.sample(logits, 1.0, top_k, top_p, seeds, seeds)
        assert torch.equal(tokens, logits.argmax(-1)) and logprobs.abs().max() == 0
    free = K.sample(logits, 1.0, -1, 1.0, seeds, seeds)
    for top_k, top_p in ((40, 1.0), (1000, 1.0), (0, 1.0)):
        assert torch.equal(K.sample(logits, 1.0, top_k, top_p, seeds, seeds)[0], free[0])


def test_a_request_gets_the_same_tokens_in_any_batch():
    logits, settings = randn(12, 300), sampling_inputs(12, 300)
    tokens, logprobs = K.sample(logits, *settings)
    order = torch.tensor([5, 0, 11, 3])
    mixed = torch.cat([logits[order], randn(3, 300, seed=8)])
    again = K.sample(mixed, *(torch.cat([x[order], x[:3]]) for x in settings))
    assert torch.equal(again[0][:4], tokens[order]) and torch.equal(again[1][:4], logprobs[order])
    alone = K.sample(logits[3:4], *(x[3:4] for x in settings))
    assert alone[0] == tokens[3]
    moved = K.sample(logits, *settings[:4], settings[4] + 1)[0]
    assert (moved != tokens).sum() >= 3                 # another position is another draw


def test_the_full_logprob_is_that_of_the_whole_distribution():
    logits, settings = randn(30, 100), sampling_inputs(30, 100)
    tokens, _, full = K.sample(logits, *settings, return_full=True)
    heat = torch.where(settings[0] == 0, 1, settings[0])
    assert torch.allclose(full, (logits / heat[:, None]).log_softmax(-1).gather(1, tokens[:, None])[:, 0], atol=1e-5)


def test_adamw_is_that_of_torch():
    param = torch.nn.Parameter(randn(500, dtype=torch.float64))
    theirs = torch.optim.AdamW([param], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours = [param.detach().clone(), param.detach().clone(), torch.zeros(500).double(), torch.zeros(500).double()]
    for step in range(1, 4):
        param.grad = randn(500, seed=step, dtype=torch.float64)
        theirs.step()
        K.adamw_step(*ours, param.grad, step, 1e-2, weight_decay=0.1)
    assert relative(ours[0], param) < 1e-12 and relative(ours[1], param) < 1e-12


class Hopper:
    """Takes the place of a kernel: a launch compiles it for sm_90 and keeps what the assembler made of it."""
    def __init__(self, kernel, reports):
        self.kernel, self.reports = kernel, reports

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, **named):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
        bound, signature, constants, hints = dict(zip(self.kernel.arg_names, args)) | named, {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = bound[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[i,] = "constexpr", value
            elif hasattr(value, "block_shape"):
                signature[parameter.name] = f"tensordesc<{types[value.base.dtype]}{list(value.block_shape)}>"
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], hints[i,] = "*" + types[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    hints[i,] = [["tt.divisibility", 16]]
        code = triton.compile(ASTSource(self.kernel, signature, constants, hints), target=GPUTarget("cuda", 90, 32),
                              options=dict(num_warps=num_warps, num_stages=num_stages))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(code.asm["cubin"])
            f.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            machine = subprocess.run([tool, "-sass", f.name], capture_output=True, text=True, check=True).stdout
        names = "HGMMA", "UTMALDG", "LDL", "STL"         # matrix product, copy engine, spilled registers
        self.reports[self.kernel.__name__] = {x: len(re.findall(rf"\b{x}", machine)) for x in names}


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_attention_compiles_for_hopper_to_matrix_instructions_without_spills(monkeypatch, dim):
    reports = {}
    for name in ("_attention_forward", "_attention_backward_q", "_attention_backward_kv"):
        monkeypatch.setattr(K, name, Hopper(getattr(K, name), reports))
    monkeypatch.setattr(K, "_on_triton", lambda *x: True)
    q, k, v = (torch.empty(256, h, dim, dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
    out = K.flash_attention(q, k, v, ends([256]), max_seqlen_q=256)
    torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert len(reports) == 3
    for name, counts in reports.items():
        assert counts["HGMMA"] >= 16 and counts["UTMALDG"] > 0, (name, counts)
        # dk and dv are two accumulators: at dim 128 Triton 3.6 spills 7 words (a tile without any is 1.5% slower), at
        # dim 256 the assembler of 3.9 spills some more
        allowed = {128: 14, 256: 160}.get(dim, 0) if name.endswith("kv") else 0
        assert counts["LDL"] + counts["STL"] <= allowed, (name, counts)


@gpu
def test_backward_is_bit_equal_from_run_to_run():
    def twice(function, *inputs):
        inputs = [x.cuda().bfloat16().requires_grad_() for x in inputs]
        out = function(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        seeds = [torch.randn_like(y) for y in out]
        first, second = (torch.autograd.grad(out, inputs, seeds, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))

    cu = ends([1, 700, 299]).cuda()
    twice(lambda q, k, v: K.flash_attention(q, k, v, cu), *qkv(8, 2, 128, [1000]))
    twice(K.rms_norm, randn(5000, 1024), randn(1024))
    targets = torch.arange(1000).cuda()
    twice(lambda h, w: K.linear_cross_entropy(h, w, targets), randn(1000, 256), randn(5000, 256))


@gpu
def test_kernels_on_the_gpu_equal_their_references():
    cu = ends(LENGTHS).cuda()
    q, k, v = (x.cuda().bfloat16() for x in qkv(8, 2, 128, LENGTHS))
    want = K.flash_attention_reference(q.float(), k.float(), v.float(), cu, cu)
    assert relative(K.flash_attention(q, k, v, cu), want) < 4e-3
    x, w = randn(100, 2560).cuda().bfloat16(), randn(2560).cuda().bfloat16()
    assert relative(K.rms_norm(x, w), K.rms_norm_reference(x.float(), w.float())) < 4e-3


@pytest.mark.slow
def test_the_demo_checks_every_kernel():
    done = subprocess.run([sys.executable, HERE / "kernels.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "flash_attention" in done.stdout, done.stdout + done.stderr


# --- parallel.py -----------------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64)


def small_config(**overrides):
    return P.Config(**SMALL | overrides)


def documents(seed, lengths, vocab=101, targets=True):
    """Packed random documents; the target of a document's last token, and of every fifth token, is ignored."""
    generator, total = torch.Generator().manual_seed(seed), sum(lengths)
    tokens, ends = torch.randint(vocab, (total,), generator=generator), torch.tensor([0, *lengths]).cumsum(0)
    goals = tokens.roll(-1)
    goals[ends[1:] - 1], goals[::5] = -100, -100
    return {"tokens": tokens, "positions": torch.cat([torch.arange(n) for n in lengths]), "cu_seqlens": ends.int(),
            "targets": goals if targets else torch.full_like(goals, -100)}


def dealt(dp, micro=5):
    """The micro-batches of each replica, unevenly: with dp > 1 the last one has fewer, and no target at all."""
    whole = [documents(i, [5 + i % 3, 1, 9 - i % 4, 2 + i], targets=dp == 1 or i % dp < dp - 1) for i in range(micro)]
    return [whole[i::dp] for i in range(dp)]


def perturb(model):
    """Everything random, norms and biases too, and the same on every layout."""
    def noise(i, spec):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        return 1 + 0.3 * x if "norm" in spec.name else 0.3 * x
    model.load_hf((spec.name, noise(i, spec)) for i, spec in enumerate(model.specs))
    return model


def make_loss(batches):
    count = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
    def loss(model, hidden, batch):
        if model.value_head:
            total = ((model.value(hidden) - 0.3) ** 2 * (batch["targets"] >= 0)).sum() / count
        else:
            logprob, entropy = model.logprobs(hidden, batch["targets"], temperature=0.9)
            total = -(logprob.sum() + 0.1 * entropy.sum()) / count
        return total, total.item()
    return loss


def gradients(model):
    """The gradients after a run, by Hugging Face name."""
    return {name: x.clone() for name, x in model.hf_tensors([bucket.shard_total for bucket in model.buckets])}


def parameters(model):
    return {name: x.clone() for name, x in model.hf_tensors()}


def distance(ours, theirs):
    """The largest difference, relative to the largest of the tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[x] - theirs[x]).abs().max() / theirs[x].abs().max().clamp(min=1e-30)) for x in theirs)


def sgd(model, norm, lr=0.1, clip=0.3):
    lr *= min(1, clip / norm)                                           # gradients are clipped by the norm of all
    for bucket in model.buckets:
        bucket.flat[bucket.shard] -= lr * bucket.shard_total
        if model.mesh.dp > 1:
            bucket.gather(bucket.flat, bucket.flat[bucket.shard]).wait()


def train_steps(config, mesh, steps, dp, schedule="1f1b", **settings):
    """Loss, norm and gradients of the first step; and the parameters after some steps of SGD with clipping."""
    model = perturb(P.Qwen3(config, mesh, dtype=torch.float64, **settings))
    optimizer, data = P.AdamW(model), dealt(dp)
    loss = make_loss(sum(data, []))
    mine = data[mesh.dp_rank] if mesh.dp > 1 else sum(data, [])
    results = P.run(model, mine, loss, schedule)
    norm, grads = optimizer.grad_norm().item(), gradients(model)
    for step in range(steps):
        if step:
            P.run(model, mine, loss, schedule)
        sgd(model, optimizer.grad_norm().item())
    return sum(results), norm, grads, parameters(model)


def compare_layouts(cases, steps):
    """For each case (config, layout, settings) the largest error of gradients, norm and SGD against one process."""
    found, alone = [], {}
    for overrides, layout, settings in cases:
        config, mesh = small_config(**overrides), P.init(*layout)
        known = str((overrides, mesh.dp, settings.get("value_head")))
        if known not in alone:
            alone[known] = train_steps(config, P.Mesh(device="cpu"), steps, mesh.dp,
                                       value_head=settings.get("value_head", False))
        loss, norm, grads, after = train_steps(config, mesh, steps, mesh.dp, **settings)
        wanted_loss, wanted_norm, wanted, wanted_after = alone[known]
        total = torch.tensor([loss / mesh.tp], dtype=torch.float64)
        dist.all_reduce(total)
        found.append((str((overrides, layout, settings)), abs(total.item() - wanted_loss) / abs(wanted_loss),
                      abs(norm - wanted_norm) / wanted_norm, distance(grads, wanted), distance(after, wanted_after)))
    return found


QWEN2 = dict(model_type="qwen2", qk_norm=False, attention_bias=True, tie_word_embeddings=False)
LLAMA = dict(model_type="llama", qk_norm=False, attention_bias=True, num_attention_heads=6, num_key_value_heads=2,
             intermediate_size=36, hidden_size=48)
ON_TWO = [({}, (1, 1, 2), {}), ({}, (1, 1, 2), dict(sequence_parallel=False)), (QWEN2, (1, 1, 2), {}),
          (LLAMA, (1, 1, 2), {}), ({}, (1, 1, 2), dict(value_head=True)), ({}, (1, 1, 2), dict(recompute=True)),
          ({}, (1, 2, 1), {}), ({}, (1, 2, 1), dict(schedule="afab")), ({}, (1, 2, 1), dict(chunks=2)),
          (QWEN2, (1, 2, 1), {}), ({}, (1, 2, 1), dict(value_head=True)), ({}, (2, 1, 1), {}), (QWEN2, (2, 1, 1), {})]
ON_FOUR = [({}, (1, 1, 4), {}), ({}, (1, 1, 4), dict(sequence_parallel=False)), ({}, (1, 4, 1), {}),
           ({}, (1, 4, 1), dict(schedule="afab")), (dict(num_hidden_layers=9), (1, 4, 1), dict(chunks=2)),
           ({}, (2, 2, 1), {}), ({}, (2, 1, 2), {}), ({}, (1, 2, 2), dict(chunks=2, recompute=True)),
           ({}, (4, 1, 1), {}),
           (dict(QWEN2, tie_word_embeddings=True), (1, 1, 4), {})]


@pytest.mark.parametrize("world,cases,steps", [(2, ON_TWO, 2), (4, ON_FOUR, 2), (8, [({}, (2, 2, 2), {})], 5)])
def test_every_layout_computes_what_one_process_does(world, cases, steps):
    for ranks in zip(*on_ranks(world, compare_layouts, cases, steps)):
        for case, *errors in ranks:
            assert max(errors) < 1e-12, (case, errors)          # fp64: sums in another order


def _tied(steps):
    mesh = P.init(pp=2)
    model = perturb(P.Qwen3(small_config(), mesh, dtype=torch.float64))
    optimizer, data = P.AdamW(model, lr=1e-2, clip=0.1), dealt(1)[0]
    norms = [(P.run(model, data, make_loss(data)), optimizer.step().item())[1] for _ in range(steps)]
    words = model.embed if mesh.pp_rank == 0 else model.head_weight
    return words.detach().clone(), norms


def test_tied_embeddings_of_two_stages_stay_bit_equal():
    (first, norms), (last, others) = on_ranks(2, _tied, 10)
    assert torch.equal(first, last) and norms == others and not torch.equal(first, perturb(P.Qwen3(
        small_config(), P.Mesh(device="cpu"), dtype=torch.float64)).embed)


def _schedules():
    found = []
    for settings in (dict(), dict(schedule="afab"), dict(chunks=2), dict(chunks=2, schedule="afab")):
        found.append(train_steps(small_config(), P.init(pp=2), 1, 1, **settings)[2])
    return found


def test_schedules_agree_bit_for_bit():
    for first, *others in on_ranks(2, _schedules):
        assert all(torch.equal(other[name], first[name]) for other in others for name in first)


def play(pp, chunks, micro, schedule):
    """Play a schedule: every rank in order, messages by links that are first in, first out. Returns the operations."""
    todo = [P.program(schedule, pp, rank, chunks, micro) for rank in range(pp)]
    stages, links, at, done = pp * chunks, {}, [0] * pp, set()
    while any(at[rank] < len(todo[rank]) for rank in range(pp)):
        before = len(done)
        for rank in range(pp):
            while at[rank] < len(todo[rank]):
                kind, chunk, m = todo[rank][at[rank]]
                stage = chunk * pp + rank
                source, to = (stage - 1, stage + 1) if kind == "F" else (stage + 1, stage - 1)
                if kind == "B":
                    assert ("F", stage, m) in done
                if 0 <= source < stages:
                    link = links.setdefault((kind, source % pp, rank), [])
                    if not link:
                        break
                    assert link.pop(0) == (stage, m), "a message that is not the one that is awaited"
                if 0 <= to < stages:
                    links.setdefault((kind, rank, to % pp), []).append((to, m))
                done.add((kind, stage, m))
                at[rank] += 1
        assert len(done) > before, "every rank waits for another"
    return done


@pytest.mark.parametrize("schedule", ["1f1b", "afab"])
def test_schedules_never_hang_and_their_messages_keep_order(schedule):
    for pp in (1, 2, 3, 4, 8):
        for chunks in (1, 2, 3):
            for micro in range(0, 14):
                assert len(play(pp, chunks, micro, schedule)) == 2 * pp * chunks * micro


def _timed(micro, schedule, forward, backward):
    """The wall time of stages that sleep, and the most activations that each kept."""
    torch.set_num_threads(1)
    mesh, live, most = P.init(pp=4), set(), [0]
    def do_forward(chunk, m, x):
        assert (x is None) == (mesh.pp_rank == 0) and (x is None or x[0] == m)
        live.add(m)
        most[0] = max(most[0], len(live))
        time.sleep(forward)
        return torch.full((4,), float(m))
    def do_backward(chunk, m, dy):
        assert (dy is None) == (mesh.pp_rank == 3) and (dy is None or dy[0] == -m)
        live.remove(m)
        time.sleep(backward)
        return torch.full((4,), -float(m))
    times = []
    for _ in range(3):
        dist.barrier()
        start = time.monotonic()
        P.pipeline(mesh, P.program(schedule, 4, mesh.pp_rank, 1, micro), 4, do_forward, do_backward,
                   lambda m: torch.empty(4))
        dist.barrier()
        times.append(time.monotonic() - start)
    return min(times), most[0]


def test_1f1b_overlaps_stages_and_keeps_few_activations():
    micro, forward, backward = 8, 0.1, 0.2              # seconds, long beside what a busy machine adds
    ranks = on_ranks(4, _timed, micro, "1f1b", forward, backward)
    bubble = 1 - micro * (forward + backward) / min(seconds for seconds, _ in ranks)
    assert abs(bubble / (3 / (micro + 3)) - 1) < 0.1, bubble
    assert [most for _, most in ranks] == [4, 3, 2, 1]                  # not 8
    assert [most for _, most in on_ranks(4, _timed, 3 * micro, "1f1b", 0, 0)] == [4, 3, 2, 1]
    assert [most for _, most in on_ranks(4, _timed, micro, "afab", 0, 0)] == [micro] * 4


TRANSFORMERS = {
    "qwen3 tied": ("Qwen3", dict(tie_word_embeddings=True)),
    "qwen3 with biases": ("Qwen3", dict(tie_word_embeddings=False, attention_bias=True)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=False, num_attention_heads=3, num_key_value_heads=1, hidden_size=24)),
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "llama of SmolLM2's shape": ("Llama", dict(tie_word_embeddings=True, num_attention_heads=9, num_key_value_heads=3,
                                               hidden_size=72)),
    "llama 3 positions": ("Llama", dict(rope_parameters=dict(
        rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32))),
    "llama with biases": ("Llama", dict(attention_bias=True, tie_word_embeddings=False)),
}


def transformers_model(kind, folder, dtype=torch.float32, shard="1GB", **settings):
    import transformers
    values = {k: v for k, v in SMALL.items() if k != "head_dim" or kind == "Qwen3"} | settings
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.3)
            p += 1.0 if "norm" in name else 0.0
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model.eval()


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers' norms are in fp32 whatever the model is in; here, to compare in fp64, in fp64."""
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3
    for kind in (modeling_llama.LlamaRMSNorm, modeling_qwen2.Qwen2RMSNorm, modeling_qwen3.Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", lambda self, x: self.weight * x * torch.rsqrt(
            x.square().mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_equal_those_of_transformers(name, dtype, tolerance, tmp_path, exact_norms):
    kind, settings = TRANSFORMERS[name]
    theirs = transformers_model(kind, tmp_path, dtype, **settings)
    ours = P.Qwen3.from_pretrained(tmp_path, P.Mesh(device="cpu"), dtype=dtype)
    lengths = [11, 1, 30, 7]
    batch = documents(1, lengths)
    with torch.no_grad():
        hidden = ours(batch["tokens"], batch["positions"], P.packed(batch["cu_seqlens"]))
        wanted = torch.cat([theirs(x[None]).logits[0] for x in batch["tokens"].split(lengths)])
    assert (ours.logits(hidden) - wanted).abs().max() < tolerance * wanted.abs().max()
    logprob, _ = ours.logprobs(hidden, batch["targets"])
    keep = batch["targets"] >= 0
    nll = F.cross_entropy(wanted[keep], batch["targets"][keep], reduction="none")
    assert (logprob[keep] + nll).abs().max() < 10 * tolerance and logprob[~keep].eq(0).all()


def test_packed_documents_do_not_see_each_other_in_the_model():
    model = perturb(P.Qwen3(small_config(), P.Mesh(device="cpu"), dtype=torch.float64))
    lengths = [3, 12, 1, 9]
    batch = documents(0, lengths)
    with torch.no_grad():
        together = model(batch["tokens"], batch["positions"], P.packed(batch["cu_seqlens"])).split(lengths)
        for tokens, hidden in zip(batch["tokens"].split(lengths), together):
            ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
            assert (model(tokens, torch.arange(len(tokens)), P.packed(ends)) - hidden).abs().max() < 1e-12


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("name", ["qwen3 tied", "qwen2", "llama with biases"])
def test_weights_go_in_and_out_bit_exact(name, shard, tmp_path):
    kind, settings = TRANSFORMERS[name]
    theirs = transformers_model(kind, tmp_path / "theirs", torch.bfloat16, shard, **settings)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours = P.Qwen3.from_pretrained(tmp_path / "theirs", P.Mesh(device="cpu"), dtype=torch.bfloat16)
    wanted = theirs.state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in ours.hf_tensors())
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.bfloat16).state_dict()
    assert again.keys() == wanted.keys() and all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_a_config_survives_the_way_through_config_json(tmp_path):
    for settings in ({}, QWEN2, LLAMA, dict(qk_norm=False, model_type="llama", rope_theta=5e5, eos_token_id=[3, 4],
                                            rope_scaling=dict(TRANSFORMERS["llama 3 positions"][1]["rope_parameters"],
                                                              rope_theta=5e5))):
        config = small_config(**settings)
        (tmp_path / "config.json").write_bytes(config.to_json())
        assert P.Config.from_pretrained(tmp_path) == config
        # without one, transformers before 5.23 says of every large tokenizer beside it that it is a broken Mistral one
        assert json.loads(config.to_json())["transformers_version"] >= "5"


def test_folders_that_are_no_such_model_are_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        P.Qwen3.from_pretrained(tmp_path / "nothing")
    transformers_model("Qwen3", tmp_path / "model", shard="20KB")
    parts = sorted((tmp_path / "model").glob("model-*.safetensors"))
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off"):
        P.Qwen3.from_pretrained(tmp_path / "model")
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        P.Qwen3.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for wrong in (dict(hidden_act="gelu"), dict(model_type="gemma", hidden_activation="x"),
                  dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0))):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match="not known here"):
            P.Config.from_pretrained(tmp_path / "model")


def test_wrong_tensors_are_refused_before_they_do_harm():
    model = P.Qwen3(small_config(), P.Mesh(device="cpu"))
    good = parameters(model)
    for bad, word in ((dict(good, extra=torch.zeros(2)), "extra"), ({"model.norm.weight": torch.zeros(9)}, "(9,)"),
                      ({k: v for k, v in good.items() if "layers.2." not in k}, "missing")):
        with pytest.raises(ValueError, match=word.replace("(", r"\(").replace(")", r"\)")):
            model.load_hf(bad)
        assert all(torch.equal(x, good[name]) for name, x in model.hf_tensors())
    pointer = model.layers[0].qkv.data_ptr()
    model.load_hf({name: x.numpy() + 1 for name, x in good.items()})
    assert model.layers[0].qkv.data_ptr() == pointer
    assert all(torch.equal(x, good[name] + 1) for name, x in model.hf_tensors())


def _weights(layouts, folder):
    found = []
    for layout in layouts:
        mesh = P.init(*layout)
        settings = dict(dtype=torch.bfloat16, chunks=2 if layout[1] == 2 else 1)
        found.append((parameters(P.Qwen3(small_config(), mesh, seed=5, **settings)),
                      parameters(P.Qwen3.from_pretrained(folder, mesh, **settings)),
                      [p.shape for p in P.Qwen3(small_config(), mesh, **settings).parameters()]))
    return found


def test_initial_and_loaded_weights_are_the_same_on_every_layout(tmp_path):
    theirs = transformers_model("Qwen3", tmp_path, torch.bfloat16, tie_word_embeddings=True).state_dict()
    fresh = parameters(P.Qwen3(small_config(), P.Mesh(device="cpu"), dtype=torch.bfloat16, seed=5))
    other = parameters(P.Qwen3(small_config(), P.Mesh(device="cpu"), dtype=torch.bfloat16, seed=6))
    assert not torch.equal(fresh["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    layouts = [(1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 1, 2), (4, 1, 1)]
    for rank in on_ranks(4, _weights, layouts, tmp_path):
        for ours, loaded, _ in rank:
            assert all(torch.equal(ours[x], fresh[x]) and torch.equal(loaded[x], theirs[x]) for x in fresh)


def test_layouts_that_cannot_be_are_refused_with_the_choices():
    config = small_config(num_attention_heads=12, num_key_value_heads=4, intermediate_size=96)
    with pytest.raises(ValueError, match="choose tp from 1, 2, 4, 12"):
        P.Qwen3(config, P.Mesh(tp=3, device="cpu"))
    with pytest.raises(ValueError, match="pp x chunks is from 1 to 4"):
        P.Qwen3(config, P.Mesh(pp=5, device="cpu"))
    with pytest.raises(ValueError, match="pp x chunks is from 1 to 4"):
        P.Qwen3(config, P.Mesh(pp=2, device="cpu"), chunks=3)
    with pytest.raises(ValueError, match="does not make 1 processes; choose from 1 x 1 x 1"):
        P.init(tp=2)
    with pytest.raises(ValueError, match="unknown schedule fast; choose from afab, 1f1b"):
        P.program("fast", 2, 0, 1, 4)
    model = P.Qwen3(config, P.Mesh(device="cpu"))
    with pytest.raises(ValueError, match="65 tokens, and the model 64 positions"):
        P.run(model, [documents(0, [65])], make_loss([documents(0, [65])]))


def _plain_adamw(steps):
    """Ours on three replicas, and torch's on the whole, from the same start."""
    mesh, data = P.init(), dealt(3)
    ours = perturb(P.Qwen3(small_config(), mesh, dtype=torch.float64))
    optimizer = P.AdamW(ours, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, clip=0.5)
    alone = perturb(P.Qwen3(small_config(), P.Mesh(device="cpu"), dtype=torch.float64))
    plain = torch.optim.AdamW(alone.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    whole, norms = sum(data, []), []
    for step in range(steps):
        lr = 1e-3 * (1 + step % 3)
        P.run(ours, data[mesh.dp_rank], make_loss(whole))
        norm = optimizer.step(lr)
        plain.zero_grad()
        for batch in whole:
            hidden = alone(batch["tokens"], batch["positions"], P.packed(batch["cu_seqlens"]))
            make_loss(whole)(alone, hidden, batch)[0].backward()
        norms.append(abs(norm.item() - torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5).item()) / norm)
        plain.param_groups[0]["lr"] = lr
        plain.step()
    held = sum(x.nbytes for state in optimizer.state for x in state.values())
    return distance(parameters(ours), parameters(alone)), max(norms), held


def test_zero_1_equals_a_plain_adamw_and_holds_a_share_of_its_state():
    total = sum(math.prod(spec.shape) for spec in P.table(small_config())) * 8 * 3
    for error, norm_error, held in on_ranks(3, _plain_adamw, 10):
        assert error < 1e-12 and norm_error < 1e-12
        assert total / 3 <= held < total / 3 * 1.1


def _rounded():
    """Gradients in bf16, alone and on two replicas, and in fp64."""
    found = []
    for mesh, dtype in ((P.Mesh(device="cpu"), torch.float64), (P.Mesh(device="cpu"), torch.bfloat16),
                        (P.init(), torch.bfloat16)):
        model, data = perturb(P.Qwen3(small_config(), mesh, dtype=dtype)), dealt(2)
        P.AdamW(model)
        P.run(model, data[mesh.dp_rank] if mesh.dp > 1 else sum(data, []), make_loss(sum(data, [])))
        found.append(gradients(model))
    return found


def test_gradients_of_bf16_are_summed_in_fp32():
    for exact, alone, replicas in on_ranks(2, _rounded):
        for name, x in exact.items():
            assert alone[name].dtype == replicas[name].dtype == torch.float32
            assert (alone[name] - x).norm() < 0.2 * x.norm(), name
            assert (replicas[name] - alone[name]).norm() < 1e-5 * x.norm(), name    # the last one has no targets


def _events():
    """The order in which buckets begin to be reduced, and the backward passes of layers end, in two micro-batches."""
    mesh, events = P.init(), []
    plain = P.reduce_scatter
    model = P.Qwen3(small_config(), mesh)
    P.AdamW(model)
    def recorded(out, *args, **settings):
        events.append(f"reduce {len(out)}")
        return plain(out, *args, **settings)
    P.reduce_scatter = recorded
    for layer in model.layers:
        layer.register_full_backward_pre_hook(lambda module, _: events.append(f"backward {module.index}"))
    data = dealt(2, 4)
    model.tp.sequence = False
    P.run(model, data[0], make_loss(data[0]))
    return events, [bucket.params[0].bucket is bucket for bucket in model.buckets]


def test_gradients_are_reduced_while_backward_goes_on():
    events, _ = on_ranks(2, _events)[0]
    backward = [i for i, event in enumerate(events) if event.startswith("backward")]
    reduce = [i for i, event in enumerate(events) if event.startswith("reduce")]
    assert [events[i] for i in backward] == [f"backward {i}" for i in (3, 2, 1, 0)] * 2
    assert len(reduce) == 6                                             # words, four layers, the norm: each once,
    assert reduce[0] > backward[3]                                      # in the last micro-batch,
    assert sum(i < backward[-1] for i in reduce) >= 3                   # and most before the first layer's turn comes


def test_documents_that_do_not_lie_in_the_tokens_are_refused():
    model, (batch, *_) = P.Qwen3(small_config(), P.Mesh(device="cpu")), dealt(1)[0]
    tokens = len(batch["tokens"])
    for edges in ([0, tokens + 3], [0, 5, 3, tokens], [-1, tokens]):
        with pytest.raises(ValueError, match=f"cu_seqlens .* {tokens} tokens"):
            P.run(model, [batch | {"cu_seqlens": torch.tensor(edges, dtype=torch.int32)}], make_loss([batch]))


def _foreign_tokens():
    """What run says to ids and positions that are in no table, and to ends that are none."""
    mesh = P.init(tp=dist.get_world_size()) if dist.is_initialized() else P.Mesh(device="cpu")
    model, batch, said = P.Qwen3(small_config(), mesh), dealt(1)[0][0], []
    for key, at, value in (("tokens", 3, 101), ("tokens", 0, -1), ("positions", 2, -1), ("positions", 2, 64)):
        wrong = batch[key].clone()
        wrong[at] = value
        said.append((batch | {key: wrong}, f"{key} .* to {value}" if value > 0 else f"{key} .* {value} to"))
    said += [(batch | {"cu_seqlens": ends}, "cu_seqlens") for ends in (torch.tensor([0]), [0, 4], torch.tensor(4))]
    for wrong, words in said:
        with pytest.raises(ValueError, match=words):
            P.run(model, [wrong], make_loss([batch]))
    none = {key: x[:0] for key, x in batch.items()} | {"cu_seqlens": torch.zeros(2, dtype=torch.int32)}
    assert model.queue is None and len(P.run(model, [batch, none], make_loss([batch]))) == 2


def test_tokens_and_positions_outside_their_tables_are_refused():
    _foreign_tokens()
    on_ranks(2, _foreign_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_not_taken_out_of_its_buckets(dtype):
    model = P.Qwen3(small_config(), P.Mesh(device="cpu"), dtype=dtype)
    optimizer, before = P.AdamW(model, lr=1e-2), parameters(model)
    for change in (lambda: model.double(), lambda: model.to(torch.float16), lambda: model.to("meta"),
                   lambda: model.to_empty(device="cpu"), lambda: copy.deepcopy(model)):
        with pytest.raises(ValueError, match="Qwen3"):
            change()
    assert model.to(dtype) is model and model.cpu() is model and model.to("cpu", dtype) is model
    P.run(model, dealt(1)[0], make_loss(dealt(1)[0]))
    optimizer.step()
    assert all(not torch.equal(before[name], x) for name, x in parameters(model).items())
    assert all(p.data_ptr() == p.bucket.flat[p.where].data_ptr() for p in model.parameters())


def test_a_model_of_which_a_part_is_frozen_is_refused():
    model = P.Qwen3(small_config(), P.Mesh(device="cpu"))
    optimizer = P.AdamW(model)
    model.layers[0].requires_grad_(False)
    for call in (lambda: P.AdamW(model), lambda: P.run(model, dealt(1)[0], make_loss(dealt(1)[0]))):
        with pytest.raises(ValueError, match="frozen"):
            call()
    assert optimizer.steps == 0


def _plain_backward_after_a_run(tp=1):
    mesh = P.init(tp=tp) if dist.is_initialized() else P.Mesh(device="cpu")
    model, batch = P.Qwen3(small_config(), mesh, dtype=torch.float64), dealt(1)[0][0]
    optimizer, loss = P.AdamW(model), make_loss([batch])
    def plain():
        loss(model, model(batch["tokens"], batch["positions"], P.packed(batch["cu_seqlens"])), batch)[0].backward()
    P.run(model, [batch], loss)
    once, said = optimizer.grad_norm(), ""
    try:
        plain()
    except ValueError as error:
        said = str(error)
    twice = optimizer.grad_norm()
    optimizer.zero_grad()
    plain()
    model.finish_gradients()
    return [float(x / once) for x in (twice, optimizer.grad_norm())], said


def test_gradients_after_those_of_a_run_are_added_or_refused():
    ratios, said = _plain_backward_after_a_run()
    assert not said and ratios == pytest.approx([2, 1])
    for ratios, said in on_ranks(2, _plain_backward_after_a_run) + on_ranks(2, _plain_backward_after_a_run, 2):
        assert "zero_grad" in said and ratios[1] == pytest.approx(1)


@pytest.mark.parametrize("settings", [
    dict(lr=-1e-3), dict(lr=math.nan), dict(betas=(0.9, 1.0)), dict(betas=(-0.1, 0.9)), dict(eps=-1e-8),
    dict(weight_decay=-0.1), dict(weight_decay=math.nan), dict(clip=0.0), dict(clip=-1.0),
    dict(clip=math.nan)], ids=str)
def test_settings_of_adamw_that_make_no_sense_are_refused(settings):
    model, name = P.Qwen3(small_config(), P.Mesh(device="cpu")), next(iter(settings))
    with pytest.raises(ValueError, match=f"{name.replace('betas', 'beta[12]')} is .*choose"):
        P.AdamW(model, **settings)
    assert model.queue is None                                          # nothing has begun
    optimizer = P.AdamW(model, lr=0, betas=(0, 0), eps=0, clip=None)
    if name == "lr":
        with pytest.raises(ValueError, match="lr is .*choose"):
            optimizer.step(**settings)
        assert optimizer.steps == 0 and model.queue is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_loaded_after_adamw_was_made_are_what_it_steps_from(dtype, tmp_path):
    model = P.Qwen3(small_config(), P.Mesh(device="cpu"), dtype=dtype)
    optimizer, other = P.AdamW(model, lr=1e-6), perturb(P.Qwen3(small_config(), P.Mesh(device="cpu"), dtype=dtype))
    wanted = parameters(other)
    P.save(tmp_path / "other", other)
    for load in (lambda: model.load_hf(wanted), lambda: P.load(tmp_path / "other", model)):
        model.load_hf({name: x * 0 for name, x in wanted.items()})
        load()
        P.save(tmp_path / "both", model, optimizer)
        P.run(model, dealt(1)[0], make_loss(dealt(1)[0]))
        optimizer.step()
        assert distance(parameters(model), wanted) < 1e-2
        P.load(tmp_path / "both", model)                                # and save wrote them, too
        assert distance(parameters(model), wanted) == 0
    P.run(model, dealt(1)[0], make_loss(dealt(1)[0]))
    optimizer.step(1e-4)
    masters = [state["param"].clone() for state in optimizer.state]     # in bf16 with more bits than the model has
    P.save(tmp_path / "both", model, optimizer)
    model.load_hf(wanted)
    P.load(tmp_path / "both", model, optimizer)
    assert all(torch.equal(x, state["param"]) for x, state in zip(masters, optimizer.state))


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing():
    model = P.Qwen3(small_config(), P.Mesh(device="cpu"))
    optimizer, before = P.AdamW(model), parameters(model)
    P.run(model, dealt(1)[0], lambda model, hidden, batch: (hidden.sum() * math.inf, None))
    assert not math.isfinite(optimizer.step())
    assert all(torch.equal(before[name], x) for name, x in model.hf_tensors())
    P.run(model, dealt(1)[0], make_loss(dealt(1)[0]))
    assert math.isfinite(optimizer.step())
    assert not all(torch.equal(before[name], x) for name, x in model.hf_tensors())


def test_a_run_without_backward_gives_results_and_keeps_no_graph():
    model, data = P.Qwen3(small_config(), P.Mesh(device="cpu"), chunks=2), dealt(1)[0]
    def score(model, hidden, batch):
        assert not hidden.requires_grad
        return None, model.logprobs(hidden, batch["targets"])[0]
    scores = P.run(model, data, score, backward=False)
    assert [len(x) for x in scores] == [len(batch["tokens"]) for batch in data]
    assert all(bucket.total is None for bucket in model.buckets)


def saved_bytes(recompute):
    """Gradients of a run, and the bytes that its graph keeps for backward."""
    model = perturb(P.Qwen3(small_config(num_hidden_layers=8), P.Mesh(device="cpu"), recompute=recompute))
    data, kept, loss = dealt(1)[0], {}, make_loss(dealt(1)[0])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.data_ptr()] = x.nbytes
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        P.run(model, data[:1], loss)
    P.run(model, data, loss)
    return gradients(model), sum(kept.values())


def test_recompute_gives_the_same_bits_in_less_memory():
    (plain, much), (again, little) = saved_bytes(False), saved_bytes(True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert little < much / 4


def _trained(folder, layout, steps, save_at=None, load_from=None, dtype=torch.bfloat16, state=None):
    """Parameters and optimizer state, by Hugging Face names, after some steps."""
    mesh = P.init(*layout) if math.prod(layout) > 1 else P.Mesh(device="cpu")
    model = P.Qwen3.from_pretrained(folder, mesh, dtype=dtype)
    optimizer, data = P.AdamW(model, lr=1e-2, weight_decay=0.1, clip=1.0), dealt(mesh.dp)
    loss, found = make_loss(sum(data, [])), None
    if load_from:
        found = P.load(load_from, model, optimizer)
    for step in steps:
        P.run(model, data[mesh.dp_rank], loss)
        optimizer.step()
        if save_at and step == save_at[0]:
            P.save(save_at[1], model, optimizer, {"step": step, "order": torch.arange(5)})
    everything = {("model", name): x for name, x in parameters(model).items()}
    for kind in optimizer.state[0]:
        shards = [state[kind] for state in optimizer.state]
        everything |= {(kind, name): x.clone() for name, x in model.hf_tensors(shards)}
    return everything, found, optimizer.steps


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[x], theirs[x]) for x in theirs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model folder, and a checkpoint of it from 8 processes after three of five steps."""
    root = tmp_path_factory.mktemp("checkpoint")
    P.tiny_model(root / "model", **dict(SMALL, num_hidden_layers=4, vocab_size=259))
    at_three = on_ranks(8, _trained, root / "model", (2, 2, 2), range(1, 4), (3, root / "run" / "step-3"))[7][0]
    at_five = on_ranks(8, _trained, root / "model", (2, 2, 2), range(1, 6))[7][0]
    return root, at_three, at_five


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 4, 1), (1, 1, 4), (4, 1, 2)])
def test_checkpoints_load_bit_equal_on_other_layouts(layout, checkpoint):
    root, at_three, _ = checkpoint
    arguments = root / "model", layout, (), None, root / "run"
    ranks = [_trained(*arguments)] if layout == (1, 1, 1) else on_ranks(math.prod(layout), _trained, *arguments)
    for everything, state, steps in ranks:
        assert same(everything, at_three) and steps == 3
        assert state["step"] == 3 and torch.equal(state["order"], torch.arange(5))


def test_a_resumed_run_equals_one_that_was_never_interrupted(checkpoint):
    root, _, at_five = checkpoint
    for everything, _, steps in on_ranks(8, _trained, root / "model", (2, 2, 2), (4, 5), None, root / "run"):
        assert same(everything, at_five) and steps == 5


def test_a_merged_checkpoint_is_a_model_for_transformers(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    root, at_three, _ = checkpoint
    subprocess.run([sys.executable, HERE / "parallel.py", "merge", root / "run", tmp_path / "out"], check=True)
    theirs, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
                    P.Qwen3.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, device="cpu"))
    assert all(torch.equal(x, at_three["model", name]) for name, x in ours.hf_tensors())
    assert all(torch.equal(theirs.state_dict()[name], x) for name, x in ours.hf_tensors())
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = words.apply_chat_template([{"role": "user", "content": "é"}], add_generation_prompt=True, tokenize=False)
    assert ids == "<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n" and words.eos_token == "<|im_end|>"
    assert words.decode(words("naïve 漢字\n").input_ids) == "naïve 漢字\n"


def _merge_peak(source, out):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    P.merge(source, out)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_merge_needs_the_memory_of_a_tensor_not_of_a_model(tmp_path):
    config = P.Config(vocab_size=2000, hidden_size=512, intermediate_size=2048, num_hidden_layers=16, head_dim=64,
                      num_attention_heads=8, num_key_value_heads=8)
    model = P.Qwen3(config, P.Mesh(device="cpu"))
    size = sum(bucket.flat.nbytes for bucket in model.buckets)
    P.save(tmp_path / "checkpoint", model)
    del model
    context = multiprocessing.get_context("spawn")                      # a fork would begin with our memory
    with context.Pool(1) as pool:
        peak = pool.apply(_merge_peak, (tmp_path / "checkpoint", tmp_path / "out"))
    largest = 2048 * 512 * 4
    assert peak < 8 * largest < size / 6, (peak / largest, size / largest)


def _alone(folder=None):
    torch.set_num_threads(1)
    model = P.Qwen3(small_config(), P.Mesh(device="cpu"))
    return model, P.AdamW(model)


def test_shards_that_are_cut_missing_or_foreign_are_named(tmp_path):
    model, optimizer = _alone()
    for i in (1, 2):
        P.save(tmp_path / f"step-{i}", model, optimizer, {"step": i})
    shard, other = (tmp_path / f"step-{i}" / "rank-00000.safetensors" for i in (2, 1))
    whole = shard.read_bytes()
    for content, error, word in ((whole[:-10], ValueError, "cut off"), (whole[:5], ValueError, "cut off"),
                                 (other.read_bytes(), ValueError, "another checkpoint"),
                                 (None, FileNotFoundError, "missing")):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(error, match=f"rank-00000.safetensors.*{word}"):
            P.load(tmp_path / "step-2", model, optimizer)
        assert P.latest(tmp_path) == tmp_path / "step-1" and P.load(tmp_path, model, optimizer) == {"step": 1}
    shard.write_bytes(whole)
    assert P.latest(tmp_path) == tmp_path / "step-2" and P.load(tmp_path, model, optimizer) == {"step": 2}
    assert P.latest(tmp_path / "nothing") is None
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        P.load(tmp_path / "nothing", model)
    (tmp_path / "file").write_text("in the way")
    for other in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="something else than a checkpoint"):
            P.save(other, model)
    assert (tmp_path / "file").read_text() == "in the way" and P.latest(tmp_path) == tmp_path / "step-2"


@pytest.mark.parametrize("value", [np.float64(1.5), Path("/x"), lambda: 1], ids=["numpy", "path", "function"])
def test_a_state_that_load_would_refuse_is_refused_by_save(value, tmp_path):
    model, optimizer = _alone()
    P.save(tmp_path / "last", model, optimizer, {"best": 1.0})
    with pytest.raises(ValueError, match="numbers, strings, lists, dicts and tensors"):
        P.save(tmp_path / "last", model, optimizer, {"best": value})
    assert [x.name for x in tmp_path.iterdir()] == ["last"] and P.load(tmp_path, model) == {"best": 1.0}


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(tmp_path):
    model, optimizer = _alone()
    before = parameters(model)
    other = P.Qwen3(small_config(hidden_size=40), P.Mesh(device="cpu"))
    P.save(tmp_path / "other", other)
    with pytest.raises(ValueError, match="load it into the model that it was saved from"):
        P.load(tmp_path / "other", model)
    P.save(tmp_path / "plain", perturb(P.Qwen3(small_config(), P.Mesh(device="cpu"))))
    with pytest.raises(ValueError, match="with AdamW only if that was saved"):
        P.load(tmp_path / "plain", model, optimizer)
    assert all(torch.equal(before[name], x) for name, x in model.hf_tensors())
    P.load(tmp_path / "plain", model)
    assert not all(torch.equal(before[name], x) for name, x in model.hf_tensors())


def _save_forever(folder, pipe, replace):
    model, optimizer = _alone()
    for step in range(10_000):
        P.save(folder / ("same" if replace else f"step-{step}"), model, optimizer, {"step": step})
        pipe.send(step)


@pytest.mark.parametrize("replace", [True, False])
def test_a_kill_at_any_moment_of_save_leaves_a_checkpoint_that_loads(tmp_path, replace):
    context, generator, model_optimizer = multiprocessing.get_context("fork"), random.Random(0), None
    for _ in range(12):
        folder = tmp_path / str(generator.random())
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_save_forever, args=(folder, theirs, replace), daemon=True)
        child.start()
        theirs.close()
        done = ours.recv()                                              # one is finished,
        time.sleep(generator.random() * 0.05)                           # and in one of the next ones comes
        os.kill(child.pid, signal.SIGKILL)
        child.join(10)
        try:
            while True:
                done = ours.recv()
        except EOFError:
            pass
        model_optimizer = model_optimizer or _alone()
        assert P.load(folder, *model_optimizer)["step"] >= done
        if replace:
            P.save(folder / "same", *model_optimizer, {"step": -1})     # and the next save clears up
            assert [x.name for x in folder.iterdir()] == ["same"] and P.load(folder, *model_optimizer)["step"] == -1


def _full_disk(folder):
    """Rank 1 may write no large files any more."""
    mesh = P.init(tp=2)
    model = P.Qwen3(small_config(), mesh)
    P.save(folder / "good", model, None, {"step": 1})
    if mesh.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        P.save(folder / "good", model, None, {"step": 2})
    except OSError as error:
        dist.barrier()
        return str(error), sorted(x.name for x in folder.iterdir()), P.load(folder / "good", model)
    return "no error", [], {}


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_the_old_checkpoint(tmp_path):
    (first, names, state), (second, _, _) = on_ranks(2, _full_disk, tmp_path)
    assert "rank 1" in first and "large" in first and "large" in second
    assert names == ["good"] and state == {"step": 1}


def _no_folder(path):
    """Rank 0 cannot make the folder of a model that is in two shares."""
    try:
        P.Qwen3(small_config(), P.init(tp=2)).save_pretrained(path)
    except OSError as error:
        return str(error)


def test_a_model_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for error in on_ranks(2, _no_folder, tmp_path / "file" / "model", timeout=30):
        assert "rank 0" in error and "NotADirectory" in error


def test_checkpoints_are_found_in_the_working_directory(tmp_path, monkeypatch):
    model, optimizer = _alone()
    P.save(tmp_path / "step-1", model, optimizer, {"step": 1})
    monkeypatch.chdir(tmp_path)
    assert P.latest(".") == Path("step-1") and P.load(".", model, optimizer) == {"step": 1}


def test_a_link_to_a_folder_stays_one_and_is_saved_to_again(tmp_path, monkeypatch):
    model, optimizer = _alone()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")           # of a folder that is not there yet
    for step in range(3):
        assert P.save(tmp_path / "link", model, optimizer, {"step": step}) == tmp_path / "link"
        assert P.load(tmp_path / "link", model, optimizer) == {"step": step} and (tmp_path / "link").is_symlink()
        assert [x.name for x in (tmp_path / "disk").iterdir()] == ["run"]
    (tmp_path / "disk" / "run").rename(tmp_path / "disk" / ".run.old")  # as a kill within save leaves it
    assert P.load(tmp_path / "link", model, optimizer) == {"step": 2}
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="working directory"):          # which would be moved away under our feet
        P.save(".", model)
    assert P.save("run", model) == Path("run") and os.listdir() == ["run"]


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"saved": 1, "dp": null, "pp": 1, "tp": 1}', "not json"])
def test_a_spoilt_description_of_a_checkpoint_is_passed_over(text, tmp_path):
    model, _ = _alone()
    P.save(tmp_path / "step-1", model)
    P.save(tmp_path / "step-2", model)
    (tmp_path / "step-2" / "checkpoint.json").write_text(text)
    assert P.latest(tmp_path) == tmp_path / "step-1"
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        P.load(tmp_path / "step-2", model)


def test_whole_weights_come_before_the_index_of_an_older_model(tmp_path):
    transformers_model("Qwen3", tmp_path, shard="20KB", tie_word_embeddings=True)
    model = P.Qwen3.from_pretrained(tmp_path, P.Mesh(device="cpu"))
    perturb(model).save_pretrained(tmp_path)                            # beside the shards that it came from
    again = P.Qwen3.from_pretrained(tmp_path, P.Mesh(device="cpu"))
    assert all(torch.equal(x, parameters(model)[name]) for name, x in again.hf_tensors())


def test_training_flops_are_six_a_parameter_and_token_and_causal_attention():
    config = P.Config()                                                 # 596 M parameters, the words counted once
    wanted = 8192 * 6 * 596_049_920 + 8 * 6 * 28 * 2048 * 1024**2
    assert abs(P.training_flops(config, [1024] * 8) / wanted - 1) < 1e-12


@pytest.mark.parametrize("flags,words", [("--bench --device cpu", "needs a GPU"),
                                         ("--schedule foo", "--schedule: invalid choice: 'foo'")])
def test_flags_that_parallel_cannot_follow_end_it_in_a_sentence(flags, words, tmp_path):
    done = subprocess.run([sys.executable, HERE / "parallel.py", *flags.split()], capture_output=True, text=True,
                          env=os.environ | {"TMPDIR": str(tmp_path)})
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr
    assert not any(path.is_dir() and any(path.iterdir()) for path in tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    "parallel.py", "-m torch.distributed.run --nproc-per-node 4 parallel.py --tp 2 --pp 2"])
def test_parallel_demo_agrees_with_one_process_and_transformers(command):
    done = subprocess.run([sys.executable, *command.split()], cwd=HERE, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "the largest difference to one process" in done.stdout, done.stderr


# --- engine.py -------------------------------------------------------------------------------------------------------

FULL = dict(temperature=1.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, one_thread):
    return str(P.tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2, hidden_size=64, intermediate_size=96,
                            initializer_range=0.1))


@pytest.fixture(scope="module")
def llm(tiny):
    """For tests that leave it as they found it: everything in it is finished, and the weights are those of tiny."""
    engine = LLM(tiny, max_model_len=256, max_num_seqs=16)
    yield engine
    check(engine.scheduler)
    assert not engine.has_unfinished() and engine.weight_version == 0


def check(scheduler):
    """What holds after every step: pages add up, references match the tables, no seat is lost."""
    blocks, running = scheduler.blocks, scheduler.running
    held = [page for request in running for page in request.pages]
    assert np.bincount(np.array(held, int), minlength=blocks.count).tolist() == blocks.refs
    assert len(blocks.free) + len(set(held)) == blocks.count and not blocks.free.keys() & set(held)
    assert all(blocks.labels[page][0] == key for key, page in blocks.known.items())
    assert all(scheduler.table[r.seat, :len(r.pages)].tolist() == r.pages for r in running)
    assert sorted(scheduler.seats + [r.seat for r in running]) == list(range(len(scheduler.table)))


def some_prompts(seed=0, count=10, longest=70, vocab=256):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def tokens_of(outputs):
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


def serve(engine, prompts, params, **settings):
    outputs = engine.generate(prompts, params, use_tqdm=False, **settings)
    check(engine.scheduler)
    assert len(engine.scheduler.blocks.free) == engine.scheduler.blocks.count
    return outputs


def transformers_greedy(folder, prompts, count):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        answers.append(out[0, len(prompt):].tolist())
    return model, answers


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen2"])
def test_greedy_tokens_are_those_of_transformers(tmp_path, one_thread, kind):
    import transformers
    names = {"qwen3": "Qwen3", "llama": "Llama", "qwen2": "Qwen2"}
    torch.manual_seed(3)
    config = getattr(transformers, names[kind] + "Config")(
        vocab_size=199, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16 if kind != "qwen2" else 12, max_position_embeddings=128, eos_token_id=7,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, tie_word_embeddings=kind == "qwen2",
        **({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}
           if kind == "llama" else {}))
    model = getattr(transformers, names[kind] + "ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    prompts = some_prompts(1, 12, 60, 199)
    free = LLM(str(tmp_path)).generate(prompts, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    ends = [free[0]["token_ids"][6], free[1]["token_ids"][9]]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "pad_token_id": 0}))
    model, answers = transformers_greedy(tmp_path, prompts, 30)
    engine = LLM(str(tmp_path), max_num_seqs=5, max_num_batched_tokens=40)
    outputs = serve(engine, prompts, SamplingParams(temperature=0, max_tokens=30))
    assert [one[0] for one in tokens_of(outputs)] == answers
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop", "length"}, "both ends should occur"
    for temperature in (0.6, 1.0, 1.5):
        params = SamplingParams(temperature=temperature, max_tokens=12, ignore_eos=True, seed=5)
        outputs = serve(engine, prompts, params)
        for prompt, output in zip(prompts, outputs):
            one = output.outputs[0]
            whole = torch.tensor([prompt + one.token_ids])
            full = (model(whole).logits[0].double() / temperature).log_softmax(-1)
            want = full[len(prompt) - 1:-1].gather(1, whole[0, len(prompt):, None])[:, 0]
            assert len(one.logprobs) == len(one.token_ids) == 12
            assert torch.allclose(torch.tensor(one.logprobs).double(), want, atol=2e-5)
            every = full[:-1].gather(1, whole[0, 1:, None])[:, 0].tolist()
            assert np.allclose(engine.score([whole[0].tolist()], temperature)[0], [0.0, *every], atol=2e-5)


def test_greedy_logprobs_are_those_at_temperature_one(llm):
    prompt = some_prompts(4)[0]
    one = serve(llm, [prompt], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0].outputs[0]
    assert np.allclose(one.logprobs, llm.score([prompt + one.token_ids])[0][len(prompt):], atol=1e-5)
    assert max(one.logprobs) < 0


def test_chunks_pages_pools_and_company_do_not_change_tokens(tiny):
    """One request at a time in an engine without limits, against every way to squeeze many through a small one."""
    prompts = some_prompts(2, 9, 80) + [[5] * n for n in (15, 16, 17, 32, 33, 33)]
    params = [SamplingParams(temperature=0.8 if i % 3 else 0, max_tokens=4 + i, seed=i, ignore_eos=True,
                             top_k=20 if i % 4 == 1 else -1, top_p=0.9 if i % 5 == 2 else 1.0)
              for i in range(len(prompts))]
    alone = LLM(tiny, max_model_len=128, enable_prefix_caching=False)
    want = [tokens_of(serve(alone, [prompt], [one]))[0] for prompt, one in zip(prompts, params)]
    assert len({tuple(x[0]) for x in want}) > 8, "the model says the same to everything: nothing is tested"
    preempted = cached = 0
    longest = max(len(prompt) + one.max_tokens for prompt, one in zip(prompts, params))
    for chunk in (1, 7, 16, 300):
        for page, caching, overlap, room in ((16, True, True, 1), (16, False, True, 1), (4, True, False, 1),
                                             (1, True, True, 1.3), (16, True, True, 20)):
            if chunk == 1 and page != 16:
                continue
            engine = LLM(tiny, max_model_len=128, max_num_seqs=6, max_num_batched_tokens=chunk, block_size=page,
                         enable_prefix_caching=caching, async_scheduling=overlap,
                         num_gpu_blocks_override=math.ceil((longest - 1) * room / page))
            order = random.Random(chunk).sample(range(len(prompts)), len(prompts))
            got = tokens_of(serve(engine, [prompts[i] for i in order], [params[i] for i in order]))
            assert got == [want[i] for i in order], (chunk, page, caching, overlap, room)
            preempted += engine.scheduler.preemptions
            cached += engine.scheduler.cached_tokens
            assert caching or not engine.scheduler.cached_tokens
    assert preempted > 10 and cached > 500


@pytest.mark.parametrize("page", [1, 4, 16])
def test_prefix_cache_hits_are_whole_pages_before_the_last_token(tiny, page):
    engine = LLM(tiny, max_model_len=128, block_size=page)
    for n in sorted({1, page - 1, page, page + 1, 3 * page - 1, 3 * page, 3 * page + 1} - {0}):
        prompt, before = [n] + [3] * n, engine.scheduler.cached_tokens
        first = tokens_of(serve(engine, [prompt], SamplingParams(seed=1, max_tokens=5, ignore_eos=True)))
        assert engine.scheduler.cached_tokens == before, "nothing of it was there"
        again = tokens_of(serve(engine, [prompt], SamplingParams(seed=1, max_tokens=5, ignore_eos=True)))
        assert first == again
        assert engine.scheduler.cached_tokens - before == (len(prompt) - 1) // page * page


def test_siblings_share_the_pages_of_their_prompt_in_the_very_step_that_fills_them(tiny):
    engine = LLM(tiny, max_model_len=256, block_size=8, num_gpu_blocks_override=40)
    prompt = list(range(100))
    engine.add_request(prompt, SamplingParams(n=8, max_tokens=4, seed=0, ignore_eos=True))
    engine.step()
    assert len(engine.scheduler.running) == 8 and engine.scheduler.cached_tokens == 7 * 96
    assert engine.scheduler.blocks.refs[engine.scheduler.running[0].pages[0]] == 8
    check(engine.scheduler)
    while engine.has_unfinished():
        outputs = engine.step()
    alone = LLM(tiny, max_model_len=256, enable_prefix_caching=False)
    assert tokens_of(outputs) == tokens_of(serve(alone, prompt, SamplingParams(n=8, max_tokens=4, seed=0,
                                                                             ignore_eos=True)))


def test_partial_hits_after_eviction_are_right(tiny):
    engine = LLM(tiny, max_model_len=128, block_size=4, num_gpu_blocks_override=20)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    alone = LLM(tiny, max_model_len=128, enable_prefix_caching=False)
    rng, hits = random.Random(5), set()
    for _ in range(60):
        prompt = [rng.randrange(2)] * 20 + [rng.randrange(3)] * rng.randint(1, 30)
        before = engine.scheduler.cached_tokens
        assert tokens_of(serve(engine, [prompt], params)) == tokens_of(serve(alone, [prompt], params))
        hits.add(engine.scheduler.cached_tokens - before)
    assert len(hits) > 4, "hits of many lengths"


def test_colliding_hashes_are_told_apart(tiny, monkeypatch):
    class Same(tuple):
        __hash__ = lambda self: 7                                                                   # noqa: E731
    monkeypatch.setattr(E, "tuple", Same, raising=False)               # of which keys are made
    engine = LLM(tiny, max_model_len=128, block_size=4)
    alone = LLM(tiny, max_model_len=128, enable_prefix_caching=False)
    prompts = [[i % 3] * 9 + [i % 2] * 9 for i in range(12)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert tokens_of(serve(engine, prompts, params)) == tokens_of(serve(alone, prompts, params))
    assert engine.scheduler.cached_tokens > 0


def test_ends_eos_stop_ids_and_limits(tiny, llm):
    prompt = some_prompts(8)[0]
    free = serve(llm, [prompt], SamplingParams(seed=3, max_tokens=40, ignore_eos=True))[0].outputs[0]
    assert free.finish_reason == "length" and len(free.token_ids) == 40 and free.stop_reason is None
    at = next(i for i in range(3, 40) if free.token_ids.index(free.token_ids[i]) == i)
    for i in (0, at):
        one = serve(llm, [prompt], SamplingParams(seed=3, max_tokens=40, ignore_eos=True,
                                                stop_token_ids=[free.token_ids[i], 255]))[0].outputs[0]
        i = free.token_ids.index(free.token_ids[i])
        assert one.token_ids == free.token_ids[:i + 1] and one.finish_reason == "stop"
        assert one.stop_reason == free.token_ids[i] and len(one.logprobs) == len(one.versions) == i + 1
        assert one.text == llm.tokenizer.decode(one.token_ids[:-1], skip_special_tokens=True)
    for count in (0, 1):
        one = serve(llm, [prompt], SamplingParams(seed=3, max_tokens=count))[0].outputs[0]
        assert one.token_ids == free.token_ids[:count] and one.finish_reason == "length"
    most = serve(llm, [prompt], SamplingParams(seed=3, max_tokens=None, ignore_eos=True))[0].outputs[0]
    assert len(prompt) + len(most.token_ids) == 256 and most.token_ids[:40] == free.token_ids


def test_every_end_of_sequence_token_of_the_model_counts(tiny, tmp_path):
    for file in Path(tiny).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    prompt = some_prompts(9)[0]
    free = serve(LLM(tiny, max_model_len=128), [prompt], SamplingParams(seed=3, max_tokens=30, ignore_eos=True))
    free = free[0]["token_ids"]
    ends = free[7], free[12]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
    engine = LLM(str(tmp_path), max_model_len=128)
    one = serve(engine, [prompt], SamplingParams(seed=3, max_tokens=30))[0].outputs[0]
    first = min(map(free.index, ends))
    assert one.token_ids == free[:first + 1] and one.finish_reason == "stop" and one.stop_reason is None
    assert serve(engine, [prompt], SamplingParams(seed=3, max_tokens=30, ignore_eos=True))[0]["token_ids"] == free


def test_stop_strings_are_found_across_tokens_and_left_out(llm):
    rng = random.Random(0)
    for case in range(12):
        prompt, params = some_prompts(case)[0], dict(seed=case, max_tokens=40, ignore_eos=True, temperature=1.0)
        free = serve(llm, [prompt], SamplingParams(**params))[0].outputs[0]
        good = [i for i in range(len(free.text) - 3) if "\ufffd" not in free.text[i:i + 3]]
        if not good:
            continue
        at = rng.choice(good)
        stops = [free.text[at:at + rng.randint(1, 3)], "never seen"]
        at = free.text.index(stops[0])
        outputs = serve(llm, [prompt] * 2, [SamplingParams(**params, stop=stop) for stop in (stops, stops[0])])
        one = outputs[0].outputs[0]
        assert one.text == outputs[1]["text"] == free.text[:at]
        assert one.finish_reason == "stop" and one.stop_reason == stops[0]
        assert one.token_ids == free.token_ids[:len(one.token_ids)]
        assert stops[0] in llm.tokenizer.decode(one.token_ids, skip_special_tokens=True)
        assert stops[0] not in llm.tokenizer.decode(one.token_ids[:-1], skip_special_tokens=True)
        assert "".join(llm.stream(prompt, SamplingParams(**params, stop=stops))) == one.text


def test_streamed_pieces_make_the_whole_and_no_broken_characters(llm):
    whole_characters = 0
    for case in range(9):
        params = SamplingParams(seed=case, max_tokens=60, ignore_eos=case % 2 == 0, stop=["zz", "q"][:case % 3])
        pieces = list(llm.stream("streamed: é€😀", params))
        whole = serve(llm, ["streamed: é€😀"], params)[0]
        assert "".join(pieces) == whole["text"] and all(pieces)
        whole_characters += sum(len(c.encode()) > 1 and c != "\ufffd" for c in whole["text"])
    assert whole_characters > 5
    text = E.Text(llm.tokenizer, [])
    ids, shown = llm.tokenizer.encode("naïve 日本 😀!"), []
    for i in range(1, len(ids) + 1):
        text.push(ids[:i])
        shown.append(text.piece())
    assert "".join(shown) == "naïve 日本 😀!" and not any("\ufffd" in piece for piece in shown)
    assert not any(len(piece) > 1 for piece in shown), "each character as soon as it is whole"


def test_a_stream_that_is_left_ends_its_request(llm):
    pieces = llm.stream("hello", SamplingParams(max_tokens=200, ignore_eos=True, seed=0))
    next(pieces)
    assert llm.has_unfinished()
    pieces.close()
    assert not llm.has_unfinished() and len(llm.scheduler.blocks.free) == llm.scheduler.blocks.count


def test_a_stream_is_whole_whoever_takes_the_steps(llm):
    params = [SamplingParams(seed=seed, max_tokens=12, ignore_eos=True) for seed in (1, 2)]
    first, second = (serve(llm, ["hello"], one)[0]["text"] for one in params)
    stream = llm.stream("hello", params[0])
    pieces = [next(stream)]
    serve(llm, ["x"], SamplingParams(max_tokens=30, ignore_eos=True))
    assert "".join([*pieces, *stream]) == first
    both = itertools.zip_longest(*(llm.stream("hello", one) for one in params), fillvalue="")
    assert ["".join(pieces) for pieces in zip(*both)] == [first, second]


def test_n_samples_come_in_order_with_seeds_of_their_own(llm):
    prompt = some_prompts(11)[0]
    five = serve(llm, [prompt], SamplingParams(n=5, seed=4, **FULL))[0]
    assert [one.index for one in five.outputs] == list(range(5))
    assert len({tuple(one.token_ids) for one in five.outputs}) == 5
    two, one, other = serve(llm, [prompt] * 3, [SamplingParams(n=2, seed=4, **FULL), SamplingParams(seed=4, **FULL),
                                             SamplingParams(n=2, seed=5, **FULL)])
    assert tokens_of([two])[0] == tokens_of([five])[0][:2] and tokens_of([one])[0] == tokens_of([five])[0][:1]
    assert not {tuple(x) for x in tokens_of([other])[0]} & {tuple(x) for x in tokens_of([five])[0]}


def test_without_a_seed_every_request_has_another_and_the_engine_s_seed_decides(tiny):
    prompt = [1, 2, 3]
    first, second, other = (LLM(tiny, max_model_len=64, seed=seed) for seed in (0, 0, 1))
    a, b = serve(first, [prompt] * 4, SamplingParams(**FULL)), serve(second, [prompt] * 4, SamplingParams(**FULL))
    assert tokens_of(a) == tokens_of(b) and len({tuple(x[0]) for x in tokens_of(a)}) == 4
    assert tokens_of(a) != tokens_of(serve(other, [prompt] * 4, SamplingParams(**FULL)))


def test_threads_share_an_engine(tiny):
    """Calls from several threads run in one batch, and each gets its own tokens."""
    llm, params = LLM(tiny, max_model_len=128), SamplingParams(seed=1, max_tokens=12)
    prompts, found = [[i, i + 1, i + 2] for i in range(6)], {}
    want = [one["token_ids"] for one in llm.generate(prompts, params, False)]

    def ask(name):
        found[name] = [one["token_ids"] for one in llm.generate(prompts, params, False)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: want, 1: want, 2: want} and not llm.has_unfinished()


def test_settings_are_those_of_the_moment_they_were_given(tiny):
    llm, params = LLM(tiny, max_model_len=128), SamplingParams(temperature=0.0, max_tokens=8, seed=np.int64(5))
    want = llm.generate([65, 66, 67], params, False)[0]["token_ids"]
    first = llm.add_request([65, 66, 67], params)
    params.temperature, params.top_k, params.stop_token_ids = 1.5, 3, list(range(64))
    llm.add_request([65, 66, 67], params)
    outputs = {output.request_id: output for _ in range(12) for output in llm.step()}
    assert outputs[first]["token_ids"] == want
    params.n = 0
    with pytest.raises(ValueError, match="n = 0"):
        llm.generate([65, 66, 67], params, False)
    with pytest.raises(ValueError, match="version"):
        llm.update_weights({}, version="step-1")
    again = SamplingParams(max_tokens=8)
    seeded = [LLM(tiny, max_model_len=128, seed=seed).generate([1, 2], again, False)[0]["token_ids"]
              for seed in (3, np.int64(3))]
    assert seeded[0] == seeded[1]


def test_prompts_come_as_text_ids_or_dicts_and_outputs_read_either_way(llm):
    ids = llm.tokenizer.encode("one two")
    greedy = SamplingParams(temperature=0, max_tokens=5)
    outputs = serve(llm, ["one two", ids, {"prompt": "one two"}, {"prompt_token_ids": ids}], greedy)
    stop = llm.tokenizer.encode("q")[0]
    assert SamplingParams(stop_token_ids=stop) == SamplingParams(stop_token_ids=[stop])        # as a lone stop string
    outputs += serve(llm, "one two", greedy) + serve(llm, ids, greedy) + serve(llm, {"prompt_token_ids": ids}, [greedy])
    assert len(outputs) == 7 and len({tuple(o["token_ids"]) for o in outputs}) == 1
    assert outputs[0].prompt == "one two" and outputs[1].prompt is None and outputs[0].finished
    assert all(o.prompt_token_ids == ids and o["text"] == o.outputs[0].text for o in outputs)
    assert len({o.request_id for o in outputs}) == 7
    assert llm.generate([], greedy) == []


def test_chat_uses_the_models_template(llm):
    talk = [{"role": "user", "content": "2 + 2?"}]
    greedy = SamplingParams(temperature=0, max_tokens=5)
    text = llm.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    want = serve(llm, text, greedy)[0]
    one, = llm.chat(talk, greedy, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
    many = llm.chat([talk, talk], greedy, use_tqdm=False)
    assert one.prompt == text and one.prompt_token_ids == llm.tokenizer.encode(text, add_special_tokens=False)
    assert tokens_of([one, *many]) == tokens_of([want]) * 3


@pytest.mark.parametrize("prompt, params, says", [
    ([], {}, "empty"), ("", {}, "empty"), ([1] * 256, {}, "max_model_len"), ([1, 259], {}, "259"), ([-1, 3], {}, "-1"),
    ([1.5, 2], {}, "token ids"), (None, {}, "prompt"), ({}, {}, "prompt"), (["a", 3], {}, "prompt"),
    ([1] * 100, {"max_tokens": 100}, "num_gpu_blocks_override"), ([1], {"n": 0}, "n = 0"), ([1], {"n": 1.5}, "n = 1.5"),
    ([1], {"temperature": -0.1}, "temperature"), ([1], {"temperature": math.nan}, "temperature"),
    ([1], {"temperature": 1e-39}, "temperature"), ([1], {"top_k": 2**63}, "top_k"),
    ([1], {"top_p": 0}, "top_p"), ([1], {"top_p": 1.1}, "top_p"), ([1], {"top_k": -2}, "top_k"),
    ([1], {"max_tokens": -1}, "max_tokens"), ([1], {"stop": [""]}, "stop"), ([1], {"stop": [3]}, "stop"),
    ([1], {"stop_token_ids": ["a"]}, "stop_token_ids"), ([1], {"seed": "x"}, "seed"), ([1], {"logprobs": 5}, "logprob"),
    ([1], {"temperature": "hot"}, "temperature"), ([1], {"stop": 5}, "stop"), ([1], {"stop_token_ids": 1.5}, "_ids"),
    ([1], {"max_tokens": "all"}, "max_tokens")])
def test_bad_requests_are_refused_before_anything_changes(tiny, small_pool, prompt, params, says):
    with pytest.raises(ValueError, match=says):
        small_pool.generate([[1, 2], prompt], SamplingParams(**params), use_tqdm=False)
    assert not small_pool.has_unfinished() and not small_pool.scheduler.waiting
    with pytest.raises(ValueError, match=says):
        small_pool.add_request(prompt, SamplingParams(**params))
    assert len(serve(small_pool, [[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))[0]["token_ids"]) == 3


@pytest.fixture(scope="module")
def small_pool(tiny):
    return LLM(tiny, max_model_len=256, num_gpu_blocks_override=8)


def test_bad_settings_are_refused_in_words(tiny, tmp_path):
    for wrong, says in ((dict(max_num_seqs=0), "max_num_seqs"), (dict(max_model_len=10**6), "positions up to"),
                        (dict(max_model_len=0), "max_model_len"), (dict(num_gpu_blocks_override=-3), "num_gpu_blocks"),
                        (dict(dtype="int7"), "dtype"), (dict(seed="x"), "seed"), (dict(seed=None), "seed"),
                        *((dict(gpu_memory_utilization=x), "gpu_memory_utilization") for x in (5, 0, -1, math.nan)),
                        (dict(tensor_parallel_size=0), "tp"),
                        (dict(tensor_parallel_size=2), "torchrun")):
        with pytest.raises(ValueError, match=says):
            LLM(tiny, **wrong)
    with pytest.raises(TypeError, match="swap"):
        LLM(tiny, swap=3)
    with pytest.raises(FileNotFoundError):
        LLM(str(tmp_path / "nowhere"))
    engine = LLM(tiny, max_model_len=64)
    with pytest.raises(ValueError, match="3 prompts and 2"):
        engine.generate([[1]] * 3, [SamplingParams()] * 2)
    with pytest.raises(ValueError, match="SamplingParams"):
        engine.generate([[1]], {"temperature": 1})
    for talk in ("hi", ["hi"], [["hi"]], None, {"role": "user", "content": "hi"}):
        with pytest.raises(ValueError, match="conversation"):
            engine.chat(talk)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_exception_in_the_middle_leaves_an_engine_that_works(tiny, overlap, monkeypatch):
    engine = LLM(tiny, max_model_len=128, max_num_seqs=4, async_scheduling=overlap)
    prompts, params = some_prompts(3, 9, 40), SamplingParams(seed=1, **FULL)
    others = [[250] + prompt * 2 for prompt in prompts]
    want, others_want = (tokens_of(serve(LLM(tiny, max_model_len=128), x, params)) for x in (prompts, others))
    bystander = engine.add_request(prompts[0], params)
    engine.step()
    for where, when in (("_forward", 1), ("launch", 3), ("_fill", 5)):
        honest, left = getattr(E.Runner, where), [when]

        def fails(*args, honest=honest, left=left, **kw):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return honest(*args, **kw)

        monkeypatch.setattr(E.Runner, where, fails)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(others, params, use_tqdm=False)
        monkeypatch.setattr(E.Runner, where, honest)
        check(engine.scheduler)
        assert list(engine.requests) == [bystander], "the requests of generate are gone, the other one is not"
    while engine.has_unfinished():
        outputs = engine.step()
    assert tokens_of(outputs) == want[:1]
    assert tokens_of(serve(engine, prompts + others, params)) == want + others_want, "a page that was never filled"


def perturbed(folder, seed):
    rng = torch.Generator().manual_seed(seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=rng) for name, value in
            P.read_folder(Path(folder))}


@pytest.mark.parametrize("overlap", [False, True])
def test_new_weights_reach_every_later_token_and_no_stale_page_survives(tiny, tmp_path, overlap):
    settings = dict(max_model_len=128, max_num_seqs=4, block_size=4, async_scheduling=overlap)
    new = perturbed(tiny, 1)
    updated, engine = LLM(tiny, **settings), LLM(tiny, **settings)
    updated.update_weights(new)
    prompts, params = some_prompts(6, 7, 50), SamplingParams(seed=2, **FULL)
    old_tokens, new_tokens = tokens_of(serve(engine, prompts, params)), tokens_of(serve(updated, prompts, params))
    assert all(a != b for a, b in zip(old_tokens, new_tokens))
    pointers = [p.data_ptr() for p in engine.model.parameters()]
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    outputs = {}
    for _ in range(9):
        outputs |= {o.request_id: o for o in engine.step()}
    engine.update_weights(new, version=7)
    assert engine.weight_version == 7 and pointers == [p.data_ptr() for p in engine.model.parameters()]
    while engine.has_unfinished():
        outputs |= {o.request_id: o for o in engine.step()}
        check(engine.scheduler)
    crossed = 0
    for prompt, i in zip(prompts, ids):
        one = outputs[i].outputs[0]
        old = one.versions.count(0)
        assert one.versions == [0] * old + [7] * (20 - old)
        crossed += 0 < old < 20
        # under new weights it goes on as if its old tokens had been a prompt, and reports what the new model thinks
        text = prompt + one.token_ids
        assert np.allclose(updated.score([text])[0][len(prompt) + old:], one.logprobs[old:], atol=2e-5)
    assert crossed >= 3
    assert tokens_of(serve(engine, prompts, params)) == new_tokens, "a page of the old weights was found"


def test_weights_come_from_a_state_dict_a_folder_or_read_only_arrays(tiny, tmp_path):
    engine, new = LLM(tiny, max_model_len=64), perturbed(tiny, 2)
    greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    old = tokens_of(serve(engine, [[1, 2, 3]], greedy))
    engine.update_weights(new)
    want = tokens_of(serve(engine, [[1, 2, 3]], greedy))
    assert want != old and engine.weight_version == 1
    engine.update_weights(tiny)
    assert tokens_of(serve(engine, [[1, 2, 3]], greedy)) == old and engine.weight_version == 2
    arrays = {name: value.numpy().copy() for name, value in new.items()}
    for a in arrays.values():
        a.flags.writeable = False
    engine.update_weights(arrays, version=40)
    assert tokens_of(serve(engine, [[1, 2, 3]], greedy)) == want and engine.weight_version == 40
    for bad in ({**new, "model.norm.weight": torch.ones(3)}, {k: v for k, v in new.items() if "norm" not in k},
                {**new, "what.is.this": torch.ones(3)}, None, {k: v.long() for k, v in new.items()}):
        with pytest.raises(ValueError):
            engine.update_weights(bad)
    with pytest.raises(ValueError, match="mode"):
        engine.update_weights(new, mode="hope")
    with pytest.raises(FileNotFoundError):
        engine.update_weights(str(tmp_path / "nowhere"))
    another = P.tiny_model(tmp_path / "another", num_hidden_layers=2, hidden_size=64, intermediate_size=96, seed=1,
                           num_key_value_heads=1)
    with pytest.raises(ValueError, match="the model wants"):
        engine.update_weights(another)
    with pytest.raises(ZeroDivisionError):              # half way through weights that are made as they are read
        engine.update_weights((name, value * (2 / (name != "model.norm.weight"))) for name, value in new.items())
    assert tokens_of(serve(engine, [[1, 2, 3]], greedy)) == want and engine.weight_version == 40


@pytest.mark.parametrize("overlap", [False, True])
def test_new_weights_can_end_what_is_in_flight(tiny, overlap):
    engine = LLM(tiny, max_model_len=128, max_num_seqs=3, async_scheduling=overlap)
    prompts, params = some_prompts(6, 6, 30), SamplingParams(seed=2, n=2, **FULL)
    want = tokens_of(serve(engine, prompts, params))
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    outputs = {}
    for _ in range(25):
        outputs |= {o.request_id: o for o in engine.step()}
    engine.update_weights(perturbed(tiny, 1), mode="abort")
    assert not engine.requests and engine.has_unfinished()
    outputs |= {o.request_id: o for o in engine.step()}
    assert not engine.has_unfinished() and sorted(outputs) == sorted(ids)
    reasons = [one.finish_reason for i in ids for one in outputs[i].outputs]
    assert {"abort", "length"} == set(reasons)
    for i, whole in zip(ids, want):
        for one, tokens in zip(outputs[i].outputs, whole):
            assert one.token_ids == tokens[:len(one.token_ids)] and set(one.versions) <= {0}
            assert len(one.token_ids) == len(one.logprobs) == len(one.versions)
    check(engine.scheduler)


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_are_aborted_in_every_state(tiny, overlap):
    engine = LLM(tiny, max_model_len=128, max_num_seqs=2, max_num_batched_tokens=16, async_scheduling=overlap,
                 enable_prefix_caching=False)
    params = SamplingParams(seed=1, **FULL)
    whole = serve(engine, [[1] * 40, [2] * 5], params)
    states = {"waiting": 0, "in a chunk": 1, "running": 6, "over": 60}
    for state, steps in states.items():
        ids = [engine.add_request(prompt, params) for prompt in ([1] * 40, [2] * 5, [3] * 5)]
        outputs = {}
        for _ in range(steps):
            outputs |= {o.request_id: o for o in engine.step()}
        for i in ids:
            engine.abort(i)
            engine.abort(i)
            check(engine.scheduler)
        engine.abort("nobody")
        outputs |= {o.request_id: o for o in engine.step()}
        assert sorted(outputs) == sorted(ids) and not engine.has_unfinished()
        first = outputs[ids[0]].outputs[0]
        assert first.finish_reason == ("length" if state == "over" else "abort")
        assert first.token_ids == whole[0]["token_ids"][:len(first.token_ids)]
        assert (len(first.token_ids) > 0) == (state in ("running", "over"))
        assert first.text == engine.tokenizer.decode(first.token_ids, skip_special_tokens=True)
        assert len(engine.scheduler.blocks.free) == engine.scheduler.blocks.count
    assert tokens_of(serve(engine, [[1] * 40, [2] * 5], params)) == tokens_of(whole)


def test_sleep_and_wake_keep_requests_and_do_not_grow(tiny):
    engine = LLM(tiny, max_model_len=128, max_num_seqs=4, async_scheduling=True)
    prompts, params = some_prompts(3, 9, 40), SamplingParams(seed=1, **FULL)
    want = dict(zip(map(str, range(9, 18)), tokens_of(serve(engine, prompts, params))))
    for prompt in prompts:
        engine.add_request(prompt, params)
    outputs, sizes = {}, set()
    for _ in range(20):
        outputs |= {o.request_id: o for o in engine.step()}
        engine.sleep()
        assert engine.runner.cache is None and not engine.runner.graphs
        with pytest.raises(ValueError, match="wake"):
            engine.step()
        assert engine.score([[1, 2, 3]])[0][0] == 0.0
        engine.wake()
        sizes.add(engine.runner.cache.nbytes)
        outputs |= {o.request_id: o for o in engine.step()}
        check(engine.scheduler)
    while engine.has_unfinished():
        outputs |= {o.request_id: o for o in engine.step()}
    assert {i: tokens_of([o])[0] for i, o in outputs.items()} == want and len(sizes) == 1


def test_an_engine_that_is_gone_keeps_no_cache_and_no_graphs(tiny):
    """Nor does the program at its end: NCCL would wait for the graphs."""
    engine = LLM(tiny, max_model_len=64, max_num_seqs=2)
    runner = engine.runner
    engine.generate("hello", SamplingParams(max_tokens=3), use_tqdm=False)
    assert runner.cache is not None
    del engine
    gc.collect()
    assert runner.cache is None and not runner.graphs


def test_score_does_not_depend_on_company_and_leaves_requests_alone(tiny):
    engine = LLM(tiny, max_model_len=128, max_num_batched_tokens=50)
    texts = some_prompts(13, 8, 60)
    alone = [engine.score([text], 0.7)[0] for text in texts]
    engine.add_request(texts[0], SamplingParams(max_tokens=5))
    engine.step()
    together = engine.score(texts, temperature=0.7)
    assert all(np.allclose(a, b, atol=1e-5) and len(a) == len(text) for a, b, text in zip(alone, together, texts))
    assert engine.score([]) == [] and engine.has_unfinished()
    assert engine.score("hello") == engine.score(engine.tokenizer.encode("hello")) == engine.score(["hello"])
    for bad in ([[]], [[1, 999]], [[1] * 129], ["abc", None], None, 5):
        with pytest.raises(ValueError):
            engine.score(bad)


class Pretender:
    """Stands in for the runner: its cache holds, at each slot, the whole prefix that a key is computed from, so that a
    stale, shared or lost page is seen at the very token that reads it. The next token is a function of all before."""

    def __init__(self, scheduler):
        self.scheduler, self.cells, self.latest, self.version = scheduler, {}, {}, 0

    def next(self, prefix):
        return hash((tuple(prefix), 5)) % 11

    def launch(self, batch):
        size, texts = self.scheduler.blocks.size, []
        for r in batch:
            known = r.tokens[:r.computed + r.scheduled]
            text = known if len(known) == r.computed + r.scheduled else [*known, self.latest[r.seat]]
            texts.append(text)
            for at in range(r.computed, len(text)):
                cell = self.scheduler.table[r.seat, at // size], at % size
                self.cells[cell] = self.version, hash(tuple(text[:at + 1]))
        for r, text in zip(batch, texts):
            for at in range(len(text)):
                cell = self.cells[self.scheduler.table[r.seat, at // size], at % size]
                assert cell == (self.version, hash(tuple(text[:at + 1]))), "read what another one wrote"
            self.latest[r.seat] = self.next(text)
        tokens = torch.tensor([self.latest[r.seat] for r in batch])
        return E.Launch(batch, tokens, torch.zeros(len(batch)), None)


@pytest.mark.parametrize("seed", range(6))
def test_pages_and_references_add_up_in_thousands_of_random_steps(llm, seed):
    """The real LLM and Scheduler over a pretended device: arrivals, aborts, preemptions, updates, exceptions."""
    rng = random.Random(seed)
    size, overlap = rng.choice([1, 2, 4, 8]), seed % 2 == 0
    pages, seats = rng.randint(64 // size, 100 // size), rng.randint(4, 9)
    engine = object.__new__(LLM)
    engine.__dict__.update(llm.__dict__, requests={}, finished={}, under_way=None, overlap=overlap, max_model_len=64)
    engine.scheduler = E.Scheduler(E.Blocks(pages, size), np.zeros([seats, -(-64 // size)], np.int32),
                                   [1, 5, 16, 40, 64, 100][seed])
    engine.runner = Pretender(engine.scheduler)
    stems, asked, got, aborted = [[rng.randrange(3) for _ in range(40)] for _ in range(3)], {}, {}, set()
    for _ in range(2000):
        if rng.random() < 0.4 and len(engine.requests) < 20:
            prompt = rng.choice(stems)[:rng.randint(1, 40)] + [rng.randrange(3) for _ in range(rng.randint(0, 5))]
            params = SamplingParams(n=rng.choice([1, 1, 1, 4]), max_tokens=rng.randint(0, min(18, size * pages - 46)),
                                    stop_token_ids=[rng.randrange(40)], ignore_eos=True)
            asked[engine.add_request(prompt, params)] = prompt, params
        if rng.random() < 0.02 and engine.requests:
            aborted.add(rng.choice(list(engine.requests)))
            engine.abort(max(aborted, key=int))
        if rng.random() < 0.01:
            engine._settle()
            engine.scheduler.retract()
            engine.runner.version += 1
        if rng.random() < 0.01 and engine.requests:
            engine.runner.launch, honest = None, engine.runner.launch       # not to be called: a TypeError
            with contextlib.suppress(TypeError):
                got |= {output.request_id: output for output in engine.step()}
            engine.runner.launch = honest
        for output in engine.step():
            assert output.request_id not in got
            got[output.request_id] = output
        check(engine.scheduler)
    while engine.has_unfinished():
        got |= {output.request_id: output for output in engine.step()}
        check(engine.scheduler)
    assert len(engine.scheduler.blocks.free) == pages and sorted(got) == sorted(asked) and len(asked) > 40
    assert engine.scheduler.cached_tokens > 100 and aborted and (engine.scheduler.preemptions > 10 or seed == 0)
    for i, (prompt, params) in asked.items():
        for one in got[i].outputs:
            want = []
            while len(want) < params.max_tokens and (not want or want[-1] not in params.stop_token_ids):
                want.append(engine.runner.next(prompt + want))
            if i in aborted and one.finish_reason == "abort":
                want = want[:len(one.token_ids)]
            assert one.token_ids == want


def test_empty_rows_at_the_end_of_a_step_change_nothing(tiny):
    """As a CUDA graph has them, whose sizes come from a list."""
    engine = LLM(tiny, max_model_len=64, max_num_seqs=8, block_size=4)
    for i in range(5):
        engine.add_request([i + 1] * (3 * i + 2), SamplingParams(seed=i, **FULL))
    for _ in range(3):
        engine.step()
    runner, batch = engine.runner, engine.scheduler.schedule()
    assert [r.scheduled for r in batch] == [1] * 5
    results = []
    for rows in (5, 8):
        x = E._inputs(rows, rows, runner.width, lambda n: torch.full([n], 255, dtype=torch.uint8))
        runner._fill(x, batch)
        results.append([y[:5].tolist() for y in runner._forward(x, rows, None)])
    assert results[0][0] == results[1][0] and np.allclose(results[0][1], results[1][1], atol=1e-5)
    for seats in (1, 2, 3, 8, 9, 16, 33, 100, 256):
        sizes = LLM(tiny, max_model_len=64, max_num_seqs=seats).runner.sizes
        assert sizes[-1] == seats and sizes == sorted(set(sizes)) and sizes[0] == 1


WITH_KERNELS = """
import json, sys, torch
torch.set_num_threads(1)
from engine import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=64, max_num_seqs=4, block_size=8, max_num_batched_tokens=16, async_scheduling=True)
params = [SamplingParams(temperature=t, top_k=k, seed=3, max_tokens=4, ignore_eos=True)
          for t, k in ((0, -1), (1, -1), (1, 5))]
outputs = llm.generate([[1, 2, 3], list(range(20)), [7] * 9], params, use_tqdm=False)
print(json.dumps([[o["token_ids"] for o in outputs], [o["logprobs"] for o in outputs], llm.score([[1, 2, 3, 4]])]))
"""


def test_the_kernels_give_what_their_references_give(tiny):
    """The whole engine on interpreted Triton: shapes, strides and integer types are what the kernels want."""
    found = []
    for interpret in ("0", "1"):
        done = subprocess.run([sys.executable, "-c", WITH_KERNELS, tiny], cwd=HERE, capture_output=True, text=True,
                              timeout=300, env=os.environ | {"TRITON_INTERPRET": interpret})
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0][0] == found[1][0]
    assert all(np.allclose(a, b, atol=1e-4) for part in (1, 2) for a, b in zip(found[0][part], found[1][part]))


def test_engine_demo_runs_and_the_terminal_answers(tiny):
    run = [sys.executable, str(HERE / "engine.py")]
    settings = dict(capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    demo = subprocess.run(run, **settings)
    assert demo.returncode == 0 and "the same tokens" in demo.stdout and "transformers" in demo.stdout, demo.stderr
    answer = subprocess.run([*run, "--model", tiny, "--temperature", "0", "--max_tokens", "20", "2 + 2?"], **settings)
    llm = LLM(tiny, max_num_seqs=1)
    want, = llm.chat([{"role": "user", "content": "2 + 2?"}], SamplingParams(temperature=0, max_tokens=20), False)
    assert answer.returncode == 0 and answer.stdout.strip() == want["text"].strip(), answer.stderr
    for words, says in ((["--tempreature", "0"], "tempreature"), (["2 + 2?"], "give --model")):
        wrong = subprocess.run([*run, *words], **settings)
        assert wrong.returncode != 0 and says in wrong.stderr


def test_the_terminal_adds_no_special_tokens_to_those_of_the_template(tiny, tmp_path, capsys, monkeypatch):
    for file in Path(tiny).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(sys, "argv", ["engine.py", "--model", str(tmp_path), "--temperature", "0", "--max_tokens", "20",
                                      "2 +", "2?"])
    E.main()
    llm = LLM(str(tmp_path), max_num_seqs=1)
    assert llm.generate("2", SamplingParams(), False)[0].prompt_token_ids[0] == 256
    want, = llm.chat([{"role": "user", "content": "2 + 2?"}], SamplingParams(temperature=0, max_tokens=20), False)
    assert 256 not in want.prompt_token_ids and capsys.readouterr().out.strip() == want["text"].strip()


@gpu
def test_graphs_and_overlap_give_the_tokens_of_eager_steps_at_every_batch_size(tiny):
    want = None
    for eager, overlap in ((True, False), (False, False), (False, True)):
        engine = LLM(tiny, max_model_len=256, max_num_seqs=21, enforce_eager=eager, async_scheduling=overlap,
                     gpu_memory_utilization=0.3)
        got = []
        for batch in range(1, 22):
            params = [SamplingParams(seed=i, temperature=i % 3 / 2, max_tokens=6 + i, ignore_eos=True)
                      for i in range(batch)]
            got.append(tokens_of(serve(engine, some_prompts(batch, batch), params)))
        want = want or got
        assert got == want and sorted(engine.runner.graphs) == ([] if eager else engine.runner.sizes)


@gpu
def test_bf16_on_the_gpu_differs_from_fp32_only_where_the_best_two_are_close(tiny):
    exact, engine = LLM(tiny, max_model_len=256, dtype="float32", device="cpu"), LLM(tiny, max_model_len=256)
    prompts, greedy = some_prompts(5, 30, 100), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for prompt, output in zip(prompts, serve(engine, prompts, greedy)):
        text = prompt + output["token_ids"]
        best = exact.score([text])[0]
        ends = torch.tensor([0, len(text)], dtype=torch.int32)
        hidden = exact.model(torch.tensor(text), torch.arange(len(text)), P.packed(ends, len(text)))
        top = exact.model.logits(hidden).log_softmax(-1).amax(-1)
        assert max(top[i - 1].item() - best[i] for i in range(len(prompt), len(text))) < 0.1


@gpu
def test_sleep_gives_the_memory_back_twenty_times(tiny):
    engine = LLM(tiny, max_model_len=256, gpu_memory_utilization=0.5)
    awake, asleep = [], []
    for _ in range(20):
        serve(engine, some_prompts(1), SamplingParams(**FULL))
        awake.append(torch.cuda.memory_reserved())
        engine.sleep()
        asleep.append(torch.cuda.memory_reserved())
        engine.wake()
    assert max(awake) <= awake[0] * 1.05 and max(asleep) <= asleep[0] * 1.05 and asleep[0] < awake[0] / 2


def generate_split(folder, tp, prompts, params):
    calls, outputs = [], {}
    engine = LLM(folder, tensor_parallel_size=tp, dtype="float64", max_model_len=128, max_num_seqs=5, device="cpu",
                 num_gpu_blocks_override=30, block_size=4, max_num_batched_tokens=32, async_scheduling=True)
    for name in [x for x in dir(dist) if callable(getattr(dist, x)) and x.startswith((
            "all_", "broadcast", "send", "recv", "isend", "irecv", "gather", "scatter", "reduce", "barrier", "batch"))]:
        honest = getattr(dist, name)
        setattr(dist, name, lambda *a, name=name, honest=honest, **kw: calls.append(name) or honest(*a, **kw))
    for prompt, one in zip(prompts, params):
        engine.add_request(prompt, one)
    while engine.has_unfinished():
        calls.append("step")
        outputs |= {o.request_id: o for o in engine.step()}
        check(engine.scheduler)
    ordered = [outputs[i] for i in sorted(outputs, key=int)]
    score = engine.score([[1, 2, 3, 4]])
    return tokens_of(ordered), [one.logprobs for o in ordered for one in o.outputs], calls, score, \
        engine.scheduler.preemptions


def test_two_ranks_generate_as_one_and_send_nothing_but_what_layers_need(tiny):
    prompts = some_prompts(21, 12, 40)
    params = [SamplingParams(seed=i, temperature=0.9, n=1 + i % 2, max_tokens=5 + i, ignore_eos=i % 2 == 0)
              for i in range(12)]
    (want, want_logprobs, _, want_score, preemptions), = on_ranks(1, generate_split, tiny, 1, prompts, params)
    for got, logprobs, calls, score, _ in on_ranks(2, generate_split, tiny, 2, prompts, params):
        assert got == want and preemptions > 0
        assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(logprobs, want_logprobs))
        assert np.allclose(score, want_score, atol=1e-6)
        steps = [x.split() for x in " ".join(calls).split("step")[1:]]
        kinds = {tuple(sorted(step)) for step in steps if step}
        assert len(kinds) <= 2 and all(len(step) <= 2 * 2 + 2 for step in steps[:-1]), kinds


# --- sft.py ----------------------------------------------------------------------------------------------------------

SHARED = HERE.parent / "shared"
GSM8K = SHARED / "data" / "gsm8k_train.jsonl"
needs_data = pytest.mark.skipif(not GSM8K.exists(), reason="needs ../shared/data")


@pytest.fixture(scope="session")
def qwen3_tokenizer(tmp_path_factory):
    """The real one, 151,669 tokens, with its template."""
    from transformers import AutoTokenizer
    script, folder = SHARED / "tools" / "get_qwen3_tokenizer.sh", tmp_path_factory.mktemp("qwen3")
    if not script.exists() or subprocess.run(["bash", script, folder], capture_output=True, timeout=120).returncode:
        pytest.skip("needs ../shared/tools and npm")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    from transformers import AutoTokenizer
    folder = Path(tempfile.gettempdir(), "smollm2")
    if not folder.exists():
        pytest.skip(f"needs python ../shared/tools/get_smollm2.py {folder}")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def lean(tmp_path_factory):
    """A model directory small enough for tests, with a tokenizer of bytes."""
    return str(P.tiny_model(tmp_path_factory.mktemp("lean")))


def talk(*turns):
    """A conversation, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def check_mask(tokenizer, messages, pieces):
    """`pieces`: the conversation as it has to be written, the assistant's words in lists."""
    (ids, mask), = sft.Chat(tokenizer).encode([sft.Chat(tokenizer).pieces(messages)])
    parts = [(piece[0], 1) if isinstance(piece, list) else (piece, 0) for piece in pieces]
    tokens = [(t, learned) for text, learned in parts for t in tokenizer.encode(text, add_special_tokens=False)]
    assert list(zip(ids.tolist(), mask.tolist())) == tokens
    tidy = [message | {"content": message["content"].strip()} for message in messages]
    assert ids.tolist() == tokenizer.apply_chat_template(tidy, return_dict=False)       # nothing that it would not say


def test_the_mask_is_the_assistants_tokens_and_the_end_of_turn_in_qwen3(qwen3_tokenizer):
    user, head, no_thoughts = "<|im_start|>user\n", "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    end = "<|im_end|>"
    check_mask(qwen3_tokenizer, talk("What is 1+1?", "It is $2$.\n\n\\boxed{2}"),
               [f"{user}What is 1+1?{end}\n{head}{no_thoughts}", [f"It is $2$.\n\n\\boxed{{2}}{end}"], "\n"])
    check_mask(qwen3_tokenizer, [{"role": "system", "content": "Be brief."}, *talk("a", "日本 😀 b", "c", "d e")],
               [f"<|im_start|>system\nBe brief.{end}\n{user}a{end}\n{head}", [f"日本 😀 b{end}"],
                f"\n{user}c{end}\n{head}{no_thoughts}", [f"d e{end}"], "\n"])
    check_mask(qwen3_tokenizer, talk("a", "<think>\nhm\n</think>\n\nb"),
               [f"{user}a{end}\n{head}", [f"<think>\nhm\n</think>\n\nb{end}"], "\n"])


def test_the_mask_is_the_assistants_tokens_and_the_end_of_turn_in_smollm2(smollm2_tokenizer):
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    check_mask(smollm2_tokenizer, talk("What is 1+1?", "\n It is $2$.\n\n12", "and 2+2?", "4\n"),
               [f"{system}<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n",
                ["It is $2$.\n\n12<|im_end|>"],
                "\n<|im_start|>user\nand 2+2?<|im_end|>\n<|im_start|>assistant\n", ["4<|im_end|>"], "\n"])


@needs_data
@pytest.mark.parametrize("which", ["qwen3_tokenizer", "smollm2_tokenizer"])
def test_the_mask_holds_on_every_row_of_gsm8k(which, request):
    tokenizer = request.getfixturevalue(which)
    chat, rows = sft.Chat(tokenizer), [json.loads(line) for line in GSM8K.read_text().splitlines()[::10]]
    talks = [sft.conversations(row)[""] for row in rows]
    for messages, (ids, mask) in zip(talks, chat.encode([chat.pieces(messages) for messages in talks])):
        assert ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
        assert tokenizer.decode(ids[mask == 1]) == messages[1]["content"] + "<|im_end|>"
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, enable_thinking=False,
                                               return_dict=False)
        assert ids[: len(prompt)].tolist() == prompt and mask[: len(prompt)].sum() == 0 and mask[len(prompt)]


def test_a_template_has_to_end_turns_with_one_token_where_generation_can_end_too(lean):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(lean)
    for end, fine in (("<|im_end|>\n", True), ("", False), ("</turn>", False), ("<|im_end|><|endoftext|>", False)):
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
        with contextlib.nullcontext() if fine else pytest.raises(ValueError, match="with one token"):
            assert sft.Chat(tokenizer).end == "<|im_end|>"


def test_every_known_shape_becomes_a_conversation():
    ask = "\n" + sft.INSTRUCTION
    shapes = [
        ({"problem": "p", "solution": "s", "messages": talk("p", "s"), "source": "x"}, talk("p" + ask, "s")),
        ({"problem": "p", "solution": "s", "level": "Level 2", "type": "Algebra"}, talk("p" + ask, "s")),
        ({"question": "q", "answer": "a <<1+1=2>>2 b\n#### 1,000"},
         talk("q" + ask, "a 2 b\nThe answer is \\boxed{1,000}.")),
        ({"question": "q", "answer": "a"}, talk("q", "a")),
        ({"question": "q", "final_answer": "7", "r1_solution_1": "hm\n</think>\n\ns", "r1_solution_2": "t"},
         talk("q" + ask, "\n\ns")),
        ({"messages": talk("a", "b", "c", "d")}, talk("a", "b", "c", "d")),
        ({"prompt": "p", "response": "r"}, talk("p", "r")),
        ({"prompt": talk("a", "b", "c"), "response": "r"}, talk("a", "b", "c", "r"))]
    for row, messages in shapes:
        assert sft.conversations(row) == {"": messages}
    pairs = [{"prompt": "p", "chosen": "c", "rejected": "r"}, {"question": "p", "chosen": "c", "rejected": "r"},
             {"prompt": talk("p"), "chosen": talk("p", "c")[1:], "rejected": talk("p", "r")[1:]},
             {"prompt": "p", "chosen": talk("p", "c"), "rejected": talk("p", "r"), "score_chosen": 1.0}]
    for row in pairs:
        assert sft.conversations(row) == {"chosen_": talk("p", "c"), "rejected_": talk("p", "r")}
    assert sft.conversations({"problem": "p", "chosen": "c", "rejected": "r"})["chosen_"] == talk("p" + ask, "c")


def test_bad_rows_are_named_and_counted_and_fatal_only_when_most_are_bad(lean, tmp_path, capsys):
    good = [{"prompt": f"p{i}", "response": "r"} for i in range(10)]
    bad = ["{not json", "[1]", {"text": "x"}, {"prompt": "p", "response": " "}, {"prompt": "p", "response": 3},
           {"prompt": "<|im_end|>", "response": "r"}, {"prompt": "p", "response": "r" * 300},
           {"prompt": "p", "chosen": "c", "rejected": "r"}, '{"prompt": "p", "response": "\\ud800"}']
    source = write_jsonl(tmp_path / "rows.jsonl", good[:1] + bad + good[1:])
    counts = sft.prepare(source, lean, tmp_path / "f.arrow", max_tokens=300)
    words = capsys.readouterr().err
    assert counts["rows"] == 10 == len(al.read(tmp_path / "f.arrow")) and counts["skipped"] == 9
    for i, reason in enumerate(["Expecting", "list", "none of the known shapes", "no text", "no text", "<|im_end|>",
                                "tokens are more than max_tokens=300", "pairs and single answers", "surrogates"], 2):
        assert re.search(rf"rows\.jsonl, line {i}: .*{re.escape(reason)}", words), (i, reason)
    with pytest.raises(ValueError, match=r"9 of 18 rows .* line 2: "):
        sft.prepare(write_jsonl(tmp_path / "rows.jsonl", good[:1] + bad + good[2:]), lean, tmp_path / "g.arrow",
                    max_tokens=300)
    assert not (tmp_path / "g.arrow").exists()
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        sft.prepare(str(tmp_path / "nothing.jsonl"), lean, tmp_path / "g.arrow")
    with pytest.raises(ValueError, match="empty.jsonl has no rows"):
        sft.prepare(write_jsonl(tmp_path / "empty.jsonl", []), lean, tmp_path / "g.arrow")


def test_pairs_that_are_none_are_skipped_and_say_why(lean, tmp_path, capsys):
    good = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(6)]
    bad = [{"prompt": "p", "chosen": "c", "rejected": "c"}, {"chosen": talk("p", "c"), "rejected": talk("q", "c")},
           {"chosen": "c", "rejected": "r"}, {"chosen": [], "rejected": talk("p", "c")}, {"messages": []}]
    source = write_jsonl(tmp_path / "pairs.json", bad + good)
    assert sft.prepare(source, lean, tmp_path / "pairs.arrow")["rows"] == 6
    words = capsys.readouterr().err
    for i, reason in enumerate(["chosen and rejected are the same", "chosen and rejected answer different prompts",
                                "there is no prompt, question or problem", "there is no prompt", "has no turns"], 1):
        assert re.search(rf"pairs\.json, line {i}: .*{reason}", words), (i, reason)
    with pytest.raises(ValueError, match="--held_out 2 is a share"):
        sft.prepare(source, lean, tmp_path / "none.arrow", held_out=2)


def test_rows_stream_through_a_thousand_at_a_time(lean, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    seen, written = [], []

    def rows():
        for i in range(3500):
            seen.append(i)
            assert len(seen) - sum(written) <= 1001
            yield {"prompt": f"{i}", "response": "r"}

    def tokenize(chat, group, *args, keep=sft.tokenize):
        written.append(len(group))
        return keep(chat, group, *args)

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows())
    monkeypatch.setattr(sft, "tokenize", tokenize)
    assert sft.prepare("org/name", lean, tmp_path / "f.arrow")["rows"] == 3500 == sum(written)


def test_held_out_prompts_never_leak_into_training(lean, tmp_path):
    rows = [{"problem": f"What is {i % 300} + 1?" if i < 300 else f" what  IS {i % 300}\n+ 1?", "solution": f"s{i}"}
            for i in range(600)]                            # each problem twice: other spaces, another solution
    out = tmp_path / "f.arrow"
    sft.prepare(write_jsonl(tmp_path / "a.jsonl", rows), lean, out, held_out=0.25)
    first = al.read(out)["held_out"].to_numpy()
    assert (first[:300] == first[300:]).all() and 45 <= first[:300].sum() <= 105        # 75 +- 4 sigma
    sft.prepare(write_jsonl(tmp_path / "a.jsonl", rows[200:100:-1]), lean, out, held_out=0.25)
    assert (al.read(out)["held_out"].to_numpy() == first[200:100:-1]).all()             # in whatever file it is
    examples = sft.Examples(out)
    assert sorted([*examples.held_out, *examples.learned]) == list(range(100))


def test_jsonl_arrow_parquet_directories_and_the_hub_say_the_same(lean, tmp_path, monkeypatch):
    rows = [{"messages": talk(f"a{i}", "b" * i)} for i in range(1, 40)]
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet
    table, folder = al.Table.from_pylist(rows), tmp_path / "folder"
    folder.mkdir()
    al.write(table, tmp_path / "a.arrow")
    al.write(table, tmp_path / "stream.arrow", stream=True)
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    al.write(table[:20], folder / "0.arrow", stream=True)
    write_jsonl(folder / "1.jsonl", rows[20:])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: iter(rows) if (
        name, split, streaming) == ("org/name-2.5", "train", True) else None)
    sft.prepare(write_jsonl(tmp_path / "a.jsonl", rows), lean, tmp_path / "want.arrow")
    want = al.read(tmp_path / "want.arrow").to_pylist()
    for source in ("a.arrow", "stream.arrow", "a.parquet", "folder", "org/name-2.5"):
        source = source if source == "org/name-2.5" else str(tmp_path / source)
        sft.prepare(source, lean, tmp_path / "got.arrow")
        assert al.read(tmp_path / "got.arrow").to_pylist() == want, source


def first_fit_decreasing(lengths, capacity):
    loads = []
    for n in sorted(lengths, reverse=True):
        b = next((b for b, load in enumerate(loads) if load + n <= capacity), len(loads))
        loads[b:b + 1] = [n + (loads[b] if b < len(loads) else 0)]
    return len(loads)


def test_packing_is_no_worse_than_first_fit_and_balanced_over_ranks():
    rng = np.random.default_rng(0)
    for trial in range(60):
        n, capacity, ranks = int(rng.integers(1, 80)), 1000, int(rng.integers(1, 5))
        lengths = rng.integers(1, [50, 300, 700, 1001][trial % 4], n)
        bins = sft.pack(lengths, capacity, ranks)
        loads = [int(lengths[b].sum()) for b in bins]
        assert sorted(row for b in bins for row in b) == list(range(n)) and max(loads) <= capacity
        assert len(bins) % ranks == 0 and bins == sft.pack(lengths.tolist(), capacity, ranks)
        assert len(bins) < first_fit_decreasing(lengths, capacity) + ranks
    with pytest.raises(ValueError, match="1,001 tokens .* --max_tokens"):
        sft.pack([5, 1001], 1000)


@needs_data
def test_packing_gsm8k_wastes_less_than_two_percent(qwen3_tokenizer, tmp_path):
    sft.prepare(str(GSM8K), qwen3_tokenizer, tmp_path / "f.arrow")
    examples = sft.Examples(tmp_path / "f.arrow")
    for capacity in (2048, 4096, 8192):
        bins = sft.pack(examples.lengths, capacity)
        assert 1 - examples.lengths.sum() / (len(bins) * capacity) < 0.02
    for step in range(20):                              # in training nothing is padded: ranks only wait for the longest
        rows = examples.learned[sft.rows_of_step(step, len(examples.learned), 256, seed=1)]
        loads = [examples.lengths[rows[b]].sum() for b in sft.pack(examples.lengths[rows], 8192, 8)]
        assert max(loads) < 1.02 * np.mean(loads)


def test_each_epoch_is_every_row_once_in_an_order_of_its_own():
    steps = [sft.rows_of_step(step, 103, 10, seed=5) for step in range(30)]
    epochs = [np.concatenate(steps[i : i + 10]).tolist() for i in (0, 10, 20)]
    assert all(len(set(epoch)) == 100 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert (sft.rows_of_step(17, 103, 10, seed=5) == steps[17]).all()
    assert (sft.rows_of_step(17, 103, 10, seed=6) != steps[17]).any()
    assert sorted(sft.rows_of_step(4, 7, 10, seed=5)) == list(range(7))                 # fewer rows than a step


def test_a_micro_batch_is_packed_rows_whose_positions_restart(tmp_path):
    rows = [[7, 8, 9, 10], [1, 2, 3], [4, 5, 6, 7, 8]]
    masks = [[False, False, True, True], [False, True, False], [True, False, False, True, True]]
    al.write(al.Table.from_pydict({"input_ids": rows, "loss_mask": masks}), tmp_path / "f.arrow")
    examples = sft.Examples(tmp_path / "f.arrow")
    batch = examples.micro_batch([2, 0, 1], 6, "cpu")
    want = {"tokens": [4, 5, 6, 7, 8, 7, 8, 9, 10, 1, 2, 3], "cu_seqlens": [0, 5, 9, 12], "max_seqlen": 5, "count": 6,
            "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2], "predict": [2, 3, 6, 7, 9], "targets": [7, 8, 9, 10, 2],
            "rows": [2, 0, 1]}
    assert {k: v.tolist() if torch.is_tensor(v) else v for k, v in batch.items()} == want
    assert examples.mask([2, 0, 1]).sum() == 5 and len(examples.learned) == 3                # nothing is held out


SFT_SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=256)


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """A model for arithmetic in fp64."""
    return str(P.tiny_model(tmp_path_factory.mktemp("mini"), **SFT_SHAPE))


def random_rows(path, rows=40, pairs=False, seed=0, held_out=4):
    """A prepared file of random tokens, the last few rows held out."""
    rng, columns = np.random.default_rng(seed), {"held_out": [i >= rows - held_out for i in range(rows)]}
    for prefix in ("chosen_", "rejected_") if pairs else ("",):
        lengths, prompts = rng.integers(4, 40, rows), rng.integers(1, 4, rows)
        columns[prefix + "input_ids"] = [rng.integers(0, 256, n, dtype=np.int32) for n in lengths]
        columns[prefix + "loss_mask"] = [(np.arange(n) >= p).astype(np.uint8) for n, p in zip(lengths, prompts)]
    al.write(al.Table.from_pydict(columns), path)
    return str(path)


def trained(model, data, out, draw=False, **settings):
    """The metrics of a run in fp64, of 5 steps unless it says otherwise."""
    torch.set_num_threads(1)
    sft.curves = sft.curves if draw else lambda out: None               # a second each, in a child of its own
    settings = dict(steps=5, batch=10, lr=1e-3, max_tokens=128, dtype="float64", device="cpu") | settings
    sft.train(sft.Config(model, str(data), str(out), **settings))
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def check_layouts(model, data, tmp_path, loss, layouts):
    want, = on_ranks(1, functools.partial(trained, loss=loss), model, data, tmp_path / "one")
    assert len(want) == 5 and "val_loss" in want[-1]
    for i, layout in enumerate(layouts):
        train = functools.partial(trained, loss=loss, **layout)
        world = int(np.prod([layout.get(name, 1) for name in ("dp", "pp", "tp")]))
        got = on_ranks(world, train, model, data, tmp_path / str(i))[0]
        for mine, theirs in zip(got, want):
            for name in theirs.keys() & {"loss", "margin", "reward", "grad_norm", "lr", "tokens", "val_loss"}:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-10, abs=1e-13), (layout, name, mine["step"])


def test_every_layout_learns_the_curve_of_one_process(mini, tmp_path):
    check_layouts(mini, random_rows(tmp_path / "rows.arrow"), tmp_path, "sft",
                  [dict(dp=2), dict(tp=2), dict(pp=2), dict(dp=2, pp=2)])


def test_dpo_learns_the_same_over_layouts(mini, tmp_path):
    check_layouts(mini, random_rows(tmp_path / "rows.arrow", pairs=True), tmp_path, "dpo",
                  [dict(dp=2), dict(pp=2, tp=2)])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sft", "dpo", "ipo"])
def test_eight_processes_learn_the_curve_of_one(tmp_path, loss):
    model = str(P.tiny_model(tmp_path / "model", **SFT_SHAPE | dict(num_hidden_layers=4)))
    check_layouts(model, random_rows(tmp_path / "rows.arrow", pairs=loss != "sft"), tmp_path, loss,
                  [dict(dp=2, pp=2, tp=2), dict(dp=4, tp=2), dict(dp=8), dict(dp=3), dict(pp=2, tp=4),
                   dict(dp=2, pp=2, chunks=2), dict(pp=4)])


def packed_logprobs(model, examples, rows):
    batch = examples.micro_batch(rows, 1, "cpu")
    attend = P.packed(batch["cu_seqlens"], batch["max_seqlen"])
    hidden = model(batch["tokens"], batch["positions"], attend)
    return hidden, sft.logprobs(model, hidden, batch), batch


def neighbours_and_prompts(model, data):
    torch.set_num_threads(1)
    model, examples = P.Qwen3.from_pretrained(model, dtype=torch.float64, device="cpu"), sft.Examples(data)
    _, alone, _ = packed_logprobs(model, examples, [3])
    for neighbours in ([3, 5, 6], [5, 3, 6], [7, 8, 3]):
        tokens = examples.gather("input_ids", neighbours[: neighbours.index(3)])[0]
        hidden, packed, batch = packed_logprobs(model, examples, neighbours)
        before = sum(int(examples.mask([row]).sum()) for row in neighbours[: neighbours.index(3)])
        mine = packed[before : before + len(alone)]
        assert torch.allclose(mine, alone, rtol=0, atol=1e-12)
        embed, = [p for p in model.parameters() if p.shape == (259, 32) and p is not model.head_weight]
        grad, = torch.autograd.grad(mine.sum(), embed, retain_graph=True)
        own = set(examples.gather("input_ids", [3])[0].tolist())
        assert all(grad[t].abs().sum() == 0 for t in set(tokens.tolist()) - own)        # nothing flows to a neighbour
        loss, results = sft.sft_loss(model, hidden, batch)
        hidden.retain_grad()
        loss.backward()
        moved = hidden.grad.abs().sum(1).nonzero()[:, 0]
        assert moved.tolist() == batch["predict"].tolist() and results["loss"] == loss  # nothing is learned of prompts
        with torch.no_grad():                               # a poisoned neighbour: its words are not numbers
            kept = embed.clone()
            embed[[t for t in set(tokens.tolist()) - own]] = torch.nan
            poisoned = packed_logprobs(model, examples, neighbours)[1]
            assert torch.equal(poisoned[before : before + len(alone)], mine) and (
                before == 0 or poisoned[:before].isnan().any())
            embed.copy_(kept)


def test_packed_documents_do_not_see_each_other_and_prompts_get_no_gradient(tmp_path):
    untied = P.tiny_model(tmp_path / "model", **SFT_SHAPE, tie_word_embeddings=False)    # so that words can be NaN
    on_ranks(1, neighbours_and_prompts, str(untied), random_rows(tmp_path / "rows.arrow"))


def overfitted(model, data, out):
    torch.set_num_threads(1)
    sft.train(sft.Config(model, data, str(out), steps=60, batch=8, lr=1e-2, weight_decay=0.0, device="cpu"))
    learned = P.Qwen3.from_pretrained(out / "model", dtype=torch.float32, device="cpu")
    hidden, _, batch = packed_logprobs(learned, sft.Examples(data), range(8))
    right = learned.logits(hidden[batch["predict"]]).argmax(1) == batch["targets"]
    return right.double().mean().item(), len(right)


def test_eight_rows_are_learned_by_heart(lean, tmp_path):
    data = random_rows(tmp_path / "rows.arrow", rows=8, held_out=0)
    (right, count), = on_ranks(1, overfitted, lean, data, tmp_path / "run")
    assert right == 1.0 and count > 80


RUN = dict(steps=None, epochs=3, batch=9, save_every=1, keep=99, eval_every=4)      # 36 rows: 4 steps an epoch


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s", "memory_gb")} for line in lines]


def resumed(world, model, data, full, out, after, **settings):
    """Go on from the checkpoint after some step of a finished run."""
    def made_later(folder, names):
        return [x for x in names if x in ("model", "curves.png") or x.startswith("step-") and int(x[5:]) > after]

    shutil.copytree(full, out, ignore=made_later)
    train = functools.partial(trained, **RUN | settings, resume=True)
    return without_times(on_ranks(world, train, model, data, out)[0])


def same_bytes(a, b):
    return (a / "model" / "model.safetensors").read_bytes() == (b / "model" / "model.safetensors").read_bytes()


def test_resume_is_bit_exact_within_an_epoch_and_at_its_end_and_to_rounding_on_another_layout(mini, tmp_path):
    data, full = random_rows(tmp_path / "rows.arrow"), tmp_path / "full"
    want, = on_ranks(1, functools.partial(trained, **RUN), mini, data, full)
    assert len(want) == 12 and all((full / f"step-{i:06d}").exists() for i in range(1, 13))
    for after in (3, 4, 11):
        out = tmp_path / str(after)
        got = resumed(1, mini, data, full, out, after)
        assert got == without_times(want) and same_bytes(full, out)
    got = resumed(4, mini, data, full, tmp_path / "layout", 6, dp=2, tp=2)
    assert got[:6] == without_times(want)[:6]
    for mine, theirs in zip(got, want):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-9)


def test_resume_after_sigkill_is_bit_exact(mini, tmp_path):
    data, full, out = random_rows(tmp_path / "rows.arrow"), tmp_path / "full", tmp_path / "killed"
    want, = on_ranks(1, functools.partial(trained, **RUN), mini, data, full)
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=trained, args=(mini, data, out), kwargs=RUN, daemon=True)
    child.start()
    deadline = time.time() + 60
    while not (out / "step-000003").exists():
        assert time.time() < deadline and child.is_alive()
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)
    assert not (out / "step-000012").exists()                       # it was killed on the way
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')        # in the middle of a line
    got, = on_ranks(1, functools.partial(trained, **RUN, resume=True), mini, data, out)
    assert without_times(got) == without_times(want) and same_bytes(full, out)


def stopped(model, data, out):
    with pytest.raises(FloatingPointError) as error:
        trained(model, data, out, steps=6, lr=1e9, clip=1e9, warmup=0.0, save_every=1)
    return str(error.value)


def test_a_nan_ends_the_run_before_it_is_saved(mini, tmp_path, monkeypatch, one_thread):
    data, out, calls, loss = random_rows(tmp_path / "rows.arrow"), tmp_path / "run", itertools.count(), sft.sft_loss

    def poisoned(model, hidden, batch):
        total, results = loss(model, hidden, batch)
        return (total * math.nan if next(calls) == 2 else total), results

    monkeypatch.setattr(sft, "sft_loss", poisoned)
    with pytest.raises(FloatingPointError, match="step 2: .* norm nan, learning from the rows .* is .*step-000001"):
        trained(mini, data, out, draw=True, steps=6, save_every=1, eval_every=100)
    model = P.Qwen3.from_pretrained(mini, dtype=torch.float64)
    P.load(out, model)
    assert all(x.isfinite().all() for _, x in model.hf_tensors())


def test_an_explosion_ends_the_run_and_names_step_and_rows_and_the_checkpoint_before_it_is_whole(mini, tmp_path):
    data, out = random_rows(tmp_path / "rows.arrow"), tmp_path / "run"
    words = on_ranks(2, stopped, mini, data, out)[0]
    last = P.latest(out)
    step = int(last.name[5:]) + 1
    rows = [int(row) for row in sft.rows_of_step(step - 1, 36, 10, 0)]
    assert re.search(rf"step {step}: the loss is .* the rows {rows[0]}, {rows[1]}, .* of {data} .* {last}", words)
    assert json.loads((out / "stopped.json").read_text())["rows"] == rows
    model = P.Qwen3.from_pretrained(mini, dtype=torch.float64, device="cpu")
    assert P.load(last, model, P.AdamW(model))["step"] == step - 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_run_does_not_overwrite_another(mini, tmp_path):
    data, out = random_rows(tmp_path / "rows.arrow"), tmp_path / "run"
    on_ranks(1, trained, mini, data, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(AssertionError, match="ValueError: .* already holds a run; go on with it by --resume"):
        on_ranks(1, trained, mini, data, out)
    with pytest.raises(AssertionError, match="ValueError: .* lr was 0.001, now 0.1"):
        on_ranks(1, functools.partial(trained, resume=True, lr=0.1), mini, data, out)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    al.write(al.read(data).slice(1, len(al.read(data)) - 1), data)
    with pytest.raises(AssertionError, match="ValueError: .* is not the file that .*step-000005 has learned from"):
        on_ranks(1, functools.partial(trained, resume=True), mini, data, out)


def test_mistakes_are_refused_before_anything_is_written(mini, lean, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)                     # not installed, whether it is or not
    data, out = random_rows(tmp_path / "rows.arrow"), tmp_path / "run"
    raw = str(tmp_path / "raw.arrow")
    al.write(al.Table.from_pylist([{"prompt": "a", "response": "b"}]), raw)
    words = tmp_path / "words.arrow"
    with al.Writer(words, al.Schema(al.read(data).schema.type.fields, {"tokens_below": "151669"})) as writer:
        writer.write(al.read(data))
    ragged = str(tmp_path / "ragged.arrow")
    al.write(al.Table.from_pydict({"input_ids": [[1, 2], [3, 4]], "loss_mask": [[0, 1], [0, 1, 1]]}), ragged)
    for settings, sentence in [(dict(data=raw), "no column 'input_ids' but prompt, response; make it with: python"),
                               (dict(data=ragged), "row 1 of .*ragged.arrow is empty, or its mask of another length"),
                               (dict(data=data, loss="dpo"), "no column 'chosen_input_ids'"),
                               (dict(data="nope.arrow"), "no file nope.arrow .*: python sft.py prepare --data SRC"),
                               (dict(data=data, seed=-1), "--seed -1 should be at least 0"),
                               (dict(data=data, wandb="x"), "--wandb x needs a package .*: pip install wandb"),
                               (dict(data=words), "151,669 .* prepare it with --model"),
                               (dict(data=data, max_tokens=20), "raise --max_tokens"),
                               (dict(data=data, save_every=0), "--save_every 0 should be at least 1"),
                               (dict(data=data, keep=-1), "--keep -1 should be at least 0"),
                               (dict(data=data, steps=-3), "--steps -3 should be at least 1"),
                               (dict(data=data, clip=0.0), "--clip 0.0 should be above 0"),
                               (dict(data=data, weight_decay=math.nan), "--weight_decay nan should be at least 0"),
                               (dict(data=data, warmup=5.0), "--warmup 5.0 should be from 0 to 1"),
                               (dict(data=data, beta1=1.0), "--beta1 1.0 should be at least 0 and below 1"),
                               (dict(data=data, lr=1e-6), "--min_lr 5e-06, where --lr 1e-06 ends, should not be above"),
                               (dict(data=data, tp=3), "torchrun"), (dict(data=data, model="nowhere"), "nowhere")]:
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            sft.train(sft.Config(**dict(model=mini, out=str(out), device="cpu") | settings))
        assert not out.exists()
    with pytest.raises(SystemExit):
        sft.arguments(sft.Config, ["--lrr", "1"])
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --lrr 1\n")
    config = sft.arguments(sft.Config, ["--lr", "1e-4", "--dp", "2", "--resume", "--loss", "dpo"])
    assert (config.lr, config.dp, config.resume, config.loss, config.tp) == (1e-4, 2, True, "dpo", 1)
    with pytest.raises(SystemExit):
        sft.arguments(sft.Prepare, ["--lr", "1"])
    config = sft.arguments(sft.Prepare, ["--data", "a", "--held_out", "0.1"])
    assert (config.data, config.held_out, config.out, config.max_tokens) == ("a", 0.1, "sft.arrow", 8192)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("text", ['{"model_type": "qwen3", "vocab_size": 9}', '["a list"]', "no json"])
def test_a_config_that_is_no_run_s_is_never_overwritten(tmp_path, text, resume):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not a run's .* choose another --out"):
        sft.claim(sft.Config(model=str(tmp_path), out=str(tmp_path), resume=resume))
    assert (tmp_path / "config.json").read_text() == text


def test_a_run_leaves_its_settings_metrics_curves_and_model(mini, tmp_path, capfd):
    data, out = random_rows(tmp_path / "rows.arrow"), tmp_path / "run"
    train = functools.partial(trained, draw=True, eval_every=2, save_every=2, keep=1)
    lines, = on_ranks(1, train, mini, data, out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line.keys() >= {"loss", "grad_norm", "lr", "tokens", "tokens_per_s", "memory_gb", "seconds"}
               for line in lines) and [("val_loss" in line) for line in lines] == [False, True, False, True, True]
    assert json.loads((out / "config.json").read_text())["max_tokens"] == 128
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG") and [p.name for p in out.glob("step-*")] == [
        "step-000005"]
    assert re.search(r"step 5/5 \| loss \d\.\d+ \| grad_norm \d.* \| lr 5\.00e-06 \| \d+ tokens \| [\d,]+ tok/s \| "
                     r"[\d.]+ GB \| [\d.]+ s \| val_loss", capfd.readouterr().out)


def test_what_a_base_model_has_learned_ends_where_the_assistants_turn_does(lean, tmp_path):
    from transformers import AutoTokenizer
    base, data, out = tmp_path / "base", tmp_path / "rows.arrow", tmp_path / "run"
    shutil.copytree(lean, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    (base / "config.json").write_text((base / "config.json").read_text().replace("258", "256"))
    assert P.Config.from_pretrained(base).eos_token_id == 256
    sft.prepare(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}]), str(base), data, held_out=0.0)
    on_ranks(1, functools.partial(trained, steps=1), str(base), data, out)
    assert AutoTokenizer.from_pretrained(out / "model").eos_token == "<|im_end|>"
    assert P.Config.from_pretrained(out / "model").eos_token_id == 258
    assert json.loads((out / "model" / "generation_config.json").read_text())["eos_token_id"] == 258


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    lr = [sft.cosine(step, 110, 10 / 110, 5e-5, 5e-6) for step in range(110)]
    assert lr[:10] == pytest.approx([5e-6 * (i + 1) for i in range(10)]) and lr[10] == pytest.approx(5e-5)
    assert lr[-1] == pytest.approx(5e-6) and (np.diff(lr[10:]) < 0).all()
    assert lr[10 + 33] == pytest.approx(5e-6 + 4.5e-5 * 0.75, rel=1e-3)         # a third of the way: cos 60 = 1/2
    assert sft.cosine(0, 1, 0.1, 5e-5, 5e-6) == 5e-5 and sft.cosine(0, 10, 0.0, 5e-5, 5e-6) == 5e-5
    config = sft.Config()
    assert (config.batch, config.lr, config.min_lr, config.warmup, config.beta1, config.beta2, config.weight_decay,
            config.clip, config.max_tokens, config.epochs) == (256, 5e-5, 5e-6, 0.1, 0.9, 0.95, 1e-3, 1.0, 8192, 3)


def reference_dpo(folder, data, rows, kind, beta, smoothing, normalized):
    """The loss and its gradient by transformers, row by row."""
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    losses = []
    for row in al.read(data).select(rows):
        advantage = {}
        for side in ("chosen", "rejected"):
            ids, mask = torch.tensor(row[f"{side}_input_ids"]), torch.tensor(row[f"{side}_loss_mask"]).bool()[1:]
            logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            length = mask.sum() if normalized else 1
            advantage[side] = (logp[mask].sum() - row[f"{side}_reference"]) / length
        delta = advantage["chosen"] - advantage["rejected"]
        right, wrong = torch.sigmoid(beta * delta).log(), torch.sigmoid(-beta * delta).log()
        losses.append((delta - 0.5 / beta).square() if kind == "ipo" else -(1 - smoothing) * right - smoothing * wrong)
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def our_dpo(folder, data, rows, *settings):
    torch.set_num_threads(1)
    model = P.Qwen3.from_pretrained(folder, dtype=torch.float64, device="cpu")
    examples = sft.Examples(data, True)
    total = 0.0
    for part in (rows[:2], rows[2:]):                       # in two micro-batches
        batch = examples.micro_batch(part, len(rows), "cpu")
        attend = P.packed(batch["cu_seqlens"], batch["max_seqlen"])
        loss, results = sft.dpo_loss(model, model(batch["tokens"], batch["positions"], attend), batch, *settings)
        loss.backward()
        total += float(results["loss"])
    with torch.no_grad():                                   # parameters are merged: as a model, gradients have names
        for p in model.parameters():
            p.copy_(p.grad)
    grads = {name: grad.numpy() for name, grad in model.hf_tensors()}
    return total, grads


@pytest.mark.parametrize("settings", [("dpo", 0.1, 0.0, False), ("dpo", 0.3, 0.2, False), ("dpo", 2.0, 0.1, True),
                                      ("ipo", 0.1, 0.0, False), ("ipo", 0.5, 0.0, True)])
def test_dpo_gradients_are_those_of_an_independent_reference(mini, tmp_path, settings):
    data, rows = random_rows(tmp_path / "rows.arrow", pairs=True), [3, 11, 7, 20, 1]
    sft.Examples(data, True).keep_reference(np.random.default_rng(1).normal(-60, 5, (40, 2)), "made up")
    want, = on_ranks(1, reference_dpo, mini, data, rows, *settings)
    got, = on_ranks(1, our_dpo, mini, data, rows, *settings)
    assert got[0] == pytest.approx(want[0], rel=1e-7) and got[1].keys() == want[1].keys()   # their norms are in fp32
    largest = max(np.abs(grad).max() for grad in want[1].values())
    for name, grad in want[1].items():
        assert np.abs(got[1][name] - grad).max() < 1e-6 * largest, name


def reference_passes(model, data, out, **settings):
    """How many micro-batches the reference had to look at."""
    calls, keep = [], sft.answer_logprobs
    sft.answer_logprobs = lambda *args: calls.append(torch.is_grad_enabled()) or keep(*args)
    lines = trained(model, data, out, loss="dpo", steps=2, **settings)
    return calls.count(False), lines


def test_reference_logprobs_are_computed_once_and_kept_in_the_file(mini, tmp_path):
    data = random_rows(tmp_path / "rows.arrow", pairs=True, held_out=0)
    (first, lines), = on_ranks(1, reference_passes, mini, data, tmp_path / "a")
    table, stamp = al.read(data), os.stat(data).st_mtime_ns
    assert first > 0 and lines[0]["loss"] == pytest.approx(np.log(2)) and lines[0]["margin"] == pytest.approx(0)
    assert table.column_names[-2:] == ["chosen_reference", "rejected_reference"] and table.num_rows == 40
    (second, again), = on_ranks(1, reference_passes, mini, data, tmp_path / "b")
    assert second == 0 and os.stat(data).st_mtime_ns == stamp and without_times(again) == without_times(lines)
    moved = str(tmp_path / "a" / "model")                               # another model is another reference
    (third, lines), = on_ranks(1, reference_passes, moved, data, tmp_path / "c")
    assert third == first and lines[0]["margin"] == pytest.approx(0)
    assert al.read(data)["chosen_reference"].to_pylist() != table["chosen_reference"].to_pylist()
    want = [sum(line) for line in on_ranks(1, reference_scores, moved, data)[0]]
    assert al.read(data)["chosen_reference"].to_pylist() == pytest.approx(want, rel=1e-12)


def reference_scores(model, data):
    torch.set_num_threads(1)
    model = P.Qwen3.from_pretrained(model, dtype=torch.float64, device="cpu")
    examples = sft.Examples(data, True)
    with torch.no_grad():
        return [packed_logprobs(model, examples, [row])[1][: examples.mask([row])[: examples.documents[row, 0]].sum()]
                .tolist() for row in range(40)]


def test_preferences_of_pairs_are_learned(lean, tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": f"{i % 7} is good", "rejected": f"{i % 5} is bad"} for i in range(48)]
    sft.prepare(write_jsonl(tmp_path / "pairs.jsonl", rows), lean, tmp_path / "pairs.arrow", held_out=0.2)
    for loss in ("dpo", "ipo"):
        lines, = on_ranks(1, functools.partial(trained, loss=loss, steps=12, batch=16, dtype="float32", lr=3e-3,
                                               max_tokens=512), lean, tmp_path / "pairs.arrow", tmp_path / loss)
        assert lines[-1]["accuracy"] == 1.0 and lines[-1]["val_accuracy"] == 1.0 and lines[-1]["margin"] > 0.1


def race(folder):
    torch.set_num_threads(1)
    config = P.Config(**SFT_SHAPE | dict(vocab_size=259, max_position_embeddings=512))
    return sft.bench(config, batch=6, capacity=300, steps=2)


def test_the_race_against_transformers_runs(tmp_path):
    result, = on_ranks(1, race, tmp_path)
    assert result["plain"] > 0 and result["tokens_per_s"] > 0


@pytest.mark.slow
def test_sft_commands(lean, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{i}", "response": "r"} for i in range(20)])
    data, out = str(tmp_path / "rows.arrow"), tmp_path / "run"
    flags = ["--model", lean, "--data", data, "--out", str(out), "--batch", "4", "--device", "cpu"]
    for command in ([sys.executable, "sft.py", "prepare", "--data", rows, "--model", lean, "--out", data],
                    [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                     "sft.py", *flags, "--tp", "2"], [sys.executable, "sft.py", *flags, "--resume"]):
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=200,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 15
    again = subprocess.run([sys.executable, "sft.py", *flags], cwd=HERE, capture_output=True, text=True, timeout=100)
    assert again.returncode != 0 and "already holds a run" in again.stderr


@pytest.mark.slow
def test_sft_demo_learns_in_three_minutes():
    begin = time.time()
    done = subprocess.run([sys.executable, HERE / "sft.py"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(re.search(r"([\d.]+)% \(\+- .* of unseen sums", done.stdout)[1]) > 40
    assert "100.0% of held-out pairs" in done.stdout
    assert time.time() - begin < 180


@pytest.mark.slow
def test_on_a_cpu_it_is_three_times_as_fast_as_transformers(tmp_path, monkeypatch):
    """64 uneven requests, a tiny model, one thread, in turns. CPU time: other programs on the machine matter less."""
    def seconds(call):
        start = time.process_time()
        call()
        return time.process_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        monkeypatch.setattr(E, "timed", seconds)
        llm, ours, theirs = E.LLM(str(E.tiny_model(tmp_path)), max_model_len=512), 0, 0
        for seed in range(6):                           # other words each time, or the prompts were cached
            prompts, params = E.workload(64, seed=seed)
            mine, peer = seconds(partial(llm.generate, prompts, params, False)), E.theirs(tmp_path, prompts, params)[1]
            if seed:                                    # the first warms both up
                ours, theirs = ours + mine, theirs + peer
    finally:
        torch.set_num_threads(threads)
    assert theirs >= 3 * ours, f"{theirs / ours:.2f} times"


# --- evaluate.py -----------------------------------------------------------------------------------------------------

PROBLEMS = HERE.parent / "shared" / "data"
needs_problems = pytest.mark.skipif(not PROBLEMS.is_dir(), reason="../shared/data with MATH-500 and GSM8K is not there")


def boxed(answer):
    return f"Therefore the answer is \\boxed{{{answer}}}."


# (answer, gold, score): what stands in the box, unless the answer is a whole text with boxes of its own.
GOLDEN = [
    # integers, decimals, fractions
    ("5", "5", 1), ("6", "5", 0), ("-5", "5", 0), ("+5", "5", 1), ("05", "5", 1), ("5.0", "5", 1), ("5.", "5", 1),
    ("\\sqrt{4}.", "2", 1),
    ("1,234,567", "1234567", 1), ("1{,}234", "1234", 1), ("1\\,234", "1234", 1), ("3,000", "3", 0),
    ("1/2", "\\frac{1}{2}", 1), ("0.5", "\\frac12", 1), (".5", "0.5", 1), ("\\dfrac{2}{4}", "\\frac{1}{2}", 1),
    ("\\frac{1}{-2}", "-\\frac{1}{2}", 1), ("\\frac{1}{3}", "\\frac{1}{2}", 0), ("0.333333", "\\frac13", 1),
    ("0.33", "\\frac13", 0), ("3\\frac{1}{2}", "\\frac{7}{2}", 1), ("3\\frac{1}{2}", "3.5", 1), ("1/0", "0", 0),
    ("100000000000000000000001", "100000000000000000000000", 0), ("10^{3}", "1000", 1), ("1 2", "12", 0),
    ("1 \n 2", "12", 0),
    ("1\\times10^3", "1000", 1), ("3:2", "\\frac{3}{2}", 1), ("9" * 500, "9" * 499, 0), ("0", "-0", 1),
    # units, money, percent, degrees
    ("5\\text{ cm}", "5", 1), ("5", "5\\text{ cm}", 1), ("5\\,\\mathrm{m/s}", "5", 1), ("\\$5.00", "5", 1),
    ("$5$", "5", 1), ("6\\text{ cm}", "5", 0), ("50\\%", "50", 1), ("0.5", "50\\%", 1), ("5\\%", "50\\%", 0),
    ("90^\\circ", "90", 1), ("90 \\text{ degrees}", "90", 1), ("9^\\circ", "90", 0),
    # radicals, constants, functions
    ("\\sqrt{8}", "2\\sqrt{2}", 1), ("\\sqrt 8", "2\\sqrt{3}", 0), ("2.828427", "2\\sqrt{2}", 1),
    ("2.8", "2\\sqrt{2}", 0), ("\\pi/4", "\\frac{\\pi}{4}", 1), ("3.14", "\\pi", 0), ("\\log_2 8", "3", 1),
    ("\\binom{5}{2}", "10", 1), ("10!", "3628800", 1), ("\\sum_{k=1}^{10} k", "55", 1), ("\\infty", "-\\infty", 0),
    # algebra
    ("x^2+2x+1", "(x+1)^2", 1), ("x^2+2x+2", "(x+1)^2", 0), ("x+1", "y+1", 0), ("p-q", "q-p", 0), ("q+p", "p+q", 1),
    ("\\tan x", "\\frac{\\sin x}{\\cos x}", 1), ("x=5", "5", 1), ("5", "x=5", 1), ("x=6", "5", 0),
    ("y=2x+1", "2x+1", 1), ("2x+3y=5", "4x+6y=10", 1), ("3+4i", "4i+3", 1), ("3-4i", "3+4i", 0),
    # intervals, inequalities, sets, tuples
    ("[0,1)", "\\left[0,1\\right)", 1), ("[0,1]", "[0,1)", 0), ("(0,1)", "(0,2)", 0),
    ("(3,\\infty)\\cup(-\\infty,2)", "(-\\infty,2)\\cup(3,\\infty)", 1), ("x>2", "2<x", 1), ("x>2", "x\\ge2", 0),
    ("\\mathbb{R}", "(-\\infty,\\infty)", 1), ("\\{1,2\\}", "\\{2,1\\}", 1), ("\\{1,2,3\\}", "\\{1,2\\}", 0),
    ("2,1", "1,2", 1), ("1 \\text{ and } 2", "1,2", 1), ("\\pm 2", "-2,2", 1), ("(1,2)", "(2,1)", 0),
    ("(3, 1.5707963)", "\\left(3, \\frac{\\pi}{2}\\right)", 1), ("\\emptyset", "\\{\\}", 1),
    # everything at once is not an answer
    ("1,2,3,4,5", "3", 0), ("3 \\text{ or } 4", "3", 0), ("\\text{all answers}", "3", 0), ("3", "1,2,3", 0),
    # matrices
    ("\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", 1),
    ("\\begin{pmatrix}0.5\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1/2 \\\\ 2 \\end{pmatrix}", 1),
    ("\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", 0),
    # words
    ("\\text{Evelyn}", "Evelyn", 1), ("\\text{evelyn}", "\\text{Evelyn}", 1), ("\\text{Briana}", "\\text{Evelyn}", 0),
    ("\\textbf{(C)}", "C", 1), ("\\text{B}", "C", 0), ("\\text{Yes}", "\\text{No}", 0), ("even", "\\text{odd}", 0),
    ("True", "true", 1), ("\\text{FALSE}", "false", 1), ("True", "\\text{false}", 0), ("ON", "NO", 0),
    ("CAB", "ABC", 0), ("ABC", "\\text{ABC}", 1), ("yx", "xy", 1), ("BA", "AB", 1), ("\\varnothing", "\\emptyset", 1),
    ("\\{\\}", "\\varnothing", 1),
    # boxes: nested, several, unterminated, empty, none
    ("\\frac{\\sqrt{\\frac{1}{4}}}{1}", "0.5", 1), ("\\boxed{5}", "5", 1), ("\\{x : x > 0\\}", "\\{x : x > 0\\}", 1),
    ("First \\boxed{4}, then \\boxed{5}", "5", 0), ("First \\boxed{5}, then \\boxed{4}", "5", 0),
    ("So \\boxed{5}. Again: \\boxed{5}", "5", 1), ("\\boxed{0.5}, that is \\boxed{1/2}", "\\frac12", 1),
    ("\\boxed{1}\\boxed{2}\\boxed{3}\\boxed{4}\\boxed{5}\\boxed{6}", "6", 0), ("The answer is \\boxed{5", "5", 0),
    ("\\boxed{5} and so on, \\boxed{5", "5", 1), ("\\boxed{\\frac{1}{2}", "\\frac{1}{2}", 0), ("\\boxed{}", "5", 0),
    ("\\boxed{ }", "5", 0), ("I write it in \\boxed{}: \\boxed{5}", "5", 1), ("The answer is 5.", "5", 0), ("", "5", 0),
    ("Take \\{ and \\boxed{\\{1,2\\}}", "\\{1,2\\}", 1), ("a } too many } \\boxed{5}", "5", 1), ("boxed{5}", "5", 0),
    ("<think>\\boxed{4}</think>\\boxed{5}", "5", 1), ("<think>maybe \\boxed{5}", "5", 0),
    ("<think>so</think>\\boxed{5} <think>\\boxed{4}", "5", 1), ("\\boxed {5}", "5", 1), ("\\boxed{" * 50_000, "5", 0),
    # long, and what does not parse
    ("let us see " * 10_000 + "\\boxed{5}", "5", 1), ("\\boxed{" + "5+" * 50_000 + "5}", "5", 0),
    ("\\boxed{" + "{" * 50_000 + "5" + "}" * 50_000 + "}", "5", 0), ("\\frac{1}{", "1", 0), ("\\\\\\^^__", "1", 0),
    ("\\undefined{1}{2}", "2", 0), ("\0", "1", 0), ("五", "5", 0), ("(" * 8 + "1" + ")" * 8, "2", 0),
]

# Answers that make sympy hang, or ask for all the memory. None of them is right.
NASTY = ["9^{9^{9^{9}}}", "10^{10^{10}}", "(10!)!!!", "((2^{20})!)!", "\\binom{10^9}{5\\cdot10^8}",
         "\\prod_{k=1}^{1000000} (x-k)", "(x+y+z+w)^{200}", "(" * 900 + "1" + ")" * 900]


@pytest.fixture
def fresh_actors():
    small_ray.shutdown()
    yield
    small_ray.shutdown()


@pytest.fixture
def graders(fresh_actors):
    return ev.Graders(2, deadline=20)


def test_golden_answers_are_graded_as_a_person_would(graders):
    texts = [answer if "boxed" in answer or answer in ("", "The answer is 5.") else boxed(answer)
             for answer, _, _ in GOLDEN]
    grades = graders.grade([(text, gold) for text, (_, gold, _) in zip(texts, GOLDEN)])
    assert len(GOLDEN) >= 80
    wrong = [(answer[:60], gold[:60], grade[:2]) for (answer, gold, score), grade in zip(GOLDEN, grades)
             if grade.score != score or grade.verdict in ("timeout", "crashed")]
    assert not wrong, wrong


def test_shortcuts_never_contradict_math_verify():
    judge, rng, seen = ev.Grader(memory=0), random.Random(0), {True: 0, False: 0}
    spell = [lambda a, b: f"{a}", lambda a, b: f"\\frac{{{a}}}{{{b}}}", lambda a, b: f"{a}/{b}",
             lambda a, b: f"{a / b}", lambda a, b: f"{a:,}", lambda a, b: f"{a / b:.3f}",
             lambda a, b: f"\\dfrac{{{a}}} {{{b}}}"]
    pairs = [(answer, gold) for answer, gold, _ in GOLDEN if "boxed" not in answer and len(answer) < 200
             and answer not in ("1\\,234", "CAB", "ON", "True", "\\text{FALSE}")]     # 1 + 234 and C * A * B to it
    for _ in range(300):
        a, b = rng.choice([3, 1500, 20]), rng.choice([1, 2, 4, 3])
        pairs.append((rng.choice(spell)(a, b), rng.choice(spell)(a, b)))
    for answer, gold in pairs:
        shortcut = ev.quick(answer, gold)
        if shortcut is not None:
            seen[shortcut] += 1
            assert judge.equal([answer], gold) == shortcut, (answer, gold)
    assert min(seen.values()) > 50, seen


def test_the_last_balanced_box_is_the_answer():
    for text, answer in [("\\boxed{1} \\boxed{2}", "2"), ("\\boxed{1} \\boxed{2", "1"), ("\\boxed{1", None),
                         ("\\boxed{a{b}c}", "a{b}c"), ("\\boxed{\\{1\\}}", "\\{1\\}"), ("\\boxed{\\boxed{1}}", "1"),
                         ("\\boxed{}", None), ("nothing", None), ("\\boxed{1\\\\}", "1\\\\"), ("} \\boxed{1}", "1"),
                         ("{ \\boxed{1}", "1"), ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
                         ("\\boxed\n{1}", "1"), ("\\boxed{x\ny}", "x\ny")]:
        assert ev.extract(text) == answer, text
    start = time.perf_counter()
    assert ev.extract("\\boxed{" * 100_000 + "1" + "}" * 99_999) == "1" and ev.boxes("\\{" * 10**6) == []
    assert time.perf_counter() - start < 5


def troubled(folder=None):
    """A grader that hangs and dies at a word. The class travels by value: graders need not import the tests."""
    class Troubled(ev.Grader):
        def equal(self, answers, gold):
            if answers and answers[0].startswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            while answers and answers[0].startswith("hang"):
                (folder / str(os.getpid())).touch()
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())    # only a kill ends it
            return super().equal(answers, gold)
    return Troubled


def test_a_hanging_answer_costs_its_own_deadline_and_no_other_row(fresh_actors, monkeypatch, tmp_path):
    monkeypatch.setattr(ev, "Grader", troubled(tmp_path))
    pool = ev.Graders(2, deadline=2)
    rows = [(boxed(f"\\sqrt{{{i * i}}}"), str(i if i % 3 else i + 1)) for i in range(1, 61)]
    for place in (0, 7, 8, 30):
        rows.insert(place, (boxed("hang"), "x^2+1"))
    start = time.perf_counter()
    grades = pool.grade(rows)
    assert time.perf_counter() - start < 30
    assert [grade.verdict for grade, (text, _) in zip(grades, rows) if "sqrt" not in text] == ["timeout"] * 4
    assert [grade.score for grade, (text, _) in zip(grades, rows) if "sqrt" in text] == [
        float(i % 3 > 0) for i in range(1, 61)]
    hung = [Path("/proc", path.name) for path in tmp_path.iterdir()]
    while any(process.exists() for process in hung):                       # they are killed, not forgotten
        assert time.perf_counter() - start < 40
        time.sleep(0.05)
    assert len(hung) == 4


def test_nasty_answers_end_in_a_verdict_and_the_pool_lives_on(fresh_actors):
    pool = ev.Graders(2, deadline=1)
    grades = pool.grade([(boxed(answer), "x^2+1") for answer in NASTY])
    assert {grade.verdict for grade in grades} <= {"timeout", "wrong", "crashed"} and not any(g.score for g in grades)
    assert pool.grade([(boxed("\\sqrt{4}"), "2")])[0] == ev.Grade(1.0, "right", "\\sqrt{4}")


def test_an_answer_may_not_ask_for_all_the_memory(fresh_actors):
    def ask(grader):
        with pytest.raises(MemoryError):
            bytearray(3 << 30)
        return grader.equal(["1+1"], "2")
    assert small_ray.get(small_ray.remote(ev.Grader).remote().__ray_call__.remote(ask), timeout=60)


def test_a_crashed_grader_is_replaced_and_its_row_tried_again(fresh_actors, monkeypatch):
    monkeypatch.setattr(ev, "Grader", troubled())
    pool = ev.Graders(1, deadline=20)
    rows = [(boxed(answer), "2") for answer in ("\\sqrt{4}", "die", "\\sqrt{9}", "die twice", "1+1")]
    assert [grade.verdict for grade in pool.grade(rows)] == ["right", "crashed", "wrong", "crashed", "right"]


def test_a_grader_killed_by_somebody_else_costs_no_row(fresh_actors):
    pool = ev.Graders(1, deadline=20)
    pool.grade([(boxed("1+1"), "2")])
    worker = pool.idle.get_nowait()
    pid = small_ray.get(worker.__ray_call__.remote(lambda self: os.getpid()))
    pool.idle.put_nowait(worker)
    os.kill(pid, signal.SIGKILL)
    assert [grade.score for grade in pool.grade([(boxed("1+2"), "3"), (boxed("1+2"), "4")])] == [1.0, 0.0]


def test_graders_as_an_actor_take_several_callers_at_once(fresh_actors):
    pool = small_ray.remote(ev.Graders).remote(2, 20)
    refs = [pool.agrade.remote([(boxed(f"{i}+{k}"), str(2 * i)) for k in range(3)]) for i in range(3)]
    assert [[grade[0] for grade in grades] for grades in small_ray.get(refs, timeout=60)] == [
        [float(k == i) for k in range(3)] for i in range(3)]


def test_200_easy_answers_a_second_on_two_cores(fresh_actors):
    pool, rng = ev.Graders(2), random.Random(0)
    pool.grade([(boxed("x+x"), "2x")] * 4)
    rows = []
    for _ in range(1000):
        a, b = rng.randint(2, 99), rng.randint(2, 9)
        rows.append(rng.choice([(boxed(a * b), str(a * b)), (boxed(f"\\frac{{{a}}}{{{b}}}"), f"{a}/{b}"),
                                (boxed(f"{a}x+{b}"), f"{b}+{a}x"), (boxed(f"{a}\\sqrt{{{b}}}"), f"{a} \\sqrt {b}"),
                                (boxed(f"({a},{b})"), f"({a}, {b})"), (boxed(f"{a}\\text{{ m}}"), str(a))]))
    start = time.perf_counter()
    assert all(grade.score for grade in pool.grade(rows))
    rate = 1000 / (time.perf_counter() - start)
    assert rate > 200, f"{rate:.0f} a second"


def test_grade_is_a_number_and_outlives_a_restart_of_the_actors(fresh_actors):
    assert (ev.grade("\\boxed{2x}", "x+x"), ev.grade("\\boxed{3x}", "x+x"), ev.grade("2x", "x+x")) == (1.0, 0.0, 0.0)
    assert (ev.grade(None, "5"), ev.grade(5, "5"), ev.grade("\\boxed{5}", 5)) == (0.0, 0.0, 1.0)
    small_ray.shutdown()
    assert ev.grade("\\boxed{2x}", "x+x") == 1.0
    small_ray.shutdown()
    small_ray.init(num_cpus=2)
    assert ev.grade("\\boxed{2x}", "x+x") == 1.0


@needs_problems
def test_every_gold_answer_boxed_is_right_against_itself(graders):
    for name, rows in (("math500", 500), ("gsm8k_test", 1319)):
        golds = [problem["answer"] for problem in ev.load_problems(str(PROBLEMS / f"{name}.jsonl"))]
        assert len(golds) == rows and all(grade.score for grade in graders.grade([(boxed(g), g) for g in golds]))


@needs_problems
def test_every_gold_answer_is_right_by_math_verify_alone():
    """Without the shortcut for equal spellings. There are no exceptions."""
    judge = ev.Grader(memory=0)
    for name in ("math500", "gsm8k_test"):
        golds = {problem["answer"] for problem in ev.load_problems(str(PROBLEMS / f"{name}.jsonl"))}
        assert [gold for gold in golds if not judge.equal([gold], gold)] == []


@needs_problems
def test_gold_answers_of_other_problems_are_wrong(graders):
    golds = [problem["answer"] for problem in ev.load_problems(str(PROBLEMS / "math500.jsonl"))][:200]
    grades = graders.grade([(boxed(a), b) for a, b in zip(golds, golds[1:])])
    right = [(a, b) for a, b, grade in zip(golds, golds[1:], grades) if grade.score]
    assert all(ev.number(a.replace("x=", "")) == ev.number(b.replace("x=", "")) is not None for a, b in right), right


def test_problems_of_every_shape_are_read(tmp_path):
    rows = [{"problem": "p", "solution": "so \\boxed{7}", "answer": "5", "subject": "Algebra", "level": 2},   # MATH-500
            {"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}", "type": "Algebra", "level": "Level 3"},  # MATH
            {"question": "p", "answer": "2+3=<<2+3=5>>5\n#### 1,005"},                                        # GSM8K
            {"question": "p", "final_answer": "5", "difficulty": 6.5, "r1_solution_1": "\\boxed{7}"},      # DeepMath
            {"prompt": "p", "answer": 5}, {"question": "p", "answer": "It is \\boxed{5}."}]
    golds = ["5", "\\frac{1}{2}", "1,005", "5", "5", "5"]
    for i, (row, gold) in enumerate(zip(rows, golds)):
        al.Table.from_pylist([row]).to_jsonl(tmp_path / "rows.jsonl")
        al.write(al.Table.from_pylist([row]), tmp_path / "rows.arrow")
        for name in ("rows.jsonl", "rows.arrow"):
            problem, = ev.load_problems(str(tmp_path / name))
            assert (problem["problem"], problem["answer"]) == ("p", gold), row
        assert (problem["subject"], problem["level"]) == [("Algebra", "2"), ("Algebra", "3"), ("", ""), ("", "6.5"),
                                                          ("", ""), ("", "")][i]


def test_rows_of_a_file_may_be_of_several_kinds(tmp_path):
    rows = [{"problem": "p", "answer": 5, "level": 2, "seen": 1}, {"problem": "p", "answer": "x+1", "level": "Level 3"},
            {"question": "q", "final_answer": 0.5, "answer": None, "seen": ["a"], "level": None}]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    assert [tuple(x.values()) for x in ev.load_problems(str(tmp_path / "rows.jsonl"))] == [
        ("p", "5", "", "2"), ("p", "x+1", "", "3"), ("q", "0.5", "", "")]


def test_a_bad_problem_is_named_by_its_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row, what in (({"problem": "p"}, "no answer"), ({"problem": "p", "solution": "no box"}, "no answer"),
                      ({"answer": "5"}, "no problem"), ({"problem": " ", "answer": "5"}, "no problem"),
                      ({"prompt": [{"role": "user", "content": "p"}], "answer": "5"}, "no problem")):
        path.write_text(json.dumps({"problem": "p", "answer": "1"}) + "\n\n" + json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=f"rows.jsonl, line 3: {what}"):
            ev.load_problems(str(path))
    for line in ("{", "[1]", "5", '"x"'):
        path.write_text(f"{line}\n")
        with pytest.raises(ValueError, match="line 1: .*JSON"):
            ev.load_problems(str(path))
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        ev.load_problems(str(tmp_path / "nowhere.jsonl"))
    path.write_text("")
    with pytest.raises(ValueError, match="no rows"):
        ev.load_problems(str(path))


def test_a_file_named_like_a_data_set_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    al.write(al.Table.from_pylist([{"problem": "p", "answer": "5"}]), "gsm8k")
    assert ev.load_problems("gsm8k")[0]["answer"] == "5"


def test_data_sets_of_the_hub_come_by_their_short_names(monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []
    rows = [{"question": "p", "answer": "5"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, split: asked.append((*where, split)) or rows)
    for name in ("math500", "gsm8k", "org/some-set"):
        assert ev.load_problems(name)[0]["problem"] == "p"
    assert asked == [("HuggingFaceH4/MATH-500", None, "test"), ("openai/gsm8k", "main", "test"),
                     ("org/some-set", None, "test")]


def test_problems_that_are_guessed_or_too_long_are_left_out(tmp_path, monkeypatch, lean):
    rows = [{"problem": "p" * n, "answer": answer} for n, answer in ((5, "12"), (5, "Yes"), (5, "false."), (900, "3"),
                                                                     (5, "\\text{blue}"))]
    al.Table.from_pylist(rows).to_jsonl(tmp_path / "all.jsonl")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "problems", "--data", str(tmp_path / "all.jsonl"), "--model", lean,
                                      "--max_prompt", "300", "--out", str(tmp_path / "some.jsonl")])
    ev.main()
    assert [row["answer"] for row in ev.load_problems(str(tmp_path / "some.jsonl"))] == ["12", "\\text{blue}"]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-4], "--max_prompt", "1", "--out", str(tmp_path / "none.jsonl")])
    with pytest.raises(ValueError, match="none of the 5 problems .*all.jsonl is worth learning from: .*max_prompt 1 "):
        ev.main()
    assert not (tmp_path / "none.jsonl").exists()


def test_no_sums_or_an_impossible_share_of_boxes_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("n", "0"), ("n", "-3"), ("boxed", "7"), ("boxed", "-1"), ("boxed", "nan")):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "arithmetic", f"--{name}", value, "--out", "sums.jsonl"])
        with pytest.raises(ValueError, match=f"{name} = {value}.*at least one problem.*share from 0 to 1"):
            ev.main()
    assert not Path("sums.jsonl").exists()


def test_half_of_the_solutions_can_leave_the_box_out():
    rows, plain = ev.arithmetic(100, seed=4, boxed=0.5), ev.arithmetic(100, seed=4)
    assert [row["problem"] for row in rows] == [row["problem"] for row in plain]
    assert [ev.extract(row["solution"]) for row in rows] == [None, *(
        x for a, b in zip(plain[1::2], plain[2::2]) for x in (a["answer"], None)), plain[-1]["answer"]]
    assert all(row["solution"].endswith(f"so {row['answer']}") for row in rows[::2])


def test_arithmetic_is_right_and_its_held_out_rows_are_never_in_a_training_set():
    train, test = ev.arithmetic(5000, seed=1), ev.arithmetic(500, seed=2, held_out=True)
    assert not {row["problem"] for row in train} & {row["problem"] for row in test}
    assert train == ev.arithmetic(5000, seed=1) != ev.arithmetic(5000, seed=3)
    for row in train + test:
        assert eval(row["problem"][:-2]) == int(row["answer"]) and ev.extract(row["solution"]) == row["answer"]
    assert 100 < len({row["problem"] for row in test}) < 200 < 400 < len({row["problem"] for row in train})


def scored(number, score, answer="1", **more):
    return {"number": number, "score": float(score), "answer": answer, "verdict": "right" if score else "wrong",
            "finish_reason": "stop", "tokens": 10} | more


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in (1, 4, 6):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
                assert math.isclose(ev.pass_at_k(n, right, k), np.mean([any(s) for s in subsets]), abs_tol=1e-12)


def test_the_error_of_a_score_counts_problems_not_samples():
    rows = [scored(i, i % 2) for i in range(100) for _ in range(8)]        # each problem always right or always wrong
    mean, error = ev.summarize(rows)["pass@1"]
    assert mean == 0.5 and math.isclose(error, np.std([0, 1] * 50, ddof=1) / 10)
    assert ev.summarize(rows)["mean@8"] == (mean, error)


def test_errors_are_as_large_as_they_say():
    rng, misses, shift = np.random.default_rng(0), 0, 0.1
    for _ in range(80):
        skill = rng.uniform(0, 0.9, 100)
        first = [scored(i, rng.random() < p) for i, p in enumerate(skill) for _ in range(8)]
        second = [scored(i, rng.random() < p + shift) for i, p in enumerate(skill) for _ in range(8)]
        mean, error = ev.summarize(first)["pass@1"]
        misses += abs(mean - 0.45) > 1.96 * error
        difference, its_error = ev.compare(first, second)["pass@1"]
        misses += abs(difference - shift) > 1.96 * its_error
        assert its_error < error                                           # the difference is known better than either
    assert 1 <= misses <= 18, misses                                       # 5% of 160, within 3.6 standard deviations


def test_scores_of_nothing_are_refused_and_of_one_problem_have_no_error():
    assert ev.summarize([scored(0, 1)])["pass@1"][0] == 1 and math.isnan(ev.summarize([scored(0, 1)])["pass@1"][1])
    for call in (lambda: ev.summarize([]), lambda: ev.compare([scored(0, 1)], [])):
        with pytest.raises(ValueError, match="no samples"):
            call()


def test_majority_counts_spellings_of_one_number_as_one_vote():
    vote = ev.majority
    assert vote([scored(0, 1, "0.5"), scored(0, 1, "\\frac12"), scored(0, 0, "3")]) == 1
    assert vote([scored(0, 1, "0.5"), scored(0, 0, "3"), scored(0, 0, "3")]) == 0
    assert vote([scored(0, 1, "0"), scored(0, 1, "0.0"), scored(0, 0, "3")]) == 1
    assert vote([scored(0, 1, "0.5"), scored(0, 0, "3")]) == 0.5           # by lot
    assert vote([scored(0, 0, None), scored(0, 0, None), scored(0, 1, "5")]) == 1
    assert vote([scored(0, 0, None)]) == 0


def test_truncated_and_unparsed_are_told_apart_and_groups_add_up():
    rows = [scored(0, 1, subject="Algebra", level="1"), scored(1, 0, subject="Algebra", level="2"),
            scored(2, 0, None, verdict="unparsed", finish_reason="length", subject="Geometry", level="2"),
            scored(3, 0, None, verdict="unparsed", subject="Geometry", level="2")]
    means = {name: mean for name, (mean, _) in ev.summarize(rows).items()}
    assert (means["truncated"], means["unparsed"], means["pass@1"]) == (0.25, 0.25, 0.25)
    assert (means["subject Algebra"], means["subject Geometry"], means["level 1"], means["level 2"]) == (0.5, 0, 1, 0)
    assert "maj@1" not in means and "+25.0 ± " in ev.report({"a": rows, "b": [row | {"score": 1.0} if row["number"] == 1
                                                                              else row for row in rows]})


def test_show_prints_every_value_of_any_arrow_file(tmp_path, capsys, monkeypatch):
    rows = [scored(i, i % 2, text="line one\nline two", logprobs=[0.5] * 7, reward=1 / 3) for i in range(4)]
    al.write(al.Table.from_pylist(rows), tmp_path / "rollouts.arrow")
    ev.show(str(tmp_path / "rollouts.arrow"), verdict="right", start=2)
    printed = capsys.readouterr().out
    assert printed.count("row ") == 1 and "row 3 of 4" in printed and "logprobs: 7 values" in printed
    assert "text:\n    line one\n    line two" in printed and "reward: 0.3333" in printed
    ev.show(str(tmp_path / "rollouts.arrow"), start=999)
    ev.show(str(tmp_path / "rollouts.arrow"), verdict="timeout")
    assert re.findall("4 rows, and none(.*)", capsys.readouterr().out) == [" from 999 on", " that is timeout from 0 on"]
    for words, says in (([str(tmp_path)], "no file"), (["nothere"], "no file nothere"),
                        ([str(tmp_path / "rollouts.arrow"), "--start", "-2"], "--start"),
                        ([str(tmp_path / "rollouts.arrow"), "--verdict", "Wrong"], "invalid choice: 'Wrong'")):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "show", *words])
        with pytest.raises(SystemExit):
            ev.main()
        assert says in capsys.readouterr().err


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    from parallel import tiny_model
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny_model(folder / f"m{i}", seed=i, hidden_size=64, num_hidden_layers=2)) for i in range(2)]


def test_two_models_are_evaluated_side_by_side_from_the_command_line(two_models, tmp_path):
    command = [sys.executable, HERE / "evaluate.py", "--data", "sums.jsonl", "--n", "2", "--max-tokens", "8", "--out",
               "out", "--model"]
    subprocess.run([sys.executable, HERE / "evaluate.py", "arithmetic", "--n", "5", "--out", "sums.jsonl",
                    "--held-out"], cwd=tmp_path, check=True, timeout=120)

    def go(*more):
        return subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    refused = go("nowhere")
    assert refused.returncode and "no model in nowhere" in refused.stderr and not (tmp_path / "out").exists()
    done = go(two_models[0])
    assert done.returncode == 0, done.stderr
    files = {path: path.stat().st_mtime for path in (tmp_path / "out").glob("*.arrow")}
    done = go(*two_models, "--resume")
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime == when for path, when in files.items())          # not made again
    tables = [al.read(path) for path in sorted((tmp_path / "out").glob("*.arrow"))]
    assert [len(table) for table in tables] == [10, 10] and set(tables[0].column_names) == set(ev.SAMPLE)
    assert (tmp_path / "out" / "scores.png").read_bytes()[:4] == b"\x89PNG"
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(scores) == {"m0", "m1"} and {"pass@1", "mean@2", "pass@2", "maj@2"} <= set(scores["m0"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n"] == 2


def test_one_model_is_never_scored_by_the_samples_of_another(tmp_path, monkeypatch):
    for folder in ("a", "here/a", "here/out"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    al.Table.from_pylist(ev.arithmetic(2)).to_jsonl("sums.jsonl")
    config = ev.Config(["a", "../a"], "sums.jsonl", out="scores")
    with pytest.raises(ValueError, match="samples of two of a, ../a would be one file"):
        ev.run(config)
    with pytest.raises(ValueError, match="out was made with data = None, not sums.jsonl"):
        ev.run(replace(config, out="out", resume=True))                    # of something else than an evaluation
    Path("out", "config.json").write_text(json.dumps(vars(config)))
    al.write(al.Table.from_pylist([scored(0, 1, model="a")]), "out/a.arrow")
    with pytest.raises(ValueError, match="a.arrow has the samples of a, not of ../a"):
        ev.run(replace(config, model=["../a"], out="out", resume=True))
    assert not Path("scores").exists()


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A model of two files, two sums, and evaluate() without engines: [calls], the settings, run(**settings)."""
    made = []

    def evaluate(model, problems, config, label):
        made.append(label)
        rows = [scored(i, 1, model=model, problem=x["problem"], gold=x["answer"]) for i, x in enumerate(problems)]
        return al.Table.from_pylist(rows, al.Schema({k: ev.SAMPLE[k] for k in rows[0]}, {"model": ev.identity(model)})),
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "evaluate", evaluate)
    monkeypatch.setattr(ev, "draw", lambda *_: None)
    Path("sft/model").mkdir(parents=True)
    Path("sft/model/config.json").write_text("{}")
    Path("sft/model/model.safetensors").write_bytes(b"old")
    shutil.copytree("sft/model", "ppo/model")
    al.Table.from_pylist(ev.arithmetic(2)).to_jsonl("sums.jsonl")
    return made, lambda **more: ev.run(ev.Config(**{"model": ["sft/model", "ppo/model"], "data": "sums.jsonl"} | more))


def test_samples_of_other_weights_or_problems_are_made_anew(pretended, capsys):
    made, run = pretended
    run()
    assert made == ["sft/model", "ppo/model"]                              # as the table names them
    with pytest.raises(ValueError, match="holds another run"):
        run()
    os.utime("sft/model/model.safetensors", (0, 0))                        # what is copied is still the same model
    run(resume=True)
    assert len(made) == 2
    Path("ppo/model/model.safetensors").write_bytes(b"new")
    run(resume=True)
    assert made[2:] == ["ppo/model"] and "ppo/model: evaluated anew, as its files" in capsys.readouterr().out
    al.Table.from_pylist(ev.arithmetic(2, seed=1)).to_jsonl("sums.jsonl")
    run(resume=True)
    assert made[3:] == ["sft/model", "ppo/model"] and "as the problems have changed" in capsys.readouterr().out
    old = al.read("evaluation/sft_model.arrow")
    al.write(al.Table.from_pylist(old.to_pylist()), "evaluation/sft_model.arrow")
    run(resume=True)
    assert len(made) == 5 and "though they do not say" in capsys.readouterr().out
    for name, before, value in (("dtype", None, "float32"), ("temperature", 0.6, 0.0)):
        with pytest.raises(ValueError, match=f"was made with {name} = {before}, not {value}"):
            run(resume=True, **{name: value})


def test_a_folder_has_one_name_however_it_is_spelled(pretended, monkeypatch):
    made, run = pretended
    run(model=["sft/model/"])
    run(model=["./sft//model"], resume=True)
    assert made == ["model"] and set(json.loads(Path("evaluation/scores.json").read_text())) == {"model"}
    old = al.read("evaluation/sft_model.arrow")
    assert set(old["model"].to_pylist()) == {"sft/model"}
    rows = [row | {"model": "sft/model/"} for row in old.to_pylist()]                   # as they were once named
    al.write(al.Table.from_pylist(rows, old.schema), "evaluation/sft_model.arrow")
    run(model=["sft/model"], resume=True)
    with pytest.raises(ValueError, match="names a model twice"):
        run(model=["sft/model", "sft/model/"], out="twice")
    monkeypatch.chdir("sft/model")
    for spelled, out in ((".", "../../here"), ("../model/.", "../../there"), ("../../sft/model/..", "../../above")):
        shutil.copytree(".", "..", dirs_exist_ok=True)
        run(model=[spelled], data="../../sums.jsonl", out=out)
        (file,) = Path(out).glob("[!.]*.arrow")
        assert file.stem and list(json.loads(Path(out, "scores.json").read_text())) == made[-1:]
    assert made[1:] == ["model", "model", "sft"] and ev.one_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_bad_settings_of_an_evaluation_leave_no_directory(pretended):
    made, run = pretended
    for name, value in (("n", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_k", -5), ("dtype", "foo"),
                        ("dtype", "int8"), ("limit", -5), ("max_tokens", 0), ("deadline", -1.0), ("deadline", math.nan),
                        ("graders", -3), ("memory", 0.0), ("memory", 1.5), ("device", "tpu"), ("device", "cuda")):
        if value == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=name):
            run(**{name: value})
    assert not Path("evaluation").exists() and not made
    for good in ("auto", "bfloat16", None):
        ev.check(ev.Config(dtype=good))
    Path("evaluation").mkdir()
    Path("evaluation/notes.txt").touch()
    with pytest.raises(ValueError, match="something else"):
        run(resume=True)


def test_a_folder_without_weights_leaves_no_directory(pretended):
    made, run = pretended
    Path("ppo/model/model.safetensors").rename("ppo/model/rank-00000.safetensors")
    for model, says in (("ppo/model", "ppo/model has no model.safetensors"), ("ppo/model/..", "no model in .*/ppo")):
        with pytest.raises(FileNotFoundError, match=says):
            run(model=["sft/model", model])
    assert not Path("evaluation").exists() and not made
    Path("ppo/model/model.safetensors.index.json").write_text("{}")
    ev.check_model("ppo/model")


def test_out_of_a_run_that_died_before_its_first_sample_is_free_again(pretended, monkeypatch):
    made, run = pretended
    whole = ev.evaluate

    def dies(*_):
        with pytest.raises(ValueError, match="evaluation is that of a run under way"):
            run()                                                          # by who came second, while the first lives
        raise RuntimeError("the prompt has 9 tokens")
    monkeypatch.setattr(ev, "evaluate", dies)
    with pytest.raises(RuntimeError, match="9 tokens"):
        run(n=2)
    assert os.listdir("evaluation") == ["config.json"]
    assert json.loads(Path("evaluation/config.json").read_text())["n"] == 2
    monkeypatch.setattr(ev, "evaluate", whole)
    run()
    assert made == ["sft/model", "ppo/model"] and json.loads(Path("evaluation/config.json").read_text())["n"] == 1
    with pytest.raises(ValueError, match="holds another run"):
        run()
    for text in ("{}", '{"n": 1}', "", "[5]", "{"):                        # of a model, or of a training
        Path("other").mkdir(exist_ok=True)
        Path("other/config.json").write_text(text)
        with pytest.raises(ValueError, match="other holds another run or something else"):
            run(out="other")


def test_scores_of_one_problem_are_json(pretended):
    pretended[1](model=["sft/model"], limit=1)
    text = Path("evaluation/scores.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["model"]["pass@1"] == [1.0, None]


def test_one_engine_or_two_give_the_same_samples_and_another_seed_others(fresh_actors, two_models):
    problems = ev.arithmetic(4, held_out=True)
    tables = []
    for engines, few, seed in ((0, 4, 0), (2, 4, 0), (0, 2, 1)):           # 0: one on the CPU; 2: each has its own GPU
        small_ray.init(num_cpus=2, num_gpus=engines)
        tables.append(ev.evaluate(two_models[0], problems[:few], n=2, max_tokens=12, seed=seed)[0])
        small_ray.shutdown()
    texts = [table["text"].to_pylist() for table in tables]
    assert texts[0] == texts[1] and texts[0][:4] != texts[2] and len(set(texts[0])) > 4
    assert tables[0]["number"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(FileNotFoundError, match="no model in /nowhere/at/all"):
        ev.evaluate("/nowhere/at/all", problems)


def test_demo_of_evaluate():
    done = subprocess.run([sys.executable, HERE / "evaluate.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "graders were killed" in done.stdout and "better pupil" in done.stdout


@needs_problems
@pytest.mark.slow
def test_a_real_model_answers_gsm8k_greedily_as_transformers_does(fresh_actors, tmp_path):
    """SmolLM2-135M, 50 questions: minutes on two cores. It knows no boxes, so most of its answers do not parse."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, tool = Path(tempfile.gettempdir()) / "smollm2", PROBLEMS.parent / "tools" / "get_smollm2.py"
    if not (folder / "model.safetensors").exists():
        folder = tmp_path / "smollm2"
        made = subprocess.run([sys.executable, tool, folder], capture_output=True, text=True, timeout=900)
        if made.returncode:
            pytest.skip(f"no model: {made.stderr[-300:]}")
    problems = ev.load_problems(str(PROBLEMS / "gsm8k_test.jsonl"))[:50]
    table, summary = ev.evaluate(str(folder), problems, temperature=0.0, max_tokens=128, device="cpu")
    small_ray.shutdown()
    assert summary["not graded"][0] == 0 and len(table) == 50
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                            # beside other work, two wait for each other at every product
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = [tokenizer.apply_chat_template(ev.chat_messages(problem["problem"]), tokenize=False,
                                           add_generation_prompt=True) for problem in problems]
    for start in (0, 25):
        prompt = tokenizer(texts[start:start + 25], return_tensors="pt", padding=True, add_special_tokens=False)
        tokens = model.generate(**prompt, max_new_tokens=128, do_sample=False)[:, prompt.input_ids.shape[1]:]
        assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == table["text"].to_pylist()[start:start + 25]
    torch.set_num_threads(threads)


# --- ppo.py ----------------------------------------------------------------------------------------------------------

# The oracles below are written from the papers' formulas, over Python lists of the actions that count: no masks, no
# padding, no tensors but where a gradient is wanted.

LEAST = 1e-12
torch.set_num_threads(1)                                    # many small tensors: a second thread would only wait


def noise(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def some_mask(rows=5, slots=9, seed=0, holes=True):
    """Rows of different lengths, one of them without any action, with holes in between (what a tool wrote, say)."""
    lengths = torch.tensor([slots, 1, 0, 4, 7][:rows])
    mask = torch.arange(slots) < lengths[:, None]
    return mask & (noise(rows, slots, seed=seed + 50) > -0.7) if holes else mask


def poisoned(x, mask, poison):
    return torch.where(mask, x, torch.full_like(x, poison))


def rows_of(x, mask):
    return [[float(v) for v, m in zip(row, keep) if m] for row, keep in zip(x.tolist(), mask.tolist())]


def packed(rows, mask):
    """Lists a row back into the slots of the mask."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        if row:
            out[i, mask[i]] = torch.tensor(row, dtype=torch.float64)
    return out


@pytest.mark.parametrize("poison", [0.0, math.nan, 1e9, -math.inf])
@pytest.mark.parametrize("gamma,lam", [(1.0, 1.0), (1.0, 0.0), (0.97, 0.9), (0.0, 0.5), (0.83, 1.0)])
def test_gae_is_the_double_sum_over_later_errors(gamma, lam, poison):
    for seed in range(5):
        mask, rewards, values = some_mask(seed=seed), noise(5, 9, seed=seed), noise(5, 9, seed=seed + 1)
        behind = noise(5, seed=seed + 2) * torch.tensor([1.0, 0, 1, 0, 1])          # three rows are cut, two end
        want = []
        for r, v, end in zip(rows_of(rewards, mask), rows_of(values, mask), behind.tolist()):
            following = [*v[1:], end]
            delta = [r[t] + gamma * following[t] - v[t] for t in range(len(r))]
            want.append([sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(r))) for t in range(len(r))])
        got = ppo.gae(poisoned(rewards, mask, poison), poisoned(values, mask, poison), mask, behind, gamma, lam)
        assert (got - packed(want, mask)).abs().max() < LEAST


@pytest.mark.parametrize("poison", [0.0, math.nan, 1e9])
def test_whitening_is_over_all_actions_of_the_batch(poison):
    mask, x = some_mask(), noise(5, 9) * 3 + 7
    flat = [v for row in rows_of(x, mask) for v in row]
    mean = sum(flat) / len(flat)
    variance = sum((v - mean) ** 2 for v in flat) / len(flat)
    want = [[(v - mean) / math.sqrt(variance + 1e-8) for v in row] for row in rows_of(x, mask)]
    assert (ppo.whiten(poisoned(x, mask, poison), mask) - packed(want, mask)).abs().max() < LEAST


def test_whitening_of_nothing_and_of_equal_values_is_zero():
    assert ppo.whiten(noise(2, 3), torch.zeros(2, 3, dtype=torch.bool)).eq(0).all()
    assert ppo.whiten(torch.full((2, 3), 5.0), torch.ones(2, 3, dtype=torch.bool)).abs().max() < 1e-6


def group_oracle(kind, rewards, groups):
    """Lists of rewards a row, and the number of each row's group."""
    scores, out = [sum(row) for row in rewards], []
    for i, row in enumerate(rewards):
        others = [scores[j] for j in range(len(rewards)) if groups[j] == groups[i]]
        n, mean = len(others), sum(others) / len(others)
        if kind == "reinforce++":
            out.append([sum(row[t:]) - (mean if n > 1 else 0) for t in range(len(row))])
        elif n == 1:
            out.append([0.0] * len(row))
        elif kind == "rloo":
            out.append([scores[i] - (sum(others) - scores[i]) / (n - 1)] * len(row))
        else:
            std = math.sqrt(sum((s - mean) ** 2 for s in others) / (n - 1))
            out.append([(scores[i] - mean) / (std + 1e-6)] * len(row))
    if kind == "reinforce++":
        flat = [v for row in out for v in row]
        mean = sum(flat) / len(flat)
        spread = math.sqrt(sum((v - mean) ** 2 for v in flat) / len(flat) + 1e-8)
        out = [[(v - mean) / spread for v in row] for row in out]
    return out


@pytest.mark.parametrize("poison", [0.0, math.nan, 1e9])
@pytest.mark.parametrize("groups", [[0, 0, 1, 1, 1], [3, 1, 3, 3, 0], [0, 1, 2, 3, 4], [2, 2, 2, 2, 2]])
@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce++"])
def test_groups_are_measured_against_themselves_however_large(kind, groups, poison):
    mask, rewards = some_mask(), noise(5, 9)
    want = packed(group_oracle(kind, rows_of(rewards, mask), groups), mask)
    got = ppo.group_advantages(kind, poisoned(rewards, mask, poison), mask, torch.tensor(groups))
    assert (got - want).abs().max() < LEAST


def config(**changes):
    return ppo.Config(**({"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 0.0, "cap": 2.0} | changes))


def clip(x, low, high):
    return min(max(x, low), high)


def objective_oracle(name, pi, prox, advantage, c):
    """The loss of each action of one row; pi is a list of scalar tensors, so that autograd differentiates formulas."""
    out = []
    for t in range(len(pi)):
        ratio = torch.exp(pi[t] - prox[t])
        if name == "gspo":
            ratio = torch.exp(sum(p - q for p, q in zip(pi, prox)) / len(pi))
        a = advantage[t]
        inside = torch.clamp(ratio, 1 - c.clip_low, 1 + c.clip_high)
        if name == "cispo":
            out.append(-inside.item() * a * pi[t])
            continue
        surrogate = ratio * a if (ratio * a).item() <= (inside * a).item() else inside * a
        if c.dual_clip and a < 0 and surrogate.item() < c.dual_clip * a:
            surrogate = torch.tensor(c.dual_clip * a, dtype=torch.float64)
        out.append(-surrogate)
    return out


def aggregate_oracle(losses, how, longest):
    """One number from lists of losses a row; rows without actions are no rows."""
    losses = [row for row in losses if row]
    if how == "token-mean":
        return sum(x for row in losses for x in row) / sum(map(len, losses))
    divisors = {"seq-mean-token-mean": len, "seq-mean-token-sum": lambda row: 1,
                "seq-mean-token-norm": lambda row: longest}
    return sum(sum(row) / divisors[how](row) for row in losses) / len(losses)


def k_oracle(kind, pi, reference):
    ratio = torch.exp(reference - pi)
    return {"k1": -torch.log(ratio), "k2": torch.log(ratio) ** 2 / 2, "k3": (ratio - 1) - torch.log(ratio)}[kind]


SETTINGS = {
    "ppo": dict(), "clip-higher": dict(clip_low=0.1, clip_high=0.4), "dual clip": dict(dual_clip=1.5),
    "gspo": dict(objective="gspo", clip_low=0.05, clip_high=0.1), "cispo": dict(objective="cispo", clip_high=0.5),
    "entropy": dict(entropy_coef=0.3), "k2": dict(kl="k2", kl_coef=0.2), "k3": dict(kl="k3", kl_coef=0.2),
    "k1 stays out of the loss": dict(kl="k1", kl_coef=9.0), "all": dict(
        objective="ppo", clip_high=0.3, dual_clip=2.0, kl="k3", kl_coef=0.1, entropy_coef=0.05, cap=1.1)}


@pytest.mark.parametrize("poison", [0.0, math.nan, 1e9])
@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-norm"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_objective_has_the_value_and_gradient_of_its_formula(setting, how, poison):
    c, mask = config(**SETTINGS[setting]), some_mask()
    named = {name: noise(5, 9, seed=i, scale=0.5) for i, name in enumerate(("pi", "prox", "mu", "reference"))}
    named |= {"advantages": noise(5, 9, seed=7), "entropy": noise(5, 9, seed=8).exp()}

    lists = {name: rows_of(x, mask) for name, x in named.items()}
    leaves = [[torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in row] for row in lists["pi"]]
    spread = [[torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in row] for row in lists["entropy"]]
    losses = []
    for i, pi in enumerate(leaves):
        prox, mu, reference = (lists[name][i] for name in ("prox", "mu", "reference"))
        row = objective_oracle(c.objective, pi, prox, lists["advantages"][i], c)
        row = [min(math.exp(p - m), c.cap) * x for x, p, m in zip(row, prox, mu)]
        if c.kl in ("k2", "k3"):
            row = [x + c.kl_coef * k_oracle(c.kl, p, r) for x, p, r in zip(row, pi, reference)]
        losses.append([x - c.entropy_coef * h for x, h in zip(row, spread[i])])
    want = aggregate_oracle(losses, how, 11)
    flat = [x for row in leaves + spread for x in row]
    gradient = torch.autograd.grad(want, flat, allow_unused=True)
    gradient = [0.0 if g is None else float(g) for g in gradient]

    ours = {name: poisoned(x, mask, poison).requires_grad_() for name, x in named.items()}
    loss, _ = ppo.policy_loss(ours["pi"], ours["entropy"], ours | {"mask": mask}, c)
    total = (loss * ppo.loss_weights(mask, how, 11)).sum()
    total.backward()
    assert abs((total - want).item()) < LEAST
    got = [*ours["pi"].grad[mask].tolist(), *ours["entropy"].grad[mask].tolist()]
    assert max(abs(a - b) for a, b in zip(got, gradient)) < LEAST and len(got) == len(gradient)
    assert ours["pi"].grad[~mask].eq(0).all() and ours["entropy"].grad[~mask].eq(0).all()
    assert ours["mu"].grad is None                      # the weight is detached


@pytest.mark.parametrize("poison", [0.0, math.nan, 1e9])
@pytest.mark.parametrize("reach", [0.0, 0.2])
def test_the_value_loss_and_its_clipping_follow_their_formula(reach, poison):
    c, mask = config(value_clip=reach), some_mask()
    values, old, returns = (noise(5, 9, seed=i) for i in range(3))
    want, gradient = [], []
    for v, o, r in zip(*(rows_of(x, mask) for x in (values, old, returns))):
        row = []
        for a, b, goal in zip(v, o, r):
            near = clip(a, b - reach, b + reach) if reach else a
            row.append(max((a - goal) ** 2, (near - goal) ** 2) / 2)
            moves = abs(a - goal) >= abs(near - goal)               # else it is clipped: no gradient
            gradient.append(a - goal if moves else 0.0)
        want.append(row)
    x = poisoned(values, mask, poison).requires_grad_()
    part = {"mask": mask, "values": poisoned(old, mask, poison), "returns": poisoned(returns, mask, poison)}
    loss, clipped = ppo.value_loss(x, part, c)
    loss.sum().backward()
    assert (loss - packed(want, mask)).abs().max() < LEAST
    assert max(abs(a - b) for a, b in zip(x.grad[mask].tolist(), gradient)) < LEAST and x.grad[~mask].eq(0).all()
    assert clipped.sum() == gradient.count(0.0)


def exact_kl(p, q):
    return sum(a * torch.log(a / b) for a, b in zip(p, q))


def test_estimators_have_the_gradients_they_are_documented_to_have_on_five_tokens():
    logits, q = noise(5, seed=3).requires_grad_(), noise(5, seed=4).softmax(0)

    def gradient(of):
        return torch.autograd.grad(of(logits.softmax(0)), logits)[0]

    forward, backward = gradient(lambda p: exact_kl(p, q)), gradient(lambda p: exact_kl(q, p))
    zero = torch.zeros(5, dtype=torch.float64)
    for kind, want in (("k1", zero), ("k2", forward), ("k3", backward)):      # expectation over samples of pi
        got = gradient(lambda p, kind=kind: (p.detach() * ppo.kl_estimate(kind, p.log(), q.log())).sum())
        assert (got - want).abs().max() < LEAST, kind
        value = (logits.softmax(0) * ppo.kl_estimate(kind, logits.log_softmax(0), q.log())).sum()
        if kind != "k2":                                                        # k1 and k3 are unbiased
            assert abs((value - exact_kl(logits.softmax(0), q)).item()) < LEAST


def test_k1_in_the_reward_gives_the_gradient_of_the_kl_on_five_tokens():
    """One row a token, each weighed by its probability: what sampling does on average."""
    logits, q, coef = noise(5, seed=3).requires_grad_(), noise(5, seed=4).softmax(0), 0.3
    p = logits.softmax(0)
    one = torch.ones(5, 1, dtype=torch.bool)
    penalty = coef * ppo.kl_estimate("k1", p.detach().log(), q.log())[:, None]
    rewards = ppo.token_rewards(torch.zeros(5, dtype=torch.float64), one, penalty)
    part = {"mask": one, "prox": p.detach().log()[:, None], "mu": p.detach().log()[:, None], "advantages": rewards}
    loss, _ = ppo.policy_loss(p.log()[:, None], torch.zeros_like(rewards), part, config())
    got = torch.autograd.grad((p.detach()[:, None] * loss).sum(), logits)[0]
    want = torch.autograd.grad(coef * exact_kl(logits.softmax(0), q), logits)[0]
    assert (got - want).abs().max() < LEAST


def test_a_single_minibatch_still_carries_its_correction():
    """At the first step pi = prox, so nothing is clipped, and the gradient is that of -min(prox / mu, C) A log pi."""
    mask, prox, mu = some_mask(), noise(5, 9, seed=1), noise(5, 9, seed=2)
    pi, a = prox.clone().requires_grad_(), noise(5, 9, seed=3)
    loss, clipped = ppo.policy_loss(pi, pi.detach(), {"mask": mask, "prox": prox, "mu": mu, "advantages": a}, config())
    loss.sum().backward()
    assert (pi.grad - torch.where(mask, -(prox - mu).exp().clamp(max=2) * a, 0)).abs().max() < LEAST
    assert not clipped.any() and (prox - mu > math.log(2)).logical_and(mask).any()


def test_where_mu_is_prox_the_loss_is_that_of_ppo():
    mask, pi, prox, a = some_mask(), *(noise(5, 9, seed=i, scale=0.4) for i in range(3))
    part = {"mask": mask, "prox": prox, "mu": prox, "advantages": a}
    loss, _ = ppo.policy_loss(pi, pi, part, config())
    ratio = (pi - prox).exp()
    want = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    assert (loss - torch.where(mask, want, 0)).abs().max() < LEAST


def test_the_overlong_penalty_falls_from_0_to_minus_1_over_the_buffer():
    lengths = torch.tensor([1.0, 80, 81, 90, 99, 100])
    assert torch.allclose(ppo.overlong_penalty(lengths, 100, 20), torch.tensor([0, 0, -0.05, -0.5, -0.95, -1.0]))
    assert ppo.overlong_penalty(lengths, 100, 0).eq(0).all()


@pytest.mark.parametrize("poison", [0.0, math.nan, 1e9])
def test_the_reward_sits_on_the_last_action_and_the_penalty_on_each(poison):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    penalty = poisoned(torch.full((4, 4), 0.25), mask, poison)
    got = ppo.token_rewards(torch.tensor([1.0, -1, 0.5, 7]), mask, penalty)
    assert torch.equal(got, torch.tensor([[-.25, -.25, .75, 0], [-1.25, 0, 0, 0], [-.25, .25, 0, 0], [0, 0, 0, 0]]))


# Rollouts by hand: a prompt of 2 tokens and a response that ends; one of a single token; one that was cut off.

END = 258                                                     # ends a turn, in the vivid model


def rollout(prompt, response, reward=0.0, group=0, finish="stop", version=0, logprobs=None):
    logprobs = [-1.0 - 0.1 * t for t in range(len(response))] if logprobs is None else logprobs
    return {"prompt_ids": np.array(prompt, np.int32), "response_ids": np.array(response, np.int32),
            "logprobs": np.array(logprobs, np.float32), "versions": np.full(len(response), version, np.int32),
            "reward": reward, "finish_reason": finish, "group": group, "began": 0.0, "ended": 1.0, "problem": "?",
            "row": group}


def three_rows():
    return ppo.arrowlite.Table.from_pylist([
        rollout([10, 11], [20, 21, END], 1.0, group=7), rollout([12], [END], 0.5, group=9),
        rollout([13, 14, 15], [30, 31], -1.0, group=7, finish="length", version=2)])


def test_three_rows_are_laid_out_as_by_hand():
    batch = ppo.lay_out(three_rows(), "cpu")
    assert [x.tolist() for x in batch["tokens"]] == [[10, 11, 20, 21, END], [12, END], [13, 14, 15, 30, 31]]
    assert batch["mask"].int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]        # END is an action
    assert batch["filled"].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert torch.allclose(batch["mu"], torch.tensor([[-1, -1.1, -1.2, 0], [-1, 0, 0, 0], [-1, -1.1, 0, 0]]).double())
    assert batch["versions"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [2, 2, 0, 0]]
    assert batch["cut"].tolist() == [False, False, True] and batch["groups"].tolist() == [0, 1, 0]
    assert batch["lengths"].tolist() == [3, 1, 2] and batch["score"].tolist() == [1, 0.5, -1]
    micro = ppo.micro_batch(batch, [0, 2, 1])
    assert micro["tokens"].tolist() == [10, 11, 20, 21, END, 13, 14, 15, 30, 31, 12, END]
    assert micro["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert micro["cu_seqlens"].tolist() == [0, 5, 10, 12] and micro["max_seqlen"] == 5
    assert micro["at"].tolist() == [1, 2, 3, 4, 7, 8, 9, 10, 11]            # before each action, and behind the last
    assert micro["targets"].tolist() == [20, 21, END, -100, 30, 31, -100, END, -100]
    numbers = torch.arange(9.0) + 1
    assert ppo.spread(numbers, batch["filled"][micro["rows"]]).tolist() == [[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0]]


@pytest.fixture(scope="session")
def vivid(tmp_path_factory):
    """A small random model whose distributions are far from uniform."""
    folder = tmp_path_factory.mktemp("models") / "vivid"
    return str(ppo.tiny_model(folder, seed=1, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                              initializer_range=0.2))


def test_numbers_are_read_one_place_before_the_action_and_at_the_temperature(vivid):
    c, batch = config(temperature=0.7), ppo.lay_out(three_rows(), "cpu")
    model = ppo.Qwen3.from_pretrained(vivid, dtype=torch.float64)
    critic = ppo.Qwen3.from_pretrained(vivid, dtype=torch.float64, value_head=True)
    score = noise(1, 64, seed=4)
    critic.load_hf({**dict(critic.hf_tensors()), "score.weight": score})
    found, values = ppo.measure(model, batch, c), ppo.measure(critic, batch, c)
    for row, tokens in enumerate(batch["tokens"]):
        ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
        with torch.no_grad():
            hidden = model(tokens, torch.arange(len(tokens)), ppo_packed(ends))
        prompt = batch["prompt_lens"][row]
        for t in range(len(tokens) - prompt):
            want = torch.log_softmax(model.logits(hidden)[prompt + t - 1] / 0.7, 0)[tokens[prompt + t]]
            assert abs(float(found[row, t] - want)) < LEAST
        for t in range(len(tokens) - prompt + 1):
            assert abs(float(values[row, t] - hidden[prompt + t - 1] @ score[0])) < LEAST
    assert found[~batch["mask"]].eq(0).all() and values[~batch["filled"]].eq(0).all()


def ppo_packed(ends):
    import parallel
    return parallel.packed(ends)


@pytest.mark.parametrize("truncated,want", [("end", -1.0), ("bootstrap", -1 + 0.9 * 5)])
def test_a_response_that_was_cut_ends_there_or_goes_on_as_the_critic_sees_it(truncated, want):
    c, batch = config(truncated=truncated, gamma=0.9, lam=1.0), ppo.lay_out(three_rows(), "cpu")
    batch["values"] = torch.tensor([[1.0, 1, 1, 7], [2, 8, 0, 0], [3, 4, 5, 0]]).double()    # the last ones: behind
    batch["prox"] = batch["mu"]
    ppo.estimate(batch, c)
    returns = [[0.81, 0.9, 1, 0], [0.5, 0, 0, 0], [0.9 * want, want, 0, 0]]         # stop: what is behind is worth 0
    assert torch.allclose(torch.where(batch["mask"], batch["returns"], 0), torch.tensor(returns).double())
    flat = torch.tensor([0.81 - 1, -0.1, 0, 0.5 - 2, 0.9 * want - 3, want - 4]).double()
    flat = (flat - flat.mean()) / (flat.var(correction=0) + 1e-8).sqrt()
    assert torch.allclose(batch["advantages"][batch["mask"]], flat)


def test_cut_rows_and_equal_groups_teach_nothing_when_asked_so():
    rows = [rollout([1], [2, END], r, group=g, finish=f) for r, g, f in [
        (1.0, 0, "stop"), (0.0, 0, "stop"), (1.0, 1, "stop"), (1.0, 1, "length"), (0.0, 2, "length"), (1.0, 2, "stop")]]
    for changes, taught in [({"truncated": "mask"}, [1, 1, 1, 0, 0, 1]), ({"drop_equal": True}, [1, 1, 0, 0, 1, 1]),
                            ({"drop_equal": True, "truncated": "mask"}, [1, 1, 0, 0, 0, 1])]:
        c, table = config(advantage="grpo", samples=2, **changes), ppo.arrowlite.Table.from_pylist(rows)
        batch = ppo.lay_out(table, "cpu")
        ppo.estimate(batch, c)
        assert batch["mask"].any(1).int().tolist() == taught
        parts = ppo.minibatches(batch, config(minibatches=2), 3, 0)
        assert sorted(sum(parts, [])) == [i for i, one in enumerate(taught) if one]
        assert all(abs(float(batch["weights"][part].sum()) - 1) < LEAST for part in parts)


@pytest.mark.parametrize("advantage", ["gae", "grpo", "rloo", "reinforce++"])
@pytest.mark.parametrize("poison", [math.nan, 1e9])
def test_what_stands_in_padding_changes_nothing(vivid, advantage, poison):
    """Not the advantages, not the loss, not one bit of the parameters after an update."""
    def trained(spoil):
        c = config(advantage=advantage, kl="k1", kl_coef=0.1, entropy_coef=0.01, samples=2, minibatches=1,
                   micro_tokens=7)
        batch = ppo.lay_out(three_rows(), "cpu")
        policy = ppo.Qwen3.from_pretrained(vivid, dtype=torch.float64)
        critic = ppo.Qwen3.from_pretrained(vivid, dtype=torch.float64, value_head=True)
        batch |= {"prox": ppo.measure(policy, batch, c), "values": ppo.measure(critic, batch, c) + 0.3}
        batch["reference"] = batch["prox"] - 0.1
        if spoil:
            for name in ("mu", "prox", "reference", "values", "versions"):
                batch[name] = torch.where(batch["filled"], batch[name], torch.tensor(poison, dtype=torch.float64))
        ppo.estimate(batch, c)
        log = ppo.Counter()
        for rows in ppo.minibatches(batch, c, 0, 0):
            for name, model, step in (("policy", policy, ppo.policy_step), ("critic", critic, ppo.value_step)):
                if name == "policy" or advantage == "gae":
                    ppo.update(ppo.Learner(name, model, ppo.AdamW(model), 1e-2, step), batch, rows, 1.0, c, log)
        numbers = ppo.describe(batch, log, c, 3, policy.mesh)
        return numbers, [x.clone() for model in (policy, critic) for _, x in model.hf_tensors()]

    (numbers, clean), (spoilt_numbers, spoilt) = trained(False), trained(True)
    assert numbers == spoilt_numbers and all(torch.equal(a, b) for a, b in zip(clean, spoilt))


def uneven_rollouts(path, n=12):
    """Prompts of 1 to 30 tokens and responses of 1 to 40, a few of which have most of the tokens."""
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        response = rng.integers(0, 250, 1 + (39 if i % 5 == 0 else int(rng.integers(6))))
        rows.append(rollout(rng.integers(0, 250, 1 + int(rng.integers(30))), response, float(rng.normal()), i // 3,
                            "length" if i == 5 else "stop", logprobs=rng.normal(-5, 1, len(response))))
    ppo.arrowlite.write(ppo.arrowlite.Table.from_pylist(rows), path)
    return str(path)


def three_steps(model, replay, out, settings):
    ppo.train(ppo.Config(model=model, replay=replay, out=str(out), dtype="float64", minibatches=3, samples=3, lr=1e-3,
                         critic_lr=1e-3, warmup=0, kl="k3", kl_coef=0.1, entropy_coef=0.01, **settings))


def weights_of(out, model, value_head):
    """A checkpoint of any layout, as one process reads it."""
    read = ppo.Qwen3.from_pretrained(model, dtype=torch.float64, value_head=value_head)
    ppo.load(out / "checkpoints" / ("critic" if value_head else "policy"), read)
    return {name: x.clone() for name, x in read.hf_tensors()}


def assert_equal_weights(out, other, model):
    """Of the newest checkpoints of two runs, bit by bit."""
    for value_head in (False, True):
        ours, theirs = weights_of(out, model, value_head), weights_of(other, model, value_head)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def leave(model, replay, out, settings):
    """When this rank had its part of the last weights, and when it left."""
    pack, packed = ppo.pack_weights, []

    def slow(*arguments):
        weights = pack(*arguments)
        time.sleep(1 - dist.get_rank())                     # rank 0 takes a second to receive what the others send
        packed.append(time.time())
        return weights

    ppo.pack_weights = slow
    three_steps(model, replay, out, settings)
    return packed[-1], time.time()


def test_no_rank_leaves_before_the_last_has_all_of_the_weights(vivid, tmp_path):
    """A process that ends while what it sends is on its way leaves the other end waiting for ever."""
    replay = uneven_rollouts(tmp_path / "rollouts.arrow")
    (received, _), (_, left) = on_ranks(2, leave, vivid, replay, tmp_path / "out", {"tp": 2}, timeout=240)
    assert left >= received


@pytest.mark.parametrize("algorithm", [{"truncated": "bootstrap"}, {
    "advantage": "reinforce++", "objective": "gspo", "aggregate": "seq-mean-token-mean"}], ids=["ppo", "gspo"])
def test_every_layout_learns_the_same(vivid, tmp_path, algorithm):
    """Three steps in fp64, with the critic: rows alone or packed, over dp with very uneven tokens, over tp and pp."""
    replay = uneven_rollouts(tmp_path / "rollouts.arrow")
    layouts = {"one": (1, {}), "rows alone": (1, {"micro_tokens": 1}), "dp4": (4, {"micro_tokens": 50}),
               "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2, "micro_tokens": 40}),
               "dp2 pp2 tp2": (8, {"tp": 2, "pp": 2, "micro_tokens": 60})}
    found = {}
    for name, (world, settings) in layouts.items():
        out = tmp_path / name
        on_ranks(world, three_steps, vivid, replay, out, settings | algorithm, timeout=240)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        numbers = {k: v for k, v in lines[0].items() if "second" not in k and "per_s" not in k}
        kinds = [False] if "advantage" in algorithm else [False, True]
        found[name] = numbers, {(kind, k): x for kind in kinds for k, x in weights_of(out, vivid, kind).items()}
    numbers, weights = found.pop("one")
    start = dict(ppo.Qwen3.from_pretrained(vivid, dtype=torch.float64).hf_tensors())
    assert max((weights[False, k] - x).abs().max() for k, x in start.items()) > 1e-3                # it did learn
    for name, (others, theirs) in found.items():
        worst = max((weights[k] - theirs[k]).abs().max() for k in weights)
        assert worst < 1e-10 and theirs.keys() == weights.keys(), (name, worst)
        assert all(abs(numbers[k] - others[k]) < 1e-10 for k in numbers), (name, numbers, others)


# The machinery: small runs through all of it, with rewards that any random model can get.

REWARD = '''
import os, random, time

def odd(response, row):
    return sum(ord(x) % 2 for x in response) / (len(response) or 1)

def slow(response, row):
    time.sleep(random.random() * 0.05)
    return odd(response, row)

def throws(response, row):
    return 1 / (row["row"] - 3)

def nan(response, row):
    return float("nan") if row["row"] == 3 else 0.0

def dies(response, row):
    os.kill(os.getpid(), 9)

def own(response, row):
    kept = all(row[name] == x for name, x in row["same"].items()) and "response_ids" in row
    return row["weight"] + len(row["tests"]) + (row["problem"] == "hello") + 10 * kept
'''


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """Twenty problems, and a file of reward functions."""
    folder = tmp_path_factory.mktemp("task")
    ppo.arrowlite.Table.from_pylist(ppo.arithmetic(20)).to_jsonl(folder / "problems.jsonl")
    al.write(al.Table.from_pylist(ppo.arithmetic(2)), folder / "other.arrow")
    (folder / "rewards.py").write_text(REWARD)
    return folder


def short_run(vivid, task, out, **changes):
    settings = dict(model=vivid, data=str(task / "problems.jsonl"), out=str(out), reward=f"{task}/rewards.py:odd",
                    batch=4, samples=2, max_prompt=120, max_response=12, minibatches=2, lr=1e-3, critic_lr=1e-3,
                    warmup=0, steps=3, staleness=0, runtime="inline", graders=1, device="cpu", save_every=100)
    return ppo.Config(**settings | changes)


def lines_of(out, timing=False):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return lines if timing else [{k: v for k, v in line.items() if "second" not in k and "per_s" not in k}
                                 for line in lines]


def versions_of(out, batch):
    return [list(x) for x in ppo.arrowlite.read(Path(out) / "rollouts" / f"{batch:06d}.arrow")["versions"].to_pylist()]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_engine_and_trainer_agree_on_every_logprob_and_after_every_sync(vivid, task, tmp_path, temperature):
    c = short_run(vivid, task, tmp_path / "run", temperature=temperature)
    with ppo.closing(ppo.prepare(c)) as r:
        (generator,), = r.rollouts.generators
        for step in range(3):
            batch = ppo.lay_out(ppo.arrowlite.read(ppo.exchange(r, step)), "cpu")
            assert (ppo.measure(r.policy.model, batch, c) - batch["mu"]).abs().max() < 1e-5
            engine, ours = (dict(model.hf_tensors()) for model in (generator.instance.llm.model, r.policy.model))
            assert engine.keys() == ours.keys() and all(torch.equal(engine[name], ours[name]) for name in ours)
            assert generator.instance.version == step and set(sum(versions_of(c.out, step), [])) == {step}
            before = ours["model.norm.weight"].clone()
            numbers = ppo.learn(r, batch, step, ppo.Clock())
            assert numbers["mismatch_kl"] < 1e-10 and abs(numbers["effective_sample"] - 1) < 1e-9
            assert not torch.equal(before, dict(r.policy.model.hf_tensors())["model.norm.weight"])        # it moved


def test_nothing_that_old_weights_left_in_the_cache_is_used_again(vivid, task, tmp_path):
    """The same prompts under new weights give what a fresh engine gives, though their prefixes were cached before."""
    c = short_run(vivid, task, tmp_path / "run")
    with ppo.closing(ppo.prepare(c)) as r:
        (generator,), = r.rollouts.generators
        llm, samples = generator.instance.llm, r.rollouts.samples(0)
        fresh, old = [dict(sample) for sample in samples], [dict(sample) for sample in samples]
        r.rollouts.ray.get([generator.generate.remote(old, {"max_tokens": 12}, ppo.pack_weights(r.policy.model, 0))])
        assert llm.scheduler.blocks.known                                           # something is cached
        for name, x in r.policy.model.hf_tensors():
            x += 0.05 * noise(*x.shape, seed=len(name)).float()
        weights = ppo.pack_weights(r.policy.model, 1)
        ours, theirs = (r.rollouts.ray.get([actor.generate.remote(s, {"max_tokens": 12}, weights)])[0] for actor, s in (
            (generator, samples), (r.rollouts.spawn(0, [])[0], fresh)))
        for a, b in zip(ours, theirs):
            assert list(a["response_ids"]) == list(b["response_ids"])
            assert np.allclose(a["logprobs"], b["logprobs"], atol=1e-5)


def test_staleness_0_through_actors_is_the_synchronous_loop_bit_by_bit(vivid, task, tmp_path):
    for runtime in ("inline", "actors"):
        ppo.train(short_run(vivid, task, tmp_path / runtime, runtime=runtime, steps=5))
    assert lines_of(tmp_path / "inline") == lines_of(tmp_path / "actors")
    assert_equal_weights(tmp_path / "inline", tmp_path / "actors", vivid)
    assert all(line["lag"] == 0 for line in lines_of(tmp_path / "actors"))


def test_staleness_1_lags_by_one_version_from_the_second_batch_on(vivid, task, tmp_path):
    ppo.train(short_run(vivid, task, tmp_path / "run", runtime="actors", steps=5, staleness=1))
    assert [set(sum(versions_of(tmp_path / "run", batch), [])) for batch in range(5)] == [{0}, {0}, {1}, {2}, {3}]
    assert [line["lag"] for line in lines_of(tmp_path / "run")] == [0, 1, 1, 1, 1]


def test_staleness_k_never_exceeds_its_bound_whatever_is_late(vivid, task, tmp_path, monkeypatch):
    """Slow rewards, and responses long enough that new weights arrive in the middle of them."""
    asked = []
    following = ppo.Rollouts.next

    def spied(self, step, weights):
        path = following(self, step, weights)
        asked.append((step, self.asked))
        return path

    monkeypatch.setattr(ppo.Rollouts, "next", spied)
    ppo.train(short_run(vivid, task, tmp_path / "run", runtime="actors", steps=8, staleness=3, max_response=300,
                        generators=2, graders=2, reward=f"{task}/rewards.py:slow"))
    assert asked == [(step, min(step + 4, 8)) for step in range(8)]             # (k + version + 1) batches
    lines = lines_of(tmp_path / "run")
    assert max(line["lag_max"] for line in lines) <= 3 and max(line["lag"] for line in lines) > 1
    every = [versions for batch in range(8) for versions in versions_of(tmp_path / "run", batch)]
    mixed = [versions for versions in every if len(set(versions)) > 1]
    assert mixed and all(versions == sorted(versions) for versions in mixed)    # some went on under new weights


# What can die, dies.

def process_of(actor, ray):
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


@pytest.mark.parametrize("who", ["generator", "judge"])
def test_a_killed_generator_or_judge_is_started_again_and_nothing_is_lost(vivid, task, tmp_path, monkeypatch, who):
    collect, killed = ppo.Rollouts.collect, []

    def deadly(self, batch):
        if batch == 1 and not killed:
            actor = self.generators[0][0] if who == "generator" else self.judges[0]
            killed.append(process_of(actor, self.ray) if who == "judge" else pids[0])
            os.kill(killed[0], signal.SIGKILL)
        elif who == "generator" and not pids:                                   # while it is idle: later it is busy
            pids.append(process_of(self.generators[0][0], self.ray))
        return collect(self, batch)

    pids = []
    ppo.train(short_run(vivid, task, tmp_path / "calm", runtime="actors"))
    monkeypatch.setattr(ppo.Rollouts, "collect", deadly)
    started = time.time()
    ppo.train(short_run(vivid, task, tmp_path / "killed", runtime="actors"))
    assert killed and lines_of(tmp_path / "calm") == lines_of(tmp_path / "killed"), time.time() - started
    assert_equal_weights(tmp_path / "calm", tmp_path / "killed", vivid)


@pytest.mark.parametrize("reward,error,words", [
    ("dies", RuntimeError, "has died"),
    ("throws", ValueError, "rewards.py:throws on row 3 of --data .* ZeroDivisionError"),
    ("nan", ValueError, "rewards.py:nan on row 3 of --data .* gave nan")])
def test_a_reward_that_dies_throws_or_is_no_number_is_named(vivid, task, tmp_path, reward, error, words):
    with pytest.raises(error, match=words):
        ppo.train(short_run(vivid, task, tmp_path / "run", runtime="actors", batch=20, samples=1,
                            reward=f"{task}/rewards.py:{reward}"))


def family(marker):
    """All processes in whose environment the marker is: whoever was started by whom was started with it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (path / "environ").read_bytes() and "Z" not in (path / "stat").read_text().split()[2]:
                found.append(int(path.name))
        except OSError:
            pass
    return found


def started(c, marker, ranks=1):
    """The run as a program of its own."""
    flags = [f"--{name}={value}" for name, value in vars(c).items() if value != ""]
    launch = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen([*launch, str(HERE / "ppo.py"), *flags], cwd=HERE,
                            env=os.environ | {"MARKER": marker, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_nobody_outlives_a_killed_driver_and_resume_goes_on_bit_by_bit(vivid, task, tmp_path, ranks):
    """At one rank the driver is killed, at two the other trainer; then everything at once, while a checkpoint is being
    written; each time --resume goes on, and in the end all is as if nothing had been."""
    c = short_run(vivid, task, tmp_path / "run", runtime="actors", save_every=1, steps=4, generators=2)
    marker, shm = f"ppo-{os.getpid()}-{ranks}", set(os.listdir("/dev/shm"))
    checkpoints = Path(c.out, "checkpoints", "policy")
    run = started(c, marker, ranks)
    until(lambda: (checkpoints / "000001").exists(), 120)
    everyone = family(marker)
    trainers = [p for p in everyone if b"ppo.py" in Path(f"/proc/{p}/cmdline").read_bytes() and p != run.pid]
    os.kill(run.pid if ranks == 1 else trainers[-1], signal.SIGKILL)
    until(lambda: not family(marker), 10)
    assert run.wait(1) != 0 and len(everyone) >= 4 + ranks

    run = started(replace(c, resume=True), marker, ranks)
    until(lambda: list(checkpoints.glob("*000003*")), 120)
    for process in family(marker):
        os.kill(process, signal.SIGKILL)
    until(lambda: not family(marker), 10)

    run = started(replace(c, resume=True), marker, ranks)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == 0, output
    until(lambda: not family(marker), 10)
    assert set(os.listdir("/dev/shm")) <= shm
    calm = started(replace(c, out=str(tmp_path / "calm")), marker, ranks)
    output = calm.communicate(timeout=120)[0]
    assert calm.returncode == 0, output
    assert lines_of(c.out) == lines_of(tmp_path / "calm")
    assert_equal_weights(tmp_path / "run", tmp_path / "calm", vivid)


def test_a_tensor_parallel_generator_that_loses_a_rank_ends_the_run_in_words(vivid, task, tmp_path, monkeypatch):
    collect, pids = ppo.Rollouts.collect, []

    def deadly(self, batch):
        if batch == 0:
            pids.append(process_of(self.generators[0][1], self.ray))
        else:
            os.kill(pids[0], signal.SIGKILL)
        pids.append(time.time())
        return collect(self, batch)

    monkeypatch.setattr(ppo.Rollouts, "collect", deadly)
    with pytest.raises((RuntimeError, ValueError), match="has died|onnection|peer|gloo"):
        ppo.train(short_run(vivid, task, tmp_path / "run", runtime="actors", generator_tp=2, max_response=100))
    assert time.time() - pids[-1] < 10


@pytest.mark.parametrize("staleness", [1, 2])
def test_rollouts_under_way_are_part_of_a_checkpoint(vivid, task, tmp_path, monkeypatch, staleness):
    """A run that breaks off after it goes on with the batches that were generated ahead, not with new ones."""
    learn = ppo.learn

    def broken(r, batch, step, clock):
        if step == 3:
            raise KeyboardInterrupt
        return learn(r, batch, step, clock)

    settings = dict(staleness=staleness, steps=6, save_every=2)
    ppo.train(short_run(vivid, task, tmp_path / "whole", **settings))
    monkeypatch.setattr(ppo, "learn", broken)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(short_run(vivid, task, tmp_path / "run", **settings))
    monkeypatch.setattr(ppo, "learn", learn)
    ahead = [tmp_path / "run" / "rollouts" / f"{batch:06d}.arrow" for batch in range(2, 2 + staleness)]
    before = [path.stat().st_ino for path in ahead]                     # a file that is written again is another one
    ppo.train(short_run(vivid, task, tmp_path / "run", resume=True, **settings))
    assert [path.stat().st_ino for path in ahead] == before
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    assert_equal_weights(tmp_path / "run", tmp_path / "whole", vivid)


# The runtimes, and everything at once.

def same_numbers(out, other, tolerance):
    for a, b in zip(lines_of(out), lines_of(other)):
        assert a.keys() == b.keys()
        assert all(abs(a[name] - b[name]) <= tolerance for name in a), (a, b)
    assert len(lines_of(out)) == len(lines_of(other))


def test_the_same_three_steps_on_the_real_ray(vivid, task, tmp_path):
    pytest.importorskip("ray")
    ppo.train(short_run(vivid, task, tmp_path / "inline"))
    run = started(short_run(vivid, task, tmp_path / "ray", runtime="ray"), f"ray-{os.getpid()}")
    output = run.communicate(timeout=200)[0]
    assert run.returncode == 0, output
    same_numbers(tmp_path / "inline", tmp_path / "ray", 0)
    assert_equal_weights(tmp_path / "inline", tmp_path / "ray", vivid)


@pytest.mark.slow
def test_the_full_topology_computes_what_one_process_does(vivid, task, tmp_path):
    """Four trainers (tp2 x pp2) and four generator processes (tp2 x 2). fp64, so that every difference would show but
    that of a sum in another order: mu is stored in fp32."""
    settings = dict(dtype="float64", kl="k3", kl_coef=0.1, eval_data=str(task / "problems.jsonl"), eval_every=1)
    ppo.train(short_run(vivid, task, tmp_path / "one", **settings))
    run = started(short_run(vivid, task, tmp_path / "all", runtime="actors", tp=2, pp=2, generators=2, generator_tp=2,
                            **settings), f"all-{os.getpid()}", ranks=4)
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output
    same_numbers(tmp_path / "one", tmp_path / "all", 1e-6)
    ours, theirs = (weights_of(tmp_path / name, vivid, False) for name in ("one", "all"))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6


def test_rollouts_are_kept_as_arrow_files_and_can_be_replayed(vivid, task, tmp_path):
    polars = pytest.importorskip("polars")
    c = short_run(vivid, task, tmp_path / "only", rollout_only=True, steps=2)
    ppo.train(c)
    frame = polars.read_ipc(tmp_path / "only" / "rollouts" / "000001.arrow")
    assert len(frame) == 8 and {"problem", "answer", "prompt", "response", "reward", "logprobs"} <= set(frame.columns)
    assert frame["response_ids"].list.len().to_list() == frame["logprobs"].list.len().to_list()
    assert [line["step"] for line in lines_of(c.out)] == [1, 2] and "policy_loss" not in lines_of(c.out)[0]
    ppo.train(short_run(vivid, task, tmp_path / "loop", steps=1))
    ppo.train(short_run(vivid, task, tmp_path / "replay", data="", replay=f"{c.out}/rollouts/000000.arrow"))
    loop, replay = lines_of(tmp_path / "loop"), lines_of(tmp_path / "replay")
    assert [{k: v for k, v in line.items() if "lag" not in k} for line in loop] == replay      # what lag has a replay?
    assert_equal_weights(tmp_path / "loop", tmp_path / "replay", vivid)


def test_metrics_and_curves_say_what_there_is_to_say(vivid, task, tmp_path):
    ppo.train(short_run(vivid, task, tmp_path / "run", kl="k3", eval_data=str(task / "problems.jsonl"), eval_every=2))
    lines = lines_of(tmp_path / "run", timing=True)
    assert {"reward", "length", "kl", "mismatch_kl", "effective_sample", "clip_share", "explained_variance", "lag",
            "generated_tokens_per_s", "trained_tokens_per_s", "seconds_wait", "seconds_measure", "seconds_train",
            "entropy", "policy_norm", "critic_norm"} <= lines[-2].keys()
    assert [line["step"] for line in lines if "val_reward" in line] == [0, 2, 3]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "config.json").read_text())["kl"] == "k3"


def test_mathematics_is_graded_and_held_out_problems_are_scored(vivid, task, tmp_path):
    """A random model solves nothing; answers put into its mouth are graded as evaluate.py grades."""
    c = short_run(vivid, task, tmp_path / "run", reward="math", eval_data=str(task / "problems.jsonl"), steps=1)
    scores = ppo.train(c)
    assert scores == {0: 0.0, 1: 0.0}
    assert [line["val_reward"] for line in lines_of(c.out) if "val_reward" in line] == [0, 0]
    judge, loop = ppo.Judge("math", 1, "actors"), ppo.asyncio.new_event_loop()
    said = ["so \\boxed{12}", "12", "\\boxed{13}", "\\boxed{\\frac{24}{2}}"]
    judged = loop.run_until_complete(judge.judge([{"response": x, "answer": "12"} for x in said], 0, 1))
    assert [sample["reward"] for sample in judged] == [1, 0, 0, 1]
    ppo.actors.shutdown()


@pytest.mark.parametrize("changes,words", [
    (dict(model=""), "--model must be given"), (dict(model="", out=""), "--model and --out must be given"),
    (dict(advantage="grpo", samples=1), "take --samples 2"), (dict(batch=1, samples=1), "1 responses do not make 2"),
    (dict(advantage="rloo", truncated="bootstrap"), "bootstrap wants"),
    (dict(generators=2), "inline has one generator"), (dict(replay="nowhere.arrow"), "no file nowhere.arrow"),
    (dict(reward="nowhere.py:f"), "of a file that exists"), (dict(reward="{task}/rewards.py:f"), "has no function f"),
    (dict(max_response=5000), "= 5120 tokens; the model knows 4096"),
    (dict(batch=30), "has 20 problems; take --batch 20 or less"),
    (dict(max_prompt=50), r"row 0 of .*problems.jsonl is a prompt of \d+ tokens; raise --max_prompt"),
    (dict(data="nowhere.jsonl"), "nowhere.jsonl"), (dict(tp=2), "dp x pp x tp"),
    (dict(temperature=0.0), "--temperature 0.0 should be above 0"), (dict(save_every=0), "at least 1"),
    (dict(log_every=0), "at least 1"), (dict(keep=-1), "--keep -1 should be at least 0"),
    (dict(staleness=-1), "--staleness -1"), (dict(steps=0), "--steps 0"), (dict(gamma=2.0), "--gamma 2.0 should be"),
    (dict(seed=-1), "--seed -1 should be at least 0"), (dict(clip_low=1.5), "--clip_low 1.5 should be from 0 to 1"),
    (dict(entropy_coef=math.nan), "--entropy_coef nan should be finite"),
    (dict(overlong_buffer=13), "--overlong_buffer 13 is more than --max_response"),
    (dict(wandb="x"), "--wandb x needs a package"),
    (dict(rollout_only=True, replay="x"), "take one of them"), (dict(replay="{task}/other.arrow"), "has no rollouts"),
    (dict(runtime="actors", generator_tp=3), "cannot be split over tp=3")])
def test_settings_that_cannot_be_are_named_before_anything_is_written(vivid, task, tmp_path, changes, words,
                                                                      monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)                     # not installed, whether it is or not
    changes = {k: v.replace("{task}", str(task)) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        ppo.train(short_run(vivid, task, tmp_path / "run", **changes) if "out" not in changes else
                  replace(short_run(vivid, task, "x"), **changes))
    assert not (tmp_path / "run").exists()


def test_requests_have_seeds_of_their_own_that_a_file_can_hold_whatever_the_seed_of_the_run():
    def seeds(seed, batch):
        c = ppo.Config(seed=seed, batch=4, samples=2)
        return [x["seed"] for x in ppo.Rollouts.samples(ppo.SimpleNamespace(c=c, problems=[{}] * 20), batch)]

    assert seeds(7, 3) == [(7 << 40) + i for i in range(24, 32)] and seeds(2**23 - 1, 0)[0] == 2**23 - 1 << 40
    every = [x for seed in (0, 1, 2**23 - 1, 2**23, 20251121, 2**32, 2**70) for batch in (0, 10**6)
             for x in seeds(seed, batch)]
    assert len(set(every)) == len(every) and 0 <= min(every) and max(every) < 2**63


def test_without_a_critic_nothing_waits_for_it(vivid, task):
    for advantage, steps in (("gae", 2), ("grpo", 0)):
        c = short_run(vivid, task, "x", advantage=advantage, critic_warmup=2)
        ppo.check(c, P.Mesh(device="cpu"))
        assert c.critic_warmup == steps


def test_a_reward_file_is_a_module_like_any_other(tmp_path):
    (tmp_path / "beside_the_reward.py").write_text("def half(x): return x / 2")
    (tmp_path / "math.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                                      "from beside_the_reward import half\n@dataclass\nclass Score:\n    x: float\n"
                                      "def score(response, row): return half(Score(len(response)).x)\n")
    assert ppo.load_function(f"{tmp_path}/math.py:score")("four", {}) == 2 and sys.modules["math"] is math


def test_a_reward_sees_the_columns_of_its_row_which_needs_no_answer(vivid, task, tmp_path):
    ours = {"prompt": "hello", "answer": ["a", "b"], "level": 3, "seed": -1, "row": "r", "group": None, "sample": 0.5,
            "response": "theirs", "columns": 4}        # names that we have, too
    rows = [ours | {"same": ours, "weight": 0.5, "tests": ["a"] * (i % 3)} for i in range(4)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    ppo.train(short_run(vivid, task, tmp_path / "run", data=data, reward=f"{task}/rewards.py:own", steps=1))
    table = ppo.arrowlite.read(tmp_path / "run" / "rollouts" / "000000.arrow")
    assert [sample["reward"] for sample in table] == [11.5 + sample["row"] % 3 for sample in table]
    with pytest.raises(ValueError, match="no answer in its columns"):
        ppo.train(short_run(vivid, task, tmp_path / "other", data=data, reward="math"))


def test_a_directory_that_holds_a_run_is_not_overwritten(vivid, task, tmp_path):
    ppo.train(short_run(vivid, task, tmp_path / "run", steps=1, advantage="rloo"))
    with pytest.raises(ValueError, match="holds a run"):
        ppo.train(short_run(vivid, task, tmp_path / "run", advantage="rloo"))
    ppo.train(short_run(vivid, task, tmp_path / "run", advantage="rloo", steps=2, resume=True))
    ppo.train(short_run(vivid, task, tmp_path / "whole", advantage="rloo", steps=2))
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_fewer_steps_than_are_done_are_refused(vivid, task, tmp_path):
    ppo.train(short_run(vivid, task, tmp_path / "run", steps=2, advantage="rloo"))
    before = {name: (tmp_path / "run" / name).read_text() for name in ("metrics.jsonl", "config.json")}
    with pytest.raises(ValueError, match="policy/000002 is past --steps 1; raise it"):
        ppo.train(short_run(vivid, task, tmp_path / "run", steps=1, advantage="rloo", resume=True))
    assert before == {name: (tmp_path / "run" / name).read_text() for name in before}


def test_a_resumed_run_scores_each_step_once_and_keeps_critics_that_have_a_policy(vivid, task, tmp_path, monkeypatch):
    settings = dict(eval_data=str(task / "problems.jsonl"), eval_every=1, save_every=2, steps=4, keep=1)
    learn, save = ppo.learn, ppo.save

    def breaks(r, batch, step, clock):
        if step == 3:
            raise KeyboardInterrupt
        return learn(r, batch, step, clock)

    def dies(folder, *rest):                            # between the critic's checkpoint and the policy's
        if folder.parent.name == "policy" and folder.name == "000004":
            raise KeyboardInterrupt
        return save(folder, *rest)

    ppo.train(short_run(vivid, task, tmp_path / "whole", **settings))
    for name, broken in (("learn", breaks), ("save", dies), ("", None)):
        if broken:
            monkeypatch.setattr(ppo, name, broken)
            with pytest.raises(KeyboardInterrupt):
                ppo.train(short_run(vivid, task, tmp_path / "run", resume=name == "save", **settings))
            monkeypatch.undo()
        else:
            ppo.train(short_run(vivid, task, tmp_path / "run", resume=True, **settings))
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    assert_equal_weights(tmp_path / "run", tmp_path / "whole", vivid)
    for kind in ("policy", "critic"):
        assert [path.name for path in (tmp_path / "run" / "checkpoints" / kind).iterdir()] == ["000004"]


def test_calls_that_a_restart_repeats_do_not_bring_old_weights_back(vivid):
    generator = ppo.Generator(vivid, 1, {"max_model_len": 64, "device": "cpu"})
    weights = {version: ppo.pack_weights(ppo.Qwen3.from_pretrained(vivid), version) for version in (0, 1)}
    for version, now in ((0, 0), (1, 1), (0, 1)):
        generator.begin([], {}, weights[version])
        assert generator.llm.weight_version == generator.version == now


def test_whitened_advantages_are_white_over_what_is_learned_from():
    rows = [rollout([1], [2] * n, r, group=g) for n, r, g in [
        (9, 1.0, 0), (2, 0.0, 0), (2, 1.0, 1), (2, 1.0, 1), (2, 1.0, 2), (2, 1.0, 2), (2, 0.0, 3), (3, 1.0, 3)]]
    for advantage in ("gae", "reinforce++"):
        batch = ppo.lay_out(ppo.arrowlite.Table.from_pylist(rows), "cpu")
        batch["values"] = torch.zeros_like(batch["mu"])
        ppo.estimate(batch, config(advantage=advantage, samples=2, drop_equal=True))
        learned = batch["advantages"][batch["mask"]]
        assert len(learned) == 16 and abs(learned.mean()) < 1e-9 and abs(learned.var(correction=0) - 1) < 1e-6


def test_numbers_of_nothing_are_left_out_and_alarm_nobody(vivid, task, tmp_path, capsys):
    """While only the critic learns there is no entropy, of a replay no lag, and of equal returns nothing to explain."""
    ppo.train(short_run(vivid, task, tmp_path / "run", critic_warmup=2, steps=3))
    first, _, last = lines_of(tmp_path / "run")
    assert "entropy" not in first and "value_loss" in first and "entropy" in last and "lag" in last
    assert "collapsed" not in capsys.readouterr().out
    ppo.train(short_run(vivid, task, tmp_path / "again", data="",
                        replay=str(tmp_path / "run" / "rollouts" / "000002.arrow")))
    assert "lag" not in lines_of(tmp_path / "again")[0] and "policy_loss" in lines_of(tmp_path / "again")[0]


def test_advice_comes_where_it_is_needed_and_nowhere_else():
    fine = {"cut_share": 0.1, "reward_std": 0.3, "reward": 0.5, "mismatch_kl": 1e-4, "entropy": 1.0}
    assert ppo.advice(fine, fine) == {}
    for change, kind, words in [
            ({"cut_share": 0.6}, "cut", "60% of the responses were cut off"), ({"reward_std": 0.0}, "equal", "are 0.5"),
            ({"mismatch_kl": 0.05}, "mismatch", "drifted apart"), ({"entropy": 0.1}, "entropy", "from 1.000 to 0.100"),
            ({"policy_norm": math.inf}, "finite", "not finite")]:
        found = ppo.advice(fine | change, fine)
        assert list(found) == [kind] and words in found[kind]


# Learning.

@pytest.fixture(scope="session")
def pupil(tmp_path_factory):
    """The model of the demo, half of whose answers are of no use; it takes a minute."""
    return ppo.school(str(tmp_path_factory.mktemp("school")))


def lesson(pupil, out, **changes):
    model, data, held_out = pupil
    return ppo.train(ppo.Config(**dict(
        model=model, data=data, eval_data=held_out, out=str(out), runtime="inline", staleness=0, batch=128,
        max_prompt=128, max_response=40, minibatches=2, steps=16, lr=3e-4, critic_lr=1e-3, warmup=5, eval_every=16,
        eval_temperature=1.0, device="cpu") | changes))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("advantage", ["gae", "grpo", "rloo", "reinforce++"])
def test_every_algorithm_raises_the_held_out_score_by_20_points(pupil, tmp_path, advantage, seed):
    groups = {} if advantage == "gae" else {"batch": 32, "samples": 4}
    scores = lesson(pupil, tmp_path / "run", advantage=advantage, seed=seed, **groups)
    assert scores[16] - scores[0] >= 0.2, scores


@pytest.mark.slow
def test_a_random_reward_teaches_nothing(pupil, tmp_path):
    (tmp_path / "coin.py").write_text("def coin(response, row): return hash((response, row['seed'])) % 2")
    lesson(pupil, tmp_path / "run", reward=f"{tmp_path}/coin.py:coin", eval_data="")
    scores = {name: lesson(pupil, tmp_path / name, model=model, steps=1, lr=0.0, eval_every=1)[0]
              for name, model in (("before", pupil[0]), ("after", str(tmp_path / "run" / "model")))}
    assert scores["after"] - scores["before"] < 0.1, scores


@pytest.mark.slow
def test_a_critic_explains_most_of_the_returns_of_a_fixed_policy(pupil, tmp_path):
    """Of a reward that can be known from the prompt: is the first number larger than 5?"""
    (tmp_path / "first.py").write_text("def first(response, row): return int(row['problem'][0]) > 5")
    lesson(pupil, tmp_path / "run", reward=f"{tmp_path}/first.py:first", lr=0.0, critic_lr=1e-3, steps=25,
           minibatches=4, value_clip=0.0, eval_data="", max_response=8)
    explained = [line["explained_variance"] for line in lines_of(tmp_path / "run")]
    assert abs(explained[0]) < 0.1 and min(explained[-3:]) > 0.5, explained


@pytest.mark.slow
def test_generating_ahead_saves_most_of_the_waiting(pupil, tmp_path):
    """On two cores that are otherwise idle, steps take 1.4 times longer at staleness 0; here only the share counts."""
    waiting = []
    for staleness in (0, 1):
        lesson(pupil, tmp_path / str(staleness), runtime="actors", staleness=staleness, steps=10, eval_data="")
        steps = [[line[f"seconds_{name}"] for name in ("wait", "measure", "train")]
                 for line in lines_of(tmp_path / str(staleness), timing=True)[2:]]
        waiting.append(sum(wait for wait, *_ in steps) / sum(map(sum, steps)))
    assert waiting[1] < waiting[0] / 2, waiting


# --- the house -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", [P, E, sft, ppo, ev], ids=lambda file: file.__name__)
def test_a_mistyped_flag_is_named(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [file.__name__ + ".py", "--oops"])
    with pytest.raises(SystemExit):
        file.main()
    assert capsys.readouterr().err.endswith(f"{file.__name__}.py: error: unrecognized arguments: --oops\n")


def test_run_sh_names_its_stages_and_what_fails():
    def run(*args):
        return subprocess.run(["bash", str(HERE / "run.sh"), *args], capture_output=True, text=True)
    assert run("help").returncode == 0 and "pipeline" in run("help").stdout
    unknown = run("frobnicate")
    assert unknown.returncode == 2 and "no stage 'frobnicate'" in unknown.stderr


def pipeline(*words, **environment):
    return subprocess.run(["bash", str(HERE / "run.sh"), *words], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"DEVICE": "cpu", "HF_HUB_OFFLINE": "1"} | environment)


def test_run_sh_takes_a_model_through_every_stage_over_eight_processes_and_does_nothing_twice(tmp_path):
    """sft.py over dp2 x pp2 x tp2; ppo.py with four trainers, pp2 x tp2, and as many generators. Six steps
    teach nothing."""
    words = (f"OUT={tmp_path}", "GPUS=8", "SFT_STEPS=6", "PPO_STEPS=2", "PPO_FLAGS=--batch 16 --eval_every 100",
             "EVAL_FLAGS=--limit 8 --n 2")
    done = pipeline(*words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"percent .*base +sft-model +ppo-model\n", done.stdout)
    for made in ("sft/curves.png", "ppo/curves.png", "ppo/rollouts/000001.arrow", "scores/scores.png"):
        assert (tmp_path / made).stat().st_size > 0, made
    config = json.loads((tmp_path / "ppo" / "config.json").read_text())
    assert (config["tp"], config["pp"], config["generators"]) == (2, 2, 4)
    assert len(list((tmp_path / "sft" / "step-000006").glob("*.safetensors"))) == 8             # a file a rank
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = pipeline("ppo", *words)
    assert again.returncode == 0 and "ppo-model is there" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_run_sh_keeps_to_the_data_and_the_model_that_a_folder_was_begun_with(tmp_path):
    for name in "ab":
        P.tiny_model(tmp_path / name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"{i}+1=?", "solution": f"{i + 1}", "answer": str(i + 1)}) + "\n"
                            for i in range(40)))
    out, data = f"OUT={tmp_path}/out", [f"{name}={rows}" for name in ("SFT_DATA", "RL_DATA", "TEST_DATA")]
    begun = pipeline("data", out, f"MODEL={tmp_path}/a", *data)
    assert begun.returncode == 0, begun.stderr
    for other in (f"MODEL={tmp_path}/b", "SFT_DATA=other.jsonl", "RL_DATA=other.jsonl"):
        refused = pipeline("sft", out, other)
        assert refused.returncode == 2 and f"was begun with {other.split('=')[0]}={tmp_path}" in refused.stderr
    again = pipeline("model", out)                                      # and they need not be said again
    assert again.returncode == 0 and f"the model is in {tmp_path}/a" in again.stdout


def test_run_sh_says_what_to_download_and_what_cannot_be(tmp_path):
    no_model = pipeline("model", f"OUT={tmp_path}", "MODEL=someone/something")
    assert no_model.returncode == 1 and "stage 'model' failed" in no_model.stderr
    assert "hf download someone/something" in no_model.stderr and "MODEL=models/base" in no_model.stderr
    P.tiny_model(tmp_path / "base")
    no_data = pipeline("data", f"OUT={tmp_path}", f"MODEL={tmp_path}/base", "SFT_DATA=someone/something")
    assert no_data.returncode == 1 and "SFT_DATA=that/file.jsonl" in no_data.stderr
    no_stage = pipeline("sft", f"OUT={tmp_path}", f"MODEL={tmp_path}/base")
    assert no_stage.returncode == 1 and "run that first" in no_stage.stderr and "Traceback" not in no_stage.stderr
    for words, says in ((("sft", "ppo"), "one stage at a time"), (("model", "GPU=1"), "there is no setting GPU;"),
                        (("model", f"OUT={tmp_path}", "SFT_DATA=x.jsonl"), "say MODEL= to use other data")):
        refused = pipeline(*words)
        assert refused.returncode == 2 and says in refused.stderr, refused.stderr
    for wrong in ("GPUS=0", "GPUS=many", "DEVICE=tpu", "DEVICE=cuda"):
        refused = pipeline("model", f"OUT={tmp_path}", wrong)
        assert refused.returncode == 2 and "GPUS at least 1" in refused.stderr, wrong


@pytest.mark.slow
@pytest.mark.parametrize("files", ["arrowlite", "actors", "kernels", "parallel kernels", "engine parallel kernels"])
def test_files_that_are_taken_along_run_their_demo_elsewhere(tmp_path, files):
    for name in files.split():
        shutil.copy(HERE / f"{name}.py", tmp_path)
    done = subprocess.run([sys.executable, f"{files.split()[0]}.py"], capture_output=True, text=True, cwd=tmp_path,
                          timeout=300, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_arrowlite_needs_nothing_but_numpy():
    code = ("import sys; sys.path.insert(0, '.'); before = set(sys.modules); import arrowlite; "
            "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
            "print(sorted(m for m in new - set(sys.stdlib_module_names) - {'numpy', 'arrowlite'} if m[0] != '_'))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
