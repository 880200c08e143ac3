"""What is tried with each model, on two real ranks.

Ranks write what they find to files, line by line, so that a model which ends their processes takes
nothing with it: `sweep` starts others for the models that are left.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from models import shrink
from support.ranks import RankFailed, preload, run_ranks
from torch import nn

import torch_eplb
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.spec import find_spec

preload("transformers", "transformers.modeling_utils", "transformers.generation")

SECONDS = 90
"""Limit for one model."""
NEW_TOKENS = 6
MOST_FORWARDS = 4000
CLOSE = 1e-3
"""Of the largest output; float32, and sums in another order."""
CHECKS = ("all_to_all", "all_reduce", "generate", "state", "load", "bf16")
EQUAL, REFUSED = "equal", "refused: "
OPTIONS: dict[str, Any] = {
    "policy": "random",
    "collect_interval": 2,
    "plan_interval": 0,
    "layers_per_step": 8,
    "staging_bytes": "1MiB",
    "timeout": 30,
}


class Unlike(AssertionError):
    """The wrapped model does something else than the unwrapped one."""


# ---- all models ----------------------------------------------------------------------------------


def sweep(names: list[str], folder: str, say: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """Try every model; what was found, by model class and check.

    Args:
        names: model types.
        folder: an empty one, for what ranks write.
        say: is told of each model when it is done.
    """
    left = list(names)
    found: dict[str, dict[str, str]] = {}
    while left:
        results = os.path.join(folder, f"{len(left)}")
        os.mkdir(results)
        ended = ""
        try:
            run_ranks(try_models, 2, left, results, timeout=SECONDS * len(left))
        except RankFailed as failed:
            ended = str(failed).strip().splitlines()[-1]
        done = _read(results)
        for name in list(left):
            if name not in done:
                break
            left.remove(name)
            outcome = done[name]
            if not outcome.pop("complete", None):
                outcome["ended"] = outcome.get("ended") or ended or "its processes have ended"
            found[name] = outcome
            say(f"{name}: {outcome.get('ended') or outcome.get('seconds', '?') + ' s'}")
        else:
            continue
        if not done:
            raise RuntimeError(f"ranks could not be started: {ended}")
    return found


def _read(folder: str) -> dict[str, dict[str, str]]:
    """By model what the ranks have written; where they differ, what is not about the other one."""
    lines = [
        json.loads(line)
        for path in sorted(Path(folder).glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        outcome = found.setdefault(line.pop("model"), {})
        for check, text in line.items():
            before = outcome.get(check)
            if before is None or before in (EQUAL, "") or "PeerLost" in before:
                outcome[check] = text
    return found


# ---- on a rank -----------------------------------------------------------------------------------


def try_models(rank: int, world_size: int, names: list[str], folder: str) -> None:
    """Try models one after the other; end with the first after which ranks are not together."""
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kinds = {name: (config, kind) for name, config, kind in shrink.architectures(names)}
    with open(os.path.join(folder, f"{rank}.jsonl"), "a", encoding="utf-8") as file:

        def write(name: str, **found: str) -> None:
            file.write(json.dumps({"model": name, **found}) + "\n")
            file.flush()

        for name in names:
            found = functools.partial(write, name)
            found()
            began = time.monotonic()
            watchdog = threading.Timer(SECONDS, _give_up, (found,))
            watchdog.daemon = True
            watchdog.start()
            try:
                together = _try_model(rank, *kinds[name], Path(folder, name), found)
            finally:
                watchdog.cancel()
            if not together:
                return
            found(seconds=f"{time.monotonic() - began:.0f}", complete="yes")


def _give_up(write: Any) -> None:
    write(ended=f"was not done after {SECONDS} s")
    os._exit(1)


def _try_model(rank: int, config_kind: Any, kind: Any, folder: Path, write: Any) -> bool:
    """Returns whether the ranks are together after it."""
    torch.manual_seed(0)
    config, why = shrink.small_config(config_kind, kind)
    if config is None:
        write(
            **{"kind": kind.__name__, "none" if why is None else "not built": why or "no experts"}
        )
        return True
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="eager").eval()
    _draw_weights(model)
    counts = collections.Counter(
        module.num_experts if hasattr(module, "num_experts") else module.num_routed_experts
        for module in model.modules()
        if find_spec(module) is not None
    )
    write(
        kind=kind.__name__,
        experts=", ".join(f"{layers} x {experts}" for experts, layers in sorted(counts.items())),
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M",
    )
    trial = Trial(rank, model, folder)
    if why is not None and counts:
        write(**{"not run": why})
        return True
    if counts and not trial.would_notice():
        write(**{"not run": "its output hardly depends on which expert is which"})
        return True
    for check in CHECKS:
        outcome, error, refused = "", None, False
        trial.wrapped = False
        try:
            outcome = getattr(trial, check)()
        except Exception as found:
            error = found
            # By `wrap`, or by `load_pretrained`; whatever else is raised should not have been.
            refused = isinstance(found, ValueError) and not trial.wrapped
            refused |= check == "load" and "nothing was loaded" in str(found)
            outcome = (REFUSED if refused else "") + _said(found)
        write(**{check: outcome})
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, type(error).__name__)
        if everyone[0] != everyone[1]:
            return False
        if error is not None and check in ("all_to_all", "all_reduce"):
            if refused:
                return True
            trial.restore()
    return True


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    if os.environ.get("SWEEP_TRACE"):
        import traceback

        traceback.print_exception(error, limit=-6)
    return f"{type(error).__name__}: {text[:4000]}"


def _draw_weights(model: nn.Module) -> None:
    """Such that every layer's output is of the size of its input, and routers choose clearly."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter.shape[-1] if parameter.dim() < 4 else parameter[0].numel()
            nn.init.normal_(parameter, std=min(1.0, 1.5 / fan_in**0.5))
        elif "bias" in name or not bool(torch.isfinite(parameter).all()):
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if hasattr(module, "zero_expert_num") and hasattr(module, "gate_up_proj"):
            # Entries that nobody reads are not kept.
            with torch.no_grad():
                module.gate_up_proj[module.num_routed_experts :] = 0.0


