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
Every type has one of three layouts, so that to slice, to take and to join are three short branches each:
    fixed    numbers and times: a buffer of values
    list     lists: a buffer of offsets, and a child with the items of all rows; text is a list of bytes
    rows     structs: a child for each member; fixed_size_list: n rows of a child to a row

Public names
    array(values, type=None)                  a Column from Python values, numpy, torch or another Arrow library
    Table.from_pydict / from_pylist / from_jsonl / from_arrow, and to_pydict / to_pylist / to_jsonl
    table[i], table[a:b], table["column"], slice, select, filter, map, shuffle, split, with_column, rename, drop, ...
    column[i], column[a:b], to_numpy, to_torch, to_pylist; of lists also flatten and lengths
    concat([tables]), read(path), write(table, path, stream=False), Writer(path, schema, stream=False)
    Type, Field, Schema                       types are named by strings: "int32", "list<utf8>", "timestamp[us, UTC]"

The file format (the default: pyarrow, feather, polars, DuckDB) ends in a footer that lists the batches; the stream
format (stream=True: datasets) is the same without the footer. `read` takes either.

Left out: writing dictionaries and compressed files, decimals, unions, maps and other types that no training needs, and
the C interface (pyarrow, where it is installed, lends our buffers to other libraries).

    python arrowlite.py             the demo, with a table of speeds
    python arrowlite.py FILE...     the schema and the first rows of Arrow files
"""
from __future__ import annotations

import contextlib
import datetime as dt
import functools
import itertools
import json
import mmap
import os
import re
import struct
import sys
import tempfile
import timeit
import uuid
from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np

# --- types: one table drives everything ------------------------------------------------------------------------------

# name: layout, dtype of the first buffer, member of the Type union in a file, the numbers that it has there
TYPES = {
    "null": ("rows", None, 1, ()),
    "bool": ("fixed", "?", 6, ()),
    "float16": ("fixed", "f2", 3, (0,)),
    "float32": ("fixed", "f4", 3, (1,)),
    "float64": ("fixed", "f8", 3, (2,)),
    "date32": ("fixed", "i4", 8, (0,)),
    "timestamp": ("fixed", "M8", 10, ("unit",)),
    "duration": ("fixed", "m8", 18, ("unit",)),
    "utf8": ("list", "i4", 5, ()),
    "binary": ("list", "i4", 4, ()),
    "large_utf8": ("list", "i8", 20, ()),
    "large_binary": ("list", "i8", 19, ()),
    "fixed_size_binary": ("rows", None, 15, ("size",)),
    "list": ("list", "i4", 12, ()),
    "large_list": ("list", "i8", 21, ()),
    "fixed_size_list": ("rows", None, 16, ("size",)),
    "struct": ("rows", None, 13, ()),
}
for bits in (8, 16, 32, 64):
    TYPES[f"int{bits}"] = ("fixed", f"i{bits // 8}", 2, (bits, 1))
    TYPES[f"uint{bits}"] = ("fixed", f"u{bits // 8}", 2, (bits, 0))
ALIASES = {"string": "utf8", "large_string": "large_utf8", "float": "float32", "double": "float64"}     # pyarrow's
UNITS = ["s", "ms", "us", "ns"]

@dataclass(eq=False, repr=False)
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
        self.layout, code, self.member, self.numbers = TYPES[self.name]
        self.family = self.name.removeprefix("large_").removeprefix("fixed_size_")      # utf8, binary, list, ...
        self.is_bytes = self.family in ("utf8", "binary")               # a file has its child's bytes as a buffer
        self.dtype = code and np.dtype(f"{code}[{self.unit}]" if self.unit else code)   # of the first buffer
        self.is_plain = self.layout == "fixed" and not self.unit and self.name != "date32"      # numpy's tolist will do
        self.stride = self.size if "size" in self.numbers else 1        # of layout rows: a child's rows for a row
        self.parts = [field.type for field in self.fields]              # the types of the children
        if self.is_bytes:
            self.parts = [Type("uint8")]
        names = [field.name for field in self.fields]
        if len(set(names)) < len(names):
            raise ValueError(f"two columns or members have the same name: {', '.join(names)}; rename one")
        complete = self.name == "struct" or len(names) == (self.family == "list")
        if not complete or self.size < 0 or self.unit not in (UNITS if "unit" in self.numbers else [""]):
            raise ValueError(f"{self} is not a complete type; write for example list<int32> or timestamp[us, UTC]")

    def __repr__(self) -> str:
        """Its spelling. Names and zones that are not words are quoted, so that no two types have the same."""
        inner = ", ".join(map(str, self.fields if self.name == "struct" else self.parts[:len(self.fields)]))
        size = str(self.size) if "size" in self.numbers else ""
        details = ", ".join(filter(None, [size, self.unit, quoted(self.tz)]))
        return self.name + (f"<{inner}>" if self.fields else "") + (f"[{details}]" if details else "")

    def __hash__(self) -> int:
        return hash(str(self))

    def __eq__(self, other) -> bool:
        return self is other or str(self) == str(other)

def quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w/+:-]*", name) else repr(name)

@dataclass
class Field:
    """The name and type of a column or of a struct's member. A list's item is a field, too."""
    name: str
    type: Type
    nullable: bool = True

    def __post_init__(self):
        self.type = as_type(self.type)

    def __str__(self) -> str:
        return f"{quoted(self.name)}: {self.type}" + " not null" * (not self.nullable)

class Schema:
    """A table's columns in their order, and what else its file says: metadata, {bytes: bytes}."""

    def __init__(self, columns, metadata=None):
        """From another, {name: type}, or a list of fields or (name, type)."""
        metadata = metadata or getattr(columns, "metadata", {})
        if isinstance(columns, dict):
            columns = columns.items()
        fields = [column if isinstance(column, Field) else Field(*column) for column in columns]
        self.type = Type("struct", tuple(fields))
        self.names = [field.name for field in fields]
        self.metadata = {as_bytes(key): as_bytes(value) for key, value in metadata.items()}

    def __iter__(self):
        return iter(self.type.fields)

    def __repr__(self) -> str:
        return "\n".join(map(str, self))

    def __eq__(self, other) -> bool:
        return str(self) == str(other)

    def field(self, name: str) -> Field:
        return self.type.fields[place_of(name, self.type)]

def place_of(name: str, kind: Type) -> int:
    """Which member of a struct has this name."""
    names = [field.name for field in kind.fields]
    if name not in names:
        raise KeyError(f"no column {name!r}; there are: {', '.join(names)}")
    return names.index(name)

def as_bytes(text) -> bytes:
    return text if isinstance(text, bytes) else text.encode()

def list_of(item: Type, name: str = "list", size: int = 0) -> Type:
    return Type(name, (Field("item", item),), size)

def as_type(spec) -> Type:
    """From a Type, its spelling (but of structs), or numpy's or Python's name of it."""
    if isinstance(spec, Type):
        return spec
    if not isinstance(spec, str):
        return type_of_dtype(np.dtype(spec))
    parts = re.fullmatch(r"(\w+)(?:<(.+)>)?(?:\[(\d*)(\w*)(?:, *(.+))?\])?", spec)
    name = parts and ALIASES.get(parts[1], parts[1])
    if name not in TYPES:
        raise ValueError(f"{spec!r} is no type that can be spelled; those are {', '.join(TYPES)}, e. g. list<utf8>")
    _, inner, size, unit, tz = parts.groups("")
    return Type(name, (Field("item", inner),) if inner else (), int(size or 0), unit, tz)

