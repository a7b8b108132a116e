"""parallel: Qwen3, and every way to split it.

    dp  replicas: other tokens, same weights     tp 0 | embed | half the heads and neurons | ... | norm | words | loss
    pp  stages: consecutive layers               tp 1 |  ...  |      the other half        | ... |      |  ...  |
    tp  shares of every layer                           stage 0 | hidden states -->  <-- their gradients | last stage

    parameters   flat bf16 buckets, each parameter a view of one    all-gathered over dp after the step, in place
    gradients    flat fp32 buckets, summed over micro-batches       reduce-scattered over dp, while backward runs
    optimizer    fp32 parameters and two moments                    each dp rank has its shard (ZeRO-1)

Every layout computes what one process does, to rounding: gradients are sums of what the caller divided by global
counts, weights start from (seed, name), and the norm counts a parameter once. Attention is a function that is given:
packed(...) to train, a paged cache to generate. To take this file, and kernels.py, to another project:

    mesh = init(pp=2, tp=2)                                             # dp is what is left; Mesh() is one process
    model = Qwen3.from_pretrained("Qwen/Qwen3-0.6B", mesh, recompute=True)
    optimizer = AdamW(model, lr=1e-5, weight_decay=0.01, clip=1.0)

    def loss(model, hidden, batch):                                     # at the last stage: (scalar, what run returns)
        logprob, entropy = model.logprobs(hidden, batch["targets"])     # [tokens] each; a target of -100 is ignored
        return -logprob.sum() / batch["count"], logprob.detach().sum()

    for step in range(steps):           # a micro-batch is packed documents: tokens, positions, cu_seqlens (int32), ...
        results = run(model, micro_batches, loss)                       # count: of all ranks and all micro-batches
        norm = optimizer.step()
    save("out/last", model, optimizer, {"step": step})                  # load(...) takes it to any other layout

    python parallel.py                                       the demo; on a GPU, the speed of Qwen3-0.6B as well
    torchrun --nproc-per-node 4 parallel.py --tp 2 --pp 2    the demo on four processes, each on a CPU or a GPU
    python parallel.py merge CHECKPOINT OUT                  a checkpoint as a Hugging Face directory

Public names: Config, Mesh, init; Qwen3, packed; run; AdamW; save, load, latest, merge; tiny_model, training_flops.
"""
import gc, json, math, os, pickle, shutil, sys, tempfile, time, zlib
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Callable, Iterable, Iterator, Literal, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import adamw_step, flash_attention, linear_cross_entropy, qkv_rotary, rms_norm, swiglu

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor        # renamed in torch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# --- the model's settings --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Qwen3, Qwen2 or Llama, by flags; the fields have the names of transformers, the values are of Qwen3-0.6B."""
    model_type: str = "qwen3"
    vocab_size: int = 151_936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 40_960
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict | None = None        # or Llama 3's: rope_type, factor, low_freq_factor, ...
    tie_word_embeddings: bool = True        # the output head is the input embedding
    qk_norm: bool = True                    # Qwen3: queries and keys are normalised, head by head
    attention_bias: bool = False            # Qwen2: on q, k and v; elsewhere on the output, too
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_pretrained(cls, model: str | Path) -> "Config":
        from transformers import AutoConfig
        found = AutoConfig.from_pretrained(local_folder(model)).to_dict()
        kind, rope, heads = found["model_type"], found.get("rope_parameters") or {}, found.get("num_attention_heads")
        if kind not in ("qwen3", "qwen2", "llama") or rope.get("rope_type", "default") not in ("default", "llama3") or \
                found["hidden_act"] != "silu" or found.get("mlp_bias") or found.get("use_sliding_window"):
            raise ValueError(f"{model} is a {kind} with parts that are not known here; take a Qwen3, Qwen2 or Llama "
                             "with silu, no bias in its MLP, no sliding window, and rope_type default or llama3")
        return cls(**{"head_dim": found["hidden_size"] // heads, "num_key_value_heads": heads}
                   | {x.name: found[x.name] for x in fields(cls) if found.get(x.name) is not None}
                   | {"rope_theta": rope["rope_theta"], "rope_scaling": rope if "factor" in rope else None,
                      "qk_norm": kind == "qwen3", "attention_bias": found.get("attention_bias", kind == "qwen2")})

    def to_json(self) -> bytes:
        """config.json, as transformers reads it; to one without a version it warns of a tokenizer that is not there."""
        kind = "llama" if self.model_type == "qwen3" and not self.qk_norm else self.model_type
        rope = {"rope_type": "default"} | (self.rope_scaling or {}) | {"rope_theta": self.rope_theta}
        own = {"model_type": kind, "architectures": [kind.capitalize() + "ForCausalLM"], "rope_parameters": rope,
               "hidden_act": "silu", "transformers_version": "5.0.0"}
        return json.dumps(asdict(replace(self, rope_scaling=None)) | own, indent=2).encode()

def local_folder(model: str | Path) -> Path:
    """A model directory, fetched from the hub where the name is not that of a folder."""
    from huggingface_hub import snapshot_download
    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return Path(model if Path(model).is_dir() else snapshot_download(str(model), allow_patterns=wanted))
    except Exception as error:
        raise FileNotFoundError(f"{model} is neither a folder nor a hub id that can be fetched: {error}") from None

# --- the mesh: which rank does what ----------------------------------------------------------------------------------

@dataclass
class Mesh:
    """dp x pp x tp ranks; (dp, pp, tp) are the digits of the rank, so that tp, which talks most, has neighbours."""
    dp: int = 1                             # replicas of the model, each with other data
    pp: int = 1                             # stages that the layers are dealt out to
    tp: int = 1                             # ranks that share each layer
    rank: int = 0
    device: torch.device | str | None = None
    dp_group: dist.ProcessGroup | None = None       # the ranks that differ from this one in dp alone; None: no others
    pp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    links: dict = field(default_factory=dict)       # (kind, from, to): the two stages, for messages of one kind one way

    def __post_init__(self):
        self.device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.size, self.tp_rank = self.dp * self.pp * self.tp, self.rank % self.tp
        self.dp_rank, self.pp_rank = divmod(self.rank // self.tp, self.pp)

def init(dp: int | None = None, pp: int = 1, tp: int = 1, device: str | None = None) -> Mesh:
    """This process' place, from torchrun's environment (without it, a process alone); dp=None takes what is left."""
    joined = dist.is_initialized()
    world = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", 1))
    rank = dist.get_rank() if joined else int(os.environ.get("RANK", 0))
    if min(pp, tp) < 1 or world % (pp * tp) or dp not in (None, world // (pp * tp)):
        fits = [f"{world // (p * t)} x {p} x {t}" for p in range(1, world + 1) for t in range(1, world + 1)
                if world % (p * t) == 0]
        raise ValueError(f"dp x pp x tp = {dp or 'any'} x {pp} x {tp} does not make {world} processes; choose from "
                         f"{', '.join(fits)}, or start as many with torchrun --nproc-per-node")
    mesh = Mesh(world // (pp * tp), pp, tp, rank, device)
    if mesh.device.type == "cuda":
        if mesh.device.index is None:
            mesh.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(mesh.device)
    if world > 1 and not joined:
        dist.init_process_group("cpu:gloo,cuda:nccl" if mesh.device.type == "cuda" else "gloo")
    ranks, mine = torch.arange(world).view(mesh.dp, pp, tp), {}
    groups = [(name, row) for axis, name in enumerate(("dp", "pp", "tp"))
              for row in ranks.movedim(axis, -1).reshape(-1, ranks.shape[axis]).tolist() if len(row) > 1]
    for column in [row for name, row in groups if name == "pp"]:
        for kind, step in (("F", 1), ("B", -1)):
            groups += [((kind, i, (i + step) % pp), [column[i], column[(i + step) % pp]]) for i in range(pp)]
    for name, members in groups:            # every rank has to make every group
        group = dist.new_group(members)
        if rank in members:                 # they meet at once, so that later nobody waits for another
            dist.all_reduce(torch.zeros(1, device=mesh.device), group=group)
            mine[name] = group
    return replace(mesh, dp_group=mine.get("dp"), pp_group=mine.get("pp"), tp_group=mine.get("tp"), links=mine)

def _together(mesh: Mesh, action: Callable, tensors: Iterable = ()) -> list:
    """What each rank's action returns. If one fails all do, as the others would wait for it forever: also for its parts
    of `tensors`, which are asked for to the end."""
    try:
        mine = action(), None
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else OSError
        mine = None, kind(f"rank {mesh.rank} failed: {type(error).__name__}: {error}")
    for _ in tensors:
        pass
    everyone = [mine] * mesh.size
    if mesh.size > 1:
        dist.all_gather_object(everyone, mine)
    for _, error in everyone:
        if error:
            raise error
    return [value for value, _ in everyone]

# --- the table: how tp splits each tensor ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Spec:
    """A tensor by its Hugging Face name, and the share of it that a tp rank holds."""
    layer: int                              # -1: the words, before the layers; after them come the norm, and the head
    ours: str                               # the parameter that it is a part of, as some of its rows
    name: str
    shape: tuple[int, ...]
    axis: int                               # that is split
    copies: int                             # ranks next to each other that hold the same share
    partial: bool                           # whether the gradients of copies are to be summed
    shards: int                             # that there are

    @property
    def share(self) -> tuple[int, ...]:
        """The shape of a share; that of the vocabulary is rounded up, so that all are of one size."""
        return *self.shape[:self.axis], -(-self.shape[self.axis] // self.shards), *self.shape[self.axis + 1:]

    def take(self, whole: Tensor, tp_rank: int) -> Tensor:
        """A rank's share, the padding zero."""
        missing = self.share[self.axis] * self.shards - whole.shape[self.axis]
        if missing:
            whole = F.pad(whole, [0, 0] * (whole.dim() - 1 - self.axis) + [0, missing])
        return whole.chunk(self.shards, self.axis)[tp_rank // self.copies]

def table(config: Config, value_head: bool = False, tp: int = 1, sequence: bool = False) -> list[Spec]:
    """All tensors of the model in the order of their use. Initialisation, load, save, clipping and tests go by it."""
    c, kind, hidden, wide = config, config.model_type, config.hidden_size, config.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # How a tensor lies over the tp ranks, as (axis, copies, partial):
    rows, columns = (0, 1, False), (1, 1, False)
    keys = 0, max(1, tp // c.num_key_value_heads), True     # by key heads; where tp is more than those, copied
    whole = 0, tp, False                                    # on every rank, and each computes the whole gradient
    heads = 0, tp, True                                     # on every rank, whose gradient is that of its own heads
    tokens = 0, tp, sequence                                # with sequence parallel, it is that of its own tokens
    qkv = ("q", q, rows), ("k", kv, keys), ("v", kv, keys)
    layer = [("input_norm", "input_layernorm.weight", (hidden,), tokens),
             *[("qkv", f"self_attn.{x}_proj.weight", (n, hidden), how) for x, n, how in qkv],
             *[("qkv_bias", f"self_attn.{x}_proj.bias", (n,), how) for x, n, how in qkv if c.attention_bias],
             *[(f"{x}_norm", f"self_attn.{x}_norm.weight", (c.head_dim,), heads) for x in "qk" if c.qk_norm],
             ("out", "self_attn.o_proj.weight", (hidden, q), columns),
             *[("out_bias", "self_attn.o_proj.bias", (hidden,), tokens)] * (c.attention_bias and kind != "qwen2"),
             ("mlp_norm", "post_attention_layernorm.weight", (hidden,), tokens),
             *[("gate_up", f"mlp.{x}_proj.weight", (wide, hidden), rows) for x in ("gate", "up")],
             ("down", "mlp.down_proj.weight", (hidden, wide), columns)]
    tensors = [(-1, "embed", "model.embed_tokens.weight", (c.vocab_size, hidden), rows)]
    tensors += [(i, ours, f"model.layers.{i}.{name}", *how) for i in range(c.num_hidden_layers)
                for ours, name, *how in layer]
    tensors.append((c.num_hidden_layers, "norm", "model.norm.weight", (hidden,), tokens))
    if value_head:
        tensors.append((c.num_hidden_layers, "score", "score.weight", (1, hidden), whole))
    elif not c.tie_word_embeddings:
        tensors.append((c.num_hidden_layers + 1, "head_weight", "lm_head.weight", (c.vocab_size, hidden), rows))
    return [Spec(*tensor, *how, shards=tp // how[1]) for *tensor, how in tensors]

def check_layout(config: Config, mesh: Mesh, chunks: int) -> None:
    """Refuse a layout that cannot be, with the choices that would do."""
    heads, kv, wide = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    fits = [tp for tp in range(1, heads + 1) if not (heads % tp or wide % tp or (kv % tp and tp % kv))]
    if mesh.tp not in fits:
        raise ValueError(f"{heads} attention heads, {kv} key heads and {wide} neurons cannot be split over "
                         f"tp={mesh.tp}; choose tp from {', '.join(map(str, fits))}")
    if not 1 <= mesh.pp * chunks <= config.num_hidden_layers:
        raise ValueError(f"{config.num_hidden_layers} layers cannot fill pp={mesh.pp} x chunks={chunks} stages; choose "
                         f"them such that pp x chunks is from 1 to {config.num_hidden_layers}")

# --- tensor parallel: four conjugate operations ----------------------------------------------------------------------

class _Conjugate(torch.autograd.Function):
    """x through `there`, and its gradient through `back`; either may be None, which leaves it as it is."""
    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x) if there else x

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad) if ctx.back else grad, None, None

class TensorParallel:
    """A layer needs its group at two points: where its products by columns begin, and where those by rows end. The four
    operations there come in pairs, each the derivative of the other: f and f_bar (Megatron, arXiv 1909.08053), or with
    sequence parallel g and g_bar (arXiv 2205.05198), between which norms and residuals have 1 / tp of the tokens."""
    def __init__(self, group, sequence: bool):
        self.group, self.size = group, 1 if group is None else dist.get_world_size(group)
        self.sequence = sequence and self.size > 1

    def enter(self, x: Tensor, tokens: int) -> Tensor:
        """g or f: [tokens, width] on every rank."""
        if self.sequence:
            return _Conjugate.apply(x, self.all_gather, self.reduce_scatter)[:tokens]
        return x if self.size == 1 else _Conjugate.apply(x, None, self.all_reduce)

    def leave(self, x: Tensor) -> Tensor:
        """g_bar or f_bar: the sum over ranks, [tokens, width], or this rank's rows of it."""
        if self.sequence:
            return _Conjugate.apply(F.pad(x, [0, 0, 0, -len(x) % self.size]), self.reduce_scatter, self.all_gather)
        return x if self.size == 1 else _Conjugate.apply(x, self.all_reduce, None)

    def whole(self, x: Tensor, length: int) -> Tensor:
        """All rows, of which every rank computes the same, and so the whole gradient."""
        return _Conjugate.apply(x, self.all_gather, lambda x: x.chunk(self.size)[dist.get_rank(self.group)])[:length]

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x) * self.size, *x.shape[1:])
        all_gather(out, x.contiguous(), group=self.group)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x) // self.size, *x.shape[1:])
        reduce_scatter(out, x.contiguous(), group=self.group)
        return out

# --- buckets: where parameters and gradients lie ---------------------------------------------------------------------

class Bucket:
    """The parameters of a layer, or the words, side by side in one flat tensor; and their gradients in another, in fp32
    (fp64 if the model is). All of it is reduced, stepped and gathered by one call each. A dp rank owns a shard of both:
    it gets the sum of the gradients there, and steps the parameters there."""
    def __init__(self, model: "Qwen3", specs: list[Spec], module: nn.Module, chunk: int, tied: bool):
        self.model, self.mesh, self.chunk = model, model.mesh, chunk
        self.tied, self.params, self.layout, places, size = tied, [], [], [], 0     # tied: words of two stages
        self.total = self.shard_total = self.work = self.waiting = self.master = None
        for ours, stacked in groupby(specs, lambda spec: spec.ours):
            start = size
            for spec in stacked:
                self.layout.append((spec, size, size + math.prod(spec.share)))
                size += math.prod(spec.share)
            places.append((ours, slice(start, size), spec.share[1:]))
            size = -(-size // 64) * 64                      # 128 bytes: what kernels like to begin at
        each = -(-size // (64 * self.mesh.dp)) * 64
        self.flat = torch.zeros(each * self.mesh.dp, dtype=model.dtype, device=model.device)
        self.shard = slice(each * self.mesh.dp_rank, each * (self.mesh.dp_rank + 1))
        for ours, where, tail in places:
            p = nn.Parameter(self.flat[where].view(-1, *tail))
            p.bucket, p.where, p.total = self, where, None
            setattr(module, ours, p)
            self.params.append(p)

    def pieces(self) -> Iterator[tuple[Spec, int, slice]]:
        """What lies in the shard: a tensor, from which number of its share on, and where in the shard."""
        for spec, start, stop in self.layout:
            first, last = max(start, self.shard.start), min(stop, self.shard.stop)
            if first < last:
                yield spec, first - start, slice(first - self.shard.start, last - self.shard.start)

    def zero(self) -> None:
        """From now on gradients gather in `total`."""
        if self.total is None:
            self.total = torch.zeros_like(self.flat, dtype=torch.promote_types(self.flat.dtype, torch.float32))
            self.shard_total = self.total if self.mesh.dp == 1 else torch.zeros_like(self.total[self.shard])
            for p in self.params:
                p.total = self.total[p.where].view(p.shape)
                if self.mesh.dp > 1:
                    p.register_post_accumulate_grad_hook(landed)
        self.total.zero_()
        self.waiting = None                                 # or: the parameters whose gradients are still to come
        for p in self.params:
            p.grad = p.total if p.dtype == p.total.dtype else None

    def reduce(self) -> None:
        if self.mesh.dp > 1:
            self.work = reduce_scatter(self.shard_total, self.total, group=self.mesh.dp_group, async_op=True)

    def gather(self, flat: Tensor, shard: Tensor):
        """All shards from their owners; one may lie in its place already."""
        return all_gather(flat, shard, group=self.mesh.dp_group, async_op=True)

def landed(p: Tensor) -> None:
    """A gradient of the last micro-batch is there. Buckets are reduced while backward goes on below: each when it is
    complete and those before it are, so in one order on all ranks."""
    if p.bucket.model.queue is None and p.bucket.mesh.size > 1:
        raise ValueError("gradients are summed over the ranks already; call zero_grad before another backward")
    if p.bucket.waiting is not None:
        collect([p])
        p.bucket.waiting.discard(p)
        while (queue := p.bucket.model.queue) and queue[0].waiting == set():
            queue.pop(0).reduce()

def collect(params: Iterable[Tensor]) -> None:
    """Add to `total` the bf16 gradients that autograd left. Small ones, the norms, go together: there are a hundred."""
    fresh = [p for p in params if p.grad is not None and p.grad is not p.total]
    small = [p for p in fresh if p.numel() < 2**20]
    if small:
        grads = torch.cat([p.grad.flatten() for p in small]).to(small[0].total.dtype)
        torch._foreach_add_([p.total.view(-1) for p in small], grads.split([p.numel() for p in small]))
    for p in fresh:
        if p.numel() >= 2**20:
            p.total.add_(p.grad)
        p.grad = None

# --- the model -------------------------------------------------------------------------------------------------------

class _Linear(torch.autograd.Function):
    """x @ weight', whose backward adds the gradient of the weight to `total` within the product: in fp32, and without
    writing and reading it in bf16."""
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight                 # the parameter itself: from a saved tensor, recompute makes an alias
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        (x,), weight, total = ctx.saved_tensors, ctx.weight, ctx.weight.total
        if total is None:                   # there is no optimizer yet
            return dy @ weight, dy.T @ x
        if x.is_cuda and x.dtype != total.dtype:
            torch.addmm(total, dy.T, x, out_dtype=total.dtype, out=total)
        else:
            total.addmm_(dy.T.to(total.dtype), x.to(total.dtype))
        landed(weight)
        return dy @ weight, None

def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in], weight [out, in] -> [tokens, out]."""
    y = _Linear.apply(x, weight) if torch.is_grad_enabled() else F.linear(x, weight)
    return y if bias is None else y + bias

class Layer(nn.Module):
    """A decoder layer: x + attention(norm(x)), then x + mlp(norm(x)), on this rank's heads and neurons."""
    def __init__(self, index: int, config: Config, tp: TensorParallel, cos: Tensor, sin: Tensor):
        super().__init__()
        self.index, self.eps, self.tp, self.cos, self.sin = index, config.rms_norm_eps, tp, cos, sin
        self.heads, self.kv = config.num_attention_heads // tp.size, max(1, config.num_key_value_heads // tp.size)
        self.qkv_bias = self.out_bias = self.q_norm = self.k_norm = None

    def forward(self, x: Tensor, residual: Tensor | None, positions: Tensor, attend: Callable):
        """x and residual [rows, hidden], rows = tokens (or this rank's share of them): their sum is the input. The
        output, too, is in two parts, which the next norm adds on its way (residual None: x is all of it)."""
        x, residual = (rms_norm(x, self.input_norm, self.eps), x) if residual is None else \
            rms_norm(x, self.input_norm, self.eps, residual)
        qkv = linear(self.tp.enter(x, len(positions)), self.qkv, self.qkv_bias)     # [tokens, (heads + 2 kv) * dim]
        q, k, v = qkv_rotary(qkv, self.heads, self.kv, self.cos, self.sin, positions, self.q_norm, self.k_norm,
                             self.eps)                                              # [tokens, heads or kv, dim]
        mixed = attend(self.index, q, k, v).flatten(1)                              # [tokens, heads * dim]
        x = self.tp.leave(linear(mixed, self.out))                                  # [rows, hidden]
        x = x if self.out_bias is None else x + self.out_bias
        x, residual = rms_norm(x, self.mlp_norm, self.eps, residual)
        x = linear(self.tp.enter(x, len(positions)), self.gate_up)                  # [tokens, 2 * wide / tp]
        return self.tp.leave(linear(swiglu(x), self.down)), residual                # [rows, hidden] each

def rotary_tables(config: Config, device) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, dim / 2] of position * frequency; in fp32 whatever the model is in, as transformers."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency, scaling = 1 / config.rope_theta ** exponent, config.rope_scaling
    if scaling:             # Llama 3: waves longer than the old context slow down by `factor`, short ones do not
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)     # in the old context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * keep + frequency / scaling["factor"] * (1 - keep)
    angle = torch.arange(config.max_position_embeddings, dtype=torch.float32)[:, None] * frequency
    return angle.cos().to(device), angle.sin().to(device)

def packed(cu_seqlens: Tensor, max_seqlen: int | None = None, covered: bool = False) -> Callable:
    """Causal attention over packed documents, the i-th at [cu_seqlens[i], cu_seqlens[i + 1]). covered: no token is in
    none of them."""
    longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    return lambda layer, q, k, v: flash_attention(q, k, v, cu_seqlens, max_seqlen_q=longest, covered=covered)

def initial(spec: Spec, config: Config, seed: int) -> Tensor:
    """Random by (seed, name) alone, so the same on every layout."""
    if spec.name.endswith("norm.weight"):
        return torch.ones(spec.shape)
    if spec.name.endswith(("bias", "score.weight")):        # a critic begins by predicting 0
        return torch.zeros(spec.shape)
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode(), seed))
    return torch.empty(spec.shape).normal_(0, config.initializer_range, generator=generator)

class Qwen3(nn.Module):
    """This rank's share of the model: `chunks` stages of the pipeline (one, unless they are interleaved)."""
    def __init__(self, config: Config, mesh: Mesh | None = None, *, value_head: bool = False,
                 dtype: torch.dtype | None = None, device: str | torch.device | None = None, seed: int | None = 0,
                 recompute: bool = False, sequence_parallel: bool | None = None, chunks: int = 1):
        super().__init__()
        mesh = mesh or Mesh(device=device)
        check_layout(config, mesh, chunks)
        self.config, self.mesh, self.value_head, self.recompute = config, mesh, value_head, recompute
        self.device, self.chunks, self.stages = torch.device(device or mesh.device), chunks, mesh.pp * chunks
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.files: dict[str, bytes] = {}   # tokenizer and so on, of the directory that the model came from
        self.tp = TensorParallel(mesh.tp_group, sequence_parallel is not False)
        self.specs, tables = table(config, value_head, mesh.tp, self.tp.sequence), rotary_tables(config, self.device)
        self.layers = nn.ModuleList(Layer(i, config, self.tp, *tables) for i in range(config.num_hidden_layers)
                                    if self.stage_of(i) % mesh.pp == mesh.pp_rank)
        self.embed = self.norm = self.head_weight = self.score = None
        self.buckets, self.queue = [], None     # of those whose gradients are to be reduced; None: all are final
        self._allocate()
        self.mine = {spec.name: (spec, bucket.flat[start:stop].view(spec.share)) for bucket in self.buckets
                     for spec, start, stop in bucket.layout}
        if seed is not None:
            self.load_hf((spec.name, initial(spec, config, seed)) for spec in self.specs if spec.name in self.mine)

    def _apply(self, fn, recurse=True):     # of double(), to(...) and the like
        flat = self.buckets[0].flat
        if fn(flat[:1]).data_ptr() != flat.data_ptr():
            raise ValueError("parameters cannot leave their buckets; give dtype= and device= to Qwen3 instead")
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo):
        raise ValueError("make another Qwen3(config, mesh), and copy with its load_hf(model.hf_tensors())")

    def stage_of(self, layer: int) -> int:
        """Of a layer, or of what is before or after them. The last stage, with the head, has no more than others."""
        layers = self.config.num_hidden_layers
        return max(0, min(layer, layers - 1)) * self.stages // layers

    def _allocate(self) -> None:
        """Make the parameters, in buckets."""
        mesh, specs, modules = self.mesh, list(self.specs), {layer.index: layer for layer in self.layers}
        tied, head = self.config.tie_word_embeddings and not self.value_head, self.config.num_hidden_layers + 1
        if tied and mesh.pp > 1:            # the last stage has a copy of the words; gradients are exchanged
            specs.append(replace(specs[0], layer=head, ours="head_weight"))
        for layer, group in groupby(specs, lambda spec: spec.layer):
            chunk, pp_rank = divmod(self.stage_of(layer), mesh.pp)
            if pp_rank == mesh.pp_rank:
                shared = tied and mesh.pp > 1 and layer in (-1, head)
                self.buckets.append(Bucket(self, list(group), modules.get(layer, self), chunk, shared))
        if tied and mesh.pp == 1:
            self.head_weight = self.embed

    @classmethod
    def from_pretrained(cls, model: str | Path, mesh: Mesh | None = None, **settings) -> "Qwen3":
        """A Hugging Face directory, or hub id, of one or several safetensors files."""
        folder = local_folder(model)
        made = cls(Config.from_pretrained(folder), mesh, **settings, seed=None)
        made.load_hf(read_folder(folder))
        made.files = small_files(folder)
        return made

    def forward(self, tokens: Tensor, positions: Tensor, attend: Callable, x: Tensor | None = None,
                chunk: int = 0) -> Tensor:
        """tokens, positions [tokens] -> [tokens, hidden_size] after the final norm. In a pipeline x [rows, hidden_size]
        comes from the stage before, and the like goes to the stage after."""
        stage, residual = chunk * self.mesh.pp + self.mesh.pp_rank, None
        if stage == 0:
            x = self._embedded(tokens)
        for layer in self.layers:
            if self.stage_of(layer.index) == stage:
                if self.recompute and torch.is_grad_enabled():      # keep the input, and run it again for backward
                    layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
                x, residual = layer(x, residual, positions, attend)
        if stage < self.stages - 1:
            return x + residual
        x, _ = rms_norm(x, self.norm, self.config.rms_norm_eps, residual)
        return self.tp.whole(x, len(tokens)) if self.tp.sequence else x

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Each rank looks up the words that it has; their sum is [tokens, hidden_size], or this rank's rows of it."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.embed)
        ids = tokens - self.mesh.tp_rank * len(self.embed)
        here = (ids >= 0) & (ids < len(self.embed))
        return self.tp.leave(F.embedding(ids * here, self.embed) * here[:, None])

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The logprob of each target [tokens] (a negative one is ignored), and the entropy; differentiable. head_weight
        is [words of this rank, hidden_size], and words from vocab_size on are padding."""
        return linear_cross_entropy(hidden, self.head_weight, targets, temperature, self.mesh.tp_group,
                                    self.config.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, vocab_size], on every tp rank; to generate from bf16 in fp32, as the product sums them up."""
        hidden = hidden if self.tp.size == 1 else _Conjugate.apply(hidden, None, self.tp.all_reduce)
        if hidden.is_cuda and hidden.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            words = torch.mm(hidden, self.head_weight.T, out_dtype=torch.float32)
        else:
            words = F.linear(hidden, self.head_weight)                                              # [tokens, some]
        return words if self.tp.size == 1 else self.tp.whole(words.T, self.config.vocab_size).T.contiguous()

    def value(self, hidden: Tensor) -> Tensor:
        """A critic's estimate [tokens], in fp32."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return hidden.to(wide) @ self.score[0].to(wide)

    def zero_grad(self, set_to_none: bool = False) -> None:
        if not all(p.requires_grad for bucket in self.buckets for p in bucket.params):
            raise ValueError("a parameter is frozen, and layers are trained as a whole; use model.requires_grad_()")
        self.queue = self.buckets[::-1]     # the last layers first, as their gradients come
        for bucket in self.buckets:
            bucket.zero()

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """After the last backward: each gradient summed over all ranks that have a part of it, on its dp shard."""
        if self.queue is None:
            return
        mesh = self.mesh
        collect(self.parameters())          # of a plain backward, without run
        while self.queue:
            self.queue.pop(0).reduce()
        self.queue = None
        for bucket in self.buckets:
            if mesh.dp > 1:
                bucket.work.wait()
            if bucket.tied:                 # the sum of two is the same bits on both
                dist.all_reduce(bucket.shard_total, group=mesh.links["F", mesh.pp - 1, 0])
        for copies in {spec.copies for spec in self.specs if spec.partial} - {1}:   # each gathers all, and sums its own
            parts = [bucket.shard_total[where] for bucket in self.buckets for spec, _, where in bucket.pieces()
                     if spec.partial and spec.copies == copies]
            if parts:
                everyone = self.tp.all_gather(torch.cat(parts)).view(mesh.tp // copies, copies, -1)
                sums = everyone[mesh.tp_rank // copies].sum(0)
                for part, total in zip(parts, sums.split([len(x) for x in parts])):
                    part.copy_(total)

    @torch.no_grad()
    def load_hf(self, tensors: Mapping | Iterable) -> None:
        """Copy this rank's shares of whole tensors, given by Hugging Face names as a mapping or as pairs, into place:
        no parameter moves in memory. A mapping is checked before anything changes."""
        shapes = {spec.name: spec.shape for spec in self.specs}
        for copying in (False, True) if isinstance(tensors, Mapping) else (True,):
            seen = {"score.weight"}
            for name, whole in tensors.items() if isinstance(tensors, Mapping) else tensors:
                if name not in shapes and name not in ("lm_head.weight", "score.weight") and "inv_freq" not in name:
                    raise ValueError(f"{name} is no tensor of this model; is it of another one?")
                if name in shapes and tuple(whole.shape) != shapes[name]:
                    raise ValueError(f"{name} is {tuple(whole.shape)}, and the model wants {shapes[name]}")
                seen.add(name)
                if copying and name in self.mine:
                    (spec, share), mine = self.mine[name], isinstance(whole, Tensor)
                    share.copy_(spec.take(whole if mine else torch.tensor(whole), self.mesh.tp_rank))
            if missing := sorted(self.mine.keys() - seen):
                raise ValueError(f"{missing[0]} is missing, and {len(missing) - 1} others of {len(self.mine)}")
        for bucket in self.buckets:
            if bucket.master is not None:   # AdamW steps from what was loaded
                bucket.master.copy_(bucket.flat[bucket.shard])

    @torch.no_grad()
    def hf_tensors(self, shards: list[Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of the whole model, on every rank: all of a pp x tp group have to ask. What
        is whole here already is given as it is: clone what you keep. Given what a dp rank has for the shard of each
        bucket (moments, gradients), the same of that; then all ranks have to ask."""
        mine = {name: share for name, (_, share) in self.mine.items()}
        for bucket, shard in zip(self.buckets, shards or ()):
            flat = shard
            if self.mesh.dp > 1:
                flat = shard.new_empty(len(bucket.flat))
                bucket.gather(flat, shard).wait()
            mine |= {spec.name: flat[start:stop].view(spec.share) for spec, start, stop in bucket.layout}
        for spec in self.specs:
            whole = mine.get(spec.name)
            if whole is not None and spec.shards > 1:
                shares = self.tp.all_gather(whole[None])[::spec.copies]
                whole = torch.cat(list(shares), spec.axis).narrow(spec.axis, 0, spec.shape[spec.axis])
            if self.mesh.pp > 1:
                owner = self.stage_of(spec.layer) % self.mesh.pp
                whole = whole.contiguous() if owner == self.mesh.pp_rank else torch.empty(
                    spec.shape, dtype=shards[0].dtype if shards else self.dtype, device=self.device)
                dist.broadcast(whole, group=self.mesh.pp_group, group_src=owner)
            yield spec.name, whole

    def save_pretrained(self, folder: str | Path) -> None:
        """A Hugging Face directory, with the small files of the one that the model came from; all ranks call this."""
        tensors, shapes = (whole for _, whole in self.hf_tensors()), {spec.name: spec.shape for spec in self.specs}
        files = {"config.json": self.config.to_json()} | self.files
        _together(self.mesh, lambda: None if self.mesh.rank else
                  write_folder(Path(folder), shapes, self.dtype, tensors, files), tensors)

