"""parallel: Qwen3, and every way to split it.

    dp  replicas: other tokens, same weights     tp 0 | embed | half the heads and neurons | ... | norm | words | loss
    pp  stages: consecutive layers               tp 1 |  ...  |      the other half        | ... |      |  ...  |
    tp  shares of every layer                           stage 0 | hidden states -->  <-- their gradients | last stage

    optimizer    fp32 parameters and two moments: each dp rank owns some layers (ZeRO-1)
    gradients    in fp32, summed over micro-batches, and reduced over dp to their owners while backward runs
    parameters   in bf16, broadcast by their owners after the step

Every layout computes what one process does, to rounding. Attention is given: packed(...) to train, pages to generate.
Left out: interleaved stages, ZeRO-2 and 3, context parallelism, experts, more tp ranks than key heads.

    mesh = init(pp=2, tp=2)                                 # dp is what is left; Mesh() is one process
    model = Qwen3.from_pretrained("Qwen/Qwen3-0.6B", mesh, recompute=True)
    optimizer = AdamW(model, lr=1e-5, weight_decay=0.01, clip=1.0)
    batches = [micro_batch(documents) | {"count": count}]   # of all ranks and micro-batches; pack() deals them out
    results = run(model, batches, loss)                     # a loss is at the end of this file
    norm = optimizer.step()
    save("out/last", model, optimizer, {"step": 1})         # load(...) takes it to any other layout

    python parallel.py                                       the demo; with --bench, on a GPU, the speed of Qwen3-0.6B
    torchrun --nproc-per-node 4 parallel.py --tp 2 --pp 2    the demo on four processes, each on a CPU or a GPU
    python parallel.py merge CHECKPOINT OUT                  a checkpoint as a Hugging Face directory
"""
import contextlib, difflib, inspect, json, math, os, re, shutil, sys, time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import flash_attention, linear_cross_entropy, qkv_rotary, rms_norm, swiglu

# --- what every program shares: its settings, and the user's mistakes ------------------------------------------------
def refuse(message):
    """One line, and exit code 2, from rank 0: its end ends the others. Another waits 5 s for that, and tells."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)

@contextlib.contextmanager
def mistakes():
    """Around a program's main: what the user has to mend comes as one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        refuse(getattr(error, "cause", None) or error)      # an actor's error has its traceback in it

def arguments(kind, args=None):
    """An object of this dataclass, from flags. --help shows the comment beside each field, and its default."""
    from transformers import HfArgumentParser
    comments = dict(re.findall(r"(\w+): .*?  # +(.*)", inspect.getsource(kind)))
    for one in fields(kind):
        one.metadata = {"help": comments.get(one.name, " ").replace("%", "%%")}
    parser = HfArgumentParser(kind, allow_abbrev=False)
    parser.error = refuse
    found, unknown = parser.parse_known_args(args)
    if unknown:
        near = difflib.get_close_matches(unknown[0], [f"--{one.name}" for one in fields(kind)], 1) or ["--help"]
        refuse(f"there is no {unknown[0]}; did you mean {near[0]}?")
    return kind(**vars(found))

# --- micro-batches: documents side by side ---------------------------------------------------------------------------
def pack(lengths, capacity, multiple=1):
    """Rows for each micro-batch: as few as will do (a multiple of `multiple`), of at most `capacity` tokens. The
    longest first, always into the emptiest, so that all get about the same."""
    lengths = np.asarray(lengths, np.int64)
    longest = lengths.max(initial=0)
    if longest > capacity:
        raise ValueError(f"a row of {longest:,} tokens is longer than the {capacity:,} there may be")
    count = math.ceil(lengths.sum() / (capacity * multiple)) * multiple or multiple
    while True:
        loads = np.zeros(count, np.int64)
        bins = [[] for _ in range(count)]
        for row in np.argsort(-lengths, kind="stable").tolist():
            emptiest = loads.argmin()
            loads[emptiest] += lengths[row]
            bins[emptiest].append(row)
        if loads.max() <= capacity:
            return bins
        count += multiple

def micro_batch(documents, learned=None):
    """Documents (token ids) side by side. learned: a mask for each; its first token never is. A token is predicted from
    the hidden state before it: `predict` are those places, `targets` what comes next."""
    if not len(documents):                  # one token that teaches nothing, for a rank with nothing to do
        documents = [[0]]
    lengths = [len(document) for document in documents]
    tokens = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    positions = torch.cat([torch.arange(length) for length in lengths])
    mask = positions > 0
    if learned:
        mask &= torch.from_numpy(np.concatenate(learned).astype(bool))
    predict = mask.nonzero()[:, 0] - 1
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()             # where documents begin, and the end
    return {"tokens": tokens, "positions": positions, "cu_seqlens": ends, "max_seqlen": max(lengths),
            "predict": predict, "targets": tokens[predict + 1]}

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

