"""How fast are the kernels of `kernels/cuda`? On any NVIDIA GPU, beside what else is installed there.

    qlearn bench kernels [--out FILE]            or: python -m qlearn.bench.kernels

**Products.** y = x W^T with 4-bit weights, one scale for 128 of them, on matrices of Llama 8B and 70B, beside

    16 bit             torch's product with the float matrix, by cuBLAS
    torch int4         torch._weight_int4pack_mm, one scale and zero-point for 128 weights
    bitsandbytes NF4   its 4-bit product, one scale for 64 weights, if it is installed

and at one row of x with weights of 2, 3 and 8 bits, GGUF blocks, MXFP4, and ternary numbers. A language model goes
from one matrix to the next, so each call takes another of several copies of its weight, 400 MB of them, and no cache
helps. The calls are recorded in a CUDA graph; a figure is the median of 9 replays, and all is done twice. "overlapped"
means that a kernel may begin while the last one still runs (`kernels/cuda/launch.py`), as in a model's graph.

**Quantizing** a layer of Llama 8B, seven matrices: SINQ with its whole balancing, round to nearest, and torch's
operations for the same; MXFP4 with a rotation; the two passes of fake quantization.

`GB/s` counts what has to be read and written once. About two minutes.
"""

import argparse
import functools
from importlib.metadata import version
from pathlib import Path

import torch

from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance

MATRICES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))  # outputs, inputs
ROWS = (1, 2, 4, 8, 16, 32)
LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
COPIES = 400_000_000  # bytes
REPLAYS, REPEATS = 9, 2


def main(arguments=None):
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description="Time the CUDA kernels beside those of other packages.")
    parser.add_argument("--out", type=Path, help="a folder for kernels.json; the package's results by default")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise RuntimeError("there is no NVIDIA GPU that torch can use; this benchmark needs one")
    record = {**provenance("qlearn bench kernels"), **versions(), "copy_gb_per_s": copy_speed()}
    print(f"{record['gpu']}, copying {record['copy_gb_per_s']:.0f} GB/s")
    record["products"] = products()
    record["one_row"] = one_row()
    record["quantizing"] = quantizing()
    write("kernels", record, options.out)


def versions():
    """Those of the packages that take part, None for what is not there."""
    found = {}
    for name in ("numba", "numba-cuda", "bitsandbytes"):
        try:
            found[name] = version(name)
        except ImportError:
            found[name] = None
    return found


def times(calls, repeats=REPEATS):
    """Microseconds of one of the calls, in a CUDA graph that makes each of them twice: a median for each repeat."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls, *calls]:
            call()
    return [_median(graph, 2 * len(calls)) for _ in range(repeats)]


def _median(graph, count):
    found = []
    for _ in range(REPLAYS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1000 / count)
    return round(sorted(found[2:])[REPLAYS // 2], 3)


def copy_speed():
    """GB/s of torch's copy of half a gigabyte, read and written."""
    source = torch.rand(2**27, device="cuda")
    target = torch.empty_like(source)
    return round(2 * source.nbytes / min(times([lambda: target.copy_(source)])) * 1e-3)


def products():
    """The table of 4-bit products: a list of dicts."""
    rows = []
    for N, K in MATRICES:
        made = {name: make(N, K) for name, make in VARIANTS.items()}
        for M in ROWS:
            row = {"N": N, "K": K, "M": M, "us": {}}
            for name, variant in made.items():
                calls = variant and variant(M)
                if calls:
                    row["us"][name] = times(calls)
            rows.append(row)
            print(
                f"{N:6} x {K:<6} {M:2} rows: ", ", ".join(f"{k} {min(v):.1f}" for k, v in row["us"].items()), flush=True
            )
    return rows


