"""actors.py: a small Ray. Functions become tasks, classes become actors, each in a process of its own.

    driver ----+           +---- worker    The hub, a process with one thread, knows every object, task and actor. In it
    (your      |           |    (a task)   the life of a task is a coroutine: wait for arguments, for resources, call
    program)   +--- hub ---+---- worker    a worker, try again. The driver and the workers hold a socket to it.
         |                 |    (an actor)
         +---- memory files ----+          The operating system keeps the books. A message is one packet: whole or not
    there. A value over 64 kB is a memory file, written once: its descriptor travels with the message about it, readers
    map it, and it has no name. A process that dies is an end of file on its socket. Workers are fresh, no forks.

    import actors as ray                            The API is Ray's: init, shutdown, is_initialized, remote, put, get,
    @ray.remote                                     wait, kill, cancel, get_actor, exit_actor, method, nodes,
    def square(x): return x * x                     cluster_resources, available_resources, get_gpu_ids,
    ray.get([square.remote(i) for i in range(9)])   get_runtime_context, exceptions; util: ActorPool, placement_group,
                                                    scheduling_strategies; cluster_utils.Cluster.
    python actors.py                                the demo, and a table of speeds beside Ray's, if it is installed

What differs from Ray: it is for one machine (for more, write `import ray` in place of `import actors as ray`). What no
node could ever hold is an error at once. A wrong argument is an error at get(). cancel() of a task that runs ends its
process. A detached actor ends with its driver. What was lost is not computed again, values never spill to disk; up to
four memory files of freed ones stay with their maker for its next. Namespaces and the size of the object store are
ignored. There are no generators, concurrency groups, remote drivers, dashboard. What was got is read-only: to write
into a tensor that was got is a segfault, so clone it first.
"""
import asyncio, atexit, collections, contextlib, contextvars, dataclasses, functools, importlib.util, inspect, io
import itertools, math, mmap, os, pickle, queue, resource, secrets, signal, socket, struct, subprocess, sys
import threading, time, timeit, traceback, types, warnings, weakref
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as LateError        # a type of its own before Python 3.11
from pathlib import Path

# cloudpickle: functions of __main__, lambdas and closures cannot be pickled by name, as workers have no such module.
import cloudpickle

INLINE = 64_000             # bytes: larger values get a memory file
PACKET = 130_000            # bytes: Linux takes packets of 200 kB
MOST = 64                   # tasks at the same time, of those that ask for no resource at all
TAG = "ACTORS_WORKER"       # the environment variable by which a worker's descendants are known
GONE = "the hub is gone; call shutdown() and init() again"
HERE = os.path.dirname(os.path.abspath(__file__))
warnings.filterwarnings("ignore", message="The given buffer is not writable")       # torch's, about what is got

# --- errors, by Ray's names -------------------------------------------------------------------------------------------

class RayError(Exception):
    """Whatever goes wrong around a task. What goes wrong inside of it is a RayTaskError, and its own type as well."""

class RayTaskError(RayError):
    def __init__(self, function_name, traceback_str, cause=None):
        self.function_name = function_name
        self.traceback_str = traceback_str
        self.cause = cause

    def __str__(self): return self.traceback_str
    def __reduce__(self): return task_error, (self.function_name, self.traceback_str, self.cause)

def task_error(name, text, cause):
    """The error as `except` wants it: a RayTaskError that is of the type that was raised, too."""
    try:
        kind = type(f"RayTaskError({type(cause).__name__})", (RayTaskError, type(cause)), {})
        error = kind.__new__(kind, *cause.args)
        error.__dict__.update(vars(cause))
        error.args = cause.args
        if isinstance(cause, OSError):              # errno and strerror live outside of __dict__
            OSError.__init__(error, *cause.args)
    except Exception:                               # a type that does not let itself be inherited from
        error = RayTaskError(name, text)
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
        if isinstance(value, ObjectRef):
            self.refs.append(value.id)
        elif torch and type(value) is torch.Tensor and value.is_cpu:
            flat = value.detach().resolve_conj().contiguous().flatten().view(torch.uint8)
            return restore_tensor, (pickle.PickleBuffer(flat.numpy()), value.dtype, value.shape, value.requires_grad)
        return super().reducer_override(value)

def restore_tensor(buffer, dtype, shape, requires_grad):
    import torch
    flat = torch.frombuffer(buffer, dtype=dtype) if math.prod(shape) else torch.empty(0, dtype=dtype)
    return flat.view(shape).requires_grad_(requires_grad)

def pack(value):
    """A value as (pieces to be written one after the other, their bytes in all, ids of the refs inside of it).

    n | n lengths | pickle | buffer | buffer ..., each at a multiple of 64 bytes
    """
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

def unpack(data):
    """The value of packed bytes; arrays in it are views of them."""
    view = memoryview(data)
    position = 8 + 8 * view[0:8].cast("Q")[0]
    contents = []
    for length in view[8:position].cast("Q"):
        position += -position % 64
        contents.append(view[position:position + length])
        position += length
    return pickle.loads(contents[0], buffers=contents[1:])

def copy_bytes(target, source):
    numpy = sys.modules.get("numpy")
    if numpy is None or len(source) < 16 << 20:
        target[:] = source
        return
    sides = [numpy.array_split(numpy.frombuffer(side, "u1"), 4) for side in (target, source)]
    with ThreadPoolExecutor(4) as pool:             # memory is faster than one core
        list(pool.map(numpy.copyto, *sides))

def free_memory():
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024

# --- packets: pickled messages, and with them the descriptors of the memory files in them -----------------------------

class Memory(mmap.mmap):
    """A mapped memory file. Views of a value keep it, and it keeps the object's count, as `hold`."""

class File:
    """A memory file with a large value in it. Its maker knows it by its key."""

    def __init__(self, fd, size, key):
        self.fd = fd
        self.size = size
        self.key = key
        weakref.finalize(self, os.close, fd)

    def map(self, **how): return Memory(self.fd, self.size, **how)

    def __reduce__(self):
        packet.files.append(self)
        return receive_file, (self.size, self.key)

class Packet(threading.local):
    files = None                    # of the message that is being pickled, or unpickled

packet = Packet()

def receive_file(size, key): return File(packet.files.pop(0), size, key)

def pickled(message):
    outer = packet.files            # the garbage collector may send in the middle of another message
    files = packet.files = []
    data = pickle.dumps(message)
    packet.files = outer
    return data, files

def send_packet(sock, data, files):
    if len(data) > PACKET:                          # it is a memory file itself
        files = [File(os.memfd_create("actors"), 0, 0), *files]
        os.write(files[0].fd, data)
        data = b"file"
    if files:
        socket.send_fds(sock, [data], [file.fd for file in files])
    else:
        sock.send(data)

