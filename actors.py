"""actors.py: a small Ray. Functions become tasks, classes become actors, each in a process of its own.

    driver ----+           +---- worker    The hub, a process with one thread, knows every object, task and actor. In it
    (your      |           |    (a task)   the life of a task is a coroutine: wait for arguments, for resources, call
    program)   +--- hub ---+---- worker    a worker, try again. The driver and the workers hold a socket to it.
         |                 |    (an actor) The operating system keeps the books. A packet of messages is whole or not
         +---- memory files ----+          there. A value over 64 kB is a memory file, written once: its descriptor
    travels with the message about it, readers map it, and it has no name. A process that dies is an end of file.

    import actors as ray                            The API is Ray's: init, shutdown, is_initialized, remote, put, get,
    @ray.remote                                     wait, kill, cancel, get_actor, exit_actor, method, nodes,
    def square(x): return x * x                     cluster_resources, available_resources, get_gpu_ids,
    ray.get([square.remote(i) for i in range(9)])   get_runtime_context, exceptions; util: ActorPool, placement_group;
    python actors.py    (how fast it is beside Ray) cluster_utils.Cluster.

What differs: it is for one machine (for more, write `import ray` for `import actors as ray`). What no node could hold
is an error at once, a wrong argument one at get(). cancel() of a task that runs ends its process. A detached actor ends
with its driver. What was lost is not computed again, values never spill to disk; up to four memory files of freed ones
stay with their maker for its next. What goes is freed within 0.1 s. Namespaces and sizes of memory are ignored. There
are no generators, concurrency groups, node affinity, dashboard. To write into what was got is a segfault: clone it.
"""
import array, asyncio, atexit, importlib.util, inspect, io, math, mmap, os, pickle, resource
import select, signal, socket, subprocess, sys, threading, time, timeit, traceback, types, warnings, weakref
from asyncio import CancelledError
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial, partialmethod
from itertools import chain, count, islice
from pathlib import Path
from secrets import randbits, token_hex
import cloudpickle          # for functions of __main__, lambdas, closures: they cannot be pickled by name

INLINE = 64_000             # bytes: larger values get a memory file
PACKET = 120_000            # bytes: Linux takes packets of 200 kB, but malloc gives 130 kB or more back each time
TAG = "ACTORS_WORKER"       # the environment variable by which a worker's descendants are known
warnings.filterwarnings("ignore", message="The given buffer is not writable")       # torch's, about what is got

# --- errors, by Ray's names -------------------------------------------------------------------------------------------
class RayError(Exception): """Whatever goes wrong around a task."""
class RayTaskError(RayError):       # what goes wrong inside of it: of this type, and of the type that was raised, too
    def __init__(self, function_name, traceback_str, cause=None):
        self.function_name, self.traceback_str, self.cause = function_name, traceback_str, cause
    def __str__(self): return self.traceback_str
    def __reduce__(self): return task_error, (self.function_name, self.traceback_str, self.cause)
def task_error(name, text, cause):
    try:
        kind = type(f"RayTaskError({type(cause).__name__})", (RayTaskError, type(cause)), {})
        error = kind.__new__(kind, *cause.args)
        error.__dict__.update(vars(cause))
        error.args = cause.args
        if isinstance(cause, OSError): OSError.__init__(error, *cause.args)     # errno lives outside of __dict__
    except Exception: error = RayTaskError(name, text)  # a type that does not let itself be inherited from
    RayTaskError.__init__(error, name, text, cause)
    return error
class RayActorError(RayError): """The actor cannot answer."""
class ActorDiedError(RayActorError): """The actor is dead and stays so."""
class ActorUnavailableError(RayActorError): """The actor died during this call; it restarts."""
class WorkerCrashedError(RayError): """The process died while it ran the task."""
class TaskCancelledError(RayError): """The task was cancelled."""
class GetTimeoutError(RayError, TimeoutError): """The value was not there in time."""
class ObjectStoreFullError(RayError): """The machine has no memory for the value."""
class ObjectLostError(RayError): """No ref to the value was left."""
class TaskUnschedulableError(RayError): """No node could ever run this task."""
class ActorUnschedulableError(RayActorError): """No node could ever hold this actor."""
class RaySystemError(RayError): """The hub is gone."""

# --- values: pickled with their buffers apart, so that large ones are written once and read without a copy ------------
class Pickler(cloudpickle.Pickler):
    def reducer_override(self, value):
        torch = sys.modules.get("torch")
        if isinstance(value, ObjectRef): self.refs.append(value.id)
        elif torch and type(value) is torch.Tensor and value.is_cpu:
            flat = value.detach().resolve_conj().contiguous().flatten().view(torch.uint8)
            return restore_tensor, (pickle.PickleBuffer(flat.numpy()), value.dtype, value.shape, value.requires_grad)
        return super().reducer_override(value)
def restore_tensor(buffer, dtype, shape, requires_grad):
    import torch
    flat = torch.frombuffer(buffer, dtype=dtype) if math.prod(shape) else torch.empty(0, dtype=dtype)
    return flat.view(shape).requires_grad_(requires_grad)
def pack(value):
    """(pieces to be written one after the other, their bytes in all, ids of the refs in the value). The pieces: the
    lengths of what follows, pickled, then the value, pickled, and its buffers; each filled up to a multiple of 64"""
    stream = io.BytesIO()
    buffers = []
    pickler = Pickler(stream, protocol=5, buffer_callback=buffers.append)
    pickler.refs = []
    pickler.dump(value)
    contents = [stream.getbuffer(), *[buffer.raw() for buffer in buffers]]
    pieces = []
    for content in [pickle.dumps(list(map(len, contents))), *contents]:
        pieces += [content, bytes(-len(content) % 64)]
    return pieces, sum(map(len, pieces)), pickler.refs
def pack_small(value): return b"".join(pack(value)[0])
def unpack(data):                   # arrays in the value are views of the data
    view = memoryview(data)
    position = len(view)
    contents = []
    for length in reversed(pickle.loads(view)):
        position -= length + -length % 64
        contents.insert(0, view[position:position + length])
    return pickle.loads(contents[0], buffers=contents[1:])

