"""Tune kernels on a GPU: for each shape the fastest sizes that give the reference's result, kept as JSON by device.

Shapes that were tuned with the kernel's present source are left out, so a run that was cut short goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kernels
from experiments.environment import describe
from experiments.gpu_timing import parse_work, require_gpu
from experiments.registry import Progress, Row
from kernels.decode_attention import decode_attention, fitting
from kernels.decode_packed import UNIT, decode_packed, fitting_packed
from kernels.decode_plan import Tiling, plan
from kernels.packed import attend_packed, quantize
from kernels.prefill_attention import Blocks, prefill_attention
from kernels.reference import Mask, attend
from kvjax.accelerate import Case, Operation, bound, facts, keep_row, roofline, table, tune
from kvjax.accelerate.device import device_name
from kvjax.accelerate.table import SHIPPED, find_row
from kvjax.accelerate.tune import row_of

FAR = (1e-2, 2e-4)
"""Largest errors of any query's result and of any token's log-sum-exps: bfloat16 sums of products stay under 3e-3."""

BITS = {"int8": 8, "int4": 4, "int2": 2}
"""Of a number, in kernels that read codes with one float16 scale a token."""


@dataclass(frozen=True)
class Config:
    """The fields of `gpu_tune.yaml`.

    Args:
        kernels: names of `SHAPES`.
        decode: `BATCHxCONTEXT`: rows, and tokens each has in the cache, for kernels of decode attention.
        prefill: `BATCHxWIDTH`: rows, and tokens of each one's prompt.
        heads: query heads.
        kv_heads: K/V heads.
        head_dim: channels of a head.
        tiles: slots that are read at once in full precision; codes get as many bytes.
        stages: tiles in flight.
        workers: thread blocks; 0 stands for as many as `fitting` takes.
        whole: tiles that a worker takes at least.
        calls: of each config in a turn.
        turns: in which the configs follow each other.
        into: the folder of the tables; `user` is the user's own, `package` what comes with the package.
        again: tune shapes that were tuned, too.
    """

    kernels: tuple[str, ...]
    decode: tuple[str, ...]
    prefill: tuple[str, ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    tiles: tuple[int, ...] = (64, 128)
    stages: tuple[int, ...] = (2, 3)
    workers: tuple[int, ...] = (0, 132)
    whole: tuple[int, ...] = (1, 2)
    calls: int = 12
    turns: int = 3
    into: str = "user"
    again: bool = False

    def __post_init__(self):
        if unknown := [name for name in self.kernels if name not in SHAPES]:
            raise ValueError(f"gpu_tune: `kernels` must be among {', '.join(SHAPES)}, got {unknown}")
        for name in (*self.decode, *self.prefill):
            parse_work("gpu_tune", name)
        for name in ("tiles", "stages", "workers", "whole"):
            if not getattr(self, name):
                raise ValueError(f"gpu_tune: `{name}` must have an entry, got none")
        for name in ("calls", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"gpu_tune: `{name}` must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Shape:
    """One thing to tune: an operation for a shape, the configs to try, and how messages call it."""

    name: str
    operation: Operation[Any]
    case: Case
    configs: tuple[Any, ...]


def run(config: Config, progress: Progress) -> list[Row]:
    """A row for each kernel and work: the winner, just found or found before."""
    require_gpu("gpu_tune")
    known, here = facts(), describe()
    device, folder = device_name(jax.devices()[0]), table_folder(config.into)
    shapes = list(every_shape(config))
    rows: list[Row] = []
    for i, shape in enumerate(shapes):
        source = fingerprint(shape.operation.name)
        held = find_row(table(device, folder), shape.operation.name, shape.case.exact, shape.case.sizes)
        if held is None or held.get("source") != source or config.again:
            where = {"source": source, **{name: here[name] for name in ("date", "commit", "dirty", "jax", "jaxlib")}}
            held = _tuned(config, shape, known, where, partial(_part, progress, shape.name, i, len(shapes)))
            keep_row(held, device, folder)
        rows.append(_spelled(shape, held))
    return rows


def table_folder(into: str) -> Path | None:
    """The folder that `into` means; None for the user's own."""
    return {"user": None, "package": SHIPPED}.get(into, Path(into))


