"""kernels: Triton kernels and their plain twins.

Each operation is a public function, a Triton kernel, a torch reference that states the mathematics, and why the kernel
is fast. A fast kernel reads each input once, keeps what it computes in registers, and writes each output once.

    HBM  4.8 TB/s  ------->  L2  ------->  shared memory  ------->  tensor cores, 990 TFLOP/s in bf16
                             50 MB         228 KB an SM             registers, 256 KB an SM (132 SMs of an H200)

A CUDA tensor takes the kernel, a CPU tensor the reference; under TRITON_INTERPRET=1 one in fp32 takes the kernel, too;
fp64 always takes the reference. Forward, a row's result depends on this row alone, bit for bit (but of paged attention
in several splits): what generates computes what it computes in training. Nothing waits for the GPU, so CUDA graphs can
hold it. Backward passes use no atomics and repeat bit for bit.

    python kernels.py        CPU: every kernel, interpreted, against its twin.  GPU: the table of speeds as well
"""
import os
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read by triton when a kernel is defined, so set before the import
import triton
import triton.language as tl
from triton import jit, next_power_of_2
from triton.language import constexpr       # known when a kernel is compiled; each value makes another kernel
from triton.tools.tensor_descriptor import TensorDescriptor

# --- what all kernels share ------------------------------------------------------------------------------------------
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
MASKED = constexpr(-1e30)           # the score of what is masked: finite, since -inf minus -inf would be NaN
LOG2E = constexpr(1.4426950408889634)       # tl.exp takes twice as long as tl.exp2
LN2 = constexpr(0.6931471805599453)
PROCESSORS = 2 if INTERPRET else 132        # SMs of an H200: how many programs walk over rows
_tiled = TensorDescriptor.from_tensor       # (tensor, shape of the tiles that Hopper's copy engine reads it in)

class _Operation(torch.autograd.Function):
    """forward(*inputs) -> (outputs, saved); backward(*saved, *gradients of outputs) -> gradients of inputs. Both stand
    inside their operation and share its settings, but none of its inputs, which would stay in memory."""
    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        outs, saved = forward(*(x if x is None else x.contiguous() for x in inputs))
        ctx.save_for_backward(*saved)
        ctx.gradients = backward
        return outs
    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *ctx.gradients(*ctx.saved_tensors, *(x.contiguous() for x in gradients))

def _on_triton(x):                  # whether the kernel takes it: nothing that is empty, so no kernel has to care
    fits = x.dtype != torch.float64 if x.is_cuda else INTERPRET and x.dtype == torch.float32
    return fits and x.numel() > 0
def _wide(x):                       # in the precision that references compute in: fp32, or fp64 if that is what came
    return x.to(torch.promote_types(x.dtype, torch.float32))
def _ceil(a, b):                    # triton.cdiv takes 5 us a call
    return -(-a // b)
def _floats(x, *shape):             # space for numbers in fp32
    return x.new_empty(shape, dtype=torch.float32)
@jit
def _program(axis):                 # in 64 bits, for what it is multiplied by
    return tl.program_id(axis).to(tl.int64)
@jit
def _down(SIZE):
    return tl.arange(0, SIZE)[:, None]
@jit
def _across(SIZE):
    return tl.arange(0, SIZE)[None, :]
@jit
def _zeros(ROWS, COLUMNS):
    return tl.zeros([ROWS, COLUMNS], tl.float32)
@jit
def _sums(x):                       # of rows, as a column
    return tl.sum(x, 1)[:, None]
@jit
def _load(pointers, mask):          # in fp32, and zeros where it is masked
    return tl.load(pointers, mask, 0.0).to(tl.float32)
@jit
def _dot(a, b, acc=None):
    return tl.dot(a.to(b.dtype), b, acc, input_precision="tf32x3")      # of fp32: three products of tf32's 10 bits

@jit
def _merge(lses, means, lse, mean, PARTS: constexpr, DIM: constexpr):
    """A softmax in parts, [entries, parts]: each has the log of its sum of exp, and means [DIM] under itself."""
    entry = _program(0)
    part = _down(next_power_of_2(PARTS))
    at = entry * PARTS + part
    own = tl.load(lses + at, part < PARTS, MASKED)                      # [parts, 1]
    top = tl.max(own)
    weight = tl.exp2((own - top) * LOG2E)
    mass = tl.sum(weight)
    total = tl.sum(weight * _load(means + at * DIM + _across(DIM), part < PARTS), 0)
    tl.store(mean + entry * DIM + tl.arange(0, DIM), total / mass)
    tl.store(lse + entry, top + tl.log(mass))

# --- flash attention: softmax(q k') v without the scores ever leaving the chip ---------------------------------------
# FlashAttention-2 (Dao, arXiv 2307.08691): 2 * L * L * heads * dim operations forward, 2.5 times that backward,
# thousands for every byte: the tensor cores are the limit, and beside them exp2 (for 128 x 128 scores at dim 128 the
# products take 2048 cycles, exp2 1024). So: no masks but at the diagonal, the scale folded into the exponent, the
# longest rows first. One kernel owns queries (out, or dq), one owns keys (dk, dv): each sums in registers in a fixed
# order, for 7 products backward instead of 5 with atomics. What a program has many of comes by the copy engine, and the
# last tile of a sequence runs into the next one: keys from there are masked, queries have an lse of 1e30, so p is 0.
STEP = constexpr(64)        # keys (or queries) a step; in paged attention, too, so that sums have one order
@jit
def _halve(x, TIMES):
    """Adds the right half of the columns to the left half, so many times. Here the order of a sum is in the program;
    that of tl.sum follows from where a tile lies in registers, which differs from kernel to kernel."""
    for _ in tl.static_range(TIMES):
        left, right = tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))
        x = left + right
    return x
