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
        logprob, entropy = model.logprobs(hidden[batch["predict"]], batch["targets"])
        return -logprob.sum() / batch["count"], logprob.detach().sum()
    for step in range(steps):
        bins = pack(lengths, 8192, mesh.dp)[mesh.dp_rank::mesh.dp]      # which documents go into which micro-batch
        batches = [micro_batch([documents[i] for i in some]) | {"count": count} for some in bins]
        results = run(model, batches, loss)                             # count: of all ranks and all micro-batches
        norm = optimizer.step()
    save("out/last", model, optimizer, {"step": step})                  # load(...) takes it to any other layout

    python parallel.py                                       the demo; with --bench, on a GPU, the speed of Qwen3-0.6B
    torchrun --nproc-per-node 4 parallel.py --tp 2 --pp 2    the demo on four processes, each on a CPU or a GPU
    python parallel.py merge CHECKPOINT OUT                  a checkpoint as a Hugging Face directory

Left out: interleaved stages, ZeRO-2 and 3 (a reduce or a gather more for each micro-batch), context parallelism,
experts, more tp ranks than key heads.
"""
import contextlib, copy, difflib, gc, inspect, itertools
import json, math, os, re, shutil, sys, time, zlib
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import flash_attention, linear_cross_entropy, qkv_rotary, rms_norm, swiglu

# --- what every program shares: its settings, and the user's mistakes ------------------------------------------------

def refuse(message):
    """One line, and exit code 2, from rank 0 for all: its end ends the others, who wait. One alone tells by itself."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)
    line = " ".join(str(message).split())
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)

@contextlib.contextmanager
def mistakes():
    """Around a program's main: what the user has to mend comes as one line, without a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        refuse(getattr(error, "cause", None) or error)      # an actor's error tells its traceback, too

def arguments(kind, args=None):
    """An object of this dataclass, from flags. --help shows the comment beside each field, and its default."""
    from transformers import HfArgumentParser
    names = [one.name for one in fields(kind)]
    for one in fields(kind):
        comment = re.search(rf"^ +{one.name}: .*?  # +(.*)", inspect.getsource(kind), re.MULTILINE)
        one.metadata = {"help": comment[1].replace("%", "%%") if comment else " "}
    parser = HfArgumentParser(kind, allow_abbrev=False)
    parser.error = refuse
    found, unknown = parser.parse_known_args(args)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag.lstrip("-"), names, 1)
        advice = f"did you mean --{near[0]}?" if near else "--help shows what there is"
        refuse(f"there is no {flag}; {advice}")
    return kind(**vars(found))

# --- micro-batches: documents side by side ---------------------------------------------------------------------------

def pack(lengths, capacity, multiple=1):
    """Which rows go into which micro-batch: as few as will do (a multiple of `multiple`, as many for each rank), each
    of at most `capacity` tokens. Longest first, always into the emptiest: all get about the same number of tokens."""
    lengths = np.asarray(lengths, np.int64)
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"a row of {longest:,} tokens does not fit into micro-batches of {capacity:,}; make them "
                         "larger, or leave it out")
    least = math.ceil(lengths.sum() / (capacity * multiple)) * multiple
    for count in itertools.count(max(least, multiple), multiple):
        loads = np.zeros(count, np.int64)
        bins = [[] for _ in range(count)]
        for row in np.argsort(-lengths, kind="stable").tolist():
            emptiest = loads.argmin()
            loads[emptiest] += lengths[row]
            bins[emptiest].append(row)
        if loads.max() <= capacity:
            return bins

def micro_batch(documents, learned=None):
    """Documents (token ids) side by side, without padding, as `run` takes them. learned: a mask for each, of the tokens
    that are learned; never the first, which nothing precedes. A token is predicted from the hidden state before it, and
    the head is applied there alone: `predict` are those places, and `targets` what comes next. Without documents it is
    one token of which nothing is learned, for a rank that has nothing to do."""
    if not len(documents):
        documents, learned = [np.zeros(1)], None
    lengths = [len(document) for document in documents]
    tokens = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    positions = torch.cat([torch.arange(length) for length in lengths])
    mask = positions > 0
    if learned is not None:
        mask &= torch.from_numpy(np.concatenate(learned).astype(bool))
    predict = mask.nonzero()[:, 0] - 1
    return {
        "tokens": tokens, "positions": positions,
        "cu_seqlens": F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(),     # where documents begin, and the end
        "max_seqlen": max(lengths),
        "predict": predict, "targets": tokens[predict + 1],
    }

# --- the model's settings --------------------------------------------------------------------------------------------

QWEN3_600M = dict(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                  num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960,
                  rope_theta=1e6, tie_word_embeddings=True)

class Config:
    """transformers' own config object, of a Qwen3, Qwen2 or Llama; by default with the numbers of Qwen3-0.6B."""
    def __new__(cls, model_type="qwen3", **settings):
        from transformers import AutoConfig
        return understood(AutoConfig.for_model(model_type, **QWEN3_600M | settings))

    @classmethod
    def from_pretrained(cls, model):
        from transformers import AutoConfig
        return understood(AutoConfig.from_pretrained(local_folder(model)))

