"""Planners that die, hang, lie or are left alone: real processes, real signals.

Each fault must come out of `Planner.poll` as one line that names the cause, and the planner must
plan again without help; where the server dies, nothing of the planner may stay.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.limits import LIMIT, hard_limit  # noqa: F401 (a fixture of every test here)
from support.stand_ins import stand_in

from torch_eplb.planner import process, worker
from torch_eplb.planner.frames import DTYPES, Frame
from torch_eplb.planner.messages import Request, check_reply
from torch_eplb.planner.process import (
    Planner,
    PlannerFault,
    PlannerSettings,
    PlanReply,
    ReceivedPlan,
)
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

LAYERS, EXPERTS, RANKS, SLOTS = 2, 6, 4, 2
PLACEMENT = Placement.initial(LAYERS, EXPERTS, RANKS, SLOTS)
LOAD = np.random.default_rng(0).gamma(0.3, 100.0, size=(4, LAYERS, EXPERTS))


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Planner]]:
    """Make planners that restart quickly and are closed after the test."""
    monkeypatch.setattr(process, "BACKOFF_FIRST_SECONDS", 0.02)
    made: list[Planner] = []

    def make(policy: Any = "deepseek", **kwargs: Any) -> Planner:
        made.append(Planner(settings_for(policy), **kwargs))
        return made[-1]

    yield make
    for planner in made:
        planner.close()


def settings_for(policy: Any = "deepseek") -> PlannerSettings:
    return PlannerSettings(policy, {}, Topology(RANKS), (1000,) * LAYERS, 1000)


def wait_for(condition: Callable[[], Any], limit: float = 30.0) -> Any:
    """Look until the condition holds; what happens elsewhere can be waited for in no other way."""
    end = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError("it did not come about")
        time.sleep(0.002)
    return value


def ask(planner: Planner, request_id: int = 1) -> PlanReply | PlannerFault:
    """The answer, with its rounds looked through, as the ranks do."""
    planner.submit(request_id, LOAD, PLACEMENT)
    answer = wait_for(planner.poll)
    if isinstance(answer, ReceivedPlan):
        try:
            for _ in answer.unchecked:
                pass
        except ValueError as error:
            planner.refuse(request_id, str(error))
            return PlannerFault(request_id, f"answer refused: {error}")
    return answer


def ask_impatiently(planner: Planner, request_id: int = 1) -> PlanReply | PlannerFault:
    """Ask with a time limit that a planner which starts on a busy machine could not keep."""
    wait_for(lambda: (planner._host and not planner._host.busy) or planner.poll())
    patience, planner._timeout = planner._timeout, 0.5
    try:
        return ask(planner, request_id)
    finally:
        planner._timeout = patience


def plan_of(answer: Any) -> PlanReply:
    assert isinstance(answer, PlanReply), answer
    return answer


def fault_of(answer: Any) -> PlannerFault:
    assert isinstance(answer, PlannerFault), answer
    assert answer.cause.isprintable()
    assert len(answer.cause) <= 300
    return answer


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# -- policies that go wrong the first time they are asked -----------------------------------------

POLICIES = """
import ctypes, os, resource, signal, sys, threading, time
from pathlib import Path
import numpy as np
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan

def even(placement):
    counts = placement.replica_counts()
    experts = placement.experts
    layer = np.arange(len(experts))[:, None, None]
    return Plan(placement, 1.0 / counts[layer, experts], np.ones(len(experts)))

def changed(placement, **fields):
    plan = even(placement)
    given = dict(placement=plan.placement, split=plan.split, predicted_par=plan.predicted_par)
    return Plan(**{**given, **fields})

def die(placement): os.kill(os.getpid(), signal.SIGKILL)
def stop(placement): os.kill(os.getpid(), signal.SIGSTOP)
def loop(placement):
    while True: pass
def hold_the_gil(placement): sum(range(10**13))
def abort(placement):
    os.write(2, b"terminate called after throwing\\n")
    os.abort()
def crash(placement): ctypes.string_at(0)
def leave(placement):
    print("no more of this", file=sys.stderr)
    os._exit(3)
def close_all(placement): os.closerange(3, 64); time.sleep(1000)
def out_of_memory(placement):
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), before[1]))
    try: np.ones(1 << 30)
    finally: resource.setrlimit(resource.RLIMIT_AS, before)
