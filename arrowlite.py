"""arrowlite: columns without copies.

A table is a set of named columns; a column is a few flat buffers; a file is those buffers one after the other, with a
description of where each one starts. That layout is Apache Arrow's, so a file is read by mapping it into memory and
pointing at it, and pyarrow, polars, DuckDB and Hugging Face datasets read the same bytes. Nothing is parsed, nothing is
copied, and a shuffled table is the old buffers under a new list of row numbers. (Linux, 64 bits, little-endian.)

      Table          Column "tokens"               Array: one record batch's part of the column, here list<int32>
    +---------+     +---------------+             +------------------------------------------------------------+
    | tokens -+---->| rows  7 2 5 ..|             | validity   1 1 0 1         a bit a row; absent if no nulls |
    | label   |     | chunks  ------+--> batch 0  | offsets    0 3 5 5 9       row i is child[o[i] : o[i + 1]] |
    +---------+     +---------------+    batch 1  | child      11 12 13 21 22 41 42 43 44       an int32 Array |
                                         ...      +------------------------------------------------------------+
                                                      numpy views of one memory map: the file, byte for byte
Public names
    array(values, type=None)                  an Array from Python values, numpy, torch or another Arrow library
    Table.from_pydict / from_pylist / from_jsonl / from_arrow, and to_pydict / to_pylist / to_jsonl
    table[i], table[a:b], table["column"], slice, select, filter, map, shuffle, split, with_column, rename, drop, ...
    concat([tables]), read(path), write(table, path, stream=False), Writer(path, schema, stream=False)
    Type, Field, Schema                       types are named by strings: "int32", "list<utf8>", "timestamp[us, UTC]"

The file format (the default: pyarrow, feather, polars, DuckDB) ends in a footer that lists the batches; the stream
format (stream=True: datasets) is the same without the footer. `read` takes either.

    python arrowlite.py                       the demo; with --bench at full size
    python arrowlite.py schema|head FILE...   look into files
    python arrowlite.py convert IN OUT        by suffix: .jsonl, .arrows (the stream format), else the file format
"""
from __future__ import annotations

import argparse, atexit, contextlib, ctypes, functools, gc, importlib, itertools, json, mmap, multiprocessing, operator
import os, pickle, re, struct, sys, tempfile, time, timeit, uuid, warnings, zoneinfo
import datetime as dt
from bisect import bisect_left, bisect_right
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from types import NoneType

import numpy as np

# --- types: one table drives everything ------------------------------------------------------------------------------

# name: letters in the C interface, member of the Type union in a file's metadata, the numbers that it has there,
#       dtype of the first buffer, layout (Array says what the layouts are)
_TYPES = {
    "null": ("n", 1, (), None, "null"), "bool": ("b", 6, (), "?", "fixed"),
    "int8": ("c", 2, (8, 1), "i1", "fixed"), "uint8": ("C", 2, (8, 0), "u1", "fixed"),
    "int16": ("s", 2, (16, 1), "i2", "fixed"), "uint16": ("S", 2, (16, 0), "u2", "fixed"),
    "int32": ("i", 2, (32, 1), "i4", "fixed"), "uint32": ("I", 2, (32, 0), "u4", "fixed"),
    "int64": ("l", 2, (64, 1), "i8", "fixed"), "uint64": ("L", 2, (64, 0), "u8", "fixed"),
    "float16": ("e", 3, (0,), "f2", "fixed"), "float32": ("f", 3, (1,), "f4", "fixed"),
    "float64": ("g", 3, (2,), "f8", "fixed"), "fixed_size_binary": ("w:", 15, ("size",), "V", "fixed"),
    "date32": ("tdD", 8, (0,), "i4", "fixed"), "date64": ("tdm", 8, (1,), "M8[ms]", "fixed"),
    "timestamp": ("ts", 10, ("unit",), "M8", "fixed"), "duration": ("tD", 18, ("unit",), "m8", "fixed"),
    "utf8": ("u", 5, (), "i4", "bytes"), "large_utf8": ("U", 20, (), "i8", "bytes"),
    "binary": ("z", 4, (), "i4", "bytes"), "large_binary": ("Z", 19, (), "i8", "bytes"),
    "list": ("+l", 12, (), "i4", "list"), "large_list": ("+L", 21, (), "i8", "list"),
    "fixed_size_list": ("+w:", 16, ("size",), None, "fixed_list"), "struct": ("+s", 13, (), None, "struct"),
    "dictionary": ("-", -1, (), None, "dictionary"),            # has no code: its values have, its indices beside them
}
# views, whose bytes lie all over the place, are read as text in one piece
_VIEWS = {"vu": "large_utf8", 24: "large_utf8", "vz": "large_binary", 23: "large_binary"}
_UNSUPPORTED = {7: "decimal", 9: "time", 11: "interval", 14: "union", 17: "map", 22: "run_end_encoded", 25: "list_view",
                26: "large_list_view", "d:": "decimal", "tt": "time", "ti": "interval", "+u": "union", "+m": "map",
                "+r": "run_end_encoded", "+v": "list_view"}
_ALIASES = {"string": "utf8", "large_string": "large_utf8", "string_view": "large_utf8", "binary_view": "large_binary",
            "halffloat": "float16", "float": "float32", "double": "float64"}        # pyarrow's spellings
_UNITS = ("s", "ms", "us", "ns")

@dataclass(frozen=True, eq=False, repr=False)
class Type:
    """A type's name, and what that name needs. It equals its spelling: column.type == "list<int32>"."""
    name: str
    fields: tuple[Field, ...] = ()      # list: the item; struct: the members; dictionary: the values
    size: int = 0                       # fixed_size_binary: bytes; fixed_size_list: items
    unit: str = ""                      # timestamp, duration: s, ms, us or ns
    tz: str = ""                        # timestamp: the time zone to show; the stored values are UTC
    index: Type | None = None           # dictionary: the integer type of its indices
    ordered: bool = False               # dictionary: whether the order of its values means something
    id: int = 0                         # dictionary: its number in the file from which it was read
    view: bool = False                  # large_utf8, large_binary: to be made from views

    def __post_init__(self):
        layout, numbers = self.layout, _TYPES[self.name][2]
        if (layout != "struct" and len(self.fields) != (layout in ("list", "fixed_list", "dictionary"))
                or "unit" in numbers and self.unit not in _UNITS or self.size < (self.name == "fixed_size_binary")
                or layout == "dictionary" and not re.match("u?int", self.index.name if self.index else "")):
            raise ValueError(f"{self} is not a complete type; write for example list<int32>, timestamp[us, UTC], "
                             "struct<a: int64, b: utf8>, fixed_size_list<float32>[4], dictionary<int32, utf8>")

    layout = property(lambda self: _TYPES[self.name][4])
    family = property(lambda self: self.name.removeprefix("large_"))
    parts = property(lambda self: [f.type for f in self.fields] or [Type("uint8")] * (self.layout == "bytes"))
    item = property(lambda self: self.parts[0])
    stride = property(lambda self: {"struct": 1, "fixed_list": self.size}.get(self.layout, 0))     # child rows a row

    @cached_property
    def dtype(self) -> np.dtype | None:
        """Of the first buffer: values, offsets, or a dictionary's indices."""
        code = _TYPES[self.name][3]
        if code is None:
            return self.index and self.index.dtype
        return np.dtype(f"{code}[{self.unit}]" if self.unit else f"V{self.size}" if code == "V" else code)

    @cached_property
    def plain(self) -> bool:
        """Whether numpy's own `item` and `tolist` give the right Python values."""
        return self.layout == "fixed" and self.dtype.kind in "biufV" and self.name != "date32"

    @cached_property
    def text(self) -> str:
        inner = [f"{f.name}: {f.type}" if self.name == "struct" else str(f.type) for f in self.fields]
        inner = ", ".join([str(self.index), *inner] if self.index else inner)
        brackets = [str(self.size)] if self.name.startswith("fixed_size") else [x for x in (self.unit, self.tz) if x]
        return self.name + (f"<{inner}>" if inner or self.name == "struct" else "") + (
            f"[{', '.join(brackets)}]" if brackets else "")

    def __repr__(self) -> str: return self.text
    def __hash__(self) -> int: return hash(self.text)
    def __eq__(self, other) -> bool:
        with contextlib.suppress(ValueError, TypeError):
            return self.text == as_type(other).text
        return False

@dataclass(frozen=True)
class Field:
    """A column's name and type. A table's schema is a nameless Field whose struct type has the columns as members."""
    name: str
    type: Type
    nullable: bool = True
    metadata: dict[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self):
        pairs = [[x if isinstance(x, bytes) else x.encode() for x in pair] for pair in (self.metadata or {}).items()]
        if not isinstance(self.name, str):
            raise ValueError(f"a column's name must be text, not {self.name!r}")
        object.__setattr__(self, "type", as_type(self.type))
        object.__setattr__(self, "metadata", dict(pairs))

    names = property(lambda self: [f.name for f in self.type.fields])
    def __bool__(self) -> bool: return True                 # also without members
    def field(self, name: str) -> Field: return self.type.fields[self.position(name)]
    def __iter__(self): return iter(self.type.fields)
    def __len__(self) -> int: return len(self.type.fields)
    def __str__(self) -> str:
        if self.type.layout == "struct" and not self.name:          # a schema
            return "\n".join(map(str, self))
        return f"{self.name}: {self.type}{' not null' * (not self.nullable)}"

    def position(self, name: str) -> int:
        if name not in self.names:
            raise KeyError(f"no column {name!r}; there are: {', '.join(self.names) or 'none'}")
        return self.names.index(name)

def Schema(spec, metadata=None) -> Field:
    """A function, since a schema is a Field: from a schema, {name: type}, a list of fields or (name, type) pairs, or
    the schema of another Arrow library."""
    if hasattr(spec, "__arrow_c_schema__"):
        spec = _import_schema(spec)
    if not isinstance(spec, Field):
        pairs = spec.items() if isinstance(spec, dict) else spec
        spec = Field("", Type("struct", tuple(f if isinstance(f, Field) else Field(*f) for f in pairs)))
    if len(set(spec.names)) < len(spec):
        raise ValueError(f"two columns have the same name: {', '.join(spec.names)}; rename one")
    return replace(spec, metadata=metadata or spec.metadata)

def as_type(spec) -> Type:
    """From a Type, its spelling, a numpy dtype, int, float, str, bytes, bool, or a type of another Arrow library."""
    if isinstance(spec, (Type, str)):
        return spec if isinstance(spec, Type) else _parse_type(spec)
    if hasattr(spec, "__arrow_c_schema__"):
        return _import_schema(spec).type
    try:
        return _type_of_dtype(np.dtype(spec))
    except TypeError:
        raise ValueError(f"{spec!r} is no type; write for example 'int32' or 'list<utf8>'") from None

def _parse_type(text: str) -> Type:
    parts = re.fullmatch(r"\s*(\w+)\s*(?:<(.*)>)?\s*(?:\[([^]<>]*)\])?(?: not null)?\s*", text, re.S)
    name = parts and _ALIASES.get(parts[1], parts[1])
    if name not in _TYPES:
        raise ValueError(f"{text!r} is not a supported Arrow type; they are {', '.join(_TYPES)}")
    layout, numbers = _TYPES[name][4], _TYPES[name][2]
    inner = [Field(label or "item", spelling) for label, spelling in
             (re.fullmatch(r"(?:([^<>\[\]]*?): )?(.*)", part, re.S).groups() for part in _split(parts[2] or ""))]
    index = inner.pop(0).type if layout == "dictionary" and inner else None
    first, tz = [*(part.removeprefix("tz=") for part in _split(parts[3] or "")), "", ""][:2]
    size = 0 if "size" not in numbers else int(first) if first.isdigit() else -1
    unit, tz = (first, tz) if "unit" in numbers else ("", "")
    return Type(name, tuple(inner), size, unit, tz, index)

def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    depth, parts = 0, [""]
    for c in text:
        depth += (c in "<[") - (c in ">]")
        parts = [*parts, ""] if c == "," and not depth else [*parts[:-1], parts[-1] + c]
    return [part.strip() for part in parts if part.strip()]

def _type_of_dtype(dtype: np.dtype) -> Type:
    if dtype == "M8[D]":
        return Type("date32")
    if dtype.kind in "mM":
        unit = np.datetime_data(dtype)[0]
        return Type("timestamp" if dtype.kind == "M" else "duration", unit=unit if unit in _UNITS else "s")
    if dtype.kind == "V" and dtype.itemsize and dtype.fields is None:
        return Type("fixed_size_binary", size=dtype.itemsize)
    name = {"b": "bool", "U": "utf8", "S": "binary"}.get(dtype.kind, dtype.name)        # int8, float64, ...
    if name not in _TYPES:
        raise ValueError(f"numpy dtype {dtype} has no Arrow type; convert it first")
    return Type(name)

def _list_of(item: Type, name: str = "list", size: int = 0) -> Type: return Type(name, (Field("item", item),), size)

# --- arrays: numpy views that belong together ------------------------------------------------------------------------

