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
    python actors.py    (a demo; speed beside Ray)  cluster_utils.Cluster.

What differs: it is for one machine (for more, write `import ray` for `import actors as ray`). What no node could hold
is an error at once, a wrong argument one at get(). cancel() of a task that runs ends its process. A detached actor
ends with its driver. What was lost is not computed again, values never spill to disk; up to four memory files of freed
ones stay with their maker for its next. Namespaces and sizes of memory are ignored. There are no generators,
concurrency groups, node affinity, dashboard. What was got is read-only: to write into a tensor is a segfault, clone it.
"""
import asyncio, atexit, collections, contextlib, contextvars, dataclasses, importlib.util, inspect, io
import itertools, math, mmap, os, pickle, queue, resource, secrets, signal, socket, struct, subprocess, sys
import threading, time, timeit, traceback, types, warnings, weakref
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError as LateError, as_completed
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
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
    """(pieces to be written one after the other, their bytes in all, ids of the refs in the value). The pieces:
    n | n lengths | pickle | buffer | buffer ..., each at a multiple of 64 bytes"""
    stream = io.BytesIO()
    buffers = []
    pickler = Pickler(stream, protocol=5, buffer_callback=buffers.append)
    pickler.refs = []
    pickler.dump(value)
    contents = [stream.getbuffer(), *[buffer.raw() for buffer in buffers]]
    pieces = [struct.pack(f"<{len(contents) + 1}Q", len(contents), *map(len, contents))]
    size = len(pieces[0])
    for content in contents:
        pieces += [bytes(-size % 64), content]
        size += -size % 64 + len(content)
    return pieces, size, pickler.refs
def pack_small(value): return b"".join(pack(value)[0])
def unpack(data):                   # arrays in the value are views of the data
    view = memoryview(data)
    position = 8 + 8 * view[0:8].cast("Q")[0]
    contents = []
    for length in view[8:position].cast("Q"):
        position += -position % 64
        contents.append(view[position:position + length])
        position += length
    return pickle.loads(contents[0], buffers=contents[1:])

# --- packets of messages, and with them the descriptors of the memory files that are items of a message ---------------
class Memory(mmap.mmap): """A mapped memory file. Views of a value keep it, it keeps the object's count, as `hold`."""
@dataclasses.dataclass(eq=False)
class File:
    size: int
    fd: int = None                  # set by who receives it
    def map(self): return Memory(self.fd, self.size, prot=mmap.PROT_READ)
    def __reduce__(self): return File, (self.size,)
    def __del__(self): os.close(self.fd)
def send_packet(sock, messages):
    data = pickle.dumps(messages)
    files = [item for item in itertools.chain(*messages) if isinstance(item, File)]
    if len(data) > PACKET:          # it is a memory file itself
        files.insert(0, File(len(data), os.memfd_create("actors")))
        os.write(files[0].fd, data)
        data = b"file"
    socket.send_fds(sock, [data], [file.fd for file in files])
def receive(sock):                  # the messages of a packet; there are none when the other end is gone
    try: data, fds, _, _ = socket.recv_fds(sock, PACKET, 250)
    except ConnectionError: return []
    if data == b"file":
        with open(fds.pop(0), "rb") as file:
            file.seek(0)
            data = file.read()
    messages = pickle.loads(data) if data else []
    for item in itertools.chain(*messages):
        if isinstance(item, File): item.fd = fds.pop(0)
    return messages

# --- resources: what a node or a bundle has ---------------------------------------------------------------------------
class Pool:
    """What a node has, or a bundle, which took it from a node. "GPU:" and a visible GPU's name is a resource, too."""
    def __init__(self, total, node=None):
        self.id = secrets.token_hex(28)
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
@dataclasses.dataclass(eq=False)
class Object:
    arrived: asyncio.Future         # of (bytes or a File, is it an error?)
    holds: int = 0                  # refs in processes, tasks that need it, objects that contain it: freed at 0
    maker: "Peer" = None            # who gets its pages back, for the next value
    inside: list = ()               # ids of the refs that the value contains

