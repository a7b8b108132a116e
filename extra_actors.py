"""Tests for the section of actors.py in test_all.py. Without the change they came with, the hub died in five of them."""

def test_what_is_over_does_not_start_when_its_arguments_come(small):
    @small.remote
    def slow():
        time.sleep(0.3)
        return 1

    @small.remote
    def f(*values):
        return values

    @small.remote
    class Actor:
        def f(self, *values):
            return values

    late, actor = slow.remote(), Actor.remote()
    cancelled, killed = f.remote(late, small.put(2)), actor.f.remote(late, small.put(2))
    small.cancel(cancelled)
    small.kill(actor)                                           # the second argument of both is freed now
    with pytest.raises(small.exceptions.TaskCancelledError):
        small.get(cancelled, timeout=10)
    with pytest.raises(small.exceptions.ActorDiedError):
        small.get(killed, timeout=10)
    assert small.get(late, timeout=10) == 1 and small.get(f.remote(3), timeout=10) == (3,)


def test_a_long_chain_of_failures_ends_with_the_first_cause(small):
    @small.remote
    def fail():
        time.sleep(0.3)
        raise KeyError("lost")

    @small.remote
    def use(x):
        return x

    @small.remote
    class Actor:
        def use(self, x):
            return x

    actor = Actor.remote()
    for link in (use, actor.use):
        ref = fail.remote()
        for _ in range(1000):
            ref = link.remote(ref)
        with pytest.raises(KeyError, match="lost"):
            small.get(ref, timeout=30)
    assert small.get(use.remote(1), timeout=10) == 1


def test_a_cancelled_task_leaves_the_actors_that_it_made(small):
    @small.remote(num_cpus=4)
    class Actor:
        def f(self):
            return 1

    @small.remote
    def make():
        actor = Actor.options(name="waits for four CPUs", lifetime="detached").remote()
        while actor:
            time.sleep(0.01)

    def named():
        try:
            return small.get_actor("waits for four CPUs")
        except ValueError:
            return None

    ref = make.remote()
    eventually(named)
    actor = named()
    small.cancel(ref)
    with pytest.raises(small.exceptions.TaskCancelledError):
        small.get(ref, timeout=10)
    assert small.get(actor.f.remote(), timeout=10) == 1
    small.kill(actor)