class Bits:
    """A bitmap read like a numpy array of bools. Only what is touched is unpacked, so a mapped bitmap stays mapped."""
    __slots__ = ("bytes", "start", "length")

    def __init__(self, bytes: np.ndarray, start: int, length: int):
        self.bytes, self.start, self.length = bytes, start, length

    def __reduce__(self): return Bits, (Bits.pack(self), 0, self.length)
    def item(self, i: int) -> bool: return bool(self.bytes[(self.start + i) >> 3] >> ((self.start + i) & 7) & 1)

    def __getitem__(self, pick: slice | np.ndarray):
        if isinstance(pick, slice):
            return Bits(self.bytes, self.start + pick.start, pick.stop - pick.start)
        return (self.bytes[(pick + self.start) >> 3] >> ((pick + self.start) & 7) & 1).astype(bool)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        first, last = self.start >> 3, (self.start + self.length + 7) >> 3
        return np.unpackbits(self.bytes[first:last], bitorder="little")[self.start & 7 :][: self.length].view(bool)

    @staticmethod
    def pack(flags: Bits | np.ndarray) -> np.ndarray:
        """The bytes of a bitmap that begins with bit 0: a view if these bits begin a byte."""
        if isinstance(flags, Bits) and flags.start & 7 == 0:
            return flags.bytes[flags.start >> 3 : (flags.start + flags.length + 7) >> 3]
        return np.packbits(np.asarray(flags), bitorder="little")

class Array:
    """Rows of one type; immutable. Its offset into the buffers is that of the numpy views that it holds.

    layout       data                                 children
    fixed        values [rows], Bits for bool         -
    bytes        offsets [rows + 1]                   the bytes of all rows, as an Array of uint8
    list         offsets [rows + 1]                   the items of all rows
    fixed_list   -                                    the items [rows * size]
    struct       -                                    one a member [rows]
    dictionary   indices [rows]                       the distinct values
    """
    __slots__ = ("type", "length", "data", "children", "valid")

    def __init__(self, type: Type, length: int, data=None, children=(), valid=None):
        self.type, self.length, self.data, self.children, self.valid = type, length, data, tuple(children), valid
        if isinstance(data, np.ndarray):
            data.flags.writeable = False

    def __len__(self) -> int: return self.length
    def __iter__(self): return iter(self.to_pylist())
    def __repr__(self) -> str:
        return f"{self.type}, {self.length:,} rows: {self[:10].to_pylist()}{'...' * (self.length > 10)}"

    def __array__(self, dtype=None, copy=None): return np.array(self.to_numpy(), dtype, copy=copy)
    def __arrow_c_stream__(self, requested_schema=None): return _export(Field("", self.type), [self])
    def __reduce__(self):
        data, children = self.data, self.children
        if self.type.layout in ("bytes", "list"):           # without the items that no row uses
            data, *children = self.used()
        return Array, (self.type, self.length, data, children, self.valid)
    def combine(self) -> Array: return self                 # as a Column does, so that either can be asked

    def present(self) -> np.ndarray:
        """A flag a row, also where `valid` is None since there are no nulls."""
        return np.ones(self.length, bool) if self.valid is None else np.asarray(self.valid)

    def __getitem__(self, i):
        if not isinstance(i, slice):
            return self.at(_row(i, self.length))
        rows = range(self.length)[i]
        return self.pick(slice(rows.start, max(rows.start, rows.stop)) if rows.step == 1 else np.array(rows, np.int64))

    def pick(self, rows: slice | np.ndarray) -> Array:
        """Some of the rows. A slice(start, stop) shares every buffer; row numbers gather a dense copy."""
        sliced, data, children, n = isinstance(rows, slice), self.data, self.children, self.type.stride
        match self.type.layout:
            case "fixed" | "dictionary":
                data = data[rows]
            case "bytes" | "list" if sliced:
                data = data[rows.start : rows.stop + 1]
            case "bytes" | "list":
                starts, lengths = self.spans(rows)
                data, children = _offsets_of(lengths, self.type), [children[0].gather(starts, lengths)]
            case "struct" | "fixed_list":
                items = slice(rows.start * n, rows.stop * n) if sliced else (rows[:, None] * n + np.arange(n)).ravel()
                children = [child.pick(items) for child in children]
        length = rows.stop - rows.start if sliced else len(rows)
        return Array(self.type, length, data, children, None if self.valid is None else self.valid[rows])

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows of a list or bytes array start in the child, and their lengths."""
        starts, stops = self.data[rows].astype(np.int64), self.data[rows + 1].astype(np.int64)
        size = len(self.children[0])
        _check(self.type, len(rows) == 0 or starts.min() >= 0 and stops.max() <= size and (starts <= stops).all())
        return starts, stops - starts

    def used(self) -> tuple[np.ndarray, Array]:
        """A list's offsets [rows + 1], moved to start at 0, and the part of the child that they cover."""
        if self.type.layout == "fixed_list":
            return np.arange(self.length + 1) * self.type.size, self.children[0]
        _check(self.type, not (self.data[1:] < self.data[:-1]).any())
        span = self.span()
        return self.data - span.start if span.start else self.data, self.children[0].pick(span)

    def span(self) -> slice:
        """From where to where these rows of a list or bytes array have their items in the child."""
        start, stop = int(self.data[0]), int(self.data[-1])
        _check(self.type, 0 <= start <= stop <= len(self.children[0]))
        return slice(start, stop)

    def codes(self) -> np.ndarray:
        """A dictionary's indices; those of null rows may be anything, and become 0."""
        codes = self.data if self.valid is None else np.where(self.valid, self.data, self.data.dtype.type(0))
        _check(self.type, self.null_count == self.length or codes.min() >= 0 and codes.max() < len(self.children[0]))
        return codes.astype(np.int64)

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> Array:
        """Rows start : start + length of every span, joined. Long spans are copied span by span, because an index
        array costs 8 bytes and some 5 ns an item; short ones are not worth a Python step each."""
        total, data = int(lengths.sum()), self.data
        flat = self.type.layout == "fixed" and isinstance(data, np.ndarray) and self.valid is None
        if flat and total > 48 * len(lengths):
            spans = zip(starts.tolist(), (starts + lengths).tolist())
            return Array(self.type, total, np.concatenate([data[a:b] for a, b in spans]))
        shift = starts - (np.cumsum(lengths) - lengths)     # from a row's number in the result to its number here
        return self.pick(np.repeat(shift, lengths) + np.arange(total))

    @property
    def null_count(self) -> int:
        if self.valid is None:
            return self.length if self.type.name == "null" else 0
        return self.length - int(np.count_nonzero(self.valid))

    @property
    def nbytes(self) -> int:
        """Bytes that these rows take in a file, without padding."""
        bits, is_bool, children = (self.length + 7) // 8, self.type.name == "bool", self.children
        own = bits * ((self.valid is not None) + is_bool) + (0 if is_bool or self.data is None else self.data.nbytes)
        if self.type.layout in ("bytes", "list"):
            children = [children[0].pick(self.span())]
        return own + sum(child.nbytes for child in children)

    def at(self, i: int):
        """One row as a Python value. What training reads row by row has a short way, the rest that of to_pylist."""
        layout = self.type.layout
        if self.valid is not None and not self.valid.item(i):
            return None
        if self.type.plain:
            return self.data.item(i)
        if layout == "struct":
            return {f.name: child.at(i) for f, child in zip(self.type.fields, self.children)}
        child = (self.children or (None,))[0]
        if layout in ("bytes", "list") and child.type.plain and child.valid is None and child.type.name != "bool":
            start, stop = self.data.item(i), self.data.item(i + 1)
            _check(self.type, 0 <= start <= stop <= len(child))
            items = child.data[start:stop]
            if layout == "list":
                return items.tolist()
            return str(items, "utf8") if self.type.family == "utf8" else items.tobytes()
        return self.pick(slice(i, i + 1)).to_pylist()[0]

    def to_pylist(self) -> list:
        match self.type.layout:
            case "null":
                out = [None] * self.length
            case "fixed":
                values = np.asarray(self.data)
                out = _as_objects(values).tolist() if self.type.plain else _python_times(self.type, values)
            case "bytes":
                offsets, child = self.used()
                ends, items, text = offsets.tolist(), child.data.tobytes(), self.type.family == "utf8"
                if text and items.isascii():                # one decoding for all rows, then cuts
                    items, text = items.decode(), False
                out = [items[a:b] for a, b in zip(ends, ends[1:])]
                if text:                                    # a null's bytes need not be text
                    out = [row.decode() if ok else None for row, ok in zip(out, self.present().tolist())]
            case "list" | "fixed_list":
                offsets, items = self.used()
                spans = itertools.pairwise(offsets.tolist())
                if items.type.plain and items.valid is None:
                    objects = _as_objects(np.asarray(items.data))
                    out = [objects[a:b].tolist() for a, b in spans]
                else:
                    objects = items.to_pylist()
                    out = [objects[a:b] for a, b in spans]
            case "struct":
                names, members = [f.name for f in self.type.fields], [child.to_pylist() for child in self.children]
                out = [dict(zip(names, row)) for row in zip(*members)] if names else [{} for _ in range(self.length)]
            case "dictionary":
                values = self.values.to_pylist() or [None]
                out = [values[code] for code in self.codes().tolist()]
        return out if self.valid is None else [row if ok else None for row, ok in zip(out, self.present().tolist())]

    def to_numpy(self) -> np.ndarray:
        """Numbers and times without nulls: the buffer itself. With nulls: a copy, integers as float64 with NaN (as in
        pyarrow), times with NaT. fixed_size_list: [rows, size]. Text, lists, structs: an array of Python objects."""
        layout, child, nulls = self.type.layout, (self.children or (None,))[0], self.null_count
        if layout == "fixed":
            values = self.data.astype("M8[D]") if self.type.name == "date32" else np.asarray(self.data)
            if not nulls:
                return values
            if values.dtype.kind in "iufmM":
                values = values.astype("f8") if values.dtype.kind in "iu" else values.copy()
                values[~self.present()] = np.nan if values.dtype.kind == "f" else "NaT"
                return values
        if layout == "dictionary" and not nulls and self.length:
            return child.to_numpy()[self.codes()]
        if layout == "fixed_list" and not nulls:
            return child.to_numpy().reshape(self.length, self.type.size, *child.to_numpy().shape[1:])
        if layout == "list" and child.type.plain and child.valid is None:
            ends, items = self.used()
            rows = [np.asarray(items.data)[a:b] for a, b in itertools.pairwise(ends.tolist())]
            rows = rows if not nulls else [row if ok else None for row, ok in zip(rows, self.present().tolist())]
        else:
            rows = self.to_pylist()
        return np.fromiter(rows, object, self.length)

    def to_torch(self):
        """A tensor over the same memory, or a list of tensors for a list column. The pages of a mapped file are
        private: writing to a tensor neither changes the file nor crashes."""
        import torch
        values = self.to_numpy()
        ragged = self.type.layout == "list" and all(getattr(v, "dtype", np.dtype("V1")).kind in "biuf" for v in values)
        if not ragged and values.dtype.kind not in "biuf":
            nulls = " with nulls" * bool(self.null_count)
            raise ValueError(f"torch has no tensor for {self.type}{nulls}; use to_numpy() or to_pylist()")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not writable.*")
            return [torch.from_numpy(v) for v in values] if ragged else torch.from_numpy(values)

    @property
    def values(self) -> Array:
        """A list's items, those of all rows in the buffer (as in pyarrow), or a dictionary's values; not copied."""
        return self._only("list", "fixed_list", "dictionary").children[0]

    @property
    def offsets(self) -> Array:
        """Where each row of a list starts in `values`, rows + 1 numbers, not copied."""
        return _from_numpy(self._only("list").data)

    def field(self, name: str) -> Array:
        """A struct's member, not copied."""
        return self._only("struct").children[Field("", self.type).position(name)]

    def _only(self, *layouts: str) -> Array:
        if self.type.layout not in layouts:
            raise ValueError(f"{self.type} has no such part; that is for {' and '.join(layouts)}")
        return self

def _check(kind: Type, fine: bool) -> None:
    """A file may hold anything: a bad offset or index would lead to foreign bytes."""
    if not fine:
        raise ValueError(f"a column of {kind} points outside of its data; the file is damaged")

def _row(i: int, n: int) -> int:
    if not -n <= (i := operator.index(i)) < n:
        raise IndexError(f"row {i} of {n:,} rows")
    return i % n

def _offsets_of(lengths: np.ndarray, kind: Type) -> np.ndarray:
    """lengths [rows] -> offsets [rows + 1], refusing more than 32 bits can count."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > np.iinfo(kind.dtype).max:
        raise ValueError(f"{offsets[-1]:,} bytes or items are too many for a {kind.name} array; use large_{kind.name}")
    return offsets.astype(kind.dtype, copy=False)

def _as_objects(values: np.ndarray) -> np.ndarray:
    """Many numbers as small as token ids become Python ints by look-up, 2x as fast as making them one by one."""
    if len(values) < 5000 or values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= 1 << 18:
        return values
    return _small_numbers().take(values, mode="clip")     # checked above: no need to check again

@functools.cache
def _small_numbers() -> np.ndarray: return np.arange(1 << 18).astype(object)

def _python_times(kind: Type, values: np.ndarray) -> list:
    """date, datetime, timedelta where they hold the value exactly, else numpy's scalar (nanoseconds, far years)."""
    if kind.unit == "ns":
        return list(values)
    values = values.astype("M8[D]") if kind.name.startswith("date") else values
    out = [values[i] if isinstance(value, int) else value for i, value in enumerate(values.tolist())]
    if not kind.tz:
        return out
    try:
        fixed = kind.tz[0] in "+-"
        zone = dt.datetime.strptime(kind.tz, "%z").tzinfo if fixed else zoneinfo.ZoneInfo(kind.tz)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        zone = dt.timezone.utc              # a zone that this machine does not know: the instant is exact all the same

    def show(utc: dt.datetime) -> dt.datetime:      # astimezone overflows within a day of datetime's ends
        utc = utc.replace(tzinfo=dt.timezone.utc)
        return utc.astimezone(zone) if 1 < utc.year < 9999 else utc
    return [show(value) if isinstance(value, dt.datetime) else value for value in out]