# --- packets of messages, and with them the descriptors of the memory files that are items of a message ---------------
class Memory(mmap.mmap): """A mapped memory file. Views of a value keep it, it keeps the object's count, as `hold`."""
@dataclass(eq=False)
class File:
    size: int
    fd: int = None                  # set by who receives it
    def map(self): return Memory(self.fd, self.size, prot=mmap.PROT_READ)
    def __reduce__(self): return File, (self.size,)
    def __del__(self): os.close(self.fd)
def send_packet(sock, messages):
    data = pickle.dumps(messages)
    files = [item for item in chain(*messages) if isinstance(item, File)]
    if len(data) > PACKET:          # it is a memory file itself
        files.insert(0, File(len(data), os.memfd_create("actors")))
        os.pwrite(files[0].fd, data, 0)
        data = b"file"
    if files: socket.send_fds(sock, [data], [file.fd for file in files])
    else: sock.send(data)
def open_packet(data, ancillary, *_):           # its messages; there are none when the other end is gone
    fds = [fd for _, _, numbers in ancillary for fd in array.array("i", numbers)]
    if data == b"file":
        with open(fds.pop(0), "rb") as file: data = file.read()
    messages = pickle.loads(data) if data else []
    for item in chain(*messages):
        if isinstance(item, File): item.fd = fds.pop(0)
    return messages

# --- resources: what a node or a bundle has ---------------------------------------------------------------------------
class Pool:                         # of a node, or of a bundle, which took it from one. "GPU:" and a name: a GPU
    def __init__(self, total, node=None):
        self.id = token_hex(28)
        self.total = total
        self.free = dict(total)
        self.node = node or self
        self.idle = set()           # workers of this node, free for any task
    def take(self, demand):         # what was taken: the demand, and which GPUs; None if it does not fit now
        amount = demand.get("GPU", 0)
        share = min(amount, 1)      # of the fullest that has room for it; or whole ones
        roomy = [name for name in sorted(self.free, key=self.free.get) if "GPU:" in name and self.free[name] >= share]
        if len(roomy) < amount or not covers(self.free, demand): return None
        taken = demand | dict.fromkeys(roomy[:math.ceil(amount)], share)
        self.change(taken, -1)
        return taken
    def change(self, amounts, sign):
        for name, amount in amounts.items():
            self.free[name] = round(self.free[name] + sign * amount, 4)         # ten times 0.1 is 1
def covers(amounts, demand): return all(amounts.get(name, 0) >= amount for name, amount in demand.items())
def node_total(cpus, gpus, resources):
    total = {"CPU": cpus, "GPU": len(gpus)} | resources | {f"GPU:{name}": 1 for name in gpus}
    return {name: amount for name, amount in total.items() if amount}
def place_bundles(bundles, strategy, nodes):
    """A pool for every bundle, or None. PACK wants few nodes, SPREAD many; STRICT_ insists on one, or on one each."""
    attempts = [[node] for node in nodes if "PACK" in strategy]
    if strategy != "STRICT_PACK": attempts.append(nodes)
    for attempt in attempts:
        pools = []
        for bundle in bundles:
            used = [pool.node for pool in pools]
            for node in sorted(attempt, key=used.count, reverse=strategy == "PACK"):
                taken = None if strategy == "STRICT_SPREAD" and node in used else node.take(bundle)
                if taken is not None:
                    pools.append(Pool(taken, node))
                    break
        if len(pools) == len(bundles): return pools
        for pool in pools: pool.node.change(pool.total, 1)      # all or nothing

# --- the hub: one process, one thread, no locks -----------------------------------------------------------------------
@dataclass(eq=False)
class Object:
    arrived: asyncio.Future         # of (bytes or a File, is it an error?)
    holds: int = 0                  # refs in processes, tasks that need it, objects that contain it: freed at 0
    maker: "Peer" = None            # who gets its pages back, for the next value
    inside: list = ()               # ids of the refs that the value contains
@dataclass(eq=False)
class Task:                         # a call; that of a constructor is the actor: they end together, a try is a restart
    id: int
    function: int                   # the object that is the pickled function or class
    method: str                     # of an actor; "__init__" makes the actor; "" is a plain task
    args: bytes                     # or a File
    deps: list                      # refs that are arguments themselves: it runs when they are there
    refs: list                      # all refs in the arguments, at any depth: they live until it has run
    returns: list                   # ids of the objects that it makes
    options: dict                   # comes pickled, and mostly was there before
    actor: object                   # an id; in the hub, the Task of its constructor
    fields: tuple                   # all of the above, as a worker wants them. What follows is for the hub alone
    owner: "Peer" = None            # who has submitted it
    life = worker = None            # the coroutine, and where it runs
    death = up = None               # an actor's: what further calls get; set when calls can be sent, or never will be
    def __post_init__(self): self.options = known(self.options)
known = lru_cache(1000)(pickle.loads)
class Failed(Exception):            # a try came to nothing. `error` is for who wants the value; `again`: try again
    def __init__(self, error, again=False):
        self.error = error if isinstance(error, bytes) else pack_small(error)
        self.again = again
class Loop(asyncio.AbstractEventLoop):          # as much of one as asyncio's futures and tasks need
    todo = deque()
    def call_soon(self, function, *args, context=None): self.todo.append(partial(function, *args))
    get_debug = bool                # that is, False
    create_future = asyncio.Future
class Peer:                         # a process at the other end of a socket; what is said to it goes in packets of many
    process = node = tag = actor = None
    env = {}                        # variables that what it submits inherits
    single = False                  # runs no further task
    grant = None                    # (pool, what was taken from it)
    blocked = 0                     # how many of its threads wait for values
    gone = None                     # Failed, when it has died
    def __init__(self, sock, **known):
        vars(self).update(known)
        self.sock = sock
        self.out = []
        self.holds = Counter()
        self.replies = {}           # task id (or "its end") -> future, of what runs there
        self.turns = weakref.WeakKeyDictionary()    # actor -> lock: what is asked of it, in order
        sock.setblocking(False)
        poller.register(sock, select.EPOLLIN)
        workers[sock.fileno()] = self
    def send(self, *message):
        told[self] = True
        self.out.append(message)
    def flush(self):
        try:
            while self.out:
                send_packet(self.sock, self.out[:20])
                del self.out[:20]
        except BlockingIOError: return                  # it is full: later
        except OSError: self.out.clear()                # it is gone, and reading will say so
        del told[self]
    def hear(self):
        messages = open_packet(*self.sock.recvmsg(PACKET, 2000))
        if not messages: peer_died(self)
        for name, *args in messages: globals()[f"on_{name}"](self, *args)
