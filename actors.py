"""actors.py: a small Ray. Functions become tasks, classes become actors, each in a process of its own.

    driver ----+            +---- worker  The hub (one process, one thread, no locks) knows all objects, tasks, actors
    (your      |            |   (a task)  and nodes. The driver and the workers hold one socket to it each. Small values
    program)   +---- hub ---+---- worker  travel inside messages; larger ones (100 kB) are written once into the arena,
               |      |     |  (an actor) a memory file that all processes of a node map: readers get views of the same
               |      | forks             pages. The hub forks the workers, as it has no threads and no CUDA, and ends
               +=== arena ==+             when its driver does. Nothing of all this has a name in the file system.

    import actors as ray                           The API is Ray's: init, shutdown, remote, put, get, wait, cancel,
    @ray.remote                                    kill, get_actor, exit_actor, method, nodes, cluster_resources,
    def square(x): return x * x                    available_resources, get_runtime_context, exceptions, cluster_utils;
    ray.get([square.remote(i) for i in range(9)])  util: ActorPool, queue, placement_group, scheduling_strategies.

    python actors.py                               the demo, and microbenchmarks beside Ray where it is installed
    python actors.py node HOST:PORT < KEYFILE      lends this machine to the Cluster of another one

What differs from Ray: what can never fit is an error at once; a detached actor ends with its driver; a lost object is
not made again by running its task once more; there are no generators, concurrency groups, remote drivers, no dashboard,
no spilling to disk; arrays that were got, of any size, are read-only, and to write into a tensor that was got is a
segfault (clone it first).
"""
import argparse, atexit, bisect, collections, contextlib, contextvars, ctypes, dataclasses, functools, gc, hashlib, hmac
import importlib, importlib.util, inspect, io, itertools, json, math, mmap, os, pickle, queue, re, resource, secrets
import select, signal, socket, struct, subprocess, sys, threading, time, traceback, types, warnings, weakref
from concurrent.futures import ThreadPoolExecutor

# cloudpickle: functions of __main__, lambdas and closures cannot be pickled by name, as workers have no such module.
import cloudpickle

INLINE = 100_000            # bytes: larger values go through shared memory
UNIT = 10_000               # resources are counted in ten-thousandths, so that ten times 0.1 is 1
CHUNK = 256 << 10           # bytes of an object that travel between nodes at once
HERE = os.path.dirname(os.path.abspath(__file__))
AWAY = True                 # in the place of a value: it is ready, but on another node

# --- errors, by Ray's names ---

class RayError(Exception):
    """Whatever goes wrong around a task. What goes wrong inside of it is a RayTaskError, and its own type as well."""

class RayTaskError(RayError):
    def __init__(self, function_name, traceback_str, cause=None):
        self.function_name, self.traceback_str, self.cause = function_name, traceback_str, cause

    def __str__(self):
        return self.traceback_str

    def __reduce__(self):
        return _task_error, (self.function_name, self.traceback_str, self.cause)

def _task_error(function_name, traceback_str, cause):
    """The error as `except` wants it: a RayTaskError that is of the type that was raised, too."""
    plain = RayTaskError(function_name, traceback_str, cause)
    if not isinstance(cause, Exception):
        return plain
    try:
        own = {name: vars(RayTaskError)[name] for name in ("__init__", "__str__", "__reduce__", "__module__")}
        kind = type(f"RayTaskError({type(cause).__name__})", (RayTaskError, type(cause)), own)
        error = kind.__new__(kind, *cause.args)     # an ExceptionGroup is what it was made with
        error.__init__(function_name, traceback_str, cause)
        error.__dict__.update({name: value for name, value in vars(cause).items() if name not in vars(plain)})
        error.args = cause.args
        if isinstance(cause, OSError):              # errno and strerror live outside of __dict__
            OSError.__init__(error, *cause.args)
        return error
    except Exception:                               # a type that does not let itself be inherited from
        return plain

class RayActorError(RayError): """The actor cannot answer."""
class ActorDiedError(RayActorError): """The actor is dead and stays so."""
class ActorUnavailableError(RayActorError): """The actor died during this call; it restarts."""
class WorkerCrashedError(RayError): """The process died while it ran the task."""
class TaskCancelledError(RayError): """The task was cancelled."""
class GetTimeoutError(RayError, TimeoutError): """The value was not there in time."""
class ObjectStoreFullError(RayError): """The shared memory has no room for the value."""
class ObjectLostError(RayError): """The only copy of the value is gone."""
class TaskUnschedulableError(RayError): """No node could ever run this task."""
class ActorUnschedulableError(RayActorError): """No node could ever hold this actor."""
class RaySystemError(RayError): """The hub is gone."""

# --- values: pickled with their buffers apart, so that large ones are written once and read without a copy ---

class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, value):
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if numpy and type(value) is numpy.ndarray and not value.flags.forc and not value.dtype.hasobject:
            return numpy.ascontiguousarray(value).__reduce_ex__(5)
        if torch and type(value) is getattr(torch, "Tensor", None) and (
                value.device.type == "cpu" and value.layout is torch.strided and value.grad_fn is None
                and not value.is_quantized):
            flat = value.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
            return _tensor, (pickle.PickleBuffer(flat.numpy()), value.dtype, value.shape, value.requires_grad)
        return super().reducer_override(value)

def _tensor(buffer, dtype, shape, requires_grad):
    import torch
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype, requires_grad=requires_grad)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape).requires_grad_(requires_grad)

_pickled_refs = contextvars.ContextVar("pickled_refs", default=None)    # a list, while a value is being packed

def pack(value, tag=b"V"):
    """A value as (pieces to be written one after the other, their bytes in all, ids of the refs inside of it).

    tag (Value or Error), are there refs?, n | n lengths | pickle | buffer | buffer ..., each at a multiple of 64 bytes
    """
    file, buffers, refs = io.BytesIO(), [], []
    token = _pickled_refs.set(refs)
    try:
        _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    finally:
        _pickled_refs.reset(token)
    data, buffers = file.getbuffer(), [buffer.raw() for buffer in buffers]
    lengths = [len(data), *map(len, buffers)]
    pieces = [struct.pack(f"<cBxxI{len(lengths)}Q", tag, bool(refs), len(lengths), *lengths), data]
    size = len(pieces[0]) + len(data)
    for buffer in buffers:
        pieces += [bytes(-size % 64), buffer]
        size += -size % 64 + len(buffer)
    return pieces, size, refs

def unpack(packed):
    """The value of packed bytes; arrays in it are views of them. An error is returned, not raised."""
    view = memoryview(packed)
    count = struct.unpack_from("<I", view, 4)[0]
    lengths = struct.unpack_from(f"<{count}Q", view, 8)
    position, pieces = 8 + 8 * count, []
    for length in lengths:
        pieces.append(view[position:position + length])
        position += length + -(position + length) % 64
    return pickle.loads(pieces[0], buffers=pieces[1:])

def pack_value(value):
    return b"".join(pack(value)[0])

def pack_error(error):
    """An error as bytes; one that came as bytes is passed on as it is."""
    return error if type(error) is bytes else b"".join(pack(error, b"E")[0])

# --- the arena: one memory file a node, mapped by all of its processes ---

_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
_libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t

class Arena:
    """A memfd: it has no name, and is gone with the last process that has it open. Pages stay when their object is
    freed, for writing to pages that were used before is 20 times faster than writing to fresh ones."""

    def __init__(self, size, fd=None):
        self.size, self.base, self.fd = size, None, os.memfd_create("actors") if fd is None else fd
        os.ftruncate(self.fd, size)
        self.base = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, self.fd, 0)
        self.writable = memoryview(mmap.mmap(self.fd, size))

    def view(self, offset, size, *keep):
        """Bytes that no reader can change, as they are mapped for reading. `keep` lives as long as any view of them."""
        region = (ctypes.c_char * size).from_address(self.base + offset)
        weakref.finalize(region, lambda *kept: None, self, *keep).atexit = False
        return pickle.PickleBuffer(region).raw().toreadonly()

    def write(self, offset, pieces):
        for piece in map(memoryview, pieces):
            target, numpy = self.writable[offset:offset + len(piece)], sys.modules.get("numpy")
            offset += len(piece)
            if len(piece) > 16 << 20 and numpy:     # memory is faster than one core
                quarters = [numpy.array_split(numpy.frombuffer(side, "u1"), 4) for side in (target, piece)]
                with ThreadPoolExecutor(min(4, os.cpu_count())) as pool:
                    list(pool.map(numpy.copyto, *quarters))
            else:
                target[:] = piece

    def __del__(self):
        _libc.munmap(self.base, self.size)
        os.close(self.fd)

class Space:
    """Which bytes of an arena are free: the first hole that is large enough is taken, neighbours become one again."""

    def __init__(self, size):
        self.size, self.holes, self.used = size, [(0, size)], {}

    @property
    def free(self): return sum(length for _, length in self.holes)

    def take(self, size):
        size += -size % 4096
        for i, (start, length) in enumerate(self.holes):
            if length >= size:
                self.holes[i:i + 1] = [(start + size, length - size)] if length > size else []
                self.used[start] = size
                return start
        return None

    def give(self, start):
        size = self.used.pop(start)
        i = bisect.bisect(self.holes, (start,))
        if i < len(self.holes) and self.holes[i][0] == start + size:
            size += self.holes.pop(i)[1]
        if i and sum(self.holes[i - 1]) == start:
            i -= 1
            start, before = self.holes.pop(i)
            size += before
        self.holes.insert(i, (start, size))

# --- messages: a length and a pickled tuple; strangers have to prove the key before anything is unpickled ---

def frame(*message):
    data = pickle.dumps(message, 5)
    return len(data).to_bytes(8, "little") + data

def cut(buffer):
    """Takes the whole messages off the front of a bytearray."""
    messages, position = [], 0
    with memoryview(buffer) as view:
        while len(view) - position >= 8:
            end = position + 8 + int.from_bytes(view[position:position + 8], "little")
            if end > len(view):
                break
            messages.append(pickle.loads(view[position + 8:end]))
            position = end
    del buffer[:position]
    return messages

def _first_message(sock):
    size = int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "little")
    return pickle.loads(sock.recv(size, socket.MSG_WAITALL))

def _proof(key, who, *nonces):
    return hmac.digest(key, who + b"".join(nonces), hashlib.sha256)

