"""The planner as the serving process sees it, with real child interpreters."""

from __future__ import annotations

import gc
import importlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support.forks import in_fork
from support.limits import LIMIT, hard_limit  # noqa: F401 (a fixture of every test here)

import torch_eplb
from torch_eplb.planner import worker
from torch_eplb.planner.messages import Request
from torch_eplb.planner.process import (
    Planner,
    PlannerFault,
    PlannerSettings,
    PlanReply,
    pause_before_restart,
)
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan, Topology

LAYERS, EXPERTS, RANKS, SLOTS = 3, 8, 4, 3
PLACEMENT = Placement.initial(LAYERS, EXPERTS, RANKS, SLOTS)
LOAD = np.random.default_rng(0).gamma(0.3, 100.0, size=(4, LAYERS, EXPERTS))


def settings_for(policy: str | Callable[..., Any] = "deepseek", **changes: Any) -> PlannerSettings:
    given: dict[str, Any] = {
        "policy_options": {},
        "topology": Topology(RANKS),
        "expert_bytes": (1000,) * LAYERS,
        "staging_bytes": 1000,
    }
    return PlannerSettings(policy, **{**given, **changes})


@pytest.fixture
def start() -> Iterator[Callable[..., Planner]]:
    """Make planners that are closed after the test."""
    made: list[Planner] = []

    def make(policy: str | Callable[..., Any] = "deepseek", **kwargs: Any) -> Planner:
        made.append(Planner(settings_for(policy), **kwargs))
        return made[-1]

    yield make
    for planner in made:
        planner.close()


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Write a module that other interpreters can import, and import it."""

    def make(source: str) -> Any:
        name = f"policies_{uuid.uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(tmp_path))
        return importlib.import_module(name)

    return make


def wait_for(condition: Callable[[], Any], limit: float = 30.0) -> Any:
    """Look until the condition holds; what happens elsewhere can be waited for in no other way."""
    end = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError("it did not come about")
        time.sleep(0.002)
    return value


def ask(planner: Planner, request_id: int = 1, load: Any = LOAD) -> PlanReply | PlannerFault:
    planner.submit(request_id, load, PLACEMENT)
    return wait_for(planner.poll)


def plan_of(answer: Any) -> PlanReply:
    assert isinstance(answer, PlanReply), answer
    return answer


def cause_of(answer: Any) -> str:
    assert isinstance(answer, PlannerFault), answer
    return answer.cause


def run_python(*args: str, cwd: Path, stdin: str | None = None, **env: str) -> str:
    """Run a program as a user would; nothing may be printed to its stderr."""
    done = subprocess.run(
        [sys.executable, *args],
        input=stdin,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=LIMIT / 2,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


# -- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["deepseek", "flow", "static"])
def test_a_plan_from_the_process_is_the_plan_that_the_policy_makes(start, policy: str) -> None:
    planner = start(policy)
    reply = plan_of(ask(planner, 7))
    assert reply.request_id == 7
    assert reply.plan_seconds >= 0
    here = worker.answer(settings_for(policy), Request(7, LOAD, PLACEMENT))
    assert isinstance(here, PlanReply)
    assert reply.plan.placement == here.plan.placement
    np.testing.assert_array_equal(reply.plan.split, here.plan.split)
    np.testing.assert_array_equal(reply.plan.predicted_par, here.plan.predicted_par)
    np.testing.assert_array_equal(reply.schedule.to_array(), here.schedule.to_array())


def test_the_schedule_leads_from_the_present_placement_to_the_planned_one(start) -> None:
    reply = plan_of(ask(start("deepseek")))
    assert reply.schedule.start == PLACEMENT
    assert reply.schedule.placements()[-1] == reply.plan.placement


def test_shares_stay_with_their_expert_when_the_schedule_chooses_other_slots() -> None:
    planned = Placement(np.array([[[2, 0, 1], [2, 3, 0]]]), 4)
    split = np.array([[[0.9, 0.4, 1.0], [0.1, 1.0, 0.6]]])
    target = Placement(np.array([[[0, 1, 2], [0, 2, 3]]]), 4)
    moved = worker._in_slots_of(target, Plan(planned, split, np.ones(1)))
    assert moved.placement == target
    assert moved.split.tolist() == [[[0.4, 1.0, 0.9], [0.6, 0.1, 1.0]]]


def test_a_load_larger_than_the_socket_travels_while_the_server_goes_on(start) -> None:
    load = np.random.default_rng(1).gamma(0.3, 100.0, size=(4_000, LAYERS, EXPERTS))
    planner = start("static")
    planner.submit(1, load, PLACEMENT)
    looks = 0
    while (reply := planner.poll()) is None:
        looks += 1
    assert isinstance(reply, PlanReply)
    assert looks > 2


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", "float32", ">f8", "float16"])
def test_load_may_be_counted_in_any_type_of_number(start, dtype: str) -> None:
    plan_of(ask(start("static"), load=(LOAD % 100).astype(dtype)))


def test_a_load_that_changes_after_it_was_submitted_is_planned_as_it_was(start) -> None:
    planner = start("deepseek")
    load = LOAD.copy()
    planner.submit(1, load, PLACEMENT)
    load[:] = 1.0
    reply = wait_for(planner.poll)
    fresh = ask(planner, 2)
    np.testing.assert_array_equal(reply.plan.split, fresh.plan.split)


def test_only_the_latest_request_is_answered(start) -> None:
    planner = start("static")
    for request_id in range(5):
        planner.submit(request_id, LOAD, PLACEMENT)
    assert wait_for(planner.poll).request_id == 4
    assert ask(planner, 5).request_id == 5


# -- where policies run -------------------------------------------------------------------------


def test_an_importable_policy_runs_in_the_child(start, importable) -> None:
    module = importable("""
        import os
        class Policies:
            @staticmethod
            def tell(load, placement, topology):
                raise RuntimeError(f"pid {os.getpid()}")
    """)
    planner = start(module.Policies.tell)
    assert cause_of(ask(planner)) == f"policy raised RuntimeError: pid {planner.pid}"
    assert planner.pid != os.getpid()


THEIRS = """
    import os, sys
    class Algorithm:
        @classmethod
        def rebalance_experts(cls, weight, replicas, groups, nodes, gpus, *, factor):
            assert "torch" not in sys.modules
            raise RuntimeError(f"pid {os.getpid()}, {factor}, {weight.dtype}, {replicas, gpus}")
