"""The Triton kernels: they build for GPUs that are not here, and they compute what their references compute.

Without a GPU the kernels run in Triton's interpreter, in a process of its own because it is switched on at import, and
in float32 only, because it gets bfloat16 products wrong. :func:`check_numerics` is what both kinds of run share.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_process

from m3po.config import MODEL_SIZES
from m3po.kernels import linear_norm_mish as linear
from m3po.kernels import residual_simnorm as simnorm
from m3po.kernels import two_hot_expectation as two_hot
from m3po.kernels.triton_support import CompileSpec
from m3po.models.layers import NormedLinear, SimNorm
from m3po.models.two_hot import TwoHot

triton = pytest.importorskip("triton")
BF16, F32 = torch.bfloat16, torch.float32
ACTIONS, BINS, GROUP = 8, 101, 8
SHARED_MEMORY = {90: 232448, 80: 166912}
"""Bytes that a program may use, by architecture."""

REGISTERS = 65536
"""Of a multiprocessor."""


def compile_for(spec: CompileSpec, arch: int):
    """Build as the launcher does; every pointer is a multiple of 16 bytes, as those of the planner's buffers are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**spec.signature, **dict.fromkeys(spec.constexprs, "constexpr")}
    pointers = [i for i, name in enumerate(spec.signature.values()) if name.startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(spec.kernel, signature, spec.constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=spec.options)


def resources(spec: CompileSpec, arch: int, tmp_path: Path) -> dict[str, int]:
    """Registers, stack and shared memory of a kernel in bytes, and how many instructions of some kinds it has."""
    import triton.backends.nvidia

    compiled = compile_for(spec, arch)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    text = run_process([cuobjdump, "-res-usage", "-sass", cubin]).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    found["SHARED"] = compiled.metadata.shared
    for name in ("HGMMA", "HMMA", "LDL", "STL"):
        found[name] = len(re.findall(rf"\b{name}\b", text))
    return found


def assert_clean(found: dict[str, int], arch: int) -> None:
    assert found["SHARED"] <= SHARED_MEMORY[arch]
    assert found["REG"] > 0  # the usage was found
    assert (found["STACK"], found["LOCAL"], found["LDL"], found["STL"]) == (0, 0, 0, 0), "spills"


def layers(size: str, dtype: torch.dtype) -> list[CompileSpec]:
    """The layers of a rollout.

    The actions' share of the first one (latents in the bias), the whole, the second one; the first ones of the value,
    which reads the latents among the transition's inputs, and of the prior, which has its own.
    """
    latent, width, _ = MODEL_SIZES[size]
    own = latent + ACTIONS
    return [
        linear.compile_spec(dtype, ACTIONS, width, True, strides=(own, own, width)),
        linear.compile_spec(dtype, own, width, True),
        linear.compile_spec(dtype, width, width, False),
        linear.compile_spec(dtype, latent, width, True, strides=(own, latent, width)),
        linear.compile_spec(dtype, latent, width, True),
    ]


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("size", ["tiny", "1M", "5M"])
def test_linear_norm_mish_builds_with_tensor_cores(size, arch, tmp_path):
    for spec in layers(size, BF16):
        found = resources(spec, arch, tmp_path)
        assert_clean(found, arch)
        assert found["HGMMA" if arch == 90 else "HMMA"] > 0
        if arch == 90:  # two programs per multiprocessor, 1 KiB of which the system takes for itself
            threads = 32 * spec.options["num_warps"]
            assert 2 * threads * found["REG"] <= REGISTERS
            assert 2 * (found["SHARED"] + 1024) <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("arch", [90, 80])
def test_linear_norm_mish_builds_in_float32(arch, tmp_path):
    for spec in layers("1M", F32) + layers("5M", F32)[2:] + layers("tiny", F32)[:1]:
        found = resources(spec, arch, tmp_path)
        assert_clean(found, arch)
        assert found["HGMMA"] == found["HMMA"] == 0  # no TF32


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(BF16, F32), (F32, BF16)])
def test_linear_norm_mish_builds_for_mixed_types(dtype, out_dtype, arch, tmp_path):
    latent, width, _ = MODEL_SIZES["1M"]
    spec = linear.compile_spec(dtype, latent, width, True, out_dtype)
    names = {BF16: "*bf16", F32: "*fp32"}
    pointers = {name: kind for name, kind in spec.signature.items() if name.endswith("_ptr")}
    parameters = dict.fromkeys(("bias_ptr", "norm_weight_ptr", "norm_bias_ptr"), "*fp32")
    inputs = dict.fromkeys(("x_ptr", "weight_ptr"), names[dtype])
    assert pointers == {**inputs, **parameters, "out_ptr": names[out_dtype]}
    assert_clean(resources(spec, arch, tmp_path), arch)


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_elementwise_kernels_build(dtype, arch, tmp_path):
    for size in ("tiny", "1M", "5M"):
        latent = MODEL_SIZES[size][0]
        outputs = latent + BINS + 1
        strides = (outputs, latent + ACTIONS, latent + ACTIONS)
        for residual in (True, False):
            assert_clean(
                resources(simnorm.compile_spec(dtype, latent, GROUP, residual, strides=strides), arch, tmp_path), arch
            )
        assert_clean(resources(two_hot.compile_spec(dtype, BINS, outputs), arch, tmp_path), arch)