def _connect(address, key):
    """A TCP connection to the hub, after each side has shown the other that it has the key."""
    sock = socket.create_connection(address, timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    theirs, mine = sock.recv(32, socket.MSG_WAITALL), secrets.token_bytes(32)
    sock.sendall(mine + _proof(key, b"client", theirs, mine))
    if not hmac.compare_digest(sock.recv(32, socket.MSG_WAITALL), _proof(key, b"hub", mine, theirs)):
        raise PermissionError(f"the hub at {address[0]}:{address[1]} refused the key")
    sock.settimeout(None)
    return sock

class Loop:
    """epoll: what to call when a file descriptor can be read (or written)."""

    def __init__(self):
        self.poller, self.handlers, self.dirty, self.alive = select.epoll(), {}, set(), True

    def stop(self, *_):
        self.alive = False

    def watch(self, fd, handler, events=select.EPOLLIN):
        self.handlers[fd] = handler
        self.poller.register(fd, events)

    def forget(self, fd):
        if self.handlers.pop(fd, None):
            self.poller.unregister(fd)

    def run(self, think):
        """Hears, thinks, and says what there is to say once a turn: many messages in one system call."""
        while self.alive:
            for fd, _ in self.poller.poll():
                if fd in self.handlers:
                    self.handlers[fd]()
            think()
            while self.dirty:
                self.dirty.pop().flush()

class Channel:
    """One end of a connection, in a Loop. It never blocks: what the socket does not take waits in `out`."""

    def __init__(self, loop, sock, on_messages, on_close):
        self.loop, self.sock, self.on_messages, self.on_close = loop, sock, on_messages, on_close
        self.out, self.buffer, self.full = [], bytearray(), False
        sock.setblocking(False)
        loop.watch(sock.fileno(), self.ready)

    def send(self, *message):
        self.out.append(frame(*message))
        self.loop.dirty.add(self)

    def flush(self):
        if self.sock is None or not self.out:
            return
        data, self.out = b"".join(self.out), []
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = len(data)                        # the other end is gone; reading will say so
        if sent < len(data):
            self.out.append(memoryview(data)[sent:])
        if self.full != bool(self.out):
            self.full = bool(self.out)
            self.loop.poller.modify(self.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if self.full else 0))

    def ready(self):
        if self.out:
            self.loop.dirty.add(self)
        self.read()

    def read(self):
        """True if something came."""
        try:
            data = self.sock.recv(CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.close()
            self.on_close()
            return False
        self.buffer += data
        self.on_messages(cut(self.buffer))
        return True

    def close(self):
        if self.sock is not None:
            self.loop.forget(self.sock.fileno())
            self.sock.close()
            self.sock = None

# --- a node: one machine's workers and arena. The hub is its own machine's; the others talk to the hub over TCP ---

class Node:
    """Forks workers, from a process that has one thread, passes on what they and the hub say to each other, and
    reports what they print and how they end. The hub calls its methods by name: here, or through a Channel."""

    def __init__(self, loop, arena, config, report):
        self.loop, self.arena, self.config, self.report = loop, arena, config, report
        self.workers, self.ids = {}, {}             # worker's id -> pid, log, channel; its pid -> its id
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))    # a worker takes two descriptors
        _libc.prctl(36, 1, 0, 0, 0)                 # PR_SET_CHILD_SUBREAPER: orphans below become our children
        wake, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, loop.stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        loop.watch(wake, lambda: (os.read(wake, 4096), self.reap()))
        for name in config["preload"]:
            importlib.import_module(name)

    def fork(self, worker_id, env, settings):
        log, output = os.pipe2(os.O_CLOEXEC)
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                self.become_worker(env, settings, theirs, output)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(output)
        theirs.close()
        os.set_blocking(log, False)
        channel = Channel(self.loop, ours, functools.partial(self.report, "messages", worker_id),
                          lambda: self.signal(worker_id, signal.SIGKILL))
        self.workers[worker_id] = types.SimpleNamespace(pid=pid, log=log, channel=channel)
        self.ids[pid] = worker_id
        self.loop.watch(log, lambda: self.read_log(worker_id))

    def become_worker(self, env, settings, sock, output):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        _libc.prctl(1, signal.SIGKILL, 0, 0, 0)     # PR_SET_PDEATHSIG: no worker outlives its node
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        keep = {0, 1, 2, self.arena.fd, sock.fileno()}
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):      # the listing's own is closed already
                if fd not in keep:
                    os.close(fd)
        gc.freeze()                                 # the hub's objects: do not touch their pages
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")                       # short of memory, the kernel should take workers before the driver
        sys.stdout.reconfigure(line_buffering=True)
        os.environ.update(env)
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()
        client = _set_client(Client(sock, self.arena, self.config | settings))
        client.worker = Worker(client)
        client.worker.live()

    def send(self, worker_id, *message):
        if worker := self.workers.get(worker_id):
            worker.channel.send(*message)

    def read_log(self, worker_id):
        if worker_id not in self.workers:
            return
        worker = self.workers[worker_id]
        with contextlib.suppress(BlockingIOError):
            if data := os.read(worker.log, 1 << 16):            # a pipe holds no more
                self.report("log", worker_id, worker.pid, data)
            else:
                self.loop.forget(worker.log)

    def signal(self, worker_id, number):
        if worker := self.workers.get(worker_id):
            worker.channel.flush()                  # what the signal is about has to be there first
            os.kill(worker.pid, number)

    def reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid not in self.ids:
                continue
            worker_id = self.ids.pop(pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)      # what it started goes with it,
            self.kill_children(but=self.ids)        # also what had left its process group, and is our child now
            self.read_log(worker_id)
            worker = self.workers.pop(worker_id)    # from here on it gets no more signals
            while worker.channel.sock and worker.channel.read(): pass           # its last words
            worker.channel.close()
            self.loop.forget(worker.log)
            os.close(worker.log)
            self.report("exited", worker_id, pid, os.waitstatus_to_exitcode(status))

    def kill_children(self, but=()):
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid() and int(pid) not in but:
                    os.kill(int(pid), signal.SIGKILL)

    def run(self, think=lambda: None):
        """Until the loop is stopped. Then nothing stays of what ran here."""
        try:
            self.loop.run(think)
        finally:
            with contextlib.suppress(ChildProcessError):
                while True:                         # the children of what is killed become our children in turn
                    self.kill_children()
                    os.waitpid(-1, 0)

    def read(self, token, offset, size):
        self.report("bytes", token, os.pread(self.arena.fd, size, offset))

    def write(self, token, offset, data):
        os.pwrite(self.arena.fd, data, offset)
        self.report("wrote", token)

# --- resources and scheduling: where may it run? candidates() and place_bundles() are all of the policies ---

