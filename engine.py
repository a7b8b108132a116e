"""engine.py: a paged generator with vLLM's face.

    add_request --> waiting --> running --> one step of the model --> tokens of the step before --> RequestOutput
                       ^  schedule |  launch  (a CUDA graph; what it samples       read
                       +-preempted-+           feeds the next step on the GPU)

    cache, 16 tokens a page, all layers      | page 0 | page 1 | page 2 | ...       equal beginnings share pages (7),
    table of pages     seat 0 | 7 2 9 .      and a free page keeps what it held until it is overwritten: what is free
                       seat 1 | 7 4 . .      is the prefix cache

A request is a list of tokens and three counters: how many there are, how many are in the cache, how many get there in
this step. So chunked prompts, cached prefixes, decoding and starting over after preemption are one path. A sample
depends on (seed, position) alone, so no schedule changes a token. For training, weights are replaced in place, and
every token knows its logprob and the version of the weights that made it.

    from engine import LLM, SamplingParams                                  # as from vllm
    llm = LLM("Qwen/Qwen3-0.6B", max_model_len=4096)
    outputs = llm.generate(["2 + 2 ="], SamplingParams(temperature=0.6, n=4, max_tokens=64))
    print(outputs[0].outputs[0].text)

Public names: LLM (generate, chat, stream; add_request, step, abort, has_unfinished; update_weights, weight_version,
score, sleep, wake), SamplingParams, RequestOutput, CompletionOutput.

    python engine.py                                                the demo, and speeds beside transformers
    python engine.py --bench                                        speeds only; on a GPU, nano-vllm's workload
    python engine.py --model Qwen/Qwen3-0.6B "Why is the sky blue?"
    torchrun --nproc-per-node 2 engine.py --tensor_parallel_size 2 --model Qwen/Qwen3-0.6B "Why is the sky blue?"
"""
import itertools, json, math, random, sys, tempfile, threading, time, weakref
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from tqdm import tqdm

from kernels import flash_attention, paged_attention, sample, store_kv
from parallel import Config, Mesh, Qwen3, init, local_folder, packed, read_folder, tiny_model

# --- what a request asks for -----------------------------------------------------------------------------------------

def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)

def _whole(x) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)

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
    logprobs: int | None = None     # for vLLM's programs; the logprob of every token comes in any case, as a float

    def __post_init__(self):
        self.stop, self.stop_token_ids = ([] if x is None else [x] if isinstance(x, str) or not isinstance(x, Iterable)
                                          else list(x) for x in (self.stop, self.stop_token_ids))
        real = (int, float, np.number)
        _require(_whole(self.n) and self.n >= 1, f"n = {self.n!r}: ask for one sample or more")
        _require(isinstance(self.temperature, real) and (self.temperature == 0 or 1e-9 <= self.temperature < math.inf),
                 f"temperature = {self.temperature!r}: take 0 (greedy) or 1e-9 and more, or logits would overflow")
        _require(isinstance(self.top_p, real) and 0 < self.top_p <= 1, f"top_p = {self.top_p!r}: take it from (0, 1]")
        _require(_whole(self.top_k) and -1 <= self.top_k < 2**63, f"top_k = {self.top_k!r}: take -1 (all) or a count")
        _require(self.seed is None or _whole(self.seed), f"seed = {self.seed!r}: take an integer or None")
        _require(self.max_tokens is None or _whole(self.max_tokens) and self.max_tokens >= 0,
                 f"max_tokens = {self.max_tokens!r}: take 0 or more, or None for as many as fit")
        _require(all(isinstance(s, str) and s for s in self.stop), f"stop = {self.stop!r}: take strings, none empty")
        _require(all(map(_whole, self.stop_token_ids)), f"stop_token_ids = {self.stop_token_ids!r}: take integers")
        _require(self.logprobs in (None, 0, 1), "only the token's own logprob is kept: logprobs is None, 0 or 1")

def _derived(*parts) -> int:
    """A seed for each place in a tree of seeds."""
    return random.Random(repr(parts)).getrandbits(63)

@dataclass(eq=False)
class Request:
    """One sequence. Three counters tell its whole story. `total` tokens exist, the last of them perhaps only on the
    device; `computed` of them have their keys and values in the cache; `scheduled` more get them in this step. A new
    prompt, a chunk of it, a cached prefix, a decode step and starting over after preemption differ in these numbers
    and in nothing else:    [ computed | scheduled |  later  ] = total; a step that reaches total samples one more."""
    id: str
    prompt: str | None
    tokens: list[int]                                   # known here: the prompt, then what was read from the device
    params: SamplingParams
    limit: int                                          # tokens in all at which it ends
    stops: frozenset[int]                               # tokens that end it, with the model's own
    seed: int
    siblings: list["Request"]                           # the n samples of the prompt, this one too
    reader: "Text | None" = None                        # of its text, only where that is wanted before the end
    prompt_len: int = 0
    total: int = 0
    computed: int = 0
    scheduled: int = 0
    seat: int = -1                                      # its row in the tables while it runs
    pages: list[int] = field(default_factory=list)
    remembered: int = 0                                 # pages, from the first, that the prefix cache knows
    prefix: int = 0                                     # the cache's name for what they hold
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)   # of the weights that made each token
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self):
        self.prompt_len = self.total = len(self.tokens)

    def start_over(self) -> None:
        self.seat, self.pages, self.computed, self.remembered, self.prefix = -1, [], 0, 0, 0

    @property
    def needed(self) -> int:
        """Tokens still to compute before the next one can be sampled; 0 if its last token was sampled already."""
        return self.total - self.computed if self.total < self.limit else 0

# --- pages: who holds which block of the cache, and what stands in it ------------------------------------------------

