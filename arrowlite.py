"""arrowlite: columns without copies.

A table is a set of named columns; a column is a few flat buffers; a file is those buffers one after the other, with a
description of where each one starts. That layout is Apache Arrow's, so a file is read by mapping it into memory and
pointing at it, and pyarrow, polars, DuckDB and Hugging Face datasets read the same bytes. Nothing is parsed, nothing is
copied, and a shuffled table is the old buffers under a new list of row numbers. (Linux, 64 bits, little-endian.)

      Table          Column "tokens"               Array: one record batch's part of the column, here list<int32>
    +---------+     +---------------+             +------------------------------------------------------------+
    | tokens -+---->| rows  7 2 5 ..|             | valid      1 1 0 1         a flag a row; None if no nulls  |
    | label   |     | chunks  ------+--> batch 0  | data       0 3 5 5 9       row i is child[o[i] : o[i + 1]] |
    +---------+     +---------------+    batch 1  | child      11 12 13 21 22 41 42 43 44       an int32 Array |
                                         ...      +------------------------------------------------------------+
                                                      numpy views of one memory map: the file, byte for byte
    array(values, type=None)                  a Column from Python values, numpy, torch or another Arrow library
    Table.from_pydict / from_pylist / from_jsonl / from_arrow, and to_pydict / to_pylist / to_jsonl
    table[i], table[a:b], table["column"], slice, select, filter, map, shuffle, split, with_column, rename, drop, ...
    column[i], column[a:b], to_numpy, to_torch, to_pylist; of lists also flatten and lengths
    concat([tables]), read(path), write(table, path, stream=False), Writer(path, schema, stream=False)
    Type, Field, Schema                       types are named by strings: "int32", "list<utf8>", "timestamp[us, UTC]"
    python arrowlite.py                       the demo, with a table of speeds

`read` takes both formats: the file format (pyarrow, polars, DuckDB) ends in a footer that lists the batches, the stream
format (stream=True: datasets) has none. Left out: writing dictionaries and compressed files, decimals, unions, maps.
"""
from __future__ import annotations
import datetime as dt
import json, mmap, os, re, struct, tempfile, threading, timeit
from bisect import bisect_left, bisect_right
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np

# --- types -----------------------------------------------------------------------------------------------------------
UNITS = ["s", "ms", "us", "ns"]
STORED = {"date32": ("date", 0)}        # the types whose name in a file is another, with numbers
STORED |= {f"float{16 << i}": ("float", i) for i in range(3)}
for bits in (8, 16, 32, 64):
    STORED |= {f"int{bits}": ("int", bits, 1), f"uint{bits}": ("int", bits, 0)}
DTYPES = {name: name for name in ["bool", *STORED]}     # what is supported: the dtype of its values, or of its offsets
DTYPES |= {"null": None, "struct": None,
           "date32": "M8[D]", "timestamp": "M8[{}]", "duration": "m8[{}]",
           "fixed_size_binary": "i8", "fixed_size_list": "i8"}
for name in ("utf8", "binary", "list"):
    DTYPES |= {name: "i4", f"large_{name}": "i8"}
ALIASES = {"string": "utf8", "str": "utf8", "bytes": "binary",     # what they are called in pyarrow and numpy
           "large_string": "large_utf8",
           "float": "float32", "double": "float64",
           "datetime64[D]": "date32", "datetime64": "timestamp",
           "timedelta64": "duration"}

class Field(NamedTuple):
    """The name and type of a column or of a struct's member. A list's item is a field, too."""
    name: str
    type: Type
    nullable: bool = True
    def __str__(self):
        return f"{quoted(self.name)}: {self.type}" + " not null" * (not self.nullable)
def quoted(name):
    return name if re.fullmatch(r"[\w/+:-]*", name) else repr(name)

@dataclass
class Type:
    """A type's name, and what that name needs. It equals its spelling, too: column.type == "list<int32>"."""
    name: str
    fields: tuple[Field, ...] = ()  # list: the item; struct: the members
    size: int = 0                   # fixed_size_binary: bytes; fixed_size_list: items
    unit: str = ""                  # timestamp, duration: s, ms, us or ns
    tz: str = ""                    # timestamp: the zone to show; what is stored is UTC, and so are Python values
    view: bool = False              # text that a file has as views, which are read as text in one piece
    codes: tuple = ()               # what a file has for the values: (type of the indices, number of the dictionary)
    def __post_init__(self):
        code = DTYPES[self.name]
        self.is_plain = code == self.name   # numbers and bool: numpy's name is ours
        self.is_sized = self.name.startswith("fixed_size_")
        self.fields = [Field(name, as_type(kind), *rest) for name, kind, *rest in self.fields]
        self.names = [field.name for field in self.fields]
        self.parts = [field.type for field in self.fields]              # the types of the children
        # utf8, binary or list: rows of a child; struct or null: rows of all children; fixed: values
        self.family = self.name.removeprefix("large_").removeprefix("fixed_size_")
        self.is_bytes = self.family in ("utf8", "binary")
        if self.is_bytes:
            self.parts = [Type("uint8")]
        elif code and self.family != "list":
            self.family = "fixed"
        check(len(set(self.names)) == len(self.names), f"two have the same name: {', '.join(self.names)}")
        complete = self.name == "struct" or len(self.names) == (self.family == "list")
        if not complete or (self.unit in UNITS) != (self.name in ("timestamp", "duration")):
            raise ValueError(f"{self} is not a complete type; write for example list<int32> or timestamp[us, UTC]")
        self.dtype = code and np.dtype(code.format(self.unit))
        self.stored = np.dtype("i4") if self.name == "date32" else self.dtype      # what a file has
    def __repr__(self):                     # names that are not words are quoted: no two types are spelled the same
        text = self.name
        if self.fields:
            inner = self.fields if self.name == "struct" else self.parts
            text += f"<{', '.join(map(str, inner))}>"
        if self.is_sized:
            text += f"[{self.size}]"
        if self.unit:
            text += f"[{self.unit}, {quoted(self.tz)}]" if self.tz else f"[{self.unit}]"
        return text
    def __eq__(self, other):
        return self is other or str(self) == str(other)
    def place(self, name):                  # which member of a struct has this name
        if name not in self.names:
            raise KeyError(f"no column {name!r}; there are: {', '.join(self.names)}")
        return self.names.index(name)
    def field(self, name):
        return self.fields[self.place(name)]