# --- from Python values to arrays ------------------------------------------------------------------------------------

def array(values, type=None) -> Array:
    """From Python values (None is null), a numpy array or torch tensor, or another Arrow library's array."""
    if isinstance(values, (Array, Column)):
        built = values.combine()
    elif hasattr(values, "__arrow_c_stream__") or hasattr(values, "__arrow_c_array__"):
        built = Column(*_import(values)).combine()
    elif hasattr(values, "__array__"):
        built = _from_numpy(_as_numpy(values))
    elif isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
        raise ValueError(f"a column takes a list of values, not {values!r:.40}")
    else:
        built = _build(list(values))
    return built if type is None else _cast(built, as_type(type))

def _as_numpy(values) -> np.ndarray:
    try:
        return np.asanyarray(values)
    except (TypeError, RuntimeError) as error:                      # a torch tensor that numpy cannot hold
        raise ValueError(f"{error}; convert it first") from None

# Python's types by family, in the order in which they are tried: a bool is an int to Python, a timedelta64 one to numpy
_FAMILIES = {"bool": (bool, np.bool_), "duration": (dt.timedelta, np.timedelta64), "int": (int, np.integer),
             "float": (float, np.floating), "utf8": str, "binary": (bytes, bytearray), "struct": dict,
             "timestamp": (dt.datetime, np.datetime64), "date": dt.date, "list": (list, tuple, np.ndarray)}

def _build(values: list) -> Array:
    """Python values as an array of the type that is natural for them; any other type is a cast away."""
    kinds, n = set(map(type, values)) - {NoneType}, len(values)
    if tensors := tuple(k for k in kinds if hasattr(k, "__array__") and not issubclass(k, (np.ndarray, np.generic))):
        return _build([_as_numpy(v)[()] if isinstance(v, tensors) else v for v in values])      # [()]: a lone number
    families = {next((name for name, types in _FAMILIES.items() if issubclass(kind, types)), kind.__name__)
                for kind in kinds}
    families = {"float"} if families == {"int", "float"} else families
    if len(families) > 1 or families - set(_FAMILIES):
        raise ValueError(f"a column cannot hold {' and '.join(sorted(families))} values; convert them first")
    if not families:
        return Array(Type("null"), n)
    family = families.pop()
    if family in ("timestamp", "duration") and any(v != v for v in values):             # NaT: numpy's null
        return _build([v if v == v else None for v in values])
    present = np.fromiter((v is not None for v in values), bool, n)
    where, valid = (slice(None), None) if present.all() else (present, present)
    some = values if valid is None else [v for v in values if v is not None]
    if family == "struct":
        names = dict.fromkeys(itertools.chain.from_iterable(some))
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"the names of a struct must be text: {list(names)[:5]}")
        members = {name: _build([None if v is None else v.get(name) for v in values]) for name in names}
        kind = Type("struct", tuple(Field(name, member.type) for name, member in members.items()))
        return Array(kind, n, None, members.values(), valid)
    if family in ("list", "utf8", "binary"):
        if family != "list":
            some = [v.encode() for v in some] if family == "utf8" else some
            child = _from_numpy(np.frombuffer(b"".join(some), np.uint8))
        elif all(isinstance(v, np.ndarray) for v in some) and len({v.dtype for v in some}) == 1:
            child = _from_numpy(np.concatenate(some))
        else:
            child = _build(list(itertools.chain.from_iterable(some)))
        lengths = np.zeros(n, np.int64)
        lengths[where] = np.fromiter(map(len, some), np.int64, len(some))
        name = "large_" * (len(child) >= 2**31) + family
        kind = _list_of(child.type, name) if family == "list" else Type(name)
        return Array(kind, n, _offsets_of(lengths, kind), [child], valid)
    kind, dense = _scalars(family, some)
    data = np.zeros(n, dense.dtype)
    data[where] = dense
    return Array(kind, n, data, (), valid)

def _scalars(family: str, values: list) -> tuple[Type, np.ndarray]:
    if family in ("timestamp", "date", "duration"):
        zones = {_zone_name(v) for v in values}
        if "" in zones and len(zones) > 1:
            raise ValueError("some times of a column have a time zone and others have none; decide on one")
        values = [v.astimezone(dt.timezone.utc).replace(tzinfo=None) for v in values] if zones != {""} else values
        try:
            dense = np.array(values, "m8" if family == "duration" else "M8")
        except (TypeError, OverflowError):                  # months and days; years and attoseconds
            raise ValueError(f"the times {values[0]} and others have no common unit; convert them first") from None
        python = dense.astype(f"{dense.dtype.kind}8[us]").tolist() if family != "date" else values
        for v, exact, same in zip(values, dense, python):           # numpy wraps around; 64 bits hold any date
            if v != (exact.astype(v.dtype) if isinstance(v, np.generic) else same):
                raise ValueError(f"the time {v} does not fit in 64 bits of {np.datetime_data(dense.dtype)[0]}")
        times = _from_numpy(dense)
        return replace(times.type, tz=zones.pop() if len(zones) == 1 else "UTC"), times.data
    dense = np.array(values)
    if family == "int" and dense.dtype.kind not in "iu":    # numpy's answer to 2**63 beside 1, and to what is larger
        values = [int(v) for v in values]
        low, high = min(values), max(values)
        if low < -(2**63) or high >= (2**64 if low >= 0 else 2**63):
            raise ValueError(f"the integers from {low} to {high} do not fit in 64 bits; store them as text")
        dense = np.array(values, "u8" if high >= 2**63 else "i8")
    if dense.dtype.kind == "f" and any(isinstance(v, (int, np.integer)) and abs(int(v)) > 2**53 for v in values):
        raise ValueError("a column of floats has an integer beyond 2**53, which no float holds exactly")
    return _type_of_dtype(dense.dtype), dense

def _zone_name(value) -> str:
    zone = getattr(value, "tzinfo", None)
    if zone is None or zone == dt.timezone.utc:
        return "UTC" if zone else ""
    return getattr(zone, "key", None) or f"{value:%z}"[:3] + ":" + f"{value:%z}"[3:5]

def _from_numpy(a: np.ndarray) -> Array:
    """A view where numpy and Arrow agree. A further axis becomes a fixed_size_list, NaT becomes null."""
    if a.ndim == 0:
        raise ValueError("a column needs at least one axis; this is a single number")
    if a.ndim > 1:
        items = _from_numpy(a.reshape(-1, *a.shape[2:]))
        return Array(_list_of(items.type, "fixed_size_list", a.shape[1]), len(a), None, [items])
    if a.dtype.kind in "OUS" or isinstance(a, np.ma.MaskedArray):
        return _build(a.tolist())
    valid = ~np.isnat(a) if a.dtype.kind in "mM" and np.isnat(a).any() else None
    kind = _type_of_dtype(a.dtype)
    if a.dtype.kind in "mM" and a.dtype != kind.dtype:      # numpy's units go from years to attoseconds, and days
        a = _exact(a, kind, kind, True if valid is None else valid)
    return Array(kind, len(a), np.ascontiguousarray(a.astype(kind.dtype, copy=False)).view(), (), valid)

# --- one type for all parts: unify, cast, concatenate ----------------------------------------------------------------

def unify(a: Type, b: Type) -> Type:
    """The narrowest type that holds the values of both without loss."""
    if "null" in (a.name, b.name) or a == b and a.name != "struct":
        return b if a.name == "null" else a
    if "dictionary" in (a.name, b.name):
        return unify(*(t.item if t.name == "dictionary" else t for t in (a, b)))
    layouts = {a.layout, b.layout}
    if a.plain and b.plain and {a.dtype.kind, b.dtype.kind} <= set("iuf"):
        common = np.promote_types(a.dtype, b.dtype)
        rounds = common.kind == "f" and "f" not in (a.dtype.kind, b.dtype.kind)         # int64 beside uint64
        return Type("uint64") if rounds else _type_of_dtype(common)         # the cast refuses a negative value
    elif a.unit and (a.name, a.tz) == (b.name, b.tz):
        return max(a, b, key=lambda t: _UNITS.index(t.unit))
    elif layouts == {"bytes"} and a.family == b.family:
        return Type(f"large_{a.family}")
    elif layouts <= {"list", "fixed_list"}:
        if (a.name, a.size) == (b.name, b.size):
            return _list_of(unify(a.item, b.item), a.name, a.size)
        return _list_of(unify(a.item, b.item), "large_list" if "large_list" in (a.name, b.name) else "list")
    elif layouts == {"struct"}:
        mine, theirs = ({f.name: f for f in t.fields} for t in (a, b))
        members = theirs | mine
        for name, f in members.items():
            with _naming(f"column {name!r}: "):
                kind = unify(f.type, theirs.get(name, f).type)
            strict = all(name in part and not part[name].nullable for part in (mine, theirs))
            members[name] = replace(f, type=kind, nullable=not strict)              # where it is missing it is null
        return Type("struct", tuple(members[name] for name in mine | theirs))
    raise ValueError(f"{a} and {b} have no common type; make them alike first")

@contextlib.contextmanager
def _naming(where: str, damage: tuple = ()):
    """Say in a ValueError where it arose. Errors that only damage can cause become one, too."""
    try:
        yield
    except (ValueError, *damage) as error:
        raise ValueError(f"{where}{'its metadata is damaged' if isinstance(error, damage) else error}") from None

def _nulls(kind: Type, n: int) -> Array:
    """n nulls of a type; with n = 0 its empty array."""
    data = None if kind.dtype is None else np.zeros(n + (kind.layout in ("bytes", "list")), kind.dtype)
    valid = np.zeros(n, bool) if n and kind.name != "null" else None
    return Array(kind, n, data, [_nulls(part, n * kind.stride) for part in kind.parts], valid)

def _cast(a: Array, to: Type) -> Array:
    """The same values as another type; a ValueError where one would change."""
    source, data, children, present = a.type, None, [], a.present()
    match source.layout, to.layout:
        case _ if source == to:
            return a
        case "null", _:
            return _nulls(to, len(a))
        case "dictionary", "dictionary" if source.item == to.item:
            data, children = _exact(a.codes(), Type("int64"), to.index, present), a.children
        case "dictionary", _:
            plain = a.values.pick(a.codes()) if len(a.values) else _nulls(source.item, len(a))
            return _cast(Array(plain.type, len(a), plain.data, plain.children, present & plain.present()), to)
        case _, "dictionary":
            items, code_of = _cast(a, to.item), {}
            codes = [code_of.setdefault(value, len(code_of)) for value in map(repr, items.to_pylist())]
            firsts = np.unique(np.array(codes, np.int64), return_index=True)[1]
            if len(firsts) > np.iinfo(to.dtype).max:
                raise ValueError(f"{len(firsts):,} distinct values are too many for {to}; use a wider index")
            data, children = np.array(codes, to.dtype), [items.pick(firsts)]
        case "fixed", "fixed":
            data = _exact(np.asarray(a.data), source, to, present)
        case ("list" | "fixed_list", "list") | ("bytes", "bytes") if to.layout == "list" or source.family == to.family:
            offsets, items = a.used()
            data, children = _offsets_of(np.diff(offsets), to), [_cast(items, to.item)]
        case "fixed_list", "fixed_list" if source.size == to.size:
            children = [_cast(a.children[0], to.item)]
        case ("list" | "fixed_list", "fixed_list") | ("bytes", "fixed") if to.layout == "fixed_list" or (
                source.family == "binary" and to.name == "fixed_size_binary"):
            offsets, items = a.used()
            lengths = np.diff(offsets)[present]
            if (lengths != to.size).any():
                raise ValueError(f"a row of {lengths[lengths != to.size][0]} is no {to}")
            rows = np.where(present, offsets[:-1], 0)[:, None] + np.arange(to.size)     # a null row takes any items
            items = items.pick(rows.clip(max=len(items) - 1).ravel()) if len(items) else _nulls(items.type, rows.size)
            data = items.data.view(to.dtype) if to.layout == "fixed" else None
            children = [] if to.layout == "fixed" else [_cast(items, to.item)]
        case "struct", "struct":
            mine = dict(zip((f.name for f in source.fields), a.children))
            if extra := [name for name in mine if name not in (f.name for f in to.fields)]:
                raise ValueError(f"there is no place for {extra[0]!r} in {', '.join(f.name for f in to.fields)}")
            for f in to.fields:
                with _naming(f"column {f.name!r}: "):
                    children.append(_cast(mine.get(f.name, Array(Type("null"), len(a))), f.type))
        case _:
            raise ValueError(f"{source} cannot become {to}")
    return Array(to, len(a), data, children, a.valid)