class Blocks:
    """The cache is `count` pages, which vLLM calls blocks, of `size` tokens. A page has as many references as running
    requests use it; without any it is free, but keeps what it holds, and is found again by it until it is given out
    anew, oldest first. So the list of free pages IS the prefix cache.

        name of the prefix before + its tokens -> page         {(0, (5, 1)): page 7, (31, (8, 8)): page 2, ...}
        page -> name of the prefix that ends with it           name of page 7 = 31

    Names are given once and never again, and a dictionary compares whole keys: no two prefixes are taken for one,
    whatever their hashes."""

    def __init__(self, count: int, size: int, caching: bool = True):
        self.count, self.size, self.caching = count, size, caching
        self.refs = [0] * count
        self.free = OrderedDict.fromkeys(range(count))
        self.names = itertools.count(1)
        self.known: dict[tuple, int] = {}
        self.labels: list[tuple | None] = [None] * count            # page -> (its key in known, its name)

    def match(self, tokens: list[int]) -> tuple[list[int], int]:
        """Pages that hold the beginning of tokens, and the name of it. The last token is left to be computed."""
        pages, prefix = [], 0
        for start in range(0, len(tokens) - self.size, self.size):
            if (page := self.known.get((prefix, tuple(tokens[start:start + self.size])))) is None:
                break
            pages.append(page)
            prefix = self.labels[page][1]
        return pages, prefix

    def remember(self, page: int, prefix: int, tokens: list[int], start: int) -> int:
        """The page holds tokens[start:start + size] after that prefix; gives the name of the longer one."""
        if not self.caching:
            return 0
        key = prefix, tuple(tokens[start:start + self.size])
        first = self.known.setdefault(key, page)        # if another page holds the same, that one is found
        if self.labels[first] is None:
            self.labels[first] = key, next(self.names)
        return self.labels[first][1]

    def share(self, pages: list[int]) -> None:
        for page in pages:
            if not self.refs[page]:
                del self.free[page]
            self.refs[page] += 1

    def take(self) -> int:
        page, _ = self.free.popitem(last=False)
        if self.labels[page] is not None:
            del self.known[self.labels[page][0]]
            self.labels[page] = None
        self.refs[page] = 1
        return page

    def release(self, pages: list[int]) -> None:
        for page in reversed(pages):                    # the end of a prefix goes before its beginning
            self.refs[page] -= 1
            if not self.refs[page]:
                self.free[page] = None
                if self.labels[page] is None:           # of no use to anyone: the next to be given out
                    self.free.move_to_end(page, last=False)

# --- the schedule: which tokens are computed in the next step --------------------------------------------------------

class Scheduler:
    """First come, first served: running requests get their tokens, then waiting ones are let in while seats, pages
    and the budget of tokens last. If pages run out the youngest gives up its own and starts over later: its tokens
    stay, only their keys and values are computed again. Nothing here depends on time, addresses or other processes,
    so that all ranks of a tensor-parallel group come to the same schedule without a word."""

    def __init__(self, blocks: Blocks, table: np.ndarray, max_num_batched_tokens: int):
        self.blocks, self.table, self.budget = blocks, table, max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []                # in order of arrival
        self.seats = list(range(len(table)))[::-1]      # the free ones: rows of the table, which lists pages
        self.preemptions = self.cached_tokens = 0

    def schedule(self) -> list[Request]:
        batch, budget, preemptions = [], self.budget, self.preemptions
        for request in list(self.running):
            request.scheduled = min(request.needed, budget)
            if request.seat >= 0 and request.scheduled and self._grow(request):
                batch.append(request)
                budget -= request.scheduled
        while (self.waiting and self.seats and budget and self.preemptions == preemptions
               and self._admit(request := self.waiting[0])):
            self.running.append(self.waiting.popleft())
            request.scheduled = min(request.needed, budget)
            self._grow(request)
            batch.append(request)
            budget -= request.scheduled
        return batch

    def _admit(self, request: Request) -> bool:
        """Gives it a seat and what the cache holds of it, if the rest of its tokens fits into free pages."""
        pages, prefix = self.blocks.match(request.tokens)
        lacking = -(-request.total // self.blocks.size) - len(pages)
        if lacking > len(self.blocks.free) - sum(not self.blocks.refs[page] for page in pages):
            return False
        self.blocks.share(pages)
        request.seat, request.pages, request.prefix = self.seats.pop(), pages, prefix
        request.computed, request.remembered = len(pages) * self.blocks.size, len(pages)
        self.table[request.seat, :len(pages)] = pages
        self.cached_tokens += request.computed
        return True

    def _grow(self, request: Request) -> bool:
        """Pages for the scheduled tokens. False if it had to give up its own for older ones."""
        size, end = self.blocks.size, request.computed + request.scheduled
        while len(request.pages) * size < end:
            if self.blocks.free:
                self.table[request.seat, len(request.pages)] = page = self.blocks.take()
                request.pages.append(page)
            else:                                       # the youngest goes back to the front of the queue
                self.remove(youngest := self.running[-1])
                self.waiting.appendleft(youngest)
                self.preemptions += 1
                if youngest is request:
                    return False
        # Full pages are remembered at once, before the step has run: it writes keys and values of a layer before it
        # reads them, so siblings in the same step may share them already.
        while (request.remembered + 1) * size <= min(end, len(request.tokens)):
            page, start = request.pages[request.remembered], request.remembered * size
            request.prefix = self.blocks.remember(page, request.prefix, request.tokens, start)
            request.remembered += 1
        return True

    def advance(self, batch: list[Request]) -> list[bool]:
        """After the step is launched: the counters as they will be. True for requests that it samples a token for."""
        sampled = []
        for request in batch:
            request.computed += request.scheduled
            sampled.append(request.computed == request.total)
            request.total += sampled[-1]
        return sampled

    def remove(self, request: Request) -> None:
        """Takes it out, from where it waits or runs; its pages and its seat are free."""
        if request.seat < 0:
            return self.waiting.remove(request)
        self.running.remove(request)
        self.blocks.release(request.pages)
        self.seats.append(request.seat)
        request.start_over()

    def retract(self) -> None:
        """All requests start over from the tokens that are known here, and nothing in the cache is believed any more.
        Whatever state an exception has left things in, after this they are in order."""
        self.waiting.extendleft(reversed(self.running))
        self.running, self.seats = [], list(range(len(self.table)))[::-1]
        self.blocks = Blocks(self.blocks.count, self.blocks.size, self.blocks.caching)
        for request in self.waiting:
            request.start_over()
            request.total = len(request.tokens)

# --- text: characters out of tokens that come one by one -------------------------------------------------------------

class Text:
    """The text of a growing list of tokens. A character is there once all of its bytes are, and what may turn out to
    be the beginning of a stop string is not shown yet."""

    def __init__(self, tokenizer, stops: list[str]):
        self.decode = partial(tokenizer.decode, skip_special_tokens=True)
        self.stops, self.text, self.shown = stops, "", 0
        self.first = self.read = 0              # tokens [first:read] give the next ones their context (spaces)

    def push(self, ids: list[int]) -> str | None:
        """ids are all tokens so far. Gives the stop string that they have come to, and ends the text in front of it."""
        done = len(self.text)
        text = self.text + self.decode(ids[self.first:])[len(self.decode(ids[self.first:self.read])):]
        found = [(at, stop) for stop in self.stops if (at := text.find(stop, max(0, done - len(stop) + 1))) >= 0]
        if found:
            self.text = text[:min(found)[0]]
            return min(found)[1]
        if not text.endswith("\ufffd"):         # else bytes of its last character are still to come
            self.text, self.first, self.read = text, self.read, len(ids)

    def piece(self, whole: str | None = None) -> str:
        """What can be shown and was not yet; given the whole text, all the rest of it."""
        text, stops = (self.text, self.stops) if whole is None else (whole, [])
        held = max((k for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k])), default=0)
        start, self.shown = self.shown, max(self.shown, len(text) - held)
        return text[start:self.shown]

