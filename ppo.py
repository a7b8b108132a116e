"""ppo.py: asynchronous reinforcement learning. A model learns from its own samples: PPO, GRPO, RLOO, REINFORCE++.

    prompts --> generators (weights v, logprob mu a token) --> judges --> rollouts: an Arrow file a batch
       ^                                                                      |  (all ranks map it)
       |        trainer ranks: logprobs prox, reference, values --> advantages --> update critic, policy
       +------------ weights v+1: one object in shared memory, read without a copy <--+

`train` is the loop and `learn` the algorithm. Generators and judges are actors. Rank 0 of the trainers asks for batches
ahead of time, and the weights to use are an argument of each request: a generator that was started again has the right
ones, and there is no second way to synchronise.

    staleness 0     generate, train, generate, train: plain PPO, bit-exact from run to run
    staleness 1     batch t+1 is generated while batch t is trained on: all lag by 1, a batch is of one version
    staleness k     k batches ahead; running responses go on under new weights, so each token notes its own version

The trainer's kernels are not the engine's, and after a few batches neither are its weights. So there are three
distributions: mu, which a token was drawn from, by the engine's word; prox, the trainer's own before an update; and pi,
which is being trained. pi / prox is what PPO clips, and min(prox / mu, C) weighs it (arXiv 2505.24298).

Public names: Config, train; the mathematics as pure functions (gae, whiten, group_advantages, kl_estimate, correction,
token_rewards, overlong_penalty, OBJECTIVES, policy_loss, value_loss, loss_weights); lay_out, measure, estimate, update.

    python ppo.py                                                       the demo: SFT, then PPO, on arithmetic
    python ppo.py --model DIR --data F.jsonl --out RUN                  one GPU, which trainer and engine share
    torchrun --standalone --nproc-per-node 4 ppo.py --tp 2 --pp 2 ...   4 GPUs train, the others generate
    python ppo.py --rollout-only --steps 1 ... ; python ppo.py --replay RUN/rollouts/000000.arrow ...
    python evaluate.py show RUN/rollouts/000000.arrow                   reads them as a person would
"""
from __future__ import annotations

import asyncio, importlib.util, math, os, random, shutil, socket, sys, tempfile, time, warnings
from collections import Counter, deque
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

import actors, arrowlite, parallel, sft
from engine import LLM, SamplingParams
from evaluate import Graders, arithmetic, chat_prompts, load_problems
from parallel import AdamW, Mesh, Qwen3, init, latest, load, local_folder, run, save, tiny_model

# --- settings --------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    """The defaults are those of Qwen3-0.6B on eight GPUs, four of which generate."""
    model: str = ""                 # a Hugging Face directory or hub id: the policy, and the critic's beginning
    data: str = ""                  # problems with answers, as evaluate.py reads them: .jsonl, .arrow, a hub id
    eval_data: str = ""             # others that are held out, for a score every eval_every steps; math500, say
    out: str = ""                   # metrics.jsonl, curves.png, rollouts/, checkpoints/, and in the end model/
    resume: bool = False            # go on from the newest checkpoint in --out
    # the task
    reward: str = "math"            # or FILE.py:function, where function(response: str, row: dict) -> float
    #                                 row: its own columns, and of ours (problem, answer, prompt, ..) those it lacks
    batch: int = 256                # prompts a step
    samples: int = 1                # responses a prompt
    max_prompt: int = 1024          # tokens
    max_response: int = 3072        # tokens
    temperature: float = 1.0        # divides logits, in the engine and in the loss alike
    truncated: Literal["end", "bootstrap", "mask"] = "end"      # a response that was cut off: has what reward it got |
    #                                 goes on, and is worth what the critic says | teaches nothing
    overlong_buffer: int = 0        # tokens before max_response over which the reward falls by up to 1 (DAPO)
    drop_equal: bool = False        # leave out prompts whose responses all got the same reward (DAPO)
    # the algorithm
    advantage: Literal["gae", "grpo", "rloo", "reinforce++"] = "gae"        # gae: PPO, with a critic
    objective: Literal["ppo", "gspo", "cispo"] = "ppo"
    aggregate: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-norm"] = "token-mean"
    gamma: float = 1.0              # discount a token (gae)
    lam: float = 1.0                # lambda of gae: 1 trusts returns, 0 the critic
    clip_low: float = 0.2           # pi / prox has an effect within [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.28         # larger, so that unlikely tokens can grow (DAPO)
    dual_clip: float = 3.0          # bounds the loss of an action with a negative advantage; 0: does not
    cap: float = 2.0                # C of min(prox / mu, C)
    kl: Literal["none", "k1", "k2", "k3"] = "none"  # to the model at the start; k1 in the reward, k2 and k3 in the loss
    kl_coef: float = 0.001
    entropy_coef: float = 0.0
    value_clip: float = 0.2         # how far a value may move in a step; 0: anywhere
    critic_warmup: int = 0          # steps in which only the critic learns (gae)
    minibatches: int = 4            # optimizer steps a batch and epoch
    epochs: int = 1
    steps: int = 300
    lr: float = 1e-6                # of the policy
    critic_lr: float = 1e-5         # its head begins at 0
    warmup: int = 10                # steps over which both rise
    weight_decay: float = 0.0
    clip: float = 1.0               # largest norm of a gradient
    seed: int = 0
    # the machine
    staleness: int = 1              # batches that are generated ahead
    runtime: Literal["", "inline", "actors", "ray"] = ""        # empty: inline (one process) if no GPU is left over
    generators: int = 0             # 0: as many as there are GPUs left over, or one
    generator_tp: int = 1           # GPUs a generator
    graders: int = 4                # processes
    memory: float = 0.85            # share of a GPU that an engine takes
    pp: int = 1
    tp: int = 1
    micro_tokens: int = 16384       # tokens that are trained on at once, on a rank
    recompute: bool = False         # activations, layer by layer: less memory, a third more work
    device: str = ""                # cuda, cpu; empty: cuda if there is one
    dtype: str = ""                 # float32, bfloat16, float64; empty: what suits the device
    save_every: int = 50
    keep: int = 2                   # checkpoints
    log_every: int = 10             # steps from one line on the screen to the next; metrics.jsonl has them all
    eval_every: int = 10
    eval_temperature: float = 0.0   # 0: greedy
    wandb: str = ""                 # a project
    rollout_only: bool = False      # generate and grade, and do not train
    replay: str = ""                # train once, on this file of rollouts, and do not generate

# --- the mathematics: everything is [rows, slots] --------------------------------------------------------------------