def fingerprint(operation: str) -> str:
    """Of the sources of a kernel: of all modules here that it is made of, by the names of its files."""
    folder = Path(kernels.__file__).parent
    own = "prefill_*.py" if operation == "prefill" else "decode_*.py"
    files = sorted({*folder.glob(own), folder / "packed.py", folder / "reference.py", folder / "decode_parts.py"})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def every_shape(config: Config) -> Iterator[Shape]:
    """What a config asks for, kernel by kernel."""
    for name in config.kernels:
        for work in config.prefill if name == "prefill" else config.decode:
            shape, configs = SHAPES[name]
            case, operation = shape(config, *parse_work("gpu_tune", work))
            yield Shape(f"{name}, {work}", operation, case, configs(config, *parse_work("gpu_tune", work)))


def _tuned(config: Config, shape: Shape, known, where: dict[str, Any], tell: Progress) -> dict[str, Any]:
    trials = tune(shape.operation, shape.case, shape.configs, calls=config.calls, turns=config.turns, tell=tell)
    least = bound(shape.case.work, known)
    default = next(trial for trial in trials if trial.config == shape.configs[0])
    more = {"limit": least.limit, "default": asdict(default.config), "default_us": default.median, **where}
    if default.refused is not None:
        more |= {"default_us": None, "default_refused": default.refused}
    return row_of(shape.operation.name, shape.case, trials, 1e6 * least.seconds, **more)


def _part(progress: Progress, name: str, i: int, count: int, doing: str, done: float) -> None:
    progress(f"{name}: {doing}", (i + done) / count)


def _spelled(shape: Shape, held: dict[str, Any]) -> Row:
    config = ", ".join(f"{name} {value}" for name, value in held["config"].items())
    names = ("us", "range", "share", "default_us", "tried", "refused", "source")
    return {"shape": shape.name, "config": config, **{name: held.get(name) for name in names}}


def _heads(config: Config) -> dict[str, Any]:
    return {"heads": config.heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim}


def _exact(config: Config, batch: int, dtype: str) -> dict[str, int | str]:
    return {
        "dtype": dtype,
        "head_dim": config.head_dim,
        "queries": config.heads // config.kv_heads,
        "rows": batch * config.kv_heads,
    }


def _places(batch: int, context: int):
    slots = jnp.broadcast_to(jnp.arange(context, dtype=jnp.int32), (batch, context))
    return jnp.full((batch, 1), context - 1, jnp.int32), slots


def _normal(config: Config, batch: int, width: int, context: int, key):
    shapes = ((batch, width, config.heads), (batch * config.kv_heads, context), (batch * config.kv_heads, context))
    keys = jax.random.split(key, 3)
    return tuple(
        jax.random.normal(k, (*shape, config.head_dim), jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)
    )


def _wide(mask: Mask, at, slots, q, k, v):
    """The reference in float32."""
    with jax.default_matmul_precision("highest"):
        return attend(*(x.astype(jnp.float32) for x in (q, k, v)), at, slots, mask)


_plan = jax.jit(plan, static_argnums=(2, 3, 4))


def _planned(mask: Mask, kv_heads: int, at, slots, tiling: Tiling, q, k, v):
    """With the plan, which is made once a step for all layers, so that it is not in the time."""
    return q, k, v, at, slots, _plan(at, slots, mask, kv_heads, tiling)