def _exact(values: np.ndarray, source: Type, to: Type, present) -> np.ndarray:
    """Numbers and times as the dtype of a type; only floats may be rounded, to other floats."""
    values = values.astype("M8[D]") if source.name == "date32" else values
    dtype = np.dtype("M8[D]") if to.name.startswith("date") else to.dtype       # stored as int32 or as milliseconds
    kinds = values.dtype.kind + dtype.kind
    if kinds not in ("MM", "mm", "iM", "im") and not set(kinds) <= set("iuf"):
        raise ValueError(f"{source} cannot become {to}")
    with np.errstate(all="ignore"):
        stored = values.astype(dtype).astype(to.dtype, copy=False)
        out = stored.astype(dtype, copy=False)
        changed = out.astype(values.dtype) != values
        changed &= np.isinf(out) if kinds == "ff" else True         # rounded is fine, lost is not
        changed |= ((values < 0) != (out < 0)) if kinds in ("iu", "ui") else False      # -1 there and back is -1 again
    if (changed := changed & present).any():
        raise ValueError(f"{values[changed][0]} is no {to}: it does not fit")
    return stored

def _concat(kind: Type, arrays: list[Array]) -> Array:
    if len(arrays) < 2:
        return arrays[0] if arrays else _nulls(kind, 0)
    data, children = None, ()
    match kind.layout:
        case "fixed":
            data = np.concatenate([np.asarray(a.data) for a in arrays])
        case "dictionary" if len({id(a.values) for a in arrays}) == 1:
            data, children = np.concatenate([a.data for a in arrays]), arrays[0].children
        case "dictionary":                                          # each distinct value of all of them once
            values = {id(a.values): a.values for a in arrays}
            starts = dict(zip(values, itertools.accumulate(map(len, values.values()), initial=0)))
            both = _cast(_concat(kind.item, list(values.values())), kind)
            moves = np.append(both.data, np.zeros(1, kind.dtype))   # nulls alone may have no value to point at
            data = np.concatenate([moves[a.codes() + starts[id(a.values)]] for a in arrays])
            children = both.children
        case "bytes" | "list":
            parts = [a.used() for a in arrays]
            data = _offsets_of(np.concatenate([np.diff(offsets) for offsets, _ in parts]), kind)
            children = [_concat(kind.item, [child for _, child in parts])]
        case "struct" | "fixed_list":
            children = [_concat(part, [a.children[k] for a in arrays]) for k, part in enumerate(kind.parts)]
    valid = np.concatenate([a.present() for a in arrays]) if any(a.valid is not None for a in arrays) else None
    return Array(kind, sum(map(len, arrays)), data, children, valid)

# --- columns: chunks of rows, seen through a list of row numbers -----------------------------------------------------

class Lazy:
    """A list of n items, each made when it is first asked for."""
    def __init__(self, n: int, make): self.n, self.make = n, functools.cache(make)
    def __len__(self) -> int: return self.n
    def __getitem__(self, i: int): return self.make(i)
    def __iter__(self): return map(self.make, range(self.n))        # not by __getitem__, to which IndexError is the end

class Column:
    """Rows of one type. Its chunks, laid end to end, number their rows; `rows` (a range, or an array after a shuffle)
    says which of those are its own, in which order. Selecting changes `rows`, the chunks stay where they are."""

    def __init__(self, schema: Field, chunks, lengths=None, rows=None):
        self.schema, self.chunks = schema, chunks
        self.starts = list(itertools.accumulate(map(len, chunks) if lengths is None else lengths, initial=0))
        self.rows = range(self.starts[-1]) if rows is None else rows

    type = property(lambda self: self.schema.type)
    lengths = property(lambda self: np.diff(self.starts).tolist())
    null_count = property(lambda self: sum(a.null_count for a in self.pieces()[0]))
    def __len__(self) -> int: return len(self.rows)
    def __repr__(self) -> str: return repr(self[:10].combine())
    def __array__(self, dtype=None, copy=None): return np.array(self.to_numpy(), dtype, copy=copy)
    def __arrow_c_stream__(self, requested_schema=None): return _export(self.schema, self.batches())
    def __reduce__(self): return type(self), (self.schema, list(self.batches()))

    def __getattr__(self, name: str):
        """What else there is to read (to_numpy, to_torch, values, ...) is read from the rows as one array."""
        if name.startswith("_") or not hasattr(Array, name):
            raise AttributeError(f"a {type(self).__name__} has no {name!r}")
        return getattr(self.combine(), name)

    def __getitem__(self, i):
        """A row as a Python value (of a table: a dict), a slice as a column or table, a member of structs by name."""
        if isinstance(i, slice):
            return self.select(range(len(self))[i])
        if isinstance(i, str) and self.type.layout == "struct":
            k = self.schema.position(i)
            return self._over(Column, self.schema.field(i), lambda a: a.children[k])
        row = int(self.rows[_row(i, len(self))])
        chunk = bisect_right(self.starts, row) - 1
        return self.chunks[chunk].at(row - self.starts[chunk])

    def __iter__(self):
        for start in range(0, len(self), 1000):
            yield from self[start : start + 1000].to_pylist()

    def pieces(self) -> tuple[list[Array], np.ndarray | None]:
        """These rows chunk by chunk, and the order that puts them right (None: they are)."""
        if isinstance(self.rows, range):
            first, last, starts = self.rows.start, self.rows.stop, self.starts
            touched = range(bisect_right(starts, first) - 1, bisect_left(starts, last))
            spans = {k: slice(max(first, starts[k]) - starts[k], min(last, starts[k + 1]) - starts[k]) for k in touched}
            return [self.chunks[k].pick(span) for k, span in spans.items() if span.start < span.stop], None
        owner = np.searchsorted(self.starts, self.rows, "right") - 1
        sort = np.argsort(owner, kind="stable")
        rows, owner = self.rows[sort], owner[sort]
        cuts = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(rows)] if len(rows) else []
        arrays = [self.chunks[k].pick(rows[a:b] - self.starts[k])
                  for a, b in itertools.pairwise(cuts) for k in owner[a : a + 1].tolist()]
        return arrays, np.argsort(sort) if len(arrays) > 1 else None

    def combine(self) -> Array:
        """These rows as one array: a view if they are a stretch of one chunk."""
        arrays, order = self.pieces()
        joined = _concat(self.type, arrays)
        return joined if order is None else joined.pick(order)

    def to_pylist(self) -> list:
        arrays, order = self.pieces()
        values = list(itertools.chain.from_iterable(a.to_pylist() for a in arrays))
        return values if order is None else [values[i] for i in order.tolist()]

    @property
    def nbytes(self) -> int:
        if isinstance(self.rows, range):
            return sum(a.nbytes for a in self.pieces()[0])
        return sum(a.nbytes for a in self.chunks) * len(self) // max(1, self.starts[-1])    # their share: none is read

    def batches(self):
        """The rows as arrays, one after the other: as the chunks lie, or gathered by 64 MB after a shuffle."""
        step = max(1, (64 << 20) * len(self) // (self.nbytes + 48 * len(self) + 1))     # 48: of row numbers, see pieces
        gathered = (self[start : start + step].combine() for start in range(0, len(self), step))
        yield from self.pieces()[0] if isinstance(self.rows, range) else gathered

    def cast(self, kind) -> Column:
        """The same values as another type; a ValueError if one would change."""
        kind = as_type(kind)
        return self._over(type(self), replace(self.schema, type=kind), lambda a: _cast(a, kind))

    def _over(self, form: type, schema: Field, change) -> Column:
        """The same rows of other chunks: what `change` makes of each of these when it is first touched."""
        return form(schema, Lazy(len(self.chunks), lambda k: change(self.chunks[k])), self.lengths, self.rows)

    def slice(self, offset: int = 0, length: int | None = None) -> Column:
        if offset < 0 or (length or 0) < 0:
            raise ValueError(f"slice({offset}, {length}): offset and length must not be negative")
        return self[offset : None if length is None else offset + length]

    def select(self, indices) -> Column:
        """The rows of these numbers, in this order; negative ones count from the end."""
        n, mine = len(self), self.rows
        if isinstance(indices, range) and indices.step == 1 and 0 <= indices.start and indices.stop <= n:
            rows = mine[indices.start : max(indices.start, indices.stop)]
        else:
            picks = np.asarray(indices if hasattr(indices, "__array__") else list(indices))
            if picks.size and (picks.dtype.kind not in "iu" or picks.ndim != 1):
                raise ValueError(f"select takes row numbers, not {picks.dtype}; for a mask there is filter")
            for bad in picks[(picks < -n) | (picks >= n)][:1].tolist():     # of any integer type: 2**64 - 1 is not -1
                raise IndexError(f"row {bad} of {n:,} rows")
            picks = picks.astype(np.int64)
            picks = np.where(picks < 0, picks + n, picks)
            rows = picks + mine.start if isinstance(mine, range) else mine[picks]
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__, rows=rows)
        return view

    def filter(self, keep) -> Column:
        """The rows for which a function, or a mask of bools (null is no), says yes."""
        mask = array([bool(keep(row)) for row in self] if callable(keep) else keep)
        if len(mask) != len(self) or mask.type not in ("bool", "null"):
            raise ValueError(f"a mask of {len(mask):,} {mask.type} for {len(self):,} rows; it must be a bool a row")
        return self.select(np.flatnonzero(np.asarray(_cast(mask, Type("bool")).data) & mask.present()))

    def shuffle(self, seed: int | None = None) -> Column:
        return self.select(np.random.default_rng(seed).permutation(len(self)))

    def split(self, test_size: float | int, seed: int | None = None) -> tuple[Column, Column]:
        """(train, test) of the shuffled rows; test_size is a share (float) or a number of rows (int)."""
        count = isinstance(test_size, (int, np.integer))
        rows = test_size if count else round(test_size * len(self)) if 0 <= test_size <= 1 else -1
        if not 0 <= rows <= len(self):
            raise ValueError(f"a test set of {test_size} cannot be taken from {len(self):,} rows")
        shuffled = self.shuffle(seed)
        return shuffled[rows:], shuffled[:rows]

# --- tables: a table is a column of structs --------------------------------------------------------------------------

class Table(Column):
    """Named columns of equal length. Every method gives a new table and leaves this one as it is."""
    num_rows = property(Column.__len__)
    num_columns = property(lambda self: len(self.schema))
    column_names = property(lambda self: self.schema.names)
    def __repr__(self) -> str: return f"Table of {self.num_rows:,} rows\n{self.schema}"

    @classmethod
    def from_pydict(cls, columns: dict, schema=None) -> Table:
        schema = None if schema is None else Schema(schema)
        if not isinstance(columns, dict):
            raise ValueError(f"from_pydict takes a dict of columns, not a {type(columns).__name__}")
        if schema and set(schema.names) != set(columns):
            raise ValueError(f"the columns are {', '.join(columns)}, those of the schema {', '.join(schema.names)}")
        arrays = {}
        for name in schema.names if schema else columns:
            with _naming(f"column {name!r}: "):
                arrays[name] = array(columns[name], schema and schema.field(name).type)
        lengths = {name: len(a) for name, a in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different lengths: {lengths}")
        schema = schema or Schema({name: a.type for name, a in arrays.items()})
        return cls(schema, [Array(schema.type, max(lengths.values(), default=0), None, arrays.values())])._strict()

    def _strict(self) -> Table:
        """This table, if no column has nulls that may not."""
        for f in self.schema:                           # rows are gathered, to be counted, only if a chunk has any
            if not f.nullable and any(a.null_count for a in self[f.name].chunks) and self[f.name].null_count:
                raise ValueError(f"column {f.name!r} has nulls, which its schema forbids")
        return self

    def cast(self, kind) -> Table: return super().cast(kind)._strict()

    @classmethod
    def from_pylist(cls, rows: list[dict], schema=None) -> Table:
        """A name that a row lacks is null there."""
        rows = list(rows)
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"row {i} is a {type(row).__name__}; rows must be dicts")
        found = dict.fromkeys(itertools.chain.from_iterable(rows))
        names = found if schema is None else Schema(schema).names
        if extra := [name for name in found if name not in names]:
            raise ValueError(f"column {extra[0]!r} is not in the schema: {', '.join(names)}")
        if not names:
            return cls(Schema([]), [Array(Type("struct"), len(rows))])
        return cls.from_pydict({name: [row.get(name) for row in rows] for name in names}, schema)

    @classmethod
    def from_arrow(cls, source) -> Table:
        """From pyarrow, polars, DuckDB, pandas or whatever else speaks the Arrow C interface, over the same memory."""
        schema, arrays = _import(source)
        if schema.type.name != "struct":
            raise ValueError(f"this is a column of {schema.type}, not a table; use array()")
        return cls(Schema(schema), arrays)

    @classmethod
    def from_jsonl(cls, path, schema=None) -> Table:
        """One JSON object a line. What goes beyond 64 MB is kept in a temporary file, not in memory."""
        def parts():
            kind, n = Type("struct"), 0
            with open(path, "rb") as file:
                while lines := file.readlines(8 << 20):
                    rows = {i: _json_row(path, i, line) for i, line in enumerate(lines, n + 1) if line.strip()}
                    n += len(lines)
                    try:
                        part = cls.from_pylist(list(rows.values()), schema)
                        kind = unify(kind, part.type)
                    except ValueError:                              # once more, row by row, to say which it was
                        for i, row in rows.items():
                            with _naming(f"{path}, line {i}: "):
                                kind = unify(kind, cls.from_pylist([row], schema).type)
                        with _naming(f"{path}, lines {min(rows)} to {max(rows)}: "):
                            raise                                   # no row alone, but all together
                    yield part
        return _gathered(parts(), schema)

    def to_pydict(self) -> dict[str, list]: return {name: self[name].to_pylist() for name in self.schema.names}
    def to_jsonl(self, path) -> None:
        with _atomic(path) as file:
            for i, row in enumerate(self):
                with _naming(f"row {i}: "):
                    file.write(json.dumps(row, ensure_ascii=False, default=_json_value).encode() + b"\n")

    def _members(self, names: dict[str, str]) -> Table:
        """The columns of these names, {here: in the new table}."""
        places = [self.schema.position(name) for name in names]
        fields = [replace(self.schema.type.fields[place], name=new) for place, new in zip(places, names.values())]
        schema = Schema(fields, self.schema.metadata)
        return self._over(Table, schema, lambda a: Array(schema.type, len(a), None, [a.children[p] for p in places]))

    def select_columns(self, *names: str | list[str]) -> Table:
        return self._members({name: name for part in names for name in ([part] if isinstance(part, str) else part)})

    def drop(self, *names: str | list[str]) -> Table:
        gone = self.select_columns(*names).schema.names
        return self.select_columns([name for name in self.schema.names if name not in gone])

    def rename(self, names: dict[str, str]) -> Table:
        self.select_columns(*names)                     # which names those that are not there
        return self._members({name: names.get(name, name) for name in self.schema.names})

    def with_column(self, name: str, values, type=None) -> Table:
        """Add or replace a column. The rows of a shuffled table are gathered: the new values are in their order."""
        new, old = array(values, type), list(self.batches())
        if len(new) != self.num_rows and self.schema.names:
            raise ValueError(f"column {name!r} has {len(new):,} rows, the table {self.num_rows:,}")
        fields = {f.name: f for f in self.schema} | {name: Field(name, new.type)}
        schema, start, chunks = Schema(list(fields.values()), self.schema.metadata), 0, []
        for a in old if self.schema.names else [Array(self.type, len(new))]:
            members = dict(zip(self.schema.names, a.children)) | {name: new.pick(slice(start, start + len(a)))}
            chunks.append(Array(schema.type, len(a), None, members.values()))
            start += len(a)
        return Table(schema, chunks)

    def map(self, fn, batched: bool = False, batch_size: int | None = 1000, workers: int = 0,
            remove_columns=()) -> Table:
        """Merge what fn returns for a row, {column: value}, into the row. With batched=True fn takes and returns
        {column: list}, and may change the number of rows if remove_columns names all that it leaves. batch_size=None is
        the whole table. workers: processes (forked, so fn may be any function)."""
        batch_size = max(1, len(self)) if batch_size is None else batch_size
        removed = [remove_columns] if isinstance(remove_columns, str) else list(remove_columns)
        job = functools.partial(_map_batch, self, fn, batched, batch_size, set(removed))
        if batch_size < 1 or workers < 0:
            raise ValueError(f"map: batch_size={batch_size} must be at least 1 and workers={workers} at least 0")
        starts = range(0, len(self), batch_size)
        with contextlib.ExitStack() as stack:
            results = map(job, starts)
            if workers:
                # each worker inherits the job: it is never pickled
                pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), setattr, (_work, "job", job))
                stack.callback(pool.shutdown, cancel_futures=True)
                results = pool.map(_work, starts)
            return _gathered(_progress(results, len(starts)), self.drop(removed).schema)