def receive(sock):
    """The messages of the next packet; there are none when the other end is gone."""
    try:
        data, packet.files, _, _ = socket.recv_fds(sock, 2 * PACKET, 250)
    except ConnectionError:
        return []
    if data == b"file":
        with open(packet.files.pop(0), "rb") as file:
            data = os.pread(file.fileno(), 1 << 40, 0)
    stream = io.BytesIO(data)
    messages = []
    while stream.tell() < len(data):
        messages.append(pickle.load(stream))
    return messages

# --- resources: what a node or a bundle has, and where a task may run -------------------------------------------------

class Pool:
    """Resources that are taken and given back: those of a node, or of a bundle, which took them from a node. A GPU is
    a resource of its own, too: "GPU:" and its name in CUDA_VISIBLE_DEVICES."""

    def __init__(self, total, node=None):
        self.id = secrets.token_hex(28)
        self.total = total
        self.free = dict(total)
        self.node = node or self

    def could_fit(self, demand):
        return all(self.total.get(name, 0) >= amount for name, amount in demand.items())

    def take(self, demand):
        """What was taken: the demand, and which GPUs. None if it does not fit now."""
        amount = demand.get("GPU", 0)
        share = min(amount, 1)                      # of the fullest that has room for it; or whole ones
        roomy = [name for name in sorted(self.free, key=self.free.get) if "GPU:" in name and self.free[name] >= share]
        taken = demand | dict.fromkeys(roomy[:math.ceil(amount)], share)
        if len(roomy) < amount or any(self.free.get(name, 0) < amount for name, amount in demand.items()):
            return None
        self.change(taken, -1)
        return taken

    def change(self, amounts, sign):
        for name, amount in amounts.items():
            self.free[name] = round(self.free[name] + sign * amount, 4)         # ten times 0.1 is 1

def node_total(cpus, gpus, resources):
    total = {"CPU": cpus, "GPU": len(gpus)} | resources | {f"GPU:{name}": 1 for name in gpus}
    return {name: amount for name, amount in total.items() if amount}

def candidates(strategy, nodes, groups):
    """The pools in which a task may run, best first. None: its placement group waits itself."""
    match strategy:
        case ("bundle", group, index):              # -1: any of the group
            bundles = groups.get(group, [])
            return bundles if index < 0 or not bundles else bundles[index:index + 1]
        case ("node", wanted, soft):
            return sorted((n for n in nodes if soft or n.id == wanted), key=lambda n: n.id != wanted)
        case "SPREAD":
            return sorted(nodes, key=lambda n: -n.free.get("CPU", 0))
    return nodes                                    # fill one after the other

def place_bundles(bundles, strategy, nodes):
    """A pool for every bundle, or None. PACK wants few nodes, SPREAD many; STRICT_ insists on one, or on one each."""
    attempts = [[node] for node in nodes if strategy.endswith("PACK")]
    if strategy != "STRICT_PACK":
        attempts.append(nodes)
    for attempt in attempts:
        pools = []
        for bundle in bundles:
            used = [pool.node for pool in pools]
            for node in sorted(attempt, key=used.count, reverse=strategy == "PACK"):
                taken = None if strategy == "STRICT_SPREAD" and node in used else node.take(bundle)
                if taken is not None:
                    pools.append(Pool(taken, node))
                    break
        if len(pools) == len(bundles):
            return pools
        give_up(pools)                              # all or nothing
    return None

def give_up(pools):
    for pool in pools:
        pool.node.change(pool.total, 1)

# --- the hub: one process, one thread, no locks -----------------------------------------------------------------------

@dataclasses.dataclass(eq=False)
class Object:
    arrived: asyncio.Future         # of (bytes or a File, is it an error?)
    holds: int = 1                  # refs in processes, tasks that need it, objects that contain it: freed at 0
    maker: "Peer" = None            # who gets its pages back, for the next value
    inside: list = ()               # ids of the refs that the value contains

@dataclasses.dataclass(eq=False)
class Task:
    """A call. That of a constructor is the actor, too: it is over when the actor is, and a further try is a restart."""
    id: int
    function: int                   # the object that is the pickled function or class
    method: str                     # of an actor; "__init__" makes the actor; "" is a plain task
    args: bytes                     # None: they are the value of the first of deps
    deps: list                      # refs that are arguments themselves: it runs when they are there
    refs: list                      # all refs in the arguments, at any depth: they live until it has run
    returns: list                   # ids of the objects that it makes
    options: dict
    actor: object                   # an id, then the Task
    owner: "Peer"                   # who has submitted it
    retries: int = 0                # how often it may be tried again; -1, for ever, never comes down to 0
    life: object = None             # the coroutine
    worker: "Peer" = None           # where it runs
    death: "Failed" = None          # an actor's: what every further call gets
    up: object = dataclasses.field(default_factory=asyncio.Event)   # set when calls can be sent, or never will be
    turns: dict = dataclasses.field(default_factory=weakref.WeakKeyDictionary)      # caller -> lock: its calls in order

class Failed(Exception):
    """A try came to nothing. `error` is for who wants the value; `again`: another try may do better."""

    def __init__(self, error, again=False):
        self.error = error if isinstance(error, bytes) else pack_small(error)
        self.again = again

class Peer:
    """A process at the other end of a socket. What is said to it in one round of the hub goes in packets of many."""

    def __init__(self, hub, sock, process=None, node=None, tag=None, env=None, single=False):
        self.sock = sock
        self.process = process
        self.node = node
        self.tag = tag
        self.env = env or {}        # variables that what it submits inherits
        self.single = single        # runs no further task
        self.out = collections.deque()
        self.holds = collections.Counter()
        self.replies = {}           # task id -> future, of what runs there
        self.actor = None
        self.grant = None           # (pool, what was taken from it)
        self.blocked = 0            # how many of its threads wait for values
        self.gone = None            # Failed, when it has died
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(sock, hub.hear, self)
        sock.setblocking(False)

    def send(self, *message):
        if not self.out:
            self.loop.call_soon(self.flush)
        self.out.append(pickled(message))

    def flush(self):
        try:
            while self.out:
                batch = list(itertools.islice(self.out, 20))
                send_packet(self.sock, b"".join(data for data, _ in batch), sum((files for _, files in batch), []))
                for _ in batch:
                    self.out.popleft()
            self.loop.remove_writer(self.sock)
        except BlockingIOError:
            self.loop.add_writer(self.sock, self.flush)
        except (OSError, ValueError):               # it is gone, and reading will say so
            self.out.clear()

