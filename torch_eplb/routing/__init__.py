"""The hot path on the device: counting hits, and from logical to physical ids.

`ids` takes what a router gives; `tables` keeps what the placement says; `choose` reads it per
batch; `quotas` balances a batch by tokens, and `costs` by what they cost, both with what `layouts`
knows of a placement; `intervals` turns quotas into what each rank sends and receives; `rows` makes
one row per token and rank of it; `load` keeps the counters.
Knows no policy and starts no communication.
"""

from torch_eplb.routing.choose import (
    choose_by_quota,
    choose_from_table,
    count_hits,
    order_by_id,
)
from torch_eplb.routing.costs import split_batch
from torch_eplb.routing.device import divide, to_device
from torch_eplb.routing.host import on_host
from torch_eplb.routing.ids import PADDING, logical_ids, narrow, zero_compute
from torch_eplb.routing.intervals import (
    DispatchPlan,
    choose_locally,
    interval_counts,
    plan_dispatch,
)
from torch_eplb.routing.load import LoadCounters, SampleWindow
from torch_eplb.routing.quotas import solve_quotas
from torch_eplb.routing.rows import Arrivals, Departures, arrivals, departures, meet
from torch_eplb.routing.tables import RoutingTables

__all__ = [
    "PADDING",
    "Arrivals",
    "Departures",
    "DispatchPlan",
    "LoadCounters",
    "RoutingTables",
    "SampleWindow",
    "arrivals",
    "choose_by_quota",
    "choose_from_table",
    "choose_locally",
    "count_hits",
    "departures",
    "divide",
    "interval_counts",
    "logical_ids",
    "meet",
    "narrow",
    "on_host",
    "order_by_id",
    "plan_dispatch",
    "solve_quotas",
    "split_batch",
    "to_device",
    "zero_compute",
]
