"""ppo.py: asynchronous reinforcement learning. A model learns from its own samples: PPO, GRPO, RLOO, REINFORCE++.

    prompts --> generators (weights v, logprob mu a token) --> judges --> rollouts: an Arrow file a batch
       ^                                                                      |  (all ranks map it)
       |        trainer ranks: logprobs prox, reference, values --> advantages --> update critic, policy
       +------------ weights v+1: one object in shared memory, read without a copy <--+

`train` is the loop, `learn` the algorithm. Rank 0 of the trainers asks for batches ahead of time (at staleness k, batch
t+k is generated while batch t is trained on), and the weights to use are an argument of each call. There are three
distributions: mu, which a token was drawn from; prox, the trainer's before an update; and pi, which is being trained.
pi / prox is what PPO clips, and min(prox / mu, C) weighs it (arXiv 2505.24298). On a GPU the engine computes what the
trainer computes, to the bit, so for a batch of the current weights (at staleness 0 each is) prox IS mu. That is checked
on the first such batch and then relied upon: later ones are not measured, and mismatch_kl of the others is lag alone.

Public names: Config, train; the mathematics as pure functions (gae, whiten, group_advantages, kl_estimate, correction,
token_rewards, overlong_penalty, policy_loss, value_loss, loss_weights); lay_out, measure, estimate, update, learn.

    python ppo.py                                                       the demo: SFT, then PPO, on arithmetic
    python ppo.py --model DIR --data F.jsonl --out RUN                  one GPU, which trainer and engine share
    torchrun --standalone --nproc-per-node 4 ppo.py --model ...         8 GPUs: 4 train by dp, the others generate
    python ppo.py --reward mine.py:score --graders 0 ...                a breakpoint() in the reward works
"""
import importlib
import math
import os
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

import arrowlite
import engine  # noqa: F401 (which sets the matrix products that CUDA takes: trainer and engine agree)
import parallel
import sft
from evaluate import Generator, arithmetic, chat_prompts, extract, grade, load_problems
from parallel import AdamW, Qwen3, arguments, mistakes

# --- settings --------------------------------------------------------------------------------------------------------
@dataclass
class Config:
    """The defaults are those of Qwen3-0.6B. Of several GPUs half train, by dp, and the others generate."""
    model: str = ""                 # a Hugging Face directory or hub id: the policy, and the critic's beginning
    data: str = ""                  # problems with answers, as evaluate.py reads them: .jsonl, .arrow, a hub id
    eval_data: str = ""             # problems for a score every eval_every steps; empty: some of --data are held out
    held_out: int = 100             # every so-many-th of --data, if --eval_data is empty; 0: none
    out: str = ""                   # metrics.jsonl, curves.png, rollouts/, checkpoints/, and in the end model/
    resume: bool = False            # go on from the newest checkpoint in --out
    # the task
    reward: str = "math"  # or FILE.py:function(response, row); row: problem, gold, answer, prompt, ..., your columns
    batch: int = 128                # prompts a step
    samples: int = 8                # responses to a prompt
    max_prompt: int = 1024          # tokens; problems with a longer prompt are left out
    max_response: int = 3072        # tokens; a response is cut there
    temperature: float = 1.0        # divides logits, in the engine and in the loss alike
    overlong_buffer: int = 0        # tokens before max_response over which the reward falls by up to 1 (DAPO)
    # the algorithm
    advantage: Literal["gae", "grpo", "rloo", "reinforce++"] = "gae"        # gae: PPO, with a critic
    aggregate: Literal["token-mean", "seq-mean-token-mean"] = "token-mean"  # tokens | responses count the same
    gamma: float = 1.0              # discount a token (gae)
    lam: float = 1.0                # lambda of gae: 1 trusts returns, 0 the critic
    clip_low: float = 0.2           # pi / prox has an effect within [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.28         # larger, so that unlikely tokens can grow (DAPO)
    dual_clip: float = 3.0          # bounds the loss of an action with a negative advantage; 0: does not
    cap: float = 2.0                # C of min(prox / mu, C); 0: stale samples are not weighed
    kl: Literal["none", "k1", "k2", "k3"] = "none"  # to the model at the start; k1 in the reward, k2 and k3 in the loss
    kl_coef: float = 0.001          # how dear it is
    entropy_coef: float = 0.0       # how dear it is to be sure
    critic_warmup: int = 5          # steps in which only the critic learns (gae)
    minibatches: int = 4            # optimizer steps a batch and epoch
    epochs: int = 1                 # times that a batch is learned from
    steps: int = 300                # batches
    lr: float = 2e-6                # of the policy
    critic_lr: float = 1e-5         # of the critic, whose head begins at 0
    warmup: int = 10                # steps over which both rise, those of critic_warmup counted
    weight_decay: float = 0.0       # of matrices
    clip: float = 1.0               # largest norm of a gradient
    seed: int = 0                   # the same seed gives the same run
    # the machine
    staleness: int = 1              # batches that are generated ahead
    exact: bool = True              # the engine computes what the trainer does, to the bit (on a GPU, without tp)
    runtime: Literal["actors", "ray"] = "actors"    # what generators and judges run on
    generators: int = 0             # 0: one for each GPU without a trainer (let half of them train), or one beside it
    generator_tp: int = 1           # GPUs a generator
    graders: int = 4                # processes; 0: rewards are made in the trainer's, where a breakpoint() works
    memory: float = 0.0             # share of a GPU that an engine takes; 0: 0.85, or 0.4 beside a trainer
    pp: int = 1                     # pipeline stages of the trainers
    tp: int = 1                     # parts of each layer
    micro_tokens: int = 16384       # tokens that are trained on at once, on a rank
    recompute: bool = False         # activations, layer by layer: less memory, a third more work
    device: Literal["cuda", "cpu"] | None = None                            # otherwise a GPU if there is one
    dtype: Literal["bfloat16", "float32", "float64"] | None = None          # otherwise what suits the device
    save_every: int = 50            # steps from one checkpoint to the next
    keep: int = 2                   # checkpoints that are kept; 0: all
    log_every: int = 10             # steps from one line on the screen to the next; metrics.jsonl has them all
    eval_every: int = 10            # steps from one score to the next
    eval_temperature: float = 0.0   # 0: greedy
    wandb: str | None = None        # a Weights & Biases project to report to