class Schema(Type):
    """The type of a table: a struct of its columns, and what else its file says: metadata, {bytes: bytes}."""
    def __init__(self, columns, metadata=None):  # from another, {name: type}, or a list of fields or (name, type)
        super().__init__("struct", columns.items() if isinstance(columns, dict) else columns)
        metadata = metadata or getattr(columns, "metadata", {})
        self.metadata = {as_bytes(key): as_bytes(value) for key, value in metadata.items()}
    def __iter__(self):
        return iter(self.fields)
def as_bytes(text):
    return text if isinstance(text, bytes) else text.encode()
def as_type(spec):                          # from a Type, its spelling (but of structs), numpy's or Python's name of it
    if isinstance(spec, Type):
        return spec
    if not isinstance(spec, str):
        spec = np.dtype(spec).name
    parts = re.fullmatch(r"(\w+)(?:<(.+)>)?(?:\[(\d*)(\w*)(?:, *(?:tz=)?(.+))?\])?", ALIASES.get(spec, spec))
    name = parts and ALIASES.get(parts[1], parts[1])
    check(name in DTYPES, f"{spec!r} is no Arrow type that can be spelled; those are {', '.join(DTYPES)}")
    _, inner, size, unit, tz = parts.groups("")
    return Type(name, [("item", inner)] if inner else (), int(size or 0), unit, tz)
def check(fine, why="it is damaged, or was cut off"):
    if not fine:
        raise ValueError(why)
@contextmanager
def naming(where):                          # what goes wrong in the block is a ValueError, which says where that was
    try:
        yield
    except Exception as error:
        raise ValueError(f"{where}: {error}") from error

# --- arrays: numpy views that belong together ------------------------------------------------------------------------
@dataclass
class Array:                            # rows of one type; immutable
    type: Type
    length: int
    data: np.ndarray | None = None      # fixed: values [rows]; lists and text: offsets [rows + 1], from 0 on
    children: list = ()                 # lists: the items of all rows, of text their bytes; structs: members [rows]
    valid: np.ndarray | None = None     # flags [rows], or None: there are no nulls
    @property
    def null_count(self):
        return 0 if self.valid is None else self.length - np.count_nonzero(self.valid)
    def flags(self):                        # whether each row is there, [rows]
        return np.ones(self.length, bool) if self.valid is None else self.valid
    def shown(self):                        # without the rows that are null
        return self.pick(np.flatnonzero(self.valid)) if self.null_count else self
    def pick(self, rows):                   # a slice(start, stop) shares every buffer, row numbers gather a copy
        shared = isinstance(rows, slice)
        data = self.data
        if self.type.family == "fixed":
            data = data[rows]
            children = ()
        elif data is None:
            children = [child.pick(rows) for child in self.children]
        elif shared:
            data = data[rows.start:rows.stop + 1]
            first = data.item(0)
            children = [self.children[0].pick(slice(first, data.item(-1)))]
            data = data - first if first else data
        else:
            starts = data[rows].astype(int)
            lengths = data[rows + 1] - starts
            data = offsets_of(lengths, self.type)
            children = [self.children[0].pick_spans(starts, lengths)]
        length = rows.stop - rows.start if shared else len(rows)
        return Array(self.type, length, data, children, None if self.valid is None else self.valid[rows])
    def pick_spans(self, starts, lengths):
        """Rows start : start + length of every span, joined; long ones as slices: an index costs 5 ns an item."""
        total = int(lengths.sum())
        if self.type.family == "fixed" and self.valid is None and total > 48 * len(lengths):
            spans = zip(starts.tolist(), (starts + lengths).tolist())
            return Array(self.type, total, np.concatenate([self.data[start:stop] for start, stop in spans]))
        shift = starts - (np.cumsum(lengths) - lengths)     # from a row's number in the result to its number here
        return self.pick(np.repeat(shift, lengths) + np.arange(total))
    def spans(self, items):                 # the items of each row, of anything that can be sliced
        return [items[start:stop] for start, stop in pairwise(self.data.tolist())]
    def to_pylist(self):
        kind = self.type
        if kind.family == "fixed":
            rows = self.data.tolist() if kind.is_plain else python_times(kind, self.data)
        elif self.data is None:
            rows = [{} for _ in range(self.length)]
            for name, child in zip(kind.names, self.children):
                for row, value in zip(rows, child.to_pylist()):
                    row[name] = value
        elif kind.is_bytes:
            rows = self.spans(self.children[0].data.tobytes())
            if kind.family == "utf8":
                rows = [row.decode() for row in rows]
        else:
            rows = self.spans(self.children[0].to_pylist())
        if self.valid is not None:
            for i in np.flatnonzero(~self.valid).tolist():
                rows[i] = None
        return rows
    def to_numpy(self):
        kind = self.type
        if not self.null_count and kind.family == "fixed":
            return self.data
        if not self.null_count and kind.name == "fixed_size_list":
            values = self.children[0].to_numpy()
            return values.reshape(self.length, kind.size, *values.shape[1:])
        if kind.family == "fixed" and kind.name != "bool":
            rows = self.data.astype("f8" if kind.dtype.kind in "iu" else kind.dtype)
        elif kind.family == "list" and kind.parts[0].is_plain:
            rows = np.fromiter(self.spans(self.children[0].to_numpy()), object, self.length)
        else:
            rows = np.fromiter(self.to_pylist(), object, self.length)
        rows[~self.flags()] = None          # NaN, NaT or None
        return rows
def offsets_of(lengths, kind):              # lengths [rows] -> offsets [rows + 1]
    offsets = np.zeros(len(lengths) + 1, int)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > np.iinfo(kind.dtype).max:
        raise ValueError(f"{offsets[-1]:,} bytes or items are too many for {kind}; use large_{kind}")
    return offsets.astype(kind.dtype)
def python_times(kind, values):             # as Python's, but nanoseconds and far years as numpy's scalars
    rows = values.tolist()
    for i, row in enumerate(rows):
        if isinstance(row, int):
            rows[i] = values[i]
        elif kind.tz and row:
            rows[i] = row.replace(tzinfo=dt.timezone.utc)
    return rows