def fail(placement): raise KeyError("several\\nlines \\x1b[31m of text" + "." * 10_000)
def leave_politely(placement): sys.exit("good bye")
def interrupt(placement): raise KeyboardInterrupt
def recurse(placement): return recurse(placement)
def nothing(placement): return None
def not_a_number(placement):
    return changed(placement, split=np.full(placement.experts.shape, np.nan))
def negative(placement):
    split = even(placement).split.copy()
    split[0, 0, 0] = -1.0
    return changed(placement, split=split)
def too_small(placement): return changed(placement, split=np.ones((1, 1, 1)))
def other_sizes(placement): return even(Placement.initial(1, placement.num_experts, 4, 2))
def uncovered(placement):
    return changed(placement, placement=Placement(placement.experts * 0, placement.num_experts))

def uncovered_array(placement): return placement.experts * 0

def once(what):
    flag = Path(__file__).with_name(f"{what.__name__}.done")
    def policy(load, placement, topology):
        if not flag.exists():
            flag.touch()
            return what(placement)
        return even(placement)
    policy.__qualname__ = f"once_{what.__name__}"
    globals()[policy.__qualname__] = policy

for what in [value for name, value in list(globals().items()) if callable(value)]:
    if getattr(what, "__module__", None) == __name__: once(what)
"""


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module above, as one that the child can import."""
    name = f"policies_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(POLICIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("die", "was killed by SIGKILL"),
        ("stop", "gave no answer within 0.5 s"),
        ("loop", "gave no answer within 0.5 s"),
        ("hold_the_gil", "gave no answer within 0.5 s"),
        ("abort", "was killed by SIGABRT: terminate called after throwing"),
        ("crash", "was killed by SIGSEGV"),
        ("leave", "exited with status 3: no more of this"),
        ("close_all", "planner process exited with status 0"),
    ],
)
def test_a_planner_that_ends_or_hangs_is_replaced(start, policies, what: str, cause: str) -> None:
    planner = start(getattr(policies, f"once_{what}"))
    pid = planner.pid
    fault = fault_of((ask_impatiently if "within" in cause else ask)(planner, 5))
    assert fault.request_id == 5
    assert cause in fault.cause
    plan_of(ask(planner, 6))
    assert planner.restarts == 1
    assert planner.pid != pid
    wait_for(lambda: plan_of(ask(planner, 7)) and not psutil.pid_exists(pid))


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("out_of_memory", "policy raised MemoryError: Unable to allocate"),
        ("fail", "policy raised KeyError: 'several\\nlines \\x1b[31m of text..."),
        ("leave_politely", "policy raised SystemExit: good bye"),
        ("interrupt", "policy raised KeyboardInterrupt"),
        ("recurse", "policy raised RecursionError"),
        ("nothing", "answer refused: "),
        ("not_a_number", "answer refused: "),
        ("negative", "answer refused: "),
        ("too_small", "answer refused: "),
        ("other_sizes", "answer refused: "),
        ("uncovered", "policy raised ValueError: layer 0: expert 1 has no slot on any rank"),
        ("uncovered_array", "answer refused: the policy's placement is wrong: layer 0: expert 1 "),
    ],
)
def test_a_policy_that_goes_wrong_costs_one_request_and_nothing_else(
    start, policies, what: str, cause: str
) -> None:
    planner = start(getattr(policies, f"once_{what}"))
    pid = planner.pid
    fault = fault_of(ask(planner, 5))
    assert fault.request_id == 5
    assert fault.cause.startswith(cause)
    plan_of(ask(planner, 6))
    assert planner.restarts == 0
    assert planner.pid == pid


def test_a_policy_in_a_thread_may_fail_or_hang_as_well(start) -> None:
    calls: list[int] = []
    release = worker.threading.Event()

    def policy(load: Any, placement: Placement, topology: Topology) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("no")
        release.wait(LIMIT)

    planner = start(policy, timeout=0.5)
    assert fault_of(ask(planner, 1)).cause == "policy raised ValueError: no"
    assert planner.restarts == 0
    fault = fault_of(ask(planner, 2))
    assert fault == PlannerFault(2, "policy gave no answer within 0.5 s")
    release.set()
    assert "answer refused" in fault_of(ask(planner, 3)).cause
    assert planner.restarts == 1


# -- signals from outside -------------------------------------------------------------------------