def understood(config):                     # or refused, by the name of what this model has not
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wanted = config.to_dict() | {"rope_type": config.rope_parameters["rope_type"]}
    known = {"model_type": ["qwen3", "qwen2", "llama"], "rope_type": ["default", "llama3"], "hidden_act": ["silu"],
             "attention_bias": [False], "mlp_bias": [False], "use_sliding_window": [False],
             "quantization_config": [None]}
    for name, values in known.items():
        if wanted.get(name, values[0]) not in values:
            raise ValueError(f"{name} = {wanted[name]} is not known here, but {values}")
    return config

def local_folder(model):                    # fetched from the hub where the name is not that of a folder
    from huggingface_hub import snapshot_download
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:
        raise FileNotFoundError(f"{model} is neither a folder nor a hub id that can be fetched: {error}") from None

def sizes(config):
    heads = config.num_attention_heads + config.num_key_value_heads
    layer = config.hidden_size * (2 * heads * config.head_dim + 3 * config.intermediate_size)
    return layer, config.hidden_size * config.vocab_size    # the numbers in a layer's matrices, and in the head

def training_flops(config, lengths):
    """Forward and backward over documents: 6 a number of a matrix and token (the words as the head), and attention."""
    layer, head = sizes(config)
    heads = config.num_attention_heads * config.head_dim
    return float(sum(6 * n * (config.num_hidden_layers * (layer + heads * n) + head) for n in lengths))

# --- the mesh: which rank does what, and how ranks meet --------------------------------------------------------------
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
    rows_group: object = None               # set by a model with sequence parallel: tp's, which shares norms by tokens
    pp_group: object = None                 # for messages from stage to stage; those on the way back have a link of
    pp_back_group: object = None            # their own: on one for both, NCCL would queue them up
    pp_ends_group: object = None            # the first and the last stage, which share tied embeddings
    def __post_init__(self):
        self.device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.size = self.dp * self.pp * self.tp
        digits = np.unravel_index(self.rank, (self.dp, self.pp, self.tp))
        self.dp_rank, self.pp_rank, self.tp_rank = map(int, digits)
        self.parts = self.tp if self.rows_group else 1
    def wait(self):
        if self.size > 1:
            dist.barrier()

def init(dp=None, pp=1, tp=1, device=None):
    """This process' place, from torchrun's environment (without it, a process alone); dp=None takes what is left."""
    device = Mesh(device=device).device
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("there is no GPU here; take --device cpu")
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    dp = dp or world // (pp * tp)
    if dp * pp * tp != world:
        raise ValueError(f"dp x pp x tp = {dp} x {pp} x {tp} does not make {world} processes; choose other factors")
    mesh = Mesh(dp, pp, tp, rank, device)
    ranks = np.arange(world).reshape(dp, pp, tp)
    stages = ranks.swapaxes(1, 2)
    ends = stages[..., ::max(pp - 1, 1)]
    rows = {"dp": ranks.swapaxes(0, 2), "tp": ranks, "pp": stages, "pp_back": stages, "pp_ends": ends}
    for name, row in rows.items():
        if row.shape[2] > 1:
            group, _ = dist.new_subgroups_by_enumeration(row.reshape(-1, row.shape[2]).tolist())
            if group is not None:           # they meet at once, so that later nobody waits for another
                dist.all_reduce(torch.zeros(1, device=device), group=group)
            setattr(mesh, f"{name}_group", group)
    return mesh

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor        # renamed in torch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

def gathered(x, group):
    if group is None:
        return x
    out = x.new_empty(len(x) * group.size(), *x.shape[1:])
    all_gather(out, x.contiguous(), group=group)
    return out

