"""What this repository claims, as tests: one section a file, in the order of the files.

bash run.sh test            everything that is quick
bash run.sh test all        and what takes minutes or gigabytes, and the programs on the real Ray
bash run.sh test gpu        what needs a GPU
"""
import asyncio
import contextlib
import datetime as dt
import gc
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import triton
from pyarrow import feather, ipc
from safetensors.numpy import load_file
from tokenizers.processors import TemplateProcessing
from torch.multiprocessing import start_processes
from transformers import AutoTokenizer
from triton.backends.compiler import GPUTarget

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
torch.set_num_threads(1)                        # processes share the cores
signal.signal(signal.SIGINT, signal.default_int_handler)        # shells have it ignored by what runs in the background


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


def forked(function, count, timeout):
    """What function(0), function(1), ... return, each in a process. The first that fails prints why, and ends all."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(rank)) for rank in range(count)]

        def body(rank):
            result = pickle.dumps(function(rank))               # bytes: shared memory would die with the process
            paths[rank].write_bytes(result)

        children = start_processes(body, nprocs=count, join=False, start_method="fork")
        try:
            until(lambda: children.join(timeout), timeout)
        finally:
            for child in children.processes:
                child.kill()
        return [pickle.loads(path.read_bytes()) for path in paths]


def on_ranks(world, function, *args, timeout=100):
    """What function(*args) returns in each of as many processes, which are one group."""
    with tempfile.TemporaryDirectory() as folder:
        def body(rank):
            store = f"file://{folder}/store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            dist.barrier()                      # all have met, before one can leave
            found = function(*args)
            if dist.is_initialized():           # a program ends its group itself
                dist.destroy_process_group()
            return found

        return forked(body, world, timeout)


def killed(when, function, *args):
    """Start a function in a process, and kill it when something is so."""
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    try:
        until(when, 120)
    finally:
        child.kill()
        child.join()


def program(line):
    """The exit code of a command line, run in this process, and what it prints: stdout, stderr."""
    name, *flags = line.split()
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    argv = mock.patch.object(sys, "argv", [name, *flags])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(HERE / name), run_name="__main__")
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def python(*words, **environment):
    """What another Python prints, if it ends well."""
    command = [sys.executable, *words]
    return subprocess.check_output(
        command, cwd=HERE, env=os.environ | environment, text=True, timeout=600)


def check_mistakes(table, **beginnings):
    """Each line has a command and, behind two spaces, what it is refused with."""
    for line in table.strip().splitlines():
        command, says = re.split("  +", line.format(**beginnings))
        code, _, said = program(command)
        assert code == 2, command
        assert re.fullmatch(rf"\w+.py: error: .*{re.escape(says)}.*\n", said), (command, said)


def write_jsonl(path, rows):
    with open(path, "w") as file:
        for row in rows:
            print(row if isinstance(row, str) else json.dumps(row), file=file)
    return str(path)


# --- arrowlite.py ----------------------------------------------------------------------------------------------------

AL_TIME = dt.datetime(1969, 12, 31, 23, tzinfo=dt.timezone.utc)
AL_DAY = AL_TIME.date()
AL_VALUES = {                                       # types as pyarrow has them, and some values of each
    pa.null(): [],
    pa.bool_(): [True],
    pa.uint64(): [0, 2**64 - 1],
    pa.float64(): [0.1, float("inf")],
    pa.date32(): [AL_DAY],
    pa.timestamp("us", "UTC"): [AL_TIME],
    pa.duration("ms"): [dt.timedelta(9, 9)],
    pa.binary(3): [b"abc"],
    pa.binary(0): [b""],
    pa.large_utf8(): ["", "é€😀"],
    pa.string_view(): ["", "twelve bytes", "thirteen byte"],
    pa.dictionary(pa.int8(), pa.utf8()): ["x", "zebra"],
}


def al_type(rng):
    """(a random type, a function that makes a value of it or None)"""
    kind = rng.choice(list(AL_VALUES))
    values = [None, *AL_VALUES[kind]]
    if rng.random() < 0.5:
        return kind, lambda: rng.choice(values)
    kind, make = al_type(rng)
    kind, value = rng.choice([
        (pa.list_(kind), lambda: [make() for _ in range(rng.randrange(4))]),
        (pa.large_list(kind), lambda: [make()]),
        (pa.list_(kind, 2), lambda: [make(), make()]),
        (pa.struct({"a": kind, "b": kind}), lambda: {"a": make(), "b": make()}),
    ])
    return kind, lambda: rng.choice([None, value(), value()])


def al_table(seed):
    """A random table of pyarrow's, of chunks, one of them empty."""
    rng = random.Random(seed)
    kinds, makers = zip(*[al_type(rng) for _ in range(6)])
    schema = pa.schema(zip("abcdef", kinds), {"k": "v"})
    chunks = []
    for n in (7, 0, 1, 20):
        columns = [[make() for _ in range(n)] for make in makers]
        chunks.append(pa.table(columns, schema))
    return pa.concat_tables(chunks).unify_dictionaries()


def al_save(table, path, stream=False):
    new = ipc.new_stream if stream else ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def al_load(path, stream=False):
    reader = ipc.open_stream if stream else ipc.open_file
    return reader(str(path)).read_all()


@pytest.mark.parametrize("seed", range(25))
def test_arrowlite_any_table_goes_through_pyarrow_and_back_unchanged(tmp_path, seed):
    theirs = al_table(seed)
    rows = theirs.to_pylist()
    for stream in (False, True):
        ours = al.read(al_save(theirs, tmp_path / "theirs", stream))
        assert ours.to_pylist() == rows == [ours[i] for i in range(len(rows))]
        al.write(ours, tmp_path / "ours", stream=stream)
        for written in (al_load(tmp_path / "ours", stream), pa.table(ours)):
            written.validate(full=True)
            assert written.to_pylist() == rows
            assert written.schema.metadata == {b"k": b"v"}
            assert al.Table.from_arrow(written).schema == ours.schema
    again = al.Table.from_pylist(rows, ours.schema)
    assert again.to_pylist() == rows == pickle.loads(pickle.dumps(ours)).to_pylist()


@pytest.mark.parametrize("seed", range(100, 120))
def test_arrowlite_views_of_views_read_like_lists(tmp_path, seed):
    """Random selections on top of random selections, beside the same of row numbers."""
    rng = np.random.default_rng(seed)
    theirs = al_table(seed)[seed % 9:]
    rows = theirs.to_pylist()
    view = al.Table.from_arrow(theirs)
    numbers = np.arange(len(rows))
    for _ in range(5):
        n = len(numbers)
        mask = rng.random(n) < 0.8
        picks = rng.integers(-n, max(1, n), 40 * bool(n))
        view, numbers = [
            (view.select(picks), numbers[picks]),
            (view[3::2], numbers[3::2]),
            (view.filter(mask), numbers[mask]),
            (view.shuffle(3), np.random.default_rng(3).permutation(numbers)),
            (al.concat([view[2:], view[9:2], view.slice(0, 2)]), np.roll(numbers, -2)),
        ][rng.integers(5)]
    rows = [rows[i] for i in numbers]
    al.write(view, tmp_path / "t")
    for written in (al_load(tmp_path / "t"), pa.table(view), view):
        assert written.to_pylist() == rows == list(view)
    assert view.filter(lambda row: row["a"] is None).num_rows == view["a"].null_count
    for column in view.columns().values():
        if "list" in column.type.name:
            lists = [row or [] for row in column]
            assert list(column.lengths()) == list(map(len, lists))
            assert list(column.flatten()) == list(itertools.chain(*lists))
    with pytest.raises(IndexError):
        view.select([-len(rows) - 1])


def test_arrowlite_values_take_their_natural_type():
    assert al.Schema({"a": "int8", "b": "int8"}) != al.Schema({"a: int8, b": "int8"})
    for kind, values in {
        "null": [None],
        "bool": [True, None],
        "int64": [1, -(2**63)],
        "timestamp[us, UTC]": [AL_TIME],
        "list<list<int64>>": [[[1], None], []],
        "struct<a: binary, b: date32>": [{"a": b"1", "b": AL_DAY}, None],
    }.items():
        for given in (values, np.array(values, object)):
            made = al.array(given)
            assert made.type == kind
            assert made.to_pylist() == values
    assert al.array([torch.ones(2), np.ones(1, "i2")]).type == "list<float32>"
    for code in "? i1 i8 u4 f2 f8 M8[us] M8[ns] m8[ms]".split():
        values = np.arange(6).astype(code)
        table = al.Table.from_pydict({"x": values, "pair": np.stack([values, values], 1)})
        for again in (pa.table(table)["x"].to_numpy(), *table["pair"].to_numpy().T):
            np.testing.assert_array_equal(again, values, strict=True)


def test_arrowlite_a_value_that_would_change_is_refused():
    for kind, wrong in {
        None: [
            [2**64],
            [1, "a"],
            ["\ud800"],
            "text",
            [AL_TIME, AL_DAY],
        ],
        "int8": [[300], [1.5]],
        "float64": [["1"]],
        "fixed_size_binary[2]": [[b"abc"]],
        "list<utf8>": [["ab"]],
        "date32": [[AL_TIME.replace(tzinfo=None)]],
        "timestamp[ns]": [[AL_TIME], [dt.datetime.max]],
        "null": [[1]],
        "timestamp[h]": [[1]],
        "no_such_type": [[1]],
    }.items():
        for values in wrong:
            with pytest.raises(ValueError):
                al.array(values, kind)


def test_arrowlite_concat_finds_the_common_type_of_columns():
    rows = [
        {"x": None, "l": [], "s": None},
        {"x": 1, "l": None, "s": {"a": None, "b": "t"}},
        {"x": 1.5, "l": [1], "s": {"a": 1, "b": None}},
    ]
    parts = [al.Table.from_pylist([row]) for row in rows]
    parts.append(al.Table.from_pydict({"x": np.int8([2])}))
    assert al.concat(parts).to_pylist() == [*rows, {"x": 2, "l": None, "s": None}]
    for a, b, wanted, value in (
        ("uint8", "int8", "int16", 1),
        ("timestamp[s, tz=UTC]", "timestamp[ns, UTC]", "timestamp[ns, UTC]", np.datetime64(AL_DAY)),
        ("list<int8>", "large_list<null>", "large_list<int8>", []),
    ):
        for kinds in ((a, b), (b, a)):
            tables = [al.Table.from_pylist([{"x": value}], {"x": kind}) for kind in kinds]
            both = al.concat(tables)["x"]
            assert both.type == wanted
            assert list(both) == [value] * 2
    for wrong in (True, 2**53 + 1):
        with pytest.raises(ValueError, match="column 'x'"):
            al.concat([*parts, al.Table.from_pydict({"x": [wrong]})])


def test_arrowlite_rows_are_mapped_and_columns_added_renamed_dropped_and_split():
    assert al.Table.from_pylist([{}, {}], {"a": "int32"}).to_pydict() == {"a": [None, None]}
    table = al.Table.from_pylist([{"a": i, "b": str(i)} for i in range(300)])

    def change(row):
        return {"a": row["b"], "c": 2 if row["a"] % 3 else 0.5}

    def letters(batch):
        return {"c": list("".join(batch["b"]))}
    assert table.map(change, batch_size=77).to_pylist() == [row | change(row) for row in table]
    assert table.map(letters, True, 64, ["a", "b"]).to_pydict() == letters(table.to_pydict())
    shuffled = table.shuffle(1)
    changed = shuffled.with_column("n", range(300)).rename({"a": "A"}).drop("b")
    assert changed.column_names == ["A", "n"]
    assert list(changed["A"]) == list(shuffled["a"])
    train, test = table.split(0.1, seed=7)
    assert len(test) == 30
    assert sorted([*train["a"], *test["a"]]) == list(table["a"])
    with pytest.raises(KeyError, match="there are: a, b"):
        table.drop("nope")
    for method, *wrong in (
        ("split", 301),
        ("select", [True]),
        ("filter", [True]),
        ("rename", {"a": "b"}),
        ("with_column", "c", [1]),
    ):
        with pytest.raises(ValueError):
            getattr(table, method)(*wrong)