def understood(config):
    """Refuse, by name, what this model has not."""
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    found = config.to_dict() | {"rope_type": config.rope_parameters["rope_type"]}
    known = {"model_type": ("qwen3", "qwen2", "llama"), "rope_type": ("default", "llama3"), "hidden_act": ("silu",),
             "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,)}      # by default
    for name, values in known.items():
        if found.get(name, values[0]) not in values:
            raise ValueError(f"{name} = {found[name]} is not known here, but {' and '.join(map(str, values))}")
    return config

def local_folder(model):
    """A model directory, fetched from the hub where the name is not that of a folder."""
    from huggingface_hub import snapshot_download
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
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
    dp_group: object = None                 # the ranks that differ from this one in dp alone; None: no others
    tp_group: object = None
    pp_group: object = None                 # for messages from stage to stage; those on the way back have a link of
    pp_back_group: object = None            # their own: on one for both, NCCL would queue them up
    pp_ends_group: object = None            # the first and the last stage, which share tied embeddings

    def __post_init__(self):
        self.device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.size = self.dp * self.pp * self.tp
        self.dp_rank = self.rank // (self.pp * self.tp)
        self.pp_rank = self.rank // self.tp % self.pp
        self.tp_rank = self.rank % self.tp

    def wait(self):
        """For all ranks."""
        if self.size > 1:
            dist.barrier()

def init(dp=None, pp=1, tp=1, device=None):
    """This process' place, from torchrun's environment (without it, a process alone); dp=None takes what is left."""
    device = Mesh(device=device).device
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    dp = dp or world // (pp * tp)
    if dp * pp * tp != world:
        raise ValueError(f"dp x pp x tp = {dp} x {pp} x {tp} does not make {world} processes; choose other factors, "
                         "or start as many with torchrun --nproc-per-node")
    mesh = Mesh(dp, pp, tp, rank, device)

    def meet(ranks):
        """The group of this rank's row; they meet at once, so that later nobody waits for another."""
        if ranks.shape[-1] == 1:
            return None
        group, _ = dist.new_subgroups_by_enumeration(ranks.flatten(0, 1).tolist())
        if group is not None:
            dist.all_reduce(torch.zeros(1, device=device), group=group)
        return group

    ranks = torch.arange(world).view(dp, pp, tp)
    stages = ranks.movedim(1, -1)
    mesh.dp_group = meet(ranks.movedim(0, -1))
    mesh.tp_group = meet(ranks)
    mesh.pp_group = meet(stages)
    mesh.pp_back_group = meet(stages)
    mesh.pp_ends_group = mesh.pp_group if pp < 3 else meet(stages[..., [0, -1]])
    return mesh

# --- the table: where each tensor of a Hugging Face model lies -------------------------------------------------------

OURS = {"embed_tokens": "embed", "input_layernorm": "input_norm", "post_attention_layernorm": "mlp_norm",
        "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "out",
        "gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down", "lm_head": "head_weight"}

@dataclass(frozen=True)
class Spec:
    name: str                               # Hugging Face's
    ours: str                               # the parameter that it is a part of, as some of its rows
    layer: int                              # -1: the words, before the layers; after them come the norm, and the head
    shape: tuple[int, ...]
    share: tuple[int, ...]                  # what a tp rank has of it
    axis: int | None                        # that tp splits; None: each rank has all of it
    small: bool                             # norms, biases, a critic's head: kept in fp32, and not decayed
    partial: bool                           # whether tp ranks have to add up their gradients

def table(config, tp=1, value_head=False, sequence=False):
    """All tensors of the model, by name; transformers knows which there are. Everything else goes by it."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    shapes = {name: p.shape for name, p in theirs.named_parameters()}
    if value_head or config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    if value_head:
        shapes["score.weight"] = torch.Size([1, config.hidden_size])
    specs = {}
    for name, shape in shapes.items():
        *path, module, kind = name.split(".")               # model.layers.7.self_attn.q_proj.weight
        ours = OURS.get(module, module)
        whole = "norm" in ours or ours == "score"
        axis = None if whole else int(ours in ("out", "down"))
        if kind == "bias":
            ours += "_bias"
        layer = -1 if ours == "embed" else config.num_hidden_layers
        if "layers" in path:
            layer = int(path[2])
        share = list(shape)
        if axis is not None:
            share[axis] //= tp
        small = whole or kind == "bias"
        own = ours in ("q_norm", "k_norm") or (sequence and "norm" in ours)     # of a rank's own heads, or tokens
        specs[name] = Spec(name, ours, layer, shape, tuple(share), axis, small, own and tp > 1)
    return specs

def check_layout(config, mesh):
    """Refuse a layout that cannot be, with the choices that would do."""
    heads = config.num_attention_heads
    keys = config.num_key_value_heads
    most = math.gcd(heads, keys, config.intermediate_size, config.vocab_size)
    if most % mesh.tp:
        raise ValueError(f"{heads} attention heads, {keys} key heads, {config.intermediate_size} neurons and "
                         f"{config.vocab_size} words cannot be split over tp={mesh.tp}; choose a divisor of {most}")
    if mesh.pp > config.num_hidden_layers:
        raise ValueError(f"{config.num_hidden_layers} layers cannot fill pp={mesh.pp} stages; choose no more than that")

def sizes(config):
    """The numbers in the matrices of a layer, and in the head."""
    heads = config.num_attention_heads + config.num_key_value_heads
    layer = config.hidden_size * (2 * heads * config.head_dim + 3 * config.intermediate_size)
    return layer, config.hidden_size * config.vocab_size

def training_flops(config, lengths):
    """Forward and backward over documents of these lengths: 6 a number of a matrix and token, and causal attention.
    Embeddings are looked up, not multiplied with, unless they are the head, too."""
    layer, head = sizes(config)
    layers = config.num_hidden_layers
    pairs = layers * config.num_attention_heads * config.head_dim
    return float(sum(6 * n * (layers * layer + head + pairs * n) for n in lengths))

# --- tensor parallel: where the ranks of a layer meet ----------------------------------------------------------------

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor        # renamed in torch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

class TensorParallel:
    """Ranks add up what each has of the same tokens (Megatron, arXiv 1909.08053). With sequence parallel (arXiv
    2205.05198) a rank keeps only its rows of the sum: norms and residuals have 1 / tp of the tokens, which takes less
    memory and more time, as all rows are gathered before the next product."""
    def __init__(self, mesh, sequence):
        self.group = mesh.tp_group
        self.size = mesh.tp
        self.rank = mesh.tp_rank
        self.parts = mesh.tp if sequence else 1             # that tokens are split into

    def all_gather(self, x):
        out = x.new_empty(len(x) * self.size, *x.shape[1:])
        all_gather(out, x.contiguous(), group=self.group)
        return out

    def gather(self, x):
        return self.all_gather(x) if self.parts > 1 else x

    def sum(self, x, later=False):
        """The sum over ranks (or this rank's rows of it), and if it is for later, what to wait for."""
        if self.size == 1:
            return x, None
        if self.parts == 1:
            return x, dist.all_reduce(x, group=self.group, async_op=later)
        out = x.new_empty(len(x) // self.size, *x.shape[1:])
        return out, reduce_scatter(out, x, group=self.group, async_op=later)

class _Linear(torch.autograd.Function):
    """x @ weight', where a tp rank has some of the columns of the product, or some of the terms of its sums. Backward
    adds the gradient of the weight to `total` within the product, in fp32. Meanwhile ranks add up the gradient of x."""
    @staticmethod
    def forward(ctx, x, weight, tp, terms):
        if not terms:
            x = tp.gather(x)
        ctx.save_for_backward(x)
        ctx.weight = weight                 # the parameter itself: from a saved tensor, recompute makes an alias
        ctx.tp = tp
        ctx.terms = terms
        y = F.linear(x, weight)
        return tp.sum(y)[0] if terms else y

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        work = grad = None
        if ctx.terms:
            dy = ctx.tp.gather(dy)
        dx = dy @ ctx.weight
        if not ctx.terms:
            dx, work = ctx.tp.sum(dx, later=True)
        total = ctx.weight.total
        if total is None:                   # there is no optimizer yet
            grad = dy.T @ x
        elif x.is_cuda and x.dtype != total.dtype:
            torch.addmm(total, dy.T, x, out_dtype=total.dtype, out=total)
        else:
            total.addmm_(dy.T.to(total.dtype), x.to(total.dtype))
        if work:
            work.wait()
        return dx, grad, None, None

class _Conjugate(torch.autograd.Function):
    """x through `there`, and its gradient through `back`."""
    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad), None, None

# --- buckets: where parameters and gradients lie ---------------------------------------------------------------------

def widened(dtype):
    """What gradients are summed in: fp32, or fp64 where the model is in that."""
    return torch.promote_types(dtype, torch.float32)

class Bucket:
    """The matrices of a layer, or the words, or what is small, side by side in one flat tensor, and their gradients in
    another, in fp32: each reduced, stepped and gathered by one call. A dp rank owns a shard of both: it gets the sum of
    the gradients there, and steps the parameters there."""
    def __init__(self, model, specs):
        self.mesh = mesh = model.mesh
        self.specs = specs
        self.small = specs[0].small
        self.split = specs[0].axis is not None              # over tp; else each rank has the same
        self.others = mesh.tp_group if specs[0].partial else None       # with whom to add up gradients
        self.shared = False                                 # words of two stages
        self.total = self.shard_total = self.work = self.master = None
        self.sizes = [math.prod(spec.share) for spec in specs]
        numbers = sum(self.sizes)
        each = -(-numbers // (64 * mesh.dp)) * 64           # 128 bytes: what kernels like to begin at
        self.sizes.append(each * mesh.dp - numbers)
        dtype = widened(model.dtype) if self.small else model.dtype
        self.flat = torch.zeros(each * mesh.dp, dtype=dtype, device=model.device)
        self.shard = slice(each * mesh.dp_rank, each * (mesh.dp_rank + 1))
        self.params = []
        owners = {layer.index: layer for layer in model.layers}
        end = 0
        for (layer, ours), group in itertools.groupby(specs, lambda spec: (spec.layer, spec.ours)):
            shares = [spec.share for spec in group]         # query, key and value of one product
            start = end
            end += sum(map(math.prod, shares))
            p = nn.Parameter(self.flat[start:end].view(-1, *shares[0][1:]))
            p.bucket = self
            p.total = None
            setattr(owners.get(layer, model), ours, p)
            self.params.append(p)

    def zero(self):
        """From now on gradients gather in `total`."""
        if self.total is None:
            self.total = torch.zeros_like(self.flat, dtype=widened(self.flat.dtype))
            self.shard_total = self.total[self.shard]
            for p in self.params:
                p.total = self.total.as_strided(p.shape, p.stride(), p.storage_offset())
                p.register_post_accumulate_grad_hook(fold)
        self.total.zero_()
        self.work = None

    def reduce(self):
        if self.mesh.dp > 1 and self.work is None:
            group = self.mesh.dp_group
            self.work = reduce_scatter(self.shard_total, self.total, group=group, async_op=True)

    def gather(self, shard, flat=None):
        """All shards from their owners; this one may lie in its place already."""
        if self.mesh.dp == 1:
            return shard
        flat = shard.new_empty(len(self.flat)) if flat is None else flat
        all_gather(flat, shard, group=self.mesh.dp_group)
        return flat

def fold(p):
    """Where autograd has made a gradient (of norms and words) it moves into the total."""
    if p.grad is not None:
        p.total.add_(p.grad)
        p.grad = None

# --- the model -------------------------------------------------------------------------------------------------------

def add_norm(x, residual, weight, eps):
    """norm(x + residual), and the sum."""
    if residual is None:
        return rms_norm(x, weight, eps), x
    return rms_norm(x, weight, eps, residual)

class Layer(nn.Module):
    """A decoder layer: x + attention(norm(x)), then x + mlp(norm(x)), on this rank's heads and neurons."""
    def __init__(self, index, config, tp, rotary):
        super().__init__()
        self.index = index
        self.eps = config.rms_norm_eps
        self.tp = tp
        self.rotary = rotary
        self.heads = config.num_attention_heads // tp.size
        self.kv = config.num_key_value_heads // tp.size
        self.qkv_bias = self.q_norm = self.k_norm = None

    def forward(self, x, residual, positions, attend):
        """x and residual [rows, hidden], rows = tokens (or this rank's share of them): their sum is the input. The
        output, too, is in two parts, which the next norm adds on its way (residual None: x is all of it)."""
        x, residual = add_norm(x, residual, self.input_norm, self.eps)
        qkv = _Linear.apply(x, self.qkv, self.tp, False)                    # [tokens, (heads + 2 kv) * dim]
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias.to(qkv.dtype)
        q, k, v = qkv_rotary(qkv, self.heads, self.kv, *self.rotary, positions, self.q_norm, self.k_norm,
                             self.eps)                                      # [tokens, heads or kv, dim]
        mixed = attend(self.index, q, k, v).flatten(1)                      # [tokens, heads * dim]
        x = _Linear.apply(mixed, self.out, self.tp, True)                   # [rows, hidden]
        x, residual = add_norm(x, residual, self.mlp_norm, self.eps)
        x = _Linear.apply(x, self.gate_up, self.tp, False)                  # [tokens, 2 * wide / tp]
        x = _Linear.apply(swiglu(x), self.down, self.tp, True)              # [rows, hidden]
        return x, residual

def rotary_tables(config, device):
    """cos and sin [positions, dim / 2] of position * frequency; in fp32 whatever the model is in, as transformers."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    frequency = LlamaRotaryEmbedding(config).inv_freq       # Llama 3 slows down waves that are longer than its context
    angle = torch.arange(config.max_position_embeddings, dtype=torch.float32)[:, None] * frequency
    return angle.cos().to(device), angle.sin().to(device)

def packed(cu_seqlens, max_seqlen=None, covered=False):
    """Causal attention over packed documents, the i-th at [cu_seqlens[i], cu_seqlens[i + 1]). covered: no token is in
    none of them."""
    longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    return lambda layer, q, k, v: flash_attention(q, k, v, cu_seqlens, max_seqlen_q=longest, covered=covered)

def initial(spec, config, seed):
    """Random by (seed, name) alone, so the same on every layout."""
    if spec.small:                          # a critic begins by predicting 0
        return torch.full(spec.shape, float("norm" in spec.name))
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode(), seed))
    return torch.empty(spec.shape).normal_(0, config.initializer_range, generator=generator)

class Qwen3(nn.Module):
    """This rank's share of the model: some layers, and of each some heads and neurons."""
    def __init__(self, config, mesh=None, *, value_head=False, dtype=None, device=None, seed=0, recompute=False,
                 sequence_parallel=False):
        super().__init__()
        self.mesh = mesh = mesh or Mesh(device=device)
        check_layout(config, mesh)
        self.device = mesh.device
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.config = copy.copy(config)
        self.config.dtype = self.dtype      # as it will stand in config.json
        self.value_head = value_head
        self.recompute = recompute
        self.files = {}                     # tokenizer and so on, of the directory that the model came from
        self.reducing = False               # whether the next backward is the last one
        self.tp = TensorParallel(mesh, sequence_parallel)
        self.specs = table(config, mesh.tp, value_head, sequence_parallel)
        rotary = rotary_tables(config, self.device)
        here = [i for i in range(config.num_hidden_layers) if self.stage_of(i) == mesh.pp_rank]
        self.layers = nn.ModuleList(Layer(i, config, self.tp, rotary) for i in here)
        self.make_parameters(config.tie_word_embeddings and not value_head)
        if seed is not None:
            self.load_hf((name, initial(spec, config, seed)) for name, spec in self.specs.items())

    def make_parameters(self, tied):
        """Buckets: one for the matrices of each layer, one for words, and one for each kind of what is small."""
        mesh = self.mesh
        here = [spec for spec in self.specs.values() if self.stage_of(spec.layer) == mesh.pp_rank]
        words = self.specs["model.embed_tokens.weight"]
        if tied and 0 < mesh.pp_rank == mesh.pp - 1:        # the last stage has a copy of the words
            here.append(replace(words, layer=self.config.num_hidden_layers, ours="head_weight"))
        here.sort(key=lambda spec: ".layers." in spec.name and not spec.small)      # backward reduces layers first
        groups = {}
        for spec in here:
            key = (spec.axis, spec.partial) if spec.small else spec.layer
            groups.setdefault(key, []).append(spec)
        self.buckets = [Bucket(self, specs) for specs in groups.values()]
        for bucket in self.buckets:
            if tied and bucket.specs[0].name == words.name and mesh.pp > 1:
                bucket.shared = True
                bucket.others = mesh.pp_ends_group
        if tied and mesh.pp == 1:
            self.head_weight = self.embed

    def stage_of(self, layer):
        """Stages of equal work: the head counts as much as it costs (10 layers in Qwen3-0.6B: of 2 stages, one has 18
        layers and the other 10). What is before or after the layers is in the first or the last stage."""
        layers = self.config.num_hidden_layers
        last = self.mesh.pp - 1
        if layer >= layers or last == 0:
            return last
        one, head = sizes(self.config)
        head = 0 if self.value_head else min(head / one, layers / last)     # the other stages have layers, too
        return max(math.ceil((layer + 1) * self.mesh.pp / (layers + head)) - 1, 0)

    @classmethod
    def from_pretrained(cls, model, mesh=None, **settings):
        """A Hugging Face directory, or hub id, of one or several safetensors files."""
        folder = local_folder(model)
        made = cls(Config.from_pretrained(folder), mesh, **settings, seed=None)
        made.load_hf(read_folder(folder))
        made.files = small_files(folder)
        return made

    def forward(self, tokens, positions, attend, x=None):
        """tokens, positions [tokens] -> [tokens, hidden_size] after the final norm. In a pipeline x [rows, hidden_size]
        comes from the stage before, and the like goes to the stage after."""
        residual = None
        if self.mesh.pp_rank == 0:
            x = self.embedded(tokens)
        for layer in self.layers:
            if self.reducing:               # when x has its gradient, the matrices of this layer have theirs
                x.register_hook(lambda _, bucket=layer.qkv.bucket: bucket.reduce())
            if self.recompute and torch.is_grad_enabled():      # keep the input, and run it again for backward
                layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
            x, residual = layer(x, residual, positions, attend)
        if self.mesh.pp_rank < self.mesh.pp - 1:
            return x + residual
        x, _ = add_norm(x, residual, self.norm, self.config.rms_norm_eps)
        if self.tp.parts > 1:               # the gradient of all rows is whole on every rank
            x = _Conjugate.apply(x, self.tp.all_gather, lambda dx: dx.chunk(self.tp.size)[self.tp.rank])
        return x

    def embedded(self, tokens):
        """Each rank looks up the words that it has; their sum is [tokens, hidden_size], or this rank's rows of it."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.embed)
        ids = tokens - self.tp.rank * len(self.embed)
        here = (ids >= 0) & (ids < len(self.embed))
        x = F.embedding(ids * here, self.embed) * here[:, None]
        return _Conjugate.apply(x, lambda x: self.tp.sum(x)[0], self.tp.gather)

    def logprobs(self, hidden, targets, temperature=1.0):
        """The logprob of each target [tokens] (a negative one is ignored), and the entropy; differentiable."""
        if len(targets) == 0:
            nothing = hidden.float().sum(1)
            return nothing, nothing
        return linear_cross_entropy(hidden, self.head_weight, targets, temperature, self.mesh.tp_group)

    @torch.no_grad()
    def logits(self, hidden):
        """[tokens, vocab_size] on every tp rank, to generate: from bf16 in fp32, as the product sums them up."""
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            words = torch.mm(hidden, self.head_weight.T, out_dtype=torch.float32)
        else:
            words = F.linear(hidden, self.head_weight).to(widened(self.dtype))              # [tokens, some]
        return words if self.tp.size == 1 else self.tp.all_gather(words.T).T.contiguous()

    def value(self, hidden):
        """A critic's estimate [tokens], in fp32."""
        return hidden.to(self.score.dtype) @ self.score[0]

    def zero_grad(self, set_to_none=False):
        for bucket in self.buckets:
            bucket.zero()

    @torch.no_grad()
    def finish_gradients(self):
        """After the last backward: each gradient summed over all ranks that have a part of it, on its dp shard."""
        for bucket in self.buckets[::-1]:   # in the order of backward, also on a rank without micro-batches
            bucket.reduce()
        for bucket in self.buckets:
            if bucket.work:
                bucket.work.wait()
            if bucket.others:
                dist.all_reduce(bucket.shard_total, group=bucket.others)

    def views(self, flats):
        """This rank's shares by name, in flat tensors that are as long as those of the buckets."""
        found = {}
        for bucket, flat in zip(self.buckets, flats):
            for spec, part in zip(bucket.specs, flat.split(bucket.sizes)):
                found[spec.name] = part.view(spec.share)
        return found

    @torch.no_grad()
    def fill(self, flats, tensors):
        """Copy this rank's shares of whole tensors, (Hugging Face name, tensor), to their places in flat tensors."""
        places = self.views(flats)
        missing = places.keys() - {"score.weight"}
        for name, whole in tensors:
            spec = self.specs.get(name)     # None: of a model with another head
            if spec and tuple(whole.shape) != spec.shape:
                raise ValueError(f"{name} is {tuple(whole.shape)}, and the model wants {tuple(spec.shape)}")
            if name in places:
                whole = torch.as_tensor(whole)
                if spec.share != spec.shape:
                    whole = whole.chunk(self.tp.size, spec.axis)[self.tp.rank]
                places[name].copy_(whole)
                missing = missing - {name}
        if missing:
            raise ValueError(f"{min(missing)} is missing, and {len(missing) - 1} others of {len(places)}")

    @torch.no_grad()
    def load_hf(self, tensors):
        """Take whole tensors, as a mapping or as pairs of Hugging Face names and tensors: no parameter moves in memory,
        and AdamW steps from what was loaded."""
        self.fill([bucket.flat for bucket in self.buckets], getattr(tensors, "items", lambda: tensors)())
        for bucket in self.buckets:
            if bucket.master is not None:
                bucket.master.copy_(bucket.flat[bucket.shard])

    @torch.no_grad()
    def hf_tensors(self, shards=None):
        """(Hugging Face name, whole tensor) of the whole model, on every rank: all of a pp x tp group have to ask. What
        is whole here already is given as it is: clone what you keep. Given what a dp rank has for the shard of each
        bucket (moments, gradients: in fp32), the same of that; then all ranks have to ask."""
        flats = [bucket.flat for bucket in self.buckets]
        if shards:
            flats = [bucket.gather(shard) for bucket, shard in zip(self.buckets, shards)]
        mine = self.views(flats)
        for name, spec in self.specs.items():
            whole = mine.get(name)
            if whole is not None and spec.share != spec.shape:
                whole = torch.cat(self.tp.all_gather(whole[None]).unbind(), spec.axis)
            if self.mesh.pp > 1:
                if whole is None:
                    dtype = widened(self.dtype) if shards or spec.small else self.dtype
                    whole = torch.empty(spec.shape, dtype=dtype, device=self.device)
                dist.broadcast(whole, group=self.mesh.pp_group, group_src=self.stage_of(spec.layer))
            yield name, whole

    def save_pretrained(self, folder):
        """A Hugging Face directory, with the small files of the one that the model came from; all ranks call this."""
        whole = {name: tensor.to("cpu", self.dtype, copy=True) for name, tensor in self.hf_tensors()}
        if self.mesh.rank == 0:
            write_small_files(Path(folder), self)
            save_file(whole, Path(folder, "model.safetensors"), {"format": "pt"})
        self.mesh.wait()

# --- running it: forward and backward over micro-batches, through the stages of the pipeline -------------------------

# 1f1b, 3 stages, 5 micro-batches: a forward takes one slot and a backward, <>, two. Stages wait only at the ends, for
# (p - 1) / (m + p - 1) of the time, and stage s holds the activations of p - s micro-batches, however many there are.
#
#     stage 0   0 1 2         <0> 3 <1> 4 <2>   <3>   <4>
#     stage 1     0 1     <0> 2 <1> 3 <2> 4 <3>   <4>
#     stage 2       0 <0> 1 <1> 2 <2> 3 <3> 4 <4>

def moved(batch, model):
    """To where the model is, from pinned memory, so that nobody waits; and how its attention goes."""
    ends = batch["cu_seqlens"]
    extra = -len(batch["tokens"]) % model.tp.parts          # sequence parallel: as many for each rank
    batch = batch | {name: F.pad(batch[name], (0, extra)) for name in ("tokens", "positions")}
    covered = bool(ends[-1] == len(batch["tokens"]))
    for name, x in batch.items():
        if isinstance(x, Tensor) and model.device.type == "cuda" and not x.is_cuda:
            batch[name] = x.pin_memory().to(model.device, non_blocking=True)
    return batch, packed(batch["cu_seqlens"], batch["max_seqlen"], covered)

def run(model, batches, loss, schedule="1f1b", backward=True):
    """Forward and backward over micro-batches, through all stages. A batch has what micro_batch gives, and what else
    loss(model, hidden, batch) -> (scalar, results) wants; scalars are sums, divided by global counts already, as
    gradients are summed over micro-batches and dp. Returns the results, at the last stage. Gradients start from zero,
    and then wait for AdamW.step."""
    mesh = model.mesh
    stage = mesh.pp_rank
    last = mesh.pp - 1
    live = {}                               # micro-batches between their forward and their backward
    sending = []
    results = []
    if backward:
        model.zero_grad()

    def receive(m, source, group):
        if not 0 <= source <= last:
            return None
        rows = math.ceil(len(batches[m]["tokens"]) / model.tp.parts)
        x = torch.empty(rows, model.config.hidden_size, dtype=model.dtype, device=model.device)
        dist.irecv(x, group=group, group_src=source).wait()             # the stream waits, not the host
        return x

    def send(x, to, group):
        sending[:] = [(tensor, work) for tensor, work in sending if not work.is_completed()]
        if 0 <= to <= last:                 # a tensor lives until it is sent
            sending.append((x, dist.isend(x, group=group, group_dst=to)))

    # How far forward is ahead of backward. All forward, then all backward, is one number of it.
    ahead = {"afab": len(batches), "1f1b": min(last - stage, len(batches))}[schedule] if backward else 0
    for m in range(len(batches) + ahead):
        if m < len(batches):
            x = receive(m, stage - 1, mesh.pp_group)
            batch, attend = moved(batches[m], model)
            model.reducing = backward and m == len(batches) - 1
            with torch.set_grad_enabled(backward):
                if x is not None:
                    x.requires_grad_(backward)
                y = model(batch["tokens"], batch["positions"], attend, x)
                if stage == last:
                    y, found = loss(model, y, batch)
                    results.append(found)
                else:
                    send(y.detach(), stage + 1, mesh.pp_group)
            if backward:
                live[m] = x, y
        if backward and m >= ahead:
            x, y = live.pop(m - ahead)
            dy = receive(m - ahead, stage + 1, mesh.pp_back_group)
            with torch.autograd.set_multithreading_enabled(False):      # a thread of its own costs 7% of the launches
                torch.autograd.backward(y, dy)
            if x is not None:
                send(x.grad, stage - 1, mesh.pp_back_group)
    for _, work in sending:
        work.wait()
    model.reducing = False
    if backward:
        model.finish_gradients()
    return results

# --- the optimizer: AdamW, each dp rank on its shard -----------------------------------------------------------------

class AdamW:
    """torch's fused AdamW on flat fp32 tensors, which with their moments are split over dp: ZeRO-1 (arXiv 1910.02054).
    Norms, biases and a critic's head are not decayed. clip: a norm, or None."""
    def __init__(self, model, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip=None):
        self.model = model
        self.lr = lr
        self.clip = clip or math.inf
        model.zero_grad()
        groups = []
        for bucket in model.buckets:        # in fp32 (and fp64) the parameters are their own master
            bucket.master = bucket.flat[bucket.shard].detach().to(bucket.total.dtype)
            groups.append({"params": [bucket.master], "weight_decay": 0.0 if bucket.small else weight_decay})
        self.inner = torch.optim.AdamW(groups, lr, betas, eps, fused=True)
        self.state = []                     # of each bucket, as it is saved
        for bucket in model.buckets:
            moments = {name: torch.zeros_like(bucket.master) for name in ("exp_avg", "exp_avg_sq")}
            self.inner.state[bucket.master] = {"step": torch.zeros((), device=model.device)} | moments
            self.state.append({"model": bucket.master} | moments)

    @torch.no_grad()
    def step(self, lr=None):
        """Returns the norm of the gradients before clipping, on the GPU, so that nothing here waits for it: float(norm)
        does. If it is not finite nothing is changed."""
        mesh = self.model.mesh
        buckets = self.model.buckets
        counted = []                        # each parameter once: neither copies over tp nor the second of tied words
        for bucket in buckets:
            bucket.master.grad = bucket.shard_total
            if (bucket.split or mesh.tp_rank == 0) and not (bucket.shared and mesh.pp_rank > 0):
                counted.append(bucket.shard_total)
        square = nn.utils.get_total_norm(counted).double().square()
        if mesh.size > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        for group in self.inner.param_groups:
            group["lr"] = self.lr if lr is None else lr
        self.inner.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1).float()        # what gradients are divided by
        self.inner.found_inf = (~norm.isfinite()).float()
        self.inner.step()
        for bucket in buckets:
            mine = bucket.flat[bucket.shard]
            mine.copy_(bucket.master)
            bucket.gather(mine, bucket.flat)
        return norm

# --- files: Hugging Face's, and checkpoints from any layout to any other ---------------------------------------------

def read_folder(folder, kind="model"):
    """(name, tensor) of model.safetensors, or of model-00001.safetensors and so on."""
    paths = [folder / f"{kind}.safetensors"]                # if there are others, too, they are of an older model
    if not paths[0].exists():
        paths = sorted(folder.glob(f"{kind}-*.safetensors")) or paths
    for path in paths:
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is missing, or cut off; copy the whole folder again ({error})") from None
        for name in file.keys():
            yield name, file.get_tensor(name)

def small_files(folder):
    """Config, tokenizer and chat template: what goes along with the weights."""
    paths = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".txt")]
    return {path.name: path.read_bytes() for path in paths if "index" not in path.name}