class Pool:
    """Resources that are taken and given back: those of a node, or of a bundle, which took them from a node."""

    def __init__(self, total, node=None, gpus=None):
        self.total, self.free, self.node = total, dict(total), node or self
        self.gpus = {i: UNIT for i in range(total.get("GPU", 0) // UNIT)} if gpus is None else dict(gpus)
        self.grant = gpus                           # a bundle's: what to give back to its node

    def pick_gpus(self, amount):
        """Whole GPUs, or a share of the fullest that has room for it; None if there is none such."""
        if amount >= UNIT:
            whole = [gpu for gpu, free in self.gpus.items() if free == UNIT][:amount // UNIT]
            return {gpu: UNIT for gpu in whole} if len(whole) * UNIT == amount else None
        fitting = [gpu for gpu, free in self.gpus.items() if free >= amount]
        return {min(fitting, key=self.gpus.get): amount} if fitting else None

    def could_fit(self, demand):
        return all(self.total.get(name, 0) >= amount for name, amount in demand.items())

    def fits(self, demand):
        return (all(self.free.get(name, 0) >= amount for name, amount in demand.items())
                and (not demand.get("GPU") or self.pick_gpus(demand["GPU"]) is not None))

    def take(self, demand):
        gpus = self.pick_gpus(demand["GPU"]) if demand.get("GPU") else {}
        self.give(demand, gpus, sign=-1)
        return gpus

    def give(self, demand, gpus, sign=1):
        for name, amount in demand.items():
            self.free[name] = self.free.get(name, 0) + sign * amount
        for gpu, amount in gpus.items():
            self.gpus[gpu] += sign * amount

    def load(self):
        return max((1 - self.free[name] / total for name, total in self.total.items() if total), default=0)

def candidates(strategy, nodes, groups):
    """The pools in which a task may run, best first."""
    match strategy:
        case ("group", group, index):               # one of its bundles, or any
            bundles = groups[group].pools if group in groups else []
            return [bundle for bundle in (bundles if index < 0 else bundles[index:index + 1]) if bundle]
        case ("node", wanted, soft):                # that node; others only if soft
            return sorted((n for n in nodes if soft or n.id == wanted), key=lambda n: n.id != wanted)
        case "SPREAD":                              # the emptiest first, and in turns
            return sorted(nodes, key=lambda n: (n.load(), n.started))
        case _:                                     # fill one node after the other up to half, then the emptiest
            return sorted(nodes, key=lambda n: max(n.load(), 0.5))

def place_bundles(bundles, strategy, nodes):
    """A node for every bundle, or None. PACK wants few nodes, SPREAD many; STRICT_ insists on one, or on one each."""
    whole = _sum(bundles)
    together = [node for node in nodes if strategy.endswith("PACK") and node.fits(whole)]
    if together or strategy == "STRICT_PACK":
        return [together[0]] * len(bundles) if together else None
    twins, counts, placed = [Pool(node.free, gpus=node.gpus) for node in nodes], [0] * len(nodes), {}
    for b in sorted(range(len(bundles)), key=lambda b: -sum(bundles[b].values())):     # the largest first
        fitting = [i for i, twin in enumerate(twins)
                   if twin.fits(bundles[b]) and not (strategy == "STRICT_SPREAD" and counts[i])]
        if not fitting:
            return None
        i = (max if strategy == "PACK" else min)(fitting, key=lambda i: (counts[i], sum(twins[i].free.values())))
        counts[i] += 1
        twins[i].take(bundles[b])
        placed[b] = nodes[i]
    return [placed[b] for b in range(len(bundles))]

# --- the hub: one thread that knows everything ---

@dataclasses.dataclass(slots=True, eq=False)
class Object:
    holds: int = 1                  # refs in clients, tasks that need it, objects that contain it: freed at 0
    maker: "Task" = None
    waiting: list = dataclasses.field(default_factory=list)     # tasks, and (peer, key of its ref, must it be near?)
    done: bool = False
    failed: bool = False
    payload: bytes = None           # a small value
    places: dict = dataclasses.field(default_factory=dict)      # of a large one: node -> offset in its arena
    size: int = 0
    inside: list = ()               # ids of the refs that the value contains

@dataclasses.dataclass(slots=True, eq=False)
class Task:
    id: int
    kind: int                       # which function or class, with which options
    method: str                     # of an actor; "__init__" makes the actor; "" is a plain task
    payload: bytes                  # (args, kwargs); None if they are the value of deps[0]
    deps: list                      # refs that are arguments themselves: it runs when they are there
    refs: list                      # all refs in the arguments, at any depth: they live until it has run
    returns: list
    parent: int
    retries: int
    again: object                   # is it tried again when it raises? True, False, or the packed types of errors
    owner: "Peer" = None
    actor: "Actor" = None
    missing: int = 0                # deps that are not there yet
    worker: "Peer" = None
    cancelled: bool = False

@dataclasses.dataclass(slots=True, eq=False)
class Actor:
    id: int                         # of its creation, too, and of the object that its handles refer to
    options: dict
    creation: Task                  # the call of its constructor: that it is tried again is a restart
    worker: "Peer" = None
    alive: bool = False             # its constructor has returned
    death: bytes = None             # the error that every further call gets
    kept: list = ()                 # refs of the constructor's arguments, for a restart
    calls: dict = dataclasses.field(default_factory=dict)       # id -> task, of all that are not over
    lanes: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(collections.deque))  # not yet sent

@dataclasses.dataclass(slots=True, eq=False)
class Peer:
    """The driver or a worker, seen from the hub."""
    id: str
    node: Pool
    send: callable                  # send(name, *arguments): a message to it
    holds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    env: dict = dataclasses.field(default_factory=dict)         # its variables: what it starts inherits them
    kinds: set = dataclasses.field(default_factory=set)         # functions and classes that it was sent
    running: dict = dataclasses.field(default_factory=dict)     # task id -> task
    actor: Actor = None
    grant: tuple = None             # (pool, demand, gpus) that it holds
    blocked: int = 0                # how many of its threads wait for values
    lent: bool = False              # its CPU, meanwhile
    single: bool = False            # has GPUs or an environment of its own: runs no further task
    exiting: bool = False           # on purpose
    label: str = ""                 # what it runs, for its log
    line: bytes = b""               # what it has printed of a line so far

class Hub:
    """on_X(peer, ...) handles message X, ask_X(peer, ...) answers question X, report_X(node, ...) hears of a node."""

    def __init__(self, config, sock, arena, listener):
        self.config, self.loop, self.changed, self.stderr = config, Loop(), False, bytearray()
        self.objects, self.tasks, self.kinds, self.actors, self.names, self.groups = {}, {}, {}, {}, {}, {}
        self.peers, self.nodes, self.transfers, self.arrived = {}, [], {}, collections.deque()
        self.queues, self.namespace, self.env = collections.defaultdict(collections.deque), "", {}
        self.head = self.add_node(config, lambda name, *args: getattr(self.local, name)(*args))
        self.local = Node(self.loop, arena, config, functools.partial(self.report, self.head))
        channel = Channel(self.loop, sock, lambda messages: self.handle(self.driver, messages), self.loop.stop)
        self.driver = self.peers["driver"] = Peer("driver", self.head, channel.send)
        self.loop.watch(os.pidfd_open(os.getppid()), self.loop.stop)    # a child of the driver may hold its socket
        if listener:
            self.loop.watch(listener.fileno(), lambda: self.greet(listener))

    def handle(self, peer, messages):
        for name, *args in messages:
            getattr(self, "on_" + name)(peer, *args)

    def on_job(self, peer, namespace, env):
        self.namespace, self.env = namespace, env

    def on_ask(self, peer, key, name, *args):
        try:
            answer = pack_value(getattr(self, "ask_" + name)(peer, *args))
        except Exception as error:                  # a question that makes no sense is the asker's problem
            answer = pack_error(error)
        peer.send("value", key, answer)

    def report(self, node, what, *args):
        getattr(self, "report_" + what)(node, *args)

    def report_messages(self, node, worker_id, messages):
        if worker := self.peers.get(worker_id):
            self.handle(worker, messages)

    # - objects: counted, found, shown -

    def hold(self, oids):
        for oid in oids:
            if oid in self.objects:
                self.objects[oid].holds += 1

    def release(self, oids):
        stack = list(oids)
        while stack:
            oid = stack.pop()
            obj = self.objects.get(oid)
            if obj is None:
                continue
            obj.holds -= 1
            if obj.holds:
                continue
            del self.objects[oid]
            stack += obj.inside
            for node, offset in obj.places.items():
                node.space.give(offset)
            if oid in self.actors:
                self.end_if_unused(self.actors[oid])

    def on_hold(self, peer, oids):
        peer.holds.update(oids)
        self.hold(oids)

    def on_drop(self, peer, oids):
        for oid in oids:
            if oid in peer.holds:                   # else its maker was interrupted before it could say so
                peer.holds[oid] -= 1
                if not peer.holds[oid]:
                    del peer.holds[oid]
                self.release([oid])

    def ask_allocate(self, peer, size, first_try):
        """A new object that has memory but no value yet: (its id, offset), or None if there is no room."""
        offset = peer.node.space.take(size)
        if offset is not None:
            oid = secrets.randbits(96)
            self.objects[oid] = Object(places={peer.node: offset}, size=size)
            peer.holds[oid] += 1
            return oid, offset
        for other in self.peers.values():
            if first_try and other.node is peer.node:
                other.send("collect")               # it may have refs in reference cycles
        return None

    def on_put(self, peer, oid, value, refs):
        if value is not None:
            self.objects[oid] = Object()
            peer.holds[oid] += 1
        self.seal(oid, value or oid, refs)

    def seal(self, oid, value, refs, failed=False):
        """The value is there: bytes, or the id of the object in whose memory it was written."""
        obj = self.objects.get(oid)
        if obj is None:                             # nobody waits for it any more
            return
        obj.done, obj.failed, obj.inside, obj.maker = True, failed, refs, None
        if type(value) is bytes:
            obj.payload = value
        elif value != oid:
            written = self.objects[value]
            obj.places, obj.size, written.places = written.places, written.size, {}
        self.hold(refs)
        self.wake(oid, obj)

    def wake(self, oid, obj):
        """The value is there, or is on one node more."""
        waiting, obj.waiting = obj.waiting, []
        for waiter in waiting:
            if type(waiter) is tuple:
                self.show(oid, obj, *waiter)
            else:
                waiter.missing -= 1
                if not waiter.missing:
                    self.arrived.append(waiter)
                    self.changed = True

    def locate(self, obj, node):
        if obj.payload is not None:
            return obj.payload
        return (obj.places[node], obj.size) if node in obj.places else AWAY

    def show(self, oid, obj, peer, key, needed):
        value = self.locate(obj, peer.node)
        if peer.id not in self.peers:
            return
        if value is AWAY and needed:
            self.fetch(oid, obj, peer, key)
        else:
            peer.send("value", key, value)

    def on_want(self, peer, key, oid, needed):
        obj = self.objects.get(oid)
        if obj is None:
            error = ObjectLostError(f"object {oid:024x} is gone: it was freed, as no ref to it was left")
            peer.send("value", key, pack_error(error))
        elif obj.done:
            self.show(oid, obj, peer, key, needed)
        else:
            obj.waiting.append((peer, key, needed))

    # - objects go to another node when they are needed there, chunk by chunk: read, write, and the next -

    def fetch(self, oid, obj, peer, key):
        target = peer.node
        if any(copy.oid == oid and copy.target is target for copy in self.transfers.values()):
            return obj.waiting.append((peer, key, True))
        offset = target.space.take(obj.size)
        if offset is None:
            error = ObjectStoreFullError(f"node {target.id} has no room for a copy of {obj.size:,} bytes")
            return peer.send("value", key, pack_error(error))
        obj.waiting.append((peer, key, True))
        self.hold([oid])                            # or either end might be given to other objects
        token, (source, start) = secrets.randbits(62), next(iter(obj.places.items()))
        self.transfers[token] = types.SimpleNamespace(oid=oid, size=obj.size, done=0, source=source, start=start,
                                                      target=target, offset=offset)
        self.report_wrote(target, token)

    def report_bytes(self, node, token, data):
        if transfer := self.transfers.get(token):
            position = transfer.offset + transfer.done
            transfer.done += len(data)
            transfer.target.tell("write", token, position, data)

    def report_wrote(self, node, token):
        transfer = self.transfers.get(token)
        if transfer and transfer.done < transfer.size:
            size = min(CHUNK, transfer.size - transfer.done)
            transfer.source.tell("read", token, transfer.start + transfer.done, size)
        elif transfer:
            self.objects[transfer.oid].places[transfer.target] = transfer.offset
            self.end_transfer(token)

    def end_transfer(self, token):
        """Who waited is shown the copy; or waits for another one; or hears that all are lost."""
        oid = self.transfers.pop(token).oid
        self.wake(oid, self.objects[oid])
        self.release([oid])

    # - tasks -

    def on_kind(self, peer, kind, name, blob, options):
        self.kinds[kind] = name, blob, options

    def on_submit(self, peer, tid, aid, *fields):
        task = self.tasks[tid] = Task(tid, *fields, owner=peer)
        for oid in task.returns:
            self.objects[oid] = Object(maker=task, waiting=[(peer, oid, False)])
            peer.holds[oid] += 1
        self.hold(task.refs)
        if task.method == "__init__":
            aid, options = tid, self.kinds[task.kind][2]
            self.actors[aid] = Actor(aid, options, task)
            self.objects[aid].holds += options["detached"]
        actor = task.actor = self.actors.get(aid)
        if aid and (actor is None or actor.death is not None):
            forgotten = ActorDiedError("the actor is dead, and forgotten: no handle was left")
            return self.finish(task, error=actor.death if actor else forgotten)
        if actor:
            actor.calls[tid] = task
        for oid in set(task.deps):
            if oid not in self.objects:
                lost = ObjectLostError(f"argument {oid:024x} is gone: it was freed, as no ref to it was left")
                return self.finish(task, error=lost)
            if not self.objects[oid].done:
                task.missing += 1
                self.objects[oid].waiting.append(task)
        if actor and task.method != "__init__":
            actor.lanes[self.lane(task)].append(task)
        if not task.missing:
            self.ready(task)

    @staticmethod
    def lane(task):
        """The calls of one caller keep their order; where calls run at the same time, there is none to keep."""
        return task.owner.id if task.actor.options["ordered"] else task.id

    def ready(self, task):
        """All of its arguments are there."""
        if task.id not in self.tasks:               # it is over already, and its arguments may be gone
            return
        failed = next((oid for oid in task.deps if self.objects[oid].failed), None)
        if failed is not None:
            self.finish(task, error=self.objects[failed].payload)
        elif task.actor and task.method != "__init__":
            self.advance(task.actor, self.lane(task))
        else:
            self.queues[self.kinds[task.kind][2]["shape"]].append(task)
            self.changed = True

    def advance(self, actor, lane):
        tasks = actor.lanes.get(lane, ())
        while tasks and (tasks[0].id not in self.tasks or actor.alive and not tasks[0].missing):
            task = tasks.popleft()
            if task.id in self.tasks:               # else it is over already: cancelled, or an argument failed
                self.dispatch(task, actor.worker)
        if not tasks:
            actor.lanes.pop(lane, None)

    def schedule(self):
        """Starts all that fits. What asks for the same waits in one queue; only its first has to be looked at."""
        while self.changed:
            self.changed = False
            while self.arrived:                     # not in wake(): a long chain of failures would be a deep recursion
                self.ready(self.arrived.popleft())
            for group in [group for group in self.groups.values() if group.waiting]:
                self.place_group(group)
            for shape, tasks in list(self.queues.items()):
                while tasks and (tasks[0].id not in self.tasks or self.start(tasks[0])):
                    tasks.popleft()
                if not tasks:
                    del self.queues[shape]

    def start(self, task):
        """False if it has to wait."""
        name, _, options = self.kinds[task.kind]
        demand, strategy = options["demand"], options["strategy"]
        if strategy[0] == "group" and strategy[1] in self.groups and self.groups[strategy[1]].waiting:
            return False
        pools = candidates(strategy, self.nodes, self.groups)
        if not any(pool.could_fit(demand) for pool in pools):
            self.fail_unschedulable(task, name, demand)
            return True
        pool = next((pool for pool in pools if pool.fits(demand)), None)
        if pool is None or not (demand or task.actor) and pool.node.busy >= 64:     # what asks for nothing waits, too
            return False
        gpus = pool.take(demand)
        worker = self.find_worker(pool.node, task.owner.env, options["env"], gpus)
        worker.grant = pool, demand, gpus
        pool.node.busy += 1
        if task.actor:
            worker.actor, task.actor.worker = task.actor, worker
        self.dispatch(task, worker)
        return True

    def fail_unschedulable(self, task, name, demand):
        wants = ", ".join(f"{amount:g} {kind}" for kind, amount in _amounts(demand).items()) or "nothing"
        text = f"{name} asks for {wants}: where its scheduling strategy looks, no node or bundle could ever hold that"
        strategy = self.kinds[task.kind][2]["strategy"]
        if strategy[0] == "group" and strategy[1] not in self.groups:
            text = f"{name} cannot run: its placement group was removed"
        self.finish(task, error=ActorUnschedulableError(text) if task.actor else TaskUnschedulableError(text))

    def find_worker(self, node, inherited, own, gpus):
        env = inherited | own
        if node.idle and not env and not gpus:
            return node.idle.pop()
        worker_id, single = secrets.token_hex(14), bool(env or gpus)
        worker = Peer(worker_id, node, functools.partial(node.tell, "send", worker_id), env=env, single=single)
        self.peers[worker_id] = worker
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, sorted(gpus)))} if node.gpus else {}
        settings = {"worker": worker_id, "gpus": sorted(gpus), "namespace": self.namespace}
        node.tell("fork", worker_id, self.env | inherited | visible | own, settings)
        node.started += 1
        return worker

    def dispatch(self, task, worker):
        name, blob, options = self.kinds[task.kind]
        if task.kind not in worker.kinds:
            worker.kinds.add(task.kind)
            worker.send("kind", task.kind, name, blob, options)
        if worker.label != name:
            worker.node.tell("read_log", worker.id)             # what the task before it has printed
            worker.label = name
        worker.running[task.id], task.worker = task, worker
        values = {oid: self.locate(self.objects[oid], worker.node) for oid in task.deps}
        worker.send("run", task.id, task.kind, task.method, task.payload, values, task.deps, len(task.returns),
                    task.actor.id if task.actor else 0, task.again)

    def on_done(self, worker, tid, results, failed, again=False):
        task = worker.running.pop(tid, None)
        if task is None:
            return
        if worker.actor is None:
            self.give_back(worker)
        if not (again and self.try_again(task)):
            self.finish(task, results, failed)

    def try_again(self, task):
        """False if it has no try left."""
        if task.cancelled or not task.retries or task.id not in self.tasks:
            return False
        task.retries, task.worker = task.retries - 1, None
        if task.actor and task.method != "__init__":
            task.actor.lanes[self.lane(task)].appendleft(task)
        self.ready(task)
        return True

    def finish(self, task, results=(), failed=False, error=None):
        """The one end of every task: its values or its error are shown, what it held is let go. With its constructor,
        an actor lives or dies."""
        if self.tasks.pop(task.id, None) is None:
            return
        if error is not None:
            results, failed = [(pack_error(error), ())] * len(task.returns), True
        for oid, (value, refs) in zip(task.returns, results):
            self.seal(oid, value, refs, failed)
        actor, lives = task.actor, task.method == "__init__" and not failed
        if lives and task.retries:
            actor.kept = task.refs
        else:
            self.release(task.refs)
        if actor is None:
            return
        actor.calls.pop(task.id, None)
        if lives:
            actor.alive = True
            for lane in list(actor.lanes):
                self.advance(actor, lane)
        elif task.method == "__init__":
            self.actor_died(actor, results[0][0])
        else:
            self.advance(actor, self.lane(task))
        self.end_if_unused(actor)

    def give_back(self, worker):
        """A task is done: its resources are free, and so is its worker."""
        self.free_grant(worker)
        node = worker.node
        if worker.single or len(node.idle) >= max(1, node.total.get("CPU", 0) // UNIT):
            worker.send("exit")
        else:
            node.idle.append(worker)

    def free_grant(self, worker):
        if worker.grant:
            pool, demand, gpus = worker.grant
            self.lend(worker, False)
            pool.give(demand, gpus)
            pool.node.busy -= 1
            worker.grant, self.changed = None, True

    def on_blocked(self, worker, change):
        worker.blocked += change
        self.lend(worker, worker.blocked > 0)

    def lend(self, worker, lent):
        """What waits for a value lends its CPU to others, or nested tasks would wait for a CPU for ever."""
        if worker.grant and worker.lent != lent:
            pool, demand, _ = worker.grant
            pool.give({"CPU": demand.get("CPU", 0)}, {}, sign=1 if lent else -1)
            pool.node.busy -= 1 if lent else -1
            worker.lent, self.changed = lent, True

    def ask_cancel(self, peer, oid, force, recursive):
        obj = self.objects.get(oid)
        tasks = [obj.maker] if obj and obj.maker else []
        if force and tasks and tasks[0].actor:
            raise ValueError("force=True is for tasks: it would end the actor; cancel without it, or kill() the actor")
        for task in tasks:
            tasks += [child for child in self.tasks.values()        # they have their turn in this loop
                      if recursive and child.parent == task.id and child.method != "__init__"]
            task.cancelled = True
            if task.worker is None:
                self.finish(task, error=TaskCancelledError("the task was cancelled before it began"))
            elif force and not task.actor:
                task.worker.node.tell("signal", task.worker.id, signal.SIGKILL)
            else:
                task.worker.send("cancel", task.id)
                if not task.actor:                  # the message says which task; the signal makes the worker look
                    task.worker.node.tell("signal", task.worker.id, signal.SIGINT)

    # - workers that end, and what that means -

    def report_exited(self, node, worker_id, pid, code):
        worker = self.peers.get(worker_id)
        if worker is None:
            return
        if worker.line:
            self.report_log(node, worker_id, pid, b"\n")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.worker_died(worker, f"process {pid} of {worker.label} on node {node.id[:8]} {how}")

    def worker_died(self, worker, reason):
        del self.peers[worker.id]
        if worker in worker.node.idle:
            worker.node.idle.remove(worker)
        self.free_grant(worker)
        actor, error = worker.actor, WorkerCrashedError(reason)
        if actor and (worker.exiting or not actor.creation.retries):
            self.actor_died(actor, ActorDiedError(f"the actor is dead: {reason}"))
        elif actor:                                 # its constructor is called again, and calls wait for that
            error = ActorUnavailableError(f"{reason} in the middle of this call; the actor starts again")
            actor.alive, actor.worker, actor.kept, task = False, None, (), actor.creation
            self.tasks[task.id] = actor.calls[task.id] = worker.running[task.id] = task
        for task in reversed(worker.running.values()):          # in front of those that wait, in their old order
            if not self.try_again(task):
                self.finish(task, error=TaskCancelledError("the task was cancelled") if task.cancelled else error)
        self.release(worker.holds.elements())

    def actor_died(self, actor, error):
        if actor.death is not None:
            return
        actor.death, actor.alive, actor.creation.retries = pack_error(error), False, 0
        self.names = {name: named for name, named in self.names.items() if named[0] != actor.id}
        actor.lanes.clear()
        for task in list(actor.calls.values()):
            self.finish(task, error=actor.death)
        self.release(actor.kept)
        if actor.worker:
            actor.worker.node.tell("signal", actor.worker.id, signal.SIGKILL)
        self.end_if_unused(actor)

    def end_if_unused(self, actor):
        """No handle is left: it ends when its calls are done, and is forgotten when it has ended."""
        if actor.id in self.objects:
            return
        if actor.death is not None:
            self.actors.pop(actor.id, None)
        elif actor.alive and not actor.calls:
            actor.worker.exiting = True
            actor.worker.send("exit")

    def on_exiting(self, worker):
        worker.exiting = True

    def on_kill(self, peer, aid, no_restart):
        actor = self.actors.get(aid)
        if actor and no_restart:
            self.actor_died(actor, ActorDiedError("the actor is dead: it was killed by kill()"))
        elif actor and actor.worker:
            actor.worker.node.tell("signal", actor.worker.id, signal.SIGKILL)

    def ask_create(self, peer, name, info, get_if_exists, tid, *fields):
        """Makes an actor with a name, unless an actor has it: then it says which one, or that this is an error."""
        if self.names.get(name, (None,))[0] not in self.objects:
            self.names[name] = tid, info
            return self.on_submit(peer, tid, *fields)
        if not get_if_exists:
            raise ValueError(f"an actor named {name[1]!r} lives already: choose another name, or get_if_exists=True")
        return self.ask_actor(peer, name)

    def ask_name(self, peer, aid):
        return next((name[1] for name, (named, _) in self.names.items() if named == aid), "")

    def ask_actor(self, peer, name):
        aid, info = self.names.get(name, (None, None))
        if aid not in self.objects:
            raise ValueError(f"no actor named {name[1]!r} lives in namespace {name[0]!r}")
        self.on_hold(peer, [aid])
        return aid, info

    # - what the workers print -

    def report_log(self, node, worker_id, pid, data):
        if worker := self.peers.get(worker_id):
            *lines, worker.line = (worker.line + data).split(b"\n")
            self.print(b"".join(b"(%s pid=%d) %s\n" % (worker.label.encode(), pid, line) for line in lines))

    def print(self, data):
        """To the driver's stderr, without ever waiting for it: what does not read must not stop the hub."""
        self.stderr += data[:max(0, (1 << 20) - len(self.stderr))]
        while self.stderr and select.select([], [2], [], 0)[1]:
            try:
                del self.stderr[:os.write(2, self.stderr[:select.PIPE_BUF])]
            except OSError:
                self.stderr.clear()
        if self.stderr and 2 not in self.loop.handlers:
            self.loop.watch(2, lambda: (self.loop.forget(2), self.print(b"")), select.EPOLLOUT)

    # - placement groups -

    def on_group(self, peer, gid, bundles, strategy, name, value):
        self.objects[gid] = Object(holds=2, waiting=[(peer, gid, False)])       # one of the holds is the group's own
        peer.holds[gid] += 1
        self.groups[gid] = types.SimpleNamespace(id=gid, bundles=bundles, strategy=strategy, name=name, value=value,
                                                 pools=[None] * len(bundles), waiting=True)
        self.changed = True

    def place_group(self, group):
        """Finds nodes for its bundles: at first for all, later for those whose node has died."""
        lost = [i for i, pool in enumerate(group.pools) if pool is None]
        bundles, used = [group.bundles[i] for i in lost], [pool.node for pool in group.pools if pool]
        nodes = [node for node in self.nodes if not (group.strategy == "STRICT_SPREAD" and node in used)]
        nodes.sort(key=Pool.load, reverse=group.strategy.endswith("PACK"))
        placed = place_bundles(bundles, group.strategy, nodes)
        if placed is None and place_bundles(bundles, group.strategy, [Pool(node.total) for node in nodes]):
            return                                  # later, when others have ended
        group.waiting = False
        for i, node in zip(lost, placed or ()):
            group.pools[i] = Pool(group.bundles[i], node, node.take(group.bundles[i]))
        text = f"no nodes could ever hold a placement group of {list(map(_amounts, group.bundles))}, {group.strategy}"
        value = group.value if placed else pack_error(TaskUnschedulableError(text))
        self.seal(group.id, value, (), not placed)

    def on_remove_group(self, peer, gid):
        group = self.groups.pop(gid, None)
        if group is None:
            return
        for worker in list(self.peers.values()):
            if worker.grant and worker.grant[0] in group.pools:
                if worker.actor:
                    self.actor_died(worker.actor, ActorDiedError("the actor is dead: its placement group was removed"))
                worker.node.tell("signal", worker.id, signal.SIGKILL)
        for pool in filter(None, group.pools):
            pool.node.give(pool.total, pool.grant)
        if group.waiting:
            error = TaskUnschedulableError("the placement group was removed before it was placed")
            self.seal(gid, pack_error(error), (), True)
        self.release([gid])
        self.changed = True

    def ask_groups(self, peer):
        return {f"{gid:024x}": {
            "placement_group_id": f"{gid:024x}", "name": group.name, "strategy": group.strategy,
            "state": "CREATED" if all(group.pools) else "PENDING",
            "bundles": dict(enumerate(map(_amounts, group.bundles))),
            "bundles_to_node_id": {i: pool.node.id for i, pool in enumerate(group.pools) if pool}}
            for gid, group in self.groups.items()}

    # - nodes -

    def add_node(self, config, tell):
        """tell(name, *arguments) calls a method of the Node, here or in another process."""
        node = Pool(config["resources"])
        node.id, node.tell, node.space = config["node"], tell, Space(config["store"])
        node.idle, node.busy, node.started = [], 0, 0
        self.nodes.append(node)
        self.changed = True
        return node

    def greet(self, listener):
        """A stranger has to prove that it has the key, before anything that it says is unpickled."""
        with contextlib.suppress(OSError):          # it is gone again
            sock, nonce = listener.accept()[0], secrets.token_bytes(32)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 64)      # to be called once, when it has said all
            sock.send(nonce)
            self.loop.watch(sock.fileno(), lambda: self.check_proof(sock, nonce))

    def check_proof(self, sock, nonce):
        self.loop.forget(sock.fileno())
        with contextlib.suppress(OSError):
            data = sock.recv(64)
            theirs, proof = data[:32], data[32:]
            key = bytes.fromhex(self.config["key"])
            if hmac.compare_digest(proof, _proof(key, b"client", nonce, theirs)):
                sock.send(_proof(key, b"hub", theirs, nonce))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
                channel = Channel(self.loop, sock, lambda messages: [self.welcome(channel, *each) for each in messages],
                                  lambda: None)
                return
        sock.close()

    def welcome(self, channel, config):
        """Another node: its first message is its config, and all others are reports."""
        node = self.add_node(config, channel.send)
        channel.on_messages = lambda messages: [self.report(node, *message) for message in messages]
        channel.on_close = lambda: self.node_died(node)
        channel.send({name: self.config[name] for name in ("job", "preload")})

    def node_died(self, node):
        self.nodes.remove(node)
        for group in self.groups.values():
            if any(pool and pool.node is node for pool in group.pools):
                group.pools = [pool if pool and pool.node is not node else None for pool in group.pools]
                group.waiting = True
        for oid, obj in self.objects.items():
            if obj.places.pop(node, None) is not None and not obj.places:
                obj.failed = True
                obj.payload = pack_error(ObjectLostError(f"object {oid:024x}: its only copy died with its node"))
        for worker in [peer for peer in self.peers.values() if peer.node is node]:
            self.worker_died(worker, f"node {node.id[:8]} died, and {worker.label} with it")
        for token, transfer in list(self.transfers.items()):
            if node is transfer.target or node is transfer.source and transfer.done < transfer.size:
                transfer.target.space.give(transfer.offset)
                self.end_transfer(token)

    def ask_nodes(self, peer):
        return [{"NodeID": node.id, "Alive": True, "NodeManagerAddress": self.config["host"] or "127.0.0.1",
                 "Resources": _amounts(node.total) | {"object_store_memory": float(node.space.size)},
                 "Available": _amounts(node.free) | {"object_store_memory": float(node.space.free)}}
                for node in self.nodes]