class Hub:
    """on_X(peer, ...) handles message X; ask_X(peer, ...) answers question X."""

    def __init__(self, sock, total):
        self.objects = {}
        self.tasks = {}
        self.actors = {}
        self.groups = {}            # id of a placement group -> its bundles; None while it waits
        self.lines = {}             # shape -> lock: of those who ask for the same, only the first looks for a place
        self.nodes = [Pool(total)]
        self.workers = set()
        self.idle = set()
        self.changed = asyncio.Event()
        self.over = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.driver = Peer(self, sock)
        # An end of file is not enough: a child of the driver may hold its socket open.
        self.loop.add_reader(os.pidfd_open(os.getppid()), self.over.set)

    def hear(self, peer):
        with contextlib.suppress(BlockingIOError):
            for _ in range(100):                    # then it is the turn of others
                messages = receive(peer.sock)
                if not messages:
                    return self.peer_died(peer)
                for name, *args in messages:
                    getattr(self, "on_" + name)(peer, *args)

    def on_ask(self, peer, oid, name, *args):
        """A question is an object whose value is the answer."""
        self.add(peer, oid)
        try:
            answer = getattr(self, "ask_" + name)(peer, *args)
        except Exception as error:                  # what makes no sense is the asker's problem
            answer = error
        self.seal(oid, pack_small(answer), failed=isinstance(answer, Exception))

    # - objects: counted, shown, freed -

    def add(self, peer, oid):
        self.objects[oid] = Object(self.loop.create_future(), 0)
        self.on_borrow(peer, oid)

    def on_borrow(self, peer, oid):
        if oid not in self.objects:
            peer.send("value", oid, lost(oid), True)
            return
        peer.holds.update(self.hold([oid]))
        self.objects[oid].arrived.add_done_callback(lambda arrived: peer.send("value", oid, *arrived.result()))

    def hold(self, oids):
        known = [oid for oid in oids if oid in self.objects]
        for oid in known:
            self.objects[oid].holds += 1
        return known

    def on_drop(self, peer, oid):
        if oid in peer.holds:                       # else its maker was interrupted before it could say so
            peer.holds[oid] -= 1
            if not peer.holds[oid]:
                del peer.holds[oid]
            self.release([oid])

    def release(self, oids):
        stack = list(oids)
        while stack:
            oid = stack.pop()
            obj = self.objects.get(oid)
            if obj:
                obj.holds -= 1
            if not obj or obj.holds:
                continue
            del self.objects[oid]
            stack += obj.inside
            if obj.maker:
                obj.maker.send("recycle", obj.arrived.result()[0].key)
            if oid in self.actors:                  # no handle is left, and no call
                self.bury(self.actors.pop(oid), b"")

    def on_put(self, peer, oid, value, refs):
        self.objects[oid] = Object(self.loop.create_future())
        peer.holds[oid] += 1
        self.seal(oid, value, self.hold(refs), peer)

    def seal(self, oid, value, inside=(), maker=None, failed=False):
        """The value is there; what is inside of it is held already."""
        obj = self.objects.setdefault(oid, Object(self.loop.create_future(), 0))
        obj.maker = maker if isinstance(value, File) else None
        obj.inside = inside
        obj.arrived.set_result((value, failed))
        self.release(self.hold([oid]))              # maybe nobody wants it any more

    # - the life of a task -

    def on_submit(self, peer, *fields):
        task = self.tasks[fields[0]] = Task(*fields, peer)
        task.refs = self.hold([task.function, *task.refs, task.actor])
        task.retries = task.options["retries"]
        task.actor = self.actors.get(task.actor)
        for oid in task.returns:
            self.add(peer, oid)
        if task.method == "__init__":
            task.actor = self.actors[task.id] = task
            self.objects[task.id].holds += task.options["lifetime"] == "detached"
        task.life = asyncio.ensure_future(self.live(task))

    async def live(self, task):
        """From the arguments to the values, or the error; again and again, while there are tries left."""
        run = self.run if task.method in ("", "__init__") else self.run_call
        failure = Failed(b"", again=True)
        while failure and failure.again:
            try:
                results = await run(task)
                failure = None
            except asyncio.CancelledError:
                failure = Failed(TaskCancelledError(f"{task.options['label']} was cancelled"))
            except Failed as error:
                failure = Failed(error.error, error.again and task.retries != 0)
                task.retries -= 1
        if failure:
            results = [(failure.error, ())] * len(task.returns)
        for oid, (value, inside) in zip(task.returns, results):
            self.seal(oid, value, inside, task.worker, failure is not None)
        if task.method == "__init__":
            self.bury(task, failure.error)
        del self.tasks[task.id]
        self.release(task.refs)

    async def run(self, task):
        """In a worker of its own: a task; or an actor, its constructor and then until the end of its process."""
        await self.arguments(task)
        async with self.lines.setdefault(task.options["shape"], asyncio.Lock()):
            while not self.start(task):
                await self.changed.wait()
        worker = task.worker
        try:
            results = await self.call(worker, task)
            if task.actor:
                task.up.set()
                if not task.retries:                # else a restart needs its arguments again
                    self.release(task.refs)
                    task.refs = []
                await self.reply(worker, "its end")
            return results
        except asyncio.CancelledError:
            worker.single = True                    # it still runs the task, and ends
            raise
        finally:
            self.give_back(worker)

    async def run_call(self, task):
        actor = task.actor
        if actor is None:
            raise Failed(ActorDiedError("the actor is dead, and forgotten: no handle was left"))
        ordered = actor.options["max_concurrency"] == 1
        turn = actor.turns.setdefault(task.owner, asyncio.Lock()) if ordered else contextlib.nullcontext()
        async with turn:                            # the next of its caller's calls waits until this one is sent
            await self.arguments(task)
            await actor.up.wait()
        if actor.death:
            raise actor.death
        return await self.call(actor.worker, task)

    async def arguments(self, task):
        """Waits until they are there, and raises what the first bad one failed with."""
        for oid in task.deps:
            if oid not in self.objects:
                raise Failed(lost(oid))
            arrived = self.objects[oid].arrived
            await asyncio.wait([arrived])           # to await it alone would cancel it with this task
            value, failed = arrived.result()
            if failed:
                raise Failed(value)

    async def call(self, worker, task):
        task.worker = worker
        worker.send("run", task.id, task.function, task.method, task.args, task.deps, len(task.returns), task.options,
                    task.actor and task.actor.id)
        return await self.reply(worker, task.id)

    async def reply(self, worker, key):
        if worker.gone:
            raise worker.gone
        worker.replies[key] = self.loop.create_future()
        try:
            return await worker.replies[key]
        finally:
            worker.replies.pop(key, None)

    def on_done(self, worker, tid, results, error, again):
        reply = worker.replies.get(tid)
        if reply is None or reply.done():           # it was cancelled
            return
        for _, refs in results:                     # now, as the worker may let go of them at once
            refs[:] = self.hold(refs)
        if error:
            reply.set_exception(Failed(error, again))
        else:
            reply.set_result(results)

    def ask_cancel(self, peer, oid):
        for task in list(self.tasks.values()):
            if oid not in task.returns or task.method == "__init__":
                continue
            if task.actor and task.worker:          # an async call can be cancelled there, others go on
                task.worker.send("cancel", task.id)
            else:                                   # soon: what has not begun yet could not even say so
                self.loop.call_soon(task.life.cancel)

    # - resources and workers -

    def start(self, task):
        """Takes resources and a worker. False if it has to wait for them."""
        demand = task.options["demand"]
        pools = candidates(task.options["scheduling_strategy"], self.nodes, self.groups)
        running = [worker for worker in self.workers if worker.grant and not (worker.actor or worker.blocked)]
        if pools is None or not (demand or task.actor) and len(running) >= MOST:
            return False
        if not any(pool.could_fit(demand) for pool in pools):
            error = ActorUnschedulableError if task.actor else TaskUnschedulableError
            raise Failed(error(f"{task.options['label']} asks for {demand}: nowhere could that ever be had"))
        for pool in pools:
            taken = pool.take(demand)
            if taken is not None:
                gpus = [name[4:] for name in taken if "GPU:" in name]
                task.worker = self.find_worker(pool.node, task.owner.env | task.options["env"], gpus)
                task.worker.grant = pool, taken
                task.worker.actor = task.actor
                return True
        return False

    def find_worker(self, node, env, gpus):
        for worker in self.idle:
            if worker.node is node and not env and not gpus:
                self.idle.remove(worker)
                return worker
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tag = f"{os.environ[TAG]}-{secrets.token_hex(8)}"
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if "GPU" in node.total else {}
        process = start_python("work", theirs, os.environ | visible | env | {TAG: tag}, node.id, gpus)
        worker = Peer(self, ours, process, node, tag, env, bool(env or gpus))
        self.workers.add(worker)
        return worker

    def give_back(self, worker):
        """What it ran is over, or given up: its resources are free, and so is it."""
        self.on_blocked(worker, -worker.blocked)
        pool, taken = worker.grant
        pool.change(taken, 1)
        worker.grant = None
        if worker.gone or worker.single or worker.actor or len(self.idle) >= worker.node.total.get("CPU", 1):
            self.end(worker)
        else:
            self.idle.add(worker)
        self.change()

    def change(self):
        """Who waits for resources looks again."""
        self.changed.set()
        self.changed.clear()

    def on_blocked(self, worker, change):
        """What waits for a value lends its CPU to others, or nested tasks would wait for a CPU for ever."""
        before = worker.blocked > 0
        worker.blocked += change
        lent = (worker.blocked > 0) - before
        if lent and worker.grant:
            pool, taken = worker.grant
            pool.change({name: taken[name] for name in taken if name == "CPU"}, lent)
            self.change()

    def end(self, worker):
        if worker and not worker.gone:
            worker.process.kill()

    def peer_died(self, worker):
        if worker is self.driver:
            return self.over.set()
        self.loop.remove_reader(worker.sock)
        worker.sock.close()
        end_tagged(worker.tag)                      # what it has started ends with it
        code = worker.process.wait()
        reason = f"process {worker.process.pid} ended with {signal.Signals(-code).name if code < 0 else code}"
        self.workers.discard(worker)
        self.idle.discard(worker)
        actor = worker.actor
        if actor is None:
            worker.gone = Failed(WorkerCrashedError(reason), again=True)
        elif actor.death is None and actor.retries:
            text = f"{reason} in the middle of this call; the actor starts again"
            worker.gone = Failed(ActorUnavailableError(text), again=True)
            actor.up.clear()
        else:
            actor.death = actor.death or Failed(ActorDiedError(f"the actor is dead: {reason}"))
            worker.gone = actor.death
        for reply in worker.replies.values():
            if not reply.done():
                reply.set_exception(worker.gone)
        self.release(worker.holds.elements())

    # - actors: how they end, and their names -

    def bury(self, actor, error):
        """Every further call gets this error."""
        actor.death = actor.death or Failed(error)
        actor.retries = 0
        actor.up.set()
        if actor.worker and not actor.worker.gone:
            self.end(actor.worker)
        else:
            self.loop.call_soon(actor.life.cancel)

    def on_exiting(self, worker):
        if worker.actor:
            worker.actor.retries = 0

    def on_kill(self, peer, aid, no_restart):
        actor = self.actors.get(aid)
        if actor and no_restart:
            self.bury(actor, ActorDiedError("the actor is dead: it was killed by kill()"))
        elif actor:
            self.end(actor.worker)

    def ask_actor(self, peer, name):
        for actor in self.actors.values():
            if name and actor.options["name"] == name and not actor.death:
                return actor.id, actor.options
        raise ValueError(f"no actor named {name!r} lives")

    def ask_submit(self, peer, *fields):
        """Makes an actor, unless one has its name: then it says which."""
        options = fields[7]
        try:
            taken = self.ask_actor(peer, options["name"])
        except ValueError:
            self.on_submit(peer, *fields)
            return fields[0], options
        if options["get_if_exists"]:
            return taken
        raise ValueError(f"an actor named {options['name']!r} lives already: take another name, or get_if_exists=True")

    # - nodes and placement groups -

    def ask_add_node(self, peer, cpus, gpus, resources):
        self.nodes.append(Pool(node_total(cpus, range(gpus), resources)))
        self.change()
        return self.nodes[-1].id

    def ask_nodes(self, peer):
        return [{"NodeID": node.id, "Alive": True, "Resources": shown(node.total), "Available": shown(node.free)}
                for node in self.nodes]

    def on_group(self, peer, gid, *fields):
        self.add(peer, gid)
        self.groups[gid] = None
        asyncio.ensure_future(self.reserve(gid, *fields))

    async def reserve(self, gid, bundles, strategy, value):
        while gid in self.groups:
            self.groups[gid] = place_bundles(bundles, strategy, self.nodes)
            if self.groups[gid]:
                self.seal(gid, value)
                return self.change()                # for what waits for its bundles
            await self.changed.wait()
        error = TaskUnschedulableError("the placement group was removed before it was placed")
        self.seal(gid, pack_small(error), failed=True)

    def on_remove_group(self, peer, gid):
        pools = self.groups.pop(gid, None) or []
        for worker in self.workers:
            if worker.grant and worker.grant[0] in pools:
                self.end(worker)
                if worker.actor:
                    self.bury(worker.actor, ActorDiedError("the actor is dead: its placement group was removed"))
        give_up(pools)
        self.change()