def _work(start: int) -> Table:
    try:
        return _work.job(start)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:                               # it would not survive the way back: send its words
            raise RuntimeError(f"map: {type(error).__name__}: {error}") from None
        raise

def _map_batch(table: Table, fn, batched: bool, size: int, removed: set[str], start: int) -> Table:
    part = table[start : start + size]
    rows = [part.to_pydict()] if batched else part.to_pylist()
    results = []
    try:
        for row in rows:
            results.append(fn(dict(row)))
    except Exception as error:
        if hasattr(error, "add_note"):                  # from Python 3.11 on
            error.add_note(f"map: row {start + len(results)}{' and those that follow it' * batched}")
        raise
    for i, result in enumerate(results):
        if not isinstance(result, (dict, NoneType)):
            raise ValueError(f"map: row {start + i}: the function returned {type(result).__name__}; return a dict")
    new = dict.fromkeys(itertools.chain.from_iterable(result or () for result in results))
    merged = [row | (result or {}) for row, result in zip(rows, results)]
    old = {f.name: f for f in part.schema}
    kept = [name for name in old if name not in removed and name not in new]
    arrays = {name: part[name].combine() for name in kept}
    for name in new:
        with _naming(f"map: column {name!r}: "):
            arrays[name] = array(merged[0][name] if batched else [row.get(name) for row in merged])
        if name in old:
            with contextlib.suppress(ValueError):       # an int32 column stays one as long as its new values fit
                arrays[name] = _cast(arrays[name], old[name].type)
        if kept and len(arrays[name]) != len(part):
            raise ValueError(f"map: {len(part)} rows became {len(arrays[name])} in {name!r}; remove_columns must name "
                             f"the columns that cannot follow: {', '.join(kept)}")
    fields = [Field(name, arrays[name].type) for name in old | arrays if name in arrays]
    fields = [old[f.name] if f.name in old and old[f.name].type == f.type else f for f in fields]
    return Table.from_pydict(arrays, Schema(fields, part.schema.metadata))

def _progress(results, total: int):
    """Pass the results on; on a terminal, show how far they are."""
    started = shown = time.monotonic()
    for done, result in enumerate(results, 1):
        yield result
        if sys.stderr.isatty() and (time.monotonic() - shown > 0.1 or done == total):
            shown = time.monotonic()
            print(f"\r|{'#' * (30 * done // total):30}| {done}/{total} batches, {shown - started:.1f} s",
                  end="\n" * (done == total), file=sys.stderr, flush=True)

def concat(tables: list[Table]) -> Table:
    """One table after the other, over the same buffers. A column that is null, missing, narrower or of integers in some
    of them becomes what holds the values of all."""
    tables = list(tables)
    if not tables or not all(isinstance(table, Table) for table in tables):
        raise ValueError("concat takes a list of one or more tables")
    kind = reduce(unify, (t.type for t in tables))
    fields = list(kind.fields)
    for k, f in enumerate(fields):
        if f.type.name == "dictionary":                     # together they may have more values than their index counts
            columns = [t[f.name] for t in tables if f.name in t.schema.names]
            sizes = {id(a.values): len(a.values) for c in columns if c.type == f.type for a in c.chunks}
            if sum(sizes.values()) > np.iinfo(f.type.dtype).max:
                fields[k] = replace(f, type=replace(f.type, index=Type("int32")))
    kind = replace(kind, fields=tuple(fields))
    parts = [Column.cast(t, kind) for t in tables]        # nothing is read: a column is strict if all were
    chunks = [(t.chunks, k) for t in parts for k in range(len(t.chunks))]
    whole = all(isinstance(t.rows, range) and len(t) == t.starts[-1] for t in parts)
    firsts = itertools.accumulate((t.starts[-1] for t in parts), initial=0)
    rows = None if whole else np.concatenate([np.asarray(t.rows, np.int64) + first for t, first in zip(parts, firsts)])
    joined = Lazy(len(chunks), lambda i: chunks[i][0][chunks[i][1]])
    return Table(parts[0].schema, joined, list(itertools.chain.from_iterable(t.lengths for t in parts)), rows)

_SPOOL_BYTES = 64 << 20

def _gathered(tables, schema=None) -> Table:
    """Tables that come one by one, as one: beyond 64 MB they wait in temporary files that are mapped, not in memory."""
    done = [_kept(concat(group)) for group in _by_size(tables, _SPOOL_BYTES)]
    return concat(done) if done else Table(Schema(schema or []), [])

def _kept(table: Table) -> Table:
    if table.nbytes < _SPOOL_BYTES:
        return Table(table.schema, [table.combine()])
    with tempfile.TemporaryFile() as file:
        write(table, file, stream=True)
        return read(file)

def _by_size(parts, limit: int):
    """Arrays or tables that come one by one, in lists of at least so many bytes; the last has the rest."""
    group, size = [], 0
    for part in parts:
        group.append(part)
        size += part.nbytes
        if size >= limit:
            yield group
            group.clear()                   # not a new list: whoever got it may still have it, with all its memory
            size = 0
    if group:
        yield group

def _json_row(path, i: int, line: bytes) -> dict:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {i}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {i}: a row must be an object {{...}}, not {line[:40]!r}")
    return row

def _json_value(value) -> str:
    if isinstance(value, (dt.date, dt.timedelta, np.datetime64, np.timedelta64)):
        return value.isoformat() if isinstance(value, dt.date) else str(value)
    raise ValueError(f"JSON has no {type(value).__name__}; drop or convert that column first")

# --- flatbuffers: the metadata of a file -----------------------------------------------------------------------------

def _flat(root: dict) -> bytes:
    """A flatbuffer. A table is {slot: value}; a value is a (format, number), a table, bytes (a string), a list of
    tables, or a numpy array (a vector of structs). Every value gets 8 bytes, so that everything is aligned."""
    out = bytearray(8)
    struct.pack_into("<I", out, 0, _flat_node(out, root))
    return bytes(out)

