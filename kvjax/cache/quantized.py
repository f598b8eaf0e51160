"""Keep everything in few bits, and the first and the newest tokens as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from kvjax.cache.base import LayerSpec, check_dtype, is_whole
from kvjax.cache.dense import Dense, DenseLayer, WithDense
from kvjax.cache.packing import PLANES, UNIT
from kvjax.cache.quantize import FORMS, Codec
from kvjax.cache.quantized_layer import QuantizedLayer

Bits = int | tuple[int, ...]

SPAN = 64
"""Tokens that share a centre: with fewer it costs more bytes, with more it is further from each (at 5 bits, keys that
share one lose half as much of SmolLM2's next-token distribution, in KL, as keys without)."""


@dataclass(frozen=True)
class Quantized(WithDense):
    """Every token in `bits` a number, but a row's first `sinks` and its newest `residual` or a few more in full.

    The newest in full are at most `residual + group - 1`. The first draw attention whatever they say
    (arXiv:2309.17453) and are unlike all others: kept in full, keys err by a fifth at 4 bits and by a ninth at 2.

    Args:
        bits: of a key's code: 8, 6, 5, 4, 3 or 2; one for all layers, or a tuple with one a layer.
        value_bits: of a value's code, likewise; None means `bits`.
        group: tokens that are packed together, a multiple of 8.
        residual: newest tokens that are never packed.
        sinks: first tokens that are never packed.
        keys, values: the form of each, see `kvjax.cache.quantize`: `"rotated"`, which needs a `head_dim` that is a
            power of two, `"token"`, or `"channel"`, whose scales cost `32 / group` bits: a group of 64 then.
            KIVI's own form is `keys="channel", values="token"`.
        span: tokens that share a centre, which is subtracted from their keys, a multiple of `group`; 0 for none, and
            None for the first multiple from 64 on. Only `"rotated"` keys have centres.
        scales: dtype of centres, and of scales and offsets where there are offsets.
        dtype: of what is not packed; None means the model's cache dtype.

    A cache with a capacity up to `sinks + residual + group` is `Dense`: nothing would be saved.

    Raises:
        ValueError: for a setting outside these, a tuple that has not one entry a layer, or sizes that do not divide.
    """

    bits: Bits = 4
    value_bits: Bits | None = None
    group: int = 8
    residual: int = 32
    sinks: int = 4
    keys: str = "rotated"
    values: str = "rotated"
    span: int | None = None
    scales: str = "float16"
    dtype: str | None = None

    def __post_init__(self):
        for name, bits in (("bits", self.bits), ("value_bits", self._value_bits)):
            each = bits if isinstance(bits, tuple) else (bits,)
            if not each or not all(is_whole(b, 1) and b in PLANES for b in each):
                raise ValueError(
                    f"Quantized: `{name}` must be among {sorted(PLANES)}, or a tuple, one a layer, got {bits!r}"
                )
        if not is_whole(self.group, UNIT) or self.group % UNIT:
            raise ValueError(f"Quantized: `group` must be a multiple of {UNIT} tokens, got {self.group!r}")
        for name, tokens in (("residual", self.residual), ("sinks", self.sinks)):
            if not is_whole(tokens, 0):
                raise ValueError(f"Quantized: `{name}` must be at least 0, a whole number, got {tokens!r}")
        for name, form in (("keys", self.keys), ("values", self.values)):
            if form not in FORMS:
                raise ValueError(f"Quantized: `{name}` must be one of {FORMS}, got {form!r}")
        if self.span is not None and (not is_whole(self.span, 0) or self.span % self.group):
            raise ValueError(f"Quantized: `span` must be a multiple of `group`, {self.group}, or 0, got {self.span}")
        if self.span and self.keys != "rotated":
            raise ValueError(f"Quantized: `span` is for keys of the form 'rotated', and these are {self.keys!r}")
        if self.scales not in ("float16", "bfloat16", "float32"):
            raise ValueError(f"Quantized: `scales` must be float16, bfloat16 or float32, got {self.scales!r}")
        check_dtype(self, self.dtype)

    @property
    def _value_bits(self) -> Bits:
        return self.bits if self.value_bits is None else self.value_bits

    @property
    def _span(self) -> int:
        if self.keys != "rotated":
            return 0
        return -(-SPAN // self.group) * self.group if self.span is None else self.span

    def _of(self, spec: LayerSpec, name: str, bits: Bits) -> int:
        if not isinstance(bits, tuple):
            return bits
        if len(bits) != spec.layers:
            raise ValueError(
                f"Quantized: `{name}` must have one entry for each of {spec.layers} layers, got {len(bits)}"
            )
        return bits[spec.index]

    def layer(self, spec: LayerSpec) -> QuantizedLayer | DenseLayer:
        dim, slots = spec.head_dim, self.sinks + self.residual + self.group
        k_bits, v_bits = self._of(spec, "bits", self.bits), self._of(spec, "value_bits", self._value_bits)
        if "rotated" in (self.keys, self.values) and dim & (dim - 1):
            raise ValueError(f"Quantized: the form 'rotated' needs a `head_dim` that is a power of two, got {dim}")
        if spec.capacity <= slots:
            return Dense(self.dtype).layer(spec)
        spec = replace(spec, dtype=self.dtype or spec.dtype)
        k_codec = Codec(self.keys, k_bits, self.group, dim, self.scales, keys=True, span=self._span)
        v_codec = Codec(self.values, v_bits, self.group, dim, self.scales)
        lead = spec.batch * spec.kv_heads, (spec.capacity - self.sinks - self.residual) // self.group
        return QuantizedLayer(
            *k_codec.empty(*lead),
            *v_codec.empty(*lead),
            k=spec.zeros(slots),
            v=spec.zeros(slots),
            length=jnp.zeros(spec.batch, jnp.int32),
            packed=jnp.zeros(spec.batch, jnp.int32),
            k_codec=k_codec,
            v_codec=v_codec,
            residual=self.residual,
            capacity=spec.capacity,
            k_centres=k_codec.no_centres(*lead),
        )