def summed(x, mesh, later=False):
    """The sum of what tp ranks have for the same tokens (Megatron, arXiv 1909.08053), and if it is for later, what to
    wait for. With sequence parallel (arXiv 2205.05198) a rank keeps only its rows, until the next product."""
    if mesh.tp == 1:
        return x, None
    if mesh.parts == 1:
        return x, dist.all_reduce(x, group=mesh.tp_group, async_op=later)
    out = x.new_empty(len(x) // mesh.tp, *x.shape[1:])
    return out, reduce_scatter(out, x, group=mesh.tp_group, async_op=later)

# --- tensor parallel: products whose ranks meet ----------------------------------------------------------------------
class _Linear(torch.autograd.Function):
    """x @ weight', where a tp rank has some columns of the product, or (terms) some of x. Backward adds the
    gradient of the weight to weight.grad within the product, in fp32; meanwhile ranks add up that of x."""
    @staticmethod
    def forward(ctx, x, weight, mesh, terms):
        if not terms:
            x = gathered(x, mesh.rows_group)
        ctx.save_for_backward(x)
        ctx.weight = weight                 # the parameter itself: from a saved tensor, recompute makes an alias
        ctx.mesh = mesh
        ctx.terms = terms
        y = F.linear(x, weight)
        return summed(y, mesh)[0] if terms else y
    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        work = made = None
        if ctx.terms:
            dy = gathered(dy, ctx.mesh.rows_group)
        dx = dy @ ctx.weight
        if not ctx.terms:
            dx, work = summed(dx, ctx.mesh, later=True)
        grad = ctx.weight.grad
        if grad is None:                    # nothing has called zero_grad yet
            made = dy.T @ x
        elif x.is_cuda and x.dtype != grad.dtype:
            torch.addmm(grad, dy.T, x, out_dtype=grad.dtype, out=grad)
        else:
            grad.addmm_(dy.T.to(grad.dtype), x.to(grad.dtype))
        if work:
            work.wait()
        return dx, made, None, None

class _Conjugate(torch.autograd.Function):  # x through `there`, its gradient through `back`
    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)
    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad), None, None

# --- the model -------------------------------------------------------------------------------------------------------
class Layer(nn.Module):
    """A decoder layer: x + attention(norm(x)), then x + mlp(norm(x)), on this rank's heads and neurons."""
    def __init__(self, index, config, mesh, rotary):
        super().__init__()
        self.index = index
        self.eps = config.rms_norm_eps
        self.mesh = mesh
        self.rotary = rotary
        self.heads = config.num_attention_heads // mesh.tp
        self.kv = config.num_key_value_heads // mesh.tp
        self.qkv_bias = self.q_norm = self.k_norm = None
    def forward(self, x, residual, positions, attend):
        """x and residual [rows, hidden], rows = tokens, or a share of them; their sum is the input, or the output."""
        x, residual = rms_norm(x, self.input_norm, self.eps, residual)
        qkv = _Linear.apply(x, self.qkv, self.mesh, False)                  # [tokens, (heads + 2 kv) * dim]
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias.to(qkv.dtype)
        norms = self.q_norm, self.k_norm, self.eps
        q, k, v = qkv_rotary(qkv, self.heads, self.kv, *self.rotary, positions, *norms)     # [tokens, heads or kv, dim]
        mixed = attend(self.index, q, k, v).flatten(1)                      # [tokens, heads * dim]
        x = _Linear.apply(mixed, self.out, self.mesh, True)                 # [rows, hidden]
        x, residual = rms_norm(x, self.mlp_norm, self.eps, residual)
        x = _Linear.apply(x, self.gate_up, self.mesh, False)                # [tokens, 2 * wide / tp]
        x = _Linear.apply(swiglu(x), self.down, self.mesh, True)            # [rows, hidden]
        return x, residual