def _amounts(resources):
    return {name: amount / UNIT for name, amount in resources.items() if amount > 0}

# --- the client: what the driver and the workers have in common ---

class ObjectRef:
    """A promise, and where its value arrives: `payload` is None, AWAY, packed bytes, or (offset, size) in the arena."""
    __slots__ = "client", "id", "key", "payload", "callbacks", "wanted", "urgent", "__weakref__"

    def __init__(self, client, id, payload=None, borrowed=False):
        self.client, self.id, self.payload = client, id, payload
        self.key = next(client.ids) if borrowed else id         # the maker of an object is told of its value by its id
        self.callbacks, self.wanted, self.urgent = [], False, False
        client.refs[self.key] = weakref.ref(self)

    def __del__(self):
        self.client.drop(self)

    def __reduce__(self):
        refs = _pickled_refs.get()
        if refs is not None:
            refs.append(self.id)
        return _borrow, (self.id,)

    def hex(self): return f"{self.id:024x}"
    def __repr__(self): return f"ObjectRef({self.hex()})"
    def __hash__(self): return hash(self.id)
    def __eq__(self, other): return isinstance(other, ObjectRef) and self.id == other.id
    def __await__(self): return _connected().value_async(self).__await__()

    def future(self):
        """The value as a concurrent.futures.Future."""
        executor = ThreadPoolExecutor(1)
        future = executor.submit(get, self)
        executor.shutdown(wait=False)
        return future

def _borrow(oid):
    """A ref that came inside of a value. Whoever sent it holds the object until the hub has read this message."""
    client = _connected()
    client.send("hold", [oid])
    return ObjectRef(client, oid, borrowed=True)

class Shield:
    """Under it, Ctrl-C (or a cancel) waits: half a message would be the end of the connection."""

    def __init__(self, act):
        self.act, self.depth, self.rang, self.main = act, 0, False, threading.get_ident()

    def __enter__(self):
        self.depth += threading.get_ident() == self.main

    def __exit__(self, *_):
        if threading.get_ident() == self.main:
            self.depth -= 1
            if self.rang and not self.depth:
                self.rang = False
                self.act()

    def ring(self, *_):
        """The handler of SIGINT."""
        if self.depth:
            self.rang = True
        else:
            self.act()