# --- the mathematics -------------------------------------------------------------------------------------------------
# An action is a token that the model chose. The responses of a batch are rows, sorted by prompt, and what is known of
# their actions lies end to end, [actions], with lengths [rows]: there is no padding that could be learned from.
def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_l (gamma lam)^l delta_(t+l), delta_t = r_t + gamma V_(t+1) - V_t  (arXiv 1506.02438, eq. 16)."""
    rewards = pad_sequence(rewards.split(lengths.tolist()))         # [slots, rows], 0 behind the end of a row
    values = pad_sequence(values.split(lengths.tolist()))
    advantages = torch.zeros_like(values)
    ahead = torch.zeros_like(values[0])                             # [rows], A of the slot behind
    following = torch.zeros_like(values[0])                         # and V: the end is worth nothing
    for t in reversed(range(len(values))):
        delta = rewards[t] + gamma * following - values[t]
        ahead = delta + gamma * lam * ahead
        following = values[t]
        advantages[t] = ahead
    present = torch.arange(len(values)) < lengths[:, None]          # [rows, slots]
    return advantages.T[present]

def whiten(x: Tensor) -> Tensor:
    """Mean 0, variance 1 over all actions of the batch: not of a rank, nor of a micro-batch."""
    x = x - x.mean()
    return x * (x.square().mean() + 1e-8).rsqrt()

def group_advantages(kind: str, scores: Tensor, samples: int) -> Tensor:
    """Responses to one prompt are measured against each other, so that no critic is needed. [rows] -> [rows]."""
    group = scores.view(-1, samples)                                # [prompts, samples]
    above = group - group.mean(1, keepdim=True)
    if kind == "grpo":                                              # arXiv 2402.03300, 4.1.2
        above = above / (group.std(1, keepdim=True) + 1e-6)
    if kind == "rloo":                                              # the mean of the others, arXiv 2402.14740, eq. 6
        above = above * samples / (samples - 1)
    return above.flatten()

def kl_estimate(kind: str, logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(pi || reference) a token, from samples of pi (joschu.net/blog/kl-approx.html). All three are right on average,
    but gradients are another matter: that of k1 is 0 on average (so k1 belongs into the reward, where it works out as
    the gradient of KL), that of k2 is the gradient of KL(pi || reference), that of k3 of KL(reference || pi)."""
    d = logprobs - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    return torch.exp(-d) - 1 + d

def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """0 down to -1 over the last `buffer` tokens (DAPO, arXiv 2503.14476, eq. 13)."""
    return -((lengths.double() - (longest - buffer)) / max(1, buffer)).clamp(0, 1)

def token_rewards(scores: Tensor, lengths: Tensor) -> Tensor:
    """[actions]: the score [rows] on the last action of a row, 0 elsewhere."""
    rewards = scores.new_zeros(int(lengths.sum()))
    rewards[lengths.cumsum(0) - 1] = scores
    return rewards