@dataclasses.dataclass(eq=False)
class Task:                         # a call; that of a constructor is the actor: they end together, a try is a restart
    id: int
    function: int                   # the object that is the pickled function or class
    method: str                     # of an actor; "__init__" makes the actor; "" is a plain task
    args: bytes                     # or a File
    deps: list                      # refs that are arguments themselves: it runs when they are there
    refs: list                      # all refs in the arguments, at any depth: they live until it has run
    returns: list                   # ids of the objects that it makes
    options: dict
    actor: object                   # an id; in the hub, the Task of its constructor
    fields: tuple = ()              # all of the above, as a worker wants them. What follows is for the hub alone
    owner: "Peer" = None            # who has submitted it
    retries: int = 0                # how often it may be tried again; -1, for ever, never comes down to 0
    life: object = None             # the coroutine
    worker: "Peer" = None           # where it runs
    death: "Failed" = None          # an actor's: what every further call gets
    up: asyncio.Event = None        # an actor's: set when calls can be sent, or never will be
class Failed(Exception):            # a try came to nothing. `error` is for who wants the value; `again`: try again
    def __init__(self, error, again=False):
        self.error = error if isinstance(error, bytes) else pack_small(error)
        self.again = again
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
        self.holds = collections.Counter()
        self.replies = {}           # task id (or "its end") -> future, of what runs there
        self.turns = weakref.WeakKeyDictionary()    # actor -> lock: what is asked of it, in order
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(sock, hear, self)
        sock.setblocking(False)
        workers.add(self)
    def send(self, *message):
        if not self.out: self.loop.call_soon(self.flush)
        self.out.append(message)
    def flush(self):
        try:
            while self.out:
                send_packet(self.sock, self.out[:20])
                del self.out[:20]
            self.loop.remove_writer(self.sock)
        except BlockingIOError: self.loop.add_writer(self.sock, self.flush)
        except (OSError, ValueError): self.out.clear()  # it is gone, and reading will say so

# What the hub knows. on_X(peer, ...) handles message X; ask_X(peer, ...) answers question X.
objects, tasks, actors, groups, lines = {}, {}, {}, {}, {}      # by id; a group is its bundles, or None: it waits;
machines, workers = [], set()       # lines: a lock for those who ask for the same; machines: the pools of the nodes
changed = asyncio.Event()           # for who waits for resources
over = asyncio.Event()
def serve(fd, total):               # the process of the hub. It ends when the driver does, and with it all that ran
    async def main():
        machines.append(Pool(total))
        Peer(inherited(fd))         # its end of file is not enough: a child of the driver may hold the socket open
        asyncio.get_running_loop().add_reader(os.pidfd_open(os.getppid()), over.set)
        await over.wait()
        end_tagged(f"{os.environ[TAG]}-")
        os._exit(0)
    asyncio.run(main())
def hear(peer):
    with contextlib.suppress(BlockingIOError):
        for _ in range(100):                        # then it is the turn of others
            messages = receive(peer.sock)
            if not messages: return peer_died(peer)
            for name, *args in messages: globals()[f"on_{name}"](peer, *args)
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
def on_drop(peer, oid):
    if oid in peer.holds:                           # else its maker was interrupted before it could say so
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
    task.retries = task.options["retries"]
    task.actor = actors.get(task.actor)
    for oid in task.returns: add(peer, oid)
    if task.method == "__init__":
        task.actor = actors[task.id] = task
        task.up = asyncio.Event()
        objects[task.id].holds += task.options["lifetime"] == "detached"
    task.life = asyncio.ensure_future(live(task))
async def live(task):  # from the arguments to the values, or the error. If there are tries left, it lives again
    attempt = run_alone if task.method in ("", "__init__") else run_call
    failure = None
    try: results = await attempt(task)
    except asyncio.CancelledError: failure = Failed(TaskCancelledError(f"{task.options['label']} was cancelled"))
    except Failed as error: failure = error
    except Exception as error: failure = Failed(error)              # options of another type, perhaps
    if failure and failure.again and task.retries:
        task.retries -= 1
        task.worker = None
        task.life = asyncio.ensure_future(live(task))
        return
    if failure: results = [(failure.error, ())] * len(task.returns)
    for oid, (value, inside) in zip(task.returns, results): seal(oid, value, inside, task.worker, failure is not None)
    if task.method == "__init__": bury(task, failure.error)
    del tasks[task.id]
    release(task.refs)
async def run_alone(task):          # a task; or an actor: its constructor, and then until the end of its process
    await arguments(task)
    async with lines.setdefault(task.options["shape"], asyncio.Lock()):
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
    except asyncio.CancelledError:
        worker.single = True                        # it still runs the task: give_back ends it
        raise
    finally: give_back(worker)
