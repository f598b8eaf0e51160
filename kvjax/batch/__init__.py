"""Continuous batching: requests come to slots and leave while others decode."""

from kvjax.batch.parking import Parked, park, unpark
from kvjax.batch.request import Request, Result
from kvjax.batch.seating import admit, constrain, heed, retire
from kvjax.batch.serve import Cancel, serve
from kvjax.batch.serving import Serving, Settings, open
from kvjax.batch.slots import WAITING, Made, Slots, Watch, init, look, watch
from kvjax.batch.steps import decode, feed, step
from kvjax.batch.turns import cancel, submit, turn

__all__ = [
    "WAITING",
    "Cancel",
    "Made",
    "Parked",
    "Request",
    "Result",
    "Serving",
    "Settings",
    "Slots",
    "Watch",
    "admit",
    "cancel",
    "constrain",
    "decode",
    "feed",
    "heed",
    "init",
    "look",
    "open",
    "park",
    "retire",
    "serve",
    "step",
    "submit",
    "turn",
    "unpark",
    "watch",
]