def correction(prox: Tensor, mu: Tensor, cap: float) -> Tensor:
    """The detached weight min(prox / mu, C): samples of mu, weighed as if they came from prox."""
    return (prox - mu).exp().clamp(max=cap).detach()

def policy_loss(logprobs: Tensor, entropy: Tensor, part: dict, c: Config) -> tuple[Tensor, Tensor]:
    """The loss of each action, and which are clipped: -min(r A, clip(r) A), at most -dual_clip A where A < 0 (arXiv
    1707.06347, eq. 7; the dual clip: arXiv 1912.09729). `part` has what is fixed during an update."""
    advantages = part["advantages"]
    ratio = (logprobs - part["prox"]).clamp(-20, 20).exp()          # exp(20): beyond any clip, not beyond fp32
    free = ratio * advantages
    gain = torch.minimum(free, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * advantages)
    if c.dual_clip:
        gain = torch.where(advantages < 0, torch.maximum(gain, c.dual_clip * advantages), gain)
    weight = correction(part["prox"], part["mu"], c.cap) if c.cap else 1
    loss = -gain * weight - c.entropy_coef * entropy
    if c.kl in ("k2", "k3"):
        loss = loss + c.kl_coef * kl_estimate(c.kl, logprobs, part["reference"])
    return loss, gain != free

def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    return (values - returns).square() / 2

def loss_weights(lengths: Tensor, how: str) -> Tensor:
    """[actions]: the loss of a minibatch is the sum, over all ranks, of these weights times the losses of actions."""
    length = lengths.double().repeat_interleave(lengths)            # [actions], of its row
    if how == "token-mean":
        return torch.full_like(length, 1 / len(length))
    return 1 / (len(lengths) * length)

# --- a batch: what training sees of a file of rollouts ---------------------------------------------------------------
def lay_out(table: arrowlite.Table) -> dict:
    """The columns as tensors, all on each rank and on the CPU: they are small, advantages need the whole batch, and
    sums come in one order. An action is read at the position before it: its logprob, and the value of the state there.

        tokens     p  p  p  a  b  c  E      E ends the sequence: an action like any other
        learned    0  0  0  1  1  1  1      a is action 0 of its row, and is read at the last p
    """
    tokens = []
    learned = []
    for prompt, response in zip(table["prompt_ids"].to_numpy(), table["response_ids"].to_numpy()):
        tokens.append(np.concatenate([prompt, response]))
        learned.append(np.arange(len(tokens[-1])) >= len(prompt))
    lengths = torch.tensor(table["response_ids"].lengths())
    reasons = np.array(table["finish_reason"].to_pylist())
    return {
        "tokens": tokens,                                                           # a list of rows, as the next two
        "learned": learned,
        "places": torch.arange(int(lengths.sum())).split(lengths.tolist()),         # of a row's actions
        "lengths": lengths,                                                         # [rows], as the next two
        "score": torch.tensor(table["reward"].to_numpy()).double(),
        "cut": torch.tensor(reasons == "length"),
        "mu": torch.tensor(table["logprobs"].flatten().to_numpy()).double(),        # [actions], as the next
        "versions": torch.tensor(table["versions"].flatten().to_numpy())}
FIXED = "prox", "mu", "reference", "advantages", "returns", "weights"     # [actions], what updates read

def micro_batches(batch: dict, rows, mesh, capacity: int) -> list[dict]:
    """This rank's share of some rows, in packs of up to `capacity` tokens, or of the longest row if that is more."""
    sizes = [len(batch["tokens"][row]) for row in rows]
    packs = parallel.pack(sizes, max(capacity, *sizes), mesh.dp)
    found = []
    for pack in packs[mesh.dp_rank::mesh.dp]:
        if pack:
            mine = [rows[i] for i in pack]
            tokens = [batch["tokens"][row] for row in mine]
            learned = [batch["learned"][row] for row in mine]
            places = torch.cat([batch["places"][row] for row in mine])
            fixed = {name: batch[name][places] for name in FIXED if name in batch}
            found.append(parallel.micro_batch(tokens, learned) | fixed | {"places": places})
    return found

def measure(model: Qwen3, batch: dict, c: Config) -> Tensor:
    """Logprobs, or of a critic values, of all actions, on every rank. Each is found by one dp rank, and those of the
    others add 0 to it: the total is exact."""
    def read(model, hidden, micro):
        hidden = hidden[micro["predict"]]
        if model.value_head:
            return None, model.value(hidden)
        return None, model.logprobs(hidden, micro["targets"], c.temperature)[0]
    rows = range(len(batch["lengths"]))
    micros = micro_batches(batch, rows, model.mesh, c.micro_tokens)
    results = parallel.run(model, micros, read, backward=False)
    found = torch.zeros_like(batch["mu"])
    for micro, numbers in zip(micros, results):
        found[micro["places"]] = numbers.double().cpu()
    return sft.total(found.to(model.mesh.device), model.mesh).cpu()