def test_a_planner_killed_while_idle_is_replaced(start) -> None:
    planner = start()
    plan_of(ask(planner))
    os.kill(planner.pid, signal.SIGKILL)
    fault = fault_of(wait_for(planner.poll))
    assert fault.request_id is None
    assert "SIGKILL" in fault.cause
    assert planner.pid is None
    plan_of(ask(planner, 2))
    assert planner.restarts == 1


def test_a_planner_stopped_while_idle_is_replaced_at_the_next_request(start) -> None:
    planner = start()
    plan_of(ask(planner))
    pid = planner.pid
    os.kill(pid, signal.SIGSTOP)
    cause = "planner process gave no answer within 0.5 s"
    assert fault_of(ask_impatiently(planner, 2)) == PlannerFault(2, cause)
    wait_for(lambda: plan_of(ask(planner, 3)) and not psutil.pid_exists(pid))


def test_a_request_too_large_for_a_stopped_planners_socket_does_not_block(start) -> None:
    planner = start()
    plan_of(ask(planner))
    os.kill(planner.pid, signal.SIGSTOP)
    planner._timeout = 0.5
    planner.submit(2, np.repeat(LOAD, 50_000, axis=0), PLACEMENT)
    assert "gave no answer" in fault_of(wait_for(planner.poll)).cause
    planner._timeout = 60.0
    plan_of(ask(planner, 3))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGCONT, signal.SIGPIPE])
def test_harmless_signals_do_not_disturb_the_planner(start, number: int) -> None:
    planner = start()
    plan_of(ask(planner))
    pid = planner.pid
    os.kill(pid, number)
    plan_of(ask(planner, 2))
    assert planner.pid == pid


def test_closing_ends_a_stopped_planner(start) -> None:
    planner = start()
    child = psutil.Process(planner.pid)
    child.suspend()
    planner.close()
    assert not child.is_running()


# -- stand-ins that answer garbage ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("sock.sendall(b'HTTP/1.1 400 Bad Request' * 10)", "no frame starts with"),
        ("ready(); receive(); sock.sendall(os.urandom(1 << 20))", "no frame starts with"),
        ("send(Frame(Kind.READY, {}, {'a': np.zeros(9)}))", "a body of 72 bytes (limit 0)"),
        ("send(Frame(Kind.REPLY, {}))", "kind 4 does not belong here"),
        ("ready(); receive(); ready()", "kind 2 does not belong here"),
        ("ready(); receive(); send(Frame(Kind.REPLY, {}))", "an answer to request None, not to 1"),
        ("ready(); reply(request_id=2)", "an answer to request 2, not to 1"),
        ("ready(); reply(request_id=True)", "an answer to request True, not to 1"),
        ("ready(); reply(plan_for=2)", "a plan for request 2, not for 1"),
        ("ready(); reply(plan_seconds=-1.0)", "plan_seconds -1.0 is not a duration"),
        ("ready(); reply(plan_seconds=np.nan)", "plan_seconds nan is not a duration"),
        ("ready(); reply(split=np.zeros(1 << 20))", "(limit "),
        ("ready(); reply(lambda words: None)", "an answer without plan"),
        ("ready(); reply(lambda words: words.astype('i4'))", "plan must be <i8 of one dimension"),
        ("ready(); reply(lambda words: words[None])", "plan must be <i8 of one dimension"),
        ("ready(); reply(lambda words: words[:36])", "an array of 36 integers is no plan for"),
        ("ready(); reply(magic=7)", "integers is no plan for"),
        ("ready(); reply(split=np.full((2, 4, 2), np.nan))", "has the share nan"),
        ("ready(); reply(split=np.full((2, 4, 2), 1e300))", "the shares of expert 0 sum to"),
        ("ready(); reply(split=np.zeros((2, 4, 2), int))", "expert 0 sum to 0.0, not to 1"),
        ("ready(); reply(predicted_par=np.zeros(3))", "not a schedule"),
        ("ready(); reply(predicted_par=np.full(2, np.nan))", "layer 0: predicted_par is nan"),
        ("ready(); reply(placement=np.zeros((2, 4, 2), 'i4'))", "expert 1 has no slot"),
        (
            "ready(); reply(placement=np.full((2, 4, 2), 1 << 62))",
            "is not one of the 6 experts",
        ),
        ("ready(); reply(placement=np.full((2, 4, 2), -1, 'i4'))", "is not one of the 6 experts"),
        ("ready(); reply(schedule=np.arange(99))", "not a schedule"),
        ("ready(); reply(schedule=[])", "not a schedule"),
        (
            "ready(); reply(schedule=np.array([0x65706C62, 1 << 62]))",
            "answer refused: a schedule of 4611686018427387904 rounds cannot have 2 numbers",
        ),
        ("ready(); reply(lambda words: words[:-1])", "the schedule is cut or too long"),
        ("ready(); reply_with_rounds(lambda r: r[:-1])", "refused: after the last round layer"),
        ("ready(); reply_with_rounds(lambda r: r[1:])", "answer refused: round 0"),
        ("ready(); reply_with_rounds(in_one)", "answer refused: round 0"),
        (
            "ready(); reply_for_other(staging_bytes=9000, direct=False)",
            "bytes, the staging has 1000",
        ),
        (
            "ready(); reply_for_other(layers_per_round=2)",
            "touches 2 layers, layers_per_round is 1",
        ),
        ("ready(); reply_with_rounds(lambda r: r + r)", "answer refused: round "),
        ("receive(); os.close(sock.fileno())", "planner process closed its channel"),
        ("print('bad luck'); sys.exit(4)", "exited with status 4: bad luck"),
        ("raise ImportError('no numpy here')", "exited with status 1: ImportError: no numpy here"),
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("ready()", "planner process gave no answer within 0.5 s"),
    ],
)
def test_garbage_from_the_planner_is_a_fault_and_never_an_exception(
    start, source: str, cause: str
) -> None:
    planner = start(_command=stand_in(source))
    pid = planner.pid
    fault = fault_of((ask_impatiently if "within" in cause else ask)(planner, 1))
    assert cause in fault.cause
    assert fault.request_id == 1
    assert planner.pid is None
    wait_for(lambda: is_gone(pid))
    planner._command = None  # the next one is a real one
    plan_of(ask(planner, 2))
    assert planner.restarts == 1