def rotary_tables(config, device):
    """cos and sin [positions, dim / 2] of position * frequency; in fp32 whatever the model is in, as transformers."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    frequency = LlamaRotaryEmbedding(config).inv_freq       # Llama 3 slows down waves that are longer than its context
    angle = torch.arange(config.max_position_embeddings, dtype=torch.float32)[:, None] * frequency
    return angle.cos().to(device), angle.sin().to(device)

def packed(cu_seqlens, max_seqlen=None, covered=False):
    """Causal attention over documents, the i-th at [cu_seqlens[i], cu_seqlens[i + 1]). covered: all tokens are."""
    return lambda layer, q, k, v: flash_attention(q, k, v, cu_seqlens, max_seqlen_q=max_seqlen, covered=covered)

OURS = {"embed_tokens": "embed", "input_layernorm": "input_norm", "post_attention_layernorm": "mlp_norm",
        "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "out",
        "gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down", "lm_head": "head_weight"}
WORDS = "model.embed_tokens.weight"

class Qwen3(nn.Module):
    """This rank's share of the model: some layers, and of each some heads and neurons."""
    def __init__(self, config, mesh=None, *, value_head=False, dtype=None, device=None, seed=0, recompute=False,
                 sequence_parallel=False):
        from transformers import AutoModelForCausalLM
        super().__init__()
        mesh = mesh or Mesh(device=device)
        heads = math.gcd(config.num_attention_heads, config.num_key_value_heads)
        most = math.gcd(heads, config.intermediate_size, config.vocab_size)
        if most % mesh.tp:
            raise ValueError(f"this model cannot be split over tp={mesh.tp}; choose a divisor of {most}")
        self.mesh = mesh = replace(mesh, rows_group=mesh.tp_group if sequence_parallel else None)
        self.device = mesh.device
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.wide = torch.promote_types(self.dtype, torch.float32)  # what gradients and norms are in: fp32, or fp64
        self.config = config
        self.value_head = value_head
        self.recompute = recompute
        self.files = {}                     # tokenizer and so on, of the directory that the model came from
        self.reducing = False               # whether the next backward is the last one
        self.masters = {}                   # of the parameters that this rank steps: in fp32, by AdamW
        self.tied = config.tie_word_embeddings and not value_head
        self.specs = {}                     # what is known of each tensor of the whole model, by name
        with torch.random.fork_rng([]), torch.device("meta" if seed is None else "cpu"):
            torch.default_generator.manual_seed(seed or 0)      # the same on every layout
            theirs = AutoModelForCausalLM.from_config(config)
        tensors = dict(theirs.named_parameters())
        self.make_parameters(tensors)
        if seed is not None:
            self.load_hf(tensors)
    def make_parameters(self, tensors):
        """Those of this rank, each for parts of some of transformers' tensors."""
        config = self.config
        mesh = self.mesh
        if self.value_head:
            tensors["score.weight"] = torch.zeros(1, config.hidden_size)
            tensors.pop("lm_head.weight", None)             # (where it is tied, transformers does not name it)
        groups = {}
        for name, whole in tensors.items():
            *path, module, kind = name.split(".")           # model.layers.7.self_attn.q_proj.weight
            norm = "norm" in name
            ours = OURS.get(module, module)                 # the parameter that it is a part of, as some of its rows
            if kind == "bias":
                ours += "_bias"
            self.specs[name] = spec = SimpleNamespace(name=name, shape=whole.shape)
            spec.layer = -1 if name == WORDS else config.num_hidden_layers  # before the layers, or after them
            if "layers" in path:
                spec.layer = int(path[2])
            spec.stage = self.stage_of(spec.layer)
            spec.owner = (spec.layer + 1) % mesh.size * mesh.dp // mesh.size        # the dp rank that steps, saves it
            spec.axis = None if norm or module == "score" else int(ours in ("out", "down"))         # that tp splits
            spec.part = self.part(whole.detach().to("meta"), spec.axis)
            spec.small = spec.axis is None or kind == "bias"                # kept in fp32, and not decayed
            spec.dtype = self.wide if spec.small else self.dtype
            spec.adds = None                                # with whom to add up gradients, besides dp
            if module in ("q_norm", "k_norm") or (norm and mesh.parts > 1):
                spec.adds = mesh.tp_group                   # a rank has only its own heads, or tokens
            if spec.stage == mesh.pp_rank:
                groups.setdefault((spec.layer, ours), []).append(spec)
        if self.tied:
            words = self.specs[WORDS]
            words.adds = mesh.pp_ends_group
            if 0 < mesh.pp_rank == mesh.pp - 1:             # the last stage has a copy
                groups[-1, "head_weight"] = [words]
        rotary = rotary_tables(config, self.device)
        layers = [Layer(i, config, mesh, rotary) for i in range(config.num_hidden_layers)]
        modules = [*layers, self]           # layers -1 and n, embedding and head, are the model's own
        for (layer, ours), specs in groups.items():
            whole = torch.cat([spec.part for spec in specs])                # query, key and value, side by side
            p = nn.Parameter(torch.zeros_like(whole, dtype=specs[0].dtype, device=self.device))
            p.specs = specs
            p.spec = specs[0]               # in all but the name they are alike
            setattr(modules[layer], ours, p)
        self.layers = nn.ModuleList(layer for layer in layers if hasattr(layer, "qkv"))       # of this stage
        if self.tied and mesh.pp == 1:
            self.head_weight = self.embed
    def stage_of(self, layer):
        """Stages of equal work: the head counts as what it costs (10 layers in Qwen3-0.6B: 18 and 10 at pp=2)."""
        layers = self.config.num_hidden_layers
        last = self.mesh.pp - 1
        if layer >= layers or last == 0:
            return last
        one, head = sizes(self.config)
        head = 0 if self.value_head else min(head / one, layers / last)     # the other stages have layers, too
        return max(math.ceil((layer + 1) * self.mesh.pp / (layers + head)) - 1, 0)
    @classmethod
    def from_pretrained(cls, model, mesh=None, **settings):
        folder = local_folder(model)
        made = cls(Config.from_pretrained(folder), mesh, **settings, seed=None)
        made.load_hf(read_folder(folder))
        for path in folder.iterdir():       # the tokenizer, the chat template and so on go along with the weights
            if path.suffix in (".json", ".jinja", ".txt") and "index" not in path.name:
                made.files[path.name] = path.read_bytes()
        return made
    def forward(self, tokens, positions, attend, x=None):
        """tokens, positions [tokens] -> [tokens, hidden]. x [rows, hidden] is what the stage before has sent."""
        mesh = self.mesh
        if mesh.pp_rank == 0:
            x = self.embedded(tokens)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            if self.reducing:               # when x has its gradient, the matrices of this layer have theirs
                x.register_hook(lambda _, layer=layer: self.reduce(layer, 2))
            if self.recompute:              # keep the input, and run it again for backward
                layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
            x, residual = layer(x, residual, positions, attend)
        if mesh.pp_rank < mesh.pp - 1:
            return x + residual
        x, _ = rms_norm(x, self.norm, self.config.rms_norm_eps, residual)
        if mesh.parts > 1:                  # the gradient of all rows is whole on every rank
            x = _Conjugate.apply(x, lambda x: gathered(x, mesh.tp_group), lambda dx: self.part(dx, 0))
        return x
    def embedded(self, tokens):             # each rank looks up the words that it has
        mesh = self.mesh
        if mesh.tp == 1:
            return F.embedding(tokens, self.embed)
        words = len(self.embed)
        here = tokens // words == mesh.tp_rank
        x = F.embedding(tokens % words, self.embed) * here[:, None]
        return _Conjugate.apply(x, lambda x: summed(x, mesh)[0], lambda dx: gathered(dx, mesh.rows_group))
    def logprobs(self, hidden, targets, temperature=1.0):
        """The logprob of each target [tokens] (a negative one is ignored), and the entropy; differentiable."""
        if not len(targets):
            nothing = hidden.float().sum(1)
            return nothing, nothing
        return linear_cross_entropy(hidden, self.head_weight, targets, temperature, self.mesh.tp_group)
    @torch.no_grad()
    def logits(self, hidden):
        """[tokens, vocab_size] on every tp rank, to generate: from bf16 in fp32, as the product sums them up."""
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            words = torch.mm(hidden, self.head_weight.T, out_dtype=torch.float32)
        else:
            words = F.linear(hidden, self.head_weight).to(self.wide)              # [tokens, some]
        return gathered(words.T, self.mesh.tp_group).T.contiguous()
    def value(self, hidden):
        return hidden.to(self.score.dtype) @ self.score[0]  # [tokens], in fp32
    def zero_grad(self):
        """From now on gradients are added to p.grad, which is in fp32 whatever the parameter is in."""
        for p in self.parameters():
            if p.grad is None:
                p.grad_dtype = None
                p.grad = torch.zeros_like(p, dtype=self.wide)
            p.grad.zero_()
            p.work = None
    def reduce(self, module, dims=1):       # begin to add up gradients, of so many dimensions, at their owners
        group = self.mesh.dp_group
        for p in module.parameters():
            if group and p.ndim >= dims and p.work is None:
                p.work = dist.reduce(p.grad, group=group, group_dst=p.spec.owner, async_op=True)
    def finish_gradients(self):
        """After the last backward: each gradient summed over all ranks that have a part of it, at its owner."""
        for layer in self.layers[::-1]:     # in the order of backward, also on a rank without micro-batches
            self.reduce(layer, 2)
        self.reduce(self)
        for p in self.parameters():
            if p.work:
                p.work.wait()
            if p.spec.adds and p.spec.owner == self.mesh.dp_rank:
                dist.all_reduce(p.grad, group=p.spec.adds)
    def part(self, whole, axis):
        return whole if axis is None else whole.chunk(self.mesh.tp, axis)[self.mesh.tp_rank]
    def views(self, values=None):           # this rank's parts by name, in {parameter: itself, or a tensor like it}
        if values is None:
            values = {p: p.data for p in self.parameters()}
        found = {}
        for p, value in values.items():
            parts = value.split([len(spec.part) for spec in p.specs])
            found |= {spec.name: part for spec, part in zip(p.specs, parts)}
        return found
    @torch.no_grad()
    def fill(self, tensors, values=None):   # with this rank's parts of whole tensors, of all or of none
        for name, spec in self.specs.items():
            shape = getattr(tensors.get(name), "shape", "missing")
            if shape != spec.shape:
                raise ValueError(f"{name} is {shape}, and the model wants {spec.shape}")
        for name, place in self.views(values).items():
            whole = torch.as_tensor(tensors[name])
            place.copy_(self.part(whole, self.specs[name].axis))
    def load_hf(self, tensors):
        """Take whole tensors by Hugging Face's names, a mapping or pairs, in place. A critic's head may be missing."""
        self.fill({"score.weight": torch.zeros(1, self.config.hidden_size)} | dict(tensors))
        for p, master in self.masters.items():
            master.copy_(p.data)
    @torch.no_grad()
    def hf_tensors(self, values=None):
        """(name, whole tensor); all ranks of a replica have to ask. Clone what you keep. values: of what it owns."""
        mine = self.views(values)
        for name, spec in self.specs.items():
            if values is not None and spec.owner != self.mesh.dp_rank:
                continue
            whole = mine.get(name)
            if whole is not None and whole.shape != spec.shape:
                whole = torch.cat(gathered(whole[None], self.mesh.tp_group).unbind(), spec.axis)
            if self.mesh.pp > 1:
                if whole is None:
                    dtype = spec.dtype if values is None else self.wide
                    whole = torch.empty(spec.shape, dtype=dtype, device=self.device)
                dist.broadcast(whole, group=self.mesh.pp_group, group_src=spec.stage)
            yield name, whole
    def save_pretrained(self, folder):      # all ranks call this
        whole = {name: tensor.to("cpu", self.dtype, copy=True) for name, tensor in self.hf_tensors()}
        if self.mesh.rank == 0:
            write_small_files(Path(folder), self)
            save_file(whole, Path(folder, "model.safetensors"), {"format": "pt"})
        self.mesh.wait()