def write_small_files(folder, model):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model.files.items():
        (folder / name).write_bytes(content)
    model.config.to_json_file(folder / "config.json")

# A checkpoint has whole tensors by their Hugging Face names, in fp32: model and moments, each a file for each layer.
# They are put together from all ranks one by one, and ranks take turns in writing layers, so reading one does not
# depend on the layout that wrote it. It is written beside its place: one without a dot in front of its name is whole.

def save(folder, model, optimizer=None, state=None):
    """Write a checkpoint; all ranks call this. `state` is rank 0's: numbers, strings, lists, dicts and tensors. It
    appears whole or not at all, in the place of one of the same name."""
    mesh = model.mesh
    folder = Path(folder)
    new = folder.with_name(f".{folder.name}.new")
    if any(folder.glob("*")) and not (folder / "state.pt").exists():
        raise ValueError(f"{folder} is something else than a checkpoint; save to a new folder")
    if mesh.rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        write_small_files(new, model)
        steps = optimizer and int(optimizer.inner.state[optimizer.state[0]["model"]]["step"])
        torch.save({"saved": time.time_ns(), "steps": steps, "state": state or {}}, new / "state.pt")
        read_state(new)                     # what load would refuse is refused now
    mesh.wait()
    for kind in optimizer.state[0] if optimizer else ["model"]:
        shards = [state[kind] for state in optimizer.state] if optimizer else None
        files = {}
        for name, whole in model.hf_tensors(shards):
            layer = model.specs[name].layer + 1
            if layer % mesh.size == mesh.rank:
                files.setdefault(layer, {})[name] = whole.to("cpu", copy=True)
        for layer, tensors in files.items():
            save_file(tensors, new / f"{kind}-{layer:05d}.safetensors")
    mesh.wait()
    if mesh.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    mesh.wait()
    return folder

