import re
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pmpd.kernels import CudaUnavailableError, block, nvrtc
from pmpd.kernels.product import Variant

SCALE = """
extern "C" __global__ void scale(const float* x, float* out, float factor, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = FACTOR * factor * x[i];
}
"""
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_missing_library_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nvrtc, "_library_folders", lambda: [tmp_path])
    monkeypatch.setattr(torch.version, "cuda", "99.9")
    nvrtc._nvrtc.cache_clear()
    with pytest.raises(CudaUnavailableError, match=r"libnvrtc.*99.9.*install"):
        nvrtc.cubin(SCALE, (), "sm_80")


def test_a_missing_driver_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(CudaUnavailableError, match=r"libcuda.so.1 does not load.*install the NVIDIA driver"):
        nvrtc._driver.__wrapped__()


def test_an_old_driver_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    with pytest.raises(CudaUnavailableError, match=r"older than CUDA 12.*update the driver"):
        nvrtc._driver.__wrapped__()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instead of NVRTC; the sources that it was given."""
    given: list[str] = []
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "cubin", lambda source, *_: given.append(source) or source.encode())
    return given


def test_machine_code_is_kept_whole_and_compiled_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: list[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "deep"))
    assert [nvrtc.compiled(source, (), "sm_90") for source in ("a", "b", "a")] == [b"a", b"b", b"a"]
    assert compiler == ["a", "b"]
    assert sorted(file.read_bytes() for file in nvrtc.cache_dir().iterdir()) == [b"a", b"b"]


def test_machine_code_that_cannot_be_kept_is_used_and_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    nvrtc._warn_once.cache_clear()
    assert [nvrtc.compiled("a", (), "sm_90") for _ in range(2)] == [b"a", b"a"]
    assert compiler == ["a", "a"]
    assert caplog.text.count("set XDG_CACHE_HOME to a folder that can be written") == 1


@pytest.fixture
def real_compiler() -> None:
    try:
        nvrtc.nvrtc_version()
    except RuntimeError as error:
        pytest.skip(f"needs NVRTC: {error}")


@pytest.mark.usefixtures("real_compiler")
@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        ("sm_80", Variant(2, 1, torch.float16, grouped=True, stages=3)),
        ("sm_90", Variant(4, 8, torch.bfloat16, norm=True, stages=2, ragged=True, chunk=2, once=False)),
        ("sm_90", Variant(7, 4, torch.float16, norm=True, gated=True, grouped=True, ragged=True, cluster=2)),
        ("sm_90", Variant(3, 8, torch.float16, stages=3, chunk=6, once=False, max_threads=256, cluster=2)),
        ("sm_80", Variant(2, 1, torch.float16, stages=8, whole=True, chunk=6, max_threads=192, planes=True)),
        ("sm_90", Variant(2, 1, torch.bfloat16, norm=True, gated=True, ragged=True, planes=True, cluster=2)),
        ("sm_89", Variant(4, 1, torch.float16, stages=2, chunk=2, once=False, max_threads=256, planes=True)),
        ("sm_80", Variant(3, 2, torch.bfloat16, stages=2, chunk=4, max_threads=384)),
        ("sm_80", Variant(2, 4, torch.float16, stages=2, chunk=4, max_threads=384, table_digits=1)),
        ("sm_90", Variant(2, 8, torch.bfloat16, norm=True, gated=True, ragged=True, cluster=2, table_digits=1)),
        ("sm_80", Variant(6, 1, torch.float16, stages=2, chunk=6, spread=True)),
        ("sm_90", Variant(8, 8, torch.bfloat16, norm=True, gated=True, stages=1, cluster=2, spread=True)),
    ],
)
def test_the_products_kernels_compile_without_a_device(architecture: str, variant: Variant) -> None:
    assert nvrtc.cubin(variant.source, variant.options, architecture)[:4] == b"\x7fELF"


@pytest.mark.usefixtures("real_compiler")
@pytest.mark.parametrize(
    ("architecture", "group", "head_dim", "dtype"),
    [
        ("sm_80", 1, 128, torch.float16),
        ("sm_90", 1, 128, torch.float16),
        ("sm_90", 3, 64, torch.bfloat16),
        ("sm_90", 6, 256, torch.float16),
        ("sm_90", 8, 256, torch.float16),
        ("sm_89", 8, 16, torch.float16),
    ],
)
def test_attention_declares_no_more_shared_memory_than_is_counted(
    architecture: str, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    cluster = block.max_cluster(group, head_dim) if architecture == "sm_90" else 1
    flags = [*block.options(group, head_dim, dtype, cluster), "--ptxas-options=-v"]
    _, log = nvrtc.build(block.source(), flags, architecture)
    of_attention = log[log.index("Function properties for attend") :]
    declared = int(re.findall(r"(\d+) bytes smem", of_attention)[0])
    counted = block.static_bytes(group, head_dim, cluster)
    assert declared <= counted
    assert cluster == 1 or declared > counted - 16


@pytest.mark.usefixtures("real_compiler")
def test_the_joint_quantisers_kernels_compile_without_a_device() -> None:
    source = resources.files("pmpd.quant").joinpath("joint_steps.cu").read_text()
    assert nvrtc.cubin(source, (), "sm_80")[:4] == b"\x7fELF"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_compiling_is_refused() -> None:
    with pytest.raises(CudaUnavailableError, match="CUDA device"):
        nvrtc.compile(SCALE)


def test_shared_memory_is_asked_for_beside_what_a_kernel_declares_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    driver = SimpleNamespace(
        cuKernelSetAttribute=lambda attribute, value, kernel, device: asked.append((attribute, value)) or 0,
        cuLaunchKernelEx=lambda *arguments: 0,
    )
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    kernel = nvrtc.Function("kernel", nvrtc.ctypes.c_void_p())
    for shared_bytes in (0, 47 * 1024, 1024, 47 * 1024, 90 * 1024):
        kernel((1,), (32,), 1, shared_bytes=shared_bytes)
    assert asked == [
        (nvrtc.CARVEOUT_ATTRIBUTE, nvrtc.CARVEOUT),
        (nvrtc.SHARED_BYTES_ATTRIBUTE, 47 * 1024),  # under 48 KiB too: the kernel's own comes on top
        (nvrtc.SHARED_BYTES_ATTRIBUTE, 90 * 1024),
    ]


@pytest.mark.gpu
@on_gpu
def test_a_kernel_runs_on_the_current_stream_and_in_a_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scale = nvrtc.compile(SCALE, ["-DFACTOR=2"])["scale"]
    x, out = torch.randn(1000, device="cuda"), torch.empty(1000, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        scale((8,), (128,), x, out, 1.5, 1000)
    stream.synchronize()
    torch.testing.assert_close(out, 3 * x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scale((8,), (128,), x, out, 0.5, 1000)
    graph.replay()
    torch.testing.assert_close(out, x)
    assert len(list(nvrtc.cache_dir().iterdir())) == 1


@pytest.mark.gpu
@on_gpu
def test_a_source_that_does_not_compile_shows_the_compilers_log() -> None:
    with pytest.raises(RuntimeError, match="FACTOR"):
        nvrtc.compile(SCALE)