# --- running it: forward and backward over micro-batches, through the stages of the pipeline -------------------------
# 1f1b, 3 stages, 5 micro-batches: a forward takes one slot and a backward, <>, two. Stages wait only at the ends, for
# (p - 1) / (m + p - 1) of the time, and stage s holds the activations of p - s micro-batches, however many there are.
#     stage 0   0 1 2         <0> 3 <1> 4 <2>   <3>   <4>
#     stage 1     0 1     <0> 2 <1> 3 <2> 4 <3>   <4>
#     stage 2       0 <0> 1 <1> 2 <2> 3 <3> 4 <4>

def moved(batch, model):                    # with as many tokens for each rank of sequence parallel
    extra = -len(batch["tokens"]) % model.mesh.parts
    batch = batch | {name: F.pad(batch[name], (0, extra)) for name in ("tokens", "positions")}
    for name, x in batch.items():
        if torch.is_tensor(x):
            batch[name] = x.to(model.device)
    return batch | {"attend": packed(batch["cu_seqlens"], batch["max_seqlen"], not extra)}

def run(model, batches, loss, schedule="1f1b", backward=True):
    """Forward and backward over micro-batches; their gradients, summed over dp, too, wait for AdamW.step. Returns the
    results of loss(model, hidden, batch) -> (scalar, result), at the last stage."""
    mesh = model.mesh
    stage = mesh.pp_rank
    last = mesh.pp - 1
    batches = [moved(batch, model) for batch in batches]    # at once: later the host would wait for the GPU's work
    live = {}                               # micro-batches between their forward and their backward
    sending = []
    results = []
    if backward:
        model.zero_grad()
    def receive(m, source, group):
        if 0 <= source <= last:
            shape = len(batches[m]["tokens"]) // mesh.parts, model.config.hidden_size
            x = torch.empty(shape, dtype=model.dtype, device=model.device)
            dist.recv(x, group=group, group_src=source)     # the stream waits, not the host
            return x.requires_grad_()
    def send(x, to, group):
        if 0 <= to <= last:
            sending.append((x, dist.isend(x, group=group, group_dst=to)))   # a tensor lives until it is sent

    # How far forward is ahead of backward: afab, all forward, then all backward, is one number of it.
    ahead = {"afab": len(batches), "1f1b": min(last - stage, len(batches))}[schedule] if backward else 0
    for m in range(len(batches) + ahead):
        if m < len(batches):
            batch = batches[m]
            x = receive(m, stage - 1, mesh.pp_group)
            model.reducing = backward and m == len(batches) - 1
            with torch.set_grad_enabled(backward):
                y = model(batch["tokens"], batch["positions"], batch["attend"], x)
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