async def run_call(task):
    actor = task.actor
    if not actor: raise Failed(ActorDiedError("the actor is dead, and forgotten: no handle was left"))
    ordered = actor.options["max_concurrency"] == 1
    turn = task.owner.turns.setdefault(actor, asyncio.Lock()) if ordered else contextlib.nullcontext()
    async with turn:                                # the next of its caller's calls waits until this one is sent
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
    for task in list(tasks.values()):
        if oid not in task.returns or task.method == "__init__": continue
        if task.actor and task.worker:              # an async call can be cancelled there, others go on
            task.worker.send("cancel", task.id)
        else:                                       # soon: a coroutine that has not begun would not reach its except
            task.retries = 0
            peer.loop.call_soon(task.life.cancel)

# - resources and workers -
def start(task):                    # takes resources and a worker. False if it has to wait for them
    demand = task.options["demand"]
    pools = machines
    if task.options["bundle"]:
        group, first, last = task.options["bundle"]
        if group in groups and not groups[group]: return False  # its placement group waits itself
        pools = groups.get(group, [])[first:last]
    running = [worker for worker in workers if worker.grant and not (worker.actor or worker.blocked)]
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
    tag = f"{os.environ[TAG]}-{secrets.token_hex(8)}"
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
    if worker and not worker.gone: worker.process.kill()

def peer_died(worker):
    if not worker.process: return over.set()        # the driver
    worker.loop.remove_reader(worker.sock)
    worker.sock.close()
    end_tagged(worker.tag)                          # what it has started ends with it
    code = worker.process.wait()
    reason = f"process {worker.process.pid} ended with {signal.Signals(-code).name if code < 0 else code}"
    workers.discard(worker)
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
    else: actor.owner.loop.call_soon(actor.life.cancel)
def on_kill(peer, aid, no_restart):
    actor = actors.get(aid)
    if actor and no_restart: bury(actor, ActorDiedError("the actor is dead: it was killed, or has left"))
    elif actor: end(actor.worker)
def ask_actor(peer, name, exists, *fields):     # the one of this name, if it may exist; or a new one
    for actor in actors.values():
        if name and actor.options["name"] == name and not actor.death:
            if exists: return actor.id, actor.options
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
    asyncio.ensure_future(reserve(gid, *fields))
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
    for worker in workers:
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
            with contextlib.suppress(OSError):
                if f"{TAG}={tag}".encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    found = True

# --- the client: what the driver and the workers have in common -------------------------------------------------------
@dataclasses.dataclass(eq=False)
class Hold:                         # one of an object's counts. It lives as long as a ref, or a view of the memory
    client: object
    oid: int
    def __del__(self):
        with contextlib.suppress(RaySystemError): self.client.send("drop", self.oid)

class ObjectRef:
    def __init__(self, client, oid):
        self.id = oid
        self.hold = Hold(client, oid)
        self.ready = False
        self.arrived = Future()     # of (bytes or Memory, is it an error?)
        self.arrived.set_running_or_notify_cancel()             # asyncio.wait_for() cannot cancel it
        client.refs[oid] = self
    def value(self):
        data, failed = self.arrived.result()
        value = unpack(data)
        if not failed: return value
        try: raise value
        finally:
            del value               # it has this frame in its traceback: no cycle, or views would live on
    def __await__(self):
        yield from asyncio.wrap_future(self.arrived)
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