# What the hub knows. on_X(peer, ...) handles message X; ask_X(peer, ...) answers question X.
objects, tasks, actors, groups, lines = {}, {}, {}, {}, {}      # by id; a group is its bundles, or None: it waits;
machines, workers = [], {}          # lines: a lock for those who ask for the same; machines: the pools of the nodes
changed = asyncio.Event()           # for who waits for resources
told = {}                           # the peers to whom something is to be sent, in order
poller = select.epoll()
loop = Loop()
def serve(fd, total):               # the process of the hub. It ends when the driver does, and with it all that ran
    machines.append(Pool(total))
    asyncio._set_running_loop(loop)
    Peer(inherited(fd))
    for turn in count():            # it hears all, does all, says all, and only then waits
        for fd, _ in poller.poll(0.01 if told else None):
            try: workers[fd].hear()
            except ConnectionError: pass            # its end follows
            except Exception: traceback.print_exc()
        while loop.todo: loop.todo.popleft()()
        for peer in list(told):     # to wake the driver takes long: it hears more at a time, while there is more to do
            if peer.process or not turn % 99 or not poller.poll(0): peer.flush()
def on_ask(peer, oid, name, *args):                 # a question is an object whose value is the answer
    add(peer, oid)
    try: answer = globals()[f"ask_{name}"](peer, *args)
    except Exception as error: answer = error       # what makes no sense is the asker's problem
    seal(oid, pack_small(answer), failed=isinstance(answer, Exception))
# - objects: counted, shown, freed -
def add(peer, oid):
    objects[oid] = Object(asyncio.Future())
    on_borrow(peer, oid)
def on_borrow(peer, oid):
    if oid not in objects: return peer.send("value", oid, lost(oid), True)
    peer.holds.update(hold([oid]))
    objects[oid].arrived.add_done_callback(lambda arrived: peer.send("value", oid, *arrived.result()))
def lost(oid): return pack_small(ObjectLostError(f"object {oid:024x} was freed, as no ref to it was left"))
def hold(oids):
    known = [oid for oid in oids if oid in objects]
    for oid in known: objects[oid].holds += 1
    return known
def on_drop(peer, *oids):
    for oid in oids:
        if oid in peer.holds:                       # else its maker was interrupted before it could say so
            peer.holds[oid] -= 1
            if not peer.holds[oid]: del peer.holds[oid]
            release([oid])
def release(oids):
    stack = list(oids)
    while stack:
        oid = stack.pop()
        obj = objects.get(oid)
        if obj: obj.holds -= 1
        if not obj or obj.holds: continue
        del objects[oid]
        stack += obj.inside
        if obj.maker: obj.maker.send("recycle", oid)
        if oid in actors: bury(actors.pop(oid), b"")            # no handle is left, and no call
def on_put(peer, oid, value, refs):
    objects[oid] = Object(asyncio.Future())
    peer.holds.update(hold([oid]))
    seal(oid, value, hold(refs), peer)
def seal(oid, value, inside=(), maker=None, failed=False):  # the value is there; what is inside of it is held already
    obj = objects.setdefault(oid, Object(asyncio.Future()))
    obj.maker = maker if isinstance(value, File) else None
    obj.inside = inside
    obj.arrived.set_result((value, failed))
    release(hold([oid]))                            # maybe nobody wants it any more
# - the life of a task -
def on_submit(peer, *fields):
    task = tasks[fields[0]] = Task(*fields, fields, peer)
    task.refs = hold([task.function, *task.refs, task.actor])
    task.retries = task.options["retries"]          # how often it may be tried again; -1, for ever, never comes to 0
    task.actor = actors.get(task.actor)
    for oid in task.returns: add(peer, oid)
    if task.method == "__init__":
        task.actor = actors[task.id] = task
        task.up = asyncio.Event()
        objects[task.id].holds += task.options["lifetime"] == "detached"
    task.life = asyncio.Task(live(task))
async def live(task):  # from the arguments to the values, or the error. If there are tries left, it lives again
    attempt = run_alone if task.method in ("", "__init__") else run_call
    failure = None
    try: results = await attempt(task)
    except CancelledError: failure = Failed(TaskCancelledError(f"{task.options['label']} was cancelled"))
    except Failed as error: failure = error
    except Exception as error: failure = Failed(error)              # options of another type, perhaps
    if failure and failure.again and task.retries:
        task.retries -= 1
        task.worker = None
        task.life = asyncio.Task(live(task))
        return
    if failure: results = [(failure.error, ())] * len(task.returns)
    for oid, (value, inside) in zip(task.returns, results): seal(oid, value, inside, task.worker, failure is not None)
    if task.method == "__init__": bury(task, failure.error)
    del tasks[task.id]
    release(task.refs)
async def run_alone(task):          # a task; or an actor: its constructor, and then until the end of its process
    await arguments(task)
    async with lines.setdefault(hash(task.fields[7]), asyncio.Lock()):
        while not start(task): await changed.wait()
    worker = task.worker
    try:
        results = await call(worker, task)
        if task.actor:
            task.up.set()
            if not task.retries:                    # else a restart needs its arguments again
                release(task.refs)
                task.refs = []
            await reply(worker, "its end")
        return results
    except CancelledError:
        worker.single = True                        # it still runs the task: give_back ends it
        raise
    finally: give_back(worker)
async def run_call(task):
    actor = task.actor
    if not actor: raise Failed(ActorDiedError("the actor is dead, and forgotten: no handle was left"))
    line = actor if actor.options["max_concurrency"] == 1 else task
    async with task.owner.turns.setdefault(line, asyncio.Lock()):   # its caller's next call waits until this is sent
        await arguments(task)
        await actor.up.wait()
    if actor.death: raise actor.death
    return await call(actor.worker, task)
async def arguments(task):          # waits until they are there, and raises what the first bad one failed with
    for oid in task.deps:
        if oid not in objects: raise Failed(lost(oid))
        arrived = objects[oid].arrived
        await asyncio.wait([arrived])               # to await it alone would cancel it with this task
        value, failed = arrived.result()
        if failed: raise Failed(value)