def test_a_planner_that_never_gets_ready_is_a_fault_even_without_a_request(start) -> None:
    planner = start(timeout=0.5, _command=stand_in("pass"))
    fault = fault_of(wait_for(planner.poll))
    assert fault == PlannerFault(None, "planner process did not get ready within 0.5 s")


def test_an_unasked_answer_is_a_fault_that_concerns_no_request(start) -> None:
    source = "ready(); send(Frame(Kind.ERROR, {'request_id': 1, 'cause': 'x'}))"
    planner = start(_command=stand_in(source))
    fault = fault_of(wait_for(planner.poll))
    assert fault == PlannerFault(None, "answer refused: a frame of kind 5 does not belong here")


def test_a_cause_cannot_write_to_the_terminal_or_flood_the_log(start) -> None:
    text = "'\\x1b]0;owned\\x07\\r\\n' + 'x' * 50_000"
    source = f"ready(); receive(); send(Frame(Kind.ERROR, {{'request_id': 1, 'cause': {text}}}))"
    fault = fault_of(ask(start(_command=stand_in(source))))
    assert fault.cause.startswith("]0;owned xxx")


def test_a_pickle_is_refused_and_not_loaded(start, tmp_path: Path) -> None:
    trace = tmp_path / "it was loaded"
    source = f"""
        import pickle
        class Evil:
            def __reduce__(self): return (open, ({str(trace)!r}, "w"))
        evil = pickle.dumps(Evil())
        ready(); receive()
        header = b'{{"fields": {{}}, "arrays": [["split", "|O", [1]]]}}'
        prefix = b"EPLB" + bytes([1, Kind.REPLY, 0, 0])
        prefix += len(header).to_bytes(4, "little") + len(evil).to_bytes(8, "little")
        sock.sendall(EVIL)
    """
    bare = start(_command=stand_in(source.replace("EVIL", "evil")))
    assert "no frame starts with" in fault_of(ask(bare)).cause
    framed = start(_command=stand_in(source.replace("EVIL", "prefix + header + evil")))
    assert "type '|O' is not one" in fault_of(ask(framed)).cause
    assert not trace.exists()


def test_a_planner_that_cannot_be_started_is_a_fault_of_every_attempt(start) -> None:
    planner = start(_command=lambda fd: ["/nonexistent/python", str(fd)])
    assert "could not be started" in fault_of(wait_for(planner.poll)).cause
    for request_id in range(3):
        fault = fault_of(ask(planner, request_id))
        assert fault.request_id == request_id
        assert "could not be started" in fault.cause
    assert planner.restarts >= 3
    planner._command = None
    plan_of(ask(planner, 9))