def shown(amounts):
    return {name: amount for name, amount in amounts.items() if amount > 0 and "GPU:" not in name}

def lost(oid):
    return pack_small(ObjectLostError(f"object {oid:024x} is gone: it was freed, as no ref to it was left"))

def serve(fd, total):
    """The process of the hub. It ends when the driver does, and with it all that ran."""
    async def main():
        await Hub(inherited(fd), total).over.wait()
        end_tagged(os.environ[TAG] + "-")
        os._exit(0)
    asyncio.run(main())

# --- processes --------------------------------------------------------------------------------------------------------

def start_python(function, sock, env, *args):
    """A process that calls a function of this file; in a session of its own, as a Ctrl-C is the driver's alone."""
    path = [*map(os.path.abspath, sys.path), HERE]          # it finds the modules that this one finds
    fd = sock.fileno()
    code = f"import sys; sys.path = {path!r}; import {__name__} as actors; actors.{function}({fd}, *{args!r})"
    with sock:
        return subprocess.Popen([sys.executable, "-c", code], pass_fds=[fd], env=env, start_new_session=True,
                                stdin=subprocess.DEVNULL)

def inherited(fd):
    os.set_inheritable(fd, False)                   # what it starts must not keep its socket open
    return socket.socket(fileno=fd)

def end_tagged(tag):
    """Ends all processes that inherited this tag in their environment, whatever session they have moved to."""
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
class Hold:
    """One of an object's counts. It lives as long as a ref, or a view of the memory."""
    client: object
    oid: int

    def __del__(self):
        with contextlib.suppress(RaySystemError):
            self.client.send("drop", self.oid)