_current = contextvars.ContextVar("current", default=None)      # the Call that runs here
Call = collections.namedtuple("Call", "id kind method payload values deps returns actor again")

class Client:
    """One socket to the hub. Who has to wait reads it, so that where there is one thread, none has to wake another."""

    def __init__(self, sock, arena, config):
        self.sock, self.arena, self.config, self.closed, self.worker = sock, arena, config, False, None
        self.ids = itertools.count(secrets.randbits(64) << 32)
        self.refs, self.dropped = {}, collections.deque()
        self.outbox, self.sending = collections.deque(), threading.Lock()
        self.buffer, self.chunk, self.poller = bytearray(), bytearray(CHUNK), select.poll()
        self.news, self.reading, self.arrivals, self.loop = threading.Condition(), False, 0, None
        self.handlers = {"value": self.on_value, "collect": gc.collect}
        self.poller.register(sock, select.POLLIN)
        self.shield, self.old_handler = Shield(self.interrupted), None
        if threading.current_thread() is threading.main_thread() and (
                signal.getsignal(signal.SIGINT) is signal.default_int_handler):
            self.old_handler = signal.signal(signal.SIGINT, self.shield.ring)

    def interrupted(self):
        """SIGINT: in a worker the hub wants a task cancelled, in a driver it is Ctrl-C."""
        if self.worker is None:
            raise KeyboardInterrupt
        self.worker.interrupted()

    def close(self):
        self.closed = True
        if self.old_handler is not None:
            signal.signal(signal.SIGINT, self.old_handler)
        self.leave_loop()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)    # to close is not enough while a thread or a child has it, too
        self.sock.close()

    def leave_loop(self):
        """Or that event loop would take a later socket of the same number for this one."""
        with contextlib.suppress(RuntimeError):                     # it is closed
            self.loop and self.loop.remove_reader(self.sock.fileno())

    # - messages out: from any thread, and from the garbage collector in the middle of another message -

    def send(self, *message):
        if self.closed:
            raise RaySystemError("the connection to the hub is closed; call shutdown() and init() again")
        self.outbox.append(frame(*message))
        self.flush()

    def flush(self):
        """Who gets the lock sends for all; who does not leaves its message to the one who has it, and never waits."""
        while (self.outbox or self.dropped) and not self.closed and self.sending.acquire(blocking=False):
            try:
                with self.shield:
                    drops = [self.dropped.popleft() for _ in range(len(self.dropped))]
                    messages = [self.outbox.popleft() for _ in range(len(self.outbox))]
                    if drops:                       # after the messages in which these refs were used
                        messages.append(frame("drop", drops))
                    self.sock.sendall(b"".join(messages))
            except OSError:
                self.closed = True
            finally:
                self.sending.release()

    def drop(self, ref):
        """Called by the garbage collector. A small value may stay until the next message; what holds memory, a process
        or other refs may not."""
        self.refs.pop(ref.key, None)
        self.dropped.append(ref.id)
        if ref.urgent or type(ref.payload) is not bytes or ref.payload[1] or len(self.dropped) > 100:
            in_main = threading.get_ident() == self.shield.main
            self.shield.depth += in_main            # an exception here would be lost: Ctrl-C waits for the next message
            self.flush()
            self.shield.depth -= in_main

    # - messages in -

    def read(self):
        """Handles what has arrived. `news` is held."""
        with self.shield:
            size = 0
            try:
                size = self.sock.recv_into(self.chunk, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                pass
            if not size:
                return self.lose_hub()
            self.buffer += memoryview(self.chunk)[:size]
            for name, *args in cut(self.buffer):
                self.handlers[name](*args)

    def lose_hub(self):
        if self.worker:
            os._exit(1)
        self.closed = True
        for ref in [ref() for ref in list(self.refs.values())]:
            for callback in ref.callbacks if ref else ():
                callback()

    def read_now(self):
        with self.news:
            if not self.reading:
                self.read()
                self.news.notify_all()
        if self.closed:
            self.leave_loop()

    def wait_until(self, done, deadline=None):
        """False if the deadline comes first. Of all that wait, one reads; the others sleep until it has news."""
        self.flush()
        with self.news:
            while not done():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                if self.closed:
                    raise RaySystemError("the hub is gone; call shutdown() and init() again")
                if self.reading:
                    self.news.wait(left)
                    continue
                self.reading = True
                self.news.release()
                try:
                    self.poller.poll(None if left is None else math.ceil(left * 1000))
                finally:
                    self.news.acquire()
                    self.reading = False
                    self.news.notify_all()          # if this thread is done, another has to read
                self.read()
        return True

    def wait_blocked(self, done, deadline):
        """wait_until, but a task that has to wait lends its CPU to others."""
        if done():
            return True
        with self.blocked():
            return self.wait_until(done, deadline)

    @contextlib.contextmanager
    def blocked(self):
        if self.worker: self.send("blocked", 1)
        try:
            yield
        finally:
            if self.worker: self.send("blocked", -1)

    def on_value(self, key, value):
        ref = self.refs.get(key, lambda: None)()
        if ref is not None:
            ref.payload, ref.wanted = value, False
            self.arrivals += 1
            callbacks, ref.callbacks = ref.callbacks, []
            for callback in callbacks:
                callback()

    def ask(self, name, *args):
        """A question to the hub. The answer comes as values do."""
        answer = ObjectRef(self, next(self.ids))
        self.send("ask", answer.id, name, *args)
        self.wait_until(lambda: answer.payload is not None)
        return self.value(answer)

    # - values -

    def pack(self, value):
        """(bytes, ids of the refs inside, None); or those of a large value are in the memory of a new object, that is
        freed with its ref: (None, ids of the refs inside, ref)"""
        pieces, size, refs = pack(value)
        if size <= INLINE:
            return b"".join(pieces), refs, None
        for patience in range(10):
            with self.shield:                       # or the memory would belong to nobody for a moment
                if allocated := self.ask("allocate", size, patience == 0):
                    oid, offset = allocated
                    ref = ObjectRef(self, oid, (offset, size))
                    self.arena.write(offset, pieces)
                    return None, refs, ref
            time.sleep(0.005 * patience)            # others may be letting go of refs just now
        raise ObjectStoreFullError(f"no room for {size:,} bytes in the {self.arena.size:,} bytes of shared memory: let "
                                   "go of refs and arrays, or init(object_store_memory=...) with more")

    def put(self, value):
        packed, refs, ref = self.pack(value)
        ref = ref or ObjectRef(self, next(self.ids), packed)
        self.send("put", ref.id, packed, refs)
        return ref

    def want(self, ref, needed):
        """Asks for the value, unless it will come or is here. Without `needed`, to know that it is AWAY is enough."""
        if ref.client is not self and (ref.payload is None or ref.payload is AWAY):
            ref.payload = pack_error(ObjectLostError(f"{ref} is of a session that has ended"))
        unasked = ref.payload is None and ref.key != ref.id
        if not ref.wanted and (unasked or needed and ref.payload is AWAY):
            ref.wanted = True
            self.send("want", ref.key, ref.id, needed)

    def get(self, refs, deadline=None):
        for ref in refs:
            self.want(ref, True)
        for ref in refs:
            while ref.payload is None or ref.payload is AWAY:
                self.want(ref, True)
                if not self.wait_blocked(lambda ref=ref, before=ref.payload: ref.payload is not before, deadline):
                    raise GetTimeoutError(f"{ref} was not there in time")
        return [self.value(ref) for ref in refs]

    def value(self, ref):
        packed = ref.payload if type(ref.payload) is bytes else ref.client.arena.view(*ref.payload, ref)
        try:
            value = unpack(packed)
        except Exception as error:
            raise RaySystemError(f"{ref} could not be unpickled: {type(error).__name__}: {error}") from error
        if packed[:1] != b"E":
            return value
        try:
            raise value
        finally:
            del value                               # it has this frame in its traceback: no cycle, or views live on

    async def value_async(self, ref):
        import asyncio
        loop = asyncio.get_running_loop()
        if self.loop is not loop:
            self.leave_loop()
            loop.add_reader(self.sock.fileno(), self.read_now)
            self.loop = loop

        def arrive(arrived):
            if asyncio._get_running_loop() is loop:
                arrived.done() or arrived.set_result(None)
            else:
                with contextlib.suppress(RuntimeError):             # that loop is closed
                    loop.call_soon_threadsafe(lambda: arrived.done() or arrived.set_result(None))

        while ref.payload is None or ref.payload is AWAY:
            if self.closed:
                raise RaySystemError("the hub is gone; call shutdown() and init() again")
            before, arrived = ref.payload, loop.create_future()
            ref.callbacks.append(functools.partial(arrive, arrived))
            self.want(ref, True)
            async_actor = self.worker and self.worker.instance is not None      # it has other calls to run meanwhile
            with contextlib.nullcontext() if async_actor else self.blocked():
                if ref.payload is before:
                    await arrived
        return self.value(ref)

    # - calls -

    def submit(self, kind, method, args, kwargs, count=1, actor=0, retries=0, again=False, named=None):
        """Sends a call, that has `count` values; their refs, and None. The call that makes a named actor is a question,
        with the actor that has this name already for an answer."""
        try:
            payload, refs, large = self.pack((args, kwargs))
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise TypeError(_blame(args, kwargs, error)) from error
        deps = [arg.id for arg in (*args, *kwargs.values()) if type(arg) is ObjectRef]
        if large:                                   # its arguments are an object of their own
            self.send("put", large.id, None, refs)
            deps, refs = [large.id, *deps], [large.id]
        parent, values = _current.get(), [ObjectRef(self, next(self.ids)) for _ in range(count)]
        call = (values[0].id if values else next(self.ids), actor, kind, method, payload, deps, refs,
                [value.id for value in values], parent.id if parent else 0, retries, again)
        return values, self.ask("create", *named, *call) if named else self.send("submit", *call)

def _blame(args, kwargs, error):
    """Names the argument that cannot be pickled."""
    for name, arg in [*enumerate(args), *kwargs.items()]:
        try:
            pack(arg)
        except Exception as problem:
            return f"argument {name!r}, of type {type(arg).__name__}, cannot be pickled: {problem}"
    return str(error)

# --- a worker's life ---

class Worker:
    """Runs tasks, or its actor's calls: one after the other, or in threads, or (an async actor) in an event loop."""

    def __init__(self, client):
        self.client, self.kinds, self.inbox, self.cancelled = client, {}, collections.deque(), set()
        self.instance, self.main_call, self.coroutines, self.begin = None, None, {}, None
        self.special = {"__ray_ready__": lambda: True, "__ray_terminate__": exit_actor,
                        "__ray_call__": self.call_with_instance}
        client.handlers |= {"kind": self.on_kind, "run": self.on_run, "exit": self.on_exit, "cancel": self.on_cancel}

    def live(self):
        run = self.execute
        while True:
            self.client.wait_until(lambda: self.inbox)
            call = self.inbox.popleft()
            if call is None:
                self.leave()
            options = self.kinds[call.kind][2]
            if call.method == "__init__" and options["asynchronous"]:
                import asyncio
                asyncio.run(self.live_async(call, options["max_concurrency"]))
            run(call)
            if call.method == "__init__" and options["max_concurrency"] > 1:
                run = functools.partial(ThreadPoolExecutor(options["max_concurrency"]).submit, self.execute)

    async def live_async(self, first, limit):
        import asyncio
        loop, slots = asyncio.get_running_loop(), asyncio.Semaphore(limit)

        async def run(call):
            self.coroutines[call.id] = asyncio.current_task()
            _current.set(call)
            try:
                async with slots:
                    if call.id in self.cancelled:   # before it began
                        raise asyncio.CancelledError
                    function, args, kwargs = self.resolve(call)
                    result = function(*args, **kwargs)
                    self.finish(call, await result if inspect.isawaitable(result) else result)
            except BaseException as error:
                self.fail(call, error)
            finally:
                del self.coroutines[call.id]

        def begin():
            while self.inbox:
                call = self.inbox.popleft()
                if call is None:
                    self.leave()
                loop.create_task(run(call))

        self.execute(first)
        self.begin, self.client.loop = lambda: loop.call_soon_threadsafe(begin), loop
        loop.add_reader(self.client.sock.fileno(), self.client.read_now)
        begin()
        await loop.create_future()

    def on_kind(self, kind, name, blob, options):
        self.kinds[kind] = [name, blob, options]

    def on_run(self, *fields):
        self.inbox.append(Call(*fields))
        if self.begin: self.begin()

    def on_exit(self):
        self.inbox.append(None)
        if self.begin: self.begin()

    def on_cancel(self, tid):
        self.cancelled.add(tid)
        if tid in self.coroutines:
            self.client.loop.call_soon_threadsafe(self.coroutines[tid].cancel)

    def interrupted(self):
        self.client.read_now()                      # which task does the hub mean?
        if self.main_call in self.cancelled:
            raise KeyboardInterrupt

    def execute(self, call):
        token, in_main = _current.set(call), threading.get_ident() == self.client.shield.main
        try:
            if call.id in self.cancelled:
                raise KeyboardInterrupt
            if in_main and not call.actor:          # only plain tasks are interrupted, as in Ray
                self.main_call = call.id
            function, args, kwargs = self.resolve(call)
            result = function(*args, **kwargs)
            self.main_call = None
            self.finish(call, result)
        except BaseException as error:
            self.main_call = None
            self.fail(call, error)
        finally:
            _current.reset(token)

    def resolve(self, call):
        """The function to call; its arguments, with values in the place of refs."""
        kind = self.kinds[call.kind]
        if type(kind[1]) is bytes:
            kind[1] = unpack(kind[1])

        def value(ref):
            if type(ref) is not ObjectRef:
                return ref
            ref.payload = call.values[ref.id]
            return self.client.get([ref])[0]

        args, kwargs = unpack(call.payload) if call.payload is not None else value(_borrow(call.deps[0]))
        args, kwargs = [value(arg) for arg in args], {name: value(arg) for name, arg in kwargs.items()}
        if not call.method:
            return kind[1], args, kwargs
        if call.method == "__init__":
            return functools.partial(self.construct, kind[1]), args, kwargs
        return self.special.get(call.method) or getattr(self.instance, call.method), args, kwargs

    def construct(self, cls, *args, **kwargs):
        self.instance = cls(*args, **kwargs)

    def call_with_instance(self, function, *args, **kwargs):
        return function(self.instance, *args, **kwargs)

    def finish(self, call, result):
        values = [result] if call.returns == 1 else list(result) if call.returns else []
        if len(values) != call.returns:
            raise ValueError(f"{self.name(call)} returned {len(values)} values, but num_returns={call.returns}")
        packed = list(map(self.client.pack, values))
        results = [(ref.id if ref else value, refs) for value, refs, ref in packed]
        with contextlib.suppress(Exception):        # a task may have closed it
            sys.stdout.flush()
        self.client.send("done", call.id, results, False)
        self.cancelled.discard(call.id)

    def name(self, call):
        return self.kinds[call.kind][0] + (f".{call.method}" if call.method else "")

    def fail(self, call, error):
        if isinstance(error, SystemExit):
            self.leave(error.code if isinstance(error.code, int) else int(error.code is not None))
        name, again = self.name(call), call.again is True
        text = f"{name}() failed in process {os.getpid()}:\n{traceback.format_exc()}"
        if call.id in self.cancelled and not isinstance(error, Exception):     # KeyboardInterrupt, CancelledError
            packed = pack_error(TaskCancelledError(f"{name}() was cancelled"))
        elif call.method == "__init__":
            packed = pack_error(ActorDiedError(f"the actor is dead: its constructor failed\n{text}"))
        else:
            try:
                again = again or call.again and isinstance(error, unpack(call.again))
                packed = pack_error(RayTaskError(name, text, error.cause if isinstance(error, RayTaskError) else error))
                unpack(packed)
            except Exception as problem:            # it cannot be sent, or not be made again: at least it can be read
                text += f"\n({type(error).__name__} itself could not be sent: {problem})"
                packed = pack_error(RayTaskError(name, text))
        self.client.send("done", call.id, [(packed, ())] * call.returns, True, again)
        self.cancelled.discard(call.id)

    def leave(self, code=0):
        """The end as it should be: exit_actor(), sys.exit(), or nobody needs this process any more."""
        if self.instance is not None:
            self.client.send("exiting")
        atexit._run_exitfuncs()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)