def type_of_dtype(dtype: np.dtype) -> Type:
    if dtype.kind in "mM":
        unit = np.datetime_data(dtype)[0]
        if dtype == "M8[D]":
            return Type("date32")
        return Type("timestamp" if dtype.kind == "M" else "duration", unit=unit if unit in UNITS else "s")
    name = {"U": "utf8", "S": "binary"}.get(dtype.kind, dtype.name)
    if name not in TYPES:
        raise ValueError(f"{dtype} has no Arrow type; convert it first")
    return Type(name)

@contextlib.contextmanager
def naming(where: str, *errors):
    """Say in a ValueError where it arose, and make one of other errors that mean the same there."""
    try:
        yield
    except (ValueError, *errors) as error:
        raise ValueError(f"{where}: {error}") from None

# --- arrays: numpy views that belong together ------------------------------------------------------------------------

class Array:
    """Rows of one type; immutable.

    layout   data                   children
    fixed    values [rows]          -
    list     offsets [rows + 1]     the items of all rows, of text their bytes: from offset 0 to the last, no others
    rows     -                      struct: each member [rows]; fixed_size_list: items [rows * size]; null: -
    """

    def __init__(self, type: Type, length: int, data=None, children=(), valid=None):
        self.type = type
        self.length = length
        self.data = data
        self.children = list(children)
        self.valid = valid                      # [rows] of bool, or None: there are no nulls

    def __len__(self) -> int:
        return self.length

    @property
    def null_count(self) -> int:
        return 0 if self.valid is None else self.length - int(np.count_nonzero(self.valid))

    def flags(self) -> np.ndarray:
        """Whether each row is there, [rows]."""
        return np.ones(self.length, bool) if self.valid is None else self.valid

    def pick(self, rows: slice | np.ndarray) -> Array:
        """Some of the rows: a slice(start, stop) shares every buffer, row numbers gather a copy."""
        shared = isinstance(rows, slice)
        data, children = self.data, self.children
        if self.type.layout == "fixed":
            data = data[rows]
        elif self.type.layout == "rows":
            stride = self.type.stride
            if shared:
                below = slice(rows.start * stride, rows.stop * stride)
            else:
                below = (rows[:, None] * stride + np.arange(stride)).ravel()
            children = [child.pick(below) for child in children]
        elif shared:
            data = data[rows.start:rows.stop + 1]
            first = data.item(0)
            children = [children[0].pick(slice(first, data.item(-1)))]
            data = data - data[0] if first else data
        else:
            starts = data[rows].astype(np.int64)
            lengths = data[rows + 1] - starts
            data = offsets_of(lengths, self.type)
            children = [children[0].pick_spans(starts, lengths)]
        length = rows.stop - rows.start if shared else len(rows)
        return Array(self.type, length, data, children, None if self.valid is None else self.valid[rows])

    def pick_spans(self, starts: np.ndarray, lengths: np.ndarray) -> Array:
        """Rows start : start + length of every span, joined. Long spans are copied span by span, because an index
        costs 8 bytes and some 5 ns an item; short ones are not worth a Python step each."""
        total = int(lengths.sum())
        if self.type.layout == "fixed" and self.valid is None and total > 48 * len(lengths):
            spans = zip(starts.tolist(), (starts + lengths).tolist())
            return Array(self.type, total, np.concatenate([self.data[start:stop] for start, stop in spans]))
        shift = starts - (np.cumsum(lengths) - lengths)     # from a row's number in the result to its number here
        return self.pick(np.repeat(shift, lengths) + np.arange(total))

    def offsets(self) -> np.ndarray:
        """Of lists, also those of one size: where each row is in the child, [rows + 1]."""
        return np.arange(self.length + 1) * self.type.stride if self.data is None else self.data

    def lengths(self) -> np.ndarray:
        """Of lists: how many items each row has, [rows]; 0 for a null."""
        lengths = np.diff(self.offsets()).astype(np.int64)
        return lengths * self.valid if self.null_count else lengths

    def shown(self) -> Array:
        """Without the rows that are null."""
        return self.pick(np.flatnonzero(self.valid)) if self.null_count else self

    def at(self, i: int):
        """A row as a Python value. What training reads row by row has a short way, the rest that of to_pylist."""
        kind = self.type
        if self.valid is not None and not self.valid[i]:
            return None
        if kind.is_plain:
            return self.data.item(i)
        if kind.name == "struct":
            return {field.name: child.at(i) for field, child in zip(kind.fields, self.children)}
        if kind.layout == "list":
            items = self.children[0].pick(slice(self.data.item(i), self.data.item(i + 1)))
            if kind.family == "list":
                return items.to_pylist()
            return str(items.data, "utf8") if kind.family == "utf8" else items.data.tobytes()
        return self.pick(slice(i, i + 1)).to_pylist()[0]

    def to_pylist(self) -> list:
        kind = self.type
        if kind.is_plain:
            rows = self.data.tolist()
        elif kind.layout == "fixed":
            rows = python_times(kind, self.numbers())
        elif kind.name == "null":
            rows = [None] * self.length
        elif kind.name == "struct":
            rows = [{} for _ in range(self.length)]
            for field, child in zip(kind.fields, self.children):
                for row, value in zip(rows, child.to_pylist()):
                    row[field.name] = value
        else:
            items = self.children[0].data.tobytes() if kind.is_bytes else self.children[0].to_pylist()
            spans = itertools.pairwise(self.offsets().tolist())
            rows = [items[start:stop] for start, stop in spans]
            if kind.family == "utf8":
                rows = [row.decode() for row in rows]
        if self.valid is not None:
            for i in np.flatnonzero(~self.valid).tolist():
                rows[i] = None
        return rows

    def numbers(self) -> np.ndarray:
        """Of layout fixed: the values as numpy has them; nulls are anything."""
        return self.data.astype("M8[D]") if self.type.name == "date32" else self.data

    def to_numpy(self) -> np.ndarray:
        kind = self.type
        nulls = self.null_count
        if kind.layout == "fixed" and not (nulls and kind.name == "bool"):
            values = self.numbers()
            if nulls:
                values = values.astype("f8") if values.dtype.kind in "iu" else values.copy()
                values[~self.valid] = None
            return values
        if kind.name == "fixed_size_list" and not nulls:
            values = self.children[0].to_numpy()
            return values.reshape(self.length, kind.size, *values.shape[1:])
        if kind.family == "list" and self.children[0].type.is_plain:
            items = self.children[0].to_numpy()
            rows = [items[start:stop] for start, stop in itertools.pairwise(self.offsets().tolist())]
        else:
            rows = self.to_pylist()
        rows = np.fromiter(rows, object, self.length)
        if nulls:
            rows[~self.valid] = None
        return rows

    def to_torch(self):
        import torch
        values = self.to_numpy()
        if values.dtype == object:
            return [torch.from_numpy(row) for row in values]
        return torch.from_numpy(values)