class ObjectRef:
    def __init__(self, client, oid):
        self.client = client
        self.id = oid
        self.hold = Hold(client, oid)
        self.ready = False
        self.arrived = Future()     # of (bytes or Memory, is it an error?)
        self.arrived.set_running_or_notify_cancel()             # asyncio.wait_for() cannot cancel it
        client.refs[oid] = self

    def value(self):
        data, failed = self.arrived.result()
        value = unpack(data)
        if not failed:
            return value
        try:
            raise value
        finally:
            del value               # it has this frame in its traceback: no cycle, or views would live on

    async def value_async(self):
        with self.client.blocked():
            await asyncio.wrap_future(self.arrived)
        return self.value()

    def hex(self): return f"{self.id:024x}"
    def future(self): return ThreadPoolExecutor(1).submit(self.value)
    def __await__(self): return self.value_async().__await__()
    def __repr__(self): return f"ObjectRef({self.hex()})"
    def __reduce__(self): return borrow, (self.id,)

def borrow(oid):
    """A ref that came inside of a value: the one that this process has, or a new one. Who sent it holds the object
    until the hub has read this message."""
    client = connected()
    ref = client.refs.get(oid)
    if ref is None:
        ref = ObjectRef(client, oid)
        client.send("borrow", oid)
    return ref

class Client:
    """One socket to the hub. Any thread may send, and Ctrl-C may come at any time, as a packet is whole or not there.
    One thread reads, and fulfils futures: so any number of threads and event loops may wait."""
    works = False

    def __init__(self, sock, node=None, gpus=()):
        self.sock = sock
        self.node = node
        self.gpus = gpus
        self.closed = False
        self.ids = itertools.count(secrets.randbits(64) << 32)
        self.refs = weakref.WeakValueDictionary()
        self.used = {}              # key -> File, of the large values that this process has made
        self.spare = []             # those whose values are gone
        self.lock = threading.Lock()
        self.reader = threading.Thread(target=self.read, daemon=True)

    def send(self, *message):
        if self.closed:
            raise RaySystemError(GONE)
        data, files = pickled(message)
        self.used.update({file.key: file for file in files})
        try:
            send_packet(self.sock, data, files)
        except ConnectionError:
            raise RaySystemError(GONE) from None

    def ask(self, *question):
        answer = ObjectRef(self, next(self.ids))
        self.send("ask", answer.id, *question)
        return answer.value()

    def read(self):
        while messages := receive(self.sock):
            for name, *args in messages:
                getattr(self, "on_" + name)(*args)
        self.closed = True
        for oid in list(self.refs.data):
            self.on_value(oid, pack_small(RaySystemError(GONE)), True)

    def on_value(self, oid, value, failed):
        ref = self.refs.get(oid)
        if ref and not ref.ready:
            self.arrive(ref, value, failed)

    def arrive(self, ref, value, failed=False):
        if isinstance(value, File):
            value = value.map(prot=mmap.PROT_READ)
            value.hold = ref.hold
        ref.ready = True
        ref.arrived.set_result((value, failed))

    def on_recycle(self, key):
        with self.lock:
            self.spare.append(self.used.pop(key))
            del self.spare[:-4]

    def store(self, value):
        """(bytes, or a File for a large value; ids of the refs inside)"""
        pieces, size, refs = pack(value)
        if size <= INLINE:
            return b"".join(pieces), refs
        file = self.find_file(size)
        position = 0
        for piece in pieces:
            copy_bytes(memoryview(file.memory)[position:position + len(piece)], piece)
            position += len(piece)
        return file, refs

    def find_file(self, size):
        """Pages that were used before if there are such: to write to fresh ones is ten times slower."""
        with self.lock:
            for file in self.spare:
                if size <= len(file.memory) <= 2 * size:
                    self.spare.remove(file)
                    file.size = size
                    return file
        for _ in range(20):
            if size < free_memory():
                fd = os.memfd_create("actors")
                os.ftruncate(fd, size)
                file = File(fd, size, next(self.ids))
                file.memory = file.map()
                return file
            self.spare.clear()
            time.sleep(0.05)                        # others may be letting go just now
        raise ObjectStoreFullError(f"{size:,} bytes do not fit into the {free_memory():,} that this machine has")

    def put(self, value):
        stored, refs = self.store(value)
        ref = ObjectRef(self, next(self.ids))
        self.send("put", ref.id, stored, refs)
        self.arrive(ref, stored)
        return ref

    @contextlib.contextmanager
    def blocked(self):
        """A task that has to wait lends its CPU to others."""
        if self.works:
            self.send("blocked", 1)
        try:
            yield
        finally:
            if self.works:
                self.send("blocked", -1)

    def submit(self, function, method, args, kwargs, options, actor=None):
        """The refs of a call's values; of a constructor: a handle of the actor, or of the one that has its name."""
        stored, refs = self.store((args, kwargs))
        deps = [arg.id for arg in (*args, *kwargs.values()) if isinstance(arg, ObjectRef)]
        if isinstance(stored, File):                # its arguments are an object of their own
            large = ObjectRef(self, next(self.ids))
            self.send("put", large.id, stored, refs)
            stored = None
            refs = [large.id]
            deps = refs + deps
        values = [ObjectRef(self, next(self.ids)) for _ in range(options["num_returns"])]
        returns = [value.id for value in values]
        tid = returns[0] if returns else next(self.ids)
        fields = (tid, function, method, stored, deps, refs, returns, options, actor)
        if method == "__init__":
            return self.ask_for_actor("submit", *fields)
        self.send("submit", *fields)
        return values

    def ask_for_actor(self, *question):
        aid, options = self.ask(*question)
        return ActorHandle(borrow(aid), options)