def test_the_pause_before_a_restart_grows_with_each_fault_and_shrinks_after_a_plan(start) -> None:
    planner = start(_command=lambda fd: ["/nonexistent/python", str(fd)])
    for _ in range(3):
        fault_of(wait_for(planner.poll))
    assert planner._failures == 3
    planner._command = None
    plan_of(ask(planner, 9))
    assert planner._failures == 0


def test_the_pause_grows_when_plans_arrive_and_are_refused(start) -> None:
    wrong = stand_in("ready(); reply_with_rounds(lambda rounds: rounds[:-1])")
    planner = start(_command=wrong)
    for failures in (1, 2, 3):
        assert "after the last round" in fault_of(ask(planner, failures)).cause
        assert planner._failures == failures
    planner._command = None
    plan_of(ask(planner, 9))
    plan_of(ask(planner, 10))
    planner.refuse(10, "it is wrong")
    assert planner._failures == 1
    assert planner.restarts == 3


def test_only_the_last_plan_can_be_refused_and_only_once(start) -> None:
    planner = start()
    planner.refuse(1, "there is none")
    plan_of(ask(planner, 1))
    planner.refuse(2, "it was never asked for")
    pid = planner.pid
    plan_of(ask(planner, 2))
    assert planner.pid == pid
    planner.refuse(2, "it is wrong")
    assert planner.pid is None
    planner.refuse(2, "it is wrong")
    plan_of(ask(planner, 3))
    assert planner.restarts == 1
    # The next one has been asked already, and gets its answer: this fault.
    planner.submit(4, LOAD, PLACEMENT)
    planner.refuse(3, "it is \x07wrong")
    assert planner.poll() == PlannerFault(4, "answer refused: it is wrong")
    plan_of(ask(planner, 5))
    assert planner.restarts == 2


def test_a_plan_of_a_policy_in_a_thread_can_be_refused_as_well(start) -> None:
    planner = start(lambda load, placement, topology: placement)
    plan_of(ask(planner, 1))
    planner.refuse(1, "it is wrong")
    plan_of(ask(planner, 2))
    assert planner.restarts == 1


def test_answers_with_flipped_bytes_are_faults_or_harmless(start) -> None:
    flip = """
        import random
        chance = random.Random(time.time_ns())
        ready()
        raw = bytearray(b"".join(encode(answer(*receive()).to_frame())))
        for _ in range(chance.choice([1, 1, 3, 30])):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        sock.sendall(raw)
    """
    planner = start(_command=stand_in(flip))
    outcomes = set()
    for request_id in range(12):
        planner._failures = 0
        answered = ask_impatiently(planner, request_id)
        outcomes.add(type(answered))
        if isinstance(answered, PlanReply):
            assert answered.schedule.placements()[-1:] in ([], [answered.plan.placement])
    assert PlannerFault in outcomes


REQUEST = Request(1, LOAD, PLACEMENT)
SIZE = PLACEMENT.experts.size


@settings(max_examples=200)
@given(st.data())
def test_no_array_that_a_planner_may_send_gets_past_the_check_unless_it_is_a_plan(data) -> None:
    honest = plan_of(worker.answer(settings_for(), REQUEST))
    frame = honest.to_frame()
    words = np.array(frame.arrays["plan"])
    ends = [0, 3, 3 + SIZE, 3 + 2 * SIZE, 3 + 2 * SIZE + LAYERS, len(words)]
    part = data.draw(st.integers(0, 4))  # head, placement, split, predicted PAR, rounds
    number: Any = st.integers(-(1 << 62), 1 << 62) | st.integers(-2, 9)
    if part in (2, 3):
        number |= (st.floats() | st.floats(-2, 2)).map(lambda value: np.float64(value).view(int))
    for _ in range(data.draw(st.integers(1, 3))):
        words[data.draw(st.integers(ends[part], ends[part + 1] - 1))] = data.draw(number)
    if data.draw(st.booleans()):
        words = words[: data.draw(st.integers(0, len(words)))]
    array: Any = words
    if data.draw(st.sampled_from([False] * 9 + [True])):
        with np.errstate(all="ignore"):
            array = words.astype(data.draw(st.sampled_from(DTYPES)))
    changed = Frame(frame.kind, frame.fields, {"plan": array})
    try:
        accepted = check_reply(changed, REQUEST, settings_for())
        assert isinstance(accepted, ReceivedPlan)
        for _ in accepted.unchecked:
            pass
    except ValueError:
        return  # a refusal
    plan = accepted.plan
    assert np.isfinite(plan.split).all()
    assert np.isfinite(plan.predicted_par).all()
    assert accepted.schedule.target == plan.placement
    assert accepted.schedule.placements()[-1:] in ([], [plan.placement])