# --- learning: three models read the batch, two of them learn from it ------------------------------------------------
@dataclass
class Learner:
    name: str               # policy or critic
    model: Qwen3
    optimizer: AdamW
    lr: float
NUMBERS = {
    "policy": ("policy_loss", "clip_share", "entropy", "step_kl"),
    "critic": ("value_loss",)}

def loss_of(model: Qwen3, hidden: Tensor, micro: dict, c: Config):
    """The part of a micro-batch in the loss; and NUMBERS of each action."""
    hidden = hidden[micro["predict"]]                                               # [actions, width]
    if model.value_head:
        loss = value_loss(model.value(hidden), micro["returns"])
        numbers = [loss]
    else:
        logprobs, entropy = model.logprobs(hidden, micro["targets"], c.temperature)
        loss, clipped = policy_loss(logprobs, entropy, micro, c)
        moved = kl_estimate("k3", micro["prox"], logprobs)                          # KL(prox || pi)
        numbers = [loss, clipped, entropy, moved]
    return (loss * micro["weights"]).sum(), numbers

def update(learner: Learner, batch: dict, rows, rise: float, c: Config) -> dict:
    """A step of the optimizer over a minibatch. Returns means over its actions, and the norm of the gradient."""
    def loss(model, hidden, micro):
        mean, numbers = loss_of(model, hidden, micro, c)
        return mean, torch.stack([x.detach().double().sum() for x in numbers])
    mesh = learner.model.mesh
    places = torch.cat([batch["places"][row] for row in rows])
    batch["weights"] = torch.zeros_like(batch["mu"])
    batch["weights"][places] = loss_weights(batch["lengths"][rows], c.aggregate)
    micros = micro_batches(batch, rows, mesh, c.micro_tokens)
    names = NUMBERS[learner.name]
    sums = torch.zeros(len(names), dtype=torch.float64, device=mesh.device)
    for found in parallel.run(learner.model, micros, loss):
        sums += found
    norm = learner.optimizer.step(learner.lr * rise)
    means = sft.total(sums, mesh) / len(places)
    log = dict(zip(names, means.tolist()))
    log[learner.name + "_norm"] = float(norm)
    return log

def prox_of(r: "Run", batch: dict, step: int) -> Tensor:
    """The policy's logprobs before the update. Where the engine was seen to compute the same they are mu."""
    current = bool((batch["versions"] == step).all())
    if current and r.exact:
        return batch["mu"]
    prox = measure(r.policy.model, batch, r.c)
    if current and r.exact is None:
        r.exact = torch.equal(prox, batch["mu"])
    return prox

def estimate(batch: dict, c: Config):
    """From scores to advantages and returns [actions]."""
    lengths = batch["lengths"]
    scores = batch["score"] + overlong_penalty(lengths, c.max_response, c.overlong_buffer)
    rewards = token_rewards(scores, lengths)
    if c.kl == "k1":
        rewards = rewards - c.kl_coef * kl_estimate("k1", batch["prox"], batch["reference"])
    if c.advantage == "gae":
        advantages = gae(rewards, batch["values"], lengths, c.gamma, c.lam)
        batch["returns"] = advantages + batch["values"]
        batch["advantages"] = whiten(advantages)
        return
    sums = torch.segment_reduce(rewards, "sum", lengths=lengths)                    # [rows]
    if c.advantage == "reinforce++":        # what is to come, minus the mean of the group; arXiv 2501.03262
        advantages = gae(rewards, torch.zeros_like(rewards), lengths, 1, 1)
        if c.samples > 1:
            mean = sums.view(-1, c.samples).mean(1)                                 # [prompts]
            mean = mean.repeat_interleave(c.samples)                                # [rows]
            advantages = advantages - mean.repeat_interleave(lengths)
        batch["advantages"] = whiten(advantages)
    else:
        advantages = group_advantages(c.advantage, sums, c.samples)                 # [rows]
        batch["advantages"] = advantages.repeat_interleave(lengths)

def minibatches(rows: int, c: Config, step: int, epoch: int) -> list:
    order = np.random.default_rng([c.seed, step, epoch]).permutation(rows)
    return np.array_split(order, min(c.minibatches, rows))