def offsets_of(lengths: np.ndarray, kind: Type) -> np.ndarray:
    """lengths [rows] -> offsets [rows + 1]"""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > np.iinfo(kind.dtype).max:
        raise ValueError(f"{offsets[-1]:,} bytes or items are too many for {kind}; use large_{kind}")
    return offsets.astype(kind.dtype, copy=False)

def python_times(kind: Type, values: np.ndarray) -> list:
    """date, datetime, timedelta where they hold the value exactly, else numpy's scalars (nanoseconds, far years)."""
    rows = values.tolist()
    for i, row in enumerate(rows):
        if isinstance(row, int):
            rows[i] = values[i]
        elif kind.tz and row:
            rows[i] = row.replace(tzinfo=dt.timezone.utc)
    return rows

# --- from Python values to arrays ------------------------------------------------------------------------------------

def array(values, type=None) -> Column:
    """From Python values (None is null), a numpy array or torch tensor, or another Arrow library's column; of a type,
    or of the one that is natural for them."""
    made = make(values, type)
    return Column(made.type, [made])

def make(values, type=None) -> Array:
    kind = type and as_type(type)
    if isinstance(values, Column):
        made = values.combine()
    elif hasattr(values, "__arrow_c_stream__") or hasattr(values, "__arrow_c_array__"):
        made = Table.from_arrow({"": import_pyarrow().chunked_array(values)})[""].combine()
    elif hasattr(values, "__array__"):
        made = from_numpy(np.asarray(values))
    elif isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
        raise ValueError(f"a column takes a list of values, not {values!r:.40}")
    else:
        made = build(list(values), kind)
    return cast(made, kind) if kind else made

def from_numpy(values: np.ndarray) -> Array:
    """The same memory where numpy and Arrow agree. A further axis becomes a fixed_size_list, NaT becomes null."""
    if values.ndim > 1:
        items = from_numpy(values.reshape(-1, *values.shape[2:]))
        return Array(list_of(items.type, "fixed_size_list", values.shape[1]), len(values), None, [items])
    if values.dtype.kind in "OUS":
        return make(values.tolist())
    kind = type_of_dtype(values.dtype)
    valid = ~np.isnat(values) if values.dtype.kind in "mM" and np.isnat(values).any() else None
    data = np.ascontiguousarray(values, kind.dtype)
    return Array(kind, len(values), data, (), valid)

NATURAL = {bool: "bool", int: "int64", float: "float64", str: "utf8", bytes: "binary", dt.date: "date32",
           dt.datetime: "timestamp[us]", dt.timedelta: "duration[us]"}
WANTED = {"null": (), "struct": dict, "utf8": str, "binary": bytes}             # what a row of such a type has to be

def is_row(kind: type) -> bool:
    """Whether values of a Python type are lists, as numpy's arrays and torch's tensors are."""
    return kind in (list, tuple) or hasattr(kind, "__array__") and not issubclass(kind, np.generic)

def natural(values: list) -> Type:
    """The type that is natural for Python values; what lists and structs hold is left open."""
    kinds = set(map(type, values))
    if kinds == {dict}:
        return Type("struct")
    if kinds and all(map(is_row, kinds)):
        return list_of(Type("null"))
    if kinds == {dt.datetime} and values[0].tzinfo:
        return Type("timestamp", unit="us", tz="UTC")
    specs = {NATURAL.get(type(value)) or getattr(value, "dtype", type(value)) for value in values}
    return functools.reduce(unify, map(as_type, specs), Type("null"))

def build(values: list, kind: Type | None = None) -> Array:
    """Python values as an array of a type, or of the one that is natural for them; a ValueError if one does not fit."""
    n = len(values)
    valid = np.array([value is not None for value in values], bool)
    some = [value for value in values if value is not None]
    free = kind is None
    kind = natural(some) if free else kind
    for found in set(map(type, some)):
        fits = is_row(found) if kind.family == "list" else issubclass(found, WANTED.get(kind.family, object))
        if not fits:
            raise ValueError(f"a value of type {found.__name__} is no {kind}")
    data = None
    children = {}
    if kind.layout == "fixed":
        data = np.zeros(n, kind.dtype)
        data[valid] = exact(some, kind)
    elif kind.name == "struct":
        rows = [value or {} for value in values]
        members = [field.name for field in kind.fields]
        for name in dict.fromkeys(itertools.chain(members, *some)):
            with naming(f"column {name!r}", KeyError):
                part = None if free else kind.parts[place_of(name, kind)]
                children[name] = build([row.get(name) for row in rows], part)
        if free:
            kind = Type("struct", tuple(Field(name, child.type) for name, child in children.items()))
    elif kind.parts:
        if kind.family == "utf8":
            some = [value.encode() for value in some]
        lengths = np.zeros(n, np.int64)
        lengths[valid] = [len(row) for row in some]
        if kind.layout == "list":
            data = offsets_of(lengths, kind)
        elif (lengths[valid] != kind.size).any():
            raise ValueError(f"a row of another length is no {kind}")
        else:
            blank = bytes(kind.size) if kind.is_bytes else [None] * kind.size
            some = [blank if value is None else value for value in values]
        items = join_rows(some, kind, None if free else kind.parts[0])
        children = {"item": items}
        if free and kind.family == "list":
            kind = list_of(items.type)
    return Array(kind, n, data, children.values(), None if valid.all() else valid)

def join_rows(rows: list, kind: Type, part: Type | None) -> Array:
    """The items of all rows of a list or text, of a type or of the natural one."""
    if kind.is_bytes:
        return from_numpy(np.frombuffer(b"".join(rows), np.uint8))
    if rows and all(hasattr(row, "__array__") for row in rows):
        return make(np.concatenate(rows), part)
    return build(list(itertools.chain.from_iterable(rows)), part)

def exact(values: list, kind: Type) -> np.ndarray:
    """Numbers and times as a type stores them; only floats may be rounded, to other floats."""
    dtype = np.dtype("M8[D]") if kind.name == "date32" else kind.dtype          # days are stored as int32
    if kind.tz:
        values = [value.astimezone(dt.timezone.utc).replace(tzinfo=None) for value in values]
    with np.errstate(over="raise"), naming(f"a value does not fit in a column of {kind}", TypeError, ArithmeticError):
        out = np.array(values, dtype)
    found = list(out) if dtype.kind in "mM" else out.tolist()
    if found != values:
        rounded = (float, np.floating) if dtype.kind == "f" else ()
        for value, same in zip(values, found):
            if value != same and not isinstance(value, rounded):
                raise ValueError(f"{value!r} does not fit in a column of {kind}")
    return out.astype(kind.dtype)

# --- one type for all parts: unify, cast, join -----------------------------------------------------------------------

def unify(a: Type, b: Type) -> Type:
    """The narrowest type that holds the values of both without loss."""
    if b.name == "null" or a == b:
        return a
    if a.name == "null":
        return b
    if a.family == b.family and a.layout != "fixed" and a.size == b.size:        # lists, texts or structs
        members = {field.name: field for field in a.fields}
        for field in b.fields:
            with naming(f"column {field.name!r}"):
                both = unify(members.get(field.name, field).type, field.type)
            members[field.name] = Field(field.name, both)
        widest = max(a, b, key=lambda kind: len(kind.name))
        return replace(widest, fields=tuple(members.values()))
    numbers = a.is_plain and b.is_plain and "bool" not in (a.name, b.name)
    if numbers or a.unit and (a.name, a.tz) == (b.name, b.tz):
        return replace(type_of_dtype(np.promote_types(a.dtype, b.dtype)), tz=a.tz)
    raise ValueError(f"{a} and {b} have no common type; make them alike first")