# --- from Python values to arrays ------------------------------------------------------------------------------------
def array(values, type=None):
    """A Column from Python values (None is null), numpy, torch or another Arrow library; of a type, or of theirs."""
    kind = type and as_type(type)
    check(not isinstance(values, (str, bytes, dict)), f"a column takes a list of values, not {values.__class__}")
    if hasattr(values, "__arrow_c_stream__") or hasattr(values, "__arrow_c_array__"):
        values = Table.from_arrow({"": values})[""]
    if isinstance(values, Column):
        made = values.combine()
    elif hasattr(values, "__array__"):
        made = from_numpy(np.asarray(values))
    else:
        made = build(list(values), kind)
    if kind and made.type != kind:
        made = build(made.to_pylist(), kind)
    return Column(made.type, [made])
def from_numpy(values):                     # the same memory; a further axis is a fixed_size_list, NaT is null
    if values.ndim > 1:
        items = from_numpy(values.reshape(-1, *values.shape[2:]))
        kind = Type("fixed_size_list", [("item", items.type)], values.shape[1])
        return Array(kind, len(values), np.arange(len(values) + 1) * kind.size, [items])
    if values.dtype.kind in "OUS":
        return build(values.tolist())
    kind = as_type(values.dtype)
    valid = ~np.isnat(values) if values.dtype.kind in "mM" else None
    return Array(kind, len(values), np.ascontiguousarray(values, kind.dtype), (), valid)
def family_of(kind):                        # of types that hold the values of a Python type; tensors are lists
    for python, family in ((str, "utf8"), (bytes, "binary"), (dict, "struct")):
        if issubclass(kind, python):
            return family
    return "list" if hasattr(kind, "__len__") else "fixed"
NATURAL = {dt.date: "datetime64[D]", dt.datetime: "datetime64[us]", dt.timedelta: "timedelta64[us]"}
def natural(values):                        # the type for Python values; what lists and structs hold is left open
    found = Type("null")
    for spec, value in {getattr(value, "dtype", type(value)): value for value in values}.items():
        family = family_of(type(value))
        if getattr(value, "tzinfo", None):
            spec = "timestamp[us, UTC]"
        elif family != "fixed":
            spec = "list<null>" if family == "list" else family
        found = unify(found, as_type(NATURAL.get(spec, spec)))
    return found
def build(values, kind=None):
    """Python values as an array of a type, or of the one that is natural for them; a ValueError if one does not fit."""
    n = len(values)
    valid = np.array([value is not None for value in values], bool)
    some = [value for value in values if value is not None]
    free = kind is None
    kind = kind or natural(some)
    families = set(map(family_of, set(map(type, some))))
    check(families <= {kind.family}, f"values of the families {families} are no {kind}")
    data = None
    children = {}
    if kind.family == "fixed":
        data = np.zeros(n, kind.dtype)
        data[valid] = exact(some, kind)
    elif kind.dtype is None:
        columns = transpose([value or {} for value in values], chain(kind.names, *some))
        for name, column in columns.items():
            with naming(f"column {name!r}"):
                children[name] = build(column, None if free else kind.field(name).type)
    else:
        lengths = np.full(n, kind.size)
        if kind.family == "utf8":
            some = [value.encode() for value in some]
        lengths[valid] = [len(row) for row in some]
        if kind.is_sized:
            check((lengths == kind.size).all(), f"a row of another length is no {kind}")
            blank = bytes(kind.size) if kind.is_bytes else [None] * kind.size
            some = [blank if value is None else value for value in values]
        data = offsets_of(lengths, kind)
        if kind.is_bytes:
            children["item"] = from_numpy(np.frombuffer(b"".join(some), np.uint8))
        else:
            children["item"] = join_rows(some, None if free else kind.parts[0])
    if free and kind.family in ("struct", "list"):
        kind = Type(kind.name, [(name, child.type) for name, child in children.items()])
    return Array(kind, n, data, list(children.values()), None if valid.all() else valid)
def transpose(rows, names):                 # {name: its values}; where a row lacks it, it is null
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(names)}
def join_rows(rows, part):                  # the items of all rows, of a type or of the natural one
    if rows and all(hasattr(row, "__array__") for row in rows):
        return array(np.concatenate(rows), part).combine()
    return build(list(chain(*rows)), part)
def in_utc(time):                           # without a zone, as what has none is taken to be
    return time.astimezone(dt.timezone.utc).replace(tzinfo=None) if getattr(time, "tzinfo", None) else time
def given_back(stored, value):              # a time in the value's unit: one that was too large is another there
    if isinstance(value, type(stored)):
        return stored.astype(value.dtype)
    return stored.astype(NATURAL[type(value)]).item() if type(value) in NATURAL else stored
def exact(values, kind):                    # numbers and times as stored; only floats may be rounded, to floats
    if kind.tz:
        values = list(map(in_utc, values))
    with np.errstate(over="raise"), naming(f"a value does not fit in a column of {kind}"):
        out = np.array(values, kind.dtype)
    found = out.tolist() if kind.is_plain else list(out)
    if kind.unit:
        found = list(map(given_back, found, values))
    if found != values:
        rounded = (float, np.floating) if kind.dtype.kind == "f" else ()
        for value, same in zip(values, found):
            if value != same and not isinstance(value, rounded):
                raise ValueError(f"{value!r} does not fit in a column of {kind}")
    return out
def unify(a, b):                            # the narrowest type that holds the values of both without loss
    if b.name == "null" or a == b:
        return a
    if a.name == "null":
        return b
    if a.family == b.family != "fixed" and a.size == b.size:                    # lists, texts or structs
        members = dict(zip(a.names, a.parts))
        for name, kind, _ in b.fields:
            with naming(f"column {name!r}"):
                members[name] = unify(members.get(name, kind), kind)
        return Type(max(a.name, b.name, key=len), members.items(), a.size)
    numbers = a.is_plain and b.is_plain and "bool" not in (a.name, b.name)
    if numbers or a.unit and (a.name, a.tz) == (b.name, b.tz):
        both = as_type(np.promote_types(a.dtype, b.dtype))
        both.tz = a.tz
        return both
    raise ValueError(f"{a} and {b} have no common type; make them alike first")