# --- a worker's life --------------------------------------------------------------------------------------------------

Call = collections.namedtuple("Call", "id function method args deps returns options actor")
current = contextvars.ContextVar("current", default=None)           # the Call that runs here

class Worker(Client):
    """Runs tasks, or its actor's calls: one after the other, or in threads, or (an async actor) in an event loop."""
    works = True

    def live(self):
        self.functions = {}
        self.running = {}           # call's id -> asyncio task
        self.cancelled = set()
        self.inbox = queue.SimpleQueue()
        self.begin = self.inbox.put
        self.reader.start()
        while True:
            call = self.inbox.get()
            if call.method == "__init__" and call.options["asynchronous"]:
                self.live_async(call)
            self.execute(call)

    def live_async(self, call):
        self.loop = asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(call.options["max_concurrency"])
        self.begin = lambda call: self.loop.call_soon_threadsafe(self.begin_async, call)
        self.loop.call_soon(self.execute, call)     # so its constructor finds a running loop
        self.loop.run_forever()

    def begin_async(self, call):
        self.running[call.id] = self.loop.create_task(self.execute_async(call))

    def on_run(self, *call):
        self.begin(Call(*call))

    def on_cancel(self, tid):
        """Soon, as a coroutine that has not begun could not even say so. Others are cancelled before they begin."""
        self.cancelled.add(tid)
        if tid in self.running:
            self.loop.call_soon_threadsafe(self.loop.call_soon, self.running[tid].cancel)

    def read(self):
        super().read()
        os._exit(1)                 # the hub is gone

    async def execute_async(self, call):
        current.set(call)
        try:
            async with self.slots:
                result = self.resolve(call)()
                self.succeed(call, await result if inspect.isawaitable(result) else result)
        except BaseException as error:
            self.fail(call, error)
        del self.running[call.id]

    def execute(self, call):
        current.set(call)
        try:
            self.succeed(call, self.resolve(call)())
        except BaseException as error:
            self.fail(call, error)

    def resolve(self, call):
        """What to call, with its arguments: refs among them have become their values."""
        if call.id in self.cancelled:
            raise asyncio.CancelledError
        args, kwargs = unpack(call.args) if call.args else borrow(call.deps[0]).value()
        args = [value_of(arg) for arg in args]
        kwargs = {name: value_of(arg) for name, arg in kwargs.items()}
        if call.function is None:
            target = getattr(self if call.method.startswith("__ray_") else self.instance, call.method)
        else:
            if call.function not in self.functions:
                self.functions[call.function] = borrow(call.function).value()
            target = self.functions[call.function]
        target = functools.partial(target, *args, **kwargs)
        return functools.partial(self.construct, target, call.options) if call.method == "__init__" else target

    def construct(self, make, options):
        self.plan = options
        self.instance = make()
        if options["max_concurrency"] > 1 and not options["asynchronous"]:
            pool = ThreadPoolExecutor(options["max_concurrency"])
            self.begin = lambda call: pool.submit(self.execute, call)

    def __ray_ready__(self): return True
    def __ray_call__(self, function, *args, **kwargs): return function(self.instance, *args, **kwargs)

    def succeed(self, call, result):
        values = [result]
        if call.returns != 1:
            values = list(result) if call.returns else []
        if len(values) != call.returns:
            raise ValueError(f"{call.options['label']} returned {len(values)} values, but num_returns={call.returns}")
        self.send("done", call.id, [self.store(value) for value in values], None, False)

    def fail(self, call, error):
        if isinstance(error, SystemExit):           # exit_actor(), too
            self.send("exiting")
            atexit._run_exitfuncs()
            os._exit(error.code if isinstance(error.code, int) else 1)
        name = call.options["label"]
        text = f"{name}() failed in process {os.getpid()}:\n{traceback.format_exc()}"
        failure = RayTaskError(name, text, error.cause if isinstance(error, RayTaskError) else error)
        if call.method == "__init__":
            failure = ActorDiedError(f"the actor is dead: its constructor failed\n{text}")
        if isinstance(error, asyncio.CancelledError):
            failure = TaskCancelledError(f"{name} was cancelled")
        again = call.options["retry_exceptions"]
        try:
            packed = pack_small(failure)
            unpack(packed)
            again = again is True or again and isinstance(error, unpack(again))
        except Exception as problem:                # it cannot be sent, or not be made again: at least it can be read
            packed = pack_small(RayTaskError(name, f"{text}\n(which itself could not be sent: {problem})"))
        self.send("done", call.id, [], packed, again)

def value_of(arg):
    return arg.value() if isinstance(arg, ObjectRef) else arg

def work(fd, node, gpus):
    """The process of a worker."""
    global the_client
    sys.stdout.reconfigure(line_buffering=True)
    the_client = Worker(inherited(fd), node, gpus)
    the_client.live()

# --- the API, by Ray's names ------------------------------------------------------------------------------------------

the_client = the_hub = None

def forget_client():
    """A forked child must not speak on its parent's socket, nor keep it open."""
    global the_client, the_hub
    if the_client:
        the_client.closed = True
        the_client.sock.close()
    the_client = the_hub = None

os.register_at_fork(after_in_child=forget_client)

def connected():
    if the_client is None:
        init()
    return the_client

def init(address=None, *, num_cpus=None, num_gpus=None, resources=None, runtime_env=None, ignore_reinit_error=False,
         **_of_ray):
    """Starts the hub. What Ray has for its dashboard, its logs and the size of its memory is ignored."""
    global the_client, the_hub
    context = contextlib.ExitStack()                # so that `with init():` ends in a shutdown
    context.callback(shutdown)
    if the_client and (ignore_reinit_error or address or the_client.works):
        return context
    if the_client:
        raise RuntimeError("init() was called twice: call shutdown() first, or pass ignore_reinit_error=True")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))        # large values take descriptors
    cpus = len(os.sched_getaffinity(0)) if num_cpus is None else num_cpus
    session = secrets.token_hex(8)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    the_hub = start_python("serve", theirs, os.environ | env_of(runtime_env) | {TAG: session},
                           node_total(cpus, visible_gpus(num_gpus), resources or {}))
    the_client = Client(ours)
    the_client.reader.start()
    the_client.guard = threading.Thread(target=guard, args=(the_hub, session), daemon=True)
    the_client.guard.start()
    return context