def test_references_are_the_models_own_layers():
    layer, x = NormedLinear(12, 24), torch.randn(30, 12)
    torch.nn.init.normal_(layer[1].weight)
    torch.nn.init.normal_(layer[1].bias)
    arguments = (x, layer[0].weight, layer[0].bias.unsqueeze(0), layer[1].weight, layer[1].bias, layer[1].eps)
    torch.testing.assert_close(linear.linear_norm_mish_reference(*arguments), layer(x))
    bias = torch.randn(5, 24)
    by_group = [
        linear.linear_norm_mish_reference(rows, arguments[1], bias[g, None], *arguments[3:])
        for g, rows in enumerate(x.split(6))
    ]
    torch.testing.assert_close(
        linear.linear_norm_mish_reference(x, arguments[1], bias, *arguments[3:]), torch.cat(by_group)
    )
    update, z = torch.randn(7, 24) * 10, torch.rand(7, 24)
    torch.testing.assert_close(simnorm.residual_simnorm_reference(update, z, 4), SimNorm(4)(update, base=z + 1e-3))
    torch.testing.assert_close(simnorm.residual_simnorm_reference(update, None, 4), SimNorm(4)(update))
    head, logits = TwoHot(BINS, (-10.0, 10.0)), torch.randn(7, BINS)
    torch.testing.assert_close(two_hot.two_hot_expectation_reference(logits, head.bins), head.decode(logits))