def test_more_workers_than_the_soft_limit_of_descriptors():
    code = f"""
import resource, sys; sys.path.insert(0, {str(HERE)!r})
import actors as ray
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
ray.init(num_cpus=1)
@ray.remote
class Actor:
    def f(self): return 1
actors = [Actor.remote() for _ in range(40)]
print(sum(ray.get([actor.f.remote() for actor in actors])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "40\n", done.stderr


def test_a_worker_of_another_node_is_heard_to_the_end(cluster):
    """What it says and prints before it dies comes before the news of its death: both go through its node."""
    node = cluster.add_node(num_cpus=2)

    @small_ray.remote(num_cpus=0, scheduling_strategy=on(node))
    class Actor:
        def work(self):
            return os.getpid()

        def leave(self):
            small_ray.actor.exit_actor()

    for _ in range(10):
        actor = Actor.remote()
        refs, last = [actor.work.remote() for _ in range(50)], actor.leave.remote()
        assert len(set(small_ray.get(refs, timeout=20))) == 1
        with pytest.raises(small_ray.exceptions.ActorDiedError):
            small_ray.get(last, timeout=20)


def test_a_node_joins_by_command(cluster):
    command = [sys.executable, str(HERE / "actors.py"), "node", cluster.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as node:
        with node.stdin:
            node.stdin.write(cluster.key + "\n")
        try:
            assert node.stdout.readline() == "ready\n"
            eventually(lambda: len(small_ray.nodes()) == 2)
        finally:
            cluster.shutdown()                                  # the node ends when the hub does
        assert node.wait(10) == 0


def test_hello_in_pieces_is_heard(cluster):
    """64 bytes of proof that come one by one are as good as those that come at once; so is a config in pieces."""
    host, port = cluster.address.split(":")
    key = bytes.fromhex(cluster.key)
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        theirs, mine = sock.recv(32, socket.MSG_WAITALL), os.urandom(32)
        for byte in mine + small_ray._proof(key, b"client", theirs, mine):
            sock.sendall(bytes([byte]))
            time.sleep(0.001)
        assert sock.recv(32, socket.MSG_WAITALL) == small_ray._proof(key, b"hub", mine, theirs)
        config = small_ray.frame({"node": "f" * 56, "resources": {"CPU": 10_000}, "store": 1 << 20})
        for start in range(0, len(config), 20):
            sock.sendall(config[start:start + 20])
            time.sleep(0.001)
        eventually(lambda: "f" * 56 in [node["NodeID"] for node in small_ray.nodes()])
    eventually(lambda: len(small_ray.nodes()) == 1)
    assert small_ray.get(small_ray.remote(lambda: 1).remote(), timeout=20) == 1


def test_a_question_that_makes_no_sense_is_the_askers_problem(small):
    with pytest.raises(TypeError):
        small.get_actor(["no", "name"])
    assert small.get(small.remote(lambda: 1).remote(), timeout=10) == 1


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_in_whatever_order_all_comes_back(small, seed):
    """Two seconds of random calls, crashes, restarts, kills and cancels: the hub lives, and holds nothing afterwards."""
    dice = random.Random(seed)

    @small.remote
    def work(*values):
        time.sleep(0.005)
        return values[:1]

    @small.remote(num_returns=2)
    def large(*values):
        return np.ones(200_000), [small_ray.put(np.ones(100_000))]

    @small.remote(max_retries=1)
    def crash(*values):
        os._exit(1)

    @small.remote(num_cpus=0)
    def nested(values):
        return small_ray.get(work.remote(values[0]))

    @small.remote(max_restarts=1, max_task_retries=1)
    class Actor:
        def __init__(self, *values):
            self.values = values

        def call(self, *values):
            if not values:
                os._exit(1)
            return values

    full, refs, actors = small.available_resources(), [small.put(0)], [Actor.remote()]
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        ref, actor = dice.choice(refs), dice.choice(actors)
        action = dice.choice([
            lambda: refs.append(work.remote(ref, dice.choice(refs))), lambda: refs.extend(large.remote(ref)),
            lambda: refs.append(crash.remote(ref)), lambda: refs.append(nested.remote([ref])),
            lambda: refs.append(small.put([ref, np.ones(dice.choice([1, 100_000]))])),
            lambda: refs.append(actor.call.remote(ref)), lambda: refs.append(actor.call.remote()),
            lambda: actors.__setitem__(0, Actor.remote(ref)), lambda: actors.append(Actor.remote(ref)),
            lambda: actors.__setitem__(0, Actor.options(name=f"{seed}", get_if_exists=True).remote(ref)),
            lambda: small.kill(actor, no_restart=dice.random() < 0.5),
            lambda: small.cancel(ref, force=dice.random() < 0.5), lambda: small.get(ref, timeout=0.02)])
        try:
            action()
        except small.exceptions.RaySystemError:                 # the hub is gone
            raise
        except (small.exceptions.RayError, ValueError):
            pass
        del refs[:max(0, len(refs) - 40)], actors[:max(0, len(actors) - 3)]
    del ref, actor, action
    refs.clear(), actors.clear()
    eventually(lambda: gc.collect() >= 0 and small.get(nested.remote([0]), timeout=20) == (0,)
               and small.available_resources() == full)


def test_an_actor_that_is_there_needs_no_arguments(small):
    @small.remote
    class Actor:
        def __init__(self, value):
            self.value = value

        def get(self):
            return self.value

    actor = Actor.options(name="one", get_if_exists=True).remote(1)
    again = Actor.options(name="one", get_if_exists=True).remote(threading.Lock())
    assert again == actor and small.get(again.get.remote()) == 1
    with pytest.raises(TypeError, match="argument 0, of type lock"):
        Actor.options(name="two", get_if_exists=True).remote(threading.Lock())
    with pytest.raises(ValueError, match="two"):
        small.get_actor("two")