def _flat_node(out: bytearray, node) -> int:
    """Append a node and return where it is. References point forward only, so a parent goes before its children."""
    out += bytes(-len(out) % 8)
    at = len(out)
    if isinstance(node, bytes):
        out += struct.pack("<I", len(node)) + node + b"\0"
        return at
    if isinstance(node, np.ndarray):
        out += struct.pack("<II", 0, len(node)) + node.tobytes()        # the structs begin on 8 bytes, not their count
        return at + 4
    if isinstance(node, list):
        children, slots = node, range(at + 4, at + 4 + 4 * len(node), 4)
        out += struct.pack("<I", len(node)) + bytes(4 * len(node))
    else:
        places = {slot: 8 + 8 * i for i, slot in enumerate(s for s in sorted(node) if node[s] is not None)}
        vtable = [places.get(slot, 0) for slot in range(max(places, default=-1) + 1)]
        vtable = struct.pack(f"<{2 + len(vtable)}H", 4 + 2 * len(vtable), 8 + 8 * len(places), *vtable)
        at += -(-len(vtable) // 8) * 8
        out += vtable.ljust(at - len(out), b"\0") + struct.pack("<i4x", at - len(out)) + bytes(8 * len(places))
        children, slots = [node[slot] for slot in places], [at + place for place in places.values()]
    for slot, child in zip(slots, children):
        code, number = child if isinstance(child, tuple) else ("I", _flat_node(out, child) - slot)
        struct.pack_into("<" + code, out, slot, number)
    return at

class _Flat:
    """A flatbuffer's table, read where it lies. struct.unpack_from refuses what lies behind the end; what lies before
    the start cannot be referred to, but for the vtable, which is checked."""
    __slots__ = ("buffer", "at", "vtable", "end")

    def __init__(self, buffer: bytes, at: int | None = None):
        self.buffer, self.at = buffer, struct.unpack_from("<I", buffer)[0] if at is None else at
        self.vtable = self.at - struct.unpack_from("<i", buffer, self.at)[0]
        if self.vtable < 0:
            raise ValueError("metadata points outside of itself")
        self.end = self.vtable + struct.unpack_from("<H", buffer, self.vtable)[0]

    def place(self, slot: int) -> int:
        """Where a slot's value is, or 0 if it is absent."""
        entry = self.vtable + 4 + 2 * slot
        offset = struct.unpack_from("<H", self.buffer, entry)[0] if entry < self.end else 0
        return offset and self.at + offset

    def number(self, slot: int, code: str, default: int = 0) -> int:
        at = self.place(slot)
        return struct.unpack_from("<" + code, self.buffer, at)[0] if at else default

    def vector(self, slot: int, code: str, width: int = 1) -> tuple[int, tuple]:
        """Where a vector's items are, and the numbers in it: `width` of them an item."""
        at = self.place(slot)
        at += struct.unpack_from("<I", self.buffer, at)[0] if at else 0
        count = struct.unpack_from("<I", self.buffer, at)[0] * width if at else 0
        return at + 4, struct.unpack_from(f"<{count}{code}", self.buffer, at + 4) if count else ()

    def table(self, slot: int) -> _Flat | None:
        at = self.place(slot)
        return _Flat(self.buffer, at + struct.unpack_from("<I", self.buffer, at)[0]) if at else None

    def text(self, slot: int) -> bytes: return b"".join(self.vector(slot, "s")[1])
    def longs(self, slot: int, width: int) -> list[tuple]:
        numbers = iter(self.vector(slot, "q", width)[1])
        return list(zip(*[numbers] * width))

    def tables(self, slot: int) -> list[_Flat]:
        at, offsets = self.vector(slot, "I")
        return [_Flat(self.buffer, at + 4 * i + offset) for i, offset in enumerate(offsets)]

# --- schemas as metadata ---------------------------------------------------------------------------------------------

_FORMATS = {2: "iB", 3: "h", 8: "h", 10: "h", 15: "i", 16: "i", 18: "h"}    # of the numbers in a Type union member
_DEFAULTS = {8: (1,), 18: (1,)}                                             # where an absent number is not 0
_NAMES = {(row[1], *(n for n in row[2] if isinstance(n, int))): name for name, row in _TYPES.items()}

def _type_node(kind: Type) -> dict:
    known = {"size": kind.size, "unit": kind.unit and _UNITS.index(kind.unit)}
    numbers = [known.get(n, n) for n in _TYPES[kind.name][2]]
    node = dict(enumerate(zip(_FORMATS.get(_TYPES[kind.name][1], ""), numbers)))
    return node | ({1: kind.tz.encode()} if kind.tz else {})

def _field_node(f: Field, ids) -> dict:
    encoding, kind = None, f.type
    if kind.name == "dictionary":
        if "dictionary" in kind.item.text:
            raise ValueError(f"column {f.name!r}: a dictionary within a dictionary cannot be written; cast it first")
        encoding, kind = {0: ("q", next(ids)), 1: _type_node(kind.index), 2: ("B", kind.ordered)}, kind.item
    return {0: f.name.encode(), 1: ("B", f.nullable), 2: ("B", _TYPES[kind.name][1]), 3: _type_node(kind), 4: encoding,
            5: [_field_node(child, ids) for child in kind.fields], 6: _pairs_node(f.metadata)}

def _schema_node(schema: Field) -> dict:
    ids = itertools.count()
    return {1: [_field_node(f, ids) for f in schema], 2: _pairs_node(schema.metadata)}

def _pairs_node(pairs: dict[bytes, bytes]) -> list | None: return [{0: k, 1: v} for k, v in pairs.items()] or None
def _pairs(node: _Flat, slot: int) -> dict[bytes, bytes]: return {n.text(0): n.text(1) for n in node.tables(slot)}

def _read_schema(node: _Flat) -> tuple[Field, dict[int, Type]]:
    """The schema, and the value type of each dictionary by its id."""
    if node.number(0, "h"):
        raise ValueError("the file is big-endian; rewrite it on a little-endian machine")
    ids, budget = {}, itertools.count(len(node.buffer) // 8, -1)        # each field takes some bytes: ends cycles
    return Schema([_read_field(child, ids, budget) for child in node.tables(1)], _pairs(node, 2)), ids

def _read_field(node: _Flat, ids: dict, budget, depth: int = 0) -> Field:
    name, encoding = node.text(0).decode(), node.table(4)
    if depth > 64 or next(budget) < 0:
        raise ValueError("the schema is nested without end")
    children = tuple(_read_field(child, ids, budget, depth + 1) for child in node.tables(5))
    with _naming(f"column {name!r}: "):
        kind = _read_type(node.number(2, "B"), node.table(3), children)
        if encoding:
            index = _read_type(2, encoding.table(1), ()) if encoding.table(1) else Type("int32")
            ids[id_ := encoding.number(0, "q")] = kind
            ordered = bool(encoding.number(2, "B"))
            kind = Type("dictionary", (Field("values", kind),), index=index, ordered=ordered, id=id_)
    return Field(name, kind, bool(node.number(1, "B")), _pairs(node, 6))

def _read_type(member: int, node: _Flat, children: tuple) -> Type:
    numbers = [node.number(i, code, *_DEFAULTS.get(member, ())) for i, code in enumerate(_FORMATS.get(member, ""))]
    name = _VIEWS.get(member) or _NAMES.get((member, *numbers)) or _NAMES.get((member,))
    if name is None:
        raise ValueError(f"the Arrow type {_UNSUPPORTED.get(member, member)} is not supported; cast it before writing")
    known = dict(zip(_TYPES[name][2], numbers))
    unit = dict(enumerate(_UNITS)).get(known.get("unit"), "")
    tz = node.text(1).decode() if name == "timestamp" else ""
    return Type(name, children, known.get("size", 0), unit, tz, view=member in _VIEWS)

# --- buffers to arrays and back: shared by files and the C interface -------------------------------------------------

_MAX_BODILESS = 1 << 26     # rows that take no bytes, as nulls do, are believed up to here: a forged length is free

def _assemble(kind: Type, n: int, nulls: int, buffer, child, view_buffers, dictionary) -> Array:
    """An array of n rows. buffer(size) gives the next buffer's first bytes, child(type) the next child,
    view_buffers() the bytes of a view array, dictionary(type) the values of a dictionary array."""
    layout, children, data, size = kind.layout, (), None, kind.dtype.itemsize if kind.dtype else 0
    if n > _MAX_BODILESS and (layout == "null" or layout == "fixed_list" and kind.size == 0 or kind == "struct<>"):
        raise ValueError(f"{n:,} rows without any bytes are more than the {_MAX_BODILESS:,} that are believed")
    bits = None if layout == "null" else buffer((n + 7) // 8 if nulls else 0)
    valid = Bits(bits, 0, n) if nulls and layout != "null" else None
    if kind.view:
        return _from_views(kind, buffer(16 * n), view_buffers(), valid)
    if kind.name == "bool":
        data = Bits(buffer((n + 7) // 8), 0, n)
    elif layout in ("bytes", "list"):
        data = buffer((n + 1) * size if n else 0)
        data = data.view(kind.dtype) if n else np.zeros(1, kind.dtype)                  # no rows may mean no offset
        _check(kind, layout == "list" or data[-1] >= 0)
        children = [child(kind.item) if layout == "list" else Array(kind.item, int(data[-1]), buffer(int(data[-1])))]
    elif size:
        data = buffer(n * size).view(kind.dtype)
        children = [dictionary(kind)] if layout == "dictionary" else ()
    elif layout in ("struct", "fixed_list"):
        rows, children = n * kind.stride, [child(part) for part in kind.parts]
        _check(kind, all(len(c) >= rows for c in children))
        children = [c.pick(slice(0, rows)) if len(c) > rows else c for c in children]
        if valid is not None and "dictionary" in kind.text:
            children = [_below(c, np.repeat(valid, kind.stride)) for c in children]
    return Array(kind, n, data, children, valid)

def _below(a: Array, valid: np.ndarray) -> Array:
    """Below a null an index may be anything, also one of no value at all; so it is made null, too."""
    if a.type.name == "dictionary":
        return Array(a.type, len(a), a.data, a.children, a.present() & valid)
    children = [_below(c, np.repeat(valid, a.type.stride)) for c in a.children] if a.type.stride else a.children
    return Array(a.type, len(a), a.data, children, a.valid)

def _from_views(kind: Type, views: np.ndarray, buffers: list[np.ndarray], valid) -> Array:
    """A view is a length, and then either up to 12 bytes or (4 bytes, buffer, position)."""
    views, sizes = views.view("<i4").reshape(-1, 4), np.array([len(b) for b in buffers] or [0])    # [rows, 4]
    lengths = np.where(True if valid is None else np.asarray(valid), views[:, 0], 0).astype(np.int64)
    far = lengths > 12
    buffer, position = (np.where(far, views[:, k], 0).astype(np.int64) for k in (2, 3))
    _check(kind, ((lengths >= 0) & (buffer >= 0) & (buffer < len(sizes)) & (position >= 0)).all())
    _check(kind, (~far | (position + lengths <= sizes[buffer])).all())
    joined = np.concatenate([views.reshape(-1).view(np.uint8), *buffers])              # short ones stand in the views
    bases = 4 * views.size + np.cumsum(sizes) - sizes
    starts = np.where(far, bases[buffer] + position, np.arange(len(views)) * 16 + 4)
    text = Array(Type("uint8"), len(joined), joined).gather(starts, lengths)
    return Array(kind, len(views), _offsets_of(lengths, kind), [text], valid)

def _dismantle(a: Array) -> tuple[list, list[Array]]:
    """An array's own buffers as Arrow has them (validity first), and its children, without rows that nobody sees."""
    valid = Bits.pack(a.valid) if a.valid is not None and a.null_count else None
    match a.type.layout:
        case "null":
            return [], []
        case "fixed":
            return [valid, Bits.pack(a.data) if a.type.name == "bool" else a.data], []
        case "dictionary":
            a.codes()                                                                   # checks them
            return [valid, a.data], []
        case "bytes" | "list" as layout:
            offsets, child = a.used()
            return ([valid, offsets], [child]) if layout == "list" else ([valid, offsets, child.data], [])
    return [valid], list(a.children)

# --- files: messages, each a flatbuffer and a body of buffers --------------------------------------------------------

_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3                      # what a message can hold
_MAP_NORESERVE = 0x4000                                     # Linux's; Python names it from 3.13 on

def _padding(n: int) -> bytes: return bytes(-n % 64)        # 64 bytes: a cache line, and the widest vector register

@contextlib.contextmanager
def _atomic(path):
    """A file that appears under its name whole and on disk, or not at all."""
    final = os.path.realpath(path)
    if os.path.exists(final) and not os.path.isfile(final) and not os.path.isdir(final):
        with open(final, "wb") as device:                   # a pipe or /dev/null: nothing to replace
            yield device
        return
    if os.path.isdir(final) or not os.path.isdir(os.path.dirname(final)):
        raise FileNotFoundError(f"{path} cannot be a file: it is a directory, or in none; make the directory first")
    temporary = f"{final}.{uuid.uuid4().hex}.tmp"
    file = open(temporary, "xb", buffering=1 << 20)
    try:
        if os.path.exists(final):
            os.fchmod(file.fileno(), os.stat(final).st_mode & 0o7777)
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, final)
    except BaseException:
        file.raw.close()                                    # not file.close(): that would try to write again
        os.unlink(temporary)
        raise
    folder = os.open(os.path.dirname(final), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)

_sync_file_range = ctypes.CDLL(None).sync_file_range       # (fd, offset, bytes, 2: begin to write them out)
_sync_file_range.argtypes = ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint

class Writer:
    """Write a file batch by batch; it appears when the `with` block ends, if it ends well."""

    def __init__(self, path, schema, stream: bool = False):
        self.schema, self.stream, self.known, self.at = Schema(schema), stream, {}, 0
        self.blocks = {_SCHEMA: [], _DICTIONARY: [], _BATCH: []}
        node, self._stack = _schema_node(self.schema), contextlib.ExitStack()
        self.durable = not hasattr(path, "write")               # a temporary file of our own is written as it is
        self.file = self._stack.enter_context(_atomic(path)) if self.durable else path
        self._put(b"" if stream else b"ARROW1\0\0")
        self._message(_SCHEMA, node, [])

    def __enter__(self) -> Writer: return self
    def close(self) -> None: self.__exit__(None, None, None)
    def __exit__(self, kind, error, trace) -> None:
        stack, self._stack = self._stack, None                  # closed, even if what follows fails
        if kind or not stack:
            return stack and stack.__exit__(kind, error, trace)
        with stack:
            self._put(struct.pack("<ii", -1, 0))
            if not self.stream:
                blocks = [np.array(self.blocks[k], "<i8").reshape(-1, 3) for k in (_DICTIONARY, _BATCH)]
                footer = _flat({0: ("h", 4), 1: _schema_node(self.schema), 2: blocks[0], 3: blocks[1]})
                self._put(footer + struct.pack("<i", len(footer)) + b"ARROW1")
            self.file.flush()

    def write(self, rows: Table | list[dict] | dict[str, list]) -> None:
        """Add a table, a list of rows or a dict of columns; its small pieces are joined to batches of 64 MB."""
        if not self._stack:
            raise ValueError("this Writer is closed; open a new one")
        if not isinstance(rows, Table):
            known = Table.from_pydict if isinstance(rows, dict) else Table.from_pylist
            rows = (Table.from_arrow if hasattr(rows, "__arrow_c_stream__") else known)(rows)
        for pieces in _by_size(rows.cast(self.schema.type).batches(), 64 << 20):
            self._message(_BATCH, *self._record_batch(_concat(self.schema.type, pieces)))

    def _put(self, data) -> None: self.at += self.file.write(data)

    def _message(self, kind: int, header: dict, buffers: list[np.ndarray]) -> None:
        body = sum(b.nbytes + len(_padding(b.nbytes)) for b in buffers)
        metadata = _flat({0: ("h", 4), 1: ("B", kind), 2: header, 3: ("q", body)})
        metadata += _padding(self.at + 8 + len(metadata))
        self.blocks[kind].append((self.at, 8 + len(metadata), body))
        self._put(struct.pack("<ii", -1, len(metadata)) + metadata)
        for b in buffers:
            data = memoryview(b.view(np.uint8))
            for start in range(0, len(data), 4 << 20):      # let the disk begin while we copy: 1.6x faster with fsync
                self._put(data[start : start + (4 << 20)])
                if self.durable:
                    _sync_file_range(self.file.fileno(), self.at - (4 << 20), 4 << 20, 2)
            self._put(_padding(b.nbytes))

    def _record_batch(self, a: Array) -> tuple[dict, list[np.ndarray]]:
        nodes, buffers, ids = [], [], itertools.count()
        for child in a.children:
            self._flatten(child, nodes, buffers, ids)
        buffers = [np.zeros(0, np.uint8) if b is None else np.ascontiguousarray(b) for b in buffers]
        ends = itertools.accumulate((b.nbytes + len(_padding(b.nbytes)) for b in buffers), initial=0)
        places = np.array([(start, b.nbytes) for start, b in zip(ends, buffers)], "<i8").reshape(-1, 2)
        return {0: ("q", len(a)), 1: np.array(nodes, "<i8").reshape(-1, 2), 2: places}, buffers

    def _flatten(self, a: Array, nodes: list, buffers: list, ids) -> None:
        """Depth first, as the format wants it: each array's length and nulls, and its buffers."""
        a = self._dictionary(a, next(ids)) if a.type.name == "dictionary" else a
        own, children = _dismantle(a)
        nodes.append((len(a), a.null_count))
        buffers += own
        for child in children:
            self._flatten(child, nodes, buffers, ids)

    def _dictionary(self, a: Array, id_: int) -> Array:
        """Write what the file does not have of a dictionary yet, and point the array at the file's."""
        known = self.known.get(id_)
        if known is not None and known is not a.values:
            a = _concat(a.type, [Array(a.type, 0, a.data[:0], [known]), a])             # the known values stay in front
        new = a.values[0 if known is None else len(known) :]
        if known is None or len(new):
            header, buffers = self._record_batch(Array(Type("struct"), len(new), None, [new]))
            self._message(_DICTIONARY, {0: ("q", id_), 1: header, 2: ("B", known is not None)}, buffers)
        self.known[id_] = a.values
        return a

def write(table: Table, path, stream: bool = False) -> None:
    """Write a table: the file format, or the stream format, which datasets reads."""
    table = table if isinstance(table, Table) else Table.from_arrow(table)
    with Writer(path, table.schema, stream) as writer:
        writer.write(table)

def read(path) -> Table:
    """Map a file of either framing. Only its metadata is read; batches are decoded, not copied, when touched."""
    named = functools.partial(_naming, f"{path} is not an Arrow file that can be read: ", (
        struct.error, KeyError, IndexError, AttributeError, StopIteration, OverflowError))
    with contextlib.nullcontext(path) if hasattr(path, "fileno") else open(path, "rb") as file, named():
        fd, size = file.fileno(), os.fstat(file.fileno()).st_size
        head, tail, footer, dictionaries = os.pread(fd, 6, 0), os.pread(fd, 10, max(0, size - 10)), None, {}
        if head == b"ARROW1":
            length = struct.unpack_from("<i", tail)[0] if size >= 18 else 0
            if tail[4:] != head or not 0 < length <= size - 18:
                raise ValueError("it was cut off: the end mark is missing")
            footer = _Flat(os.pread(fd, length, size - 10 - length))
        elif size < 8 or head[:4] != b"\xff" * 4 and not 0 < struct.unpack_from("<i", head)[0] < size:
            raise ValueError(f"it begins with {head!r}, as no Arrow file does" if head else "it is empty")
        schema, values = _read_schema(footer.table(1)) if footer else (None, {})
        # private pages: whoever writes to a tensor or array over them gets a copy, not a crash and not a changed file
        memory = mmap.mmap(fd, size, mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        memory = np.frombuffer(memory, np.uint8)
        memory.flags.writeable, batches, lengths = False, [], []
        for kind, header, start, length in _messages(fd, size, footer):
            body = memory[start : start + length]
            if kind == _SCHEMA and schema is None:
                schema, values = _read_schema(header)
            elif kind == _DICTIONARY and schema:
                id_, delta = header.number(0, "q"), header.number(2, "B")
                new = _decode(Schema([("", values[id_])]).type, header.table(1), body, dictionaries).children[0]
                dictionaries = dictionaries if footer else dict(dictionaries)   # a stream's earlier batches keep theirs
                dictionaries[id_] = _concat(new.type, [dictionaries[id_], new]) if delta else new
            elif kind == _BATCH and schema:
                batches.append((header, body, dictionaries))
                lengths.append(header.number(0, "q"))
                # a row takes a bit at least; compression, at most 2**17 bytes from one
                if not 0 <= lengths[-1] <= max(_MAX_BODILESS, length << (20 if header.table(3) else 3)):
                    raise ValueError(f"{lengths[-1]:,} rows in {length:,} bytes cannot be")
            else:
                raise ValueError(f"message {kind} cannot be here")
        if schema is None:
            raise ValueError("it has no schema")

    def decode(k: int) -> Array:
        with named():
            return _decode(schema.type, *batches[k])
    return Table(schema, Lazy(len(batches), decode), lengths)

def _messages(fd: int, size: int, footer: _Flat | None):
    """(what it holds, its header, start of the body, length of the body) of every message: one after the other in a
    stream, those of the footer's lists in a file (where polars has no message for the schema). Metadata is read, not
    mapped: a page touched through a map counts, with its neighbours, as memory of this process."""
    places = [at for at, *_ in footer.longs(2, 3) + footer.longs(3, 3)] if footer else [0]
    for at in places:                                       # a stream's next place is appended below
        head = os.pread(fd, 1024, at) if 0 <= at <= size - 4 else b""                   # most messages in one call
        mark, length = struct.unpack_from("<ii", head.ljust(8, b"\xff"))
        start, length = (at + 8, length) if mark == -1 else (at + 4, mark)              # before 2019 there was no mark
        if length == 0 and not footer:
            return
        if not 0 < length <= size - start:
            raise ValueError("it was cut off, or a length in it is damaged")
        message = _Flat(head[start - at :] if start + length <= at + len(head) else os.pread(fd, length, start))
        start += length
        if message.number(0, "h") < 3:
            raise ValueError("it is of an Arrow version before 0.8; rewrite it with pyarrow")
        if not 0 <= (length := message.number(3, "q")) <= size - start:
            raise ValueError("it was cut off, or a length in it is damaged")
        yield message.number(1, "B"), message.table(2), start, length
        if not footer:
            places.append(start + length)

def _decode(kind: Type, header: _Flat, body: np.ndarray, dictionaries: dict[int, Array]) -> Array:
    """A record batch as a struct array of views of its body."""
    nodes, places, counts = iter(header.longs(1, 2)), iter(header.longs(2, 2)), iter(header.longs(4, 1))
    codec, n = header.table(3), header.number(0, "q")

    def buffer(size: int | None) -> np.ndarray:
        start, length = next(places)
        if start < 0 or length < 0 or start + length > len(body):
            raise ValueError("a buffer lies outside of the file")
        data = body[start : start + length]
        data = _decompress(data, codec.number(0, "B")) if codec and length else data
        if size is not None and len(data) < size:
            raise ValueError("a buffer is too short for its rows")
        return data[:size]

    def child(kind: Type) -> Array:
        n, nulls = next(nodes)
        if n < 0 or not 0 <= nulls <= n:
            raise ValueError("a column has an impossible length")
        return _assemble(kind, n, nulls, buffer, child, lambda: [buffer(None) for _ in range(next(counts)[0])],
                         lambda kind: dictionaries[kind.id])

    children = [child(f.type) for f in kind.fields]
    if any(len(c) != n for c in children):
        raise ValueError("the columns of a batch differ in length")
    return Array(kind, n, None, children)

def _decompress(data: np.ndarray, codec: int) -> np.ndarray:
    size, data, package = int(data[:8].view("<i8")[0]), data[8:], ("lz4", "zstandard")[codec]
    if size == -1:                                          # left as it was, since it did not get smaller
        return data
    if not 0 <= size <= len(data) << 17:
        raise ValueError("a compressed buffer claims an impossible size")
    try:
        library = importlib.import_module("lz4.frame" if package == "lz4" else package)
    except ImportError:
        raise ValueError(f"it is compressed; pip install {package} to read it, or write it uncompressed") from None
    try:
        out = library.LZ4FrameDecompressor().decompress(data.tobytes(), size) if package == "lz4" else (
            library.ZstdDecompressor().stream_reader(data.tobytes()).read(size))
    except Exception as error:                              # each library has errors of its own
        raise ValueError(f"a compressed buffer is damaged: {error}") from None
    return np.frombuffer(out, np.uint8)

# --- the C interface: tables pass between libraries as pointers ------------------------------------------------------

# What we lend is filled into a C struct and kept alive in _lent. Whoever has it calls its release function, which only
# sets a flag; _sweep finds the flag later and lets go. What we borrow is released when our last view of it is gone.

def _words(names: str):
    """A C struct of 64-bit numbers and pointers (on a machine of 64 bits both are 8 bytes)."""
    return type("Words", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_int64) for name in names.split()]})

_CSchema = _words("format name metadata flags n_children children dictionary release private")
_CArray = _words("length null_count offset n_buffers n_children buffers children dictionary release private")
_CStream = _words("get_schema get_next get_last_error release private")
_OnPointer = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_OnTwoPointers = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
# prototypes of our own: argument types set on ctypes.pythonapi itself would be shared with every other module
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi))
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi))
_lent = {}                  # address of a flag -> (flag, what was lent with it, everything that has to stay alive)
# address of a C stream -> (the capsule it is in, the stream); the first shows the reference count of what nobody holds
_capsules = {0: (object(), None)}