# --- the optimizer: AdamW, each dp rank on its layers ----------------------------------------------------------------
class AdamW:
    """torch's fused AdamW, in fp32, of what this dp rank owns: ZeRO-1 (arXiv 1910.02054). Norms, biases: no decay."""
    def __init__(self, model, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip=None):
        self.model = model
        self.lr = lr
        self.clip = clip or math.inf
        model.zero_grad()
        model.masters = masters = {}
        groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for p in model.parameters():
            if p.spec.owner == model.mesh.dp_rank:          # in fp32 (and fp64) it is its own master
                masters[p] = p.detach().to(p.grad.dtype)
                masters[p].grad = p.grad
                groups[p.spec.small]["params"].append(masters[p])
        self.inner = torch.optim.AdamW(groups, lr, betas, eps, weight_decay, fused=True)
        self.inner.found_inf = torch.ones((), device=model.device)
        self.inner.step()                   # changes nothing, but makes the moments
        self.state = {"model": masters}     # as it is saved
        for kind in ("exp_avg", "exp_avg_sq"):
            self.state[kind] = {p: self.inner.state[masters[p]][kind] for p in masters}
    @torch.no_grad()
    def step(self, lr=None):
        """Returns the norm of the gradients before clipping, on the GPU: nobody waits. Not finite: nothing changes."""
        model = self.model
        mesh = model.mesh
        once = [p.grad for p in model.masters               # what is the same on several ranks counts on one
                if p.spec.stage == mesh.pp_rank and (p.spec.axis is not None or mesh.tp_rank == 0)]
        square = nn.utils.get_total_norm(once).to(mesh.device, torch.float64) ** 2
        if mesh.size > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        for group in self.inner.param_groups:
            group["lr"] = self.lr if lr is None else lr
        self.inner.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1).float()        # what gradients are divided by
        self.inner.found_inf = (~norm.isfinite()).float()
        self.inner.step()
        for p in model.parameters():
            p.copy_(model.masters.get(p, p))
            if mesh.dp > 1:
                dist.broadcast(p.data, group=mesh.dp_group, group_src=p.spec.owner)
        return norm