"""


def test_an_importable_function_with_deepseeks_signature_runs_in_the_child(
    start, importable
) -> None:
    theirs = importable(THEIRS).Algorithm.rebalance_experts
    planner = start(torch_eplb.from_rebalance_experts(theirs, factor=[1, "2"]))
    cause = cause_of(ask(planner))
    assert cause == f"policy raised RuntimeError: pid {planner.pid}, [1, '2'], float64, (12, 4)"
    assert planner.pid != os.getpid()


def test_a_function_with_deepseeks_signature_and_what_json_cannot_say_runs_in_a_thread(
    start, importable
) -> None:
    theirs = importable(THEIRS.replace("assert", "#")).Algorithm.rebalance_experts
    planner = start(torch_eplb.from_rebalance_experts(theirs, factor=1j))
    assert planner.pid is None
    assert f"pid {os.getpid()}, 1j, float64" in cause_of(ask(planner))


def test_a_function_that_wants_tensors_gets_them_in_the_child(start, importable) -> None:
    module = importable("""
        import os
        import torch
        def rebalance_experts(weight: torch.Tensor, num_replicas, groups, nodes, gpus):
            order = weight.sort(-1, descending=True).indices
            phy2log = torch.cat((order, order[:, : num_replicas - order.shape[1]]), dim=1)
            return phy2log, None, torch.tensor(os.getpid())
    """)
    planner = start(torch_eplb.from_rebalance_experts(module.rebalance_experts))
    plan = plan_of(ask(planner)).plan
    assert planner.pid is not None
    hottest = np.sort(np.argsort(-LOAD.mean(axis=0), axis=1)[:, :4], axis=1)
    for layer, counts in enumerate(plan.placement.replica_counts()):
        assert np.flatnonzero(counts == 2).tolist() == hottest[layer].tolist()


def test_a_closure_runs_in_a_thread_of_this_process(start) -> None:
    seen: list[str] = []

    def stay(load: Any, placement: Placement, topology: Topology) -> Plan:
        seen.append(threading.current_thread().name)
        raise RuntimeError(f"pid {os.getpid()}")

    planner = start(stay)
    assert planner.pid is None
    assert cause_of(ask(planner)) == f"policy raised RuntimeError: pid {os.getpid()}"
    assert seen == ["torch_eplb-planner"]


def test_a_policy_that_the_child_cannot_import_is_named(start, importable) -> None:
    module = importable("def policy(load, placement, topology): pass")
    Path(module.__file__).unlink()
    planner = start(module.policy)
    assert "policy could not be imported: ModuleNotFoundError" in cause_of(ask(planner))
    assert planner.restarts == 0


PROGRAM = """
import os, sys, time
print("main runs as", __name__)
{path}
import numpy as np
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology
from torch_eplb.planner.process import Planner, PlannerSettings, PlanReply
planner = Planner(PlannerSettings({policy}, {{}}, Topology(2), (8,), 8))
planner.submit(3, np.ones((1, 1, 4)), Placement.initial(1, 4, 2, 2))
end = time.monotonic() + 20
while (answer := planner.poll()) is None and time.monotonic() < end:
    time.sleep(0.002)