def cast(a: Array, kind: Type) -> Array:
    """The same values as another type; a ValueError where one would change."""
    if a.type == kind:
        return a
    if not a.type.name == kind.name == "struct":
        return build(a.to_pylist(), kind)
    children = [build([None] * len(a), part) for part in kind.parts]
    for field, child in zip(a.type.fields, a.children):
        with naming(f"column {field.name!r}", KeyError):
            place = place_of(field.name, kind)
            children[place] = cast(child, kind.parts[place])
    return Array(kind, len(a), None, children, a.valid)

def join(kind: Type, parts: list[Array]) -> Array:
    """Arrays of one type, one after the other."""
    if len(parts) < 2:
        return parts[0] if parts else build([], kind)
    data, valid = None, None
    if kind.layout == "fixed":
        data = np.concatenate([part.data for part in parts])
    elif kind.layout == "list":
        data = offsets_of(np.concatenate([np.diff(part.data) for part in parts]), kind)
    columns = zip(*[part.children for part in parts])       # the first children of all parts, the second, ...
    children = [join(part, list(column)) for part, column in zip(kind.parts, columns)]
    if any(part.valid is not None for part in parts):
        valid = np.concatenate([part.flags() for part in parts])
    return Array(kind, sum(map(len, parts)), data, children, valid)

def refuse_nulls(a: Array, kind: Type) -> None:
    """What may not be null, in columns, structs and lists, is not; but for what stands below a null."""
    for child, field in zip(a.children, kind.fields):
        if child.null_count and not field.nullable:
            raise ValueError(f"column {field.name!r} has nulls, which its schema forbids")
        refuse_nulls(child.shown() if field.type.fields else child, field.type)

# --- columns: chunks of rows, seen through a list of row numbers -----------------------------------------------------

