"""Profiles that come with the library, each number with its source beside it."""

from monarch_fx.costs.profile import DeviceProfile

# How cuBLAS cuts products: fitted to 120 products of 768 to 14336 features at 1 to 8192 tokens on an H200 (bf16, CUDA
# graphs, PyTorch 2.11, median error 5 %). It predicts dense and low-rank products of an H100 within 20 %.
_LAUNCH_S = 2.5e-6
_OVERLAP = 0.6
_TILE = 64
_FILL = 65
_KERNELS = 0.76  # from the H200

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
                "NVIDIA A100 datasheet, 80GB SXM, dense, float32 without TF32; copies taken at full bandwidth, "
                "launch, overlap, fill and kernels as on an H200"
            ),
            peak_flops={"float64": 19.5e12, "float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
            bandwidth_bytes_per_s=2.039e12,
            copy_bytes_per_s=2.039e12,
            launch_s=_LAUNCH_S,
            overlap=_OVERLAP,
            tile=_TILE,
            units=108,  # SMs
            fill=_FILL,
            kernel_efficiency=_KERNELS,
        ),
        DeviceProfile(
            name="h100",
            source=(
                "bfloat16 and bandwidth measured on an H100 80GB SXM (8192^3 product; copy, bytes read + written); "
                "float64 and float32 from NVIDIA's H100 datasheet, dense, without TF32; launch, overlap, fill and "
                "kernels as on an H200"
            ),
            peak_flops={"float64": 67e12, "float32": 67e12, "bfloat16": 790e12, "float16": 790e12},
            bandwidth_bytes_per_s=3.02e12,
            copy_bytes_per_s=3.02e12,
            launch_s=_LAUNCH_S,
            overlap=_OVERLAP,
            tile=_TILE,
            units=132,
            fill=_FILL,
            kernel_efficiency=_KERNELS,
        ),
        DeviceProfile(
            name="h200",
            # a fit to four of the eleven sizes predicts the other seven with 9 % and 29 %
            source=(
                "fitted to 1320 products in bfloat16 on an H200 SXM, PyTorch 2.11, CUDA 13.0 (python -m benchmarks run "
                "layers-gpu): median error 7 %, 95th percentile 24 %; other dtypes and copies from measure_device()"
            ),
            peak_flops={"float64": 67e12, "float32": 55e12, "bfloat16": 856e12, "float16": 820e12},
            bandwidth_bytes_per_s=4.6e12,
            copy_bytes_per_s=1.88e12,
            launch_s=2.3e-6,
            overlap=0.49,
            tile=_TILE,
            units=132,
            fill=69,
            kernel_efficiency=_KERNELS,
        ),
        DeviceProfile(
            name="rtx4090",
            source=(
                "NVIDIA Ada GPU architecture whitepaper, appendix A, dense, FP32 accumulation, float32 without TF32; "
                "copies taken at full bandwidth, launch, overlap, fill and kernels as on an H200"
            ),
            peak_flops={"float64": 1.29e12, "float32": 82.6e12, "bfloat16": 165.2e12, "float16": 165.2e12},
            bandwidth_bytes_per_s=1.008e12,
            copy_bytes_per_s=1.008e12,
            launch_s=_LAUNCH_S,
            overlap=_OVERLAP,
            tile=_TILE,
            units=128,
            fill=_FILL,
            kernel_efficiency=_KERNELS,
        ),
    )
}
