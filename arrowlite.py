"""arrowlite: columns without copies.

A table is a set of named columns; a column is a few flat buffers; a file is those buffers one after the other, with a
description of where each one starts. That layout is Apache Arrow's, so a file is read by mapping it into memory and
pointing at it, and pyarrow, polars, DuckDB and Hugging Face datasets read the same bytes. Nothing is parsed, nothing is
copied, and a shuffled table is the old buffers under a new list of row numbers.

      Table          Column "tokens"               Array: one record batch's part of the column, here list<int32>
    +---------+     +---------------+             +------------------------------------------------------------+
    | tokens -+---->| rows  7 2 5 ..|             | validity   1 1 0 1         a bit a row; absent if no nulls |
    | label   |     | chunks  ------+--> batch 0  | offsets    0 3 5 5 9       row i is child[o[i] : o[i + 1]] |
    +---------+     +---------------+    batch 1  | child      11 12 13 21 22 41 42 43 44       an int32 Array |
                                         ...      +------------------------------------------------------------+
                                                      numpy views of one memory map: the file, byte for byte
Public names
    array(values, type=None)                     an Array from Python values, numpy, torch or another Arrow library
    Table.from_pydict / from_pylist / from_jsonl / from_arrow, and to_pydict / to_pylist / to_jsonl
    table[i], table[a:b], table["column"], slice, select, filter, map, shuffle, split, with_column, rename, drop, ...
    concat([tables]), read(path), write(table, path, stream=False), Writer(path, schema, stream=False)
    Type, Field, Schema                          types are named by strings: "int32", "list<utf8>", "timestamp[us, UTC]"

A file has one of two framings. The file format (the default: pyarrow, feather, polars, DuckDB) ends in a footer that
lists the batches; the stream format (stream=True: datasets) is the same without the footer. `read` takes either.

    python arrowlite.py                          the demo; --bench compares with pyarrow and datasets at full size
    python arrowlite.py schema|head FILE...      look into files
    python arrowlite.py convert IN OUT           jsonl to Arrow, Arrow to jsonl, or one framing to the other
"""
from __future__ import annotations

import argparse, contextlib, ctypes, functools, gc, importlib, itertools, json, mmap, multiprocessing, os, re, struct, sys
import tempfile, time, uuid, warnings, zoneinfo
import datetime as dt
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import NoneType

import numpy as np

# --- types: one table drives everything ------------------------------------------------------------------------------

# name: letters in the C interface, member of the Type union in file metadata and its numbers there (those that are not
# fixed by the name: a unit, a size), dtype of the first buffer, layout (what the layouts are: see Array)
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
    "dictionary": ("-", -1, (), None, "dictionary"),                # in both, the type of its values with a note
    "string_view": ("vu", 24, (), "V16", "view"), "binary_view": ("vz", 23, (), "V16", "view"),     # read as large_*
}
_UNSUPPORTED = {7: "decimal", 9: "time", 11: "interval", 14: "union", 17: "map", 22: "run_end_encoded", 25: "list_view",
                26: "large_list_view", "d": "decimal", "tt": "time", "ti": "interval", "+u": "union", "+m": "map",
                "+r": "run_end_encoded", "+v": "list_view"}
_ALIASES = {"string": "utf8", "large_string": "large_utf8", "halffloat": "float16", "float": "float32",
            "double": "float64"}                                    # pyarrow's spellings
_UNITS = ("s", "ms", "us", "ns")
_MAX_BODILESS = 1 << 26     # rows that take no bytes, as nulls do, are believed up to here: a forged length is free

@dataclass(frozen=True, eq=False, repr=False)
class Type:
    """A type's name, and what that name needs. It equals its spelling: column.type == "list<int32>"."""
    name: str
    fields: tuple[Field, ...] = ()      # list: the item; struct: the members; dictionary: the values
    size: int = 0                       # bytes of a fixed_size_binary, items of a fixed_size_list; dictionary: its id
    unit: str = ""                      # timestamp, duration: s, ms, us or ns
    tz: str = ""                        # timestamp: the time zone to show; the stored values are UTC
    index: Type | None = None           # dictionary: the integer type of its indices
    ordered: bool = False               # dictionary: whether the order of its values means something

    @cached_property
    def layout(self) -> str:
        return _TYPES[self.name][4]

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

    @property
    def item(self) -> Type:
        return self.fields[0].type if self.fields else Type("uint8")

    @cached_property
    def text(self) -> str:
        inner = [str(self.index)] if self.index else []
        inner += [f"{f.name}: {f.type}" if self.name == "struct" else str(f.type) for f in self.fields]
        brackets = [str(self.size)] if self.name.startswith("fixed_size") else [x for x in (self.unit, self.tz) if x]
        return (self.name + f"<{', '.join(inner)}>" * (bool(inner) or self.name == "struct")
                + f"[{', '.join(brackets)}]" * bool(brackets))

    def __str__(self) -> str: return self.text
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
        encode = lambda x: x if isinstance(x, bytes) else x.encode()                                    # noqa: E731
        object.__setattr__(self, "type", as_type(self.type))
        object.__setattr__(self, "metadata", {encode(k): encode(v) for k, v in (self.metadata or {}).items()})

    @property
    def names(self) -> list[str]: return [f.name for f in self.type.fields]
    def field(self, name: str) -> Field: return self.type.fields[self.position(name)]
    def __iter__(self): return iter(self.type.fields)
    def __len__(self) -> int: return len(self.type.fields)
    def __str__(self) -> str:
        return "\n".join(f"{f.name}: {f.type}{'' if f.nullable else ' not null'}" for f in self)

    def position(self, name: str) -> int:
        if name not in self.names:
            raise KeyError(f"no column {name!r}; there are: {', '.join(self.names) or 'none'}")
        return self.names.index(name)

def Schema(spec, metadata=None) -> Field:
    """From a schema, {name: type}, a list of fields or (name, type) pairs, or the schema of another Arrow library."""
    if hasattr(spec, "__arrow_c_schema__"):
        spec = _import_field(_CSchema.from_address(_address(spec.__arrow_c_schema__(), b"arrow_schema")))
    if not isinstance(spec, Field):
        pairs = spec.items() if isinstance(spec, dict) else spec
        spec = Field("", Type("struct", tuple(f if isinstance(f, Field) else Field(*f) for f in pairs)))
    if len(set(spec.names)) < len(spec):
        raise ValueError(f"two columns have the same name: {', '.join(spec.names)}; rename one")
    return replace(spec, metadata=metadata or spec.metadata)

def as_type(spec) -> Type:
    """From a Type, its spelling, a numpy dtype, int, float, str, bytes, bool, or a type of another Arrow library."""
    if isinstance(spec, Type):
        return spec
    if hasattr(spec, "__arrow_c_schema__"):
        return _import_field(_CSchema.from_address(_address(spec.__arrow_c_schema__(), b"arrow_schema"))).type
    return _parse_type(spec) if isinstance(spec, str) else _type_of_dtype(np.dtype(spec))

def _parse_type(text: str) -> Type:
    parts = re.fullmatch(r"\s*(\w+)\s*(?:<(.*)>)?\s*(?:\[([^]<>]*)\])?(?: not null)?\s*", text, re.S)
    name = parts and _ALIASES.get(parts[1], parts[1])
    if name not in _TYPES:
        raise ValueError(f"{text!r} is not a supported Arrow type; they are {', '.join(_TYPES)}")
    inner = [Field(label or "item", spelling) for label, spelling in
             (re.fullmatch(r"(?:([^<>\[\]]*?): )?(.*)", part, re.S).groups() for part in _split(parts[2] or ""))]
    index = inner.pop(0).type if name == "dictionary" and inner else None
    brackets = [part.removeprefix("tz=") for part in _split(parts[3] or "")]
    size = int(brackets[0]) if brackets and brackets[0].isdigit() else 0
    unit, tz = [*brackets, "", ""][:2] if name in ("timestamp", "duration") else ("", "")
    complete = len(inner) == (_TYPES[name][4] in ("list", "fixed_list", "dictionary")) or name == "struct"
    if not complete or (name == "fixed_size_binary" and not size) or (index and index.dtype.kind not in "iu") or (
            name in ("timestamp", "duration") and unit not in _UNITS):
        raise ValueError(f"{text!r} is not a complete type; write for example list<int32>, struct<a: int64, b: utf8>, "
                         "fixed_size_list<float32>[4], dictionary<int32, utf8>, timestamp[us, UTC]")
    return Type(name, tuple(inner), size, unit, tz, index)

def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    depth, parts = 0, [""]
    for c in text:
        depth += (c in "<[") - (c in ">]")
        parts = [*parts, ""] if c == "," and not depth else [*parts[:-1], parts[-1] + c]
    return [part.strip() for part in parts if part.strip()]

def _type_of_dtype(dtype: np.dtype) -> Type:
    kind, unit = dtype.kind, np.datetime_data(dtype)[0] if dtype.kind in "mM" else ""
    if kind in "iuf" and dtype.itemsize <= 8:
        return Type({"i": "int", "u": "uint", "f": "float"}[kind] + str(8 * dtype.itemsize))
    if unit:
        name = "date32" if (kind, unit) == ("M", "D") else "timestamp" if kind == "M" else "duration"
        return Type(name, unit="" if name == "date32" else unit if unit in _UNITS else "s")
    if kind == "V" and dtype.itemsize and dtype.fields is None:
        return Type("fixed_size_binary", size=dtype.itemsize)
    if kind in "bUS":
        return Type({"b": "bool", "U": "utf8", "S": "binary"}[kind])
    raise ValueError(f"numpy dtype {dtype} has no Arrow type; convert it first")

def _list_of(item: Type, name: str = "list", size: int = 0) -> Type:
    return Type(name, (Field("item", item),), size)

# --- arrays: numpy views that belong together ------------------------------------------------------------------------