def read_state(folder):
    return torch.load(folder / "state.pt", weights_only=True)

def latest(folder):
    """The newest whole checkpoint: the folder itself, or one in it."""
    folder = Path(folder)
    found = [path.parent for path in (folder / "state.pt", *folder.glob("[!.]*/state.pt")) if path.exists()]
    return max(found, key=lambda path: read_state(path)["saved"], default=None)

def existing(folder):
    found = latest(folder)
    if found is None:
        raise FileNotFoundError(f"there is no whole checkpoint in {folder}")
    return found

@torch.no_grad()
def load(folder, model, optimizer=None):
    """Read a checkpoint, or the newest in a folder of them, onto any layout. Returns the state."""
    folder = existing(folder)
    about = read_state(folder)
    if optimizer and about["steps"] is None:
        raise ValueError(f"{folder} was saved without AdamW; load it without, or take another")
    model.load_hf(read_folder(folder))
    model.files = model.files or small_files(folder)
    for kind in optimizer.state[0] if optimizer else ():
        flats = [torch.zeros_like(bucket.total, device="cpu") for bucket in model.buckets]
        model.fill(flats, read_folder(folder, kind))
        for bucket, flat, state in zip(model.buckets, flats, optimizer.state):
            state[kind].copy_(flat[bucket.shard])
    for inner in optimizer.inner.state.values() if optimizer else ():
        inner["step"].fill_(about["steps"])
    return about["state"]