def _copies(nbytes):
    return max(2, COPIES // nbytes)


def _float_matrix(N, K):
    weights = [torch.randn(N, K, device="cuda", dtype=torch.float16) for _ in range(_copies(2 * N * K))]

    def of(M):
        x = torch.randn(M, K, device="cuda", dtype=torch.float16)
        y = torch.empty(M, N, device="cuda", dtype=torch.float16)
        return [functools.partial(torch.mm, x, weight.T, out=y) for weight in weights]

    return of


def quantized_matrix(N, K, bits=4, group=128, zeros=False):
    """A random QuantizedTensor, made directly of codes: nothing is measured of how it got them."""
    from qlearn.formats.integers import Integers
    from qlearn.tensor import QuantizedTensor

    format = Integers(bits, signed=not zeros)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (N, K), device="cuda", dtype=torch.int8)
    scales = (torch.rand(N, K // group, device="cuda") * 0.01 + 0.001).half()
    return QuantizedTensor.from_codes(codes, scales, format, (1, group))


def _ours(dtype, overlap):
    def make(N, K, bits=4):
        from qlearn.kernels.cuda import layout, matmul

        units = layout.arrange(quantized_matrix(N, K, bits))
        copies = [
            layout.Units(units.data.clone(), units.shape, units.bits, units.group) for _ in range(_copies(units.nbytes))
        ]

        def of(M):
            x = torch.randn(M, K, device="cuda").to(dtype)
            y = torch.empty(M, N, device="cuda", dtype=dtype)
            return [matmul.prepare(x, copy, y, overlap=overlap) for copy in copies]

        return of

    return make


def _torch_int4(N, K):
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm"):
        return None
    weights = []
    for _ in range(_copies(N * K // 2)):
        codes = torch.randint(0, 256, (N, K // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        weights.append((packed, torch.rand(K // 128, N, 2, device="cuda").bfloat16()))

    def of(M):
        x = torch.randn(M, K, device="cuda").bfloat16()
        multiply = torch.ops.aten._weight_int4pack_mm
        return [functools.partial(multiply, x, packed, 128, scales) for packed, scales in weights]

    return of


def _bitsandbytes(N, K):
    try:
        import bitsandbytes.functional as F
        from bitsandbytes import matmul_4bit
    except Exception:  # it may be there without a library for this GPU
        return None
    weight = torch.randn(N, K, device="cuda").bfloat16()
    weights = [F.quantize_4bit(weight, quant_type="nf4") for _ in range(_copies(N * K // 2))]

    def of(M):
        x = torch.randn(M, K, device="cuda").bfloat16()
        return [functools.partial(matmul_4bit, x, codes.t(), quant_state=state) for codes, state in weights]

    return of


VARIANTS = {
    "16 bit": _float_matrix,
    "torch int4": _torch_int4,
    "bitsandbytes NF4": _bitsandbytes,
    "qlearn": _ours(torch.float16, False),
    "qlearn overlapped": _ours(torch.float16, True),
    "qlearn bfloat16 overlapped": _ours(torch.bfloat16, True),
}


def one_row():
    """Other formats, one row of x, overlapped: a list of dicts."""
    rows = []
    for N, K in MATRICES:
        for name, make in FORMATS.items():
            calls, nbytes = make(N, K)
            found = times(calls)
            rows.append({"N": N, "K": K, "format": name, "bytes": nbytes, "us": found})
            print(f"{N:6} x {K:<6} {name:10} {min(found):6.1f} µs  {nbytes / min(found) * 1e-3:5.0f} GB/s", flush=True)
    return rows


def _bits(bits):
    def make(N, K):
        from qlearn.kernels.cuda.layout import unit_bytes

        return _ours(torch.float16, True)(N, K, bits)(1), N * K // 2048 * unit_bytes(bits, 128)

    return make


def _blocks(block_type):
    def make(N, K):
        from qlearn.formats.gguf_blocks import BLOCK_TYPES
        from qlearn.kernels.cuda import gguf

        kind = BLOCK_TYPES[block_type]
        row = K // kind.weights * kind.nbytes
        x, y = (torch.zeros(1, n, device="cuda", dtype=torch.float16) for n in (K, N))
        x.normal_()
        weights = [torch.randint(0, 60, (N, row), device="cuda", dtype=torch.uint8) for _ in range(_copies(N * row))]
        return [_all(gguf.prepared(x, weight, y, block_type, overlap=True)) for weight in weights], N * row

    return make


def _ternary(bits):
    def make(N, K):
        from qlearn.kernels.cuda import ternary

        trits = torch.randint(-1, 2, (N, K), dtype=torch.int8)
        packed = (
            ternary.pack_rows(trits).cuda()
            if bits == 1.6
            else torch.randint(0, 256, (N, K // 4), dtype=torch.uint8).cuda()
        )
        packed = packed if bits == 1.6 else packed & packed >> 1 & 0x55 | packed & ~(packed << 1) & 0xAA  # no code of 3
        x = torch.randint(-127, 128, (1, K), device="cuda", dtype=torch.int8)
        y = torch.empty(1, N, device="cuda", dtype=torch.int32)
        weights = [packed.clone() for _ in range(_copies(packed.nbytes))]
        return [_all(ternary.prepared(x, weight, y, bits, overlap=True)) for weight in weights], packed.nbytes

    return make


def _all(launches):
    def call():
        for launch in launches:
            launch()

    return call


FORMATS = {
    **{f"{bits} bits": _bits(bits) for bits in (2, 3, 4, 8)},
    **{name: _blocks(name) for name in ("Q4_0", "Q4_K", "Q6_K", "Q8_0", "MXFP4")},
    **{f"ternary {bits}": _ternary(bits) for bits in (2, 1.6)},
}


def quantizing():
    """Milliseconds for a layer of Llama 8B, bfloat16, groups of 64, 4 bits; and microseconds of the rest."""
    from qlearn.kernels.cuda import fake_quant, mxfp4, rtn, sinq

    layer = [torch.randn(shape, device="cuda").mul_(0.02).bfloat16() for shape in LAYER]
    numbers = sum(weight.numel() for weight in layer)
    tokens = [torch.randn(16384, 4096, device="cuda").bfloat16() for _ in range(2)]
    gradients = [torch.randn_like(weight) for weight in layer]

    def whole(step):
        return [_all([functools.partial(step, weight) for weight in layer])]

    def by_torch(weight):  # absmax in groups of 64, as it is written down
        groups = weight.float().view(-1, 64)
        scale = groups.abs().amax(1, keepdim=True) / 7
        return (groups / scale).round().clamp(-8, 7).to(torch.int8), scale.half()

    found = {
        "SINQ": times(whole(lambda w: sinq.launch(w, 4, 64, 16, None, True, torch.float16))),
        "absmax": times(whole(lambda w: rtn.launch(w, 4, 64, torch.float16, True))),
        "zero_point": times(whole(lambda w: rtn.launch(w, 4, 64, torch.float16, False))),
        "absmax, torch's operations": times(whole(by_torch)),
        "fake quantization, values": times(whole(fake_quant.signed_absmax_values)),
        "fake quantization, gradient": times(
            [
                _all(
                    [
                        functools.partial(fake_quant.signed_absmax_gradient, w, g)
                        for w, g in zip(layer, gradients, strict=True)
                    ]
                )
            ]
        ),
    }
    for size in (None, 32, 64, 128):
        name = "MXFP4 of 16384 x 4096" + ("" if size is None else f", Hadamard {size}")
        found[name] = times([functools.partial(mxfp4.quantize_mxfp4, x, size) for x in tokens])
    for name, us in found.items():
        print(f"{name:36} {min(us):8.1f} µs", flush=True)
    return {"numbers": numbers, "us": found}


if __name__ == "__main__":
    main()