# --- the runner: buffers, the forward pass, CUDA graphs --------------------------------------------------------------

def _inputs(rows: int, tokens: int, width: int, place: Callable[[int], Tensor]) -> SimpleNamespace:
    """What a step is told, by name. It lies in one piece of memory, place(bytes), so it travels in one copy."""
    shapes = {"ids": (torch.int64, [tokens]), "positions": (torch.int64, [tokens]), "slots": (torch.int64, [tokens]),
              "seats": (torch.int64, [rows]), "seeds": (torch.int64, [rows]), "top_k": (torch.int64, [rows]),
              "temperature": (torch.float32, [rows]), "top_p": (torch.float32, [rows]),
              "lengths": (torch.int32, [rows]), "table": (torch.int32, [rows, width])}
    sizes = [-(-dtype.itemsize * math.prod(shape) // 8) * 8 for dtype, shape in shapes.values()]        # bytes
    memory = place(sum(sizes))
    parts = {name: part.view(dtype)[:math.prod(shape)].view(shape)
             for (name, (dtype, shape)), part in zip(shapes.items(), memory.split(sizes))}
    return SimpleNamespace(**parts, memory=memory)

@dataclass
class Launch:
    """A step on its way: read() waits for its tokens."""
    batch: list[Request]
    tokens: Tensor
    logprobs: Tensor
    done: "torch.cuda.Event | None"
    sampled: list[bool] = field(default_factory=list)   # whose token counts; the others have more of a prompt to come

    def read(self) -> tuple[list[int], list[float]]:
        if self.done is not None:
            self.done.synchronize()
        return self.tokens.tolist(), self.logprobs.tolist()

class Runner:
    """Runs the model over a paged cache. Requests that compute one token stand first and read their pages where they
    are; longer chunks follow, and read theirs gathered. A step of single tokens only is one CUDA graph, head and
    sampler included: its inputs lie at fixed addresses and its sizes come from a short list, with empty rows at the
    end. The token that a step samples stays on the device, in `latest`, for the next step, which is launched before
    anyone here has read it; -1 among the ids stands for it."""

    def __init__(self, model: Qwen3, table: np.ndarray, page: int, graphs: bool):
        self.model, self.table, self.page = model, table, page
        self.device, self.dtype = model.device, model.dtype
        self.kv_heads = max(1, model.config.num_key_value_heads // model.mesh.tp)
        self.on_gpu, (self.seats, self.width) = self.device.type == "cuda", table.shape
        self.with_graphs, self.graphs, self.cache, self.pool = graphs and self.on_gpu, {}, None, None
        self.sizes = sorted({*(s for s in (1, 2, 4, 8) if s < self.seats), *range(16, self.seats, 16), self.seats})
        self.latest = torch.zeros(self.seats + 1, dtype=torch.int64, device=self.device)    # one more, for empty rows

    def cache_shape(self, pages: int) -> list[int]:
        c = self.model.config
        return [c.num_hidden_layers, 2, pages, self.page, self.kv_heads, c.head_dim]

    def room(self, utilization: float, max_tokens: int) -> int:
        """Pages that fit beside weights and what a step holds: generously many elements a token, 16 bytes a logit."""
        page_bytes, most = math.prod(self.cache_shape(1)) * self.dtype.itemsize, self.seats * self.width
        if not self.on_gpu:                                                     # memory that is only touched when used
            return min(most, max(self.width, 2**30 // page_bytes))
        torch.cuda.empty_cache()
        c, (free, total) = self.model.config, torch.cuda.mem_get_info()
        widest = 8 * c.hidden_size + 6 * c.intermediate_size + 6 * c.num_attention_heads * c.head_dim
        step_bytes = self.dtype.itemsize * max_tokens * widest + 16 * self.seats * c.vocab_size
        pages = torch.tensor(int(utilization * total - (total - free) - step_bytes) // page_bytes, device=self.device)
        if self.model.mesh.tp_group is not None:                                # all ranks the same
            dist.all_reduce(pages, dist.ReduceOp.MIN, self.model.mesh.tp_group)
        _require(pages.item() > 0, "no memory is left for the cache; raise gpu_memory_utilization")
        return min(pages.item(), most)

    def allocate(self, pages: int) -> None:
        self.cache = torch.zeros(self.cache_shape(pages), dtype=self.dtype, device=self.device)

    def free(self) -> None:
        self.cache, self.graphs, self.pool = None, {}, None
        if self.on_gpu:
            torch.cuda.empty_cache()

    def launch(self, batch: list[Request]) -> Launch:
        # Single tokens first, the longest contexts before shorter ones: the programs of attention that start last are
        # then short ones, and no processor waits for a long one at the end (92% of a copy's rate, not 78%).
        batch = sorted(batch, key=lambda request: (request.scheduled > 1, -request.computed))
        tokens, rows = sum(request.scheduled for request in batch), len(batch)
        singles, chunks = sum(request.scheduled == 1 for request in batch), None
        if singles == rows and self.on_gpu:
            tokens = rows = singles = self.sizes[bisect_left(self.sizes, rows)]
        host = _inputs(rows, tokens, self.width, lambda n: torch.empty(n, dtype=torch.uint8, pin_memory=self.on_gpu))
        self._fill(host, batch)
        if singles < rows:
            chunks = self._chunks(batch[singles:], singles)
        if not self.on_gpu:
            return Launch(batch, *self._forward(host, singles, chunks), None)
        if self.with_graphs and chunks is None:
            graph, x, results = self._graph(rows)
            x.memory.copy_(host.memory, non_blocking=True)
            graph.replay()
        else:
            x = _inputs(rows, tokens, self.width, lambda n: host.memory.to(self.device, non_blocking=True))
            results = self._forward(x, singles, chunks)
        results = [torch.empty_like(y, device="cpu", pin_memory=True).copy_(y, non_blocking=True) for y in results]
        return Launch(batch, *results, torch.cuda.current_stream().record_event())

    def _fill(self, x: SimpleNamespace, batch: list[Request]) -> None:
        x, n = SimpleNamespace(**{name: part.numpy() for name, part in vars(x).items()}), len(batch)
        counts, starts, seats = np.array([(r.scheduled, r.computed, r.seat) for r in batch]).T
        owner = np.repeat(np.arange(n), counts)                                 # [tokens] the row of each token
        t, lengths = len(owner), starts + counts
        positions = np.arange(t) - (counts.cumsum() - lengths)[owner]
        x.ids[:t] = [i for r in batch for i in r.tokens[r.computed:r.computed + r.scheduled] or (-1,)]
        x.positions[:t] = positions
        x.slots[:t] = self.table[seats[owner], positions // self.page] * self.page + positions % self.page
        x.seats[:n], x.lengths[:n], used = seats, lengths, -(-lengths.max() // self.page)
        x.table[:n, :used] = self.table[seats, :used]
        x.seeds[:n] = [r.seed for r in batch]
        for name in ("top_k", "top_p", "temperature"):
            getattr(x, name)[:n] = [getattr(r.params, name) for r in batch]
        if n < len(x.seats):                            # empty rows: of length 0, at temperature 0, written nowhere
            for part in (x.ids, x.positions, x.seeds, x.top_k, x.top_p, x.temperature, x.lengths):
                part[n:] = 0
            x.slots[n:], x.seats[n:] = -1, self.seats

    def _send(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else tensor

    def _chunks(self, chunks: list[Request], singles: int) -> SimpleNamespace:
        """What attention needs of rows with more than one token: where each begins and ends, what it attends to."""
        q, k = [r.scheduled for r in chunks], [r.computed + r.scheduled for r in chunks]
        q_ends, k_ends = (np.cumsum([0, *lengths], dtype=np.int32) for lengths in (q, k))
        last, context = np.concatenate([np.arange(singles), singles - 1 + q_ends[1:]]), None
        if q != k:                          # some of it is in the cache only; else k and v are at hand
            slots = [(self.table[r.seat, :-(-n // self.page), None] * self.page + np.arange(self.page)).ravel()[:n]
                     for r, n in zip(chunks, k)]
            context = self._send(np.concatenate(slots))
        return SimpleNamespace(last=self._send(last), context=context, q_ends=self._send(q_ends),
                               k_ends=self._send(k_ends), longest=(max(q), max(k)))

    def _graph(self, rows: int) -> tuple:
        """Recorded at the first use of a size, over empty rows."""
        if rows not in self.graphs:
            x = _inputs(rows, rows, self.width, lambda n: torch.zeros(n, dtype=torch.uint8, device=self.device))
            x.slots.fill_(-1)
            x.seats.fill_(self.seats)
            self._forward(x, rows, None)                                        # compiles the kernels
            self.pool, graph = self.pool or torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                results = self._forward(x, rows, None)
            self.graphs[rows] = graph, x, results
        return self.graphs[rows]

    @torch.inference_mode()
    def _forward(self, x: SimpleNamespace, singles: int, chunks: SimpleNamespace | None) -> tuple[Tensor, Tensor]:
        ids = x.ids[:singles]
        torch.where(ids < 0, self.latest[x.seats[:singles]], ids, out=ids)
        hidden = self.model(x.ids, x.positions, partial(self._attend, x, singles, chunks))
        logits = self.model.logits(hidden if chunks is None else hidden[chunks.last]).contiguous()      # [rows, vocab]
        tokens, _, logprobs = sample(logits, x.temperature, x.top_k, x.top_p, x.seeds, x.lengths, return_full=True)
        self.latest.index_copy_(0, x.seats, tokens)
        return tokens, logprobs

    def _attend(self, x, singles, chunks, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cache, v_cache = self.cache[layer]                                    # [pages, page, kv_heads, dim]
        store_kv(k, v, k_cache, v_cache, x.slots)
        if chunks is None:
            return paged_attention(q, k_cache, v_cache, x.table, x.lengths)
        k, v = (new[singles:] if chunks.context is None else cache.flatten(0, 1)[chunks.context]
                for new, cache in ((k, k_cache), (v, v_cache)))
        many = flash_attention(q[singles:], k, v, chunks.q_ends, chunks.k_ends, *chunks.longest, covered=True)
        if not singles:
            return many
        one = paged_attention(q[:singles], k_cache, v_cache, x.table[:singles], x.lengths[:singles])
        return torch.cat([one, many])

    @torch.inference_mode()
    def score(self, texts: list[list[int]], temperature: float) -> list[list[float]]:
        """Each text whole, packed side by side, without the cache."""
        lengths = [len(text) for text in texts]
        ends = self._send(np.cumsum([0, *lengths], dtype=np.int32))
        tokens, positions = (self._send(np.concatenate(x)) for x in (texts, [np.arange(n) for n in lengths]))
        hidden = self.model(tokens, positions, packed(ends, max(lengths)))
        targets = tokens.roll(-1).index_fill_(0, ends[1:].long() - 1, -100)     # nothing follows the last token
        logprobs, _ = self.model.logprobs(hidden, targets, temperature)
        values = iter(logprobs.tolist())                                        # the last of each text is dropped
        return [[0.0, *itertools.islice(values, n)][:n] for n in lengths]

# --- the generator ---------------------------------------------------------------------------------------------------

@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]                                # with the token that ended it
    logprobs: list[float]                               # of each, under softmax(logits / temperature), nothing cut off
    versions: list[int]                                 # of the weights that made each
    finish_reason: str                                  # "stop", "length" or "abort"
    stop_reason: int | str | None = None                # the stop string, or the one of stop_token_ids

@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True

    def __getitem__(self, name: str):
        """output["text"], output["token_ids"]: of the first, for programs that know only one."""
        return getattr(self.outputs[0], name)

def _end_tokens(folder: Path, config: Config) -> frozenset[int]:
    """generation_config.json's, or the model's own, as in transformers."""
    file = folder / "generation_config.json"
    ends = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ends = config.eos_token_id if ends is None else ends
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])

def _several(prompts) -> list:
    _require(isinstance(prompts, (str, dict, list, tuple)), f"give a list of prompts, not {prompts!r:.80}")
    return [prompts] if isinstance(prompts, (str, dict)) or len(prompts) and all(map(_whole, prompts)) else prompts

class LLM:
    """Requests go in by generate, chat, stream or add_request, and each comes out once: finished or aborted. On a GPU
    the first run compiles kernels and records a graph for each batch size it meets: some 15 seconds. For
    tensor_parallel_size > 1 start the program on so many ranks by torchrun: each runs all of this, is told the same
    and gets all outputs. Threads may share an engine: what changes its state holds the lock."""

    def __init__(self, model: str, *, tensor_parallel_size: int = 1, dtype: str | torch.dtype = "auto",
                 max_model_len: int | None = None, max_num_seqs: int = 512, max_num_batched_tokens: int = 16384,
                 block_size: int = 16, num_gpu_blocks_override: int | None = None,
                 gpu_memory_utilization: float = 0.9, enforce_eager: bool = False, enable_prefix_caching: bool = True,
                 async_scheduling: bool | None = None, seed: int = 0, device: str | None = None):
        config = Config.from_pretrained(folder := local_folder(model))
        self.max_model_len = config.max_position_embeddings if max_model_len is None else max_model_len
        for name, value in dict(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
                                block_size=block_size, max_model_len=self.max_model_len, num_gpu_blocks_override=
                                1 if num_gpu_blocks_override is None else num_gpu_blocks_override).items():
            _require(_whole(value) and value >= 1, f"{name} = {value!r}: take a positive integer")
        _require(self.max_model_len <= (end := config.max_position_embeddings), f"max_model_len: positions up to {end}")
        _require(_whole(seed), f"{seed = }: take an integer")
        _require(0 < gpu_memory_utilization <= 1, f"{gpu_memory_utilization = }: take a share from (0, 1]")
        # One process needs no messages and looks at no environment: it may be an actor of a program under torchrun.
        self.mesh = Mesh(device=device) if tensor_parallel_size == 1 else init(tp=tensor_parallel_size, device=device)
        dtype = ("bfloat16" if self.mesh.device.type == "cuda" else "float32") if dtype == "auto" else dtype
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        _require(isinstance(kind, torch.dtype) and kind.is_floating_point, f"dtype = {dtype!r}: try auto or bfloat16")
        self.model = Qwen3.from_pretrained(folder, self.mesh, dtype=kind, sequence_parallel=False).requires_grad_(False)
        self.config, self.eos, self.seed, self.weight_version = config, _end_tokens(folder, config), int(seed), 0
        # Without a tokenizer prompts are token ids, and outputs have no text.
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if any(folder.glob("tokenizer*")) else None
        table = np.zeros([max_num_seqs, -(-self.max_model_len // block_size)], np.int32)
        self.runner = Runner(self.model, table, block_size, not enforce_eager)
        weakref.finalize(self, self.runner.free)    # at exit, too: NCCL would wait for ever for graphs that hold it
        pages = num_gpu_blocks_override or self.runner.room(gpu_memory_utilization, max_num_batched_tokens)
        self.runner.allocate(pages)
        self.scheduler = Scheduler(Blocks(pages, block_size, enable_prefix_caching), table, max_num_batched_tokens)
        # The next step is launched before the tokens of this one are read: the GPU never waits for Python.
        self.overlap = self.runner.on_gpu if async_scheduling is None else async_scheduling
        self.under_way: Launch | None = None
        self.requests: dict[str, list[Request]] = {}                # what is in flight, by id
        self.finished: dict[str, RequestOutput] = {}                # what nobody has fetched yet
        self.count, self.asleep, self.lock = 0, False, threading.RLock()

    def _token_ids(self, prompt) -> tuple[str | None, list[int]]:
        given = prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt}
        text, ids = given.get("prompt"), given.get("prompt_token_ids", given.get("prompt"))
        if isinstance(ids, str):
            _require(self.tokenizer is not None, "this model has no tokenizer: give the prompt as token ids")
            text, ids = ids, self.tokenizer.encode(ids)
        _require(isinstance(ids, Sequence) and all(map(_whole, ids)),
                 f"a prompt is a string, a list of token ids or a dict with either, not {prompt!r:.80}")
        _require(len(ids) > 0, "the prompt is empty; give at least one token")
        worst = min(ids) if min(ids) < 0 else max(ids)
        _require(0 <= worst < self.config.vocab_size, f"token id {worst}: the vocabulary has {self.config.vocab_size}")
        return text, list(map(int, ids))

    def _requests(self, prompt, params: SamplingParams | None, number: int) -> list[Request]:
        """The n siblings of the number-th prompt, or a ValueError. Nothing is changed yet."""
        _require(params is None or isinstance(params, SamplingParams), f"a SamplingParams, please, not {params!r:.80}")
        params = replace(params or SamplingParams())    # what its owner does with it from now on changes no request
        text, ids = self._token_ids(prompt)
        _require(len(ids) < self.max_model_len, f"the prompt has {len(ids)} tokens, and max_model_len = "
                 f"{self.max_model_len} leaves no room for an answer; shorten it or raise max_model_len")
        limit = min(len(ids) + (self.max_model_len if params.max_tokens is None else params.max_tokens),
                    self.max_model_len)
        room = self.scheduler.blocks.count * self.scheduler.blocks.size         # the last token takes none of it
        _require(limit - 1 <= room, f"prompt and max_tokens come to {limit} tokens, and the cache has {room}; lower "
                 "max_tokens or raise num_gpu_blocks_override")
        _require(not params.stop or self.tokenizer is not None, "stop strings need a tokenizer; use stop_token_ids")
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos)
        seed = _derived(self.seed, number) if params.seed is None else int(params.seed) % 2**63
        siblings: list[Request] = []
        siblings.extend(Request(str(number), text, list(ids), params, limit, stops, _derived(seed, i) if i else seed,
                                siblings, Text(self.tokenizer, params.stop) if params.stop else None)
                        for i in range(params.n))
        return siblings

    def _enqueue(self, prompts: Sequence, params: Sequence) -> list[list[Request]]:
        """The siblings of each prompt. If one prompt is refused, none is let in."""
        with self.lock:
            each = [self._requests(*pair, self.count + i) for i, pair in enumerate(zip(prompts, params))]
            self.count += len(each)
            self.requests |= {siblings[0].id: siblings for siblings in each}
            for request in itertools.chain(*each):
                self.scheduler.waiting.append(request)
                if request.total == request.limit:                      # max_tokens = 0
                    self._finish(request, "length")
        return each

    def add_request(self, prompt, sampling_params: SamplingParams | None = None) -> str:
        """Its id. Some step() will return its output."""
        return self._enqueue([prompt], [sampling_params])[0][0].id

    def get_tokenizer(self):
        return self.tokenizer

    def has_unfinished(self) -> bool:
        return bool(self.requests or self.finished)

    def step(self) -> list[RequestOutput]:
        """One step of the model for all requests in flight; returns those that are finished or aborted by now."""
        if self.requests:
            self._step()
        return [self.finished.pop(request_id) for request_id in list(self.finished)]

    def _step(self) -> None:
        with self.lock:
            _require(not self.asleep, "the engine is asleep: call wake() first")
            try:
                batch, launched = self.scheduler.schedule(), None
                if batch:
                    launched = self.runner.launch(batch)
                    launched.sampled = self.scheduler.advance(launched.batch)
                if self.overlap:
                    launched, self.under_way = self.under_way, launched
                self._absorb(launched)
            except BaseException:               # nothing is lost: the same seeds and positions sample the same tokens
                self.under_way = None
                self.scheduler.retract()
                raise

    def _absorb(self, launched: Launch | None) -> None:
        """Reads the tokens of a step. Who has ended by then is skipped: with overlap that is seen a step late."""
        rows = zip(launched.batch, launched.sampled, *launched.read()) if launched else ()
        for request, sampled, token, logprob in rows:
            if sampled and request.finish_reason is None:
                request.logprobs.append(logprob)
                request.versions.append(self.weight_version)
                request.tokens.append(token)
                self._check_end(request, token)

    def _check_end(self, request: Request, token: int) -> None:
        if token in request.stops:
            self._finish(request, "stop", token if token in request.params.stop_token_ids else None)
        elif request.reader and (stop := request.reader.push(request.tokens[request.prompt_len:])):
            self._finish(request, "stop", stop)
        elif len(request.tokens) == request.limit:
            self._finish(request, "length")

    def _finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        self.scheduler.remove(request)
        request.finish_reason, request.stop_reason = reason, stop_reason
        if all(r.finish_reason for r in request.siblings):
            outputs = [CompletionOutput(i, self._text(r), r.tokens[r.prompt_len:], r.logprobs, r.versions,
                                        r.finish_reason, r.stop_reason) for i, r in enumerate(request.siblings)]
            prompt_ids = request.tokens[:request.prompt_len]
            self.finished[request.id] = RequestOutput(request.id, request.prompt, prompt_ids, outputs)
            del self.requests[request.id]

    def _text(self, request: Request) -> str:
        if isinstance(request.stop_reason, str):
            return request.reader.text
        stopped = request.finish_reason == "stop"                   # the token that ended it is no text
        ids = request.tokens[request.prompt_len:len(request.tokens) - stopped]
        return self.tokenizer.decode(ids, skip_special_tokens=True) if self.tokenizer else ""

    def abort(self, request_id: str) -> None:
        """Ends a request in whatever state; the next step() returns what there is of it."""
        with self.lock:
            for request in [r for r in self.requests.get(request_id, ()) if r.finish_reason is None]:
                self._finish(request, "abort")

    def generate(self, prompts, sampling_params: SamplingParams | list[SamplingParams] | None = None,
                 use_tqdm: bool = True) -> list[RequestOutput]:
        """Outputs in the order of prompts: one, or a list, of strings, lists of token ids or dicts."""
        prompts = _several(prompts)
        many = sampling_params if isinstance(sampling_params, (list, tuple)) else [sampling_params] * len(prompts)
        _require(len(many) == len(prompts), f"{len(prompts)} prompts and {len(many)} sampling_params")
        ids, done = [siblings[0].id for siblings in self._enqueue(prompts, many)], {}
        try:
            with tqdm(total=len(ids), disable=not use_tqdm or self.mesh.tp_rank > 0, unit="request") as bar:
                while True:
                    done |= {i: self.finished.pop(i) for i in ids if i in self.finished}
                    bar.update(len(done) - bar.n)
                    if len(done) == len(ids):
                        return [done[i] for i in ids]
                    self._step()
        except BaseException:                                       # what is not over ends here; the rest goes on
            for i in ids:
                self.abort(i)
                self.finished.pop(i, None)
            raise

    def chat(self, messages: list, sampling_params: SamplingParams | list[SamplingParams] | None = None,
             use_tqdm: bool = True, chat_template_kwargs: dict | None = None) -> list[RequestOutput]:
        """One conversation, a list of {"role", "content"}, or a list of them."""
        _require(self.tokenizer is not None and self.tokenizer.chat_template, "this model has no chat template")
        talks = [messages] if messages and isinstance(messages, list) and isinstance(messages[0], dict) else messages
        _require(isinstance(talks, list) and all(isinstance(one, dict) for talk in talks for one in talk),
                 f'a conversation is a list of {{"role", "content"}}, not {messages!r:.80}')
        settings = dict(tokenize=False, add_generation_prompt=True) | (chat_template_kwargs or {})
        prompts = [{"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}
                   for text in (self.tokenizer.apply_chat_template(talk, **settings) for talk in talks)]
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(self, prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one sample, piece by piece."""
        _require(getattr(sampling_params, "n", 1) == 1 and bool(self.tokenizer), "stream wants n = 1 and a tokenizer")
        [[request]] = self._enqueue([prompt], [sampling_params])
        request.reader = request.reader or Text(self.tokenizer, [])
        try:
            while request.finish_reason is None:
                self._step()
                if piece := request.reader.piece():
                    yield piece
            if piece := request.reader.piece(self._text(request)):  # the rest, whoever took the step that ended it
                yield piece
        finally:                                                    # also when nobody wants the rest
            self.abort(request.id)
            self.finished.pop(request.id, None)

    def update_weights(self, source, version: int | None = None, mode: str = "retract") -> None:
        """New weights, in place, so that graphs stay valid: from a model directory or a mapping of Hugging Face's
        names to tensors or arrays. What the cache holds is forgotten. Requests in flight keep their tokens and go on
        under the new weights ("retract"), or end as they are ("abort"). The version goes with every token from here."""
        _require(mode in ("retract", "abort"), f"mode = {mode!r}: take 'retract' or 'abort'")
        _require(version is None or _whole(version), f"{version = }: take an integer")
        _require(isinstance(source, (str, Path, Iterable)), f"weights are a folder or a mapping, not {source!r:.80}")
        weights = dict(read_folder(local_folder(source)) if isinstance(source, (str, Path)) else source)
        _require(all("float" in str(getattr(x, "dtype", "")) for x in weights.values()), "weights have to be floats")
        with self.lock:                                             # not before all of them are at hand
            self._settle()
            self.model.load_hf(weights)
            self.weight_version = self.weight_version + 1 if version is None else int(version)
            for request_id in list(self.requests) if mode == "abort" else ():
                self.abort(request_id)

    def _settle(self) -> None:
        """Reads what is under way, and has all requests start over: nothing in the cache counts any more."""
        launched, self.under_way = self.under_way, None
        self._absorb(launched)
        self.scheduler.retract()

    def sleep(self) -> None:
        """Gives the memory of cache and graphs back; requests in flight keep their tokens and go on after wake()."""
        with self.lock:
            self._settle()
            self.runner.free()
            self.asleep = True

    def wake(self) -> None:
        if self.asleep:
            self.runner.allocate(self.scheduler.blocks.count)
            self.asleep = False

    def score(self, texts: list[list[int]], temperature: float = 1.0) -> list[list[float]]:
        """The logprob of each token given those before it, under softmax(logits / temperature); of the first, which
        has none before it, 0. Requests in flight are not touched."""
        texts = [self._token_ids(text)[1] for text in _several(texts)]
        _require(isinstance(temperature, (int, float)) and 1e-9 <= temperature < math.inf, "take a temperature above 0")
        _require(all(len(text) <= self.max_model_len for text in texts), "a text is longer than max_model_len")
        ends = itertools.accumulate(map(len, texts))                # in groups of about the tokens of a step
        groups = itertools.groupby(zip(texts, ends), lambda pair: pair[1] // self.scheduler.budget)
        with self.lock:
            return [row for _, group in groups for row in self.runner.score([text for text, _ in group], temperature)]

# --- the demo, the terminal, the benchmark ---------------------------------------------------------------------------

@dataclass
class Arguments:
    model: str | None = field(default=None, metadata={"help": "a model directory or hub id"})
    temperature: float = field(default=0.6, metadata={"help": "0 is greedy"})
    max_tokens: int = field(default=2048, metadata={"help": "the longest answer, in tokens"})
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the model, under torchrun"})
    bench: bool = field(default=False, metadata={"help": "only the table of speeds"})

def workload(count: int, length: Callable = lambda rng: int(4 * 64 ** rng.random()), seed: int = 0) -> tuple:
    """Random prompts, and settings for answers of random lengths: 4 to 256 tokens, many of them short, a few long."""
    rng, words = random.Random(0), random.Random(seed)                  # another seed: other words of the same lengths
    prompts = [[words.randrange(256) for _ in range(length(rng))] for _ in range(count)]
    return prompts, [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length(rng)) for _ in range(count)]

def demo() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(folder)
        prompts, params = workload(24)
        params = [replace(one, seed=i) for i, one in enumerate(params)]
        print("a random model that speaks bytes; 24 prompts and answers of 4 to 256 tokens")
        roomy, tight = (LLM(folder, max_model_len=512, **limits) for limits in (
            {}, dict(num_gpu_blocks_override=32, max_num_batched_tokens=50)))
        whole, small = (llm.generate(prompts, params, False) for llm in (roomy, tight))
        for prompt, one in zip(prompts, params):
            roomy.add_request(prompt, one)
        outputs = [output for _ in range(20) for output in roomy.step()]
        roomy.update_weights({name: weight * 1.1 for name, weight in roomy.model.hf_tensors()}, version=1)
        while roomy.has_unfinished():
            outputs += roomy.step()
        mixed = sum({0, 1} == set(output.outputs[0].versions) for output in outputs)
        same = [one["token_ids"] for one in small] == [one["token_ids"] for one in whole]
        print(f"  in a cache for one of them, in chunks, with {tight.scheduler.preemptions} preemptions: "
              f"{'the same' if same else 'OTHER'} tokens\n"
              f"  new weights after 20 steps: {mixed} went on under them, and their tokens know which made them\n"
              f"  streamed: {' '.join(map(repr, roomy.stream('hello', SamplingParams(seed=1, max_tokens=12))))}")
        if not same or not mixed:
            sys.exit("the demo has failed")

def answer(arguments: Arguments, prompt: str) -> None:
    llm = LLM(arguments.model, tensor_parallel_size=arguments.tensor_parallel_size, max_num_seqs=1)
    if llm.tokenizer is not None and llm.tokenizer.chat_template:
        prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                                   return_dict=False)
    params = SamplingParams(temperature=arguments.temperature, max_tokens=arguments.max_tokens)
    for piece in itertools.chain(llm.stream(prompt, params), "\n"):
        print(piece if llm.mesh.tp_rank == 0 else "", end="", flush=True)
    if llm.mesh.tp > 1:
        llm.sleep()                                     # frees the graphs
        dist.destroy_process_group()

def timed(call: Callable) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start                                                              # seconds

def watch(llm: LLM, prompts: list, params: list[SamplingParams]) -> str:
    """Where the time of a decode step goes, once prompts are computed: all of it, the graph alone, attention alone."""
    timed(lambda: [llm.add_request(*x) for x in zip(prompts, params)] + [llm.step() for _ in range(50)])
    step = timed(lambda: [llm.step() for _ in range(50)]) / 50
    runner, (graph, x, _) = llm.runner, llm.runner.graphs[max(llm.runner.graphs)]
    busy = timed(lambda: [graph.replay() for _ in range(50)]) / 50
    q = torch.randn(len(x.seats), llm.config.num_attention_heads, llm.config.head_dim, device="cuda").to(runner.dtype)
    attention = timed(lambda: [paged_attention(q, *layer, x.table, x.lengths) for layer in runner.cache])
    read = x.lengths.sum().item() * math.prod(runner.cache_shape(1)) // runner.page * runner.dtype.itemsize     # bytes
    return (f"a decode step takes {1e3 * step:.2f} ms, the GPU is busy for {1e3 * busy:.2f} of it, and for "
            f"{1e3 * attention:.2f} with attention, which reads {read / attention / 1e9:.0f} GB/s")

def theirs(folder: str, prompts: list, params: list[SamplingParams]) -> tuple[int, float]:
    """transformers: tokens that were asked for, and seconds. On a GPU generate_batch, with one length for all."""
    gpu, lengths = torch.cuda.is_available(), [one.max_tokens for one in params]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to("cuda" if gpu else "cpu").eval()
    settings = transformers.GenerationConfig(do_sample=True, temperature=0.6, pad_token_id=0, eos_token_id=None,
                                             max_new_tokens=sum(lengths) // len(lengths) if gpu else max(lengths))
    if gpu:
        call = partial(model.generate_batch, inputs=prompts, generation_config=settings)
        return settings.max_new_tokens * len(prompts), timed(call)
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    ids, seen = pad([*map(torch.tensor, prompts)]), pad([torch.ones(len(prompt), dtype=int) for prompt in prompts])
    return sum(lengths), timed(partial(model.generate, ids, attention_mask=seen, generation_config=settings))

def benchmark() -> None:
    def row(name: str, count: int, seconds: float) -> None:
        print(f"  {name:40}{count / seconds:9.0f} tokens/s{seconds:9.2f} s")

    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(1)                        # a tiny model gains nothing from more, neither here nor there
    with tempfile.TemporaryDirectory() as folder:
        (Qwen3(Config(), dtype=torch.bfloat16).save_pretrained if gpu else tiny_model)(folder)
        load = partial(workload, 256, lambda rng: rng.randint(100, 1024)) if gpu else partial(workload, 64)
        llm = LLM(folder, max_model_len=4096 if gpu else 512)
        for run, seed in (("first", 1), ("second", 0)):                         # other prompts, or they were cached
            prompts, params = load(seed=seed)
            count, total = len(prompts), sum(one.max_tokens for one in params)
            row(f"engine, {run} run of {count} requests", total, timed(partial(llm.generate, prompts, params, False)))
            seconds = timed(partial(llm.generate, prompts[:1], replace(params[0], max_tokens=300), False))
        row("engine, one request", 300, seconds)
        if gpu:
            print(f"  {watch(llm, prompts, params)}")
            llm.sleep()
        row(f"transformers, {'generate_batch, 64' if gpu else 'generate'}", *theirs(folder, prompts[:64], params[:64]))

def main() -> None:
    parser = transformers.HfArgumentParser(Arguments, description="see the first lines of engine.py")
    parser.add_argument("prompt", nargs="*")
    arguments = parser.parse_args()                         # an Arguments, and the prompt
    _require(bool(arguments.model) == bool(arguments.prompt), "give --model and a question, or neither")
    if arguments.model:
        return answer(arguments, " ".join(arguments.prompt))
    if not arguments.bench:
        demo()
    benchmark()

if __name__ == "__main__":
    main()