def join(kind, parts):                      # arrays of one type, one after the other
    if len(parts) < 2:
        return parts[0] if parts else build([], kind)
    data = None
    if kind.family == "fixed":
        data = np.concatenate([part.data for part in parts])
    elif kind.dtype:
        data = offsets_of(np.concatenate([np.diff(part.data) for part in parts]), kind)
    columns = zip(*[part.children for part in parts])       # the first children of all parts, the second, ...
    children = [join(part, column) for part, column in zip(kind.parts, columns)]
    valid = np.concatenate([part.flags() for part in parts])
    return Array(kind, len(valid), data, children, None if valid.all() else valid)

# --- columns: chunks of rows, seen through a list of row numbers -----------------------------------------------------
class Column:
    """Rows of one type. Its chunks, laid end to end, number their rows; `rows` (a range, or an array after a shuffle)
    says which of those are its own, in which order. Selecting changes `rows`, the chunks stay where they are."""
    def __init__(self, type, chunks, starts=None, rows=None):
        self.type = type
        self.chunk = chunks if starts else chunks.__getitem__       # a list, or with starts a function: number -> chunk
        self.starts = starts or [0, *accumulate(chunk.length for chunk in chunks)]
        self.rows = range(self.starts[-1]) if rows is None else rows
    def __len__(self):
        return len(self.rows)
    def __reduce__(self):
        return type(self), (self.type, list(self.batches()))
    def __repr__(self):
        return f"{self.type}, {len(self):,} rows: {self[:10].to_pylist()}"
    def __getitem__(self, i):
        """A row as a Python value (of a table: a dict), a slice as a column or table, a member of structs by name."""
        if isinstance(i, slice):
            return type(self)(self.type, self.chunk, self.starts, self.rows[i])
        if isinstance(i, str):
            place = self.type.place(i)
            def member(k):
                return self.chunk(k).children[place]
            return Column(self.type.parts[place], member, self.starts, self.rows)
        row = self.rows[i]
        k = bisect_right(self.starts, row) - 1
        row -= self.starts[k]
        return self.chunk(k).pick(slice(row, row + 1)).to_pylist()[0]
    def __iter__(self):
        for start in range(0, len(self), 1000):
            yield from self[start:start + 1000].to_pylist()
    def batches(self):                      # the rows as arrays: as the chunks lie, after a shuffle 10,000 at a time
        rows = self.rows
        if isinstance(rows, range) and rows and rows.step == 1:
            first = bisect_right(self.starts, rows.start) - 1
            for k in range(first, bisect_left(self.starts, rows.stop)):
                start = max(rows.start - self.starts[k], 0)
                stop = min(rows.stop, self.starts[k + 1]) - self.starts[k]
                yield self.chunk(k).pick(slice(start, stop))
        else:
            for start in range(0, len(rows), 10_000):
                yield self.gather(np.asarray(rows[start:start + 10_000]))
    def gather(self, rows):                 # a copy of these rows: chunk by chunk, then in their order
        owner = np.searchsorted(self.starts, rows, "right") - 1             # [rows] whose chunk each is in
        parts = [self.chunk(k).pick(rows[owner == k] - self.starts[k]) for k in np.unique(owner)]
        order = np.argsort(owner, kind="stable")
        return join(self.type, parts).pick(np.argsort(order)) if len(parts) > 1 else parts[0]
    def combine(self):                      # these rows as one array: a view if they are a stretch of one chunk
        return join(self.type, list(self.batches()))
    def to_pylist(self):
        return self.combine().to_pylist()
    def to_numpy(self):
        """Numbers and times: the buffer itself, with nulls a copy with NaN or NaT; lists of one size: [rows, size]."""
        return self.combine().to_numpy()
    def to_torch(self):
        """A tensor over the same memory, which may be written to: no file changes. Of lists, a list of tensors."""
        import torch
        made = self.combine()
        values = made.to_numpy()
        if values.dtype == object:
            check(not made.null_count, "a null is no tensor; filter those rows out first")
            return list(map(torch.from_numpy, values))
        return torch.from_numpy(values)
    @property
    def null_count(self):
        return self.combine().null_count
    def lengths(self):
        """Of lists: how many items each row has, int64 [rows]; 0 for a null. No item is read."""
        lengths = [np.diff(batch.data) * batch.flags() for batch in self.batches()]
        return np.concatenate([np.zeros(0, int), *lengths])
    def flatten(self):
        """Of lists: the items of all rows, one after the other; of a stretch of one chunk it is a view."""
        return Column(self.type.parts[0], self.combine().shown().children)
    values = property(flatten)                              # as pyarrow calls it
    field = __getitem__                                     # of structs: a member
    def slice(self, offset=0, length=None):
        return self[offset:][:length]
    def select(self, indices):
        """The rows of these numbers, in this order; negative ones count from the end."""
        n = len(self)
        rows = np.asarray(indices)
        numbers = not rows.size or rows.dtype.kind in "iu"
        check(numbers, f"select takes row numbers, not {rows.dtype}; for a mask there is filter")
        if ((rows < -n) | (rows >= n)).any():
            raise IndexError(f"a row number is outside of {n:,} rows")
        rows = rows.astype(int) % n
        if isinstance(self.rows, range):
            rows = self.rows.start + self.rows.step * rows
        else:
            rows = self.rows[rows]
        return type(self)(self.type, self.chunk, self.starts, rows)
    def filter(self, keep):
        """The rows for which a function, or a mask of bools (null is no), says yes."""
        if callable(keep):
            keep = [bool(keep(row)) for row in self]
        mask = array(keep, "bool").combine()
        check(mask.length == len(self), f"a mask of {mask.length:,} for {len(self):,} rows")
        return self.select(np.flatnonzero(mask.data & mask.flags()))
    def shuffle(self, seed=None):
        return self.select(np.random.default_rng(seed).permutation(len(self)))
    def split(self, test_size, seed=None):
        """(train, test) of the shuffled rows; test_size is a share (float) or a number of rows (int)."""
        rows = round(test_size * len(self)) if isinstance(test_size, float) else test_size
        check(0 <= rows <= len(self), f"a test set of {test_size} cannot be taken from {len(self):,} rows")
        shuffled = self.shuffle(seed)
        return shuffled[rows:], shuffled[:rows]