async def call(worker, task):
    task.worker = worker
    worker.send("run", *task.fields)
    return await reply(worker, task.id)
async def reply(worker, key):       # "its end" never comes: it raises when the process dies
    if worker.gone: raise worker.gone
    future = worker.replies[key] = asyncio.Future()
    return await future
def on_done(worker, tid, refs, error, again, *values):
    future = worker.replies.pop(tid, None)
    if not future or future.done(): return          # it was cancelled; its process ends, and its values with it
    if error: future.set_exception(Failed(error, again))
    else: future.set_result(list(zip(values, map(hold, refs))))  # hold now, as the worker may let go of them at once
def ask_cancel(peer, oid):
    for task in tasks.values():
        if oid not in task.returns or task.method == "__init__": continue
        if task.actor and task.worker: task.worker.send("cancel", task.id)      # async calls can be; others go on
        else:                                       # soon: a coroutine that has not begun would not reach its except
            task.retries = 0
            loop.call_soon(task.life.cancel)
# - resources and workers -
def start(task):                    # takes resources and a worker. False if it has to wait for them
    demand = task.options["demand"]
    pools = machines
    if task.options["bundle"]:
        group, first, last = task.options["bundle"]
        if group in groups and not groups[group]: return False  # its placement group waits itself
        pools = groups.get(group, [])[first:last]
    running = [worker for worker in workers.values() if worker.grant and not (worker.actor or worker.blocked)]
    if len(running) > 63 and not (demand or task.actor): return False       # those that ask for nothing are many, too
    if not any(covers(pool.total, demand) for pool in pools):
        error = ActorUnschedulableError if task.actor else TaskUnschedulableError
        raise Failed(error(f"{task.options['label']} asks for {demand}: nowhere could that ever be had"))
    for pool in pools:
        taken = pool.take(demand)
        if taken is not None:
            gpus = [name[4:] for name in taken if "GPU:" in name]
            task.worker = find_worker(pool.node, task.owner.env | task.options["runtime_env"].get("env_vars", {}), gpus)
            task.worker.grant = pool, taken
            task.worker.actor = task.actor
            return True
def find_worker(node, env, gpus):
    if node.idle and not env and not gpus: return node.idle.pop()
    tag = f"{os.environ[TAG]}-{token_hex(8)}"
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if "GPU" in node.total else {}
    process, sock = start_python("work", visible | env, tag, node.id, gpus)
    return Peer(sock, process=process, node=node, tag=tag, env=env, single=env or gpus)
def give_back(worker):              # what it ran is over, or given up: its resources are free, and so is it
    on_blocked(worker, -worker.blocked)
    pool, taken = worker.grant
    pool.change(taken, 1)
    worker.grant = None
    if worker.gone or worker.single or worker.actor or len(worker.node.idle) >= worker.node.total.get("CPU", 1):
        end(worker)
    else: worker.node.idle.add(worker)
    look_again()
def look_again():                                   # who waits for resources does
    changed.set()
    changed.clear()
def on_blocked(worker, change):     # what waits for a value lends its CPU, or nested tasks would wait for ever
    before = worker.blocked > 0
    worker.blocked += change
    lent = (worker.blocked > 0) - before
    if lent and worker.grant:
        pool, taken = worker.grant
        pool.change({name: taken[name] for name in taken if name == "CPU"}, lent)
        look_again()
def end(worker):
    if worker: worker.process.kill()
def peer_died(worker):
    if not worker.process:                          # the driver
        end_tagged(f"{os.environ[TAG]}-")
        os._exit(0)
    del workers[worker.sock.fileno()]
    worker.sock.close()
    end_tagged(worker.tag)                          # what it has started ends with it
    code = worker.process.wait()
    reason = f"process {worker.process.pid} ended with {signal.Signals(-code).name if code < 0 else code}"
    worker.node.idle.discard(worker)
    actor = worker.actor
    if actor and (actor.death or not actor.retries):
        actor.death = worker.gone = actor.death or Failed(ActorDiedError(f"the actor is dead: {reason}"))
    else:
        error = ActorUnavailableError if actor else WorkerCrashedError
        worker.gone = Failed(error(reason), again=True)
        if actor: actor.up.clear()
    for future in worker.replies.values():
        if not future.done(): future.set_exception(worker.gone)
    release(worker.holds.elements())
# - actors: how they end, and their names -
def bury(actor, error):                             # every further call gets this error
    actor.death = actor.death or Failed(error)
    actor.retries = 0
    actor.up.set()
    if actor.worker and not actor.worker.gone: end(actor.worker)
    else: loop.call_soon(actor.life.cancel)
def on_kill(peer, aid, no_restart):
    actor = actors.get(aid)
    if actor and no_restart: bury(actor, ActorDiedError("the actor is dead: it was killed, or has left"))
    elif actor: end(actor.worker)
def ask_actor(peer, name, exists, *fields):     # the one of this name, if it may exist; or a new one
    for actor in actors.values():
        if name and actor.options["name"] == name and not actor.death:
            if exists: return actor.id, actor.fields[7]
            raise ValueError(f"an actor named {name!r} lives already: take another name, or get_if_exists=True")
    if not fields: raise ValueError(f"no actor named {name!r} lives")
    on_submit(peer, *fields)
    return fields[0], fields[7]
# - nodes and placement groups -
def ask_add_node(peer, cpus, gpus, resources):
    machines.append(Pool(node_total(cpus, range(gpus), resources)))
    look_again()
    return machines[-1].id
def ask_nodes(peer):
    return [{"NodeID": node.id, "Alive": True, "Resources": node.total, "Available": node.free} for node in machines]
def on_group(peer, gid, *fields):
    add(peer, gid)
    groups[gid] = None
    asyncio.Task(reserve(gid, *fields))
async def reserve(gid, bundles, strategy, value):
    while gid in groups:
        groups[gid] = place_bundles(bundles, strategy, machines)
        if groups[gid]:
            seal(gid, value)
            return look_again()                     # for what waits for its bundles
        await changed.wait()
    error = TaskUnschedulableError("the placement group was removed before it was placed")
    seal(gid, pack_small(error), failed=True)
