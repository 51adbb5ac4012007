"""Launch configurations that were the fastest on known GPUs: device -> kernel -> key -> configuration.

The key is what the kernel's ``Tuned.key`` returns. A first call measures only what is missing here. To add a GPU, let
its first calls measure, then copy what ``tuning.chosen`` returns.
"""

ROWS = ("ENTROPY", "LIKELIEST", "FORWARD", "BACKWARD", "WEIGHTED", "CAPPED", "SCALED")
FORWARD, BACKWARD = (tuple(flag == direction for flag in ROWS) for direction in ("FORWARD", "BACKWARD"))

CHOICES = {
    "NVIDIA H200": {
        "rows_kernel": {
            ("cross_entropy_plain", 65536, True, "torch.bfloat16", *BACKWARD, True): {
                "LANES": 512,
                "UNROLL": 1,
                "num_warps": 16,
            },
            ("cross_entropy_plain", 262144, False, "torch.bfloat16", *FORWARD, True): {
                "LANES": 512,
                "UNROLL": 2,
                "num_warps": 16,
            },
            ("cross_entropy_smoothed", 131072, False, "torch.bfloat16", *FORWARD, True): {
                "LANES": 256,
                "UNROLL": 1,
                "num_warps": 8,
            },
        },
    },
}
