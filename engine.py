"""engine.py: a paged generator with vLLM's face, whose logprobs are the trainer's, bit for bit.

    add_request --> waiting --> running --> one step of the model --> tokens of the step before --> RequestOutput
                       ^  schedule |  launch  (a CUDA graph; what it samples       read
                       +-preempted-+           feeds the next step on the GPU)

    cache, 16 tokens a page, all layers      | page 0 | page 1 | page 2 | ...      equal beginnings share pages (here 7)
    table of pages     seat 0 | 7 2 9 .      and a free page keeps what it held until it is overwritten: what is free
                       seat 1 | 7 4 . .      is the prefix cache

A sample depends on (seed, position) alone, so no schedule changes a token. For training, weights are replaced in
place, and every token knows its logprob and the version of the weights that made it. An engine is used by one thread.

    from engine import LLM, SamplingParams                                  # as from vllm
    outputs = LLM("Qwen/Qwen3-0.6B", max_model_len=4096).generate(["2 + 2 ="], SamplingParams(n=4, max_tokens=64))
    python engine.py                                                the demo; on a GPU speeds, too (--bench: only them)
    python engine.py --model Qwen/Qwen3-0.6B "Why is the sky blue?"
    torchrun --nproc-per-node 2 engine.py --tensor_parallel_size 2 --model Qwen/Qwen3-0.6B "Why is the sky blue?"
"""
import json, math, os, random, sys, tempfile, time, weakref
from bisect import bisect_left
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from kernels import flash_attention, paged_attention, sample, store_kv
from parallel import Config, Mesh, Qwen3, arguments, init, local_folder, mistakes, tiny_model

# --- exactness: what it takes that engine and trainer compute the same bits ------------------------------------------
# LLM(exact=True) reports logprobs that equal, by ==, those of the trainer's forward pass over packed sequences. For
# that nothing of a token may depend on which others are computed with it:
#   attention  decoding reads the cache in one split, in tiles of 64 keys like flash attention, and both add up the
#              weights of a row column by column: the order of a sum across a row follows from the shape of the tile.
#   products   cuBLASLt sums a row of any batch in one order, unless it splits the inner dimension to keep the GPU busy
#              with few rows. Without workspace it cannot. That costs nothing from 16 rows on, so a decode step has as
#              many. (allow_splitk=False forbids it, too, but then `down` takes 69 us instead of 7 up to 127 rows.)
#   the head   the logprob comes from the trainer's linear_cross_entropy, which is cut alike for any number of rows.
# Workspaces are made with the first product, so this stands here. A trainer that imports this file gets the same.
os.environ["CUBLASLT_WORKSPACE_SIZE"] = "1"
os.environ["TORCH_CUBLASLT_UNIFIED_WORKSPACE"] = "0"    # cuBLAS keeps its own: or a launch takes 85 us instead of 10
if torch.backends.cuda.is_built():
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

# --- what a request asks for, and what it gets -----------------------------------------------------------------------
@dataclass
class SamplingParams:
    n: int = 1                                          # samples of one prompt
    temperature: float = 1.0                            # 0 is greedy
    top_p: float = 1.0                                  # the fewest tokens that hold this much of the probability
    top_k: int = -1                                     # the most probable tokens; -1 or 0: all
    seed: int | None = None                             # the same seed and prompt: the same tokens, in any company
    max_tokens: int | None = 16                         # None: until max_model_len
    stop: str | list[str] | None = None                 # text that ends the output, and is left out of it
    stop_token_ids: int | list[int] | None = None       # like the model's own end-of-sequence tokens
    ignore_eos: bool = False                            # go on past the model's own end-of-sequence tokens
    logprobs: int | None = None                         # of vLLM, ignored: each token's own always comes, as a float
    def __post_init__(self):
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        ids = self.stop_token_ids
        self.stop_token_ids = [ids] if isinstance(ids, int) else list(ids or [])
        heat = self.temperature == 0 or 1e-9 <= self.temperature < math.inf
        if self.n < 1 or not heat or not 0 < self.top_p <= 1 or "" in self.stop:
            raise ValueError(f"n = {self.n}, temperature = {self.temperature}, top_p = {self.top_p}, stop = {self.stop}"
                             ": take 1 or more, 0 (greedy) or at least 1e-9, a share from (0, 1], and no empty string")