# --- the pipeline: lists of operations, and one loop that does them --------------------------------------------------

# 1f1b, 3 stages, 5 micro-batches: a forward takes one slot and a backward, <>, two. Stages wait only at the ends, for
# (p - 1) / (m + p - 1) of the time, and stage s holds the activations of p - s micro-batches, however many there are.
#
#     stage 0   0 1 2         <0> 3 <1> 4 <2>   <3>   <4>
#     stage 1     0 1     <0> 2 <1> 3 <2> 4 <3>   <4>
#     stage 2       0 <0> 1 <1> 2 <2> 3 <3> 4 <4>

def program(schedule: str, pp: int, rank: int, chunks: int, micro: int, backward: bool = True) -> list[tuple]:
    """What a rank does, in order: ("F" or "B", chunk, micro-batch). Forward goes round the chunks with groups of pp
    micro-batches (or some more, if pp does not divide them), backward the other way round. Schedules differ only in how
    far forward is ahead of backward."""
    groups = max(1, micro // pp)
    cuts, widest = [micro * i // groups for i in range(groups + 1)], max(pp, -(-micro // groups))
    ahead = {"afab": chunks * micro, "1f1b": (pp - rank - 1) * (1 if chunks == 1 else 2) + (chunks - 1) * widest}
    if schedule not in ahead:
        raise ValueError(f"unknown schedule {schedule}; choose from {', '.join(ahead)}")
    there = [("F", chunk, m) for first, last in zip(cuts, cuts[1:]) for chunk in range(chunks)
             for m in range(first, last)]
    back = [("B", chunks - 1 - chunk, m) for _, chunk, m in there] if backward else []
    ahead = min(ahead[schedule], len(there)) if backward else len(there)
    steady = [x for pair in zip(there[ahead:], back) for x in pair]
    return there[:ahead] + steady + back[len(there) - ahead:]

def pipeline(mesh: Mesh, todo: list[tuple], stages: int, forward: Callable, backward: Callable,
             blank: Callable) -> None:
    """Do a rank's program. forward(chunk, m, x) gives y, backward(chunk, m, dy) gives dx; x of the first stage and dy
    of the last are None. blank(m): a tensor to receive either. A message waits for nobody, and only the operation that
    needs it waits for a message. Nothing can hang, as messages of one kind in one direction have a link of their own,
    where both ends want them in the same order (on one for all, NCCL would queue them up behind each other)."""
    rank, kept, sent = mesh.pp_rank, {}, []

    def message(do: Callable, x: Tensor, kind: str, source: int, to: int):
        link = mesh.links[kind, source, to]
        return dist.batch_isend_irecv([dist.P2POp(do, x, group=link, group_peer=1 - dist.get_rank(link))])[0]

    for kind, chunk, m in todo:
        stage = chunk * mesh.pp + rank
        source, to = (stage - 1, stage + 1) if kind == "F" else (stage + 1, stage - 1)
        x = kept.pop((kind, stage, m), None)
        if 0 <= source < stages and x is None:
            x = blank(m)
            message(dist.irecv, x, kind, source % mesh.pp, rank).wait()
        y = (forward if kind == "F" else backward)(chunk, m, x)
        sent = [(y, work) for y, work in sent if not work.is_completed()]       # a tensor lives until it is sent
        if 0 <= to < stages and mesh.pp > 1:
            sent.append((y, message(dist.isend, y, kind, rank, to % mesh.pp)))
        elif 0 <= to < stages:
            kept[kind, to, m] = y           # both stages are here
    for _, work in sent:
        work.wait()

def _moved(x, device: torch.device):
    """To the GPU from pinned memory, so that nobody waits for it."""
    if not isinstance(x, Tensor) or x.device == device:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

def run(model: Qwen3, batches: list[dict], loss: Callable, schedule: str = "1f1b", backward: bool = True) -> list:
    """Forward and backward over micro-batches, through all stages. A batch has tokens, positions, cu_seqlens, and what
    loss(model, hidden, batch) -> (scalar, results) wants; scalars are sums, divided by global counts already, as
    gradients are summed over micro-batches and dp. Returns the results, at the last stage. Gradients start from zero,
    and then wait for AdamW.step."""
    rank, pp, live, results, prepared = model.mesh.pp_rank, model.mesh.pp, {}, [], []
    for batch in batches:
        ends, tokens = batch["cu_seqlens"], len(batch["tokens"])
        if not isinstance(ends, Tensor) or ends.dim() != 1 or len(ends) < 2:
            raise ValueError(f"cu_seqlens is {ends}; it has to be a tensor [0, ..., {tokens}] of where documents end")
        edges = [] if ends.is_cuda else ends.tolist()                       # best on the CPU: nobody waits for it
        if [0, *edges, tokens] != sorted([0, *edges, tokens]):
            raise ValueError(f"cu_seqlens {edges} must go up, from 0 at the least to at most the {tokens} tokens")
        longest, covered = batch.get("max_seqlen") or int(ends.diff().max()), edges[:1] + edges[-1:] == [0, tokens]
        if longest > model.config.max_position_embeddings:
            raise ValueError(f"a document has {longest} tokens, and the model {model.config.max_position_embeddings} "
                             "positions; cut it, or leave it out")
        for key, end in (("tokens", model.config.vocab_size), ("positions", model.config.max_position_embeddings)):
            x = batch[key]                  # on a GPU this would wait for it
            if not x.is_cuda and len(x) and not 0 <= x.min() <= x.max() < end:
                raise ValueError(f"{key} go from {x.min()} to {x.max()}, and those of the model from 0 to {end - 1}")
        batch = {key: _moved(x, model.device) for key, x in batch.items()}
        prepared.append((batch, packed(batch["cu_seqlens"], longest, covered)))
    if backward:
        model.zero_grad()

    def do_forward(chunk: int, m: int, x: Tensor | None) -> Tensor:
        batch, attend = prepared[m]
        x = x.requires_grad_() if x is not None and backward else x
        with torch.set_grad_enabled(backward):
            y = model(batch["tokens"], batch["positions"], attend, x, chunk)
            if chunk * pp + rank == model.stages - 1:
                y, found = loss(model, y, batch)
                results.append(found)
        if backward:
            live[chunk, m] = x, y
        return None if y is None else y.detach()

    def do_backward(chunk: int, m: int, dy: Tensor | None) -> Tensor | None:
        x, y = live.pop((chunk, m))
        for bucket in model.buckets if m == len(batches) - 1 and model.mesh.dp > 1 else ():
            if bucket.chunk == chunk:       # what lands now is complete
                bucket.waiting = set(bucket.params)
        if y.requires_grad:                 # or the loss is a constant, as no token of this micro-batch counts
            with torch.autograd.set_multithreading_enabled(False):      # a thread of its own costs 7% of the launches
                torch.autograd.backward(y, dy)
            collect(p for bucket in model.buckets if bucket.chunk == chunk for p in bucket.params)
        return None if x is None else torch.zeros_like(x) if x.grad is None else x.grad

    def blank(m: int) -> Tensor:
        tokens, ranks = len(prepared[m][0]["tokens"]), model.tp.size if model.tp.sequence else 1
        return torch.empty(-(-tokens // ranks), model.config.hidden_size, dtype=model.dtype, device=model.device)

    todo = program(schedule, pp, rank, model.chunks, len(batches), backward)
    pipeline(model.mesh, todo, model.stages, do_forward, do_backward, blank)
    if backward:
        model.finish_gradients()
    return results

# --- the optimizer: AdamW, each dp rank on its shard -----------------------------------------------------------------

def _check_settings(**settings: float) -> None:
    for name, value in settings.items():
        end = 1 if "beta" in name else math.inf
        if not 0 <= value < end:            # nor NaN
            raise ValueError(f"{name} is {value}; choose 0 <= {name} < {end}")

class AdamW:
    """ZeRO-1 (arXiv 1910.02054): fp32 parameters, both moments and the work are split over dp. Stage 2 would drop
    bucket.total after its reduce, and stage 3 bucket.flat after its use: they stay, as 8 GPUs have room for them, and
    making them anew would cost a reduce or a gather a micro-batch."""
    def __init__(self, model: Qwen3, lr: float = 1e-5, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.0, clip: float | None = None):
        _check_settings(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}; choose a norm above 0, or None to clip nothing")
        self.model, self.lr, self.clip, self.steps, self.state = model, lr, clip, 0, []
        self.settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.zero_grad = model.zero_grad
        model.zero_grad()
        for bucket in model.buckets:        # in fp32 (and fp64) the parameters are their own master
            master = bucket.master = bucket.flat[bucket.shard].to(bucket.total.dtype)
            self.state.append({"param": master} | {x: torch.zeros_like(master) for x in ("exp_avg", "exp_avg_sq")})

    @torch.no_grad()
    def step(self, lr: float | None = None) -> Tensor:
        """Returns the norm of the gradients before clipping, on the GPU, so that nothing here waits for it: float(norm)
        does. If it is not finite nothing is changed (but the count of steps)."""
        lr = self.lr if lr is None else lr
        _check_settings(lr=lr)
        self.model.finish_gradients()
        self.steps += 1
        norm, limit, works = self.grad_norm(), math.inf if self.clip is None else self.clip, []
        scale = torch.where(norm.isfinite(), (limit / (norm + 1e-6)).clamp(max=1), math.nan)    # NaN: steps do nothing
        for bucket, state in zip(self.model.buckets, self.state):
            adamw_step(bucket.flat[bucket.shard], *state.values(), bucket.shard_total, self.steps, lr,
                       grad_scale=scale, **self.settings)
            if bucket.mesh.dp > 1:
                works.append(bucket.gather(bucket.flat, bucket.flat[bucket.shard]))     # while the next is stepped
        for work in works:
            work.wait()
        return norm

    def grad_norm(self) -> Tensor:
        """Each parameter counts once: not its copies on other tp ranks, nor the second of tied embeddings."""
        mesh, model = self.model.mesh, self.model
        parts = [torch.zeros(1, device=model.device)]
        parts += [bucket.shard_total[where] for bucket in model.buckets for spec, _, where in bucket.pieces()
                  if mesh.tp_rank % spec.copies == 0 and not (bucket.tied and mesh.pp_rank)]
        total = torch.stack([norm.double() for norm in torch._foreach_norm(parts)]).square().sum()
        if mesh.size > 1:
            dist.all_reduce(total)
        return total.sqrt().to(parts[-1].dtype)

# --- files: Hugging Face's, and checkpoints from any layout to any other ---------------------------------------------

def write_safetensors(path: Path, shapes: dict[str, tuple], dtype: torch.dtype, tensors: Iterable[Tensor],
                      metadata: dict[str, str]) -> None:
    """Hugging Face's format: the header's length, the header, then the tensors, which are asked for one by one."""
    kind = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    header, end = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(memoryview(tensor.to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()))
    _sync(path)

def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

def open_safetensors(path: Path):
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; copy the whole folder again") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or is cut off ({error}); copy it again") from None

def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of model.safetensors, or of the files that its index names."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists() and not (folder / "model.safetensors").exists():      # both: the index is of an older model
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for file in [open_safetensors(folder / name) for name in names]:
        yield from ((name, file.get_tensor(name)) for name in file.keys())

def write_folder(folder: Path, shapes: dict[str, tuple], dtype: torch.dtype, tensors: Iterable[Tensor],
                 files: dict[str, bytes]) -> None:
    """A Hugging Face directory; the weights get their name when they are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    write_safetensors(folder / "model.safetensors.new", shapes, dtype, tensors, {"format": "pt"})
    (folder / "model.safetensors.new").rename(folder / "model.safetensors")

def small_files(folder: Path) -> dict[str, bytes]:
    """config.json, tokenizer, chat template: what goes along with the weights."""
    return {x.name: x.read_bytes() for x in sorted(folder.iterdir()) if x.suffix in (".json", ".jinja", ".txt")
            and x.name not in ("model.safetensors.index.json", "checkpoint.json")}

CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

def tiny_model(folder: str | Path, seed: int = 0, **overrides) -> Path:
    """A model directory like any other, of a random Qwen3 with 0.8 M parameters that reads and writes bytes: 256 of
    them, and Qwen's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    sizes = dict(vocab_size=len(words), hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=258,
                 pad_token_id=256)
    Qwen3(Config(**sizes | overrides), dtype=torch.float32, device="cpu", seed=seed).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=words[256], eos_token=words[258],
                            additional_special_tokens=[words[257]], clean_up_tokenization_spaces=False,
                            chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return Path(folder)

# In a checkpoint there are whole tensors by their Hugging Face names, in fp32: parameters, and both moments. They are
# put together from all ranks one by one, and dealt out to the files of all ranks. So reading one does not depend on the
# layout that wrote it.

def _beside(folder: Path) -> tuple[Path, Path]:
    folder = folder.resolve()               # a link stays where it is, and its folder is replaced
    return folder.parent / f".{folder.name}.new", folder.parent / f".{folder.name}.old"

def save(folder: str | Path, model: Qwen3, optimizer: AdamW | None = None, state: dict | None = None) -> Path:
    """Write a checkpoint; all ranks call this. `state` is rank 0's: numbers, strings, lists, dicts and tensors. It
    appears whole or not at all; if it replaces another of that name, that one is there until this one is."""
    mesh, given, folder = model.mesh, Path(folder), Path(folder).resolve()
    taken = folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not (folder / "checkpoint.json").exists()
    if taken or folder == Path.cwd():
        raise ValueError(f"{folder} is something else than a checkpoint or the working directory; save to a new folder")
    new, old = _beside(folder)
    states = optimizer.state if optimizer else [{"param": bucket.flat[bucket.shard]} for bucket in model.buckets]
    kinds, dtype = {kind: [state[kind] for state in states] for kind in states[0]}, states[0]["param"].dtype
    shapes = {f"{kind}/{spec.name}": spec.shape for kind in kinds for spec in model.specs[mesh.rank::mesh.size]}
    tensors = (whole for shards in kinds.values()
               for _, whole in islice(model.hf_tensors(shards), mesh.rank, None, mesh.size))

    def begin():
        if not folder.exists() and (found := latest(folder)):
            found.rename(folder)            # what a save before was killed at
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)
        new.mkdir(parents=True)
        try:                                # what load would refuse is refused now
            torch.save(state or {}, new / "state.pt")
            torch.load(new / "state.pt", weights_only=True)
        except (pickle.PickleError, AttributeError, TypeError):     # of functions, with or without a name, and locks
            raise ValueError("state may hold numbers, strings, lists, dicts and tensors, nothing of numpy's") from None
        return time.time_ns()

    def finish():
        about = {"saved": saved, "steps": optimizer.steps if optimizer else None, "dtype": str(model.dtype)[6:],
                 "dp": mesh.dp, "pp": mesh.pp, "tp": mesh.tp}
        for name, content in ({"config.json": model.config.to_json()} | model.files).items():
            (new / name).write_bytes(content)
        (new / "checkpoint.json").write_text(json.dumps(about))
        for path in (*new.iterdir(), new):
            _sync(path)
        if folder.exists():
            folder.rename(old)              # killed here, `latest` finds both of them
        new.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    try:
        saved = _together(mesh, lambda: begin() if mesh.rank == 0 else None)[0]
        _together(mesh, lambda: write_safetensors(new / f"rank-{mesh.rank:05d}.safetensors", shapes, dtype, tensors,
                                                  {"saved": str(saved)}), tensors)
        _together(mesh, lambda: finish() if mesh.rank == 0 else None)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return given

class Checkpoint:
    """What is in a folder: `about` it, and in which of its files each tensor is, by kind/name."""
    def __init__(self, folder: Path):
        self.folder, self.where = folder, {}
        try:
            self.about = about = json.loads((folder / "checkpoint.json").read_text())
            saved, ranks = str(about["saved"]), range(about["dp"] * about["pp"] * about["tp"])
        except (OSError, ValueError, KeyError, TypeError):
            raise FileNotFoundError(f"there is no whole checkpoint in {folder}") from None
        for rank in ranks:
            path = folder / f"rank-{rank:05d}.safetensors"
            file = open_safetensors(path)
            if (file.metadata() or {}).get("saved") != saved:
                raise ValueError(f"{path} is of another checkpoint; copy the whole folder again")
            self.where |= {key: (path, tuple(file.get_slice(key).get_shape())) for key in file.keys()}

    def read(self, key: str) -> Tensor:
        return open_safetensors(self.where[key][0]).get_tensor(key)

def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint: the folder itself, or in it, or what a kill within save left beside it."""
    folder, found = Path(folder), []
    for path in (folder, *_beside(folder), *(folder.iterdir() if folder.is_dir() else ())):
        try:
            found.append((Checkpoint(path).about["saved"], path))
        except (OSError, ValueError):
            pass
    return max(found)[1] if found else None

def _open(folder: str | Path) -> Checkpoint:
    folder = Path(folder)
    return Checkpoint(folder if (folder / "checkpoint.json").exists() else latest(folder) or folder)

@torch.no_grad()
def load(folder: str | Path, model: Qwen3, optimizer: AdamW | None = None) -> dict:
    """Read a checkpoint, or the newest in a folder of them, onto any layout. Returns the state."""
    checkpoint, rank = _open(folder), model.mesh.tp_rank
    for name, (spec, _) in model.mine.items():
        for key in [f"param/{name}", f"exp_avg/{name}"][:2 if optimizer else 1]:
            if checkpoint.where.get(key, (None, None))[1] != spec.shape:
                raise ValueError(f"{checkpoint.folder} has no {key} of shape {spec.shape}; load it into the model that "
                                 "it was saved from, with AdamW only if that was saved")
    model.load_hf((name, checkpoint.read(f"param/{name}")) for name in model.mine)
    for bucket, state in zip(model.buckets, optimizer.state if optimizer else ()):
        for kind, flat in state.items():
            for spec, first, where in bucket.pieces():
                share = spec.take(checkpoint.read(f"{kind}/{spec.name}"), rank).reshape(-1)
                flat[where] = share[first:first + where.stop - where.start]
    if optimizer:
        optimizer.steps = checkpoint.about["steps"]
    model.files = model.files or small_files(checkpoint.folder)
    return torch.load(checkpoint.folder / "state.pt", weights_only=True)

def merge(folder: str | Path, out: str | Path) -> Path:
    """A Hugging Face directory from a checkpoint, tensor by tensor, so in the memory of the largest."""
    checkpoint = _open(folder)
    keys = sorted(key for key in checkpoint.where if key.startswith("param/"))
    write_folder(Path(out), {key[6:]: checkpoint.where[key][1] for key in keys},
                 getattr(torch, checkpoint.about["dtype"]), map(checkpoint.read, keys), small_files(checkpoint.folder))
    return Path(out)

# --- the demo: any layout against one process; and on a GPU, the speed -----------------------------------------------

@dataclass
class Settings:
    dp: int | None = None                   # None: what is left of the processes
    pp: int = 1
    tp: int = 1
    chunks: int = 1                         # stages a process; more than one: an interleaved pipeline
    schedule: Literal["1f1b", "afab"] = "1f1b"      # or afab: all forward, then all backward
    recompute: bool = False                 # keep only the inputs of layers, and run each again for its backward
    device: str | None = None               # None: cuda where there is one
    bench: bool = False                     # the speed alone

MICRO = 8                                   # micro-batches a step of the demo
STEP = 131_072                              # tokens a step of the benchmark, on each replica

def pack(documents: list[list[int]], count: int) -> dict:
    """A micro-batch; the last token of a document has nothing to predict. count: the tokens, of all ranks and all
    micro-batches, that have."""
    lengths = [len(x) for x in documents]
    return {"tokens": torch.tensor(sum(documents, [])), "positions": torch.cat([torch.arange(n) for n in lengths]),
            "targets": torch.tensor([t for x in documents for t in (*x[1:], -100)]),
            "cu_seqlens": F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), "count": count}

def loss(model: Qwen3, hidden: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
    """At the last stage, of each micro-batch: a scalar, and what run is to return."""
    logprob, entropy = model.logprobs(hidden, batch["targets"])         # [tokens] each
    total = -logprob.sum() / batch["count"]
    return total, total.detach()

def train(folder: Path, mesh: Mesh, settings: Settings, batches: list[dict]) -> tuple[Qwen3, AdamW, list[float]]:
    """Some steps, and the loss of each."""
    model = Qwen3.from_pretrained(folder, mesh, dtype=torch.float64 if mesh.device.type == "cpu" else torch.bfloat16,
                                  chunks=settings.chunks, recompute=settings.recompute)
    optimizer, losses = AdamW(model, lr=3e-3, clip=1.0), []
    for _ in range(15):
        results = run(model, batches[mesh.dp_rank::mesh.dp], loss, settings.schedule)
        losses.append(sum(_together(mesh, partial(float, sum(results) / mesh.tp))))     # tp: all have the same
        optimizer.step()
    return model, optimizer, losses

def demo(mesh: Mesh, settings: Settings) -> None:
    """A tiny model learns to count, on the mesh and alone; then its checkpoint goes to transformers."""
    from transformers import AutoModelForCausalLM
    folder = _together(mesh, lambda: tiny_model(Path(tempfile.mkdtemp(), "tiny")) if mesh.rank == 0 else None)[0]
    documents = [[(7 * d + 3 * i) % 256 for i in range(40 + d)] for d in range(2 * MICRO)]
    batches = [pack(documents[i::MICRO], sum(map(len, documents)) - len(documents)) for i in range(MICRO)]
    model, optimizer, losses = train(folder, mesh, settings, batches)
    checkpoint = save(folder.with_name("checkpoint"), model, optimizer)
    if mesh.rank == 0:
        alone, _, wanted = train(folder, Mesh(device=mesh.device), settings, batches)
        ours, = run(alone, [pack(documents[:1], len(documents[0]) - 1)], loss, backward=False)
        theirs = AutoModelForCausalLM.from_pretrained(merge(checkpoint, folder.with_name("merged"))).to(mesh.device)
        inputs = torch.tensor(documents[:1], device=mesh.device)
        errors = max(abs(a - b) for a, b in zip(losses, wanted)), abs(theirs(inputs, labels=inputs).loss - ours).item()
        print(f"dp {mesh.dp} x pp {mesh.pp} x tp {mesh.tp} on {mesh.device.type}: loss {losses[0]:.3f} -> "
              f"{losses[-1]:.3f}; the largest difference to one process {errors[0]:.1e}, of the merged checkpoint in "
              f"transformers {errors[1]:.1e}")
        if not (max(errors) < (1e-5 if mesh.device.type == "cpu" else 0.05) and losses[-1] < 0.8 * losses[0]):
            sys.exit("these should be equal, and the loss should fall")
        shutil.rmtree(folder.parent)
    _together(mesh, lambda: None)

def training_flops(config: Config, lengths: Iterable[int]) -> float:
    """Forward and backward over documents of these lengths: 6 a parameter and token, and causal attention."""
    dense = 6 * sum(math.prod(spec.shape) for spec in table(config))
    pairs = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return float(sum(dense * n + pairs * n * n for n in lengths))

def our_step(mesh: Mesh, settings: Settings, documents: Tensor) -> Callable:
    model = Qwen3(Config(), mesh, chunks=settings.chunks, recompute=settings.recompute)
    batches = [pack(documents.tolist(), documents.numel())] * (STEP // documents.numel())
    optimizer = AdamW(model, clip=1.0)
    return lambda: (run(model, batches, loss, settings.schedule), optimizer.step())

def their_step(mesh: Mesh, settings: Settings, documents: Tensor) -> Callable:
    """transformers on the same documents: all are of one length, so it needs neither padding nor packing."""
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(**json.loads(Config().to_json()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").to(mesh.device)
    optimizer, inputs = torch.optim.AdamW(model.parameters(), fused=True), documents.to(mesh.device)
    def step():
        for _ in range(STEP // documents.numel()):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                (model(inputs, labels=inputs, use_cache=False).loss * documents.numel() / STEP).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step

def benchmark(mesh: Mesh, settings: Settings) -> None:
    """Qwen3-0.6B with random weights on documents of 1024 tokens; on one GPU, transformers beside it. MFU is the share
    of an H200's 989 TFLOP/s; idle, that of the time in which no kernel runs."""
    for tokens, make in [(8192, our_step), (16_384, our_step), (8192, their_step)][:3 if mesh.size == 1 else 2]:
        step = make(mesh, settings, torch.arange(tokens).view(-1, 1024))        # which words these are does not matter
        torch.cuda.reset_peak_memory_stats()
        for count in (2, 5):                # first to compile; then, as in training, no step waits for another
            start = time.perf_counter()
            for _ in range(count):
                step()
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - start) / count
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            step()
        events = profile.key_averages()
        busy = sum(event.self_device_time_total for event in events) / 1e6
        mfu = training_flops(Config(), [1024] * (STEP * mesh.dp // 1024)) / mesh.size / seconds / 989e12
        if mesh.rank == 0:
            print(f"{make.__name__}, micro-batches of {tokens} tokens: {seconds * 1e3:.0f} ms, "
                  f"{STEP * mesh.dp / seconds:.0f} tokens/s, {mfu:.1%} MFU, {max(0, 1 - busy / seconds):.0%} idle, "
                  f"{torch.cuda.max_memory_allocated() / 2**30:.0f} GiB")
            print(events.table(sort_by="self_device_time_total", row_limit=16), flush=True)
        del step
        gc.collect()                        # parameters and buckets refer to each other

def main() -> None:
    if sys.argv[1:2] == ["merge"]:
        if len(sys.argv) != 4:
            sys.exit("usage: python parallel.py merge CHECKPOINT OUT")
        return print(merge(*sys.argv[2:]))
    from transformers import HfArgumentParser
    settings = Settings(**vars(HfArgumentParser(Settings).parse_args()))
    mesh = init(settings.dp, settings.pp, settings.tp, settings.device)
    if settings.bench and mesh.device.type != "cuda":
        sys.exit("--bench needs a GPU, and there is none; without it comes the demo")
    if not settings.bench:
        demo(mesh, settings)
    if mesh.device.type == "cuda":
        benchmark(mesh, settings)
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
