"""Profiles that come with the library, each number with its source beside it."""

from monarch_fx.costs.profile import DeviceProfile

# How cuBLAS and the kernels of this library cut products: fitted to 696 Monarch and 32 dense products of four sizes
# (768 -> 2304, 1024 -> 1024, 4096 -> 4096, 14336 -> 4096) at 1 to 16384 tokens on an H100 (bfloat16, CUDA graphs,
# PyTorch 2.11; python -m benchmarks run layers-gpu); overlaps, fill and efficiency were then moved to where choices at
# all sizes, and on an H200, were best, and predictions of ffn-gpu no worse.
GPU = {
    "launch_s": 3.1e-6,
    "overlap": 0.67,
    "fill": 145.0,
    "kernel_efficiency": 0.82,
    "kernel_launch_s": 1.7e-6,
    "kernel_overlap": 0.47,
    "kernel_operand_bytes_per_s": 1.34e13,
}
HOPPER = {**GPU, "fused_efficiency": 0.6}

SHIPPED = {
    profile.name: profile
    for profile in (
        DeviceProfile(
            name="cpu",
            source=(
                "measure_device() on 2 cores of an AMD EPYC (Zen 4, AVX-512), PyTorch 2.13: 120 products in float32, "
                "median error 5 %"
            ),
            # float16 has no fast kernels there
            peak_flops={"float64": 9.0e10, "float32": 2.1e11, "bfloat16": 4.5e11, "float16": 3.0e9},
            bandwidth_bytes_per_s=3.2e10,
            copy_bytes_per_s=1.4e11,
            launch_s=3.2e-6,
            overlap=0.0,
        ),
        DeviceProfile(
            name="a100",
            source=(
                "NVIDIA A100 datasheet, 80GB SXM, dense, float32 without TF32; copies taken at full bandwidth, the "
                "rest as on an H100"
            ),
            peak_flops={"float64": 19.5e12, "float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12, "float16": 312e12},
            bandwidth_bytes_per_s=2.039e12,
            copy_bytes_per_s=2.039e12,
            tile=64,
            units=108,  # SMs
            **GPU,
            cache_bytes=13.3e6,
        ),
        DeviceProfile(
            name="h100",
            source=(
                "fitted to four of twelve sizes in bfloat16 on an H100 80GB SXM, PyTorch 2.11, CUDA 13.0 (python -m "
                "benchmarks run layers-gpu), four constants then moved by choices at all: median error at the other "
                "eight 4 %, 95th percentile 17 %; bandwidth and peak from an earlier fit, other dtypes and copies from "
                "measure_device(), TF32 from five dense products"
            ),
            peak_flops={"float64": 67e12, "float32": 56e12, "tf32": 470e12, "bfloat16": 907e12, "float16": 877e12},
            bandwidth_bytes_per_s=3.17e12,
            copy_bytes_per_s=1.98e12,
            tile=64,
            units=132,
            **HOPPER,
            cache_bytes=17.5e6,
        ),
        DeviceProfile(
            name="h200",
            source=(
                "the H100's, with the bandwidth and the float32 speed of an H200 SXM: an earlier fit to 1320 products "
                "in bfloat16 there, and measure_device(); 2112 products that were measured there (layers-gpu, PyTorch "
                "2.11) are predicted with median error 4 %, 95th percentile 19 %, and were looked at when the H100's "
                "constants were moved"
            ),
            peak_flops={"float64": 67e12, "float32": 55e12, "tf32": 470e12, "bfloat16": 907e12, "float16": 870e12},
            bandwidth_bytes_per_s=4.6e12,
            copy_bytes_per_s=1.88e12,
            tile=64,
            units=132,
            **HOPPER,
            cache_bytes=17.5e6,
        ),
        DeviceProfile(
            name="rtx4090",
            source=(
                "NVIDIA Ada GPU architecture whitepaper, appendix A, dense, FP32 accumulation, float32 without TF32; "
                "copies taken at full bandwidth, the rest as on an H100"
            ),
            peak_flops={
                "float64": 1.29e12,
                "float32": 82.6e12,
                "tf32": 82.6e12,
                "bfloat16": 165.2e12,
                "float16": 165.2e12,
            },
            bandwidth_bytes_per_s=1.008e12,
            copy_bytes_per_s=1.008e12,
            units=128,
            tile=64,
            **GPU,
            cache_bytes=24e6,
        ),
    )
}
