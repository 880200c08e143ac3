"""What the serving process and its planner say to each other, as values and as frames.

Everything that crosses is data: names, numbers and arrays; policies as in `references`, plans as in
`broadcast`. Code never crosses. `check_reply` is the gate in the serving process: it tells garbage
from a plan, all but what the plan's rounds do, which every rank looks at before it begins them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.planner.broadcast import PlanReply, ReceivedPlan, decode_plan
from torch_eplb.planner.frames import Frame, FrameError, Kind, encode
from torch_eplb.planner.references import from_reference, to_reference
from torch_eplb.policies.registry import make_policy
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology
from torch_eplb.values.rounds import Bounds

__all__ = [
    "PlanReply",
    "PlannerSettings",
    "ReceivedPlan",
    "Refusal",
    "Request",
    "check_reply",
    "one_line",
]

MAX_CAUSE = 300
"""Characters of a cause; the rest is cut."""


@dataclass(frozen=True)
class PlannerSettings:
    """What a planner must know besides load and placement; all JSON-able but a callable policy.

    Raises:
        TypeError, ValueError: at construction, naming the field; the policy is looked up, too.
    """

    policy: str | Callable[..., Any]
    """Name of a policy, or a callable ``(load, placement, topology) -> Plan``."""

    policy_options: dict[str, Any]
    """Keyword arguments of `policies.make_policy`: min_gain, target_par, max_moves,
    plan_seconds, replica_choice."""

    topology: Topology
    """How ranks sit on nodes and experts in groups."""

    expert_bytes: tuple[int, ...]
    """Per layer, the bytes of one expert."""

    staging_bytes: int
    """Receive memory per rank."""

    direct: bool = True
    """Receive straight into slots whose expert has another replica, where possible."""

    layers_per_round: int | None = 1
    """Most layers in one round; None is no bound."""

    send_bytes_per_round: int | None = None
    """Most bytes that a rank sends in one round; None is no bound."""

    def __post_init__(self) -> None:
        for name in ("layers_per_round", "send_bytes_per_round"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an int of at least 1 or None, got {value!r}")
        if type(self.staging_bytes) is not int or self.staging_bytes < 0:
            raise ValueError(
                f"staging_bytes must be an int, at least 0, got {self.staging_bytes!r}"
            )
        if not self.expert_bytes or not all(
            type(n) is int and 1 <= n < 1 << 62 for n in self.expert_bytes
        ):
            raise ValueError(f"expert_bytes must be ints of at least 1, got {self.expert_bytes!r}")
        make_policy(self.policy, **self.policy_options)
        encode(self.to_frame())  # refuses what JSON cannot express, here and not in a restart

    @property
    def bounds(self) -> Bounds:
        """What a round may take."""
        return Bounds(
            self.expert_bytes,
            self.staging_bytes,
            self.layers_per_round,
            self.send_bytes_per_round,
        )

    def to_frame(self) -> Frame:
        """The settings as a frame, which carries the policy if that can be named elsewhere."""
        return Frame(
            Kind.SETTINGS,
            {
                "policy": to_reference(self.policy),
                "policy_options": self.policy_options,
                "num_ranks": self.topology.num_ranks,
                "num_nodes": self.topology.num_nodes,
                "num_expert_groups": self.topology.num_expert_groups,
                "staging_bytes": self.staging_bytes,
                "direct": self.direct,
                "layers_per_round": self.layers_per_round,
                "send_bytes_per_round": self.send_bytes_per_round,
            },
            {"expert_bytes": np.array(self.expert_bytes, dtype=np.int64)},
        )

    @classmethod
    def from_frame(cls, frame: Frame) -> PlannerSettings:
        """The settings again; imports the user's policy where one is named.

        Raises:
            Whatever the import raises; KeyError and others for a frame that `to_frame` cannot make.
        """
        get = frame.fields.__getitem__
        return cls(
            policy=from_reference(get("policy")),
            policy_options=get("policy_options"),
            topology=Topology(get("num_ranks"), get("num_nodes"), get("num_expert_groups")),
            expert_bytes=tuple(frame.arrays["expert_bytes"].tolist()),
            staging_bytes=get("staging_bytes"),
            direct=get("direct"),
            layers_per_round=get("layers_per_round"),
            send_bytes_per_round=get("send_bytes_per_round"),
        )


@dataclass(frozen=True)
class Request:
    """One question: which placement is better under this load?"""

    request_id: int
    load: NDArray[Any]
    """``[samples, layers, experts]``: tokens routed to each logical expert; finite, at least 0."""
    placement: Placement
    """The placement that is live now."""

    def __post_init__(self) -> None:
        expected = (self.placement.num_layers, self.placement.num_experts)
        if self.load.ndim != 3 or self.load.shape[0] < 1 or self.load.shape[1:] != expected:
            raise ValueError(
                "load must have the shape [samples, layers, experts] with at least one sample and "
                f"the placement's {list(expected)}, got {list(self.load.shape)}"
            )
        if self.load.dtype.kind not in "iuf":
            raise TypeError(f"load must be an array of numbers, got dtype {self.load.dtype}")
        if not (np.isfinite(self.load).all() and (self.load >= 0).all()):
            raise ValueError("load must be finite and at least 0 everywhere")

    def to_frame(self) -> Frame:
        return Frame(
            Kind.REQUEST,
            {"request_id": self.request_id, "num_experts": self.placement.num_experts},
            {"load": self.load, "placement": self.placement.experts},
        )

    @classmethod
    def from_frame(cls, frame: Frame) -> Request:
        placement = Placement(
            frame.arrays["placement"], frame.fields["num_experts"], allow_duplicates=True
        )
        return cls(frame.fields["request_id"], frame.arrays["load"], placement)

    def reply_limit(self) -> int:
        """Bytes that an answer can need at most; an answer that declares more is refused unread.

        Per slot 8 bytes of placement, 8 of split, and 64 of schedule if it changes; times three.
        """
        return 64 * 1024 + 256 * self.placement.experts.size


@dataclass(frozen=True)
class Refusal:
    """A request that the planner answered with the reason why there is no plan."""

    request_id: int
    cause: str = field(default="")

    def to_frame(self) -> Frame:
        return Frame(Kind.ERROR, {"request_id": self.request_id, "cause": self.cause})


def check_reply(
    frame: Frame, request: Request, settings: PlannerSettings
) -> ReceivedPlan | Refusal:
    """A frame as the answer to ``request``, checked but for what a plan's rounds do.

    Raises:
        ValueError, TypeError: it is not a valid answer; the text says why.
    """
    answered = frame.fields.get("request_id")
    if type(answered) is not int or answered != request.request_id:
        raise FrameError(f"an answer to request {answered!r:.20}, not to {request.request_id}")
    if frame.kind is Kind.ERROR:
        return Refusal(answered, one_line(str(frame.fields.get("cause"))))
    words = frame.arrays.get("plan")
    if words is None:
        raise FrameError("an answer without plan")
    if words.dtype.str != "<i8" or words.ndim != 1:
        raise FrameError(
            f"plan must be <i8 of one dimension, got {words.dtype.str} {list(words.shape)}"
        )
    plan = decode_plan(words, request.placement, settings.bounds)
    if plan.request_id != answered:
        raise FrameError(f"a plan for request {plan.request_id}, not for {answered}")
    return plan


def one_line(text: str) -> str:
    """Printable characters only, on one line, at most `MAX_CAUSE` of them."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * MAX_CAUSE]).split())
    return line if len(line) <= MAX_CAUSE else line[: MAX_CAUSE - 3] + "..."