def learn(r: "Run", batch: dict, step: int) -> dict:
    """What is done with a batch: this is the algorithm."""
    c = r.c
    began = time.perf_counter()
    batch["prox"] = prox_of(r, batch, step)
    if r.reference:
        batch["reference"] = measure(r.reference, batch, c)
    if r.critic:
        batch["values"] = measure(r.critic.model, batch, c)
    estimate(batch, c)
    measured = time.perf_counter()
    log = []
    rise = min(1, (step + 1) / max(1, c.warmup))
    for epoch in range(c.epochs):
        for rows in minibatches(len(batch["lengths"]), c, step, epoch):
            if r.critic:
                log.append(update(r.critic, batch, rows, rise, c))
            if step >= c.critic_warmup or not r.critic:
                log.append(update(r.policy, batch, rows, rise, c))
    seconds = {"seconds_measure": measured - began, "seconds_train": time.perf_counter() - measured}
    return describe(batch, log, step) | seconds

def describe(batch: dict, log: list[dict], step: int) -> dict:
    """What a batch has to say: means, over rows, actions or updates. What there is none of is left out."""
    gap = batch["prox"] - batch["mu"]                                               # log prox / mu [actions]
    ratio = gap.exp()
    found = {
        "reward": batch["score"],
        "reward_std": batch["score"].std(correction=0),
        "length": batch["lengths"],
        "cut_share": batch["cut"],
        "lag": step - batch["versions"],
        "mismatch_kl": ratio - 1 - gap,                                             # k3 of KL(mu || prox)
        "effective_sample": ratio.sum().square() / (len(ratio) * ratio.square().sum())}
    if "reference" in batch:
        found["kl"] = kl_estimate("k3", batch["prox"], batch["reference"])
    if "returns" in batch and batch["returns"].var() > 1e-8:                        # else there is nothing to explain
        error = batch["returns"] - batch["values"]
        found["explained_variance"] = 1 - error.var() / batch["returns"].var()
    for means in log:
        for name, mean in means.items():
            found.setdefault(name, []).append(mean)
    return {name: torch.as_tensor(x).double().mean().item() for name, x in found.items()}

# --- the other processes: judges; generators are evaluate.py's -------------------------------------------------------
def share(items: list, part: int, parts: int) -> list:
    size = math.ceil(len(items) / parts)
    return items[part * size : (part + 1) * size]

class Judge:
    def __init__(self, reward: str):
        self.function = load_function(reward)

    def judge(self, samples: list, problems: list, part: int = 0, parts: int = 1):
        """A share of the responses, as rows of a file of rollouts; or what the reward function fell over, as a text."""
        rows = []
        problems = share(problems, part, parts)
        samples = share(samples, part, parts)
        for problem, some in zip(problems, samples):
            own = problem.get("columns", {})
            for i, sample in enumerate(some):
                text = sample["text"]
                row = {name: problem[name] for name in ("problem", "gold", "prompt", "row", "prompt_ids")}
                row |= {name: sample[name] for name in ("finish_reason", "logprobs", "versions")}
                row |= {"sample": i, "response": text, "response_ids": sample["token_ids"]}
                row["answer"] = extract(text) or ""
                try:
                    row["reward"] = float(self.function(text, row | own))
                    if not math.isfinite(row["reward"]):
                        raise ValueError(f"a reward of {row['reward']}: it should be a finite number")
                except Exception as error:          # its own frames alone, and then the row
                    frames = error.__traceback__.tb_next
                    said = traceback.format_exception(type(error), error, frames)
                    return "".join(said) + f"in row {row['row']}: {own}"
                rows.append(row)
        return rows

def load_function(reward: str):
    """math, by evaluate.py's grader, which is a process of its own; or FILE.py:function"""
    if reward == "math":
        return lambda response, row: grade(response, row["gold"])
    path, _, name = reward.partition(":")
    sys.path.append(str(Path(path).resolve().parent))                       # for files beside it
    function = runpy.run_path(path).get(name)
    if not callable(function):
        raise ValueError(f"--reward {reward}: {path} has no function {name}(response, row)")
    return function

def pack_weights(model: Qwen3, version: int) -> dict:
    """The whole model as bytes on the CPU, at rank 0. numpy arrays are what actors and Ray share without a copy."""
    tensors = {}
    if model.mesh.dp_rank == 0:
        for name, x in model.hf_tensors():                                  # gathered over tp and pp
            if model.mesh.rank == 0:
                x = x.detach().to("cpu", copy=True).contiguous()
                data = x.flatten().view(torch.uint8).numpy()
                tensors[name] = data, x.dtype, x.shape
    return {"version": version, "tensors": tensors}