print(type(answer).__name__, getattr(answer, "cause", ""), planner.pid is None)
"""


@pytest.mark.parametrize("way", ["script", "-c", "-", "-m", "interactive"])
def test_it_works_from_programs_without_a_main_guard(tmp_path: Path, way: str) -> None:
    program = PROGRAM.format(path="", policy="'static'")
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "json.py").write_text("raise ImportError('a file of the user was taken for json')")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if way == "script":
        (tmp_path / "json.py").unlink()
        printed = run_python("program.py", cwd=tmp_path)
    elif way == "-c":
        printed = run_python("-c", program, cwd=elsewhere)
    elif way == "-":
        printed = run_python("-", cwd=elsewhere, stdin=program)
    elif way == "-m":
        (tmp_path / "json.py").unlink()
        printed = run_python("-m", "program", cwd=tmp_path)
    else:  # as in a notebook: __main__ has no file, and statements come one by one
        shell = f"import code; code.InteractiveInterpreter().runsource({program!r}, '', 'exec')"
        printed = run_python("-c", shell, cwd=elsewhere)
    name = "__console__" if way == "interactive" else "__main__"
    assert printed == f"main runs as {name}\nReceivedPlan  False\n"


def test_a_policy_of_the_main_program_runs_in_a_thread(tmp_path: Path) -> None:
    policy = "lambda load, placement, topology: 1 / 0"
    printed = run_python("-c", PROGRAM.format(path="", policy=policy), cwd=tmp_path)
    fault = "PlannerFault policy raised ZeroDivisionError: division by zero True"
    assert printed == f"main runs as __main__\n{fault}\n"


def test_the_child_finds_a_package_that_is_only_on_the_parents_path(tmp_path: Path) -> None:
    source = Path(torch_eplb.__file__).parent
    shutil.copytree(source, tmp_path / "copy" / "torch_eplb")
    (tmp_path / "copy" / "where.py").write_text(
        "import torch_eplb\n"
        "def policy(load, placement, topology): raise OSError(torch_eplb.__file__)"
    )
    path = f"sys.path.insert(0, {str(tmp_path / 'copy')!r}); import where"
    printed = run_python("-c", PROGRAM.format(path=path, policy="where.policy"), cwd=tmp_path)
    assert f"policy raised OSError: {tmp_path}/copy/torch_eplb/__init__.py False" in printed


# -- the child as a neighbour ------------------------------------------------------------------


def test_the_child_is_small_single_threaded_and_of_low_priority(start) -> None:
    planner = start("deepseek")
    plan_of(ask(planner))
    child = psutil.Process(planner.pid)
    assert child.memory_info().rss < 80 << 20
    assert child.num_threads() == 2  # the one that plans and the one that watches the parent
    assert child.nice() == min(19, psutil.Process().nice() + worker.NICENESS)
    assert os.getpgid(child.pid) == child.pid
    mapped = [entry.path for entry in child.memory_maps()]
    assert any("/numpy/" in path for path in mapped)
    assert not any("/torch/" in path or "/scipy/" in path for path in mapped)


def test_the_channel_does_not_leak_into_other_children(start) -> None:
    planner = start("static")
    show = """if True:
        import contextlib, os
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                print(os.readlink(f"/proc/self/fd/{fd}"))
    """
    ours = {os.readlink(f"/proc/self/fd/{fd}") for fd in channel_of(planner)}
    seen = subprocess.run(
        [sys.executable, "-c", show], close_fds=False, capture_output=True, text=True, timeout=20
    )
    assert len(ours) == 2
    assert not ours & set(seen.stdout.splitlines())


def channel_of(planner: Planner) -> list[int]:
    host: Any = planner._host
    return [host._socket.fileno(), host._output]


def test_the_child_listens_nowhere(start) -> None:
    planner = start("static")
    ask(planner)
    for kind in ("inet", "unix"):
        for connection in psutil.Process(planner.pid).net_connections(kind):
            assert connection.status in (psutil.CONN_NONE, psutil.CONN_ESTABLISHED)
            assert not connection.laddr


def test_what_a_policy_prints_neither_blocks_it_nor_appears(start, importable, capfd) -> None:
    module = importable("""
        import sys
        def policy(load, placement, topology):
            print("x" * 500_000)
            print("y" * 500_000, file=sys.stderr)
            raise ValueError("all printed")
    """)
    assert cause_of(ask(start(module.policy))) == "policy raised ValueError: all printed"
    assert capfd.readouterr() == ("", "")


def test_a_planner_outlives_the_thread_that_started_it(start) -> None:
    made: list[Planner] = []
    thread = threading.Thread(target=lambda: made.append(start("static")))
    thread.start()
    thread.join()
    pid = made[0].pid
    plan_of(ask(made[0]))
    assert made[0].pid == pid


# -- forks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["static", lambda *_: None])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_neither_uses_nor_ends_its_parents_planner(start, policy) -> None:
    planner = start(policy)
    ask(planner)
    pid = planner.pid

    def use() -> None:
        assert planner.poll() is None
        planner.submit(2, LOAD, PLACEMENT)
        fault = planner.poll()
        assert isinstance(fault, PlannerFault)
        assert fault.request_id == 2
        assert "forked" in fault.cause
        assert planner.poll() is None
        assert planner.pid is None
        planner._finalizer()
        planner.close()
        gc.collect()

    in_fork(use)
    assert planner.pid == pid
    assert ask(planner, 3).request_id == 3
    assert planner.restarts == 0


# -- the end ------------------------------------------------------------------------------------


def test_close_ends_the_child_and_may_be_repeated(start) -> None:
    planner = start("static")
    child = psutil.Process(planner.pid)
    planner.close()
    planner.close()
    assert not child.is_running()
    assert planner.pid is None
    assert planner.poll() is None
    with pytest.raises(RuntimeError, match="closed"):
        planner.submit(1, LOAD, PLACEMENT)


def test_a_planner_that_is_forgotten_ends(start) -> None:
    planner = Planner(settings_for("static"))
    child = psutil.Process(planner.pid)
    ask(planner)
    del planner
    gc.collect()
    assert not child.is_running()


def test_the_child_ends_with_an_interpreter_that_exits_without_close(tmp_path: Path) -> None:
    program = PROGRAM.format(path="", policy="'static'") + "\nprint(planner.pid)"
    pid = int(run_python("-c", program, cwd=tmp_path).splitlines()[-1])
    assert not psutil.pid_exists(pid)


def test_a_hundred_planners_leave_nothing_behind() -> None:
    def level() -> tuple[int, int, int]:
        process = psutil.Process()
        return len(os.listdir("/proc/self/fd")), process.num_threads(), len(process.children())

    ask_and_close = Planner(settings_for("static"))
    ask(ask_and_close)
    ask_and_close.close()
    before = level()
    for n in range(100):
        planner = Planner(settings_for("static"))
        if n % 10 == 0:
            ask(planner)
        if n % 2:
            planner.close()
        del planner
    gc.collect()
    wait_for(lambda: level() == before)


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "error", "says"),
    [
        (np.full_like(LOAD, np.nan), ValueError, "finite"),
        (np.full_like(LOAD, np.inf), ValueError, "finite"),
        (-LOAD, ValueError, "at least 0"),
        (LOAD[0], ValueError, "shape"),
        (LOAD[:0], ValueError, "shape"),
        (LOAD[:, :, :-1], ValueError, "shape"),
        (LOAD.astype(complex), TypeError, "complex"),
        (np.full(LOAD.shape, "x"), TypeError, "numbers"),
    ],
)
def test_a_load_that_cannot_be_planned_is_refused_at_the_call(start, load, error, says) -> None:
    planner = start("static")
    with pytest.raises(error, match=says):
        planner.submit(1, load, PLACEMENT)
    plan_of(ask(planner))


def test_a_placement_of_another_size_is_refused_at_the_call(start) -> None:
    other = Placement.initial(LAYERS, EXPERTS, 2, 6)
    with pytest.raises(ValueError, match="placement has 2 ranks and 3 layers"):
        start("static").submit(1, LOAD, other)


@pytest.mark.parametrize(
    ("policy", "changes", "says"),
    [
        ("no such policy", {}, "no such policy"),
        ("deepseek", {"expert_bytes": ()}, "expert_bytes"),
        ("deepseek", {"expert_bytes": (0, 1, 1)}, "expert_bytes"),
        ("deepseek", {"staging_bytes": -1}, "staging_bytes"),
        ("deepseek", {"layers_per_round": 0}, "layers_per_round"),
        ("deepseek", {"send_bytes_per_round": 0.5}, "send_bytes_per_round"),
    ],
)
def test_settings_that_cannot_work_are_refused_where_they_are_made(policy, changes, says) -> None:
    with pytest.raises(ValueError, match=says):
        settings_for(policy, **changes)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_must_be_positive(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        Planner(settings_for(), timeout=timeout)


def test_every_claim_of_the_security_page_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    claimed = re.findall(r"`(test_\w+)`", (root / "SECURITY.md").read_text())
    defined = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    assert len(claimed) > 20
    assert [name for name in claimed if f"def {name}(" not in defined] == []


def test_pauses_between_restarts_double_up_to_a_minute() -> None:
    pauses = [pause_before_restart(n) for n in range(10_000)]
    assert pauses[:8] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    assert set(pauses[8:]) == {60.0}
