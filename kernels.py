"""kernels: Triton kernels and their plain twins.

Each operation is a public function with three things side by side: a Triton kernel, a torch reference that states the
mathematics in a few lines, and why the kernel is fast: the bytes it moves, the operations it does, and which is the
limit. A fast kernel reads each input once, keeps what it computes in registers, and writes each output once.

    HBM  4.8 TB/s  ------->  L2  ------->  shared memory  ------->  tensor cores, 990 TFLOP/s in bf16
                             50 MB         228 KB an SM             registers, 256 KB an SM (132 SMs)

This chip, an H200 by its data sheet, does 200 operations in the time that it moves one byte. The shares below were
measured on one, of what it reaches in a copy (4.27 TB/s) or a product of 8192 x 8192 matrices (687 TFLOP/s).

Public names: flash_attention over packed sequences; paged_attention for decoding and store_kv for its cache; rms_norm,
rotary and qkv_rotary, swiglu; linear_cross_entropy, the loss without the logits, and cross_entropy from them; sample;
adamw_step.

A CUDA tensor takes the kernel, a CPU tensor the reference, and under TRITON_INTERPRET=1 a CPU tensor takes the kernel
too, line by line in numpy. fp64 is for checking and always takes the reference.

    python kernels.py        CPU: every kernel, interpreted, against its twin.  GPU: the table of speeds as well
"""
import math, os, sys
from functools import cache, partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"            # read by triton when a kernel is defined, so set before the import
import triton
import triton.language as tl
from triton.language import constexpr           # known when a kernel is compiled; each value makes another kernel
from triton.tools.tensor_descriptor import TensorDescriptor

# --- what all kernels share ------------------------------------------------------------------------------------------

INTERPRET = constexpr(os.environ.get("TRITON_INTERPRET") == "1")
MASKED = constexpr(-1e30)        # the score of what is masked: finite, since -inf minus -inf would be NaN
_tiled = TensorDescriptor.from_tensor       # (tensor, shape of the tiles that it is read in)
LOG2E, LN2 = constexpr(1.4426950408889634), constexpr(0.6931471805599453)     # the GPU has exp2, not exp

def _on_triton(*tensors: Tensor) -> bool:
    """Whether the kernel takes them: not if one is empty, so that no kernel has to think of that."""
    return all(x.numel() and x.dtype != torch.float64 and (x.is_cuda or INTERPRET.value) for x in tensors)

def _dense(x: Tensor) -> Tensor:
    """What kernels take for granted of last axes: neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()

@cache
def _processors(device: torch.device) -> int:       # interpreted: a few, so that there too work is split into parts
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count

def _ceil(a: int, b: int) -> int:       # triton.cdiv and next_power_of_2 take 5 us a call: 4% of the host's time
    return -(-a // b)

def _power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length() if n > 1 else 1)

def _wide(x: Tensor) -> Tensor:
    """In the precision that references compute in: fp32, or fp64 if that is what came."""
    return x.float() if x.itemsize < 4 else x

@triton.jit
def _dot(a, b, acc):
    if INTERPRET:       # its bf16 dot multiplies bit patterns as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")      # of fp32: three products of tf32's 10 bits

@triton.jit
def _narrow(x, dtype: constexpr):
    """fp32 to the dtype that is stored, to the nearest; the interpreter would cut bf16 off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)

# Hopper's copy engine (TMA) moves a tile for one instruction of one thread, and reads what lies outside of the tensor
# as zeros. Packed sequences end inside of it. So the rows, s apart, are described as a tensor of 2**30 rows, shifted by
# two more axes such that row `length` of a sequence is the first outside of it: the address 2**30 * (2**34 - s) +
# (start + length) * s + (2**30 - length + row) * s is (start + row) * s modulo 2**64. Tiles then never show a
# neighbour, not even its NaNs (0 * NaN is NaN, so masking probabilities would not be enough).

def _sequences(x: Tensor, rows: int, dim: int) -> TensorDescriptor:
    """[tokens, heads, dim] for tiles of [rows, dim] that end with their sequence."""
    s = x.stride(0)                         # the axes that shift are long enough for any start
    return TensorDescriptor(x, [2**31 - 2**16] * 2 + [2**30, *x.shape[1:]], [2**34 - s, s, s, x.stride(1), 1],
                            [1, 1, rows, 1, dim])

@triton.jit
def _read(x, start, length, row, head):
    tile = x.load([2**30, start + length, 2**30 - length + row, head, 0])
    return tile.reshape(tile.shape[2], tile.shape[4])

@triton.jit
def _write(x, start, length, row, head, tile):
    x.store([2**30, start + length, 2**30 - length + row, head, 0],
            _narrow(tile, x.dtype).reshape(1, 1, tile.shape[0], 1, tile.shape[1]))

@triton.jit
def _read_once(x, stride, start, length, row, head, ROWS: constexpr, D: constexpr, DIM: constexpr):
    """`_read` without the copy engine, for a tile that is read once: the left operand of a dot then stays in shared
    memory, where a tile that comes from the engine would be kept in registers."""
    rows, dims = row + tl.arange(0, ROWS), tl.arange(0, DIM)
    return tl.load(x + (start + rows).to(tl.int64)[:, None] * stride + head * D + dims[None, :],
                   mask=(rows < length)[:, None] & (dims < D)[None, :], other=0.0)

def _aligned(x: Tensor) -> Tensor:
    """As the copy engine wants it: rows dense, everything in multiples of 16 bytes."""
    dense = x.stride()[1:] == (*x.shape[2:], 1) and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
    return x if dense else x.clone(memory_format=torch.contiguous_format)

# --- flash attention: softmax(q k') v without the scores ever leaving the chip ---------------------------------------

# FlashAttention-2 (Dao, arXiv 2307.08691): 4 * Lq * Lk * heads * dim operations forward, half if causal, 2.5 times that
# backward, thousands for every byte of q, k, v and out: the tensor cores are the limit, and beside them exp2 (for 128 x
# 128 scores at dim 128 the products take 2048 cycles, exp2 1024). So: no masks but at the diagonal and the end; the
# scale folded into the exponent; the longest causal rows first, so that the last programs are short; the heads of a
# group side by side, so that they find their keys in L2. Backward is a kernel that owns queries (dq) and one that owns
# keys (dk, dv): each sums in registers in a fixed order, bit-equal from run to run, for 7 products instead of 5 with
# atomics. D is padded to DIM, a power of two; blocks are BM queries by BN keys. Causal, 2 x 8192 tokens, dim 64, 128,
# 256: forward reaches 63%, 66%, 73% of a big product (1.6, 1.4, 1.7 times SDPA's flash; 0.98, 0.83, 0.83 of cuDNN),
# backward 50%, 51%, 34% (1.3, 1.2, 0.95 times flash; 0.8, 0.7, 0.6 of cuDNN).

@triton.jit
def _weigh(scores, scale, v_tile, acc, m, mass):
    """Online softmax: y = score * scale, m = max y so far, mass = sum of exp2(y - m), acc = sum of exp2(y - m) v."""
    new_m = tl.maximum(m, tl.max(scores, 1) * scale)
    shrink = tl.exp2(m - new_m)
    p = tl.exp2(scores * scale - new_m[:, None])
    return _dot(_narrow(p, v_tile.dtype), v_tile, acc * shrink[:, None]), new_m, mass * shrink + tl.sum(p, 1)

