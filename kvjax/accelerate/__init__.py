"""Where programs run: what the device can do, what work needs at least, and which sizes of kernels are fastest."""

from kvjax.accelerate.facts import Facts, facts, stored_facts
from kvjax.accelerate.nvml import Gpu, Gpus, Memory, gpus, memory
from kvjax.accelerate.roofline import Bound, Work, bound
from kvjax.accelerate.table import keep_row, table
from kvjax.accelerate.tune import Case, Operation, Trial, tune
from kvjax.accelerate.utilisation import Kernel, Utilisation, utilisation

__all__ = [
    "Bound",
    "Case",
    "Facts",
    "Gpu",
    "Gpus",
    "Kernel",
    "Memory",
    "Operation",
    "Trial",
    "Utilisation",
    "Work",
    "bound",
    "facts",
    "gpus",
    "keep_row",
    "memory",
    "stored_facts",
    "table",
    "tune",
    "utilisation",
]
