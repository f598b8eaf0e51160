"""The same weights in another type, as a GGUF for llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from kvjax.paths import cache_dir


def converted(source: Path, kind: str) -> Path:
    """A copy of `source` whose matrices are `kind` ("F32" or "Q8_0"), in the cache folder; made once.

    Every matrix is dequantised to float32 first. Vectors stay float32, as llama.cpp wants them.
    """
    target = cache_dir() / "bench" / f"{source.stem}.{source.stat().st_size}.{kind}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}.part")
    try:
        _write(source, scratch, kind)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
    return target


def _write(source: Path, target: Path, kind: str) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    skipped = {"general.architecture", "general.file_type"}
    for name, field in reader.fields.items():
        if name in skipped or name.startswith("GGUF."):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    wanted = gguf.GGMLQuantizationType[kind]
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if values.ndim > 1 and kind != "F32":
            writer.add_tensor(tensor.name, gguf.quantize(values, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