class Lazy(dict):
    """Chunks that are made when they are first asked for."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, k: int) -> Array:
        self[k] = self.make(k)
        return self[k]

class Column:
    """Rows of one type. Its chunks, laid end to end, number their rows; `rows` (a range, or an array after a shuffle)
    says which of those are its own, in which order. Selecting changes `rows`, the chunks stay where they are."""

    def __init__(self, type: Type, chunks, starts=None, rows=None):
        self.type = type
        self.chunks = chunks
        self.starts = starts or [0, *itertools.accumulate(map(len, chunks))]
        self.rows = range(self.starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self):
        return type(self), (getattr(self, "schema", self.type), list(self.batches()))

    def __repr__(self) -> str:
        return f"{self.type}, {len(self):,} rows: {self[:10].to_pylist()}"

    def __getitem__(self, i):
        """A row as a Python value (of a table: a dict), a slice as a column or table, a member of structs by name."""
        if isinstance(i, slice):
            return self.select(range(len(self))[i])
        if isinstance(i, str):
            place = place_of(i, self.type)
            members = self.over(lambda chunk: chunk.children[place])
            return Column(self.type.parts[place], members, self.starts, self.rows)
        row = int(self.rows[i])
        k = bisect_right(self.starts, row) - 1
        return self.chunks[k].at(row - self.starts[k])

    def __iter__(self):
        for start in range(0, len(self), 1000):
            yield from self[start:start + 1000].to_pylist()

    def over(self, change) -> Lazy:
        """What `change` makes of each chunk when it is first touched."""
        return Lazy(lambda k: change(self.chunks[k]))

    def combine(self) -> Array:
        """These rows as one array: a view if they are a stretch of one chunk."""
        if isinstance(self.rows, range) or not len(self):
            return join(self.type, list(self.batches()))
        owner = np.searchsorted(self.starts, self.rows, "right") - 1        # [rows] whose chunk each is in
        order = np.argsort(owner, kind="stable")                            # chunk by chunk first, then back
        parts = []
        for group in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1):
            k = int(owner[group[0]])
            parts.append(self.chunks[k].pick(self.rows[group] - self.starts[k]))
        joined = join(self.type, parts)
        return joined.pick(np.argsort(order)) if len(parts) > 1 else joined

    def batches(self):
        """The rows as arrays, one after the other: as the chunks lie, or gathered 10,000 at a time after a shuffle."""
        if not isinstance(self.rows, range):
            for start in range(0, len(self), 10_000):
                yield self[start:start + 10_000].combine()
            return
        first = self.rows.start
        k = bisect_right(self.starts, first) - 1
        while first < self.rows.stop:
            start = self.starts[k]
            last = min(self.rows.stop, self.starts[k + 1])
            if first < last:
                yield self.chunks[k].pick(slice(first - start, last - start))
            first = last
            k += 1

    def to_pylist(self) -> list:
        return list(itertools.chain.from_iterable(batch.to_pylist() for batch in self.batches()))

    def to_numpy(self) -> np.ndarray:
        """Numbers and times without nulls: the buffer itself. With nulls: a copy, integers as float64 with NaN (as in
        pyarrow), times with NaT. fixed_size_list: [rows, size]. Text, lists, structs: an array of Python objects, of
        lists of numbers those are arrays."""
        return self.combine().to_numpy()

    def to_torch(self):
        """A tensor over the same memory; of lists, a list of tensors. The pages of a mapped file are private: writing
        to a tensor neither changes the file nor crashes."""
        return self.combine().to_torch()

    @property
    def null_count(self) -> int:
        return self.combine().null_count

    def lengths(self) -> np.ndarray:
        """Of lists: how many items each row has, int64 [rows]; 0 for a null. No item is read."""
        return np.concatenate([np.zeros(0, np.int64), *(batch.lengths() for batch in self.batches())])

    def flatten(self) -> Column:
        """Of lists: the items of all rows, one after the other; of a stretch of one chunk it is a view."""
        return Column(self.type.parts[0], [self.combine().shown().children[0]])

    values = property(flatten)                              # as pyarrow calls it
    field = __getitem__                                     # of structs: a member

    def slice(self, offset: int = 0, length: int | None = None) -> Column:
        return self[offset:][:length]

    def select(self, indices) -> Column:
        """The rows of these numbers, in this order; negative ones count from the end."""
        n = len(self)
        if isinstance(indices, range) and indices.step == 1 and 0 <= indices.start <= indices.stop <= n:
            rows = self.rows[indices.start:indices.stop]
        else:
            picks = np.asarray(indices)
            if picks.size and picks.dtype.kind not in "iu":
                raise ValueError(f"select takes row numbers, not {picks.dtype}; for a mask there is filter")
            if picks.size and not -n <= picks.min() <= picks.max() < n:
                raise IndexError(f"rows {picks.min()} to {picks.max()} of {n:,} rows")
            picks = picks.astype(np.int64) % max(n, 1)
            rows = picks + self.rows.start if isinstance(self.rows, range) else self.rows[picks]
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__, rows=rows)
        return view

    def filter(self, keep) -> Column:
        """The rows for which a function, or a mask of bools (null is no), says yes."""
        if callable(keep):
            keep = [bool(keep(row)) for row in self]
        mask = make(keep, "bool")
        if len(mask) != len(self):
            raise ValueError(f"a mask of {len(mask):,} for {len(self):,} rows")
        return self.select(np.flatnonzero(mask.data & mask.flags()))

    def shuffle(self, seed: int | None = None) -> Column:
        return self.select(np.random.default_rng(seed).permutation(len(self)))

    def split(self, test_size: float | int, seed: int | None = None) -> tuple[Column, Column]:
        """(train, test) of the shuffled rows; test_size is a share (float) or a number of rows (int)."""
        rows = round(test_size * len(self)) if isinstance(test_size, float) else test_size
        if not 0 <= rows <= len(self):
            raise ValueError(f"a test set of {test_size} cannot be taken from {len(self):,} rows")
        shuffled = self.shuffle(seed)
        return shuffled[rows:], shuffled[:rows]

# --- tables: a table is a column of structs --------------------------------------------------------------------------

class Table(Column):
    """Named columns of equal length. Every method gives a new table and leaves this one as it is."""

    def __init__(self, schema: Schema, chunks, starts=None, rows=None):
        super().__init__(schema.type, chunks, starts, rows)
        self.schema = schema

    num_rows = property(Column.__len__)
    num_columns = property(lambda self: len(self.schema.names))
    column_names = property(lambda self: list(self.schema.names))

    def __repr__(self) -> str:
        return f"Table of {len(self):,} rows\n{self.schema}"

    def to_arrow(self):
        """As pyarrow's, over the same memory, which it keeps alive."""
        pyarrow = import_pyarrow()
        schema = pyarrow.ipc.open_stream(message(SCHEMA, write_schema(self.schema))).schema
        kind = pyarrow.struct(schema)
        batches = [pyarrow.RecordBatch.from_struct_array(lend(batch, kind)) for batch in self.batches()]
        return pyarrow.Table.from_batches(batches, schema)

    def __arrow_c_stream__(self, requested_schema=None):
        """What other libraries take it by."""
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    @classmethod
    def from_pydict(cls, columns: dict, schema=None, metadata=None) -> Table:
        schema = schema and Schema(schema)
        fields = []
        arrays = []
        for name, values in columns.items():
            with naming(f"column {name!r}", KeyError):
                made = make(values, schema and schema.field(name).type)
            fields.append(Field(name, made.type))
            arrays.append(made)
        lengths = [len(made) for made in arrays]
        if len(set(lengths)) > 1:
            raise ValueError(f"columns of different lengths: {dict(zip(columns, lengths))}")
        rows = Array(Type("struct", tuple(fields)), max(lengths, default=0), None, arrays)
        schema = schema or Schema(fields, metadata)
        return cls(schema, [cast(rows, schema.type)])

    @classmethod
    def from_pylist(cls, rows: list[dict], schema=None) -> Table:
        """A name that a row lacks is null there."""
        rows = list(rows)
        made = build(rows or [{}], schema and Schema(schema).type)
        return cls(Schema(schema or made.type.fields), [made.pick(slice(0, len(rows)))])

    @classmethod
    def from_arrow(cls, source) -> Table:
        """From pyarrow, polars, DuckDB, pandas or whatever else has __arrow_c_stream__: copied once, as a stream in a
        file in memory."""
        pyarrow = import_pyarrow()
        table = pyarrow.table(source)
        with open(os.memfd_create("arrow"), "wb") as file:
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            return read(f"/proc/self/fd/{file.fileno()}")

    @classmethod
    def from_jsonl(cls, path, schema=None) -> Table:
        """One JSON object a line."""
        rows = []
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    with naming(f"{path}, line {number}: not a JSON object", RecursionError, TypeError):
                        rows.append({**json.loads(line.removeprefix(b"\xef\xbb\xbf"))})
        with naming(path, RecursionError):
            return cls.from_pylist(rows, schema)

    def to_pydict(self) -> dict[str, list]:
        return {name: self[name].to_pylist() for name in self.schema.names}

    def to_jsonl(self, path) -> None:
        with atomic(path) as file:
            for row in self:
                line = json.dumps(row, ensure_ascii=False, default=json_value)
                file.write(line.encode() + b"\n")

    def select_columns(self, *names: str | list[str]) -> Table:
        return self.members({name: name for name in flat(names)})

    def drop(self, *names: str | list[str]) -> Table:
        gone = self.select_columns(*names).schema.names
        return self.select_columns([name for name in self.schema.names if name not in gone])

    def rename(self, names: dict[str, str]) -> Table:
        self.select_columns(*names)                         # which names those that are not there
        return self.members({name: names.get(name, name) for name in self.schema.names})

    def members(self, names: dict[str, str]) -> Table:
        """The columns of these names, {here: in the new table}."""
        places = [place_of(name, self.type) for name in names]
        fields = [replace(self.type.fields[place], name=new) for place, new in zip(places, names.values())]
        schema = Schema(fields, self.schema.metadata)

        def pick(chunk: Array) -> Array:
            return Array(schema.type, len(chunk), None, [chunk.children[place] for place in places])
        return Table(schema, self.over(pick), self.starts, self.rows)

    def with_column(self, name: str, values, type=None) -> Table:
        """Add or replace a column. The rows of a shuffled table are gathered: the new values are in their order."""
        columns = {old: self[old] for old in self.column_names}
        columns[name] = array(values, type)
        return Table.from_pydict(columns, metadata=self.schema.metadata)

    def map(self, fn, batched: bool = False, batch_size: int | None = 1000, remove_columns=()) -> Table:
        """Merge what fn returns for a row, {column: value}, into the row. With batched=True fn takes and returns
        {column: list}, and may change the number of rows if remove_columns names all that it leaves. batch_size=None is
        the whole table."""
        size = batch_size or max(1, len(self))
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
                names = dict.fromkeys(itertools.chain.from_iterable(results))
                new = {name: [row.get(name) for row in merged] for name in names}
            columns = {name: kept[name][start:start + size] for name in kept.column_names}
            parts.append(Table.from_pydict(columns | new, metadata=self.schema.metadata))
        return concat(parts) if parts else kept

def concat(tables: list[Table]) -> Table:
    """One table after the other, over the same buffers. A column that is null, missing, narrower or of integers in some
    of them becomes what holds the values of all."""
    tables = list(tables)
    kind = functools.reduce(unify, [table.type for table in tables])
    chunks = [cast(batch, kind) for table in tables for batch in table.batches()]
    return Table(Schema(kind.fields, tables[0].schema.metadata), chunks)

def flat(names) -> list[str]:
    """("a", ["b", "c"]) -> ["a", "b", "c"]"""
    one = []
    for part in names:
        one += [part] if isinstance(part, str) else part
    return one

def json_value(value) -> str:
    if isinstance(value, bytes):
        raise ValueError("JSON has no bytes; drop or convert that column first")
    return value.isoformat() if isinstance(value, dt.date) else str(value)

# --- flatbuffers: the metadata of a file -----------------------------------------------------------------------------