def test_arrowlite_jsonl_goes_in_and_out_unchanged(tmp_path):
    row = {
        "text": 'é😀"\n\u2028',
        "int": 2**63 - 1,
        "list": [None, [1]],
        "dict": {"k": True},
    }
    path = tmp_path / "x.jsonl"
    path.write_text("\ufeff{}\n\n" + json.dumps(row))
    al.Table.from_jsonl(path).with_column("time", [None, AL_TIME]).to_jsonl(path)
    row["time"] = AL_TIME.isoformat()
    assert list(map(json.loads, open(path))) == [dict.fromkeys(row), row]
    for text, where in (
        ('{"a": 1}\n\n{"a": oops}\n', "line 3"),
        ('{"a": 1}\n{"a": "x"}', "column 'a'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"x.jsonl.*{where}"):
            al.Table.from_jsonl(path)


def al_pages():
    return int(open("/proc/self/statm").read().split()[1])


def test_arrowlite_numbers_are_views_of_the_memory_map_and_are_lent_as_they_lie(tmp_path):
    path = tmp_path / "t.arrow"
    lists = np.arange(8 << 20).reshape(1024, -1)
    table = al.Table.from_pydict({"l": list(lists)})
    address = table["l"].flatten().to_numpy().ctypes.data
    assert pa.table(table)["l"].chunk(0).values.buffers()[1].address == address
    al.write(table, path)
    before = al_pages()
    part = al.read(path)[500:]
    items = part["l"].flatten()
    views = [items.to_numpy(), items.to_torch(), *part["l"].to_torch()]
    assert part["l"][7] == lists[507].tolist()
    assert (al_pages() - before) * mmap.PAGESIZE < 5 << 20
    views[0][3] = 99                            # a write to private pages: neither a crash nor a change of the file
    assert views[1][3] == views[2][3] == 99
    assert al.read(path)["l"][500] == lists[500].tolist()


def test_arrowlite_files_open_in_polars_duckdb_and_datasets_and_theirs_here(tmp_path):
    import datasets
    import duckdb
    import polars
    path = str(tmp_path / "t")
    table = al.Table.from_pydict({
        "i": [1, None, 3],
        "text": ["a", None, "日本"],
        "l": [[1, 2], [], None],
    })
    al.write(table, path)
    frame = polars.DataFrame(table)
    assert polars.read_ipc(path).to_dicts() == frame.to_dicts() == table.to_pylist()
    frame = frame.with_columns(c=polars.col("text").cast(polars.Categorical))
    rows = frame.to_dicts()
    for save in (frame.write_ipc, frame.write_ipc_stream):
        save(path)
        table = al.read(path)
        assert table.to_pylist() == al.Table.from_arrow(frame).to_pylist() == rows
    al.write(table, path, stream=True)
    assert datasets.Dataset.from_file(path).to_list() == rows
    result = duckdb.from_arrow(pa.table(table)).aggregate("max(i) y")
    assert al.Table.from_arrow(result).to_pylist() == [{"y": 3}]
    with mock.patch.dict(sys.modules, {"pyarrow": None}):
        assert al.read(path).to_pylist() == rows
        with pytest.raises(ImportError, match="pip install pyarrow"):
            al.Table.from_arrow(table)


def test_arrowlite_what_cannot_be_read_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "t"

    def refused(says):
        with pytest.raises(ValueError, match=f"t is not an Arrow file.*{says}"):
            al.read(path)
    table = pa.table({"x": [1, 2]})
    data = al_save(table, path, True).read_bytes()
    path.write_bytes(data[:-8])                                             # a stream may end without its mark
    assert al.read(path).to_pylist() == al_load(path, True).to_pylist() == table.to_pylist()
    for spoilt in (data[:-9], b"", b"PAR1" + bytes(20), b"ARROW1\0\0"):
        path.write_bytes(spoilt)
        refused("")
    for name, column in (
        ("same name", pa.StructArray.from_arrays([[1], [2]], ["a", "a"])),
        ("date", pa.array([AL_DAY], pa.date64())),
    ):
        al_save(pa.table({"col": column}), path)
        refused(f"'col'.*{name}")
    feather.write_feather(table, path)
    refused("compressed")


def test_arrowlite_a_writer_takes_what_its_schema_holds(tmp_path):
    item = al.Field("item", "int8", False)
    fields = {
        "x": "float64",
        "l": al.Type("list", [item]),
        "s": al.Type("struct", [item]),
    }
    with al.Writer(tmp_path / "t", fields) as writer:
        writer.write([{"x": 1, "l": [1], "s": {"item": 1}}])
        writer.write({"s": [None]})                                         # below a null, null is fine
        for bad in (
            {"y": 1},
            {"x": "text"},
            {"l": [2**31]},
            {"l": [None]},
            {"s": {}},
        ):
            with pytest.raises(ValueError):
                writer.write([bad])
    written = al_load(tmp_path / "t")
    assert written["l"].to_pylist() == [[1], None]
    assert not written["s"].type["item"].nullable


def test_arrowlite_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "t.arrow"
    table = al.Table.from_pydict({"x": np.arange(1000)})
    al.write(table, path)
    with pytest.raises(KeyboardInterrupt), al.Writer(path, table.schema) as writer:
        writer.write(table)
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="bytes"):
        al.Table.from_pydict({"x": [b"a"]}).to_jsonl(path)
    assert os.listdir(tmp_path) == ["t.arrow"]
    mapped = al.read(path)
    with ThreadPoolExecutor() as pool:                                      # over the file that is mapped
        list(pool.map(al.write, [mapped[::-1]] * 9, [path] * 9))
    assert mapped["x"][999] == al.read(path)["x"][0] == 999
    with pytest.raises(ValueError, match="directory or a device"):
        al.write(table, tmp_path)


def al_hammer(path, blobs):
    """Read perhaps damaged files in every way; a ValueError is fine, a crash or anything else is not."""
    def read_all(rank):
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        read = 0
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for blob in blobs:
            path.write_bytes(blob)
            signal.alarm(10)
            with contextlib.suppress(ValueError):
                table = al.read(path)
                table.shuffle(0).to_pylist()
                pa.table(table)
                read += 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
        return read

    return forked(read_all, 1, 500)[0]


@pytest.mark.parametrize("rounds", [
    400,
    pytest.param(10_000, marks=pytest.mark.slow),
])
@pytest.mark.parametrize("stream", [False, True])
def test_arrowlite_spoilt_files_give_data_or_a_value_error(tmp_path, stream, rounds):
    rng = random.Random(rounds)
    columns = {"l": pa.array([[1, 2], None], pa.list_(pa.int8(), 2))}
    for kind, values in AL_VALUES.items():
        columns[str(kind)] = pa.array([None, None, *values][-2:], kind)
    data = al_save(pa.table(columns), tmp_path / "t", stream).read_bytes()
    blobs = [data[:n] for n in range(0, len(data), 10_000 // rounds)]
    for _ in range(rounds):
        spoilt = bytearray(data)
        for _ in range(2):
            at = rng.randrange(len(data) - 8) & ~3
            number = rng.choice([
                rng.randbytes(1),
                b"\xff" * 8,
                b"\xff\xff\xff\x7f",
                b"\0\0\0\0\0\1\0\0",
                bytes(4),
            ])
            spoilt[at:at + len(number)] = number
        blobs.append(spoilt)
    assert rounds // 20 < al_hammer(tmp_path / "x", blobs) < rounds * 19 // 20


def test_arrowlite_a_schema_that_fans_out_is_refused_at_once(tmp_path):
    """Members a and b of each of 40 levels have the same members: 2**40 fields in a few thousand bytes."""
    fields = b""
    for _ in range(40):
        a, b = [al.pack(al.items(name), 1, 13, al.pack(), None, b"")
                for name in (b"a", b"b")]
        struct.pack_into("<I", a, 48, len(a) + len(b) - 44)             # its members come after those of b
        fields += struct.pack("<4I", 4, 2, 12, 8 + len(a)) + a + b
    fields += al.vector()
    schema = al.pack(None, fields)
    stream = al.message(al.SCHEMA, schema)
    assert al_hammer(tmp_path / "t", [stream]) == 0


def test_arrowlite_the_demo_runs(capsys):
    al.demo(100)
    assert "1 shuffled row" in capsys.readouterr().out


# --- actors.py -------------------------------------------------------------------------------------------------------

@pytest.fixture(params=["actors", pytest.param("ray", marks=pytest.mark.slow)])
def either(request, tmp_path, monkeypatch):
    """The same programs, on the small Ray and on the real one."""
    module = pytest.importorskip(request.param)
    monkeypatch.chdir(tmp_path)
    module.shutdown()
    module.init(num_cpus=4, resources={"token": 2}, include_dashboard=False, logging_level="ERROR")
    yield module
    module.shutdown()


@pytest.fixture
def small():
    """The small Ray alone, with GPUs that need not exist."""
    small_ray.shutdown()
    with small_ray.init(num_cpus=4, num_gpus=2):
        yield small_ray


def act_alive(pid):
    return os.path.exists(f"/proc/{pid}/exe")                   # which zombies do not have


def act_counter(ray, **options):
    """A class of actors, for many programs."""
    class Counter:
        def __init__(self, first=0):
            self.count = first

        def add(self, n=1):
            self.count += n
            return self.count

        def run(self, function, *args):
            return function(*args)

    return ray.remote(Counter).options(**options)


def act_ask(ray, method, *args):
    """Calls a remote function or method, and waits."""
    return ray.get(method.remote(*args))


def act_raises(ray, error, ref):
    """It fails with this error: a type, or the name of one of Ray's."""
    with pytest.raises(getattr(ray.exceptions, str(error), error)) as caught:
        ray.get(ref, timeout=60)
    return caught.value


def act_late(ray):
    """The ref of a task that waits for a file."""
    def late():
        while not os.path.exists("go"):
            time.sleep(0.01)

    return ray.remote(late).remote()


def program_tasks(ray):
    @ray.remote(num_cpus=2)
    def f(a, *rest, key=None):
        return a, rest, key and ray.get(key[0])

    one = ray.put(1)
    assert ray.get(f.remote(one, 3, f.remote(4), key=[one])) == (1, (3, (4, (), None)), 1)
    with pytest.raises(TypeError):
        f(1)


def program_refs_inside_of_values(ray):
    ref = act_ask(ray, ray.remote(lambda: [ray.put(np.full(100_000, 7.0))]))[0]
    outer = ray.put([ray.put(i) for i in range(9000)])          # more than a packet holds
    add_up = ray.remote(lambda refs: sum(ray.get(refs)))
    assert act_ask(ray, add_up, outer) == sum(range(9000))
    assert ray.get(ref).sum() == 700_000


def program_nested_get(ray):
    @ray.remote(num_cpus=4)
    def all_cpus(depth):
        return sum(ray.get([all_cpus.remote(depth - 1) for _ in range(2)])) if depth else 1

    assert ray.get([all_cpus.remote(2), all_cpus.remote(1)], timeout=100) == [4, 2]


def program_errors(ray):
    class Custom(Exception):
        def __init__(self, code):
            super().__init__(f"code {code}")
            self.code = code

    @ray.remote
    def fail(*cause):
        raise Custom(7)

    outer = ray.remote(lambda: ray.get(fail.remote())).remote()
    error = act_raises(ray, Custom, outer)
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert "raise Custom(7)" in str(error)
    assert error.cause.code == error.code == 7
    act_raises(ray, Custom, fail.remote(outer))


def program_constructor_fails(ray):
    @ray.remote
    class Bad:
        def __init__(self):
            raise ValueError("a lock cannot be sent", threading.Lock())

    assert "a lock" in str(act_raises(ray, "RayActorError", Bad.remote().__ray_ready__.remote()))


def program_actors_keep_order(ray):
    slow = ray.remote(lambda x: time.sleep(0.3) or x + 0)
    log = act_counter(ray).remote([])
    for i in range(50):
        log.add.remote([i])
    failed = log.add.remote(slow.remote("x"))                   # a failed argument fails the call, and no other
    log.add.remote(ray.put([50]))
    log.run.remote(time.sleep, slow.remote(0))                  # its argument comes late, but it goes first
    assert act_ask(ray, log.add, [51]) == list(range(52))
    act_raises(ray, TypeError, failed)
    with pytest.raises(AttributeError):
        log.nothing.remote()


def program_named_actors(ray):
    def find():
        with contextlib.suppress(ValueError):
            return ray.get_actor("one")

    named = partial(act_counter, ray, name="one")
    actor = named().remote(5)
    assert act_ask(ray, named(get_if_exists=True).remote().add) == 6
    with pytest.raises(ValueError):
        named().remote()
    ray.kill(actor)
    until(lambda: not find())
    named(lifetime="detached").remote()
    gc.collect()                                                # no handle is left, but it lives
    assert act_ask(ray, find().add) == 1


def program_handles_travel(ray):
    use = ray.remote(lambda counters: ray.get(counters[0].add.remote()))
    counter = act_counter(ray).remote(5)
    pid = act_ask(ray, counter.run, os.getpid)
    held = ray.put([counter])
    del counter
    assert act_ask(ray, use, held) == 6                       # the handle inside of a value keeps it alive
    del held
    until(lambda: not act_alive(pid), 60)


def program_threaded_actors(ray):
    @ray.remote(max_concurrency=3)
    class Meeting:
        inside = 0

        def join(self):
            self.inside += 1
            time.sleep(0.1)
            self.inside -= 1
            return self.inside

    meeting = Meeting.remote()
    assert max(ray.get([meeting.join.remote() for _ in range(9)])) == 2


def program_async_actors(ray):
    @ray.remote
    class Gate:
        def __init__(self):
            self.event = asyncio.Event()

        async def wait(self):
            await self.event.wait()
            return "open"

        def open(self):
            self.event.set()

        async def follow(self, n):
            me = ray.get_runtime_context().current_actor
            return await me.follow.remote(n - 1) if n else "end"

    gate = Gate.remote()
    cancelled, *refs = [gate.wait.remote() for _ in range(100)]
    assert act_ask(ray, gate.follow, 5) == "end"
    ray.cancel(cancelled)
    act_raises(ray, (ray.exceptions.TaskCancelledError, asyncio.CancelledError), cancelled)
    gate.open.remote()
    assert set(ray.get(refs)) == {"open"}


def program_await(ray):
    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waiting, 0.3)
        with pytest.raises(TypeError):
            await square.remote(None)
        return await asyncio.gather(*map(square.remote, range(3)))

    square = ray.remote(lambda x: x * x)
    waiting = act_late(ray)
    for _ in range(2):                                          # each time in an event loop of its own
        assert asyncio.run(main()) == [0, 1, 4]
    Path("go").touch()
    assert ray.get(waiting) is None


def program_restarts_and_kill(ray):
    actor = act_counter(ray, max_restarts=2).remote(10)
    again = actor.add.options(max_task_retries=-1)
    assert act_ask(ray, again) == 11
    act_raises(ray, "RayActorError", actor.run.remote(os.abort))
    assert act_ask(ray, again) == 11                        # a new state
    pid = act_ask(ray, actor.run, os.getpid)
    ray.kill(actor, no_restart=False)
    until(lambda: not act_alive(pid))
    assert act_ask(ray, again) == 11
    hanging = actor.run.remote(time.sleep, 1000)
    ray.kill(actor)
    act_raises(ray, "RayActorError", hanging)
    act_raises(ray, "ActorDiedError", again.remote())


def program_exit_actor(ray):
    leaver = act_counter(ray, max_restarts=5).remote()
    for _ in range(2):
        act_raises(ray, "RayActorError", leaver.run.remote(ray.actor.exit_actor))


def program_retries(ray):
    def tries(error, run=None, **options):
        """How often it is tried; the third time goes well."""
        def fail():
            with open(name, "a") as file:
                print(file=file)
            if os.path.getsize(name) < 3:
                os._exit(1) if error is os._exit else {}["x"]

        name = str(time.monotonic_ns())
        task = run or ray.remote(lambda fail: fail())
        with contextlib.suppress(KeyError, ray.exceptions.RayError):
            act_ask(ray, task.options(**options), fail)
        return os.path.getsize(name)

    run = act_counter(ray, max_restarts=-1).remote().run
    assert tries(os._exit) == tries(os._exit, max_retries=-1) == tries(os._exit, run, max_task_retries=9) == 3
    assert tries(KeyError) == tries(KeyError, retry_exceptions=[OSError]) == tries(os._exit, max_retries=0) == 1
    for errors in (True, [LookupError]):
        assert tries(KeyError, retry_exceptions=errors) == 3


def program_wait(ray):
    late = act_late(ray)
    there = [ray.put(1), ray.remote(lambda: 1 / 0).remote(), ray.put(2)]    # what failed is ready, too
    refs = [late, *there]
    assert ray.wait(refs, num_returns=3) == (there, [late])
    assert late in ray.wait(refs, num_returns=2)[1]
    assert ray.wait(refs, num_returns=4, timeout=0.1) == (there, [late])
    Path("go").touch()
    assert ray.wait(refs, num_returns=4) == (refs, [])
    for wrong in ([late], [late, late]):
        with pytest.raises(ValueError):
            ray.wait(wrong, num_returns=2)


def program_timeouts(ray):
    late = act_late(ray)
    for timeout in (0, 0.2):
        with pytest.raises(ray.exceptions.GetTimeoutError):
            ray.get([late], timeout=timeout)


def program_cancel(ray):
    @ray.remote(num_cpus=4)
    def forever(name):
        Path(name).touch()
        while True:
            time.sleep(0.01)

    running = forever.remote("a")
    until(lambda: os.path.exists("a"))
    queued = forever.remote("b")
    for ref in (queued, running):
        ray.cancel(ref)
        act_raises(ray, "TaskCancelledError", ref)
    assert not os.path.exists("b")
    assert act_ask(ray, ray.remote(num_cpus=4)(lambda: 1))


def program_resources(ray):
    Counter = act_counter(ray, num_cpus=0.1, resources={"token": 0.8})
    holders = [Counter.remote() for _ in range(2)]
    assert ray.get([holder.add.remote() for holder in holders]) == [1, 1]
    killed, waiting = Counter.remote(), Counter.remote()
    ref = waiting.add.remote()
    assert ray.wait([ref], timeout=0.5)[0] == []
    assert ray.cluster_resources()["CPU"] == 4
    assert ray.available_resources()["CPU"] == 3.8
    ray.kill(killed)                                            # it waits no more
    act_raises(ray, "RayActorError", killed.add.remote())
    ray.kill(holders.pop())
    assert ray.get(ref) == 1
    del holders, waiting
    until(lambda: ray.available_resources().get("token") == 2)


def program_placement_groups(ray):
    util = ray.util
    bundles = [{"CPU": 1}, {"CPU": 2}]
    group = util.placement_group(bundles, strategy="PACK")
    assert ray.get(group.ready()).bundle_specs == bundles
    late = util.placement_group(bundles[1:], strategy="STRICT_SPREAD")
    assert not late.wait(0.2)
    strategy = util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, 0)
    Counter = act_counter(ray, num_cpus=1, scheduling_strategy=strategy)
    first = Counter.remote()
    hanging = first.run.remote(time.sleep, 1000)
    second = Counter.remote()
    assert not ray.wait([second.add.remote(), hanging], timeout=0.5)[0]
    util.remove_placement_group(group)
    act_raises(ray, "RayActorError", hanging)
    assert late.wait(60)


def program_actor_pool(ray):
    def same(actor, x):
        return actor.run.remote(abs, x)

    Counter = act_counter(ray)
    pool = ray.util.ActorPool([Counter.remote(), Counter.remote()])
    assert list(pool.map(same, range(9))) == list(range(9))
    assert sorted(pool.map_unordered(same, range(9))) == list(range(9))
    pool.push(pool.pop_idle())
    pool.submit(same, 5)
    assert pool.has_free()
    assert pool.get_next() == 5
    with pytest.raises(StopIteration):
        pool.get_next()


def program_arrays(ray):
    array = np.arange(1_000_000)
    parameter = torch.nn.Parameter(torch.eye(300, dtype=torch.bfloat16).t())
    ref = ray.put([array, parameter])
    array[0] = 5                                                # put took a snapshot
    one, _ = ray.get(ref)
    assert one[0] == 0
    assert one.ctypes.data == ray.get(ref)[0].ctypes.data
    read = ray.remote(lambda x: (x[0].flags.writeable, x[1], torch.empty(0, 4)))
    writeable, there, empty = act_ask(ray, read, ref)
    assert not (writeable or one.flags.writeable)
    assert empty.shape == (0, 4)
    assert torch.equal(there, parameter)
    assert there.requires_grad


def program_large_arguments(ray):
    large = act_counter(ray, max_restarts=1).remote(np.arange(1_000_000))       # a restart needs them again
    ray.kill(large, no_restart=False)
    assert act_ask(ray, large.run.options(max_task_retries=-1), abs, -1) == 1


def program_env_vars(ray):
    look = ray.remote(lambda: os.environ.get("MY_VARIABLE"))
    outer = ray.remote(lambda: (os.environ["MY_VARIABLE"], ray.get(look.remote())))
    mine = outer.options(runtime_env={"env_vars": {"MY_VARIABLE": "yes"}})
    assert ray.get([mine.remote(), look.remote()]) == [("yes", "yes"), None]


def program_methods_with_options(ray):
    @ray.remote
    class Actor:
        @ray.method(num_returns=2)
        def two(self):
            return 1, 2

    assert act_ask(ray, Actor.remote().two) == [1, 2]
    with pytest.raises(ValueError):
        Actor.options(cpus=1)


def program_several_values(ray):
    pair = ray.remote(lambda: (1, 2))
    assert act_ask(ray, pair.options(num_returns=2)) == [1, 2]
    act_raises(ray, ValueError, pair.options(num_returns=3).remote()[0])


ACT_PROGRAMS = [each for name, each in list(globals().items()) if name.startswith("program_")]


@pytest.mark.parametrize("program", ACT_PROGRAMS)
def test_ordinary_programs_run_as_on_ray(either, program):
    program(either)


def test_two_event_loops_in_two_threads_await_at_once(small):
    async def ask(seconds):
        return await small.remote(lambda: time.sleep(seconds) or seconds).remote()

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda seconds: asyncio.run(asyncio.wait_for(ask(seconds), 30)), [0.6, 0.2, 0.1]))
    assert results == [0.6, 0.2, 0.1]