# --- the API, by Ray's names ---

_client = _session = None       # this process's client; the Cluster to which it, the driver, is connected
_clusters = {}                  # address -> Cluster

def _set_client(client):
    global _client
    _client = client
    return client

def _forget_client():
    """A forked child must not speak on its parent's socket."""
    if _client is not None:
        _client.closed = True
        _set_client(None)

os.register_at_fork(after_in_child=_forget_client)

def _connected():
    if _client is None:
        init()
    return _client

class Cluster:
    """A hub in a process of its own, and the driver's end of its socket: init() makes one. With a host it also listens
    there, and other nodes can join: processes of this machine that talk over TCP, in a test what several machines are
    in earnest. init(address=cluster.address) connects to such a one; shutdown(), of either, ends it."""

    def __init__(self, initialize_head=True, connect=False, head_node_args=None, host="127.0.0.1"):
        config = _node_config(**(head_node_args or {}))
        while (fd := os.open(os.devnull, os.O_RDWR)) < 3: pass      # a closed stdin or stderr is no place for ours
        os.close(fd)
        listener = socket.create_server((host, 0)) if host else None
        self.arena, self.key = Arena(config["store"]), secrets.token_hex(32)
        self.worker_nodes, self.address = [], None
        self.sock, theirs = socket.socketpair()
        self.config = config | {"job": secrets.token_hex(4), "key": self.key, "host": host,
                                "preload": ["numpy"] if "numpy" in sys.modules else []}
        fds = [theirs.fileno(), self.arena.fd, *([listener.fileno()] if listener else [])]
        self.process = subprocess.Popen(_command(f"actors.serve{*fds,}"), pass_fds=fds, start_new_session=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.sock.sendall(frame(self.config))
        theirs.close()
        if listener:
            self.address = "%s:%d" % listener.getsockname()[:2]
            _clusters[self.address] = self
            listener.close()
        if connect:
            init(address=self.address)

    def add_node(self, num_cpus=1, num_gpus=0, resources=None, object_store_memory=None):
        config = _node_config(num_cpus, num_gpus, resources, object_store_memory)
        node = subprocess.Popen(_command("actors.serve_node(actors.json.loads(input()))"), text=True,
                                start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with node.stdin:
            node.stdin.write(json.dumps(config | {"address": self.address, "key": self.key}) + "\n")
        if node.stdout.readline() != "ready\n":
            raise ConnectionError(f"the node did not start (exit code {node.wait()})")
        node.node_id = config["node"]
        self.worker_nodes.append(node)
        return node

    def remove_node(self, node, allow_graceful=True):
        node.kill()
        node.wait()
        node.stdout.close()
        self.worker_nodes.remove(node)
        while _client is not None and node.node_id in [each["NodeID"] for each in nodes()]:
            time.sleep(0.01)

    def shutdown(self):
        if _session is self:
            return shutdown()
        self.sock.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _clusters.pop(self.address, None)
        for node in self.worker_nodes:
            node.wait()                             # they end when the hub is gone
            node.stdout.close()

def _command(code):
    """A Python that finds the modules that this one finds, this file among them as `actors`."""
    path = [*map(os.path.abspath, sys.path), HERE]
    return [sys.executable, "-c", f"import sys; sys.path = {path!r}; import {__name__} as actors; {code}"]

def serve(sock_fd, arena_fd, listener_fd=None):
    """The process of the hub."""
    sock, listener = socket.socket(fileno=sock_fd), socket.socket(fileno=listener_fd) if listener_fd else None
    config, = _first_message(sock)
    hub = Hub(config, sock, Arena(config["store"], arena_fd), listener)
    hub.local.run(hub.schedule)

def serve_node(config):
    """The process of another node: does what the hub says, reports what happens, ends when the hub is gone."""
    host, _, port = config["address"].rpartition(":")
    try:
        sock = _connect((host, int(port)), bytes.fromhex(config["key"]))
    except (OSError, UnicodeError) as error:        # the latter: a host's name with a part of no or of 64 letters
        refused = isinstance(error, PermissionError)
        sys.exit(f"error: {error}" if refused else f"error: no hub answers at {config['address']}: {error}")
    sock.sendall(frame({name: config[name] for name in ("node", "resources", "store")}))
    config |= _first_message(sock)[0]
    loop = Loop()
    channel = Channel(loop, sock, lambda messages: [getattr(node, name)(*args) for name, *args in messages], loop.stop)
    node = Node(loop, Arena(config["store"]), config, channel.send)
    print("ready", flush=True)
    node.run()

def _node_config(num_cpus=None, num_gpus=None, resources=None, object_store_memory=None):
    if num_gpus is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = os.listdir("/dev") if visible is None else visible.split(",")
        num_gpus = len([d for d in devices if d.strip() and (visible is not None or re.fullmatch(r"nvidia\d+", d))])
    num_cpus = len(os.sched_getaffinity(0)) if num_cpus is None else num_cpus
    amounts = {"CPU": num_cpus, "GPU": num_gpus, **(resources or {})}
    store = int(object_store_memory or 0.3 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return {"node": secrets.token_hex(28), "resources": _units(amounts), "store": store - store % 4096}

def _units(amounts):
    for name, amount in amounts.items():
        if not isinstance(amount, (int, float)) or not 0 <= amount < math.inf:
            raise ValueError(f"{name}={amount!r}: the amount of a resource is a number from 0 up")
        if name == "GPU" and amount > 1 and amount % 1:
            raise ValueError(f"num_gpus={amount}: more than one GPU is a whole number of GPUs")
    return {name: round(amount * UNIT) for name, amount in amounts.items() if amount}

def _env(runtime_env):
    try:
        env = dict((runtime_env or {}).get("env_vars") or {})
        fits = all(re.fullmatch(r"[^=\0]+", name) and re.fullmatch(r"[^\0]*", text) for name, text in env.items())
    except (AttributeError, TypeError, ValueError):
        fits = False
    if not fits:                                    # a worker could not even start, to say so
        raise TypeError("runtime_env is a dictionary of texts, such as {'env_vars': {'OMP_NUM_THREADS': '1'}}")
    if unknown := set(runtime_env or {}) - {"env_vars"}:
        raise ValueError(f"runtime_env has env_vars only, not {', '.join(sorted(unknown))}: workers share this machine")
    return env

def init(address=None, *, num_cpus=None, num_gpus=None, resources=None, object_store_memory=None, namespace="",
         runtime_env=None, ignore_reinit_error=False, **_of_ray):
    """Starts the hub, or connects to a Cluster of this program. What Ray has for its dashboard and logs is ignored."""
    global _session
    if _client is not None:
        if ignore_reinit_error or _client.worker:
            return Context()
        raise RuntimeError("init() was called twice: call shutdown() first, or pass ignore_reinit_error=True")
    if address not in (None, "auto", "local", *_clusters):
        raise ConnectionError(f"this program has no Cluster with the address {address!r}")
    env = _env(runtime_env)
    head = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources,
            "object_store_memory": object_store_memory}
    _session = _clusters.get(address) or Cluster(head_node_args=head, host=None)
    _set_client(Client(_session.sock, _session.arena, _session.config | {"namespace": namespace}))
    _client.send("job", namespace, env)
    return Context()

@atexit.register
def shutdown():
    global _session
    if _client is None or _client.worker:
        return
    client, cluster = _client, _session
    _session = _set_client(None)
    client.close()
    cluster.shutdown()

class Context:
    """What init() returns: `with init():` ends in a shutdown."""
    def __enter__(self): return self
    def __exit__(self, *_): shutdown()

def is_initialized():
    return _client is not None

def put(value):
    if isinstance(value, ObjectRef):
        raise TypeError("put() of an ObjectRef: it is one already")
    return _connected().put(value)

def _deadline(timeout):
    return None if timeout is None else time.monotonic() + timeout

def _check_refs(refs):
    for ref in refs:
        if not isinstance(ref, ObjectRef):
            raise TypeError(f"an ObjectRef is wanted, not a {type(ref).__name__}")
    return refs

def get(refs, *, timeout=None):
    if isinstance(refs, (list, tuple)):
        return _connected().get(_check_refs(refs), _deadline(timeout))
    return _connected().get(_check_refs([refs]), _deadline(timeout))[0]

def wait(refs, *, num_returns=1, timeout=None, fetch_local=True):
    """(the first num_returns of those that are ready, all others), both in the order in which they came."""
    if not isinstance(refs, (list, tuple)):
        raise TypeError("wait() takes a list of ObjectRefs")
    if not refs:
        return [], []
    if len(set(_check_refs(refs))) < len(refs):
        raise ValueError("wait() takes every ref once")
    if not 0 < num_returns <= len(refs):
        raise ValueError(f"num_returns={num_returns}, of {len(refs)} refs")
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout={timeout}: it is a number of seconds from 0 up")
    client, seen = _connected(), None
    for ref in refs:
        client.want(ref, False)

    def enough():
        nonlocal seen
        seen, before = client.arrivals, seen
        return seen != before and sum(ref.payload is not None for ref in refs) >= num_returns

    client.wait_blocked(enough, _deadline(timeout))
    ready = [ref for ref in refs if ref.payload is not None][:num_returns]
    chosen = set(ready)
    return ready, [ref for ref in refs if ref not in chosen]

def cancel(ref, *, force=False, recursive=True):
    _check_refs([ref])
    _connected().ask("cancel", ref.id, force, recursive)

def kill(actor, *, no_restart=True):
    if not isinstance(actor, ActorHandle):
        raise ValueError(f"kill() is for actors, not for a {type(actor).__name__}; for tasks there is cancel()")
    _connected().send("kill", actor._ref.id, no_restart)

def exit_actor():
    if _client is None or _client.worker is None or _client.worker.instance is None:
        raise TypeError("exit_actor() is for the methods of an actor")
    raise SystemExit(0)

def get_actor(name, namespace=None):
    client = _connected()
    namespace = client.config["namespace"] if namespace is None else namespace
    return ActorHandle._of(client, *client.ask("actor", (namespace, name)))

def method(**options):
    """Defaults for one method of an actor: @method(num_returns=2)."""
    def mark(function):
        function._method_options = _given({name: options[name] for name in OPTIONS & options.keys()})
        return function
    return mark

# --- remote functions and actors ---

OPTIONS = {"num_cpus", "num_gpus", "resources", "runtime_env", "scheduling_strategy", "placement_group",
           "placement_group_bundle_index", "num_returns", "max_retries", "retry_exceptions", "name", "namespace",
           "get_if_exists", "lifetime", "max_concurrency", "max_restarts", "max_task_retries", "max_calls", "memory"}
_COUNT = lambda value: isinstance(value, int) and value >= -1, "a number from 0 up, or -1 for ever"
FITTING = {"max_retries": _COUNT, "max_restarts": _COUNT, "max_task_retries": _COUNT,
           "max_concurrency": (lambda value: isinstance(value, int) and value >= 0, "a number from 0 up"),
           "name": (lambda value: isinstance(value, str) and value, "a text that is not empty"),
           "lifetime": (("detached", "non_detached").__contains__, "detached or non_detached"),
           "retry_exceptions": (lambda value: isinstance(value, (bool, bytes)) or isinstance(value, (list, tuple)) and
                                all(inspect.isclass(each) and issubclass(each, Exception) for each in value),
                                "True, False, or a list of exceptions")}

def _given(options):
    """The options that are not None, which stands for what is usual. What makes no sense is refused here, not later."""
    if unknown := set(options) - OPTIONS:
        raise ValueError(f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(sorted(OPTIONS))}")
    options = {name: value for name, value in options.items() if value is not None}
    for name in options.keys() & FITTING.keys():
        fits, wanted = FITTING[name]
        if not fits(options[name]):
            raise ValueError(f"{name}={options[name]!r}: it is {wanted}")
    if isinstance(options.get("retry_exceptions"), (list, tuple)):          # the hub does not know these types
        options["retry_exceptions"] = pack_value(tuple(options["retry_exceptions"]))
    return options

def _plan(options, cls=None):
    """What the hub and the workers have to know of the options of a function or class."""
    demand = _units({"CPU": options.get("num_cpus", 0 if cls else 1),       # as in Ray: an actor has to ask for a CPU
                     "GPU": options.get("num_gpus", 0), **options.get("resources", {})})
    if options.get("get_if_exists") and "name" not in options:
        raise ValueError("get_if_exists=True: of which name?")
    strategy = options.get("scheduling_strategy") or "DEFAULT"
    if group := options.get("placement_group"):
        strategy = PlacementGroupSchedulingStrategy(group, options.get("placement_group_bundle_index", -1))
    if isinstance(strategy, str) and strategy not in ("DEFAULT", "SPREAD"):
        raise ValueError(f"scheduling_strategy={strategy!r}: there are DEFAULT, SPREAD, and the classes of "
                         "util.scheduling_strategies")
    strategy = strategy if isinstance(strategy, str) else strategy._plan()
    members, methods = inspect.getmembers(cls) if cls else (), {}
    asynchronous = any(inspect.iscoroutinefunction(value) for _, value in members)
    for name, value in members:
        if callable(value) and not hasattr(object, name):           # a handle has those itself
            static = isinstance(inspect.getattr_static(cls, name, None), staticmethod)
            bound = types.MethodType(value, cls) if inspect.isfunction(value) and not static else value
            methods[name] = getattr(value, "_method_options", {}), _parameters(bound)
    concurrency = options.get("max_concurrency") or (1000 if asynchronous else 1)
    return {"demand": demand, "strategy": strategy, "shape": (tuple(sorted(demand.items())), strategy),
            "env": _env(options.get("runtime_env")), "asynchronous": asynchronous, "max_concurrency": concurrency,
            "ordered": concurrency == 1 and not asynchronous, "detached": options.get("lifetime") == "detached",
            "methods": methods, "max_restarts": options.get("max_restarts", 0),
            "max_task_retries": options.get("max_task_retries", 0)}

def _parameters(function):
    """Those of a signature, as text, with None for any default; what has no signature takes anything."""
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return "*args, **kwargs"
    plain = [each.replace(annotation=each.empty, default=each.default if each.default is each.empty else None)
             for each in parameters]
    return str(inspect.Signature(plain))[1:-1]

@functools.lru_cache(1000)
def _check(name, parameters):
    """An empty function: to call it tells whether arguments fit, in 0.1 us; Signature.bind() takes 2."""
    check = eval(f"lambda {parameters}: None")
    check.__qualname__ = name
    return check

class _Remote:
    """A function or class with its options. The hub hears of it when it is first used."""

    def __init__(self, target, options):
        self._target, self._options, self._known = target, _given(options), (None, None)
        self._plan = _plan(self._options, target if inspect.isclass(target) else None)
        functools.update_wrapper(self, target, updated=())
        self._check = _check(self.__name__, _parameters(target))

    def options(self, **options):
        return type(self)(self._target, self._options | options)

    def __call__(self, *args, **kwargs):
        raise TypeError(f"{self.__name__} is remote: call {self.__name__}.remote(...)")

    def __reduce__(self):
        return type(self), (self._target, self._options)

    def _kind(self, client):
        known, kind = self._known
        if known is not client:
            pieces, _, refs = pack(self._target)
            blob = b"".join(pieces)
            kind = int.from_bytes(hashlib.sha256(blob + repr(self._plan).encode()).digest()[:8], "little")
            client.send("hold", refs)               # refs in closures and globals live as long as the session
            client.send("kind", kind, self.__name__, blob, self._plan)
            self._known = client, kind
        return kind

def _submit(kind, method, args, kwargs, options, actor=0, retries=0):
    count = options.get("num_returns", 1)
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"num_returns={count!r}: it is a number from 0 up")
    refs, _ = _connected().submit(kind, method, args, kwargs, count, actor, retries,
                                  options.get("retry_exceptions", False))
    return refs[0] if count == 1 else refs or None

class RemoteFunction(_Remote):
    def remote(self, *args, **kwargs):
        self._check(*args, **kwargs)
        retries = self._options.get("max_retries", 3)
        return _submit(self._kind(_connected()), "", args, kwargs, self._options, retries=retries)

class ActorClass(_Remote):
    def remote(self, *args, **kwargs):
        client, options, named = _connected(), self._options, None
        kind = self._kind(client)
        info = kind, self.__name__, self._plan["methods"], self._plan["max_task_retries"]
        if name := options.get("name"):
            namespace = options.get("namespace") or client.config["namespace"]
            if options.get("get_if_exists"):
                with contextlib.suppress(ValueError):       # if there is none yet, its arguments have to be packed
                    return get_actor(name, namespace)
            named = (namespace, name), info, options.get("get_if_exists", False)
        self._check(*args, **kwargs)
        (ref,), taken = client.submit(kind, "__init__", args, kwargs, 1, 0, self._plan["max_restarts"], named=named)
        return ActorHandle._of(client, *taken) if taken else ActorHandle(ref, info)

class ActorHandle:
    """handle.method.remote(...) calls. The actor ends when no handle is left anywhere."""

    def __init__(self, ref, info):
        self._ref, self._info = ref, info
        ref.urgent = True

    @classmethod
    def _of(cls, client, aid, info):
        """Of an actor that the hub has named; it has counted this handle already."""
        return cls(ObjectRef(client, aid, borrowed=True), info)

    def __getattr__(self, name):
        if name in self._info[2] or name in ("__ray_ready__", "__ray_terminate__", "__ray_call__"):
            return ActorMethod(self, name, *self._info[2].get(name, ({}, "*args, **kwargs")))
        raise AttributeError(f"actor {self._info[1]} has no method {name!r}")

    @property
    def _actor_id(self): return self._ref
    def __repr__(self): return f"Actor({self._info[1]}, {self._ref.hex()})"
    def __hash__(self): return hash(self._ref)
    def __eq__(self, other): return isinstance(other, ActorHandle) and self._ref == other._ref
    def __reduce__(self): return ActorHandle, (self._ref, self._info)

class ActorMethod:
    def __init__(self, actor, name, options, parameters):
        self._actor, self._name, self._options, self._parameters = actor, name, options, parameters

    def options(self, **options):
        return ActorMethod(self._actor, self._name, _given(self._options | options), self._parameters)

    def remote(self, *args, **kwargs):
        _check(self._name, self._parameters)(*args, **kwargs)
        kind, _, _, retries = self._actor._info
        retries = self._options.get("max_task_retries", retries)
        return _submit(kind, self._name, args, kwargs, self._options, self._actor._ref.id, retries)

    def __call__(self, *args, **kwargs):
        raise TypeError(f"{self._name} is a method of an actor: call {self._name}.remote(...)")

def remote(*args, **options):
    """@remote, @remote(num_cpus=2, ...), or remote(function)"""
    def make(target):
        if not (inspect.isclass(target) or inspect.isroutine(target)):
            raise TypeError(f"remote is for functions and classes, not for {target!r}")
        if inspect.iscoroutinefunction(target):
            raise ValueError(f"{target.__name__} is async: only methods of actors are; asyncio.run() it in a function")
        return (ActorClass if inspect.isclass(target) else RemoteFunction)(target, options)
    if args and (options or len(args) > 1):
        raise TypeError("remote takes a function or class alone, or options by name")
    return make(*args) if args else make

# --- where am I, and what is there? ---

class RuntimeContext:
    def get_node_id(self): return _connected().config["node"]
    def get_job_id(self): return _connected().config["job"]
    def get_worker_id(self): return _connected().config.get("worker", "driver")
    def get_task_id(self): return f"{_current.get().id:024x}" if _current.get() else None
    def get_actor_id(self): return f"{_current.get().actor:024x}" if _current.get() and _current.get().actor else None
    def get_actor_name(self): return _connected().ask("name", _current.get().actor) if self.get_actor_id() else None
    def get_task_name(self): return _connected().worker.name(_current.get()) if _current.get() else None
    def get_accelerator_ids(self): return {"GPU": [str(gpu) for gpu in get_gpu_ids()]}

    def get_assigned_resources(self):
        call = _current.get()
        return _amounts(_connected().worker.kinds[call.kind][2]["demand"]) if call else {}

    namespace = property(lambda self: _connected().config["namespace"])

    @property
    def current_actor(self):
        """The handle by which an actor calls itself, or gives itself to others."""
        call, client = _current.get(), _connected()
        if call is None or not call.actor:
            raise RuntimeError("current_actor is for the methods of an actor")
        name, _, plan = client.worker.kinds[call.kind]
        return ActorHandle(_borrow(call.actor), (call.kind, name, plan["methods"], plan["max_task_retries"]))

def get_runtime_context(): return RuntimeContext()
def get_gpu_ids(): return list(_connected().config.get("gpus", ()))
def nodes(): return _connected().ask("nodes")
def cluster_resources(): return _sum(node["Resources"] for node in nodes())
def available_resources(): return _sum(node["Available"] for node in nodes())
def _sum(amounts): return dict(sum(map(collections.Counter, amounts), collections.Counter()))

# --- placement groups: resources that are taken together, or not at all ---

class PlacementGroup:
    def __init__(self, ref, bundles): self.id, self.bundle_specs = ref, bundles
    def ready(self): return self.id
    def wait(self, timeout_seconds=30):
        with contextlib.suppress(GetTimeoutError, TaskUnschedulableError):      # the latter: it can never be placed
            return bool(get(self.id, timeout=timeout_seconds))
        return False

    def __reduce__(self): return PlacementGroup, (self.id, self.bundle_specs)
    bundle_count = property(lambda self: len(self.bundle_specs))

def placement_group(bundles, strategy="PACK", name="", lifetime=None):
    """A group of any lifetime lives until it is removed, or its driver ends."""
    if strategy not in ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"):
        raise ValueError(f"strategy={strategy!r}: choose from PACK, SPREAD, STRICT_PACK, STRICT_SPREAD")
    if not isinstance(bundles, (list, tuple)) or not bundles or not all(
            isinstance(bundle, dict) and any(bundle.values()) for bundle in bundles):       # one of zeros is none
        raise ValueError("a placement group is a list of bundles, such as [{'CPU': 1}, {'GPU': 1, 'CPU': 2}]")
    client, units = _connected(), [_units(bundle) for bundle in bundles]
    group = PlacementGroup(ObjectRef(client, next(client.ids)), bundles)
    client.send("group", group.id.id, units, strategy, name, client.pack(group)[0])
    return group

def remove_placement_group(group): _connected().send("remove_group", group.id.id)

def placement_group_table(group=None):
    table = _connected().ask("groups")
    return table.get(group.id.hex(), {}) if group else table

@dataclasses.dataclass
class PlacementGroupSchedulingStrategy:
    placement_group: PlacementGroup
    placement_group_bundle_index: int = -1          # -1: any
    placement_group_capture_child_tasks: bool = False           # Ray's; here what a task starts is never captured

    def _plan(self):
        index, count = self.placement_group_bundle_index, self.placement_group.bundle_count
        if not -1 <= index < count:
            raise ValueError(f"placement_group_bundle_index={index}: -1 is any, the last is {count - 1}")
        return "group", self.placement_group.id.id, index

@dataclasses.dataclass
class NodeAffinitySchedulingStrategy:
    node_id: str
    soft: bool = False
    def _plan(self): return "node", self.node_id, self.soft

# --- util: a pool of actors, and a queue ---

class ActorPool:
    """Spreads calls over actors, one at a time on each."""

    def __init__(self, actors):
        self._idle, self._waiting, self._busy = list(actors), collections.deque(), {}     # the last: ref -> its actor

    def submit(self, fn, value):
        if not self._idle:
            return self._waiting.append((fn, value))
        actor = self._idle.pop()
        self._busy[fn(actor, value)] = actor

    def _take(self, refs, timeout, ignore_if_timedout):
        if not refs:
            raise StopIteration("no more results")
        ready, late = wait(refs, timeout=timeout)
        if ready or ignore_if_timedout:
            self.push(self._busy.pop((ready or late)[0]))
        if not ready:
            raise TimeoutError("no result was there in time")
        return get(ready[0])

    def get_next(self, timeout=None, ignore_if_timedout=False):
        return self._take(list(self._busy)[:1], timeout, ignore_if_timedout)

    def get_next_unordered(self, timeout=None, ignore_if_timedout=False):
        return self._take(list(self._busy), timeout, ignore_if_timedout)

    def _map(self, get_next, fn, values):
        self._waiting.clear()                       # what an earlier call has left over is not of this one
        while self._busy: self.push(self._busy.popitem()[1])
        for value in values: self.submit(fn, value)
        return (get_next() for _ in iter(self.has_next, False))

    def map(self, fn, values): return self._map(self.get_next, fn, values)
    def map_unordered(self, fn, values): return self._map(self.get_next_unordered, fn, values)

    def push(self, actor):
        if actor in self._idle or actor in self._busy.values():
            raise ValueError(f"{actor} belongs to the pool already")
        self._idle.append(actor)
        if self._waiting: self.submit(*self._waiting.popleft())

    def has_next(self): return bool(self._busy)
    def has_free(self): return bool(self._idle)
    def pop_idle(self): return self._idle.pop() if self._idle else None

class Empty(queue.Empty): pass
class Full(queue.Full): pass

class _QueueActor:
    def __init__(self, maxsize):
        import asyncio
        self.queue = asyncio.Queue(maxsize)

    async def put(self, item, block, timeout):
        import asyncio
        if not block: return await self.put_many([item])
        try: await asyncio.wait_for(self.queue.put(item), timeout)
        except asyncio.TimeoutError: raise Full(f"no room within {timeout} s") from None

    async def get(self, block, timeout):
        import asyncio
        if not block: return (await self.get_many(1))[0]
        try: return await asyncio.wait_for(self.queue.get(), timeout)
        except asyncio.TimeoutError: raise Empty(f"no item within {timeout} s") from None

    async def put_many(self, items):
        if 0 < self.queue.maxsize < self.queue.qsize() + len(items): raise Full(f"no room for {len(items)} items")
        for item in items: self.queue.put_nowait(item)

    async def get_many(self, count):
        if self.queue.qsize() < count: raise Empty(f"{self.queue.qsize()} items, not {count}")
        return [self.queue.get_nowait() for _ in range(count)]

    async def state(self): return self.queue.qsize(), self.queue.full()

class Queue:
    """A queue between processes: an async actor, on which any number of them may wait."""

    def __init__(self, maxsize=0, actor_options=None):
        self.maxsize, self.actor = maxsize, ActorClass(_QueueActor, actor_options or {}).remote(maxsize)

    def _call(self, method, *args):
        if args[-1] is not None and args[-1] < 0: raise ValueError("'timeout' must be 0 or more")
        return method.remote(*args)

    def put(self, item, block=True, timeout=None): get(self._call(self.actor.put, item, block, timeout))
    def get(self, block=True, timeout=None): return get(self._call(self.actor.get, block, timeout))
    async def put_async(self, item, block=True, timeout=None): await self._call(self.actor.put, item, block, timeout)
    async def get_async(self, block=True, timeout=None): return await self._call(self.actor.get, block, timeout)
    def put_nowait(self, item): self.put(item, block=False)
    def get_nowait(self): return self.get(block=False)
    def put_nowait_batch(self, items): get(self.actor.put_many.remote(list(items)))
    def get_nowait_batch(self, num_items): return get(self.actor.get_many.remote(num_items))
    def qsize(self): return get(self.actor.state.remote())[0]
    def full(self): return get(self.actor.state.remote())[1]
    def empty(self): return not self.qsize()
    def size(self): return self.qsize()
    def __len__(self): return self.qsize()
    def shutdown(self, force=False, grace_period_s=5): kill(self.actor)

# --- Ray's module names, so that `from actors.util import ActorPool` works ---

def _module(name, *members, **named):
    module = types.ModuleType(f"{__name__}.{name}")
    vars(module).update({member.__name__: member for member in members} | named)
    sys.modules[module.__name__] = module
    return module

exceptions = _module("exceptions", *[each for each in vars().values()
                                     if inspect.isclass(each) and issubclass(each, RayError)])
cluster_utils, actor = _module("cluster_utils", Cluster), _module("actor", ActorHandle, ActorClass, exit_actor)
_groups = PlacementGroup, placement_group, remove_placement_group, placement_group_table
_module("util.placement_group", *_groups)
_module("util.actor_pool", ActorPool)
util = _module("util", ActorPool, *_groups[1:], queue=_module("util.queue", Queue, Empty, Full),
               scheduling_strategies=_module("util.scheduling_strategies", PlacementGroupSchedulingStrategy,
                                             NodeAffinitySchedulingStrategy))

# --- the demo, and how fast it is ---

def demo():
    import numpy
    start = time.perf_counter()
    init(num_cpus=4)

    @remote
    def inside(seed, count):
        x, y = numpy.random.default_rng(seed).random((2, count))
        return int((x * x + y * y < 1).sum())

    hits, seconds = sum(get([inside.remote(seed, 1_000_000) for seed in range(20)])), time.perf_counter() - start
    print(f"pi is about {4 * hits / 20e6:.4f}: 20 tasks in 4 processes, {seconds:.1f} s with the start of everything")
    assert abs(4 * hits / 20e6 - math.pi) < 0.002

    @remote(max_restarts=1, max_task_retries=1)
    class Counter:
        def __init__(self): self.count = 0
        def pid(self): return os.getpid()
        def crash(self): os.kill(os.getpid(), signal.SIGKILL)
        def add(self):
            self.count += 1
            return self.count

    counter = Counter.remote()
    print("an actor counts:", get([counter.add.remote() for _ in range(5)]))
    first = get(counter.pid.remote())
    try:
        get(counter.crash.options(max_task_retries=0).remote())
    except RayActorError as error:
        print(f"it crashes: {type(error).__name__}: {error}")
    second = get(counter.pid.remote())
    print(f"it runs again, as process {second}, and counts from", get(counter.add.remote()))
    assert first != second

    array = numpy.ones(50_000_000)
    ref, where = put(array), remote(lambda values: (values.ctypes.data, values.flags.writeable, values.sum()))
    start = time.perf_counter()
    results = get([where.remote(ref) for _ in range(4)])
    print(f"4 tasks summed an array of 400 MB in {time.perf_counter() - start:.2f} s, in read-only views of one copy")
    assert all(total == 50_000_000 and not writeable for _, writeable, total in results)
    shutdown()

def measure(name, seconds=1.0, large=1 << 30):
    """Microbenchmarks of a module with Ray's API, in this process: {what: how often a second, at best}."""
    import numpy
    ray, start, rates = importlib.import_module(name), time.perf_counter(), {}
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    task = ray.remote(lambda: 1)
    ray.get(task.remote())
    rates["init() to the first result"] = 1 / (time.perf_counter() - start)

    class Sync:
        def call(self): return 1

    class Async:
        async def call(self): return 1

    sync, asynchronous = ray.remote(Sync).remote(), ray.remote(Async).remote()
    small, refs, array = ray.put(0), [ray.put(i) for i in range(1000)], numpy.ones(large, "u1")
    for what, calls, action in [
            ("tasks, one at a time", 1, lambda: ray.get(task.remote())),
            ("tasks, 1000 in flight", 1000, lambda: ray.get([task.remote() for _ in range(1000)])),
            ("actor calls, one at a time", 1, lambda: ray.get(sync.call.remote())),
            ("actor calls, 1000 in flight", 1000, lambda: ray.get([sync.call.remote() for _ in range(1000)])),
            ("async calls, 1000 in flight", 1000, lambda: ray.get([asynchronous.call.remote() for _ in range(1000)])),
            ("put of a small value", 1, lambda: ray.put(0)),
            ("get of a small value", 1, lambda: ray.get(small)),
            ("wait for 1000 values", 1, lambda: ray.wait(refs, num_returns=1000)),
            ("wait for 1000 tasks", 1, lambda: ray.wait([task.remote() for _ in range(1000)], num_returns=1000))]:
        best, begin = math.inf, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            start, rounds = time.perf_counter(), 0
            while not rounds or time.perf_counter() - start < seconds / 5:
                action()
                rounds += 1
            best = min(best, (time.perf_counter() - start) / rounds)
        rates[what] = calls / best
    puts, gets = [], []
    for _ in range(8):
        start = time.perf_counter()
        ref = ray.put(array)
        puts.append(time.perf_counter() - start)
        start = time.perf_counter()
        got = ray.get(ref)
        gets.append(time.perf_counter() - start)
        del ref, got
        time.sleep(seconds / 5)                     # for the space to be free again
    ray.shutdown()
    return rates | {"put of 1 GiB": 1 / min(puts), "get of 1 GiB": 1 / min(gets)}

def bench():
    names = [__name__] + ["ray"] * (importlib.util.find_spec("ray") is not None)
    columns = []
    for name in names:                              # each in a process of its own
        command = _command(f"print(actors.json.dumps(actors.measure({name!r})))")
        columns.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1]))
    print(f"\n{'how often a second':36}" + "".join(f"{name:>12}" for name in names))
    for what in columns[0]:
        rates = [column[what] for column in columns]
        ratio = f"{rates[0] / rates[1]:9.1f}x" if len(rates) > 1 else ""
        print(f"{what:36}" + "".join(f"{rate:12,.1f}" for rate in rates) + ratio)

def main():
    parser = argparse.ArgumentParser(description="the demo; or a node that joins the Cluster of another machine")
    parser.add_argument("command", nargs="?", choices=["demo", "node"], default="demo")
    parser.add_argument("address", nargs="?", help="node: HOST:PORT of the cluster; its key is read from stdin")
    args = parser.parse_args()
    if args.command == "demo":
        demo()
        bench()
    else:
        if not (port := re.fullmatch(r".+:([0-9]{1,5})", args.address or "")) or not 0 < int(port[1]) < 2**16:
            parser.error(f"which HOST:PORT? It is the address of a Cluster, not {args.address!r}")
        key = sys.stdin.buffer.readline().strip().decode("ascii", "replace")
        if not re.fullmatch(r"([0-9a-fA-F]{2})+", key):
            parser.error("the first line of stdin has to be the key of the Cluster: hexadecimal digits")
        serve_node(_node_config() | {"address": args.address, "key": key})

if __name__ == "__main__":
    # Not as __main__: workers have to find the classes of this file under the name by which they import it.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    importlib.import_module(os.path.splitext(os.path.basename(__file__))[0]).main()