def poisoned(rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of NaN, and the output in the middle of its columns."""
    buffer = torch.full((rows, columns + 16), torch.nan, dtype=dtype, device=device)
    return buffer, buffer[:, 8 : 8 + columns]


def assert_result(buffer: torch.Tensor, out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """The output is near the float32 reference, and nothing beside it was written."""
    # bfloat16 keeps 8 bits: the linear output is rounded before it is normalised, and the result again.
    tolerance = {F32: {"rtol": 2e-5, "atol": 2e-5}, BF16: {"rtol": 2e-2, "atol": 3e-2}}[dtype]
    torch.testing.assert_close(out.float(), expected, **tolerance)
    assert buffer.isnan().sum() == buffer.numel() - out.numel()


def check_linear(
    rows: int,
    in_dim: int,
    width: int,
    groups: int,
    dtype: torch.dtype,
    device: str,
    out_dtype: torch.dtype | None = None,
) -> None:
    out_dtype = out_dtype or dtype

    def columns(n: int, k: int, scale: float) -> torch.Tensor:
        return (torch.randn(n, k + 24, device=device) * scale).to(dtype)[:, 16 : 16 + k]

    x, weight = columns(rows, in_dim, 1.0), columns(width, in_dim, in_dim**-0.5)
    bias = torch.randn(groups, width, device=device) + 1.0
    norm = torch.randn(2, width, device=device)
    buffer, out = poisoned(rows, width, out_dtype, device)
    linear.linear_norm_mish(x, weight, bias, norm[0], norm[1], 0.1, out)
    assert_result(buffer, out, linear.linear_norm_mish_reference(x, weight, bias, norm[0], norm[1], 0.1), out_dtype)


def check_simnorm(rows: int, latent: int, group: int, dtype: torch.dtype, device: str) -> None:
    update = (torch.randn(rows, latent + 6, device=device) * 10.0).to(dtype)[:, 2 : 2 + latent]  # some beyond 20
    z = SimNorm(group)(torch.randn(rows, latent, device=device) * 5.0).to(dtype)
    for base in (z, None):
        expected = simnorm.residual_simnorm_reference(update, base, group)
        buffer, out = poisoned(rows, latent, dtype, device)
        simnorm.residual_simnorm(update, base, group, out)
        assert_result(buffer, out, expected, dtype)
    expected = simnorm.residual_simnorm_reference(update, z, group)
    simnorm.residual_simnorm(update, z, group, z)  # in place
    assert_result(z, z, expected, dtype)
    update[0, 0] = torch.nan
    simnorm.residual_simnorm(update, None, group, z)
    assert z[0, :group].isnan().all() and not z[0, group:].isnan().any() and not z[1:].isnan().any()


def check_two_hot(rows: int, bins: int, dtype: torch.dtype, device: str) -> None:
    head = TwoHot(bins, (-10.0, 10.0)).to(device)
    logits = (torch.randn(rows, bins + 9, device=device) * 3.0).to(dtype)[:, 4 : 4 + bins]
    logits[0] = 0.0  # no idea: the value is 0
    logits[-1, -1] = 90.0  # sure of the last bin
    buffer = torch.full((rows + 8,), torch.nan, device=device)
    out = buffer[4:-4]
    two_hot.two_hot_expectation(logits, head.bins, out)
    assert_result(buffer, out, head.decode(logits.float()), F32)
    assert abs(out[0]) < 1e-5


def check_compiled(device: str) -> None:
    """``torch.compile`` takes every operator into one graph, and sees what it writes."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, weight, vector, out, value):
        linear.linear_norm_mish(x, weight, vector[None], vector, vector, 1e-5, out)
        simnorm.residual_simnorm(out, None, 4, out)
        two_hot.two_hot_expectation(out, vector, value)
        return out + 1.0, value + 1.0

    x, weight, vector = (torch.randn(*shape, device=device) for shape in ((8, 8), (16, 8), (16,)))
    out, value = torch.empty(8, 16, device=device), torch.empty(8, device=device)
    latent, decoded = step(x, weight, vector, out, value)
    hidden = linear.linear_norm_mish_reference(x, weight, vector[None], vector, vector, 1e-5)
    expected = simnorm.residual_simnorm_reference(hidden, None, 4)
    torch.testing.assert_close(latent, expected + 1.0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        decoded, two_hot.two_hot_expectation_reference(expected, vector) + 1.0, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(out + 1.0, latent)


def check_numerics(device: str, dtype: torch.dtype) -> None:
    """Every kernel against its reference: rows beside a full block, one group of rows and groups of 8, odd sizes."""
    shapes = ((136, 24, 128, 1), (136, 24, 128, 17), (8, 136, 416, 1), (3, 5, 100, 3), (16, 520, 912, 2))
    for rows, in_dim, width, groups in shapes:
        for out_dtype in (F32, BF16):
            check_linear(rows, in_dim, width, groups, dtype, device, out_dtype)
    for rows, latent, group in ((37, 64, 8), (1, 512, 8), (5, 24, 4)):
        check_simnorm(rows, latent, group, dtype, device)
    for rows, bins in ((37, BINS), (16, 7)):
        check_two_hot(rows, bins, dtype, device)


def python(code: str, **env: str):
    return run_process(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **env}, cwd=REPOSITORY / "tests"
    )


def test_kernels_match_their_references_in_the_interpreter():
    code = "import test_triton_kernels as t; t.check_numerics('cpu', t.F32); t.check_compiled('cpu')"
    result = python(code, TRITON_INTERPRET="1")
    assert result.rc == 0, result.stderr


def test_modules_import_without_triton():
    code = """
import sys
sys.modules["triton"] = sys.modules["triton.language"] = None
import torch
from m3po.kernels import linear_norm_mish, residual_simnorm
from m3po.kernels.two_hot_expectation import two_hot_expectation, two_hot_expectation_reference
logits, bins, out = torch.zeros(3, 5), torch.zeros(5), torch.zeros(3)
assert torch.equal(two_hot_expectation_reference(logits, bins), out)
try:
    two_hot_expectation(logits, bins, out)
except RuntimeError as error:
    print(error)
"""
    result = python(code)
    assert result.rc == 0, result.stderr
    assert "not installed" in result.stdout


def test_tensors_on_a_cpu_are_refused():
    x, vector, out = torch.zeros(4, 8), torch.zeros(8), torch.full((4, 8), 7.0)
    calls = (
        lambda: linear.linear_norm_mish(x, torch.zeros(8, 8), vector[None], vector, vector, 1e-5, out),
        lambda: simnorm.residual_simnorm(x, x, 8, out),
        lambda: two_hot.two_hot_expectation(x, vector, out[0, :4]),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="runs on CUDA, got tensors on cpu"):
            call()
    assert (out == 7.0).all()


def test_bad_arguments_are_named():
    x, weight, vector, out = torch.zeros(6, 8), torch.zeros(16, 8), torch.zeros(16), torch.zeros(6, 16)

    def layer(x=x, weight=weight, bias=vector[None], norm=vector, out=out):
        linear.linear_norm_mish(x, weight, bias, norm, norm, 1e-5, out)

    cases = (
        (lambda: layer(x=x.T), "x must be a matrix with contiguous rows"),
        (lambda: layer(weight=weight[:, :4].contiguous()), "weight must have 8 columns"),
        (lambda: layer(weight=weight.bfloat16()), "type of x"),
        (lambda: layer(x=x.double(), weight=weight.double()), "float32 and bfloat16, got torch.float64"),
        (lambda: layer(bias=torch.zeros(4, 16)), "divisor of the 6 rows"),
        (lambda: layer(norm=vector[:8]), "norm_weight and norm_bias"),
        (lambda: layer(out=out[:, :8]), "out must have shape"),
        (lambda: simnorm.residual_simnorm(out, out[:4], 8, out), "base must have update's shape"),
        (lambda: simnorm.residual_simnorm(out, None, 6, out), "group_size must be a power of two"),
        (lambda: simnorm.residual_simnorm(out, None, 32, out), "divides the 16 latent dimensions"),
        (lambda: two_hot.two_hot_expectation(out, vector, vector), r"out must be float32, contiguous, of shape \(6,\)"),
        (lambda: two_hot.compile_spec(F32, 4096), "at most 2048 bins"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_kernels_match_their_references_on_the_device(dtype):
    check_numerics("cuda", dtype)
    for size in ("tiny", "1M", "5M"):
        latent, width, _ = MODEL_SIZES[size]
        for in_dim, groups in ((ACTIONS, 125), (latent + ACTIONS, 1), (width, 1), (latent, 1), (latent, 125)):
            check_linear(1000, in_dim, width, groups, dtype, "cuda")
        check_simnorm(1000, latent, GROUP, dtype, "cuda")
    check_two_hot(1000, BINS, dtype, "cuda")
    check_compiled("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_captured_in_a_cuda_graph_and_allocate_nothing():
    x, weight = (torch.randn(n, 64, device="cuda", dtype=BF16) for n in (300, 128))
    vector, bins = torch.ones(128, device="cuda"), torch.linspace(-1.0, 1.0, 128, device="cuda")
    out, value = torch.empty(300, 128, device="cuda", dtype=BF16), torch.empty(300, device="cuda")

    def step():
        linear.linear_norm_mish(x, weight, vector[None], vector, vector, 1e-5, out)
        simnorm.residual_simnorm(out, None, 8, out)
        two_hot.two_hot_expectation(out, bins, value)

    step()
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.normal_()
    step()
    expected = out.clone(), value.clone()
    out.fill_(torch.nan)
    value.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected[0]) and torch.equal(value, expected[1])