# --- files: Hugging Face's, and checkpoints from any layout to any other ---------------------------------------------
def read_folder(folder, kind="model"):      # in one file or several, mapped: no tensor is read before it is used
    tensors = {}
    for path in folder.glob(f"{kind}[-.]*safetensors"):
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged; copy the whole folder again ({error})") from None
    return tensors

def write_small_files(folder, model):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model.files.items():
        (folder / name).write_bytes(content)
    model.config.dtype = model.dtype
    model.config.to_json_file(folder / "config.json")

# A checkpoint has whole tensors by their Hugging Face names, in fp32: model and moments, each a file for each layer;
# ranks take turns in writing them. It is written beside its place: without a dot in front of its name it is whole.

def save(folder, model, optimizer=None, state=None):
    """Write a checkpoint, in the place of one of the same name; all ranks call this. `state` is rank 0's."""
    mesh = model.mesh
    folder = Path(folder)
    new = folder.with_name(f".{folder.name}.new")
    if any(folder.glob("*")) and not (folder / "state.pt").exists():
        raise ValueError(f"{folder} is something else than a checkpoint; save to a new folder")
    if mesh.rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        write_small_files(new, model)
        steps = optimizer and int(next(iter(optimizer.inner.state.values()))["step"])
        torch.save({"saved": time.time_ns(), "steps": steps, "state": state or {}}, new / "state.pt")
        read_state(new)                     # what load would refuse is refused now
    mesh.wait()
    kinds = optimizer.state if optimizer else {"model": None}
    for kind, values in kinds.items():
        files = {}
        for name, whole in model.hf_tensors(values):
            layer = model.specs[name].layer + 1
            if layer % mesh.size == mesh.rank:
                files.setdefault(layer, {})[name] = whole.to("cpu", copy=True)
        for layer, tensors in files.items():
            save_file(tensors, new / f"{kind}-{layer:05d}.safetensors")
    mesh.wait()
    if mesh.rank == 0:
        if folder.exists():                 # at every moment there is a whole one, if not for an instant in its place
            folder.rename(new / "old")
        new.rename(folder)
        shutil.rmtree(folder / "old", ignore_errors=True)
    mesh.wait()
def read_state(folder):
    return torch.load(folder / "state.pt", weights_only=True)

def latest(folder):
    """The newest whole checkpoint: the folder itself, or one in it."""
    folder = Path(folder)
    found = [path.parent for path in (folder / "state.pt", *folder.glob("[!.]*/state.pt")) if path.exists()]
    return max(found, key=lambda path: read_state(path)["saved"], default=None)