# --- rank 0 asks for batches ahead of time, and keeps what comes back ------------------------------------------------
class Rollouts:
    """Prompts and seeds of a batch follow from its number, so that is all that a checkpoint has to know of them."""
    def __init__(self, c: Config, problems: list, held_out: list, step: int, ahead: int):
        self.c = c
        self.problems = problems
        self.held_out = held_out
        self.asked = step + ahead               # batches before this one are files, or asked for
        self.under_way = {}                     # {batch: what `ask` gave}
        Path(c.out, "rollouts").mkdir(exist_ok=True)
        self.ray = importlib.import_module(c.runtime)
        self.ray.init(ignore_reinit_error=True)
        self.stores = []                        # where the ranks of each generator meet
        devices = 0 if c.device == "cpu" else torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        gpus = visible.split(",")[:devices]
        left = gpus[int(os.environ.get("LOCAL_WORLD_SIZE", 1)):]            # those that no trainer has, ...
        self.gpus = left or gpus                                            # ... or all are shared with the trainers
        self.options = {
            "dtype": c.dtype or "auto",
            "device": c.device,
            "max_num_seqs": 1024,
            "max_model_len": c.max_prompt + c.max_response,
            "gpu_memory_utilization": c.memory or (0.85 if left else 0.4)} | ({} if c.exact else {"exact": False})
        count = c.generators or max(1, len(left) // c.generator_tp)
        self.generators = [self.generator(i) for i in range(count)]
        judge = self.ray.remote(Judge).options(max_restarts=3, max_task_retries=3)
        self.judges = [judge.remote(c.reward) for _ in range(c.graders)]

    def generator(self, number: int) -> list:
        """Its ranks. A single one that dies is started and called again; the death of one of a group ends the run."""
        c = self.c
        again = 3 if c.generator_tp == 1 else 0
        ranks = []
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.stores.append(store)
        for rank in range(c.generator_tp):
            env = {
                "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(c.generator_tp),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True"}             # they meet there as torchrun's workers do
            if self.gpus:                       # Ray would hide what it did not give out itself
                gpu = (number * c.generator_tp + rank) % len(self.gpus)
                env["CUDA_VISIBLE_DEVICES"] = self.gpus[gpu]
                env["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
            actor = self.ray.remote(Generator).options(
                max_restarts=again, max_task_retries=again, runtime_env={"env_vars": env})
            ranks.append(actor.remote(c.model, c.generator_tp, self.options))
        return ranks

    def next(self, step: int, weights) -> Path:
        """The file of batch `step`. With these weights, batches up to `step + staleness` are asked for."""
        c = self.c
        last = min(step + c.staleness, c.steps - 1)
        for batch in range(self.asked, last + 1):
            rows = sft.rows_of_step(batch, len(self.problems), c.batch, c.seed)
            first = (c.seed << 32) + batch * c.batch
            problems = [self.problems[row] | {"seed": first + i} for i, row in enumerate(rows)]
            self.under_way[batch] = self.ask(problems, c.samples, c.temperature, weights)
            self.asked = batch + 1
        return self.collect(step)

    def ask(self, problems: list, samples: int, temperature: float, weights) -> list:
        """Refs of what will be generated and judged. Nobody waits here: data flows from actor to actor."""
        params = {"n": samples, "temperature": temperature, "max_tokens": self.c.max_response}
        asked = []
        for i, ranks in enumerate(self.generators):
            mine = share(problems, i, len(self.generators))
            if mine:
                prompts = [problem["prompt_ids"].tolist() for problem in mine]
                each = [params | {"seed": problem["seed"]} for problem in mine]
                generated = [rank.generate.remote(prompts, each, weights) for rank in ranks]
                judged = []
                for part, judge in enumerate(self.judges):
                    judged.append(judge.judge.remote(generated[0], mine, part, len(self.judges)))
                if not self.judges:             # here and now, where a breakpoint() works
                    rows = Judge(self.c.reward).judge(self.ray.get(generated[0]), mine)
                    judged.append(self.ray.put(rows))
                asked.append((generated, judged))
        return asked

    def answers(self, asked: list) -> list:
        """Waits for what was asked: a row a response, in the order of the problems."""
        rows = []
        for generated, judged in asked:
            pending = generated[1:] + judged    # if rank 0 fails, its judges do
            while pending:                      # the first that fails is an error at once, even if others never come
                ready, pending = self.ray.wait(pending)
                self.ray.get(ready)
            for part in self.ray.get(judged):
                if isinstance(part, str):
                    print(part, file=sys.stderr)
                    raise ValueError(f"--reward {self.c.reward} failed on the row above; mend it, and start again")
                rows += part
        return rows

    def collect(self, batch: int) -> Path:
        path = Path(self.c.out, "rollouts", f"{batch:06d}.arrow")
        if batch in self.under_way:
            rows = self.answers(self.under_way.pop(batch))
            arrowlite.write(arrowlite.Table.from_pylist(rows), path)
        return path

    def finish(self, step: int) -> int:
        """All that is under way becomes files; how many they are from `step` on."""
        for batch in sorted(self.under_way):
            self.collect(batch)
        return self.asked - step

    def score(self, weights) -> float:
        asked = self.ask(self.held_out, 1, self.c.eval_temperature, weights)
        rows = self.answers(asked)
        return float(np.mean([row["reward"] for row in rows]))

# --- the loop --------------------------------------------------------------------------------------------------------
def train(c: Config) -> dict[int, float]:
    """Returns the scores on held-out problems, by the number of steps before them."""
    r = Run(c)
    try:
        for step in range(r.start, c.steps):
            began = time.perf_counter()
            path = r.exchange(step)         # weights of version `step` go out, batch `step` comes in
            waited = time.perf_counter() - began
            numbers = learn(r, lay_out(arrowlite.read(path)), step)
            r.log.log(step + 1, **numbers, seconds_wait=waited)
            r.done = step + 1
        r.exchange(c.steps)                 # for the last score, and no batch; no rank leaves while another waits
        r.policy.model.save_pretrained(Path(c.out, "model"))
        r.log.close()
        return r.scores
    finally:
        r.close()

class Run:
    def __init__(self, c: Config):
        """What can be known to be wrong with the settings is an error before anything is written or started."""
        self.c = c
        self.mesh = parallel.init(pp=c.pp, tp=c.tp, device=c.device)
        torch.set_num_threads(1)                            # processes share the cores
        check(c)
        problems = held_out = []
        if self.mesh.rank == 0:
            problems, held_out = load_prompts(c)
        self.policy = self.learner("policy", c.lr)
        self.critic = self.learner("critic", c.critic_lr) if c.advantage == "gae" else None
        self.reference = self.model() if c.kl != "none" else None
        sft.claim(c)
        state = self.restore()
        self.start = self.done = state["step"]
        self.exact = None                       # does the engine compute what the trainer does? not known yet
        self.scores = {}
        if self.start == 0 and self.mesh.rank == 0:
            Path(c.out, "metrics.jsonl").unlink(missing_ok=True)            # of a run that did not get to a checkpoint
        self.log = sft.Log(c, c.steps, self.start)
        self.rollouts = Rollouts(c, problems, held_out, **state) if self.mesh.rank == 0 else None

    def model(self, value_head: bool = False) -> Qwen3:
        dtype = self.c.dtype and getattr(torch, self.c.dtype)
        return Qwen3.from_pretrained(
            self.c.model, mesh=self.mesh, dtype=dtype, recompute=self.c.recompute, value_head=value_head)

    def learner(self, name: str, lr: float) -> Learner:
        model = self.model(value_head=name == "critic")
        optimizer = AdamW(model, lr, weight_decay=self.c.weight_decay, clip=self.c.clip)
        return Learner(name, model, optimizer, lr)

    def exchange(self, step: int) -> Path:
        """The file of batch `step`, the same on all ranks; generators are told of these weights."""
        c = self.c
        weights = pack_weights(self.policy.model, step)
        found = [None]
        new = step > self.start or step == 0        # or it was just loaded: it was scored and saved before
        if self.rollouts:
            weights = self.rollouts.ray.put(weights)
            if self.rollouts.held_out and new and (step % c.eval_every == 0 or step == c.steps):
                self.scores[step] = self.rollouts.score(weights)
                self.log.log(step, val_reward=self.scores[step])
        if self.done and new and (step % c.save_every == 0 or step == c.steps):
            self.save()                             # behind its score, which would come twice otherwise
        if self.rollouts:
            found = [self.rollouts.next(step, weights)]
        if self.mesh.size > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def save(self):
        """Weights, optimizers, the number of the step; what is being generated is waited for, and becomes files."""
        folder = Path(self.c.out, "checkpoints")
        ahead = self.rollouts.finish(self.done) if self.rollouts else 0
        state = {"step": self.done, "ahead": ahead}
        for learner in filter(None, (self.critic, self.policy)):        # in this order: `restore` goes by the policy
            path = folder / learner.name / f"step-{self.done:06d}"
            parallel.save(path, learner.model, learner.optimizer, state)
        if self.mesh.rank == 0:                                         # now that both are there
            for own in folder.iterdir():
                for old in sorted(own.glob("step-*"))[:-self.c.keep]:
                    shutil.rmtree(old)

    def restore(self) -> dict:
        folder = Path(self.c.out, "checkpoints")
        newest = parallel.latest(folder / "policy") if self.c.resume else None
        if newest is None:
            return {"step": 0, "ahead": 0}
        if self.critic:
            parallel.load(folder / "critic" / newest.name, self.critic.model, self.critic.optimizer)
        return parallel.load(newest, self.policy.model, self.policy.optimizer)

    def close(self):
        if self.rollouts:
            self.rollouts.ray.shutdown()
            if self.done == 0 and not self.c.resume:        # nothing was learned: the folder is free again
                Path(self.c.out, "config.json").unlink(missing_ok=True)

# --- settings that cannot be, prompts, the demo ----------------------------------------------------------------------
def check(c: Config):
    if not (c.model and c.data and c.out):
        raise ValueError("--model, --data and --out must be given; python ppo.py alone is the demo")
    sft.at_least_one(c, "batch", "samples", "max_response", "minibatches", "epochs", "generator_tp", "steps",
                     "save_every", "log_every", "eval_every")
    importlib.import_module(c.runtime)
    positions = parallel.Config.from_pretrained(c.model).max_position_embeddings
    if c.max_prompt + c.max_response > positions:
        raise ValueError(f"--max_prompt + --max_response are more than the {positions} tokens that the model knows")
    if c.samples < 2 and c.advantage in ("grpo", "rloo"):
        raise ValueError(f"--advantage {c.advantage} compares the responses to a prompt: take --samples 2 or more")
    if not c.temperature > 0:
        raise ValueError(f"--temperature {c.temperature}: samples that are learned from need one above 0")
    if c.reward != "math":
        load_function(c.reward)

def load_prompts(c: Config) -> tuple[list[dict], list[dict]]:
    """Problems to learn from, and others for a score."""
    problems = usable(c, c.data, "train")
    held_out = []
    if c.eval_data:
        held_out = usable(c, c.eval_data, "test")
    elif c.held_out:
        held_out = problems[c.held_out - 1::c.held_out]
        del problems[c.held_out - 1::c.held_out]
    if len(problems) < c.batch:
        raise ValueError(f"{c.data} has {len(problems)} problems to learn from; take --batch {len(problems)} or less")
    return problems, held_out

def usable(c: Config, data: str, split: str) -> list[dict]:
    """Without those whose prompt is too long, or whose answer is soon guessed: that would teach guessing."""
    problems = load_problems(data, split, columns=c.reward != "math")
    texts, prompts = chat_prompts(problems, AutoTokenizer.from_pretrained(parallel.local_folder(c.model)))
    kept = []
    for row, (problem, text, ids) in enumerate(zip(problems, texts, prompts)):
        gold = problem["answer"]
        guessed = gold.lower().strip(".") in ("yes", "no", "true", "false")
        if len(ids) <= c.max_prompt and not (guessed and c.reward == "math"):
            ids = np.array(ids, np.int32)
            own = {"gold": gold, "prompt": text, "prompt_ids": ids, "row": row, "seed": row}
            kept.append(problem | own)
    if len(kept) < len(problems):
        print(f"{len(problems) - len(kept):,} of {len(problems):,} problems of {data} are left out: a prompt of more "
              f"than --max_prompt {c.max_prompt} tokens, or an answer that is soon guessed")
    return kept

def demo():
    """Two teachers show a tiny model how to add, of whom only one boxes his sums; then it finds out which is right."""
    torch.set_num_threads(1)                            # a tiny model gains nothing from more
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        arrowlite.Table.from_pylist(arithmetic(10_000, boxed=0.5)).to_jsonl("sums.jsonl")
        arrowlite.Table.from_pylist(arithmetic(200, 1, held_out=True)).to_jsonl("others.jsonl")
        parallel.tiny_model("tiny", hidden_size=64, num_hidden_layers=2)
        sft.prepare("sums.jsonl", "tiny", "taught.arrow")
        sft.train(sft.Config(
            "tiny", "taught.arrow", "sft", batch=16, steps=600, lr=3e-3, min_lr=3e-4, warmup=0.05,
            max_tokens=4096, device="cpu", log_every=100))
        scores = train(Config(
            "sft/model", "sums.jsonl", "others.jsonl", out="ppo", batch=128, samples=1, max_prompt=128,
            max_response=40, minibatches=2, steps=18, lr=2e-4, critic_lr=1e-3, critic_warmup=0, warmup=5,
            eval_every=9, eval_temperature=1.0, graders=1, log_every=3, device="cpu"))
    print("score on new problems, by steps before it:", scores)
    assert scores[18] > scores[0] + 0.2, "PPO should have raised the score by 20 points"

def main():
    if len(sys.argv) == 1 and "RANK" not in os.environ:
        return demo()
    with mistakes():
        train(arguments(Config))
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