@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list                                     # with the token that ended it
    logprobs: list                                      # of each, under softmax(logits / temperature), nothing cut off
    versions: list                                      # of the weights that made each
    finish_reason: str | None = None                    # "stop", "length" or "abort"
    stop_reason: int | str | None = None                # the stop string, or the one of stop_token_ids

@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list
    outputs: list                                       # of CompletionOutput
    finished: bool = True
    def __getitem__(self, name: str):                   # output["text"], of the first: some programs know only one
        return getattr(self.outputs[0], name)

@dataclass(eq=False)
class Request:
    """One sequence, by two counters: `total` tokens exist, the last perhaps only on the device, and `computed` of them
    are in the cache. A new prompt, a chunk of it, a cached prefix, a decode step and starting over after preemption
    differ in nothing else: [ computed | this step | later ] = total. Reaching the total samples one more."""
    whole: RequestOutput                                # of all samples of the prompt
    output: CompletionOutput                            # of this one
    params: SamplingParams
    tokens: list                                        # known here: the prompt, then what was read from the device
    limit: int                                          # tokens in all at which it ends
    stops: set                                          # tokens that end it, with the model's own
    seed: int
    total: int
    computed: int = 0
    seat: int = -1                                      # its row in the tables while it runs
    pages: list = ()
    names: list = ()                                    # of what its full pages hold; names[0], b"", is of nothing

@dataclass
class Row:
    """Of a step: tokens [start:start + count] of a request."""
    request: Request
    start: int
    count: int
    samples: bool                                       # the next token, as these are all that there are