@functools.cache
def _release_function(layout) -> int:
    """The address of `void release(c) { c->release = NULL; *c->private = 1; }` in machine code. Not a Python callback:
    this is called from any thread, at exit, and while an exception is pending, when running Python would lose it."""
    release, private, machine = layout.release.offset, layout.private.offset, os.uname().machine
    if machine == "x86_64":
        code = bytes([0x48, 0x8B, 0x47, private,                    # mov rax, [rdi + private]
                      0x48, 0xC7, 0x47, release, 0, 0, 0, 0,        # mov qword [rdi + release], 0
                      0x48, 0xC7, 0x00, 1, 0, 0, 0, 0xC3])          # mov qword [rax], 1; ret
    elif machine == "aarch64":                                      # ldr x1; str xzr; mov x2, 1; str x2, [x1]; ret
        code = struct.pack("<5I", 0xF9400001 | private << 7, 0xF900001F | release << 7,
                           0xD2800022, 0xF9000022, 0xD65F03C0)
    else:
        raise ValueError(f"tables cannot be lent to other libraries on {machine}; write a file instead")
    with open(os.memfd_create("release"), "wb") as file:
        file.write(code)
        file.flush()
        memory = mmap.mmap(file.fileno(), len(code), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
    if _sweep_soon not in gc.callbacks:
        gc.callbacks.append(_sweep_soon)
        atexit.register(gc.callbacks.remove, _sweep_soon)
    for kept in (memory, _lent, _full_sweep):   # for good: others may release ours after Python has cleared its modules
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    return np.frombuffer(memory, np.uint8).ctypes.data

def _lend(c, *alive, children=(), dictionary=()):
    """Keep what c points to until c is released. A part that is taken out of c goes on living by itself."""
    flag, pointers = ctypes.c_int64(0), (ctypes.c_int64 * len(children))(*map(ctypes.addressof, children))
    c.release, c.private = _release_function(type(c)), ctypes.addressof(flag)
    if children:
        c.n_children, c.children = len(children), ctypes.addressof(pointers)
    if dictionary:
        c.dictionary = ctypes.addressof(dictionary[0])
    _lent[c.private] = flag, [*children, *dictionary], [pointers, *alive]
    return c

def _sweep() -> None:
    """Let go of what has been released. Called whenever something is lent, and after full garbage collections."""
    unheld = 0
    for address, (capsule, stream) in _capsules.copy().items():     # copies: a collection may bring another sweep
        count = sys.getrefcount(capsule)
        unheld = count if stream is None else unheld
        if stream and count <= unheld:
            _capsules.pop(address, None)
            if stream.release:                                      # and nobody took the stream out of it
                _forget(stream.private)
    while released := [address for address, (flag, *_) in _lent.copy().items() if flag.value]:
        for address in released:                                    # which may release more, lent to and fro
            _forget(address)

def _forget(address: int) -> None:
    for part in _lent.pop(address, (None, ()))[1]:
        if part.release:
            _forget(part.private)

class _FullSweep:
    """Sweeps when it is asked for its truth, if there was a full collection since."""
    collections = 0

    def __bool__(self) -> bool:
        if self.collections != (now := gc.get_stats()[2]["collections"]):
            self.collections = now
            _sweep()
        return False                    # to a pending call: no error

# What a garbage collection calls must not be Python: Ctrl-C during the collection would be raised in there, where every
# error is swallowed. So it is ctypes alone, which asks the main thread to call PyObject_IsTrue(_full_sweep) as soon as
# it runs Python again. A collection adds two arguments (phase, info), which the C function does not look at.
_full_sweep = _FullSweep()
_sweep_soon = functools.partial(
    ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.py_object] * 3)(("Py_AddPendingCall", ctypes.pythonapi)),
    ctypes.cast(ctypes.pythonapi.PyObject_IsTrue, ctypes.c_void_p).value, _full_sweep)

def _export_field(f: Field):
    kind, stored = f.type, f.type.index or f.type
    code = _TYPES[stored.name][0] + (str(kind.size) if "size" in _TYPES[stored.name][2] else "")
    code += dict(zip(_UNITS, "smun"))[kind.unit] + ":" * (kind.name == "timestamp") + kind.tz if kind.unit else ""
    pairs = [struct.pack("<i", len(x)) + x for pair in f.metadata.items() for x in pair]
    texts = [code.encode(), f.name.encode(), struct.pack("<i", len(f.metadata)) + b"".join(pairs)]
    texts = [ctypes.create_string_buffer(text) for text in texts]
    *places, metadata = map(ctypes.addressof, texts)
    c = _CSchema(*places, metadata if pairs else 0, kind.ordered | f.nullable << 1)
    parts = [_export_field(part) for part in kind.fields]
    return _lend(c, texts, dictionary=parts) if kind.name == "dictionary" else _lend(c, texts, children=parts)

def _export_array(a: Array):
    buffers, children = _dismantle(a)
    buffers = [None if b is None else np.ascontiguousarray(b) for b in buffers]
    pointers = (ctypes.c_int64 * len(buffers))(*(0 if b is None else b.ctypes.data for b in buffers))
    c = _CArray(len(a), a.null_count, 0, len(buffers), buffers=ctypes.addressof(pointers))
    dictionary = [_export_array(a.values)] if a.type.name == "dictionary" else []
    return _lend(c, pointers, buffers, children=[_export_array(child) for child in children], dictionary=dictionary)