class Client:
    """A socket to the hub. Any thread may send: a packet is whole or not there. One reads, and fulfils futures."""
    works, node, gpus = False, None, ()
    def __init__(self, sock, **known):
        vars(self).update(known)
        self.sock = sock
        self.ids = itertools.count(secrets.randbits(64) << 32)
        self.refs = weakref.WeakValueDictionary()
        self.used = {}              # id -> File, of the large values that this process has made
        self.spare = collections.deque(maxlen=4)                # those whose values are gone
        self.reader = threading.Thread(target=self.read, daemon=True)
    def send(self, *message):
        try: send_packet(self.sock, [message])
        except OSError as error: raise RaySystemError("the hub is gone; call shutdown() and init() again") from error
    def ask(self, *question):
        answer = ObjectRef(self, next(self.ids))
        self.send("ask", answer.id, *question)
        return answer.value()
    def find_actor(self, *question):
        aid, options = self.ask("actor", *question)
        return ActorHandle(borrow(aid), options)
    def read(self):
        while messages := receive(self.sock):
            for name, *args in messages: getattr(self, f"on_{name}")(*args)
        for oid in list(self.refs.data):
            self.on_value(oid, pack_small(RaySystemError("the hub is gone")), True)
        self.end()
    def end(self):                  # whatever the hub died of, nothing stays of what it had started
        self.hub.wait()
        end_tagged(f"{self.session}-")
    def on_value(self, oid, value, failed):
        ref = self.refs.get(oid)
        if not ref or ref.ready: return
        if isinstance(value, File):
            value = value.map()
            value.hold = ref.hold
        ref.ready = True
        ref.arrived.set_result((value, failed))
    def on_recycle(self, oid): self.spare.append(self.used.pop(oid))
    def store(self, value, oid=None):    # (bytes or a File, ids of the refs inside); with an id, to be recycled
        pieces, size, refs = pack(value)
        if size <= INLINE: return b"".join(pieces), refs
        file = self.find_file(size)
        file.memory.seek(0)
        for piece in pieces: file.memory.write(piece)
        if oid: self.used[oid] = file
        return file, refs
    def find_file(self, size):      # pages that were used before, if there are: fresh ones are ten times slower
        for file in list(self.spare):
            if size <= len(file.memory) <= 2 * size:
                with contextlib.suppress(ValueError):           # another thread has it
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

# --- a worker's life --------------------------------------------------------------------------------------------------
current = contextvars.ContextVar("current", default=None)           # the Task that runs here

class Worker(Client):               # runs tasks, or an actor's calls: one by one, in threads, or in an event loop
    works = True
    def live(self):
        self.running, self.cancelled, self.inbox = {}, set(), queue.SimpleQueue()       # running: id -> asyncio task
        self.begin = self.inbox.put
        self.reader.start()
        while True:
            call = self.inbox.get()
            if call.method == "__init__": self.become(call)
            self.execute(call)
    def become(self, call):         # an actor; if it takes several calls at a time, later ones do not go to the inbox
        self.plan = call.options
        most = self.plan["max_concurrency"]
        if self.plan["asynchronous"]:
            self.loop = asyncio.new_event_loop()
            self.slots = asyncio.Semaphore(most)
            self.begin = partial(self.loop.call_soon_threadsafe, self.begin_async)
            self.loop.call_soon(self.execute, call)             # so its constructor finds a running loop
            self.loop.run_forever()
        elif most > 1:
            self.begin = partial(ThreadPoolExecutor(most).submit, self.execute)
    def end(self): os._exit(1)      # the hub is gone
    def on_run(self, *call): self.begin(Task(*call))
    def on_cancel(self, tid):       # soon: what has not begun could not even say so
        self.cancelled.add(tid)
        if tid in self.running: self.loop.call_soon_threadsafe(self.loop.call_soon, self.running[tid].cancel)
    def begin_async(self, call): self.running[call.id] = self.loop.create_task(self.execute_async(call))
    async def execute_async(self, call):
        current.set(call)
        try:
            async with self.slots:
                result = self.resolve(call)()
                self.succeed(call, await result if inspect.isawaitable(result) else result)
        except BaseException as error: self.fail(call, error)
        del self.running[call.id]
    def execute(self, call):
        current.set(call)
        try: self.succeed(call, self.resolve(call)())
        except BaseException as error: self.fail(call, error)
    def resolve(self, call):        # what to call, with its arguments: refs among them have become their values
        if call.id in self.cancelled: raise asyncio.CancelledError
        if isinstance(call.args, File): call.args = call.args.map()
        args, kwargs = unpack(call.args)
        kwargs = {name: value_of(arg) for name, arg in kwargs.items()}
        if call.function: target = load(call.function)
        else: target = getattr(self.instance, call.method, partial(ray_call, self.instance))
        return partial(target, *map(value_of, args), **kwargs)
    def succeed(self, call, result):
        count = len(call.returns)
        if call.method == "__init__": self.instance, result = result, None
        values = [result] if count == 1 else list(result or ())
        if len(values) != count:
            raise ValueError(f"{call.options['label']} returned {len(values)} values, but num_returns={count}")
        stored = [self.store(value, oid) for value, oid in zip(values, call.returns)]
        self.send("done", call.id, [refs for _, refs in stored], None, False, *[value for value, _ in stored])
    def fail(self, call, error):
        if isinstance(error, SystemExit):           # exit_actor(), too
            atexit._run_exitfuncs()
            self.send("kill", call.actor, True)
            os._exit(1)
        name, again = call.options["label"], call.options["retry_exceptions"]
        text = f"{name}() failed in process {os.getpid()}:\n{traceback.format_exc()}"
        failure = RayTaskError(name, text, error.cause if isinstance(error, RayTaskError) else error)
        if call.method == "__init__": failure = ActorDiedError(f"the actor is dead: its constructor failed\n{text}")
        if isinstance(error, asyncio.CancelledError): failure = TaskCancelledError(f"{name} was cancelled")
        try:
            packed = pack_small(failure)
            unpack(packed)
            again = again is True or again and isinstance(error, unpack(again))
        except Exception as problem:                # it cannot be sent, or not be made again: at least it can be read
            packed = pack_small(RayTaskError(name, f"{text}\n(which itself could not be sent: {problem})"))
        self.send("done", call.id, [], packed, again)