# --- tables: a table is a column of structs --------------------------------------------------------------------------
class Table(Column):
    """Named columns of equal length. Every method gives a new table and leaves this one as it is."""
    schema = property(lambda self: self.type)
    num_rows = property(Column.__len__)
    num_columns = property(lambda self: len(self.type.names))
    column_names = property(lambda self: list(self.type.names))
    def __repr__(self):
        return f"Table of {len(self):,} rows: {self.schema}"
    def __arrow_c_stream__(self, requested_schema=None):
        pyarrow = import_pyarrow()          # its table is over the same memory, and keeps that alive
        schema = pyarrow.ipc.open_stream(message(SCHEMA, write_schema(self.schema))).schema
        kind = pyarrow.struct(schema)
        batches = [pyarrow.RecordBatch.from_struct_array(lend(batch, kind)) for batch in self.batches()]
        return pyarrow.Table.from_batches(batches, schema).__arrow_c_stream__(requested_schema)
    @classmethod
    def from_arrow(cls, source):
        """From pyarrow, polars, DuckDB, pandas, ...: copied once, as a stream in a file in memory."""
        pyarrow = import_pyarrow()
        table = pyarrow.table(source)
        with open(os.memfd_create("arrow"), "wb") as file:
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            return read(f"/proc/self/fd/{file.fileno()}")
    @classmethod
    def from_pydict(cls, columns, schema=None, metadata=None):     # what the dict lacks and a schema has is null
        schema = schema and Schema(schema)
        arrays = {}
        for name, values in columns.items():
            with naming(f"column {name!r}"):
                arrays[name] = array(values, schema and schema.field(name).type).combine()
        lengths = {made.length for made in arrays.values()}
        check(len(lengths) < 2, f"columns of different lengths: {sorted(lengths)}")
        n = max(lengths, default=0)
        schema = schema or Schema({name: made.type for name, made in arrays.items()}, metadata)
        children = [arrays.get(name) or build([None] * n, kind) for name, kind, _ in schema]
        return cls(schema, [Array(schema, n, None, children)])
    @classmethod
    def from_pylist(cls, rows, schema=None):                # a name that a row lacks is null there
        rows = list(rows)
        names = Schema(schema).names if schema else ()
        return cls.from_pydict(transpose(rows, chain(names, *rows)), schema)
    @classmethod
    def from_jsonl(cls, path, schema=None):                 # one JSON object a line
        rows = []
        with open(path, encoding="utf-8-sig") as file, naming(path):
            for number, line in enumerate(file, 1):
                if line.strip():
                    with naming(f"line {number}: not a JSON object"):
                        rows.append({**json.loads(line)})
            return cls.from_pylist(rows, schema)
    def columns(self):
        return {name: self[name] for name in self.column_names}
    def to_pydict(self):
        return {name: self[name].to_pylist() for name in self.column_names}
    def to_jsonl(self, path):
        with atomic(path) as file:
            for row in self:
                line = json.dumps(row, ensure_ascii=False, default=json_value)
                file.write(f"{line}\n".encode())
    def select_columns(self, *names):
        names = np.ravel(names).tolist()
        return self.members(dict(zip(names, names)))
    def drop(self, *names):
        gone = self.select_columns(*names).column_names
        return self.select_columns([name for name in self.column_names if name not in gone])
    def rename(self, names):                # {old name: new name}
        return self.members({name: name for name in self.column_names} | names)
    def members(self, names):               # the columns of these names, {here: in the new table}
        places = [self.type.place(name) for name in names]
        fields = [self.type.field(old)._replace(name=new) for old, new in names.items()]
        schema = Schema(fields, self.schema.metadata)
        def pick(k):
            chunk = self.chunk(k)
            return Array(schema, chunk.length, None, [chunk.children[place] for place in places])
        return Table(schema, pick, self.starts, self.rows)
    def with_column(self, name, values, type=None):
        """Add or replace a column. The rows of a shuffled table are gathered: the new values are in their order."""
        columns = self.columns() | {name: array(values, type)}
        return Table.from_pydict(columns, metadata=self.schema.metadata)
    def map(self, fn, batched=False, batch_size=1000, remove_columns=()):
        """Merge what fn returns for a row, {column: value}, into the row. With batched=True fn takes and returns
        {column: list}, and may change the number of rows if remove_columns names all that it leaves."""
        size = batch_size or len(self) or 1
        kept = self.drop(remove_columns)
        parts = []
        for start in range(0, len(self), size):
            part = self[start:start + size]
            if batched:
                new = fn(part.to_pydict())
            else:
                rows = part.to_pylist()
                results = [fn(dict(row)) or {} for row in rows]
                merged = [row | result for row, result in zip(rows, results)]
                new = transpose(merged, chain(*results))
            columns = kept[start:start + size].columns()
            parts.append(Table.from_pydict(columns | new, metadata=self.schema.metadata))
        return concat(parts) if parts else kept

def concat(tables):
    """One after the other, over the same buffers. Columns that differ become what holds the values of all."""
    kind = reduce(unify, [table.type for table in tables])
    schema = Schema(kind.fields, tables[0].schema.metadata)
    return Table(schema, [batch for table in tables for batch in conform(table, schema)])
def conform(table, schema):                 # batches of another schema; a ValueError where a value would change
    if table.schema != schema:
        table = Table.from_pydict(table.columns(), schema)
    return table.batches()
def json_value(value):
    check(not isinstance(value, bytes), "JSON has no bytes; drop or convert that column first")
    return value.isoformat() if isinstance(value, dt.date) else str(value)