@pytest.mark.parametrize("ids", [[4, 5], ["GPU-a1", "GPU-b2"]])
def test_gpus_are_given_out_by_their_visible_names(monkeypatch, ids):
    def start(share):
        actors.append(act_counter(small_ray, num_gpus=share).remote())
        return actors[-1].run.remote(lambda: (small_ray.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"]))

    small_ray.shutdown()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, ids)))
    actors = []
    first, second = [([name], str(name)) for name in ids]
    with small_ray.init():
        assert small_ray.get([start(1), start(0.4), start(0.6)]) == [first, second, second]
        late = start(1)
        assert not small_ray.wait([late], timeout=0.3)[0]
        del actors[0]
        assert small_ray.get(late) == first


def test_what_can_never_fit_is_an_error_at_once(small):
    for options in ({"num_cpus": 5}, {"num_gpus": 3}, {"resources": {"x": 1}}):
        act_raises(small, "TaskUnschedulableError", small.remote(os.getpid).options(**options).remote())
        act_raises(small, "ActorUnschedulableError", act_counter(small, **options).remote().add.remote())
    act_raises(small, TypeError, small.remote(os.getpid).options(num_cpus="2").remote())


def test_bundles_are_packed_and_spread_over_nodes():
    small_ray.shutdown()
    cluster = small_ray.cluster_utils.Cluster(head_node_args={"num_cpus": 1})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    where = small_ray.remote(lambda: small_ray.get_runtime_context().get_node_id())
    util = small_ray.util
    for strategy, count, nodes in [
        ("PACK", 2, 1), ("PACK", 5, 3), ("SPREAD", 3, 3), ("STRICT_PACK", 2, 1), ("STRICT_PACK", 3, 0),
        ("STRICT_SPREAD", 3, 3), ("STRICT_SPREAD", 4, 0)]:
        group = util.placement_group([{"CPU": 1}] * count, strategy=strategy)
        homes = set()
        if group.wait(1):
            for i in range(count):
                bundle = util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, i)
                homes.add(act_ask(small_ray, where.options(scheduling_strategy=bundle)))
        assert len(homes) == nodes
        util.remove_placement_group(group)
        if not nodes:
            act_raises(small_ray, "RayError", group.ready())
    cluster.shutdown()


def test_values_are_written_once_freed_and_their_pages_used_again(small):
    def mapped(*arrays):
        """Which memory files a process has mapped."""
        return set(re.findall(r" (\d+) +/memfd:actors", Path("/proc/self/maps").read_text()))

    ref = small.put(np.ones(100 << 20, np.uint8))
    for _ in range(2):
        assert act_ask(small, small.remote(mapped), ref) == mapped()
    view = small.get(ref)[5:]
    del ref
    for i in range(20):                                         # each in the pages of the one before it
        assert small.get(small.put(np.full(100 << 20, i, np.uint8)))[-1] == i
    assert len(mapped()) <= 4 and (view == 1).all()             # a view outlives its ref
    with pytest.raises(small.exceptions.ObjectStoreFullError):
        small.put(np.frombuffer(mmap.mmap(-1, 1 << 40, 0x4022), np.uint8))      # a terabyte of pages that are not there
    small.shutdown()
    del view
    gc.collect()
    assert not mapped()


ACT_DRIVER = f"""
import sys, os, signal, subprocess, time
sys.path.insert(0, {str(HERE)!r})
import actors as ray
ray.init(num_cpus=2)

@ray.remote
class Actor:
    def start(self): return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid, os.getpid(), os.getppid()
    def hang(self): time.sleep(1000)

@ray.remote
def busy():
    while True: pass

actor, large = Actor.remote(), ray.put(bytes(10_000_000))
pids = ray.get(actor.start.remote())
refs = [actor.hang.remote(), *[busy.remote() for _ in range(3)]]
print(*pids, flush=True)
time.sleep(0.5)
"""


