"""Where programs run: on which devices, what these can do, what work needs at least, which sizes are fastest."""

from kvjax.accelerate.balance import Balance, LinearCost, Loads, Placed, imbalance
from kvjax.accelerate.facts import Facts, facts, stored_facts
from kvjax.accelerate.layout import Layout, layout_of
from kvjax.accelerate.nvml import Gpu, Gpus, Memory, gpus, memory
from kvjax.accelerate.params import gather_params, param_shardings, shard, shard_params
from kvjax.accelerate.roofline import Bound, Work, bound
from kvjax.accelerate.sharded import Sharded, shard_cache
from kvjax.accelerate.table import keep_row, table
from kvjax.accelerate.tune import Case, Operation, Trial, tune
from kvjax.accelerate.utilisation import Kernel, Utilisation, utilisation

__all__ = [
    "Balance",
    "Bound",
    "Case",
    "Facts",
    "Gpu",
    "Gpus",
    "Kernel",
    "Layout",
    "LinearCost",
    "Loads",
    "Memory",
    "Operation",
    "Placed",
    "Sharded",
    "Trial",
    "Utilisation",
    "Work",
    "bound",
    "facts",
    "gather_params",
    "gpus",
    "imbalance",
    "keep_row",
    "layout_of",
    "memory",
    "param_shardings",
    "shard",
    "shard_cache",
    "shard_params",
    "stored_facts",
    "table",
    "tune",
    "utilisation",
]
