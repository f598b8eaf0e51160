"""Facts of a device that there is not, in round numbers."""

from kvjax.accelerate.facts import Facts

FACTS = Facts(
    device="made up",
    platform="gpu",
    jax="0",
    date="",
    bandwidths={"read": 90.0, "add": 80.0, "copy": 100.0, "update": 70.0},
    flops={"bfloat16": 1000.0, "float32": 10.0},
    launch=0.5,
    call=0.7,
)