# A row is one response, a slot of it a token that the model chose (an action); `mask` tells actions from padding.
# Whatever stands in other slots must not matter, be it NaN or 1e9, so every function begins by replacing it: x * mask
# would keep a NaN, and a torch.where at the end would still let it into the gradient.

def clean(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [torch.where(mask, x, torch.zeros_like(x)) for x in tensors]

def gae(rewards: Tensor, values: Tensor, mask: Tensor, last_value: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_l (gamma lam)^l delta_(t+l), delta_t = r_t + gamma V_(t+1) - V_t  (arXiv 1506.02438, eq. 16). Slots
    that do not count are stepped over. last_value [rows] is V behind the last action: 0, unless it goes on there."""
    rewards, values = clean(mask, rewards, values)
    advantages, ahead, following = torch.zeros_like(values), torch.zeros_like(last_value), last_value
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        ahead = torch.where(mask[:, t], delta + gamma * lam * ahead, ahead)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = ahead
    return clean(mask, advantages)[0]

def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0, variance 1 over all that the mask of the batch has: not of a rank, nor of a micro-batch."""
    count, (x,) = mask.sum().clamp(min=1), clean(mask, x)
    x, = clean(mask, x - x.sum() / count)
    return x * (x.square().sum() / count + 1e-8).rsqrt()

def group_advantages(kind: str, rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """Responses to one prompt are measured against each other, so that no critic is needed. groups [rows] numbers the
    prompts, which may have different numbers of rows. R is the sum of a row's rewards.
    grpo         (R - mean) / std of the group                         (arXiv 2402.03300, 4.1.2)
    rloo         R - mean of the others = (R - mean) n / (n - 1)       (arXiv 2402.14740, eq. 6)
    reinforce++  sum of the rewards from here on, minus the mean if there are others; whitened   (arXiv 2501.03262)
    For the first two, a row that is alone in its group says nothing: 0."""
    rewards, = clean(mask, rewards)
    score = rewards.sum(1)                                                  # [rows]
    members = torch.nn.functional.one_hot(groups).to(score)                 # [rows, groups]
    def total(x):                                                           # of a row's group, at each of its rows
        return (x @ members)[groups]                                        # index_add would sum in any order on a GPU
    count = total(torch.ones_like(score))
    mean, others = total(score) / count, (count - 1).clamp(min=1)
    if kind == "reinforce++":
        to_come = rewards.flip(1).cumsum(1).flip(1)
        return whiten(to_come - torch.where(count > 1, mean, 0)[:, None], mask)
    above = score - mean
    scale = 1 / ((total(above.square()) / others).sqrt() + 1e-6) if kind == "grpo" else count / others
    return clean(mask, (above * scale)[:, None].expand(mask.shape))[0]

def kl_estimate(kind: str, logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(pi || reference) a token, from samples of pi (joschu.net/blog/kl-approx.html). All three are right on average,
    but gradients are another matter: that of k1 is 0 on average (so k1 belongs into the reward, where it works out as
    the gradient of KL), that of k2 is the gradient of KL(pi || reference), that of k3 of KL(reference || pi)."""
    d = logprobs - reference
    return {"k1": d, "k2": d.square() / 2, "k3": torch.exp(-d) - 1 + d}[kind]

def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """0 down to -1 over the last `buffer` tokens (DAPO, arXiv 2503.14476, eq. 13)."""
    return -((lengths - (longest - buffer)) / max(buffer, 1)).clamp(0, 1) if buffer else torch.zeros_like(lengths)

def token_rewards(score: Tensor, mask: Tensor, penalty: Tensor | None = None) -> Tensor:
    """[rows, slots]: the score [rows] on the last action of a row, minus a penalty for each action."""
    slots = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, slots, -1).amax(1, keepdim=True)
    rewards = torch.where(slots == last, score[:, None], 0)
    return rewards if penalty is None else rewards - clean(mask, penalty)[0]

def correction(prox: Tensor, mu: Tensor, mask: Tensor, cap: float) -> Tensor:
    """The detached weight min(prox / mu, C): samples of mu, weighed as if they came from prox."""
    prox, mu = clean(mask, prox, mu)
    return (prox - mu).exp().clamp(max=cap).detach()

# Objectives: what a token loses under the policy, and whether it is clipped. log r = log pi - log prox.

def ppo_objective(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, c) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A), at most -C A where A < 0 (arXiv 1707.06347, eq. 7; the dual clip: arXiv 1912.09729)."""
    ratio = log_ratio.exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * advantages
    gain = torch.minimum(free, clipped)
    if c.dual_clip:
        gain = torch.where(advantages < 0, torch.maximum(gain, c.dual_clip * advantages), gain)
    return -gain, gain != free

def gspo_objective(log_ratio, logprobs, advantages, mask, c) -> tuple[Tensor, Tensor]:
    """PPO with one ratio a response, the geometric mean of its tokens' ratios (arXiv 2507.18071, eq. 5 to 7)."""
    mean = clean(mask, log_ratio)[0].sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return ppo_objective(mean.expand(mask.shape), logprobs, advantages, mask, c)

def cispo_objective(log_ratio, logprobs, advantages, mask, c) -> tuple[Tensor, Tensor]:
    """-sg(clip(r)) A log pi: a clipped token still has a gradient (arXiv 2506.13585, eq. 4, 5)."""
    ratio = log_ratio.detach().exp()
    clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
    return -clipped * advantages * logprobs, clipped != ratio

OBJECTIVES = {"ppo": ppo_objective, "gspo": gspo_objective, "cispo": cispo_objective}

def policy_loss(logprobs: Tensor, entropy: Tensor, part: dict, c: Config) -> tuple[Tensor, Tensor]:
    """The loss of each action, and which are clipped. `part` is what is fixed during an update, all [rows, slots]."""
    mask = part["mask"]
    logprobs, entropy, prox, advantages = clean(mask, logprobs, entropy, part["prox"], part["advantages"])
    log_ratio = (logprobs - prox).clamp(-20, 20)                            # exp(20): beyond any clip, not beyond fp32
    loss, clipped = OBJECTIVES[c.objective](log_ratio, logprobs, advantages, mask, c)
    loss = loss * correction(prox, part["mu"], mask, c.cap) - c.entropy_coef * entropy
    if c.kl in ("k2", "k3"):
        loss = loss + c.kl_coef * kl_estimate(c.kl, logprobs, clean(mask, part["reference"])[0])
    return torch.where(mask, loss, 0), clipped & mask

def value_loss(values: Tensor, part: dict, c: Config) -> tuple[Tensor, Tensor]:
    """Half the squared error; with value_clip the larger of it and that of a value within reach of the old one."""
    mask = part["mask"]
    values, old, returns = clean(mask, values, part["values"], part["returns"])
    error = (values - returns).square()
    near = (old + (values - old).clamp(-c.value_clip, c.value_clip) - returns).square() if c.value_clip else error
    return torch.maximum(error, near) / 2, (near > error) & mask

def loss_weights(mask: Tensor, how: str, longest: int) -> Tensor:
    """What each action's loss is multiplied by, so that the plain sum over all micro-batches and ranks is the loss of
    the minibatch. `mask` is that of the whole minibatch: a mean of means would not be the mean."""
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    rows = mask.any(1).sum().clamp(min=1)
    divisor = {"token-mean": mask.sum().clamp(min=1), "seq-mean-token-mean": rows * lengths,
               "seq-mean-token-sum": rows, "seq-mean-token-norm": rows * longest}[how]
    return mask.double() / divisor

# --- rollouts: an Arrow file a batch, and what training sees of it ---------------------------------------------------

def lay_out(table: arrowlite.Table, device) -> dict:
    """The columns as tensors, all on each rank: they are small, and advantages need the whole batch. Slot t of a row is
    read at the position before its t-th action: the logprob of the action, and the value of the state that it met.

        tokens     p  p  p  a  b  c  E         E ends the sequence: an action like any other
        position   0  1  2  3  4  5  6
        slot             0  1  2  3  4         a is action 0, and is read at position 2
        mask             1  1  1  1  0         slot 4 is the state behind the last action: it has a value, no action
    """
    prompts, responses = table["prompt_ids"].to_torch(), table["response_ids"].to_torch()
    lengths = torch.tensor([len(ids) for ids in responses])
    slots = torch.arange(int(lengths.max()) + 1)
    def padded(name):
        out = torch.zeros(len(lengths), len(slots), dtype=torch.float64)    # fp64: a few numbers a token cost nothing
        for row, values in zip(out, table[name].to_torch()):
            row[:len(values)] = values
        return out.to(device)
    return {
        "tokens": [torch.cat([p, r]).long() for p, r in zip(prompts, responses)],
        "prompt_lens": [len(ids) for ids in prompts],
        "lengths": lengths.to(device),                                      # [rows], actions
        "mask": (slots < lengths[:, None]).to(device),                      # [rows, slots], as all that follow
        "filled": (slots <= lengths[:, None]).to(device),
        "mu": padded("logprobs"), "versions": padded("versions"),
        "score": torch.tensor(table["reward"].to_pylist(), dtype=torch.float64, device=device),
        "cut": torch.tensor([reason == "length" for reason in table["finish_reason"].to_pylist()], device=device),
        "groups": torch.tensor(np.unique(table["group"].to_pylist(), return_inverse=True)[1], device=device)}

def micro_batches(batch: dict, rows: list[int], mesh: Mesh, capacity: int) -> list[dict]:
    """This rank's share of some rows, in packs of up to `capacity` tokens, or of the longest row if that is more."""
    sizes = [len(batch["tokens"][row]) for row in rows]
    packs = sft.pack(sizes, max(capacity, *sizes), mesh.dp)[mesh.dp_rank::mesh.dp]
    return [micro_batch(batch, [rows[i] for i in pack]) for pack in packs if pack]

def micro_batch(batch: dict, rows: list[int]) -> dict:
    tokens, prompt_lens = ([batch[name][row] for row in rows] for name in ("tokens", "prompt_lens"))
    ends = np.cumsum([0] + [len(x) for x in tokens])
    return {"tokens": torch.cat(tokens), "positions": torch.cat([torch.arange(len(x)) for x in tokens]),
            "cu_seqlens": torch.tensor(ends, dtype=torch.int32), "max_seqlen": max(map(len, tokens)),
            "at": torch.cat([torch.arange(start + n - 1, end) for start, end, n in zip(ends, ends[1:], prompt_lens)]),
            "targets": torch.cat([torch.cat([x[n:], torch.tensor([-100])]) for x, n in zip(tokens, prompt_lens)]),
            "rows": torch.tensor(rows)}     # at and targets, [slots in use]: where to read, and the action there

# --- the other processes: generators and judges ----------------------------------------------------------------------

class Generator:
    """One engine, or one rank of a tensor-parallel one. Calls overlap: their requests run in one batch, and every call
    turns the engine until its own are done. Weights come with a call; newer ones hold for what runs already, too."""
    def __init__(self, model: str, tp: int, options: dict):
        if not torch.cuda.is_available():
            torch.set_num_threads(1)                    # processes share the cores
        self.llm, self.tp = LLM(model, tensor_parallel_size=tp, **options), tp
        self.inbox, self.received, self.begun, self.running, self.version = deque(), 0, 0, {}, -1

    async def generate(self, samples: list[dict], sampling: dict, weights: dict) -> list[dict]:
        """The samples, with what was generated and the logprob (mu) of each token where it was drawn."""
        began = time.time()
        self.inbox.append((samples, sampling, weights))
        self.received += 1
        while any("response_ids" not in sample for sample in samples):
            self.llm.wake()
            while self.begun < self.agreed():
                self.begin(*self.inbox.popleft())
            for output in self.llm.step():
                self.end(self.running.pop(output.request_id), output.outputs[0])
            await asyncio.sleep(0)                      # here other calls come in, and take their turns
        return [sample | {"began": began, "ended": time.time()} for sample in samples]

    def agreed(self) -> int:
        """Calls that have reached every rank. All ranks must begin a call at the same step of the engine, or their
        schedules would part; and messages do not arrive everywhere at the same time."""
        if self.tp == 1:
            return self.received
        count = torch.tensor(self.received, device=self.llm.mesh.device)
        dist.all_reduce(count, dist.ReduceOp.MIN, self.llm.mesh.tp_group)
        return int(count)

    def begin(self, samples: list[dict], sampling: dict, weights: dict) -> None:
        self.begun += 1
        if weights["version"] > self.version:           # calls that a restart repeats come in any order
            self.version = weights["version"]
            self.llm.update_weights(unpack_weights(weights), version=self.version)
        for sample in samples:
            params = SamplingParams(seed=sample["seed"], **sampling)
            self.running[self.llm.add_request(sample["prompt_ids"], params)] = sample

    def end(self, sample: dict, output) -> None:
        sample |= {"response": output.text, "finish_reason": output.finish_reason,
                   "response_ids": np.array(output.token_ids, np.int32),
                   "logprobs": np.array(output.logprobs, np.float32), "versions": np.array(output.versions, np.int32)}

def pack_weights(model: Qwen3, version: int) -> dict:
    """The whole model as bytes on the CPU, at rank 0. numpy arrays are what actors and Ray share without a copy."""
    tensors = {}
    for name, x in model.hf_tensors() if model.mesh.dp_rank == 0 else ():       # gathered over tp and pp
        if model.mesh.rank == 0:
            x = x.detach().to("cpu", copy=True).contiguous()
            tensors[name] = x.flatten().view(torch.uint8).numpy(), x.dtype, x.shape
    return {"version": version, "tensors": tensors}

def unpack_weights(weights: dict) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not writable.*")                   # they are only copied from
        return {name: torch.from_numpy(data).view(dtype).view(shape)
                for name, (data, dtype, shape) in weights["tensors"].items()}

class Judge:
    """Gives responses their rewards. Those of `math` are made by evaluate.py's graders, in processes of their own."""
    def __init__(self, reward: str, graders: int, runtime: str):
        self.reward, self.function = reward, None if reward == "math" else load_function(reward)
        if self.function is None:
            self.graders = Graders(graders, ray=importlib.import_module("ray" if runtime == "ray" else "actors"))

    async def judge(self, samples: list[dict], part: int, parts: int) -> list[dict]:
        samples = samples[part::parts]
        if self.function is None:
            pairs = [(sample["response"], sample["answer"]) for sample in samples]
            rewards = [grade.score for grade in await self.graders.agrade(pairs)]
        else:
            rewards = [self.call(sample) for sample in samples]
        return [sample | {"reward": reward} for sample, reward in zip(samples, rewards)]

    def call(self, sample: dict) -> float:
        where = f"--reward {self.reward} on row {sample['row']} of --data ({sample['problem']!r:.80})"
        try:
            reward = float(self.function(sample["response"], sample | sample.pop("columns", {})))
        except Exception as error:
            raise ValueError(f"{where} raised {type(error).__name__}: {error}") from error
        if not math.isfinite(reward):
            raise ValueError(f"{where} gave {reward}; a reward is a finite number")
        return reward

def load_function(spec: str):
    """FILE.py:function"""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--reward {spec}: take math, or FILE.py:function of a file that exists")
    found = importlib.util.spec_from_file_location("reward_" + Path(path).stem, path)
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)       # dataclasses look for it there
    sys.path.append(str(Path(path).resolve().parent))                               # for files beside it
    found.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward {spec}: {path} has no function {name}(response, row)")
    return getattr(module, name)

class Inline:
    """Ray's words in one process. A call is a coroutine, which goes on while somebody waits: a breakpoint in a
    generator or a reward stops the whole program, there."""
    exceptions = actors.exceptions
    def __init__(self): self.loop = asyncio.new_event_loop()
    def init(self, **_): pass
    def shutdown(self): self.loop.close()
    def put(self, value): return value
    def get(self, refs): return [self.loop.run_until_complete(ref) for ref in refs]

    def remote(self, cls):
        make = SimpleNamespace(remote=lambda *args: Actor(self.loop, cls(*args)))
        make.options = lambda **_: make
        return make

    def wait(self, refs, num_returns=1):
        self.loop.run_until_complete(asyncio.wait(refs, return_when=asyncio.FIRST_COMPLETED))
        return [ref for ref in refs if ref.done()], [ref for ref in refs if not ref.done()]

@dataclass
class Actor:
    loop: asyncio.AbstractEventLoop
    instance: object
    def __getattr__(self, name: str):
        async def call(*args):
            args = [await arg if isinstance(arg, asyncio.Future) else arg for arg in args]
            return await getattr(self.instance, name)(*args)
        return SimpleNamespace(remote=lambda *args: self.loop.create_task(call(*args)))

# --- rank 0 asks for batches ahead of time, and keeps what comes back ------------------------------------------------

def spare_gpus() -> list[str]:
    """Those that no trainer has; if there are none such, all, to be shared."""
    if not torch.cuda.is_available():
        return []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = gpus if gpus[0] else [str(i) for i in range(torch.cuda.device_count())]
    return gpus[int(os.environ.get("LOCAL_WORLD_SIZE", 1)):] or gpus

class Rollouts:
    """Prompts and seeds of a batch follow from its number, so that is all that a checkpoint has to know of them."""
    def __init__(self, c: Config, problems: list[dict], held_out: list[dict], step: int, ahead: int):
        self.c, self.problems, self.held_out = c, problems, held_out
        self.asked, self.batches = step + ahead, {}     # those before are files; {number: refs of the rest}
        self.ray = Inline() if c.runtime == "inline" else importlib.import_module(c.runtime)
        Path(c.out, "rollouts").mkdir(exist_ok=True)
        gpus = spare_gpus()
        if gpus and c.runtime == "ray":
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)     # for Ray to give away; here CUDA runs already
        self.ray.init(ignore_reinit_error=True)
        self.generators = [self.spawn(i, gpus) for i in range(c.generators)]
        self.judges = [self.ray.remote(Judge).options(max_restarts=3, max_task_retries=3).remote(
            c.reward, c.graders, c.runtime) for _ in range(1 if c.reward == "math" else c.graders)]

    def spawn(self, number: int, gpus: list[str]) -> list:
        """The ranks of a generator. A single one that dies is started again, and gets its calls again; a group that
        has lost a rank is beyond repair, and the run ends with an error that says so."""
        c, tp = self.c, self.c.generator_tp
        options = {"dtype": c.dtype or "auto", "device": c.device or None, "gpu_memory_utilization": c.memory,
                   "max_model_len": c.max_prompt + c.max_response, "max_num_seqs": 1024}
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        def start(rank):                                # our own torchrun's variables are not for these ranks
            env = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": tp, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                   "TORCHELASTIC_USE_AGENT_STORE": False}
            if gpus and c.runtime == "actors":
                env["CUDA_VISIBLE_DEVICES"] = gpus[(number * tp + rank) % len(gpus)]
            return self.ray.remote(Generator).options(
                max_restarts=3 * (tp == 1), max_task_retries=3 * (tp == 1),
                num_gpus=int(bool(gpus) and c.runtime == "ray"),
                runtime_env={"env_vars": {name: str(x) for name, x in env.items()}}).remote(c.model, tp, options)
        return [start(rank) for rank in range(tp)]

    def samples(self, batch: int) -> list[dict]:
        rows = sft.rows_of_step(batch, len(self.problems), self.c.batch, self.c.seed).tolist()
        base = self.c.seed << 40 if self.c.seed < 2**23 else random.Random(self.c.seed).getrandbits(62)     # int64
        return [self.problems[row] | dict(row=row, group=group, sample=i, seed=base + group * self.c.samples + i)
                for group, row in enumerate(rows, batch * self.c.batch) for i in range(self.c.samples)]

    def ask(self, samples: list[dict], temperature: float, weights) -> tuple[list, list]:
        """Refs of what will be generated, and of what will be judged. No one waits here: data flows between actors."""
        sampling, generated, judged = {"temperature": temperature, "max_tokens": self.c.max_response}, [], []
        for i, ranks in enumerate(self.generators):
            share = [sample for sample in samples if sample["group"] % len(self.generators) == i]
            if share:
                refs = [rank.generate.remote(share, sampling, weights) for rank in ranks]
                generated += refs
                judged += [judge.judge.remote(refs[0], j, len(self.judges)) for j, judge in enumerate(self.judges)]
        return generated, judged

    def next(self, step: int, weights) -> Path:
        """The file of batch `step`. With these weights, batches up to `step + staleness` are asked for."""
        self.let_finish()
        for batch in range(self.asked, min(step + self.c.staleness, self.c.steps - 1) + 1):
            self.batches[batch] = self.ask(self.samples(batch), self.c.temperature, weights)
            self.asked = batch + 1
        path = self.collect(step)
        if self.c.runtime == "inline":                  # one GPU: its memory is for training now
            self.generators[0][0].instance.llm.sleep()  # no call: while one waits others run, and would wake it again
        return path

    def let_finish(self) -> None:
        """At staleness 1 a batch is of one version: new weights wait until the last one is generated."""
        if self.c.staleness == 1:
            self.results([ref for generated, _ in self.batches.values() for ref in generated])

    def results(self, refs: list) -> list:
        """Their values. The first of them that fails is an error at once, even if others will never come."""
        pending = refs
        while pending:
            ready, pending = self.ray.wait(pending)
            try:
                self.ray.get(ready)
            except self.ray.exceptions.RayActorError as error:
                raise RuntimeError(f"a generator or judge has died, and starting it again is no help: {error}; "
                                   "--resume goes on from the newest checkpoint") from error
        return self.ray.get(refs)

    def gather(self, generated: list, judged: list) -> list[dict]:
        return [sample for part in self.results(generated + judged)[len(generated):] for sample in part]

    def collect(self, batch: int) -> Path:
        path = Path(self.c.out, "rollouts", f"{batch:06d}.arrow")
        if batch in self.batches:
            samples = self.gather(*self.batches.pop(batch))
            samples.sort(key=lambda sample: (sample["group"], sample["sample"]))
            arrowlite.write(arrowlite.Table.from_pylist(samples), path)
        return path

    def finish(self, step: int) -> int:
        """All that is under way becomes files; how many they are from `step` on."""
        for batch in sorted(self.batches):
            self.collect(batch)
        return self.asked - step

    def score(self, weights) -> float:
        """Of answers to the held-out problems."""
        self.let_finish()
        samples = [problem | {"row": i, "group": i, "sample": 0, "seed": i} for i, problem in enumerate(self.held_out)]
        judged = self.gather(*self.ask(samples, self.c.eval_temperature, weights))
        return sum(sample["reward"] for sample in judged) / len(judged)

# --- training: three models read the batch, two of them learn from it ------------------------------------------------

def spread(x: Tensor, filled: Tensor) -> Tensor:
    """What was read at the slots in use [count], as [rows, slots]."""
    return torch.zeros(filled.shape, dtype=torch.float64, device=x.device).masked_scatter(filled, x.double())

def measure(model: Qwen3, batch: dict, c: Config) -> Tensor:
    """Logprobs, or of a critic values, of the whole batch on every rank [rows, slots]. Each number is known to one rank
    (of those that share a layer, count the first), so the sum over ranks is exact."""
    def read(model, hidden, micro):
        at = hidden[micro["at"]]
        found = model.value(at) if model.value_head else model.logprobs(at, micro["targets"], c.temperature)[0]
        return None, spread(found, batch["filled"][micro["rows"]])
    micros = micro_batches(batch, list(range(len(batch["tokens"]))), model.mesh, c.micro_tokens)
    found = torch.zeros_like(batch["mu"])
    for micro, numbers in zip(micros, run(model, micros, read, backward=False)):
        if model.mesh.tp_rank == 0:
            found[micro["rows"]] = numbers
    if model.mesh.size > 1:
        dist.all_reduce(found)
    return found

def estimate(batch: dict, c: Config) -> None:
    """From scores to advantages and returns; and which actions are learned from."""
    score = batch["score"] + overlong_penalty(batch["lengths"], c.max_response, c.overlong_buffer)
    penalty = c.kl_coef * kl_estimate("k1", batch["prox"], batch["reference"]) if c.kl == "k1" else None
    rewards, actions, cut = token_rewards(score, batch["mask"], penalty), batch["mask"], batch["cut"]
    keep = ~cut if c.truncated == "mask" else torch.ones_like(cut)
    if c.drop_equal:                                                        # by the score, before a penalty for KL
        keep &= ~equal_groups(score, batch["groups"])
    batch["actions"], batch["mask"] = actions, actions & keep[:, None]     # what was generated; what is learned from
    if c.advantage != "gae":
        batch["advantages"] = group_advantages(c.advantage, rewards, actions, batch["groups"])
        if c.advantage == "reinforce++":                # whitened over all, and now over what is learned from
            batch["advantages"] = whiten(batch["advantages"], batch["mask"])
        return
    behind = batch["values"].gather(1, batch["lengths"][:, None])[:, 0]             # [rows], of the state at the end
    behind = torch.where(cut, behind, 0) if c.truncated == "bootstrap" else torch.zeros_like(behind)
    advantages = gae(rewards, batch["values"], actions, behind, c.gamma, c.lam)
    batch["returns"] = advantages + batch["values"]
    batch["advantages"] = whiten(advantages, batch["mask"])

def equal_groups(score: Tensor, groups: Tensor) -> Tensor:
    """[rows]: did all responses to this prompt get the same?"""
    def extreme(which): return torch.zeros_like(score).scatter_reduce(0, groups, score, which, include_self=False)
    return (extreme("amax") == extreme("amin"))[groups]

def minibatches(batch: dict, c: Config, step: int, epoch: int) -> list[list[int]]:
    """Rows from which something is learned, in a new order, in parts. The weights of a part make sums over its
    micro-batches and ranks the mean over the part."""
    rows = batch["mask"].any(1).nonzero()[:, 0].tolist()
    order = np.random.default_rng([c.seed, step, epoch]).permutation(rows).astype(int)
    parts = [part.tolist() for part in np.array_split(order, c.minibatches) if len(part)]
    batch["weights"] = torch.zeros_like(batch["mu"])
    for part in parts:
        batch["weights"][part] = loss_weights(batch["mask"][part], c.aggregate, c.max_response)
    return parts

SUMS = "policy_loss", "clip_share", "entropy", "step_kl", "value_loss", "value_clip_share"

def policy_step(model: Qwen3, hidden: Tensor, micro: dict, part: dict, c: Config) -> tuple[Tensor, dict]:
    logprobs, entropy = (spread(x, part["filled"]) for x in
                         model.logprobs(hidden[micro["at"]], micro["targets"], c.temperature))
    loss, clipped = policy_loss(logprobs, entropy, part, c)
    return (loss * part["weights"]).sum(), {"policy_loss": loss, "clip_share": clipped, "entropy": entropy,
                                            "step_kl": kl_estimate("k3", part["prox"], logprobs)}

def value_step(model: Qwen3, hidden: Tensor, micro: dict, part: dict, c: Config) -> tuple[Tensor, dict]:
    loss, clipped = value_loss(spread(model.value(hidden[micro["at"]]), part["filled"]), part, c)
    return (loss * part["weights"]).sum(), {"value_loss": loss, "value_clip_share": clipped}

@dataclass
class Learner:
    """A model, and how it learns: the policy or the critic."""
    name: str
    model: Qwen3
    optimizer: AdamW
    lr: float
    step: Callable

def update(learner: Learner, batch: dict, rows: list[int], rise: float, c: Config, log: dict) -> None:
    """A step of the optimizer over a minibatch. `log` gets sums over actions, and the gradient's norm."""
    def loss(model, hidden, micro):
        part = {name: x[micro["rows"]] for name, x in batch.items() if isinstance(x, Tensor) and x.ndim == 2}
        total, found = learner.step(model, hidden, micro, part, c)
        return total, {name: clean(part["mask"], x.detach().double())[0].sum() for name, x in found.items()}
    for found in run(learner.model, micro_batches(batch, rows, learner.model.mesh, c.micro_tokens), loss):
        for name, x in found.items():
            log[name] += float(x) * (learner.model.mesh.tp_rank == 0)
    log[f"{learner.name}_norm"] = float(learner.optimizer.step(learner.lr * rise))

# --- what a batch has to say -----------------------------------------------------------------------------------------

def look(table: arrowlite.Table) -> dict:
    """How good the responses were, and how fast they came."""
    reward, lengths = table["reward"].to_numpy(), np.array([len(ids) for ids in table["response_ids"].to_numpy()])
    cut = np.array(table["finish_reason"].to_pylist()) == "length"
    busy = table["ended"].to_numpy().max() - table["began"].to_numpy().min()
    return {"reward": float(reward.mean()), "reward_std": float(reward.std()), "length": float(lengths.mean()),
            "cut_share": float(cut.mean()), "generated_tokens_per_s": float(lengths.sum() / max(busy, 1e-3))}

def describe(batch: dict, log: dict, c: Config, step: int, mesh: Mesh) -> dict:
    """How far trainer and engine are apart, and what was learned. Means are over actions."""
    sums = torch.tensor([log[name] for name in SUMS], dtype=torch.float64, device=mesh.device)
    if mesh.size > 1:
        dist.all_reduce(sums)
    learned, actions = max(1, int(batch["mask"].sum())) * c.epochs, batch["actions"]
    gap = (batch["prox"] - batch["mu"])[actions]                                    # log prox / mu [actions]
    ratio, lag = gap.exp(), (step - batch["versions"])[actions]
    taught = {"policy": step >= c.critic_warmup, "value": c.advantage == "gae"}         # means of nothing are left out
    found = {name: x / learned for name, x in zip(SUMS, sums)
             if taught["value" if name.startswith("value") else "policy"] and batch["mask"].any()} | {
        "learned_share": batch["mask"].sum() / actions.sum(),
        "mismatch_kl": (ratio - 1 - gap).mean(),                                    # k3 of KL(mu || prox)
        "capped_share": (ratio > c.cap).double().mean(),
        "effective_sample": ratio.sum().square() / (len(ratio) * ratio.square().sum())}
    found |= {} if c.replay else {"lag": lag.mean(), "lag_max": lag.max()}      # a replay's weights have no place here
    if c.kl != "none":
        found["kl"] = kl_estimate("k3", batch["prox"], batch["reference"])[actions].mean()
    if c.advantage == "gae":
        returns, error = batch["returns"][actions], (batch["returns"] - batch["values"])[actions]
        if (variance := returns.var(correction=0)) > 1e-8:      # else there is nothing to explain
            found["explained_variance"] = 1 - error.var(correction=0) / variance
    norms = {name: log[name] for name in ("policy_norm", "critic_norm") if name in log}
    return {name: float(x) for name, x in found.items()} | norms

def advice(m: dict, first: dict) -> dict[str, str]:
    """What an experienced person would say, looking at the numbers of a batch and at those of the first one."""
    first = {"entropy": 0.0, "mismatch_kl": 0.0} | first                # --rollout-only has none of these, ...
    m = {"entropy": first["entropy"], "mismatch_kl": 0.0} | m           # ... and what learned nothing no entropy
    found = {
        "cut": m["cut_share"] > 0.5 and f"{m['cut_share']:.0%} of the responses were cut off, and their rewards say "
        "little: raise --max_response, or make length dear with --overlong_buffer",
        "equal": m["reward_std"] == 0 and f"all rewards are {m['reward']:.3g}, so there is nothing to compare: look at "
        "the samples (python evaluate.py show), at --reward, and at how hard the problems are",
        "mismatch": m["mismatch_kl"] > max(0.01, 3 * first["mismatch_kl"]) and "engine and trainer have drifted apart "
        f"(mismatch KL {m['mismatch_kl']:.3f}): lower --staleness or --lr; at staleness 0, look for a bug",
        "entropy": m["entropy"] < 0.2 * first["entropy"] and f"entropy has collapsed from {first['entropy']:.3f} to "
        f"{m['entropy']:.3f}, so responses are alike: raise --clip_high, --entropy_coef, --temperature, or lower --lr",
        "finite": not all(map(math.isfinite, m.values())) and "a number is not finite; a step of the optimizer whose "
        "gradient is not was left out: lower --lr or --clip"}
    return {kind: text for kind, text in found.items() if text}

# --- the loop --------------------------------------------------------------------------------------------------------

def train(c: Config) -> dict[int, float]:
    """Returns the scores on --eval_data, by the number of steps before them."""
    with closing(prepare(c)) as r:
        for step in range(r.start, c.steps):
            clock = Clock()
            table = arrowlite.read(exchange(r, step))   # weights of version `step` go out, batch `step` comes in
            clock.lap("wait")
            numbers = look(table)
            if not c.rollout_only:
                numbers |= learn(r, lay_out(table, r.mesh.device), step, clock)
            r.report(step + 1, numbers | clock.seconds)
            if (step + 1) % c.save_every == 0 or step + 1 == c.steps:
                checkpoint(r, step + 1)
        finish(r)
        return r.scores

def learn(r: Run, batch: dict, step: int, clock: Clock) -> dict:
    """What is done with a batch: this is the algorithm."""
    c, log, rise = r.c, Counter(), min(1, (step + 1) / max(1, r.c.warmup))
    batch["prox"] = measure(r.policy.model, batch, c)
    if r.reference:
        batch["reference"] = measure(r.reference, batch, c)
    if r.critic:
        batch["values"] = measure(r.critic.model, batch, c)
    estimate(batch, c)
    clock.lap("measure")
    for epoch in range(c.epochs):
        for rows in minibatches(batch, c, step, epoch):
            if r.critic:
                update(r.critic, batch, rows, rise, c, log)
            if step >= c.critic_warmup:
                update(r.policy, batch, rows, rise, c, log)
    clock.lap("train")
    speed = sum(map(len, batch["tokens"])) / (clock.seconds["seconds_measure"] + clock.seconds["seconds_train"])
    return describe(batch, log, c, step, r.mesh) | {"trained_tokens_per_s": speed}

class Clock:
    """Seconds of each stage of a step."""
    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"], self.last = now - self.last, now

@dataclass
class Run:
    """All that the loop holds on to."""
    c: Config
    mesh: Mesh
    policy: Learner
    critic: Learner | None
    reference: Qwen3 | None             # the policy as it was
    rollouts: Rollouts | None           # rank 0's
    metrics: sft.Metrics
    start: int                          # the first step
    first: dict | None = None           # each number, of the first batch that had it
    told: set = field(default_factory=set)
    scores: dict = field(default_factory=dict)

    def report(self, step: int, numbers: dict) -> None:
        """A line of metrics; and advice, each kind of it once."""
        self.metrics.log(step, **numbers)
        self.metrics.bar.set_postfix(reward=numbers["reward"], length=numbers["length"])
        self.first = numbers | (self.first or {})
        for kind, text in advice(numbers, self.first).items():
            if kind not in self.told and self.mesh.rank == 0:
                tqdm.write(f"step {step}: {text}")
            self.told.add(kind)

    def score(self, step: int, weights) -> None:
        if self.c.eval_data:
            self.scores[step] = self.rollouts.score(weights)
            self.metrics.log(step, val_reward=self.scores[step])

    def close(self) -> None:
        if self.rollouts:
            self.rollouts.ray.shutdown()

def prepare(c: Config) -> Run:
    """What can be known to be wrong with the settings is an error before `claim` writes or Rollouts starts anything."""
    mesh = init(pp=c.pp, tp=c.tp, device=c.device or None)
    if mesh.device.type == "cpu":
        torch.set_num_threads(1)                        # processes share the cores
    check(c, mesh)
    problems, held_out = ([] if c.replay or not data else load_prompts(c, data) for data in (c.data, c.eval_data))
    options = dict(mesh=mesh, dtype=getattr(torch, c.dtype) if c.dtype else None, recompute=c.recompute)
    def learner(name, lr, step):
        model = Qwen3.from_pretrained(c.model, value_head=name == "critic", **options)
        return Learner(name, model, AdamW(model, lr, weight_decay=c.weight_decay, clip=c.clip), lr, step)

    policy = learner("policy", c.lr, policy_step)
    critic = learner("critic", c.critic_lr, value_step) if c.advantage == "gae" else None
    reference = Qwen3.from_pretrained(c.model, **options) if c.kl != "none" else None
    sft.claim(c, FREE)
    state = resumed(c, policy, critic) if c.resume else {"step": 0, "ahead": 0}
    rollouts = Rollouts(c, problems, held_out, **state) if mesh.rank == 0 and not c.replay else None
    return Run(c, mesh, policy, critic, reference, rollouts, sft.Metrics(c, c.steps, state["step"]), state["step"])

def exchange(r: Run, step: int) -> Path:
    """The file of batch `step`, the same on all ranks; generators have these weights from now on."""
    weights, found = pack_weights(r.policy.model, step), [r.c.replay]
    if r.rollouts:
        weights = r.rollouts.ray.put(weights)
        if step % r.c.eval_every == 0:
            r.score(step, weights)
        found = [r.rollouts.next(step, weights)]
    if r.mesh.size > 1:
        dist.broadcast_object_list(found)
    return found[0]

def checkpoint(r: Run, step: int) -> None:
    """Weights, optimizers, and the number of the step: prompts, samples and order follow from it. What is being
    generated is waited for, and its files are part of the checkpoint."""
    folder, name = Path(r.c.out, "checkpoints"), f"{step:06d}"
    state = {"step": step, "ahead": r.rollouts.finish(step) if r.rollouts else 0}
    for learner in filter(None, (r.critic, r.policy)):  # in this order: `resumed` goes by the policy
        save(folder / learner.name / name, learner.model, learner.optimizer, state)
    if r.mesh.rank == 0:
        kept = sorted(path.name for path in (folder / "policy").iterdir())[-r.c.keep:]
        for old in [path for kind in folder.iterdir() for path in kind.iterdir() if path.name not in kept]:
            shutil.rmtree(old)

def resumed(c: Config, policy: Learner, critic: Learner | None) -> dict:
    folder = Path(c.out, "checkpoints")
    if (newest := latest(folder / "policy")) is None:
        return {"step": 0, "ahead": 0}
    state = load(newest, policy.model, policy.optimizer)
    if critic:
        load(folder / "critic" / f"{state['step']:06d}", critic.model, critic.optimizer)
    return state

def finish(r: Run) -> None:
    r.policy.model.save_pretrained(Path(r.c.out, "model"))
    weights = pack_weights(r.policy.model, r.c.steps)
    if r.rollouts:
        r.score(r.c.steps, r.rollouts.ray.put(weights))
    if r.mesh.size > 1:
        dist.broadcast_object_list([None])              # no rank leaves while another waits for what it has sent
    r.metrics.close()

# --- settings that cannot be, prompts, the demo ----------------------------------------------------------------------

NUMBERS = {"at least 1": "batch samples max_prompt max_response minibatches epochs steps generator_tp micro_tokens "
                         "save_every eval_every log_every", "above 0": "temperature cap clip",
           "at least 0": "overlong_buffer clip_high dual_clip kl_coef value_clip critic_warmup lr critic_lr warmup "
                         "weight_decay staleness generators graders keep eval_temperature seed",
           "from 0 to 1": "gamma lam memory clip_low", "finite": "entropy_coef"}
FREE = sft.FREE | {"memory", "micro_tokens", "runtime", "generators", "generator_tp", "graders", "staleness", "steps"}

def check(c: Config, mesh: Mesh) -> None:
    """Fills in what depends on the machine, and refuses what cannot be."""
    sft.check_ranges(c, NUMBERS)
    gpus = torch.cuda.device_count() if mesh.device.type == "cuda" else 0
    left = max(0, gpus - mesh.size)
    c.runtime = c.runtime or ("inline" if gpus and not left else "actors")
    c.generators = c.generators or max(1, left // c.generator_tp)
    c.steps = 1 if c.replay else c.steps
    c.critic_warmup *= c.advantage == "gae"             # without a critic there is nothing to wait for
    def refuse(wrong, why: str) -> None:
        if wrong: raise ValueError(why)
    missing = [flag for flag, x in (("--model", c.model), ("--data", c.data or c.replay), ("--out", c.out)) if not x]
    refuse(missing, f"{' and '.join(missing)} must be given; python ppo.py alone is the demo")
    shape, longest = parallel.Config.from_pretrained(c.model), c.max_prompt + c.max_response
    refuse(longest > shape.max_position_embeddings,
           f"--max_prompt + --max_response = {longest} tokens; the model knows {shape.max_position_embeddings}")
    refuse(c.samples < 2 and (c.advantage in ("grpo", "rloo") or c.drop_equal),
           "--advantage grpo, rloo and --drop_equal compare the responses to a prompt: take --samples 2 or more")
    refuse(c.truncated == "bootstrap" and c.advantage != "gae", "--truncated bootstrap wants --advantage gae, a critic")
    refuse(c.runtime == "inline" and c.generators * c.generator_tp > 1, "--runtime inline has one generator of tp 1")
    refuse(gpus and c.generator_tp > (left or gpus),
           f"--generator_tp {c.generator_tp} wants as many GPUs, and the trainers leave {left} of {gpus}")
    parallel.check_layout(shape, Mesh(tp=c.generator_tp), 1)
    refuse(c.overlong_buffer > c.max_response, f"--overlong_buffer {c.overlong_buffer} is more than --max_response")
    refuse((n := c.batch * c.samples) < c.minibatches, f"{n} responses do not make {c.minibatches} minibatches")
    refuse(c.replay and c.rollout_only, "--rollout_only makes what --replay learns from: take one of them")
    refuse(c.replay and not Path(c.replay).is_file(), f"there is no file {c.replay} to replay")
    refuse(c.replay and "logprobs" not in arrowlite.read(c.replay).schema.names, f"{c.replay} has no rollouts")
    if c.reward != "math":
        load_function(c.reward)
    done = latest(Path(c.out, "checkpoints", "policy")) if c.resume else None
    refuse(done and torch.load(done / "state.pt")["step"] > c.steps, f"{done} is past --steps {c.steps}; raise it")

def load_prompts(c: Config, data: str) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(local_folder(c.model))
    problems = load_problems(data, "train" if data == c.data else "test", columns=c.reward != "math")
    texts, prompts = chat_prompts(problems, tokenizer)
    if len(problems) < c.batch and data == c.data:
        raise ValueError(f"{data} has {len(problems)} problems; take --batch {len(problems)} or less")
    for i, ids in enumerate(prompts):
        if len(ids) > c.max_prompt:
            raise ValueError(f"row {i} of {data} is a prompt of {len(ids)} tokens; raise --max_prompt, or "
                             "leave it out (python evaluate.py problems)")
    return [x | {"prompt": text, "prompt_ids": ids} for x, text, ids in zip(problems, texts, prompts)]

def school(folder: str, seed: int = 0) -> list[str]:
    """A tiny model that two teachers have taught to add three numbers. They agree on sums, but only one of them puts
    them into a box, so half of its answers are of no use. The model, problems, and others that it never sees."""
    model, data, held_out, tiny, tokens, out = (str(Path(folder, name)) for name in (
        "school/model", "problems.jsonl", "held_out.jsonl", "tiny", "taught.arrow", "school"))
    arrowlite.Table.from_pylist(arithmetic(10_000, seed, boxed=0.5)).to_jsonl(data)
    arrowlite.Table.from_pylist(arithmetic(200, seed + 1, held_out=True)).to_jsonl(held_out)
    sft.prepare(data, tiny_model(tiny, seed, hidden_size=64, num_hidden_layers=2), tokens)
    sft.train(sft.Config(tiny, tokens, out, batch=16, steps=600, lr=3e-3, min_lr=3e-4, warmup=0.05, max_tokens=4096,
                         device="cpu", log_every=100, seed=seed))
    return [model, data, held_out]

def demo() -> None:
    torch.set_num_threads(1)                            # a tiny model gains nothing from more
    with tempfile.TemporaryDirectory() as folder:
        scores = train(Config(
            *school(folder), out=str(Path(folder, "ppo")), batch=128, max_prompt=128, max_response=40, minibatches=2,
            steps=24, lr=2e-4, critic_lr=1e-3, warmup=5, eval_every=8, eval_temperature=1.0, log_every=4, device="cpu"))
    print("score on new problems: " + ", ".join(f"{score:.0%} after {step} steps" for step, score in scores.items()))
    assert scores[24] > scores[0] + 0.2, "PPO should have raised the score by 20 points"

def main() -> None:
    if len(sys.argv) == 1 and "RANK" not in os.environ:
        return demo()
    train(sft.arguments(Config))
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
