"""kernels: Triton kernels and their plain twins.

Each operation is a public function with three things side by side: a Triton kernel, a torch reference that states the
mathematics in a few lines, and why the kernel is fast: the bytes it moves, the operations it does, and which is the
limit. A fast kernel reads each input once, keeps what it computes in registers, and writes each output once.

    HBM  4.8 TB/s  ------->  L2  ------->  shared memory  ------->  tensor cores, 990 TFLOP/s in bf16
                             50 MB         228 KB an SM             registers, 256 KB an SM (132 SMs)

This chip, an H200 by its data sheet, does 200 operations in the time that it moves one byte.

Public names: flash_attention over packed sequences; paged_attention for decoding and store_kv for its cache; rms_norm;
qkv_rotary; swiglu; linear_cross_entropy, the loss without the logits; sample.

A CUDA tensor takes the kernel, a CPU tensor the reference, and under TRITON_INTERPRET=1 a CPU tensor in fp32 takes the
kernel too, line by line in numpy. fp64 is for checking and always takes the reference.

Forward, a row's result depends on this row alone, bit for bit: not on the other rows, nor on how many there are. So a
model that generates, a few rows at a time, computes exactly what it computes in training. Backward passes use no
atomics and repeat bit for bit. Forward, nothing waits for the GPU, so all of it can be recorded into a CUDA graph.

    python kernels.py        CPU: every kernel, interpreted, against its twin.  GPU: the table of speeds as well
"""
import os
import sys
from functools import cache, partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd import Function

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read by triton when a kernel is defined, so set before the import
import triton
import triton.language as tl
from triton.language import constexpr       # known when a kernel is compiled; each value makes another kernel
from triton.tools.tensor_descriptor import TensorDescriptor

# --- what all kernels share ------------------------------------------------------------------------------------------

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
MASKED = constexpr(-1e30)           # the score of what is masked: finite, since -inf minus -inf would be NaN
LOG2E = constexpr(1.4426950408889634)       # the GPU has exp2, not exp
LN2 = constexpr(0.6931471805599453)
_tiled = TensorDescriptor.from_tensor       # (tensor, shape of the tiles that Hopper's copy engine reads it in)

def _on_triton(x):
    """Whether the kernel takes it: not if it is empty, so that no kernel has to think of that."""
    fits = x.dtype != torch.float64 if x.is_cuda else INTERPRET and x.dtype == torch.float32
    return fits and x.numel() > 0

def _wide(x):
    """In the precision that references compute in: fp32, or fp64 if that is what came."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def _ceil(a, b):                    # triton.cdiv takes 5 us a call
    return -(-a // b)

@cache
def _processors(device):            # interpreted: a few, so that there too work is split into parts
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

@triton.jit
def _load(pointers, mask):
    """In fp32, and zeros where it is masked."""
    return tl.load(pointers, mask, 0.0).to(tl.float32)

@triton.jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="tf32x3")      # of fp32: three products of tf32's 10 bits

# --- flash attention: softmax(q k') v without the scores ever leaving the chip ---------------------------------------

# FlashAttention-2 (Dao, arXiv 2307.08691): 2 * L * L * heads * dim operations forward, 2.5 times that backward,
# thousands for every byte of q, k, v and out: the tensor cores are the limit, and beside them exp2 (for 128 x 128
# scores at dim 128 the products take 2048 cycles, exp2 1024). So: no masks but at the diagonal; the scale folded into
# the exponent; the longest rows first, so that the last programs are short; the heads of a group side by side, so that
# they find their keys in L2. One kernel owns queries (out, or dq), one owns keys (dk, dv): each sums in registers in a
# fixed order, for 7 products backward instead of 5 with atomics.
# Tiles are BM queries by BN keys. What a program has many of comes by the copy engine, and the last tile of a sequence
# runs into the next one: keys from there are masked, queries have a log-sum-exp of 1e30. What a program reads once it
# loads by pointers: as the left side of a product that stays in shared memory; what the engine brings would go to
# registers.

KEYS = 64           # a tile, forward and in paged attention: sums over keys have one order in both

def _tiles(x, queries, keys, least=32):
    """32 scores a thread. Of fp32, which takes three products and twice the space, the least."""
    if x.itemsize == 4:
        return dict(BM=32, BN=least, num_warps=4, num_stages=1)
    return dict(BM=queries, BN=keys, num_warps=queries * keys // 1024, num_stages=3)

@triton.jit
def _halve(x, TIMES: constexpr):
    """Adds the right half of the columns to the left half, so many times. Here the order of a sum is in the program;
    that of tl.sum follows from where a tile lies in registers, which differs from kernel to kernel."""
    for _ in tl.static_range(TIMES):
        left, right = tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))
        x = left + right
    return x

@triton.jit
def _weigh(scores, values, scale, acc, top, mass):
    """A step of the online softmax, y = scores * scale * LOG2E: top is the largest y so far, acc the sum of exp2(y -
    top) * values, mass that of exp2(y - top), in 32 columns that _halve adds up at the end."""
    new_top = tl.maximum(top, tl.max(scores, 1) * (scale * LOG2E))
    shrink = tl.exp2(top - new_top)[:, None]
    p = tl.exp2(scores * (scale * LOG2E) - new_top[:, None])            # [rows, keys]
    return _dot(p.to(values.dtype), values, acc * shrink), new_top, mass * shrink + _halve(p, 1)

@triton.jit
def _sequence(ends):
    """Where this program's sequence starts, and how long it is."""
    start = tl.load(ends + tl.program_id(1))
    return start, tl.load(ends + tl.program_id(1) + 1) - start

@triton.jit
def _rows(start, length, first, ROWS: constexpr, DIM: constexpr):
    """Where rows of this program's head are, from `first` in the sequence on, and which exist."""
    row = first + tl.arange(0, ROWS)[:, None]
    token = (start + row).to(tl.int64)
    return (token * tl.num_programs(0) + tl.program_id(0)) * DIM + tl.arange(0, DIM)[None, :], row < length