def flatbuffer(root: list) -> bytes:
    """A list is a table: its slots, None where a slot is absent. A slot is a number of numpy's, bytes (a string), a
    table, a tuple of tables, or an array (a vector of structs). Every slot gets 8 bytes, so that all is aligned."""
    out = bytearray(8)
    refer(out, 0, root)
    return bytes(out)

def refer(out: bytearray, place: int, node) -> None:
    """Append a node, and write at `place` how far away it is. References point forward: parents go before children."""
    out += bytes(-len(out) % 8)
    at = len(out)
    inner = ()
    if isinstance(node, (bytes, np.ndarray)):               # the items begin on 8 bytes, not their count
        out += struct.pack("<II", 0, len(node)) + bytes(node) + b"\0"
        at += 4
    elif isinstance(node, tuple):
        out += struct.pack("<I", len(node)) + bytes(4 * len(node))
        inner = range(at + 4, len(out), 4)
    else:                                                   # a table: first its vtable, which says where its slots are
        entries = [0 if slot is None else 8 + 8 * i for i, slot in enumerate(node)]
        out += struct.pack(f"<{2 + len(node)}H", 4 + 2 * len(node), 8 + 8 * len(node), *entries)
        out += bytes(-len(out) % 8)
        out += struct.pack("<i4x", len(out) - at) + bytes(8 * len(node))
        at = len(out) - 8 - 8 * len(node)
        inner = range(at + 8, len(out), 8)
    struct.pack_into("<I", out, place, at - place)
    for slot, child in zip(inner, node):
        if isinstance(child, np.generic):
            out[slot:slot + child.nbytes] = child.tobytes()
        elif child is not None:
            refer(out, slot, child)

class Flat:
    """A flatbuffer's table, read where it lies; struct.unpack_from refuses whatever lies outside of the buffer."""

    def __init__(self, buffer: bytes, at: int = 0):
        self.buffer = buffer
        self.at = at + self.read(at, "I")
        self.vtable = self.at - self.read(self.at, "i")

    def read(self, at: int, code: str):
        return struct.unpack_from("<" + code, self.buffer, at)[0]

    def place(self, slot: int) -> int:
        """Where a slot's value is, or 0 if it is absent."""
        entry = 4 + 2 * slot
        offset = self.read(self.vtable + entry, "H") if entry < self.read(self.vtable, "H") else 0
        return offset and self.at + offset

    def number(self, slot: int, code: str, default: int = 0) -> int:
        at = self.place(slot)
        return self.read(at, code) if at else default

    def table(self, slot: int) -> Flat | None:
        at = self.place(slot)
        return Flat(self.buffer, at) if at else None

    def vector(self, slot: int) -> tuple[int, int]:
        """(where its items are, how many)"""
        at = self.place(slot)
        if not at:
            return 0, 0
        at += self.read(at, "I")
        return at + 4, self.read(at, "I")

    def text(self, slot: int) -> bytes:
        at, length = self.vector(slot)
        return self.buffer[at:at + length]

    def tables(self, slot: int) -> list[Flat]:
        at, count = self.vector(slot)
        return [Flat(self.buffer, at + 4 * i) for i in range(count)]

    def longs(self, slot: int, width: int) -> list[list[int]]:
        """A vector of structs of `width` 64-bit numbers."""
        at, count = self.vector(slot)
        return np.frombuffer(self.buffer, "<i8", count * width, at).reshape(count, width).tolist()

# --- schemas as metadata ---------------------------------------------------------------------------------------------

FORMATS = {2: "iB", 3: "h", 8: "h", 10: "h", 15: "i", 16: "i", 18: "h"}     # of the numbers in a member of Type
MEMBERS = {(row[2], *row[3]): name for name, row in TYPES.items()}          # (member, numbers) -> name
VIEWS = {23: "large_binary", 24: "large_utf8"}              # their bytes lie all over the place
UNSUPPORTED = {7: "decimal", 8: "date64", 9: "time", 11: "interval", 14: "union", 17: "map", 22: "run_end_encoded",
               25: "list_view", 26: "large_list_view"}

def write_field(field: Field) -> list:
    kind = field.type
    known = {"size": kind.size, "unit": kind.unit and UNITS.index(kind.unit)}
    numbers = [known.get(number, number) for number in kind.numbers]
    node = [np.array(n, code)[()] for n, code in zip(numbers, FORMATS.get(kind.member, ""))]
    if kind.tz:
        node.append(kind.tz.encode())
    children = tuple(map(write_field, kind.fields))
    return [field.name.encode(), np.bool_(field.nullable), np.uint8(kind.member), node, None, children]

def write_schema(schema: Schema) -> list:
    pairs = tuple([key, value] for key, value in schema.metadata.items())
    return [None, tuple(map(write_field, schema)), pairs or None]