def _export(schema: Field, arrays):
    """A capsule with a C stream of arrays, which are made when they are asked for. The capsule has no destructor,
    which could not be Python either."""
    def answer(make):
        def function(_, out: int) -> int:
            try:
                c = make()
                ctypes.memmove(out, ctypes.byref(c), ctypes.sizeof(c))
                return 0
            except Exception as error:
                message[0] = ctypes.create_string_buffer(str(error).encode())
                return 5                                                    # EIO
        return _OnTwoPointers(function)

    _sweep()
    message = [ctypes.create_string_buffer(b"")]
    exported = (_export_array(a) for a in arrays)
    functions = (answer(lambda: _export_field(schema)),
                 answer(lambda: next(exported, _CArray())),                 # a stream ends with a released array
                 ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(lambda _: ctypes.addressof(message[0])))
    stream = _lend(_CStream(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions)), functions)
    capsule = _new_capsule(ctypes.addressof(stream), b"arrow_array_stream", None)
    _capsules[ctypes.addressof(stream)] = capsule, stream
    return capsule

class _Borrowed:
    """Keeps what another library lent us; gives it back when the last array over it is gone."""
    def __init__(self, layout, address: int = 0):
        self.c = layout()
        if address and not layout.from_address(address).release:
            raise ValueError("this Arrow stream or array was read before; it can be read only once")
        if address:                                         # moved: the source is empty from now on
            ctypes.memmove(ctypes.addressof(self.c), address, ctypes.sizeof(layout))
            layout.from_address(address).release = 0

    def __del__(self, call=_OnPointer, addressof=ctypes.addressof):      # at exit the module's names may be gone
        if self.c.release:
            call(self.c.release)(addressof(self.c))

class _Memory:
    """Foreign memory as numpy sees it."""
    def __init__(self, address: int, size: int, owner):
        self.owner = owner
        self.__array_interface__ = {"data": (address, True), "shape": (size,), "typestr": "|u1", "version": 3}

def _import(source) -> tuple[Field, list[Array]]:
    """The schema and the arrays of an object with __arrow_c_stream__ or __arrow_c_array__."""
    arrays, schema = [], _Borrowed(_CSchema)
    if hasattr(source, "__arrow_c_stream__"):
        capsule = source.__arrow_c_stream__()
        stream = _Borrowed(_CStream, _address(capsule, b"arrow_array_stream"))
        _ask(stream.c, stream.c.get_schema, schema.c)
        while not arrays or arrays[-1].c.release:
            arrays.append(_Borrowed(_CArray))
            _ask(stream.c, stream.c.get_next, arrays[-1].c)
        arrays.pop()
    elif hasattr(source, "__arrow_c_array__"):
        capsules = source.__arrow_c_array__()
        schema = _Borrowed(_CSchema, _address(capsules[0], b"arrow_schema"))
        arrays = [_Borrowed(_CArray, _address(capsules[1], b"arrow_array"))]
    else:
        raise ValueError(f"{type(source).__name__} does not speak the Arrow C interface")
    top = _import_field(schema.c)
    return top, [_import_array(array.c, top.type, array) for array in arrays]

def _ask(stream, function: int, out) -> None:
    if _OnTwoPointers(function)(ctypes.addressof(stream), ctypes.addressof(out)):
        message = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int64)(stream.get_last_error)(ctypes.addressof(stream))
        raise ValueError(f"the other library failed: {(message or b'').decode(errors='replace')}")

def _import_schema(source) -> Field:
    capsule = source.__arrow_c_schema__()                   # it owns what we read
    return _import_field(_CSchema.from_address(_address(capsule, b"arrow_schema")))

_LETTERS = {row[0]: name for name, row in _TYPES.items()} | _VIEWS

def _import_field(c) -> Field:
    code, name = (ctypes.string_at(at).decode() if at else "" for at in (c.format, c.name))
    letters = code if code in _LETTERS else re.match(r"ts|tD|\+?w:|", code)[0]
    if not letters:
        known = next((kind for start, kind in _UNSUPPORTED.items() if code.startswith(str(start))), code)
        raise ValueError(f"column {name!r}: the Arrow type {known} is not supported; cast it before writing")
    unit = dict(zip("smun", _UNITS))[code[2]] if letters in ("ts", "tD") else ""
    fields = tuple(_import_field(_CSchema.from_address(child)) for child in _numbers_at(c.children, c.n_children))
    size = int(code[len(letters) :]) if letters.endswith("w:") else 0
    zone = code[4:] if letters == "ts" else ""
    kind = Type(_LETTERS[letters], fields, size, unit, zone, view=letters in _VIEWS)
    if c.dictionary:
        values = _import_field(_CSchema.from_address(c.dictionary))
        kind = Type("dictionary", (values,), index=kind, ordered=bool(c.flags & 1))
    texts, at = [], c.metadata + 4
    for _ in range(2 * ctypes.c_int32.from_address(c.metadata).value if c.metadata else 0):
        texts.append(ctypes.string_at(at + 4, ctypes.c_int32.from_address(at).value))
        at += 4 + len(texts[-1])
    return Field(name, kind, bool(c.flags & 2), dict(zip(texts[::2], texts[1::2])))

def _numbers_at(address: int, n: int) -> list[int]:
    return list((ctypes.c_int64 * n).from_address(address)) if n else []

def _import_array(c, kind: Type, owner) -> Array:
    n, pointers = c.length + c.offset, _numbers_at(c.buffers, c.n_buffers)
    children, left = iter(_numbers_at(c.children, c.n_children)), iter(pointers)

    def at(address: int, size: int) -> np.ndarray:
        return np.asarray(_Memory(address, size, owner)) if address and size else np.zeros(size, np.uint8)

    def view_buffers() -> list[np.ndarray]:
        return [at(*place) for place in zip(pointers[2:-1], _numbers_at(pointers[-1], len(pointers) - 3))]

    nulls = c.null_count if pointers and pointers[0] else 0
    whole = _assemble(kind, n, nulls, lambda size: at(next(left), size),
                      lambda kind: _import_array(_CArray.from_address(next(children)), kind, owner), view_buffers,
                      lambda kind: _import_array(_CArray.from_address(c.dictionary), kind.item, owner))
    return whole.pick(slice(c.offset, n)) if c.offset else whole

# --- command line and demo -------------------------------------------------------------------------------------------

def _show(command: str, files: list[str], rows: int) -> None:
    def words(value) -> str: return repr(value) if isinstance(value, bytes) else _json_value(value)
    for path in files:
        table = read(path)
        if command == "head":
            for row in table[:rows]:
                print(json.dumps(row, ensure_ascii=False, default=words))
            continue
        framing = "file" if open(path, "rb").read(6) == b"ARROW1" else "stream"
        size = f"{len(table):,} rows in {len(table.chunks):,} batches, {os.path.getsize(path):,} bytes"
        print(f"{path}: {framing} format, {size}")
        print("\n".join(f"    {line}" for line in str(table.schema).splitlines()))
        for key, value in table.schema.metadata.items():
            print(f"    metadata {key.decode(errors='replace')}: {value.decode(errors='replace'):.80}")

def _convert(source: str, target: str) -> None:
    if not target.endswith((".jsonl", ".json", ".arrow", ".arrows", ".ipc", ".feather", ".nano")):
        raise ValueError(f"{target}: name it .jsonl, .arrows (the stream format) or .arrow (the file format)")
    table = Table.from_jsonl(source) if source.endswith((".jsonl", ".json")) else read(source)
    if target.endswith((".jsonl", ".json")):
        table.to_jsonl(target)
    else:
        write(table, target, stream=target.endswith(".arrows"))
    print(f"{target}: {len(table):,} rows")

def demo(documents: int) -> None:
    """Tokenise a corpus, write, map and shuffle it, hand it to torch; then time each step beside the alternatives."""
    words = np.array([f"w{i}" for i in range(50_000)])
    rng = np.random.default_rng(0)
    ids = {word: i for i, word in enumerate(words.tolist())}
    table = Table.from_pydict({"id": np.arange(documents), "text": [
        " ".join(words[rng.integers(0, len(words), n)]) for n in rng.integers(100, 400, documents)]})

    def tokenize(batch: dict) -> dict:
        return {"tokens": [np.array([ids[word] for word in text.split()], np.int32) for text in batch["text"]]}
    table = table.map(tokenize, batched=True)
    with tempfile.TemporaryDirectory() as folder:
        path, stream = f"{folder}/corpus.arrow", f"{folder}/corpus.arrows"
        write(table, path)
        write(table, stream, stream=True)
        mapped = read(path)
        print(f"wrote and mapped {path}: {os.path.getsize(path) / 1e6:.1f} MB\n{mapped!r}\n")
        shuffled = mapped.shuffle(seed=0)
        row = shuffled[0]
        assert row["tokens"] == [ids[word] for word in row["text"].split()] and row == table[row["id"]]
        with contextlib.suppress(ImportError):
            batch = shuffled[:8]["tokens"].to_torch()
            print(f"eight shuffled documents as torch tensors: {[len(document) for document in batch]} tokens\n")
        _bench(folder, table, stream)

def _bench(folder: str, table: Table, stream: str) -> None:
    """The best of nine runs, in turns; the ratio says how many times as long the others take."""
    n, ours, theirs = len(table), f"{folder}/ours.", f"{folder}/theirs."
    numbers = Table.from_pydict({"x": np.arange(500 * n), "y": np.arange(500 * n) / 7})
    lists, order = table.select_columns("tokens"), np.random.default_rng(1).permutation(n)
    shuffled = read(stream).select(order)
    steps = {                                               # step -> {library: what it does there}
        "write numbers": {"arrowlite": lambda: write(numbers, ours + "numbers")},
        "read numbers": {"arrowlite": lambda: read(ours + "numbers")["x"].to_numpy().sum()},
        "write list<int32>": {"arrowlite": lambda: write(lists, ours + "lists")},
        "read list<int32>": {"arrowlite": lambda: read(ours + "lists")["tokens"].values.to_numpy().sum()},
        "open a file": {"arrowlite": lambda: read(ours + "numbers")},
        "1 shuffled row": {"arrowlite": lambda: shuffled[n // 2]},
        "1000 shuffled rows as lists": {"arrowlite": lambda: shuffled["tokens"][:1000].to_pylist()},
        "1000 shuffled rows as arrays": {"arrowlite": lambda: shuffled["tokens"][:1000].to_numpy()}}
    with contextlib.suppress(ImportError):
        import pyarrow as pa
        from pyarrow import feather

        def pa_read(name: str): return pa.ipc.open_file(pa.memory_map(theirs + name)).read_all()
        def pa_write(part, name: str, durable: bool = False) -> None:
            feather.write_feather(part, theirs + name, compression="uncompressed", chunksize=len(part))
            with open(theirs + name, "rb") as file:
                os.fsync(file.fileno()) if durable else None
        pa_numbers, pa_lists = pa.table(numbers), pa.table(lists)
        steps["write numbers"]["pyarrow_fsync"] = lambda: pa_write(pa_numbers, "numbers", durable=True)
        steps["write numbers"]["pyarrow"] = lambda: pa_write(pa_numbers, "numbers")
        steps["write list<int32>"]["pyarrow_fsync"] = lambda: pa_write(pa_lists, "lists", durable=True)
        steps["write list<int32>"]["pyarrow"] = lambda: pa_write(pa_lists, "lists")
        steps["read numbers"]["pyarrow"] = lambda: pa_read("numbers")["x"].to_numpy().sum()
        steps["read list<int32>"]["pyarrow"] = lambda: pa_read("lists")["tokens"].chunk(0).values.to_numpy().sum()
        steps["open a file"]["pyarrow"] = lambda: pa_read("numbers")
    with contextlib.suppress(ImportError):
        import datasets
        rows = datasets.Dataset.from_file(stream).select(order.tolist())
        tokens, arrays = rows.select_columns("tokens"), rows.select_columns("tokens").with_format("numpy")
        steps["1 shuffled row"]["datasets"] = lambda: rows[n // 2]
        steps["1000 shuffled rows as lists"]["datasets"] = lambda: tokens[:1000]
        steps["1000 shuffled rows as arrays"]["datasets"] = lambda: arrays[:1000]
    for label, runs in steps.items():
        times, repeat = {name: [] for name in runs}, 50 if label in ("open a file", "1 shuffled row") else 1
        for name, run in list(runs.items()) * 9:
            times[name].append(timeit.timeit(run, number=repeat) / repeat * 1e3)
        best = {name: min(values) for name, values in times.items()}
        times = (f"{name} {ms:.3f} ms ({ms / best['arrowlite']:.1f}x)" for name, ms in best.items())
        print(f"{label:28}", *times, sep="   ")

def main() -> None:
    parser = argparse.ArgumentParser(description="Look into Arrow files and convert them; without a command, the demo.")
    parser.add_argument("command", nargs="?", choices=("schema", "head", "convert"), help="convert: IN OUT, by suffix: "
                        ".jsonl, .arrows (stream format), else the file format")
    parser.add_argument("files", nargs="*")
    parser.add_argument("-n", type=int, default=5, help="rows that head shows")
    parser.add_argument("--bench", action="store_true", help="the demo at full size")
    args = parser.parse_intermixed_args()
    if args.command is None:
        return demo(100_000 if args.bench else 5_000)
    if not args.files or args.command == "convert" and len(args.files) != 2:
        parser.error("head and schema take files; convert takes two, IN and OUT")
    try:
        _convert(*args.files) if args.command == "convert" else _show(args.command, args.files, args.n)
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        if args.command == "convert" or not isinstance(error, BrokenPipeError):
            sys.exit(f"error: {error}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # `| head -1` has seen enough: what is left goes nowhere

if __name__ == "__main__":
    main()