@triton.jit
def _slot(start):
    """Where the sequence lies in lse and delta: from a multiple of 128 on, so that no tile has two owners."""
    return (start // 128 + tl.program_id(1)) * 128

@triton.jit
def _attention_queries(q, k, v, out, lse, dout, delta, dq, q_ends, k_ends, scale, slots,
                       GROUP: constexpr, DIM: constexpr, BM: constexpr, BN: constexpr):
    """Forward: out, and the log-sum-exp in units of q k', unscaled. Backward, where there is a dout: dq = scale * sum
    over keys of ds k, where ds = p * (dout v' - delta) and delta = sum(out * dout)."""
    head = tl.program_id(0)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * BM            # the longest rows first
    q_start, q_len = _sequence(q_ends)
    k_start, k_len = _sequence(k_ends)
    if first >= q_len:
        return
    at, inside = _rows(q_start, q_len, first, BM, DIM)
    rows = first + tl.arange(0, BM)
    keys = tl.arange(0, BN)
    last_key = rows + k_len - q_len                     # that a query sees: the last query sees every key
    full = (first + k_len - q_len + 1) // BN * BN       # all queries of the tile see the keys before this,
    stop = tl.minimum(first + k_len - q_len + BM, k_len)                # and none of them those from here on
    slot = head * slots + _slot(q_start) + rows
    q_tile = tl.load(q + at, inside, 0.0)
    acc = tl.zeros([BM, DIM], tl.float32)
    if dout is None:
        top = tl.full([BM], MASKED, tl.float32)
        mass = tl.zeros([BM, BN // 2], tl.float32)
    else:
        dout_tile = tl.load(dout + at, inside, 0.0)
        row_delta = tl.sum(_load(out + at, inside) * dout_tile.to(tl.float32), 1)
        row_lse = tl.load(lse + slot) * (scale * LOG2E)
        tl.store(delta + slot, row_delta)
    for masked in tl.static_range(2):
        for n in tl.range(full if masked else 0, stop if masked else full, BN):
            k_tile = k.load([k_start + n, head // GROUP, 0]).reshape(BN, DIM)
            v_tile = v.load([k_start + n, head // GROUP, 0]).reshape(BN, DIM)
            scores = _dot(q_tile, k_tile.T)                             # [BM, BN]
            if masked:
                scores = tl.where((n + keys)[None, :] <= last_key[:, None], scores, MASKED)
            if dout is None:
                acc, top, mass = _weigh(scores, v_tile, scale, acc, top, mass)
            else:
                p = tl.exp2(scores * (scale * LOG2E) - row_lse[:, None])
                ds = p * (_dot(dout_tile, v_tile.T) - row_delta[:, None])
                acc = _dot(ds.to(k.dtype), k_tile, acc)
    if dout is None:
        total = _halve(mass, 5)                                         # [BM, 1]
        tl.store(out + at, acc / total, inside)
        row_lse = (top + tl.log2(total.reshape(BM))) / (scale * LOG2E)
        tl.store(lse + slot, tl.where(rows < q_len, row_lse, -MASKED))  # past the end, too: it weighs nothing backward
    else:
        tl.store(dq + at, acc * scale, inside)

@triton.jit
def _attention_keys(q, k, v, dout, lse, delta, dk, dv, q_ends, k_ends, scale,
                    GROUP: constexpr, DIM: constexpr, BM: constexpr, BN: constexpr):
    """dv = sum over queries of p' dout; dk = scale * sum of ds' q. Scores are made transposed, keys down the rows, so
    that both sums take them as they lie in registers; lse and delta are what the products start from."""
    kv_head = tl.program_id(0)
    first = tl.program_id(2) * BN
    q_start, q_len = _sequence(q_ends)
    k_start, k_len = _sequence(k_ends)
    if first >= k_len:
        return
    at, inside = _rows(k_start, k_len, first, BN, DIM)
    slot = _slot(q_start)
    keys = first + tl.arange(0, BN)
    queries = tl.arange(0, BM)
    offset = k_len - q_len                              # query i sees key j if j <= i + offset
    low = tl.maximum(first - offset, 0) // BM * BM
    full = tl.minimum(tl.maximum(first - offset + BN - 1, 0), q_len)
    full = tl.cdiv(full, BM) * BM                       # from here on all queries see all keys of the tile
    k_tile = tl.load(k + at, inside, 0.0)
    v_tile = tl.load(v + at, inside, 0.0)
    zeros = tl.zeros([BN, BM], tl.float32)
    dk_acc = tl.zeros([BN, DIM], tl.float32)
    dv_acc = tl.zeros([BN, DIM], tl.float32)
    for head in tl.range(kv_head * GROUP, kv_head * GROUP + GROUP):
        for masked in tl.static_range(1, -1, -1):
            for m in tl.range(low if masked else full, full if masked else q_len, BM):
                q_tile = q.load([q_start + m, head, 0]).reshape(BM, DIM)
                scores = _dot(k_tile, q_tile.T, zeros - lse.load([head, slot + m]))             # [BN, BM]
                p = tl.exp2(scores * (scale * LOG2E))
                if masked:
                    p = tl.where(keys[:, None] <= (m + queries)[None, :] + offset, p, 0.0)
                dout_tile = dout.load([q_start + m, head, 0]).reshape(BM, DIM)
                dv_acc = _dot(p.to(dout.dtype), dout_tile, dv_acc)
                ds = p * _dot(v_tile, dout_tile.T, zeros - delta.load([head, slot + m]))
                dk_acc = _dot(ds.to(q.dtype), q_tile, dk_acc)
    tl.store(dk + at, dk_acc * scale, inside)
    tl.store(dv + at, dv_acc, inside)

def _dense(x):
    """[tokens, heads, dim] with the numbers of a token side by side; tokens may be any way apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()

def _launch_queries(tiles, q, k, v, out, lse, dout, delta, dq, q_ends, k_ends, longest, scale):
    heads, dim = q.shape[1:]
    keys = [tiles["BN"], 1, dim]
    _attention_queries[heads, len(q_ends) - 1, _ceil(longest, tiles["BM"])](
        q, _tiled(k, keys), _tiled(v, keys), out, lse, dout, delta, dq, q_ends, k_ends, scale, lse.shape[1],
        heads // k.shape[1], dim, **tiles)

class _FlashAttention(Function):
    @staticmethod
    def forward(ctx, q, k, v, q_ends, k_ends, q_most, k_most, scale, blank):    # blank: zeros_like or empty_like
        heads, dim = q.shape[1:]
        out = blank(q)
        lse = q.new_empty(heads, (len(q) // 128 + len(q_ends)) * 128, dtype=torch.float32)      # see _slot
        tiles = _tiles(q, 64 if dim == 128 else 128, KEYS, KEYS)
        _launch_queries(tiles, q, k, v, out, lse, None, None, None, q_ends, k_ends, q_most, scale)
        ctx.save_for_backward(q, k, v, out, lse, q_ends, k_ends)
        ctx.settings = q_most, k_most, scale, blank
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, q_ends, k_ends = ctx.saved_tensors
        q_most, k_most, scale, blank = ctx.settings
        k, v, dout = (x.contiguous() for x in (k, v, dout))
        kv_heads, dim = k.shape[1:]
        delta = torch.empty_like(lse)
        dq, dk, dv = map(blank, (q, k, v))
        tiles = _tiles(q, 128, 64)
        _launch_queries(tiles, q, k, v, out, lse, dout, delta, dq, q_ends, k_ends, q_most, scale)
        tiles = _tiles(q, 64, max(64, dim))
        queries = [tiles["BM"], 1, dim]
        row = [1, tiles["BM"]]
        _attention_keys[kv_heads, len(q_ends) - 1, _ceil(k_most, tiles["BN"])](
            _tiled(q, queries), k, v, _tiled(dout, queries), _tiled(lse, row), _tiled(delta, row), dk, dv,
            q_ends, k_ends, scale, q.shape[1] // kv_heads, dim, **tiles)
        return dq, dk, dv, *[None] * 6

def flash_attention_reference(q, k, v, q_ends, k_ends, scale=None):
    q_ends = q_ends.tolist()
    k_ends = k_ends.tolist()
    outs = []
    for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:]):
        one = [_wide(x).transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])]        # [1, heads, length, dim]
        earlier = d - c - (b - a)                                       # keys that every query sees
        seen = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).tril(earlier) if earlier else None
        out = F.scaled_dot_product_attention(*one, seen, is_causal=not earlier, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1).to(q.dtype))
    return torch.cat([*outs, torch.zeros_like(q[q_ends[-1]:])])

def flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, scale=None,
                    covered=False):
    """Causal attention over packed sequences that never see each other: q [tokens, heads, dim], k and v [tokens,
    kv_heads, dim], sequence i at [cu_seqlens[i], cu_seqlens[i + 1]) (int32). Without cu_seqlens_k it is that of q. A
    sequence may have fewer queries than keys; they are then the last ones. Pass the longest lengths: without them
    programs are started for sequences as long as all. scale is positive, by default dim ** -0.5. Tokens of no sequence
    get zeros; covered=True says that there are none, which saves writing them."""
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q
    if not _on_triton(q):
        return flash_attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
    dim = q.shape[2]
    if q.shape[1] % k.shape[1] or dim not in (16, 32, 64, 128):
        raise ValueError(f"{q.shape[1]} heads of {dim} share {k.shape[1]}: take a multiple, of 16, 32, 64 or 128")
    return _FlashAttention.apply(
        q.contiguous(), _dense(k), _dense(v), cu_seqlens_q.int(), cu_seqlens_k.int(),
        max_seqlen_q or len(q), max_seqlen_k or len(k), scale or dim ** -0.5,
        torch.empty_like if covered else torch.zeros_like)

# --- paged attention: decoding against a cache in pages --------------------------------------------------------------

# One query a sequence: 4 * group operations for every 4 bytes of cache, so the limit is reading the cache once. The
# query heads of a group are the rows of one dot (padded to the 16 that the tensor cores want), so their keys are read
# once, not once a head. A sequence can be split over several programs by its own length, which keeps all SMs reading
# when the batch is small or uneven. With one split the arithmetic is that of flash attention, in the same order, so a
# row's result is the same, too. The grid depends on shapes alone, never on lengths, so a CUDA graph can hold it.

@triton.jit
def _paged_part(q, k_cache, v_cache, block_table, context_lens, out, lse, table_stride, scale,
                GROUP: constexpr, DIM: constexpr, PAGE: constexpr, BN: constexpr):
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(context_lens + sequence)
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), BN) * BN       # tokens of a split
    stop = tl.minimum(length, split * share + share)
    ROWS: constexpr = max(16, triton.next_power_of_2(GROUP))
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)[None, :]
    mine = (rows < GROUP)[:, None]
    heads = sequence * tl.num_programs(0) * GROUP + kv_head * GROUP + rows
    q_tile = tl.load(q + heads[:, None] * DIM + dims, mine, 0.0)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    top = tl.full([ROWS], MASKED, tl.float32)
    mass = tl.zeros([ROWS, BN // 2], tl.float32)
    for n in tl.range(split * share, stop, BN):
        tokens = n + tl.arange(0, BN)
        live = tokens < stop
        page = tl.load(block_table + sequence * table_stride + tokens // PAGE, live, 0)
        slot = page.to(tl.int64) * PAGE + tokens % PAGE
        at = (slot * (tl.num_programs(0) * DIM) + kv_head * DIM)[:, None] + dims
        k_tile = tl.load(k_cache + at, live[:, None], 0.0)
        v_tile = tl.load(v_cache + at, live[:, None], 0.0)
        scores = tl.where(live[None, :], _dot(q_tile, k_tile.T), MASKED)            # [ROWS, BN]
        acc, top, mass = _weigh(scores, v_tile, scale, acc, top, mass)
    total = _halve(mass, 5)
    total = tl.where(total > 0, total, 1.0)                             # an empty split weighs nothing
    heads += split * tl.num_programs(1) * tl.num_programs(0) * GROUP
    tl.store(out + heads[:, None] * DIM + dims, acc / total, mine)
    tl.store(lse + heads, top + tl.log2(total.reshape(ROWS)), rows < GROUP)         # in base 2, scale included

@triton.jit
def _paged_merge(parts, lse, out, SPLITS: constexpr, DIM: constexpr):
    """out = sum of exp2(lse - max) part / sum of exp2(lse - max), over the splits of one head of one sequence."""
    entry = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIM)
    at = tl.arange(0, SPLITS) * tl.num_programs(0) + entry
    weight = tl.load(lse + at)
    weight = tl.exp2(weight - tl.max(weight, 0))
    part = tl.load(parts + at[:, None] * DIM + dims[None, :])
    tl.store(out + entry * DIM + dims, tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0))

def paged_attention_reference(q, k_cache, v_cache, block_table, context_lens, scale=None):
    page = k_cache.shape[1]
    token = torch.arange(block_table.shape[1] * page, device=q.device)
    slots = block_table[:, token // page] * page + token % page         # [batch, tokens]
    slots = slots[token < context_lens[:, None]]
    ends = F.pad(context_lens.cumsum(0), (1, 0))
    k = k_cache.flatten(0, 1)[slots]
    v = v_cache.flatten(0, 1)[slots]
    return flash_attention_reference(q, k, v, torch.arange(len(q) + 1), ends, scale)

def paged_attention(q, k_cache, v_cache, block_table, context_lens, scale=None, splits=None):
    """One token a sequence, q [batch, heads, dim], against caches [pages, page_size, kv_heads, dim]. Token t of
    sequence i is in page block_table[i, t // page_size] (int32 [batch, pages]; beyond the length it is not read).
    context_lens [batch] counts the new token. A length of 0 gives zeros. splits is how many programs share a sequence,
    a power of two: None chooses by the sizes, 1 gives exactly what flash_attention gives for the last query."""
    if not _on_triton(q):
        return paged_attention_reference(q, k_cache, v_cache, block_table, context_lens, scale)
    batch, heads, dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    if splits is None:              # an SM gets up to 4 programs, but none less than 256 tokens of a full table
        most = 4 * _processors(q.device) // (batch * kv_heads)
        most = min(most, _ceil(block_table.shape[1] * page, 256), 64)
        splits = 1 << max(0, most.bit_length() - 1)
    out = q.new_empty(q.shape)
    parts = out if splits == 1 else q.new_empty(splits, *q.shape, dtype=torch.float32)
    lse = q.new_empty(splits, batch, heads, dtype=torch.float32)
    _paged_part[kv_heads, batch, splits](
        q.contiguous(), k_cache.view(-1), v_cache.view(-1), block_table, context_lens, parts, lse,
        block_table.stride(0), scale or dim ** -0.5, heads // kv_heads, dim, page, KEYS, num_warps=4, num_stages=3)
    if splits > 1:
        _paged_merge[(batch * heads,)](parts, lse, out, splits, dim, num_warps=2)
    return out

@triton.jit
def _store_kv(k, v, k_cache, v_cache, slots, k_stride, v_stride, WIDTH: constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    column = tl.arange(0, triton.next_power_of_2(WIDTH))
    mask = column < tl.where(slot >= 0, WIDTH, 0)
    tl.store(k_cache + slot * WIDTH + column, tl.load(k + token * k_stride + column, mask), mask)
    tl.store(v_cache + slot * WIDTH + column, tl.load(v + token * v_stride + column, mask), mask)

def store_kv(k, v, k_cache, v_cache, slot_mapping):
    """k, v [tokens, kv_heads, dim] into caches [pages, page_size, kv_heads, dim], in place: token i into slot
    slot_mapping[i] = page * page_size + offset, or nowhere if that is negative (padding)."""
    k_cache = k_cache.view(-1, *k.shape[1:])
    v_cache = v_cache.view(-1, *v.shape[1:])
    if _on_triton(k):
        k = _dense(k)
        v = _dense(v)
        _store_kv[(len(k),)](k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), k[0].numel())
    else:
        real = slot_mapping >= 0
        k_cache[slot_mapping[real]] = k[real]
        v_cache[slot_mapping[real]] = v[real]

# --- rms norm --------------------------------------------------------------------------------------------------------

# y = x / sqrt(mean(x^2) + eps) * weight. Forward reads x and writes y, 4 bytes an element in bf16 (8 with the residual,
# 10 in two kernels); bytes are the limit. A tile of whole rows stays in registers, so the second use of x is free.
# Backward reads dy and x and writes dx. dweight is a sum over all rows: a fixed number of programs walks over them,
# each sums in registers, and a second kernel adds the programs up.

@triton.jit(do_not_specialize=["rows"])
def _rms_norm_forward(x, residual, weight, out, summed, rows, eps, WIDTH: constexpr, BLOCK: constexpr, ROWS: constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < WIDTH)
    at = row * WIDTH + column
    h = _load(x + at, mask)
    if residual is not None:
        h = (h + _load(residual + at, mask)).to(summed.dtype.element_ty)
        tl.store(summed + at, h, mask)
        h = h.to(tl.float32)
    r = tl.rsqrt(tl.sum(h * h, 1) / WIDTH + eps)[:, None]
    tl.store(out + at, h * r * _load(weight + column, column < WIDTH), mask)

@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward(dout, dsummed, h, weight, dx, dweight, rows, eps,
                       WIDTH: constexpr, BLOCK: constexpr, ROWS: constexpr):
    """With n = h * r and g = dout * weight: dx = r * (g - n * mean(g * n)), dweight = sum of dout * n."""
    column = tl.arange(0, BLOCK)[None, :]
    w = _load(weight + column, column < WIDTH)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=3):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & (column < WIDTH)
        at = row * WIDTH + column
        dy = _load(dout + at, mask)
        n = _load(h + at, mask)
        r = tl.rsqrt(tl.sum(n * n, 1) / WIDTH + eps)[:, None]
        n *= r
        total += dy * n
        g = dy * w
        grad = (g - n * (tl.sum(g * n, 1) / WIDTH)[:, None]) * r
        if dsummed is not None:
            grad += _load(dsummed + at, mask)
        tl.store(dx + at, grad, mask)
    tl.store(dweight + tl.program_id(0) * WIDTH + column, tl.sum(total, 0)[None, :], column < WIDTH)

@triton.jit
def _add_up(parts, out, programs, WIDTH: constexpr, BLOCK: constexpr):
    program = tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(0) * 8 + tl.arange(0, 8)[None, :]
    x = _load(parts + program * WIDTH + column, (program < programs) & (column < WIDTH))
    tl.store(out + column, tl.sum(x, 0)[None, :], column < WIDTH)

def _added(parts, dtype):
    """[programs, ...], summed over programs. torch gives so few columns to few processors, and takes 11 us."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    block = triton.next_power_of_2(len(parts))
    _add_up[(_ceil(out.numel(), 8),)](parts, out, len(parts), out.numel(), block, num_warps=8)
    return out

class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        block = triton.next_power_of_2(len(weight))
        together = max(1, 2048 // block)                                # rows of a tile, and 16 elements a thread
        tiles = dict(WIDTH=len(weight), BLOCK=block, ROWS=together, num_warps=min(16, together * block // 512))
        rows = x.numel() // len(weight)
        out = torch.empty_like(x)
        h = x if residual is None else torch.empty_like(x)
        _rms_norm_forward[(_ceil(rows, together),)](x, residual, weight, out, h, rows, eps, **tiles)
        ctx.save_for_backward(h, weight)
        ctx.settings = rows, eps, tiles
        return out if residual is None else (out, h)

    @staticmethod
    def backward(ctx, dout, dsummed=None):
        h, weight = ctx.saved_tensors
        rows, eps, tiles = ctx.settings
        programs = min(4 * _processors(h.device), _ceil(rows, tiles["ROWS"]))
        parts = h.new_empty(programs, len(weight), dtype=torch.float32)
        dx = torch.empty_like(h)
        dsummed = None if dsummed is None else dsummed.contiguous()
        _rms_norm_backward[(programs,)](dout.contiguous(), dsummed, h, weight, dx, parts, rows, eps, **tiles)
        return dx, _added(parts, weight.dtype), None, None if dsummed is None else dx

def rms_norm_reference(x, weight, eps=1e-6, residual=None):
    h = x if residual is None else x + residual
    out = F.rms_norm(_wide(h), weight.shape, _wide(weight), eps).to(x.dtype)        # h / sqrt(mean(h^2) + eps) * weight
    return out if residual is None else (out, h)

def rms_norm(x, weight, eps=1e-6, residual=None):
    """Over the last axis. With a residual, x + residual is normalised, and (normalised, x + residual) returned."""
    if weight.shape != x.shape[-1:] or residual is not None and residual.shape != x.shape:
        raise ValueError(f"x is {list(x.shape)}; weight must be as wide, and residual of its shape")
    if not _on_triton(x):
        return rms_norm_reference(x, weight, eps, residual)
    return _RMSNorm.apply(x.contiguous(), weight, eps, None if residual is None else residual.contiguous())

# --- queries, keys and values: the norm of heads and rotary position embedding ---------------------------------------

# Out of the one product that made them: q and k are normalised head by head (Qwen3; or not), then each pair (x[i],
# x[i + dim / 2]) of a head is turned by the angle of its position (the halves of GPT-NeoX and Hugging Face, not
# neighbours). v stays where it is. Reads and writes q and k once, 4 bytes an element: bytes are the limit. A program
# takes a token, and reads its cosines once for all heads. Backward turns the other way, and makes the norm again; its
# programs walk over many tokens, so that the gradients of weights are sums in registers. Tiles are [heads, dim / 2].

@triton.jit
def _halves(x, HEADS: constexpr, HALF: constexpr):
    """Both halves of neighbouring heads, and where they are."""
    head = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    at = head * 2 * HALF + tl.arange(0, HALF)[None, :]
    return _load(x + at, head < HEADS), _load(x + at + HALF, head < HEADS), at, head < HEADS

@triton.jit
def _turn(x, weight, out, c, s, eps, HEADS: constexpr, HALF: constexpr):
    a, b, at, mask = _halves(x, HEADS, HALF)
    if weight is not None:
        wa = tl.load(weight + tl.arange(0, HALF)).to(tl.float32)[None, :]
        wb = tl.load(weight + HALF + tl.arange(0, HALF)).to(tl.float32)[None, :]
        r = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
        a = a * r * wa                                                  # in this order: [heads, 1] * [1, dim / 2] would
        b = b * r * wb                                                  # be made in another layout, and moved
    tl.store(out + at, a * c - b * s, mask)
    tl.store(out + at + HALF, b * c + a * s, mask)

@triton.jit
def _angle(cos, sin, positions, token, stride, HALF: constexpr):
    at = tl.load(positions + token).to(tl.int64) * stride + tl.arange(0, HALF)
    return tl.load(cos + at)[None, :], tl.load(sin + at)[None, :]

@triton.jit
def _qkv_rotary_forward(qkv, q_norm, k_norm, cos, sin, positions, q, k, table_stride, eps,
                        HEADS: constexpr, KV_HEADS: constexpr, HALF: constexpr):
    token = tl.program_id(0).to(tl.int64)
    c, s = _angle(cos, sin, positions, token, table_stride, HALF)
    x = qkv + token * (HEADS + 2 * KV_HEADS) * 2 * HALF
    _turn(x, q_norm, q + token * HEADS * 2 * HALF, c, s, eps, HEADS, HALF)
    _turn(x + HEADS * 2 * HALF, k_norm, k + token * KV_HEADS * 2 * HALF, c, s, eps, KV_HEADS, HALF)

@triton.jit
def _turn_back(dout, x, weight, dx, c, s, eps, HEADS: constexpr, HALF: constexpr):
    """Writes dx, and gives the gradient of the weight's halves: as in rms_norm, once dout is turned back."""
    ya, yb, at, mask = _halves(dout, HEADS, HALF)
    a = ya * c + yb * s
    b = yb * c - ya * s
    dweight = tl.zeros([HALF, 2], tl.float32)
    if weight is not None:
        na, nb, _, _ = _halves(x, HEADS, HALF)
        wa = tl.load(weight + tl.arange(0, HALF)).to(tl.float32)[None, :]
        wb = tl.load(weight + HALF + tl.arange(0, HALF)).to(tl.float32)[None, :]
        r = tl.rsqrt(tl.sum(na * na + nb * nb, 1) / (2 * HALF) + eps)[:, None]
        na *= r
        nb *= r
        dweight = tl.join(tl.sum(a * na, 0), tl.sum(b * nb, 0))
        a *= wa
        b *= wb
        mean = tl.sum(a * na + b * nb, 1)[:, None] / (2 * HALF)
        a = (a - na * mean) * r
        b = (b - nb * mean) * r
    tl.store(dx + at, a, mask)
    tl.store(dx + at + HALF, b, mask)
    return dweight

@triton.jit(do_not_specialize=["tokens"])
def _qkv_rotary_backward(dq, dk, dv, qkv, q_norm, k_norm, cos, sin, positions, dqkv, dnorms, table_stride, eps, tokens,
                         HEADS: constexpr, KV_HEADS: constexpr, HALF: constexpr):
    keys = HEADS * 2 * HALF                                             # where they begin in a token's row
    values = keys + KV_HEADS * 2 * HALF
    dq_norm = tl.zeros([HALF, 2], tl.float32)
    dk_norm = tl.zeros([HALF, 2], tl.float32)
    for t in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(t, tl.int64)
        c, s = _angle(cos, sin, positions, token, table_stride, HALF)
        x = qkv + token * (HEADS + 2 * KV_HEADS) * 2 * HALF
        dx = dqkv + token * (HEADS + 2 * KV_HEADS) * 2 * HALF
        dq_norm += _turn_back(dq + token * keys, x, q_norm, dx, c, s, eps, HEADS, HALF)
        of_keys = token * (values - keys)
        dk_norm += _turn_back(dk + of_keys, x + keys, k_norm, dx + keys, c, s, eps, KV_HEADS, HALF)
        a, b, at, mask = _halves(dv + of_keys, KV_HEADS, HALF)
        tl.store(dx + values + at, a, mask)
        tl.store(dx + values + at + HALF, b, mask)
    if q_norm is not None:
        at = tl.arange(0, 2)[None, :] * HALF + tl.arange(0, HALF)[:, None]
        at += tl.program_id(0) * 4 * HALF
        tl.store(dnorms + at, dq_norm)
        tl.store(dnorms + at + 2 * HALF, dk_norm)

class _QKVRotary(Function):
    @staticmethod
    def forward(ctx, qkv, heads, kv_heads, cos, sin, positions, q_norm, k_norm, eps):
        dim = qkv.shape[1] // (heads + 2 * kv_heads)
        q = qkv.new_empty(len(qkv), heads, dim)
        k = qkv.new_empty(len(qkv), kv_heads, dim)
        _qkv_rotary_forward[(len(qkv),)](qkv, q_norm, k_norm, cos, sin, positions, q, k, cos.stride(0), eps,
                                         heads, kv_heads, dim // 2, num_warps=2)
        ctx.save_for_backward(qkv, q_norm, k_norm, cos, sin, positions)
        ctx.sizes = heads, kv_heads, dim // 2
        ctx.eps = eps
        return q, k, qkv.unflatten(1, (-1, dim))[:, heads + kv_heads:]

    @staticmethod
    def backward(ctx, dq, dk, dv):
        qkv, q_norm, k_norm, cos, sin, positions = ctx.saved_tensors
        programs = min(len(qkv), 16 * _processors(qkv.device))
        dqkv = torch.empty_like(qkv)
        dnorms = qkv.new_empty(programs, 2, 2 * ctx.sizes[2], dtype=torch.float32)
        _qkv_rotary_backward[(programs,)](
            dq.contiguous(), dk.contiguous(), dv.contiguous(), qkv, q_norm, k_norm, cos, sin, positions, dqkv, dnorms,
            cos.stride(0), ctx.eps, len(qkv), *ctx.sizes, num_warps=1)
        norms = (None, None) if q_norm is None else _added(dnorms, q_norm.dtype)
        return dqkv, *[None] * 5, *norms, None

def qkv_rotary_reference(qkv, heads, kv_heads, cos, sin, positions, q_norm=None, k_norm=None, eps=1e-6):
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        q = rms_norm_reference(q, q_norm, eps)
        k = rms_norm_reference(k, k_norm, eps)
    c = cos[positions][:, None]                                         # [tokens, 1, dim / 2]
    s = sin[positions][:, None]
    a, b = _wide(torch.cat([q, k], 1)).chunk(2, -1)
    turned = torch.cat([a * c - b * s, b * c + a * s], -1).to(qkv.dtype)
    return *turned.split([heads, kv_heads], 1), v

def qkv_rotary(qkv, heads, kv_heads, cos, sin, positions, q_norm=None, k_norm=None, eps=1e-6):
    """q [tokens, heads, dim], k and v [tokens, kv_heads, dim] as attention wants them, out of the one product that made
    them, [tokens, (heads + 2 * kv_heads) * dim]. Tables are [max_positions, dim / 2], or dim wide with both halves the
    same, as Hugging Face makes them; positions [tokens] index them."""
    half = qkv.shape[1] // (heads + 2 * kv_heads) // 2
    tables = cos[:, :half], sin[:, :half]
    if not _on_triton(qkv):
        return qkv_rotary_reference(qkv, heads, kv_heads, *tables, positions, q_norm, k_norm, eps)
    return _QKVRotary.apply(qkv.contiguous(), heads, kv_heads, *tables, positions, q_norm, k_norm, eps)

# --- swiglu ----------------------------------------------------------------------------------------------------------

# silu(gate) * up, the halves of one product's output. Forward reads 4 bytes an output and writes 2; backward reads 6
# and writes 4: bytes are the limit. The sigmoid is computed again, not kept: cheaper than its bytes.

@triton.jit
def _swiglu(gate_up, dout, out, WIDTH: constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    mask = column < WIDTH
    at = row * 2 * WIDTH + column
    gate = _load(gate_up + at, mask)
    up = _load(gate_up + at + WIDTH, mask)
    sigmoid = 1 / (1 + tl.exp2(-gate * LOG2E))
    if dout is None:
        tl.store(out + row * WIDTH + column, gate * sigmoid * up, mask)
    else:                                                               # out is the gradient of gate_up
        dy = _load(dout + row * WIDTH + column, mask)
        tl.store(out + at, dy * up * sigmoid * (1 + gate * (1 - sigmoid)), mask)
        tl.store(out + at + WIDTH, dy * gate * sigmoid, mask)

class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        out = torch.empty_like(gate_up[:, ::2])
        _swiglu[len(out), _ceil(out.shape[1], 1024)](gate_up, None, out, out.shape[1])
        return out

    @staticmethod
    def backward(ctx, dout):
        gate_up, = ctx.saved_tensors
        out = torch.empty_like(gate_up)
        _swiglu[len(out), _ceil(dout.shape[1], 1024)](gate_up, dout.contiguous(), out, dout.shape[1])
        return out

def swiglu_reference(gate_up):
    gate, up = _wide(gate_up).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)

def swiglu(gate_up):
    """[..., 2 * width], the gate first, to [..., width]."""
    if not _on_triton(gate_up):
        return swiglu_reference(gate_up)
    return _SwiGLU.apply(gate_up.flatten(0, -2).contiguous()).unflatten(0, gate_up.shape[:-1])

# --- linear cross entropy: the output head and the loss in one, without the logits -----------------------------------

# 16k tokens x 152k words are 5 GB of logits in bf16, and the loss needs three numbers a token from them. With
# y = hidden @ weight' / temperature and p = softmax(y): lse = log(sum(exp(y))), entropy = -sum(p * log(p)), y[target].
#     logprob = y[target] - lse
#     dy[j] = p[j] * (-dlogprob - dentropy * (log(p[j]) + entropy)) + (j == target) * dlogprob
# Forward is a matrix product whose tiles are reduced in registers to two numbers a row, their own lse and entropy.
# Tiles, and ranks that hold slices of the vocabulary, are put together by the chain rule of entropy: with w = exp(lse
# of a tile - lse) the whole has the sum of w * (entropy of the tile - log(w)). What a tile is does not depend on the
# number of rows. Backward makes the tiles again, for a slice of the vocabulary at a time, turns them into dlogits on
# the spot, and leaves dlogits @ weight and dlogits' @ hidden to cuBLAS, both summed in fp32: 4 products of 2 * tokens *
# vocab * width operations in all, so tensor cores are the limit.

SLICE_BYTES = 2**27                 # of dlogits; with the gradient of hidden in fp32 this is all that backward needs

@triton.jit
def _logits(x, weight, inverse, width, BM: constexpr, BV: constexpr, BK: constexpr):
    """This program's tile, in base 2."""
    acc = tl.zeros([BM, BV], tl.float32)
    for k in tl.range(0, width, BK):
        acc = _dot(x.load([tl.program_id(0) * BM, k]), weight.load([tl.program_id(1) * BV, k]).T, acc)
    return acc * (inverse * LOG2E)[:, None]

@triton.jit(do_not_specialize=["rows"])
def _head_forward(x, weight, targets, inverse, part_lse, part_entropy, hit, rows, vocab, width,
                  BM: constexpr, BV: constexpr, BK: constexpr):
    part = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    column = part * BV + tl.arange(0, BV)[None, :]
    target = tl.load(targets + row, inside, -1).to(tl.int32)
    y = _logits(x, weight, _load(inverse + row, inside), width, BM, BV, BK)
    y = tl.where(column < vocab, y, MASKED)
    y_target = tl.sum(tl.where(column == target[:, None], y, 0.0), 1)
    tl.store(hit + row, y_target * LN2, inside & (target >= 0) & (target // BV == part))
    top = tl.max(y, 1)
    y -= top[:, None]
    e = tl.exp2(y)
    mass = tl.sum(e, 1)
    at = row.to(tl.int64) * tl.num_programs(1) + part
    tl.store(part_lse + at, top + tl.log2(mass), inside)
    tl.store(part_entropy + at, tl.log2(mass) - tl.sum(e * y, 1) / mass, inside)

@triton.jit
def _head_merge(part_lse, part_entropy, lse, entropy, parts, BLOCK: constexpr):
    part = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * parts + part
    y = tl.load(part_lse + at, part < parts, MASKED)
    top = tl.max(y, 0)
    y -= top
    e = tl.exp2(y)
    mass = tl.sum(e, 0)
    within = tl.sum(e * (_load(part_entropy + at, part < parts) - y), 0) / mass
    tl.store(lse + tl.program_id(0), (top + tl.log2(mass)) * LN2)
    tl.store(entropy + tl.program_id(0), (within + tl.log2(mass)) * LN2)

@triton.jit(do_not_specialize=["rows"])
def _head_backward(x, weight, targets, inverse, lse, entropy, dlogprob, dentropy, out, rows, vocab, width,
                   BM: constexpr, BV: constexpr, BK: constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    column = tl.program_id(1) * BV + tl.arange(0, BV)[None, :]
    target = tl.load(targets + row, inside, -1).to(tl.int32)
    scale = _load(inverse + row, inside)
    row_lse = _load(lse + row, inside) * LOG2E
    of_target = _load(dlogprob + row, inside) * scale
    of_plogp = _load(dentropy + row, inside) * scale
    of_p = of_target + of_plogp * _load(entropy + row, inside)
    logp = _logits(x, weight, scale, width, BM, BV, BK) - row_lse[:, None]
    dlogits = -tl.exp2(logp) * (of_p[:, None] + (of_plogp * LN2)[:, None] * logp)
    dlogits += tl.where(column == target[:, None], of_target[:, None], 0.0)
    tl.store(out + row.to(tl.int64)[:, None] * vocab + column, dlogits, inside[:, None] & (column < vocab))

def _launch_head(kernel, x, weight, targets, *tensors):
    """A program a tile of logits; by default [128, 256]."""
    tiles = dict(BM=128, BV=256, BK=64, num_warps=8, num_stages=3)
    if x.itemsize == 4:
        tiles = dict(BM=64, BV=64, BK=32, num_warps=4, num_stages=2)
    kernel[_ceil(len(x), tiles["BM"]), _ceil(len(weight), tiles["BV"])](
        _tiled(x, [tiles["BM"], tiles["BK"]]), _tiled(weight, [tiles["BV"], tiles["BK"]]), targets, *tensors,
        len(x), *weight.shape, **tiles)

def _statistics(x, weight, targets, inverse):
    """lse, entropy and y[target] (0 if it is not here) of every row."""
    if not _on_triton(x):
        y = _wide(x) @ _wide(weight).T * inverse[:, None]
        logp = y.log_softmax(1)
        hit = y.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return y.logsumexp(1), -(logp.exp() * logp).sum(1), hit.where(targets >= 0, 0)
    parts = _ceil(len(weight), 64 if x.itemsize == 4 else 256)
    part_lse, part_entropy = inverse.new_empty(2, len(x), parts)
    lse, entropy, hit = inverse.new_zeros(3, len(x))
    _launch_head(_head_forward, x, weight, targets, inverse, part_lse, part_entropy, hit)
    _head_merge[(len(x),)](part_lse, part_entropy, lse, entropy, parts, triton.next_power_of_2(parts))
    return lse, entropy, hit

def _dlogits(x, weight, targets, *rows):
    """The gradient of hidden @ weight', of a slice of the vocabulary. rows: what the kernel takes, [tokens] each."""
    if _on_triton(x):
        out = x.new_empty(len(x), len(weight))
        _launch_head(_head_backward, x, weight, targets, *rows, out)
        return out
    inverse, lse, entropy, dlogprob, dentropy = torch.stack(rows)[..., None]
    logp = _wide(x) @ _wide(weight).T * inverse - lse
    dlogits = -logp.exp() * (dlogprob + dentropy * (entropy + logp))
    hit = torch.arange(len(weight), device=x.device) == targets[:, None]
    return ((dlogits + dlogprob * hit) * inverse).to(x.dtype)

class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx, x, weight, targets, inverse, group):
        ranks = 1 if group is None else dist.get_world_size(group)
        first = 0 if group is None else dist.get_rank(group) * len(weight)
        live = (targets >= 0).to(inverse.dtype).where(targets < ranks * len(weight), torch.nan)     # no such word: NaN
        targets = (targets - first).where((targets >= first) & (targets < first + len(weight)), -1)
        lse, entropy, hit = _statistics(x, weight, targets, inverse)
        if group is not None:
            top = lse.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group)
            mass = torch.exp(lse - top)
            sums = torch.stack([mass, mass * (entropy - lse + top), hit])
            dist.all_reduce(sums, group=group)
            mass, entropy, hit = sums
            lse = top + mass.log()
            entropy = entropy / mass + mass.log()
        ctx.save_for_backward(x, weight, targets, inverse, lse, entropy, live)
        ctx.group = group
        return (hit - lse).clamp(max=0) * live, entropy * live

    @staticmethod
    def backward(ctx, dlogprob, dentropy):
        x, weight, targets, *rows, live = ctx.saved_tensors
        rows += [dlogprob * live, dentropy * live]
        dx = torch.zeros_like(x, dtype=live.dtype)
        dweight = torch.empty_like(weight)
        step = max(256, SLICE_BYTES // max(1, len(x) * x.itemsize) // 256 * 256)
        for start in range(0, len(weight), step):
            words = weight[start:start + step]
            dlogits = _dlogits(x, words, targets - start, *rows)
            if x.is_cuda and x.dtype != dx.dtype:
                torch.addmm(dx, dlogits, words, out_dtype=dx.dtype, out=dx)
            else:
                dx.addmm_(_wide(dlogits), _wide(words))
            torch.mm(dlogits.T, x, out=dweight[start:start + step])
        if ctx.group is not None:
            dist.all_reduce(dx, group=ctx.group)
        return dx.to(x.dtype), dweight, None, None, None

def linear_cross_entropy(hidden, weight, targets, temperature=1.0, group=None):
    """The logprob of each target, and the entropy, under softmax(hidden @ weight' / temperature): both [tokens] in
    fp32, and both differentiable. hidden [tokens, width], weight [vocab, width], temperature a number or one a token.
    A negative target (-100) is ignored: 0, without gradient. With a process group each rank holds a slice of the rows
    of weight, in order of rank and of one size, and all ranks the same hidden and targets (of the whole vocabulary);
    all get the same result, and the whole gradient of hidden."""
    if len(targets) != len(hidden):
        raise ValueError(f"{len(targets)} targets for {len(hidden)} rows; as many are needed")
    inverse = 1 / (torch.zeros_like(targets, dtype=_wide(hidden[:0]).dtype) + temperature)
    return _LinearCrossEntropy.apply(hidden.contiguous(), weight.contiguous(), targets, inverse, group)

# --- sampling --------------------------------------------------------------------------------------------------------

# An exponential race: with E[j] = -log(1 - u[j]), the largest log p[j] - log E[j] is a sample from p (Gumbel's trick).
# u[j] is a hash of (seed, position, j), not the next number of a stream: whatever else is in the batch, the same
# request gives the same tokens. One pass over the row finds its top, one samples, and sums up the probabilities on the
# way. Top-k and top-p need the lowest score that is kept: a search that tries 8 bounds in one pass, then 8 between the
# two that the answer lies between. Bytes are the limit, so a pass finds out three bits, not one.

@triton.jit
def _scores(row, first, vocab, top, inverse, BLOCK: constexpr):
    """Of a block of the vocabulary, (logit - top) * inverse."""
    column = first + tl.arange(0, BLOCK)
    return (tl.load(row + column, column < vocab, -float("inf")).to(tl.float32) - top) * inverse

@triton.jit
def _kept(row, vocab, bounds, top, inverse, COUNT: constexpr, BLOCK: constexpr):
    """For each of the bounds, how many scores it keeps; or their sum of exp2."""
    total = tl.zeros([bounds.shape[0], BLOCK], tl.float32)
    for first in tl.range(0, vocab, BLOCK):
        score = _scores(row, first, vocab, top, inverse, BLOCK)[None, :]
        total += tl.where(score >= bounds[:, None], 1.0 if COUNT else tl.exp2(score), 0.0)
    return tl.sum(total, 1)

@triton.jit
def _lowest(row, vocab, low, need, top, inverse, COUNT: constexpr, BLOCK: constexpr):
    """The highest bound in [low, 0) that keeps at least `need`."""
    step = -low / 8
    for _ in range(8):
        bounds = low + step * tl.arange(0, 8)
        enough = _kept(row, vocab, bounds, top, inverse, COUNT, BLOCK) >= need
        low = tl.maximum(low, tl.max(tl.where(enough, bounds, MASKED), 0))
        step /= 8
    return low

@triton.jit
def _mix(x):
    """"lowbias32" of C. Wellons' hash prospector."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)

@triton.jit
def _sample(logits, temperature, top_k, top_p, seeds, positions, tokens, logprobs, full_logprobs, vocab,
            BLOCK: constexpr):
    program = tl.program_id(0)
    row = logits + program.to(tl.int64) * vocab
    heat = tl.load(temperature + program)
    inverse = LOG2E / tl.where(heat > 0, heat, 1.0)
    best = tl.full([BLOCK], MASKED, tl.float32)
    for first in tl.range(0, vocab, BLOCK):
        best = tl.maximum(best, _scores(row, first, vocab, 0.0, 1.0, BLOCK))
    top = tl.max(best, 0)

    k = tl.load(top_k + program)
    nucleus = tl.load(top_p + program)
    low = tl.full([], MASKED, tl.float32)
    if (k > 0) & (heat > 0):                                # what is 64 bits below the top has no probability
        low = _lowest(row, vocab, 0 * low - 64, k.to(tl.float32), top, inverse, True, BLOCK)
    if (nucleus < 1) & (heat > 0):                          # scores below `least` weigh less than 1 - nucleus together
        need = nucleus * tl.sum(_kept(row, vocab, low + tl.zeros([1], tl.float32), top, inverse, False, BLOCK), 0)
        least = tl.log2((1 - nucleus) / vocab)
        low = tl.maximum(low, _lowest(row, vocab, least, need, top, inverse, False, BLOCK))

    seed = tl.load(seeds + program)
    key = _mix(_mix(seed.to(tl.uint32) ^ 0x9E3779B9) + (seed >> 32).to(tl.uint32))
    other = _mix(key ^ tl.load(positions + program).to(tl.uint32))
    full = tl.zeros([BLOCK], tl.float32)                    # each lane keeps its own sums, and the winner of its race
    kept = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], MASKED, tl.float32)
    token = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, vocab, BLOCK):
        column = first + tl.arange(0, BLOCK)
        score = _scores(row, first, vocab, top, inverse, BLOCK)
        keep = (score >= low) & (column < vocab)
        full += tl.exp2(score)
        kept += tl.where(keep, tl.exp2(score), 0.0)
        u = (_mix(_mix(column.to(tl.uint32) ^ key) + other).to(tl.float32) + 0.5) * 2**-32
        # 1 - u loses the digits of a small u, so it takes the series; a u that was rounded to 1 would be no sample
        race = tl.where(u < 0.001, u * (1 + 0.5 * u), -tl.log(1 - tl.minimum(u, 0.99999994)))
        rank = tl.where(keep, score - tl.where(heat > 0, tl.log2(race), 0.0), MASKED)
        token = tl.where(rank > best, column, token)
        best = tl.maximum(rank, best)
    token = tl.min(tl.where(best == tl.max(best, 0), token, vocab), 0)              # the lowest of equals
    score = (tl.load(row + token).to(tl.float32) - top) * inverse
    logprob = (score - tl.log2(tl.sum(kept, 0))) * LN2
    tl.store(tokens + program, token.to(tl.int64))
    tl.store(logprobs + program, tl.where(heat > 0, logprob, 0.0))
    tl.store(full_logprobs + program, (score - tl.log2(tl.sum(full, 0))) * LN2)

def _race(seeds, positions, vocab):
    """E [batch, vocab], in 64-bit integers, since torch shifts none of 32 bits without their sign."""
    word = 2**32 - 1

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & word
        x = (x ^ (x >> 15)) * 0x846CA68B & word
        return x ^ (x >> 16)

    key = mix(mix(seeds & word ^ 0x9E3779B9) + (seeds >> 32) & word)
    other = mix(key ^ positions & word)
    u = mix(mix(torch.arange(vocab, device=seeds.device) ^ key[:, None]) + other[:, None] & word)
    u = (u.float() + 0.5) * 2**-32
    return torch.where(u < 0.001, u * (1 + 0.5 * u), -torch.log1p(-u.clamp(max=0.99999994)))

def sample_reference(logits, temperature, top_k, top_p, seeds, positions):
    hot = temperature > 0
    vocab = logits.shape[1]
    kept = full = torch.log_softmax(logits.float() / temperature.where(hot, 1)[:, None], -1)
    if (hot & ((top_k > 0) | (top_p < 1))).any():                       # sorting is most of the time
        ordered = full.sort(-1, descending=True).values
        k = top_k.where((top_k > 0) & (top_k < vocab), vocab)
        among = ordered >= ordered.gather(1, k[:, None] - 1)            # the k-th largest
        p = ordered.where(among, -torch.inf).softmax(-1)
        among &= p.cumsum(-1) - p < top_p[:, None]                      # what is larger holds less than top_p
        last = among.sum(-1, keepdim=True).clamp(min=1) - 1
        kept = full.where(full >= ordered.gather(1, last), -torch.inf).log_softmax(-1)
    race = kept - _race(seeds, positions, vocab).log() if hot.any() else full
    tokens = race.where(hot[:, None], full).argmax(-1, keepdim=True)
    logprobs = kept.gather(1, tokens)[:, 0].where(hot, 0)
    return tokens[:, 0], logprobs, full.gather(1, tokens)[:, 0]

def sample(logits, temperature, top_k, top_p, seeds, positions, return_full=False):
    """Tokens [batch] (int64) and their logprobs under the distribution that they were sampled from: softmax(logits /
    temperature), the top_k largest of it (-1: all), then the fewest of those that hold top_p of the mass; equal logits
    stay or go together. With return_full also the logprobs under all of softmax(logits / temperature), which is what
    training wants. temperature, top_k, top_p: numbers, or one a row. Temperature 0 is greedy: the first of the largest,
    logprob 0, the full one at temperature 1. seeds and positions [batch] (int64) are all the randomness."""
    zeros = torch.zeros_like(seeds)
    settings = zeros.float() + temperature, zeros + top_k, zeros.float() + top_p, seeds, positions
    if not _on_triton(logits):
        return sample_reference(logits, *settings)[:3 if return_full else 2]
    tokens = torch.empty_like(seeds)
    logprobs = logits.new_empty(2, len(seeds), dtype=torch.float32)     # under what was kept, and under all
    _sample[(len(seeds),)](logits.contiguous(), *settings, tokens, *logprobs, logits.shape[1],
                           1024, num_warps=32)                          # a column a thread, in every layout
    return (tokens, *logprobs)[:3 if return_full else 2]

# --- the demo: every kernel against its twin, and on a GPU against the clock -----------------------------------------

def _cases(device, n):
    """name: an operation, what goes into it and gets gradients, and its work forward and backward: operations, or bytes
    if those are the limit. n tokens in the shapes of Qwen3-0.6B, on a CPU in smaller ones."""
    cuda = device == "cuda"
    kv, dim, vocab = (8, 128, 151_936) if cuda else (1, 64, 500)
    make = partial(torch.randn, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    q = make(n, 2 * kv, dim)
    k = make(n, kv, dim)
    x = make(n, kv * dim)
    head = make(vocab, kv * dim) * 0.05
    qkv = make(n, 4 * kv * dim)
    at = torch.arange(n, device=device)
    ends = torch.tensor([0, n], dtype=torch.int32, device=device)
    cos, sin = make(2, n, dim // 2).float()
    pages = make(2, n // 8, 16, kv, dim)
    table = torch.randperm(n // 8, device=device).int().view(-1, 128 if cuda else 4)
    lengths = torch.full_like(table[:, 0], table.shape[1] * 16 - 3)
    pairs = 4 * n * n * kv * dim
    product = 2 * n * head.numel()
    return {
        "flash_attention": (lambda *x: flash_attention(*x, ends, None, n, covered=True), [q, k, k + 1],
                            pairs, 2.5 * pairs),
        "paged_attention": (lambda *x: paged_attention(*x, table, lengths), [q[:len(table)], *pages], pages.nbytes),
        "rms_norm": (rms_norm, [x, x[0]], 2 * x.nbytes, 3 * x.nbytes),
        "qkv_rotary": (lambda x, *norms: qkv_rotary(x, 2 * kv, kv, cos, sin, at, *norms), [qkv, q[0, 0], q[1, 0]],
                       6 * k.nbytes, 11 * k.nbytes),
        "swiglu": (swiglu, [make(n, 6 * kv * dim)], 9 * x.nbytes, 15 * x.nbytes),
        "linear_cross_entropy": (lambda *x: linear_cross_entropy(*x, at % vocab), [x, head], product, 2 * product),
    }

def _run(function, inputs):
    """Outputs, and a function that gives the gradients of the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    seeds = [torch.arange(y.numel(), device=y.device).sin().view_as(y).to(y.dtype) for y in outs]
    return outs, lambda: torch.autograd.grad(outs, inputs, seeds, retain_graph=True)

def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print("the kernels against their twins in fp64: relative errors of what they return, then of gradients")
    for name, (function, inputs, *work) in _cases(device, 192 if device == "cpu" else 2048).items():
        outs, gradients = _run(function, inputs)
        twins, twin_gradients = _run(function, [x.double() for x in inputs])
        pairs = [*zip(outs, twins)]
        if len(work) > 1:
            pairs += zip(gradients(), twin_gradients())
        errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        print(f"  {name:22}" + "".join(f"{error:9.1e}" for error in errors))
        if not max(errors) < (2e-2 if device == "cuda" else 1e-5):
            sys.exit(f"{name} is wrong")
    if device == "cuda":
        benchmark()

def benchmark():
    print(f"{torch.cuda.get_device_name()}; forward and backward: ms, and TFLOP/s or GB/s")
    for name in _cases("cuda", 2048):
        products = name in ("flash_attention", "linear_cross_entropy")
        function, inputs, *work = _cases("cuda", 8192 if products else 131_072)[name]   # or launches would be timed
        print(f"{name:22}", end="")
        for call, amount in zip((lambda: function(*inputs), _run(function, inputs)[1]), work):   # noqa: B023
            ms = triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median")
            print(f"{ms:10.3f}{amount / ms / (1e9 if products else 1e6):7.0f}", end="")
        print()

if __name__ == "__main__":
    main()