def guard(hub, session):
    """Whatever the hub dies of, nothing stays of what it had started."""
    hub.wait()
    end_tagged(session + "-")

def env_of(runtime_env):
    return (runtime_env or {}).get("env_vars") or {}

def visible_gpus(count):
    """Their names: those of CUDA_VISIBLE_DEVICES, indices or UUIDs, or else 0, 1, ..."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and count is None:
        count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return visible.split(",")[:count] if visible else [str(i) for i in range(count or 0)]

@atexit.register
def shutdown():
    global the_client, the_hub
    if the_hub is None:
        return
    client = the_client
    the_client = the_hub = None
    client.closed = True
    with contextlib.suppress(OSError):
        client.sock.shutdown(socket.SHUT_RDWR)
    client.reader.join()
    client.guard.join()
    client.sock.close()
    put_once.cache_clear()

def is_initialized():
    return the_client is not None

def put(value):
    return connected().put(value)

def get(refs, *, timeout=None):
    if isinstance(refs, ObjectRef):
        return get([refs], timeout=timeout)[0]
    if not arrive(refs, len(refs), timeout):
        raise GetTimeoutError(f"not all of {len(refs)} values were there in {timeout} s")
    return [ref.value() for ref in refs]

def arrive(refs, count, timeout):
    """Waits until so many are there; False if they are not in time."""
    late = [ref.arrived for ref in refs if not ref.ready]
    missing = count - len(refs) + len(late)
    if missing > 0:
        with connected().blocked(), contextlib.suppress(LateError):
            for _ in itertools.islice(as_completed(late, timeout), missing):
                missing -= 1
    return missing <= 0

def wait(refs, *, num_returns=1, timeout=None, fetch_local=True):
    """(the first num_returns of those that are ready, all others), both in the order in which they came."""
    if refs and not 0 < num_returns <= len(set(refs)) == len(refs):
        raise ValueError(f"wait() for {num_returns} of {len(refs)} refs: it takes each once, and as many at most")
    arrive(refs, num_returns, timeout)
    ready = [ref for ref in refs if ref.ready][:num_returns]
    chosen = set(ready)
    return ready, [ref for ref in refs if ref not in chosen]

def cancel(ref, *, force=False, recursive=True):
    connected().ask("cancel", ref.id)

def kill(actor, *, no_restart=True):
    connected().send("kill", actor._ref.id, no_restart)

def exit_actor():
    raise SystemExit(0)

def get_actor(name, namespace=None):
    return connected().ask_for_actor("actor", name)

def method(**options):
    """Defaults for one method of an actor: @method(num_returns=2)."""
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
        raise ValueError(f"unknown option {', '.join(unknown)}; there are {', '.join(DEFAULTS)}")
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(options.get("retry_exceptions"), (list, tuple)):      # packed, as the hub does not know these types
        options["retry_exceptions"] = pack_small(tuple(options["retry_exceptions"]))
    return options

@functools.lru_cache(1000)
def put_once(client, target):
    """A function or class is an object like any other."""
    return client.put(target)

class Remote:
    """What can be called: a function, a class, or a method of an actor; with its options."""

    def __init__(self, target, given, actor=None):
        self.target = target        # of an actor: the method's name
        self.given = given
        self.actor = actor

    def options(self, **options):
        return Remote(self.target, self.given | checked(options), self.actor)

    @functools.cached_property
    def plan(self):
        """What the hub and the workers have to know of the options."""
        plan = DEFAULTS | self.given
        if self.actor:
            return {"label": f"{self.actor._plan['label']}.{self.target}", "retries": plan["max_task_retries"],
                    "num_returns": plan["num_returns"], "retry_exceptions": plan["retry_exceptions"]}
        plan |= {"label": self.target.__name__, "retries": plan["max_retries"]}
        demand = {"CPU": 1, "GPU": plan["num_gpus"]} | plan["resources"]
        if inspect.isclass(self.target):
            members = inspect.getmembers(self.target, callable)
            demand["CPU"] = 0                       # as in Ray: an actor has to ask for a CPU
            asynchronous = any(inspect.iscoroutinefunction(member) for _, member in members)
            plan |= {"methods": {name: getattr(member, "_options", {}) for name, member in members}, "num_returns": 1,
                     "retries": plan["max_restarts"], "asynchronous": asynchronous,
                     "max_concurrency": plan["max_concurrency"] or (1000 if asynchronous else 1)}
        if plan["num_cpus"] is not None:
            demand["CPU"] = plan["num_cpus"]
        plan["demand"] = {name: amount for name, amount in demand.items() if amount}
        if not isinstance(plan["scheduling_strategy"], str):
            plan["scheduling_strategy"] = plan["scheduling_strategy"].plan()
        plan["shape"] = tuple(sorted(plan["demand"].items())), plan["scheduling_strategy"]
        plan["env"] = env_of(plan["runtime_env"])
        return plan

    def remote(self, *args, **kwargs):
        client = connected()
        if self.actor:
            return one_or_all(client.submit(None, self.target, args, kwargs, self.plan, self.actor._ref.id))
        function = put_once(client, self.target).id
        if inspect.isclass(self.target):
            return client.submit(function, "__init__", args, kwargs, self.plan)
        return one_or_all(client.submit(function, "", args, kwargs, self.plan))

def one_or_all(refs):
    return refs[0] if len(refs) == 1 else refs or None

class ActorHandle:
    """handle.method.remote(...) calls. The actor ends when no handle is left anywhere."""

    def __init__(self, ref, plan):
        self._ref = ref
        self._plan = plan

    def __getattr__(self, name):
        if name not in self._plan["methods"] and not name.startswith("__ray_"):
            raise AttributeError(f"actor {self._plan['label']} has no method {name!r}")
        given = {"max_task_retries": self._plan["max_task_retries"]} | self._plan["methods"].get(name, {})
        return Remote(name, given, self)

    _actor_id = property(lambda self: self._ref)
    def __repr__(self): return f"Actor({self._plan['label']}, {self._ref.hex()})"
    def __reduce__(self): return ActorHandle, (self._ref, self._plan)

def remote(target=None, **options):
    """@remote, @remote(num_cpus=2, ...), or remote(function)"""
    return functools.partial(remote, **options) if target is None else Remote(target, checked(options))

# --- where am I, and what is there? -----------------------------------------------------------------------------------

class RuntimeContext:
    def get_node_id(self): return connected().node or nodes()[0]["NodeID"]
    def get_task_id(self): return current.get() and f"{current.get().id:024x}"
    def get_actor_id(self): return current.get() and current.get().actor and f"{current.get().actor:024x}"
    def get_accelerator_ids(self): return {"GPU": list(connected().gpus)}

    @property
    def current_actor(self):
        """The handle by which an actor calls itself, or gives itself to others."""
        return ActorHandle(borrow(current.get().actor), connected().plan)

def get_runtime_context(): return RuntimeContext()
def get_gpu_ids(): return [int(gpu) if gpu.isdigit() else gpu for gpu in connected().gpus]
def nodes(): return connected().ask("nodes")
def cluster_resources(): return sum_up("Resources")
def available_resources(): return sum_up("Available")

def sum_up(which):
    total = collections.Counter()
    for node in nodes():
        total.update(node[which])
    return dict(total)

class Cluster:
    """Several nodes on one machine: each is a pool of resources with workers of its own."""
    address = "local"

    def __init__(self, initialize_head=True, connect=False, head_node_args=None):
        self.shutdown = init(**head_node_args or {}).close

    def add_node(self, num_cpus=1, num_gpus=0, resources=None, **_of_ray):
        return types.SimpleNamespace(node_id=connected().ask("add_node", num_cpus, num_gpus, resources or {}))

# --- placement groups: resources that are taken together, or not at all -----------------------------------------------

@dataclasses.dataclass
class PlacementGroup:
    id: ObjectRef
    bundle_specs: list

    def ready(self): return self.id
    def wait(self, timeout_seconds=30): return bool(wait([self.id], timeout=timeout_seconds)[0])
    bundle_count = property(lambda self: len(self.bundle_specs))

def placement_group(bundles, strategy="PACK", name="", lifetime=None):
    """It lives until it is removed, or its driver ends."""
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
    def plan(self): return "bundle", self.placement_group.id.id, self.placement_group_bundle_index

@dataclasses.dataclass
class NodeAffinitySchedulingStrategy:
    node_id: str
    soft: bool = False
    def plan(self): return "node", self.node_id, self.soft

class ActorPool:
    """Spreads calls over actors, one at a time on each."""

    def __init__(self, actors):
        self.idle = list(actors)
        self.waiting = []
        self.busy = {}              # ref -> its actor, in the order of submission

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
        if not self.busy:
            raise StopIteration("no more results")
        ready, _ = wait(list(self.busy)[:among], timeout=timeout)
        if not ready:
            raise TimeoutError("no result was there in time")
        self.push(self.busy.pop(ready[0]))
        return get(ready[0])

    def map(self, fn, values, among=1):
        for value in values:
            self.submit(fn, value)
        return (self.get_next(None, among) for _ in iter(self.has_next, False))

    def get_next_unordered(self, timeout=None): return self.get_next(timeout, None)
    def map_unordered(self, fn, values): return self.map(fn, values, None)
    def has_next(self): return bool(self.busy)
    def has_free(self): return bool(self.idle)
    def pop_idle(self): return self.idle.pop() if self.idle else None

# --- Ray's module names, so that `from actors.util import ActorPool` works --------------------------------------------

def submodule(name, *members):
    module = types.ModuleType(f"{__name__}.{name}")
    vars(module).update({member.__name__: member for member in members})
    sys.modules[module.__name__] = module
    return module

errors = [each for each in vars().values() if inspect.isclass(each) and issubclass(each, RayError)]
exceptions = submodule("exceptions", *errors)
cluster_utils = submodule("cluster_utils", Cluster)
actor = submodule("actor", ActorHandle, exit_actor)
submodule("util.actor_pool", ActorPool)
submodule("util.placement_group", PlacementGroup, placement_group, remove_placement_group)
util = submodule("util", ActorPool, placement_group, remove_placement_group)
util.scheduling_strategies = submodule("util.scheduling_strategies", PlacementGroupSchedulingStrategy,
                                       NodeAffinitySchedulingStrategy)

# --- the demo, and how fast it is -------------------------------------------------------------------------------------

class Plain:
    count = 0

    def add(self, crash=False):
        self.count += 1
        return os._exit(1) if crash else self.count

class Async:
    async def add(self): return 1

def demo():
    with init(num_cpus=2):
        counter = remote(Plain).options(max_restarts=1).remote()
        print("an actor counts:", get([counter.add.remote() for _ in range(5)]))
        try:
            get(counter.add.remote(crash=True))
        except RayActorError as error:
            print(f"it crashes: {type(error).__name__}: {error}")
        again = get(counter.add.remote())
        print("it runs again, and counts from", again)
        assert again == 1

def measure(ray, large):
    """How often a second a module with Ray's API does what: the best of three runs."""
    start = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    square = ray.remote(lambda x: x * x)
    assert ray.get(square.remote(3)) == 9
    rates = {"init to the first result": 1 / (time.perf_counter() - start)}
    plain = ray.remote(Plain).remote()
    asynchronous = ray.remote(Async).remote()
    refs = [ray.put(i) for i in range(1000)]
    array = importlib.import_module("numpy").ones(large, "u1")
    big = ray.put(array)
    for what, action in [("1 task", lambda: ray.get(square.remote(3))),
                         ("1000 tasks", lambda: ray.get([square.remote(3) for _ in refs])),
                         ("1 actor call", lambda: ray.get(plain.add.remote())),
                         ("1000 actor calls", lambda: ray.get([plain.add.remote() for _ in refs])),
                         ("1000 async actor calls", lambda: ray.get([asynchronous.add.remote() for _ in refs])),
                         ("put of a small value", lambda: ray.put(0)),
                         ("get of a small value", lambda: ray.get(refs[0])),
                         ("wait for 1000 values", lambda: ray.wait(refs, num_returns=1000)),
                         ("put of 1 GiB", lambda: ray.put(array)),
                         ("get of 1 GiB", lambda: ray.get(big))]:
        runs = [timeit.Timer(action).autorange() for _ in range(3)]
        rates[what] = max(count / seconds for count, seconds in runs)
    ray.shutdown()
    return rates

def table(names, large=1 << 30):
    columns = [measure(importlib.import_module(name), large) for name in names]
    print("how often a second, with", *names)
    for what, rate in columns[0].items():
        print(f"{what:26}", *[f"{column[what]:12,.1f}" for column in columns], f"{rate / columns[-1][what]:8.1f}x")

if __name__ == "__main__":
    # Not as __main__: workers have to find the classes of this file under the name by which they import it.
    sys.path.insert(0, HERE)
    module = importlib.import_module(Path(__file__).stem)
    module.demo()
    module.table([module.__name__, *["ray"] * bool(importlib.util.find_spec("ray"))])
