"""Shares of time from traces: one written by hand as a GPU's is, and a real one of this machine."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.profiler import ProfileData

from kvjax.accelerate.roofline import Work
from kvjax.accelerate.utilisation import Kernel, clipped, union, utilisation

GPU = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #1(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 100000 }
    events { metadata_id: 2 offset_ps: 200000 duration_ps: 300000 }
    events { metadata_id: 1 offset_ps: 900000 duration_ps: 100000 } }
  lines { name: "Stream #2(Compute,MemcpyD2D)" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 400000 duration_ps: 200000 }
    events { metadata_id: 3 offset_ps: 600000 duration_ps: 100000 } }
  lines { name: "XLA Ops" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 1000000 } }
  event_metadata { key: 1 value { id: 1 name: "attend" } }
  event_metadata { key: 2 value { id: 2 name: "product" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
}
planes { name: "/device:GPU:1"
  lines { name: "Stream #1(Memset)" timestamp_ns: 1000 events { metadata_id: 3 offset_ps: 0 duration_ps: 9000 } }
  event_metadata { key: 3 value { id: 3 name: "Memset" } } }
planes {
  name: "/host:CPU"
  lines { name: "python" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 100000 duration_ps: 200000 }
    events { metadata_id: 1 offset_ps: 800000 duration_ps: 200000 }
    events { metadata_id: 2 offset_ps: 0 duration_ps: 900000 } }
  event_metadata { key: 1 value { id: 1 name: "step" } }
  event_metadata { key: 2 value { id: 2 name: "PjitFunction(step)" } }
}
"""


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "plugins" / "profile" / "now" / "host.xplane.pb"
    path.parent.mkdir(parents=True)
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(GPU))
    return tmp_path


def test_streams_that_overlap_count_once(trace):
    (found,) = utilisation(trace)
    assert found.device == "/device:GPU:0" and found.seconds == pytest.approx(1e-6)
    assert found.busy == pytest.approx(0.6) and found.copying == pytest.approx(0.1)
    assert found.kernels == (Kernel("product", 2, 0.5), Kernel("attend", 2, 0.2))
    assert len(utilisation(trace, most=1)[0].kernels) == 1


def test_bytes_a_second_that_were_reached(trace):
    (found,) = utilisation(trace)
    assert found.bandwidth(Work(0, 300), times=2) == pytest.approx(600 / 1e-6)
    assert found.kernels[1].bandwidth(Work(0, 300)) == pytest.approx(600 / 0.2e-6)


def test_only_what_ran_inside_an_annotation(trace):
    (found,) = utilisation(trace, within="step")
    assert found.seconds == pytest.approx(0.4e-6)
    assert found.busy == pytest.approx((100 + 100) / 400) and found.copying == 0.0
    assert found.kernels == (Kernel("product", 1, 0.1), Kernel("attend", 1, 0.1))
    with pytest.raises(ValueError, match="no TraceAnnotation 'steps'"):
        utilisation(trace, within="steps")


def test_the_newest_session_is_read(trace):
    other = trace / "plugins" / "profile" / "later" / "host.xplane.pb"
    other.parent.mkdir()
    other.write_bytes(ProfileData.text_proto_to_serialized_xspace('planes { name: "/host:CPU" }'))
    with pytest.raises(ValueError, match=r"no kernel ran in .*later.*it has /host:CPU"):
        utilisation(trace)
    assert utilisation(trace / "plugins" / "profile" / "now" / "host.xplane.pb")
    with pytest.raises(FileNotFoundError, match=r"no \*.xplane.pb below"):
        utilisation(trace / "none")


def test_a_trace_of_this_machine(tmp_path):
    step = jax.jit(lambda x: jnp.tanh(x @ x).sum())
    x = jnp.ones((256, 256))
    step(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            with jax.profiler.TraceAnnotation("loop"):
                step(x).block_until_ready()
    (whole,), (inside,) = utilisation(tmp_path), utilisation(tmp_path, within="loop")
    for found in (whole, inside):
        assert 0 < found.busy <= 1 and found.copying == 0 and found.seconds > 0
        assert all(kernel.count >= 1 for kernel in found.kernels)
    assert max(kernel.count for kernel in whole.kernels) % 3 == 0


spans = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda x: (float(x[0]), float(sum(x)))), max_size=8
)


@given(some=spans, others=spans)
def test_spans_as_sets_of_instants(some, others):
    def instants(spans):
        return {t for begin, end in spans for t in range(int(begin), int(end))}

    merged = union(some)
    assert instants(merged) == instants(some)
    assert all(a[1] < b[0] for a, b in zip(merged, merged[1:], strict=False))
    assert instants(clipped(some, union(others))) == instants(some) & instants(others)