def on_remove_group(peer, gid):
    pools = groups.pop(gid, None) or []
    for worker in workers.values():
        if worker.grant and worker.grant[0] in pools:
            end(worker)
            if worker.actor: bury(worker.actor, ActorDiedError("the actor is dead: its placement group was removed"))
    for pool in pools: pool.node.change(pool.total, 1)
    look_again()

# --- processes --------------------------------------------------------------------------------------------------------
def start_python(function, env, tag, *args):
    """A process that calls a function of this file, and a socket to it. Ctrl-C is the driver's: a new session."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = [*map(os.path.abspath, sys.path), os.path.dirname(os.path.abspath(__file__))]
    fd = theirs.fileno()
    code = f"import sys; sys.path = {path!r}; import {__name__} as actors; actors.{function}({fd}, *{args!r})"
    with theirs:
        process = subprocess.Popen([sys.executable, "-uc", code], pass_fds=[fd], env=os.environ | env | {TAG: tag},
                                   start_new_session=True, stdin=subprocess.DEVNULL)
    return process, ours
def inherited(fd):
    os.set_inheritable(fd, False)                   # what it starts must not keep its socket open
    return socket.socket(fileno=fd)
def end_tagged(tag):                # ends all that inherited this in their environment, whatever session they are in
    found = True
    while found:                                    # one may just be starting another
        found = False
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"{TAG}={tag}".encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    found = True

# --- the client: what the driver and the workers have in common -------------------------------------------------------
@dataclass(eq=False)
class Hold:                         # one of an object's counts. It lives as long as a ref, or a view of the memory
    client: object
    oid: int
    def __del__(self): self.client.dropped.append(self.oid)
class ObjectRef:
    def __init__(self, client, oid=None):
        self.id = oid or next(client.ids)
        self.hold = Hold(client, self.id)
        self.ready = None           # or (bytes or Memory, is it an error?)
        self.awaited = []           # futures of event loops
        client.refs[self.id] = self
    def value(self):
        self.hold.client.until(lambda: self.ready)
        data, failed = self.ready
        value = unpack(data)
        if not failed: return value
        try: raise value
        finally: del value          # it has this frame in its traceback: no cycle, or views would live on
    def __await__(self):
        client = self.hold.client
        future = Future()
        future.set_running_or_notify_cancel()       # asyncio.wait_for() cannot cancel it
        with client.turn:
            self.awaited.append(future)
            if self.ready: future.set_result(None)
        _ = client.pump
        yield from asyncio.wrap_future(future)
        return self.value()
    def hex(self): return f"{self.id:024x}"
    def __reduce__(self): return borrow, (self.id,)
def borrow(oid):                    # this process's ref, or a new one. Who sent it holds it until the hub has read this
    client = connected()
    ref = client.refs.get(oid)
    if ref is None:
        ref = ObjectRef(client, oid)
        client.send("borrow", oid)
    return ref
class Client:                       # any thread may send: a packet is whole or not there; who waits reads, for all
    works, node, gpus = False, None, ()
    def __init__(self, sock, **known):
        vars(self).update(known)
        self.sock = sock
        self.ids = count(randbits(64) << 32)
        self.refs = weakref.WeakValueDictionary()
        self.used = {}              # id -> File, of the large values that this process has made
        self.spare = deque(maxlen=4)                # those whose values are gone
        self.dropped = deque()      # ids of refs that are gone: the next packet says so
        self.packets = deque()      # what has come and is not handled yet
        self.turn = threading.Lock()
        self.poller = select.epoll()
        self.poller.register(sock, select.EPOLLIN)
        self.guard = threading.Thread(target=self.watch, daemon=True)
        self.guard.start()
    @cached_property
    def pump(self): threading.Thread(target=self.until, args=[lambda: not self.guard.is_alive()], daemon=True).start()
    def send(self, *message):
        drops = ["drop"]
        with suppress(IndexError):       # other threads send, too
            while True: drops.append(self.dropped.popleft())
        try: send_packet(self.sock, [drops, message])
        except OSError as error: raise RaySystemError("the hub is gone; call shutdown() and init() again") from error
    def ask(self, *question):
        answer = ObjectRef(self)
        self.send("ask", answer.id, *question)
        return answer.value()
    def find_actor(self, *question):
        aid, options = self.ask("actor", *question)
        return ActorHandle(borrow(aid), options)
    def until(self, there, timeout=math.inf):       # False if it is not so in time, though all that has come is read
        end = time.monotonic() + timeout
        while not there():
            left = max(0, end - time.monotonic())
            if not (self.poller.poll(min(left, 0.1)) or left): return False
            with self.turn:         # Ctrl-C comes before or after a packet is taken, in one step of C. What was
                with suppress(OSError):                         # interrupted is done again; files may be closed then
                    self.packets.extend(map(self.sock.recvmsg, [PACKET], [2000], [socket.MSG_DONTWAIT]))
                while self.packets:
                    with suppress(OSError):
                        for name, *args in open_packet(*self.packets[0]): globals()[f"on_{name}"](self, *args)
                    self.packets.popleft()
        return True
    def watch(self):                # says what was dropped, if nobody else does, and sees how it ends
        poll = select.poll()
        poll.register(self.sock, 0)
        with suppress(RaySystemError):
            while not poll.poll(100):
                if self.dropped: self.send("drop")
        with self.turn:
            for oid in list(self.refs.data): on_value(self, oid, pack_small(RaySystemError("the hub is gone")), True)
        if self.works: os._exit(1)
        self.hub.wait()             # whatever it died of, nothing stays of what it had started
        end_tagged(f"{self.session}-")
    def store(self, value, oid=None):    # (bytes or a File, ids of the refs inside); with an id, to be recycled
        pieces, size, refs = pack(value)
        if size <= INLINE: return b"".join(pieces), refs
        file = self.find_file(size)
        file.memory.seek(0)
        for piece in pieces: file.memory.write(piece)
        if oid: self.used[oid] = file
        return file, refs
    def find_file(self, size):      # pages that were used before, if there are: fresh ones are ten times slower
        if self.dropped: self.ask("nodes")          # when it answers, what was dropped is here
        self.until(bool, 0)
        for file in list(self.spare):
            if size <= len(file.memory) <= 2 * size:
                with suppress(ValueError):           # another thread has it
                    self.spare.remove(file)
                    file.size = size
                    return file
        for _ in range(20):
            free = int(Path("/proc/meminfo").read_text().split()[7]) * 1024     # MemAvailable
            if size < free:
                file = File(size, os.memfd_create("actors"))
                os.posix_fallocate(file.fd, 0, size)
                file.memory = mmap.mmap(file.fd, size)
                return file
            self.spare.clear()
            time.sleep(0.05)        # others may be letting go just now
        raise ObjectStoreFullError(f"{size:,} bytes do not fit into the {free:,} that this machine has")
def on_value(client, oid, value, failed):
    ref = client.refs.get(oid)
    if not ref or ref.ready: return
    if isinstance(value, File):
        value = value.map()
        value.hold = ref.hold
    ref.ready = value, failed
    for future in ref.awaited: future.set_result(None)
def on_recycle(client, oid):
    if oid in client.used: client.spare.append(client.used.pop(oid))

# --- a worker's life --------------------------------------------------------------------------------------------------
constructor = None                  # the Task that made the actor that lives here
running, cancelled, inbox = {}, set(), deque()      # id -> asyncio task, of an async actor; ids; Tasks to run
begin = inbox.append                # what is done with a call that comes
def work(fd, node, gpus):           # a worker: runs tasks, or an actor's calls: one by one, in threads, or in a loop
    global the_client
    the_client = Client(inherited(fd), works=True, node=node, gpus=gpus)
    while True:
        the_client.until(lambda: inbox)
        the_client.until(bool, 0)   # a cancel, perhaps
        call = inbox.popleft()
        if call.method == "__init__": become(call)
        execute(call)
def become(call):                   # an actor; if it takes several calls at a time, later ones do not go to the inbox
    global constructor, begin, loop, slots
    constructor = call
    most = call.options["max_concurrency"]
    if call.options["asynchronous"]:
        loop = asyncio.new_event_loop()
        slots = asyncio.Semaphore(most)
        begin = partial(loop.call_soon_threadsafe, begin_async)
        loop.call_soon(execute, call)             # so its constructor finds a running loop
        _ = the_client.pump
        loop.run_forever()
    elif most > 1: begin = partial(ThreadPoolExecutor(most).submit, execute)
def on_run(client, *call): begin(Task(*call, call))
def on_cancel(client, tid):         # soon: what has not begun could not even say so
    cancelled.add(tid)
    if tid in running: loop.call_soon_threadsafe(loop.call_soon, running[tid].cancel)
def begin_async(call): running[call.id] = loop.create_task(execute_async(call))
async def execute_async(call):
    try:
        async with slots:
            result = resolve(call)()
            succeed(call, await result if inspect.isawaitable(result) else result)
    except BaseException as error: fail(call, error)
    del running[call.id]
def execute(call):
    try: succeed(call, resolve(call)())
    except BaseException as error: fail(call, error)
def resolve(call):                  # what to call, with its arguments: refs among them have become their values
    if call.id in cancelled: raise CancelledError
    if isinstance(call.args, File): call.args = call.args.map()
    args, kwargs = unpack(call.args)
    kwargs = {name: value_of(arg) for name, arg in kwargs.items()}
    if call.function: target = load(call.function)
    else: target = getattr(instance, call.method, partial(ray_call, instance))
    return partial(target, *map(value_of, args), **kwargs)
def succeed(call, result):
    global instance
    count = len(call.returns)
    if call.method == "__init__": instance, result = result, None
    values = [result] if count == 1 else list(result or ())
    if len(values) != count:
        raise ValueError(f"{call.options['label']} returned {len(values)} values, but num_returns={count}")
    stored = [the_client.store(value, oid) for value, oid in zip(values, call.returns)]
    the_client.send("done", call.id, [refs for _, refs in stored], None, False, *[value for value, _ in stored])
def fail(call, error):
    if isinstance(error, SystemExit):           # exit_actor(), too
        atexit._run_exitfuncs()
        the_client.send("kill", call.actor, True)
        os._exit(1)
    name = call.options["label"]
    again = False
    text = f"{name}() failed in process {os.getpid()}:\n{traceback.format_exc()}"
    failure = RayTaskError(name, text, error.cause if isinstance(error, RayTaskError) else error)
    if call.method == "__init__": failure = ActorDiedError(f"the actor is dead: its constructor failed\n{text}")
    if isinstance(error, CancelledError): failure = TaskCancelledError(f"{name} was cancelled")
    try:
        packed = pack_small(failure)
        unpack(packed)
        kinds = unpack(call.options["retry_exceptions"])
        again = kinds is True or isinstance(error, tuple(kinds or ()))
    except Exception as problem:                # it cannot be sent, or made again: at least it can be read
        packed = pack_small(RayTaskError(name, f"{text}\n(which itself could not be sent: {problem})"))
    the_client.send("done", call.id, [], packed, again)
def ray_call(instance, function=bool, *args, **kwargs): return function(instance, *args, **kwargs)
def value_of(arg): return arg.value() if isinstance(arg, ObjectRef) else arg
@lru_cache
def load(function): return borrow(function).value()

# --- the API, by Ray's names ------------------------------------------------------------------------------------------
the_client = None
def forget_client():                # a forked child must not speak on its parent's socket, nor keep it open
    global the_client
    if the_client: the_client.sock.close()
    the_client = None
os.register_at_fork(after_in_child=forget_client)
def connected():
    if the_client is None: init()
    return the_client
def init(address=None, *, num_cpus=None, num_gpus=None, resources=None, runtime_env=None, ignore_reinit_error=False,
         **_of_ray):                # what Ray has for its dashboard, its logs and the size of its memory is ignored
    global the_client
    context = ExitStack()                # so that `with init():` ends in a shutdown
    context.callback(shutdown)
    if the_client:
        if ignore_reinit_error or address or the_client.works: return context
        raise RuntimeError("init() was called twice: call shutdown() first, or pass ignore_reinit_error=True")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))        # large values take descriptors
    cpus = len(os.sched_getaffinity(0)) if num_cpus is None else num_cpus
    total = node_total(cpus, visible_gpus(num_gpus), resources or {})
    session = token_hex(8)
    hub, sock = start_python("serve", (runtime_env or {}).get("env_vars", {}), session, total)
    the_client = Client(sock, hub=hub, session=session)
    return context
def visible_gpus(count):            # their names: those of CUDA_VISIBLE_DEVICES, indices or UUIDs, or else 0, 1,
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and count is None: count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return visible.split(",")[:count] if visible else [str(i) for i in range(count or 0)]
@atexit.register
def shutdown():
    global the_client
    client = the_client
    if client is None or client.works: return
    the_client = None
    client.sock.shutdown(socket.SHUT_RDWR)          # the hub, too, reads its end
    client.guard.join()
    client.sock.close()
    put_once.cache_clear()
def is_initialized(): return the_client is not None
def put(value):
    client = connected()
    ref = ObjectRef(client)
    stored, refs = client.store(value, ref.id)
    client.send("put", ref.id, stored, refs)
    on_value(client, ref.id, stored, False)
    return ref
def get(refs, *, timeout=None):
    if isinstance(refs, ObjectRef): return get([refs], timeout=timeout)[0]
    if not arrive(refs, len(refs), timeout): raise GetTimeoutError(f"{len(refs)} values were not there in {timeout} s")
    return [ref.value() for ref in refs]
def arrive(refs, count, timeout):   # so many of them, or False: not in time. A task that waits lends its CPU to others
    def there():
        missing = (ref for ref in reversed(refs) if not ref.ready)      # the last ones mostly come last
        return len(list(islice(missing, spare))) < spare
    spare = len(refs) - count + 1
    if there(): return True
    client = connected()
    if client.works: client.send("blocked", 1)
    try: return client.until(there, math.inf if timeout is None else timeout)
    finally:
        if client.works: client.send("blocked", -1)
def wait(refs, *, num_returns=1, timeout=None, fetch_local=True):
    """(the first num_returns of those that are ready, all others), both in the order in which they came."""
    if refs and not 0 < num_returns <= len(set(refs)) == len(refs):
        raise ValueError(f"wait() for {num_returns} of {len(refs)} refs: it takes each once, and as many at most")
    arrive(refs, num_returns, timeout)
    ready = [ref for ref in refs if ref.ready][:num_returns]
    chosen = set(ready)
    return ready, [ref for ref in refs if ref not in chosen]
def cancel(ref, **_of_ray): connected().ask("cancel", ref.id)
def kill(actor, *, no_restart=True): connected().send("kill", actor._ref.id, no_restart)
def exit_actor(): raise SystemExit
def get_actor(name, **_of_ray): return connected().find_actor(name, True)
def method(**options):              # defaults for one method of an actor: @method(num_returns=2)
    def mark(function):
        function._options = checked(options)
        return function
    return mark

# --- remote functions and actors --------------------------------------------------------------------------------------
DEFAULTS = {"num_cpus": None, "num_gpus": 0, "resources": {}, "runtime_env": {}, "scheduling_strategy": "DEFAULT",
            "num_returns": 1, "max_retries": 3, "retry_exceptions": False, "name": None, "namespace": None,
            "get_if_exists": False, "lifetime": None, "max_concurrency": None, "max_restarts": 0, "max_task_retries": 0,
            "max_calls": 0, "memory": 0}            # the last two, and the namespace, are Ray's and ignored
def checked(options):
    if unknown := options.keys() - DEFAULTS.keys():
        raise ValueError(f"unknown options {unknown}: choose from {list(DEFAULTS)}")
    return {name: value for name, value in options.items() if value is not None}
@lru_cache(1000)
def put_once(client, target): return put(target)         # a function or class is an object like any other
class Remote:                       # what can be called: a function, a class, or a method of an actor; with its options
    def __init__(self, target, given, actor=None):
        self.target, self.given, self.actor = target, given, actor      # of an actor, the target is the method's name
        self.method = target if actor else "__init__" if inspect.isclass(target) else ""
    def options(self, **options): return Remote(self.target, self.given | checked(options), self.actor)
    @cached_property
    def plan(self):                 # what the hub and the workers have to know of the options
        own = {"bundle": None, "label": getattr(self.target, "__name__", ""), "num_cpus": 0 if self.method else 1}
        plan = DEFAULTS | own | self.given          # as in Ray, an actor has to ask for a CPU
        tries = {"": "max_retries", "__init__": "max_restarts"}.get(self.method, "max_task_retries")
        plan["retries"] = plan[tries]
        plan["retry_exceptions"] = pack_small(plan["retry_exceptions"])         # as the hub does not know these types
        demand = {"CPU": plan["num_cpus"], "GPU": plan["num_gpus"]} | plan["resources"]
        plan["demand"] = {name: amount for name, amount in demand.items() if amount}
        if self.method == "__init__":
            members = inspect.getmembers(self.target, callable)
            asynchronous = any(inspect.iscoroutinefunction(member) for _, member in members)
            plan |= {"methods": {name: getattr(member, "_options", {}) for name, member in members},
                     "asynchronous": asynchronous,
                     "max_concurrency": plan["max_concurrency"] or (1000 if asynchronous else 1)}
        strategy = plan.pop("scheduling_strategy")
        if isinstance(strategy, PlacementGroupSchedulingStrategy):
            index = strategy.placement_group_bundle_index
            plan["bundle"] = strategy.placement_group.id.id, max(index, 0), index + 1 or None
        return pickle.dumps(plan)
    def remote(self, *args, **kwargs):              # the refs of the values, or the handle of an actor
        client = connected()
        plan = known(self.plan)
        stored, refs = client.store((args, kwargs))
        deps = [arg.id for arg in (*args, *kwargs.values()) if isinstance(arg, ObjectRef)]
        values = [ObjectRef(client) for _ in range(plan["num_returns"])]
        returns = [value.id for value in values]
        tid = returns[0] if returns else next(client.ids)
        function = None if self.actor else put_once(client, self.target).id
        fields = (tid, function, self.method, stored, deps, refs, returns, self.plan)
        if self.method == "__init__": return client.find_actor(plan["name"], plan["get_if_exists"], *fields, tid)
        client.send("submit", *fields, self.actor and self.actor.id)
        return values[0] if len(values) == 1 else values or None
class ActorHandle:                  # handle.method.remote(...) calls. The actor ends when no handle is left anywhere
    def __init__(self, ref, plan): self._ref, self._plan = ref, plan
    def __getattr__(self, name):
        plan = known(self._plan)
        methods = plan["methods"] | {"__ray_ready__": {}, "__ray_call__": {}}
        if name not in methods: raise AttributeError(f"actor {plan['label']} has no method {name!r}")
        given = {"max_task_retries": plan["max_task_retries"], "label": f"{plan['label']}.{name}"} | methods[name]
        return vars(self).setdefault(name, Remote(name, given, self._ref))      # and for the next time
    def __reduce__(self): return ActorHandle, (self._ref, self._plan)
def remote(target=None, **options):  # @remote, @remote(num_cpus=2, ...), or remote(function)
    return partial(remote, **options) if target is None else Remote(target, checked(options))

# --- where am I, and what is there? -----------------------------------------------------------------------------------
class RuntimeContext:
    def get_node_id(self): return connected().node or nodes()[0]["NodeID"]
    def get_actor_id(self): return constructor and f"{constructor.id:024x}"
    def get_accelerator_ids(self): return {"GPU": list(connected().gpus)}
    current_actor = property(lambda self: ActorHandle(borrow(constructor.id), constructor.fields[7]))
def get_runtime_context(): return RuntimeContext()
def get_gpu_ids(): return [int(gpu) if gpu.isdigit() else gpu for gpu in connected().gpus]
def nodes(): return connected().ask("nodes")
def cluster_resources(): return sum_up("Resources")
def available_resources(): return sum_up("Available")
def sum_up(which):
    total = Counter()
    for node in nodes(): total += Counter(node[which])      # which forgets what is 0
    return {name: amount for name, amount in total.items() if "GPU:" not in name}
class Cluster:                      # several nodes on one machine: each is a pool of resources with workers of its own
    address = "local"
    def __init__(self, head_node_args=None, **_of_ray):
        self.shutdown = init(**head_node_args or {}).close
    def add_node(self, num_cpus=1, num_gpus=0, resources=None, **_of_ray):
        return types.SimpleNamespace(node_id=connected().ask("add_node", num_cpus, num_gpus, resources or {}))

# --- placement groups: resources that are taken together, or not at all -----------------------------------------------
@dataclass
class PlacementGroup:               # it lives until it is removed, or its driver ends
    id: ObjectRef
    bundle_specs: list
    def ready(self): return self.id
    def wait(self, timeout_seconds=30): return bool(wait([self.id], timeout=timeout_seconds)[0])
def placement_group(bundles, strategy="PACK", **_of_ray):
    if strategy not in ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"):
        raise ValueError(f"strategy={strategy!r}: choose from PACK, SPREAD, STRICT_PACK, STRICT_SPREAD")
    client = connected()
    group = PlacementGroup(ObjectRef(client), bundles)
    client.send("group", group.id.id, bundles, strategy, pack_small(group))
    return group
def remove_placement_group(group): connected().send("remove_group", group.id.id)
@dataclass
class PlacementGroupSchedulingStrategy:
    placement_group: PlacementGroup
    placement_group_bundle_index: int = -1          # -1: any
    placement_group_capture_child_tasks: bool = False           # Ray's; here what a task starts is never captured
class ActorPool:                    # spreads calls over actors, one at a time on each
    def __init__(self, actors):
        self.idle, self.waiting, self.busy = list(actors), [], {}       # busy: ref -> its actor, as they were submitted
    def submit(self, fn, value):
        self.waiting.append((fn, value))
        self.push()
    def push(self, *actors):
        self.idle += actors
        while self.idle and self.waiting:
            actor = self.idle.pop()
            fn, value = self.waiting.pop(0)
            self.busy[fn(actor, value)] = actor
    def get_next(self, timeout=None, among=1):
        if not self.busy: raise StopIteration
        ready, _ = wait(list(self.busy)[:among], timeout=timeout)
        if not ready: raise TimeoutError("no result was there in time")
        self.push(self.busy.pop(ready[0]))
        return get(ready[0])
    def map(self, fn, values, among=1):
        for value in values: self.submit(fn, value)
        return (self.get_next(None, among) for _ in iter(self.has_next, False))
    get_next_unordered = partialmethod(get_next, among=None)
    map_unordered = partialmethod(map, among=None)
    def has_next(self): return bool(self.busy)
    def has_free(self): return bool(self.idle)
    def pop_idle(self): return self.idle.pop() if self.idle else None
# So that `from actors.util import ActorPool` works: Ray's modules are all this one
util = exceptions = cluster_utils = actor = scheduling_strategies = sys.modules[__name__]
for name in ("exceptions actor cluster_utils util util.actor_pool util.placement_group "
             "util.scheduling_strategies").split(): sys.modules[f"{__name__}.{name}"] = util

# --- the demo: how fast it is -----------------------------------------------------------------------------------------
class Plain:
    def method(self): pass
def measure(ray, large):            # how often a second a module with Ray's API does what: the best of three runs
    import numpy
    start = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    task = ray.remote(lambda: 9)
    assert ray.get(task.remote()) == 9
    rates = {"init to the first result": 1 / (time.perf_counter() - start)}
    def note(what, *action, **options):
        timer = timeit.Timer(partial(*action, **options))
        rates[what] = max(count / seconds for count, seconds in [timer.autorange() for _ in range(3)])
    def call(function, times): ray.get([function.remote() for _ in range(times)])
    method = ray.remote(Plain).remote().method
    for times in 1, 1000:
        note(f"{times} tasks", call, task, times)
        note(f"{times} actor calls", call, method, times)
    note("wait for 1000 values", ray.wait, [ray.put(i) for i in range(1000)], num_returns=1000)
    note("put of 1 GiB", ray.put, numpy.ones(large, "u1"))
    ray.shutdown()
    return rates
def table(names, large=1_073_741_824):        # bytes: 1 GiB
    columns = [measure(importlib.import_module(name), large) for name in names]
    print("how often a second:", *names)
    for what in columns[0]: print(f"{what:26}", *[f"{column[what]:12,.1f}" for column in columns])
if __name__ == "__main__":
    import actors                   # not as __main__: workers have to find its classes under the name they import
    actors.table(["actors", "ray"] if importlib.util.find_spec("ray") else ["actors"])
