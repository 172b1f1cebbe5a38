"""Profiles that come with the library, each number with its source beside it."""

from monarch_fx.costs.profile import DeviceProfile

# How cuBLAS cuts products: chosen by hand so that dense and low-rank products of 768 to 14336 features at 1 to 8192
# tokens on an H100 (bf16, CUDA graphs) come out within 20 %, two bmm with copies within 50 %. Other GPUs: taken alike.
_GPU_LAUNCH_S = 2.5e-6  # between two kernels of a CUDA graph
_GPU_TILE = 64
_GPU_FILL = 128

SHIPPED = {
    profile.name: profile
    for profile in (
        DeviceProfile(
            name="cpu",
            source=(
                "measure_device() on 2 cores of an AMD EPYC (Zen 4, AVX-512), PyTorch 2.13: 120 products in float32, "
                "median error 8 %"
            ),
            # float16 has no fast kernels there
            peak_flops={"float64": 7.9e10, "float32": 2.0e11, "bfloat16": 4.3e11, "float16": 2.3e9},
            bandwidth_bytes_per_s=4.0e10,
            launch_s=3.1e-6,
            overlap=0.0,
        ),
        DeviceProfile(
            name="a100",
            source="NVIDIA A100 datasheet, 80GB SXM, dense; float32 without TF32",
            peak_flops={"float64": 19.5e12, "float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
            bandwidth_bytes_per_s=2.039e12,
            launch_s=_GPU_LAUNCH_S,
            tile=_GPU_TILE,
            units=108,  # SMs
            fill=_GPU_FILL,
        ),
        DeviceProfile(
            name="h100",
            source=(
                "bfloat16 and bandwidth measured on an H100 80GB SXM (8192^3 product; copy, bytes read + written); "
                "float64 and float32 from NVIDIA's H100 datasheet, SXM, dense, float32 without TF32"
            ),
            peak_flops={"float64": 67e12, "float32": 67e12, "bfloat16": 790e12, "float16": 790e12},
            bandwidth_bytes_per_s=3.02e12,
            launch_s=_GPU_LAUNCH_S,
            tile=_GPU_TILE,
            units=132,
            fill=_GPU_FILL,
        ),
        DeviceProfile(
            name="h200",
            source="NVIDIA H200 datasheet, SXM, dense; float32 without TF32",
            peak_flops={"float64": 67e12, "float32": 67e12, "bfloat16": 989.5e12, "float16": 989.5e12},
            bandwidth_bytes_per_s=4.8e12,
            launch_s=_GPU_LAUNCH_S,
            tile=_GPU_TILE,
            units=132,
            fill=_GPU_FILL,
        ),
        DeviceProfile(
            name="rtx4090",
            source="NVIDIA Ada GPU architecture whitepaper, appendix A, dense, FP32 accumulation; float32 without TF32",
            peak_flops={"float64": 1.29e12, "float32": 82.6e12, "bfloat16": 165.2e12, "float16": 165.2e12},
            bandwidth_bytes_per_s=1.008e12,
            launch_s=_GPU_LAUNCH_S,
            tile=_GPU_TILE,
            units=128,
            fill=_GPU_FILL,
        ),
    )
}