# --- pages: who holds which block of the cache, and what stands in it ------------------------------------------------
class Blocks:
    """The cache is `count` pages (vLLM: blocks) of `size` tokens. A page that no running request uses is free, but
    found again by what it holds until it is given out anew, oldest first: the free pages ARE the prefix cache. The name
    of what a page holds is a hash of its tokens and all before: `known` name -> page, `names` back. 0 is nobody's."""
    def __init__(self, count, size, caching=True):
        self.count = count
        self.size = size
        self.caching = caching
        self.refs = [0] * (count + 1)
        self.free = OrderedDict.fromkeys(range(1, count + 1))
        self.known = {}
        self.names = {}
    def name(self, tokens, number, before):             # of the number-th page, behind one of that name
        held = tokens[number * self.size:(number + 1) * self.size]
        return blake2b(before + repr(held).encode()).digest()
    def match(self, tokens):
        """Pages that hold the beginning of tokens, now in use, and their names. The last token is left to compute."""
        pages = []
        names = [b""]
        for number in range((len(tokens) - 1) // self.size):
            name = self.name(tokens, number, names[-1])
            if name not in self.known:
                break
            names.append(name)
            pages.append(self.known[name])
            self.free.pop(pages[-1], None)
            self.refs[pages[-1]] += 1
        return pages, names
    def take(self):
        page, _ = self.free.popitem(last=False)
        self.known.pop(self.names.pop(page, None), None)
        self.refs[page] = 1
        return page
    def remember(self, page, name):
        if self.caching and name not in self.known:     # if another page holds the same, that one is found
            self.known[name] = page
            self.names[page] = name
    def release(self, pages):
        for page in reversed(pages):                    # the end of a prefix goes before its beginning
            self.refs[page] -= 1
            if not self.refs[page]:
                self.free[page] = None
                if page not in self.names:              # of no use to anyone: the next to be given out
                    self.free.move_to_end(page, last=False)

# --- the schedule: which tokens are computed in the next step --------------------------------------------------------
class Scheduler:
    """First come, first served: running requests get their tokens, then waiting ones are let in while seats, pages and
    the budget of tokens last. If pages run out the youngest gives up its own and starts over later: its tokens stay.
    Nothing depends on time or addresses, so all ranks of a tensor-parallel group come to the same schedule. A running
    request has a seat: a row of arrays with what a step has to know of it, written once. In the last sits nobody."""
    def __init__(self, blocks, seats, width, max_num_batched_tokens):
        self.blocks = blocks
        self.budget = max_num_batched_tokens
        self.waiting = deque()
        self.running = []                               # in order of arrival
        self.seats = list(range(seats))                 # the free ones
        self.table = np.zeros([seats + 1, width], np.int32)         # pages
        self.settings = np.ones([4, seats + 1])         # seed (53 bits), top_k, top_p, temperature
        self.settings[1] = 0                            # top_k of empty rows: to look for the best takes 0.15 ms
        self.preemptions = 0
        self.cached_tokens = 0
    def schedule(self):
        """The rows of the next step. The counters are from here on as they will be after it."""
        rows = []
        budget = self.budget
        before = self.preemptions
        for request in [*self.running, *self.waiting]:
            if request.seat < 0 and (self.preemptions > before or not budget or not self.admit(request)):
                break                                   # who was preempted now has a token that is not yet read
            start = request.computed
            count = min(request.total - start, budget) if request.total < request.limit else 0
            if count and self.grow(request, start + count):
                rows.append(Row(request, start, count, start + count == request.total))
                request.computed += count
                request.total += rows[-1].samples
                budget -= count
        # Single tokens first, long contexts before short: the last to start are short (92% of a copy's rate, not 78%).
        return sorted(rows, key=lambda row: (row.count > 1, -row.start))
    def admit(self, request):                           # if its tokens fit into free pages
        if not self.seats:
            return False
        pages, names = self.blocks.match(request.tokens)
        if math.ceil(request.total / self.blocks.size) - len(pages) > len(self.blocks.free):
            self.blocks.release(pages)
            return False
        self.running.append(self.waiting.popleft())
        params = request.params
        seat = self.seats.pop()
        self.settings[:, seat] = request.seed, params.top_k, params.top_p, params.temperature
        self.table[seat, :len(pages)] = pages
        request.seat = seat
        request.pages = pages
        request.names = names
        request.computed = len(pages) * self.blocks.size
        self.cached_tokens += request.computed
        return True
    def grow(self, request, end):
        """Pages for so many tokens. False if it had to give up its own for older ones."""
        size = self.blocks.size
        while len(request.pages) * size < end:
            while not self.blocks.free:
                youngest = self.running[-1]
                self.preempt(youngest)
                if youngest is request:
                    return False
            page = self.blocks.take()
            self.table[request.seat, len(request.pages)] = page
            request.pages.append(page)
        # Remembered before the step has run: a layer writes keys before it reads, so siblings in this step share them.
        while len(request.names) * size <= min(end, len(request.tokens)):
            number = len(request.names) - 1
            request.names.append(self.blocks.name(request.tokens, number, request.names[-1]))
            self.blocks.remember(request.pages[number], request.names[-1])
        return True
    def preempt(self, request):                         # back to the front of the queue
        self.remove(request)
        self.waiting.appendleft(request)
        self.preemptions += 1
    def remove(self, request):
        """Out of the queue, or from its seat: then all of it is to be computed again."""
        if request.seat < 0:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self.blocks.release(request.pages)
        self.seats.append(request.seat)
        request.seat = -1
        request.computed = 0
    def retract(self):
        """All requests start over from the tokens known here, and nothing that the cache holds is believed any more."""
        for request in self.running[::-1]:
            self.preempt(request)
        self.blocks.known.clear()
        self.blocks.names.clear()
        for request in self.waiting:
            request.total = len(request.tokens)

# --- the runner: inputs, the forward pass, CUDA graphs ---------------------------------------------------------------
@dataclass
class Inputs:
    """What a step is told. Rows of one token stand first; those of more, chunks of a prompt, behind them."""
    tokens: Tensor                      # [3, tokens] the token, its position, the slot where its keys and values go
    rows: Tensor                        # [6, rows] seat, length after the step, seed, top_k, top_p, temperature
    table: Tensor                       # [rows, pages]
    singles: int                        # rows of one token; the others have, besides,
    chunks: list = ()                   # the last token of each row, where queries begin and end, where keys do, ...

def make_cache(model, pages, page, most, share):
    """[layers, 2, pages + 1, page, kv_heads, dim]; by itself as many pages as this share of a GPU (without one: a GiB)
    has room for beside all that is there, but at most so many. A step works in the rest of it."""
    config = model.config
    shape = [config.num_hidden_layers, 2, 1, page, max(1, config.num_key_value_heads // model.mesh.tp), config.head_dim]
    room = 2**30
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        room = free - int((1 - share) * total)
    fits = torch.tensor(min(most, room // (math.prod(shape) * model.dtype.itemsize)), device=model.device)
    if model.mesh.tp > 1:                               # all ranks the same
        dist.all_reduce(fits, dist.ReduceOp.MIN, model.mesh.tp_group)
    shape[2] += pages or max(1, fits.item())
    return torch.zeros(shape, dtype=model.dtype, device=model.device)

class Runner:
    """Rows of one token read their pages where they are, chunks theirs gathered. A step of single tokens only is one
    CUDA graph, head and sampler included: its inputs lie at fixed addresses and its sizes come from a short list, with
    empty rows at the end. What a step samples stays there, in `latest`, for the next, launched before it is read."""
    def __init__(self, model, cache, scheduler, graphs, exact):
        self.model = model
        self.cache = cache
        self.page = cache.shape[3]
        self.table = scheduler.table
        self.settings = scheduler.settings
        self.nobody = len(self.table) - 1
        self.exact = exact
        self.on_gpu = model.device.type == "cuda"
        self.with_graphs = graphs and self.on_gpu
        self.graphs = {}
        self.pool = None                                # memory that the graphs share
        self.sizes = [16, 32, 64, 96, *range(128, self.nobody + 64, 64)]    # few, since each has to be recorded
        self.latest = torch.zeros(len(self.table), dtype=torch.long, device=model.device)
    def launch(self, rows):
        """A step on its way: tokens, logprobs, and when they can be read."""
        size = len(rows)
        if self.on_gpu and rows[-1].count == 1:
            size = self.sizes[bisect_left(self.sizes, size)]
        x = self.inputs(rows, size)
        results = self.replay(x) if self.with_graphs and not x.chunks else self.forward(x)
        if not self.on_gpu:
            return *results, None
        results = [result.to("cpu", non_blocking=True) for result in results]
        return *results, torch.cuda.current_stream().record_event()
    def inputs(self, rows, size):                       # of these rows, and empty ones behind them
        ids = []
        for row in rows:                                # not known here: -1 - seat stands for what was sampled there
            ids += row.request.tokens[row.start:row.start + row.count] or [-1 - row.request.seat]
        empty = size - len(rows)
        where = [(row.request.seat, row.start, row.count) for row in rows] + [(self.nobody, 0, 1)] * empty
        seats, starts, counts = np.array(where).T
        ends = np.append(0, np.cumsum(counts))          # [rows + 1] where the tokens of each begin and end
        owner = np.repeat(np.arange(size), counts)      # [tokens] whose token it is
        positions = np.arange(len(owner)) + (starts - ends[:-1])[owner]
        lengths = starts + counts
        singles = int((counts == 1).sum())
        tokens = np.stack([ids + [0] * empty, positions, self.slots(seats[owner], positions)])
        table = self.table[seats, :math.ceil(lengths.max() / self.page)]
        x = Inputs(*map(self.send, (tokens, np.stack([seats, lengths, *self.settings[:, seats]]), table)), singles)
        if singles < size:
            k = lengths[singles:]
            context = np.concatenate([self.slots(row.request.seat, np.arange(n)) for row, n in zip(rows[singles:], k)])
            chunks = ends[1:] - 1, ends[singles:] - singles, np.append(0, np.cumsum(k)), context
            x.chunks = [*map(self.send, chunks), int(counts.max()), int(k.max())]
        return x
    def slots(self, seats, positions):
        pages = self.table[seats, positions // self.page].astype(np.int64)
        return pages * self.page + positions % self.page
    def send(self, array):
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.cache.device, non_blocking=True) if self.on_gpu else tensor
    def replay(self, x):
        size = x.rows.shape[1]
        if size not in self.graphs:
            self.graphs[size] = self.record(size)
        graph, mine, results = self.graphs[size]
        mine.tokens.copy_(x.tokens)
        mine.rows.copy_(x.rows)
        mine.table[:, :x.table.shape[1]].copy_(x.table)
        graph.replay()
        return results
    def record(self, size):                             # at its first use, over empty rows
        x = self.inputs([], size)
        x.table = self.send(self.table[[self.nobody] * size])
        self.forward(x)                                 # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            results = self.forward(x)
        self.pool = graph.pool()
        return graph, x, results
    @torch.inference_mode()
    def forward(self, x):
        """The token that each row samples, and its logprob under softmax(logits / temperature)."""
        ids, positions, slots = x.tokens
        seats, lengths, seeds, top_k = x.rows[:4].long()
        top_p, temperature = x.rows[4:].float()
        ids = torch.where(ids < 0, self.latest[(-1 - ids).clamp(min=0)], ids)
        attend = partial(self.attend, slots, lengths.int()[:x.singles], x.table[:x.singles], x.chunks)
        hidden = self.model(ids, positions, attend)                                     # [tokens, hidden]
        if x.chunks:
            hidden = hidden[x.chunks[0]]                                                # [rows, hidden]
        logits = self.model.logits(hidden)                                              # [rows, vocab]
        tokens, _, logprobs = sample(logits, temperature, top_k, top_p, seeds, lengths, return_full=True)
        if self.exact:
            heat = torch.where(temperature > 0, temperature, 1.0)                       # of greedy tokens: as at 1
            logprobs, _ = self.model.logprobs(hidden, tokens, heat)
        self.latest.index_copy_(0, seats, tokens)
        return tokens, logprobs
    def attend(self, slots, lengths, table, chunks, layer, q, k, v):
        """q, k, v [tokens, heads, dim]; the cache of a layer [pages, page, kv_heads, dim], twice."""
        k_cache, v_cache = self.cache[layer]
        store_kv(k, v, k_cache, v_cache, slots)
        singles = len(lengths)
        splits = 1 if self.exact else None              # None: as many as keep the GPU busy
        if not chunks:
            return paged_attention(q, k_cache, v_cache, table, lengths, splits=splits)
        _, q_ends, k_ends, context, *longest = chunks
        k, v = (cache.flatten(0, 1)[context] for cache in (k_cache, v_cache))
        many = flash_attention(q[singles:], k, v, q_ends.int(), k_ends.int(), *longest, covered=True)
        if not singles:
            return many
        one = paged_attention(q[:singles], k_cache, v_cache, table, lengths, None, splits)
        return torch.cat([one, many])

# --- the generator ---------------------------------------------------------------------------------------------------
def end_tokens(folder, config):
    """generation_config.json's, or the model's own, as in transformers."""
    ends = config.eos_token_id
    file = folder / "generation_config.json"
    if file.exists():
        ends = json.loads(file.read_text()).get("eos_token_id", ends)
    return set(ends) if isinstance(ends, list) else {ends}

def end_of_turn(tokenizer):
    """The token that ends an assistant's turn in the chat template; a base model's configuration names another."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    behind = tokenizer.apply_chat_template(talk, tokenize=False).rpartition("ANSWER")[2].lstrip()
    first, *_ = tokenizer.encode(behind, add_special_tokens=False) or [None]
    return first if first in tokenizer.added_tokens_decoder else None

class LLM:
    """Requests go in by generate, chat, stream or add_request, and each comes out once. With tensor_parallel_size > 1
    torchrun starts so many ranks: each runs all of this, is told the same and gets all outputs."""
    def __init__(self, model: str, *, tensor_parallel_size: int = 1, dtype: str | torch.dtype = "auto",
                 max_model_len: int | None = None, max_num_seqs: int = 512, max_num_batched_tokens: int = 16384,
                 block_size: int = 16, num_gpu_blocks_override: int | None = None,
                 gpu_memory_utilization: float = 0.9, enforce_eager: bool = False, enable_prefix_caching: bool = True,
                 async_scheduling: bool | None = None, seed: int = 0, device: str | None = None, exact: bool = False):
        tp = tensor_parallel_size
        if exact and tp > 1:
            raise ValueError(f"exact=True wants tensor_parallel_size = 1: {tp} GPUs add up a layer in another order")
        # One process needs no messages and looks at no environment: it may be an actor of a program under torchrun.
        self.mesh = init(tp=tp, device=device) if tp > 1 else Mesh(device=device)
        folder = local_folder(model)
        kind = None if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
        self.model = Qwen3.from_pretrained(folder, self.mesh, dtype=kind).requires_grad_(False)
        config = self.model.config
        self.max_model_len = min(max_model_len or config.max_position_embeddings, config.max_position_embeddings)
        self.ends = end_tokens(folder, config)
        there = any(folder.glob("tokenizer*"))          # else prompts are token ids, and outputs have no text
        self.tokenizer = AutoTokenizer.from_pretrained(folder) if there else None
        width = math.ceil(self.max_model_len / block_size)
        cache = make_cache(self.model, num_gpu_blocks_override, block_size,
                           max_num_seqs * width, gpu_memory_utilization)
        blocks = Blocks(cache.shape[2] - 1, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(blocks, max_num_seqs, width, max_num_batched_tokens)
        self.runner = Runner(self.model, cache, self.scheduler, not enforce_eager, exact)
        weakref.finalize(self, self.runner.graphs.clear)            # at exit, too, or NCCL waits for them for ever
        self.overlap = self.runner.on_gpu if async_scheduling is None else async_scheduling
        self.under_way = None                           # a step launched ahead, so that the GPU waits for no Python
        self.requests = {}                              # what is in flight: the samples of a prompt, by its id
        self.finished = {}                              # what nobody has fetched yet
        self.seed = seed
        self.count = 0                                  # prompts so far
        self.weight_version = 0
        if self.runner.on_gpu:                          # compiles the kernels: 10 s on a machine that has not yet
            self.generate([[0, 0]], use_tqdm=False)
    def add_request(self, prompt, sampling_params=None):
        """Its id. Some step() will return its output. A prompt is a string, token ids, or a dict with either."""
        params = replace(sampling_params or SamplingParams())       # later changes by its owner change no request
        if not isinstance(prompt, dict):
            prompt = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
        ids = prompt.get("prompt_token_ids")
        if ids is None:
            ids = self.tokenizer.encode(prompt["prompt"])
        if not 0 < len(ids) < self.max_model_len:
            raise ValueError(f"the prompt has {len(ids)} tokens; give at least one, and leave room for an answer: "
                             f"max_model_len is {self.max_model_len}")
        if min(ids) < 0 or max(ids) >= self.model.config.vocab_size:
            raise ValueError(f"token ids {min(ids)} to {max(ids)}: the vocabulary has {self.model.config.vocab_size}")
        most = self.max_model_len if params.max_tokens is None else params.max_tokens
        limit = min(self.max_model_len, len(ids) + most)
        room = self.scheduler.blocks.count * self.scheduler.blocks.size
        if limit - 1 > room:                            # the last token takes none of it
            raise ValueError(f"prompt and max_tokens come to {limit} tokens, and the cache has {room}; lower "
                             "max_tokens, or raise num_gpu_blocks_override or gpu_memory_utilization")
        stops = set(params.stop_token_ids)
        if not params.ignore_eos:
            stops |= self.ends | prompt.get("ends", set())
        seed = (self.seed, self.count) if params.seed is None else params.seed
        whole = RequestOutput(str(self.count), prompt.get("prompt"), list(ids), [])
        family = self.requests[whole.request_id] = []
        self.count += 1
        for index in range(params.n):
            output = CompletionOutput(index, "", [], [], [])
            own = random.Random(f"{seed} {index}").getrandbits(53)
            whole.outputs.append(output)
            family.append(Request(whole, output, params, list(ids), limit, stops, own, total=len(ids)))
        self.scheduler.waiting.extend(family)
        if len(ids) >= limit:                           # max_tokens = 0
            for request in family:
                self.finish(request, "length")
        return whole.request_id
    def get_tokenizer(self):
        return self.tokenizer
    def has_unfinished(self):
        return bool(self.requests or self.finished)
    def step(self):
        """One step of the model for all requests in flight; returns those that are finished or aborted by now."""
        if self.requests:
            self.advance()
        done = list(self.finished.values())
        self.finished.clear()
        return done
    def advance(self):
        rows = self.scheduler.schedule()
        launched = (rows, *self.runner.launch(rows)) if rows else None
        if self.overlap:
            launched, self.under_way = self.under_way, launched
        if launched:
            self.absorb(*launched)
    def absorb(self, rows, tokens, logprobs, done):
        """Reads the tokens of a step. Who has ended by then is skipped: with overlap that is seen a step late."""
        if done is not None:
            done.synchronize()
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
            request = row.request
            output = request.output
            if not row.samples or output.finish_reason:
                continue
            request.tokens.append(token)
            output.token_ids.append(token)
            output.logprobs.append(logprob)
            output.versions.append(self.weight_version)
            stop = self.stop_string(output.token_ids, request.params.stop)
            if token in request.stops:
                self.finish(request, "stop", token if token in request.params.stop_token_ids else None)
            elif stop:
                self.finish(request, "stop", stop)
            elif len(request.tokens) >= request.limit:
                self.finish(request, "length")
    def stop_string(self, ids, stops):
        """The one that these tokens have come to: the last of them, since the others were looked at before."""
        if not stops:
            return None
        text = self.decode(ids[-8 - 4 * max(map(len, stops)):])     # a character is at most 4 tokens
        found = [(text.find(stop), stop) for stop in stops if stop in text]
        return min(found)[1] if found else None
    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True) if self.tokenizer else ""
    def finish(self, request, reason, stop_reason=None):
        self.scheduler.remove(request)
        output = request.output
        output.finish_reason = reason
        output.stop_reason = stop_reason
        output.text = self.decode(output.token_ids)
        if isinstance(stop_reason, str):
            output.text = output.text.partition(stop_reason)[0]
        elif reason == "stop":                          # the token that ended it is no text
            output.text = self.decode(output.token_ids[:-1])
        whole = request.whole
        if all(other.finish_reason for other in whole.outputs):
            self.finished[whole.request_id] = whole
            del self.requests[whole.request_id]
    def abort(self, request_id):
        """Ends a request in whatever state; the next step() returns what there is of it."""
        for request in self.requests.get(request_id, []):
            if not request.output.finish_reason:
                self.finish(request, "abort")
    def generate(self, prompts, sampling_params=None, use_tqdm=True):
        """Outputs in the order of prompts: one or a list of strings, ids or dicts, with one SamplingParams or many."""
        if isinstance(prompts, (str, dict)) or len(prompts) and isinstance(prompts[0], (int, np.integer)):
            prompts = [prompts]
        if not hasattr(sampling_params, "__len__"):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(sampling_params)} sampling_params")
        silent = not use_tqdm or self.mesh.tp_rank > 0 or None             # None: without a terminal
        ids = []
        try:
            for pair in zip(prompts, sampling_params):
                ids.append(self.add_request(*pair))
            with tqdm(total=len(ids), disable=silent, unit="request") as bar:
                while set(ids) - self.finished.keys():
                    self.advance()
                    bar.update(len(self.finished.keys() & ids) - bar.n)
            return [self.finished.pop(request_id) for request_id in ids]
        finally:                                        # interrupted, or one was refused: what is left ends here
            for request_id in ids:
                self.abort(request_id)
                self.finished.pop(request_id, None)
    def conversation(self, messages, **settings):
        """The prompt that it makes. An answer ends with its turn."""
        settings = {"add_generation_prompt": True} | settings
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids, "ends": {end_of_turn(self.tokenizer)}}
    def chat(self, messages, sampling_params=None, use_tqdm=True, chat_template_kwargs=None):
        """One conversation, a list of {"role", "content"}, or a list of them."""
        talks = [messages] if isinstance(messages[0], dict) else messages
        prompts = [self.conversation(talk, **(chat_template_kwargs or {})) for talk in talks]
        return self.generate(prompts, sampling_params, use_tqdm)
    def stream(self, prompt, sampling_params=None):
        """The text of one sample in pieces of whole characters, without what may be a stop string's beginning."""
        request_id = self.add_request(prompt, sampling_params)
        request = self.requests[request_id][0]
        held = max(map(len, request.params.stop), default=1) - 1
        shown = 0
        try:
            while not request.output.finish_reason:
                text = self.decode(request.output.token_ids).rstrip("\ufffd")
                text = text[:max(shown, len(text) - held)]
                if text[shown:]:
                    yield text[shown:]
                shown = len(text)
                self.advance()
            if request.output.text[shown:]:
                yield request.output.text[shown:]
        finally:                                        # also when nobody wants the rest
            self.abort(request_id)
            self.finished.pop(request_id, None)
    def update_weights(self, source, version=None):
        """Hugging Face's names with tensors or arrays, as a mapping or in pairs, loaded in place: graphs stay valid.
        The cache forgets; requests in flight keep their tokens and go on. The version goes with later tokens."""
        weights = dict(source)                          # not before all of them are at hand
        if self.under_way:
            self.absorb(*self.under_way)
            self.under_way = None
        self.scheduler.retract()
        self.model.load_hf(weights)
        self.weight_version = self.weight_version + 1 if version is None else version

# --- the demo, the terminal, the benchmark ---------------------------------------------------------------------------
@dataclass
class Settings:
    model: str | None = None            # a model directory or hub id; a question follows
    temperature: float = 0.6            # 0 is greedy
    max_tokens: int = 2048              # the longest answer, in tokens
    tensor_parallel_size: int = 1       # GPUs that share the model, under torchrun
    bench: bool = False                 # only the table of speeds

def workload(count, longest, seed=0):
    """Random prompts, and settings for answers, of uneven lengths: an engine that starts anew draws the same."""
    rng = random.Random(seed)
    sizes = [rng.randint(longest // 10, longest) for _ in range(2 * count)]
    prompts = [rng.choices(range(256), k=size) for size in sizes[:count]]
    return prompts, [SamplingParams(temperature=0.6, max_tokens=size, ignore_eos=True) for size in sizes[count:]]

def demo():
    torch.set_num_threads(1)                            # a tiny model gains nothing from more
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(folder)
        roomy = LLM(folder, max_model_len=512, exact=True)
        tight = LLM(folder, max_model_len=512, exact=True, num_gpu_blocks_override=24, max_num_batched_tokens=50)
    load = workload(24, 160)
    whole, small = (llm.generate(*load) for llm in (roomy, tight))
    same = [one["token_ids"] for one in small] == [one["token_ids"] for one in whole]
    print("a random model that speaks bytes; 24 prompts and answers of 16 to 160 tokens\n"
          f"  in a cache for one of them, in chunks, with {tight.scheduler.preemptions} preemptions: "
          f"{'the same' if same else 'OTHER'} tokens")
    if not same:
        sys.exit("the demo has failed")

def answer(settings, question):
    llm = LLM(settings.model, tensor_parallel_size=settings.tensor_parallel_size, max_num_seqs=1)
    params = SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens)
    for piece in llm.stream(llm.conversation([{"role": "user", "content": question}]), params):
        print(piece * (llm.mesh.tp_rank == 0), end="", flush=True)

def benchmark():
    gpu = torch.cuda.is_available()
    most, longest = (256, 1024) if gpu else (32, 128)   # on a GPU nano-vllm's workload, and Qwen3-0.6B's shapes
    with tempfile.TemporaryDirectory() as folder:
        (Qwen3(Config(), dtype=torch.bfloat16).save_pretrained if gpu else tiny_model)(folder)
        plain, exact = (LLM(folder, max_model_len=4096, num_gpu_blocks_override=20_000, exact=x) for x in (False, True))
    print(f"tokens/s of {most} requests, {longest // 10} to {longest} tokens in and as many out: plain, exact")
    for run, count in enumerate([most] * 4 + [1]):       # other words each time, or they were cached
        rates = []
        for llm in (plain, exact):
            start = time.perf_counter()
            outputs = llm.generate(*workload(count, longest, run), use_tqdm=False)
            rates.append(sum(len(one["token_ids"]) for one in outputs) / (time.perf_counter() - start))
        print(f"  run {run + 1}, {count:3} requests {rates[0]:9,.0f} {rates[1]:9,.0f}")

def main():
    words = sys.argv[1:]
    question = words.pop() if "--model" in words else ""
    settings = arguments(Settings, words)
    if question:
        answer(settings, question)
    elif not settings.bench:
        demo()
    if not question and (settings.bench or torch.cuda.is_available()):
        benchmark()

if __name__ == "__main__":
    with mistakes():
        main()