class Bits:
    """A bitmap read like a numpy array of bools. Only what is touched is unpacked, so a mapped bitmap stays mapped."""
    __slots__ = ("bytes", "start", "length")

    def __init__(self, bytes: np.ndarray, start: int, length: int):
        self.bytes, self.start, self.length = bytes, start, length

    def item(self, i: int) -> bool:
        return bool(self.bytes[(self.start + i) >> 3] >> ((self.start + i) & 7) & 1)

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
        for view in (data, valid):
            if isinstance(view, np.ndarray):
                view.flags.writeable = False

    def __len__(self) -> int: return self.length
    def __repr__(self) -> str: return f"{self.type} {self[:10].to_pylist()}{' ...' * (len(self) > 10)} {len(self):,} rows"
    def __array__(self, dtype=None, copy=None): return np.array(self.to_numpy(), dtype, copy=copy)
    def __arrow_c_stream__(self, requested_schema=None): return _export_stream(Field("", self.type), iter([self]))
    def combine(self) -> Array: return self

    def __getitem__(self, i):
        if isinstance(i, slice):
            rows = range(self.length)[i]
            return self.pick(slice(rows.start, max(rows.start, rows.stop)) if rows.step == 1 else np.array(rows, np.int64))
        return self.at(_row(i, self.length))

    def pick(self, rows: slice | np.ndarray) -> Array:
        """Some of the rows. A slice(start, stop) shares every buffer; row numbers gather a dense copy."""
        sliced, data, children = isinstance(rows, slice), self.data, self.children
        length = rows.stop - rows.start if sliced else len(rows)
        match self.type.layout:
            case "fixed" | "dictionary":
                data = data[rows]
            case "bytes" | "list" if sliced:
                data = data[rows.start : rows.stop + 1]
            case "bytes" | "list":
                starts, lengths = self.spans(rows)
                data, children = _offsets_of(lengths, self.type), [children[0]._gather(starts, lengths)]
            case "fixed_list":
                n = self.type.size
                items = slice(rows.start * n, rows.stop * n) if sliced else (rows[:, None] * n + np.arange(n)).ravel()
                children = [children[0].pick(items)]
            case "struct":
                children = [child.pick(rows) for child in children]
        return Array(self.type, length, data, children, None if self.valid is None else self.valid[rows])

    def spans(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows of a list or bytes array start in the child, and their lengths. Checked: a file may hold anything,
        and a bad offset would lead to foreign bytes."""
        starts, stops = (self.data[:-1], self.data[1:]) if isinstance(rows, slice) else (self.data[rows], self.data[rows + 1])
        if len(starts) and not (starts.min() >= 0 and stops.max() <= len(self.children[0]) and (starts <= stops).all()):
            raise _damaged(self.type)
        return starts.astype(np.int64), (stops - starts).astype(np.int64)

    def _gather(self, starts: np.ndarray, lengths: np.ndarray) -> Array:
        """Rows start : start + length of every span, joined. Long spans are copied span by span, because an index
        array costs 8 bytes and some 5 ns an item; short ones are not worth a Python step each."""
        total = int(lengths.sum())
        if self.type.layout == "fixed" and self.valid is None and total > 48 * len(lengths):
            spans = zip(starts.tolist(), (starts + lengths).tolist())
            return Array(self.type, total, np.concatenate([np.asarray(self.data[slice(a, b)]) for a, b in spans]))
        shift = starts - (np.cumsum(lengths) - lengths)     # from a row's number in the result to its number here
        return self.pick(np.repeat(shift, lengths) + np.arange(total))

    def used(self) -> tuple[np.ndarray, Array]:
        """Checked offsets [rows + 1] that start at 0, and the part of the child that they cover."""
        self.spans(slice(None))
        start, stop = int(self.data[0]), int(self.data[-1])
        if not 0 <= start <= stop <= len(self.children[0]):
            raise _damaged(self.type)
        return self.data - start if start else self.data, self.children[0].pick(slice(start, stop))

    def codes(self) -> np.ndarray:
        """A dictionary's indices, checked; those of null rows may be anything, and become 0."""
        codes = self.data if self.valid is None else np.where(self.valid, self.data, self.data.dtype.type(0))
        if self.null_count < self.length and (codes.min() < 0 or codes.max() >= len(self.children[0])):
            raise _damaged(self.type)
        return codes.astype(np.int64)

    def present(self) -> np.ndarray:
        return np.ones(self.length, bool) if self.valid is None else np.asarray(self.valid)

    @property
    def null_count(self) -> int:
        if self.type.layout == "null":
            return self.length
        return 0 if self.valid is None else self.length - int(np.count_nonzero(self.valid))

    @property
    def nbytes(self) -> int:
        """Bytes that these rows take in a file, without padding."""
        bits = (self.valid is not None) + (self.type.name == "bool")
        own = self.data.nbytes if isinstance(self.data, np.ndarray) and self.type.name != "bool" else 0
        children = self.children
        if self.type.layout in ("bytes", "list"):
            children = [children[0].pick(slice(int(self.data[0]), int(self.data[-1])))]
        return own + bits * ((self.length + 7) // 8) + sum(child.nbytes for child in children)

    def at(self, i: int):
        """One row as a Python value. What training reads row by row has a short way; the rest goes through to_pylist."""
        if self.valid is not None and not self.valid.item(i):
            return None
        if self.type.plain:
            return self.data.item(i)
        if self.type.layout in ("bytes", "list"):
            start, stop, child = self.data.item(i), self.data.item(i + 1), self.children[0]
            if not 0 <= start <= stop <= len(child):
                raise _damaged(self.type)
            if self.type.layout == "bytes":
                data = child.data[start:stop].tobytes()
                return str(data, "utf8") if self.type.name.endswith("utf8") else data
            if child.type.plain and child.valid is None and isinstance(child.data, np.ndarray):
                return child.data[start:stop].tolist()
        return self.pick(slice(i, i + 1)).to_pylist()[0]

    def to_pylist(self) -> list:
        valid = itertools.repeat(True) if self.valid is None else np.asarray(self.valid).tolist()
        match self.type.layout:
            case "null":
                return [None] * self.length
            case "fixed":
                out = np.asarray(self.data).tolist() if self.type.plain else _moments(self.type, self.data)
            case "bytes":
                ends, data = self.used()[0].tolist(), self.used()[1].data.tobytes()
                decode = bytes
                if self.type.name.endswith("utf8"):     # if ASCII, one decoding for all rows, then cuts
                    data, decode = (data.decode(), str) if data.isascii() else (data, bytes.decode)
                return [decode(data[a:b]) if ok else None for a, b, ok in zip(ends, ends[1:], valid)]
            case "list":
                ends, items = self.used()[0].tolist(), self.used()[1].to_pylist()
                out = [items[a:b] for a, b in zip(ends, ends[1:])]
            case "fixed_list":
                items, n = self.children[0].to_pylist(), self.type.size
                out = [items[i * n : (i + 1) * n] for i in range(self.length)]
            case "struct":
                names, members = [f.name for f in self.type.fields], [child.to_pylist() for child in self.children]
                out = [dict(zip(names, row)) for row in zip(*members)] if names else [{} for _ in range(self.length)]
            case "dictionary":
                values = self.children[0].to_pylist() or [None]
                out = [values[code] for code in self.codes().tolist()]
        return out if self.valid is None else [value if ok else None for value, ok in zip(out, valid)]

    def to_numpy(self) -> np.ndarray:
        """Numbers and times without nulls: the buffer itself. With nulls: a copy, integers as float64 with NaN (as in
        pyarrow), times with NaT. fixed_size_list: [rows, size]. Text, lists, structs: an array of Python objects."""
        layout, child = self.type.layout, self.children[0] if self.children else None
        absent = ~self.present() if self.null_count else None
        if layout == "fixed":
            values = self.data.astype("M8[D]") if self.type.name == "date32" else np.asarray(self.data)
            if absent is None:
                return values
            if values.dtype.kind in "iufmM":
                values = values.astype("f8") if values.dtype.kind in "iu" else values.copy()
                values[absent] = np.nan if values.dtype.kind == "f" else "NaT"
                return values
        elif layout == "dictionary" and absent is None and self.length:
            return child.to_numpy()[self.codes()]
        elif layout == "fixed_list" and absent is None:
            items = child.to_numpy()
            return items.reshape(self.length, self.type.size, *items.shape[1:])
        rows = self.to_pylist()
        if layout == "list" and child.type.plain and child.valid is None:
            ends, items = self.used()
            rows = [np.asarray(items.data)[a:b] for a, b in itertools.pairwise(ends.tolist())]
        out = np.empty(self.length, object)
        for i, row in enumerate(rows):      # not out[:] = rows: numpy would spread equally long rows over a new axis
            out[i] = None if absent is not None and absent[i] else row
        return out

    def to_torch(self):
        """A tensor over the same memory, or a list of tensors for a list column. The pages of a mapped file are private:
        writing to a tensor neither changes the file nor crashes."""
        import torch
        values = self.to_numpy()
        ragged = values.dtype == object and self.type.layout == "list" and all(isinstance(v, np.ndarray) for v in values)
        if not ragged and values.dtype.kind not in "biuf":
            raise ValueError(f"torch has no tensor for {self.type}{' with nulls' * bool(self.null_count)}; use to_numpy()")
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
            raise ValueError(f"{self.type} has no such part; it is for {' and '.join(layouts)}")
        return self

def _damaged(kind: Type) -> ValueError:
    return ValueError(f"a column of {kind} points outside of its data; the file is damaged")

def _row(i: int, n: int) -> int:
    if not -n <= i < n:
        raise IndexError(f"row {i} of {n:,} rows")
    return i % n

def _offsets_of(lengths: np.ndarray, kind: Type) -> np.ndarray:
    """lengths [rows] -> offsets [rows + 1], refusing more than 32 bits can count."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > np.iinfo(kind.dtype).max:
        raise ValueError(f"{offsets[-1]:,} bytes or items are too many for one {kind.name} array; use large_{kind.name}")
    return offsets.astype(kind.dtype, copy=False)

def _moments(kind: Type, values: np.ndarray) -> list:
    """date, datetime, timedelta where they hold the value exactly, else numpy's scalar (nanoseconds, far years)."""
    if kind.unit == "ns":
        return list(values)
    values = values.astype("M8[D]") if kind.name.startswith("date") else values
    out = [values[i] if isinstance(value, int) else value for i, value in enumerate(values.tolist())]
    if not kind.tz:
        return out
    try:
        zone = zoneinfo.ZoneInfo(kind.tz) if kind.tz[0] not in "+-" else dt.datetime.strptime(kind.tz, "%z").tzinfo
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        zone = dt.timezone.utc              # a zone that this machine does not know: the instant is exact all the same
    utc = [value.replace(tzinfo=dt.timezone.utc) if isinstance(value, dt.datetime) else value for value in out]
    edge = range(2, 9999)                   # astimezone overflows within a day of datetime's ends: those stay in UTC
    return [v.astimezone(zone) if isinstance(v, dt.datetime) and v.year in edge else v for v in utc]

# --- from Python values to arrays ------------------------------------------------------------------------------------

def array(values, type=None) -> Array:
    """From Python values (None is null), a numpy array or torch tensor, or another Arrow library's array."""
    if isinstance(values, (Array, Column)):
        built = values.combine()
    elif hasattr(values, "__arrow_c_stream__") or hasattr(values, "__arrow_c_array__"):
        built = Column(*_import(values)).combine()
    else:
        built = _from_numpy(np.asarray(values)) if hasattr(values, "__array__") else _build(list(values))
    return built if type is None else _cast(built, as_type(type))

# Python's types by family, in the order in which they are tried: a bool is an int to Python, never to us
_FAMILIES = {"bool": (bool, np.bool_), "int": (int, np.integer), "float": (float, np.floating), "utf8": str,
             "binary": (bytes, bytearray), "timestamp": (dt.datetime, np.datetime64), "date": dt.date,
             "duration": (dt.timedelta, np.timedelta64), "list": (list, tuple, np.ndarray), "struct": dict}

def _build(values: list) -> Array:
    """Python values as an array of the type that is natural for them; any other type is a cast away."""
    kinds = set(map(type, values)) - {NoneType}
    families = {next((name for name, types in _FAMILIES.items() if issubclass(kind, types)), kind.__name__)
                for kind in kinds}
    family = "float" if families == {"int", "float"} else families.pop() if len(families) == 1 else "null"
    if families and (family == "null" or family not in _FAMILIES):
        raise ValueError(f"a column cannot hold {' and '.join(sorted(families)) or family} values; convert them first")
    if family == "null":
        return Array(Type("null"), len(values))
    present = np.fromiter((v is not None for v in values), bool, len(values))
    where, valid = (slice(None), None) if present.all() else (present, present)
    some = values if valid is None else [v for v in values if v is not None]
    if family == "struct":
        names = dict.fromkeys(itertools.chain.from_iterable(some))
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"the names of a struct must be text: {list(names)[:5]}")
        members = [_build([v and v.get(name) for v in values]) for name in names]
        fields = tuple(Field(name, member.type) for name, member in zip(names, members))
        return Array(Type("struct", fields), len(values), None, members, valid)
    if family in ("list", "utf8", "binary"):
        if family == "list" and all(isinstance(v, np.ndarray) for v in some):
            child = _from_numpy(np.concatenate(some))
        elif family == "list":
            child = _build(list(itertools.chain.from_iterable(some)))
        else:
            some = [v.encode() for v in some] if family == "utf8" else some
            child = Array(Type("uint8"), sum(map(len, some)), np.frombuffer(b"".join(some), np.uint8))
        lengths = np.zeros(len(values), np.int64)
        lengths[where] = np.fromiter(map(len, some), np.int64, len(some))
        name = "large_" * (len(child) >= 2**31) + family
        kind = _list_of(child.type, name) if family == "list" else Type(name)
        return Array(kind, len(values), _offsets_of(lengths, kind), [child], valid)
    kind, dense = _scalars(family, some)
    data = np.zeros(len(values), dense.dtype)
    data[where] = dense
    return Array(kind, len(values), data, (), valid)

def _scalars(family: str, values: list) -> tuple[Type, np.ndarray]:
    if family in ("timestamp", "date", "duration"):
        zones = {_zone_name(v) for v in values}
        if "" in zones and len(zones) > 1:
            raise ValueError("some times of a column have a time zone and others have none; decide on one")
        values = [v.astimezone(dt.timezone.utc).replace(tzinfo=None) for v in values] if zones != {""} else values
        kind, dense = _from_moments(np.array(values, "m8" if family == "duration" else "M8"))
        return replace(kind, tz=zones.pop() if len(zones) == 1 else "UTC"), dense
    if family == "int" and not any(isinstance(v, np.integer) for v in values):
        low, high = min(values), max(values)
        if low < -(2**63) or high >= (2**64 if low >= 0 else 2**63):
            raise ValueError(f"the integers from {low} to {high} do not fit in 64 bits; store them as text")
        dense = np.array(values, np.int64 if high < 2**63 else np.uint64)
    else:
        dense = np.array(values)
        if dense.dtype.kind == "f" and any(isinstance(v, int) and abs(v) > 2**53 for v in values):
            raise ValueError("a column of floats has an integer beyond 2**53, which no float holds exactly")
    return _type_of_dtype(dense.dtype), dense

def _from_moments(a: np.ndarray) -> tuple[Type, np.ndarray]:
    """numpy has units from years to attoseconds, Arrow days (as 32-bit numbers) and seconds to nanoseconds."""
    kind = _type_of_dtype(a.dtype)
    return kind, a.astype("M8[D]" if kind == "date32" else kind.dtype, copy=False).astype(kind.dtype, copy=False)

def _zone_name(value) -> str:
    zone = getattr(value, "tzinfo", None)
    return "" if zone is None else getattr(zone, "key", None) or ("UTC" if zone == dt.timezone.utc else f"{value:%z}")

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
    kind, a = _from_moments(a) if a.dtype.kind in "mM" else (_type_of_dtype(a.dtype), a)
    a = np.ascontiguousarray(a.astype(kind.dtype, copy=False)).view()
    return Array(kind, len(a), a, (), valid)

# --- one type for all parts: unify, cast, concatenate ----------------------------------------------------------------

def unify(a: Type, b: Type) -> Type:
    """The narrowest type that holds the values of both without loss."""
    if a == b or b.name == "null":
        return a
    if a.name == "null":
        return b
    if "dictionary" in (a.name, b.name):
        return unify(*(t.item if t.name == "dictionary" else t for t in (a, b)))
    layouts, families = {a.layout, b.layout}, {t.name.removeprefix("large_") for t in (a, b)}
    if a.plain and b.plain and {a.dtype.kind, b.dtype.kind} <= set("iuf"):
        common = np.promote_types(a.dtype, b.dtype)
        if common.kind != "f" or "f" in (a.dtype.kind, b.dtype.kind):   # int64 and uint64: numpy's float64 would round
            return _type_of_dtype(common)
    elif a.unit and a.name == b.name and a.tz == b.tz:
        return max(a, b, key=lambda t: _UNITS.index(t.unit))
    elif layouts == {"bytes"} and len(families) == 1:
        return Type(f"large_{families.pop()}")
    elif layouts <= {"list", "fixed_list"}:
        name = a.name if (a.name, a.size) == (b.name, b.size) else "large_" * ("large_list" in (a.name, b.name)) + "list"
        return _list_of(unify(a.item, b.item), name, a.size if name == a.name else 0)
    elif layouts == {"struct"}:
        members = {f.name: f for f in a.fields}
        for f in b.fields:
            mine = members.get(f.name, f)
            with _naming(f"column {f.name!r}: "):
                members[f.name] = replace(mine, type=unify(mine.type, f.type), nullable=mine.nullable or f.nullable)
        return Type("struct", tuple(members.values()))
    raise ValueError(f"{a} and {b} have no common type; make them alike first")

@contextlib.contextmanager
def _naming(where: str):
    """Say in a ValueError where it arose."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None

def _nulls(kind: Type, n: int) -> Array:
    """n nulls of a type; with n = 0 its empty array."""
    sizes = {"fixed_list": n * kind.size, "struct": n}
    data = None if kind.dtype is None else np.zeros(n + (kind.layout in ("bytes", "list")), kind.dtype)
    items = [f.type for f in kind.fields] or [kind.item] * (kind.layout == "bytes")
    valid = np.zeros(n, bool) if n and kind.layout != "null" else None
    return Array(kind, n, data, [_nulls(item, sizes.get(kind.layout, 0)) for item in items], valid)

def _cast(a: Array, to: Type) -> Array:
    """The same values as another type; a ValueError where one would change."""
    source, data, children, present, child = a.type, None, (), a.present(), (a.children or (None,))[0]
    layouts = (source.layout, to.layout)
    if source == to:
        return a
    if source.name == "null":
        return _nulls(to, len(a))
    if source.name == "dictionary":
        plain = child.pick(a.codes()) if len(child) else _nulls(source.item, len(a))
        return _cast(Array(plain.type, len(a), plain.data, plain.children, present & plain.present()), to)
    if to.name == "dictionary":
        items, code_of, firsts = _cast(a, to.item), {}, []
        codes = [code_of.setdefault(value, len(code_of)) for value in map(repr, items.to_pylist())]
        data, firsts = _exact(np.array(codes, np.int64), Type("int64"), to.index, True), np.unique(codes, return_index=True)[1]
        children = [items.pick(firsts)]
    elif layouts == ("fixed", "fixed"):
        data = _exact(np.asarray(a.data), source, to, present)
    elif layouts == ("bytes", "bytes") and source.name.removeprefix("large_") == to.name.removeprefix("large_") or (
            layouts == ("list", "list")):
        offsets, items = a.used()
        data, children = _offsets_of(np.diff(offsets), to), [_cast(items, to.item)]
    elif layouts == ("fixed_list", "list"):
        data, children = _offsets_of(np.full(len(a), source.size), to), [_cast(child, to.item)]
    elif to.size and (layouts == ("list", "fixed_list") or source.name == "binary" and layouts[1] == "fixed"):
        starts, lengths = a.spans(slice(None))
        if (lengths[present] != to.size).any():
            raise ValueError(f"a row of {lengths[present][lengths[present] != to.size][0]} is no {to}")
        rows = np.where(present, starts, 0)[:, None] + np.arange(to.size)               # a null row takes any items
        items = child.pick(np.minimum(rows, len(child) - 1).ravel()) if len(child) else _nulls(child.type, rows.size)
        data, children = (items.data.view(to.dtype), ()) if layouts[1] == "fixed" else (None, [_cast(items, to.item)])
    elif layouts == ("fixed_list", "fixed_list") and source.size == to.size:
        children = [_cast(child, to.item)]
    elif layouts == ("struct", "struct") and {f.name for f in source.fields} <= {f.name for f in to.fields}:
        mine = dict(zip((f.name for f in source.fields), a.children))
        for f in to.fields:
            with _naming(f"column {f.name!r}: "):
                children += (_cast(mine.get(f.name, _nulls(Type("null"), len(a))), f.type),)
    else:
        raise ValueError(f"{source} cannot become {to}")
    return Array(to, len(a), data, children, a.valid)

def _exact(values: np.ndarray, source: Type, to: Type, present) -> np.ndarray:
    """Numbers and times as another dtype; only floats may be rounded, to other floats."""
    values = values.astype("M8[D]") if source.name == "date32" else values
    dtype = np.dtype("M8[D]") if to.name == "date32" else to.dtype
    kinds = values.dtype.kind + dtype.kind
    if kinds not in ("MM", "mm", "iM", "im") and not set(kinds) <= set("iuf"):
        raise ValueError(f"{source} cannot become {to}")
    with np.errstate(all="ignore"):
        out = values.astype(dtype)
        changed = (out.astype(values.dtype) != values) & present
    if changed.any() and kinds != "ff":
        raise ValueError(f"{values[changed][0]} is no {to}")
    return out.astype(to.dtype)

def _concat(kind: Type, arrays: list[Array]) -> Array:
    if len(arrays) < 2:
        return arrays[0] if arrays else _nulls(kind, 0)
    data, children = None, ()
    match kind.layout:
        case "fixed":
            data = np.concatenate([np.asarray(a.data) for a in arrays])
        case "dictionary":
            values = list({id(a.values): a.values for a in arrays}.values())
            if len(values) == 1:
                data, children = np.concatenate([a.data for a in arrays]), values
            else:                                       # encode what they hold together: each distinct value once
                starts = dict(zip(map(id, values), itertools.accumulate(map(len, values), initial=0)))
                both = _cast(_concat(kind.item, values), kind)
                data = np.concatenate([both.data[a.codes() + starts[id(a.values)]] for a in arrays])
                children = both.children
        case "bytes" | "list":
            data = _offsets_of(np.concatenate([a.spans(slice(None))[1] for a in arrays]), kind)
            children = [_concat(kind.item, [a.used()[1] for a in arrays])]
        case "struct" | "fixed_list":
            children = [_concat(f.type, [a.children[k] for a in arrays]) for k, f in enumerate(kind.fields)]
    valid = np.concatenate([a.present() for a in arrays]) if any(a.valid is not None for a in arrays) else None
    return Array(kind, sum(map(len, arrays)), data, children, valid)

# --- columns: chunks of rows, seen through a list of row numbers -----------------------------------------------------

class Lazy:
    """A list of n items, each made when it is first asked for."""

    def __init__(self, n: int, make):
        self.n, self.make = n, functools.cache(make)

    def __len__(self) -> int: return self.n
    def __getitem__(self, i: int): return self.make(i if i < self.n else [][i])

class Column:
    """Rows of one type. Its chunks, laid end to end, number their rows; `rows` (a range, or an array after a shuffle)
    says which of those are its own, in which order. Selecting changes `rows`, the chunks stay where they are."""

    def __init__(self, schema: Field, chunks, lengths=None, rows=None):
        self.schema, self.chunks = schema, chunks
        self.starts = list(itertools.accumulate(map(len, chunks) if lengths is None else lengths, initial=0))
        self.rows = range(self.starts[-1]) if rows is None else rows

    @property
    def type(self) -> Type: return self.schema.type
    def __len__(self) -> int: return len(self.rows)
    def __repr__(self) -> str: return repr(self[:10].combine())
    def __array__(self, dtype=None, copy=None): return np.array(self.to_numpy(), dtype, copy=copy)
    def __arrow_c_stream__(self, requested_schema=None): return _export_stream(self.schema, self.batches())
    def __reduce__(self): return type(self), (self.schema, list(self.batches()))

    def __getattr__(self, name: str):
        """What else there is to read (to_numpy, to_torch, values, ...) is read from the rows as one array."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.combine(), name)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.select(range(len(self))[i])
        row = int(self.rows[_row(i, len(self))])
        chunk = bisect_right(self.starts, row) - 1
        return self.chunks[chunk].at(row - self.starts[chunk])

    def __iter__(self):
        for start in range(0, len(self), 1000):
            yield from self[start : start + 1000].combine().to_pylist()

    def view(self, rows) -> Column:
        view = type(self).__new__(type(self))
        view.schema, view.chunks, view.starts, view.rows = self.schema, self.chunks, self.starts, rows
        return view

    def pieces(self) -> tuple[list[Array], np.ndarray | None]:
        """These rows chunk by chunk, and the order that puts them right (None: they are)."""
        if isinstance(self.rows, range):
            a, b = self.rows.start, self.rows.stop
            chunks = range(bisect_right(self.starts, a) - 1, bisect_right(self.starts, b - 1)) if a < b else ()
            spans = [(k, slice(max(a - self.starts[k], 0), min(b, self.starts[k + 1]) - self.starts[k])) for k in chunks]
            return [self.chunks[k].pick(span) for k, span in spans if span.start < span.stop], None
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
    def null_count(self) -> int: return sum(a.null_count for a in self.pieces()[0])

    @property
    def nbytes(self) -> int:
        if isinstance(self.rows, range):
            return sum(a.nbytes for a in self.pieces()[0])
        return sum(a.nbytes for a in self.chunks) * len(self) // max(1, self.starts[-1])    # their share: none is read

    def batches(self, max_bytes: int = 64 << 20):
        """The rows as arrays: as the chunks lie, or gathered a stretch at a time after a shuffle."""
        if isinstance(self.rows, range):
            yield from self.pieces()[0]
        else:
            step = max(1, max_bytes * len(self) // (self.nbytes + 1))
            yield from (self[start : start + step].combine() for start in range(0, len(self), step))

    def cast(self, kind) -> Column:
        """The same values as another type; a ValueError if one would change."""
        kind = as_type(kind)
        chunks = Lazy(len(self.chunks), lambda k: _cast(self.chunks[k], kind))
        return type(self)(replace(self.schema, type=kind), chunks, np.diff(self.starts).tolist(), self.rows)

    def slice(self, offset: int = 0, length: int | None = None) -> Column:
        if offset < 0 or (length or 0) < 0:
            raise ValueError(f"slice({offset}, {length}): offset and length must not be negative")
        return self[offset : None if length is None else offset + length]

    def select(self, indices) -> Column:
        """The rows of these numbers, in this order; negative ones count from the end."""
        n = len(self)
        if isinstance(indices, range) and indices.step == 1 and 0 <= indices.start and indices.stop <= n:
            return self.view(self.rows[indices.start : max(indices.start, indices.stop)])
        picks = np.asarray(indices if hasattr(indices, "__array__") else list(indices))
        if picks.size and (picks.dtype.kind not in "iu" or picks.ndim != 1):
            raise ValueError(f"select takes row numbers, not {picks.dtype}; for a mask there is filter")
        picks = picks.astype(np.int64)
        for bad in picks[(picks < -n) | (picks >= n)][:1].tolist():
            raise IndexError(f"row {bad} of {n:,} rows")
        picks = np.where(picks < 0, picks + n, picks)
        return self.view(picks + self.rows.start if isinstance(self.rows, range) else self.rows[picks])

    def filter(self, keep) -> Column:
        """The rows for which a function, or a mask of bools (null is no), says yes."""
        mask = array([bool(keep(row)) for row in self] if callable(keep) else keep)
        if len(mask) != len(self) or mask.type not in ("bool", "null"):
            raise ValueError(f"a mask of {len(mask):,} {mask.type} for {len(self):,} rows; it must be a bool a row")
        return self.select(np.flatnonzero(_cast(mask, Type("bool")).data & mask.present()))

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

    @classmethod
    def from_pydict(cls, columns: dict, schema=None) -> Table:
        schema = None if schema is None else Schema(schema)
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
        return cls(schema, [Array(schema.type, max(lengths.values(), default=0), None, arrays.values())])

    @classmethod
    def from_pylist(cls, rows: list[dict], schema=None) -> Table:
        """A name that a row lacks is null there."""
        names = Schema(schema).names if schema is not None else dict.fromkeys(itertools.chain.from_iterable(rows))
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
        spool, n = _Spool(), 0
        with open(path, "rb") as file:
            while lines := file.readlines(8 << 20):
                rows = {n + i: _json_row(line, f"{path}, line {n + i}") for i, line in enumerate(lines, 1) if line.strip()}
                n += len(lines)
                try:
                    spool.add(cls.from_pylist(list(rows.values()), schema))
                except ValueError:                                  # once more, row by row, to say which it was
                    for i, row in rows.items():
                        with _naming(f"{path}, line {i}: "):
                            spool.add(cls.from_pylist([row], schema))
        return spool.table(schema)

    def to_pydict(self) -> dict[str, list]: return {name: self[name].to_pylist() for name in self.schema.names}

    def to_jsonl(self, path) -> None:
        with _atomic(path) as file:
            for row in self:
                file.write(json.dumps(row, ensure_ascii=False, default=_json_value).encode() + b"\n")

    num_rows = property(Column.__len__)
    num_columns = property(lambda self: len(self.schema))
    column_names = property(lambda self: self.schema.names)

    def __repr__(self) -> str: return f"Table of {self.num_rows:,} rows\n{self.schema}"

    def __getitem__(self, key):
        """A row as a dict, a slice as a table, or a column by its name."""
        if not isinstance(key, str):
            return super().__getitem__(key)
        k = self.schema.position(key)
        chunks = Lazy(len(self.chunks), lambda i: self.chunks[i].children[k])
        return Column(self.schema.field(key), chunks, np.diff(self.starts).tolist(), self.rows)

    def _with(self, fields: list[Field], members) -> Table:
        """Other columns over the same rows: members(struct array, chunk number) gives their arrays."""
        schema = Schema(fields, self.schema.metadata)
        chunks = Lazy(len(self.chunks), lambda k: Array(schema.type, len(self.chunks[k]), None, members(self.chunks[k], k)))
        return Table(schema, chunks, np.diff(self.starts).tolist(), self.rows)

    def select_columns(self, names: list[str]) -> Table:
        places = [self.schema.position(name) for name in ([names] if isinstance(names, str) else names)]
        return self._with([self.schema.type.fields[p] for p in places], lambda a, _: [a.children[p] for p in places])

    def drop(self, names: list[str]) -> Table:
        gone = {self.schema.position(name) for name in ([names] if isinstance(names, str) else names)}
        return self.select_columns([name for i, name in enumerate(self.schema.names) if i not in gone])

    def rename(self, names: dict[str, str]) -> Table:
        for name in names:
            self.schema.position(name)
        return self._with([replace(f, name=names.get(f.name, f.name)) for f in self.schema], lambda a, _: a.children)

    def with_column(self, name: str, values, type=None) -> Table:
        """Add or replace a column. The rows of a shuffled table are gathered for it, as the new values have no others."""
        new = array(values, type)
        if len(new) != self.num_rows and self.schema.names:
            raise ValueError(f"column {name!r} has {len(new):,} rows, the table {self.num_rows:,}")
        whole = self if isinstance(self.rows, range) else Table(self.schema, list(self.batches()))
        if not self.schema.names:
            return Table.from_pydict({name: new})
        fields, starts = {f.name: f for f in self.schema}, whole.starts
        fields[name] = Field(name, new.type)
        chunks = whole.pieces()[0]
        starts = itertools.accumulate(map(len, chunks), initial=0)
        schema = Schema(list(fields.values()), self.schema.metadata)
        out = []
        for a, start in zip(chunks, starts):
            members = dict(zip(self.schema.names, a.children)) | {name: new.pick(slice(start, start + len(a)))}
            out.append(Array(schema.type, len(a), None, members.values()))
        return Table(schema, out)

    def map(self, fn, batched: bool = False, batch_size: int = 1000, workers: int = 0, remove_columns=()) -> Table:
        """Merge what fn returns for a row, {column: value}, into the row. With batched=True fn takes and returns
        {column: list}, and may change the number of rows if remove_columns names all that it leaves. workers: processes
        (forked, so fn may be any function)."""
        job = functools.partial(_map_batch, self, fn, batched, batch_size, set(remove_columns))
        starts, spool = range(0, len(self), batch_size), _Spool()
        with contextlib.ExitStack() as stack:
            results = map(job, starts)
            if workers:
                pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (job,))
                stack.callback(pool.shutdown, cancel_futures=True)
                results = pool.map(_work, starts)
            for part in _progress(results, len(starts)):
                spool.add(part)
        return spool.table(None if starts else self.drop(list(remove_columns)).schema)

def _map_batch(table: Table, fn, batched: bool, size: int, removed: set[str], start: int) -> Table:
    part = table[start : start + size]
    rows = [part.to_pydict()] if batched else part.to_pylist()
    results = [fn(dict(row)) for row in rows]
    for i, result in enumerate(results):
        if not isinstance(result, (dict, NoneType)):
            raise ValueError(f"map: row {start + i}: the function returned {type(result).__name__}; return a dict or None")
    results = [result or {} for result in results]
    names = dict.fromkeys(itertools.chain.from_iterable(results))
    new = results[0] if batched else {n: [r[n] if n in r else row.get(n) for r, row in zip(results, rows)] for n in names}
    kept = {f.name: f for f in part.schema if f.name not in removed and f.name not in new}
    arrays = {name: part[name].combine() for name in kept}
    for name, values in new.items():
        arrays[name] = array(values)
        if name in part.schema.names:
            with contextlib.suppress(ValueError):       # an int32 column stays one as long as its new values fit
                arrays[name] = _cast(arrays[name], part[name].type)
        if kept and len(arrays[name]) != len(part):
            raise ValueError(f"map: {len(part)} rows became {len(arrays[name])} in {name!r}; remove_columns must name "
                             f"the columns that cannot follow: {', '.join(kept)}")
    order = dict.fromkeys([name for name in part.schema.names if name in arrays] + list(arrays))
    fields = [kept.get(name) or Field(name, arrays[name].type) for name in order]
    return Table.from_pydict({name: arrays[name] for name in order}, Schema(fields, part.schema.metadata))

_job = None                             # what a worker process does, set as it is forked

def _start_worker(job) -> None:
    global _job
    _job = job

def _work(start: int) -> Table: return _job(start)

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
    if not tables:
        raise ValueError("concat needs at least one table")
    kind = functools.reduce(unify, (t.type for t in tables))
    parts = [t.cast(kind) for t in tables]
    chunks = [(t.chunks, k) for t in parts for k in range(len(t.chunks))]
    lengths = [n for t in parts for n in np.diff(t.starts).tolist()]
    whole = all(isinstance(t.rows, range) and len(t) == t.starts[-1] for t in parts)
    firsts = itertools.accumulate((t.starts[-1] for t in parts), initial=0)
    rows = None if whole else np.concatenate([np.asarray(t.rows, np.int64) + first for t, first in zip(parts, firsts)])
    return Table(parts[0].schema, Lazy(len(chunks), lambda i: chunks[i][0][chunks[i][1]]), lengths, rows)

class _Spool:
    """Tables that come one by one and become one: beyond 64 MB in temporary files that are mapped, not in memory."""

    def __init__(self):
        self.kind, self.recent, self.files, self.bytes = Type("struct"), [], [], 0

    def add(self, table: Table) -> None:
        self.kind = unify(self.kind, table.type)        # now, while the caller can say which row does not fit
        self.recent.append(table)
        self.bytes += table.nbytes
        if self.bytes > 64 << 20:
            with tempfile.TemporaryFile() as file:
                write(concat(self.recent), file, stream=True)
                self.files.append(read(file))
            self.recent, self.bytes = [], 0

    def table(self, schema=None) -> Table:
        if not self.files and not self.recent:
            return Table(Schema(schema or []), [])
        recent = [concat(self.recent)] if self.recent else []
        return concat(self.files + [Table(t.schema, [t.combine()]) for t in recent])

def _json_row(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object {{...}}, not {line[:40]!r}")
    return row

def _json_value(value):
    if isinstance(value, (dt.date, dt.timedelta, np.datetime64, np.timedelta64)):
        return value.isoformat() if isinstance(value, dt.date) else str(value)
    raise ValueError(f"JSON has no {type(value).__name__}; drop or convert that column first")

# --- flatbuffers: the metadata of a file -----------------------------------------------------------------------------

def _flat(root: dict) -> bytes:
    """A flatbuffer. A table is {slot: value}; a value is a (format, number), a table, bytes (a string), a list of tables,
    or a numpy array (a vector of structs). Every value gets 8 bytes, so that everything is aligned."""
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
        if isinstance(child, tuple):
            struct.pack_into("<" + child[0], out, slot, child[1])
        else:
            struct.pack_into("<I", out, slot, _flat_node(out, child) - slot)
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

    def follow(self, slot: int) -> tuple[int, int]:
        """Where a slot's reference leads, and the number that stands there: the length of a vector or string."""
        at = self.place(slot)
        at += at and struct.unpack_from("<I", self.buffer, at)[0]
        return at, struct.unpack_from("<I", self.buffer, at)[0] if at else 0

    def table(self, slot: int) -> _Flat | None:
        at = self.follow(slot)[0]
        return _Flat(self.buffer, at) if at else None

    def text(self, slot: int) -> bytes:
        at, size = self.follow(slot)
        return struct.unpack_from(f"{size}s", self.buffer, at + 4)[0] if at else b""

    def tables(self, slot: int) -> list[_Flat]:
        at, count = self.follow(slot)
        offsets = struct.unpack_from(f"<{count}I", self.buffer, at + 4) if at else ()
        return [_Flat(self.buffer, at + 4 + 4 * i + offset) for i, offset in enumerate(offsets)]

    def longs(self, slot: int, width: int) -> list[tuple]:
        """A vector of structs of `width` 64-bit integers."""
        at, count = self.follow(slot)
        numbers = iter(struct.unpack_from(f"<{count * width}q", self.buffer, at + 4) if at else ())
        return list(zip(*[numbers] * width))

# --- schemas as metadata ---------------------------------------------------------------------------------------------

_FORMATS = {2: "iB", 3: "h", 8: "h", 10: "h", 15: "i", 16: "i", 18: "h"}    # of the numbers in a Type union member
_DEFAULTS = {8: (1,), 18: (1,)}                                             # where the format's default is not 0

def _numbers(kind: Type) -> list[int]:
    return [{"size": kind.size, "unit": kind.unit and _UNITS.index(kind.unit)}.get(n, n) for n in _TYPES[kind.name][2]]

def _type_node(kind: Type) -> dict:
    node = {i: pair for i, pair in enumerate(zip(_FORMATS.get(_TYPES[kind.name][1], ""), _numbers(kind)))}
    return node | ({1: kind.tz.encode()} if kind.tz else {})

def _field_node(f: Field, ids) -> dict:
    encoding, kind = None, f.type
    if kind.name == "dictionary":
        encoding, kind = {0: ("q", next(ids)), 1: _type_node(kind.index), 2: ("B", kind.ordered)}, kind.item
    return {0: f.name.encode(), 1: ("B", f.nullable), 2: ("B", _TYPES[kind.name][1]), 3: _type_node(kind), 4: encoding,
            5: [_field_node(child, ids) for child in kind.fields], 6: _pairs_node(f.metadata)}

def _schema_node(schema: Field) -> dict:
    ids = itertools.count()
    return {1: [_field_node(f, ids) for f in schema], 2: _pairs_node(schema.metadata)}

def _pairs_node(metadata: dict[bytes, bytes]) -> list | None: return [{0: k, 1: v} for k, v in metadata.items()] or None
def _pairs(node: _Flat, slot: int) -> dict[bytes, bytes]: return {n.text(0): n.text(1) for n in node.tables(slot)}

def _read_schema(node: _Flat) -> tuple[Field, dict[int, Type]]:
    """The schema, and the value type of each dictionary by its id."""
    if node.number(0, "h"):
        raise ValueError("the file is big-endian; rewrite it on a little-endian machine")
    ids, budget = {}, itertools.count(len(node.buffer) // 8, -1)        # each field takes some bytes: ends cycles
    fields = [_read_field(child, ids, budget) for child in node.tables(1)]
    return Schema(fields, _pairs(node, 2)), ids

def _read_field(node: _Flat, ids: dict, budget, depth: int = 0) -> Field:
    name, member, encoding = node.text(0).decode(), node.number(2, "B"), node.table(4)
    if depth > 64 or next(budget) < 0:
        raise ValueError("the schema is nested without end")
    children = tuple(_read_field(child, ids, budget, depth + 1) for child in node.tables(5))
    kind = _read_type(member, node.table(3), children, name)
    if encoding:
        index = _read_type(2, encoding.table(1), (), name) if encoding.table(1) else Type("int32")
        ids[id_ := encoding.number(0, "q")] = kind
        kind = Type("dictionary", (Field("values", kind),), id_, index=index, ordered=bool(encoding.number(2, "B")))
    return Field(name, kind, bool(node.number(1, "B")), _pairs(node, 6))

_NAMES = {(row[1], *(n for n in row[2] if isinstance(n, int))): name for name, row in _TYPES.items()}

def _read_type(member: int, node: _Flat, children: tuple, column: str) -> Type:
    numbers = [node.number(i, code, *_DEFAULTS.get(member, ())) for i, code in enumerate(_FORMATS.get(member, ""))]
    name = _NAMES.get((member, *numbers)) or _NAMES.get((member,)) or _unsupported(column, member)
    size, unit = (numbers[0] if n in _TYPES[name][2] else 0 for n in ("size", "unit"))
    if size < 0 or (name == "fixed_size_binary" and not size) or (
            _TYPES[name][4] in ("list", "fixed_list")) and len(children) != 1:
        raise ValueError(f"column {column!r} has an impossible type: {name} of {size}")
    has_unit = "unit" in _TYPES[name][2]
    return Type(name, children, size, _UNITS[unit] if has_unit else "", node.text(1).decode() if name == "timestamp" else "")

def _unsupported(column: str, what) -> None:
    known = _UNSUPPORTED.get(what, what)
    raise ValueError(f"column {column!r} has the Arrow type {known}, which is not supported here; cast it before writing")

# --- buffers to arrays and back: shared by files and the C interface -------------------------------------------------

def _assemble(kind: Type, n: int, nulls: int, buffer, child, view_buffers, dictionary) -> Array:
    """An array of n rows. buffer(size) gives the next buffer's first bytes, child(type) the next child."""
    layout, children, data = kind.layout, (), None
    if n > _MAX_BODILESS and (layout == "null" or kind.size == 0 and layout == "fixed_list" or kind == "struct<>"):
        raise ValueError(f"{n:,} rows without any bytes are more than the {_MAX_BODILESS:,} that are believed")
    bits = buffer((n + 7) // 8 if nulls else 0) if layout != "null" else None
    valid = Bits(bits, 0, n) if nulls and layout != "null" else None
    if kind.name == "bool":
        data = Bits(buffer((n + 7) // 8), 0, n)
    elif layout in ("bytes", "list"):
        data = buffer((n + 1) * kind.dtype.itemsize if n else 0).view(kind.dtype) if n else _drop(buffer(0), kind)
        size = int(data[-1])
        if size < 0:
            raise _damaged(kind)
        children = [child(kind.item)] if layout == "list" else [Array(Type("uint8"), size, buffer(size))]
    elif kind.dtype is not None:
        data = buffer(n * kind.dtype.itemsize).view(kind.dtype)
    if layout == "view":
        return _from_views(_readable(kind), data, view_buffers(), valid)
    if layout == "dictionary":
        children = [dictionary(kind)]
    if layout in ("struct", "fixed_list"):
        rows = n * kind.size if layout == "fixed_list" else n
        children = [child(f.type) for f in kind.fields]
        if any(len(c) < rows for c in children):
            raise _damaged(kind)
        children = [c.pick(slice(0, rows)) if len(c) > rows else c for c in children]
    return Array(_readable(kind), n, data, children, valid)

def _drop(_, kind: Type) -> np.ndarray: return np.zeros(1, kind.dtype)

def _readable(kind: Type) -> Type:
    """The type as which a type is read: views, which point all over the place, become text in one piece."""
    if "_view" not in kind.text:
        return kind
    name = {"string_view": "large_utf8", "binary_view": "large_binary"}.get(kind.name, kind.name)
    return replace(kind, name=name, fields=tuple(replace(f, type=_readable(f.type)) for f in kind.fields))

def _from_views(kind: Type, views: np.ndarray, buffers: list[np.ndarray], valid) -> Array:
    """A view is a length and then either up to 12 bytes or (4 bytes, buffer, position)."""
    views, sizes = views.view("<i4").reshape(-1, 4), np.array([len(b) for b in buffers] or [0])    # [rows, 4]
    lengths = np.where(True if valid is None else np.asarray(valid), views[:, 0], 0).astype(np.int64)
    far = lengths > 12
    buffer, position = (np.where(far, views[:, k], 0).astype(np.int64) for k in (2, 3))
    if (lengths < 0).any() or (buffer < 0).any() or (buffer >= len(sizes)).any() or (position < 0).any() or (
            far & (position + lengths > sizes[np.clip(buffer, 0, len(sizes) - 1)])).any():
        raise _damaged(kind)
    joined = np.concatenate([views.reshape(-1).view(np.uint8), *buffers])              # short ones stand in the views
    base = 4 * views.size + np.cumsum(sizes) - sizes
    starts = np.where(far, base[buffer] + position, np.arange(len(views)) * 16 + 4)
    text = Array(Type("uint8"), len(joined), joined)._gather(starts, lengths)
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

def _padding(n: int) -> bytes: return bytes(-n % 64)        # 64 bytes: a cache line, and the widest vector register

@contextlib.contextmanager
def _atomic(path):
    """A file that appears under its name whole and on disk, or not at all."""
    final = os.path.realpath(path)
    if os.path.isdir(final) or not os.path.isdir(os.path.dirname(final)):
        raise FileNotFoundError(f"{path} cannot be a file: it is a directory, or is in none; make the directory first")
    temporary = f"{final}.{uuid.uuid4().hex}.tmp"
    file = open(temporary, "xb", buffering=1 << 20)
    try:
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

class Writer:
    """Write a file batch by batch; it appears when the `with` block ends, if it ends well."""

    def __init__(self, path, schema, stream: bool = False):
        self.schema, self.stream, self.known, self.at = Schema(schema), stream, {}, 0
        self.blocks = {_SCHEMA: [], _DICTIONARY: [], _BATCH: []}
        node, self._stack = _schema_node(self.schema), contextlib.ExitStack()
        self.file = path if hasattr(path, "write") else self._stack.enter_context(_atomic(path))
        self._put(b"" if stream else b"ARROW1\0\0")
        self._message(_SCHEMA, node, [])

    def __enter__(self) -> Writer: return self
    def close(self) -> None: self.__exit__(None, None, None)

    def __exit__(self, kind, error, trace) -> None:
        if kind:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._put(struct.pack("<ii", -1, 0))
            if not self.stream:
                blocks = [np.array(self.blocks[k], "<i8").reshape(-1, 3) for k in (_DICTIONARY, _BATCH)]
                footer = _flat({0: ("h", 4), 1: _schema_node(self.schema), 2: blocks[0], 3: blocks[1]})
                self._put(footer + struct.pack("<i", len(footer)) + b"ARROW1")

    def write(self, rows: Table | list[dict] | dict[str, list]) -> None:
        """Add a table, a list of rows or a dict of columns; small pieces of it are joined to batches of a MiB or more."""
        if not isinstance(rows, Table):
            rows = (Table.from_pydict if isinstance(rows, dict) else Table.from_pylist)(rows)
        pieces = []
        for piece in itertools.chain(rows.cast(self.schema.type).batches(), [None]):
            pieces += [piece] if piece is not None else []
            if pieces and (piece is None or sum(a.nbytes for a in pieces) >= 1 << 20):
                header, buffers = self._record_batch(_concat(self.schema.type, pieces))
                self._message(_BATCH, header, buffers)
                pieces = []

    def _put(self, data) -> None:
        self.at += self.file.write(data)

    def _message(self, kind: int, header: dict, buffers: list[np.ndarray]) -> None:
        body = sum(b.nbytes + len(_padding(b.nbytes)) for b in buffers)
        metadata = _flat({0: ("h", 4), 1: ("B", kind), 2: header, 3: ("q", body)})
        metadata += _padding(self.at + 8 + len(metadata))
        self.blocks[kind].append((self.at, 8 + len(metadata), body))
        self._put(struct.pack("<ii", -1, len(metadata)) + metadata)
        for b in buffers:
            self._put(memoryview(b.view(np.uint8)))
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
        if a.type.name == "dictionary":
            a = self._dictionary(a, next(ids))
        own, children = _dismantle(a)
        nodes.append((len(a), a.null_count))
        buffers += own
        for child in children:
            self._flatten(child, nodes, buffers, ids)

    def _dictionary(self, a: Array, id_: int) -> Array:
        """Write what the file does not have of a dictionary yet, and point the array at the file's."""
        known = self.known.get(id_)
        if known is a.values:
            return a
        if known is not None:
            a = _concat(a.type, [Array(a.type, 0, a.data[:0], [known]), a])     # the known values stay in front
        new = a.values[0 if known is None else len(known) :]
        if known is None or len(new):
            header, buffers = self._record_batch(Array(Type("struct"), len(new), None, [new]))
            self._message(_DICTIONARY, {0: ("q", id_), 1: header, 2: ("B", known is not None)}, buffers)
        self.known[id_] = a.values
        return a

def write(table: Table, path, stream: bool = False) -> None:
    """Write a table: the file format, or the stream format, which datasets reads."""
    with Writer(path, table.schema, stream) as writer:
        writer.write(table)

def read(path) -> Table:
    """Map a file of either framing. Only its metadata is read; batches are decoded, not copied, when they are touched."""
    with contextlib.nullcontext(path) if hasattr(path, "fileno") else open(path, "rb") as file, _damage_is_named(path):
        fd, size = file.fileno(), os.fstat(file.fileno()).st_size
        head, tail, footer = os.pread(fd, 6, 0), os.pread(fd, 10, max(0, size - 10)), None
        if head == b"ARROW1":
            length = struct.unpack_from("<i", tail)[0] if size >= 18 else 0
            if tail[4:] != head or not 0 < length <= size - 18:
                raise ValueError("it was cut off: the end mark is missing")
            footer = _Flat(os.pread(fd, length, size - 10 - length))
        elif size < 8 or head[:4] != b"\xff" * 4 and not 0 < struct.unpack_from("<i", head)[0] < size:
            raise ValueError(f"it begins with {head!r}, as no Arrow file does" if head else "it is empty")
        # private pages: whoever writes to a tensor or array over them gets a copy, not a crash and not a changed file
        memory = mmap.mmap(fd, size, mmap.MAP_PRIVATE | 0x4000, mmap.PROT_READ | mmap.PROT_WRITE)   # MAP_NORESERVE
        memory = np.frombuffer(memory, np.uint8)
        memory.flags.writeable = False
        schema, dictionaries, batches, lengths = None, {}, [], []
        if footer:
            schema, values = _read_schema(footer.table(1))
        for kind, header, start, length in _messages(fd, size, footer):
            body = memory[start : start + length]
            if kind == _SCHEMA and schema is None:
                schema, values = _read_schema(header)
            elif kind == _DICTIONARY and schema:
                id_, data = header.number(0, "q"), header.table(1)
                new = _decode(Type("struct", (Field("", values[id_]),)), data, body, dictionaries).children[0]
                if not footer:
                    dictionaries = dict(dictionaries)       # a stream may replace one: earlier batches keep the old
                dictionaries[id_] = _concat(new.type, [dictionaries[id_], new]) if header.number(2, "B") else new
            elif kind == _BATCH and schema:
                batches.append((header, body, dictionaries))
                lengths.append(header.number(0, "q"))
                if not 0 <= lengths[-1] <= max(_MAX_BODILESS, length << 20):
                    raise ValueError(f"a batch claims to have {lengths[-1]:,} rows")
            else:
                raise ValueError(f"message {kind} where none can be")
        if schema is None:
            raise ValueError("it has no schema")

    def decode(k: int) -> Array:
        with _damage_is_named(path):
            return _decode(schema.type, *batches[k])
    public = replace(schema, type=_readable(schema.type))
    return Table(public, Lazy(len(batches), decode), lengths)

@contextlib.contextmanager
def _damage_is_named(path):
    try:
        yield
    except (ValueError, struct.error, KeyError, IndexError, AttributeError, StopIteration, OverflowError) as error:
        raise ValueError(f"{path} is not an Arrow file that can be read: {error or 'its metadata is damaged'}") from error

def _messages(fd: int, size: int, footer: _Flat | None):
    """(what it holds, its header, start of the body, length of the body) of every message: those in the footer's lists,
    or one after the other in a stream. Metadata is read, not mapped: a page that is touched through a map counts, with
    its neighbours, as memory of this process."""
    if footer:
        for at, *_ in footer.longs(2, 3) + footer.longs(3, 3):
            if not (message := _message(fd, at, size)):
                raise ValueError("its footer is damaged")
            yield message
        return
    at = 0
    while message := _message(fd, at, size):
        yield message
        at = message[2] + message[3]

def _message(fd: int, at: int, end: int) -> tuple | None:
    head = os.pread(fd, 1024, at) if 0 <= at <= end - 4 else b""
    mark, size = struct.unpack_from("<ii", head.ljust(8, b"\xff"))
    start, size = (at + 8, size) if mark == -1 else (at + 4, mark)                      # before 2019 there was no mark
    if size == 0:
        return None
    if not 0 < size <= end - start:
        raise ValueError("it was cut off, or a length in it is damaged")
    message = _Flat(head[start - at :] if start - at + size <= len(head) else os.pread(fd, size, start))
    length = message.number(3, "q")
    if not 0 <= length <= end - start - size:
        raise ValueError("it was cut off, or a length in it is damaged")
    if message.number(0, "h") < 3:
        raise ValueError("it is of an Arrow version before 0.8; rewrite it with pyarrow")
    return message.number(1, "B"), message.table(2), start + size, length

def _decode(kind: Type, header: _Flat, body: np.ndarray, dictionaries: dict[int, Array]) -> Array:
    """A record batch as a struct array of views of its body."""
    nodes, places, counts = iter(header.longs(1, 2)), iter(header.longs(2, 2)), iter(header.longs(4, 1))
    codec = header.table(3)

    def buffer(size: int | None) -> np.ndarray:
        start, length = next(places)
        if start < 0 or length < 0 or start + length > len(body):
            raise ValueError("a buffer lies outside of the file")
        data = body[start : start + length]
        data = _decompress(data, codec.number(0, "B")) if codec and length else data
        if size is not None and len(data) < size:
            raise ValueError("a buffer is too short for its rows")
        return data if size is None else data[:size]

    def child(kind: Type) -> Array:
        n, nulls = next(nodes)
        if n < 0 or not 0 <= nulls <= n:
            raise ValueError("a column has an impossible length")
        return _assemble(kind, n, nulls, buffer, child, lambda: [buffer(None) for _ in range(next(counts)[0])],
                         lambda kind: dictionaries[kind.size])

    n = header.number(0, "q")
    children = [child(f.type) for f in kind.fields]
    if any(len(c) != n for c in children):
        raise ValueError("the columns of a batch differ in length")
    return Array(_readable(kind), n, None, children)

def _decompress(data: np.ndarray, codec: int) -> np.ndarray:
    size, data = int(data[:8].view("<i8")[0]), data[8:]
    if size == -1:                                          # left as it was, since it did not get smaller
        return data
    if not 0 <= size <= len(data) << 17:
        raise ValueError("a compressed buffer claims an impossible size")
    package = ("lz4.frame", "zstandard")[codec]
    try:
        library = importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise ValueError(f"it is compressed; pip install {name} to read it, or write it uncompressed") from None
    try:
        out = library.LZ4FrameDecompressor().decompress(data.tobytes(), size) if codec == 0 else (
            library.ZstdDecompressor().stream_reader(data.tobytes()).read(size))
    except Exception as error:                              # each library has errors of its own
        raise ValueError(f"a compressed buffer is damaged: {error}") from None
    if len(out) != size:
        raise ValueError("a compressed buffer is damaged")
    return np.frombuffer(out, np.uint8)

# --- the C interface: tables pass between libraries as pointers ------------------------------------------------------

def _words(names: str):
    """A C struct of 64-bit numbers and pointers."""
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
_capsules = []              # (capsule, the C stream in it)

@functools.cache
def _release_function(layout) -> int:
    """The address of `void release(c) { c->release = NULL; *c->private = 1; }` in machine code. Not a Python callback:
    this is called from any thread, at exit, and while an exception is pending, when running Python would lose it."""
    release, private = layout.release.offset, layout.private.offset
    machine = os.uname().machine
    if machine == "x86_64":
        code = bytes([0x48, 0x8B, 0x47, private,                    # mov rax, [rdi + private]
                      0x48, 0xC7, 0x47, release, 0, 0, 0, 0,        # mov qword [rdi + release], 0
                      0x48, 0xC7, 0x00, 1, 0, 0, 0, 0xC3])          # mov qword [rax], 1; ret
    elif machine == "aarch64":                                      # ldr x1; str xzr; mov x2, 1; str x2, [x1]; ret
        code = struct.pack("<5I", 0xF9400001 | private << 7, 0xF900001F | release << 7, 0xD2800022, 0xF9000022, 0xD65F03C0)
    else:
        raise ValueError(f"tables cannot be lent to other libraries on {machine}; write a file instead")
    with open(os.memfd_create("release"), "wb") as file:
        file.write(code)
        file.flush()
        return np.frombuffer(_forever(mmap.mmap(file.fileno(), len(code), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)),
                             np.uint8).ctypes.data

def _forever(x, kept=[]):                                           # noqa: B006
    kept.append(x)
    return x

def _lend(c, parts: list, *alive) -> None:
    """Keep what c points to until c is released. A part (a child) that is taken out of c goes on living by itself."""
    flag = ctypes.c_int64(0)
    c.release, c.private = _release_function(type(c)), ctypes.addressof(flag)
    _lent[c.private] = flag, parts, alive

def _sweep(phase: str = "stop", info=None) -> None:
    """Let go of what has been released. Called whenever something is lent, and by full garbage collections."""
    if phase != "stop" or info and info["generation"] < 2:
        return
    for entry in [entry for entry in _capsules if sys.getrefcount(entry[0]) <= 2]:      # held by nobody but this list
        _capsules.remove(entry)
        if entry[1].release:                                        # and nobody took the stream out of it
            _forget(entry[1].private)
    while released := [address for address, (flag, *_) in list(_lent.items()) if flag.value]:
        for address in released:                                    # which may release more, lent to and fro
            _forget(address)

def _forget(address: int) -> None:
    for part in _lent.pop(address, (None, ()))[1]:
        if part.release:
            _forget(part.private)

gc.callbacks.append(_sweep)

def _export_field(f: Field, c=None):
    c, kind = c or _CSchema(), f.type
    stored = kind.index or kind
    code = _TYPES[stored.name][0] + (str(kind.size) if "size" in _TYPES[stored.name][2] else "")
    if kind.unit:
        code += dict(zip(_UNITS, "smun"))[kind.unit] + ":" * (kind.name == "timestamp") + kind.tz
    pairs = [struct.pack("<i", len(x)) + x for pair in f.metadata.items() for x in pair]
    texts = [code.encode(), f.name.encode(), struct.pack("<i", len(f.metadata)) + b"".join(pairs)]
    texts = [ctypes.create_string_buffer(text) for text in texts]
    c.format, c.name, c.metadata = map(ctypes.addressof, texts)
    c.metadata = c.metadata if pairs else 0
    c.flags = kind.ordered | f.nullable << 1
    parts = [_export_field(part) for part in kind.fields]
    if kind.name == "dictionary":
        c.dictionary = ctypes.addressof(parts[0])
        _lend(c, parts, texts)
    else:
        _lend(c, parts, texts, _point_at(c, "children", parts))
    return c

def _export_array(a: Array, c=None):
    c = c or _CArray()
    buffers, children = _dismantle(a)
    buffers = [None if b is None else np.ascontiguousarray(b) for b in buffers]
    pointers = (ctypes.c_int64 * len(buffers))(*(0 if b is None else b.ctypes.data for b in buffers))
    c.length, c.null_count, c.n_buffers, c.buffers = len(a), a.null_count, len(buffers), ctypes.addressof(pointers)
    parts = [_export_array(child) for child in children]
    alive = _point_at(c, "children", parts), pointers, buffers
    if a.type.name == "dictionary":
        parts.append(_export_array(a.values))
        c.dictionary = ctypes.addressof(parts[0])
    _lend(c, parts, *alive)
    return c

def _point_at(c, name: str, parts: list):
    pointers = (ctypes.c_int64 * len(parts))(*map(ctypes.addressof, parts))
    c.n_children, c.children = len(parts), ctypes.addressof(pointers)
    return pointers

def _answer(fill):
    """One of a stream's two questions as a C function: fill(state, address) answers it, or leaves a message."""
    def function(stream: int, out: int) -> int:
        state = _lent[_CStream.from_address(stream).private][2][0]
        try:
            fill(state, out)
            return 0
        except Exception as error:
            state["error"] = ctypes.create_string_buffer(str(error).encode())
            return 5                                                        # EIO
    return _OnTwoPointers(function)

def _next_array(state: dict, out: int) -> None:
    a = next(state["arrays"], None)
    ctypes.memset(out, 0, ctypes.sizeof(_CArray))                           # no more arrays: one that is released
    if a is not None:
        _export_array(a, _CArray.from_address(out))

@ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
def _last_error(stream: int) -> int:
    message = _lent[_CStream.from_address(stream).private][2][0].get("error")
    return ctypes.addressof(message) if message else 0

def _fill_schema(state: dict, out: int) -> None:
    ctypes.memset(out, 0, ctypes.sizeof(_CSchema))
    _export_field(state["schema"], _CSchema.from_address(out))

_get_schema, _get_next = _answer(_fill_schema), _answer(_next_array)

def _export_stream(schema: Field, arrays):
    """A capsule with a C stream of arrays, which are made when they are asked for. The capsule has no destructor, which
    could not be Python either."""
    _sweep()
    stream = _CStream(*(ctypes.cast(f, ctypes.c_void_p).value for f in (_get_schema, _get_next, _last_error)))
    _lend(stream, [], {"schema": schema, "arrays": iter(arrays)})
    capsule = _new_capsule(ctypes.addressof(stream), b"arrow_array_stream", None)
    _capsules.append((capsule, stream))
    return capsule

def _let_go(c) -> None:
    if c.release:
        _OnPointer(c.release)(ctypes.addressof(c))

class _Borrowed:
    """Keeps what another library lent us; gives it back when the last array over it is gone."""

    def __init__(self, layout, address: int = 0):
        self.c = layout()
        if address:                                         # moved: the source is empty from now on
            ctypes.memmove(ctypes.addressof(self.c), address, ctypes.sizeof(layout))
            layout.from_address(address).release = 0

    def __del__(self): _let_go(self.c)

class _Memory:
    """Foreign memory as numpy sees it."""

    def __init__(self, address: int, size: int, owner):
        self.owner = owner
        self.__array_interface__ = {"data": (address, True), "shape": (size,), "typestr": "|u1", "version": 3}

def _import(source) -> tuple[Field, list[Array]]:
    """The schema and the arrays of an object with __arrow_c_stream__ or __arrow_c_array__."""
    if not hasattr(source, "__arrow_c_stream__"):
        if not hasattr(source, "__arrow_c_array__"):
            raise ValueError(f"{type(source).__name__} does not speak the Arrow C interface")
        schema, data = source.__arrow_c_array__()
        top = _import_field(_CSchema.from_address(_address(schema, b"arrow_schema")))
        array = _Borrowed(_CArray, _address(data, b"arrow_array"))
        return replace(top, type=_readable(top.type)), [_import_array(array.c, top.type, array)]
    capsule = source.__arrow_c_stream__()
    stream = _Borrowed(_CStream, _address(capsule, b"arrow_array_stream"))
    schema, arrays = _Borrowed(_CSchema), []
    _ask(stream.c, stream.c.get_schema, schema.c)
    top = _import_field(schema.c)
    while True:
        array = _Borrowed(_CArray)
        _ask(stream.c, stream.c.get_next, array.c)
        if not array.c.release:
            return replace(top, type=_readable(top.type)), arrays
        arrays.append(_import_array(array.c, top.type, array))

def _ask(stream, function: int, out) -> None:
    if _OnTwoPointers(function)(ctypes.addressof(stream), ctypes.addressof(out)):
        message = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int64)(stream.get_last_error)(ctypes.addressof(stream))
        raise ValueError(f"the other library failed: {(message or b'').decode(errors='replace')}")

_LETTERS = {row[0]: name for name, row in _TYPES.items()}

def _import_field(c) -> Field:
    code, name = (ctypes.string_at(at).decode() if at else "" for at in (c.format, c.name))
    kind_name = _LETTERS.get(code) or _LETTERS.get(re.match(r"ts|tD|\+?w:|", code)[0])
    if kind_name is None:
        _unsupported(name, next((letters for letters in _UNSUPPORTED if isinstance(letters, str) and code.startswith(letters)), code))
    letters = _TYPES[kind_name][0]
    unit = dict(zip("smun", _UNITS))[code[2]] if letters in ("ts", "tD") else ""
    children = (ctypes.c_int64 * c.n_children).from_address(c.children) if c.n_children else ()
    fields = tuple(_import_field(_CSchema.from_address(child)) for child in children)
    kind = Type(kind_name, fields, int(code[len(letters):]) if letters.endswith("w:") else 0, unit,
                code[4:] if letters == "ts" else "")
    if c.dictionary:
        values = _import_field(_CSchema.from_address(c.dictionary))
        kind = Type("dictionary", (values,), index=kind, ordered=bool(c.flags & 1))
    return Field(name, kind, bool(c.flags & 2), _import_pairs(c.metadata))

def _import_pairs(address: int) -> dict[bytes, bytes]:
    if not address:
        return {}
    count, at, texts = ctypes.c_int32.from_address(address).value, address + 4, []
    for _ in range(2 * count):
        size = ctypes.c_int32.from_address(at).value
        texts.append(ctypes.string_at(at + 4, size))
        at += 4 + size
    return dict(zip(texts[::2], texts[1::2]))

def _import_array(c, kind: Type, owner) -> Array:
    n = c.length + c.offset
    pointers = list((ctypes.c_int64 * c.n_buffers).from_address(c.buffers)) if c.n_buffers else []
    children = iter((ctypes.c_int64 * c.n_children).from_address(c.children) if c.n_children else ())
    left = iter(pointers)

    def at(address: int, size: int) -> np.ndarray:
        return np.asarray(_Memory(address, size, owner)) if address and size else np.zeros(size, np.uint8)

    def view_buffers() -> list[np.ndarray]:
        sizes = at(pointers[-1], 8 * (len(pointers) - 3)).view("<i8").tolist()
        return [at(address, size) for address, size in zip(pointers[2:-1], sizes)]

    nulls = c.null_count if pointers and pointers[0] else 0
    whole = _assemble(kind, n, nulls, lambda size: at(next(left), size),
                      lambda kind: _import_array(_CArray.from_address(next(children)), kind, owner), view_buffers,
                      lambda kind: _import_array(_CArray.from_address(c.dictionary), kind.item, owner))
    return whole.pick(slice(c.offset, n)) if c.offset else whole

# --- command line and demo -------------------------------------------------------------------------------------------