@torch.no_grad()
def load(folder, model, optimizer=None):
    """Read a checkpoint, or the newest in a folder of them, onto any layout. Returns the state."""
    folder = latest(folder) or Path(folder)
    about = read_state(folder)
    model.load_hf(read_folder(folder))
    if optimizer:
        for kind, values in optimizer.state.items():
            model.fill(read_folder(folder, kind), values)
        for state in optimizer.inner.state.values():
            state["step"].fill_(about["steps"])
    return about["state"]

def merge(folder, out):
    """A Hugging Face directory from a checkpoint, file by file: in the memory of a layer."""
    folder = latest(folder) or Path(folder)
    out = Path(out)
    read_state(folder)                      # or it is no checkpoint
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "state.pt"))
    dtype = Config.from_pretrained(out).dtype
    where = {}
    for path in folder.glob("model-*"):
        tensors = {name: x.to(dtype) for name, x in load_file(path).items()}
        save_file(tensors, out / path.name, {"format": "pt"})
        where |= dict.fromkeys(tensors, path.name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return out

TINY = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096)
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

def tiny_model(folder, seed=0, **overrides):
    """A model directory, of a random Qwen3 with 0.8 M parameters for 256 bytes and Qwen's special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Tokenizer
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    settings = TINY | dict(vocab_size=len(words), eos_token_id=258, pad_token_id=256) | overrides
    Qwen3(Config(**settings), dtype=torch.float32, device="cpu", seed=seed).save_pretrained(folder)
    vocab = {word: i for i, word in enumerate(words)}
    GPT2Tokenizer(vocab, [], pad_token=words[256], eos_token=words[258], chat_template=CHAT_TEMPLATE,
                  additional_special_tokens=[words[257]]).save_pretrained(folder)
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

def loss(model, hidden, batch):             # at the last stage: a scalar, and what run is to return
    logprob, _ = model.logprobs(hidden.index_select(0, batch["predict"]), batch["targets"])     # [predicted]
    total = -logprob.sum() / batch["count"]
    return total, total.detach()

def learn(model, documents, capacity):
    """Six steps, each in a line. Returns the losses. MFU: of an H200's 989 TFLOP/s in bf16."""
    mesh = model.mesh
    optimizer = AdamW(model, lr=3e-3, clip=1.0)
    lengths = [len(document) for document in documents]
    count = sum(lengths) - len(lengths)                     # of tokens that are predicted
    bins = pack(lengths, capacity, mesh.dp)[mesh.dp_rank::mesh.dp]
    batches = [micro_batch([documents[i] for i in rows]) | {"count": count} for rows in bins]
    losses = []
    for step in range(6):
        start = time.perf_counter()
        total = torch.as_tensor(sum(run(model, batches, loss)) / mesh.tp, dtype=torch.float64, device=mesh.device)
        optimizer.step()
        if mesh.size > 1:
            dist.all_reduce(total)
        losses.append(total.item())
        ms = 1e3 * (time.perf_counter() - start)
        mfu = training_flops(model.config, lengths) / ms / mesh.size / 989e9
        memory = torch.cuda.max_memory_allocated() / 2**30
        if mesh.rank == 0:
            print(f"{step=} loss={total:.6f} dp={mesh.dp} pp={mesh.pp} tp={mesh.tp} micro_batch={capacity} ms={ms:.0f} "
                  f"tokens_per_s={1e3 * sum(lengths) / ms:.0f} mfu={mfu:.1%} gib={memory:.1f}", flush=True)
    return losses

def main():
    if sys.argv[1:2] == ["merge"]:
        return print(merge(*sys.argv[2:]))
    settings = arguments(Settings)
    mesh = init(settings.dp, settings.pp, settings.tp, settings.device)
    make = partial(Qwen3, recompute=settings.recompute, sequence_parallel=settings.sequence_parallel)
    if settings.bench:
        model = make(Config(), mesh)
        documents = [np.arange(1024)] * 128 * mesh.dp       # which words these are does not matter
        learn(model, documents, 8192)
        learn(model, documents, 16_384)
    else:                                                   # to count, on the mesh and alone
        config = Config(**TINY, vocab_size=256)
        documents = [(7 * d + 3 * np.arange(40 + d)) % 256 for d in range(16)]
        losses = learn(make(config, mesh), documents, 128)
        if mesh.rank == 0:
            alone = learn(make(config, device=mesh.device), documents, 128)
            print(f"the largest difference to one process: {np.ptp([losses, alone], axis=0).max():.1e}")
    if mesh.size > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    with mistakes():
        main()