@triton.jit
def _slot(start, sequence):
    """Where a sequence's rows lie in lse and delta: from a multiple of 128 on, so that no tile has two owners."""
    return (start // 128 + sequence) * 128

@triton.jit
def _span(ends, sequence):
    start = tl.load(ends + sequence)
    return start, tl.load(ends + sequence + 1) - start

@triton.jit
def _seen(row, q_len, k_len, CAUSAL: constexpr, BM: constexpr, BN: constexpr):
    """Which keys a block of queries sees: each up to its `last`; all of them [0, full), some of them [full, stop)."""
    last, stop, full = tl.full([BM], 0, tl.int32) + k_len - 1, k_len, k_len // BN * BN
    if CAUSAL:                                          # aligned at the bottom right: the last query sees every key
        last = tl.minimum(last, row + tl.arange(0, BM) + k_len - q_len)
        stop = tl.minimum(stop, row + BM + k_len - q_len)
        full = tl.minimum(full, tl.maximum(row + 1 + k_len - q_len, 0) // BN * BN)
    return last, stop, full

@triton.jit
def _attention_forward(q, k, v, out, lse, cu_q, cu_k, q_stride, scale, slots, GROUP: constexpr, CAUSAL: constexpr,
                       D: constexpr, DIM: constexpr, BM: constexpr, BN: constexpr):
    head, sequence, row = tl.program_id(0), tl.program_id(1), (tl.num_programs(2) - 1 - tl.program_id(2)) * BM
    q_start, q_len = _span(cu_q, sequence)
    k_start, k_len = _span(cu_k, sequence)
    if row >= q_len:
        return
    last, stop, full = _seen(row, q_len, k_len, CAUSAL, BM, BN)
    q_tile = _read_once(q, q_stride, q_start, q_len, row, head, BM, D, DIM)
    acc, m, mass = tl.zeros([BM, DIM], tl.float32), tl.full([BM], MASKED, tl.float32), tl.zeros([BM], tl.float32)
    for masked in tl.static_range(2):
        for n in tl.range(full if masked else 0, stop if masked else full, BN):
            scores = _dot(q_tile, _read(k, k_start, k_len, n, head // GROUP).T, None)               # [BM, BN]
            if masked:
                scores = tl.where(tl.arange(0, BN)[None, :] <= (last - n)[:, None], scores, MASKED)
            acc, m, mass = _weigh(scores, scale, _read(v, k_start, k_len, n, head // GROUP), acc, m, mass)
    sees = last >= 0                                    # a query before the first key sees nothing: 0, not 0 / 0
    mass = tl.where(sees, mass, 1.0)
    _write(out, q_start, q_len, row, head, tl.where(sees[:, None], acc / mass[:, None], 0.0))
    # Log-sum-exp in units of q k', unscaled. The huge one of a blind query makes its probabilities 0 in the backward
    # pass. A tile writes all of its rows, so that backward finds no NaN in those past the end.
    tl.store(lse + head * slots + _slot(q_start, sequence) + row + tl.arange(0, BM),
             tl.where(sees, (m + tl.log2(mass)) / scale, -MASKED))

@triton.jit
def _attention_backward_q(q, k, v, out, dout, lse, delta, dq, cu_q, cu_k, q_stride, o_stride, scale, slots,
                          GROUP: constexpr, CAUSAL: constexpr, D: constexpr, DIM: constexpr, BM: constexpr,
                          BN: constexpr):
    """dq = scale * sum over keys of ds k, where ds = p * (dout v' - delta) and delta = sum(out * dout)."""
    head, sequence, row = tl.program_id(0), tl.program_id(1), (tl.num_programs(2) - 1 - tl.program_id(2)) * BM
    q_start, q_len = _span(cu_q, sequence)
    k_start, k_len = _span(cu_k, sequence)
    if row >= q_len:
        return
    last, stop, full = _seen(row, q_len, k_len, CAUSAL, BM, BN)
    q_tile = _read_once(q, q_stride, q_start, q_len, row, head, BM, D, DIM)
    dout_tile = _read_once(dout, o_stride, q_start, q_len, row, head, BM, D, DIM)
    out_tile = _read_once(out, o_stride, q_start, q_len, row, head, BM, D, DIM)
    row_delta, rows = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1), row + tl.arange(0, BM)
    at = head * slots + _slot(q_start, sequence) + rows
    tl.store(delta + at, row_delta)
    row_lse = tl.load(lse + at, mask=rows < q_len, other=0.0) * (scale * LOG2E)
    acc = tl.zeros([BM, DIM], tl.float32)
    for masked in tl.static_range(2):
        for n in tl.range(full if masked else 0, stop if masked else full, BN):
            k_tile = _read(k, k_start, k_len, n, head // GROUP)
            p = tl.exp2(_dot(q_tile, k_tile.T, None) * (scale * LOG2E) - row_lse[:, None])          # [BM, BN]
            if masked:
                p = tl.where(tl.arange(0, BN)[None, :] <= (last - n)[:, None], p, 0.0)
            dp = _dot(dout_tile, _read(v, k_start, k_len, n, head // GROUP).T, None)
            acc = _dot(_narrow(p * (dp - row_delta[:, None]), k.dtype), k_tile, acc)
    _write(dq, q_start, q_len, row, head, acc * scale)

@triton.jit
def _attention_backward_kv(q, k, v, dout, lse, delta, dk, dv, cu_q, cu_k, k_stride, v_stride, scale,
                           GROUP: constexpr, CAUSAL: constexpr, D: constexpr, DIM: constexpr, BM: constexpr,
                           BN: constexpr):
    """dv = sum over queries of p' dout; dk = scale * sum of ds' q. Scores are made transposed, keys down the rows, so
    that both sums take them as they lie in registers; lse and delta are what the products start from. Queries past
    the end read as zeros and add zeros."""
    kv_head, sequence, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BN
    q_start, q_len = _span(cu_q, sequence)
    k_start, k_len = _span(cu_k, sequence)
    if row >= k_len:
        return
    k_tile = _read_once(k, k_stride, k_start, k_len, row, kv_head, BN, D, DIM)
    v_tile = _read_once(v, v_stride, k_start, k_len, row, kv_head, BN, D, DIM)
    low, full = 0, 0
    if CAUSAL:              # query i sees key j if i >= j - (k_len - q_len); the whole block of keys from `full` on
        first = row - (k_len - q_len)
        low = tl.maximum(first, 0) // BM * BM
        full = tl.minimum(tl.cdiv(tl.maximum(first + BN - 1, 0), BM), tl.cdiv(q_len, BM)) * BM
    keys, slot = row + tl.arange(0, BN), _slot(q_start, sequence)
    dk_acc, dv_acc = tl.zeros([BN, DIM], tl.float32), tl.zeros([BN, DIM], tl.float32)
    for head in tl.range(kv_head * GROUP, kv_head * GROUP + GROUP):
        for masked in tl.static_range(1 if CAUSAL else 0, -1, -1):
            for m in tl.range(low if masked else full, full if masked else q_len, BM):
                q_tile, zeros = _read(q, q_start, q_len, m, head), tl.zeros([BN, BM], tl.float32)
                p = tl.exp2(_dot(k_tile, q_tile.T, zeros - lse.load([head, slot + m])) * (scale * LOG2E))
                if masked:                                                                          # [BN, BM]
                    p = tl.where(keys[:, None] <= (m + tl.arange(0, BM))[None, :] + (k_len - q_len), p, 0.0)
                dout_tile = _read(dout, q_start, q_len, m, head)
                dv_acc = _dot(_narrow(p, dout.dtype), dout_tile, dv_acc)
                ds = p * _dot(v_tile, dout_tile.T, zeros - delta.load([head, slot + m]))
                dk_acc = _dot(_narrow(ds, q.dtype), q_tile, dk_acc)
    _write(dk, k_start, k_len, row, kv_head, dk_acc * scale)
    _write(dv, k_start, k_len, row, kv_head, dv_acc)

def _attention_tiles(kernel: str, dim: int, itemsize: int) -> tuple[int, int, dict]:
    """Queries and keys a tile, and with these the warps, and the stages of the pipeline into shared memory."""
    small = 32, 32, 4, 1                            # fp32 takes three times the products and twice the space
    bm, bn, warps, stages = small if itemsize == 4 and not INTERPRET.value else {
        ("forward", 64): (128, 64, 8, 3), ("forward", 128): (64, 64, 4, 3), ("forward", 256): (128, 64, 8, 2),
        ("q", 64): (128, 64, 8, 3), ("q", 128): (128, 64, 8, 3), ("q", 256): (128, 32, 8, 2),
        ("kv", 64): (64, 64, 4, 3), ("kv", 128): (64, 128, 8, 3), ("kv", 256): (64, 64, 8, 2)}[kernel, dim]
    return bm, bn, dict(BM=bm, BN=bn, num_warps=warps, num_stages=stages)

class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, blank):     # blank: zeros_like or empty_like
        (q, k, v), heads, dim = map(_aligned, (q, k, v)), q.shape[1], _power_of_two(q.shape[2], 64)
        bm, bn, tiles = _attention_tiles("forward", dim, q.itemsize)
        slots = (len(q) // 128 + len(cu_q)) * 128                           # see _slot
        out = blank(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(heads, slots, dtype=torch.float32)
        _attention_forward[heads, len(cu_q) - 1, _ceil(max_q, bm)](
            q, _sequences(k, bn, dim), _sequences(v, bn, dim), _sequences(out, bm, dim), lse, cu_q, cu_k, q.stride(0),
            scale * LOG2E.value, slots, heads // k.shape[1], causal, q.shape[2], dim, **tiles)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.settings = max_q, max_k, causal, scale, dim, blank
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        (max_q, max_k, causal, scale, dim, blank), heads, dout = ctx.settings, q.shape[1], dout.contiguous()
        dq, dk, dv = (blank(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        delta = torch.empty_like(lse)
        fixed = heads // k.shape[1], causal, q.shape[2], dim
        bm, bn, tiles = _attention_tiles("q", dim, q.itemsize)
        _attention_backward_q[heads, len(cu_q) - 1, _ceil(max_q, bm)](
            q, _sequences(k, bn, dim), _sequences(v, bn, dim), out, dout, lse, delta, _sequences(dq, bm, dim), cu_q,
            cu_k, q.stride(0), out.stride(0), scale, lse.shape[1], *fixed, **tiles)
        bm, bn, tiles = _attention_tiles("kv", dim, q.itemsize)
        _attention_backward_kv[k.shape[1], len(cu_q) - 1, _ceil(max_k, bn)](
            _sequences(q, bm, dim), k, v, _sequences(dout, bm, dim), _tiled(lse, [1, bm]), _tiled(delta, [1, bm]),
            _sequences(dk, bn, dim), _sequences(dv, bn, dim), cu_q, cu_k, k.stride(0), v.stride(0), scale, *fixed,
            **tiles)
        return dq, dk, dv, *[None] * 7

def flash_attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True, scale=None):
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = [q.new_zeros(q_ends[0], *q.shape[1:])]                                    # 0 for tokens of no sequence,
    for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:]):
        blind = max(b - a - (d - c), 0) if causal or c == d else 0                  # and for those who see no key
        out.append(q.new_zeros(blind, *q.shape[1:]))
        if b - a > blind:
            heads = [_wide(x).transpose(0, 1)[None] for x in (q[a + blind:b], k[c:d], v[c:d])]      # [1, heads, L, dim]
            earlier = d - c - (b - a - blind)                                       # keys that every query sees
            seen = None
            if causal and earlier:
                seen = torch.ones(b - a - blind, d - c, dtype=torch.bool, device=q.device).tril(earlier)
            one = F.scaled_dot_product_attention(*heads, seen, is_causal=causal and not earlier, scale=scale,
                                                 enable_gqa=True)
            out.append(one[0].transpose(0, 1).to(q.dtype))
    return torch.cat([*out, q.new_zeros(len(q) - q_ends[-1], *q.shape[1:])])

def flash_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None,
                    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, causal: bool = True,
                    scale: float | None = None, covered: bool = False) -> Tensor:
    """Attention over packed sequences that never see each other: q [tokens, heads, dim], k and v [tokens, kv_heads,
    dim], sequence i at [cu_seqlens[i], cu_seqlens[i + 1]) (int32). Without cu_seqlens_k it is that of q. Causal masks
    are aligned at the bottom right, as in flash-attn: with Lq < Lk the queries are the last ones. Pass the longest
    lengths to save a wait for the GPU. scale is positive, by default dim ** -0.5. Tokens of no sequence get zeros;
    covered=True says that there are none, which saves writing them."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads; the first must be a multiple")
    if dim > 256 or dim * q.itemsize % 16:
        raise ValueError(f"head dim {dim} is not supported; take a multiple of 8 up to 256")
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q
    if len(cu_seqlens_q) != len(cu_seqlens_k) or k.shape != v.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError("q and k need equally many sequences, k and v one shape, and all three one dtype")
    if not _on_triton(q, k):
        return flash_attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale)
    max_q, max_k = (int(ends.diff().max()) if most is None else most
                    for ends, most in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)))
    scale = dim ** -0.5 if scale is None else scale
    return _FlashAttention.apply(q, k, v, _dense(cu_seqlens_q).int(), _dense(cu_seqlens_k).int(), max_q, max_k, causal,
                                 scale, torch.empty_like if covered else torch.zeros_like)

# --- paged attention: decoding against a cache in pages --------------------------------------------------------------

# One query a sequence: 4 * group operations for every 4 bytes of cache, so the limit is reading the cache once. The
# query heads of a group are the rows of one dot (padded to the 16 that the tensor cores want), so their keys are read
# once, not once a head. A sequence is split over several programs by its own length, which keeps all SMs reading when
# the batch is small or uneven. The grid depends on shapes alone, never on lengths, so a CUDA graph can hold it.
# 97% of a copy at 64 sequences of 4096; 89% at 8 of 16k; 78% at 128 of 256 to 2048, and 92% with the longest first: the
# last programs to start are then short. store_kv only moves bytes, at the rate of a copy.

@triton.jit
def _paged_part(q, k_cache, v_cache, block_table, context_lens, out, lse, q_stride, table_stride, page_stride,
                token_stride, head_stride, scale, SPLITS: constexpr, GROUP: constexpr, ROWS: constexpr, D: constexpr,
                DIM: constexpr, PAGE: constexpr, BN: constexpr, STAGES: constexpr):
    kv_head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(context_lens + sequence)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BN) * BN                               # tokens of this split
    stop = tl.minimum(length, split * share + share)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    heads = kv_head * GROUP + rows
    mine = (rows < GROUP)[:, None] & (dims < D)[None, :]
    q_tile = tl.load(q + sequence.to(tl.int64) * q_stride + heads[:, None] * D + dims[None, :], mask=mine, other=0.0)
    acc, m, mass = tl.zeros([ROWS, DIM], tl.float32), tl.full([ROWS], MASKED, tl.float32), tl.zeros([ROWS], tl.float32)
    for n in tl.range(split * share, stop, BN, num_stages=STAGES):
        tokens = n + tl.arange(0, BN)
        live = tokens < stop
        page = tl.load(block_table + sequence.to(tl.int64) * table_stride + tokens // PAGE, mask=live, other=0)
        at = (page.to(tl.int64) * page_stride + tokens % PAGE * token_stride + kv_head * head_stride)[:, None] + dims
        wanted = live[:, None] & (dims < D)[None, :]
        scores = _dot(q_tile, tl.load(k_cache + at, mask=wanted, other=0.0).T, None)    # [ROWS, BN]
        scores = tl.where(live[None, :], scores, MASKED)
        acc, m, mass = _weigh(scores, scale, tl.load(v_cache + at, mask=wanted, other=0.0), acc, m, mass)
    mass = tl.where(mass > 0, mass, 1.0)                                            # an empty split weighs nothing
    at = (split * tl.num_programs(1) + sequence).to(tl.int64) * tl.num_programs(0) * GROUP + heads
    tl.store(out + at[:, None] * D + dims[None, :], _narrow(acc / mass[:, None], out.dtype.element_ty), mask=mine)
    tl.store(lse + at, m + tl.log2(mass), mask=rows < GROUP)                        # in base 2, scale included

@triton.jit(do_not_specialize=["entries"])
def _paged_merge(parts, lse, out, entries, SPLITS: constexpr, D: constexpr, DIM: constexpr):
    """out = sum of exp2(lse - max) part / sum of exp2(lse - max), over the splits of one head of one sequence."""
    entry, splits, dims = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, DIM)
    at = splits * entries + entry
    weight = tl.load(lse + at)
    weight = tl.exp2(weight - tl.max(weight, 0))
    part = tl.load(parts + at[:, None] * D + dims[None, :], mask=(dims < D)[None, :], other=0.0)
    tile = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + entry * D + dims, _narrow(tile, out.dtype.element_ty), mask=dims < D)

def _paged_tiles(programs: int, longest: int, processors: int) -> dict:
    """A power of two of splits such that an SM has up to 4 programs, but none less than 256 tokens of a full table."""
    most = max(1, min(4 * processors // programs, _ceil(longest, 256), 64))
    return dict(SPLITS=1 << (most.bit_length() - 1), BN=64, STAGES=3, num_warps=4)

def paged_attention_reference(q, k_cache, v_cache, block_table, context_lens, scale=None):
    page, kv_heads, dim = k_cache.shape[1:]
    used = torch.arange(0, block_table.shape[1] * page, page, device=q.device) < context_lens[:, None]
    pages, lengths = block_table[used], [x for n in context_lens.tolist() for x in (n, -n % page)]
    k, v = (_wide(cache.index_select(0, pages)).view(1, -1, kv_heads, dim).transpose(1, 2).split(lengths, 2)[::2]
            for cache in (k_cache, v_cache))                                # a sequence: [1, kv, n, dim], no padding
    queries = _wide(q).unflatten(1, (kv_heads, -1)).split(1)                # a sequence: [1, kv, group, dim]
    out = [F.scaled_dot_product_attention(*one, scale=scale) if one[1].shape[2] else torch.zeros_like(one[0])
           for one in zip(queries, k, v)]
    return torch.cat([*out, q[:0].unflatten(1, (kv_heads, -1))]).flatten(1, 2).to(q.dtype)

def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor,
                    context_lens: Tensor, scale: float | None = None) -> Tensor:
    """One token a sequence, q [batch, heads, dim], against caches [pages, page_size, kv_heads, dim]. Token t of
    sequence i is in page block_table[i, t // page_size] (int32 [batch, pages]; beyond the length it is not read).
    context_lens [batch] counts the new token. A length of 0 gives zeros."""
    (batch, heads, dim), (page, kv_heads, kv_dim) = q.shape, k_cache.shape[1:]
    if heads % kv_heads or dim != kv_dim:
        raise ValueError(f"{heads} heads of {dim} cannot share {kv_heads} of {kv_dim}; take a multiple, of that size")
    if not _on_triton(q):
        return paged_attention_reference(q, k_cache, v_cache, block_table, context_lens, scale)
    if k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError("k_cache and v_cache must have the same strides, the last one 1")
    q, block_table, context_lens = q.contiguous(), _dense(block_table), _dense(context_lens)
    group, padded = heads // kv_heads, _power_of_two(dim, 16)
    tiles = _paged_tiles(batch * kv_heads, block_table.shape[1] * page, _processors(q.device))
    splits, out = tiles["SPLITS"], torch.empty_like(q)
    parts = out if splits == 1 else q.new_empty(splits, *q.shape, dtype=torch.float32)
    lse = q.new_empty(splits, batch, heads, dtype=torch.float32)
    _paged_part[kv_heads, batch, splits](
        q, k_cache, v_cache, block_table, context_lens, parts, lse, q.stride(0), block_table.stride(0),
        *k_cache.stride()[:3], (dim ** -0.5 if scale is None else scale) * LOG2E.value, GROUP=group,
        ROWS=_power_of_two(group, 16), D=dim, DIM=padded, PAGE=page, **tiles)
    if splits > 1:
        _paged_merge[(batch * heads,)](parts, lse, out, batch * heads, splits, dim, padded, num_warps=2)
    return out

@triton.jit
def _store_kv(k, v, k_cache, v_cache, slots, k_stride, v_stride, WIDTH: constexpr, BLOCK: constexpr):
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    slot = tl.load(slots + token).to(tl.int64)
    mask = columns < tl.where(slot >= 0, WIDTH, 0)
    tl.store(k_cache + slot * WIDTH + columns, tl.load(k + token * k_stride + columns, mask=mask), mask=mask)
    tl.store(v_cache + slot * WIDTH + columns, tl.load(v + token * v_stride + columns, mask=mask), mask=mask)

def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k, v [tokens, kv_heads, dim] into caches [pages, page_size, kv_heads, dim], in place: token i into slot
    slot_mapping[i] = page * page_size + offset, or nowhere if that is negative (padding)."""
    k_cache, v_cache = k_cache.view(-1, *k.shape[1:]), v_cache.view(-1, *v.shape[1:])
    if not _on_triton(k):
        if (slot_mapping < 0).any():
            k, v, slot_mapping = (x[slot_mapping >= 0] for x in (k, v, slot_mapping))
        k_cache[slot_mapping], v_cache[slot_mapping] = k, v
        return
    k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (k, v))
    width, slots = k.shape[1] * k.shape[2], _dense(slot_mapping)
    _store_kv[(len(k),)](k, v, k_cache, v_cache, slots, k.stride(0), v.stride(0), width, _power_of_two(width))

# --- rms norm --------------------------------------------------------------------------------------------------------

# y = x / sqrt(mean(x^2) + eps) * weight. Forward reads x and writes y, 4 bytes an element in bf16 (8 with the residual,
# 10 in two kernels); bytes are the limit. A tile of whole rows stays in registers, so the second use of x is free.
# Backward reads dy and x and writes dx. dweight is a sum over all rows: a fixed number of programs walks over them,
# each sums in registers, and a second kernel adds the programs up, always in the same order. Forward: 95 to 99% of a
# copy; backward: 81% for heads of 128, 85 to 92% for wider rows.

@triton.jit(do_not_specialize=["rows"])
def _rms_norm_forward(x, residual, weight, out, summed, rstd, rows, x_stride, eps, WIDTH: constexpr, BLOCK: constexpr,
                      ROWS: constexpr, RESIDUAL: constexpr):
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    h = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    if RESIDUAL:
        h = h.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        h = _narrow(h, summed.dtype.element_ty)
        tl.store(summed + at, h, mask=mask)
    h = h.to(tl.float32)
    r = tl.rsqrt(tl.sum(h * h, 1) / WIDTH + eps)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + at, _narrow(h * r[:, None] * w[None, :], out.dtype.element_ty), mask=mask)
    tl.store(rstd + row, r, mask=row < rows)

@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward(dout, dsummed, h, weight, rstd, dx, dweight, rows, h_stride, WIDTH: constexpr, BLOCK: constexpr,
                       ROWS: constexpr, RESIDUAL: constexpr, STAGES: constexpr):
    """With n = h * rstd and g = dout * weight: dx = rstd * (g - n * mean(g * n)), dweight = sum of dout * n."""
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        dy = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(h + row[:, None] * h_stride + column[None, :], mask=mask, other=0.0)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        n = n.to(tl.float32) * r
        g = dy * w[None, :]
        grad = (g - n * (tl.sum(g * n, 1) / WIDTH)[:, None]) * r
        if RESIDUAL:
            grad += tl.load(dsummed + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, _narrow(grad, dx.dtype.element_ty), mask=mask)
        total += tl.sum(dy * n, 0)
    tl.store(dweight + tl.program_id(0) * WIDTH + column, total, mask=column < WIDTH)

@triton.jit(do_not_specialize=["rows"])
def _add_up(parts, out, rows, WIDTH: constexpr, BLOCK: constexpr, ROWS: constexpr):
    column, total = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        total += tl.load(parts + row[:, None] * WIDTH + column[None, :],
                         mask=(row < rows)[:, None] & (column < WIDTH)[None, :], other=0.0)
    tl.store(out + column, _narrow(tl.sum(total, 0), out.dtype.element_ty), mask=column < WIDTH)

def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[programs, ...], summed over programs. torch gives so few columns to few processors: 11 us, and 2 to cast."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    _add_up[(_ceil(out.numel(), 8),)](parts, out, len(parts), out.numel(), BLOCK=8, ROWS=1024, num_warps=8)
    return out

def _norm_tiles(width: int, backward: bool) -> dict:
    """Whole rows a tile, 2048 elements or more, 16 a thread; narrow heads need more in flight backward."""
    elements, a_thread = (4096, 32) if backward and width < 512 else (2048, 16)
    block = _power_of_two(width)
    rows = max(1, elements // block)
    tiles = dict(BLOCK=block, ROWS=rows, num_warps=min(16, max(1, rows * block // 32 // a_thread)))
    return tiles | dict(STAGES=3, PER_SM=4) if backward else tiles

class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        h, weight = _dense(x.reshape(-1, x.shape[-1])), _dense(weight)
        (rows, width), tiles = h.shape, _norm_tiles(h.shape[1], False)
        out, rstd = x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)
        summed = None if residual is None else x.new_empty(x.shape)
        _rms_norm_forward[(_ceil(rows, tiles["ROWS"]),)](
            h, None if residual is None else residual.contiguous(), weight, out, summed, rstd, rows, h.stride(0), eps,
            WIDTH=width, RESIDUAL=residual is not None, **tiles)
        ctx.save_for_backward(h if residual is None else summed.view(h.shape), weight, rstd)
        return out if residual is None else (out, summed)

    @staticmethod
    def backward(ctx, dout, dsummed=None):
        h, weight, rstd = ctx.saved_tensors
        (rows, width), tiles, dout = h.shape, _norm_tiles(h.shape[1], True), dout.contiguous()
        programs = min(tiles.pop("PER_SM") * _processors(h.device), _ceil(rows, tiles["ROWS"]))
        dx, parts = torch.empty_like(dout), h.new_empty(programs, width, dtype=torch.float32)
        _rms_norm_backward[(programs,)](
            dout, None if dsummed is None else dsummed.contiguous(), h, weight, rstd, dx, parts, rows, h.stride(0),
            WIDTH=width, RESIDUAL=dsummed is not None, **tiles)
        return dx, _added(parts, weight.dtype), None, None if dsummed is None else dx

def rms_norm_reference(x, weight, eps=1e-6, residual=None):
    h = x if residual is None else x + residual
    out = F.rms_norm(_wide(h), weight.shape, _wide(weight), eps).to(x.dtype)    # h / sqrt(mean(h^2) + eps) * weight
    return out if residual is None else (out, h)

def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None):
    """Over the last axis. With a residual, x + residual is normalised, and (normalised, x + residual) returned."""
    if weight.shape != x.shape[-1:] or residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; weight must be as wide, residual of its shape and dtype")
    return _RMSNorm.apply(x, weight, eps, residual) if _on_triton(x) else rms_norm_reference(x, weight, eps, residual)

# --- rotary position embedding, and the norm of queries and keys before it -------------------------------------------

# Turns each pair (x[i], x[i + dim / 2]) of a head by the angle of its position (the halves of GPT-NeoX and Hugging
# Face, not neighbours). Reads and writes q and k once, 4 bytes an element; a program takes one token, and reads its
# cosines once for all heads: 94% of a copy. Qwen3 normalises each head first (n = x / sqrt(mean(x^2) + eps) * weight),
# which costs no more bytes in the same kernel. Backward turns the other way, and makes n again; its programs walk over
# many tokens, so that the gradients of weights are sums in registers, as in rms_norm. Tiles are [heads, dim / 2]: HEADS
# (Q of q, K of k), padded to BLOCK (BQ, BK), by HALF, padded to WIDTH.

@triton.jit
def _pairs(x, at, HEADS: constexpr, BLOCK: constexpr, HALF: constexpr, WIDTH: constexpr):
    """Both halves of the heads of a token, in fp32."""
    mask = (tl.arange(0, BLOCK)[:, None] < HEADS) & (tl.arange(0, WIDTH)[None, :] < HALF)
    return (tl.load(x + at, mask=mask, other=0.0).to(tl.float32),
            tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32), mask)

@triton.jit
def _halves(weight, HALF: constexpr, WIDTH: constexpr):
    i = tl.arange(0, WIDTH)
    return (tl.load(weight + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :],
            tl.load(weight + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :])

@triton.jit
def _angle(cos, sin, positions, token, stride, HALF: constexpr, WIDTH: constexpr):
    i = tl.arange(0, WIDTH)[None, :]
    at = tl.load(positions + token).to(tl.int64) * stride + i
    return (tl.load(cos + at, mask=i < HALF, other=0.0).to(tl.float32),
            tl.load(sin + at, mask=i < HALF, other=0.0).to(tl.float32))

@triton.jit
def _turn(x, weight, out, token, x_token, x_head, c, s, eps, HEADS: constexpr, BLOCK: constexpr, HALF: constexpr,
          WIDTH: constexpr, NORM: constexpr):
    head, i = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    a, b, mask = _pairs(x, token * x_token + head * x_head + i, HEADS, BLOCK, HALF, WIDTH)
    if NORM:
        wa, wb = _halves(weight, HALF, WIDTH)
        r = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
        a, b = a * r * wa, b * r * wb
    to = (token * HEADS + head) * 2 * HALF + i
    tl.store(out + to, _narrow(a * c - b * s, out.dtype.element_ty), mask=mask)
    tl.store(out + to + HALF, _narrow(b * c + a * s, out.dtype.element_ty), mask=mask)

@triton.jit
def _rotary(q, k, q_norm, k_norm, q_out, k_out, cos, sin, positions, q_token, q_head, k_token, k_head, table_stride,
            eps, Q: constexpr, BQ: constexpr, K: constexpr, BK: constexpr, HALF: constexpr, WIDTH: constexpr,
            NORM: constexpr, SIGN: constexpr):
    token = tl.program_id(0).to(tl.int64)
    c, s = _angle(cos, sin, positions, token, table_stride, HALF, WIDTH)
    s *= SIGN
    _turn(q, q_norm, q_out, token, q_token, q_head, c, s, eps, Q, BQ, HALF, WIDTH, NORM)
    _turn(k, k_norm, k_out, token, k_token, k_head, c, s, eps, K, BK, HALF, WIDTH, NORM)

@triton.jit
def _turn_back(dout, x, weight, dx, token, x_token, x_head, dx_token, c, s, eps, HEADS: constexpr, BLOCK: constexpr,
               HALF: constexpr, WIDTH: constexpr, NORM: constexpr):
    """Writes dx, and gives the gradient of the weight's halves: with n = x * r and g = dout * weight (turned back),
    dx = r * (g - n * mean(g * n)), dweight = sum of dout * n."""
    head, i = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    ya, yb, mask = _pairs(dout, (token * HEADS + head) * 2 * HALF + i, HEADS, BLOCK, HALF, WIDTH)
    a, b = ya * c + yb * s, yb * c - ya * s
    da, db = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    if NORM:
        na, nb, _ = _pairs(x, token * x_token + head * x_head + i, HEADS, BLOCK, HALF, WIDTH)
        wa, wb = _halves(weight, HALF, WIDTH)
        r = tl.rsqrt(tl.sum(na * na + nb * nb, 1) / (2 * HALF) + eps)[:, None]
        na, nb = na * r, nb * r
        da, db = tl.sum(a * na, 0), tl.sum(b * nb, 0)
        a, b = a * wa, b * wb
        mean = tl.sum(a * na + b * nb, 1)[:, None] / (2 * HALF)
        a, b = (a - na * mean) * r, (b - nb * mean) * r
    to = token * dx_token + head * 2 * HALF + i
    tl.store(dx + to, _narrow(a, dx.dtype.element_ty), mask=mask)
    tl.store(dx + to + HALF, _narrow(b, dx.dtype.element_ty), mask=mask)
    return da, db

@triton.jit(do_not_specialize=["tokens"])
def _rotary_backward(dq, dk, dv, q, k, q_norm, k_norm, dxq, dxk, dxv, dweights, cos, sin, positions, q_token, q_head,
                     k_token, k_head, dq_token, dk_token, table_stride, eps, tokens, Q: constexpr, BQ: constexpr,
                     K: constexpr, BK: constexpr, HALF: constexpr, WIDTH: constexpr, NORM: constexpr):
    zero, i = tl.zeros([WIDTH], tl.float32), tl.arange(0, WIDTH)
    qa, qb, ka, kb = zero, zero, zero, zero
    for t in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(t, tl.int64)
        c, s = _angle(cos, sin, positions, token, table_stride, HALF, WIDTH)
        a, b = _turn_back(dq, q, q_norm, dxq, token, q_token, q_head, dq_token, c, s, eps, Q, BQ, HALF, WIDTH, NORM)
        qa, qb = qa + a, qb + b
        a, b = _turn_back(dk, k, k_norm, dxk, token, k_token, k_head, dk_token, c, s, eps, K, BK, HALF, WIDTH, NORM)
        ka, kb = ka + a, kb + b
        head = tl.arange(0, BK)[:, None]
        a, b, mask = _pairs(dv, (token * K + head) * 2 * HALF + i[None, :], K, BK, HALF, WIDTH)
        to = token * dk_token + head * 2 * HALF + i[None, :]
        tl.store(dxv + to, _narrow(a, dxv.dtype.element_ty), mask=mask)
        tl.store(dxv + to + HALF, _narrow(b, dxv.dtype.element_ty), mask=mask)
    if NORM:
        at = dweights + tl.program_id(0) * 4 * HALF + i
        tl.store(at, qa, mask=i < HALF)
        tl.store(at + HALF, qb, mask=i < HALF)
        tl.store(at + 2 * HALF, ka, mask=i < HALF)
        tl.store(at + 3 * HALF, kb, mask=i < HALF)

def _launch_rotary(q, k, q_norm, k_norm, cos, sin, positions, eps, sign):
    q, k, outs, half = _dense(q), _dense(k), (q.new_empty(q.shape), k.new_empty(k.shape)), q.shape[2] // 2
    sizes = q.shape[1], _power_of_two(q.shape[1]), k.shape[1], _power_of_two(k.shape[1]), half, _power_of_two(half)
    _rotary[(len(q),)](q, k, q_norm, k_norm, *outs, cos, sin, positions, *q.stride()[:2], *k.stride()[:2],
                       cos.stride(0), eps, *sizes, q_norm is not None, sign, num_warps=2)
    return outs, sizes

class _Rotary(torch.autograd.Function):
    """x is q; or, without k, it is q, k and v side by side, and so is its gradient: nothing has to be put together."""
    @staticmethod
    def forward(ctx, x, k, q_norm, k_norm, cos, sin, positions, eps, kv_heads):
        merged, x, positions = k is None, _dense(x), _dense(positions)
        q_norm, k_norm = (None if weight is None else _dense(weight) for weight in (q_norm, k_norm))
        q, k, v = x.split([x.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1) if merged else (x, _dense(k), None)
        outs, sizes = _launch_rotary(q, k, q_norm, k_norm, cos, sin, positions, eps, 1)
        ctx.save_for_backward(x if merged else None, q_norm, k_norm, cos, sin, positions)
        ctx.settings = eps, sizes
        return outs + (v,) if merged else outs

    @staticmethod
    def backward(ctx, dq, dk, dv=None):
        (x, q_norm, k_norm, cos, sin, positions), (eps, sizes) = ctx.saved_tensors, ctx.settings
        heads, kv_heads, norm = sizes[0], sizes[2], q_norm is not None
        if x is None:
            return *_launch_rotary(dq, dk, None, None, cos, sin, positions, eps, -1)[0], *[None] * 7
        dx = x.new_empty(x.shape)
        (q, k, _), parts = (y.split([heads, kv_heads, kv_heads], 1) for y in (x, dx))
        programs = min(len(x), 16 * _processors(x.device))
        dweights = x.new_empty(programs if norm else 0, 2, x.shape[2], dtype=torch.float32)
        _rotary_backward[(programs,)](
            *(y.contiguous() for y in (dq, dk, dv)), q, k, q_norm, k_norm, *parts, dweights, cos, sin, positions,
            *q.stride()[:2], *k.stride()[:2], parts[0].stride(0), parts[1].stride(0), cos.stride(0), eps, len(x),
            *sizes, norm, num_warps=1)
        dnorms = _added(dweights, q_norm.dtype) if norm else (None, None)
        return dx, None, *dnorms, *[None] * 5

def rotary_reference(q, k, cos, sin, positions):
    c, s = cos[positions][:, None], sin[positions][:, None]                                     # [tokens, 1, dim / 2]
    a, b = _wide(torch.cat([q, k], 1)).chunk(2, -1)                                             # both at once
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(q.dtype).split([q.shape[1], k.shape[1]], 1)

def _tables(cos, sin, dim):
    if dim % 2 or min(cos.shape[1], sin.shape[1]) < dim // 2:
        raise ValueError(f"head dim {dim} must be even, and the tables at least half as wide")
    cos, sin = _dense(cos[:, :dim // 2]), _dense(sin[:, :dim // 2])
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())

def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """q [tokens, heads, dim] and k [tokens, kv_heads, dim], turned. Tables are [max_positions, dim / 2], or dim wide
    with both halves the same, as Hugging Face makes them; positions [tokens] index them."""
    cos, sin = _tables(cos, sin, q.shape[-1])
    if not _on_triton(q, k):
        return rotary_reference(q, k, cos, sin, positions)
    return _Rotary.apply(q, k, None, None, cos, sin, positions, 0.0, k.shape[1])

def qkv_rotary_reference(qkv, heads, kv_heads, cos, sin, positions, q_norm=None, k_norm=None, eps=1e-6):
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
    return *rotary_reference(q, k, cos, sin, positions), v

def qkv_rotary(qkv: Tensor, heads: int, kv_heads: int, cos: Tensor, sin: Tensor, positions: Tensor,
               q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, ...]:
    """q, k and v as attention wants them, out of the one product that made them, [tokens, (heads + 2 * kv_heads) *
    dim]: q and k normalised head by head (Qwen3; or not) and turned, v as it is."""
    dim = qkv.shape[1] // (heads + 2 * kv_heads)
    cos, sin = _tables(cos, sin, dim)
    if not _on_triton(qkv):
        return qkv_rotary_reference(qkv, heads, kv_heads, cos, sin, positions, q_norm, k_norm, eps)
    qkv = qkv.unflatten(1, (heads + 2 * kv_heads, dim))
    return _Rotary.apply(qkv, None, q_norm, k_norm, cos, sin, positions, eps, kv_heads)

# --- swiglu ----------------------------------------------------------------------------------------------------------

# silu(gate) * up, the halves of one product's output. Forward reads 4 bytes an output and writes 2; backward reads 6
# and writes 4. The sigmoid is recomputed, not kept: cheaper than its bytes. Forward 99%, backward 98% of a copy.

@triton.jit(do_not_specialize=["rows"])
def _swiglu(gate_up, dout, out, rows, stride, WIDTH: constexpr, BLOCK: constexpr, ROWS: constexpr,
            BACKWARD: constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < WIDTH)
    g = tl.load(gate_up + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up + row * stride + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp2(-g * LOG2E))
    dtype: constexpr = out.dtype.element_ty
    if BACKWARD:
        dy = tl.load(dout + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * 2 * WIDTH + column, _narrow(dy * u * s * (1 + g * (1 - s)), dtype), mask=mask)
        tl.store(out + row * 2 * WIDTH + WIDTH + column, _narrow(dy * g * s, dtype), mask=mask)
    else:
        tl.store(out + row * WIDTH + column, _narrow(g * s * u, dtype), mask=mask)

SWIGLU_TILES = dict(ROWS=2, BLOCK=1024, num_warps=8)

def _launch_swiglu(gate_up, dout, out):
    rows, width = len(gate_up), gate_up.shape[1] // 2
    grid = _ceil(rows, SWIGLU_TILES["ROWS"]), _ceil(width, SWIGLU_TILES["BLOCK"])
    _swiglu[grid](gate_up, dout, out, rows, gate_up.stride(0), width, BACKWARD=dout is not None, **SWIGLU_TILES)
    return out

class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _launch_swiglu(gate_up, None, gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2))

    @staticmethod
    def backward(ctx, dout):
        gate_up, = ctx.saved_tensors
        return _launch_swiglu(gate_up, dout.contiguous(), gate_up.new_empty(gate_up.shape))

def swiglu_reference(gate_up):
    gate, up = _wide(gate_up).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)

def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 * width], the gate first, to [..., width]."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up is {gate_up.shape[-1]} wide; it must be even, half gate and half up")
    if not _on_triton(gate_up):
        return swiglu_reference(gate_up)
    return _SwiGLU.apply(_dense(gate_up.reshape(-1, gate_up.shape[-1]))).view(*gate_up.shape[:-1], -1)

# --- linear cross entropy: the output head and the loss in one, without the logits -----------------------------------

# 16k tokens x 152k words are 5 GB of logits in bf16, and the loss needs four numbers a token from them. With
# y = hidden @ weight' / temperature: y[target], m = max y, s = sum exp(y - m) and t = sum (y - m) exp(y - m).
#     logprob = y[target] - m - log s        entropy = log s - t / s
#     dy[j] = p[j] * (-dlogprob - dentropy * (log p[j] + entropy)) + (j == target) * dlogprob
# Forward is a matrix product whose tiles are reduced to (m, s, t) in registers. Backward makes the tiles again, for a
# slice of the vocabulary at a time, turns them into dlogits = dy / temperature on the spot, and leaves dlogits @ weight
# and dlogits' @ hidden to cuBLAS, both summed in fp32: 4 products of 2 * tokens * vocab * width operations, so tensor
# cores are the limit. 1.19 times the four in cuBLAS, and 320 MiB. Parts of a vocabulary, on one device or over a group,
# are put together by one rule. From logits bytes are the limit: forward 91% of a copy, backward 91% (torch.compile: 26%
# and 21%). Below x is hidden, or the logits where there is no weight.

SLICE_BYTES = 2**27                 # of dlogits; with the gradient of hidden in fp32 this is all that backward needs

@triton.jit
def _logits(x, weight, row, column, x_stride, rows, columns, width, BM: constexpr, BV: constexpr, BK: constexpr,
            FUSED: constexpr):
    """A tile of logits: multiplied here, or read."""
    acc = tl.zeros([BM, BV], tl.float32)
    if FUSED:
        for k in tl.range(0, width, BK):
            acc = _dot(x.load([row, k]), weight.load([column, k]).T, acc)
    else:
        r, c = (row + tl.arange(0, BM))[:, None], (column + tl.arange(0, BV))[None, :]
        live = (r < rows) & (c < columns)
        acc += tl.load(x + r.to(tl.int64) * x_stride + c, mask=live, other=float("-inf")).to(tl.float32)
    return acc

@triton.jit(do_not_specialize=["rows"])
def _logit_stats(x, weight, targets, stats, scale, x_stride, rows, columns, width, BM: constexpr, BV: constexpr,
                 BK: constexpr, FUSED: constexpr):
    first_row, split, splits = tl.program_id(0) * BM, tl.program_id(1), tl.num_programs(1)
    row = first_row + tl.arange(0, BM)
    target = tl.load(targets + row, mask=row < rows, other=-1).to(tl.int32)
    zero = tl.zeros([BM], tl.float32)
    m, s, t, hit = zero + MASKED, zero, zero, zero
    share = tl.cdiv(tl.cdiv(columns, BV), splits) * BV
    if not FUSED:                                       # one word is read again: cheaper than a comparison a word
        live = (row < rows) & (target >= split * share) & (target < split * share + share)
        hit = tl.load(x + row.to(tl.int64) * x_stride + target, mask=live, other=0.0).to(tl.float32) * scale
    for first in tl.range(split * share, tl.minimum(split * share + share, columns), BV):
        column = first + tl.arange(0, BV)
        y = _logits(x, weight, first_row, first, x_stride, rows, columns, width, BM, BV, BK, FUSED) * scale
        if FUSED:                                                                                   # [BM, BV], base 2
            y = tl.where((column < columns)[None, :], y, MASKED)
            hit += tl.sum(tl.where(column[None, :] == target[:, None], y, 0.0), 1)
        new_m = tl.maximum(m, tl.max(y, 1))
        shrink = tl.exp2(m - new_m)
        y -= new_m[:, None]
        if not FUSED:                                   # only logits that are given can be -inf; no product makes such
            y = tl.maximum(y, MASKED, tl.PropagateNan.ALL)          # times a probability of 0, -inf would be NaN
        e = tl.exp2(y)
        t = (t + (m - new_m) * s) * shrink + tl.sum(y * e, 1)
        s = s * shrink + tl.sum(e, 1)
        m = new_m
    at, part = stats + split * rows + row, splits * rows
    tl.store(at, m * LN2, mask=row < rows)
    tl.store(at + part, s, mask=row < rows)
    tl.store(at + 2 * part, t * LN2, mask=row < rows)
    tl.store(at + 3 * part, hit * LN2, mask=row < rows)

@triton.jit(do_not_specialize=["rows", "start"])
def _logit_grads(x, weight, targets, factors, out, scale, x_stride, size, rows, width, start, BM: constexpr,
                 BV: constexpr, BK: constexpr, FUSED: constexpr):
    """dlogits [rows, size] of the columns from start; factors [4, rows]: lse, then those of p, p log p, the target."""
    first_row, split, splits = tl.program_id(0) * BM, tl.program_id(1), tl.num_programs(1)
    row = first_row + tl.arange(0, BM)
    at, live = factors + row, row < rows
    target = tl.load(targets + row, mask=live, other=-1).to(tl.int32)[:, None] - start
    lse, a = tl.load(at, mask=live, other=0.0) * LOG2E, tl.load(at + rows, mask=live, other=0.0)
    b, c = tl.load(at + 2 * rows, mask=live, other=0.0) * LN2, tl.load(at + 3 * rows, mask=live, other=0.0)
    share = tl.cdiv(tl.cdiv(size, BV), splits) * BV
    for first in tl.range(split * share, tl.minimum(split * share + share, size), BV):
        column = (first + tl.arange(0, BV))[None, :]
        y = _logits(x, weight, first_row, start + first, x_stride, rows, start + size, width, BM, BV, BK, FUSED)
        y = y * scale - lse[:, None]                                                                # [BM, BV], base 2
        if not FUSED:
            y = tl.maximum(y, MASKED, tl.PropagateNan.ALL)
        d = tl.exp2(y) * (a[:, None] + b[:, None] * y) + tl.where(column == target, c[:, None], 0.0)
        tl.store(out + row.to(tl.int64)[:, None] * size + column, _narrow(d, out.dtype.element_ty),
                 mask=live[:, None] & (column < size))

def _logit_tiles(fused: bool, itemsize: int) -> dict:
    if not fused:
        return dict(BM=1, BV=1024, BK=16, num_warps=1, num_stages=2)      # warps that wait for no other
    if itemsize == 4:
        return dict(BM=64, BV=64, BK=32, num_warps=4, num_stages=2)
    return dict(BM=128, BV=256, BK=64, num_warps=8, num_stages=3)

def _logit_launch(x, weight, columns):
    """The grid (blocks of rows; as many parts of the columns as give every SM a few programs), operands, settings."""
    tiles = _logit_tiles(weight is not None, x.itemsize)
    bm, bv, bk = tiles["BM"], tiles["BV"], tiles["BK"]
    blocks, parts = _ceil(len(x), bm), _ceil(columns, bv)
    grid = blocks, max(1, min(_ceil(4 * _processors(x.device), blocks), parts))
    if weight is not None:
        x, weight = _tiled(x, [bm, bk]), _tiled(weight, [bv, bk])
    return grid, (x, weight), tiles | dict(FUSED=weight is not None)

def _stats(x, weight, targets, columns, scale):
    """[4, parts, rows]: m, s, t and y[target] (0 if it is not here)."""
    if not _on_triton(x):
        y = (_wide(x) if weight is None else _wide(x) @ _wide(weight).T) * scale
        y = y.masked_fill(torch.arange(y.shape[1], device=y.device) >= columns, -math.inf)
        m, hit = y.amax(1).clamp(min=MASKED.value), y.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        z = (y - m[:, None]).clamp(min=MASKED.value)
        return torch.stack([m, z.exp().sum(1), (z * z.exp()).sum(1), hit.where(targets >= 0, 0)])[:, None]
    grid, operands, settings = _logit_launch(x, weight, columns)
    stats = x.new_empty(4, grid[1], len(x), dtype=torch.float32)
    _logit_stats[grid](*operands, targets, stats, scale * LOG2E.value, x.stride(0), len(x), columns, x.shape[1],
                       **settings)
    return stats

def _grads(x, weight, targets, factors, scale, start, stop):
    """dlogits of the columns [start, stop)."""
    if not _on_triton(x):
        y = (_wide(x)[:, start:stop] if weight is None else _wide(x) @ _wide(weight[start:stop]).T) * scale
        lse, a, b, c = factors[..., None]
        hit = torch.arange(start, stop, device=x.device) == targets[:, None]
        y = (y - lse).clamp(min=MASKED.value)
        return (y.exp() * (a + b * y) + c * hit).to(x.dtype)
    grid, operands, settings = _logit_launch(x, weight, stop - start)
    out = x.new_empty(len(x), stop - start)
    _logit_grads[grid](*operands, targets, factors, out, scale * LOG2E.value, x.stride(0), stop - start, len(x),
                       x.shape[1], start, **settings)
    return out

class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, temperature, group, vocab_size):
        if len(targets) != len(x) or not temperature > 0:
            raise ValueError(f"{len(targets)} targets for {len(x)} rows at temperature {temperature}; as many are "
                             "needed, and a temperature above 0")
        columns = x.shape[1] if weight is None else len(weight)
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        first, vocab_size = columns * rank, columns * ranks if vocab_size is None else vocab_size
        columns = min(max(vocab_size - first, 0), columns)                          # of this rank's shard
        x, weight = (_dense(x), None) if weight is None else (_aligned(x), _aligned(weight))
        local = torch.where((targets >= first) & (targets < first + columns), targets - first, -1)
        m, s, t, hit = _stats(x, weight, local, columns, 1 / temperature)
        top = m.amax(0)
        if group is not None:
            dist.all_reduce(top, dist.ReduceOp.MAX, group)
        shrink = torch.exp(m - top)
        s, t, hit = sums = torch.stack([(s * shrink).sum(0), ((t + (m - top) * s) * shrink).sum(0), hit.sum(0)])
        if group is not None:
            dist.all_reduce(sums, group=group)
        live = torch.where(targets < vocab_size, targets >= 0, math.nan)            # beyond it, all becomes NaN
        lse, entropy = top + s.log(), s.log() - t / s
        ctx.save_for_backward(x, weight, local, live, lse, entropy)
        ctx.settings = columns, 1 / temperature, group
        return (hit - lse).clamp(max=0) * live, entropy * live

    @staticmethod
    def backward(ctx, dlogprob, dentropy):
        x, weight, local, live, lse, entropy = ctx.saved_tensors
        columns, scale, group = ctx.settings
        dlogprob, dentropy = dlogprob * live * scale, dentropy * live * scale
        factors = torch.stack([lse, -dlogprob - dentropy * entropy, -dentropy, dlogprob])
        if weight is None:
            return _grads(x, None, local, factors, scale, 0, columns), *[None] * 5
        dx, dweight = torch.zeros_like(x, dtype=_wide(x[:0]).dtype), torch.empty_like(weight)
        dweight[columns:] = 0                                                       # words that are padding
        step = max(256, SLICE_BYTES // max(1, len(x) * x.itemsize) // 256 * 256)
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            grads = _grads(x, weight, local, factors, scale, start, stop)
            if x.is_cuda and x.dtype != dx.dtype:
                torch.addmm(dx, grads, weight[start:stop], out_dtype=dx.dtype, out=dx)
            else:
                dx.addmm_(_wide(grads), _wide(weight[start:stop]))
            torch.mm(grads.T, x, out=dweight[start:stop])
        if group is not None:
            dist.all_reduce(dx, group=group)
        return dx.to(x.dtype), dweight, *[None] * 4

def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                         group=None, vocab_size: int | None = None) -> tuple[Tensor, Tensor]:
    """The logprob of each target, and the entropy, under softmax(hidden @ weight' / temperature): both [tokens] in
    fp32, and both differentiable. hidden [tokens, width], weight [vocab, width]. A negative target (-100) is ignored:
    0, without gradient. With a process group each rank holds a slice of the rows of weight, in order of rank and of
    one size, and all ranks the same hidden and targets (of the whole vocabulary); all get the same result, and the
    whole gradient of hidden. Words from vocab_size on are padding, and have no probability; as targets they are NaN."""
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is {hidden.shape[1]} wide, and weight {weight.shape[1]}; they must be the same")
    if _on_triton(hidden) and (rest := -hidden.shape[1] % (16 // hidden.itemsize)):
        hidden, weight = F.pad(hidden, (0, rest)), F.pad(weight, (0, rest))     # the copy engine takes 16 bytes at once
    return _CrossEntropy.apply(hidden, weight, targets, temperature, group, vocab_size)

def cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, ...]:
    """The same from logits [tokens, vocab]; reads them once forward, reads and writes them once backward."""
    return _CrossEntropy.apply(logits, None, targets, temperature, None, None)

# --- sampling --------------------------------------------------------------------------------------------------------

# An exponential race: with E[j] = -log(1 - u[j]), the largest log p[j] - log E[j] is a sample from p (Gumbel's trick).
# u[j] is a hash of (seed, position, j), not the next number of a stream: whatever else is in the batch, the same
# request gives the same tokens. One pass over the logits samples, and sums up the probabilities on the way. Top-k and
# top-p need the lowest logit that is kept: bisection over the bit patterns of floats (which sort like integers) finds
# it exactly in at most 32 passes, 16 for bf16, over a row that sits in L2; rows without limits skip them.

_MIX1, _MIX2 = constexpr(0x7FEB352D), constexpr(0x846CA68B)       # "lowbias32" of C. Wellons' hash prospector

@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MIX1
    x = (x ^ (x >> 15)) * _MIX2
    return x ^ (x >> 16)

@triton.jit
def _order(x, SHIFT: constexpr):
    """An int32 that sorts like the float."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT

@triton.jit
def _kept(row, vocab, low, top, inverse, COUNT: constexpr, SHIFT: constexpr, BLOCK: constexpr):
    """How many logits are `low` or above in order; or their sum of exp(logit - top)."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, vocab, BLOCK):
        j = first + tl.arange(0, BLOCK)
        x = tl.load(row + j, mask=j < vocab, other=0.0).to(tl.float32)
        total += tl.where((j < vocab) & (_order(x, SHIFT) >= low), 1.0 if COUNT else tl.exp2((x - top) * inverse), 0.0)
    return tl.sum(total, 0)

@triton.jit
def _lowest(row, vocab, low, high, need, top, inverse, COUNT: constexpr, SHIFT: constexpr, BLOCK: constexpr):
    """The largest bound in [low, high] that keeps at least `need`."""
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)        # the mean rounded up, without overflow
        if _kept(row, vocab, middle, top, inverse, COUNT, SHIFT, BLOCK) >= need:
            low = middle
        else:
            high = middle - 1
    return low

@triton.jit
def _sample(logits, temperature, top_k, top_p, seeds, positions, tokens, logprobs, full_logprobs, stride, vocab,
            SHIFT: constexpr, BLOCK: constexpr):
    pid = tl.program_id(0)
    row = logits + pid.to(tl.int64) * stride
    heat, k, nucleus = tl.load(temperature + pid), tl.load(top_k + pid), tl.load(top_p + pid)
    greedy = heat == 0
    inverse = LOG2E / tl.where(greedy, 1.0, heat)
    seed = tl.load(seeds + pid)
    key = _mix(_mix(seed.to(tl.uint32) ^ 0x9E3779B9) + (seed >> 32).to(tl.uint32))
    other = _mix(key ^ tl.load(positions + pid).to(tl.uint32))
    low = tl.full([], -2147483648 >> SHIFT, tl.int32)
    if (greedy == 0) & (((k > 0) & (k < vocab)) | (nucleus < 1)):
        tops = tl.full([BLOCK], -3e38, tl.float32)
        for first in tl.range(0, vocab, BLOCK):
            j = first + tl.arange(0, BLOCK)
            tops = tl.maximum(tops, tl.load(row + j, mask=j < vocab, other=-3e38).to(tl.float32))
        top = tl.max(tops, 0)
        high = _order(top, SHIFT)
        if (k > 0) & (k < vocab):
            low = _lowest(row, vocab, low, high, k.to(tl.float32), top, inverse, True, SHIFT, BLOCK)
        if nucleus < 1:
            need = _kept(row, vocab, low, top, inverse, False, SHIFT, BLOCK) * nucleus
            low = _lowest(row, vocab, low, high, need, top, inverse, False, SHIFT, BLOCK)
    m, full, kept = tl.full([BLOCK], MASKED, tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    score, token = m, tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, vocab, BLOCK):             # each lane keeps its own sums and its own best
        j = first + tl.arange(0, BLOCK)
        x = tl.load(row + j, mask=j < vocab, other=0.0).to(tl.float32)
        y = tl.where(j < vocab, x * inverse, MASKED)
        keep = (_order(x, SHIFT) >= low) & (j < vocab)
        new_m = tl.maximum(m, y)
        shrink, e = tl.exp2(m - new_m), tl.where(j < vocab, tl.exp2(y - new_m), 0.0)
        full, kept, m = full * shrink + e, kept * shrink + tl.where(keep, e, 0.0), new_m
        u = (_mix(_mix(j.to(tl.uint32) ^ key) + other).to(tl.float32) + 0.5) * 2**-32
        # 1 - u loses the digits of a small u, so it takes the series; a u that was rounded to 1 would be no sample
        race = tl.where(u < 0.001, u * (1 + 0.5 * u), -tl.log(1 - tl.minimum(u, 0.99999994)))
        rank = tl.where(keep, y if greedy else y - tl.log2(race), MASKED)
        token = tl.where(rank > score, j, token)
        score = tl.maximum(rank, score)
    best = tl.max(m, 0)
    full, kept = tl.sum(full * tl.exp2(m - best), 0), tl.sum(kept * tl.exp2(m - best), 0)
    kept += full * 0                                    # NaN, if there is one in what was not kept
    token = tl.min(tl.where(score == tl.max(score, 0), token, 2147483647), 0)           # the lowest of equals
    picked = tl.load(row + token).to(tl.float32) * inverse - best
    tl.store(tokens + pid, token.to(tl.int64))
    full, kept = (picked - tl.log2(full)) * LN2, (picked - tl.log2(kept)) * LN2
    tl.store(full_logprobs + pid, tl.where(full > 0, 0.0, full))                        # a minimum would hide NaN
    tl.store(logprobs + pid, tl.where(greedy | (kept > 0), 0.0, kept))

def _race(seeds, positions, vocab):
    """E [batch, vocab], in 64-bit integers, since torch shifts none of 32 bits without their sign."""
    word = 2**32 - 1
    def mix(x):
        x = (x ^ (x >> 16)) * _MIX1.value & word
        x = (x ^ (x >> 15)) * _MIX2.value & word
        return x ^ (x >> 16)
    key = mix(mix(seeds & word ^ 0x9E3779B9) + (seeds >> 32) & word)
    other = mix(key ^ positions & word)
    u = mix(mix(torch.arange(vocab, device=seeds.device) ^ key[:, None]) + other[:, None] & word)
    u = (u.float() + 0.5) * 2**-32
    return torch.where(u < 0.001, u * (1 + 0.5 * u), -torch.log1p(-u.clamp(max=0.99999994)))

def sample_reference(logits, temperature, top_k, top_p, seeds, positions):
    greedy, vocab = temperature == 0, logits.shape[-1]
    full = kept = scores = torch.log_softmax(logits.float() / torch.where(greedy, 1, temperature)[:, None], -1)
    if (((top_k > 0) | (top_p < 1)) & ~greedy).any():                               # sorting is most of the time
        ordered = full.sort(-1, descending=True).values
        k = torch.where((top_k <= 0) | greedy, vocab, top_k.clamp(max=vocab))
        low = ordered.gather(1, k[:, None].long() - 1)                              # the k-th largest
        p = torch.where(ordered >= low, ordered, -torch.inf).softmax(-1)
        before = p.cumsum(-1) - p                                                   # mass of all that is larger
        last = ((before < top_p[:, None]) & (ordered >= low)).sum(-1, keepdim=True).clamp(min=1) - 1
        low = torch.where(((top_p < 1) & ~greedy)[:, None], ordered.gather(1, last), low)
        kept = torch.where(full >= low, full, -torch.inf).log_softmax(-1)
    if not greedy.all():
        scores = torch.where(greedy[:, None], full, kept - _race(seeds, positions, vocab).log())
    tokens = scores.argmax(-1)
    logprobs, full = (x.gather(1, tokens[:, None])[:, 0] for x in (kept, full))
    return tokens, torch.where(greedy, 0.0, logprobs), full

def sample(logits: Tensor, temperature, top_k, top_p, seeds: Tensor, positions: Tensor,
           return_full: bool = False) -> tuple[Tensor, ...]:
    """Tokens [batch] (int64) and their logprobs under the distribution that they were sampled from: softmax(logits /
    temperature), the top_k largest of it (-1: all), then the fewest of those that hold top_p of the mass; equal logits
    stay or go together. With return_full also the logprobs under all of softmax(logits / temperature), which is what
    training wants. temperature, top_k, top_p: numbers, or one a row. Temperature 0 is greedy: the first of the largest,
    logprob 0, the full one at temperature 1. seeds and positions [batch] (int64) are all the randomness."""
    kinds = torch.float32, torch.int64, torch.float32, torch.int64, torch.int64
    settings = [torch.as_tensor(x, dtype=kind, device=logits.device).expand(len(logits)).contiguous()
                for x, kind in zip((temperature, top_k, top_p, seeds, positions), kinds)]
    if not _on_triton(logits):
        return sample_reference(logits, *settings)[:3 if return_full else 2]
    logits = _dense(logits)
    out = tuple(logits.new_empty(len(logits), dtype=kind) for kind in (torch.int64, torch.float32, torch.float32))
    _sample[(len(logits),)](logits, *settings, *out, logits.stride(0), logits.shape[1], num_warps=8,
                            SHIFT=16 if logits.dtype == torch.bfloat16 else 0,      # the lower half of a bf16 is zeros
                            BLOCK=min(4096, _power_of_two(logits.shape[1])))
    return out[:3 if return_full else 2]

# --- AdamW -----------------------------------------------------------------------------------------------------------

# Reads master, both moments and the gradient, writes master, both moments and the model's own copy: 30 bytes a
# parameter (28 with a bf16 gradient), where torch's fused AdamW and the cast, clip and copy around it move 52. 96% of a
# copy's rate.

@triton.jit
def _adamw(param, master, m, v, grad, scale, size, lr, beta1, beta2, eps, decay, bias1, bias2, BLOCK: constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    live = i < tl.where(factor == factor, size, 0)      # NaN: nothing changes, and nobody had to wait to find out
    g = tl.load(grad + i, mask=live).to(tl.float32) * factor
    p, a, b = tl.load(master + i, mask=live), tl.load(m + i, mask=live), tl.load(v + i, mask=live)
    a, b = a * beta1 + g * (1 - beta1), b * beta2 + g * g * (1 - beta2)
    p = p * (1 - lr * decay) - lr * (a / bias1) / (tl.sqrt(b / bias2) + eps)
    tl.store(master + i, p, mask=live)
    tl.store(m + i, a, mask=live)
    tl.store(v + i, b, mask=live)
    tl.store(param + i, _narrow(p, param.dtype.element_ty), mask=live)

def adamw_step_reference(param, master, m, v, grad, step, lr, betas, eps, weight_decay, grad_scale):
    if grad_scale != grad_scale:
        return
    g = grad.to(master.dtype) * grad_scale
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    update = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    param.copy_(master.mul_(1 - lr * weight_decay).sub_(update, alpha=lr))

def adamw_step(param: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, step: int, lr: float,
               betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.0,
               grad_scale: Tensor | float = 1.0) -> None:
    """One step (the first is 1) of AdamW, in place, over flat tensors: fp32 master and moments, the gradient in any
    dtype, times grad_scale (say, the clip factor, which may stay on the GPU; if that is NaN nothing changes), the
    result also into param."""
    if not _on_triton(master):
        return adamw_step_reference(param, master, exp_avg, exp_avg_sq, grad, step, lr, betas, eps, weight_decay,
                                    grad_scale)
    scale = torch.as_tensor(grad_scale, dtype=torch.float32, device=param.device)
    _adamw[(_ceil(len(param), 1024),)](
        param, master, exp_avg, exp_avg_sq, grad, scale, len(param), lr, *betas, eps, weight_decay,
        1 - betas[0] ** step, 1 - betas[1] ** step, BLOCK=1024, num_warps=4)

# --- the demo: every kernel against its twin, and on a GPU against the clock -----------------------------------------

def _cases(device: str, n: int) -> dict:
    """name: kernel, reference, inputs that get gradients, and the work (operations or bytes) forward and backward.
    n tokens in the shapes of Qwen3-0.6B, on a CPU in small ones."""
    heads, kv, dim, width, vocab = (16, 8, 128, 1024, 151_936) if device == "cuda" else (4, 2, 64, 80, 500)
    def make(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    q, k, v, x, gate_up = make(n, heads, dim), make(n, kv, dim), make(n, kv, dim), make(n, width), make(n, 6 * width)
    head, logits, qkv, norms = make(vocab, width) * 0.05, make(n // 4, vocab), make(n, 4 * kv * dim), make(2, dim)
    ends, at = torch.tensor([0, n], dtype=torch.int32, device=device), torch.arange(n, device=device)
    cos, sin, targets = at[:, None].cos() * make(1, dim // 2), at[:, None].sin() * make(1, dim // 2), at % vocab
    batch, pages = (128, 128) if device == "cuda" else (3, 8)
    cache, table = make(2, batch * pages, 16, kv, dim), torch.randperm(batch * pages, device=device).int()
    decode = q[:batch], *cache, table.view(batch, pages), torch.full_like(table[:batch], pages * 16 - 3)

    def stepped(step):
        state = [head.flatten().clone(), *torch.full([3, head.numel()], 0.1, device=device)]
        return lambda: step(*state, head.flatten(), 1, 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0) or tuple(state)

    def stored():
        store_kv(k, v, *cache, at[:len(k)])
        return cache.flatten(1, 2)[:, :len(k)]

    def logprobs(y, targets):
        logp = y.log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def case(kernel, reference, inputs, rest, *work):
        return lambda *y: kernel(*y, *rest), lambda *y: reference(*y, *rest), inputs, work

    product, pairs, turned = 2 * n * width * vocab, 2 * n * n * heads * dim, 2 * (q.nbytes + k.nbytes)
    return {
        "flash_attention": (lambda *y: flash_attention(*y, ends, None, n, covered=True),
                            lambda *y: flash_attention_reference(*y, ends, ends), (q, k, v), (pairs, 2.5 * pairs)),
        "paged_attention": case(paged_attention, paged_attention_reference, (), decode, cache.nbytes),
        "store_kv": (stored, lambda: torch.stack([k, v]), (), (4 * k.nbytes,)),
        "rms_norm": case(rms_norm, rms_norm_reference, (x, make(width)), (), 2 * x.nbytes, 3 * x.nbytes),
        "rotary": case(rotary, rotary_reference, (q, k), (cos, sin, at), turned, turned),
        "qkv_rotary": (lambda y, *w: qkv_rotary(y, heads, kv, cos, sin, at, *w),
                       lambda y, *w: qkv_rotary_reference(y, heads, kv, cos, sin, at, *w), (qkv, *norms),
                       (turned, 1.5 * turned + 2 * v.nbytes)),
        "swiglu": case(swiglu, swiglu_reference, (gate_up,), (), 1.5 * gate_up.nbytes, 2.5 * gate_up.nbytes),
        "linear_cross_entropy": case(linear_cross_entropy, lambda y, w, t: logprobs(y @ w.T, t), (x, head), (targets,),
                                     product, 2 * product),
        "cross_entropy": case(cross_entropy, logprobs, (logits,), (targets[:n // 4],), logits.nbytes,
                              2 * logits.nbytes),
        "adamw_step": (stepped(adamw_step), stepped(adamw_step_reference), (), (28 * head.numel(),)),
    }

def _sdpa(backend: str, q, k, v):
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
        return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True,
                                              enable_gqa=True)

def _liger(name: str, inputs) -> dict:
    """Liger Kernel's version, where that is installed. Its losses make their gradients in the forward pass."""
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError:
        return {}
    at = torch.arange(len(inputs[0]), device="cuda") if inputs else None
    function = {
        "rms_norm": lambda x, w: liger.liger_rms_norm(x, w, 1e-6, in_place=False),
        "rotary": lambda q, k: liger.liger_rope(*(x.transpose(0, 1)[None] for x in (q, k)),
                                                *q.new_ones(2, 1, len(q), q.shape[2])),
        "swiglu": liger.liger_swiglu,
        "linear_cross_entropy": lambda x, w: liger.liger_fused_linear_cross_entropy(x, w, at),
        "cross_entropy": lambda y: liger.liger_cross_entropy(y, at)}.get(name)
    if name == "swiglu":                                # wants the halves apart
        inputs = inputs[0].view(2, len(inputs[0]), -1).unbind()
    return {"Liger": (function, inputs)} if function else {}

def _gradients(function, inputs):
    """Outputs, and a function that gives the gradients of the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    seeds = [torch.arange(y.numel(), device=y.device).sin().view_as(y).bfloat16().to(y.dtype) for y in outs]
    return outs, lambda: torch.autograd.grad(outs, inputs, seeds, retain_graph=True) if inputs else ()

def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print("the kernels against their torch twins in fp32: relative errors of what they return, then of gradients")
    for name, (kernel, reference, inputs, _) in _cases(device, 150).items():
        ours, our_gradients = _gradients(kernel, inputs)
        theirs, their_gradients = _gradients(reference, [x.float() for x in inputs])
        errors = [((a.float() - b.float()).norm() / b.float().norm()).item()
                  for a, b in zip((*ours, *our_gradients()), (*theirs, *their_gradients()))]
        print(f"  {name:22}" + "".join(f"{e:9.1e}" for e in errors))
        if not max(errors) <= (2e-2 if device == "cuda" else 1e-5):
            sys.exit(f"{name} is wrong")
    logits, row = torch.randn(8, 500, device=device), torch.arange(8, device=device)
    tokens = [f(logits, *(torch.full([8], x, device=device) for x in (0.8, 50, 0.9)), row, row)[0]
              for f in (sample, sample_reference)]
    if not torch.equal(*tokens):
        sys.exit("sample is wrong")
    print(f"  {'sample':22}the same tokens")
    if device == "cuda":
        benchmark()

def benchmark():
    import torch._functorch.config
    torch._functorch.config.donated_buffer = False      # torch.compile: backward is timed again and again
    def time(f):                                                                                    # milliseconds
        return triton.testing.do_bench(f, warmup=50, rep=200, return_mode="median")
    square, block = (torch.randn(x, device="cuda", dtype=torch.bfloat16) for x in ([8192, 8192], [2**30]))
    product, copy = 2 * 8192**3 / time(lambda: square @ square) / 1e9, 2 * block.nbytes / time(block.clone) / 1e6
    print(f"\n{torch.cuda.get_device_name()}: product {product:.0f} TFLOP/s, copy {copy:.0f} GB/s\n"
          "forward and backward: ms, TFLOP/s or GB/s, share of that product or copy")
    cases = _cases("cuda", 8192)                        # what moves bytes gets more of them, or launches would be timed
    cases |= {name: case for name, case in _cases("cuda", 131_072).items() if cases[name][3][0] < 1e11}
    for name, (kernel, reference, inputs, work) in cases.items():
        limit, unit = (product, 1e9) if work[0] > 1e11 else (copy, 1e6)
        torch.compiler.reset()                          # or it would give up compiling this line's eighth lambda
        rivals = {"torch.compile": (torch.compile(reference), inputs)} if inputs else {}
        if name == "flash_attention":
            rivals = {f"SDPA {x.lower()}": (partial(_sdpa, f"{x}_ATTENTION"), inputs) for x in ("FLASH", "CUDNN")}
        for label, (function, given) in {"kernel": (kernel, inputs), **rivals, **_liger(name, inputs)}.items():
            runs = [lambda: function(*given), _gradients(function, given)[1]]                       # noqa: B023
            rates = [(ms, amount / ms / unit) for ms, amount in ((time(f), a) for f, a in zip(runs, work))]
            print(f"{name:22}{label:14}" + "".join(f"{a:10.3f}{b:7.0f}{b / limit:6.0%}" for a, b in rates))

if __name__ == "__main__":
    main()