# -- the server's end -----------------------------------------------------------------------------

SERVER = """
import os, signal, sys, threading, time
import numpy as np
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology
from torch_eplb.planner.process import Planner, PlannerSettings
import {module} as policies

# A shell that starts the tests in the background has its children ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

def serve():
    global planner
    policy = {policy}
    planner = Planner(PlannerSettings(policy, {{}}, Topology(2), (8,), 8))
    while not planner._host._ready:
        planner.poll()
        time.sleep(0.002)
    if callable(policy):
        planner.submit(1, np.ones((1, 1, 4)), Placement.initial(1, 4, 2, 2))
        while planner._host._writer.pending:
            planner.poll()
{then}
"""


@contextlib.contextmanager
def server(tmp_path: Path, policies: Any, policy: str, then: str) -> Iterator[subprocess.Popen]:
    """A program in a session of its own that prints its planner's process id."""
    source = SERVER.format(module=policies.__name__, policy=policy, then=textwrap.dedent(then))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    program = subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
            "TMPDIR": str(temporary),
            "OMP_NUM_THREADS": "1",
        },
    )
    with program:
        try:
            yield program
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    assert list(temporary.iterdir()) == []


MAIN = "serve(); print(planner.pid, flush=True); time.sleep(1000)"
THREAD = """
thread = threading.Thread(target=serve)
thread.start()
thread.join()
print(planner.pid, flush=True)
time.sleep(1000)
"""
FORKED = """
serve()
child = os.fork()
if child == 0:
    time.sleep(1000)
print(planner.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("policy", "then"),
    [
        ("'static'", MAIN),
        ("policies.once_loop", MAIN),
        ("policies.once_hold_the_gil", MAIN),
        ("policies.once_stop", MAIN),
        ("'static'", THREAD),
        ("policies.once_loop", THREAD),
        ("'static'", FORKED),
    ],
)
def test_the_planner_is_gone_within_two_seconds_of_its_servers_end(
    tmp_path: Path, policies: Any, policy: str, then: str
) -> None:
    with server(tmp_path, policies, policy, then) as program:
        pid = int(program.stdout.readline())
        planner = psutil.Process(pid)
        wait_for(lambda: planner.open_files() == [])  # it may still be importing the policy
        assert not any(entry.path.startswith("/dev/shm") for entry in planner.memory_maps())
        os.kill(program.pid, signal.SIGKILL)
        wait_for(lambda: is_gone(pid), limit=2.0)
        if then is not FORKED:  # whose child holds the pipe
            assert program.stderr.read() == ""


CATCH = """
try:
    serve()
    print(planner.pid, flush=True)
    time.sleep(1000)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("policy", ["'static'", "policies.once_loop"])
def test_a_ctrl_c_gives_no_word_from_the_planner(
    tmp_path: Path, policies: Any, policy: str
) -> None:
    with server(tmp_path, policies, policy, CATCH) as program:
        pid = int(program.stdout.readline())
        os.killpg(program.pid, signal.SIGINT)
        printed, errors = program.communicate(timeout=20)
        assert (printed, errors) == ("interrupted\n", "")
        wait_for(lambda: is_gone(pid), limit=2.0)


def test_a_ctrl_c_that_the_server_survives_does_not_end_the_planner(
    tmp_path: Path, policies: Any
) -> None:
    then = """
        signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
        serve()
        print(planner.pid, flush=True)
        time.sleep(1000)
    """
    with server(tmp_path, policies, "'static'", then) as program:
        pid = int(program.stdout.readline())
        os.killpg(program.pid, signal.SIGINT)
        assert program.stdout.readline() == "interrupted\n"
        assert not is_gone(pid)


def test_a_sigterm_to_the_group_ends_both_without_a_word(tmp_path: Path, policies: Any) -> None:
    with server(tmp_path, policies, "policies.once_loop", MAIN) as program:
        pid = int(program.stdout.readline())
        os.killpg(program.pid, signal.SIGTERM)
        assert program.communicate(timeout=20) == ("", "")
        assert program.returncode == -signal.SIGTERM
        wait_for(lambda: is_gone(pid), limit=2.0)