def ray_call(instance, function=bool, *args, **kwargs): return function(instance, *args, **kwargs)
def value_of(arg): return arg.value() if isinstance(arg, ObjectRef) else arg
@cache
def load(function): return borrow(function).value()
def work(fd, node, gpus):           # the process of a worker
    global the_client
    the_client = Worker(inherited(fd), node=node, gpus=gpus)
    the_client.live()

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
    context = contextlib.ExitStack()                # so that `with init():` ends in a shutdown
    context.callback(shutdown)
    if the_client:
        if ignore_reinit_error or address or the_client.works: return context
        raise RuntimeError("init() was called twice: call shutdown() first, or pass ignore_reinit_error=True")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))        # large values take descriptors
    cpus = len(os.sched_getaffinity(0)) if num_cpus is None else num_cpus
    total = node_total(cpus, visible_gpus(num_gpus), resources or {})
    session = secrets.token_hex(8)
    hub, sock = start_python("serve", (runtime_env or {}).get("env_vars", {}), session, total)
    the_client = Client(sock, hub=hub, session=session)
    the_client.reader.start()
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
    with contextlib.suppress(OSError): client.sock.shutdown(socket.SHUT_RDWR)           # the hub, too, reads its end
    client.reader.join()
    client.sock.close()
    put_once.cache_clear()
def is_initialized(): return the_client is not None
def put(value):
    client = connected()
    ref = ObjectRef(client, next(client.ids))
    stored, refs = client.store(value, ref.id)
    client.send("put", ref.id, stored, refs)
    client.on_value(ref.id, stored, False)
    return ref
def get(refs, *, timeout=None):
    if isinstance(refs, ObjectRef): return get([refs], timeout=timeout)[0]
    if not arrive(refs, len(refs), timeout): raise GetTimeoutError(f"{len(refs)} values were not there in {timeout} s")
    return [ref.value() for ref in refs]
def arrive(refs, count, timeout):
    """Waits until so many are there; False if they are not in time. A task that waits lends its CPU to others."""
    late = [ref.arrived for ref in refs if not ref.ready]
    missing = count - len(refs) + len(late)
    if missing <= 0: return True
    client = connected()
    if client.works: client.send("blocked", 1)
    try: return bool(list(itertools.islice(as_completed(late, timeout), missing)))
    except LateError: return False
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
def cancel(ref, *, force=False, recursive=True): connected().ask("cancel", ref.id)
def kill(actor, *, no_restart=True): connected().send("kill", actor._ref.id, no_restart)
def exit_actor(): raise SystemExit(0)
def get_actor(name, namespace=None): return connected().find_actor(name, True)
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
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(options.get("retry_exceptions"), (list, tuple)):      # packed, as the hub does not know these types
        options["retry_exceptions"] = pack_small(tuple(options["retry_exceptions"]))
    return options
@lru_cache(1000)
def put_once(client, target): return put(target)         # a function or class is an object like any other