# --- flatbuffers: the metadata of a file -----------------------------------------------------------------------------
# A table, a letter a slot. s: bytes; T: a table; V: a vector of tables; 1, 2, 3: of so many longs; else as in struct.
MESSAGE = "hBTq"                # version, what it holds, that, the size of its body
SCHEMA_TABLE = "hVV"            # byte order, fields, metadata
PAIR = "ss"                     # key, value
FIELD = "sBBTTV"                # name, nullable, type's number, type, dictionary, children
ENCODING = "qT"                 # a dictionary's number, the type of its indices
DICTIONARY_BATCH = "qTB"        # number, record batch, whether it is added to what there is
RECORD_BATCH = "q22T1"          # rows, (rows, nulls) an array, (start, length) a buffer, compression, buffers of views
FOOTER = "hT33"                 # version, schema, (start, sizes of metadata, of body) of each dictionary, each batch
TYPES = {
    "int": "iB",                # bits, whether it is signed
    "float": "h",               # half, single, double
    "date": "H",                # days, milliseconds
    "timestamp": "hs",          # unit, zone
    "duration": "Hs",
    "fixed_size_binary": "i",
    "fixed_size_list": "i",
}
# References count from where they stand. Each piece of bytes begins with one, 4, to what it is, and takes in others.
def items(rows):                            # a string of bytes, or a vector of structs from an array
    return struct.pack("<II", 4, len(rows)) + bytes(rows) + b"\0"
def vector(*tables):
    n = len(tables)
    out = bytearray(struct.pack("<II", 4, n) + bytes(4 * n))
    for i in range(n):
        refer(out, 8 + 4 * i, tables[i])
    return out
def pack(*slots):
    """A table of numbers and of what these functions return; None is absent. All are longs: low bytes come first."""
    n = len(slots)
    places = [(slot is not None) * (4 + 8 * i) for i, slot in enumerate(slots)]
    numbers = [isinstance(slot, int) and slot for slot in slots]
    vtable = [4 + 2 * n, 4 + 8 * n, *places]            # it comes after the slots, and says where they are
    out = bytearray(struct.pack(f"<Ii{n}q{n + 2}H", 4, -4 - 8 * n, *numbers, *vtable))
    for i, slot in enumerate(slots):
        if slot is not None and not isinstance(slot, int):
            refer(out, 8 + 8 * i, slot)
    return out
def refer(out, place, other):
    out += bytes(-len(out) % 8)
    struct.pack_into("<I", out, place, len(out) + 4 - place)
    out += other
def parse(buffer, at, formats):
    """The slots of the table to which `at` refers; of tables where they are. What is absent is 0 (H: 1) or empty."""
    def number(at, code="<i"):                  # refuses what lies outside of the buffer
        return struct.unpack_from(code, buffer, at)[0]
    def slot(code, place):
        if not place:
            return b"" if code in "sV123" else int(code == "H")
        place += at
        if code == "T":
            return place
        if code not in "sV123":
            return number(place, "<" + code)
        place += number(place) + 4
        count = number(place - 4)
        if code == "s":
            return buffer[place:place + count]
        if code == "V":
            return range(place, place + 4 * count, 4)
        return list(struct.iter_unpack(f"<{code}q", buffer[place:place + 8 * int(code) * count]))
    at += number(at)
    vtable = at - number(at)
    places = struct.unpack_from(f"<{number(vtable, '<H') // 2}H", buffer, vtable)[2:]
    return list(map(slot, formats, [*places, *bytes(len(formats))]))

# --- schemas as metadata ---------------------------------------------------------------------------------------------
MEMBERS = (                                 # of a file's union of types; a type has its number there
    "none null int float binary utf8 bool decimal date time timestamp interval list struct union fixed_size_binary "
    "fixed_size_list map duration large_binary large_utf8 large_list run_end_encoded binary_view utf8_view list_view "
    "large_list_view").split()
NAMES = {row: name for name, row in STORED.items()}
NAMES |= {("binary_view",): "large_binary", ("utf8_view",): "large_utf8"}
def write_schema(schema):
    pairs = [pack(items(key), items(value)) for key, value in schema.metadata.items()]
    return pack(None, vector(*map(write_field, schema)), vector(*pairs))
def write_field(field):
    kind = field.type
    details = [kind.size] if kind.is_sized else []
    if kind.unit:
        details = [UNITS.index(kind.unit), items(kind.tz.encode()) if kind.tz else None]
    member, *details = STORED.get(kind.name, [kind.name, *details])
    name = items(field.name.encode())
    children = vector(*map(write_field, kind.fields))
    return pack(name, field.nullable, MEMBERS.index(member), pack(*details), None, children)