def _decode(config: Config, batch: int, context: int) -> tuple[Case, Operation]:
    mask, places = Mask(config.head_dim**-0.5), _places(batch, context)

    def call(tiling: Tiling, q, k, v, at, slots, work):
        return decode_attention(q, k, v, at, slots, mask, work=work, tiling=tiling)

    case = Case(
        exact=_exact(config, batch, "bfloat16"),
        sizes={"slots": context},
        draw=jax.jit(partial(_normal, config, batch, 1, context)),
        work=roofline.decode_attention(batch, context, **_heads(config)),
    )
    arrange = partial(_planned, mask, config.kv_heads, *places)
    return case, Operation("decode", call, partial(_wide, mask, *places), FAR, arrange)


def _packed(bits: int) -> Callable[[Config, int, int], tuple[Case, Operation]]:
    def packed(config: Config, batch: int, context: int) -> tuple[Case, Operation]:
        mask, places = Mask(config.head_dim**-0.5), _places(batch, context)

        def draw(key):
            q, k, v = _normal(config, batch, 1, context, key)
            return q, quantize(k, bits), quantize(v, bits)

        def call(tiling: Tiling, q, k, v, at, slots, work):
            return decode_packed(q, k, v, at, slots, mask, work=work, tiling=tiling)

        def reference(q, k, v):
            return attend_packed(q.astype(jnp.float32), k, v, *places, mask)

        case = Case(
            exact=_exact(config, batch, f"int{bits}"),
            sizes={"slots": context},
            draw=jax.jit(draw),
            work=roofline.decode_attention(batch, context, bits=bits, scales=2, **_heads(config)),
        )
        arrange = partial(_planned, mask, config.kv_heads, *places)
        return case, Operation("decode_packed", call, reference, FAR, arrange)

    return packed


def _prefill(config: Config, batch: int, width: int) -> tuple[Case, Operation]:
    """Which tiles a block of queries sees is worked out in the time, for the kernel does it."""
    mask, slots = Mask(config.head_dim**-0.5), _places(batch, width)[1]

    def call(blocks: Blocks, q, k, v):
        return prefill_attention(q, k, v, slots, slots, mask, blocks=blocks)

    exact = {"dtype": "bfloat16", "head_dim": config.head_dim, "queries": config.heads // config.kv_heads}
    case = Case(
        exact=exact,
        sizes={"rows": batch * config.kv_heads, "width": width, "slots": width},
        draw=jax.jit(partial(_normal, config, batch, width, width)),
        work=roofline.prefill_attention(batch, width, **_heads(config)),
    )
    return case, Operation("prefill", call, partial(_wide, mask, slots, slots), FAR)


def _tilings(bits: int | None) -> Callable[[Config, int, int], tuple[Tiling, ...]]:
    """What `fitting` takes, and then the others; a tile of codes has the bytes of one in full precision."""

    def tilings(config: Config, batch: int, context: int) -> tuple[Tiling, ...]:
        rows = batch * config.kv_heads
        default = fitting(config.head_dim, rows) if bits is None else fitting_packed(config.head_dim, rows, bits)
        longer = 1 if bits is None else 16 // bits
        tiles = sorted({max(tile * longer, UNIT * 8 // bits if bits else 0) for tile in config.tiles})
        others = (
            Tiling(tile, stages, workers or default.workers, whole)
            for tile, stages, workers, whole in product(tiles, config.stages, config.workers, config.whole)
        )
        return tuple(dict.fromkeys((default, *others)))

    return tilings


def _blocks(config: Config, batch: int, width: int) -> tuple[Blocks, ...]:
    return tuple(dict.fromkeys((Blocks(), *(Blocks(*pair) for pair in product(config.tiles, config.stages)))))


SHAPES: dict[str, tuple[Callable[..., tuple[Case, Operation]], Callable[..., tuple[Any, ...]]]] = {
    "decode": (_decode, _tilings(None)),
    **{name: (_packed(bits), _tilings(bits)) for name, bits in BITS.items()},
    "prefill": (_prefill, _blocks),
}
"""From config, batch and context to what is tuned and its operation, and to the configs, the default first."""