class Trial:
    """One model and what it is compared with; a method per check."""

    def __init__(self, rank: int, model: Any, folder: Path) -> None:
        self.rank = rank
        self.reference = copy.deepcopy(model)
        self.model = model
        self.folder = folder
        self.wrapped = False

    # ---- what goes in and what comes out --------------------------------------------------------

    def inputs(self, seed: int, length: int = 7) -> dict[str, Any]:
        return shrink.small_inputs(self.model.config, seed, length)

    def expected(self, inputs: dict[str, Any]) -> torch.Tensor:
        return _output(self.reference, inputs)

    def would_notice(self) -> bool:
        """Whether experts in wrong places would show."""
        wrong = copy.deepcopy(self.reference)
        for module in wrong.modules():
            spec = find_spec(module)
            if spec is None:
                continue
            for part in ExpertLayer("", module, spec).parts():
                moved = [part.slot(slot - 1 if slot else -1).clone() for slot in range(len(part))]
                for slot, other in enumerate(moved):
                    part.slot(slot).data.copy_(other)
        expected = self.expected(self.inputs(0))
        error = (_output(wrong, self.inputs(0)) - expected).abs().max()
        return bool(error > 20 * CLOSE * max(1.0, float(expected.abs().max())))

    def restore(self) -> None:
        self.model = copy.deepcopy(self.reference)

    @contextlib.contextmanager
    def balanced(self, model: Any, **options: Any) -> Iterator[list[Any]]:
        """The model wrapped, once for each number of experts."""
        numbers = sorted(
            {
                getattr(module, "num_experts", None) or module.num_routed_experts
                for module in model.modules()
                if find_spec(module) is not None
            }
        )
        with contextlib.ExitStack() as stack:
            balancers = []
            for number in numbers or [None]:

                def chosen(name: str, module: Any, number: Any = number) -> bool:
                    experts = getattr(module, "num_experts", None) or module.num_routed_experts
                    return bool(experts == number)

                settings = {**OPTIONS, **options}
                if len(numbers) > 1:
                    settings["layers"] = chosen
                balancers.append(stack.enter_context(torch_eplb.wrap(model, **settings)))
                self.wrapped = True
            yield balancers

    # ---- the checks -----------------------------------------------------------------------------

    def all_to_all(self) -> str:
        return self._serve("all_to_all")

    def all_reduce(self) -> str:
        return self._serve("all_reduce")

    def _serve(self, dispatch: str) -> str:
        with (
            self.balanced(self.model, dispatch=dispatch, num_redundant_experts=2) as balancers,
            torch.no_grad(),
        ):
            for step in range(MOST_FORWARDS):
                seed = step if dispatch == "all_reduce" else 2 * step + self.rank
                _compare(_output(self.model, self.inputs(seed)), self.expected(self.inputs(seed)))
                # Some experts see only images, say.
                reached = [balancer for balancer in balancers if balancer.load()[0].any()]
                if all(balancer.stats().experts_moved > 8 for balancer in reached) and step > 3:
                    break
            else:
                raise Unlike(f"experts have not moved in {MOST_FORWARDS} forwards")
            for balancer in balancers:
                hits, sent = (counts.sum() for counts in balancer.load())
                if hits != sent:
                    raise Unlike(f"{hits} choices were counted and {sent} sent")
            if dispatch == "all_to_all":
                # While it is wrapped and its experts are elsewhere.
                self._generated = self._generate()
                self._saved = _same_tensors(balancers[0].state_dict(), self.reference.state_dict())
            for balancer in balancers:
                balancer.unwrap()
            said = _same_tensors(self.model.state_dict(), self.reference.state_dict())
            if said != EQUAL:
                raise Unlike(f"after unwrap: {said}")
        return EQUAL

    def _generate(self) -> str:
        if not self.model.can_generate():
            return "has none"
        options = {
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "pad_token_id": 0,
        }
        inputs = self.inputs(100 + self.rank)
        inputs.pop("decoder_input_ids", None)
        try:
            expected = self.reference.generate(**inputs, **options)
        except Exception as error:
            return f"the unwrapped model's raises {_said(error)}"
        ours = self.model.generate(**inputs, **options)
        return EQUAL if torch.equal(_tokens(ours), _tokens(expected)) else "other tokens"

    def generate(self) -> str:
        return getattr(self, "_generated", "")

    def state(self) -> str:
        return getattr(self, "_saved", "")

    def load(self) -> str:
        if self.rank == 0:
            copy.deepcopy(self.reference).save_pretrained(self.folder)
        dist.barrier()
        kind, config = type(self.reference), copy.deepcopy(self.reference.config)
        empty: Any = shrink.on_meta(kind, config).eval()
        with self.balanced(empty, num_redundant_experts=2) as balancers, torch.no_grad():
            torch_eplb.load_pretrained(balancers[0], self.folder)
            said = _same_tensors(balancers[0].state_dict(), self.reference.state_dict())
            if said != EQUAL:
                raise Unlike(said)
            inputs = self.inputs(5 + self.rank)
            _compare(_output(empty, inputs), self.expected(inputs))
        return EQUAL

    def bf16(self) -> str:
        """Both against the same weights in float32, computed expert by expert."""
        plain = copy.deepcopy(self.reference).to(torch.bfloat16)
        for name, parameter in plain.named_parameters():
            if any(
                part in name for part in getattr(plain, "_keep_in_fp32_modules_strict", None) or ()
            ):
                parameter.data = parameter.data.float()
        exact = copy.deepcopy(plain).float()
        with contextlib.suppress(Exception):
            exact.set_experts_implementation("eager")
        ours, theirs = [], []
        model = copy.deepcopy(plain)
        with self.balanced(model, num_redundant_experts=2) as balancers, torch.no_grad():
            for step in range(12):
                inputs = self.inputs(50 + 2 * step + self.rank, length=16)
                target = _output(exact, inputs)
                ours.append(float((_output(model, inputs).float() - target).abs().mean()))
                theirs.append(float((_output(plain, inputs).float() - target).abs().mean()))
            del balancers
        ratio = float(np.mean(ours) / np.mean(theirs)) if any(theirs) else float(any(ours))
        if not ratio <= 2:
            raise Unlike(f"{ratio:.2f} times the unwrapped model's error")
        return f"{ratio:.2f}"


def _output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    for name in ("logits", "last_hidden_state", "feature_maps"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    raise TypeError(f"its output has neither logits nor hidden states: {list(output)}")


def _tokens(generated: Any) -> torch.Tensor:
    return generated if isinstance(generated, torch.Tensor) else generated.sequences


def _compare(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not bool(torch.isfinite(expected).all()):
        raise TypeError("the unwrapped model's output is not finite")
    scale = max(1.0, float(expected.abs().max()))
    error = float((actual - expected).abs().max()) / scale
    if not error < CLOSE:
        raise Unlike(f"outputs differ by {error:.1e} of the largest")


def _same_tensors(state: Any, expected: Any) -> str:
    if list(state) != list(expected):
        return f"other keys: {sorted(set(state) ^ set(expected))[:3]}"
    for key, value in expected.items():
        if state[key].dtype != value.dtype or not torch.equal(state[key], value):
            return f"{key} differs"
    return EQUAL