def read_schema(buffer, at):
    order, fields, pairs = parse(buffer, at, SCHEMA_TABLE)
    check(not order, "it is big-endian")
    budget = iter(range(len(buffer) // 8))          # a field takes some bytes: ends references that fan out
    fields = [read_field(buffer, place, budget) for place in fields]
    return Schema(fields, dict(parse(buffer, place, PAIR) for place in pairs))
def read_field(buffer, at, budget, depth=0):
    next(budget)
    check(depth < 64)
    name, nullable, number, kind, encoding, children = parse(buffer, at, FIELD)
    fields = [read_field(buffer, place, budget, depth + 1) for place in children]
    with naming(f"column {name.decode()!r}"):
        kind = read_type(buffer, kind, MEMBERS[number], fields)
    if encoding:
        number, index = parse(buffer, encoding, ENCODING)
        kind.codes = (read_type(buffer, index, "int"), number)
    return Field(name.decode(), kind, nullable)
def read_type(buffer, at, member, fields=()):
    details = parse(buffer, at, TYPES.get(member, ""))
    name = NAMES.get((member, *details), member)
    check(name in DTYPES, f"the Arrow type {name} is not supported; cast it before writing")
    if name in ("timestamp", "duration"):
        return Type(name, fields, unit=UNITS[details[0]], tz=details[1].decode())
    size = details[0] if name.startswith("fixed_size_") else 0
    return Type(name, fields, size, view=member.endswith("view"))

# --- arrays as buffers -----------------------------------------------------------------------------------------------
def buffers_of(a):                          # an array's own buffers as Arrow has them, validity first, and its children
    kind = a.type
    if kind.name == "null":
        return [], []
    own = [np.packbits(a.valid, bitorder="little") if a.null_count else b""]
    if kind.name == "bool":
        own.append(np.packbits(a.data, bitorder="little"))
    elif kind.dtype and not kind.is_sized:
        own.append(a.data.astype(kind.stored, copy=False).view(np.uint8))
    if kind.is_bytes:
        return [*own, a.children[0].data], []
    return own, a.children
def lend(a, kind):                          # as a pyarrow array of its type, over the same memory
    import pyarrow
    own, children = buffers_of(a)
    own = list(map(pyarrow.py_buffer, own))
    if not own or not a.null_count:
        own[:1] = [None]
    children = [lend(child, kind.field(i).type) for i, child in enumerate(children)]
    return pyarrow.Array.from_buffers(kind, a.length, own, a.null_count, children=children)
def import_pyarrow():                       # it carries buffers to other libraries and back; nothing else needs it
    try:
        import pyarrow.ipc
    except ImportError:
        raise ImportError("this takes pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow

class Batch(Array):
    """A record batch of a file. Its columns are read, when touched, off lists of nodes and buffers, depth first.
    All checks of a file's data are here: what leaves it points nowhere but into its own buffers."""
    def __init__(self, kind, buffer, at, body, dictionaries, explain):
        self.type = kind
        self.length, nodes, places, compressed, counts = parse(buffer, at, RECORD_BATCH)
        check(not compressed, "it is compressed; read it with Table.from_arrow(pyarrow.feather.read_table(path))")
        self.nodes = chain([(self.length, 0)], nodes)       # first the table itself: a struct without nulls
        self.buffers = (body[start:start + length] for start, length in chain([(0, 0)], places))
        self.counts = iter(counts)                          # of buffers, one for each array of views
        self.dictionaries = dictionaries                    # {number: (metadata, where there, body) of its values}
        self.explain = explain
        self.lock = threading.Lock()
        self.most = max(1 << 22, 8 * len(body))             # rows: one takes a bit at least, but for nulls
        check(0 <= self.length <= self.most)
    @cached_property
    def children(self):
        with self.lock, self.explain():
            if "children" not in vars(self):                # another thread was first: nodes and buffers are used up
                self.children = self.array(self.type).children
        return self.children
    def buffer(self, dtype="u1", count=-1):  # the next one, all of it or so many items
        return np.frombuffer(next(self.buffers), dtype, count)
    def bits(self, count):
        packed = self.buffer(count=(count + 7) // 8)
        return np.unpackbits(packed, count=count, bitorder="little").view(bool)
    def array(self, kind):
        if kind.codes:
            return self.encoded(replace(kind, codes=()), *kind.codes)
        n, nulls = next(self.nodes)
        check(0 <= nulls <= n <= self.most)
        if kind.name == "null":
            return build([None] * n, kind)
        valid = None
        if nulls:
            valid = self.bits(n)
        else:
            self.buffer()                                   # it may be anything
        if kind.view:
            return self.views(kind, n, valid)
        data = None
        below = n                                           # how many rows of a child there must be
        if kind.name == "bool":
            data = self.bits(n)
        elif kind.family == "fixed":
            data = self.buffer(kind.stored, n).astype(kind.dtype, copy=False)
        elif kind.dtype:
            if kind.is_sized:
                data = np.arange(n + 1) * kind.size
            else:
                data = self.buffer(kind.dtype, n and n + 1)
            data = data if n else np.zeros(1, kind.dtype)   # without rows there need not be an offset
            below = int(data[-1])
            check(data[0] >= 0 and (data[:-1] <= data[1:]).all())
        if kind.is_bytes:
            children = [Array(kind.parts[0], below, self.buffer(count=below))]
        else:
            children = [self.array(part) for part in kind.parts]
        check(all(child.length >= below for child in children))
        return Array(kind, n, data, children, valid).pick(slice(0, n))      # what lies outside is cut off
    def encoded(self, kind, index, number):  # what the indices of a dictionary stand for; null is one more value
        codes = self.array(index)
        alone = Type("struct", [("values", kind)])
        values = Batch(alone, *self.dictionaries[number], {}, self.explain).children[0]
        rows = np.where(codes.flags(), codes.data.astype(int), values.length)
        check((rows >= 0).all())                            # too large ones are an IndexError
        return join(kind, [values, build([None], kind)]).pick(rows)
    def views(self, kind, n, valid):        # a view: its length, then up to 12 bytes or (4 bytes, buffer, position)
        entries = self.buffer("V16", n).tolist()
        buffers = [self.buffer() for _ in range(*next(self.counts))]
        rows = [None] * n
        for i in range(n) if valid is None else np.flatnonzero(valid):
            length, _, owner, start = struct.unpack("<4i", entries[i])
            source = entries[i][4:] if length <= 12 else buffers[owner][start:]
            rows[i] = bytes(source[:length])
            check(len(rows[i]) == length)
        return replace(build(rows, Type("large_binary")), type=kind)

# --- files: messages, each a flatbuffer and a body of buffers --------------------------------------------------------
SCHEMA = 1                                                  # what a message can hold; 2 is a dictionary
BATCH = 3
END = struct.pack("<ii", -1, 0)                             # of a stream
def message(kind, header, body=0):
    metadata = pack(4, kind, header, body)
    metadata += bytes(-(8 + len(metadata)) % 64)            # a cache line, and the widest vector register
    return struct.pack("<ii", -1, len(metadata)) + metadata

@contextmanager
def atomic(path):                           # a file that appears under its name whole and on disk, or not at all
    final = os.path.realpath(path)
    replaceable = os.path.isfile(final) or not os.path.exists(final)
    check(replaceable, f"{path} is a directory or a device, and no file that can be replaced")
    temporary = f"{final}.{threading.get_native_id()}.tmp"
    with open(temporary, "wb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            os.unlink(temporary)
            raise

class Writer(ExitStack):
    """Write a file batch by batch; it appears when the `with` block ends, if it ends well."""
    def __init__(self, path, schema, stream=False):
        super().__init__()
        self.schema = Schema(schema)
        self.stream = stream
        self.blocks = []                                    # [batches, 3] where each is, its metadata's and body's size
        self.file = self.enter_context(atomic(path))
        self.callback(self.finish)
        magic = b"" if stream else b"ARROW1\0\0"
        self.file.write(magic + message(SCHEMA, write_schema(self.schema)))
    def write(self, rows):                  # a table, a list of rows or a dict of columns
        if isinstance(rows, list):
            rows = Table.from_pylist(rows, self.schema)
        if isinstance(rows, dict):
            rows = Table.from_pydict(rows, self.schema)
        for batch in conform(rows, self.schema):
            self.write_batch(batch)
    def write_batch(self, batch):
        refuse_nulls(batch, self.schema)
        _, *laid = lay_out(batch)                           # the table itself is described by its schema
        nodes = []
        places = []
        body = []
        size = 0
        for node, own in laid:
            nodes.append(node)
            for buffer in own:
                padding = bytes(-len(buffer) % 64)
                places.append((size, len(buffer)))
                body += [buffer, padding]
                size += len(buffer) + len(padding)
        header = pack(batch.length, items(np.array(nodes)), items(np.array(places)))
        metadata = message(BATCH, header, size)
        self.blocks.append((self.file.tell(), len(metadata), size))
        self.file.writelines([metadata, *body])
    def finish(self):
        self.file.write(END)
        if not self.stream:
            blocks = items(np.array(self.blocks))
            footer = pack(4, write_schema(self.schema), None, blocks)
            self.file.write(footer + struct.pack("<i", len(footer)) + b"ARROW1")
def lay_out(a):                             # of an array and all below it, depth first: (rows, nulls), and its buffers
    own, children = buffers_of(a)
    yield (a.length, a.null_count), own
    for child in children:
        yield from lay_out(child)
def refuse_nulls(a, kind):                  # where they are forbidden, in columns, structs and lists; below a null not
    for child, field in zip(a.children, kind.fields):
        check(field.nullable or not child.null_count, f"column {field.name!r} has nulls, which its schema forbids")
        if field.type.fields:
            refuse_nulls(child.shown(), field.type)
def write(table, path, stream=False):
    """Write a table: the file format, or the stream format, which datasets reads."""
    with Writer(path, table.schema, stream) as writer:
        writer.write(table)
def read(path):
    """Map a file of either format. Only its metadata is read; batches are decoded, not copied, when touched."""
    explain = partial(naming, f"{path} is not an Arrow file that can be read")
    schema = None
    dictionaries = {}
    batches = []
    with open(path, "rb") as file, explain():
        # private pages: who writes to them gets a copy. 0x4000: NORESERVE, as the file may be larger than the memory
        memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | 0x4000)
        for kind, metadata, at, body in messages(file.fileno(), np.frombuffer(memory, np.uint8)):
            if kind == SCHEMA:
                schema = read_schema(metadata, at)
            elif kind == BATCH:
                batches.append(Batch(schema, metadata, at, body, dictionaries, explain))
            else:
                number, at, delta = parse(metadata, at, DICTIONARY_BATCH)
                check(not delta, "it has a dictionary in parts (delta), which is not supported")
                dictionaries = dictionaries | {number: (metadata, at, body)}        # earlier batches keep theirs
        check(schema)
    return Table(schema, batches)
def messages(fd, memory):
    """(what it holds, its metadata, where there, its body) of every message. In a file a footer lists them; in a stream
    they follow one another. Metadata is read: a page that is touched through the map counts as our memory."""
    size = len(memory)
    head = os.pread(fd, 6, 0)
    stream = head[:4] == END[:4]
    places = [0]
    if not stream:
        check(head == b"ARROW1", f"it begins with {head!r}, as no Arrow file does")
        length, magic = struct.unpack("<i6s", os.pread(fd, 10, size - 10))
        check(magic == head)
        footer = os.pread(fd, length, size - 10 - length)
        _, schema, dictionaries, batches = parse(footer, 0, FOOTER)
        yield SCHEMA, footer, schema, None
        places = [block[0] for block in chain(dictionaries, batches)]
    for at in places:                                       # a stream's next place is appended below
        head = os.pread(fd, 8, at)
        if head in (b"", END):
            return
        _, length = struct.unpack("<ii", head)
        start = at + 8 + length
        metadata = os.pread(fd, length, at + 8)
        _, kind, header, body = parse(metadata, 0, MESSAGE)
        check(0 <= body <= size - start)
        yield kind, metadata, header, memory[start:start + body]
        if stream:
            places.append(start + body)

# --- demo ------------------------------------------------------------------------------------------------------------
def demo(documents=5000):
    """Write, map and shuffle documents; then time each step beside pyarrow and datasets: the best of nine, in turns."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 50_000, n, np.int32) for n in rng.integers(100, 400, documents)]
    x = np.arange(100 * documents)
    tables = {
        "lists": Table.from_pydict({"id": x[:documents], "tokens": tokens}),
        "numbers": Table.from_pydict({"x": x, "y": x / 7}),
    }
    with tempfile.TemporaryDirectory() as folder:
        ours = f"{folder}/ours"
        write(tables["lists"], ours, stream=True)
        shuffled = read(ours).shuffle(0)
        row = shuffled[0]
        assert row["tokens"] == tokens[row["id"]].tolist()
        print(f"wrote, mapped and shuffled: {shuffled!r}\n")
        try:
            import datasets
            from pyarrow import feather, table
        except ImportError:
            return                                          # a table of speeds follows where these are
        theirs = datasets.Dataset.from_file(ours).shuffle(seed=0)
        arrays = theirs.select_columns("tokens").with_format("numpy")
        def save(content):
            with atomic(f"{folder}/theirs") as file:        # on disk, as ours
                feather.write_feather(content, file, "uncompressed")
        def beside(step, mine, other, times=9):
            turns = [timeit.timeit(run, number=times) for run in (mine, other) * 9]
            best = 1000 / times * np.reshape(turns, (9, 2)).min(0)
            print(f"{step:20} {best[0]:9.4f} ms   pyarrow or datasets {best[1]:9.4f} ms {best[1] / best[0]:7.1f}x")
        beside("1 shuffled row", lambda: shuffled[7], lambda: theirs[7], 999)
        beside("1000 shuffled rows", lambda: shuffled["tokens"][:1000].to_numpy(), lambda: arrays[:1000])
        load = partial(feather.read_table, ours, memory_map=True)
        for name, content in tables.items():
            beside(f"write {name}", partial(write, content, ours), partial(save, table(content)))
            beside(f"open {name}", partial(read, ours), load)
            beside(f"read {name}", lambda: read(ours).combine(), load)

if __name__ == "__main__":
    demo()
