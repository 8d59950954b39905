"""From the fused graph to the plan and its kernels."""
