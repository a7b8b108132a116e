"""What this repository claims, as tests: one section a file, in the order of the files.

bash run.sh test            everything that is quick
bash run.sh test all        and what takes minutes or gigabytes
"""
import ctypes
import datetime as dt
import gc
import io
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

import arrowlite as al

HERE = Path(__file__).parent


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


# --- arrowlite.py ----------------------------------------------------------------------------------------------------

pa = pytest.importorskip("pyarrow")
ipc = pytest.importorskip("pyarrow.ipc")
UTC = dt.timezone.utc


def every_type(n=11):
    """A pyarrow table with every type there is, nulls in each, nested to a depth of four."""
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
        "string_view": nulled(texts, pa.string_view()), "binary_view": nulled([b"y" * i for i in range(n)], pa.binary_view()),
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
        moments = np.arange(n).astype("i8") * 86_399_999_999_999 // 10 ** (3 * (3 - ["s", "ms", "us", "ns"].index(unit)))
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
        return [value(y) for y in x] if isinstance(x, list) else {k: value(v) for k, v in x.items()} if isinstance(x, dict) else x
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
    mapped = ipc.open_file(pa.memory_map(str(file))).read_all()     # DuckDB finds the table by the name of the variable
    assert duckdb.sql("select sum(i), count(text) from mapped").fetchall() == [(4, 2)]
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
    schema = pa.schema([pa.field("x", pa.list_(inner), nullable=False, metadata={b"k": b"\xff\0"})], metadata={"a": "é"})
    path = save(pa.table({"x": [[1], []]}, schema), tmp_path / "t.arrow")
    al.write(al.read(path).shuffle(0).filter(lambda row: True), tmp_path / "u.arrow")
    assert load(tmp_path / "u.arrow").schema.equals(schema, check_metadata=True)
    assert pa.table(al.read(path)).schema.equals(schema, check_metadata=True)
    assert al.read(path).schema.metadata == {b"a": "é".encode()}
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
        with ipc.new_stream(sink, table.schema, options=ipc.IpcWriteOptions(use_legacy_format=alignment == 8)) as writer:
            writer.write_table(table)
        (tmp_path / "t.arrows").write_bytes(sink.getvalue())
        assert al.read(tmp_path / "t.arrows").to_pylist() == sane(table.to_pylist())


def test_arrowlite_refuses_foreign_types_and_big_endian_by_name(tmp_path):
    cases = {"decimal": pa.array([Decimal("1.5")]), "time": pa.array([dt.time(1)]),
             "map": pa.array([[("a", 1)]], pa.map_(pa.utf8(), pa.int8())), "union": pa.UnionArray.from_sparse(
                 pa.array([0], pa.int8()), [pa.array([1])]), "run_end_encoded": pa.RunEndEncodedArray.from_arrays([1], ["a"]),
             "list_view": pa.array([[1]], pa.list_view(pa.int8())), "interval": pa.array([(1, 2, 3)], pa.month_day_nano_interval())}
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
    assert duckdb.sql("select sum(x) from there2", ).fetchall() if (there2 := pa.table(ours)) is None else True
    relation = duckdb.sql("select x * 2 as y, t from ours where x < 3") if hasattr(duckdb, "sql") else None
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
    signal.alarm(100)
    counts = {}
    for blob in blobs:
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
    small = every_type(5).select(["null", "bool", "int32", "utf8", "list", "fixed_list", "struct", "dictionary", "string_view",
                                  "zoned_us", "fixed"])
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