def read_schema(node: Flat) -> Schema:
    if node.number(0, "h"):
        raise ValueError("it is big-endian")
    budget = iter(range(len(node.buffer) // 8))     # a field takes some bytes: ends references that fan out
    fields = [read_field(child, budget) for child in node.tables(1)]
    return Schema(fields, {pair.text(0): pair.text(1) for pair in node.tables(2)})

def read_field(node: Flat, budget, depth: int = 0) -> Field:
    check(depth < 64 and next(budget, None) is not None)
    name = node.text(0).decode()
    fields = tuple(read_field(child, budget, depth + 1) for child in node.tables(5))
    encoding = node.table(4)
    with naming(f"column {name!r}"):
        kind = read_type(node.number(2, "B"), node.table(3), fields)
        if encoding:
            index = encoding.table(1)
            kind.codes = (read_type(2, index, ()) if index else Type("int32"), encoding.number(0, "q"))
    return Field(name, kind, bool(node.number(1, "B")))

def read_type(member: int, node: Flat, fields: tuple) -> Type:
    default = 1 if member in (8, 18) else 0                 # of the unit, where it is absent: milliseconds
    numbers = [node.number(slot, code, default) for slot, code in enumerate(FORMATS.get(member, ""))]
    if member in (10, 18):
        name = "timestamp" if member == 10 else "duration"
        return Type(name, unit=UNITS[numbers[0]], tz=node.text(1).decode() if member == 10 else "")
    if member in (15, 16):
        return Type("fixed_size_binary" if member == 15 else "fixed_size_list", fields, numbers[0])
    name = VIEWS.get(member) or MEMBERS.get((member, *numbers))
    if name is None:
        raise ValueError(f"the Arrow type {UNSUPPORTED.get(member, member)} is not supported; cast it before writing")
    return Type(name, fields, view=member in VIEWS)

# --- arrays as buffers -----------------------------------------------------------------------------------------------

def buffers_of(a: Array) -> tuple[list, list[Array]]:
    """An array's own buffers as Arrow has them, validity first, and its children."""
    if a.type.name == "null":
        return [], []
    own = [np.packbits(a.valid, bitorder="little") if a.null_count else None]
    children = a.children
    if a.type.name == "bool":
        own.append(np.packbits(a.data, bitorder="little"))
    elif a.type.layout == "fixed":
        own.append(np.ascontiguousarray(a.data).view(np.uint8))
    elif a.type.layout == "list":
        own.append(a.data.view(np.uint8))
    if a.type.is_bytes:
        own.append(children[0].data)
        children = []
    return own, children

def lend(a: Array, kind):
    """As a pyarrow array of its type, over the same memory."""
    import pyarrow
    own, children = buffers_of(a)
    own = [None if buffer is None else pyarrow.py_buffer(buffer) for buffer in own] or [None]
    children = [lend(child, kind.field(i).type) for i, child in enumerate(children)]
    return pyarrow.Array.from_buffers(kind, len(a), own, a.null_count, children=children)

def import_pyarrow():
    """Other libraries get our buffers, and we theirs, through pyarrow. Nothing else here needs it."""
    try:
        import pyarrow.ipc
    except ImportError:
        raise ImportError("this takes pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow

def check(fine: bool) -> None:
    if not fine:
        raise ValueError("it is damaged, or was cut off")

def most_rows(body: np.ndarray) -> int:
    """One takes a bit at least; a quarter of a million are believed without, since nulls take no bytes."""
    return max(1 << 18, 8 * len(body))

class Batch:
    """Reads arrays off a record batch: its nodes and buffers, depth first. All checks of a file's data are here: what
    leaves it points nowhere but into its own buffers."""

    def __init__(self, header: Flat, body: np.ndarray, dictionaries: dict):
        if header.table(3):
            raise ValueError("it is compressed; read it with Table.from_arrow(pyarrow.feather.read_table(path))")
        self.header = header
        self.body = body
        self.dictionaries = dictionaries                    # {number: the Batch of its values}
        self.rows = header.number(0, "q")
        check(0 <= self.rows <= most_rows(body))

    def table(self, kind: Type) -> Array:
        self.nodes = iter(self.header.longs(1, 2))
        self.places = iter(self.header.longs(2, 2))
        self.counts = iter(self.header.longs(4, 1))         # of buffers, one for each array of views
        children = [self.array(part) for part in kind.parts]
        check(all(len(child) == self.rows for child in children))
        return Array(kind, self.rows, None, children)

    def buffer(self, dtype=np.uint8, count: int | None = None) -> np.ndarray:
        start, length = next(self.places)
        check(0 <= start and 0 <= length <= len(self.body) - start)
        data = self.body[start:start + length]
        if count is None:
            return data
        size = count * np.dtype(dtype).itemsize
        check(size <= len(data))
        return data[:size].view(dtype)

    def bits(self, count: int) -> np.ndarray:
        packed = self.buffer(count=(count + 7) // 8)
        return np.unpackbits(packed, count=count, bitorder="little").view(bool)

    def array(self, kind: Type) -> Array:
        if kind.codes:
            return self.encoded(*kind.codes, replace(kind, codes=()))
        n, nulls = next(self.nodes)
        check(0 <= nulls <= n <= most_rows(self.body))
        if kind.name == "null":
            return build([None] * n, kind)
        valid = self.bits(n) if nulls else None
        if not nulls:
            self.buffer()                                   # all rows are there: the bitmap may be anything
        if kind.view:
            return self.views(kind, n, valid)
        data = None
        below = n * kind.stride                             # how many rows of a child there must be
        if kind.name == "bool":
            data = self.bits(n)
        elif kind.layout == "fixed":
            data = self.buffer(kind.dtype, n)
        elif kind.layout == "list":
            data = self.buffer(kind.dtype, n and n + 1)
            data = data if n else np.zeros(1, kind.dtype)   # without rows there need not be an offset
            below = int(data[-1])
            check(data[0] >= 0 and (data[:-1] <= data[1:]).all())
        if kind.is_bytes:
            children = [Array(kind.parts[0], below, self.buffer(count=below))]
        else:
            children = [self.array(part) for part in kind.parts]
        check(all(len(child) >= below for child in children))
        whole = Array(kind, n, data, [child.pick(slice(0, below)) for child in children], valid)
        return whole.pick(slice(0, n)) if kind.layout == "list" else whole      # what lies before the first is cut off

    def encoded(self, index: Type, number: int, kind: Type) -> Array:
        """The values that the indices of a dictionary stand for. Null is one more value, the last."""
        codes = self.array(index)
        values = self.dictionaries[number].table(Type("struct", (Field("values", kind),))).children[0]
        rows = np.where(codes.flags(), codes.data, len(values)).astype(np.int64)
        check(((rows >= 0) & (rows <= len(values))).all())
        return join(kind, [values, build([None], kind)]).pick(rows)

    def views(self, kind: Type, n: int, valid) -> Array:
        """A view is a length, and then either up to 12 bytes or (4 bytes, buffer, position)."""
        inline = self.buffer(count=16 * n)
        buffers = [self.buffer() for _ in range(*next(self.counts))]
        entries = inline.view("<i4").reshape(n, 4).copy()
        if valid is not None:
            entries[~valid] = 0
        rows = []
        for i, (length, _, owner, start) in enumerate(entries.tolist()):
            source = buffers[owner] if length > 12 else inline[16 * i + 4:16 * i + 16]
            start = start if length > 12 else 0
            check(0 <= start and 0 <= length <= len(source) - start)
            rows.append(source[start:start + length].tobytes())
        text = build(rows, Type("large_binary"))
        return Array(kind, n, text.data, text.children, valid)

# --- files: messages, each a flatbuffer and a body of buffers --------------------------------------------------------

SCHEMA, DICTIONARY, BATCH = 1, 2, 3                         # what a message can hold
END = struct.pack("<ii", -1, 0)                             # of a stream
DAMAGE = struct.error, LookupError, AttributeError, StopIteration, TypeError, OverflowError, OSError, MemoryError

def padding(size: int) -> bytes:
    return bytes(-size % 64)                                # 64 bytes: a cache line, and the widest vector register

def message(kind: int, header: list, body: int = 0, at: int = 0) -> bytes:
    metadata = flatbuffer([np.int16(4), np.uint8(kind), header, np.int64(body)])
    metadata += padding(at + 8 + len(metadata))
    return struct.pack("<ii", -1, len(metadata)) + metadata

@contextlib.contextmanager
def atomic(path):
    """A file that appears under its name whole and on disk, or not at all."""
    final = os.path.realpath(path)
    if os.path.exists(final) and not os.path.isfile(final):
        raise ValueError(f"{path} is a directory or a device, and no file that can be replaced")
    temporary = f"{final}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)

class Writer:
    """Write a file batch by batch; it appears when the `with` block ends, if it ends well."""

    def __init__(self, path, schema, stream: bool = False):
        self.schema = Schema(schema)
        self.stream = stream
        self.blocks = []                                    # [batches, 3] where each is, its metadata's and body's size
        self.stack = contextlib.ExitStack()
        self.file = self.stack.enter_context(atomic(path))
        self.file.write(b"" if stream else b"ARROW1\0\0")
        self.file.write(message(SCHEMA, write_schema(self.schema), 0, self.file.tell()))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error) -> None:
        if error[0]:
            self.stack.__exit__(*error)
        else:
            self.close()

    def write(self, rows: Table | list[dict] | dict[str, list]) -> None:
        """Add a table, a list of rows or a dict of columns."""
        for batch in as_table(rows).batches():
            self.write_batch(cast(batch, self.schema.type))

    def write_batch(self, batch: Array) -> None:
        refuse_nulls(batch, self.schema.type)
        nodes, buffers, places = [], [], []
        for child in batch.children:
            lay_out(child, nodes, buffers)
        size = 0
        for buffer in buffers:
            places.append((size, len(buffer)))
            size += len(buffer) + len(padding(len(buffer)))
        at = self.file.tell()
        metadata = message(BATCH, [np.int64(len(batch)), longs(nodes, 2), longs(places, 2)], size, at)
        self.blocks.append((at, len(metadata), size))
        self.file.write(metadata)
        for buffer in buffers:
            self.file.write(buffer)
            self.file.write(padding(len(buffer)))

    def close(self) -> None:
        with self.stack:
            if self.file.closed:
                return
            self.file.write(END)
            if not self.stream:
                footer = flatbuffer([np.int16(4), write_schema(self.schema), longs([], 3), longs(self.blocks, 3)])
                self.file.write(footer + struct.pack("<i", len(footer)) + b"ARROW1")

def longs(rows: list, width: int) -> np.ndarray:
    return np.array(rows, "<i8").reshape(-1, width)

def lay_out(a: Array, nodes: list, buffers: list) -> None:
    """Depth first: each array's length and nulls, and its buffers."""
    own, children = buffers_of(a)
    nodes.append((len(a), a.null_count))
    for buffer in own:
        buffers.append(b"" if buffer is None else buffer)
    for child in children:
        lay_out(child, nodes, buffers)

def as_table(rows) -> Table:
    if isinstance(rows, Table):
        return rows
    if hasattr(rows, "__arrow_c_stream__"):
        return Table.from_arrow(rows)
    return Table.from_pydict(rows) if isinstance(rows, dict) else Table.from_pylist(rows)

def write(table: Table, path, stream: bool = False) -> None:
    """Write a table: the file format, or the stream format, which datasets reads."""
    table = as_table(table)
    with Writer(path, table.schema, stream) as writer:
        writer.write(table)

def read(path) -> Table:
    """Map a file of either format. Only its metadata is read; batches are decoded, not copied, when touched."""
    explain = functools.partial(naming, f"{path} is not an Arrow file that can be read", *DAMAGE)
    schema = None
    dictionaries = {}
    batches = []
    with open(path, "rb") as file, explain():
        # private pages: whoever writes to an array over them gets a copy, neither a crash nor a changed file
        flags = mmap.MAP_PRIVATE | 0x4000                   # NORESERVE: the file may be larger than the memory
        memory = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        for kind, header, body in messages(file.fileno(), np.frombuffer(memory, np.uint8)):
            if kind == SCHEMA:
                schema = read_schema(header)
            elif kind == BATCH:
                batches.append(Batch(header, body, dictionaries))
            elif header.number(2, "B"):
                raise ValueError("it has a dictionary in parts (delta), which is not supported")
            else:                                           # a stream's earlier batches keep theirs
                dictionaries = dictionaries | {header.number(0, "q"): Batch(header.table(1), body, {})}
        check(schema is not None)

    def decode(k: int) -> Array:
        with explain():
            return batches[k].table(schema.type)
    return Table(schema, Lazy(decode), [0, *itertools.accumulate(batch.rows for batch in batches)])

def messages(fd: int, memory: np.ndarray):
    """(what it holds, its header, its body) of every message. In a file the footer lists them, and has the schema; in a
    stream one follows the other, to the end mark or to the end. Metadata is read and not mapped, since a page that is
    touched through a map counts, with its neighbours, as our memory."""
    size = len(memory)
    head = os.pread(fd, 6, 0)
    stream = head[:4] == END[:4]
    places = [0]
    if head == b"ARROW1":
        length, magic = struct.unpack("<i6s", os.pread(fd, 10, size - 10))
        check(magic == head and 0 < length <= size - 18)
        footer = Flat(os.pread(fd, length, size - 10 - length))
        yield SCHEMA, footer.table(1), None
        places = [block[0] for block in footer.longs(2, 3) + footer.longs(3, 3)]        # dictionaries first
    elif not stream:
        raise ValueError(f"it begins with {head!r}, as no Arrow file does")
    for at in places:                                       # a stream's next place is appended below
        if stream and (at == size or os.pread(fd, 8, at) == END):
            return
        mark, length = struct.unpack("<ii", os.pread(fd, 8, at))
        start = at + 8 + length
        check(mark == -1 and 0 < length <= size - at)
        metadata = Flat(os.pread(fd, length, at + 8))
        body = metadata.number(3, "q")
        check(0 <= body <= size - start)
        yield metadata.number(1, "B"), metadata.table(2), memory[start:start + body]
        if stream:
            places.append(start + body)

# --- demo and command line -------------------------------------------------------------------------------------------

def demo(documents: int = 5000) -> None:
    """Write, map and shuffle documents; then time each step beside pyarrow and datasets: the best of nine, in turns."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 50_000, n, dtype=np.int32) for n in rng.integers(100, 400, documents)]
    lists = Table.from_pydict({"id": np.arange(documents), "tokens": tokens})
    numbers = Table.from_pydict({"x": np.arange(500 * documents), "y": np.arange(500 * documents) / 7})
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, stream = f"{folder}/ours", f"{folder}/theirs", f"{folder}/stream"
        write(lists, stream, stream=True)
        shuffled = read(stream).shuffle(seed=0)
        row = shuffled[0]
        assert row["tokens"] == tokens[row["id"]].tolist()
        print(f"wrote, mapped and shuffled {os.path.getsize(stream) / 1e6:.1f} MB\n{shuffled!r}\n")
        try:
            import datasets
            import pyarrow as pa
            from pyarrow import feather
        except ImportError:
            return print("with pyarrow and datasets installed, a table of speeds follows")
        rows = datasets.Dataset.from_file(stream).shuffle(seed=0)
        arrays = rows.select_columns("tokens").with_format("numpy")

        def pa_write(table) -> None:
            with open(theirs, "wb") as file:
                feather.write_feather(pa.table(table), file, "uncompressed")
                file.flush()
                os.fsync(file.fileno())

        def pa_read():
            return pa.ipc.open_file(pa.memory_map(ours)).read_all()

        def beside(step: str, times: int, mine, other) -> None:
            turns = [timeit.timeit(run, number=times) for run in (mine, other) * 9]
            best = 1000 * np.reshape(turns, (9, 2)).min(0) / times
            print(f"{step:20} {best[0]:9.4f} ms   pyarrow or datasets {best[1]:9.4f} ms {best[1] / best[0]:7.1f}x")

        beside("write lists", 1, lambda: write(lists, ours), lambda: pa_write(lists))
        beside("open and read lists", 9, lambda: read(ours).combine(), pa_read)
        beside("write numbers", 1, lambda: write(numbers, ours), lambda: pa_write(numbers))
        beside("open and read numbers", 9, lambda: read(ours).combine(), pa_read)
        beside("1 shuffled row", 999, lambda: shuffled[7], lambda: rows[7])
        beside("1000 shuffled rows", 9, lambda: shuffled["tokens"][:1000].to_numpy(), lambda: arrays[:1000])

def main() -> None:
    """The demo, or the first rows of the files that are named."""
    for path in sys.argv[1:]:
        table = read(path)
        print(table, *table[:5], sep="\n")
    if len(sys.argv) == 1:
        demo()

if __name__ == "__main__":
    main()