def merge(folder, out):
    """A Hugging Face directory from a checkpoint, file by file, so in the memory of a layer, or of the words."""
    folder = existing(folder)
    out = Path(out)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "state.pt"))
    dtype = Config.from_pretrained(out).dtype
    where = {}
    for path in folder.glob("model-*"):
        tensors = {name: x.to(dtype) for name, x in load_file(path).items()}
        save_file(tensors, out / path.name, {"format": "pt"})
        where |= dict.fromkeys(tensors, path.name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return out

CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

def tiny_model(folder, seed=0, **overrides):
    """A model directory like any other, of a random Qwen3 with 0.8 M parameters that reads and writes bytes: 256 of
    them, and Qwen's special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Tokenizer
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    settings = dict(vocab_size=len(words), hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=258,
                    pad_token_id=256)
    Qwen3(Config(**settings | overrides), dtype=torch.float32, device="cpu", seed=seed).save_pretrained(folder)
    GPT2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token=words[256],
                  eos_token=words[258], additional_special_tokens=[words[257]], chat_template=CHAT_TEMPLATE
                  ).save_pretrained(folder)
    return Path(folder)

# --- the demo: any layout against one process; and on a GPU, the speed -----------------------------------------------

@dataclass
class Settings:
    """A tiny model learns on the mesh and alone, which should be the same; with --bench, the speed of Qwen3-0.6B."""
    dp: int | None = None                   # replicas; None: what is left of the processes
    pp: int = 1                             # stages of the pipeline
    tp: int = 1                             # ranks that share each layer
    sequence_parallel: bool = False         # norms and residuals of 1 / tp of the tokens: less memory, slower
    recompute: bool = False                 # keep only the inputs of layers, and run each again for its backward
    device: str | None = None               # None: cuda where there is one
    bench: bool = False                     # the speed, with steps of 131,072 tokens a replica

def loss(model, hidden, batch):
    """At the last stage, of each micro-batch: a scalar, and what run is to return."""
    logprob, _ = model.logprobs(hidden.index_select(0, batch["predict"]), batch["targets"])     # [predicted]
    total = -logprob.sum() / batch["count"]
    return total, total.detach()

def learn(config, mesh, settings, documents, capacity, dtype):
    """Some steps over these documents, each in a line. Returns the losses. MFU: of an H200's 989 TFLOP/s in bf16."""
    lengths = [len(document) for document in documents]
    count = sum(lengths) - len(lengths)                     # of tokens that are predicted
    bins = pack(lengths, capacity, mesh.dp)[mesh.dp_rank::mesh.dp]
    batches = [micro_batch([documents[i] for i in rows]) | {"count": count} for rows in bins]
    model = Qwen3(config, mesh, dtype=dtype, recompute=settings.recompute,
                  sequence_parallel=settings.sequence_parallel)
    optimizer = AdamW(model, lr=3e-3, clip=1.0)
    losses = []
    for step in range(6):
        start = time.perf_counter()
        total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        total += sum(run(model, batches, loss)) / mesh.tp   # all tp ranks have the same
        optimizer.step()
        if mesh.size > 1:
            dist.all_reduce(total)
        losses.append(total.item())
        seconds = time.perf_counter() - start
        mfu = training_flops(config, lengths) / seconds / mesh.size / 989e12
        memory = torch.cuda.max_memory_allocated() / 2**30
        if mesh.rank == 0:
            print(f"{step=} loss={losses[-1]:.6f} dp={mesh.dp} pp={mesh.pp} tp={mesh.tp} micro_batch={capacity} "
                  f"ms={1e3 * seconds:.0f} tokens_per_s={sum(lengths) / seconds:.0f} mfu={mfu:.1%} gib={memory:.1f}",
                  flush=True)
    return losses

def demo(mesh, settings):
    """A tiny model learns to count, on the mesh and alone."""
    config = Config(vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32)
    documents = [(7 * d + 3 * np.arange(40 + d)) % 256 for d in range(16)]
    on_cpu = mesh.device.type == "cpu"
    dtype = torch.float64 if on_cpu else torch.bfloat16
    ours = learn(config, mesh, settings, documents, 128, dtype)
    if mesh.rank == 0:
        alone = learn(config, Mesh(device=mesh.device), settings, documents, 128, dtype)
        worst = np.abs(np.subtract(ours, alone)).max()
        print(f"the largest difference to one process: {worst:.1e}")
        if worst > (1e-9 if on_cpu else 0.05) or ours[-1] > 0.9 * ours[0]:
            sys.exit("these should be equal, and the loss should fall")

def main():
    if sys.argv[1:2] == ["merge"]:
        return print(merge(*sys.argv[2:]))
    settings = arguments(Settings)
    mesh = init(settings.dp, settings.pp, settings.tp, settings.device)
    if settings.bench:
        documents = [np.arange(1024)] * 128 * mesh.dp       # which words these are does not matter
        for capacity in (8192, 16_384):
            learn(Config(), mesh, settings, documents, capacity, torch.bfloat16)
            gc.collect()                                    # parameters and buckets refer to each other
    else:
        demo(mesh, settings)
    if mesh.size > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    with mistakes():
        main()