@jit
def _weigh(scores, values, unit, acc, top, mass):
    """A step of the online softmax, y = scores * unit: top is the largest y so far, acc the sum of exp2(y - top) *
    values, mass that of exp2(y - top), in 32 columns that _halve adds up at the end."""
    new_top = tl.maximum(top, tl.max(scores, 1) * unit)
    shrink = tl.exp2(top - new_top)[:, None]
    p = tl.exp2(scores * unit - new_top[:, None])                       # [rows, keys]
    return _dot(p, values, acc * shrink), new_top, mass * shrink + _halve(p, 1)
@jit
def _sequence(ends):                # where this program's sequence starts, and how long it is
    ends += tl.program_id(1)
    start = tl.load(ends)
    return start, tl.load(ends + 1) - start
@jit
def _rows(start, length, first, ROWS, DIM):
    """Where rows of this program's head are, from `first` in the sequence on, and which exist."""
    row = first + _down(ROWS)
    token = (start + row).to(tl.int64)
    return (token * tl.num_programs(0) + tl.program_id(0)) * DIM + _across(DIM), row < length
@jit
def _slot(start):               # of the sequence in lse and delta: a multiple of 128, so that no tile has two owners
    return (start // 128 + tl.program_id(1)) * 128

@jit
def _attention_queries(q, k, v, out, lse, dout, delta, dq, slots, q_ends, k_ends, scale,
                       GROUP: constexpr, DIM: constexpr, OWN: constexpr):
    """Forward: out, and the log-sum-exp in the units of q k', from which backward takes it. Backward, where there is a
    dout: dq = scale * sum over keys of ds k, where ds = p * (dout v' - delta) and delta = sum(out * dout)."""
    head = tl.program_id(0)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * OWN           # the longest rows first
    q_start, q_len = _sequence(q_ends)
    k_start, k_len = _sequence(k_ends)
    if first >= q_len:
        return
    unit = scale * LOG2E
    at, inside = _rows(q_start, q_len, first, OWN, DIM)
    row = first + _down(OWN)
    offset = k_len - q_len                              # query i sees key j if j <= i + offset
    full = (first + offset + 1) // STEP * STEP          # all queries of the tile see the keys before this,
    stop = tl.minimum(first + offset + OWN, k_len)      # and none of them those from here on
    slot = head * slots + _slot(q_start) + row
    q_tile = tl.load(q + at, inside)
    acc = _zeros(OWN, DIM)
    if dout is None:
        top = tl.max(acc, 1) + MASKED
        mass = _zeros(OWN, STEP // 2)
    else:
        dout_tile = tl.load(dout + at, inside)
        row_delta = _sums(_load(out + at, inside) * dout_tile)
        row_lse = tl.load(lse + slot) * unit
        tl.store(delta + slot, row_delta)
    for masked in tl.static_range(2):
        for n in range(full if masked else 0, stop if masked else full, STEP):
            k_tile = k.load([k_start + n, head // GROUP, 0]).reshape(STEP, DIM)
            v_tile = v.load([k_start + n, head // GROUP, 0]).reshape(STEP, DIM)
            scores = _dot(q_tile, k_tile.T)             # [OWN, STEP]
            if masked:
                scores = tl.where(n + _across(STEP) <= row + offset, scores, MASKED)
            if dout is None:
                acc, top, mass = _weigh(scores, v_tile, unit, acc, top, mass)
            else:
                p = tl.exp2(scores * unit - row_lse)
                ds = p * (_dot(dout_tile, v_tile.T) - row_delta)
                acc = _dot(ds, k_tile, acc)
    if dout is None:
        total = _halve(mass, 5)                         # [OWN, 1]
        tl.store(out + at, acc / total, inside)
        tl.store(lse + slot, (top[:, None] + tl.log2(total)) / unit, inside)
    else:
        tl.store(dq + at, acc * scale, inside)

@jit
def _attention_keys(q, dout, lse, delta, k, v, dk, dv, q_ends, k_ends, scale,
                    GROUP: constexpr, DIM: constexpr, OWN: constexpr):
    """dv = sum over queries of p' dout; dk = scale * sum of ds' q. Scores are made transposed, keys down the rows, so
    that both sums take them as they lie in registers; products begin at -lse and -delta: no subtractions."""
    kv_head = tl.program_id(0)
    first = tl.program_id(2) * OWN
    q_start, q_len = _sequence(q_ends)
    k_start, k_len = _sequence(k_ends)
    if first >= k_len:
        return
    at, inside = _rows(k_start, k_len, first, OWN, DIM)
    slot = _slot(q_start)
    offset = k_len - q_len
    low = tl.maximum(first - offset, 0) // STEP * STEP
    full = tl.minimum(tl.maximum(first - offset + OWN - 1, 0), q_len)
    full = tl.cdiv(full, STEP) * STEP                   # from here on all queries see all keys of the tile
    k_tile = tl.load(k + at, inside)
    v_tile = tl.load(v + at, inside)
    zeros = _zeros(OWN, STEP)
    dk_acc = _zeros(OWN, DIM)
    dv_acc = _zeros(OWN, DIM)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        for masked in tl.static_range(1, -1, -1):
            for m in range(low if masked else full, full if masked else q_len, STEP):
                q_tile = q.load([q_start + m, head, 0]).reshape(STEP, DIM)
                scores = _dot(k_tile, q_tile.T, zeros - lse.load([head, slot + m]))     # [OWN, STEP]
                p = tl.exp2(scores * (scale * LOG2E))
                if masked:
                    p = tl.where(first + _down(OWN) <= m + _across(STEP) + offset, p, 0.0)
                dout_tile = dout.load([q_start + m, head, 0]).reshape(STEP, DIM)
                dv_acc = _dot(p, dout_tile, dv_acc)
                ds = p * _dot(v_tile, dout_tile.T, zeros - delta.load([head, slot + m]))
                dk_acc = _dot(ds, q_tile, dk_acc)
    tl.store(dk + at, dk_acc * scale, inside)
    tl.store(dv + at, dv_acc, inside)

def _attend(q, k, v, scale):        # one sequence, whose queries are its last tokens
    whole = len(q) == len(k)
    seen = None if whole else q.new_ones(len(q), len(k)).tril(len(k) - len(q)).bool()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))              # [1, heads, length, dim]
    out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=whole, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
def flash_attention_reference(q, k, v, q_ends, k_ends, scale=None):
    *queries, rest = q.tensor_split(q_ends.tolist()[1:])                # rest: tokens of no sequence
    keys, values = (x.tensor_split(k_ends.tolist()[1:]) for x in (k, v))
    outs = [_attend(*x, scale) for x in zip(queries, keys, values)]
    return torch.cat([*outs, torch.zeros_like(rest)])
def flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, scale=None,
                    covered=False):
    """Causal attention over packed sequences that never see each other: q [tokens, heads, dim], k and v [tokens,
    kv_heads, dim], sequence i at [cu_seqlens[i], cu_seqlens[i + 1]) (int32). Without cu_seqlens_k it is that of q. A
    sequence may have fewer queries than keys; they are then the last ones. Pass the longest lengths, or programs are
    started for sequences as long as all. scale is positive, by default dim ** -0.5. Tokens of no sequence get zeros;
    covered=True says that there are none, which saves writing them."""
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q
    if not _on_triton(q):
        return flash_attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
    heads, dim = q.shape[1:]
    kv_heads = k.shape[1]
    if heads % kv_heads or dim not in (16, 32, 64, 128):
        raise ValueError(f"{heads} heads of {dim} share {kv_heads}: take a multiple, of 16, 32, 64 or 128")
    sequences = len(cu_seqlens_q) - 1
    settings = cu_seqlens_q.int(), cu_seqlens_k.int(), scale or dim ** -0.5, heads // kv_heads, dim
    blank = torch.empty_like if covered else torch.zeros_like
    itemsize = q.itemsize
    def steps(*tensors):
        return [_tiled(x, [STEP.value, 1, dim]) for x in tensors]
    def launch(kernel, heads, longest, own, *tensors):
        """32 scores a thread; fp32 takes three products and twice the space: smaller tiles."""
        own = own if itemsize == 2 else 32
        grid = heads, sequences, _ceil(longest, own)
        kernel[grid](*tensors, *settings, own, num_warps=max(4, own // 16), num_stages=6 // itemsize)
    queries = partial(launch, _attention_queries, heads, max_seqlen_q or len(q))
    def forward(q, k, v):
        out = blank(q)
        slots = (len(q) // 128 + sequences + 1) * 128                   # see _slot
        lse = _floats(q, heads, slots).fill_(-MASKED.value)    # past a sequence's end it weighs nothing backward
        queries(64 if dim == 128 else 128, q, *steps(k, v), out, lse, None, None, None, slots)
        return out, (q, k, v, out, lse)
    def backward(q, k, v, out, lse, dout):
        delta = torch.zeros_like(lse)
        dq, dk, dv = map(blank, (q, k, v))
        queries(128, q, *steps(k, v), out, lse, dout, delta, dq, lse.shape[1])
        launch(_attention_keys, kv_heads, max_seqlen_k or len(k), max(64, dim),
               *steps(q, dout), *(_tiled(x, [1, STEP.value]) for x in (lse, delta)), k, v, dk, dv)
        return dq, dk, dv
    return _Operation.apply(forward, backward, q, k, v)

# --- paged attention: decoding against a cache in pages --------------------------------------------------------------
# One query a sequence: 4 * group operations for every 4 bytes of cache, so the limit is reading the cache once. The
# query heads of a group are the rows of one dot (padded to the 16 that the tensor cores want). A sequence can be split
# over several programs by its own length, which keeps all SMs reading when the batch is small; with one split the
# arithmetic is that of flash attention, in the same order. The grid depends on shapes alone, for CUDA graphs.
@jit
def _paged_part(q, k_cache, v_cache, block_table, context_lens, lse, out, table_stride, scale,
                GROUP: constexpr, DIM: constexpr, PAGE: constexpr):
    kv_head = tl.program_id(0)
    sequence = _program(1)
    split = tl.program_id(2)
    length = tl.load(context_lens + sequence)
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), STEP) * STEP       # tokens of a split
    stop = tl.minimum(length, split * share + share)
    ROWS: constexpr = max(16, next_power_of_2(GROUP))
    dims = _across(DIM)
    mine = _down(ROWS) < GROUP
    heads = (sequence * tl.num_programs(0) + kv_head) * GROUP + _down(ROWS)
    q_tile = tl.load(q + heads * DIM + dims, mine)
    acc = _zeros(ROWS, DIM)
    top = tl.max(acc, 1) + MASKED
    mass = _zeros(ROWS, STEP // 2)
    for n in range(split * share, stop, STEP):
        token = n + _down(STEP)
        live = token < stop
        page = tl.load(block_table + sequence * table_stride + token // PAGE, live).to(tl.int64)
        slot = page * PAGE + token % PAGE
        at = slot * (tl.num_programs(0) * DIM) + kv_head * DIM + dims   # this way it takes 123 registers, and not 154
        k_tile = tl.load(k_cache + at, live)
        v_tile = tl.load(v_cache + at, live, 0.0)                       # 0 times anything else might be NaN
        scores = tl.where(live.T, _dot(q_tile, k_tile.T), MASKED)       # [ROWS, STEP]
        acc, top, mass = _weigh(scores, v_tile, scale * LOG2E, acc, top, mass)
    total = tl.maximum(_halve(mass, 5), 1e-30)                          # that of an empty split is 0
    part = heads * tl.num_programs(2) + split
    tl.store(out + part * DIM + dims, acc / total, mine)
    tl.store(lse + part, (top[:, None] + tl.log2(total)) * LN2, mine)

def paged_attention_reference(q, k_cache, v_cache, block_table, context_lens, scale=None):
    outs = []
    for query, pages, length in zip(q, block_table, context_lens):
        pages = pages[:_ceil(length, k_cache.shape[1])]
        k, v = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        outs.append(_attend(query[None], k, v, scale))
    return torch.cat(outs)
def paged_attention(q, k_cache, v_cache, block_table, context_lens, scale=None, splits=None):
    """One token a sequence, q [batch, heads, dim], against caches [pages, page_size, kv_heads, dim]. Token t of
    sequence i is in page block_table[i, t // page_size] (int32 [batch, pages]; beyond the length it is not read).
    context_lens [batch] counts the new token. A length of 0 gives zeros. splits is how many programs share a sequence:
    None chooses by the sizes of all, 1 gives exactly what flash_attention gives for the last query, in any batch."""
    if not _on_triton(q):
        return paged_attention_reference(q, k_cache, v_cache, block_table, context_lens, scale)
    batch, heads, dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    if splits is None:              # an SM gets up to 4 programs, but none less than 256 tokens of a full table
        most = min(4 * PROCESSORS // (batch * kv_heads), _ceil(block_table.shape[1] * page, 256), 64)
        splits = next_power_of_2(max(1, most) + 1) // 2                 # the largest power of two <= most
    out = q.new_empty(q.shape)
    parts = out if splits == 1 else _floats(q, batch, heads, splits, dim)
    lses = _floats(q, batch, heads, splits)
    _paged_part[kv_heads, batch, splits](
        q.contiguous(), k_cache.view(-1), v_cache.view(-1), block_table, context_lens, lses, parts,
        block_table.stride(0), scale or dim ** -0.5, heads // kv_heads, dim, page)
    if splits > 1:
        _merge[(batch * heads,)](lses, parts, torch.empty_like(lses), out, splits, dim, num_warps=2)
    return out

@jit
def _store_kv(k, v, k_cache, v_cache, slots, k_stride, k_step, v_stride, v_step, WIDTH: constexpr):
    token = _program(0)
    slot = tl.load(slots + token).to(tl.int64)
    column = tl.arange(0, next_power_of_2(WIDTH))
    mask = column < WIDTH
    if slot < 0:
        return
    at = slot * WIDTH + column
    tl.store(k_cache + at, tl.load(k + token * k_stride + column * k_step, mask), mask)
    tl.store(v_cache + at, tl.load(v + token * v_stride + column * v_step, mask), mask)

def store_kv(k, v, k_cache, v_cache, slot_mapping):
    """k, v [tokens, kv_heads, dim] into caches [pages, page_size, kv_heads, dim], in place: token i into slot
    slot_mapping[i] = page * page_size + offset, or nowhere if that is negative (padding)."""
    k = k.flatten(1)
    v = v.flatten(1)
    width = k.shape[1]
    k_cache = k_cache.view(-1, width)
    v_cache = v_cache.view(-1, width)
    if _on_triton(k):
        _store_kv[(len(k),)](k, v, k_cache, v_cache, slot_mapping, *k.stride(), *v.stride(), width)
        return
    real = slot_mapping >= 0
    k_cache[slot_mapping[real]] = k[real]
    v_cache[slot_mapping[real]] = v[real]

# --- rms norm --------------------------------------------------------------------------------------------------------
# y = x / sqrt(mean(x^2) + eps) * weight. Forward reads x and writes y, 4 bytes an element in bf16 (8 with the residual,
# 10 in two kernels): bytes are the limit. A tile of whole rows stays in registers, so the second use of x is free.
# dweight is a sum over all rows: a fixed number of programs walks over them, each sums in registers, then _add_up.
@jit
def _rms_norm(x, other, weight, out, summed, dout, dweight, rows, eps, WIDTH: constexpr, TOGETHER: constexpr):
    """Forward: other, if there is one, is the residual, and x + other goes into summed. Backward, where there is a
    dout: x is what was normalised, out its gradient, and other what is added to that."""
    BLOCK: constexpr = next_power_of_2(WIDTH)
    STAGES: constexpr = 1 if dout is None else 3
    column = _across(BLOCK)
    w = _load(weight + column, column < WIDTH)
    total = _zeros(TOGETHER, BLOCK)
    for tile in tl.range(_program(0), tl.cdiv(rows, TOGETHER), tl.num_programs(0), num_stages=STAGES):
        row = tile * TOGETHER + _down(TOGETHER)
        mask = (row < rows) & (column < WIDTH)
        at = row * WIDTH + column
        h = _load(x + at, mask)
        if dout is None and other is not None:
            rounded = (h + _load(other + at, mask)).to(summed.dtype.element_ty)
            tl.store(summed + at, rounded, mask)
            h = rounded.to(tl.float32)
        r = tl.rsqrt(_sums(h * h) / WIDTH + eps)
        n = h * r
        if dout is None:
            tl.store(out + at, n * w, mask)
        else:
            dy = _load(dout + at, mask)
            total += dy * n
            g = dy * w                                                  # the gradient of n
            grad = (g - n * (_sums(g * n) / WIDTH)) * r
            if other is not None:
                grad += _load(other + at, mask)
            tl.store(out + at, grad, mask)
    if dout is not None:
        at = column * tl.num_programs(0) + tl.program_id(0)
        tl.store(dweight + at, tl.sum(total, 0)[None, :], column < WIDTH)

@jit
def _add_up(parts, out, count):
    """Each row of parts [.., count]. (torch's sum, and then a cast, make backward 3% slower.)"""
    row = tl.program_id(0)
    at = tl.arange(0, 1024)
    tl.store(out + row, tl.sum(_load(parts + row * count + at, at < count)))

def rms_norm_reference(x, weight, eps=1e-6, residual=None):
    h = x if residual is None else x + residual
    out = F.rms_norm(h, weight.shape, weight.to(h.dtype), eps)          # h / sqrt(mean(h^2) + eps) * weight
    return out if residual is None else (out, h)
def rms_norm(x, weight, eps=1e-6, residual=None):
    """Over the last axis. With a residual, x + residual is normalised, and (normalised, x + residual) returned."""
    if weight.shape != x.shape[-1:] or residual is not None and residual.shape != x.shape:
        raise ValueError("weight must be as wide as x, and residual of its shape")
    if not _on_triton(x):
        return rms_norm_reference(x, weight, eps, residual)
    width = len(weight)
    rows = x.numel() // width
    block = next_power_of_2(width)
    together = max(1, 2048 // block)        # rows of a tile, and 16 elements a thread
    warps = min(16, max(4, block // 512))
    def launch(programs, *tensors):
        _rms_norm[(programs,)](*tensors, rows, eps, width, together, num_warps=warps)
    def forward(x, weight, residual):
        out = torch.empty_like(x)
        h = x if residual is None else torch.empty_like(x)
        launch(_ceil(rows, together), x, residual, weight, out, h, None, None)
        return out if residual is None else (out, h), (h, weight)
    def backward(h, weight, dout, dsummed=None):
        programs = 4 * PROCESSORS
        dx = torch.empty_like(h)
        dweight = torch.empty_like(weight)
        parts = _floats(h, width, programs)
        launch(programs, h, dsummed, weight, dx, None, dout, parts)
        _add_up[(width,)](parts, dweight, programs)
        return dx, dweight, None if dsummed is None else dx
    return _Operation.apply(forward, backward, x, weight, residual)

# --- queries, keys and values: the norm of heads and rotary position embedding ---------------------------------------
# Out of the one product that made them: q and k are normalised head by head (Qwen3; or not), then each pair (x[i],
# x[i + dim / 2]) of a head is turned by the angle of its position. v stays where it is. Reads and writes q and k once,
# 4 bytes an element: bytes are the limit. The heads of a token are taken in parts of kv_heads: `GROUP` of queries and
# one of keys. A program walks over tokens with one part, [heads, dim]; backward it sums up the norm's gradient.
@jit
def _turn(x, c, s):                 # x * c + (the other one of each pair) * s
    other = tl.flip(x.reshape(x.shape[0], 2, x.shape[1] // 2), 1).reshape(x.shape)
    return x * c + other * s

@jit
def _qkv_rotary(qkv, q_norm, k_norm, q, k, v, dqkv, dnorms, cos, sin, positions, table_stride, eps, tokens,
                GROUP: constexpr, HEADS: constexpr, DIM: constexpr):
    """Forward it writes q and k. Backward, where there is a dqkv, q, k and v (which forward has no part for) are the
    gradients of what came out."""
    BLOCK: constexpr = next_power_of_2(HEADS)
    part = tl.program_id(0)
    dim = _across(DIM)
    head = _down(BLOCK)
    at = head * DIM + dim
    mask = head < HEADS
    turned = head < HEADS * (part <= GROUP)                             # values are not
    inside = part * HEADS * DIM + at                                    # of token 0: in qkv, and in q, k or v
    outside = q + inside
    stride = tl.where(part < GROUP, GROUP, 1) * HEADS * DIM
    norm = q_norm
    if part == GROUP:
        outside = k + at
        norm = k_norm
    if part > GROUP:
        outside = v + at
    if q_norm is not None:
        w = _load(norm + dim, dim < DIM)
    total = _zeros(BLOCK, DIM)
    for token in tl.range(_program(1), tokens, tl.num_programs(1), num_stages=3):
        angle = tl.load(positions + token) * table_stride + dim % (DIM // 2)
        c = tl.load(cos + angle)
        s = tl.load(sin + angle) * tl.where(dim < DIM // 2, -1.0, 1.0)
        here = inside + token * (GROUP + 2) * HEADS * DIM
        x = _load(qkv + here, turned)
        if q_norm is not None:
            r = tl.rsqrt(_sums(x * x) / DIM + eps)
            n = x * r
            x = n * w
        if dqkv is None:
            tl.store(outside + token * stride, _turn(x, c, s), mask)
        else:
            dy = _load(outside + token * stride, mask)
            dx = _turn(dy, c, -s)
            if q_norm is not None:
                total += dx * n
                g = dx * w
                dx = (g - n * (_sums(g * n) / DIM)) * r
            tl.store(dqkv + here, tl.where(turned, dx, dy), mask)
    if dqkv is not None:
        at = (part * tl.num_programs(1) + tl.program_id(1)) * DIM + dim
        tl.store(dnorms + at, tl.sum(total, 0)[None, :])

def qkv_rotary_reference(qkv, heads, kv_heads, cos, sin, positions, q_norm=None, k_norm=None, eps=1e-6):
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
    half = q.shape[2] // 2
    c, s = (table[positions, None, :half] for table in (cos, sin))      # [tokens, 1, dim / 2]
    def turned(x, norm):
        if norm is not None:
            x = rms_norm_reference(x, norm, eps)
        a, b = x.chunk(2, -1)                   # in fp32, as the tables are
        return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)
    return turned(q, q_norm), turned(k, k_norm), v
def qkv_rotary(qkv, heads, kv_heads, cos, sin, positions, q_norm=None, k_norm=None, eps=1e-6):
    """q [tokens, heads, dim], k and v [tokens, kv_heads, dim] as attention wants them, out of the one product that made
    them, [tokens, (heads + 2 * kv_heads) * dim]; heads are a multiple of kv_heads. Tables are [max_positions, dim / 2],
    or dim wide with both halves the same, as Hugging Face makes them; positions [tokens] index them."""
    if not _on_triton(qkv):
        return qkv_rotary_reference(qkv, heads, kv_heads, cos, sin, positions, q_norm, k_norm, eps)
    tokens = len(qkv)
    dim = qkv.shape[1] // (heads + 2 * kv_heads)
    group = heads // kv_heads
    def launch(parts, programs, *tensors):
        _qkv_rotary[parts, programs](*tensors, cos, sin, positions, cos.stride(0), eps, tokens, group, kv_heads, dim,
                                     num_warps=1)
    def forward(qkv, q_norm, k_norm):
        q = qkv.new_empty(tokens, heads, dim)
        k = qkv.new_empty(tokens, kv_heads, dim)
        launch(group + 1, min(tokens, 2**15), qkv, q_norm, k_norm, q, k, k, None, None)
        return (q, k, qkv.unflatten(1, (-1, dim))[:, heads + kv_heads:]), (qkv, q_norm, k_norm)
    def backward(qkv, q_norm, k_norm, dq, dk, dv):
        programs = 8 * PROCESSORS
        dqkv = torch.empty_like(qkv)
        dnorms = _floats(qkv, group + 2, programs, dim)
        launch(group + 2, programs, qkv, q_norm, k_norm, dq, dk, dv, dqkv, dnorms)
        if q_norm is None:
            return dqkv, None, None
        return dqkv, dnorms[:group].sum((0, 1)), dnorms[group].sum(0)
    return _Operation.apply(forward, backward, qkv, q_norm, k_norm)

# --- swiglu ----------------------------------------------------------------------------------------------------------
# silu(gate) * up, the halves of one product's output. Forward reads 4 bytes an output and writes 2; backward reads 6
# and writes 4: bytes are the limit. The sigmoid is computed again, not kept: cheaper than its bytes.
@jit
def _swiglu(gate_up, dout, out, WIDTH: constexpr):
    row = _program(0)
    column = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    mask = column < WIDTH
    here = row * WIDTH + column
    at = row * WIDTH + here
    gate = _load(gate_up + at, mask)
    up = _load(gate_up + at + WIDTH, mask)
    sigmoid = tl.sigmoid(gate)
    if dout is None:
        tl.store(out + here, gate * sigmoid * up, mask)
    else:                                                               # out is the gradient of gate_up
        dy = _load(dout + here, mask)
        tl.store(out + at, dy * up * sigmoid * (1 + gate * (1 - sigmoid)), mask)
        tl.store(out + at + WIDTH, dy * gate * sigmoid, mask)

def swiglu_reference(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
def swiglu(gate_up):
    """[..., 2 * width], the gate first, to [..., width]."""
    if not _on_triton(gate_up):
        return swiglu_reference(gate_up)
    width = gate_up.shape[-1] // 2
    grid = gate_up.numel() // width // 2, _ceil(width, 1024)
    def forward(gate_up):
        out = torch.empty_like(gate_up[..., :width])
        _swiglu[grid](gate_up, None, out, width)
        return out, (gate_up,)
    def backward(gate_up, dout):
        dgate_up = torch.empty_like(gate_up)
        _swiglu[grid](gate_up, dout, dgate_up, width)
        return dgate_up,
    return _Operation.apply(forward, backward, gate_up)

# --- linear cross entropy: the output head and the loss in one, without the logits -----------------------------------
# 16k tokens x 152k words are 5 GB of logits in bf16, and the loss needs three numbers a token from them. With
# y = hidden @ weight' / temperature and p = softmax(y): lse = log(sum(exp(y))), mean = sum(p * y), hit = y[target];
#     logprob = hit - lse        dy[j] = p[j] * (dlse + dmean * (1 + y[j] - mean)) + (j == target) * dhit
#     entropy = lse - mean
# Forward is a matrix product whose tiles (the same for any number of rows) are reduced in registers to their own lse
# and mean, which _merge puts together. Backward makes the tiles again, for a slice of the vocabulary at a time, turns
# them into dy, and leaves dy @ weight and dy' @ hidden to cuBLAS, summed in fp32: tensor cores are the limit.
SLICE = 2**18       # rows of dy, of 256 words each, that backward has at a time: 128 MB in bf16
@jit
def _head(x, weight, inverse, targets, lse, mean, hit, of_p, of_py, of_target, dy, words):
    """A tile of y. Forward: lse and mean of each row of it, and y at the target. Backward, where there is a dy: it is p
    * (of_p + of_py * y), and of_target at the target."""
    BM: constexpr = x.block_shape[0]
    BK: constexpr = x.block_shape[1]
    BV: constexpr = weight.block_shape[0]
    part = tl.program_id(1)
    y = _zeros(BM, BV)
    for k in range(0, x.shape[1], BK):
        y = _dot(x.load([tl.program_id(0) * BM, k]), weight.load([part * BV, k]).T, y)
    row = tl.program_id(0) * BM + _down(BM)
    column = part * BV + _across(BV)
    inside = row < x.shape[0]
    y *= _load(inverse + row, inside)
    target = tl.load(targets + row, inside, 0)
    if dy is None:
        y = tl.where(column < words, y, MASKED)
        tl.store(hit + row, _sums(tl.where(column == target, y, 0.0)), inside & (target // BV == part))
        top = tl.max(y, 1)[:, None]
        y -= top
        p = tl.exp2(y * LOG2E)
        mass = _sums(p)
        at = row.to(tl.int64) * tl.num_programs(1) + part
        tl.store(lse + at, top + tl.log(mass), inside)
        tl.store(mean + at, top + _sums(p * y) / mass, inside)
    else:
        p = tl.exp2((y - _load(lse + row, inside)) * LOG2E)
        y = p * (_load(of_p + row, inside) + _load(of_py + row, inside) * y)
        y += tl.where(column == target, _load(of_target + row, inside), 0.0)
        tl.store(dy + row.to(tl.int64) * words + column, y, inside & (column < words))

def _statistics(hidden, weight, targets, inverse):  # lse, mean and hit of every row
    BM, BV, BK = (64, 64, 32) if hidden.itemsize == 4 else (128, 256, 64)
    targets = targets.int()
    def launch(x, weight, *tensors):
        grid = _ceil(len(x), BM), _ceil(len(weight), BV)
        _head[grid](_tiled(x, [BM, BK]), _tiled(weight, [BV, BK]), inverse, *tensors, len(weight), num_warps=8)
    def forward(x, weight):
        parts = _ceil(len(weight), BV)
        lses, means = inverse.new_empty(2, len(x), parts)
        lse, mean, hit = inverse.new_empty(3, len(x))
        launch(x, weight, targets, lses, means, hit, None, None, None, None)
        _merge[(len(x),)](lses, means, lse, mean, parts, 1)
        return (lse, mean, hit), (x, weight, lse, mean)
    def backward(x, weight, lse, mean, dlse, dmean, dhit):
        rows = lse, None, None, inverse * (dlse + dmean * (1 - mean)), inverse * dmean, inverse * dhit
        dx = torch.zeros_like(x, dtype=torch.float32)
        dweight = torch.empty_like(weight)
        step = 256 * _ceil(SLICE, len(x))
        for i, words in enumerate(weight.split(step)):
            dy = x.new_empty(len(x), len(words))
            launch(x, words, targets - i * step, *rows, dy)
            torch.mm(dy.T, x, out=dweight.split(step)[i])
            if x.is_cuda:
                torch.addmm(dx, dy, words, out_dtype=dx.dtype, out=dx)
            else:
                dx += dy @ words
        return dx, dweight
    return _Operation.apply(forward, backward, hidden, weight)
def _statistics_reference(hidden, weight, targets, inverse):
    y = _wide(hidden) @ _wide(weight).T * inverse[:, None]
    return y.logsumexp(1), (y.softmax(1) * y).sum(1), y.gather(1, targets[:, None])[:, 0]

def linear_cross_entropy(hidden, weight, targets, temperature=1.0, group=None):
    """The logprob of each target, and the entropy, under softmax(hidden @ weight' / temperature): both [tokens] in
    fp32, and both differentiable. hidden [tokens, width], weight [vocab, width], temperature a number or one a token.
    A negative target (-100) is ignored: 0, without gradient; one beyond the vocabulary gives NaN. With a process group
    each rank holds a slice of the rows of weight, in order of rank and of one size, and all ranks the same hidden and
    targets (of the whole vocabulary); all get the same result, and the whole gradient of hidden."""
    targets = targets.expand(len(hidden))               # which raises if they are not as many
    vocab = words = len(weight)
    first = 0
    if group is not None:
        first = words * dist.get_rank(group)
        vocab = words * dist.get_world_size(group)
        hidden = hidden.view_as(hidden)
        if hidden.requires_grad:                        # its gradient here is a part of the sum
            hidden.register_hook(lambda gradient: dist.all_reduce(gradient, group=group))
    inverse = 1 / (_wide(torch.zeros_like(hidden[:, 0])) + temperature)
    statistics = _statistics if _on_triton(hidden) else _statistics_reference
    target = (targets - first).clamp(0, words - 1)
    lse, mean, hit = statistics(hidden, weight, target, inverse)
    if group is not None:
        own = torch.stack([lse, mean, hit * (target == targets - first)])           # 0 if it is not here
        parts = [torch.empty_like(own) for _ in range(vocab // words)]
        dist.all_gather(parts, own.detach(), group)
        parts[first // words] = own                     # gradients flow into this rank's own
        lse, mean, hit = torch.stack(parts, 1)          # [ranks, tokens] each
        lse, mean, hit = lse.logsumexp(0), (lse.softmax(0) * mean).sum(0), hit.sum(0)
    live = torch.where(targets < vocab, targets >= 0, torch.nan)
    return (hit - lse).clamp(max=0) * live, (lse - mean) * live

# --- sampling --------------------------------------------------------------------------------------------------------
# An exponential race: with E[j] = -log(1 - u[j]), the largest log p[j] - log E[j] is a sample from p (Gumbel's trick).
# u[j] is a hash of (seed, position, j): whatever else is in the batch, the same request gives the same tokens. One pass
# over the row samples and sums up the probabilities. Top-k and top-p need the lowest score that is kept: a search that
# tries 8 bounds in one pass, then 8 between the two that the answer lies between: 3 bits a pass.
BLOCK = constexpr(1024)             # columns at a time, one a thread
@jit
def _scores(row, column, vocab, top, inverse):
    return (tl.load(row + column, column < vocab, -float("inf")) - top) * inverse
@jit
def _lowest(row, vocab, low, need, top, inverse, COUNT):
    """The highest of 2**18 bounds in [low, 0) that keeps `need`: so many, or this share of the mass that low keeps."""
    step = -low / 8
    for i in range(6):
        bounds = low + step * _down(8)
        kept = _zeros(8, BLOCK)
        for first in range(0, vocab, BLOCK):
            score = _scores(row, first + _across(BLOCK), vocab, top, inverse)
            kept += tl.where(score >= bounds, 1.0 if COUNT else tl.exp2(score), 0.0)
        kept = _sums(kept)
        if not COUNT:
            if i == 0:
                need *= tl.max(kept)
        low = tl.max(tl.where(kept >= need, bounds, low))
        step /= 8
    return low
@jit
def _key(seed, position):           # the upper half of a product of 64 bits, which depends on all of them
    return (seed * 0x5851F42D4C957F2D + position) * 0x14057B7EF767814F >> 32
@jit
def _mix(x):
    """"lowbias32" of C. Wellons' hash prospector, of 32 bits. (The reference calls both with 64-bit tensors.)"""
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)

@jit
def _sample(logits, tops, temperature, top_k, top_p, seeds, positions, tokens, logprobs, full_logprobs, vocab):
    program = _program(0)
    row = logits + program * vocab
    heat = tl.load(temperature + program)
    luck = heat > 0                                         # none: greedy, and otherwise as at temperature 1
    inverse = LOG2E / tl.where(luck, heat, 1.0)
    top = tl.load(tops + program)
    low = tl.full([], -64.0, tl.float32)                    # what is 64 bits below the top has no probability
    k = tl.load(top_k + program)
    if k > 0:
        low = _lowest(row, vocab, low, k, top, inverse, True)
    nucleus = _load(top_p + program, True)
    if nucleus < 1:
        low = _lowest(row, vocab, low, nucleus, top, inverse, False)
    key = _key(tl.load(seeds + program), tl.load(positions + program)).to(tl.uint32)
    lanes = _across(BLOCK)
    full = _zeros(1, BLOCK)                                 # each lane keeps its own sums, and the winner of its race
    kept = _zeros(1, BLOCK)
    best = _zeros(1, BLOCK) + MASKED
    token = lanes
    for first in range(0, vocab, BLOCK):
        column = first + lanes
        score = _scores(row, column, vocab, top, inverse)
        p = tl.exp2(score)
        full += p
        kept += tl.where(score >= low, p, 0.0)
        bits = _mix(_mix(column + key) ^ key)
        u = (bits.to(tl.float32) + 0.5) * 2**-32
        # 1 - u loses the digits of a small u, so it takes the series; a u that was rounded to 1 would be no sample
        race = tl.where(u < 0.001, u * (1 + 0.5 * u), -tl.log(1 - tl.minimum(u, 0.99999994)))
        rank = tl.where(score >= low, score - luck * tl.log2(race), MASKED)
        token = tl.where(rank > best, column, token)
        best = tl.maximum(rank, best)
    token = tl.min(tl.where(best == tl.max(best), token, vocab))        # the lowest of equals
    score = _scores(row, token, vocab, top, inverse)
    tl.store(tokens + program, token)
    tl.store(logprobs + program, (score - tl.log2(tl.sum(kept))) * LN2 * luck)
    tl.store(full_logprobs + program, (score - tl.log2(tl.sum(full))) * LN2)

def sample_reference(logits, temperature, top_k, top_p, seeds, positions):
    vocab = logits.shape[1]
    heat = temperature[:, None]
    hot = heat > 0
    full = (logits.float() / heat.where(hot, 1)).log_softmax(-1)
    ordered = full.sort(descending=True).values
    last = (top_k.clamp(0, vocab) - 1) % vocab                          # of the top k, or of all
    p = ordered.where(ordered >= ordered.gather(1, last[:, None]), -torch.inf).softmax(-1)
    stays = (p > 0) & (p.cumsum(-1) - p < top_p[:, None])               # what is larger holds less than top_p
    lowest = ordered.where(stays, 0).amin(-1, keepdim=True)
    kept = full.where(full >= lowest, -torch.inf).log_softmax(-1)
    mix = _mix.fn                                                       # the plain function
    key = _key.fn(seeds, positions)[:, None]
    column = torch.arange(vocab, device=key.device)
    u = (mix(mix(column + key) ^ key).double() + 0.5) * 2**-32
    tokens = (kept - hot * torch.log(-torch.log1p(-u))).argmax(-1, keepdim=True)        # who wins the race
    logprobs = kept.gather(1, tokens) * hot
    return tokens[:, 0], logprobs[:, 0], full.gather(1, tokens)[:, 0]
def sample(logits, temperature, top_k, top_p, seeds, positions, return_full=False):
    """Tokens [batch] (int64) and their logprobs under what they were sampled from: softmax(logits / temperature), the
    top_k largest of it (-1: all), then the fewest of those that hold top_p of the mass; equal logits (to 0.0002 times
    the temperature) stay or go together. With return_full also the logprobs under all of softmax(logits / temperature),
    for training. temperature, top_k, top_p: numbers, or one a row. Temperature 0 is greedy: the first of the largest,
    logprob 0, the full one at temperature 1. seeds and positions [batch] (int64) are all the randomness."""
    settings = [torch.as_tensor(x, device=seeds.device).expand(len(seeds)).contiguous()
                for x in (temperature, top_k, top_p, seeds, positions)]
    if _on_triton(logits):
        found = torch.empty_like(seeds), *_floats(logits, 2, len(seeds))
        _sample[(len(seeds),)](
            logits.contiguous(), logits.amax(1).float(), *settings, *found, logits.shape[1], num_warps=32)
    else:
        found = sample_reference(logits, *settings)
    return found if return_full else found[:2]

# --- the demo: every kernel against its twin, and on a GPU against the clock -----------------------------------------
def both_ways(operation, *args):
    """What it returns, and the gradients of half the sum of its squares, of the arguments that want one."""
    outs = operation(*args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    if not outs[0].requires_grad:
        return outs
    inputs = [x for x in args if getattr(x, "requires_grad", False)]
    return *outs, *torch.autograd.grad(outs, inputs, [x.detach().contiguous() for x in outs])

def main():
    cuda = torch.cuda.is_available()
    torch.set_default_device("cuda" if cuda else "cpu")
    n, few, kv, dim, vocab = (131_072, 8192, 8, 128, 151_936) if cuda else (128, 128, 1, 64, 500)
    make = partial(torch.randn, dtype=torch.bfloat16 if cuda else torch.float32, requires_grad=True)
    rows = torch.arange(n)
    q = make(few, 2 * kv, dim)
    k, v = make(2, few, kv, dim)
    x = make(n, kv * dim)
    pages = make(2, n // 16, 16, kv, dim)
    table = torch.randperm(n // 16).int().view(-1, few // 64)           # [sequences, pages]
    print("the worst relative error against the twin in fp64; on a GPU also ms forward, and with the backward pass")
    for operation, *args in (
        (flash_attention, q, k, v, torch.tensor([0, few]).int(), None, few),
        (paged_attention, q[:len(table)], *pages, table, torch.full_like(table[:, 0], few // 4 - 3)),
        (rms_norm, x, make(kv * dim)),
        (qkv_rotary, make(n, 4 * kv * dim), 2 * kv, kv, *torch.randn(2, n, dim // 2), rows, *q[0, :2]),
        (swiglu, make(n, 6 * kv * dim)),
        (linear_cross_entropy, x[:few], make(vocab, kv * dim) * 0.05, rows[:few]),
    ):
        twins = [x.double() if getattr(x, "requires_grad", False) else x for x in args]
        pairs = zip(both_ways(operation, *args), both_ways(operation, *twins))
        worst = max((a - b).norm() / b.norm() for a, b in pairs)
        print(f"{operation.__name__:22}{worst:9.1e}", end="")
        assert worst < (2e-2 if cuda else 1e-5)
        for call in (operation, partial(both_ways, operation)) if cuda else ():
            print(f"{triton.testing.do_bench(partial(call, *args), rep=200):10.3f}", end="")
        print()

if __name__ == "__main__":
    main()