class Remote:                       # what can be called: a function, a class, or a method of an actor; with its options
    def __init__(self, target, given, actor=None):
        self.target, self.given, self.actor = target, given, actor      # of an actor, the target is the method's name
        self.method = target if actor else "__init__" if inspect.isclass(target) else ""
    def options(self, **options): return Remote(self.target, self.given | checked(options), self.actor)
    @cached_property
    def plan(self):                 # what the hub and the workers have to know of the options
        plan = DEFAULTS | self.given
        if self.actor:
            return {"label": f"{self.actor._plan['label']}.{self.target}", "retries": plan["max_task_retries"],
                    "num_returns": plan["num_returns"], "retry_exceptions": plan["retry_exceptions"]}
        plan |= {"label": self.target.__name__, "retries": plan["max_retries"], "bundle": None}
        cpus = plan["num_cpus"]
        if cpus is None: cpus = 0 if self.method else 1         # as in Ray: an actor has to ask for one
        demand = {"CPU": cpus, "GPU": plan["num_gpus"]} | plan["resources"]
        plan["demand"] = {name: amount for name, amount in demand.items() if amount}
        if self.method:
            members = inspect.getmembers(self.target, callable)
            asynchronous = any(inspect.iscoroutinefunction(member) for _, member in members)
            plan |= {"methods": {name: getattr(member, "_options", {}) for name, member in members},
                     "retries": plan["max_restarts"], "asynchronous": asynchronous,
                     "max_concurrency": plan["max_concurrency"] or (1000 if asynchronous else 1)}
        strategy = plan.pop("scheduling_strategy")
        if isinstance(strategy, PlacementGroupSchedulingStrategy):
            index = strategy.placement_group_bundle_index
            plan["bundle"] = strategy.placement_group.id.id, max(index, 0), index + 1 or None
        plan["shape"] = f"{plan['demand']} {plan['bundle']}"
        return plan
    def remote(self, *args, **kwargs):              # the refs of the values, or the handle of an actor
        client = connected()
        plan = self.plan
        stored, refs = client.store((args, kwargs))
        deps = [arg.id for arg in (*args, *kwargs.values()) if isinstance(arg, ObjectRef)]
        values = [ObjectRef(client, next(client.ids)) for _ in range(plan["num_returns"])]
        returns = [value.id for value in values]
        tid = returns[0] if returns else next(client.ids)
        function = None if self.actor else put_once(client, self.target)        # kept until it is sent
        fields = (tid, function and function.id, self.method, stored, deps, refs, returns, plan)
        if self.method == "__init__": return client.find_actor(plan["name"], plan["get_if_exists"], *fields, tid)
        client.send("submit", *fields, self.actor and self.actor._ref.id)
        return values[0] if len(values) == 1 else values or None

class ActorHandle:                  # handle.method.remote(...) calls. The actor ends when no handle is left anywhere
    def __init__(self, ref, plan): self._ref, self._plan = ref, plan
    def __getattr__(self, name):
        methods = self._plan["methods"] | {"__ray_ready__": {}, "__ray_call__": {}}
        if name not in methods: raise AttributeError(f"actor {self._plan['label']} has no method {name!r}")
        return Remote(name, {"max_task_retries": self._plan["max_task_retries"]} | methods[name], self)
    def __reduce__(self): return ActorHandle, (self._ref, self._plan)
def remote(target=None, **options):  # @remote, @remote(num_cpus=2, ...), or remote(function)
    return partial(remote, **options) if target is None else Remote(target, checked(options))

# --- where am I, and what is there? -----------------------------------------------------------------------------------
class RuntimeContext:
    def get_node_id(self): return connected().node or nodes()[0]["NodeID"]
    def get_actor_id(self): return current.get() and current.get().actor and f"{current.get().actor:024x}"
    def get_accelerator_ids(self): return {"GPU": list(connected().gpus)}
    current_actor = property(lambda self: ActorHandle(borrow(current.get().actor), connected().plan))
def get_runtime_context(): return RuntimeContext()
def get_gpu_ids(): return [int(gpu) if gpu.isdigit() else gpu for gpu in connected().gpus]
def nodes(): return connected().ask("nodes")
def cluster_resources(): return sum_up("Resources")
def available_resources(): return sum_up("Available")
def sum_up(which):
    total = collections.Counter()
    for node in nodes(): total += collections.Counter(node[which])      # which forgets what is 0
    return {name: amount for name, amount in total.items() if "GPU:" not in name}