@pytest.mark.parametrize("end", [
    "ray.shutdown()", "1 / 0", "os._exit(1)", "os.kill(os.getpid(), signal.SIGINT)",
    "os.kill(os.getpid(), signal.SIGTERM)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_nothing_outlives_the_driver(end):
    code = ACT_DRIVER + end
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 3
    until(lambda: not any(map(act_alive, pids)), 10)


@pytest.fixture
def parent(small):
    """An actor whose worker has started processes: one in a session of its own, one that inherits all descriptors."""
    actor = act_counter(small).remote()
    actor.run.remote(os.system, "sleep 1000 &")
    child = act_ask(small, actor.run, lambda: subprocess.Popen(["sleep", "1000"], start_new_session=True).pid)
    yield actor
    until(lambda: not act_alive(child))


def test_when_the_hub_dies_everything_says_so_and_nothing_stays(small, parent):
    async def main():
        os.kill(hub, signal.SIGKILL)
        await hanging

    hub = act_ask(small, parent.run, os.getppid)
    hanging = parent.run.remote(time.sleep, 1000)
    with pytest.raises(small.exceptions.RaySystemError):
        asyncio.run(asyncio.wait_for(main(), 20))
    for action in (lambda: small.put(1), parent.add.remote):
        with pytest.raises(small.exceptions.RaySystemError):
            action()


def test_what_a_worker_started_ends_with_it(small, parent):
    act_raises(small, "ActorDiedError", parent.run.remote(os.abort))
    crash = small.remote(max_retries=0)(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert "SIGKILL" in str(act_raises(small, "WorkerCrashedError", crash.remote()))


def test_ctrl_c_leaves_a_session_that_works(small):
    def interrupt(seconds, action):
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                action()
        timer.join()

    ref = small.remote(lambda: time.sleep(1) or 1).remote()
    interrupt(0.3, lambda: small.get(ref))
    assert small.get(ref) == 1
    kept = []                                                   # as what is interrupted in a __del__ goes on
    for _ in range(5):
        interrupt(0.03, lambda: kept.append(small.put(b"x" * 50_000)))
    assert act_ask(small, small.remote(abs), small.put(-5)) == 5


@pytest.mark.parametrize("cycles", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_start_and_end_leak_nothing(cycles):
    def cycle():
        with small_ray.init(num_cpus=1):
            assert act_ask(small_ray, small_ray.remote(lambda x: x), np.ones(100_000)).sum() == 100_000
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    small_ray.shutdown()
    before = [cycle() for _ in range(3)][-1]
    assert [cycle() for _ in range(cycles)][-1] == before


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_done_in_whatever_order_all_comes_back(small, seed):
    """Random calls, crashes, restarts, kills and cancels: the hub lives, and nothing is held then."""
    dice = random.Random(seed)
    Counter = act_counter(small, max_restarts=1, max_task_retries=1)
    full = small.available_resources()
    work = small.remote(lambda *values: (np.ones(100_000), small_ray.put(1), values))
    nested = small.remote(num_cpus=0)(lambda values: small_ray.get(work.remote(*values)))

    def act(ref, actor):
        made = dice.choice([
            partial(work.remote, ref, actor), partial(nested.remote, [ref]), partial(small.put, [ref, actor]),
            partial(actor.add.remote, ref), partial(actor.run.remote, os.abort), partial(small.cancel, ref),
            partial(small.kill, actor, no_restart=dice.random() < 0.5), partial(small.get, ref, timeout=0.02),
            Counter.remote, Counter.options(name="one", get_if_exists=True).remote])()
        if isinstance(made, small.ObjectRef):
            refs.append(made)
        if isinstance(made, small.ActorHandle):
            actors.append(made)

    refs = [small.put(0)]
    actors = [Counter.remote()]
    end = time.monotonic() + 3
    while time.monotonic() < end:
        with contextlib.suppress(small.exceptions.RayError, TypeError):
            act(dice.choice(refs), dice.choice(actors))
        del refs[:-30], actors[:-3]
    refs.clear()
    actors.clear()
    until(lambda: gc.collect() >= 0 and small.available_resources() == full, 60)


def test_the_demo_of_actors_runs():
    code = f"import sys; sys.path.append({str(HERE)!r}); import actors as a; a.demo(); a.table(['actors'], 1 << 20)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "counts from 1" in done.stdout and "put of 1 GiB" in done.stdout, done.stderr


# --- kernels.py ------------------------------------------------------------------------------------------------------

on_gpu = partial(torch.randn, device="cuda", dtype=torch.bfloat16)


def ends_of(lengths, device="cpu"):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


def relative_error(a, b):
    """Of a, where b is in fp64; infinite if anything is not a number."""
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).nan_to_num(math.inf).item()


def in_pages(lengths, kv_heads, dim, page):
    """Keys and values in pages in any order, NaN where no sequence has any, and the table of pages."""
    width = -(-max(lengths) // page)
    table = torch.randperm(len(lengths) * width).view(-1, width).int()
    caches = torch.full((2, table.numel() * page, kv_heads, dim), math.nan)
    for pages, length in zip(table, lengths):
        token = torch.arange(length)
        slots = pages[token // page] * page + token % page
        caches[:, slots] = torch.randn(2, length, kv_heads, dim)
    return *caches.view(2, -1, page, kv_heads, dim), table


def kernel_cases(device="cpu", dtype=torch.float32):
    """Operations and what they are called with; what wants a gradient comes in this dtype."""
    torch.manual_seed(0)
    randn = partial(torch.randn, requires_grad=True)
    cases = []

    def case(operation, *args):
        args = list(args)
        for i, x in enumerate(args):
            if torch.is_tensor(x):
                args[i] = x.to(device, dtype if x.requires_grad else x.dtype)
        cases.append((operation, args))

    for dim, heads, kv_heads, queries, keys in (
        (64, 4, 2, [1, 63, 65], [1, 63, 65]),
        (128, 4, 1, [65, 0, 7], [65, 0, 7]),
        (32, 2, 2, [130], [130]),
        (64, 2, 1, [70, 1, 20], [131, 64, 20]),
    ):
        q = randn(sum(queries) + 3, heads, dim)                         # 3 tokens are of no sequence
        k, v = randn(2, sum(keys), kv_heads, dim)
        case(K.flash_attention, q, k, v, ends_of(queries), ends_of(keys))

    for width in (128, 200):
        x, residual = randn(2, 37, width)
        weight = randn(width)
        case(K.rms_norm, x[None], weight)
        case(K.rms_norm, x, weight, 1e-6, residual)
        case(K.swiglu, randn(2, 3, 2 * width))

    for heads, kv_heads, dim in ((6, 3, 64), (8, 8, 128)):
        angles = torch.randn(50, dim // 2)
        tables = angles.cos(), angles.sin(), torch.arange(3) * 29 % 50
        qkv = randn(3, (heads + 2 * kv_heads) * dim)
        case(K.qkv_rotary, qkv, heads, kv_heads, *tables)
        case(K.qkv_rotary, qkv, heads, kv_heads, *tables, *randn(2, dim))

    for rows, vocab, width, temperature in (
        (1, 257, 64, 0.7),
        (130, 600, 96, torch.linspace(0.5, 1.5, 130)),
    ):
        targets = torch.arange(rows) * 37 % vocab
        targets[3::5] = -100
        weight = randn(vocab, width) * 0.2
        case(K.linear_cross_entropy, randn(rows, width), weight, targets, temperature)

    for splits, heads, kv_heads, dim, page, lengths in (
        (None, 6, 3, 64, 16, [1, 7, 64, 65, 200, 0]),
        (1, 8, 1, 64, 4, [63, 0, 130]),
        (4, 2, 2, 128, 256, [400, 3]),
    ):
        k, v, table = in_pages(lengths, kv_heads, dim, page)
        context = torch.tensor(lengths).int()
        q = randn(len(lengths), heads, dim)
        attend = torch.no_grad()(K.paged_attention)
        case(attend, q, k.requires_grad_(), v.requires_grad_(), table, context, None, splits)
    return cases


def draws_the_same(device="cpu"):
    """Kernel and reference, under every kind of limit, among them those at the edges."""
    row = torch.arange(12)
    temperature = torch.linspace(0.3, 1.5, 12).where(row > 1, 0)
    top_k = (row * 75 - 1).where(row != 2, 1)                           # none, 1, up to all, more than all
    top_p = torch.linspace(0.2, 1, 12).where(row != 3, 1e-9)
    seeds = row * 10**15 - 10**16
    settings = temperature, top_k, top_p, seeds, row * 1000
    logits = torch.randn(12, 700) * 3
    on_device = [x.to(device) for x in (logits, *settings)]
    ours = K.sample(*on_device, return_full=True)
    theirs = K.sample(logits.double(), *settings, return_full=True)
    return all(torch.allclose(a.cpu(), b, atol=1e-5) for a, b in zip(ours, theirs))


def stores_in_place(device="cpu"):
    kv = torch.randn(4, 2, 3, 64, device=device).transpose(0, 1)
    cache = torch.zeros(2, 80, 3, 64, device=device)
    want = cache.clone()
    want[:, [3, 79, 16]] = kv[:, [0, 2, 3]]
    slots = torch.tensor([3, -1, 79, 16], device=device)                # -1 is nowhere
    K.store_kv(*kv, *cache.view(2, 5, 16, 3, 64), slots)
    return torch.equal(cache, want)


def check_kernels(device, dtype, bound):
    """Every case against the same operation in fp64, which is its reference."""
    for operation, args in kernel_cases(device, dtype):
        doubles = [x.double() if getattr(x, "requires_grad", False) else x for x in args]
        ours = K.both_ways(operation, *args)
        exact = K.both_ways(operation, *doubles)
        assert len(ours) == len(exact)
        assert max(map(relative_error, ours, exact)) < bound, (operation, args)
    assert draws_the_same(device)
    assert stores_in_place(device)


def check_interpreted():
    assert K.INTERPRET
    K.SLICE = 2**6                  # the gradient of the head in several slices
    check_kernels("cpu", torch.float32, 1e-5)


def test_interpreted_kernels_equal_fp64():
    python("-c", f"import {__name__} as tests; tests.check_interpreted()", TRITON_INTERPRET="1")


@gpu
@pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 8e-3), (torch.float32, 1e-5)])
def test_kernels_on_the_gpu_equal_fp64(dtype, bound):
    check_kernels("cuda", dtype, bound)
    check_samples("cuda")


def plain_head(hidden, weight, targets, temperature):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    live = targets >= 0
    logprob = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return logprob * live, entropy * live


def error_of_the_sharded_head(ranks=1):
    """On each rank: of results and gradients, when it holds a slice of the vocabulary."""
    torch.manual_seed(0)
    group = dist.group.WORLD if ranks > 1 else None
    rank = group.rank() if group else 0
    hidden, weight = torch.randn(122, 16, dtype=torch.float64).split([20, 102])
    mine = weight.chunk(ranks)[rank]
    for x in (hidden, weight, mine):
        x.requires_grad_()
    targets = torch.arange(20) * 7 % 102
    targets[::6] = -100
    sharded = partial(K.linear_cross_entropy, group=group)
    ours = K.both_ways(sharded, hidden, mine, targets, 0.7)
    *want, gradient = K.both_ways(plain_head, hidden, weight, targets, 0.7)
    want.append(gradient.chunk(ranks)[rank])
    logprob, _ = sharded(hidden[:2], mine, torch.tensor([101, 102]))    # 102 is no word
    assert logprob.isnan().tolist() == [False, True]
    return max(map(relative_error, ours, want))


def test_logprob_and_entropy_are_those_of_the_softmax_on_one_process_and_on_two():
    assert error_of_the_sharded_head() < 1e-12
    assert max(on_ranks(2, error_of_the_sharded_head, 2)) < 1e-12


def check_samples(device="cpu", n=50_000):
    """Tokens have the frequencies of the distribution, by the chi-square test, and its logprobs."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    positions = torch.arange(n, device=device)
    seeds = torch.full_like(positions, 7)
    for temperature, top_k, top_p, left in (                            # left: how many tokens
        (1, -1, 1, 6),
        (0.6, -1, 1, 6),
        (1.3, 3, 1, 3),
        (1, -1, 0.7, 2),
        (0.9, 4, 0.8, 2),
    ):
        full = (logits / temperature).log_softmax(0)
        kept = full[:left].log_softmax(0)
        settings = temperature, top_k, top_p, seeds, positions
        found = K.sample(logits.to(device).expand(n, 6), *settings, return_full=True)
        tokens, *logprobs = [x.cpu() for x in found]
        for ours, theirs in zip(logprobs, (kept, full)):
            assert torch.allclose(ours, theirs[tokens], atol=1e-5)
        expected = n * kept.exp()
        distance = (tokens.bincount(minlength=left) - expected).square() / expected
        assert distance.sum() < 26                                      # 5 degrees of freedom: one in 10,000


def test_samples_have_the_frequencies_of_the_distribution():
    check_samples()


def test_a_request_gets_the_same_tokens_in_any_batch():
    rows = torch.arange(12)
    logits = torch.randn(12, 300)
    logits[:4, [7, 250]] = 9
    temperature = torch.linspace(0.2, 1.5, 12).where(rows > 3, 0)
    top_p = torch.linspace(0.3, 1, 12)
    settings = temperature, rows * 20, top_p, rows - 3, rows * 9
    tokens, logprobs = K.sample(logits, *settings)
    assert tokens[:4].tolist() == [7] * 4                               # greedy: the first of the largest
    assert not logprobs[:4].any()
    for some in ([5], [11, 2, 6]):
        again = K.sample(*(x[some] for x in (logits, *settings)))
        assert torch.equal(again[0], tokens[some])
        assert torch.equal(again[1], logprobs[some])


# On a GPU: the same bits in whatever company.

@gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_query_gets_the_same_bits_alone_in_a_chunk_and_from_pages(dim, group):
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 300, 777, 2045, 3000, 5000]
    q = on_gpu(sum(lengths), 2 * group, dim)
    k, v = on_gpu(2, sum(lengths), 2, dim)
    ends = ends_of(lengths, "cuda")
    last = ends[1:] - 1
    packed = K.flash_attention(q, k, v, ends)

    token = torch.cat([torch.arange(n) for n in lengths]).cuda()
    row = torch.arange(len(lengths)).cuda().repeat_interleave(ends.diff())
    for page in (16, 100):
        width = 5000 // page + 1
        table = torch.randperm(len(lengths) * width, device="cuda").int().view(-1, width)
        caches = on_gpu(2, table.numel(), page, 2, dim)
        K.store_kv(k, v, *caches, table[row, token // page] * page + token % page)
        paged = K.paged_attention(q[last], *caches, table, ends.diff(), splits=1)
        assert torch.equal(paged, packed[last])

    for length, end in zip(lengths, ends.tolist()[1:]):
        start = end - length
        keys = ends_of([length], "cuda")
        for n in (length, min(length, 37)):                             # whole, and its last tokens
            chunk = slice(end - n, end)
            queries = ends_of([n], "cuda")
            some = K.flash_attention(q[chunk], k[start:end], v[start:end], queries, keys)
            assert torch.equal(some, packed[chunk])


@gpu
def test_a_row_gets_the_same_bits_among_any_others():
    weight = on_gpu(151_936, 1024) * 0.05
    norm = on_gpu(1024)
    norms = on_gpu(2, 128)
    tables = torch.randn(2, 99, 64, device="cuda")

    def all_of(x, residual, qkv, targets):
        temperature = torch.full([len(x)], 0.7, device="cuda")
        heads = K.qkv_rotary(qkv, 16, 8, *tables, targets % 99, *norms)
        one = K.linear_cross_entropy(x, weight, targets, 0.7)
        each = K.linear_cross_entropy(x, weight, targets, temperature)
        assert all(map(torch.equal, one, each))
        return (
            *K.rms_norm(x, norm, 1e-6, residual),
            K.rms_norm(x, norm),
            *heads,
            K.swiglu(qkv),
            *one,
        )

    rows = 16_384
    inputs = (
        on_gpu(rows, 1024),
        on_gpu(rows, 1024),
        on_gpu(rows, 4096),
        torch.arange(rows).cuda() * 9,
    )
    whole = all_of(*inputs)
    for n in (1, 2, 17, 100, 128, 1000):
        for start in (0, 777, rows - n):
            some = slice(start, start + n)
            parts = all_of(*(x[some] for x in inputs))
            for part, out in zip(parts, whole):
                assert torch.equal(part, out[some])


@gpu
def test_gradients_repeat_bit_for_bit_and_the_head_never_holds_the_logits():
    for operation, args in kernel_cases("cuda", torch.bfloat16):
        once = K.both_ways(operation, *args)
        assert all(map(torch.equal, once, K.both_ways(operation, *args))), (operation, args)
    hidden = on_gpu(8192, 1024, requires_grad=True)
    weight = on_gpu(151_936, 1024, requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprob, entropy = K.linear_cross_entropy(hidden, weight, torch.arange(8192, device="cuda"))
    (logprob + entropy).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before - weight.nbytes
    assert extra < 512 * 2**20


@gpu
def test_rows_times_width_may_need_64_bits():
    x = on_gpu(2_200_000, 1024)
    tables = torch.randn(2, 9, 64, device="cuda")
    weight = on_gpu(1024)

    def rotary(x):
        positions = torch.zeros_like(x[:, 0], dtype=torch.int64)
        return K.qkv_rotary(x, 4, 2, *tables, positions)[0]

    def attention(x):
        ends = torch.arange(0, len(x) + 1, 100, device="cuda")
        q, k, v, _ = x.unflatten(1, (16, 64)).split([8, 1, 1, 6], 1)
        return K.flash_attention(q, k, v, ends, max_seqlen_q=100)

    for call in (partial(K.rms_norm, weight=weight), K.swiglu, rotary, attention):
        assert torch.equal(call(x)[-100:], call(x[-100:]))


def test_every_kernel_compiles_for_hopper_without_spills(monkeypatch):
    """A launch compiles for sm_90 and does no more; two threads read what the assembler made of it."""
    launch = triton.JITFunction.run
    readers = ThreadPoolExecutor(2)
    machines = {}

    def compiled(*args, **named):
        code = launch(*args, **named | {"warmup": True})
        machines[code.name, code.hash] = readers.submit(code.asm.__getitem__, "sass")

    driver = mock.Mock()
    driver.active.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    monkeypatch.setattr("triton.runtime.jit.driver", driver)
    monkeypatch.setattr(triton.JITFunction, "run", compiled)
    monkeypatch.setattr(K, "_on_triton", lambda x: True)
    make = partial(torch.zeros, dtype=torch.bfloat16, requires_grad=True)           # the widths of Qwen3-0.6B
    at = torch.arange(256)
    table = torch.zeros(4, 64, dtype=torch.int32)
    for dim in (64, 128):
        k, v = make(2, 256, 2, dim)
        K.both_ways(K.flash_attention, make(256, 4, dim), k, v, ends_of([256]), None, 256)
        pages = make(2, 9, 16, 2, dim)
        for splits in (1, 4):
            K.paged_attention(make(4, 4, dim), *pages, table, table[:, 0], None, splits)
    x = make(256, 1024)
    weight = make(1024)
    K.both_ways(K.rms_norm, x, weight)
    K.both_ways(K.rms_norm, x, weight, 1e-6, make(256, 1024))
    tables = torch.zeros(2, 256, 64)
    K.both_ways(K.qkv_rotary, make(256, 4096), 16, 8, *tables, at, *make(2, 128))
    K.both_ways(K.swiglu, make(256, 6144))
    K.both_ways(K.linear_cross_entropy, x, make(8192, 1024), at)
    stores_in_place()
    row = torch.arange(4)
    K.sample(torch.zeros(4, 1000), 1.0, 5, 0.9, row, row)
    source = Path(K.__file__).read_text()                               # a kernel is what no other function calls
    kernels = {x for x in vars(K) if hasattr(getattr(K, x), "arg_names") and source.count(f" {x}(") == 1}
    assert {name for name, _ in machines} == kernels
    for (name, _), reader in machines.items():
        machine = reader.result()
        spills = machine.count("LDL") + machine.count("STL")
        few = 30 if name == "_attention_keys" else 2                    # two accumulators of [128, 128]
        assert spills <= few, (name, spills)
        if name.startswith(("_attention", "_head")):                    # products, and the copy engine
            assert min(machine.count("HGMMA"), machine.count("UTMALDG")) >= 4, name
        if name == "_paged_part":                                       # small products
            assert machine.count("HMMA") >= 16


def test_the_demo_checks_every_kernel():
    assert "flash_attention" in python("kernels.py")


# --- parallel.py -----------------------------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=104, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    eos_token_id=50)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=32)
PAR_KINDS = {
    "qwen3": dict(),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=False),
    "llama": dict(
        model_type="llama", num_attention_heads=8, num_key_value_heads=4, rope_parameters=LLAMA3)}
CPU = P.Mesh(device="cpu")
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def par_model(mesh=CPU, kind="qwen3", dtype=torch.float64, **settings):
    """Everything random, norms and biases too, and the same on every layout."""
    model = P.Qwen3(P.Config(**SMALL | PAR_KINDS[kind]), mesh, dtype=dtype, seed=None, **settings)
    generator = torch.Generator().manual_seed(0)
    model.load_hf(
        (name, 0.3 * torch.randn(x.shape, generator=generator) + ("norm" in name))
        for name, x in model.hf_tensors())
    return model


def par_batches(mesh=CPU):
    """Uneven micro-batches; nothing is learned in the last two."""
    rng = np.random.default_rng(0)
    batches = []
    for learned in (0.8, 0.3, 1, 0):
        documents = [rng.integers(0, 104, n) for n in rng.integers(1, 9, 4)]
        masks = [rng.random(len(document)) < learned for document in documents]
        batches.append(P.micro_batch(documents, masks))
    batches.append(P.micro_batch([]))
    return batches[mesh.dp_rank::mesh.dp]


def par_loss(model, hidden, batch):
    hidden = hidden[batch["predict"]]
    if model.value_head:
        return ((model.value(hidden) - 0.3) ** 2).sum() / 50, None
    logprob, entropy = model.logprobs(hidden, batch["targets"], 0.9)
    return -(logprob + 0.1 * entropy).sum() / 50, None


def par_whole(model):
    return {name: x.clone() for name, x in model.hf_tensors()}


@pytest.mark.parametrize("kind", PAR_KINDS)
def test_logits_are_those_of_transformers_and_weights_go_there_and_back(kind, tmp_path):
    from transformers import AutoModelForCausalLM
    ours = par_model(kind=kind, dtype=torch.float32)
    ours.save_pretrained(tmp_path / "saved")
    P.save(tmp_path / "run", ours, P.AdamW(ours))
    P.merge(tmp_path / "run", tmp_path / "merged")
    documents = [torch.arange(n) * 7 % 104 for n in (11, 1, 30, 7)]
    batch = P.micro_batch(documents)
    with torch.no_grad():
        hidden = ours(batch["tokens"], batch["positions"], P.packed(batch["cu_seqlens"]))
        logits = ours.logits(hidden)
        for folder in ("saved", "merged"):
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
            wanted = torch.cat([theirs(x[None]).logits[0] for x in documents])
            assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    again = P.Qwen3.from_pretrained(tmp_path / "theirs", CPU)
    equal(par_whole(again), par_whole(ours))


def par_owned(model, values):
    """What each dp rank has for the parameters that it steps, put together."""
    owned = {name: x.clone() for name, x in model.hf_tensors(values)}
    replicas = [owned] * model.mesh.dp
    if model.mesh.dp > 1:
        dist.all_gather_object(replicas, owned, model.mesh.dp_group)
    for replica in replicas:
        owned |= replica
    return owned


def par_learn(mesh=CPU, kind="qwen3", afab=False, losses=(par_loss,) * 2, **settings):
    """Weights after a step of each loss; norm and gradients of the last."""
    model = par_model(mesh, kind, **settings)
    optimizer = P.AdamW(model, lr=1e-3, weight_decay=0.1, clip=0.5)
    for loss in losses:
        P.run(model, par_batches(mesh), loss, "afab" if afab else "1f1b")
        norm = optimizer.step()
    gradients = par_owned(model, {p: p.grad for p in model.masters})
    found = {"norm": norm} | par_whole(model)
    return found | {"gradient of " + name: x for name, x in gradients.items()}


def test_a_step_is_that_of_torchs_adamw():
    ours = par_learn()
    plain = par_model()
    groups = [{"params": []}, {"params": [], "weight_decay": 0}]
    for p in plain.parameters():
        groups[p.ndim == 1]["params"].append(p)
    theirs = torch.optim.AdamW(groups, 1e-3, (0.9, 0.95), weight_decay=0.1)
    for _ in range(2):
        theirs.zero_grad()
        for batch in par_batches():
            attend = P.packed(batch["cu_seqlens"])
            hidden = plain(batch["tokens"], batch["positions"], attend)
            par_loss(plain, hidden, batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        theirs.step()
    for name, x in plain.hf_tensors():
        assert (x - ours[name]).abs().max() < 1e-8


def par_compare(cases):
    for case in cases:
        layout, kind, *flags = case.split()
        mesh = P.init(*map(int, layout.split("x")))
        ours = par_learn(mesh, kind, **dict.fromkeys(flags, True))
        theirs = par_learn(CPU, kind, value_head="value_head" in flags)
        assert ours.keys() == theirs.keys()
        for name, x in theirs.items():
            error = (ours[name] - x).abs().max() / x.abs().max()
            assert error < 1e-12, (case, name)                          # fp64: sums in another order


@pytest.mark.parametrize("world,cases", [
    (2, ["1x1x2 qwen3", "1x1x2 llama sequence_parallel", "1x1x2 qwen2", "1x2x1 qwen3", "1x2x1 llama afab",
         "1x2x1 qwen3 value_head", "2x1x1 qwen3 recompute", "2x1x1 qwen2"]),
    (4, ["1x1x4 llama", "2x1x2 qwen3 sequence_parallel value_head recompute", "1x4x1 qwen3", "2x2x1 qwen3 recompute",
         "2x1x2 qwen2", "4x1x1 qwen3"]),
    (8, ["2x2x2 qwen3 sequence_parallel", "1x8x1 qwen3", "8x1x1 qwen2"])])      # more than layers, and than batches
def test_every_layout_computes_what_one_process_does(world, cases):
    on_ranks(world, par_compare, cases)


def par_order(layout):
    """What the first layer of a rank does, forward, back and reducing, in order."""
    events = []
    model = par_model(P.init(*layout))
    model.layers[0].register_forward_pre_hook(lambda *_: events.append("F"))
    model.layers[0].register_full_backward_hook(lambda *_: events.append("B"))
    with mock.patch.object(dist, "reduce", lambda *_, **__: events.append("R")):
        P.run(model, par_batches()[:4], par_loss)
    return "".join(events)


def test_stages_keep_few_activations_and_gradients_are_reduced_while_backward_goes_on():
    assert on_ranks(2, par_order, (1, 2, 1)) == ["FFBFBFBB", "FBFBFBFB"]
    order = on_ranks(2, par_order, (2, 1, 1))[0]
    assert order.startswith("FBFBFBFR")
    assert "RB" in order


def test_the_head_counts_as_layers_of_its_stage():
    first = P.Mesh(pp=2, device="meta")
    for value_head, layers in (False, 18), (True, 14):
        model = P.Qwen3(P.Config(), first, seed=None, value_head=value_head)
        assert len(model.layers) == layers


def test_a_gradient_that_is_not_finite_changes_nothing():
    def spoilt(*args):
        return par_loss(*args)[0] * math.nan, None

    equal(par_learn(losses=[spoilt, par_loss]), par_learn(losses=[par_loss]))


def test_what_cannot_be_is_refused_by_name():
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=4.0)
    wrong = dict(
        hidden_act="gelu", model_type="gemma", rope_parameters=yarn,
        quantization_config={"quant_method": "fp8"})
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name.replace("parameters", "type")):
            P.Config(**{name: value})
    with pytest.raises(ValueError, match="tp=2"):
        P.Qwen3(P.Config(vocab_size=101), P.Mesh(tp=2, device="meta"))
    with pytest.raises(ValueError, match="1 processes"):
        P.init(tp=2)


def test_weights_are_loaded_in_place_and_all_or_none():
    model = par_model()
    before = par_whole(model)
    place = model.layers[0].qkv.data_ptr()
    more = {name: x + 1 for name, x in before.items()}
    for wrong in ({}, more | {"model.norm.weight": np.zeros(9)}):
        with pytest.raises(ValueError, match="the model wants"):
            model.load_hf(wrong)
        equal(par_whole(model), before)
    model.load_hf((name, x.numpy()) for name, x in more.items())
    equal(par_whole(model), more)
    assert model.layers[0].qkv.data_ptr() == place


def par_resume(folder, steps, *layout):
    """Weights, masters and moments after step 3 and the last. The checkpoint is made after 3, or gone on from."""
    mesh = P.init(*layout)
    model = par_model(mesh, dtype=torch.bfloat16)
    optimizer = P.AdamW(model, lr=1e-2, weight_decay=0.1)
    first = P.load(folder, model, optimizer)["step"] if P.latest(folder) else 0
    found = {}
    for step in range(first, steps + 1):
        if step > first:
            P.run(model, par_batches(mesh), par_loss)
            optimizer.step()
        if step in (3, steps):
            owned = [par_owned(model, values) for values in optimizer.state.values()]
            found[step] = [par_whole(model), *owned]
        if step == 3 > first:
            P.save(folder / "step-3", model, optimizer, {"step": step})
    return found


def test_a_checkpoint_loads_on_any_layout_and_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    wanted = on_ranks(8, par_resume, tmp_path, 5, 2, 2, 2)[0]
    for steps, *layout in ((3, 1, 4, 1), (3, 4, 1, 2), (3, 1, 1, 1), (5, 2, 2, 2)):
        found = on_ranks(math.prod(layout), par_resume, tmp_path, steps, *layout)[-1]
        equal(found, {step: wanted[step] for step in found})
    assert {x.dtype for x in wanted[5][1].values()} == {torch.float32}      # masters of a model in bf16


def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path):
    model = par_model()

    def save_forever(folder):
        for step in itertools.count():
            P.save(folder / f"step-{step}", model, None, {"step": step})

    for trial in range(8):
        folder = tmp_path / str(trial)
        killed(partial(P.latest, folder), save_forever, folder)
        count = len(list(folder.glob("step-*")))
        assert P.load(folder, model)["step"] == count - 1


def test_checkpoints_that_are_damaged_or_foreign_are_refused(tmp_path):
    model = par_model()
    P.save(tmp_path / "run", model, None, {"best": 1.0})
    assert P.load(tmp_path, model) == {"best": 1.0}
    with pytest.raises(ValueError, match="missing"):                    # moments
        P.load(tmp_path, model, P.AdamW(model))
    with pytest.raises(ValueError, match="something else"):
        P.save(tmp_path, model)
    with pytest.raises(pickle.UnpicklingError):                         # what could not be loaded again
        P.save(tmp_path / "new", model, None, np.float64(1))
    assert P.latest(tmp_path).name == "run"
    os.truncate(tmp_path / "run" / "model-00000.safetensors", 1000)
    with pytest.raises(ValueError, match="model-00000"):
        P.load(tmp_path, model)


def test_documents_are_packed_evenly():
    lengths = np.random.default_rng(0).integers(1, 400, 100)
    bins = P.pack(lengths, 1000, 4)
    assert sorted(sum(bins, [])) == list(range(100))
    loads = [lengths[rows].sum() for rows in bins]
    assert 0.9 * max(loads) < min(loads) <= max(loads) <= 1000
    with pytest.raises(ValueError):
        P.pack([5, 1001], 1000)


def test_learned_tokens_are_predicted_from_the_ones_before():
    documents = [np.array([5, 6, 7]), torch.tensor([8]), [9, 10]]
    masks = [[True, False, True], [True], [False, True]]
    batch = P.micro_batch(documents, masks)
    names = "tokens", "positions", "cu_seqlens", "predict", "targets"
    assert " ".join(str(batch[name].tolist()) for name in names) == (
        "[5, 6, 7, 8, 9, 10] [0, 1, 2, 0, 0, 1] [0, 3, 4, 6] [1, 4] [7, 10]")


def test_training_flops_are_six_a_used_parameter_and_token_and_causal_attention():
    wanted = 8192 * 6 * 595_984_384 + 8 * 6 * 28 * 2048 * 1024**2       # 596 M numbers in matrices, the words once
    for tied in (True, False):                                          # which are looked up, if they are not the head
        assert P.training_flops(P.Config(tie_word_embeddings=tied), [1024] * 8) == wanted


def test_four_processes_learn_what_one_does():
    _, said, _ = on_ranks(4, program, "parallel.py --tp 2 --pp 2 --device cpu")[0]
    assert float(said.split()[-1]) < 1e-5


@gpu
@pytest.mark.parametrize("layout", ["--dp 2", "--pp 2", "--tp 2 --sequence_parallel"])
def test_layouts_over_nccl_learn_what_one_gpu_does(layout):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = f"torchrun --standalone --nproc-per-node 2 parallel.py {layout}"
    subprocess.run(command.split(), cwd=HERE, check=True)               # the demo compares


# --- engine.py -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A base model: its configuration names 256, and not 258, with which the chat template ends a turn."""
    folder = tmp_path_factory.mktemp("tiny")
    shape = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96)
    P.tiny_model(folder, **shape, vocab_size=260, initializer_range=0.1, eos_token_id=256)
    return str(folder)


@pytest.fixture(scope="module")
def llm(tiny):
    """For tests that leave it as they found it."""
    engine = LLM(tiny, max_model_len=96, enable_prefix_caching=False)
    yield engine
    assert not engine.has_unfinished()


@pytest.fixture
def words(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def asked(**settings):
    return SamplingParams(**{"max_tokens": 20, "ignore_eos": True} | settings)


def serve(engine, prompts, params=None, **settings):
    outputs = engine.generate(prompts, params or asked(**settings), use_tqdm=False)
    pages_add_up(engine.scheduler)
    return outputs


def pages_add_up(scheduler):
    """What holds after every step: references are those of running requests, no page and no seat is lost."""
    blocks = scheduler.blocks
    held = []
    for request in scheduler.running:
        held += request.pages
    assert blocks.refs == [held.count(page) for page in range(blocks.count + 1)]
    assert sorted([*blocks.free, *set(held)]) == list(range(1, blocks.count + 1))
    assert blocks.names == {page: name for name, page in blocks.known.items()}
    assert len(scheduler.running) + len(scheduler.seats) == len(scheduler.table) - 1


def some_prompts(rng, count, longest, vocab=256):
    sizes = [rng.randint(1, longest) for _ in range(count)]
    return [rng.choices(range(vocab), k=size) for size in sizes]


def tokens_of(outputs):
    return [[one.token_ids for one in output.outputs] for output in outputs]


def trainers_logprobs(model, outputs, temperature, size=4):
    """The engine's logprob of every token, and the trainer's, which packs so many sequences into a micro-batch."""
    ours = []
    texts = []
    for output in outputs:
        for one in output.outputs:
            ours += one.logprobs
            text = np.array(output.prompt_token_ids + one.token_ids)
            texts.append((text, np.arange(len(text)) >= len(output.prompt_token_ids)))
    batches = [P.micro_batch(*zip(*texts[i:i + size])) for i in range(0, len(texts), size)]

    def read(model, hidden, batch):
        return None, model.logprobs(hidden[batch["predict"]], batch["targets"], temperature)[0]

    theirs = P.run(model, batches, read, backward=False)
    return np.array(ours), torch.cat(theirs).double().cpu().numpy()


@pytest.mark.parametrize("kind", PAR_KINDS)
def test_greedy_tokens_are_those_of_transformers(tmp_path, kind):
    from transformers import AutoModelForCausalLM
    par_model(kind=kind, dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generation_config.eos_token_id = [1, 2, 3, 4, 5, 6]       # these count, not the configuration's
    model.save_pretrained(tmp_path)
    engine = LLM(str(tmp_path), max_num_seqs=5, max_num_batched_tokens=40)
    prompts = some_prompts(random.Random(1), 8, 34, 104)
    outputs = serve(engine, prompts, temperature=0, max_tokens=30, ignore_eos=False)
    for prompt, output in zip(prompts, outputs):
        [want] = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)
        assert prompt + output["token_ids"] == want.tolist()
    assert {output["finish_reason"] for output in outputs} == {"stop", "length"}


def ended(free, params, decode):
    """What is left of these tokens if every rule of how an answer ends is looked at after each of them."""
    for count, token in enumerate(free, 1):
        tokens = free[:count]
        text = decode(tokens)
        found = [(text.find(stop), stop) for stop in params.stop if stop in text]
        if token in params.stop_token_ids:
            return tokens, decode(tokens[:-1]), "stop", token
        if token == 256 and not params.ignore_eos:
            return tokens, text, "stop", None
        if found:
            at, stop = min(found)
            return tokens, text[:at], "stop", stop
        if count == params.max_tokens:
            return tokens, text, "length", None


def test_random_requests_get_in_small_engines_what_each_gets_alone(tiny, llm):
    """By itself an answer goes on to the end of the context: where it ends with other settings follows from that."""
    rng = random.Random(1)
    decode = partial(llm.get_tokenizer().decode, skip_special_tokens=True)
    cases = []
    for seed in range(16):
        text = "beginning " * rng.randint(0, 3) + rng.choice(["a", "é", "a€", "😀é"])
        ids = llm.tokenizer.encode(text)
        heat = rng.choice([0, 0.6, 1.2])
        free = asked(
            n=rng.randint(1, 3), seed=seed, max_tokens=None, temperature=heat,
            top_k=rng.choice([-1, 9, 99]), top_p=rng.uniform(0.5, 1))
        [output] = serve(llm, text, free)
        [samples] = tokens_of([output])
        assert {len(ids + tokens) for tokens in samples} == {96}
        assert len({*map(tuple, samples)}) == (free.n if heat else 1)
        pieces = re.findall("[^\ufffd]{2}", output["text"][4:])
        piece = rng.choice(pieces or ["never"])
        params = replace(
            free, max_tokens=rng.randint(1, 40), ignore_eos=rng.random() < 0.5,
            stop=rng.choice([[], piece, ["never", piece]]),
            stop_token_ids=rng.choice([[], samples[0][9]]))
        form = rng.choice([text, ids, {"prompt": text}, {"prompt_token_ids": ids}])
        want = [ended(tokens, params, decode) for tokens in samples]
        cases.append((form, params, want))
        stream = llm.stream(form, replace(params, n=1))
        assert "".join(stream) == want[0][1]
    prompts, settings, wants = map(list, zip(*cases))
    for chunk, page, caching, overlap in (
            (3, 16, True, True),
            (7, 4, True, False),
            (16, 16, False, True),
            (50, 1, True, True)):
        engine = LLM(
            tiny, max_model_len=96, max_num_seqs=6, max_num_batched_tokens=chunk,
            block_size=page, num_gpu_blocks_override=80 // page, exact=page == 1,
            enable_prefix_caching=caching, async_scheduling=overlap)
        for output, want in zip(serve(engine, prompts, settings), wants):
            for one, expected in zip(output.outputs, want):
                found = one.token_ids, one.text, one.finish_reason, one.stop_reason
                assert found == expected
        assert engine.scheduler.preemptions > 0
        assert (engine.scheduler.cached_tokens > 100) == caching


def test_streams_share_the_engine_and_may_be_left(llm):
    stream = llm.stream("hello", asked(seed=1))
    first = next(stream)
    serve(llm, "x", max_tokens=30)                      # takes the steps that end it
    [whole] = serve(llm, "hello", seed=1)
    assert first + "".join(stream) == whole["text"] != first
    left = llm.stream("hello", asked(max_tokens=60))
    next(left)
    left.close()
    assert not llm.has_unfinished()


def test_prefixes_are_found_in_whole_pages_and_siblings_share_them_at_once(tiny):
    for page in (1, 4, 16):
        engine = LLM(tiny, max_model_len=128, block_size=page)
        want = 0
        for n in {page, page + 1, 3 * page - 1}:
            for _ in range(2):
                serve(engine, [n] + [3] * n)
            want += n // page * page                    # all but the last token, in whole pages
            assert engine.scheduler.cached_tokens == want
        serve(engine, list(range(100)), n=8)
        assert engine.scheduler.cached_tokens == want + 7 * (99 // page * page)


def test_the_template_says_which_token_ends_a_turn(llm, words):
    talk = [{"role": "user", "content": "2 + 2?"}]
    [start] = llm.chat(
        talk, asked(max_tokens=0), chat_template_kwargs={"add_generation_prompt": False})
    for seed in range(8):
        params = asked(seed=seed, max_tokens=None, ignore_eos=False)
        one, two = llm.chat([talk, talk], params)
        [free] = serve(llm, one.prompt, params)         # 256 ends it, the configuration's
        assert one.prompt == start.prompt + "<|im_start|>assistant\n"
        tokens = free["token_ids"]
        if 258 in tokens:
            tokens = tokens[:tokens.index(258) + 1]
        assert one["token_ids"] == two["token_ids"] == tokens
    for ending, token in (("\n<|endoftext|>", 256), ("\n\n", None), ("bye", None)):
        words.chat_template = "{% for m in messages %}{{ m['content'] }}" + ending + "{% endfor %}"
        assert E.end_of_turn(words) == token


def test_mistakes_are_refused_in_words_and_leave_nothing(tiny):
    engine = LLM(tiny, max_model_len=256, num_gpu_blocks_override=8)
    for prompt, says in (
            ([], "least one"),
            ([1] * 256, "max_model_len"),
            ([1] * 120, "num_gpu_blocks"),
            ([260], "260"),
            ([-1], "-1")):
        with pytest.raises(ValueError, match=says):
            serve(engine, [[1, 2], prompt])
        assert not engine.has_unfinished() and not engine.scheduler.waiting
    for settings in ({"n": 0}, {"temperature": 1e-39}, {"top_p": 0}, {"top_p": 2}):
        with pytest.raises(ValueError, match="top_p"):
            asked(**settings)
    with pytest.raises(ValueError, match="3 prompts and 2"):
        serve(engine, [[1]] * 3, [asked()] * 2)
    with pytest.raises(ValueError, match="exact"):
        LLM(tiny, tensor_parallel_size=2, exact=True)


@pytest.mark.parametrize("seed", range(4))
def test_pages_and_logprobs_add_up_in_thousands_of_random_steps(tiny, seed):
    """Arrivals, aborts, preemptions, new weights. The logprob of every token is the one that the weights of its version
    give it behind all tokens before: a stale, shared or lost page would be seen."""
    rng = random.Random(seed)
    model = P.Qwen3.from_pretrained(tiny)
    old = par_whole(model)
    weights = [old, {name: x.flip(0).numpy() for name, x in old.items()}]
    page = [1, 2, 4, 8][seed]
    engine = LLM(
        tiny, max_model_len=64, max_num_seqs=rng.randint(4, 9), block_size=page,
        num_gpu_blocks_override=rng.randint(64, 90) // page,
        max_num_batched_tokens=[100, 1, 40, 9][seed], async_scheduling=page > 2)
    stems = some_prompts(rng, 4, 40)
    heats = [0.6] if seed % 2 else [0, 1]               # logprobs of greedy tokens are those at 1
    outputs = {}
    step = 0
    while step < 500 or engine.has_unfinished():
        step += 1
        if step < 500 and len(engine.requests) < 20 and rng.random() < 0.4:
            stem = rng.choice(stems)[:rng.randint(1, 40)]
            prompt = stem + rng.choices(range(3), k=rng.randint(0, 5))
            engine.add_request(prompt, asked(
                n=rng.choice([1, 1, 4]), max_tokens=rng.randint(1, 18), temperature=rng.choice(heats)))
        if engine.requests and rng.random() < 0.02:
            engine.abort(rng.choice(list(engine.requests)))
        if rng.random() < 0.02:
            version = 1 - engine.weight_version
            engine.update_weights(weights[version].items(), version)
        for output in engine.step():
            outputs[output.request_id] = output
        pages_add_up(engine.scheduler)
    assert engine.scheduler.cached_tokens > 100
    assert engine.scheduler.preemptions > 5
    assert len(outputs) == engine.count
    versions = [one.versions for output in outputs.values() for one in output.outputs]
    for version in (0, 1):
        model.load_hf(weights[version])
        ours, theirs = trainers_logprobs(model, outputs.values(), max(heats))
        mine = np.concatenate(versions) == version
        assert np.allclose(ours[mine], theirs[mine], atol=2e-5)
        assert mine.sum() > 100


def served(folder, count, **settings):
    """Tokens and logprobs of so many prompts, as many tokens each, in a small engine."""
    engine = LLM(
        folder, max_model_len=64, block_size=4, num_gpu_blocks_override=20,
        max_num_batched_tokens=2 * count, **settings)
    prompts = some_prompts(random.Random(21), count, 3 * count)
    outputs = serve(engine, prompts, seed=3, max_tokens=count, top_k=50)
    return tokens_of(outputs), sum([output["logprobs"] for output in outputs], [])


def test_the_kernels_give_what_their_references_give(tiny):
    """The whole engine on interpreted Triton: shapes, strides and integer types are what the kernels want."""
    code = f"""import json, {__name__} as tests
print(json.dumps([tests.served({tiny!r}, 4, exact=exact) for exact in (False, True)]))"""
    said = python("-c", code, TRITON_INTERPRET="1")
    want, logprobs = served(tiny, 4)
    for tokens, found in json.loads(said):
        assert tokens == want
        assert np.allclose(found, logprobs, atol=1e-4)


def test_two_ranks_generate_as_one(tiny):
    settings = {"dtype": "float64", "device": "cpu", "async_scheduling": True, "max_num_seqs": 5}
    want, logprobs = served(tiny, 12, **settings)
    two = partial(served, tiny, 12, tensor_parallel_size=2, **settings)
    for tokens, found in on_ranks(2, two):
        assert tokens == want
        assert np.allclose(found, logprobs, atol=1e-6)


def test_the_terminal_answers(tiny, llm):
    talk = [{"role": "user", "content": "2+2?"}]
    [want] = llm.chat(talk, SamplingParams(temperature=0, max_tokens=20))
    _, said, _ = program(f"engine.py --temperature 0 --max_tokens 20 --model {tiny} 2+2?")
    assert said.strip() == want["text"].strip()


SMOLLM2 = dict(
    model_type="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536,
    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64)


@gpu
@pytest.mark.parametrize("shapes", [P.QWEN3_600M, SMOLLM2])
def test_every_logprob_is_the_trainers_bit_for_bit(tmp_path, shapes):
    """With graphs, chunks, shared prefixes, siblings, preemption and new weights, whatever the trainer packs."""
    folder = P.tiny_model(tmp_path, **shapes)
    engine = LLM(
        str(folder), max_model_len=2048, max_num_batched_tokens=2048,
        num_gpu_blocks_override=1500, exact=True)
    rng = random.Random(0)
    stem = rng.choices(range(256), k=120)
    for count, longest, most in ((100, 400, 300), (100, 400, 300), (6, 100, 1300)):
        for temperature in (1.0, 0.6):
            prompts = some_prompts(rng, count, longest)
            prompts = [stem[:rng.randint(50, 120)] + prompt for prompt in prompts]
            limits = [rng.randint(64, most) for _ in prompts]
            params = [asked(temperature=temperature, max_tokens=limit) for limit in limits]
            params[3].n = 8
            outputs = serve(engine, prompts, params)
            pack = rng.choice([1, 7, 30])
            ours, theirs = trainers_logprobs(engine.model, outputs, temperature, pack)
            assert (ours != theirs).sum() == 0
        engine.update_weights({x: w * 1.25 for x, w in engine.model.hf_tensors()})
    assert engine.scheduler.preemptions > 0
    assert engine.runner.graphs


@gpu
def test_greedy_outputs_do_not_depend_on_batch_size_graphs_or_overlap(tmp_path):
    folder = str(P.tiny_model(tmp_path, **SMOLLM2))
    prompts = some_prompts(random.Random(5), 70, 100)
    found = []
    for others in (
            {}, {"max_num_seqs": 1}, {"max_num_seqs": 19}, {"enforce_eager": True},
            {"async_scheduling": False}):
        engine = LLM(
            folder, max_model_len=256, exact=True, num_gpu_blocks_override=2000, **others)
        found.append(tokens_of(serve(engine, prompts, temperature=0, max_tokens=40)))
        assert found[-1] == found[0], others


# --- sft.py ----------------------------------------------------------------------------------------------------------

# Qwen3's and SmolLM2's chat templates, as far as our messages go.
QWEN3_TEMPLATE = r"""{% for m in messages %}{% set parts = m.content.split('</think>') %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts[1:] else '') + '\n</think>\n\n' }}{% endif %}
{{- parts[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
SMOLLM2_TEMPLATE = r"""{% if messages[0].role != 'system' %}
{{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def talk(*texts):
    roles = ["user", "assistant"] * 2
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def whole(words, *texts):
    return words.apply_chat_template(talk(*texts), tokenize=False)


def prepared(rows, words, folder, side="", **settings):
    """The text of each document that `prepare` makes of rows, or of a folder."""
    if isinstance(rows, list):
        rows = write_jsonl(folder / "rows.jsonl", rows)
    out = folder / "out.arrow"
    out.unlink(missing_ok=True)
    sft.prepare(str(rows), words, out, **settings)
    return words.batch_decode(al.read(out)[side + "input_ids"].to_pylist())


def test_the_assistants_words_and_its_end_of_turn_are_learned(words, tmp_path, capsys):
    thought = "<think>\nhm\n</think>\n\nb"
    talks = [("ab", "b"), (["a", thought], [thought]), ("abcd", "bd")]
    for template, (texts, learned) in itertools.product([QWEN3_TEMPLATE, SMOLLM2_TEMPLATE], talks):
        words.chat_template = template
        found, = prepared([{"messages": talk(*texts)}], words, tmp_path)
        assert found == whole(words, *texts)
        row = al.read(tmp_path / "out.arrow")[0]
        ids = itertools.compress(row["input_ids"], row["loss_mask"])
        ends = [text + "<|im_end|>" for text in learned]
        assert words.decode([*ids]) == "".join(ends)
        said = capsys.readouterr().out
        assert re.findall(r"\[\[(\S.*?)]]", said, re.DOTALL) == ends          # a person sees it


SFT_ROWS = r"""
{"problem": "p", "solution": "é漢", "messages": [{"role": "user", "content": "q"}]}
{"question": "p", "answer": "a <<1+1=2>>2\n#### 7"}
{"question": "p", "answer": "é漢"}
{"prompt": "p", "completion": " é漢\n"}
{"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "é漢"}]}
{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "é漢"}]}
"""
SFT_PAIRS = """
{"question": "p", "chosen": "r", "rejected": "s"}
{"prompt": "p", "chosen": [{"role": "assistant", "content": "r"}], "rejected": "s"}
"""


def test_every_shape_of_a_row_becomes_the_same_conversation(words, tmp_path):
    asked = "p\nWork step by step and put the final answer inside \\boxed{}."
    want = [(asked, "é漢"), (asked, "a 2\nThe answer is \\boxed{7}.")] + [("p", "é漢")] * 4
    assert prepared([SFT_ROWS], words, tmp_path) == [whole(words, *texts) for texts in want]
    pairs = [SFT_PAIRS, {"chosen": talk("p", "r"), "rejected": talk("p", "s")}]
    for side, text in [("chosen_", "r"), ("rejected_", "s")]:
        assert prepared(pairs, words, tmp_path, side) == [whole(words, "p", text)] * 3


def test_files_of_any_kind_say_the_same_and_no_prompt_is_on_both_sides(words, tmp_path):
    asks = [form.format(i) for form in ("Is it {}?", "is  IT\n{}?") for i in range(100)]
    rows = [{"prompt": ask, "completion": "r"} for ask in asks]
    folder = tmp_path / "folder"
    folder.mkdir()
    al.write(al.Table.from_pylist(rows[:50]), folder / "0.arrow")
    write_jsonl(folder / "1.jsonl", rows[50:150])
    frame = pytest.importorskip("polars").DataFrame(rows[150:])
    frame.write_parquet(folder / "2.parquet")
    files = prepared(folder, words, tmp_path)
    assert files == prepared(rows, words, tmp_path, held_out=0.25)
    first, again = al.read(tmp_path / "out.arrow")["held_out"].to_numpy().reshape(2, 100)
    assert first.tolist() == again.tolist()
    assert 10 < first.sum() < 45                                # 25 +- 4 sigma


SFT_BAD = r"""{"text": "x"}
{"prompt": "p", "completion": "rrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrr"}
{"prompt": "<|im_end|>", "completion": "r"}
{"prompt": "p", "completion": 3}
{"prompt": "p", "completion": "\ud800"}
{"messages": [{"role": "user", "content": "p"}]}"""


def test_what_cannot_be_learned_is_counted_with_its_reason(words, tmp_path, capsys):
    good = [{"prompt": "p", "completion": "r"}] * 9
    source = write_jsonl(tmp_path / "rows.jsonl", [SFT_BAD, *good])
    found = sft.prepare(source, words, tmp_path / "out.arrow", 0, 80)
    assert found == {"rows": 9, "held_out": 0, "skipped": 6}
    said = capsys.readouterr().out
    assert "line 1: no answer" in said
    assert "line 2: too long" in said
    write_jsonl(tmp_path / "rows.jsonl", [*good, "{no json"])
    with pytest.raises(ValueError, match="line 10"):
        sft.prepare(source, words, tmp_path / "new")


def test_each_epoch_is_every_row_once_in_an_order_of_its_own():
    steps = [sft.rows_of_step(step, 103, 10, seed=5) for step in range(20)]
    first, second = np.reshape(steps, (2, 100)).tolist()
    assert len({*first}) == len({*second}) == 100
    assert first != second


def test_losses_are_the_formulas_of_their_papers():
    logprobs = torch.tensor([-1.0, -2, -3, -4, -5])             # of two pairs, whose first answer has two tokens
    model = mock.Mock(**{"logprobs.return_value": (logprobs, None)})
    batch = {
        "predict": torch.arange(5), "targets": None, "count": 10, "pairs": 4,
        "answers": torch.tensor([2, 1, 1, 1]),
        "reference": torch.tensor([[-1.0, -2], [-3, -4]])}
    loss, told = sft.dpo_loss(model, torch.zeros(5, 1), batch, beta=0.5)
    margins = np.array([-0.5, 0])
    assert loss.item() == pytest.approx(np.log(1 + np.exp(-margins)).sum() / 4)
    told.pop("loss")
    assert told == {"accuracy": 0, "margin": -0.125, "reward": -0.375}
    assert sft.sft_loss(model, torch.zeros(5, 1), batch)[0] == 1.5


def sft_rows(path):
    """A prepared file of 40 rows of random tokens, the last four held out, and of as many pairs."""
    rng = np.random.default_rng(0)
    columns = {"held_out": np.arange(40) >= 36}
    for side in ("", "chosen_", "rejected_"):
        rows = [rng.integers(0, 256, rng.integers(4, 40), np.int32) for _ in range(40)]
        columns[side + "input_ids"] = rows
        columns[side + "loss_mask"] = [(row % 2).astype(np.uint8) for row in rows]
    al.write(al.Table.from_pydict(columns), path)
    return str(path)


def sft_run(model, data, out, **changes):
    """The weights of a run in fp64, four steps an epoch, and those columns of its metrics that are always the same."""
    settings = dict(
        epochs=2, batch=9, max_tokens=128, lr=1e-3, warmup=0.25,
        eval_every=4, save_every=1, keep=0, dtype="float64", device="cpu")
    sft.train(sft.Config(str(model), data, str(out), **settings | changes))
    metrics = al.Table.from_jsonl(out / "metrics.jsonl")
    names = {"loss", "grad_norm", "lr", "tokens", "val_loss"}
    numbers = {name: metrics[name].to_numpy() for name in names}
    return numbers | load_file(out / "model/model.safetensors")


@pytest.mark.parametrize("loss, layouts", [
    ("sft", [dict(dp=3), dict(tp=2), dict(dp=2, pp=2)]),
    ("dpo", [dict(dp=2), dict(pp=2, tp=2)])])
def test_every_layout_learns_what_one_process_does(tiny, tmp_path, loss, layouts):
    data = sft_rows(tmp_path / "rows.arrow")
    before = Path(data).read_bytes()
    want = sft_run(tiny, data, tmp_path / "one", loss=loss)
    for layout in layouts:
        out = tmp_path / str(layout)
        run = partial(sft_run, loss=loss, save_every=4, keep=1, **layout)
        got, *_ = on_ranks(math.prod(layout.values()), run, tiny, data, out)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, equal_nan=True)
        assert [path.name for path in out.glob("step-*")] == ["step-000008"]
    assert Path(data).read_bytes() == before                    # DPO's reference stays in memory
    assert want["loss"][7] < want["loss"][0]
    assert np.isfinite(want["val_loss"]).nonzero()[0].tolist() == [3, 7]
    falling = (1 + np.cos(np.pi * np.arange(6) / 5)) / 2
    np.testing.assert_allclose(want["lr"], [5e-4, 1e-3, *5e-6 + 9.95e-4 * falling])


def test_a_killed_run_goes_on_to_the_bit(tiny, tmp_path):
    data = sft_rows(tmp_path / "rows.arrow")
    out = tmp_path / "killed"
    want = sft_run(tiny, data, tmp_path / "full")
    killed((out / "step-000003").exists, sft_run, tiny, data, out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')         # in the middle of a line
    for gone in ([], range(5, 9), []):      # then from the end of an epoch on; and when there is nothing left to do
        for step in gone:
            shutil.rmtree(out / f"step-{step:06d}")
        np.testing.assert_equal(sft_run(tiny, data, out, resume=True), want)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    ends = json.loads((out / "model/generation_config.json").read_text())
    assert ends["eos_token_id"] == 258


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tiny, tmp_path):
    torch.set_num_threads(2)
    data = sft_rows(tmp_path / "rows.arrow")
    with pytest.raises(FloatingPointError, match="step 2: .*step-000001"):
        sft_run(tiny, data, tmp_path / "run", lr=1e300, warmup=0)
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "metrics.jsonl", "step-000001"]
    assert torch.get_num_threads() == 1                         # other cores are left to other processes


# --- evaluate.py -----------------------------------------------------------------------------------------------------

EV_DATA = HERE.parent / "shared" / "data"
# The score, what stands in the box (or a whole text, with boxes of its own), the gold answer.
EV_GRADES = r"""
1  5                            5
0  6                            5
0  -5                           5
1  05                           5
1  5.0                          5
1  \sqrt{4}.                    2
1  1,234,567                    1234567
1  1\,234                       1234
0  3,000                        3
0  1 2                          12
1  0.5                          \frac12
1  3\frac{1}{2}                 3.5
1  0.333333                     \frac13
0  0.33                         \frac13
0  1/0                          0
0  100000000000000000000001     100000000000000000000000
1  5\text{ cm}                  5
1  \$5.00                       5
1  90^\circ                     90
0  3.14                         \pi
1  x^2+2x+1                     (x+1)^2
0  p-q                          q-p
1  x=5                          5
0  [0,1]                        [0,1)
1  2,1                          1,2
0  (1,2)                        (2,1)
0  1,2,3,4,5                    3
0  3                            1,2,3
1  \begin{pmatrix}0.5\\2\end{pmatrix}   \begin{pmatrix} 1/2 \\ 2 \end{pmatrix}
1  \text{Evelyn}                Evelyn
0  \text{Briana}                \text{Evelyn}
1  \text{Yes}                   yes
1  True                         true
0  True                         \text{false}
0  CAB                          ABC
1  \varnothing                  \{\}
0  First \boxed{4}, then \boxed{5}          5
0  First \boxed{5}, then \boxed{4}          5
1  \boxed{0.5}, that is \boxed{1/2}         \frac12
0  The answer is \boxed{5       5
1  \boxed{5} and \boxed{5       5
1  I write it in \boxed{}: \boxed{5}        5
0  boxed{5}                     5
1  <think>\boxed{4}</think>\boxed{5}        5
0  <think>maybe \boxed{5}       5
0  \frac{1}{                    1
1  \boxed{\boxed{1}}            1
1  } { \boxed {\{2,1\}}         \{1,2\}
"""


def ev_boxed(answer):
    return answer if "boxed" in answer else f"Therefore it is \\boxed{{{answer}}}."


@pytest.fixture
def ev_graders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_ray.shutdown()
    yield ev.Graders(2, deadline=60)
    small_ray.shutdown()


def test_grades_are_those_of_a_person_and_easy_ones_200_a_second(ev_graders):
    rows = [re.split("  +", line) for line in EV_GRADES.strip().splitlines()]
    for long in ("\\boxed{" * 50_000, "5+" * 50_000 + "5", "9" * 500):
        rows.append(["0", long, "9" * 499])
    grades = ev_graders.grade([(ev_boxed(answer), gold) for _, answer, gold in rows])
    for (score, _, gold), grade in zip(rows, grades):
        assert grade.score == float(score), (gold, grade)
        assert grade.verdict in ("right", "wrong", "unparsed")
    easy = [("\\boxed{5}", i) for i in range(900)] + [("\\boxed{y+x}", "x+y")] * 100
    start = time.perf_counter()
    assert sum(grade.score for grade in ev_graders.grade(easy)) == 101
    assert time.perf_counter() - start < 5
    assert ev.grade("\\boxed{2x}", "x+x") == 1


@pytest.mark.skipif(not EV_DATA.is_dir(), reason="../shared/data with MATH-500 and GSM8K is not there")
def test_gold_answers_are_right_for_themselves_and_for_no_other(ev_graders):
    def right(answers, golds):
        grades = ev_graders.grade([*zip(map(ev_boxed, answers), golds)])
        return sum(grade.score for grade in grades)

    for name, respelled, equal in (("math500", 490, 4), ("gsm8k_test", 1300, 0)):
        golds = [problem["answer"] for problem in ev.load_problems(f"{EV_DATA}/{name}.jsonl")]
        assert right(golds, golds) == len(golds)
        assert right([gold + "\\;" for gold in golds], golds) > respelled   # these go through math-verify
        distinct = sorted(set(golds))
        assert right(distinct, distinct[1:]) <= equal                       # 36 is 36^\circ


def test_a_bad_answer_costs_its_deadline_and_nothing_else(ev_graders, monkeypatch, tmp_path):
    class Troubled(ev.Grader):
        def equal(self, answers, gold):
            word = answers[0]
            if word == "die" or word == "ab" and not os.listdir(tmp_path):
                (tmp_path / word).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if word == "memory":
                bytearray(4 << 30)
            while word == "hang":                       # and only a kill ends it
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            return super().equal(answers, gold)

    monkeypatch.setattr(ev, "Grader", Troubled)
    # The first of all dies of something else, and is asked again.
    expected = {"ab": "right", "hang": "timeout", "die": "crashed", "memory": "crashed"}
    rows = []
    for word in expected:
        rows += [(f"\\boxed{{\\sqrt{{{i * i}}}}}", i) for i in range(9)]
        rows.append((ev_boxed(word), "ba"))
    rows.append((ev_boxed("9^{9^{9^{9}}}"), "x^2+1"))   # sympy hangs by itself, too
    ev_graders.deadline = 3
    *grades, last = ev_graders.grade(rows)
    assert last.score == 0
    for grade in grades:
        assert grade.verdict == expected.get(grade.answer, "right"), grade


# As in MATH-500, MATH, GSM8K and DeepMath; the answer is 5.
EV_ROWS = r"""
{"problem": "p", "solution": "\\boxed{7}", "answer": "5"}
{"problem": "p", "solution": "so \\boxed{5}", "type": "Algebra"}
{"question": "p", "answer": "2+3=<<2+3=5>>5\n#### 5"}
{"question": "p", "final_answer": "5", "x": "\\boxed{7}"}
"""


def test_rows_of_every_shape_are_problems(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(EV_ROWS)
    row = {"problem": "p", "answer": "5"}
    assert ev.load_problems(str(path)) == [row] * 4
    path.write_text('\ufeff{"problem": "p", "answer": 5, "x": [1]}\n\n{"prompt": "q", "x": {}}')
    mixed = ev.load_problems(str(path), columns=True)
    assert [row["columns"]["x"] for row in mixed] == [[1], {}]
    for line, what in (
            ('{"problem": "p"}', "answer"), ('{"prompt": [5], "answer": 5}', "problem"), ("{", "JSON")):
        write_jsonl(path, [row, "", line])
        with pytest.raises(ValueError, match=f"rows.jsonl, line 3: no.* {what}"):
            ev.load_problems(str(path))
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *where, **_: asked.append(where) or [row])
    for name in ("math500", "gsm8k", "org/set"):
        assert ev.load_problems(name) == [row]
    assert asked == [("HuggingFaceH4/MATH-500",), ("openai/gsm8k", "main"), ("org/set",)]


def test_sums_are_right_and_held_out_ones_are_never_in_a_training_set():
    train = ev.arithmetic(5000, seed=1)
    test = ev.arithmetic(500, seed=2, held_out=True)
    assert not {row["problem"] for row in train} & {row["problem"] for row in test}
    for row in train + test:
        total = eval(row["problem"].removesuffix("=?"))
        assert row["answer"] == ev.extract(row["solution"]) == str(total)
        assert all(map(eval, row["solution"].replace("=", "==").split(", ")[:2]))


def test_an_answer_of_a_base_model_ends_at_the_end_of_turn(tiny, words):
    ends = {256, 258}                                   # of a text, and of a turn
    generator = ev.Generator(tiny)
    [samples] = generator.generate([[1, 2]], {"n": 100, "max_tokens": 50, "seed": 0})
    last = set()
    for sample in samples:
        *middle, end = sample["token_ids"].tolist()
        assert not ends.intersection(middle)
        assert (sample["finish_reason"] == "stop") == (end in ends)
        last.add(end)
    assert ends < last
    words.backend_tokenizer.post_processor = TemplateProcessing(            # one that begins a text by itself
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for template, before, after in (
            (QWEN3_TEMPLATE, "", "<think>\n\n</think>\n\n"),
            (SMOLLM2_TEMPLATE, f"<|im_start|>system\n{system}<|im_end|>\n", "")):
        words.chat_template = template
        [text], [prompt] = ev.chat_prompts([{"problem": "1+1=?"}], words)
        question = f"<|im_start|>user\n1+1=?\n{ev.INSTRUCTION}<|im_end|>\n"
        assert text == f"{before}{question}<|im_start|>assistant\n{after}" == words.decode(prompt)
        assert E.end_of_turn(words) == 258


EV_SAMPLES = """
{"score": 1, "verdict": "right", "answer": "1", "finish_reason": "stop"}
{"score": 0, "verdict": "wrong", "answer": "3", "finish_reason": "length"}
{"score": 0, "verdict": "wrong", "answer": "4", "finish_reason": "stop"}
{"score": 1, "verdict": "right", "answer": "0.5", "finish_reason": "stop"}
{"score": 0, "verdict": "unparsed", "answer": null, "finish_reason": "stop"}
{"score": 0, "verdict": "wrong", "answer": "3", "finish_reason": "stop"}
{"score": 0, "verdict": "unparsed", "answer": null, "finish_reason": "length"}
{"score": 0, "verdict": "unparsed", "answer": null, "finish_reason": "length"}
{"score": 1, "verdict": "right", "answer": "1", "finish_reason": "stop"}
{"score": 0, "verdict": "wrong", "answer": "3", "finish_reason": "stop"}
{"score": 0, "verdict": "wrong", "answer": "3.", "finish_reason": "stop"}
{"score": 1, "verdict": "right", "answer": "5", "finish_reason": "stop"}
"""


def test_scores_are_what_their_names_say():
    rows = []
    for i, line in enumerate(EV_SAMPLES.strip().splitlines()):      # four of each problem
        rows.append(json.loads(line) | {"number": i // 4, "tokens": 10 * i})
    found = ev.summarize(rows[::-1])
    means = {
        "pass@1": 1 / 3, "mean@4": 1 / 3, "pass@2": 5 / 9, "pass@4": 2 / 3,
        "maj@4": 1 / 2, "truncated": 1 / 4, "unparsed": 1 / 12, "tokens": 55}
    assert {name: mean for name, (mean, _) in found.items()} == pytest.approx(means)
    assert found["pass@1"][1] == pytest.approx(np.std([0.5, 0, 0.5], ddof=1) / 3**0.5)
    better = [row | {"score": max(row["score"], row["number"] // 2)} for row in rows]
    assert "33.3 ± 16.7" in ev.report({"a": rows, "b": better})
    error = np.std([0, 0, 0.5], ddof=1) / 3**0.5
    assert ev.compare(rows, better)["pass@1"] == pytest.approx((1 / 6, error))


EV_MISTAKES = """
evaluate.py --out new --n 0 --data sums.jsonl --model a     n = 0
evaluate.py --out new --data nowhere.jsonl                  nowhere
evaluate.py --out new --data sums.jsonl --model nowhere     nowhere
evaluate.py --temprature 0                                  --temperature
evaluate.py --limit x                                       limit
{again}                                                     --resume
{again} --resume --limit 2                                  a.arrow
{again} --resume --limit 2 --n 5                            a.arrow
{again} --resume --temperature 1                            a.arrow
{again} --resume --data others.jsonl                        a.arrow
evaluate.py show nowhere.arrow                              nowhere
evaluate.py arithmetic --out sums.jsonl                     sums.jsonl
"""


def test_models_are_evaluated_side_by_side_and_samples_that_fit_are_kept(ev_graders):
    for model in "ab":
        P.tiny_model(model, hidden_size=32, num_hidden_layers=1)        # the same weights
    command = "evaluate.py --data sums.jsonl --n 2 --max_tokens 8 --out out --model a"
    for line in (
            "evaluate.py arithmetic --n 5 --held-out --out sums.jsonl",
            "evaluate.py arithmetic --n 5 --seed 1 --out others.jsonl",
            command):
        assert program(line)[0] == 0
    small_ray.shutdown()
    small_ray.init(num_cpus=2, num_gpus=2)                              # two engines
    code, said, _ = program(command + " b --resume")
    assert code == 0
    assert "a: the samples in out/a.arrow are kept" in said and "b - a" in said
    alone, shared = (al.read(f"out/{model}.arrow").to_pylist() for model in "ab")
    assert alone == [row | {"model": "a"} for row in shared]
    scores = json.loads(Path("out/scores.json").read_text())
    assert scores["b"]["pass@1"] == list(ev.summarize(shared)["pass@1"])
    _, said, _ = program("evaluate.py show out/b.arrow --verdict unparsed")
    assert said.count("gold: ") == [row["verdict"] for row in shared].count("unparsed")
    check_mistakes(EV_MISTAKES, again=command)
    assert not Path("new").exists()


# --- ppo.py ----------------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([9, 1, 4, 7])


def noise(seed, n=21):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64) / 2


same = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind, samples", [
    ("gae", 1), ("grpo", 2), ("rloo", 4), ("reinforce++", 1), ("reinforce++", 2)])
def test_advantages_are_the_formulas_of_their_papers(kind, samples):
    row = torch.arange(4).repeat_interleave(LENGTHS)            # [actions]
    slots = torch.arange(21).double()
    ahead = slots - slots[:, None]                              # [actions, actions] how far one is ahead of another
    ahead = ahead.where(row == row[:, None], -1)                # of its row
    later = (ahead >= 0).double()
    last = LENGTHS.cumsum(0) - 1
    values = noise(7)
    batch = {
        "lengths": LENGTHS, "score": noise(4, 4), "prox": noise(5), "reference": noise(6),
        "values": values}
    for gamma, lam, kl in itertools.product([1, 0.9, 0], [1, 0.7, 0], ["none", "k1"]):
        ppo.estimate(batch, ppo.Config(
            advantage=kind, samples=samples, gamma=gamma, lam=lam, kl=kl, kl_coef=0.3,
            max_response=9, overlong_buffer=3 if kl == "k1" else 0))
        rewards = torch.zeros(21).double()
        rewards[last] = batch["score"]
        if kl == "k1":
            rewards -= 0.3 * (batch["prox"] - batch["reference"])
            rewards[last] -= ((LENGTHS.double() - 6) / 3).clamp(0, 1)
        group = torch.segment_reduce(rewards, "sum", lengths=LENGTHS).view(-1, samples)
        mean = group.mean(1, keepdim=True)
        if kind == "gae":                                       # the double sum over later errors
            errors = rewards + gamma * (ahead == 1).double() @ values - values
            want = later * (gamma * lam) ** ahead.clamp(0) @ errors
            same(batch["returns"] - values, want)
        if kind == "grpo":
            want = ((group - mean) / (group.std(1, keepdim=True) + 1e-6)).flatten()[row]
        if kind == "rloo":
            want = (group - (mean * samples - group) / (samples - 1)).flatten()[row]
        if kind == "reinforce++":
            want = later @ rewards - mean.repeat(1, samples).flatten()[row] * (samples > 1)
        if kind in ("gae", "reinforce++"):
            want = (want - want.mean()) / (want.var(correction=0) + 1e-8).sqrt()
        same(batch["advantages"], want)


@pytest.mark.parametrize("setting", [
    {"clip_low": 0.1, "clip_high": 0.4},
    {"dual_clip": 1.2},
    {"entropy_coef": 0.3, "dual_clip": 0},
    {"kl": "k2", "cap": 0},
    {"kl": "k3", "cap": 1.1}], ids=str)
def test_the_objective_has_the_value_and_gradient_of_its_formula(setting):
    c = ppo.Config(**{"clip_high": 0.2, "kl_coef": 0.2} | setting)
    prox, mu, reference, advantages = map(noise, range(4))
    part = dict(prox=prox, mu=mu, reference=reference, advantages=advantages)
    pi = noise(7).requires_grad_()
    losses, _ = ppo.policy_loss(pi, noise(8), part, c)
    ratio = torch.exp(pi - prox)
    clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
    want = torch.maximum(-ratio * advantages, -clipped * advantages)
    if c.dual_clip:
        bounded = torch.minimum(want, -c.dual_clip * advantages)
        want = torch.where(advantages < 0, bounded, want)
    d = pi - reference
    kl = {"none": 0, "k2": d ** 2 / 2, "k3": torch.exp(-d) - 1 + d}[c.kl]
    weight = torch.exp(prox - mu).clamp(max=c.cap) if c.cap else 1
    want = weight * want + c.kl_coef * kl - c.entropy_coef * noise(8)
    same(losses, want)
    same(*[torch.autograd.grad(x.sum(), pi)[0] for x in (losses, want)])


def test_losses_are_weighed_as_the_settings_say():
    lengths = torch.tensor([3, 1])
    assert ppo.loss_weights(lengths, "token-mean").tolist() == [1 / 4] * 4
    assert ppo.loss_weights(lengths, "seq-mean-token-mean").tolist() == [1 / 6] * 3 + [1 / 2]


# Runs: through `pp_local` calls happen at once, in this process; through actors in others.

class PpActor:
    def __init__(self, kind, *args):
        self.one = kind(*args)

    def __getattr__(self, name):
        return mock.Mock(remote=getattr(self.one, name))


class PpLocal:
    def __getattr__(self, name):                            # init, shutdown, put, get
        return lambda x=None, **_: x

    def wait(self, refs):
        return refs, []

    def remote(self, kind):
        return mock.Mock(**{"options.return_value.remote": partial(PpActor, kind)})


@pytest.fixture(scope="session")
def task(tmp_path_factory, tiny):
    """Twenty problems, and rewards."""
    folder = tmp_path_factory.mktemp("task")
    shutil.copytree(tiny, folder / "model")
    rows = [{"problem": f"{i}+1=", "answer": str(i + 1), "weight": i} for i in range(20)]
    write_jsonl(folder / "problems.jsonl", rows)
    (folder / "beside.py").write_text("def half(x): return x / 2")
    (folder / "rewards.py").write_text("""
from beside import half
def low(response, row): return sum(ord(x) < 64 for x in response) / 8
def own(response, row):
    return row["weight"] + half(row["gold"] == str(row["weight"] + 1) == row["answer"])
def throws(response, row): return 1 / (row["weight"] - 3)
def nan(response, row): return float("nan")
""")
    cloudpickle.register_pickle_by_value(ppo)               # as that of a program: judges need no torch
    curves = mock.patch.object(sft, "curves")               # which take longer than the runs
    with mock.patch.dict(sys.modules, pp_local=PpLocal()), curves:
        yield folder


def pp_run(task, out, reward="low", **changes):
    settings = dict(
        model=str(task / "model"), data=str(task / "problems.jsonl"), out=str(out),
        reward=f"{task}/rewards.py:{reward}", batch=4, samples=2, max_prompt=120,
        max_response=8, minibatches=2, steps=3, lr=1e-3, critic_lr=1e-3,
        critic_warmup=1, warmup=0, staleness=0, runtime="pp_local", graders=0,
        temperature=0.8, device="cpu")
    return ppo.Config(**settings | changes)


def pp_lines(out):
    table = al.Table.from_jsonl(f"{out}/metrics.jsonl")
    seconds = [name for name in table.column_names if "seconds" in name]
    return table.drop(seconds).to_pylist()


def pp_column(out, name):
    return [line[name] for line in pp_lines(out) if line[name] is not None]


def pp_outcome(out):
    """All that a run has made, to the bit."""
    return pp_lines(out), Path(out, "model", "model.safetensors").read_bytes()


@pytest.mark.parametrize("advantage", ["gae", "grpo", "rloo", "reinforce++"])
def test_a_bandit_is_learned(task, tmp_path, advantage):
    ppo.train(pp_run(
        task, tmp_path, advantage=advantage, samples=8, steps=8, lr=1e-2, critic_lr=1e-2))
    rewards = pp_column(tmp_path, "reward")
    assert rewards[-1] > rewards[0] + 0.5


@pytest.mark.parametrize("world, changes", [
    (4, dict(micro_tokens=1)),                              # rows alone; some ranks have none
    (8, dict(tp=2, pp=2)),
    pytest.param(1, dict(runtime="ray"), marks=pytest.mark.slow),
    pytest.param(
        4, dict(runtime="actors", tp=2, pp=2, generator_tp=2), marks=pytest.mark.slow)], ids=str)
def test_any_layout_and_runtime_makes_what_one_process_makes(
        task, tmp_path, world, changes):
    one = pp_run(
        task, tmp_path / "one", kl="k3", entropy_coef=0.01, critic_warmup=0,
        minibatches=3, graders=1, dtype="float64")
    ppo.train(one)
    c = replace(one, out=str(tmp_path / "other"), **changes)
    if world == 1:
        ppo.train(c)                                        # here: a child of a user of Ray cannot use it
    else:
        on_ranks(world, ppo.train, c)
    for ours, theirs in zip(pp_lines(one.out), pp_lines(c.out), strict=True):
        assert ours["policy_norm"] > 0
        assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("exact, staleness, measured", [
    (True, 0, [0]), (True, 1, [0, 0, 1]), (False, 0, [0, 1, 2])])
def test_where_the_engine_is_exact_current_batches_are_measured_once(
        task, tmp_path, monkeypatch, exact, staleness, measured):
    measure = ppo.measure
    calls = []

    def spied(model, batch, c):
        calls.append(int(batch["versions"][0]))
        return batch["mu"].clone() if exact else measure(model, batch, c)

    monkeypatch.setattr(ppo, "measure", spied)
    ppo.train(pp_run(task, tmp_path, advantage="rloo", staleness=staleness))
    assert calls == measured
    kl = pp_column(tmp_path, "mismatch_kl")
    assert kl == [0.0] * 3 if exact else 0 < max(kl) < 1e-9         # engine and trainer agree, but for rounding


def test_batches_lag_by_the_staleness_and_a_broken_run_goes_on_as_if_it_had_not_been(
        task, tmp_path, monkeypatch):
    learn = ppo.learn

    def broken(r, batch, step):
        if step == 3:
            raise KeyboardInterrupt
        return learn(r, batch, step)

    run = tmp_path / "run"
    whole = tmp_path / "whole"
    settings = dict(staleness=2, steps=6, save_every=2, keep=1, held_out=10, eval_every=2)
    scores = ppo.train(pp_run(task, whole, **settings))
    monkeypatch.setattr(ppo, "learn", broken)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(pp_run(task, run, **settings))
    monkeypatch.undo()
    ppo.train(pp_run(task, run, resume=True, **settings))
    assert pp_outcome(run) == pp_outcome(whole)                     # with the batches that were under way
    assert pp_column(run, "lag") == [0, 1, 2, 2, 2, 2]
    assert pp_column(run, "val_reward") == list(scores.values())
    assert list(scores) == [0, 2, 4, 6]
    assert len(list(run.glob("checkpoints/*/step-*"))) == 2


def test_processes_make_what_one_makes_even_if_they_are_killed(
        task, tmp_path, monkeypatch):
    settings = dict(generators=2, advantage="grpo", aggregate="seq-mean-token-mean")
    ppo.train(pp_run(task, tmp_path / "one", **settings))
    collect = ppo.Rollouts.collect

    def deadly(self, batch):
        if batch == 1:
            for actor in (self.generators[0][0], self.judges[0]):
                pid = actor.__ray_call__.remote(lambda self: os.getpid())
                os.kill(self.ray.get(pid), signal.SIGKILL)
        return collect(self, batch)

    monkeypatch.setattr(ppo.Rollouts, "collect", deadly)
    ppo.train(pp_run(task, tmp_path / "many", runtime="actors", graders=2, **settings))
    assert pp_outcome(tmp_path / "many") == pp_outcome(tmp_path / "one")
    assert not small_ray.is_initialized()


def test_a_reward_sees_its_row_and_if_it_raises_the_row_is_named_and_the_folder_is_free(
        task, tmp_path, capsys):
    for name, says in [("throws", "ZeroDivisionError"), ("nan", "finite")]:
        with pytest.raises(ValueError, match="rewards.py:" + name):
            ppo.train(pp_run(task, tmp_path / "run", name, batch=20))
        said = capsys.readouterr().err
        assert says in said and "'weight': " in said.splitlines()[-1]
        assert "ppo.py" not in said                             # its own frames alone
    ppo.train(pp_run(task, tmp_path / "run", "own", steps=1))
    table = al.read(tmp_path / "run" / "rollouts" / "000000.arrow")
    assert table["reward"].to_pylist() == [row + 0.5 for row in table["row"].to_pylist()]
    known = {"problem", "gold", "answer", "prompt", "response", "sample"}
    assert known <= set(table.column_names)
    with pytest.raises(ValueError, match="holds a run"):
        ppo.train(pp_run(task, tmp_path / "run"))


def test_guesses_and_long_prompts_are_left_out_and_sums_are_graded(
        task, tmp_path, capsys):
    rows = [{"problem": x, "answer": x} for x in ("12", "Yes", "1" * 200)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    c = pp_run(task, tmp_path / "run", data=data, batch=1, steps=1)
    ppo.train(replace(c, reward="math"))
    assert "2 of 3 problems" in capsys.readouterr().out
    assert ppo.load_function("math")("so \\boxed{12}", {"gold": "12"}) == 1
    small_ray.shutdown()


@pytest.mark.slow
def test_nobody_outlives_a_killed_driver_and_resume_goes_on_to_the_bit(
        task, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))

    def family():
        command = f"grep -lsz OUT={tmp_path}$ /proc/[0-9]*/environ"
        return subprocess.run(command, shell=True, capture_output=True, env={}).stdout

    def far(step):
        return family() and (tmp_path / f"run/checkpoints/policy/step-00000{step}").exists()

    settings = dict(
        runtime="actors", save_every=1, steps=4, generators=2, graders=1, staleness=1)
    ppo.train(pp_run(task, tmp_path / "calm", **settings))
    c = pp_run(task, tmp_path / "run", resume=True, **settings)
    for step in (1, 3):
        killed(partial(far, step), ppo.train, c)
        until(lambda: not family())
    ppo.train(c)
    assert pp_outcome(c.out) == pp_outcome(tmp_path / "calm")


@gpu
def test_on_a_gpu_the_engine_draws_from_what_the_trainer_computes_to_the_bit(
        task, tmp_path):
    model = P.tiny_model(tmp_path / "model", hidden_size=256, head_dim=64)
    ppo.train(pp_run(
        task, tmp_path, model=str(model), runtime="actors", graders=1, batch=16,
        samples=8, max_response=200, device=None))
    assert pp_column(tmp_path, "mismatch_kl") == [0.0] * 3


# --- the house -------------------------------------------------------------------------------------------------------

# What is started, with which flags; and what is said.
MISTAKES = r"""
parallel.py --oops                              --oops
parallel.py --device cuda                       no GPU
parallel.py merge model merged                  state.pt
engine.py --oops                                --oops
engine.py --model nowhere 2+2?                  nowhere
evaluate.py --oops                              --oops
{prepare} --data nope.jsonl                     nope.jsonl
{prepare} --data raw.arrow --out rows.arrow     rows.arrow
{sft} --data raw.arrow                          input_ids
{sft} --data far.arrow                          prepare
{sft} --data nope.arrow                         nope.arrow
{sft} --data long.arrow                         4,096
{sft} --loss dpo --data far.arrow               chosen_input_ids
{sft} --max_tokens 20                           20
{sft} --batch 0                                 --batch
{sft} --lr 1e-6                                 --min_lr
{sft} --warmup 5                                --warmup
{sft} --tp 3                                    tp
{sft} --model nowhere                           nowhere
{sft} --sedd 1                                  did you mean --seed?
{sft} --recomp                                  no --recomp;
{sft} --device cuda                             no GPU
{sft} --dtype half                              bfloat16
{sft} --out taken                               --resume
{sft} --out model --resume                      --out
{ppo} --model=                                  --model
{ppo} --data nope.jsonl                         nope.jsonl
{ppo} --batch 30                                --batch
{ppo} --max_prompt 5                            problems
{ppo} --max_response 5000                       4096
{ppo} --advantage grpo --samples 1              --samples
{ppo} --temperature 0                           --temperature
{ppo} --steps 0                                 --steps
{ppo} --samples 0                               --samples
{ppo} --epochs 0                                --epochs
{ppo} --reward nope.py:f                        nope.py
{ppo} --reward reward.py:f                      f(response
{ppo} --tp 2                                    tp
{ppo} --device cuda                             no GPU
{ppo} --out taken                               --out
{ppo} --dtype half                              bfloat16
"""


def test_mistakes_are_one_line_and_leave_nothing(
        tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(tiny, "model")
    sft_rows("rows.arrow")
    sft.claim(sft.Config(out="taken"))
    al.write(al.Table.from_pylist([{"prompt": "a"}]), "raw.arrow")
    for name, ids in (("far", [1, 999]), ("long", [1] * 5000)):
        row = {"held_out": False, "input_ids": ids, "loss_mask": ids}
        al.write(al.Table.from_pylist([row]), f"{name}.arrow")
    program("evaluate.py arithmetic --n 20 --out sums.jsonl")
    Path("reward.py").touch()
    before = sorted(tmp_path.rglob("*"))
    check_mistakes(
        MISTAKES, prepare="sft.py prepare --model model",
        sft="sft.py --model model --data rows.arrow --device cpu",
        ppo="ppo.py --model model --data sums.jsonl --batch 4 --out run --device cpu")
    assert sorted(tmp_path.rglob("*")) == before
    told = ValueError("an actor's traceback")
    told.cause = ValueError("no\nsuch")
    with pytest.raises(SystemExit), P.mistakes():
        raise told
    assert capsys.readouterr().err.endswith(": error: no such\n")


@pytest.mark.parametrize("line, says", [
    ("parallel.py --help", "stages of the pipeline .default: 1"),
    ("parallel.py --device cpu", "one process: 0.0e.00"),
    ("engine.py", "the same tokens"),
    ("evaluate.py", "pass@1.*right: .*gold.*wrong: .*gold")])
def test_help_shows_the_comments_and_demos_what_they_claim(line, says):
    code, said, _ = program(line)
    small_ray.shutdown()
    assert code == 0
    assert re.search(says, " ".join(said.split()))


def run_sh(*words):
    environment = os.environ | {"DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", HERE / "run.sh", *words], env=environment,
        capture_output=True, text=True, timeout=600)


def test_run_sh_takes_a_model_through_every_stage_and_does_nothing_twice(tmp_path):
    """Six steps teach nothing."""
    words = [f"OUT={tmp_path}", "GPUS=3", "TP=2", "SFT_STEPS=6", "PPO_STEPS=2",
             "PPO_FLAGS=--batch 16 --eval_every 99", "EVAL_FLAGS=--limit 8 --n 2"]
    done = run_sh(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    for made in ("sft/curves.png", "ppo/curves.png", "ppo/rollouts/000001.arrow", "scores/scores.json"):
        assert (tmp_path / made).stat().st_size > 0
    config = json.loads((tmp_path / "ppo" / "config.json").read_text())
    assert config["tp"] == 2
    assert config["generators"] == 1
    weights = tmp_path / "ppo" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert "ppo/model is there" in run_sh("ppo", *words).stdout
    assert weights.stat().st_mtime_ns == before


RUN_SH_MISTAKES = """
model MODEL=some/thing                  hf download some/thing --local-dir
data MODEL=base SFT_DATA=some/thing     hf download some/thing --repo-type dataset
sft MODEL=base                          'data' first
ppo MODEL=base                          'sft' first
model RL_DATA=x                         say MODEL=
model GPUS=0                            GPUS at least 1
model GPUS=3 TP=2 PP=2                  TP=2 x PP=2
model DEVICE=tpu                        got tpu
model GPU=1                             no setting GPU
sft ppo                                 one stage at a time
frobnicate                              no stage 'frobnicate'
"""


def test_run_sh_says_what_to_download_and_what_cannot_be(tmp_path):
    for line in RUN_SH_MISTAKES.strip().splitlines():
        words, says = re.split("  +", line)
        refused = run_sh(f"OUT={tmp_path}", *words.split())
        assert refused.returncode == 2 and says in refused.stderr, line
        assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("files", [
    "arrowlite", "actors", "kernels", "parallel kernels", "engine parallel kernels",
    "evaluate arrowlite actors engine parallel kernels",
    "sft evaluate arrowlite actors engine parallel kernels",
    "ppo sft evaluate arrowlite actors engine parallel kernels"])
def test_files_that_are_taken_along_run_their_demo_elsewhere(tmp_path, monkeypatch, files):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    names = [f"{name}.py" for name in files.split()]
    for name in names:
        shutil.copy(HERE / name, tmp_path)
    subprocess.run([sys.executable, names[0]], cwd=tmp_path, check=True)


def test_arrowlite_needs_nothing_but_numpy():
    code = "import sys; before = {*sys.modules}; import arrowlite; print(*{*sys.modules} - before)"
    others = {name.partition(".")[0] for name in python("-c", code).split()} - sys.stdlib_module_names
    assert {name for name in others if name[0] != "_"} == {"arrowlite", "numpy"}


@gpu
def test_speeds_are_85_percent_of_those_in_the_readme_at_least():
    """On an H200: tokens/s of 256 requests, exact, and MFU in percent."""
    for file, pattern, readme in (
            ("engine.py", r"256 requests .* (\S+)", 23_600),
            ("parallel.py", r"mfu=([\d.]+)", 46.6)):
        found = re.findall(pattern, python(file, "--bench"))
        speeds = [float(x.replace(",", "")) for x in found]
        assert max(speeds) > 0.85 * readme