class Cluster:                      # several nodes on one machine: each is a pool of resources with workers of its own
    address = "local"
    def __init__(self, initialize_head=True, connect=False, head_node_args=None):
        self.shutdown = init(**head_node_args or {}).close
    def add_node(self, num_cpus=1, num_gpus=0, resources=None, **_of_ray):
        return types.SimpleNamespace(node_id=connected().ask("add_node", num_cpus, num_gpus, resources or {}))

# --- placement groups: resources that are taken together, or not at all -----------------------------------------------
@dataclasses.dataclass
class PlacementGroup:               # it lives until it is removed, or its driver ends
    id: ObjectRef
    bundle_specs: list
    def ready(self): return self.id
    def wait(self, timeout_seconds=30): return bool(wait([self.id], timeout=timeout_seconds)[0])
def placement_group(bundles, strategy="PACK", name="", lifetime=None):
    if strategy not in ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"):
        raise ValueError(f"strategy={strategy!r}: choose from PACK, SPREAD, STRICT_PACK, STRICT_SPREAD")
    client = connected()
    group = PlacementGroup(ObjectRef(client, next(client.ids)), bundles)
    client.send("group", group.id.id, bundles, strategy, pack_small(group))
    return group
def remove_placement_group(group): connected().send("remove_group", group.id.id)
@dataclasses.dataclass
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
        if not self.busy: raise StopIteration("no more results")
        ready, _ = wait(list(self.busy)[:among], timeout=timeout)
        if not ready: raise TimeoutError("no result was there in time")
        self.push(self.busy.pop(ready[0]))
        return get(ready[0])
    def map(self, fn, values, among=1):
        for value in values: self.submit(fn, value)
        return (self.get_next(None, among) for _ in iter(self.has_next, False))
    def get_next_unordered(self, timeout=None): return self.get_next(timeout, None)
    def map_unordered(self, fn, values): return self.map(fn, values, None)
    def has_next(self): return bool(self.busy)
    def has_free(self): return bool(self.idle)
    def pop_idle(self): return self.idle.pop() if self.idle else None

# Ray's module names, so that `from actors.util import ActorPool` works: all are this one.
util = exceptions = cluster_utils = actor = scheduling_strategies = sys.modules[__name__]
for name in ("exceptions actor cluster_utils util util.actor_pool util.placement_group "
             "util.scheduling_strategies").split():
    sys.modules[f"{__name__}.{name}"] = util

# --- the demo, and how fast it is -------------------------------------------------------------------------------------
class Counter:
    count = 0
    def crash(self): os._exit(1)
    def add(self):
        self.count += 1
        return self.count
class AsyncCounter:
    async def add(self): return 1
def demo():
    with init(num_cpus=2):
        counter = remote(Counter).options(max_restarts=1).remote()
        print("an actor counts:", get([counter.add.remote() for _ in range(5)]))
        wait([counter.crash.remote()])
        again = get(counter.add.remote())
        print("it crashes, runs again, and counts from", again)
        assert again == 1
def measure(ray, large):            # how often a second a module with Ray's API does what: the best of three runs
    start = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    task = ray.remote(lambda: 9)
    ray.get(task.remote())
    rates = {"init to the first result": 1 / (time.perf_counter() - start)}
    def note(what, *action, **options):
        timer = timeit.Timer(partial(*action, **options))
        rates[what] = max(count / seconds for count, seconds in [timer.autorange() for _ in range(3)])
    def call(function, times): ray.get([function.remote() for _ in range(times)])
    plain = ray.remote(Counter).remote()
    note("1 task", call, task, 1)
    note("1000 tasks", call, task, 1000)
    note("1 actor call", call, plain.add, 1)
    note("1000 actor calls", call, plain.add, 1000)
    note("1000 async actor calls", call, ray.remote(AsyncCounter).remote().add, 1000)
    note("wait for 1000 values", ray.wait, [ray.put(i) for i in range(1000)], num_returns=1000)
    note("put of 1 GiB", ray.put, importlib.import_module("numpy").ones(large, "u1"))
    ray.shutdown()
    return rates
def table(names, large=1 << 30):
    columns = [measure(importlib.import_module(name), large) for name in names]
    print("how often a second:", *names)
    for what in columns[0]: print(f"{what:26}", *[f"{column[what]:12,.1f}" for column in columns])

if __name__ == "__main__":
    import actors                   # not as __main__: workers have to find its classes under the name they import
    actors.demo()
    actors.table(["actors", "ray"] if importlib.util.find_spec("ray") else ["actors"])
